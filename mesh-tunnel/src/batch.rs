//! Sealed datagrams that leave together.

use mesh_wire::id::{NodeId, Via};

use crate::{
    engine::{Engine, HANDSHAKE_LEN_MAX, OVERHEAD},
    tunnel::Inner,
};

/// Room for the largest super-packet with the overhead of its segments: 64 KiB in segments of
/// 128 bytes grow by a quarter to a half. More segments than that are sent in two parts.
const BATCH_BYTES: usize = 128 << 10;

/// Where a batch goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) peer: NodeId,
    pub(crate) primary: Via,
    pub(crate) duplicate: Option<Via>,
}

/// Datagrams of one length (the last may be shorter) for one target, one behind the other.
#[derive(Debug)]
pub(crate) struct Batch {
    bytes: Box<[u8]>,
    used: usize,
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
            segment_len: 0,
            complete: false,
            target: None,
        }
    }

    /// Seals `packet` to the end of the batch, sending first what it cannot stand behind. Whether
    /// it could be sealed.
    pub(crate) fn push(
        &mut self,
        tunnel: &Inner,
        target: Target,
        engine: &mut Engine,
        packet: &[u8],
    ) -> bool {
        let sealed_len = packet.len() + OVERHEAD;
        let room = sealed_len.max(HANDSHAKE_LEN_MAX);
        let fits = self.target == Some(target)
            && !self.complete
            && sealed_len <= self.segment_len
            && self.used + room <= self.bytes.len();
        if !fits {
            self.flush(tunnel);
        }
        let Some(free) = self.bytes.get_mut(self.used..) else {
            return false;
        };
        let Some(sealed_len) = engine.seal(packet, free) else {
            return false;
        };
        if self.used == 0 {
            self.segment_len = sealed_len;
            self.target = Some(target);
        }
        self.complete = sealed_len < self.segment_len;
        self.used += sealed_len;
        true
    }

    /// Sends what is there.
    pub(crate) fn flush(&mut self, tunnel: &Inner) {
        let ready = self
            .bytes
            .get(..self.used)
            .filter(|bytes| !bytes.is_empty());
        if let (Some(target), Some(bytes)) = (self.target, ready) {
            tunnel.transmit(&target.peer, target.primary, bytes, self.segment_len);
            if let Some(duplicate) = target.duplicate {
                tunnel.transmit(&target.peer, duplicate, bytes, self.segment_len);
            }
        }
        self.used = 0;
        self.complete = false;
        self.target = None;
    }
}
