//! The lab: nodes, NATs, firewalls and bad links on one Linux machine, in network namespaces.
//!
//! A [`lab::Lab`] owns namespaces, cgroups, processes and files under one id; a guardian process
//! takes them away when the lab is dropped and also when its owner is killed. Scenarios with the
//! real binaries are in `tests/`, the demonstration and the benches in `xtask`.
//!
//! **Invariant:** nothing here sends a packet outside the lab's own namespaces, changes the
//! host's network configuration, or outlives its owner unless [`lab::Lab::keep`] was called.

pub mod document;
pub mod kept;
pub mod lab;
pub mod link;
pub mod load;
pub mod logs;
pub mod matrix;
pub mod mesh;
pub mod name_server;
pub mod nat;
pub mod node;
pub mod probe;
pub mod site;
pub mod stream;
mod sys;
pub mod tool;
pub mod traffic;
