//! The table against a second reading of `docs/services.md`: row by row, one frontend and one
//! client at a time, as plain as can be. Few names and addresses, so that they clash often.

use proptest::{
    collection::{btree_map, btree_set, vec},
    option,
    prelude::*,
    sample::{select, subsequence},
};

use super::*;

/// Where the frontend leads: clients inside, those outside, and whom it lets in.
type Verdict = (Vec<SocketAddr>, Vec<SocketAddr>, Vec<IpNet>);

/// Rows "Which services have an address" and "two services, one address".
fn model(view: &View, frontend: Frontend) -> Option<Verdict> {
    let own = view.snapshot.nodes.get(&view.node);
    let own: Vec<_> = own.into_iter().flat_map(Node::own_addresses).collect();
    for kind in ["cluster", "external", "balancer", "node"] {
        for service in view.snapshot.services.values() {
            let ServiceKind::ClusterIp(cluster) = &service.kind else {
                continue;
            };
            let addresses = match kind {
                "cluster" => cluster,
                "external" => &service.external.addresses,
                "balancer" => &service.external.load_balancer,
                _ => &own,
            };
            let asked = |port: &&ServicePort| {
                let number = if kind == "node" {
                    port.node_port
                } else {
                    Some(port.port)
                };
                number == Some(frontend.port) && port.protocol == frontend.protocol
            };
            if !addresses.contains(&frontend.address) {
                continue;
            }
            if let Some(port) = service.ports.iter().find(asked) {
                return Some(verdict(
                    view,
                    service,
                    port,
                    kind,
                    frontend.address.is_ipv4(),
                ));
            }
        }
    }
    None
}

/// Rows "an address from outside, asked for inside", "from outside" and "source ranges".
fn verdict(view: &View, service: &Service, port: &ServicePort, kind: &str, v4: bool) -> Verdict {
    let Service {
        local_only,
        external,
        ..
    } = service;
    let list = |local_only| endpoints(view, service, port, v4, local_only);
    if kind == "cluster" {
        return (list(*local_only), list(*local_only), Vec::new());
    }
    let ranges = external.sources.iter().filter(|_| kind == "balancer");
    let ranges = ranges.copied().collect();
    (list(false), list(external.local_only), ranges)
}

/// An endpoint as this node sees it.
struct Seen<'a> {
    endpoint: &'a Endpoint,
    at: SocketAddr,
    node: Option<&'a NodeName>,
}

