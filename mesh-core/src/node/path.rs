//! One way to a peer: what is known of it, and how good it is.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    time::{Duration, Instant},
};

use mesh_wire::peer::{CandidateKind, FULL_SIZE};

use crate::node::machine::{PathChange, PathEvent};

/// Gaps between the probes of one round; the last one repeats (`paths.md`).
const PROBE_GAPS: [Duration; 4] = [
    Duration::from_millis(200),
    Duration::from_millis(300),
    Duration::from_millis(500),
    Duration::from_secs(1),
];

/// Probes of one path in one round (`paths.md`): ten seconds of them.
const PROBES_MAX: usize = 12;

/// Round-trip times that are kept: enough for a 95th percentile that means something.
const SAMPLES_MAX: usize = 20;

/// Echoes that may be unanswered at a time: the two seconds of [`ECHO_LIFETIME`] at the fastest
/// pace, one in 100 ms. Beyond that the oldest counts as lost.
const OUTSTANDING_MAX: usize = 20;

/// An echo without an answer after this is lost.
const ECHO_LIFETIME: Duration = Duration::from_secs(2);

/// Outcomes of echoes that are kept to tell the loss from: the bits of a `u128`.
const HISTORY_MAX: u32 = u128::BITS;

/// Echoes without which nothing is said about loss: one lost in twenty is 5 %.
const LOSS_KNOWN_FROM: u32 = 20;

/// Echoes without which a loss does not move traffic from one tier to another: at a true loss
/// of 1 %, three or more lost of 64 (over 3 %) is a matter of one in 40.
const LOSS_JUDGED_FROM: u32 = 64;

/// How long a loss is looked at closely after it began: long enough for 128 echoes, one in half a
/// second, three times over. A path that still loses then loses for good.
const LOSS_WATCHED: Duration = Duration::from_secs(180);

/// What was measured before so long a silence says nothing about now.
const HISTORY_TTL: Duration = Duration::from_secs(60);

/// Patience with a path of which no round trip is known yet, and the least patience (`paths.md`).
const PATIENCE_MIN: Duration = Duration::from_millis(400);

/// Checks of a standby that remain unanswered before it is dead (`paths.md`: three independent
/// timeouts over 1.2 s or more): they follow each other by its patience, 400 ms at least.
const CHECKS_MAX: u32 = 3;

/// Most patience: beyond this a person would call it broken.
const PATIENCE_MAX: Duration = Duration::from_secs(3);

/// What a lost packet costs at least (`paths.md`): TCP's smallest retransmission timer.
const LOSS_COST: Duration = Duration::from_millis(200);

/// A path to which the kernel refuses to send is left alone for this long; twice as long each time …
const BARRED_FIRST: Duration = Duration::from_secs(1);

/// … up to this, or a firewall that refuses now and then would make traffic swing; half of the longest
/// pause between two searches, so that the next one finds it open …
const BARRED_MAX: Duration = Duration::from_secs(30);

/// … and from the beginning after so long without.
const BARRED_FORGOTTEN: Duration = Duration::from_secs(300);

/// What kind of way a path is. The order is the preference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PathKind {
    /// Within a site.
    Lan,
    /// Straight to the peer.
    Direct,
    /// Through a relay that is a node of the mesh, perhaps one of the two: one hop on somebody's own ground.
    PeerRelay,
    /// Through another relay.
    Relay,
}

impl PathKind {
    /// Whether it goes through a relay of either sort.
    #[must_use]
    pub fn is_relayed(self) -> bool {
        matches!(self, Self::PeerRelay | Self::Relay)
    }
}

/// The states of a path (`paths.md`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PathState {
    /// Known, not tried.
    Candidate,
    /// Echoes are on their way.
    Probing,
    /// Works, not used.
    Standby,
    /// In use.
    Primary,
    /// In use, and silent.
    Suspect,
    /// Does not work.
    Dead,
}

