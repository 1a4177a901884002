use std::net::Ipv6Addr;

use mesh_wire::id::{MeshId, NodeId};

use super::*;
use crate::snapshot::{
    Balance, EndpointPort, Hints, MeshSettings, ServiceName, ServicePort, Weight,
};

mod external;
mod health;
mod incremental;
mod model;
mod sockmap;

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
        let (name, overlay_v4) = (name.parse().unwrap(), [100, 96, 0, index].into());
        let node = Node {
            locality: Locality {
                site: site.map(|site| site.parse().unwrap()),
                zone: Some(zone.to_owned()),
                region: Some(region.to_owned()),
            },
            underlay_addresses: vec![[192, 0, 2, index].into()],
            ..Node::new(&mesh, name, id, overlay_v4)
        };
        snapshot.nodes.insert(node.name.clone(), node);
    }
    let vips = vec![[10, 96, 0, 1].into(), vip_v6().into()];
    let service = Service {
        ports: vec![port("http", Protocol::Tcp, 80)],
        ..Service::new(name(), ServiceKind::ClusterIp(vips))
    };
    snapshot.services.insert(name(), service.into());
    View::new(Arc::new(snapshot), "own".parse().unwrap())
}

fn name() -> ServiceName {
    ServiceName {
        namespace: "shop".into(),
        name: "inventory".into(),
    }
}

fn port(name: &str, protocol: Protocol, port: u16) -> ServicePort {
    ServicePort {
        name: name.into(),
        protocol,
        port,
        node_port: None,
    }
}

fn vip_v6() -> Ipv6Addr {
    "fd00:96::1".parse().unwrap()
}

fn on(node: &str, last: u8) -> Endpoint {
    Endpoint::new([10, 42, 0, last].into(), Some(node.parse().unwrap()))
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
    let slices = slices.entry(name()).or_default();
    slices.insert("s1".into(), slice.into());
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
    let table = table(view);
    let found = table.get(&frontend).map(|backends| &backends.endpoints);
    assert_eq!(found, Some(&expected));
}

/// Every frontend with where it leads, as text.
fn lines(view: &View) -> Vec<String> {
    let line = |(frontend, backends): (Frontend, Backends)| {
        let at = SocketAddr::new(frontend.address, frontend.port);
        let ends: Vec<_> = backends.endpoints.iter().map(ToString::to_string).collect();
        format!("{at} {:?}: {}", frontend.protocol, ends.join(" "))
    };
    table(view).into_iter().map(line).collect()
}

fn service_of(view: &mut View) -> &mut Service {
    let services = &mut Arc::make_mut(&mut view.snapshot).services;
    Arc::make_mut(services.get_mut(&name()).unwrap())
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
    service_of(&mut view).publish_not_ready = true;
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
    let expected = ["10.96.0.1:80 Tcp: 10.42.0.1:8080", "[fd00:96::1]:80 Tcp: "];
    assert_eq!(lines(&view), expected);
}

/// Endpoints by the name of their node; the last octets are 1 to 5, near to far.
fn at(nodes: &[&str]) -> Vec<Endpoint> {
    let number = |node: &str| match node {
        "own" => 1,
        "near" => 2,
        "zone" => 3,
        "region" => 4,
        "far" => 5,
        other => panic!("no node {other}"),
    };
    nodes.iter().map(|node| on(node, number(node))).collect()
}

const ALL: [&str; 5] = ["own", "near", "zone", "region", "far"];

#[test]
fn traffic_distribution_widens_what_counts_as_near() {
    use TrafficDistribution::{SameNode, SameZone};
    let elsewhere = &["region", "far"];
    let rows: [(_, &[&str], &[&str], &[u8]); 12] = [
        (None, &ALL, &[], &[1]),
        (None, &["near", "zone"], &[], &[2]),
        (None, elsewhere, &[], &[4]),
        (Some(SameZone), &ALL, &[], &[1, 2, 3]),
        (Some(SameZone), &ALL, &["near", "zone"], &[1]),
        (Some(SameZone), &["zone", "far"], &["zone"], &[5]),
        (Some(SameZone), elsewhere, &[], &[4, 5]),
        (Some(SameNode), &ALL, &[], &[1]),
        (Some(SameNode), &["near", "zone", "far"], &[], &[2, 3]),
        (Some(SameNode), &["own", "near", "zone"], &["own"], &[2, 3]),
        (Some(SameNode), elsewhere, &[], &[4, 5]),
        (Some(SameNode), elsewhere, &["region"], &[5]),
    ];
    for (distribution, nodes, dead, expected) in rows {
        let mut view = with(view(), at(nodes));
        service_of(&mut view).distribution = distribution;
        dead.iter().for_each(|node| kill(&mut view, node));
        check_chosen(&view, expected);
    }
}

