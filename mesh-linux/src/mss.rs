//! TCP's maximum segment size lowered in what passes from a LAN into the mesh and back, by nftables: one table of ours.
//!
//! Two devices behind gateways agree on segments for their own LANs, 1,460 bytes, and the tunnel between them carries 1,280
//! with all headers. Where ICMP is filtered nobody ever tells them, and their connection hangs with the first full segment
//! (RFC 2923, section 2.1). So their `SYN`s are corrected as they pass, as every router before a smaller link does.

use std::io;

use rustix::net::AddressFamily;

use crate::nftables::{
    self, Direction, REGISTER, attribute, connect, equals, expression, is_absent, named, nested,
    noted, number,
};

/// `NFPROTO_INET`: both families in one table.
const INET: AddressFamily = AddressFamily::from_raw(1);

/// `NF_INET_FORWARD`, and `NF_IP_PRI_MANGLE`: where packets that pass are changed.
const FORWARD: u32 = 2;
const MANGLE: i32 = -150;

const CHAIN: &str = "forward";

/// `NFT_META_L4PROTO`, and TCP.
const L4_PROTOCOL: u32 = 16;
const TCP: u8 = 6;

/// `NFT_PAYLOAD_TRANSPORT_HEADER`; the flags of TCP's header (RFC 9293, section 3.1): `SYN`, and with it `RST`.
const TRANSPORT_HEADER: u32 = 2;
const FLAGS_OFFSET: u32 = 13;
const SYN: u8 = 0x02;
const SYN_RST: u8 = 0x06;

/// `NFT_RT_TCPMSS`: what the smaller route's MTU leaves to TCP, of those there and back.
const RT_TCP_MSS: u32 = 3;

/// `NFT_BYTEORDER_HTON`.
const TO_NETWORK: u32 = 1;

/// `NFT_EXTHDR_OP_TCPOPT`; the option's kind, and where in it the two bytes are (RFC 9293, section 3.2). The kernel never
/// raises them.
const TCP_OPTION: u32 = 1;
const MAXIMUM_SEGMENT_SIZE: u8 = 2;
const SIZE_OFFSET: u32 = 2;
const SIZE_BYTES: u32 = 2;

/// What begins the table's note; the number counts forms of the rules.
const NOTE: &str = "holdfast mss 1";

fn note(interface: &str) -> String {
    format!("{NOTE} {interface}")
}

/// Whether `table` of the calling thread's network namespace clamps what passes `interface`.
///
/// # Errors
///
/// `EPERM` without `CAP_NET_ADMIN`, and others. A kernel without nftables does not.
pub fn stands(table: &str, interface: &str) -> io::Result<bool> {
    let found = match connect() {
        Err(error) if is_absent(&error) => None,
        socket => noted(&socket?, INET, table)?,
    };
    Ok(found.is_some_and(|found| found == note(interface)))
}

/// Makes `table` of the calling thread's network namespace clamp what is forwarded into `interface` or out of it, and
/// nothing else. Returns whether it did not before.
///
/// # Errors
///
/// `EOPNOTSUPP` or `ENOENT` if the kernel has no nftables (`CONFIG_NF_TABLES_INET`), `EPERM` without `CAP_NET_ADMIN`.
/// Nothing has changed then.
pub fn clamp(table: &str, interface: &str) -> io::Result<bool> {
    let (socket, note) = (connect()?, note(interface));
    if noted(&socket, INET, table)?.is_some_and(|found| found == note) {
        return Ok(false);
    }
    let mut batch = nftables::replace(table, INET, &note);
    batch.chain(table, CHAIN, "filter", FORWARD, MANGLE);
    for direction in [Direction::Out, Direction::In] {
        let rule = [
            named(direction, interface),
            is_syn(),
            vec![expression("counter", &[])],
            lower(),
        ];
        batch.rule(table, CHAIN, &rule.concat());
    }
    batch.send(&socket)?;
    Ok(true)
}

/// Removes `table` from the calling thread's network namespace. Returns whether there was one.
///
/// # Errors
///
/// As [`clamp`]. A kernel without nftables has none.
pub fn remove(table: &str) -> io::Result<bool> {
    nftables::remove(table, &[INET])
}

/// Goes on with the rule if the packet begins a TCP connection, or agrees to one.
fn is_syn() -> Vec<Vec<u8>> {
    let protocol = expression("meta", &[number(1, REGISTER), number(2, L4_PROTOCOL)]);
    let flags = [
        number(1, REGISTER),
        number(2, TRANSPORT_HEADER),
        number(3, FLAGS_OFFSET),
        number(4, 1),
    ];
    let data = |kind, byte| nested(kind, &[attribute(1, &[byte])]);
    let masked = [
        number(1, REGISTER),
        number(2, REGISTER),
        number(3, 1),
        data(4, SYN_RST),
        data(5, 0),
    ];
    vec![
        protocol,
        equals(&[TCP]),
        expression("payload", &flags),
        expression("bitwise", &masked),
        equals(&[SYN]),
    ]
}

/// Lowers the segment size to what the routes carry.
fn lower() -> Vec<Vec<u8>> {
    let load = expression("rt", &[number(1, REGISTER), number(2, RT_TCP_MSS)]);
    let swap = [
        number(1, REGISTER),
        number(2, REGISTER),
        number(3, TO_NETWORK),
        number(4, SIZE_BYTES),
        number(5, SIZE_BYTES),
    ];
    let write = [
        attribute(2, &[MAXIMUM_SEGMENT_SIZE]),
        number(3, SIZE_OFFSET),
        number(4, SIZE_BYTES),
        number(6, TCP_OPTION),
        number(7, REGISTER),
    ];
    vec![
        load,
        expression("byteorder", &swap),
        expression("exthdr", &write),
    ]
}
