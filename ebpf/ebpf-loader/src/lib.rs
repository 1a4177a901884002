//! Services in the kernel: loads the cgroup programs, and keeps their maps equal to what it is told.
//!
//! **Invariant:** nothing is pinned but by [`Pins`]: without them the end of the process, however it
//! comes, detaches every program and frees every map. Nothing here decides which endpoints a service
//! has.

#![forbid(unsafe_code)]

mod cgroup;
mod connects;
pub mod fill;
pub mod guard;
pub mod inspect;
mod leftover;
pub mod mapping;
mod open;
mod order;
mod packets;
mod pins;
mod plan;
pub mod policy;
mod redirect;
mod sockmap;
mod tracked;
mod udp;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Array, HashMap, LpmTrie, MapData, MapError, PerCpuArray, lpm_trie::Key},
    programs::{
        CgroupAttachMode, CgroupSock, CgroupSockAddr, Program, ProgramError, links::LinkError,
        sock_ops::SockOpsLink,
    },
};
use ebpf_abi::{
    Counter, ENDPOINTS_USABLE, EndpointList, FRONTENDS_MAX, LIST_ENDPOINTS_MAX, PROTOCOL_TCP,
    PROTOCOL_UDP, RANGES_MAX, SocketAddress,
};
use rustix::{
    io::Errno,
    thread::{CapabilitySet, capabilities},
};

use crate::{
    cgroup::open_cgroup2,
    leftover::{Leftover, ServiceMaps},
    packets::map_of,
    pins::{Keeper, KeptLink, Shapes},
    plan::{Change, Installed, Limits, Plan, plan},
};
pub use crate::{
    cgroup::{CgroupError, find_cgroup2},
    connects::Failures,
    packets::{InterfaceError, LinkHeader, Masquerade},
    pins::{BPFFS, Pins, PinsError},
    plan::LeftOut,
    redirect::{RedirectKind, RedirectLink, RedirectReport, Redirects},
    sockmap::SockmapError,
    udp::{DeviceFlow, Led},
};

/// What the maps hold at most.
const LIMITS: Limits = Limits {
    frontends: FRONTENDS_MAX as usize,
    endpoints: ENDPOINTS_USABLE as usize,
    list_endpoints: LIST_ENDPOINTS_MAX as usize,
    ranges: RANGES_MAX as usize / 2,
};

const COUNTERS: &str = "hf_counters";

/// How many lists were replaced or removed.
const REPLACED: &str = "hf_replaced";

/// What names of links to cgroups begin with.
const CGROUP_LINKS: &str = "cgroup_";

/// What is told of each socket that closes.
const RELEASE: &str = "hf_sock_release";

/// In the order of attaching: what shows the service's address comes before what hides it.
const PROGRAMS: [&str; 8] = [
    "hf_getpeername4",
    "hf_getpeername6",
    "hf_recvmsg4",
    "hf_recvmsg6",
    "hf_sendmsg4",
    "hf_sendmsg6",
    "hf_connect4",
    "hf_connect6",
];

/// A transport protocol that services can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// For whom a frontend is. What holds for some comes first: where there is no room for all, nobody is let in
/// whom it would keep out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Clients {
    /// Those whose packets come in by an interface, where something else holds for them.
    Outside,
    /// Everybody else.
    All,
}

/// An address at which a service is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frontend {
    /// For whom.
    pub clients: Clients,
    /// The service's address. An IPv6-mapped IPv4 address is the IPv4 address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// Its protocol.
    pub protocol: Protocol,
}

impl Frontend {
    fn key(&self) -> SocketAddress {
        let key = self.socket_address(SocketAddr::new(self.address, self.port));
        match self.clients {
            Clients::All => key,
            Clients::Outside => key.for_outside(),
        }
    }

    /// Whether no other frontend is the same.
    fn is_canonical(&self) -> bool {
        self.address == self.address.to_canonical()
    }

