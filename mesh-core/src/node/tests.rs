//! Helpers of the tests, and tests of one core by itself. Many cores together are tested in
//! `tests/sim`.

use mesh_wire::id::MeshId;
use proptest::prelude::*;

use super::*;
use crate::{
    io::{Event, PeerState, Reason, RelayTransport},
    node::{
        path::{PathKind, PathState},
        report::PathWish,
    },
    snapshot::{MeshSettings, Relay},
    testing::start,
};

/// Milliseconds after the start.
pub(crate) fn at(ms: u64) -> Instant {
    start() + Duration::from_millis(ms)
}

/// A relay at `192.0.2.<host>`, which answers on ports 443 and 3478.
pub(crate) fn relay(name: &str, host: u8) -> (RelayId, Relay) {
    let name = name.parse().unwrap();
    let relay = Relay {
        addresses: vec![[192, 0, 2, host].into()],
        quic_port: 443,
        tls_port: 443,
        stun_ports: vec![443, 3478],
        node: None,
        sites: std::collections::BTreeSet::new(),
        name,
    };
    (RelayId::from(&relay.name), relay)
}

fn id(number: u32) -> NodeId {
    let mut key = [0; 32];
    key[..4].copy_from_slice(&number.to_be_bytes());
    NodeId(key)
}

pub(crate) fn node(number: u32) -> Node {
    let name = format!("n{number}").parse().unwrap();
    Node::new(&MeshId([0; 32]), name, id(number), [100, 96, 0, 1].into())
}

/// A mesh of nodes 0 to `nodes` - 1 and one relay, seen by node 0.
fn mesh(nodes: u32) -> Snapshot {
    let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(MeshId([0; 32]), "m"));
    let named = (0..nodes).map(node).map(|node| (node.name.clone(), node));
    snapshot.nodes = named.collect();
    snapshot.relays.extend([relay("r1", 1)]);
    snapshot
}

fn core(snapshot: Snapshot) -> Core {
    let config = CoreConfig {
        node: "n0".parse().unwrap(),
        id: id(0),
        remembered: BTreeMap::new(),
        bursts: true,
    };
    let mut core = Core::new(config, 1, at(0));
    let local = vec!["10.0.0.1:51820".parse().unwrap()];
    core.handle_input(Input::LocalAddresses(local), at(0));
    core.handle_input(Input::Snapshot(Arc::new(snapshot)), at(0));
    drain(&mut core);
    core
}

fn drain(core: &mut Core) -> Vec<Output> {
    std::iter::from_fn(|| core.poll_output()).collect()
}

fn r1() -> RelayId {
    relay("r1", 1).0
}

/// A core whose peer 1 is up through the relay at 100 ms.
fn relayed() -> Core {
    let mut core = core(mesh(3));
    let (relay, transport, peer) = (r1(), RelayTransport::Quic, id(1));
    core.handle_input(Input::RelayConnected { relay, transport }, at(10));
    core.handle_input(Input::Wanted { peer }, at(50));
    let via = Via::Relay(relay);
    core.handle_input(Input::Handshake { peer, via }, at(100));
    assert_eq!(core.peer_report(&peer).unwrap().state, PeerState::Relayed);
    drain(&mut core);
    core
}

#[test]
fn nodes_that_nobody_talks_to_cost_nothing() {
    let mut core = core(mesh(20_000));
    assert_eq!(core.peers().count(), 0);
    core.handle_input(Input::Wanted { peer: id(19_999) }, at(10));
    assert_eq!(core.peers().count(), 1);
    assert!(
        core.is_alive(&"n5".parse().unwrap()),
        "no bad news is good news"
    );
}

#[test]
fn who_is_not_in_the_snapshot_is_nobody() {
    let mut core = core(mesh(3));
    for peer in [id(77), id(0)] {
        core.handle_input(Input::Wanted { peer }, at(10));
        let via = Via::Relay(r1());
        core.handle_input(Input::Handshake { peer, via }, at(10));
    }
    assert_eq!(core.peers().count(), 0);
}

