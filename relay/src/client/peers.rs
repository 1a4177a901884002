//! What a link knows of the peers behind its relay, and the packets that wait for that knowledge.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use bytes::Bytes;
use mesh_wire::{id::NodeId, relay::Session};

/// Peers that a link remembers: as many as the relay gives it sessions and interests, together.
const PEERS_MAX: usize = 2048;

/// Packets that wait for the relay to say whether the peer is there: a handshake and its first
/// answers, of some peers at once; 64 × 1.5 KiB. More are refused.
const HELD_PACKETS_MAX: usize = 64;

/// After that a held packet is worth nothing (`paths.md`, wake).
const HELD_AGE_MAX: Duration = Duration::from_secs(2);

/// Frames that overtook the message that says whose session it is. The oldest goes first.
const EARLY_FRAMES_MAX: usize = 64;

/// The relay says by itself when an absent peer comes, unless it was full when we asked.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
pub(super) struct Peers {
    nodes: HashMap<NodeId, Peer>,
    sessions: HashMap<Session, NodeId>,
    held: VecDeque<Held>,
    early: VecDeque<(Session, Bytes)>,
}

#[derive(Debug, Clone, Copy)]
enum Peer {
    /// Asked for, not answered yet.
    Asked {
        at: Instant,
    },
    /// Not connected to the relay, as of the last time that it said so or was asked.
    Absent {
        at: Instant,
    },
    Present(Session),
}

#[derive(Debug)]
struct Held {
    peer: NodeId,
    at: Instant,
    datagram: Vec<u8>,
}

/// What to do with a packet for a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Send it now: the session just came.
    Send(Session),
    /// It is held.
    Wait,
    /// It is held; ask for the peer.
    AskAndWait,
    /// The peer is absent, but ask again.
    AskAnyway,
    /// The peer is absent.
    Absent,
    /// There is no room.
    Full,
}

/// What waited for a peer.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Released {
    pub(super) to_send: Vec<Vec<u8>>,
    pub(super) received: Vec<Bytes>,
}

impl Peers {
    pub(super) fn session(&self, peer: &NodeId) -> Option<Session> {
        match self.nodes.get(peer) {
            Some(Peer::Present(session)) => Some(*session),
            Some(Peer::Asked { .. } | Peer::Absent { .. }) | None => None,
        }
    }

    /// All peers that are there.
    pub(super) fn sessions(&self) -> HashMap<NodeId, Session> {
        let sessions = self.sessions.iter();
        sessions.map(|(&session, &node)| (node, session)).collect()
    }

    pub(super) fn node(&self, session: Session) -> Option<NodeId> {
        self.sessions.get(&session).copied()
    }

    /// A packet for a peer that had no session a moment ago.
    pub(super) fn send_later(&mut self, peer: NodeId, datagram: &[u8], now: Instant) -> Next {
        let since = |at: Instant| now.saturating_duration_since(at);
        let known = self.nodes.get(&peer).copied();
        match known {
            Some(Peer::Present(session)) => return Next::Send(session),
            Some(Peer::Absent { at }) if since(at) < ASK_AGAIN_AFTER => return Next::Absent,
            Some(Peer::Absent { .. }) => {
                self.nodes.insert(peer, Peer::Absent { at: now });
                return Next::AskAnyway;
            }
            None if self.nodes.len() >= PEERS_MAX => return Next::Full,
            None | Some(Peer::Asked { .. }) => {}
        }
        self.held.retain(|held| since(held.at) < HELD_AGE_MAX);
        if self.held.len() >= HELD_PACKETS_MAX {
            return Next::Full;
        }
        let datagram = datagram.to_vec();
        self.held.push_back(Held {
            peer,
            at: now,
            datagram,
        });
        match known {
            Some(Peer::Asked { at }) if since(at) < ASK_AGAIN_AFTER => Next::Wait,
            _ => {
                self.nodes.insert(peer, Peer::Asked { at: now });
                Next::AskAndWait
            }
        }
    }

    /// A frame of a session that is not known, perhaps not yet.
    pub(super) fn receive_later(&mut self, session: Session, frame: &Bytes) {
        if self.early.len() >= EARLY_FRAMES_MAX {
            self.early.pop_front();
        }
        self.early.push_back((session, frame.clone()));
    }

