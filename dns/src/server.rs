//! The listeners.

use std::{
    collections::BTreeMap,
    fmt, io,
    net::{self, IpAddr, Ipv6Addr, SocketAddr, UdpSocket},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use hickory_proto::{
    op::{Message, Query, ResponseCode},
    rr::Name,
};
use ipnet::IpNet;
use mesh_core::{
    policy::callers::{Caller, Callers},
    services::View,
};
use mesh_wire::id::canonical_ip;
use rustix::net::{SendFlags, sendto};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    runtime::Handle,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    answer::{
        Answer, ExtendedError, PLAIN_UDP_MAX_BYTES, Told, answer, fail, parse, udp_answer_max_bytes,
    },
    cache::DEFAULT_STALE_MAX,
    clients::Clients,
    counters::{Counters, DropReason},
    datagrams::{self, Threads},
    forward::{Forwarder, Known},
    inspect::Inspector,
    limit::Limit,
    local::LocalNames,
    log::QueryLog,
    packed::Said,
    upstream::{AuthoritiesError, DeviceFor, UpstreamConfig, tls},
    wire::{Overflow, TCP_MESSAGE_MAX_BYTES, encode},
};

/// Questions that may wait for upstreams at once: each holds a socket for each upstream that is slow, of the 20,000
/// that a process may have here, for at most 3 s.
const WAITING_MAX: usize = 512;

/// Of these for one source address: a pod that goes wild leaves room for the others.
const WAITING_PER_SOURCE_MAX: usize = 256;

/// Whose questions count that nobody asked just now.
const OURSELVES: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// TCP connections at once. With [`TCP_QUERY_MAX_BYTES`] and one answer of 64 KiB each, 17 MiB.
const CONNECTIONS_MAX: usize = 256;

/// Of these for one source address.
const CONNECTIONS_PER_SOURCE_MAX: usize = 64;

/// A connection on which nothing is asked, or nothing is read, is closed after this
/// (RFC 7766 §6.2.3: a few seconds).
const TCP_IDLE: Duration = Duration::from_secs(10);

/// A query has one name of at most 255 bytes and a few options.
const TCP_QUERY_MAX_BYTES: usize = 4096;

/// Before a listener that had an error (out of file descriptors, say) tries again.
pub(crate) const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(50);

/// Before an address that somebody else holds is tried again. It must be free twice: who only starts anew gets it back.
pub const HELD_RETRY: Duration = Duration::from_secs(15);

/// What a server needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsConfig {
    /// UDP and TCP listeners. The addresses must be on an interface already, and be real ones:
    /// with `0.0.0.0`, answers may come from another address than was asked.
    pub listen: Vec<SocketAddr>,
    /// Where everybody else's names are asked, in this order.
    pub upstreams: Vec<UpstreamConfig>,
    /// Certificates (PEM) of those who certify upstreams that are asked by TLS; `None`: whom the system trusts.
    pub ca_file: Option<PathBuf>,
    /// How long beyond its time an upstream's answer is given while no upstream answers.
    pub stale_max: Duration,
    /// Domains that are asked elsewhere.
    pub stubs: Vec<Stub>,
    /// This node's own names.
    pub local: LocalNames,
    /// Who may ask, beyond this node itself: loopback, the listen addresses, and what the
    /// snapshot says is this node's (overlay and underlay addresses, prefixes behind it).
    pub allow_from: Vec<IpNet>,
    /// Whether each answer is logged, with its client and its question.
    pub query_log: bool,
    /// Whether endpoints of headless services that policy denies to the pod that asks are left out.
    pub leave_out_denied: bool,
}

/// A domain whose names are asked elsewhere: a company's own, say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stub {
    /// It, and everything below it ([`crate::local::domain_name`]).
    pub domain: Name,
    /// Where, in this order.
    pub upstreams: Vec<UpstreamConfig>,
}

