//! Links to relays: their sockets and tasks, on a thread and runtime of their own, because they
//! carry packets and must not wait for control work.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use mesh_core::{
    io::{Input, RelayTransport},
    snapshot::{DEFAULT_MTU_BYTES, Relay, Snapshot},
};
use mesh_daemon::http_proxy::HttpProxy;
use mesh_identity::credentials::Credentials;
use mesh_linux::{IfIndex, thread::raise_priority};
use mesh_relay::client::{
    self, Link, LinkConfig, LinkEvent, OnData, UdpPort, Waiting,
    outbound::{DeviceFor, Outbound, ResolveFor},
};
use mesh_tunnel::{
    egress::Egress,
    tunnel::{PACKET_NICENESS, RelaySender, RelayUdp, Tunnel},
};
use mesh_wire::{
    id::{Identity, NodeId, RelayId},
    relay::HEADER_LEN,
};
use tokio::{
    runtime::{self, Handle},
    sync::mpsc,
    task::AbortHandle,
};
use tokio_util::sync::CancellationToken;

use crate::{driver::Event, resolve};

/// What WireGuard puts around an inner packet, in bytes.
const WIREGUARD_OVERHEAD: usize = 32;

/// Events of one link that wait: answers about 100 peers, twice over.
const LINK_EVENTS_MAX: usize = 256;

/// All links of this node.
#[derive(Debug)]
pub struct Links {
    runtime: Handle,
    events: mpsc::Sender<Event>,
    tunnel: Tunnel,
    credentials: Arc<ArcSwap<Credentials>>,
    /// Of the overlay; links that come up later use it.
    mtu_bytes: u16,
    /// The uplink that links leave by, and its interface's name; none: the kernel's routes choose.
    egress: Option<Arc<(Egress, String)>>,
    /// Through which links by TLS go, if a proxy is set.
    proxy: Option<Arc<HttpProxy>>,
    hubs: BTreeMap<RelayId, Hub>,
}

/// One relay: its links by transport.
#[derive(Debug)]
struct Hub {
    relay: Relay,
    /// Whose certificate it shows.
    identity: Identity,
    /// Where it was dialled last, the likeliest first.
    addresses: Vec<IpAddr>,
    links: Arc<HubLinks>,
    quic: Option<Task>,
    tls: Option<Task>,
}

/// A link that is made, or is up.
#[derive(Debug)]
struct Task {
    abort: AbortHandle,
    /// The uplink that it leaves by; `None`: it leaves as the kernel's routes say.
    uplink: Option<IfIndex>,
}

impl Hub {
    fn task(&mut self, transport: RelayTransport) -> &mut Option<Task> {
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
    /// Held while the tunnel is told of plain UDP, so that it hears the latest last.
    telling: Mutex<()>,
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

impl HubLinks {
    fn waiting(&self) -> Waiting {
        let mut sum = Waiting::default();
        for link in [&self.quic, &self.tls] {
            sum.add(
                link.load()
                    .as_ref()
                    .map_or(Waiting::default(), |link| link.waiting()),
            );
        }
        sum
    }

    /// Tells the packet path how the relay is reached by plain UDP: while there is a QUIC link its
    /// frames are taken, and while it is bound, and TLS not preferred, they are sent too.
    fn tell_udp(&self, id: RelayId, tunnel: &Tunnel) {
        let _telling = self.telling.lock().unwrap_or_else(PoisonError::into_inner);
        let prefer_tls = self.prefer_tls.load(Ordering::Relaxed);
        let udp = self.quic.load_full().map(|link| RelayUdp {
            address: link.address(),
            sessions: link
                .udp_sessions()
                .filter(|_| !prefer_tls)
                .unwrap_or_default(),
        });
        tunnel.set_relay_udp(id, udp);
    }
}

impl RelaySender for HubLinks {
    fn send(&self, peer: &NodeId, datagrams: &[u8], segment_len: usize) -> usize {
        match self.best() {
            Some((_, link)) => link.send_batch(peer, datagrams, segment_len),
            None => datagrams.len().div_ceil(segment_len),
        }
    }

    fn is_full(&self) -> bool {
        self.best().is_some_and(|(_, link)| link.is_full())
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
        proxy: Option<Arc<HttpProxy>>,
        stop: CancellationToken,
    ) -> io::Result<Self> {
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let handle = runtime.handle().clone();
        let run = move || {
            raise_priority(PACKET_NICENESS);
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
            mtu_bytes: DEFAULT_MTU_BYTES,
            egress: None,
            proxy,
            hubs,
        })
    }

    /// Takes over the relays of a snapshot. Links to relays that are gone or have moved close.
    pub fn set_relays(&mut self, snapshot: &Snapshot) {
        self.mtu_bytes = snapshot.mesh.mtu_bytes;
        let keep = |id: &RelayId, hub: &Hub| {
            let relay = snapshot.relays.get(id).filter(|relay| **relay == hub.relay);
            relay.and_then(|relay| identity(relay, snapshot)).as_ref() == Some(&hub.identity)
        };
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
            let Some(identity) = identity(relay, snapshot) else {
                continue; // Its node is not, or no more, in the mesh.
            };
            let links = Arc::<HubLinks>::default();
            self.tunnel
                .set_relay(*id, Some(Arc::clone(&links) as Arc<dyn RelaySender>));
            let hub = Hub {
                relay: relay.clone(),
                identity,
                addresses: Vec::new(),
                links,
                quic: None,
                tls: None,
            };
            self.hubs.insert(*id, hub);
        }
    }

