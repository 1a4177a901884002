//! Explicit congestion notification across the tunnel (RFC 6040), and why nothing else of the
//! traffic class crosses it.
//!
//! The outer header carries the inner one's congestion bits and nothing else of its traffic class: what
//! kind of traffic a packet is (DSCP) is not shown to the networks between, as the kernel's
//! WireGuard does it, and the inner header arrives as it was sent.

use mesh_linux::udp::Ecn;

use crate::checksum::Sum;

/// The inner packet's bits, which the outer header gets (RFC 6040 §4.1, normal mode).
pub(crate) fn of(packet: &[u8]) -> Ecn {
    traffic_class(packet).map_or(Ecn::NotCapable, Ecn::of)
}

/// Congestion was met on the way, by a packet whose sender would not understand that: drop it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MustDrop;

/// Brings what the outer header says into the packet that came out (RFC 6040 §4.2).
pub(crate) fn merge(outer: Ecn, packet: &mut [u8]) -> Result<(), MustDrop> {
    let inner = of(packet);
    let merged = match (outer, inner) {
        (Ecn::Congested, Ecn::NotCapable) => return Err(MustDrop),
        (Ecn::Congested, _) => Ecn::Congested,
        (Ecn::Capable1, Ecn::Capable0) => Ecn::Capable1,
        _ => inner,
    };
    if merged != inner {
        set(packet, merged);
    }
    Ok(())
}

fn traffic_class(packet: &[u8]) -> Option<u8> {
    let (&first, &second) = (packet.first()?, packet.get(1)?);
    match first >> 4 {
        4 => Some(second),
        6 => Some(first << 4 | second >> 4),
        _ => None,
    }
}

fn set(packet: &mut [u8], ecn: Ecn) {
    let Some([first, second, .., high, low]) = packet.first_chunk_mut::<12>() else {
        return;
    };
    if *first >> 4 == 6 {
        *second = *second & !0x30 | (ecn as u8) << 4;
        return;
    }
    let before = std::mem::replace(second, *second & !0b11 | ecn as u8);
    // As routers do it (RFC 1624 §3, equation 3), so that a wrong checksum stays wrong.
    let change = [!*high, !*low, !*first, !before, *first, *second];
    [*high, *low] = Sum::default().add(&change).checksum();
}

#[cfg(test)]
mod tests {
    use etherparse::{Ipv4HeaderSlice, PacketBuilder};

    use super::*;
    use crate::segment;

    const ALL: [Ecn; 4] = [
        Ecn::NotCapable,
        Ecn::Capable1,
        Ecn::Capable0,
        Ecn::Congested,
    ];

    fn packet(v6: bool, ecn: Ecn) -> Vec<u8> {
        let ip = if v6 {
            PacketBuilder::ipv6([1; 16], [2; 16], 64)
        } else {
            PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
        };
        let mut packet = Vec::new();
        ip.udp(1, 2).write(&mut packet, b"payload").unwrap();
        // Some DSCP that must survive, and a flow label.
        if v6 {
            packet[..2].copy_from_slice(&[0x6b, 0x8f]);
        } else {
            packet[1] = 0xb8;
            segment::write_ipv4_checksum(&mut packet[..20]).unwrap();
        }
        set(&mut packet, ecn);
        packet
    }

    #[test]
    fn every_pair_follows_the_table_of_rfc_6040() {
        let expected = |outer, inner| match (inner, outer) {
            (Ecn::NotCapable, Ecn::Congested) => None,
            (_, Ecn::Congested) => Some(Ecn::Congested),
            (Ecn::Capable0, Ecn::Capable1) => Some(Ecn::Capable1),
            (inner, _) => Some(inner),
        };
        for v6 in [false, true] {
            for inner in ALL {
                for outer in ALL {
                    let mut merged = packet(v6, inner);
                    assert_eq!(of(&merged), inner);
                    let result = merge(outer, &mut merged).ok().map(|()| of(&merged));
                    assert_eq!(result, expected(outer, inner), "{outer:?} {inner:?}");
                    if let Some(ecn) = result {
                        assert_eq!(merged, packet(v6, ecn), "only these bits change");
                    }
                    if !v6 {
                        let header = Ipv4HeaderSlice::from_slice(&merged).unwrap().to_header();
                        assert_eq!(header.calc_header_checksum(), header.header_checksum);
                    }
                }
            }
        }
    }

    #[test]
    fn a_wrong_checksum_is_not_made_right() {
        let mut packet = packet(false, Ecn::Capable0);
        packet[11] ^= 1;
        merge(Ecn::Congested, &mut packet).unwrap();
        let header = Ipv4HeaderSlice::from_slice(&packet).unwrap().to_header();
        assert_ne!(header.calc_header_checksum(), header.header_checksum);
    }

    #[test]
    fn bytes_that_are_no_packet_are_left_alone() {
        for mut bytes in [vec![], vec![0x45], vec![0x4f, 1, 2], vec![0xff; 40]] {
            let before = bytes.clone();
            merge(Ecn::Capable1, &mut bytes).unwrap();
            assert_eq!(bytes, before);
        }
    }
}
