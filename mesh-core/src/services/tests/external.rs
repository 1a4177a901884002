//! External addresses, load balancers and node ports.

use super::*;

/// The service at every kind of address, with an endpoint on each node, near to far.
fn everywhere(change: impl FnOnce(&mut Service)) -> View {
    let mut view = with(view(), at(&ALL));
    let service = service_of(&mut view);
    service.kind = ServiceKind::ClusterIp(vec![[10, 96, 0, 1].into()]);
    service.ports[0].node_port = Some(30_080);
    service.external = External {
        addresses: vec![[203, 0, 113, 1].into(), "2001:db8::1".parse().unwrap()],
        load_balancer: vec![[203, 0, 113, 2].into()],
        ..External::default()
    };
    change(service);
    view
}

#[test]
fn a_service_is_reached_by_its_addresses_outside_and_its_node_port() {
    let view = everywhere(|_| {});
    let own = view.snapshot.nodes.get(&view.node).unwrap();
    let expected = [
        "10.96.0.1:80 Tcp: 10.42.0.1:8080".to_owned(),
        "100.96.0.1:30080 Tcp: 10.42.0.1:8080".to_owned(),
        "192.0.2.1:30080 Tcp: 10.42.0.1:8080".to_owned(),
        "203.0.113.1:80 Tcp: 10.42.0.1:8080".to_owned(),
        "203.0.113.2:80 Tcp: 10.42.0.1:8080".to_owned(),
        "[2001:db8::1]:80 Tcp: ".to_owned(),
        format!("[{}]:30080 Tcp: ", own.overlay_v6),
    ];
    assert_eq!(lines(&view), expected);
    assert!(table(&view).values().all(|one| one.outside.is_none()));
}

#[test]
fn an_ipv6_mapped_address_is_the_ipv4_address() {
    let view = everywhere(|service| {
        service.kind = ServiceKind::ClusterIp(vec!["::ffff:10.96.0.9".parse().unwrap()]);
    });
    assert_eq!(lines(&view)[0], "10.96.0.9:80 Tcp: 10.42.0.1:8080");
}

#[test]
fn headless_services_and_nodes_that_are_not_there_have_no_node_ports() {
    let mut view = everywhere(|service| service.kind = ServiceKind::Headless);
    assert_eq!(lines(&view), [""; 0]);
    service_of(&mut view).kind = ServiceKind::ClusterIp(Vec::new());
    service_of(&mut view).external = External::default();
    assert_eq!(lines(&view).len(), 3);
    view.node = "stranger".parse().unwrap();
    assert_eq!(lines(&view), [""; 0]);
}

/// Address, where clients inside are led, where those outside, and how many prefixes may.
type Row<'a> = (&'a str, &'a [u8], Option<(&'a [u8], usize)>);

