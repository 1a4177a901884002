//! The real `mesh-controller` against the API server's stand-in, with the rights that `deploy/` gives it.

#![forbid(unsafe_code)]
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests may fail loudly, and clippy sees only functions marked as such"
)]

mod etcd;
mod etcd_lab;
mod following;
mod joining;
mod lab;
mod leaving;
mod replicas;
mod telling;
mod world;
