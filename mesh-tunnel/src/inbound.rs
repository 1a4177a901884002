//! From a path to the TUN device.

use std::{
    net::IpAddr,
    sync::{Arc, MutexGuard},
    time::Instant,
};

use mesh_linux::tun::VnetHeader;
use mesh_wire::{
    id::{NodeId, Via},
    peer::PeerMessage,
};

use crate::{
    coalesce::Coalescer,
    engine::{self, Admission, HANDSHAKE_LEN_MAX, Kind, Opened, SessionIndex},
    outbound::Outbox,
    peer::{Peer, State},
    route,
    stats::DropReason,
    tunnel::{Inner, TunnelEvent},
};

/// Largest datagram: what UDP can carry, and more than a relay frame.
const DATAGRAM_LEN_MAX: usize = 1 << 16;

/// What one thread needs to receive. [`Inner::finish`] must follow the last datagram of a batch.
#[derive(Debug)]
pub(crate) struct Inbox {
    /// Room for an offload header and the packet that came out of a datagram.
    opened: Box<[u8]>,
    coalescer: Coalescer,
    sessions: LastSession,
    sources: LastSource,
    /// For packets that had to wait for a handshake.
    out: Outbox,
}

impl Inbox {
    pub(crate) fn new(udp_offload: bool) -> Self {
        Self {
            opened: vec![0; VnetHeader::LEN + DATAGRAM_LEN_MAX].into(),
            coalescer: Coalescer::new(udp_offload),
            sessions: LastSession::default(),
            sources: LastSource::default(),
            out: Outbox::new(),
        }
    }
}

/// The session of the last datagram, so that a batch of one session looks it up once. Forgotten
/// after each batch, so that a peer which is cut off stays no longer than that.
#[derive(Debug, Default)]
struct LastSession(Option<(SessionIndex, Arc<Peer>)>);

impl LastSession {
    fn get(&mut self, tunnel: &Inner, session: SessionIndex) -> Result<Arc<Peer>, DropReason> {
        if let Some((last, peer)) = &self.0
            && *last == session
        {
            return Ok(Arc::clone(peer));
        }
        let peer = tunnel.by_session(session)?;
        self.0 = Some((session, Arc::clone(&peer)));
        Ok(peer)
    }
}

/// The last source address that was found to be a peer's, likewise for one batch.
#[derive(Debug, Default)]
struct LastSource(Option<(IpAddr, NodeId)>);

impl LastSource {
    /// Whether the peer may send a packet with this source.
    fn allow(&mut self, tunnel: &Inner, packet: &[u8], peer: &Peer) -> bool {
        let Some(source) = route::source(packet) else {
            return false;
        };
        if self.0 == Some((source, peer.id)) {
            return true;
        }
        let allowed = tunnel.routes.load().get(source) == Some(&peer.id);
        if allowed {
            self.0 = Some((source, peer.id));
        }
        allowed
    }
}

/// Who sent a datagram, as far as the way itself tells.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Sender {
    /// Whoever is at this address.
    Address(IpAddr),
    /// This client of a relay.
    Client(NodeId),
}

/// A datagram's peer, way and time.
struct Arrival<'a> {
    peer: &'a Arc<Peer>,
    via: Via,
    now: Instant,
}

/// Marks STUN (RFC 8489 §5): bytes 4 to 8 of every message.
const STUN_COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];

impl Inner {
    /// Takes one datagram that came by `via`.
    pub(crate) fn inbound(
        &self,
        datagram: &[u8],
        via: Via,
        sender: Sender,
        inbox: &mut Inbox,
        now: Instant,
    ) {
        if let Err(reason) = self.try_inbound(datagram, via, sender, inbox, now) {
            self.drops.count(reason);
        }
    }

    /// Writes what [`Self::inbound`] kept back to join it with more.
    pub(crate) fn finish(&self, inbox: &mut Inbox) {
        inbox.coalescer.flush(&mut |framed| self.write_tun(framed));
        inbox.sessions = LastSession::default();
        inbox.sources = LastSource::default();
    }

    fn try_inbound(
        &self,
        datagram: &[u8],
        via: Via,
        sender: Sender,
        inbox: &mut Inbox,
        now: Instant,
    ) -> Result<(), DropReason> {
        let Some(kind) = Kind::of(datagram) else {
            return self.stun(datagram, via);
        };
        let peer = match kind {
            Kind::Initiation => {
                self.admit(datagram, via, sender)?;
                let id = self
                    .keys
                    .initiator(datagram)
                    .ok_or(DropReason::BadHandshake)?;
                self.wake(&id).ok_or(DropReason::UnknownKey)?
            }
            Kind::Response { receiver } => {
                let peer = self.by_session(receiver)?;
                self.admit(datagram, via, sender)?;
                peer
            }
            Kind::CookieReply { receiver } => self.by_session(receiver)?,
            Kind::Data { receiver } => inbox.sessions.get(self, receiver)?,
        };
        let arrival = Arrival {
            peer: &peer,
            via,
            now,
        };
        self.open(&arrival, kind, datagram, inbox)
    }

