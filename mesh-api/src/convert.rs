//! Between the wire's resources and the core's types. What comes in is checked field by field.

use std::{
    collections::BTreeSet, fmt::Display, net::IpAddr, num::NonZeroU16, str::FromStr, sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use mesh_core::offline::limit::{DAY, LIMIT_DEFAULT};
use mesh_core::policy::resources::{Labels, MeshPolicy, NetworkPolicy, Pod};
use mesh_core::snapshot::{
    Balance, CONNECTIONS_MAX, Endpoint, EndpointPort, EndpointSlice, External, ExternalPeer, Hints,
    Locality, Mapping, MeshSettings, Node, Place, Policy, Protocol, Relay, SPILL_OVER_MAX, Service,
    ServiceKind, ServiceName, ServicePort, TrafficDistribution, WEIGHT_MAX, Weight,
};
use mesh_wire::id::{MeshId, NodeId, SiteName};
use prost::Message as _;

use crate::control::{self, Resource, ResourceKey, resource, resource_key};

pub mod policy;

/// A field that is not what it must be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct FieldError {
    /// Which, with indices: `ports[0].port`.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
}

/// A resource, checked. There are as many of these as of resources: what is large is elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    /// What holds for the whole mesh.
    Mesh(Box<MeshSettings>),
    /// A node. Whether the authority signed it is still to be checked.
    Node(Box<Node>),
    /// A plain WireGuard device.
    ExternalPeer(Box<ExternalPeer>),
    /// A relay.
    Relay(Box<Relay>),
    /// A service.
    Service(Arc<Service>),
    /// Some of a service's endpoints.
    Slice(ServiceName, Arc<EndpointSlice>),
    /// A pod, as policies see it.
    Pod(Arc<Pod>),
    /// A namespace's labels, by its name.
    Namespace(String, Arc<Labels>),
    /// Kubernetes' policy.
    NetworkPolicy(Arc<NetworkPolicy>),
    /// The mesh's own policy.
    MeshPolicy(Arc<MeshPolicy>),
    /// Sites that may connect directly, by the community's name.
    Community(String, BTreeSet<SiteName>),
}

/// The key of `resource`.
///
/// # Errors
///
/// If it is of a kind that this version does not know, or is a node whose record is broken.
pub fn key(resource: &Resource) -> Result<ResourceKey, FieldError> {
    use resource::Kind;
    use resource_key::Kind as KeyKind;
    let (kind, name) = match resource.kind.as_ref().ok_or_else(unknown_kind)? {
        Kind::Mesh(_) => (KeyKind::Mesh, String::new()),
        Kind::Node(signed) => (KeyKind::Node, node_record(signed)?.name),
        Kind::ExternalPeer(peer) => (KeyKind::ExternalPeer, peer.name.clone()),
        Kind::Relay(relay) => (KeyKind::Relay, relay.name.clone()),
        Kind::Service(service) => (
            KeyKind::Service,
            format!("{}/{}", service.namespace, service.name),
        ),
        Kind::Slice(slice) => (
            KeyKind::Slice,
            format!("{}/{}/{}", slice.namespace, slice.service, slice.name),
        ),
        Kind::Pod(pod) => (KeyKind::Pod, format!("{}/{}", pod.namespace, pod.name)),
        Kind::Namespace(namespace) => (KeyKind::Namespace, namespace.name.clone()),
        Kind::NetworkPolicy(policy) => (
            KeyKind::NetworkPolicy,
            format!("{}/{}", policy.namespace, policy.name),
        ),
        Kind::MeshPolicy(policy) => (KeyKind::MeshPolicy, policy.name.clone()),
        Kind::Community(community) => (KeyKind::Community, community.name.clone()),
    };
    Ok(ResourceKey {
        kind: kind.into(),
        name,
    })
}