/// Rows "Which endpoints take new flows".
fn endpoints(
    view: &View,
    service: &Service,
    port: &ServicePort,
    v4: bool,
    local_only: bool,
) -> Vec<SocketAddr> {
    let mut all = Vec::new();
    for (slice, endpoint) in view.snapshot.endpoints(&service.name) {
        let serves = |one: &&EndpointPort| (&one.name, one.protocol) == (&port.name, port.protocol);
        let Some(target) = slice.ports.iter().find(serves) else {
            continue;
        };
        let node = node_of(view, service, endpoint);
        let at = match node.and_then(|name| view.snapshot.nodes.get(name)) {
            Some(node) if node.underlay_addresses.contains(&endpoint.address) => {
                let v4 = endpoint.address.is_ipv4();
                if v4 {
                    node.overlay_v4.into()
                } else {
                    node.overlay_v6.into()
                }
            }
            Some(_) | None => endpoint.address,
        };
        let here = node == Some(&view.node);
        if at.is_ipv4() == v4 && (here || !local_only) {
            let at = SocketAddr::new(at, target.port);
            all.push(Seen { endpoint, at, node });
        }
    }
    let ready = |one: &Seen<'_>| one.endpoint.ready || service.publish_not_ready;
    let draining = !all.iter().any(ready);
    all.retain(|one| match draining {
        true => one.endpoint.serving && one.endpoint.terminating,
        false => ready(one),
    });
    let order = order(view, service, &all, draining || local_only);
    let alive = |one: &Seen<'_>| one.node.is_none_or(|name| !view.dead.contains(name));
    if all.iter().any(alive) {
        all.retain(alive);
    }
    // Row "connects fail": at most half of them.
    let fails = |one: &Seen<'_>| port.protocol == Protocol::Tcp && view.ejected.contains(&one.at);
    let addresses = |fail: bool| {
        let those = all.iter().filter(|one| fails(one) == fail);
        those.map(|one| one.at).collect::<BTreeSet<_>>().len()
    };
    if addresses(true) <= addresses(false) {
        all.retain(|one| !fails(one));
    }
    // Row "spill-over": those that come next as well, until there are enough.
    let mut enough = usize::from(service.balance.spill_over.max(1));
    // Row "maxConnections": so many as all connections need, those that are full among them.
    let limit = service
        .balance
        .max_connections
        .map(|limit| u32::from(limit.get()));
    if let Some(limit) = limit.filter(|_| port.protocol == Protocol::Tcp) {
        let open = |at: &SocketAddr| view.open.get(at).copied().unwrap_or(0);
        let addresses: BTreeSet<_> = all.iter().map(|one| one.at).collect();
        let total: u32 = addresses.iter().map(open).sum();
        while u32::try_from(enough).unwrap() * limit < total {
            enough += 1;
        }
        let full = addresses.iter().filter(|&at| open(at) >= limit).count();
        if full < addresses.len() {
            all.retain(|one| open(&one.at) < limit);
            enough = enough.saturating_sub(full).max(1);
        }
    }
    let mut chosen: BTreeMap<IpAddr, Vec<SocketAddr>> = BTreeMap::new();
    for near in order {
        // Row "least-latency": of those that come next, first those that cost about as little as the
        // least, or nobody knows what. Those that came before are not asked again.
        let (here, rest): (Vec<_>, Vec<_>) = all.into_iter().partition(|one| near(one));
        all = rest;
        let cost = |one: &Seen<'_>| match one.node? {
            name if *name == view.node => Some(0),
            name => Some(view.costs.get(name)?.as_millis()),
        };
        let least = here.iter().filter_map(cost).min().unwrap_or(0);
        let by_cost = service.balance.policy == Policy::LeastLatency;
        let dear = |one: &Seen<'_>| {
            by_cost && cost(one).is_some_and(|cost| cost > least + 2 && cost * 4 > least * 5)
        };
        let (dear, cheap): (Vec<_>, Vec<_>) = here.into_iter().partition(dear);
        for group in [cheap, dear] {
            if chosen.len() < enough {
                for one in group {
                    chosen.entry(one.at.ip()).or_default().push(one.at);
                }
            }
        }
    }
    let mut list: Vec<_> = chosen.into_values().flatten().collect();
    list.sort();
    list.dedup();
    list
}

/// Row "kubernetes.default", and what the slice says.
pub(super) fn node_of<'a>(
    view: &'a View,
    service: &Service,
    endpoint: &'a Endpoint,
) -> Option<&'a NodeName> {
    let api_server = service.name.to_string() == "default/kubernetes";
    if endpoint.node.is_some() || !api_server {
        return endpoint.node.as_ref();
    }
    let nodes = view.snapshot.nodes.values();
    let with_it = nodes.filter(|node| node.underlay_addresses.contains(&endpoint.address));
    let with_it: Vec<_> = with_it.collect();
    if let [only] = with_it[..] {
        Some(&only.name)
    } else {
        None
    }
}

type Near<'a> = Box<dyn Fn(&Seen<'_>) -> bool + 'a>;