#[test]
fn internal_traffic_policy_local_never_leaves_the_node() {
    let state = |mut endpoint: Endpoint, ready, terminating| {
        (endpoint.ready, endpoint.terminating) = (ready, terminating);
        endpoint
    };
    let here = || on("own", 1);
    let rows = [
        (at(&ALL), &[1_u8][..]),
        (at(&["near", "far"]), &[]),
        (vec![state(here(), false, false), on("near", 2)], &[]),
        // Its own drain, though others are ready elsewhere.
        (vec![state(here(), false, true), on("near", 2)], &[1]),
        (vec![state(here(), false, true), on("own", 6)], &[6]),
    ];
    for (endpoints, expected) in rows {
        let mut view = with(view(), endpoints);
        service_of(&mut view).local_only = true;
        // Neither of these has a say.
        service_of(&mut view).distribution = Some(TrafficDistribution::SameZone);
        check_chosen(&view, expected);
    }
}

/// An endpoint with `zones/nodes` as hints, names separated by commas.
fn hinted(node: &str, hints: &str) -> Endpoint {
    let (zones, nodes) = hints.split_once('/').unwrap();
    let names = |text: &str| -> Vec<String> {
        let names = text.split(',').filter(|name| !name.is_empty());
        names.map(ToOwned::to_owned).collect()
    };
    let nodes = names(nodes).into_iter().map(|node| node.parse().unwrap());
    let hints = Hints {
        zones: names(zones),
        nodes: nodes.collect(),
    };
    let endpoint = at(&[node]).remove(0);
    Endpoint { hints, ..endpoint }
}

#[test]
fn hints_count_where_they_are_complete_and_name_this_node_or_zone() {
    /// What it is, node and hints, dead nodes, who is chosen.
    type Row<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a [&'a str], &'a [u8]);
    let rows: [Row<'_>; 9] = [
        (
            "a zone's hint beats distance",
            &[("own", "z2/"), ("region", "z1/"), ("far", "z3,z1/")],
            &[],
            &[4, 5],
        ),
        (
            "a node's hint beats a zone's",
            &[("own", "z1/far"), ("far", "z3/own"), ("zone", "z1/zone")],
            &[],
            &[5],
        ),
        (
            "no hint for this node: the zone's",
            &[("own", "z2/far"), ("far", "z1/far"), ("zone", "z1/zone")],
            &[],
            &[3, 5],
        ),
        (
            "one endpoint has none: they are half written",
            &[("own", "/"), ("far", "z1/")],
            &[],
            &[1],
        ),
        (
            "one has no hint for nodes: zones count",
            &[("own", "z2/own"), ("far", "z1/")],
            &[],
            &[5],
        ),
        (
            "none is for here: distance",
            &[("own", "z2/far"), ("far", "z3/far")],
            &[],
            &[1],
        ),
        (
            "whom they name is cut off: the others",
            &[("region", "z2/"), ("far", "z1/"), ("zone", "z2/")],
            &["far"],
            &[3, 4],
        ),
        (
            "the node's is cut off: the zone's",
            &[("far", "z3/own"), ("region", "z1/far"), ("own", "z2/far")],
            &["far"],
            &[4],
        ),
        (
            "nobody is alive: as if all were",
            &[("region", "z2/"), ("far", "z1/")],
            &["far", "region"],
            &[5],
        ),
    ];
    for (what, endpoints, dead, expected) in rows {
        println!("{what}");
        let endpoints = endpoints.iter().map(|(node, hints)| hinted(node, hints));
        let mut view = with(view(), endpoints.collect());
        dead.iter().for_each(|node| kill(&mut view, node));
        check_chosen(&view, expected);
    }
}

#[test]
fn hints_are_for_ready_endpoints_and_for_services_that_are_not_local() {
    let mut lame = on("own", 1);
    lame.ready = false; // Without hints, and not asked.
    let endpoints = vec![lame, hinted("zone", "z2/"), hinted("far", "z1/")];
    let mut view = with(view(), endpoints);
    check_chosen(&view, &[5]);
    let second = Endpoint {
        address: [10, 42, 0, 6].into(),
        ..hinted("own", "z1/own")
    };
    let mut endpoints = vec![hinted("own", "z2/far"), second, hinted("far", "z1/own")];
    view = with(view, endpoints.clone());
    check_chosen(&view, &[5, 6]);
    service_of(&mut view).local_only = true;
    check_chosen(&view, &[1, 6]);
    // A drain asks nobody for hints: the nearest.
    for endpoint in &mut endpoints {
        (endpoint.ready, endpoint.terminating) = (false, true);
    }
    view = with(view, endpoints);
    service_of(&mut view).local_only = false;
    check_chosen(&view, &[1, 6]);
}

