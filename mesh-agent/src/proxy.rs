//! A CONNECT proxy (RFC 9110 §9.3.6) to the mesh's nodes: API servers reach kubelets by it (`HTTPConnect` of
//! `EgressSelectorConfiguration`), Prometheus and `curl` their metrics, `ssh` their shells, though the nodes are
//! behind NAT and the client knows no way into the mesh.
//!
//! Who may reach what is decided by [`mesh_core::proxy`]; here are the sockets. Everything is on the control thread:
//! a session costs buffers, and never holds up packets.

mod audit;
mod pipe;
pub mod settings;
mod tls;

use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use futures_util::{Stream, StreamExt as _};
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    ext::ReasonPhrase,
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
    upgrade::OnUpgrade,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_api::serve::{AdminSocket, tls_incoming};
use mesh_core::{
    proxy::{Allowed, ClientName, Refusal, decide},
    services::View,
    snapshot::{Node, Snapshot},
};
use mesh_wire::id::{NodeId, NodeName};
use serde::Serialize;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpSocket, TcpStream, UnixStream},
    sync::{Semaphore, watch},
    task::{self, JoinSet},
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected as _;

use self::{
    audit::Audit,
    pipe::{Ended, Ways, pipe},
    settings::{ProxySettings, TlsSettings},
    tls::Tls,
};
use crate::{driver::DriverHandle, report};

/// How soon a place where it cannot listen is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Pause after the system refused to hand over a connection (no descriptors, no memory).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a client may take to say what it wants, again after each refusal.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

/// What a request's header may take: hyper's least.
const HEADER_BYTES_MAX: usize = 8_192;

/// Connections beyond those to nodes, so that there is room to say why not; further ones wait in the kernel's backlog.
const REFUSED_MAX: usize = 64;

/// Of these, for clients that no rule names: whoever they are, they leave places for those who may.
const STRANGERS_MAX: usize = 16;

/// Longest that a text of the client's is shown, in answers and in the audit log: the longest DNS name, and a port.
const SHOWN_CHARS_MAX: usize = 260;

/// The client is gone, so its answer does not matter: only the audit log has it.
const CLIENT_GONE: &str = "the client went away before it was decided";

/// The proxy, for those who ask about it.
#[derive(Debug, Clone)]
pub struct Proxy(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    settings: ProxySettings,
    view: watch::Receiver<Option<Arc<View>>>,
    driver: DriverHandle,
    audit: Audit,
    /// Places for connections, of whatever outcome.
    places: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
    sessions: Mutex<Sessions>,
    /// Where it cannot listen, and why.
    unserved: Mutex<BTreeMap<String, String>>,
    counters: Counters,
    /// Tells audit lines of this process from others'.
    run: u32,
    next: AtomicU64,
    stop: CancellationToken,
}

#[derive(Debug, Default)]
struct Counters {
    allowed: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
    to_node_bytes: AtomicU64,
    from_node_bytes: AtomicU64,
}

impl Proxy {
    /// A proxy for the nodes in `view`, and what serves it until `stop`.
    pub fn new(
        settings: ProxySettings,
        view: watch::Receiver<Option<Arc<View>>>,
        driver: DriverHandle,
        stop: CancellationToken,
    ) -> (
        Self,
        impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        let (audit, writer) = audit::open(&settings.audit_log);
        let shared = Arc::new(Shared {
            places: Arc::new(Semaphore::new(settings.connections_max + REFUSED_MAX)),
            strangers: Arc::new(Semaphore::new(STRANGERS_MAX)),
            settings,
            view,
            driver,
            audit,
            sessions: Mutex::default(),
            unserved: Mutex::default(),
            counters: Counters::default(),
            run: rand::random(),
            next: AtomicU64::new(0),
            stop,
        });
        let proxy = Self(Arc::clone(&shared));
        let serve = async move {
            let writer = task::spawn_blocking(|| writer.run());
            let mut places = JoinSet::new();
            if let Some(socket) = shared.settings.socket.clone() {
                let shared = Arc::clone(&shared);
                places.spawn(async move { keep_socket(&socket, &shared).await });
            }
            if let Some(tls) = shared.settings.tls.clone() {
                for &address in &tls.listen {
                    let (tls, shared) = (tls.clone(), Arc::clone(&shared));
                    places.spawn(async move { keep_tls(address, &tls, &shared).await });
                }
            }
            shared.stop.cancelled().await;
            while places.join_next().await.is_some() {} // With their sessions, which are written down.
            shared.audit.end().await;
            writer.await.context("the audit log's writer panicked")
        };
        (proxy, serve)
    }

