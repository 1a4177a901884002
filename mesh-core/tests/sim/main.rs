//! The whole mesh in virtual time: every node runs the real core, the network around it is a
//! model. `scenarios` are single stories, `mass` is many nodes and chance, `model` is
//! everything that can happen, against a reference.

#![expect(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a model may fail loudly; clippy.toml's exceptions reach only functions under #[test]"
)]

mod communities;
mod day;
mod lines;
mod mass;
mod matrix;
mod model;
mod nat;
mod peer_relays;
mod reasons;
mod scenarios;
mod session;
mod uplinks;
mod world;
