use std::num::NonZeroU16;

use mesh_core::{
    policy::resources::{Action, DefaultAction, MeshPolicy, MeshRule, Party},
    snapshot::{Endpoint, EndpointPort, EndpointSlice, MeshSettings, ServicePort},
};
use mesh_wire::id::{MeshId, NodeId};

use super::*;

const HTTP: Asked = Asked {
    port: 80,
    protocol: Protocol::Tcp,
};

fn name() -> ServiceName {
    ServiceName {
        namespace: "shop".into(),
        name: "inventory".into(),
    }
}

/// `own` and `far`; service shop/inventory at 10.43.0.10:80, behind which is `far`:8080.
fn snapshot() -> Snapshot {
    let mesh = MeshId([1; 32]);
    let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(mesh, "demo"));
    for (node, last) in [("own", 1), ("far", 2)] {
        let node: NodeName = node.parse().unwrap();
        let built = Node::new(
            &mesh,
            node.clone(),
            NodeId([last; 32]),
            [100, 96, 0, last].into(),
        );
        snapshot.nodes.insert(node, built);
    }
    let port = ServicePort {
        name: String::new(),
        protocol: Protocol::Tcp,
        port: 80,
        node_port: None,
    };
    let service = Service {
        ports: vec![port],
        ..Service::new(name(), ServiceKind::ClusterIp(vec![[10, 43, 0, 10].into()]))
    };
    snapshot.services.insert(name(), service.into());
    let slice = EndpointSlice {
        name: "s".into(),
        ports: vec![EndpointPort {
            name: String::new(),
            protocol: Protocol::Tcp,
            port: 8080,
        }],
        endpoints: vec![endpoint(true)],
    };
    let slices = [("s".to_owned(), Arc::new(slice))].into();
    snapshot.slices.insert(name(), slices);
    snapshot
}

fn endpoint(ready: bool) -> Endpoint {
    Endpoint {
        ready,
        serving: ready,
        ..Endpoint::new([100, 96, 0, 2].into(), Some("far".parse().unwrap()))
    }
}

fn deny(snapshot: &mut Snapshot) {
    let far = Party {
        nodes: vec!["far".parse().unwrap()],
        ..Party::default()
    };
    let rule = MeshRule {
        action: Action::Deny,
        from: Vec::new(),
        to: vec![far],
        ports: Vec::new(),
    };
    let policy = MeshPolicy {
        name: "lock-down".into(),
        audit: false,
        rules: vec![rule],
    };
    snapshot
        .policy
        .mesh
        .insert("lock-down".into(), policy.into());
}

fn run(
    snapshot: Snapshot,
    change: impl FnOnce(&mut View, &mut BTreeMap<NodeName, PeerSeen>),
    from: Option<&str>,
    to: &str,
    asked: Asked,
) -> Vec<HopReport> {
    let mut view = View::new(Arc::new(snapshot), "own".parse().unwrap());
    let mut peers = BTreeMap::new();
    change(&mut view, &mut peers);
    let counts = BTreeMap::from([("denied", 4)]);
    let known = Known {
        view: &view,
        peers: &peers,
        enforces: true,
        counts: &counts,
    };
    let from: Option<NodeName> = from.map(|from| from.parse().unwrap());
    let to = target(&view.snapshot, to);
    trace(&known, from.as_ref(), &to, asked)
}

/// Stage and verdict of each hop.
fn said(hops: &[HopReport]) -> Vec<String> {
    hops.iter()
        .map(|hop| format!("{} {} {}", hop.node, hop.stage, hop.verdict))
        .collect()
}

fn failed(hops: &[HopReport]) -> &HopReport {
    let found = hops.iter().find(|hop| hop.verdict == "failed");
    found.unwrap_or_else(|| panic!("{:?}", said(hops)))
}

fn direct(peers: &mut BTreeMap<NodeName, PeerSeen>) {
    let seen = PeerSeen {
        state: "direct".into(),
        path: "203.0.113.5:51820".into(),
        rtt_ms: 20.0,
        full_size: true,
        heard_ms: Some(1_200),
        ..PeerSeen::default()
    };
    peers.insert("far".parse().unwrap(), seen);
}

