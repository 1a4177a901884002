//! The listeners.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use hickory_proto::op::{Message, Query, ResponseCode};
use ipnet::IpNet;
use mesh_core::services::View;
use mesh_wire::id::canonical_ip;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    answer::{
        Answer, ExtendedError, PLAIN_UDP_MAX_BYTES, answer, fail, parse, udp_answer_max_bytes,
    },
    clients::Clients,
    counters::{Counters, DropReason},
    forward::Forwarder,
    limit::Limit,
    wire::{Overflow, TCP_MESSAGE_MAX_BYTES, encode},
};

/// Questions that may wait for upstreams at once: each holds a socket, of the 20,000 that a
/// process may have here, for at most 3 s.
const WAITING_MAX: usize = 512;

/// Of these for one source address: a pod that goes wild leaves room for the others.
const WAITING_PER_SOURCE_MAX: usize = 256;

/// TCP connections at once. With [`TCP_QUERY_MAX_BYTES`] and one answer of 64 KiB each, 17 MiB.
const CONNECTIONS_MAX: usize = 256;

/// Of these for one source address.
const CONNECTIONS_PER_SOURCE_MAX: usize = 64;

/// A connection on which nothing is asked, or nothing is read, is closed after this
/// (RFC 7766 §6.2.3: a few seconds).
const TCP_IDLE: Duration = Duration::from_secs(10);

/// A query has one name of at most 255 bytes and a few options.
const TCP_QUERY_MAX_BYTES: usize = 4096;

/// The same over UDP; what is longer is cut, and then malformed.
const UDP_QUERY_MAX_BYTES: usize = 4096;

/// Before a listener that had an error (out of file descriptors, say) tries again.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(50);

/// What a server needs to know.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DnsConfig {
    /// UDP and TCP listeners. The addresses must be on an interface already, and be real ones:
    /// with `0.0.0.0`, answers may come from another address than was asked.
    pub listen: Vec<SocketAddr>,
    /// Where everybody else's names are asked, in this order.
    pub upstreams: Vec<SocketAddr>,
    /// Who may ask, beyond this node itself: loopback, the listen addresses, and what the
    /// snapshot says is this node's (overlay and underlay addresses, prefixes behind it).
    pub allow_from: Vec<IpNet>,
}

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address cannot be listened at.
    #[error("cannot listen for DNS at {transport} {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// `UDP` or `TCP`.
        transport: &'static str,
        /// What the kernel says.
        source: io::Error,
    },
    /// The server would ask itself.
    #[error("DNS upstream {0} is an address that this server listens at: it would ask itself")]
    UpstreamIsListener(SocketAddr),
}

/// A running server. Cancel its token, then await [`Self::stopped`].
#[derive(Debug)]
pub struct DnsServer {
    counters: Arc<Counters>,
    local_addresses: Vec<SocketAddr>,
    tasks: TaskTracker,
}

impl DnsServer {
    /// Binds all listeners, then answers until `stop` is cancelled. `view` is called for each
    /// query; it gives `None` until there is a first snapshot.
    ///
    /// # Errors
    ///
    /// [`StartError`] for the first address that cannot be used; then none is.
    pub async fn start(
        config: DnsConfig,
        view: impl Fn() -> Option<Arc<View>> + Send + Sync + 'static,
        stop: CancellationToken,
    ) -> Result<Self, StartError> {
        if let Some(&own) = config
            .upstreams
            .iter()
            .find(|one| config.listen.contains(one))
        {
            return Err(StartError::UpstreamIsListener(own));
        }
        let mut sockets = Vec::new();
        for &address in &config.listen {
            sockets.push(bind(address).await?);
        }
        let local_addresses: Vec<_> = sockets.iter().map(|(address, ..)| *address).collect();
        let counters = Arc::new(Counters::default());
        let tasks = TaskTracker::new();
        let shared = Arc::new(Shared {
            view: Box::new(view),
            clients: Clients::new(&local_addresses, config.allow_from),
            forwarder: Forwarder::new(&config.upstreams, Arc::clone(&counters)),
            counters: Arc::clone(&counters),
            waiting: Limit::new(WAITING_MAX, WAITING_PER_SOURCE_MAX),
            connections: Limit::new(CONNECTIONS_MAX, CONNECTIONS_PER_SOURCE_MAX),
            tasks: tasks.clone(),
            stop,
        });
        for (_, udp, tcp) in sockets {
            tasks.spawn(Arc::clone(&shared).serve_udp(Arc::new(udp)));
            tasks.spawn(Arc::clone(&shared).serve_tcp(tcp));
        }
        tasks.close();
        Ok(Self {
            counters,
            local_addresses,
            tasks,
        })
    }

    /// What was counted since start.
    #[must_use]
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Where it listens, with the real numbers of ports given as 0.
    #[must_use]
    pub fn local_addresses(&self) -> &[SocketAddr] {
        &self.local_addresses
    }

    /// Returns when every task has ended, soon after the token was cancelled.
    pub async fn stopped(self) {
        self.tasks.wait().await;
    }
}

