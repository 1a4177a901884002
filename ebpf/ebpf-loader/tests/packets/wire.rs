//! Packets as etherparse builds them: what goes into the programs, and what must come out.

use std::net::{IpAddr, SocketAddr};

use etherparse::{
    EtherType, Ethernet2Header, Icmpv4Type, Icmpv6Type, IpHeaders, IpNumber, Ipv4Header,
    Ipv6FragmentHeader, Ipv6Header, PacketBuilder, PacketBuilderStep, TcpHeader,
};

/// The kernel's test run has the loopback device, whose address this is.
const GATEWAY: [u8; 6] = [0; 6];
const NEIGHBOUR: [u8; 6] = [2, 0, 0, 0, 0, 7];
pub(crate) const TTL: u8 = 64;
pub(crate) const ETHERNET: usize = 14;

/// One family's addresses.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Net {
    pub(crate) client: SocketAddr,
    pub(crate) service: SocketAddr,
    pub(crate) endpoint: SocketAddr,
    /// Between gateway and endpoint, or gateway and client.
    pub(crate) router: IpAddr,
}

pub(crate) fn nets() -> [Net; 2] {
    let net = |client: &str, service: &str, endpoint: &str, router: &str| Net {
        client: client.parse().unwrap(),
        service: service.parse().unwrap(),
        endpoint: endpoint.parse().unwrap(),
        router: router.parse().unwrap(),
    };
    [
        net(
            "192.168.7.2:40001",
            "10.96.0.1:80",
            "10.0.9.9:8080",
            "10.0.1.1",
        ),
        net(
            "[fd07::2]:40001",
            "[fd96::1]:80",
            "[fd00:9::9]:8080",
            "fd00:1::1",
        ),
    ]
}

/// The kernel's test run takes the first 14 bytes for an Ethernet header, whatever the program
/// takes them for: of these addresses, the bytes at the place of its type say IPv4 and IPv6.
pub(crate) fn ip_nets() -> [Net; 2] {
    let [v4, v6] = nets();
    [
        Net {
            client: "8.0.7.2:40001".parse().unwrap(),
            endpoint: "8.0.9.9:8080".parse().unwrap(),
            router: "8.0.1.1".parse().unwrap(),
            ..v4
        },
        Net {
            client: "[fd07:0:86dd::2]:40001".parse().unwrap(),
            endpoint: "[fd00:9:86dd::9]:8080".parse().unwrap(),
            router: "fd00:1:86dd::1".parse().unwrap(),
            ..v6
        },
    ]
}

/// Long enough that an IP header is behind those 14 bytes as well: the test run asks for one.
pub(crate) const ODD: &[u8] = b"odd too";

/// As it is where packets begin with the IP header.
pub(crate) fn without_ethernet(packet: Vec<u8>) -> Vec<u8> {
    packet[ETHERNET..].to_vec()
}

impl Net {
    pub(crate) fn v4(&self) -> bool {
        self.client.is_ipv4()
    }

    /// Where the transport header begins.
    pub(crate) fn l4(&self) -> usize {
        ETHERNET + if self.v4() { 20 } else { 40 }
    }
}

pub(crate) fn ip(from: IpAddr, to: IpAddr) -> IpHeaders {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let number = IpNumber::UDP; // Replaced when written.
            let header = Ipv4Header::new(0, TTL, number, from.octets(), to.octets());
            IpHeaders::Ipv4(header.unwrap(), <_>::default())
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let header = Ipv6Header {
                hop_limit: TTL,
                source: from.octets(),
                destination: to.octets(),
                ..<_>::default()
            };
            IpHeaders::Ipv6(header, <_>::default())
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
            panic!("{from} and {to} are of two families")
        }
    }
}

/// To the gateway.
fn incoming() -> PacketBuilderStep<Ethernet2Header> {
    PacketBuilder::ethernet2(NEIGHBOUR, GATEWAY)
}

/// The gateway's own answer.
fn returned() -> PacketBuilderStep<Ethernet2Header> {
    PacketBuilder::ethernet2(GATEWAY, NEIGHBOUR)
}

/// Who sent it.
pub(crate) fn source(ip: &IpHeaders) -> IpAddr {
    match ip {
        IpHeaders::Ipv4(header, _) => header.source.into(),
        IpHeaders::Ipv6(header, _) => header.source.into(),
    }
}

/// Of an even number of bytes; not complemented: RFC 1071.
pub(crate) fn sum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let sum = words.sum::<u32>();
    let sum = (sum & 0xffff) + (sum >> 16);
    u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap()
}

pub(crate) fn udp_in(ip: IpHeaders, from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = incoming().ip(ip).udp(from, to);
    builder.write(&mut packet, payload).unwrap();
    packet
}

pub(crate) fn udp(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    udp_in(ip(from.ip(), to.ip()), from.port(), to.port(), payload)
}

/// A segment: the flags by `set`.
pub(crate) fn tcp(
    from: SocketAddr,
    to: SocketAddr,
    set: impl FnOnce(&mut TcpHeader),
    payload: &[u8],
) -> Vec<u8> {
    tcp_by(incoming(), from, to, set, payload)
}