/// Checks `resource`.
///
/// # Errors
///
/// [`FieldError`] for the first field that is wrong.
pub fn decode(resource: &Resource) -> Result<Object, FieldError> {
    use resource::Kind;
    match resource.kind.as_ref().ok_or_else(unknown_kind)? {
        Kind::Mesh(mesh) => Ok(Object::Mesh(decode_mesh(mesh)?.into())),
        Kind::Node(signed) => Ok(Object::Node(decode_node(&node_record(signed)?)?.into())),
        Kind::ExternalPeer(peer) => Ok(Object::ExternalPeer(decode_external_peer(peer)?.into())),
        Kind::Relay(relay) => Ok(Object::Relay(decode_relay(relay)?.into())),
        Kind::Service(service) => Ok(Object::Service(decode_service(service)?.into())),
        Kind::Slice(slice) => {
            let (service, slice) = decode_slice(slice)?;
            Ok(Object::Slice(service, slice.into()))
        }
        Kind::Pod(pod) => Ok(Object::Pod(policy::decode_pod(pod)?.into())),
        Kind::Namespace(namespace) => Ok(Object::Namespace(
            filled("name", &namespace.name)?,
            namespace.labels.clone().into(),
        )),
        Kind::NetworkPolicy(said) => {
            let checked = policy::decode_network_policy(said)?;
            Ok(Object::NetworkPolicy(checked.into()))
        }
        Kind::MeshPolicy(said) => Ok(Object::MeshPolicy(policy::decode_mesh_policy(said)?.into())),
        Kind::Community(said) => Ok(Object::Community(
            filled("name", &said.name)?,
            BTreeSet::from_iter(parse_list::<SiteName>("sites", &said.sites)?),
        )),
    }
}

/// The resource of the mesh's settings.
#[must_use]
pub fn mesh_resource(mesh: &MeshSettings) -> Resource {
    wrap(resource::Kind::Mesh(control::MeshSettings {
        mesh_id: mesh.id.0.to_vec(),
        trust_domain: mesh.trust_domain.clone(),
        overlay_v4: mesh.overlay_v4.to_string(),
        cluster_domain: mesh.cluster_domain.clone(),
        node_domain: mesh.node_domain.clone(),
        mtu_bytes: mesh.mtu_bytes.into(),
        default_action: policy::encode_default(mesh.default_action).into(),
        // Whole days: it was made of them.
        offline_limit_days: Some(mesh.offline_limit.map_or(0, |limit| {
            let days = limit.as_secs() / DAY.as_secs();
            u32::try_from(days).unwrap_or(u32::MAX).max(1)
        })),
    }))
}

/// The bytes of a node's record, to be signed.
#[must_use]
pub fn node_record_bytes(node: &Node) -> Vec<u8> {
    let Locality { site, zone, region } = &node.locality;
    let record = control::Node {
        name: node.name.to_string(),
        wireguard_public_key: node.id.0.to_vec(),
        overlay_v4: node.overlay_v4.to_string(),
        overlay_v6: node.overlay_v6.to_string(),
        prefixes: texts(&node.prefixes),
        pod_prefixes: texts(&node.pod_prefixes),
        site: site.as_ref().map(ToString::to_string).unwrap_or_default(),
        zone: zone.clone().unwrap_or_default(),
        region: region.clone().unwrap_or_default(),
        underlay_addresses: texts(&node.underlay_addresses),
        static_candidates: texts(&node.static_candidates),
        mapped: node
            .mapped
            .iter()
            .map(|mapping| control::Mapping {
                lan: mapping.lan.to_string(),
                seen_as: mapping.seen_as.to_string(),
            })
            .collect(),
    };
    record.encode_to_vec()
}

/// The resource of a node, from its record and the authority's signature over it.
#[must_use]
pub fn node_resource(record: Vec<u8>, signature: Vec<u8>) -> Resource {
    wrap(resource::Kind::Node(control::SignedNode {
        record,
        signature,
    }))
}

/// The resource of a plain WireGuard device.
#[must_use]
pub fn external_peer_resource(peer: &ExternalPeer) -> Resource {
    let keepalive = peer.keepalive.unwrap_or_default().as_secs();
    wrap(resource::Kind::ExternalPeer(control::ExternalPeer {
        name: peer.name.to_string(),
        wireguard_public_key: peer.id.0.to_vec(),
        prefixes: texts(&peer.prefixes),
        gateway: peer.gateway.to_string(),
        endpoint: text(peer.endpoint.as_ref()),
        keepalive_s: u32::try_from(keepalive).unwrap_or(u32::MAX),
    }))
}

/// The resource of a relay.
#[must_use]
pub fn relay_resource(relay: &Relay) -> Resource {
    wrap(resource::Kind::Relay(control::Relay {
        name: relay.name.to_string(),
        addresses: texts(&relay.addresses),
        quic_port: relay.quic_port.into(),
        tls_port: relay.tls_port.into(),
        stun_ports: relay.stun_ports.iter().copied().map(u32::from).collect(),
        node: text(relay.node.as_ref()),
        sites: relay.sites.iter().map(ToString::to_string).collect(),
    }))
}

