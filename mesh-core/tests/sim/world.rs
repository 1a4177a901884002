//! Virtual time, a virtual internet, and nodes that each run a real [`Core`].

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use mesh_core::{
    io::{Event, Input, Output, RelayTransport, TRAFFIC_TICK_MS},
    node::{Core, CoreConfig, report::PeerReport},
    snapshot::{Locality, MeshSettings, Node, Relay, Snapshot},
};
use mesh_wire::id::{MeshId, NodeId, NodeName, RelayId, SiteName, Via};
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};

use crate::{
    nat::{Nat, NatSort},
    session::{Body, Packet, Session, message_input},
};

/// The WireGuard port of every node.
const PORT: u16 = 51_820;
/// A packet's way inside a site.
const LAN_US: u64 = 300;
/// After this long a connection to a relay is noticed to be dead.
const RELAY_IDLE_US: u64 = 3_000_000;
/// A connection attempt without an answer is repeated after this (RFC 6298 §2, RFC 9002 §6.2.2).
const CONNECT_RETRY_US: u64 = 1_000_000;
/// Packets held for a peer without a path (`paths.md`).
const HELD_MAX: usize = 64;
/// Timeouts of one node at one instant; more would be a core that spins.
const WAKES_AT_ONCE_MAX: u32 = 200;

/// A place with one router and one line to the internet.
pub(crate) struct Site {
    pub(crate) nat: Nat,
    pub(crate) delay_us: u64,
    pub(crate) loss: f64,
    pub(crate) down: bool,
    pub(crate) small_only: bool,
}

pub(crate) struct SimNode {
    pub(crate) id: NodeId,
    pub(crate) name: NodeName,
    pub(crate) site: usize,
    host: SocketAddr,
    core: Option<Core>,
    /// Counts boots: what was meant for an earlier one is void.
    boot: u32,
    sessions: BTreeMap<NodeId, Session>,
    paths: BTreeMap<NodeId, (Option<Via>, Option<Via>)>,
    held: BTreeMap<NodeId, VecDeque<Body>>,
    traffic: BTreeMap<NodeId, (bool, BTreeSet<Via>)>,
    wake_at: Option<u64>,
    wakes: u32,
    pub(crate) remembered: BTreeMap<NodeId, Vec<SocketAddr>>,
    /// Everything said, with its time in milliseconds.
    pub(crate) events: Vec<(u64, Event)>,
    /// Every change of path, with its time in milliseconds.
    pub(crate) moves: Vec<(u64, NodeId, Option<Via>)>,
}

pub(crate) struct SimRelay {
    pub(crate) id: RelayId,
    relay: Relay,
    pub(crate) up: bool,
    clients: BTreeMap<usize, BTreeSet<RelayTransport>>,
    using: BTreeMap<usize, RelayTransport>,
    /// Who asked for whom.
    asked: BTreeSet<(NodeId, usize)>,
}

/// A stream of pings from one node to another.
pub(crate) struct Flow {
    from: usize,
    to: usize,
    every_us: u64,
    until_answered: bool,
    running: bool,
    next_id: u64,
    /// When each was sent and answered, in milliseconds.
    pub(crate) sent: BTreeMap<u64, u64>,
    pub(crate) answered: BTreeMap<u64, u64>,
}

enum Happening {
    Wake {
        node: usize,
    },
    Tick {
        node: usize,
    },
    Arrive {
        from: usize,
        source: SocketAddr,
        to: SocketAddr,
        packet: Packet,
    },
    Deliver {
        node: usize,
        from: usize,
        via: Via,
        packet: Packet,
    },
    Forward {
        relay: usize,
        from: usize,
        to: usize,
        packet: Packet,
    },
    Tell {
        node: usize,
        boot: u32,
        input: Input,
    },
    Connect {
        node: usize,
        boot: u32,
        relay: usize,
        transport: RelayTransport,
    },
    Ping {
        flow: usize,
    },
    Change(Change),
}

/// Something that a scenario does to the world.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Change {
    SiteDown(usize),
    SiteUp(usize),
    RelayDown(usize),
    RelayUp(usize),
    StartFlow(usize),
    /// Connections to relays that a dead line cut are noticed.
    Notice {
        site: usize,
        outage: u32,
    },
}

