//! The device program as people use it: real processes, `wg`, `ip`, `ping`, `iperf3` and other
//! WireGuard programs in network namespaces. Needs root; `harness::tool` names what is missing.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "tests fail loudly"
)]

mod harness;
mod interop;
mod netns;
mod process;
mod quick;
mod socket;
