//! Policy in the kernel: who may speak with whom, at the tunnel's interface and at pods'.
//!
//! An object of its own, with its own maps: nodes without policies do not load it. What the maps do
//! not have does not pass, so that nothing that was denied passes while they are written: a new
//! state is written beside the old one, then open flows are judged again, then the old one is
//! removed. Until then new flows may be judged by either, and dropped where their ends are of
//! classes that meet for the first time.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{
        Array, HashMap, LpmTrie, MapData, MapError, RingBuf,
        lpm_trie::Key,
        xdp::{DevMapHash, XdpMapError},
    },
    programs::{ProgramError, SchedClassifier, TcAttachType, tc::SchedClassifierLink},
};
use ebpf_abi::{
    POLICY_ADDRESSES_MAX, POLICY_ALLOWED, POLICY_AUDITED, POLICY_DECIDER_BIT, POLICY_IN,
    POLICY_OUT, POLICY_PAIRS_MAX, POLICY_PODS_MAX, POLICY_PORTS_MAX, POLICY_PROTOCOL_OTHER,
    PolicyCounter, PolicyEvent, PolicyPair, PolicyPairRules, PolicyPort, PolicyState,
    SocketAddress,
};

use crate::{
    LoadError, Pins, absent_is_gone, check_capabilities,
    guard::{self, LINKS},
    packets::{InterfaceError, attach_all, interface_name, is_attached, key, map_of},
    patiently,
    pins::{Keeper, KeptLink},
    program, redirect, rejected, sums, take_map,
};

const COUNTERS: &str = "hf_pol_counters";

/// By name, and where they belong.
type Programs = [(&'static str, TcAttachType); 2];

/// The interfaces of pods.
type Pods<'a> = DevMapHash<&'a mut MapData>;

/// At interfaces of devices, on the way in.
const AT_DEVICES: &str = "hf_policy_device";

/// Next to the wire on both ways: what other programs make of a packet is nobody's but this node's.
const FOR_TUNNEL: Programs = [
    ("hf_policy_in", TcAttachType::Ingress),
    ("hf_policy_out", TcAttachType::Egress),
];

/// Prefixes with a class that [`Policy::apply`] takes.
pub const ADDRESSES_MAX: usize = POLICY_ADDRESSES_MAX as usize;

/// Pairs of classes.
pub const PAIRS_MAX: usize = POLICY_PAIRS_MAX as usize;

/// Port prefixes.
pub const PORTS_MAX: usize = POLICY_PORTS_MAX as usize;

/// Pods' interfaces that [`Policy::attach_pods`] takes.
pub const PODS_MAX: usize = POLICY_PODS_MAX as usize;

/// Events that are kept for whoever asks: a page of them.
pub const EVENTS_KEPT_MAX: usize = 64;

/// The direction of a flow, as seen by its end on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// It was called.
    In,
    /// It calls.
    Out,
}

/// Where packets are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// The tunnel's interface.
    Tunnel,
    /// The node's end of a pod's own.
    Pod,
}

/// What becomes of packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Verdict {
    /// Whether they pass.
    pub allowed: bool,
    /// By a policy in audit they would not.
    pub audited: bool,
    /// Who decided: at most 24 bits; 0: nobody, there was no room.
    pub decider: u32,
}

impl Verdict {
    fn word(self) -> u32 {
        let allowed = if self.allowed { POLICY_ALLOWED } else { 0 };
        let audited = if self.audited { POLICY_AUDITED } else { 0 };
        self.decider << POLICY_DECIDER_BIT | allowed | audited
    }

    fn of(word: u32) -> Self {
        Self {
            allowed: word & POLICY_ALLOWED != 0,
            audited: word & POLICY_AUDITED != 0,
            decider: word >> POLICY_DECIDER_BIT,
        }
    }
}

/// The classes of a flow's ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pair {
    /// Of the end on this node.
    pub local: u32,
    /// Of the other.
    pub remote: u32,
    /// Who called.
    pub direction: Direction,
}

/// What holds between two classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PairRules {
    /// For packets whose port cannot be known; without `rule_set`, for all packets.
    pub strictest: Verdict,
    /// Where it depends on the port; never 0.
    pub rule_set: Option<NonZeroU32>,
}

