//! The numbers that issues set, and whether a run held them.

use super::{Figure, dns, offline, paths, percentile, services, tunnel};

/// What a figure's median is compared with.
#[derive(Debug, Clone, Copy)]
enum Against {
    /// A number in the figure's own unit, and how it is written.
    Number(f64, &'static str),
    /// Such a number, but with the figure's 99th percentile, or the highest of too few runs for one.
    P99(f64, &'static str),
    /// The same metric of this case.
    Case(&'static str),
    /// The lowest of the same metric of all other programs.
    LowestPeer,
    /// The same metric of this case in the same turn: the median of these ratios.
    InTurns(&'static str),
    /// As that, with each of these cases that has the metric: the ratio to the best of them.
    Best(&'static [&'static str]),
}

/// One number of an issue.
#[derive(Debug, Clone, Copy)]
struct Rule {
    case: &'static str,
    metric: &'static str,
    against: Against,
    bound: Bound,
}

#[derive(Debug, Clone, Copy)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
    /// None: the issue wants to know.
    Stated,
}

const fn rule(case: &'static str, metric: &'static str, against: Against, bound: Bound) -> Rule {
    Rule {
        case,
        metric,
        against,
        bound,
    }
}

use Against::{Best, Case, InTurns, LowestPeer, Number, P99};
use Bound::{AtLeast, AtMost, Stated};

/// Issue 1: names and services within 2 s of a start.
const START: &[Rule] = &[
    rule("agent", "first_name", Number(2_000.0, "2 s"), AtMost(1.0)),
    rule(
        "agent",
        "first_service_answer",
        Number(2_000.0, "2 s"),
        AtMost(1.0),
    ),
];

const BORINGTUN: Against = Case("boringtun-cli");
const DIRECT: Against = Case("holdfast");
const ONE_THREAD: Against = Case("holdfast-hub-1-thread");
const NO_CIPHER: Against = Case("mesh-tunnel-no-cipher");

/// Memory of each further peer.
const PEER_MAX: Against = Number(64.0, "64 KiB");

/// Issue 2's table, line by line.
const TUNNEL: &[Rule] = &[
    rule("holdfast", "tcp_1", BORINGTUN, AtLeast(4.0)),
    rule("holdfast", "tcp_4", BORINGTUN, AtLeast(4.0)),
    rule("holdfast", "tcp_16", BORINGTUN, AtLeast(4.0)),
    rule(
        "holdfast",
        "tcp_1",
        Case("wireguard-go-offloads"),
        AtLeast(1.9),
    ),
    rule("mesh-tunnel", "tcp_1", NO_CIPHER, AtLeast(0.38)),
    rule("mesh-tunnel", "tcp_4", NO_CIPHER, AtLeast(0.38)),
    rule("mesh-tunnel", "tcp_16", NO_CIPHER, AtLeast(0.38)),
    rule("holdfast", "udp_64", BORINGTUN, AtLeast(2.2)),
    rule("holdfast", "rtt_p50", BORINGTUN, AtMost(1.2)),
    rule("holdfast", "rtt_p99", BORINGTUN, AtMost(1.0)),
    rule("holdfast", "loaded_rtt_p99", LowestPeer, AtMost(1.0)),
    rule("holdfast", "cpu_per_gb", BORINGTUN, AtMost(0.30)),
    rule("holdfast-relay-udp", "tcp_1", DIRECT, AtLeast(0.6)),
    rule("holdfast-relay-udp", "tcp_4", DIRECT, AtLeast(0.6)),
    rule("holdfast-relay-udp", "tcp_16", DIRECT, AtLeast(0.6)),
    rule("holdfast-relay-quic", "tcp_1", DIRECT, AtLeast(0.35)),
    rule("holdfast-relay-quic", "tcp_4", DIRECT, AtLeast(0.35)),
    rule("holdfast-relay-quic", "tcp_16", DIRECT, AtLeast(0.35)),
    rule(
        "holdfast",
        "resident_idle",
        Number(16_384.0, "16 MiB"),
        AtMost(1.0),
    ),
    rule("holdfast", "resident_per_peer", PEER_MAX, AtMost(1.0)),
    rule("holdfast", "resident_per_live_peer", PEER_MAX, AtMost(1.0)),
    rule("mesh-tunnel", "resident_per_peer", PEER_MAX, AtMost(1.0)),
    rule("holdfast-hub-2-threads", "hub_out", ONE_THREAD, Stated),
    rule("holdfast-hub-2-threads", "hub_in", ONE_THREAD, Stated),
    rule("holdfast-hub-2-threads", "cpu_per_gb", ONE_THREAD, Stated),
];

/// What is measured with so many services.
struct WithServices {
    socket: &'static str,
    packets: &'static str,
    redirect: &'static str,
    packets_redirect: &'static str,
    devices_redirect: &'static str,
    others: &'static [&'static str],
}

const WITH_SERVICES: [WithServices; 3] = [
    WithServices {
        socket: "holdfast-socket-1",
        packets: "holdfast-packets-1",
        redirect: "holdfast-redirect-1",
        packets_redirect: "holdfast-packets-redirect-1",
        devices_redirect: "holdfast-devices-redirect-1",
        others: &["nftables-1", "iptables-1", "userspace-proxy"],
    },
    WithServices {
        socket: "holdfast-socket-1000",
        packets: "holdfast-packets-1000",
        redirect: "holdfast-redirect-1000",
        packets_redirect: "holdfast-packets-redirect-1000",
        devices_redirect: "holdfast-devices-redirect-1000",
        others: &["nftables-1000", "iptables-1000", "userspace-proxy"],
    },
    WithServices {
        socket: "holdfast-socket-10000",
        packets: "holdfast-packets-10000",
        redirect: "holdfast-redirect-10000",
        packets_redirect: "holdfast-packets-redirect-10000",
        devices_redirect: "holdfast-devices-redirect-10000",
        others: &["nftables-10000", "iptables-10000", "userspace-proxy"],
    },
];

/// Issue 3's table, line by line.
fn services_rules() -> Vec<Rule> {
    let direct = InTurns(services::BASELINE);
    let mut rules = Vec::new();
    for with in &WITH_SERVICES {
        rules.extend([
            rule(with.redirect, "connect_p50", direct, AtMost(0.95)),
            rule(with.redirect, "first_byte_p50", direct, AtMost(1.0)),
            rule(with.redirect, "rtt_p50", direct, AtMost(1.0)),
            rule(with.redirect, "cpu_per_gb", direct, AtMost(1.0)),
            rule(with.socket, "connect_p50", direct, AtMost(1.03)),
            rule(with.socket, "first_byte_p50", direct, AtMost(1.0)),
            rule(with.socket, "rtt_p50", direct, AtMost(1.0)),
            rule(with.socket, "cpu_per_gb", direct, AtMost(1.0)),
        ]);
        for level in [with.packets, with.packets_redirect, with.devices_redirect] {
            rules.extend([
                rule(level, "connect_p50", direct, AtMost(1.08)),
                rule(level, "tcp_1", direct, AtLeast(0.97)),
            ]);
        }
        let others = Best(with.others);
        for level in [
            with.socket,
            with.redirect,
            with.packets,
            with.packets_redirect,
            with.devices_redirect,
        ] {
            rules.extend([
                rule(level, "connect_p50", others, AtMost(1.0)),
                rule(level, "first_byte_p50", others, AtMost(1.0)),
                rule(level, "rtt_p50", others, AtMost(1.0)),
                rule(level, "udp_p50", others, AtMost(1.0)),
                rule(level, "tcp_1", others, AtLeast(1.0)),
                rule(level, "cpu_per_gb", others, AtMost(1.0)),
            ]);
        }
    }
    // Nobody has it who did not ask for it.
    for case in ["holdfast-sockmap-1", "holdfast-sockmap-1000"] {
        for figure in [
            "connect_p50",
            "first_byte_p50",
            "rtt_p50",
            "tcp_1",
            "cpu_per_gb",
        ] {
            rules.push(rule(case, figure, direct, Stated));
        }
    }
    let (change, memory) = (Number(5.0, "5 ms"), Number(131_072.0, "128 MiB"));
    let second = Number(1_000.0, "1 s");
    rules.extend([
        rule("holdfast-250000", "one_change", change, AtMost(1.0)),
        rule("holdfast-250000", "map_memory", memory, AtMost(1.0)),
        rule("holdfast-dead-path", "last_flow_max", second, AtMost(1.0)),
    ]);
    rules
}

const SECOND: Against = Number(1_000.0, "1 s");
const SMALL_CLUSTER: Against = Case("controller-1000");

/// Issue 5's table, line by line.
const CONTROLPLANE: &[Rule] = &[
    rule(
        "controller-100000",
        "resident",
        Number(524_288.0, "512 MiB"),
        AtMost(1.0),
    ),
    rule(
        "controller-100000",
        "resident_peak",
        Number(524_288.0, "512 MiB"),
        AtMost(1.0),
    ),
    rule("controller-100000", "map_p99", SECOND, AtMost(1.0)),
    rule("controller-100000", "change_p99", SECOND, AtMost(1.0)),
    rule("controller-250000", "change_max", SECOND, AtMost(1.0)),
    // One change is a slice of ten endpoints, or of 25: as large whatever the cluster is.
    rule(
        "controller-100000",
        "change_message",
        SMALL_CLUSTER,
        AtMost(1.1),
    ),
    rule(
        "controller-250000",
        "change_message",
        SMALL_CLUSTER,
        AtMost(2.75),
    ),
    rule(
        "agent-50-peers",
        "resident",
        Number(30_720.0, "30 MiB"),
        AtMost(1.0),
    ),
    rule("agent-50-peers", "cpu", Number(0.5, "0.5 %"), AtMost(1.0)),
    rule("cni-mesh", "add_p99", Number(100.0, "100 ms"), AtMost(1.0)),
    rule(
        "cni-mesh-ipv4",
        "add_p99",
        Number(100.0, "100 ms"),
        AtMost(1.0),
    ),
    rule("cni-mesh-ipv4", "add_p99", Case("cni-bridge-ipv4"), Stated),
    rule("cni-mesh-ipv4", "all", Case("cni-bridge-ipv4"), Stated),
];

/// A number that must be nothing at all.
const NONE: Against = Number(1.0, "0");
const P99_SECOND: Against = P99(1_000.0, "1 s");

/// Issue 6's table, line by line.
const PATHS: &[Rule] = &[
    rule(paths::CUT, "gap", P99_SECOND, AtMost(1.0)),
    rule(paths::CUT, "duplicates", NONE, AtMost(0.0)),
    rule(paths::CUT, "tcp_broken", NONE, AtMost(0.0)),
    rule(paths::RELAY, "gap", P99_SECOND, AtMost(1.0)),
    rule(paths::RELAY, "duplicates", NONE, AtMost(0.0)),
    rule(paths::RELAY, "tcp_broken", NONE, AtMost(0.0)),
    rule(paths::ADDRESS, "gap", P99(500.0, "500 ms"), AtMost(1.0)),
    rule(paths::WAN, "gap", P99(500.0, "500 ms"), Stated),
    rule(paths::UPLINK, "gap", P99(500.0, "500 ms"), AtMost(1.0)),
    rule(paths::UPLINK, "duplicates", NONE, AtMost(0.0)),
    rule(paths::UPLINK, "tcp_broken", NONE, AtMost(0.0)),
    rule(paths::MATRIX, "answered", P99(3_000.0, "3 s"), AtMost(1.0)),
    rule(paths::MATRIX, "direct", P99(5_000.0, "5 s"), AtMost(1.0)),
    rule(paths::MATRIX, "otherwise", NONE, AtMost(0.0)),
    rule(paths::LOSSY, "unanswered_requests", NONE, AtMost(0.0)),
    rule(paths::LOSSY, "unanswered_names", NONE, AtMost(0.0)),
    rule(paths::LOSSY, "unreachable", NONE, AtMost(0.0)),
    rule(paths::NARROW, "missing_bytes", NONE, AtMost(0.0)),
    rule(paths::UNFRAGMENTED, "missing_bytes", NONE, AtMost(0.0)),
    rule(paths::IDLE, "bytes", Number(1_000.0, "1 KB/s"), AtMost(1.0)),
    rule(paths::IDLE_METERED, "packets", NONE, AtMost(0.0)),
    rule(
        paths::SHARE_10,
        "rtt_p99",
        InTurns(paths::SHARE_1),
        AtMost(1.2),
    ),
    rule(paths::SHARE_10, "rtt_p99", InTurns(paths::SHARE_0), Stated),
];

/// Of fewer turns, no two are the ends of an interval in which the median is by 95 %.
const INTERVAL_TURNS_MIN: usize = 6;

/// The ratios of two figures in each turn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Ratio {
    /// Their median.
    pub(super) median: f64,
    /// Where the median of all such turns is by 95 %, whatever they are distributed like; of few turns it is not known.
    between: Option<(f64, f64)>,
}

