use std::collections::BTreeMap;

use etherparse::PacketBuilder;
use proptest::prelude::*;

use super::*;

/// A packet with what may differ from one to the next.
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    pub(crate) flow: u8,
    pub(crate) payload_len: usize,
    pub(crate) psh: bool,
    pub(crate) fin: bool,
    /// DSCP and congestion.
    pub(crate) traffic_class: u8,
    pub(crate) odd: Odd,
}

/// Something that is rare, and mostly keeps a packet from joining.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Odd {
    No,
    Lost,
    Syn,
    Rst,
    Urg,
    Ece,
    Cwr,
    Window,
    Timestamps,
    HopLimit,
    BadChecksum,
    /// Of the IPv4 header.
    BadHeaderChecksum,
    /// UDP without checksum, whose bytes would sum up to zero.
    NoChecksum,
    /// A packet whose checksum comes out as zero, which UDP writes as 0xffff.
    SumOfZero,
    FirstFragment,
    LaterFragment,
    /// IPv4 options, or an IPv6 extension header.
    Extension,
}

impl Piece {
    pub(crate) fn is_tcp(&self) -> bool {
        self.flow % 4 < 2
    }

    pub(crate) fn is_fragment(&self) -> bool {
        matches!(self.odd, Odd::FirstFragment | Odd::LaterFragment)
    }

    fn is_v4(&self) -> bool {
        self.flow.is_multiple_of(2)
    }

    /// The packet with its payload. Flows 0 and 1 are TCP over IPv4 and IPv6, 2 and 3 UDP; more by
    /// other ports, and from 8 on by another address with the ports of the first.
    pub(crate) fn packet(&self, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut packet = self.plain(sequence, payload);
        let (transport_at, udp) = (if self.is_v4() { 20 } else { 40 }, !self.is_tcp());
        let sum_of_zero = matches!(self.odd, Odd::SumOfZero | Odd::NoChecksum);
        if sum_of_zero && payload.len() >= 2 {
            // With its own checksum in place of two bytes that were zero, all sums up to zero.
            let mut payload = payload.to_vec();
            payload[..2].fill(0);
            packet = self.plain(sequence, &payload);
            let at = transport_at + if udp { 6 } else { 16 };
            let word = [packet[at], packet[at + 1]];
            payload[..2].copy_from_slice(&word);
            packet = self.plain(sequence, &payload);
            assert_eq!(packet[at..at + 2], if udp { [0xff; 2] } else { [0; 2] });
        }
        if self.odd == Odd::BadChecksum {
            *packet.last_mut().unwrap() ^= 1;
        }
        if self.odd == Odd::NoChecksum && udp {
            packet[transport_at + 6..transport_at + 8].fill(0);
        }
        if self.is_fragment() || self.odd == Odd::Extension {
            self.extend(&mut packet);
        }
        if self.is_v4() {
            packet[1] = self.traffic_class;
            let header_len = usize::from(packet[0] & 0xf) * 4;
            segment::write_ipv4_checksum(&mut packet[..header_len]).unwrap();
            packet[10] ^= u8::from(self.odd == Odd::BadHeaderChecksum);
        } else {
            packet[0] |= self.traffic_class >> 4;
            packet[1] |= self.traffic_class << 4;
        }
        packet
    }

    fn plain(&self, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let ports = (1000 + u16::from(self.flow % 8), 80);
        let from = 1 + self.flow / 8;
        let hops = if self.odd == Odd::HopLimit { 9 } else { 64 };
        let ip = if self.is_v4() {
            PacketBuilder::ipv4([10, 0, 0, from], [10, 0, 0, 9], hops)
        } else {
            PacketBuilder::ipv6([from; 16], [9; 16], hops)
        };
        let mut packet = Vec::new();
        if !self.is_tcp() {
            let udp = ip.udp(ports.0, ports.1);
            udp.write(&mut packet, payload).unwrap();
            return packet;
        }
        let window = if self.odd == Odd::Window { 7 } else { 500 };
        let mut tcp = ip.tcp(ports.0, ports.1, sequence, window).ack(77);
        tcp = if self.psh { tcp.psh() } else { tcp };
        tcp = if self.fin { tcp.fin() } else { tcp };
        let is = |odd: Odd| self.odd == odd;
        tcp = if is(Odd::Syn) { tcp.syn() } else { tcp };
        tcp = if is(Odd::Rst) { tcp.rst() } else { tcp };
        tcp = if is(Odd::Urg) { tcp.urg(5) } else { tcp };
        tcp = if is(Odd::Ece) { tcp.ece() } else { tcp };
        tcp = if is(Odd::Cwr) { tcp.cwr() } else { tcp };
        let clock = u8::from(self.odd == Odd::Timestamps);
        let options = [1, 1, 8, 10, 0, 0, 0, 1 + clock, 0, 0, 0, 2];
        let tcp = tcp.options_raw(&options).unwrap();
        tcp.write(&mut packet, payload).unwrap();
        packet
    }

