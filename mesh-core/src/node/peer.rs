//! One peer: its state machine.
//!
//! This file holds the inputs and the four phases. How paths come and go is in `paths`, how they
//! are probed and used in `traffic`, the words for people in `why`.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use mesh_wire::{
    id::{NodeId, NodeName, RelayId, Via},
    peer::{Candidate, ECHO_MAX, NatKind, PeerMessage},
};
use rand::RngExt;

use crate::{
    io::{CLOCK_SKEW_MIN, Event, Output, PeerState, Reason, TRAFFIC_TICK_MS},
    node::{
        context::{Context, RelayWish, Us},
        machine::{Changes, PathChange, PathEvent, PeerEvent},
        path::{Path, PathKind, PathState},
        relays::PEER_RELAYS,
        report::TransitionCounts,
        watch::{Watch, WatchInput},
    },
};

use burst::Burst;
use keepalive::Keepalive;

mod burst;
mod keepalive;
mod paths;
mod traffic;
mod why;

/// Gaps between handshake initiations; the last one repeats (`paths.md`).
const LADDER: [Duration; 8] = [
    Duration::from_millis(50),
    Duration::from_millis(50),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(800),
    Duration::from_millis(1600),
];

/// From this rung of the ladder on, every second initiation goes by relays only: of one that
/// goes by every way the peer answers only the first copy, and if that way does not carry the
/// answer back, nothing else would ever be tried.
const RELAY_ONLY_FROM: usize = 5;

/// The rung at which the ladder waits while a session that exists is being confirmed.
const CONFIRM_RUNG: usize = 5;

/// After this a wake has failed (`paths.md`).
const GIVE_UP: Duration = Duration::from_secs(20);

/// After this without an answer new flows had better go elsewhere, though the wake goes on.
const WAKE_DOUBT: Duration = Duration::from_secs(3);

/// Gaps within one background attempt at an unreachable peer.
const BURST_GAPS: [Duration; 2] = [Duration::from_millis(200), Duration::from_millis(500)];

/// Pauses between background attempts while somebody wants the peer; the last one repeats.
const RETRY_WANTED: [Duration; 3] = [
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
];

/// Pauses while nobody does; the last one repeats.
const RETRY_UNWANTED: [Duration; 6] = [
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(8),
    Duration::from_secs(15),
    Duration::from_secs(30),
    Duration::from_secs(60),
];

/// How long somebody who wanted a peer is taken to want it still.
const WANTED_FOR: Duration = Duration::from_secs(60);

/// Without traffic for this long a peer costs nothing any more (`lazy_idle`).
const LAZY_IDLE: Duration = Duration::from_secs(300);

/// Packets that were on their way when a peer said goodbye do not bring it back.
const GOODBYE_GRACE: Duration = Duration::from_secs(1);

/// Relays of a peer's that are looked for it at, besides [`PEER_RELAYS`].
const VISITS_MAX: usize = 2;

/// A peer whose initiation was refused is called back no more often than this: who has recorded an old
/// one can have it refused as often as it likes, and gets 300 bytes a second for it. Rarer would take
/// long where packets are lost.
const CALL_BACK_EVERY: Duration = Duration::from_millis(500);

/// How long a refused initiation is a reason.
const REFUSED_FOR: Duration = Duration::from_secs(60);

/// Addresses kept of a peer for the next boot.
pub(crate) const REMEMBERED_MAX: usize = 8;

/// Where in its life a peer is.
#[derive(Debug)]
enum Phase {
    /// Nothing is asked of it.
    Idle,
    /// Handshakes go out.
    Waking(Ladder),
    /// There is a path.
    Up,
    /// Given up, tried now and then.
    Unreachable(Retry),
}

#[derive(Debug)]
struct Ladder {
    since: Instant,
    rung: usize,
    next: Instant,
}

#[derive(Debug)]
struct Retry {
    since: Instant,
    failures: usize,
    /// Initiations sent in the attempt that is going on.
    sent: usize,
    next: Instant,
}

/// What the peer told of itself.
#[derive(Debug, Default)]
struct Remote {
    generation: Option<u64>,
    candidates: Vec<Candidate>,
    nat: NatKind,
    /// How far it is from relays.
    relay_rtts: BTreeMap<RelayId, Duration>,
    /// What it sends costs it.
    metered: bool,
    /// It takes part in bursts.
    bursts: bool,
}