#[test]
fn of_several_paths_the_best_that_is_meant_is_named() {
    use PathState::{Candidate, Dead, Primary, Standby};
    let mut report = relayed().peer_report(&id(1)).unwrap();
    let direct = |last: u8| Via::Direct(SocketAddr::from(([203, 0, 113, last], 1)));
    let relay = |number| Via::Relay(RelayId(number));
    let one = |via, kind, state, rtt_ms| {
        let mut path = report.paths[0].clone();
        (path.via, path.kind, path.state) = (via, kind, state);
        path.srtt = Some(rtt_ms).filter(|ms| *ms > 0).map(Duration::from_millis);
        path
    };
    report.via = Some(direct(2));
    report.paths = vec![
        one(direct(1), PathKind::Lan, Dead, 1),
        one(direct(2), PathKind::Direct, Primary, 40),
        one(direct(3), PathKind::Direct, Candidate, 0),
        one(relay(1), PathKind::Relay, Standby, 90),
        one(relay(2), PathKind::Relay, Standby, 60),
        one(relay(3), PathKind::PeerRelay, Dead, 5),
    ];
    for (wish, want) in [
        (PathWish::InUse, Some(direct(2))),
        (PathWish::Direct, Some(direct(2))),
        (PathWish::Relayed, Some(relay(2))),
        (PathWish::Only(relay(1)), Some(relay(1))),
        (PathWish::Only(direct(1)), Some(direct(1))),
        (PathWish::Only(direct(9)), None),
    ] {
        let found = report.path_for(wish).map(|path| path.via);
        assert_eq!(found, want, "{wish:?}");
    }
    report.paths.retain(|path| path.kind.is_relayed());
    assert_eq!(report.path_for(PathWish::Direct), None);
    assert_eq!(report.path_for(PathWish::InUse), None);
}

#[test]
fn a_peer_that_leaves_the_mesh_loses_its_path() {
    let mut core = relayed();
    core.handle_input(Input::Snapshot(Arc::new(mesh(1))), at(200));
    let (peer, primary, duplicate) = (id(1), None, None);
    assert!(drain(&mut core).contains(&Output::SetPath {
        peer,
        primary,
        duplicate,
        duplicates_max: None,
    }));
    assert_eq!(core.peers().count(), 0);
}

#[test]
fn goodbye_moves_traffic_away_at_once_and_a_handshake_brings_it_back() {
    let mut core = relayed();
    let (peer, via, message) = (id(1), Via::Relay(r1()), PeerMessage::Goodbye);
    core.handle_input(Input::Message { peer, via, message }, at(200));
    let alive = |alive| Output::Event(Event::Liveness { peer, alive });
    assert!(drain(&mut core).contains(&alive(false)));
    let report = core.peer_report(&peer).unwrap();
    assert_eq!(
        (report.state, report.reason),
        (PeerState::Unreachable, Reason::Goodbye)
    );
    let received = vec![via];
    core.handle_input(
        Input::Traffic {
            peer,
            sent: false,
            received,
        },
        at(300),
    );
    assert_eq!(
        core.peer_report(&peer).unwrap().state,
        PeerState::Unreachable,
        "a straggler"
    );
    core.handle_input(Input::Handshake { peer, via }, at(400));
    assert!(drain(&mut core).contains(&alive(true)));
}

#[test]
fn new_flows_avoid_a_silent_peer_before_it_is_dead_and_come_back_with_the_first_answer() {
    let mut core = relayed();
    let (peer, via) = (id(1), Via::Relay(r1()));
    let traffic = |sent, received| Input::Traffic {
        peer,
        sent,
        received,
    };
    let alive = |alive| Output::Event(Event::Liveness { peer, alive });
    core.handle_input(traffic(true, vec![]), at(5_000));
    let mut said_at = None;
    for ms in (5_000..6_000).step_by(10) {
        core.handle_input(Input::Timeout, at(ms));
        if drain(&mut core).contains(&alive(false)) {
            said_at.get_or_insert(ms);
        }
    }
    assert!(said_at.is_some_and(|ms| ms < 5_800), "{said_at:?}");
    let state = |core: &Core| core.peer_report(&peer).unwrap().state;
    assert_eq!(state(&core), PeerState::Suspect);
    core.handle_input(traffic(false, vec![via]), at(6_000));
    assert!(drain(&mut core).contains(&alive(true)));
    assert_eq!(state(&core), PeerState::Relayed);
}

#[test]
fn a_node_that_stops_says_goodbye_to_those_it_talks_to() {
    let mut core = relayed();
    core.shut_down();
    let (peer, via, message) = (id(1), Via::Relay(r1()), PeerMessage::Goodbye);
    assert_eq!(drain(&mut core), [Output::Send { peer, via, message }]);
}