    fn stun(&self, datagram: &[u8], via: Via) -> Result<(), DropReason> {
        match via {
            Via::Direct(from) if datagram.get(4..8) == Some(&STUN_COOKIE) => {
                self.emit(TunnelEvent::Stun {
                    from,
                    datagram: datagram.to_vec(),
                });
                Ok(())
            }
            Via::Direct(_) | Via::Relay(_) => Err(DropReason::NotWireGuard),
        }
    }

    fn by_session(&self, session: SessionIndex) -> Result<Arc<Peer>, DropReason> {
        let peers = self.peers();
        let peer = peers.by_index(session.peer());
        peer.cloned().ok_or(DropReason::UnknownSession)
    }

    fn admit(&self, datagram: &[u8], via: Via, sender: Sender) -> Result<(), DropReason> {
        let (source, to) = match sender {
            Sender::Address(ip) => (ip, self.keys.id()),
            Sender::Client(id) => (engine::relayed_source(&id), id),
        };
        match self.keys.admit(datagram, source) {
            Admission::Admitted => Ok(()),
            Admission::Cookie(reply) => {
                // Shorter than the question, so nobody can be flooded with our answers.
                self.transmit(&to, via, &reply, reply.len());
                Err(DropReason::UnderLoad)
            }
            Admission::Refused => Err(DropReason::BadHandshake),
        }
    }

    fn open(
        &self,
        arrival: &Arrival<'_>,
        kind: Kind,
        datagram: &[u8],
        inbox: &mut Inbox,
    ) -> Result<(), DropReason> {
        let room = inbox.opened.get_mut(VnetHeader::LEN..).unwrap_or_default();
        let mut state = arrival.peer.lock();
        match (state.engine.open(datagram, room), kind) {
            (Opened::Refused(reason), _) => Err(reason),
            (Opened::Answer(response), Kind::Initiation) => {
                state.unconfirmed = SessionIndex::of_response(response);
                drop(state);
                self.transmit(&arrival.peer.id, arrival.via, response, response.len());
                Ok(())
            }
            (Opened::Answer(keepalive), _) => {
                self.note_authentic(arrival, &mut state);
                // First what proves the session to the peer, then what waited for it.
                self.transmit(&arrival.peer.id, arrival.via, keepalive, keepalive.len());
                self.begin_session(arrival, state, &mut inbox.out);
                Ok(())
            }
            (Opened::Nothing, Kind::Data { receiver }) => {
                self.note_data(arrival, state, receiver, &mut inbox.out);
                Ok(())
            }
            (Opened::Packet(packet), Kind::Data { receiver }) => {
                let len = packet.len();
                let allowed = inbox.sources.allow(self, packet, arrival.peer);
                if allowed {
                    state.traffic.received_packets += 1;
                    state.traffic.received_bytes += len as u64;
                }
                self.note_data(arrival, state, receiver, &mut inbox.out);
                if !allowed {
                    return Err(DropReason::WrongSource);
                }
                self.deliver(arrival, len, inbox);
                Ok(())
            }
            // A cookie for our next initiation.
            (Opened::Nothing | Opened::Packet(_), _) => Ok(()),
        }
    }

    /// Hands on the packet of `len` bytes that was opened.
    fn deliver(&self, arrival: &Arrival<'_>, len: usize, inbox: &mut Inbox) {
        let framed = inbox
            .opened
            .get_mut(..VnetHeader::LEN + len)
            .unwrap_or_default();
        let packet = framed.get(VnetHeader::LEN..).unwrap_or_default();
        if !arrival.peer.is_external() && self.is_control(packet) {
            self.emit(TunnelEvent::Control {
                peer: arrival.peer.id,
                via: arrival.via,
                packet: packet.to_vec(),
            });
            return;
        }
        inbox
            .coalescer
            .push(framed, &mut |framed| self.write_tun(framed));
    }

    /// Notes an authentic data message, which may prove a session that we only offered so far.
    fn note_data(
        &self,
        arrival: &Arrival<'_>,
        mut state: MutexGuard<'_, State>,
        session: SessionIndex,
        out: &mut Outbox,
    ) {
        self.note_authentic(arrival, &mut state);
        if state.unconfirmed == Some(session) {
            self.begin_session(arrival, state, out);
        }
    }

    fn note_authentic(&self, arrival: &Arrival<'_>, state: &mut State) {
        state.note_received(arrival.via, arrival.now);
        if arrival.peer.is_external() {
            state.primary = Some(arrival.via);
        }
        self.mark_for_report(arrival.peer);
    }

    /// Both sides have proven a new session.
    fn begin_session(
        &self,
        arrival: &Arrival<'_>,
        mut state: MutexGuard<'_, State>,
        out: &mut Outbox,
    ) {
        state.note_session();
        self.send_held(arrival.peer, &mut state, out);
        drop(state);
        if !arrival.peer.is_external() {
            self.emit(TunnelEvent::Handshake {
                peer: arrival.peer.id,
                via: arrival.via,
            });
        }
    }

    /// Whether a packet is from the peer's core, not from something behind the peer.
    fn is_control(&self, packet: &[u8]) -> bool {
        let from_overlay = packet.get(8..14).and_then(<[u8]>::first_chunk).copied();
        PeerMessage::is_control(packet, self.overlay_v6)
            && from_overlay.is_some_and(|prefix| self.is_overlay(prefix))
    }
}

const _: () = assert!(DATAGRAM_LEN_MAX >= HANDSHAKE_LEN_MAX);