#[test]
fn a_flow_that_arrives_has_a_verdict_at_each_hop_and_the_way_back_is_left_to_who_knows_it() {
    let hops = run(
        snapshot(),
        |_, peers| direct(peers),
        None,
        "shop/inventory",
        HTTP,
    );
    let expected = [
        "own service ok",
        "own endpoint ok",
        "own route ok",
        "own policy ok",
        "far policy ok",
        "own path ok",
        "own mtu ok",
        "far path ok",
    ];
    assert_eq!(said(&hops), expected);
    let back = hops.last().unwrap();
    assert!(
        back.way == "back" && back.text.contains("only it knows"),
        "{}",
        back.text
    );
    assert!(back.counter.is_empty(), "what it counts is not known here");
}

#[test]
fn the_service_s_address_its_name_and_the_node_itself_lead_to_the_same_node() {
    for (to, asked) in [("10.43.0.10", HTTP), ("far", Asked { port: 8080, ..HTTP })] {
        let hops = run(snapshot(), |_, peers| direct(peers), None, to, asked);
        assert!(
            said(&hops).contains(&"far policy ok".to_owned()),
            "{to}: {:?}",
            said(&hops)
        );
    }
    let text = target(&snapshot(), "inventory.shop.svc.cluster.local");
    assert!(matches!(text, Target::Name(_)));
}

#[test]
fn who_denies_is_named_at_the_node_that_does_and_nothing_comes_after_it() {
    let mut denied = snapshot();
    deny(&mut denied);
    let hops = run(
        denied.clone(),
        |_, peers| direct(peers),
        None,
        "10.43.0.10",
        HTTP,
    );
    let hop = failed(&hops);
    assert!(
        hop.text
            .starts_with("denied by MeshPolicy lock-down: 100.96.0.1 to 100.96.0.2:8080"),
        "{}",
        hop.text
    );
    assert_eq!(
        (hop.node.as_str(), hop.counter.as_str(), hop.count),
        ("own", "denied", 4)
    );
    assert_eq!(hops.last(), Some(hop));

    let policy = denied.policy.mesh.get_mut("lock-down").unwrap();
    Arc::make_mut(policy).audit = true;
    let hops = run(denied, |_, peers| direct(peers), None, "10.43.0.10", HTTP);
    assert!(
        said(&hops).contains(&"own policy degraded".to_owned()),
        "{:?}",
        said(&hops)
    );
    let mut nothing_said = snapshot();
    nothing_said.mesh.default_action = DefaultAction::Deny;
    let hops = run(
        nothing_said,
        |_, peers| direct(peers),
        None,
        "10.43.0.10",
        HTTP,
    );
    assert!(
        failed(&hops).text.contains("denied by defaultAction"),
        "{}",
        failed(&hops).text
    );
}

#[test]
fn a_service_without_the_port_without_endpoints_or_without_being_says_so() {
    let hops = run(
        snapshot(),
        |_, _| (),
        None,
        "10.43.0.10",
        Asked { port: 81, ..HTTP },
    );
    assert!(
        failed(&hops)
            .text
            .ends_with("has no port 81/TCP: it has 80/TCP"),
        "{}",
        failed(&hops).text
    );
    let hops = run(snapshot(), |_, _| (), None, "shop/nothing", HTTP);
    assert!(
        failed(&hops)
            .text
            .starts_with("there is no service shop/nothing")
    );
    let mut none = snapshot();
    none.slices.clear();
    let hops = run(none, |_, _| (), None, "shop/inventory", HTTP);
    assert!(
        failed(&hops).text.contains("No pod or device is behind it"),
        "{}",
        failed(&hops).text
    );
    let mut unready = snapshot();
    let slices = unready.slices.get_mut(&name()).unwrap();
    let slice = slices.get_mut("s").unwrap();
    Arc::make_mut(slice).endpoints = vec![endpoint(false)];
    let hops = run(unready, |_, _| (), None, "shop/inventory", HTTP);
    assert!(
        failed(&hops).text.contains("100.96.0.2 is not ready"),
        "{}",
        failed(&hops).text
    );
}

