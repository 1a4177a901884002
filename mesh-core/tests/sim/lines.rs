//! What a line carries, how long a NAT remembers it, and when the kernel refuses to send.

use mesh_core::io::{PeerState, Reason};
use mesh_wire::id::Via;

use crate::{
    nat::NatSort,
    scenarios::{longest_gap, no_ping_is_lost, pair, state},
    world::World,
};

fn both_direct(w: &World, a: usize, b: usize) -> bool {
    state(w, a, b) == PeerState::Direct && state(w, b, a) == PeerState::Direct
}

fn by_relay_for_its_size(w: &World, a: usize, b: usize) -> bool {
    let why = |of, peer| {
        let report = w.report(of, peer).unwrap();
        (report.state, report.reason)
    };
    [(a, b), (b, a)].iter().all(|&(of, peer)| {
        let (state, reason) = why(of, peer);
        // The end whose own large packets arrive may not see why the other stays.
        state == PeerState::Relayed && matches!(reason, Reason::MtuFail | Reason::Silent)
    })
}

fn set_mtu(world: &mut World, to: &[usize], bytes: u16) {
    world.publish(to, |snapshot| snapshot.mesh.mtu_bytes = bytes);
}

/// Two nodes of a mesh with an MTU of 1,400 that fill it.
fn large(
    carries: impl Fn(usize, usize) -> Vec<((usize, usize), u16)>,
) -> (World, usize, usize, usize) {
    let mut world = World::new(8);
    world.add_relay("r1");
    world.add_relay("r2");
    let (a, b) = (
        world.add_edge("a", NatSort::FullCone),
        world.add_edge("b", NatSort::PortRestricted),
    );
    let flow = world.add_flow(a, b, 20, false);
    world.flows[flow].bytes = 1_400;
    let lines = carries(world.nodes[a].site, world.nodes[b].site);
    world.carries_one_way.extend(lines);
    world.make_snapshot();
    set_mtu(&mut world, &[], 1_400);
    [a, b].into_iter().for_each(|node| world.boot(node));
    world.run_for(1_000);
    world.start_flow(flow);
    (world, a, b, flow)
}

#[test]
fn in_a_mesh_with_a_larger_mtu_a_path_has_to_carry_that_in_both_directions() {
    let (mut world, a, b, flow) = large(|a, b| vec![((a, b), 1_400), ((b, a), 1_400)]);
    world.run_until(2_000, "direct", |w| both_direct(w, a, b));
    world.run_for(20_000);
    no_ping_is_lost(&mut world, flow);
    for forth in [true, false] {
        let (mut world, a, b, flow) = large(|a, b| match forth {
            true => vec![((a, b), 1_399)],
            false => vec![((b, a), 1_399)],
        });
        world.run_for(18_000);
        assert!(by_relay_for_its_size(&world, a, b), "{forth}");
        let reasons = [(a, b), (b, a)].map(|(of, peer)| world.report(of, peer).unwrap().reason);
        assert!(reasons.contains(&Reason::MtuFail), "{reasons:?}");
        world.run_for(60_000);
        for (of, peer) in [(a, b), (b, a)] {
            let moves = world.nodes[of].moves.iter();
            let direct = |via: &Option<Via>| matches!(via, Some(Via::Direct(_)));
            assert_eq!(
                moves.filter(|(.., via)| direct(via)).count(),
                0,
                "{of} {peer}"
            );
        }
        no_ping_is_lost(&mut world, flow);
    }
}

#[test]
fn an_mtu_that_grows_is_proven_before_anything_large_goes_by_a_path() {
    for (carries, stays) in [(1_500, true), (1_300, false)] {
        let (mut world, a, b, flow) = pair(NatSort::PortRestricted, NatSort::PortRestricted);
        let sites = [world.nodes[a].site, world.nodes[b].site];
        sites
            .into_iter()
            .for_each(|site| world.sites[site].carries_bytes = carries);
        world.run_until(2_000, "direct", |w| both_direct(w, a, b));
        world.run_for(5_000);
        for (first, then) in [(a, b), (b, a)] {
            // Not at the same moment; large packets are there as soon as both know.
            set_mtu(&mut world, &[first], 1_400);
            world.run_for(700);
            set_mtu(&mut world, &[then], 1_400);
            world.flows[flow].bytes = 1_400;
            match stays {
                true => _ = world.run_until(8_000, "direct again", |w| both_direct(w, a, b)),
                false => {
                    world.run_for(20_000);
                    assert!(by_relay_for_its_size(&world, a, b));
                }
            }
            world.flows[flow].bytes = 84;
            set_mtu(&mut world, &[a, b], 1_280);
            world.run_until(70_000, "direct with small ones", |w| both_direct(w, a, b));
        }
        no_ping_is_lost(&mut world, flow);
    }
}

