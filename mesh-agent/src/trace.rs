//! What becomes of a flow's first packet: name, service, endpoint, route, policy, path, MTU, each with its verdict. Pure: what
//! this node knows goes in. What only another node knows is called unknown, with the command to run there.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use mesh_api::admin::HopReport;
use mesh_core::{
    policy::{
        Direction, Flow,
        judges::{Judged, Judges},
    },
    services::{self, Frontend, Ranked, View},
    snapshot::{Node, Protocol, Service, ServiceKind, ServiceName, Snapshot},
};
use mesh_wire::id::NodeName;

use crate::policy;

/// A peer as this node sees it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PeerSeen {
    /// `direct`, `relayed` and so on.
    pub state: String,
    /// Why, for machines.
    pub reason: String,
    /// Why, for people.
    pub explanation: String,
    /// The way in use; empty: none.
    pub path: String,
    /// Round trip by it in milliseconds; 0: not measured.
    pub rtt_ms: f64,
    /// Whether packets of full size pass by it.
    pub full_size: bool,
    /// Paths by which only small packets pass.
    pub small_only: Vec<String>,
    /// Milliseconds since something authentic came from it.
    pub heard_ms: Option<u64>,
}

/// What this node knows.
#[derive(Debug)]
pub struct Known<'a> {
    /// The state of the mesh, and what is alive.
    pub view: &'a View,
    /// Every peer that was woken.
    pub peers: &'a BTreeMap<NodeName, PeerSeen>,
    /// Whether policies are enforced on this node at all (`policy`).
    pub enforces: bool,
    /// Counts by the words that hops name.
    pub counts: &'a BTreeMap<&'static str, u64>,
}

/// Where a flow should go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// To this address.
    Address(IpAddr),
    /// To a service, whatever its addresses.
    Service(ServiceName),
    /// To whatever the node's resolver says.
    Name(String),
}

/// The flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// Destination port.
    pub port: u16,
    /// By what.
    pub protocol: Protocol,
}

/// What `text` names: an address, `namespace/name` of a service, a node, or else a name for the resolver.
#[must_use]
pub fn target(snapshot: &Snapshot, text: &str) -> Target {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Target::Address(address);
    }
    if let Some((namespace, name)) = text.split_once('/') {
        return Target::Service(ServiceName {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        });
    }
    let node = snapshot
        .nodes
        .values()
        .find(|node| node.name.as_str() == text);
    match node {
        Some(node) => Target::Address(node.overlay_v4.into()),
        None => Target::Name(text.to_owned()),
    }
}

/// Each hop of a flow from `source` (`None`: this node) to `target`, which is no name any more. It ends behind the first that
/// lets nothing through.
#[must_use]
pub fn trace(
    known: &Known<'_>,
    source: Option<&NodeName>,
    target: &Target,
    asked: Asked,
) -> Vec<HopReport> {
    let view = known.view;
    let own = source.is_none_or(|source| *source == view.node);
    let other = (!own).then(|| {
        // What that node itself measured is not known here.
        View::new(
            Arc::clone(&view.snapshot),
            source.cloned().unwrap_or_else(|| view.node.clone()),
        )
    });
    let view = other.as_ref().unwrap_or(view);
    let mut hops = Hops {
        known,
        own,
        node: view.node.clone(),
        hops: Vec::new(),
    };
    let Some(from) = view.snapshot.nodes.get(&view.node) else {
        hops.add(
            "route",
            Mark::Failed,
            "the state of the mesh does not have this node any more",
        );
        return hops.hops;
    };
    let endpoint = match target {
        Target::Name(name) => {
            hops.add("name", Mark::Failed, &format!("{name} was not resolved"));
            None
        }
        Target::Service(name) => match view.snapshot.services.get(name) {
            Some(service) => by_service(&mut hops, view, service, None, asked),
            None => {
                let text = format!(
                    "there is no service {name}: `meshctl services` lists those of the mesh"
                );
                hops.add("service", Mark::Failed, &text);
                None
            }
        },
        Target::Address(address) => match service_at(&view.snapshot, *address) {
            Some(service) => by_service(&mut hops, view, service, Some(*address), asked),
            None => {
                let text = format!("{address} is no service's: packets go there as they are");
                hops.add("service", Mark::Ok, &text);
                Some(SocketAddr::new(*address, asked.port))
            }
        },
    };
    if let Some(endpoint) = endpoint {
        behind_service(&mut hops, &view.snapshot, from, endpoint, asked);
    }
    hops.hops
}

