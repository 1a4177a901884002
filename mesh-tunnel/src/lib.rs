//! The packet path: TUN, WireGuard, UDP and relay links.
