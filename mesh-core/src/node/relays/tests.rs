use rand::SeedableRng;

use super::*;
use crate::node::tests::at;

use RelayTransport::{Quic, Tls};

const R: RelayId = RelayId(1);

/// Links, and what they did, as short words.
struct Bench {
    relays: Relays,
    dice: Dice,
    said: Vec<String>,
}

fn word(output: Output) -> String {
    match output {
        Output::ConnectRelay { relay, transport } => format!("connect {} {transport:?}", relay.0),
        Output::DisconnectRelay { relay, transport } => {
            format!("disconnect {} {transport:?}", relay.0)
        }
        Output::UseRelayTransport { relay, transport } => format!("use {} {transport:?}", relay.0),
        other @ (Output::Handshake { .. }
        | Output::Send { .. }
        | Output::SetPath { .. }
        | Output::FindPeer { .. }
        | Output::AskReflexive { .. }
        | Output::OpenSockets { .. }
        | Output::UseUplink { .. }
        | Output::ProbeUplink { .. }
        | Output::Event(_)) => panic!("{other:?}"),
    }
}

fn about(domains: Vec<IpNet>, place: Place) -> About {
    let serves = true;
    About {
        domains,
        serves,
        place,
    }
}

impl Bench {
    fn new(relays: &[u64]) -> Self {
        let mut bench = Self {
            relays: Relays::default(),
            dice: Dice::seed_from_u64(1),
            said: Vec::new(),
        };
        // Each in a network of its own, unless they have the same tens.
        let known = relays.iter().map(|&id| {
            let net = domain([192, 0, u8::try_from(id / 10).unwrap(), 1].into());
            let domains = if id < 10 { Vec::new() } else { vec![net] };
            (RelayId(id), about(domains, Place::Apart))
        });
        bench.relays.set_known(&NodeId([0; 32]), known.collect());
        bench.act(|relays, dice, out| relays.keep(at(0), dice, out));
        bench
    }

    fn act(&mut self, act: impl FnOnce(&mut Relays, &mut Dice, &mut dyn FnMut(Output))) {
        let said = &mut self.said;
        act(&mut self.relays, &mut self.dice, &mut |output| {
            said.push(word(output))
        });
    }

    fn connected(&mut self, transport: RelayTransport, ms: u64) {
        self.act(|relays, dice, out| relays.on_connected(R, transport, at(ms), dice, out));
    }

    fn lost(&mut self, transport: RelayTransport, ms: u64) {
        self.act(|relays, dice, out| relays.on_lost(R, transport, "why", at(ms), dice, out));
    }

    /// Lets every deadline up to `ms` come.
    fn run_to(&mut self, ms: u64) {
        let mut turns = 0;
        while let Some(now) = self.relays.deadline().filter(|now| *now <= at(ms)) {
            self.act(|relays, dice, out| relays.on_timeout(now, dice, out));
            turns += 1;
            assert!(turns < 1000, "the links spin");
        }
    }

    fn said(&mut self) -> Vec<String> {
        std::mem::take(&mut self.said)
    }
}

#[test]
fn quic_goes_first_and_tls_follows_after_300_ms() {
    let mut bench = Bench::new(&[1]);
    bench.run_to(299);
    assert_eq!(bench.said(), ["connect 1 Quic"]);
    bench.run_to(300);
    assert_eq!(bench.said(), ["connect 1 Tls"]);
    bench.connected(Quic, 350);
    assert_eq!(bench.said(), ["disconnect 1 Tls"]);
    assert_eq!(bench.relays.transport(&R), Some(Quic));
    assert_eq!(
        bench.relays.deadline(),
        None,
        "a link that works needs nothing"
    );
}

#[test]
fn quic_that_comes_up_late_is_still_preferred() {
    let mut bench = Bench::new(&[1]);
    bench.run_to(300);
    bench.connected(Tls, 400);
    assert_eq!(bench.relays.transport(&R), Some(Tls));
    bench.said();
    bench.connected(Quic, 900);
    assert_eq!(bench.said(), ["use 1 Quic", "disconnect 1 Tls"]);
}

