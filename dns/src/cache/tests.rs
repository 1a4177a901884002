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

#[test]
fn names_that_there_are_not_take_no_room_from_those_that_there_are() {
    let (mut cache, now) = (Cache::new(DEFAULT_STALE_MAX), Instant::now());
    insert(&mut cache, "known.org.", &positive(60), now);
    for index in 0..2 * ENTRIES_MAX {
        insert(
            &mut cache,
            &format!("n{index}.org."),
            &negative(60, 60),
            now,
        );
    }
    assert_eq!(cache.len(), NXDOMAINS_MAX + 1);
    assert!(cache.get(&key("known.org."), now).is_some());
    assert!(cache.get(&key("n0.org."), now).is_none());
    // A name that comes to be, and one that goes.
    let last = format!("n{}.org.", 2 * ENTRIES_MAX - 1);
    insert(&mut cache, &last, &positive(60), now);
    insert(&mut cache, "known.org.", &negative(60, 60), now);
    assert_eq!(
        (cache.len(), cache.nxdomains.len()),
        (NXDOMAINS_MAX + 1, NXDOMAINS_MAX)
    );
    cache.forget(u64::MAX, &Name::root());
    let left = NXDOMAINS_MAX + 1 - LOOK_ENTRIES_MAX;
    assert_eq!((cache.len(), cache.nxdomains.len()), (left, left));
}

/// Walks through all of it, as the forwarder does.
fn look_through(cache: &Cache, below: &str, copies_max: usize, now: Instant) -> (Vec<Seen>, usize) {
    let below = Name::from_str(below).unwrap();
    let (mut seen, mut matching) = (Vec::new(), 0);
    let mut next = Some(u64::MAX);
    while let Some(before) = next {
        let look = cache.look(before, &below, copies_max - seen.len(), now);
        seen.extend(look.seen);
        matching += look.matching;
        next = look.next;
    }
    (seen, matching)
}

#[test]
fn a_look_has_the_newest_first_a_domain_with_what_is_below_it_and_no_more_than_was_asked_for() {
    let (mut cache, start) = (Cache::new(seconds(100)), Instant::now());
    for number in 0..200 {
        insert(
            &mut cache,
            &format!("{number}.example.org."),
            &positive(60),
            start,
        );
    }
    insert(&mut cache, "example.net.", &positive(3600), start);
    let at = start + seconds(70);
    let (all, matching) = look_through(&cache, ".", 1000, at);
    assert_eq!((all.len(), matching), (201, 201));
    assert_eq!(all[0].key, key("example.net."));
    assert_eq!(all[1].key, key("199.example.org."));
    assert_eq!(all[200].key, key("0.example.org."));
    let (some, matching) = look_through(&cache, "Example.org.", 70, at);
    assert_eq!((some.len(), matching), (70, 200));
    let (one, _) = look_through(&cache, "7.example.org.", 70, at);
    assert_eq!(one.len(), 1);
    assert_eq!(
        look_through(&cache, "ample.org.", 70, at).1,
        0,
        "labels, not letters"
    );
    // What may not be given any more is not there.
    let (left, matching) = look_through(&cache, ".", 1000, start + seconds(160));
    assert_eq!((left.len(), matching), (1, 1));
}

#[test]
fn what_is_told_of_an_answer_counts_down_and_looking_is_not_asking() {
    use crate::inspect::CachedAnswer;
    let (mut cache, start) = (Cache::new(seconds(100)), Instant::now());
    let mut message = positive(60);
    (1..=10).for_each(|_| message.answers.push(message.answers[0].clone()));
    insert(&mut cache, "example.org.", &message, start);
    insert(&mut cache, "no.example.org.", &negative(60, 60), start);
    cache.get(&key("example.org."), start).unwrap();
    let told = |at| -> Vec<CachedAnswer> {
        let (seen, _) = look_through(&cache, ".", 10, at);
        let told = seen
            .iter()
            .filter_map(|one| CachedAnswer::new(one, seconds(100), at));
        told.collect()
    };
    let [no, yes] = told(start + seconds(20)).try_into().unwrap();
    assert_eq!((no.code.as_str(), no.records.len()), ("NXDOMAIN", 0));
    assert_eq!(
        (yes.name.as_str(), yes.record_type.as_str()),
        ("example.org.", "A")
    );
    assert_eq!((yes.code.as_str(), yes.hits), ("NOERROR", 1));
    assert_eq!((yes.records.len(), yes.records_all), (8, 11));
    assert_eq!(yes.records[0], "example.org. 40 IN A 192.0.2.1");
    assert_eq!(
        (yes.left, yes.stale_left),
        (Some(seconds(40)), seconds(140))
    );
    let [_, stale] = told(start + seconds(90)).try_into().unwrap();
    assert_eq!((stale.left, stale.stale_left), (None, seconds(70)));
    assert_eq!(stale.hits, 1);
}

#[test]
fn what_is_forgotten_is_gone_and_nothing_else() {
    let (mut cache, start) = (Cache::new(seconds(100)), Instant::now());
    for number in 0..200 {
        insert(
            &mut cache,
            &format!("{number}.example.org."),
            &positive(60),
            start,
        );
        insert(
            &mut cache,
            &format!("{number}.example.net."),
            &positive(60),
            start,
        );
    }
    let below = Name::from_str("example.org.").unwrap();
    let (mut count, mut next) = (0, Some(u64::MAX));
    while let Some(before) = next {
        let (forgotten, rest) = cache.forget(before, &below);
        count += forgotten.len();
        next = rest;
    }
    assert_eq!((count, cache.len()), (200, 200));
    assert!(cache.get(&key("7.example.org."), start).is_none());
    assert!(cache.get(&key("7.example.net."), start).is_some());
    assert_eq!(look_through(&cache, ".", 1000, start).1, 200);
    assert_eq!(cache.by_age.len(), 200);
}

/// The threads that answer wait for one look at most: it has to be as short as what they wait for each other.
#[test]
fn a_look_at_a_full_cache_of_large_answers_goes_through_a_part_of_it() {
    let (mut cache, start) = (Cache::new(seconds(100)), Instant::now());
    for number in 0..ENTRIES_MAX {
        let name = format!("{number}.example.org.");
        cache.insert(key(&name), vec![0; ENTRY_MAX_BYTES], &positive(60), start);
    }
    let began = Instant::now();
    let look = cache.look(u64::MAX, &Name::root(), usize::MAX, start);
    let took = began.elapsed();
    assert_eq!(
        (look.seen.len(), look.matching),
        (LOOK_ENTRIES_MAX, LOOK_ENTRIES_MAX)
    );
    assert!(look.next.is_some());
    println!("one look holds the lock for {took:?}");
}
