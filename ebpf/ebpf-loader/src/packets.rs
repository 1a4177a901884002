//! The packet level: services for packets that no local socket made, on interfaces behind which
//! such clients are.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZeroU32,
    path::Path,
};

use aya::{
    Ebpf,
    maps::{Array, LpmTrie, Map, MapData, MapError, lpm_trie::Key, xdp::XdpMapError},
    programs::{ProgramError, SchedClassifier, TcAttachType, links::FdLink},
};
use ebpf_abi::{
    KEPT_PREFIXES_MAX, KeptPrefix, MASQUERADE_PORT_FIRST, PacketCounter, SocketAddress,
};
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with},
};

use crate::{
    LoadError, Services, absent_is_gone,
    leftover::prefix,
    missing, no_link, order, patiently,
    pins::{Keeper, KeptLink},
    program, redirect, rejected,
    tracked::{self, TRACKED},
};

const COUNTERS: &str = "hf_pkt_counters";

/// Of one entry where no packets are looked at: maps of this kind take all their memory at once.
const FLOW_MAPS: [&str; 6] = [
    "hf_sources",
    "hf_tracked",
    "hf_ended",
    "hf_fragmented",
    "hf_masked",
    "hf_unmasked",
];

/// For the tunnel's interface, in the order of attaching.
const TUNNEL_PROGRAMS: Programs = [
    ("hf_entering", TcAttachType::Ingress),
    ("hf_leaving", TcAttachType::Egress),
];

/// By name, and where they belong.
type Programs = [(&'static str, TcAttachType); 2];

/// What an interface's packets begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkHeader {
    /// Ethernet's header.
    Ethernet,
    /// The IP header: TUN devices and IP tunnels.
    Ip,
}

impl LinkHeader {
    const ALL: [Self; 2] = [Self::Ethernet, Self::Ip];

    /// In the order of attaching: what shows the service's address comes before what hides it.
    const fn programs(self) -> Programs {
        let [answers, requests] = match self {
            Self::Ethernet => ["hf_answers_out", "hf_requests"],
            Self::Ip => ["hf_answers_ip", "hf_requests_ip"],
        };
        [
            (answers, TcAttachType::Egress),
            (requests, TcAttachType::Ingress),
        ]
    }
}

/// What is attached, and what was told for it.
#[derive(Debug)]
pub(crate) struct Interfaces {
    /// By the interface's index.
    links: BTreeMap<NonZeroU32, Vec<KeptLink>>,
    kept: BTreeSet<(IpAddr, u8)>,
    pub(crate) redirects: redirect::Told,
}

impl Interfaces {
    /// Loads the programs, attached nowhere yet, and reads back what an earlier process left.
    pub(crate) fn load(ebpf: &mut Ebpf) -> Result<Self, LoadError> {
        let for_clients = LinkHeader::ALL.into_iter().flat_map(LinkHeader::programs);
        for (name, _) in for_clients.chain(TUNNEL_PROGRAMS) {
            program::<SchedClassifier>(ebpf, name)
                .and_then(|program| patiently(|| program.load()))
                .map_err(|error| rejected(name, error.into()))?;
        }
        tracked::seed(ebpf).map_err(|error| rejected(TRACKED, error.into()))?;
        let kept = map_of(ebpf, "hf_kept").and_then(|map| {
            let map: LpmTrie<&mut MapData, [u32; 4], u32> = map;
            let called = |key: Key<[u32; 4]>| prefix(key.data(), key.prefix_len());
            map.keys().map(|key| key.map(called)).collect()
        });
        Ok(Self {
            links: BTreeMap::new(),
            kept: kept.map_err(|error| rejected("hf_kept", error.into()))?,
            redirects: redirect::Told::load(ebpf)?,
        })
    }

    /// By the interface's index.
    pub(crate) fn links(&self) -> &BTreeMap<NonZeroU32, Vec<KeptLink>> {
        &self.links
    }

    /// Prefixes whose clients keep their address.
    pub(crate) fn kept_len(&self) -> usize {
        self.kept.len()
    }

    /// Whether packets of the interface are looked at.
    pub(crate) fn has(&self, index: NonZeroU32) -> bool {
        self.links.contains_key(&index)
    }
}

/// What names of links to interfaces begin with.
pub(crate) const LINKS: &str = "tcx_";

/// As whom clients go by the tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Masquerade {
    /// This node, to IPv4 endpoints.
    pub v4: Ipv4Addr,
    /// This node, to IPv6 endpoints.
    pub v6: Ipv6Addr,
    /// Prefixes, each with its length, whose clients go as themselves: the mesh leads to them by
    /// this node.
    pub kept: BTreeSet<(IpAddr, u8)>,
}