#[test]
fn udp_that_gives_nothing_in_3_s_is_blocked_and_tried_again_ever_more_rarely() {
    let mut bench = Bench::new(&[1]);
    bench.run_to(300);
    bench.connected(Tls, 400);
    bench.said();
    bench.run_to(3_000);
    assert_eq!(bench.said(), ["disconnect 1 Quic"]);
    assert_eq!(bench.relays.transport(&R), Some(Tls));
    assert!(bench.relays.report(&R).problem.unwrap().contains("QUIC"));
    bench.run_to(62_999);
    assert_eq!(bench.said(), Vec::<String>::new());
    bench.run_to(66_000);
    assert_eq!(bench.said(), ["connect 1 Quic", "disconnect 1 Quic"]);
    bench.run_to(665_999);
    assert_eq!(bench.said(), Vec::<String>::new());
    bench.run_to(666_000);
    assert_eq!(bench.said(), ["connect 1 Quic"]);
}

#[test]
fn a_network_change_tries_quic_at_once() {
    let mut bench = Bench::new(&[1]);
    bench.run_to(300);
    bench.connected(Tls, 400);
    bench.run_to(10_000);
    bench.said();
    bench.act(|relays, dice, out| relays.on_network_change(false, at(10_000), dice, out));
    assert_eq!(bench.said(), ["connect 1 Quic"]);
}

#[test]
fn a_refused_quic_starts_tls_without_waiting() {
    let mut bench = Bench::new(&[1]);
    bench.lost(Quic, 20);
    assert_eq!(bench.said(), ["connect 1 Quic", "connect 1 Tls"]);
}

#[test]
fn a_link_that_breaks_is_made_again_at_once_and_then_with_longer_pauses() {
    let mut bench = Bench::new(&[1]);
    bench.connected(Quic, 20);
    bench.said();
    bench.lost(Quic, 1_000);
    assert_eq!(bench.said(), ["connect 1 Quic"]);
    let mut starts = vec![1_000];
    for ms in 1_000..60_000 {
        bench.run_to(ms);
        for said in bench.said() {
            match said.as_str() {
                "connect 1 Quic" => starts.push(ms),
                "connect 1 Tls" => {}
                other => panic!("{other} at {ms}"),
            }
            bench.lost(if said.ends_with("Quic") { Quic } else { Tls }, ms);
        }
        if starts.len() == 1 {
            bench.lost(Quic, ms);
        }
    }
    let pauses: Vec<u64> = starts.windows(2).map(|two| two[1] - two[0]).collect();
    assert!(pauses.len() > 15, "{pauses:?}");
    assert!(pauses.iter().all(|pause| *pause <= 3_001), "{pauses:?}");
    assert!(pauses[3] > pauses[1], "{pauses:?}");
}

#[test]
fn a_doubted_link_moves_to_tls_if_nothing_comes_through_it() {
    let mut bench = Bench::new(&[1]);
    bench.connected(Quic, 20);
    bench.said();
    bench.act(|relays, dice, _| relays.doubt(R, at(5_000), dice));
    bench.run_to(5_300);
    assert_eq!(bench.said(), ["connect 1 Tls"]);
    bench.connected(Tls, 5_400);
    assert_eq!(bench.said(), ["use 1 Tls", "disconnect 1 Quic"]);
    assert_eq!(bench.relays.transport(&R), Some(Tls));
}

#[test]
fn a_doubted_link_through_which_something_comes_stays() {
    let mut bench = Bench::new(&[1]);
    bench.connected(Quic, 20);
    bench.said();
    bench.act(|relays, dice, _| relays.doubt(R, at(5_000), dice));
    bench.act(|relays, dice, out| relays.heard(R, at(5_050), dice, out));
    bench.run_to(60_000);
    assert_eq!(bench.said(), Vec::<String>::new());
    assert_eq!(bench.relays.transport(&R), Some(Quic));
}