    /// Begins to connect, at `addresses` in this order. The core hears `RelayConnected` or `RelayLost`.
    pub fn connect(&mut self, id: RelayId, transport: RelayTransport, addresses: Vec<IpAddr>) {
        let Some(hub) = self.hubs.get_mut(&id) else {
            return;
        };
        hub.addresses.clone_from(&addresses);
        let task = LinkTask {
            id,
            addresses,
            relay: hub.relay.clone(),
            identity: hub.identity.clone(),
            transport,
            links: Arc::clone(&hub.links),
            events: self.events.clone(),
            tunnel: self.tunnel.clone(),
            credentials: Arc::clone(&self.credentials),
            frame_len: HEADER_LEN + WIREGUARD_OVERHEAD + usize::from(self.mtu_bytes),
            outbound: Outbound {
                device: self.egress.clone().map(device_for),
                resolve: self.egress.clone().map(resolve_for),
                proxy: self.proxy.clone(),
            },
        };
        let uplink = self.egress.as_ref().map(|egress| egress.0.link());
        let abort = self.runtime.spawn(task.run()).abort_handle();
        if let Some(before) = hub.task(transport).replace(Task { abort, uplink }) {
            before.abort.abort();
        }
    }

    /// Links that are made from now on leave by this uplink; `None`: as the kernel's routes say.
    pub fn set_egress(&mut self, egress: Option<(Egress, String)>) {
        self.egress = egress.map(Arc::new);
    }

    /// Ends links that leave by another uplink than the one in use, and names them. Those that are being
    /// made begin anew: nothing is known of what they leave by. Those to relays that a LAN is nearer to stay.
    pub fn leave_other_uplinks(&mut self) -> Vec<(RelayId, RelayTransport)> {
        let Some(egress) = self.egress.clone() else {
            return Vec::new();
        };
        let in_use = Some(egress.0.link());
        let (mut left, mut begun) = (Vec::new(), Vec::new());
        for (&id, hub) in &mut self.hubs {
            let mut addresses = hub.relay.addresses.iter();
            let is_near = addresses.all(|&ip| egress.0.towards(ip).is_none());
            for transport in [RelayTransport::Quic, RelayTransport::Tls] {
                let by_proxy = transport == RelayTransport::Tls && self.proxy.is_some();
                let leaves = |task: &mut Task| {
                    let stays = task.uplink == in_use || is_near && !by_proxy;
                    // One that has ended has said so itself.
                    !stays && !task.abort.is_finished()
                };
                if hub.task(transport).as_mut().is_some_and(leaves) {
                    let is_up = hub.links.slot(transport).load().is_some();
                    if is_up {
                        left.push((id, transport));
                    } else {
                        begun.push((id, transport, hub.addresses.clone()));
                    }
                }
            }
        }
        for &(id, transport) in &left {
            self.disconnect(id, transport);
        }
        for (id, transport, addresses) in begun {
            self.connect(id, transport, addresses);
        }
        left
    }

    /// Closes a link.
    pub fn disconnect(&mut self, id: RelayId, transport: RelayTransport) {
        let Some(hub) = self.hubs.get_mut(&id) else {
            return;
        };
        if let Some(task) = hub.task(transport).take() {
            task.abort.abort();
        }
        if let Some(link) = hub.links.slot(transport).swap(None) {
            link.close();
        }
        hub.links.tell_udp(id, &self.tunnel);
    }

    /// Sends by this transport while both are up.
    pub fn prefer(&mut self, id: RelayId, transport: RelayTransport) {
        if let Some(hub) = self.hubs.get(&id) {
            hub.links
                .prefer_tls
                .store(transport == RelayTransport::Tls, Ordering::Relaxed);
            hub.links.tell_udp(id, &self.tunnel);
        }
    }

