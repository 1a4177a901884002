//! Packets between the TUN device and the cipher, fair among flows: a flow that sends little is served
//! before one that sends much, and when there is no room the greatest flow pays for it.
//!
//! Flows share [`BUCKETS`] queues by a keyed hash and are served in turns by bytes (deficit round
//! robin), new ones first, as fq_codel does (RFC 8290 §4). What has waited for [`AGE_MAX`] is dropped.
//! Flows whose way is full are set aside, and the others go on.

use std::{
    collections::VecDeque,
    hash::{BuildHasher as _, RandomState},
    time::{Duration, Instant},
};

use mesh_linux::tun::{READ_LEN_MAX, VnetHeader};

use crate::segment::{self, TCP, UDP};

/// Queues. Two of 16 busy flows share one in a third of all cases, and lose no more than that by it.
const BUCKETS: usize = 256;

/// Bytes that a flow sends in its turn: what a small flow sends in a while, and a quarter of a
/// super-packet.
const QUANTUM: i64 = 16 << 10;

/// How long a packet may wait here: only on a link that is slower than its senders. Twice the
/// longest round trip across a continent; by then TCP knows that it must slow down.
pub(crate) const AGE_MAX: Duration = Duration::from_millis(100);

/// Bytes of a small packet's place: any packet of an ordinary MTU.
const SMALL: usize = 2048;

/// Places for small packets and for super-packets, in all of a tunnel's threads together: 2 MiB and
/// 8 MiB, of which only what was ever used at once costs memory. The large ones hold what two TCP
/// flows have on the way by default (`net.ipv4.tcp_wmem`, 4 MiB each).
const SMALL_PLACES: usize = 1024;
const LARGE_PLACES: usize = 128;

/// Packets that wait, each with its offload header.
#[derive(Debug)]
pub(crate) struct FairQueue {
    small: Pool,
    large: Pool,
    /// A free place of the large pool, to read into.
    staging: usize,
    buckets: Vec<Bucket>,
    new: VecDeque<usize>,
    old: VecDeque<usize>,
    /// Set aside until [`Self::unpark`].
    parked: VecDeque<usize>,
    hasher: RandomState,
}

/// Which pool a packet lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Size {
    Small,
    Large,
}

#[derive(Debug)]
struct Pool {
    bytes: Box<[u8]>,
    place_len: usize,
    /// The place that was used last is used next: it is in the cache.
    free: Vec<usize>,
}

impl Pool {
    fn new(places: usize, place_len: usize) -> Self {
        Self {
            bytes: vec![0; places * place_len].into(),
            place_len,
            free: (0..places).rev().collect(),
        }
    }

    fn place(&self, number: usize) -> &[u8] {
        let at = number * self.place_len;
        self.bytes.get(at..at + self.place_len).unwrap_or_default()
    }

    fn place_mut(&mut self, number: usize) -> &mut [u8] {
        let at = number * self.place_len;
        self.bytes
            .get_mut(at..at + self.place_len)
            .unwrap_or_default()
    }
}

#[derive(Debug, Default)]
struct Bucket {
    waiting: VecDeque<Waiting>,
    /// Places taken.
    small: usize,
    large: usize,
    deficit: i64,
    listed: bool,
}

impl Bucket {
    fn places(&self, size: Size) -> usize {
        match size {
            Size::Small => self.small,
            Size::Large => self.large,
        }
    }

    fn places_mut(&mut self, size: Size) -> &mut usize {
        match size {
            Size::Small => &mut self.small,
            Size::Large => &mut self.large,
        }
    }
}

/// A packet's place.
#[derive(Debug, Clone, Copy)]
struct Waiting {
    size: Size,
    place: usize,
    len: usize,
    since: Instant,
}

/// A packet whose turn it is. Give it back by [`FairQueue::free`].
#[derive(Debug)]
#[must_use]
pub(crate) struct Taken {
    waiting: Waiting,
    bucket: usize,
}

impl FairQueue {
    /// A queue that may hold its part of what `workers` of them hold together.
    pub(crate) fn new(workers: usize) -> Self {
        let part = |places: usize| (places / workers.max(1)).max(places / 8);
        Self::with_places(part(SMALL_PLACES), part(LARGE_PLACES))
    }

    fn with_places(small: usize, large: usize) -> Self {
        let mut large = Pool::new(large + 1, READ_LEN_MAX);
        let staging = large.free.pop().unwrap_or(0);
        Self {
            small: Pool::new(small, SMALL),
            large,
            staging,
            buckets: (0..BUCKETS).map(|_| Bucket::default()).collect(),
            new: VecDeque::with_capacity(BUCKETS),
            old: VecDeque::with_capacity(BUCKETS),
            parked: VecDeque::with_capacity(BUCKETS),
            hasher: RandomState::new(),
        }
    }

