//! From the manifests and the registry to what the mesh is. Pure: the same in, the same out.
//!
//! No two nodes have the same address or overlapping prefixes. Who came first keeps what it has:
//! registered addresses come before manifests, manifests in the order of file and document.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use ipnet::IpNet;
use mesh_api::{
    control::{Resource, ResourceKey},
    convert::{
        external_peer_resource, key, mesh_resource, node_record_bytes, node_resource,
        service_resource,
    },
};
use mesh_core::offline::limit::DAY;
use mesh_core::{
    policy::resources::ObjectName,
    snapshot::{
        Balance, ExternalPeer, Locality, Mapping, MeshSettings, Node, Relay, Service, ServiceKind,
        ServiceName,
    },
};
use mesh_wire::id::{MeshId, NodeId, NodeName, RelayName};

use crate::{
    history::Wanted,
    manifests::{Loaded, NodeFacts, Object, ObjectId},
    store::{Nodes, Registered},
};

/// What the mesh is.
#[derive(Debug, Clone, PartialEq)]
pub struct Desired {
    /// What holds for the whole mesh.
    pub mesh: MeshSettings,
    /// Nodes that joined.
    pub nodes: BTreeMap<NodeName, Node>,
    /// Nodes that were taken out and whose addresses rest, and when that was, as Unix seconds.
    pub removed: BTreeMap<NodeName, i64>,
    /// Everything, as resources.
    pub wanted: BTreeMap<ResourceKey, Wanted>,
    /// Who has which prefix.
    pub claims: Claims,
    /// Overlay addresses that the manifests give to nodes, whether they joined or not.
    pub pins: BTreeMap<NodeName, Ipv4Addr>,
    /// Nodes that may join: all (`None`), or those that somebody approved.
    pub approved: Option<BTreeSet<NodeName>>,
    /// What was left out and why, a line each.
    pub problems: Vec<String>,
    /// Objects of which something was left out: the first reason, without the object's name.
    pub rejected: BTreeMap<ObjectId, Rejected>,
}

/// Why the mesh does not act on an object as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// The field, and what is wrong with it.
    pub text: String,
}

/// What the mesh `id` is, by these manifests (in the order in which they count) and these nodes.
#[must_use]
pub fn desired(objects: &[&Loaded], nodes: &Nodes, id: MeshId, trust_domain: &str) -> Desired {
    let mesh = MeshSettings::with_defaults(id, trust_domain);
    let removed = nodes
        .iter()
        .filter_map(|(name, node)| Some((name.clone(), node.removed_unix_s?)));
    let mut builder = Builder {
        desired: Desired {
            mesh,
            nodes: BTreeMap::new(),
            removed: removed.collect(),
            wanted: BTreeMap::new(),
            claims: Claims::default(),
            pins: BTreeMap::new(),
            approved: None,
            problems: Vec::new(),
            rejected: BTreeMap::new(),
        },
        keys: in_mesh(nodes).map(|(_, node)| node.id).collect(),
        cluster_ips: BTreeMap::new(),
        acting: BTreeMap::new(),
        balances: BTreeMap::new(),
    };
    builder.settings(objects);
    builder.balances(objects);
    builder.register(nodes);
    for loaded in objects {
        builder.object(loaded);
    }
    builder.selected(objects);
    builder.finish()
}

fn in_mesh(nodes: &Nodes) -> impl Iterator<Item = (&NodeName, &Registered)> {
    nodes.iter().filter(|(_, node)| node.is_in())
}

/// Which prefixes are whose. Prefixes of different owners never overlap.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Claims {
    /// By their first address. None contains another.
    prefixes: BTreeMap<IpAddr, (IpNet, String)>,
}

impl Claims {
    /// Gives `prefix` to `owner`.
    ///
    /// # Errors
    ///
    /// The prefix of somebody else that overlaps it, and whose that is.
    pub fn claim(&mut self, prefix: IpNet, owner: &str) -> Result<(), (IpNet, String)> {
        let prefix = prefix.trunc();
        if let Some(taken) = self.conflict(prefix, owner) {
            return Err(taken);
        }
        if self.around(prefix).is_some() {
            // The owner has it already, in a larger one.
            return Ok(());
        }
        let inside: Vec<_> = self.inside(prefix).map(|(&first, _)| first).collect();
        for first in inside {
            self.prefixes.remove(&first);
        }
        self.prefixes
            .insert(prefix.network(), (prefix, owner.to_owned()));
        Ok(())
    }

