//! gRPC connections from the client's side: the admin socket, and the controller over TLS.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use mesh_identity::tls::explain_io;
use mesh_wire::TCP_SEGMENT_BYTES;
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpSocket, TcpStream, UnixStream, lookup_host},
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, pki_types::ServerName},
};
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use crate::{control::control_client::ControlClient, resources::SYNC_BYTES_MAX};

/// ALPN of every gRPC connection: HTTP/2 (RFC 9113 §3.2).
pub const ALPN: &[&[u8]] = &[b"h2"];

/// How long to wait for a TCP connection, and then for its TLS handshake: 3 retransmissions of a
/// SYN (1 + 2 + 4 s, RFC 6298) and a slow link's round trips.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Silence after which a connection is probed: 100 bytes a minute at most are the price of
/// knowing within 50 s that the other side is gone.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);

/// How long to wait for the answer to such a probe.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// At an agent's admin socket: the request's metadata has the name of the node whose agent is to be asked instead.
pub const NODE_METADATA: &str = "holdfast-node";

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The name has no address.
    #[error("{address}: cannot be resolved: {source}")]
    Resolve {
        /// As given.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// No TCP connection.
    #[error("{address}: no TCP connection: {source}")]
    Tcp {
        /// As given.
        address: String,
        /// Why, for the last address tried.
        source: io::Error,
    },
    /// No TLS session.
    #[error("{address}: no TLS session: {problem}")]
    Tls {
        /// As given.
        address: String,
        /// Why, for a person.
        problem: String,
    },
    /// No connection to a local socket.
    #[error("{}: {source}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The other side does not speak HTTP/2.
    #[error("{address}: no HTTP/2: {source}")]
    Http {
        /// As given.
        address: String,
        /// Why.
        source: tonic::transport::Error,
    },
}

/// Connects to an admin socket. For `AgentAdminClient::new` and `ControllerAdminClient::new`.
///
/// # Errors
///
/// [`ConnectError::Socket`]: nobody listens there, or this user may not.
pub async fn admin_channel(path: &Path) -> Result<Channel, ConnectError> {
    let stream = UnixStream::connect(path).await;
    let stream = stream.map_err(|source| ConnectError::Socket {
        path: path.to_owned(),
        source,
    })?;
    channel_over(stream, Endpoint::from_static("http://holdfast"), || {
        path.display().to_string()
    })
    .await
}

/// Connects to the controller at `address` (`host:port`).
///
/// The channel is this one connection: when it breaks, calls fail and the caller, who knows when
/// it should be tried again, makes another.
///
/// # Errors
///
/// [`ConnectError`] that says which layer failed, and why.
pub async fn control_channel(
    address: &str,
    config: Arc<ClientConfig>,
    server_name: ServerName<'static>,
) -> Result<Channel, ConnectError> {
    let tcp = connect_tcp(address, |_| None).await?;
    control_channel_over(tcp, address, config, server_name).await
}

/// The same over a connection that is there already: an HTTP proxy's, or one that leaves by a certain interface.
///
/// # Errors
///
/// [`ConnectError`] that says which layer failed, and why.
pub async fn control_channel_over(
    tcp: TcpStream,
    address: &str,
    config: Arc<ClientConfig>,
    server_name: ServerName<'static>,
) -> Result<Channel, ConnectError> {
    let handshake = TlsConnector::from(config).connect(server_name, tcp);
    let tls = within(CONNECT_TIMEOUT, handshake).await;
    let tls = tls.map_err(|error| ConnectError::Tls {
        address: address.to_owned(),
        problem: explain_io(&error),
    })?;
    let endpoint = Endpoint::from_static("http://controller")
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    channel_over(tls, endpoint, || address.to_owned()).await
}

/// A client over `channel` that takes whole snapshots.
#[must_use]
pub fn control_client(channel: Channel) -> ControlClient<Channel> {
    ControlClient::new(channel).max_decoding_message_size(SYNC_BYTES_MAX)
}

/// Connects to `address` (`host:port`), with small segments ([`TCP_SEGMENT_BYTES`]), by the interface that `device` names for
/// an address; `None`: as the kernel's routes say. The name is resolved as the system does it.
///
/// # Errors
///
/// [`ConnectError::Resolve`] or [`ConnectError::Tcp`].
pub async fn connect_tcp(
    address: &str,
    device: impl Fn(IpAddr) -> Option<String>,
) -> Result<TcpStream, ConnectError> {
    let found = within(CONNECT_TIMEOUT, lookup_host(address)).await;
    let found = found.map_err(|source| ConnectError::Resolve {
        address: address.to_owned(),
        source,
    })?;
    connect_any(address, found, device).await
}

/// The same to one of the addresses that `address` was `found` to have, the first that answers.
///
/// # Errors
///
/// [`ConnectError::Tcp`].
pub async fn connect_any(
    address: &str,
    found: impl IntoIterator<Item = SocketAddr>,
    device: impl Fn(IpAddr) -> Option<String>,
) -> Result<TcpStream, ConnectError> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for candidate in found {
        let device = device(candidate.ip());
        match within(CONNECT_TIMEOUT, connect_to(candidate, device)).await {
            Ok(stream) => {
                // Small messages that somebody waits for; a failure costs 40 ms, not the connection.
                stream.set_nodelay(true).ok();
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(ConnectError::Tcp {
        address: address.to_owned(),
        source: last,
    })
}

async fn connect_to(address: SocketAddr, device: Option<String>) -> io::Result<TcpStream> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // The other side is told too, and sends no larger ones.
    SockRef::from(&socket).set_tcp_mss(TCP_SEGMENT_BYTES)?;
    if let Some(device) = device {
        // Needs CAP_NET_RAW before Linux 5.7.
        SockRef::from(&socket).bind_device(Some(device.as_bytes()))?;
    }
    socket.connect(address).await
}

async fn within<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let late = || io::Error::new(io::ErrorKind::TimedOut, format!("no answer in {limit:?}"));
    timeout(limit, work).await.unwrap_or_else(|_| Err(late()))
}

async fn channel_over<S>(
    stream: S,
    endpoint: Endpoint,
    address: impl FnOnce() -> String,
) -> Result<Channel, ConnectError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let stream = Mutex::new(Some(stream));
    let connector = service_fn(move |_| {
        let stream = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        let gone = || io::Error::new(io::ErrorKind::NotConnected, "the connection is gone");
        std::future::ready(stream.map(TokioIo::new).ok_or_else(gone))
    });
    let channel = endpoint.connect_with_connector(connector).await;
    channel.map_err(|source| ConnectError::Http {
        address: address(),
        source,
    })
}
