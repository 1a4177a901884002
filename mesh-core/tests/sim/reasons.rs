//! Clocks that go back, snapshots that are behind, and what else keeps a handshake from being answered.

use std::time::Duration;

use mesh_core::io::{Event, Input, PeerState, Reason};

use crate::{
    nat::NatSort,
    scenarios::{no_ping_is_lost, state},
    world::World,
};

const HOUR_US: u64 = 3_600_000_000;

/// Two relays; `a`, which talked to `b` directly, and boots again with its clock an hour behind.
fn booted_in_the_past(sort: NatSort) -> (World, usize, usize) {
    let mut world = World::new(6);
    world.add_relay("r1");
    world.add_relay("r2");
    let a = world.add_edge("a", NatSort::PortRestricted);
    let b = world.add_edge("b", sort);
    let flow = world.add_flow(a, b, 20, false);
    world.boot_all();
    world.run_for(1_000);
    world.start_flow(flow);
    world.run_for(5_000);
    world.stop_flow(flow);
    // Until nobody needs it: otherwise the other end calls by itself.
    world.run_for(400_000);
    world.kill(a);
    world.run_for(5_000);
    world.nodes[a].clock_behind_us = HOUR_US;
    world.boot(a);
    world.run_for(1_000);
    (world, a, b)
}

#[test]
fn a_node_whose_clock_went_back_while_it_was_off_is_called_back() {
    for sort in [NatSort::PortRestricted, NatSort::Symmetric] {
        let (mut world, a, b) = booted_in_the_past(sort);
        let flow = world.add_flow(a, b, 20, false);
        world.start_flow(flow);
        let took = world.run_until(2_000, "answered", |w| !w.flows[flow].answered.is_empty());
        println!("{took} ms");
        world.run_for(3_000);
        no_ping_is_lost(&mut world, flow);
    }
}

#[test]
fn without_that_the_reason_is_its_clock_if_it_knows_what_time_it_cannot_be() {
    for (knows, reason) in [(true, Reason::ClockSkew), (false, Reason::MapStale)] {
        let (mut world, a, b) = booted_in_the_past(NatSort::Symmetric);
        world.call_back = false;
        let (wall, at_least) = match knows {
            true => (Duration::from_secs(1_000), Duration::from_secs(4_000)),
            false => (Duration::from_secs(1_000), Duration::from_secs(1_020)),
        };
        world.tell(a, Input::Clock { wall, at_least });
        let flow = world.add_flow(a, b, 20, false);
        world.start_flow(flow);
        world.run_for(21_000);
        let report = world.report(a, b).unwrap();
        assert_eq!(
            (report.state, report.reason),
            (PeerState::Unreachable, reason)
        );
    }
}

#[test]
fn a_node_that_the_other_has_not_heard_of_waits_for_that_and_says_so() {
    let mut world = World::new(7);
    world.add_relay("r1");
    let a = world.add_edge("a", NatSort::PortRestricted);
    let b = world.add_edge("b", NatSort::PortRestricted);
    let flow = world.add_flow(a, b, 20, false);
    world.make_snapshot();
    let (name, mut joined) = (world.nodes[a].name.clone(), None);
    world.publish(&[], |snapshot| joined = snapshot.nodes.remove(&name));
    world.boot(b);
    world.publish(&[], |snapshot| {
        snapshot.nodes.insert(name, joined.unwrap());
    });
    world.boot(a);
    world.run_for(1_000);
    world.start_flow(flow);
    world.run_for(21_000);
    let report = world.report(a, b).unwrap();
    let got = (report.state, report.reason);
    assert_eq!(got, (PeerState::Unreachable, Reason::MapStale));
    let id = world.nodes[a].id;
    let strangers = world.nodes[b].events.iter();
    let strangers = strangers.filter(|(_, event)| *event == Event::Stranger { id });
    assert_eq!(strangers.count(), 1, "once, however often it calls");
    // It hears, and need not be called again.
    world.publish(&[b], |_| {});
    world.run_until(300, "talk", |w| state(w, a, b) != PeerState::Unreachable);
    world.run_until(2_000, "direct", |w| state(w, a, b) == PeerState::Direct);
    // A peer with which it talked is not taken for one that never heard of it.
    world.run_for(2_000);
    world.kill(b);
    world.run_for(2_900);
    world.change(crate::world::Change::SiteDown(world.nodes[b].site));
    world.run_for(22_000);
    let reason = world.report(a, b).unwrap().reason;
    assert_eq!(reason, Reason::PeerOffline);
}