    /// Whether nobody's turn can come; flows that are set aside do not count.
    pub(crate) fn is_empty(&self) -> bool {
        self.new.is_empty() && self.old.is_empty()
    }

    /// Room for the next packet, which [`Self::push`] takes in.
    pub(crate) fn staging(&mut self) -> &mut [u8] {
        let staging = self.staging;
        self.large.place_mut(staging)
    }

    /// Takes the `len` bytes in [`Self::staging`]. How many packets were dropped to make room.
    pub(crate) fn push(&mut self, len: usize, now: Instant) -> usize {
        let framed = self.large.place(self.staging);
        let bucket = self.bucket_of(framed.get(..len).unwrap_or_default());
        let size = if len <= SMALL {
            Size::Small
        } else {
            Size::Large
        };
        let mut dropped = 0;
        let free = loop {
            if let Some(free) = self.pool(size).free.pop() {
                break free;
            }
            if !self.drop_from_greatest(size) {
                return dropped + 1;
            }
            dropped += 1;
        };
        let place = match size {
            Size::Large => std::mem::replace(&mut self.staging, free),
            Size::Small => {
                let from = self
                    .large
                    .place(self.staging)
                    .get(..len)
                    .unwrap_or_default();
                if let Some(to) = self.small.place_mut(free).get_mut(..len) {
                    to.copy_from_slice(from);
                }
                free
            }
        };
        if let Some(queue) = self.buckets.get_mut(bucket) {
            queue.waiting.push_back(Waiting {
                size,
                place,
                len,
                since: now,
            });
            *queue.places_mut(size) += 1;
            if !queue.listed {
                queue.listed = true;
                queue.deficit = QUANTUM;
                self.new.push_back(bucket);
            }
        }
        dropped
    }

    /// The packet whose turn it is. `late` is told how many had waited too long.
    pub(crate) fn pop(&mut self, now: Instant, late: &mut usize) -> Option<Taken> {
        loop {
            let from_new = !self.new.is_empty();
            let list = if from_new {
                &mut self.new
            } else {
                &mut self.old
            };
            let number = *list.front()?;
            let bucket = self.buckets.get_mut(number)?;
            if bucket.deficit <= 0 {
                bucket.deficit += QUANTUM;
                list.pop_front();
                self.old.push_back(number);
                continue;
            }
            let Some(waiting) = bucket.waiting.pop_front() else {
                list.pop_front();
                // A flow that was new goes round once more, so that it cannot be new at will.
                if from_new && !self.old.is_empty() {
                    self.old.push_back(number);
                } else {
                    bucket.listed = false;
                }
                continue;
            };
            *bucket.places_mut(waiting.size) -= 1;
            if now.saturating_duration_since(waiting.since) > AGE_MAX {
                *late += 1;
                self.pool(waiting.size).free.push(waiting.place);
                continue;
            }
            bucket.deficit -= i64::try_from(waiting.len).unwrap_or(QUANTUM);
            return Some(Taken {
                waiting,
                bucket: number,
            });
        }
    }

    /// The bytes of a packet, offload header first.
    pub(crate) fn bytes(&self, taken: &Taken) -> &[u8] {
        let waiting = &taken.waiting;
        let pool = match waiting.size {
            Size::Small => &self.small,
            Size::Large => &self.large,
        };
        let place = pool.place(waiting.place);
        place.get(..waiting.len).unwrap_or_default()
    }

    /// Its place can be used again.
    pub(crate) fn free(&mut self, taken: Taken) {
        let Taken { waiting, .. } = taken;
        self.pool(waiting.size).free.push(waiting.place);
    }

    /// The way of the packet that was taken last is full: puts it back, and sets its flow aside.
    pub(crate) fn park(&mut self, taken: Taken) {
        let Taken { waiting, bucket } = taken;
        for list in [&mut self.new, &mut self.old] {
            if list.front() == Some(&bucket) {
                list.pop_front();
                self.parked.push_back(bucket);
                break;
            }
        }
        if let Some(queue) = self.buckets.get_mut(bucket) {
            queue.deficit += i64::try_from(waiting.len).unwrap_or(QUANTUM);
            *queue.places_mut(waiting.size) += 1;
            queue.waiting.push_front(waiting);
        }
    }

    /// Whoever was set aside has his turn again.
    pub(crate) fn unpark(&mut self) {
        self.old.extend(self.parked.drain(..));
    }

    fn pool(&mut self, size: Size) -> &mut Pool {
        match size {
            Size::Small => &mut self.small,
            Size::Large => &mut self.large,
        }
    }

