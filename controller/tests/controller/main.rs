//! The real binary over real sockets on loopback.

#![forbid(unsafe_code)]
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests may fail loudly, and clippy sees only functions marked as such"
)]

mod faults;
mod joining;
mod lab;
mod restored;
mod syncing;
mod traces;
