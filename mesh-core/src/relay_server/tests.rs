use std::net::Ipv4Addr;

use mesh_wire::relay::udp::{BindKey, UdpFrame, ping_frame};
use proptest::prelude::*;

use super::*;
use crate::testing::start;

mod addresses;

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const QUIC: RelayTransport = RelayTransport::Quic;
const TLS: RelayTransport = RelayTransport::Tls;

fn node(n: u8) -> NodeId {
    NodeId([n; 32])
}

fn server(limits: Limits) -> RelayServer {
    RelayServer::new(limits, &[7; 32], start())
}

#[track_caller]
fn connect(server: &mut RelayServer, n: u8, transport: RelayTransport) -> LinkId {
    let link = server.handle_connected(node(n), transport, HERE, PROTOCOL_VERSION, start());
    link.unwrap()
}

/// One frame.
fn one(
    server: &mut RelayServer,
    link: LinkId,
    session: Session,
    bytes: usize,
    now: Instant,
) -> Verdict {
    many(server, Way::Link(link), session, 1, bytes, now)
}

fn many(
    server: &mut RelayServer,
    from: Way,
    session: Session,
    frames: usize,
    bytes: usize,
    now: Instant,
) -> Verdict {
    let batch = Batch {
        session,
        frames,
        bytes,
    };
    server.handle_data(from, batch, now)
}

fn by(link: LinkId) -> Verdict {
    forward(Way::Link(link), 1)
}

fn forward(way: Way, frames: usize) -> Verdict {
    Verdict::Forward { way, frames }
}

fn find(server: &mut RelayServer, link: LinkId, n: u8) {
    server.handle_control(link, Control::FindPeer { node: node(n) });
}

fn drain(server: &mut RelayServer) -> Vec<Output> {
    std::iter::from_fn(|| server.poll_output()).collect()
}

/// The session that `outputs` tell `link` for `n`, last.
fn told(outputs: &[Output], link: LinkId, n: u8) -> Option<Option<Session>> {
    let for_link = outputs.iter().rev().filter_map(|output| match output {
        Output::Send { link: to, message } if *to == link => Some(message),
        Output::Send { .. } | Output::Close { .. } => None,
    });
    let mut sessions = for_link.filter_map(|message| {
        let Control::Peer {
            node: peer,
            session,
        } = message
        else {
            return None;
        };
        (*peer == node(n)).then_some(*session)
    });
    sessions.next()
}

/// Two nodes with a session.
fn pair(server: &mut RelayServer) -> (LinkId, LinkId, Session) {
    let (a, b) = (connect(server, 1, QUIC), connect(server, 2, QUIC));
    find(server, a, 2);
    let session = told(&drain(server), b, 1).unwrap().unwrap();
    (a, b, session)
}

#[test]
fn a_pair_has_one_session_and_both_are_told() {
    let mut server = server(Limits::default());
    let (a, b) = (connect(&mut server, 1, QUIC), connect(&mut server, 2, TLS));
    find(&mut server, a, 2);
    let outputs = drain(&mut server);
    let session = told(&outputs, a, 2).unwrap().unwrap();
    assert_eq!(told(&outputs, b, 1), Some(Some(session)));
    find(&mut server, b, 1);
    assert_eq!(told(&drain(&mut server), b, 1), Some(Some(session)));
    assert_eq!(one(&mut server, a, session, 100, start()), by(b));
    assert_eq!(one(&mut server, b, session, 100, start()), by(a));
    assert_eq!(server.counters().forwarded_bytes, 200);
}

#[test]
fn a_peer_that_comes_later_is_announced_to_who_asked() {
    let mut server = server(Limits::default());
    let a = connect(&mut server, 1, QUIC);
    find(&mut server, a, 2);
    assert_eq!(told(&drain(&mut server), a, 2), Some(None));
    let b = connect(&mut server, 2, QUIC);
    let outputs = drain(&mut server);
    let session = told(&outputs, a, 2).unwrap().unwrap();
    assert_eq!(told(&outputs, b, 1), Some(Some(session)));
}

