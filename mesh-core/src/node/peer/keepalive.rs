//! How long a NAT between the two keeps a mapping that nobody uses (`paths.md`: "idle 25 s or the learned
//! NAT lifetime").
//!
//! Silence is stretched step by step while keepalives after it are answered, until one is not and the path
//! turns out to be dead, though the peer is not. From then on it is never as long again on this network.

use std::time::Duration;

/// The first silence: shorter than what the shortest-lived common NATs grant (30 s).
const FIRST: Duration = Duration::from_secs(25);

/// The shortest: a NAT that forgets sooner would cost more than it is worth.
const LEAST: Duration = Duration::from_secs(10);

/// The longest: below the 120 s that Linux grants a stream.
const MOST: Duration = Duration::from_secs(110);

/// What is known of the NATs on the way to one peer.
#[derive(Debug)]
pub(super) struct Keepalive {
    every: Duration,
    /// A silence after which the path still worked.
    survived: Duration,
    /// The shortest after which it did not.
    too_long: Option<Duration>,
    /// A keepalive waits for its answer, after so much silence.
    asked: Option<Duration>,
}

impl Default for Keepalive {
    fn default() -> Self {
        Self {
            every: FIRST,
            survived: Duration::ZERO,
            too_long: None,
            asked: None,
        }
    }
}

impl Keepalive {
    /// How long the path may be silent.
    pub(super) fn every(&self) -> Duration {
        self.every
    }

    /// A keepalive goes out after the path was silent for so long.
    pub(super) fn on_sent(&mut self, silence: Duration) {
        self.asked = Some(silence);
    }

    /// An answer came by the path; `moved`: the peer sees another address than before the silence.
    pub(super) fn on_answered(&mut self, moved: bool) {
        let Some(silence) = self.asked.take() else {
            return;
        };
        if moved {
            return self.learn(silence);
        }
        self.survived = self.survived.max(silence);
        let next = (self.every * 3 / 2).min(MOST);
        // Half of what is left to be known is not worth another dead path.
        let known = |too_long: Duration| next >= too_long;
        if !self.too_long.is_some_and(known) {
            self.every = next;
        }
    }

    /// The path is dead, and the peer is not.
    pub(super) fn on_dead(&mut self) {
        if let Some(silence) = self.asked.take() {
            self.learn(silence);
        }
    }

    fn learn(&mut self, silence: Duration) {
        let too_long = self.too_long.map_or(silence, |known| known.min(silence));
        self.too_long = Some(too_long);
        if self.survived >= too_long {
            self.survived = Duration::ZERO; // It was another NAT, or a lucky one.
        }
        self.every = match self.survived.is_zero() {
            true => (too_long * 3 / 5).max(LEAST),
            false => self.survived,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The silences before each keepalive, on a path whose NAT forgets after so long.
    fn silences(lifetime_s: u64, moved: bool) -> Vec<u64> {
        let mut keepalive = Keepalive::default();
        let silences = (0..10).map(|_| {
            let silence = keepalive.every();
            keepalive.on_sent(silence);
            match silence.as_secs() < lifetime_s {
                true => keepalive.on_answered(false),
                false if moved => keepalive.on_answered(true),
                false => keepalive.on_dead(),
            }
            silence.as_secs()
        });
        silences.collect()
    }

    #[test]
    fn the_lifetime_of_a_mapping_is_learned_and_not_tried_again() {
        // A NAT's lifetime in seconds, the silences.
        let table = [
            (180, [25, 37, 56, 84, 110, 110, 110, 110, 110, 110]),
            (60, [25, 37, 56, 84, 56, 56, 56, 56, 56, 56]),
            (30, [25, 37, 25, 25, 25, 25, 25, 25, 25, 25]),
            (20, [25, 15, 22, 15, 15, 15, 15, 15, 15, 15]),
            (5, [25, 15, 10, 10, 10, 10, 10, 10, 10, 10]),
        ];
        for (lifetime_s, want) in table {
            for moved in [false, true] {
                assert_eq!(silences(lifetime_s, moved), want, "{lifetime_s} s");
            }
        }
    }

    #[test]
    fn an_answer_to_no_keepalive_and_a_death_without_one_teach_nothing() {
        let mut keepalive = Keepalive::default();
        keepalive.on_answered(false);
        keepalive.on_dead();
        assert_eq!(keepalive.every(), FIRST);
    }
}
