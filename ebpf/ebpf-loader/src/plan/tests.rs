use proptest::prelude::*;

use super::*;
use crate::{Clients, Protocol};

const ROOMY: Limits = Limits {
    frontends: 100,
    endpoints: 100,
    list_endpoints: 10,
    ranges: 10,
};

fn frontend(address: &str) -> Frontend {
    let addr: SocketAddr = address.parse().unwrap();
    Frontend {
        clients: Clients::All,
        address: addr.ip(),
        port: addr.port(),
        protocol: Protocol::Tcp,
    }
}

fn backends(list: &[&str]) -> Backends {
    let endpoints = list.iter().map(|text| text.parse().unwrap());
    endpoints.collect::<Vec<_>>().into()
}

fn desired(services: &[(&str, &[&str])]) -> BTreeMap<Frontend, Backends> {
    services
        .iter()
        .map(|(address, list)| (frontend(address), backends(list)))
        .collect()
}

fn installed(services: &[(&str, &[&str])]) -> BTreeMap<Frontend, Installed> {
    let list = EndpointList::new(1, 0);
    let entry = |(frontend, backends)| (frontend, Installed { list, backends });
    desired(services).into_iter().map(entry).collect()
}

fn set(address: &str, endpoints: &[&str]) -> Change {
    Change::Set(frontend(address), backends(endpoints))
}

#[test]
fn only_the_difference_is_changed() {
    let actual = installed(&[
        ("10.96.0.1:80", &["10.0.0.1:80"]),
        ("10.96.0.2:80", &["10.0.0.2:80"]),
        ("10.96.0.3:80", &[]),
    ]);
    let wanted = desired(&[
        ("10.96.0.1:80", &["10.0.0.1:80"]),
        ("10.96.0.2:80", &["10.0.0.3:80", "10.0.0.2:80"]),
        ("10.96.0.4:80", &[]),
    ]);
    let plan = plan(&wanted, &actual, ROOMY);
    let grown = set("10.96.0.2:80", &["10.0.0.3:80", "10.0.0.2:80"]);
    let changes = [
        Change::Remove(frontend("10.96.0.3:80")),
        grown,
        set("10.96.0.4:80", &[]),
    ];
    assert_eq!(
        plan,
        Plan {
            changes: changes.into(),
            unchanged: 1,
            left_out: LeftOut::default()
        }
    );
}

#[test]
fn the_form_of_an_address_is_no_difference_but_order_and_repetition_are() {
    let actual = installed(&[("10.96.0.1:80", &["10.0.0.1:80", "10.0.0.2:80"])]);
    let unchanged = |list: &[&str]| {
        let wanted = desired(&[("10.96.0.1:80", list)]);
        plan(&wanted, &actual, ROOMY).unchanged == 1
    };
    assert!(unchanged(&["10.0.0.1:80", "[::ffff:10.0.0.2]:80"]));
    assert!(!unchanged(&["10.0.0.2:80", "10.0.0.1:80"]));
    assert!(!unchanged(&["10.0.0.1:80", "10.0.0.2:80", "10.0.0.2:80"]));
}

#[test]
fn another_selection_is_a_difference() {
    let actual = installed(&[("10.96.0.1:80", &["10.0.0.1:80"])]);
    for selection in [Selection::ClientHash, Selection::Turns] {
        let mut wanted = desired(&[("10.96.0.1:80", &["10.0.0.1:80"])]);
        wanted
            .values_mut()
            .for_each(|backends| backends.selection = selection);
        assert_eq!(plan(&wanted, &actual, ROOMY).changes.len(), 1);
    }
}

#[test]
fn another_affinity_is_a_difference() {
    let kept = |timeout_s| {
        let affinity = Some(Duration::from_secs(timeout_s));
        let endpoints: Vec<_> = vec!["10.0.0.1:80".parse().unwrap()];
        Backends {
            affinity,
            ..endpoints.into()
        }
    };
    let actual = installed(&[("10.96.0.1:80", &["10.0.0.1:80"])]);
    let wanted = |backends| BTreeMap::from([(frontend("10.96.0.1:80"), backends)]);
    let changes = plan(&wanted(kept(60)), &actual, ROOMY).changes;
    assert_eq!(changes, [Change::Set(frontend("10.96.0.1:80"), kept(60))]);
    let list = EndpointList::new(1, 1);
    let backends = kept(60);
    let actual = BTreeMap::from([(frontend("10.96.0.1:80"), Installed { list, backends })]);
    assert_eq!(plan(&wanted(kept(60)), &actual, ROOMY).unchanged, 1);
    assert_eq!(plan(&wanted(kept(61)), &actual, ROOMY).unchanged, 0);
}

#[test]
fn a_mapped_frontend_is_its_ipv4_form_and_the_other_family_is_left_out() {
    let wanted = desired(&[
        ("10.96.0.1:80", &["10.0.0.1:80", "[fd00::1]:80"]),
        ("[::ffff:10.96.0.1]:80", &["10.0.0.2:80"]),
        ("[fd00::53]:80", &["10.0.0.1:80", "[fd00::1]:80"]),
    ]);
    let plan = plan(&wanted, &BTreeMap::new(), ROOMY);
    let both = set("10.96.0.1:80", &["10.0.0.1:80", "10.0.0.2:80"]);
    assert_eq!(
        plan.changes,
        [both, set("[fd00::53]:80", &["[fd00::1]:80"])]
    );
    assert_eq!(
        plan.left_out,
        LeftOut {
            other_family: 2,
            ..LeftOut::default()
        }
    );
}