    /// What it did so far, and what it does.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<String, u64> {
        let Shared {
            counters, audit, ..
        } = &*self.0;
        let open = self.0.sessions().in_all();
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counts = [
            ("open", u64::try_from(open).unwrap_or(u64::MAX)),
            ("allowed", count(&counters.allowed)),
            ("refused", count(&counters.refused)),
            ("failed", count(&counters.failed)),
            ("to_node_bytes", count(&counters.to_node_bytes)),
            ("from_node_bytes", count(&counters.from_node_bytes)),
            ("audit_lost", audit.lost()),
        ];
        counts
            .into_iter()
            .map(|(name, count)| (name.to_owned(), count))
            .collect()
    }

    /// What is not as it should be, a sentence each.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let unserved = self.0.unserved();
        let unserved = unserved.iter();
        let mut problems: Vec<_> = unserved
            .map(|(at, why)| format!("proxy: {at}: {why}"))
            .collect();
        let audit = self.0.audit.problem();
        problems.extend(audit.map(|why| format!("proxy: its audit log lacks lines: {why}")));
        problems
    }
}

impl Shared {
    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unserved(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.unserved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that nobody is served at `at`, and says so once.
    fn not_served(&self, at: &str, why: String) {
        let before = self.unserved().insert(at.to_owned(), why.clone());
        if before.as_ref() != Some(&why) {
            tracing::warn!(%at, %why, "the proxy does not serve everywhere");
        }
    }

    fn served(&self, at: &str) {
        self.unserved().remove(at);
    }

    /// Waits before another try; whether there is to be one.
    async fn try_again(&self) -> bool {
        let stopped = time::timeout(RETRY, self.stop.cancelled()).await;
        stopped.is_err()
    }
}

/// How many sessions there are, of whom.
#[derive(Debug, Default)]
struct Sessions(BTreeMap<String, usize>);

impl Sessions {
    fn in_all(&self) -> usize {
        self.0.values().sum()
    }

    /// # Errors
    ///
    /// Which limit is reached, in words.
    fn begin(&mut self, client: &str, settings: &ProxySettings) -> Result<(), Limit> {
        let own = self.0.get(client).copied().unwrap_or(0);
        if own >= settings.connections_per_client_max {
            return Err(Limit::Client(own));
        }
        let in_all = self.in_all();
        if in_all >= settings.connections_max {
            return Err(Limit::All(in_all));
        }
        *self.0.entry(client.to_owned()).or_default() += 1;
        Ok(())
    }

