//! How paths to a peer come and go, and which one is in use.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use mesh_wire::{
    id::{RelayId, Via, canonical},
    peer::{Candidate, CandidateKind, NatKind, PeerMessage},
};

use super::{Path, PathKind, PathState, Peer, Phase, REMEMBERED_MAX, Reason};
use crate::{
    io::{Event, Output},
    node::{
        choose::choose,
        context::{Context, RelayWish, Us, is_of_a_lan},
        gather::has_family,
        machine::PathEvent,
        relays::{PEER_RELAYS, is_nearer},
        watch::{Watch, WatchInput},
    },
};

/// Candidates of one kind that are probed (`paths.md`).
const CANDIDATES_PER_KIND_MAX: usize = 6;

/// Addresses that only a peer's packets told of (`paths.md`).
const PEER_REFLEXIVE_MAX: usize = 4;

/// Addresses that one handshake initiation is sent to.
const ADDRESSES_TO_CALL_MAX: usize = 12;

/// How long packets go by the old path, too (`paths.md`) …
const DUPLICATE: Duration = Duration::from_millis(250);

/// … and how many of them at most (`paths.md`).
const DUPLICATES_MAX: u32 = 32;

/// The same after a silence (see `UNSURE_AFTER`), until the path is heard or doubted: the most patience, 3 s, of a
/// call with 50 packets a second, and two thirds more. Of full size they are 330 KB.
const UNSURE_DUPLICATES_MAX: u32 = 256;

/// Gaps between the tellings of the candidates in one round: nobody acknowledges them, and three
/// repetitions survive 20 % of loss in 99.8 of 100 rounds.
const TELL_GAPS: [Duration; 3] = [
    Duration::from_millis(300),
    Duration::from_secs(1),
    Duration::from_secs(2),
];

/// Pauses between searches for a direct path; the last one repeats (`paths.md`).
const RETRY_DIRECT: [Duration; 5] = [
    Duration::from_secs(5),
    Duration::from_secs(10),
    Duration::from_secs(20),
    Duration::from_secs(40),
    Duration::from_secs(60),
];

/// A direct path that has been there for so long, and the search that follows it (10 s), was worth the search:
/// the next one begins soon again. What comes and goes faster is looked for ever more rarely.
const DIRECT_LASTED: Duration = Duration::from_secs(20);

/// How long a direct path is used on that is allowed no more, while no relay reaches the peer: a link to one of
/// the peer's relays (3 s at most by QUIC and TLS), and a round of probes through it.
const LEAVE_MAX: Duration = Duration::from_secs(6);

/// A peer that searches sets off a search of this end, but no more often than this: two ends
/// without a candidate would otherwise answer each other for ever.
const ANSWERING_SEARCH_EVERY: Duration = Duration::from_secs(5);

/// Whether who told these addresses before has none of them now.
fn is_elsewhere(before: &[Candidate], now: &[Candidate]) -> bool {
    let hosts = |all: &[Candidate]| -> Vec<SocketAddr> {
        let hosts = all.iter().filter(|one| one.kind == CandidateKind::Host);
        hosts.map(|one| one.address).collect()
    };
    let (before, now) = (hosts(before), hosts(now));
    !before.is_empty() && !now.is_empty() && !before.iter().any(|one| now.contains(one))
}

impl Peer {
    /// Makes sure that there is a path for a way by which the peer sent something.
    pub(super) fn learn_path(&mut self, via: Via, ctx: &Context) {
        if self.paths.contains_key(&via) {
            return;
        }
        match via {
            _ if self.is_forbidden(via) => {}
            Via::Relay(relay) => {
                let kind = ctx.us.kind_of_relay(relay);
                self.paths.insert(via, Path::new(kind, None));
            }
            // Its packets came out of the tunnel itself.
            Via::Direct(address) if self.is_inside(address, ctx.us) => {}
            Via::Direct(address) => {
                let source = CandidateKind::PeerReflexive;
                let told = |path: &&Path| path.source == Some(source);
                if self.paths.values().filter(told).count() == PEER_REFLEXIVE_MAX {
                    // One that does not work makes room; otherwise the new one waits its turn.
                    let dead = |(_, path): &(&Via, &Path)| {
                        told(path) && matches!(path.state(), PathState::Dead | PathState::Candidate)
                    };
                    let Some((&dead, _)) = self.paths.iter().find(dead) else {
                        return;
                    };
                    self.forget_path(dead, ctx.now);
                }
                let kind = self.kind_of(address, source, ctx.us);
                self.paths.insert(via, Path::new(kind, Some(source)));
            }
        }
    }

