//! How full the maps are, for those who ask again and again: what is written here is known without the kernel, and maps of
//! flows, which the programs write, are counted seldom enough to be cheap.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use aya::{Ebpf, maps::Map};
use ebpf_abi::{KEPT_PREFIXES_MAX, MAPPINGS_MAX, REDIRECTS_MAX, ROUTES_MAX, SOCKMAP_PAIRS_MAX};

use crate::{
    LIMITS, Services, inspect,
    mapping::Mappings,
    policy::{self, Policy},
    redirect, sockmap,
    tracked::TRACKED,
};

/// To count a map takes a system call for each of its entries. One is counted again only once so many times as long has
/// gone by as that took last: a thousandth of a processor at most, however full it is, and however slow the machine.
const PAUSE_TIMES: u32 = 1_000;

/// What a map has room for, and how much of it is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fill {
    /// The map, as [`inspect::maps`] calls it.
    pub map: String,
    /// What is in it.
    pub entries: usize,
    /// What is put into it at most: less than the kernel would take, where a list or a state is written beside the one
    /// that it replaces.
    pub entries_max: usize,
    /// What happens then.
    pub when_full: WhenFull,
}

/// What happens to an entry for which there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenFull {
    /// It stays out, and is counted where it was asked for.
    LeftOut,
    /// The least recently used one makes room: a map of flows is full sooner or later, and that is in order.
    OldestGoes,
}

impl WhenFull {
    /// As a metric's label.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::LeftOut => "left_out",
            Self::OldestGoes => "oldest_goes",
        }
    }
}

fn written(map: &str, entries: usize, entries_max: usize) -> Fill {
    Fill {
        map: map.to_owned(),
        entries,
        entries_max,
        when_full: WhenFull::LeftOut,
    }
}

impl Services {
    /// Of what this process writes. Time-outs of `sessionAffinity` are not among it: of them there are no more than
    /// frontends, and as much room.
    #[must_use]
    pub fn fills(&self) -> Vec<Fill> {
        let mut fills = vec![
            written("hf_frontends", self.installed.len(), LIMITS.frontends),
            written("hf_endpoints", self.installed_slots, LIMITS.endpoints),
            written("hf_ranges", self.installed_ranges, LIMITS.ranges),
            written(
                sockmap::WANTED,
                self.sockmap.told_len(),
                SOCKMAP_PAIRS_MAX as usize,
            ),
        ];
        if let Some(interfaces) = &self.interfaces {
            let room = KEPT_PREFIXES_MAX as usize;
            fills.push(written("hf_kept", interfaces.kept_len(), room));
            let (hosts, others) = interfaces.redirects.routes_len();
            // One limit for both: what one has taken is no room for the other.
            let room = ROUTES_MAX as usize;
            fills.push(written(redirect::HOSTS, hosts, room - others));
            fills.push(written(redirect::ROUTES, others, room - hosts));
            let links = interfaces.redirects.slots_len();
            fills.push(written(redirect::LINKS, links, REDIRECTS_MAX as usize));
        }
        fills
    }

    /// What [`FlowCounts::fills`] counts.
    #[must_use]
    pub fn flow_maps(&self) -> Vec<FlowMap> {
        flow_maps(&self.ebpf)
    }
}

impl Policy {
    /// Of what this process writes.
    #[must_use]
    pub fn fills(&self) -> Vec<Fill> {
        let tables = self.installed();
        let (pods, bridges) = self.interfaces_len();
        vec![
            written(
                "hf_pol_addrs",
                tables.addresses.len(),
                policy::ADDRESSES_MAX,
            ),
            written("hf_pol_pairs", tables.pairs.len(), policy::PAIRS_MAX),
            written("hf_pol_ports", tables.ports.len(), policy::PORTS_MAX),
            written("hf_pol_pods", pods, policy::PODS_MAX),
            written("hf_pol_bridges", bridges, policy::PODS_MAX),
        ]
    }

    /// What [`FlowCounts::fills`] counts.
    #[must_use]
    pub fn flow_maps(&self) -> Vec<FlowMap> {
        flow_maps(self.ebpf())
    }
}

impl Mappings {
    /// Of what this process writes.
    #[must_use]
    pub fn fills(&self) -> Vec<Fill> {
        let room = MAPPINGS_MAX as usize;
        ["hf_map_out", "hf_map_in"]
            .map(|map| written(map, self.len(), room))
            .into()
    }
}

/// A map that the programs write, and in which the least recently used entry makes room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowMap {
    name: String,
    id: u32,
    entries_max: u32,
}

fn flow_maps(ebpf: &Ebpf) -> Vec<FlowMap> {
    let maps = ebpf.maps().filter_map(|(name, map)| {
        let info = if let Map::LruHashMap(map) = map {
            map.info().ok()?
        } else if let Map::Array(map) = map
            && name == TRACKED
        {
            map.info().ok()?
        } else {
            return None;
        };
        // Else it is for packets, where only sockets are served.
        (info.max_entries() > 1).then(|| FlowMap {
            name: name.to_owned(),
            id: info.id(),
            entries_max: inspect::entries_max(&info),
        })
    });
    maps.collect()
}

/// What was counted last.
#[derive(Debug, Default)]
pub struct FlowCounts(BTreeMap<u32, Counted>);

#[derive(Debug, Clone, Copy)]
struct Counted {
    entries: u32,
    at: Instant,
    took: Duration,
}

impl Counted {
    fn is_good(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) < self.took * PAUSE_TIMES
    }
}

impl FlowCounts {
    /// How full these are, or were when they were counted last. To count an empty map of 65,536 takes 0.04 ms, a full one
    /// 80 ms (dev profile, a busy virtual machine of two processors): that one is counted once in 80 s. Maps that are
    /// gone meanwhile are left out.
    pub fn fills(&mut self, maps: &[FlowMap]) -> Vec<Fill> {
        let there: BTreeSet<u32> = maps.iter().map(|map| map.id).collect();
        self.0.retain(|id, _| there.contains(id));
        let fills = maps.iter().filter_map(|map| {
            let before = self.0.get(&map.id).copied();
            let counted = match before.filter(|counted| counted.is_good(Instant::now())) {
                Some(counted) => counted,
                None => count(map.id)?,
            };
            self.0.insert(map.id, counted);
            Some(Fill {
                map: map.name.clone(),
                entries: counted.entries as usize,
                entries_max: map.entries_max as usize,
                when_full: WhenFull::OldestGoes,
            })
        });
        fills.collect()
    }
}

fn count(id: u32) -> Option<Counted> {
    let begun = Instant::now();
    let entries = inspect::entries_of(id)?;
    let at = Instant::now();
    Some(Counted {
        entries,
        at,
        took: at - begun,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counting_takes_a_thousandth_of_the_time_at_most() {
        let at = Instant::now();
        let counted = |took_ms| Counted {
            entries: 7,
            at,
            took: Duration::from_millis(took_ms),
        };
        assert!(counted(20).is_good(at + Duration::from_millis(19_999)));
        assert!(!counted(20).is_good(at + Duration::from_secs(20)));
        assert!(!counted(0).is_good(at));
    }
}
