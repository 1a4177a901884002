//! A node's link to a relay, by QUIC or by TLS: the same to whoever uses it.
//!
//! A link is up when [`connect_quic`] or [`connect_tls`] returns, and down after exactly one
//! [`LinkEvent::Lost`], unless the node closed it itself. Its tasks run on the tokio runtime that
//! made it; [`Link::send`] may be called from any thread and never waits.

use std::{
    collections::HashMap,
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use mesh_daemon::http_proxy::ProxyError;
use mesh_identity::credentials::Credentials;
use mesh_wire::{
    id::{Identity, NodeId, RelayName},
    relay::{
        Control, Frame, HEADER_LEN, PAYLOAD_LEN_MAX, Session, data_frame, data_header,
        udp::data_session,
    },
};
use tokio::{sync::mpsc, time};
use tokio_util::sync::CancellationToken;

use self::{
    outbound::Outbound,
    peers::{Next, Peers},
    udp::Udp,
};
use crate::queue::Queue;
pub use crate::queue::Waiting;

mod bind;
mod connect;
pub mod outbound;
mod peers;
mod udp;

/// Time for a QUIC link to come up; after that UDP is taken to be blocked (`paths.md`).
pub const QUIC_CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Time for a TLS link to come up: two lost SYNs (1 and 2 s), and four round trips.
pub const TLS_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a relay is, and who we are.
#[derive(Debug, Clone)]
pub struct LinkConfig {
    /// The relay's name, for people.
    pub relay: RelayName,
    /// Who acts as the relay: its certificate must carry that name.
    pub identity: Identity,
    /// Its address, with the port of the transport.
    pub address: SocketAddr,
    /// The node's certificate, its key and the mesh's authority.
    pub credentials: Credentials,
    /// The node's own port, where plain UDP should be tried beside QUIC.
    pub udp: Option<UdpPort>,
    /// How it gets out of this machine.
    pub outbound: Outbound,
}

/// Sends one datagram to the relay.
pub type SendDatagram = Arc<dyn Fn(&[u8]) + Send + Sync>;

/// The node's own UDP port. The link only binds it at the relay and watches whether it works; data
/// goes from and to it without the link.
#[derive(Clone)]
pub struct UdpPort {
    /// Sends one datagram from that port to the relay's QUIC port. Must not wait.
    pub send: SendDatagram,
    /// Length of the largest data frame that it will send, in bytes: `HEADER_LEN`, WireGuard's 32,
    /// and the overlay's MTU. Where such a datagram does not pass, plain UDP is not used.
    pub frame_len: usize,
}

impl fmt::Debug for UdpPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UdpPort")
            .field("frame_len", &self.frame_len)
            .finish_non_exhaustive()
    }
}

/// What a link tells whoever made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkEvent {
    /// The relay says whether a peer is connected to it: after [`Link::find_peer`], whenever that
    /// changes, and for peers that look for this node.
    Peer {
        /// The peer.
        node: NodeId,
        /// Whether it is there, and can be sent to.
        present: bool,
    },
    /// Plain UDP works from now on, or does not any more: see [`Link::udp_sessions`].
    Udp {
        /// Whether it works.
        bound: bool,
    },
    /// The relay stops soon: use another.
    GoAway,
    /// The link is down. Nothing comes after this.
    Lost {
        /// For people.
        reason: String,
    },
}

/// What is called for the packets that have come: whose each is, and the packet. On a tokio thread;
/// it must not wait.
pub type OnData = Arc<dyn Fn(&[(NodeId, Bytes)]) + Send + Sync>;

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No answer in time.
    #[error("no answer from {address} in {} s", .after.as_secs())]
    Timeout {
        /// The relay's address.
        address: SocketAddr,
        /// How long was waited.
        after: Duration,
    },
    /// There, but it does not let us in, or is not who it should be.
    #[error("{0}")]
    Refused(String),
    /// Not reachable.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The HTTP proxy does not let us through.
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    /// The credentials cannot be used.
    #[error("credentials: {0}")]
    Credentials(String),
}

