//! `relays`, `health` and `netcheck`: what the status says of the ways out, on a page each.

use std::collections::BTreeMap;

use mesh_api::admin::FactsResponse;
use serde::Serialize;

use crate::{
    Verdict,
    report::{Status, StatusRelay, StatusUplink},
    show::{Report, relay_row, row, uplink_text},
    table::{Cell, Tone, columns, table},
};

/// `relays`.
#[derive(Debug, Serialize)]
pub(crate) struct Relays {
    pub(crate) relays: Vec<StatusRelay>,
}

impl Report for Relays {
    fn text(&self, colours: bool) -> String {
        if self.relays.is_empty() {
            return "the mesh has no relay: nodes that cannot reach each other directly cannot speak\n".to_owned();
        }
        let head = ["RELAY", "STATE", "HOME", "RTT", "PROBLEM"];
        table(&head, self.relays.iter().map(relay_row).collect(), colours)
    }

    /// Without any relay there is none that could be down.
    fn verdict(&self) -> Verdict {
        let up = self
            .relays
            .iter()
            .filter(|relay| relay.transport.is_some())
            .count();
        match up {
            0 if !self.relays.is_empty() => Verdict::Down,
            up if up < self.relays.len() => Verdict::Degraded,
            _ => Verdict::Ok,
        }
    }
}

/// `health`.
#[derive(Debug, Serialize)]
pub(crate) struct Health {
    pub(crate) node: String,
    /// `ok`, `degraded` or `down`.
    pub(crate) health: &'static str,
    /// Why it is not `ok`, a sentence each.
    pub(crate) problems: Vec<String>,
}

impl From<Status> for Health {
    fn from(status: Status) -> Self {
        let Status {
            node,
            health,
            problems,
            ..
        } = status;
        Self {
            node,
            health,
            problems,
        }
    }
}

impl Report for Health {
    fn text(&self, colours: bool) -> String {
        let tone = match self.verdict() {
            Verdict::Ok => Tone::Good,
            Verdict::Degraded => Tone::Warning,
            Verdict::Down | Verdict::Usage => Tone::Bad,
        };
        let mut rows = vec![vec![Cell::new(self.health, tone)]];
        rows.extend(self.problems.iter().map(|problem| vec![problem.into()]));
        columns(&rows, colours)
    }

    fn verdict(&self) -> Verdict {
        health_verdict(self.health)
    }
}

/// Of the word that JSON has.
pub(crate) fn health_verdict(health: &str) -> Verdict {
    match health {
        "ok" => Verdict::Ok,
        "down" => Verdict::Down,
        _ => Verdict::Degraded,
    }
}

/// `netcheck`.
#[derive(Debug, Serialize)]
pub(crate) struct Netcheck {
    /// `works`, `blocked`, or `unknown` while no relay has answered.
    pub(crate) udp: &'static str,
    /// `none`, `easy`, `hard`, `udp_blocked` or `unknown`.
    pub(crate) nat: String,
    /// Addresses at which others see this node, by family.
    pub(crate) reflexive_addresses: Vec<String>,
    pub(crate) local_addresses: Vec<String>,
    /// Default gateways, and whether they lead their outside port here.
    pub(crate) port_mappings: BTreeMap<String, String>,
    pub(crate) uplinks: Vec<StatusUplink>,
    pub(crate) relays: Vec<StatusRelay>,
    /// What answers in place of a relay or the controller, in their words; `null`: nothing that is seen.
    pub(crate) portal: Option<String>,
    /// The overlay's.
    pub(crate) mtu_bytes: u32,
    /// Paths by which only small packets pass, by node.
    pub(crate) mtu_holes: BTreeMap<String, Vec<String>>,
}

/// What TLS says when somebody else answers: webpki's and rustls' words for a certificate that is not the relay's, and what an
/// HTTP answer is called where a handshake was to come.
const PORTAL_SIGNS: [&str; 5] = [
    "invalid peer certificate",
    "UnknownIssuer",
    "NotValidForName",
    "corrupt message",
    "InvalidContentType",
];