    fn kind_of(&self, address: SocketAddr, source: CandidateKind, us: &Us) -> PathKind {
        let inside = is_of_a_lan(address.ip());
        let both_told_sites = us.site.is_some() && !self.known.plain;
        let near = self.known.same_site || inside && !both_told_sites;
        let of_host = matches!(source, CandidateKind::Host | CandidateKind::PeerReflexive);
        match near && of_host && (inside || source == CandidateKind::Host) {
            true => PathKind::Lan,
            false => PathKind::Direct,
        }
    }

    /// Makes a path for each address that is known of the peer.
    fn add_direct_paths(&mut self, ctx: &Context) {
        if self.known.relay_only {
            return;
        }
        let us = ctx.us;
        let told = self.remote.candidates.clone();
        let known = self.known.addresses.iter().chain(&self.remembered);
        let known = known.map(|&address| Candidate {
            kind: CandidateKind::Static,
            address: canonical(address),
        });
        let all: Vec<Candidate> = told.into_iter().chain(known).collect();
        // Addresses that it has no more would take the room of those that it has. One that worked once is
        // remembered, but has no place among those that are told.
        let valid = |via: &Via, kind| {
            let same = |one: &Candidate| *via == Via::Direct(canonical(one.address));
            all.iter().any(|one| one.kind == kind && same(one))
        };
        let old = self.paths.iter().filter(|(via, path)| {
            let told = path.source;
            let told = told.filter(|&kind| kind != CandidateKind::PeerReflexive);
            let useless = !path.usable() && path.state() != PathState::Suspect;
            told.is_some_and(|kind| useless && !valid(via, kind))
        });
        let old: Vec<Via> = old.map(|(&via, _)| via).collect();
        old.into_iter()
            .for_each(|via| self.forget_path(via, ctx.now));
        for Candidate { kind, address } in all {
            let via = Via::Direct(canonical(address));
            let of_kind = |path: &&Path| path.source == Some(kind);
            let full = self.paths.values().filter(of_kind).count() >= CANDIDATES_PER_KIND_MAX;
            if full || self.paths.contains_key(&via) || !self.is_worth_trying(address, us) {
                continue;
            }
            let path = Path::new(self.kind_of(address, kind, us), Some(kind));
            self.paths.insert(via, path);
        }
    }

    /// Makes a path for each relay with a link, and probes it.
    pub(super) fn add_relay_paths(&mut self, ctx: &mut Context) {
        for relay in self.relays_up(ctx.us) {
            if self.presence.get(&relay) == Some(&false) {
                continue;
            }
            if !self.presence.contains_key(&relay) {
                let peer = self.known.id;
                ctx.out.push_back(Output::FindPeer { relay, peer });
            }
            let new = || Path::new(ctx.us.kind_of_relay(relay), None);
            let path = self.paths.entry(Via::Relay(relay)).or_insert_with(new);
            path.start_probing(ctx.now);
        }
    }

    /// Where to send a handshake initiation, the likeliest first.
    pub(super) fn addresses_to_call(&self, us: &Us) -> Vec<SocketAddr> {
        if self.known.relay_only {
            return Vec::new();
        }
        let paths = self.paths.keys().filter_map(|via| match via {
            Via::Direct(address) => Some(*address),
            Via::Relay(_) => None,
        });
        let told = self.remote.candidates.iter().map(|told| told.address);
        let first = self.remembered.iter().chain(&self.known.addresses).copied();
        let mut addresses = Vec::new();
        for address in first.chain(told).chain(paths).map(canonical) {
            if !addresses.contains(&address) && self.is_worth_trying(address, us) {
                addresses.push(address);
            }
        }
        addresses.truncate(ADDRESSES_TO_CALL_MAX);
        addresses
    }

    // The search for a direct path.