#[track_caller]
fn check(view: &View, rows: &[Row<'_>]) {
    let table = table(view);
    let last = |endpoints: &[SocketAddr]| -> Vec<u8> {
        let octets = |addr: &SocketAddr| match addr.ip() {
            IpAddr::V4(v4) => v4.octets()[3],
            IpAddr::V6(v6) => v6.octets()[15],
        };
        endpoints.iter().map(octets).collect()
    };
    for (address, inside, outside) in rows {
        let address: SocketAddr = address.parse().unwrap();
        let frontend = Frontend {
            address: address.ip(),
            port: address.port(),
            protocol: Protocol::Tcp,
        };
        let found = table.get(&frontend).unwrap();
        assert_eq!(last(&found.endpoints), *inside, "{address} inside");
        let found = found.outside.as_ref();
        let found = found.map(|found| (last(&found.endpoints), found.sources.len()));
        let outside = outside.map(|(list, sources)| (list.to_vec(), sources));
        assert_eq!(found, outside, "{address} outside");
    }
}

#[test]
fn external_traffic_policy_local_is_for_clients_outside_alone() {
    let local = |service: &mut Service| service.external.local_only = true;
    let mut view = everywhere(local);
    let mut on_own: [Row<'_>; 4] = [
        ("10.96.0.1:80", &[1], None),
        ("192.0.2.1:30080", &[1], Some((&[1], 0))),
        ("203.0.113.1:80", &[1], Some((&[1], 0))),
        ("203.0.113.2:80", &[1], Some((&[1], 0))),
    ];
    check(&view, &on_own);
    // Nothing here: who is inside goes elsewhere, who is outside is refused.
    view = with(view, at(&["near", "far"]));
    for row in &mut on_own {
        row.1 = &[2];
        row.2 = row.2.map(|_| (&[][..], 0));
    }
    check(&view, &on_own);
}

#[test]
fn internal_traffic_policy_local_is_for_cluster_ips_alone() {
    let mut view = everywhere(|service| service.local_only = true);
    view = with(view, at(&["near", "far"]));
    let rows: [Row<'_>; 3] = [
        ("10.96.0.1:80", &[], None),
        ("100.96.0.1:30080", &[2], None),
        ("203.0.113.1:80", &[2], None),
    ];
    check(&view, &rows);
}

#[test]
fn source_ranges_are_for_load_balancer_addresses_and_clients_outside() {
    let ranges = ["198.51.100.0/24", "2001:db8:1::/48"];
    let view = everywhere(|service| {
        service.external.sources = ranges.map(|range| range.parse().unwrap()).into();
    });
    let rows: [Row<'_>; 4] = [
        ("10.96.0.1:80", &[1], None),
        ("192.0.2.1:30080", &[1], None),
        ("203.0.113.1:80", &[1], None),
        ("203.0.113.2:80", &[1], Some((&[1], 2))),
    ];
    check(&view, &rows);
}

#[test]
fn of_services_with_one_address_the_cluster_ip_comes_first_then_the_first_name() {
    let mut view = everywhere(|_| {});
    let snapshot = Arc::make_mut(&mut view.snapshot);
    let first = Service::clone(snapshot.services.get(&name()).unwrap());
    let taker = |namespace: &str| {
        let name = ServiceName {
            namespace: namespace.into(),
            name: "taker".into(),
        };
        // At the first one's ClusterIP, its external address and its node port; no endpoints.
        let external = External {
            addresses: vec![[10, 96, 0, 1].into(), [203, 0, 113, 1].into()],
            ..External::default()
        };
        Service {
            name,
            kind: ServiceKind::ClusterIp(vec![[10, 96, 0, 2].into()]),
            external,
            ..first.clone()
        }
    };
    let [before, after] = [taker("a"), taker("z")];
    snapshot.services.insert(after.name.clone(), after.into());
    let own: Row<'_> = ("10.96.0.1:80", &[1], None);
    let outside = ["203.0.113.1:80", "192.0.2.1:30080"];
    check(
        &view,
        &[own, (outside[0], &[1], None), (outside[1], &[1], None)],
    );
    let snapshot = Arc::make_mut(&mut view.snapshot);
    snapshot.services.insert(before.name.clone(), before.into());
    check(
        &view,
        &[own, (outside[0], &[], None), (outside[1], &[], None)],
    );
}

#[test]
fn a_health_check_counts_the_endpoints_here_that_are_ready() {
    let count = |view: &View| {
        let checks = health_checks(view);
        let check = checks.get(&30_090)?;
        assert_eq!((checks.len(), &check.service), (1, &name()));
        Some(check.local_endpoints)
    };
    let asked = |service: &mut Service| {
        service.external.local_only = true;
        service.external.health_check = Some(30_090);
    };
    let mut view = everywhere(asked);
    assert_eq!(count(&view), Some(1));
    view = with(view, at(&["near", "far"]));
    assert_eq!(count(&view), Some(0));
    // One pod in two slices, another one, and one that is not ready.
    let gone = Endpoint {
        ready: false,
        terminating: true,
        ..on("own", 8)
    };
    let twice = [on("own", 1), on("own", 1), on("own", 7), gone];
    view = with(view, twice.into());
    assert_eq!(count(&view), Some(2));
    service_of(&mut view).external.local_only = false;
    assert_eq!(count(&view), None);
}