/// Whom to ask first, and then: rows "nobody said anything", "trafficDistribution", "hints".
fn order<'a>(
    view: &'a View,
    service: &Service,
    ready: &[Seen<'_>],
    without_hints: bool,
) -> Vec<Near<'a>> {
    let own = view.snapshot.nodes.get(&view.node);
    let place = own.map(|own| own.locality.clone()).unwrap_or_default();
    let place_of = |one: &Seen<'_>| {
        let node = one.node.and_then(|name| view.snapshot.nodes.get(name));
        let mut place = node.map(|node| node.locality.clone()).unwrap_or_default();
        place.zone = one.endpoint.zone.clone().or(place.zone);
        place
    };
    let on_node = |one: &Seen<'_>| one.node == Some(&view.node);
    let (here, zone) = (place.clone(), place.zone.clone());
    let in_site = move |one: &Seen<'_>| place_of(one).site == here.site && here.site.is_some();
    let here = place.clone();
    let in_zone = move |one: &Seen<'_>| place_of(one).zone == here.zone && here.zone.is_some();
    let in_region =
        move |one: &Seen<'_>| place_of(one).region == place.region && place.region.is_some();
    let for_node = |one: &Seen<'_>| one.endpoint.hints.nodes.contains(&view.node);
    let for_zone = move |one: &Seen<'_>| {
        let named = |zone: &String| one.endpoint.hints.zones.contains(zone);
        zone.as_ref().is_some_and(named)
    };
    let all_have = |has: fn(&Hints) -> bool| ready.iter().all(|one| has(&one.endpoint.hints));
    let by_node = all_have(|hints| !hints.nodes.is_empty()) && ready.iter().any(for_node);
    let by_zone = all_have(|hints| !hints.zones.is_empty()) && ready.iter().any(&for_zone);
    let (site, zone) = (in_site.clone(), in_zone.clone());
    let near = move |one: &Seen<'_>| on_node(one) || site(one) || zone(one);
    let any: Near<'a> = Box::new(|_| true);
    match service.distribution {
        _ if by_node && !without_hints => vec![Box::new(for_node), Box::new(for_zone), any],
        _ if by_zone && !without_hints => vec![Box::new(for_zone), any],
        Some(TrafficDistribution::SameNode) => vec![Box::new(on_node), Box::new(near), any],
        Some(TrafficDistribution::SameZone) => vec![Box::new(near), any],
        None => vec![
            Box::new(on_node),
            Box::new(in_site),
            Box::new(in_zone),
            Box::new(in_region),
            any,
        ],
    }
}

// ---- What is tried ----

const NODES: [&str; 4] = ["n0", "n1", "n2", "n3"];
const PLACES: [&str; 2] = ["x", "y"];
const NUMBERS: [u16; 2] = [80, 53];

fn service_addresses() -> Vec<IpAddr> {
    let texts = ["10.96.0.1", "10.96.0.2", "fd00:96::1", "203.0.113.1"];
    texts.map(|text| text.parse().unwrap()).into()
}

fn endpoint_addresses() -> Vec<IpAddr> {
    let texts = [
        "10.42.0.1",
        "10.42.0.2",
        "192.0.2.1",
        "192.0.2.2",
        "fd42::1",
        "2001:db8::2",
    ];
    texts.map(|text| text.parse().unwrap()).into()
}

fn place() -> impl Strategy<Value = Option<String>> {
    option::weighted(0.8, select(PLACES.as_slice()).prop_map(String::from))
}

fn node() -> impl Strategy<Value = (Locality, Vec<IpAddr>)> {
    let addresses = subsequence(endpoint_addresses()[2..].to_vec(), 0..3);
    (place(), place(), place(), addresses).prop_map(|(site, zone, region, addresses)| {
        let site = site.map(|site| site.parse().unwrap());
        (Locality { site, zone, region }, addresses)
    })
}

fn protocol() -> impl Strategy<Value = Protocol> {
    select(&[Protocol::Tcp, Protocol::Udp][..])
}

/// Four in five of them are as most endpoints are.
fn mostly(usual: bool) -> impl Strategy<Value = bool> {
    prop::bool::weighted(if usual { 0.8 } else { 0.2 })
}

