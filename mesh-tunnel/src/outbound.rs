//! From the TUN device to a path.

use std::{
    hash::{BuildHasher as _, RandomState},
    io::IoSlice,
    net::IpAddr,
    sync::{
        Arc,
        atomic::Ordering::{Acquire, Relaxed},
    },
    time::Instant,
};

use mesh_linux::{tun::VnetHeader, udp::Ecn};
use mesh_wire::peer::CONTROL_PORT;
use mesh_wireguard::{message::DATA_HEADER_LEN, session::padded_len};

use crate::{
    batch::{Batch, Target},
    ecn, icmp,
    peer::{HELD_DROP, Peer, Sending, State},
    route,
    segment::{self, Cut, Malformed},
    stats::DropReason,
    transmit::{Leave, Way},
    tunnel::{Inner, TunnelEvent, since_1970},
};

/// What one thread needs to send.
#[derive(Debug)]
pub(crate) struct Outbox {
    pub(crate) batch: Batch,
    pub(crate) leave: Leave,
    lookups: Lookups,
}

impl Outbox {
    pub(crate) fn new(leave: Leave) -> Self {
        Self {
            batch: Batch::new(),
            leave,
            lookups: Lookups::new(),
        }
    }

    /// Sends what is there; see [`Batch::flush`].
    pub(crate) fn flush(&mut self, tunnel: &Inner) -> bool {
        self.batch.flush(&mut by(tunnel, &mut self.leave))
    }

    /// Sends what is there, or drops it if there is no room.
    fn flush_now(&mut self, tunnel: &Inner) {
        if !self.flush(tunnel) {
            let unsent = self.batch.abandon();
            tunnel.drops.count_many(DropReason::SendFailed, unsent);
        }
    }
}

/// Destinations whose peers a thread remembers: flows of 256 destinations meet in one place
/// rarely, and whoever does is looked up again.
const LOOKUPS: usize = 256;

/// The peers of recent destinations, so that no lock is shared for each packet.
#[derive(Debug)]
struct Lookups {
    generation: u64,
    hasher: RandomState,
    entries: Vec<Option<(IpAddr, Arc<Peer>)>>,
}

impl Lookups {
    fn new() -> Self {
        Self {
            generation: 0,
            hasher: RandomState::new(),
            entries: Vec::new(),
        }
    }

    fn get(&mut self, tunnel: &Inner, destination: IpAddr) -> Option<&Arc<Peer>> {
        let generation = tunnel.generation.load(Acquire);
        if generation != self.generation || self.entries.is_empty() {
            self.entries.clear();
            self.entries.resize(LOOKUPS, None);
            self.generation = generation;
        }
        let hash = self.hasher.hash_one(destination);
        let number = usize::try_from(hash % LOOKUPS as u64).unwrap_or_default();
        let entry = self.entries.get_mut(number)?;
        if entry
            .as_ref()
            .is_none_or(|(known, _)| *known != destination)
        {
            let id = tunnel.routes.load().get(destination).copied()?;
            *entry = Some((destination, tunnel.wake(&id)?));
        }
        entry.as_ref().map(|(_, peer)| peer)
    }
}

/// Why a packet cannot go now: come again with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoRoom {
    /// No room in the socket, for anybody.
    Socket,
    /// No room in the link to its relay; packets of other ways can go.
    Relay,
}

impl Inner {
    /// Takes what was read from the TUN device, offload header first. What it seals may stay in
    /// `out` until that is flushed.
    pub(crate) fn outbound(
        &self,
        raw: &[u8],
        out: &mut Outbox,
        now: Instant,
    ) -> Result<(), NoRoom> {
        let Outbox {
            batch,
            leave,
            lookups,
        } = out;
        let checked = self.check_outbound(raw);
        let found = checked.and_then(|(cut, destination)| {
            let peer = lookups
                .get(self, destination)
                .ok_or_else(|| self.refuse(cut.packet(), destination))?;
            Ok((cut, peer))
        });
        let (cut, peer) = match found {
            Ok(found) => found,
            Err(reason) => {
                self.drops.count(reason);
                return Ok(());
            }
        };
        let sending = peer.sending.load();
        if let Some(sending) = sending
            .as_deref()
            .filter(|sending| sending.session.is_alive(now))
        {
            if self.is_relay_full(&peer.id, sending.primary.via) {
                return Err(NoRoom::Relay);
            }
            let target = target(peer, sending, ecn::of(cut.packet()));
            let padded = padded_len(cut.len(0), self.mtu.load(Relaxed));
            if !batch.make_room(&target, padded, cut.count(), &mut by(self, leave)) {
                return Err(NoRoom::Socket);
            }
            self.seal(peer, sending, &cut, batch, leave, now);
            return Ok(());
        }
        drop(sending);
        let peer = Arc::clone(peer);
        self.outbound_later(&peer, raw, out, now);
        Ok(())
    }

