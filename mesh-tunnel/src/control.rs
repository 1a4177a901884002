//! Handshakes and timers: what costs a Diffie-Hellman computation or comes by the clock, on a thread
//! of its own.

use std::{
    sync::{
        Arc, PoisonError,
        atomic::Ordering::Relaxed,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use mesh_linux::{udp::Ecn, wake::StopSignal};
use mesh_wire::id::NodeId;
use mesh_wireguard::{
    gate::{Admission, Gate},
    message::{INITIATION_LEN, Kind, OVERHEAD},
    peer::{Received, Refused},
};

use crate::{
    inbound::{Arrival, Sender},
    outbound::Outbox,
    peer::Peer,
    stats::DropReason,
    transmit::{Leave, Way},
    tunnel::{Inner, TunnelEvent, since_1970},
};

/// How often timers are looked at: a fraction of the shortest of WireGuard's (5 s), and fine
/// enough for the 2 s that packets wait for a path.
const TICK: Duration = Duration::from_millis(200);

/// Handshake messages that wait: what the gate lets through in a second, and a little more. 64 KiB.
const QUEUE: usize = 256;

/// A handshake message and how it came.
#[derive(Debug)]
pub(crate) struct Handshake {
    bytes: [u8; INITIATION_LEN],
    len: usize,
    arrival: Arrival,
}

impl Handshake {
    /// `datagram` is no longer than an initiation.
    pub(crate) fn new(datagram: &[u8], arrival: Arrival) -> Self {
        let mut bytes = [0; INITIATION_LEN];
        for (to, from) in bytes.iter_mut().zip(datagram) {
            *to = *from;
        }
        Self {
            bytes,
            len: datagram.len().min(INITIATION_LEN),
            arrival,
        }
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

pub(crate) fn queue() -> (SyncSender<Handshake>, Receiver<Handshake>) {
    sync_channel(QUEUE)
}

/// Works until the signal is given.
pub(crate) fn run(tunnel: &Inner, stop: &StopSignal) {
    let handshakes = tunnel
        .waiting
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let mut control = Control {
        tunnel,
        gate: Gate::default(),
        out: Outbox::new(Leave::other()),
    };
    let mut next_tick = Instant::now();
    while !stop.wait(Duration::ZERO) {
        let now = Instant::now();
        if now >= next_tick {
            next_tick = now + TICK;
            control.tick(now);
        }
        match handshakes.recv_timeout(next_tick.saturating_duration_since(now)) {
            Ok(handshake) => {
                if let Err(reason) = control.handshake(&handshake) {
                    tunnel.drops.count(reason);
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

struct Control<'a> {
    tunnel: &'a Inner,
    gate: Gate,
    out: Outbox,
}

impl Control<'_> {
    fn handshake(&mut self, handshake: &Handshake) -> Result<(), DropReason> {
        let bytes = handshake.bytes();
        match Kind::of(bytes) {
            Some(Kind::Initiation) => {
                let answered = self.initiation(bytes, handshake.arrival);
                answered.inspect_err(|_| {
                    self.tunnel.handshakes_refused.fetch_add(1, Relaxed);
                })
            }
            Some(Kind::Response { receiver }) => self.response(bytes, receiver, handshake.arrival),
            Some(Kind::CookieReply { receiver }) => {
                let peer = self.tunnel.by_session(receiver)?;
                let mut state = peer.lock();
                let taken = state.protocol.receive_cookie(bytes, handshake.arrival.now);
                state.forget_initiation();
                taken.map_err(reason)
            }
            Some(Kind::Data { .. }) | None => Err(DropReason::NotWireGuard),
        }
    }

    fn admit(&mut self, bytes: &[u8], arrival: Arrival) -> Result<(), DropReason> {
        let tunnel = self.tunnel;
        let source = match arrival.sender {
            Sender::Address(address) => {
                let port = address.port().to_be_bytes();
                match address.ip() {
                    std::net::IpAddr::V4(ip) => [&ip.octets()[..], &port].concat(),
                    std::net::IpAddr::V6(ip) => [&ip.octets()[..], &port].concat(),
                }
            }
            Sender::Client(id) => id.0.to_vec(),
        };
        match self.gate.admit(&tunnel.key, bytes, &source, arrival.now) {
            Admission::Admitted => Ok(()),
            Admission::Cookie(reply) => {
                let to = match arrival.sender {
                    Sender::Address(_) => tunnel.node_id(),
                    Sender::Client(id) => id,
                };
                let leave = &mut self.out.leave;
                // Shorter than the question, so nobody can be flooded with our answers.
                tunnel.transmit(
                    &to,
                    arrival.way_back(),
                    &reply,
                    reply.len(),
                    Ecn::NotCapable,
                    leave,
                );
                Err(DropReason::UnderLoad)
            }
            Admission::TooMany => Err(DropReason::UnderLoad),
            Admission::Stranger => Err(DropReason::BadHandshake),
        }
    }

    fn initiation(&mut self, bytes: &[u8], arrival: Arrival) -> Result<(), DropReason> {
        let tunnel = self.tunnel;
        self.admit(bytes, arrival)?;
        let received = Received::read(&tunnel.key, bytes).ok_or(DropReason::BadHandshake)?;
        let id = NodeId(received.remote());
        let refused = |behind| {
            let via = arrival.via;
            tunnel.emit(TunnelEvent::Refused {
                peer: id,
                via,
                behind,
            });
        };
        let Some(peer) = tunnel.wake(&id) else {
            refused(None);
            return Err(DropReason::UnknownKey);
        };
        let mut state = peer.lock();
        let number = state.next_session();
        let answer = state.protocol.respond(received, number, arrival.now);
        let (response, _) = answer.map_err(|why| {
            if let (Refused::Older { behind }, false) = (why, peer.is_external) {
                refused(Some(behind));
            }
            reason(why)
        })?;
        if peer.is_external {
            state.primary = Some(arrival.way_back());
        }
        peer.publish(&state);
        drop(state);
        peer.counts.wire_received(bytes.len());
        peer.activity.received_other(arrival.now);
        let leave = &mut self.out.leave;
        tunnel.send_handshake(&peer, arrival.way_back(), &response, leave, arrival.now);
        Ok(())
    }

    fn response(
        &mut self,
        bytes: &[u8],
        receiver: u32,
        arrival: Arrival,
    ) -> Result<(), DropReason> {
        let tunnel = self.tunnel;
        let peer = tunnel.by_session(receiver)?;
        self.admit(bytes, arrival)?;
        let mut state = peer.lock();
        state.protocol.finish(bytes, arrival.now).map_err(reason)?;
        // The peer's first packet may be here before ours has left this thread.
        peer.publish(&state);
        drop(state);
        peer.counts.wire_received(bytes.len());
        peer.activity.received_other(arrival.now);
        tunnel.note_authentic(&peer, arrival);
        // First what proves the session to the peer, then what waited for it.
        self.keepalive(&peer, arrival.way_back(), arrival.now);
        let mut state = peer.lock();
        tunnel.begin_session(&peer, &mut state, &mut self.out, arrival.now);
        drop(state);
        tunnel.tell_session(&peer, arrival.via);
        Ok(())
    }

    fn keepalive(&mut self, peer: &Peer, way: Way, now: Instant) {
        let mut sealed = [0; OVERHEAD];
        let session = peer.lock().protocol.current().cloned();
        let made = session.is_some_and(|session| {
            session
                .reserve(1)
                .is_some_and(|counter| session.seal(counter, &mut sealed))
        });
        if made {
            let leave = &mut self.out.leave;
            self.tunnel.send_handshake(peer, way, &sealed, leave, now);
        }
    }

    /// What time demands of all peers that are awake.
    fn tick(&mut self, now: Instant) {
        self.tunnel.allow_errors();
        let peers: Vec<_> = self.tunnel.peers().awake().cloned().collect();
        for peer in peers {
            self.tick_peer(&peer, now);
        }
    }

    fn tick_peer(&mut self, peer: &Arc<Peer>, now: Instant) {
        let tunnel = self.tunnel;
        let mut state = peer.lock();
        let late = state.expire_held(peer.is_external, now, &tunnel.held_bytes);
        tunnel.drops.count_many(DropReason::HeldTooLong, late);
        let due = state.protocol.tick(&peer.activity, now);
        if due.sessions_changed || late > 0 {
            peer.publish(&state);
        }
        let way = state.primary;
        let initiation = match way {
            Some(_) if due.initiate => state.initiate(&tunnel.key, now, since_1970()),
            _ => None,
        };
        let asleep = due.idle && way.is_none() && !state.has_held() && !peer.is_external;
        drop(state);
        if asleep {
            tunnel.forget(&peer.id);
        }
        if let Some(way) = way {
            if let Some(initiation) = initiation {
                let leave = &mut self.out.leave;
                tunnel.send_handshake(peer, way, &initiation, leave, now);
            }
            if due.keepalive {
                self.keepalive(peer, way, now);
            }
        }
    }
}

fn reason(refused: Refused) -> DropReason {
    match refused {
        Refused::Replayed | Refused::Older { .. } => DropReason::Replayed,
        Refused::TooMany => DropReason::UnderLoad,
        Refused::Unasked => DropReason::Unasked,
        Refused::Forged => DropReason::BadHandshake,
    }
}