fn endpoint() -> impl Strategy<Value = Endpoint> {
    let names = |list: &[&str]| list.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
    let hints = (
        subsequence(names(&PLACES), 1..3),
        subsequence(names(&NODES), 1..4),
    );
    let states = (mostly(true), mostly(true), mostly(false));
    let node = option::weighted(0.8, select(["n0", "n1", "n2", "n3", "gone"].as_slice()));
    let parts = (
        select(endpoint_addresses()),
        node,
        option::of(place()),
        hints,
        states,
    );
    parts.prop_map(|(address, node, zone, (zones, nodes), states)| Endpoint {
        address,
        node: node.map(|node| node.parse().unwrap()),
        zone: zone.flatten(),
        hostname: None,
        hints: Hints {
            zones,
            nodes: nodes.iter().map(|node| node.parse().unwrap()).collect(),
        },
        ready: states.0,
        serving: states.1,
        terminating: states.2,
    })
}

fn slice() -> impl Strategy<Value = EndpointSlice> {
    let port = (
        select(["a", "b"].as_slice()),
        protocol(),
        select(NUMBERS.as_slice()),
    );
    let port = port.prop_map(|(name, protocol, port)| EndpointPort {
        name: name.to_owned(),
        protocol,
        port,
    });
    let parts = (
        vec(port, 1..4),
        vec(endpoint(), 0..5),
        0..5_u8,
        mostly(false),
    );
    parts.prop_map(|(ports, mut endpoints, hints, leaving)| {
        for (index, endpoint) in endpoints.iter_mut().enumerate() {
            match hints {
                0 => {}
                1 => endpoint.hints.nodes.clear(),
                2 if index == 0 => {} // Half written.
                _ => endpoint.hints = Hints::default(),
            }
            endpoint.ready &= !leaving;
            endpoint.terminating |= leaving;
        }
        EndpointSlice {
            name: "s".to_owned(),
            ports,
            endpoints,
        }
    })
}

fn service() -> impl Strategy<Value = Service> {
    let name = select(["default/kubernetes", "shop/a", "shop/b"].as_slice());
    let numbers = (select(NUMBERS.as_slice()), protocol(), option::of(Just(80)));
    let [cluster, external, balancer] =
        [1..3, 0..2, 0..2].map(|how_many| subsequence(service_addresses(), how_many));
    let sources = option::of(Just("198.51.100.0/24".parse().unwrap()));
    let distribution = option::of(select(
        [TrafficDistribution::SameNode, TrafficDistribution::SameZone].as_slice(),
    ));
    let policies = [
        Policy::Random,
        Policy::ConsistentHash,
        Policy::RoundRobin,
        Policy::LeastLatency,
    ];
    let policy = select(policies.to_vec());
    let said = (
        vec(mostly(false), 3),
        distribution,
        mostly(true),
        (policy, 0..4_u16, option::of(select([1, 2, 9].as_slice()))),
        mostly(false),
    );
    let parts = (
        name,
        vec(numbers, 1..3),
        cluster,
        external,
        balancer,
        sources,
        said,
    );
    parts.prop_map(
        |(name, ports, cluster, addresses, load_balancer, sources, said)| {
            let (namespace, name) = name.split_once('/').unwrap();
            let name = ServiceName {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
            };
            let (flags, distribution, has_address, (policy, spill_over, limit), sockmap) = said;
            let kind = if has_address {
                ServiceKind::ClusterIp(cluster)
            } else {
                ServiceKind::Headless
            };
            let ports = ports.into_iter().zip(["a", "b"]);
            let ports = ports.map(|((number, protocol, node_port), name)| ServicePort {
                node_port,
                ..port(name, protocol, number)
            });
            Service {
                ports: ports.collect(),
                publish_not_ready: flags[0],
                local_only: flags[1],
                distribution,
                external: External {
                    addresses,
                    load_balancer,
                    sources: sources.into_iter().collect(),
                    local_only: flags[2],
                    health_check: None,
                },
                balance: Balance {
                    policy,
                    spill_over,
                    max_connections: limit.and_then(NonZeroU16::new),
                    sockmap,
                    weights: Vec::new(),
                },
                ..Service::new(name, kind)
            }
        },
    )
}