#[test]
fn a_session_ends_with_its_node_and_its_number_is_not_confused_with_its_successor() {
    let limits = Limits {
        sessions_max: 1,
        ..Limits::default()
    };
    let mut server = server(limits);
    let (a, b, old) = pair(&mut server);
    server.handle_disconnected(b);
    assert_eq!(told(&drain(&mut server), a, 2), Some(None));
    assert_eq!(
        one(&mut server, a, old, 1, start()),
        Verdict::Drop(DropReason::NoSession)
    );
    let gone = Output::Send {
        link: a,
        message: Control::SessionGone { session: old },
    };
    assert_eq!(drain(&mut server), [gone]);

    let c = connect(&mut server, 3, QUIC);
    find(&mut server, a, 3);
    let new = told(&drain(&mut server), c, 1).unwrap().unwrap();
    assert_eq!(new.number, old.number);
    assert_eq!(
        one(&mut server, a, old, 1, start()),
        Verdict::Drop(DropReason::NoSession)
    );
    assert_eq!(one(&mut server, a, new, 1, start()), by(c));
}

#[test]
fn nobody_sends_into_the_session_of_others() {
    let mut server = server(Limits::default());
    let (_, _, session) = pair(&mut server);
    let c = connect(&mut server, 3, QUIC);
    assert_eq!(
        one(&mut server, c, session, 1, start()),
        Verdict::Drop(DropReason::NoSession)
    );
}

#[test]
fn frames_go_to_the_link_by_which_the_node_last_sent_data() {
    let mut server = server(Limits::default());
    let (a, quic, session) = pair(&mut server);
    let tls = connect(&mut server, 2, TLS);
    assert_eq!(
        told(&drain(&mut server), tls, 1),
        Some(Some(session)),
        "a new link knows the sessions"
    );
    assert_eq!(
        one(&mut server, a, session, 1, start()),
        by(tls),
        "the newest"
    );
    one(&mut server, quic, session, 1, start());
    assert_eq!(
        one(&mut server, a, session, 1, start()),
        by(quic),
        "the one it uses"
    );
    server.handle_control(tls, Control::Ping { txid: 1 });
    assert_eq!(
        one(&mut server, a, session, 1, start()),
        by(quic),
        "a ping keeps warm and no more"
    );
    server.handle_disconnected(quic);
    assert_eq!(
        one(&mut server, a, session, 1, start()),
        by(tls),
        "the one left"
    );
}

#[test]
fn a_reconnect_replaces_the_old_link_and_keeps_the_sessions() {
    let mut server = server(Limits::default());
    let (a, old, session) = pair(&mut server);
    let new = connect(&mut server, 2, QUIC);
    let outputs = drain(&mut server);
    assert!(outputs.contains(&Output::Close { link: old }));
    assert_eq!(told(&outputs, new, 1), Some(Some(session)));
    server.handle_disconnected(old); // Comes late, and must not harm the new one.
    assert_eq!(one(&mut server, a, session, 1, start()), by(new));
    assert_eq!(
        one(&mut server, old, session, 1, start()),
        Verdict::Drop(DropReason::NoSession)
    );
}

#[test]
fn a_full_relay_refuses_but_lets_a_node_reconnect() {
    let mut server = server(Limits {
        links_max: 1,
        ..Limits::default()
    });
    connect(&mut server, 1, QUIC);
    let second = server.handle_connected(node(2), QUIC, HERE, PROTOCOL_VERSION, start());
    assert_eq!(second, Err(Refusal::Full));
    connect(&mut server, 1, QUIC);
    assert_eq!((server.links(), server.counters().links_refused), (1, 1));
}

#[test]
fn a_network_has_its_share_of_links_only() {
    let mut server = server(Limits {
        links_per_source_max: 1,
        ..Limits::default()
    });
    connect(&mut server, 1, QUIC);
    let second = server.handle_connected(node(2), QUIC, HERE, PROTOCOL_VERSION, start());
    assert_eq!(second, Err(Refusal::SourceFull));
    let mapped = "::ffff:192.0.3.1".parse().unwrap();
    server
        .handle_connected(node(2), QUIC, mapped, PROTOCOL_VERSION, start())
        .unwrap();
}

#[test]
fn handshakes_of_one_network_are_limited_and_others_are_not() {
    let limits = Limits {
        handshakes_burst: 2,
        handshakes_per_s: 1,
        ..Limits::default()
    };
    let mut server = server(limits);
    let now = start();
    let results = [HERE; 3].map(|from| server.handle_handshake(from, now));
    assert_eq!(results, [Ok(()), Ok(()), Err(Refusal::HandshakeRate)]);
    assert_eq!(
        server.handle_handshake("198.51.100.1".parse().unwrap(), now),
        Ok(())
    );
    assert_eq!(
        server.handle_handshake(HERE, now + Duration::from_secs(1)),
        Ok(())
    );
}

