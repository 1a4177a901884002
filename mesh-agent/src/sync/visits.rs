//! When a node whose way out is metered asks its controller. Pure.
//!
//! A stream that is held open costs, also when nobody says anything: each end asks each half minute whether the other
//! is there (`mesh_api::connect::KEEPALIVE_INTERVAL`), 16 to 33 packets a minute. So such a node *visits*: it connects,
//! takes what is new, says how it is, leaves, and says when it comes again. In between not a packet goes either way.
//! Whatever is changed meanwhile, a key that was taken out of the mesh too, it learns at the next visit. When somebody asks
//! for what the node does not know, a name of the mesh or a caller whose key is new, it comes at once; who keeps asking
//! for what does not exist brings it ever more rarely.

use std::time::Duration;

use mesh_api::control::NodeReport;
use tokio::time::Instant;

/// Between visits, unless the configuration says otherwise: 24 times a day 6 KB, 4.3 MB a month.
pub const EVERY: Duration = Duration::from_secs(3600);

/// Between visits while the node speaks with others, so that packets flow anyway: what is taken back counts sooner.
const WHILE_SPEAKING: Duration = Duration::from_secs(600);

/// Least time between two visits when somebody asks for what is not known; twice as long each time that somebody asks
/// again, up to the usual time: a name that is wrong for ever costs 6 visits more in the first hour, and none later.
const ASKED_PAUSE: Duration = Duration::from_secs(60);

/// A visit is over so long after an answer came: what the node then says has arrived, by a line of 1 s there and back as
/// well.
const LINGER: Duration = Duration::from_secs(2);

/// Longest visit that brings nothing: a controller that many nodes come back to lets them wait for their turn, 30 s each.
const PATIENCE: Duration = Duration::from_secs(600);

/// When to come, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Visits {
    every: Duration,
    /// Least time between the last visit and one that is asked for.
    asked_pause: Duration,
}

/// One that goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Visit {
    began: Instant,
    answered: Option<Instant>,
}

impl Visits {
    pub(super) fn new(every: Duration) -> Self {
        Self {
            every,
            asked_pause: ASKED_PAUSE,
        }
    }

    /// The longest time from one visit to the next, which is what the controller is told; and the longest pause between
    /// attempts that fail.
    pub(super) fn within(self) -> Duration {
        self.every
    }

    /// When the next one begins, after one that was over at `last`. `asked`: when somebody first asked for what is not
    /// known since then. `share` of 0 to 1, by chance: nodes that began together do not come together.
    pub(super) fn next(
        self,
        last: Instant,
        report: &NodeReport,
        asked: Option<Instant>,
        share: f64,
    ) -> Instant {
        let speaks = report.direct_peers > 0 || report.relayed_peers > 0;
        let every = if speaks {
            self.every.min(WHILE_SPEAKING)
        } else {
            self.every
        };
        let usual = last + every.mul_f64(0.75 + 0.25 * share);
        asked.map_or(usual, |at| usual.min(at.max(last + self.asked_pause)))
    }

    /// The time between two visits is over. `asked`: somebody asked for what is not known.
    pub(super) fn handle_rested(&mut self, asked: bool) {
        self.asked_pause = match asked {
            true => (self.asked_pause * 2).min(self.every),
            false => ASKED_PAUSE,
        };
    }
}

impl Visit {
    pub(super) fn begin(now: Instant) -> Self {
        Self {
            began: now,
            answered: None,
        }
    }

    /// The controller told what it had to tell. What it tells later, in an unending stream of changes, is the next visit's.
    pub(super) fn handle_answer(&mut self, now: Instant) {
        self.answered.get_or_insert(now);
    }

    /// Until when it lasts.
    pub(super) fn ends(self) -> Instant {
        match self.answered {
            Some(at) => at + LINGER,
            None => self.began + PATIENCE,
        }
    }

    /// Whether it was of use.
    pub(super) fn is_answered(self) -> bool {
        self.answered.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn report(direct_peers: u32, relayed_peers: u32) -> NodeReport {
        NodeReport {
            direct_peers,
            relayed_peers,
            ..NodeReport::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_comes_once_an_hour_and_each_ten_minutes_while_it_speaks() {
        let now = Instant::now();
        let visits = Visits::new(EVERY);
        let minutes = |report, share| (visits.next(now, &report, None, share) - now).as_secs() / 60;
        assert_eq!(
            [0.0, 1.0].map(|share| minutes(report(0, 0), share)),
            [45, 60]
        );
        assert_eq!(minutes(report(1, 0), 1.0), 10);
        assert_eq!(minutes(report(0, 1), 1.0), 10);
        // Never later than the controller was told, and never less often than wanted.
        let often = Visits::new(MINUTE);
        assert_eq!(often.next(now, &report(1, 0), None, 1.0), now + MINUTE);
        assert_eq!(often.within(), MINUTE);
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_for_what_is_not_known_brings_it_at_once_but_not_for_ever() {
        let start = Instant::now();
        let mut visits = Visits::new(EVERY);
        let idle = report(0, 0);
        let asked = start + MINUTE * 5;
        assert_eq!(visits.next(start, &idle, Some(asked), 1.0), asked);
        // Somebody asks for a wrong name every second.
        let (mut last, mut pauses) = (start, Vec::new());
        for _ in 0..9 {
            let asked = last + Duration::from_secs(1);
            let next = visits.next(last, &idle, Some(asked), 1.0);
            visits.handle_rested(true);
            pauses.push((next - last).as_secs() / 60);
            last = next;
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        visits.handle_rested(false);
        let asked = last + MINUTE;
        assert_eq!(visits.next(last, &idle, Some(asked), 1.0), asked);
        // Never later than without anybody who asks.
        let often = Visits::new(MINUTE / 2);
        let asked = start + Duration::from_secs(1);
        assert_eq!(
            often.next(start, &idle, Some(asked), 1.0),
            start + MINUTE / 2
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_visit_ends_soon_after_the_first_answer_however_many_follow() {
        let now = Instant::now();
        let mut visit = Visit::begin(now);
        assert_eq!((visit.ends(), visit.is_answered()), (now + PATIENCE, false));
        for second in 5..60 {
            visit.handle_answer(now + Duration::from_secs(second));
        }
        let answered = now + Duration::from_secs(5);
        assert_eq!(
            (visit.ends(), visit.is_answered()),
            (answered + LINGER, true)
        );
    }
}