/// Leading bits of a destination port under a rule set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortPrefix {
    /// Whose.
    pub rule_set: u32,
    /// The IP protocol's number, ICMP's for ICMPv6 too; `None`: any.
    pub protocol: Option<u8>,
    /// The port.
    pub port: u16,
    /// How many of its bits count.
    pub bits: u8,
}

impl PortPrefix {
    fn key(&self) -> Key<[u8; 8]> {
        let abi = PolicyPort {
            prefix_len: match self.protocol {
                None => 32,
                Some(_) => 48 + u32::from(self.bits),
            },
            rule_set: self.rule_set,
            protocol: self
                .protocol
                .unwrap_or(POLICY_PROTOCOL_OTHER.to_le_bytes()[0]),
            zero: 0,
            port: self.port.to_be(),
        };
        let [a, b, c, d] = abi.rule_set.to_ne_bytes();
        let [high, low] = abi.port.to_ne_bytes();
        Key::new(
            abi.prefix_len,
            [a, b, c, d, abi.protocol, abi.zero, high, low],
        )
    }
}

/// Everything that the programs judge by.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tables {
    /// Otherwise everything passes.
    pub enforced: bool,
    /// The class of each prefix.
    pub addresses: BTreeMap<(IpAddr, u8), u32>,
    /// What holds between classes.
    pub pairs: BTreeMap<Pair, PairRules>,
    /// By port.
    pub ports: BTreeMap<PortPrefix, Verdict>,
}

/// What [`Policy::apply`] did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ApplyReport {
    /// Entries written.
    pub written: usize,
    /// Entries removed.
    pub removed: usize,
}

/// What [`Policy::attach_pods`] did.
#[derive(Debug, Default)]
pub struct PodsReport {
    /// Interfaces at which the programs were not before.
    pub attached: usize,
    /// Interfaces whose packets are not seen, and why.
    pub failed: BTreeMap<NonZeroU32, InterfaceError>,
    /// Those for which there is no room.
    pub left_out: BTreeSet<NonZeroU32>,
}

/// A packet that was denied, or would be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// Its source. ICMP echoes have their identifier as both ports.
    pub from: SocketAddr,
    /// Its destination.
    pub to: SocketAddr,
    /// Its IP protocol.
    pub protocol: u8,
    /// Who called.
    pub direction: Direction,
    /// Why.
    pub verdict: Verdict,
}

/// A change that the kernel refused. What was denied stays denied; apply again later.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} policy's {what}")]
pub struct ApplyError {
    doing: &'static str,
    what: &'static str,
    source: MapError,
}

/// The programs, their links and their maps. Dropping it takes all of it out of the kernel, but where there are
/// [`Pins`]: then what they judged by last holds until the next one is attached in their place, or they are removed.
/// That one has maps of its own: nothing is read back, and open flows are judged as they are found.
pub struct Policy {
    state: Array<MapData, PolicyState>,
    addresses: LpmTrie<MapData, [u32; 4], u32>,
    pairs: HashMap<MapData, PolicyPair, PolicyPairRules>,
    ports: LpmTrie<MapData, [u8; 8], u32>,
    events: RingBuf<MapData>,
    told: VecDeque<Event>,
    /// What the maps hold.
    installed: Tables,
    generation: u32,
    tunnel: Option<NonZeroU32>,
    /// By interface.
    links: BTreeMap<NonZeroU32, Vec<KeptLink>>,
    keeper: Keeper,
    /// Of interfaces with devices behind them.
    devices: BTreeMap<NonZeroU32, SchedClassifierLink>,
    /// By port.
    bridges: BTreeMap<NonZeroU32, NonZeroU32>,
    /// Others may guard new pods as this process does.
    published: bool,
    ebpf: Ebpf,
}

impl std::fmt::Debug for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Policy")
            .field("generation", &self.generation)
            .field("links", &self.links)
            .finish_non_exhaustive()
    }
}