/// The hops so far.
struct Hops<'a> {
    known: &'a Known<'a>,
    own: bool,
    node: NodeName,
    hops: Vec<HopReport>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
    Ok,
    Degraded,
    Failed,
    Unknown,
}

impl Hops<'_> {
    fn add(&mut self, stage: &str, mark: Mark, text: &str) {
        self.push("there", stage, self.node.clone(), mark, text, "");
    }

    fn push(
        &mut self,
        way: &str,
        stage: &str,
        node: NodeName,
        mark: Mark,
        text: &str,
        counter: &'static str,
    ) {
        let verdict = match mark {
            Mark::Ok => "ok",
            Mark::Degraded => "degraded",
            Mark::Failed => "failed",
            Mark::Unknown => "unknown",
        };
        // What is counted on another node is not known here.
        let here = node == self.known.view.node;
        let counter = if here { counter } else { "" };
        self.hops.push(HopReport {
            way: way.to_owned(),
            stage: stage.to_owned(),
            node: node.to_string(),
            verdict: verdict.to_owned(),
            text: text.to_owned(),
            counter: counter.to_owned(),
            count: self.known.counts.get(counter).copied().unwrap_or_default(),
        });
    }
}

pub(crate) fn service_at(snapshot: &Snapshot, address: IpAddr) -> Option<&Arc<Service>> {
    let has = |service: &&Arc<Service>| {
        let cluster = match &service.kind {
            ServiceKind::ClusterIp(addresses) => addresses.contains(&address),
            ServiceKind::Headless | ServiceKind::ExternalName(_) => false,
        };
        let outside = &service.external;
        cluster || outside.addresses.contains(&address) || outside.load_balancer.contains(&address)
    };
    snapshot.services.values().find(has)
}

/// The service and its endpoints; where the flow goes on, if it does.
fn by_service(
    hops: &mut Hops<'_>,
    view: &View,
    service: &Arc<Service>,
    address: Option<IpAddr>,
    asked: Asked,
) -> Option<SocketAddr> {
    let name = &service.name;
    let port = service
        .ports
        .iter()
        .find(|one| one.port == asked.port && one.protocol == asked.protocol);
    if port.is_none() {
        let ports = service
            .ports
            .iter()
            .map(|one| format!("{}/{}", one.port, word(one.protocol)));
        let ports: Vec<_> = ports.collect();
        let text = format!(
            "service {name} has no port {}/{}: it has {}",
            asked.port,
            word(asked.protocol),
            if ports.is_empty() {
                "none".to_owned()
            } else {
                ports.join(", ")
            }
        );
        hops.push(
            "there",
            "service",
            hops.node.clone(),
            Mark::Failed,
            &text,
            "",
        );
        return None;
    }
    let address = match (&service.kind, address) {
        (_, Some(address)) => Some(address),
        (ServiceKind::ClusterIp(addresses), None) => addresses.first().copied(),
        (ServiceKind::Headless, None) => None,
        (ServiceKind::ExternalName(other), None) => {
            let text = format!("service {name} is an alias of {other}: trace that");
            hops.add("service", Mark::Unknown, &text);
            return None;
        }
    };
    let ranked = services::rank(view, service);
    let chosen = match address {
        Some(address) => {
            let frontend = Frontend {
                address,
                port: asked.port,
                protocol: asked.protocol,
            };
            let mut table = services::table(view);
            let backends = table.remove(&frontend).unwrap_or_default();
            backends.endpoints
        }
        None => {
            let ports = |one: &Ranked<'_>| {
                let found = one
                    .slice
                    .ports
                    .iter()
                    .find(|port| port.protocol == asked.protocol);
                found.map(|port| SocketAddr::new(one.address, port.port))
            };
            ranked
                .iter()
                .filter(|one| one.chosen)
                .filter_map(ports)
                .collect()
        }
    };
    let kind = address.map_or("headless".to_owned(), |address| format!("at {address}"));
    let ready = ranked.iter().filter(|one| one.usable).count();
    let text = format!(
        "service {name}, {kind}: {ready} of {} endpoints are ready",
        ranked.len()
    );
    let Some(&first) = chosen.first() else {
        let text = format!(
            "{text}, and none takes flows from here: they are refused. {}",
            why_none(&ranked)
        );
        hops.push(
            "there",
            "service",
            hops.node.clone(),
            Mark::Failed,
            &text,
            "connect_refused",
        );
        return None;
    };
    hops.push("there", "service", hops.node.clone(), Mark::Ok, &text, "");
    endpoint(hops, &ranked, &chosen, first);
    Some(first)
}

