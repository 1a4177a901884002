//! LAN subnets that the mesh sees under another range: translated at the tunnel's interface.
//!
//! An object of its own, with its own maps: nodes without such subnets do not load it. It goes with the process,
//! as the tunnel's interface does.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    num::NonZeroU32,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{LpmTrie, MapData, MapError},
    programs::{ProgramError, SchedClassifier, TcAttachType},
};
use ebpf_abi::{MAPPINGS_MAX, MappedTo, MappingCounter, SocketAddress};

use crate::{
    LoadError, absent_is_gone, check_capabilities,
    packets::{InterfaceError, attach_all, key},
    patiently,
    pins::{Keeper, KeptLink},
    program, rejected, sums, take_map,
};

const COUNTERS: &str = "hf_map_counters";

/// By name, and where they belong.
const PROGRAMS: [(&str, TcAttachType); 2] = [
    ("hf_mapped_in", TcAttachType::Ingress),
    ("hf_mapped_out", TcAttachType::Egress),
];

/// A subnet by its two names. Of addresses whose first `length` bits are those of one, these become those of the
/// other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mapping {
    /// As the LAN knows it.
    pub lan: IpAddr,
    /// As the mesh does: of the same family.
    pub seen_as: IpAddr,
    /// The length of both prefixes in bits.
    pub length: u8,
}

impl Mapping {
    /// What addresses become that begin as `lan` does, and what those that begin as `seen_as` does.
    fn values(&self) -> [MappedTo; 2] {
        let [lan, seen_as] = [self.lan, self.seen_as].map(|ip| SocketAddress::new(ip, 0, 0).ip);
        let mapped = if self.lan.is_ipv4() { 96 } else { 0 };
        let host = u128::MAX
            .checked_shr(mapped + u32::from(self.length))
            .unwrap_or_default();
        let words = host.to_be_bytes();
        let (words, _) = words.as_chunks::<4>();
        let mut host = [0; 4];
        for (to, word) in host.iter_mut().zip(words) {
            *to = u32::from_ne_bytes(*word);
        }
        [seen_as, lan].map(|mut ip| {
            for (word, host) in ip.iter_mut().zip(host) {
                *word &= !host;
            }
            MappedTo { ip, host }
        })
    }
}

/// The programs, their links and their maps. Dropping it takes all of it out of the kernel.
pub struct Mappings {
    /// By the LAN's address, and by the mesh's.
    maps: [LpmTrie<MapData, [u32; 4], MappedTo>; 2],
    installed: BTreeSet<Mapping>,
    links: Vec<KeptLink>,
    ebpf: Ebpf,
}

impl std::fmt::Debug for Mappings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mappings")
            .field("installed", &self.installed)
            .field("links", &self.links)
            .finish_non_exhaustive()
    }
}

impl Mappings {
    /// Loads the programs, attached nowhere yet, with nothing to translate.
    ///
    /// # Errors
    ///
    /// What this machine lacks, and how to get it. Nothing stays loaded.
    pub fn load() -> Result<Self, LoadError> {
        check_capabilities()?;
        let mut ebpf = EbpfLoader::new()
            .load(ebpf_programs::MAPPING)
            .map_err(|source| rejected("the maps of mapped subnets", source))?;
        for (name, _) in PROGRAMS {
            program::<SchedClassifier>(&mut ebpf, name)
                .and_then(|program| patiently(|| program.load()))
                .map_err(|error| rejected(name, error.into()))?;
        }
        Ok(Self {
            maps: [
                take_map(&mut ebpf, "hf_map_out", LpmTrie::try_from)?,
                take_map(&mut ebpf, "hf_map_in", LpmTrie::try_from)?,
            ],
            installed: BTreeSet::new(),
            links: Vec::new(),
            ebpf,
        })
    }

    /// Translates what comes and goes by the tunnel whose interface this is.
    ///
    /// # Errors
    ///
    /// [`InterfaceError`]; nothing stays attached.
    pub fn attach_tunnel(&mut self, index: NonZeroU32) -> Result<(), InterfaceError> {
        self.links.clear();
        let nothing = &mut Keeper::default();
        self.links = attach_all(&mut self.ebpf, nothing, "mapped_", PROGRAMS, index)?;
        Ok(())
    }

    /// Makes the maps hold `wanted`, touching only what differs. Returns how many had no room.
    ///
    /// # Errors
    ///
    /// [`MapError`] if the kernel refuses; call it again.
    pub fn apply(&mut self, wanted: &BTreeSet<Mapping>) -> Result<usize, MapError> {
        let room = MAPPINGS_MAX as usize;
        let kept: BTreeSet<_> = wanted.iter().copied().take(room).collect();
        let gone: Vec<_> = self.installed.difference(&kept).copied().collect();
        for one in gone {
            for (map, ip) in self.maps.iter_mut().zip([one.lan, one.seen_as]) {
                absent_is_gone(map.remove(&key((ip, one.length))))?;
            }
            self.installed.remove(&one);
        }
        // All of them: what was gone may have had the same prefix as one that stays.
        for &one in &kept {
            let entries = [one.lan, one.seen_as].into_iter().zip(one.values());
            for (map, (ip, value)) in self.maps.iter_mut().zip(entries) {
                map.insert(&key((ip, one.length)), value, 0)?;
            }
            self.installed.insert(one);
        }
        Ok(wanted.len() - kept.len())
    }

    /// How many subnets are translated.
    pub(crate) fn len(&self) -> usize {
        self.installed.len()
    }

    pub(crate) fn ebpf(&self) -> &Ebpf {
        &self.ebpf
    }

    pub(crate) fn links(&self) -> &[KeptLink] {
        &self.links
    }

    /// What became of packets since the programs were loaded.
    ///
    /// # Errors
    ///
    /// [`MapError`] if the kernel does not say.
    pub fn counters(&self) -> Result<BTreeMap<MappingCounter, u64>, MapError> {
        sums(&self.ebpf, COUNTERS, MappingCounter::ALL, |counter| {
            counter as u32
        })
    }

    /// What looks at packets that come by the tunnel, or leave: for the kernel's test run.
    ///
    /// # Errors
    ///
    /// None that could happen after [`Self::load`].
    pub fn program(&self, leaving: bool) -> Result<&SchedClassifier, ProgramError> {
        let [(entering, _), (leaves, _)] = PROGRAMS;
        let found = self.ebpf.program(if leaving { leaves } else { entering });
        found
            .ok_or(ProgramError::UnexpectedProgramType)
            .and_then(TryInto::try_into)
    }
}