impl Policy {
    /// Loads the programs, attached nowhere yet, with nothing to enforce. What an earlier process left in `pins` goes
    /// on until then.
    ///
    /// # Errors
    ///
    /// What this machine lacks, and how to get it. Nothing stays loaded.
    pub fn load(pins: Option<Pins>) -> Result<Self, LoadError> {
        check_capabilities()?;
        let mut ebpf = EbpfLoader::new()
            .load(ebpf_programs::POLICY)
            .map_err(|source| rejected("the maps of policy", source))?;
        let kept = FOR_TUNNEL.into_iter().chain(guard::PROGRAMS);
        for name in kept.map(|(name, _)| name).chain([AT_DEVICES]) {
            program::<SchedClassifier>(&mut ebpf, name)
                .and_then(|program| patiently(|| program.load()))
                .map_err(|error| rejected(name, error.into()))?;
        }
        Ok(Self {
            state: take_map(&mut ebpf, "hf_pol_state", Array::try_from)?,
            addresses: take_map(&mut ebpf, "hf_pol_addrs", LpmTrie::try_from)?,
            pairs: take_map(&mut ebpf, "hf_pol_pairs", HashMap::try_from)?,
            ports: take_map(&mut ebpf, "hf_pol_ports", LpmTrie::try_from)?,
            events: take_map(&mut ebpf, "hf_pol_events", RingBuf::try_from)?,
            told: VecDeque::new(),
            installed: Tables::default(),
            generation: 0,
            tunnel: None,
            links: BTreeMap::new(),
            keeper: Keeper::new(pins),
            devices: BTreeMap::new(),
            bridges: BTreeMap::new(),
            published: false,
            ebpf,
        })
    }

    pub(crate) fn ebpf(&self) -> &Ebpf {
        &self.ebpf
    }

    /// By the interface's index.
    pub(crate) fn links(&self) -> &BTreeMap<NonZeroU32, Vec<KeptLink>> {
        &self.links
    }

    /// What the maps hold.
    pub(crate) fn installed(&self) -> &Tables {
        &self.installed
    }

    /// How many interfaces of pods are known, and how many are ports of bridges.
    pub(crate) fn interfaces_len(&self) -> (usize, usize) {
        let tunnel = self.tunnel;
        let pods = self.links.keys().filter(|index| Some(**index) != tunnel);
        (pods.count(), self.bridges.len())
    }

    /// Ends it, also where it would be kept.
    pub fn remove(mut self) {
        self.keeper.pins().into_iter().for_each(guard::withdraw);
        let links = std::mem::take(&mut self.links);
        links.into_values().flatten().for_each(KeptLink::remove);
        self.keeper.forget(LINKS);
    }

    /// Judges what comes and goes by the tunnel whose interface this is: next to the wire, before
    /// other programs on the way in and after them on the way out. Returns whether the programs
    /// were not there before.
    ///
    /// # Errors
    ///
    /// [`InterfaceError`]; nothing stays attached.
    pub fn attach_tunnel(&mut self, index: NonZeroU32) -> Result<bool, InterfaceError> {
        if self.tunnel != Some(index) {
            self.tunnel = Some(index);
            let written = self.write_state(self.installed.enforced);
            written.map_err(|source| InterfaceError::Policy(XdpMapError::MapError(source)))?;
        }
        self.attach(index, FOR_TUNNEL)
    }