    /// Begins a round: tells the own candidates and probes the peer's.
    pub(crate) fn start_search(&mut self, ctx: &mut Context) {
        if !self.is_up() || self.known.plain {
            return;
        }
        self.search.began = Some(ctx.now);
        self.search.retry_at = None;
        self.search.told = 0;
        self.tell_candidates(ctx);
        self.probe_direct(ctx);
        self.seek_peer_relay(ctx);
    }

    fn probe_direct(&mut self, ctx: &mut Context) {
        self.add_direct_paths(ctx);
        for path in self.paths.values_mut() {
            if !path.kind.is_relayed() {
                path.start_probing(ctx.now);
            }
        }
        self.send_due_probes(ctx);
    }

    pub(super) fn tell_candidates(&mut self, ctx: &mut Context) {
        let Some(via) = self.primary else {
            return;
        };
        let gap = TELL_GAPS.get(self.search.told);
        self.search.tell_at = gap.map(|&gap| ctx.now + gap);
        self.search.told += 1;
        // Where nothing may be tried, the kind of NAT alone: of use to people.
        let candidates = match self.known.relay_only {
            true => Vec::new(),
            false => ctx.us.candidates.clone(),
        };
        let message = PeerMessage::Candidates {
            generation: ctx.us.generation,
            candidates,
            nat: ctx.us.nat,
            relays: ctx
                .us
                .relay_rtts
                .iter()
                .map(|(&id, &rtt)| (id, rtt))
                .collect(),
            metered: ctx.us.metered,
            bursts: ctx.us.bursts,
        };
        // The way in use may be the one that died.
        for via in self.duplicate.into_iter().chain([via]) {
            ctx.send(self.known.id, via, message.clone());
        }
    }

    pub(super) fn on_candidates(
        &mut self,
        generation: u64,
        candidates: Vec<Candidate>,
        nat: NatKind,
        ctx: &mut Context,
    ) {
        if self
            .remote
            .generation
            .is_some_and(|known| generation < known)
        {
            return; // Overtaken by a newer list.
        }
        let first = self.remote.generation.replace(generation).is_none();
        let changed = self.remote.candidates != candidates || self.remote.nat != nat;
        let moved = is_elsewhere(&self.remote.candidates, &candidates);
        (self.remote.candidates, self.remote.nat) = (candidates, nat);
        if !self.is_up() {
            return;
        }
        let direct = matches!(self.primary, Some(Via::Direct(_)));
        if moved && direct && self.watch.suspect_since().is_none() {
            // Its own side knows already. What is sent there meanwhile would be lost.
            self.doubt_now(Reason::LinkDown, ctx);
        }
        self.seek_nearer_relay(ctx);
        let recent = |began| ctx.now.saturating_duration_since(began) < ANSWERING_SEARCH_EVERY;
        let searching = self.search.began.is_some_and(recent);
        if !searching && (first || changed || self.relay_in_use().is_some()) {
            self.search.failures = if changed { 0 } else { self.search.failures };
            self.start_search(ctx);
        } else if first || changed {
            self.probe_direct(ctx);
        }
    }

    /// When every probe of a round was in vain, plans the next one.
    pub(super) fn end_search_round(&mut self, ctx: &mut Context) {
        let probing = |path: &Path| !path.kind.is_relayed() && path.state() == PathState::Probing;
        let over = self.is_up()
            && !self.known.relay_only
            && self.relay_in_use().is_some()
            && self.search.tell_at.is_none()
            && self.search.retry_at.is_none()
            && !self.paths.values().any(probing);
        if over {
            self.plan_search(ctx.now);
            self.open_sockets(ctx);
        }
    }

    /// The next search begins after a pause.
    pub(super) fn plan_search(&mut self, now: Instant) {
        let since = self.search.direct_since.take();
        if since.is_some_and(|since| now.saturating_duration_since(since) >= DIRECT_LASTED) {
            self.search.failures = 0;
        }
        let pause = RETRY_DIRECT.get(self.search.failures);
        let pause = pause.or(RETRY_DIRECT.last());
        self.search.retry_at = pause.map(|&pause| now + pause);
        self.search.failures += 1;
    }

    // What the mesh allows.

    /// Whether the mesh says that the two do not use this way.
    pub(super) fn is_forbidden(&self, via: Via) -> bool {
        self.known.relay_only && matches!(via, Via::Direct(_))
    }

