//! Which endpoints of a service new flows go to, as one node sees it: the nearest tier that has
//! a usable endpoint behind a live path, unless the service or its slices say otherwise.
//! `docs/services.md` has the semantics row by row, beside kube-proxy's and Cilium's.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use mesh_wire::id::NodeName;

use self::balance::Weighted;
pub use self::{
    costs::Costs,
    loads::Loads,
    outliers::{Failures, Outliers},
    table::{Table, Update},
};
use crate::snapshot::{
    Endpoint, EndpointPort, EndpointSlice, External, Locality, Node, Place, Policy, Protocol,
    SPILL_OVER_MAX, Service, ServiceKind, ServiceName, ServicePort, Snapshot, TrafficDistribution,
};

/// The desired state, and what this node knows that the controller cannot: where it is, and
/// which nodes it cannot reach now.
#[derive(Debug, Clone)]
pub struct View {
    /// The desired state.
    pub snapshot: Arc<Snapshot>,
    /// This node.
    pub node: NodeName,
    /// Nodes to which no path is alive.
    pub dead: BTreeSet<NodeName>,
    /// Endpoints to which TCP connects fail ([`Outliers`]).
    pub ejected: BTreeSet<SocketAddr>,
    /// What a packet to a node costs, as far as that is measured ([`Costs`]).
    pub costs: BTreeMap<NodeName, Duration>,
    /// How many TCP connections this node has open to endpoints of services with a limit ([`Loads`]).
    pub open: BTreeMap<SocketAddr, u32>,
}

impl View {
    /// Of a node that knows nothing but what the controller says.
    #[must_use]
    pub fn new(snapshot: Arc<Snapshot>, node: NodeName) -> Self {
        Self {
            snapshot,
            node,
            dead: BTreeSet::new(),
            ejected: BTreeSet::new(),
            costs: BTreeMap::new(),
            open: BTreeMap::new(),
        }
    }
}

/// How far an endpoint is; nearer is less.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// On this node.
    SameNode,
    /// On this node's LAN.
    SameSite,
    /// In this node's zone.
    SameZone,
    /// In this node's region.
    SameRegion,
    /// Elsewhere, or nobody said where.
    Anywhere,
}

impl Tier {
    /// The tier's name in reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SameNode => "same-node",
            Self::SameSite => "same-site",
            Self::SameZone => "same-zone",
            Self::SameRegion => "same-region",
            Self::Anywhere => "anywhere",
        }
    }
}

/// An endpoint with this node's judgement of it.
#[derive(Debug, Clone)]
pub struct Ranked<'a> {
    /// The slice that holds it (for its ports).
    pub slice: &'a EndpointSlice,
    /// The endpoint.
    pub endpoint: &'a Endpoint,
    /// Where to send packets for it: a node's own address outside the mesh is replaced by the
    /// node's overlay address of that family.
    pub address: IpAddr,
    /// How far it is.
    pub tier: Tier,
    /// Whether it takes new flows (ready, or as `publishNotReadyAddresses` and termination say).
    pub usable: bool,
    /// Whether its node has a live path. An endpoint outside every node counts as alive.
    pub alive: bool,
    /// What a packet there costs; `None`: not measured.
    pub cost: Option<Duration>,
    /// Whether new flows from this node go to it now, by any of the service's ports: it is
    /// usable, alive, and among those of its address family that come first. When nothing is
    /// alive, liveness does not count: the next packet is what may bring a path back, and a
    /// refusal would not.
    pub chosen: bool,
    /// How many flows it takes where others beside it take one.
    weight: u16,
    /// Ports at its address to which TCP connects fail.
    ejected: BTreeSet<u16>,
    /// TCP connections that this node has open, by port at its address.
    open: BTreeMap<u16, u32>,
    /// How many of them are enough for its service.
    max_connections: Option<NonZeroU16>,
    /// Whether its hints name this node; `None`: they name no node.
    for_node: Option<bool>,
    /// Whether its hints name this node's zone; `None`: they name no zone.
    for_zone: Option<bool>,
}