    /// Judges all that pods send and receive by these interfaces, each a pod's own, and by no others any more: also
    /// what [`crate::Services::redirect`] hands on past them. Whose an address is, the node's routes say: what a pod
    /// sends from another one is dropped, and so is what comes to a pod from an address that is behind another of
    /// these interfaces, or behind the tunnel, than it came by. To be called again whenever an interface has changed:
    /// also for interfaces that look the same, as an index may have come to another one.
    ///
    /// # Errors
    ///
    /// [`MapError`] if the kernel does not say which it knows. What it refuses is in the report: call it again. What an
    /// earlier process left at other interfaces ends.
    ///
    /// For ports of a bridge call [`Self::say_bridges`] before. From then on [`guard::attach`] does the same to a pod that is new: to be called after [`Self::apply`].
    pub fn attach_pods(&mut self, wanted: &BTreeSet<NonZeroU32>) -> Result<PodsReport, MapError> {
        let mut report = PodsReport {
            left_out: wanted.iter().skip(PODS_MAX).copied().collect(),
            ..PodsReport::default()
        };
        let wanted: BTreeSet<_> = wanted.iter().take(PODS_MAX).copied().collect();
        let _turn = self.keeper.pins().and_then(Pins::turn);
        self.publish();
        let tunnel = self.tunnel;
        let others = self.links.extract_if(.., |index, _| {
            Some(*index) != tunnel && !wanted.contains(index)
        });
        // Those alone: others may be of pods that the plug-in is just making.
        for (index, links) in others {
            let mut pods: Pods<'_> = map_of(&mut self.ebpf, guard::PODS)?;
            absent_is_gone(pods.remove(index.get()))?;
            links.into_iter().for_each(KeptLink::remove);
        }
        let pods: Pods<'_> = map_of(&mut self.ebpf, guard::PODS)?;
        let there: Vec<u32> = pods.keys().collect::<Result<_, _>>()?;
        for index in wanted {
            let known = match there.contains(&index.get()) {
                true => Ok(()),
                false => self.know(index),
            };
            let attached = known.map_err(InterfaceError::Policy);
            match attached.and_then(|()| self.attach(index, guard::PROGRAMS)) {
                Ok(is_new) => {
                    report.attached += usize::from(is_new);
                    if is_new && let Ok(name) = interface_name(index) {
                        guard::release(&name); // The same, or an earlier agent's.
                    }
                }
                Err(error) => {
                    report.failed.insert(index, error);
                }
            }
        }
        self.keeper.forget(LINKS);
        Ok(report)
    }

    /// Judges what comes in by these interfaces for pods of [`Self::attach_pods`], and by no others any more: what
    /// [`crate::Services::redirect`] hands on from devices past the pods' own programs. Ends with the process, as
    /// redirection does. Returns those that could not be had.
    pub fn attach_devices(
        &mut self,
        wanted: &BTreeSet<NonZeroU32>,
    ) -> BTreeMap<NonZeroU32, InterfaceError> {
        self.devices.retain(|index, _| wanted.contains(index));
        let mut attach =
            |index| redirect::attach(&mut self.ebpf, &mut self.devices, index, AT_DEVICES);
        let failed = wanted
            .iter()
            .filter_map(|&index| Some((index, attach(index).err()?)));
        failed.collect()
    }

    /// Of which bridge an interface is a port, for those that are: whose addresses are behind it, the routes say of the
    /// bridge.
    ///
    /// # Errors
    ///
    /// [`MapError`] if the kernel refuses it.
    pub fn say_bridges(
        &mut self,
        wanted: &BTreeMap<NonZeroU32, NonZeroU32>,
    ) -> Result<(), MapError> {
        if self.bridges == *wanted {
            return Ok(());
        }
        let mut map: HashMap<&mut MapData, u32, u32> = map_of(&mut self.ebpf, guard::BRIDGES)?;
        for (port, bridge) in wanted.iter().take(PODS_MAX) {
            if self.bridges.get(port) != Some(bridge) {
                map.insert(port.get(), bridge.get(), 0)?;
                self.bridges.insert(*port, *bridge);
            }
        }
        // Those alone that this process wrote: see `attach_pods`.
        for port in others(&self.bridges, wanted) {
            absent_is_gone(map.remove(&port.get()))?;
            self.bridges.remove(&port);
        }
        Ok(())
    }

    /// Whether others can guard new pods as this process does: from [`Self::attach_pods`] on, where there are
    /// [`Pins`], until it is removed.
    #[must_use]
    pub const fn is_published(&self) -> bool {
        self.published
    }

