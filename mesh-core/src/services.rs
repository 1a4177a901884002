//! Which endpoints of a service new flows go to, as one node sees it: the nearest tier that has
//! a usable endpoint behind a live path.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_wire::id::NodeName;

use crate::snapshot::{
    Endpoint, EndpointPort, EndpointSlice, Locality, Node, Protocol, Service, ServiceKind,
    ServicePort, Snapshot,
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
    /// Whether new flows from this node go to it now: it is usable, alive, and no endpoint of
    /// its address family is so in a nearer tier. When nothing is alive, liveness does not
    /// count: the next packet is what may bring a path back, and a refusal would not.
    pub chosen: bool,
}

/// Where clients send: an address, port and protocol of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frontend {
    /// A ClusterIP.
    pub address: IpAddr,
    /// The service's port.
    pub port: u16,
    /// The service port's protocol.
    pub protocol: Protocol,
}

/// Every endpoint of a service, nearest first, then by address.
#[must_use]
pub fn rank<'a>(view: &'a View, service: &Service) -> Vec<Ranked<'a>> {
    let own = view.snapshot.nodes.get(&view.node);
    let mut ranked: Vec<_> = view
        .snapshot
        .endpoints(&service.name)
        .map(|(slice, endpoint)| judge(view, own, service, slice, endpoint))
        .collect();
    drain_when_nothing_is_ready(&mut ranked);
    choose(&mut ranked);
    ranked.sort_by_key(|one| (one.tier, one.address));
    ranked
}

/// What every frontend leads to. A frontend without endpoints is there with an empty list, so
/// that its clients are refused at once.
#[must_use]
pub fn table(view: &View) -> BTreeMap<Frontend, Vec<SocketAddr>> {
    let services = view.snapshot.services.values();
    services
        .flat_map(|service| frontends(view, service))
        .collect()
}

fn frontends(view: &View, service: &Service) -> Vec<(Frontend, Vec<SocketAddr>)> {
    let ServiceKind::ClusterIp(addresses) = &service.kind else {
        return Vec::new();
    };
    let ranked = rank(view, service);
    let mut frontends = Vec::new();
    for &address in addresses {
        for port in &service.ports {
            let frontend = Frontend {
                address,
                port: port.port,
                protocol: port.protocol,
            };
            let mut targets: Vec<_> = ranked
                .iter()
                .filter(|one| one.chosen && one.address.is_ipv4() == address.is_ipv4())
                .filter_map(|one| {
                    let target = one.slice.ports.iter().find(|target| serves(target, port))?;
                    Some(SocketAddr::new(one.address, target.port))
                })
                .collect();
            targets.sort_unstable();
            targets.dedup(); // Several controllers may write the same endpoint into their slices.
            frontends.push((frontend, targets));
        }
    }
    frontends
}

fn serves(target: &EndpointPort, port: &ServicePort) -> bool {
    target.name == port.name && target.protocol == port.protocol
}

fn judge<'a>(
    view: &View,
    own: Option<&Node>,
    service: &Service,
    slice: &'a EndpointSlice,
    endpoint: &'a Endpoint,
) -> Ranked<'a> {
    let node = endpoint
        .node
        .as_ref()
        .and_then(|name| view.snapshot.nodes.get(name));
    Ranked {
        slice,
        endpoint,
        address: node.map_or(endpoint.address, |node| {
            overlay_address(node, endpoint.address)
        }),
        tier: own.map_or(Tier::Anywhere, |own| tier(own, node, endpoint)),
        usable: endpoint.ready || service.publish_not_ready,
        alive: endpoint
            .node
            .as_ref()
            .is_none_or(|name| !view.dead.contains(name)),
        chosen: false,
    }
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

fn tier(own: &Node, node: Option<&Node>, endpoint: &Endpoint) -> Tier {
    if node.is_some_and(|node| node.name == own.name) {
        return Tier::SameNode;
    }
    let unknown = Locality::default();
    let there = node.map_or(&unknown, |node| &node.locality);
    let zone = endpoint.zone.as_ref().or(there.zone.as_ref());
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

/// Terminating endpoints serve until they are gone when nothing else is ready (KEP-1669).
fn drain_when_nothing_is_ready(ranked: &mut [Ranked<'_>]) {
    if ranked.iter().any(|one| one.usable) {
        return;
    }
    for one in ranked {
        one.usable = one.endpoint.serving && one.endpoint.terminating;
    }
}

fn choose(ranked: &mut [Ranked<'_>]) {
    for v4 in [true, false] {
        let usable = |one: &Ranked<'_>| one.usable && one.address.is_ipv4() == v4;
        let any_alive = ranked.iter().any(|one| usable(one) && one.alive);
        let candidate = |one: &Ranked<'_>| usable(one) && (one.alive || !any_alive);
        let nearest = ranked
            .iter()
            .filter(|one| candidate(one))
            .map(|one| one.tier)
            .min();
        for one in ranked.iter_mut() {
            one.chosen |= candidate(one) && Some(one.tier) == nearest;
        }
    }
}

#[cfg(test)]
mod tests;