/// The search for a direct path.
#[derive(Debug, Default)]
struct Search {
    began: Option<Instant>,
    /// How often the candidates were told in this round, and when they are again.
    told: usize,
    tell_at: Option<Instant>,
    failures: usize,
    retry_at: Option<Instant>,
    /// Since when there was a direct path, after the last search in vain.
    direct_since: Option<Instant>,
}

/// What the snapshot says of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) id: NodeId,
    pub(crate) name: NodeName,
    /// A WireGuard device without a core: no echoes, no candidates.
    pub(crate) plain: bool,
    pub(crate) same_site: bool,
    /// The mesh does not let the two connect directly.
    pub(crate) relay_only: bool,
    /// Addresses that the operator gave, and likely ones.
    pub(crate) addresses: Vec<SocketAddr>,
    /// Relays that serve it, in its order.
    pub(crate) relays: Vec<RelayId>,
}

/// One peer.
#[derive(Debug)]
pub(crate) struct Peer {
    known: Known,
    phase: Phase,
    state: PeerState,
    reason: Reason,
    alive: bool,
    /// A handshake completed, and nothing says that the peer forgot it.
    session: bool,
    /// A handshake completed since the node started: the two know each other's keys.
    acquainted: bool,
    /// When its initiation was last refused for its time.
    refused_at: Option<Instant>,
    paths: BTreeMap<Via, Path>,
    remembered: Vec<SocketAddr>,
    remote: Remote,
    /// Whether the peer is at a relay, as far as that relay said.
    presence: BTreeMap<RelayId, bool>,
    primary: Option<Via>,
    duplicate: Option<Via>,
    /// How many packets go by it, too; `None`: all.
    duplicates_max: Option<u32>,
    duplicate_until: Option<Instant>,
    /// The way in use was silent for so long that nobody knows whether it is still one.
    unsure: bool,
    watch: Watch,
    search: Search,
    /// A direct path that may not be used any more is used until then: no relay reaches the peer yet.
    leave_by: Option<Instant>,
    /// Last traffic, or call by the peer.
    active_at: Instant,
    /// Last data packet that went out.
    sent_at: Option<Instant>,
    wanted_at: Option<Instant>,
    heartbeat_at: Instant,
    /// When the peer's packets last came by another way than the silent one in use.
    hint_at: Option<Instant>,
    check_at: Option<Instant>,
    checks: u32,
    keepalive: Keepalive,
    burst: Burst,
    /// What goes out costs, as this peer last heard.
    metered: bool,
    changes: Changes,
    /// Under which time the node has this peer in its timer queue.
    pub(crate) timer: Option<Instant>,
}

impl Peer {
    pub(crate) fn new(known: Known, remembered: Vec<SocketAddr>, now: Instant) -> Self {
        Self {
            known,
            phase: Phase::Idle,
            state: PeerState::Idle,
            reason: Reason::LazyIdle,
            alive: true,
            session: false,
            acquainted: false,
            refused_at: None,
            paths: BTreeMap::new(),
            remembered,
            remote: Remote::default(),
            presence: BTreeMap::new(),
            primary: None,
            duplicate: None,
            duplicates_max: None,
            duplicate_until: None,
            unsure: false,
            watch: Watch::Calm,
            search: Search::default(),
            leave_by: None,
            active_at: now,
            sent_at: None,
            wanted_at: None,
            heartbeat_at: now,
            hint_at: None,
            check_at: None,
            checks: 0,
            keepalive: Keepalive::default(),
            burst: Burst::default(),
            metered: false,
            changes: Changes::default(),
            timer: None,
        }
    }

    pub(crate) fn known(&self) -> &Known {
        &self.known
    }

    pub(crate) fn set_known(&mut self, known: Known) {
        if self.known.relay_only && !known.relay_only {
            self.search = Search::default(); // One begins with the snapshot.
        }
        self.known = known;
    }

    pub(crate) fn is_alive(&self) -> bool {
        self.alive
    }

    pub(crate) fn set_metered(&mut self, metered: bool) {
        self.metered = metered;
    }

