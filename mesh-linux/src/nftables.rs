//! The kernel's packet filter by netlink, without the `nft` program: what [`masquerade`](crate::masquerade) and
//! [`mss`](crate::mss) share. Tables are replaced as a whole, in one transaction, and say in a note what they were made of.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send,
        socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
};

use crate::sock_diag::{ACK, ERROR, HEADER_BYTES, REQUEST, answer, messages};

/// The kernel answers while the transaction is done; others' may come before it.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// `NFNL_MSG_BATCH_BEGIN`, `NFNL_MSG_BATCH_END` and `NFNL_SUBSYS_NFTABLES` of `linux/netfilter/nfnetlink.h`.
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NFTABLES: u16 = 10;

/// `enum nf_tables_msg_types` of `linux/netfilter/nf_tables.h`, as all numbers below.
const NEW_TABLE: u16 = NFTABLES << 8;
const GET_TABLE: u16 = NFTABLES << 8 | 1;
const DELETE_TABLE: u16 = NFTABLES << 8 | 2;
const NEW_CHAIN: u16 = NFTABLES << 8 | 3;
const NEW_RULE: u16 = NFTABLES << 8 | 6;

/// `NLM_F_CREATE` and `NLM_F_APPEND` of `linux/netlink.h`, and `NLA_F_NESTED`.
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
const NESTED: u16 = 1 << 15;

/// `NFT_REG_1`, of 16 bytes.
pub(crate) const REGISTER: u32 = 1;

/// `NFT_META_OIFNAME`.
const OIF_NAME: u32 = 7;

/// `NFT_META_IIFNAME`.
const IIF_NAME: u32 = 6;