impl Default for DnsConfig {
    fn default() -> Self {
        Self {
            listen: Vec::new(),
            upstreams: Vec::new(),
            ca_file: None,
            stale_max: DEFAULT_STALE_MAX,
            stubs: Vec::new(),
            local: LocalNames::default(),
            allow_from: Vec::new(),
            query_log: false,
            leave_out_denied: false,
        }
    }
}

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address cannot be listened at, and not because somebody else holds it.
    #[error("cannot listen for DNS at {transport} {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// `UDP` or `TCP`.
        transport: &'static str,
        /// What the kernel says.
        source: io::Error,
    },
    /// There are no threads to be had.
    #[error("cannot start the threads of DNS")]
    Threads(io::Error),
    /// No upstream could be trusted.
    #[error("cannot ask DNS upstreams by TLS")]
    Authorities(#[from] AuthoritiesError),
    /// The server would ask itself.
    #[error("DNS upstream {0} is an address that this server listens at: it would ask itself")]
    UpstreamIsListener(SocketAddr),
}

/// A running server. Cancel its token, then await [`Self::stopped`].
#[derive(Debug)]
pub struct DnsServer {
    inspector: Inspector,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl DnsServer {
    /// Binds all listeners, then answers until `stop` is cancelled. What somebody else holds is tried again
    /// ([`Inspector::held`]). `view` is called for each
    /// query; it gives `None` until there is a first snapshot. So is `callers` with `leave_out_denied`; it gives `None`
    /// until it is known what policy denies to this node's pods. `device` is called for each question to an upstream, and names
    /// the interface by which it is asked; `None`: the kernel's routes choose.
    ///
    /// # Errors
    ///
    /// [`StartError`] for the first address that cannot be used; then none is.
    pub async fn start(
        config: DnsConfig,
        view: impl Fn() -> Option<Arc<View>> + Send + Sync + 'static,
        callers: impl Fn() -> Option<Arc<Callers>> + Send + Sync + 'static,
        device: impl Fn(IpAddr) -> Option<String> + Send + Sync + 'static,
        stop: CancellationToken,
    ) -> Result<Self, StartError> {
        let of_stubs = config.stubs.iter().flat_map(|stub| &stub.upstreams);
        let upstreams: Vec<_> = config.upstreams.iter().chain(of_stubs).collect();
        let mut addresses = upstreams.iter().map(|one| one.address);
        if let Some(own) = addresses.find(|one| config.listen.contains(one)) {
            return Err(StartError::UpstreamIsListener(own));
        }
        let is_secure = upstreams.iter().any(|one| one.is_secure());
        let tls = is_secure.then(|| tls(config.ca_file.as_deref()));
        let tls = tls.transpose()?.map(Arc::new);
        let mut sockets = Vec::new();
        let held = Held::default();
        for &address in &config.listen {
            sockets.push(bind(address, &held)?);
        }
        let local_addresses: Vec<_> = sockets.iter().map(|(address, ..)| *address).collect();
        let runtime = Handle::current();
        let device: DeviceFor = Arc::new(device);
        let counters = Arc::new(Counters::default());
        let tasks = TaskTracker::new();
        let log = config.query_log.then(|| {
            let (log, write) = QueryLog::new(Arc::clone(&counters));
            tasks.spawn(write); // It ends with the last who could add a line.
            log
        });
        let callers: Box<dyn Fn() -> Option<Arc<Callers>> + Send + Sync> = Box::new(callers);
        let view: ViewNow = Arc::new(view);
        let forwarder = Forwarder::new(
            &config,
            tls,
            &device,
            Arc::clone(&counters),
            tasks.clone(),
            stop.clone(),
        );
        let inspector = Inspector {
            listen: local_addresses,
            held: held.clone(),
            view: Arc::clone(&view),
            forwarder: Arc::new(forwarder),
            counters: Arc::clone(&counters),
            stale_max: config.stale_max,
            allow_from: config.allow_from.clone(),
            query_log: config.query_log,
            leave_out_denied: config.leave_out_denied,
        };
        let shared = Arc::new(Shared {
            view,
            callers: config.leave_out_denied.then_some(callers),
            forwarder: Arc::clone(&inspector.forwarder),
            clients: Clients::new(&inspector.listen, config.allow_from),
            local: config.local,
            log,
            counters,
            waiting: Limit::new(WAITING_MAX, WAITING_PER_SOURCE_MAX),
            connections: Limit::new(CONNECTIONS_MAX, CONNECTIONS_PER_SOURCE_MAX),
            tasks: tasks.clone(),
            runtime,
            stop: stop.clone(),
        });
        let listeners = sockets.len();
        for (address, udp, tcp) in sockets {
            let serving = Arc::clone(&shared);
            let threads = move |sockets| Threads::start(sockets, listeners, &serving);
            let udp = udp.map(&threads).transpose();
            let udp = udp.map_err(StartError::Threads)?;
            let (by_udp, by_tcp) = (Arc::clone(&shared), Arc::clone(&shared));
            let (held_udp, held_tcp) = (held.clone(), held.clone());
            tasks.spawn(async move {
                let bind = || datagrams::bind(address);
                let place = (address, "UDP");
                let Some(threads) = held_udp.get(udp, place, bind, threads, &by_udp.stop).await
                else {
                    return;
                };
                by_udp.stop.cancelled().await;
                drop(threads); // They finish a batch at most.
            });
            tasks.spawn(async move {
                let bind = || bind_tcp(address);
                let place = (address, "TCP");
                if let Some(tcp) = held_tcp.get(tcp, place, bind, Ok, &by_tcp.stop).await {
                    by_tcp.serve_tcp(tcp).await;
                }
            });
        }
        Ok(Self {
            inspector,
            tasks,
            stop,
        })
    }

    /// What was counted since start.
    #[must_use]
    pub fn counters(&self) -> &Arc<Counters> {
        &self.inspector.counters
    }

    /// What tells of it, also to others and after it has stopped.
    #[must_use]
    pub fn inspector(&self) -> Inspector {
        self.inspector.clone()
    }

    /// Where it listens, with the real numbers of ports given as 0.
    #[must_use]
    pub fn local_addresses(&self) -> &[SocketAddr] {
        &self.inspector.listen
    }

    /// Returns when every task has ended, soon after the token was cancelled.
    pub async fn stopped(self) {
        self.stop.cancelled().await;
        self.tasks.close();
        self.tasks.wait().await;
    }
}

type Sockets = (SocketAddr, Option<Vec<Arc<UdpSocket>>>, Option<TcpListener>);

/// What is free at `address`; the rest is in `held`.
fn bind(address: SocketAddr, held: &Held) -> Result<Sockets, StartError> {
    let bind_error = |transport| {
        move |source| StartError::Bind {
            address,
            transport,
            source,
        }
    };
    let udp = held.unless((address, "UDP"), datagrams::bind(address));
    let udp = udp.map_err(bind_error("UDP"))?;
    let local = udp.as_ref().and_then(|sockets| sockets.first());
    let local = local.map_or(Ok(address), |one| one.local_addr());
    let local = local.map_err(bind_error("UDP"))?;
    let tcp = held.unless((local, "TCP"), bind_tcp(local));
    Ok((local, udp, tcp.map_err(bind_error("TCP"))?))
}

fn bind_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// An address, and `UDP` or `TCP`.
type Place = (SocketAddr, &'static str);

/// Where somebody else listens, and what the kernel says.
#[derive(Debug, Clone, Default)]
pub(crate) struct Held(Arc<Mutex<BTreeMap<Place, String>>>);

impl Held {
    pub(crate) fn all(&self) -> BTreeMap<Place, String> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// What was `bound`; `None`: somebody else holds it.
    fn unless<T>(&self, place: Place, bound: io::Result<T>) -> io::Result<Option<T>> {
        match bound {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                self.say(place, Some(&error));
                Ok(None)
            }
            bound => bound.map(Some),
        }
    }

    /// What listens at `place`, and where that is held, what `start` makes of it once it is free; `None`: stopped before.
    async fn get<T, S>(
        &self,
        had: Option<S>,
        place: Place,
        bind: impl Fn() -> io::Result<T>,
        start: impl Fn(T) -> io::Result<S>,
        stop: &CancellationToken,
    ) -> Option<S> {
        if had.is_some() {
            return had;
        }
        let mut was_free = false;
        loop {
            stop.run_until_cancelled(sleep(HELD_RETRY)).await?;
            let started = bind().and_then(|bound| was_free.then(|| start(bound)).transpose());
            was_free = started.is_ok();
            match started {
                Ok(None) => {}
                Ok(started) => {
                    self.say(place, None);
                    return started;
                }
                Err(error) => self.say(place, Some(&error)),
            }
        }
    }

    fn say(&self, place: Place, error: Option<&io::Error>) {
        let (address, transport) = place;
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(error) = error else {
            held.remove(&place);
            return tracing::info!(%address, transport, "listens for DNS now");
        };
        let said = error.to_string();
        if held.get(&place) != Some(&said) {
            tracing::warn!(%address, transport, %error, "cannot listen for DNS; trying again");
            held.insert(place, said);
        }
    }
}

/// Gives the view in force.
pub(crate) type ViewNow = Arc<dyn Fn() -> Option<Arc<View>> + Send + Sync>;

/// What every listener needs.
pub(crate) struct Shared {
    view: ViewNow,
    callers: Option<Box<dyn Fn() -> Option<Arc<Callers>> + Send + Sync>>,
    clients: Clients,
    local: LocalNames,
    log: Option<QueryLog>,
    forwarder: Arc<Forwarder>,
    counters: Arc<Counters>,
    waiting: Arc<Limit>,
    connections: Arc<Limit>,
    tasks: TaskTracker,
    runtime: Handle,
    stop: CancellationToken,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

/// What is left to do for a query.
pub(crate) enum Step {
    /// It is answered from the view alone.
    Own(Message, Told),
    /// It is answered with what an upstream said before; that counts down.
    Cached(Message),
    Ask(Message, Query),
    Nothing,
}

/// A reply as it is sent.
pub(crate) struct Written {
    pub(crate) bytes: Vec<u8>,
    pub(crate) said: Said,
}

impl Shared {
    pub(crate) fn view(&self) -> Option<Arc<View>> {
        (self.view)()
    }

