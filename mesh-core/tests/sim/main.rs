//! The whole mesh in virtual time: every node runs the real core, the network around it is a
//! model. `scenarios` are single stories, `mass` is many nodes and chance.

mod mass;
mod nat;
mod scenarios;
mod session;
mod world;