    pub(crate) fn is_idle(&self) -> bool {
        matches!(self.phase, Phase::Idle)
    }

    /// Whether its way in use is in doubt, or gone.
    pub(crate) fn is_suspect(&self) -> bool {
        matches!(self.state, PeerState::Suspect | PeerState::Waking)
    }

    /// Whether there is a session in use.
    pub(crate) fn is_up(&self) -> bool {
        matches!(self.phase, Phase::Up)
    }

    /// The relay that its traffic goes through.
    pub(crate) fn relay_in_use(&self) -> Option<RelayId> {
        match self.primary? {
            Via::Relay(relay) => Some(relay),
            Via::Direct(_) => None,
        }
    }

    /// The way of its traffic.
    pub(crate) fn way_in_use(&self) -> Option<Via> {
        self.primary
    }

    /// Takes note of what happened to the paths. Returns what was counted since the last time.
    pub(crate) fn take_counts(&mut self) -> TransitionCounts {
        let paths = self.paths.iter_mut();
        let changes: Vec<(Via, PathChange)> = paths
            .flat_map(|(&via, path)| path.take_changes().into_iter().map(move |one| (via, one)))
            .collect();
        for (via, change) in changes {
            self.changes.note_path(via, change);
        }
        std::mem::take(&mut self.changes.counts)
    }

    /// Forgets a path, but not that it was there.
    fn forget_path(&mut self, via: Via, now: Instant) {
        if let Some(mut path) = self.paths.remove(&via) {
            path.happen(PathEvent::Gone, now);
            for change in path.take_changes() {
                self.changes.note_path(via, change);
            }
        }
    }

    // Inputs.

    /// The node's own network is another one: every path has to prove itself again.
    pub(crate) fn on_network_change(&mut self, moved: bool, ctx: &mut Context) {
        self.paths.values_mut().for_each(Path::unbar);
        if moved {
            self.keepalive = Keepalive::default(); // Behind another NAT.
        }
        match &mut self.phase {
            Phase::Idle => {}
            Phase::Waking(_) | Phase::Unreachable(_) => self.call_anew(ctx),
            Phase::Up if self.known.plain => {}
            Phase::Up => {
                if moved && self.watch.suspect_since().is_none() {
                    self.doubt_now(Reason::LinkDown, ctx);
                } else {
                    self.probe_all(ctx);
                    self.handle_watch(WatchInput::Sent, ctx);
                }
                self.start_search(ctx);
            }
        }
    }

    /// The peer is on this LAN, at `address`.
    pub(crate) fn on_neighbour(&mut self, address: SocketAddr, ctx: &mut Context) {
        let new = self.remembered.first() != Some(&address);
        self.remembered.retain(|known| *known != address);
        self.remembered.insert(0, address);
        self.remembered.truncate(REMEMBERED_MAX);
        match self.phase {
            Phase::Idle => {}
            Phase::Waking(_) | Phase::Unreachable(_) if new => self.call_anew(ctx),
            Phase::Up if new => self.start_search(ctx),
            Phase::Waking(_) | Phase::Unreachable(_) | Phase::Up => {}
        }
    }

    pub(crate) fn on_wanted(&mut self, ctx: &mut Context) {
        self.wanted_at = Some(ctx.now);
        self.active_at = ctx.now;
        match &mut self.phase {
            Phase::Idle => self.wake(PeerEvent::Called, Reason::Wanted, ctx),
            Phase::Unreachable(retry) if retry.sent == 0 => {
                // Not more often than the shortest pause, however many packets wait.
                retry.next = retry.next.min(ctx.now + RETRY_WANTED[0]);
            }
            // The shell asks before it has seen the path.
            Phase::Waking(_) | Phase::Up | Phase::Unreachable(_) => {}
        }
    }

    pub(crate) fn on_handshake(&mut self, via: Via, ctx: &mut Context) {
        (self.session, self.acquainted) = (true, true);
        self.refused_at = None;
        self.remote.generation = None; // The peer may have started anew, and count from 1 again.
        self.learn_path(via, ctx);
        self.note_received(via, ctx);
        match self.phase {
            Phase::Idle => {
                self.active_at = ctx.now;
                self.answered(via, Reason::PeerCalled, ctx);
            }
            Phase::Waking(_) | Phase::Unreachable(_) => {
                self.active_at = ctx.now;
                self.answered(via, Reason::HandshakeDone, ctx);
            }
            Phase::Up if self.known.plain => self.come_up(via, Reason::HandshakeDone, ctx),
            Phase::Up => {}
        }
    }

