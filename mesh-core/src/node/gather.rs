//! Learns the node's reflexive addresses and the kind of its NAT from what relays see of it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use mesh_wire::{
    id::{RelayId, canonical},
    peer::NatKind,
};
use rand::RngExt;

use crate::{io::Output, node::context::Dice, snapshot::Relay};

/// Gaps between the sendings of one question; the last one repeats (`paths.md`).
const RETRANSMIT_GAPS: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(200)];

/// After this a round is over, answered or not (`paths.md`).
const ROUND_MAX: Duration = Duration::from_secs(3);

/// Ports asked of one relay address: two differ enough to recognise a mapping that depends on
/// the destination, the third is for a firewall that lets only some ports out.
const PORTS_MAX: usize = 3;

/// Relays asked for the node's addresses: two vantage points of different addresses.
const RELAYS_MAX: usize = 2;

/// Relays whose round trip is measured: 16 requests of 28 bytes, three times at most, are 1.4 KB a
/// survey. A mesh with more relays has near ones among those that a node prefers.
pub(crate) const SURVEYED_MAX: usize = 16;

/// How often one question of a survey is sent.
const SURVEY_SENDINGS: usize = 3;

/// How often all relays are measured while a session is in use.
const SURVEY_EVERY: Duration = Duration::from_secs(300);

/// Bounds of the time between rounds while a session is in use (`paths.md`): under the 30 s
/// after which the shortest-lived common NAT mappings end.
const REFRESH_MS: std::ops::Range<u64> = 20_000..26_000;

/// What was asked and answered in a round.
#[derive(Debug, Default)]
struct Round {
    asks: BTreeMap<SocketAddr, Ask>,
    began: Option<Instant>,
    sendings: usize,
    next: Option<Instant>,
}

#[derive(Debug)]
struct Ask {
    relay: RelayId,
    observed: Option<SocketAddr>,
    /// Only the round trip is of interest.
    survey: bool,
}

/// The node's view of itself from outside.
#[derive(Debug, Default)]
pub(crate) struct Gather {
    round: Round,
    /// Answers of the last round that had any: what was asked, what was seen.
    seen: BTreeMap<SocketAddr, SocketAddr>,
    /// The last finished round had questions and no answer.
    silent: bool,
    refresh_at: Option<Instant>,
    surveyed_at: Option<Instant>,
}

impl Gather {
    /// Asks now, at the `targets` of each relay: the first of `outside` for the node's addresses, and if that is due, all, and those
    /// `inside` the site, for their distance. What was learned before stays until there is something newer.
    pub(crate) fn start(
        &mut self,
        outside: &[RelayId],
        inside: &[RelayId],
        targets: &BTreeMap<RelayId, Vec<SocketAddr>>,
        local: &[SocketAddr],
        now: Instant,
    ) {
        let mut asks = BTreeMap::new();
        let survey = self.surveyed_at.is_none_or(|at| now >= at + SURVEY_EVERY);
        let most = if survey { SURVEYED_MAX } else { RELAYS_MAX };
        let asked = outside.iter().enumerate();
        let asked = asked.map(|(index, relay)| (index >= RELAYS_MAX, relay));
        let inside = inside.iter().map(|relay| (true, relay));
        let inside = inside.filter(|_| survey);
        for (survey, relay) in asked
            .take(most - inside.clone().count().min(most / 2))
            .chain(inside)
        {
            let targets = targets.get(relay).into_iter().flatten().copied();
            let targets = targets.filter(|&target| has_family(local, target));
            for target in targets.take(if survey { 1 } else { usize::MAX }) {
                let (relay, observed) = (*relay, None);
                let ask = Ask {
                    relay,
                    observed,
                    survey,
                };
                asks.insert(target, ask);
            }
        }
        if survey && !asks.is_empty() {
            self.surveyed_at = Some(now);
        }
        self.refresh_at = None;
        let (began, next) = match asks.is_empty() {
            true => (None, None),
            false => (Some(now), Some(now)),
        };
        let sendings = 0;
        self.round = Round {
            asks,
            began,
            sendings,
            next,
        };
    }

    /// The network is another one: what was learned is void.
    pub(crate) fn forget(&mut self) {
        self.seen.clear();
        self.silent = false;
        self.surveyed_at = None;
    }

    /// Notes an answer. Returns who answered, and whether the node's view of itself changed.
    /// `None`: nobody asked.
    pub(crate) fn on_reflexive(
        &mut self,
        asked: SocketAddr,
        observed: SocketAddr,
    ) -> Option<(RelayId, bool)> {
        // Otherwise late, or forged.
        let ask = self.round.asks.get_mut(&canonical(asked))?;
        let (relay, survey) = (ask.relay, ask.survey);
        let observed = canonical(observed);
        ask.observed = Some(observed);
        if self.round.asks.values().all(|ask| ask.observed.is_some()) {
            self.round.next = None;
            self.round.began = None;
            // What others said is older than that.
            let asks = &self.round.asks;
            self.seen
                .retain(|target, _| asks.get(target).is_some_and(|ask| !ask.survey));
        }
        if survey {
            return Some((relay, false));
        }
        self.silent = false;
        let before = self.seen.insert(canonical(asked), observed);
        Some((relay, before != Some(observed)))
    }

