use super::*;
use crate::{
    gate::{Admission, Gate, HANDSHAKES_PER_SECOND},
    message::{DATA_HEADER_LEN, OVERHEAD},
    session::OpenError,
};

const TICK: Duration = Duration::from_millis(200);

/// One device with one peer, and time.
struct End {
    key: LocalKey,
    peer: Peer,
    activity: Activity,
    gate: Gate,
    next_index: u32,
}

impl End {
    fn pair(psk: [PresharedKey; 2], now: Instant) -> [Self; 2] {
        let keys = [LocalKey::new([1; 32]), LocalKey::new([2; 32])];
        let publics = [keys[1].public(), keys[0].public()];
        let mut seed = 0;
        let parts = keys.into_iter().zip(publics).zip(psk);
        let ends = parts.map(|((key, public), psk)| {
            seed += 1000;
            Self {
                key,
                peer: Peer::new(public, psk, None),
                activity: Activity::new(now),
                gate: Gate::default(),
                next_index: seed,
            }
        });
        ends.collect::<Vec<_>>().try_into().ok().unwrap()
    }

    fn index(&mut self) -> u32 {
        self.next_index += 1;
        self.next_index
    }

    fn initiate(&mut self, now: Instant, clock: Duration) -> [u8; INITIATION_LEN] {
        let index = self.index();
        let made = self.peer.initiate(&self.key, index, now, clock);
        self.activity.sent_other(now);
        made.unwrap()
    }

    fn answer(&mut self, initiation: &[u8], now: Instant) -> Result<[u8; RESPONSE_LEN], Refused> {
        let received = Received::read(&self.key, initiation).ok_or(Refused::Forged)?;
        let index = self.index();
        let (response, _) = self.peer.respond(received, index, now)?;
        self.activity.received_other(now);
        self.activity.sent_other(now);
        Ok(response)
    }

    fn seal(&self, packet: &[u8], now: Instant) -> Vec<u8> {
        let session = self.peer.current().unwrap();
        let mut datagram = vec![0; packet.len() + OVERHEAD];
        datagram[DATA_HEADER_LEN..][..packet.len()].copy_from_slice(packet);
        let counter = session.reserve(1).unwrap();
        assert!(session.seal(counter, &mut datagram));
        if packet.is_empty() {
            self.activity.sent_other(now);
        } else {
            self.activity.sent_data(now);
        }
        datagram
    }

    fn open(&mut self, mut datagram: Vec<u8>, now: Instant) -> Result<Vec<u8>, OpenError> {
        let Some(Kind::Data { receiver }) = Kind::of(&datagram) else {
            panic!("not data");
        };
        let session = self.peer.sessions().find(|s| s.local() == receiver);
        let session = Arc::clone(session.expect("a session"));
        let (counter, at) = session.open(&mut datagram, now)?;
        session.window().accept(counter)?;
        self.peer.confirm(receiver, now);
        if at.is_empty() {
            self.activity.received_other(now);
        } else {
            self.activity.received_data(now);
        }
        Ok(datagram[at].to_vec())
    }
}

fn zeros() -> [PresharedKey; 2] {
    [PresharedKey::default(), PresharedKey::default()]
}

const CLOCK: Duration = Duration::from_secs(1_800_000_000);

/// `one` begins, and proves the session.
fn connect(one: &mut End, other: &mut End, now: Instant) {
    let clock = CLOCK + now.elapsed();
    let initiation = one.initiate(now, clock);
    let response = other.answer(&initiation, now).unwrap();
    one.peer.finish(&response, now).unwrap();
    let keepalive = one.seal(b"", now);
    assert_eq!(other.open(keepalive, now), Ok(vec![]));
}

#[test]
fn a_handshake_gives_both_a_session_and_the_answering_side_waits_for_proof() {
    let now = Instant::now();
    let [mut one, mut other] = End::pair(zeros(), now);
    let initiation = one.initiate(now, CLOCK);
    let response = other.answer(&initiation, now).unwrap();
    assert!(other.peer.current().is_none(), "nothing is proven yet");
    one.peer.finish(&response, now).unwrap();
    assert_eq!(
        one.peer.finish(&response, now).err(),
        Some(Refused::Unasked)
    );
    let packet = one.seal(b"first", now);
    assert_eq!(other.open(packet.clone(), now), Ok(b"first".to_vec()));
    assert_eq!(other.open(packet, now), Err(OpenError::Replayed));
    let back = other.seal(b"back", now);
    assert_eq!(one.open(back, now), Ok(b"back".to_vec()));
}