    fn publish(&mut self) {
        if self.published {
            return;
        }
        let Some(pins) = self.keeper.pins() else {
            return;
        };
        match guard::publish(pins, &mut self.ebpf) {
            Ok(()) => self.published = true,
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(error, "new pods are guarded only once the agent sees them");
            }
        }
    }

    fn know(&mut self, index: NonZeroU32) -> Result<(), XdpMapError> {
        let mut pods: Pods<'_> = map_of(&mut self.ebpf, guard::PODS)?;
        pods.insert(index.get(), index.get(), None, 0)
    }

    fn attach(&mut self, index: NonZeroU32, programs: Programs) -> Result<bool, InterfaceError> {
        let name = interface_name(index)?;
        let mut all = programs.iter();
        let there = all.all(|(program, way)| is_attached(&mut self.ebpf, program, &name, *way));
        if there && self.links.contains_key(&index) {
            return Ok(false);
        }
        match attach_all(&mut self.ebpf, &mut self.keeper, LINKS, programs, index) {
            Ok(links) => {
                self.links.insert(index, links);
                Ok(true)
            }
            Err(error) => {
                let others = self.links.remove(&index);
                others.into_iter().flatten().for_each(KeptLink::remove);
                Err(error)
            }
        }
    }

    /// What looks at packets of that direction, as the end on this node sees it: for the kernel's test run.
    ///
    /// # Errors
    ///
    /// None that could happen after [`Self::load`].
    pub fn program(&self, at: At, direction: Direction) -> Result<&SchedClassifier, ProgramError> {
        let name = match (at, direction) {
            (At::Tunnel, Direction::In) => "hf_policy_in",
            (At::Tunnel, Direction::Out) => "hf_policy_out",
            (At::Pod, Direction::In) => "hf_policy_to",
            (At::Pod, Direction::Out) => "hf_policy_from",
        };
        let found = self.ebpf.program(name);
        found
            .ok_or(ProgramError::UnexpectedProgramType)
            .and_then(TryInto::try_into)
    }

    /// Makes the maps hold `wanted`, touching only what differs, and lets open flows be judged again.
    ///
    /// # Errors
    ///
    /// [`ApplyError`] if the kernel refuses a change, for want of memory: what is wanted and not in the
    /// maps is denied. Apply again later.
    pub fn apply(&mut self, wanted: &Tables) -> Result<ApplyReport, ApplyError> {
        if *wanted == self.installed {
            return Ok(ApplyReport::default());
        }
        let mut report = ApplyReport::default();
        let done = if wanted.enforced {
            let written = self.write(wanted, &mut report);
            // In any case: what is not there is denied.
            let switched = self.switch(true);
            written.and(switched)
        } else {
            self.switch(false)
        };
        done?;
        self.remove_others(wanted, &mut report)?;
        Ok(report)
    }

    /// What became of packets since the programs were loaded.
    ///
    /// # Errors
    ///
    /// [`MapError`] if the kernel does not say.
    pub fn counters(&self) -> Result<BTreeMap<PolicyCounter, u64>, MapError> {
        sums(&self.ebpf, COUNTERS, PolicyCounter::ALL, |counter| {
            counter as u32
        })
    }

    /// Packets that were denied or audited last, the newest at the end: at most
    /// [`EVENTS_KEPT_MAX`], and at most 100 a second are told on each processor.
    pub fn events(&mut self) -> impl Iterator<Item = &Event> {
        while let Some(bytes) = self.events.next() {
            if let Some(event) = read_event(&bytes) {
                if self.told.len() == EVENTS_KEPT_MAX {
                    self.told.pop_front();
                }
                self.told.push_back(event);
            }
        }
        self.told.iter()
    }

    /// From what is looked up last to what is looked up first, the longest prefixes before shorter ones.
    fn write(&mut self, wanted: &Tables, report: &mut ApplyReport) -> Result<(), ApplyError> {
        let refused = |what| {
            move |source| ApplyError {
                doing: "write",
                what,
                source,
            }
        };
        let mut ports: Vec<_> = wanted.ports.iter().collect();
        ports
            .sort_by_key(|(prefix, _)| std::cmp::Reverse((prefix.protocol.is_some(), prefix.bits)));
        for (&prefix, &verdict) in ports {
            if self.installed.ports.get(&prefix) != Some(&verdict) {
                let written = self.ports.insert(&prefix.key(), verdict.word(), 0);
                written.map_err(refused("ports"))?;
                self.installed.ports.insert(prefix, verdict);
                report.written += 1;
            }
        }
        for (&pair, &rules) in &wanted.pairs {
            if self.installed.pairs.get(&pair) != Some(&rules) {
                let value = PolicyPairRules {
                    strictest: rules.strictest.word(),
                    rule_set: rules.rule_set.map_or(0, NonZeroU32::get),
                };
                let written = self.pairs.insert(pair_key(&pair), value, 0);
                written.map_err(refused("pairs of classes"))?;
                self.installed.pairs.insert(pair, rules);
                report.written += 1;
            }
        }
        let mut addresses: Vec<_> = wanted.addresses.iter().collect();
        addresses.sort_by_key(|((_, length), _)| std::cmp::Reverse(*length));
        for (&prefix, &class) in addresses {
            if self.installed.addresses.get(&prefix) != Some(&class) {
                let written = self.addresses.insert(&key(prefix), class, 0);
                written.map_err(refused("addresses"))?;
                self.installed.addresses.insert(prefix, class);
                report.written += 1;
            }
        }
        Ok(())
    }

    fn switch(&mut self, enforced: bool) -> Result<(), ApplyError> {
        self.generation = self.generation.wrapping_add(1);
        self.write_state(enforced).map_err(|source| ApplyError {
            doing: "write",
            what: "state",
            source,
        })?;
        self.installed.enforced = enforced;
        Ok(())
    }

    fn write_state(&mut self, enforced: bool) -> Result<(), MapError> {
        let state = PolicyState {
            enforced: enforced.into(),
            generation: self.generation,
            tunnel: self.tunnel.map_or(0, NonZeroU32::get),
        };
        self.state.set(0, state, 0)
    }

    fn remove_others(
        &mut self,
        wanted: &Tables,
        report: &mut ApplyReport,
    ) -> Result<(), ApplyError> {
        let refused = |what| {
            move |source| ApplyError {
                doing: "remove",
                what,
                source,
            }
        };
        for prefix in others(&self.installed.addresses, &wanted.addresses) {
            absent_is_gone(self.addresses.remove(&key(prefix))).map_err(refused("addresses"))?;
            self.installed.addresses.remove(&prefix);
            report.removed += 1;
        }
        for pair in others(&self.installed.pairs, &wanted.pairs) {
            let removed = absent_is_gone(self.pairs.remove(&pair_key(&pair)));
            removed.map_err(refused("pairs of classes"))?;
            self.installed.pairs.remove(&pair);
            report.removed += 1;
        }
        for prefix in others(&self.installed.ports, &wanted.ports) {
            absent_is_gone(self.ports.remove(&prefix.key())).map_err(refused("ports"))?;
            self.installed.ports.remove(&prefix);
            report.removed += 1;
        }
        Ok(())
    }
}

