//! Which connections may go past TCP.

use proptest::prelude::*;

use super::{
    model::{any_view, node_of},
    *,
};

/// With `sockmap`, and an endpoint on each node.
fn asked_for() -> View {
    let mut view = with(view(), at(&ALL));
    service_of(&mut view).balance.sockmap = true;
    view
}

/// Each pair as text.
fn pairs(view: &View) -> Vec<String> {
    let line = |(frontend, endpoint): (Frontend, SocketAddr)| {
        let at = SocketAddr::new(frontend.address, frontend.port);
        format!("{at} {:?}: {endpoint}", frontend.protocol)
    };
    sockmap(view).into_iter().map(line).collect()
}

fn slice_of(view: &mut View) -> &mut EndpointSlice {
    let slices = &mut Arc::make_mut(&mut view.snapshot).slices;
    Arc::make_mut(slices.get_mut(&name()).unwrap().get_mut("s1").unwrap())
}

#[test]
fn a_service_that_asks_for_it_is_paired_with_its_endpoints_here() {
    let mut view = asked_for();
    assert_eq!(pairs(&view), ["10.96.0.1:80 Tcp: 10.42.0.1:8080"]);
    service_of(&mut view).balance.sockmap = false;
    assert_eq!(pairs(&view), [""; 0]);
    let view = with(asked_for(), at(&["near", "far"]));
    assert_eq!(pairs(&view), [""; 0]);
    for kind in [
        ServiceKind::Headless,
        ServiceKind::ExternalName("db.example.com".into()),
    ] {
        let mut view = asked_for();
        service_of(&mut view).kind = kind;
        assert_eq!(pairs(&view), [""; 0]);
    }
}

#[test]
fn other_services_give_nothing() {
    let mut view = asked_for();
    let snapshot = Arc::make_mut(&mut view.snapshot);
    let mut other = Service::clone(&snapshot.services[&name()]);
    other.name.name = "other".into();
    other.kind = ServiceKind::ClusterIp(vec![[10, 96, 0, 2].into()]);
    other.balance.sockmap = false;
    let slices = snapshot.slices[&name()].clone();
    snapshot.slices.insert(other.name.clone(), slices);
    snapshot.services.insert(other.name.clone(), other.into());
    assert_eq!(pairs(&view), ["10.96.0.1:80 Tcp: 10.42.0.1:8080"]);
}

#[test]
fn each_tcp_port_is_paired_at_its_own_target_and_udp_is_not() {
    let mut view = asked_for();
    let numbers = [("http", 80, 8080), ("admin", 81, 9090), ("nobody", 82, 0)];
    let service = service_of(&mut view);
    service.ports = numbers
        .map(|(name, number, _)| port(name, Protocol::Tcp, number))
        .into();
    service.ports.push(port("http", Protocol::Udp, 80));
    let targets = numbers[..2].iter();
    let target = |protocol, &(name, _, port): &(&str, u16, u16)| EndpointPort {
        name: name.into(),
        protocol,
        port,
    };
    let tcp = targets.clone().map(|one| target(Protocol::Tcp, one));
    let udp = targets.map(|one| target(Protocol::Udp, one));
    slice_of(&mut view).ports = udp.chain(tcp).collect();
    let expected = [
        "10.96.0.1:80 Tcp: 10.42.0.1:8080",
        "10.96.0.1:81 Tcp: 10.42.0.1:9090",
    ];
    assert_eq!(pairs(&view), expected);
}

#[test]
fn each_family_is_paired_with_itself() {
    let v6 = Endpoint {
        address: "fd42::1".parse().unwrap(),
        ..on("own", 0)
    };
    let view = with(asked_for(), vec![on("own", 1), v6]);
    let expected = [
        "10.96.0.1:80 Tcp: 10.42.0.1:8080",
        "[fd00:96::1]:80 Tcp: [fd42::1]:8080",
    ];
    assert_eq!(pairs(&view), expected);
}

/// Whom new flows go to does not matter: those that are open stay.
#[test]
fn an_endpoint_is_paired_also_while_new_flows_avoid_it() {
    let mut not_ready = on("own", 1);
    not_ready.ready = false;
    let mut leaving = on("own", 2);
    (leaving.ready, leaving.serving, leaving.terminating) = (false, false, true);
    let mut view = with(asked_for(), vec![not_ready, leaving, on("own", 3)]);
    view.ejected = [SocketAddr::from(([10, 42, 0, 3], 8080))].into();
    kill(&mut view, "own");
    let expected = [1, 2, 3].map(|last| format!("10.96.0.1:80 Tcp: 10.42.0.{last}:8080"));
    assert_eq!(pairs(&view), expected);
}

#[test]
fn addresses_outside_and_node_ports_are_paired_and_a_node_by_its_overlay_address() {
    let mut host = on("own", 0);
    host.address = [192, 0, 2, 1].into();
    let mut view = with(asked_for(), vec![host]);
    let service = service_of(&mut view);
    service.ports[0].node_port = Some(30_080);
    service.external = External {
        addresses: vec![[203, 0, 113, 1].into()],
        load_balancer: vec![[203, 0, 113, 2].into()],
        local_only: true,
        ..External::default()
    };
    let at = [
        "10.96.0.1:80",
        "100.96.0.1:30080",
        "192.0.2.1:30080",
        "203.0.113.1:80",
        "203.0.113.2:80",
    ];
    let expected = at.map(|at| format!("{at} Tcp: 100.96.0.1:8080"));
    assert_eq!(pairs(&view), expected);
}

/// A view in which the table leads to every endpoint of one service's port on this node, and to no other.
fn all_here(view: &View, service: &Service, port: &ServicePort) -> View {
    let mut snapshot = Snapshot::clone(&view.snapshot);
    let slices = snapshot.slices.entry(service.name.clone()).or_default();
    for slice in slices.values_mut() {
        let endpoints = &mut Arc::make_mut(slice).endpoints;
        endpoints.retain(|one| node_of(view, service, one) == Some(&view.node));
        for endpoint in endpoints {
            endpoint.hints = Hints::default();
        }
    }
    let service = Service {
        ports: vec![port.clone()],
        publish_not_ready: true,
        balance: Balance::default(),
        ..service.clone()
    };
    snapshot.services = [(service.name.clone(), service.into())].into();
    View::new(snapshot.into(), view.node.clone())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn pairs_are_what_the_table_leads_to_where_all_here_are_ready_and_nobody_else(view in any_view()) {
        let asked = view.snapshot.services.values();
        let asked = asked.filter(|service| service.balance.sockmap);
        let tables = asked.flat_map(|service| {
            let ports = service.ports.iter();
            ports.map(|port| table(&all_here(&view, service, port)))
        });
        let expected: BTreeSet<_> = tables
            .flatten()
            .filter(|(frontend, _)| frontend.protocol == Protocol::Tcp)
            .flat_map(|(frontend, backends)| {
                let endpoints = backends.endpoints.into_iter();
                endpoints.map(move |endpoint| (frontend, endpoint))
            })
            .collect();
        prop_assert_eq!(sockmap(&view), expected);
    }
}
