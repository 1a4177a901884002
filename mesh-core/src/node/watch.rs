//! Whether the path in use still works: the timers between "sent something" and "it is dead".
//!
//! Nothing is judged by silence alone. Something was sent, nothing authenticated came back in
//! time, two fast probes went unanswered: suspect. A while later, with every further probe
//! unanswered too: dead.

use std::time::{Duration, Instant};

/// Gaps after the first and the second fast probe.
pub(crate) const FAST_PROBE_GAPS: [Duration; 2] =
    [Duration::from_millis(100), Duration::from_millis(200)];

/// Least time between the first unanswered packet and "dead" (`paths.md`). With 400 ms of
/// patience and 300 ms of fast probes, 500 ms are left for the alternatives to answer in.
pub(crate) const DEAD_AFTER_MIN: Duration = Duration::from_millis(1200);

/// Gap between probes while a path is suspect: two more within those 500 ms, so that "dead" is
/// never said after fewer than three unanswered ones.
pub(crate) const SUSPECT_PROBE_GAP: Duration = Duration::from_millis(200);

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
    /// The next state, and what follows. `patience` is how long an answer may take.
    pub(crate) fn handle(
        self,
        input: WatchInput,
        now: Instant,
        patience: Duration,
    ) -> (Self, Verdict) {
        match (self, input) {
            (Self::Suspect { .. }, WatchInput::Received) => (Self::Calm, Verdict::Cleared),
            (Self::Calm | Self::Waiting { .. } | Self::Testing { .. }, WatchInput::Received) => {
                (Self::Calm, Verdict::Nothing)
            }
            (Self::Calm, WatchInput::Sent) => (Self::Waiting { since: now }, Verdict::Nothing),
            (Self::Waiting { since }, WatchInput::Timeout) if now >= since + patience => {
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
                None => (Self::doubt(since, now, patience), Verdict::Doubt),
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
    pub(crate) fn deadline(self, patience: Duration) -> Option<Instant> {
        match self {
            Self::Calm => None,
            Self::Waiting { since } => Some(since + patience),
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
    use crate::node::tests::{at, start};

    const PATIENCE: Duration = Duration::from_millis(400);

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
            (waiting, Timeout, 399, waiting, Nothing),
            (waiting, Timeout, 400, testing(1, 500), Probe),
            (testing(1, 500), Sent, 450, testing(1, 500), Nothing),
            (testing(1, 500), Received, 450, Watch::Calm, Nothing),
            (testing(1, 500), Timeout, 499, testing(1, 500), Nothing),
            (testing(1, 500), Timeout, 500, testing(2, 700), Probe),
            (testing(2, 700), Received, 600, Watch::Calm, Nothing),
            (testing(2, 700), Timeout, 700, suspect(900), Doubt),
            (suspect(900), Sent, 800, suspect(900), Nothing),
            (suspect(900), Received, 800, Watch::Calm, Cleared),
            (suspect(900), Timeout, 899, suspect(900), Nothing),
            (suspect(900), Timeout, 900, suspect(1100), ProbeAll),
            (suspect(1100), Timeout, 1200, Watch::Calm, Dead),
        ];
        for (state, input, ms, next, verdict) in table {
            let got = state.handle(input, at(ms), PATIENCE);
            assert_eq!(got, (next, verdict), "{state:?} {input:?} at {ms} ms");
        }
    }

    #[test]
    fn a_silent_path_is_dead_in_little_more_than_a_second_and_never_spins() {
        let (mut watch, mut now) = (Watch::Calm, start());
        watch = watch.handle(WatchInput::Sent, now, PATIENCE).0;
        let mut verdicts = Vec::new();
        while let Some(deadline) = watch.deadline(PATIENCE) {
            assert!(deadline > now, "{watch:?} asks for a time that is over");
            now = deadline;
            let (next, verdict) = watch.handle(WatchInput::Timeout, now, PATIENCE);
            watch = next;
            verdicts.push(verdict);
        }
        assert_eq!(now, at(1200));
        let probes = verdicts.iter().filter(|v| !matches!(v, Verdict::Dead));
        assert!(probes.count() >= 3, "{verdicts:?}");
    }
}
