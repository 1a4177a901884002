//! Connections of which both ends are on this node, and of which what is written to one goes past TCP into the other.

use crate::{
    SocketAddress,
    layout::{layouts, limits},
};

limits! {
    /// Pairs of a service that asks for it and an endpoint of it on this node: 110 pods of 8 ports, in two families and at two addresses
    /// of the service each, are 3,520. Those beyond it stay with TCP. Allocated as they are written:
    /// 4,096 × 112 bytes, 448 KiB at most, and 64 KiB of buckets.
    SOCKMAP_PAIRS_MAX = 4_096;
    /// Connections that may be joined at once. The least recently used goes back to TCP for another one.
    /// 8,192 × 136 bytes: 1.1 MiB, always.
    SOCKMAP_CONNECTIONS_MAX = 8_192;
    /// Their ends. Allocated as they are joined: 16,384 × 104 bytes, 1.6 MiB at most, and 256 KiB of buckets.
    SOCKMAP_ENDS_MAX = 16_384;
    /// How much of what one end wrote the other may have left without an answer, in bytes; with the next message more, the connection goes back to TCP in this
    /// direction, which makes a writer wait for its reader. Here it is the kernel's memory that fills: 8,192 × 2 × 64 KiB is 1 GiB, where
    /// TCP itself may have 8,192 × 2 × 6 MiB. Nearly every request is smaller, and TCP is faster with more than that.
    SOCKMAP_UNANSWERED_MAX = 65_536;
    /// For so long after policy changed no connection is joined, in milliseconds: the packets that opened it may have been judged before.
    /// They are in the kernel for microseconds, and milliseconds where it is busy.
    SOCKMAP_SETTLE_MS = 100;
}

layouts! {
    /// A connection, as both its ends know it and nobody else can guess.
    pub struct Connection as "connection" {
        /// Who connected.
        client: SocketAddress,
        /// To what.
        server: SocketAddress,
        /// The first sequence number of what the client writes. RFC 9293, section 3.4.1: hard to predict.
        client_begins: u32,
        /// That of what the server writes.
        server_begins: u32,
    }

    /// One end of it: a socket's key.
    pub struct ConnectionEnd as "connection_end" {
        /// Of what.
        connection: Connection,
        /// 0: the client, 1: the server.
        end: u32,
    }

    /// What both ends know of what passed between them.
    pub struct Exchange as "exchange" {
        /// Whether the server has joined it, or the client went by TCP before.
        state: u32,
        /// Always 0.
        zero: u32,
        /// When the client joined it. In nanoseconds of the kernel's clock since the machine started.
        joined_ns: u64,
        /// What the client wrote since the server did. In bytes.
        asked: u32,
        /// What the server wrote since the client did. In bytes.
        answered: u32,
    }
}

const _: () = assert!(size_of::<ConnectionEnd>() == 52 && align_of::<ConnectionEnd>() == 4);
const _: () = assert!(size_of::<Exchange>() == 24 && align_of::<Exchange>() == 8);
const _: () = assert!(2 * SOCKMAP_CONNECTIONS_MAX == SOCKMAP_ENDS_MAX);
