//! Frames between a node and a relay.
//!
//! Every frame begins with the same eight bytes:
//!
//! ```text
//!  0       1       2               4                               8
//!  +-------+-------+---------------+-------------------------------+
//!  | type  | flags |     epoch     |            session            | payload …
//!  +-------+-------+---------------+-------------------------------+
//! ```
//!
//! A data frame carries one WireGuard packet and travels as one plain UDP datagram ([`udp`]), as
//! one QUIC datagram, as one unidirectional QUIC stream (where the path's datagrams are too small
//! for it), or as one binary WebSocket message. The relay passes it on unchanged: session and epoch
//! mean the same pair of nodes at both ends. Control messages travel on one bidirectional QUIC
//! stream, each after its length (16 bits), or as binary WebSocket messages with the same header
//! in front.

use prost::Message as _;

use self::udp::BindKey;
use crate::id::NodeId;

pub mod udp;

/// Bytes in front of every payload.
pub const HEADER_LEN: usize = 8;

/// Largest payload of a data frame: a packet of an overlay whose MTU is 1500, and WireGuard's 32.
pub const PAYLOAD_LEN_MAX: usize = 1532;

/// Largest data frame.
pub const FRAME_LEN_MAX: usize = HEADER_LEN + PAYLOAD_LEN_MAX;

/// Largest encoded control message. The largest that exists, `Peer`, has 52 bytes.
pub const CONTROL_LEN_MAX: usize = 256;

/// What the two sides of a link must agree on; counted up when they could not understand each
/// other any more.
pub const PROTOCOL_VERSION: u32 = 1;

/// ALPN of the QUIC framing.
pub const ALPN_QUIC: &[u8] = b"holdfast-relay/1";

/// ALPN of the TLS framing: what any proxy expects on 443.
pub const ALPN_TLS: &[u8] = b"http/1.1";

/// Path that the WebSocket upgrade asks for.
pub const WEBSOCKET_PATH: &str = "/holdfast/relay/1";

/// The frame types lie between 0x20 and 0x3f, so that raw UDP can share QUIC's port: QUIC sets the
/// bit 0x40 (RFC 9000 §17), STUN begins with 0x00 or 0x01, WireGuard with 0x01 to 0x04.
const TYPE_DATA: u8 = 0x20;
const TYPE_CONTROL: u8 = 0x21;

/// A pair of nodes that are connected to one relay: a place in the relay's table, and how often
/// that place was used before, so that a late frame does not reach the pair's successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Session {
    /// The place.
    pub number: u32,
    /// Its use, modulo 2¹⁶.
    pub epoch: u16,
}

/// One frame, borrowed from the bytes it came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame<'a> {
    /// A packet for, or from, the other node of `session`.
    Data {
        /// The pair.
        session: Session,
        /// The packet.
        payload: &'a [u8],
    },
    /// An encoded [`Control`] message (WebSocket only).
    Control(&'a [u8]),
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadFrame {
    /// Shorter than a header, or than its type demands.
    #[error("a frame needs {HEADER_LEN} bytes or more, got {0}")]
    Truncated(usize),
    /// Longer than [`FRAME_LEN_MAX`].
    #[error("a frame has {FRAME_LEN_MAX} bytes at most, got {0}")]
    TooLong(usize),
    /// A type from a newer version, or garbage.
    #[error("unknown frame type {0:#04x}")]
    UnknownType(u8),
}

impl<'a> Frame<'a> {
    /// Reads one frame. Flags are for later versions and ignored.
    ///
    /// # Errors
    ///
    /// [`BadFrame`]: count it and drop it.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, BadFrame> {
        if bytes.len() > FRAME_LEN_MAX {
            return Err(BadFrame::TooLong(bytes.len()));
        }
        let (kind, session) = header(bytes)?;
        let payload = bytes.get(HEADER_LEN..).unwrap_or_default();
        match kind {
            TYPE_DATA => Ok(Self::Data { session, payload }),
            TYPE_CONTROL => Ok(Self::Control(payload)),
            unknown => Err(BadFrame::UnknownType(unknown)),
        }
    }
}

