//! Easy against hard: one NAT gives every socket and destination a port that nobody can tell, the other lets in only
//! the ports that were written to (`paths.md`: "an opt-in burst of sockets").
//!
//! The end behind the hard NAT opens [`SOCKETS`] sockets and sends from each to the other's address: so many
//! ports of its NAT lead to it. The other end guesses [`GUESSES`] ports. One guess hits with probability
//! 256 / 64,512, and none of 1,024 with (1 - 0.00397)^1024 = 1.7 %: the birthday paradox does what neither
//! could alone. It costs 35 KB there and 135 KB here, once in [`EVERY`] at most, and only when a whole round of
//! probes was in vain, both ends said that they take part, and neither pays for what it sends.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use mesh_wire::{
    id::Via,
    peer::{CandidateKind, NatKind, PeerMessage},
};
use rand::RngExt;

use super::Peer;
use crate::{io::Output, node::context::Context};

/// Sockets that one end opens.
const SOCKETS: u16 = 256;

/// Ports that the other end guesses …
const GUESSES: u32 = 1_024;

/// … so many at a time …
const GUESSES_AT_ONCE: u32 = 16;

/// … with this pause: 7 s in all, 20 KB/s.
const GUESS_GAP: Duration = Duration::from_millis(110);

/// Two ends try it no more often than this.
const EVERY: Duration = Duration::from_secs(300);

/// Ports that a NAT gives out.
const PORTS: std::ops::RangeInclusive<u16> = 1_024..=65_535;

/// What this end does for one peer.
#[derive(Debug, Default)]
pub(super) struct Burst {
    /// When sockets were last opened, or guessing last began.
    began: Option<Instant>,
    guessing: Option<Guessing>,
}

#[derive(Debug)]
struct Guessing {
    at: IpAddr,
    left: u32,
    next: Instant,
}

impl Peer {
    /// A round of probes was in vain: with many sockets it may not be.
    pub(super) fn open_sockets(&mut self, ctx: &mut Context) {
        let kinds = (ctx.us.nat, self.remote.nat);
        if kinds != (NatKind::Hard, NatKind::Easy) || !self.may_burst(ctx) {
            return;
        }
        let (Some(via), Some(target)) = (self.primary, self.outside_address()) else {
            return;
        };
        self.burst.began = Some(ctx.now);
        let (peer, count) = (self.known.id, SOCKETS);
        let (txid, size_bytes) = (ctx.dice.random(), 0);
        let message = PeerMessage::EchoRequest { txid, size_bytes };
        ctx.out.push_back(Output::OpenSockets {
            peer,
            target,
            count,
            message,
        });
        ctx.send(peer, via, PeerMessage::GuessPorts);
    }

    /// The peer has opened sockets towards this end.
    pub(super) fn begin_to_guess(&mut self, ctx: &Context) {
        let kinds = (ctx.us.nat, self.remote.nat);
        if kinds != (NatKind::Easy, NatKind::Hard) || !self.may_burst(ctx) {
            return;
        }
        if let Some(address) = self.outside_address() {
            self.burst.began = Some(ctx.now);
            self.burst.guessing = Some(Guessing {
                at: address.ip(),
                left: GUESSES,
                next: ctx.now,
            });
        }
    }

    fn may_burst(&self, ctx: &Context) -> bool {
        let recent = |at: Instant| ctx.now < at + EVERY;
        self.relay_in_use().is_some()
            && !self.known.relay_only
            && ctx.us.bursts
            && self.remote.bursts
            && !self.costs()
            && !self.burst.began.is_some_and(recent)
    }

    /// Where the peer's NAT is.
    fn outside_address(&self) -> Option<SocketAddr> {
        let told = self.remote.candidates.iter();
        let mut reflexive = told.filter(|told| told.kind == CandidateKind::Reflexive);
        reflexive.next().map(|told| told.address)
    }

    /// Guesses some ports more, if that is due.
    pub(super) fn guess(&mut self, ctx: &mut Context) {
        let on_relay = self.relay_in_use().is_some() && !self.known.relay_only;
        let Some(guessing) = &mut self.burst.guessing else {
            return;
        };
        if !on_relay || guessing.left == 0 {
            self.burst.guessing = None;
            return;
        }
        if ctx.now < guessing.next {
            return;
        }
        for _ in 0..GUESSES_AT_ONCE.min(guessing.left) {
            let via = Via::Direct(SocketAddr::new(guessing.at, ctx.dice.random_range(PORTS)));
            // Whatever comes back from there makes it a path, which is then probed like any other.
            let (txid, size_bytes) = (ctx.dice.random(), 0);
            let message = PeerMessage::EchoRequest { txid, size_bytes };
            ctx.send(self.known.id, via, message);
        }
        guessing.left = guessing.left.saturating_sub(GUESSES_AT_ONCE);
        guessing.next = ctx.now + GUESS_GAP;
    }

    pub(super) fn guess_due(&self) -> Option<Instant> {
        self.burst.guessing.as_ref().map(|guessing| guessing.next)
    }
}