    /// `addr` with this frontend's protocol.
    fn socket_address(&self, addr: SocketAddr) -> SocketAddress {
        let protocol = match self.protocol {
            Protocol::Tcp => PROTOCOL_TCP,
            Protocol::Udp => PROTOCOL_UDP,
        };
        // Both are below 256.
        SocketAddress::new(addr.ip(), addr.port(), protocol.to_le_bytes()[0])
    }
}

/// Where a frontend leads.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Backends {
    /// New flows go to one of these, to each as often as it is here. Empty: they are refused.
    pub endpoints: Vec<SocketAddr>,
    /// To which.
    pub selection: Selection,
    /// How long after its last new flow a client keeps its endpoint, also for other ports of the
    /// same address (`sessionAffinity: ClientIP`). A client is a network namespace, for packets a
    /// source address.
    pub affinity: Option<Duration>,
    /// Whose packets it takes at interfaces, those of others are dropped; `None`: everybody's.
    pub ranges: Option<Ranges>,
}

/// Prefixes, each with its length.
pub type Ranges = BTreeSet<(IpAddr, u8)>;

impl Backends {
    fn ranges_len(&self) -> usize {
        self.ranges.as_ref().map_or(0, Ranges::len)
    }
}

/// How an endpoint is chosen for a new flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Selection {
    /// By chance.
    #[default]
    Random,
    /// By the client's hash as the place in the list: the same client, the same place. A client is
    /// a network namespace, for packets a source address.
    ClientHash,
    /// One after the other.
    Turns,
}

impl From<Vec<SocketAddr>> for Backends {
    fn from(endpoints: Vec<SocketAddr>) -> Self {
        Self {
            endpoints,
            ..Self::default()
        }
    }
}

/// The programs, their links and their maps. Dropping it takes all of it out of the kernel, but for what
/// [`Pins`] keep.
#[derive(Debug)]
pub struct Services {
    frontends: HashMap<MapData, SocketAddress, u64>,
    endpoints: HashMap<MapData, u64, SocketAddress>,
    timeouts: HashMap<MapData, SocketAddress, u64>,
    ranges: LpmTrie<MapData, [u32; 6], u32>,
    installed: BTreeMap<Frontend, Installed>,
    /// Slots of all installed lists.
    installed_slots: usize,
    /// Prefixes of all installed lists.
    installed_ranges: usize,
    /// Whether the maps are what was last asked for, all of it.
    complete: bool,
    next_list: u64,
    /// Where packets are looked at; nowhere if loaded for sockets alone.
    interfaces: Option<packets::Interfaces>,
    /// Of the programs for sockets; none until they are attached.
    links: Vec<KeptLink>,
    /// Of the one that counts how connects end, while it does.
    watching: Option<SockOpsLink>,
    sockmap: sockmap::Sockmap,
    keeper: Keeper,
    cgroup: PathBuf,
    /// Owns the programs and the other maps.
    ebpf: Ebpf,
}

/// Why services cannot work here.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Not root.
    #[error(
        "eBPF services need root, or the capabilities CAP_BPF and CAP_NET_ADMIN, in a container \
         also a seccomp profile that allows bpf()"
    )]
    NotPermitted,
    /// The kernel has no eBPF, or one from before BTF.
    #[error(
        "Linux {release} takes no BTF: eBPF services need Linux 5.18 or newer, built with \
         CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF"
    )]
    NoBtf {
        /// The running kernel.
        release: String,
    },
    /// The path is not a folder of a cgroup2 mount.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The kernel lacks something that a program or map needs.
    #[error(
        "Linux {release} does not take {what} of the eBPF services, which need Linux 5.18 or newer"
    )]
    Rejected {
        /// The running kernel.
        release: String,
        /// The program or map.
        what: String,
        /// What the kernel said, with the verifier's words.
        source: Box<EbpfError>,
    },
    /// What an earlier process left cannot be taken over.
    #[error(transparent)]
    Pins(#[from] PinsError),
    /// The kernel took a program but not its place in the cgroup.
    #[error("cannot attach {program} to {}", cgroup.display())]
    Attach {
        /// The program.
        program: &'static str,
        /// The cgroup.
        cgroup: PathBuf,
        /// What the kernel said.
        source: ProgramError,
    },
}

