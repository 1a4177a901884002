//! What a peer's state machine sees of the node around it, and asks of it.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use ipnet::IpNet;
use mesh_wire::{
    id::{NodeId, NodeName, RelayId, SiteName, Via},
    peer::{Candidate, NatKind, PeerMessage},
};
use rand::rngs::Xoshiro256PlusPlus;

use crate::{
    gateways::is_own,
    io::{Event, Output},
    node::path::PathKind,
    snapshot::Snapshot,
};

/// The seeded generator. Named, not `SmallRng`, so that a seed means the same on every machine.
pub(crate) type Dice = Xoshiro256PlusPlus;

/// What holds for the node as a whole.
#[derive(Debug)]
pub(crate) struct Us {
    pub(crate) site: Option<SiteName>,
    /// With whose nodes this one may connect directly; `None`: with everybody's.
    pub(crate) direct_sites: Option<BTreeSet<SiteName>>,
    pub(crate) local: Vec<SocketAddr>,
    /// What peers are told.
    pub(crate) candidates: Vec<Candidate>,
    pub(crate) generation: u64,
    pub(crate) nat: NatKind,
    /// Relays with a link, the preferred one first.
    pub(crate) relays_up: Vec<RelayId>,
    /// Relays that do not answer, or will stop soon.
    pub(crate) hopeless_relays: Vec<RelayId>,
    /// Every relay that serves this node, the preferred one first.
    pub(crate) relays: Vec<RelayId>,
    /// Relays that are nodes of the mesh.
    pub(crate) peer_relays: BTreeSet<RelayId>,
    /// How far they are, as peers are told.
    pub(crate) relay_rtts: BTreeMap<RelayId, Duration>,
    /// What goes out costs: nothing is sent that nobody asked for.
    pub(crate) metered: bool,
    /// What the tunnel itself leads to.
    pub(crate) inside: Inside,
    /// The overlay's MTU: an inner packet of full size.
    pub(crate) full_size: u16,
    /// It takes part in bursts of sockets and guesses.
    pub(crate) bursts: bool,
    /// The wall clock says a time that is over.
    pub(crate) clock_is_behind: bool,
}

impl Us {
    /// What sort of path one through this relay is.
    pub(crate) fn kind_of_relay(&self, relay: RelayId) -> PathKind {
        match self.peer_relays.contains(&relay) {
            true => PathKind::PeerRelay,
            false => PathKind::Relay,
        }
    }
}

/// The mesh's own addresses, and those behind other nodes. The kernel routes packets to them into
/// the tunnel: one that the tunnel itself sent there would come round again.
#[derive(Debug, Default)]
pub(crate) struct Inside {
    mesh: Vec<IpNet>,
    /// By their first address; none within another.
    behind: BTreeMap<IpAddr, IpNet>,
}

impl Inside {
    pub(crate) fn new(snapshot: &Snapshot, own: &NodeName) -> Self {
        let others = snapshot.nodes.values().filter(|node| node.name != *own);
        let mut nets: Vec<IpNet> = others.flat_map(|node| node.prefixes.clone()).collect();
        if let Some(own) = snapshot.nodes.get(own) {
            // Of a LAN with several gateways this may be one.
            nets.retain(|net| !is_own(own, net));
        }
        nets.sort_unstable_by_key(|net| (net.network(), net.prefix_len()));
        let mut behind: BTreeMap<IpAddr, IpNet> = BTreeMap::new();
        for net in nets {
            let covered = behind
                .last_key_value()
                .is_some_and(|(_, last)| last.contains(&net));
            if !covered {
                behind.insert(net.network(), net);
            }
        }
        let mesh = &snapshot.mesh;
        Self {
            mesh: vec![mesh.overlay_v4.into(), mesh.id.ula_prefix().into()],
            behind,
        }
    }

    /// The mesh's own.
    pub(crate) fn is_overlay(&self, ip: IpAddr) -> bool {
        self.mesh.iter().any(|net| net.contains(&ip))
    }

    /// Behind another node. It may be on a LAN that this node is on as well.
    pub(crate) fn is_behind_another(&self, ip: IpAddr) -> bool {
        let nearest = self.behind.range(..=ip).next_back();
        nearest.is_some_and(|(_, net)| net.contains(&ip))
    }
}

/// Whether an address means something on its own LAN only (RFC 1918, RFC 3927, RFC 4193, RFC 4291 §2.5.6).
pub(crate) fn is_of_a_lan(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => ip.is_private() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unique_local() || ip.is_unicast_link_local(),
    }
}

/// Background attempts at unreachable peers that begin within a second. With 3 initiations of
/// 148 bytes by at most 14 ways each: 200 KB/s if a whole mesh is gone.
const CALLS_PER_S: u32 = 32;

/// Says whether another background attempt may begin.
#[derive(Debug)]
pub(crate) struct Calls {
    since: Instant,
    made: u32,
}

impl Calls {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            since: now,
            made: 0,
        }
    }

    pub(crate) fn take(&mut self, now: Instant) -> bool {
        if now >= self.since + Duration::from_secs(1) {
            (self.since, self.made) = (now, 0);
        }
        let may = self.made < CALLS_PER_S;
        self.made += u32::from(may);
        may
    }
}

/// What a peer asks of the relay links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RelayWish {
    /// Keep a link to it: the peer may be there.
    Visit(RelayId),
    /// A peer behind it fell silent: is it the link?
    Doubt(RelayId),
    /// It delivers.
    Heard(RelayId),
}

/// One input's surroundings.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    pub(crate) now: Instant,
    pub(crate) us: &'a Us,
    pub(crate) dice: &'a mut Dice,
    pub(crate) calls: &'a mut Calls,
    pub(crate) out: &'a mut VecDeque<Output>,
    pub(crate) wishes: &'a mut Vec<RelayWish>,
}

impl Context<'_> {
    pub(crate) fn send(&mut self, peer: NodeId, via: Via, message: PeerMessage) {
        self.out.push_back(Output::Send { peer, via, message });
    }

    pub(crate) fn event(&mut self, event: Event) {
        self.out.push_back(Output::Event(event));
    }

    pub(crate) fn is_up(&self, via: Via) -> bool {
        match via {
            Via::Direct(_) => true,
            Via::Relay(relay) => self.us.relays_up.contains(&relay),
        }
    }
}