#[test]
fn a_dead_endpoint_an_unreachable_node_and_an_mtu_hole_are_named() {
    let at: SocketAddr = "100.96.0.2:8080".parse().unwrap();
    let ejected = |view: &mut View, peers: &mut BTreeMap<_, _>| {
        view.ejected.insert(at);
        direct(peers);
    };
    let hops = run(snapshot(), ejected, None, "10.43.0.10", HTTP);
    assert!(
        failed(&hops)
            .text
            .contains("100.96.0.2:8080 (anywhere), one of 1"),
        "{}",
        failed(&hops).text
    );
    assert!(failed(&hops).text.contains("Nothing listens there"));

    let gone = |view: &mut View, peers: &mut BTreeMap<NodeName, PeerSeen>| {
        view.dead.insert("far".parse().unwrap());
        direct(peers);
        let peer = peers.values_mut().next().unwrap();
        peer.state = "unreachable".into();
        peer.reason = "udp_blocked".into();
        peer.path.clear();
    };
    let hops = run(snapshot(), gone, None, "far", Asked { port: 22, ..HTTP });
    assert!(
        failed(&hops)
            .text
            .starts_with("far is unreachable (udp_blocked)"),
        "{}",
        failed(&hops).text
    );

    let hole = |_: &mut View, peers: &mut BTreeMap<NodeName, PeerSeen>| {
        direct(peers);
        let peer = peers.values_mut().next().unwrap();
        (peer.state, peer.path) = ("relayed".into(), "relay r1 (quic)".into());
        peer.small_only = vec!["203.0.113.5:51820".into()];
    };
    let hops = run(snapshot(), hole, None, "far", Asked { port: 22, ..HTTP });
    let mtu = hops.iter().find(|hop| hop.stage == "mtu").unwrap();
    assert!(
        mtu.verdict == "degraded"
            && mtu
                .text
                .contains("only small packets pass by 203.0.113.5:51820")
    );
}

#[test]
fn an_address_that_nobody_has_is_dropped_and_one_outside_the_mesh_is_left_to_the_kernel() {
    let hops = run(snapshot(), |_, _| (), None, "100.96.9.9", HTTP);
    assert!(
        failed(&hops)
            .text
            .starts_with("no node of the mesh has 100.96.9.9")
    );
    assert_eq!(failed(&hops).counter, "no_route");
    let hops = run(snapshot(), |_, _| (), None, "192.0.2.1", HTTP);
    assert_eq!(said(&hops), ["own service ok", "own route unknown"]);
}

#[test]
fn of_another_source_only_what_all_nodes_know_is_said() {
    let hops = run(snapshot(), |_, _| (), Some("far"), "own", HTTP);
    let expected = [
        "far service ok",
        "far route ok",
        "far policy ok",
        "own policy ok",
        "far path unknown",
    ];
    assert_eq!(said(&hops), expected);
    assert!(
        hops.last()
            .unwrap()
            .text
            .contains("run `meshctl trace own:80` there")
    );
}

#[test]
fn a_full_endpoint_is_degraded_and_no_failure() {
    let mut full = snapshot();
    let service = full.services.get_mut(&name()).unwrap();
    Arc::make_mut(service).balance.max_connections = NonZeroU16::new(1);
    let at: SocketAddr = "100.96.0.2:8080".parse().unwrap();
    let open = |view: &mut View, peers: &mut BTreeMap<_, _>| {
        view.open.insert(at, 1);
        direct(peers);
    };
    let hops = run(full, open, None, "10.43.0.10", HTTP);
    assert!(
        said(&hops).contains(&"own endpoint degraded".to_owned()),
        "{:?}",
        said(&hops)
    );
}
