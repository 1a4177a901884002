//! Which peer has an address: longest prefix first. The same table answers where a packet goes
//! and whether a packet may come from where it says.

use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ip_network_table_deps_treebitmap::IpLookupTable;
use ipnet::IpNet;
use mesh_wire::id::NodeId;

/// In the number of a prefix's holder: it is one of several holders together.
const SHARED: u32 = 1 << 31;

/// A table of prefixes, built once and never changed: a new one replaces the old as a whole.
pub struct RouteTable {
    nodes: Vec<NodeId>,
    /// Numbers of nodes with one prefix, the one that gets its packets first.
    shared: Vec<Vec<u32>>,
    v4: IpLookupTable<Ipv4Addr, u32>,
    v6: IpLookupTable<Ipv6Addr, u32>,
}

impl RouteTable {
    /// Looks up the peer whose prefix is the longest that contains `address`.
    #[must_use]
    pub fn get(&self, address: IpAddr) -> Option<&NodeId> {
        self.holders(address)?.next()
    }

    /// Whether packets from `address` may come from `node`: if it is one of those whose prefix is the longest that
    /// contains it.
    #[must_use]
    pub fn allows(&self, address: IpAddr, node: &NodeId) -> bool {
        let holders = self.holders(address);
        holders.is_some_and(|mut holders| holders.any(|holder| holder == node))
    }

    /// Gives a prefix to several nodes. The first gets its packets; from the others they may come.
    pub fn share(&mut self, net: IpNet, nodes: &[NodeId]) {
        let numbers = nodes.iter().map(|&node| self.add(node)).collect();
        let number = u32::try_from(self.shared.len()).unwrap_or(u32::MAX) | SHARED;
        self.shared.push(numbers);
        self.insert(net, number);
    }

    fn holders(&self, address: IpAddr) -> Option<impl Iterator<Item = &NodeId>> {
        let found = match address {
            IpAddr::V4(ip) => self.v4.longest_match(ip)?.2,
            IpAddr::V6(ip) => self.v6.longest_match(ip)?.2,
        };
        let numbers = match found & SHARED {
            0 => std::slice::from_ref(found),
            _ => self.shared.get(usize::try_from(found & !SHARED).ok()?)?,
        };
        let node = |number: &u32| self.nodes.get(usize::try_from(*number).ok()?);
        Some(numbers.iter().filter_map(node))
    }

    fn insert(&mut self, net: IpNet, number: u32) {
        let length = net.prefix_len().into();
        match net.trunc() {
            IpNet::V4(net) => self.v4.insert(net.addr(), length, number),
            IpNet::V6(net) => self.v6.insert(net.addr(), length, number),
        };
    }

    /// A number for `node`. It may have others.
    fn add(&mut self, node: NodeId) -> u32 {
        self.nodes.push(node);
        u32::try_from(self.nodes.len() - 1).unwrap_or(u32::MAX)
    }

    /// How many prefixes there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl FromIterator<(IpNet, NodeId)> for RouteTable {
    /// Of two peers with the same prefix the later one has it.
    fn from_iter<I: IntoIterator<Item = (IpNet, NodeId)>>(prefixes: I) -> Self {
        let mut table = Self::default();
        let mut numbers = HashMap::new();
        for (net, node) in prefixes {
            let number = *numbers.entry(node).or_insert_with(|| table.add(node));
            table.insert(net, number);
        }
        table
    }
}

impl Default for RouteTable {
    fn default() -> Self {
        Self {
            nodes: Vec::new(),
            shared: Vec::new(),
            v4: IpLookupTable::new(),
            v6: IpLookupTable::new(),
        }
    }
}

impl fmt::Debug for RouteTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RouteTable")
            .field("nodes", &self.nodes.len())
            .field("prefixes", &self.len())
            .finish()
    }
}

/// The length of the IP packet at the front of `padded`, by its own header. `None` if that is not
/// there, or shorter than the header.
pub(crate) fn packet_len(padded: &[u8]) -> Option<usize> {
    let number = |at: usize| {
        let bytes = padded.get(at..)?.first_chunk::<2>()?;
        Some(usize::from(u16::from_be_bytes(*bytes)))
    };
    let (len, least) = match padded.first()? >> 4 {
        4 => (number(2)?, 20),
        6 => (number(4)? + 40, 40),
        _ => return None,
    };
    (least..=padded.len()).contains(&len).then_some(len)
}

/// The destination of an IP packet.
pub(crate) fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => Some(IpAddr::from(*packet.get(16..)?.first_chunk::<4>()?)),
        6 => Some(IpAddr::from(*packet.get(24..)?.first_chunk::<16>()?)),
        _ => None,
    }
}

