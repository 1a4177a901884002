//! Each kind: from Kubernetes' types to the core's, checked field by field.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
    net::IpAddr,
    str::FromStr,
    time::Duration,
};

use ipnet::IpNet;
use k8s_openapi::api::{
    core::v1::Node,
    discovery::v1::{Endpoint as KubeEndpoint, EndpointSlice as KubeSlice},
};
use mesh_api::crd::{
    COMMUNITY_SITES_MAX, CONFIG_NAME, CommunitySpec, ExternalPeerSpec, MeshConfigSpec,
    MeshNodeSpec, MeshRelaySpec, SITE_LABEL, SiteRouteSpec, Subnet,
};
use mesh_core::offline::limit::LIMIT_DAYS_MAX;
use mesh_core::snapshot::{
    DEFAULT_MTU_BYTES, Endpoint, EndpointPort, EndpointSlice, ExternalPeer, Hints, Locality,
    Mapping, Protocol, Relay, ServiceName,
};
use mesh_identity::authority::check_trust_domain;
use mesh_wire::id::{NodeName, SiteName};

use super::{Config, NodeFacts, Object, ObjectId, parse::FieldProblem};

pub(crate) use self::{
    balance::mesh_service,
    policy::{mesh_policy, namespace, network_policy, pod},
    service::service,
};

mod balance;
mod policy;
mod service;

type Checked<T> = Result<T, FieldProblem>;

/// Largest MTU of the overlay: a jumbo frame's, without WireGuard's overhead.
const MTU_BYTES_MAX: u16 = 8920;

const DEFAULT_HTTPS_PORT: u16 = 443;

/// STUN's own port (RFC 8489 §18.6).
const DEFAULT_STUN_PORT: u16 = 3478;

const SERVICE_LABEL: &str = "kubernetes.io/service-name";
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
const REGION_LABEL: &str = "topology.kubernetes.io/region";

pub(crate) fn slice(id: &ObjectId, slice: &KubeSlice) -> Checked<Object> {
    let labels = slice.metadata.labels.as_ref();
    let service = labels.and_then(|labels| labels.get(SERVICE_LABEL));
    let service = service.ok_or_else(|| {
        FieldProblem::new("metadata.labels", format!("{SERVICE_LABEL} is missing"))
    })?;
    if service.is_empty() || service.contains('/') {
        let field = format!("metadata.labels[{SERVICE_LABEL}]");
        let text = format!("{service:?} is not the name of a service");
        return Err(FieldProblem::new(field, text));
    }
    let v4 = match slice.address_type.as_str() {
        "IPv4" => true,
        "IPv6" => false,
        other => {
            let text = format!("{other:?} is not one of IPv4 and IPv6");
            return Err(FieldProblem::new("addressType", text));
        }
    };
    let mut ports = Vec::new();
    for (index, raw) in slice.ports.iter().flatten().enumerate() {
        let field = format!("ports[{index}]");
        let number = raw.port.ok_or_else(|| {
            FieldProblem::new(format!("{field}.port"), "missing: name one port each")
        })?;
        ports.push(EndpointPort {
            name: raw.name.clone().unwrap_or_default(),
            protocol: protocol(&field, raw.protocol.as_deref())?,
            port: port(&format!("{field}.port"), number)?,
        });
    }
    let endpoints = slice.endpoints.iter().enumerate();
    let endpoints = endpoints
        .map(|(index, raw)| endpoint(&format!("endpoints[{index}]"), raw, v4))
        .collect::<Checked<_>>()?;
    let service = ServiceName {
        namespace: id.namespace.clone(),
        name: service.clone(),
    };
    let slice = EndpointSlice {
        name: id.name.clone(),
        ports,
        endpoints,
    };
    Ok(Object::Slice(service, slice))
}

