//! A stand-in for a kubelet: what an API server asks one for on behalf of `kubectl` (`pkg/kubelet/server`). Its
//! containers are the machine that it runs on: sessions are processes beside it, ports are those of 127.0.0.1, and logs
//! are files.
//!
//! Whoever comes must show a certificate of the cluster's authority; there is no authorization beyond that.

mod exec;
mod spdy;

use std::{
    convert::Infallible,
    io::{self, SeekFrom},
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Request, Response, StatusCode,
    body::{Frame, Incoming},
    header::{CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue, UPGRADE},
    server::conn::http1,
    service::service_fn,
    upgrade::Upgraded,
};
use hyper_util::rt::TokioIo;
use tokio::{
    fs,
    io::{AsyncReadExt as _, AsyncSeekExt as _},
    net::{TcpListener, TcpStream},
    task::{JoinHandle, JoinSet},
    time,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig,
        crypto::ring::default_provider,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
        server::WebPkiClientVerifier,
    },
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{handshake::derive_accept_key, protocol::Role},
};

use crate::apiserver::{Issued, Query};

/// How often a log that is followed is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// Most of a log that is read at once.
const CHUNK_BYTES_MAX: usize = 64 << 10;

/// How a session in a container is spoken (`k8s.io/apimachinery/pkg/util/remotecommand`).
const CHANNELS: &str = "v5.channel.k8s.io";

/// How a forwarded port is: SPDY streams in WebSocket messages (`k8s.io/apimachinery/pkg/util/portforward`).
const TUNNELLED_PORTS: &str = "SPDY/3.1+portforward.k8s.io";

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// A connection of a client.
type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// What a kubelet is made of.
#[derive(Debug)]
pub struct Options {
    /// Where it listens: 10250 as a rule.
    pub listen: SocketAddr,
    /// What it shows.
    pub certificate: Issued,
    /// Whose certificates it takes (PEM).
    pub client_ca_pem: String,
    /// Where the logs are: `<namespace>_<pod>_<container>.log`.
    pub logs: PathBuf,
}

/// A running kubelet; it ends when this is dropped.
#[derive(Debug)]
pub struct Kubelet {
    server: JoinHandle<()>,
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.server.abort();
    }
}

#[derive(Debug)]
struct Shared {
    logs: PathBuf,
    requests: AtomicU64,
}

impl Kubelet {
    /// Starts one on the runtime, and in the network namespace, that this is called from.
    ///
    /// # Errors
    ///
    /// If its address is taken, or the certificate is none.
    pub async fn start(options: Options) -> Result<Self> {
        let listener = TcpListener::bind(options.listen)
            .await
            .with_context(|| format!("listen at {}", options.listen))?;
        let acceptor = TlsAcceptor::from(Arc::new(tls(&options)?));
        let shared = Arc::new(Shared {
            logs: options.logs,
            requests: AtomicU64::new(0),
        });
        let server = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(connection(stream, acceptor.clone(), Arc::clone(&shared)));
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Self { server })
    }
}

fn tls(options: &Options) -> Result<ServerConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(
        options.client_ca_pem.as_bytes(),
    )?)?;
    let provider = Arc::new(default_provider());
    let clients =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()?;
    let Issued {
        certificate_pem,
        key_pem,
    } = &options.certificate;
    let chain = vec![CertificateDer::from_pem_slice(certificate_pem.as_bytes())?];
    Ok(ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain, PrivateKeyDer::from_pem_slice(key_pem.as_bytes())?)?)
}

async fn connection(stream: TcpStream, acceptor: TlsAcceptor, shared: Arc<Shared>) {
    let Ok(stream) = acceptor.accept(stream).await else {
        return; // A stranger.
    };
    let service = service_fn(move |request| {
        let shared = Arc::clone(&shared);
        async move { Ok::<_, Infallible>(answer(&shared, request).await) }
    });
    let serving = http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    // Errors are the client's, that went away.
    serving.await.ok();
}

