//! The two state machines of `paths.md` as tables: what each event makes of each state.
//!
//! Who raises an event has decided that it happened; the table says what follows. Nothing else
//! changes a state, so every change is counted and kept (`Changes`).

use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

use mesh_wire::id::Via;

use crate::{
    io::{PeerState, Reason},
    node::{
        path::PathState,
        report::{PathTransition, TRANSITIONS_MAX, Transition, TransitionCounts},
    },
};

/// What happens to a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PathEvent {
    /// A round of probes begins.
    ProbingBegan,
    /// An echo came back by it, of the size that its kind demands.
    Proven,
    /// The traffic goes by it now.
    Taken,
    /// The traffic goes by another one now.
    Left,
    /// Nothing came back in time, and two fast probes were lost.
    Doubted,
    /// Something came back after all.
    Cleared,
    /// A whole round of probes, or three checks of a standby, remained unanswered.
    Unanswered,
    /// Its link, or the peer, is known to be gone.
    Gone,
}

/// What happens to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PeerEvent {
    /// It is being called.
    Called,
    /// Traffic goes through a relay.
    OnRelay,
    /// Traffic goes directly.
    OnDirect,
    /// The way in use is in doubt.
    Doubted,
    /// No way works any more.
    Lost,
    /// Calling it was in vain for long enough.
    GivenUp,
    /// It said goodbye.
    SaidGoodbye,
    /// Nobody has needed it for long enough.
    Unused,
}

impl PathState {
    /// Every state.
    pub const ALL: [Self; 6] = [
        Self::Candidate,
        Self::Probing,
        Self::Standby,
        Self::Primary,
        Self::Suspect,
        Self::Dead,
    ];

    /// The state after `event`; `None`: it means nothing in this state.
    #[must_use]
    pub fn after(self, event: PathEvent) -> Option<Self> {
        use PathEvent as E;
        match (self, event) {
            (Self::Candidate | Self::Dead, E::ProbingBegan) => Some(Self::Probing),
            (Self::Candidate | Self::Probing | Self::Dead, E::Proven) => Some(Self::Standby),
            (
                Self::Candidate | Self::Probing | Self::Standby | Self::Suspect | Self::Dead,
                E::Taken,
            ) => Some(Self::Primary),
            (Self::Primary | Self::Suspect, E::Left) => Some(Self::Standby),
            (Self::Primary, E::Doubted) => Some(Self::Suspect),
            (Self::Suspect, E::Cleared) => Some(Self::Primary),
            (Self::Probing | Self::Standby | Self::Suspect, E::Unanswered) => Some(Self::Dead),
            (
                Self::Candidate | Self::Probing | Self::Standby | Self::Primary | Self::Suspect,
                E::Gone,
            ) => Some(Self::Dead),
            (Self::Probing | Self::Standby | Self::Primary | Self::Suspect, E::ProbingBegan)
            | (Self::Standby | Self::Primary | Self::Suspect, E::Proven)
            | (Self::Primary, E::Taken)
            | (Self::Candidate | Self::Probing | Self::Standby | Self::Dead, E::Left)
            | (
                Self::Candidate | Self::Probing | Self::Standby | Self::Suspect | Self::Dead,
                E::Doubted,
            )
            | (
                Self::Candidate | Self::Probing | Self::Standby | Self::Primary | Self::Dead,
                E::Cleared,
            )
            | (Self::Candidate | Self::Primary | Self::Dead, E::Unanswered)
            | (Self::Dead, E::Gone) => None,
        }
    }
}

impl PeerState {
    /// Every state.
    pub const ALL: [Self; 6] = [
        Self::Idle,
        Self::Waking,
        Self::Relayed,
        Self::Direct,
        Self::Suspect,
        Self::Unreachable,
    ];

    /// The state after `event`; `None`: it means nothing in this state.
    #[must_use]
    pub fn after(self, event: PeerEvent) -> Option<Self> {
        use PeerEvent as E;
        match (self, event) {
            (Self::Idle | Self::Unreachable, E::Called) => Some(Self::Waking),
            (
                Self::Idle | Self::Waking | Self::Direct | Self::Suspect | Self::Unreachable,
                E::OnRelay,
            ) => Some(Self::Relayed),
            (
                Self::Idle | Self::Waking | Self::Relayed | Self::Suspect | Self::Unreachable,
                E::OnDirect,
            ) => Some(Self::Direct),
            (Self::Relayed | Self::Direct, E::Doubted) => Some(Self::Suspect),
            (Self::Relayed | Self::Direct | Self::Suspect, E::Lost) => Some(Self::Waking),
            (Self::Waking, E::GivenUp) => Some(Self::Unreachable),
            (Self::Waking | Self::Relayed | Self::Direct | Self::Suspect, E::SaidGoodbye) => {
                Some(Self::Unreachable)
            }
            (
                Self::Waking | Self::Relayed | Self::Direct | Self::Suspect | Self::Unreachable,
                E::Unused,
            ) => Some(Self::Idle),
            (Self::Waking | Self::Relayed | Self::Direct | Self::Suspect, E::Called)
            | (Self::Relayed, E::OnRelay)
            | (Self::Direct, E::OnDirect)
            | (Self::Idle | Self::Waking | Self::Suspect | Self::Unreachable, E::Doubted)
            | (Self::Idle | Self::Waking | Self::Unreachable, E::Lost)
            | (
                Self::Idle | Self::Relayed | Self::Direct | Self::Suspect | Self::Unreachable,
                E::GivenUp,
            )
            | (Self::Idle | Self::Unreachable, E::SaidGoodbye)
            | (Self::Idle, E::Unused) => None,
        }
    }
}