#[test]
fn every_echo_request_is_answered_by_the_way_it_came() {
    let mut core = relayed();
    let via = Via::Direct("198.51.100.7:4000".parse().unwrap());
    let (peer, txid, size_bytes) = (id(1), 5, 1_400);
    let message = PeerMessage::EchoRequest { txid, size_bytes };
    core.handle_input(Input::Message { peer, via, message }, at(200));
    let observed = Some("198.51.100.7:4000".parse().unwrap());
    let message = PeerMessage::EchoReply {
        txid,
        size_bytes,
        observed,
    };
    assert!(drain(&mut core).contains(&Output::Send { peer, via, message }));
}

#[test]
fn strange_source_addresses_are_learned_up_to_a_limit() {
    let mut core = relayed();
    for port in 1..200 {
        let via = Via::Direct(SocketAddr::new([198, 51, 100, 7].into(), port));
        let (peer, message) = (
            id(1),
            PeerMessage::EchoRequest {
                txid: 1,
                size_bytes: 0,
            },
        );
        core.handle_input(Input::Message { peer, via, message }, at(200));
    }
    let report = core.peer_report(&id(1)).unwrap();
    assert_eq!(report.paths.len(), 4 + 1, "four learned ones and the relay");
}

/// What the core probes of the addresses that peer 1 tells.
fn probed(core: &mut Core, told: impl IntoIterator<Item = SocketAddr>) -> Vec<SocketAddr> {
    let candidates = told.into_iter().map(|address| Candidate {
        kind: CandidateKind::Host,
        address,
    });
    let message = PeerMessage::Candidates {
        generation: 1,
        candidates: candidates.collect(),
        nat: NatKind::Easy,
        relays: Vec::new(),
        metered: false,
        bursts: true,
    };
    let (peer, via) = (id(1), Via::Relay(r1()));
    core.handle_input(Input::Message { peer, via, message }, at(200));
    let probed = drain(core).into_iter().filter_map(|output| {
        if let Output::Send {
            via: Via::Direct(to),
            ..
        } = output
        {
            Some(to)
        } else {
            None
        }
    });
    probed.collect()
}

#[test]
fn told_candidates_are_probed_up_to_a_limit_and_never_at_ourselves() {
    let mut core = relayed();
    let told = (1..20).map(|host| SocketAddr::new([10, 0, 0, host].into(), 51_820));
    let probed = probed(&mut core, told);
    assert_eq!(probed.len(), 6, "{probed:?}");
    assert!(
        !probed.contains(&"10.0.0.1:51820".parse().unwrap()),
        "that is this node"
    );
}

#[test]
fn addresses_that_a_peer_has_no_more_make_room_for_those_that_it_has() {
    let mut core = relayed();
    let told = |net: u8| (1..=6).map(move |host| SocketAddr::new([198, 51, net, host].into(), 1));
    assert_eq!(probed(&mut core, told(1)).len(), 6);
    assert_eq!(probed(&mut core, told(2)), told(2).collect::<Vec<_>>());
}

/// What node 0 probes of the addresses that peer 1 tells, in `snapshot`.
fn probed_of(snapshot: Snapshot, told: [&str; 4]) -> Vec<String> {
    let mut core = relayed();
    core.handle_input(Input::Snapshot(Arc::new(snapshot)), at(150));
    drain(&mut core);
    let told = told.map(|address| address.parse().unwrap());
    let probed = probed(&mut core, told);
    probed.iter().map(SocketAddr::to_string).collect()
}

#[test]
fn what_the_tunnel_leads_to_is_no_way_for_the_tunnel() {
    let told = [
        "100.96.0.9:51820",
        "192.168.7.1:51820",
        "192.168.8.1:51820",
        "203.0.113.1:51820",
    ];
    let mut snapshot = mesh(3);
    let at_site = |snapshot: &mut Snapshot, name: &str| {
        let node = snapshot.nodes.get_mut(&name.parse::<NodeName>().unwrap());
        node.unwrap().locality.site = Some("yard".parse().unwrap());
    };
    let other: NodeName = "n2".parse().unwrap();
    let prefixes = ["192.168.6.0/23", "192.168.7.128/25"].map(|net| net.parse().unwrap());
    snapshot.nodes.get_mut(&other).unwrap().prefixes = prefixes.into();
    assert_eq!(
        probed_of(snapshot.clone(), told),
        ["192.168.8.1:51820", "203.0.113.1:51820"]
    );
    // Of one site, they may be on that LAN themselves.
    at_site(&mut snapshot, "n0");
    at_site(&mut snapshot, "n1");
    assert_eq!(probed_of(snapshot, told), told[1..]);
}

