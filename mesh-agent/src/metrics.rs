//! What Prometheus is shown of an agent. Pure: what is known of the node goes in, a page comes out.
//!
//! Names of peers, relays, services and clients are no labels: `meshctl` tells about single ones.

use std::{collections::BTreeMap, time::Duration};

use ebpf_loader::fill::Fill;
use mesh_api::admin::{Health, StatusResponse};
use mesh_daemon::metrics::{Labels, Page};
use mesh_dns::counters::{Counters, DropReason, Waits};
use mesh_tunnel::stats::{Handshakes, Traffic};

/// Upper ends of the classes of round trips, in milliseconds: a LAN, a region, a continent, the world, a satellite, a queue.
const RTT_LE_MS: [u32; 8] = [1, 5, 20, 50, 100, 200, 500, 1_000];

/// Upper ends of the classes of loss, in percent.
const LOSS_LE_PERCENT: [u32; 5] = [0, 1, 5, 10, 25];

/// One path to a peer.
#[derive(Debug, Clone, Copy)]
pub struct Path {
    /// `udp`, `relay_udp`, `relay_quic`, `relay_tls`, or `relay_down`.
    pub transport: &'static str,
    /// As `meshctl path why` has it.
    pub state: &'static str,
    /// Smoothed round trip, once known.
    pub rtt: Option<Duration>,
    /// From 0 to 1, once known.
    pub loss: Option<f64>,
}

/// What the driver knows beside the status.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Of every peer that was woken.
    pub paths: Vec<Path>,
    /// Packets and bytes inside the tunnel.
    pub traffic: Traffic,
    /// With all peers, also those that are asleep again.
    pub handshakes: Handshakes,
    /// Initiations that were not answered.
    pub handshakes_refused: u64,
    /// By name.
    pub queues: [(&'static str, Queue); 3],
}

/// What waits somewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queue {
    /// How much.
    pub entries: usize,
    /// Since when the first of it waits.
    pub age: Duration,
}

/// What the kernel's programs tell beside the status.
#[derive(Debug, Clone, Default)]
pub struct Kernel {
    /// How full the maps are.
    pub maps: Vec<Fill>,
    /// What became of processes' calls; empty where the kernel serves no services.
    pub sockets: BTreeMap<String, u64>,
}

/// Counters of flows to services: where they get their endpoint, the counter's name there, and what that means. What is
/// redirected are packets, of flows that are counted here as others are.
const FLOWS: [(&str, &str, &str); 18] = [
    ("socket", "connect_rewritten", "translated"),
    ("socket", "connect_refused", "refused"),
    ("socket", "connect_failed", "failed"),
    ("socket", "flow_moved", "moved"),
    ("socket", "send_rewritten", "datagram_translated"),
    ("socket", "send_refused", "datagram_refused"),
    ("socket", "sockmap_joined", "sockmap_joined"),
    ("socket", "sockmap_left", "sockmap_left"),
    ("packet", "flow_opened", "translated"),
    ("packet", "refused_tcp", "refused"),
    ("packet", "refused_udp", "refused"),
    ("packet", "refused_silently", "refused"),
    ("packet", "connect_failed", "failed"),
    ("packet", "clash", "clash"),
    ("packet", "not_in_range", "not_in_range"),
    ("packet", "not_local", "not_local"),
    ("packet", "flow_lost", "lost"),
    ("packet", "masquerade_full", "masquerade_full"),
];

/// The whole page.
#[must_use]
pub fn page(status: &StatusResponse, measured: &Measured, kernel: &Kernel, dns: &Counters) -> Page {
    let mut page = Page::new("holdfast_agent");
    let version = [(vec![("version", status.version.clone())], 1)];
    page.gauges("build_info", "Which version runs", version);
    add_health(&mut page, status);
    add_paths(&mut page, status, &measured.paths);
    let Traffic {
        sent_packets,
        sent_bytes,
        received_packets,
        received_bytes,
    } = measured.traffic;
    for (name, help, count) in [
        ("sent_packets", "Packets put into the tunnel", sent_packets),
        ("sent_bytes", "Bytes of these", sent_bytes),
        (
            "received_packets",
            "Packets taken from the tunnel",
            received_packets,
        ),
        ("received_bytes", "Bytes of these", received_bytes),
    ] {
        page.counter(name, help, count);
    }
    for (name, help, counts) in [
        ("drops", "Packets dropped by the tunnel", &status.drops),
        (
            "service_packets",
            "What became of packets to services",
            &status.service_packets,
        ),
        (
            "policy_packets",
            "What became of packets that were judged",
            &status.policy_packets,
        ),
        (
            "lan_announcements",
            "What became of announcements on the LAN",
            &status.lan_announcements,
        ),
        ("proxy", "What the CONNECT proxy did", &status.proxy),
    ] {
        page.counters(name, help, by_outcome(counts));
    }
    add_handshakes(&mut page, measured);
    add_queues(&mut page, &measured.queues);
    add_kernel(&mut page, status, kernel);
    add_dns(&mut page, dns);
    page
}

