//! What the server counts: plain numbers that the agent exports.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

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

/// A number that only grows.
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
}