    /// The pods that are not told of all endpoints.
    pub(crate) fn callers(&self) -> Option<Arc<Callers>> {
        self.callers.as_ref()?()
    }

    /// Whether `source` may ask; counts those who may not.
    pub(crate) fn is_client(&self, source: IpAddr, view: Option<&View>) -> bool {
        let is_client = self.clients.include(canonical_ip(source), view);
        if !is_client {
            self.counters.drop_one(DropReason::Source);
        }
        is_client
    }

    /// Counts a reply about an own name that was ready.
    pub(crate) fn count_packed(&self, said: Said) {
        self.counters.queries.add();
        self.count_own(said.code);
        self.count(said);
    }

    /// Logs what `client` is told, where that is asked for.
    pub(crate) fn log(&self, client: IpAddr, answer: &[u8]) {
        if let Some(log) = &self.log {
            log.add(canonical_ip(client), answer);
        }
    }

    pub(crate) fn drop_one(&self, reason: DropReason) {
        self.counters.drop_one(reason);
    }

    pub(crate) fn write_datagram(&self, reply: Message, max: u16) -> Option<Written> {
        self.write(reply, max, Overflow::Truncate)
    }

    /// Puts a question that came by `socket` to the upstreams, and sends what comes of it.
    pub(crate) fn ask_for_datagram(
        self: Arc<Self>,
        socket: Arc<UdpSocket>,
        reply: Message,
        question: Query,
        max: u16,
        to: SocketAddr,
    ) {
        let Some(admission) = self.waiting.admit(canonical_ip(to.ip())) else {
            return self.send_datagram(&socket, self.busy(reply), max, to);
        };
        let shared = Arc::clone(&self);
        let task = async move {
            let _admission = admission;
            let asked = shared.forwarder.ask(reply, question);
            if let Some(reply) = shared.stop.run_until_cancelled(asked).await {
                shared.send_datagram(&socket, reply, max, to);
            }
        };
        self.tasks.spawn_on(task, &self.runtime);
    }

