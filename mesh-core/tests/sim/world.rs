//! Virtual time, a virtual internet, and nodes that each run a real [`Core`]: what the world
//! consists of, how a scenario builds, runs and changes it. Its parts: `queue` is time and what
//! happens when, `shell` is what surrounds the core in a node, `network` is what carries packets.

mod network;
mod queue;
mod shell;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque},
    hash::{DefaultHasher, Hasher},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use mesh_core::{
    io::{Event, Input, RelayTransport, Uplink, UplinkId},
    node::{Core, CoreConfig, report::PeerReport},
    snapshot::{MeshSettings, Node, Relay, Snapshot},
};
use mesh_wire::id::{MeshId, NodeId, NodeName, RelayId, SiteName, Via};
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};

use self::queue::{Entry, Happening, instant};
use crate::{
    nat::{Nat, NatSort},
    session::{Body, Session},
};

/// The WireGuard port of every node.
const PORT: u16 = 51_820;
/// Sockets that it opens besides have ports from here on.
const EXTRA_PORT: u16 = 60_000;
/// After this long a connection to a relay is noticed to be dead.
const RELAY_IDLE_US: u64 = 3_000_000;

/// A place with one router and one line to the internet.
pub(crate) struct Site {
    pub(crate) nat: Nat,
    pub(crate) delay_us: u64,
    pub(crate) loss: f64,
    pub(crate) down: bool,
    /// The largest inner packets that its line carries.
    pub(crate) carries_bytes: u16,
    /// Its hosts cannot send each other UDP.
    pub(crate) lan_blocked: bool,
    /// Up to so much later than others a packet comes: they overtake each other.
    pub(crate) jitter_us: u64,
    /// Share of packets that come twice.
    pub(crate) copies: f64,
}

pub(crate) struct SimNode {
    pub(crate) id: NodeId,
    pub(crate) name: NodeName,
    pub(crate) site: usize,
    pub(crate) host: SocketAddr,
    core: Option<Core>,
    /// The node does not run: asleep, or its machine is stopped.
    pub(crate) frozen: bool,
    frozen_at: u64,
    /// By how much its clock is behind the world's: it slept so long.
    lag_us: u64,
    /// What it will hear when it runs again.
    unheard: Vec<Input>,
    /// Counts boots: what was meant for an earlier one is void.
    boot: u32,
    sessions: BTreeMap<NodeId, Session>,
    paths: BTreeMap<NodeId, Chosen>,
    /// What the packet path knows.
    snapshot: Option<Arc<Snapshot>>,
    /// Ports of its own that packets to some addresses leave by.
    adopted: BTreeMap<SocketAddr, u16>,
    /// Whether it takes part in bursts of sockets.
    pub(crate) bursts: bool,
    /// By how much its wall clock is behind.
    pub(crate) clock_behind_us: u64,
    held: BTreeMap<NodeId, VecDeque<Body>>,
    traffic: BTreeMap<NodeId, (bool, BTreeSet<Via>)>,
    wake_at: Option<u64>,
    wakes: u32,
    pub(crate) remembered: BTreeMap<NodeId, Vec<SocketAddr>>,
    /// Everything said, with its time in milliseconds.
    pub(crate) events: Vec<(u64, Event)>,
    /// Every change of path, with its time in milliseconds.
    pub(crate) moves: Vec<(u64, NodeId, Option<Via>)>,
    /// Packets that went out by no relay, whatever became of them.
    pub(crate) direct_sent: BTreeMap<NodeId, u64>,
    /// Its ways out, with the site that each leads to; empty: its site is the only one.
    pub(crate) uplinks: Vec<(Uplink, usize)>,
    /// What went out, to whomever: packets, and their bytes with all headers.
    pub(crate) packets_out: u64,
    pub(crate) bytes_out: u64,
}

/// By which ways a node's packets to a peer go.
#[derive(Clone, Copy, Default)]
pub(crate) struct Chosen {
    primary: Option<Via>,
    duplicate: Option<Via>,
    /// So many packets more go twice; `None`: all.
    duplicates_left: Option<u32>,
}