    /// Somebody else's prefix that overlaps `prefix`, and whose that is.
    #[must_use]
    pub fn conflict(&self, prefix: IpNet, owner: &str) -> Option<(IpNet, String)> {
        let prefix = prefix.trunc();
        let inside = self.inside(prefix).map(|(_, claim)| claim);
        let mut overlapping = self.around(prefix).into_iter().chain(inside);
        let foreign = overlapping.find(|(_, other)| other != owner);
        foreign.cloned()
    }

    fn release(&mut self, prefix: IpNet) {
        self.prefixes.remove(&prefix.network());
    }

    /// The one that contains `prefix`: since none contains another, it is the last that begins
    /// at or before it, or none.
    fn around(&self, prefix: IpNet) -> Option<&(IpNet, String)> {
        let (_, claim) = self.prefixes.range(..=prefix.network()).next_back()?;
        claim.0.contains(&prefix).then_some(claim)
    }

    fn inside(&self, prefix: IpNet) -> impl Iterator<Item = (&IpAddr, &(IpNet, String))> {
        self.prefixes.range(prefix.network()..=prefix.broadcast())
    }
}

struct Builder {
    desired: Desired,
    /// WireGuard keys in use.
    keys: BTreeSet<NodeId>,
    cluster_ips: BTreeMap<IpAddr, ServiceName>,
    /// Nodes that act as a relay.
    acting: BTreeMap<NodeName, RelayName>,
    balances: BTreeMap<ServiceName, Balance>,
}

impl Builder {
    fn settings(&mut self, objects: &[&Loaded]) {
        let configs = objects.iter().filter_map(|loaded| loaded.config());
        for config in configs {
            let mesh = &mut self.desired.mesh;
            mesh.overlay_v4 = config.overlay_v4.unwrap_or(mesh.overlay_v4).trunc();
            mesh.mtu_bytes = config.mtu_bytes.unwrap_or(mesh.mtu_bytes);
            mesh.default_action = config.default_action.unwrap_or(mesh.default_action);
            if let Some(days) = config.offline_limit_days {
                mesh.offline_limit = (days > 0).then(|| DAY * days);
            }
            if let Some(domain) = &config.cluster_domain {
                mesh.cluster_domain.clone_from(domain);
            }
            if let Some(domain) = &config.node_domain {
                mesh.node_domain.clone_from(domain);
            }
            self.desired.approved = config.manual_approval.then(BTreeSet::new);
        }
    }

    fn balances(&mut self, objects: &[&Loaded]) {
        let services: BTreeSet<&ServiceName> = objects
            .iter()
            .filter_map(|loaded| loaded.service())
            .map(|service| &service.name)
            .collect();
        for loaded in objects {
            if let Object::Balance(service, balance) = &loaded.object {
                if services.contains(service) {
                    self.balances.insert(service.clone(), balance.clone());
                } else {
                    let text = format!("there is no Service {service}; this has no effect");
                    self.problem(loaded, "metadata.name", &text);
                }
            }
        }
    }

    fn register(&mut self, nodes: &Nodes) {
        for (name, registered) in in_mesh(nodes) {
            let Registered { id, overlay_v4, .. } = *registered;
            let node = Node::new(&self.desired.mesh.id, name.clone(), id, overlay_v4);
            for address in [IpAddr::V4(overlay_v4), IpAddr::V6(node.overlay_v6)] {
                let claimed = self.desired.claims.claim(address.into(), &owner(name));
                if let Err((taken, by)) = claimed {
                    // The registry gives each address once; only a damaged one gets here.
                    let problem = format!("node {name}: {address} overlaps {taken} of {by}");
                    self.desired.problems.push(problem);
                }
            }
            let overlay = self.desired.mesh.overlay_v4;
            if !overlay.contains(&registered.overlay_v4) {
                self.desired.problems.push(format!(
                    "node {name}: its address {} is outside spec.overlayIPv4CIDR {overlay}; it keeps it",
                    registered.overlay_v4
                ));
            }
            self.desired.nodes.insert(name.clone(), node);
        }
    }

