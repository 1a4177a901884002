//! One node's decisions: which peers to call, by which paths, through which relays.
//!
//! [`Core`] takes an [`Input`] and the time, and has [`Output`]s and a deadline afterwards. Each
//! peer is a state machine of its own (`peer`), called up by its deadline; peers that nobody
//! talked to cost nothing, however many the snapshot names.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_wire::{
    id::{NodeId, NodeName, RelayId, SiteName, Via, canonical},
    peer::{CANDIDATES_MAX, Candidate, CandidateKind, NatKind, PeerMessage},
};
use rand::SeedableRng;

use crate::{
    io::{CLOCK_SKEW_MIN, Input, Output, Refusal},
    node::{
        context::{Calls, Context, Dice, Inside, RelayWish, Us, is_of_a_lan},
        gather::{Gather, targets},
        peer::{Known, Peer, REMEMBERED_MAX},
        relays::{About, Place, Relays, domain, rank},
        report::{PeerReport, RelayReport, TransitionCounts},
        strangers::Strangers,
        unsendable::Unsendable,
        uplinks::Uplinks,
    },
    snapshot::{DEFAULT_MTU_BYTES, ExternalPeer, Locality, Node, Relay, Snapshot},
};

pub(crate) mod choose;
mod context;
mod gather;
pub mod machine;
pub mod path;
mod peer;
mod relays;
pub mod report;
mod strangers;
mod unsendable;
mod uplinks;
mod watch;

#[cfg(test)]
pub(crate) mod tests;

/// Candidates of one kind that peers are told.
const CANDIDATES_PER_KIND_MAX: usize = 6;

/// Peers are told of changed candidates this long after the first change: the answers of two
/// vantage points arrive together.
const TELL_DELAY: Duration = Duration::from_millis(20);

/// Who a node is, and what it knows when it starts.
#[derive(Debug, Clone)]
pub struct CoreConfig {
    /// Its name.
    pub node: NodeName,
    /// Its key.
    pub id: NodeId,
    /// What `Event::Remember` last said of each peer.
    pub remembered: BTreeMap<NodeId, Vec<SocketAddr>>,
    /// It takes part in bursts: behind a symmetric NAT it opens 256 sockets for
    /// a peer that it can only reach by a relay, and otherwise guesses a thousand ports of such a peer.
    pub bursts: bool,
}

/// The decisions of one node.
#[derive(Debug)]
pub struct Core {
    config: CoreConfig,
    us: Us,
    snapshot: Option<Arc<Snapshot>>,
    /// Names by key: made when first needed after a new snapshot.
    names: Option<BTreeMap<NodeId, NodeName>>,
    peers: BTreeMap<NodeId, Peer>,
    timers: BTreeSet<(Instant, NodeId)>,
    relays: Relays,
    gather: Gather,
    uplinks: Uplinks,
    /// Outside addresses that the NAT granted.
    mapped: Vec<SocketAddr>,
    unsendable: Unsendable,
    strangers: Strangers,
    /// Peers are told of changed candidates then.
    tell_at: Option<Instant>,
    calls: Calls,
    /// Peers that are up.
    sessions: usize,
    /// Peers that are not idle.
    awake: usize,
    counts: TransitionCounts,
    dice: Dice,
    out: VecDeque<Output>,
}

impl Core {
    /// A node that knows nothing but itself. `rng_seed` decides every random choice.
    #[must_use]
    pub fn new(config: CoreConfig, rng_seed: u64, now: Instant) -> Self {
        let us = Us {
            site: None,
            direct_sites: None,
            local: Vec::new(),
            candidates: Vec::new(),
            generation: 0,
            nat: NatKind::Unknown,
            relays_up: Vec::new(),
            hopeless_relays: Vec::new(),
            relays: Vec::new(),
            peer_relays: BTreeSet::new(),
            relay_rtts: BTreeMap::new(),
            metered: false,
            inside: Inside::default(),
            full_size: DEFAULT_MTU_BYTES,
            bursts: config.bursts,
            clock_is_behind: false,
        };
        Self {
            config,
            us,
            snapshot: None,
            names: None,
            peers: BTreeMap::new(),
            timers: BTreeSet::new(),
            relays: Relays::default(),
            gather: Gather::default(),
            uplinks: Uplinks::default(),
            mapped: Vec::new(),
            unsendable: Unsendable::default(),
            strangers: Strangers::default(),
            tell_at: None,
            calls: Calls::new(now),
            sessions: 0,
            awake: 0,
            counts: TransitionCounts::default(),
            dice: Dice::seed_from_u64(rng_seed),
            out: VecDeque::new(),
        }
    }

