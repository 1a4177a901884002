//! The tables against a second reading of `docs/policy.md`: one flow at a time, without classes,
//! as plain as can be. Few names and addresses, so that rules meet often.

use proptest::{
    collection::vec,
    option,
    prelude::*,
    sample::{select, subsequence},
};

use super::*;

const ADDRESSES: [&str; 18] = [
    WEB,
    DB,
    PROBE,
    NODE_A,
    NODE_B,
    NODE_C,
    "fd00::1",
    "fd00::2",
    "fd01::10",
    "fd02::10",
    "10.1.0.77",
    "192.168.3.7",
    "100.64.0.9",
    "10.9.0.2",
    "10.9.0.1",
    "8.8.8.8",
    "10.2.0.11",
    "2001:db8::1",
];

/// What becomes of `flow` at `node`, and whether that is only because nobody enforces more.
fn model(snapshot: &Snapshot, node: &str, flow: &Flow, direction: Direction) -> (bool, bool) {
    let own = &snapshot.nodes[&node.parse::<NodeName>().unwrap()];
    let (local, remote) = match direction {
        Direction::In => (flow.to, flow.from),
        Direction::Out => (flow.from, flow.to),
    };
    let is_own = |address| own.own_addresses().any(|own| own == address);
    if local == remote || (is_own(remote) && !is_own(local)) {
        return (true, true);
    }
    let mut denied = false;
    let mut allowed = false;
    let mut audited = false;
    for policy in snapshot.policy.mesh.values() {
        for rule in &policy.rules {
            let from = rule.from.is_empty()
                || rule
                    .from
                    .iter()
                    .any(|one| is_party(snapshot, node, one, flow.from));
            let to = rule.to.is_empty()
                || rule
                    .to
                    .iter()
                    .any(|one| is_party(snapshot, node, one, flow.to));
            if !from || !to || !has_port(snapshot, &rule.ports, flow) {
                continue;
            }
            match (rule.action, policy.audit) {
                (Action::Deny, false) => denied = true,
                (Action::Deny, true) => audited = true,
                (Action::Allow, false) => allowed = true,
                (Action::Allow, true) => {}
            }
        }
    }
    match snapshot.mesh.default_action {
        DefaultAction::Allow => {}
        DefaultAction::Audit => audited |= !allowed,
        DefaultAction::Deny => denied |= !allowed,
    }
    let passes = !denied && network_allows(snapshot, local, remote, flow, direction);
    (passes, !audited)
}

fn network_allows(
    snapshot: &Snapshot,
    local: IpAddr,
    remote: IpAddr,
    flow: &Flow,
    direction: Direction,
) -> bool {
    let Some(pod) = pod_at(snapshot, local) else {
        return true;
    };
    let mut isolated = false;
    for policy in snapshot.policy.network.values() {
        let side = match direction {
            Direction::In => &policy.ingress,
            Direction::Out => &policy.egress,
        };
        let about = policy.name.namespace == pod.name.namespace && policy.pods.matches(&pod.labels);
        let (true, Some(rules)) = (about, side) else {
            continue;
        };
        isolated = true;
        for rule in rules {
            let mut peers = rule.peers.iter();
            let peer = |peer: &NetworkPeer| match peer {
                NetworkPeer::Block { cidr, except } => {
                    cidr.contains(&remote) && !except.iter().any(|out| out.contains(&remote))
                }
                NetworkPeer::Pods { pods, namespaces } => {
                    pod_at(snapshot, remote).is_some_and(|remote| {
                        pods.matches(&remote.labels)
                            && match namespaces {
                                None => remote.name.namespace == policy.name.namespace,
                                Some(all) => all.matches(&namespace(snapshot, remote)),
                            }
                    })
                }
            };
            let met = rule.peers.is_empty() || peers.any(peer);
            if met && has_port(snapshot, &rule.ports, flow) {
                return true;
            }
        }
    }
    !isolated
}

