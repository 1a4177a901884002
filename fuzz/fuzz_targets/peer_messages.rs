//! What the cores of two nodes say to each other, as a payload and as a whole packet.

#![no_main]

use std::net::Ipv6Addr;

use libfuzzer_sys::fuzz_target;
use mesh_wire::peer::{CONTROL_PORT, PeerMessage};

const ONE: Ipv6Addr = Ipv6Addr::new(0xfd12, 0, 0, 0, 0, 0, 0, 1);
const OTHER: Ipv6Addr = Ipv6Addr::new(0xfd12, 0, 0, 0, 0, 0, 0, 2);

/// Behind the headers that a control packet has.
fn packet(payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(8 + payload.len()).unwrap_or(u16::MAX);
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(len.to_be_bytes());
    packet.extend([17, 64]);
    packet.extend(ONE.octets());
    packet.extend(OTHER.octets());
    packet.extend(
        [CONTROL_PORT, CONTROL_PORT, len, 0]
            .map(u16::to_be_bytes)
            .concat(),
    );
    packet.extend(payload);
    packet
}

fuzz_target!(|bytes: &[u8]| {
    assert!(!PeerMessage::is_control(bytes, OTHER) || bytes.len() >= 48);
    let headed = packet(bytes);
    assert!(PeerMessage::is_control(&headed, OTHER));
    for packet in [bytes, &headed] {
        if let Ok((_, message)) = PeerMessage::from_packet(packet) {
            let again = message.to_packet(ONE, OTHER);
            assert_eq!(PeerMessage::from_packet(&again), Ok((ONE, message)));
        }
    }
});
