//! Single stories, each with the few nodes that it needs.

use mesh_core::io::{Event, PeerState, Reason, RelayTransport};
use mesh_wire::{id::Via, peer::NatKind};

use crate::{
    nat::NatSort,
    world::{Change, World},
};

/// Two relays, and two nodes that ping each other's way every 20 ms.
pub(crate) fn pair(a: NatSort, b: NatSort) -> (World, usize, usize, usize) {
    pair_of(1, a, b)
}

fn pair_of(seed: u64, a: NatSort, b: NatSort) -> (World, usize, usize, usize) {
    let mut world = World::new(seed);
    world.add_relay("r1");
    world.add_relay("r2");
    let (a, b) = (world.add_edge("a", a), world.add_edge("b", b));
    let flow = world.add_flow(a, b, 20, false);
    world.boot_all();
    world.run_for(1_000);
    world.start_flow(flow);
    (world, a, b, flow)
}

pub(crate) fn state(world: &World, of: usize, peer: usize) -> PeerState {
    world
        .report(of, peer)
        .map_or(PeerState::Idle, |report| report.state)
}

/// The longest time in milliseconds without an answer to a ping sent from `from_ms` on.
pub(crate) fn longest_gap(world: &World, flow: usize, from_ms: u64) -> u64 {
    let sent = world.flows[flow]
        .sent
        .range(..)
        .filter(|(_, at)| **at >= from_ms);
    let (mut longest, mut gap_from) = (0, None);
    for (id, &at) in sent {
        if world.flows[flow].answered.contains_key(id) {
            gap_from = None;
        } else {
            let from = *gap_from.get_or_insert(at);
            longest = longest.max(at - from + 20);
        }
    }
    longest
}

#[track_caller]
pub(crate) fn no_ping_is_lost(world: &mut World, flow: usize) {
    world.stop_flow(flow);
    world.run_for(500);
    let flow = &world.flows[flow];
    let lost = flow
        .sent
        .keys()
        .filter(|id| !flow.answered.contains_key(id));
    assert_eq!(
        lost.collect::<Vec<_>>(),
        Vec::<&u64>::new(),
        "of {}",
        flow.sent.len()
    );
}

#[test]
fn starts_relayed_and_becomes_direct_without_losing_a_packet() {
    let (mut world, a, b, flow) = pair(NatSort::PortRestricted, NatSort::PortRestricted);
    world.run_until(1_000, "relayed", |w| state(w, a, b) == PeerState::Relayed);
    world.run_until(2_000, "direct", |w| {
        state(w, a, b) == PeerState::Direct && state(w, b, a) == PeerState::Direct
    });
    world.run_for(3_000);
    let states = world.report(a, b).unwrap().transitions;
    let states: Vec<PeerState> = states.iter().map(|t| t.to).collect();
    assert_eq!(
        states,
        [PeerState::Waking, PeerState::Relayed, PeerState::Direct]
    );
    no_ping_is_lost(&mut world, flow);
}

#[test]
fn the_kind_of_nat_is_told_apart() {
    let kinds = [
        (NatSort::Open, NatKind::None),
        (NatSort::FullCone, NatKind::Easy),
        (NatSort::PortRestricted, NatKind::Easy),
        (NatSort::Symmetric, NatKind::Hard),
        (NatSort::SymmetricRandom, NatKind::Hard),
        (NatSort::Double, NatKind::Easy),
        (NatSort::UdpBlocked, NatKind::UdpBlocked),
    ];
    for (sort, kind) in kinds {
        let (mut world, a, _, _) = pair(sort, NatSort::Open);
        world.run_for(4_000);
        assert_eq!(world.core(a).nat(), kind, "{sort:?}");
    }
}