#[test]
fn two_links_are_kept_and_a_third_relay_steps_in_for_one_that_fails() {
    let mut bench = Bench::new(&[1, 2, 3]);
    let order = bench.relays.order.clone();
    assert_eq!(bench.said().len(), 2, "two of three");
    let (first, third) = (order[0], order[2]);
    bench.act(|relays, dice, out| relays.on_connected(order[1], Quic, at(5), dice, out));
    bench.act(|relays, dice, out| relays.on_lost(first, Quic, "no", at(10), dice, out));
    bench.act(|relays, dice, out| relays.on_lost(first, Tls, "no", at(20), dice, out));
    assert!(bench.said().contains(&format!("connect {} Quic", third.0)));
    // It comes back; the third is let go of after a while.
    bench.act(|relays, dice, out| relays.on_connected(third, Quic, at(30), dice, out));
    bench.run_to(1_000);
    bench.act(|relays, dice, out| relays.on_connected(first, Quic, at(1_000), dice, out));
    bench.said();
    bench.run_to(70_000);
    assert!(
        bench
            .said()
            .contains(&format!("disconnect {} Quic", third.0))
    );
}

#[test]
fn a_relay_that_goes_away_is_replaced_before_it_does() {
    let mut bench = Bench::new(&[1, 2, 3]);
    let order = bench.relays.order.clone();
    for &relay in &order[..2] {
        bench.act(|relays, dice, out| relays.on_connected(relay, Quic, at(10), dice, out));
    }
    bench.said();
    bench.act(|relays, dice, out| relays.on_go_away(order[0], at(20), dice, out));
    assert_eq!(bench.said(), [format!("connect {} Quic", order[2].0)]);
    assert_eq!(
        bench.relays.up(),
        [order[1], order[0]],
        "the one that stays first"
    );
}

#[test]
fn the_home_is_the_nearest_relay_and_moves_only_for_much() {
    let mut bench = Bench::new(&[1, 2, 3]);
    let mut rtt = |relay, ms| {
        bench.act(|relays, dice, out| {
            relays.on_rtt(RelayId(relay), Duration::from_millis(ms));
            relays.keep(at(0), dice, out);
        });
        bench.relays.home()
    };
    // Nothing is known of the others yet: a relay that answers is better than one that may.
    assert_eq!(rtt(1, 60), Some(RelayId(1)));
    assert_eq!(rtt(2, 45), Some(RelayId(1)), "15 ms, but no third");
    assert_eq!(rtt(3, 39), Some(RelayId(3)), "21 ms and more than a third");
    assert_eq!(rtt(2, 31), Some(RelayId(3)), "8 ms");
    assert_eq!(rtt(3, 200), Some(RelayId(3)), "a queue, once");
    for _ in 0..3 {
        assert_eq!(rtt(3, 200), Some(RelayId(3)));
    }
    assert_eq!(rtt(3, 200), Some(RelayId(2)), "five times is no queue");
}

#[test]
fn the_second_relay_does_not_fail_with_the_first() {
    let mut bench = Bench::new(&[11, 12, 21, 31]);
    for (relay, ms) in [(11, 10), (12, 12), (21, 50), (31, 80)] {
        bench
            .relays
            .on_rtt(RelayId(relay), Duration::from_millis(ms));
    }
    bench.act(|relays, dice, out| relays.keep(at(0), dice, out));
    let preferred = [11, 21, 12, 31].map(RelayId);
    assert_eq!(bench.relays.preferred(), preferred);
    // Gone: its neighbour is the nearest, and the second stays where it is.
    bench.act(|relays, dice, out| relays.on_go_away(RelayId(11), at(10), dice, out));
    assert_eq!(bench.relays.preferred()[..2], [12, 21].map(RelayId));
    // With nothing else, one that may fail with it is better than none.
    let mut bench = Bench::new(&[11, 12]);
    bench.relays.on_rtt(RelayId(11), Duration::from_millis(5));
    bench.act(|relays, dice, out| relays.keep(at(0), dice, out));
    assert_eq!(bench.relays.preferred(), [11, 12].map(RelayId));
}

