use std::net::Ipv6Addr;

use mesh_wire::id::{MeshId, NodeId};

use super::*;
use crate::snapshot::{EndpointPort, MeshSettings, ServiceName, ServicePort};

/// `own` and `near` share site A, `zone` shares the zone, `region` the region, `far` nothing.
fn view() -> View {
    let mesh = MeshId([1; 32]);
    let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(mesh, "test"));
    let nodes = [
        ("own", Some("a"), "z1", "r1"),
        ("near", Some("a"), "z1", "r1"),
        ("zone", Some("b"), "z1", "r1"),
        ("region", None, "z2", "r1"),
        ("far", None, "z3", "r2"),
    ];
    for (index, (name, site, zone, region)) in (1_u8..).zip(nodes) {
        let id = NodeId([index; 32]);
        let node = Node {
            id,
            name: name.parse().unwrap(),
            locality: Locality {
                site: site.map(|site| site.parse().unwrap()),
                zone: Some(zone.to_owned()),
                region: Some(region.to_owned()),
            },
            overlay_v4: [100, 96, 0, index].into(),
            overlay_v6: mesh.overlay_v6(&id),
            prefixes: Vec::new(),
            underlay_addresses: vec![[192, 0, 2, index].into()],
            static_candidates: Vec::new(),
        };
        snapshot.nodes.insert(node.name.clone(), node);
    }
    let service = Service {
        name: name(),
        kind: ServiceKind::ClusterIp(vec![[10, 96, 0, 1].into(), vip_v6().into()]),
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 80,
        }],
        publish_not_ready: false,
    };
    snapshot.services.insert(name(), service);
    View {
        snapshot: Arc::new(snapshot),
        node: "own".parse().unwrap(),
        dead: BTreeSet::new(),
    }
}

fn name() -> ServiceName {
    ServiceName {
        namespace: "shop".into(),
        name: "inventory".into(),
    }
}

fn vip_v6() -> Ipv6Addr {
    "fd00:96::1".parse().unwrap()
}

fn on(node: &str, last: u8) -> Endpoint {
    Endpoint {
        address: [10, 42, 0, last].into(),
        node: Some(node.parse().unwrap()),
        zone: None,
        hostname: None,
        ready: true,
        serving: true,
        terminating: false,
    }
}

fn with(mut view: View, endpoints: Vec<Endpoint>) -> View {
    let ports = vec![EndpointPort {
        name: "http".into(),
        protocol: Protocol::Tcp,
        port: 8080,
    }];
    let slice = EndpointSlice {
        name: "s1".into(),
        ports,
        endpoints,
    };
    let slices = &mut Arc::make_mut(&mut view.snapshot).slices;
    slices.entry(name()).or_default().insert("s1".into(), slice);
    view
}

/// The last octets of the IPv4 endpoints that new flows go to.
#[track_caller]
fn check_chosen(view: &View, expected: &[u8]) {
    let frontend = Frontend {
        address: [10, 96, 0, 1].into(),
        port: 80,
        protocol: Protocol::Tcp,
    };
    let expected: Vec<SocketAddr> = expected
        .iter()
        .map(|&last| ([10, 42, 0, last], 8080).into())
        .collect();
    assert_eq!(table(view).get(&frontend), Some(&expected));
}

fn kill(view: &mut View, node: &str) {
    view.dead.insert(node.parse().unwrap());
}

#[test]
fn the_nearest_live_tier_takes_all_flows() {
    let endpoints = ["far", "region", "zone", "near", "own"]
        .into_iter()
        .zip(1..)
        .map(|(n, i)| on(n, i));
    let mut view = with(view(), endpoints.collect());
    check_chosen(&view, &[5]);
    for (node, next) in [("own", 4), ("near", 3), ("zone", 2), ("region", 1)] {
        kill(&mut view, node);
        check_chosen(&view, &[next]);
    }
    kill(&mut view, "far");
    check_chosen(&view, &[5]); // Nobody is alive: the nearest gets the packet that may wake it.
}

#[test]
fn copies_in_one_tier_share_and_duplicates_count_once() {
    check_chosen(
        &with(view(), vec![on("far", 2), on("far", 1), on("far", 2)]),
        &[1, 2],
    );
}

#[test]
fn an_endpoint_that_is_not_ready_takes_no_flow_unless_published() {
    let mut lame = on("near", 1);
    lame.ready = false;
    let mut view = with(view(), vec![lame, on("far", 2)]);
    check_chosen(&view, &[2]);
    let service = Arc::make_mut(&mut view.snapshot)
        .services
        .get_mut(&name())
        .unwrap();
    service.publish_not_ready = true;
    check_chosen(&view, &[1]);
}

#[test]
fn terminating_endpoints_serve_when_nothing_else_is_ready() {
    let mut leaving = on("far", 1);
    (leaving.ready, leaving.terminating) = (false, true);
    check_chosen(&with(view(), vec![leaving.clone()]), &[1]);
    check_chosen(&with(view(), vec![leaving, on("far", 2)]), &[2]);
}

#[test]
fn the_slice_zone_wins_over_the_nodes() {
    let mut moved = on("far", 1);
    moved.zone = Some("z1".into());
    check_chosen(&with(view(), vec![moved, on("region", 2)]), &[1]);
}

#[test]
fn a_nodes_own_address_leads_to_its_overlay_address() {
    let mut host = on("far", 0);
    host.address = [192, 0, 2, 5].into();
    let view = with(view(), vec![host]);
    let service = view.snapshot.services.get(&name()).unwrap();
    let addresses: Vec<_> = rank(&view, service).iter().map(|one| one.address).collect();
    assert_eq!(addresses, [IpAddr::from([100, 96, 0, 5])]);
}

#[test]
fn families_do_not_mix_and_an_empty_frontend_is_present() {
    let view = with(view(), vec![on("near", 1)]);
    let frontend = Frontend {
        address: vip_v6().into(),
        port: 80,
        protocol: Protocol::Tcp,
    };
    assert_eq!(table(&view).get(&frontend), Some(&Vec::new()));
}