pub(crate) struct SimRelay {
    pub(crate) id: RelayId,
    pub(crate) relay: Relay,
    /// The node that it runs on, and whether it is reached from outside that node's site.
    pub(crate) host: Option<(usize, bool)>,
    pub(crate) up: bool,
    /// How much longer than to other relays the way from a site is, in one direction.
    pub(crate) far_us: BTreeMap<usize, u64>,
    clients: BTreeMap<usize, BTreeSet<RelayTransport>>,
    using: BTreeMap<usize, RelayTransport>,
    /// Who asked for whom.
    asked: BTreeSet<(NodeId, usize)>,
}

/// A stream of pings from one node to another.
pub(crate) struct Flow {
    pub(crate) from: usize,
    pub(crate) to: usize,
    every_us: u64,
    until_answered: bool,
    /// Inner bytes of each packet.
    pub(crate) bytes: u16,
    pub(crate) running: bool,
    next_id: u64,
    /// When each was sent and answered, in milliseconds.
    pub(crate) sent: BTreeMap<u64, u64>,
    pub(crate) answered: BTreeMap<u64, u64>,
    /// What arrived at the other end.
    delivered: BTreeSet<u64>,
    /// Packets that an application got a second time.
    pub(crate) twice: u64,
}

impl Flow {
    /// What was sent and answered before is of no interest any more.
    pub(crate) fn forget(&mut self) {
        self.sent.clear();
        self.answered.clear();
        self.delivered.clear();
    }
}

