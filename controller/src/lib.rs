//! Desired state, node registry, certificate authority, delta distribution.
//!
//! **Invariant:** nothing here is on the packet path, and a bad manifest takes away nothing that
//! was good before.

#![forbid(unsafe_code)]

pub mod admin;
pub mod change;
pub mod cluster;
pub mod config;
pub mod control;
pub mod desired;
pub mod history;
pub mod kubernetes;
pub mod lineage;
pub mod manifests;
pub mod metrics;
pub mod policy_test;
pub mod ready;
pub mod removal;
pub mod run;
pub mod shared;
pub mod state;
pub mod status;
pub mod store;
pub mod token;
