use std::{net::IpAddr, sync::Arc};

use mesh_wire::id::{MeshId, NodeId, NodeName};

use super::{
    callers::Callers,
    resources::{
        Action, DefaultAction, IpProtocol, LabelSelector, Labels, MeshPolicy, MeshRule, NamedPort,
        NetworkPeer, NetworkPolicy, NetworkRule, ObjectName, Operator, Party, Pod, PortMatch,
        Ports, Requirement,
    },
    *,
};
use crate::snapshot::{
    EndpointPort, ExternalPeer, Locality, MeshSettings, Node, Protocol, Snapshot,
};

mod model;

const LIMITS: Limits = Limits {
    addresses: 1_000,
    pairs: 10_000,
    ports: 10_000,
};

/// Node a at site s1, b and c at s2; behind c is a LAN and the telephone `phone`.
const NODES: [(&str, &str, &[&str]); 3] = [
    ("a", "s1", &["10.1.0.0/24", "fd01::/64"]),
    ("b", "s2", &["10.2.0.0/24", "fd02::/64"]),
    (
        "c",
        "s2",
        &["10.3.0.0/24", "192.168.3.0/24", "100.64.0.9/32"],
    ),
];

fn node(index: u8, (name, site, prefixes): (&str, &str, &[&str])) -> Node {
    Node {
        id: NodeId([index; 32]),
        name: name.parse().unwrap(),
        locality: Locality {
            site: Some(site.parse().unwrap()),
            ..Locality::default()
        },
        overlay_v4: [100, 96, 0, index].into(),
        overlay_v6: [0xfd00, 0, 0, 0, 0, 0, 0, index.into()].into(),
        prefixes: prefixes.iter().map(|net| net.parse().unwrap()).collect(),
        pod_prefixes: Vec::new(),
        underlay_addresses: vec![[10, 9, 0, index].into()],
        static_candidates: Vec::new(),
        mapped: Vec::new(),
    }
}

fn name(text: &str) -> ObjectName {
    let (namespace, name) = text.split_once('/').unwrap();
    ObjectName {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    }
}

fn labels(text: &str) -> Labels {
    let pairs = text.split(',').filter(|pair| !pair.is_empty());
    let pairs = pairs.map(|pair| pair.split_once('=').unwrap());
    pairs
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

fn selector(text: &str) -> LabelSelector {
    LabelSelector {
        labels: labels(text),
        expressions: Vec::new(),
    }
}

fn pod(at: &str, node: &str, text: &str, addresses: &[&str]) -> Pod {
    Pod {
        name: name(at),
        labels: labels(text),
        service_account: "default".to_owned(),
        node: Some(node.parse().unwrap()),
        addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
        host_network: false,
        ports: Vec::new(),
    }
}

/// `shop/web` on a, `shop/db` on b with a port called sql, `ops/probe` on c.
fn world() -> Snapshot {
    let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(MeshId([0; 32]), "m"));
    let nodes = (1..).zip(NODES).map(|(index, said)| node(index, said));
    snapshot.nodes = nodes.map(|node| (node.name.clone(), node)).collect();
    let phone = ExternalPeer {
        id: NodeId([9; 32]),
        name: "phone".parse().unwrap(),
        prefixes: vec!["100.64.0.9/32".parse().unwrap()],
        gateway: "c".parse().unwrap(),
        endpoint: None,
        keepalive: None,
    };
    snapshot.external_peers.insert(phone.name.clone(), phone);
    let mut db = pod("shop/db", "b", "app=db", &["10.2.0.10", "fd02::10"]);
    db.ports.push(NamedPort {
        name: "sql".to_owned(),
        protocol: IpProtocol::Tcp,
        port: 5432,
    });
    let mut web = pod("shop/web", "a", "app=web", &["10.1.0.10", "fd01::10"]);
    "front".clone_into(&mut web.service_account);
    for pod in [web, db, pod("ops/probe", "c", "app=probe", &["10.3.0.10"])] {
        snapshot.policy.pods.insert(pod.name.clone(), pod.into());
    }
    let shop = labels("team=sales");
    snapshot
        .policy
        .namespaces
        .insert("shop".to_owned(), shop.into());
    snapshot
}

const WEB: &str = "10.1.0.10";
const DB: &str = "10.2.0.10";
const PROBE: &str = "10.3.0.10";
const NODE_A: &str = "100.96.0.1";
const NODE_B: &str = "100.96.0.2";
const NODE_C: &str = "100.96.0.3";

