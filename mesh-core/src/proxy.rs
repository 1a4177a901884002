//! Who may reach which node by the agent's CONNECT proxy, and at which address: the way of `kubectl logs`,
//! metrics scraping and SSH to nodes behind NAT.
//!
//! Whatever a client asks for, the answer is an overlay address of one node of the mesh, or nothing: never an
//! address that the client chose, so never a loopback and never anybody outside. Without a rule nobody may do
//! anything.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    str::FromStr,
};

use mesh_wire::id::{NodeName, SiteName};

use crate::{
    pattern::NamePattern,
    snapshot::{Node, Snapshot},
};

/// One of the names by which a client is known. It was proved, by the kernel or by a certificate, before it
/// comes here.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum ClientName {
    /// The user of a process on this machine (`SO_PEERCRED`, unix(7)).
    Uid(u32),
    /// A certificate's common name: in Kubernetes, the user.
    CommonName(String),
    /// One of a certificate's organizations: in Kubernetes, a group.
    Organization(String),
    /// A URI in a certificate's subject alternative name, as SPIFFE has it.
    Uri(String),
}

impl fmt::Display for ClientName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uid(uid) => write!(f, "uid:{uid}"),
            Self::CommonName(name) => write!(f, "cn:{name}"),
            Self::Organization(name) => write!(f, "o:{name}"),
            Self::Uri(uri) => write!(f, "uri:{uri}"),
        }
    }
}

/// Why a text names no client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} names no client: `uid:0`, or of a certificate `cn:common name`, `o:organization`, `uri:spiffe://…`"
)]
pub struct BadClientName(String);

impl FromStr for ClientName {
    type Err = BadClientName;

    fn from_str(text: &str) -> Result<Self, BadClientName> {
        let bad = || BadClientName(text.to_owned());
        let (kind, name) = text.split_once(':').ok_or_else(bad)?;
        if name.is_empty() {
            return Err(bad());
        }
        match kind {
            "uid" => name.parse().map(Self::Uid).map_err(|_| bad()),
            "cn" => Ok(Self::CommonName(name.to_owned())),
            "o" => Ok(Self::Organization(name.to_owned())),
            "uri" => Ok(Self::Uri(name.to_owned())),
            _ => Err(bad()),
        }
    }
}

/// What some clients may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Who: one of a client's names suffices.
    pub clients: Vec<ClientName>,
    /// These nodes, by name,
    pub nodes: Vec<NamePattern>,
    /// and all nodes of these sites,
    pub sites: Vec<SiteName>,
    /// at these TCP ports.
    pub ports: Vec<RangeInclusive<u16>>,
}

impl Rule {
    /// Whether it is about this client.
    #[must_use]
    pub fn names(&self, client: &[ClientName]) -> bool {
        client.iter().any(|name| self.clients.contains(name))
    }

    fn covers(&self, node: &Node, port: u16) -> bool {
        let named = self
            .nodes
            .iter()
            .any(|pattern| pattern.matches(node.name.as_str()));
        let site = node.locality.site.as_ref();
        let at_site = site.is_some_and(|site| self.sites.contains(site));
        (named || at_site) && self.ports.iter().any(|ports| ports.contains(&port))
    }
}

/// Where a connection may go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed<'a> {
    /// The node.
    pub node: &'a Node,
    /// Its overlay addresses with the port: the next one is for when nobody listens at the one before.
    pub to: Vec<SocketAddr>,
    /// Which rule it was, counted from 0.
    pub rule: usize,
}

/// Why a connection may not be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// What was asked for is no `host:port`.
    #[error("{0:?} is not `host:port`")]
    NotAnAddress(String),
    /// No rule is about this client.
    #[error("no rule of this proxy names the client")]
    UnknownClient,
    /// It is no node's.
    #[error("{0:?} is no node of the mesh, and this proxy leads nowhere else")]
    UnknownHost(String),
    /// Nodes behind different NATs have the same address in their LANs.
    #[error("{address} is an address of {one} and of {other}: ask for the node by its name")]
    Ambiguous {
        /// What was asked for.
        address: IpAddr,
        /// A node that has it.
        one: NodeName,
        /// Another one.
        other: NodeName,
    },
    /// The client's rules are about other nodes or ports.
    #[error("no rule lets the client reach port {port} of {node}")]
    Denied {
        /// The node.
        node: NodeName,
        /// The port.
        port: u16,
    },
}

/// Whether `client` may reach `target`, the `host:port` of a CONNECT request (RFC 9110 §9.3.6), and where that
/// is. A host is a node's name, alone or under the mesh's domain of nodes, one of its overlay addresses, or an
/// address that its Kubernetes `Node` has, if no other node has it too.
///
/// # Errors
///
/// [`Refusal`].
pub fn decide<'a>(
    rules: &[Rule],
    client: &[ClientName],
    target: &str,
    snapshot: &'a Snapshot,
) -> Result<Allowed<'a>, Refusal> {
    let not_an_address = || Refusal::NotAnAddress(target.to_owned());
    let (host, port) = target.rsplit_once(':').ok_or_else(not_an_address)?;
    let port = port.parse::<u16>().ok().filter(|&port| port != 0);
    let port = port.ok_or_else(not_an_address)?;
    if host.is_empty() {
        return Err(not_an_address());
    }
    // Who may do nothing is told nothing of the mesh.
    if !rules.iter().any(|rule| rule.names(client)) {
        return Err(Refusal::UnknownClient);
    }
    let (node, addresses) = find(host, snapshot)?;
    let rule = rules
        .iter()
        .position(|rule| rule.names(client) && rule.covers(node, port));
    let denied = || Refusal::Denied {
        node: node.name.clone(),
        port,
    };
    Ok(Allowed {
        node,
        to: addresses
            .into_iter()
            .map(|address| SocketAddr::new(address, port))
            .collect(),
        rule: rule.ok_or_else(denied)?,
    })
}

/// The node that `host` means, and the overlay addresses to try.
fn find<'a>(host: &str, snapshot: &'a Snapshot) -> Result<(&'a Node, Vec<IpAddr>), Refusal> {
    let unknown = || Refusal::UnknownHost(host.to_owned());
    let both = |node: &Node| vec![node.overlay_v4.into(), node.overlay_v6.into()];
    let literal = host
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(host);
    let Ok(address) = literal.parse::<IpAddr>() else {
        let node = snapshot.node_called(host).ok_or_else(unknown)?;
        return Ok((node, both(node)));
    };
    if let Some(node) = snapshot.node_at(address) {
        return Ok((node, vec![address]));
    }
    let mut nodes = snapshot.nodes.values();
    let underlay = |node: &&Node| node.underlay_addresses.contains(&address);
    let one = nodes.find(underlay).ok_or_else(unknown)?;
    match nodes.find(underlay) {
        None => Ok((one, both(one))),
        Some(other) => Err(Refusal::Ambiguous {
            address,
            one: one.name.clone(),
            other: other.name.clone(),
        }),
    }
}

#[cfg(test)]
mod tests;