#[test]
fn a_path_that_comes_to_lead_into_the_tunnel_is_left() {
    let mut core = relayed();
    let peer = id(1);
    let via = Via::Direct("192.168.7.1:51820".parse().unwrap());
    core.handle_input(Input::Handshake { peer, via }, at(200));
    let up = |core: &Core| core.peer_report(&peer).unwrap().via;
    for ms in (200..1_000).step_by(20) {
        core.handle_input(Input::Timeout, at(ms));
        for output in drain(&mut core) {
            if let Output::Send { via, message, .. } = output
                && let PeerMessage::EchoRequest { txid, size_bytes } = message
            {
                let message = PeerMessage::EchoReply {
                    txid,
                    size_bytes,
                    observed: None,
                };
                core.handle_input(Input::Message { peer, via, message }, at(ms + 10));
            }
        }
    }
    assert_eq!(up(&core), Some(via));
    let mut snapshot = mesh(3);
    let behind: NodeName = "n1".parse().unwrap();
    let lan = "192.168.7.0/24".parse().unwrap();
    snapshot.nodes.get_mut(&behind).unwrap().prefixes = vec![lan];
    core.handle_input(Input::Snapshot(Arc::new(snapshot)), at(1_100));
    assert_eq!(up(&core), Some(Via::Relay(r1())));
}

#[test]
fn a_plain_wireguard_device_is_up_when_it_shook_hands_and_may_roam() {
    let mut snapshot = mesh(2);
    let name: NodeName = "phone".parse().unwrap();
    let phone = ExternalPeer {
        id: id(9),
        name: name.clone(),
        prefixes: Vec::new(),
        gateway: "n0".parse().unwrap(),
        endpoint: None,
        keepalive: None,
    };
    snapshot.external_peers.insert(name, phone);
    let mut core = core(snapshot);
    let peer = id(9);
    for (ms, address) in [(100, "198.51.100.7:1"), (200, "203.0.113.8:2")] {
        let via = Via::Direct(address.parse().unwrap());
        let received = vec![via];
        match ms {
            100 => core.handle_input(Input::Handshake { peer, via }, at(ms)),
            _ => core.handle_input(
                Input::Traffic {
                    peer,
                    sent: true,
                    received,
                },
                at(ms),
            ),
        }
        let (primary, duplicate) = (Some(via), None);
        let outputs = drain(&mut core);
        assert!(
            outputs.contains(&Output::SetPath {
                peer,
                primary,
                duplicate,
                duplicates_max: None,
            }),
            "{outputs:?}"
        );
        assert!(
            !outputs
                .iter()
                .any(|output| matches!(output, Output::Send { .. }))
        );
    }
}

#[test]
fn an_overtaken_list_of_candidates_is_ignored() {
    let mut core = relayed();
    let tell = |core: &mut Core, generation, nat| {
        let candidates = Vec::new();
        let message = PeerMessage::Candidates {
            generation,
            candidates,
            nat,
            relays: Vec::new(),
            metered: false,
            bursts: true,
        };
        let (peer, via) = (id(1), Via::Relay(r1()));
        core.handle_input(Input::Message { peer, via, message }, at(200));
        core.peer_report(&id(1)).unwrap().nat
    };
    assert_eq!(tell(&mut core, 5, NatKind::Hard), NatKind::Hard);
    assert_eq!(tell(&mut core, 4, NatKind::Easy), NatKind::Hard);
    assert_eq!(tell(&mut core, 6, NatKind::Easy), NatKind::Easy);
}