/// The resource of the community `name`.
#[must_use]
pub fn community_resource(name: &str, sites: &BTreeSet<SiteName>) -> Resource {
    wrap(resource::Kind::Community(control::Community {
        name: name.to_owned(),
        sites: sites.iter().map(ToString::to_string).collect(),
    }))
}

/// The resource of a service.
#[must_use]
pub fn service_resource(service: &Service) -> Resource {
    let (cluster_ips, external_name) = match &service.kind {
        ServiceKind::ClusterIp(addresses) => (texts(addresses), String::new()),
        ServiceKind::Headless => (Vec::new(), String::new()),
        ServiceKind::ExternalName(name) => (Vec::new(), name.clone()),
    };
    let ports = service.ports.iter();
    let distribution = match service.distribution {
        None => control::TrafficDistribution::Unspecified,
        Some(TrafficDistribution::SameZone) => control::TrafficDistribution::PreferSameZone,
        Some(TrafficDistribution::SameNode) => control::TrafficDistribution::PreferSameNode,
    };
    let affinity = service.affinity.unwrap_or_default().as_secs();
    wrap(resource::Kind::Service(control::Service {
        namespace: service.name.namespace.clone(),
        name: service.name.name.clone(),
        cluster_ips,
        external_name,
        ports: ports
            .map(|port| control::ServicePort {
                node_port: port.node_port.unwrap_or_default().into(),
                ..encode_port(&port.name, port.protocol, port.port)
            })
            .collect(),
        publish_not_ready: service.publish_not_ready,
        local_only: service.local_only,
        traffic_distribution: distribution.into(),
        affinity_timeout_s: u32::try_from(affinity).unwrap_or(u32::MAX),
        external_ips: texts(&service.external.addresses),
        load_balancer_ips: texts(&service.external.load_balancer),
        load_balancer_source_ranges: texts(&service.external.sources),
        external_local_only: service.external.local_only,
        health_check_node_port: service.external.health_check.unwrap_or_default().into(),
        balance: (service.balance != Balance::default()).then(|| encode_balance(&service.balance)),
    }))
}

/// The resource of a slice of `service`'s endpoints.
#[must_use]
pub fn slice_resource(service: &ServiceName, slice: &EndpointSlice) -> Resource {
    let ports = slice.ports.iter();
    wrap(resource::Kind::Slice(control::EndpointSlice {
        namespace: service.namespace.clone(),
        service: service.name.clone(),
        name: slice.name.clone(),
        ports: ports
            .map(|port| encode_port(&port.name, port.protocol, port.port))
            .collect(),
        endpoints: slice.endpoints.iter().map(encode_endpoint).collect(),
    }))
}

fn wrap(kind: resource::Kind) -> Resource {
    Resource { kind: Some(kind) }
}

fn encode_port(name: &str, protocol: Protocol, port: u16) -> control::ServicePort {
    let protocol = match protocol {
        Protocol::Tcp => control::Protocol::Tcp,
        Protocol::Udp => control::Protocol::Udp,
    };
    control::ServicePort {
        name: name.to_owned(),
        protocol: protocol.into(),
        port: port.into(),
        node_port: 0,
    }
}

fn encode_balance(balance: &Balance) -> control::Balance {
    use control::{balance::Policy as Wire, weight::Place as At};
    let policy = match balance.policy {
        Policy::Random => Wire::Random,
        Policy::ConsistentHash => Wire::ConsistentHash,
        Policy::RoundRobin => Wire::RoundRobin,
        Policy::LeastLatency => Wire::LeastLatency,
    };
    let weight = |one: &Weight| control::Weight {
        place: Some(match &one.place {
            Place::Address(address) => At::Address(address.to_string()),
            Place::Node(node) => At::Node(node.to_string()),
            Place::Site(site) => At::Site(site.to_string()),
            Place::Zone(zone) => At::Zone(zone.clone()),
            Place::Region(region) => At::Region(region.clone()),
        }),
        weight: one.weight.into(),
    };
    control::Balance {
        policy: policy.into(),
        spill_over: balance.spill_over.into(),
        max_connections: balance
            .max_connections
            .map_or(0, |limit| limit.get().into()),
        sockmap: balance.sockmap,
        weights: balance.weights.iter().map(weight).collect(),
    }
}