impl Ranked<'_> {
    /// Whether TCP connects to any of its ports fail. It may be chosen all the same: see
    /// [`EJECTED_SHARE`].
    #[must_use]
    pub fn is_ejected(&self) -> bool {
        let mut ports = self.slice.ports.iter();
        ports.any(|port| port.protocol == Protocol::Tcp && self.ejected.contains(&port.port))
    }

    /// Whether this node has as many connections open to any of its ports as the service's `maxConnections`
    /// says. It may be chosen all the same, where all others are full too.
    #[must_use]
    pub fn is_full(&self) -> bool {
        let mut ports = self.slice.ports.iter();
        ports.any(|port| port.protocol == Protocol::Tcp && self.is_full_at(port.port))
    }

    fn is_full_at(&self, port: u16) -> bool {
        let limit = self.max_connections.map(|limit| u32::from(limit.get()));
        limit.is_some_and(|limit| self.open_at(port) >= limit)
    }

    fn open_at(&self, port: u16) -> u32 {
        self.open.get(&port).copied().unwrap_or_default()
    }

    fn target(&self, port: &ServicePort) -> Option<u16> {
        let serves = |one: &&EndpointPort| one.name == port.name && one.protocol == port.protocol;
        Some(self.slice.ports.iter().find(serves)?.port)
    }
}

/// Where clients send: an address, port and protocol of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frontend {
    /// A ClusterIP, an address outside, or for a node port one of this node's own. IPv4 is never
    /// in its IPv6-mapped form.
    pub address: IpAddr,
    /// The service's port, or its node port.
    pub port: u16,
    /// The service port's protocol.
    pub protocol: Protocol,
}

/// Where a frontend leads.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Backends {
    /// Each as often as it takes flows compared with the others, in the order that the policy
    /// asks for: else sorted, each once. Empty: clients are refused at once.
    pub endpoints: Vec<SocketAddr>,
    /// Which of them the next flow gets.
    pub policy: Policy,
    /// The service's `affinity`.
    pub affinity: Option<Duration>,
    /// What holds for clients that are no processes of this node or its pods; `None`: the same.
    pub outside: Option<Outside>,
}

/// Where a frontend leads clients from outside.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Outside {
    /// As [`Backends::endpoints`]: with `externalTrafficPolicy: Local` those on this node.
    pub endpoints: Vec<SocketAddr>,
    /// Who may use it; empty: everybody.
    pub sources: Vec<IpNet>,
}

/// Of the endpoints that serve one port in one family, one in so many may be ejected. Where more are,
/// none is: either what fails is not theirs, or the rest could not carry the load (Envoy's panic
/// threshold is a half too).
pub const EJECTED_SHARE: usize = 2;

/// With `least-latency`, endpoints that cost a quarter more than the best beside them count as
/// alike, and below [`ALIKE`] more in any case.
const ALIKE_SHARE: u32 = 4;

/// See [`ALIKE_SHARE`]: within one LAN, differences say more of the moment than of the way.
const ALIKE: Duration = Duration::from_millis(2);

/// Every endpoint of a service, nearest first, then by address.
#[must_use]
pub fn rank<'a>(view: &'a View, service: &Service) -> Vec<Ranked<'a>> {
    let mut ranked = judge_all(view, service);
    let families = [true, false].map(|v4| {
        let members = of_family(&ranked, v4);
        Choice::new(service, None, service.local_only, &members)
    });
    let groups = groups(service);
    let choices: Vec<_> = groups
        .iter()
        .map(|group| {
            Choice::new(
                service,
                group.port,
                group.local_only,
                &group.members(&ranked),
            )
        })
        .collect();
    for one in &mut ranked {
        let [v4, v6] = &families;
        let family = if one.address.is_ipv4() { v4 } else { v6 };
        one.usable = family.is_usable(one);
        let mut choices = groups.iter().zip(&choices);
        one.chosen = choices.any(|(group, choice)| group.has(one) && choice.takes(one));
    }
    ranked.sort_by_key(|one| (one.tier, one.address));
    ranked
}

/// What every frontend leads to. A frontend without endpoints is there with an empty list, so
/// that its clients are refused at once. Of several services that have one frontend, a ClusterIP
/// comes before an address from outside and that before a node port, then the first name.
#[must_use]
pub fn table(view: &View) -> BTreeMap<Frontend, Backends> {
    let mut table = Table::default();
    table.update(&Arc::new(view.clone()));
    let all = table.iter();
    all.map(|(frontend, backends)| (frontend, backends.clone()))
        .collect()
}

