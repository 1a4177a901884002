//! `v1 Service`.

use std::{net::IpAddr, time::Duration};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Service as KubeService, ServiceSpec, ServiceStatus};
use mesh_core::snapshot::{
    External, Protocol, Service, ServiceKind, ServiceName, ServicePort, TrafficDistribution,
};
use mesh_identity::authority::check_trust_domain;

use super::{
    Checked, FieldProblem, Object, ObjectId, balance::by_annotations, parse, port, protocol,
};

/// Set by somebody who wants the service left to another proxy.
const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";

/// Default of `sessionAffinityConfig.clientIP.timeoutSeconds`, and its largest value: three hours
/// and a day (Kubernetes' API of Service).
const AFFINITY_DEFAULT_S: i32 = 10_800;
const AFFINITY_MAX_S: i32 = 86_400;

pub(crate) fn service(id: &ObjectId, service: &KubeService) -> Checked<Object> {
    let labels = service.metadata.labels.as_ref();
    if labels.is_some_and(|labels| labels.contains_key(PROXY_NAME_LABEL)) {
        return Ok(Object::Service(None));
    }
    let spec = service
        .spec
        .as_ref()
        .ok_or_else(|| FieldProblem::new("spec", "missing"))?;
    let kind = match kind_of(spec) {
        "ExternalName" => ServiceKind::ExternalName(external_name(spec.external_name.as_deref())?),
        "ClusterIP" | "NodePort" | "LoadBalancer" => {
            cluster_ips(spec.cluster_ip.as_deref(), spec.cluster_ips.as_deref())?
        }
        other => {
            let text = format!(
                "{other:?} is not one of ClusterIP, NodePort, LoadBalancer and ExternalName"
            );
            return Err(FieldProblem::new("spec.type", text));
        }
    };
    let internal = spec.internal_traffic_policy.as_deref();
    let internal = internal.unwrap_or("Cluster");
    Ok(Object::Service(Some(Service {
        name: ServiceName {
            namespace: id.namespace.clone(),
            name: id.name.clone(),
        },
        kind,
        ports: ports(spec)?,
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        local_only: policy("spec.internalTrafficPolicy", internal)?,
        distribution: distribution(spec.traffic_distribution.as_deref())?,
        affinity: affinity(spec)?,
        external: external(spec, service.status.as_ref())?,
        balance: by_annotations(service.metadata.annotations.as_ref())?,
    })))
}

fn ports(spec: &ServiceSpec) -> Checked<Vec<ServicePort>> {
    let mut ports: Vec<ServicePort> = Vec::new();
    for (index, raw) in spec.ports.iter().flatten().enumerate() {
        let field = format!("spec.ports[{index}]");
        let name = raw.name.clone().unwrap_or_default();
        if ports.iter().any(|port| port.name == name) {
            let text = format!("{name:?} is the name of an earlier port too");
            return Err(FieldProblem::new(format!("{field}.name"), text));
        }
        let checked = ServicePort {
            name,
            protocol: protocol(&field, raw.protocol.as_deref())?,
            port: port(&format!("{field}.port"), raw.port)?,
            node_port: node_port(&format!("{field}.nodePort"), spec, raw.node_port)?,
        };
        let taken = |other: &ServicePort| {
            (other.node_port, other.protocol) == (checked.node_port, checked.protocol)
        };
        if checked.node_port.is_some() && ports.iter().any(taken) {
            let text = "is the node port of an earlier port too";
            return Err(FieldProblem::new(format!("{field}.nodePort"), text));
        }
        ports.push(checked);
    }
    Ok(ports)
}

/// An API server gives out node ports by itself; in a folder, whoever wants one names it.
fn node_port(field: &str, spec: &ServiceSpec, given: Option<i32>) -> Checked<Option<u16>> {
    let given = given.filter(|&number| number != 0);
    match (kind_of(spec), given) {
        ("NodePort", None) => {
            let text = "missing: give a port (nobody here hands out ports)";
            Err(FieldProblem::new(field, text))
        }
        ("NodePort" | "LoadBalancer", Some(number)) => port(field, number).map(Some),
        (_, Some(_)) => {
            let text = "is only for the types NodePort and LoadBalancer";
            Err(FieldProblem::new(field, text))
        }
        (_, None) => Ok(None),
    }
}