/// What the gateway says instead of the service.
pub(crate) fn reset(from: SocketAddr, to: SocketAddr, set: impl FnOnce(&mut TcpHeader)) -> Vec<u8> {
    let set = |header: &mut TcpHeader| {
        header.window_size = 0;
        header.sequence_number = 0;
        header.rst = true;
        set(header);
    };
    tcp_by(returned(), from, to, set, &[])
}

fn tcp_by(
    ethernet: PacketBuilderStep<Ethernet2Header>,
    from: SocketAddr,
    to: SocketAddr,
    set: impl FnOnce(&mut TcpHeader),
    payload: &[u8],
) -> Vec<u8> {
    let mut header = TcpHeader::new(from.port(), to.port(), 1_000, 65_535);
    set(&mut header);
    let mut packet = Vec::new();
    let builder = ethernet.ip(ip(from.ip(), to.ip())).tcp_header(header);
    builder.write(&mut packet, payload).unwrap();
    packet
}

/// An ICMP error by `from` about `quoted`, which begins with its IP header.
pub(crate) fn error(from: IpAddr, to: IpAddr, kind: IcmpError, quoted: &[u8]) -> Vec<u8> {
    error_by(incoming(), from, to, kind, quoted)
}

/// The gateway's own port unreachable.
pub(crate) fn refusal(from: IpAddr, to: IpAddr, quoted: &[u8]) -> Vec<u8> {
    error_by(returned(), from, to, IcmpError::PortUnreachable, quoted)
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum IcmpError {
    PortUnreachable,
    TooBig,
    TimeExceeded,
}

impl IcmpError {
    pub(crate) const ALL: [Self; 3] = [Self::PortUnreachable, Self::TooBig, Self::TimeExceeded];

    fn v4(self) -> Icmpv4Type {
        let (type_u8, code_u8, bytes5to8) = match self {
            Self::PortUnreachable => (3, 3, [0; 4]),
            Self::TooBig => (3, 4, [0, 0, 5, 0]),
            Self::TimeExceeded => (11, 0, [0; 4]),
        };
        Icmpv4Type::Unknown {
            type_u8,
            code_u8,
            bytes5to8,
        }
    }

    fn v6(self) -> Icmpv6Type {
        let (type_u8, code_u8, bytes5to8) = match self {
            Self::PortUnreachable => (1, 4, [0; 4]),
            Self::TooBig => (2, 0, [0, 0, 5, 0]),
            Self::TimeExceeded => (3, 0, [0; 4]),
        };
        Icmpv6Type::Unknown {
            type_u8,
            code_u8,
            bytes5to8,
        }
    }
}

fn error_by(
    ethernet: PacketBuilderStep<Ethernet2Header>,
    from: IpAddr,
    to: IpAddr,
    kind: IcmpError,
    quoted: &[u8],
) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = ethernet.ip(ip(from, to));
    let written = if from.is_ipv4() {
        builder.icmpv4(kind.v4()).write(&mut packet, quoted)
    } else {
        builder.icmpv6(kind.v6()).write(&mut packet, quoted)
    };
    written.unwrap();
    packet
}

/// The packet in two fragments, the first with `cut` bytes behind the IP header (of 8 each).
pub(crate) fn fragments(packet: &[u8], id: u16, cut: usize) -> [Vec<u8>; 2] {
    let (ip, payload) = IpHeaders::from_slice(&packet[ETHERNET..]).unwrap();
    let (first, rest) = payload.payload.split_at(cut);
    let offset = u16::try_from(cut / 8).unwrap().try_into().unwrap();
    let build = |more: bool, bytes: &[u8]| {
        let mut packet = packet[..ETHERNET].to_vec();
        match ip.clone() {
            IpHeaders::Ipv4(mut header, _) => {
                header.dont_fragment = false;
                header.identification = id;
                header.more_fragments = more;
                header.fragment_offset = if more { <_>::default() } else { offset };
                header.set_payload_len(bytes.len()).unwrap();
                header.write(&mut packet).unwrap();
            }
            IpHeaders::Ipv6(mut header, _) => {
                let offset = if more { <_>::default() } else { offset };
                let id = u32::from(id);
                let fragment = Ipv6FragmentHeader::new(header.next_header, offset, more, id);
                header.next_header = IpNumber::IPV6_FRAGMENTATION_HEADER;
                header.set_payload_length(8 + bytes.len()).unwrap();
                header.write(&mut packet).unwrap();
                fragment.write(&mut packet).unwrap();
            }
        }
        packet.extend_from_slice(bytes);
        packet
    };
    [build(true, first), build(false, rest)]
}

/// Another protocol by Ethernet.
pub(crate) fn of_ether_type(packet: &[u8], ether_type: EtherType) -> Vec<u8> {
    let mut packet = packet.to_vec();
    packet[ETHERNET - 2..ETHERNET].copy_from_slice(&ether_type.0.to_be_bytes());
    packet
}
