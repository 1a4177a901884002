//! Handshake messages and sealed packets, from changed copies of real ones: zeros change nothing, so
//! the fuzzer starts behind the checks that it could never guess its way through.

#![no_main]

use std::{
    cell::RefCell,
    sync::Arc,
    time::{Duration, Instant},
};

use libfuzzer_sys::fuzz_target;
use mesh_tunnel::internals;
use mesh_wireguard::{
    gate::{Admission, Gate, HANDSHAKES_PER_SECOND},
    keys::{LocalKey, PresharedKey},
    message::{INITIATION_LEN, Kind, OVERHEAD},
    peer::{Peer, Received},
    session::Session,
};

/// Real messages, and those who wait for them.
struct Real {
    now: Instant,
    local: LocalKey,
    initiation: Vec<u8>,
    initiator: Peer,
    response: Vec<u8>,
    reply: Vec<u8>,
    sealed: Vec<u8>,
    session: Arc<Session>,
}

impl Real {
    fn make() -> Option<Self> {
        let (now, clock) = (Instant::now(), Duration::from_secs(1_800_000_000));
        let (other, local) = (LocalKey::new([1; 32]), LocalKey::new([2; 32]));
        let mut initiator = Peer::new(local.public(), PresharedKey::default(), None);
        let initiation = initiator.initiate(&other, 1, now, clock)?;
        let received = Received::read(&local, &initiation)?;
        let mut responder = Peer::new(other.public(), PresharedKey::default(), None);
        let (response, _) = responder.respond(received, 2, now).ok()?;
        let mut gate = Gate::default();
        let admit = |_| match gate.admit(&local, &initiation, b"source", now) {
            Admission::Cookie(reply) => Some(reply),
            _ => None,
        };
        let reply = (0..=HANDSHAKES_PER_SECOND).find_map(admit)?;
        let [from, session] = internals::sessions(now)?;
        let mut sealed = vec![7; 64 + OVERHEAD];
        from.seal(from.reserve(1)?, &mut sealed).then_some(())?;
        Some(Self {
            now,
            local,
            initiation: initiation.to_vec(),
            initiator,
            response: response.to_vec(),
            reply: reply.to_vec(),
            sealed,
            session,
        })
    }
}

thread_local! {
    static REAL: RefCell<Real> = RefCell::new(Real::make().expect("a handshake"));
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
    let is_initiation = Kind::of(change) == Some(Kind::Initiation);
    assert!(!is_initiation || change.len() == INITIATION_LEN);
    REAL.with_borrow_mut(|real| match which % 4 {
        // The sender's own number, and the type, are authenticated by mac1 alone, which is the gate's.
        0 => {
            let came = changed(&real.initiation, change);
            let admission = Gate::default().admit(&real.local, &came, b"source", real.now);
            let is_real = came.get(..132) == Some(&real.initiation[..132]);
            assert_eq!(
                admission == Admission::Admitted,
                is_real && came.len() == 148
            );
            if Received::read(&real.local, &came).is_some() {
                assert_eq!(came[8..116], real.initiation[8..116]);
            }
        }
        1 => {
            let came = changed(&real.response, change);
            if real.initiator.finish(&came, real.now).is_ok() {
                assert_eq!(came[8..60], real.response[8..60]);
                *real = Real::make().expect("another handshake");
            }
        }
        2 => {
            let came = changed(&real.reply, change);
            let taken = real.initiator.receive_cookie(&came, real.now).is_ok();
            assert_eq!(taken, came == real.reply);
        }
        _ => {
            let mut came = changed(&real.sealed, change);
            let is_real = came.get(8..) == Some(&real.sealed[8..]);
            assert_eq!(real.session.open(&mut came, real.now).is_ok(), is_real);
        }
    });
});