#[test]
fn each_port_has_its_own_endpoints_by_name_and_protocol() {
    let mut view = view();
    service_of(&mut view).kind = ServiceKind::ClusterIp(vec![[10, 96, 0, 1].into()]);
    service_of(&mut view).ports = vec![
        port("dns", Protocol::Udp, 53),
        port("dns-tcp", Protocol::Tcp, 53),
        port("metrics", Protocol::Tcp, 9153),
        port("nobody", Protocol::Tcp, 1),
    ];
    let serves = |name: &str, protocol, port| EndpointPort {
        name: name.into(),
        protocol,
        port,
    };
    // `targetPort` by name: each pod's own number, and the old pod has no metrics.
    let mut slices = [("new", "far", 5, 1053), ("old", "own", 1, 53)].map(|parts| {
        let (name, node, last, number) = parts;
        EndpointSlice {
            name: name.into(),
            ports: vec![
                serves("dns", Protocol::Udp, number),
                serves("dns-tcp", Protocol::Tcp, number),
                // The same name, the other protocol: another port.
                serves("nobody", Protocol::Udp, number),
            ],
            endpoints: vec![on(node, last)],
        }
    });
    slices[0].ports.push(serves("metrics", Protocol::Tcp, 9153));
    let slices = slices.map(|slice| (slice.name.clone(), slice.into()));
    let all = &mut Arc::make_mut(&mut view.snapshot).slices;
    all.insert(name(), slices.into());
    let expected = [
        "10.96.0.1:1 Tcp: ",
        "10.96.0.1:53 Tcp: 10.42.0.1:53",
        "10.96.0.1:53 Udp: 10.42.0.1:53",
        // Further than the other, but the nearest that has it.
        "10.96.0.1:9153 Tcp: 10.42.0.5:9153",
    ];
    assert_eq!(lines(&view), expected);
    let service = view.snapshot.services.get(&name()).unwrap();
    let chosen: Vec<_> = rank(&view, service).iter().map(|one| one.chosen).collect();
    assert_eq!(chosen, [true, true]);
}

#[test]
fn dual_stack_chooses_and_drains_each_family_by_itself() {
    let v6 = |node: &str, last: u16| Endpoint {
        address: Ipv6Addr::new(0xfd42, 0, 0, 0, 0, 0, 0, last).into(),
        ..on(node, 0)
    };
    let mut leaving = v6("near", 2);
    (leaving.ready, leaving.terminating) = (false, true);
    let view_of = |v6: Vec<Endpoint>| with(view(), [at(&["own", "far"]), v6].concat());
    let line = |last: &str| format!("[fd00:96::1]:80 Tcp: {last}");
    let v4 = "10.96.0.1:80 Tcp: 10.42.0.1:8080".to_owned();
    let draining = view_of(vec![leaving.clone()]);
    let service = draining.snapshot.services.get(&name()).unwrap();
    assert!(rank(&draining, service).iter().all(|one| one.usable));
    // The nearest IPv6 endpoint, though an IPv4 one is nearer; draining, though IPv4 is ready.
    let rows = [
        (vec![v6("far", 5)], "[fd42::5]:8080"),
        (vec![leaving.clone()], "[fd42::2]:8080"),
        (vec![leaving, v6("far", 5)], "[fd42::5]:8080"),
    ];
    for (endpoints, expected) in rows {
        assert_eq!(lines(&view_of(endpoints)), [v4.clone(), line(expected)]);
    }
}

#[test]
fn a_service_without_selector_leads_to_addresses_that_no_node_has() {
    let printer = |last| Endpoint {
        node: None,
        ..on("own", last)
    };
    let mut view = with(view(), vec![printer(9), printer(8)]);
    check_chosen(&view, &[8, 9]);
    ALL.iter().for_each(|node| kill(&mut view, node));
    check_chosen(&view, &[8, 9]);
}

#[test]
fn headless_and_external_name_services_have_no_frontend() {
    for kind in [
        ServiceKind::Headless,
        ServiceKind::ExternalName("db.example.com".into()),
    ] {
        let mut view = with(view(), at(&ALL));
        service_of(&mut view).kind = kind;
        assert_eq!(lines(&view), [""; 0]);
    }
}

