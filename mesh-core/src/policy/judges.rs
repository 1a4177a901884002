//! What both sides of a flow say of it, by the state of the mesh alone: for people who ask why.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use mesh_wire::id::NodeName;

use super::{Compiler, Direction, Flow, Limits, Verdict, resources::ObjectName};
use crate::snapshot::{Node, Snapshot};

/// Every node's tables, made where they are asked for.
#[derive(Debug)]
pub struct Judges {
    snapshot: Arc<Snapshot>,
    limits: Limits,
    compilers: BTreeMap<NodeName, Compiler>,
}

/// What one side says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judged {
    /// Whose tables say it.
    pub node: NodeName,
    /// As which side.
    pub direction: Direction,
    /// What they say.
    pub verdict: Verdict,
    /// Whether there is anything to enforce on that node.
    pub enforced: bool,
    /// Who decided: `MeshPolicy lock-down`.
    pub by: String,
}

/// Whom nobody knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnknownEnd {
    /// No node has this name.
    #[error("there is no node {0} (nor is it NAMESPACE/NAME of a pod, or an address)")]
    Node(String),
    /// No pod has this name, or it has no address.
    #[error("there is no pod {0} with an address")]
    Pod(ObjectName),
}

impl Judges {
    /// By the tables that nodes with so much room make of `snapshot`.
    #[must_use]
    pub fn new(snapshot: Arc<Snapshot>, limits: Limits) -> Self {
        Self {
            snapshot,
            limits,
            compilers: BTreeMap::new(),
        }
    }

    /// The addresses of an end: `node/NAME` or `NAME`, `pod/NAMESPACE/NAME` or `NAMESPACE/NAME`, or an address.
    ///
    /// # Errors
    ///
    /// [`UnknownEnd`].
    pub fn addresses(&self, end: &str) -> Result<Vec<IpAddr>, UnknownEnd> {
        if let Ok(address) = end.parse() {
            return Ok(vec![address]);
        }
        let name = end.strip_prefix("node/").unwrap_or(end);
        let mut nodes = self.snapshot.nodes.values();
        if let Some(node) = nodes.find(|node| node.name.as_str() == name) {
            return Ok(vec![node.overlay_v4.into(), node.overlay_v6.into()]);
        }
        let pod = end.strip_prefix("pod/").unwrap_or(end).split_once('/');
        let Some((namespace, name)) = pod.filter(|_| !end.starts_with("node/")) else {
            return Err(UnknownEnd::Node(name.to_owned()));
        };
        let name = ObjectName {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        };
        match self.snapshot.policy.pods.get(&name) {
            Some(pod) if !pod.addresses.is_empty() => Ok(pod.addresses.clone()),
            Some(_) | None => Err(UnknownEnd::Pod(name)),
        }
    }

    /// What the sender's node says, and what the receiver's does, as far as they are nodes of the mesh.
    pub fn sides(&mut self, flow: &Flow) -> Vec<Judged> {
        let sides = [(flow.from, Direction::Out), (flow.to, Direction::In)];
        let judged = sides.into_iter().filter_map(|(end, direction)| {
            let node = self.home(end)?;
            Some(self.judge(&node, flow, direction))
        });
        judged.collect()
    }

    /// What a node says as that side.
    pub fn judge(&mut self, node: &NodeName, flow: &Flow, direction: Direction) -> Judged {
        let compiler = self.compilers.entry(node.clone()).or_insert_with(|| {
            let mut compiler = Compiler::new(node.clone(), self.limits);
            compiler.update(&self.snapshot);
            compiler
        });
        let tables = compiler.tables();
        let verdict = tables.judge(flow, direction);
        Judged {
            node: node.clone(),
            direction,
            verdict,
            enforced: tables.enforced,
            by: tables.name(verdict.decider).to_owned(),
        }
    }

    /// The node on which an address is, or behind which.
    fn home(&self, address: IpAddr) -> Option<NodeName> {
        let mut pods = self.snapshot.policy.pods.values();
        if let Some(pod) = pods.find(|pod| pod.addresses.contains(&address)) {
            return pod.node.clone();
        }
        let mut nodes = self.snapshot.nodes.values();
        let has = |node: &&Node| {
            let mut prefixes = node.allowed_prefixes();
            prefixes.any(|prefix| prefix.contains(&address))
        };
        nodes.find(has).map(|node| node.name.clone())
    }
}
