//! The loop around the core: feeds it what happened, performs what it decides, and publishes the
//! view from which services and names are answered.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::bail;
use mesh_core::{
    gateways::Gateways,
    io::{self, Input, Output, Refusal, SOCKETS_KEPT, SOCKETS_TRIED, TRAFFIC_TICK_MS, UplinkId},
    node::{Core, path::PathKind, report::PathWish},
    services::{Costs, View},
    snapshot::{ExternalPeer, Node, Snapshot},
};
use mesh_linux::IfIndex;
use mesh_tunnel::{
    route::RouteTable,
    tunnel::{Burst, External, Tunnel, TunnelEvent},
};
use mesh_wire::{
    id::{NodeId, NodeName, RelayId, Via},
    peer::PeerMessage,
    reflexive,
};
use rand::Rng as _;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time,
};
use tokio_util::sync::CancellationToken;

use crate::{
    journal::Journal,
    links::Links,
    sync::news::News,
    uplinks::{NamedUplink, Network, Way},
};

/// Events that wait for the driver. A full queue makes packet threads drop events, which costs
/// a retry: 100 peers with ten messages each.
pub const EVENTS_MAX: usize = 1024;

/// STUN requests without an answer that are remembered: two ports of two relays in two
/// families, retransmitted five times, with room to spare.
const STUN_PENDING_MAX: usize = 64;

/// How long an answer to a STUN request counts (`paths.md`: gather, 3 s at most).
const STUN_PENDING_TTL: Duration = Duration::from_secs(3);

/// How often the cost of paths is looked at: a look sorts 100 samples of each path in use.
const COSTS_EVERY: Duration = Duration::from_secs(5);

/// Pings of operators that wait for an answer at once.
const PINGS_MAX: usize = 64;

/// Something for the driver.
pub enum Event {
    /// For the core.
    Core(Input),
    /// The ways out of this machine are these now.
    Network(Network),
    /// From the packet path.
    Tunnel(TunnelEvent),
    /// A question, answered on the driver's own thread.
    Query(Box<dyn FnOnce(&mut Driver) + Send>),
}

impl std::fmt::Debug for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Core(input) => f.debug_tuple("Core").field(input).finish(),
            Self::Network(network) => f.debug_tuple("Network").field(network).finish(),
            Self::Tunnel(event) => f.debug_tuple("Tunnel").field(event).finish(),
            Self::Query(_) => f.write_str("Query"),
        }
    }
}

/// The shell around the core.
#[expect(
    missing_debug_implementations,
    reason = "it holds everything; its parts are shown by name"
)]
pub struct Driver {
    /// Decides.
    pub core: Core,
    /// Moves packets.
    pub tunnel: Tunnel,
    /// What changed last.
    pub journal: Journal,
    links: Links,
    node: NodeName,
    snapshot: Arc<Snapshot>,
    names: BTreeMap<NodeId, NodeName>,
    externals: BTreeMap<NodeId, ExternalPeer>,
    gateways: Gateways,
    local_addresses: Vec<SocketAddr>,
    network: Network,
    /// The uplink in use; `None`: the kernel's routes choose.
    uplink: Option<UplinkId>,
    ways: watch::Sender<Way>,
    news: News,
    static_candidates: Vec<SocketAddr>,
    dead: BTreeSet<NodeName>,
    ejected: BTreeSet<SocketAddr>,
    open: BTreeMap<SocketAddr, u32>,
    measured: Costs,
    costs: BTreeMap<NodeName, Duration>,
    views: watch::Sender<Option<Arc<View>>>,
    remembered: watch::Sender<BTreeMap<NodeId, Vec<SocketAddr>>>,
    stun: BTreeMap<[u8; 12], StunRequest>,
    pings: BTreeMap<u64, oneshot::Sender<()>>,
    /// Why the packet path is gone.
    broken: Option<String>,
}

struct StunRequest {
    asks: Asks,
    target: SocketAddr,
    sent: Instant,
}

/// What a STUN request is to find out.
enum Asks {
    /// How this node looks from a relay.
    Address(RelayId),
    /// Whether an uplink leads anywhere.
    Uplink(UplinkId),
}

/// An echo that is under way.
#[derive(Debug)]
pub struct Ping {
    /// By what it went.
    pub via: Via,
    /// What kind of path that is.
    pub kind: PathKind,
    /// Hears when it comes back.
    pub answer: oneshot::Receiver<()>,
}