/// `None`: there is no turn of both.
pub(super) fn in_turns(figure: &Figure, other: &Figure) -> Option<Ratio> {
    let turns = figure.turns.iter().zip(&other.turns);
    let mut ratios: Vec<_> = turns.map(|(own, other)| own / other).collect();
    ratios.sort_by(f64::total_cmp);
    Some(Ratio {
        median: percentile(&ratios, 0.5)?,
        between: around_the_median(&ratios),
    })
}

/// Each value is above the median or not like a coin that is thrown: as many are on either side of it as heads by 95 %, which
/// is half of them, and 1.96 times half the root of their number more or less.
fn around_the_median(sorted: &[f64]) -> Option<(f64, f64)> {
    let count = sorted.len();
    if count < INTERVAL_TURNS_MIN {
        return None;
    }
    let (half, reach) = (count as f64 / 2.0, 0.98 * (count as f64).sqrt());
    let below = (1..count).find(|rank| *rank as f64 + 1.0 > half - reach)?;
    let (low, high) = (sorted.get(below - 1)?, sorted.get(count - below)?);
    Some((*low, *high))
}

impl Rule {
    fn text(&self) -> String {
        let (sign, factor) = match self.bound {
            AtLeast(factor) => (">=", format!("{factor} x ")),
            AtMost(factor) => ("<=", format!("{factor} x ")),
            Stated => ("beside", String::new()),
        };
        match self.against {
            Number(_, written) => format!("{sign} {written}"),
            P99(_, written) => format!("p99 {sign} {written}"),
            Case(name) | InTurns(name) => format!("{sign} {factor}{name}"),
            LowestPeer => format!("{sign} {factor}best peer"),
            Best(_) => format!("{sign} {factor}best of the others"),
        }
    }