/// Ends what an earlier process left in `pins`.
pub fn end_left(pins: Pins) {
    guard::withdraw(&pins);
    let ended = Keeper::new(Some(pins)).forget(LINKS);
    if ended > 0 {
        tracing::info!(links = ended, "what an earlier agent enforced is over");
    }
}

fn others<K: Ord + Copy, V>(installed: &BTreeMap<K, V>, wanted: &BTreeMap<K, V>) -> Vec<K> {
    let others = installed.keys().filter(|key| !wanted.contains_key(key));
    others.copied().collect()
}

fn pair_key(pair: &Pair) -> PolicyPair {
    PolicyPair {
        local: pair.local,
        remote: pair.remote,
        direction: match pair.direction {
            Direction::In => POLICY_IN,
            Direction::Out => POLICY_OUT,
        },
    }
}

fn read_event(bytes: &[u8]) -> Option<Event> {
    let (words, _) = bytes.as_chunks::<4>();
    if words.len() * 4 != size_of::<PolicyEvent>() {
        return None;
    }
    let mut words = words.iter().copied();
    let from = read_address(&mut words)?;
    let to = read_address(&mut words)?;
    let direction = u32::from_ne_bytes(words.next()?);
    Some(Event {
        from: from.socket_addr(),
        to: to.socket_addr(),
        protocol: to.protocol,
        direction: if direction == POLICY_OUT {
            Direction::Out
        } else {
            Direction::In
        },
        verdict: Verdict::of(u32::from_ne_bytes(words.next()?)),
    })
}

fn read_address(words: &mut impl Iterator<Item = [u8; 4]>) -> Option<SocketAddress> {
    let mut ip = [0; 4];
    for word in &mut ip {
        *word = u32::from_ne_bytes(words.next()?);
    }
    let [high, low, protocol, outside] = words.next()?;
    Some(SocketAddress {
        ip,
        port: u16::from_ne_bytes([high, low]),
        protocol,
        outside,
    })
}