/// Why a packet was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The peer is not connected to the relay.
    #[error("the peer is not connected to the relay")]
    Absent,
    /// Too much waits already.
    #[error("the queue is full")]
    Full,
    /// Longer than [`PAYLOAD_LEN_MAX`].
    #[error("packets have {PAYLOAD_LEN_MAX} bytes at most")]
    TooLarge,
    /// The link is down.
    #[error("the link is down")]
    Closed,
}

/// A link to a relay. Dropping it closes it.
pub struct Link {
    shared: Arc<Shared>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("relay", &self.shared.relay)
            .field("address", &self.shared.address)
            .finish_non_exhaustive()
    }
}

/// Makes a link by QUIC, within [`QUIC_CONNECT_TIMEOUT`].
///
/// # Errors
///
/// [`ConnectError`]; `Timeout` is what a firewall that drops UDP looks like.
pub async fn connect_quic(
    config: LinkConfig,
    events: mpsc::Sender<LinkEvent>,
    on_data: OnData,
) -> Result<Link, ConnectError> {
    let address = config.address;
    let connecting = connect::quic(config, events, on_data);
    within(QUIC_CONNECT_TIMEOUT, address, connecting).await
}

/// Makes a link by TLS, within [`TLS_CONNECT_TIMEOUT`].
///
/// # Errors
///
/// [`ConnectError`].
pub async fn connect_tls(
    config: LinkConfig,
    events: mpsc::Sender<LinkEvent>,
    on_data: OnData,
) -> Result<Link, ConnectError> {
    let address = config.address;
    let connecting = connect::tls(config, events, on_data);
    within(TLS_CONNECT_TIMEOUT, address, connecting).await
}

impl Link {
    /// Sends a packet to `peer`. Never waits. If the relay was not asked for the peer yet, it is
    /// now, and the packet is held until it answers (a few packets, 2 s at most).
    ///
    /// # Errors
    ///
    /// [`SendError`]; the packet is dropped.
    pub fn send(&self, peer: &NodeId, datagram: &[u8]) -> Result<(), SendError> {
        self.shared.send(peer, datagram)
    }

    /// Sends packets to `peer` that stand one behind the other, each of `segment_len` bytes (the
    /// last may be shorter). Never waits. Returns how many were dropped: of these, or older ones in
    /// front of them.
    #[must_use]
    pub fn send_batch(&self, peer: &NodeId, datagrams: &[u8], segment_len: usize) -> usize {
        self.shared.send_batch(peer, datagrams, segment_len.max(1))
    }

    /// Whether so much waits in front of the link that more had better wait elsewhere: otherwise
    /// what is oldest here is dropped, whosesoever it is.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.shared.queue.is_full(Instant::now())
    }

    /// Packets that wait in front of the link.
    #[must_use]
    pub fn waiting(&self) -> Waiting {
        self.shared.queue.waiting(Instant::now())
    }

    /// The peers to which data can be sent as plain UDP, and the sessions for that; `None` while
    /// plain UDP does not work. Ask again after each [`LinkEvent`].
    #[must_use]
    pub fn udp_sessions(&self) -> Option<HashMap<NodeId, Session>> {
        self.is_udp_bound()
            .then(|| self.shared.read(Peers::sessions))
    }

    /// Whether plain UDP works.
    #[must_use]
    pub fn is_udp_bound(&self) -> bool {
        self.shared.udp.as_ref().is_some_and(Udp::is_bound)
    }

    /// The relay's address, with the port of the transport.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.shared.address
    }

    /// Takes a datagram that came to the node's port from the relay's QUIC port and is no data.
    /// Never waits.
    pub fn handle_datagram(&self, datagram: Vec<u8>) {
        if let Some(udp) = &self.shared.udp {
            udp.datagram(datagram);
        }
    }

    /// Packets go by this relay, or should: watch plain UDP closely for a while.
    pub fn note_used(&self) {
        if let Some(udp) = &self.shared.udp {
            udp.used();
        }
    }

    /// Asks the relay for `peer`. Answered by [`LinkEvent::Peer`].
    pub fn find_peer(&self, peer: NodeId) {
        self.shared.find_peer(peer);
    }

    /// Closes the link. No [`LinkEvent::Lost`] follows.
    pub fn close(&self) {
        self.shared.stop.cancel();
    }

    /// The round trip to the relay, smoothed; `None` before the first.
    #[must_use]
    pub fn rtt(&self) -> Option<Duration> {
        let micros = self.shared.rtt_us.load(Relaxed);
        (micros > 0).then(|| Duration::from_micros(micros))
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.close();
    }
}