struct Entry {
    at: u64,
    order: u64,
    what: Happening,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

pub(crate) struct World {
    now: u64,
    queue: BinaryHeap<Reverse<Entry>>,
    order: u64,
    dice: Xoshiro256PlusPlus,
    pub(crate) sites: Vec<Site>,
    outages: Vec<u32>,
    pub(crate) nodes: Vec<SimNode>,
    pub(crate) relays: Vec<SimRelay>,
    pub(crate) flows: Vec<Flow>,
    ids: BTreeMap<NodeId, usize>,
    /// Which node of a site has an address.
    hosts: BTreeMap<(usize, SocketAddr), usize>,
    /// Pairs of sites between which nothing passes directly.
    pub(crate) severed: BTreeSet<(usize, usize)>,
    snapshot: Option<Arc<Snapshot>>,
    /// Connections to relays that are being made: node, relay, by what.
    attempts: BTreeSet<(usize, usize, RelayTransport)>,
    initiations: u64,
    trace: DefaultHasher,
    pub(crate) steps: u64,
}

#[expect(
    clippy::disallowed_methods,
    reason = "virtual time needs one real instant to start from"
)]
fn start() -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    *START.get_or_init(Instant::now)
}

fn instant(us: u64) -> Instant {
    start() + Duration::from_micros(us)
}

