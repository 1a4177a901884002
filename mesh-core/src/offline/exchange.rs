//! Whom of its LAN a node asks for a newer state of the mesh, and when; and whom it answers.
//!
//! A node asks only while no controller speaks with it, only one other at a time, and only who announced a newer state. So
//! nothing that a neighbour says takes the place of what a controller says, and no state is passed on twice.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use mesh_wire::id::NodeId;
use rand::{RngExt as _, SeedableRng as _, rngs::Xoshiro256PlusPlus};

use super::Version;

/// For so long a controller is waited for before a neighbour is asked: one that is there has spoken by then.
const CONTROLLER_FIRST: Duration = Duration::from_secs(2);

/// Whoever hears of a newer state asks within this, by chance: not all of a LAN at once.
const ASK_WITHIN: Duration = Duration::from_secs(1);

/// Pause before a neighbour that did not answer is asked again, doubled each time, and the longest.
const RETRY_MIN: Duration = Duration::from_secs(5);
const RETRY_MAX: Duration = Duration::from_secs(300);

/// For so long a neighbour is not asked again that gave what is not signed, or not what it announced.
const DISTRUST: Duration = Duration::from_secs(3600);

/// An announcement counts for so long: three of the regular ones.
const OFFER_AGE_MAX: Duration = Duration::from_secs(900);

/// Neighbours whose announcements are remembered: as many as announcements are remembered of.
pub const OFFERS_MAX: usize = 512;

/// How many neighbours are answered at once. An answer is in memory until it is taken: at most 64 MiB each.
pub const ANSWERS_MAX: usize = 2;

/// How often the same neighbour is answered at most: it asks again only if something went wrong.
const ANSWER_EVERY: Duration = Duration::from_secs(3);

/// What became of asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Its state is this node's now.
    Taken,
    /// It could not be asked, or said no.
    Failed,
    /// What it gave is not signed, or is no newer.
    Distrusted,
}

/// Whom to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// Who.
    pub node: NodeId,
    /// Where.
    pub address: SocketAddr,
}

#[derive(Debug, Clone, Copy)]
struct Offer {
    address: SocketAddr,
    version: Version,
    heard_at: Instant,
    not_before: Instant,
    failures: u32,
}

/// Decides for one node.
#[derive(Debug)]
pub struct Exchange {
    own: Version,
    /// Since when no controller speaks; `None`: one does.
    alone_since: Option<Instant>,
    offers: BTreeMap<NodeId, Offer>,
    asking: Option<NodeId>,
    dice: Xoshiro256PlusPlus,
}

impl Exchange {
    /// Of a node that has this state and heard of no controller yet.
    #[must_use]
    pub fn new(own: Version, seed: u64, now: Instant) -> Self {
        Self {
            own,
            alone_since: Some(now),
            offers: BTreeMap::new(),
            asking: None,
            dice: Xoshiro256PlusPlus::seed_from_u64(seed),
        }
    }

    /// A controller speaks with this node, or does so no more.
    pub fn handle_controller(&mut self, speaks: bool, now: Instant) {
        self.alone_since = match (speaks, self.alone_since) {
            (true, _) => None,
            (false, None) => Some(now),
            (false, since) => since,
        };
    }

    /// This node has another state.
    pub fn handle_own(&mut self, version: Version) {
        self.own = version;
    }

