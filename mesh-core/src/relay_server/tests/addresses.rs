//! Plain UDP: who may bind an address, and what it is good for.

use super::*;

const FULL: usize = 1320;

fn address(last: u8) -> UdpPath {
    UdpPath {
        remote: SocketAddr::from(([198, 51, 100, last], 4000)),
        local: None,
    }
}

fn at(ms: u64) -> Instant {
    start_of_test() + Duration::from_millis(ms)
}

/// The same instant in every call, so that milliseconds can be counted from it.
fn start_of_test() -> Instant {
    thread_local!(static START: Instant = start());
    START.with(|start| *start)
}

fn key(server: &mut RelayServer, link: LinkId) -> BindKey {
    drain(server);
    server.handle_control(link, Control::AskBindKey);
    match drain(server).as_slice() {
        [
            Output::Send {
                link: to,
                message: Control::BindKey(key),
            },
        ] if *to == link => *key,
        other => panic!("{other:?}"),
    }
}

/// What the relay answers to a datagram; never more than it got.
#[track_caller]
fn ask(server: &mut RelayServer, path: UdpPath, datagram: &[u8], ms: u64) -> Option<Vec<u8>> {
    let answer = server.handle_udp(path, datagram, at(ms)).unwrap();
    assert!(
        answer
            .as_ref()
            .is_none_or(|answer| answer.len() <= datagram.len())
    );
    answer
}

#[track_caller]
fn cookie(server: &mut RelayServer, path: UdpPath, key: BindKey, sequence: u64, ms: u64) -> Tag {
    let answer = ask(server, path, &key.ask_for_cookie(sequence), ms).unwrap();
    match UdpFrame::decode(&answer) {
        Ok(UdpFrame::Cookie {
            sequence: answered,
            cookie,
        }) if answered == sequence => cookie,
        other => panic!("{other:?}"),
    }
}

/// Whether the relay said that the address is bound.
#[track_caller]
fn finish(server: &mut RelayServer, path: UdpPath, key: BindKey, request: &[u8], ms: u64) -> bool {
    match ask(server, path, request, ms).map(|answer| UdpFrame::decode(&answer)) {
        Some(Ok(UdpFrame::Bound(bound))) => {
            assert!(key.confirms(&bound));
            true
        }
        Some(Ok(UdpFrame::Cookie { .. })) | None => false,
        Some(other) => panic!("{other:?}"),
    }
}

#[track_caller]
fn bind(server: &mut RelayServer, path: UdpPath, key: BindKey, sequence: u64, ms: u64) {
    let cookie = cookie(server, path, key, sequence, ms);
    let request = key.bind(sequence, cookie, FULL);
    assert!(finish(server, path, key, &request, ms));
    assert!(ask(server, path, &ping_frame(1, 0), ms).is_some());
}

fn from(server: &mut RelayServer, way: Way, session: Session, ms: u64) -> Verdict {
    many(server, way, session, 1, 100, at(ms))
}

const UNBOUND: Verdict = Verdict::Drop(DropReason::Unbound { tell: true });

/// Two nodes with a session, the second with an address.
fn with_address() -> (RelayServer, LinkId, LinkId, Session, BindKey) {
    let mut server = RelayServer::new(Limits::default(), &[7; 32], at(0));
    let (a, b, session) = pair(&mut server);
    let key = key(&mut server, b);
    bind(&mut server, address(2), key, 1, 0);
    (server, a, b, session, key)
}

#[test]
fn a_bound_address_sends_and_receives() {
    let (mut server, a, _, session, _) = with_address();
    let there = Way::Udp(address(2));
    assert_eq!(
        from(&mut server, Way::Link(a), session, 1),
        forward(there, 1)
    );
    assert_eq!(from(&mut server, there, session, 1), by(a));
    let all = many(&mut server, Way::Link(a), session, 40, 40 * 1312, at(2));
    assert_eq!(all, forward(there, 40));
}

#[test]
fn nothing_is_sent_to_an_address_before_its_node_says_that_it_listens() {
    let mut server = RelayServer::new(Limits::default(), &[7; 32], at(0));
    let (a, b, session) = pair(&mut server);
    let key = key(&mut server, b);
    let request = key.bind(1, cookie(&mut server, address(2), key, 1, 0), FULL);
    assert!(finish(&mut server, address(2), key, &request, 0));
    assert_eq!(from(&mut server, Way::Link(a), session, 1), by(b));
    ask(&mut server, address(2), &ping_frame(1, 0), 1);
    let there = forward(Way::Udp(address(2)), 1);
    assert_eq!(from(&mut server, Way::Link(a), session, 1), there);
}

