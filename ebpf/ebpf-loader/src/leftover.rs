//! What an earlier process left in the maps of services, read back as if this one had written it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use aya::maps::{HashMap, LpmTrie, MapData, MapError};
use ebpf_abi::{
    EndpointList, LIST_AFFINITY_BIT, LIST_HASH_BIT, LIST_RANGES_BIT, LIST_TURNS_BIT, PROTOCOL_TCP,
    PROTOCOL_UDP, SocketAddress,
};

use crate::{Backends, Clients, Frontend, Protocol, Selection, absent_is_gone, plan::Installed};

/// The maps that belong together.
#[derive(Debug)]
pub(crate) struct ServiceMaps<'a> {
    pub(crate) frontends: &'a mut HashMap<MapData, SocketAddress, u64>,
    pub(crate) endpoints: &'a mut HashMap<MapData, u64, SocketAddress>,
    pub(crate) timeouts: &'a mut HashMap<MapData, SocketAddress, u64>,
    pub(crate) ranges: &'a mut LpmTrie<MapData, [u32; 6], u32>,
}

/// What is in them.
#[derive(Debug, Default)]
pub(crate) struct Leftover {
    pub(crate) installed: BTreeMap<Frontend, Installed>,
    /// The first number that no list has or had.
    pub(crate) next_list: u64,
}

impl ServiceMaps<'_> {
    /// Reads all of it: two system calls an entry, 2 to 3 s for 250,000 endpoints on a busy machine of two
    /// cores, while the programs of the earlier process go on. What a process that
    /// was killed half way left without a frontend is removed, and so is a frontend whose list is
    /// not whole: better no service than one that refuses.
    pub(crate) fn read_back(self) -> Result<Leftover, MapError> {
        let slots: BTreeMap<u64, SocketAddress> =
            self.endpoints.iter().collect::<Result<_, _>>()?;
        let mut prefixes: BTreeMap<u64, BTreeSet<(IpAddr, u8)>> = BTreeMap::new();
        let mut range_keys = Vec::new();
        for key in self.ranges.keys() {
            let key = key?;
            let [low, high, a, b, c, d] = key.data();
            let list = joined(low, high);
            let prefix = prefix([a, b, c, d], key.prefix_len().saturating_sub(u64::BITS));
            prefixes.entry(list).or_default().insert(prefix);
            range_keys.push((list, key));
        }
        let mut left = Leftover::default();
        let mut lists = BTreeSet::new();
        let found: Vec<_> = self.frontends.iter().collect::<Result<_, _>>()?;
        for (key, value) in found {
            let list = EndpointList::from_value(value);
            let number = without_index(value);
            left.next_list = left.next_list.max(list.number() + 1);
            let endpoints: Option<Vec<_>> = list
                .slots()
                .map(|slot| Some(slots.get(&slot)?.socket_addr()))
                .collect();
            let (Some(frontend), Some(endpoints)) = (frontend(&key), endpoints) else {
                absent_is_gone(self.frontends.remove(&key))?;
                continue;
            };
            let timeout = self.timeouts.get(&key, 0).ok(); // Else its list is written again.
            let timeout = timeout.filter(|_| list.has(LIST_AFFINITY_BIT));
            lists.insert(number);
            let backends = Backends {
                endpoints,
                selection: selection(list),
                affinity: timeout.map(Duration::from_nanos),
                ranges: list
                    .has(LIST_RANGES_BIT)
                    .then(|| prefixes.remove(&number).unwrap_or_default()),
            };
            left.installed
                .insert(frontend, Installed { list, backends });
        }
        let orphans = slots
            .keys()
            .filter(|slot| !lists.contains(&without_index(**slot)));
        for slot in orphans {
            let list = EndpointList::from_value(*slot);
            left.next_list = left.next_list.max(list.number() + 1);
            absent_is_gone(self.endpoints.remove(slot))?;
        }
        for (list, key) in range_keys {
            if !lists.contains(&list) {
                absent_is_gone(self.ranges.remove(&key))?;
            }
        }
        let timeouts: Vec<_> = self.timeouts.keys().collect::<Result<_, _>>()?;
        for key in timeouts {
            let wanted = frontend(&key).and_then(|frontend| left.installed.get(&frontend));
            if wanted.is_none_or(|found| found.backends.affinity.is_none()) {
                absent_is_gone(self.timeouts.remove(&key))?;
            }
        }
        Ok(left)
    }
}

/// A prefix as the programs compare it, as it is called.
pub(crate) fn prefix(ip: [u32; 4], length: u32) -> (IpAddr, u8) {
    let address = address(ip);
    let mapped = if address.is_ipv4() { 96 } else { 0 };
    let length = u8::try_from(length.saturating_sub(mapped));
    (address, length.unwrap_or(u8::MAX))
}

fn address(ip: [u32; 4]) -> IpAddr {
    let mut address = SocketAddress::new(IpAddr::from([0; 4]), 0, 0);
    address.ip = ip;
    address.socket_addr().ip()
}

/// A frontend as the programs look for it.
pub(crate) fn frontend(key: &SocketAddress) -> Option<Frontend> {
    let at = key.socket_addr();
    let protocol = match u32::from(key.protocol) {
        PROTOCOL_TCP => Protocol::Tcp,
        PROTOCOL_UDP => Protocol::Udp,
        _ => return None,
    };
    Some(Frontend {
        clients: if key.outside == 0 {
            Clients::All
        } else {
            Clients::Outside
        },
        address: at.ip(),
        port: at.port(),
        protocol,
    })
}

fn selection(list: EndpointList) -> Selection {
    if list.has(LIST_TURNS_BIT) {
        Selection::Turns
    } else if list.has(LIST_HASH_BIT) {
        Selection::ClientHash
    } else {
        Selection::Random
    }
}

/// A list as it stands in each of its slots.
fn without_index(slot: u64) -> u64 {
    slot >> 16 << 16
}

/// The list in a prefix' key, in two halves as they are in memory.
fn joined(low: u32, high: u32) -> u64 {
    let ([a, b, c, d], [e, f, g, h]) = (low.to_ne_bytes(), high.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}
