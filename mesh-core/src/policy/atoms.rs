//! What rules tell addresses apart by.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use mesh_wire::id::NodeName;

use super::resources::{
    IpProtocol, LabelSelector, Labels, NAMESPACE_NAME_LABEL, NetworkPeer, Party, Pod, Resources,
};
use crate::snapshot::{ExternalPeer, Node, Snapshot};

/// Something that holds for an address or does not.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Atom {
    /// It is one of this node's own.
    OwnNode,
    /// The party has it.
    Party(Party),
    /// A pod with these labels has it, in this namespace or one with such labels.
    Pods {
        pods: LabelSelector,
        namespaces: Namespaces,
    },
    /// It is in the first, and in none of the others.
    Block(IpNet, Vec<IpNet>),
    /// A pod has it that calls this port so.
    Port(IpProtocol, String, u16),
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Namespaces {
    Named(String),
    Labelled(LabelSelector),
}

impl Atom {
    /// What a peer of a policy in `namespace` must be.
    pub(super) fn peer(peer: &NetworkPeer, namespace: &str) -> Self {
        match peer {
            NetworkPeer::Pods { pods, namespaces } => Self::Pods {
                pods: pods.clone(),
                namespaces: match namespaces {
                    None => Namespaces::Named(namespace.to_owned()),
                    Some(selector) => Namespaces::Labelled(selector.clone()),
                },
            },
            NetworkPeer::Block { cidr, except } => {
                Self::Block(cidr.trunc(), except.iter().map(IpNet::trunc).collect())
            }
        }
    }

    /// Prefixes at whose borders it may begin or cease to hold.
    pub(super) fn borders(&self) -> Vec<IpNet> {
        match self {
            Self::Block(cidr, except) => std::iter::once(cidr).chain(except).copied().collect(),
            Self::Party(party) => party.cidrs.iter().map(IpNet::trunc).collect(),
            Self::OwnNode | Self::Pods { .. } | Self::Port(..) => Vec::new(),
        }
    }

    /// Whether it holds for all of `prefix`, which `owner` has.
    pub(super) fn holds(&self, owner: &Owner<'_>, prefix: &IpNet, world: &World<'_>) -> bool {
        match self {
            Self::OwnNode => matches!(owner, Owner::Node(node) if node.name == *world.node),
            Self::Party(party) => party_has(party, owner, prefix, world),
            Self::Pods { pods, namespaces } => owner.pod().is_some_and(|pod| {
                pods.matches(&pod.labels)
                    && match namespaces {
                        Namespaces::Named(name) => pod.name.namespace == *name,
                        Namespaces::Labelled(selector) => world.namespace_is(pod, selector),
                    }
            }),
            Self::Block(cidr, except) => {
                cidr.contains(prefix) && !except.iter().any(|out| out.contains(prefix))
            }
            Self::Port(protocol, name, number) => owner.pod().is_some_and(|pod| {
                let mut ports = pod.ports.iter();
                ports.any(|port| {
                    (port.protocol, &port.name, port.port) == (*protocol, name, *number)
                })
            }),
        }
    }
}

fn party_has(party: &Party, owner: &Owner<'_>, prefix: &IpNet, world: &World<'_>) -> bool {
    let Party {
        nodes,
        sites,
        namespaces,
        namespace_selector,
        service_accounts,
        pod_selector,
        cidrs,
    } = party;
    let by_node = nodes.is_empty() || owner.names(world).any(|name| nodes.contains(name));
    let site = || {
        owner
            .node(world)
            .and_then(|node| node.locality.site.as_ref())
    };
    let by_site = sites.is_empty() || site().is_some_and(|site| sites.contains(site));
    let of_pod = |said: bool, holds: &dyn Fn(&Pod) -> bool| !said || owner.pod().is_some_and(holds);
    by_node
        && by_site
        && of_pod(!namespaces.is_empty(), &|pod| {
            namespaces.contains(&pod.name.namespace)
        })
        && of_pod(namespace_selector.is_some(), &|pod| {
            let selector = namespace_selector.as_ref();
            selector.is_some_and(|one| world.namespace_is(pod, one))
        })
        && of_pod(!service_accounts.is_empty(), &|pod| {
            service_accounts.iter().any(|account| {
                account.namespace == pod.name.namespace && account.name == pod.service_account
            })
        })
        && of_pod(pod_selector.is_some(), &|pod| {
            pod_selector
                .as_ref()
                .is_some_and(|one| one.matches(&pod.labels))
        })
        && (cidrs.is_empty() || cidrs.iter().any(|cidr| cidr.contains(prefix)))
}

