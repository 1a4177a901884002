//! Redirection: between which interfaces packets go past the host's stack.
//!
//! Nothing of it goes on when the process ends: the stack then does the same, and flows go on.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
    num::NonZeroU32,
};

use aya::{
    Ebpf,
    maps::{
        HashMap, LpmTrie, MapData, MapError,
        xdp::{DevMap, XdpMapError},
    },
    programs::{SchedClassifier, TcAttachType, tc::SchedClassifierLink},
};
use ebpf_abi::{REDIRECTS_MAX, ROUTES_MAX, RedirectCounter, Route};
use rustix::io::Errno;

use crate::{
    LinkHeader, LoadError, Services, absent_is_gone, order,
    packets::{InterfaceError, interface_name, is_attached, key, map_of},
    patiently, program, rejected,
};

pub(crate) const HOSTS: &str = "hf_hosts";
pub(crate) const ROUTES: &str = "hf_routes";
pub(crate) const LINKS: &str = "hf_redirects";
const COUNTERS: &str = "hf_redir_counters";

/// Of a prefix that is one address, as the programs compare it.
const HOST_LEN: u32 = Ipv6Addr::BITS;

/// Between which interfaces packets are redirected, and by which routes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Redirects {
    /// By index. Packets that come in by any other go by the stack.
    pub links: BTreeMap<NonZeroU32, RedirectLink>,
    /// All that the node has, each prefix with its length and the interface by which its packets leave. `None`:
    /// what the stack alone knows, as that they are for the node itself.
    pub routes: BTreeMap<(IpAddr, u8), Option<NonZeroU32>>,
}

/// An interface between which and others packets are redirected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RedirectLink {
    /// What it is.
    pub kind: RedirectKind,
    /// The longest packet by it, from the IP header on.
    pub mtu_bytes: u32,
}

/// What an interface is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RedirectKind {
    /// A veth whose other end is in another network namespace: a pod's. The kernel drops what is redirected to
    /// anything else.
    Pod {
        /// Of the end that is here.
        mac: [u8; 6],
        /// Of the end in the pod.
        pod_mac: [u8; 6],
    },
    /// Packets begin with the IP header.
    Tunnel,
    /// Behind it are clients that are no processes here, served by [`Services::attach_interface`]; packets begin with
    /// Ethernet's header. Only those of services whose endpoint is a pod are redirected, and the answers.
    Devices,
}

impl RedirectKind {
    const fn program(self) -> &'static str {
        match self {
            Self::Pod { .. } | Self::Devices => program_for(LinkHeader::Ethernet),
            Self::Tunnel => program_for(LinkHeader::Ip),
        }
    }
}

const fn program_for(header: LinkHeader) -> &'static str {
    match header {
        LinkHeader::Ethernet => "hf_redirect",
        LinkHeader::Ip => "hf_redirect_ip",
    }
}

/// What [`Services::redirect`] did.
#[derive(Debug, Default)]
pub struct RedirectReport {
    /// Interfaces at which the programs were not before.
    pub attached: usize,
    /// Interfaces that could not be had, and whose packets go by the stack.
    pub failed: BTreeMap<NonZeroU32, InterfaceError>,
    /// Interfaces for which there is no room, and whose packets go by the stack. All, where there are too many
    /// routes.
    pub left_out: usize,
}

/// What the kernel was told.
#[derive(Debug, Default)]
pub(crate) struct Told {
    routes: BTreeMap<(IpAddr, u8), Route>,
    /// Where in the kernel's map of interfaces each is.
    slots: BTreeMap<NonZeroU32, u32>,
    /// Dropping a link detaches its program.
    links: BTreeMap<NonZeroU32, SchedClassifierLink>,
}

/// Whether it is one of those that redirect.
pub(crate) fn is_one(program: &str) -> bool {
    let headers = [LinkHeader::Ethernet, LinkHeader::Ip];
    headers.map(program_for).contains(&program)
}

