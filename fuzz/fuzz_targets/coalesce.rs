//! Packets of any kind, joined and cut again: each comes out once, its flow in order.

#![no_main]

use std::{collections::HashMap, io::IoSlice};

use libfuzzer_sys::fuzz_target;
use mesh_linux::tun::VnetHeader;
use mesh_tunnel::internals::{self, Coalescer};

/// One packet: what a template becomes by changing some bytes.
type Change = (u8, u8, [u8; 4], bool);

/// The Internet checksum over `parts`, each of which but the last has an even length.
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let mut sum = 0_u32;
    for pair in parts.iter().flat_map(|part| part.chunks(2)) {
        sum += u32::from(u16::from_be_bytes([
            pair[0],
            pair.get(1).copied().unwrap_or(0),
        ]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).unwrap()).to_be_bytes()
}

/// A packet of one of eight flows, a byte or two of which are changed before the checksums are made.
fn packet(change: &Change, sequence: &mut u32) -> Vec<u8> {
    let &(kind, len, [at, to, also_at, also_to], right) = change;
    let (v4, tcp, port) = (kind & 1 == 0, kind & 2 == 0, kind >> 2 & 3);
    let payload = vec![len; usize::from(len)];
    let mut transport = vec![0, port, 0, 80];
    if tcp {
        transport.extend(sequence.to_be_bytes());
        transport.extend([0, 0, 0, 7, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
        *sequence = sequence.wrapping_add(len.into());
    } else {
        transport.extend([0, len.saturating_add(8), 0, 0]);
    }
    transport.extend(payload);
    let total = u16::try_from(transport.len()).unwrap();
    let protocol = if tcp { 6 } else { 17 };
    let mut packet = if v4 {
        let [high, low] = (total + 20).to_be_bytes();
        vec![
            0x45, 0, high, low, 0, 0, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ]
    } else {
        let [high, low] = total.to_be_bytes();
        [
            &[0x60, 0, 0, 0, high, low, protocol, 64][..],
            &[1; 16],
            &[2; 16],
        ]
        .concat()
    };
    let transport_at = packet.len();
    packet.extend(transport);
    for (at, to) in [(at, to), (also_at, also_to)] {
        if let Some(byte) = packet.get_mut(usize::from(at)).filter(|_| at > 0) {
            *byte = to;
        }
    }
    if right {
        let (ip, transport) = packet.split_at_mut(transport_at);
        let at = if tcp { 16 } else { 6 };
        transport[at..at + 2].fill(0);
        let addresses = if v4 { &ip[12..] } else { &ip[8..] };
        let sum = checksum(&[addresses, &[0, protocol], &total.to_be_bytes(), transport]);
        transport[at..at + 2].copy_from_slice(&sum);
        if v4 {
            ip[10..12].fill(0);
            let sum = checksum(&[ip]);
            ip[10..12].copy_from_slice(&sum);
        }
    }
    packet
}

/// What is common to the packets of a flow, and the packet without what cutting renews: IPv4's
/// identification and its checksum.
fn flow(mut packet: Vec<u8>) -> (Vec<u8>, Vec<u8>) {
    if packet.first().is_some_and(|first| first >> 4 == 4) && packet.len() >= 20 {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    let parts = if packet.first() == Some(&0x45) {
        [0..1, 9..10, 12..24]
    } else {
        [0..1, 6..7, 8..44]
    };
    let key = parts
        .map(|part| packet.get(part).unwrap_or_default())
        .concat();
    (key, packet)
}

/// What the kernel gathers.
fn whole(pieces: &[IoSlice<'_>]) -> Vec<u8> {
    let bytes = pieces.iter().flat_map(|piece| piece.iter());
    bytes.copied().collect()
}

fuzz_target!(|input: (bool, Vec<Change>)| {
    let (udp, changes) = input;
    let mut sequences = [0_u32; 256];
    let pushed = changes.iter().take(200);
    let pushed = pushed.map(|change| packet(change, &mut sequences[usize::from(change.0 & 15)]));
    let pushed: Vec<_> = pushed.collect();
    let framed = pushed.iter();
    let framed = framed.map(|packet| [&[0; VnetHeader::LEN][..], packet].concat());
    let mut framed: Vec<_> = framed.collect();
    let (mut coalescer, mut written) = (Coalescer::new(udp), Vec::new());
    for framed in &mut framed {
        coalescer.push(framed, |pieces| written.push(whole(pieces)));
    }
    coalescer.flush(|pieces| written.push(whole(pieces)));
    let mut room = vec![0; 1 << 20];
    let mut came: HashMap<_, Vec<_>> = HashMap::new();
    for framed in &written {
        let cut = internals::cut(framed, &mut room, |packet| {
            let (key, packet) = flow(packet.to_vec());
            came.entry(key).or_default().push(packet);
        });
        assert!(cut.is_some(), "the kernel would not take it");
    }
    let mut expected: HashMap<_, Vec<_>> = HashMap::new();
    for packet in pushed {
        let (key, packet) = flow(packet);
        expected.entry(key).or_default().push(packet);
    }
    assert_eq!(came, expected);
});