    /// The snapshot is another one: a way may be forbidden now, or lead into the tunnel itself, and one that was
    /// forbidden may be allowed.
    pub(crate) fn on_snapshot(&mut self, ctx: &mut Context) {
        for (via, path) in &mut self.paths {
            if let Via::Relay(relay) = via {
                path.kind = ctx.us.kind_of_relay(*relay);
            }
        }
        self.demand_full_size(ctx);
        self.select(ctx);
        self.forget_forbidden(ctx.now);
        if !self.is_up() {
            return;
        }
        if self.uses_forbidden() {
            // Both ends hear it at about the same time, and neither knows a relay that reaches the other. Until
            // one does, packets go by the way that there is.
            self.leave_by.get_or_insert(ctx.now + LEAVE_MAX);
            self.visit_relays(ctx);
            self.add_relay_paths(ctx);
            self.send_due_probes(ctx);
            return;
        }
        self.leave_by = None;
        if self.search.began.is_none() && self.search.retry_at.is_none() {
            self.start_search(ctx);
        }
    }

    /// The overlay's packets may be larger now: a direct path has to prove that it carries them. Meanwhile they
    /// go by a relay, if there is one.
    fn demand_full_size(&mut self, ctx: &mut Context) {
        let mut paths = self.paths.values_mut();
        let doubtful = paths.any(|path| path.set_full_size(ctx.us.full_size));
        self.paths.values_mut().for_each(|path| {
            path.set_full_size(ctx.us.full_size);
        });
        if !doubtful || self.known.plain {
            return;
        }
        let in_use = self.primary;
        let unproven = |(via, path): &(&Via, &Path)| {
            !path.kind.is_relayed() && !path.full_ok && Some(**via) != in_use
        };
        let unproven: Vec<Via> = self
            .paths
            .iter()
            .filter(unproven)
            .map(|(&via, _)| via)
            .collect();
        for via in unproven {
            if let Some(path) = self.paths.get_mut(&via) {
                path.happen(PathEvent::Gone, ctx.now);
            }
        }
        let proven = in_use.and_then(|via| self.paths.get(&via));
        let proven = proven.is_none_or(|path| path.full_ok || path.kind.is_relayed());
        if !proven && self.is_up() && self.watch.suspect_since().is_none() {
            if let Some(relay) = self.alternative(ctx) {
                self.set_primary(Some(relay), None, ctx);
                self.publish_up(Reason::Probing, ctx);
                if let Some(path) = in_use.and_then(|via| self.paths.get_mut(&via)) {
                    path.happen(PathEvent::Gone, ctx.now);
                }
            }
            self.start_search(ctx);
        }
    }

    /// Ends the use of a way that is forbidden, whether or not there is another.
    pub(super) fn leave_forbidden(&mut self, ctx: &mut Context) {
        if self.leave_by.is_some_and(|at| ctx.now >= at) {
            self.leave_by = None;
            if self.uses_forbidden() {
                self.lose(Reason::PolicyRelayOnly, ctx);
                self.forget_forbidden(ctx.now);
            }
        }
    }

    fn uses_forbidden(&self) -> bool {
        self.primary.is_some_and(|via| self.is_forbidden(via))
    }

    pub(super) fn forget_forbidden(&mut self, now: Instant) {
        if self.known.relay_only {
            let (primary, duplicate) = (self.primary, self.duplicate);
            let used = |via: &Via| Some(*via) == primary || Some(*via) == duplicate;
            let direct = |via: &Via| matches!(via, Via::Direct(_));
            let unused = self.paths.keys().filter(|via| direct(via) && !used(via));
            let unused: Vec<Via> = unused.copied().collect();
            unused
                .into_iter()
                .for_each(|via| self.forget_path(via, now));
        }
    }

    // Use.

    /// Moves to the best path, if that is another one.
    pub(crate) fn select(&mut self, ctx: &mut Context) {
        if !self.is_up() || self.watch.suspect_since().is_some() {
            return;
        }
        let best = {
            let usable = self.usable(ctx);
            choose(&usable, self.primary)
        };
        let Some(best) = best.filter(|_| best != self.primary) else {
            return;
        };
        let old = self.primary;
        self.watch = Watch::Calm;
        self.set_primary(Some(best), old, ctx);
        self.duplicate_until = old.map(|_| ctx.now + DUPLICATE);
        let reason = match self.paths.get(&best).map(|path| path.kind) {
            _ if old.is_some_and(|old| self.is_forbidden(old)) => Reason::PolicyRelayOnly,
            Some(PathKind::Lan) => Reason::LanFound,
            Some(PathKind::Direct | PathKind::PeerRelay | PathKind::Relay) | None => {
                Reason::ProbeAnswered
            }
        };
        self.publish_up(reason, ctx);
    }

