//! The packet path: TUN ⇄ WireGuard ⇄ UDP or relay links.
//!
//! **Invariant:** nothing here decides which path a peer's packets take. Whoever holds the
//! [`tunnel::Tunnel`] says it, and learns by [`tunnel::TunnelEvent`]s and counters what happened. A
//! packet never waits for an answer from outside, and every packet that is dropped is counted.

#![forbid(unsafe_code)]

mod batch;
mod burst;
mod checksum;
mod coalesce;
mod control;
mod ecn;
pub mod egress;
mod icmp;
mod inbound;
#[doc(hidden)]
pub mod internals;
mod outbound;
mod peer;
mod queue;
#[cfg(test)]
mod roundtrip_tests;
pub mod route;
mod segment;
pub mod stats;
mod transmit;
pub mod tunnel;
mod worker;
