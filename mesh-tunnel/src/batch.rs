//! Sealed datagrams that leave together.

use mesh_linux::udp::Ecn;
use mesh_wire::id::{NodeId, Via};
use mesh_wireguard::message::{DATA_HEADER_LEN, OVERHEAD};

use crate::{
    stats::DropReason,
    transmit::{Leave, Way},
    tunnel::Inner,
};

/// Room for the largest super-packet with the overhead of its segments: 64 KiB in segments of
/// 128 bytes grow by a quarter to a half. More segments than that are sent in two parts.
const BATCH_BYTES: usize = 128 << 10;

/// Where a batch goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) peer: NodeId,
    pub(crate) primary: Way,
    pub(crate) duplicate: Option<Via>,
    pub(crate) ecn: Ecn,
}

/// Datagrams of one length (the last may be shorter) for one target, one behind the other.
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
        self.used == 0 && len <= self.bytes.len()
            || self.target.as_ref() == Some(target)
                && !self.complete
                && len <= self.segment_len
                && self.used + len <= self.bytes.len()
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

    /// Sends what is there. Whether all left; if not, the kernel has no room now: call again.
    pub(crate) fn flush(&mut self, tunnel: &Inner, leave: &mut Leave) -> bool {
        let Some(target) = self.target.filter(|_| self.used > 0) else {
            self.clear();
            return true;
        };
        let bytes = self.bytes.get(..self.used).unwrap_or_default();
        let rest = bytes.get(self.left..).unwrap_or_default();
        let Target { peer, ecn, .. } = target;
        let sent = tunnel.transmit(&peer, target.primary, rest, self.segment_len, ecn, leave);
        self.left += sent;
        if self.left < self.used {
            return false;
        }
        if let Some(duplicate) = target.duplicate {
            // A copy: what finds no room is not waited for.
            let sent =
                tunnel.transmit(&peer, duplicate.into(), bytes, self.segment_len, ecn, leave);
            let unsent = (bytes.len() - sent).div_ceil(self.segment_len.max(1));
            tunnel.drops.count_many(DropReason::SendFailed, unsent);
        }
        self.clear();
        true
    }

    /// Gives up what could not be sent; how many datagrams.
    pub(crate) fn abandon(&mut self) -> usize {
        let unsent = (self.used - self.left).div_ceil(self.segment_len.max(1));
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