    /// `None`: there is nothing to hold.
    fn holds(&self, ratio: f64) -> Option<bool> {
        match self.bound {
            AtLeast(bound) => Some(ratio >= bound),
            AtMost(bound) => Some(ratio <= bound),
            Stated => None,
        }
    }

    /// Whether it may hold all the same where the ratio says that it does not.
    fn may_hold(&self, between: Option<(f64, f64)>) -> bool {
        between.is_some_and(|ends| {
            [ends.0, ends.1]
                .iter()
                .any(|end| self.holds(*end) == Some(true))
        })
    }

    /// The median over what it is compared with, and a copy of the figure with that. `None` if one of the two
    /// was not measured.
    fn judge(&self, figures: &[Figure]) -> Option<Figure> {
        let find = |case: &str| {
            let mut of = figures.iter().filter(|figure| figure.case == case);
            of.find(|figure| figure.metric == self.metric)
        };
        let figure = find(self.case)?;
        let alone = |median: f64| Ratio {
            median,
            between: None,
        };
        let by_median = |one: &Ratio, other: &Ratio| one.median.total_cmp(&other.median);
        let Ratio { median, between } = match self.against {
            Number(number, _) => alone(figure.median / number),
            P99(number, _) => alone(figure.p99.unwrap_or(figure.max) / number),
            Case(name) => alone(figure.median / find(name)?.median),
            LowestPeer => {
                let peers = figures
                    .iter()
                    .filter(|figure| figure.metric == self.metric && tunnel::is_peer(&figure.case));
                let lowest = peers.map(|figure| figure.median).min_by(f64::total_cmp);
                alone(figure.median / lowest?)
            }
            InTurns(name) => in_turns(figure, find(name)?)?,
            Best(names) => {
                let others = names.iter().filter_map(|name| find(name));
                let ratios = others.filter_map(|other| in_turns(figure, other));
                match self.bound {
                    AtLeast(_) => ratios.min_by(by_median)?,
                    AtMost(_) | Stated => ratios.max_by(by_median)?,
                }
            }
        };
        let ok = self.holds(median);
        let open = ok == Some(false) && self.may_hold(between);
        Some(Figure {
            must: Some(self.text()),
            ratio: Some(median),
            between,
            ok: ok.filter(|_| !open),
            open,
            ..figure.clone()
        })
    }
}

