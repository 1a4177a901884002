//! What unit tests share.

use std::{sync::OnceLock, time::Instant};

/// The moment from which tests count.
#[expect(
    clippy::disallowed_methods,
    reason = "tests need one real instant to start from"
)]
pub(crate) fn start() -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    *START.get_or_init(Instant::now)
}