#[test]
fn links_go_to_the_near_relays_and_to_where_others_look() {
    let mut bench = Bench::new(&[1, 2, 3, 4, 5, 6]);
    let order = bench.relays.order.clone();
    bench.said();
    let (near, next) = (order[5], order[4]);
    for (relay, ms) in [(near, 5), (next, 9), (order[0], 100), (order[1], 120)] {
        bench.relays.on_rtt(relay, Duration::from_millis(ms));
    }
    bench.act(|relays, dice, out| relays.keep(at(0), dice, out));
    let linked: Vec<RelayId> = bench.relays.links.keys().copied().collect();
    let mut wanted = vec![order[0], order[1], near, next];
    wanted.sort_unstable();
    assert_eq!(linked, wanted);
    for relay in wanted {
        bench.act(|relays, dice, out| relays.on_connected(relay, Quic, at(10), dice, out));
    }
    assert_eq!(bench.relays.up(), [near, next, order[0], order[1]]);
}

#[test]
fn peers_are_told_of_distances_that_change_and_not_of_noise() {
    let mut bench = Bench::new(&[1]);
    let mut tells = |ms| bench.relays.on_rtt(R, Duration::from_millis(ms));
    assert!(tells(50));
    assert!(!tells(45) && !tells(60) && !tells(50));
    assert!(tells(20), "nearer");
    assert!(!tells(80) && !tells(80) && !tells(80) && !tells(80));
    assert!(tells(80), "farther, five times");
}

#[test]
fn an_answer_that_nobody_waits_for_is_closed_again() {
    let mut bench = Bench::new(&[1]);
    bench.connected(Quic, 20);
    bench.said();
    bench.connected(Tls, 30);
    assert_eq!(bench.said(), ["disconnect 1 Tls"]);
}

#[test]
fn nodes_spread_over_the_relays_and_agree_on_each_others_order() {
    let relays = || (1..=4).map(|id| (RelayId(id), false));
    let mut firsts = BTreeMap::new();
    for node in 0..=255 {
        let order = rank(&NodeId([node; 32]), relays());
        assert_eq!(order, rank(&NodeId([node; 32]), relays().rev()));
        *firsts.entry(order[0]).or_insert(0) += 1;
    }
    assert!(
        firsts.len() == 4 && firsts.values().all(|n| *n > 40),
        "{firsts:?}"
    );
}

/// Relays by themselves, each in a network of its own, and one of another place.
fn beside(alone: &[u64], id: u64, place: Place) -> Bench {
    let mut bench = Bench::new(&[]);
    let net = |id: u64| vec![domain([192, 0, u8::try_from(id).unwrap(), 1].into())];
    let alone = alone.iter();
    let mut known: BTreeMap<RelayId, About> = alone
        .map(|&id| (RelayId(id), about(net(id), Place::Apart)))
        .collect();
    known.insert(RelayId(id), about(net(id), place));
    bench.relays.set_known(&NodeId([0; 32]), known);
    bench.act(|relays, dice, out| relays.keep(at(0), dice, out));
    bench.said();
    bench
}

fn measured(bench: &mut Bench, rtts: &[(u64, u64)]) {
    for &(relay, ms) in rtts {
        bench
            .relays
            .on_rtt(RelayId(relay), Duration::from_millis(ms));
    }
    bench.act(|relays, dice, out| relays.keep(at(10), dice, out));
}

#[test]
fn a_peer_relay_of_the_site_is_the_home_when_it_is_near_and_sees_nothing_from_outside() {
    let mut bench = beside(&[1, 2, 3], 9, Place::Neighbour);
    let linked: Vec<RelayId> = bench.relays.links.keys().copied().collect();
    assert!(linked.contains(&RelayId(9)), "before anything is measured");
    assert_eq!(linked.len(), 3, "beside two anchors: {linked:?}");
    measured(&mut bench, &[(9, 1), (1, 30), (2, 40), (3, 50)]);
    assert_eq!(bench.relays.home(), Some(RelayId(9)));
    let seen_from: Vec<RelayId> = bench.relays.vantage_points().collect();
    assert_eq!(seen_from, [1, 2, 3].map(RelayId));
}

