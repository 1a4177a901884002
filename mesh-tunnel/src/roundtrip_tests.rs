//! A packet's whole way, without the kernel and the network: what goes into one tunnel comes out of the
//! other, each flow in order and byte for byte.

use std::{collections::BTreeMap, io::IoSlice, time::Instant};

use mesh_linux::{tun::VnetHeader, udp::Ecn};
use mesh_wireguard::{
    message::{DATA_HEADER_LEN, OVERHEAD},
    session::{Session, padded_len},
};
use proptest::prelude::*;

use crate::{
    checksum::Sum,
    coalesce::{
        Coalescer,
        tests::{Odd, Piece, by_flow, cut, payload, piece, whole},
    },
    ecn, internals, route,
    segment::{self, TCP, TCP_CHECKSUM_AT, UDP, UDP_CHECKSUM_AT},
};

/// What a tunnel reads in one call.
#[derive(Debug, Clone)]
struct Read {
    piece: Piece,
    /// A super-packet of so many full segments and the piece's own length; 0: an ordinary packet.
    full: usize,
    segment_len: usize,
    /// The kernel left the checksum to us.
    partial: bool,
    /// A router on the way was congested.
    congested: bool,
    /// The receiver's batch ends behind it.
    batch_end: bool,
}

impl Read {
    fn is_super(&self) -> bool {
        let odd = self.piece.odd;
        let plain = matches!(
            odd,
            Odd::No | Odd::Lost | Odd::Window | Odd::Timestamps | Odd::HopLimit | Odd::Extension
        ) || self.piece.is_tcp() && matches!(odd, Odd::Ece | Odd::Cwr);
        plain && self.full > 0
    }

    /// The payloads of its packets.
    fn payloads(&self, fill: u8) -> Vec<Vec<u8>> {
        if !self.is_super() {
            return vec![payload(self.piece.payload_len, fill)];
        }
        // Less than what the length field of IPv4 can say.
        let full = self.full.min(60_000 / self.segment_len);
        let last = self.piece.payload_len % self.segment_len;
        let lens = std::iter::repeat_n(self.segment_len, full).chain((last > 0).then_some(last));
        lens.map(|len| payload(len, fill)).collect()
    }

    /// What the kernel hands over.
    fn framed(&self, sequence: u32, payloads: &[Vec<u8>]) -> Vec<u8> {
        let mut packet = self.piece.packet(sequence, &payloads.concat());
        let v4 = packet[0] >> 4 == 4;
        let longer = usize::from(self.piece.odd == Odd::Extension);
        let transport_at = if v4 { 20 + 4 * longer } else { 40 + 8 * longer };
        let tcp = self.piece.is_tcp();
        let checksum_at = if tcp {
            TCP_CHECKSUM_AT
        } else {
            UDP_CHECKSUM_AT
        };
        let mut header = VnetHeader::default();
        let whole = !self.piece.is_fragment();
        let right = !matches!(self.piece.odd, Odd::BadChecksum | Odd::NoChecksum);
        if self.is_super() || self.partial && whole && right {
            header.flags = VnetHeader::NEEDS_CHECKSUM;
            header.checksum_start = transport_at.try_into().unwrap();
            header.checksum_offset = checksum_at.try_into().unwrap();
            let len = (packet.len() - transport_at).try_into().unwrap();
            let addresses = segment::addresses(&packet).unwrap();
            let protocol = if tcp { TCP } else { UDP };
            let sum = Sum::default().add_pseudo(addresses, protocol, len);
            packet[transport_at + checksum_at..][..2].copy_from_slice(&sum.partial());
        }
        if self.is_super() {
            header.gso_size = self.segment_len.try_into().unwrap();
            header.gso_type = match (tcp, v4) {
                (true, true) => VnetHeader::GSO_TCPV4,
                (true, false) => VnetHeader::GSO_TCPV6,
                _ => VnetHeader::GSO_UDP_L4,
            };
            if self.piece.odd == Odd::Cwr {
                header.gso_type |= 0x80; // VIRTIO_NET_HDR_GSO_ECN
            }
        }
        [&header.to_bytes()[..], &packet].concat()
    }

    /// What the other side's kernel must see of it, made without any of our code.
    fn expected(&self, mut sequence: u32, payloads: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        for (index, payload) in payloads.iter().enumerate() {
            let (first, last) = (index == 0, index + 1 == payloads.len());
            let mut piece = self.piece.clone();
            piece.psh &= last;
            piece.fin &= last;
            if piece.odd == Odd::Cwr && !first {
                piece.odd = Odd::No;
            }
            if self.congested {
                if Ecn::of(piece.traffic_class) == Ecn::NotCapable {
                    continue;
                }
                piece.traffic_class |= 0b11;
            }
            packets.push(piece.packet(sequence, payload));
            sequence = sequence.wrapping_add(payload.len().try_into().unwrap());
        }
        packets
    }
}