/// What a node answers at a service's `healthCheckNodePort`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// The service.
    pub service: ServiceName,
    /// How many endpoints that are ready it has on this node; none: load balancers send elsewhere.
    pub local_endpoints: usize,
}

/// By port. Of several services that ask for one port, the first by name has it. Costs a look at each
/// service.
#[must_use]
pub fn health_checks(view: &View) -> BTreeMap<u16, HealthCheck> {
    let mut checks = BTreeMap::new();
    for service in view.snapshot.services.values() {
        let Some(port) = service
            .external
            .health_check
            .filter(|_| service.external.local_only)
        else {
            continue;
        };
        checks.entry(port).or_insert_with(|| {
            let ranked = judge_all(view, service);
            let local = ranked.iter().filter(|one| {
                let ready = one.endpoint.ready || service.publish_not_ready;
                ready && one.tier == Tier::SameNode
            });
            let addresses: BTreeSet<_> = local.map(|one| one.address).collect();
            HealthCheck {
                service: service.name.clone(),
                local_endpoints: addresses.len(),
            }
        });
    }
    checks
}

/// Of how many connections of this node each endpoint of a service with `maxConnections` is full; the least, if
/// several services have it. Costs a look at each service, and at the endpoints of those.
#[must_use]
pub fn connection_limits(view: &View) -> BTreeMap<SocketAddr, u32> {
    let mut limits = BTreeMap::new();
    for service in view.snapshot.services.values() {
        let Some(limit) = service.balance.max_connections else {
            continue;
        };
        let limit = u32::from(limit.get());
        for one in judge_all(view, service) {
            let ports = service.ports.iter();
            let ports = ports.filter(|port| port.protocol == Protocol::Tcp);
            for target in ports.filter_map(|port| one.target(port)) {
                let at = SocketAddr::new(one.address, target);
                let least = limits.entry(at).or_insert(limit);
                *least = limit.min(*least);
            }
        }
    }
    limits
}

/// Each frontend of a service with `sockmap` with each of its endpoints on this node, ready or not: connections that
/// are open stay. Costs a look at each service, and at the
/// endpoints of those: who has a frontend that another service asks for too is not looked for.
#[must_use]
pub fn sockmap(view: &View) -> BTreeSet<(Frontend, SocketAddr)> {
    let mut pairs = BTreeSet::new();
    let services = view.snapshot.services.values();
    for service in services.filter(|service| service.balance.sockmap) {
        let mut here = judge_all(view, service);
        here.retain(|one| one.tier == Tier::SameNode);
        let asked = asked(view, service).into_iter();
        for (port, asked) in asked.filter(|(port, _)| port.protocol == Protocol::Tcp) {
            for (frontend, _) in asked {
                let group = Group {
                    v4: frontend.address.is_ipv4(),
                    port: Some(port),
                    local_only: false,
                };
                for one in group.members(&here) {
                    let target = one.target(port);
                    let endpoint = target.map(|target| SocketAddr::new(one.address, target));
                    pairs.extend(endpoint.map(|endpoint| (frontend, endpoint)));
                }
            }
        }
    }
    pairs
}

/// What kind of address a frontend has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    ClusterIp,
    External,
    LoadBalancer,
    NodePort,
}

fn frontends(view: &View, service: &Service) -> Vec<(Frontend, Kind, Backends)> {
    let asked = asked(view, service);
    if asked.is_empty() {
        return Vec::new();
    }
    let ranked = judge_all(view, service);
    let mut frontends = Vec::new();
    for (port, asked) in asked {
        let mut leads_to = LeadsTo::new(service, port, &ranked);
        for (frontend, kind) in asked {
            let backends = leads_to.backends(kind, frontend.address.is_ipv4());
            frontends.push((frontend, kind, backends));
        }
    }
    frontends
}

