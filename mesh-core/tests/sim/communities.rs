//! Which sites connect directly: the same for both ends, whenever they hear of it.

use std::collections::BTreeSet;

use mesh_core::{
    io::{PeerState, Reason},
    snapshot::Snapshot,
};
use mesh_wire::id::Via;

use crate::{
    nat::NatSort,
    scenarios::{no_ping_is_lost, pair, state},
    world::{Change, World},
};

/// The community `name` of the sites of these numbers.
fn community(name: &str, sites: &[usize]) -> impl FnOnce(&mut Snapshot) {
    let sites = sites.iter().map(|site| format!("site-{site}"));
    let sites: BTreeSet<_> = sites.map(|site| site.parse().unwrap()).collect();
    let name = name.to_owned();
    |snapshot| {
        snapshot.communities.insert(name, sites);
    }
}

fn nobody(snapshot: &mut Snapshot) {
    snapshot.communities.clear();
}

fn direct_sent(world: &World, of: usize, peer: usize) -> u64 {
    let sent = &world.nodes[of].direct_sent;
    sent.get(&world.nodes[peer].id).copied().unwrap_or_default()
}

fn is_relay_only(world: &World, of: usize, peer: usize) -> bool {
    let report = world.report(of, peer).unwrap();
    let relays = report
        .paths
        .iter()
        .all(|path| matches!(path.via, Via::Relay(_)));
    relays && report.state == PeerState::Relayed && report.reason == Reason::PolicyRelayOnly
}

#[test]
fn sites_of_no_common_community_reach_each_other_and_never_send_a_packet_directly() {
    let mut world = World::new(5);
    world.add_relay("r1");
    world.add_relay("r2");
    let site = world.add_site(NatSort::FullCone);
    let (a, neighbour) = (world.add_node("a", site), world.add_node("a2", site));
    let (b, c) = (
        world.add_edge("b", NatSort::Open),
        world.add_edge("c", NatSort::Open),
    );
    let flows = [neighbour, b, c].map(|to| world.add_flow(a, to, 20, false));
    world.make_snapshot();
    let (b_site, c_site) = (world.nodes[b].site, world.nodes[c].site);
    world.publish(&[], community("one", &[site, b_site]));
    world.publish(&[], community("two", &[b_site, c_site]));
    (0..4).for_each(|node| world.boot(node));
    world.run_for(1_000);
    flows.iter().for_each(|&flow| world.start_flow(flow));
    world.run_for(60_000);
    assert_eq!(state(&world, a, neighbour), PeerState::Direct);
    assert_eq!(state(&world, a, b), PeerState::Direct);
    for (of, peer) in [(a, c), (c, a)] {
        assert!(is_relay_only(&world, of, peer));
        assert_eq!(direct_sent(&world, of, peer), 0, "probes and calls too");
    }
    for flow in flows {
        no_ping_is_lost(&mut world, flow);
    }
}

#[test]
fn a_direct_path_that_is_allowed_no_more_moves_to_the_relay_without_a_loss_and_back() {
    // Who hears first, and how much later the other does.
    for (first_is_a, later_ms) in [(true, 0), (true, 3_000), (false, 3_000)] {
        let (mut world, a, b, flow) = pair(NatSort::PortRestricted, NatSort::PortRestricted);
        world.run_until(3_000, "direct", |w| {
            state(w, a, b) == PeerState::Direct && state(w, b, a) == PeerState::Direct
        });
        let (first, then) = if first_is_a { (a, b) } else { (b, a) };
        let other = world.nodes[a].site;
        world.publish(&[first], community("elsewhere", &[other]));
        world.run_for(later_ms);
        world.publish(&[then], |_| {});
        world.run_until(1_000, "relayed", |w| {
            is_relay_only(w, a, b) && is_relay_only(w, b, a)
        });
        world.run_for(300); // The copies on the old path end.
        let before = [direct_sent(&world, a, b), direct_sent(&world, b, a)];
        world.run_for(70_000);
        let after = [direct_sent(&world, a, b), direct_sent(&world, b, a)];
        assert_eq!(after, before, "packets sent directly later");
        world.publish(&[first], nobody);
        world.run_for(later_ms);
        world.publish(&[then], |_| {});
        world.run_until(6_000, "direct again", |w| {
            state(w, a, b) == PeerState::Direct && state(w, b, a) == PeerState::Direct
        });
        no_ping_is_lost(&mut world, flow);
    }
}

#[test]
fn where_no_relay_reaches_the_peer_a_forbidden_path_ends_all_the_same() {
    let (mut world, a, b, _) = pair(NatSort::PortRestricted, NatSort::PortRestricted);
    world.run_until(3_000, "direct", |w| state(w, a, b) == PeerState::Direct);
    world.change(Change::RelayDown(0));
    world.change(Change::RelayDown(1));
    world.run_for(40_000);
    assert_eq!(state(&world, a, b), PeerState::Direct);
    let site = world.nodes[a].site;
    world.publish(&[a, b], community("elsewhere", &[site]));
    world.run_for(6_100);
    let before = direct_sent(&world, a, b);
    assert!(world.report(a, b).unwrap().via.is_none());
    world.run_for(60_000);
    assert_eq!(direct_sent(&world, a, b), before);
    // With a relay they speak again.
    world.change(Change::RelayUp(0));
    world.run_until(40_000, "relayed", |w| is_relay_only(w, a, b));
}

#[test]
fn a_node_that_boots_without_anybody_upstream_keeps_to_what_it_knew() {
    let (mut world, a, b, _) = pair(NatSort::FullCone, NatSort::FullCone);
    world.run_until(3_000, "direct", |w| state(w, a, b) == PeerState::Direct);
    let site = world.nodes[a].site;
    world.publish(&[a, b], community("elsewhere", &[site]));
    world.run_until(1_000, "relayed", |w| is_relay_only(w, a, b));
    assert!(!world.nodes[a].remembered.is_empty(), "it knows a way");
    world.nodes[a].direct_sent.clear();
    world.boot(a);
    world.run_until(5_000, "relayed again", |w| {
        w.report(a, b).is_some() && is_relay_only(w, a, b)
    });
    assert_eq!(direct_sent(&world, a, b), 0);
}