fn encode_endpoint(endpoint: &Endpoint) -> control::Endpoint {
    control::Endpoint {
        address: endpoint.address.to_string(),
        node: text(endpoint.node.as_ref()),
        zone: endpoint.zone.clone().unwrap_or_default(),
        hostname: endpoint.hostname.clone().unwrap_or_default(),
        ready: endpoint.ready,
        serving: endpoint.serving,
        terminating: endpoint.terminating,
        hint_zones: endpoint.hints.zones.clone(),
        hint_nodes: texts(&endpoint.hints.nodes),
    }
}

fn decode_mesh(mesh: &control::MeshSettings) -> Result<MeshSettings, FieldError> {
    Ok(MeshSettings {
        id: MeshId(
            <[u8; 32]>::try_from(mesh.mesh_id.as_slice())
                .map_err(|_| bad("mesh_id", "it is not 32 bytes"))?,
        ),
        trust_domain: filled("trust_domain", &mesh.trust_domain)?,
        overlay_v4: parse("overlay_v4", &mesh.overlay_v4)?,
        cluster_domain: filled("cluster_domain", &mesh.cluster_domain)?,
        node_domain: filled("node_domain", &mesh.node_domain)?,
        mtu_bytes: u16::try_from(mesh.mtu_bytes)
            .map_err(|_| bad("mtu_bytes", format!("{} is too much", mesh.mtu_bytes)))?,
        default_action: policy::decode_default(mesh.default_action)?,
        offline_limit: match mesh.offline_limit_days {
            None => Some(LIMIT_DEFAULT),
            Some(0) => None,
            Some(days) => Some(DAY * days),
        },
    })
}

fn node_record(signed: &control::SignedNode) -> Result<control::Node, FieldError> {
    control::Node::decode(signed.record.as_slice()).map_err(|error| bad("record", error))
}

fn decode_node(node: &control::Node) -> Result<Node, FieldError> {
    Ok(Node {
        id: node_id(&node.wireguard_public_key)?,
        name: parse("name", &node.name)?,
        locality: Locality {
            site: parse_optional("site", &node.site)?,
            zone: optional(&node.zone),
            region: optional(&node.region),
        },
        overlay_v4: parse("overlay_v4", &node.overlay_v4)?,
        overlay_v6: parse("overlay_v6", &node.overlay_v6)?,
        prefixes: parse_list("prefixes", &node.prefixes)?,
        pod_prefixes: parse_list("pod_prefixes", &node.pod_prefixes)?,
        underlay_addresses: parse_list("underlay_addresses", &node.underlay_addresses)?,
        static_candidates: parse_list("static_candidates", &node.static_candidates)?,
        mapped: node
            .mapped
            .iter()
            .enumerate()
            .map(|(index, mapping)| decode_mapping(index, mapping))
            .collect::<Result<_, _>>()?,
    })
}

fn decode_mapping(index: usize, mapping: &control::Mapping) -> Result<Mapping, FieldError> {
    let field = |name: &str| format!("mapped[{index}].{name}");
    let lan: IpNet = parse(&field("lan"), &mapping.lan)?;
    let seen_as: IpNet = parse(&field("seen_as"), &mapping.seen_as)?;
    let shape = |net: &IpNet| (net.max_prefix_len(), net.prefix_len());
    if shape(&lan) != shape(&seen_as) {
        let text = format!("{seen_as} has not as many addresses as {lan}");
        return Err(bad(field("seen_as"), text));
    }
    Ok(Mapping { lan, seen_as })
}

fn decode_external_peer(peer: &control::ExternalPeer) -> Result<ExternalPeer, FieldError> {
    let keepalive = Duration::from_secs(peer.keepalive_s.into());
    Ok(ExternalPeer {
        id: node_id(&peer.wireguard_public_key)?,
        name: parse("name", &peer.name)?,
        prefixes: parse_list("prefixes", &peer.prefixes)?,
        gateway: parse("gateway", &peer.gateway)?,
        endpoint: parse_optional("endpoint", &peer.endpoint)?,
        keepalive: (!keepalive.is_zero()).then_some(keepalive),
    })
}

fn decode_relay(relay: &control::Relay) -> Result<Relay, FieldError> {
    let stun_ports = relay.stun_ports.iter().enumerate();
    Ok(Relay {
        name: parse("name", &relay.name)?,
        addresses: parse_list("addresses", &relay.addresses)?,
        quic_port: port("quic_port", relay.quic_port)?,
        tls_port: port("tls_port", relay.tls_port)?,
        stun_ports: stun_ports
            .map(|(index, &number)| port(&format!("stun_ports[{index}]"), number))
            .collect::<Result<_, _>>()?,
        node: parse_optional("node", &relay.node)?,
        sites: parse_list::<SiteName>("sites", &relay.sites)?
            .into_iter()
            .collect(),
    })
}

