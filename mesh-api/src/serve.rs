//! gRPC connections from the server's side: the admin socket, and TLS with the peer's identity.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{Stream, StreamExt as _, stream};
use mesh_identity::{certificate::peer_identity, tls::explain_io};
use mesh_wire::id::Identity;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Sleep, sleep, timeout},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{ServerConfig, pki_types::CertificateDer},
    server::TlsStream,
};
use tonic::{Request, Status, transport::server::Connected};

/// Most connections at once, shaking hands or not. Each costs a file descriptor and up to
/// 100 KiB: 800 MiB in the very worst case. More wait in the kernel's backlog.
pub const CONNECTIONS_MAX: usize = 8192;

/// Most TLS handshakes at once: a handshake costs 1 ms of a core, so these are 0.25 s of work.
pub const HANDSHAKES_MAX: usize = 256;

/// How long a TLS handshake may take: a client on a bad link needs 3 s for it.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Pause after the system refused to hand over a connection (no descriptors, no memory).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A local socket that only its owner may use. The file goes when this is dropped.
#[derive(Debug)]
pub struct AdminSocket {
    listener: UnixListener,
    path: PathBuf,
}

/// Why there is no local socket.
#[derive(Debug, thiserror::Error)]
pub enum AdminSocketError {
    /// Somebody listens there.
    #[error("{}: another process serves this socket already", .0.display())]
    InUse(PathBuf),
    /// There is something else.
    #[error("{}: is there already, and no socket", .0.display())]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl AdminSocket {
    /// Listens at `path` (mode 0600). What a dead process left there is replaced; a live one is
    /// not. Must be called inside a tokio runtime. For tonic's `serve_with_incoming`.
    ///
    /// # Errors
    ///
    /// [`AdminSocketError`].
    pub async fn bind(path: &Path) -> Result<Self, AdminSocketError> {
        let io = |source| AdminSocketError::Io {
            path: path.to_owned(),
            source,
        };
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(AdminSocketError::NotASocket(path.to_owned()));
            }
            Ok(_) if UnixStream::connect(path).await.is_ok() => {
                return Err(AdminSocketError::InUse(path.to_owned()));
            }
            Ok(_) | Err(_) => {}
        }
        let listener = bind_private(path).map_err(io)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }
}

impl Stream for AdminSocket {
    type Item = io::Result<UnixStream>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let accepted = self.listener.poll_accept(context);
        accepted.map(|accepted| Some(accepted.map(|(stream, _)| stream)))
    }
}

impl Drop for AdminSocket {
    fn drop(&mut self) {
        // A file left behind is replaced by the next start.
        fs::remove_file(&self.path).ok();
    }
}

/// Made in a folder that nobody else can enter, so that at no moment anybody else can connect.
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut folder = path.as_os_str().to_owned();
    folder.push(format!(".{}", std::process::id()));
    let folder = PathBuf::from(folder);
    fs::DirBuilder::new().mode(0o700).create(&folder)?;
    let inside = folder.join("s");
    let bound = UnixListener::bind(&inside).and_then(|listener| {
        fs::set_permissions(&inside, fs::Permissions::from_mode(0o600))?;
        fs::rename(&inside, path)?;
        Ok(listener)
    });
    let removed = fs::remove_dir_all(&folder);
    let listener = bound?;
    removed.map(|()| listener)
}

/// One connection whose TLS handshake is done, for tonic's `serve_with_incoming`.
#[derive(Debug)]
pub struct TlsConnection {
    stream: TlsStream<TcpStream>,
    /// When it is over, whatever the peer does.
    ends: Option<Pin<Box<Sleep>>>,
    /// Frees a place when the connection ends.
    _place: OwnedSemaphorePermit,
}

impl TlsConnection {
    /// The same, but over in so long: a peer that takes its time holds nothing for ever.
    #[must_use]
    pub fn ending_in(mut self, lifetime: Duration) -> Self {
        self.ends = Some(Box::pin(sleep(lifetime)));
        self
    }

