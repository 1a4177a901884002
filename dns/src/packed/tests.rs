use std::str::FromStr as _;

use hickory_proto::{
    op::{Edns, Message, Query},
    rr::{Name, RecordType, rdata::opt::EdnsOption},
};
use mesh_core::snapshot::{MeshSettings, Snapshot};
use mesh_wire::id::MeshId;
use proptest::prelude::*;

use super::*;

const NO_ERROR: Said = Said {
    code: ResponseCode::NoError,
    cut: false,
    may_be_denied: false,
};

fn query(id: u16, name: &str, change: impl FnOnce(&mut Message)) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.id = id;
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_str(name).unwrap(), RecordType::A));
    change(&mut message);
    message.to_vec().unwrap()
}

fn with_edns(message: &mut Message) {
    message.set_edns(Edns::new());
}

/// A reply whose bytes can be told apart.
fn reply_to(query: &[u8], mark: u8) -> Vec<u8> {
    let mut reply = query.to_vec();
    reply[2] |= 0x80;
    reply.push(mark);
    reply
}

fn ask(packed: &mut Packed, query: &[u8]) -> Option<Vec<u8>> {
    let mut reply = Vec::new();
    packed.reply(query, &mut reply, false).map(|_| reply)
}

fn now() -> Instant {
    Instant::now()
}

#[test]
fn the_question_is_repeated_as_asked_with_its_id() {
    let mut packed = Packed::new(2, now());
    let first = query(7, "Kiosk.Shop.svc.cluster.local.", with_edns);
    packed.keep(&first, &reply_to(&first, 1), NO_ERROR, false);
    let second = query(0x1234, "kIOSK.shop.svc.CLUSTER.local.", with_edns);
    assert_eq!(ask(&mut packed, &second), Some(reply_to(&second, 1)));
}

#[test]
fn what_policy_may_deny_to_a_pod_is_not_ready_for_one() {
    let mut packed = Packed::new(2, now());
    for (name, may_be_denied) in [("kiosk.", false), ("db.", true)] {
        let asked = query(7, name, with_edns);
        let said = Said {
            may_be_denied,
            ..NO_ERROR
        };
        packed.keep(&asked, &reply_to(&asked, 1), said, false);
        for for_caller in [false, true] {
            let ready = packed.reply(&asked, &mut Vec::new(), for_caller);
            assert_eq!(ready.is_some(), !(for_caller && may_be_denied), "{name}");
        }
    }
}

#[test]
fn what_the_answer_depends_on_tells_questions_apart() {
    let mut packed = Packed::new(2, now());
    let known = query(7, "kiosk.", with_edns);
    packed.keep(&known, &reply_to(&known, 1), NO_ERROR, false);
    let others = [
        query(7, "kiosk.", |_| {}),
        query(7, "kiosks.", with_edns),
        query(7, "kiosk.", |message| {
            let mut edns = Edns::new();
            edns.set_max_payload(4096);
            message.set_edns(edns);
        }),
        query(7, "kiosk.", |message| {
            with_edns(message);
            message.metadata.recursion_desired = false;
        }),
        query(7, "kiosk.", |message| {
            with_edns(message);
            let aaaa = Query::query(Name::from_str("kiosk.").unwrap(), RecordType::AAAA);
            message.queries = vec![aaaa];
        }),
    ];
    for other in others {
        assert_eq!(ask(&mut packed, &other), None);
    }
    // 0x41 and 0x61 are two types, not two cases.
    let typed = |number| {
        query(7, "kiosk.", |message| {
            let unknown = RecordType::from(number);
            message.queries = vec![Query::query(Name::from_str("kiosk.").unwrap(), unknown)];
        })
    };
    let https = typed(0x41);
    packed.keep(&https, &reply_to(&https, 2), NO_ERROR, false);
    assert_eq!(ask(&mut packed, &typed(0x61)), None);
}