fn has_port(snapshot: &Snapshot, ports: &[PortMatch], flow: &Flow) -> bool {
    let has = |one: &PortMatch| {
        let number = match &one.ports {
            Ports::All => true,
            Ports::Range(first, last) => *first <= flow.port && flow.port <= *last,
            Ports::Named(name) => pod_at(snapshot, flow.to).is_some_and(|pod| {
                let mut ports = pod.ports.iter();
                let wanted = (name, one.protocol, flow.port);
                ports.any(|port| (&port.name, port.protocol, port.port) == wanted)
            }),
        };
        flow.protocol == Some(one.protocol) && number
    };
    ports.is_empty() || ports.iter().any(has)
}

fn pod_at(snapshot: &Snapshot, address: IpAddr) -> Option<&Pod> {
    let mut pods = snapshot.policy.pods.values().map(|pod| &**pod);
    pods.find(|pod| pod.addresses.contains(&address))
}

fn namespace(snapshot: &Snapshot, pod: &Pod) -> Labels {
    let name = &pod.name.namespace;
    let said = snapshot.policy.namespaces.get(name);
    let mut labels = said.map(|labels| Labels::clone(labels)).unwrap_or_default();
    labels.insert("kubernetes.io/metadata.name".to_owned(), name.clone());
    labels
}

fn is_party(snapshot: &Snapshot, judge: &str, party: &Party, address: IpAddr) -> bool {
    let pod = pod_at(snapshot, address);
    let node = match pod {
        Some(pod) => pod.node.clone(),
        None => snapshot.nodes.values().find_map(|node| {
            let overlay = [IpAddr::V4(node.overlay_v4), IpAddr::V6(node.overlay_v6)];
            let underlay =
                node.name.as_str() == judge && node.underlay_addresses.contains(&address);
            let behind = node.prefixes.iter().any(|net| net.contains(&address));
            (overlay.contains(&address) || underlay || behind).then(|| node.name.clone())
        }),
    };
    let site = node
        .as_ref()
        .and_then(|name| snapshot.nodes[name].locality.site.clone());
    let device = snapshot.external_peers.values();
    let device = device.filter(|peer| peer.prefixes.iter().any(|net| net.contains(&address)));
    let names: Vec<_> = device.map(|peer| peer.name.clone()).chain(node).collect();
    (party.nodes.is_empty() || names.iter().any(|name| party.nodes.contains(name)))
        && (party.sites.is_empty() || site.is_some_and(|site| party.sites.contains(&site)))
        && (party.namespaces.is_empty()
            || pod.is_some_and(|pod| party.namespaces.contains(&pod.name.namespace)))
        && party
            .namespace_selector
            .as_ref()
            .is_none_or(|one| pod.is_some_and(|pod| one.matches(&namespace(snapshot, pod))))
        && (party.service_accounts.is_empty()
            || pod.is_some_and(|pod| {
                let account = format!("{}/{}", pod.name.namespace, pod.service_account);
                party
                    .service_accounts
                    .iter()
                    .any(|one| one.to_string() == account)
            }))
        && party
            .pod_selector
            .as_ref()
            .is_none_or(|one| pod.is_some_and(|pod| one.matches(&pod.labels)))
        && (party.cidrs.is_empty() || party.cidrs.iter().any(|net| net.contains(&address)))
}

fn any_protocol() -> impl Strategy<Value = IpProtocol> {
    select(IpProtocol::ALL.to_vec())
}

fn any_port() -> impl Strategy<Value = u16> {
    select(vec![0, 1, 22, 79, 80, 81, 443, 5432, 65_535])
}

fn any_ports(named: bool) -> impl Strategy<Value = Vec<PortMatch>> {
    let names = if named { vec!["sql", "none"] } else { vec![] };
    let range = (any_port(), any_port()).prop_map(|(a, b)| Ports::Range(a.min(b), a.max(b)));
    let ports = if names.is_empty() {
        prop_oneof![Just(Ports::All), range].boxed()
    } else {
        let named = select(names).prop_map(|name| Ports::Named(name.to_owned()));
        prop_oneof![Just(Ports::All), range, named].boxed()
    };
    let one = (any_protocol(), ports).prop_map(|(protocol, ports)| PortMatch { protocol, ports });
    vec(one, 0..3)
}

