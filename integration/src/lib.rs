//! What tests with real counterparts share: a stand-in for a Kubernetes API server, and helpers for
//! container runtimes and `kubectl`.
//!
//! **Invariant:** nothing of the product depends on this crate, and nothing here reaches a cluster
//! or a registry: every counterpart runs on this machine and ends with its test.

#![forbid(unsafe_code)]

pub mod apiserver;
pub mod joining;
pub mod kubelet;