fn tcp(from: &str, to: &str, port: u16) -> Flow {
    Flow {
        from: from.parse().unwrap(),
        to: to.parse().unwrap(),
        protocol: Some(IpProtocol::Tcp),
        port,
    }
}

fn tables(snapshot: &Snapshot, node: &str, limits: Limits) -> Tables {
    let mut compiler = Compiler::new(node.parse().unwrap(), limits);
    compiler.update(&Arc::new(snapshot.clone()));
    Tables::clone(compiler.tables())
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn callers(snapshot: &Snapshot, node: &str) -> Callers {
    let mut compiler = Compiler::of_calls(node.parse().unwrap(), LIMITS);
    compiler.update(&Arc::new(snapshot.clone()));
    Callers::new(&compiler, snapshot)
}

/// On the side that `direction` says, at node a, b or c.
#[track_caller]
fn check(snapshot: &Snapshot, node: &str, direction: Direction, flow: Flow, passes: bool) {
    let tables = tables(snapshot, node, LIMITS);
    assert_eq!(tables.left_out, LeftOut::default());
    let verdict = tables.judge(&flow, direction);
    let by = tables.name(verdict.decider);
    assert_eq!(verdict.allowed, passes, "{flow:?} at {node}: {by}");
}

/// What receives at node b.
#[track_caller]
fn arrives(snapshot: &Snapshot, flow: Flow, passes: bool) {
    check(snapshot, "b", Direction::In, flow, passes);
}

fn rule(action: Action, from: Party, to: Party, ports: &[PortMatch]) -> MeshRule {
    let some = |party: Party| (party != Party::default()).then_some(party);
    MeshRule {
        action,
        from: some(from).into_iter().collect(),
        to: some(to).into_iter().collect(),
        ports: ports.to_vec(),
    }
}

fn mesh(snapshot: &mut Snapshot, name: &str, audit: bool, rules: Vec<MeshRule>) {
    let name = name.to_owned();
    let policy = MeshPolicy {
        name: name.clone(),
        audit,
        rules,
    };
    snapshot.policy.mesh.insert(name, policy.into());
}

fn range(protocol: IpProtocol, first: u16, last: u16) -> PortMatch {
    PortMatch {
        protocol,
        ports: Ports::Range(first, last),
    }
}

fn nodes(name: &str) -> Party {
    Party {
        nodes: vec![name.parse().unwrap()],
        ..Party::default()
    }
}

fn anybody() -> Party {
    Party::default()
}

fn network(snapshot: &mut Snapshot, at: &str, pods: &str, ingress: Option<Vec<NetworkRule>>) {
    let policy = NetworkPolicy {
        name: name(at),
        pods: selector(pods),
        ingress,
        egress: None,
    };
    let name = policy.name.clone();
    snapshot.policy.network.insert(name, policy.into());
}

fn from_pods(pods: &str, namespaces: Option<&str>, ports: &[PortMatch]) -> NetworkRule {
    NetworkRule {
        peers: vec![NetworkPeer::Pods {
            pods: selector(pods),
            namespaces: namespaces.map(selector),
        }],
        ports: ports.to_vec(),
    }
}

#[test]
fn both_sides_of_a_flow_say_who_decides_wherever_its_ends_are() {
    let mut snapshot = world();
    let deny = rule(
        Action::Deny,
        anybody(),
        nodes("b"),
        &[range(IpProtocol::Tcp, 22, 22)],
    );
    mesh(&mut snapshot, "no-ssh", false, vec![deny]);
    let mut judges = judges::Judges::new(snapshot.into(), LIMITS);
    for (end, first) in [
        ("a", NODE_A),
        ("node/a", NODE_A),
        ("shop/db", DB),
        ("pod/shop/db", DB),
        ("192.0.2.1", "192.0.2.1"),
    ] {
        let found = judges.addresses(end).unwrap();
        assert_eq!(found[0].to_string(), first, "{end}");
    }
    for unknown in ["x", "node/shop/db", "shop/x", "pod/x"] {
        assert!(judges.addresses(unknown).is_err(), "{unknown}");
    }
    let mut said = |flow: Flow| -> Vec<String> {
        let judged = judges.sides(&flow).into_iter();
        let said = judged.map(|one| {
            let allowed = one.verdict.allowed;
            format!(
                "{} {} {allowed} {}",
                one.node,
                one.direction.as_str(),
                one.by
            )
        });
        said.collect()
    };
    let denied = [
        "a out false MeshPolicy no-ssh",
        "b in false MeshPolicy no-ssh",
    ];
    assert_eq!(said(tcp(NODE_A, NODE_B, 22)), denied);
    // The pod is behind node b, and so is what the rule is about.
    assert_eq!(said(tcp(WEB, DB, 22)), denied);
    let back = said(tcp(NODE_B, NODE_A, 22));
    assert_eq!(
        back,
        ["b out true defaultAction", "a in true defaultAction"]
    );
    // The world has no tables.
    assert_eq!(said(tcp("192.0.2.1", NODE_B, 22)), [denied[1]]);
    assert!(said(tcp("192.0.2.1", "192.0.2.2", 22)).is_empty());
}

#[test]
fn without_policies_everything_passes_and_nothing_is_to_be_enforced() {
    let tables = tables(&world(), "b", LIMITS);
    assert_eq!(tables, Tables::default());
    arrives(&world(), tcp(WEB, DB, 1), true);
}

#[test]
fn default_deny_drops_on_both_sides_what_nobody_allows() {
    let mut snapshot = world();
    snapshot.mesh.default_action = DefaultAction::Deny;
    mesh(
        &mut snapshot,
        "sql",
        false,
        vec![rule(
            Action::Allow,
            nodes("a"),
            nodes("b"),
            &[range(IpProtocol::Tcp, 5432, 5440)],
        )],
    );
    for (node, direction) in [("a", Direction::Out), ("b", Direction::In)] {
        for (flow, passes) in [
            (tcp(NODE_A, NODE_B, 5432), true),
            (tcp(NODE_A, NODE_B, 5440), true),
            (tcp(NODE_A, NODE_B, 5441), false),
            (tcp(WEB, DB, 5432), true),
            (tcp("10.1.0.77", "10.2.0.77", 5432), true),
        ] {
            check(&snapshot, node, direction, flow, passes);
        }
        let udp = Flow {
            protocol: Some(IpProtocol::Udp),
            ..tcp(NODE_A, NODE_B, 5432)
        };
        check(&snapshot, node, direction, udp, false);
        let other = Flow {
            protocol: None,
            ..udp
        };
        check(&snapshot, node, direction, other, false);
    }
    // Whoever calls in the other direction was not allowed to.
    check(
        &snapshot,
        "b",
        Direction::Out,
        tcp(NODE_B, NODE_A, 5432),
        false,
    );
    check(
        &snapshot,
        "c",
        Direction::Out,
        tcp(NODE_C, NODE_B, 5432),
        false,
    );
}

#[test]
fn denials_come_before_allowances_whatever_their_order() {
    let allow = rule(Action::Allow, anybody(), anybody(), &[]);
    let deny = rule(
        Action::Deny,
        nodes("c"),
        nodes("b"),
        &[range(IpProtocol::Tcp, 22, 22)],
    );
    for rules in [vec![allow.clone(), deny.clone()], vec![deny, allow]] {
        for default in [DefaultAction::Allow, DefaultAction::Deny] {
            let mut snapshot = world();
            snapshot.mesh.default_action = default;
            mesh(&mut snapshot, "p", false, rules.clone());
            arrives(&snapshot, tcp(NODE_C, NODE_B, 22), false);
            arrives(&snapshot, tcp(NODE_C, NODE_B, 23), true);
            arrives(&snapshot, tcp(NODE_A, NODE_B, 22), true);
        }
    }
}

#[test]
fn a_party_is_a_node_a_site_a_namespace_an_account_labels_or_addresses() {
    let parties = [
        (nodes("c"), vec![PROBE, NODE_C, "192.168.3.7", "100.64.0.9"]),
        (nodes("phone"), vec!["100.64.0.9"]),
        (
            Party {
                sites: vec!["s1".parse().unwrap()],
                ..anybody()
            },
            vec![WEB, NODE_A],
        ),
        (
            Party {
                namespaces: vec!["shop".to_owned()],
                ..anybody()
            },
            vec![WEB],
        ),
        (
            Party {
                namespace_selector: Some(selector("team=sales")),
                ..anybody()
            },
            vec![WEB],
        ),
        (
            Party {
                namespace_selector: Some(selector("kubernetes.io/metadata.name=ops")),
                ..anybody()
            },
            vec![PROBE],
        ),
        (
            Party {
                service_accounts: vec![name("shop/front")],
                ..anybody()
            },
            vec![WEB],
        ),
        (
            Party {
                pod_selector: Some(selector("app=probe")),
                ..anybody()
            },
            vec![PROBE],
        ),
        (
            Party {
                cidrs: vec!["192.168.3.0/29".parse().unwrap()],
                ..anybody()
            },
            vec!["192.168.3.7"],
        ),
        // All that is said must hold.
        (
            Party {
                pod_selector: Some(selector("app=probe")),
                ..nodes("a")
            },
            vec![],
        ),
    ];
    let callers = [
        WEB,
        PROBE,
        NODE_A,
        NODE_C,
        "192.168.3.7",
        "192.168.3.8",
        "100.64.0.9",
    ];
    for (party, having) in parties {
        let mut snapshot = world();
        let deny = rule(Action::Deny, party.clone(), anybody(), &[]);
        mesh(&mut snapshot, "p", false, vec![deny]);
        for from in callers {
            let is_in_lan = from == "192.168.3.8" && having.contains(&NODE_C);
            let passes = !having.contains(&from) && !is_in_lan;
            arrives(&snapshot, tcp(from, DB, 80), passes);
        }
    }
}

#[test]
fn audit_changes_nothing_and_says_what_it_would() {
    let mut snapshot = world();
    snapshot.mesh.default_action = DefaultAction::Deny;
    let allow = vec![rule(Action::Allow, nodes("a"), anybody(), &[])];
    let deny = vec![rule(
        Action::Deny,
        nodes("a"),
        nodes("b"),
        &[range(IpProtocol::Tcp, 22, 22)],
    )];
    let more = vec![rule(Action::Allow, nodes("c"), anybody(), &[])];
    mesh(&mut snapshot, "allow", false, allow);
    mesh(&mut snapshot, "trial", true, [deny, more].concat());
    let tables = tables(&snapshot, "b", LIMITS);
    let audited = tables.judge(&tcp(NODE_A, NODE_B, 22), Direction::In);
    assert!(audited.allowed && !audited.unaudited);
    assert_eq!(tables.name(audited.decider), "MeshPolicy trial");
    let plain = tables.judge(&tcp(NODE_A, NODE_B, 23), Direction::In);
    assert!(plain.allowed && plain.unaudited);
    // What a policy in audit allows is not allowed by it.
    arrives(&snapshot, tcp(NODE_C, NODE_B, 80), false);
}

#[test]
fn the_default_can_be_tried_in_audit() {
    let mut snapshot = world();
    snapshot.mesh.default_action = DefaultAction::Audit;
    let allow = vec![rule(Action::Allow, nodes("a"), anybody(), &[])];
    mesh(&mut snapshot, "allow", false, allow);
    let tables = tables(&snapshot, "b", LIMITS);
    for (from, unaudited) in [(NODE_A, true), (NODE_C, false)] {
        let verdict = tables.judge(&tcp(from, NODE_B, 80), Direction::In);
        assert_eq!(
            (verdict.allowed, verdict.unaudited),
            (true, unaudited),
            "{from}"
        );
    }
}

#[test]
fn a_pod_that_a_network_policy_selects_receives_what_one_of_them_allows() {
    let mut snapshot = world();
    network(&mut snapshot, "shop/db", "app=db", Some(Vec::new()));
    arrives(&snapshot, tcp(WEB, DB, 5432), false);
    // Other pods, the node itself, and what the pod opens are not isolated by it.
    arrives(&snapshot, tcp(WEB, NODE_B, 5432), true);
    check(&snapshot, "b", Direction::Out, tcp(DB, WEB, 80), true);
    let sql = range(IpProtocol::Tcp, 5432, 5432);
    let rule = from_pods("app=web", None, std::slice::from_ref(&sql));
    network(&mut snapshot, "shop/more", "", Some(vec![rule]));
    arrives(&snapshot, tcp(WEB, DB, 5432), true);
    arrives(&snapshot, tcp("fd01::10", "fd02::10", 5432), true);
    arrives(&snapshot, tcp(WEB, DB, 5433), false);
    arrives(&snapshot, tcp(PROBE, DB, 5432), false);
    arrives(&snapshot, tcp(NODE_A, DB, 5432), false);
}

#[test]
fn egress_isolates_by_itself() {
    let mut snapshot = world();
    let policy = NetworkPolicy {
        name: name("shop/out"),
        pods: selector("app=web"),
        ingress: None,
        egress: Some(vec![NetworkRule {
            peers: Vec::new(),
            ports: vec![PortMatch {
                protocol: IpProtocol::Tcp,
                ports: Ports::Named("sql".to_owned()),
            }],
        }]),
    };
    snapshot
        .policy
        .network
        .insert(policy.name.clone(), policy.into());
    let out = Direction::Out;
    check(&snapshot, "a", out, tcp(WEB, DB, 5432), true);
    check(&snapshot, "a", out, tcp(WEB, DB, 80), false);
    // The name means something only where a pod calls a port so.
    check(&snapshot, "a", out, tcp(WEB, PROBE, 5432), false);
    check(&snapshot, "a", Direction::In, tcp(DB, WEB, 80), true);
}

#[test]
fn peers_are_pods_of_the_namespace_or_of_selected_ones() {
    let rows = [
        (from_pods("", None, &[]), true, false),
        (from_pods("", Some(""), &[]), true, true),
        (from_pods("app=probe", Some(""), &[]), false, true),
        (from_pods("app=probe", None, &[]), false, false),
        (
            from_pods("app=probe", Some("team=sales"), &[]),
            false,
            false,
        ),
        (from_pods("", Some("team=sales"), &[]), true, false),
    ];
    for (rule, web, probe) in rows {
        let mut snapshot = world();
        network(&mut snapshot, "shop/db", "app=db", Some(vec![rule]));
        arrives(&snapshot, tcp(WEB, DB, 80), web);
        arrives(&snapshot, tcp(PROBE, DB, 80), probe);
        // No selector has addresses that no pod has.
        arrives(&snapshot, tcp(NODE_A, DB, 80), false);
    }
}

#[test]
fn expressions_of_selectors_are_upstreams() {
    let values = |text: &str| text.split(' ').map(str::to_owned).collect();
    for (operator, list, web, probe) in [
        (Operator::In, "web db", true, false),
        (Operator::NotIn, "web db", false, true),
        (Operator::Exists, "", true, true),
        (Operator::DoesNotExist, "", false, false),
    ] {
        let mut snapshot = world();
        let mut rule = from_pods("", Some(""), &[]);
        for peer in &mut rule.peers {
            if let NetworkPeer::Pods { pods, .. } = peer {
                pods.expressions.push(Requirement {
                    key: "app".to_owned(),
                    operator,
                    values: values(list),
                });
            }
        }
        network(&mut snapshot, "shop/db", "app=db", Some(vec![rule]));
        arrives(&snapshot, tcp(WEB, DB, 80), web);
        arrives(&snapshot, tcp(PROBE, DB, 80), probe);
    }
}

#[test]
fn a_block_has_its_addresses_but_the_excepted_whoever_has_them() {
    let mut snapshot = world();
    let block = NetworkPeer::Block {
        cidr: "10.0.0.0/8".parse().unwrap(),
        except: vec!["10.3.0.0/16".parse().unwrap()],
    };
    let rule = NetworkRule {
        peers: vec![block],
        ports: Vec::new(),
    };
    network(&mut snapshot, "shop/db", "app=db", Some(vec![rule]));
    arrives(&snapshot, tcp(WEB, DB, 80), true);
    arrives(&snapshot, tcp("10.77.0.1", DB, 80), true);
    arrives(&snapshot, tcp(PROBE, DB, 80), false);
    arrives(&snapshot, tcp("192.168.3.7", DB, 80), false);
}

#[test]
fn ports_go_from_the_first_to_the_last_and_a_name_is_the_receiving_pods() {
    let rows = [
        (vec![range(IpProtocol::Tcp, 5432, 5432)], 5432, 5433),
        (vec![range(IpProtocol::Tcp, 30_000, 32_767)], 32_767, 32_768),
        (
            vec![PortMatch {
                protocol: IpProtocol::Tcp,
                ports: Ports::Named("sql".to_owned()),
            }],
            5432,
            5431,
        ),
    ];
    for (ports, inside, outside) in rows {
        let mut snapshot = world();
        let rule = from_pods("app=web", None, &ports);
        network(&mut snapshot, "shop/db", "app=db", Some(vec![rule]));
        arrives(&snapshot, tcp(WEB, DB, inside), true);
        arrives(&snapshot, tcp(WEB, DB, outside), false);
        let udp = Flow {
            protocol: Some(IpProtocol::Udp),
            ..tcp(WEB, DB, inside)
        };
        arrives(&snapshot, udp, false);
    }
}

#[test]
fn a_protocol_without_port_means_all_its_ports_and_no_ports_mean_all_protocols() {
    for (ports, udp, other) in [
        (
            vec![PortMatch {
                protocol: IpProtocol::Udp,
                ports: Ports::All,
            }],
            true,
            false,
        ),
        (vec![], true, true),
    ] {
        let mut snapshot = world();
        let rule = from_pods("app=web", None, &ports);
        network(&mut snapshot, "shop/db", "app=db", Some(vec![rule]));
        let flow = |protocol| Flow {
            protocol,
            ..tcp(WEB, DB, 9)
        };
        arrives(&snapshot, flow(Some(IpProtocol::Udp)), udp);
        arrives(&snapshot, flow(Some(IpProtocol::Tcp)), other);
        arrives(&snapshot, flow(Some(IpProtocol::Icmp)), other);
        arrives(&snapshot, flow(None), other);
    }
}

#[test]
fn a_pods_own_node_and_the_pod_itself_always_reach_it() {
    let mut snapshot = world();
    network(&mut snapshot, "shop/db", "app=db", Some(Vec::new()));
    let nothing = rule(Action::Deny, anybody(), anybody(), &[]);
    mesh(&mut snapshot, "nothing", false, vec![nothing]);
    for own in [NODE_B, "fd00::2", "10.9.0.2"] {
        let db = if own.contains(':') { "fd02::10" } else { DB };
        arrives(&snapshot, tcp(own, db, 80), true);
        check(&snapshot, "b", Direction::Out, tcp(db, own, 80), true);
    }
    arrives(&snapshot, tcp(DB, DB, 80), true);
    arrives(&snapshot, tcp(NODE_A, DB, 80), false);
    arrives(&snapshot, tcp(NODE_A, NODE_B, 80), false);
}

#[test]
fn pods_on_the_hosts_network_are_the_node() {
    let mut snapshot = world();
    let mut host = pod("shop/host", "c", "app=web", &[NODE_C]);
    host.host_network = true;
    snapshot.policy.pods.insert(host.name.clone(), host.into());
    let rule = from_pods("app=web", None, &[]);
    network(&mut snapshot, "shop/all", "", Some(vec![rule]));
    arrives(&snapshot, tcp(WEB, DB, 80), true);
    arrives(&snapshot, tcp(NODE_C, DB, 80), false);
    check(&snapshot, "c", Direction::In, tcp(PROBE, NODE_C, 80), true);
}

#[test]
fn both_filters_must_let_it_pass() {
    let mut snapshot = world();
    snapshot.mesh.default_action = DefaultAction::Deny;
    network(
        &mut snapshot,
        "shop/db",
        "app=db",
        Some(vec![from_pods("app=web", None, &[])]),
    );
    arrives(&snapshot, tcp(WEB, DB, 80), false);
    let all = rule(Action::Allow, anybody(), anybody(), &[]);
    mesh(&mut snapshot, "all", false, vec![all]);
    arrives(&snapshot, tcp(WEB, DB, 80), true);
    arrives(&snapshot, tcp(PROBE, DB, 80), false);
}

#[test]
fn what_has_no_room_is_judged_strictly() {
    let mut snapshot = world();
    let deny = rule(
        Action::Deny,
        nodes("c"),
        anybody(),
        &[range(IpProtocol::Tcp, 22, 22)],
    );
    mesh(&mut snapshot, "p", false, vec![deny]);
    let whole = tables(&snapshot, "b", LIMITS);
    for addresses in 0..whole.addresses.len() {
        let limits = Limits {
            addresses,
            ..LIMITS
        };
        let tables = tables(&snapshot, "b", limits);
        assert_eq!(tables.left_out.addresses, whole.addresses.len() - addresses);
        for from in [NODE_A, NODE_C, PROBE, "192.168.3.7", WEB] {
            for port in [22, 80] {
                let flow = tcp(from, NODE_B, port);
                let passes = tables.judge(&flow, Direction::In).allowed;
                let should = whole.judge(&flow, Direction::In).allowed;
                assert!(should || !passes, "{flow:?} with room for {addresses}");
                // What nobody is denied stays open.
                assert!(port == 22 || passes, "{flow:?} with room for {addresses}");
            }
        }
    }
    for (pairs, ports) in [(0, 10_000), (1, 10_000), (10_000, 0), (10_000, 2)] {
        let limits = Limits {
            pairs,
            ports,
            ..LIMITS
        };
        let tables = tables(&snapshot, "b", limits);
        assert!(tables.left_out.pairs > 0, "{limits:?}");
        let denied = tables.judge(&tcp(NODE_C, NODE_B, 22), Direction::In);
        assert!(!denied.allowed, "{limits:?}");
    }
}

#[test]
fn classes_grow_with_what_policies_distinguish_and_not_with_the_mesh() {
    let mut snapshot = world();
    for index in 0..5_000_u16 {
        let mut node = node(1, NODES[0]);
        let [high, low] = index.to_be_bytes();
        node.name = format!("n{index}").parse().unwrap();
        node.overlay_v4 = [100, 97, high, low].into();
        node.overlay_v6 = [0xfd00, 0, 0, 0, 0, 0, 1, index].into();
        node.prefixes = Vec::new();
        node.locality.site = Some(format!("s{}", index % 10).parse().unwrap());
        snapshot.nodes.insert(node.name.clone(), node);
    }
    let party = Party {
        sites: vec!["s7".parse().unwrap()],
        ..anybody()
    };
    let deny = rule(
        Action::Deny,
        party,
        nodes("b"),
        &[range(IpProtocol::Tcp, 22, 22)],
    );
    mesh(&mut snapshot, "p", false, vec![deny]);
    let limits = Limits {
        addresses: 10_000,
        ..LIMITS
    };
    let tables = tables(&snapshot, "b", limits);
    // The nodes at s7 in two families, node b with its prefixes, and the two of everything.
    assert_eq!(tables.addresses.len(), 500 * 2 + 5 + 2);
    assert!(tables.pairs.len() < 40, "{}", tables.pairs.len());
}

#[test]
fn numbers_stay_with_what_they_mean() {
    let mut snapshot = world();
    let deny = rule(
        Action::Deny,
        nodes("c"),
        anybody(),
        &[range(IpProtocol::Tcp, 22, 22)],
    );
    mesh(&mut snapshot, "p", false, vec![deny.clone()]);
    let mut compiler = Compiler::new("b".parse().unwrap(), LIMITS);
    assert!(compiler.update(&Arc::new(snapshot.clone())));
    let before = compiler.tables().clone();
    // Nothing about policy changed.
    snapshot.mesh.mtu_bytes = 1400;
    assert!(!compiler.update(&Arc::new(snapshot.clone())));
    let other = rule(
        Action::Deny,
        nodes("a"),
        anybody(),
        &[range(IpProtocol::Udp, 1, 9)],
    );
    mesh(&mut snapshot, "q", false, vec![other]);
    assert!(compiler.update(&Arc::new(snapshot.clone())));
    let both = compiler.tables().clone();
    let class = |tables: &Tables, ip: &str| tables.class(ip.parse::<IpAddr>().unwrap());
    assert_eq!(class(&before, NODE_C), class(&both, NODE_C));
    assert_ne!(class(&before, NODE_A), class(&both, NODE_A));
    snapshot.policy.mesh.remove("q");
    assert!(compiler.update(&Arc::new(snapshot)));
    assert_eq!(class(&before, NODE_C), class(compiler.tables(), NODE_C));
}

#[test]
fn pods_of_one_node_are_judged_for_each_of_them_and_the_world_as_well() {
    const CACHE: &str = "10.2.0.11";
    let mut snapshot = world();
    let cache = pod("shop/cache", "b", "app=cache", &[CACHE]);
    snapshot
        .policy
        .pods
        .insert(cache.name.clone(), cache.into());
    let sql = [range(IpProtocol::Tcp, 5432, 5432)];
    let from_cache = from_pods("app=cache", None, &sql);
    network(&mut snapshot, "shop/db", "app=db", Some(vec![from_cache]));
    let world = NetworkPeer::Block {
        cidr: "8.8.0.0/16".parse().unwrap(),
        except: vec!["8.8.4.0/24".parse().unwrap()],
    };
    let policy = NetworkPolicy {
        name: name("shop/cache"),
        pods: selector("app=cache"),
        ingress: None,
        egress: Some(vec![NetworkRule {
            peers: vec![world],
            ports: Vec::new(),
        }]),
    };
    let key = policy.name.clone();
    snapshot.policy.network.insert(key, policy.into());
    for (direction, flow, passes) in [
        // What one end receives is no matter of what the other one may send.
        (Direction::In, tcp(CACHE, DB, 5432), true),
        (Direction::Out, tcp(CACHE, DB, 5432), false),
        (Direction::In, tcp(CACHE, DB, 80), false),
        (Direction::Out, tcp(DB, CACHE, 80), true),
        (Direction::In, tcp(DB, CACHE, 80), true),
        (Direction::In, tcp("8.8.8.8", DB, 5432), false),
        (Direction::In, tcp("8.8.8.8", CACHE, 80), true),
        (Direction::Out, tcp(CACHE, "8.8.8.8", 53), true),
        (Direction::Out, tcp(CACHE, "8.8.4.4", 53), false),
        (Direction::Out, tcp(CACHE, "9.9.9.9", 53), false),
        (Direction::In, tcp(NODE_B, DB, 80), true),
        (Direction::Out, tcp(CACHE, NODE_B, 10250), true),
    ] {
        check(&snapshot, "b", direction, flow, passes);
    }
}

#[test]
fn what_both_ends_deny_to_a_pod_s_calls_is_known_where_the_pod_is() {
    let mut snapshot = world();
    assert!(callers(&snapshot, "a").caller(ip(WEB)).is_none());
    let sql = [range(IpProtocol::Tcp, 5432, 5432)];
    let from_web = from_pods("app=web", None, &sql);
    network(&mut snapshot, "shop/db", "app=db", Some(vec![from_web]));
    let denied = |snapshot: &Snapshot, (node, from): (&str, &str), to: &str, ports: &[u16]| {
        let ports = ports.iter().map(|&port| EndpointPort {
            name: String::new(),
            protocol: Protocol::Tcp,
            port,
        });
        let ports: Vec<_> = ports.collect();
        let caller = callers(snapshot, node)
            .caller(ip(from))?
            .is_denied(ip(to), &ports);
        Some(caller)
    };
    let (web, probe) = (("a", WEB), ("c", PROBE));
    for (from, to, ports, expected) in [
        (web, DB, &[80][..], Some(true)),
        // One port is enough, and no port is not known to be denied.
        (web, DB, &[80, 5432], Some(false)),
        (web, DB, &[], Some(false)),
        (web, "fd02::10", &[80], Some(true)),
        (("a", "fd01::10"), DB, &[80], Some(true)),
        (probe, DB, &[5432], Some(true)),
        // It has no IPv6.
        (probe, "fd02::10", &[5432], Some(false)),
        (web, PROBE, &[80], Some(false)),
        (("b", DB), WEB, &[80], Some(false)),
        // Neither another node's pod nor a node is one of its pods.
        (("b", WEB), DB, &[80], None),
        (("a", NODE_A), DB, &[80], None),
        (("a", "10.1.0.77"), DB, &[80], None),
    ] {
        let said = denied(&snapshot, from, to, ports);
        assert_eq!(said, expected, "{from:?} to {to}, {ports:?}");
    }
    // What the sender's side says counts as well, and what is only audited does not.
    let to_probe = rule(Action::Deny, nodes("a"), nodes("c"), &[]);
    mesh(&mut snapshot, "no-ops", true, vec![to_probe.clone()]);
    assert_eq!(denied(&snapshot, web, PROBE, &[80]), Some(false));
    mesh(&mut snapshot, "no-ops", false, vec![to_probe]);
    assert_eq!(denied(&snapshot, web, PROBE, &[80]), Some(true));
    assert_eq!(denied(&snapshot, web, NODE_A, &[80]), Some(false));
}

#[test]
fn where_the_tables_are_full_nobody_is_known_to_be_denied_anything() {
    let mut snapshot = world();
    snapshot.mesh.default_action = DefaultAction::Deny;
    assert!(callers(&snapshot, "a").caller(ip(WEB)).is_some());
    let limits = Limits { pairs: 1, ..LIMITS };
    let mut compiler = Compiler::of_calls("a".parse().unwrap(), limits);
    compiler.update(&Arc::new(snapshot.clone()));
    let callers = Callers::new(&compiler, &snapshot);
    assert!(callers.caller(ip(WEB)).is_none());
}
