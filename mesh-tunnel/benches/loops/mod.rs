//! The packet path's inner loops on fixed input: the same for `criterion` (`../inner.rs`) and for
//! counting instructions (`../../examples/instructions.rs`).

use std::{
    hint::black_box,
    net::{IpAddr, Ipv4Addr},
    time::Instant,
};

use etherparse::PacketBuilder;
use ipnet::IpNet;
use mesh_linux::tun::VnetHeader;
use mesh_tunnel::{
    internals::{self, Coalescer, FairQueue},
    route::RouteTable,
};
use mesh_wire::id::NodeId;
use mesh_wireguard::message::{DATA_HEADER_LEN, OVERHEAD};

/// A loop's body, and how many packets it handles each time.
pub(crate) struct Loop {
    pub(crate) packets: u64,
    pub(crate) body: Box<dyn FnMut()>,
}

/// Makes a loop, which may take long.
type Make = fn() -> Loop;

/// Every loop by its name.
pub(crate) const ALL: &[(&str, Make)] = &[
    ("split/45 segments", split),
    ("coalesce/45 segments", coalesce),
    ("seal/1420 bytes", || seal(1)),
    ("seal/45 packets", || seal(SEGMENTS)),
    ("open/1420 bytes", || open(1)),
    ("open/45 packets", || open(SEGMENTS)),
    ("look up/1 prefix", || look_up(1)),
    ("look up/100 prefixes", || look_up(100)),
    ("look up/100000 prefixes", || look_up(100_000)),
    ("fair queue/1420 bytes, 16 flows", || queue(1368)),
    ("fair queue/64 KiB, 16 flows", || queue(SEGMENTS * SEGMENT)),
];

/// What the kernel makes of 64 KiB at an MTU of 1420 with TCP timestamps: 45 full segments.
const SEGMENTS: usize = 45;
const SEGMENT: usize = 1368;
const PACKET: usize = 1420;

/// A TCP packet of flow `port`, behind room for an offload header.
fn tcp(port: u16, payload_len: usize) -> Vec<u8> {
    let timestamps = [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2];
    let payload: Vec<u8> = (0..=250).cycle().take(payload_len).collect();
    let builder = PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
        .tcp(port, 80, 1, 500)
        .ack(77)
        .options_raw(&timestamps)
        .unwrap();
    let mut framed = VnetHeader::default().to_bytes().to_vec();
    builder.write(&mut framed, &payload).unwrap();
    framed
}

/// The super-packet as a TUN device gives it out.
fn super_packet() -> Vec<u8> {
    let mut framed = tcp(1000, SEGMENTS * SEGMENT);
    let header = VnetHeader {
        flags: VnetHeader::NEEDS_CHECKSUM,
        gso_type: VnetHeader::GSO_TCPV4,
        header_len: 52,
        gso_size: u16::try_from(SEGMENT).unwrap(),
        checksum_start: 20,
        checksum_offset: 16,
    };
    framed[..VnetHeader::LEN].copy_from_slice(&header.to_bytes());
    framed
}

fn split() -> Loop {
    let framed = super_packet();
    let mut room = vec![0; SEGMENTS * PACKET];
    Loop {
        packets: SEGMENTS as u64,
        body: Box::new(move || {
            let cut = internals::cut(black_box(&framed), &mut room, |packet| {
                black_box(packet);
            });
            assert!(cut.is_some());
        }),
    }
}

fn coalesce() -> Loop {
    let mut packets = Vec::new();
    internals::cut(&super_packet(), &mut [0; SEGMENTS * PACKET], |packet| {
        packets.push([&[0; VnetHeader::LEN][..], packet].concat());
    })
    .unwrap();
    let first = packets.first().cloned().unwrap_or_default();
    Loop {
        packets: SEGMENTS as u64,
        body: Box::new(move || {
            // Its headers were made those of all.
            packets.first_mut().unwrap().copy_from_slice(&first);
            let (mut coalescer, mut written) = (Coalescer::new(true), 0);
            for packet in &mut packets {
                coalescer.push(black_box(packet), |_| written += 1);
            }
            coalescer.flush(|pieces| {
                written += black_box(pieces)
                    .iter()
                    .map(|piece| piece.len())
                    .sum::<usize>();
            });
            assert_eq!(written, VnetHeader::LEN + 52 + SEGMENTS * SEGMENT);
        }),
    }
}

/// Sealing in place, which does not care what it seals: the same bytes again and again.
fn seal(count: usize) -> Loop {
    let [session, _] = internals::sessions(Instant::now()).unwrap();
    let mut datagrams = vec![0; count * (PACKET + OVERHEAD)];
    Loop {
        packets: count as u64,
        body: Box::new(move || {
            let first = session.reserve(count).unwrap();
            let each = datagrams.chunks_mut(PACKET + OVERHEAD);
            for (counter, datagram) in (first..).zip(each) {
                assert!(session.seal(counter, black_box(datagram)));
            }
        }),
    }
}

/// Opening in place, and the replay window. It needs a sealed packet, so it begins with a copy of one.
fn open(count: usize) -> Loop {
    let now = Instant::now();
    let [from, to] = internals::sessions(now).unwrap();
    let mut sealed = vec![0; count * (PACKET + OVERHEAD)];
    let first = from.reserve(count).unwrap();
    for (counter, datagram) in (first..).zip(sealed.chunks_mut(PACKET + OVERHEAD)) {
        datagram[DATA_HEADER_LEN..].fill(7);
        assert!(from.seal(counter, datagram));
    }
    let mut datagrams = sealed.clone();
    let mut fresh = 0..;
    Loop {
        packets: count as u64,
        body: Box::new(move || {
            let each = datagrams.chunks_mut(PACKET + OVERHEAD);
            for (datagram, sealed) in each.zip(sealed.chunks(PACKET + OVERHEAD)) {
                datagram.copy_from_slice(sealed);
                let (_, plain) = to.open(black_box(datagram), now).unwrap();
                assert_eq!(plain.len(), PACKET);
                to.window().accept(fresh.next().unwrap()).unwrap();
            }
        }),
    }
}

/// Random addresses among `count` prefixes of which each is somebody else's.
fn look_up(count: u32) -> Loop {
    let address = |n: u32| Ipv4Addr::from(0x0a00_0000 + (n << 6));
    let table: RouteTable = (0..count)
        .map(|n| {
            let net = IpNet::new(address(n).into(), 26).unwrap();
            let mut id = [0; 32];
            id[..4].copy_from_slice(&n.to_le_bytes());
            (net, NodeId(id))
        })
        .collect();
    let mut n = 0_u32;
    Loop {
        packets: 1,
        body: Box::new(move || {
            // A step without a common factor visits all, in no order that a cache would like.
            n = (n + 40_503) % count;
            let ip = IpAddr::from(black_box(address(n)));
            assert!(black_box(table.get(ip)).is_some());
        }),
    }
}

/// In and out again, with a packet of each of 16 flows waiting.
fn queue(payload_len: usize) -> Loop {
    let now = Instant::now();
    let packets: Vec<_> = (0..16).map(|flow| tcp(1000 + flow, payload_len)).collect();
    let mut queue = FairQueue::new(1);
    Loop {
        packets: packets.len() as u64,
        body: Box::new(move || {
            for framed in &packets {
                // The kernel writes the rest of it.
                let head = black_box(&framed[..128]);
                assert_eq!(queue.push(head, framed.len(), now), 0);
            }
            let out = std::iter::from_fn(|| queue.pop(now)).count();
            assert_eq!(out, packets.len());
        }),
    }
}