/// Checks of a standby without an answer.
#[derive(Debug)]
struct Unanswered {
    checks: u32,
    next: Instant,
}

#[derive(Debug)]
struct Echo {
    txid: u64,
    at: Instant,
    size_bytes: u16,
}

/// One way to a peer.
#[derive(Debug)]
pub(crate) struct Path {
    pub(crate) kind: PathKind,
    /// How the address became known; `None`: a relay.
    pub(crate) source: Option<CandidateKind>,
    state: PathState,
    /// Changes of its state that its peer has not taken note of: at most one for each event that
    /// one input raises.
    changes: Vec<PathChange>,
    /// A small packet went there and back.
    pub(crate) small_ok: bool,
    /// A full-size packet went there and back.
    pub(crate) full_ok: bool,
    /// What full size is: the overlay's MTU.
    full_size: u16,
    /// A round ended with small packets answered and full-size ones not.
    pub(crate) small_only: bool,
    /// When something authenticated last came by it.
    pub(crate) received_at: Option<Instant>,
    pub(crate) sent: u64,
    pub(crate) answered: u64,
    srtt: Option<Duration>,
    rttvar: Duration,
    samples: VecDeque<Duration>,
    history: u128,
    /// Since when echoes are lost now and then.
    losing_since: Option<Instant>,
    echoed_at: Option<Instant>,
    history_len: u32,
    outstanding: VecDeque<Echo>,
    probes: usize,
    next_probe: Option<Instant>,
    unanswered: Option<Unanswered>,
    /// Where the peer last saw this node's packets come from.
    pub(crate) observed: Option<SocketAddr>,
    refusals: u32,
    refused_at: Option<Instant>,
}

impl Path {
    pub(crate) fn new(kind: PathKind, source: Option<CandidateKind>) -> Self {
        Self {
            kind,
            source,
            state: PathState::Candidate,
            changes: Vec::new(),
            small_ok: false,
            full_ok: false,
            small_only: false,
            received_at: None,
            sent: 0,
            answered: 0,
            srtt: None,
            rttvar: Duration::ZERO,
            samples: VecDeque::new(),
            history: 0,
            losing_since: None,
            echoed_at: None,
            history_len: 0,
            outstanding: VecDeque::new(),
            probes: 0,
            next_probe: None,
            unanswered: None,
            full_size: FULL_SIZE,
            observed: None,
            refusals: 0,
            refused_at: None,
        }
    }

    /// What a packet of full size is. Returns whether it has to be proven anew.
    pub(crate) fn set_full_size(&mut self, bytes: u16) -> bool {
        let more = bytes > self.full_size;
        self.full_size = bytes;
        self.full_ok &= !more;
        more
    }

    /// The kernel refused to send there. Whoever knows more says [`Self::unbar`].
    pub(crate) fn on_refused(&mut self, now: Instant) {
        self.happen(PathEvent::Gone, now);
        if self.is_barred(now) {
            return; // What the peer asks is answered all the same, or was to be.
        }
        let again = |at: Instant| now < at + BARRED_FORGOTTEN;
        let again = self.refused_at.is_some_and(again);
        self.refusals = if again { self.refusals + 1 } else { 0 };
        self.refused_at = Some(now);
    }

    /// The network is another one: what was refused may work.
    pub(crate) fn unbar(&mut self) {
        (self.refusals, self.refused_at) = (0, None);
    }

    /// Whether it is left alone, as the kernel refused to send there.
    fn is_barred(&self, now: Instant) -> bool {
        let pause = BARRED_FIRST * 2u32.saturating_pow(self.refusals.min(6));
        let until = |at: Instant| at + pause.min(BARRED_MAX);
        self.refused_at.is_some_and(|at| now < until(at))
    }

    pub(crate) fn state(&self) -> PathState {
        self.state
    }

