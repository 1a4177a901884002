//! Nodes that are relays for their site.

use mesh_core::{
    io::{PeerState, RelayTransport},
    node::path::PathKind,
};
use mesh_wire::{id::Via, peer::NatKind};

use crate::{
    nat::NatSort,
    scenarios::{longest_gap, no_ping_is_lost, state},
    world::{Change, World},
};

/// Makes the snapshot; these sites are one, `plant`, and `relay` serves it.
fn one_site(world: &mut World, sites: &[usize], relay: usize) {
    world.make_snapshot();
    let members = world.nodes.iter().filter(|node| sites.contains(&node.site));
    let members: Vec<_> = members.map(|node| node.name.clone()).collect();
    let id = world.relays[relay].id;
    world.publish(&[], |snapshot| {
        for name in &members {
            snapshot.nodes.get_mut(name).unwrap().locality.site = "plant".parse().ok();
        }
        let relay = snapshot.relays.get_mut(&id).unwrap();
        relay.sites = ["plant".parse().unwrap()].into();
    });
}

fn boot_all(world: &mut World) {
    (0..world.nodes.len()).for_each(|node| world.boot(node));
}

/// The kind of the path in use.
fn kind(world: &World, of: usize, peer: usize) -> Option<PathKind> {
    let report = world.report(of, peer)?;
    let via = report.via?;
    let path = report.paths.iter().find(|path| path.via == via);
    path.map(|path| path.kind)
}

fn by_peer_relay(world: &World, a: usize, b: usize) -> bool {
    [(a, b), (b, a)].map(|(a, b)| kind(world, a, b)) == [Some(PathKind::PeerRelay); 2]
}

#[test]
fn two_lans_of_a_site_that_is_cut_off_from_every_relay_mesh_by_their_gateway() {
    let mut world = World::new(1);
    let clouds = [world.add_relay("r1"), world.add_relay("r2")];
    let sites = [NatSort::Open, NatSort::Symmetric, NatSort::SymmetricRandom];
    let sites = sites.map(|sort| world.add_site(sort));
    let names = ["gateway", "a", "b"];
    let [gateway, a, b] = [0, 1, 2].map(|n| world.add_node(names[n], sites[n]));
    let relay = world.add_peer_relay(gateway, true, &[]);
    one_site(&mut world, &sites, relay);
    for site in sites {
        clouds
            .into_iter()
            .for_each(|cloud| world.change(Change::CutOff(site, cloud)));
    }
    boot_all(&mut world);
    world.run_for(1_000);
    let flows = [(a, b), (a, gateway)].map(|(from, to)| world.add_flow(from, to, 20, false));
    flows.into_iter().for_each(|flow| world.start_flow(flow));
    world.run_until(3_000, "talk", |w| by_peer_relay(w, a, b));
    world.run_for(30_000);
    assert!(by_peer_relay(&world, a, b));
    assert_eq!(state(&world, a, gateway), PeerState::Direct);
    flows
        .into_iter()
        .for_each(|flow| no_ping_is_lost(&mut world, flow));
}

#[test]
fn hosts_of_a_lan_that_drops_udp_mesh_by_a_neighbours_relay_over_tls() {
    let mut world = World::new(2);
    let cloud = world.add_relay("r1");
    let site = world.add_site(NatSort::UdpBlocked);
    world.sites[site].lan_blocked = true;
    let [gateway, a, b] = ["gateway", "a", "b"].map(|name| world.add_node(name, site));
    let relay = world.add_peer_relay(gateway, false, &[site]);
    world.change(Change::CutOff(site, cloud));
    world.boot_all();
    world.run_for(2_000);
    // To the gateway itself, too: that is TLS from node to node.
    let flows = [(a, b), (a, gateway)].map(|(from, to)| world.add_flow(from, to, 20, false));
    flows.into_iter().for_each(|flow| world.start_flow(flow));
    world.run_until(3_000, "talk", |w| {
        by_peer_relay(w, a, b) && by_peer_relay(w, a, gateway)
    });
    world.run_for(20_000);
    let id = world.relays[relay].id;
    for (node, by) in [
        (a, RelayTransport::Tls),
        (b, RelayTransport::Tls),
        (gateway, RelayTransport::Quic),
    ] {
        let link = world.core(node).relays().find(|relay| relay.id == id);
        assert_eq!(link.unwrap().up, Some(by), "{node}");
    }
    flows
        .into_iter()
        .for_each(|flow| no_ping_is_lost(&mut world, flow));
}

/// A site with a hard NAT whose gateway is its relay, seen from outside; and an outsider.
struct Plant {
    world: World,
    gateway: usize,
    inside: usize,
    outsider: usize,
    relay: usize,
    flow: usize,
}

fn plant() -> Plant {
    let mut world = World::new(3);
    world.add_relay("r1");
    world.add_relay("r2");
    let site = world.add_site(NatSort::Symmetric);
    let [gateway, inside] = ["gateway", "inside"].map(|name| world.add_node(name, site));
    let outsider = world.add_edge("outsider", NatSort::PortRestricted);
    let relay = world.add_peer_relay(gateway, true, &[site]);
    let flow = world.add_flow(outsider, inside, 20, false);
    world.boot_all();
    world.run_for(1_000);
    world.start_flow(flow);
    Plant {
        world,
        gateway,
        inside,
        outsider,
        relay,
        flow,
    }
}

