//! The relay: sockets around the core's relay server, and its client links.
//!
//! Whom a node may reach through a relay, and what is too much, is decided by
//! `mesh_core::relay_server`; this crate moves the bytes.
//!
//! **Invariant:** nothing here reads a payload, waits for a slow receiver, or keeps state of its
//! own beyond sockets, queues and counters.

#![forbid(unsafe_code)]

use std::time::Duration;

pub mod client;
pub mod config;
pub mod server;

mod queue;
mod quic;
mod sockets;
mod websocket;

/// Frames handed on at once: what one UDP send takes.
const BATCH_FRAMES: usize = 64;

/// How often an idle link says that it is there: under the 30 s after which the hastiest NATs
/// forget a UDP mapping (RFC 4787 §4.3 asks for 120 s), twice over.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Silence after which a link is dead: two keep-alives lost, and 5 s for the third.
const IDLE_TIMEOUT: Duration = Duration::from_secs(35);