/// Why packets of an interface cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    /// By [`Services::load`].
    #[error("the services were loaded for sockets alone")]
    SocketsAlone,
    /// Not in the thread's network namespace, or not any more.
    #[error("no interface has the index {index}")]
    Unknown {
        /// The index.
        index: NonZeroU32,
        /// What the kernel said.
        source: Errno,
    },
    /// The kernel took the program but not its place on the interface.
    #[error("cannot attach {program} to interface {index}, which needs Linux 6.6 or newer")]
    Attach {
        /// The program.
        program: &'static str,
        /// The interface's index.
        index: NonZeroU32,
        /// What the kernel said.
        source: ProgramError,
    },
    /// The kernel refused a change of the routes that redirected packets follow.
    #[error("cannot write where packets are redirected to")]
    Redirect(#[from] XdpMapError),
    /// The kernel refused to let the programs of policy know the interface.
    #[error("cannot write which interfaces policy knows")]
    Policy(#[source] XdpMapError),
}

impl Services {
    /// As [`Services::load`], and ready to look at packets. The flows' memory, 35 MiB
    /// (`TRACKED_MAX`), is taken now.
    ///
    /// # Errors
    ///
    /// What this machine lacks, and how to get it. Nothing stays loaded.
    pub fn load_with_packets(cgroup: &Path) -> Result<Self, LoadError> {
        let mut services = Self::take_over(cgroup, None, true)?;
        services.attach()?;
        Ok(services)
    }

    /// Serves the clients behind an interface of the calling thread's network namespace:
    /// what they send to a service goes to an endpoint, and answers come back as the service's.
    /// The programs come before all others on the interface. Returns whether they were not there
    /// before: they are asked for, because the index may have come to another interface.
    ///
    /// # Errors
    ///
    /// [`InterfaceError`]; nothing stays attached.
    pub fn attach_interface(
        &mut self,
        index: NonZeroU32,
        header: LinkHeader,
    ) -> Result<bool, InterfaceError> {
        self.attach_programs(index, header.programs())
    }

    /// Lets clients of the other interfaces into the tunnel whose interface this is, as
    /// [`Self::masquerade`] says. Its packets begin with the IP header.
    ///
    /// # Errors
    ///
    /// As [`Self::attach_interface`].
    pub fn attach_tunnel(&mut self, index: NonZeroU32) -> Result<bool, InterfaceError> {
        let attached = self.attach_programs(index, TUNNEL_PROGRAMS)?;
        let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
        if attached && range.is_ok_and(|range| reaches_masqueraded(&range)) {
            tracing::warn!(
                "sockets here may be given ports of masqueraded clients, and miss answers then: set \
                 net.ipv4.ip_local_port_range to end below {MASQUERADE_PORT_FIRST}"
            );
        }
        Ok(attached)
    }

    fn attach_programs(
        &mut self,
        index: NonZeroU32,
        programs: Programs,
    ) -> Result<bool, InterfaceError> {
        let interfaces = self.interfaces.as_mut();
        let interfaces = interfaces.ok_or(InterfaceError::SocketsAlone)?;
        let name = interface_name(index)?;
        let mut all = programs.iter();
        let there =
            all.all(|&(program, direction)| is_attached(&mut self.ebpf, program, &name, direction));
        if there && interfaces.links.contains_key(&index) {
            return Ok(false);
        }
        match attach_all(&mut self.ebpf, &mut self.keeper, LINKS, programs, index) {
            Ok(links) => {
                // In the place of those of an interface that is gone, if its index has come to this one.
                interfaces.links.insert(index, links);
                Ok(true)
            }
            Err(error) => {
                self.detach_interface(index);
                Err(error)
            }
        }
    }

    /// Leaves an interface alone again; whether the programs were there. Open flows of its
    /// clients end. Must also be called for an interface that is gone.
    pub fn detach_interface(&mut self, index: NonZeroU32) -> bool {
        let interfaces = self.interfaces.as_mut();
        let links = interfaces.and_then(|interfaces| interfaces.links.remove(&index));
        let were_there = links.is_some();
        links.into_iter().flatten().for_each(KeptLink::remove);
        were_there
    }

    /// Leaves those interfaces alone on which an earlier process left programs, and to which none were
    /// attached since. To be called once those are attached that are wanted.
    pub fn detach_others(&mut self) {
        let others = self.keeper.forget(LINKS);
        if others > 0 {
            tracing::info!(
                others,
                "programs of an earlier agent removed from interfaces"
            );
        }
    }

    /// Says as whom clients go by the tunnel, and who goes as himself. Open flows keep their port,
    /// unless the node has another address now. Returns how many prefixes had no room.
    ///
    /// # Errors
    ///
    /// [`MapError`] if the kernel refuses; call it again.
    pub fn masquerade(&mut self, wanted: &Masquerade) -> Result<usize, MapError> {
        let Some(interfaces) = self.interfaces.as_mut() else {
            return Ok(0);
        };
        let room = KEPT_PREFIXES_MAX as usize;
        let kept: BTreeSet<_> = wanted.kept.iter().copied().take(room).collect();
        let mut map: LpmTrie<&mut MapData, [u32; 4], u32> = map_of(&mut self.ebpf, "hf_kept")?;
        let gone: Vec<_> = interfaces.kept.difference(&kept).copied().collect();
        for prefix in gone {
            absent_is_gone(map.remove(&key(prefix)))?;
            interfaces.kept.remove(&prefix);
        }
        for &prefix in &kept {
            map.insert(&key(prefix), 1, 0)?;
            interfaces.kept.insert(prefix);
        }
        let own = ebpf_abi::Masquerade {
            v4: ip(wanted.v4.into()),
            v6: ip(wanted.v6.into()),
        };
        let mut map: Array<&mut MapData, ebpf_abi::Masquerade> =
            map_of(&mut self.ebpf, "hf_masquerade")?;
        map.set(0, own, 0)?;
        Ok(wanted.kept.len() - kept.len())
    }

    /// What became of the packets of all interfaces since the maps were made.
    ///
    /// # Errors
    ///
    /// [`MapError`] if the kernel does not say.
    pub fn packet_counters(&self) -> Result<BTreeMap<PacketCounter, u64>, MapError> {
        self.sums(COUNTERS, PacketCounter::ALL, |counter| counter as u32)
    }
}

pub(crate) fn map_of<'a, M: TryFrom<&'a mut Map, Error = MapError>>(
    ebpf: &'a mut Ebpf,
    name: &str,
) -> Result<M, MapError> {
    M::try_from(ebpf.map_mut(name).ok_or_else(|| missing(name))?)
}

/// An address as the programs compare it.
fn ip(address: IpAddr) -> [u32; 4] {
    SocketAddress::new(address, 0, 0).ip
}

pub(crate) fn key((address, length): (IpAddr, u8)) -> Key<[u32; 4]> {
    let mapped = if address.is_ipv4() { 96 } else { 0 };
    let key = KeptPrefix {
        prefix_len: mapped + u32::from(length),
        ip: ip(address),
    };
    Key::new(key.prefix_len, key.ip)
}

/// Whether the kernel's ports for sockets that ask for any, as it writes their first and last, go on
/// to those of masqueraded clients.
fn reaches_masqueraded(range: &str) -> bool {
    let last = range.split_whitespace().nth(1);
    last.is_some_and(|last| {
        last.parse()
            .is_ok_and(|last: u32| last >= MASQUERADE_PORT_FIRST)
    })
}

/// Maps that need no room.
pub(crate) fn single_entry_maps(packets: bool) -> &'static [&'static str] {
    if packets { &[] } else { &FLOW_MAPS }
}

