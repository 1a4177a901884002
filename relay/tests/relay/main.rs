//! The real relay binary, real sockets, and the client that the agent uses.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests may fail loudly too; clippy only knows the tests themselves"
)]

mod bad_input;
mod faults;
mod harness;
mod links;
mod reflexive;
mod small_mtu;
mod udp;