    fn object(&mut self, loaded: &Loaded) {
        match &loaded.object {
            Object::Config(_)
            | Object::Balance(..)
            | Object::Service(None)
            | Object::Pod(_)
            | Object::Namespace(..) => {}
            Object::MeshPolicy(_)
            | Object::NetworkPolicy(_)
            | Object::Slice(..)
            | Object::Community(..) => self.want_own(loaded),
            Object::Relay(relay) => self.relay(loaded, relay),
            Object::Service(Some(service)) => self.service(loaded, service),
            Object::Route(gateways, subnets) => self.route(loaded, gateways, subnets),
            Object::Node(facts) => {
                self.prefixes(loaded, &facts.name, &facts.prefixes, "spec.podCIDRs");
                if let Some(node) = self.desired.nodes.get_mut(&facts.name) {
                    node.underlay_addresses
                        .clone_from(&facts.underlay_addresses);
                    let granted = |net: &&IpNet| node.prefixes.contains(&net.trunc());
                    node.pod_prefixes = facts
                        .prefixes
                        .iter()
                        .filter(granted)
                        .map(IpNet::trunc)
                        .collect();
                    let said = std::mem::take(&mut node.locality);
                    node.locality = or(said, &facts.locality);
                }
            }
            Object::MeshNode(facts) => {
                if let Some(approved) = self.desired.approved.as_mut().filter(|_| facts.approved) {
                    approved.insert(facts.name.clone());
                }
                self.pin(loaded, facts);
                self.prefixes(loaded, &facts.name, &facts.prefixes, "spec.prefixes");
                if let Some(node) = self.desired.nodes.get_mut(&facts.name) {
                    node.static_candidates.clone_from(&facts.static_candidates);
                    // What the operator says comes before Kubernetes' labels.
                    node.locality = or(facts.locality.clone(), &node.locality);
                }
            }
            Object::ExternalPeer(peer) => self.external_peer(loaded, peer),
        }
    }

    /// A node opens the ports of one relay only.
    fn relay(&mut self, loaded: &Loaded, relay: &Relay) {
        if let Some(node) = &relay.node {
            if !self.desired.nodes.contains_key(node) {
                let text = format!("no node {node} has joined; nobody acts as this relay");
                return self.problem(loaded, "spec.node", &text);
            }
            if let Some(first) = self.acting.get(node) {
                let text =
                    format!("node {node} acts as relay {first} already; this one is left out");
                return self.problem(loaded, "spec.node", &text);
            }
            self.acting.insert(node.clone(), relay.name.clone());
        }
        self.want_own(loaded);
    }

    fn service(&mut self, loaded: &Loaded, service: &Service) {
        let addresses = match &service.kind {
            ServiceKind::ClusterIp(addresses) => addresses.as_slice(),
            ServiceKind::Headless | ServiceKind::ExternalName(_) => &[],
        };
        for address in addresses {
            if let Some(other) = self.cluster_ips.get(address) {
                let text =
                    format!("{address} is the address of {other} too; this service is left out");
                return self.problem(loaded, "spec.clusterIP", &text);
            }
        }
        for address in addresses {
            self.cluster_ips.insert(*address, service.name.clone());
        }
        // What the mesh's own manifest says replaces the annotations as a whole.
        match self.balances.get(&service.name) {
            None => self.want_own(loaded),
            Some(said) => self.want(service_resource(&Service {
                balance: said.clone(),
                ..service.clone()
            })),
        }
    }