#[test]
fn how_long_a_nat_remembers_is_learned_and_an_idle_path_lives() {
    // With 25 s, and the answers, it would be 16, and with 20 s no path. Both ends may ask at once.
    for (lifetime_s, packets_max) in [(180, 8), (60, 10), (20, 60)] {
        let (mut world, a, b, flow) = pair(NatSort::PortRestricted, NatSort::PortRestricted);
        for site in [world.nodes[a].site, world.nodes[b].site] {
            world.sites[site].nat.expire_after(lifetime_s * 1_000_000);
        }
        world.run_until(3_000, "direct", |w| both_direct(w, a, b));
        let mut idle = Vec::new();
        // Each end learns for itself.
        for _ in 0..6 {
            world.run_for(10_000);
            world.stop_flow(flow);
            world.run_for(60_000); // It is not warm any more.
            world.nodes[a].moves.clear();
            let sent = |w: &World| {
                let [a, b] = [&w.nodes[a], &w.nodes[b]];
                a.direct_sent[&b.id] + b.direct_sent[&a.id]
            };
            let before = sent(&world);
            world.run_for(200_000);
            let after = sent(&world);
            idle.push((
                after - before,
                world.nodes[a].moves.len(),
                both_direct(&world, a, b),
            ));
            world.start_flow(flow);
            world.run_until(3_000, "direct", |w| both_direct(w, a, b));
        }
        println!("{lifetime_s} s: packets, moves and whether direct, of each idle time: {idle:?}");
        let (packets, moves, direct) = idle[5];
        assert!(direct && moves == 0, "{lifetime_s} s: {idle:?}");
        assert!(packets <= packets_max, "{lifetime_s} s: {idle:?}");
    }
}

/// What the nightly day found: a NAT that forgot the path in a pause costs nobody the first seconds of what is
/// said next, though nobody doubts so slow a path sooner than after more than a second.
#[test]
fn after_a_pause_in_which_a_nat_forgot_the_path_the_first_packets_arrive() {
    for (forgets, pause_ms) in [(0, 65_000), (1, 65_000), (0, 200_000), (1, 200_000)] {
        let (mut world, a, b, flow) = pair(NatSort::PortRestricted, NatSort::PortRestricted);
        let sites = [world.nodes[a].site, world.nodes[b].site];
        for site in sites {
            world.sites[site].delay_us = 80_000;
        }
        world.run_until(4_000, "direct", |w| both_direct(w, a, b));
        world.run_for(20_000);
        world.stop_flow(flow);
        world.run_for(pause_ms);
        assert!(both_direct(&world, a, b), "it is kept");
        world.sites[sites[forgets]].nat.forget();
        world.flows[flow].forget();
        world.start_flow(flow);
        world.run_for(10_000);
        assert_eq!(world.flows[flow].twice, 0);
        no_ping_is_lost(&mut world, flow);
    }
}

#[test]
fn a_direct_path_is_looked_for_with_the_first_packet_after_a_pause() {
    let (mut world, a, b, flow) = pair(NatSort::PortRestricted, NatSort::PortRestricted);
    world.run_until(3_000, "direct", |w| both_direct(w, a, b));
    let between = (world.nodes[a].site, world.nodes[b].site);
    world.severed.insert(between);
    world.run_for(60_000);
    assert_eq!(state(&world, a, b), PeerState::Relayed);
    world.stop_flow(flow);
    world.run_for(110_000); // No traffic: no search, nothing that costs.
    let sent = world.nodes[a].direct_sent.clone();
    world.run_for(60_000);
    assert_eq!(world.nodes[a].direct_sent, sent);
    world.severed.clear();
    world.run_for(60_000);
    world.start_flow(flow);
    let again = world.now_ms();
    world.run_until(1_000, "direct again", |w| both_direct(w, a, b));
    world.stop_flow(flow);
    world.run_for(500);
    assert_eq!(longest_gap(&world, flow, again), 0);
}