/// Issue 6: the fastest of the others, in the same turns; a zone of 100,000 endpoints.
const DNS: &[Rule] = &[
    rule("holdfast", "answers", Best(dns::PEERS), AtLeast(1.0)),
    rule("holdfast", "latency_p99", Best(dns::PEERS), AtMost(1.2)),
    rule(
        "large-zone",
        "resident_more",
        Number(64.0, "64 MiB"),
        AtMost(1.0),
    ),
    rule("large-zone", "change", P99(100.0, "100 ms"), AtMost(1.0)),
];

const CONVERGED: Against = P99(5_000.0, "5 s");
const TWICE: Against = Number(1.0, "what changed");
const ENDPOINT_ALONE: Against = Number(1.0, "the endpoint alone");

/// Issue 6: alone, away and back.
const OFFLINE: &[Rule] = &[
    rule(offline::BOOT, "name", P99_SECOND, AtMost(1.0)),
    rule(offline::BOOT, "service", P99_SECOND, AtMost(1.0)),
    rule(offline::BOOT, "peer", P99_SECOND, AtMost(1.0)),
    // What changed is counted in resources; what one endpoint of a slice costs is told beside it.
    rule(offline::ENDPOINT, "least_ratio", ENDPOINT_ALONE, Stated),
    rule(offline::ENDPOINT, "message_ratio", TWICE, AtMost(2.0)),
    rule(offline::ENDPOINT, "wire_ratio", TWICE, AtMost(2.0)),
    rule(offline::SERVICE, "message_ratio", TWICE, AtMost(2.0)),
    rule(offline::SERVICE, "wire_ratio", TWICE, AtMost(2.0)),
    rule(offline::ENDPOINTS, "message_ratio", TWICE, AtMost(2.0)),
    rule(offline::ENDPOINTS, "wire_ratio", TWICE, AtMost(2.0)),
    rule(offline::NODES, "message_ratio", TWICE, AtMost(2.0)),
    rule(offline::NODES, "wire_ratio", TWICE, AtMost(2.0)),
    rule(offline::CONTROLLER, "converged", CONVERGED, AtMost(1.0)),
    rule(offline::PARTITION, "converged", CONVERGED, AtMost(1.0)),
    rule(offline::NEIGHBOUR, "converged", CONVERGED, AtMost(1.0)),
    rule(offline::WEEK, "wrong_answers", NONE, AtMost(0.0)),
    rule(offline::WEEK, "lost_updates", NONE, AtMost(0.0)),
    rule(offline::WEEK, "converged", CONVERGED, AtMost(1.0)),
];

