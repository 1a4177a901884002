//! What the kernel tells of changes of links, addresses and routes.

use std::{
    io::{self, ErrorKind},
    os::fd::OwnedFd,
};

use rustix::net::{
    AddressFamily, RecvFlags, SocketFlags, SocketType, bind, netlink::SocketAddrNetlink, recv,
    socket_with, sockopt,
};
use tokio::io::{Interest, unix::AsyncFd};

use super::ROUTE_PROTOCOL;
use crate::sock_diag::messages;

/// Links, addresses and routes of both families.
const GROUPS: i32 = libc::RTMGRP_LINK
    | libc::RTMGRP_IPV4_IFADDR
    | libc::RTMGRP_IPV6_IFADDR
    | libc::RTMGRP_IPV4_ROUTE
    | libc::RTMGRP_IPV6_ROUTE;

/// Room for what nobody has read yet; the kernel takes it twice, 8 MiB, and only while something waits. A pod that is wired
/// is 13 notifications, 20 KB as the kernel counts (Linux 6.12): 400 pods at once, where kubelets have 110 at most by default.
/// What `net.core.rmem_default` gives (208 KiB) is full after ten.
const ROOM_BYTES: usize = 4 << 20;

/// The kernel tells one thing a datagram, of 1 to 2 KB, and makes none longer than 32 KiB.
const RECEIVE_BYTES: usize = 64 << 10;

/// What changed in the machine's network; see [`Changes::next`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Change {
    /// A link came, went, or changed its state.
    pub links: bool,
    /// An address came or went.
    pub addresses: bool,
    /// A route came or went that is not ours.
    pub routes: bool,
    /// A route of ours came or went.
    pub own_routes: bool,
}

impl Change {
    const ALL: Self = Self {
        links: true,
        addresses: true,
        routes: true,
        own_routes: true,
    };

    /// A message of this kind (`linux/rtnetlink.h`).
    fn of(kind: u16, payload: &[u8]) -> Self {
        // `struct rtmsg`: family, two prefix lengths, type of service, table, protocol.
        let ours = payload.get(5) == Some(&ROUTE_PROTOCOL);
        let route = matches!(kind, libc::RTM_NEWROUTE | libc::RTM_DELROUTE);
        Self {
            links: matches!(kind, libc::RTM_NEWLINK | libc::RTM_DELLINK),
            addresses: matches!(kind, libc::RTM_NEWADDR | libc::RTM_DELADDR),
            routes: route && !ours,
            own_routes: route && ours,
        }
    }

    fn merge(self, other: Self) -> Self {
        Self {
            links: self.links || other.links,
            addresses: self.addresses || other.addresses,
            routes: self.routes || other.routes,
            own_routes: self.own_routes || other.own_routes,
        }
    }
}

/// Notifications of the kernel, in the network namespace of the thread that made it. They wait in the kernel, in bounded room,
/// and nowhere else.
#[derive(Debug)]
pub struct Changes {
    socket: AsyncFd<OwnedFd>,
    buffer: Vec<u8>,
}

impl Changes {
    /// Begins to listen. Read the state *after* this and nothing is missed. Has to be called on a
    /// tokio runtime.
    ///
    /// # Errors
    ///
    /// If the kernel gives no netlink socket.
    #[expect(
        unsafe_code,
        reason = "tokio has to be promised that the descriptor stays"
    )]
    pub fn listen() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // Without a protocol: `NETLINK_ROUTE` is 0.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        // Only CAP_NET_ADMIN may exceed net.core.rmem_max; without it the kernel gives what it may.
        if sockopt::set_socket_recv_buffer_size_force(&socket, ROOM_BYTES).is_err() {
            sockopt::set_socket_recv_buffer_size(&socket, ROOM_BYTES)?;
        }
        bind(&socket, &SocketAddrNetlink::new(0, GROUPS.cast_unsigned()))?;
        // SAFETY: an `OwnedFd` has one descriptor for as long as it lives, and it lives in there.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?;
        Ok(Self {
            socket,
            buffer: vec![0; RECEIVE_BYTES],
        })
    }

    /// Waits for the next change, and says in one word all that has come in since the last call:
    /// a storm of a thousand notifications is one change. Where there were more than there was room for,
    /// anything may have changed, and that is said. Nothing is lost if the call is given up.
    ///
    /// # Errors
    ///
    /// What the kernel says; the socket is of no use then.
    pub async fn next(&mut self) -> io::Result<Change> {
        loop {
            let mut ready = self.socket.readable().await?;
            let change = take_all(self.socket.get_ref(), &mut self.buffer)?;
            ready.clear_ready();
            if change != Change::default() {
                return Ok(change);
            }
        }
    }
}

/// All that waits. To the last one, also after the kernel threw some away: until none waits it goes on doing so, and does not
/// say it again.
fn take_all(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Change> {
    let mut change = Change::default();
    loop {
        match recv(socket, &mut *buffer, RecvFlags::empty()) {
            Ok((length, _)) => {
                for (kind, payload) in messages(buffer.get(..length).unwrap_or_default()) {
                    change = change.merge(Change::of(kind, payload));
                }
            }
            Err(rustix::io::Errno::NOBUFS) => {
                tracing::info!(
                    room_bytes = 2 * ROOM_BYTES,
                    "more changes of the network at once than there is room for: all of it is read anew"
                );
                change = Change::ALL;
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(change),
            Err(error) => return Err(error.into()),
        }
    }
}
