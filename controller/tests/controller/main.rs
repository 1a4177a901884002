//! The real binary over real sockets on loopback.

#![forbid(unsafe_code)]

mod faults;
mod joining;
mod lab;
mod syncing;
