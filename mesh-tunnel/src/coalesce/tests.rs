use std::collections::BTreeMap;

use etherparse::PacketBuilder;
use proptest::prelude::*;

use super::*;

/// A packet with what may differ from one to the next.
#[derive(Debug, Clone)]
struct Piece {
    flow: u8,
    payload_len: usize,
    psh: bool,
    fin: bool,
    odd: Odd,
}

/// Something that keeps a packet from joining.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Odd {
    No,
    Lost,
    Syn,
    Window,
    HopLimit,
    BadChecksum,
    Fragment,
}

/// Flows 0 and 1 are TCP over IPv4 and IPv6, 2 and 3 UDP; more by other ports.
fn packet(piece: &Piece, sequence: u32, fill: u8) -> Vec<u8> {
    let ports = (1000 + u16::from(piece.flow), 80);
    let hops = if piece.odd == Odd::HopLimit { 9 } else { 64 };
    let payload: Vec<u8> = (0..piece.payload_len)
        .map(|i| fill.wrapping_add(i.to_le_bytes()[0]))
        .collect();
    let ip = if piece.flow.is_multiple_of(2) {
        PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], hops)
    } else {
        PacketBuilder::ipv6([1; 16], [2; 16], hops)
    };
    let mut packet = Vec::new();
    if piece.flow % 4 < 2 {
        let window = if piece.odd == Odd::Window { 7 } else { 500 };
        let mut tcp = ip.tcp(ports.0, ports.1, sequence, window).ack(77);
        tcp = if piece.psh { tcp.psh() } else { tcp };
        tcp = if piece.fin { tcp.fin() } else { tcp };
        tcp = if piece.odd == Odd::Syn {
            tcp.syn()
        } else {
            tcp
        };
        let options = [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2];
        tcp.options_raw(&options)
            .unwrap()
            .write(&mut packet, &payload)
            .unwrap();
    } else {
        ip.udp(ports.0, ports.1)
            .write(&mut packet, &payload)
            .unwrap();
    }
    if piece.odd == Odd::BadChecksum {
        *packet.last_mut().unwrap() ^= 1;
    }
    if piece.odd == Odd::Fragment && piece.flow.is_multiple_of(2) {
        packet[6] |= 0x20;
        segment::write_ipv4_checksum(&mut packet[..20]).unwrap();
    }
    packet
}

/// What the kernel is given for `packets`, offload header first.
fn coalesce(packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut written = Vec::new();
    let mut coalescer = Coalescer::new(true);
    let mut write = |framed: &[u8]| written.push(framed.to_vec());
    for packet in packets {
        let mut framed = [&[0xee; VnetHeader::LEN][..], packet].concat();
        coalescer.push(&mut framed, &mut write);
    }
    coalescer.flush(&mut write);
    written
}

/// What the kernel makes of it.
fn cut(framed: &[u8]) -> Vec<Vec<u8>> {
    let (header, packet) = VnetHeader::split(framed).unwrap();
    let cut = segment::Cut::new(header, packet).unwrap();
    let packets = (0..cut.count()).map(|index| {
        let mut packet = vec![0; cut.len(index)];
        cut.write(index, &mut packet).unwrap();
        packet
    });
    packets.collect()
}

/// The packets of each flow in order, without IPv4's identification, which cutting renews.
fn by_flow(packets: impl IntoIterator<Item = Vec<u8>>) -> BTreeMap<Vec<u8>, Vec<Vec<u8>>> {
    let mut flows = BTreeMap::<_, Vec<_>>::new();
    for mut packet in packets {
        let at = if packet[0] >> 4 == 4 { 20 } else { 40 };
        if at == 20 {
            packet[4..6].fill(0);
            packet[10..12].fill(0);
        }
        flows
            .entry(packet[at..at + 2].to_vec())
            .or_default()
            .push(packet);
    }
    flows
}

fn piece() -> impl Strategy<Value = Piece> {
    let odd = prop_oneof![
        20 => Just(Odd::No),
        1 => Just(Odd::Lost),
        1 => Just(Odd::Syn),
        1 => Just(Odd::Window),
        1 => Just(Odd::HopLimit),
        1 => Just(Odd::BadChecksum),
        1 => Just(Odd::Fragment),
    ];
    let len = prop_oneof![6 => Just(1228_usize), 1 => 1_usize..1300, 1 => Just(0)];
    let rarely = || prop::bool::weighted(0.1);
    (0_u8..12, len, rarely(), prop::bool::weighted(0.03), odd).prop_map(
        |(flow, payload_len, psh, fin, odd)| Piece {
            flow,
            payload_len,
            psh,
            fin,
            odd,
        },
    )
}

fn packets_of(pieces: &[Piece]) -> Vec<Vec<u8>> {
    let mut sequences = BTreeMap::<u8, u32>::new();
    let numbered = pieces.iter().zip(0_u8..=255).map(|(piece, fill)| {
        let sequence = sequences.entry(piece.flow).or_insert(u32::MAX - 3000);
        if piece.odd == Odd::Lost {
            *sequence = sequence.wrapping_add(1228);
        }
        let packet = packet(piece, *sequence, fill);
        *sequence = sequence.wrapping_add(len_u32(piece.payload_len));
        packet
    });
    numbered.collect()
}

proptest! {
    #[test]
    fn any_mix_of_flows_comes_out_as_it_went_in(pieces in prop::collection::vec(piece(), 0..200)) {
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