/// What came of the rules.
#[derive(Debug)]
pub(super) struct Verdict {
    /// A figure for each rule that it is judged by, and each other figure once.
    pub(super) figures: Vec<Figure>,
    /// Rules for which a figure is missing.
    pub(super) unjudged: Vec<String>,
}

/// Judges the figures of a bench by what issues ask of it. Of `services`, those of which nothing is asked have the
/// ratio to the direct way.
pub(super) fn judge(bench: &str, figures: &[Figure]) -> Verdict {
    let rules = match bench {
        "start" => START.to_vec(),
        "tunnel" => TUNNEL.to_vec(),
        "services" => services_rules(),
        "controlplane" => CONTROLPLANE.to_vec(),
        "paths" => PATHS.to_vec(),
        "dns" => DNS.to_vec(),
        "offline" => OFFLINE.to_vec(),
        _ => Vec::new(),
    };
    let direct = |own: &Figure| {
        let mut direct = figures.iter().filter(|_| bench == "services");
        let same = |figure: &&Figure| {
            figure.case == services::BASELINE
                && figure.metric == own.metric
                && figure.case != own.case
        };
        Some(in_turns(own, direct.find(same)?)?.median)
    };
    let mut judged = Vec::new();
    for figure in figures {
        let mut own = rules
            .iter()
            .filter(|rule| rule.case == figure.case && rule.metric == figure.metric)
            .filter_map(|rule| rule.judge(figures))
            .peekable();
        if own.peek().is_none() {
            judged.push(Figure {
                ratio: direct(figure),
                ..figure.clone()
            });
        }
        judged.extend(own);
    }
    let missing = rules.iter().filter(|rule| rule.judge(figures).is_none());
    Verdict {
        figures: judged,
        unjudged: missing
            .map(|rule| format!("{bench}/{}/{} {}", rule.case, rule.metric, rule.text()))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Samples, controlplane};
    use super::*;

    fn figures(values: &[(&str, &'static str, f64)]) -> Vec<Figure> {
        let mut samples = Samples::default();
        for (case, metric, value) in values {
            samples.add(case, metric, "x", *value);
        }
        samples.figures("tunnel")
    }

    #[track_caller]
    fn check(values: &[(&str, &'static str, f64)], expected: &[(&str, f64, bool)]) {
        let verdict = judge("tunnel", &figures(values));
        let judged: Vec<_> = verdict
            .figures
            .iter()
            .filter_map(|figure| {
                let must = figure.must.as_deref()?;
                Some((must, figure.ratio?, figure.ok?))
            })
            .collect();
        assert_eq!(judged, expected);
    }

    #[test]
    fn throughput_is_a_multiple_of_a_peers() {
        let values = [
            ("holdfast", "tcp_4", 3_999.0),
            ("boringtun-cli", "tcp_4", 1_000.0),
        ];
        check(&values, &[(">= 4 x boringtun-cli", 3.999, false)]);
    }

    #[test]
    fn one_figure_may_have_two_numbers_to_hold() {
        let values = [
            ("holdfast", "tcp_1", 4_000.0),
            ("boringtun-cli", "tcp_1", 1_000.0),
            ("wireguard-go-offloads", "tcp_1", 2_500.0),
        ];
        let expected = [
            (">= 4 x boringtun-cli", 4.0, true),
            (">= 1.9 x wireguard-go-offloads", 1.6, false),
        ];
        check(&values, &expected);
    }

    #[test]
    fn latency_under_load_is_measured_by_the_best_of_the_others() {
        let values = [
            ("holdfast", "loaded_rtt_p99", 500.0),
            ("raw", "loaded_rtt_p99", 1.0),
            ("tinc", "loaded_rtt_p99", 1_000.0),
            ("nebula", "loaded_rtt_p99", 2_000.0),
        ];
        check(&values, &[("<= 1 x best peer", 0.5, true)]);
    }

    #[test]
    fn memory_is_measured_by_a_number() {
        let values = [("holdfast", "resident_idle", 20_480.0)];
        check(&values, &[("<= 16 MiB", 1.25, false)]);
    }

    #[test]
    fn what_is_only_stated_has_a_ratio_and_no_verdict() {
        let values = [
            ("holdfast-hub-2-threads", "hub_out", 3_000.0),
            ("holdfast-hub-1-thread", "hub_out", 4_000.0),
        ];
        let verdict = judge("tunnel", &figures(&values));
        let [two, one] = verdict.figures.as_slice() else {
            panic!("{verdict:?}")
        };
        assert_eq!(two.must.as_deref(), Some("beside holdfast-hub-1-thread"));
        assert_eq!((two.ratio, two.ok), (Some(0.75), None));
        assert_eq!((one.ratio, one.ok), (None, None));
    }

    #[test]
    fn a_rule_without_its_figures_is_told() {
        let verdict = judge("tunnel", &figures(&[("holdfast", "udp_64", 250.0)]));
        assert_eq!(verdict.unjudged.len(), TUNNEL.len());
        let told = "tunnel/holdfast/udp_64 >= 2.2 x boringtun-cli".to_owned();
        assert!(verdict.unjudged.contains(&told), "{:?}", verdict.unjudged);
        assert_eq!(verdict.figures.len(), 1);
    }

    /// Of `services`: each figure with its value in each round.
    fn rounds(values: &[(&str, &'static str, &[f64])]) -> Verdict {
        let mut samples = Samples::default();
        for (case, metric, rounds) in values {
            for value in *rounds {
                samples.add(case, metric, "x", *value);
            }
        }
        judge("services", &samples.figures("services"))
    }

    #[test]
    fn a_service_is_compared_with_the_direct_way_in_the_same_round() {
        // The machine became three times slower: the medians' ratio would be 0.4.
        let verdict = rounds(&[
            ("direct", "connect_p50", &[10.0, 30.0, 30.0]),
            ("holdfast-socket-1", "connect_p50", &[10.2, 12.0, 30.6]),
        ]);
        let [direct, service] = verdict.figures.as_slice() else {
            panic!("{verdict:?}")
        };
        assert_eq!((direct.ratio, direct.ok), (None, None));
        assert_eq!((service.ratio, service.ok), (Some(1.02), Some(true)));
        assert_eq!(service.must.as_deref(), Some("<= 1.03 x direct"));
    }

    #[test]
    fn turns_are_compared_where_there_are_any() {
        let mut samples = Samples::default();
        for (case, turns) in [
            ("direct", vec![10.0, 40.0, 20.0]),
            ("holdfast-packets-1", vec![11.0, 44.0, 21.0]),
        ] {
            samples.add(case, "connect_p50", "µs", 20.0);
            samples.add_turns(case, "connect_p50", turns);
        }
        let verdict = judge("services", &samples.figures("services"));
        let judged = verdict
            .figures
            .iter()
            .find_map(|one| Some((one.ratio?, one.ok?)));
        assert_eq!(judged, Some((1.1, false)), "{verdict:?}");
    }

    #[test]
    fn what_the_turns_do_not_tell_is_open() {
        // Of 100 values, the 40th and the 61st (David and Nagaraja, Order Statistics, 7.1).
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(around_the_median(&hundred), Some((40.0, 61.0)));
        assert_eq!(around_the_median(&hundred[..6]), Some((1.0, 6.0)));
        assert_eq!(around_the_median(&hundred[..5]), None);

        for (throughput, ok, open) in [
            ([97.0, 97.0, 97.0], Some(true), false),
            ([90.0, 96.0, 98.0], None, true),
            ([90.0, 95.0, 96.0], Some(false), false),
        ] {
            let mut samples = Samples::default();
            for (case, turns) in [("direct", [100.0; 3]), ("holdfast-packets-1", throughput)] {
                samples.add(case, "tcp_1", "Mb/s", 1.0);
                samples.add_turns(case, "tcp_1", turns.repeat(7));
            }
            let verdict = judge("services", &samples.figures("services"));
            let judged = verdict.figures.iter().find(|one| one.must.is_some());
            let judged = judged.map(|one| (one.ok, one.open));
            assert_eq!(judged, Some((ok, open)), "{verdict:?}");
        }
    }

    #[test]
    fn a_99th_percentile_is_judged_and_of_few_runs_the_highest() {
        let judged = |runs: usize| {
            let mut samples = Samples::default();
            for run in 0..runs {
                let gap = if run == 0 { 1_300.0 } else { 500.0 };
                samples.add(paths::CUT, "gap", "ms", gap);
            }
            let verdict = judge("paths", &samples.figures("paths"));
            verdict.figures.iter().map(|one| (one.p99, one.ok)).next()
        };
        assert_eq!(judged(200), Some((Some(500.0), Some(true))));
        assert_eq!(judged(50), Some((Some(1_300.0), Some(false))));
        assert_eq!(judged(10), Some((None, Some(false))));
    }

    #[test]
    fn what_must_not_be_is_judged_by_one() {
        let mut samples = Samples::default();
        samples.add(paths::CUT, "duplicates", "", 0.0);
        samples.add(paths::RELAY, "duplicates", "", 1.0);
        let verdict = judge("paths", &samples.figures("paths"));
        let judged: Vec<_> = verdict
            .figures
            .iter()
            .map(|one| (one.must.as_deref(), one.ok))
            .collect();
        assert_eq!(
            judged,
            [(Some("<= 0"), Some(true)), (Some("<= 0"), Some(false))]
        );
    }

    #[test]
    fn the_best_of_the_others_is_the_one_to_beat() {
        let verdict = rounds(&[
            ("holdfast-packets-1000", "tcp_1", &[10.0]),
            ("holdfast-packets-1000", "udp_p50", &[10.0]),
            ("nftables-1000", "tcp_1", &[12.5]),
            ("nftables-1000", "udp_p50", &[8.0]),
            ("iptables-1000", "tcp_1", &[5.0]),
            ("iptables-1000", "udp_p50", &[20.0]),
        ]);
        let judged = verdict.figures.iter().filter(|figure| figure.ok.is_some());
        let judged: Vec<_> = judged.map(|one| (one.metric, one.ratio, one.ok)).collect();
        let missed = Some(false);
        let expected = [
            ("tcp_1", Some(0.8), missed),
            ("udp_p50", Some(1.25), missed),
        ];
        assert_eq!(judged, expected);
    }

    #[test]
    fn of_services_what_nothing_is_asked_of_has_its_ratio_to_the_direct_way() {
        let verdict = rounds(&[
            ("direct", "connect_p99", &[10.0]),
            ("nftables-1", "connect_p99", &[15.0]),
            ("nftables-1", "load", &[20.0]),
        ]);
        let ratios: Vec<_> = verdict.figures.iter().map(|one| one.ratio).collect();
        assert_eq!(ratios, [None, Some(1.5), None]);
        let said = |rule: &str| verdict.unjudged.contains(&format!("services/{rule}"));
        assert!(said("holdfast-redirect-1/connect_p50 <= 0.95 x direct"));
        assert!(said("holdfast-250000/one_change <= 5 ms"));
    }

    #[test]
    fn every_rule_names_cases_that_there_are() {
        for rule in TUNNEL {
            assert!(tunnel::is_case(rule.case), "{}", rule.case);
            if let Case(other) = rule.against {
                assert!(tunnel::is_case(other), "{other}");
            }
        }
        for rule in CONTROLPLANE {
            assert!(controlplane::is_case(rule.case), "{}", rule.case);
            if let Case(other) = rule.against {
                assert!(controlplane::is_case(other), "{other}");
            }
        }
        for rule in PATHS {
            assert!(paths::is_case(rule.case), "{}", rule.case);
            if let InTurns(other) = rule.against {
                assert!(paths::is_case(other), "{other}");
            }
        }
        for rule in OFFLINE {
            assert!(offline::is_case(rule.case), "{}", rule.case);
        }
        for rule in services_rules() {
            assert!(services::is_case(rule.case), "{}", rule.case);
            if let Best(others) = rule.against {
                assert!(others.iter().all(|name| services::is_other(name)));
            }
        }
    }
}