    fn send_datagram(&self, socket: &UdpSocket, reply: Message, max: u16, to: SocketAddr) {
        let Some(reply) = self.write_datagram(reply, max) else {
            return;
        };
        self.log(to.ip(), &reply.bytes);
        // The socket waits for nothing but queries.
        if sendto(socket, &reply.bytes, SendFlags::DONTWAIT, &to).is_err() {
            self.counters.drop_one(DropReason::Unsent);
        }
    }

    async fn serve_tcp(self: Arc<Self>, listener: TcpListener) {
        loop {
            let accepted = tokio::select! {
                () = self.stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let (stream, source) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    self.pause(&error).await;
                    continue;
                }
            };
            let source = canonical_ip(source.ip());
            // Before it takes a place that somebody else may need.
            if !self.is_client(source, self.view().as_deref()) {
                continue;
            }
            let Some(admission) = self.connections.admit(source) else {
                self.counters.drop_one(DropReason::Connections);
                continue;
            };
            let shared = Arc::clone(&self);
            self.tasks.spawn(async move {
                let _admission = admission;
                let served = shared.serve_connection(stream, source);
                // Ended by the client, by its silence, or by us: all the same.
                if let Some(Err(error)) = shared.stop.run_until_cancelled(served).await {
                    tracing::trace!(%error, "connection ended");
                }
            });
        }
    }

