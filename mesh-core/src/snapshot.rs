//! The desired state of the mesh as one node sees it: checked, immutable, shared by `Arc`.
//!
//! The controller sends it as resources (see `mesh-api`), the agent keeps it on disk; everything
//! that serves traffic or names reads only this.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU16,
    sync::Arc,
    time::Duration,
};

use ipnet::{IpNet, Ipv4Net};
use mesh_wire::id::{MeshId, NodeId, NodeName, RelayId, RelayName, SiteName};

use crate::{
    offline::limit::LIMIT_DEFAULT,
    policy::resources::{DefaultAction, Resources},
};

/// Counts the changes of the desired state; 0 is "nothing yet".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Generation(pub u64);

/// Everything a node needs to serve traffic and names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Which state of the controller's this is.
    pub generation: Generation,
    /// What holds for the whole mesh.
    pub mesh: MeshSettings,
    /// Nodes, this one among them.
    pub nodes: BTreeMap<NodeName, Node>,
    /// Plain WireGuard devices.
    pub external_peers: BTreeMap<NodeName, ExternalPeer>,
    /// Relays.
    pub relays: BTreeMap<RelayId, Relay>,
    /// Services by name.
    /// By its own name each, and shared with the snapshot before if it is the same: who follows changes looks at no
    /// more than a pointer.
    pub services: BTreeMap<ServiceName, Arc<Service>>,
    /// Endpoint slices, shared alike, but never by two services. A service's endpoints are the
    /// union of its slices.
    pub slices: BTreeMap<ServiceName, BTreeMap<String, Arc<EndpointSlice>>>,
    /// Who may speak with whom.
    pub policy: Resources,
    /// Sites whose nodes may connect directly, by the community's name. None: all may.
    pub communities: BTreeMap<String, BTreeSet<SiteName>>,
}

/// What holds for the whole mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshSettings {
    /// The mesh's id.
    pub id: MeshId,
    /// SPIFFE trust domain, and the mesh's name.
    pub trust_domain: String,
    /// Overlay IPv4 addresses come from here.
    pub overlay_v4: Ipv4Net,
    /// Zone of the services, without dots at its ends: `cluster.local`.
    pub cluster_domain: String,
    /// Zone of the node names: `mesh`.
    pub node_domain: String,
    /// MTU of the overlay in bytes.
    pub mtu_bytes: u16,
    /// What happens to flows of which no policy of the mesh says anything.
    pub default_action: DefaultAction,
    /// For how long nodes count on what they have while no controller speaks; `None`: for ever.
    pub offline_limit: Option<Duration>,
}

impl MeshSettings {
    /// Settings of a mesh for which nothing was said.
    #[must_use]
    pub fn with_defaults(id: MeshId, trust_domain: &str) -> Self {
        Self {
            id,
            trust_domain: trust_domain.to_owned(),
            overlay_v4: Ipv4Net::new_assert(Ipv4Addr::new(100, 96, 0, 0), 12),
            cluster_domain: "cluster.local".to_owned(),
            node_domain: "mesh".to_owned(),
            mtu_bytes: DEFAULT_MTU_BYTES,
            default_action: DefaultAction::Allow,
            offline_limit: Some(LIMIT_DEFAULT),
        }
    }
}

/// Overlay MTU that fits, with WireGuard (32 + 8 UDP + 40 IPv6 = 80 bytes), under 1500; through
/// a relay's QUIC datagram (8 header, ~40 QUIC) it still does with 1360 to spare.
pub const DEFAULT_MTU_BYTES: u16 = 1280;

/// A node of the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its WireGuard key.
    pub id: NodeId,
    /// Its name.
    pub name: NodeName,
    /// Where it is.
    pub locality: Locality,
    /// Its overlay IPv4 address.
    pub overlay_v4: Ipv4Addr,
    /// Its overlay IPv6 address, `MeshId::overlay_v6(id)`.
    pub overlay_v6: Ipv6Addr,
    /// Further prefixes behind it: pods, LAN subnets, external peers it is the gateway of.
    pub prefixes: Vec<IpNet>,
    /// Those of `prefixes` from which its pods get their addresses (`spec.podCIDRs` in Kubernetes).
    pub pod_prefixes: Vec<IpNet>,
    /// Addresses of its own outside the mesh (`status.addresses` in Kubernetes): an endpoint
    /// with one of these is the node itself.
    pub underlay_addresses: Vec<IpAddr>,
    /// Addresses where its UDP socket is reachable for sure, given by the operator.
    pub static_candidates: Vec<SocketAddr>,
    /// LAN subnets behind it that the mesh sees under another range, which is one of `prefixes`.
    pub mapped: Vec<Mapping>,
}