    /// Sends what is due. Returns whether the node's view of itself changed.
    pub(crate) fn on_timeout(
        &mut self,
        active: bool,
        now: Instant,
        dice: &mut Dice,
        out: &mut impl FnMut(Output),
    ) -> bool {
        if active && self.refresh_at.is_none() && self.round.began.is_none() {
            self.refresh_at = Some(now + Duration::from_millis(dice.random_range(REFRESH_MS)));
        }
        let over = self
            .round
            .began
            .is_some_and(|began| now >= began + ROUND_MAX);
        if over {
            return self.finish_round();
        }
        if self.round.next.is_some_and(|next| now >= next) {
            for (&target, ask) in &self.round.asks {
                let due = !ask.survey || self.round.sendings < SURVEY_SENDINGS;
                if ask.observed.is_none() && due {
                    let relay = ask.relay;
                    out(Output::AskReflexive { relay, target });
                }
            }
            let gap = RETRANSMIT_GAPS.get(self.round.sendings);
            self.round.next = gap.or(RETRANSMIT_GAPS.last()).map(|&gap| now + gap);
            self.round.sendings += 1;
        }
        false
    }

    /// Whether it is time for another round.
    pub(crate) fn wants_refresh(&self, now: Instant) -> bool {
        self.refresh_at.is_some_and(|at| now >= at)
    }

    fn finish_round(&mut self) -> bool {
        self.round.next = None;
        self.round.began = None;
        let answered = |target: &SocketAddr| {
            let ask = self.round.asks.get(target);
            ask.is_some_and(|ask| ask.observed.is_some() && !ask.survey)
        };
        self.silent = !self.round.asks.keys().any(answered);
        let before = self.seen.len();
        if !self.silent {
            self.seen.retain(|target, _| answered(target));
        }
        self.silent || self.seen.len() != before
    }

    /// When [`Self::on_timeout`] has something to do.
    pub(crate) fn deadline(&self, active: bool) -> Option<Instant> {
        let over = self.round.began.map(|began| began + ROUND_MAX);
        let refresh = self.refresh_at.filter(|_| active);
        [self.round.next, over, refresh].into_iter().flatten().min()
    }

    /// The kind of NAT, by IPv4 if that answered: IPv6 is rarely translated.
    pub(crate) fn nat(&self, local: &[SocketAddr], by_tls_only: bool) -> NatKind {
        let of_family = |v4: bool| self.seen.values().filter(move |seen| seen.is_ipv4() == v4);
        let v4 = of_family(true).count() > 0;
        let mut seen: Vec<&SocketAddr> = of_family(v4).collect();
        let vantage_points = seen.len();
        seen.sort_unstable();
        seen.dedup();
        match (seen.as_slice(), vantage_points) {
            _ if self.silent && by_tls_only => NatKind::UdpBlocked,
            ([], _) => NatKind::Unknown,
            ([one], _) if local.contains(one) => NatKind::None,
            ([_], 1) => NatKind::Unknown,
            ([_], _) => NatKind::Easy,
            _ => NatKind::Hard,
        }
    }

    /// The reflexive addresses, without repetition.
    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        let mut addresses: Vec<SocketAddr> = self.seen.values().copied().collect();
        addresses.sort_unstable();
        addresses.dedup();
        addresses
    }
}

/// Where `relay` answers STUN, at these of its addresses.
pub(crate) fn targets(relay: &Relay, addresses: &[IpAddr]) -> Vec<SocketAddr> {
    let mut ports = relay.stun_ports.clone();
    ports.push(relay.quic_port);
    ports.sort_unstable();
    ports.dedup();
    ports.truncate(PORTS_MAX);
    let of_address = |&ip| {
        ports
            .iter()
            .map(move |&port| canonical(SocketAddr::new(ip, port)))
    };
    addresses.iter().flat_map(of_address).collect()
}

/// Whether the node has an address of the family of `remote`; if it told none, perhaps.
pub(crate) fn has_family(local: &[SocketAddr], remote: SocketAddr) -> bool {
    local.is_empty() || local.iter().any(|own| own.is_ipv4() == remote.is_ipv4())
}

#[cfg(test)]
mod tests {
    use mesh_wire::id::MeshId;
    use rand::SeedableRng;

    use super::*;
    use crate::{
        node::tests::{at, relay},
        snapshot::{MeshSettings, Snapshot},
    };