/// The last changes of one peer and of its paths, and how many there were of each kind since
/// somebody asked.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    pub(crate) peer: VecDeque<Transition>,
    pub(crate) paths: VecDeque<PathTransition>,
    pub(crate) counts: TransitionCounts,
}

impl Changes {
    pub(crate) fn note_peer(
        &mut self,
        at: Instant,
        (from, to): (PeerState, PeerState),
        reason: Reason,
    ) {
        *self.counts.peers.entry((from, to)).or_default() += 1;
        push(
            &mut self.peer,
            Transition {
                at,
                from,
                to,
                reason,
            },
        );
    }

    pub(crate) fn note_path(&mut self, via: Via, change: PathChange) {
        let PathChange {
            at,
            from,
            to,
            event,
        } = change;
        *self.counts.paths.entry((from, to)).or_default() += 1;
        push(
            &mut self.paths,
            PathTransition {
                at,
                via,
                from,
                to,
                event,
            },
        );
    }
}

fn push<T>(kept: &mut VecDeque<T>, new: T) {
    if kept.len() == TRANSITIONS_MAX {
        kept.pop_front(); // The counts remember that it was.
    }
    kept.push_back(new);
}

/// A change of one path's state, before its peer has taken note of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PathChange {
    pub(crate) at: Instant,
    pub(crate) from: PathState,
    pub(crate) to: PathState,
    pub(crate) event: PathEvent,
}

impl TransitionCounts {
    /// Adds what `other` counted.
    pub(crate) fn add(&mut self, other: &Self) {
        add(&mut self.peers, &other.peers);
        add(&mut self.paths, &other.paths);
    }
}

fn add<K: Ord + Copy>(sums: &mut BTreeMap<K, u64>, more: &BTreeMap<K, u64>) {
    for (&key, count) in more {
        *sums.entry(key).or_default() += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each row: an event, and what it makes of each state in the order of `ALL`. A dash: ignored.
    fn check<S: Copy + PartialEq + std::fmt::Debug, E: Copy + std::fmt::Debug>(
        states: &[S; 6],
        letters: &str,
        table: &[(E, &str)],
        after: impl Fn(S, E) -> Option<S>,
    ) {
        for &(event, row) in table {
            assert_eq!(row.len(), states.len(), "{event:?}");
            for (&state, want) in states.iter().zip(row.chars()) {
                let want = letters.find(want).map(|index| states[index]);
                assert_eq!(after(state, event), want, "{state:?} and {event:?}");
                assert_ne!(want, Some(state), "a change to itself is none");
            }
        }
    }

    #[test]
    fn every_event_in_every_state_of_a_path() {
        use PathEvent::{Cleared, Doubted, Gone, Left, ProbingBegan, Proven, Taken, Unanswered};
        // Candidate, Probing (O), Standby, Primary (P), Suspect (U), Dead.
        let table = [
            (ProbingBegan, "O----O"),
            (Proven, "SS---S"),
            (Taken, "PPP-PP"),
            (Left, "---SS-"),
            (Doubted, "---U--"),
            (Cleared, "----P-"),
            (Unanswered, "-DD-D-"),
            (Gone, "DDDDD-"),
        ];
        check(&PathState::ALL, "COSPUD", &table, PathState::after);
    }

    #[test]
    fn every_event_in_every_state_of_a_peer() {
        use PeerEvent::{Called, Doubted, GivenUp, Lost, OnDirect, OnRelay, SaidGoodbye, Unused};
        // Idle, Waking, Relayed, Direct, Suspect, Unreachable (X).
        let table = [
            (Called, "W----W"),
            (OnRelay, "RR-RRR"),
            (OnDirect, "DDD-DD"),
            (Doubted, "--SS--"),
            (Lost, "--WWW-"),
            (GivenUp, "-X----"),
            (SaidGoodbye, "-XXXX-"),
            (Unused, "-IIIII"),
        ];
        check(&PeerState::ALL, "IWRDSX", &table, PeerState::after);
    }

    #[test]
    fn the_last_fifty_are_kept_and_all_are_counted() {
        let mut changes = Changes::default();
        let at = crate::node::tests::at(0);
        for _ in 0..TRANSITIONS_MAX + 10 {
            let states = (PeerState::Idle, PeerState::Waking);
            changes.note_peer(at, states, Reason::Wanted);
            let (from, to) = (PathState::Candidate, PathState::Probing);
            let event = PathEvent::ProbingBegan;
            let change = PathChange {
                at,
                from,
                to,
                event,
            };
            changes.note_path(Via::Relay(mesh_wire::id::RelayId(1)), change);
        }
        assert_eq!(
            (changes.peer.len(), changes.paths.len()),
            (TRANSITIONS_MAX, TRANSITIONS_MAX)
        );
        let mut sums = TransitionCounts::default();
        sums.add(&changes.counts);
        let all = TRANSITIONS_MAX as u64 + 10;
        assert_eq!(sums.peers[&(PeerState::Idle, PeerState::Waking)], all);
        assert_eq!(sums.paths[&(PathState::Candidate, PathState::Probing)], all);
    }
}