    pub(crate) fn on_message(&mut self, via: Via, message: PeerMessage, ctx: &mut Context) {
        self.learn_path(via, ctx);
        match message {
            PeerMessage::EchoRequest { txid, size_bytes } => {
                self.answer_echo(via, txid, size_bytes.min(ECHO_MAX), ctx);
            }
            PeerMessage::EchoReply {
                txid,
                size_bytes,
                observed,
            } => self.on_echo_reply(via, (txid, size_bytes, observed), ctx),
            PeerMessage::Candidates {
                generation,
                candidates,
                nat,
                relays,
                metered,
                bursts,
            } => {
                if matches!(self.phase, Phase::Idle) {
                    self.active_at = ctx.now;
                    self.session = true;
                    self.answered(via, Reason::PeerCalled, ctx);
                }
                (self.remote.metered, self.remote.bursts) = (metered, bursts);
                self.remote.relay_rtts = relays.into_iter().collect();
                self.on_candidates(generation, candidates, nat, ctx);
            }
            PeerMessage::GuessPorts => self.begin_to_guess(ctx),
            PeerMessage::Goodbye => return self.on_goodbye(ctx),
        }
        self.received(via, ctx);
    }

    /// Its initiation was refused as older than one before: its clock went back, and it cannot call. It
    /// can be called. Once, by the way it came: what was recorded of it could be sent by anybody.
    pub(crate) fn on_refused(&mut self, via: Via, behind: Duration, ctx: &mut Context) {
        if behind < CLOCK_SKEW_MIN {
            return; // Overtaken.
        }
        let recent = |at: Instant| ctx.now < at + CALL_BACK_EVERY;
        if !self.refused_at.is_some_and(recent) {
            self.refused_at = Some(ctx.now);
            self.call_back(via, ctx);
        }
    }

    /// Calls it once, without waiting for it.
    pub(crate) fn call_back(&self, via: Via, ctx: &mut Context) {
        if !self.is_up() && !self.is_forbidden(via) {
            let (peer, vias) = (self.known.id, vec![via]);
            ctx.out.push_back(Output::Handshake { peer, vias });
        }
    }

    pub(crate) fn on_traffic(&mut self, sent: bool, received: &[Via], ctx: &mut Context) {
        // What came in before the network changed proves nothing about it now.
        let tick = Duration::from_millis(TRAFFIC_TICK_MS);
        let since = self.watch.suspect_since();
        let stale = since.is_some_and(|at| ctx.now < at + tick);
        for &via in received.iter().filter(|_| !stale) {
            self.learn_path(via, ctx);
            self.received(via, ctx);
        }
        if sent {
            self.on_sent(received, ctx);
        }
    }

    pub(crate) fn on_timeout(&mut self, ctx: &mut Context) {
        self.end_duplicate(ctx);
        if self.is_up() {
            self.handle_watch(WatchInput::Timeout, ctx);
        }
        match &self.phase {
            Phase::Idle => {}
            Phase::Waking(ladder) if ctx.now >= ladder.since + GIVE_UP => self.give_up(ctx),
            Phase::Waking(_) => self.climb(ctx),
            Phase::Up => self.tend(ctx),
            Phase::Unreachable(_) => self.retry(ctx),
        }
        self.send_due_probes(ctx);
        self.guess(ctx);
        self.end_search_round(ctx);
    }