impl Told {
    /// Those whose packets are redirected.
    pub(crate) fn interfaces(&self) -> impl Iterator<Item = NonZeroU32> + '_ {
        self.links.keys().copied()
    }

    /// Routes to single addresses, and all others.
    pub(crate) fn routes_len(&self) -> (usize, usize) {
        let is_host = |prefix: &&(IpAddr, u8)| key(**prefix).prefix_len() == HOST_LEN;
        let hosts = self.routes.keys().filter(is_host).count();
        (hosts, self.routes.len() - hosts)
    }

    /// Interfaces to which packets are redirected.
    pub(crate) fn slots_len(&self) -> usize {
        self.slots.len()
    }

    /// Loads the programs, attached nowhere yet. What an earlier process said is forgotten.
    pub(crate) fn load(ebpf: &mut Ebpf) -> Result<Self, LoadError> {
        for header in [LinkHeader::Ethernet, LinkHeader::Ip] {
            let name = program_for(header);
            program::<SchedClassifier>(ebpf, name)
                .and_then(|program| patiently(|| program.load()))
                .map_err(|error| rejected(name, error.into()))?;
        }
        forget_all(ebpf).map_err(|error| rejected(ROUTES, error.into()))?;
        Ok(Self::default())
    }
}

fn forget_all(ebpf: &mut Ebpf) -> Result<(), MapError> {
    let mut hosts = hosts(ebpf)?;
    let left: Vec<_> = hosts.keys().collect::<Result<_, _>>()?;
    left.iter()
        .try_for_each(|host| absent_is_gone(hosts.remove(host)))?;
    let mut routes = routes(ebpf)?;
    let left: Vec<_> = routes.keys().collect::<Result<_, _>>()?;
    left.iter()
        .try_for_each(|prefix| absent_is_gone(routes.remove(prefix)))
}

fn hosts(ebpf: &mut Ebpf) -> Result<HashMap<&mut MapData, [u32; 4], Route>, MapError> {
    map_of(ebpf, HOSTS)
}

fn routes(ebpf: &mut Ebpf) -> Result<LpmTrie<&mut MapData, [u32; 4], Route>, MapError> {
    map_of(ebpf, ROUTES)
}

/// Where a prefix leads from now on; `None`: it leads nowhere.
fn write(ebpf: &mut Ebpf, prefix: (IpAddr, u8), route: Option<Route>) -> Result<(), MapError> {
    let key = key(prefix);
    match (key.prefix_len() == HOST_LEN, route) {
        (true, Some(route)) => hosts(ebpf)?.insert(key.data(), route, 0),
        (true, None) => absent_is_gone(hosts(ebpf)?.remove(&key.data())),
        (false, Some(route)) => routes(ebpf)?.insert(&key, route, 0),
        (false, None) => absent_is_gone(routes(ebpf)?.remove(&key)),
    }
}

impl Services {
    /// Sends packets that come in by one of these interfaces, and leave by another, past the host's stack: its filters,
    /// its connection tracking and the queues of the interfaces. The programs come after all others on an interface.
    /// Only what is different from before is touched, and no packet goes where neither the old nor the new routes
    /// lead. To be called after [`Self::attach_interface`], where both are wanted of an interface, and again whenever
    /// an interface or a route has changed: also for interfaces that look the same, as an index may have come to
    /// another one.
    ///
    /// # Errors
    ///
    /// [`InterfaceError::SocketsAlone`], and [`InterfaceError::Redirect`] if the kernel refuses a route: call it again.
    pub fn redirect(&mut self, wanted: &Redirects) -> Result<RedirectReport, InterfaceError> {
        let mut interfaces = self.interfaces.take();
        let done = match &mut interfaces {
            Some(interfaces) => {
                let slots = &interfaces.redirects.slots;
                let desired = desired(wanted, slots, |index| interfaces.has(index));
                let left_out = wanted.links.len() - desired.links.len();
                let done = apply(&mut self.ebpf, &mut interfaces.redirects, &desired);
                done.map(|report| RedirectReport { left_out, ..report })
            }
            None => Err(InterfaceError::SocketsAlone),
        };
        self.interfaces = interfaces;
        done
    }