fn micros(at: Instant) -> u64 {
    let nanos = at.saturating_duration_since(start()).as_nanos();
    u64::try_from(nanos.div_ceil(1000)).unwrap()
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            now: 1_000_000,
            queue: BinaryHeap::new(),
            order: 0,
            dice: Xoshiro256PlusPlus::seed_from_u64(seed),
            sites: Vec::new(),
            outages: Vec::new(),
            nodes: Vec::new(),
            relays: Vec::new(),
            flows: Vec::new(),
            ids: BTreeMap::new(),
            hosts: BTreeMap::new(),
            severed: BTreeSet::new(),
            snapshot: None,
            attempts: BTreeSet::new(),
            initiations: 0,
            trace: DefaultHasher::new(),
            steps: 0,
        }
    }

    // Building.

    pub(crate) fn add_relay(&mut self, name: &str) -> usize {
        let index = self.relays.len();
        let relay = Relay {
            name: name.parse().unwrap(),
            addresses: vec![[192, 0, 2, u8::try_from(index + 1).unwrap()].into()],
            quic_port: 443,
            tls_port: 443,
            stun_ports: vec![443, 3478],
        };
        let id = RelayId::from(&relay.name);
        let (clients, using, asked) = Default::default();
        self.relays.push(SimRelay {
            id,
            relay,
            up: true,
            clients,
            using,
            asked,
        });
        index
    }

    /// A site with a line of 10 ms and no loss.
    pub(crate) fn add_site(&mut self, sort: NatSort) -> usize {
        let index = self.sites.len();
        let [high, low] = u16::try_from(index).unwrap().to_be_bytes();
        let public = IpAddr::from([203, 1, high, low]);
        self.sites.push(Site {
            nat: Nat::new(sort, public),
            delay_us: 10_000,
            loss: 0.0,
            down: false,
            small_only: false,
        });
        self.outages.push(0);
        index
    }

    /// A node at `site`. An open site has room for one.
    pub(crate) fn add_node(&mut self, name: &str, site: usize) -> usize {
        let index = self.nodes.len();
        let [high, low] = u16::try_from(site).unwrap().to_be_bytes();
        let here = self.nodes.iter().filter(|node| node.site == site).count();
        let router = &self.sites[site].nat;
        let host = if router.sort == NatSort::Open {
            router.public
        } else {
            [10, high, low, u8::try_from(here + 2).unwrap()].into()
        };
        let mut key = [0; 32];
        key[..8].copy_from_slice(
            &(index as u64 + 1)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .to_be_bytes(),
        );
        key[31] = 1;
        let id = NodeId(key);
        self.ids.insert(id, index);
        self.hosts
            .insert((site, SocketAddr::new(host, PORT)), index);
        self.nodes.push(SimNode {
            id,
            name: name.parse().unwrap(),
            site,
            host: SocketAddr::new(host, PORT),
            core: None,
            boot: 0,
            sessions: BTreeMap::new(),
            paths: BTreeMap::new(),
            held: BTreeMap::new(),
            traffic: BTreeMap::new(),
            wake_at: None,
            wakes: 0,
            remembered: BTreeMap::new(),
            events: Vec::new(),
            moves: Vec::new(),
        });
        index
    }

    /// One site with one node.
    pub(crate) fn add_edge(&mut self, name: &str, sort: NatSort) -> usize {
        let site = self.add_site(sort);
        self.add_node(name, site)
    }

    /// Makes the snapshot, and boots every node.
    pub(crate) fn boot_all(&mut self) {
        let mesh = MeshId([7; 32]);
        let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(mesh, "sim"));
        for node in &self.nodes {
            let site = format!("site-{}", node.site);
            let described = Node {
                id: node.id,
                name: node.name.clone(),
                locality: Locality {
                    site: Some(SiteName::try_from(site).unwrap()),
                    ..Locality::default()
                },
                overlay_v4: Ipv4Addr::new(100, 96, 0, 1),
                overlay_v6: mesh.overlay_v6(&node.id),
                prefixes: Vec::new(),
                underlay_addresses: Vec::new(),
                static_candidates: Vec::new(),
            };
            snapshot.nodes.insert(node.name.clone(), described);
        }
        for relay in &self.relays {
            snapshot.relays.insert(relay.id, relay.relay.clone());
        }
        self.snapshot = Some(Arc::new(snapshot));
        for node in 0..self.nodes.len() {
            self.boot(node);
        }
    }

    /// Starts a node anew, with what it remembered.
    pub(crate) fn boot(&mut self, index: usize) {
        self.kill(index);
        let seed = self.dice.random();
        let now = instant(self.now);
        let node = &mut self.nodes[index];
        let config = CoreConfig {
            node: node.name.clone(),
            id: node.id,
            remembered: node.remembered.clone(),
        };
        node.core = Some(Core::new(config, seed, now));
        let host = node.host;
        let snapshot = self.snapshot.clone().unwrap();
        self.input(index, Input::LocalAddresses(vec![host]));
        self.input(index, Input::Snapshot(snapshot));
    }

    /// Power off: nobody is told; relays notice after a while.
    pub(crate) fn kill(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        node.core = None;
        node.boot += 1;
        node.wake_at = None;
        node.sessions.clear();
        node.paths.clear();
        node.held.clear();
        node.traffic.clear();
        self.attempts.retain(|(node, _, _)| *node != index);
        for relay in 0..self.relays.len() {
            self.disconnect(relay, index, None);
        }
    }

    // Running.

    pub(crate) fn now_ms(&self) -> u64 {
        self.now / 1000 - 1000
    }

    pub(crate) fn trace(&self) -> u64 {
        self.trace.finish()
    }

    pub(crate) fn at(&mut self, ms: u64, change: Change) {
        self.push((ms + 1000) * 1000, Happening::Change(change));
    }

    pub(crate) fn run_for(&mut self, ms: u64) {
        let until = self.now + ms * 1000;
        while let Some(Reverse(entry)) = self.queue.peek()
            && entry.at <= until
        {
            let Some(Reverse(entry)) = self.queue.pop() else {
                break;
            };
            assert!(entry.at >= self.now, "time goes forward");
            self.now = entry.at;
            self.steps += 1;
            self.happen(entry.what, entry.at);
        }
        self.now = until;
    }

    /// Runs until `done` holds, in steps of 10 ms; fails after `ms`. Returns how long it took.
    #[track_caller]
    pub(crate) fn run_until(&mut self, ms: u64, what: &str, done: impl Fn(&Self) -> bool) -> u64 {
        let began = self.now_ms();
        while !done(self) {
            let waited = self.now_ms() - began;
            assert!(waited < ms, "{what}: not within {ms} ms");
            self.run_for(10);
        }
        self.now_ms() - began
    }

    /// Adds a stream of pings; `until_answered`: it ends with the first answer.
    pub(crate) fn add_flow(
        &mut self,
        from: usize,
        to: usize,
        every_ms: u64,
        until_answered: bool,
    ) -> usize {
        self.flows.push(Flow {
            from,
            to,
            every_us: every_ms * 1000,
            until_answered,
            running: false,
            next_id: 0,
            sent: BTreeMap::new(),
            answered: BTreeMap::new(),
        });
        self.flows.len() - 1
    }

    pub(crate) fn start_flow(&mut self, flow: usize) {
        self.flows[flow].running = true;
        self.push(self.now, Happening::Ping { flow });
    }

    pub(crate) fn stop_flow(&mut self, flow: usize) {
        self.flows[flow].running = false;
    }

    pub(crate) fn report(&self, of: usize, peer: usize) -> Option<PeerReport> {
        let core = self.nodes[of].core.as_ref()?;
        core.peer_report(&self.nodes[peer].id)
    }

    pub(crate) fn core(&self, of: usize) -> &Core {
        self.nodes[of].core.as_ref().unwrap()
    }

    pub(crate) fn change(&mut self, change: Change) {
        match change {
            Change::SiteDown(site) => {
                self.sites[site].down = true;
                self.outages[site] += 1;
                let outage = self.outages[site];
                let notice = Change::Notice { site, outage };
                self.push(self.now + RELAY_IDLE_US, Happening::Change(notice));
            }
            Change::SiteUp(site) => {
                self.sites[site].down = false;
                self.outages[site] += 1;
            }
            Change::Notice { site, outage } if self.outages[site] == outage => {
                let here = |node: &usize| self.nodes[*node].site == site;
                let nodes: Vec<usize> = (0..self.nodes.len()).filter(here).collect();
                for node in nodes {
                    for relay in 0..self.relays.len() {
                        self.disconnect(relay, node, Some("timed out"));
                    }
                }
            }
            Change::Notice { .. } => {}
            Change::RelayDown(relay) => {
                self.relays[relay].up = false;
                let clients: Vec<usize> = self.relays[relay].clients.keys().copied().collect();
                for node in clients {
                    self.disconnect(relay, node, Some("reset by peer"));
                }
                self.relays[relay].asked.clear();
            }
            Change::RelayUp(relay) => self.relays[relay].up = true,
            Change::StartFlow(flow) => self.start_flow(flow),
        }
    }

    /// Moves a node to a new site behind another router; its old connections are void.
    pub(crate) fn rehome(&mut self, index: usize, sort: NatSort) {
        let site = self.add_site(sort);
        self.nodes[index].site = site;
        self.nodes[index].host = SocketAddr::new([10, 99, 0, 2].into(), PORT);
        self.hosts.retain(|_, node| *node != index);
        self.hosts.insert((site, self.nodes[index].host), index);
        for relay in 0..self.relays.len() {
            self.disconnect(relay, index, Some("the address is gone"));
        }
        let host = self.nodes[index].host;
        self.input(index, Input::LocalAddresses(vec![host]));
    }

    /// All UDP of a site is dropped from now on.
    pub(crate) fn block_udp(&mut self, site: usize) {
        self.sites[site].nat.sort = NatSort::UdpBlocked;
        // The QUIC links notice after their idle timeout.
        let here = |node: &usize| self.nodes[*node].site == site;
        let nodes: Vec<usize> = (0..self.nodes.len()).filter(here).collect();
        for node in nodes {
            let boot = self.nodes[node].boot;
            for relay in 0..self.relays.len() {
                let (relay, transport) = (self.relays[relay].id, RelayTransport::Quic);
                let reason = "timed out".to_owned();
                let input = Input::RelayLost {
                    relay,
                    transport,
                    reason,
                };
                self.push(
                    self.now + RELAY_IDLE_US,
                    Happening::Tell { node, boot, input },
                );
            }
        }
    }

    fn push(&mut self, at: u64, what: Happening) {
        self.order += 1;
        let order = self.order;
        self.queue.push(Reverse(Entry { at, order, what }));
    }

    fn happen(&mut self, what: Happening, at: u64) {
        match what {
            Happening::Wake { node } => {
                if self.nodes[node].wake_at == Some(at) {
                    self.nodes[node].wake_at = None;
                    self.input(node, Input::Timeout);
                }
            }
            Happening::Tick { node } => self.tick(node),
            Happening::Arrive {
                from,
                source,
                to,
                packet,
            } => self.arrive(from, source, to, packet),
            Happening::Deliver {
                node,
                from,
                via,
                packet,
            } => self.deliver(node, from, via, packet),
            Happening::Forward {
                relay,
                from,
                to,
                packet,
            } => self.forward(relay, from, to, packet),
            Happening::Tell { node, boot, input } => {
                if self.nodes[node].boot == boot {
                    self.input(node, input);
                }
            }
            Happening::Connect {
                node,
                boot,
                relay,
                transport,
            } => {
                if self.nodes[node].boot == boot {
                    self.connect(node, relay, transport);
                }
            }
            Happening::Ping { flow } => self.ping(flow),
            Happening::Change(change) => self.change(change),
        }
    }

    fn lost(&mut self, site: usize) -> bool {
        let loss = self.sites[site].loss;
        self.sites[site].down || (loss > 0.0 && self.dice.random_bool(loss))
    }

    // The shell of one node.

    fn input(&mut self, index: usize, input: Input) {
        let now = instant(self.now);
        let node = &mut self.nodes[index];
        let Some(core) = &mut node.core else {
            return;
        };
        core.handle_input(input, now);
        while let Some(output) = self.nodes[index].core.as_mut().and_then(Core::poll_output) {
            self.perform(index, output);
        }
        let node = &mut self.nodes[index];
        let Some(at) = node.core.as_ref().and_then(Core::poll_timeout).map(micros) else {
            return;
        };
        node.wakes = if at <= self.now { node.wakes + 1 } else { 0 };
        assert!(node.wakes < WAKES_AT_ONCE_MAX, "{} spins", node.name);
        let at = at.max(self.now);
        if node.wake_at.is_none_or(|known| at < known) {
            node.wake_at = Some(at);
            self.push(at, Happening::Wake { node: index });
        }
    }

    fn perform(&mut self, index: usize, output: Output) {
        let now_ms = self.now_ms();
        match output {
            Output::Handshake { peer, vias } => {
                self.initiations += 1;
                let number = self.initiations;
                let session = self.nodes[index].sessions.entry(peer).or_default();
                let packet = session.initiate(number);
                for via in vias {
                    self.send(index, peer, via, packet.clone());
                }
            }
            Output::Send { peer, via, message } => {
                self.seal(index, peer, via, Body::Control(message));
            }
            Output::SetPath {
                peer,
                primary,
                duplicate,
            } => {
                (now_ms, index, format!("{primary:?} {duplicate:?}")).hash(&mut self.trace);
                self.nodes[index].paths.insert(peer, (primary, duplicate));
                self.nodes[index].moves.push((now_ms, peer, primary));
                self.flush(index, peer);
            }
            Output::ConnectRelay { relay, transport } => {
                let relay = self.relay_index(relay);
                let rtt = 2 * self.sites[self.nodes[index].site].delay_us;
                let delay = match transport {
                    RelayTransport::Quic => rtt * 3 / 2,
                    RelayTransport::Tls => rtt * 3,
                };
                self.attempts.insert((index, relay, transport));
                let boot = self.nodes[index].boot;
                let connect = Happening::Connect {
                    node: index,
                    boot,
                    relay,
                    transport,
                };
                self.push(self.now + delay, connect);
            }
            Output::DisconnectRelay { relay, transport } => {
                let relay = self.relay_index(relay);
                self.attempts.remove(&(index, relay, transport));
                self.drop_leg(relay, index, transport);
            }
            Output::UseRelayTransport { relay, transport } => {
                let relay = self.relay_index(relay);
                self.relays[relay].using.insert(index, transport);
            }
            Output::FindPeer { relay, peer } => self.find(index, relay, peer),
            Output::AskReflexive { relay, target } => self.ask_reflexive(index, relay, target),
            Output::Event(event) => {
                (now_ms, index, format!("{event:?}")).hash(&mut self.trace);
                if let Event::Remember { peer, addresses } = &event {
                    self.nodes[index]
                        .remembered
                        .insert(*peer, addresses.clone());
                }
                self.nodes[index].events.push((now_ms, event));
            }
        }
    }

    fn relay_index(&self, id: RelayId) -> usize {
        self.relays.iter().position(|relay| relay.id == id).unwrap()
    }

    fn seal(&mut self, index: usize, peer: NodeId, via: Via, body: Body) {
        let session = self.nodes[index].sessions.entry(peer).or_default();
        if let Some(key) = session.current {
            self.send(index, peer, via, Packet::Sealed { key, body });
        }
    }

    /// A packet of an application.
    fn send_data(&mut self, index: usize, peer: NodeId, body: Body) {
        let node = &mut self.nodes[index];
        if node.core.is_none() {
            return;
        }
        let held = node.held.entry(peer).or_default();
        if held.len() == HELD_MAX {
            held.pop_front();
        }
        held.push_back(body);
        self.flush(index, peer);
        let node = &self.nodes[index];
        let has_path = node
            .paths
            .get(&peer)
            .is_some_and(|(primary, _)| primary.is_some());
        if !has_path {
            self.input(index, Input::Wanted { peer });
        }
    }

    fn flush(&mut self, index: usize, peer: NodeId) {
        let node = &mut self.nodes[index];
        let ready = node
            .sessions
            .get(&peer)
            .is_some_and(|session| session.current.is_some());
        let Some(&(Some(primary), duplicate)) = node.paths.get(&peer) else {
            return;
        };
        let Some(held) = node
            .held
            .get_mut(&peer)
            .filter(|held| ready && !held.is_empty())
        else {
            return;
        };
        let bodies: Vec<Body> = held.drain(..).collect();
        self.note(index, peer, true, None);
        for body in bodies {
            for via in duplicate.into_iter().chain([primary]) {
                self.seal(index, peer, via, body.clone());
            }
        }
    }

    fn note(&mut self, index: usize, peer: NodeId, sent: bool, received: Option<Via>) {
        let tick = TRAFFIC_TICK_MS * 1000;
        let node = &mut self.nodes[index];
        if node.traffic.is_empty() {
            let at = (self.now / tick + 1) * tick;
            self.push(at, Happening::Tick { node: index });
        }
        let seen = self.nodes[index].traffic.entry(peer).or_default();
        seen.0 |= sent;
        seen.1.extend(received);
    }

    fn tick(&mut self, index: usize) {
        for (peer, (sent, received)) in std::mem::take(&mut self.nodes[index].traffic) {
            let received = received.into_iter().collect();
            self.input(
                index,
                Input::Traffic {
                    peer,
                    sent,
                    received,
                },
            );
        }
    }

    fn ping(&mut self, flow: usize) {
        let now_ms = self.now_ms();
        let stream = &mut self.flows[flow];
        if !stream.running || stream.until_answered && !stream.answered.is_empty() {
            return;
        }
        let id = stream.next_id;
        stream.next_id += 1;
        stream.sent.insert(id, now_ms);
        let (from, to, at) = (stream.from, stream.to, self.now + stream.every_us);
        let peer = self.nodes[to].id;
        self.send_data(from, peer, Body::Ping { flow, id });
        self.push(at, Happening::Ping { flow });
    }

    fn deliver(&mut self, index: usize, from: usize, via: Via, packet: Packet) {
        let peer = self.nodes[from].id;
        let node = &mut self.nodes[index];
        if node.core.is_none() {
            return;
        }
        let session = node.sessions.entry(peer).or_default();
        match packet {
            Packet::Initiation { number } => {
                if let Some(response) = session.respond(from, number) {
                    self.send(index, peer, via, response);
                    self.input(index, Input::Handshake { peer, via });
                }
            }
            Packet::Response { number } => {
                if session.complete(index, number) {
                    self.seal(index, peer, via, Body::Keepalive);
                    self.input(index, Input::Handshake { peer, via });
                    self.flush(index, peer);
                }
            }
            Packet::Sealed { key, body } => {
                if session.open(key) {
                    self.note(index, peer, false, Some(via));
                    self.open(index, peer, via, body);
                    self.flush(index, peer);
                }
            }
        }
    }

    fn open(&mut self, index: usize, peer: NodeId, via: Via, body: Body) {
        match body {
            Body::Keepalive => {}
            Body::Control(message) => self.input(index, message_input(peer, via, message)),
            Body::Ping { flow, id } => self.send_data(index, peer, Body::Pong { flow, id }),
            Body::Pong { flow, id } => {
                let now_ms = self.now_ms();
                self.flows[flow].answered.entry(id).or_insert(now_ms);
            }
        }
    }

    // The internet.

    fn send(&mut self, index: usize, peer: NodeId, via: Via, packet: Packet) {
        let to = self.ids[&peer];
        match via {
            Via::Direct(address) => self.send_udp(index, address, packet),
            Via::Relay(relay) => self.send_by_relay(index, self.relay_index(relay), to, packet),
        }
    }

    fn send_udp(&mut self, index: usize, to: SocketAddr, packet: Packet) {
        let (site, host) = (self.nodes[index].site, self.nodes[index].host);
        if let Some(&node) = self.hosts.get(&(site, to)) {
            let via = Via::Direct(host);
            let deliver = Happening::Deliver {
                node,
                from: index,
                via,
                packet,
            };
            return self.push(self.now + LAN_US, deliver);
        }
        let private = matches!(to.ip(), IpAddr::V4(ip) if ip.is_private());
        if private || self.lost(site) || self.sites[site].small_only && packet.is_large() {
            return;
        }
        let Some(source) = self.sites[site].nat.outbound(host, to, self.now) else {
            return;
        };
        let Some(target) = self.site_of(to.ip()) else {
            return;
        };
        let delay = self.sites[site].delay_us + self.sites[target].delay_us;
        let jitter = self.dice.random_range(0..500);
        let arrive = Happening::Arrive {
            from: index,
            source,
            to,
            packet,
        };
        self.push(self.now + delay + jitter, arrive);
    }

    fn site_of(&self, ip: IpAddr) -> Option<usize> {
        let IpAddr::V4(v4) = ip else {
            return None;
        };
        let [203, 1, high, low] = v4.octets() else {
            return None;
        };
        Some(usize::from(u16::from_be_bytes([high, low]))).filter(|site| *site < self.sites.len())
    }

    fn arrive(&mut self, from: usize, source: SocketAddr, to: SocketAddr, packet: Packet) {
        let Some(site) = self.site_of(to.ip()) else {
            return;
        };
        let between = [site, self.nodes[from].site];
        let severed = self.severed.contains(&(between[0], between[1]))
            || self.severed.contains(&(between[1], between[0]));
        if severed || self.lost(site) || self.sites[site].small_only && packet.is_large() {
            return;
        }
        let Some(inside) = self.sites[site].nat.inbound(source, to, self.now) else {
            return;
        };
        if let Some(&node) = self.hosts.get(&(site, inside)) {
            (self.now, from, node).hash(&mut self.trace);
            self.deliver(node, from, Via::Direct(source), packet);
        }
    }

    fn ask_reflexive(&mut self, index: usize, id: RelayId, asked: SocketAddr) {
        let relay = self.relay_index(id);
        let (site, host, boot) = {
            let node = &self.nodes[index];
            (node.site, node.host, node.boot)
        };
        if self.lost(site) || self.lost(site) || !self.relays[relay].up {
            return;
        }
        if let Some(observed) = self.sites[site].nat.outbound(host, asked, self.now) {
            let input = Input::Reflexive {
                relay: id,
                asked,
                observed,
            };
            let at = self.now + 2 * self.sites[site].delay_us;
            self.push(
                at,
                Happening::Tell {
                    node: index,
                    boot,
                    input,
                },
            );
        }
    }

    // Relays.

    fn connect(&mut self, node: usize, relay: usize, transport: RelayTransport) {
        let site = &self.sites[self.nodes[node].site];
        let blocked = transport == RelayTransport::Quic && site.nat.sort == NatSort::UdpBlocked;
        let attempt = (node, relay, transport);
        if !self.attempts.contains(&attempt) {
            return; // Given up meanwhile.
        }
        if site.down || blocked {
            // Both TCP and QUIC ask again; the core's own patience ends it.
            let boot = self.nodes[node].boot;
            let again = Happening::Connect {
                node,
                boot,
                relay,
                transport,
            };
            return self.push(self.now + CONNECT_RETRY_US, again);
        }
        self.attempts.remove(&attempt);
        let id = self.relays[relay].id;
        if !self.relays[relay].up {
            let reason = "connection refused".to_owned();
            return self.input(
                node,
                Input::RelayLost {
                    relay: id,
                    transport,
                    reason,
                },
            );
        }
        let first = !self.relays[relay].clients.contains_key(&node);
        self.relays[relay]
            .clients
            .entry(node)
            .or_default()
            .insert(transport);
        self.relays[relay].using.entry(node).or_insert(transport);
        self.input(
            node,
            Input::RelayConnected {
                relay: id,
                transport,
            },
        );
        if first {
            self.tell_presence(relay, node, true);
        }
    }

    /// A client's connections are gone; `reason`: it notices.
    fn disconnect(&mut self, relay: usize, node: usize, reason: Option<&str>) {
        let id = self.relays[relay].id;
        let Some(legs) = self.relays[relay].clients.remove(&node) else {
            return;
        };
        self.relays[relay].using.remove(&node);
        for transport in legs {
            if let Some(reason) = reason {
                let reason = reason.to_owned();
                self.input(
                    node,
                    Input::RelayLost {
                        relay: id,
                        transport,
                        reason,
                    },
                );
            }
        }
        self.tell_presence(relay, node, false);
    }

    fn drop_leg(&mut self, relay: usize, node: usize, transport: RelayTransport) {
        let Some(legs) = self.relays[relay].clients.get_mut(&node) else {
            return;
        };
        if !legs.remove(&transport) {
            return;
        }
        match legs.first().copied() {
            Some(other) => {
                self.relays[relay].using.insert(node, other);
            }
            None => {
                self.relays[relay].clients.remove(&node);
                self.relays[relay].using.remove(&node);
                self.tell_presence(relay, node, false);
            }
        }
    }

    fn tell_presence(&mut self, relay: usize, node: usize, present: bool) {
        let peer = self.nodes[node].id;
        let id = self.relays[relay].id;
        let askers: Vec<usize> = self.relays[relay]
            .asked
            .iter()
            .filter(|(asked, asker)| {
                *asked == peer && self.relays[relay].clients.contains_key(asker)
            })
            .map(|(_, asker)| *asker)
            .collect();
        for asker in askers {
            self.tell_later(
                asker,
                Input::RelayPeer {
                    relay: id,
                    peer,
                    present,
                },
            );
        }
    }

    /// Half a round trip later, if the line is up then as now.
    fn tell_later(&mut self, node: usize, input: Input) {
        let site = &self.sites[self.nodes[node].site];
        if !site.down {
            let (at, boot) = (self.now + site.delay_us, self.nodes[node].boot);
            self.push(at, Happening::Tell { node, boot, input });
        }
    }

    fn find(&mut self, node: usize, id: RelayId, peer: NodeId) {
        let relay = self.relay_index(id);
        let site = self.nodes[node].site;
        if !self.leg_works(relay, node) {
            return;
        }
        self.relays[relay].asked.insert((peer, node));
        let present = self.relays[relay].clients.contains_key(&self.ids[&peer]);
        let at = self.now + 2 * self.sites[site].delay_us;
        let boot = self.nodes[node].boot;
        let input = Input::RelayPeer {
            relay: id,
            peer,
            present,
        };
        self.push(at, Happening::Tell { node, boot, input });
    }

    /// Whether a client's connection carries anything now.
    fn leg_works(&self, relay: usize, node: usize) -> bool {
        let site = &self.sites[self.nodes[node].site];
        let blocked = site.nat.sort == NatSort::UdpBlocked;
        match self.relays[relay].using.get(&node) {
            None => false,
            Some(RelayTransport::Quic) if blocked => false,
            Some(_) => self.relays[relay].up && !site.down,
        }
    }

    /// How long one line of a relayed packet takes; `None`: lost. TCP does not lose, it waits.
    fn leg_delay(&mut self, relay: usize, node: usize) -> Option<u64> {
        if !self.leg_works(relay, node) {
            return None;
        }
        let site = self.nodes[node].site;
        let delay = self.sites[site].delay_us;
        match (self.lost(site), self.relays[relay].using.get(&node)) {
            (false, _) => Some(delay),
            (true, Some(RelayTransport::Tls)) => Some(delay * 3 + 200_000),
            (true, Some(RelayTransport::Quic) | None) => None,
        }
    }

    fn send_by_relay(&mut self, index: usize, relay: usize, to: usize, packet: Packet) {
        if let Some(delay) = self.leg_delay(relay, index) {
            let from = index;
            self.push(
                self.now + delay,
                Happening::Forward {
                    relay,
                    from,
                    to,
                    packet,
                },
            );
        }
    }

    fn forward(&mut self, relay: usize, from: usize, to: usize, packet: Packet) {
        if !self.relays[relay].clients.contains_key(&from) {
            return;
        }
        if let Some(delay) = self.leg_delay(relay, to) {
            (self.now, from, to, relay).hash(&mut self.trace);
            let via = Via::Relay(self.relays[relay].id);
            self.push(
                self.now + delay,
                Happening::Deliver {
                    node: to,
                    from,
                    via,
                    packet,
                },
            );
        }
    }
}
