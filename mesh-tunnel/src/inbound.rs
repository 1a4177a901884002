//! From a path to the TUN device.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    ops::Range,
    sync::Arc,
    time::Instant,
};

use mesh_linux::{
    tun::VnetHeader,
    udp::{Ecn, LocalEnd, Message},
};
use mesh_wire::{
    id::{NodeId, Via},
    peer::PeerMessage,
    relay::{self, Frame, Session as RelaySession, udp::looks_like_frame},
};
use mesh_wireguard::{
    message::{DATA_HEADER_LEN, Kind},
    session::{OpenError, Session},
};

use crate::{
    coalesce::Coalescer,
    control::Handshake,
    ecn,
    outbound::Outbox,
    peer::{Peer, State, peer_index},
    route,
    stats::DropReason,
    transmit::Way,
    tunnel::{Inner, TunnelEvent},
};

/// Largest datagram: what UDP can carry, and more than a relay frame.
const DATAGRAM_LEN_MAX: usize = 1 << 16;

/// What one thread keeps to receive.
#[derive(Debug)]
pub(crate) struct Inbox {
    /// By which queue packets reach the kernel.
    queue: usize,
    /// Whether the kernel takes UDP super-packets.
    udp_offload: bool,
    /// For packets that had to wait for a handshake.
    out: Outbox,
    /// Copies of datagrams that may not be opened where they lie, and whose they are.
    copies: Vec<u8>,
    copied: Vec<(NodeId, usize)>,
}

/// Bytes of copies that are opened at a time: as much as a large receive, and little enough to stay in a
/// processor's own cache.
const COPIED_BYTES: usize = 128 << 10;

impl Inbox {
    pub(crate) fn new(queue: usize, udp_offload: bool, out: Outbox) -> Self {
        Self {
            queue,
            udp_offload,
            out,
            copies: Vec::new(),
            copied: Vec::new(),
        }
    }

    /// Begins a batch. [`Inner::finish`] must end it.
    pub(crate) fn batch<'b>(&'b mut self) -> Arrivals<'b> {
        Arrivals::new(self.queue, self.udp_offload, &mut self.out)
    }
}

/// A batch that is being opened, each datagram where it lies.
#[derive(Debug)]
pub(crate) struct Arrivals<'b> {
    to_kernel: ToKernel<'b>,
    last: Option<LastSession>,
    out: &'b mut Outbox,
}

impl<'b> Arrivals<'b> {
    fn new(queue: usize, udp_offload: bool, out: &'b mut Outbox) -> Self {
        Self {
            to_kernel: ToKernel {
                queue,
                coalescer: Coalescer::new(udp_offload),
                sources: LastSource::default(),
            },
            last: None,
            out,
        }
    }
}

/// What stands between an opened packet and the kernel.
#[derive(Debug)]
struct ToKernel<'b> {
    queue: usize,
    coalescer: Coalescer<'b>,
    sources: LastSource,
}

/// The session and way of the last datagram, so that a batch of one session looks it up once and
/// notes it once.
#[derive(Debug)]
struct LastSession {
    number: u32,
    via: Via,
    peer: Arc<Peer>,
    session: Arc<Session>,
    /// Whether something authentic came, and was noted.
    noted: bool,
    packets: usize,
    bytes: usize,
    wire: usize,
}

/// The last source address that was found to be a peer's.
#[derive(Debug, Default)]
struct LastSource(Option<(IpAddr, NodeId)>);

impl LastSource {
    /// Whether the peer may send a packet with this source.
    fn allow(&mut self, tunnel: &Inner, source: IpAddr, peer: &NodeId) -> bool {
        if self.0 == Some((source, *peer)) {
            return true;
        }
        let allowed = tunnel.routes.load().allows(source, peer);
        if allowed {
            self.0 = Some((source, *peer));
        }
        allowed
    }
}

/// Who sent a datagram, as far as the way itself tells.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Sender {
    /// Whoever is at this address.
    Address(SocketAddr),
    /// This client of a relay.
    Client(NodeId),
}

/// How a datagram came.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival {
    pub(crate) via: Via,
    pub(crate) sender: Sender,
    /// This machine's end to which it came, if the kernel said.
    pub(crate) to: Option<LocalEnd>,
    /// By which socket of a burst; `None`: by the node's port, or a link.
    pub(crate) by: Option<u32>,
    /// What the outer IP header says of congestion.
    pub(crate) ecn: Ecn,
    pub(crate) now: Instant,
}

impl Arrival {
    /// How an answer goes back.
    pub(crate) fn way_back(&self) -> Way {
        let source = self.to;
        let via = self.via;
        Way { via, source }
    }
}

/// Marks STUN (RFC 8489 §5): bytes 4 to 8 of every message.
const STUN_COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];

