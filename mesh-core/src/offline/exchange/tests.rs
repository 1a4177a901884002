use super::*;
use crate::testing::start;

fn node(number: u8) -> NodeId {
    NodeId([number; 32])
}

fn place(number: u8) -> SocketAddr {
    SocketAddr::from(([192, 168, 1, number], 51_818))
}

fn made(made_unix_ms: u64) -> Version {
    Version {
        epoch: 1,
        made_unix_ms,
    }
}

fn announced(node: NodeId, version: Version) -> Offer {
    Offer {
        ask: Ask {
            node,
            name: "edge-a1".parse().unwrap(),
            address: place(node.0[0]),
        },
        version,
    }
}

fn offer(exchange: &mut Exchange, number: u8, version: u64, now: Instant) {
    exchange.handle_offer(announced(node(number), made(version)), now);
}

fn asked(exchange: &mut Exchange) -> (Instant, u8) {
    let due = exchange.poll_timeout().unwrap();
    let ask = exchange.handle_timeout(due).unwrap();
    (due, ask.node.0[0])
}

#[test]
fn the_newest_is_asked_for_once_no_controller_spoke_for_two_seconds() {
    let t = start();
    let mut exchange = Exchange::new(made(10), 1, t);
    for (number, version) in [(1, 11), (2, 30), (3, 20), (4, 10)] {
        offer(&mut exchange, number, version, t);
    }
    let (due, who) = asked(&mut exchange);
    assert_eq!((due, who), (t + CONTROLLER_FIRST, 2));
    // One at a time.
    assert_eq!(exchange.poll_timeout(), None);
    exchange.handle_own(made(30));
    exchange.handle_outcome(node(2), Outcome::Taken, due);
    assert_eq!(exchange.poll_timeout(), None, "nobody has a newer one");
}

#[test]
fn nobody_is_asked_while_a_controller_speaks() {
    let t = start();
    let mut exchange = Exchange::new(made(10), 1, t);
    exchange.handle_controller(true, t);
    offer(&mut exchange, 1, 11, t);
    assert_eq!(exchange.poll_timeout(), None);
    let later = t + Duration::from_secs(60);
    exchange.handle_controller(false, later);
    exchange.handle_controller(false, later + Duration::from_secs(1));
    assert_eq!(asked(&mut exchange), (later + CONTROLLER_FIRST, 1));
}

#[test]
fn who_does_not_answer_is_asked_ever_more_rarely_and_others_meanwhile() {
    let t = start();
    let mut exchange = Exchange::new(made(10), 1, t);
    offer(&mut exchange, 1, 30, t);
    offer(&mut exchange, 2, 20, t);
    let (at, who) = asked(&mut exchange);
    assert_eq!(who, 1);
    exchange.handle_outcome(node(1), Outcome::Failed, at);
    let (at, who) = asked(&mut exchange);
    assert_eq!(who, 2);
    exchange.handle_own(made(20));
    exchange.handle_outcome(node(2), Outcome::Taken, at);
    let mut pauses = Vec::new();
    let mut before = at;
    for _ in 0..8 {
        offer(&mut exchange, 1, 30, before);
        let (at, who) = asked(&mut exchange);
        assert_eq!(who, 1);
        pauses.push((at - before).as_secs());
        exchange.handle_outcome(node(1), Outcome::Failed, at);
        before = at;
    }
    assert_eq!(pauses[1..], [10, 20, 40, 80, 160, 300, 300]);
}

#[test]
fn a_liar_is_not_asked_for_an_hour_whatever_it_announces() {
    let t = start();
    let mut exchange = Exchange::new(made(10), 1, t);
    offer(&mut exchange, 1, u64::MAX, t);
    let (at, _) = asked(&mut exchange);
    exchange.handle_outcome(node(1), Outcome::Distrusted, at);
    for minutes in 1..60 {
        let now = at + Duration::from_secs(60 * minutes);
        exchange.handle_offer(
            announced(
                node(1),
                Version {
                    epoch: minutes,
                    made_unix_ms: 0,
                },
            ),
            now,
        );
        assert_eq!(exchange.handle_timeout(now), None, "after {minutes} min");
    }
    // It does not keep others from being asked.
    let now = at + Duration::from_secs(60 * 60 - 1);
    offer(&mut exchange, 2, 11, now);
    assert_eq!(asked(&mut exchange).1, 2);
}