async fn within<T>(
    limit: Duration,
    address: SocketAddr,
    connecting: impl Future<Output = Result<T, ConnectError>>,
) -> Result<T, ConnectError> {
    let timeout = ConnectError::Timeout {
        address,
        after: limit,
    };
    let result = time::timeout(limit, connecting).await;
    result.unwrap_or(Err(timeout))
}

/// What the link's tasks and its users share.
struct Shared {
    relay: RelayName,
    address: SocketAddr,
    queue: Arc<Queue>,
    /// Written when a peer comes or goes; read for every packet.
    peers: RwLock<Peers>,
    events: mpsc::Sender<LinkEvent>,
    on_data: OnData,
    stop: CancellationToken,
    /// The ping that waits for its answer, and when it went out.
    ping: Mutex<Option<(u64, Instant)>>,
    /// 0: not known.
    rtt_us: Arc<AtomicU64>,
    udp: Option<Udp>,
}

impl Shared {
    fn new(
        relay: RelayName,
        address: SocketAddr,
        queue: Arc<Queue>,
        events: mpsc::Sender<LinkEvent>,
        on_data: OnData,
        udp: Option<Udp>,
        rtt_us: Arc<AtomicU64>,
    ) -> Arc<Self> {
        Arc::new(Self {
            relay,
            address,
            queue,
            peers: RwLock::default(),
            events,
            on_data,
            stop: CancellationToken::new(),
            ping: Mutex::default(),
            rtt_us,
            udp,
        })
    }

    fn send(&self, peer: &NodeId, datagram: &[u8]) -> Result<(), SendError> {
        if datagram.len() > PAYLOAD_LEN_MAX {
            return Err(SendError::TooLarge);
        }
        let session = self.read(|peers| peers.session(peer));
        if let Some(session) = session {
            return self.send_frame(data_frame(session, datagram).into());
        }
        if self.queue.is_closed() {
            return Err(SendError::Closed);
        }
        match self.write(|peers| peers.send_later(*peer, datagram, Instant::now())) {
            Next::Send(session) => self.send_frame(data_frame(session, datagram).into()),
            Next::Wait => Ok(()),
            Next::AskAndWait => {
                self.find_peer(*peer);
                Ok(())
            }
            Next::AskAnyway => {
                self.find_peer(*peer);
                Err(SendError::Absent)
            }
            Next::Absent => Err(SendError::Absent),
            Next::Full => Err(SendError::Full),
        }
    }

    fn send_batch(&self, peer: &NodeId, datagrams: &[u8], segment_len: usize) -> usize {
        let each = datagrams.chunks(segment_len);
        let session = self.read(|peers| peers.session(peer));
        let Some(session) = session.filter(|_| segment_len <= PAYLOAD_LEN_MAX) else {
            return each.filter(|one| self.send(peer, one).is_err()).count();
        };
        let header = data_header(session);
        let mut frames = BytesMut::with_capacity(datagrams.len() + each.len() * HEADER_LEN);
        for datagram in each.clone() {
            frames.put_slice(&header);
            frames.put_slice(datagram);
        }
        let mut frames = frames.freeze();
        let each = each.map(|datagram| frames.split_to(HEADER_LEN + datagram.len()));
        self.queue.push_data(each, Instant::now()).dropped()
    }

    fn send_frame(&self, frame: Bytes) -> Result<(), SendError> {
        let sent = self.queue.push_data(std::iter::once(frame), Instant::now());
        match sent.refused {
            0 => Ok(()),
            _ => Err(SendError::Closed),
        }
    }

