//! Every decision of the mesh, and none of its I/O.
//!
//! **Invariant:** nothing here opens a socket or a file, reads a clock, spawns, blocks or logs
//! above `DEBUG` per packet. The same inputs at the same times give the same outputs.

#![forbid(unsafe_code)]

pub mod gateways;
pub mod io;
pub mod node;
pub mod offline;
pub mod pattern;
pub mod policy;
pub mod proxy;
pub mod relay_server;
pub mod services;
pub mod snapshot;
#[cfg(test)]
mod testing;