async fn bind(address: SocketAddr) -> Result<(SocketAddr, UdpSocket, TcpListener), StartError> {
    let bind_error = |transport| {
        move |source| StartError::Bind {
            address,
            transport,
            source,
        }
    };
    let udp = UdpSocket::bind(address).await.map_err(bind_error("UDP"))?;
    let local = udp.local_addr().map_err(bind_error("UDP"))?;
    let tcp = TcpListener::bind(local).await.map_err(bind_error("TCP"))?;
    Ok((local, udp, tcp))
}

struct Shared {
    view: Box<dyn Fn() -> Option<Arc<View>> + Send + Sync>,
    clients: Clients,
    forwarder: Forwarder,
    counters: Arc<Counters>,
    waiting: Arc<Limit>,
    connections: Arc<Limit>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

/// What is left to do for a query.
enum Step {
    Send(Message),
    Ask(Message, Query),
    Nothing,
}

impl Shared {
    async fn serve_udp(self: Arc<Self>, socket: Arc<UdpSocket>) {
        let mut buffer = vec![0; UDP_QUERY_MAX_BYTES];
        loop {
            let received = tokio::select! {
                () = self.stop.cancelled() => return,
                received = socket.recv_from(&mut buffer) => received,
            };
            match received {
                Ok((len, source)) => {
                    let query = buffer.get(..len).unwrap_or_default();
                    self.handle_datagram(&socket, query, source).await;
                }
                Err(error) => self.pause(&error).await,
            }
        }
    }

    async fn handle_datagram(
        self: &Arc<Self>,
        socket: &Arc<UdpSocket>,
        query: &[u8],
        source: SocketAddr,
    ) {
        let (step, max) = self.decide(query, source.ip());
        match step {
            Step::Nothing => {}
            Step::Send(reply) => self.send_datagram(socket, reply, max, source).await,
            Step::Ask(reply, question) => {
                let Some(admission) = self.waiting.admit(canonical_ip(source.ip())) else {
                    return self
                        .send_datagram(socket, self.busy(reply), max, source)
                        .await;
                };
                let (shared, socket) = (Arc::clone(self), Arc::clone(socket));
                self.tasks.spawn(async move {
                    let _admission = admission;
                    let asked = shared.forwarder.ask(reply, question);
                    if let Some(reply) = shared.stop.run_until_cancelled(asked).await {
                        shared.send_datagram(&socket, reply, max, source).await;
                    }
                });
            }
        }
    }

    async fn send_datagram(&self, socket: &UdpSocket, reply: Message, max: u16, to: SocketAddr) {
        let Some(bytes) = self.write(reply, max, Overflow::Truncate) else {
            return;
        };
        if socket.send_to(&bytes, to).await.is_err() {
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

    async fn serve_connection(&self, mut stream: TcpStream, source: IpAddr) -> io::Result<()> {
        loop {
            let query = timeout(TCP_IDLE, read_query(&mut stream)).await??;
            let reply = match self.decide(&query, source).0 {
                Step::Nothing => return Ok(()),
                Step::Send(reply) => reply,
                Step::Ask(reply, question) => match self.waiting.admit(source) {
                    Some(_admission) => self.forwarder.ask(reply, question).await,
                    None => self.busy(reply),
                },
            };
            let Some(bytes) = self.write(reply, TCP_MESSAGE_MAX_BYTES, Overflow::LeaveOut) else {
                return Ok(());
            };
            let len = u16::try_from(bytes.len()).unwrap_or(TCP_MESSAGE_MAX_BYTES);
            let framed = [&len.to_be_bytes()[..], &bytes].concat();
            timeout(TCP_IDLE, stream.write_all(&framed)).await??;
        }
    }

    /// What to do about a query, and how large the answer may be if it goes over UDP.
    fn decide(&self, query: &[u8], source: IpAddr) -> (Step, u16) {
        let view = (self.view)();
        if !self.clients.include(canonical_ip(source), view.as_deref()) {
            self.counters.drop_one(DropReason::Source);
            return (Step::Nothing, 0);
        }
        self.counters.queries.add();
        match parse(query) {
            Ok(query) => {
                let max = udp_answer_max_bytes(&query);
                (self.step(answer(&query, view.as_deref())), max)
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
            Answer::Reply(reply) => {
                self.counters.own.add();
                Step::Send(reply)
            }
            Answer::Ask { reply, question } => match self.forwarder.cached(&reply, &question) {
                Some(reply) => Step::Send(reply),
                None => Step::Ask(reply, question),
            },
        }
    }

    fn busy(&self, mut reply: Message) -> Message {
        self.counters.busy.add();
        fail(&mut reply, ExtendedError::Busy);
        reply
    }

    fn write(&self, reply: Message, max: u16, overflow: Overflow) -> Option<Vec<u8>> {
        let code = reply.response_code;
        if code == ResponseCode::NXDomain {
            self.counters.nxdomain.add();
        } else if code == ResponseCode::ServFail {
            self.counters.servfail.add();
        } else if code != ResponseCode::NoError {
            self.counters.refused.add();
        }
        let Ok((bytes, cut)) = encode(reply, max, overflow) else {
            self.counters.drop_one(DropReason::Unwritable);
            return None;
        };
        if cut {
            self.counters.truncated.add();
        }
        Some(bytes)
    }

    async fn pause(&self, error: &io::Error) {
        tracing::debug!(%error, "DNS listener paused");
        self.stop
            .run_until_cancelled(sleep(PAUSE_AFTER_ERROR))
            .await;
    }
}

async fn read_query(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
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
