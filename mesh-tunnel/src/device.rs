//! A plain WireGuard device: configured by its control socket, with nothing of a mesh.
//!
//! `config` is what the device shall be and `uapi` the text that says it, both pure; `running`
//! makes the packet path so; `control` is the socket.

pub(crate) mod config;
pub(crate) mod control;
pub(crate) mod running;
pub(crate) mod uapi;

use std::{cell::RefCell, convert::Infallible};

use mesh_linux::{
    IfIndex,
    netlink::{Changes, Netlink, NetlinkError},
};
use running::Running;
use zeroize::Zeroizing;

/// Most peers whose ways are looked up when the machine's network changes: a tenth of a second at
/// 100 µs for each. The others keep their sources as long as the machine has these addresses.
const SOURCES_MAX: usize = 1_000;

/// A device and the interface it is behind.
pub(crate) struct Device {
    running: RefCell<Running>,
    link: IfIndex,
    netlink: Netlink,
}

impl Device {
    pub(crate) fn new(running: Running, netlink: Netlink) -> Self {
        Self {
            link: running.tun().index(),
            running: RefCell::new(running),
            netlink,
        }
    }

    /// Takes note of how the interface is, whenever that may have changed.
    ///
    /// # Errors
    ///
    /// When the kernel does not say it any more; it ends by nothing else.
    pub(crate) async fn follow(&self, mut changes: Changes) -> anyhow::Result<Infallible> {
        self.look().await?;
        loop {
            let change = changes.next().await?;
            if change.links {
                self.look().await?;
            }
            self.look_at_sources().await;
        }
    }

    /// Carries out a request of the control socket. Whoever takes the interface up and then asks
    /// talks to a device that is up.
    pub(crate) async fn answer(&self, request: &[u8]) -> Zeroizing<String> {
        if let Err(error) = self.look().await {
            tracing::error!("cannot see whether the interface is up: {error}");
        }
        self.running.borrow_mut().answer(request)
    }

    async fn look(&self) -> Result<(), NetlinkError> {
        // Another interface may have come in the place, and under the number, of one that was moved away.
        let is_here = self.running.borrow().tun().is_here();
        let state = if is_here.unwrap_or(false) {
            self.netlink.link_state(self.link).await?
        } else {
            None
        };
        self.running.borrow_mut().set_link(state);
        Ok(())
    }

    /// A peer is answered from the address that it asked, but not if packets from there do not leave
    /// any more by the interface by which the peer's came (kernel: `send4`, `send6`).
    async fn look_at_sources(&self) {
        let sources = self.running.borrow().sources();
        let mark = self.running.borrow().mark();
        for (peer, to, source) in sources.into_iter().take(SOURCES_MAX) {
            let (to, from) = (to.ip(), source.address);
            // Without a way there is nothing to decide.
            let Ok(Some(link)) = self.netlink.link_towards(to, from, mark).await else {
                continue;
            };
            if source.link.is_some_and(|came_by| came_by != link) {
                self.running.borrow().forget_source(&peer, source);
            }
        }
    }

    /// Stops all packets.
    pub(crate) fn stop(&self) {
        self.running.borrow_mut().stop();
    }
}