#[test]
fn both_may_begin_at_once_and_answers_may_come_late_and_nothing_is_lost() {
    let now = Instant::now();
    let [mut one, mut other] = End::pair(zeros(), now);
    connect(&mut one, &mut other, now);
    let then = now + REKEY_TIMEOUT;
    let old = [one.seal(b"old", then), other.seal(b"old", then)];
    let clock = |seconds| CLOCK + Duration::from_secs(seconds);
    let first = one.initiate(then, clock(5));
    let second = one.initiate(then + TICK, clock(6));
    let theirs = other.initiate(then, clock(5));
    let answers = [
        other.answer(&first, then).unwrap(),
        other.answer(&second, then + TICK).unwrap(),
    ];
    let answer = one.answer(&theirs, then).unwrap();
    // The answer to the first initiation is taken; the second one's comes too late for anything.
    one.peer.finish(&answers[0], then).unwrap();
    assert_eq!(
        one.peer.finish(&answers[1], then).err(),
        Some(Refused::Unasked)
    );
    other.peer.finish(&answer, then).unwrap();
    let new = [one.seal(b"new", then), other.seal(b"new", then)];
    for ([to_other, to_one], expected) in [(new, b"new"), (old, b"old")] {
        assert_eq!(other.open(to_other, then).unwrap(), expected);
        assert_eq!(one.open(to_one, then).unwrap(), expected);
    }
    for (from, to) in [(0, 1), (1, 0)] {
        let ends = [&mut one, &mut other];
        let packet = ends[from].seal(b"later", then);
        assert_eq!(ends[to].open(packet, then).unwrap(), b"later");
    }
}

#[test]
fn handshakes_are_counted_by_who_began_them_and_how_they_ended() {
    let start = Instant::now();
    let [mut one, mut other] = End::pair(zeros(), start);
    connect(&mut one, &mut other, start);
    // Both begin again; the other's is the one that is completed.
    let then = start + REKEY_TIMEOUT;
    let clock = CLOCK + REKEY_TIMEOUT;
    one.initiate(then, clock);
    one.initiate(then + TICK, clock + TICK);
    let theirs = other.initiate(then, clock);
    let answer = one.answer(&theirs, then).unwrap();
    other.peer.finish(&answer, then).unwrap();
    let proof = other.seal(b"", then);
    one.open(proof, then).unwrap();
    // And then nobody answers.
    let later = then + REKEY_TIMEOUT;
    one.initiate(later, clock + REKEY_TIMEOUT);
    one.peer.tick(&one.activity, later + REKEY_ATTEMPT_TIME);
    let counted = Handshakes {
        begun: 3,
        completed: 1,
        overtaken: 1,
        timed_out: 1,
        answered: 1,
        proven: 1,
    };
    assert_eq!(one.peer.handshakes(), counted);
    let counted = Handshakes {
        begun: 1,
        completed: 1,
        answered: 1,
        proven: 1,
        ..Handshakes::default()
    };
    assert_eq!(other.peer.handshakes(), counted);
}

#[test]
fn another_preshared_key_proves_nothing() {
    let now = Instant::now();
    let keys = [PresharedKey::new([5; 32]), PresharedKey::new([6; 32])];
    let [mut one, mut other] = End::pair(keys, now);
    let initiation = one.initiate(now, CLOCK);
    let response = other.answer(&initiation, now).unwrap();
    assert_eq!(one.peer.finish(&response, now).err(), Some(Refused::Forged));
    other.peer.set_preshared_key(PresharedKey::new([5; 32]));
    let later = now + REKEY_TIMEOUT;
    let initiation = one.initiate(later, CLOCK + REKEY_TIMEOUT);
    let response = other.answer(&initiation, later).unwrap();
    one.peer.finish(&response, later).unwrap();
}

#[test]
fn a_forged_or_late_message_changes_nothing() {
    let now = Instant::now();
    let [mut one, mut other] = End::pair(zeros(), now);
    let initiation = one.initiate(now, CLOCK);
    for at in 0..116 {
        let mut changed = initiation;
        changed[at] ^= 4;
        // Bytes 4 to 8 are the sender's number, which the response just carries back.
        if !(4..8).contains(&at) && Received::read(&other.key, &changed).is_some() {
            assert!(at < 4, "byte {at}");
        }
    }
    let response = other.answer(&initiation, now).unwrap();
    let mut changed = response;
    changed[30] ^= 1;
    assert_eq!(one.peer.finish(&changed, now).err(), Some(Refused::Forged));
    one.peer.finish(&response, now).unwrap();
    let again = other.answer(&initiation, now + TICK);
    assert_eq!(again, Err(Refused::Replayed));
}

