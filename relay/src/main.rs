//! The relay: sockets around the core's relay server, and its client links.

fn main() {}
