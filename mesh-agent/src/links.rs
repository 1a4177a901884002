//! Links to relays: their sockets and tasks, on a thread and runtime of their own, because they
//! carry packets and must not wait for control work.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use arc_swap::{ArcSwap, ArcSwapOption};
use mesh_core::{
    io::{Input, RelayTransport},
    snapshot::{Relay, Snapshot},
};
use mesh_identity::credentials::Credentials;
use mesh_relay::client::{self, Link, LinkConfig, LinkEvent};
use mesh_tunnel::tunnel::{RelaySender, Tunnel};
use mesh_wire::id::{NodeId, RelayId};
use tokio::{
    runtime::{self, Handle},
    sync::mpsc,
    task::AbortHandle,
};
use tokio_util::sync::CancellationToken;

use crate::driver::Event;

/// Events of one link that wait: answers about 100 peers, twice over.
const LINK_EVENTS_MAX: usize = 256;

/// All links of this node.
#[derive(Debug)]
pub struct Links {
    runtime: Handle,
    events: mpsc::Sender<Event>,
    tunnel: Tunnel,
    credentials: Arc<ArcSwap<Credentials>>,
    hubs: BTreeMap<RelayId, Hub>,
}

/// One relay: its links by transport.
#[derive(Debug)]
struct Hub {
    relay: Relay,
    links: Arc<HubLinks>,
    quic: Option<AbortHandle>,
    tls: Option<AbortHandle>,
}

impl Hub {
    fn task(&mut self, transport: RelayTransport) -> &mut Option<AbortHandle> {
        match transport {
            RelayTransport::Quic => &mut self.quic,
            RelayTransport::Tls => &mut self.tls,
        }
    }
}

/// What the packet threads see of a relay.
#[derive(Debug, Default)]
struct HubLinks {
    quic: ArcSwapOption<Link>,
    tls: ArcSwapOption<Link>,
    prefer_tls: AtomicBool,
}

impl HubLinks {
    fn slot(&self, transport: RelayTransport) -> &ArcSwapOption<Link> {
        match transport {
            RelayTransport::Quic => &self.quic,
            RelayTransport::Tls => &self.tls,
        }
    }

    fn best(&self) -> Option<(RelayTransport, Arc<Link>)> {
        let order = if self.prefer_tls.load(Ordering::Relaxed) {
            [RelayTransport::Tls, RelayTransport::Quic]
        } else {
            [RelayTransport::Quic, RelayTransport::Tls]
        };
        let up = |transport: RelayTransport| Some((transport, self.slot(transport).load_full()?));
        order.into_iter().find_map(up)
    }
}

impl RelaySender for HubLinks {
    fn send(&self, peer: &NodeId, datagrams: &[u8], segment_len: usize) -> usize {
        let each = datagrams.chunks(segment_len);
        match self.best() {
            Some((_, link)) => each.filter(|one| link.send(peer, one).is_err()).count(),
            None => each.count(),
        }
    }
}

impl Links {
    /// Starts the thread of the links; it ends with `stop`.
    ///
    /// # Errors
    ///
    /// If the thread or its runtime cannot be made.
    pub fn start(
        events: mpsc::Sender<Event>,
        tunnel: Tunnel,
        credentials: Arc<ArcSwap<Credentials>>,
        stop: CancellationToken,
    ) -> io::Result<Self> {
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let handle = runtime.handle().clone();
        let run = move || {
            runtime.block_on(stop.cancelled());
            // Sockets close with the runtime; a close frame may still go out.
            runtime.shutdown_timeout(Duration::from_millis(200));
        };
        thread::Builder::new()
            .name("relay-links".to_owned())
            .spawn(run)?;
        let hubs = BTreeMap::new();
        Ok(Self {
            runtime: handle,
            events,
            tunnel,
            credentials,
            hubs,
        })
    }

    /// Takes over the relays of a snapshot. Links to relays that are gone or have moved close.
    pub fn set_relays(&mut self, snapshot: &Snapshot) {
        let keep = |id: &RelayId, hub: &Hub| snapshot.relays.get(id) == Some(&hub.relay);
        let gone: Vec<_> = self
            .hubs
            .iter()
            .filter(|(id, hub)| !keep(id, hub))
            .map(|(id, _)| *id)
            .collect();
        for id in gone {
            self.disconnect(id, RelayTransport::Quic);
            self.disconnect(id, RelayTransport::Tls);
            self.hubs.remove(&id);
            self.tunnel.set_relay(id, None);
        }
        for (id, relay) in &snapshot.relays {
            if self.hubs.contains_key(id) {
                continue;
            }
            let links = Arc::<HubLinks>::default();
            self.tunnel
                .set_relay(*id, Some(Arc::clone(&links) as Arc<dyn RelaySender>));
            let hub = Hub {
                relay: relay.clone(),
                links,
                quic: None,
                tls: None,
            };
            self.hubs.insert(*id, hub);
        }
    }