#[test]
fn a_clock_that_goes_back_does_not_lock_out_a_running_node() {
    let now = Instant::now();
    let [mut one, mut other] = End::pair(zeros(), now);
    let first = one.initiate(now, CLOCK);
    other.answer(&first, now).unwrap();
    let second = one.initiate(now + REKEY_TIMEOUT, Duration::from_secs(1));
    other.answer(&second, now + REKEY_TIMEOUT).unwrap();
}

#[test]
fn a_node_that_starts_again_with_a_clock_that_went_back_is_told_apart_from_a_copy() {
    let now = Instant::now();
    let [mut one, mut other] = End::pair(zeros(), now);
    let first = one.initiate(now, CLOCK);
    other.answer(&first, now).unwrap();
    // The same keys: a reboot.
    let [mut again, _] = End::pair(zeros(), now);
    let hour = Duration::from_secs(3600);
    let late = again.initiate(now + REKEY_TIMEOUT, CLOCK - hour);
    let refused = other.answer(&late, now + REKEY_TIMEOUT);
    assert_eq!(refused, Err(Refused::Older { behind: hour }));
}

#[test]
fn initiations_in_quick_succession_are_answered_fifty_times_a_second() {
    let now = Instant::now();
    let [mut one, mut other] = End::pair(zeros(), now);
    let answered = (0..1000).filter(|ms| {
        let now = now + Duration::from_millis(*ms);
        let initiation = one.initiate(now, CLOCK);
        other.answer(&initiation, now).is_ok()
    });
    assert_eq!(answered.count(), 50);
}

#[test]
fn sessions_are_renewed_in_time_and_no_packet_is_lost_meanwhile() {
    let start = Instant::now();
    let [mut one, mut other] = End::pair(zeros(), start);
    connect(&mut one, &mut other, start);
    let (mut now, mut handshakes) = (start, 0);
    let mut on_the_way = VecDeque::new();
    while now < start + Duration::from_secs(3600) {
        now += TICK;
        // A packet each way, each of which arrives two ticks late, across every renewal.
        on_the_way.push_back((one.seal(b"there", now), other.seal(b"and back", now)));
        if on_the_way.len() > 2 {
            let (there, back) = on_the_way.pop_front().unwrap();
            assert_eq!(other.open(there, now), Ok(b"there".to_vec()));
            assert_eq!(one.open(back, now), Ok(b"and back".to_vec()));
        }
        assert!(
            !other.peer.tick(&other.activity, now).initiate,
            "not its turn"
        );
        if one.peer.tick(&one.activity, now).initiate {
            handshakes += 1;
            let initiation = one.initiate(now, CLOCK + (now - start));
            let response = other.answer(&initiation, now).unwrap();
            one.peer.finish(&response, now).unwrap();
            let keepalive = one.seal(b"", now);
            other.open(keepalive, now).unwrap();
        }
    }
    // Every 120 s, give or take a tick.
    assert!((29..=30).contains(&handshakes), "{handshakes}");
}

#[test]
fn a_silent_session_ends_and_nothing_is_sent_for_it() {
    let start = Instant::now();
    let [mut one, mut other] = End::pair(zeros(), start);
    connect(&mut one, &mut other, start);
    let mut now = start;
    while now < start + REJECT_AFTER_TIME - TICK {
        now += TICK;
        for end in [&mut one, &mut other] {
            assert_eq!(end.peer.tick(&end.activity, now), Due::default());
        }
    }
    for end in [&mut one, &mut other] {
        let due = end.peer.tick(&end.activity, now + TICK);
        assert!(due.idle && due.sessions_changed && !due.initiate, "{due:?}");
        assert_eq!(end.peer.sessions().count(), 0);
    }
}

#[test]
fn received_data_is_answered_within_ten_seconds_if_only_by_a_keepalive() {
    let start = Instant::now();
    let [mut one, mut other] = End::pair(zeros(), start);
    connect(&mut one, &mut other, start);
    let data = one.seal(b"x", start);
    other.open(data, start).unwrap();
    let before = start + KEEPALIVE_TIMEOUT - TICK;
    assert!(!other.peer.tick(&other.activity, before).keepalive);
    let then = start + KEEPALIVE_TIMEOUT;
    assert!(other.peer.tick(&other.activity, then).keepalive);
    let keepalive = other.seal(b"", then);
    one.open(keepalive, then).unwrap();
    assert!(!other.peer.tick(&other.activity, then + TICK).keepalive);
    // And the keepalive answered the data.
    assert!(
        !one.peer
            .tick(&one.activity, start + Duration::from_secs(20))
            .initiate
    );
}