    /// Answers each question as soon as it can: what waits for an upstream keeps nobody waiting (RFC 7766 §6.2.1.1).
    async fn serve_connection(&self, stream: TcpStream, source: IpAddr) -> io::Result<()> {
        let (reader, mut writer) = stream.into_split();
        let mut reading = Box::pin(next_query(reader));
        let mut asked = FuturesUnordered::new();
        let ended = loop {
            let reply = tokio::select! {
                read = &mut reading => {
                    let (reader, query) = match read {
                        Ok(read) => read,
                        Err(ended) => break ended,
                    };
                    reading.set(next_query(reader));
                    let view = self.view();
                    if !self.is_client(source, view.as_deref()) {
                        return Ok(());
                    }
                    let callers = self.callers();
                    let caller = callers.as_deref().and_then(|callers| callers.caller(source));
                    match self.decide(&query, view.as_deref(), caller).0 {
                        Step::Nothing => return Ok(()),
                        Step::Own(reply, _) | Step::Cached(reply) => reply,
                        Step::Ask(reply, question) => match self.waiting.admit(source) {
                            Some(admission) => {
                                asked.push(async move {
                                    let _admission = admission;
                                    self.forwarder.ask(reply, question).await
                                });
                                continue;
                            }
                            None => self.busy(reply),
                        },
                    }
                }
                Some(reply) = asked.next() => reply,
            };
            self.send_on(&mut writer, reply, source).await?;
        };
        // Who asks no more may still listen.
        while let Some(reply) = asked.next().await {
            self.send_on(&mut writer, reply, source).await?;
        }
        Err(ended)
    }

    async fn send_on(
        &self,
        writer: &mut OwnedWriteHalf,
        reply: Message,
        source: IpAddr,
    ) -> io::Result<()> {
        let written = self.write(reply, TCP_MESSAGE_MAX_BYTES, Overflow::LeaveOut);
        let Some(Written { bytes, .. }) = written else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        self.log(source, &bytes);
        let len = u16::try_from(bytes.len()).unwrap_or(TCP_MESSAGE_MAX_BYTES);
        let framed = [&len.to_be_bytes()[..], &bytes].concat();
        timeout(TCP_IDLE, writer.write_all(&framed)).await?
    }