#[test]
fn a_dead_direct_path_gives_way_to_the_relay_within_a_second() {
    let (mut world, a, b, flow) = pair(NatSort::PortRestricted, NatSort::PortRestricted);
    world.run_until(3_000, "direct", |w| state(w, a, b) == PeerState::Direct);
    world.run_for(3_000);
    let cut = world.now_ms();
    world
        .severed
        .insert((world.nodes[a].site, world.nodes[b].site));
    world.run_until(2_000, "relayed", |w| state(w, a, b) == PeerState::Relayed);
    world.run_for(2_000);
    let gap = longest_gap(&world, flow, cut.saturating_sub(100));
    assert!(gap < 1_000, "{gap} ms without an answer");
    assert!(world.core(a).is_alive(&world.nodes[b].name));
    // The line comes back, and with it the direct path.
    world.severed.clear();
    let took = world.run_until(70_000, "direct again", |w| {
        state(w, a, b) == PeerState::Direct
    });
    assert!(took < 16_000, "found only after {took} ms");
}

#[test]
fn when_the_relay_in_use_dies_the_other_one_carries_on() {
    let (mut world, a, b, flow) = pair(NatSort::Symmetric, NatSort::PortRestricted);
    world.run_until(1_000, "relayed", |w| state(w, a, b) == PeerState::Relayed);
    world.run_for(3_000);
    let Some(Via::Relay(first)) = world.report(a, b).unwrap().via else {
        panic!("not relayed");
    };
    let index = world
        .relays
        .iter()
        .position(|relay| relay.id == first)
        .unwrap();
    let cut = world.now_ms();
    world.change(Change::RelayDown(index));
    world.run_for(3_000);
    let report = world.report(a, b).unwrap();
    assert!(
        matches!(report.via, Some(Via::Relay(now)) if now != first),
        "{report:#?}"
    );
    let gap = longest_gap(&world, flow, cut.saturating_sub(100));
    assert!(gap < 500, "{gap} ms without an answer");
}

#[test]
fn where_udp_is_blocked_tls_carries_on_without_a_word_from_the_kernel() {
    let (mut world, a, b, flow) = pair(NatSort::PortRestricted, NatSort::Symmetric);
    world.run_for(3_000);
    let cut = world.now_ms();
    world.block_udp(world.nodes[a].site);
    world.run_for(8_000);
    let gap = longest_gap(&world, flow, cut.saturating_sub(100));
    assert!(gap < 2_500, "{gap} ms without an answer");
    let relays: Vec<_> = world.core(a).relays().collect();
    assert!(
        relays
            .iter()
            .any(|relay| relay.up == Some(RelayTransport::Tls)),
        "{relays:#?}"
    );
    assert_eq!(state(&world, a, b), PeerState::Relayed);
    world.run_for(30_000);
    assert_eq!(world.core(a).nat(), NatKind::UdpBlocked);
    assert_eq!(world.report(a, b).unwrap().reason, Reason::UdpBlocked);
}

#[test]
fn udp_that_works_again_is_used_again() {
    let (mut world, a, _, flow) = pair(NatSort::UdpBlocked, NatSort::Open);
    let by = |w: &World, transport| w.core(a).relays().any(|r| r.up == Some(transport));
    world.run_until(5_000, "TLS", |w| by(w, RelayTransport::Tls));
    let site = world.nodes[a].site;
    world.sites[site].nat.sort = NatSort::PortRestricted;
    world.run_until(70_000, "QUIC", |w| !by(w, RelayTransport::Tls));
    assert!(by(&world, RelayTransport::Quic));
    no_ping_is_lost(&mut world, flow);
}