    /// When [`Self::on_timeout`] has something to do.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let phase = match &self.phase {
            Phase::Idle => return None,
            Phase::Waking(ladder) => Some(self.doubt_at(ladder).min(ladder.next)),
            Phase::Up => self.up_deadline(),
            Phase::Unreachable(retry) => Some(retry.next),
        };
        let probes = self.paths.values().filter_map(Path::deadline).min();
        let probes = probes.filter(|_| self.session);
        [phase, probes, self.duplicate_until]
            .into_iter()
            .flatten()
            .min()
    }

    // Phases.

    /// Begins to call the peer.
    fn wake(&mut self, called: PeerEvent, reason: Reason, ctx: &mut Context) {
        let (since, next) = (ctx.now, ctx.now);
        self.phase = Phase::Waking(Ladder {
            since,
            rung: 0,
            next,
        });
        self.publish(called, reason, ctx);
        for relay in self.relays_up(ctx.us) {
            let peer = self.known.id;
            ctx.out.push_back(Output::FindPeer { relay, peer });
        }
        self.climb(ctx);
    }

    fn climb(&mut self, ctx: &mut Context) {
        let Phase::Waking(ladder) = &mut self.phase else {
            return;
        };
        let since = ladder.since;
        if ctx.now >= ladder.next {
            let rung = ladder.rung;
            ladder.rung += 1;
            // A stock WireGuard responder keeps one new session: it must not be hurried.
            let step = if self.known.plain { LADDER.len() } else { rung };
            let gap = LADDER.get(step).or(LADDER.last()).copied();
            ladder.next = ctx.now + gap.unwrap_or(WAKE_DOUBT);
            let late = rung >= RELAY_ONLY_FROM;
            self.call(late && rung % 2 == 1, ctx);
            if late {
                self.call_again_if_by_one_way(ctx);
            }
            if rung >= RELAY_ONLY_FROM {
                self.ask_absent_relays_again(ctx);
            }
        }
        if ctx.now >= since + WAKE_DOUBT {
            self.set_alive(false, ctx);
        }
    }

    /// There is a new way to the peer: calls as eagerly as at first.
    fn call_anew(&mut self, ctx: &mut Context) {
        match &mut self.phase {
            Phase::Waking(ladder) => {
                (ladder.rung, ladder.next) = (0, ctx.now);
                self.climb(ctx);
            }
            Phase::Unreachable(retry) => {
                (retry.sent, retry.next) = (0, ctx.now);
                self.retry(ctx);
            }
            Phase::Idle | Phase::Up => {}
        }
    }

    fn doubt_at(&self, ladder: &Ladder) -> Instant {
        let doubt = self.alive.then(|| ladder.since + WAKE_DOUBT);
        let give_up = ladder.since + GIVE_UP;
        doubt.map_or(give_up, |doubt| doubt.min(give_up))
    }

    /// Sends one handshake initiation by every way that may work.
    fn call(&mut self, by_relays_only: bool, ctx: &mut Context) {
        self.visit_relays(ctx);
        let here = |relay: &RelayId| self.presence.get(relay) != Some(&false);
        let relays = self.relays_up(ctx.us).into_iter();
        let mut vias: Vec<Via> = relays.filter(here).map(Via::Relay).collect();
        if !by_relays_only || vias.is_empty() {
            let direct = self.addresses_to_call(ctx.us);
            vias.splice(0..0, direct.into_iter().map(Via::Direct));
        }
        if !vias.is_empty() {
            let peer = self.known.id;
            ctx.out.push_back(Output::Handshake { peer, vias });
        }
    }

    /// The last call went by a single way, and the next one is far: a copy halves what loss can do. The peer
    /// answers one of the two.
    fn call_again_if_by_one_way(&self, ctx: &mut Context) {
        let last = ctx.out.back_mut();
        if let Some(Output::Handshake { peer, vias }) = last
            && *peer == self.known.id
            && let [only] = vias[..]
        {
            vias.push(only);
        }
    }

    /// Asks for links to the relays where the peer should be.
    fn visit_relays(&self, ctx: &mut Context) {
        if self.known.plain {
            return;
        }
        let may_be_there = |relay: &RelayId| {
            self.presence.get(relay) != Some(&false) && !ctx.us.hopeless_relays.contains(relay)
        };
        let is_node = |relay: &RelayId| ctx.us.peer_relays.contains(relay);
        let theirs = || self.known.relays.iter().copied().filter(may_be_there);
        let apart = theirs().filter(|relay| !is_node(relay)).take(VISITS_MAX);
        let visits = apart.chain(theirs().filter(is_node).take(PEER_RELAYS));
        // And where it was at home when it last said so.
        let told = self.remote.relay_rtts.iter();
        let home = told.min_by_key(|(_, rtt)| **rtt).map(|(&relay, _)| relay);
        let home = home.filter(|home| self.may_use(*home, ctx.us) && may_be_there(home));
        let visits = home.into_iter().chain(visits);
        let visits: Vec<RelayWish> = visits.map(RelayWish::Visit).collect();
        ctx.wishes.extend(visits);
    }

    /// Whether one of the two is at home there.
    fn may_use(&self, relay: RelayId, us: &Us) -> bool {
        us.relays.contains(&relay) || self.known.relays.contains(&relay)
    }

    /// Relays with a link that may carry something to it.
    fn relays_up(&self, us: &Us) -> Vec<RelayId> {
        let up = us.relays_up.iter().copied();
        up.filter(|relay| self.may_use(*relay, us)).collect()
    }

    fn ask_absent_relays_again(&self, ctx: &mut Context) {
        for relay in self.relays_up(ctx.us) {
            if self.presence.get(&relay) == Some(&false) {
                let peer = self.known.id;
                ctx.out.push_back(Output::FindPeer { relay, peer });
            }
        }
    }

    /// The peer answered, or called, by `via`, and no path is in use.
    fn answered(&mut self, via: Via, reason: Reason, ctx: &mut Context) {
        if self.is_forbidden(via) {
            // It has not heard yet that this way is closed: it is called by relays.
            return match self.phase {
                Phase::Idle => self.wake(PeerEvent::Called, reason, ctx),
                Phase::Unreachable(_) => self.call_anew(ctx),
                Phase::Waking(_) | Phase::Up => {}
            };
        }
        if self.known.plain || matches!(via, Via::Relay(_)) {
            return self.come_up(via, reason, ctx);
        }
        // A direct way carries traffic when full-size packets have passed, not before. A relay
        // may be faster to answer.
        if let Some(path) = self.paths.get_mut(&via) {
            path.start_probing(ctx.now);
            path.small_ok = true;
        }
        let next = ctx.now + LADDER[CONFIRM_RUNG];
        match &mut self.phase {
            Phase::Waking(ladder) => {
                ladder.next = next;
                ladder.rung = ladder.rung.max(CONFIRM_RUNG);
            }
            Phase::Idle | Phase::Up | Phase::Unreachable(_) => {
                let (since, rung) = (ctx.now, CONFIRM_RUNG);
                self.phase = Phase::Waking(Ladder { since, rung, next });
                self.publish(PeerEvent::Called, reason, ctx);
            }
        }
        self.send_due_probes(ctx);
    }

    /// There is a path: `via`.
    fn come_up(&mut self, via: Via, reason: Reason, ctx: &mut Context) {
        let called = matches!(self.phase, Phase::Idle);
        self.phase = Phase::Up;
        self.watch = Watch::Calm;
        self.heartbeat_at = ctx.now;
        self.check_at = Some(ctx.now + traffic::FIRST_CHECK);
        self.set_primary(Some(via), None, ctx);
        self.set_alive(true, ctx);
        self.publish_up(reason, ctx);
        self.search = Search::default();
        if self.known.plain {
            return;
        }
        self.add_relay_paths(ctx);
        if called {
            // Only the caller's next packet lets WireGuard's responder send.
            self.search.retry_at = Some(ctx.now + traffic::RESPONDER_DELAY);
        } else {
            self.start_search(ctx);
        }
    }

    /// No way works any more.
    fn lose(&mut self, reason: Reason, ctx: &mut Context) {
        self.drop_paths(ctx);
        self.set_alive(false, ctx);
        self.wake(PeerEvent::Lost, reason, ctx);
    }

    /// The link under the only way is gone; the peer itself may well be there.
    fn lose_link(&mut self, ctx: &mut Context) {
        self.drop_paths(ctx);
        self.wake(PeerEvent::Lost, Reason::LinkDown, ctx);
    }

    fn drop_paths(&mut self, ctx: &mut Context) {
        self.watch = Watch::Calm;
        self.leave_by = None;
        for path in self.paths.values_mut() {
            path.happen(PathEvent::Gone, ctx.now);
        }
        self.set_primary(None, None, ctx);
    }

    fn give_up(&mut self, ctx: &mut Context) {
        let reason = self.why_unreachable(ctx);
        let (since, next) = (ctx.now, ctx.now + RETRY_WANTED[0]);
        let (failures, sent) = (0, 0);
        self.phase = Phase::Unreachable(Retry {
            since,
            failures,
            sent,
            next,
        });
        self.set_alive(false, ctx);
        self.publish(PeerEvent::GivenUp, reason, ctx);
    }

    fn on_goodbye(&mut self, ctx: &mut Context) {
        if matches!(self.phase, Phase::Idle) {
            self.session = false; // Nobody here needs it: the next packet will call it.
            return;
        }
        self.drop_paths(ctx);
        self.session = false;
        let (since, next) = (ctx.now, ctx.now + GOODBYE_GRACE);
        let (failures, sent) = (0, 0);
        self.phase = Phase::Unreachable(Retry {
            since,
            failures,
            sent,
            next,
        });
        self.set_alive(false, ctx);
        self.publish(PeerEvent::SaidGoodbye, Reason::Goodbye, ctx);
    }

    fn retry(&mut self, ctx: &mut Context) {
        let wanted = self.wanted_at.is_some_and(|at| ctx.now < at + WANTED_FOR);
        if ctx.us.metered && !wanted {
            return self.go_idle(ctx); // Whoever wants it next calls it.
        }
        let Phase::Unreachable(retry) = &mut self.phase else {
            return;
        };
        if ctx.now < retry.next {
            return;
        }
        if retry.sent == 0 && !ctx.calls.take(ctx.now) {
            retry.next = ctx.now + RETRY_WANTED[0]; // Others are being tried.
            return;
        }
        if let Some(&gap) = BURST_GAPS.get(retry.sent) {
            retry.sent += 1;
            retry.next = ctx.now + gap;
        } else {
            let pauses: &[Duration] = if wanted {
                &RETRY_WANTED
            } else {
                &RETRY_UNWANTED
            };
            let pause = pauses.get(retry.failures).or(pauses.last());
            let pause = pause.copied().unwrap_or(GIVE_UP);
            retry.sent = 0;
            retry.failures += 1;
            retry.next = ctx.now + pause.mul_f64(ctx.dice.random_range(0.75..1.0));
            self.ask_absent_relays_again(ctx);
        }
        self.call(false, ctx);
    }

    /// Lets go of everything that costs.
    fn go_idle(&mut self, ctx: &mut Context) {
        self.set_alive(true, ctx); // Nobody will settle a doubt that there may be.
        self.watch = Watch::Calm;
        self.set_primary(None, None, ctx);
        let vias: Vec<Via> = self.paths.keys().copied().collect();
        vias.into_iter()
            .for_each(|via| self.forget_path(via, ctx.now));
        self.presence.clear();
        self.search = Search::default();
        self.leave_by = None;
        self.phase = Phase::Idle;
        self.publish(PeerEvent::Unused, Reason::LazyIdle, ctx);
    }

    // What others see.

    fn set_alive(&mut self, alive: bool, ctx: &mut Context) {
        if self.alive != alive {
            self.alive = alive;
            let peer = self.known.id;
            ctx.event(Event::Liveness { peer, alive });
        }
    }

    fn publish_up(&mut self, reason: Reason, ctx: &mut Context) {
        let event = match self.primary {
            Some(Via::Direct(_)) => PeerEvent::OnDirect,
            Some(Via::Relay(_)) | None => PeerEvent::OnRelay,
        };
        self.publish(event, reason, ctx);
    }

    /// Something happened: the state is what the table says, and whoever looks is told.
    fn publish(&mut self, event: PeerEvent, reason: Reason, ctx: &mut Context) {
        self.reason = reason;
        let Some(to) = self.state.after(event) else {
            return;
        };
        let from = std::mem::replace(&mut self.state, to);
        if to == PeerState::Direct {
            self.search.direct_since.get_or_insert(ctx.now);
        }
        self.changes.note_peer(ctx.now, (from, to), reason);
        let peer = self.known.id;
        ctx.event(Event::Peer {
            peer,
            from,
            to,
            reason,
        });
    }
}