/// Type and session; flags are ignored.
fn header(bytes: &[u8]) -> Result<(u8, Session), BadFrame> {
    let Some(&[kind, _flags, e0, e1, n0, n1, n2, n3]) = bytes.first_chunk() else {
        return Err(BadFrame::Truncated(bytes.len()));
    };
    let session = Session {
        number: u32::from_be_bytes([n0, n1, n2, n3]),
        epoch: u16::from_be_bytes([e0, e1]),
    };
    Ok((kind, session))
}

/// The bytes in front of a packet for the other node of `session`.
#[must_use]
pub fn data_header(session: Session) -> [u8; HEADER_LEN] {
    let [e0, e1] = session.epoch.to_be_bytes();
    let [n0, n1, n2, n3] = session.number.to_be_bytes();
    [TYPE_DATA, 0, e0, e1, n0, n1, n2, n3]
}

/// A whole data frame.
#[must_use]
pub fn data_frame(session: Session, payload: &[u8]) -> Vec<u8> {
    [&data_header(session), payload].concat()
}

/// A whole control frame, for WebSocket.
#[must_use]
pub fn control_frame(message: &Control) -> Vec<u8> {
    let mut frame = vec![TYPE_CONTROL, 0, 0, 0, 0, 0, 0, 0];
    frame.extend(message.encode());
    frame
}

/// What a node and a relay say to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Node, first of all.
    Hello {
        /// [`PROTOCOL_VERSION`].
        version: u32,
    },
    /// Relay: the link is open. Answers `Hello`.
    Welcome,
    /// Node: is this peer here? Answered by `Peer`, and again by `Peer` whenever that changes.
    FindPeer {
        /// The peer.
        node: NodeId,
    },
    /// Relay: this peer is here, and `session` leads to it; or it is not here.
    Peer {
        /// The peer.
        node: NodeId,
        /// How to reach it; `None`: it is not connected.
        session: Option<Session>,
    },
    /// Relay: data came for a session that does not exist (any more).
    SessionGone {
        /// As in the data.
        session: Session,
    },
    /// Relay: it will stop in `grace_ms` at the latest. Move away.
    GoAway {
        /// Milliseconds until the link is closed.
        grace_ms: u32,
    },
    /// Either: are you there?
    Ping {
        /// Copied into the answer.
        txid: u64,
    },
    /// Answers `Ping`.
    Pong {
        /// From the question.
        txid: u64,
    },
    /// Node: I want to send data by plain UDP too. Answered by `BindKey`, on a QUIC link.
    AskBindKey,
    /// Relay: prove with this that an address is yours.
    BindKey(BindKey),
    /// Node: plain UDP does not work any more. Use this link.
    Unbind {
        /// Of the bind that is over: the next may overtake this message.
        sequence: u64,
    },
}

/// Why bytes are not a [`Control`] message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadControl {
    /// Longer than [`CONTROL_LEN_MAX`].
    #[error("a control message has {CONTROL_LEN_MAX} bytes at most, got {0}")]
    TooLong(usize),
    /// Not of the form that this version knows.
    #[error("malformed control message")]
    Malformed,
}

impl Control {
    /// The message as bytes, [`CONTROL_LEN_MAX`] at most.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let body = Some(proto::Body::from(*self));
        proto::Envelope { body }.encode_to_vec()
    }

    /// Reads one message.
    ///
    /// # Errors
    ///
    /// [`BadControl`]. A message of a kind that this version does not know is `Malformed` too:
    /// skip it.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadControl> {
        if bytes.len() > CONTROL_LEN_MAX {
            return Err(BadControl::TooLong(bytes.len()));
        }
        let envelope = proto::Envelope::decode(bytes).map_err(|_| BadControl::Malformed)?;
        let body = envelope.body.ok_or(BadControl::Malformed)?;
        Self::try_from(body)
    }
}