    fn find_peer(&self, node: NodeId) {
        self.queue.push_control(Control::FindPeer { node });
    }

    fn on_frames(&self, frames: &[Bytes]) {
        let known: Vec<_> = self.read(|peers| {
            let mut last = None; // Mostly, all of a batch are of one session.
            let node = |frame: &Bytes| {
                let session = data_session(frame)?;
                if let Some((of, node)) = last
                    && of == session
                {
                    return Some(node);
                }
                let node = peers.node(session)?;
                last = Some((session, node));
                Some(node)
            };
            frames.iter().map(node).collect()
        });
        let packets: Vec<_> = frames
            .iter()
            .zip(known)
            .filter_map(|(frame, node)| match node {
                Some(node) => Some((node, frame.slice(HEADER_LEN..))),
                None => {
                    self.on_early_frame(frame);
                    None
                }
            })
            .collect();
        if !packets.is_empty() {
            (self.on_data)(&packets);
        }
    }

    /// A frame of an unknown session, perhaps only not known yet. Other than data only a broken
    /// relay sends.
    fn on_early_frame(&self, frame: &Bytes) {
        if let Ok(Frame::Data { session, .. }) = Frame::decode(frame) {
            self.write(|peers| peers.receive_later(session, frame));
        }
    }

    async fn on_control(&self, message: Control) {
        match message {
            Control::Peer { node, session } => {
                let released = self.write(|peers| peers.set(node, session, Instant::now()));
                self.on_frames(&released.received);
                for datagram in released.to_send {
                    self.send(&node, &datagram).ok(); // Lost, as on any path.
                }
                let present = session.is_some();
                self.tell(LinkEvent::Peer { node, present }).await;
            }
            Control::SessionGone { session } => {
                if let Some(node) = self.write(|peers| peers.forget(session)) {
                    self.find_peer(node);
                }
            }
            Control::GoAway { .. } => self.tell(LinkEvent::GoAway).await,
            Control::Ping { txid } => self.queue.push_control(Control::Pong { txid }),
            Control::Pong { txid } => self.on_pong(txid, Instant::now()),
            // What only nodes say, or is said once.
            Control::Hello { .. }
            | Control::Welcome
            | Control::FindPeer { .. }
            | Control::AskBindKey
            | Control::Unbind { .. } => {}
            Control::BindKey(key) => {
                if let Some(udp) = &self.udp {
                    udp.key(key);
                }
            }
        }
    }

    fn ping(&self, txid: u64) {
        let mut ping = self.ping.lock().unwrap_or_else(PoisonError::into_inner);
        *ping = Some((txid, Instant::now()));
        self.queue.push_control(Control::Ping { txid });
    }

    fn on_pong(&self, txid: u64, now: Instant) {
        let mut ping = self.ping.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((_, sent)) = ping.take_if(|(asked, _)| *asked == txid) else {
            return;
        };
        let sample = now.saturating_duration_since(sent).as_micros();
        let sample = u64::try_from(sample).unwrap_or(u64::MAX).max(1);
        // Smoothed as TCP does it (RFC 6298 §2.3).
        let smoothed = match self.rtt_us.load(Relaxed) {
            0 => sample,
            before => before - before / 8 + sample / 8,
        };
        self.rtt_us.store(smoothed, Relaxed);
    }

    /// The link broke.
    async fn lost(&self, reason: String) {
        self.queue.close("lost");
        self.tell(LinkEvent::Lost { reason }).await;
    }

    async fn tell(&self, event: LinkEvent) {
        self.events.send(event).await.ok(); // Nobody listens any more: the link is going anyway.
    }

    fn read<T>(&self, look: impl FnOnce(&Peers) -> T) -> T {
        look(&self.peers.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write<T>(&self, change: impl FnOnce(&mut Peers) -> T) -> T {
        change(&mut self.peers.write().unwrap_or_else(PoisonError::into_inner))
    }
}