/// A LAN subnet by its two names; of one family and length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// As the LAN itself knows it.
    pub lan: IpNet,
    /// As the mesh does, address by address.
    pub seen_as: IpNet,
}

impl Node {
    /// A node of `mesh` of which nothing else is known yet: nowhere in particular, nothing behind it.
    #[must_use]
    pub fn new(mesh: &MeshId, name: NodeName, id: NodeId, overlay_v4: Ipv4Addr) -> Self {
        Self {
            id,
            name,
            locality: Locality::default(),
            overlay_v4,
            overlay_v6: mesh.overlay_v6(&id),
            prefixes: Vec::new(),
            pod_prefixes: Vec::new(),
            underlay_addresses: Vec::new(),
            static_candidates: Vec::new(),
            mapped: Vec::new(),
        }
    }

    /// Every prefix whose packets may come from this node, and go to it.
    pub fn allowed_prefixes(&self) -> impl Iterator<Item = IpNet> + '_ {
        let own = [
            IpNet::from(IpAddr::V4(self.overlay_v4)),
            IpNet::from(IpAddr::V6(self.overlay_v6)),
        ];
        own.into_iter().chain(self.prefixes.iter().copied())
    }

    /// Every address of the node itself, in the mesh and outside.
    pub fn own_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let overlay = [self.overlay_v4.into(), self.overlay_v6.into()];
        overlay
            .into_iter()
            .chain(self.underlay_addresses.iter().copied())
    }
}

/// Where a node is, from near to far. An empty value is "not said" and equals no other.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Locality {
    /// Nodes of one site share a LAN (`mesh.holdfast.dev/site`).
    pub site: Option<SiteName>,
    /// `topology.kubernetes.io/zone`.
    pub zone: Option<String>,
    /// `topology.kubernetes.io/region`.
    pub region: Option<String>,
}

/// A plain WireGuard device, reached through one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalPeer {
    /// Its WireGuard key.
    pub id: NodeId,
    /// Its name.
    pub name: NodeName,
    /// Its addresses in the overlay.
    pub prefixes: Vec<IpNet>,
    /// The node that it has its tunnel with.
    pub gateway: NodeName,
    /// Where it listens, if it does: otherwise it calls first.
    pub endpoint: Option<SocketAddr>,
    /// How often the gateway keeps its NAT open; `None`: never.
    pub keepalive: Option<Duration>,
}

/// A relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relay {
    /// Its name; its certificate carries it.
    pub name: RelayName,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// UDP port for QUIC, 443 unless said otherwise.
    pub quic_port: u16,
    /// TCP port for TLS, 443 unless said otherwise.
    pub tls_port: u16,
    /// UDP ports that answer STUN binding requests: two, so that one relay suffices to
    /// recognise a symmetric NAT.
    pub stun_ports: Vec<u16>,
    /// The mesh node that acts as this relay (a peer relay); a relay by itself otherwise.
    pub node: Option<NodeName>,
    /// The sites that it serves: one end of each of its sessions is in one of them. Empty: everybody.
    pub sites: BTreeSet<SiteName>,
}

impl Relay {
    /// Whether a node of this site may have a link to it without asking who its peer is.
    #[must_use]
    pub fn serves(&self, site: Option<&SiteName>) -> bool {
        self.sites.is_empty() || site.is_some_and(|site| self.sites.contains(site))
    }
}

/// `namespace/name` of a service.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Name in it.
    pub name: String,
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Debug for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: ServiceName,
    /// What kind of addresses it has.
    pub kind: ServiceKind,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// Whether endpoints that are not ready count (`publishNotReadyAddresses`).
    pub publish_not_ready: bool,
    /// Whether clients are kept to the endpoints on their own node (`internalTrafficPolicy: Local`).
    pub local_only: bool,
    /// Whose endpoints come first; `None`: nobody said, and the nearest do.
    pub distribution: Option<TrafficDistribution>,
    /// How long after its last new flow a client keeps its endpoint (`sessionAffinity: ClientIP`);
    /// `None`: every flow may have another.
    pub affinity: Option<Duration>,
    /// How it is reached from outside, with the node ports of its ports.
    pub external: External,
    /// How new flows are spread.
    pub balance: Balance,
}

