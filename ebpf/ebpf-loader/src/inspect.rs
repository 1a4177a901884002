//! What the kernel has of ours: programs and where they stand, maps and how full they are. For people: nothing here
//! decides by it.

use std::{
    collections::BTreeSet,
    fmt, fs,
    num::NonZeroU32,
    os::fd::{AsFd as _, AsRawFd as _},
    path::PathBuf,
    time::Duration,
};

use aya::{
    Ebpf,
    maps::{HashMap, LpmTrie, Map, MapData, MapError, MapInfo, MapType, xdp::DevMapHash},
    programs::{Program, SchedClassifier, TcAttachType},
};

use crate::{
    Services, connects,
    mapping::Mappings,
    order, packets,
    pins::KeptLink,
    policy::Policy,
    redirect,
    tracked::{self, TRACKED},
};

/// A program that is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadedProgram {
    /// As in the object.
    pub name: String,
    /// Where such a program belongs: `cgroup connect4`, `tcx ingress`.
    pub hook: String,
    /// The kernel's number.
    pub id: u32,
    /// Of its instructions: the same for the same program.
    pub tag: u64,
    /// What the verifier went through; 0: the kernel does not say (before Linux 5.16).
    pub verified_instructions: u32,
    /// As machine code; 0: the kernel interprets it.
    pub machine_bytes: u32,
    /// How often it ran, while the kernel counted (`kernel.bpf_stats_enabled`).
    pub runs: u64,
    /// How long these took.
    pub run_time: Duration,
    /// Of its maps.
    pub map_ids: Vec<u32>,
    /// Where it was put.
    pub places: Vec<Place>,
}

/// Where a program was put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// There.
    pub at: At,
    /// Whether the kernel says so, too.
    pub attached: bool,
    /// Whether it stays when the process ends; `None`: it is not meant to.
    pub pinned: Option<bool>,
}

/// What a program is attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum At {
    /// The processes in it and below.
    Cgroup(PathBuf),
    /// An interface of the network namespace, by its index.
    Interface(NonZeroU32),
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cgroup(path) => write!(f, "{}", path.display()),
            Self::Interface(index) => match packets::interface_name(*index) {
                Ok(name) => f.write_str(&name),
                Err(_) => write!(f, "interface {index}"), // It is gone.
            },
        }
    }
}

/// A map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadedMap {
    /// As the kernel has it: at most 15 bytes.
    pub name: String,
    /// The kernel's number.
    pub id: u32,
    /// `hash`, `lru_hash`, `lpm_trie` and so on.
    pub kind: &'static str,
    /// What it holds at most; of a ring, bytes.
    pub entries_max: u32,
    /// What it holds; `None`: not counted, or a kind that is always as large as it can be.
    pub entries: Option<u32>,
    /// Memory, by the kernel's reckoning; `None`: it does not say.
    pub bytes: Option<u64>,
}

/// Of an object, attached nowhere yet.
fn loaded(ebpf: &Ebpf) -> Vec<LoadedProgram> {
    let known = ebpf.programs().filter_map(|(name, program)| {
        // Else it is one that was not loaded: for packets, where only sockets are served.
        let info = program.info().ok()?;
        Some(LoadedProgram {
            name: name.to_owned(),
            hook: if matches!(program, Program::SockOps(_)) {
                "cgroup sock_ops".to_owned()
            } else if matches!(program, Program::SkMsg(_)) {
                "sk_msg".to_owned()
            } else {
                hook(name, matches!(program, Program::SchedClassifier(_)))
            },
            id: info.id(),
            tag: info.tag(),
            verified_instructions: info.verified_instruction_count().unwrap_or_default(),
            machine_bytes: info.size_jitted(),
            runs: info.run_count(),
            run_time: info.run_time(),
            map_ids: info.map_ids().ok().flatten().unwrap_or_default(),
            places: Vec::new(),
        })
    });
    let mut programs: Vec<_> = known.collect();
    programs.sort_by(|one, two| (&one.hook, &one.name).cmp(&(&two.hook, &two.name)));
    programs
}

fn hook(name: &str, sees_packets: bool) -> String {
    match order::way(name) {
        Some(TcAttachType::Egress) => "tcx egress".to_owned(),
        Some(TcAttachType::Ingress | TcAttachType::Custom(_)) => "tcx ingress".to_owned(),
        None if sees_packets => "tcx".to_owned(),
        None => format!("cgroup {}", name.strip_prefix("hf_").unwrap_or(name)),
    }
}