#[test]
fn what_is_not_one_plain_question_is_never_kept() {
    let mut packed = Packed::new(2, now());
    let with_option = query(7, "kiosk.", |message| {
        let mut edns = Edns::new();
        edns.options_mut()
            .insert(EdnsOption::Unknown(10, vec![1; 8]));
        message.set_edns(edns);
    });
    let two = query(7, "kiosk.", |message| {
        message.queries.push(message.queries[0].clone());
    });
    let mut response = query(7, "kiosk.", |_| {});
    response[2] |= 0x80;
    let mut trailing = query(7, "kiosk.", |_| {});
    trailing.push(0);
    let mut pointer = query(7, "kiosk.", |_| {});
    pointer[12] = 0xc0;
    for query in [with_option, two, response, trailing, pointer] {
        packed.keep(&query, &reply_to(&query, 1), NO_ERROR, false);
        assert_eq!(ask(&mut packed, &query), None);
    }
    assert_eq!(packed.bytes, 0);
}

#[test]
fn several_answers_are_kept_in_several_orders_and_those_for_a_time() {
    let start = now();
    let mut packed = Packed::new(2, start);
    let of = |id| query(id, "db.", |_| {});
    packed.keep(&of(0), &reply_to(&of(0), 1), NO_ERROR, true);
    assert_eq!(ask(&mut packed, &of(1)), None);
    packed.keep(&of(1), &reply_to(&of(1), 2), NO_ERROR, true);
    let bytes = packed.bytes;
    packed.begin(None, start + AGE_MAX * 99 / 100);
    assert_eq!(ask(&mut packed, &of(8)).unwrap().last(), Some(&1));
    assert_eq!(ask(&mut packed, &of(9)).unwrap().last(), Some(&2));
    // Others get their turn, in the room of those before.
    packed.begin(None, start + AGE_MAX);
    assert_eq!(ask(&mut packed, &of(8)), None);
    packed.keep(&of(8), &reply_to(&of(8), 3), NO_ERROR, true);
    assert_eq!(ask(&mut packed, &of(0)).unwrap().last(), Some(&3));
    assert_eq!(ask(&mut packed, &of(9)), None);
    packed.keep(&of(9), &reply_to(&of(9), 4), NO_ERROR, true);
    assert_eq!(ask(&mut packed, &of(1)).unwrap().last(), Some(&4));
    assert_eq!(packed.bytes, bytes);
}

#[test]
fn another_view_makes_it_forget_and_time_alone_does_not() {
    let view = || {
        let mesh = MeshSettings::with_defaults(MeshId([1; 32]), "test");
        Arc::new(View::new(
            Arc::new(Snapshot::empty(mesh)),
            "a".parse().unwrap(),
        ))
    };
    let (first, second, start) = (view(), view(), now());
    let mut packed = Packed::new(2, start);
    let question = query(7, "kiosk.", |_| {});
    let mut known_after = |view: Option<&Arc<View>>, at| {
        packed.begin(view, at);
        let known = ask(&mut packed, &question).is_some();
        packed.keep(&question, &reply_to(&question, 1), NO_ERROR, false);
        known
    };
    assert!(!known_after(Some(&first), start));
    assert!(known_after(Some(&first), start + 100 * AGE_MAX));
    assert!(!known_after(Some(&second), start));
    assert!(!known_after(None, start));
    assert!(known_after(None, start + 100 * AGE_MAX));
}

#[test]
fn when_it_is_full_it_begins_anew() {
    let mut packed = Packed::new(2, now());
    let mut kept = 0;
    for n in 0..40_000_u32 {
        let question = query(7, &format!("name-{n}.shop.svc.cluster.local."), |_| {});
        packed.keep(&question, &[0; 300], NO_ERROR, false);
        assert!(packed.bytes <= BYTES_MAX / 2);
        kept = kept.max(packed.entries.len());
    }
    assert!(kept > 5_000 && packed.entries.len() < kept, "{kept}");
}

proptest! {
    #[test]
    fn no_bytes_panic(query in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut packed = Packed::new(2, now());
        packed.keep(&query, &query, NO_ERROR, true);
        let mut reply = Vec::new();
        packed.reply(&query, &mut reply, false);
    }
}