    fn usable(&self, ctx: &Context) -> Vec<(Via, &Path)> {
        let there = |via: &Via| self.is_there(*via, ctx);
        self.paths
            .iter()
            .filter(|(via, path)| path.usable() && there(via))
            .map(|(&via, path)| (via, path))
            .collect()
    }

    /// Whether nothing rules this way out: the link is up, the peer is at the relay.
    pub(super) fn is_there(&self, via: Via, ctx: &Context) -> bool {
        match via {
            Via::Direct(address) => !self.known.relay_only && !self.is_inside(address, ctx.us),
            Via::Relay(relay) => {
                let absent = self.presence.get(&relay) == Some(&false);
                ctx.is_up(via) && self.may_use(relay, ctx.us) && !absent
            }
        }
    }

    /// The best way besides the one in use: one that works, or a relay that may. A relay first if the one in use
    /// was silent for long: so was any direct one.
    pub(super) fn alternative(&self, ctx: &Context) -> Option<Via> {
        let mut others = self.usable(ctx);
        others.retain(|(via, _)| Some(*via) != self.primary);
        let relayed = |(_, path): &&(Via, &Path)| self.unsure && path.kind.is_relayed();
        let first: Vec<(Via, &Path)> = others.iter().filter(relayed).copied().collect();
        let best = choose(&first, None).or_else(|| choose(&others, None));
        best.or_else(|| {
            let relays = self.relays_up(ctx.us).into_iter().map(Via::Relay);
            relays
                .filter(|via| Some(*via) != self.primary)
                .find(|&via| self.is_there(via, ctx))
        })
    }

    /// Puts the traffic on `primary`, and says so.
    pub(super) fn set_primary(
        &mut self,
        primary: Option<Via>,
        duplicate: Option<Via>,
        ctx: &mut Context,
    ) {
        if primary != self.primary {
            self.unsure = false;
            if let Some(old) = self.primary.and_then(|via| self.paths.get_mut(&via)) {
                old.happen(PathEvent::Left, ctx.now);
            }
        }
        if let Some(via) = primary {
            let kind = match via {
                Via::Direct(_) => PathKind::Direct,
                Via::Relay(relay) => ctx.us.kind_of_relay(relay),
            };
            let path = self
                .paths
                .entry(via)
                .or_insert_with(|| Path::new(kind, None));
            if self.primary != primary {
                path.happen(PathEvent::Taken, ctx.now);
            }
            let doubtful = self.watch.suspect_since().is_some();
            let event = if doubtful {
                PathEvent::Doubted
            } else {
                PathEvent::Cleared
            };
            path.happen(event, ctx.now);
        }
        // After a move the other end only has to notice. What is in doubt is doubled until it is not.
        let moves = primary != self.primary;
        let keeps_old = moves && duplicate == self.primary;
        let max = duplicate.filter(|_| keeps_old).map(|_| DUPLICATES_MAX);
        self.primary = primary;
        self.duplicate_until = None;
        self.say_path((duplicate, max), moves, ctx);
        self.forget_forbidden(ctx.now);
        self.remember(ctx);
    }

    fn say_path(&mut self, duplicates: (Option<Via>, Option<u32>), moves: bool, ctx: &mut Context) {
        let before = (self.duplicate, self.duplicates_max);
        if !moves && duplicates == before {
            return;
        }
        (self.duplicate, self.duplicates_max) = duplicates;
        ctx.out.push_back(Output::SetPath {
            peer: self.known.id,
            primary: self.primary,
            duplicate: self.duplicate,
            duplicates_max: self.duplicates_max,
        });
    }

    pub(super) fn end_duplicate(&mut self, ctx: &mut Context) {
        if self.duplicate_until.is_some_and(|until| ctx.now >= until) {
            self.drop_duplicate(ctx);
            self.forget_forbidden(ctx.now);
        }
    }