#[test]
fn a_peer_that_no_relay_knows_is_offline_after_twenty_seconds() {
    let mut core = core(mesh(3));
    let (relay, transport, peer) = (r1(), RelayTransport::Quic, id(1));
    core.handle_input(Input::RelayConnected { relay, transport }, at(10));
    core.handle_input(Input::Wanted { peer }, at(50));
    core.handle_input(
        Input::RelayPeer {
            relay,
            peer,
            present: false,
        },
        at(60),
    );
    let name = "n1".parse().unwrap();
    for (until, state, alive) in [
        (3_000, PeerState::Waking, true),
        (3_100, PeerState::Waking, false),
        (20_000, PeerState::Waking, false),
        (20_100, PeerState::Unreachable, false),
    ] {
        while let Some(now) = core.poll_timeout().filter(|now| *now <= at(until)) {
            core.handle_input(Input::Timeout, now);
        }
        let got = core.peer_report(&peer).unwrap().state;
        assert_eq!((got, core.is_alive(&name)), (state, alive), "at {until} ms");
    }
    assert_eq!(core.peer_report(&peer).unwrap().reason, Reason::PeerOffline);
}

#[test]
fn what_was_under_way_by_a_relay_whose_link_ended_makes_no_path() {
    let mut core = relayed();
    let (relay, transport, peer) = (r1(), RelayTransport::Quic, id(1));
    let reason = String::new();
    let lost = Input::RelayLost {
        relay,
        transport,
        reason,
    };
    core.handle_input(lost, at(200));
    let via = Via::Relay(relay);
    for late in [
        Input::Handshake { peer, via },
        Input::Message {
            peer,
            via,
            message: PeerMessage::Goodbye,
        },
        Input::Traffic {
            peer,
            sent: false,
            received: vec![via],
        },
    ] {
        core.handle_input(late, at(260));
        let report = core.peer_report(&peer).unwrap();
        assert_eq!((report.state, report.via), (PeerState::Waking, None));
    }
    core.handle_input(Input::RelayConnected { relay, transport }, at(300));
    core.handle_input(Input::Handshake { peer, via }, at(400));
    assert_eq!(core.peer_report(&peer).unwrap().via, Some(via));
}

/// What node 0 says of peer 1, which it calls for 20 s while the relay says that it is there.
fn unanswered(before: impl FnOnce(&mut Core)) -> Reason {
    let mut core = core(mesh(3));
    let (relay, transport, peer) = (r1(), RelayTransport::Quic, id(1));
    core.handle_input(Input::RelayConnected { relay, transport }, at(10));
    before(&mut core);
    let present = true;
    core.handle_input(Input::Wanted { peer }, at(5_000));
    core.handle_input(
        Input::RelayPeer {
            relay,
            peer,
            present,
        },
        at(5_020),
    );
    while let Some(now) = core.poll_timeout().filter(|now| *now <= at(25_100)) {
        core.handle_input(Input::Timeout, now);
    }
    let report = core.peer_report(&peer).unwrap();
    assert_eq!(report.state, PeerState::Unreachable);
    report.reason
}

#[test]
fn a_handshake_that_arrives_and_is_not_answered_has_a_reason() {
    let clock = |wall_s, at_least_s| Input::Clock {
        wall: Duration::from_secs(wall_s),
        at_least: Duration::from_secs(at_least_s),
    };
    assert_eq!(unanswered(|_| ()), Reason::MapStale);
    let behind = |core: &mut Core| core.handle_input(clock(1_000, 1_061), at(20));
    assert_eq!(unanswered(behind), Reason::ClockSkew);
    let slightly = |core: &mut Core| core.handle_input(clock(1_000, 1_060), at(20));
    assert_eq!(unanswered(slightly), Reason::MapStale);
    let set = |core: &mut Core| {
        core.handle_input(clock(1_000, 1_061), at(20));
        core.handle_input(clock(1_061, 1_061), at(30));
    };
    assert_eq!(unanswered(set), Reason::MapStale);
    let acquainted = |core: &mut Core| {
        let (peer, via, message) = (id(1), Via::Relay(r1()), PeerMessage::Goodbye);
        core.handle_input(Input::Handshake { peer, via }, at(20));
        core.handle_input(Input::Message { peer, via, message }, at(30));
        while let Some(now) = core.poll_timeout().filter(|now| *now <= at(4_000)) {
            core.handle_input(Input::Timeout, now);
        }
        core.handle_input(Input::Snapshot(Arc::new(mesh(1))), at(4_100));
        core.handle_input(Input::Snapshot(Arc::new(mesh(3))), at(4_200));
    };
    assert_eq!(
        unanswered(acquainted),
        Reason::MapStale,
        "it was another life"
    );
}