/// Adds where links put them.
fn put<'a>(programs: &mut [LoadedProgram], at: &At, links: impl IntoIterator<Item = &'a KeptLink>) {
    for link in links {
        let id = link.program_id();
        if let Some(program) = programs.iter_mut().find(|one| Some(one.id) == id) {
            program.places.push(Place {
                attached: is_there(program, at),
                at: at.clone(),
                pinned: link.is_pinned(),
            });
        }
    }
}

/// What the kernel says of the place. A link to a cgroup is attached for as long as there is the cgroup.
fn is_there(program: &LoadedProgram, at: &At) -> bool {
    match at {
        At::Cgroup(path) => path.is_dir(),
        At::Interface(index) => {
            let Some(way) = order::way(&program.name) else {
                return false;
            };
            let there = packets::interface_name(*index)
                .ok()
                .and_then(|name| SchedClassifier::query_tcx(&name, way).ok());
            there.is_some_and(|(_, there)| there.iter().any(|one| one.id() == program.id))
        }
    }
}

impl Services {
    /// The programs for sockets, and those for packets if they are loaded.
    #[must_use]
    pub fn programs(&self) -> Vec<LoadedProgram> {
        let mut programs = loaded(&self.ebpf);
        let cgroup = At::Cgroup(self.cgroup.clone());
        put(&mut programs, &cgroup, &self.links);
        put(&mut programs, &cgroup, self.sockmap.link());
        let watching = programs
            .iter_mut()
            .find(|one| one.name == connects::PROGRAM);
        if let Some(program) = watching.filter(|_| self.watching.is_some()) {
            program.places.push(Place {
                attached: is_there(program, &cgroup),
                at: cgroup,
                pinned: None,
            });
        }
        let Some(interfaces) = &self.interfaces else {
            return programs;
        };
        for (&index, links) in interfaces.links() {
            put(&mut programs, &At::Interface(index), links);
        }
        // One of the two, by what the interface's packets begin with.
        for index in interfaces.redirects.interfaces() {
            let at = At::Interface(index);
            let mut those = programs.iter_mut();
            let found = those.find(|one| redirect::is_one(&one.name) && is_there(one, &at));
            if let Some(program) = found {
                program.places.push(Place {
                    at,
                    attached: true,
                    pinned: None,
                });
            }
        }
        programs
    }
}

impl Policy {
    /// The programs that judge.
    #[must_use]
    pub fn programs(&self) -> Vec<LoadedProgram> {
        let mut programs = loaded(self.ebpf());
        for (&index, links) in self.links() {
            put(&mut programs, &At::Interface(index), links);
        }
        programs
    }
}

impl Mappings {
    /// The programs that translate, at the tunnel whose interface this is.
    #[must_use]
    pub fn programs(&self, tunnel: NonZeroU32) -> Vec<LoadedProgram> {
        let mut programs = loaded(self.ebpf());
        put(&mut programs, &At::Interface(tunnel), self.links());
        programs
    }
}

/// The maps with these numbers; those that are gone meanwhile are left out. With `count`, what is in them: a system call
/// for each entry, 0.3 s where all are full.
#[must_use]
pub fn maps(ids: &BTreeSet<u32>, count: bool) -> Vec<LoadedMap> {
    let maps = ids.iter().filter_map(|&id| {
        let info = MapInfo::from_id(id).ok()?;
        let entries = match count {
            true => entries(&info).ok().flatten(),
            false => None,
        };
        Some(LoadedMap {
            name: info.name_as_str().unwrap_or_default().to_owned(),
            id,
            kind: info.map_type().map_or("unknown", kind),
            entries_max: entries_max(&info),
            entries,
            bytes: memory(&info),
        })
    });
    let mut maps: Vec<_> = maps.collect();
    maps.sort_by(|one, two| (&one.name, one.id).cmp(&(&two.name, two.id)));
    maps
}

/// The kinds that are used, by the names that `bpftool` has for them.
const KINDS: [(MapType, &str); 10] = [
    (MapType::Hash, "hash"),
    (MapType::LruHash, "lru_hash"),
    (MapType::LpmTrie, "lpm_trie"),
    (MapType::Array, "array"),
    (MapType::PerCpuArray, "percpu_array"),
    (MapType::DevMap, "devmap"),
    (MapType::DevMapHash, "devmap_hash"),
    (MapType::RingBuf, "ringbuf"),
    (MapType::SkStorage, "sk_storage"),
    (MapType::SockHash, "sockhash"),
];

fn kind(kind: MapType) -> &'static str {
    let known = KINDS.iter().find(|(one, _)| *one == kind);
    known.map_or("other", |(_, name)| name)
}

/// `memlock` of the descriptor: since Linux 6.4 what the map takes, before that what it may take at most.
fn memory(info: &MapInfo) -> Option<u64> {
    let fd = info.fd().ok()?;
    let number = fd.as_fd().as_raw_fd();
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("memlock:"));
    line?.trim().parse().ok()
}