#[test]
fn a_path_to_which_the_kernel_refuses_to_send_is_left_at_once_and_tried_ever_more_rarely() {
    let (mut world, a, b, flow) = pair(NatSort::PortRestricted, NatSort::PortRestricted);
    world.run_until(3_000, "direct", |w| both_direct(w, a, b));
    world.run_for(20_000);
    let refused = world.now_ms();
    world.refused.insert(a);
    world.run_until(50, "by relay", |w| state(w, a, b) == PeerState::Relayed);
    world.run_for(120_000);
    let gap = longest_gap(&world, flow, refused.saturating_sub(100));
    assert!(gap <= 40, "{gap} ms without an answer");
    let direct = |via: &Option<Via>| matches!(via, Some(Via::Direct(_)));
    let moves = world.nodes[a].moves.iter();
    let back = moves
        .filter(|(at, _, via)| *at > refused && direct(via))
        .count();
    assert_eq!(back, 0, "nothing goes where nothing can");
    world.refused.clear();
    world.run_until(70_000, "direct again", |w| both_direct(w, a, b));
    // And at once if the network is known to be another.
    world.refused.insert(a);
    world.run_for(5_000);
    world.refused.clear();
    let host = world.nodes[a].host;
    world.tell(a, mesh_core::io::Input::LocalAddresses(vec![host]));
    world.run_until(1_000, "direct again", |w| both_direct(w, a, b));
}

/// One behind a NAT whose ports nobody can guess, one whose NAT lets in only what was written to.
fn easy_and_hard(seed: u64, bursts: [bool; 2]) -> (World, usize, usize, usize) {
    let mut world = World::new(seed);
    world.add_relay("r1");
    world.add_relay("r2");
    let (a, b) = (
        world.add_edge("a", NatSort::SymmetricRandom),
        world.add_edge("b", NatSort::PortRestricted),
    );
    (world.nodes[a].bursts, world.nodes[b].bursts) = (bursts[0], bursts[1]);
    let flow = world.add_flow(a, b, 20, false);
    world.boot_all();
    world.run_for(1_000);
    world.start_flow(flow);
    (world, a, b, flow)
}

#[test]
fn with_a_burst_of_sockets_an_easy_and_a_hard_nat_become_direct_if_both_ends_take_part() {
    let mut took = Vec::new();
    for seed in 0..20 {
        let (mut world, a, b, flow) = easy_and_hard(seed, [true, true]);
        took.push(world.run_until(700_000, "direct", |w| both_direct(w, a, b)));
        world.run_for(20_000);
        assert!(both_direct(&world, a, b), "and stays so");
        no_ping_is_lost(&mut world, flow);
        let sent =
            [(a, b), (b, a)].map(|(of, to)| world.nodes[of].direct_sent[&world.nodes[to].id]);
        let bursts = if took.last() <= Some(&30_000) { 1 } else { 3 };
        assert!(
            sent.iter().max() <= Some(&(bursts * 1_500 + 1_500)),
            "{sent:?}"
        );
    }
    let first = took.iter().filter(|ms| **ms < 30_000).count();
    println!("with the first burst: {first} of 20; {took:?}");
    assert!(first >= 17, "1.7 % of the bursts may be in vain: {took:?}");
    for bursts in [[true, false], [false, true], [false, false]] {
        let (mut world, a, b, _) = easy_and_hard(1, bursts);
        world.run_for(120_000);
        let report = world.report(a, b).unwrap();
        let got = (report.state, report.reason);
        assert_eq!(got, (PeerState::Relayed, Reason::HardNatOne));
        let sent = world.nodes[b].direct_sent[&world.nodes[a].id];
        assert!(sent < 600, "{sent} packets");
    }
}

#[test]
fn a_node_that_moves_all_day_is_direct_again_after_each_move() {
    let (mut world, a, b, _) = pair(NatSort::PortRestricted, NatSort::PortRestricted);
    world.run_until(3_000, "direct", |w| both_direct(w, a, b));
    for _ in 0..9 {
        world.run_for(15_000);
        world.rehome(b, NatSort::PortRestricted);
        world.run_for(2_000); // It may take the old path for good until it notices.
        world.run_until(10_000, "direct again", |w| both_direct(w, a, b));
    }
}

#[test]
fn a_path_that_lasted_is_looked_for_soon_however_often_it_was_cut() {
    let (mut world, a, b, _) = pair(NatSort::PortRestricted, NatSort::PortRestricted);
    world.run_until(3_000, "direct", |w| both_direct(w, a, b));
    let between = (world.nodes[a].site, world.nodes[b].site);
    for _ in 0..8 {
        world.run_for(20_000);
        world.severed.insert(between);
        world.run_for(12_000); // The search is over, and was in vain.
        assert_eq!(state(&world, a, b), PeerState::Relayed);
        world.severed.clear();
        world.run_until(20_000, "direct again", |w| both_direct(w, a, b));
    }
}
