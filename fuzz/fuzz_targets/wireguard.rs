//! Handshake messages and sealed packets, from changed copies of real ones: zeros change nothing, so
//! the fuzzer starts behind the checks that it could never guess its way through.

#![no_main]

use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

use libfuzzer_sys::fuzz_target;
use mesh_tunnel::internals;
use mesh_wireguard::{
    gate::{Admission, Gate, HANDSHAKES_PER_SECOND},
    keys::{LocalKey, PresharedKey},
    message::{Kind, OVERHEAD},
    peer::{Peer, Received},
};

const CLOCK: Duration = Duration::from_secs(1_800_000_000);

static NOW: LazyLock<Instant> = LazyLock::new(Instant::now);
static KEYS: LazyLock<[LocalKey; 2]> =
    LazyLock::new(|| [LocalKey::new([1; 32]), LocalKey::new([2; 32])]);

fn peer(of: usize) -> Peer {
    Peer::new(KEYS[of].public(), PresharedKey::default(), None)
}

/// `real` with the bits of `change` turned over, and as much shorter or longer as it says.
fn changed(real: &[u8], change: &[u8]) -> Vec<u8> {
    let (cut, change) = change.split_first().unwrap_or((&0, &[]));
    let mut bytes = real.to_vec();
    let len = (bytes.len() + usize::from(cut >> 4)).saturating_sub(usize::from(cut & 0xf));
    bytes.resize(len, 0);
    for (byte, change) in bytes.iter_mut().zip(change) {
        *byte ^= change;
    }
    bytes
}

fuzz_target!(|input: (u8, &[u8])| {
    let (which, change) = input;
    let now = *NOW;
    Kind::of(change);
    let mut gate = Gate::default();
    let mut one = peer(1);
    let initiation = one.initiate(&KEYS[0], 1, now, CLOCK).unwrap();
    match which % 4 {
        0 => {
            let came = changed(&initiation, change);
            gate.admit(&KEYS[1], &came, b"source", now);
            if let Some(received) = Received::read(&KEYS[1], &came) {
                // MACs and type are not the handshake's to check.
                assert_eq!(came[4..116], initiation[4..116]);
                assert!(peer(0).respond(received, 2, now).is_ok());
            }
        }
        1 => {
            let received = Received::read(&KEYS[1], &initiation).unwrap();
            let (response, _) = peer(0).respond(received, 2, now).unwrap();
            let came = changed(&response, change);
            let finished = one.finish(&came, now).is_ok();
            // The sender's own number is not authenticated by Noise, but by mac1.
            assert!(!finished || came[8..60] == response[8..60]);
        }
        2 => {
            let admit = |gate: &mut Gate| gate.admit(&KEYS[1], &initiation, b"source", now);
            let mut admission = admit(&mut gate);
            for _ in 0..HANDSHAKES_PER_SECOND {
                admission = admit(&mut gate);
            }
            let Admission::Cookie(reply) = admission else {
                panic!("no cookie under load");
            };
            let came = changed(&reply, change);
            let taken = one.receive_cookie(&came, now).is_ok();
            assert!(!taken || came == reply);
        }
        _ => {
            let [from, to] = internals::sessions(now).unwrap();
            let mut sealed = [7; 64 + OVERHEAD];
            assert!(from.seal(from.reserve(1).unwrap(), &mut sealed));
            let mut came = changed(&sealed, change);
            let same = came.get(8..) == Some(&sealed[8..]);
            assert_eq!(to.open(&mut came, now).is_ok(), same);
        }
    }
});