    /// Something happened, at `now`. Never goes back in time.
    pub fn handle_input(&mut self, input: Input, now: Instant) {
        match input {
            Input::Timeout => self.on_timeout(now),
            Input::Snapshot(snapshot) => self.on_snapshot(snapshot, now),
            Input::LocalAddresses(addresses) => self.on_local_addresses(addresses, now),
            Input::PortMapped(addresses) => {
                self.mapped = addresses.into_iter().map(canonical).collect();
                self.refresh_us(now);
            }
            Input::Neighbour { peer, address } => self.on_neighbour(peer, canonical(address), now),
            Input::Uplinks(uplinks) => {
                let moved = self.with_uplinks(|all, out| all.set(uplinks, now, out));
                self.follow_uplink(moved, now);
            }
            Input::UplinkAnswered { uplink } => {
                let moved = self.with_uplinks(|all, out| all.on_answer(uplink, now, out));
                if moved {
                    self.follow_uplink(true, now);
                }
            }
            Input::Reflexive {
                asked,
                observed,
                rtt,
                ..
            } => self.on_reflexive(asked, observed, rtt, now),
            Input::RelayConnected { relay, transport } => {
                self.with_relays(now, |relays, dice, out| {
                    relays.on_connected(relay, transport, now, dice, out);
                })
            }
            Input::RelayLost {
                relay,
                transport,
                reason,
            } => {
                self.with_relays(now, |relays, dice, out| {
                    relays.on_lost(relay, transport, &reason, now, dice, out);
                });
                if self.us.relays_up.is_empty() {
                    self.uplinks.doubt(now);
                }
            }
            Input::RelayGoAway { relay } => {
                self.with_relays(now, |relays, dice, out| {
                    relays.on_go_away(relay, now, dice, out)
                });
                self.for_each_peer(now, |peer, ctx| peer.on_relay_leaving(relay, ctx));
            }
            Input::RelayPeer {
                relay,
                peer,
                present,
            } => {
                if !self.us.relays_up.contains(&relay) {
                    return; // What it said before its link broke does not hold any more.
                }
                self.with_relays(now, |relays, dice, out| relays.heard(relay, now, dice, out));
                self.with_peer(peer, now, |peer, ctx| {
                    peer.on_relay_peer(relay, present, ctx)
                });
            }
            Input::Wanted { peer } => self.with_new_peer(peer, now, |p, ctx| p.on_wanted(ctx)),
            Input::Unsendable { address } => self.on_unsendable(canonical(address), now),
            Input::Refused { peer, via, why } => {
                self.on_refused(peer, canonical_via(via), why, now);
            }
            Input::Clock { wall, at_least } => {
                self.us.clock_is_behind = wall + CLOCK_SKEW_MIN < at_least;
            }
            Input::Handshake { peer, via } => {
                let via = canonical_via(via);
                if self.may_come_by(via) {
                    self.with_new_peer(peer, now, |p, ctx| p.on_handshake(via, ctx));
                }
            }
            Input::Message { peer, via, message } => {
                let via = canonical_via(via);
                if self.may_come_by(via) {
                    self.with_new_peer(peer, now, |p, ctx| p.on_message(via, message, ctx));
                }
            }
            Input::Traffic {
                peer,
                sent,
                received,
            } => {
                let received = received.into_iter().map(canonical_via);
                let received: Vec<Via> = received.filter(|via| self.may_come_by(*via)).collect();
                self.with_new_peer(peer, now, |p, ctx| p.on_traffic(sent, &received, ctx));
            }
        }
    }