    /// Drops the oldest packet of the flow that takes most places of this size.
    fn drop_from_greatest(&mut self, size: Size) -> bool {
        let greatest = self.buckets.iter_mut();
        let Some(bucket) = greatest.max_by_key(|bucket| bucket.places(size)) else {
            return false;
        };
        let oldest = bucket.waiting.iter().position(|one| one.size == size);
        let Some(waiting) = oldest.and_then(|at| bucket.waiting.remove(at)) else {
            return false;
        };
        *bucket.places_mut(size) -= 1;
        self.pool(size).free.push(waiting.place);
        true
    }

    fn bucket_of(&self, framed: &[u8]) -> usize {
        let packet = framed.get(VnetHeader::LEN..).unwrap_or_default();
        let hash = self.hasher.hash_one(flow(packet));
        usize::try_from(hash % BUCKETS as u64).unwrap_or_default()
    }
}

/// What the packets of a flow have in common: addresses, protocol, and ports where they stand at
/// once behind the IP header of an unfragmented packet.
fn flow(packet: &[u8]) -> (Option<&[u8]>, u8, Option<&[u8]>) {
    let (protocol, transport_at, fragment) = match packet.first().map_or(0, |first| first >> 4) {
        4 => {
            let words = packet.first().map_or(0, |first| usize::from(first & 0xf));
            let offset = packet.get(6..8).and_then(<[u8]>::first_chunk).copied();
            let fragment = offset.is_some_and(|offset| u16::from_be_bytes(offset) & 0x3fff != 0);
            (packet.get(9).copied().unwrap_or(0), words * 4, fragment)
        }
        6 => (packet.get(6).copied().unwrap_or(0), 40, false),
        _ => (0, 0, true),
    };
    let has_ports = matches!(protocol, TCP | UDP) && !fragment;
    let ports = packet
        .get(transport_at..transport_at + 4)
        .filter(|_| has_ports);
    (segment::addresses(packet), protocol, ports)
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::*;

    fn framed(port: u16, len: usize, number: u32) -> Vec<u8> {
        let mut packet = Vec::new();
        let payload = [&number.to_be_bytes()[..], &vec![0; len.saturating_sub(4)]].concat();
        PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .udp(port, 80)
            .write(&mut packet, &payload)
            .unwrap();
        [&[0; VnetHeader::LEN][..], &packet].concat()
    }

    fn push(queue: &mut FairQueue, framed: &[u8], now: Instant) -> usize {
        queue.staging()[..framed.len()].copy_from_slice(framed);
        queue.push(framed.len(), now)
    }

    /// Port and number of the next packet.
    fn pop(queue: &mut FairQueue, now: Instant) -> Option<(u16, u32)> {
        let mut late = 0;
        let taken = queue.pop(now, &mut late)?;
        assert_eq!(late, 0);
        let bytes = queue.bytes(&taken)[VnetHeader::LEN..].to_vec();
        queue.free(taken);
        let port = u16::from_be_bytes([bytes[20], bytes[21]]);
        let number = u32::from_be_bytes(bytes[28..32].try_into().unwrap());
        Some((port, number))
    }

    #[test]
    fn a_small_flow_passes_a_bulk_flow_that_came_first() {
        let now = Instant::now();
        let mut queue = FairQueue::new(1);
        for number in 0..40 {
            assert_eq!(push(&mut queue, &framed(1, 60_000, number), now), 0);
        }
        assert_eq!(pop(&mut queue, now), Some((1, 0)));
        for number in 0..3 {
            push(&mut queue, &framed(2, 100, number), now);
            assert_eq!(pop(&mut queue, now), Some((2, number)));
            assert_eq!(pop(&mut queue, now), Some((1, number + 1)));
        }
    }

    #[test]
    fn bulk_flows_share_by_bytes_not_by_packets() {
        let now = Instant::now();
        let mut queue = FairQueue::new(1);
        for number in 0..64 {
            push(&mut queue, &framed(1, 60_000, number), now);
        }
        for number in 0..1000 {
            push(&mut queue, &framed(2, 1000, number), now);
        }
        let mut bytes = [0, 0];
        for _ in 0..300 {
            match pop(&mut queue, now).unwrap() {
                (1, _) => bytes[0] += 60_000,
                _ => bytes[1] += 1000,
            }
        }
        assert!(
            bytes[0] < 2 * bytes[1] && bytes[1] < 2 * bytes[0],
            "{bytes:?}"
        );
    }

    #[test]
    fn without_room_the_greatest_flow_pays() {
        let now = Instant::now();
        let mut queue = FairQueue::with_places(8, 4);
        push(&mut queue, &framed(2, 100, 0), now);
        let dropped: usize = (0..20)
            .map(|number| push(&mut queue, &framed(1, 100, number), now))
            .sum();
        assert_eq!(dropped, 13);
        let rest: Vec<_> = std::iter::from_fn(|| pop(&mut queue, now)).collect();
        assert!(rest.contains(&(2, 0)));
        let of_greatest: Vec<_> = rest.iter().filter(|(port, _)| *port == 1).collect();
        assert_eq!(of_greatest.len(), 7);
        assert_eq!(of_greatest[0], &(1, 13), "the oldest go first");
        let dropped: usize = (0..6)
            .map(|number| push(&mut queue, &framed(1, 60_000, number), now))
            .sum();
        assert_eq!(dropped, 2);
    }

    #[test]
    fn what_waits_too_long_is_dropped() {
        let now = Instant::now();
        let mut queue = FairQueue::new(1);
        push(&mut queue, &framed(1, 100, 0), now);
        push(&mut queue, &framed(1, 100, 1), now + AGE_MAX);
        let (mut late, then) = (0, now + AGE_MAX + Duration::from_millis(1));
        let taken = queue.pop(then, &mut late).unwrap();
        assert_eq!(late, 1);
        queue.free(taken);
        assert!(queue.pop(then, &mut late).is_none() && queue.is_empty());
    }

    #[test]
    fn a_flow_whose_way_is_full_waits_and_the_others_go_on() {
        let now = Instant::now();
        let mut queue = FairQueue::new(1);
        for (port, number) in [(1, 0), (1, 1), (2, 0), (3, 0)] {
            push(&mut queue, &framed(port, 100, number), now);
        }
        for _ in 0..2 {
            let taken = queue.pop(now, &mut 0).unwrap();
            queue.park(taken); // Flows 1 and 2, or the other way round.
        }
        assert_eq!(pop(&mut queue, now), Some((3, 0)));
        assert_eq!(pop(&mut queue, now), None);
        assert!(queue.is_empty());
        push(&mut queue, &framed(1, 100, 2), now);
        assert_eq!(
            pop(&mut queue, now),
            None,
            "what comes later waits behind it"
        );
        queue.unpark();
        let mut rest: Vec<_> = std::iter::from_fn(|| pop(&mut queue, now)).collect();
        rest.sort_by_key(|(port, _)| *port); // Within a flow the order stays.
        assert_eq!(rest, [(1, 0), (1, 1), (1, 2), (2, 0)]);
    }

    #[test]
    fn what_is_set_aside_ages_and_gives_room() {
        let now = Instant::now();
        let mut queue = FairQueue::with_places(8, 4);
        push(&mut queue, &framed(1, 100, 0), now);
        let taken = queue.pop(now, &mut 0).unwrap();
        queue.park(taken);
        let dropped: usize = (1..=8)
            .map(|number| push(&mut queue, &framed(1, 100, number), now))
            .sum();
        assert_eq!(dropped, 1);
        queue.unpark();
        let (mut late, then) = (0, now + AGE_MAX + Duration::from_millis(1));
        assert!(queue.pop(then, &mut late).is_none());
        assert_eq!(late, 8);
        assert_eq!(queue.small.free.len(), 8);
    }

    #[test]
    fn packets_of_all_kinds_have_a_flow() {
        for bytes in [&[][..], &[0x45], &[0x60; 20], &[0x4f; 24], &[0xff; 100]] {
            let _any: (Option<&[u8]>, u8, Option<&[u8]>) = flow(bytes);
        }
    }

    proptest! {
        #[test]
        fn every_packet_comes_out_once_and_flows_keep_their_order(
            steps in prop::collection::vec((0_u16..6, prop_oneof![Just(40_usize), Just(1400), Just(60_000)], 0..4_u8), 1..400),
        ) {
            let now = Instant::now();
            let mut queue = FairQueue::with_places(64, 16);
            let (mut next, mut seen, mut dropped, mut out) = ([0_u32; 6], [None::<u32>; 6], 0, 0);
            let mut took = 0;
            for (flow, len, take) in steps {
                let number = &mut next[usize::from(flow)];
                dropped += push(&mut queue, &framed(flow, len, *number), now);
                *number += 1;
                if take == 2
                    && let Some(taken) = queue.pop(now, &mut 0)
                {
                    queue.park(taken);
                }
                if take == 3 {
                    queue.unpark();
                }
                took += usize::from(take == 1);
                if take == 1 && let Some((port, number)) = pop(&mut queue, now) {
                    out += 1;
                    prop_assert!(seen[usize::from(port)].is_none_or(|last| last < number));
                    seen[usize::from(port)] = Some(number);
                }
            }
            prop_assert!(out <= took);
            queue.unpark();
            while let Some((port, number)) = pop(&mut queue, now) {
                out += 1;
                prop_assert!(seen[usize::from(port)].is_none_or(|last| last < number));
                seen[usize::from(port)] = Some(number);
            }
            prop_assert_eq!(out + dropped, next.iter().sum::<u32>() as usize);
            prop_assert!(queue.is_empty());
            let free = queue.small.free.len() + queue.large.free.len();
            prop_assert_eq!(free, 64 + 16);
        }
    }
}
