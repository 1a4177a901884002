//! From the TUN device to a path.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use mesh_linux::tun::{READ_LEN_MAX, VnetHeader};
use mesh_linux::udp::{SEGMENTS_MAX, SEND_BYTES_MAX};
use mesh_wire::{
    id::{NodeId, Via},
    peer::CONTROL_PORT,
};

use crate::{
    batch::{Batch, Target},
    engine::HANDSHAKE_LEN_MAX,
    icmp,
    peer::{HELD_DROP, Peer, State},
    route, segment,
    stats::DropReason,
    tunnel::{Inner, TunnelEvent},
};

/// What one thread needs to send.
#[derive(Debug)]
pub(crate) struct Outbox {
    batch: Batch,
    /// The segment being cut.
    scratch: Box<[u8]>,
}

impl Outbox {
    pub(crate) fn new() -> Self {
        Self {
            batch: Batch::new(),
            scratch: vec![0; READ_LEN_MAX].into(),
        }
    }

    pub(crate) fn flush(&mut self, tunnel: &Inner) {
        self.batch.flush(tunnel);
    }
}

impl Inner {
    /// Takes what was read from the TUN device, offload header first. What it seals may stay in
    /// `out` until that is flushed.
    pub(crate) fn outbound(&self, raw: &[u8], out: &mut Outbox, now: Instant) {
        match self.try_outbound(raw, out, now) {
            Ok(Some(event)) => self.emit(event),
            Ok(None) => {}
            Err(reason) => self.drops.count(reason),
        }
    }

    fn try_outbound(
        &self,
        raw: &[u8],
        out: &mut Outbox,
        now: Instant,
    ) -> Result<Option<TunnelEvent>, DropReason> {
        let (_, packet) = VnetHeader::split(raw).ok_or(DropReason::MalformedOut)?;
        let destination = route::destination(packet).ok_or(DropReason::MalformedOut)?;
        if self.is_forged_control(packet) {
            return Err(DropReason::ForgedControl);
        }
        let id = self.routes.load().get(destination).copied();
        let Some(peer) = id.and_then(|id| self.wake(&id)) else {
            self.answer_no_route(packet);
            return Err(DropReason::NoRoute);
        };
        let mut state = peer.lock();
        if state.is_ready() {
            self.send_held(&peer, &mut state, out);
            self.seal(&peer, &mut state, raw, out);
            return Ok(None);
        }
        let dropped = state.hold(raw, now, &self.held_bytes);
        self.drops.count_many(HELD_DROP, dropped);
        if !state.is_wanted(now) {
            return Ok(None);
        }
        let via = state.primary;
        let mut initiation = [0; HANDSHAKE_LEN_MAX];
        let begun = via.is_some() && state.engine.initiate(false, &mut initiation);
        drop(state);
        if let (Some(via), true) = (via, begun) {
            self.transmit(&peer.id, via, &initiation, initiation.len());
        }
        Ok((!peer.is_external()).then_some(TunnelEvent::Wanted(peer.id)))
    }

    /// Tells the sender, unless many others were just told.
    fn answer_no_route(&self, packet: &[u8]) {
        let mut answer = [0; icmp::LEN_MAX];
        let Some(len) = icmp::no_route(packet, &mut answer) else {
            return;
        };
        let allowance = &self.errors_allowed;
        let take = allowance.try_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            left.checked_sub(1)
        });
        if take.is_ok() {
            let mut framed = [0; VnetHeader::LEN + icmp::LEN_MAX];
            let whole = framed.get_mut(VnetHeader::LEN..).unwrap_or_default();
            whole.copy_from_slice(&answer);
            self.write_tun(framed.get(..VnetHeader::LEN + len).unwrap_or_default());
        }
    }

    /// Sends what waited, in order and before anything else can be sealed.
    pub(crate) fn send_held(&self, peer: &Arc<Peer>, state: &mut State, out: &mut Outbox) {
        if !state.has_held() || !state.is_ready() {
            return;
        }
        while let Some(raw) = state.take_held(&self.held_bytes) {
            self.seal(peer, state, &raw, out);
        }
        out.flush(self);
    }

    fn seal(&self, peer: &Arc<Peer>, state: &mut State, raw: &[u8], out: &mut Outbox) {
        let Some(primary) = state.primary else {
            return;
        };
        let target = Target {
            peer: peer.id,
            primary,
            duplicate: state.duplicate,
        };
        let Some((header, packet)) = VnetHeader::split(raw) else {
            return;
        };
        let Outbox { batch, scratch } = out;
        let (engine, traffic) = (&mut state.engine, &mut state.traffic);
        let mut unsealed = 0;
        let cut = segment::for_each(header, packet, scratch, |segment| {
            if batch.push(self, target, engine, segment) {
                traffic.sent_packets += 1;
                traffic.sent_bytes += segment.len() as u64;
            } else {
                unsealed += 1;
            }
        });
        self.drops.count_many(DropReason::NoSession, unsealed);
        if cut.is_err() {
            self.drops.count(DropReason::MalformedOut);
        }
        state.sent = true;
        self.mark_for_report(peer);
    }

    /// Whether a local process tries to pass for this node's core. The receiving core could not
    /// tell: the packet would come out of the right session.
    fn is_forged_control(&self, packet: &[u8]) -> bool {
        let Some(headers) = packet.first_chunk::<44>() else {
            return false;
        };
        headers[0] >> 4 == 6
            && headers[6] == segment::UDP
            && self.is_overlay([
                headers[24],
                headers[25],
                headers[26],
                headers[27],
                headers[28],
                headers[29],
            ])
            && headers[42..44] == CONTROL_PORT.to_be_bytes()
    }

    /// Sends datagrams of `segment_len` bytes (the last may be shorter) by `via`.
    pub(crate) fn transmit(&self, peer: &NodeId, via: Via, datagrams: &[u8], segment_len: usize) {
        let segment_len = segment_len.max(1);
        match via {
            Via::Direct(to) => {
                let at_once = (SEND_BYTES_MAX / segment_len).clamp(1, SEGMENTS_MAX);
                for part in datagrams.chunks(at_once * segment_len) {
                    if self.sockets.send(to, part, segment_len).is_err() {
                        let count = part.len().div_ceil(segment_len);
                        self.drops.count_many(DropReason::SendFailed, count);
                    }
                }
            }
            Via::Relay(id) => {
                let relays = self.relays.load();
                let (reason, dropped) = match relays.get(&id) {
                    Some(relay) => {
                        let dropped = relay.send(peer, datagrams, segment_len);
                        (DropReason::RelayFull, dropped)
                    }
                    None => (DropReason::RelayGone, datagrams.len().div_ceil(segment_len)),
                };
                self.drops.count_many(reason, dropped);
            }
        }
    }
}
