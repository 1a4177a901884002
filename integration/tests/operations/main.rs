//! From an API server that has no way into the mesh to kubelets behind NAT: `kubectl`, `curl` and `ssh` through the CONNECT
//! proxy of an agent, over real agents and a real relay; and the days when something of that is gone.

#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test may fail loudly"
)]

mod bad_days;
mod good_days;
mod world;
