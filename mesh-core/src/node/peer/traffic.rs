//! Echoes, heartbeats and the watch over the path in use.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use mesh_wire::{id::Via, peer::PeerMessage};
use rand::RngExt;

use super::{GOODBYE_GRACE, LAZY_IDLE, Path, PathKind, PathState, Peer, Phase, Reason};
use crate::node::{
    context::{Context, RelayWish},
    machine::{PathEvent, PeerEvent},
    watch::{DEAD_AFTER_MIN, FAST_PROBE_GAPS, Pace, SUSPECT_PROBE_GAP, Verdict, Watch, WatchInput},
};

/// How long after traffic a path is kept warm (`paths.md`).
const WARM_FOR: Duration = Duration::from_secs(45);

/// Heartbeat of a warm path by which nothing came in (`paths.md`).
const HEARTBEAT: Duration = Duration::from_secs(3);

/// After so long a silence of a direct path nobody knows whether a NAT has forgotten it: the shortest that
/// keepalives are made for (`keepalive::LEAST`). A path in use is never silent for as long, it has its heartbeat.
const UNSURE_AFTER: Duration = Duration::from_secs(10);

/// How often the standbys are measured, and the path in use at least.
const CHECK: Duration = Duration::from_secs(15);

/// How often a direct path in use is measured while there is traffic, so that a loss is noticed: 10 %
/// within a minute. 26 bytes/s for each peer in use.
const CHECK_DIRECT: Duration = Duration::from_secs(5);

/// Every so many of those come the standbys' turn.
const CHECK_STANDBYS: u32 = 3;

/// The same while a direct path in use loses echoes: the 64 that a verdict takes are there in half
/// a minute. Two ways of 130 bytes each, there and back: 1 KB/s.
const CHECK_LOSING: Duration = Duration::from_millis(500);

/// The first measurement after a path came into use.
pub(super) const FIRST_CHECK: Duration = Duration::from_secs(1);

/// How long the called end waits for the caller's first packet before it says anything.
pub(super) const RESPONDER_DELAY: Duration = Duration::from_millis(300);

/// A path in use that was silent for this long while the peer spoke by another one is doubted.
const HINT_SILENCE: Duration = Duration::from_millis(300);

/// Such doubt is raised no more often: two ends may well prefer different paths.
const HINT_EVERY: Duration = Duration::from_secs(10);

/// Relays, peer relays, and direct paths, measured at a time.
const CHECKED_OF_KIND_MAX: usize = 2;

/// Every so many checks a peer relay is looked for that would be better than the relay in use: five minutes.
/// The search for a direct path does so, too.
const SEEK_PEER_RELAY_EVERY: u32 = 20;

impl Peer {
    // Echoes.

    pub(super) fn answer_echo(&mut self, via: Via, txid: u64, size_bytes: u16, ctx: &mut Context) {
        if self.is_forbidden(via) {
            return; // An answer would make it a way.
        }
        let observed = match via {
            Via::Direct(address) => Some(address),
            Via::Relay(_) => None,
        };
        let reply = PeerMessage::EchoReply {
            txid,
            size_bytes,
            observed,
        };
        ctx.send(self.known.id, via, reply);
        if self.is_up()
            && let Some(path) = self.paths.get_mut(&via)
        {
            path.probe_back(ctx.now);
            self.send_due_probes(ctx);
        }
    }

    /// `reply`: which echo is answered, its size, and where the peer saw it come from.
    pub(super) fn on_echo_reply(
        &mut self,
        via: Via,
        reply: (u64, u16, Option<SocketAddr>),
        ctx: &mut Context,
    ) {
        let (txid, size_bytes, observed) = reply;
        let Some(path) = self.paths.get_mut(&via) else {
            return;
        };
        if !path.on_echo_answered(txid, size_bytes, ctx.now) {
            return; // Late by more than an echo lives, or by another way than it was asked.
        }
        let before = std::mem::replace(&mut path.observed, observed);
        if self.primary == Some(via) && matches!(via, Via::Direct(_)) {
            let moved = before.is_some() && before != observed;
            self.keepalive.on_answered(moved);
        }
        if path.full_ok || path.kind.is_relayed() {
            path.happen(PathEvent::Proven, ctx.now);
            if path.state() == PathState::Dead {
                return; // The kernel refuses to send there.
            }
            self.cover(ctx);
            self.on_path_proven(via, ctx);
        } else if path.state() == PathState::Probing {
            self.send_echo(via, true, ctx);
        }
    }

