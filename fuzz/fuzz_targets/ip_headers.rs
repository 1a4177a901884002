//! The other places that look into IP headers: lengths, congestion marks, ICMP errors, the fair queue's
//! flows.

#![no_main]

use std::{cell::RefCell, time::Instant};

use libfuzzer_sys::fuzz_target;
use mesh_linux::{tun::READ_LEN_MAX, udp::Ecn};
use mesh_tunnel::internals::{self, FairQueue};

thread_local! {
    static QUEUE: RefCell<FairQueue> = RefCell::new(FairQueue::new(8));
}

fuzz_target!(|bytes: &[u8]| {
    if let Some(len) = internals::packet_len(bytes) {
        assert!((20..=bytes.len()).contains(&len));
    }
    for outer in [
        Ecn::NotCapable,
        Ecn::Capable1,
        Ecn::Capable0,
        Ecn::Congested,
    ] {
        let mut packet = bytes.to_vec();
        internals::merge_ecn(outer, &mut packet);
        // No IPv4 header is longer than 60 bytes.
        assert_eq!(packet.get(60..), bytes.get(60..));
    }
    if let Some(len) = internals::no_route(bytes) {
        assert!(len <= 576);
    }
    let now = Instant::now();
    let framed = &bytes[..bytes.len().min(READ_LEN_MAX)];
    QUEUE.with_borrow_mut(|queue| {
        assert_eq!(queue.push(framed, framed.len(), now), 0);
        assert_eq!(queue.pop(now), Some(framed.len()));
        assert_eq!(queue.pop(now), None);
    });
});
