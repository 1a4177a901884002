//! Endpoints to which connects fail, what ways to them cost, and those that are full.

use super::*;

/// An endpoint on each node, all of them alike.
fn alike() -> View {
    let mut view = with(view(), at(&ALL));
    service_of(&mut view).distribution = Some(TrafficDistribution::SameZone);
    for node in Arc::make_mut(&mut view.snapshot).nodes.values_mut() {
        node.locality.zone = Some("z1".into());
    }
    view
}

fn eject(view: &mut View, numbers: &[u8]) {
    let at = |&number: &u8| SocketAddr::from(([10, 42, 0, number], 8080));
    view.ejected = numbers.iter().map(at).collect();
}

#[test]
fn an_ejected_endpoint_takes_no_flows_while_half_of_them_are_left() {
    let mut view = alike();
    check_chosen(&view, &[1, 2, 3, 4, 5]);
    eject(&mut view, &[2]);
    check_chosen(&view, &[1, 3, 4, 5]);
    let ranked = rank(&view, &view.snapshot.services[&name()]);
    let out = ranked.iter().filter(|one| one.is_ejected());
    let out: Vec<_> = out.map(|one| (one.address, one.chosen)).collect();
    assert_eq!(out, [([10, 42, 0, 2].into(), false)]);
    eject(&mut view, &[2, 5]);
    check_chosen(&view, &[1, 3, 4]);
    // What fails now is more than these endpoints.
    eject(&mut view, &[2, 4, 5]);
    check_chosen(&view, &[1, 2, 3, 4, 5]);
}

#[test]
fn the_dead_are_not_among_those_of_whom_half_is_left() {
    let mut view = alike();
    eject(&mut view, &[2, 5]);
    kill(&mut view, "zone");
    check_chosen(&view, &[1, 4]);
    kill(&mut view, "own");
    check_chosen(&view, &[2, 4, 5]);
}

#[test]
fn where_the_nearest_is_ejected_the_next_takes_over() {
    let mut view = with(view(), at(&["own", "near"]));
    check_chosen(&view, &[1]);
    eject(&mut view, &[1]);
    check_chosen(&view, &[2]);
    view = with(view, at(&["own"]));
    check_chosen(&view, &[1]);
}

#[test]
fn ejected_is_a_tcp_port_and_not_its_address() {
    let mut view = alike();
    view.ejected = [SocketAddr::from(([10, 42, 0, 2], 8081))].into();
    check_chosen(&view, &[1, 2, 3, 4, 5]);
    eject(&mut view, &[2]);
    service_of(&mut view).ports[0].protocol = Protocol::Udp;
    let slices = &mut Arc::make_mut(&mut view.snapshot).slices;
    let slice = slices.get_mut(&name()).unwrap().get_mut("s1").unwrap();
    Arc::make_mut(slice).ports[0].protocol = Protocol::Udp;
    let table = table(&view);
    assert_eq!(table.values().next().unwrap().endpoints.len(), 5);
}

/// By what ways cost in milliseconds.
fn by_cost(view: &mut View, costs: &[(&str, u64)]) {
    service_of(view).balance.policy = Policy::LeastLatency;
    let costs = costs.iter();
    let costs = costs.map(|&(node, ms)| (node.parse().unwrap(), Duration::from_millis(ms)));
    view.costs = costs.collect();
}

#[test]
fn least_latency_takes_of_the_nearest_those_behind_the_best_ways() {
    let mut view = with(view(), at(&["zone", "near"]));
    service_of(&mut view).distribution = Some(TrafficDistribution::SameZone);
    by_cost(&mut view, &[("zone", 3), ("near", 40)]);
    check_chosen(&view, &[3]);
    by_cost(&mut view, &[("zone", 42), ("near", 40)]);
    check_chosen(&view, &[2, 3]);
    by_cost(&mut view, &[("zone", 40), ("near", 50)]);
    check_chosen(&view, &[2, 3]);
    by_cost(&mut view, &[("zone", 40), ("near", 51)]);
    check_chosen(&view, &[3]);
    // A way that nobody measured is tried.
    by_cost(&mut view, &[("zone", 40)]);
    check_chosen(&view, &[2, 3]);
    // Nearer comes before cheaper.
    service_of(&mut view).distribution = None;
    by_cost(&mut view, &[("zone", 1), ("near", 300)]);
    check_chosen(&view, &[2]);
    kill(&mut view, "near");
    check_chosen(&view, &[3]);
    let alike = |service: &mut Service| service.balance.policy = Policy::Random;
    let mut view = with(alike_ways(), at(&["zone", "near"]));
    alike(service_of(&mut view));
    check_chosen(&view, &[2, 3]);
}

fn alike_ways() -> View {
    let mut view = alike();
    by_cost(&mut view, &[("zone", 1), ("near", 300)]);
    view
}