    /// Something happened: the state is what the table says. Returns whether it is another one.
    pub(crate) fn happen(&mut self, event: PathEvent, now: Instant) -> bool {
        let revives = matches!(event, PathEvent::ProbingBegan | PathEvent::Proven);
        if revives && self.is_barred(now) {
            return false;
        }
        let Some(to) = self.state.after(event) else {
            return false;
        };
        let from = std::mem::replace(&mut self.state, to);
        if to == PathState::Standby && event == PathEvent::Proven {
            // What was lost before was an outage.
            self.forget_loss();
        }
        // Each state begins with its own timers; only probing has one at once.
        (self.next_probe, self.unanswered) = (None, None);
        self.changes.push(PathChange {
            at: now,
            from,
            to,
            event,
        });
        true
    }

    /// The changes since this was last asked.
    pub(crate) fn take_changes(&mut self) -> Vec<PathChange> {
        std::mem::take(&mut self.changes)
    }

    /// Something authenticated came in by it.
    pub(crate) fn on_received(&mut self, now: Instant) {
        self.received_at = Some(now);
        self.unanswered = None;
    }

    /// Whether packets may be put on it: both sizes pass, or a relay is known to pass them.
    pub(crate) fn usable(&self) -> bool {
        matches!(self.state, PathState::Standby | PathState::Primary)
    }

    /// Begins a round of probes, unless one is going on or it works already.
    pub(crate) fn start_probing(&mut self, now: Instant) {
        if self.happen(PathEvent::ProbingBegan, now) {
            (self.small_ok, self.full_ok) = (false, false);
            self.probes = 0;
            self.next_probe = Some(now);
        }
    }

    /// Probes at once what the peer itself is probing: its packet may have opened the way.
    pub(crate) fn probe_back(&mut self, now: Instant) {
        self.start_probing(now);
        if self.state == PathState::Probing && self.quiet_for(now) >= PROBE_GAPS[0] {
            self.next_probe = Some(now);
        }
    }

    /// Whether a probe is due: its kind, small or full-size. Moves the round on; when it is
    /// over, the path is dead.
    pub(crate) fn take_due_probe(&mut self, now: Instant) -> Option<bool> {
        let check = self.unanswered.as_ref();
        if check.is_some_and(|check| now >= check.next) {
            return self.take_due_check();
        }
        if self.next_probe.is_none_or(|at| now < at) {
            return None;
        }
        if self.probes == PROBES_MAX {
            self.small_only = self.small_ok && !self.full_ok;
            self.happen(PathEvent::Unanswered, now);
            return None;
        }
        let gap = PROBE_GAPS.get(self.probes).or(PROBE_GAPS.last());
        self.next_probe = gap.map(|&gap| now + gap);
        self.probes += 1;
        Some(self.small_ok)
    }

    /// A standby's last check is overdue: another one, or it is dead.
    fn take_due_check(&mut self) -> Option<bool> {
        let check = self.unanswered.as_ref()?;
        if check.checks < CHECKS_MAX {
            return Some(false);
        }
        let now = check.next;
        self.happen(PathEvent::Unanswered, now);
        None
    }