/// A change that the kernel refused. What was applied before it stays, a list is never half
/// applied, and the next `apply` tries the rest again.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} service {}:{}", frontend.address, frontend.port)]
pub struct ApplyError {
    doing: &'static str,
    frontend: Frontend,
    source: MapError,
}

/// What `apply` did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ApplyReport {
    /// Frontends that are new or have a new list.
    pub written: usize,
    /// Frontends that are gone.
    pub removed: usize,
    /// Frontends that already were as they should be.
    pub unchanged: usize,
    /// What has no room.
    pub left_out: LeftOut,
}

impl Services {
    /// Loads the programs, without any service yet, for the processes in `cgroup` and below.
    ///
    /// # Errors
    ///
    /// What this machine lacks, and how to get it. Nothing stays loaded.
    pub fn load(cgroup: &Path) -> Result<Self, LoadError> {
        let mut services = Self::take_over(cgroup, None, false)?;
        services.attach()?;
        Ok(services)
    }

    /// Loads the programs, for packets too if `packets`, and takes over what an earlier process left in
    /// `pins`: its services are known as if [`Self::apply`] had been told, and its programs go on with
    /// the same maps until [`Self::attach`]. So no flow goes past a service in between: take over, apply,
    /// attach. Maps of another layout are made anew, which is logged; then the old programs go on with
    /// the old maps.
    ///
    /// # Errors
    ///
    /// As [`Self::load`]; what was pinned stays as it was.
    pub fn take_over(cgroup: &Path, pins: Option<Pins>, packets: bool) -> Result<Self, LoadError> {
        check_capabilities()?;
        open_cgroup2(cgroup)?;
        if aya::features().btf().is_none() {
            return Err(LoadError::NoBtf {
                release: kernel_release(),
            });
        }
        let single = packets::single_entry_maps(packets);
        let object = ebpf_programs::SERVICES;
        let of_maps = |source| rejected("the maps", source);
        let shapes = Shapes::of_object(object, single).map_err(of_maps)?;
        let mut loader = EbpfLoader::new();
        for map in single {
            loader.map_max_entries(map, 1);
        }
        if let Some(pins) = &pins {
            pins.keep_maps(&shapes, &mut loader)?;
        }
        let mut ebpf = loader.load(object).map_err(of_maps)?;
        let mut frontends = take_map(&mut ebpf, "hf_frontends", HashMap::try_from)?;
        let mut endpoints = take_map(&mut ebpf, "hf_endpoints", HashMap::try_from)?;
        let mut timeouts = take_map(&mut ebpf, "hf_timeouts", HashMap::try_from)?;
        let mut ranges = take_map(&mut ebpf, "hf_ranges", LpmTrie::try_from)?;
        for name in PROGRAMS {
            load(&mut ebpf, name).map_err(|error| rejected(name, error.into()))?;
        }
        program::<CgroupSock>(&mut ebpf, RELEASE)
            .and_then(|program| patiently(|| program.load()))
            .map_err(|error| rejected(RELEASE, error.into()))?;
        connects::load(&mut ebpf).map_err(|error| rejected(connects::PROGRAM, error.into()))?;
        let sockmap = sockmap::Sockmap::load(&mut ebpf)?;
        let interfaces = packets.then(|| packets::Interfaces::load(&mut ebpf));
        let interfaces = interfaces.transpose()?;
        if let Some(pins) = &pins {
            pins.forget_maps(&shapes);
        }
        let maps = ServiceMaps {
            frontends: &mut frontends,
            endpoints: &mut endpoints,
            timeouts: &mut timeouts,
            ranges: &mut ranges,
        };
        let left = maps.read_back();
        let left = left.and_then(|left| tell_replaced(&mut ebpf).map(|()| left));
        let Leftover {
            installed,
            next_list,
        } = left.map_err(|error| rejected("what is left in the maps", error.into()))?;
        // Else all that is wanted has to be told.
        let complete = installed.is_empty();
        if !complete {
            tracing::info!(
                frontends = installed.len(),
                "services of an earlier agent taken over"
            );
        }
        let backends = installed.values().map(|found| &found.backends);
        let sums = backends.map(|found| (found.endpoints.len(), found.ranges_len()));
        let (slots, prefixes) = sums.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        Ok(Self {
            frontends,
            endpoints,
            timeouts,
            ranges,
            installed,
            installed_slots: slots,
            installed_ranges: prefixes,
            complete,
            next_list,
            interfaces,
            links: Vec::new(),
            watching: None,
            sockmap,
            keeper: Keeper::new(pins),
            cgroup: cgroup.to_owned(),
            ebpf,
        })
    }

