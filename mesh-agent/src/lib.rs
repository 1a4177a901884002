//! The node daemon: drives the core, performs its outputs, and publishes tables to the packet
//! path, the kernel and the DNS listener.
//!
//! **Invariant:** no decision is taken here that a pure test could reach: those are in
//! `mesh-core`. No private key leaves the state folder.

#![forbid(unsafe_code)]

#[cfg(holdfast_bench_no_cipher)]
compile_error!(
    "a product without its cipher: holdfast_bench_no_cipher is for benches of mesh-tunnel"
);

pub mod admin;
pub mod agent;
pub mod callers;
pub mod clamp;
pub mod cni;
pub mod config;
pub mod desired;
pub mod driver;
pub mod drops;
pub mod exchange;
pub mod health;
pub mod interfaces;
pub mod journal;
pub mod links;
pub mod loads;
pub mod mapping;
pub mod metrics;
mod mutual;
pub mod neighbours;
pub mod network;
pub mod outliers;
pub mod peer_relay;
pub mod policy;
pub mod portmap;
pub mod proxy;
pub mod publish;
pub mod redirect;
pub mod report;
mod resolve;
pub mod routes;
mod settle;
pub mod slots;
pub mod sockets;
pub mod state;
pub mod store;
pub mod sync;
pub mod trace;
pub mod uplinks;