#[test]
fn a_relay_on_this_node_is_linked_and_never_the_only_home() {
    let mut bench = beside(&[1, 2, 3], 9, Place::Here);
    measured(&mut bench, &[(9, 0), (1, 30), (2, 40), (3, 50)]);
    assert!(bench.relays.links.contains_key(&RelayId(9)));
    assert_eq!(bench.relays.preferred(), [1, 2, 3, 9].map(RelayId));
    assert_eq!(bench.relays.vantage_points().count(), 3);
    let mut alone = beside(&[], 9, Place::Here);
    measured(&mut alone, &[(9, 0)]);
    assert_eq!(alone.relays.home(), Some(RelayId(9)), "better than none");
}

#[test]
fn a_relay_of_another_site_is_visited_and_no_more() {
    let mut bench = Bench::new(&[]);
    let mut foreign = about(Vec::new(), Place::Node);
    foreign.serves = false;
    let own = about(Vec::new(), Place::Apart);
    let known = BTreeMap::from([(RelayId(1), own), (RelayId(9), foreign)]);
    bench.relays.set_known(&NodeId([0; 32]), known);
    bench.act(|relays, dice, out| relays.keep(at(0), dice, out));
    measured(&mut bench, &[(9, 1), (1, 30)]);
    assert_eq!(bench.said(), ["connect 1 Quic"]);
    assert_eq!(bench.relays.home(), Some(RelayId(1)));
    bench.connected(Quic, 20);
    let visit = |bench: &mut Bench, ms| {
        bench.act(|relays, dice, out| relays.visit(RelayId(9), at(ms), dice, out));
    };
    visit(&mut bench, 100);
    // It does not answer: three attempts by both transports, then it is let go of.
    bench.run_to(60_000);
    let said = bench.said();
    let attempts = said.iter().filter(|said| *said == "connect 9 Quic").count();
    assert!((3..=4).contains(&attempts), "{said:?}");
    assert!(!bench.relays.links.contains_key(&RelayId(9)));
    visit(&mut bench, 60_000);
    bench.act(|relays, dice, out| relays.on_connected(RelayId(9), Quic, at(60_100), dice, out));
    assert_eq!(bench.relays.up(), [1, 9].map(RelayId));
    visit(&mut bench, 90_000);
    bench.run_to(149_999);
    assert_eq!(bench.relays.up(), [1, 9].map(RelayId));
    bench.run_to(150_000);
    assert_eq!(bench.relays.up(), [RelayId(1)]);
}

/// Links to two relays: the first is up, the second is refused for ten minutes, and tried every half minute.
fn with_one_of_two() -> Bench {
    let mut bench = Bench::new(&[1, 2]);
    bench.connected(Quic, 20);
    for ms in (30..600_000).step_by(10) {
        bench.run_to(ms);
        let tried = |said: &String| said.starts_with("connect 2");
        if bench.said().iter().any(tried) {
            for transport in [Quic, Tls, Quic, Tls] {
                bench.act(|relays, dice, out| {
                    relays.on_lost(RelayId(2), transport, "no", at(ms), dice, out);
                });
            }
        }
    }
    bench.said();
    bench
}

#[test]
fn who_loses_its_last_link_tries_those_at_once_that_failed_for_long() {
    let mut bench = with_one_of_two();
    bench.lost(Quic, 600_000);
    assert_eq!(bench.said(), ["connect 1 Quic", "connect 2 Quic"]);
    // Also if the mesh has that relay no more.
    let mut bench = with_one_of_two();
    let left = BTreeMap::from([(RelayId(2), about(Vec::new(), Place::Apart))]);
    bench.relays.set_known(&NodeId([0; 32]), left);
    bench.act(|relays, dice, out| relays.keep(at(600_000), dice, out));
    bench.run_to(600_000);
    let said = bench.said();
    assert!(said.contains(&"connect 2 Quic".to_owned()), "{said:?}");
}