    /// Has the programs for sockets look at new flows, in the place of those that an earlier process
    /// left. Those for packets have to be told where: [`Self::attach_interface`].
    ///
    /// # Errors
    ///
    /// [`LoadError::Attach`]; what was attached before stays.
    pub fn attach(&mut self) -> Result<(), LoadError> {
        if !self.links.is_empty() {
            return Ok(());
        }
        let folder = open_cgroup2(&self.cgroup)?;
        let mut links = Vec::with_capacity(PROGRAMS.len() + 1);
        // The first, so that nothing is remembered that is not forgotten.
        for name in [RELEASE].into_iter().chain(PROGRAMS) {
            let link = attach(&mut self.ebpf, &mut self.keeper, name, &folder);
            links.push(link.map_err(|source| LoadError::Attach {
                program: name,
                cgroup: self.cgroup.clone(),
                source,
            })?);
        }
        self.links = links;
        self.keeper.forget(CGROUP_LINKS);
        if self.interfaces.is_none() {
            self.keeper.forget(packets::LINKS);
        }
        tracing::info!(cgroup = %self.cgroup.display(), "eBPF services attached");
        Ok(())
    }

    /// Whether the services go on when the process ends.
    #[must_use]
    pub fn are_kept(&self) -> bool {
        self.keeper.pins().is_some()
    }

    /// Makes the maps hold `desired`, touching only what differs. Replacing a list is one step for
    /// a reader: it has an endpoint of the old list or of the new one. Open flows stay where they
    /// are. A frontend with an empty list refuses.
    ///
    /// What the maps have no room for is left out, last in order first, and counted.
    ///
    /// # Errors
    ///
    /// [`ApplyError`] if the kernel refuses a change, for want of memory: apply again later.
    pub fn apply(
        &mut self,
        desired: &BTreeMap<Frontend, Backends>,
    ) -> Result<ApplyReport, ApplyError> {
        let plan = plan(desired, &self.installed, LIMITS);
        self.complete = plan.left_out.is_nothing() && desired.keys().all(Frontend::is_canonical);
        self.perform(plan)
    }