/// Whether the interface has the program where it belongs.
pub(crate) fn is_attached(
    ebpf: &mut Ebpf,
    name: &str,
    interface: &str,
    direction: TcAttachType,
) -> bool {
    let own = program::<SchedClassifier>(ebpf, name).and_then(|program| Ok(program.info()?.id()));
    let there = SchedClassifier::query_tcx(interface, direction);
    own.is_ok_and(|own| there.is_ok_and(|(_, programs)| programs.iter().any(|one| one.id() == own)))
}

/// Puts programs where they belong at the interface of this index, in the place of those that an earlier process left
/// there under names that begin with `kind`; nothing stays attached if one is refused.
pub(crate) fn attach_all<const N: usize>(
    ebpf: &mut Ebpf,
    keeper: &mut Keeper,
    kind: &str,
    programs: [(&'static str, TcAttachType); N],
    index: NonZeroU32,
) -> Result<Vec<KeptLink>, InterfaceError> {
    let interface = interface_name(index)?;
    let mut links = Vec::with_capacity(N);
    let attached = programs.into_iter().try_for_each(|(program, direction)| {
        let pin = format!("{kind}{index}_{program}");
        let link = attach(ebpf, keeper, program, (&pin, &interface), direction);
        links.push(link.map_err(|source| InterfaceError::Attach {
            program,
            index,
            source,
        })?);
        Ok(())
    });
    // aya takes names, and a name may have gone to another interface meanwhile.
    let attached = attached.and_then(|()| match interface_name(index)? == interface {
        true => Ok(()),
        false => Err(InterfaceError::Unknown {
            index,
            source: Errno::NODEV,
        }),
    });
    match attached {
        Ok(()) => Ok(links),
        Err(error) => {
            links.into_iter().for_each(KeptLink::remove);
            Err(error)
        }
    }
}

/// Puts the program in the place of the one that an earlier process left there under this name, else where it belongs.
fn attach(
    ebpf: &mut Ebpf,
    keeper: &mut Keeper,
    name: &str,
    (pin, interface): (&str, &str),
    direction: TcAttachType,
) -> Result<KeptLink, ProgramError> {
    if let Some(left) = keeper.found(pin)
        && let Ok(link) = replace(ebpf, name, left)
        // Else the interface that it was on is gone, or in another namespace.
        && is_attached(ebpf, name, interface, direction)
    {
        return Ok(keeper.claim(pin, link));
    }
    let link = order::attach(ebpf, name, interface, direction)?;
    keeper.keep(pin, link.try_into().map_err(no_link)?)
}

/// In one step for packets (`BPF_LINK_UPDATE`).
fn replace(ebpf: &mut Ebpf, name: &str, left: FdLink) -> Result<FdLink, ProgramError> {
    let program = program::<SchedClassifier>(ebpf, name)?;
    let link = program.attach_to_link(left.try_into().map_err(no_link)?)?;
    program.take_link(link)?.try_into().map_err(no_link)
}

pub(crate) fn interface_name(index: NonZeroU32) -> Result<String, InterfaceError> {
    let name = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .and_then(|socket| netdevice::index_to_name(socket, index.get()));
    name.map_err(|source| InterfaceError::Unknown { index, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_that_sockets_and_masqueraded_clients_would_share_are_noticed() {
        for (range, shared) in [
            ("32768\t60999\n", false),
            ("1024\t65535\n", true),
            ("32768\t61000\n", true),
            ("", false),
        ] {
            assert_eq!(reaches_masqueraded(range), shared, "{range:?}");
        }
    }
}