fn add_handshakes(page: &mut Page, measured: &Measured) {
    let Handshakes {
        begun,
        completed,
        overtaken,
        timed_out,
        answered,
        proven,
    } = measured.handshakes;
    let counted = [
        ("out", "begun", begun),
        ("out", "completed", completed),
        ("out", "overtaken", overtaken),
        ("out", "timed_out", timed_out),
        ("in", "answered", answered),
        ("in", "completed", proven),
        ("in", "refused", measured.handshakes_refused),
    ];
    let counted = counted.map(|(direction, outcome, count)| {
        let labels = [("direction", direction), ("outcome", outcome)];
        (labelled(labels), count)
    });
    let help = "WireGuard handshakes, by who begins them and what became of them";
    page.counters("handshakes", help, counted);
}

fn add_queues(page: &mut Page, queues: &[(&'static str, Queue)]) {
    let entries = queues.iter();
    let entries = entries.map(|(name, queue)| (label("queue", name), wide(queue.entries)));
    page.gauges("queue_entries", "What waits, by queue", entries);
    let ages = queues.iter();
    let ages = ages.map(|(name, queue)| (label("queue", name), queue.age.as_secs_f64()));
    let help = "Since when the first of it waits; 0: nothing does";
    page.seconds_each("queue_age", help, ages);
}

fn add_kernel(page: &mut Page, status: &StatusResponse, kernel: &Kernel) {
    let labels = |fill: &Fill| {
        let labels = [
            ("map", fill.map.as_str()),
            ("when_full", fill.when_full.as_str()),
        ];
        labelled(labels)
    };
    let fills = kernel.maps.iter();
    let fills = fills.map(|fill| (labels(fill), wide(fill.entries)));
    let help = "Entries of the kernel's maps; of flows, when they were counted last";
    page.gauges("map_entries", help, fills);
    let room = kernel.maps.iter();
    let room = room.map(|fill| (labels(fill), wide(fill.entries_max)));
    let help = "Entries that are put into them at most";
    page.gauges("map_capacity", help, room);
    if kernel.sockets.is_empty() {
        return;
    }
    let mut flows: BTreeMap<_, u64> = BTreeMap::new();
    for (level, counter, outcome) in FLOWS {
        let counters = match level {
            "socket" => &kernel.sockets,
            _ => &status.service_packets,
        };
        *flows.entry((level, outcome)).or_default() += counters.get(counter).unwrap_or(&0);
    }
    let flows = flows.into_iter().map(|((level, outcome), count)| {
        let labels = [("level", level), ("outcome", outcome)];
        (labelled(labels), count)
    });
    let help = "Flows to services, by where they get their endpoint and what became of them";
    page.counters("service_flows", help, flows);
}

fn add_health(page: &mut Page, status: &StatusResponse) {
    let health = match status.health() {
        Health::Ok => 0,
        Health::Degraded | Health::Unspecified => 1,
        Health::Down => 2,
    };
    page.gauge("health", "0: ok, 1: degraded, 2: down", health);
    for (name, help, count) in [
        (
            "problems",
            "Sentences that `meshctl status` has about it",
            status.problems.len(),
        ),
        (
            "uplinks",
            "Ways out of this machine that work",
            status.uplinks.iter().filter(|one| one.up).count(),
        ),
        (
            "metered",
            "Whether the way out in use is metered",
            status
                .uplinks
                .iter()
                .filter(|one| one.used && one.metered)
                .count()
                .min(1),
        ),
    ] {
        page.gauge(name, help, wide(count));
    }
    for (name, help, value) in [
        (
            "controller_connected",
            "Whether the controller is there",
            status.controller_connected.into(),
        ),
        (
            "snapshot_generation",
            "Generation of the desired state in force",
            status.snapshot_generation,
        ),
        (
            "snapshot_standing",
            "Whether the desired state counts: 0 it does, 1 half of offlineLimitDays is over, 2 all of it",
            status.standing.try_into().unwrap_or(0),
        ),
        ("nodes", "Nodes of the mesh", status.nodes.into()),
        ("services", "Services of the mesh", status.services.into()),
        (
            "policy_enforced",
            "Whether policies are enforced here",
            status.policy_enforced.into(),
        ),
    ] {
        page.gauge(name, help, value);
    }
    let whole = |seconds: u64| Duration::from_secs(seconds).as_secs_f64();
    let uptime = Duration::from_millis(status.uptime_ms).as_secs_f64();
    page.seconds("uptime", "Since the agent started", uptime);
    let age = whole(status.snapshot_age_s);
    page.seconds(
        "snapshot_age",
        "Since the controller last vouched for the desired state",
        age,
    );
    let expires = whole(status.certificate_expires_unix_s.try_into().unwrap_or(0));
    let help = "When the node's certificate ends, since 1970";
    page.seconds("certificate_expires_timestamp", help, expires);
}

fn add_paths(page: &mut Page, status: &StatusResponse, paths: &[Path]) {
    let peers = status.peers.iter();
    let peers = peers.map(|(state, count)| (label("state", state), u64::from(*count)));
    page.gauges("peers", "Peers that were woken, by state", peers);
    let mut relays = BTreeMap::new();
    for relay in &status.relays {
        let transport = match relay.transport.as_str() {
            "" => "down",
            up => up,
        };
        *relays.entry(transport).or_insert(0) += 1;
    }
    let relays = relays
        .into_iter()
        .map(|(transport, count)| (label("transport", transport), count));
    page.gauges(
        "relays",
        "Relays that this node keeps a link to, or tries to",
        relays,
    );
    let home = status.relays.iter().find(|relay| relay.home);
    let rtt = home.map_or(0.0, |relay| relay.rtt_ms / 1e3);
    page.seconds(
        "home_relay_rtt",
        "Round trip to the home relay; 0: not known",
        rtt,
    );
    let changes = status.transitions.iter().filter_map(|(change, count)| {
        let mut words = change.split(' ').map(str::to_owned);
        let mut labels = Labels::new();
        for name in ["of", "from", "to"] {
            labels.push((name, words.next()?));
        }
        Some((labels, *count))
    });
    page.counters(
        "transitions",
        "Changes of state of peers and paths",
        changes,
    );

    let mut by_state: BTreeMap<_, u64> = BTreeMap::new();
    for path in paths {
        *by_state.entry((path.transport, path.state)).or_default() += 1;
    }
    let by_state = by_state.into_iter().map(|((transport, state), count)| {
        let labels = vec![
            ("transport", transport.to_owned()),
            ("state", state.to_owned()),
        ];
        (labels, count)
    });
    page.gauges("paths", "Paths to peers that were woken", by_state);
    let used = paths.iter().filter(|path| path.state == "primary");
    let rtts: Vec<_> = used.clone().filter_map(|path| path.rtt).collect();
    let classes = RTT_LE_MS.map(|le_ms| {
        let le = Duration::from_millis(le_ms.into());
        (
            le.as_secs_f64().to_string(),
            rtts.iter().filter(|rtt| **rtt <= le).count(),
        )
    });
    let help = "Paths in use with a round trip of at most so many seconds, now";
    page.gauges(
        "paths_at_rtt_seconds",
        help,
        cumulative(classes, rtts.len()),
    );
    let losses: Vec<_> = used.filter_map(|path| path.loss).collect();
    let classes = LOSS_LE_PERCENT.map(|percent| {
        let le = f64::from(percent) / 100.0;
        (
            le.to_string(),
            losses.iter().filter(|loss| **loss <= le).count(),
        )
    });
    let help = "Paths in use that lose at most such a part of probes, now";
    page.gauges(
        "paths_at_loss_ratio",
        help,
        cumulative(classes, losses.len()),
    );
}

/// As `histogram_quantile` wants it.
fn cumulative<const N: usize>(
    classes: [(String, usize); N],
    all: usize,
) -> impl Iterator<Item = (Labels, u64)> {
    let classes = classes.into_iter().chain([("+Inf".to_owned(), all)]);
    classes.map(|(le, count)| (vec![("le", le)], wide(count)))
}

/// What is counted of names: each counter's name, what it counts, and how much it is.
pub(crate) fn dns_counters(dns: &Counters) -> Vec<(&'static str, &'static str, u64)> {
    let counters = [
        (
            "dns_queries",
            "Questions from allowed sources",
            &dns.queries,
        ),
        ("dns_own", "Answered from the desired state alone", &dns.own),
        (
            "dns_nxdomain",
            "Answers that a name does not exist",
            &dns.nxdomain,
        ),
        (
            "dns_servfail",
            "Answers that no answer could be found",
            &dns.servfail,
        ),
        (
            "dns_refused",
            "Questions that were malformed or not welcome",
            &dns.refused,
        ),
        (
            "dns_forwarded",
            "Questions put to an upstream",
            &dns.forwarded,
        ),
        (
            "dns_cache_hits",
            "Questions for upstreams that the cache answered",
            &dns.cache_hits,
        ),
        (
            "dns_hedged",
            "Questions put to a second upstream as the first was slow",
            &dns.hedged,
        ),
        (
            "dns_upstream_failures",
            "Exchanges with upstreams without an answer",
            &dns.upstream_failures,
        ),
        (
            "dns_prefetched",
            "Answers asked for anew before their end",
            &dns.prefetched,
        ),
        (
            "dns_stale",
            "Answers beyond their time, as no upstream answered",
            &dns.stale,
        ),
        (
            "dns_busy",
            "Questions turned away as too many waited",
            &dns.busy,
        ),
        (
            "dns_passed_over",
            "Upstreams not asked, as they had just failed",
            &dns.passed_over,
        ),
        (
            "dns_truncated",
            "Answers that did not fit into UDP",
            &dns.truncated,
        ),
        (
            "dns_unlogged",
            "Answers that the log of queries left out",
            &dns.unlogged,
        ),
        (
            "dns_denied_left_out",
            "Answers to pods without endpoints that policy denies to them",
            &dns.denied_left_out,
        ),
    ];
    let counters = counters.into_iter();
    counters
        .map(|(name, help, counter)| (name, help, counter.get()))
        .collect()
}

fn add_dns(page: &mut Page, dns: &Counters) {
    for (name, help, count) in dns_counters(dns) {
        page.counter(name, help, count);
    }
    let help = "Answers in the cache, also those beyond their time";
    page.gauge("dns_cached", help, dns.cached.get());
    let ends = Waits::LE_MS.map(|le_ms| Duration::from_millis(le_ms.into()).as_secs_f64());
    let classes = ends
        .into_iter()
        .chain([f64::INFINITY])
        .zip(dns.waits.counts());
    let help = "From when upstreams were asked until the client was answered";
    let sum = dns.waits.sum().as_secs_f64();
    page.histogram("dns_wait_seconds", help, sum, classes.collect());
    let drops = DropReason::ALL.into_iter();
    let drops = drops.map(|reason| (label("reason", reason.as_str()), dns.dropped(reason)));
    page.counters("dns_drops", "Packets that got no answer", drops);
}

fn by_outcome(counts: &BTreeMap<String, u64>) -> impl Iterator<Item = (Labels, u64)> {
    counts
        .iter()
        .map(|(outcome, count)| (label("outcome", outcome), *count))
}

fn label(name: &'static str, value: &str) -> Labels {
    labelled([(name, value)])
}

fn labelled<const N: usize>(labels: [(&'static str, &str); N]) -> Labels {
    labels.map(|(name, value)| (name, value.to_owned())).into()
}

fn wide(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ebpf_loader::fill::WhenFull;
    use mesh_api::admin::RelayStatus;

    use super::*;

    #[test]
    fn every_counter_of_flows_is_one_that_the_programs_have() {
        for (level, counter, _) in FLOWS {
            let source = match level {
                "socket" => include_str!("../../ebpf/ebpf-abi/src/lib.rs"),
                _ => include_str!("../../ebpf/ebpf-abi/src/packets.rs"),
            };
            assert!(source.contains(&format!(" = \"{counter}\",")), "{counter}");
        }
    }

    #[test]
    fn a_node_is_told_in_closed_sets_of_labels() {
        let relay = |transport: &str, home| RelayStatus {
            name: "secret-customer".to_owned(),
            transport: transport.to_owned(),
            home,
            rtt_ms: 12.5,
            problem: String::new(),
        };
        let status = StatusResponse {
            node: "edge-a1".to_owned(),
            health: Health::Degraded.into(),
            problems: vec!["no relay is up".to_owned()],
            controller_connected: true,
            snapshot_generation: 17,
            snapshot_age_s: 86_400,
            standing: mesh_api::admin::Standing::Over.into(),
            relays: vec![relay("quic", true), relay("quic", false), relay("", false)],
            peers: BTreeMap::from([("direct".to_owned(), 3)]),
            drops: BTreeMap::from([("replay".to_owned(), 5)]),
            service_packets: [("flow_opened", 7), ("refused_tcp", 2), ("refused_udp", 3)]
                .map(|(counter, count)| (counter.to_owned(), count))
                .into(),
            policy_packets: BTreeMap::from([("allowed".to_owned(), 9)]),
            transitions: BTreeMap::from([("peer relayed direct".to_owned(), 2)]),
            ..StatusResponse::default()
        };
        let path = |state, rtt_ms, loss| Path {
            transport: "udp",
            state,
            rtt: Some(Duration::from_millis(rtt_ms)),
            loss: Some(loss),
        };
        let queue = Queue {
            entries: 2,
            age: Duration::from_millis(1_500),
        };
        let measured = Measured {
            paths: vec![
                path("primary", 4, 0.0),
                path("primary", 300, 0.07),
                path("standby", 1, 0.0),
            ],
            traffic: Traffic::default(),
            handshakes: Handshakes {
                begun: 11,
                completed: 6,
                overtaken: 1,
                timed_out: 4,
                answered: 3,
                proven: 2,
            },
            handshakes_refused: 13,
            queues: ["events", "held", "relay"].map(|name| (name, queue)),
        };
        let kernel = Kernel {
            maps: vec![Fill {
                map: "hf_frontends".to_owned(),
                entries: 5,
                entries_max: 1_000,
                when_full: WhenFull::LeftOut,
            }],
            sockets: BTreeMap::from([("connect_rewritten".to_owned(), 21)]),
        };
        let shown = || page(&status, &measured, &kernel, &Counters::default());
        let text = shown().text().unwrap();
        for line in [
            "health 1",
            "problems 1",
            "controller_connected 1",
            "snapshot_generation 17",
            "snapshot_age_seconds 86400.0",
            "snapshot_standing 2",
            "home_relay_rtt_seconds 0.0125",
            "peers{state=\"direct\"} 3",
            "relays{transport=\"quic\"} 2",
            "relays{transport=\"down\"} 1",
            "transitions_total{of=\"peer\",from=\"relayed\",to=\"direct\"} 2",
            "drops_total{outcome=\"replay\"} 5",
            "paths{transport=\"udp\",state=\"primary\"} 2",
            "paths_at_rtt_seconds{le=\"0.001\"} 0",
            "paths_at_rtt_seconds{le=\"0.005\"} 1",
            "paths_at_rtt_seconds{le=\"+Inf\"} 2",
            "paths_at_loss_ratio{le=\"0.05\"} 1",
            "paths_at_loss_ratio{le=\"0.1\"} 2",
            "handshakes_total{direction=\"out\",outcome=\"begun\"} 11",
            "handshakes_total{direction=\"out\",outcome=\"timed_out\"} 4",
            "handshakes_total{direction=\"in\",outcome=\"completed\"} 2",
            "handshakes_total{direction=\"in\",outcome=\"refused\"} 13",
            "queue_entries{queue=\"held\"} 2",
            "queue_age_seconds{queue=\"events\"} 1.5",
            "map_entries{map=\"hf_frontends\",when_full=\"left_out\"} 5",
            "map_capacity{map=\"hf_frontends\",when_full=\"left_out\"} 1000",
            "service_flows_total{level=\"socket\",outcome=\"translated\"} 21",
            "service_flows_total{level=\"socket\",outcome=\"refused\"} 0",
            "service_flows_total{level=\"packet\",outcome=\"translated\"} 7",
            "service_flows_total{level=\"packet\",outcome=\"refused\"} 5",
            "dns_queries_total 0",
            "dns_cached 0",
            "dns_wait_seconds_bucket{le=\"0.001\"} 0",
            "dns_wait_seconds_bucket{le=\"+Inf\"} 0",
            "dns_drops_total{reason=\"short\"} 0",
        ] {
            let line = format!("holdfast_agent_{line}");
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
        let families = text.lines().filter(|line| line.starts_with("# TYPE "));
        let mut once = BTreeSet::new();
        families.for_each(|family| assert!(once.insert(family), "{family} twice"));
        for asks in [
            include_str!("../../deploy/monitoring/alerts.yaml"),
            include_str!("../../deploy/monitoring/dashboard.json"),
        ] {
            assert_eq!(shown().lacks(asks), Ok(BTreeSet::new()));
        }
        assert!(!text.contains("secret-customer") && !text.contains("edge-a1"));
    }
}
