//! The WireGuard protocol, of which this crate knows nothing else: handshakes, timers, cookies,
//! sealing and opening, by `boringtun`'s `Tunn`.
//!
//! Its packet queue and its panics are kept out of reach: nothing is sealed without a session,
//! and every output buffer is long enough. README.md says what `Tunn` costs.

use std::{
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use boringtun::{
    noise::{
        Packet, Tunn, TunnResult, errors::WireGuardError, handshake::parse_handshake_anon,
        rate_limiter::RateLimiter,
    },
    x25519::{PublicKey, StaticSecret},
};
use mesh_wire::id::NodeId;

use crate::stats::DropReason;

/// Bytes that sealing adds: type, receiver, counter and tag.
pub(crate) const OVERHEAD: usize = 32;

/// Smallest buffer that any message of a handshake fits in (an initiation).
pub(crate) const HANDSHAKE_LEN_MAX: usize = 148;

/// Handshake messages a second after which strangers must prove their address by a cookie: one
/// costs about 150 µs of processor time, so a flood of less takes 3 % of one processor.
const HANDSHAKES_PER_SECOND: u64 = 200;

/// Bits of a session index that boringtun uses to number the sessions of one peer.
const SESSION_BITS: u32 = 8;

/// Most peers with state: what is left of the 32-bit session index.
pub(crate) const INDEX_MAX: u32 = (1 << (u32::BITS - SESSION_BITS)) - 1;

/// Counters from here on are never accepted (WireGuard paper §6.2: 2⁶⁴ − 2¹³ − 1). boringtun 0.7
/// does not check, and its window arithmetic overflows there.
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// This node's identity, shared by all sessions.
pub(crate) struct Keys {
    private: StaticSecret,
    public: PublicKey,
    /// Asked once for each handshake message, before any costly step.
    limiter: RateLimiter,
    /// `Tunn` asks its own once more; this one always says yes.
    yes: Arc<RateLimiter>,
}

impl Keys {
    pub(crate) fn new(private: [u8; 32]) -> Self {
        let private = StaticSecret::from(private);
        let public = PublicKey::from(&private);
        Self {
            limiter: RateLimiter::new(&public, HANDSHAKES_PER_SECOND),
            yes: Arc::new(RateLimiter::new(&public, u64::MAX)),
            private,
            public,
        }
    }

    pub(crate) fn id(&self) -> NodeId {
        NodeId(self.public.to_bytes())
    }

    /// Call about once a second, or more often.
    pub(crate) fn tick(&self) {
        self.limiter.reset_count();
    }

    /// Whether a handshake message proves that its sender knows our public key and, under load,
    /// that it is at `source`.
    pub(crate) fn admit(&self, datagram: &[u8], source: IpAddr) -> Admission {
        let mut answer = [0; HANDSHAKE_LEN_MAX];
        match self
            .limiter
            .verify_packet(Some(source), datagram, &mut answer)
        {
            Ok(_) => Admission::Admitted,
            Err(TunnResult::WriteToNetwork(cookie)) => Admission::Cookie(cookie.to_vec()),
            Err(_) => Admission::Refused,
        }
    }

    /// Who began the handshake of an initiation. Costs one Diffie-Hellman: ask [`Self::admit`]
    /// first.
    pub(crate) fn initiator(&self, datagram: &[u8]) -> Option<NodeId> {
        let Ok(Packet::HandshakeInit(initiation)) = Tunn::parse_incoming_packet(datagram) else {
            return None;
        };
        let half = parse_handshake_anon(&self.private, &self.public, &initiation).ok()?;
        Some(NodeId(half.peer_static_public))
    }
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keys")
            .field("id", &self.id())
            .finish_non_exhaustive()
    }
}

/// See [`Keys::admit`].
pub(crate) enum Admission {
    Admitted,
    Cookie(Vec<u8>),
    Refused,
}

/// What a datagram is, by its first bytes alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Initiation,
    /// A response to our initiation.
    Response {
        receiver: SessionIndex,
    },
    CookieReply {
        receiver: SessionIndex,
    },
    Data {
        receiver: SessionIndex,
    },
}

impl Kind {
    pub(crate) fn of(datagram: &[u8]) -> Option<Self> {
        Some(match Tunn::parse_incoming_packet(datagram).ok()? {
            Packet::HandshakeInit(_) => Self::Initiation,
            Packet::HandshakeResponse(response) => Self::Response {
                receiver: SessionIndex(response.receiver_idx),
            },
            Packet::PacketCookieReply(reply) => Self::CookieReply {
                receiver: SessionIndex(reply.receiver_idx),
            },
            Packet::PacketData(data) => Self::Data {
                receiver: SessionIndex(data.receiver_idx),
            },
        })
    }
}

/// One of our sessions, as it stands in packets to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SessionIndex(u32);

impl SessionIndex {
    /// The number that the peer's [`Engine`] was made with.
    pub(crate) fn peer(self) -> u32 {
        self.0 >> SESSION_BITS
    }

    /// The session that our response to an initiation opens.
    pub(crate) fn of_response(response: &[u8]) -> Option<Self> {
        let bytes = response.get(4..)?.first_chunk::<4>()?;
        Some(Self(u32::from_le_bytes(*bytes)))
    }
}

/// The sessions with one peer.
pub(crate) struct Engine(Tunn);