    /// What became of packets that came in by the interfaces of [`Self::redirect`], since the programs were loaded.
    ///
    /// # Errors
    ///
    /// [`MapError`] if the kernel does not say.
    pub fn redirect_counters(&self) -> Result<BTreeMap<RedirectCounter, u64>, MapError> {
        self.sums(COUNTERS, RedirectCounter::ALL, |counter| counter as u32)
    }
}

/// As the programs look for it.
#[derive(Debug, Default)]
struct Desired {
    routes: BTreeMap<(IpAddr, u8), Route>,
    slots: BTreeMap<NonZeroU32, u32>,
    links: BTreeMap<NonZeroU32, RedirectKind>,
}

/// Each interface keeps its slot; a new one gets the first that none of the others has.
fn slots(
    links: impl Iterator<Item = NonZeroU32> + Clone,
    before: &BTreeMap<NonZeroU32, u32>,
) -> BTreeMap<NonZeroU32, u32> {
    let kept = |index: NonZeroU32| Some((index, *before.get(&index)?));
    let mut slots: BTreeMap<_, _> = links.clone().filter_map(kept).collect();
    let taken: BTreeSet<u32> = slots.values().copied().collect();
    let free = (0..REDIRECTS_MAX).filter(|slot| !taken.contains(slot));
    let new = links.filter(|index| !before.contains_key(index));
    slots.extend(new.zip(free));
    slots
}

fn desired(
    wanted: &Redirects,
    slots_before: &BTreeMap<NonZeroU32, u32>,
    is_served: impl Fn(NonZeroU32) -> bool,
) -> Desired {
    if wanted.routes.len() > ROUTES_MAX as usize {
        return Desired::default();
    }
    let links = wanted.links.iter().take(REDIRECTS_MAX as usize);
    let links: BTreeMap<_, _> = links.map(|(&index, &link)| (index, link)).collect();
    let slots = slots(links.keys().copied(), slots_before);
    let route = |to: Option<NonZeroU32>| {
        let found = to.and_then(|index| Some((index, links.get(&index)?, *slots.get(&index)?)));
        let Some((index, link, slot)) = found else {
            return STACK;
        };
        let (mac, pod_mac) = match link.kind {
            RedirectKind::Pod { mac, pod_mac } => (mac, pod_mac),
            RedirectKind::Tunnel | RedirectKind::Devices => ([0; 6], [0; 6]),
        };
        Route {
            interface: index.get(),
            slot,
            mtu: link.mtu_bytes,
            mac,
            pod_mac,
            is_pod: matches!(link.kind, RedirectKind::Pod { .. }).into(),
            is_served: is_served(index).into(),
            has_devices: (link.kind == RedirectKind::Devices).into(),
            zero: 0,
        }
    };
    let routes = wanted.routes.iter();
    let routes = routes.map(|(&prefix, &to)| (prefix, route(to))).collect();
    let links = links.iter().map(|(&index, link)| (index, link.kind));
    Desired {
        routes,
        slots,
        links: links.collect(),
    }
}

const STACK: Route = Route {
    interface: 0,
    slot: 0,
    mtu: 0,
    mac: [0; 6],
    pod_mac: [0; 6],
    is_pod: 0,
    is_served: 0,
    has_devices: 0,
    zero: 0,
};