    fn end(&mut self, client: &str) {
        if let Some(count) = self.0.get_mut(client) {
            *count -= 1;
            if *count == 0 {
                self.0.remove(client);
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Limit {
    #[error("the client has {0} connections by this proxy (`connections_per_client_max`)")]
    Client(usize),
    #[error("this proxy has {0} connections (`connections_max`)")]
    All(usize),
}

/// Serves the processes of this machine. Any may connect: who it is decides, not the file's mode.
async fn keep_socket(path: &Path, shared: &Arc<Shared>) {
    let at = path.display().to_string();
    loop {
        let bound = AdminSocket::bind(path).await;
        let bound = bound.map_err(|error| error.to_string());
        let opened = bound.and_then(|socket| {
            let mode = fs::Permissions::from_mode(0o666);
            let set = fs::set_permissions(path, mode);
            set.map(|()| socket).map_err(|error| error.to_string())
        });
        match opened {
            Ok(socket) => {
                shared.served(&at);
                let streams = socket.map(|accepted| {
                    let stream: UnixStream = accepted?;
                    let peer = stream.peer_cred()?;
                    let from = match peer.pid() {
                        Some(pid) => format!("pid {pid}"),
                        None => "a process".to_owned(),
                    };
                    Ok::<_, io::Error>((stream, vec![ClientName::Uid(peer.uid())], from))
                });
                serve(streams, shared).await;
            }
            Err(why) => shared.not_served(&at, why),
        }
        if !shared.try_again().await {
            return;
        }
    }
}

/// Serves clients with certificates at one address.
async fn keep_tls(address: SocketAddr, settings: &TlsSettings, shared: &Arc<Shared>) {
    let at = address.to_string();
    loop {
        let opened = listen(address, shared.settings.unanswered_timeout);
        let opened = opened.map_err(|error| error.to_string());
        let opened = opened.and_then(|listener| {
            let tls = Tls::open(settings).map_err(|error| error.to_string())?;
            Ok((listener, Arc::new(tls)))
        });
        match opened {
            Ok((listener, tls)) => {
                shared.served(&at);
                let (shown, told, counted) = (Arc::clone(&tls), Arc::clone(shared), at.clone());
                let config = move || {
                    let config = shown.config();
                    match shown.problem() {
                        Some(why) => drop(told.unserved().insert(counted.clone(), why)),
                        None => told.served(&counted),
                    }
                    config
                };
                let refused = |peer: SocketAddr, problem: &str| {
                    tracing::info!(%peer, problem, "the proxy refuses a client");
                };
                let connections = tls_incoming(listener, config, refused);
                let streams = connections.map(|connection| {
                    let connection = connection?;
                    let caller = connection.connect_info();
                    let from = caller.address.map(|from| from.to_string());
                    let names = tls::names(&caller.certificates);
                    Ok::<_, io::Error>((connection, names, from.unwrap_or_default()))
                });
                serve(streams, shared).await;
            }
            Err(why) => shared.not_served(&at, why),
        }
        if !shared.try_again().await {
            return;
        }
    }
}

/// Accepted sockets have its options.
fn listen(address: SocketAddr, unanswered: Duration) -> io::Result<TcpListener> {
    /// As much as the kernel lets wait (`net.core.somaxconn`).
    const BACKLOG: u32 = 4_096;
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    give_up_on_the_gone(&SockRef::from(&socket), unanswered)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// A side that is gone without a word is noticed while nothing is sent, too: asked a few times within `unanswered`
/// (tcp(7): `TCP_KEEPIDLE`, `TCP_USER_TIMEOUT`).
fn give_up_on_the_gone(socket: &SockRef<'_>, unanswered: Duration) -> io::Result<()> {
    let pause = (unanswered / 4).max(Duration::from_secs(1));
    let keepalive = TcpKeepalive::new().with_time(pause).with_interval(pause);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(unanswered))
}

/// Serves connections as long as some come, and until the agent stops.
async fn serve<S>(
    streams: impl Stream<Item = io::Result<(S, Vec<ClientName>, String)>>,
    shared: &Arc<Shared>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    tokio::pin!(streams);
    let mut clients = JoinSet::new();
    loop {
        let next = async {
            let place = Arc::clone(&shared.places).acquire_owned().await.ok()?;
            Some((place, streams.next().await?))
        };
        let next = tokio::select! {
            () = shared.stop.cancelled() => None,
            next = next => next,
        };
        let Some((place, accepted)) = next else {
            clients.shutdown().await;
            return;
        };
        let (stream, names, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "the proxy cannot take a connection");
                time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        while clients.try_join_next().is_some() {}
        let known = shared.settings.rules.iter().any(|rule| rule.names(&names));
        let strangers = || Arc::clone(&shared.strangers).try_acquire_owned();
        let Ok(stranger) = (!known).then(strangers).transpose() else {
            shared.counters.refused.fetch_add(1, Ordering::Relaxed);
            continue; // Others of them have not even said yet what they want.
        };
        let client = Arc::new(Client::new(names, from));
        let shared = Arc::clone(shared);
        clients.spawn(async move {
            connection(stream, client, shared).await;
            drop((place, stranger));
        });
    }
}

/// Who is at the other end of a connection.
#[derive(Debug)]
struct Client {
    names: Vec<ClientName>,
    shown: Vec<String>,
    /// What sessions are counted by.
    key: String,
    from: String,
}

impl Client {
    fn new(names: Vec<ClientName>, from: String) -> Self {
        let shown: Vec<_> = names.iter().map(|name| show(&name.to_string())).collect();
        Self {
            key: shown.join(" "),
            names,
            shown,
            from,
        }
    }
}

/// One connection of a client: requests that are refused, and then perhaps one that is not.
async fn connection<S>(stream: S, client: Arc<Client>, shared: Arc<Shared>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let slot: Slot = Arc::default();
    let service = {
        let (slot, shared) = (Arc::clone(&slot), Arc::clone(&shared));
        service_fn(move |request| {
            let (slot, shared) = (Arc::clone(&slot), Arc::clone(&shared));
            let attempt = Attempt::new(&client, &request, shared);
            async move { Ok::<_, std::convert::Infallible>(answer(attempt, request, &slot).await) }
        })
    };
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIMEOUT)
        .max_buf_size(HEADER_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    if let Err(error) = serving.await {
        tracing::debug!(%error, "a client of the proxy broke off");
    }
    let session = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(session) = session {
        session.run().await;
    }
}

/// Where a session waits for the answer to be written.
type Slot = Arc<Mutex<Option<Session>>>;

/// A request that is being decided. Whatever becomes of it is written down.
struct Attempt {
    shared: Arc<Shared>,
    record: Record,
    names: Vec<ClientName>,
    key: String,
    /// It has been written down.
    done: bool,
}

/// A line of the audit log.
#[derive(Debug, Clone, Serialize)]
struct Record {
    /// Milliseconds since 1970 (UTC), by this machine's clock.
    time_unix_ms: u64,
    /// The same for both lines of a session.
    id: String,
    /// `opened`, and later `closed`; or `refused`, or `failed`.
    event: &'static str,
    /// By which names the client is known,
    client: Vec<String>,
    /// and where it is.
    from: String,
    /// What it asked for.
    asked: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<NodeName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<SocketAddr>,
    /// Which of the rules it was, counted from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<usize>,
    #[serde(skip_serializing_if = "String::is_empty")]
    why: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    to_node_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    from_node_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_ms: Option<u64>,
}

impl Attempt {
    fn new(client: &Client, request: &Request<Incoming>, shared: Arc<Shared>) -> Self {
        let number = shared.next.fetch_add(1, Ordering::Relaxed);
        let asked = match request.uri().authority() {
            Some(authority) if request.method() == Method::CONNECT => authority.to_string(),
            _ => format!("{} {}", request.method(), request.uri()),
        };
        let record = Record {
            time_unix_ms: now_unix_ms(),
            id: format!("{:08x}-{number}", shared.run),
            event: "failed",
            client: client.shown.clone(),
            from: client.from.clone(),
            asked: show(&asked),
            node: None,
            to: None,
            rule: None,
            why: CLIENT_GONE.to_owned(),
            to_node_bytes: None,
            from_node_bytes: None,
            duration_ms: None,
        };
        Self {
            shared,
            record,
            names: client.names.clone(),
            key: client.key.clone(),
            done: false,
        }
    }

    fn refuse(mut self, code: StatusCode, why: &impl ToString) -> Response<String> {
        self.record.event = "refused";
        self.end(code, why.to_string())
    }

    fn fail(mut self, code: StatusCode, why: String) -> Response<String> {
        self.record.event = "failed";
        self.end(code, why)
    }

    fn end(mut self, code: StatusCode, why: String) -> Response<String> {
        let why = show(&why);
        self.record.why.clone_from(&why);
        let mut response = Response::new(format!("{why}\n"));
        *response.status_mut() = code;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        // The first line is all that an API server tells `kubectl` of it.
        if let Ok(phrase) = ReasonPhrase::try_from(why) {
            response.extensions_mut().insert(phrase);
        }
        response
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let Counters {
            refused, failed, ..
        } = &self.shared.counters;
        let counter = if self.record.event == "refused" {
            refused
        } else {
            failed
        };
        counter.fetch_add(1, Ordering::Relaxed);
        self.shared.audit.line(&self.record);
    }
}

async fn answer(
    mut attempt: Attempt,
    mut request: Request<Incoming>,
    slot: &Slot,
) -> Response<String> {
    if request.method() != Method::CONNECT {
        let why = "this is a proxy for CONNECT, and for nothing else";
        let mut response = attempt.refuse(StatusCode::METHOD_NOT_ALLOWED, &why);
        let headers = response.headers_mut();
        headers.insert(ALLOW, HeaderValue::from_static("CONNECT"));
        return response;
    }
    let shared = Arc::clone(&attempt.shared);
    let Some(view) = shared.view.borrow().clone() else {
        let why = "this node does not know the mesh yet".to_owned();
        return attempt.fail(StatusCode::SERVICE_UNAVAILABLE, why);
    };
    let Snapshot { nodes, .. } = &*view.snapshot;
    let Some(own) = nodes.get(&view.node) else {
        let why = format!("{} is not in the mesh any more", view.node);
        return attempt.fail(StatusCode::SERVICE_UNAVAILABLE, why);
    };
    let target = request.uri().authority().map_or("", |whole| whole.as_str());
    let settings = &shared.settings;
    let allowed = match decide(&settings.rules, &attempt.names, target, &view.snapshot) {
        Ok(allowed) => allowed,
        Err(refusal) => return attempt.refuse(code(&refusal), &refusal),
    };
    attempt.record.node = Some(allowed.node.name.clone());
    attempt.record.rule = Some(allowed.rule + 1);
    let begun = shared.sessions().begin(&attempt.key, settings);
    let permit = match begun {
        Ok(()) => Permit(Arc::clone(&shared), attempt.key.clone()),
        Err(limit @ Limit::Client(_)) => {
            return attempt.refuse(StatusCode::TOO_MANY_REQUESTS, &limit);
        }
        Err(limit @ Limit::All(_)) => {
            return attempt.refuse(StatusCode::SERVICE_UNAVAILABLE, &limit);
        }
    };
    let (stream, to) = match dial(own, &allowed, settings).await {
        Ok(connected) => connected,
        Err(failure) => {
            let why = explain(&failure, &allowed, &shared.driver).await;
            return attempt.fail(failure.code(), why);
        }
    };
    attempt.record.to = Some(to);
    let session = attempt.open(hyper::upgrade::on(&mut request), stream, permit);
    *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(session);
    Response::new(String::new())
}

fn code(refusal: &Refusal) -> StatusCode {
    match refusal {
        Refusal::NotAnAddress(_) => StatusCode::BAD_REQUEST,
        Refusal::UnknownClient
        | Refusal::UnknownHost(_)
        | Refusal::Ambiguous { .. }
        | Refusal::Denied { .. } => StatusCode::FORBIDDEN,
    }
}

/// Why a node was not reached.
#[derive(Debug)]
enum Failure {
    Timeout(Duration),
    Io(SocketAddr, io::Error),
}

impl Failure {
    fn code(&self) -> StatusCode {
        match self {
            Self::Timeout(_) => StatusCode::GATEWAY_TIMEOUT,
            Self::Io(..) => StatusCode::BAD_GATEWAY,
        }
    }
}

/// From the node's own overlay address, so that nothing comes back that did not go through the mesh.
async fn dial(
    own: &Node,
    allowed: &Allowed<'_>,
    settings: &ProxySettings,
) -> Result<(TcpStream, SocketAddr), Failure> {
    let all = async {
        let mut first = None;
        for &to in &allowed.to {
            match connect(own, to, settings.unanswered_timeout).await {
                Ok(stream) => return Ok((stream, to)),
                // Somebody may listen at the other family's address only.
                Err(error) => {
                    first.get_or_insert(Failure::Io(to, error));
                }
            }
        }
        Err(first.unwrap_or(Failure::Timeout(Duration::ZERO))) // There is always one.
    };
    let limit = settings.connect_timeout;
    let connected = time::timeout(limit, all).await;
    connected.unwrap_or(Err(Failure::Timeout(limit)))
}

async fn connect(own: &Node, to: SocketAddr, unanswered: Duration) -> io::Result<TcpStream> {
    let (socket, from) = match to {
        SocketAddr::V4(_) => (TcpSocket::new_v4()?, IpAddr::V4(own.overlay_v4)),
        SocketAddr::V6(_) => (TcpSocket::new_v6()?, IpAddr::V6(own.overlay_v6)),
    };
    socket.bind((from, 0).into())?;
    give_up_on_the_gone(&SockRef::from(&socket), unanswered)?;
    socket.set_nodelay(true)?;
    socket.connect(to).await
}

/// In words, with what the core knows of the way to the node.
async fn explain(failure: &Failure, allowed: &Allowed<'_>, driver: &DriverHandle) -> String {
    let node = &allowed.node.name;
    let port = allowed.to.first().map_or(0, SocketAddr::port);
    let what = match failure {
        Failure::Timeout(limit) => format!("no answer from port {port} of {node} in {limit:?}"),
        Failure::Io(to, error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            return format!("nobody listens at port {port} of {node} ({to})");
        }
        Failure::Io(to, error) => format!("{node} ({to}): {error}"),
    };
    with_the_way(what, allowed.node.id, driver).await
}

/// `what` went wrong with something asked of `id`, and what the core knows of the way there.
pub(crate) async fn with_the_way(what: String, id: NodeId, driver: &DriverHandle) -> String {
    let why = driver
        .ask(move |driver| report::path_why(driver, &id))
        .await;
    match why {
        Some(why) if !matches!(why.state.as_str(), "direct" | "relayed") => {
            format!("{what}: it is {} ({})", why.state, why.explanation)
        }
        Some(_) => {
            format!("{what}: the way to it works, so its firewall or a policy may drop this")
        }
        None => what,
    }
}

/// A place among the sessions.
struct Permit(Arc<Shared>, String);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.sessions().end(&self.1);
    }
}

/// A connection to a node. Its end is written down, whatever ends it.
struct Session {
    shared: Arc<Shared>,
    record: Record,
    upgrade: Option<OnUpgrade>,
    node: Option<TcpStream>,
    ways: Ways,
    since: Instant,
    _permit: Permit,
}

impl Attempt {
    fn open(mut self, upgrade: OnUpgrade, node: TcpStream, permit: Permit) -> Session {
        self.done = true;
        self.record.event = "opened";
        self.record.why.clear();
        self.shared.audit.line(&self.record);
        self.shared.counters.allowed.fetch_add(1, Ordering::Relaxed);
        let mut record = self.record.clone();
        record.event = "closed";
        "the agent stopped".clone_into(&mut record.why);
        Session {
            shared: Arc::clone(&self.shared),
            record,
            upgrade: Some(upgrade),
            node: Some(node),
            ways: Ways::default(),
            since: Instant::now(),
            _permit: permit,
        }
    }
}

impl Session {
    async fn run(mut self) {
        let (Some(upgrade), Some(node)) = (self.upgrade.take(), self.node.take()) else {
            return; // It is run once.
        };
        let idle = self.shared.settings.idle_timeout;
        let ended = match upgrade.await {
            Ok(client) => pipe(TokioIo::new(client), node, idle, &self.ways).await,
            Err(error) => Ended::Broken(io::Error::other(error)),
        };
        self.record.why = show(&ended.to_string());
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let (to, from) = (self.ways.bytes_to_node(), self.ways.bytes_from_node());
        let counters = &self.shared.counters;
        counters.to_node_bytes.fetch_add(to, Ordering::Relaxed);
        counters.from_node_bytes.fetch_add(from, Ordering::Relaxed);
        let duration_ms = u64::try_from(self.since.elapsed().as_millis());
        let record = &mut self.record;
        record.time_unix_ms = now_unix_ms();
        record.to_node_bytes = Some(to);
        record.from_node_bytes = Some(from);
        record.duration_ms = Some(duration_ms.unwrap_or(u64::MAX));
        self.shared.audit.line(&self.record);
    }
}

fn now_unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

/// A text of somebody else's, fit for a line: short, and without what a terminal or a header would take for orders.
fn show(text: &str) -> String {
    let shown = |c: char| {
        if c.is_ascii_graphic() || c == ' ' {
            c
        } else {
            '?'
        }
    };
    text.chars().take(SHOWN_CHARS_MAX).map(shown).collect()
}

#[cfg(test)]
mod tests;
