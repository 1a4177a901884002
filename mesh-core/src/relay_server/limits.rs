//! How much is too much.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::IpAddr,
    time::Instant,
};

use mesh_wire::id::canonical_ip;

/// How much is too much. The defaults fit a relay with 1 GiB of memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Links at once. Each may hold 256 KiB of queue when its receiver is slow, and for a QUIC
    /// receiver that is gone 320 KiB of books about 2 MiB in flight: 1,024 such links need 590 MiB.
    pub links_max: usize,
    /// Links at once from one source prefix: a site of 500 nodes behind one NAT, twice.
    pub links_per_source_max: usize,
    /// Peers that one node may ask to be told about.
    pub interests_per_node_max: usize,
    /// Sessions at once: about 200 bytes each, 13 MiB.
    pub sessions_max: usize,
    /// Sessions of one node at once.
    pub sessions_per_node_max: usize,
    /// Payload that one node may send on, by all its ways together. `None`: as much as the machine
    /// carries. Only nodes of the relay's own mesh get in, what waits for a slow receiver is
    /// bounded without it, and no number fits both a small server and a large one.
    pub rate: Option<Rate>,
    /// Handshakes that one source prefix may begin, a second.
    pub handshakes_per_s: u64,
    /// Handshakes that one source prefix may begin at once: a site that comes back.
    pub handshakes_burst: u64,
}

/// What one node may send on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Bytes a second.
    pub bytes_per_s: u64,
    /// Bytes at once.
    pub burst_bytes: u64,
}

impl Rate {
    /// Bursts of a quarter of a second; never less than 64 KiB, which is 40 full-size packets.
    #[must_use]
    pub fn new(bytes_per_s: u64) -> Self {
        Self {
            bytes_per_s,
            burst_bytes: (bytes_per_s / 4).max(65_536),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            links_max: 1024,
            links_per_source_max: 1000,
            interests_per_node_max: 1024,
            sessions_max: 65_536,
            sessions_per_node_max: 1024,
            rate: None,
            handshakes_per_s: 64,
            handshakes_burst: 256,
        }
    }
}

/// The prefix that stands for one network: /24, or /48.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Source([u8; 6]);

impl From<IpAddr> for Source {
    fn from(address: IpAddr) -> Self {
        match canonical_ip(address) {
            IpAddr::V4(v4) => {
                let [a, b, c, _] = v4.octets();
                Self([0xff, 0xff, a, b, c, 0]) // ffff::/16 is no unicast prefix (RFC 4291 §2.4).
            }
            IpAddr::V6(v6) => {
                let [a, b, c, d, e, f, ..] = v6.octets();
                Self([a, b, c, d, e, f])
            }
        }
    }
}

/// Prefixes share a bucket by a keyed hash, so that no number of forged sources makes the table
/// grow: 4,096 × 48 bytes.
const BUCKETS: usize = 4096;

/// A rate for each source prefix.
#[derive(Debug)]
pub(super) struct BucketBySource {
    seed: u64,
    per_s: u64,
    burst: u64,
    buckets: Vec<Option<Bucket>>,
}

impl BucketBySource {
    pub(super) fn new(seed: u64, per_s: u64, burst: u64) -> Self {
        Self {
            seed,
            per_s,
            burst,
            buckets: vec![None; BUCKETS],
        }
    }

    /// Takes one of `source`'s tokens, if it has any.
    pub(super) fn take(&mut self, source: Source, now: Instant) -> bool {
        let mut hasher = DefaultHasher::new();
        (self.seed, source).hash(&mut hasher);
        let len = u64::try_from(BUCKETS).unwrap_or(1);
        let index = usize::try_from(hasher.finish() % len).unwrap_or(0);
        let Some(bucket) = self.buckets.get_mut(index) else {
            return true;
        };
        let bucket = bucket.get_or_insert_with(|| Bucket::full(self.burst, now));
        bucket.refill(self.per_s, self.burst, now);
        bucket.take(1)
    }
}

/// A token bucket. Tokens are kept in billionths, so that a slow rate loses nothing to rounding.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bucket {
    billionths: u128,
    at: Instant,
}

const BILLION: u128 = 1_000_000_000;

impl Bucket {
    pub(super) fn full(burst: u64, now: Instant) -> Self {
        Self {
            billionths: u128::from(burst) * BILLION,
            at: now,
        }
    }

    /// Takes the bytes of as many of `frames` as there are tokens for; returns how many that are.
    pub(super) fn take_frames(
        &mut self,
        rate: Rate,
        frames: usize,
        bytes: usize,
        now: Instant,
    ) -> usize {
        self.refill(rate.bytes_per_s, rate.burst_bytes, now);
        let bytes = bytes as u64;
        if self.take(bytes) {
            return frames;
        }
        // Some of them: the batch is of one length, but for its last.
        let each = bytes.div_ceil((frames as u64).max(1)).max(1);
        let affordable = self.billionths / BILLION / u128::from(each);
        let affordable = usize::try_from(affordable)
            .unwrap_or(usize::MAX)
            .min(frames);
        self.take(each.saturating_mul(affordable as u64));
        affordable
    }

    fn refill(&mut self, per_s: u64, burst: u64, now: Instant) {
        let elapsed = now.saturating_duration_since(self.at).as_nanos();
        let refilled = self
            .billionths
            .saturating_add(elapsed.saturating_mul(per_s.into()));
        self.billionths = refilled.min(u128::from(burst) * BILLION);
        self.at = self.at.max(now);
    }

    /// Takes `tokens`, if they are there.
    fn take(&mut self, tokens: u64) -> bool {
        match self.billionths.checked_sub(u128::from(tokens) * BILLION) {
            Some(left) => {
                self.billionths = left;
                true
            }
            None => false,
        }
    }
}