    fn on_path_proven(&mut self, via: Via, ctx: &mut Context) {
        match self.phase {
            Phase::Waking(_) | Phase::Unreachable(_) => {
                self.come_up(via, Reason::ProbeAnswered, ctx);
            }
            Phase::Up => self.select(ctx),
            Phase::Idle => {}
        }
    }

    pub(super) fn send_due_probes(&mut self, ctx: &mut Context) {
        if !self.session {
            return;
        }
        let due = |(via, path): (&Via, &mut Path)| Some((*via, path.take_due_probe(ctx.now)?));
        let due: Vec<(Via, bool)> = self.paths.iter_mut().filter_map(due).collect();
        for (via, full_size) in due {
            self.send_echo(via, full_size, ctx);
        }
    }

    /// Asks by a way that works, or did.
    pub(super) fn echo(&mut self, via: Via, ctx: &mut Context) {
        self.send_echo(via, false, ctx);
    }

    fn send_echo(&mut self, via: Via, full_size: bool, ctx: &mut Context) {
        if let Some(path) = self.paths.get_mut(&via) {
            let txid = ctx.dice.random();
            path.set_full_size(ctx.us.full_size);
            let size_bytes = if full_size { ctx.us.full_size } else { 0 };
            path.on_echo_sent(txid, size_bytes, ctx.now);
            let message = PeerMessage::EchoRequest { txid, size_bytes };
            ctx.send(self.known.id, via, message);
        }
    }

    // What comes in and goes out.

    /// Something authenticated came in by `via`.
    pub(super) fn received(&mut self, via: Via, ctx: &mut Context) {
        self.note_received(via, ctx);
        match &self.phase {
            Phase::Idle | Phase::Up => {}
            Phase::Waking(_) if !self.session => {}
            Phase::Unreachable(retry) if ctx.now < retry.since + GOODBYE_GRACE => {}
            Phase::Waking(_) | Phase::Unreachable(_) => self.came_back(via, ctx),
        }
    }

    /// A peer that was given up is heard: its session lives.
    fn came_back(&mut self, via: Via, ctx: &mut Context) {
        if self.is_forbidden(via) {
            return; // Its packets are taken; the ladder finds a relay.
        }
        let confirmed = self
            .paths
            .get(&via)
            .is_some_and(|path| !matches!(path.state(), PathState::Candidate | PathState::Dead));
        if !confirmed || matches!(via, Via::Relay(_)) {
            self.session = true;
            self.answered(via, Reason::PeerCalled, ctx);
        }
    }

    pub(super) fn note_received(&mut self, via: Via, ctx: &mut Context) {
        if let Some(path) = self.paths.get_mut(&via) {
            path.on_received(ctx.now);
        }
        if let Via::Relay(relay) = via {
            ctx.wishes.push(RelayWish::Heard(relay));
        }
        if !self.is_up() {
            return;
        }
        self.set_alive(true, ctx); // It was in doubt at most.
        if self.primary == Some(via) {
            self.become_sure(ctx);
            self.handle_watch(WatchInput::Received, ctx);
        } else if self.known.plain {
            self.set_primary(Some(via), None, ctx); // It roamed.
        } else {
            self.take_hint(via, ctx);
            self.probe_new_way(via, ctx);
        }
    }

    /// The peer's packets come by another way, and the way in use is silent: the peer may have
    /// noticed first that it is dead. What goes out takes the peer's way, too, until that is clear.
    fn take_hint(&mut self, via: Via, ctx: &mut Context) {
        let Some(primary) = self.primary.filter(|primary| *primary != via) else {
            return;
        };
        let at = self.paths.get(&primary).and_then(|path| path.received_at);
        let silent = at.is_none_or(|at| ctx.now >= at + HINT_SILENCE);
        let recent = self.hint_at.is_some_and(|at| ctx.now < at + HINT_EVERY);
        let works = self.paths.get(&via).is_some_and(Path::usable);
        if silent && works && !recent && self.duplicate.is_none() {
            self.hint_at = Some(ctx.now);
            self.set_primary(Some(primary), Some(via), ctx);
            self.duplicate_until = Some(ctx.now + DEAD_AFTER_MIN);
            self.echo(primary, ctx);
            self.handle_watch(WatchInput::Sent, ctx);
        }
    }