async fn answer(shared: &Shared, request: Request<Incoming>) -> Response<Body> {
    shared.requests.fetch_add(1, Ordering::Relaxed);
    let path = request.uri().path().to_owned();
    let query = Query::parse(request.uri().query().unwrap_or_default());
    let parts: Vec<_> = path.split('/').skip(1).collect();
    match parts.as_slice() {
        ["metrics"] => text(StatusCode::OK, metrics(shared)),
        ["containerLogs", namespace, pod, container] => {
            let name = format!("{namespace}_{pod}_{container}.log");
            let logs = logs(&shared.logs.join(&name), &query).await;
            logs.unwrap_or_else(|error| text(StatusCode::NOT_FOUND, format!("{name}: {error}\n")))
        }
        ["exec", _, _, _] => upgrade(request, CHANNELS, move |socket| exec::run(socket, query)),
        ["portForward", _, _] => upgrade(request, TUNNELLED_PORTS, spdy::forward),
        _ => text(StatusCode::NOT_FOUND, "404 page not found\n".to_owned()),
    }
}

fn metrics(shared: &Shared) -> String {
    let requests = shared.requests.load(Ordering::Relaxed);
    format!("# TYPE kubelet_http_requests_total counter\nkubelet_http_requests_total {requests}\n")
}

fn text(status: StatusCode, text: String) -> Response<Body> {
    let body = Full::new(Bytes::from(text)).map_err(|never| match never {});
    let mut response = Response::new(body.boxed_unsync());
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

/// A log from its beginning, or its last lines; and, if it is followed, what is written to it from then on.
async fn logs(path: &Path, query: &Query) -> io::Result<Response<Body>> {
    let before = fs::read(path).await?;
    let tail = query.text("tailLines").parse().ok();
    let first = tail.map_or(0, |count| tail_from(&before, count));
    let mut file = fs::File::open(path).await?;
    file.seek(SeekFrom::Start(u64::try_from(first).unwrap_or(0)))
        .await?;
    let follows = query.text("follow") == "true";
    let chunks = stream::try_unfold(file, move |mut file| async move {
        let mut chunk = vec![0; CHUNK_BYTES_MAX];
        loop {
            match file.read(&mut chunk).await? {
                0 if follows => time::sleep(LOOK).await,
                0 => return Ok(None),
                count => {
                    chunk.truncate(count);
                    return Ok(Some((Frame::data(Bytes::from(chunk)), file)));
                }
            }
        }
    });
    Ok(Response::new(StreamBody::new(chunks).boxed_unsync()))
}

/// Where the last `count` lines begin.
fn tail_from(log: &[u8], count: usize) -> usize {
    let ends = log.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
    let starts: Vec<_> = std::iter::once(0)
        .chain(ends.map(|(at, _)| at + 1))
        .filter(|&at| at < log.len())
        .collect();
    let from = starts.len().saturating_sub(count);
    starts.get(from).copied().unwrap_or(log.len())
}

/// Answers with a WebSocket (RFC 6455 §4.2.2) that speaks `protocol`, and has `session` speak it.
fn upgrade<F>(
    mut request: Request<Incoming>,
    protocol: &'static str,
    session: impl FnOnce(Socket) -> F + Send + 'static,
) -> Response<Body>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let header = |name: &str| {
        let value = request.headers().get(name);
        value
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    };
    let offered = header("sec-websocket-protocol").split(',');
    if !offered.map(str::trim).any(|offered| offered == protocol) {
        let why = format!("only {protocol} is spoken here\n");
        return text(StatusCode::BAD_REQUEST, why);
    }
    let accept = derive_accept_key(header("sec-websocket-key").as_bytes());
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let Ok(upgraded) = upgraded.await else {
            return; // The client went away.
        };
        let socket =
            WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, None).await;
        if let Err(error) = session(socket).await {
            eprintln!("kubelet: {protocol}: {error:#}");
        }
    });
    let mut response = text(StatusCode::SWITCHING_PROTOCOLS, String::new());
    let headers = response.headers_mut();
    headers.remove(CONTENT_TYPE);
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    let of = HeaderName::from_static("sec-websocket-protocol");
    headers.insert(of, HeaderValue::from_static(protocol));
    if let Ok(accept) = HeaderValue::from_str(&accept) {
        headers.insert(HeaderName::from_static("sec-websocket-accept"), accept);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_begin_where_they_do() {
        let log = b"one\ntwo\nthree\n";
        for (count, from) in [(0, 14), (1, 8), (2, 4), (3, 0), (9, 0)] {
            assert_eq!(tail_from(log, count), from, "{count}");
        }
        assert_eq!(tail_from(b"one\nhalf", 1), 4);
        assert_eq!(tail_from(b"", 1), 0);
    }
}
