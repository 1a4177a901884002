//! What the server counts: plain numbers that the agent exports.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// Why a packet got no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DropReason {
    /// Shorter than a DNS header.
    Short,
    /// It is a response itself: answering it could go on for ever.
    Response,
    /// It came from an address that is not of this node (see [`crate::server::DnsConfig`]).
    Source,
    /// The answer could not be written in any form.
    Unwritable,
    /// The answer could not be sent.
    Unsent,
    /// Too many TCP connections.
    Connections,
}

impl DropReason {
    /// Every reason.
    pub const ALL: [Self; 6] = [
        Self::Short,
        Self::Response,
        Self::Source,
        Self::Unwritable,
        Self::Unsent,
        Self::Connections,
    ];

    /// The reason as a metric's label.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Short => "short",
            Self::Response => "response",
            Self::Source => "source",
            Self::Unwritable => "unwritable",
            Self::Unsent => "unsent",
            Self::Connections => "connections",
        }
    }
}

/// Counters since start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Packets and TCP messages that came from allowed sources.
    pub queries: Counter,
    /// Answered from the snapshot alone.
    pub own: Counter,
    /// Answers that say that a name does not exist.
    pub nxdomain: Counter,
    /// Those of them about names of the mesh: the snapshot may be behind.
    pub unknown: Counter,
    /// Answers that say that no answer could be found.
    pub servfail: Counter,
    /// Answers with any other error: the question is malformed or not welcome.
    pub refused: Counter,
    /// Questions that were put to an upstream.
    pub forwarded: Counter,
    /// Questions for upstreams that the cache answered.
    pub cache_hits: Counter,
    /// Questions that were put to a second upstream because the first took longer than usual.
    pub hedged: Counter,
    /// From when upstreams were asked until the client was answered, or given up for.
    pub waits: Waits,
    /// Upstreams that were not asked, as they had just failed.
    pub passed_over: Counter,
    /// Answers in the cache, now.
    pub cached: Counter,
    /// Exchanges with upstreams that gave no answer.
    pub upstream_failures: Counter,
    /// Answers that were asked for anew before their end.
    pub prefetched: Counter,
    /// Answers beyond their time, given because no upstream answered.
    pub stale: Counter,
    /// Questions turned away because too many are waiting for upstreams.
    pub busy: Counter,
    /// Answers over UDP that did not fit.
    pub truncated: Counter,
    /// Answers to pods without endpoints that policy denies to them.
    pub denied_left_out: Counter,
    /// Answers that the log of queries left out: more came than it could write.
    pub unlogged: Counter,
    dropped: [Counter; DropReason::ALL.len()],
}

impl Counters {
    /// How many packets were dropped for `reason`.
    #[must_use]
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.dropped.get(reason as usize).map_or(0, Counter::get)
    }

    pub(crate) fn drop_one(&self, reason: DropReason) {
        if let Some(counter) = self.dropped.get(reason as usize) {
            counter.add();
        }
    }
}

/// How often clients waited how long.
#[derive(Debug, Default)]
pub struct Waits {
    classes: [Counter; Self::LE_MS.len() + 1],
    sum_us: AtomicU64,
}

impl Waits {
    /// Upper ends of the classes: a resolver on the LAN, in the region, on another continent; a second one asked; what all
    /// upstreams together get. One more is for what is longer.
    pub const LE_MS: [u32; 9] = [1, 5, 10, 25, 50, 100, 250, 1_000, 3_000];

    /// All of them together.
    #[must_use]
    pub fn sum(&self) -> Duration {
        Duration::from_micros(self.sum_us.load(Relaxed))
    }

    /// How many were in each class, and in no one below it.
    #[must_use]
    pub fn counts(&self) -> [u64; Self::LE_MS.len() + 1] {
        self.classes.each_ref().map(Counter::get)
    }

    pub(crate) fn add(&self, wait: Duration) {
        let above = |le_ms: &&u32| wait > Duration::from_millis((**le_ms).into());
        let class = Self::LE_MS.iter().take_while(above).count();
        if let Some(class) = self.classes.get(class) {
            class.add();
        }
        let us = u64::try_from(wait.as_micros()).unwrap_or(u64::MAX);
        self.sum_us.fetch_add(us, Relaxed);
    }
}

/// A number that only grows, unless it says otherwise.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Its value now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }

    pub(crate) fn add(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    pub(crate) fn set(&self, value: usize) {
        let value = u64::try_from(value).unwrap_or(u64::MAX);
        self.0.store(value, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_in_the_first_class_that_it_fits_in() {
        let waits = Waits::default();
        for us in [0, 1_000, 1_001, 4_000_000] {
            waits.add(Duration::from_micros(us));
        }
        assert_eq!(waits.counts(), [2, 1, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(waits.sum(), Duration::from_micros(4_002_001));
    }
}