fn any_selector() -> impl Strategy<Value = LabelSelector> {
    let simple =
        select(vec!["", "app=web", "app=db", "app=probe", "team=sales"]).prop_map(selector);
    let operators = select(vec![
        Operator::In,
        Operator::NotIn,
        Operator::Exists,
        Operator::DoesNotExist,
    ]);
    let values = subsequence(vec!["web", "db", "sales"], 0..3);
    let keys = select(vec!["app", "team"]);
    let expressions = (operators, keys, values).prop_map(|(operator, key, values)| LabelSelector {
        labels: Labels::new(),
        expressions: vec![Requirement {
            key: key.to_owned(),
            operator,
            values: values.into_iter().map(str::to_owned).collect(),
        }],
    });
    prop_oneof![simple, expressions]
}

fn any_net() -> impl Strategy<Value = IpNet> {
    let nets = [
        "0.0.0.0/0",
        "10.0.0.0/8",
        "10.2.0.0/16",
        "10.2.0.8/29",
        "100.96.0.0/30",
        "::/0",
        "fd00::/8",
        "fd02::/64",
        "192.168.3.7/32",
    ];
    select(nets.to_vec()).prop_map(|net| net.parse().unwrap())
}

fn any_party() -> impl Strategy<Value = Party> {
    let by_place = (
        subsequence(vec!["a", "b", "c", "phone"], 0..2),
        subsequence(vec!["s1", "s2"], 0..2),
        vec(any_net(), 0..2),
    );
    let by_pod = (
        subsequence(vec!["shop", "ops"], 0..2),
        option::of(any_selector()),
        subsequence(vec!["shop/front", "shop/default"], 0..2),
        option::of(any_selector()),
    );
    let place = by_place.prop_map(|(nodes, sites, cidrs)| Party {
        nodes: nodes.iter().map(|name| name.parse().unwrap()).collect(),
        sites: sites.iter().map(|name| name.parse().unwrap()).collect(),
        cidrs,
        ..Party::default()
    });
    (place, option::of(by_pod)).prop_map(|(place, pod)| match pod {
        None => place,
        Some((namespaces, namespace_selector, accounts, pod_selector)) => Party {
            namespaces: namespaces.iter().map(|&name| name.to_owned()).collect(),
            namespace_selector,
            service_accounts: accounts.iter().map(|&at| name(at)).collect(),
            pod_selector,
            ..place
        },
    })
}

fn any_mesh_policy() -> impl Strategy<Value = (bool, Vec<MeshRule>)> {
    let rule = (
        select(vec![Action::Allow, Action::Deny]),
        vec(any_party(), 0..3),
        vec(any_party(), 0..3),
        any_ports(false),
    );
    let rule = rule.prop_map(|(action, from, to, ports)| MeshRule {
        action,
        from,
        to,
        ports,
    });
    (any::<bool>(), vec(rule, 1..4))
}

fn any_network_policy() -> impl Strategy<Value = NetworkPolicy> {
    let pods = (any_selector(), option::of(any_selector()));
    let pods = pods.prop_map(|(pods, namespaces)| NetworkPeer::Pods { pods, namespaces });
    let block = (any_net(), vec(any_net(), 0..2));
    let block = block.prop_map(|(cidr, except)| NetworkPeer::Block { cidr, except });
    let rule = (vec(prop_oneof![pods, block], 0..3), any_ports(true));
    let rules = vec(
        rule.prop_map(|(peers, ports)| NetworkRule { peers, ports }),
        0..3,
    )
    .boxed();
    let sides = (option::of(rules.clone()), option::of(rules));
    let at = select(vec!["shop/p", "ops/q", "shop/r"]);
    (at, any_selector(), sides).prop_map(|(at, pods, (ingress, egress))| NetworkPolicy {
        name: name(at),
        pods,
        ingress,
        egress,
    })
}

