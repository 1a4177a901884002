//! What the desired state says of who may speak with whom, and of pods and namespaces as far as
//! policies select by them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use mesh_wire::id::{NodeName, SiteName};

use crate::snapshot::Protocol;

/// Labels of a pod or a namespace.
pub type Labels = BTreeMap<String, String>;

/// Label that every namespace has, with its name (Kubernetes 1.21).
pub const NAMESPACE_NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// Most rules of one `MeshPolicy`, and most of one `NetworkPolicy`: each is compared with all
/// classes of addresses.
pub const RULES_MAX: usize = 256;

/// Everything in the desired state that is about policy.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Resources {
    /// The mesh's own policies, by name.
    pub mesh: BTreeMap<String, Arc<MeshPolicy>>,
    /// Kubernetes' policies.
    pub network: BTreeMap<ObjectName, Arc<NetworkPolicy>>,
    /// Pods with an address of their own, or on their node's network.
    pub pods: BTreeMap<ObjectName, Arc<Pod>>,
    /// Labels of namespaces. A namespace that is not here has its name's label alone.
    pub namespaces: BTreeMap<String, Arc<Labels>>,
}

/// `namespace/name` of an object.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Name in it.
    pub name: String,
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// What happens to flows of which nobody said anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum DefaultAction {
    /// They pass.
    #[default]
    Allow,
    /// They pass, and are counted as what [`Self::Deny`] would drop.
    Audit,
    /// They are dropped.
    Deny,
}

/// What a rule does with the flows that it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// They pass, unless another rule denies them.
    Allow,
    /// They are dropped, whatever other rules say.
    Deny,
}

/// The mesh's own policy: rules about flows between any two parties, obeyed on both sides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshPolicy {
    /// Its name.
    pub name: String,
    /// It changes nothing: what its denials would drop passes and is counted, and what it allows
    /// is not allowed by it.
    pub audit: bool,
    /// Its rules, in no order.
    pub rules: Vec<MeshRule>,
}

/// Flows and what becomes of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshRule {
    /// What becomes of them.
    pub action: Action,
    /// Who opened them: one of these. Empty: anybody.
    pub from: Vec<Party>,
    /// To whom: one of these. Empty: anybody.
    pub to: Vec<Party>,
    /// By what: one of these. Empty: anything.
    pub ports: Vec<PortMatch>,
}

/// Ends of flows: those of which everything holds that is said here. Each list means one of its
/// entries; an empty one says nothing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Party {
    /// The node itself, its pods, and what is behind it.
    pub nodes: Vec<NodeName>,
    /// The same of all nodes at the site.
    pub sites: Vec<SiteName>,
    /// Pods in these namespaces.
    pub namespaces: Vec<String>,
    /// Pods in namespaces with such labels.
    pub namespace_selector: Option<LabelSelector>,
    /// Pods that run as these.
    pub service_accounts: Vec<ObjectName>,
    /// Pods with such labels.
    pub pod_selector: Option<LabelSelector>,
    /// Addresses in these, whoever has them.
    pub cidrs: Vec<IpNet>,
}

/// `metav1.LabelSelector`: all of it must hold. An empty one selects everything.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct LabelSelector {
    /// `matchLabels`.
    pub labels: Labels,
    /// `matchExpressions`.
    pub expressions: Vec<Requirement>,
}

/// One of a selector's `matchExpressions`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Requirement {
    /// The label.
    pub key: String,
    /// What must hold for it.
    pub operator: Operator,
    /// For [`Operator::In`] and [`Operator::NotIn`].
    pub values: BTreeSet<String>,
}

/// What must hold for a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operator {
    /// It is there with one of the values.
    In,
    /// It is not there, or with another value.
    NotIn,
    /// It is there.
    Exists,
    /// It is not there.
    DoesNotExist,
}

impl LabelSelector {
    /// Whether it selects what has these labels.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        let all = self
            .labels
            .iter()
            .all(|(key, value)| labels.get(key) == Some(value));
        all && self.expressions.iter().all(|one| one.holds(labels))
    }
}

impl Requirement {
    fn holds(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        let listed = value.is_some_and(|value| self.values.contains(value));
        match self.operator {
            Operator::In => listed,
            Operator::NotIn => !listed,
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

/// A protocol that rules can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IpProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
    /// ICMP and ICMPv6 but their errors, which belong to the flow that they are about. It has no
    /// ports.
    Icmp,
}

impl From<Protocol> for IpProtocol {
    fn from(of_service: Protocol) -> Self {
        match of_service {
            Protocol::Tcp => Self::Tcp,
            Protocol::Udp => Self::Udp,
        }
    }
}

impl IpProtocol {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Tcp, Self::Udp, Self::Sctp, Self::Icmp];

    /// As manifests write it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
            Self::Icmp => "ICMP",
        }
    }
}

/// Destination ports of a protocol.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortMatch {
    /// The protocol.
    pub protocol: IpProtocol,
    /// Which of its ports.
    pub ports: Ports,
}

/// Which ports.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ports {
    /// All, and packets without.
    All,
    /// From the first to the last.
    Range(u16, u16),
    /// What the destination's pod calls so (`NetworkPolicy` only).
    Named(String),
}

/// `networking.k8s.io/v1 NetworkPolicy`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkPolicy {
    /// Its name, and whose namespace its pods are in.
    pub name: ObjectName,
    /// The pods that it is about.
    pub pods: LabelSelector,
    /// What they may receive; `None`: it says nothing of that (`policyTypes`).
    pub ingress: Option<Vec<NetworkRule>>,
    /// What they may open; `None`: it says nothing of that.
    pub egress: Option<Vec<NetworkRule>>,
}

/// Flows that a `NetworkPolicy` allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkRule {
    /// The other end: one of these. Empty: anybody.
    pub peers: Vec<NetworkPeer>,
    /// One of these. Empty: anything.
    pub ports: Vec<PortMatch>,
}

/// The other end of a flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkPeer {
    /// Pods.
    Pods {
        /// With these labels.
        pods: LabelSelector,
        /// In namespaces with these; `None`: in the policy's own.
        namespaces: Option<LabelSelector>,
    },
    /// `ipBlock`: addresses, whoever has them.
    Block {
        /// In this,
        cidr: IpNet,
        /// and in none of these.
        except: Vec<IpNet>,
    },
}

/// A pod, as policies see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Its name.
    pub name: ObjectName,
    /// Its labels.
    pub labels: Labels,
    /// Whom it runs as, in its namespace.
    pub service_account: String,
    /// Where it runs.
    pub node: Option<NodeName>,
    /// Its addresses. On the host's network they are the node's, and the pod is no party of its
    /// own.
    pub addresses: Vec<IpAddr>,
    /// Whether it is on the host's network.
    pub host_network: bool,
    /// Ports with a name.
    pub ports: Vec<NamedPort>,
}

/// A port of a pod's container.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct NamedPort {
    /// Its name.
    pub name: String,
    /// Its protocol.
    pub protocol: IpProtocol,
    /// Its number.
    pub port: u16,
}