pub(super) fn any_view() -> impl Strategy<Value = View> {
    let services = vec((service(), vec(slice(), 0..3)), 1..4);
    let dead = subsequence(NODES.to_vec(), 0..3);
    let overlay = [100, 96, 0, 2].into();
    let addresses = [endpoint_addresses(), vec![overlay]].concat();
    let at = (select(addresses), select(NUMBERS.as_slice()));
    let at = at.prop_map(|(address, port)| SocketAddr::new(address, port));
    let ejected = btree_set(at.clone(), 0..6);
    let open = btree_map(at, 1..12_u32, 0..12);
    // The limits of what counts as alike: a quarter, and 2 ms.
    let costs = vec(
        option::of(select([1, 3, 4, 40, 50, 51].as_slice())),
        NODES.len(),
    );
    let seen = (dead, ejected, costs, open);
    (vec(node(), 0..5), services, seen).prop_map(|(nodes, services, seen)| {
        let (dead, ejected, costs, open) = seen;
        let mesh = MeshId([1; 32]);
        let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(mesh, "test"));
        for (index, (name, (locality, underlay_addresses))) in (1_u8..).zip(NODES.iter().zip(nodes))
        {
            let id = NodeId([index; 32]);
            let node = Node {
                id,
                name: name.parse().unwrap(),
                locality,
                overlay_v4: [100, 96, 0, index].into(),
                overlay_v6: mesh.overlay_v6(&id),
                prefixes: Vec::new(),
                pod_prefixes: Vec::new(),
                underlay_addresses,
                static_candidates: Vec::new(),
                mapped: Vec::new(),
            };
            snapshot.nodes.insert(node.name.clone(), node);
        }
        for (service, slices) in services {
            let slices = slices.into_iter().map(Arc::new);
            let slices = ["s1", "s2"].map(String::from).into_iter().zip(slices);
            snapshot
                .slices
                .insert(service.name.clone(), slices.collect());
            snapshot
                .services
                .insert(service.name.clone(), service.into());
        }
        let dead = dead.iter().map(|name| name.parse().unwrap());
        let costs = NODES
            .iter()
            .zip(costs)
            .filter_map(|(node, ms)| Some((node, ms?)));
        View {
            dead: dead.collect(),
            ejected,
            open,
            costs: costs
                .map(|(node, ms)| (node.parse().unwrap(), Duration::from_millis(ms)))
                .collect(),
            ..View::new(Arc::new(snapshot), "n0".parse().unwrap())
        }
    })
}

fn every_frontend(view: &View) -> Vec<Frontend> {
    let own = view.snapshot.nodes.get(&view.node);
    let own = own.into_iter().flat_map(Node::own_addresses);
    let mut all = Vec::new();
    for address in service_addresses().into_iter().chain(own) {
        for port in NUMBERS {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                all.push(Frontend {
                    address,
                    port,
                    protocol,
                });
            }
        }
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn the_table_is_what_the_rows_of_the_documentation_say(view in any_view()) {
        let mut table = table(&view);
        for frontend in every_frontend(&view) {
            let found = table.remove(&frontend).map(|found| {
                let outside = found.outside.unwrap_or(Outside {
                    endpoints: found.endpoints.clone(),
                    sources: Vec::new(),
                });
                // Who is in the lists; how often each is, is tried with `balance`.
                let [inside, outside_list] = [found.endpoints, outside.endpoints].map(|mut list| {
                    list.sort();
                    list.dedup();
                    list
                });
                (inside, outside_list, outside.sources)
            });
            prop_assert_eq!(found, model(&view, frontend), "{:?}", frontend);
        }
        prop_assert_eq!(table, BTreeMap::new(), "no others");
    }
}