#[test]
fn a_liar_is_not_forgotten_by_saying_nothing() {
    let t = start();
    let mut exchange = Exchange::new(made(10), 1, t);
    offer(&mut exchange, 1, 30, t);
    let (at, _) = asked(&mut exchange);
    exchange.handle_outcome(node(1), Outcome::Distrusted, at);
    // Somebody else is asked: what was announced too long ago is taken out then.
    let later = at + OFFER_AGE_MAX;
    offer(&mut exchange, 2, 11, later);
    let (at, who) = asked(&mut exchange);
    assert_eq!(who, 2);
    exchange.handle_outcome(node(2), Outcome::Failed, at);
    offer(&mut exchange, 1, 30, at);
    assert_eq!(exchange.handle_timeout(at + ASK_WITHIN), None);
}

#[test]
fn what_a_neighbour_said_last_of_itself_counts_and_not_all_ask_for_it_at_once() {
    let t = start();
    let mut waits = Vec::new();
    for seed in 0..100 {
        let mut exchange = Exchange::new(made(10), seed, t);
        offer(&mut exchange, 1, 10, t);
        let later = t + Duration::from_secs(60);
        let mut moved = announced(node(1), made(11));
        moved.ask.name = "edge-a9".parse().unwrap();
        moved.ask.address = place(9);
        exchange.handle_offer(moved.clone(), later);
        let due = exchange.poll_timeout().unwrap();
        assert_eq!(exchange.handle_timeout(due), Some(moved.ask));
        waits.push(due - later);
    }
    waits.sort_unstable();
    assert!(waits[10] > Duration::ZERO && waits[10] < ASK_WITHIN / 4);
    assert!(waits[90] > ASK_WITHIN * 3 / 4 && waits[99] <= ASK_WITHIN);
}

#[test]
fn a_neighbour_that_gave_its_state_is_none_that_failed_any_more() {
    let t = start();
    let mut exchange = Exchange::new(made(10), 1, t);
    let mut now = t;
    for (version, outcome) in [
        (30, Outcome::Failed),
        (30, Outcome::Failed),
        (30, Outcome::Taken),
        (40, Outcome::Failed),
    ] {
        offer(&mut exchange, 1, version, now);
        (now, _) = asked(&mut exchange);
        if outcome == Outcome::Taken {
            exchange.handle_own(made(version));
        }
        exchange.handle_outcome(node(1), outcome, now);
    }
    assert_eq!(asked(&mut exchange).0, now + RETRY_MIN);
}

#[test]
fn what_was_announced_long_ago_counts_no_more() {
    let t = start();
    let mut exchange = Exchange::new(made(10), 1, t);
    exchange.handle_controller(true, t);
    offer(&mut exchange, 1, 11, t);
    let later = t + OFFER_AGE_MAX;
    exchange.handle_controller(false, later);
    let due = exchange.poll_timeout().unwrap();
    assert_eq!(exchange.handle_timeout(due), None);
    assert_eq!(exchange.poll_timeout(), None);
}

#[test]
fn neighbours_that_are_remembered_are_limited_and_the_oldest_goes() {
    let t = start();
    let mut exchange = Exchange::new(made(10), 1, t);
    for number in 0..1_000_u32 {
        let mut id = [0; 32];
        id[..4].copy_from_slice(&number.to_be_bytes());
        let now = t + Duration::from_millis(number.into());
        exchange.handle_offer(announced(NodeId(id), made(11)), now);
    }
    assert_eq!(exchange.offers.len(), OFFERS_MAX);
    assert!(!exchange.offers.contains_key(&NodeId([0; 32])));
}

#[test]
fn equally_new_neighbours_share_the_work() {
    let t = start();
    let mut counts = [0; 4];
    for seed in 0..400 {
        let mut exchange = Exchange::new(made(10), seed, t);
        for number in 0..4 {
            offer(&mut exchange, number, 11, t);
        }
        let now = t + Duration::from_secs(10);
        counts[usize::from(exchange.handle_timeout(now).unwrap().node.0[0])] += 1;
    }
    assert!(
        counts.iter().all(|count| (60..140).contains(count)),
        "{counts:?}"
    );
}

#[test]
fn a_neighbour_is_answered_rarely_and_others_meanwhile() {
    let t = start();
    let mut answers = Answers::default();
    assert!(answers.handle_request(node(1), t));
    assert!(!answers.handle_request(node(1), t + ANSWER_EVERY / 2));
    assert!(answers.handle_request(node(2), t));
    assert!(answers.handle_request(node(1), t + ANSWER_EVERY));
}

#[test]
fn who_is_answered_is_remembered_up_to_a_limit() {
    let t = start();
    let mut answers = Answers::default();
    let answered = (0..1_000_u32).filter(|number| {
        let mut id = [0; 32];
        id[..4].copy_from_slice(&number.to_be_bytes());
        answers.handle_request(NodeId(id), t)
    });
    assert_eq!(answered.count(), OFFERS_MAX);
}
