//! Helpers of the tests, and tests of one core by itself. Many cores together are tested in
//! `tests/sim`.

use std::{
    sync::OnceLock,
    time::{Duration, Instant},
};

use mesh_wire::id::RelayId;

use crate::snapshot::Relay;

/// The moment from which tests count.
#[expect(
    clippy::disallowed_methods,
    reason = "tests need one real instant to start from"
)]
pub(crate) fn start() -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    *START.get_or_init(Instant::now)
}

/// Milliseconds after the start.
pub(crate) fn at(ms: u64) -> Instant {
    start() + Duration::from_millis(ms)
}

/// A relay at `192.0.2.<host>`, which answers on ports 443 and 3478.
pub(crate) fn relay(name: &str, host: u8) -> (RelayId, Relay) {
    let name = name.parse().unwrap();
    let relay = Relay {
        addresses: vec![[192, 0, 2, host].into()],
        quic_port: 443,
        tls_port: 443,
        stun_ports: vec![443, 3478],
        name,
    };
    (RelayId::from(&relay.name), relay)
}
