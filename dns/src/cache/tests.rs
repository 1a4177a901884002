use std::str::FromStr;

use hickory_proto::{
    op::OpCode,
    rr::{
        Record,
        rdata::{A, SOA},
    },
};

use super::*;

fn key(name: &str) -> Key {
    Key {
        name: Name::from_str(name).unwrap(),
        query_type: RecordType::A,
        dnssec_ok: false,
        checking_disabled: false,
    }
}

fn positive(ttl_s: u32) -> Message {
    let mut message = Message::response(7, OpCode::Query);
    let name = Name::from_str("example.org.").unwrap();
    message.add_answer(Record::from_rdata(
        name,
        ttl_s,
        RData::A(A::new(192, 0, 2, 1)),
    ));
    message
}

fn negative(soa_ttl_s: u32, minimum_s: u32) -> Message {
    let mut message = Message::response(7, OpCode::Query);
    message.metadata.response_code = ResponseCode::NXDomain;
    let zone = Name::from_str("org.").unwrap();
    let soa = SOA::new(zone.clone(), zone.clone(), 1, 1, 1, 1, minimum_s);
    message.add_authority(Record::from_rdata(zone, soa_ttl_s, RData::SOA(soa)));
    message
}

fn insert(cache: &mut Cache, name: &str, message: &Message, now: Instant) {
    cache.insert(key(name), message.to_vec().unwrap(), message, now);
}

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

#[test]
fn an_answer_counts_down_then_is_stale_then_is_gone() {
    let (mut cache, start) = (Cache::new(DEFAULT_STALE_MAX), Instant::now());
    insert(&mut cache, "example.org.", &positive(60), start);
    let ttl = |cached| match cached {
        Some(Cached::Fresh(message)) => ("fresh", message.answers[0].ttl),
        Some(Cached::Ending(message)) => ("ending", message.answers[0].ttl),
        Some(Cached::Stale(message)) => ("stale", message.answers[0].ttl),
        None => ("gone", 0),
    };
    let mut at = |count| ttl(cache.get(&key("example.org."), start + seconds(count)));
    assert_eq!(at(0), ("fresh", 60));
    assert_eq!(at(59), ("fresh", 1));
    assert_eq!(at(60), ("stale", STALE_TTL_S));
    assert_eq!(at(60 + 86_399), ("stale", STALE_TTL_S));
    assert_eq!(at(60 + 86_400), ("gone", 0));
}

#[test]
fn what_is_asked_for_often_is_asked_for_anew_near_its_end_and_once() {
    let (mut cache, start) = (Cache::new(Duration::ZERO), Instant::now());
    for name in ["often.org.", "seldom.org."] {
        insert(&mut cache, name, &positive(60), start);
    }
    let mut ending = |name: &str, count| {
        let cached = cache.get(&key(name), start + seconds(count));
        matches!(cached.unwrap(), Cached::Ending(_))
    };
    assert!(!ending("seldom.org.", 59));
    let asked = [10, 20, 53, 54, 55].map(|count| ending("often.org.", count));
    assert_eq!(asked, [false, false, false, true, false]);
    insert(&mut cache, "often.org.", &positive(60), start + seconds(56));
    assert_eq!(
        cache.get(&key("often.org."), start + seconds(116)),
        None,
        "nothing stale"
    );
}

#[test]
fn what_may_not_be_kept_is_not() {
    let truncated = {
        let mut message = positive(60);
        message.metadata.truncation = true;
        message
    };
    let failed = {
        let mut message = positive(60);
        message.metadata.response_code = ResponseCode::ServFail;
        message
    };
    let no_soa = {
        let mut message = negative(60, 60);
        message.authorities.clear();
        message
    };
    for (case, message, want) in [
        ("no time", positive(0), 0),
        ("truncated", truncated, 0),
        ("failed", failed, 0),
        ("a no without SOA", no_soa, 0),
        ("a no: the SOA's minimum", negative(60, 20), 20),
        ("a no: the SOA's own time", negative(10, 20), 10),
        (
            "a no: for ever",
            negative(99_999, 99_999),
            NEGATIVE_TTL_MAX_S,
        ),
        ("for ever", positive(99_999), POSITIVE_TTL_MAX_S),
    ] {
        assert_eq!(ttl_s(&message), want, "{case}");
    }
}

#[test]
fn the_oldest_answers_make_room() {
    let (mut cache, now) = (Cache::new(DEFAULT_STALE_MAX), Instant::now());
    insert(&mut cache, "refreshed.org.", &positive(60), now);
    for index in 0..ENTRIES_MAX {
        insert(&mut cache, &format!("n{index}.org."), &positive(60), now);
        insert(&mut cache, "refreshed.org.", &positive(60), now);
    }
    assert_eq!(cache.entries.len(), ENTRIES_MAX);
    assert_eq!(cache.by_age.len(), ENTRIES_MAX);
    assert!(cache.get(&key("refreshed.org."), now).is_some());
    assert!(cache.get(&key("n0.org."), now).is_none());
}
