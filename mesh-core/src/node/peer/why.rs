//! Reasons and reports for people.

use std::time::{Duration, Instant};

use mesh_wire::{
    id::{NodeName, Via},
    peer::NatKind,
};

use super::{Path, Peer, PeerState, Phase, REFUSED_FOR, Reason};
use crate::node::{
    choose::is_lossy,
    context::{Context, Us},
    report::{PathReport, PeerReport},
};

impl Peer {
    pub(super) fn why_unreachable(&self, ctx: &Context) -> Reason {
        let us = ctx.us;
        let absent = |relay| self.presence.get(relay) == Some(&false);
        let some = !us.relays.is_empty() || !self.known.relays.is_empty();
        let relays_matter = some && !self.known.plain;
        let relays_up = self.relays_up(us);
        if self.session
            && self
                .paths
                .values()
                .any(|path| path.small_ok && !path.full_ok)
        {
            Reason::MtuFail
        } else if self.known.relay_only && us.relays.is_empty() {
            Reason::PolicyRelayOnly
        } else if relays_matter && relays_up.is_empty() {
            Reason::RelayUnreachable
        } else if relays_matter && relays_up.iter().all(absent) {
            Reason::PeerOffline
        } else if self.is_refused(ctx.now) || self.is_somewhere() && us.clock_is_behind {
            Reason::ClockSkew
        } else if self.is_somewhere() && !self.acquainted {
            Reason::MapStale
        } else if !relays_matter && self.addresses_to_call(us).is_empty() {
            Reason::NoCandidates
        } else {
            Reason::HandshakeTimeout
        }
    }

    /// Whether a relay says that the peer is there: the handshake arrives.
    fn is_somewhere(&self) -> bool {
        self.presence.values().any(|present| *present)
    }

    fn is_refused(&self, now: Instant) -> bool {
        self.refused_at.is_some_and(|at| now < at + REFUSED_FOR)
    }

    /// Why a relayed peer is not direct.
    fn why_relayed(&self, us: &Us) -> Reason {
        let direct = || self.paths.values().filter(|path| !path.kind.is_relayed());
        if self.known.relay_only {
            return Reason::PolicyRelayOnly;
        }
        if direct().any(|path| path.usable() && is_lossy(path)) {
            return Reason::DirectLossy;
        }
        if self.search.failures == 0 {
            return Reason::Probing; // Not one whole round so far.
        }
        match (us.nat, self.remote.nat) {
            (NatKind::UdpBlocked, _) | (_, NatKind::UdpBlocked) => Reason::UdpBlocked,
            _ if direct().next().is_none() => Reason::NoCandidates,
            (NatKind::Hard, NatKind::Hard) => Reason::HardNatBoth,
            _ if direct().any(|path| path.small_only) => Reason::MtuFail,
            (NatKind::Hard, _) | (_, NatKind::Hard) => Reason::HardNatOne,
            _ => Reason::Silent,
        }
    }

    /// What a packet costs by the path in use.
    pub(crate) fn cost(&self) -> Option<(NodeName, Duration)> {
        let in_use = self.primary.and_then(|via| self.paths.get(&via))?;
        Some((self.known.name.clone(), in_use.cost()?))
    }

    pub(crate) fn report(&self, us: &Us) -> PeerReport {
        let in_use = self.primary.and_then(|via| self.paths.get(&via));
        PeerReport {
            id: self.known.id,
            name: self.known.name.clone(),
            state: self.state,
            reason: match self.state {
                PeerState::Relayed => self.why_relayed(us),
                PeerState::Idle
                | PeerState::Waking
                | PeerState::Direct
                | PeerState::Suspect
                | PeerState::Unreachable => self.reason,
            },
            alive: self.alive,
            via: self.primary,
            srtt: in_use.and_then(Path::srtt),
            nat: self.remote.nat,
            paths: self.paths.iter().map(report_path).collect(),
            transitions: self.changes.peer.iter().copied().collect(),
            path_transitions: self.changes.paths.iter().copied().collect(),
            next_attempt: match &self.phase {
                Phase::Idle => None,
                Phase::Waking(ladder) => Some(ladder.next),
                Phase::Up => self.search.retry_at,
                Phase::Unreachable(retry) => Some(retry.next),
            },
        }
    }
}

fn report_path((via, path): (&Via, &Path)) -> PathReport {
    PathReport {
        via: *via,
        kind: path.kind,
        source: path.source,
        state: path.state(),
        srtt: path.srtt(),
        loss: path.loss(),
        probes_sent: path.sent,
        probes_answered: path.answered,
        full_size_ok: path.full_ok,
    }
}