/// Only the first address counts, as for kube-proxy: the others have no defined meaning.
fn endpoint(field: &str, raw: &KubeEndpoint, v4: bool) -> Checked<Endpoint> {
    let at = format!("{field}.addresses[0]");
    let text = raw.addresses.first();
    let text = text.ok_or_else(|| FieldProblem::new(&at, "missing"))?;
    let address: IpAddr = parse(&at, text)?;
    if address.is_ipv4() != v4 {
        return Err(FieldProblem::new(
            &at,
            format!("{text} is not of the slice's addressType"),
        ));
    }
    let conditions = raw.conditions.clone().unwrap_or_default();
    // Absent means ready, and serving follows ready (the API's own rule).
    let ready = conditions.ready.unwrap_or(true);
    let hints = raw.hints.clone().unwrap_or_default();
    let zones = hints.for_zones.into_iter().flatten();
    let nodes = hints.for_nodes.into_iter().flatten();
    let nodes: Vec<String> = nodes.map(|node| node.name).collect();
    Ok(Endpoint {
        address,
        node: optional(&format!("{field}.nodeName"), raw.node_name.as_deref())?,
        zone: raw.zone.clone().filter(|zone| !zone.is_empty()),
        hostname: raw.hostname.clone().filter(|name| !name.is_empty()),
        hints: Hints {
            zones: zones.map(|zone| zone.name).collect(),
            nodes: list(&format!("{field}.hints.forNodes"), &nodes)?,
        },
        ready,
        serving: conditions.serving.unwrap_or(ready),
        terminating: conditions.terminating.unwrap_or(false),
    })
}

pub(crate) fn node(id: &ObjectId, node: &Node) -> Checked<Object> {
    let empty = BTreeMap::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&empty);
    let label = |name: &str| labels.get(name).filter(|text| !text.is_empty()).cloned();
    let site = label(SITE_LABEL);
    let spec = node.spec.as_ref();
    let cidrs = spec
        .and_then(|spec| spec.pod_cidrs.clone())
        .unwrap_or_default();
    let single = spec.and_then(|spec| spec.pod_cidr.clone());
    let cidrs = if cidrs.is_empty() {
        single.into_iter().collect()
    } else {
        cidrs
    };
    let addresses = node
        .status
        .as_ref()
        .and_then(|status| status.addresses.as_ref());
    let mut underlay_addresses = Vec::new();
    for (index, address) in addresses.into_iter().flatten().enumerate() {
        if matches!(address.type_.as_str(), "InternalIP" | "ExternalIP") {
            let field = format!("status.addresses[{index}].address");
            underlay_addresses.push(parse(&field, &address.address)?);
        }
    }
    Ok(Object::Node(NodeFacts {
        name: parse("metadata.name", &id.name)?,
        overlay_v4: None,
        locality: Locality {
            site: optional(&format!("metadata.labels[{SITE_LABEL}]"), site.as_deref())?,
            zone: label(ZONE_LABEL),
            region: label(REGION_LABEL),
        },
        prefixes: list("spec.podCIDRs", &cidrs)?,
        underlay_addresses,
        static_candidates: Vec::new(),
        approved: false,
    }))
}

pub(crate) fn mesh_node(id: &ObjectId, spec: &MeshNodeSpec) -> Checked<Object> {
    Ok(Object::MeshNode(NodeFacts {
        name: parse("metadata.name", &id.name)?,
        overlay_v4: optional("spec.overlayIPv4", spec.overlay_ipv4.as_deref())?,
        locality: Locality {
            site: optional("spec.site", spec.site.as_deref())?,
            zone: spec.zone.clone(),
            region: spec.region.clone(),
        },
        prefixes: list("spec.prefixes", &spec.prefixes)?,
        underlay_addresses: Vec::new(),
        static_candidates: list("spec.staticCandidates", &spec.static_candidates)?,
        approved: spec.approved,
    }))
}

