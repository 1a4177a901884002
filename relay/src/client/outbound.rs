//! How links get out of this machine: by which interface, and through which HTTP proxy.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use futures_util::future::BoxFuture;
use mesh_daemon::http_proxy::HttpProxy;
use mesh_wire::TCP_SEGMENT_BYTES;
use socket2::SockRef;
use tokio::net::{TcpSocket, TcpStream, lookup_host};

use super::ConnectError;

/// Finds the addresses of a `host:port`.
pub type ResolveFor =
    Arc<dyn Fn(String) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>> + Send + Sync>;

/// Names the interface by which an address is to be reached; `None`: the kernel's routes choose.
pub type DeviceFor = Arc<dyn Fn(IpAddr) -> Option<String> + Send + Sync>;

/// By default, as the kernel's routes say.
#[derive(Clone, Default)]
pub struct Outbound {
    /// By which interface. A link is of one relay, so that its socket may be bound to one
    /// (`SO_BINDTODEVICE`; needs CAP_NET_RAW before Linux 5.7).
    pub device: Option<DeviceFor>,
    /// How the proxy's name is resolved; `None`: as the system does it.
    pub resolve: Option<ResolveFor>,
    /// Through which proxy TLS goes; where one is set for a relay's address, always through it, as with
    /// any program: whether the address can be reached directly, QUIC finds out.
    pub proxy: Option<Arc<HttpProxy>>,
}

impl fmt::Debug for Outbound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outbound")
            .field("proxy", &self.proxy)
            .finish_non_exhaustive()
    }
}

impl Outbound {
    /// Binds a socket that will speak with `to` only.
    pub(super) fn bind_device<'s>(
        &self,
        socket: impl Into<SockRef<'s>>,
        to: IpAddr,
    ) -> io::Result<()> {
        let device = self.device.as_ref().and_then(|device| device(to));
        match device {
            Some(name) => socket.into().bind_device(Some(name.as_bytes())),
            None => Ok(()),
        }
    }

    /// A TCP connection to a relay.
    pub(super) async fn connect(&self, to: SocketAddr) -> Result<TcpStream, ConnectError> {
        let proxy = self.proxy.as_ref();
        let Some(proxy) = proxy.filter(|proxy| proxy.is_for(&to.ip().to_string())) else {
            return Ok(self.connect_directly(to).await?);
        };
        let connect = async || {
            let mut last = io::Error::new(io::ErrorKind::NotFound, "its name has no address");
            let found = match &self.resolve {
                Some(resolve) => resolve(proxy.address().to_owned()).await?,
                None => lookup_host(proxy.address()).await?.collect(),
            };
            for address in found {
                match self.connect_directly(address).await {
                    Ok(stream) => return Ok(stream),
                    Err(error) => last = error,
                }
            }
            Err(last)
        };
        Ok(proxy.through(connect(), &to.to_string()).await?)
    }

    async fn connect_directly(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = match to {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        self.bind_device(&socket, to.ip())?;
        SockRef::from(&socket).set_tcp_mss(TCP_SEGMENT_BYTES)?;
        socket.connect(to).await
    }
}
