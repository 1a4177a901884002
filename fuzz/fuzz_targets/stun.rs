//! STUN: requests that a relay answers, answers that a node reads.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_wire::reflexive;

fuzz_target!(|input: (bool, u16, &[u8])| {
    let (v6, port, bytes) = input;
    let is_response = reflexive::parse_response(bytes).is_some();
    assert!(!is_response || reflexive::looks_like_stun(bytes));
    let from = if v6 {
        ([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1], port).into()
    } else {
        ([192, 0, 2, 1], port).into()
    };
    if let Some(answer) = reflexive::answer(bytes, from) {
        assert!(answer.len() <= bytes.len(), "it amplifies");
        let (_, address) = reflexive::parse_response(&answer).expect("a good answer");
        assert_eq!(address, from);
    }
});