/// Where node 0 sends initiations to peer 1 when it is told, at each of these times, that it refused one.
fn called_back(reports: &[(u64, u64)], up: bool) -> usize {
    let mut core = if up { relayed() } else { core(mesh(3)) };
    let (peer, via) = (id(1), Via::Direct("198.51.100.7:4000".parse().unwrap()));
    let mut calls = 0;
    for &(ms, behind_s) in reports {
        let behind = Duration::from_secs(behind_s);
        let why = Refusal::OldTimestamp { behind };
        core.handle_input(Input::Refused { peer, via, why }, at(ms));
        let vias = vec![via];
        let call = Output::Handshake { peer, vias };
        calls += drain(&mut core)
            .iter()
            .filter(|output| **output == call)
            .count();
    }
    calls
}

#[test]
fn a_peer_whose_clock_went_back_is_called_back_twice_a_second_at_most_by_its_own_way() {
    let flood: Vec<(u64, u64)> = (0..100).map(|n| (1_000 + n * 100, 3_600)).collect();
    assert_eq!(called_back(&flood, false), 20);
    assert_eq!(called_back(&[(1_000, 59)], false), 0, "overtaken");
    assert_eq!(
        called_back(&[(1_000, 3_600)], true),
        0,
        "it can call itself"
    );
}

#[test]
fn a_stranger_is_called_when_the_snapshot_names_it_if_it_called_lately() {
    for (later_ms, called) in [(50_000, true), (70_000, false)] {
        let mut core = core(mesh(1));
        let via = Via::Relay(r1());
        let why = Refusal::UnknownKey;
        let mut said = 0;
        for number in 0..100 {
            let peer = id(1 + number % 30);
            core.handle_input(Input::Refused { peer, via, why }, at(1_000));
            said += drain(&mut core).len();
        }
        assert_eq!(said, 1, "one event a minute");
        core.handle_input(Input::Snapshot(Arc::new(mesh(31))), at(1_000 + later_ms));
        let calls = drain(&mut core);
        let calls = calls
            .iter()
            .filter(|output| matches!(output, Output::Handshake { .. }));
        assert_eq!(calls.count(), if called { 16 } else { 0 }, "the last 16");
    }
}

/// What the core said of the ways of the packets, and how many copies it allowed.
type Said = Vec<(Option<Via>, Option<Via>, Option<u32>)>;

/// Goes on to `ms`, with or without traffic, answers the echoes by those ways 10 ms later, and adds what was said.
fn go_on(core: &mut Core, (ms, sent): (u64, bool), answers: impl Fn(Via) -> bool, said: &mut Said) {
    let peer = id(1);
    let traffic = Input::Traffic {
        peer,
        sent,
        received: Vec::new(),
    };
    core.handle_input(traffic, at(ms));
    core.handle_input(Input::Timeout, at(ms));
    for output in drain(core) {
        if let Output::SetPath {
            primary,
            duplicate,
            duplicates_max,
            ..
        } = output
        {
            said.push((primary, duplicate, duplicates_max));
        } else if let Output::Send { via, message, .. } = output
            && let PeerMessage::EchoRequest { txid, size_bytes } = message
            && answers(via)
        {
            let message = PeerMessage::EchoReply {
                txid,
                size_bytes,
                observed: None,
            };
            core.handle_input(Input::Message { peer, via, message }, at(ms + 10));
        }
    }
}

#[test]
fn copies_are_counted_after_a_move_and_not_while_the_path_is_in_doubt() {
    let mut core = relayed();
    let peer = id(1);
    let via = Via::Direct("198.51.100.7:4000".parse().unwrap());
    core.handle_input(Input::Handshake { peer, via }, at(200));
    let mut said = Vec::new();
    for ms in (200..8_000).step_by(20) {
        let answers = |by| ms < 4_000 || by != via;
        go_on(&mut core, (ms, ms > 4_000), answers, &mut said);
    }
    let relay = Some(Via::Relay(r1()));
    let moved = [(Some(via), relay, Some(32)), (Some(via), None, None)];
    assert_eq!(said[..2], moved);
    assert!(said.contains(&(Some(via), relay, None)), "{said:?}");
    assert_eq!(said.last(), Some(&(relay, None, None)));
    assert!(said[2..].iter().all(|(.., max)| max.is_none()), "{said:?}");
}

