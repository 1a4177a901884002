//! The relay: sockets around the core's relay server, and its client links.
//!
//! Whom a node may reach through a relay, and what is too much, is decided by
//! `mesh_core::relay_server`; this crate moves the bytes.
//!
//! **Invariant:** nothing here reads a payload, waits for a slow receiver, or keeps state of its
//! own beyond sockets, queues and counters.

#![forbid(unsafe_code)]

pub mod client;
pub mod config;
pub mod server;

mod outlet;
mod quic;
mod sockets;
mod websocket;