    /// The relay said where a peer is. Returns what waited for that.
    pub(super) fn set(&mut self, node: NodeId, session: Option<Session>, now: Instant) -> Released {
        if let Some(Peer::Present(old)) = self.nodes.remove(&node) {
            self.sessions.remove(&old);
        }
        let mut released = Released::default();
        let held = std::mem::take(&mut self.held);
        let (for_node, others) = held.into_iter().partition(|held| held.peer == node);
        self.held = others;
        let Some(session) = session else {
            if self.nodes.len() < PEERS_MAX {
                self.nodes.insert(node, Peer::Absent { at: now });
            }
            return released; // Its packets go nowhere.
        };
        self.make_room();
        self.nodes.insert(node, Peer::Present(session));
        self.sessions.insert(session, node);
        let for_node: VecDeque<Held> = for_node;
        let fresh = |held: &Held| now.saturating_duration_since(held.at) < HELD_AGE_MAX;
        released.to_send = for_node
            .into_iter()
            .filter(fresh)
            .map(|held| held.datagram)
            .collect();
        let early = std::mem::take(&mut self.early);
        let (received, others): (VecDeque<_>, _) =
            early.into_iter().partition(|(of, _)| *of == session);
        self.early = others;
        released.received = received.into_iter().map(|(_, frame)| frame).collect();
        released
    }

    /// The relay does not know a session. Returns whose it was.
    pub(super) fn forget(&mut self, session: Session) -> Option<NodeId> {
        let node = self.sessions.remove(&session)?;
        self.nodes.remove(&node);
        Some(node)
    }

    /// Sessions are bounded by the relay; what is only remembered as absent makes way for them.
    fn make_room(&mut self) {
        if self.nodes.len() >= PEERS_MAX {
            self.nodes
                .retain(|_, peer| matches!(peer, Peer::Present(_)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: NodeId = NodeId([1; 32]);
    const B: NodeId = NodeId([2; 32]);
    const S: Session = Session {
        number: 1,
        epoch: 1,
    };

    fn start() -> Instant {
        Instant::now()
    }

    #[test]
    fn packets_wait_for_the_answer_and_go_then_in_order() {
        let (mut peers, now) = (Peers::default(), start());
        assert_eq!(peers.send_later(A, &[1], now), Next::AskAndWait);
        assert_eq!(peers.send_later(A, &[2], now), Next::Wait);
        assert_eq!(peers.send_later(B, &[3], now), Next::AskAndWait);
        let released = peers.set(A, Some(S), now);
        assert_eq!(released.to_send, [vec![1], vec![2]]);
        assert_eq!(peers.send_later(A, &[4], now), Next::Send(S));
        assert_eq!((peers.session(&A), peers.node(S)), (Some(S), Some(A)));
    }

    #[test]
    fn packets_for_an_absent_peer_are_refused_and_it_is_asked_for_again_after_a_while() {
        let (mut peers, now) = (Peers::default(), start());
        peers.send_later(A, &[1], now);
        assert_eq!(peers.set(A, None, now), Released::default());
        assert_eq!(peers.send_later(A, &[2], now), Next::Absent);
        let later = now + ASK_AGAIN_AFTER;
        assert_eq!(peers.send_later(A, &[2], later), Next::AskAnyway);
        assert_eq!(peers.send_later(A, &[2], later), Next::Absent);
    }

    #[test]
    fn held_packets_are_few_and_fresh() {
        let (mut peers, now) = (Peers::default(), start());
        for _ in 0..HELD_PACKETS_MAX {
            peers.send_later(A, &[1], now);
        }
        assert_eq!(peers.send_later(A, &[1], now), Next::Full);
        let later = now + HELD_AGE_MAX;
        assert_eq!(peers.send_later(A, &[2], later), Next::Wait);
        assert_eq!(peers.set(A, Some(S), later).to_send, [vec![2]]);
    }

    #[test]
    fn a_frame_that_overtakes_its_announcement_is_delivered_after_it() {
        let (mut peers, now) = (Peers::default(), start());
        let frame = Bytes::from_static(b"early");
        peers.receive_later(S, &frame);
        assert_eq!(peers.set(A, Some(S), now).received, [frame]);
        assert_eq!(peers.set(A, Some(S), now).received, Vec::<Bytes>::new());
    }

    #[test]
    fn a_session_that_the_relay_forgot_is_forgotten() {
        let (mut peers, now) = (Peers::default(), start());
        peers.set(A, Some(S), now);
        assert_eq!(peers.forget(S), Some(A));
        assert_eq!(
            (peers.session(&A), peers.node(S), peers.forget(S)),
            (None, None, None)
        );
    }

    #[test]
    fn remembering_absent_peers_leaves_room_for_present_ones() {
        let (mut peers, now) = (Peers::default(), start());
        for n in 0..u32::try_from(PEERS_MAX + 10).unwrap() {
            let mut key = [0; 32];
            key[..4].copy_from_slice(&n.to_be_bytes());
            peers.set(NodeId(key), None, now);
        }
        assert_eq!(peers.nodes.len(), PEERS_MAX);
        assert_eq!(peers.send_later(B, &[1], now), Next::Full);
        peers.set(A, Some(S), now);
        assert_eq!(peers.session(&A), Some(S));
    }
}
