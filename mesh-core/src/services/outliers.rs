//! Endpoints to which connects fail: taken out for a while, and tried again.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::{Duration, Instant},
};

/// Connects that fail one after the other until an endpoint is ejected (Envoy's
/// `consecutive_5xx` and HAProxy's `error-limit` are 5 and 10 by default).
const FAILURES_MAX: u32 = 5;

/// How long an endpoint is out the first time; twice as long each time that its trial fails.
const EJECTION_MIN: Duration = Duration::from_secs(10);

/// How long it is out at most.
const EJECTION_MAX: Duration = Duration::from_secs(300);

/// What is heard nothing of for so long is forgotten: a trial that nobody made, failures that did not go on.
const FORGET: Duration = Duration::from_secs(600);

/// Endpoints remembered at once: 1,024 × some 150 bytes. Others are not ejected until one is forgotten.
const OUTLIERS_MAX: usize = 1_024;

/// While nothing is suspicious, the time between one look and the next is watched once in so often: to
/// count costs each connect of the node some 3 %.
const WATCHED_EVERY: u32 = 5;

/// How connects to an endpoint ended, as the kernel counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Failures {
    /// How many failed, in all.
    pub failed: u64,
    /// How many since the last one that did not.
    pub in_a_row: u32,
}

#[derive(Debug)]
enum State {
    /// Connects to it failed, too few for more.
    Watched,
    /// It takes no new flows.
    Ejected { until: Instant },
    /// It takes new flows: the first that ends says whether it goes out again.
    OnTrial,
}

#[derive(Debug)]
struct Outlier {
    state: State,
    /// How often it was ejected since a connect last went well.
    ejections: u32,
    seen: Failures,
    changed: Instant,
}

/// Which endpoints are ejected, by what is counted of connects to them. At most so many of a service are
/// left out as its table allows; here each is judged by itself.
#[derive(Debug, Default)]
pub struct Outliers {
    outliers: BTreeMap<SocketAddr, Outlier>,
    ejected: BTreeSet<SocketAddr>,
    looks: u32,
}

impl Outliers {
    /// Takes what is counted of every endpoint to which a connect ever failed. Returns those of which
    /// nothing need be counted any more.
    pub fn handle_counts(
        &mut self,
        counts: &BTreeMap<SocketAddr, Failures>,
        now: Instant,
    ) -> BTreeSet<SocketAddr> {
        self.looks = self.looks.wrapping_add(1);
        for (&endpoint, &seen) in counts {
            let room = self.outliers.len() < OUTLIERS_MAX;
            if seen.in_a_row > 0 && room {
                self.outliers.entry(endpoint).or_insert(Outlier {
                    state: State::Watched,
                    ejections: 0,
                    seen: Failures::default(),
                    changed: now,
                });
            }
        }
        let nothing = Failures::default();
        let mut over = BTreeSet::new();
        self.outliers.retain(|&endpoint, outlier| {
            outlier.look(counts.get(&endpoint).copied().unwrap_or(nothing), now);
            let stays = !outlier.is_over(now);
            if !stays {
                over.insert(endpoint);
            }
            stays
        });
        let ejected = self.outliers.iter();
        let ejected = ejected.filter(|(_, one)| matches!(one.state, State::Ejected { .. }));
        self.ejected = ejected.map(|(&endpoint, _)| endpoint).collect();
        let well = counts.iter().filter(|(_, seen)| seen.in_a_row == 0);
        let well = well.map(|(&endpoint, _)| endpoint);
        over.extend(well.filter(|endpoint| !self.outliers.contains_key(endpoint)));
        over
    }

    /// Whether connects are to be counted until the next look.
    #[must_use]
    pub fn watches(&self) -> bool {
        !self.outliers.is_empty() || self.looks.is_multiple_of(WATCHED_EVERY)
    }

    /// Which endpoints new flows keep away from.
    #[must_use]
    pub fn ejected(&self) -> &BTreeSet<SocketAddr> {
        &self.ejected
    }
}

impl Outlier {
    fn look(&mut self, now_seen: Failures, now: Instant) {
        let before = std::mem::replace(&mut self.seen, now_seen);
        let failed = now_seen.failed != before.failed;
        if failed || now_seen.in_a_row != before.in_a_row {
            self.changed = now;
        }
        self.state = match std::mem::replace(&mut self.state, State::Watched) {
            State::Watched if now_seen.in_a_row >= FAILURES_MAX => self.eject(now),
            State::Watched => State::Watched,
            // What fails now began before.
            State::Ejected { until } if now < until => State::Ejected { until },
            State::Ejected { .. } => {
                self.changed = now;
                State::OnTrial
            }
            State::OnTrial if now_seen.in_a_row < before.in_a_row => {
                self.ejections = 0;
                State::Watched
            }
            State::OnTrial if failed => self.eject(now),
            State::OnTrial => State::OnTrial,
        };
    }

    fn eject(&mut self, now: Instant) -> State {
        let length =
            EJECTION_MIN.saturating_mul(1_u32.checked_shl(self.ejections).unwrap_or(u32::MAX));
        self.ejections = self.ejections.saturating_add(1);
        State::Ejected {
            until: now + length.min(EJECTION_MAX),
        }
    }

    fn is_over(&self, now: Instant) -> bool {
        match self.state {
            State::Watched if self.seen.in_a_row == 0 => true,
            State::Watched | State::OnTrial => {
                now.saturating_duration_since(self.changed) >= FORGET
            }
            State::Ejected { .. } => false,
        }
    }
}

#[cfg(test)]
mod tests;