mod proto {
    use super::{BadControl, BindKey, Control, NodeId, Session};

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Envelope {
        #[prost(oneof = "Body", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11")]
        pub(super) body: Option<Body>,
    }

    #[derive(Clone, PartialEq, prost::Oneof)]
    pub(super) enum Body {
        #[prost(message, tag = "1")]
        Hello(Number),
        #[prost(message, tag = "2")]
        Welcome(Nothing),
        #[prost(message, tag = "3")]
        FindPeer(Peer),
        #[prost(message, tag = "4")]
        Peer(Peer),
        #[prost(message, tag = "5")]
        SessionGone(WireSession),
        #[prost(message, tag = "6")]
        GoAway(Number),
        #[prost(message, tag = "7")]
        Ping(Txid),
        #[prost(message, tag = "8")]
        Pong(Txid),
        #[prost(message, tag = "9")]
        AskBindKey(Nothing),
        #[prost(message, tag = "10")]
        BindKey(WireBindKey),
        #[prost(message, tag = "11")]
        Unbind(Txid),
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Nothing {}

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Number {
        #[prost(uint32, tag = "1")]
        value: u32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Txid {
        #[prost(fixed64, tag = "1")]
        value: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Peer {
        /// 32 bytes.
        #[prost(bytes = "vec", tag = "1")]
        node: Vec<u8>,
        #[prost(message, optional, tag = "2")]
        session: Option<WireSession>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct WireSession {
        #[prost(uint32, tag = "1")]
        number: u32,
        /// 16 bits.
        #[prost(uint32, tag = "2")]
        epoch: u32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct WireBindKey {
        #[prost(fixed64, tag = "1")]
        id: u64,
        /// 32 bytes.
        #[prost(bytes = "vec", tag = "2")]
        key: Vec<u8>,
    }

    impl From<Control> for Body {
        fn from(message: Control) -> Self {
            match message {
                Control::Hello { version } => Self::Hello(Number { value: version }),
                Control::Welcome => Self::Welcome(Nothing {}),
                Control::FindPeer { node } => Self::FindPeer(Peer {
                    node: node.0.to_vec(),
                    session: None,
                }),
                Control::Peer { node, session } => Self::Peer(Peer {
                    node: node.0.to_vec(),
                    session: session.map(WireSession::from),
                }),
                Control::SessionGone { session } => Self::SessionGone(session.into()),
                Control::GoAway { grace_ms } => Self::GoAway(Number { value: grace_ms }),
                Control::Ping { txid } => Self::Ping(Txid { value: txid }),
                Control::Pong { txid } => Self::Pong(Txid { value: txid }),
                Control::AskBindKey => Self::AskBindKey(Nothing {}),
                Control::BindKey(BindKey { id, key }) => Self::BindKey(WireBindKey {
                    id,
                    key: key.to_vec(),
                }),
                Control::Unbind { sequence } => Self::Unbind(Txid { value: sequence }),
            }
        }
    }

    impl TryFrom<Body> for Control {
        type Error = BadControl;

        fn try_from(body: Body) -> Result<Self, BadControl> {
            Ok(match body {
                Body::Hello(Number { value }) => Self::Hello { version: value },
                Body::Welcome(Nothing {}) => Self::Welcome,
                Body::FindPeer(peer) => Self::FindPeer { node: peer.node()? },
                Body::Peer(peer) => Self::Peer {
                    node: peer.node()?,
                    session: peer.session.map(Session::try_from).transpose()?,
                },
                Body::SessionGone(session) => Self::SessionGone {
                    session: session.try_into()?,
                },
                Body::GoAway(Number { value }) => Self::GoAway { grace_ms: value },
                Body::Ping(Txid { value }) => Self::Ping { txid: value },
                Body::Pong(Txid { value }) => Self::Pong { txid: value },
                Body::AskBindKey(Nothing {}) => Self::AskBindKey,
                Body::BindKey(WireBindKey { id, key }) => Self::BindKey(BindKey {
                    id,
                    key: key.try_into().map_err(|_| BadControl::Malformed)?,
                }),
                Body::Unbind(Txid { value }) => Self::Unbind { sequence: value },
            })
        }
    }

    impl Peer {
        fn node(&self) -> Result<NodeId, BadControl> {
            NodeId::try_from(self.node.as_slice()).map_err(|_| BadControl::Malformed)
        }
    }

    impl From<Session> for WireSession {
        fn from(session: Session) -> Self {
            Self {
                number: session.number,
                epoch: session.epoch.into(),
            }
        }
    }

    impl TryFrom<WireSession> for Session {
        type Error = BadControl;

        fn try_from(wire: WireSession) -> Result<Self, BadControl> {
            Ok(Self {
                number: wire.number,
                epoch: wire.epoch.try_into().map_err(|_| BadControl::Malformed)?,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sessions() -> impl Strategy<Value = Session> {
        any::<(u32, u16)>().prop_map(|(number, epoch)| Session { number, epoch })
    }

    fn nodes() -> impl Strategy<Value = NodeId> {
        any::<[u8; 32]>().prop_map(NodeId)
    }

    fn messages() -> impl Strategy<Value = Control> {
        prop_oneof![
            any::<u32>().prop_map(|version| Control::Hello { version }),
            Just(Control::Welcome),
            nodes().prop_map(|node| Control::FindPeer { node }),
            (nodes(), proptest::option::of(sessions()))
                .prop_map(|(node, session)| Control::Peer { node, session }),
            sessions().prop_map(|session| Control::SessionGone { session }),
            any::<u32>().prop_map(|grace_ms| Control::GoAway { grace_ms }),
            any::<u64>().prop_map(|txid| Control::Ping { txid }),
            any::<u64>().prop_map(|txid| Control::Pong { txid }),
            Just(Control::AskBindKey),
            any::<(u64, [u8; 32])>().prop_map(|(id, key)| Control::BindKey(BindKey { id, key })),
            any::<u64>().prop_map(|sequence| Control::Unbind { sequence }),
        ]
    }

    proptest! {
        #[test]
        fn a_data_frame_survives_the_wire(session in sessions(), payload in proptest::collection::vec(any::<u8>(), 0..=PAYLOAD_LEN_MAX)) {
            let frame = data_frame(session, &payload);
            prop_assert_eq!(Frame::decode(&frame), Ok(Frame::Data { session, payload: &payload }));
        }

        #[test]
        fn a_control_message_survives_both_framings(message in messages()) {
            let bytes = message.encode();
            prop_assert!(bytes.len() <= CONTROL_LEN_MAX);
            prop_assert_eq!(Control::decode(&bytes), Ok(message));
            let frame = control_frame(&message);
            prop_assert_eq!(Frame::decode(&frame), Ok(Frame::Control(&bytes)));
        }

        #[test]
        fn no_bytes_make_decode_panic(bytes: Vec<u8>) {
            Frame::decode(&bytes).ok();
            Control::decode(&bytes).ok();
        }

        #[test]
        fn no_frame_looks_like_quic_stun_or_wireguard(session in sessions()) {
            let [first, ..] = data_header(session);
            prop_assert!(first & 0xc0 == 0 && first > 0x04);
        }
    }

    #[test]
    fn what_is_too_long_or_unknown_is_refused_before_it_is_read() {
        let long = vec![TYPE_DATA; FRAME_LEN_MAX + 1];
        assert_eq!(Frame::decode(&long), Err(BadFrame::TooLong(long.len())));
        assert_eq!(Frame::decode(&[TYPE_DATA; 7]), Err(BadFrame::Truncated(7)));
        assert_eq!(Frame::decode(&[0x40; 8]), Err(BadFrame::UnknownType(0x40)));
        let long = vec![0; CONTROL_LEN_MAX + 1];
        assert_eq!(Control::decode(&long), Err(BadControl::TooLong(long.len())));
    }
}
