//! The shell of one node: it feeds the core its inputs, does what the core puts out, and keeps
//! the WireGuard sessions, the held packets and the streams of pings.

use std::{collections::BTreeSet, hash::Hash, net::SocketAddr, sync::Arc, time::Duration};

use mesh_core::{
    io::{Event, Input, Output, Refusal, RelayTransport, SOCKETS_TRIED, TRAFFIC_TICK_MS},
    node::Core,
};
use mesh_wire::{
    id::{NodeId, Via},
    peer::PeerMessage,
};

use super::{
    Change, Chosen, EXTRA_PORT, World,
    queue::{Happening, instant, micros},
};
use crate::session::{Body, Packet, message_input};

/// Packets held for a peer without a path (`paths.md`).
const HELD_MAX: usize = 64;
/// The time when the world began, by a right clock.
const CLOCK_US: u64 = 1_700_000_000_000_000;
/// Timeouts of one node at one instant; more would be a core that spins.
const WAKES_AT_ONCE_MAX: u32 = 200;

impl World {
    pub(super) fn input(&mut self, index: usize, input: Input) {
        let now = instant(self.now - self.nodes[index].lag_us);
        let node = &mut self.nodes[index];
        let Some(core) = &mut node.core else {
            return;
        };
        if node.frozen {
            if !matches!(input, Input::Timeout) {
                node.unheard.push(input);
            }
            return;
        }
        if let Input::Snapshot(snapshot) = &input {
            // Whoever is not in it any more is cut off at once.
            node.snapshot = Some(Arc::clone(snapshot));
            if !node.sessions.is_empty() {
                let known: BTreeSet<NodeId> = snapshot.nodes.values().map(|node| node.id).collect();
                node.sessions.retain(|peer, _| known.contains(peer));
            }
        }
        core.handle_input(input, now);
        while let Some(output) = self.nodes[index].core.as_mut().and_then(Core::poll_output) {
            self.perform(index, output);
        }
        let node = &mut self.nodes[index];
        let Some(at) = node.core.as_ref().and_then(Core::poll_timeout).map(micros) else {
            return;
        };
        let at = at + node.lag_us;
        node.wakes = if at <= self.now { node.wakes + 1 } else { 0 };
        assert!(node.wakes < WAKES_AT_ONCE_MAX, "{} spins", node.name);
        let at = at.max(self.now);
        if node.wake_at.is_none_or(|known| at < known) {
            node.wake_at = Some(at);
            self.push(at, Happening::Wake { node: index });
        }
    }

    fn perform(&mut self, index: usize, output: Output) {
        let now_ms = self.now_ms();
        match output {
            Output::Handshake { peer, vias } => {
                let clock = CLOCK_US + self.now - self.nodes[index].clock_behind_us;
                let session = self.nodes[index].sessions.entry(peer).or_default();
                let packet = session.initiate(clock, peer);
                for via in vias {
                    self.send(index, peer, via, packet.clone());
                }
            }
            Output::Send { peer, via, message } => {
                self.seal(index, peer, via, Body::Control(message));
            }
            Output::SetPath {
                peer,
                primary,
                duplicate,
                duplicates_max,
            } => {
                (now_ms, index, format!("{primary:?} {duplicate:?}")).hash(&mut self.trace);
                let chosen = Chosen {
                    primary,
                    duplicate,
                    duplicates_left: duplicates_max,
                };
                let node = &mut self.nodes[index];
                let before = node.paths.insert(peer, chosen);
                if before.is_none_or(|before| before.primary != primary) {
                    node.moves.push((now_ms, peer, primary));
                }
                self.flush(index, peer);
            }
            Output::ConnectRelay { relay, transport } => {
                let relay = self.relay_index(relay);
                let rtt = 2 * self.line_us(index, relay);
                let delay = match transport {
                    RelayTransport::Quic => rtt * 3 / 2,
                    RelayTransport::Tls => rtt * 3,
                };
                self.attempts.insert((index, relay, transport));
                let boot = self.nodes[index].boot;
                let connect = Happening::Connect {
                    node: index,
                    boot,
                    relay,
                    transport,
                };
                self.push(self.now + delay, connect);
            }
            Output::DisconnectRelay { relay, transport } => {
                let relay = self.relay_index(relay);
                self.attempts.remove(&(index, relay, transport));
                self.drop_leg(relay, index, transport);
            }
            Output::UseRelayTransport { relay, transport } => {
                let relay = self.relay_index(relay);
                self.relays[relay].using.insert(index, transport);
            }
            Output::FindPeer { relay, peer } => self.find(index, relay, peer),
            Output::AskReflexive { relay, target } => {
                self.count(index, 28 + 20);
                self.ask_reflexive(index, relay, target);
            }
            Output::OpenSockets {
                peer,
                target,
                count,
                message,
            } => self.open_sockets(index, (peer, target), count, &message),
            Output::UseUplink { uplink } => self.use_uplink(index, uplink),
            Output::ProbeUplink { uplink, target } => self.probe_uplink(index, uplink, target),
            Output::Event(event) => {
                (now_ms, index, format!("{event:?}")).hash(&mut self.trace);
                if let Event::Remember { peer, addresses } = &event {
                    self.nodes[index]
                        .remembered
                        .insert(*peer, addresses.clone());
                }
                self.nodes[index].events.push((now_ms, event));
            }
        }
    }

