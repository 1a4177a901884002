//! DNS for one node: the mesh's own names from the snapshot, everything else from upstreams.
//!
//! **Invariant:** names of the mesh's own zones are answered from the [`View`] alone, less what policy
//! denies to the pod that asks where that is wanted, and never leave the node; nothing here invents a
//! name that the snapshot does not hold. Deciding ([`answer`]) does no I/O and reads no
//! clock; only [`server`] and [`client`] touch sockets.
//!
//! [`View`]: mesh_core::services::View

#![forbid(unsafe_code)]

pub mod answer;
mod cache;
pub mod client;
mod clients;
pub mod counters;
mod datagrams;
mod forward;
pub mod inspect;
mod limit;
pub mod local;
mod log;
mod outbox;
mod packed;
pub mod server;
pub mod upstream;
mod wire;
mod zone;