    fn check_outbound<'a>(&self, raw: &'a [u8]) -> Result<(Cut<'a>, IpAddr), DropReason> {
        let cut = Cut::read(raw).map_err(|Malformed| DropReason::MalformedOut)?;
        let destination = route::destination(cut.packet()).ok_or(DropReason::MalformedOut)?;
        if self.is_forged_control(cut.packet()) {
            return Err(DropReason::ForgedControl);
        }
        Ok((cut, destination))
    }

    /// A packet for a peer without session or way.
    fn outbound_later(&self, peer: &Arc<Peer>, raw: &[u8], out: &mut Outbox, now: Instant) {
        let mut state = peer.lock();
        let dropped = state.hold(raw, now, &self.held_bytes);
        self.drops.count_many(HELD_DROP, dropped);
        // Another thread may have made a session meanwhile.
        self.send_held(peer, &mut state, out, now);
        if !state.has_held() || !state.is_wanted(now) {
            return;
        }
        let way = state.primary;
        let initiation = match way {
            Some(_) if !state.protocol.is_initiating() => {
                state.initiate(&self.key, now, since_1970())
            }
            _ => None,
        };
        drop(state);
        if let (Some(way), Some(initiation)) = (way, initiation) {
            self.send_handshake(peer, way, &initiation, &mut out.leave, now);
        }
        if !peer.is_external {
            self.emit(TunnelEvent::Wanted(peer.id));
        }
    }

    /// Sends a handshake message.
    pub(crate) fn send_handshake(
        &self,
        peer: &Peer,
        way: Way,
        message: &[u8],
        leave: &mut Leave,
        now: Instant,
    ) {
        peer.activity.sent_other(now);
        peer.counts.wire_sent(message.len());
        self.transmit(
            &peer.id,
            way,
            message,
            message.len(),
            Ecn::NotCapable,
            leave,
        );
    }

    /// Why a packet goes to nobody. The sender is told if there is an answer for it.
    #[cold]
    fn refuse(&self, packet: &[u8], destination: IpAddr) -> DropReason {
        if !icmp::is_single(destination) {
            return DropReason::Multicast;
        }
        self.answer_no_route(packet);
        DropReason::NoRoute
    }

    /// Tells the sender, unless many others were just told.
    fn answer_no_route(&self, packet: &[u8]) {
        let mut answer = [0; icmp::LEN_MAX];
        let Some(len) = icmp::no_route(packet, &mut answer) else {
            return;
        };
        let allowance = &self.errors_allowed;
        let take = allowance.try_update(Relaxed, Relaxed, |left| left.checked_sub(1));
        if take.is_ok() {
            let mut framed = [0; VnetHeader::LEN + icmp::LEN_MAX];
            let whole = framed.get_mut(VnetHeader::LEN..).unwrap_or_default();
            whole.copy_from_slice(&answer);
            let framed = framed.get(..VnetHeader::LEN + len).unwrap_or_default();
            self.write_tun(0, &[IoSlice::new(framed)]);
        }
    }

    /// Sends what waited, in order and before anything else can be sealed, if there are a session
    /// and a way now; publishes what the state has come to.
    pub(crate) fn send_held(
        &self,
        peer: &Arc<Peer>,
        state: &mut State,
        out: &mut Outbox,
        now: Instant,
    ) {
        let alive = |sending: &Sending| sending.session.is_alive(now);
        if let Some(sending) = state.sending().filter(alive) {
            while let Some(raw) = state.take_held(&self.held_bytes) {
                out.flush_now(self);
                let Outbox { batch, leave, .. } = out;
                match Cut::read(&raw) {
                    Ok(cut) => self.seal(peer, &sending, &cut, batch, leave, now),
                    Err(Malformed) => self.drops.count(DropReason::MalformedOut),
                }
            }
            out.flush_now(self);
        }
        peer.publish(state);
    }

    /// Seals a super-packet into `batch`, which fits its first packet, and sends what fills a call.
    fn seal(
        &self,
        peer: &Arc<Peer>,
        sending: &Sending,
        cut: &Cut<'_>,
        batch: &mut Batch,
        leave: &mut Leave,
        now: Instant,
    ) {
        let count = cut.count();
        let Some(first) = sending.session.reserve(count) else {
            self.drops.count_many(DropReason::NoSession, count);
            return;
        };
        let target = target(peer, sending, ecn::of(cut.packet()));
        let mtu = self.padding_limit(cut);
        let (mut sealed, mut bytes, mut wire) = (0, 0, 0);
        for (index, counter) in (0..count).zip(first..) {
            let len = cut.len(index);
            let padded = padded_len(len, mtu);
            if !batch.fits(&target, padded) && !batch.flush(&mut by(self, leave)) {
                let unsent = batch.abandon();
                self.drops.count_many(DropReason::SendFailed, unsent);
            }
            let place = batch.place(target, padded);
            let wire_len = place.len();
            let room = place.get_mut(DATA_HEADER_LEN..DATA_HEADER_LEN + padded);
            let (plain, padding) = room.unwrap_or_default().split_at_mut(len);
            padding.fill(0);
            if cut.write(index, plain).is_err() || !sending.session.seal(counter, place) {
                batch.unplace(padded);
                self.drops.count(DropReason::MalformedOut);
                continue;
            }
            sealed += 1;
            bytes += len;
            wire += wire_len;
        }
        peer.counts.sent(sealed, bytes);
        peer.counts.wire_sent(wire);
        if target.duplicate.is_some() {
            peer.take_copies(sealed);
        }
        peer.note_sent(now);
        self.mark_for_report(peer);
        // What finds no room now is noticed by whoever wants to send next.
        batch.send_full(&mut by(self, leave));
    }

    /// What padding must not exceed: the device's MTU, as far as it is known; packets prove that it is
    /// no less than they are.
    fn padding_limit(&self, cut: &Cut<'_>) -> usize {
        self.mtu.load(Relaxed).max(cut.len(0))
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
}

/// How a batch sends.
fn by(tunnel: &Inner, leave: &mut Leave) -> impl FnMut(&Target, &[u8], usize) -> usize {
    |target, datagrams, segment_len| tunnel.send_call(target, datagrams, segment_len, leave)
}

fn target(peer: &Peer, sending: &Sending, ecn: Ecn) -> Target {
    Target {
        peer: peer.id,
        primary: sending.primary,
        duplicate: sending.duplicate.filter(|_| peer.has_copies()),
        ecn,
    }
}