#[test]
fn with_everything_upstream_gone_a_rebooted_node_finds_its_site_and_known_peers() {
    let mut world = World::new(3);
    world.add_relay("r1");
    let site = world.add_site(NatSort::PortRestricted);
    let (a1, a2) = (world.add_node("a1", site), world.add_node("a2", site));
    let b = world.add_edge("b", NatSort::PortRestricted);
    let flows = [
        world.add_flow(a1, a2, 50, false),
        world.add_flow(a1, b, 50, false),
    ];
    world.boot_all();
    flows.iter().for_each(|&flow| world.start_flow(flow));
    world.run_until(3_000, "direct to both", |w| {
        state(w, a1, a2) == PeerState::Direct && state(w, a1, b) == PeerState::Direct
    });
    world.run_for(2_000);
    let report = world.report(a1, a2).unwrap();
    assert_eq!(
        report.transitions.last().unwrap().reason,
        Reason::LanFound,
        "{report:#?}"
    );
    world.change(Change::RelayDown(0));
    world.run_for(1_000);
    world.boot(a1);
    let booted = world.now_ms();
    let after = |w: &World, flow: usize| {
        w.flows[flow]
            .sent
            .iter()
            .any(|(id, at)| *at >= booted && w.flows[flow].answered.contains_key(id))
    };
    let took = world.run_until(2_000, "the site", |w| after(w, flows[0]));
    assert!(took <= 300, "a LAN neighbour took {took} ms");
    world.run_until(5_000, "the known peer", |w| after(w, flows[1]));
}

#[test]
fn a_dead_peer_is_said_to_be_dead_within_a_second() {
    for sorts in [
        (NatSort::PortRestricted, NatSort::PortRestricted),
        (NatSort::PortRestricted, NatSort::Symmetric),
    ] {
        let (mut world, a, b, _) = pair(sorts.0, sorts.1);
        world.run_for(14_000);
        world.nodes[a].events.clear();
        let died = world.now_ms();
        let site = world.nodes[b].site;
        world.change(Change::SiteDown(site));
        let (name, id) = (world.nodes[b].name.clone(), world.nodes[b].id);
        world.run_until(1_000, "dead", |w| !w.core(a).is_alive(&name));
        let alive = |alive| Event::Liveness { peer: id, alive };
        let said = |w: &World, event: &Event| w.nodes[a].events.iter().any(|(_, e)| e == event);
        assert!(said(&world, &alive(false)), "dead since {died}, {sorts:?}");
        // And alive again soon after it came back.
        world.run_for(21_000);
        assert_eq!(state(&world, a, b), PeerState::Unreachable);
        world.change(Change::SiteUp(site));
        world.run_until(8_000, "alive", |w| w.core(a).is_alive(&name));
        assert!(said(&world, &alive(true)));
    }
}

#[test]
fn an_unreachable_peer_is_found_again_without_anybody_asking() {
    let (mut world, a, b, flow) = pair(NatSort::PortRestricted, NatSort::Symmetric);
    world.run_for(3_000);
    let site = world.nodes[b].site;
    world.change(Change::SiteDown(site));
    world.run_for(1_000);
    world.stop_flow(flow);
    world.run_until(30_000, "given up", |w| {
        state(w, a, b) == PeerState::Unreachable
    });
    world.run_for(20_000);
    world.change(Change::SiteUp(site));
    let name = world.nodes[b].name.clone();
    world.run_until(10_000, "alive", |w| w.core(a).is_alive(&name));
}

#[test]
fn a_path_on_which_only_small_packets_pass_never_carries_traffic() {
    let (mut world, a, b, flow) = pair(NatSort::FullCone, NatSort::FullCone);
    let site = world.nodes[b].site;
    world.sites[site].carries_bytes = 1_000;
    world.run_for(18_000);
    let report = world.report(a, b).unwrap();
    assert_eq!(
        (report.state, report.reason),
        (PeerState::Relayed, Reason::MtuFail)
    );
    let relayed = |via: &Option<Via>| !matches!(via, Some(Via::Direct(_)));
    assert!(world.nodes[a].moves.iter().all(|(_, _, via)| relayed(via)));
    assert!(world.nodes[b].moves.iter().all(|(_, _, via)| relayed(via)));
    no_ping_is_lost(&mut world, flow);
}

