//! Whether the path in use still works: the timers between "sent something" and "it is dead".
//!
//! Nothing is judged by silence alone. Something was sent, nothing authenticated came back in
//! time, two fast probes went unanswered: suspect. A while later, with every further probe
//! unanswered too: dead. The fast probes run while the patience does, so that suspicion need not
//! wait for both, one after the other: 0.45 s instead of 0.7 s on a LAN.

use std::time::{Duration, Instant};

/// Gaps after the first and the second fast probe; the second is half the patience if that is
/// longer: the second probe's answer takes as long as any.
pub(crate) const FAST_PROBE_GAPS: [Duration; 2] =
    [Duration::from_millis(100), Duration::from_millis(200)];

/// Least time between the first unanswered packet and "dead" (`paths.md`). With 400 ms of
/// patience, fast probes within, 750 ms are left for the alternatives to answer in.
pub(crate) const DEAD_AFTER_MIN: Duration = Duration::from_millis(1200);

/// Gap between probes while a path is suspect: three more within those 750 ms, so that "dead" is
/// never said after fewer than three unanswered ones.
pub(crate) const SUSPECT_PROBE_GAP: Duration = Duration::from_millis(200);

/// How patient the watch is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    /// How long an answer may take.
    pub(crate) patience: Duration,
    /// When the path was last probed. A flow in one direction only would otherwise be answered
    /// by a probe, and fall silent, all the time: it is asked once in a patience at most.
    pub(crate) probed_at: Option<Instant>,
}

impl Pace {
    /// When silence since `since` is first asked about: early enough for two probes within the
    /// patience, late enough for a usual answer, which takes a third of it at most.
    fn first_probe(self, since: Instant) -> Instant {
        let probes: Duration = FAST_PROBE_GAPS.iter().sum();
        let early = self.patience.saturating_sub(probes).max(self.patience / 3);
        let not_again_before = self.probed_at.map(|at| at + self.patience);
        let at = not_again_before.map_or(since + early, |at| at.max(since + early));
        at.min(since + self.patience)
    }
}

/// How far the doubt about the path in use has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Watch {
    /// Nothing is unanswered.
    Calm,
    /// Something was sent.
    Waiting { since: Instant },
    /// Fast probes are out.
    Testing {
        since: Instant,
        probes: usize,
        next: Instant,
    },
    /// The fast probes were lost.
    Suspect {
        since: Instant,
        next: Instant,
        dead_at: Instant,
    },
}

/// What happened on the path in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WatchInput {
    /// Something that the peer answers went out.
    Sent,
    /// Something authenticated came in by this path.
    Received,
    /// Time went by.
    Timeout,
}

/// What follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing.
    Nothing,
    /// Send an echo by the path in use.
    Probe,
    /// It has become suspect: duplicate, and probe it and every alternative.
    Doubt,
    /// It is still suspect: probe it and every alternative again.
    ProbeAll,
    /// It is suspect no more.
    Cleared,
    /// It is dead.
    Dead,
}

impl Watch {
    /// The next state, and what follows.
    pub(crate) fn handle(self, input: WatchInput, now: Instant, pace: Pace) -> (Self, Verdict) {
        match (self, input) {
            (Self::Suspect { .. }, WatchInput::Received) => (Self::Calm, Verdict::Cleared),
            (Self::Calm | Self::Waiting { .. } | Self::Testing { .. }, WatchInput::Received) => {
                (Self::Calm, Verdict::Nothing)
            }
            (Self::Calm, WatchInput::Sent) => (Self::Waiting { since: now }, Verdict::Nothing),
            (Self::Waiting { since }, WatchInput::Timeout) if now >= pace.first_probe(since) => {
                let next = now + FAST_PROBE_GAPS[0];
                let testing = Self::Testing {
                    since,
                    probes: 1,
                    next,
                };
                (testing, Verdict::Probe)
            }
            (
                Self::Testing {
                    since,
                    probes,
                    next,
                },
                WatchInput::Timeout,
            ) if now >= next => match FAST_PROBE_GAPS.get(probes) {
                Some(&gap) => {
                    let last = probes + 1 == FAST_PROBE_GAPS.len();
                    let gap = if last {
                        gap.max(pace.patience / 2)
                    } else {
                        gap
                    };
                    let (probes, next) = (probes + 1, now + gap);
                    (
                        Self::Testing {
                            since,
                            probes,
                            next,
                        },
                        Verdict::Probe,
                    )
                }
                None => (Self::doubt(since, now, pace.patience), Verdict::Doubt),
            },
            (Self::Suspect { dead_at, .. }, WatchInput::Timeout) if now >= dead_at => {
                (Self::Calm, Verdict::Dead)
            }
            (
                Self::Suspect {
                    since,
                    next,
                    dead_at,
                },
                WatchInput::Timeout,
            ) if now >= next => {
                let next = now + SUSPECT_PROBE_GAP;
                (
                    Self::Suspect {
                        since,
                        next,
                        dead_at,
                    },
                    Verdict::ProbeAll,
                )
            }
            (state, WatchInput::Sent | WatchInput::Timeout) => (state, Verdict::Nothing),
        }
    }

    fn doubt(since: Instant, now: Instant, patience: Duration) -> Self {
        // An alternative may be as slow as this path was: it gets its patience, too.
        let dead_at = (since + DEAD_AFTER_MIN).max(now + patience);
        let next = now + SUSPECT_PROBE_GAP;
        Self::Suspect {
            since,
            next,
            dead_at,
        }
    }

