//! What Holdfast asks of Linux: links, addresses and routes by netlink, TUN devices with
//! offloads, UDP sockets that move batches, network namespaces, the end of others' sockets.
//!
//! **Invariant:** nothing here knows what a peer, a session or a mesh is, and nothing decides.
//! With `ebpf/` this is the only crate with `unsafe`, one operation a block, each with its proof.

use std::{fmt, num::NonZeroU32};

pub mod masquerade;
pub mod memory;
pub mod mss;
pub mod netlink;
pub mod netns;
mod nftables;
pub mod sock_diag;
pub mod thread;
pub mod tun;
pub mod udp;
pub mod wake;

/// A network interface's index in its network namespace. The kernel never gives out 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IfIndex(pub NonZeroU32);

impl IfIndex {
    /// Takes the kernel's number; `None` for 0, with which it says "no interface".
    #[must_use]
    pub fn new(raw: u32) -> Option<Self> {
        NonZeroU32::new(raw).map(Self)
    }

    /// The kernel's number.
    #[must_use]
    pub fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for IfIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