/// How many entries the map with this number has, by a system call for each; `None`: it is gone, or none of those that are
/// counted.
pub(crate) fn entries_of(id: u32) -> Option<u32> {
    let info = MapInfo::from_id(id).ok()?;
    entries(&info).ok().flatten()
}

/// How many entries a map has room for: of flows, not of sets.
pub(crate) fn entries_max(info: &MapInfo) -> u32 {
    match info.name_as_str() {
        Some(TRACKED) => tracked::places(info.max_entries()),
        _ => info.max_entries(),
    }
}

/// How many entries a map has; `None` if it is of a kind that is always as large as it can be.
fn entries(info: &MapInfo) -> Result<Option<u32>, MapError> {
    let most = info.max_entries();
    let sizes = (info.key_size(), info.value_size());
    let map = Map::from_map_data(MapData::from_id(info.id())?)?;
    if matches!(map, Map::HashMap(_) | Map::LruHashMap(_)) {
        return hash_entries(map, sizes, most);
    }
    if info.name_as_str() == Some(TRACKED) {
        let mut flows = 0;
        tracked::each(&map, |_, _| {
            flows += 1;
            Ok(())
        })?;
        return Ok(Some(flows));
    }
    if matches!(map, Map::LpmTrie(_)) {
        return trie_entries(map, sizes, most);
    }
    if matches!(map, Map::DevMapHash(_)) {
        let map: DevMapHash<MapData> = map.try_into()?;
        return Ok(number(map.keys(), most));
    }
    Ok(None)
}

/// aya reads a map by types that have its sizes, and bytes are of any.
fn hash_entries(map: Map, sizes: (u32, u32), most: u32) -> Result<Option<u32>, MapError> {
    match sizes {
        (4, 4) => hash::<4, 4>(map, most),
        (8, 20) => hash::<8, 20>(map, most),
        (8, 40) => hash::<8, 40>(map, most),
        (12, 8) => hash::<12, 8>(map, most),
        (16, 28) => hash::<16, 28>(map, most),
        (20, 8) => hash::<20, 8>(map, most),
        (20, 16) => hash::<20, 16>(map, most),
        (32, 20) => hash::<32, 20>(map, most),
        (32, 32) => hash::<32, 32>(map, most),
        (32, 40) => hash::<32, 40>(map, most),
        (40, 4) => hash::<40, 4>(map, most),
        (40, 16) => hash::<40, 16>(map, most),
        (40, 20) => hash::<40, 20>(map, most),
        (40, 24) => hash::<40, 24>(map, most),
        (40, 32) => hash::<40, 32>(map, most),
        (40, 40) => hash::<40, 40>(map, most),
        (44, 16) => hash::<44, 16>(map, most),
        (48, 24) => hash::<48, 24>(map, most),
        _ => Ok(None),
    }
}

/// Four bytes of a key are the prefix's length.
fn trie_entries(map: Map, sizes: (u32, u32), most: u32) -> Result<Option<u32>, MapError> {
    match sizes {
        (12, 4) => trie::<8, 4>(map, most),
        (20, 4) => trie::<16, 4>(map, most),
        (20, 28) => trie::<16, 28>(map, most),
        (20, 32) => trie::<16, 32>(map, most),
        (28, 4) => trie::<24, 4>(map, most),
        _ => Ok(None),
    }
}

fn hash<const K: usize, const V: usize>(map: Map, most: u32) -> Result<Option<u32>, MapError> {
    let map: HashMap<MapData, [u8; K], [u8; V]> = map.try_into()?;
    Ok(number(map.keys(), most))
}

fn trie<const K: usize, const V: usize>(map: Map, most: u32) -> Result<Option<u32>, MapError> {
    let map: LpmTrie<MapData, [u8; K], [u8; V]> = map.try_into()?;
    Ok(number(map.keys(), most))
}

/// At most as many as there is room for: where keys go while they are looked through, the kernel begins again.
fn number<K>(keys: impl Iterator<Item = Result<K, MapError>>, most: u32) -> Option<u32> {
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let counted = keys.take(most).take_while(Result::is_ok).count();
    u32::try_from(counted).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_s_hook_is_where_its_kind_belongs() {
        for (name, expected) in [
            ("hf_connect4", "cgroup connect4"),
            ("hf_sock_release", "cgroup sock_release"),
            ("hf_policy_in", "tcx ingress"),
            ("hf_leaving", "tcx egress"),
            ("hf_of_tomorrow", "tcx"),
        ] {
            let sees_packets = expected.starts_with("tcx");
            assert_eq!(hook(name, sees_packets), expected);
        }
    }
}