#[test]
fn at_a_limit_the_first_in_order_stay_and_the_rest_is_counted() {
    let wanted = desired(&[
        (
            "10.96.0.1:80",
            &["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"],
        ),
        ("10.96.0.2:80", &["10.0.0.1:80", "10.0.0.2:80"]),
        ("10.96.0.3:80", &["10.0.0.1:80"]),
        ("10.96.0.4:80", &[]),
        ("10.96.0.5:80", &[]),
    ]);
    let limits = Limits {
        frontends: 3,
        endpoints: 3,
        list_endpoints: 2,
        ..ROOMY
    };
    let plan = plan(&wanted, &BTreeMap::new(), limits);
    let first = set("10.96.0.1:80", &["10.0.0.1:80", "10.0.0.2:80"]);
    let second = set("10.96.0.2:80", &["10.0.0.1:80"]);
    assert_eq!(plan.changes, [first, second, set("10.96.0.4:80", &[])]);
    assert_eq!(
        plan.left_out,
        LeftOut {
            frontends: 2,
            endpoints: 3,
            ..LeftOut::default()
        }
    );
}

/// For clients from outside, from these networks of 10.0.0.0/8 alone.
fn outside(address: &str, networks: &[u8]) -> (Frontend, Backends) {
    let clients = Clients::Outside;
    let frontend = Frontend {
        clients,
        ..frontend(address)
    };
    let range = |&network: &u8| ([10, network, 0, 0].into(), 16);
    let ranges = Some(networks.iter().map(range).collect());
    (
        frontend,
        Backends {
            ranges,
            ..backends(&["10.0.0.1:80"])
        },
    )
}

#[test]
fn prefixes_beyond_the_limit_are_left_out_and_nobody_is_let_in_for_it() {
    let wanted = [
        outside("10.96.0.1:80", &[1, 2]),
        outside("10.96.0.2:80", &[3, 4]),
        outside("10.96.0.3:80", &[5]),
    ];
    let limits = Limits { ranges: 3, ..ROOMY };
    let plan = plan(&BTreeMap::from(wanted), &BTreeMap::new(), limits);
    let fitting = [
        outside("10.96.0.1:80", &[1, 2]),
        outside("10.96.0.2:80", &[3]),
        outside("10.96.0.3:80", &[]),
    ];
    let fitting = fitting.map(|(frontend, backends)| Change::Set(frontend, backends));
    assert_eq!(plan.changes, fitting);
    assert_eq!(
        (plan.left_out.ranges, plan.left_out.is_nothing()),
        (2, false)
    );
}

#[test]
fn what_keeps_clients_out_comes_first_and_goes_last() {
    let (kept_out, backends) = outside("10.96.0.9:80", &[1]);
    let mut wanted = desired(&[("10.96.0.1:80", &["10.0.0.1:80"])]);
    wanted.insert(kept_out, backends.clone());
    let one = Limits {
        frontends: 1,
        ..ROOMY
    };
    let set = Change::Set(kept_out, backends);
    let both = plan(&wanted, &BTreeMap::new(), ROOMY).changes;
    assert_eq!((both.len(), both.first()), (2, Some(&set)));
    assert_eq!(plan(&wanted, &BTreeMap::new(), one).changes, [set]);
    let list = EndpointList::new(1, 1);
    let installed = wanted.into_iter();
    let installed = installed.map(|(frontend, backends)| (frontend, Installed { list, backends }));
    let gone = plan(&BTreeMap::new(), &installed.collect(), ROOMY).changes;
    let last = Change::Remove(kept_out);
    assert_eq!((gone.len(), gone.last()), (2, Some(&last)));
}

#[test]
fn other_prefixes_are_a_difference() {
    let (frontend, backends) = outside("10.96.0.1:80", &[1, 2]);
    let list = EndpointList::new(1, 1);
    let actual = BTreeMap::from([(frontend, Installed { list, backends })]);
    for (networks, unchanged) in [(&[1, 2][..], 1), (&[1], 0), (&[], 0)] {
        let wanted = BTreeMap::from([outside("10.96.0.1:80", networks)]);
        assert_eq!(plan(&wanted, &actual, ROOMY).unchanged, unchanged);
    }
}

fn services() -> impl Strategy<Value = BTreeMap<Frontend, Backends>> {
    let endpoint = (0u8..9).prop_map(|n| SocketAddr::from(([10, 0, 0, n], 80)));
    let frontend = (0u8..9).prop_map(|n| frontend(&format!("10.96.0.{n}:80")));
    let backends = prop::collection::vec(endpoint, 0..9).prop_map(Backends::from);
    prop::collection::btree_map(frontend, backends, 0..9)
}

proptest! {
    #[test]
    fn any_two_states_are_joined_without_more_room_than_one_list(
        before in services(),
        after in services(),
        endpoints in 0usize..20,
    ) {
        let limits = Limits { frontends: 6, endpoints, list_endpoints: 5, ..ROOMY };
        let mut maps: BTreeMap<Frontend, Installed> = BTreeMap::new();
        for wanted in [&before, &after] {
            for change in plan(wanted, &maps, limits).changes {
                let in_use: usize = maps.values().map(|found| found.backends.endpoints.len()).sum();
                match change {
                    Change::Remove(frontend) => { prop_assert!(maps.remove(&frontend).is_some()); }
                    Change::Set(frontend, backends) => {
                        prop_assert!(in_use <= limits.endpoints);
                        prop_assert!(backends.endpoints.len() <= limits.list_endpoints);
                        let list = EndpointList::new(1, backends.endpoints.len());
                        maps.insert(frontend, Installed { list, backends });
                    }
                }
                prop_assert!(maps.len() <= limits.frontends);
            }
            let rest = plan(wanted, &maps, limits);
            prop_assert_eq!((rest.changes, rest.unchanged), (vec![], maps.len()));
        }
    }
}