#[test]
fn both_ends_may_have_addresses() {
    let (mut server, a, _, session, _) = with_address();
    let key = key(&mut server, a);
    bind(&mut server, address(1), key, 1, 0);
    let (one, two) = (Way::Udp(address(1)), Way::Udp(address(2)));
    assert_eq!(from(&mut server, one, session, 1), forward(two, 1));
    assert_eq!(from(&mut server, two, session, 1), forward(one, 1));
}

#[test]
fn an_unbound_address_sends_nothing_and_is_told_so_not_too_often() {
    let (mut server, _, _, session, _) = with_address();
    let stranger = Way::Udp(address(9));
    assert_eq!(from(&mut server, stranger, session, 0), UNBOUND);
    let told = (0..1000).filter(|_| from(&mut server, stranger, session, 0) == UNBOUND);
    assert_eq!(told.count() as u64, UNBOUND_ANSWERS_BURST - 1);
    assert_eq!(server.counters().unbound_frames, 1001);
    assert_eq!(from(&mut server, stranger, session, 1000), UNBOUND);
}

#[test]
fn nobody_sends_from_an_address_into_the_session_of_others() {
    let (mut server, ..) = with_address();
    let (c, d) = (connect(&mut server, 3, QUIC), connect(&mut server, 4, QUIC));
    find(&mut server, c, 4);
    let other = told(&drain(&mut server), d, 3).unwrap().unwrap();
    let verdict = from(&mut server, Way::Udp(address(2)), other, 1);
    assert_eq!(verdict, Verdict::Drop(DropReason::NoSession));
}

#[test]
fn a_cookie_is_good_at_its_address_only() {
    let mut server = RelayServer::new(Limits::default(), &[7; 32], at(0));
    let link = connect(&mut server, 1, QUIC);
    let key = key(&mut server, link);
    let cookie = cookie(&mut server, address(1), key, 1, 0);
    let request = key.bind(1, cookie, FULL);
    let other_port = UdpPath {
        remote: SocketAddr::from(([198, 51, 100, 1], 4001)),
        ..address(1)
    };
    for forged in [address(3), other_port] {
        assert!(!finish(&mut server, forged, key, &request, 0));
    }
    let later = key.bind(2, cookie, FULL);
    assert!(
        !finish(&mut server, address(1), key, &later, 0),
        "nor for another request"
    );
    assert!(finish(&mut server, address(1), key, &request, 0));
}

#[test]
fn a_cookie_outlives_one_rotation_of_the_secret_and_not_two() {
    for (ms, good) in [(119_999, true), (239_999, true), (240_000, false)] {
        let mut server = RelayServer::new(Limits::default(), &[7; 32], at(0));
        let link = connect(&mut server, 1, QUIC);
        let key = key(&mut server, link);
        let cookie = cookie(&mut server, address(1), key, 1, 0);
        let request = key.bind(1, cookie, FULL);
        assert_eq!(
            finish(&mut server, address(1), key, &request, ms),
            good,
            "{ms}"
        );
    }
}

#[test]
fn a_request_of_another_key_binds_nothing() {
    let (mut server, a, _, _, of_b) = with_address();
    let of_a = key(&mut server, a);
    let forged = BindKey {
        id: of_a.id,
        key: of_b.key,
    };
    let unknown = BindKey { id: 99, ..of_b };
    for forged in [forged, unknown] {
        let cookie = cookie(&mut server, address(3), forged, 5, 0);
        let request = forged.bind(5, cookie, FULL);
        assert!(!finish(&mut server, address(3), forged, &request, 0));
    }
    assert_eq!(server.counters().binds_refused, 2);
}

#[test]
fn an_answer_that_got_lost_is_given_again_and_an_old_request_is_not_answered() {
    let (mut server, a, _, session, key) = with_address();
    let old = {
        let cookie = cookie(&mut server, address(2), key, 2, 0);
        key.bind(2, cookie, FULL)
    };
    assert!(finish(&mut server, address(2), key, &old, 0));
    assert!(finish(&mut server, address(2), key, &old, 0));
    bind(&mut server, address(5), key, 3, 0); // The node moved,
    assert!(!finish(&mut server, address(2), key, &old, 0)); // and somebody forges its old address.
    let there = forward(Way::Udp(address(5)), 1);
    assert_eq!(from(&mut server, Way::Link(a), session, 1), there);
    assert_eq!(from(&mut server, Way::Udp(address(2)), session, 1), UNBOUND);
}

