//! What the core tells people about itself.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use mesh_wire::{
    id::{NodeId, NodeName, RelayId, RelayName, Via},
    peer::{CandidateKind, NatKind},
};

use crate::{
    io::{PeerState, Reason, RelayTransport},
    node::{
        machine::PathEvent,
        path::{PathKind, PathState},
    },
};

/// A peer that was woken since the node started.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerReport {
    /// Its key.
    pub id: NodeId,
    /// Its name.
    pub name: NodeName,
    /// Its state.
    pub state: PeerState,
    /// Why; of a relayed peer, why it is not direct.
    pub reason: Reason,
    /// Whether new flows may go there.
    pub alive: bool,
    /// The path in use.
    pub via: Option<Via>,
    /// Smoothed round-trip time of the path in use.
    pub srtt: Option<Duration>,
    /// What it says of its NAT.
    pub nat: NatKind,
    /// Every known path.
    pub paths: Vec<PathReport>,
    /// The last [`TRANSITIONS_MAX`] changes of state, the oldest first.
    pub transitions: Vec<Transition>,
    /// The last [`TRANSITIONS_MAX`] changes of its paths' states, the oldest first.
    pub path_transitions: Vec<PathTransition>,
    /// When the next attempt at a (better) path is due.
    pub next_attempt: Option<Instant>,
}

/// Which of a peer's paths somebody asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathWish {
    /// The one in use.
    InUse,
    /// The best one without a relay.
    Direct,
    /// The best one through a relay of either sort.
    Relayed,
    /// This one.
    Only(Via),
}

impl PeerReport {
    /// The path that is meant: of several the one in the best state, then of the better kind, then the nearest.
    #[must_use]
    pub fn path_for(&self, wish: PathWish) -> Option<&PathReport> {
        let meant = |path: &&PathReport| match wish {
            PathWish::InUse => self.via == Some(path.via),
            PathWish::Direct => !path.kind.is_relayed(),
            PathWish::Relayed => path.kind.is_relayed(),
            PathWish::Only(via) => path.via == via,
        };
        let merit = |path: &&PathReport| {
            let state = match path.state {
                PathState::Primary => 0,
                PathState::Standby => 1,
                PathState::Suspect => 2,
                PathState::Probing => 3,
                PathState::Candidate => 4,
                PathState::Dead => 5,
            };
            (state, path.kind, path.srtt.unwrap_or(Duration::MAX))
        };
        self.paths.iter().filter(meant).min_by_key(merit)
    }
}

/// Changes of state that are kept for each peer, and as many of its paths: about 6 KB.
pub const TRANSITIONS_MAX: usize = 50;

/// A change of a peer's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transition {
    /// When.
    pub at: Instant,
    /// The state before.
    pub from: PeerState,
    /// The state after.
    pub to: PeerState,
    /// Why.
    pub reason: Reason,
}

/// A change of a path's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathTransition {
    /// When.
    pub at: Instant,
    /// The path.
    pub via: Via,
    /// The state before.
    pub from: PathState,
    /// The state after.
    pub to: PathState,
    /// What happened.
    pub event: PathEvent,
}

/// How often each change of state happened since the node started.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TransitionCounts {
    /// Of peers: the state before and after.
    pub peers: BTreeMap<(PeerState, PeerState), u64>,
    /// Of paths.
    pub paths: BTreeMap<(PathState, PathState), u64>,
}

/// One path to a peer.
#[derive(Debug, Clone, PartialEq)]
pub struct PathReport {
    /// The way.
    pub via: Via,
    /// What kind of way.
    pub kind: PathKind,
    /// How the address became known; `None`: through a relay.
    pub source: Option<CandidateKind>,
    /// Its state.
    pub state: PathState,
    /// Smoothed round-trip time.
    pub srtt: Option<Duration>,
    /// Share of echoes lost, from 0 to 1, once there were enough.
    pub loss: Option<f64>,
    /// Echoes sent.
    pub probes_sent: u64,
    /// Echoes answered.
    pub probes_answered: u64,
    /// A packet of full size went there and back.
    pub full_size_ok: bool,
}

/// A relay of the mesh, as this node sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayReport {
    /// The relay.
    pub id: RelayId,
    /// Its name.
    pub name: RelayName,
    /// By what it is linked.
    pub up: Option<RelayTransport>,
    /// The one that this node prefers of those that are up.
    pub home: bool,
    /// The round trip to it, if it was measured.
    pub rtt: Option<Duration>,
    /// What last went wrong, until it is right again.
    pub problem: Option<String>,
}
