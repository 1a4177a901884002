//! The table that follows views: what it looks at, and that it ends up where a new one would.

use proptest::{collection::vec, prelude::*};

use super::{model::any_view, *};

fn named(number: usize) -> ServiceName {
    ServiceName {
        namespace: "shop".into(),
        name: format!("s{number}"),
    }
}

/// A hundred services; number n has endpoints on `own`, and on the node n modulo 5.
fn hundred() -> View {
    let mut view = view();
    let snapshot = Arc::make_mut(&mut view.snapshot);
    let first = snapshot.services.remove(&name()).unwrap();
    for number in 0..100_u8 {
        let service = Service {
            name: named(number.into()),
            kind: ServiceKind::ClusterIp(vec![[10, 96, 1, number].into()]),
            ..Service::clone(&first)
        };
        let nodes = ["own", ALL[usize::from(number % 5)]];
        let endpoints = (1..).zip(nodes).map(|(index, node)| Endpoint {
            address: [10, 42, index, number].into(),
            ..on(node, 0)
        });
        let slice = EndpointSlice {
            name: "s1".into(),
            ports: vec![EndpointPort {
                name: "http".into(),
                protocol: Protocol::Tcp,
                port: 8080,
            }],
            endpoints: endpoints.collect(),
        };
        let slices = BTreeMap::from([(slice.name.clone(), slice.into())]);
        snapshot.slices.insert(service.name.clone(), slices);
        snapshot
            .services
            .insert(service.name.clone(), service.into());
    }
    view
}

/// How many services are looked at for a change, and how many frontends lead elsewhere.
#[track_caller]
fn check(change: impl FnOnce(&mut View), services: usize, changed: usize) {
    let mut now = hundred();
    let mut followed = Table::default();
    let first = followed.update(&Arc::new(now.clone()));
    assert_eq!((first.services, first.changed.len()), (100, 100));
    change(&mut now);
    let update = followed.update(&Arc::new(now.clone()));
    assert_eq!((update.services, update.changed.len()), (services, changed));
    let all: BTreeMap<_, _> = followed.iter().map(|(at, to)| (at, to.clone())).collect();
    assert_eq!(all, table(&now));
}

#[test]
fn an_ejected_endpoint_costs_the_services_that_have_it() {
    let at = |number: u8, index: u8| SocketAddr::from(([10, 42, index, number], 8080));
    check(|view| view.ejected = [at(7, 1)].into(), 1, 1);
    check(|view| view.ejected = [at(7, 2), at(8, 1)].into(), 2, 1);
    check(|view| view.ejected = [at(7, 9)].into(), 0, 0);
    // A node's own address, by which a slice calls it and to which nobody is led.
    let host = |view: &mut View| {
        slice_of(view, 7).endpoints[0].address = [192, 0, 2, 1].into();
    };
    let mut now = hundred();
    host(&mut now);
    let mut followed = Table::default();
    followed.update(&Arc::new(now.clone()));
    now.ejected = [SocketAddr::from(([100, 96, 0, 1], 8080))].into();
    let update = followed.update(&Arc::new(now));
    assert_eq!((update.services, update.changed.len()), (1, 1));
}

#[test]
fn a_connection_costs_the_services_with_a_limit_that_have_its_endpoint() {
    let at = |number: u8, index: u8| SocketAddr::from(([10, 42, index, number], 8080));
    let open = |number: u8| [(at(number, 1), 3), (at(8, 1), 3)].into();
    check(|view| view.open = open(7), 0, 0);
    let mut now = hundred();
    let services = &mut Arc::make_mut(&mut now.snapshot).services;
    let service = Arc::make_mut(services.get_mut(&named(7)).unwrap());
    service.balance.max_connections = NonZeroU16::new(3);
    let mut followed = Table::default();
    followed.update(&Arc::new(now.clone()));
    for (number, expected) in [(7, (1, 1)), (9, (1, 1)), (10, (0, 0))] {
        now.open = open(number);
        let update = followed.update(&Arc::new(now.clone()));
        assert_eq!((update.services, update.changed.len()), expected);
    }
}