/// Why no echo was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoPing {
    /// The peer has no path now, and is being woken.
    Waking,
    /// It has others, not the one that was asked for.
    NoPath,
    /// [`PINGS_MAX`] wait for their answers.
    TooMany,
}

/// What a driver is made of.
#[expect(
    missing_debug_implementations,
    reason = "a bundle that lives for one call"
)]
pub struct Parts {
    /// Decides.
    pub core: Core,
    /// Moves packets.
    pub tunnel: Tunnel,
    /// Links to relays.
    pub links: Links,
    /// This node.
    pub node: NodeName,
    /// Addresses of its own that its configuration names.
    pub static_candidates: Vec<SocketAddr>,
    /// The desired state to begin with.
    pub snapshot: Arc<Snapshot>,
    /// Where the view goes.
    pub views: watch::Sender<Option<Arc<View>>>,
    /// Where addresses that worked go.
    pub remembered: watch::Sender<BTreeMap<NodeId, Vec<SocketAddr>>>,
    /// Where it is said how the node's own connections leave.
    pub ways: watch::Sender<Way>,
    /// Where it is said that a controller may be reached again.
    pub news: News,
    /// The ways out of this machine, known before anything is sent, so that nothing goes where it costs; `None`: the
    /// kernel's routes choose.
    pub network: Option<Network>,
}