    /// As [`Services::apply`], for those who know what is different from what they asked for last:
    /// costs no more than that. `None`: the maps do not hold all that was asked for, or would not
    /// then. Who stays out is decided among all: apply all of it. Nothing was changed.
    ///
    /// # Errors
    ///
    /// [`ApplyError`]: apply all of it later.
    pub fn apply_changes(
        &mut self,
        changes: &BTreeMap<Frontend, Option<Backends>>,
    ) -> Result<Option<ApplyReport>, ApplyError> {
        if !self.complete || !changes.keys().all(Frontend::is_canonical) {
            return Ok(None);
        }
        let installed =
            |frontend: &Frontend| Some((*frontend, self.installed.get(frontend)?.clone()));
        let actual: BTreeMap<_, _> = changes.keys().filter_map(installed).collect();
        let slots: usize = actual
            .values()
            .map(|found| found.backends.endpoints.len())
            .sum();
        let ranges: usize = actual
            .values()
            .map(|found| found.backends.ranges_len())
            .sum();
        let desired = changes
            .iter()
            .filter_map(|(&frontend, backends)| Some((frontend, backends.clone()?)));
        let limits = Limits {
            frontends: LIMITS.frontends - (self.installed.len() - actual.len()),
            endpoints: LIMITS.endpoints - (self.installed_slots - slots),
            ranges: LIMITS.ranges - (self.installed_ranges - ranges),
            ..LIMITS
        };
        let plan = plan(&desired.collect(), &actual, limits);
        if !plan.left_out.is_nothing() {
            return Ok(None);
        }
        self.perform(plan).map(Some)
    }

    fn perform(&mut self, plan: Plan) -> Result<ApplyReport, ApplyError> {
        let mut report = ApplyReport {
            unchanged: plan.unchanged,
            left_out: plan.left_out,
            ..ApplyReport::default()
        };
        let complete = std::mem::replace(&mut self.complete, false); // Until all of it is done.
        for change in plan.changes {
            match change {
                Change::Remove(frontend) => {
                    self.remove(frontend).map_err(explain("remove", frontend))?;
                    report.removed += 1;
                }
                Change::Set(frontend, backends) => {
                    self.set(frontend, backends)
                        .map_err(explain("write", frontend))?;
                    report.written += 1;
                }
            }
        }
        self.complete = complete;
        Ok(report)
    }

    /// What the programs counted since the maps were made.
    ///
    /// # Errors
    ///
    /// [`MapError`] if the kernel does not say.
    pub fn counters(&self) -> Result<BTreeMap<Counter, u64>, MapError> {
        self.sums(COUNTERS, Counter::ALL, |counter| counter as u32)
    }

    /// What stands in a map of counters, over all processors; `index` says where each is.
    fn sums<C: Copy + Ord>(
        &self,
        map: &str,
        counters: &[C],
        index: fn(C) -> u32,
    ) -> Result<BTreeMap<C, u64>, MapError> {
        sums(&self.ebpf, map, counters, index)
    }

    /// New list first, then the frontend's value, which is what readers follow, then that is told, then the old list
    /// away. A reader between the last two reads again.
    fn set(&mut self, frontend: Frontend, backends: Backends) -> Result<(), MapError> {
        let mut list = EndpointList::new(self.next_list, backends.endpoints.len());
        if backends.affinity.is_some() {
            list = list.with_affinity();
        }
        list = match backends.selection {
            Selection::Random => list,
            Selection::ClientHash => list.with_hash(),
            Selection::Turns => list.with_turns(),
        };
        if backends.ranges.is_some() {
            list = list.with_ranges();
        }
        self.next_list += 1;
        let written = self
            .write_list(&frontend, list, &backends)
            .and_then(|()| self.write_timeout(&frontend, backends.affinity))
            .and_then(|()| self.frontends.insert(frontend.key(), list.value(), 0));
        if let Err(error) = written {
            self.erase(list, backends.ranges.as_ref())?;
            return Err(error);
        }
        let forgets = backends.affinity.is_none();
        self.installed_slots += backends.endpoints.len();
        self.installed_ranges += backends.ranges_len();
        let installed = Installed { list, backends };
        let replaced = self.installed.insert(frontend, installed);
        let Some(replaced) = replaced else {
            return Ok(());
        };
        self.installed_slots -= replaced.backends.endpoints.len();
        self.installed_ranges -= replaced.backends.ranges_len();
        if forgets && replaced.backends.affinity.is_some() {
            absent_is_gone(self.timeouts.remove(&frontend.key()))?;
        }
        tell_replaced(&mut self.ebpf)?;
        self.erase(replaced.list, replaced.backends.ranges.as_ref())
    }