    /// A neighbour announced, and proved to be who it is.
    pub fn handle_offer(
        &mut self,
        node: NodeId,
        address: SocketAddr,
        version: Version,
        now: Instant,
    ) {
        let ask_at = now + ASK_WITHIN.mul_f64(self.dice.random_range(0.0..1.0));
        if let Some(known) = self.offers.get_mut(&node) {
            // Something new may be asked for at once, but not of who was distrusted.
            if version > known.version && known.failures == 0 {
                known.not_before = ask_at;
            }
            (known.address, known.version, known.heard_at) = (address, version, now);
            return;
        }
        if self.offers.len() >= OFFERS_MAX {
            let oldest = self.offers.iter().min_by_key(|(_, offer)| offer.heard_at);
            if let Some(oldest) = oldest.map(|(node, _)| *node) {
                self.offers.remove(&oldest);
            }
        }
        let offer = Offer {
            address,
            version,
            heard_at: now,
            not_before: ask_at,
            failures: 0,
        };
        self.offers.insert(node, offer);
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let alone = self.alone_since?;
        if self.asking.is_some() {
            return None;
        }
        let newer = self
            .offers
            .values()
            .filter(|offer| offer.version > self.own);
        let newer = newer.filter(|offer| offer.not_before < offer.heard_at + OFFER_AGE_MAX);
        let due = newer.map(|offer| offer.not_before).min()?;
        Some(due.max(alone + CONTROLLER_FIRST))
    }

    /// The deadline has come. Says whom to ask now, if anybody; [`Self::handle_outcome`] has to follow.
    pub fn handle_timeout(&mut self, now: Instant) -> Option<Ask> {
        if self.poll_timeout().is_none_or(|due| due > now) {
            return None;
        }
        self.offers
            .retain(|_, offer| now < offer.heard_at + OFFER_AGE_MAX);
        let due = |offer: &Offer| offer.version > self.own && offer.not_before <= now;
        let best = self.offers.values().filter(|offer| due(offer));
        let best = best.map(|offer| offer.version).max()?;
        let offers = self.offers.iter();
        let equal: Vec<_> = offers
            .filter(|(_, offer)| offer.version == best && due(offer))
            .map(|(node, offer)| Ask {
                node: *node,
                address: offer.address,
            })
            .collect();
        let chosen = *equal.get(self.dice.random_range(0..equal.len().max(1)))?;
        self.asking = Some(chosen.node);
        Some(chosen)
    }

    /// What became of asking.
    pub fn handle_outcome(&mut self, node: NodeId, outcome: Outcome, now: Instant) {
        self.asking = None;
        let Some(offer) = self.offers.get_mut(&node) else {
            return;
        };
        let pause = match outcome {
            Outcome::Taken => {
                offer.failures = 0;
                return;
            }
            Outcome::Failed => RETRY_MIN * 2_u32.saturating_pow(offer.failures.min(16)),
            Outcome::Distrusted => DISTRUST,
        };
        offer.failures = offer.failures.saturating_add(1);
        let longest = match outcome {
            Outcome::Distrusted => DISTRUST,
            Outcome::Taken | Outcome::Failed => RETRY_MAX,
        };
        offer.not_before = now + pause.min(longest);
    }
}

/// Why a neighbour is not answered now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unanswered {
    /// It asks again too soon.
    #[error("asked again within {ANSWER_EVERY:?}")]
    TooOften,
    /// Others are answered.
    #[error("{ANSWERS_MAX} others are answered now")]
    Busy,
}

/// Whom this node answers.
#[derive(Debug, Default)]
pub struct Answers {
    under_way: usize,
    /// When each was answered last; as many as one LAN has.
    last: BTreeMap<NodeId, Instant>,
}

impl Answers {
    /// A neighbour asks. [`Self::handle_end`] has to follow once it is answered.
    ///
    /// # Errors
    ///
    /// [`Unanswered`]: it is to ask another, or again later.
    pub fn handle_request(&mut self, node: NodeId, now: Instant) -> Result<(), Unanswered> {
        self.last.retain(|_, at| now < *at + ANSWER_EVERY);
        if self.last.contains_key(&node) {
            return Err(Unanswered::TooOften);
        }
        if self.under_way >= ANSWERS_MAX || self.last.len() >= OFFERS_MAX {
            return Err(Unanswered::Busy);
        }
        self.under_way += 1;
        self.last.insert(node, now);
        Ok(())
    }

    /// One answer is over, taken or not.
    pub fn handle_end(&mut self) {
        self.under_way = self.under_way.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests;
