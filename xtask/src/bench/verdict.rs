//! The numbers that issues set, and whether a run held them.

use super::{Figure, tunnel};

/// What a figure's median is compared with.
#[derive(Debug, Clone, Copy)]
enum Against {
    /// A number in the figure's own unit, and how it is written.
    Number(f64, &'static str),
    /// The same metric of this case.
    Case(&'static str),
    /// The lowest of the same metric of all other programs.
    LowestPeer,
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

use Against::{Case, LowestPeer, Number};
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

impl Rule {
    fn text(&self) -> String {
        let (sign, factor) = match self.bound {
            AtLeast(factor) => (">=", format!("{factor} x ")),
            AtMost(factor) => ("<=", format!("{factor} x ")),
            Stated => ("beside", String::new()),
        };
        match self.against {
            Number(_, written) => format!("{sign} {written}"),
            Case(name) => format!("{sign} {factor}{name}"),
            LowestPeer => format!("{sign} {factor}best peer"),
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

    /// The median over what it is compared with, and a copy of the figure with that. `None` if one of the two
    /// was not measured.
    fn judge(&self, figures: &[Figure]) -> Option<Figure> {
        let find = |case: &str| {
            let mut of = figures.iter().filter(|figure| figure.case == case);
            of.find(|figure| figure.metric == self.metric)
        };
        let figure = find(self.case)?;
        let other = match self.against {
            Number(number, _) => number,
            Case(name) => find(name)?.median,
            LowestPeer => figures
                .iter()
                .filter(|figure| figure.metric == self.metric && tunnel::is_peer(&figure.case))
                .map(|figure| figure.median)
                .min_by(f64::total_cmp)?,
        };
        let ratio = figure.median / other;
        Some(Figure {
            must: Some(self.text()),
            ratio: Some(ratio),
            ok: self.holds(ratio),
            ..figure.clone()
        })
    }
}

/// What came of the rules.
#[derive(Debug)]
pub(super) struct Verdict {
    /// A figure for each rule that it is judged by, and each other figure once.
    pub(super) figures: Vec<Figure>,
    /// Rules for which a figure is missing.
    pub(super) unjudged: Vec<String>,
}

/// Judges the figures of a bench by what issues ask of it.
pub(super) fn judge(bench: &str, figures: &[Figure]) -> Verdict {
    let rules = match bench {
        "start" => START,
        "tunnel" => TUNNEL,
        _ => &[],
    };
    let mut judged = Vec::new();
    for figure in figures {
        let mut own = rules
            .iter()
            .filter(|rule| rule.case == figure.case && rule.metric == figure.metric)
            .filter_map(|rule| rule.judge(figures))
            .peekable();
        if own.peek().is_none() {
            judged.push(figure.clone());
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
    use super::super::Samples;
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

    #[test]
    fn every_rule_names_cases_that_there_are() {
        for rule in TUNNEL {
            assert!(tunnel::is_case(rule.case), "{}", rule.case);
            if let Case(other) = rule.against {
                assert!(tunnel::is_case(other), "{other}");
            }
        }
    }
}
