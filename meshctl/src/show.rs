//! What a person sees, and how well things are.

use std::{
    collections::BTreeMap,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::Serialize;

use crate::{
    Verdict,
    preflight::{Check, Level},
    relays::health_verdict,
    report::{
        AcceptedRollback, ControllerStatus, CreatedToken, DnsQuery, Endpoint, Nodes, PathWhy,
        Peers, Ping, PingReply, Preflight, RelayFiles, RemovedNode, RevokedToken, Service,
        Services, Status, StatusController, StatusRelay, StatusUplink, Tokens, Uninstalled,
        UntilDirect,
    },
    snapshot::ago,
    table::{Cell, Tone, bytes, columns, duration, milliseconds, printable, table},
};

/// Something to show.
pub(crate) trait Report: Serialize {
    /// With `--watch` each look shows only what is new, below what was shown before.
    const FOLLOWS: bool = false;

    /// For a person; ends with a line break.
    fn text(&self, colours: bool) -> String;

    /// For the exit code.
    fn verdict(&self) -> Verdict {
        Verdict::Ok
    }
}

/// The newest of what was denied or audited: half a screen with the rest. `--json` has all.
const POLICY_EVENTS_SHOWN_MAX: usize = 8;

impl Report for Status {
    fn text(&self, colours: bool) -> String {
        let health = match self.verdict() {
            Verdict::Ok => Tone::Good,
            Verdict::Degraded => Tone::Warning,
            Verdict::Down | Verdict::Usage => Tone::Bad,
        };
        let StatusController {
            address,
            connected,
            asked_in_s,
        } = &self.controller;
        let controller = match (address, connected, asked_in_s) {
            (None, ..) => Cell::new("none configured", Tone::Faint),
            (Some(address), true, _) => Cell::new(format!("{address}, connected"), Tone::Good),
            (Some(address), false, Some(in_s)) => {
                let text = format!("{address}, metered: asked in {}", duration(*in_s));
                Cell::new(text, Tone::Good)
            }
            (Some(address), false, None) => {
                Cell::new(format!("{address}, not connected"), Tone::Warning)
            }
        };
        let snapshot = format!(
            "generation {}, {} old: {} nodes, {} services",
            self.snapshot.generation,
            duration(self.snapshot.age_s),
            self.snapshot.nodes,
            self.snapshot.services,
        );
        let site = self.site.as_deref().unwrap_or("-");
        let peers = self
            .peers
            .iter()
            .map(|(state, count)| format!("{count} {state}"));
        let services_unkept = self.services_unkept.as_deref();
        let services_unkept =
            services_unkept.map_or_else(String::new, |why| format!("services: {why}"));
        let policy = match self.policy_enforced {
            true => "enforced",
            false => "",
        };
        let served = self.service_interfaces.iter();
        let served = served.map(|(name, attached)| match attached {
            true => name.clone(),
            false => format!("{name} (not attached)"),
        });
        let mut rows = vec![
            row("node", format!("{} ({})", self.node, self.version)),
            vec!["health".into(), Cell::new(self.health, health)],
        ];
        let problems = self.problems.iter();
        rows.extend(problems.map(|problem| vec!["".into(), Cell::new(problem, health)]));
        let uplinks = self.uplinks.iter().map(uplink_text);
        let announced = counted(&self.lan_announcements);
        let announced = match announced.as_str() {
            "" => announced,
            counts => format!("announcements: {counts}"),
        };
        let mapped = self.port_mappings.iter();
        let mapped = mapped.map(|(gateway, said)| format!("{gateway}: {said}"));
        rows.extend([
            row("public key", &self.public_key),
            row("up", duration(self.uptime_ms / 1000)),
            row("site", site),
            row("overlay", self.overlay_addresses.join(", ")),
            row("interface", &self.interface),
            row("uplinks", uplinks.collect::<Vec<_>>().join(", ")),
            row("local", self.local_addresses.join(", ")),
            row("seen as", self.reflexive_addresses.join(", ")),
            row("NAT", &self.nat),
            row("mapped", mapped.collect::<Vec<_>>().join(", ")),
            row("LAN", announced),
            vec!["controller".into(), controller],
            row("snapshot", snapshot),
            row("certificate", expires(self.certificate_expires_unix_s)),
            row("peers", peers.collect::<Vec<_>>().join(", ")),
            row("DNS", self.dns_listen.join(", ")),
            row("serves", served.collect::<Vec<_>>().join(", ")),
            row("served", counted(&self.service_packets)),
            row("not kept", services_unkept),
            row("proxy", counted(&self.proxy)),
            row("policy", policy),
            row("judged", counted(&self.policy_packets)),
        ]);
        let events = self
            .policy_events
            .iter()
            .rev()
            .take(POLICY_EVENTS_SHOWN_MAX);
        rows.extend(events.map(|event| row("", event)));
        rows.push(row("drops", counted(&self.drops)));
        rows.retain(|row| row.get(1) != Some(&Cell::from("")));
        let mut text = columns(&rows, colours);
        if !self.relays.is_empty() {
            text.push('\n');
            let head = ["RELAY", "STATE", "HOME", "RTT", "PROBLEM"];
            let rows = self.relays.iter().map(relay_row).collect();
            text.push_str(&table(&head, rows, colours));
        }
        text
    }

    fn verdict(&self) -> Verdict {
        health_verdict(self.health)
    }
}

/// How many of which, without what there was none of.
pub(crate) fn counted(counts: &BTreeMap<String, u64>) -> String {
    let some = counts.iter().filter(|(_, count)| **count > 0);
    let words: Vec<_> = some
        .map(|(what, count)| format!("{count} {what}"))
        .collect();
    words.join(", ")
}

pub(crate) fn row(name: &str, value: impl AsRef<str>) -> Vec<Cell> {
    vec![name.into(), value.into()]
}

pub(crate) fn uplink_text(uplink: &StatusUplink) -> String {
    let mut words = vec![uplink.interface.as_str()];
    words.extend(uplink.used.then_some("(used)"));
    words.extend(uplink.metered.then_some("(metered)"));
    words.extend((!uplink.up).then_some("(no carrier)"));
    words.join(" ")
}

pub(crate) fn relay_row(relay: &StatusRelay) -> Vec<Cell> {
    vec![
        (&relay.name).into(),
        match &relay.transport {
            Some(transport) => Cell::new(transport, Tone::Good),
            None => Cell::new("down", Tone::Bad),
        },
        if relay.home { "home" } else { "" }.into(),
        milliseconds(relay.rtt_ms).into(),
        relay.problem.as_deref().unwrap_or_default().into(),
    ]
}

impl Report for Peers {
    fn text(&self, colours: bool) -> String {
        let head = [
            "PEER",
            "SITE",
            "STATE",
            "PATH",
            "RTT",
            "SENT",
            "RECEIVED",
            "LAST HEARD",
            "REASON",
        ];
        let row = |peer: &crate::report::Peer| {
            let heard = peer.last_received_ms;
            let heard = heard.map_or("never".to_owned(), |ms| {
                format!("{} ago", duration(ms / 1000))
            });
            let kind = if peer.external { " (external)" } else { "" };
            vec![
                format!("{}{kind}", peer.name).into(),
                peer.site.as_deref().unwrap_or("-").into(),
                Cell::new(&peer.state, state_tone(&peer.state)),
                peer.path.as_deref().unwrap_or("-").into(),
                milliseconds(peer.rtt_ms).into(),
                bytes(peer.sent_bytes).into(),
                bytes(peer.received_bytes).into(),
                heard.into(),
                peer.reason.as_deref().unwrap_or_default().into(),
            ]
        };
        table(&head, self.peers.iter().map(row).collect(), colours)
    }

    /// External peers come and go as they like.
    fn verdict(&self) -> Verdict {
        let nodes: Vec<_> = self.peers.iter().filter(|peer| !peer.external).collect();
        let lost = nodes
            .iter()
            .filter(|peer| peer.state == "unreachable")
            .count();
        match lost {
            0 => Verdict::Ok,
            lost if lost == nodes.len() => Verdict::Down,
            _ => Verdict::Degraded,
        }
    }
}

pub(crate) fn state_tone(state: &str) -> Tone {
    match state {
        "direct" | "primary" => Tone::Good,
        "relayed" | "waking" | "suspect" | "probing" => Tone::Warning,
        "unreachable" | "dead" => Tone::Bad,
        _ => Tone::Faint,
    }
}

impl PingReply {
    /// A line for a person, without its end.
    pub(crate) fn line(&self, target: &str) -> String {
        let path = self.by();
        let result = match self.rtt_ms {
            Some(_) => milliseconds(self.rtt_ms),
            None => "no answer".to_owned(),
        };
        printable(&format!("{target} {}: {result}{path}", self.sequence))
    }

    /// ` by direct UDP 203.0.113.5:51820`, ` by relay r1 (quic)`; empty: by none.
    fn by(&self) -> String {
        let Some(path) = &self.path else {
            return String::new();
        };
        let kind = match self.kind.as_deref() {
            Some("direct") => "direct UDP ",
            Some("lan") => "LAN UDP ",
            Some("peer_relay") => "peer ", // What follows says "relay", which, and by what.
            _ => "",
        };
        format!(" by {kind}{path}")
    }
}

impl UntilDirect {
    fn line(&self, last: Option<&PingReply>) -> String {
        #[expect(clippy::cast_precision_loss, reason = "for people, to a tenth")]
        let after = self.after_ms as f64 / 1000.0;
        if self.direct {
            let direct = last.filter(|last| last.is_direct());
            let by = direct.map(PingReply::by).unwrap_or_default();
            return printable(&format!("direct after {after:.1} s{by}"));
        }
        let why = self.explanation.as_deref().unwrap_or("no reason is known");
        printable(&format!("not direct after {after:.1} s: {why}"))
    }
}

impl Report for Ping {
    /// The replies themselves were shown as they came.
    fn text(&self, _colours: bool) -> String {
        let times = match (self.min_ms, self.avg_ms, self.max_ms) {
            (Some(_), Some(_), Some(_)) => format!(
                ", min {}, avg {}, max {}",
                milliseconds(self.min_ms),
                milliseconds(self.avg_ms),
                milliseconds(self.max_ms)
            ),
            _ => String::new(),
        };
        let counts = format!("{} of {} answered{times}\n", self.received, self.sent);
        match &self.until_direct {
            Some(waited) => format!("{}\n{counts}", waited.line(self.replies.last())),
            None => counts,
        }
    }

    /// Echoes that were lost on the way to a direct path are of no account once it is there.
    fn verdict(&self) -> Verdict {
        let direct = self.until_direct.as_ref().map(|waited| waited.direct);
        match self.received {
            _ if direct == Some(true) => Verdict::Ok,
            0 => Verdict::Down,
            _ if direct == Some(false) => Verdict::Degraded,
            received if received < self.sent => Verdict::Degraded,
            _ => Verdict::Ok,
        }
    }
}

impl Report for PathWhy {
    fn text(&self, colours: bool) -> String {
        let mut rows = vec![
            row("node", &self.node),
            vec![
                "state".into(),
                Cell::new(&self.state, state_tone(&self.state)),
            ],
            row("reason", self.reason.as_deref().unwrap_or_default()),
            row("", self.explanation.as_deref().unwrap_or_default()),
            row("own NAT", self.own_nat.as_deref().unwrap_or_default()),
            row("its NAT", self.peer_nat.as_deref().unwrap_or_default()),
        ];
        let next = self
            .next_attempt_ms
            .map(|ms| format!("in {}", duration(ms.div_ceil(1000))));
        rows.push(row("next attempt", next.unwrap_or_default()));
        rows.retain(|row| row.get(1) != Some(&Cell::from("")));
        let mut text = columns(&rows, colours);
        if !self.paths.is_empty() {
            let head = [
                "PATH",
                "KIND",
                "STATE",
                "RTT",
                "LOSS",
                "PROBES",
                "FULL SIZE",
            ];
            text.push('\n');
            text.push_str(&table(
                &head,
                self.paths.iter().map(path_row).collect(),
                colours,
            ));
        }
        if !self.transitions.is_empty() {
            let row = |one: &crate::report::Transition| {
                vec![
                    format!("{} ago", duration(one.ago_ms / 1000)).into(),
                    format!("{} -> {}", one.from, one.to).into(),
                    (&one.reason).into(),
                    one.path.as_deref().unwrap_or("-").into(),
                ]
            };
            let rows = self.transitions.iter().map(row).collect();
            text.push('\n');
            let head = ["WHEN", "CHANGE", "REASON", "PATH"];
            text.push_str(&table(&head, rows, colours));
        }
        text
    }

    /// A relayed path works as meant where NATs allow no other.
    fn verdict(&self) -> Verdict {
        match self.state.as_str() {
            "unreachable" => Verdict::Down,
            "suspect" | "waking" => Verdict::Degraded,
            _ => Verdict::Ok,
        }
    }
}

fn path_row(path: &crate::report::Path) -> Vec<Cell> {
    vec![
        (&path.path).into(),
        (&path.kind).into(),
        Cell::new(&path.state, state_tone(&path.state)),
        milliseconds(path.rtt_ms).into(),
        format!("{:.1} %", path.loss * 100.0).into(),
        format!("{}/{}", path.probes_answered, path.probes_sent).into(),
        if path.full_size_ok { "yes" } else { "no" }.into(),
    ]
}

impl Report for Uninstalled {
    fn text(&self, _colours: bool) -> String {
        let mut text = format!("{} nodes are clean\n", self.nodes_cleaned.len());
        for node in &self.nodes_left {
            let line = format!("{node}: not reached");
            text.push_str(&printable(&line));
            text.push('\n');
        }
        if !self.nodes_left.is_empty() && self.deleted.is_empty() {
            text.push_str("they are cleaned when they come back: run this again then, or with --force to give them up\n");
        }
        for name in &self.deleted {
            text.push_str(&printable(&format!("deleted {name}")));
            text.push('\n');
        }
        text
    }

    fn verdict(&self) -> Verdict {
        match self.nodes_left.is_empty() {
            true => Verdict::Ok,
            false => Verdict::Degraded,
        }
    }
}

impl Report for Preflight {
    fn text(&self, colours: bool) -> String {
        let row = |check: &Check| {
            let (word, tone) = match check.level {
                Level::Ok => ("ok", Tone::Good),
                Level::Warning => ("warning", Tone::Warning),
                Level::Error => ("error", Tone::Bad),
            };
            vec![
                Cell::new(word, tone),
                (&check.name).into(),
                (&check.text).into(),
            ]
        };
        let rows: Vec<_> = self.checks.iter().map(row).collect();
        columns(&rows, colours)
    }

    fn verdict(&self) -> Verdict {
        match self.level {
            Level::Ok => Verdict::Ok,
            Level::Warning => Verdict::Degraded,
            Level::Error => Verdict::Down,
        }
    }
}

impl Report for Services {
    fn text(&self, colours: bool) -> String {
        let head = [
            "SERVICE",
            "KIND",
            "ADDRESSES",
            "PORTS",
            "ENDPOINTS",
            "GOES TO",
        ];
        table(
            &head,
            self.services.iter().map(service_row).collect(),
            colours,
        )
    }

    fn verdict(&self) -> Verdict {
        if self.services.iter().any(Service::is_cut_off) {
            Verdict::Degraded
        } else {
            Verdict::Ok
        }
    }
}

impl Service {
    /// It has ready endpoints, and none that this node reaches.
    fn is_cut_off(&self) -> bool {
        let chosen = self.endpoints.iter().any(|one| one.chosen);
        !chosen && self.endpoints.iter().any(|one| one.ready)
    }

    fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

fn service_row(service: &Service) -> Vec<Cell> {
    let count = |of: fn(&&Endpoint) -> bool| service.endpoints.iter().filter(of).count();
    let tone = if service.is_cut_off() {
        Tone::Bad
    } else {
        Tone::Plain
    };
    let chosen = count(|one| one.chosen);
    let tier = service
        .endpoints
        .iter()
        .find(|one| one.chosen)
        .map(|one| &one.tier);
    let goes_to = tier.map_or("-".to_owned(), |tier| format!("{chosen} {tier}"));
    vec![
        service.full_name().into(),
        (&service.kind).into(),
        service.cluster_ips.join(", ").into(),
        service.ports.join(", ").into(),
        format!(
            "{} ready of {}",
            count(|one| one.ready),
            service.endpoints.len()
        )
        .into(),
        Cell::new(goes_to, tone),
    ]
}

/// `services --endpoints`: the same for machines, a row for each endpoint for people.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub(crate) struct WithEndpoints(pub(crate) Services);

impl Report for WithEndpoints {
    fn text(&self, colours: bool) -> String {
        let head = [
            "SERVICE", "ENDPOINT", "NODE", "TIER", "READY", "ALIVE", "CHOSEN",
        ];
        let rows = self.0.services.iter().flat_map(|service| {
            let endpoints = service.endpoints.iter();
            let mut rows: Vec<_> = endpoints.map(|one| endpoint_row(service, one)).collect();
            if rows.is_empty() {
                rows.push(vec![service.full_name().into(), "-".into()]);
            }
            rows
        });
        table(&head, rows.collect(), colours)
    }

    fn verdict(&self) -> Verdict {
        self.0.verdict()
    }
}

fn endpoint_row(service: &Service, endpoint: &Endpoint) -> Vec<Cell> {
    let yes_or_no = |is: bool, otherwise| match is {
        true => Cell::from("yes"),
        false => Cell::new("no", otherwise),
    };
    vec![
        service.full_name().into(),
        (&endpoint.address).into(),
        endpoint.node.as_deref().unwrap_or("-").into(),
        (&endpoint.tier).into(),
        yes_or_no(endpoint.ready, Tone::Warning),
        yes_or_no(endpoint.alive, Tone::Bad),
        match endpoint.chosen {
            true => Cell::new("yes", Tone::Good),
            false if endpoint.ejected => Cell::new("ejected", Tone::Bad),
            false if endpoint.full => Cell::new("full", Tone::Warning),
            false => Cell::new("no", Tone::Faint),
        },
    ]
}

impl Report for DnsQuery {
    fn text(&self, colours: bool) -> String {
        let mut rows: Vec<Vec<Cell>> = self
            .answers
            .iter()
            .map(|answer| vec![answer.into()])
            .collect();
        let summary = format!(
            "{} from {} in {}",
            self.code,
            self.server,
            milliseconds(Some(self.ms))
        );
        let tone = match self.verdict() {
            Verdict::Ok => Tone::Faint,
            Verdict::Degraded => Tone::Warning,
            Verdict::Down | Verdict::Usage => Tone::Bad,
        };
        rows.push(vec![Cell::new(summary, tone)]);
        let hints = [
            (!self.name.contains('.')).then_some(
                "the name was asked for as it is: nothing is put behind it (edge-a1.mesh, shop.default.svc.cluster.local)",
            ),
            (self.verdict() == Verdict::Down).then_some(
                "`meshctl dns status` says who is asked for names that are not the mesh's, and what became of that",
            ),
        ];
        let hints = hints.into_iter().flatten();
        if self.answers.is_empty() {
            rows.extend(hints.map(|hint| vec![Cell::new(hint, Tone::Faint)]));
        }
        columns(&rows, colours)
    }

    /// "There is nothing" is an answer, though rarely the hoped-for one.
    fn verdict(&self) -> Verdict {
        match self.code.as_str() {
            "NOERROR" if !self.answers.is_empty() => Verdict::Ok,
            "NOERROR" | "NXDOMAIN" => Verdict::Degraded,
            _ => Verdict::Down,
        }
    }
}

impl Report for CreatedToken {
    /// Only the token: `TOKEN=$(meshctl token create)`.
    fn text(&self, _colours: bool) -> String {
        format!("{}\n", printable(&self.token))
    }
}

impl Report for Tokens {
    fn text(&self, colours: bool) -> String {
        let rows = self.tokens.iter().map(|token| {
            vec![
                (&token.id).into(),
                expires(Some(token.expires_unix_s)).into(),
                match token.uses_left {
                    0 => Cell::new("used up", Tone::Warning),
                    uses => uses.to_string().into(),
                },
                token.node.as_deref().unwrap_or("any").into(),
                (&token.description).into(),
            ]
        });
        table(
            &["ID", "HOLDS", "USES LEFT", "NODE", "DESCRIPTION"],
            rows.collect(),
            colours,
        )
    }
}

impl Report for RevokedToken {
    fn text(&self, _colours: bool) -> String {
        format!("token {} is worthless now\n", printable(&self.revoked))
    }
}

impl Report for AcceptedRollback {
    fn text(&self, _colours: bool) -> String {
        format!(
            "the controller's state counts for all nodes; this is epoch {}\n",
            self.epoch
        )
    }
}

impl Report for RemovedNode {
    fn text(&self, _colours: bool) -> String {
        format!(
            "node {} is no longer in the mesh; its address rests {}\n",
            printable(&self.removed),
            expires(Some(self.address_rests_until_unix_s))
        )
    }
}

impl Report for Nodes {
    fn text(&self, colours: bool) -> String {
        let rows = self.nodes.iter().map(|node| {
            vec![
                (&node.name).into(),
                node.site.as_deref().unwrap_or("-").into(),
                node.overlay_addresses.join(", ").into(),
                match node.connected {
                    true => Cell::new("yes", Tone::Good),
                    false => Cell::new("no", Tone::Warning),
                },
                match node.last_seen_unix_s {
                    _ if node.connected => "now".into(),
                    Some(at) => ago(at).into(),
                    None => "-".into(),
                },
                node.generation.to_string().into(),
                (&node.public_key).into(),
            ]
        });
        let head = [
            "NODE",
            "SITE",
            "OVERLAY",
            "CONNECTED",
            "LAST SEEN",
            "GENERATION",
            "PUBLIC KEY",
        ];
        table(&head, rows.collect(), colours)
    }
}

impl Report for RelayFiles {
    fn text(&self, _colours: bool) -> String {
        format!(
            "wrote {}\nwrote {} (secret)\nwrote {}\n",
            self.certificate, self.key, self.ca
        )
    }
}

impl Report for ControllerStatus {
    fn text(&self, colours: bool) -> String {
        let agents = format!(
            "{} of {} nodes connected",
            self.agents_connected, self.nodes
        );
        let mut rows = vec![
            row("mesh", &self.trust_domain),
            row("id", &self.mesh_id),
            row("generation", self.generation.to_string()),
            row("agents", agents),
            row("serves", if self.serves { "yes" } else { "not yet" }),
            row("leads", if self.leads { "yes" } else { "no" }),
        ];
        for (index, problem) in self.problems.iter().enumerate() {
            let name = if index == 0 { "problems" } else { "" };
            rows.push(vec![name.into(), Cell::new(problem, Tone::Warning)]);
        }
        columns(&rows, colours)
    }

    fn verdict(&self) -> Verdict {
        match self.problems.is_empty() {
            true => Verdict::Ok,
            false => Verdict::Degraded,
        }
    }
}

/// `for 23h 12m`; by this machine's clock.
pub(crate) fn expires(unix_s: Option<i64>) -> String {
    let Some(unix_s) = unix_s else {
        return String::new();
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now_s = now.map_or(0, |now| i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
    match u64::try_from(unix_s.saturating_sub(now_s)) {
        Ok(left_s) => format!("for {}", duration(left_s)),
        Err(_) => "expired".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use mesh_api::admin;

    use super::*;

    const NODES: usize = 100_000;

    /// Longer than an optimised build takes a hundred times; what grows with the square takes minutes.
    const PATIENCE: Duration = Duration::from_secs(20);

    fn shown<T: Report>(report: &T) -> [String; 3] {
        let json = serde_json::to_string(report).unwrap();
        [report.text(false), report.text(true), json]
    }

    #[test]
    fn of_100_000_peers_each_is_a_line_and_an_object_of_bounded_length_and_nobody_waits_long() {
        let peer = |number: usize| admin::Peer {
            name: format!("node-{number:06}.rack-17.warehouse"),
            public_key: "k".repeat(44),
            site: "warehouse-south".to_owned(),
            overlay_addresses: vec!["100.96.1.2".to_owned(), "fd7a:1:2:3:4:5:6:7".to_owned()],
            state: ["direct", "unreachable"][number % 2].to_owned(),
            reason: "relay_unreachable".to_owned(),
            path: "relay frankfurt-1 (relay_udp)".to_owned(),
            rtt_ms: 12.345,
            sent_bytes: u64::MAX,
            received_bytes: u64::MAX,
            last_received_ms: Some(86_400_000),
            last_handshake_ms: Some(86_400_000),
            external: false,
        };
        let said = admin::PeersResponse {
            peers: (0..NODES).map(peer).collect(),
        };
        let begun = Instant::now();
        let peers = Peers::from(said);
        assert_eq!(peers.verdict(), Verdict::Degraded);
        let [plain, coloured, json] = shown(&peers);
        let took = begun.elapsed();
        assert!(took < PATIENCE, "{took:?}");
        assert_eq!(plain.lines().count(), 1 + NODES);
        assert_eq!(coloured.lines().count(), 1 + NODES);
        for (text, each) in [(plain, 200), (coloured, 250), (json, 600)] {
            assert!(text.len() < each * (NODES + 1), "{}", text.len());
        }
    }

    #[test]
    fn the_status_of_a_node_that_knows_100_000_others_is_a_page() {
        let many = u32::try_from(NODES).unwrap();
        let said = admin::StatusResponse {
            node: "edge-a1".to_owned(),
            health: admin::Health::Degraded.into(),
            nodes: many,
            services: many,
            peers: ["direct", "relayed", "unreachable"]
                .map(|state| (state.to_owned(), many))
                .into(),
            // As many as an agent tells one by one, and how many others there are.
            problems: vec!["node node-000001 is unreachable: ".to_owned() + &"why ".repeat(50); 21],
            ..admin::StatusResponse::default()
        };
        for text in shown(&Status::from(said)) {
            assert!(text.len() < 16 << 10, "{}", text.len());
        }
    }
}