fn kind_of(spec: &ServiceSpec) -> &str {
    spec.type_.as_deref().unwrap_or("ClusterIP")
}

fn external(spec: &ServiceSpec, status: Option<&ServiceStatus>) -> Checked<External> {
    let given = spec.external_ips.as_deref().unwrap_or_default();
    let given = given.iter().enumerate();
    let addresses = given
        .map(|(index, text)| outside_address(&format!("spec.externalIPs[{index}]"), text))
        .collect::<Checked<Vec<_>>>()?;
    let is_external = kind_of(spec) != "ClusterIP" || !addresses.is_empty();
    let local_only = match spec.external_traffic_policy.as_deref() {
        None => false,
        Some("Cluster" | "Local") if !is_external => {
            let text = "there is no address outside: give type NodePort or LoadBalancer, or \
                        externalIPs";
            return Err(FieldProblem::new("spec.externalTrafficPolicy", text));
        }
        Some(text) => policy("spec.externalTrafficPolicy", text)?,
    };
    Ok(External {
        addresses,
        load_balancer: load_balancer(status)?,
        sources: sources(spec)?,
        local_only,
        health_check: health_check(spec, local_only)?,
    })
}

/// An API server gives one out by itself; in a folder, whoever wants one names it.
fn health_check(spec: &ServiceSpec, local_only: bool) -> Checked<Option<u16>> {
    const FIELD: &str = "spec.healthCheckNodePort";
    let given = spec.health_check_node_port.filter(|&number| number != 0);
    let Some(number) = given else {
        return Ok(None);
    };
    if kind_of(spec) != "LoadBalancer" || !local_only {
        let text = "is only for the type LoadBalancer with externalTrafficPolicy Local";
        return Err(FieldProblem::new(FIELD, text));
    }
    let number = port(FIELD, number)?;
    let taken =
        |other: &ServicePort| other.node_port == Some(number) && other.protocol == Protocol::Tcp;
    if ports(spec)?.iter().any(taken) {
        return Err(FieldProblem::new(FIELD, "is the node port of a port too"));
    }
    Ok(Some(number))
}

/// Addresses with `ipMode: Proxy` are left to the load balancer: it ends the connection, or speaks
/// the PROXY protocol, and a short cut past it would lose that.
fn load_balancer(status: Option<&ServiceStatus>) -> Checked<Vec<IpAddr>> {
    let status = status.and_then(|status| status.load_balancer.as_ref());
    let ingress = status.and_then(|status| status.ingress.as_deref());
    let mut addresses = Vec::new();
    for (index, one) in ingress.unwrap_or_default().iter().enumerate() {
        let field = format!("status.loadBalancer.ingress[{index}]");
        match (one.ip.as_deref(), one.ip_mode.as_deref().unwrap_or("VIP")) {
            (None | Some(""), _) => {} // By name: that leads to the load balancer itself.
            (Some(text), "VIP") => addresses.push(outside_address(&format!("{field}.ip"), text)?),
            (Some(_), "Proxy") => {}
            (Some(_), other) => {
                let text = format!("{other:?} is not one of VIP and Proxy");
                return Err(FieldProblem::new(format!("{field}.ipMode"), text));
            }
        }
    }
    Ok(addresses)
}

/// Kubernetes' API takes no others either (`ValidateNonSpecialIP`): they mean something on every
/// node already.
fn outside_address(field: &str, text: &str) -> Checked<IpAddr> {
    let address: IpAddr = parse(field, text)?;
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if link_local || address.is_unspecified() || address.is_loopback() || address.is_multicast() {
        let text = format!("{address} is unspecified, loopback, link-local or multicast");
        return Err(FieldProblem::new(field, text));
    }
    Ok(address)
}