    fn check_end(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        let ends = self.ends.as_mut();
        if ends.is_some_and(|ends| ends.as_mut().poll(context).is_ready()) {
            let text = "the connection took too long";
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        Ok(())
    }
}

/// Connections on `listener` whose handshake succeeded. `config` is asked for each, so that a
/// renewed certificate is shown from then on; `refused` hears of each that failed.
pub fn tls_incoming(
    listener: TcpListener,
    config: impl Fn() -> Arc<ServerConfig> + Send + 'static,
    refused: impl Fn(SocketAddr, &str) + Send + Sync + 'static,
) -> impl Stream<Item = io::Result<TlsConnection>> + Send {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    tls_incoming_of(listener, places, config, refused)
}

/// The same for at most as many connections as `places` has.
pub fn tls_incoming_of(
    listener: TcpListener,
    places: Arc<Semaphore>,
    config: impl Fn() -> Arc<ServerConfig> + Send + 'static,
    refused: impl Fn(SocketAddr, &str) + Send + Sync + 'static,
) -> impl Stream<Item = io::Result<TlsConnection>> + Send {
    let accepted = stream::unfold((listener, places), async |(listener, places)| {
        let connection = accept(&listener, &places).await?;
        Some((connection, (listener, places)))
    });
    let refused = Arc::new(refused);
    let shaken = accepted.map(move |(tcp, peer, place)| {
        let acceptor = TlsAcceptor::from(config());
        let refused = refused.clone();
        async move {
            // Small messages that somebody waits for; a failure costs 40 ms, not the connection.
            tcp.set_nodelay(true).ok();
            let problem = match timeout(HANDSHAKE_TIMEOUT, acceptor.accept(tcp)).await {
                Ok(Ok(stream)) => {
                    return Some(Ok(TlsConnection {
                        stream,
                        ends: None,
                        _place: place,
                    }));
                }
                Ok(Err(error)) => explain_io(&error),
                Err(_) => format!("no TLS handshake in {HANDSHAKE_TIMEOUT:?}"),
            };
            refused(peer, &problem);
            None
        }
    });
    shaken
        .buffer_unordered(HANDSHAKES_MAX)
        .filter_map(std::future::ready)
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let place = places.clone().acquire_owned().await.ok()?;
    loop {
        match listener.accept().await {
            Ok((tcp, peer)) => return Some((tcp, peer, place)),
            Err(_) => sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// What a request knows of its connection: an extension of every request that came by
/// [`tls_incoming`].
#[derive(Debug, Clone)]
pub struct Caller {
    /// Where it came from.
    pub address: Option<SocketAddr>,
    /// The certificates that it showed, its own first; none if it showed none.
    pub certificates: Arc<[CertificateDer<'static>]>,
}

impl Caller {
    /// Who it is: the trust domain and the identity in the certificate that the TLS handshake
    /// checked.
    ///
    /// # Errors
    ///
    /// `UNAUTHENTICATED` if it showed no certificate, or one that names nobody of a mesh.
    pub fn identity(&self) -> Result<(String, Identity), Status> {
        let identity = peer_identity(&self.certificates);
        identity.map_err(|error| Status::unauthenticated(error.to_string()))
    }
}

/// Who sent `request`.
///
/// # Errors
///
/// `INTERNAL` if it did not come by [`tls_incoming`].
pub fn caller<T>(request: &Request<T>) -> Result<&Caller, Status> {
    let caller = request.extensions().get::<Caller>();
    caller.ok_or_else(|| Status::internal("the request came by another door"))
}

impl Connected for TlsConnection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        let (tcp, session) = self.stream.get_ref();
        Caller {
            address: tcp.peer_addr().ok(),
            certificates: session.peer_certificates().unwrap_or_default().into(),
        }
    }
}

impl AsyncRead for TlsConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check_end(context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for TlsConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