#[test]
fn unanswered_data_brings_a_handshake_and_attempts_end_after_ninety_seconds() {
    let start = Instant::now();
    let [mut one, mut other] = End::pair(zeros(), start);
    connect(&mut one, &mut other, start);
    one.seal(b"lost", start);
    let mut now = start;
    let mut attempts = Vec::new();
    while now < start + Duration::from_secs(120) {
        now += TICK;
        if one.peer.tick(&one.activity, now).initiate {
            attempts.push(now - start);
            one.initiate(now, CLOCK + (now - start));
        }
    }
    assert_eq!(attempts[0], KEEPALIVE_TIMEOUT + REKEY_TIMEOUT);
    let last = *attempts.last().unwrap();
    assert!(last < attempts[0] + REKEY_ATTEMPT_TIME, "{last:?}");
    assert!((16..=18).contains(&attempts.len()), "{}", attempts.len());
    assert!(!one.peer.is_initiating());
}

#[test]
fn who_only_receives_renews_before_the_session_expires() {
    let start = Instant::now();
    let [mut one, mut other] = End::pair(zeros(), start);
    connect(&mut one, &mut other, start);
    let mut now = start;
    let renewed = loop {
        now += Duration::from_secs(1);
        let data = other.seal(b"x", now);
        one.open(data, now).unwrap();
        let keepalive = one.seal(b"", now);
        other.open(keepalive, now).unwrap();
        if one.peer.tick(&one.activity, now).initiate {
            break now - start;
        }
    };
    assert_eq!(renewed, RENEW_WHEN_RECEIVING);
}

#[test]
fn a_persistent_keepalive_goes_out_when_all_is_quiet_and_opens_a_session() {
    let start = Instant::now();
    let [mut one, mut other] = End::pair(zeros(), start);
    one.peer.set_keepalive(Some(Duration::from_secs(25)));
    assert!(
        one.peer.tick(&one.activity, start).initiate,
        "no session yet"
    );
    connect(&mut one, &mut other, start);
    assert!(
        !one.peer
            .tick(&one.activity, start + Duration::from_secs(24))
            .keepalive
    );
    let then = start + Duration::from_secs(25);
    assert!(one.peer.tick(&one.activity, then).keepalive);
    one.seal(b"", then);
    assert!(!one.peer.tick(&one.activity, then + TICK).keepalive);
}

#[test]
fn a_flood_brings_cookies_and_who_shows_one_gets_in() {
    let now = Instant::now();
    let [mut one, mut other] = End::pair(zeros(), now);
    let initiation = one.initiate(now, CLOCK);
    let mut stranger = initiation;
    stranger[117] ^= 1;
    let flood = |other: &mut End, source: &[u8]| {
        let End { gate, key, .. } = other;
        gate.admit(key, &initiation, source, now)
    };
    let mut cookie = None;
    for _ in 0..=HANDSHAKES_PER_SECOND {
        match flood(&mut other, b"here") {
            Admission::Cookie(reply) => cookie = Some(reply),
            Admission::Admitted => {}
            Admission::Stranger | Admission::TooMany => panic!("not yet"),
        }
    }
    let admission = other.gate.admit(&other.key, &stranger, b"here", now);
    assert_eq!(admission, Admission::Stranger);
    let reply = cookie.unwrap();
    let mut forged = reply;
    forged[40] ^= 1;
    assert_eq!(one.peer.receive_cookie(&forged, now), Err(Refused::Forged));
    one.peer.receive_cookie(&reply, now).unwrap();
    let again = one.initiate(now + TICK, CLOCK + TICK);
    let mut show = |source: &[u8]| other.gate.admit(&other.key, &again, source, now);
    assert_eq!(show(b"here"), Admission::Admitted);
    assert!(matches!(show(b"elsewhere"), Admission::Cookie(_)));
    // Nor may one source take all the time there is.
    let admitted = (0..100).filter(|_| show(b"here") == Admission::Admitted);
    assert_eq!(admitted.count(), 19);
    let later = now + Duration::from_secs(1);
    let admission = other.gate.admit(&other.key, &initiation, b"there", later);
    assert_eq!(admission, Admission::Admitted, "the flood is over");
}
