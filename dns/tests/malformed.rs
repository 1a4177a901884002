//! Bytes that nobody should send.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::wildcard_enum_match_arm,
    reason = "a test may fail loudly, and its helpers too"
)]

mod common;

use common::{query, view};
use hickory_proto::{
    op::{Edns, Message},
    rr::RecordType,
};
use mesh_dns::answer::{Answer, answer, parse};
use proptest::prelude::*;

/// What a client gets for `bytes`, if anything, as bytes.
fn respond(bytes: &[u8]) -> Option<Vec<u8>> {
    let decided = match parse(bytes) {
        Ok(message) => answer(
            &message,
            Some(&view()),
            &mesh_dns::local::LocalNames::default(),
            None,
        ),
        Err(answer) => *answer,
    };
    match decided {
        Answer::Reply(reply, _) | Answer::Ask { reply, .. } => Some(reply.to_vec().unwrap()),
        Answer::Drop(_) => None,
    }
}

#[track_caller]
fn check(bytes: &[u8]) {
    let Some(response) = respond(bytes) else {
        return;
    };
    assert_eq!(response[..2], bytes[..2], "the id comes back");
    let response = Message::from_vec(&response).unwrap();
    assert_eq!(
        respond(&response.to_vec().unwrap()),
        None,
        "two servers would never stop"
    );
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes: Vec<u8>) {
        check(&bytes);
    }

    #[test]
    fn no_bytes_behind_a_header_make_it_panic(
        flags in 0_u8..0x80,
        counts: [u8; 4],
        bytes: Vec<u8>,
    ) {
        let [a, b, c, d] = counts.map(|count| count % 4);
        let header = [7, 7, flags, 0, 0, a, 0, b, 0, c, 0, d];
        check(&[&header[..], &bytes].concat());
    }

    #[test]
    fn no_damage_to_a_query_makes_it_panic(at in 0_usize..60, byte: u8, cut in 0_usize..80) {
        let mut bytes = query("_http._tcp.db.shop.svc.cluster.local.", RecordType::SRV).to_vec().unwrap();
        if let Some(place) = bytes.get_mut(at) {
            *place = byte;
        }
        bytes.truncate(cut);
        check(&bytes);
    }
}

#[test]
fn a_name_that_points_to_itself_is_malformed() {
    let header = [7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    let pointer_to_itself = [0xc0, 12, 0, 1, 0, 1];
    let response = respond(&[&header[..], &pointer_to_itself].concat()).unwrap();
    assert_eq!(response[3] & 0x0f, 1, "FORMERR");
}

#[test]
fn counts_that_promise_more_than_there_is_are_malformed() {
    let header = [7, 7, 1, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    let response = respond(&header).unwrap();
    assert_eq!(response[3] & 0x0f, 1, "FORMERR");
}

#[test]
fn a_query_with_two_edns_records_is_malformed() {
    let mut asked = query("edge-a1.mesh.", RecordType::A);
    asked.edns = Some(Edns::new());
    let bytes = asked.to_vec().unwrap();
    let options = bytes.split_at(bytes.len() - 11).1; // RFC 6891 §6.1.2
    let mut twice = [&bytes, options].concat();
    twice[11] = 2;
    assert_eq!(respond(&bytes).unwrap()[3] & 0x0f, 0);
    assert_eq!(
        respond(&twice).unwrap()[3] & 0x0f,
        1,
        "FORMERR (RFC 6891 §6.1.1)"
    );
}
