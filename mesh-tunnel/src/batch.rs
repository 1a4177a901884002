//! Sealed datagrams that leave together.

use mesh_linux::udp::Ecn;
use mesh_wire::id::{NodeId, Via};
use mesh_wireguard::message::{DATA_HEADER_LEN, OVERHEAD};

use crate::transmit::{self, Way};

/// Room for what of one super-packet did not fill a call, and for the largest super-packet with the overhead of
/// its segments: 64 KiB, and 64 KiB in segments of 128 bytes, which grow by a quarter to a half. More
/// segments than that are sent in two parts.
const BATCH_BYTES: usize = 160 << 10;

/// Where a batch goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) peer: NodeId,
    pub(crate) primary: Way,
    pub(crate) duplicate: Option<Via>,
    pub(crate) ecn: Ecn,
}

/// Datagrams of one length (the last may be shorter) for one target, one behind the other. They leave in calls that are as
/// large as the kernel takes them; what fills none waits for more until it is flushed.
///
/// `send` sends datagrams of a length, which fit one call, and returns how many bytes are gone: fewer than there are
/// if the kernel has no room now.
#[derive(Debug)]
pub(crate) struct Batch {
    bytes: Box<[u8]>,
    used: usize,
    /// What the kernel has taken of them by the primary way.
    left: usize,
    segment_len: usize,
    /// A shorter datagram ended it.
    complete: bool,
    target: Option<Target>,
}

impl Batch {
    pub(crate) fn new() -> Self {
        Self {
            bytes: vec![0; BATCH_BYTES].into(),
            used: 0,
            left: 0,
            segment_len: 0,
            complete: false,
            target: None,
        }
    }

    /// Whether a packet of `padded_len` bytes for `target` can stand behind what is there.
    pub(crate) fn fits(&self, target: &Target, padded_len: usize) -> bool {
        let len = padded_len + OVERHEAD;
        self.used + len <= self.bytes.len() && (self.used == 0 || self.continues(target, len))
    }

    fn continues(&self, target: &Target, len: usize) -> bool {
        self.target.as_ref() == Some(target) && !self.complete && len <= self.segment_len
    }

    /// Makes room for `count` packets of up to `padded_len` bytes. If they can stand behind what is there it
    /// stays, to leave with them; else it leaves now. False if the kernel has no room for what must leave.
    pub(crate) fn make_room(
        &mut self,
        target: &Target,
        padded_len: usize,
        count: usize,
        send: &mut impl FnMut(&Target, &[u8], usize) -> usize,
    ) -> bool {
        if !self.send_full(send) {
            return false;
        }
        let len = padded_len + OVERHEAD;
        // A shorter one ends the batch: only the last of them may be that.
        if self.continues(target, len) && (count == 1 || len == self.segment_len) {
            let room = |used| count.saturating_mul(len) <= BATCH_BYTES - used;
            if room(self.used) {
                return true;
            }
            let rest = self.unsent();
            if room(rest) {
                self.bytes.copy_within(self.left..self.used, 0);
                (self.left, self.used) = (0, rest);
                return true;
            }
        }
        self.flush(send)
    }

    /// Where to write a packet of `padded_len` bytes that [`Self::fits`]: a whole datagram, with
    /// [`DATA_HEADER_LEN`] bytes in front of the packet. It counts from now on.
    pub(crate) fn place(&mut self, target: Target, padded_len: usize) -> &mut [u8] {
        let len = padded_len + OVERHEAD;
        if self.used == 0 {
            self.segment_len = len;
            self.target = Some(target);
        }
        self.complete = len < self.segment_len;
        let at = self.used;
        self.used += len;
        self.bytes.get_mut(at..at + len).unwrap_or_default()
    }

    /// Takes the last datagram out again.
    pub(crate) fn unplace(&mut self, padded_len: usize) {
        self.used = self.used.saturating_sub(padded_len + OVERHEAD);
        self.complete = false;
    }

    /// Sends what fills calls; the rest waits for more. False if the kernel has no room now: call again.
    pub(crate) fn send_full(
        &mut self,
        send: &mut impl FnMut(&Target, &[u8], usize) -> usize,
    ) -> bool {
        self.send(false, send)
    }

    /// Sends what is there. Whether all left; if not, the kernel has no room now: call again.
    pub(crate) fn flush(&mut self, send: &mut impl FnMut(&Target, &[u8], usize) -> usize) -> bool {
        self.send(true, send)
    }