/// Old routes go before an index may become that of another interface. Of two prefixes that hold each other the shorter
/// one goes first and comes last.
fn apply(
    ebpf: &mut Ebpf,
    told: &mut Told,
    desired: &Desired,
) -> Result<RedirectReport, InterfaceError> {
    told.links
        .retain(|index, _| desired.links.contains_key(index));
    let map = |source| InterfaceError::Redirect(XdpMapError::MapError(source));
    let mut known: Vec<_> = told
        .routes
        .iter()
        .map(|(&key, &value)| (key, value))
        .collect();
    known.sort_by_key(|((_, length), _)| *length);
    for (prefix, route) in known {
        let now = desired.routes.get(&prefix);
        if now == Some(&route) {
            continue;
        }
        write(ebpf, prefix, now.copied()).map_err(map)?;
        match now {
            Some(now) => told.routes.insert(prefix, *now),
            None => told.routes.remove(&prefix),
        };
    }
    told.slots.clone_from(&desired.slots);
    let failed = tell_links(ebpf, &desired.slots)?;
    let new = desired.routes.iter();
    let mut new: Vec<_> = new
        .filter(|(prefix, _)| !told.routes.contains_key(prefix))
        .collect();
    new.sort_by_key(|((_, length), _)| Reverse(*length));
    for (&prefix, &route) in new {
        write(ebpf, prefix, Some(route)).map_err(map)?;
        told.routes.insert(prefix, route);
    }
    let mut report = RedirectReport {
        failed,
        ..RedirectReport::default()
    };
    for (&index, kind) in &desired.links {
        match attach(ebpf, &mut told.links, index, kind.program()) {
            Ok(is_new) => report.attached += usize::from(is_new),
            Err(error) => {
                report.failed.insert(index, error);
            }
        }
    }
    Ok(report)
}

/// Puts the interfaces into their slots of the kernel's map, as far as they are there. No route leads to what else is in
/// it: the kernel takes away what is gone.
fn tell_links(
    ebpf: &mut Ebpf,
    slots: &BTreeMap<NonZeroU32, u32>,
) -> Result<BTreeMap<NonZeroU32, InterfaceError>, InterfaceError> {
    let map = |source| InterfaceError::Redirect(XdpMapError::MapError(source));
    let mut links: DevMap<&mut MapData> = map_of(ebpf, LINKS).map_err(map)?;
    let mut failed = BTreeMap::new();
    for (&index, &slot) in slots {
        match links.get(slot, 0) {
            Ok(there) if there.if_index == index.get() => continue,
            Ok(_) | Err(MapError::KeyNotFound) => {}
            Err(error) => return Err(map(error)),
        }
        if let Err(source) = links.set(slot, index.get(), None, 0) {
            failed.insert(index, InterfaceError::Redirect(source));
        }
    }
    Ok(failed)
}

/// Puts a program where it belongs at an interface, by a link that ends with the process; whether it was not there before.
pub(crate) fn attach(
    ebpf: &mut Ebpf,
    links: &mut BTreeMap<NonZeroU32, SchedClassifierLink>,
    index: NonZeroU32,
    name: &'static str,
) -> Result<bool, InterfaceError> {
    let interface = interface_name(index)?;
    let direction = TcAttachType::Ingress;
    if links.contains_key(&index) && is_attached(ebpf, name, &interface, direction) {
        return Ok(false);
    }
    links.remove(&index);
    let link = order::attach(ebpf, name, &interface, direction);
    let link = link.map_err(|source| InterfaceError::Attach {
        program: name,
        index,
        source,
    })?;
    // aya takes names, and a name may have gone to another interface meanwhile.
    if interface_name(index)? != interface {
        let source = Errno::NODEV;
        return Err(InterfaceError::Unknown { index, source });
    }
    links.insert(index, link);
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_keeps_its_slot_and_a_new_one_gets_one_that_nobody_has() {
        let index = |number| NonZeroU32::new(number).unwrap();
        let expected = |pairs: &[(u32, u32)]| -> BTreeMap<_, _> {
            let pairs = pairs.iter().map(|&(number, slot)| (index(number), slot));
            pairs.collect()
        };
        let first = slots([7, 8, 9].into_iter().map(index), &BTreeMap::new());
        assert_eq!(first, expected(&[(7, 0), (8, 1), (9, 2)]));
        let second = slots([5, 7, 9, 12].into_iter().map(index), &first);
        assert_eq!(second, expected(&[(5, 1), (7, 0), (9, 2), (12, 3)]));
    }
}