impl Driver {
    /// A driver that has handed `parts.snapshot` to everyone.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        let mut driver = Self {
            core: parts.core,
            tunnel: parts.tunnel,
            journal: Journal::default(),
            links: parts.links,
            node: parts.node,
            snapshot: Arc::clone(&parts.snapshot),
            names: BTreeMap::new(),
            externals: BTreeMap::new(),
            gateways: Gateways::default(),
            local_addresses: Vec::new(),
            network: Network::default(),
            uplink: None,
            ways: parts.ways,
            news: parts.news,
            static_candidates: parts.static_candidates,
            dead: BTreeSet::new(),
            ejected: BTreeSet::new(),
            open: BTreeMap::new(),
            measured: Costs::default(),
            costs: BTreeMap::new(),
            views: parts.views,
            remembered: parts.remembered,
            stun: BTreeMap::new(),
            pings: BTreeMap::new(),
            broken: None,
        };
        if let Some(network) = parts.network {
            driver.handle_event(Event::Network(network));
        }
        driver.take_snapshot(parts.snapshot);
        driver
    }

    /// Runs until `stop`; then says goodbye to the peers.
    ///
    /// # Errors
    ///
    /// When the packet path broke.
    pub async fn run(
        mut self,
        mut events: mpsc::Receiver<Event>,
        mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        let mut tick = time::interval(Duration::from_millis(TRAFFIC_TICK_MS));
        tick.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        let mut costs = time::interval(COSTS_EVERY);
        costs.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        loop {
            self.perform();
            if let Some(problem) = self.broken.take() {
                bail!("the packet path broke: {problem}");
            }
            let deadline = self.core.poll_timeout();
            tokio::select! {
                () = stop.cancelled() => break,
                Some(event) = events.recv() => self.handle_event(event),
                _ = tick.tick() => self.report_traffic(),
                _ = costs.tick() => self.take_costs(),
                () = sleep_until(deadline) => self.input(Input::Timeout),
                Ok(()) = snapshots.changed() => {
                    let snapshot = snapshots.borrow_and_update().clone();
                    if let Some(snapshot) = snapshot {
                        self.take_snapshot(snapshot);
                    }
                }
            }
        }
        self.core.shut_down();
        self.perform();
        self.links.close_all();
        Ok(())
    }

    /// The desired state in force.
    #[must_use]
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// This node, if the snapshot still has it.
    #[must_use]
    pub fn own(&self) -> Option<&Node> {
        self.snapshot.nodes.get(&self.node)
    }

    /// The view in force.
    #[must_use]
    pub fn view(&self) -> Option<Arc<View>> {
        self.views.borrow().clone()
    }

    /// The node with this key.
    #[must_use]
    pub fn node_by_id(&self, id: &NodeId) -> Option<&Node> {
        self.names
            .get(id)
            .and_then(|name| self.snapshot.nodes.get(name))
    }

    /// This node's name.
    #[must_use]
    pub fn name(&self) -> &NodeName {
        &self.node
    }

    /// The plain WireGuard devices whose gateway this node is.
    pub fn externals(&self) -> impl Iterator<Item = &ExternalPeer> {
        self.snapshot
            .external_peers
            .values()
            .filter(|peer| peer.gateway == self.node)
    }

    /// Where the node's own socket can be reached on its interfaces.
    #[must_use]
    pub fn local_addresses(&self) -> &[SocketAddr] {
        &self.local_addresses
    }

    /// The ways out of this machine, and whether each is in use; empty while the kernel's routes choose.
    pub fn uplinks(&self) -> impl Iterator<Item = (&NamedUplink, bool)> {
        let uplinks = self.network.uplinks.iter();
        uplinks.map(|one| (one, Some(one.told.id) == self.uplink))
    }

    /// The links to relays.
    #[must_use]
    pub fn links(&self) -> &Links {
        &self.links
    }

    /// Sends one echo to a peer. The core hears neither of it nor of its answer: what is measured here by another path than
    /// the one in use decides nothing.
    ///
    /// # Errors
    ///
    /// If there is nothing to send it by: try again.
    pub fn ping(&mut self, peer: NodeId, wish: PathWish) -> Result<Ping, NoPing> {
        self.pings.retain(|_, waiting| !waiting.is_closed());
        let report = self.core.peer_report(&peer);
        let Some(report) = report.filter(|report| report.via.is_some()) else {
            self.input(Input::Wanted { peer });
            return Err(NoPing::Waking);
        };
        let path = report.path_for(wish).ok_or(NoPing::NoPath)?;
        let (via, kind) = (path.via, path.kind);
        if self.pings.len() == PINGS_MAX {
            return Err(NoPing::TooMany);
        }
        let txid = rand::rng().next_u64();
        let (answered, answer) = oneshot::channel();
        self.pings.insert(txid, answered);
        self.send(
            &peer,
            via,
            &PeerMessage::EchoRequest {
                txid,
                size_bytes: 0,
            },
        );
        Ok(Ping { via, kind, answer })
    }

    /// What an operator sends to a peer counts as traffic: a better path is looked for.
    pub fn seek(&mut self, peer: NodeId) {
        self.input(Input::Traffic {
            peer,
            sent: true,
            received: Vec::new(),
        });
    }

    fn input(&mut self, input: Input) {
        self.core.handle_input(input, now());
    }

    fn handle_event(&mut self, event: Event) {
        match event {
            Event::Core(input) => {
                if let Input::LocalAddresses(addresses) = &input {
                    self.set_local_addresses(addresses.clone());
                }
                self.news.handle_input(&input);
                let relays = &self.snapshot.relays;
                self.journal.note_input(now(), &input, |relay| {
                    let relay = relays.get(relay);
                    relay.map_or_else(|| "?".to_owned(), |relay| relay.name.to_string())
                });
                self.input(input);
            }
            Event::Network(network) => {
                let uplinks = network.uplinks.iter().map(|one| one.told.clone());
                let input = Input::Uplinks(uplinks.collect());
                // Each pod's route is news, too, and none about an uplink that is being asked.
                let changed = self.network.uplinks != network.uplinks;
                self.network = network;
                if changed {
                    self.news.handle_network();
                    self.forget_asked();
                    self.input(input);
                }
                self.follow_uplink(); // Its routes may be others.
            }
            Event::Query(query) => query(self),
            Event::Tunnel(TunnelEvent::Wanted(peer)) => self.input(Input::Wanted { peer }),
            Event::Tunnel(TunnelEvent::Handshake { peer, via }) => {
                if !self.externals.contains_key(&peer) {
                    self.input(Input::Handshake { peer, via });
                }
            }
            Event::Tunnel(TunnelEvent::Control { peer, via, packet }) => {
                self.handle_message(peer, via, &packet);
            }
            Event::Tunnel(TunnelEvent::Stun { from, datagram }) => {
                self.handle_stun(from, &datagram)
            }
            Event::Tunnel(TunnelEvent::RelayFrame { from, datagram }) => {
                self.links.handle_datagram(from, datagram);
            }
            Event::Tunnel(TunnelEvent::Refused { peer, via, behind }) => {
                let why = behind.map_or(Refusal::UnknownKey, |behind| Refusal::OldTimestamp {
                    behind,
                });
                self.input(Input::Refused { peer, via, why });
            }
            Event::Tunnel(TunnelEvent::Unsendable(address)) => {
                self.input(Input::Unsendable { address });
            }
            Event::Tunnel(TunnelEvent::Broken(problem)) => self.broken = Some(problem),
        }
    }

    fn handle_message(&mut self, peer: NodeId, via: Via, packet: &[u8]) {
        let own_address = self.snapshot.mesh.id.overlay_v6(&peer);
        let message = match PeerMessage::from_packet(packet) {
            Ok((source, message)) if source == own_address => message,
            Ok((source, _)) => {
                // From a device behind the peer: only the peer itself speaks for itself.
                tracing::debug!(%peer, %source, "a control message that is not the peer's own");
                return;
            }
            Err(error) => {
                tracing::debug!(%peer, %error, "a peer's message was not understood");
                return;
            }
        };
        if let PeerMessage::EchoReply { txid, .. } = &message
            && let Some(waiting) = self.pings.remove(txid)
        {
            waiting.send(()).ok(); // The operator may have given up.
            return;
        }
        self.input(Input::Message { peer, via, message });
    }

    fn handle_stun(&mut self, from: SocketAddr, datagram: &[u8]) {
        let Some((txid, observed)) = reflexive::parse_response(datagram) else {
            return;
        };
        let Some(request) = self.stun.remove(&txid) else {
            return;
        };
        if request.target != from {
            tracing::debug!(%from, asked = %request.target, "a STUN answer came from elsewhere");
            return;
        }
        self.input(match request.asks {
            Asks::Uplink(uplink) => Input::UplinkAnswered { uplink },
            Asks::Address(relay) => Input::Reflexive {
                relay,
                asked: from,
                observed,
                rtt: now() - request.sent,
            },
        });
    }

    /// Another way out is in use: packets leave by it from now on, and links that left by another are lost.
    fn use_uplink(&mut self, uplink: UplinkId) {
        let name = self.network.name(uplink).unwrap_or("?");
        tracing::info!(uplink = name, "this way out is used from now on");
        self.uplink = Some(uplink);
        self.forget_asked();
        self.follow_uplink();
        for (relay, transport) in self.links.leave_other_uplinks() {
            self.input(Input::RelayLost {
                relay,
                transport,
                reason: "another uplink is used".to_owned(),
            });
        }
    }

    fn set_local_addresses(&mut self, addresses: Vec<SocketAddr>) {
        if self.local_addresses != addresses {
            self.local_addresses = addresses;
            self.news.handle_network();
            self.tunnel.close_sockets(); // Another network has another NAT.
        }
    }

    /// What is answered now to questions of before is of another network: the core asks again.
    fn forget_asked(&mut self) {
        self.stun
            .retain(|_, request| matches!(request.asks, Asks::Uplink(_)));
    }

    fn follow_uplink(&mut self) {
        let Some(uplink) = self.uplink else {
            return;
        };
        self.set_local_addresses(self.network.addresses(uplink));
        let egress = self.network.egress(uplink);
        self.tunnel.set_egress(egress.clone());
        let name = self.network.name(uplink).map(str::to_owned);
        self.links.set_egress(egress.zip(name));
        let way = self.network.way(uplink);
        self.ways
            .send_if_modified(|last| std::mem::replace(last, way.clone()) != way);
    }

    fn report_traffic(&mut self) {
        for traffic in self.tunnel.take_traffic() {
            if self.externals.contains_key(&traffic.peer) {
                continue;
            }
            self.note_used(&traffic.received);
            self.input(Input::Traffic {
                peer: traffic.peer,
                sent: traffic.sent,
                received: traffic.received,
            });
        }
    }

    /// Packets come by these ways, or should.
    fn note_used<'a>(&self, vias: impl IntoIterator<Item = &'a Via>) {
        for via in vias {
            match via {
                Via::Relay(relay) => self.links.note_used(*relay),
                Via::Direct(_) => {}
            }
        }
    }

    fn take_snapshot(&mut self, mut snapshot: Arc<Snapshot>) {
        if !self.static_candidates.is_empty() {
            // What the operator wrote on this node stands beside what the manifest says.
            let nodes = &mut Arc::make_mut(&mut snapshot).nodes;
            if let Some(own) = nodes.get_mut(&self.node) {
                own.static_candidates.extend(&self.static_candidates);
            }
        }
        self.names = snapshot
            .nodes
            .values()
            .map(|node| (node.id, node.name.clone()))
            .collect();
        self.dead.retain(|name| snapshot.nodes.contains_key(name));
        self.snapshot = Arc::clone(&snapshot);
        self.gateways.handle_view(&self.view_now());
        self.publish_peers();
        self.links.set_relays(&snapshot);
        self.input(Input::Snapshot(snapshot));
        self.publish_view();
    }

    /// The nodes but this one.
    fn others(&self) -> impl Iterator<Item = &Node> {
        let nodes = self.snapshot.nodes.values();
        nodes.filter(|node| node.name != self.node)
    }

    /// Tells the packet path which prefix belongs to whom.
    fn publish_routes(&self) {
        let of_nodes = self
            .others()
            .flat_map(|node| node.allowed_prefixes().map(|prefix| (prefix, node.id)));
        let of_externals = self
            .externals()
            .flat_map(|peer| peer.prefixes.iter().map(|&prefix| (prefix, peer.id)));
        let mut routes: RouteTable = of_nodes.chain(of_externals).collect();
        for (prefix, gateways) in self.gateways.orders() {
            routes.share(prefix, &gateways);
        }
        self.tunnel.set_routes(routes);
    }

    /// Tells the packet path who is a peer, and what belongs to whom.
    fn publish_peers(&mut self) {
        let externals: BTreeMap<_, _> = self
            .externals()
            .map(|peer| (peer.id, peer.clone()))
            .collect();
        self.tunnel
            .set_known(self.others().map(|node| node.id).collect());
        self.publish_routes();
        for id in self
            .externals
            .keys()
            .filter(|id| !externals.contains_key(id))
        {
            self.tunnel.remove_external(id);
        }
        for (id, peer) in &externals {
            if self.externals.get(id) != Some(peer) {
                let keepalive_s = peer
                    .keepalive
                    .and_then(|every| every.as_secs().try_into().ok());
                let external = External {
                    endpoint: peer.endpoint,
                    keepalive_s,
                    ..External::default()
                };
                self.tunnel.add_external(*id, external);
            }
        }
        self.externals = externals;
    }

    fn view_now(&self) -> View {
        View {
            snapshot: Arc::clone(&self.snapshot),
            node: self.node.clone(),
            dead: self.dead.clone(),
            ejected: self.ejected.clone(),
            costs: self.costs.clone(),
            open: self.open.clone(),
        }
    }

    fn publish_view(&mut self) {
        let view = self.view_now();
        if self.gateways.handle_view(&view) {
            self.publish_routes();
        }
        self.views.send_replace(Some(Arc::new(view)));
    }

    fn perform(&mut self) {
        while let Some(output) = self.core.poll_output() {
            self.perform_one(output);
        }
    }

    fn perform_one(&mut self, output: Output) {
        match output {
            Output::Handshake { peer, vias } => {
                self.note_used(&vias);
                self.tunnel.handshake(&peer, &vias);
            }
            Output::Send { peer, via, message } => {
                self.note_used([&via]);
                self.send(&peer, via, &message);
            }
            Output::SetPath {
                peer,
                primary,
                duplicate,
                duplicates_max,
            } => {
                self.note_used(&primary);
                self.tunnel
                    .set_path(&peer, primary, duplicate, duplicates_max);
            }
            Output::ConnectRelay { relay, transport } => {
                let addresses = self.core.relay_addresses(&relay);
                self.links.connect(relay, transport, addresses);
            }
            Output::DisconnectRelay { relay, transport } => self.links.disconnect(relay, transport),
            Output::UseRelayTransport { relay, transport } => self.links.prefer(relay, transport),
            Output::FindPeer { relay, peer } => self.links.find_peer(relay, peer),
            Output::AskReflexive { relay, target } => self.ask(Asks::Address(relay), target),
            Output::OpenSockets {
                peer,
                target,
                count,
                message,
            } => self.open_sockets((peer, target), count, &message),
            Output::UseUplink { uplink } => self.use_uplink(uplink),
            Output::ProbeUplink { uplink, target } => self.ask(Asks::Uplink(uplink), target),
            Output::Event(event) => self.tell(event),
        }
    }

    fn send(&self, peer: &NodeId, via: Via, message: &PeerMessage) {
        if let Some(packet) = self.packet(peer, message) {
            self.tunnel.send_inner(peer, via, &packet);
        }
    }

    /// A message as an inner packet; `None`: the snapshot does not have this node any more.
    fn packet(&self, to: &NodeId, message: &PeerMessage) -> Option<Vec<u8>> {
        let to = self.snapshot.mesh.id.overlay_v6(to);
        Some(message.to_packet(self.own()?.overlay_v6, to))
    }

    fn open_sockets(
        &self,
        (peer, target): (NodeId, SocketAddr),
        count: u16,
        message: &PeerMessage,
    ) {
        if let Some(packet) = self.packet(&peer, message) {
            self.tunnel.open_sockets(Burst {
                peer,
                target,
                count: count.into(),
                packet,
                tried: SOCKETS_TRIED,
                kept: SOCKETS_KEPT,
            });
        }
    }

    fn ask(&mut self, asks: Asks, target: SocketAddr) {
        let now = now();
        self.stun
            .retain(|_, request| now - request.sent < STUN_PENDING_TTL);
        if self.stun.len() == STUN_PENDING_MAX {
            return; // The core asks again.
        }
        let txid: [u8; 12] = rand::random();
        let datagram = reflexive::request(txid);
        match asks {
            Asks::Address(_) => self.tunnel.send_raw(target, &datagram),
            Asks::Uplink(UplinkId(index)) => {
                if let Some(link) = IfIndex::new(index) {
                    self.tunnel.send_raw_by(link, target, &datagram);
                }
            }
        }
        let request = StunRequest {
            asks,
            target,
            sent: now,
        };
        self.stun.insert(txid, request);
    }

    fn tell(&mut self, event: io::Event) {
        match event {
            io::Event::Peer {
                peer,
                from,
                to,
                reason,
            } => {
                let name = self.names.get(&peer).map_or("?", NodeName::as_str);
                tracing::debug!(peer = name, ?from, ?to, ?reason, "a peer's state changed");
            }
            io::Event::Stranger { id } => {
                // Nothing is wrong when a node joins: its call may be here before the news of it.
                tracing::info!(%id, "a node calls whom the snapshot does not name: is it behind?");
            }
            io::Event::Liveness { peer, alive } => self.set_liveness(&peer, alive),
            io::Event::Remember { peer, addresses } => {
                self.remembered.send_modify(|peers| {
                    peers.insert(peer, addresses);
                });
            }
        }
    }

    /// Says which endpoints new flows keep away from.
    pub fn set_ejected(&mut self, ejected: BTreeSet<SocketAddr>) {
        self.ejected = ejected;
        self.publish_view();
    }

    /// Says how many connections are open to endpoints with a limit.
    pub fn set_open(&mut self, open: BTreeMap<SocketAddr, u32>) {
        self.open = open;
        self.publish_view();
    }

    fn take_costs(&mut self) {
        let measured = self.core.costs();
        if let Some(costs) = self.measured.handle_measured(measured, now()) {
            self.costs = costs;
            self.publish_view();
        }
    }

    fn set_liveness(&mut self, peer: &NodeId, alive: bool) {
        let Some(name) = self.names.get(peer).cloned() else {
            return;
        };
        tracing::info!(node = %name, alive, "a node's endpoints changed their liveness");
        let changed = if alive {
            self.dead.remove(&name)
        } else {
            self.dead.insert(name)
        };
        if changed {
            self.publish_view();
        }
    }
}

/// The one clock, as the core and the machines read it.
pub(crate) fn now() -> Instant {
    time::Instant::now().into_std()
}

/// `None`: for ever.
pub(crate) async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

/// A handle that asks the driver questions.
#[derive(Debug, Clone)]
pub struct DriverHandle(pub mpsc::Sender<Event>);

impl DriverHandle {
    /// Runs `question` in the driver. `None`: the agent is stopping.
    pub async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Driver) -> T + Send + 'static,
    ) -> Option<T> {
        let (sender, receiver) = oneshot::channel();
        let query = Box::new(move |driver: &mut Driver| {
            sender.send(question(driver)).ok(); // The asker may have gone.
        });
        self.0.send(Event::Query(query)).await.ok()?;
        receiver.await.ok()
    }
}