    /// Asks a relay for a peer.
    pub fn find_peer(&self, id: RelayId, peer: NodeId) {
        let link = self.hubs.get(&id).and_then(|hub| hub.links.best());
        if let Some((_, link)) = link {
            link.find_peer(peer);
        }
    }

    /// Packets go by this relay, or should.
    pub fn note_used(&self, id: RelayId) {
        let link = self
            .hubs
            .get(&id)
            .and_then(|hub| hub.links.quic.load_full());
        if let Some(link) = link {
            link.note_used();
        }
    }

    /// Takes a datagram that came from a relay's QUIC port and carries no packet.
    pub fn handle_datagram(&self, from: SocketAddr, datagram: Vec<u8>) {
        let mut links = self
            .hubs
            .values()
            .filter_map(|hub| hub.links.quic.load_full());
        if let Some(link) = links.find(|link| link.address() == from) {
            link.handle_datagram(datagram);
        }
    }

    /// How data goes to a relay, `udp`, `quic` or `tls`, and its round trip, for reports.
    #[must_use]
    pub fn status(&self, id: RelayId) -> Option<(&'static str, Option<Duration>)> {
        let (transport, link) = self.hubs.get(&id)?.links.best()?;
        let transport = match transport {
            RelayTransport::Quic if link.is_udp_bound() => "udp",
            RelayTransport::Quic => "quic",
            RelayTransport::Tls => "tls",
        };
        Some((transport, link.rtt()))
    }

    /// Packets that wait in front of all links.
    #[must_use]
    pub fn waiting(&self) -> Waiting {
        let mut sum = Waiting::default();
        let hubs = self.hubs.values();
        hubs.for_each(|hub| sum.add(hub.links.waiting()));
        sum
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

/// Whose certificate a relay shows: its own, or that of the node that acts as it.
fn identity(relay: &Relay, snapshot: &Snapshot) -> Option<Identity> {
    let Some(name) = &relay.node else {
        return Some(Identity::Relay(relay.name.clone()));
    };
    let node = snapshot.nodes.get(name)?;
    let (name, id) = (node.name.clone(), node.id);
    Some(Identity::Node { name, id })
}

/// Names the interface to an address, where it is not the kernel's routes that choose.
fn device_for(egress: Arc<(Egress, String)>) -> DeviceFor {
    Arc::new(move |ip| {
        let (egress, name) = &*egress;
        egress.towards(ip).map(|_| name.clone())
    })
}

/// The same for the name of the proxy.
fn resolve_for(egress: Arc<(Egress, String)>) -> ResolveFor {
    let device = device_for(egress);
    Arc::new(move |address| {
        let device = Arc::clone(&device);
        Box::pin(async move { resolve::addresses(&address, |ip| device(ip)).await })
    })
}

/// One link's life: connect, report, until it is lost or aborted.
struct LinkTask {
    id: RelayId,
    relay: Relay,
    identity: Identity,
    addresses: Vec<IpAddr>,
    transport: RelayTransport,
    links: Arc<HubLinks>,
    events: mpsc::Sender<Event>,
    tunnel: Tunnel,
    credentials: Arc<ArcSwap<Credentials>>,
    /// Length of a full-size data frame.
    frame_len: usize,
    outbound: Outbound,
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
                self.links.tell_udp(self.id, &self.tunnel);
                self.tell(Input::RelayConnected {
                    relay: self.id,
                    transport: self.transport,
                })
                .await;
                let reason = self.follow(&mut events).await;
                self.links.slot(self.transport).store(None);
                self.links.tell_udp(self.id, &self.tunnel);
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
        let mut problem = "the relay has no address that can be dialled from here".to_owned();
        for &ip in &self.addresses {
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
        let port = self.tunnel.clone();
        let config = LinkConfig {
            relay: self.relay.name.clone(),
            identity: self.identity.clone(),
            address,
            credentials: Credentials::clone(&self.credentials.load()),
            udp: Some(UdpPort {
                send: Arc::new(move |datagram| port.send_raw(address, datagram)),
                frame_len: self.frame_len,
            }),
            outbound: self.outbound.clone(),
        };
        let (id, tunnel) = (self.id, self.tunnel.clone());
        let on_data: OnData = Arc::new(move |packets: &[(NodeId, Bytes)]| {
            tunnel.receive_batch_from_relay(id, packets.iter().map(|(peer, data)| (*peer, data)));
        });
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
                    self.links.tell_udp(relay, &self.tunnel);
                    self.tell(Input::RelayPeer {
                        relay,
                        peer: node,
                        present,
                    })
                    .await;
                }
                LinkEvent::Udp { bound } => {
                    self.links.tell_udp(relay, &self.tunnel);
                    tracing::debug!(relay = %self.relay.name, bound, "plain UDP to the relay");
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