/// What clients ask for to reach a service, port by port.
fn asked<'a>(view: &View, service: &'a Service) -> Vec<(&'a ServicePort, Vec<(Frontend, Kind)>)> {
    let ServiceKind::ClusterIp(cluster_ips) = &service.kind else {
        return Vec::new();
    };
    let own = view.snapshot.nodes.get(&view.node);
    let own: Vec<_> = own.into_iter().flat_map(Node::own_addresses).collect();
    let External {
        addresses,
        load_balancer,
        ..
    } = &service.external;
    let of_port = |port: &'a ServicePort| {
        let mut asked = Vec::new();
        let addresses = [
            (Kind::ClusterIp, cluster_ips, Some(port.port)),
            (Kind::External, addresses, Some(port.port)),
            (Kind::LoadBalancer, load_balancer, Some(port.port)),
            (Kind::NodePort, &own, port.node_port),
        ];
        for (kind, addresses, number) in addresses {
            for &address in number.and(Some(addresses)).into_iter().flatten() {
                let frontend = Frontend {
                    address: address.to_canonical(),
                    port: number.unwrap_or_default(),
                    protocol: port.protocol,
                };
                asked.push((frontend, kind));
            }
        }
        (port, asked)
    };
    service.ports.iter().map(of_port).collect()
}

/// Where one port of a service leads, each list made once.
struct LeadsTo<'a> {
    service: &'a Service,
    port: &'a ServicePort,
    ranked: &'a [Ranked<'a>],
    /// By family and whether it is kept to this node.
    lists: BTreeMap<(bool, bool), Vec<SocketAddr>>,
}

impl<'a> LeadsTo<'a> {
    fn new(service: &'a Service, port: &'a ServicePort, ranked: &'a [Ranked<'a>]) -> Self {
        Self {
            service,
            port,
            ranked,
            lists: BTreeMap::new(),
        }
    }

    /// `internalTrafficPolicy` is for ClusterIPs; a client inside that asks for an address from
    /// outside is led as if there were no policy at all (kube-proxy's chains for `LOCAL` sources).
    fn backends(&mut self, kind: Kind, v4: bool) -> Backends {
        let Service {
            local_only,
            ref external,
            affinity,
            ..
        } = *self.service;
        let endpoints = self.list(v4, kind == Kind::ClusterIp && local_only);
        let restricted = kind == Kind::LoadBalancer && !external.sources.is_empty();
        let outside = (kind != Kind::ClusterIp && (external.local_only || restricted)).then(|| {
            let sources = external.sources.iter().filter(|_| restricted);
            Outside {
                endpoints: self.list(v4, external.local_only),
                sources: sources.copied().collect(),
            }
        });
        Backends {
            endpoints,
            policy: self.service.balance.policy,
            affinity,
            outside,
        }
    }

    fn list(&mut self, v4: bool, local_only: bool) -> Vec<SocketAddr> {
        let Self {
            service,
            port,
            ranked,
            ref mut lists,
        } = *self;
        let list = lists.entry((v4, local_only)).or_insert_with(|| {
            let group = Group {
                v4,
                port: Some(port),
                local_only,
            };
            let members = group.members(ranked);
            let choice = Choice::new(service, Some(port), local_only, &members);
            let chosen = members.iter().filter(|one| choice.takes(one));
            let chosen = chosen.filter_map(|one| {
                let weighted = Weighted {
                    tier: choice.standing(one),
                    endpoint: SocketAddr::new(one.address, one.target(port)?),
                    weight: one.weight,
                };
                Some(weighted)
            });
            balance::slots(&service.balance, choice.enough, chosen.collect())
        });
        list.clone()
    }
}

/// The endpoints that are chosen from together: those of one address family that serve one port.
struct Group<'a> {
    v4: bool,
    /// `None`: the service has no ports.
    port: Option<&'a ServicePort>,
    local_only: bool,
}

impl Group<'_> {
    fn has(&self, one: &Ranked<'_>) -> bool {
        one.address.is_ipv4() == self.v4
            && self.port.is_none_or(|port| one.target(port).is_some())
            && (!self.local_only || one.tier == Tier::SameNode)
    }

    fn members<'r, 'a>(&self, ranked: &'r [Ranked<'a>]) -> Vec<&'r Ranked<'a>> {
        ranked.iter().filter(|one| self.has(one)).collect()
    }
}

fn of_family<'r, 'a>(ranked: &'r [Ranked<'a>], v4: bool) -> Vec<&'r Ranked<'a>> {
    let family = ranked.iter().filter(|one| one.address.is_ipv4() == v4);
    family.collect()
}

fn groups(service: &Service) -> Vec<Group<'_>> {
    let mut ports: Vec<_> = service.ports.iter().map(Some).collect();
    if ports.is_empty() {
        ports.push(None);
    }
    let local_only = service.local_only;
    let of_port = |port| {
        [true, false].map(|v4| Group {
            v4,
            port,
            local_only,
        })
    };
    ports.into_iter().flat_map(of_port).collect()
}

