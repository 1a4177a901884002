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

/// Who began a session, and with which of its initiations.
pub(crate) type Key = (usize, u64);

/// One encrypted packet.
#[derive(Debug, Clone)]
pub(crate) enum Packet {
    /// For this node, and of use to no other.
    Initiation {
        number: u64,
        to: NodeId,
    },
    Response {
        number: u64,
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
    Ping { flow: usize, id: u64 },
    Pong { flow: usize, id: u64 },
}

impl Packet {
    /// Its bytes with all headers: 28 of UDP over IPv4, 8 of a relay's, 32 of a sealed packet. What
    /// cores say is 48 bytes of headers and some 20 more, 300 with addresses.
    pub(crate) fn len(&self) -> u64 {
        let large = if self.is_large() { 1_232 } else { 0 };
        let inner = match self {
            Self::Initiation { .. } => return 36 + 148,
            Self::Response { .. } => return 36 + 92,
            Self::Sealed { body, .. } => match body {
                Body::Keepalive => 0,
                Body::Control(PeerMessage::Candidates { .. }) => 48 + 300,
                Body::Control(_) => 48 + 20,
                Body::Ping { .. } | Body::Pong { .. } => 84,
            },
        };
        36 + 32 + inner.max(large)
    }

    /// Whether it only fits where full-size packets do.
    pub(crate) fn is_large(&self) -> bool {
        match self {
            Self::Sealed {
                body: Body::Control(message),
                ..
            } => matches!(
                message,
                PeerMessage::EchoRequest {
                    full_size: true,
                    ..
                } | PeerMessage::EchoReply {
                    full_size: true,
                    ..
                }
            ),
            Self::Initiation { .. } | Self::Response { .. } | Self::Sealed { .. } => false,
        }
    }
}

/// One node's side of its sessions with one peer.
#[derive(Debug, Default)]
pub(crate) struct Session {
    pending: Vec<u64>,
    last_seen: u64,
    keys: Vec<Key>,
    pub(crate) current: Option<Key>,
    sent: u64,
    /// Of each session, the counters that came in (a window of them).
    seen: BTreeMap<Key, BTreeSet<u64>>,
}

impl Session {
    /// A new initiation, numbered by a clock that survives reboots.
    pub(crate) fn initiate(&mut self, number: u64, to: NodeId) -> Packet {
        self.pending.push(number);
        if self.pending.len() > 2 {
            self.pending.remove(0);
        }
        Packet::Initiation { number, to }
    }

    /// The answer to an initiation, unless it is a copy or an old one.
    pub(crate) fn respond(&mut self, caller: usize, number: u64) -> Option<Packet> {
        if number <= self.last_seen {
            return None;
        }
        self.last_seen = number;
        self.add((caller, number));
        Some(Packet::Response { number })
    }

    /// Whether the response completes a handshake.
    pub(crate) fn complete(&mut self, own: usize, number: u64) -> bool {
        let known = self.pending.contains(&number);
        if known {
            self.pending.clear();
            self.current = Some((own, number));
            self.add((own, number));
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

    /// Whether a sealed packet is authentic, and no copy. Confirms its session.
    pub(crate) fn open(&mut self, key: Key, counter: u64) -> bool {
        if self.keys.contains(&key) {
            let seen = self.seen.entry(key).or_default();
            let newest = seen.last().copied().unwrap_or_default();
            if counter + REPLAY_WINDOW <= newest || !seen.insert(counter) {
                return false;
            }
            if seen.len() > usize::try_from(REPLAY_WINDOW).unwrap() {
                seen.pop_first();
            }
        }
        let age = |key: Key| self.keys.iter().position(|known| *known == key);
        let known = age(key);
        if known.is_some() && known >= self.current.and_then(age) {
            self.current = Some(key);
        }
        known.is_some()
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