#[test]
fn after_a_silence_some_packets_go_twice_until_the_path_is_heard_or_doubted_but_not_where_that_costs()
 {
    let peer = id(1);
    let via = Via::Direct("198.51.100.7:4000".parse().unwrap());
    let relay = Some(Via::Relay(r1()));
    for (metered, dies) in [(false, false), (false, true), (true, false)] {
        let mut core = relayed();
        core.handle_input(Input::Handshake { peer, via }, at(200));
        let message = PeerMessage::Candidates {
            generation: 1,
            candidates: Vec::new(),
            nat: NatKind::Easy,
            relays: Vec::new(),
            metered,
            bursts: false,
        };
        core.handle_input(Input::Message { peer, via, message }, at(200));
        let mut said = Vec::new();
        for ms in (200..48_000).step_by(20) {
            go_on(&mut core, (ms, ms < 1_000), |_| true, &mut said);
        }
        let some = said.iter().filter(|(.., max)| *max == Some(256));
        assert_eq!(some.count(), 0, "it is warm, or costs: {said:?}");
        if metered {
            continue; // It rests now.
        }
        said.clear();
        for ms in (48_000..65_000).step_by(20) {
            go_on(&mut core, (ms, false), |_| true, &mut said);
        }
        assert_eq!(said, [(Some(via), relay, Some(256))]);
        said.clear();
        for ms in (65_000..68_000).step_by(20) {
            let answers = |by| !dies || by != via;
            go_on(&mut core, (ms, true), answers, &mut said);
        }
        let doubted = [(Some(via), relay, None), (relay, None, None)];
        let heard = [(Some(via), None, None)];
        let want: &[_] = if dies { &doubted } else { &heard };
        assert_eq!(said, want);
    }
}

#[test]
fn a_sites_relay_is_dialled_at_its_lan_from_within_and_never_through_the_tunnel() {
    let mut snapshot = mesh(3);
    let (id, mut gateway) = relay("gateway", 9);
    gateway.node = "n2".parse().ok();
    let [lan, overlay, public] = ["192.168.7.1", "100.96.0.9", "203.0.113.1"];
    gateway.addresses = [public, overlay, lan].map(|ip| ip.parse().unwrap()).into();
    snapshot.relays.insert(id, gateway);
    let dialled = |snapshot: &Snapshot| -> Vec<String> {
        let core = core(snapshot.clone());
        core.relay_addresses(&id)
            .iter()
            .map(IpAddr::to_string)
            .collect()
    };
    assert_eq!(
        dialled(&snapshot),
        [public, lan],
        "an outsider tries the LAN last"
    );
    let node = |snapshot: &mut Snapshot, name: &str, act: &dyn Fn(&mut Node)| {
        act(snapshot
            .nodes
            .get_mut(&name.parse::<NodeName>().unwrap())
            .unwrap());
    };
    node(&mut snapshot, "n2", &|node| {
        node.prefixes = vec!["192.168.7.0/24".parse().unwrap()]
    });
    assert_eq!(
        dialled(&snapshot),
        [public],
        "the route there is the tunnel"
    );
    for name in ["n0", "n2"] {
        node(&mut snapshot, name, &|node| {
            node.locality.site = "yard".parse().ok()
        });
    }
    assert_eq!(dialled(&snapshot), [lan, public]);
}

fn any_via() -> impl Strategy<Value = Via> {
    prop_oneof![
        Just(Via::Relay(r1())),
        Just(Via::Relay(RelayId(99))),
        (1..6u16).prop_map(|port| Via::Direct(SocketAddr::new([198, 51, 100, 7].into(), port))),
    ]
}

fn any_message() -> impl Strategy<Value = PeerMessage> {
    let txid = any::<u64>();
    prop_oneof![
        (txid, any::<u16>())
            .prop_map(|(txid, size_bytes)| PeerMessage::EchoRequest { txid, size_bytes }),
        // Stands for "the answer to the last question": see below.
        Just(PeerMessage::EchoReply {
            txid: 0,
            size_bytes: 1_280,
            observed: None
        }),
        (0..4u64, any::<u16>()).prop_map(|(generation, port)| PeerMessage::Candidates {
            generation,
            candidates: vec![Candidate {
                kind: CandidateKind::Reflexive,
                address: SocketAddr::new([203, 0, 113, 5].into(), port),
            }],
            nat: NatKind::Easy,
            relays: Vec::new(),
            metered: false,
            bursts: true,
        }),
        Just(PeerMessage::Goodbye),
        Just(PeerMessage::GuessPorts),
    ]
}