pub(crate) fn relay(id: &ObjectId, spec: &MeshRelaySpec) -> Checked<Object> {
    let or_https =
        |field: &str, given: Option<u16>| port(field, given.unwrap_or(DEFAULT_HTTPS_PORT).into());
    let quic_port = or_https("spec.quicPort", spec.quic_port)?;
    if spec.addresses.is_empty() {
        return Err(FieldProblem::new(
            "spec.addresses",
            "empty: nobody could reach it",
        ));
    }
    let stun_ports = spec.stun_ports.clone();
    let stun_ports = stun_ports.unwrap_or_else(|| vec![quic_port, DEFAULT_STUN_PORT]);
    for (index, &number) in stun_ports.iter().enumerate() {
        port(&format!("spec.stunPorts[{index}]"), number.into())?;
    }
    let sites: Vec<SiteName> = list("spec.sites", &spec.sites)?;
    Ok(Object::Relay(Relay {
        name: parse("metadata.name", &id.name)?,
        addresses: list("spec.addresses", &spec.addresses)?,
        quic_port,
        tls_port: or_https("spec.tlsPort", spec.tls_port)?,
        stun_ports,
        node: optional("spec.node", spec.node.as_deref())?,
        sites: sites.into_iter().collect(),
    }))
}

pub(crate) fn external_peer(id: &ObjectId, spec: &ExternalPeerSpec) -> Checked<Object> {
    let keepalive = spec.keepalive_seconds.filter(|&seconds| seconds != 0);
    if spec.addresses.is_empty() {
        return Err(FieldProblem::new(
            "spec.addresses",
            "empty: nothing would lead to it",
        ));
    }
    Ok(Object::ExternalPeer(ExternalPeer {
        id: parse("spec.publicKey", &spec.public_key)?,
        name: parse("metadata.name", &id.name)?,
        prefixes: list("spec.addresses", &spec.addresses)?,
        gateway: parse("spec.gateway", &spec.gateway)?,
        endpoint: optional("spec.endpoint", spec.endpoint.as_deref())?,
        keepalive: keepalive.map(|seconds| Duration::from_secs(seconds.into())),
    }))
}

pub(crate) fn config(id: &ObjectId, spec: &MeshConfigSpec) -> Checked<Object> {
    if id.name != CONFIG_NAME {
        let text = format!("the only MeshConfig is named {CONFIG_NAME}");
        return Err(FieldProblem::new("metadata.name", text));
    }
    let domain = |field: &str, text: &Option<String>| match text {
        None => Ok(None),
        Some(text) => match check_trust_domain(text) {
            Ok(()) => Ok(Some(text.clone())),
            Err(_) => Err(FieldProblem::new(
                field,
                format!("{text:?} is not a DNS zone"),
            )),
        },
    };
    let mtu = DEFAULT_MTU_BYTES..=MTU_BYTES_MAX;
    if let Some(bytes) = spec.mtu_bytes.filter(|bytes| !mtu.contains(bytes)) {
        let text = format!("{bytes} is not in {DEFAULT_MTU_BYTES} to {MTU_BYTES_MAX}");
        return Err(FieldProblem::new("spec.mtuBytes", text));
    }
    if let Some(days) = spec
        .offline_limit_days
        .filter(|days| *days > LIMIT_DAYS_MAX)
    {
        let text = format!("{days} is not in 0 (for ever) to {LIMIT_DAYS_MAX}");
        return Err(FieldProblem::new("spec.offlineLimitDays", text));
    }
    Ok(Object::Config(Config {
        overlay_v4: optional("spec.overlayIPv4CIDR", spec.overlay_ipv4_cidr.as_deref())?,
        cluster_domain: domain("spec.clusterDomain", &spec.cluster_domain)?,
        node_domain: domain("spec.nodeDomain", &spec.node_domain)?,
        mtu_bytes: spec.mtu_bytes,
        default_action: policy::default_action(spec.default_action.as_deref())?,
        offline_limit_days: spec.offline_limit_days,
        manual_approval: match spec.join_approval.as_deref() {
            None | Some("automatic") => false,
            Some("manual") => true,
            Some(other) => {
                let text = format!("{other:?} is not one of automatic and manual");
                return Err(FieldProblem::new("spec.joinApproval", text));
            }
        },
    }))
}

