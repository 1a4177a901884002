//! The CNI plug-in: connects pods to the node, with addresses of the node's pod ranges, or records what another plug-in
//! connected.
//!
//! **Invariant:** one process for one order of the runtime. It needs no API server and no running agent, leaves no
//! process behind, and changes no interface, route or setting but those of the pod that it was told of.

#![forbid(unsafe_code)]

pub mod allocate;
pub mod check;
pub mod config;
pub mod egress;
pub mod environment;
pub mod error;
pub mod guard;
pub mod install;
pub mod kernel;
pub mod plugin;
pub mod result;
pub mod store;
pub mod version;
