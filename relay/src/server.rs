//! The relay itself: listeners, one task a link, and the way between them.

use std::{collections::BTreeSet, fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use futures_util::future;
use mesh_core::relay_server::Limits;
use mesh_daemon::metrics::Page;
use mesh_identity::{
    certificate::peer_identity,
    credentials::Credentials,
    tls::{ClientAuth, server_config},
};
use mesh_wire::{
    id::{Identity, NodeId},
    relay::{ALPN_QUIC, ALPN_TLS},
};
use quinn_proto::{
    EndpointConfig, HashedConnectionIdGenerator, ServerConfig, crypto::rustls::QuicServerConfig,
};
use rand::Rng as _;
use ring::hmac;
use rustls::pki_types::CertificateDer;
use tokio::{net::TcpListener, sync::Semaphore, time};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{hub::Hub, udp::SharedSocket};
use crate::{
    config::Listen,
    quic::{
        self,
        endpoint::{Endpoint, Socket},
    },
    sockets,
};

mod hub;
mod quic_link;
mod tls_link;
mod totals;
mod udp;

/// TLS handshakes at once, of either transport: 256 × 50 KiB; at 1 ms of processor each, a quarter
/// of a second of work. One more is refused.
const HANDSHAKES_MAX: usize = 256;

/// Time from the first byte to the node's `Hello`.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Time that nodes have to move away after `GoAway`.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// Time for the last goodbyes after that.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);

/// Time between two stateless resets: after a restart, 1,024 nodes learn within seconds that their
/// connections are gone. A reset is shorter than what provoked it.
const RESET_INTERVAL_MIN: Duration = Duration::from_millis(1);

/// What nodes are told when the relay stops.
const STOPPING: &str = "the relay is stopping";

/// How often counters are looked at, and written down if something was refused or dropped.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);

/// A relay whose ports are open.
pub struct Relay {
    endpoint: Endpoint,
    socket: Arc<SharedSocket>,
    listener: TcpListener,
    stun: Vec<Arc<SharedSocket>>,
    shared: Arc<Shared>,
}

/// What can be changed while a relay runs.
#[derive(Debug, Clone)]
pub struct RelayHandle(Arc<Shared>);

impl RelayHandle {
    /// Whom the relay serves from now on: one node of each pair is one of these. `None`: everybody.
    pub fn set_served(&self, served: Option<BTreeSet<NodeId>>) {
        self.0.hub.set_served(served);
    }

    /// What it counted, for Prometheus.
    #[must_use]
    pub fn metrics(&self) -> Page {
        self.0.hub.totals_now().page(self.0.hub.waiting())
    }

    /// What the relay shows of itself from now on, to who comes; links that are there stay.
    ///
    /// # Errors
    ///
    /// [`BindError::Tls`]; the former stay in force.
    pub fn set_credentials(&self, credentials: &Credentials) -> Result<(), BindError> {
        self.0.tls.store(Arc::new(Tls::new(credentials)?));
        Ok(())
    }
}

/// How the relay shows itself to who comes.
#[derive(Clone)]
struct Tls {
    quic: Arc<ServerConfig>,
    tcp: TlsAcceptor,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

impl Tls {
    fn new(credentials: &Credentials) -> Result<Self, BindError> {
        let config = |alpn| server_config(credentials, ClientAuth::Required, &[alpn]);
        let tcp = config(ALPN_TLS).map_err(bad_tls)?;
        let quic = QuicServerConfig::try_from(config(ALPN_QUIC).map_err(bad_tls)?);
        let quic = quic.map_err(|error| BindError::Tls(error.to_string()))?;
        let mut quic = ServerConfig::with_crypto(Arc::new(quic));
        quic.transport_config(quic::transport_config(1, None));
        quic.max_incoming(HANDSHAKES_MAX);
        Ok(Self {
            quic: Arc::new(quic),
            tcp: TlsAcceptor::from(Arc::new(tcp)),
        })
    }
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay").finish_non_exhaustive()
    }
}

/// What every task of the relay needs.
#[derive(Debug)]
struct Shared {
    hub: Arc<Hub>,
    tls: ArcSwap<Tls>,
    trust_domain: String,
    handshakes: Arc<Semaphore>,
    links: TaskTracker,
    /// All links end.
    close: CancellationToken,
}

impl Shared {
    /// The node that a chain of certificates names; `None`: it is not one of this mesh's nodes.
    /// That the chain is genuine was the handshake's business.
    fn node(&self, chain: &[CertificateDer<'_>]) -> Option<NodeId> {
        match peer_identity(chain).ok()? {
            (domain, Identity::Node { id, .. }) if domain == self.trust_domain => Some(id),
            (_, Identity::Node { .. } | Identity::Relay(_) | Identity::Controller) => None,
        }
    }
}

/// Why a relay cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A port cannot be had.
    #[error("cannot listen on {protocol} {address} (`{key}`): {source}")]
    Listen {
        /// `UDP` or `TCP`.
        protocol: &'static str,
        /// The address.
        address: SocketAddr,
        /// Its key in the configuration.
        key: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The certificate cannot be used.
    #[error("TLS settings: {0}")]
    Tls(String),
}

/// A task that should have run for as long as the relay ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the {0} task ended early")]
pub struct EndedEarly(&'static str);

impl Relay {
    /// Opens the ports. Must be called on a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`BindError`] that names the port and its key.
    pub fn bind(
        listen: &Listen,
        credentials: &Credentials,
        limits: Limits,
    ) -> Result<Self, BindError> {
        let mut secret = [0; 32];
        rand::rng().fill_bytes(&mut secret);
        let hub = Arc::new(Hub::new(limits, &secret));
        let quic_socket = udp_socket(listen.quic, "quic_listen")?;
        let overrun = hub.overrun_counter();
        let tls = Tls::new(credentials)?;
        let config = endpoint_config(credentials.key_pem().as_bytes());
        let quic = Some((*tls.quic).clone());
        let endpoint = Endpoint::new(quic_socket.clone(), config, quic, overrun);
        let stun = listen.stun.iter();
        let stun = stun.map(|&address| {
            let socket = udp_socket(address, "stun_listen")?;
            Ok(Arc::new(SharedSocket::new(socket, false, hub.clone())))
        });
        let stun = stun.collect::<Result<_, _>>()?;
        let listener = tcp_listener(listen.tls)?;
        Ok(Self {
            endpoint,
            socket: Arc::new(SharedSocket::new(quic_socket, true, hub.clone())),
            listener,
            stun,
            shared: Arc::new(Shared {
                hub,
                tls: ArcSwap::from_pointee(tls),
                trust_domain: credentials.trust_domain().to_owned(),
                handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)),
                links: TaskTracker::new(),
                close: CancellationToken::new(),
            }),
        })
    }

    /// What can be changed while it runs.
    #[must_use]
    pub fn handle(&self) -> RelayHandle {
        RelayHandle(Arc::clone(&self.shared))
    }

    /// Serves until `stop` is cancelled; then tells the nodes to go, waits a little, and closes.
    ///
    /// # Errors
    ///
    /// [`EndedEarly`] when a socket broke.
    pub async fn run(self, stop: CancellationToken) -> Result<(), EndedEarly> {
        self.log_addresses();
        let Self {
            endpoint,
            socket,
            listener,
            stun,
            shared,
        } = self;
        // Still serves while the relay stops.
        let mut quic = tokio::spawn(quic_link::serve_all(endpoint, socket, shared.clone()));
        let serve_stun = stun.iter().map(|socket| Box::pin(socket.clone().serve()));
        let ended = tokio::select! {
            () = stop.cancelled() => Ok(()),
            _ = &mut quic => Err(EndedEarly("QUIC")),
            () = tls_link::accept(&listener, &shared) => Err(EndedEarly("TLS")),
            _ = future::select_all(serve_stun), if !stun.is_empty() => Err(EndedEarly("STUN")),
            () = report(&shared) => Err(EndedEarly("report")),
        };
        drop(listener); // New nodes go elsewhere at once.
        shared.hub.stop(STOP_GRACE);
        shared.links.close();
        time::timeout(STOP_GRACE, shared.links.wait()).await.ok(); // Who stays is closed next.
        shared.close.cancel();
        time::timeout(GOODBYE_TIMEOUT, shared.links.wait())
            .await
            .ok();
        quic.abort();
        shared.hub.log_totals();
        ended
    }

    fn log_addresses(&self) {
        let (quic, tls) = (self.socket.local_addr(), self.listener.local_addr());
        if let (Ok(quic), Ok(tls)) = (quic, tls) {
            let stun = self
                .stun
                .iter()
                .filter_map(|socket| socket.local_addr().ok());
            let stun: Vec<_> = stun.collect();
            tracing::info!(%quic, %tls, ?stun, "listening");
        }
    }
}

async fn report(shared: &Shared) {
    let mut every = time::interval(REPORT_INTERVAL);
    loop {
        every.tick().await;
        shared.hub.log_drops();
    }
}

fn udp_socket(address: SocketAddr, key: &'static str) -> Result<Arc<Socket>, BindError> {
    let bound = sockets::udp(address).and_then(Socket::new);
    let bound = bound.map_err(|source| BindError::Listen {
        protocol: "UDP",
        address,
        key,
        source,
    });
    bound.map(Arc::new)
}

fn tcp_listener(address: SocketAddr) -> Result<TcpListener, BindError> {
    let bound = sockets::tcp_listener(address).and_then(TcpListener::from_std);
    bound.map_err(|source| BindError::Listen {
        protocol: "TCP",
        address,
        key: "tls_listen",
        source,
    })
}

/// Connection ids and reset tokens come from the relay's own key, so that a relay that starts
/// again can tell the nodes of its life before that their connections are gone (RFC 9000 §10.3).
/// Otherwise they would wait for [`quic::IDLE_TIMEOUT`].
fn endpoint_config(key: &[u8]) -> EndpointConfig {
    let derive = |purpose: &[u8]| hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), purpose);
    let reset = derive(b"holdfast relay: stateless reset");
    let reset = hmac::Key::new(hmac::HMAC_SHA256, reset.as_ref());
    let ids = derive(b"holdfast relay: connection ids");
    let ids = u64::from_be_bytes(ids.as_ref().first_chunk().copied().unwrap_or_default());
    let mut config = EndpointConfig::new(Arc::new(reset));
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(ids)));
    config.min_reset_interval(RESET_INTERVAL_MIN);
    quic::without_grease(config)
}

fn bad_tls(error: rustls::Error) -> BindError {
    BindError::Tls(mesh_identity::tls::explain(&error))
}