    /// The peer sends from an address that was not known: its NAT gave it another one.
    fn probe_new_way(&mut self, via: Via, ctx: &mut Context) {
        if let Some(path) = self.paths.get_mut(&via)
            && path.state() == PathState::Candidate
            && !path.kind.is_relayed()
        {
            path.start_probing(ctx.now);
            self.send_due_probes(ctx);
        }
    }

    pub(super) fn on_sent(&mut self, received: &[Via], ctx: &mut Context) {
        self.sent_at = Some(ctx.now);
        self.active_at = ctx.now;
        if !self.is_up() || self.known.plain {
            return;
        }
        if !self.primary.is_some_and(|via| received.contains(&via)) {
            self.handle_watch(WatchInput::Sent, ctx);
        }
        if self.check_at.is_none() {
            self.check_at = Some(ctx.now + FIRST_CHECK);
        }
        self.search_again(ctx);
    }

    // The watch over the path in use.

    fn pace(&self) -> Pace {
        let path = self.primary.and_then(|via| self.paths.get(&via));
        Pace {
            patience: path.map_or(DEAD_AFTER_MIN, Path::patience),
            probed_at: path.and_then(Path::echoed_at),
        }
    }

    pub(super) fn handle_watch(&mut self, input: WatchInput, ctx: &mut Context) {
        let since = self.watch.suspect_since();
        let (watch, verdict) = self.watch.handle(input, ctx.now, self.pace());
        self.watch = watch;
        match verdict {
            Verdict::Nothing => {}
            Verdict::Probe => self.probe_primary(ctx),
            Verdict::Doubt => {
                // "Dead" comes too late for those who could go elsewhere meanwhile.
                self.set_alive(false, ctx);
                self.on_doubt(Reason::Silent, ctx);
            }
            Verdict::ProbeAll => self.probe_all(ctx),
            Verdict::Cleared => self.on_cleared(ctx),
            Verdict::Dead => self.on_primary_dead(since.unwrap_or(ctx.now), ctx),
        }
    }

    fn probe_primary(&mut self, ctx: &mut Context) {
        if let Some(via) = self.primary {
            self.echo(via, ctx);
        }
    }

    /// The path in use may be dead: its packets take another one, too.
    fn on_doubt(&mut self, reason: Reason, ctx: &mut Context) {
        self.cover(ctx);
        self.publish(PeerEvent::Doubted, reason, ctx);
        self.doubt_relay(ctx);
        self.probe_all(ctx);
    }

    /// Gives the packets of a path that may be dead a second way as soon as there is one.
    pub(super) fn cover(&mut self, ctx: &mut Context) {
        if self.watch.suspect_since().is_none() {
            return self.cover_unsure(ctx);
        }
        let duplicate = self.alternative(ctx).or(self.duplicate);
        let found = self.duplicate.is_none() && duplicate.is_some();
        self.set_primary(self.primary, duplicate, ctx);
        if found && self.search.tell_at.is_some() {
            self.tell_candidates(ctx); // What was told by the silent way may be lost.
        }
    }

    /// When the path in use has been silent for so long that its packets go twice.
    fn unsure_due(&self) -> Option<Instant> {
        let direct = matches!(self.primary, Some(Via::Direct(_)));
        let due = direct && !self.unsure && !self.costs();
        due.then(|| self.last_heard() + UNSURE_AFTER)
    }

    /// The path in use is heard.
    fn become_sure(&mut self, ctx: &mut Context) {
        let was_unsure = std::mem::take(&mut self.unsure);
        if was_unsure && self.watch.suspect_since().is_none() && self.duplicate_until.is_none() {
            self.drop_duplicate(ctx);
        }
    }

    /// As if the path in use had been silent for long enough already.
    pub(super) fn doubt_now(&mut self, reason: Reason, ctx: &mut Context) {
        let since = ctx.now;
        let (next, dead_at) = (since + SUSPECT_PROBE_GAP, since + DEAD_AFTER_MIN);
        self.watch = Watch::Suspect {
            since,
            next,
            dead_at,
        };
        self.on_doubt(reason, ctx);
    }

