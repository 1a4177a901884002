//! What a relay counts, for the log and for Prometheus.

use mesh_core::relay_server::Counters;
use mesh_daemon::metrics::Page;

use crate::queue::Waiting;

/// Everything since the start; links: now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Totals {
    pub(super) core: Counters,
    pub(super) links: usize,
    pub(super) bad_frames: u64,
    pub(super) queue_dropped_frames: u64,
    pub(super) overrun_datagrams: u64,
    pub(super) failed_handshakes: u64,
    pub(super) plain_http_requests: u64,
    pub(super) stun_answers: u64,
    pub(super) stun_ignored: u64,
    pub(super) garbage_datagrams: u64,
}

impl Totals {
    /// What an operator should look at when it grows.
    fn refused_or_dropped(&self) -> [(&'static str, u64); 15] {
        let core = &self.core;
        [
            ("no_session_frames", core.no_session_frames),
            ("rate_limited_frames", core.rate_limited_frames),
            ("unbound_frames", core.unbound_frames),
            ("binds_refused", core.binds_refused),
            ("handshakes_limited", core.handshakes_limited),
            ("links_refused", core.links_refused),
            ("finds_refused", core.finds_refused),
            ("pairs_not_served", core.pairs_not_served),
            ("bad_frames", self.bad_frames),
            ("queue_dropped_frames", self.queue_dropped_frames),
            ("overrun_datagrams", self.overrun_datagrams),
            ("failed_handshakes", self.failed_handshakes),
            ("plain_http_requests", self.plain_http_requests),
            ("stun_ignored", self.stun_ignored),
            ("garbage_datagrams", self.garbage_datagrams),
        ]
    }

    pub(super) fn refused_or_dropped_sum(&self) -> u64 {
        self.refused_or_dropped()
            .iter()
            .map(|(_, count)| count)
            .sum()
    }

    fn done(&self) -> [(&'static str, &'static str, u64); 5] {
        let core = &self.core;
        [
            (
                "forwarded_frames",
                "Data frames sent on",
                core.forwarded_frames,
            ),
            (
                "forwarded_bytes",
                "Bytes of payload sent on",
                core.forwarded_bytes,
            ),
            (
                "binds",
                "UDP addresses bound, again or for the first time",
                core.binds,
            ),
            (
                "links_replaced",
                "Links replaced by a newer one of the same node",
                core.links_replaced,
            ),
            ("stun_answers", "STUN requests answered", self.stun_answers),
        ]
    }

    pub(super) fn log(&self, what: &str) {
        let done = self.done().map(|(name, _, count)| (name, count));
        let counts = done.into_iter().chain(self.refused_or_dropped());
        let counts: String = counts
            .map(|(name, count)| format!(" {name}={count}"))
            .collect();
        tracing::info!("{what}: links={}{counts}", self.links);
    }

    pub(super) fn page(&self, waiting: Waiting) -> Page {
        let mut page = Page::new("holdfast_relay");
        let links = u64::try_from(self.links).unwrap_or(u64::MAX);
        page.gauge("links", "Nodes' links that are up", links);
        let bytes = u64::try_from(waiting.bytes).unwrap_or(u64::MAX);
        let help = "Data that waits in front of links that take it slowly";
        page.gauge("queue_bytes", help, bytes);
        let age = waiting.oldest.unwrap_or_default().as_secs_f64();
        let help = "Since when the first of it waits; 0: none does";
        page.seconds("queue_age", help, age);
        for (name, help, count) in self.done() {
            page.counter(name, help, count);
        }
        let refused = self.refused_or_dropped().into_iter();
        let refused = refused.map(|(reason, count)| (vec![("reason", reason.to_owned())], count));
        let help = "Frames, datagrams, links and requests that were refused or dropped";
        page.counters("refused_or_dropped", help, refused);
        page
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, time::Duration};

    use super::*;

    #[test]
    fn each_reason_counts_once_and_is_on_the_page() {
        let totals = Totals {
            core: Counters {
                rate_limited_frames: 3,
                forwarded_bytes: 1_200,
                ..Counters::default()
            },
            links: 2,
            garbage_datagrams: 4,
            ..Totals::default()
        };
        assert_eq!(totals.refused_or_dropped_sum(), 7);
        let waiting = Waiting {
            frames: 2,
            bytes: 2_400,
            oldest: Some(Duration::from_millis(1_500)),
        };
        let page = || totals.page(waiting);
        let text = page().text().unwrap();
        for line in [
            "holdfast_relay_queue_bytes 2400",
            "holdfast_relay_queue_age_seconds 1.5",
            "holdfast_relay_links 2",
            "holdfast_relay_forwarded_bytes_total 1200",
            "holdfast_relay_refused_or_dropped_total{reason=\"rate_limited_frames\"} 3",
            "holdfast_relay_refused_or_dropped_total{reason=\"garbage_datagrams\"} 4",
            "holdfast_relay_refused_or_dropped_total{reason=\"bad_frames\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
        for asks in [
            include_str!("../../../deploy/monitoring/alerts.yaml"),
            include_str!("../../../deploy/monitoring/dashboard.json"),
        ] {
            assert_eq!(page().lacks(asks), Ok(BTreeSet::new()));
        }
    }
}
