//! Masquerading by nftables, spoken to without its program: one table of ours for each address family.
//!
//! The table is replaced as a whole in one transaction of the kernel, and only if it is to be another one: a note in it
//! says what it was made of. Connections that are open keep the address that they have.

use std::{io, net::IpAddr};

use ipnet::IpNet;
use rustix::{io::Errno, net::AddressFamily};

use crate::nftables::{
    self, Direction, REGISTER, attribute, connect, expression, is_absent, named, nested, noted,
    number,
};

/// Most destinations that are left alone in a family: each is a rule of 300 bytes, and the kernel takes a transaction of
/// 208 KiB (`net.core.wmem_default`). The first packet of a connection is compared with all of them.
pub const EXCEPT_MAX: usize = 256;

/// `NF_INET_POST_ROUTING`, and `NF_IP_PRI_NAT_SRC`: where source NAT is.
const POST_ROUTING: u32 = 4;
const SOURCE_NAT: i32 = 100;

/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`, as kube-proxy asks: else two connections that begin at once may be given one port,
/// and one of them loses its first packet.
const RANDOM_PORTS: u32 = 1 << 4;

/// `NFT_REG_VERDICT`; `NFT_RETURN` as a verdict.
const VERDICT_REGISTER: u32 = 0;
const RETURN: i32 = -5;

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
    let mut batch = nftables::replace(table, family, &note);
    batch.chain(table, CHAIN, "nat", POST_ROUTING, SOURCE_NAT);
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
    rules.extend(except_by.map(|name| [named(Direction::Out, name), vec![leave()]].concat()));
    rules.extend(except.map(|net| [is(Field::Destination, *net, true), vec![leave()]].concat()));
    rules.push(vec![expression("masq", &[number(1, RANDOM_PORTS)])]);
    for rule in rules {
        batch.rule(table, CHAIN, &rule);
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
    nftables::remove(table, &[family(true), family(false)])
}

fn family(is_v4: bool) -> AddressFamily {
    // `NFPROTO_IPV4` and `NFPROTO_IPV6` are the same numbers.
    if is_v4 {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    }
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
}