impl Service {
    /// A service without ports, of which nothing was said but its addresses.
    #[must_use]
    pub fn new(name: ServiceName, kind: ServiceKind) -> Self {
        Self {
            name,
            kind,
            ports: Vec::new(),
            publish_not_ready: false,
            local_only: false,
            distribution: None,
            affinity: None,
            external: External::default(),
            balance: Balance::default(),
        }
    }
}

/// How new flows are spread over the endpoints that come first (`MeshService`, or annotations).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Balance {
    /// Who gets the next flow.
    pub policy: Policy,
    /// How many endpoints carry the whole load. Where fewer come first, each of them takes its
    /// part and those that come next take the rest. 0 and 1: the first always carry it. At most
    /// [`SPILL_OVER_MAX`].
    pub spill_over: u16,
    /// How many TCP connections of this node an endpoint takes before new ones go on to others; `None`: any
    /// number. At most [`CONNECTIONS_MAX`].
    pub max_connections: Option<NonZeroU16>,
    /// Whether what sockets of one node write to each other by this service goes past TCP, from socket to
    /// socket; TCP only. Off unless asked for: `docs/services.md` says what applications give up.
    pub sockmap: bool,
    /// Which endpoints take more flows than others beside them: the first that matches counts, an
    /// endpoint that none matches has weight 1.
    pub weights: Vec<Weight>,
}

/// Largest `spill_over`: more endpoints than a service has at one site.
pub const SPILL_OVER_MAX: u16 = 1_000;

/// Largest `max_connections`: a node counts the connections of 16,384 sockets.
pub const CONNECTIONS_MAX: u16 = 10_000;

/// Most weights of a service: each endpoint is compared with all.
pub const WEIGHTS_MAX: usize = 64;

/// Who gets the next flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Policy {
    /// Anybody, by chance.
    #[default]
    Random,
    /// Whom the client had: each client keeps its endpoint while the list is the same, and few
    /// clients move when it changes.
    ConsistentHash,
    /// The next in turn, as this node counts.
    RoundRobin,
    /// One by chance, of the nearest only those behind the best measured paths.
    LeastLatency,
}

/// Endpoints and their weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weight {
    /// Which endpoints.
    pub place: Place,
    /// How many flows they take where others take one: 1 to [`WEIGHT_MAX`].
    pub weight: u16,
}

/// Largest weight: a hundred to one is as good as all or nothing.
pub const WEIGHT_MAX: u16 = 100;

/// Where endpoints are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// With this address in its slice.
    Address(IpAddr),
    /// On this node.
    Node(NodeName),
    /// At this site.
    Site(SiteName),
    /// In this zone.
    Zone(String),
    /// In this region.
    Region(String),
}

/// A service's addresses that others lead to the nodes, and what holds for clients from outside.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct External {
    /// `externalIPs`.
    pub addresses: Vec<IpAddr>,
    /// Those of a load balancer that passes packets on as they came (`status.loadBalancer`, but
    /// for `ipMode: Proxy`: whoever asks for those is to be answered by the load balancer).
    pub load_balancer: Vec<IpAddr>,
    /// Whose packets the load balancer's addresses take (`loadBalancerSourceRanges`); empty:
    /// everybody's.
    pub sources: Vec<IpNet>,
    /// Whether clients from outside are kept to the endpoints on the node that they came to
    /// (`externalTrafficPolicy: Local`).
    pub local_only: bool,
    /// Where each node says how many endpoints it has itself (`healthCheckNodePort`).
    pub health_check: Option<u16>,
}

/// `trafficDistribution`: which endpoints come before all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TrafficDistribution {
    /// Those in the client's zone (`PreferSameZone`, and `PreferClose`, its old name).
    SameZone,
    /// Those on the client's node, then those in its zone (`PreferSameNode`).
    SameNode,
}

/// What kind of addresses a service has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServiceKind {
    /// Virtual addresses, at most one a family.
    ClusterIp(Vec<IpAddr>),
    /// No address of its own: names lead to the endpoints.
    Headless,
    /// An alias.
    ExternalName(String),
}

