//! Whom of its LAN a node asks for a newer state of the mesh, and when; and whom it answers.
//!
//! A node asks only while no controller speaks with it, only one other at a time, and only who announced a newer state. So
//! nothing that a neighbour says takes the place of what a controller says, and no state is passed on twice.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use mesh_wire::id::{NodeId, NodeName};
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// Who.
    pub node: NodeId,
    /// By which name its certificate has to know it.
    pub name: NodeName,
    /// Where.
    pub address: SocketAddr,
}

/// What a neighbour announced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Where it can be asked, and who it is.
    pub ask: Ask,
    /// What it has.
    pub version: Version,
}

#[derive(Debug, Clone)]
struct Known {
    name: NodeName,
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
    offers: BTreeMap<NodeId, Known>,
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
    pub fn handle_offer(&mut self, Offer { ask, version }: Offer, now: Instant) {
        let Ask {
            node,
            name,
            address,
        } = ask;
        let ask_at = now + ASK_WITHIN.mul_f64(self.dice.random_range(0.0..1.0));
        if let Some(known) = self.offers.get_mut(&node) {
            // Something new may be asked for at once, but not of who was distrusted.
            if version > known.version && known.failures == 0 {
                known.not_before = ask_at;
            }
            (known.name, known.address) = (name, address);
            (known.version, known.heard_at) = (version, now);
            return;
        }
        if self.offers.len() >= OFFERS_MAX {
            let oldest = self.offers.iter().min_by_key(|(_, offer)| offer.heard_at);
            if let Some(oldest) = oldest.map(|(node, _)| *node) {
                self.offers.remove(&oldest);
            }
        }
        let offer = Known {
            name,
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
        // Who is distrusted is not forgotten by saying nothing.
        self.offers
            .retain(|_, offer| now < offer.not_before.max(offer.heard_at + OFFER_AGE_MAX));
        let due = |offer: &Known| offer.version > self.own && offer.not_before <= now;
        let best = self.offers.values().filter(|offer| due(offer));
        let best = best.map(|offer| offer.version).max()?;
        let offers = self.offers.iter();
        let mut equal: Vec<_> = offers
            .filter(|(_, offer)| offer.version == best && due(offer))
            .map(|(node, offer)| Ask {
                node: *node,
                name: offer.name.clone(),
                address: offer.address,
            })
            .collect();
        let chosen = equal.swap_remove(self.dice.random_range(0..equal.len()));
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

/// Whom this node answers: who asked a moment ago is not answered again.
#[derive(Debug, Default)]
pub struct Answers {
    last: BTreeMap<NodeId, Instant>,
}

impl Answers {
    /// Whether a neighbour that asks is to be answered. Beyond as many as one LAN has, nobody new is.
    pub fn handle_request(&mut self, node: NodeId, now: Instant) -> bool {
        self.last.retain(|_, at| now < *at + ANSWER_EVERY);
        if self.last.contains_key(&node) || self.last.len() >= OFFERS_MAX {
            return false;
        }
        self.last.insert(node, now);
        true
    }
}

#[cfg(test)]
mod tests;