    fn snapshot() -> Snapshot {
        let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(MeshId([0; 32]), "m"));
        let (id, relay) = relay("r1", 1);
        snapshot.relays.insert(id, relay);
        snapshot
    }

    fn of(snapshot: &Snapshot) -> BTreeMap<RelayId, Vec<SocketAddr>> {
        let relays = snapshot.relays.iter();
        let relays = relays.map(|(&id, relay)| (id, targets(relay, &relay.addresses)));
        relays.collect()
    }

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn asked(gather: &mut Gather, ms: u64) -> Vec<SocketAddr> {
        let mut targets = Vec::new();
        let mut dice = Dice::seed_from_u64(1);
        gather.on_timeout(true, at(ms), &mut dice, &mut |output| {
            if let Output::AskReflexive { target, .. } = output {
                targets.push(target);
            }
        });
        targets
    }

    fn started() -> Gather {
        let mut gather = Gather::default();
        gather.start(
            &[relay("r1", 1).0],
            &[],
            &of(&snapshot()),
            &[addr("10.0.0.1:51820")],
            at(0),
        );
        gather
    }

    #[test]
    fn two_ports_of_one_relay_tell_the_kind_of_nat() {
        let local = [addr("10.0.0.1:51820")];
        let cases = [
            ("10.0.0.1:51820", "10.0.0.1:51820", NatKind::None),
            ("198.51.100.9:7", "198.51.100.9:7", NatKind::Easy),
            ("198.51.100.9:7", "198.51.100.9:8", NatKind::Hard),
        ];
        for (first, second, kind) in cases {
            let mut gather = started();
            let targets = asked(&mut gather, 0);
            assert_eq!(targets.len(), 2);
            let answered = gather.on_reflexive(targets[0], addr(first));
            assert_eq!(answered, Some((relay("r1", 1).0, true)));
            gather.on_reflexive(targets[1], addr(second));
            assert_eq!(gather.nat(&local, true), kind);
        }
    }

    #[test]
    fn one_answer_is_an_address_but_not_a_kind() {
        let mut gather = started();
        let targets = asked(&mut gather, 0);
        gather.on_reflexive(targets[0], addr("198.51.100.9:7"));
        assert_eq!(gather.nat(&[], true), NatKind::Unknown);
        assert_eq!(gather.addresses(), [addr("198.51.100.9:7")]);
    }

    #[test]
    fn silence_means_blocked_only_if_relays_answer_by_tls() {
        let mut gather = started();
        let mut sent = 0;
        let mut now = at(0);
        while let Some(deadline) = gather.deadline(false) {
            now = deadline;
            let mut dice = Dice::seed_from_u64(1);
            gather.on_timeout(false, now, &mut dice, &mut |_| sent += 1);
        }
        assert_eq!(now, at(3000));
        assert_eq!(sent, 2 * 16, "0, 100, 300, 500, … 2900 ms to two ports");
        assert_eq!(gather.nat(&[], false), NatKind::Unknown);
        assert_eq!(gather.nat(&[], true), NatKind::UdpBlocked);
    }

    #[test]
    fn all_relays_are_measured_at_first_and_every_five_minutes_but_two_tell_the_address() {
        let mut snapshot = snapshot();
        let relays: Vec<RelayId> = (1..=4)
            .map(|host| {
                let (id, relay) = relay(&format!("r{host}"), host);
                snapshot.relays.insert(id, relay);
                id
            })
            .collect();
        let mut gather = Gather::default();
        let local = [addr("10.0.0.1:51820")];
        gather.start(&relays, &[], &of(&snapshot), &local, at(0));
        let targets = asked(&mut gather, 0);
        assert_eq!(
            targets.len(),
            2 * 2 + 2,
            "two ports of two relays, one of the others"
        );
        for (port, target) in (1..).zip(targets) {
            let seen = SocketAddr::new([198, 51, 100, 9].into(), port);
            gather.on_reflexive(target, seen);
        }
        assert_eq!(
            gather.addresses().len(),
            4,
            "what the survey saw does not count"
        );
        gather.start(&relays, &[], &of(&snapshot), &local, at(20_000));
        assert_eq!(asked(&mut gather, 20_000).len(), 4);
        gather.start(&relays, &[], &of(&snapshot), &local, at(300_000));
        assert_eq!(asked(&mut gather, 300_000).len(), 6);
    }

    #[test]
    fn what_a_relay_saw_that_is_asked_no_more_does_not_make_a_nat_symmetric() {
        let mut snapshot = snapshot();
        let mut gather = started();
        for target in asked(&mut gather, 0) {
            gather.on_reflexive(target, addr("198.51.100.9:7"));
        }
        let (other, described) = relay("r2", 2);
        snapshot.relays.clear();
        snapshot.relays.insert(other, described);
        gather.start(
            &[other],
            &[],
            &of(&snapshot),
            &[addr("10.0.0.1:51820")],
            at(1_000),
        );
        for target in asked(&mut gather, 1_000) {
            gather.on_reflexive(target, addr("198.51.100.9:8")); // The NAT forgot, meanwhile.
        }
        assert_eq!(gather.addresses(), [addr("198.51.100.9:8")]);
        assert_eq!(gather.nat(&[], false), NatKind::Easy);
    }

    #[test]
    fn an_answer_to_no_question_changes_nothing() {
        let mut gather = started();
        let answered = gather.on_reflexive(addr("192.0.2.200:1"), addr("203.0.113.1:1"));
        assert_eq!(answered, None);
        assert_eq!(gather.addresses(), []);
    }
}