proptest! {
    #[test]
    fn the_tables_say_what_the_rows_of_the_documentation_say(
        default in select(vec![DefaultAction::Allow, DefaultAction::Audit, DefaultAction::Deny]),
        policies in vec(any_mesh_policy(), 0..3),
        networks in vec(any_network_policy(), 0..3),
        flows in vec(
            (select(ADDRESSES.to_vec()), select(ADDRESSES.to_vec()), option::of(any_protocol()), any_port()),
            1..40,
        ),
    ) {
        let mut snapshot = world();
        snapshot.mesh.default_action = default;
        for (index, (audit, rules)) in policies.into_iter().enumerate() {
            mesh(&mut snapshot, &format!("p{index}"), audit, rules);
        }
        for policy in networks {
            snapshot.policy.network.insert(policy.name.clone(), policy.into());
        }
        let snapshot = Arc::new(snapshot);
        let mut judges = judges::Judges::new(Arc::clone(&snapshot), LIMITS);
        for node in ["a", "b", "c"] {
            let own: NodeName = node.parse().unwrap();
            let callers = callers(&snapshot, node);
            for (from, to, protocol, port) in &flows {
                let protocol = protocol.unwrap_or(IpProtocol::Tcp);
                let flow = Flow { protocol: Some(protocol), ..tcp(from, to, *port) };
                let is_own = pod_at(&snapshot, flow.from).is_some_and(|pod| pod.node == Some(own.clone()));
                let Some(port) = service_port(protocol, *port).filter(|_| is_own && flow.from.is_ipv4() == flow.to.is_ipv4()) else {
                    continue;
                };
                let mut ends = judges.sides(&flow).into_iter().filter(|end| {
                    let at = &snapshot.nodes[&end.node];
                    // Nobody stands between a pod and its own node.
                    end.direction == Direction::Out || end.node != own || !at.own_addresses().any(|own| own == flow.to)
                });
                let expected = ends.any(|end| !end.verdict.allowed);
                let caller = callers.caller(flow.from);
                let denied = caller.is_some_and(|caller| caller.is_denied(flow.to, &[port]));
                prop_assert_eq!(denied, expected, "{:?} from {}", flow, node);
            }
            let tables = tables(&snapshot, node, LIMITS);
            prop_assert!(tables.left_out.is_nothing());
            for (from, to, protocol, port) in &flows {
                let flow = Flow { protocol: *protocol, ..tcp(from, to, *port) };
                for direction in Direction::ALL {
                    let local = if direction == Direction::In { flow.to } else { flow.from };
                    if !is_at(&snapshot, &own, local) {
                        continue;
                    }
                    let verdict = tables.judge(&flow, direction);
                    let (passes, unaudited) = model(&snapshot, node, &flow, direction);
                    let by = tables.name(verdict.decider);
                    prop_assert_eq!(verdict.allowed, passes, "{:?} {:?} at {}: {}", flow, direction, node, by);
                    if passes {
                        prop_assert_eq!(verdict.unaudited, unaudited, "{:?} {:?} at {}: {}", flow, direction, node, by);
                    }
                }
            }
        }
    }
}

/// A service's port, of a protocol that one may have.
fn service_port(protocol: IpProtocol, port: u16) -> Option<EndpointPort> {
    let protocols = [Protocol::Tcp, Protocol::Udp];
    let protocol = protocols
        .into_iter()
        .find(|&one| IpProtocol::from(one) == protocol)?;
    Some(EndpointPort {
        name: String::new(),
        protocol,
        port,
    })
}

/// Whether the tables of a node are about this end.
fn is_at(snapshot: &Snapshot, node: &NodeName, address: IpAddr) -> bool {
    let at = &snapshot.nodes[node];
    let nodes = snapshot.nodes.values();
    let mut elsewhere = nodes.filter(|other| other.name != *node);
    at.own_addresses().any(|own| own == address)
        || at.prefixes.iter().any(|net| net.contains(&address))
        || !elsewhere.any(|other| {
            other.own_addresses().any(|own| own == address)
                || other.prefixes.iter().any(|net| net.contains(&address))
        })
}
