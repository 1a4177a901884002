//! Desired state, node registry, certificate authority, delta distribution.

fn main() {}
