//! From a path to the TUN device.

use std::{net::IpAddr, sync::Arc, time::Instant};

use mesh_linux::tun::VnetHeader;
use mesh_wire::{
    id::{NodeId, Via},
    peer::PeerMessage,
};

use crate::{
    engine::{self, Admission, HANDSHAKE_LEN_MAX, Kind, Opened, SessionIndex},
    outbound::Outbox,
    peer::{Peer, State},
    route,
    stats::DropReason,
    tunnel::{Inner, TunnelEvent},
};

/// Largest datagram: what UDP can carry, and more than a relay frame.
const DATAGRAM_LEN_MAX: usize = 1 << 16;

/// What one thread needs to receive.
#[derive(Debug)]
pub(crate) struct Inbox {
    /// Room for an offload header and the packet that came out of a datagram.
    opened: Box<[u8]>,
    /// For packets that had to wait for this handshake.
    out: Outbox,
}

impl Inbox {
    pub(crate) fn new() -> Self {
        Self {
            opened: vec![0; VnetHeader::LEN + DATAGRAM_LEN_MAX].into(),
            out: Outbox::new(),
        }
    }
}

/// Marks STUN (RFC 8489 §5): bytes 4 to 8 of every message.
const STUN_COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];

impl Inner {
    /// Takes one datagram that came by `via`; `sender` is who sent it, as far as the way itself
    /// tells: an address, or what stands for a relay's client.
    pub(crate) fn inbound(
        &self,
        datagram: &[u8],
        via: Via,
        sender: IpAddr,
        inbox: &mut Inbox,
        now: Instant,
    ) {
        if let Err(reason) = self.try_inbound(datagram, via, sender, inbox, now) {
            self.drops.count(reason);
        }
    }

    fn try_inbound(
        &self,
        datagram: &[u8],
        via: Via,
        sender: IpAddr,
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
            Kind::CookieReply { receiver } | Kind::Data { receiver } => {
                self.by_session(receiver)?
            }
        };
        self.open(&peer, kind, datagram, via, inbox, now)
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

    fn admit(&self, datagram: &[u8], via: Via, sender: IpAddr) -> Result<(), DropReason> {
        match self.keys.admit(datagram, sender) {
            Admission::Admitted => Ok(()),
            Admission::Cookie(reply) => {
                // Not longer than the question, so nobody can be flooded with our answers.
                if let Via::Direct(_) = via {
                    self.transmit(&NodeId([0; 32]), via, &reply, reply.len());
                }
                Err(DropReason::UnderLoad)
            }
            Admission::Refused => Err(DropReason::BadHandshake),
        }
    }

    fn open(
        &self,
        peer: &Arc<Peer>,
        kind: Kind,
        datagram: &[u8],
        via: Via,
        inbox: &mut Inbox,
        now: Instant,
    ) -> Result<(), DropReason> {
        let Inbox { opened, out } = inbox;
        let (header, room) = opened
            .split_first_chunk_mut::<{ VnetHeader::LEN }>()
            .ok_or(DropReason::NotWireGuard)?;
        let mut state = peer.lock();
        match (state.engine.open(datagram, room), kind) {
            (Opened::Refused(reason), _) => Err(reason),
            (Opened::Answer(answer), Kind::Initiation) => {
                state.unconfirmed = SessionIndex::of_response(answer);
                drop(state);
                self.transmit(&peer.id, via, answer, answer.len());
                Ok(())
            }
            (Opened::Answer(answer), _) => {
                self.note_authentic(peer, &mut state, via, now);
                state.note_session();
                // First the keepalive that proves the session to the peer, then what waited.
                self.transmit(&peer.id, via, answer, answer.len());
                self.send_held(peer, &mut state, out);
                drop(state);
                self.emit_handshake(peer, via);
                Ok(())
            }
            (Opened::Nothing, Kind::Data { receiver }) => {
                let confirmed = self.note_data(peer, &mut state, receiver, via, now, out);
                drop(state);
                if confirmed {
                    self.emit_handshake(peer, via);
                }
                Ok(())
            }
            (Opened::Nothing, _) => Ok(()),
            (Opened::Packet(packet), _) => {
                let len = packet.len();
                let confirmed = match kind {
                    Kind::Data { receiver } => {
                        self.note_data(peer, &mut state, receiver, via, now, out)
                    }
                    _ => false,
                };
                let allowed = self.is_source_of(packet, peer);
                if allowed {
                    state.traffic.received_packets += 1;
                    state.traffic.received_bytes += len as u64;
                }
                drop(state);
                if confirmed {
                    self.emit_handshake(peer, via);
                }
                if !allowed {
                    return Err(DropReason::WrongSource);
                }
                if !peer.external && self.is_control(packet) {
                    self.emit(TunnelEvent::Control {
                        peer: peer.id,
                        via,
                        packet: packet.to_vec(),
                    });
                    return Ok(());
                }
                *header = VnetHeader::default().to_bytes();
                let whole = opened
                    .get(..VnetHeader::LEN + len)
                    .ok_or(DropReason::MalformedIn)?;
                self.write_tun(whole)
            }
        }
    }

    /// Notes an authentic data message. Whether it proves a session that we only offered so far.
    fn note_data(
        &self,
        peer: &Arc<Peer>,
        state: &mut State,
        session: SessionIndex,
        via: Via,
        now: Instant,
        out: &mut Outbox,
    ) -> bool {
        self.note_authentic(peer, state, via, now);
        if state.unconfirmed != Some(session) {
            return false;
        }
        state.note_session();
        self.send_held(peer, state, out);
        true
    }

    fn note_authentic(&self, peer: &Arc<Peer>, state: &mut State, via: Via, now: Instant) {
        state.note_received(via, now);
        if peer.external {
            state.primary = Some(via);
        }
        self.mark_for_report(peer);
    }

    fn is_source_of(&self, packet: &[u8], peer: &Peer) -> bool {
        let routes = self.routes.load();
        route::source(packet).and_then(|ip| routes.get(ip)) == Some(&peer.id)
    }

    /// Whether a packet is from the peer's core, not from something behind the peer.
    fn is_control(&self, packet: &[u8]) -> bool {
        let from_overlay = packet.get(8..14).and_then(<[u8]>::first_chunk).copied();
        PeerMessage::is_control(packet, self.overlay_v6)
            && from_overlay.is_some_and(|prefix| self.is_overlay(prefix))
    }

    fn emit_handshake(&self, peer: &Peer, via: Via) {
        if !peer.external {
            self.emit(TunnelEvent::Handshake { peer: peer.id, via });
        }
    }

    /// One datagram that a relay says came from `peer`.
    pub(crate) fn inbound_relayed(&self, peer: &NodeId, datagram: &[u8], via: Via) {
        let mut inbox = self.inboxes.take();
        let sender = engine::relayed_source(peer);
        self.inbound(datagram, via, sender, &mut inbox, Instant::now());
        self.inboxes.give_back(inbox);
    }
}

const _: () = assert!(DATAGRAM_LEN_MAX >= HANDSHAKE_LEN_MAX);