    pub(super) fn drop_duplicate(&mut self, ctx: &mut Context) {
        self.duplicate_until = None;
        self.say_path((None, None), false, ctx);
    }

    /// Gives the packets of a path that was silent for long a second way, but not all of them.
    pub(super) fn cover_unsure(&mut self, ctx: &mut Context) {
        if self.unsure && self.duplicate_until.is_none() {
            let other = self.alternative(ctx).filter(|_| !self.costs());
            let max = other.map(|_| UNSURE_DUPLICATES_MAX);
            self.say_path((other, max), false, ctx);
        }
    }

    /// Keeps what will help after a reboot without anybody to ask.
    fn remember(&mut self, ctx: &mut Context) {
        let Some(Via::Direct(address)) = self.primary else {
            return;
        };
        let works = self.paths.iter().filter_map(|(via, path)| match via {
            Via::Direct(address) if path.usable() => Some(*address),
            Via::Direct(_) | Via::Relay(_) => None,
        });
        let near = self
            .remote
            .candidates
            .iter()
            .filter(|told| self.known.same_site && told.kind == CandidateKind::Host);
        let near = near.map(|told| canonical(told.address));
        let all = std::iter::once(address).chain(works).chain(near);
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for address in all.chain(self.remembered.iter().copied()) {
            if !addresses.contains(&address) && addresses.len() < REMEMBERED_MAX {
                addresses.push(address);
            }
        }
        if addresses != self.remembered {
            self.remembered.clone_from(&addresses);
            let peer = self.known.id;
            ctx.event(Event::Remember { peer, addresses });
        }
    }

    // Relays.

    /// How far the peer is through a relay, as far as both ends know: the sum.
    fn sum_by(&self, relay: &RelayId, us: &Us) -> Option<Duration> {
        let theirs = self.remote.relay_rtts.get(relay)?;
        us.relay_rtts.get(relay).map(|ours| *ours + *theirs)
    }

    /// Sees to it that there is a link to the relay by which the two are nearest (`paths.md`), if that
    /// is worth a move. The peer comes to the same conclusion; who is measured there moves.
    pub(super) fn seek_nearer_relay(&self, ctx: &mut Context) {
        let Some(in_use) = self.relay_in_use() else {
            return;
        };
        let hopeful = |relay: &&RelayId| !ctx.us.hopeless_relays.contains(relay);
        let tier = ctx.us.kind_of_relay(in_use);
        let all = ctx.us.relays.iter().chain(&self.known.relays);
        let sums = all.filter(hopeful);
        let sums = sums.filter(|relay| ctx.us.kind_of_relay(**relay) <= tier);
        let sums = sums.filter_map(|&relay| Some((self.sum_by(&relay, ctx.us)?, relay)));
        let Some((sum, best)) = sums.min() else {
            return;
        };
        let now = self.sum_by(&in_use, ctx.us);
        if best != in_use && now.is_none_or(|now| is_nearer(sum, now)) {
            ctx.wishes.push(RelayWish::Visit(best));
        }
    }

    /// Looks for the peer at the relays that are nodes at its site, if it is reached by others.
    pub(super) fn seek_peer_relay(&self, ctx: &mut Context) {
        let in_use = self.relay_in_use().map(|relay| ctx.us.kind_of_relay(relay));
        if in_use != Some(PathKind::Relay) || self.costs() {
            return;
        }
        let may_be_there = |relay: &&RelayId| {
            ctx.us.kind_of_relay(**relay) == PathKind::PeerRelay
                && self.presence.get(relay) != Some(&false)
                && !ctx.us.hopeless_relays.contains(relay)
        };
        let visits = self.known.relays.iter().filter(may_be_there);
        let visits = visits
            .take(PEER_RELAYS)
            .map(|&relay| RelayWish::Visit(relay));
        ctx.wishes.extend(visits);
    }

    pub(crate) fn on_relay_up(&mut self, relay: RelayId, ctx: &mut Context) {
        if !self.may_use(relay, ctx.us) {
            return;
        }
        self.presence.remove(&relay);
        let peer = self.known.id;
        match self.phase {
            Phase::Idle => {}
            Phase::Waking(_) | Phase::Unreachable(_) => {
                ctx.out.push_back(Output::FindPeer { relay, peer });
                self.call_anew(ctx);
            }
            Phase::Up if self.known.plain => {}
            Phase::Up => {
                self.add_relay_paths(ctx);
                self.send_due_probes(ctx);
                self.cover(ctx);
            }
        }
    }