    /// Whether what came by `via` says something of that way: not what was under way when a relay's link ended, as nothing can be
    /// answered by it.
    fn may_come_by(&self, via: Via) -> bool {
        match via {
            Via::Direct(_) => true,
            Via::Relay(relay) => self.us.relays_up.contains(&relay),
        }
    }

    /// What must be done, in order; `None`: nothing more.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    /// When to say [`Input::Timeout`]; `None`: not before another input.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let peers = self.timers.first().map(|&(at, _)| at);
        let relays = self.relays.deadline();
        let gather = self.gather.deadline(self.is_active() && !self.us.metered);
        let uplinks = self.uplinks.deadline();
        [peers, relays, gather, uplinks, self.tell_at]
            .into_iter()
            .flatten()
            .min()
    }

    /// Tells every peer in use that this node stops now. The outputs are the last ones.
    pub fn shut_down(&mut self) {
        for (&peer, state) in &self.peers {
            if let Some(via) = state.way_in_use() {
                let message = PeerMessage::Goodbye;
                self.out.push_back(Output::Send { peer, via, message });
            }
        }
    }

    // Reports.

    /// Peers that were woken since the start, by key.
    pub fn peers(&self) -> impl Iterator<Item = PeerReport> + '_ {
        self.peers.values().map(|peer| peer.report(&self.us))
    }

    /// What a packet costs to each peer to which there is a path, as far as that was measured.
    pub fn costs(&self) -> impl Iterator<Item = (NodeName, Duration)> + '_ {
        self.peers.values().filter_map(Peer::cost)
    }

    /// One peer, if it was woken since the start.
    #[must_use]
    pub fn peer_report(&self, peer: &NodeId) -> Option<PeerReport> {
        self.peers.get(peer).map(|peer| peer.report(&self.us))
    }

    /// Every relay that serves this node, the preferred one first, and those that it visits.
    pub fn relays(&self) -> impl Iterator<Item = RelayReport> + '_ {
        let home = self.us.relays_up.first();
        let serving = self.relays.preferred().iter();
        let visited = self.us.relays_up.iter();
        let visited = visited.filter(|relay| !self.us.relays.contains(relay));
        serving.chain(visited).filter_map(move |&id| {
            let relay = self.snapshot.as_ref()?.relays.get(&id)?;
            let link = self.relays.report(&id);
            Some(RelayReport {
                id,
                name: relay.name.clone(),
                up: link.up,
                home: home == Some(&id),
                rtt: self.relays.rtt(&id),
                problem: link.problem,
            })
        })
    }

    /// Whether no relay is up though one should be: there are some, and the node does not rest, as it does where
    /// keeping links costs and nobody talks.
    #[must_use]
    pub fn lacks_relays(&self) -> bool {
        let some = !self.relays.preferred().is_empty();
        some && self.us.relays_up.is_empty() && !self.relays.is_resting()
    }

    /// The addresses at which a relay is to be dialled, the likeliest first. One that the kernel's routes
    /// lead into the tunnel is none: a link to a site's relay would run through what runs through it.
    #[must_use]
    pub fn relay_addresses(&self, relay: &RelayId) -> Vec<IpAddr> {
        let relays = self.snapshot.as_ref().map(|snapshot| &snapshot.relays);
        let Some(known) = relays.and_then(|relays| relays.get(relay)) else {
            return Vec::new();
        };
        let near = matches!(self.relays.place(*relay), Place::Neighbour | Place::Here);
        let inside = &self.us.inside;
        let outside = |ip: &IpAddr| {
            let ip = ip.to_canonical();
            !inside.is_overlay(ip) && (near || !inside.is_behind_another(ip))
        };
        let addresses = known.addresses.iter().copied();
        let mut addresses: Vec<IpAddr> = addresses.filter(outside).collect();
        // Stable. A LAN's address means something else on another LAN.
        addresses.sort_by_key(|ip| is_of_a_lan(*ip) != near);
        addresses
    }

    /// How often each change of state of a peer or path happened since the start.
    #[must_use]
    pub fn transitions(&self) -> &TransitionCounts {
        &self.counts
    }

    /// The kind of NAT in front of this node.
    #[must_use]
    pub fn nat(&self) -> NatKind {
        self.us.nat
    }

    /// The addresses at which relays see this node.
    #[must_use]
    pub fn reflexive(&self) -> Vec<SocketAddr> {
        self.gather.addresses()
    }

    /// Whether new flows may go to a node: it has a live path, or none is known to be dead.
    #[must_use]
    pub fn is_alive(&self, node: &NodeName) -> bool {
        let node = self.snapshot.as_ref().and_then(|s| s.nodes.get(node));
        let peer = node.and_then(|node| self.peers.get(&node.id));
        peer.is_none_or(Peer::is_alive)
    }

    // Inputs.

    fn on_timeout(&mut self, now: Instant) {
        while let Some(&(at, peer)) = self.timers.first()
            && at <= now
        {
            self.timers.pop_first();
            if let Some(peer) = self.peers.get_mut(&peer) {
                peer.timer = None;
            }
            self.with_peer(peer, now, |peer, ctx| peer.on_timeout(ctx));
        }
        if self.relays.deadline().is_some_and(|at| now >= at) {
            self.with_relays(now, |relays, dice, out| relays.on_timeout(now, dice, out));
        }
        if self.uplinks.deadline().is_some_and(|at| now >= at) {
            let targets = self.probe_targets();
            let moved = self.with_uplinks(|all, out| all.on_timeout(&targets, now, out));
            if moved {
                self.follow_uplink(true, now);
            }
        }
        self.tend_gather(now);
        if self.tell_at.is_some_and(|at| now >= at) {
            self.tell_at = None;
            self.for_each_peer(now, |peer, ctx| peer.start_search(ctx));
        }
    }

    fn on_snapshot(&mut self, snapshot: Arc<Snapshot>, now: Instant) {
        let relays_before = self.snapshot.as_ref().map(|old| old.relays.clone());
        self.snapshot = Some(Arc::clone(&snapshot));
        self.names = None;
        let own = snapshot.nodes.get(&self.config.node);
        self.us.site = own.and_then(|node| node.locality.site.clone());
        self.us.direct_sites = snapshot.direct_sites(self.us.site.as_ref());
        self.us.inside = Inside::new(&snapshot, &self.config.node);
        self.us.full_size = snapshot.mesh.mtu_bytes.max(DEFAULT_MTU_BYTES);
        let relays = snapshot.relays.iter();
        let relays = relays.map(|(&id, relay)| (id, self.about(relay, &snapshot)));
        let relays: BTreeMap<RelayId, About> = relays.collect();
        let peer_relays = relays.iter().filter(|(_, about)| about.place.is_node());
        self.us.peer_relays = peer_relays.map(|(&id, _)| id).collect();
        self.forget_removed_peers();
        let moved = self.relays.set_known(&self.config.id, relays);
        if moved || relays_before.as_ref() != Some(&snapshot.relays) {
            self.with_relays(now, |relays, dice, out| relays.keep(now, dice, out));
            self.gather_anew(now);
        }
        self.refresh_us(now);
        self.for_each_peer(now, |peer, ctx| peer.on_snapshot(ctx));
        for (id, via) in self.strangers.lately(now) {
            if self.find(&id).is_some() {
                self.strangers.remove(&id);
                self.with_new_peer(id, now, |peer, ctx| peer.call_back(via, ctx));
            }
        }
    }

    fn about(&self, relay: &Relay, snapshot: &Snapshot) -> About {
        let node = relay.node.as_ref();
        let site = |name| snapshot.nodes.get(name).map(|node| &node.locality.site);
        About {
            domains: relay.addresses.iter().copied().map(domain).collect(),
            serves: relay.serves(self.us.site.as_ref()),
            place: match node {
                None => Place::Apart,
                Some(name) if *name == self.config.node => Place::Here,
                Some(name) if self.us.site.is_some() && site(name) == Some(&self.us.site) => {
                    Place::Neighbour
                }
                Some(_) => Place::Node,
            },
        }
    }

    /// Peers that the snapshot does not name any more, or under another key.
    fn forget_removed_peers(&mut self) {
        let ids: Vec<NodeId> = self.peers.keys().copied().collect();
        for id in ids {
            let Some(peer) = self.peers.get_mut(&id) else {
                continue;
            };
            let name = peer.known().name.clone();
            match self
                .snapshot
                .as_deref()
                .and_then(|s| known(s, &name, &id, &self.us))
            {
                Some(known) => peer.set_known(known),
                None => self.forget_peer(id),
            }
        }
    }

    fn forget_peer(&mut self, id: NodeId) {
        let Some(peer) = self.peers.remove(&id) else {
            return;
        };
        self.sessions -= usize::from(peer.is_up());
        self.awake -= usize::from(!peer.is_idle());
        if let Some(at) = peer.timer {
            self.timers.remove(&(at, id));
        }
        if peer.way_in_use().is_some() {
            self.out.push_back(Output::SetPath {
                peer: id,
                primary: None,
                duplicate: None,
                duplicates_max: None,
            });
        }
    }

    fn on_local_addresses(&mut self, addresses: Vec<SocketAddr>, now: Instant) {
        let addresses: Vec<SocketAddr> = addresses.into_iter().map(canonical).collect();
        let moved = addresses != self.us.local && !self.us.local.is_empty();
        if addresses != self.us.local {
            self.gather.forget();
            self.mapped.clear(); // By another router.
            self.us.local = addresses;
        }
        self.with_relays(now, |relays, dice, out| {
            relays.on_network_change(moved, now, dice, out)
        });
        self.gather_anew(now);
        self.refresh_us(now);
        self.for_each_peer(now, |peer, ctx| peer.on_network_change(moved, ctx));
    }

    fn with_uplinks(
        &mut self,
        act: impl FnOnce(&mut Uplinks, &mut dyn FnMut(Output)) -> bool,
    ) -> bool {
        let out = &mut self.out;
        act(&mut self.uplinks, &mut |output| out.push_back(output))
    }

    /// The network is that of the uplink in use.
    fn follow_uplink(&mut self, moved: bool, now: Instant) {
        let metered = self.uplinks.is_metered();
        if std::mem::replace(&mut self.us.metered, metered) != metered {
            self.us.generation += 1;
            self.tell_at.get_or_insert(now + TELL_DELAY);
        }
        let active = self.uplinks.active();
        let addresses = active.map(|uplink| uplink.addresses.clone());
        if moved {
            self.mapped.clear();
            // Even if the new network gave the same address: what was learned is of the old one.
            self.gather.forget();
        }
        self.on_local_addresses(addresses.unwrap_or_default(), now);
        self.rest(now);
    }

    /// Who may be asked whether an uplink leads anywhere.
    fn probe_targets(&self) -> Vec<SocketAddr> {
        let (outside, _) = self.vantage_points();
        let targets = outside.iter().map(|relay| self.stun_targets(relay));
        targets.flatten().collect()
    }

    /// A node that nobody here talks to is remembered only: it costs nothing.
    fn on_neighbour(&mut self, id: NodeId, address: SocketAddr, now: Instant) {
        if self.peers.contains_key(&id) {
            return self.with_peer(id, now, |peer, ctx| peer.on_neighbour(address, ctx));
        }
        if self.find(&id).is_some() {
            let known = self.config.remembered.entry(id).or_default();
            known.retain(|other| *other != address);
            known.insert(0, address);
            known.truncate(REMEMBERED_MAX);
        }
    }

    /// The kernel refuses to send to an address.
    fn on_unsendable(&mut self, address: SocketAddr, now: Instant) {
        if self.unsendable.is_news(address, now) {
            let via = Via::Direct(address);
            self.for_each_peer(now, |peer, ctx| peer.on_unsendable(via, ctx));
        }
    }

    fn on_refused(&mut self, id: NodeId, via: Via, why: Refusal, now: Instant) {
        match why {
            Refusal::OldTimestamp { behind } => {
                self.with_new_peer(id, now, |peer, ctx| peer.on_refused(via, behind, ctx));
            }
            Refusal::UnknownKey => {
                let event = self.strangers.add(id, via, now);
                self.out.extend(event.map(Output::Event));
            }
        }
    }

    fn on_reflexive(
        &mut self,
        asked: SocketAddr,
        observed: SocketAddr,
        rtt: Duration,
        now: Instant,
    ) {
        let Some((relay, changed)) = self.gather.on_reflexive(asked, observed) else {
            return;
        };
        if self.relays.on_rtt(relay, rtt) {
            self.us.relay_rtts.clone_from(self.relays.told());
            self.us.generation += 1;
            self.tell_at.get_or_insert(now + TELL_DELAY);
        }
        self.with_relays(now, |relays, dice, out| relays.keep(now, dice, out));
        if changed {
            self.refresh_us(now);
        }
    }

    // The node's view of itself.

    fn is_active(&self) -> bool {
        self.sessions > 0
    }

    fn gather_anew(&mut self, now: Instant) {
        self.start_gather(now);
        self.tend_gather(now);
    }

    fn start_gather(&mut self, now: Instant) {
        let (outside, inside) = self.vantage_points();
        let all = outside.iter().chain(&inside);
        let all: BTreeMap<_, _> = all.map(|&id| (id, self.stun_targets(&id))).collect();
        if self.snapshot.is_some() {
            let local = &self.us.local;
            self.gather.start(&outside, &inside, &all, local, now);
        }
    }

    /// Where a relay answers STUN.
    fn stun_targets(&self, relay: &RelayId) -> Vec<SocketAddr> {
        let relays = self.snapshot.as_ref().map(|snapshot| &snapshot.relays);
        let known = relays.and_then(|relays| relays.get(relay));
        known.map_or(Vec::new(), |known| {
            targets(known, &self.relay_addresses(relay))
        })
    }

    /// Relays that see this node from outside, those first that are likely to answer; and those of its site.
    fn vantage_points(&self) -> (Vec<RelayId>, Vec<RelayId>) {
        let mut outside: Vec<RelayId> = self.relays.vantage_points().collect();
        outside.sort_by_key(|relay| !self.relays.is_hopeful(relay));
        let inside = self.relays.preferred().iter().copied();
        let inside = inside.filter(|relay| !outside.contains(relay));
        let inside = inside.collect();
        (outside, inside)
    }

    fn tend_gather(&mut self, now: Instant) {
        // Where it costs, what was learned at first has to do.
        let active = self.is_active() && !self.us.metered;
        if active && self.gather.wants_refresh(now) {
            self.start_gather(now);
        }
        let out = &mut self.out;
        let mut out = |output| out.push_back(output);
        if self
            .gather
            .on_timeout(active, now, &mut self.dice, &mut out)
        {
            self.refresh_us(now);
        }
    }

    /// Sees to it that what peers are told is true.
    fn refresh_us(&mut self, now: Instant) {
        let nat = self
            .gather
            .nat(&self.us.local, self.relays.are_by_tls_only());
        let candidates = self.candidates();
        if (&candidates, nat) != (&self.us.candidates, self.us.nat) {
            self.us.candidates = candidates;
            self.us.nat = nat;
            self.us.generation += 1;
            self.tell_at.get_or_insert(now + TELL_DELAY);
        }
    }

    fn candidates(&self) -> Vec<Candidate> {
        let own = self
            .snapshot
            .as_ref()
            .and_then(|s| s.nodes.get(&self.config.node));
        let fixed = own
            .map(|node| node.static_candidates.clone())
            .unwrap_or_default();
        let kinds = [
            (CandidateKind::Static, fixed),
            (CandidateKind::PortMapped, self.mapped.clone()),
            (CandidateKind::Reflexive, self.gather.addresses()),
            (CandidateKind::Host, self.us.local.clone()),
        ];
        let mut all: Vec<Candidate> = Vec::new();
        for (kind, addresses) in kinds {
            let of_kind = addresses
                .into_iter()
                .map(canonical)
                .take(CANDIDATES_PER_KIND_MAX);
            for address in of_kind {
                if !all.iter().any(|known| known.address == address) {
                    all.push(Candidate { kind, address });
                }
            }
        }
        all.truncate(CANDIDATES_MAX);
        all
    }

    // Parts and their surroundings.

    fn with_relays(
        &mut self,
        now: Instant,
        act: impl FnOnce(&mut Relays, &mut Dice, &mut dyn FnMut(Output)),
    ) {
        let by_tls_before = self.relays.are_by_tls_only();
        let out = &mut self.out;
        act(&mut self.relays, &mut self.dice, &mut |output| {
            out.push_back(output)
        });
        self.us.relays = self.relays.preferred().to_vec();
        self.us.hopeless_relays = self.relays.hopeless();
        let up = self.relays.up();
        let before = std::mem::replace(&mut self.us.relays_up, up.clone());
        for &relay in before.iter().filter(|relay| !up.contains(relay)) {
            self.for_each_peer(now, |peer, ctx| peer.on_relay_down(relay, ctx));
        }
        for &relay in up.iter().filter(|relay| !before.contains(relay)) {
            self.for_each_peer(now, |peer, ctx| peer.on_relay_up(relay, ctx));
        }
        if by_tls_before != self.relays.are_by_tls_only() {
            self.refresh_us(now);
        }
    }

    fn for_each_peer(&mut self, now: Instant, act: impl Fn(&mut Peer, &mut Context)) {
        let ids: Vec<NodeId> = self.peers.keys().copied().collect();
        for id in ids {
            self.with_peer(id, now, &act);
        }
    }

    fn with_peer(&mut self, id: NodeId, now: Instant, act: impl FnOnce(&mut Peer, &mut Context)) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        let mut wishes = Vec::new();
        let mut ctx = Context {
            now,
            us: &self.us,
            dice: &mut self.dice,
            calls: &mut self.calls,
            out: &mut self.out,
            wishes: &mut wishes,
        };
        peer.set_metered(self.us.metered);
        let was_up = peer.is_up();
        let was_idle = peer.is_idle();
        let was_suspect = peer.is_suspect();
        act(peer, &mut ctx);
        self.counts.add(&peer.take_counts());
        self.sessions = self.sessions + usize::from(peer.is_up()) - usize::from(was_up);
        self.awake = self.awake + usize::from(!peer.is_idle()) - usize::from(!was_idle);
        if was_up && !was_suspect && peer.is_suspect() {
            self.uplinks.doubt(now);
        }
        let deadline = peer.deadline();
        if peer.timer != deadline {
            if let Some(old) = std::mem::replace(&mut peer.timer, deadline) {
                self.timers.remove(&(old, id));
            }
            self.timers.extend(deadline.map(|at| (at, id)));
        }
        let in_use = peer.relay_in_use().map(RelayWish::Visit);
        self.grant(wishes.into_iter().chain(in_use), now);
        self.rest(now);
    }

    /// Where keeping links costs, a node that nobody talks to has none.
    fn rest(&mut self, now: Instant) {
        let resting = self.us.metered && self.awake == 0;
        if self.relays.is_resting() != resting {
            self.with_relays(now, |relays, dice, out| {
                relays.set_resting(resting, now, dice, out);
            });
        }
    }

    fn grant(&mut self, wishes: impl Iterator<Item = RelayWish>, now: Instant) {
        let out = &mut self.out;
        let mut out = |output| out.push_back(output);
        for wish in wishes {
            match wish {
                RelayWish::Visit(id) => self.relays.visit(id, now, &mut self.dice, &mut out),
                RelayWish::Doubt(id) => self.relays.doubt(id, now, &mut self.dice),
                RelayWish::Heard(id) => self.relays.heard(id, now, &mut self.dice, &mut out),
            }
        }
    }

    /// Like [`Self::with_peer`], of a peer that may be new. One that the snapshot does not name
    /// is none.
    fn with_new_peer(
        &mut self,
        id: NodeId,
        now: Instant,
        act: impl FnOnce(&mut Peer, &mut Context),
    ) {
        if !self.peers.contains_key(&id) {
            let Some(known) = self.find(&id) else {
                return;
            };
            let remembered = self.config.remembered.get(&id).cloned().unwrap_or_default();
            self.peers.insert(id, Peer::new(known, remembered, now));
        }
        self.with_peer(id, now, act);
    }

    fn find(&mut self, id: &NodeId) -> Option<Known> {
        let snapshot = self.snapshot.as_deref()?;
        if *id == self.config.id {
            return None;
        }
        let names = self.names.get_or_insert_with(|| {
            let nodes = snapshot
                .nodes
                .values()
                .map(|node| (node.id, node.name.clone()));
            let external = snapshot.external_peers.values();
            nodes
                .chain(external.map(|peer| (peer.id, peer.name.clone())))
                .collect()
        });
        known(snapshot, names.get(id)?, id, &self.us)
    }
}

