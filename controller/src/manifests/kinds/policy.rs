//! Who may speak with whom, and whom such policies select.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        core::v1 as core,
        networking::v1::{self as net, NetworkPolicyPeer, NetworkPolicyPort},
    },
    apimachinery::pkg::{apis::meta::v1 as meta, util::intstr::IntOrString},
};
use mesh_api::crd::{
    MeshPolicySpec, PolicyParty, PolicyPort, PolicyRequirement, PolicyRule, PolicySelector,
};
use mesh_core::policy::resources::{
    Action, DefaultAction, IpProtocol, LabelSelector, Labels, MeshPolicy, MeshRule, NamedPort,
    NetworkPeer, NetworkPolicy, NetworkRule, ObjectName, Operator, Party, Pod, PortMatch, Ports,
    RULES_MAX, Requirement,
};

use super::{Checked, FieldProblem, Object, ObjectId, list, optional, parse, port};

const DEFAULT_ACCOUNT: &str = "default";

pub(super) fn default_action(text: Option<&str>) -> Checked<Option<DefaultAction>> {
    match text {
        None => Ok(None),
        Some("allow") => Ok(Some(DefaultAction::Allow)),
        Some("audit") => Ok(Some(DefaultAction::Audit)),
        Some("deny") => Ok(Some(DefaultAction::Deny)),
        Some(other) => {
            let text = format!("{other:?} is not one of allow, audit and deny");
            Err(FieldProblem::new("spec.defaultAction", text))
        }
    }
}

pub(crate) fn mesh_policy(id: &ObjectId, spec: &MeshPolicySpec) -> Checked<Object> {
    check_count("spec.rules", spec.rules.len())?;
    Ok(Object::MeshPolicy(MeshPolicy {
        name: id.name.clone(),
        audit: spec.audit,
        rules: each("spec.rules", &spec.rules, mesh_rule)?,
    }))
}

fn mesh_rule(field: &str, raw: &PolicyRule) -> Checked<MeshRule> {
    let at = |name: &str| format!("{field}.{name}");
    let action = match raw.action.as_str() {
        "allow" => Action::Allow,
        "deny" => Action::Deny,
        other => {
            let text = format!("{other:?} is not one of allow and deny");
            return Err(FieldProblem::new(at("action"), text));
        }
    };
    Ok(MeshRule {
        action,
        from: each(&at("from"), &raw.from, party)?,
        to: each(&at("to"), &raw.to, party)?,
        ports: each(&at("ports"), &raw.ports, |field, port: &PolicyPort| {
            let number = port.port.map(|number| IntOrString::Int(number.into()));
            let last = port.end_port.map(i32::from);
            port_match(field, port.protocol.as_deref(), number.as_ref(), last, true)
        })?,
    })
}

fn party(field: &str, raw: &PolicyParty) -> Checked<Party> {
    let at = |name: &str| format!("{field}.{name}");
    let chosen = |name: &str, raw: &Option<PolicySelector>| {
        let raw = raw.as_ref();
        raw.map(|raw| selector(&at(name), &raw.match_labels, &raw.match_expressions))
            .transpose()
    };
    let party = Party {
        nodes: list(&at("nodes"), &raw.nodes)?,
        sites: list(&at("sites"), &raw.sites)?,
        namespaces: raw.namespaces.clone(),
        namespace_selector: chosen("namespaceSelector", &raw.namespace_selector)?,
        service_accounts: each(&at("serviceAccounts"), &raw.service_accounts, account)?,
        pod_selector: chosen("podSelector", &raw.pod_selector)?,
        cidrs: list(&at("cidrs"), &raw.cidrs)?,
    };
    if party == Party::default() {
        let text = "says nothing: leave the list out for anybody";
        return Err(FieldProblem::new(field, text));
    }
    Ok(party)
}

fn account(field: &str, text: &String) -> Checked<ObjectName> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => Ok(ObjectName {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }),
        _ => Err(FieldProblem::new(
            field,
            format!("{text:?} is not namespace/name"),
        )),
    }
}