fn why_none(ranked: &[Ranked<'_>]) -> String {
    let Some(first) = ranked.first() else {
        return "No pod or device is behind it: look at its selector, or its EndpointSlices."
            .to_owned();
    };
    if ranked.iter().all(|one| !one.usable) {
        return format!(
            "{} is not ready, nor is any other: its own health check fails.",
            first.address
        );
    }
    "Those that are ready are of another address family, or kept from this node by `internalTrafficPolicy`.".to_owned()
}

fn endpoint(hops: &mut Hops<'_>, ranked: &[Ranked<'_>], chosen: &[SocketAddr], first: SocketAddr) {
    let mut different = chosen.to_vec();
    different.sort();
    different.dedup();
    let of = ranked.iter().find(|one| one.address == first.ip());
    let tier = of.map_or("anywhere", |one| one.tier.as_str());
    let text = format!(
        "{first} ({tier}), one of {} that take flows from here",
        different.len()
    );
    let (mark, text) = match of {
        Some(one) if !one.alive => (
            Mark::Failed,
            format!("{text}: no path to its node is alive"),
        ),
        Some(one) if one.is_ejected() => (
            Mark::Failed,
            format!(
                "{text}: TCP connects to it fail. Nothing listens there, or a firewall of its node is in the way"
            ),
        ),
        Some(one) if one.is_full() => (
            Mark::Degraded,
            format!("{text}: it has as many connections as `maxConnections` says"),
        ),
        _ => (Mark::Ok, text),
    };
    hops.push(
        "there",
        "endpoint",
        hops.node.clone(),
        mark,
        &text,
        "connect_failed",
    );
    for one in ranked
        .iter()
        .filter(|one| one.usable && one.is_ejected() && one.address != first.ip())
    {
        let text = format!(
            "{} is left alone for a while: TCP connects to it fail",
            one.address
        );
        hops.push(
            "there",
            "endpoint",
            hops.node.clone(),
            Mark::Degraded,
            &text,
            "connect_failed",
        );
    }
}

/// Route, policy of both ends, path, MTU, and the way back.
fn behind_service(
    hops: &mut Hops<'_>,
    snapshot: &Arc<Snapshot>,
    from: &Node,
    endpoint: SocketAddr,
    asked: Asked,
) {
    let Some(to) = owner(snapshot, endpoint.ip()) else {
        let overlay = IpNet::from(snapshot.mesh.overlay_v4).contains(&endpoint.ip());
        if overlay {
            let text = format!("no node of the mesh has {}: dropped", endpoint.ip());
            hops.push(
                "there",
                "route",
                hops.node.clone(),
                Mark::Failed,
                &text,
                "no_route",
            );
        } else {
            let text = format!(
                "{} is behind no node of the mesh: the kernel's own routes lead there, outside the tunnel",
                endpoint.ip()
            );
            hops.add("route", Mark::Unknown, &text);
        }
        return;
    };
    let local = to.name == from.name;
    let text = match local {
        true => format!("{} is on this node", endpoint.ip()),
        false => format!("{} is at node {}", endpoint.ip(), to.name),
    };
    hops.push(
        "there",
        "route",
        from.name.clone(),
        Mark::Ok,
        &text,
        "no_route",
    );
    let source: IpAddr = match endpoint.ip() {
        IpAddr::V4(_) => from.overlay_v4.into(),
        IpAddr::V6(_) => from.overlay_v6.into(),
    };
    let flow = Flow {
        from: source,
        to: endpoint.ip(),
        protocol: Some(asked.protocol.into()),
        port: endpoint.port(),
    };
    for (node, direction) in [(from, Direction::Out), (to, Direction::In)] {
        if !judge(hops, snapshot, node, &flow, direction) {
            return;
        }
    }
    if local {
        return;
    }
    if !hops.own {
        let text = format!(
            "only {0} knows its path to {1}: run `meshctl trace {1}:{2}` there",
            from.name,
            to.name,
            endpoint.port()
        );
        hops.push("there", "path", from.name.clone(), Mark::Unknown, &text, "");
        return;
    }
    path(hops, snapshot, to);
    back(hops, snapshot, from, to);
}

