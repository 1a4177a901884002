//! Sockets with the buffers and options that a relay and its clients need.

use std::{
    io,
    net::{SocketAddr, TcpListener, UdpSocket},
};

use rustix::net::sockopt::{set_socket_recv_buffer_size_force, set_socket_send_buffer_size_force};
use socket2::{Domain, Protocol, Socket, Type};

/// Socket buffers, in bytes: 16 ms at 1 Gb/s. Left at the default of 208 KiB they capped
/// NetBird's relay at 95 Mb/s (netbird#6021). The kernel doubles it for its own accounting.
const BUFFER_BYTES: usize = 2 * 1024 * 1024;

/// Connections that wait to be accepted.
const TCP_BACKLOG: i32 = 1024;

/// A UDP socket; `[::]` takes IPv4 too, whatever `net.ipv6.bindv6only` says.
pub(crate) fn udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    enlarge_buffers(&socket);
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// A TCP listener; `[::]` takes IPv4 too.
pub(crate) fn tcp_listener(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?; // Old connections in TIME_WAIT do not keep a restart out.
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(TCP_BACKLOG)?;
    Ok(socket.into())
}

/// Past `net.core.{r,w}mem_max` where the process may (CAP_NET_ADMIN), else up to them.
fn enlarge_buffers(socket: &Socket) {
    if set_socket_recv_buffer_size_force(socket, BUFFER_BYTES).is_err() {
        socket.set_recv_buffer_size(BUFFER_BYTES).ok(); // Smaller buffers work too.
    }
    if set_socket_send_buffer_size_force(socket, BUFFER_BYTES).is_err() {
        socket.set_send_buffer_size(BUFFER_BYTES).ok();
    }
    let received = socket.recv_buffer_size().unwrap_or(0);
    if received < BUFFER_BYTES {
        tracing::debug!(
            received,
            wanted = BUFFER_BYTES,
            "small UDP buffers: raise net.core.rmem_max"
        );
    }
}