#[test]
fn a_node_over_its_rate_loses_frames_and_recovers() {
    let limits = Limits {
        rate: Some(Rate {
            bytes_per_s: 1000,
            burst_bytes: 1000,
        }),
        ..Limits::default()
    };
    let mut server = server(limits);
    let (a, b, session) = pair(&mut server);
    let now = start();
    assert_eq!(one(&mut server, a, session, 1000, now), by(b));
    assert_eq!(
        one(&mut server, a, session, 1, now),
        Verdict::Drop(DropReason::Rate)
    );
    assert_eq!(
        one(&mut server, b, session, 1000, now),
        by(a),
        "its own bucket"
    );
    let later = now + Duration::from_millis(500);
    assert_eq!(one(&mut server, a, session, 500, later), by(b));
    assert_eq!(server.counters().rate_limited_frames, 1);
}

#[test]
fn interests_and_sessions_are_bounded() {
    let limits = Limits {
        interests_per_node_max: 1,
        sessions_per_node_max: 1,
        ..Limits::default()
    };
    let mut server = server(limits);
    let (a, b, _) = pair(&mut server);
    let c = connect(&mut server, 3, QUIC);
    drain(&mut server);
    find(&mut server, a, 3); // a has one interest.
    find(&mut server, c, 2); // b has one session.
    let outputs = drain(&mut server);
    assert_eq!(
        (told(&outputs, a, 3), told(&outputs, c, 2)),
        (Some(None), Some(None))
    );
    assert_eq!(told(&outputs, b, 3), None);
    assert_eq!(server.counters().finds_refused, 2);
}

#[test]
fn stopping_says_go_away_to_all_and_lets_nobody_in() {
    let mut server = server(Limits::default());
    let (a, b, _) = pair(&mut server);
    server.handle_stop(Duration::from_secs(1));
    let message = Control::GoAway { grace_ms: 1000 };
    let expected = [a, b].map(|link| Output::Send { link, message });
    assert_eq!(drain(&mut server), expected);
    let late = server.handle_connected(node(3), QUIC, HERE, PROTOCOL_VERSION, start());
    assert_eq!(late, Err(Refusal::Stopping));
}

#[test]
fn a_batch_over_the_rate_is_cut_short() {
    let rate = Some(Rate {
        bytes_per_s: 1000,
        burst_bytes: 1000,
    });
    let mut server = server(Limits {
        rate,
        ..Limits::default()
    });
    let (a, b, session) = pair(&mut server);
    let (from, to, now) = (Way::Link(a), Way::Link(b), start());
    let batch = |server: &mut RelayServer, frames, bytes, ms| {
        let now = now + Duration::from_millis(ms);
        many(server, from, session, frames, bytes, now)
    };
    // 290 bytes each; the last is shorter.
    assert_eq!(batch(&mut server, 10, 2801, 0), forward(to, 3));
    let none = Verdict::Drop(DropReason::Rate);
    assert_eq!(batch(&mut server, 10, 2801, 0), none);
    assert_eq!(batch(&mut server, 2, 500, 500), forward(to, 2));
    let counters = server.counters();
    assert_eq!(
        (counters.forwarded_frames, counters.rate_limited_frames),
        (5, 17)
    );
}