impl Inner {
    /// Takes what one sender sent to the node's port, or to a socket of a burst.
    pub(crate) fn receive<'b>(
        &self,
        message: Message<'b>,
        by: Option<u32>,
        batch: &mut Arrivals<'b>,
        now: Instant,
    ) {
        let Message {
            from,
            to,
            bytes,
            segment_len,
            ecn,
        } = message;
        let table = self.relay_udp.load();
        let relay = table.at(&from);
        let arrival = Arrival {
            via: Via::Direct(from),
            sender: Sender::Address(from),
            to,
            by,
            ecn,
            now,
        };
        // An empty datagram is one too.
        let (first, rest) = bytes.split_at_mut(segment_len.min(bytes.len()));
        for datagram in std::iter::once(first).chain(rest.chunks_mut(segment_len)) {
            let result = match relay {
                Some((id, sessions)) if looks_like_frame(datagram) => {
                    let via = Via::Relay(*id);
                    let arrival = Arrival { via, ..arrival };
                    self.relay_frame(datagram, from, sessions, arrival, batch)
                }
                _ => self.inbound(datagram, arrival, batch),
            };
            if let Err(reason) = result {
                self.drops.count(reason);
            }
        }
    }

    /// Takes a frame that came from a relay's address.
    fn relay_frame<'b>(
        &self,
        frame: &'b mut [u8],
        from: SocketAddr,
        sessions: &HashMap<RelaySession, NodeId>,
        arrival: Arrival,
        batch: &mut Arrivals<'b>,
    ) -> Result<(), DropReason> {
        let Ok(Frame::Data { session, .. }) = Frame::decode(frame) else {
            self.emit(TunnelEvent::RelayFrame {
                from,
                datagram: frame.to_vec(),
            });
            return Ok(());
        };
        let peer = sessions.get(&session).ok_or(DropReason::UnknownSession)?;
        let arrival = Arrival {
            sender: Sender::Client(*peer),
            ..arrival
        };
        let payload = frame.get_mut(relay::HEADER_LEN..).unwrap_or_default();
        self.inbound(payload, arrival, batch)
    }

    /// Takes datagrams that may not be changed where they lie; whose they are, and how they came.
    pub(crate) fn receive_copies<D: AsRef<[u8]>>(
        &self,
        datagrams: impl IntoIterator<Item = (NodeId, D)>,
        arrival: impl Fn(NodeId) -> Arrival,
        inbox: &mut Inbox,
    ) {
        let mut datagrams = datagrams.into_iter();
        loop {
            inbox.copies.clear();
            while inbox.copies.len() < COPIED_BYTES
                && let Some((peer, datagram)) = datagrams.next()
            {
                let datagram = datagram.as_ref().iter().take(DATAGRAM_LEN_MAX);
                inbox.copied.push((peer, datagram.len()));
                inbox.copies.extend(datagram);
            }
            if inbox.copied.is_empty() {
                return;
            }
            let mut batch = Arrivals::new(inbox.queue, inbox.udp_offload, &mut inbox.out);
            let mut copies = inbox.copies.as_mut_slice();
            for (peer, len) in inbox.copied.drain(..) {
                let Some((datagram, rest)) = copies.split_at_mut_checked(len) else {
                    break;
                };
                copies = rest;
                if let Err(reason) = self.inbound(datagram, arrival(peer), &mut batch) {
                    self.drops.count(reason);
                }
            }
            self.finish(&mut batch);
        }
    }

    /// Writes what was kept back to join it with more, and notes what came.
    pub(crate) fn finish(&self, batch: &mut Arrivals<'_>) {
        let ToKernel {
            queue, coalescer, ..
        } = &mut batch.to_kernel;
        coalescer.flush(&mut |pieces| self.write_tun(*queue, pieces));
        note_last(batch.last.take());
    }

    fn inbound<'b>(
        &self,
        datagram: &'b mut [u8],
        arrival: Arrival,
        batch: &mut Arrivals<'b>,
    ) -> Result<(), DropReason> {
        match Kind::of(datagram) {
            Some(Kind::Data { receiver }) => self.open(receiver, datagram, arrival, batch),
            Some(Kind::Initiation | Kind::Response { .. } | Kind::CookieReply { .. }) => {
                let handshake = Handshake::new(datagram, arrival);
                let queued = self.handshakes.try_send(handshake);
                queued.map_err(|_| DropReason::UnderLoad)
            }
            None => self.stun(datagram, arrival.via),
        }
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

    /// The peer of a session.
    pub(crate) fn by_session(&self, session: u32) -> Result<Arc<Peer>, DropReason> {
        let peers = self.peers();
        let peer = peers.by_index(peer_index(session));
        peer.cloned().ok_or(DropReason::UnknownSession)
    }

    /// Looks up the session of a datagram, unless it was the last one's.
    fn look_up<'a>(
        &self,
        number: u32,
        via: Via,
        last: &'a mut Option<LastSession>,
    ) -> Result<&'a mut LastSession, DropReason> {
        let same = |last: &LastSession| last.number == number && last.via == via;
        if !last.as_ref().is_some_and(same) {
            note_last(last.take());
            let peer = self.by_session(number)?;
            let session = peer.session(number).ok_or(DropReason::UnknownSession)?;
            *last = Some(LastSession {
                number,
                via,
                peer,
                session,
                noted: false,
                packets: 0,
                bytes: 0,
                wire: 0,
            });
        }
        last.as_mut().ok_or(DropReason::UnknownSession)
    }

    fn open<'b>(
        &self,
        number: u32,
        datagram: &'b mut [u8],
        arrival: Arrival,
        batch: &mut Arrivals<'b>,
    ) -> Result<(), DropReason> {
        let Arrivals {
            to_kernel,
            last,
            out,
        } = batch;
        let last = self.look_up(number, arrival.via, last)?;
        let wire_len = datagram.len();
        let (counter, plain) = last.session.open(datagram, arrival.now).map_err(reason)?;
        last.session.window().accept(counter).map_err(reason)?;
        last.wire += wire_len;
        if !std::mem::replace(&mut last.noted, true) {
            self.note_authentic(&last.peer, arrival);
        }
        if !last.session.is_proven() {
            self.confirm(&last.peer, number, arrival, out);
        }
        if plain.is_empty() {
            last.peer.activity.received_other(arrival.now);
            return Ok(());
        }
        last.peer.activity.received_data(arrival.now);
        self.deliver(last, datagram, plain, arrival, to_kernel)
    }

    /// Hands on the packet that was opened to `plain`, whose padding is still there.
    fn deliver<'b>(
        &self,
        last: &mut LastSession,
        datagram: &'b mut [u8],
        plain: Range<usize>,
        arrival: Arrival,
        to_kernel: &mut ToKernel<'b>,
    ) -> Result<(), DropReason> {
        let peer = &last.peer;
        let padded = datagram.get(plain).unwrap_or_default();
        let len = route::packet_len(padded).ok_or(DropReason::MalformedIn)?;
        let end = DATA_HEADER_LEN + len;
        let packet = datagram
            .get_mut(DATA_HEADER_LEN..end)
            .ok_or(DropReason::MalformedIn)?;
        let source = route::source(packet).ok_or(DropReason::MalformedIn)?;
        if !to_kernel.sources.allow(self, source, &peer.id) {
            return Err(DropReason::WrongSource);
        }
        ecn::merge(arrival.ecn, packet).map_err(|ecn::MustDrop| DropReason::CongestionMarked)?;
        last.packets += 1;
        last.bytes += len;
        if !peer.is_external && self.is_control(packet) {
            self.emit(TunnelEvent::Control {
                peer: peer.id,
                via: arrival.via,
                packet: packet.to_vec(),
            });
            return Ok(());
        }
        // The offload header takes the place of the end of WireGuard's.
        let framed = datagram.get_mut(DATA_HEADER_LEN - VnetHeader::LEN..end);
        let ToKernel {
            queue, coalescer, ..
        } = to_kernel;
        coalescer.push(framed.unwrap_or_default(), &mut |pieces| {
            self.write_tun(*queue, pieces);
        });
        Ok(())
    }

    /// Notes that something authentic came.
    pub(crate) fn note_authentic(&self, peer: &Arc<Peer>, arrival: Arrival) {
        let mut state = peer.lock();
        state.note_received(arrival.via, arrival.now);
        let way = arrival.way_back();
        if peer.is_external && state.primary != Some(way) {
            state.primary = Some(way);
            peer.publish(&state);
        }
        drop(state);
        if let Some((number, from)) = arrival.spare() {
            self.bursts.adopt(number, from, arrival.now);
        }
        self.mark_for_report(peer);
    }

    /// The peer has proven the session that our answer offered.
    fn confirm(&self, peer: &Arc<Peer>, session: u32, arrival: Arrival, out: &mut Outbox) {
        let mut state = peer.lock();
        if state.protocol.confirm(session, arrival.now) {
            self.begin_session(peer, &mut state, out, arrival.now);
            drop(state);
            self.tell_session(peer, arrival.via);
        }
    }

    /// Both sides have proven a new session: what waited for it goes first.
    pub(crate) fn begin_session(
        &self,
        peer: &Arc<Peer>,
        state: &mut State,
        out: &mut Outbox,
        now: Instant,
    ) {
        state.note_session();
        self.send_held(peer, state, out, now);
    }

    pub(crate) fn tell_session(&self, peer: &Peer, via: Via) {
        if !peer.is_external {
            self.emit(TunnelEvent::Handshake { peer: peer.id, via });
        }
    }

    /// Whether a packet is from the peer's core, not from something behind the peer.
    fn is_control(&self, packet: &[u8]) -> bool {
        let from_overlay = packet.get(8..14).and_then(<[u8]>::first_chunk).copied();
        PeerMessage::is_control(packet, self.overlay_v6)
            && from_overlay.is_some_and(|prefix| self.is_overlay(prefix))
    }
}

/// Counts what came by the last session.
fn note_last(last: Option<LastSession>) {
    if let Some(last) = last {
        last.peer.counts.received(last.packets, last.bytes);
        last.peer.counts.wire_received(last.wire);
    }
}

fn reason(error: OpenError) -> DropReason {
    match error {
        OpenError::Unauthentic => DropReason::Unauthentic,
        OpenError::Replayed => DropReason::Replayed,
        OpenError::Expired => DropReason::UnknownSession,
    }
}

const _: () = assert!(DATA_HEADER_LEN >= VnetHeader::LEN);
