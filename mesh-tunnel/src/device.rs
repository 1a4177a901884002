//! A plain WireGuard device: configured by its control socket, with nothing of a mesh.
//!
//! `config` is what the device shall be and `uapi` the text that says it, both pure; `running`
//! makes the packet path so; `control` is the socket.

pub(crate) mod config;
pub(crate) mod control;
pub(crate) mod running;
pub(crate) mod uapi;

use std::cell::RefCell;

use mesh_linux::{
    IfIndex,
    netlink::{Changes, Netlink, NetlinkError},
};
use running::Running;
use zeroize::Zeroizing;

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

    /// Takes note of how the interface is, whenever that may have changed; ends only when the
    /// kernel tells nothing any more.
    pub(crate) async fn follow(&self, mut changes: Changes) -> Result<(), NetlinkError> {
        loop {
            self.look().await?;
            loop {
                match changes.next().await {
                    Some(change) if change.links => break,
                    Some(_) => {}
                    None => return Ok(()),
                }
            }
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

    /// Stops all packets.
    pub(crate) fn stop(&self) {
        self.running.borrow_mut().stop();
    }
}