fn read() -> impl Strategy<Value = Read> {
    // Segments of an MTU of 1280, of ours on Ethernet, and of one on a jumbo underlay.
    let segment_len = prop_oneof![Just(1228_usize), Just(1368), Just(8868), 1_usize..9000];
    let full = prop_oneof![2 => Just(0_usize), 1 => 1_usize..60];
    let rarely = || prop::bool::weighted(0.1);
    let partial = any::<bool>();
    (piece(), full, segment_len, partial, rarely(), rarely()).prop_map(
        |(piece, full, segment_len, partial, congested, batch_end)| Read {
            piece,
            full,
            segment_len,
            partial,
            congested,
            batch_end,
        },
    )
}

/// From the read of one tunnel to what the other one's kernel has after the cut.
fn pass(reads: &[(Read, Vec<u8>)], mtu: usize, udp: bool) -> Vec<Vec<u8>> {
    let now = Instant::now();
    let [from, to] = internals::sessions(now).unwrap();
    let (mut written, mut batch) = (Vec::new(), Vec::new());
    for (read, framed) in reads {
        for packet in cut(framed) {
            let outer = if read.congested {
                Ecn::Congested
            } else {
                ecn::of(&packet)
            };
            let mut datagram = seal(&from, &packet, mtu);
            let (counter, plain) = to.open(&mut datagram, now).unwrap();
            to.window().accept(counter).unwrap();
            let len = route::packet_len(&datagram[plain.clone()]).unwrap();
            let end = plain.start + len;
            if ecn::merge(outer, &mut datagram[plain.start..end]).is_ok() {
                batch.push(datagram[DATA_HEADER_LEN - VnetHeader::LEN..end].to_vec());
            }
        }
        if read.batch_end {
            join(&mut batch, udp, &mut written);
        }
    }
    join(&mut batch, udp, &mut written);
    written
}

/// What the kernel has of a batch after the cut.
fn join(batch: &mut Vec<Vec<u8>>, udp: bool, written: &mut Vec<Vec<u8>>) {
    let mut coalescer = Coalescer::new(udp);
    let mut write = |pieces: &[IoSlice<'_>]| written.extend(cut(&whole(pieces)));
    for framed in batch.iter_mut() {
        coalescer.push(framed, &mut write);
    }
    coalescer.flush(&mut write);
    drop(coalescer);
    batch.clear();
}

fn seal(session: &Session, packet: &[u8], mtu: usize) -> Vec<u8> {
    let mut datagram = vec![0; padded_len(packet.len(), mtu) + OVERHEAD];
    datagram[DATA_HEADER_LEN..][..packet.len()].copy_from_slice(packet);
    assert!(session.seal(session.reserve(1).unwrap(), &mut datagram));
    datagram
}

proptest! {
    #[test]
    fn every_flow_arrives_in_order_byte_for_byte(
        runs in prop::collection::vec((read(), 1_usize..4), 0..40),
        mtu in prop_oneof![Just(1280_usize), Just(1420), Just(8920), Just(0)],
        udp: bool,
    ) {
        let mut sequences = BTreeMap::<u8, u32>::new();
        let (mut framed, mut expected) = (Vec::new(), Vec::new());
        let each = runs.into_iter().flat_map(|(read, count)| std::iter::repeat_n(read, count));
        for (fill, read) in (0_u8..).zip(each) {
            let sequence = sequences.entry(read.piece.flow).or_insert(u32::MAX - 100_000);
            if read.piece.odd == Odd::Lost {
                *sequence = sequence.wrapping_add(1228);
            }
            let payloads = read.payloads(fill);
            expected.extend(read.expected(*sequence, &payloads));
            let bytes = read.framed(*sequence, &payloads);
            let len: usize = payloads.iter().map(Vec::len).sum();
            *sequence = sequence.wrapping_add(u32::try_from(len).unwrap());
            framed.push((read, bytes));
        }
        let (came, expected) = (by_flow(pass(&framed, mtu, udp)), by_flow(expected));
        // Not `prop_assert_eq`: nobody reads 60 KiB of difference.
        for (flow, expected) in &expected {
            let came = came.get(flow).map_or(&[][..], Vec::as_slice);
            let place = came.iter().zip(expected).position(|(one, other)| one != other);
            let heads = place.map(|at| [&came[at], &expected[at]].map(|it| &it[..it.len().min(80)]));
            prop_assert_eq!(heads, None, "flow {:?}, packet {:?}", flow, place);
            prop_assert_eq!(came.len(), expected.len(), "flow {:?}", flow);
        }
        prop_assert_eq!(came.len(), expected.len());
    }
}
