//! The inner loops one by one, for what stands outside the crate and has to reach them: `benches/`,
//! `cargo xtask instructions` and `fuzz/`. Hidden, because it is no part of the interface: it changes
//! with the code behind it.

use std::{
    io::IoSlice,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_linux::{tun::VnetHeader, udp::Ecn};
use mesh_wireguard::{
    keys::{LocalKey, PresharedKey},
    peer::{Peer, Received},
    session::Session,
};

use crate::{coalesce, ecn, icmp, queue, route, segment::Cut};

/// Cuts what was read from a TUN device, one packet behind the other into `room`, and shows each to
/// `each`. `None` if it contradicts its offload header, or there is not enough room.
pub fn cut(framed: &[u8], mut room: &mut [u8], mut each: impl FnMut(&mut [u8])) -> Option<()> {
    let (header, packet) = VnetHeader::split(framed)?;
    let cut = Cut::new(header, packet).ok()?;
    for index in 0..cut.count() {
        let (place, rest) = room.split_at_mut_checked(cut.len(index))?;
        cut.write(index, place).ok()?;
        each(place);
        room = rest;
    }
    Some(())
}

/// Joins packets to super-packets.
#[derive(Debug)]
pub struct Coalescer<'b>(coalesce::Coalescer<'b>);

impl<'b> Coalescer<'b> {
    /// For a kernel that takes UDP super-packets, too, or does not.
    #[must_use]
    pub fn new(udp: bool) -> Self {
        Self(coalesce::Coalescer::new(udp))
    }

    /// Takes a packet with [`VnetHeader::LEN`] bytes of room in front.
    pub fn push(&mut self, framed: &'b mut [u8], mut write: impl FnMut(&[IoSlice<'_>])) {
        self.0.push(framed, &mut write);
    }

    /// Writes what is open.
    pub fn flush(&mut self, mut write: impl FnMut(&[IoSlice<'_>])) {
        self.0.flush(&mut write);
    }
}

/// The fair queue in front of the cipher.
#[derive(Debug)]
pub struct FairQueue(queue::FairQueue);

impl FairQueue {
    /// One thread's queue, of `workers` threads.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        Self(queue::FairQueue::new(workers))
    }

    /// Takes a packet of `len` bytes that begins, offload header first, with `head`; behind that stands
    /// whatever stood there. How many were dropped for it.
    pub fn push(&mut self, head: &[u8], len: usize, now: Instant) -> usize {
        let Some(staging) = self.0.staging().get_mut(..head.len()) else {
            return 1;
        };
        staging.copy_from_slice(head);
        self.0.push(len, now)
    }

    /// Gives out the packet whose turn it is; its length.
    pub fn pop(&mut self, now: Instant) -> Option<usize> {
        let taken = self.0.pop(now, &mut 0)?;
        let len = self.0.bytes(&taken).len();
        self.0.free(taken);
        Some(len)
    }
}

/// The length of the packet at the front of `padded`, by its own header.
#[must_use]
pub fn packet_len(padded: &[u8]) -> Option<usize> {
    route::packet_len(padded)
}

/// Brings what the outer header says of congestion into the packet. Whether it may live.
pub fn merge_ecn(outer: Ecn, packet: &mut [u8]) -> bool {
    ecn::merge(outer, packet).is_ok()
}

/// The length of the ICMP error about a packet that nobody is there for.
#[must_use]
pub fn no_route(packet: &[u8]) -> Option<usize> {
    icmp::no_route(packet, &mut [0; icmp::LEN_MAX])
}

/// Two ends of one session, by a real handshake.
#[must_use]
pub fn sessions(now: Instant) -> Option<[Arc<Session>; 2]> {
    let keys = [[1; 32], [2; 32]].map(LocalKey::new);
    let [one, other] = &keys;
    let peer = |key: &LocalKey| Peer::new(key.public(), PresharedKey::default(), None);
    let mut ends = (peer(other), peer(one));
    let since_1970 = Duration::from_secs(1_800_000_000);
    let initiation = ends.0.initiate(one, 1, now, since_1970)?;
    let received = Received::read(other, &initiation)?;
    let (response, answering) = ends.1.respond(received, 2, now).ok()?;
    Some([ends.0.finish(&response, now).ok()?, answering])
}
