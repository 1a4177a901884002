//! Policies, and what they select by. What this version does not know makes a policy broken: it is
//! left out with a problem, never read as something else.

use mesh_core::policy::resources::{
    Action, DefaultAction, IpProtocol, LabelSelector, Labels, MeshPolicy, MeshRule, NamedPort,
    NetworkPeer, NetworkPolicy, NetworkRule, ObjectName, Operator, Party, Pod, PortMatch, Ports,
    RULES_MAX, Requirement,
};

use super::{
    FieldError, bad, filled, optional, parse, parse_list, parse_optional, port, text, texts, wrap,
};
use crate::control::{
    self, PolicyPort, PolicyProtocol, Resource, label_selector::requirement::Operator as WireOp,
    mesh_policy as wire, network_policy as net, resource::Kind,
};

/// The resource of a pod.
#[must_use]
pub fn pod_resource(pod: &Pod) -> Resource {
    let ports = pod.ports.iter().map(|port| PolicyPort {
        protocol: encode_protocol(port.protocol).into(),
        name: port.name.clone(),
        first: port.port.into(),
        last: port.port.into(),
    });
    wrap(Kind::Pod(control::Pod {
        namespace: pod.name.namespace.clone(),
        name: pod.name.name.clone(),
        labels: pod.labels.clone(),
        service_account: pod.service_account.clone(),
        node: text(pod.node.as_ref()),
        addresses: texts(&pod.addresses),
        host_network: pod.host_network,
        ports: ports.collect(),
    }))
}

/// The resource of a namespace.
#[must_use]
pub fn namespace_resource(name: &str, labels: &Labels) -> Resource {
    wrap(Kind::Namespace(control::Namespace {
        name: name.to_owned(),
        labels: labels.clone(),
    }))
}

/// The resource of a `NetworkPolicy`.
#[must_use]
pub fn network_policy_resource(policy: &NetworkPolicy) -> Resource {
    let side = |rules: &Option<Vec<NetworkRule>>| {
        let rules = rules.as_ref()?.iter().map(|rule| net::Rule {
            peers: rule.peers.iter().map(encode_peer).collect(),
            ports: rule.ports.iter().map(encode_port).collect(),
        });
        Some(net::Side {
            rules: rules.collect(),
        })
    };
    wrap(Kind::NetworkPolicy(control::NetworkPolicy {
        namespace: policy.name.namespace.clone(),
        name: policy.name.name.clone(),
        pods: Some(encode_selector(&policy.pods)),
        ingress: side(&policy.ingress),
        egress: side(&policy.egress),
    }))
}

/// The resource of a `MeshPolicy`.
#[must_use]
pub fn mesh_policy_resource(policy: &MeshPolicy) -> Resource {
    let parties = |parties: &[Party]| parties.iter().map(encode_party).collect();
    let rules = policy.rules.iter().map(|rule| wire::Rule {
        action: match rule.action {
            Action::Allow => wire::Action::Allow,
            Action::Deny => wire::Action::Deny,
        }
        .into(),
        from: parties(&rule.from),
        to: parties(&rule.to),
        ports: rule.ports.iter().map(encode_port).collect(),
    });
    wrap(Kind::MeshPolicy(control::MeshPolicy {
        name: policy.name.clone(),
        audit: policy.audit,
        rules: rules.collect(),
    }))
}

pub(super) fn encode_default(action: DefaultAction) -> control::DefaultAction {
    match action {
        DefaultAction::Allow => control::DefaultAction::AllowAll,
        DefaultAction::Audit => control::DefaultAction::AuditAll,
        DefaultAction::Deny => control::DefaultAction::DenyAll,
    }
}

pub(super) fn decode_default(number: i32) -> Result<DefaultAction, FieldError> {
    match control::DefaultAction::try_from(number) {
        Ok(control::DefaultAction::AllowAll) => Ok(DefaultAction::Allow),
        Ok(control::DefaultAction::AuditAll) => Ok(DefaultAction::Audit),
        Ok(control::DefaultAction::DenyAll) => Ok(DefaultAction::Deny),
        Err(_) => Err(unknown("default_action")),
    }
}

fn encode_party(party: &Party) -> wire::Party {
    let accounts = party.service_accounts.iter().map(|account| wire::Account {
        namespace: account.namespace.clone(),
        name: account.name.clone(),
    });
    wire::Party {
        nodes: texts(&party.nodes),
        sites: texts(&party.sites),
        namespaces: party.namespaces.clone(),
        namespace_selector: party.namespace_selector.as_ref().map(encode_selector),
        service_accounts: accounts.collect(),
        pod_selector: party.pod_selector.as_ref().map(encode_selector),
        cidrs: texts(&party.cidrs),
    }
}