#[test]
fn an_outsider_reaches_a_node_behind_a_hard_nat_by_its_sites_relay_and_by_others_when_that_dies() {
    let Plant {
        mut world,
        gateway,
        inside,
        outsider,
        flow,
        ..
    } = plant();
    world.run_until(2_000, "by the peer relay", |w| {
        by_peer_relay(w, inside, outsider)
    });
    world.run_for(5_000);
    for _ in 0..2 {
        let died = world.now_ms();
        world.kill(gateway);
        world.run_until(2_000, "by another relay", |w| {
            kind(w, outsider, inside) == Some(PathKind::Relay)
        });
        world.run_for(10_000);
        let gap = longest_gap(&world, flow, died.saturating_sub(100));
        assert!(gap < 1_000, "{gap} ms without an answer");
        // Long enough for the outsider to have given up that relay.
        world.run_for(100_000);
        assert_eq!(kind(&world, outsider, inside), Some(PathKind::Relay));
        world.boot(gateway);
        let back = world.now_ms();
        let took = world.run_until(70_000, "taken back", |w| by_peer_relay(w, inside, outsider));
        println!("taken back {took} ms after the relay was");
        world.run_for(3_000); // Copies by the other way end.
        for node in [inside, outsider] {
            world.nodes[node].moves.clear();
        }
        world.run_for(300_000);
        for node in [inside, outsider] {
            assert_eq!(world.nodes[node].moves, [], "calm");
        }
        let gap = longest_gap(&world, flow, back);
        assert!(gap < 100, "{gap} ms without an answer on the way back");
    }
    assert_eq!(world.flows[flow].twice, 0);
}

#[test]
fn a_sites_relay_is_nothing_to_those_who_talk_with_others() {
    let Plant {
        mut world,
        outsider,
        relay,
        flow,
        ..
    } = plant();
    world.stop_flow(flow);
    world.run_for(400_000);
    let other = world.add_edge("other", NatSort::Symmetric);
    world.make_snapshot();
    let all: Vec<usize> = (0..world.nodes.len() - 1).collect();
    world.publish(&all, |_| {});
    world.boot(other);
    let flow = world.add_flow(outsider, other, 20, false);
    world.start_flow(flow);
    let id = world.relays[relay].id;
    for _ in 0..120 {
        world.run_for(1_000);
        for node in [outsider, other] {
            let links: Vec<_> = world.core(node).relays().collect();
            assert!(links.iter().all(|link| link.id != id || link.up.is_none()));
            assert!(!world.is_client(relay, node), "not even tried");
        }
    }
    assert_eq!(kind(&world, outsider, other), Some(PathKind::Relay));
    no_ping_is_lost(&mut world, flow);
}

#[test]
fn a_relay_on_the_lan_does_not_make_the_nat_look_like_another() {
    for (sort, nat) in [
        (NatSort::PortRestricted, NatKind::Easy),
        (NatSort::Symmetric, NatKind::Hard),
    ] {
        let mut world = World::new(4);
        world.add_relay("r1");
        world.add_relay("r2");
        let site = world.add_site(sort);
        let [gateway, a] = ["gateway", "a"].map(|name| world.add_node(name, site));
        let relay = world.add_peer_relay(gateway, true, &[site]);
        world.boot_all();
        world.run_for(4_000);
        let id = world.relays[relay].id;
        for node in [gateway, a] {
            let core = world.core(node);
            assert_eq!(core.nat(), nat, "{sort:?}");
            let host = world.nodes[node].host;
            assert!(!core.reflexive().contains(&host));
            let relays: Vec<_> = core.relays().collect();
            let own = relays.iter().find(|relay| relay.id == id).unwrap();
            assert!(own.up.is_some() && own.rtt.is_some(), "{own:?}");
            assert_eq!(own.home, node == a, "the gateway has its home elsewhere");
        }
    }
}

#[test]
fn a_direct_path_is_preferred_to_a_peer_relay_and_comes_back_to_it() {
    let mut world = World::new(5);
    world.add_relay("r1");
    let site = world.add_site(NatSort::PortRestricted);
    let [gateway, a] = ["gateway", "a"].map(|name| world.add_node(name, site));
    let b = world.add_edge("b", NatSort::PortRestricted);
    world.add_peer_relay(gateway, true, &[site]);
    let flow = world.add_flow(b, a, 20, false);
    world.boot_all();
    world.run_for(1_000);
    world.start_flow(flow);
    let direct =
        |w: &World| state(w, a, b) == PeerState::Direct && state(w, b, a) == PeerState::Direct;
    world.run_until(3_000, "direct", direct);
    world.run_for(20_000);
    let cut = world.now_ms();
    world.severed.insert((site, world.nodes[b].site));
    world.run_until(2_000, "by the peer relay", |w| by_peer_relay(w, a, b));
    world.run_for(2_000);
    let gap = longest_gap(&world, flow, cut.saturating_sub(100));
    assert!(gap < 1_000, "{gap} ms without an answer");
    assert!(matches!(
        world.report(b, a).unwrap().via,
        Some(Via::Relay(_))
    ));
    world.severed.clear();
    world.run_until(16_000, "direct again", direct);
}