/// What came out of a datagram.
pub(crate) enum Opened<'a> {
    /// An inner IP packet.
    Packet(&'a [u8]),
    /// Authentic, and nothing to pass on.
    Nothing,
    /// Authentic, and this answers it.
    Answer(&'a [u8]),
    /// Not accepted.
    Refused(DropReason),
}

/// What time brought about.
pub(crate) enum Due {
    Nothing,
    /// This many bytes are to be sent: a keepalive, or a new handshake.
    Send(usize),
    /// No session, and no handshake on the way any more.
    Expired,
}

impl Engine {
    /// `index` must be at most [`INDEX_MAX`] and differ among all peers.
    pub(crate) fn new(keys: &Keys, peer: NodeId, index: u32, keepalive_s: Option<u16>) -> Self {
        Self(Tunn::new(
            keys.private.clone(),
            PublicKey::from(peer.0),
            None,
            keepalive_s,
            index,
            Some(Arc::clone(&keys.yes)),
        ))
    }

    /// Whether [`Self::seal`] will seal.
    pub(crate) fn has_session(&self) -> bool {
        self.0.time_since_last_handshake().is_some()
    }

    /// Time since the session in use was agreed.
    pub(crate) fn session_age(&self) -> Option<Duration> {
        self.0.time_since_last_handshake()
    }

    /// Seals `packet` to the front of `out`; the sealed length. `None` without a session, or if
    /// `out` is too short.
    pub(crate) fn seal(&mut self, packet: &[u8], out: &mut [u8]) -> Option<usize> {
        let room = (packet.len() + OVERHEAD).max(HANDSHAKE_LEN_MAX);
        if out.len() < room || !self.has_session() {
            return None;
        }
        if let TunnResult::WriteToNetwork(sealed) = self.0.encapsulate(packet, out) {
            Some(sealed.len())
        } else {
            None
        }
    }

    /// Opens a datagram of any kind into `out`. Of handshake messages, only admitted ones.
    pub(crate) fn open<'a>(&mut self, datagram: &[u8], out: &'a mut [u8]) -> Opened<'a> {
        // An empty datagram would mean "give me what you queued".
        if datagram.is_empty() || out.len() < datagram.len().max(HANDSHAKE_LEN_MAX) {
            return Opened::Refused(DropReason::NotWireGuard);
        }
        if counter(datagram).is_some_and(|counter| counter >= REJECT_AFTER_MESSAGES) {
            return Opened::Refused(DropReason::Replayed);
        }
        match self.0.decapsulate(None, datagram, out) {
            TunnResult::Done => Opened::Nothing,
            TunnResult::Err(error) => Opened::Refused(reason(&error)),
            TunnResult::WriteToNetwork(answer) => Opened::Answer(answer),
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                Opened::Packet(packet)
            }
        }
    }

    /// A fresh initiation; `anew` also while another is under way. Whether there is one.
    pub(crate) fn initiate(&mut self, anew: bool, out: &mut [u8; HANDSHAKE_LEN_MAX]) -> bool {
        let result = self.0.format_handshake_initiation(out, anew);
        matches!(result, TunnResult::WriteToNetwork(_))
    }

    /// Call several times a second: boringtun's clock moves only here.
    pub(crate) fn tick(&mut self, out: &mut [u8; HANDSHAKE_LEN_MAX]) -> Due {
        match self.0.update_timers(out) {
            TunnResult::WriteToNetwork(message) => Due::Send(message.len()),
            TunnResult::Err(WireGuardError::ConnectionExpired) => Due::Expired,
            TunnResult::Err(_)
            | TunnResult::Done
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => Due::Nothing,
        }
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("session", &self.has_session())
            .finish_non_exhaustive()
    }
}

/// The counter of a data message.
fn counter(datagram: &[u8]) -> Option<u64> {
    let (kind, rest) = datagram.split_first_chunk::<4>()?;
    let counter = rest.get(4..)?.first_chunk::<8>()?;
    (*kind == [4, 0, 0, 0]).then(|| u64::from_le_bytes(*counter))
}

fn reason(error: &WireGuardError) -> DropReason {
    match error {
        WireGuardError::InvalidAeadTag => DropReason::Unauthentic,
        WireGuardError::InvalidCounter
        | WireGuardError::DuplicateCounter
        | WireGuardError::WrongTai64nTimestamp => DropReason::Replayed,
        WireGuardError::WrongIndex
        | WireGuardError::NoCurrentSession
        | WireGuardError::UnexpectedPacket
        | WireGuardError::ConnectionExpired => DropReason::UnknownSession,
        WireGuardError::WrongKey
        | WireGuardError::InvalidMac
        | WireGuardError::InvalidTai64nTimestamp => DropReason::BadHandshake,
        WireGuardError::UnderLoad => DropReason::UnderLoad,
        WireGuardError::InvalidPacket => DropReason::MalformedIn,
        WireGuardError::DestinationBufferTooSmall
        | WireGuardError::IncorrectPacketLength
        | WireGuardError::WrongPacketType
        | WireGuardError::LockFailed => DropReason::NotWireGuard,
    }
}

/// The address that a cookie is bound to when a message came through a relay, which knows
/// who sent it: no two of its clients share one.
pub(crate) fn relayed_source(peer: &NodeId) -> IpAddr {
    let half = peer.0.first_chunk::<16>().copied().unwrap_or_default();
    Ipv6Addr::from(half).into()
}