    /// Puts in what makes it a fragment, or an IP header longer.
    fn extend(&self, packet: &mut Vec<u8>) {
        let offset = u8::from(self.odd == Odd::LaterFragment);
        if self.odd != Odd::Extension && self.is_v4() {
            packet[4..8].copy_from_slice(&[7, 7, 0x20, offset]);
            return;
        }
        let (at, bytes, length_at): (_, &[u8], _) = if self.is_v4() {
            packet[0] = 0x46;
            (20, &[1, 1, 1, 0], 2)
        } else {
            let kind = if self.odd == Odd::Extension { 0 } else { 44 };
            let next = std::mem::replace(&mut packet[6], kind);
            // A pad of six bytes, or offset, "more" and identification.
            let pad = [next, 0, 1, 4, 0, 0, 0, 0];
            let fragment = [next, 0, 0, offset << 3 | 1, 0, 0, 0, 7];
            (40, &if kind == 0 { pad } else { fragment }, 4)
        };
        packet.splice(at..at, bytes.iter().copied());
        let len = &mut packet[length_at..length_at + 2];
        let longer = u16::from_be_bytes([len[0], len[1]]) + u16::try_from(bytes.len()).unwrap();
        len.copy_from_slice(&longer.to_be_bytes());
    }
}

/// Payload that differs from packet to packet.
pub(crate) fn payload(len: usize, fill: u8) -> Vec<u8> {
    let bytes = (0..len).map(|i| fill.wrapping_add(i.to_le_bytes()[0]));
    bytes.collect()
}