fn known(snapshot: &Snapshot, name: &NodeName, id: &NodeId, us: &Us) -> Option<Known> {
    let node = snapshot.nodes.get(name).filter(|node| node.id == *id);
    let external = || {
        snapshot
            .external_peers
            .get(name)
            .filter(|peer| peer.id == *id)
    };
    node.map(|node| known_node(node, snapshot, us))
        .or_else(|| external().map(known_external))
}

fn known_node(node: &Node, snapshot: &Snapshot, us: &Us) -> Known {
    let Locality { site, .. } = &node.locality;
    let same_site = site.is_some() && *site == us.site;
    let mut addresses = node.static_candidates.clone();
    if same_site {
        // Nodes of one site are likely to be configured alike: the same port.
        let ports = us.local.iter().map(|own| (own.port(), own.is_ipv4()));
        let ports: BTreeSet<(u16, bool)> = ports.collect();
        for (port, v4) in ports {
            let of_family = node
                .underlay_addresses
                .iter()
                .filter(|ip| ip.is_ipv4() == v4);
            addresses.extend(of_family.map(|&ip| SocketAddr::new(ip, port)));
        }
    }
    Known {
        id: node.id,
        name: node.name.clone(),
        plain: false,
        same_site,
        relay_only: !may_be_direct(site.as_ref(), us),
        addresses,
        relays: {
            let all = snapshot.relays.iter();
            let theirs = all.filter(|(_, relay)| relay.serves(site.as_ref()));
            rank(
                &node.id,
                theirs.map(|(&id, relay)| (id, relay.node.is_some())),
            )
        },
    }
}

fn may_be_direct(site: Option<&SiteName>, us: &Us) -> bool {
    let allowed = us.direct_sites.as_ref();
    allowed.is_none_or(|sites| site.is_some_and(|site| sites.contains(site)))
}

fn known_external(peer: &ExternalPeer) -> Known {
    Known {
        id: peer.id,
        name: peer.name.clone(),
        plain: true,
        same_site: false,
        relay_only: false, // It knows no relay.
        relays: Vec::new(),
        addresses: peer.endpoint.into_iter().collect(),
    }
}

fn canonical_via(via: Via) -> Via {
    match via {
        Via::Direct(address) => Via::Direct(canonical(address)),
        Via::Relay(_) => via,
    }
}