    fn open_sockets(
        &mut self,
        index: usize,
        (peer, target): (NodeId, SocketAddr),
        count: u16,
        message: &PeerMessage,
    ) {
        let (site, host) = (self.nodes[index].site, self.nodes[index].host);
        for port in EXTRA_PORT..EXTRA_PORT + count {
            self.hosts
                .insert((site, SocketAddr::new(host.ip(), port)), index);
            self.nodes[index].adopted.insert(target, port);
            let body = Body::Control(message.clone());
            self.seal(index, peer, Via::Direct(target), body);
        }
        self.nodes[index].adopted.remove(&target);
        let at = self.now_ms() + u64::try_from(SOCKETS_TRIED.as_millis()).unwrap();
        self.at(at, Change::CloseSockets(index));
    }

    pub(super) fn count(&mut self, index: usize, bytes: u64) {
        let node = &mut self.nodes[index];
        node.packets_out += 1;
        node.bytes_out += bytes;
    }

    fn seal(&mut self, index: usize, peer: NodeId, via: Via, body: Body) {
        let session = self.nodes[index].sessions.entry(peer).or_default();
        if let Some(packet) = session.seal(body) {
            self.send(index, peer, via, packet);
        }
    }

    /// A packet of an application.
    fn send_data(&mut self, index: usize, peer: NodeId, body: Body) {
        let node = &mut self.nodes[index];
        if node.core.is_none() || node.frozen {
            return;
        }
        let held = node.held.entry(peer).or_default();
        if held.len() == HELD_MAX {
            held.pop_front();
        }
        held.push_back(body);
        self.flush(index, peer);
        let node = &self.nodes[index];
        let chosen = node.paths.get(&peer);
        let has_path = chosen.is_some_and(|chosen| chosen.primary.is_some());
        if !has_path {
            self.input(index, Input::Wanted { peer });
        }
    }

    fn flush(&mut self, index: usize, peer: NodeId) {
        let node = &mut self.nodes[index];
        let ready = node
            .sessions
            .get(&peer)
            .is_some_and(|session| session.current.is_some());
        let chosen = node.paths.get(&peer).copied().unwrap_or_default();
        let Some(primary) = chosen.primary else {
            return;
        };
        let Some(held) = node
            .held
            .get_mut(&peer)
            .filter(|held| ready && !held.is_empty())
        else {
            return;
        };
        let bodies: Vec<Body> = held.drain(..).collect();
        self.note(index, peer, true, None);
        for body in bodies {
            let session = self.nodes[index].sessions.entry(peer).or_default();
            let Some(packet) = session.seal(body) else {
                return;
            };
            let chosen = self.nodes[index].paths.entry(peer).or_default();
            let more = chosen.duplicates_left != Some(0);
            let duplicate = chosen.duplicate.filter(|_| more);
            if let Some(left) = &mut chosen.duplicates_left {
                *left = left.saturating_sub(1);
            }
            for via in duplicate.into_iter().chain([primary]) {
                self.send(index, peer, via, packet.clone());
            }
        }
    }

    fn note(&mut self, index: usize, peer: NodeId, sent: bool, received: Option<Via>) {
        let tick = TRAFFIC_TICK_MS * 1000;
        let node = &mut self.nodes[index];
        if node.traffic.is_empty() {
            let at = (self.now / tick + 1) * tick;
            self.push(at, Happening::Tick { node: index });
        }
        let seen = self.nodes[index].traffic.entry(peer).or_default();
        seen.0 |= sent;
        seen.1.extend(received);
    }