/// What the kernel is given for `packets`, offload header first.
fn coalesce(packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut written = Vec::new();
    let framed = packets
        .iter()
        .map(|packet| [&[0xee; VnetHeader::LEN][..], packet].concat());
    let mut framed: Vec<_> = framed.collect();
    let mut coalescer = Coalescer::new(true);
    let mut write = |pieces: &[IoSlice<'_>]| written.push(whole(pieces));
    for framed in &mut framed {
        coalescer.push(framed, &mut write);
    }
    coalescer.flush(&mut write);
    written
}

/// What the kernel gathers.
pub(crate) fn whole(pieces: &[IoSlice<'_>]) -> Vec<u8> {
    let bytes = pieces.iter().flat_map(|piece| piece.iter());
    bytes.copied().collect()
}

/// What the kernel makes of it.
pub(crate) fn cut(framed: &[u8]) -> Vec<Vec<u8>> {
    let (header, packet) = VnetHeader::split(framed).unwrap();
    let cut = segment::Cut::new(header, packet).unwrap();
    let packets = (0..cut.count()).map(|index| {
        let mut packet = vec![0; cut.len(index)];
        cut.write(index, &mut packet).unwrap();
        packet
    });
    packets.collect()
}

/// The packets of each flow in order, without the identification of IPv4 packets that are no fragments,
/// which cutting renews; in place of the header's checksum stands whether it was right.
pub(crate) fn by_flow(
    packets: impl IntoIterator<Item = Vec<u8>>,
) -> BTreeMap<Vec<u8>, Vec<Vec<u8>>> {
    let mut flows = BTreeMap::<_, Vec<_>>::new();
    for mut packet in packets {
        let at = match packet[0] >> 4 {
            4 => usize::from(packet[0] & 0xf) * 4,
            _ if [6, 17].contains(&packet[6]) => 40,
            _ => 48,
        };
        if packet[0] >> 4 == 4 {
            let valid = Sum::default().add(&packet[..at]).is_valid();
            packet[10..12].copy_from_slice(&[u8::from(valid); 2]);
            if packet[6] & 0x3f == 0 && packet[7] == 0 {
                packet[4..6].fill(0);
            }
        }
        let addresses = segment::addresses(&packet).unwrap();
        let flow = [addresses, &packet[at..at + 2]].concat();
        flows.entry(flow).or_default().push(packet);
    }
    flows
}

pub(crate) fn piece() -> impl Strategy<Value = Piece> {
    let odd = prop_oneof![
        30 => Just(Odd::No),
        1 => Just(Odd::Lost),
        1 => Just(Odd::Syn),
        1 => Just(Odd::Rst),
        1 => Just(Odd::Urg),
        1 => Just(Odd::Ece),
        1 => Just(Odd::Cwr),
        1 => Just(Odd::Window),
        1 => Just(Odd::Timestamps),
        1 => Just(Odd::HopLimit),
        1 => Just(Odd::BadChecksum),
        1 => Just(Odd::BadHeaderChecksum),
        1 => Just(Odd::NoChecksum),
        1 => Just(Odd::SumOfZero),
        1 => Just(Odd::FirstFragment),
        1 => Just(Odd::LaterFragment),
        1 => Just(Odd::Extension),
    ];
    let len = prop_oneof![6 => Just(1228_usize), 1 => 1_usize..1300, 1 => Just(0)];
    let class = prop_oneof![8 => Just(0_u8), 1 => Just(0b10), 1 => any::<u8>()];
    let rarely = || prop::bool::weighted(0.1);
    (
        0_u8..12,
        len,
        rarely(),
        prop::bool::weighted(0.03),
        class,
        odd,
    )
        .prop_map(|(flow, payload_len, psh, fin, traffic_class, odd)| Piece {
            flow,
            payload_len,
            psh,
            fin,
            traffic_class,
            odd,
        })
}

fn packets_of(pieces: &[Piece]) -> Vec<Vec<u8>> {
    let mut sequences = BTreeMap::<u8, u32>::new();
    let numbered = pieces.iter().zip(0_u8..=255).map(|(piece, fill)| {
        let sequence = sequences.entry(piece.flow).or_insert(u32::MAX - 3000);
        if piece.odd == Odd::Lost {
            *sequence = sequence.wrapping_add(1228);
        }
        let packet = piece.packet(*sequence, &payload(piece.payload_len, fill));
        *sequence = sequence.wrapping_add(len_u32(piece.payload_len));
        packet
    });
    numbered.collect()
}

proptest! {
    #[test]
    fn any_mix_of_flows_comes_out_as_it_went_in(
        runs in prop::collection::vec((piece(), 1_usize..4), 0..80),
    ) {
        let each = runs.into_iter().flat_map(|(piece, count)| std::iter::repeat_n(piece, count));
        let pieces: Vec<_> = each.collect();
        let packets = packets_of(&pieces);
        let written = coalesce(&packets);
        prop_assert!(written.len() <= packets.len());
        let cut = written.iter().flat_map(|framed| cut(framed));
        prop_assert_eq!(by_flow(cut), by_flow(packets));
    }

    #[test]
    fn no_bytes_make_it_panic_and_all_are_written(packets: Vec<Vec<u8>>) {
        let written = coalesce(&packets);
        let bytes: usize = written.iter().map(|framed| framed.len() - VnetHeader::LEN).sum();
        prop_assert_eq!(bytes, packets.iter().map(Vec::len).sum::<usize>());
    }

    #[test]
    fn no_header_makes_cutting_panic(
        kinds in (0_u8..2, 0_u8..8),
        lengths: (u16, u16, u16, u16),
        packet: Vec<u8>,
    ) {
        let header = VnetHeader {
            flags: kinds.0,
            gso_type: kinds.1,
            header_len: lengths.0,
            gso_size: lengths.1,
            checksum_start: lengths.2 % 64,
            checksum_offset: lengths.3 % 32,
        };
        if let Ok(cut) = segment::Cut::new(header, &packet) {
            for index in 0..cut.count() {
                cut.write(index, &mut vec![0; cut.len(index)]).ok();
            }
        }
    }
}

fn plain(flow: u8) -> Piece {
    Piece {
        flow,
        payload_len: 1228,
        psh: false,
        fin: false,
        traffic_class: 0,
        odd: Odd::No,
    }
}

#[test]
fn a_run_of_one_flow_becomes_one_super_packet() {
    for flow in 0..4 {
        let packets = packets_of(&vec![plain(flow); 40]);
        let written = coalesce(&packets);
        assert_eq!(written.len(), 1, "flow {flow}");
        assert_eq!(cut(&written[0]).len(), 40);
    }
}

#[test]
fn a_super_packet_never_exceeds_the_length_field() {
    let written = coalesce(&packets_of(&vec![plain(0); 150]));
    assert_eq!(written.len(), 3);
    assert!(
        written
            .iter()
            .all(|framed| framed.len() <= VnetHeader::LEN + PACKET_LEN_MAX)
    );
}

#[test]
fn two_flows_in_turn_become_two_super_packets() {
    let pieces: Vec<_> = (0..40).map(|i| plain(i % 2)).collect();
    assert_eq!(coalesce(&packets_of(&pieces)).len(), 2);
}

#[test]
fn identification_counts_up_in_the_packets_of_a_super_packet() {
    let written = coalesce(&packets_of(&[plain(0), plain(0), plain(0)]));
    let numbers: Vec<_> = cut(&written[0]).iter().map(|p| [p[4], p[5]]).collect();
    assert_eq!(numbers, [[0, 0], [0, 1], [0, 2]]);
}

#[test]
fn a_pure_acknowledgement_keeps_its_place() {
    let mut ack = plain(0);
    ack.payload_len = 0;
    let pieces = [plain(0), plain(0), ack, plain(0), plain(0)];
    let lens: Vec<_> = coalesce(&packets_of(&pieces))
        .iter()
        .map(|p| cut(p).len())
        .collect();
    assert_eq!(lens, [2, 1, 2]);
}

#[test]
fn a_wrong_checksum_is_passed_on_as_it_is() {
    let mut bad = plain(0);
    bad.odd = Odd::BadChecksum;
    let packets = packets_of(&[plain(0), bad, plain(0)]);
    let written = coalesce(&packets);
    assert_eq!(written.len(), 3);
    assert_eq!(written[1][VnetHeader::LEN..], packets[1]);
}