    /// Begins to connect. The core hears `RelayConnected` or `RelayLost`.
    pub fn connect(&mut self, id: RelayId, transport: RelayTransport) {
        let Some(hub) = self.hubs.get_mut(&id) else {
            return;
        };
        let task = LinkTask {
            id,
            relay: hub.relay.clone(),
            transport,
            links: Arc::clone(&hub.links),
            events: self.events.clone(),
            tunnel: self.tunnel.clone(),
            credentials: Arc::clone(&self.credentials),
        };
        let abort = self.runtime.spawn(task.run()).abort_handle();
        if let Some(before) = hub.task(transport).replace(abort) {
            before.abort();
        }
    }

    /// Closes a link.
    pub fn disconnect(&mut self, id: RelayId, transport: RelayTransport) {
        let Some(hub) = self.hubs.get_mut(&id) else {
            return;
        };
        if let Some(task) = hub.task(transport).take() {
            task.abort();
        }
        if let Some(link) = hub.links.slot(transport).swap(None) {
            link.close();
        }
    }

    /// Sends by this transport while both are up.
    pub fn prefer(&mut self, id: RelayId, transport: RelayTransport) {
        if let Some(hub) = self.hubs.get(&id) {
            hub.links
                .prefer_tls
                .store(transport == RelayTransport::Tls, Ordering::Relaxed);
        }
    }

    /// Asks a relay for a peer.
    pub fn find_peer(&self, id: RelayId, peer: NodeId) {
        let link = self.hubs.get(&id).and_then(|hub| hub.links.best());
        if let Some((_, link)) = link {
            link.find_peer(peer);
        }
    }

    /// The transport in use and its round trip, for reports.
    #[must_use]
    pub fn status(&self, id: RelayId) -> Option<(RelayTransport, Option<Duration>)> {
        let (transport, link) = self.hubs.get(&id)?.links.best()?;
        Some((transport, link.rtt()))
    }

    /// Closes every link.
    pub fn close_all(&mut self) {
        let ids: Vec<_> = self.hubs.keys().copied().collect();
        for id in ids {
            self.disconnect(id, RelayTransport::Quic);
            self.disconnect(id, RelayTransport::Tls);
        }
    }
}

/// One link's life: connect, report, until it is lost or aborted.
struct LinkTask {
    id: RelayId,
    relay: Relay,
    transport: RelayTransport,
    links: Arc<HubLinks>,
    events: mpsc::Sender<Event>,
    tunnel: Tunnel,
    credentials: Arc<ArcSwap<Credentials>>,
}

impl LinkTask {
    async fn run(self) {
        let (sender, mut events) = mpsc::channel(LINK_EVENTS_MAX);
        let reason = match self.connect(sender).await {
            Ok(link) => {
                let link = Arc::new(link);
                self.links
                    .slot(self.transport)
                    .store(Some(Arc::clone(&link)));
                self.tell(Input::RelayConnected {
                    relay: self.id,
                    transport: self.transport,
                })
                .await;
                let reason = self.follow(&mut events).await;
                self.links.slot(self.transport).store(None);
                link.close();
                reason
            }
            Err(reason) => reason,
        };
        self.tell(Input::RelayLost {
            relay: self.id,
            transport: self.transport,
            reason,
        })
        .await;
    }

    /// Tries the relay's addresses one after the other.
    async fn connect(&self, events: mpsc::Sender<LinkEvent>) -> Result<Link, String> {
        let mut problem = "the relay has no address".to_owned();
        for &ip in &self.relay.addresses {
            let port = match self.transport {
                RelayTransport::Quic => self.relay.quic_port,
                RelayTransport::Tls => self.relay.tls_port,
            };
            match self
                .connect_to(SocketAddr::new(ip, port), events.clone())
                .await
            {
                Ok(link) => return Ok(link),
                Err(error) => problem = error.to_string(),
            }
        }
        Err(problem)
    }

    async fn connect_to(
        &self,
        address: SocketAddr,
        events: mpsc::Sender<LinkEvent>,
    ) -> Result<Link, client::ConnectError> {
        let config = LinkConfig {
            relay: self.relay.name.clone(),
            address,
            credentials: Credentials::clone(&self.credentials.load()),
        };
        let (id, tunnel) = (self.id, self.tunnel.clone());
        let on_data =
            Arc::new(move |peer: NodeId, data: &[u8]| tunnel.receive_from_relay(id, peer, data));
        match self.transport {
            RelayTransport::Quic => client::connect_quic(config, events, on_data).await,
            RelayTransport::Tls => client::connect_tls(config, events, on_data).await,
        }
    }

    async fn follow(&self, events: &mut mpsc::Receiver<LinkEvent>) -> String {
        let relay = self.id;
        while let Some(event) = events.recv().await {
            match event {
                LinkEvent::Peer { node, present } => {
                    self.tell(Input::RelayPeer {
                        relay,
                        peer: node,
                        present,
                    })
                    .await;
                }
                LinkEvent::GoAway => self.tell(Input::RelayGoAway { relay }).await,
                LinkEvent::Lost { reason } => return reason,
            }
        }
        "the link ended".to_owned()
    }

    async fn tell(&self, input: Input) {
        self.events.send(Event::Core(input)).await.ok(); // Fails only while the agent stops.
    }
}