/// Something that a scenario does to the world.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Change {
    SiteDown(usize),
    SiteUp(usize),
    RelayDown(usize),
    RelayUp(usize),
    /// It says that it will stop.
    RelayGoAway(usize),
    StartFlow(usize),
    /// The node does not run, for so many milliseconds; its clock stops, too, or does not.
    Freeze {
        node: usize,
        ms: u64,
        clock_stops: bool,
    },
    /// It runs again.
    Thaw {
        node: usize,
        frozen_at: u64,
        slept_us: u64,
    },
    /// Relays give up a node that does not run.
    GiveUp {
        node: usize,
        frozen_at: u64,
    },
    /// The line to one relay is cut, or back.
    CutOff(usize, usize),
    /// QUIC links of a site that lets no UDP out are noticed to be dead.
    NoticeBlocked(usize),
    /// Connections that `CutOff` cut are noticed.
    NoticeCut(usize, usize),
    /// Sockets by which nothing came are closed.
    CloseSockets(usize),
    /// A relay's clients notice that the node that it ran on is gone.
    NoticeHost {
        relay: usize,
        boot: u32,
    },
    /// Connections to relays that a dead line cut are noticed.
    Notice {
        site: usize,
        outage: u32,
    },
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
    /// The same for what goes from the first to the second.
    pub(crate) severed_one_way: BTreeSet<(usize, usize)>,
    /// The largest inner packets that go directly from one site to another, where that is less than what
    /// the lines carry.
    pub(crate) carries_one_way: BTreeMap<(usize, usize), u16>,
    /// Nodes whose kernel refuses to send anything directly.
    pub(crate) refused: BTreeSet<usize>,
    /// Whether packet paths say that they refused an initiation.
    pub(crate) call_back: bool,
    /// What share of packets is lost directly from one site to another.
    pub(crate) lossy: BTreeMap<(usize, usize), f64>,
    /// Sites and relays between which nothing passes.
    pub(crate) cut_off: BTreeSet<(usize, usize)>,
    pub(crate) snapshot: Option<Arc<Snapshot>>,
    /// One that names every node.
    everybody: Option<Arc<Snapshot>>,
    /// Connections to relays that are being made: node, relay, by what.
    attempts: BTreeSet<(usize, usize, RelayTransport)>,
    trace: DefaultHasher,
    pub(crate) steps: u64,
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
            severed_one_way: BTreeSet::new(),
            cut_off: BTreeSet::new(),
            carries_one_way: BTreeMap::new(),
            refused: BTreeSet::new(),
            call_back: true,
            lossy: BTreeMap::new(),
            snapshot: None,
            everybody: None,
            attempts: BTreeSet::new(),
            trace: DefaultHasher::new(),
            steps: 0,
        }
    }

    // Building.

    pub(crate) fn add_relay(&mut self, name: &str) -> usize {
        let index = self.relays.len();
        let relay = Relay {
            name: name.parse().unwrap(),
            addresses: vec![
                [192, 0, u8::try_from(index + 1).unwrap(), 1].into(),
                Ipv6Addr::new(
                    0x2001,
                    0xdb8,
                    0xffff,
                    u16::try_from(index).unwrap(),
                    0,
                    0,
                    0,
                    1,
                )
                .into(),
            ],
            quic_port: 443,
            tls_port: 443,
            stun_ports: vec![443, 3478],
            node: None,
            sites: BTreeSet::new(),
        };
        let id = RelayId::from(&relay.name);
        let (clients, using, asked) = Default::default();
        self.relays.push(SimRelay {
            id,
            relay,
            host: None,
            up: true,
            far_us: BTreeMap::new(),
            clients,
            using,
            asked,
        });
        index
    }

    /// `node` is a relay, for the sites of these numbers (none: for everybody); `public`: from outside its
    /// own site, too.
    pub(crate) fn add_peer_relay(&mut self, node: usize, public: bool, sites: &[usize]) -> usize {
        let index = self.add_relay(&format!("relay-on-{}", self.nodes[node].name));
        let site = self.nodes[node].site;
        let relay = &mut self.relays[index];
        relay.host = Some((node, public));
        relay.relay.node = Some(self.nodes[node].name.clone());
        let sites = sites.iter().map(|site| format!("site-{site}"));
        relay.relay.sites = sites.map(|site| site.parse().unwrap()).collect();
        // What its name in the snapshot leads to; the simulator goes by `host`.
        let outside = self.sites[site].nat.public;
        let inside = self.nodes[node].host.ip();
        relay.relay.addresses = vec![inside];
        relay
            .relay
            .addresses
            .extend(Some(outside).filter(|_| public));
        index
    }

    /// A site with a line of 10 ms and no loss.
    pub(crate) fn add_site(&mut self, sort: NatSort) -> usize {
        let [high, low] = u16::try_from(self.sites.len()).unwrap().to_be_bytes();
        let public = IpAddr::from([203, 1, high, low]);
        self.push_site(Nat::new(sort, public))
    }

    /// A site whose hosts have IPv6 addresses of their own.
    pub(crate) fn add_site_v6(&mut self, sort: NatSort) -> usize {
        let index = u16::try_from(self.sites.len()).unwrap();
        let public = Ipv6Addr::new(0x2001, 0xdb8, index, 0, 0, 0, 0, 1);
        self.push_site(Nat::new(sort, public.into()))
    }

    fn push_site(&mut self, nat: Nat) -> usize {
        let index = self.sites.len();
        self.sites.push(Site {
            nat,
            delay_us: 10_000,
            loss: 0.0,
            down: false,
            carries_bytes: u16::MAX,
            lan_blocked: false,
            jitter_us: 0,
            copies: 0.0,
        });
        self.outages.push(0);
        index
    }

    /// A node at `site`. An open site, and one behind a firewall, has room for one.
    pub(crate) fn add_node(&mut self, name: &str, site: usize) -> usize {
        let index = self.nodes.len();
        let [high, low] = u16::try_from(site).unwrap().to_be_bytes();
        let here = self.nodes.iter().filter(|node| node.site == site).count();
        let router = &self.sites[site].nat;
        let public = matches!(router.sort, NatSort::Open | NatSort::Firewall);
        let host = if public || router.public.is_ipv6() {
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
            frozen: false,
            frozen_at: 0,
            lag_us: 0,
            unheard: Vec::new(),
            boot: 0,
            sessions: BTreeMap::new(),
            paths: BTreeMap::new(),
            snapshot: None,
            adopted: BTreeMap::new(),
            bursts: false,
            clock_behind_us: 0,
            held: BTreeMap::new(),
            traffic: BTreeMap::new(),
            wake_at: None,
            wakes: 0,
            remembered: BTreeMap::new(),
            events: Vec::new(),
            moves: Vec::new(),
            direct_sent: BTreeMap::new(),
            uplinks: Vec::new(),
            packets_out: 0,
            bytes_out: 0,
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
        self.make_snapshot();
        for node in 0..self.nodes.len() {
            self.boot(node);
        }
    }

    /// Changes the desired state, which these nodes hear at once, and others not before they boot or hear of
    /// another change.
    pub(crate) fn publish(&mut self, to: &[usize], change: impl FnOnce(&mut Snapshot)) {
        change(Arc::make_mut(self.snapshot.as_mut().unwrap()));
        for &index in to {
            let snapshot = self.snapshot.clone().unwrap();
            self.input(index, Input::Snapshot(snapshot));
        }
    }

    pub(crate) fn make_snapshot(&mut self) {
        let mesh = MeshId([7; 32]);
        let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(mesh, "sim"));
        for node in &self.nodes {
            let site = format!("site-{}", node.site);
            let overlay_v4 = Ipv4Addr::new(100, 96, 0, 1);
            let mut described = Node::new(&mesh, node.name.clone(), node.id, overlay_v4);
            described.locality.site = Some(SiteName::try_from(site).unwrap());
            snapshot.nodes.insert(node.name.clone(), described);
        }
        for relay in &self.relays {
            snapshot.relays.insert(relay.id, relay.relay.clone());
        }
        self.snapshot = Some(Arc::new(snapshot));
        self.everybody.clone_from(&self.snapshot);
    }

    /// Starts a node anew, with what it remembered.
    pub(crate) fn boot(&mut self, index: usize) {
        self.kill(index);
        for relay in self.hosted(index) {
            self.lose_clients(relay, "reset by peer");
        }
        let seed = self.dice.random();
        let now = instant(self.now);
        let snapshot = self.snapshot.clone().unwrap();
        let node = &mut self.nodes[index];
        let config = CoreConfig {
            node: node.name.clone(),
            id: node.id,
            remembered: node.remembered.clone(),
            bursts: node.bursts,
        };
        node.core = Some(Core::new(config, seed, now));
        let host = node.host;
        let uplinks = &self.nodes[index].uplinks;
        let network = match uplinks.is_empty() {
            true => Input::LocalAddresses(vec![host]),
            false => Input::Uplinks(uplinks.iter().map(|(uplink, _)| uplink.clone()).collect()),
        };
        self.input(index, network);
        self.input(index, Input::Snapshot(snapshot));
    }

    /// Power off: nobody is told; relays notice after a while.
    pub(crate) fn kill(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        node.core = None;
        node.adopted.clear();
        node.snapshot = None;
        node.boot += 1;
        node.wake_at = None;
        node.sessions.clear();
        node.paths.clear();
        node.held.clear();
        node.traffic.clear();
        node.unheard.clear();
        (node.frozen, node.lag_us) = (false, 0);
        self.attempts.retain(|(node, _, _)| *node != index);
        let boot = node.boot;
        for relay in 0..self.relays.len() {
            self.disconnect(relay, index, None);
        }
        for relay in self.hosted(index) {
            let notice = Change::NoticeHost { relay, boot };
            self.push(self.now + RELAY_IDLE_US, Happening::Change(notice));
        }
    }

    /// The relays that run on a node.
    fn hosted(&self, node: usize) -> Vec<usize> {
        let here = |relay: &usize| {
            self.relays[*relay]
                .host
                .is_some_and(|(host, _)| host == node)
        };
        (0..self.relays.len()).filter(here).collect()
    }

    fn lose_clients(&mut self, relay: usize, reason: &str) {
        let clients: Vec<usize> = self.relays[relay].clients.keys().copied().collect();
        for node in clients {
            self.disconnect(relay, node, Some(reason));
        }
        self.relays[relay].asked.clear();
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
            bytes: 84,
            running: false,
            next_id: 0,
            sent: BTreeMap::new(),
            answered: BTreeMap::new(),
            delivered: BTreeSet::new(),
            twice: 0,
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
                for node in self.nodes_at(site) {
                    for relay in 0..self.relays.len() {
                        self.disconnect(relay, node, Some("timed out"));
                    }
                }
            }
            Change::Notice { .. } => {}
            Change::RelayDown(relay) => {
                self.relays[relay].up = false;
                self.lose_clients(relay, "reset by peer");
            }
            Change::RelayUp(relay) => self.relays[relay].up = true,
            Change::RelayGoAway(index) => {
                let relay = self.relays[index].id;
                let clients: Vec<usize> = self.relays[index].clients.keys().copied().collect();
                for node in clients {
                    self.tell_later(node, index, Input::RelayGoAway { relay });
                }
            }
            Change::StartFlow(flow) => self.start_flow(flow),
            Change::Freeze {
                node,
                ms,
                clock_stops,
            } => self.freeze(node, ms * 1000, clock_stops),
            Change::Thaw {
                node,
                frozen_at,
                slept_us,
            } => self.thaw(node, frozen_at, slept_us),
            Change::GiveUp { node, frozen_at } => {
                if self.nodes[node].frozen && self.nodes[node].frozen_at == frozen_at {
                    (0..self.relays.len())
                        .for_each(|relay| self.disconnect(relay, node, Some("timed out")));
                }
            }
            Change::CutOff(site, relay) => {
                self.cut_off.insert((site, relay));
                let notice = Change::NoticeCut(site, relay);
                self.push(self.now + RELAY_IDLE_US, Happening::Change(notice));
            }
            Change::NoticeBlocked(site) => {
                if self.sites[site].nat.sort == NatSort::UdpBlocked {
                    self.lose_quic(site);
                }
            }
            Change::CloseSockets(node) => {
                let used: BTreeSet<u16> = self.nodes[node].adopted.values().copied().collect();
                let closed = |address: &SocketAddr| {
                    address.port() >= EXTRA_PORT && !used.contains(&address.port())
                };
                self.hosts
                    .retain(|(_, address), owner| *owner != node || !closed(address));
            }
            Change::NoticeHost { relay, boot } => {
                let host = self.relays[relay].host.map(|(host, _)| &self.nodes[host]);
                if host.is_some_and(|host| host.boot == boot && host.core.is_none()) {
                    self.lose_clients(relay, "timed out");
                }
            }
            Change::NoticeCut(site, relay) => {
                if self.cut_off.contains(&(site, relay)) {
                    for node in self.nodes_at(site) {
                        self.disconnect(relay, node, Some("timed out"));
                    }
                }
            }
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

    pub(crate) fn nodes_at(&self, site: usize) -> Vec<usize> {
        let here = |node: &usize| self.nodes[*node].site == site;
        (0..self.nodes.len()).filter(here).collect()
    }

    /// Gives a node another way out, by a site of its own.
    pub(crate) fn add_uplink(
        &mut self,
        index: usize,
        sort: NatSort,
        metered: bool,
        weight: u16,
    ) -> usize {
        if self.nodes[index].uplinks.is_empty() {
            let (host, site) = (self.nodes[index].host, self.nodes[index].site);
            let first = Uplink {
                id: UplinkId(1),
                addresses: vec![host],
                up: true,
                metered: false,
                weight: 100,
            };
            self.nodes[index].uplinks.push((first, site));
        }
        let site = self.add_site(sort);
        let id = UplinkId(u32::try_from(self.nodes[index].uplinks.len() + 1).unwrap());
        let last = u8::try_from(id.0).unwrap();
        let addresses = vec![SocketAddr::new([10, 88, last, 2].into(), PORT)];
        let uplink = Uplink {
            id,
            addresses,
            up: true,
            metered,
            weight,
        };
        self.nodes[index].uplinks.push((uplink, site));
        site
    }

    /// A cable is pulled, or put in.
    pub(crate) fn set_carrier(&mut self, index: usize, uplink: usize, up: bool) {
        self.nodes[index].uplinks[uplink].0.up = up;
        let all = self.nodes[index].uplinks.iter();
        let all = all.map(|(uplink, _)| uplink.clone()).collect();
        self.input(index, Input::Uplinks(all));
    }

    fn use_uplink(&mut self, index: usize, id: UplinkId) {
        let mut uplinks = self.nodes[index].uplinks.iter();
        let (uplink, site) = uplinks.find(|(uplink, _)| uplink.id == id).unwrap();
        let (host, site) = (uplink.addresses[0], *site);
        if (host, site) == (self.nodes[index].host, self.nodes[index].site) {
            return;
        }
        self.hosts.retain(|_, node| *node != index);
        self.hosts.insert((site, host), index);
        (self.nodes[index].host, self.nodes[index].site) = (host, site);
        for relay in 0..self.relays.len() {
            self.disconnect(relay, index, Some("its uplink is not used any more"));
        }
    }

    fn probe_uplink(&mut self, index: usize, id: UplinkId, target: SocketAddr) {
        let mut uplinks = self.nodes[index].uplinks.iter();
        let (uplink, site) = uplinks.find(|(uplink, _)| uplink.id == id).unwrap();
        let (works, site) = (uplink.up && !self.sites[*site].down, *site);
        let relay = self
            .relays
            .iter()
            .position(|relay| relay.up && relay.relay.addresses.contains(&target.ip()));
        if let Some(relay) = relay.filter(|_| works) {
            let boot = self.nodes[index].boot;
            let input = Input::UplinkAnswered { uplink: id };
            let node = index;
            let at = self.now + 2 * self.line_from(site, relay);
            self.push(at, Happening::Tell { node, boot, input });
        }
    }

    /// A node gets another address on its LAN.
    pub(crate) fn renumber(&mut self, index: usize, host: SocketAddr) {
        let site = self.nodes[index].site;
        self.hosts.retain(|_, node| *node != index);
        self.hosts.insert((site, host), index);
        self.nodes[index].host = host;
        for relay in 0..self.relays.len() {
            self.disconnect(relay, index, Some("the address is gone"));
        }
        self.input(index, Input::LocalAddresses(vec![host]));
    }

    /// Whether a node has, or tries to make, a link to a relay.
    pub(crate) fn is_client(&self, relay: usize, node: usize) -> bool {
        let tried =
            |attempt: &(usize, usize, RelayTransport)| (attempt.0, attempt.1) == (node, relay);
        self.relays[relay].clients.contains_key(&node) || self.attempts.iter().any(tried)
    }

    /// Something happens to a node.
    pub(crate) fn tell(&mut self, index: usize, input: Input) {
        self.input(index, input);
    }

    /// Whether a node is powered on.
    pub(crate) fn runs(&self, index: usize) -> bool {
        self.nodes[index].core.is_some()
    }

    /// An orderly stop.
    pub(crate) fn stop(&mut self, index: usize) {
        if let Some(core) = &mut self.nodes[index].core {
            core.shut_down();
            self.input(index, Input::Timeout);
        }
        self.kill(index);
        for relay in self.hosted(index) {
            self.lose_clients(relay, "closed");
        }
    }

    fn freeze(&mut self, node: usize, for_us: u64, clock_stops: bool) {
        if !self.runs(node) || self.nodes[node].frozen {
            return;
        }
        let frozen_at = self.now;
        (self.nodes[node].frozen, self.nodes[node].frozen_at) = (true, frozen_at);
        let slept_us = if clock_stops { for_us } else { 0 };
        let thaw = Change::Thaw {
            node,
            frozen_at,
            slept_us,
        };
        self.push(self.now + for_us, Happening::Change(thaw));
        let give_up = Change::GiveUp { node, frozen_at };
        self.push(self.now + RELAY_IDLE_US, Happening::Change(give_up));
    }

    fn thaw(&mut self, node: usize, frozen_at: u64, slept_us: u64) {
        if !self.nodes[node].frozen || self.nodes[node].frozen_at != frozen_at {
            return; // It was switched off meanwhile.
        }
        self.nodes[node].frozen = false;
        self.nodes[node].lag_us += slept_us;
        self.nodes[node].wake_at = None;
        for input in std::mem::take(&mut self.nodes[node].unheard) {
            self.input(node, input);
        }
        self.input(node, Input::Timeout);
    }

    /// All UDP of a site is dropped from now on.
    pub(crate) fn block_udp(&mut self, site: usize) {
        self.sites[site].nat.sort = NatSort::UdpBlocked;
        // Both ends of the QUIC links notice after their idle timeout.
        let notice = Change::NoticeBlocked(site);
        self.push(self.now + RELAY_IDLE_US, Happening::Change(notice));
    }

    fn lose_quic(&mut self, site: usize) {
        for node in self.nodes_at(site) {
            for relay in 0..self.relays.len() {
                let transport = RelayTransport::Quic;
                let legs = self.relays[relay].clients.get(&node);
                if legs.is_some_and(|legs| legs.contains(&transport)) {
                    self.drop_leg(relay, node, transport);
                    let relay = self.relays[relay].id;
                    let reason = "timed out".to_owned();
                    let input = Input::RelayLost {
                        relay,
                        transport,
                        reason,
                    };
                    self.input(node, input);
                }
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
                if self.nodes[node].wake_at == Some(at) && !self.nodes[node].frozen {
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
}
