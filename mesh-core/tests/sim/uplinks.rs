//! Several ways out, ways that cost, and what a node costs that nobody talks to.

use mesh_core::io::{PeerState, Uplink, UplinkId};

use crate::{
    nat::NatSort,
    scenarios::{longest_gap, no_ping_is_lost, state},
    world::{Change, World},
};

/// Two relays, `a` with a cable and a metered second way out, and `b`; they are direct.
fn two_ways_out(b_sort: NatSort) -> (World, usize, usize, usize) {
    let mut world = World::new(1);
    world.add_relay("r1");
    world.add_relay("r2");
    let a = world.add_edge("a", NatSort::PortRestricted);
    let mobile = world.add_uplink(a, NatSort::PortRestricted, true, 500);
    world.sites[mobile].delay_us = 30_000;
    let b = world.add_edge("b", b_sort);
    let flow = world.add_flow(a, b, 20, false);
    world.boot_all();
    world.run_for(1_000);
    world.start_flow(flow);
    world.run_until(3_000, "direct", |w| {
        state(w, a, b) == PeerState::Direct && state(w, b, a) == PeerState::Direct
    });
    world.run_for(5_000);
    (world, a, b, flow)
}

#[test]
fn a_cable_that_is_pulled_and_put_back_costs_half_a_second_at_most() {
    for b_sort in [NatSort::Open, NatSort::FullCone, NatSort::PortRestricted] {
        let (mut world, a, b, flow) = two_ways_out(b_sort);
        let cable = world.nodes[a].site;
        for (up, home) in [(false, false), (true, true)] {
            let changed = world.now_ms();
            world.set_carrier(a, 0, up);
            // Who comes back has to answer three times first; who went is left at once.
            world.run_for(if up { 20_000 } else { 8_000 });
            assert_eq!(world.nodes[a].site == cable, home);
            let gap = longest_gap(&world, flow, changed.saturating_sub(100));
            let moves = |node: usize| {
                let moves = world.nodes[node]
                    .moves
                    .iter()
                    .filter(|(at, ..)| *at >= changed);
                moves
                    .map(|(at, _, via)| (at - changed, *via))
                    .collect::<Vec<_>>()
            };
            let moves = [moves(a), moves(b)];
            assert!(
                gap < 500,
                "{gap} ms without an answer, {b_sort:?}, up: {up}: {moves:?}"
            );
            assert_eq!(state(&world, a, b), PeerState::Direct);
        }
        no_ping_is_twice(&world, flow);
    }
}

fn no_ping_is_twice(world: &World, flow: usize) {
    assert_eq!(world.flows[flow].twice, 0);
}

#[test]
fn a_line_that_died_behind_the_modem_is_left_for_the_metered_one_and_taken_back() {
    let (mut world, a, b, flow) = two_ways_out(NatSort::PortRestricted);
    let cable = world.nodes[a].site;
    world.run_for(60_000);
    assert_eq!(world.nodes[a].site, cable, "the metered one is not needed");
    let died = world.now_ms();
    world.change(Change::SiteDown(cable));
    world.run_for(10_000);
    assert_ne!(world.nodes[a].site, cable);
    let gap = longest_gap(&world, flow, died.saturating_sub(100));
    assert!(gap < 2_500, "{gap} ms without an answer");
    world.run_for(60_000);
    assert_ne!(world.nodes[a].site, cable, "it is still dead");
    world.change(Change::SiteUp(cable));
    world.run_until(30_000, "back", |w| w.nodes[a].site == cable);
    let back = world.now_ms();
    world.run_for(10_000);
    assert_eq!(state(&world, a, b), PeerState::Direct);
    let gap = longest_gap(&world, flow, back.saturating_sub(100));
    assert!(gap < 500, "{gap} ms without an answer on the way back");
    no_ping_is_twice(&world, flow);
}

/// A node that talked to 50 others once, and what it sent in each of the minutes since: packets,
/// bytes.
fn idle_mesh(metered: bool) -> (World, usize, Vec<(u64, u64)>) {
    let mut world = World::new(50);
    world.add_relay("r1");
    world.add_relay("r2");
    let a = world.add_edge("a", NatSort::PortRestricted);
    let uplink = Uplink {
        id: UplinkId(1),
        addresses: vec![world.nodes[a].host],
        up: true,
        metered,
        weight: 1,
    };
    let site = world.nodes[a].site;
    world.nodes[a].uplinks.push((uplink, site));
    let sorts = [
        NatSort::PortRestricted,
        NatSort::Symmetric,
        NatSort::FullCone,
    ];
    let flows: Vec<usize> = (0..50)
        .map(|peer| {
            let peer = world.add_edge(&format!("peer-{peer}"), sorts[peer % sorts.len()]);
            world.add_flow(a, peer, 500, false)
        })
        .collect();
    world.boot_all();
    world.run_for(1_000);
    flows.iter().for_each(|&flow| world.start_flow(flow));
    world.run_for(30_000);
    flows.iter().for_each(|&flow| world.stop_flow(flow));
    world.run_for(1_000);
    let mut minutes = Vec::new();
    for _ in 0..15 {
        let (packets, bytes) = (world.nodes[a].packets_out, world.nodes[a].bytes_out);
        world.run_for(60_000);
        let node = &world.nodes[a];
        minutes.push((node.packets_out - packets, node.bytes_out - bytes));
    }
    (world, a, minutes)
}

#[test]
fn an_idle_mesh_of_fifty_peers_costs_less_than_a_kilobyte_a_second_and_then_nothing() {
    let (mut world, a, minutes) = idle_mesh(false);
    println!("packets and bytes in each minute: {minutes:?}");
    // The first minute still has what came of the traffic just before.
    assert!(
        minutes[1..].iter().all(|(_, bytes)| *bytes <= 60 * 1024),
        "{minutes:?}"
    );
    assert!(
        minutes[6..].iter().all(|(packets, _)| *packets == 0),
        "{minutes:?}"
    );
    wakes(&mut world, a);
}

#[test]
fn on_a_metered_uplink_an_idle_mesh_sends_not_one_packet() {
    let (mut world, a, minutes) = idle_mesh(true);
    println!("packets and bytes in each minute: {minutes:?}");
    assert!(
        minutes[2..].iter().all(|(packets, _)| *packets == 0),
        "{minutes:?}"
    );
    assert_eq!(
        world
            .core(a)
            .relays()
            .filter(|relay| relay.up.is_some())
            .count(),
        0
    );
    assert!(!world.core(a).lacks_relays(), "it needs none");
    wakes(&mut world, a);
    assert!(!world.core(a).lacks_relays(), "it has one");
    (0..world.relays.len()).for_each(|relay| world.change(Change::RelayDown(relay)));
    world.run_for(5_000);
    assert!(world.core(a).lacks_relays(), "it talks, and all are gone");
}

/// The first packet to a peer that slept wakes it, and is not lost.
fn wakes(world: &mut World, a: usize) {
    let flow = world.add_flow(a, 7, 100, false);
    world.start_flow(flow);
    world.run_until(2_000, "talks again", |w| {
        w.flows[flow].answered.contains_key(&0)
    });
    world.run_for(3_000);
    no_ping_is_lost(world, flow);
}