/// What stands in for an endpoint's distance: those that count alike have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Standing {
    tier: Tier,
    /// The way there costs more than to others of the tier.
    dearer: bool,
}

/// Which members of a group take new flows.
struct Choice<'a> {
    /// `None`: the service has no ports.
    port: Option<&'a ServicePort>,
    publish_not_ready: bool,
    /// Terminating endpoints serve until they are gone when nothing else is ready (KEP-1669).
    draining: bool,
    any_alive: bool,
    /// Whether ejected endpoints are left out.
    ejects: bool,
    /// Whether full endpoints are left out.
    spares: bool,
    /// How many endpoints carry the whole load.
    enough: usize,
    order: Order,
    /// The lowest cost in each tier, where that counts.
    best: BTreeMap<Tier, Duration>,
    /// The furthest standing of those that take new flows.
    last: Option<Standing>,
}

impl<'a> Choice<'a> {
    fn new(
        service: &Service,
        port: Option<&'a ServicePort>,
        local_only: bool,
        members: &[&Ranked<'_>],
    ) -> Self {
        let mut choice = Self {
            port,
            publish_not_ready: service.publish_not_ready,
            draining: false,
            any_alive: false,
            ejects: false,
            spares: false,
            enough: usize::from(service.balance.spill_over),
            order: Order::by_distribution(service.distribution),
            best: BTreeMap::new(),
            last: None,
        };
        choice.draining = !members.iter().any(|one| choice.is_usable(one));
        let usable = members.iter().filter(|one| choice.is_usable(one));
        let usable: Vec<_> = usable.copied().collect();
        choice.any_alive = usable.iter().any(|one| one.alive);
        if !choice.draining && !local_only {
            choice.order = Order::by_hints(&usable).unwrap_or(choice.order);
        }
        choice.ejects = choice.may_eject(&usable);
        if let Some(limit) = service.balance.max_connections {
            choice.spare_full(&usable, limit);
        }
        let candidates = usable.iter().filter(|one| choice.is_candidate(one));
        let candidates: Vec<_> = candidates.copied().collect();
        if service.balance.policy == Policy::LeastLatency {
            for one in &candidates {
                if let Some(cost) = one.cost {
                    let best = choice
                        .best
                        .entry(choice.order.standing(one))
                        .or_insert(cost);
                    *best = cost.min(*best);
                }
            }
        }
        let candidates = candidates.iter();
        let candidates = candidates.map(|one| (choice.standing(one), one.address));
        choice.last = balance::last_tier(choice.enough, candidates);
        choice
    }

    /// Whether few enough are ejected, of those that would take flows.
    fn may_eject(&self, usable: &[&Ranked<'_>]) -> bool {
        let candidates = usable.iter().filter(|one| self.is_candidate(one));
        let target = |one: &Ranked<'_>| self.port.and_then(|port| one.target(port));
        let candidates: BTreeSet<_> = candidates
            .map(|one| (self.is_ejected(one), one.address, target(one)))
            .collect();
        let ejected = candidates.iter().filter(|(ejected, ..)| *ejected).count();
        ejected > 0 && ejected * EJECTED_SHARE <= candidates.len()
    }

    fn is_ejected(&self, one: &Ranked<'_>) -> bool {
        let port = self.port.filter(|port| port.protocol == Protocol::Tcp);
        let target = port.and_then(|port| one.target(port));
        target.is_some_and(|target| one.ejected.contains(&target))
    }

    /// Leaves full endpoints out while another has room. What is open now needs so many endpoints with so many
    /// connections each: those that come next take their part before the nearest are full, and short connections,
    /// of which a look sees few, do not all go to and fro. A full one carries its part already.
    fn spare_full(&mut self, usable: &[&Ranked<'_>], limit: NonZeroU16) {
        let Some(port) = self.port.filter(|port| port.protocol == Protocol::Tcp) else {
            return;
        };
        let candidates = usable.iter().filter(|one| self.is_candidate(one));
        let open: BTreeMap<_, _> = candidates
            .filter_map(|one| {
                let target = one.target(port)?;
                Some(((one.address, target), one.open_at(target)))
            })
            .collect();
        let limit = u32::from(limit.get());
        let full = open.values().filter(|&&open| open >= limit).count();
        self.spares = full < open.len();
        let all = open.values().map(|&open| u64::from(open)).sum::<u64>();
        let needed = all.div_ceil(u64::from(limit));
        let needed = usize::try_from(needed).unwrap_or(usize::MAX);
        let enough = self.enough.max(needed);
        let carrying = if self.spares { full } else { 0 };
        self.enough = enough.saturating_sub(carrying).min(SPILL_OVER_MAX.into());
    }

    fn is_full(&self, one: &Ranked<'_>) -> bool {
        let port = self.port.filter(|port| port.protocol == Protocol::Tcp);
        let target = port.and_then(|port| one.target(port));
        target.is_some_and(|target| one.is_full_at(target))
    }

    fn standing(&self, one: &Ranked<'_>) -> Standing {
        let tier = self.order.standing(one);
        let dearer = self.best.get(&tier).zip(one.cost);
        let dearer =
            dearer.is_some_and(|(&best, cost)| cost > best + (best / ALIKE_SHARE).max(ALIKE));
        Standing { tier, dearer }
    }

    fn is_usable(&self, one: &Ranked<'_>) -> bool {
        if self.draining {
            one.endpoint.serving && one.endpoint.terminating
        } else {
            one.endpoint.ready || self.publish_not_ready
        }
    }

    fn is_candidate(&self, one: &Ranked<'_>) -> bool {
        self.is_usable(one)
            && (one.alive || !self.any_alive)
            && !(self.ejects && self.is_ejected(one))
            && !(self.spares && self.is_full(one))
    }

    fn takes(&self, one: &Ranked<'_>) -> bool {
        self.is_candidate(one) && Some(self.standing(one)) <= self.last
    }
}

/// What decides which endpoints come first.
#[derive(Debug, Clone, Copy)]
enum Order {
    /// Distance alone.
    Nearest,
    /// `PreferSameZone`.
    SameZone,
    /// `PreferSameNode`.
    SameNode,
    /// Hints that name this node.
    ForNode,
    /// Hints that name this node's zone.
    ForZone,
}

impl Order {
    fn by_distribution(distribution: Option<TrafficDistribution>) -> Self {
        match distribution {
            None => Self::Nearest,
            Some(TrafficDistribution::SameZone) => Self::SameZone,
            Some(TrafficDistribution::SameNode) => Self::SameNode,
        }
    }

    /// Hints count as for kube-proxy (`topologyModeFromHints`): when every ready endpoint has
    /// them and one is for this node, or else for its zone. Half-written hints would send
    /// everybody to the few endpoints that have them.
    fn by_hints(ready: &[&Ranked<'_>]) -> Option<Self> {
        let complete = |hint: fn(&Ranked<'_>) -> Option<bool>| {
            ready.iter().all(|one| hint(one).is_some())
                && ready.iter().any(|one| hint(one) == Some(true))
        };
        if complete(|one| one.for_node) {
            Some(Self::ForNode)
        } else {
            complete(|one| one.for_zone).then_some(Self::ForZone)
        }
    }

    /// What stands in for the endpoint's tier: those that count alike have the same.
    fn standing(self, one: &Ranked<'_>) -> Tier {
        let near = |zone: bool| if zone { Tier::SameZone } else { Tier::Anywhere };
        match self {
            Self::Nearest => one.tier,
            Self::SameNode if one.tier == Tier::SameNode => Tier::SameNode,
            Self::SameNode | Self::SameZone => near(one.tier <= Tier::SameZone),
            Self::ForNode if one.for_node == Some(true) => Tier::SameNode,
            Self::ForNode | Self::ForZone => near(one.for_zone == Some(true)),
        }
    }
}

fn judge_all<'a>(view: &'a View, service: &Service) -> Vec<Ranked<'a>> {
    let own = view.snapshot.nodes.get(&view.node);
    let endpoints = view.snapshot.endpoints(&service.name);
    endpoints
        .map(|(slice, endpoint)| judge(view, own, service, slice, endpoint))
        .collect()
}

fn judge<'a>(
    view: &'a View,
    own: Option<&Node>,
    service: &Service,
    slice: &'a EndpointSlice,
    endpoint: &'a Endpoint,
) -> Ranked<'a> {
    let name = endpoint
        .node
        .as_ref()
        .or_else(|| api_server_node(view, service, endpoint.address));
    let node = name.and_then(|name| view.snapshot.nodes.get(name));
    let unknown = Locality::default();
    let own_zone = own.and_then(|own| own.locality.zone.as_ref());
    let hints = &endpoint.hints;
    let address = node.map_or(endpoint.address, |node| {
        overlay_address(node, endpoint.address)
    });
    let [first, last] = [u16::MIN, u16::MAX].map(|port| SocketAddr::new(address, port));
    let ejected = view.ejected.range(first..=last);
    let open = view.open.range(first..=last);
    Ranked {
        slice,
        endpoint,
        address,
        tier: if name == Some(&view.node) {
            Tier::SameNode
        } else {
            own.map_or(Tier::Anywhere, |own| {
                let there = node.map_or(&unknown, |node| &node.locality);
                tier(own, there, endpoint.zone.as_ref())
            })
        },
        usable: false,
        alive: name.is_none_or(|name| !view.dead.contains(name)),
        cost: if name == Some(&view.node) {
            Some(Duration::ZERO)
        } else {
            name.and_then(|name| view.costs.get(name)).copied()
        },
        chosen: false,
        ejected: ejected.map(SocketAddr::port).collect(),
        open: open.map(|(at, &open)| (at.port(), open)).collect(),
        max_connections: service.balance.max_connections,
        weight: weight(service, name, node, endpoint),
        for_node: (!hints.nodes.is_empty()).then(|| hints.nodes.contains(&view.node)),
        for_zone: (!hints.zones.is_empty())
            .then(|| own_zone.is_some_and(|zone| hints.zones.contains(zone))),
    }
}