pub(crate) fn site_route(_: &ObjectId, spec: &SiteRouteSpec) -> Checked<Object> {
    let gateways: BTreeSet<NodeName> = list("spec.gateways", &spec.gateways)?.into_iter().collect();
    if gateways.is_empty() {
        let text = "empty: nothing would lead to the subnets";
        return Err(FieldProblem::new("spec.gateways", text));
    }
    let subnets = spec.subnets.iter().enumerate();
    let subnets = subnets.map(|(index, subnet)| mapping(&format!("spec.subnets[{index}]"), subnet));
    let subnets = subnets.collect::<Checked<_>>()?;
    Ok(Object::Route(gateways.into_iter().collect(), subnets))
}

/// A subnet that nobody maps is seen as what it is.
fn mapping(field: &str, subnet: &Subnet) -> Checked<Mapping> {
    let lan: IpNet = parse(&format!("{field}.subnet"), &subnet.subnet)?;
    let field = format!("{field}.mappedTo");
    let seen_as: Option<IpNet> = optional(&field, subnet.mapped_to.as_deref())?;
    let seen_as = seen_as.unwrap_or(lan);
    let shape = |net: IpNet| (net.max_prefix_len(), net.prefix_len());
    if shape(seen_as) != shape(lan) {
        let text = format!("{seen_as} has not as many addresses as {lan}");
        return Err(FieldProblem::new(field, text));
    }
    Ok(Mapping {
        lan: lan.trunc(),
        seen_as: seen_as.trunc(),
    })
}

pub(crate) fn community(id: &ObjectId, spec: &CommunitySpec) -> Checked<Object> {
    let sites: Vec<SiteName> = list("spec.sites", &spec.sites)?;
    if sites.is_empty() {
        let text = "empty: a community of nobody would keep all sites from connecting directly";
        return Err(FieldProblem::new("spec.sites", text));
    }
    if sites.len() > COMMUNITY_SITES_MAX {
        let text = format!("{} sites; the limit is {COMMUNITY_SITES_MAX}", sites.len());
        return Err(FieldProblem::new("spec.sites", text));
    }
    let sites = sites.into_iter().collect();
    Ok(Object::Community(id.name.clone(), sites))
}

fn protocol(field: &str, text: Option<&str>) -> Checked<Protocol> {
    match text.unwrap_or("TCP") {
        "TCP" => Ok(Protocol::Tcp),
        "UDP" => Ok(Protocol::Udp),
        other => {
            let text = format!("{other:?} is not one of TCP and UDP");
            Err(FieldProblem::new(format!("{field}.protocol"), text))
        }
    }
}

fn port(field: &str, number: i32) -> Checked<u16> {
    match u16::try_from(number) {
        Ok(number) if number != 0 => Ok(number),
        _ => Err(FieldProblem::new(
            field,
            format!("{number} is not a port (1 to 65535)"),
        )),
    }
}

fn parse<T: FromStr<Err: Display>>(field: &str, text: &str) -> Checked<T> {
    text.parse()
        .map_err(|error| FieldProblem::new(field, format!("{text:?}: {error}")))
}

fn optional<T: FromStr<Err: Display>>(field: &str, text: Option<&str>) -> Checked<Option<T>> {
    text.map(|text| parse(field, text)).transpose()
}

fn list<T: FromStr<Err: Display>>(field: &str, texts: &[String]) -> Checked<Vec<T>> {
    let texts = texts.iter().enumerate();
    texts
        .map(|(index, text)| parse(&format!("{field}[{index}]"), text))
        .collect()
}