fn decode_service(service: &control::Service) -> Result<Service, FieldError> {
    let cluster_ips: Vec<IpAddr> = parse_list("cluster_ips", &service.cluster_ips)?;
    let kind = match (cluster_ips.is_empty(), service.external_name.as_str()) {
        (true, "") => ServiceKind::Headless,
        (false, "") => ServiceKind::ClusterIp(cluster_ips),
        (true, name) => ServiceKind::ExternalName(name.to_owned()),
        (false, _) => return Err(bad("external_name", "there are cluster_ips too")),
    };
    let mut ports = Vec::with_capacity(service.ports.len());
    for (index, raw) in service.ports.iter().enumerate() {
        let (protocol, port) = decode_port(index, raw)?;
        let node_port = (raw.node_port != 0)
            .then(|| self::port(&format!("ports[{index}].node_port"), raw.node_port))
            .transpose()?;
        ports.push(ServicePort {
            name: raw.name.clone(),
            protocol,
            port,
            node_port,
        });
    }
    let distribution = match service.traffic_distribution() {
        control::TrafficDistribution::Unspecified => None,
        control::TrafficDistribution::PreferSameZone => Some(TrafficDistribution::SameZone),
        control::TrafficDistribution::PreferSameNode => Some(TrafficDistribution::SameNode),
    };
    let affinity = Duration::from_secs(service.affinity_timeout_s.into());
    Ok(Service {
        name: service_name(&service.namespace, &service.name)?,
        kind,
        ports,
        publish_not_ready: service.publish_not_ready,
        local_only: service.local_only,
        distribution,
        affinity: (!affinity.is_zero()).then_some(affinity),
        external: External {
            addresses: parse_list("external_ips", &service.external_ips)?,
            load_balancer: parse_list("load_balancer_ips", &service.load_balancer_ips)?,
            sources: parse_list(
                "load_balancer_source_ranges",
                &service.load_balancer_source_ranges,
            )?,
            local_only: service.external_local_only,
            health_check: (service.health_check_node_port != 0)
                .then(|| port("health_check_node_port", service.health_check_node_port))
                .transpose()?,
        },
        balance: decode_balance(service.balance.as_ref())?,
    })
}

fn decode_balance(balance: Option<&control::Balance>) -> Result<Balance, FieldError> {
    use control::balance::Policy as Wire;
    let Some(balance) = balance else {
        return Ok(Balance::default());
    };
    let weights = balance.weights.iter().enumerate();
    Ok(Balance {
        policy: match balance.policy() {
            Wire::Random => Policy::Random,
            Wire::ConsistentHash => Policy::ConsistentHash,
            Wire::RoundRobin => Policy::RoundRobin,
            Wire::LeastLatency => Policy::LeastLatency,
        },
        spill_over: at_most("balance.spill_over", balance.spill_over, SPILL_OVER_MAX)?,
        max_connections: NonZeroU16::new(at_most(
            "balance.max_connections",
            balance.max_connections,
            CONNECTIONS_MAX,
        )?),
        sockmap: balance.sockmap,
        weights: weights
            .map(|(index, weight)| decode_weight(&format!("balance.weights[{index}]"), weight))
            .collect::<Result<_, _>>()?,
    })
}

fn decode_weight(field: &str, weight: &control::Weight) -> Result<Weight, FieldError> {
    use control::weight::Place as At;
    let at = |name: &str| format!("{field}.{name}");
    let place = match weight.place.as_ref() {
        None => return Err(bad(at("place"), "this version does not know it")),
        Some(At::Address(text)) => Place::Address(parse(&at("address"), text)?),
        Some(At::Node(text)) => Place::Node(parse(&at("node"), text)?),
        Some(At::Site(text)) => Place::Site(parse(&at("site"), text)?),
        Some(At::Zone(text)) => Place::Zone(filled(&at("zone"), text)?),
        Some(At::Region(text)) => Place::Region(filled(&at("region"), text)?),
    };
    let weight = at_most(&at("weight"), weight.weight, WEIGHT_MAX)?;
    if weight == 0 {
        return Err(bad(at("weight"), "it is 0"));
    }
    Ok(Weight { place, weight })
}

