//! What the cores of two nodes say to each other: small UDP packets **inside** the WireGuard
//! session, between their overlay IPv6 addresses, on [`CONTROL_PORT`].
//!
//! Being ordinary inner packets they are encrypted, authenticated and replay-protected by the
//! session, pass the same source check as all others, and mean nothing worse than a closed port
//! to a stock WireGuard peer.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use prost::Message as _;

use crate::id::RelayId;

/// UDP port, inside the tunnel, on which cores talk.
pub const CONTROL_PORT: u16 = 51_819;

/// Most candidates in one message: 16 of each of four kinds, 64 × 20 bytes, one packet.
pub const CANDIDATES_MAX: usize = 32;

/// Most relays in one message: 16 × 15 bytes, so that it is one packet still with all candidates
/// (32 × 28 bytes).
pub const RELAYS_MAX: usize = 16;

/// Largest inner packet that every path must carry (RFC 8200 §5), and the least that an overlay's MTU may be.
pub const FULL_SIZE: u16 = 1280;

/// Largest echo: the largest MTU of an overlay is 8,920 (9,000 less the tunnel's 80). A request for more
/// is answered by this much, which is then not what was asked for.
pub const ECHO_MAX: u16 = 8_920;

/// One message between two cores.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerMessage {
    /// Are you there, by this way? Answered by [`PeerMessage::EchoReply`] on the same path.
    EchoRequest {
        /// Chosen by the asker, copied into the answer.
        txid: u64,
        /// The whole inner packet is padded to so many bytes, and so is its answer; 0: neither is.
        size_bytes: u16,
    },
    /// The answer to an echo request.
    EchoReply {
        /// From the request.
        txid: u64,
        /// From the request: the answer is as large, or it proves nothing about that size.
        size_bytes: u16,
        /// Where the request came from, as the answerer saw it (a peer-reflexive address);
        /// `None` if it came through a relay.
        observed: Option<SocketAddr>,
    },
    /// Where the sender may be reached now. Replaces what it said before.
    Candidates {
        /// Counts up with each change, so that an old list does not overtake a new one.
        generation: u64,
        /// At most [`CANDIDATES_MAX`]; more are cut off.
        candidates: Vec<Candidate>,
        /// What the sender knows of its own NAT.
        nat: NatKind,
        /// The sender's round trip to relays, to the millisecond: by which one the two are
        /// nearest. At most [`RELAYS_MAX`]; a sender that does not measure tells none.
        relays: Vec<(RelayId, Duration)>,
        /// What the sender sends costs it: nobody should make it answer without need.
        metered: bool,
        /// The sender takes part in [`PeerMessage::GuessPorts`].
        bursts: bool,
    },
    /// The sender, whose NAT gives each of its sockets and destinations another port, has opened many sockets
    /// and sent from each to the receiver's address: now the receiver should guess one of the ports.
    GuessPorts,
    /// The sender stops now: move its traffic away at once.
    Goodbye,
}

/// An address at which a node may be reachable by UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Candidate {
    /// How the node came by it.
    pub kind: CandidateKind,
    /// The address.
    pub address: SocketAddr,
}

/// How a node came by a candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum CandidateKind {
    /// An address of one of its interfaces.
    Host = 0,
    /// What a relay saw (a server-reflexive address, RFC 8445 §4).
    Reflexive = 1,
    /// A mapping that the NAT granted on request (PCP, NAT-PMP, UPnP).
    PortMapped = 2,
    /// What a peer saw.
    PeerReflexive = 3,
    /// Given by the operator.
    Static = 4,
}

/// How a NAT in front of a node maps (RFC 4787 §4.1), as two vantage points tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum NatKind {
    /// Not known yet.
    Unknown = 0,
    /// The reflexive address is an address of the node's own.
    None = 1,
    /// Endpoint-independent mapping: one address for all destinations.
    Easy = 2,
    /// The mapping depends on the destination ("symmetric").
    Hard = 3,
    /// No vantage point answered by UDP, though a relay is up by TCP.
    UdpBlocked = 4,
}

/// Why a packet is not a [`PeerMessage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadPeerMessage {
    /// The packet is not UDP over IPv6 to [`CONTROL_PORT`].
    #[error("not a control packet")]
    NotControl,
    /// The payload is not of the form that this version knows.
    #[error("malformed control message")]
    Malformed,
}

mod proto {
    use super::{CandidateKind, NatKind};

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Envelope {
        #[prost(oneof = "Body", tags = "1, 2, 3, 4, 5")]
        pub(super) body: Option<Body>,
        #[prost(bytes = "vec", tag = "15")]
        pub(super) padding: Vec<u8>,
    }