    fn send(
        &mut self,
        also_rest: bool,
        send: &mut impl FnMut(&Target, &[u8], usize) -> usize,
    ) -> bool {
        let Some(target) = self.target else {
            return true;
        };
        let full =
            transmit::segments_at_once(target.primary.via, self.segment_len) * self.segment_len;
        let least = if also_rest { 1 } else { full };
        while self.unsent() >= least {
            let end = self.used.min(self.left + full);
            let call = self.bytes.get(self.left..end).unwrap_or_default();
            self.left += send(&target, call, self.segment_len);
            if self.left < end {
                return false;
            }
        }
        if self.left == self.used {
            self.clear();
        }
        true
    }

    /// Bytes that did not leave yet.
    pub(crate) fn unsent(&self) -> usize {
        self.used - self.left
    }

    /// Gives up what could not be sent; how many datagrams.
    pub(crate) fn abandon(&mut self) -> usize {
        let unsent = self.unsent().div_ceil(self.segment_len.max(1));
        self.clear();
        unsent
    }

    fn clear(&mut self) {
        self.used = 0;
        self.left = 0;
        self.complete = false;
        self.target = None;
    }
}

const _: () = assert!(BATCH_BYTES > OVERHEAD + DATA_HEADER_LEN + u16::MAX as usize);

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use mesh_linux::udp::{SEGMENTS_MAX, SEND_BYTES_MAX};
    use proptest::prelude::*;

    use super::*;

    fn target(port: u16) -> Target {
        let via = Via::Direct(SocketAddr::from(([192, 0, 2, 1], port)));
        Target {
            peer: NodeId([1; 32]),
            primary: via.into(),
            duplicate: None,
            ecn: Ecn::NotCapable,
        }
    }

    /// Places `count` datagrams that hold their numbers from `first` on.
    fn place(batch: &mut Batch, target: Target, len: usize, count: usize, first: u16) {
        for number in (first..).take(count) {
            assert!(batch.fits(&target, len));
            let place = batch.place(target, len);
            assert_eq!(place.len(), len + OVERHEAD);
            place[..2].copy_from_slice(&number.to_le_bytes());
        }
    }

    #[test]
    fn super_packets_leave_in_full_calls() {
        let (mut batch, mut calls) = (Batch::new(), Vec::new());
        let mut send = |_: &Target, bytes: &[u8], segment_len: usize| {
            calls.push(bytes.len() / segment_len);
            bytes.len()
        };
        // What the kernel makes of a stream with an MTU of 1,420 bytes; one call takes 45.
        for _ in 0..5 {
            assert!(batch.make_room(&target(1), 1_420, 47, &mut send));
            place(&mut batch, target(1), 1_420, 47, 0);
            assert!(batch.send_full(&mut send));
        }
        assert!(batch.flush(&mut send));
        assert_eq!(calls, [45, 45, 45, 45, 45, 10]);
    }

    proptest! {
        /// Super-packets to two targets, and a kernel that has room for some calls only.
        #[test]
        fn everything_leaves_once_and_in_order(
            steps in prop::collection::vec((1_u16..3, 100_usize..1_500, 1_usize..70, 0_usize..1_500), 1..60),
            room in prop::collection::vec(any::<bool>(), 1..40),
        ) {
            let (mut batch, mut expected, mut left) = (Batch::new(), Vec::new(), Vec::new());
            let mut room = room.iter().copied().chain([true]).cycle();
            let mut send = |target: &Target, bytes: &[u8], segment_len: usize| {
                assert!(bytes.len() <= SEND_BYTES_MAX && bytes.len() <= SEGMENTS_MAX * segment_len);
                if !room.next().unwrap() {
                    return 0;
                }
                for datagram in bytes.chunks(segment_len) {
                    left.push((*target, datagram.len(), u16::from_le_bytes([datagram[0], datagram[1]])));
                }
                bytes.len()
            };
            let mut number = 0;
            for (port, len, count, last) in steps {
                let (target, last) = (target(port), last.min(len));
                // As a worker comes again until there is room.
                while !batch.make_room(&target, len, count, &mut send) {}
                for (at, len) in [(0, len), (count - 1, last)] {
                    let count = if at == 0 { count - 1 } else { 1 };
                    while count > 0 && !batch.fits(&target, len) {
                        batch.flush(&mut send);
                    }
                    place(&mut batch, target, len, count, number);
                    expected.extend((number..).take(count).map(|number| (target, len + OVERHEAD, number)));
                    number += u16::try_from(count).unwrap();
                }
                batch.send_full(&mut send);
            }
            while !batch.flush(&mut send) {}
            prop_assert_eq!(left, expected);
        }
    }
}