    /// What to do about a query, and how large the answer may be if it goes over UDP.
    pub(crate) fn decide(
        &self,
        query: &[u8],
        view: Option<&View>,
        caller: Option<Caller<'_>>,
    ) -> (Step, u16) {
        self.counters.queries.add();
        match parse(query) {
            Ok(query) => {
                let max = udp_answer_max_bytes(&query);
                (self.step(answer(&query, view, &self.local, caller)), max)
            }
            Err(answer) => (self.step(*answer), PLAIN_UDP_MAX_BYTES),
        }
    }

    fn step(&self, answer: Answer) -> Step {
        match answer {
            Answer::Drop(reason) => {
                self.counters.drop_one(reason);
                Step::Nothing
            }
            Answer::Reply(reply, told) => {
                self.count_own(reply.metadata.response_code);
                if told == Told::Part {
                    self.counters.denied_left_out.add();
                }
                Step::Own(reply, told)
            }
            Answer::Ask { reply, question } => match self.forwarder.cached(&reply, &question) {
                Known::Answer(reply) => Step::Cached(reply),
                Known::Ending(answer) => {
                    self.refresh(reply, question);
                    Step::Cached(answer)
                }
                Known::Nothing => Step::Ask(reply, question),
            },
        }
    }

    fn refresh(&self, reply: Message, question: Query) {
        // With too many waiting, it is asked for when it has ended.
        let Some(admission) = self.waiting.admit(OURSELVES) else {
            return;
        };
        let (forwarder, stop) = (Arc::clone(&self.forwarder), self.stop.clone());
        let task = async move {
            let _admission = admission;
            let refreshed = forwarder.refresh(reply, question);
            stop.run_until_cancelled(refreshed).await;
        };
        self.tasks.spawn_on(task, &self.runtime);
    }

    fn busy(&self, mut reply: Message) -> Message {
        self.counters.busy.add();
        fail(&mut reply, ExtendedError::Busy);
        reply
    }

    fn write(&self, reply: Message, max: u16, overflow: Overflow) -> Option<Written> {
        let code = reply.response_code;
        let Ok((bytes, cut)) = encode(reply, max, overflow) else {
            self.counters.drop_one(DropReason::Unwritable);
            return None;
        };
        let said = Said {
            code,
            cut,
            may_be_denied: false,
        };
        self.count(said);
        Some(Written { bytes, said })
    }

    /// An answer from the snapshot alone.
    fn count_own(&self, code: ResponseCode) {
        self.counters.own.add();
        if code == ResponseCode::NXDomain {
            self.counters.unknown.add();
        }
    }

    fn count(&self, said: Said) {
        if said.code == ResponseCode::NXDomain {
            self.counters.nxdomain.add();
        } else if said.code == ResponseCode::ServFail {
            self.counters.servfail.add();
        } else if said.code != ResponseCode::NoError {
            self.counters.refused.add();
        }
        if said.cut {
            self.counters.truncated.add();
        }
    }

    async fn pause(&self, error: &io::Error) {
        tracing::debug!(%error, "DNS listener paused");
        self.stop
            .run_until_cancelled(sleep(PAUSE_AFTER_ERROR))
            .await;
    }
}

async fn next_query(mut reader: OwnedReadHalf) -> io::Result<(OwnedReadHalf, Vec<u8>)> {
    let query = timeout(TCP_IDLE, read_query(&mut reader)).await??;
    Ok((reader, query))
}

async fn read_query(stream: &mut OwnedReadHalf) -> io::Result<Vec<u8>> {
    let len = usize::from(stream.read_u16().await?);
    if len > TCP_QUERY_MAX_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "longer than any query",
        ));
    }
    let mut query = vec![0; len];
    stream.read_exact(&mut query).await?;
    Ok(query)
}