    /// When [`Self::take_due_probe`] has something to say.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let check = self.unanswered.as_ref().map(|check| check.next);
        self.next_probe.into_iter().chain(check).min()
    }

    /// Notes an echo that goes out.
    pub(crate) fn on_echo_sent(&mut self, txid: u64, size_bytes: u16, now: Instant) {
        self.forget_lost(now);
        if self.outstanding.len() == OUTSTANDING_MAX {
            self.outstanding.pop_front();
            self.record_lost(now);
        }
        let at = now;
        let before = self.echoed_at.replace(now);
        if before.is_some_and(|before| now >= before + HISTORY_TTL) {
            self.forget_loss();
        }
        self.outstanding.push_back(Echo {
            txid,
            at,
            size_bytes,
        });
        self.sent += 1;
        if self.state == PathState::Standby {
            let checks = self.unanswered.as_ref().map_or(0, |check| check.checks) + 1;
            let next = now + self.patience();
            self.unanswered = Some(Unanswered { checks, next });
        }
    }

    /// Notes an answer. `false`: to nothing that was asked here.
    pub(crate) fn on_echo_answered(&mut self, txid: u64, size_bytes: u16, now: Instant) -> bool {
        let Some(index) = self.outstanding.iter().position(|echo| echo.txid == txid) else {
            return false;
        };
        let Some(echo) = self.outstanding.remove(index) else {
            return false;
        };
        self.record(true);
        self.answered += 1;
        self.sample(now.saturating_duration_since(echo.at));
        self.unanswered = None;
        self.small_ok = true;
        // The answer may be smaller: by a peer that could not be asked for more.
        self.full_ok |= echo.size_bytes.min(size_bytes) >= self.full_size;
        self.small_only &= !self.full_ok;
        true
    }

    /// Smoothed round-trip time (RFC 6298).
    pub(crate) fn srtt(&self) -> Option<Duration> {
        self.srtt
    }

    /// How long an answer may take before the path is doubted (`paths.md`).
    pub(crate) fn patience(&self) -> Duration {
        let usual = self.srtt.map(|srtt| srtt * 3 + self.rttvar * 4);
        usual
            .unwrap_or(PATIENCE_MIN)
            .clamp(PATIENCE_MIN, PATIENCE_MAX)
    }

    /// Share of echoes lost, if enough were sent to tell.
    pub(crate) fn loss(&self) -> Option<f64> {
        let known = self.history_len >= LOSS_KNOWN_FROM;
        known.then(|| f64::from(self.history.count_ones()) / f64::from(self.history_len))
    }

    /// The same, once so many were sent that traffic may be moved for it.
    pub(crate) fn judged_loss(&self) -> Option<f64> {
        self.loss().filter(|_| self.history_len >= LOSS_JUDGED_FROM)
    }

    /// Share of the last 64 echoes lost, once there were so many: whether it is over.
    pub(crate) fn recent_loss(&self) -> Option<f64> {
        let known = self.history_len >= LOSS_JUDGED_FROM;
        known.then(|| f64::from(self.recent_losses()) / f64::from(LOSS_JUDGED_FROM))
    }

    fn recent_losses(&self) -> u32 {
        (self.history & u128::from(u64::MAX)).count_ones()
    }

    /// Whether echoes are lost now and then; `Some(true)`: since a short time, so that it is worth
    /// knowing soon how often.
    pub(crate) fn is_losing(&self, now: Instant) -> Option<bool> {
        self.losing_since.map(|at| now < at + LOSS_WATCHED)
    }

    /// When an echo last went out by it.
    pub(crate) fn echoed_at(&self) -> Option<Instant> {
        self.echoed_at
    }

    /// What a packet costs on it (`paths.md`); `None`: not measured.
    pub(crate) fn cost(&self) -> Option<Duration> {
        let mut sorted: Vec<Duration> = self.samples.iter().copied().collect();
        sorted.sort_unstable();
        let p50 = *sorted.get(sorted.len() / 2)?;
        let p95 = *sorted.get(sorted.len() * 95 / 100)?;
        // A path that loses everything has no finite cost; 99 % is dear enough.
        let loss = self.loss().unwrap_or(0.0).min(0.99);
        let lost = LOSS_COST.max(p50).mul_f64(loss / (1.0 - loss));
        Some(p50 + (p95 - p50) * 2 + lost)
    }

    fn quiet_for(&self, now: Instant) -> Duration {
        let last = self.outstanding.back().map(|echo| echo.at);
        last.map_or(Duration::MAX, |at| now.saturating_duration_since(at))
    }

    fn forget_lost(&mut self, now: Instant) {
        while let Some(oldest) = self.outstanding.front()
            && now.saturating_duration_since(oldest.at) > ECHO_LIFETIME
        {
            self.outstanding.pop_front();
            self.record_lost(now);
        }
    }

    fn record_lost(&mut self, now: Instant) {
        self.losing_since.get_or_insert(now);
        self.record(false);
    }

    fn forget_loss(&mut self) {
        (self.history, self.history_len, self.losing_since) = (0, 0, None);
    }

    fn record(&mut self, answered: bool) {
        self.history = self.history << 1 | u128::from(!answered);
        self.history_len = (self.history_len + 1).min(HISTORY_MAX);
        if self.history_len >= LOSS_JUDGED_FROM && self.recent_losses() == 0 {
            self.losing_since = None;
        }
    }

    fn sample(&mut self, rtt: Duration) {
        let (srtt, rttvar) = match self.srtt {
            None => (rtt, rtt / 2),
            Some(srtt) => (
                (srtt * 7 + rtt) / 8,
                (self.rttvar * 3 + srtt.abs_diff(rtt)) / 4,
            ),
        };
        (self.srtt, self.rttvar) = (Some(srtt), rttvar);
        if self.samples.len() == SAMPLES_MAX {
            self.samples.pop_front();
        }
        self.samples.push_back(rtt);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::tests::at;

    #[test]
    fn a_round_has_twelve_probes_and_then_the_path_is_dead() {
        let mut path = Path::new(PathKind::Direct, None);
        path.start_probing(at(0));
        let mut times = Vec::new();
        while let Some(deadline) = path.deadline() {
            if path.take_due_probe(deadline).is_some() {
                times.push(deadline.duration_since(at(0)).as_millis());
            }
        }
        assert_eq!(times.len(), PROBES_MAX);
        assert_eq!(times[..6], [0, 200, 500, 1000, 2000, 3000]);
        assert_eq!(path.state, PathState::Dead);
    }

    #[test]
    fn a_standby_that_leaves_three_checks_unanswered_is_dead_after_1200_ms_and_not_before() {
        let mut path = Path::new(PathKind::Relay, None);
        path.happen(PathEvent::Proven, at(0));
        assert_eq!(
            path.deadline(),
            None,
            "a standby that nobody asks is left alone"
        );
        path.on_echo_sent(1, 0, at(1_000));
        let mut asked = Vec::new();
        let mut dead_at = None;
        while let Some(now) = path.deadline() {
            if path.take_due_probe(now).is_some() {
                asked.push(now.duration_since(at(0)).as_millis());
                path.on_echo_sent(2, 0, now);
            } else {
                dead_at = Some(now.duration_since(at(0)).as_millis());
            }
        }
        assert_eq!((asked, dead_at), (vec![1_400, 1_800], Some(2_200)));
        assert_eq!(path.state(), PathState::Dead);
        // A late answer is proof enough.
        assert!(path.on_echo_answered(2, 0, at(2_300)));
        path.happen(PathEvent::Proven, at(2_300));
        assert_eq!((path.state(), path.deadline()), (PathState::Standby, None));
    }

    #[test]
    fn probes_are_small_until_a_small_one_is_answered() {
        let mut path = Path::new(PathKind::Direct, None);
        path.start_probing(at(0));
        assert_eq!(path.take_due_probe(at(0)), Some(false));
        path.on_echo_sent(1, 0, at(0));
        assert!(path.on_echo_answered(1, 0, at(30)));
        assert!(path.small_ok && !path.full_ok);
        assert_eq!(path.take_due_probe(at(200)), Some(true));
        path.on_echo_sent(2, FULL_SIZE, at(200));
        assert!(path.on_echo_answered(2, FULL_SIZE, at(230)));
        assert!(path.full_ok);
    }

    #[test]
    fn full_size_is_what_the_overlay_carries_both_ways() {
        let mut path = Path::new(PathKind::Direct, None);
        path.start_probing(at(0));
        // Name, the echo, its answer, whether that proves an MTU of 1,400.
        let table = [
            ("of a smaller mesh", 1_280, 1_280, false),
            ("the answer is smaller", 1_400, 1_280, false),
            ("both", 1_400, 1_400, true),
        ];
        path.set_full_size(1_400);
        for (txid, (name, asked, answered, proves)) in (0..).zip(table) {
            path.on_echo_sent(txid, asked, at(txid));
            assert!(path.on_echo_answered(txid, answered, at(txid + 10)));
            assert_eq!(path.full_ok, proves, "{name}");
        }
        assert!(
            !path.set_full_size(1_300) && path.full_ok,
            "less passes, too"
        );
        assert!(path.set_full_size(1_420) && !path.full_ok);
    }

    #[test]
    fn what_the_kernel_refuses_is_left_alone_ever_longer() {
        let mut path = Path::new(PathKind::Direct, None);
        let (mut now, mut pauses) = (0, Vec::new());
        for _ in 0..9 {
            path.happen(PathEvent::Proven, at(now));
            assert_eq!(path.state(), PathState::Standby);
            path.on_refused(at(now));
            let refused = now;
            while !path.happen(PathEvent::ProbingBegan, at(now)) {
                assert!(
                    !path.happen(PathEvent::Proven, at(now)),
                    "not by an answer either"
                );
                now += 500;
            }
            pauses.push((now - refused) / 1_000);
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30, 30, 30]);
        path.on_refused(at(now));
        path.unbar();
        assert!(path.happen(PathEvent::ProbingBegan, at(now)));
        path.on_refused(at(now + 300_000));
        assert!(path.happen(PathEvent::ProbingBegan, at(now + 301_000)));
    }

    #[test]
    fn an_answer_to_another_question_is_none() {
        let mut path = Path::new(PathKind::Direct, None);
        path.on_echo_sent(1, 0, at(0));
        assert!(!path.on_echo_answered(2, 0, at(30)));
        assert!(path.on_echo_answered(1, 0, at(30)));
        assert!(!path.on_echo_answered(1, 0, at(31)), "counted twice");
    }

    #[test]
    fn patience_follows_the_round_trip_within_bounds() {
        let mut path = Path::new(PathKind::Direct, None);
        assert_eq!(path.patience(), PATIENCE_MIN);
        for (txid, rtt) in [(1, 20), (2, 20)] {
            path.on_echo_sent(txid, 0, at(0));
            path.on_echo_answered(txid, 0, at(rtt));
        }
        assert_eq!(path.patience(), PATIENCE_MIN);
        for txid in 3..40 {
            path.on_echo_sent(txid, 0, at(0));
            path.on_echo_answered(txid, 0, at(300));
        }
        let patience = path.patience();
        assert!((900..1100).contains(&patience.as_millis()), "{patience:?}");
    }

    #[test]
    fn loss_is_told_from_twenty_echoes_on_and_makes_a_path_dear() {
        let mut path = Path::new(PathKind::Direct, None);
        for txid in 0..20 {
            assert_eq!(path.loss(), None);
            path.on_echo_sent(txid, 0, at(0));
            if txid % 2 == 0 {
                path.on_echo_answered(txid, 0, at(20));
            } else {
                path.forget_lost(at(5000));
            }
        }
        assert_eq!(path.loss(), Some(0.5));
        assert_eq!(path.cost(), Some(Duration::from_millis(220)));
    }

    #[test]
    fn a_probe_from_the_peer_revives_a_dead_path_but_does_not_flood_it() {
        let mut path = Path::new(PathKind::Direct, None);
        path.start_probing(at(0));
        path.happen(PathEvent::Gone, at(500));
        path.probe_back(at(1000));
        assert_eq!(path.take_due_probe(at(1000)), Some(false));
        path.on_echo_sent(1, 0, at(1000));
        path.probe_back(at(1050));
        assert_eq!(path.take_due_probe(at(1050)), None);
    }
}