#[test]
fn a_nat_that_gives_an_address_to_another_node_takes_it_from_the_first() {
    let (mut server, a, b, session, _) = with_address();
    let c = connect(&mut server, 3, QUIC);
    let key = key(&mut server, c);
    bind(&mut server, address(2), key, 1, 0);
    assert_eq!(from(&mut server, Way::Link(a), session, 1), by(b));
    let foreign = from(&mut server, Way::Udp(address(2)), session, 1);
    assert_eq!(foreign, Verdict::Drop(DropReason::NoSession));
}

#[test]
fn an_address_goes_with_its_link_or_when_its_node_says_so_or_is_silent() {
    let (mut server, a, b, session, _) = with_address();
    let there = forward(Way::Udp(address(2)), 1);
    assert_eq!(from(&mut server, Way::Link(a), session, 34_999), there);
    assert_eq!(from(&mut server, Way::Link(a), session, 35_000), by(b));
    assert!(ask(&mut server, address(2), &ping_frame(1, 0), 35_000).is_some());
    assert_eq!(from(&mut server, Way::Link(a), session, 35_001), there);

    server.handle_control(b, Control::Unbind { sequence: 0 }); // Of a bind before.
    assert_eq!(from(&mut server, Way::Link(a), session, 35_001), there);
    server.handle_control(b, Control::Unbind { sequence: 1 });
    assert_eq!(from(&mut server, Way::Link(a), session, 35_002), by(b));
    assert_eq!(
        from(&mut server, Way::Udp(address(2)), session, 35_002),
        UNBOUND
    );

    let (mut server, _, b, session, key) = with_address();
    server.handle_disconnected(b);
    assert_eq!(from(&mut server, Way::Udp(address(2)), session, 1), UNBOUND);
    let late = key.bind(9, cookie(&mut server, address(2), key, 9, 1), FULL);
    assert!(!finish(&mut server, address(2), key, &late, 1));
    assert!(server.addresses.is_empty());
}

#[test]
fn a_reconnect_ends_the_old_links_address() {
    let (mut server, a, _, session, _) = with_address();
    let new = connect(&mut server, 2, QUIC);
    assert_eq!(from(&mut server, Way::Link(a), session, 1), by(new));
    assert_eq!(from(&mut server, Way::Udp(address(2)), session, 1), UNBOUND);
}

#[test]
fn a_node_that_sends_by_its_link_again_is_answered_there() {
    let (mut server, a, b, session, _) = with_address();
    from(&mut server, Way::Link(b), session, 1);
    assert_eq!(from(&mut server, Way::Link(a), session, 1), by(b));
    from(&mut server, Way::Udp(address(2)), session, 2);
    let there = forward(Way::Udp(address(2)), 1);
    assert_eq!(from(&mut server, Way::Link(a), session, 2), there);
    let tls = connect(&mut server, 2, TLS);
    assert_eq!(from(&mut server, Way::Link(a), session, 3), by(tls));
    from(&mut server, Way::Udp(address(2)), session, 4);
    assert_eq!(from(&mut server, Way::Link(a), session, 4), there);
}

#[test]
fn a_ping_is_answered_to_who_is_bound_and_refused_to_others() {
    let (mut server, ..) = with_address();
    let decoded = |answer: Option<Vec<u8>>| UdpFrame::decode(&answer.unwrap()).unwrap();
    let pong = ask(&mut server, address(2), &ping_frame(7, 0), 0);
    assert_eq!(decoded(pong), UdpFrame::Pong { txid: 7 });
    // As long as it was asked, and not a byte more.
    let pong = ask(&mut server, address(2), &ping_frame(9, 1312), 0);
    assert_eq!(pong.unwrap().len(), 1312);
    let refused = ask(&mut server, address(3), &ping_frame(8, 0), 0);
    assert!(matches!(
        decoded(refused),
        UdpFrame::Unbound { echo: 8, .. }
    ));
}

#[test]
fn a_tls_link_gets_no_key() {
    let mut server = server(Limits::default());
    let link = connect(&mut server, 1, TLS);
    drain(&mut server);
    server.handle_control(link, Control::AskBindKey);
    assert_eq!(drain(&mut server), []);
}

proptest! {
    #[test]
    fn no_datagram_panics_binds_or_is_answered_with_more(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0x20..0x29_u8) {
        let mut server = server(Limits::default());
        connect(&mut server, 1, QUIC);
        if let Some(first) = bytes.first_mut() {
            *first = kind;
        }
        let answer = server.handle_udp(address(1), &bytes, start()).ok().flatten();
        prop_assert!(answer.is_none_or(|answer| answer.len() <= bytes.len()));
        prop_assert!(server.addresses.is_empty());
    }
}