#[derive(Debug, Clone)]
enum Step {
    Connect(u8, RelayTransport),
    Disconnect(usize),
    Find(usize, u8),
    Data(usize, usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let transport = prop_oneof![Just(QUIC), Just(TLS)];
    let step = prop_oneof![
        (0..5_u8, transport).prop_map(|(n, transport)| Step::Connect(n, transport)),
        (0..40_usize).prop_map(Step::Disconnect),
        (0..40_usize, 0..5_u8).prop_map(|(link, n)| Step::Find(link, n)),
        (0..40_usize, 0..40_usize).prop_map(|(link, session)| Step::Data(link, session)),
    ];
    proptest::collection::vec(step, 0..80)
}

proptest! {
    /// Whatever happens in whatever order: a frame is forwarded exactly when the sender was told
    /// that session last, and to the node that it was told it leads to; and nothing is left when
    /// all have gone.
    #[test]
    fn what_nodes_were_told_is_what_holds(steps in steps()) {
        let mut server = server(Limits { sessions_max: 4, ..Limits::default() });
        let mut links: Vec<(LinkId, u8)> = Vec::new();
        let mut live: BTreeSet<LinkId> = BTreeSet::new();
        let mut told: BTreeMap<LinkId, BTreeMap<NodeId, Session>> = BTreeMap::new();
        let mut sessions: Vec<Session> = Vec::new();
        for step in steps {
            match step {
                Step::Connect(n, transport) => {
                    let link = connect(&mut server, n, transport);
                    links.push((link, n));
                    live.insert(link);
                }
                Step::Disconnect(index) => {
                    if let Some(&(link, _)) = links.get(index) {
                        server.handle_disconnected(link);
                        live.remove(&link);
                    }
                }
                Step::Find(index, n) => {
                    if let Some(&(link, _)) = links.get(index) {
                        find(&mut server, link, n);
                    }
                }
                Step::Data(index, which) => {
                    let (Some(&(link, _)), Some(&session)) = (links.get(index), sessions.get(which)) else {
                        continue;
                    };
                    let knows = live.contains(&link).then(|| told.get(&link)).flatten();
                    let peer = knows.and_then(|told| told.iter().find(|(_, s)| **s == session));
                    match one(&mut server, link, session, 1, start()) {
                        Verdict::Forward { way: Way::Link(to), .. } => {
                            let receiver = links.iter().find(|(link, _)| *link == to).unwrap().1;
                            prop_assert_eq!(peer.map(|(peer, _)| *peer), Some(node(receiver)));
                            prop_assert!(live.contains(&to));
                        }
                        Verdict::Forward { way: Way::Udp(_), .. } => prop_assert!(false),
                        Verdict::Drop(_) => prop_assert_eq!(peer, None),
                    }
                }
            }
            for output in drain(&mut server) {
                match output {
                    Output::Close { link } => drop(live.remove(&link)),
                    Output::Send { link, message: Control::Peer { node, session } } => {
                        prop_assert!(live.contains(&link));
                        let told = told.entry(link).or_default();
                        match session {
                            Some(session) => {
                                sessions.push(session);
                                told.insert(node, session);
                            }
                            None => drop(told.remove(&node)),
                        }
                    }
                    Output::Send { .. } => {}
                }
            }
        }
        for (link, _) in links {
            server.handle_disconnected(link);
        }
        prop_assert!(server.nodes.is_empty() && server.links.is_empty());
        prop_assert!(server.watchers.is_empty() && server.sources.is_empty());
        prop_assert!(server.places.iter().all(|place| place.pair.is_none()));
        prop_assert_eq!(server.free_places.len(), server.places.len());
    }
}

#[test]
fn a_relay_of_a_site_serves_pairs_with_one_of_its_nodes_only() {
    let mut server = server(Limits::default());
    server.set_served(Some(BTreeSet::from([node(1), node(2)])));
    let [own, other, stranger, far] = [1, 2, 3, 4].map(|n| connect(&mut server, n, QUIC));
    drain(&mut server);
    find(&mut server, own, 2);
    assert!(told(&drain(&mut server), own, 2).unwrap().is_some());
    // From outside: to one of the site yes, past it no.
    find(&mut server, stranger, 2);
    let session = told(&drain(&mut server), other, 3).unwrap().unwrap();
    find(&mut server, stranger, 4);
    assert_eq!(told(&drain(&mut server), stranger, 4), Some(None));
    assert_eq!(server.counters().pairs_not_served, 1);
    assert_eq!(one(&mut server, stranger, session, 100, start()), by(other));
    // Who was refused is not waiting: nobody is told when the site grows, until he asks again.
    server.set_served(None);
    assert_eq!(drain(&mut server), []);
    find(&mut server, far, 3);
    assert!(told(&drain(&mut server), far, 3).unwrap().is_some());
}

#[test]
fn pairs_that_are_served_no_more_lose_their_session_and_are_told() {
    let mut server = server(Limits::default());
    let [a, b, c] = [1, 2, 3].map(|n| connect(&mut server, n, QUIC));
    find(&mut server, a, 2);
    find(&mut server, b, 3);
    let outputs = drain(&mut server);
    let [ended, kept] = [(a, 2), (b, 3)].map(|(link, n)| told(&outputs, link, n).unwrap().unwrap());
    server.set_served(Some(BTreeSet::from([node(3)])));
    let outputs = drain(&mut server);
    assert_eq!(told(&outputs, a, 2), Some(None));
    assert_eq!(told(&outputs, b, 1), Some(None));
    assert_eq!(told(&outputs, c, 2), None);
    let lost = Verdict::Drop(DropReason::NoSession);
    assert_eq!(one(&mut server, a, ended, 100, start()), lost);
    assert_eq!(one(&mut server, b, kept, 100, start()), by(c));
    // One that comes back finds its watcher, but not past the site.
    server.handle_disconnected(a);
    drain(&mut server);
    find(&mut server, b, 1);
    assert_eq!(told(&drain(&mut server), b, 1), Some(None));
}
