//! Tells a local sender that nobody has the address it wants, instead of letting it wait.

use std::net::IpAddr;

use crate::{checksum::Sum, route, segment};

/// Most bytes of an answer: what RFC 1812 §4.3.2.3 asks for, and less than RFC 4443 §2.4 (c) allows.
pub(crate) const LEN_MAX: usize = 576;

const ICMPV4: u8 = 1;
const ICMPV6: u8 = 58;

/// The first byte of the IPv4 and IPv6 headers that are made here.
const VERSION_4: u8 = 0x45;
const VERSION_6: u8 = 0x60;

const HOPS: u8 = 64;

/// Writes "host unreachable" (RFC 792 type 3 code 1) or "address unreachable" (RFC 4443 type 1 code 3)
/// for `packet` to `out`, as the kernel's WireGuard does (`wg_xmit`); its length. `None` where no error may be sent: about an error, a fragment other than
/// the first, or anything to or from a group.
///
/// It comes from the address that was asked for: from an address of the machine's own, the
/// kernel would not take it.
pub(crate) fn no_route(packet: &[u8], out: &mut [u8; LEN_MAX]) -> Option<usize> {
    let (source, destination) = (route::source(packet)?, route::destination(packet)?);
    if !is_single(source) || !is_single(destination) || !is_answerable(packet)? {
        return None;
    }
    let (header_len, kind, code, protocol) = match destination {
        IpAddr::V4(_) => (20, 3, 1, ICMPV4),
        IpAddr::V6(_) => (40, 1, 3, ICMPV6),
    };
    let quoted = packet.get(..packet.len().min(LEN_MAX - header_len - 8))?;
    let len = header_len + 8 + quoted.len();
    let answer = out.get_mut(..len)?;
    let (header, message) = answer.split_at_mut_checked(header_len)?;
    message.fill(0);
    message.get_mut(..2)?.copy_from_slice(&[kind, code]);
    message.get_mut(8..)?.copy_from_slice(quoted);
    header.fill(0);
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            *header.first_mut()? = VERSION_4;
            header
                .get_mut(2..4)?
                .copy_from_slice(&u16::try_from(len).ok()?.to_be_bytes());
            header.get_mut(8..10)?.copy_from_slice(&[HOPS, ICMPV4]);
            header
                .get_mut(12..16)?
                .copy_from_slice(&destination.octets());
            header.get_mut(16..20)?.copy_from_slice(&source.octets());
            segment::write_ipv4_checksum(header)?;
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            *header.first_mut()? = VERSION_6;
            let payload_len = u16::try_from(message.len()).ok()?;
            header
                .get_mut(4..6)?
                .copy_from_slice(&payload_len.to_be_bytes());
            header.get_mut(6..8)?.copy_from_slice(&[ICMPV6, HOPS]);
            header
                .get_mut(8..24)?
                .copy_from_slice(&destination.octets());
            header.get_mut(24..40)?.copy_from_slice(&source.octets());
        }
        (IpAddr::V4(_) | IpAddr::V6(_), _) => return None,
    }
    let mut sum = Sum::default();
    if protocol == ICMPV6 {
        let len = u16::try_from(message.len()).ok()?;
        sum = sum.add_pseudo(segment::addresses(header)?, ICMPV6, len);
    }
    let checksum = sum.add(message).checksum();
    message.get_mut(2..4)?.copy_from_slice(&checksum);
    Some(len)
}

/// Whether it may be one host's: no group's, not everybody's and not nobody's.
pub(crate) fn is_single(ip: IpAddr) -> bool {
    let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
    !ip.is_multicast() && !ip.is_unspecified() && !broadcast
}

/// Whether a packet is one that an error may answer (RFC 1122 §3.2.2, RFC 4443 §2.4 (e)).
fn is_answerable(packet: &[u8]) -> Option<bool> {
    const ECHO_REQUEST_V4: u8 = 8;
    /// ICMPv6 errors have types below this.
    const INFORMATION_V6: u8 = 128;
    if packet.first()? >> 4 == 4 {
        let header_len = usize::from(packet.first()? & 0xf) * 4;
        let offset = u16::from_be_bytes(*packet.get(6..)?.first_chunk()?) & 0x1fff;
        let is_echo = packet.get(header_len) == Some(&ECHO_REQUEST_V4);
        Some(offset == 0 && (*packet.get(9)? != ICMPV4 || is_echo))
    } else {
        let is_information = packet.get(40).is_some_and(|kind| *kind >= INFORMATION_V6);
        Some(*packet.get(6)? != ICMPV6 || is_information)
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    use super::*;

    fn udp(builder: etherparse::PacketBuilderStep<etherparse::IpHeaders>) -> Vec<u8> {
        let mut packet = Vec::new();
        builder.udp(1, 2).write(&mut packet, &[7; 900]).unwrap();
        packet
    }

    #[test]
    fn the_answer_is_a_right_one_in_both_families() {
        let v4 = udp(PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64));
        let v6 = udp(PacketBuilder::ipv6([1; 16], [2; 16], 64));
        for packet in [v4, v6] {
            let mut out = [0; LEN_MAX];
            let len = no_route(&packet, &mut out).unwrap();
            let answer = SlicedPacket::from_ip(&out[..len]).unwrap();
            match (answer.net.unwrap(), answer.transport.unwrap()) {
                (NetSlice::Ipv4(ip), TransportSlice::Icmpv4(icmp)) => {
                    assert_eq!(ip.header().destination(), [10, 0, 0, 1]);
                    assert_eq!((icmp.type_u8(), icmp.code_u8()), (3, 1));
                    assert!(Sum::default().add(icmp.slice()).is_valid());
                    assert!(packet.starts_with(icmp.payload()));
                }
                (NetSlice::Ipv6(ip), TransportSlice::Icmpv6(icmp)) => {
                    let header = ip.header();
                    assert_eq!(header.destination(), [1; 16]);
                    assert_eq!((icmp.type_u8(), icmp.code_u8()), (1, 3));
                    assert!(icmp.is_checksum_valid(header.source(), header.destination()));
                    assert!(packet.starts_with(icmp.payload()));
                }
                other => panic!("{other:?}"),
            }
            // An error about an error is never sent.
            assert_eq!(no_route(&out[..len], &mut [0; LEN_MAX]), None);
        }
    }

    #[test]
    fn groups_and_later_fragments_are_not_answered() {
        let mut fragment = udp(PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64));
        fragment[7] = 9;
        let group = udp(PacketBuilder::ipv4([10, 0, 0, 1], [224, 0, 0, 2], 64));
        let group_v6 = udp(PacketBuilder::ipv6([1; 16], [0xff; 16], 64));
        for packet in [fragment, group, group_v6] {
            assert_eq!(no_route(&packet, &mut [0; LEN_MAX]), None);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(first in prop_oneof![Just(0x45_u8), Just(0x60)], rest: Vec<u8>) {
            no_route(&[&[first][..], &rest].concat(), &mut [0; LEN_MAX]);
        }
    }
}
