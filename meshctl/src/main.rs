//! Command line over the agent's admin socket and the controller.

fn main() {}