fn judge(
    hops: &mut Hops<'_>,
    snapshot: &Arc<Snapshot>,
    node: &Node,
    flow: &Flow,
    direction: Direction,
) -> bool {
    let mut judges = Judges::new(Arc::clone(snapshot), policy::LIMITS);
    let Judged {
        verdict,
        enforced,
        by,
        ..
    } = judges.judge(&node.name, flow, direction);
    let here = node.name == hops.known.view.node;
    let way = direction.as_str();
    let as_from = format!("{} to {}:{}, {way}", flow.from, flow.to, flow.port);
    let (mark, text, counter) = if !enforced {
        (Mark::Ok, "no policy holds here".to_owned(), "")
    } else if here && !hops.known.enforces {
        (
            Mark::Degraded,
            format!("`policy = false` on this node: {by} is not enforced"),
            "",
        )
    } else if !verdict.allowed {
        (Mark::Failed, format!("denied by {by}: {as_from}"), "denied")
    } else if !verdict.unaudited {
        (
            Mark::Degraded,
            format!("passes, but {by} would deny it once it is no audit any more: {as_from}"),
            "audited",
        )
    } else {
        (Mark::Ok, format!("allowed by {by}: {as_from}"), "passed")
    };
    hops.push("there", "policy", node.name.clone(), mark, &text, counter);
    mark != Mark::Failed
}

fn path(hops: &mut Hops<'_>, snapshot: &Snapshot, to: &Node) {
    let known = hops.known;
    let node = known.view.node.clone();
    let mtu = snapshot.mesh.mtu_bytes;
    let Some(peer) = known.peers.get(&to.name) else {
        let text = format!(
            "nothing was sent to {} since this agent started: the first packet wakes it",
            to.name
        );
        hops.push("there", "path", node, Mark::Ok, &text, "held_too_long");
        return;
    };
    let rtt = match peer.rtt_ms > 0.0 {
        true => format!(", {:.1} ms", peer.rtt_ms),
        false => String::new(),
    };
    let (mark, text) = match peer.state.as_str() {
        "direct" => (
            Mark::Ok,
            format!("{} is reached directly by {}{rtt}", to.name, peer.path),
        ),
        "relayed" => (
            Mark::Ok,
            format!(
                "{} is reached by {}{rtt}. {}",
                to.name, peer.path, peer.explanation
            ),
        ),
        "idle" => (
            Mark::Ok,
            format!("{} rests: the next packet wakes it", to.name),
        ),
        "unreachable" => (
            Mark::Failed,
            format!(
                "{} is unreachable ({}): {}",
                to.name, peer.reason, peer.explanation
            ),
        ),
        other => (
            Mark::Degraded,
            format!("{} is {other}: {}", to.name, peer.explanation),
        ),
    };
    let counter = if mark == Mark::Failed {
        "held_too_long"
    } else {
        "send_failed"
    };
    hops.push("there", "path", node.clone(), mark, &text, counter);
    if peer.path.is_empty() {
        return;
    }
    let (mark, text) = if !peer.small_only.is_empty() {
        let by = peer.small_only.join(", ");
        (
            Mark::Degraded,
            format!(
                "only small packets pass by {by}: an MTU hole, so another path carries the traffic"
            ),
        )
    } else if peer.full_size || peer.path.starts_with("relay") {
        (Mark::Ok, format!("packets of {mtu} bytes pass"))
    } else {
        (
            Mark::Unknown,
            format!("not proven yet that packets of {mtu} bytes pass"),
        )
    };
    hops.push("there", "mtu", node, mark, &text, "");
}

fn back(hops: &mut Hops<'_>, snapshot: &Snapshot, from: &Node, to: &Node) {
    let heard = hops
        .known
        .peers
        .get(&to.name)
        .and_then(|peer| peer.heard_ms);
    let (mark, heard) = match heard {
        Some(ms) => (Mark::Ok, format!("last heard of {} s ago", ms / 1000)),
        None => (Mark::Unknown, "nothing came from it yet".to_owned()),
    };
    let text = format!(
        "{heard}; which way its answers take, and whether it has generation {}, only it knows: run `meshctl trace {}:PORT` there",
        snapshot.generation.0, from.name
    );
    hops.push("back", "path", to.name.clone(), mark, &text, "");
}

/// The node with this address, or behind which it is: the longest prefix counts.
pub(crate) fn owner(snapshot: &Snapshot, address: IpAddr) -> Option<&Node> {
    let of = |node: &Node| {
        let exact = node
            .own_addresses()
            .any(|own| own == address)
            .then_some(u8::MAX);
        let behind = node.allowed_prefixes().filter(|net| net.contains(&address));
        exact.or_else(|| behind.map(|net| net.prefix_len()).max())
    };
    let nodes = snapshot.nodes.values();
    let best = nodes
        .filter_map(|node| Some((of(node)?, node)))
        .max_by_key(|(length, _)| *length);
    best.map(|(_, node)| node)
}

fn word(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
    }
}

#[cfg(test)]
mod tests;
