//! Masquerading by nftables, spoken to without its program: one table of ours for each address family.
//!
//! The table is replaced as a whole in one transaction of the kernel, and only if it is to be another one: a note in it
//! says what it was made of. Connections that are open keep the address that they have.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use ipnet::IpNet;
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send,
        socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
};

use crate::sock_diag::{ACK, ERROR, HEADER_BYTES, REQUEST, answer, messages};

/// Most destinations that are left alone in a family: each is a rule of 300 bytes, and the kernel takes a transaction of
/// 208 KiB (`net.core.wmem_default`). The first packet of a connection is compared with all of them.
pub const EXCEPT_MAX: usize = 256;

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

/// `NF_INET_POST_ROUTING`, and `NF_IP_PRI_NAT_SRC`: where source NAT is.
const POST_ROUTING: u32 = 4;
const SOURCE_NAT: u32 = 100;

/// `NFT_REG_1`, of 16 bytes, and `NFT_REG_VERDICT`; `NFT_RETURN` as a verdict.
const REGISTER: u32 = 1;
const VERDICT_REGISTER: u32 = 0;
const RETURN: i32 = -5;

/// `NFT_META_OIFNAME`.
const OIF_NAME: u32 = 7;

/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`, as kube-proxy asks: else two connections that begin at once may be given one port,
/// and one of them loses its first packet.
const RANDOM_PORTS: u32 = 1 << 4;

const CHAIN: &str = "postrouting";

/// What begins the table's note, which `nft` shows as its comment. The number counts forms of the rules.
const NOTE: &str = "holdfast 1";

/// Whose packets leave as this machine's, and where to they do not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Masquerade {
    /// The sources.
    pub from: IpNet,
    /// The interface by which they leave as themselves.
    pub except_by: Option<String>,
    /// Destinations that see the source itself, of its family; multicast besides. [`EXCEPT_MAX`] of them.
    pub except: Vec<IpNet>,
}

impl Masquerade {
    fn family(&self) -> AddressFamily {
        family(self.from.addr().is_ipv4())
    }

    fn note(&self) -> String {
        let mut note = format!("{NOTE} {}", self.from);
        // FNV-1a: the list may be long, and a note has 256 bytes.
        let text = format!("{:?} {:?}", self.except_by, self.except);
        let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        note.push_str(&format!(" {hash:016x}"));
        note
    }
}

/// Whether `table` of the calling thread's network namespace masquerades so.
///
/// # Errors
///
/// `EPERM` without `CAP_NET_ADMIN`, and others. A kernel without nftables does not.
pub fn stands(table: &str, wanted: &Masquerade) -> io::Result<bool> {
    let found = match connect() {
        Err(error) if is_absent(&error) => None,
        socket => noted(&socket?, wanted.family(), table)?,
    };
    Ok(found.is_some_and(|found| found == wanted.note()))
}

/// Makes `table` of the calling thread's network namespace masquerade so, and nothing else. Returns whether it did not
/// before.
///
/// # Errors
///
/// `EOPNOTSUPP` or `ENOENT` if the kernel has no nftables with NAT (`CONFIG_NFT_NAT`, `CONFIG_NFT_MASQ`), `EPERM`
/// without `CAP_NET_ADMIN`, `EINVAL` for more than [`EXCEPT_MAX`] exceptions. Nothing has changed then.
pub fn masquerade(table: &str, wanted: &Masquerade) -> io::Result<bool> {
    if wanted.except.len() > EXCEPT_MAX {
        return Err(Errno::INVAL.into());
    }
    let socket = connect()?;
    let (family, note) = (wanted.family(), wanted.note());
    if noted(&socket, family, table)?.is_some_and(|found| found == note) {
        return Ok(false);
    }
    let mut batch = Batch::new(family);
    // Made first, so that there is one to delete.
    batch.add(NEW_TABLE, CREATE, &[text(1, table)]);
    batch.add(DELETE_TABLE, 0, &[text(1, table)]);
    // A comment: type 0, its length, and the text with a zero.
    let mut comment = vec![0, u8::try_from(note.len() + 1).unwrap_or(u8::MAX)];
    comment.extend(note.bytes().chain([0]));
    batch.add(NEW_TABLE, CREATE, &[text(1, table), attribute(6, &comment)]);
    let hook = nested(4, &[number(1, POST_ROUTING), number(2, SOURCE_NAT)]);
    let chain = [text(1, table), text(3, CHAIN), hook, text(7, "nat")];
    batch.add(NEW_CHAIN, CREATE, &chain);
    let multicast = IpNet::new_assert(
        if wanted.from.addr().is_ipv4() {
            IpAddr::from([224, 0, 0, 0])
        } else {
            IpAddr::from([0xff00, 0, 0, 0, 0, 0, 0, 0])
        },
        if wanted.from.addr().is_ipv4() { 4 } else { 8 },
    );
    let except = wanted.except.iter().chain([&multicast]);
    let others = is(Field::Source, wanted.from, false);
    let mut rules = vec![[others, vec![leave()]].concat()];
    let except_by = wanted.except_by.iter();
    rules.extend(except_by.map(|name| [leaves_by(name), vec![leave()]].concat()));
    rules.extend(except.map(|net| [is(Field::Destination, *net, true), vec![leave()]].concat()));
    rules.push(vec![expression("masq", &[number(1, RANDOM_PORTS)])]);
    for rule in rules {
        let rule = [text(1, table), text(2, CHAIN), nested(4, &rule)];
        batch.add(NEW_RULE, CREATE | APPEND, &rule);
    }
    batch.send(&socket)?;
    Ok(true)
}

/// Removes `table`, of both families, from the calling thread's network namespace. Returns whether there was one.
///
/// # Errors
///
/// As [`masquerade`]. A kernel without nftables has none.
pub fn remove(table: &str) -> io::Result<bool> {
    let mut found = false;
    let socket = match connect() {
        Err(error) if is_absent(&error) => return Ok(false),
        socket => socket?,
    };
    for family in [family(true), family(false)] {
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

fn family(is_v4: bool) -> AddressFamily {
    // `NFPROTO_IPV4` and `NFPROTO_IPV6` are the same numbers.
    if is_v4 {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    }
}

fn is_absent(error: &io::Error) -> bool {
    let absent = [Errno::NOENT, Errno::OPNOTSUPP, Errno::PROTONOSUPPORT];
    absent
        .map(|errno| Some(errno.raw_os_error()))
        .contains(&error.raw_os_error())
}

fn connect() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let protocol = Some(netlink::NETFILTER);
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_LIMIT))?;
    Ok(socket)
}

/// The table's note; `None`: there is no table, or not ours.
fn noted(socket: &OwnedFd, family: AddressFamily, table: &str) -> io::Result<Option<String>> {
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
struct Batch {
    family: AddressFamily,
    bytes: Vec<u8>,
    messages: usize,
}

impl Batch {
    fn new(family: AddressFamily) -> Self {
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

    fn send(mut self, socket: impl AsFd) -> io::Result<()> {
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
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or_default();
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn text(kind: u16, value: &str) -> Vec<u8> {
    let bytes: Vec<u8> = value.bytes().chain([0]).collect();
    attribute(kind, &bytes)
}

/// Numbers are in network byte order.
fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

fn nested(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NESTED, &attributes.concat())
}

/// An element of a rule: its name, and what it has to say.
fn expression(name: &str, attributes: &[Vec<u8>]) -> Vec<u8> {
    nested(1, &[text(1, name), nested(2, attributes)])
}

#[derive(Clone, Copy)]
enum Field {
    Source,
    Destination,
}

/// Goes on with the rule if the address is, or is not, in `net`.
fn is(field: Field, net: IpNet, wanted: bool) -> Vec<Vec<u8>> {
    let (first, mask) = (octets(net.network()), octets(net.netmask()));
    let length = u32::try_from(first.len()).unwrap_or_default();
    // RFC 791, section 3.1; RFC 8200, section 3.
    let offset = match (field, net) {
        (Field::Source, IpNet::V4(_)) => 12,
        (Field::Destination, IpNet::V4(_)) => 16,
        (Field::Source, IpNet::V6(_)) => 8,
        (Field::Destination, IpNet::V6(_)) => 24,
    };
    let data = |kind, bytes: &[u8]| nested(kind, &[attribute(1, bytes)]);
    // Of the network's header: 1.
    let load = [
        number(1, REGISTER),
        number(2, 1),
        number(3, offset),
        number(4, length),
    ];
    let masked = [
        number(1, REGISTER),
        number(2, REGISTER),
        number(3, length),
        data(4, &mask),
        data(5, &vec![0; first.len()]),
    ];
    let compared = [
        number(1, REGISTER),
        number(2, u32::from(!wanted)),
        data(3, &first),
    ];
    vec![
        expression("payload", &load),
        expression("bitwise", &masked),
        expression("cmp", &compared),
    ]
}

/// Goes on with the rule if the packet leaves by the interface of this name.
fn leaves_by(name: &str) -> Vec<Vec<u8>> {
    let mut value = name.as_bytes().to_vec();
    value.resize(16, 0); // `IFNAMSIZ`.
    let compared = [
        number(1, REGISTER),
        number(2, 0),
        nested(3, &[attribute(1, &value)]),
    ];
    vec![
        expression("meta", &[number(1, REGISTER), number(2, OIF_NAME)]),
        expression("cmp", &compared),
    ]
}

/// Leaves the chain, and the packet as it is.
fn leave() -> Vec<u8> {
    let code = attribute(1, &RETURN.to_be_bytes());
    let verdict = nested(2, &[nested(2, &[code])]);
    expression("immediate", &[number(1, VERDICT_REGISTER), verdict])
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masquerade(except: &[&str]) -> Masquerade {
        Masquerade {
            from: "10.244.1.0/24".parse().unwrap(),
            except_by: None,
            except: except.iter().map(|net| net.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn a_note_is_another_one_for_other_rules_and_fits() {
        let one = masquerade(&["10.0.0.0/8"]).note();
        assert_ne!(one, masquerade(&["10.0.0.0/9"]).note());
        assert_ne!(one, masquerade(&[]).note());
        let longest = Masquerade {
            from: "2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff/128"
                .parse()
                .unwrap(),
            except_by: Some("holdfast0".to_owned()),
            except: Vec::new(),
        };
        assert!(longest.note().len() < 128);
    }

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