    #[derive(Clone, PartialEq, prost::Oneof)]
    pub(super) enum Body {
        #[prost(message, tag = "1")]
        EchoRequest(Echo),
        #[prost(message, tag = "2")]
        EchoReply(Echo),
        #[prost(message, tag = "3")]
        Candidates(Candidates),
        #[prost(message, tag = "4")]
        Goodbye(Empty),
        #[prost(message, tag = "5")]
        GuessPorts(Empty),
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Echo {
        #[prost(fixed64, tag = "1")]
        pub(super) txid: u64,
        #[prost(uint32, tag = "2")]
        pub(super) size_bytes: u32,
        #[prost(message, optional, tag = "3")]
        pub(super) observed: Option<Address>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Address {
        /// 4 or 16 bytes.
        #[prost(bytes = "vec", tag = "1")]
        pub(super) ip: Vec<u8>,
        #[prost(uint32, tag = "2")]
        pub(super) port: u32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Candidates {
        #[prost(uint64, tag = "1")]
        pub(super) generation: u64,
        #[prost(message, repeated, tag = "2")]
        pub(super) candidates: Vec<Candidate>,
        #[prost(enumeration = "NatKind", tag = "3")]
        pub(super) nat: i32,
        #[prost(message, repeated, tag = "4")]
        pub(super) relays: Vec<RelayRtt>,
        #[prost(bool, tag = "5")]
        pub(super) metered: bool,
        #[prost(bool, tag = "6")]
        pub(super) bursts: bool,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct RelayRtt {
        #[prost(fixed64, tag = "1")]
        pub(super) relay: u64,
        #[prost(uint32, tag = "2")]
        pub(super) rtt_ms: u32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Candidate {
        #[prost(enumeration = "CandidateKind", tag = "1")]
        pub(super) kind: i32,
        #[prost(message, optional, tag = "2")]
        pub(super) address: Option<Address>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Empty {}
}

/// Bytes of the IPv6 and UDP headers before the message.
const HEADERS_LEN: usize = 40 + 8;

impl PeerMessage {
    /// The whole inner packet that carries this message from `source` to `destination`.
    #[must_use]
    pub fn to_packet(&self, source: Ipv6Addr, destination: Ipv6Addr) -> Vec<u8> {
        let payload = self.encode();
        let builder = PacketBuilder::ipv6(source.octets(), destination.octets(), 64)
            .udp(CONTROL_PORT, CONTROL_PORT);
        let mut packet = Vec::with_capacity(builder.size(payload.len()));
        // Writing to a `Vec` fails only for a payload over 64 KiB, which `encode` cannot make.
        if builder.write(&mut packet, &payload).is_err() {
            packet.clear();
        }
        packet
    }

    /// Whether an inner packet is for the core of the node at `own`: IPv6, UDP, [`CONTROL_PORT`].
    /// Cheap enough to ask of every small packet.
    #[must_use]
    pub fn is_control(packet: &[u8], own: Ipv6Addr) -> bool {
        let Some(headers) = packet.first_chunk::<HEADERS_LEN>() else {
            return false;
        };
        headers[0] >> 4 == 6
            && headers[6] == 17
            && headers[24..40] == own.octets()
            && headers[42..44] == CONTROL_PORT.to_be_bytes()
    }

    /// Reads a message from an inner packet for which [`Self::is_control`] holds.
    ///
    /// # Errors
    ///
    /// [`BadPeerMessage::NotControl`] if the headers are others, [`BadPeerMessage::Malformed`]
    /// if the payload is not a message that this version knows: count it and drop it.
    pub fn from_packet(packet: &[u8]) -> Result<(Ipv6Addr, Self), BadPeerMessage> {
        let sliced = SlicedPacket::from_ip(packet).map_err(|_| BadPeerMessage::NotControl)?;
        let (Some(NetSlice::Ipv6(ip)), Some(TransportSlice::Udp(udp))) =
            (sliced.net, sliced.transport)
        else {
            return Err(BadPeerMessage::NotControl);
        };
        if udp.destination_port() != CONTROL_PORT {
            return Err(BadPeerMessage::NotControl);
        }
        let message = Self::decode(udp.payload())?;
        Ok((ip.header().source_addr(), message))
    }

    fn encode(&self) -> Vec<u8> {
        let size_bytes = match self {
            Self::EchoRequest { size_bytes, .. } | Self::EchoReply { size_bytes, .. } => {
                usize::from(*size_bytes)
            }
            Self::Candidates { .. } | Self::Goodbye | Self::GuessPorts => 0,
        };
        let mut envelope = proto::Envelope {
            body: Some(self.to_body()),
            padding: Vec::new(),
        };
        // Tag and a two-byte length stand before the padding itself: it is 128 bytes to 16 KiB long.
        let taken = HEADERS_LEN + envelope.encoded_len() + 3;
        envelope.padding = vec![0; size_bytes.saturating_sub(taken)];
        envelope.encode_to_vec()
    }

    fn to_body(&self) -> proto::Body {
        match self {
            Self::EchoRequest { txid, size_bytes } => proto::Body::EchoRequest(proto::Echo {
                txid: *txid,
                size_bytes: (*size_bytes).into(),
                observed: None,
            }),
            Self::EchoReply {
                txid,
                size_bytes,
                observed,
            } => proto::Body::EchoReply(proto::Echo {
                txid: *txid,
                size_bytes: (*size_bytes).into(),
                observed: observed.map(address_to_proto),
            }),
            Self::Candidates {
                generation,
                candidates,
                nat,
                relays,
                metered,
                bursts,
            } => {
                let entry = |candidate: &Candidate| proto::Candidate {
                    kind: candidate.kind.into(),
                    address: Some(address_to_proto(candidate.address)),
                };
                proto::Body::Candidates(proto::Candidates {
                    generation: *generation,
                    candidates: candidates.iter().take(CANDIDATES_MAX).map(entry).collect(),
                    nat: (*nat).into(),
                    relays: relays.iter().take(RELAYS_MAX).map(rtt_to_proto).collect(),
                    metered: *metered,
                    bursts: *bursts,
                })
            }
            Self::Goodbye => proto::Body::Goodbye(proto::Empty {}),
            Self::GuessPorts => proto::Body::GuessPorts(proto::Empty {}),
        }
    }

    fn decode(payload: &[u8]) -> Result<Self, BadPeerMessage> {
        let envelope = proto::Envelope::decode(payload).map_err(|_| BadPeerMessage::Malformed)?;
        match envelope.body.ok_or(BadPeerMessage::Malformed)? {
            proto::Body::EchoRequest(echo) => Ok(Self::EchoRequest {
                txid: echo.txid,
                size_bytes: size_from_proto(echo.size_bytes),
            }),
            proto::Body::EchoReply(echo) => Ok(Self::EchoReply {
                txid: echo.txid,
                size_bytes: size_from_proto(echo.size_bytes),
                observed: echo.observed.map(|a| address_from_proto(&a)).transpose()?,
            }),
            proto::Body::Candidates(list) => {
                let read = list.candidates.iter().take(CANDIDATES_MAX);
                Ok(Self::Candidates {
                    generation: list.generation,
                    candidates: read.map(candidate_from_proto).collect::<Result<_, _>>()?,
                    nat: NatKind::try_from(list.nat).unwrap_or_default(),
                    relays: list
                        .relays
                        .iter()
                        .take(RELAYS_MAX)
                        .map(rtt_from_proto)
                        .collect(),
                    metered: list.metered,
                    bursts: list.bursts,
                })
            }
            proto::Body::Goodbye(_) => Ok(Self::Goodbye),
            proto::Body::GuessPorts(_) => Ok(Self::GuessPorts),
        }
    }
}

fn size_from_proto(size_bytes: u32) -> u16 {
    u16::try_from(size_bytes).map_or(ECHO_MAX, |size| size.min(ECHO_MAX))
}

fn rtt_to_proto(&(relay, rtt): &(RelayId, Duration)) -> proto::RelayRtt {
    let rtt_ms = u32::try_from(rtt.as_millis()).unwrap_or(u32::MAX);
    let relay = relay.0;
    proto::RelayRtt { relay, rtt_ms }
}

fn rtt_from_proto(entry: &proto::RelayRtt) -> (RelayId, Duration) {
    let rtt = Duration::from_millis(entry.rtt_ms.into());
    (RelayId(entry.relay), rtt)
}

fn candidate_from_proto(entry: &proto::Candidate) -> Result<Candidate, BadPeerMessage> {
    let address = entry.address.as_ref().ok_or(BadPeerMessage::Malformed)?;
    Ok(Candidate {
        kind: CandidateKind::try_from(entry.kind).map_err(|_| BadPeerMessage::Malformed)?,
        address: address_from_proto(address)?,
    })
}

fn address_to_proto(address: SocketAddr) -> proto::Address {
    let ip = match address.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    proto::Address {
        ip,
        port: address.port().into(),
    }
}

fn address_from_proto(address: &proto::Address) -> Result<SocketAddr, BadPeerMessage> {
    let port = u16::try_from(address.port).map_err(|_| BadPeerMessage::Malformed)?;
    let ip = if let Ok(v4) = <[u8; 4]>::try_from(address.ip.as_slice()) {
        IpAddr::from(v4)
    } else if let Ok(v6) = <[u8; 16]>::try_from(address.ip.as_slice()) {
        IpAddr::from(v6)
    } else {
        return Err(BadPeerMessage::Malformed);
    };
    Ok(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
    const B: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);

    fn message() -> impl Strategy<Value = PeerMessage> {
        let candidate = any::<(bool, SocketAddr)>().prop_map(|(host, address)| Candidate {
            kind: if host {
                CandidateKind::Host
            } else {
                CandidateKind::Reflexive
            },
            address: SocketAddr::new(address.ip(), address.port()),
        });
        let candidates = prop::collection::vec(candidate, 0..CANDIDATES_MAX);
        let relay = any::<(u64, u32)>()
            .prop_map(|(relay, rtt_ms)| (RelayId(relay), Duration::from_millis(rtt_ms.into())));
        let relays = prop::collection::vec(relay, 0..RELAYS_MAX);
        prop_oneof![
            (any::<u64>(), 0..=ECHO_MAX)
                .prop_map(|(txid, size_bytes)| PeerMessage::EchoRequest { txid, size_bytes }),
            (any::<u64>(), 0..=ECHO_MAX, any::<Option<([u8; 4], u16)>>()).prop_map(
                |(txid, size_bytes, observed)| {
                    let observed = observed.map(SocketAddr::from);
                    PeerMessage::EchoReply {
                        txid,
                        size_bytes,
                        observed,
                    }
                }
            ),
            (any::<u64>(), candidates, relays).prop_map(|(generation, candidates, relays)| {
                PeerMessage::Candidates {
                    generation,
                    candidates,
                    nat: NatKind::Hard,
                    relays,
                    metered: generation % 2 == 0,
                    bursts: generation % 3 == 0,
                }
            }),
            Just(PeerMessage::Goodbye),
            Just(PeerMessage::GuessPorts),
        ]
    }

    proptest! {
        #[test]
        fn a_message_survives_the_packet(message in message()) {
            let packet = message.to_packet(A, B);
            prop_assert!(PeerMessage::is_control(&packet, B));
            prop_assert_eq!(PeerMessage::from_packet(&packet), Ok((A, message)));
        }

        #[test]
        fn no_bytes_make_decode_panic(bytes: Vec<u8>) {
            std::hint::black_box(PeerMessage::is_control(&bytes, B));
            PeerMessage::from_packet(&bytes).ok();
            PeerMessage::decode(&bytes).ok();
        }
    }

    #[test]
    fn the_longest_message_is_one_packet() {
        let address = "[2001:db8:ffff:ffff:ffff:ffff:ffff:ffff]:65535"
            .parse()
            .unwrap();
        let kind = CandidateKind::Static;
        let message = PeerMessage::Candidates {
            generation: u64::MAX,
            candidates: vec![Candidate { kind, address }; CANDIDATES_MAX],
            nat: NatKind::Hard,
            relays: vec![(RelayId(u64::MAX), Duration::from_secs(60)); RELAYS_MAX],
            metered: true,
            bursts: true,
        };
        assert!(message.to_packet(A, B).len() <= FULL_SIZE.into());
    }

    #[test]
    fn an_echo_is_as_large_as_it_says() {
        let observed = "[2001:db8::1]:65535".parse().ok();
        for size_bytes in [FULL_SIZE, 1_281, 1_400, 1_420, ECHO_MAX] {
            for txid in [0, 1, u64::MAX] {
                let request = PeerMessage::EchoRequest { txid, size_bytes };
                assert_eq!(request.to_packet(A, B).len(), usize::from(size_bytes));
                for observed in [None, observed] {
                    let reply = PeerMessage::EchoReply {
                        txid,
                        size_bytes,
                        observed,
                    };
                    assert_eq!(reply.to_packet(A, B).len(), usize::from(size_bytes));
                }
            }
        }
    }

    #[test]
    fn nobody_is_made_to_answer_by_more_than_an_overlay_carries() {
        let asked = proto::Envelope {
            body: Some(proto::Body::EchoRequest(proto::Echo {
                txid: 1,
                size_bytes: u32::MAX,
                observed: None,
            })),
            padding: Vec::new(),
        };
        let asked = PeerMessage::decode(&asked.encode_to_vec());
        let (txid, size_bytes) = (1, ECHO_MAX);
        assert_eq!(asked, Ok(PeerMessage::EchoRequest { txid, size_bytes }));
    }
}