#[test]
fn a_peer_that_starts_anew_is_reached_again() {
    let (mut world, a, b, flow) = pair(NatSort::PortRestricted, NatSort::PortRestricted);
    world.run_for(5_000);
    world.boot(b);
    let booted = world.now_ms();
    let answered = |w: &World| {
        let sent = w.flows[flow].sent.iter();
        let mut after = sent.filter(|(_, at)| **at > booted + 50);
        after.any(|(id, _)| w.flows[flow].answered.contains_key(id))
    };
    world.run_until(3_000, "answered", answered);
    world.run_until(10_000, "direct", |w| state(w, a, b) == PeerState::Direct);
}

#[test]
fn a_peer_without_traffic_costs_nothing_after_a_while() {
    let (mut world, a, b, flow) = pair(NatSort::PortRestricted, NatSort::Symmetric);
    world.run_for(3_000);
    world.stop_flow(flow);
    world.run_for(400_000);
    assert_eq!(
        (state(&world, a, b), state(&world, b, a)),
        (PeerState::Idle, PeerState::Idle)
    );
    let steps = world.steps;
    world.run_for(3_600_000);
    assert_eq!(world.steps - steps, 0, "steps in an idle hour");
    world.start_flow(flow);
    world.run_until(1_000, "relayed again", |w| {
        state(w, a, b) == PeerState::Relayed
    });
    no_ping_is_lost(&mut world, flow);
}

#[test]
fn a_network_change_is_survived_at_once() {
    let (mut world, a, b, flow) = pair(NatSort::PortRestricted, NatSort::PortRestricted);
    world.run_for(5_000);
    let moved = world.now_ms();
    world.rehome(a, NatSort::FullCone);
    world.run_for(5_000);
    assert_eq!(state(&world, a, b), PeerState::Direct);
    let gap = longest_gap(&world, flow, moved.saturating_sub(100));
    assert!(gap < 1_000, "{gap} ms without an answer");
}

/// Which relay carries what `of` sends to `peer`.
fn relay_in_use(world: &World, of: usize, peer: usize) -> Option<usize> {
    let Some(Via::Relay(relay)) = world.report(of, peer)?.via else {
        return None;
    };
    world.relays.iter().position(|known| known.id == relay)
}

#[test]
fn a_pair_takes_the_relay_with_the_least_sum_and_keeps_to_it() {
    let mut world = World::new(11);
    for relay in 0..6 {
        world.add_relay(&format!("r{relay}"));
    }
    let (a, b) = (
        world.add_edge("a", NatSort::Symmetric),
        world.add_edge("b", NatSort::Symmetric),
    );
    // One way, in milliseconds, from a and from b: each has a near one of its own, and one is
    // best for both.
    let far = [(5, 150), (150, 5), (25, 20), (90, 90), (120, 60), (60, 120)];
    let (a_site, b_site) = (world.nodes[a].site, world.nodes[b].site);
    for (relay, (from_a, from_b)) in far.into_iter().enumerate() {
        let far = &mut world.relays[relay].far_us;
        far.extend([(a_site, from_a * 1_000), (b_site, from_b * 1_000)]);
    }
    let flow = world.add_flow(a, b, 20, false);
    world.boot_all();
    world.run_for(2_000);
    let home = |world: &World, of| {
        let home = world.core(of).relays().find(|relay| relay.home).unwrap();
        world.relays.iter().position(|relay| relay.id == home.id)
    };
    assert_eq!((home(&world, a), home(&world, b)), (Some(0), Some(1)));
    world.start_flow(flow);
    world.run_until(3_000, "the best for both", |w| {
        relay_in_use(w, a, b) == Some(2) && relay_in_use(w, b, a) == Some(2)
    });
    world.nodes[a].moves.clear();
    world.run_for(120_000);
    assert_eq!(relay_in_use(&world, a, b), Some(2));
    assert_eq!(world.nodes[a].moves, [], "and no more moves");
    no_ping_is_lost(&mut world, flow);
}