fn encode_peer(peer: &NetworkPeer) -> net::Peer {
    match peer {
        NetworkPeer::Pods { pods, namespaces } => net::Peer {
            pods: Some(encode_selector(pods)),
            namespaces: namespaces.as_ref().map(encode_selector),
            ..net::Peer::default()
        },
        NetworkPeer::Block { cidr, except } => net::Peer {
            cidr: cidr.to_string(),
            except: texts(except),
            ..net::Peer::default()
        },
    }
}

fn encode_selector(selector: &LabelSelector) -> control::LabelSelector {
    let expressions = selector.expressions.iter();
    let expressions = expressions.map(|one| control::label_selector::Requirement {
        key: one.key.clone(),
        operator: match one.operator {
            Operator::In => WireOp::In,
            Operator::NotIn => WireOp::NotIn,
            Operator::Exists => WireOp::Exists,
            Operator::DoesNotExist => WireOp::DoesNotExist,
        }
        .into(),
        values: one.values.iter().cloned().collect(),
    });
    control::LabelSelector {
        labels: selector.labels.clone(),
        expressions: expressions.collect(),
    }
}

fn encode_port(port: &PortMatch) -> PolicyPort {
    let (name, first, last) = match &port.ports {
        Ports::All => (String::new(), 0, u16::MAX),
        Ports::Range(first, last) => (String::new(), *first, *last),
        Ports::Named(name) => (name.clone(), 0, 0),
    };
    PolicyPort {
        protocol: encode_protocol(port.protocol).into(),
        name,
        first: first.into(),
        last: last.into(),
    }
}

fn encode_protocol(protocol: IpProtocol) -> PolicyProtocol {
    match protocol {
        IpProtocol::Tcp => PolicyProtocol::PolicyTcp,
        IpProtocol::Udp => PolicyProtocol::PolicyUdp,
        IpProtocol::Sctp => PolicyProtocol::PolicySctp,
        IpProtocol::Icmp => PolicyProtocol::PolicyIcmp,
    }
}

pub(super) fn decode_pod(pod: &control::Pod) -> Result<Pod, FieldError> {
    let ports = pod.ports.iter().enumerate();
    let ports = ports.map(|(index, raw)| {
        let field = format!("ports[{index}]");
        Ok(NamedPort {
            name: filled(&format!("{field}.name"), &raw.name)?,
            protocol: decode_protocol(&field, raw)?,
            port: port(&format!("{field}.first"), raw.first)?,
        })
    });
    Ok(Pod {
        name: object_name(&pod.namespace, &pod.name)?,
        labels: pod.labels.clone(),
        service_account: pod.service_account.clone(),
        node: parse_optional("node", &pod.node)?,
        addresses: parse_list("addresses", &pod.addresses)?,
        host_network: pod.host_network,
        ports: ports.collect::<Result<_, _>>()?,
    })
}

pub(super) fn decode_network_policy(
    policy: &control::NetworkPolicy,
) -> Result<NetworkPolicy, FieldError> {
    let side = |name: &str, said: Option<&net::Side>| {
        said.map(|side| {
            check_count(name, side.rules.len())?;
            let rules = side.rules.iter().enumerate();
            rules
                .map(|(index, rule)| {
                    let field = format!("{name}[{index}]");
                    Ok(NetworkRule {
                        peers: each(&format!("{field}.peers"), &rule.peers, decode_peer)?,
                        ports: each(&format!("{field}.ports"), &rule.ports, decode_port)?,
                    })
                })
                .collect()
        })
        .transpose()
    };
    let pods = policy.pods.as_ref();
    let pods = pods.ok_or_else(|| bad("pods", "it is missing"))?;
    Ok(NetworkPolicy {
        name: object_name(&policy.namespace, &policy.name)?,
        pods: decode_selector("pods", pods)?,
        ingress: side("ingress", policy.ingress.as_ref())?,
        egress: side("egress", policy.egress.as_ref())?,
    })
}

pub(super) fn decode_mesh_policy(policy: &control::MeshPolicy) -> Result<MeshPolicy, FieldError> {
    check_count("rules", policy.rules.len())?;
    Ok(MeshPolicy {
        name: filled("name", &policy.name)?,
        audit: policy.audit,
        rules: each("rules", &policy.rules, |field, rule| {
            Ok(MeshRule {
                action: match rule.action() {
                    wire::Action::Allow => Action::Allow,
                    wire::Action::Deny => Action::Deny,
                    wire::Action::Unspecified => return Err(unknown(&format!("{field}.action"))),
                },
                from: each(&format!("{field}.from"), &rule.from, decode_party)?,
                to: each(&format!("{field}.to"), &rule.to, decode_party)?,
                ports: each(&format!("{field}.ports"), &rule.ports, decode_port)?,
            })
        })?,
    })
}

