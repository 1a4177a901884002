//! A node's link to a relay, by QUIC or by TLS: the same to whoever uses it.
//!
//! A link is up when [`connect_quic`] or [`connect_tls`] returns, and down after exactly one
//! [`LinkEvent::Lost`], unless the node closed it itself. Its tasks run on the tokio runtime that
//! made it; [`Link::send`] may be called from any thread and never waits.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use mesh_identity::credentials::Credentials;
use mesh_wire::{
    id::{NodeId, RelayName},
    relay::{Control, Frame, PAYLOAD_LEN_MAX, data_frame},
};
use tokio::{sync::mpsc, time};
use tokio_util::sync::CancellationToken;

use self::peers::{Next, Peers};
use crate::{outlet::Outlet, quic::Sent};

mod connect;
mod peers;

/// Time for a QUIC link to come up; after that UDP is taken to be blocked (`paths.md`).
pub const QUIC_CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Time for a TLS link to come up: two lost SYNs (1 and 2 s), and four round trips.
pub const TLS_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a relay is, and who we are.
#[derive(Debug, Clone)]
pub struct LinkConfig {
    /// The relay's name: its certificate must carry it.
    pub relay: RelayName,
    /// Its address, with the port of the transport.
    pub address: SocketAddr,
    /// The node's certificate, its key and the mesh's authority.
    pub credentials: Credentials,
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
    /// The relay stops soon: use another.
    GoAway,
    /// The link is down. Nothing comes after this.
    Lost {
        /// For people.
        reason: String,
    },
}

/// What is called for each packet that comes: whose it is, and the packet. On a tokio thread; it
/// must not wait.
pub type OnData = Arc<dyn Fn(NodeId, &[u8]) + Send + Sync>;

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
        let transport = match self.shared.outlet {
            Outlet::Quic { .. } => "quic",
            Outlet::Tls(_) => "tls",
        };
        f.debug_struct("Link")
            .field("relay", &self.shared.relay)
            .field("transport", &transport)
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
        match &self.shared.outlet {
            Outlet::Quic { connection, .. } => Some(connection.rtt()),
            Outlet::Tls(_) => {
                let micros = self.shared.rtt_us.load(Relaxed);
                (micros > 0).then(|| Duration::from_micros(micros))
            }
        }
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
    outlet: Outlet,
    /// Written when a peer comes or goes; read for every packet.
    peers: RwLock<Peers>,
    events: mpsc::Sender<LinkEvent>,
    on_data: OnData,
    stop: CancellationToken,
    /// The ping that waits for its answer, and when it went out.
    ping: Mutex<Option<(u64, Instant)>>,
    /// 0: not known.
    rtt_us: AtomicU64,
}

impl Shared {
    fn new(
        relay: RelayName,
        outlet: Outlet,
        events: mpsc::Sender<LinkEvent>,
        on_data: OnData,
    ) -> Arc<Self> {
        Arc::new(Self {
            relay,
            outlet,
            peers: RwLock::default(),
            events,
            on_data,
            stop: CancellationToken::new(),
            ping: Mutex::default(),
            rtt_us: AtomicU64::new(0),
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
        if self.outlet.is_closed() {
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

    fn send_frame(&self, frame: Bytes) -> Result<(), SendError> {
        match self.outlet.send_data(frame) {
            Sent::Yes | Sent::InPlaceOfOlder => Ok(()),
            Sent::Full => Err(SendError::Full),
            Sent::Closed => Err(SendError::Closed),
        }
    }

    fn find_peer(&self, node: NodeId) {
        self.outlet.send_control(Control::FindPeer { node });
    }

    fn on_frame(&self, frame: Bytes) {
        let Ok(Frame::Data { session, payload }) = Frame::decode(&frame) else {
            return; // Only a broken relay sends that.
        };
        match self.read(|peers| peers.node(session)) {
            Some(node) => (self.on_data)(node, payload),
            None => self.write(|peers| peers.receive_later(session, &frame)),
        }
    }

    async fn on_control(&self, message: Control) {
        match message {
            Control::Peer { node, session } => {
                let released = self.write(|peers| peers.set(node, session, Instant::now()));
                for frame in released.received {
                    self.on_frame(frame);
                }
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
            Control::Ping { txid } => self.outlet.send_control(Control::Pong { txid }),
            Control::Pong { txid } => self.on_pong(txid, Instant::now()),
            // What only nodes say, or is said once.
            Control::Hello { .. } | Control::Welcome | Control::FindPeer { .. } => {}
        }
    }

    fn ping(&self, txid: u64) {
        let mut ping = self.ping.lock().unwrap_or_else(PoisonError::into_inner);
        *ping = Some((txid, Instant::now()));
        self.outlet.send_control(Control::Ping { txid });
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
        self.outlet.close("lost");
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
