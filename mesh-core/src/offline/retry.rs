//! When a node tries its controllers again, and which.
//!
//! A controller that does not answer must be found soon after it is back, and by all nodes at once: how soon follows from how
//! many they are.

use std::time::Duration;

use rand::{RngExt as _, SeedableRng as _, rngs::Xoshiro256PlusPlus};

/// The first pause; each later one is twice as long.
pub const PAUSE_MIN: Duration = Duration::from_millis(500);

/// The longest pause after a controller that was there and did not serve: 100,000 nodes that come back at once are then
/// 3,300 handshakes a second.
pub const PAUSE_MAX: Duration = Duration::from_secs(30);

/// Attempts a second, of all nodes together, at a controller that is not there: so many handshakes a second it has when it
/// is back, some 0.3 ms of a processor each, or a whole one.
const ATTEMPTS_PER_S: usize = 3_300;

/// The longest pause of the nodes of a small mesh: below, an attempt a second costs nobody anything.
const UNREACHABLE_PAUSE_MIN: Duration = Duration::from_secs(1);

/// A connection that held this long was good: the next attempt begins with the first pause.
pub const GOOD_CONNECTION: Duration = Duration::from_secs(10);

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// There was no TCP connection: the attempt cost no controller anything.
    Unreachable,
    /// There was one, for so long, and no controller (any more): it may have too much to do.
    Ended(Duration),
}

/// The controllers, one after the other: any of them will do.
#[derive(Debug)]
pub struct Retry {
    controllers: usize,
    current: usize,
    /// How many failed since one was good.
    failed: usize,
    pause: Duration,
    dice: Xoshiro256PlusPlus,
}

/// The longest pause after attempts at controllers that are not there, in a mesh of so many nodes: 1 s up to 3,300 of them,
/// 3 s of 10,000, 30 s of 100,000.
#[must_use]
pub fn unreachable_pause_max(nodes: usize) -> Duration {
    let spread = Duration::from_millis((nodes * 1_000 / ATTEMPTS_PER_S) as u64);
    spread.clamp(UNREACHABLE_PAUSE_MIN, PAUSE_MAX)
}

impl Retry {
    /// Begins with any, so that not all nodes begin with the same.
    #[must_use]
    pub fn new(controllers: usize, seed: u64) -> Self {
        let mut dice = Xoshiro256PlusPlus::seed_from_u64(seed);
        Self {
            controllers: controllers.max(1),
            current: dice.random_range(0..controllers.max(1)),
            failed: 0,
            pause: PAUSE_MIN,
            dice,
        }
    }

    /// The place of the one whose turn it is.
    #[must_use]
    pub fn current(&self) -> usize {
        self.current
    }

    /// Turns to the next one, and says how long to wait before it is tried, in a mesh of so many nodes: the pause grows only once
    /// all of them failed. `longest`, where the way out costs: instead of the usual longest pause.
    pub fn handle_failure(
        &mut self,
        failure: Failure,
        nodes: usize,
        longest: Option<Duration>,
    ) -> Duration {
        if matches!(failure, Failure::Ended(lasted) if lasted > GOOD_CONNECTION) {
            self.handle_success();
        }
        self.current = (self.current + 1) % self.controllers;
        self.failed += 1;
        if self.failed < self.controllers {
            return self.by_chance(PAUSE_MIN);
        }
        self.failed = 0;
        let usual = match failure {
            Failure::Unreachable => unreachable_pause_max(nodes),
            Failure::Ended(_) => PAUSE_MAX,
        };
        let longest = longest.unwrap_or(usual);
        let pause = self.pause.min(longest);
        self.pause = (pause * 2).min(longest);
        self.by_chance(pause)
    }

    /// The current one was good, or the network is another: what failed before says nothing any more.
    pub fn handle_success(&mut self) {
        self.failed = 0;
        self.pause = PAUSE_MIN;
    }

    /// How long to wait before something that many nodes do at the same moment, such as to try a controller because they
    /// hear from outside again.
    pub fn spread(&mut self, nodes: usize) -> Duration {
        let window = nodes * 1_000 / ATTEMPTS_PER_S;
        let window = Duration::from_millis(window as u64).min(PAUSE_MAX);
        window.mul_f64(self.dice.random_range(0.0..1.0))
    }