    fn write_list(
        &mut self,
        frontend: &Frontend,
        list: EndpointList,
        backends: &Backends,
    ) -> Result<(), MapError> {
        for (slot, &endpoint) in list.slots().zip(&backends.endpoints) {
            self.endpoints
                .insert(slot, frontend.socket_address(endpoint), 0)?;
        }
        let mut ranges = backends.ranges.iter().flatten();
        ranges.try_for_each(|&range| self.ranges.insert(&range_key(list, range), 1, 0))
    }

    fn write_timeout(
        &mut self,
        frontend: &Frontend,
        affinity: Option<Duration>,
    ) -> Result<(), MapError> {
        let Some(timeout) = affinity else {
            return Ok(());
        };
        // The programs compute with signed nanoseconds: 292 years.
        let timeout_ns = i64::try_from(timeout.as_nanos()).unwrap_or(i64::MAX);
        self.timeouts
            .insert(frontend.key(), timeout_ns.cast_unsigned(), 0)
    }

    fn remove(&mut self, frontend: Frontend) -> Result<(), MapError> {
        self.frontends.remove(&frontend.key())?;
        let Some(removed) = self.installed.remove(&frontend) else {
            return Ok(());
        };
        self.installed_slots -= removed.backends.endpoints.len();
        self.installed_ranges -= removed.backends.ranges_len();
        if removed.backends.affinity.is_some() {
            absent_is_gone(self.timeouts.remove(&frontend.key()))?;
        }
        tell_replaced(&mut self.ebpf)?;
        self.erase(removed.list, removed.backends.ranges.as_ref())
    }

    /// Removes a list's endpoints and prefixes, as far as they were written.
    fn erase(&mut self, list: EndpointList, ranges: Option<&Ranges>) -> Result<(), MapError> {
        for &range in ranges.into_iter().flatten() {
            absent_is_gone(self.ranges.remove(&range_key(list, range)))?;
        }
        for slot in list.slots() {
            absent_is_gone(self.endpoints.remove(&slot))?;
        }
        Ok(())
    }
}

/// To be called between what takes a list from readers and what is written next, which may take its place in memory.
fn tell_replaced(ebpf: &mut Ebpf) -> Result<(), MapError> {
    let mut replaced: Array<&mut MapData, u64> = map_of(ebpf, REPLACED)?;
    let count = replaced.get(&0, 0)?;
    replaced.set(0, count.wrapping_add(1), 0)
}

/// A prefix of a list, as the programs look for it.
fn range_key(list: EndpointList, (address, length): (IpAddr, u8)) -> Key<[u32; 6]> {
    let mapped = if address.is_ipv4() { 96 } else { 0 };
    let ip = list.range(SocketAddress::new(address, 0, 0).ip);
    Key::new(u64::BITS + mapped + u32::from(length), ip)
}

fn sums<C: Copy + Ord>(
    ebpf: &Ebpf,
    map: &str,
    counters: &[C],
    index: fn(C) -> u32,
) -> Result<BTreeMap<C, u64>, MapError> {
    let found = ebpf.map(map).ok_or_else(|| missing(map))?;
    let values: PerCpuArray<&MapData, u64> = PerCpuArray::try_from(found)?;
    let sum = |&counter: &C| {
        let per_cpu = values.get(&index(counter), 0)?;
        Ok((counter, per_cpu.iter().sum()))
    };
    counters.iter().map(sum).collect()
}

fn absent_is_gone(removed: Result<(), MapError>) -> Result<(), MapError> {
    match removed {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
            Ok(())
        }
        other => other,
    }
}

fn check_capabilities() -> Result<(), LoadError> {
    let effective = capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
    let admin = effective.contains(CapabilitySet::SYS_ADMIN);
    let bpf = admin || effective.contains(CapabilitySet::BPF);
    let net = admin || effective.contains(CapabilitySet::NET_ADMIN);
    if bpf && net {
        Ok(())
    } else {
        Err(LoadError::NotPermitted)
    }
}