fn decode_party(field: &str, party: &wire::Party) -> Result<Party, FieldError> {
    let at = |name: &str| format!("{field}.{name}");
    let selector = |name: &str, said: Option<&control::LabelSelector>| {
        said.map(|said| decode_selector(&at(name), said))
            .transpose()
    };
    let checked = Party {
        nodes: parse_list(&at("nodes"), &party.nodes)?,
        sites: parse_list(&at("sites"), &party.sites)?,
        namespaces: party.namespaces.clone(),
        namespace_selector: selector("namespace_selector", party.namespace_selector.as_ref())?,
        service_accounts: each(
            &at("service_accounts"),
            &party.service_accounts,
            |_, account| object_name(&account.namespace, &account.name),
        )?,
        pod_selector: selector("pod_selector", party.pod_selector.as_ref())?,
        cidrs: parse_list(&at("cidrs"), &party.cidrs)?,
    };
    // A newer version may say more here: without it the party would be everybody.
    if checked == Party::default() {
        return Err(bad(field, "it says nothing that this version knows"));
    }
    Ok(checked)
}

fn decode_peer(field: &str, peer: &net::Peer) -> Result<NetworkPeer, FieldError> {
    let at = |name: &str| format!("{field}.{name}");
    match (&peer.pods, peer.cidr.as_str()) {
        (Some(pods), "") => Ok(NetworkPeer::Pods {
            pods: decode_selector(&at("pods"), pods)?,
            namespaces: peer
                .namespaces
                .as_ref()
                .map(|said| decode_selector(&at("namespaces"), said))
                .transpose()?,
        }),
        (None, cidr) if !cidr.is_empty() => Ok(NetworkPeer::Block {
            cidr: parse(&at("cidr"), cidr)?,
            except: parse_list(&at("except"), &peer.except)?,
        }),
        _ => Err(bad(field, "it is neither pods nor a cidr")),
    }
}

fn decode_selector(
    field: &str,
    selector: &control::LabelSelector,
) -> Result<LabelSelector, FieldError> {
    let expressions = each(
        &format!("{field}.expressions"),
        &selector.expressions,
        |field, one| {
            Ok(Requirement {
                key: filled(&format!("{field}.key"), &one.key)?,
                operator: match one.operator() {
                    WireOp::In => Operator::In,
                    WireOp::NotIn => Operator::NotIn,
                    WireOp::Exists => Operator::Exists,
                    WireOp::DoesNotExist => Operator::DoesNotExist,
                    WireOp::Unspecified => return Err(unknown(&format!("{field}.operator"))),
                },
                values: one.values.iter().cloned().collect(),
            })
        },
    )?;
    Ok(LabelSelector {
        labels: selector.labels.clone(),
        expressions,
    })
}

fn decode_port(field: &str, raw: &PolicyPort) -> Result<PortMatch, FieldError> {
    let number = |name: &str, number: u32| {
        let fits = u16::try_from(number);
        fits.map_err(|_| bad(format!("{field}.{name}"), format!("{number} is not a port")))
    };
    let ports = match (
        optional(&raw.name),
        number("first", raw.first)?,
        number("last", raw.last)?,
    ) {
        (Some(name), _, _) => Ports::Named(name),
        (None, 0, u16::MAX) => Ports::All,
        (None, first, last) if first <= last => Ports::Range(first, last),
        (None, first, last) => {
            return Err(bad(field, format!("{first} comes after {last}")));
        }
    };
    Ok(PortMatch {
        protocol: decode_protocol(field, raw)?,
        ports,
    })
}

fn decode_protocol(field: &str, raw: &PolicyPort) -> Result<IpProtocol, FieldError> {
    match raw.protocol() {
        PolicyProtocol::PolicyTcp => Ok(IpProtocol::Tcp),
        PolicyProtocol::PolicyUdp => Ok(IpProtocol::Udp),
        PolicyProtocol::PolicySctp => Ok(IpProtocol::Sctp),
        PolicyProtocol::PolicyIcmp => Ok(IpProtocol::Icmp),
        PolicyProtocol::Unspecified => Err(unknown(&format!("{field}.protocol"))),
    }
}

fn each<T, U>(
    field: &str,
    all: &[T],
    decode: impl Fn(&str, &T) -> Result<U, FieldError>,
) -> Result<Vec<U>, FieldError> {
    let all = all.iter().enumerate();
    all.map(|(index, one)| decode(&format!("{field}[{index}]"), one))
        .collect()
}

fn check_count(field: &str, count: usize) -> Result<(), FieldError> {
    if count > RULES_MAX {
        return Err(bad(field, format!("{count} are more than {RULES_MAX}")));
    }
    Ok(())
}

fn object_name(namespace: &str, name: &str) -> Result<ObjectName, FieldError> {
    Ok(ObjectName {
        namespace: filled("namespace", namespace)?,
        name: filled("name", name)?,
    })
}

fn unknown(field: &str) -> FieldError {
    bad(field, "this version does not know it")
}