#[test]
fn a_relay_that_says_goodbye_is_left_without_losing_a_packet() {
    let (mut world, a, b, flow) = pair(NatSort::Symmetric, NatSort::PortRestricted);
    world.run_until(1_000, "relayed", |w| state(w, a, b) == PeerState::Relayed);
    world.run_for(3_000);
    let first = relay_in_use(&world, a, b).unwrap();
    world.change(Change::RelayGoAway(first));
    world.run_for(2_000);
    for (of, peer) in [(a, b), (b, a)] {
        let now = relay_in_use(&world, of, peer);
        assert!(now.is_some_and(|now| now != first), "{now:?}");
    }
    world.change(Change::RelayDown(first));
    world.run_for(3_000);
    no_ping_is_lost(&mut world, flow);
}

#[test]
fn a_dead_neighbour_on_the_lan_is_doubted_within_700_ms_at_worst() {
    let mut worst = 0;
    for phase in 0..10 {
        let mut world = World::new(1);
        world.add_relay("r1");
        let site = world.add_site(NatSort::PortRestricted);
        let (a, b) = (world.add_node("a", site), world.add_node("b", site));
        let flow = world.add_flow(a, b, 20, false);
        world.boot_all();
        world.run_for(500);
        world.start_flow(flow);
        world.run_until(2_000, "direct", |w| state(w, a, b) == PeerState::Direct);
        world.run_for(20_000 + phase * 10);
        let name = world.nodes[b].name.clone();
        world.kill(b);
        let took = world.run_until(2_000, "doubted", |w| !w.core(a).is_alive(&name));
        worst = worst.max(took);
    }
    assert!(worst <= 700, "{worst} ms");
}

#[test]
fn a_lossy_direct_path_gives_way_to_a_clean_relay_and_comes_back_when_it_is_clean() {
    let mut noticed = Vec::new();
    for seed in 1..=7 {
        let (mut world, a, b, flow) =
            pair_of(seed, NatSort::PortRestricted, NatSort::PortRestricted);
        world.run_until(3_000, "direct", |w| state(w, a, b) == PeerState::Direct);
        world.run_for(20_000);
        let between = (world.nodes[a].site, world.nodes[b].site);
        world.lossy.insert(between, 0.1);
        let took = world.run_until(240_000, "relayed", |w| {
            state(w, a, b) == PeerState::Relayed && state(w, b, a) == PeerState::Relayed
        });
        world.run_for(20_000);
        let report = world.report(a, b).unwrap();
        assert_eq!(
            (report.state, report.reason),
            (PeerState::Relayed, Reason::DirectLossy)
        );
        world.nodes[a].moves.clear();
        let calm = world.now_ms();
        world.run_for(60_000);
        assert_eq!(world.nodes[a].moves, [], "it does not swing");
        world.lossy.clear();
        let back = world.run_until(180_000, "direct again", |w| {
            state(w, a, b) == PeerState::Direct
        });
        noticed.push((took, back));
        world.stop_flow(flow);
        world.run_for(1_000);
        let gap = longest_gap(&world, flow, calm);
        assert_eq!(gap, 0, "nothing is lost once the relay carries it");
    }
    println!("ms from loss to relay, and back: {noticed:?}");
    noticed.sort_unstable();
    assert!(noticed[3].0 <= 90_000, "{noticed:?}");
}

#[test]
fn a_neighbour_that_announced_itself_is_called_without_relay_or_memory() {
    let mut world = World::new(4);
    world.add_relay("r1");
    let site = world.add_site(NatSort::PortRestricted);
    let (a, b) = (world.add_node("a", site), world.add_node("b", site));
    let flow = world.add_flow(a, b, 50, false);
    world.make_snapshot();
    world.change(Change::RelayDown(0));
    world.boot(a);
    world.boot(b);
    let (peer, address) = (world.nodes[b].id, world.nodes[b].host);
    world.tell(a, mesh_core::io::Input::Neighbour { peer, address });
    world.run_for(10_000);
    assert!(
        world.report(a, b).is_none(),
        "and costs nothing until it is wanted"
    );
    world.start_flow(flow);
    world.run_until(500, "direct", |w| state(w, a, b) == PeerState::Direct);
    no_ping_is_lost(&mut world, flow);
}