    /// When to say [`WatchInput::Timeout`].
    pub(crate) fn deadline(self, pace: Pace) -> Option<Instant> {
        match self {
            Self::Calm => None,
            Self::Waiting { since } => Some(pace.first_probe(since)),
            Self::Testing { next, .. } => Some(next),
            Self::Suspect { next, dead_at, .. } => Some(next.min(dead_at)),
        }
    }

    /// Since when nothing came back, if that has become suspicious.
    pub(crate) fn suspect_since(self) -> Option<Instant> {
        match self {
            Self::Suspect { since, .. } => Some(since),
            Self::Calm | Self::Waiting { .. } | Self::Testing { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{node::tests::at, testing::start};

    const PACE: Pace = Pace {
        patience: Duration::from_millis(420),
        probed_at: None,
    };

    #[test]
    fn every_transition_is_as_the_table_says() {
        use Verdict::{Cleared, Dead, Doubt, Nothing, Probe, ProbeAll};
        use WatchInput::{Received, Sent, Timeout};
        let waiting = Watch::Waiting { since: at(0) };
        let testing = |probes, next| Watch::Testing {
            since: at(0),
            probes,
            next: at(next),
        };
        let suspect = |next| Watch::Suspect {
            since: at(0),
            next: at(next),
            dead_at: at(1200),
        };
        let table = [
            (Watch::Calm, Sent, 0, waiting, Nothing),
            (Watch::Calm, Received, 0, Watch::Calm, Nothing),
            (Watch::Calm, Timeout, 9999, Watch::Calm, Nothing),
            (waiting, Sent, 300, waiting, Nothing),
            (waiting, Received, 300, Watch::Calm, Nothing),
            (waiting, Timeout, 139, waiting, Nothing),
            (waiting, Timeout, 140, testing(1, 240), Probe),
            (testing(1, 240), Sent, 200, testing(1, 240), Nothing),
            (testing(1, 240), Received, 200, Watch::Calm, Nothing),
            (testing(1, 240), Timeout, 239, testing(1, 240), Nothing),
            (testing(1, 240), Timeout, 240, testing(2, 450), Probe),
            (testing(2, 450), Received, 400, Watch::Calm, Nothing),
            (testing(2, 450), Timeout, 449, testing(2, 450), Nothing),
            (testing(2, 450), Timeout, 450, suspect(650), Doubt),
            (suspect(650), Sent, 500, suspect(650), Nothing),
            (suspect(650), Received, 500, Watch::Calm, Cleared),
            (suspect(650), Timeout, 649, suspect(650), Nothing),
            (suspect(650), Timeout, 650, suspect(850), ProbeAll),
            (suspect(1250), Timeout, 1199, suspect(1250), Nothing),
            (suspect(1250), Timeout, 1200, Watch::Calm, Dead),
        ];
        for (state, input, ms, next, verdict) in table {
            let got = state.handle(input, at(ms), PACE);
            assert_eq!(got, (next, verdict), "{state:?} {input:?} at {ms} ms");
        }
    }

    #[test]
    fn a_flow_in_one_direction_is_asked_about_once_in_a_patience() {
        let pace = Pace {
            probed_at: Some(at(100)),
            ..PACE
        };
        let waiting = Watch::Waiting { since: at(120) };
        assert_eq!(waiting.deadline(pace), Some(at(520)));
        // Asked long ago, or in the future of what fell silent: never later than the patience.
        let old = Watch::Waiting { since: at(9_000) };
        assert_eq!(old.deadline(pace), Some(at(9_140)));
        let heartbeat = Watch::Waiting { since: at(100) };
        assert_eq!(heartbeat.deadline(pace), Some(at(520)));
    }

    #[test]
    fn two_probes_have_had_time_for_their_answers_before_anybody_doubts() {
        for srtt_ms in [1, 50, 130, 200, 400, 900] {
            let patience = Duration::from_millis((srtt_ms * 3).max(400));
            let pace = Pace {
                patience,
                probed_at: None,
            };
            let mut watch = Watch::Waiting { since: at(0) };
            let mut probes = Vec::new();
            let doubted = loop {
                let now = watch.deadline(pace).unwrap();
                let (next, verdict) = watch.handle(WatchInput::Timeout, now, pace);
                watch = next;
                if verdict == Verdict::Doubt {
                    break now;
                }
                assert_eq!(verdict, Verdict::Probe);
                probes.push(now);
            };
            assert!(doubted >= at(0) + patience, "{srtt_ms}");
            assert_eq!(probes.len(), 2);
            let answer = Duration::from_millis(srtt_ms);
            assert!(probes.iter().all(|&at| at + answer <= doubted), "{srtt_ms}");
        }
    }

    #[test]
    fn a_silent_path_is_dead_in_little_more_than_a_second_and_never_spins() {
        let (mut watch, mut now) = (Watch::Calm, start());
        watch = watch.handle(WatchInput::Sent, now, PACE).0;
        let mut verdicts = Vec::new();
        while let Some(deadline) = watch.deadline(PACE) {
            assert!(deadline > now, "{watch:?} asks for a time that is over");
            now = deadline;
            let (next, verdict) = watch.handle(WatchInput::Timeout, now, PACE);
            watch = next;
            verdicts.push(verdict);
        }
        assert_eq!(now, at(1200));
        let probes = verdicts.iter().filter(|v| !matches!(v, Verdict::Dead));
        assert!(probes.count() >= 3, "{verdicts:?}");
    }
}