#[test]
fn a_cost_costs_the_services_that_go_by_it_and_have_endpoints_there() {
    let costs = |view: &mut View| {
        view.costs = [("far".parse().unwrap(), Duration::from_millis(9))].into();
    };
    check(costs, 0, 0);
    let mut now = hundred();
    for number in 0..10 {
        let services = &mut Arc::make_mut(&mut now.snapshot).services;
        let service = Arc::make_mut(services.get_mut(&named(number)).unwrap());
        service.balance.policy = Policy::LeastLatency;
    }
    let mut followed = Table::default();
    followed.update(&Arc::new(now.clone()));
    costs(&mut now);
    assert_eq!(followed.update(&Arc::new(now)).services, 2);
}

fn slice_of(view: &mut View, number: usize) -> &mut EndpointSlice {
    let slices = &mut Arc::make_mut(&mut view.snapshot).slices;
    let slices = slices.get_mut(&named(number)).unwrap();
    Arc::make_mut(slices.get_mut("s1").unwrap())
}

#[test]
fn a_view_costs_the_services_that_it_changes() {
    check(|_| {}, 0, 0);
    // A new snapshot that says the same, read anew.
    let again = |view: &mut View| {
        let snapshot = Arc::make_mut(&mut view.snapshot);
        for service in snapshot.services.values_mut() {
            *service = Service::clone(service).into();
        }
    };
    check(again, 0, 0);
    check(|view| slice_of(view, 7).endpoints[0].ready = false, 1, 1);
    let sockmap = |view: &mut View| {
        let services = &mut Arc::make_mut(&mut view.snapshot).services;
        let service = Arc::make_mut(services.get_mut(&named(7)).unwrap());
        service.balance.sockmap = true;
    };
    check(sockmap, 1, 0);
    // Nobody was led there.
    check(|view| slice_of(view, 7).endpoints[1].ready = false, 1, 0);
    check(
        |view| {
            let snapshot = Arc::make_mut(&mut view.snapshot);
            snapshot.services.remove(&named(7));
            snapshot.slices.remove(&named(8));
        },
        2,
        2,
    );
}

#[test]
fn a_node_costs_the_services_that_have_endpoints_there() {
    check(|view| kill(view, "far"), 20, 0);
    // All have one on this node; where the other is alive, it takes over, but for the twenty
    // that have both here.
    check(|view| kill(view, "own"), 100, 80);
    let moved = |name: &str| {
        let name: NodeName = name.parse().unwrap();
        move |view: &mut View| {
            let nodes = &mut Arc::make_mut(&mut view.snapshot).nodes;
            nodes.get_mut(&name).unwrap().locality.region = Some("r9".into());
        }
    };
    check(moved("far"), 20, 0);
    check(moved("own"), 100, 0);
    let gone = |view: &mut View| {
        Arc::make_mut(&mut view.snapshot).nodes.remove("far");
    };
    check(gone, 20, 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Views that have little in common, and the dead of each with the snapshot of the one before.
    #[test]
    fn whatever_changes_the_table_is_that_of_the_last_view(views in vec(any_view(), 1..4)) {
        let mut followed = Table::default();
        let mut before = BTreeMap::new();
        let mut snapshot = Arc::clone(&views[0].snapshot);
        for view in views {
            let only_dead = View { snapshot, ..view.clone() };
            snapshot = Arc::clone(&view.snapshot);
            for view in [only_dead, view] {
                let view = Arc::new(view);
                let update = followed.update(&view);
                let now = table(&view);
                let all: BTreeMap<_, _> = followed.iter().map(|(at, to)| (at, to.clone())).collect();
                prop_assert_eq!(&all, &now);
                let keys: BTreeSet<_> = before.keys().chain(now.keys()).copied().collect();
                let changed = keys.into_iter().filter(|at| before.get(at) != now.get(at));
                let changed: BTreeMap<_, _> = changed.map(|at| (at, now.get(&at).cloned())).collect();
                prop_assert_eq!(update.changed, changed);
                before = now;
            }
        }
    }
}