    /// Pods and namespaces, where there are policies: nobody else asks for them. A pod's address is
    /// nobody else's, or policies about one would be about the other.
    fn selected(&mut self, objects: &[&Loaded]) {
        if !objects.iter().any(|loaded| loaded.is_policy()) {
            return;
        }
        let mut taken: BTreeMap<IpAddr, &ObjectName> = BTreeMap::new();
        for loaded in objects {
            if matches!(loaded.object, Object::Namespace(..)) {
                self.want_own(loaded);
            }
            let Object::Pod(Some(pod)) = &loaded.object else {
                continue;
            };
            let addresses = pod.addresses.iter().filter(|_| !pod.host_network);
            let owner = pod.node.as_ref().map(owner).unwrap_or_default();
            let foreign = addresses.clone().find_map(|&address| {
                let claimed = self.desired.claims.conflict(address.into(), &owner);
                let claimed = claimed.map(|(prefix, by)| format!("{prefix} of {by}"));
                let other = taken.get(&address).map(|other| format!("pod {other}"));
                Some((address, claimed.or(other)?))
            });
            if let Some((address, by)) = foreign {
                let text = format!("{address} is in {by}; this pod is left out");
                self.problem(loaded, "status.podIPs", &text);
                continue;
            }
            taken.extend(addresses.map(|&address| (address, &pod.name)));
            self.want_own(loaded);
        }
    }

    /// A pin never takes an address that another node has, even if that one is about to move.
    fn pin(&mut self, loaded: &Loaded, facts: &NodeFacts) {
        let Some(address) = facts.overlay_v4 else {
            return;
        };
        let overlay = self.desired.mesh.overlay_v4;
        if !overlay.contains(&address) {
            let text = format!("{address} is not in the mesh's {overlay}; left out");
            return self.problem(loaded, "spec.overlayIPv4", &text);
        }
        let claims = &mut self.desired.claims;
        let claimed = claims.claim(IpAddr::V4(address).into(), &owner(&facts.name));
        if let Err((taken, by)) = claimed {
            let text = format!("{address} overlaps {taken} of {by}; left out");
            return self.problem(loaded, "spec.overlayIPv4", &text);
        }
        self.desired.pins.insert(facts.name.clone(), address);
        if let Some(node) = self.desired.nodes.get_mut(&facts.name)
            && node.overlay_v4 != address
        {
            let before = std::mem::replace(&mut node.overlay_v4, address);
            self.desired.claims.release(IpAddr::V4(before).into());
        }
    }

    /// Claims also those of nodes that have not joined yet: that they do must not take anything
    /// away from others.
    fn prefixes(&mut self, loaded: &Loaded, name: &NodeName, prefixes: &[IpNet], field: &str) {
        for prefix in prefixes.iter().map(IpNet::trunc) {
            match self.desired.claims.claim(prefix, &owner(name)) {
                Ok(()) => {
                    let node = self.desired.nodes.get_mut(name);
                    if let Some(node) = node.filter(|node| !node.prefixes.contains(&prefix)) {
                        node.prefixes.push(prefix);
                    }
                }
                Err((taken, by)) => {
                    let text = format!("{prefix} overlaps {taken} of {by}; left out");
                    self.problem(loaded, field, &text);
                }
            }
        }
    }

    /// Each gateway of a LAN has the whole of it: whoever sends there chooses one.
    fn route(&mut self, loaded: &Loaded, gateways: &[NodeName], subnets: &[Mapping]) {
        let names: Vec<_> = gateways.iter().map(NodeName::as_str).collect();
        let owner = match gateways {
            [only] => owner(only),
            _ => format!("nodes {}", names.join(", ")),
        };
        for (index, subnet) in subnets.iter().enumerate() {
            let field = format!("spec.subnets[{index}]");
            let known = |name: &NodeName| self.desired.nodes.get(name);
            let clash = gateways.iter().filter_map(known);
            if let Some(text) = clash
                .filter_map(|node| called_otherwise(node, subnet))
                .next()
            {
                self.problem(loaded, &field, &text);
                continue;
            }
            if let Err((taken, by)) = self.desired.claims.claim(subnet.seen_as, &owner) {
                let text = format!("{} overlaps {taken} of {by}; left out", subnet.seen_as);
                self.problem(loaded, &field, &text);
                continue;
            }
            for gateway in gateways {
                let Some(node) = self.desired.nodes.get_mut(gateway) else {
                    continue;
                };
                if !node.prefixes.contains(&subnet.seen_as) {
                    node.prefixes.push(subnet.seen_as);
                }
                if subnet.lan != subnet.seen_as && !node.mapped.contains(subnet) {
                    node.mapped.push(*subnet);
                }
            }
        }
    }