    pub(super) fn probe_all(&mut self, ctx: &mut Context) {
        let mut ways: Vec<Via> = self.primary.into_iter().collect();
        ways.extend(self.standbys(ctx));
        let relays = self.relays_up(ctx.us).into_iter().map(Via::Relay);
        ways.extend(relays.filter(|&via| self.is_there(via, ctx)));
        ways.sort_unstable();
        ways.dedup();
        for via in ways {
            self.learn_path(via, ctx);
            self.echo(via, ctx);
        }
    }

    fn standbys(&self, ctx: &Context) -> Vec<Via> {
        let of_kinds = |kinds: &[PathKind]| {
            let relay = kinds.iter().all(|kind| kind.is_relayed());
            let mut ways: Vec<(Via, &Path)> = self
                .paths
                .iter()
                .filter(|(via, path)| {
                    // A relay that did not answer is asked again: nothing else would.
                    let worth = path.state() == PathState::Standby
                        || relay && path.state() == PathState::Dead;
                    worth && kinds.contains(&path.kind) && self.is_there(**via, ctx)
                })
                .map(|(&via, path)| (via, path))
                .collect();
            ways.sort_by_key(|(via, path)| (!path.usable(), path.cost(), *via));
            ways.truncate(CHECKED_OF_KIND_MAX);
            ways.into_iter().map(|(via, _)| via)
        };
        of_kinds(&[PathKind::Lan, PathKind::Direct])
            .chain(of_kinds(&[PathKind::PeerRelay]))
            .chain(of_kinds(&[PathKind::Relay]))
            .collect()
    }

    fn on_cleared(&mut self, ctx: &mut Context) {
        let primary = self.primary;
        self.set_primary(primary, None, ctx);
        self.publish_up(Reason::ProbeAnswered, ctx);
        self.select(ctx);
    }

    fn on_primary_dead(&mut self, since: Instant, ctx: &mut Context) {
        if let Some(path) = self.primary.and_then(|via| self.paths.get_mut(&via)) {
            path.happen(PathEvent::Unanswered, ctx.now);
        }
        let answers = |path: &Path| path.received_at.is_some_and(|at| at >= since);
        let mut answering: Vec<(Via, &Path)> = self
            .paths
            .iter()
            .filter(|(via, path)| path.usable() && answers(path) && self.is_there(**via, ctx))
            .map(|(&via, path)| (via, path))
            .collect();
        answering.retain(|(via, _)| Some(*via) != self.primary);
        let Some(best) = crate::node::choose::choose(&answering, None) else {
            return self.lose(Reason::Silent, ctx);
        };
        if matches!(self.primary, Some(Via::Direct(_))) {
            self.keepalive.on_dead();
        }
        self.set_primary(Some(best), None, ctx);
        self.publish_up(Reason::Silent, ctx);
    }

    // Upkeep of a peer that is up.

    pub(super) fn tend(&mut self, ctx: &mut Context) {
        if self.known.plain {
            return;
        }
        if ctx.now >= self.active_at + self.idle_after() {
            return self.go_idle(ctx);
        }
        if self.search.tell_at.is_some_and(|at| ctx.now >= at) {
            self.tell_candidates(ctx);
        }
        self.leave_forbidden(ctx);
        if !self.is_up() {
            return;
        }
        self.search_again(ctx);
        if self.heartbeat_due().is_some_and(|at| ctx.now >= at) {
            let silent_for = ctx.now.saturating_duration_since(self.last_heard());
            if silent_for >= self.keepalive.every() {
                self.keepalive.on_sent(silent_for);
            }
            self.heartbeat_at = ctx.now;
            self.probe_primary(ctx);
            self.handle_watch(WatchInput::Sent, ctx);
        }
        if self.unsure_due().is_some_and(|at| ctx.now >= at) {
            self.unsure = true;
            self.cover(ctx);
        }
        if self.check_at.is_some_and(|at| ctx.now >= at) {
            self.check(ctx);
        }
    }

    /// Begins the next search for a direct path when it is due and worth it.
    fn search_again(&mut self, ctx: &mut Context) {
        if self.retry_due().is_some_and(|at| ctx.now >= at) {
            self.start_search(ctx);
        }
    }

    /// When to search again: only for traffic, and once after having been called.
    fn retry_due(&self) -> Option<Instant> {
        let at = self.search.retry_at?;
        let first = self.search.began.is_none();
        let warm = self.sent_at.is_some_and(|sent| at <= sent + WARM_FOR);
        (first || warm).then_some(at)
    }

