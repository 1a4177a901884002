//! Virtual time, and what is to happen when: the entries of the world's queue.

use std::{
    net::SocketAddr,
    sync::OnceLock,
    time::{Duration, Instant},
};

use mesh_core::io::{Input, RelayTransport};
use mesh_wire::id::Via;

use super::Change;
use crate::session::Packet;

pub(super) enum Happening {
    Wake {
        node: usize,
    },
    Tick {
        node: usize,
    },
    Arrive {
        from: usize,
        source: SocketAddr,
        to: SocketAddr,
        packet: Packet,
    },
    Deliver {
        node: usize,
        from: usize,
        via: Via,
        packet: Packet,
    },
    Forward {
        relay: usize,
        from: usize,
        to: usize,
        packet: Packet,
    },
    Tell {
        node: usize,
        boot: u32,
        input: Input,
    },
    Connect {
        node: usize,
        boot: u32,
        relay: usize,
        transport: RelayTransport,
    },
    Ping {
        flow: usize,
    },
    Change(Change),
}

pub(super) struct Entry {
    pub(super) at: u64,
    pub(super) order: u64,
    pub(super) what: Happening,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "virtual time needs one real instant to start from"
)]
fn start() -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    *START.get_or_init(Instant::now)
}

pub(super) fn instant(us: u64) -> Instant {
    start() + Duration::from_micros(us)
}

pub(super) fn micros(at: Instant) -> u64 {
    let nanos = at.saturating_duration_since(start()).as_nanos();
    u64::try_from(nanos.div_ceil(1000)).unwrap()
}