    fn external_peer(&mut self, loaded: &Loaded, peer: &ExternalPeer) {
        if self.keys.contains(&peer.id) {
            let text = format!(
                "{} is the key of another node or peer; this peer is left out",
                peer.id
            );
            return self.problem(loaded, "spec.publicKey", &text);
        }
        let owner = format!("external peer {}", peer.name);
        for &prefix in &peer.prefixes {
            if let Some((taken, by)) = self.desired.claims.conflict(prefix, &owner) {
                let text = format!("{prefix} overlaps {taken} of {by}; this peer is left out");
                return self.problem(loaded, "spec.addresses", &text);
            }
        }
        self.keys.insert(peer.id);
        let mut peer = peer.clone();
        for prefix in &mut peer.prefixes {
            *prefix = prefix.trunc();
            // Looked at just above.
            self.desired.claims.claim(*prefix, &owner).ok();
        }
        if let Some(gateway) = self.desired.nodes.get_mut(&peer.gateway) {
            gateway.prefixes.extend(&peer.prefixes);
        }
        self.want(external_peer_resource(&peer));
    }

    fn finish(mut self) -> Desired {
        self.want(mesh_resource(&self.desired.mesh));
        let records = self.desired.nodes.values().map(node_record_bytes);
        for record in records.collect::<Vec<_>>() {
            let unsigned = node_resource(record.clone(), Vec::new());
            if let Ok(key) = key(&unsigned) {
                self.desired.wanted.insert(key, Wanted::Node(record));
            }
        }
        self.desired
    }

    fn want(&mut self, resource: Resource) {
        // What was just made from checked parts has a key.
        if let Ok(key) = key(&resource) {
            let resource = Wanted::Resource(Arc::new(resource));
            self.desired.wanted.insert(key, resource);
        }
    }

    /// What `loaded` says by itself.
    fn want_own(&mut self, loaded: &Loaded) {
        if let Some((key, resource)) = &loaded.resource {
            let resource = Wanted::Resource(Arc::clone(resource));
            self.desired.wanted.insert(key.clone(), resource);
        }
    }

    fn problem(&mut self, loaded: &Loaded, field: &str, text: &str) {
        let text = format!("{field}: {text}");
        let problem = format!("{}: {text}", loaded.place());
        self.desired.problems.push(problem);
        let rejections = &mut self.desired.rejected;
        let rejected = Rejected { text };
        rejections.entry(loaded.id.clone()).or_insert(rejected);
    }
}

/// Why a node cannot have a part of its LAN by this name: it has it by another.
fn called_otherwise(node: &Node, subnet: &Mapping) -> Option<String> {
    let overlaps = |net: &IpNet| net.contains(&subnet.lan) || subnet.lan.contains(net);
    let mut mapped = node.mapped.iter().filter(|known| *known != subnet);
    if let Some(known) = mapped.find(|known| overlaps(&known.lan)) {
        let Mapping { lan, seen_as } = known;
        let text = format!(
            "node {} has {lan} as {seen_as} already; left out",
            node.name
        );
        return Some(text);
    }
    let mut plain = node.prefixes.iter();
    let plain = plain.find(|net| subnet.lan != subnet.seen_as && overlaps(net))?;
    Some(format!(
        "the mesh knows {plain} of node {} as it is; left out",
        node.name
    ))
}

fn owner(name: &NodeName) -> String {
    format!("node {name}")
}

/// `first`, and what it does not say from `second`.
fn or(first: Locality, second: &Locality) -> Locality {
    Locality {
        site: first.site.or_else(|| second.site.clone()),
        zone: first.zone.or_else(|| second.zone.clone()),
        region: first.region.or_else(|| second.region.clone()),
    }
}

#[cfg(test)]
mod tests;
