//! Redirection: between which interfaces packets go past the host's stack.
//!
//! Nothing of it goes on when the process ends: the stack then does the same, and flows go on.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
    num::NonZeroU32,
};

use aya::{
    Ebpf,
    maps::{
        HashMap, LpmTrie, MapData, MapError,
        xdp::{DevMapHash, XdpMapError},
    },
    programs::{SchedClassifier, TcAttachType, tc::SchedClassifierLink},
};
use ebpf_abi::{REDIRECTS_MAX, ROUTES_MAX, RedirectCounter, Route};
use rustix::io::Errno;

use crate::{
    LinkHeader, LoadError, Services, absent_is_gone, order,
    packets::{InterfaceError, interface_name, is_attached, key, map_of},
    program, rejected,
};

const HOSTS: &str = "hf_hosts";
const ROUTES: &str = "hf_routes";
const LINKS: &str = "hf_redirects";
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
}

impl RedirectKind {
    const fn program(self) -> &'static str {
        match self {
            Self::Pod { .. } => program_for(LinkHeader::Ethernet),
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
    /// Dropping a link detaches its program.
    links: BTreeMap<NonZeroU32, SchedClassifierLink>,
}

impl Told {
    /// Loads the programs, attached nowhere yet. What an earlier process said is forgotten.
    pub(crate) fn load(ebpf: &mut Ebpf) -> Result<Self, LoadError> {
        for header in [LinkHeader::Ethernet, LinkHeader::Ip] {
            let name = program_for(header);
            program::<SchedClassifier>(ebpf, name)
                .and_then(SchedClassifier::load)
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
                let desired = desired(wanted, |index| interfaces.has(index));
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
    links: BTreeMap<NonZeroU32, RedirectKind>,
}

fn desired(wanted: &Redirects, is_served: impl Fn(NonZeroU32) -> bool) -> Desired {
    if wanted.routes.len() > ROUTES_MAX as usize {
        return Desired::default();
    }
    let links = wanted.links.iter().take(REDIRECTS_MAX as usize);
    let links: BTreeMap<_, _> = links.map(|(&index, &link)| (index, link)).collect();
    let route = |to: Option<NonZeroU32>| {
        let found = to.and_then(|index| Some((index, links.get(&index)?)));
        let Some((index, link)) = found else {
            return STACK;
        };
        let (mac, pod_mac) = match link.kind {
            RedirectKind::Pod { mac, pod_mac } => (mac, pod_mac),
            RedirectKind::Tunnel => ([0; 6], [0; 6]),
        };
        Route {
            interface: index.get(),
            mtu: link.mtu_bytes,
            mac,
            pod_mac,
            is_pod: (link.kind != RedirectKind::Tunnel).into(),
            is_served: is_served(index).into(),
            zero: 0,
        }
    };
    let routes = wanted.routes.iter();
    let routes = routes.map(|(&prefix, &to)| (prefix, route(to))).collect();
    let links = links.iter().map(|(&index, link)| (index, link.kind));
    Desired {
        routes,
        links: links.collect(),
    }
}

const STACK: Route = Route {
    interface: 0,
    mtu: 0,
    mac: [0; 6],
    pod_mac: [0; 6],
    is_pod: 0,
    is_served: 0,
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
    let failed = tell_links(ebpf, desired)?;
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
        match attach(ebpf, told, index, kind.program()) {
            Ok(is_new) => report.attached += usize::from(is_new),
            Err(error) => {
                report.failed.insert(index, error);
            }
        }
    }
    Ok(report)
}

/// Makes the kernel's map of interfaces that one, as far as they are there.
fn tell_links(
    ebpf: &mut Ebpf,
    desired: &Desired,
) -> Result<BTreeMap<NonZeroU32, InterfaceError>, InterfaceError> {
    let map = |source| InterfaceError::Redirect(XdpMapError::MapError(source));
    let mut links: DevMapHash<&mut MapData> = map_of(ebpf, LINKS).map_err(map)?;
    let there: Vec<u32> = links.keys().collect::<Result<_, _>>().map_err(map)?;
    let wanted = |index: &u32| {
        NonZeroU32::new(*index).is_some_and(|index| desired.links.contains_key(&index))
    };
    for &index in there.iter().filter(|index| !wanted(index)) {
        absent_is_gone(links.remove(index)).map_err(map)?;
    }
    let mut failed = BTreeMap::new();
    let new = desired
        .links
        .keys()
        .filter(|index| !there.contains(&index.get()));
    for &index in new {
        if let Err(source) = links.insert(index.get(), index.get(), None, 0) {
            failed.insert(index, InterfaceError::Redirect(source));
        }
    }
    Ok(failed)
}

fn attach(
    ebpf: &mut Ebpf,
    told: &mut Told,
    index: NonZeroU32,
    name: &'static str,
) -> Result<bool, InterfaceError> {
    let interface = interface_name(index)?;
    let direction = TcAttachType::Ingress;
    if told.links.contains_key(&index) && is_attached(ebpf, name, &interface, direction) {
        return Ok(false);
    }
    told.links.remove(&index);
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
    told.links.insert(index, link);
    Ok(true)
}