#[test]
fn this_node_costs_nothing_and_spill_over_goes_on_by_cost() {
    let mut view = alike_ways();
    by_cost(
        &mut view,
        &[("near", 9), ("zone", 10), ("region", 20), ("far", 30)],
    );
    check_chosen(&view, &[1]);
    // Half of the flows stay here, the other half is for all that cost more.
    service_of(&mut view).balance.spill_over = 2;
    check_chosen(&view, &[1, 1, 2, 3, 4, 5, 1, 1]);
    view = with(view, at(&["near", "zone", "region", "far"]));
    check_chosen(&view, &[2, 3]);
}

/// So many connections to each, of at most `limit`.
fn load(view: &mut View, limit: u16, open: &[(u8, u32)]) {
    service_of(view).balance.max_connections = NonZeroU16::new(limit);
    let at = |&(number, open): &(u8, u32)| (([10, 42, 0, number], 8080).into(), open);
    view.open = open.iter().map(at).collect();
}

#[test]
fn a_full_endpoint_takes_no_connections_while_another_has_room() {
    let mut view = with(view(), at(&ALL));
    load(&mut view, 10, &[(1, 9)]);
    check_chosen(&view, &[1]);
    load(&mut view, 10, &[(1, 10)]);
    check_chosen(&view, &[2]);
    let ranked = rank(&view, &view.snapshot.services[&name()]);
    let full = ranked.iter().filter(|one| one.is_full());
    let full: Vec<_> = full.map(|one| (one.address, one.chosen)).collect();
    assert_eq!(full, [([10, 42, 0, 1].into(), false)]);
    // It carries its part already.
    load(&mut view, 10, &[(1, 10), (2, 9)]);
    check_chosen(&view, &[2]);
    load(&mut view, 10, &[(1, 10), (2, 10)]);
    check_chosen(&view, &[3]);
    load(&mut view, 10, &[(2, 10)]);
    check_chosen(&view, &[1]);
    // The limit is of connections.
    service_of(&mut view).ports[0].protocol = Protocol::Udp;
    let slices = &mut Arc::make_mut(&mut view.snapshot).slices;
    let slice = slices.get_mut(&name()).unwrap().get_mut("s1").unwrap();
    Arc::make_mut(slice).ports[0].protocol = Protocol::Udp;
    let near = SocketAddr::from(([10, 42, 0, 1], 8080));
    view.open = [(near, 10)].into();
    let table = table(&view);
    assert_eq!(table.values().next().unwrap().endpoints, [near]);
}

#[test]
fn connections_that_ended_leave_room_and_the_load_says_how_many_carry_it() {
    let mut view = with(view(), at(&["own", "near", "zone"]));
    // Half of what 20 connections need: the other half goes on.
    load(&mut view, 10, &[(1, 8), (2, 6), (3, 6)]);
    check_chosen(&view, &[1, 2]);
    load(&mut view, 10, &[(1, 8), (2, 6), (3, 7)]);
    check_chosen(&view, &[1, 2, 3]);
    load(&mut view, 10, &[(1, 4), (2, 6)]);
    check_chosen(&view, &[1]);
    // What `spillOver` asks for is the least; who is full is one of those.
    service_of(&mut view).balance.spill_over = 2;
    check_chosen(&view, &[1, 2]);
    load(&mut view, 10, &[(1, 10)]);
    check_chosen(&view, &[2]);
}

#[test]
fn where_all_are_full_they_share_as_if_there_were_no_limit_but_the_load() {
    let mut view = with(view(), at(&["own", "near", "far"]));
    load(&mut view, 1, &[(1, 1), (2, 1), (5, 1)]);
    check_chosen(&view, &[1, 2, 5]);
    service_of(&mut view).local_only = true;
    check_chosen(&view, &[1]);
}

#[test]
fn an_endpoint_of_two_services_has_the_least_limit_and_others_none() {
    let mut view = with(view(), at(&["own", "near"]));
    assert_eq!(connection_limits(&view), BTreeMap::new());
    load(&mut view, 10, &[]);
    let snapshot = Arc::make_mut(&mut view.snapshot);
    let mut other = Service::clone(&snapshot.services[&name()]);
    other.name.name = "other".into();
    other.balance.max_connections = NonZeroU16::new(7);
    let mut slices = snapshot.slices[&name()].clone();
    Arc::make_mut(slices.get_mut("s1").unwrap())
        .endpoints
        .truncate(1);
    snapshot.slices.insert(other.name.clone(), slices);
    snapshot.services.insert(other.name.clone(), other.into());
    let at = |number: u8| SocketAddr::from(([10, 42, 0, number], 8080));
    assert_eq!(connection_limits(&view), [(at(1), 7), (at(2), 10)].into());
}