/// Namespace and name of the service of the API servers.
const API_SERVER: (&str, &str) = ("default", "kubernetes");

/// The slice that API servers write for themselves names no node, but its endpoints are always
/// hosts. Private addresses repeat from site to site: with two nodes at `address`, it is neither.
fn api_server_node<'a>(view: &'a View, service: &Service, address: IpAddr) -> Option<&'a NodeName> {
    if (&*service.name.namespace, &*service.name.name) != API_SERVER {
        return None;
    }
    let nodes = view.snapshot.nodes.values();
    let mut there = nodes.filter(|node| node.underlay_addresses.contains(&address));
    let only = there.next()?;
    there.next().is_none().then_some(&only.name)
}

fn overlay_address(node: &Node, address: IpAddr) -> IpAddr {
    if !node.underlay_addresses.contains(&address) {
        return address;
    }
    match address {
        IpAddr::V4(_) => node.overlay_v4.into(),
        IpAddr::V6(_) => node.overlay_v6.into(),
    }
}

fn weight(
    service: &Service,
    name: Option<&NodeName>,
    node: Option<&Node>,
    endpoint: &Endpoint,
) -> u16 {
    let place = node.map(|node| &node.locality);
    let matches = |at: &Place| match at {
        Place::Address(address) => *address == endpoint.address,
        Place::Node(wanted) => name == Some(wanted),
        Place::Site(site) => place.is_some_and(|place| place.site.as_ref() == Some(site)),
        Place::Zone(zone) => {
            let nodes = place.and_then(|place| place.zone.as_ref());
            endpoint.zone.as_ref().or(nodes) == Some(zone)
        }
        Place::Region(region) => place.is_some_and(|place| place.region.as_ref() == Some(region)),
    };
    let mut weights = service.balance.weights.iter();
    let found = weights.find(|weight| matches(&weight.place));
    found.map_or(1, |found| found.weight)
}

/// How far what is `there` is from a node that is not there itself. `zone`: who knows better than `there`.
pub(crate) fn tier(own: &Node, there: &Locality, zone: Option<&String>) -> Tier {
    let zone = zone.or(there.zone.as_ref());
    if same(own.locality.site.as_ref(), there.site.as_ref()) {
        Tier::SameSite
    } else if same(own.locality.zone.as_ref(), zone) {
        Tier::SameZone
    } else if same(own.locality.region.as_ref(), there.region.as_ref()) {
        Tier::SameRegion
    } else {
        Tier::Anywhere
    }
}

fn same<T: PartialEq>(one: Option<&T>, other: Option<&T>) -> bool {
    one.is_some() && one == other
}

mod balance;
mod costs;
mod loads;
mod outliers;
mod table;
#[cfg(test)]
mod tests;