fn at_most(field: &str, number: u32, limit: u16) -> Result<u16, FieldError> {
    let fits = u16::try_from(number).ok().filter(|&fits| fits <= limit);
    fits.ok_or_else(|| bad(field, format!("{number} is more than {limit}")))
}

fn decode_slice(
    slice: &control::EndpointSlice,
) -> Result<(ServiceName, EndpointSlice), FieldError> {
    let mut ports = Vec::with_capacity(slice.ports.len());
    for (index, raw) in slice.ports.iter().enumerate() {
        let (protocol, port) = decode_port(index, raw)?;
        let name = raw.name.clone();
        ports.push(EndpointPort {
            name,
            protocol,
            port,
        });
    }
    // Of 100,000 endpoints, room that a growing vector has left over is 8 MB.
    let mut endpoints = Vec::with_capacity(slice.endpoints.len());
    for (index, endpoint) in slice.endpoints.iter().enumerate() {
        endpoints.push(decode_endpoint(index, endpoint)?);
    }
    let slice_checked = EndpointSlice {
        name: filled("name", &slice.name)?,
        ports,
        endpoints,
    };
    let service = service_name(&slice.namespace, &slice.service)?;
    Ok((service, slice_checked))
}

fn decode_endpoint(index: usize, endpoint: &control::Endpoint) -> Result<Endpoint, FieldError> {
    let field = |name: &str| format!("endpoints[{index}].{name}");
    Ok(Endpoint {
        address: parse(&field("address"), &endpoint.address)?,
        node: parse_optional(&field("node"), &endpoint.node)?,
        zone: optional(&endpoint.zone),
        hostname: optional(&endpoint.hostname),
        hints: Hints {
            zones: endpoint.hint_zones.clone(),
            nodes: parse_list(&field("hint_nodes"), &endpoint.hint_nodes)?,
        },
        ready: endpoint.ready,
        serving: endpoint.serving,
        terminating: endpoint.terminating,
    })
}

fn decode_port(index: usize, raw: &control::ServicePort) -> Result<(Protocol, u16), FieldError> {
    let protocol = match raw.protocol() {
        control::Protocol::Tcp => Protocol::Tcp,
        control::Protocol::Udp => Protocol::Udp,
        control::Protocol::Unspecified => {
            return Err(bad(format!("ports[{index}].protocol"), "it is not known"));
        }
    };
    Ok((protocol, port(&format!("ports[{index}].port"), raw.port)?))
}

fn service_name(namespace: &str, name: &str) -> Result<ServiceName, FieldError> {
    Ok(ServiceName {
        namespace: filled("namespace", namespace)?,
        name: filled("service", name)?,
    })
}

fn node_id(key: &[u8]) -> Result<NodeId, FieldError> {
    NodeId::try_from(key).map_err(|error| bad("wireguard_public_key", error))
}

fn port(field: &str, number: u32) -> Result<u16, FieldError> {
    match u16::try_from(number) {
        Ok(number) if number != 0 => Ok(number),
        _ => Err(bad(field, format!("{number} is not a port (1 to 65535)"))),
    }
}

fn parse<T: FromStr<Err: Display>>(field: &str, text: &str) -> Result<T, FieldError> {
    text.parse()
        .map_err(|error| bad(field, format!("{text:?}: {error}")))
}

fn parse_optional<T: FromStr<Err: Display>>(
    field: &str,
    text: &str,
) -> Result<Option<T>, FieldError> {
    (!text.is_empty()).then(|| parse(field, text)).transpose()
}

fn parse_list<T: FromStr<Err: Display>>(
    field: &str,
    texts: &[String],
) -> Result<Vec<T>, FieldError> {
    let texts = texts.iter().enumerate();
    texts
        .map(|(index, text)| parse(&format!("{field}[{index}]"), text))
        .collect()
}

fn filled(field: &str, text: &str) -> Result<String, FieldError> {
    if text.is_empty() {
        Err(bad(field, "it is empty"))
    } else {
        Ok(text.to_owned())
    }
}

fn optional(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn texts<T: ToString>(values: &[T]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

fn text<T: ToString>(value: Option<&T>) -> String {
    value.map(ToString::to_string).unwrap_or_default()
}

fn bad(field: impl Into<String>, problem: impl ToString) -> FieldError {
    FieldError {
        field: field.into(),
        problem: problem.to_string(),
    }
}

fn unknown_kind() -> FieldError {
    bad("kind", "this version does not know it")
}