    fn heartbeat_due(&self) -> Option<Instant> {
        if self.costs() {
            return None;
        }
        let primary = self.primary?;
        let last = self.last_heard();
        let warm = self
            .sent_at
            .is_some_and(|at| last + HEARTBEAT <= at + WARM_FOR);
        match (warm, primary) {
            (true, _) => Some(last + HEARTBEAT),
            (false, Via::Direct(_)) => Some(last + self.keepalive.every()),
            (false, Via::Relay(_)) => None,
        }
    }

    /// When the path in use last carried something, as far as this end knows.
    fn last_heard(&self) -> Instant {
        let path = self.primary.and_then(|via| self.paths.get(&via));
        let received = path.and_then(|path| path.received_at);
        received.map_or(self.heartbeat_at, |at| at.max(self.heartbeat_at))
    }

    fn check(&mut self, ctx: &mut Context) {
        self.seek_nearer_relay(ctx);
        if self.checks.is_multiple_of(SEEK_PEER_RELAY_EVERY) {
            self.seek_peer_relay(ctx);
        }
        let warm = self.sent_at.is_some_and(|at| ctx.now < at + WARM_FOR);
        let standbys = self.standbys(ctx);
        let losing = |via: &Via| {
            let path = self.paths.get(via);
            let path = path.filter(|path| path.kind != PathKind::Relay)?;
            path.is_losing(ctx.now)
        };
        let relayed = |via: &Via| matches!(via, Via::Relay(_));
        let in_use = self.primary.iter().chain(&standbys);
        let losing = in_use.clone().filter_map(losing).max();
        let losing = losing.filter(|_| in_use.clone().any(relayed));
        let direct = matches!(self.primary, Some(Via::Direct(_)));
        let pause = match losing {
            _ if self.costs() => CHECK,
            Some(true) => CHECK_LOSING,
            Some(false) => CHECK_DIRECT,
            None if direct => CHECK_DIRECT,
            None => CHECK,
        };
        // Where it costs, only for as long as there is traffic.
        let last = ctx.now.checked_sub(CHECK);
        let busy = self
            .sent_at
            .is_some_and(|sent| last.is_none_or(|last| sent > last));
        let again = if self.costs() { busy } else { warm };
        self.check_at = again.then(|| ctx.now + pause);
        let all =
            losing.is_some() || pause != CHECK_DIRECT || self.checks.is_multiple_of(CHECK_STANDBYS);
        self.checks = self.checks.wrapping_add(1);
        let standbys = standbys.into_iter().filter(|_| all);
        let ways: Vec<Via> = standbys.chain(self.primary).collect();
        for via in ways {
            let unknown = self.paths.get(&via).is_some_and(|path| !path.full_ok);
            self.send_echo(via, unknown, ctx);
        }
        self.select(ctx);
    }

    /// The kernel refuses to send to `via`: it is dead at once, and what there is else takes over.
    pub(crate) fn on_unsendable(&mut self, via: Via, ctx: &mut Context) {
        let Some(path) = self.paths.get_mut(&via).filter(|_| !self.known.plain) else {
            return;
        };
        path.on_refused(ctx.now);
        if self.duplicate == Some(via) {
            self.drop_duplicate(ctx);
        }
        if self.primary == Some(via) && self.is_up() {
            self.move_off(Reason::LinkDown, ctx);
            self.plan_search(ctx.now);
        }
    }

    /// Whether what is sent there, or its answer, costs one of the two.
    pub(super) fn costs(&self) -> bool {
        self.metered || self.remote.metered
    }

    /// After how long without traffic it costs nothing any more: where keeping a path costs, as soon
    /// as it is not warm.
    fn idle_after(&self) -> Duration {
        if self.costs() { WARM_FOR } else { LAZY_IDLE }
    }

    pub(super) fn up_deadline(&self) -> Option<Instant> {
        if self.known.plain {
            return None;
        }
        let timers = [
            Some(self.active_at + self.idle_after()),
            self.watch.deadline(self.pace()),
            self.search.tell_at,
            self.retry_due(),
            self.heartbeat_due(),
            self.unsure_due(),
            self.check_at,
            self.leave_by,
            self.guess_due(),
        ];
        timers.into_iter().flatten().min()
    }
}

const _: () = assert!(
    FAST_PROBE_GAPS[0].as_millis() + FAST_PROBE_GAPS[1].as_millis() + 400
        < DEAD_AFTER_MIN.as_millis()
);
