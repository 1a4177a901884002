//! Ends sockets of others (`NETLINK_SOCK_DIAG`, `SOCK_DESTROY`: Linux 4.5, for UDP 4.9, with
//! `CONFIG_INET_DIAG_DESTROY`).

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send,
        socket_with,
    },
};

/// `SOCK_DIAG_BY_FAMILY` and `SOCK_DESTROY` of `linux/sock_diag.h`.
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;

/// `NLM_F_REQUEST`, `NLM_F_ACK` and `NLM_F_DUMP` of `linux/netlink.h`.
pub(crate) const REQUEST: u16 = 0x1;
pub(crate) const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;

/// `NLMSG_ERROR` and `NLMSG_DONE`.
pub(crate) const ERROR: u16 = 2;
const DONE: u16 = 3;

pub(crate) const HEADER_BYTES: usize = 16;

/// `struct inet_diag_sockid`, which requests and answers have in common.
const ID_BYTES: usize = 48;

/// `TCP_ESTABLISHED`: of UDP, connected.
const CONNECTED: u32 = 1 << 1;

const IPPROTO_UDP: u8 = 17;

/// The kernel fills datagrams of 32 KiB (`netlink_dump`).
const RECEIVE_BYTES: usize = 64 << 10;

/// Ends connected UDP sockets of the calling thread's network namespace: those that have one of the
/// numbers (`SO_COOKIE`) in `wanted` and are connected to the address there. Their owners' next
/// `recv` fails with `ECONNABORTED`, or their next `send` with `EDESTADDRREQ`. Removes from `wanted` those that it found; returns how many were ended:
/// the others closed meanwhile.
///
/// # Errors
///
/// `EOPNOTSUPP` if the kernel ends no sockets, `EPERM` without `CAP_NET_ADMIN` in the namespace.
pub fn end_udp(wanted: &mut BTreeMap<u64, SocketAddr>) -> io::Result<usize> {
    let flags = SocketFlags::CLOEXEC;
    let protocol = Some(netlink::SOCK_DIAG);
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
    let mut ended = 0;
    for family in [AddressFamily::INET, AddressFamily::INET6] {
        for found in connected(&socket, family)? {
            if wanted.get(&found.cookie) != Some(&found.peer) {
                continue;
            }
            wanted.remove(&found.cookie);
            match destroy(&socket, family, &found.id) {
                Ok(()) => ended += 1,
                Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(ended)
}

#[derive(Debug)]
struct Found {
    cookie: u64,
    peer: SocketAddr,
    id: [u8; ID_BYTES],
}

fn connected(socket: &OwnedFd, family: AddressFamily) -> io::Result<Vec<Found>> {
    send(
        socket,
        &request(BY_FAMILY, REQUEST | DUMP, family, &[0; ID_BYTES]),
        SendFlags::empty(),
    )?;
    let mut found = Vec::new();
    let mut buffer = vec![0; RECEIVE_BYTES];
    loop {
        let (length, _) = recv(socket, &mut *buffer, RecvFlags::empty())?;
        for (kind, payload) in messages(buffer.get(..length).unwrap_or_default()) {
            match kind {
                DONE => return Ok(found),
                ERROR => answer(payload)?,
                BY_FAMILY => found.extend(parse(payload)),
                _ => {}
            }
        }
    }
}

fn destroy(socket: &OwnedFd, family: AddressFamily, id: &[u8; ID_BYTES]) -> io::Result<()> {
    send(
        socket,
        &request(DESTROY, REQUEST | ACK, family, id),
        SendFlags::empty(),
    )?;
    let mut buffer = [0; 1_024];
    let (length, _) = recv(socket, &mut buffer, RecvFlags::empty())?;
    let answered = messages(buffer.get(..length).unwrap_or_default()).next();
    match answered {
        Some((ERROR, payload)) => answer(payload),
        Some(_) | None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2`.
fn request(kind: u16, flags: u16, family: AddressFamily, id: &[u8; ID_BYTES]) -> Vec<u8> {
    let [family, _] = family.as_raw().to_ne_bytes();
    let mut body = vec![family, IPPROTO_UDP, 0, 0];
    body.extend(CONNECTED.to_ne_bytes());
    body.extend(id);
    let length = u32::try_from(HEADER_BYTES + body.len()).unwrap_or_default();
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]); // Sequence number and port: one request at a time, answered by the kernel.
    message.extend(body);
    message
}

/// The messages in a datagram, each with its kind.
pub(crate) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let &[a, b, c, d, e, f, ..] = datagram else {
            return None;
        };
        let length = usize::try_from(u32::from_ne_bytes([a, b, c, d])).ok()?;
        let payload = datagram.get(HEADER_BYTES..length)?;
        datagram = datagram
            .get(length.next_multiple_of(4)..)
            .unwrap_or_default();
        Some((u16::from_ne_bytes([e, f]), payload))
    })
}

/// `struct nlmsgerr`: 0, or a negative errno.
pub(crate) fn answer(payload: &[u8]) -> io::Result<()> {
    let number = payload
        .first_chunk()
        .map(|bytes| i32::from_ne_bytes(*bytes));
    match number {
        Some(0) => Ok(()),
        Some(number) => Err(io::Error::from_raw_os_error(number.saturating_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// `struct inet_diag_msg`: family, state, timer, retransmissions, then the socket's id.
fn parse(message: &[u8]) -> Option<Found> {
    let (&[family, ..], rest) = message.split_first_chunk::<4>()?;
    let id = rest.first_chunk::<ID_BYTES>()?;
    // Ports, source, destination, interface, cookie.
    let (_, rest) = id.split_first_chunk::<2>()?;
    let (port, rest) = rest.split_first_chunk::<2>()?;
    let (_, rest) = rest.split_first_chunk::<16>()?;
    let (destination, rest) = rest.split_first_chunk::<16>()?;
    let (_, cookie) = rest.split_first_chunk::<4>()?;
    let (low, high) = cookie.split_first_chunk::<4>()?;
    let word = |bytes: &[u8; 4]| u64::from(u32::from_ne_bytes(*bytes));
    let ip = if u16::from(family) == AddressFamily::INET.as_raw() {
        let &[a, b, c, d, ..] = destination;
        IpAddr::from(Ipv4Addr::new(a, b, c, d))
    } else {
        IpAddr::from(Ipv6Addr::from(*destination)).to_canonical()
    };
    Some(Found {
        cookie: word(low) | word(high.first_chunk()?) << 32,
        peer: SocketAddr::new(ip, u16::from_be_bytes(*port)),
        id: *id,
    })
}