    pub(crate) fn on_relay_down(&mut self, relay: RelayId, ctx: &mut Context) {
        self.presence.remove(&relay);
        let via = Via::Relay(relay);
        self.forget_path(via, ctx.now);
        if self.primary == Some(via) {
            self.move_off(Reason::LinkDown, ctx);
        } else if self.duplicate == Some(via) {
            self.drop_duplicate(ctx);
            self.cover(ctx);
        }
    }

    pub(crate) fn on_relay_peer(&mut self, relay: RelayId, present: bool, ctx: &mut Context) {
        let via = Via::Relay(relay);
        let before = self.presence.insert(relay, present);
        if matches!(self.phase, Phase::Unreachable(_)) && self.reason != Reason::Goodbye {
            self.reason = self.why_unreachable(ctx);
        }
        match (&self.phase, present) {
            (Phase::Idle, _) => {}
            // Otherwise the last call went there already, in the hope of this answer. Sending it
            // again would make a second session before the first is complete.
            (Phase::Waking(_) | Phase::Unreachable(_), true) if before != Some(false) => {}
            (Phase::Waking(_) | Phase::Unreachable(_), true) => self.call_anew(ctx),
            (Phase::Waking(_) | Phase::Unreachable(_), false) => self.visit_relays(ctx),
            (Phase::Up, true) => {
                self.add_relay_paths(ctx);
                if self.primary == Some(via) && before == Some(false) {
                    self.echo(via, ctx);
                }
                self.send_due_probes(ctx);
            }
            (Phase::Up, false) if self.primary == Some(via) => {
                self.move_off(Reason::PeerOffline, ctx);
            }
            (Phase::Up, false) => {
                self.forget_path(via, ctx.now);
                self.cover(ctx);
                self.visit_relays(ctx);
            }
        }
    }

    /// A relay will stop soon: its peers move while both still work.
    pub(crate) fn on_relay_leaving(&mut self, relay: RelayId, ctx: &mut Context) {
        if self.primary == Some(Via::Relay(relay))
            && let Some(other) = self.alternative(ctx)
        {
            let old = self.primary;
            self.set_primary(Some(other), old, ctx);
            self.duplicate_until = Some(ctx.now + DUPLICATE);
            self.publish_up(Reason::LinkDown, ctx);
        }
    }

    /// The relay in use does not reach the peer any more.
    pub(super) fn move_off(&mut self, reason: Reason, ctx: &mut Context) {
        match self.alternative(ctx) {
            Some(other) => {
                self.set_primary(Some(other), None, ctx);
                self.publish_up(reason, ctx);
                self.watch = Watch::Calm;
                self.echo(other, ctx);
                self.handle_watch(WatchInput::Sent, ctx);
            }
            None if reason == Reason::PeerOffline => self.doubt_now(reason, ctx),
            None => self.lose_link(ctx),
        }
    }

    pub(super) fn doubt_relay(&self, ctx: &mut Context) {
        if let Some(relay) = self.relay_in_use() {
            let peer = self.known.id;
            ctx.out.push_back(Output::FindPeer { relay, peer });
            ctx.wishes.push(RelayWish::Doubt(relay));
        }
    }

    fn is_worth_trying(&self, address: SocketAddr, us: &Us) -> bool {
        let ip = address.ip();
        let link_local = matches!(ip, std::net::IpAddr::V6(ip) if ip.is_unicast_link_local());
        address.port() != 0
            && !ip.is_unspecified()
            && !ip.is_multicast()
            && !link_local
            && !us.local.contains(&address)
            && has_family(&us.local, address)
            && !self.is_inside(address, us)
    }

    /// Whether the way there is the tunnel. What is behind another node may be the LAN of both.
    fn is_inside(&self, address: SocketAddr, us: &Us) -> bool {
        let ip = canonical(address).ip();
        us.inside.is_overlay(ip) || !self.known.same_site && us.inside.is_behind_another(ip)
    }
}