    pub(super) fn tick(&mut self, index: usize) {
        if self.nodes[index].frozen {
            let tick = TRAFFIC_TICK_MS * 1000;
            return self.push(self.now + tick, Happening::Tick { node: index });
        }
        for (peer, (sent, received)) in std::mem::take(&mut self.nodes[index].traffic) {
            let received = received.into_iter().collect();
            self.input(
                index,
                Input::Traffic {
                    peer,
                    sent,
                    received,
                },
            );
        }
    }

    pub(super) fn ping(&mut self, flow: usize) {
        let now_ms = self.now_ms();
        let stream = &mut self.flows[flow];
        if !stream.running || stream.until_answered && !stream.answered.is_empty() {
            return;
        }
        let id = stream.next_id;
        stream.next_id += 1;
        stream.sent.insert(id, now_ms);
        let (from, to, at) = (stream.from, stream.to, self.now + stream.every_us);
        let peer = self.nodes[to].id;
        let bytes = self.flows[flow].bytes;
        self.send_data(from, peer, Body::Ping { flow, id, bytes });
        self.push(at, Happening::Ping { flow });
    }

    /// Whether a node's packet path takes anything from another.
    fn knows(&self, index: usize, other: usize) -> bool {
        let Some(snapshot) = &self.nodes[index].snapshot else {
            return false;
        };
        let everybody = self.everybody.as_ref();
        everybody.is_some_and(|all| Arc::ptr_eq(all, snapshot)) || {
            let other = &self.nodes[other];
            let known = snapshot.nodes.get(&other.name);
            known.is_some_and(|known| known.id == other.id)
        }
    }

    pub(super) fn deliver(&mut self, index: usize, from: usize, via: Via, packet: Packet) {
        let peer = self.nodes[from].id;
        let node = &mut self.nodes[index];
        if node.core.is_none() || node.frozen {
            return;
        }
        let own = node.id;
        if !self.knows(index, from) {
            if matches!(packet, Packet::Initiation { to, .. } if to == own) {
                let why = Refusal::UnknownKey;
                self.input(index, Input::Refused { peer, via, why });
            }
            return;
        }
        let node = &mut self.nodes[index];
        let session = node.sessions.entry(peer).or_default();
        match packet {
            // It was sent to an address that another node has now.
            Packet::Initiation { to, .. } if to != own => {}
            Packet::Initiation { number, .. } => match session.respond((from, own, number)) {
                Ok(response) => self.send(index, peer, via, response),
                Err(0) => {} // A copy.
                Err(_) if !self.call_back => {}
                Err(behind_us) => {
                    let behind = Duration::from_micros(behind_us);
                    let why = Refusal::OldTimestamp { behind };
                    self.input(index, Input::Refused { peer, via, why });
                }
            },
            Packet::Response { key } => {
                if session.complete(index, peer, key) {
                    self.seal(index, peer, via, Body::Keepalive);
                    self.input(index, Input::Handshake { peer, via });
                    self.flush(index, peer);
                }
            }
            Packet::Sealed { key, counter, body } => {
                if let Some(first) = session.open(key, counter) {
                    if first {
                        self.input(index, Input::Handshake { peer, via });
                    }
                    self.note(index, peer, false, Some(via));
                    self.open(index, peer, via, body);
                    self.flush(index, peer);
                }
            }
        }
    }

    fn open(&mut self, index: usize, peer: NodeId, via: Via, body: Body) {
        match body {
            Body::Keepalive => {}
            Body::Control(message) => self.input(index, message_input(peer, via, message)),
            Body::Ping { flow, id, bytes } => {
                let stream = &mut self.flows[flow];
                assert!(
                    stream.to == index && id < stream.next_id,
                    "nobody sent that"
                );
                stream.twice += u64::from(!stream.delivered.insert(id));
                self.send_data(index, peer, Body::Pong { flow, id, bytes });
            }
            Body::Pong { flow, id, .. } => {
                let now_ms = self.now_ms();
                let stream = &mut self.flows[flow];
                assert_eq!(stream.from, index, "that is for somebody else");
                stream.twice += u64::from(stream.answered.insert(id, now_ms).is_some());
            }
        }
    }
}
