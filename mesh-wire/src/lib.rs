//! Bytes between nodes and relays, and the ids in them.
//!
//! **Invariant:** nothing here allocates by a length that it read from the wire, panics on any
//! input, or knows what time it is.

#![forbid(unsafe_code)]

pub mod announcement;
pub mod id;
pub mod peer;
pub mod reflexive;
pub mod relay;
