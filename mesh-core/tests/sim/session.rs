//! A model of the WireGuard session: what of it decisions depend on.
//!
//! As `mesh-wireguard` does it: an initiation is answered once, however many copies arrive; only the
//! last two initiations can be completed; a node sends with the newest session that a packet has
//! come in by, or that it began itself; so the called end cannot send before the caller has.

use mesh_core::io::Input;
use mesh_wire::peer::PeerMessage;

/// Sessions that a node still opens packets of.
const KEYS_MAX: usize = 8;

/// Who began a session, and with which of its initiations.
pub(crate) type Key = (usize, u64);

/// One encrypted packet.
#[derive(Debug, Clone)]
pub(crate) enum Packet {
    Initiation { number: u64 },
    Response { number: u64 },
    Sealed { key: Key, body: Body },
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
}

impl Session {
    /// A new initiation, numbered by a clock that survives reboots.
    pub(crate) fn initiate(&mut self, number: u64) -> Packet {
        self.pending.push(number);
        if self.pending.len() > 2 {
            self.pending.remove(0);
        }
        Packet::Initiation { number }
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

    /// Whether a sealed packet is authentic. Confirms its session.
    pub(crate) fn open(&mut self, key: Key) -> bool {
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
            self.keys.remove(0);
        }
    }
}

/// The core's view of a message.
pub(crate) fn message_input(
    peer: mesh_wire::id::NodeId,
    via: mesh_wire::id::Via,
    message: PeerMessage,
) -> Input {
    Input::Message { peer, via, message }
}
