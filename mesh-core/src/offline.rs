//! What a node decides about its desired state while no controller is there: which of two states is newer, whom of its LAN it
//! asks for a newer one, and how long what it has counts.

use crate::snapshot::Generation;

pub mod exchange;
pub mod limit;
pub mod local;
pub mod retry;

/// Which of two states of the mesh is newer, whichever controllers made them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Version {
    /// Raised by an operator who lets an older state count again: it comes before all times.
    pub epoch: u64,
    /// When its controller made it, in milliseconds since 1970 by that one's clock, and later than what that controller made before.
    /// Two controllers' clocks decide between their states; of one controller's states the later one is always newer.
    pub made_unix_ms: u64,
}

/// The epoch of each store until its operator lets an older state count.
const FIRST_EPOCH: u64 = 1;

/// Where a node stands in a controller's history.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Position {
    /// The controller's store; empty: nothing yet.
    pub store: Vec<u8>,
    /// The epoch of what it has; 0: not said.
    pub epoch: u64,
    /// Its generation there.
    pub generation: Generation,
}

/// A controller offers what is older than what the node has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "it offers generation {} of epoch {offered_epoch}, which is older than what this node has: generation {} of epoch {held_epoch}. Was it restored from a backup? To let what it has count, run `meshctl controller accept-rollback` there",
    offered.0,
    held.0
)]
pub struct RolledBack {
    /// What the node has.
    pub held: Generation,
    /// The epoch of that.
    pub held_epoch: u64,
    /// What it was offered.
    pub offered: Generation,
    /// The epoch of that.
    pub offered_epoch: u64,
}

impl Position {
    /// Whether a node that is here may go to what a controller offers. Generations of another store say nothing about age; a
    /// controller that says no epoch is older than epochs, and counts as being in the node's. What such a one told is of the
    /// first.
    ///
    /// # Errors
    ///
    /// [`RolledBack`]: what the node has stays in force.
    pub fn check(&self, offered: &Self) -> Result<(), RolledBack> {
        let held_epoch = self.epoch.max(FIRST_EPOCH);
        let epoch = match offered.epoch {
            0 => held_epoch,
            epoch => epoch,
        };
        let is_older = (epoch, offered.generation) < (held_epoch, self.generation);
        if offered.store == self.store && is_older {
            return Err(RolledBack {
                held: self.generation,
                held_epoch,
                offered: offered.generation,
                offered_epoch: epoch,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(store: &[u8], epoch: u64, generation: u64) -> Position {
        Position {
            store: store.to_vec(),
            epoch,
            generation: Generation(generation),
        }
    }

    #[test]
    fn only_what_is_older_in_the_same_history_is_refused() {
        let held = at(b"a", 2, 100);
        let cases = [
            ("the same", at(b"a", 2, 100), true),
            ("the next", at(b"a", 2, 101), true),
            ("an older one", at(b"a", 2, 99), false),
            (
                "an older epoch, whatever its number",
                at(b"a", 1, 500),
                false,
            ),
            ("an operator's word", at(b"a", 3, 1), true),
            ("another controller's count", at(b"b", 1, 1), true),
            ("a controller without epochs", at(b"a", 0, 101), true),
            ("an older one without epochs", at(b"a", 0, 99), false),
        ];
        for (name, offered, allowed) in cases {
            assert_eq!(held.check(&offered).is_ok(), allowed, "{name}");
        }
        let unsaid = at(b"a", 0, 100);
        assert!(unsaid.check(&at(b"a", 1, 99)).is_err() && unsaid.check(&at(b"a", 0, 99)).is_err());
        assert!(unsaid.check(&at(b"a", 1, 100)).is_ok() && unsaid.check(&at(b"a", 2, 1)).is_ok());
        assert_eq!(Position::default().check(&at(b"a", 1, 0)), Ok(()));
        let text = held.check(&at(b"a", 2, 99)).unwrap_err().to_string();
        assert!(
            text.contains("accept-rollback") && text.contains("generation 99"),
            "{text}"
        );
    }
}
