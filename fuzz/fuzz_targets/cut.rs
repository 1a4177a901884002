//! Super-packets with any offload header. The kernel makes them, but from what a container's process
//! hands to a packet socket.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_linux::tun::VnetHeader;
use mesh_tunnel::internals;

fuzz_target!(|framed: &[u8]| {
    let mut room = vec![0; 1 << 20];
    let (mut packets, mut longest) = (0, 0);
    let cut = internals::cut(framed, &mut room, |packet| {
        packets += 1;
        longest = longest.max(packet.len());
        assert!(internals::packet_len(packet).is_none_or(|len| len <= packet.len()));
    });
    if cut.is_some() {
        let packet = framed.len() - VnetHeader::LEN;
        assert!(longest <= packet && (packets > 0 || packet == 0));
    }
});