/// Removes `table` of `families` from the calling thread's network namespace. Returns whether there was one.
pub(crate) fn remove(table: &str, families: &[AddressFamily]) -> io::Result<bool> {
    let mut found = false;
    let socket = match connect() {
        Err(error) if is_absent(&error) => return Ok(false),
        socket => socket?,
    };
    for &family in families {
        let mut batch = Batch::new(family);
        batch.add(DELETE_TABLE, 0, &[text(1, table)]);
        match batch.send(&socket) {
            Ok(()) => found = true,
            Err(error) if is_absent(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// Begins a transaction that replaces `table` by an empty one with this note.
pub(crate) fn replace(table: &str, family: AddressFamily, note: &str) -> Batch {
    let mut batch = Batch::new(family);
    // Made first, so that there is one to delete.
    batch.add(NEW_TABLE, CREATE, &[text(1, table)]);
    batch.add(DELETE_TABLE, 0, &[text(1, table)]);
    // A comment: type 0, its length, and the text with a zero.
    let mut comment = vec![0, u8::try_from(note.len() + 1).unwrap_or(u8::MAX)];
    comment.extend(note.bytes().chain([0]));
    batch.add(NEW_TABLE, CREATE, &[text(1, table), attribute(6, &comment)]);
    batch
}

pub(crate) fn is_absent(error: &io::Error) -> bool {
    let absent = [Errno::NOENT, Errno::OPNOTSUPP, Errno::PROTONOSUPPORT];
    absent
        .map(|errno| Some(errno.raw_os_error()))
        .contains(&error.raw_os_error())
}

pub(crate) fn connect() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let protocol = Some(netlink::NETFILTER);
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_LIMIT))?;
    Ok(socket)
}

/// The table's note; `None`: there is no table, or not ours.
pub(crate) fn noted(
    socket: &OwnedFd,
    family: AddressFamily,
    table: &str,
) -> io::Result<Option<String>> {
    let request = message(GET_TABLE, REQUEST | ACK, family, 0, &[text(1, table)]);
    send(socket, &request, SendFlags::empty())?;
    let mut found = None;
    let mut buffer = [0; 4_096];
    // An answer, and that it was all; or an error.
    loop {
        let (length, _) = recv(socket, &mut buffer, RecvFlags::empty())?;
        for (kind, payload) in messages(buffer.get(..length).unwrap_or_default()) {
            if kind == ERROR {
                return match answer(payload) {
                    Err(error) if is_absent(&error) => Ok(None),
                    other => other.map(|()| found),
                };
            }
            found = note_in(payload.get(4..).unwrap_or_default());
        }
    }
}

/// Of a table's attributes the note.
fn note_in(mut attributes: &[u8]) -> Option<String> {
    loop {
        let &[a, b, c, d, ..] = attributes else {
            return None;
        };
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = attributes.get(4..length)?;
        if u16::from_ne_bytes([c, d]) == 6 {
            let text = value.get(2..)?.strip_suffix(&[0])?;
            return String::from_utf8(text.to_vec()).ok();
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

/// Messages that the kernel takes all, or none of them.
pub(crate) struct Batch {
    family: AddressFamily,
    bytes: Vec<u8>,
    messages: usize,
}

impl Batch {
    pub(crate) fn new(family: AddressFamily) -> Self {
        let begin = message(BATCH_BEGIN, REQUEST, AddressFamily::UNSPEC, NFTABLES, &[]);
        Self {
            family,
            bytes: begin,
            messages: 0,
        }
    }

    fn add(&mut self, kind: u16, flags: u16, attributes: &[Vec<u8>]) {
        let flags = REQUEST | ACK | flags;
        self.bytes
            .extend(message(kind, flags, self.family, 0, attributes));
        self.messages += 1;
    }

    /// Adds a chain at a hook of the packet filter.
    pub(crate) fn chain(&mut self, table: &str, name: &str, kind: &str, hook: u32, priority: i32) {
        let priority = u32::from_ne_bytes(priority.to_ne_bytes());
        let hook = nested(4, &[number(1, hook), number(2, priority)]);
        let chain = [text(1, table), text(3, name), hook, text(7, kind)];
        self.add(NEW_CHAIN, CREATE, &chain);
    }

    /// Adds a rule to the end of a chain.
    pub(crate) fn rule(&mut self, table: &str, chain: &str, expressions: &[Vec<u8>]) {
        let rule = [text(1, table), text(2, chain), nested(4, expressions)];
        self.add(NEW_RULE, CREATE | APPEND, &rule);
    }

    pub(crate) fn send(mut self, socket: impl AsFd) -> io::Result<()> {
        let end = message(BATCH_END, REQUEST, AddressFamily::UNSPEC, NFTABLES, &[]);
        self.bytes.extend(end);
        send(&socket, &self.bytes, SendFlags::empty())?;
        let mut buffer = vec![0; 64 << 10];
        let (mut answers, mut refused) = (0, Ok(()));
        // Each message is answered, also after one that was refused.
        while answers < self.messages {
            let (length, _) = recv(&socket, &mut *buffer, RecvFlags::empty())?;
            for (kind, payload) in messages(buffer.get(..length).unwrap_or_default()) {
                if kind == ERROR {
                    answers += 1;
                    refused = refused.and(answer(payload));
                }
            }
            if refused.is_err() {
                break;
            }
        }
        refused
    }
}

/// `struct nlmsghdr`, `struct nfgenmsg`, and attributes.
fn message(
    kind: u16,
    flags: u16,
    family: AddressFamily,
    subsystem: u16,
    attributes: &[Vec<u8>],
) -> Vec<u8> {
    let body = attributes.concat();
    let length = u32::try_from(HEADER_BYTES + 4 + body.len()).unwrap_or_default();
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]); // Sequence number and port: one transaction at a time, answered by the kernel.
    let [family, _] = family.as_raw().to_ne_bytes();
    message.extend([family, 0]);
    message.extend(subsystem.to_be_bytes());
    message.extend(body);
    message
}

/// `struct nlattr` with its value.
pub(crate) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or_default();
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

pub(crate) fn text(kind: u16, value: &str) -> Vec<u8> {
    let bytes: Vec<u8> = value.bytes().chain([0]).collect();
    attribute(kind, &bytes)
}

/// Numbers are in network byte order.
pub(crate) fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

pub(crate) fn nested(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NESTED, &attributes.concat())
}

/// An element of a rule: its name, and what it has to say.
pub(crate) fn expression(name: &str, attributes: &[Vec<u8>]) -> Vec<u8> {
    nested(1, &[text(1, name), nested(2, attributes)])
}

/// How a packet passes an interface.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Direction {
    In,
    Out,
}

/// Goes on with the rule if the packet comes in, or leaves, by the interface of this name.
pub(crate) fn named(direction: Direction, name: &str) -> Vec<Vec<u8>> {
    let key = match direction {
        Direction::In => IIF_NAME,
        Direction::Out => OIF_NAME,
    };
    let mut value = name.as_bytes().to_vec();
    value.resize(16, 0); // `IFNAMSIZ`.
    let load = expression("meta", &[number(1, REGISTER), number(2, key)]);
    vec![load, equals(&value)]
}

/// Goes on with the rule if the register begins with these bytes.
pub(crate) fn equals(value: &[u8]) -> Vec<u8> {
    let value = nested(3, &[attribute(1, value)]);
    expression("cmp", &[number(1, REGISTER), number(2, 0), value])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_note_of_a_table_is_found_and_no_bytes_make_it_panic() {
        let whole = [text(1, "t"), attribute(6, b"\0\x05abc\0")].concat();
        assert_eq!(note_in(&whole).as_deref(), Some("abc"));
        // The last two bytes are padding.
        for length in 0..whole.len() - 2 {
            assert_eq!(note_in(&whole[..length]), None, "{length}");
        }
        for byte in 0..whole.len() {
            for value in [0, 1, 3, 4, 255] {
                let mut other = whole.clone();
                other[byte] = value;
                note_in(&other);
            }
        }
    }
}