pub(crate) fn network_policy(id: &ObjectId, raw: &net::NetworkPolicy) -> Checked<Object> {
    let spec = raw.spec.clone().unwrap_or_default();
    let egress_said = spec.egress.is_some();
    let ingress = spec.ingress.unwrap_or_default();
    let egress = spec.egress.unwrap_or_default();
    check_count("spec.ingress", ingress.len())?;
    check_count("spec.egress", egress.len())?;
    // Upstream's rule: always ingress, and egress if there are rules for it.
    let mut isolates = (true, egress_said);
    if let Some(types) = spec.policy_types {
        isolates = (false, false);
        for (index, one) in types.iter().enumerate() {
            match one.as_str() {
                "Ingress" => isolates.0 = true,
                "Egress" => isolates.1 = true,
                other => {
                    let text = format!("{other:?} is not one of Ingress and Egress");
                    return Err(FieldProblem::new(
                        format!("spec.policyTypes[{index}]"),
                        text,
                    ));
                }
            }
        }
    }
    let ingress = each("spec.ingress", &ingress, |field, rule| {
        network_rule(field, "from", rule.from.as_ref(), rule.ports.as_ref())
    })?;
    let egress = each("spec.egress", &egress, |field, rule| {
        network_rule(field, "to", rule.to.as_ref(), rule.ports.as_ref())
    })?;
    let pods = spec.pod_selector.unwrap_or_default();
    Ok(Object::NetworkPolicy(NetworkPolicy {
        name: object_name(id),
        pods: kube_selector("spec.podSelector", &pods)?,
        ingress: isolates.0.then_some(ingress),
        egress: isolates.1.then_some(egress),
    }))
}

fn network_rule(
    field: &str,
    side: &str,
    peers: Option<&Vec<NetworkPolicyPeer>>,
    ports: Option<&Vec<NetworkPolicyPort>>,
) -> Checked<NetworkRule> {
    let peers = peers.map(Vec::as_slice).unwrap_or_default();
    let ports = ports.map(Vec::as_slice).unwrap_or_default();
    Ok(NetworkRule {
        peers: each(&format!("{field}.{side}"), peers, peer)?,
        ports: each(&format!("{field}.ports"), ports, |field, port| {
            let protocol = port.protocol.as_deref();
            port_match(field, protocol, port.port.as_ref(), port.end_port, false)
        })?,
    })
}

fn peer(field: &str, raw: &NetworkPolicyPeer) -> Checked<NetworkPeer> {
    let at = |name: &str| format!("{field}.{name}");
    match (&raw.ip_block, &raw.pod_selector, &raw.namespace_selector) {
        (Some(block), None, None) => {
            let cidr: ipnet::IpNet = parse(&at("ipBlock.cidr"), &block.cidr)?;
            let except = block.except.clone().unwrap_or_default();
            let except: Vec<ipnet::IpNet> = list(&at("ipBlock.except"), &except)?;
            if let Some(outside) = except.iter().find(|out| !cidr.contains(*out)) {
                let text = format!("{outside} is not in {cidr}");
                return Err(FieldProblem::new(at("ipBlock.except"), text));
            }
            Ok(NetworkPeer::Block { cidr, except })
        }
        (None, None, None) | (Some(_), ..) => {
            let text = "says not either ipBlock or podSelector and namespaceSelector";
            Err(FieldProblem::new(field, text))
        }
        (None, pods, namespaces) => {
            let pods = pods.clone().unwrap_or_default();
            let namespaces = namespaces.as_ref();
            Ok(NetworkPeer::Pods {
                pods: kube_selector(&at("podSelector"), &pods)?,
                namespaces: namespaces
                    .map(|raw| kube_selector(&at("namespaceSelector"), raw))
                    .transpose()?,
            })
        }
    }
}

fn kube_selector(field: &str, raw: &meta::LabelSelector) -> Checked<LabelSelector> {
    let labels = raw.match_labels.clone().unwrap_or_default();
    let expressions = raw.match_expressions.iter().flatten();
    let expressions = expressions.map(|one| PolicyRequirement {
        key: one.key.clone(),
        operator: one.operator.clone(),
        values: one.values.clone().unwrap_or_default(),
    });
    selector(field, &labels, &expressions.collect::<Vec<_>>())
}

fn selector(
    field: &str,
    labels: &BTreeMap<String, String>,
    expressions: &[PolicyRequirement],
) -> Checked<LabelSelector> {
    let field = format!("{field}.matchExpressions");
    let expressions = each(&field, expressions, |field, one| {
        let operator = match one.operator.as_str() {
            "In" => Operator::In,
            "NotIn" => Operator::NotIn,
            "Exists" => Operator::Exists,
            "DoesNotExist" => Operator::DoesNotExist,
            other => {
                let text = format!("{other:?} is not one of In, NotIn, Exists and DoesNotExist");
                return Err(FieldProblem::new(format!("{field}.operator"), text));
            }
        };
        let has_values = matches!(operator, Operator::In | Operator::NotIn);
        if one.values.is_empty() == has_values {
            let text = format!("{} has values: {}", one.operator, !one.values.is_empty());
            return Err(FieldProblem::new(format!("{field}.values"), text));
        }
        Ok(Requirement {
            key: one.key.clone(),
            operator,
            values: one.values.iter().cloned().collect(),
        })
    })?;
    Ok(LabelSelector {
        labels: labels.clone(),
        expressions,
    })
}