    /// Half of it at least, so that nodes that failed together do not come together.
    fn by_chance(&mut self, pause: Duration) -> Duration {
        pause.mul_f64(self.dice.random_range(0.5..1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FEW: usize = 10;
    const REFUSED: Failure = Failure::Ended(Duration::ZERO);

    /// Pauses are by chance: the shortest and the longest of them.
    #[track_caller]
    fn between(pause: Duration, whole: Duration) {
        assert!(
            (whole / 2..=whole).contains(&pause),
            "{pause:?} of {whole:?}"
        );
    }

    #[test]
    fn every_controller_is_tried_before_the_pause_grows() {
        let mut retry = Retry::new(3, 1);
        let (mut tried, mut pauses) = (Vec::new(), Vec::new());
        for _ in 0..6 {
            tried.push(retry.current());
            pauses.push(retry.handle_failure(REFUSED, FEW, None));
        }
        assert_eq!(tried[..3], tried[3..]);
        tried.truncate(3);
        tried.sort_unstable();
        assert_eq!(tried, [0, 1, 2]);
        for (pause, whole) in pauses.into_iter().zip([500, 500, 500, 500, 500, 1000]) {
            between(pause, Duration::from_millis(whole));
        }
        // One that was good for long is left for the next at once.
        let pause = retry.handle_failure(Failure::Ended(GOOD_CONNECTION * 2), FEW, None);
        between(pause, PAUSE_MIN);
        assert_eq!(Retry::new(0, 1).current(), 0);
    }

    #[test]
    fn what_failed_before_one_was_good_counts_no_more() {
        let mut retry = Retry::new(1, 1);
        for _ in 0..4 {
            retry.handle_failure(REFUSED, FEW, None);
        }
        let good = Failure::Ended(GOOD_CONNECTION * 2);
        for (failure, whole) in [(good, PAUSE_MIN), (REFUSED, PAUSE_MIN * 2)] {
            between(retry.handle_failure(failure, FEW, None), whole);
        }
        // Two of three failed before.
        let mut retry = Retry::new(3, 1);
        let mut fail = |times, whole| {
            for _ in 0..times {
                between(retry.handle_failure(REFUSED, FEW, None), whole);
            }
            retry.handle_success();
        };
        fail(2, PAUSE_MIN);
        fail(5, PAUSE_MIN);
    }

    #[test]
    fn who_is_there_and_does_not_serve_is_asked_ever_more_rarely() {
        let mut retry = Retry::new(1, 1);
        for whole in [500, 1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000] {
            let pause = retry.handle_failure(REFUSED, FEW, None);
            between(pause, Duration::from_millis(whole));
        }
        // Where each attempt costs, another longest pause holds, whoever is there.
        let hour = Duration::from_secs(3_600);
        for failure in [REFUSED, Failure::Unreachable] {
            let pauses = (0..20).map(|_| retry.handle_failure(failure, FEW, Some(hour)));
            between(pauses.max().unwrap(), hour);
        }
    }

    #[test]
    fn who_is_not_there_is_looked_for_as_often_as_the_mesh_is_small() {
        for (nodes, longest_ms) in [
            (0, 1_000),
            (3_300, 1_000),
            (10_000, 3_030),
            (100_000, 30_000),
            (1_000_000, 30_000),
        ] {
            let longest = Duration::from_millis(longest_ms);
            assert_eq!(unreachable_pause_max(nodes), longest, "{nodes}");
            let mut retry = Retry::new(1, 1);
            let pauses = (0..50).map(|_| retry.handle_failure(Failure::Unreachable, nodes, None));
            between(pauses.max().unwrap(), longest);
        }
        // A long pause from before does not outlast the first attempt that finds nobody.
        let mut retry = Retry::new(1, 1);
        for _ in 0..10 {
            retry.handle_failure(REFUSED, FEW, None);
        }
        let pause = retry.handle_failure(Failure::Unreachable, FEW, None);
        between(pause, UNREACHABLE_PAUSE_MIN);
    }

    /// In virtual time: all nodes lost their controller at once, and it is back ten minutes later.
    #[test]
    fn a_controller_that_is_back_is_found_soon_and_not_trampled_down() {
        let back = Duration::from_secs(600);
        for (nodes, found_within_s, most_a_second) in
            [(3, 1, 3), (3_300, 1, 6_600), (10_000, 4, 6_600)]
        {
            let arrivals = (0..nodes).map(|seed| {
                let (mut retry, mut now) = (Retry::new(1, seed as u64), Duration::ZERO);
                while now < back {
                    now += retry.handle_failure(Failure::Unreachable, nodes, None);
                }
                (now - back).as_millis()
            });
            let mut arrivals: Vec<_> = arrivals.collect();
            arrivals.sort_unstable();
            let last = arrivals[nodes - 1];
            assert!(last <= found_within_s * 1_000, "{nodes}: {last} ms");
            let in_a_second = |&at: &u128| {
                let begin = arrivals.partition_point(|&other| other + 1_000 <= at);
                arrivals.partition_point(|&other| other <= at) - begin
            };
            let most = arrivals.iter().map(in_a_second).max().unwrap();
            assert!(most <= most_a_second, "{nodes}: {most} in a second");
            let spread = (0..nodes).map(|seed| Retry::new(1, seed as u64).spread(nodes));
            assert!(
                spread.max().unwrap() < unreachable_pause_max(nodes),
                "{nodes}"
            );
        }
    }
}
