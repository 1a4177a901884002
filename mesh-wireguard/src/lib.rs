//! The WireGuard protocol (J. A. Donenfeld, *WireGuard: Next Generation Kernel Network Tunnel*,
//! 2020-06-01; "the paper" below) without sockets.
//!
//! **Invariant:** time, randomness of indices and everything that arrives are arguments; nothing here
//! opens, waits, spawns or reads a clock. What many threads use at once ([`session::Session`],
//! [`timers::Activity`]) changes by atomic steps; the rest ([`peer::Peer`], [`gate::Gate`]) belongs
//! to one lock.

#![forbid(unsafe_code)]

pub mod gate;
mod handshake;
pub mod keys;
mod mac;
pub mod message;
pub mod peer;
pub mod session;
pub mod timers;
mod window;