/// A port of the mesh's own kinds may be ICMP's, which has none, and has no name.
fn port_match(
    field: &str,
    protocol: Option<&str>,
    number: Option<&IntOrString>,
    last: Option<i32>,
    with_icmp: bool,
) -> Checked<PortMatch> {
    let protocol = match protocol.unwrap_or("TCP") {
        "TCP" => IpProtocol::Tcp,
        "UDP" => IpProtocol::Udp,
        "SCTP" => IpProtocol::Sctp,
        "ICMP" if with_icmp => IpProtocol::Icmp,
        other => {
            let icmp = if with_icmp { ", ICMP" } else { "" };
            let text = format!("{other:?} is not one of TCP, UDP, SCTP{icmp}");
            return Err(FieldProblem::new(format!("{field}.protocol"), text));
        }
    };
    let at = |name: &str| format!("{field}.{name}");
    let ports = match (number, last) {
        (None, None) => Ports::All,
        (Some(_), _) if protocol == IpProtocol::Icmp => {
            return Err(FieldProblem::new(at("port"), "ICMP has no ports"));
        }
        (Some(IntOrString::Int(first)), last) => {
            let first = port(&at("port"), *first)?;
            let last = match last {
                None => first,
                Some(last) => port(&at("endPort"), last)?,
            };
            if last < first {
                let text = format!("{last} is less than port {first}");
                return Err(FieldProblem::new(at("endPort"), text));
            }
            Ports::Range(first, last)
        }
        (Some(IntOrString::String(name)), None) if !name.is_empty() => Ports::Named(name.clone()),
        (None | Some(IntOrString::String(_)), _) => {
            let text = "goes with a number in port alone";
            return Err(FieldProblem::new(at("endPort"), text));
        }
    };
    Ok(PortMatch { protocol, ports })
}

pub(crate) fn pod(id: &ObjectId, raw: &core::Pod) -> Checked<Object> {
    let status = raw.status.clone().unwrap_or_default();
    let spec = raw.spec.clone().unwrap_or_default();
    let several = status.pod_ips.unwrap_or_default().into_iter();
    let mut addresses: Vec<String> = several.map(|one| one.ip).collect();
    if addresses.is_empty() {
        addresses.extend(status.pod_ip);
    }
    // The addresses of a pod that ended may be another's by now.
    let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    if ended || addresses.is_empty() {
        return Ok(Object::Pod(None));
    }
    let mut ports = Vec::new();
    for (index, container) in spec.containers.iter().enumerate() {
        for (number, raw) in container.ports.iter().flatten().enumerate() {
            let field = format!("spec.containers[{index}].ports[{number}]");
            if let Some(name) = &raw.name {
                let protocol = port_match(&field, raw.protocol.as_deref(), None, None, false)?;
                ports.push(NamedPort {
                    name: name.clone(),
                    protocol: protocol.protocol,
                    port: port(&format!("{field}.containerPort"), raw.container_port)?,
                });
            }
        }
    }
    Ok(Object::Pod(Some(Pod {
        name: object_name(id),
        labels: raw.metadata.labels.clone().unwrap_or_default(),
        service_account: spec
            .service_account_name
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| DEFAULT_ACCOUNT.to_owned()),
        node: optional("spec.nodeName", spec.node_name.as_deref())?,
        addresses: list("status.podIPs", &addresses)?,
        host_network: spec.host_network.unwrap_or(false),
        ports,
    })))
}

pub(crate) fn namespace(id: &ObjectId, raw: core::Namespace) -> Object {
    let labels: Labels = raw.metadata.labels.unwrap_or_default();
    Object::Namespace(id.name.clone(), labels)
}

fn object_name(id: &ObjectId) -> ObjectName {
    ObjectName {
        namespace: id.namespace.clone(),
        name: id.name.clone(),
    }
}

fn each<T, U>(field: &str, all: &[T], check: impl Fn(&str, &T) -> Checked<U>) -> Checked<Vec<U>> {
    let all = all.iter().enumerate();
    all.map(|(index, one)| check(&format!("{field}[{index}]"), one))
        .collect()
}

fn check_count(field: &str, count: usize) -> Checked<()> {
    if count > RULES_MAX {
        let text = format!("are {count}, more than {RULES_MAX}");
        return Err(FieldProblem::new(field, text));
    }
    Ok(())
}