/// The API server's slices name no node. Node `far` is the control plane, at 192.0.2.5.
#[test]
fn the_api_server_is_reached_by_the_overlay_where_its_node_is_known_for_sure() {
    let check = |namespace: &str, clash: bool, expected: &str| {
        let mut view = view();
        let snapshot = Arc::make_mut(&mut view.snapshot);
        let service = snapshot.services.remove(&name()).unwrap();
        let mut service = Arc::unwrap_or_clone(service);
        service.name = ServiceName {
            namespace: namespace.into(),
            name: "kubernetes".into(),
        };
        service.kind = ServiceKind::ClusterIp(vec![[10, 96, 0, 1].into()]);
        let slice = EndpointSlice {
            name: "kubernetes".into(),
            ports: vec![EndpointPort {
                name: "http".into(),
                protocol: Protocol::Tcp,
                port: 6443,
            }],
            endpoints: vec![Endpoint {
                address: [192, 0, 2, 5].into(),
                node: None,
                ..on("far", 0)
            }],
        };
        let slices = BTreeMap::from([(slice.name.clone(), slice.into())]);
        snapshot.slices.insert(service.name.clone(), slices);
        snapshot
            .services
            .insert(service.name.clone(), service.into());
        if clash {
            let other = snapshot.nodes.get_mut("region").unwrap();
            other.underlay_addresses.push([192, 0, 2, 5].into());
        }
        assert_eq!(lines(&view), [format!("10.96.0.1:80 Tcp: {expected}")]);
    };
    check("default", false, "100.96.0.5:6443");
    check("default", true, "192.0.2.5:6443");
    check("shop", false, "192.0.2.5:6443");
}

#[test]
fn affinity_holds_for_every_frontend_of_its_service() {
    let mut view = with(view(), at(&ALL));
    let affinities = |view: &View| -> Vec<_> {
        let table = table(view).into_values();
        table.map(|backends| backends.affinity).collect()
    };
    assert_eq!(affinities(&view), [None, None]);
    let hours = Some(Duration::from_secs(10_800));
    service_of(&mut view).affinity = hours;
    assert_eq!(affinities(&view), [hours, hours]);
}

#[test]
fn an_endpoint_has_the_first_weight_that_matches_where_it_is() {
    let weight = |place, weight| Weight { place, weight };
    let mut view = with(view(), at(&["region", "far"]));
    let rows = [
        (Place::Address([10, 42, 0, 4].into()), [3, 1]),
        (Place::Node("far".parse().unwrap()), [1, 3]),
        (Place::Site("a".parse().unwrap()), [1, 1]),
        (Place::Zone("z2".into()), [3, 1]),
        (Place::Region("r2".into()), [1, 3]),
    ];
    for (place, expected) in rows {
        println!("{place:?}");
        let all = |weight| {
            move |region: &str| Weight {
                place: Place::Region(region.into()),
                weight,
            }
        };
        let mut weights = vec![weight(place, 3)];
        weights.extend(["r1", "r2"].map(all(1)));
        service_of(&mut view).balance = Balance {
            spill_over: 2,
            weights,
            ..Balance::default()
        };
        // Of one tier, so that they share by weight.
        service_of(&mut view).distribution = Some(TrafficDistribution::SameZone);
        let table = table(&view);
        let list = &table.values().next().unwrap().endpoints;
        let count = |last| {
            let one = SocketAddr::from(([10, 42, 0, last], 8080));
            list.iter().filter(|&&found| found == one).count()
        };
        assert_eq!([4, 5].map(count), expected);
    }
    let service = view.snapshot.services.get(&name()).unwrap();
    assert!(rank(&view, service).iter().all(|one| one.chosen));
}

/// However little new flows may go there.
#[test]
fn a_service_has_an_endpoint_until_no_slice_lists_it() {
    let mut not_ready = on("zone", 3);
    not_ready.ready = false;
    let mut leaving = on("region", 4);
    (leaving.ready, leaving.serving, leaving.terminating) = (false, false, true);
    let mut view = with(
        view(),
        vec![
            on("near", 1),
            on("far", 2),
            not_ready,
            leaving,
            on("own", 5),
        ],
    );
    view.dead = BTreeSet::from(["near".parse().unwrap()]);
    let mut table = Table::default();
    table.update(&Arc::new(view.clone()));
    let asked = |port, protocol| Frontend {
        address: [10, 96, 0, 1].into(),
        port,
        protocol,
    };
    let http = asked(80, Protocol::Tcp);
    let at = |last: u8, port: u16| SocketAddr::from(([10, 42, 0, last], port));
    for last in 1..=5 {
        assert!(table.has(&http, at(last, 8080)), "{last}");
    }
    check_chosen(&view, &[5]);
    assert!(!table.has(&http, at(6, 8080)), "another address");
    assert!(!table.has(&http, at(1, 8081)), "another port");
    assert!(!table.has(&asked(80, Protocol::Udp), at(1, 8080)));
    assert!(!table.has(&asked(81, Protocol::Tcp), at(1, 8080)));
    table.update(&Arc::new(with(view.clone(), vec![on("own", 5)])));
    assert!(
        !table.has(&http, at(2, 8080)),
        "gone, though it was never chosen"
    );
    assert!(table.has(&http, at(5, 8080)));
    Arc::make_mut(&mut view.snapshot).services.clear();
    table.update(&Arc::new(view));
    assert!(!table.has(&http, at(5, 8080)), "without a service");
}
