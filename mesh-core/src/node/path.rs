//! One way to a peer: what is known of it, and how good it is.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use mesh_wire::peer::CandidateKind;

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

/// Outcomes of echoes that are kept to tell the loss from: the bits of a `u64`.
const HISTORY_MAX: u32 = u64::BITS;

/// Echoes without which nothing is said about loss: one lost in twenty is 5 %.
const LOSS_KNOWN_FROM: u32 = 20;

/// Patience with a path of which no round trip is known yet, and the least patience (`paths.md`).
const PATIENCE_MIN: Duration = Duration::from_millis(400);

/// Most patience: beyond this a person would call it broken.
const PATIENCE_MAX: Duration = Duration::from_secs(3);

/// What a lost packet costs at least (`paths.md`): TCP's smallest retransmission timer.
const LOSS_COST: Duration = Duration::from_millis(200);

/// What kind of way a path is. The order is the preference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PathKind {
    /// Within a site.
    Lan,
    /// Straight to the peer.
    Direct,
    /// Through a relay.
    Relay,
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

#[derive(Debug)]
struct Echo {
    txid: u64,
    at: Instant,
    full_size: bool,
}

/// One way to a peer.
#[derive(Debug)]
pub(crate) struct Path {
    pub(crate) kind: PathKind,
    /// How the address became known; `None`: a relay.
    pub(crate) source: Option<CandidateKind>,
    pub(crate) state: PathState,
    /// A small packet went there and back.
    pub(crate) small_ok: bool,
    /// A full-size packet went there and back.
    pub(crate) full_ok: bool,
    /// A round ended with small packets answered and full-size ones not.
    pub(crate) small_only: bool,
    /// When something authenticated last came by it.
    pub(crate) received_at: Option<Instant>,
    pub(crate) sent: u64,
    pub(crate) answered: u64,
    srtt: Option<Duration>,
    rttvar: Duration,
    samples: VecDeque<Duration>,
    history: u64,
    history_len: u32,
    outstanding: VecDeque<Echo>,
    probes: usize,
    next_probe: Option<Instant>,
}

impl Path {
    pub(crate) fn new(kind: PathKind, source: Option<CandidateKind>) -> Self {
        Self {
            kind,
            source,
            state: PathState::Candidate,
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
            history_len: 0,
            outstanding: VecDeque::new(),
            probes: 0,
            next_probe: None,
        }
    }

    /// Whether packets may be put on it: both sizes pass, or a relay is known to pass them.
    pub(crate) fn usable(&self) -> bool {
        matches!(self.state, PathState::Standby | PathState::Primary)
    }

    /// Begins a round of probes, unless one is going on or it works already.
    pub(crate) fn start_probing(&mut self, now: Instant) {
        if matches!(self.state, PathState::Candidate | PathState::Dead) {
            self.state = PathState::Probing;
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

    /// Ends its use. A later round may find it alive again.
    pub(crate) fn die(&mut self) {
        self.state = PathState::Dead;
        self.next_probe = None;
    }

    /// Whether a probe is due: its kind, small or full-size. Moves the round on; when it is
    /// over, the path is dead.
    pub(crate) fn take_due_probe(&mut self, now: Instant) -> Option<bool> {
        if self.next_probe.is_none_or(|at| now < at) {
            return None;
        }
        if self.probes == PROBES_MAX {
            self.small_only = self.small_ok && !self.full_ok;
            self.die();
            return None;
        }
        let gap = PROBE_GAPS.get(self.probes).or(PROBE_GAPS.last());
        self.next_probe = gap.map(|&gap| now + gap);
        self.probes += 1;
        Some(self.small_ok)
    }

    /// When [`Self::take_due_probe`] has something to say.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.next_probe
    }

    /// Notes an echo that goes out.
    pub(crate) fn on_echo_sent(&mut self, txid: u64, full_size: bool, now: Instant) {
        self.forget_lost(now);
        if self.outstanding.len() == OUTSTANDING_MAX {
            self.outstanding.pop_front();
            self.record(false);
        }
        let at = now;
        self.outstanding.push_back(Echo {
            txid,
            at,
            full_size,
        });
        self.sent += 1;
    }

    /// Notes an answer. `false`: to nothing that was asked here.
    pub(crate) fn on_echo_answered(&mut self, txid: u64, now: Instant) -> bool {
        let Some(index) = self.outstanding.iter().position(|echo| echo.txid == txid) else {
            return false;
        };
        let Some(echo) = self.outstanding.remove(index) else {
            return false;
        };
        self.record(true);
        self.answered += 1;
        self.sample(now.saturating_duration_since(echo.at));
        self.small_ok = true;
        self.full_ok |= echo.full_size;
        self.small_only &= !self.full_ok;
        true
    }

    /// It has proven itself: no more probes in this round.
    pub(crate) fn settle(&mut self) {
        if matches!(
            self.state,
            PathState::Candidate | PathState::Probing | PathState::Dead
        ) {
            self.state = PathState::Standby;
        }
        self.next_probe = None;
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
            self.record(false);
        }
    }

    fn record(&mut self, answered: bool) {
        self.history = self.history << 1 | u64::from(!answered);
        self.history_len = (self.history_len + 1).min(HISTORY_MAX);
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
    fn probes_are_small_until_a_small_one_is_answered() {
        let mut path = Path::new(PathKind::Direct, None);
        path.start_probing(at(0));
        assert_eq!(path.take_due_probe(at(0)), Some(false));
        path.on_echo_sent(1, false, at(0));
        assert!(path.on_echo_answered(1, at(30)));
        assert!(path.small_ok && !path.full_ok);
        assert_eq!(path.take_due_probe(at(200)), Some(true));
        path.on_echo_sent(2, true, at(200));
        assert!(path.on_echo_answered(2, at(230)));
        assert!(path.full_ok);
    }

    #[test]
    fn an_answer_to_another_question_is_none() {
        let mut path = Path::new(PathKind::Direct, None);
        path.on_echo_sent(1, false, at(0));
        assert!(!path.on_echo_answered(2, at(30)));
        assert!(path.on_echo_answered(1, at(30)));
        assert!(!path.on_echo_answered(1, at(31)), "counted twice");
    }

    #[test]
    fn patience_follows_the_round_trip_within_bounds() {
        let mut path = Path::new(PathKind::Direct, None);
        assert_eq!(path.patience(), PATIENCE_MIN);
        for (txid, rtt) in [(1, 20), (2, 20)] {
            path.on_echo_sent(txid, false, at(0));
            path.on_echo_answered(txid, at(rtt));
        }
        assert_eq!(path.patience(), PATIENCE_MIN);
        for txid in 3..40 {
            path.on_echo_sent(txid, false, at(0));
            path.on_echo_answered(txid, at(300));
        }
        let patience = path.patience();
        assert!((900..1100).contains(&patience.as_millis()), "{patience:?}");
    }

    #[test]
    fn loss_is_told_from_twenty_echoes_on_and_makes_a_path_dear() {
        let mut path = Path::new(PathKind::Direct, None);
        for txid in 0..20 {
            assert_eq!(path.loss(), None);
            path.on_echo_sent(txid, false, at(0));
            if txid % 2 == 0 {
                path.on_echo_answered(txid, at(20));
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
        path.die();
        path.probe_back(at(1000));
        assert_eq!(path.take_due_probe(at(1000)), Some(false));
        path.on_echo_sent(1, false, at(1000));
        path.probe_back(at(1050));
        assert_eq!(path.take_due_probe(at(1050)), None);
    }
}