fn take_map<T>(
    ebpf: &mut Ebpf,
    name: &str,
    convert: impl FnOnce(aya::maps::Map) -> Result<T, MapError>,
) -> Result<T, LoadError> {
    let map = ebpf
        .take_map(name)
        .ok_or_else(|| missing(name))
        .and_then(convert);
    map.map_err(|error| rejected(name, error.into()))
}

fn load<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut CgroupSockAddr, ProgramError> {
    let program: &mut CgroupSockAddr = program(ebpf, name)?;
    patiently(|| program.load())?;
    Ok(program)
}

/// Most attempts at loading a program: as libbpf does.
const LOADS_MAX: u32 = 5;

/// Loads a program, and again if a signal came while it was verified: the kernel gives up then (`EAGAIN` of `BPF_PROG_LOAD`,
/// Linux 6.18).
///
/// # Errors
///
/// What `load` says otherwise, or at the last attempt.
pub fn patiently(mut load: impl FnMut() -> Result<(), ProgramError>) -> Result<(), ProgramError> {
    let mut attempts = 1..LOADS_MAX;
    loop {
        match load() {
            Err(ProgramError::LoadError { io_error, .. })
                if io_error.kind() == io::ErrorKind::WouldBlock && attempts.next().is_some() => {}
            loaded => return loaded,
        }
    }
}

/// A program of the object, by its kind.
pub(crate) fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P, ProgramError>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let found = ebpf.program_mut(name);
    found
        .ok_or(ProgramError::UnexpectedProgramType)
        .and_then(TryInto::try_into)
}

/// Behind the program that an earlier process left, which leaves then: a flow that came to both is
/// already led by the first, and what it is led to is no service.
fn attach(
    ebpf: &mut Ebpf,
    keeper: &mut Keeper,
    name: &str,
    folder: &File,
) -> Result<KeptLink, ProgramError> {
    // `Single` is for links no exclusion: other loaders' programs on the cgroup run as well.
    let mode = CgroupAttachMode::Single;
    let link = if name == RELEASE {
        let program: &mut CgroupSock = program(ebpf, name)?;
        let link = program.attach(folder, mode)?;
        program.take_link(link)?.try_into()
    } else {
        let program: &mut CgroupSockAddr = program(ebpf, name)?;
        let link = program.attach(folder, mode)?;
        program.take_link(link)?.try_into()
    };
    let link = link.map_err(no_link)?;
    keeper.keep(&format!("{CGROUP_LINKS}{name}"), link)
}

/// What it should be according to its name in bpffs, or to the kernel's version, and is not.
fn no_link(error: LinkError) -> ProgramError {
    ProgramError::IOError(io::Error::other(error))
}

fn missing(map: &str) -> MapError {
    MapError::InvalidName {
        name: map.to_owned(),
    }
}

fn rejected(what: &str, source: EbpfError) -> LoadError {
    let errno = if let EbpfError::MapError(MapError::CreateError { io_error, .. })
    | EbpfError::ProgramError(ProgramError::LoadError { io_error, .. }) = &source
    {
        io_error.raw_os_error()
    } else {
        None
    };
    // The verifier's own refusals are EACCES or EINVAL.
    if errno == Some(Errno::PERM.raw_os_error()) {
        return LoadError::NotPermitted;
    }
    LoadError::Rejected {
        release: kernel_release(),
        what: what.to_owned(),
        source: Box::new(source),
    }
}

fn kernel_release() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease");
    release.map_or_else(
        |_| "of unknown version".to_owned(),
        |text| text.trim().to_owned(),
    )
}

fn explain(doing: &'static str, frontend: Frontend) -> impl FnOnce(MapError) -> ApplyError {
    move |source| ApplyError {
        doing,
        frontend,
        source,
    }
}
