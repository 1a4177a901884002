//! A model of the WireGuard session: what of it decisions depend on.
//!
//! As `mesh-wireguard` does it: an initiation is answered once, however many copies arrive; only the
//! last two initiations can be completed; a node sends with the newest session that a packet has
//! come in by, or that it began itself; so the called end cannot send before the caller has.

use std::collections::{BTreeMap, BTreeSet};

use mesh_core::io::Input;
use mesh_wire::{id::NodeId, peer::PeerMessage};

/// Counters behind the newest one that may still come in (`paths.md`).
const REPLAY_WINDOW: u64 = 8192;

/// Sessions that a node still opens packets of.
const KEYS_MAX: usize = 8;

/// Who began a session, with whom, and with which of its initiations: two that a node begins at once have one number.
pub(crate) type Key = (usize, NodeId, u64);

/// One encrypted packet.
#[derive(Debug, Clone)]
pub(crate) enum Packet {
    /// For this node, and of use to no other.
    Initiation {
        number: u64,
        to: NodeId,
    },
    Response {
        key: Key,
    },
    Sealed {
        key: Key,
        counter: u64,
        body: Body,
    },
}

/// What is inside.
#[derive(Debug, Clone)]
pub(crate) enum Body {
    Keepalive,
    Control(PeerMessage),
    Ping { flow: usize, id: u64, bytes: u16 },
    Pong { flow: usize, id: u64, bytes: u16 },
}

impl Packet {
    /// Its bytes with all headers: 28 of UDP over IPv4, 8 of a relay's, 32 of a sealed packet.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Initiation { .. } => 36 + 148,
            Self::Response { .. } => 36 + 92,
            Self::Sealed { .. } => 36 + 32 + u64::from(self.inner_len()),
        }
    }

    /// The packet inside. What cores say is 48 bytes of headers and some 20 more, 300 with addresses.
    pub(crate) fn inner_len(&self) -> u16 {
        let Self::Sealed { body, .. } = self else {
            return 0;
        };
        match body {
            Body::Keepalive => 0,
            Body::Control(PeerMessage::Candidates { .. }) => 48 + 300,
            Body::Control(
                PeerMessage::EchoRequest { size_bytes, .. }
                | PeerMessage::EchoReply { size_bytes, .. },
            ) => (*size_bytes).max(48 + 20),
            Body::Control(PeerMessage::Goodbye | PeerMessage::GuessPorts) => 48 + 20,
            Body::Ping { bytes, .. } | Body::Pong { bytes, .. } => *bytes,
        }
    }
}

/// One node's side of its sessions with one peer.
#[derive(Debug, Default)]
pub(crate) struct Session {
    pending: Vec<u64>,
    last_sent: u64,
    last_seen: u64,
    keys: Vec<Key>,
    pub(crate) current: Option<Key>,
    sent: u64,
    /// Of each session, the counters that came in (a window of them).
    seen: BTreeMap<Key, BTreeSet<u64>>,
}

impl Session {
    /// A new initiation, numbered by the node's wall clock, or one more than the last.
    pub(crate) fn initiate(&mut self, clock: u64, to: NodeId) -> Packet {
        let number = clock.max(self.last_sent + 1);
        self.last_sent = number;
        self.pending.push(number);
        if self.pending.len() > 2 {
            self.pending.remove(0);
        }
        Packet::Initiation { number, to }
    }

    /// The answer to an initiation.
    ///
    /// # Errors
    ///
    /// It is a copy, or by so much older than the last one.
    pub(crate) fn respond(&mut self, (caller, own, number): Key) -> Result<Packet, u64> {
        if number <= self.last_seen {
            return Err(self.last_seen - number);
        }
        self.last_seen = number;
        let key = (caller, own, number);
        self.add(key);
        Ok(Packet::Response { key })
    }

    /// Whether the response completes a handshake of `own` with `peer`.
    pub(crate) fn complete(&mut self, own: usize, peer: NodeId, key: Key) -> bool {
        let (caller, called, number) = key;
        let known = (caller, called) == (own, peer) && self.pending.contains(&number);
        if known {
            self.pending.clear();
            self.current = Some(key);
            self.add(key);
        }
        known
    }

    /// Encrypts. `None`: there is no session that this end may send in.
    pub(crate) fn seal(&mut self, body: Body) -> Option<Packet> {
        let key = self.current?;
        self.sent += 1;
        let counter = self.sent;
        Some(Packet::Sealed { key, counter, body })
    }

    /// Whether a sealed packet is authentic, and no copy; `Some(true)`: and the first of a session that the
    /// other end began, which is proven by that.
    pub(crate) fn open(&mut self, key: Key, counter: u64) -> Option<bool> {
        if self.keys.contains(&key) {
            let seen = self.seen.entry(key).or_default();
            let newest = seen.last().copied().unwrap_or_default();
            if counter + REPLAY_WINDOW <= newest || !seen.insert(counter) {
                return None;
            }
            if seen.len() > usize::try_from(REPLAY_WINDOW).unwrap() {
                seen.pop_first();
            }
        }
        let age = |key: Key| self.keys.iter().position(|known| *known == key);
        let known = age(key)?;
        let newer = self
            .current
            .and_then(age)
            .is_none_or(|current| known > current);
        if newer {
            self.current = Some(key);
        }
        Some(newer)
    }

    fn add(&mut self, key: Key) {
        self.keys.push(key);
        if self.keys.len() > KEYS_MAX {
            let old = self.keys.remove(0);
            self.seen.remove(&old);
        }
    }
}

/// The core's view of a message.
pub(crate) fn message_input(peer: NodeId, via: mesh_wire::id::Via, message: PeerMessage) -> Input {
    Input::Message { peer, via, message }
}