/// Who has a prefix.
#[derive(Debug, Clone, Copy)]
pub(super) enum Owner<'a> {
    /// Nobody in the mesh.
    Unknown,
    /// It is behind this node.
    Behind(&'a Node),
    /// A plain WireGuard device.
    External(&'a ExternalPeer),
    /// The node itself.
    Node(&'a Node),
    /// A pod.
    Pod(&'a Pod),
}

impl<'a> Owner<'a> {
    pub(super) fn pod(&self) -> Option<&'a Pod> {
        match *self {
            Self::Pod(pod) => Some(pod),
            Self::Unknown | Self::Behind(_) | Self::External(_) | Self::Node(_) => None,
        }
    }

    fn node(&self, world: &World<'a>) -> Option<&'a Node> {
        let nodes = &world.snapshot.nodes;
        match *self {
            Self::Unknown => None,
            Self::Behind(node) | Self::Node(node) => Some(node),
            Self::External(peer) => nodes.get(&peer.gateway),
            Self::Pod(pod) => nodes.get(pod.node.as_ref()?),
        }
    }

    /// As what policies may name it.
    fn names(&self, world: &World<'a>) -> impl Iterator<Item = &'a NodeName> {
        let own = match *self {
            Self::External(peer) => Some(&peer.name),
            Self::Unknown | Self::Behind(_) | Self::Node(_) | Self::Pod(_) => None,
        };
        let node = self.node(world).map(|node| &node.name);
        own.into_iter().chain(node)
    }

    /// Whether the tables of the node whose world this is are about what it sends or receives.
    pub(super) fn is_local(&self, world: &World<'a>) -> bool {
        let is_here = || {
            self.node(world)
                .is_some_and(|node| node.name == *world.node)
        };
        match world.scope {
            // Nobody's address may be one that this node's own networks use.
            Scope::Ends => matches!(self, Self::Unknown) || is_here(),
            Scope::Calls => self.pod().is_some() && is_here(),
        }
    }
}

/// Which flows a node's tables are about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// Those with an end on the node, as that end judges them: what its kernel enforces.
    Ends,
    /// Those that its pods open, as both ends judge them.
    Calls,
}

/// The mesh as this node's rules see it.
#[derive(Debug)]
pub(super) struct World<'a> {
    pub(super) snapshot: &'a Snapshot,
    pub(super) node: &'a NodeName,
    pub(super) scope: Scope,
    /// Labels of namespaces, each with its name's.
    namespaces: BTreeMap<&'a str, Labels>,
}

impl<'a> World<'a> {
    pub(super) fn new(snapshot: &'a Snapshot, node: &'a NodeName, scope: Scope) -> Self {
        let Resources {
            pods, namespaces, ..
        } = &snapshot.policy;
        let mut labels: BTreeMap<&str, Labels> = BTreeMap::new();
        for (name, said) in namespaces {
            labels.insert(name, Labels::clone(said));
        }
        for name in pods.keys() {
            labels.entry(&name.namespace).or_default();
        }
        for (name, labels) in &mut labels {
            labels.insert(NAMESPACE_NAME_LABEL.to_owned(), (*name).to_owned());
        }
        Self {
            snapshot,
            node,
            scope,
            namespaces: labels,
        }
    }

    fn namespace_is(&self, pod: &Pod, selector: &LabelSelector) -> bool {
        let labels = self.namespaces.get(pod.name.namespace.as_str());
        labels.is_some_and(|labels| selector.matches(labels))
    }

    /// Who has which prefix.
    pub(super) fn owners(&self) -> BTreeMap<IpNet, Owner<'a>> {
        let mut owners = BTreeMap::new();
        let nodes = self.snapshot.nodes.values();
        // What is behind several nodes is behind the first of them by name; but behind this one, if it is one.
        let own = self.snapshot.nodes.get(self.node);
        for node in nodes.clone().rev().chain(own) {
            let behind = node.prefixes.iter().map(IpNet::trunc);
            owners.extend(behind.map(|prefix| (prefix, Owner::Behind(node))));
        }
        for peer in self.snapshot.external_peers.values() {
            let prefixes = peer.prefixes.iter().map(IpNet::trunc);
            owners.extend(prefixes.map(|prefix| (prefix, Owner::External(peer))));
        }
        for node in nodes {
            let overlay = [IpAddr::V4(node.overlay_v4), IpAddr::V6(node.overlay_v6)];
            owners.extend(overlay.map(|address| (IpNet::from(address), Owner::Node(node))));
            if node.name == *self.node {
                let own = node.underlay_addresses.iter();
                owners.extend(own.map(|address| (IpNet::from(*address), Owner::Node(node))));
            }
        }
        for pod in self.snapshot.policy.pods.values() {
            if !pod.host_network {
                let addresses = pod.addresses.iter();
                owners.extend(addresses.map(|address| (IpNet::from(*address), Owner::Pod(pod))));
            }
        }
        owners
    }
}