impl Netcheck {
    pub(crate) fn new(status: Status, facts: &FactsResponse) -> Self {
        let udp = match status.nat.as_str() {
            "udp_blocked" => "blocked",
            "unknown" if status.reflexive_addresses.is_empty() => "unknown",
            _ => "works",
        };
        let relays = status
            .relays
            .iter()
            .filter_map(|relay| relay.problem.as_ref());
        let mut said = relays.chain(&status.problems);
        let portal = said.find(|text| PORTAL_SIGNS.iter().any(|sign| text.contains(sign)));
        let holes = facts
            .troubles
            .iter()
            .filter(|one| !one.small_only.is_empty());
        Self {
            udp,
            portal: portal.cloned(),
            mtu_bytes: facts.mtu_bytes,
            mtu_holes: holes
                .map(|one| (one.node.clone(), one.small_only.clone()))
                .collect(),
            nat: status.nat,
            reflexive_addresses: status.reflexive_addresses,
            local_addresses: status.local_addresses,
            port_mappings: status.port_mappings,
            uplinks: status.uplinks,
            relays: status.relays,
        }
    }
}

/// A mesh may have none at all.
fn no_relay_is_up(relays: &[StatusRelay]) -> bool {
    !relays.is_empty() && relays.iter().all(|relay| relay.transport.is_none())
}

impl Report for Netcheck {
    fn text(&self, colours: bool) -> String {
        let udp = match self.udp {
            "works" if no_relay_is_up(&self.relays) => Cell::new(
                "worked when a relay last answered; now none is up",
                Tone::Warning,
            ),
            "works" => Cell::new("works", Tone::Good),
            "blocked" => Cell::new(
                "blocked: traffic goes through relays, by TLS on TCP",
                Tone::Bad,
            ),
            _ => Cell::new("not known yet: no relay has answered", Tone::Warning),
        };
        let nat = match self.nat.as_str() {
            "none" => "none: this node has a public address",
            "easy" => "easy: one mapping for all destinations; direct paths can be made",
            "hard" => {
                "hard: another mapping for each destination; to another such, a relay stays in between"
            }
            "udp_blocked" => "not known: UDP is blocked",
            _ => "not known yet",
        };
        let mapped = self.port_mappings.iter();
        let mapped = mapped.map(|(gateway, said)| format!("{gateway}: {said}"));
        let mapped: Vec<_> = mapped.collect();
        let uplinks: Vec<_> = self.uplinks.iter().map(uplink_text).collect();
        let mut rows = vec![
            vec!["UDP".into(), udp],
            row("NAT", nat),
            row("seen as", self.reflexive_addresses.join(", ")),
            row("local", self.local_addresses.join(", ")),
            row("mapped", mapped.join(", ")),
            row("uplinks", uplinks.join(", ")),
        ];
        if let Some(said) = &self.portal {
            let text = format!(
                "something answers in place of the mesh (a captive portal, or TLS inspection): {said}"
            );
            rows.push(vec!["portal".into(), Cell::new(text, Tone::Bad)]);
        }
        if self.mtu_holes.is_empty() {
            rows.push(row(
                "MTU",
                format!("{} bytes pass wherever a path was proven", self.mtu_bytes),
            ));
        }
        for (node, paths) in &self.mtu_holes {
            let text = format!("to {node} only small packets pass by {}", paths.join(", "));
            rows.push(vec!["MTU".into(), Cell::new(text, Tone::Warning)]);
        }
        rows.retain(|row| row.get(1) != Some(&Cell::from("")));
        let relays = &self.relays;
        if relays.is_empty() {
            return columns(&rows, colours);
        }
        let head = ["RELAY", "STATE", "HOME", "RTT", "PROBLEM"];
        let relays = table(&head, relays.iter().map(relay_row).collect(), colours);
        format!("{}\n{relays}", columns(&rows, colours))
    }

    fn verdict(&self) -> Verdict {
        let up = self.relays.iter().any(|relay| relay.transport.is_some());
        if !up && !self.relays.is_empty() {
            return Verdict::Down;
        }
        match self.udp == "blocked" || self.portal.is_some() || !self.mtu_holes.is_empty() {
            true => Verdict::Degraded,
            false => Verdict::Ok,
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_api::admin::{RelayStatus, StatusResponse};

    use super::*;

    #[test]
    fn udp_is_said_to_work_only_while_somebody_answers() {
        let first_line = |transports: &[&str]| {
            let relay = |transport: &&str| RelayStatus {
                name: "r1".to_owned(),
                transport: (*transport).to_owned(),
                ..RelayStatus::default()
            };
            let said = StatusResponse {
                nat: "easy".to_owned(),
                relays: transports.iter().map(relay).collect(),
                ..StatusResponse::default()
            };
            let page = Netcheck::new(Status::from(said), &FactsResponse::default()).text(false);
            page.lines().next().unwrap().to_owned()
        };
        assert_eq!(first_line(&["", "quic"]), "UDP  works");
        assert_eq!(first_line(&[]), "UDP  works");
        let down = first_line(&["", ""]);
        assert!(down.ends_with("now none is up"), "{down}");
    }
}