fn sources(spec: &ServiceSpec) -> Checked<Vec<IpNet>> {
    let given = spec.load_balancer_source_ranges.as_deref();
    let given = given.unwrap_or_default();
    if !given.is_empty() && kind_of(spec) != "LoadBalancer" {
        let text = "is only for the type LoadBalancer";
        return Err(FieldProblem::new("spec.loadBalancerSourceRanges", text));
    }
    let given = given.iter().enumerate();
    given
        .map(|(index, text)| {
            let field = format!("spec.loadBalancerSourceRanges[{index}]");
            // The API server takes white space around them, and so does kube-proxy.
            parse(&field, text.trim())
        })
        .collect()
}

/// Whether `policy` is `Local`.
fn policy(field: &str, policy: &str) -> Checked<bool> {
    match policy {
        "Cluster" => Ok(false),
        "Local" => Ok(true),
        other => {
            let text = format!("{other:?} is not one of Cluster and Local");
            Err(FieldProblem::new(field, text))
        }
    }
}

fn distribution(text: Option<&str>) -> Checked<Option<TrafficDistribution>> {
    match text {
        None => Ok(None),
        Some("PreferSameZone" | "PreferClose") => Ok(Some(TrafficDistribution::SameZone)),
        Some("PreferSameNode") => Ok(Some(TrafficDistribution::SameNode)),
        Some(other) => {
            let text =
                format!("{other:?} is not one of PreferSameZone, PreferSameNode and PreferClose");
            Err(FieldProblem::new("spec.trafficDistribution", text))
        }
    }
}

fn affinity(spec: &ServiceSpec) -> Checked<Option<Duration>> {
    match spec.session_affinity.as_deref().unwrap_or("None") {
        "None" => return Ok(None),
        "ClientIP" => {}
        other => {
            let text = format!("{other:?} is not one of None and ClientIP");
            return Err(FieldProblem::new("spec.sessionAffinity", text));
        }
    }
    let config = spec.session_affinity_config.as_ref();
    let client = config.and_then(|config| config.client_ip.as_ref());
    let timeout_s = client.and_then(|client| client.timeout_seconds);
    let timeout_s = timeout_s.unwrap_or(AFFINITY_DEFAULT_S);
    match u64::try_from(timeout_s) {
        Ok(seconds) if (1..=AFFINITY_MAX_S).contains(&timeout_s) => {
            Ok(Some(Duration::from_secs(seconds)))
        }
        _ => Err(FieldProblem::new(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            format!("{timeout_s} is not in 1 to {AFFINITY_MAX_S}"),
        )),
    }
}

fn external_name(name: Option<&str>) -> Checked<String> {
    let name = name.unwrap_or_default();
    let text = name.trim_end_matches('.').to_ascii_lowercase();
    check_trust_domain(&text).map_err(|_| {
        FieldProblem::new("spec.externalName", format!("{name:?} is not a host name"))
    })?;
    Ok(text)
}

fn cluster_ips(one: Option<&str>, all: Option<&[String]>) -> Checked<ServiceKind> {
    let texts: Vec<(String, &str)> = match all {
        Some(all) if !all.is_empty() => all
            .iter()
            .enumerate()
            .map(|(index, text)| (format!("spec.clusterIPs[{index}]"), text.as_str()))
            .collect(),
        _ => one
            .iter()
            .map(|&text| ("spec.clusterIP".to_owned(), text))
            .collect(),
    };
    if let [(_, "None")] = texts.as_slice() {
        return Ok(ServiceKind::Headless);
    }
    let mut addresses: Vec<IpAddr> = Vec::new();
    for (field, text) in texts.iter().filter(|(_, text)| !text.is_empty()) {
        let address: IpAddr = parse(field, text)?;
        if addresses
            .iter()
            .any(|other| other.is_ipv4() == address.is_ipv4())
        {
            return Err(FieldProblem::new(
                field,
                "is a second address of its family",
            ));
        }
        addresses.push(address);
    }
    if addresses.is_empty() {
        let text = "missing: give an address, or None (nobody here hands out addresses)";
        return Err(FieldProblem::new("spec.clusterIP", text));
    }
    Ok(ServiceKind::ClusterIp(addresses))
}