/// The source of an IP packet.
pub(crate) fn source(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => Some(IpAddr::from(*packet.get(12..)?.first_chunk::<4>()?)),
        6 => Some(IpAddr::from(*packet.get(8..)?.first_chunk::<16>()?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node(n: u8) -> NodeId {
        NodeId([n; 32])
    }

    #[test]
    fn the_longest_prefix_wins_in_both_families() {
        let table: RouteTable = [
            ("10.0.0.0/8", 1),
            ("10.1.0.0/16", 2),
            ("10.1.2.3/32", 3),
            ("fd00::/8", 4),
            ("fd00:1::/32", 5),
            ("0.0.0.0/0", 6),
        ]
        .into_iter()
        .map(|(net, n)| (net.parse().unwrap(), node(n)))
        .collect();
        for (address, n) in [
            ("10.9.9.9", 1),
            ("10.1.9.9", 2),
            ("10.1.2.3", 3),
            ("fd77::1", 4),
            ("fd00:1::1", 5),
            ("192.0.2.1", 6),
        ] {
            assert_eq!(
                table.get(address.parse().unwrap()),
                Some(&node(n)),
                "{address}"
            );
        }
        assert_eq!(table.get("2001:db8::1".parse().unwrap()), None);
    }

    #[test]
    fn of_several_gateways_the_first_gets_packets_and_all_may_send() {
        let mut table: RouteTable = [("10.201.0.0/24", 9), ("10.201.0.7/32", 3)]
            .into_iter()
            .map(|(net, n)| (net.parse().unwrap(), node(n)))
            .collect();
        table.share("10.201.0.0/24".parse().unwrap(), &[node(2), node(1)]);
        table.share("fd01::/64".parse().unwrap(), &[node(1), node(2)]);
        let rows = [
            ("10.201.0.5", Some(2), vec![1, 2]),
            ("10.201.0.7", Some(3), vec![3]),
            ("fd01::5", Some(1), vec![1, 2]),
            ("10.202.0.5", None, vec![]),
        ];
        for (address, gets, may_send) in rows {
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(table.get(address), gets.map(node).as_ref(), "{address}");
            for n in 0..10 {
                let may = may_send.contains(&n);
                assert_eq!(table.allows(address, &node(n)), may, "{address} by {n}");
            }
        }
    }

    #[test]
    fn looks_up_quickly_among_a_hundred_thousand() {
        // 65,536 nodes with a /32 each and 34,464 pod prefixes, in both families.
        let v4 = |n: u32| IpAddr::from(Ipv4Addr::from(0x6460_0000 + n));
        let v6 = |n: u32| IpAddr::from(Ipv6Addr::from((0xfd12_u128 << 112) + u128::from(n)));
        let pods = |n: u32| IpAddr::from(Ipv4Addr::from(0x0a00_0000 + (n << 8)));
        let host = |ip: IpAddr, n: u32| {
            let bytes = n.to_le_bytes();
            (IpNet::from(ip), node(bytes[0]))
        };
        let hosts = (0..65_536).flat_map(|n| [host(v4(n), n), host(v6(n), n)]);
        let pods = (0..34_464).map(|n| (IpNet::new(pods(n), 24).unwrap(), node(1)));
        let table: RouteTable = hosts.chain(pods).collect();
        assert_eq!(table.len(), 65_536 * 2 + 34_464);
        let started = std::time::Instant::now();
        for round in 0..4_u32 {
            for n in 0..65_536_u32 {
                // A step that is odd visits all, in no order that a cache would like.
                let n = n.wrapping_mul(40_503).wrapping_add(round) & 0xffff;
                assert_eq!(table.get(v4(n)), Some(&node(n.to_le_bytes()[0])));
                assert_eq!(table.get(v6(n)), Some(&node(n.to_le_bytes()[0])));
            }
        }
        let each = started.elapsed() / (4 * 2 * 65_536);
        println!("{each:?} for each look-up");
        // Ten times what was measured: a slow machine passes, a linear search does not.
        assert!(each < std::time::Duration::from_micros(3), "{each:?}");
    }

    proptest! {
        #[test]
        fn agrees_with_a_search_through_all_prefixes(
            prefixes in prop::collection::vec((any::<(u8, u8)>(), prop_oneof![4 => 0_u8..=16, 1 => Just(32)], 0_u8..8), 0..40),
            address: (u8, u8),
        ) {
            let ip = |(a, b)| Ipv4Addr::new(a, b, 0, 0);
            let nets: Vec<(IpNet, NodeId)> = prefixes
                .iter()
                .map(|&(at, len, n)| (IpNet::new(ip(at).into(), len).unwrap().trunc(), node(n)))
                .collect();
            let table: RouteTable = nets.iter().copied().collect();
            let address = IpAddr::from(ip(address));
            // Later entries replace earlier ones: `max_by_key` returns the last maximum.
            let expected = nets
                .iter()
                .filter(|(net, _)| net.contains(&address))
                .max_by_key(|(net, _)| net.prefix_len());
            prop_assert_eq!(table.get(address), expected.map(|(_, node)| node));
        }
    }
}
