//! Bytes between nodes and relays, and the ids in them.
//!
//! **Invariant:** nothing here allocates by a length that it read from the wire, panics on any
//! input, or knows what time it is.

#![forbid(unsafe_code)]

pub mod announcement;
pub mod id;
pub mod peer;
pub mod reflexive;
pub mod relay;

/// Largest TCP segment of the connections that nodes make to controllers and relays: it fits IPv6's least MTU, 1280
/// (RFC 8200 §5), with 40 and 20 bytes of headers. Where the way is so narrow and nobody says so (ICMP filtered),
/// larger ones vanish, and no TLS handshake would ever end.
pub const TCP_SEGMENT_BYTES: u32 = 1280 - 40 - 20;