/// A port of a service. Which port of the endpoint it leads to stands in the slice, by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name; empty if the service has only one.
    pub name: String,
    /// Its protocol.
    pub protocol: Protocol,
    /// Its number.
    pub port: u16,
    /// Its number at the nodes' own addresses (`nodePort`).
    pub node_port: Option<u16>,
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Some of a service's endpoints, as `discovery.k8s.io/v1 EndpointSlice`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSlice {
    /// The slice's own name.
    pub name: String,
    /// Ports, the same for every endpoint of the slice.
    pub ports: Vec<EndpointPort>,
    /// The endpoints.
    pub endpoints: Vec<Endpoint>,
}

/// A port of the endpoints in a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointPort {
    /// The name of the service port that it serves.
    pub name: String,
    /// Its protocol.
    pub protocol: Protocol,
    /// Its number.
    pub port: u16,
}

/// One endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Its address.
    pub address: IpAddr,
    /// The node it is on.
    pub node: Option<NodeName>,
    /// `topology.kubernetes.io/zone`, if the slice says it; otherwise its node's.
    pub zone: Option<String>,
    /// Its hostname, for names of headless services.
    pub hostname: Option<String>,
    /// For whom it is meant, if somebody said so.
    pub hints: Hints,
    /// Ready for traffic.
    pub ready: bool,
    /// Still answering, though perhaps terminating.
    pub serving: bool,
    /// On its way out.
    pub terminating: bool,
}

impl Endpoint {
    /// One that is ready, of which nothing was said but where it is.
    #[must_use]
    pub fn new(address: IpAddr, node: Option<NodeName>) -> Self {
        Self {
            address,
            node,
            zone: None,
            hostname: None,
            hints: Hints::default(),
            ready: true,
            serving: true,
            terminating: false,
        }
    }
}

/// For whom an endpoint is meant (`hints`). Nothing: for nobody in particular.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Hints {
    /// Clients in these zones (`forZones`).
    pub zones: Vec<String>,
    /// Clients on these nodes (`forNodes`).
    pub nodes: Vec<NodeName>,
}

impl Snapshot {
    /// A snapshot with nothing in it.
    #[must_use]
    pub fn empty(mesh: MeshSettings) -> Self {
        Self {
            generation: Generation::default(),
            mesh,
            nodes: BTreeMap::new(),
            external_peers: BTreeMap::new(),
            relays: BTreeMap::new(),
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            policy: Resources::default(),
            communities: BTreeMap::new(),
        }
    }

    /// The node that people mean by `name`: its own, or that in DNS, `NAME.` and [`MeshSettings::node_domain`].
    #[must_use]
    pub fn node_called(&self, name: &str) -> Option<&Node> {
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        let own = name
            .strip_suffix(&self.mesh.node_domain)
            .and_then(|name| name.strip_suffix('.'))
            .unwrap_or(&name);
        self.nodes.get(own)
    }

    /// The node whose overlay address this is.
    #[must_use]
    pub fn node_at(&self, overlay: IpAddr) -> Option<&Node> {
        let has = |node: &&Node| overlay == node.overlay_v4 || overlay == node.overlay_v6;
        self.nodes.values().find(has)
    }

    /// Sites with whose nodes those of `site` may connect directly, their own among them; `None`: with
    /// everybody, as there is no community. Nodes of which no site is said are then in none.
    #[must_use]
    pub fn direct_sites(&self, site: Option<&SiteName>) -> Option<BTreeSet<SiteName>> {
        if self.communities.is_empty() {
            return None;
        }
        let site = site.into_iter();
        Some(
            site.flat_map(|own| {
                let shared = self.communities.values();
                let shared = shared.filter(move |sites| sites.contains(own)).flatten();
                shared.chain([own]).cloned()
            })
            .collect(),
        )
    }

    /// Every endpoint of `service`, with the slice that holds it.
    pub fn endpoints<'a>(
        &'a self,
        service: &ServiceName,
    ) -> impl Iterator<Item = (&'a EndpointSlice, &'a Endpoint)> + use<'a> {
        let slices = self
            .slices
            .get(service)
            .into_iter()
            .flat_map(BTreeMap::values);
        slices.flat_map(|slice| {
            slice
                .endpoints
                .iter()
                .map(move |endpoint| (&**slice, endpoint))
        })
    }
}