fn any_input() -> impl Strategy<Value = Input> {
    let transport = prop_oneof![Just(RelayTransport::Quic), Just(RelayTransport::Tls)];
    let peer = (0..3u32).prop_map(id);
    let relay = r1();
    prop_oneof![
        4 => Just(Input::Timeout),
        2 => peer.clone().prop_map(|peer| Input::Wanted { peer }),
        2 => (peer.clone(), any_via()).prop_map(|(peer, via)| Input::Handshake { peer, via }),
        6 => (peer.clone(), any_via(), any_message())
            .prop_map(|(peer, via, message)| Input::Message { peer, via, message }),
        4 => (peer.clone(), any::<bool>(), prop::collection::vec(any_via(), 0..2))
            .prop_map(|(peer, sent, received)| Input::Traffic { peer, sent, received }),
        2 => transport.clone()
            .prop_map(move |transport| Input::RelayConnected { relay, transport }),
        1 => transport.prop_map(move |transport| Input::RelayLost {
            relay,
            transport,
            reason: "x".to_owned(),
        }),
        1 => (peer, any::<bool>())
            .prop_map(move |(peer, present)| Input::RelayPeer { relay, peer, present }),
        1 => Just(Input::RelayGoAway { relay }),
        2 => (1..6u16).prop_map(|port| Input::Unsendable {
            address: SocketAddr::new([198, 51, 100, 7].into(), port),
        }),
        1 => (0..4u32, any_via(), any::<bool>()).prop_map(|(peer, via, unknown)| Input::Refused {
            peer: id(peer),
            via,
            why: match unknown {
                true => Refusal::UnknownKey,
                false => Refusal::OldTimestamp { behind: Duration::from_secs(3_600) },
            },
        }),
        1 => (1..3u8).prop_map(|host| {
            Input::LocalAddresses(vec![SocketAddr::new([10, 0, 0, host].into(), 51_820)])
        }),
        1 => (1..3u32).prop_map(|nodes| Input::Snapshot(Arc::new(mesh(nodes)))),
    ]
}

/// What must hold after every input.
fn check(core: &Core) -> Result<(), TestCaseError> {
    for report in core.peers() {
        let in_use = |path: &&report::PathReport| {
            matches!(
                path.state,
                path::PathState::Primary | path::PathState::Suspect
            )
        };
        let in_use: Vec<Via> = report.paths.iter().filter(in_use).map(|p| p.via).collect();
        let expected: Vec<Via> = report.via.into_iter().collect();
        prop_assert_eq!(in_use, expected, "{:#?}", report);
        let has_path = matches!(
            report.state,
            PeerState::Relayed | PeerState::Direct | PeerState::Suspect
        );
        prop_assert_eq!(report.via.is_some(), has_path, "{:#?}", report);
        if report.state == PeerState::Direct {
            let path = report
                .paths
                .iter()
                .find(|path| Some(path.via) == report.via);
            prop_assert!(path.is_some_and(|path| path.full_size_ok), "{:#?}", report);
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn no_sequence_of_inputs_breaks_a_rule(
        steps in prop::collection::vec((any_input(), 0..2_000u64, any::<bool>()), 0..120),
    ) {
        let mut core = core(mesh(3));
        let (mut now, mut asked) = (at(0), Vec::new());
        for (mut input, ms, on_time) in steps {
            let until = now + Duration::from_millis(ms);
            let mut turns = 0;
            while let Some(next) = core.poll_timeout().filter(|next| on_time && *next <= until) {
                now = now.max(next);
                core.handle_input(Input::Timeout, now);
                turns += 1;
                prop_assert!(turns < 2_000, "spins");
            }
            now = until;
            if let Input::Message { peer, via, message: PeerMessage::EchoReply { txid, .. } } =
                &mut input
                && let Some((asked_peer, asked_via, asked_txid)) = asked.pop()
            {
                (*peer, *via, *txid) = (asked_peer, asked_via, asked_txid);
            }
            core.handle_input(input, now);
            for output in drain(&mut core) {
                if let Output::Send { peer, via, message: PeerMessage::EchoRequest { txid, .. } } =
                    output
                {
                    asked.push((peer, via, txid));
                }
            }
            check(&core)?;
        }
    }
}
