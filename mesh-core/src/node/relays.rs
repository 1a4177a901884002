//! Keeps links to relays: which ones, by what transport, and when to try again.

use std::{
    collections::{BTreeMap, VecDeque},
    net::IpAddr,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use mesh_wire::id::{NodeId, RelayId};
use rand::RngExt;

use crate::{
    io::{Output, RelayTransport},
    node::context::Dice,
};

/// Links kept where others look for this node: at the first relays of its order.
const ANCHORS: usize = 2;

/// Round trips to a relay that are kept: the least of them counts, as what is more is a queue
/// that was full for a moment. At one in five minutes a change shows after 25.
const RTTS_MAX: usize = 5;

/// A relay must be nearer by this, and by a third, or traffic would swing (`paths.md`).
const NEARER_BY: Duration = Duration::from_millis(10);

/// Relays that are nodes of the mesh to which links are kept besides, so that a site that is cut off
/// has one when the first fails.
pub(crate) const PEER_RELAYS: usize = 2;

/// Links at a time: the node's own (home, second, anchors, peer relays, its own relay: 7), and visits to
/// the peers' relays.
const LINKS_MAX: usize = 12;

/// A link to a relay of a peer's ends this long after it was last of use …
const VISIT: Duration = Duration::from_secs(60);

/// … and if it does not come up, after three attempts by both transports: a peer relay may have
/// addresses that only its site reaches.
const VISIT_TRY: Duration = Duration::from_secs(10);

/// TLS starts this long after QUIC (`paths.md`).
const TLS_DELAY: Duration = Duration::from_millis(300);

/// An attempt without an answer after this has failed; with QUIC and a relay that answers by
/// TLS, UDP counts as blocked (`paths.md`).
const ATTEMPT_MAX: Duration = Duration::from_secs(3);

/// When QUIC is tried again where UDP was blocked. `paths.md` starts at 10 minutes; the first,
/// short one is for a firewall rule that somebody takes back.
const QUIC_RETRIES: [Duration; 4] = [
    Duration::from_secs(60),
    Duration::from_secs(600),
    Duration::from_secs(1200),
    Duration::from_secs(3600),
];

/// First pause between attempts by both transports; doubles.
const RETRY_FIRST: Duration = Duration::from_millis(500);

/// Longest pause in the first minute of an outage: the relay restarts, the line flickers.
const RETRY_MAX_AT_FIRST: Duration = Duration::from_secs(3);

/// Longest pause afterwards: 100,000 nodes then make 3,300 attempts a second.
const RETRY_MAX: Duration = Duration::from_secs(30);

/// How long the outage counts as short.
const OUTAGE_SHORT: Duration = Duration::from_secs(60);

/// Round trips that it takes to make a link by TLS: TCP's handshake, TLS's, and the upgrade.
const TLS_TURNS: u32 = 3;

/// A doubted link is asked about no more often than this.
const DOUBT_EVERY: Duration = Duration::from_secs(10);

/// One transport of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leg {
    Down,
    Connecting { since: Instant },
    Up,
}

#[derive(Debug)]
struct Link {
    /// `None`: one of the node's own; otherwise a visit that ends then.
    visit_until: Option<Instant>,
    quic: Leg,
    tls: Leg,
    /// TLS starts then.
    tls_at: Option<Instant>,
    /// Both are down and start again then.
    retry_at: Option<Instant>,
    failures: u32,
    down_since: Instant,
    /// TLS carries, and QUIC is tried again then.
    quic_retry_at: Option<Instant>,
    quic_failures: usize,
    /// A peer fell silent, and nothing has come through the link since.
    doubted_at: Option<Instant>,
    /// It said that it will stop.
    leaving: bool,
    problem: Option<String>,
}

/// The state of a link, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LinkReport {
    pub(crate) up: Option<RelayTransport>,
    pub(crate) problem: Option<String>,
}

/// What the snapshot says of a relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct About {
    /// The networks in which it is.
    pub(crate) domains: Vec<IpNet>,
    /// It serves this node, whoever its peer is. Other relays are only visited, for peers that they serve.
    pub(crate) serves: bool,
    pub(crate) place: Place,
}

/// Where a relay runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// By itself.
    Apart,
    /// On a node of the mesh.
    Node,
    /// On a node of this site: it sees this node's address on the LAN, not that outside.
    Neighbour,
    /// On this node.
    Here,
}

impl Place {
    /// Whether it is a peer relay.
    pub(crate) fn is_node(self) -> bool {
        match self {
            Self::Apart => false,
            Self::Node | Self::Neighbour | Self::Here => true,
        }
    }
}

/// All links to relays.
///
/// Three kinds are kept: to the *nearest*, and to the next one of another failure domain, over which
/// traffic goes; to the *anchors*, the first of the order that every node can tell of every
/// other, where peers that know nothing better look; and to the first *peer relays* of that order. In a
/// mesh of two relays the first two are the same.
///
/// A node that is a relay itself has a link to that, too, so that it is found there, but has its home
/// elsewhere if it can: a relay here dies with the node, and nobody is told where it went.
#[derive(Debug, Default)]
pub(crate) struct Relays {
    links: BTreeMap<RelayId, Link>,
    /// Every relay that serves this node, by weight.
    order: Vec<RelayId>,
    /// Every relay that serves this node, the preferred one first.
    preferred: Vec<RelayId>,
    /// Every relay of the mesh.
    known: BTreeMap<RelayId, About>,
    rtts: BTreeMap<RelayId, VecDeque<Duration>>,
    /// What peers are told of these.
    told: BTreeMap<RelayId, Duration>,
    home: Option<RelayId>,
    second: Option<RelayId>,
    resting: bool,
}

/// Whether a way is so much shorter that it is worth a move.
pub(crate) fn is_nearer(rtt: Duration, than: Duration) -> bool {
    rtt + NEARER_BY <= than && rtt * 3 < than * 2
}

/// The networks that fail together: of a /24 or a /48, one router leads there.
pub(crate) fn domain(address: IpAddr) -> IpNet {
    let bits = if address.is_ipv4() { 24 } else { 48 };
    IpNet::new_assert(address, bits).trunc()
}

/// `relays` in the order in which `node` prefers them (highest random weight), those that are nodes of
/// the mesh last: every node can tell every other's, and together they spread evenly.
pub(crate) fn rank(node: &NodeId, relays: impl Iterator<Item = (RelayId, bool)>) -> Vec<RelayId> {
    let key = node
        .0
        .first_chunk::<8>()
        .map_or(0, |b| u64::from_be_bytes(*b));
    let mut order: Vec<(RelayId, bool)> = relays.collect();
    order.sort_by_key(|(relay, is_node)| (*is_node, mix(relay.0 ^ key), *relay));
    order.into_iter().map(|(relay, _)| relay).collect()
}

/// The finaliser of `SplitMix64` (Steele et al. 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Link {
    fn new(visit_until: Option<Instant>, now: Instant) -> Self {
        Self {
            visit_until,
            quic: Leg::Down,
            tls: Leg::Down,
            tls_at: None,
            retry_at: Some(now),
            failures: 0,
            down_since: now,
            quic_retry_at: None,
            quic_failures: 0,
            doubted_at: None,
            leaving: false,
            problem: None,
        }
    }

    fn up(&self) -> Option<RelayTransport> {
        match (self.quic, self.tls) {
            (Leg::Up, _) => Some(RelayTransport::Quic),
            (Leg::Down | Leg::Connecting { .. }, Leg::Up) => Some(RelayTransport::Tls),
            (Leg::Down | Leg::Connecting { .. }, Leg::Down | Leg::Connecting { .. }) => None,
        }
    }

    /// Up, or nothing speaks against it yet.
    fn is_hopeful(&self) -> bool {
        !self.leaving && (self.up().is_some() || self.failures == 0)
    }

    fn leg(&mut self, transport: RelayTransport) -> &mut Leg {
        match transport {
            RelayTransport::Quic => &mut self.quic,
            RelayTransport::Tls => &mut self.tls,
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let attempt = |leg| match leg {
            Leg::Connecting { since } => Some(since + ATTEMPT_MAX),
            Leg::Down | Leg::Up => None,
        };
        let timers = [
            self.visit_until,
            attempt(self.quic),
            attempt(self.tls),
            self.tls_at,
            self.retry_at,
            self.quic_retry_at,
        ];
        timers.into_iter().flatten().min()
    }
}

/// Does what one link needs, and says it.
struct Hand<'a> {
    id: RelayId,
    link: &'a mut Link,
    now: Instant,
    dice: &'a mut Dice,
    out: &'a mut dyn FnMut(Output),
}

impl Hand<'_> {
    fn connect(&mut self, transport: RelayTransport) {
        let since = self.now;
        let leg = self.link.leg(transport);
        if *leg == Leg::Down {
            *leg = Leg::Connecting { since };
            let relay = self.id;
            (self.out)(Output::ConnectRelay { relay, transport });
        }
    }

    fn disconnect(&mut self, transport: RelayTransport) {
        let leg = self.link.leg(transport);
        if *leg != Leg::Down {
            *leg = Leg::Down;
            let relay = self.id;
            (self.out)(Output::DisconnectRelay { relay, transport });
        }
    }

    fn close(&mut self) {
        self.disconnect(RelayTransport::Quic);
        self.disconnect(RelayTransport::Tls);
    }

    fn use_transport(&mut self, transport: RelayTransport) {
        let relay = self.id;
        (self.out)(Output::UseRelayTransport { relay, transport });
    }

    /// Begins an attempt by both transports.
    fn race(&mut self) {
        self.link.retry_at = None;
        self.link.quic_retry_at = None;
        self.link.tls_at = Some(self.now + TLS_DELAY);
        self.connect(RelayTransport::Quic);
    }

    fn on_connected(&mut self, transport: RelayTransport) {
        *self.link.leg(transport) = Leg::Up;
        self.link.failures = 0;
        self.link.retry_at = None;
        self.link.problem = None;
        self.link.leaving = false;
        match transport {
            RelayTransport::Quic => self.on_quic_up(),
            RelayTransport::Tls => self.on_tls_up(),
        }
    }

    fn on_quic_up(&mut self) {
        self.link.tls_at = None;
        self.link.quic_retry_at = None;
        self.link.quic_failures = 0;
        self.link.doubted_at = None;
        if self.link.tls == Leg::Up {
            self.use_transport(RelayTransport::Quic);
        }
        self.disconnect(RelayTransport::Tls);
    }

    fn on_tls_up(&mut self) {
        match (self.link.quic, self.link.doubted_at.take()) {
            // Still silent by the time TLS is up: QUIC is dead and does not know it yet.
            (Leg::Up, Some(_)) => {
                self.use_transport(RelayTransport::Tls);
                self.give_up_quic("silent while TLS answers");
            }
            (Leg::Up, None) => self.disconnect(RelayTransport::Tls),
            (Leg::Connecting { .. }, _) => {}
            (Leg::Down, _) => self.retry_quic_later(),
        }
    }

    fn give_up_quic(&mut self, why: &str) {
        self.disconnect(RelayTransport::Quic);
        self.link.problem = Some(format!("QUIC: {why}"));
        self.retry_quic_later();
    }

    fn retry_quic_later(&mut self) {
        let pause = QUIC_RETRIES.get(self.link.quic_failures);
        let pause = pause.or(QUIC_RETRIES.last()).copied().unwrap_or_default();
        self.link.quic_failures += 1;
        self.link.quic_retry_at = Some(self.now + pause);
    }

    fn on_lost(&mut self, transport: RelayTransport, reason: &str) {
        let before = std::mem::replace(self.link.leg(transport), Leg::Down);
        if before == Leg::Down {
            return;
        }
        let name = match transport {
            RelayTransport::Quic => "QUIC",
            RelayTransport::Tls => "TLS",
        };
        self.link.problem = Some(format!("{name}: {reason}"));
        match (self.link.quic, self.link.tls) {
            // QUIC was refused at once: no reason to wait for TLS.
            (Leg::Down, Leg::Down) if self.link.tls_at.take().is_some() => {
                self.connect(RelayTransport::Tls);
            }
            (Leg::Down, Leg::Down) => self.on_down(before),
            (Leg::Down, Leg::Up) => self.retry_quic_later(),
            // TLS had been started because QUIC was doubted: QUIC gets a new chance, too.
            (Leg::Down, Leg::Connecting { .. }) if before == Leg::Up => {
                self.connect(RelayTransport::Quic);
            }
            (Leg::Up | Leg::Connecting { .. }, _) | (Leg::Down, Leg::Connecting { .. }) => {}
        }
    }

    fn on_down(&mut self, before: Leg) {
        self.link.quic_retry_at = None;
        self.link.doubted_at = None;
        if before == Leg::Up {
            // It worked until now: try again at once, by both.
            self.link.down_since = self.now;
            self.link.quic_failures = 0;
            self.race();
            return;
        }
        let outage = self.now.saturating_duration_since(self.link.down_since);
        let most = if outage < OUTAGE_SHORT {
            RETRY_MAX_AT_FIRST
        } else {
            RETRY_MAX
        };
        let pause = (RETRY_FIRST * 2u32.saturating_pow(self.link.failures.min(8))).min(most);
        self.link.failures += 1;
        let pause = pause.mul_f64(self.dice.random_range(0.75..1.0));
        self.link.retry_at = Some(self.now + pause);
    }

    fn on_timeout(&mut self) {
        let now = self.now;
        let due = |at: Option<Instant>| at.is_some_and(|at| now >= at);
        if due(self.link.retry_at) {
            self.race();
        }
        if due(self.link.tls_at) {
            self.link.tls_at = None;
            self.connect(RelayTransport::Tls);
        }
        if due(self.link.quic_retry_at) {
            self.link.quic_retry_at = None;
            self.connect(RelayTransport::Quic);
        }
        for transport in [RelayTransport::Quic, RelayTransport::Tls] {
            if let Leg::Connecting { since } = *self.link.leg(transport)
                && now >= since + ATTEMPT_MAX
            {
                let relay = self.id;
                (self.out)(Output::DisconnectRelay { relay, transport });
                self.on_lost(transport, "no answer in 3 s");
            }
        }
    }

    fn doubt(&mut self) {
        let recent = |at: Instant| self.now.saturating_duration_since(at) < DOUBT_EVERY;
        let quic_only = self.link.quic == Leg::Up && self.link.tls == Leg::Down;
        if quic_only && !self.link.doubted_at.is_some_and(recent) {
            self.link.doubted_at = Some(self.now);
            self.link.tls_at = Some(self.now + TLS_DELAY);
        }
    }

    fn heard(&mut self) {
        if self.link.quic == Leg::Up && self.link.doubted_at.take().is_some() {
            self.link.tls_at = None;
            self.disconnect(RelayTransport::Tls);
        }
    }
}

impl Relays {
    /// The mesh has these relays now. Returns whether something about them is new.
    pub(crate) fn set_known(&mut self, own: &NodeId, known: BTreeMap<RelayId, About>) -> bool {
        let changed = self.known != known;
        self.known = known;
        let serving = self.known.iter().filter(|(_, about)| about.serves);
        let serving = serving.map(|(&relay, about)| (relay, about.place.is_node()));
        self.order = rank(own, serving);
        let known = &self.known;
        self.rtts.retain(|relay, _| known.contains_key(relay));
        self.told.retain(|relay, _| known.contains_key(relay));
        self.prefer();
        changed
    }

    /// Where a relay runs.
    pub(crate) fn place(&self, relay: RelayId) -> Place {
        self.known
            .get(&relay)
            .map_or(Place::Apart, |about| about.place)
    }

    /// Relays that serve this node and see it from outside its site, the preferred one first.
    pub(crate) fn vantage_points(&self) -> impl Iterator<Item = RelayId> + '_ {
        let outside =
            |relay: &RelayId| !matches!(self.place(*relay), Place::Neighbour | Place::Here);
        self.preferred.iter().copied().filter(outside)
    }

    /// Relays with a link that will not carry anything soon.
    pub(crate) fn hopeless(&self) -> Vec<RelayId> {
        let hopeless = self.links.iter().filter(|(_, link)| !link.is_hopeful());
        hopeless.map(|(&relay, _)| relay).collect()
    }

    /// Every relay that serves this node, the preferred one first.
    pub(crate) fn preferred(&self) -> &[RelayId] {
        &self.preferred
    }

    /// The relay that this node prefers.
    #[cfg(test)]
    pub(crate) fn home(&self) -> Option<RelayId> {
        self.home
    }

    /// A relay answered after `rtt`. Returns whether peers should be told.
    pub(crate) fn on_rtt(&mut self, relay: RelayId, rtt: Duration) -> bool {
        if !self.known.contains_key(&relay) {
            return false;
        }
        let recent = self.rtts.entry(relay).or_default();
        if recent.len() == RTTS_MAX {
            recent.pop_front();
        }
        recent.push_back(rtt);
        let Some(rtt) = self.rtt(&relay) else {
            return false;
        };
        let told = self.told.get(&relay);
        let far_off = |&told: &Duration| is_nearer(rtt, told) || is_nearer(told, rtt);
        let tell = told.is_none_or(far_off);
        if tell {
            self.told.insert(relay, rtt);
        }
        tell
    }

    /// The round trip to a relay, if it was measured.
    pub(crate) fn rtt(&self, relay: &RelayId) -> Option<Duration> {
        self.rtts.get(relay)?.iter().min().copied()
    }

    /// What peers are told of the round trips.
    pub(crate) fn told(&self) -> &BTreeMap<RelayId, Duration> {
        &self.told
    }

    /// Relays with a link, the preferred one first, those that are only visited last.
    pub(crate) fn up(&self) -> Vec<RelayId> {
        let is_up = |relay: &&RelayId| self.transport(relay).is_some();
        let foreign = self.links.keys();
        let foreign = foreign.filter(|relay| !self.preferred.contains(relay));
        let all = self.preferred.iter().chain(foreign);
        let mut up: Vec<RelayId> = all.filter(is_up).copied().collect();
        up.sort_by_key(|relay| self.links.get(relay).is_some_and(|link| link.leaving));
        up
    }

    /// By what a relay is linked, if it is.
    pub(crate) fn transport(&self, relay: &RelayId) -> Option<RelayTransport> {
        self.links.get(relay).and_then(Link::up)
    }

    /// Whether there are links, and not one of them runs over UDP.
    pub(crate) fn are_by_tls_only(&self) -> bool {
        let by = |transport| self.links.values().any(|link| link.up() == Some(transport));
        by(RelayTransport::Tls) && !by(RelayTransport::Quic)
    }

    /// Whether there is, or may soon be, a link.
    pub(crate) fn is_hopeful(&self, relay: &RelayId) -> bool {
        self.links.get(relay).is_none_or(Link::is_hopeful)
    }

    /// The state of a link, for people.
    pub(crate) fn report(&self, relay: &RelayId) -> LinkReport {
        LinkReport {
            up: self.transport(relay),
            problem: self.links.get(relay).and_then(|link| link.problem.clone()),
        }
    }

    /// A link came up.
    pub(crate) fn on_connected(
        &mut self,
        relay: RelayId,
        transport: RelayTransport,
        now: Instant,
        dice: &mut Dice,
        out: &mut dyn FnMut(Output),
    ) {
        let leg = self.links.get_mut(&relay).map(|link| *link.leg(transport));
        if let Some(Leg::Connecting { since }) = leg
            && transport == RelayTransport::Tls
            && self.rtt(&relay).is_none()
        {
            // Better than nothing where nobody answers by UDP.
            self.on_rtt(relay, now.saturating_duration_since(since) / TLS_TURNS);
        }
        if matches!(leg, None | Some(Leg::Down)) {
            // Nobody wants it any more: the answer crossed the `DisconnectRelay`.
            out(Output::DisconnectRelay { relay, transport });
        } else if let Some(mut hand) = self.hand(relay, now, dice, out) {
            hand.on_connected(transport);
            let until = hand.link.visit_until.as_mut();
            until.into_iter().for_each(|until| *until = now + VISIT);
        }
        self.keep(now, dice, out);
    }

    /// A link broke, or did not come up.
    pub(crate) fn on_lost(
        &mut self,
        relay: RelayId,
        transport: RelayTransport,
        reason: &str,
        now: Instant,
        dice: &mut Dice,
        out: &mut dyn FnMut(Output),
    ) {
        let was_up = self.transport(&relay).is_some();
        if let Some(mut hand) = self.hand(relay, now, dice, out) {
            hand.on_lost(transport, reason);
        }
        if was_up && self.hasten_if_none_is_up(now) {
            return self.on_timeout(now, dice, out);
        }
        self.keep(now, dice, out);
    }

    /// The last link may have gone but for visits, by which only some peers are reached: those that failed for
    /// long, and are tried rarely, are due now.
    fn hasten_if_none_is_up(&mut self, now: Instant) -> bool {
        let serves = |relay| self.known.get(relay).is_some_and(|about| about.serves);
        let mut links = self.links.iter();
        let none = links.all(|(relay, link)| link.up().is_none() || !serves(relay));
        if none {
            for link in self.links.values_mut() {
                link.retry_at = link.retry_at.map(|_| now);
            }
        }
        none
    }

    /// A relay will stop: another is made ready before it does.
    pub(crate) fn on_go_away(
        &mut self,
        relay: RelayId,
        now: Instant,
        dice: &mut Dice,
        out: &mut dyn FnMut(Output),
    ) {
        if let Some(link) = self.links.get_mut(&relay) {
            link.leaving = true;
            link.problem = Some("the relay said that it will stop".to_owned());
        }
        self.keep(now, dice, out);
    }

    /// The network is another one: what failed before may work now, and what was near (`moved`)
    /// may be far.
    pub(crate) fn on_network_change(
        &mut self,
        moved: bool,
        now: Instant,
        dice: &mut Dice,
        out: &mut dyn FnMut(Output),
    ) {
        if moved {
            self.rtts.clear();
        }
        for link in self.links.values_mut() {
            link.failures = 0;
            link.down_since = now;
            link.retry_at = link.retry_at.map(|_| now);
            link.quic_retry_at = link.quic_retry_at.map(|_| now);
        }
        self.on_timeout(now, dice, out);
    }

    /// A peer may be found at this relay.
    pub(crate) fn visit(
        &mut self,
        relay: RelayId,
        now: Instant,
        dice: &mut Dice,
        out: &mut dyn FnMut(Output),
    ) {
        if let Some(link) = self.links.get_mut(&relay) {
            let more = link.up().map_or(VISIT_TRY, |_| VISIT);
            link.visit_until = link.visit_until.map(|until| until.max(now + more));
            return;
        }
        if self.links.len() == LINKS_MAX || !self.known.contains_key(&relay) {
            return; // The peer is looked for where links are.
        }
        let until = now + VISIT_TRY;
        self.links.insert(relay, Link::new(Some(until), now));
        if let Some(mut hand) = self.hand(relay, now, dice, out) {
            hand.on_timeout();
        }
    }

    /// Nothing comes through this link.
    pub(crate) fn doubt(&mut self, relay: RelayId, now: Instant, dice: &mut Dice) {
        if let Some(mut hand) = self.hand(relay, now, dice, &mut |_| ()) {
            hand.doubt();
        }
    }

    /// Something came through this link.
    pub(crate) fn heard(
        &mut self,
        relay: RelayId,
        now: Instant,
        dice: &mut Dice,
        out: &mut dyn FnMut(Output),
    ) {
        if let Some(mut hand) = self.hand(relay, now, dice, out) {
            hand.heard();
        }
    }

    /// Does what is due.
    pub(crate) fn on_timeout(
        &mut self,
        now: Instant,
        dice: &mut Dice,
        out: &mut dyn FnMut(Output),
    ) {
        let due: Vec<RelayId> = self
            .links
            .iter()
            .filter(|(_, link)| link.deadline().is_some_and(|at| now >= at))
            .map(|(&relay, _)| relay)
            .collect();
        for relay in due {
            if let Some(mut hand) = self.hand(relay, now, dice, out) {
                hand.on_timeout();
            }
        }
        self.keep(now, dice, out);
    }

    /// When [`Self::on_timeout`] has something to do.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.links.values().filter_map(Link::deadline).min()
    }

    /// Opens what should be open and closes what should not.
    pub(crate) fn keep(&mut self, now: Instant, dice: &mut Dice, out: &mut dyn FnMut(Output)) {
        self.prefer();
        let warm = self.warm();
        for &relay in &warm {
            match self.links.get_mut(&relay) {
                Some(link) => link.visit_until = None,
                None => {
                    self.links.insert(relay, Link::new(None, now));
                    if let Some(mut hand) = self.hand(relay, now, dice, out) {
                        hand.on_timeout();
                    }
                }
            }
        }
        for (relay, link) in &mut self.links {
            if !warm.contains(relay) && link.visit_until.is_none() {
                link.visit_until = Some(now + VISIT);
            }
        }
        let (known, links) = (&self.known, &self.links);
        let is_over = |(relay, link): &(&RelayId, &Link)| {
            !known.contains_key(relay) || link.visit_until.is_some_and(|until| now >= until)
        };
        let over: Vec<RelayId> = links.iter().filter(is_over).map(|(&id, _)| id).collect();
        let mut was_up = false;
        for relay in over {
            was_up |= self.transport(&relay).is_some();
            if let Some(mut hand) = self.hand(relay, now, dice, out) {
                hand.close();
            }
            self.links.remove(&relay);
        }
        if was_up {
            self.hasten_if_none_is_up(now);
        }
    }

    pub(crate) fn is_resting(&self) -> bool {
        self.resting
    }

    /// Whether the node keeps no links of its own, as keeping them costs and nobody needs them. They
    /// end as visits do.
    pub(crate) fn set_resting(
        &mut self,
        resting: bool,
        now: Instant,
        dice: &mut Dice,
        out: &mut dyn FnMut(Output),
    ) {
        self.resting = resting;
        self.keep(now, dice, out);
    }

    /// The node's own relays: the nearest ones, the first of its order, and the first peer relays, as many
    /// as it takes to have two hopeful of each.
    fn warm(&self) -> Vec<RelayId> {
        if self.resting {
            return Vec::new();
        }
        let mut warm: Vec<RelayId> = self.home.into_iter().chain(self.second).collect();
        let order = || self.order.iter().copied();
        let is_node = |relay: &RelayId| self.place(*relay).is_node();
        let peer_relays = self.first_hopeful(order().filter(is_node), PEER_RELAYS);
        let own = order().filter(|relay| self.place(*relay) == Place::Here);
        for relay in own
            .chain(self.first_hopeful(order(), ANCHORS))
            .chain(peer_relays)
        {
            if !warm.contains(&relay) && warm.len() < LINKS_MAX {
                warm.push(relay);
            }
        }
        warm
    }

    /// The first of `relays`, as many as it takes to have `wanted` hopeful ones.
    fn first_hopeful(
        &self,
        relays: impl Iterator<Item = RelayId>,
        wanted: usize,
    ) -> impl Iterator<Item = RelayId> {
        let mut hopeful = 0;
        relays.take_while(move |relay| {
            let more = hopeful < wanted;
            hopeful += usize::from(self.is_hopeful(relay));
            more
        })
    }

    /// Settles which relays are preferred: the home, the one that steps in for it, then the near
    /// ones, and the one on this node itself last.
    fn prefer(&mut self) {
        let hopeful = |relay: &RelayId| self.is_hopeful(relay);
        let mut hopeful: Vec<RelayId> = self.order.iter().copied().filter(hopeful).collect();
        let elsewhere = |relay: &RelayId| self.place(*relay) != Place::Here;
        if hopeful.iter().any(elsewhere) {
            hopeful.retain(elsewhere);
        }
        self.home = self.nearest(&hopeful, self.home);
        let others: Vec<RelayId> = hopeful
            .into_iter()
            .filter(|relay| Some(*relay) != self.home)
            .collect();
        let apart: Vec<RelayId> = others
            .iter()
            .copied()
            .filter(|relay| {
                self.home
                    .is_some_and(|home| !self.fail_together(home, *relay))
            })
            .collect();
        let among = if apart.is_empty() { &others } else { &apart };
        self.second = self.nearest(among, self.second);
        let (home, second) = (self.home, self.second);
        let mut order = self.order.clone();
        // Stable: those of which nothing is known stay in the order of their weight.
        order.sort_by_key(|relay| {
            let first = Some(*relay) != home;
            let next = Some(*relay) != second;
            let here = self.place(*relay) == Place::Here;
            (first, next, here, self.rtt(relay).unwrap_or(Duration::MAX))
        });
        self.preferred = order;
    }

    /// The nearest of `among`, which is `now` unless another is so much nearer that it is worth a
    /// move (`paths.md`). Of which nothing is known, the first.
    fn nearest(&self, among: &[RelayId], now: Option<RelayId>) -> Option<RelayId> {
        let far = |relay: &RelayId| self.rtt(relay).unwrap_or(Duration::MAX);
        let best = *among.iter().min_by_key(|relay| far(relay))?;
        let Some(now) = now.filter(|now| among.contains(now)) else {
            return Some(best);
        };
        let better = match (self.rtt(&best), self.rtt(&now)) {
            (Some(rtt), Some(than)) => is_nearer(rtt, than),
            // Of which nothing is known, the first by weight.
            (_, None) => true,
            (None, Some(_)) => false,
        };
        Some(if better { best } else { now })
    }

    fn fail_together(&self, one: RelayId, other: RelayId) -> bool {
        let of = |relay: &RelayId| {
            let about = self.known.get(relay);
            about.map_or(&[][..], |about| about.domains.as_slice())
        };
        of(&one).iter().any(|net| of(&other).contains(net))
    }

    fn hand<'a>(
        &'a mut self,
        id: RelayId,
        now: Instant,
        dice: &'a mut Dice,
        out: &'a mut dyn FnMut(Output),
    ) -> Option<Hand<'a>> {
        let link = self.links.get_mut(&id)?;
        Some(Hand {
            id,
            link,
            now,
            dice,
            out,
        })
    }
}

#[cfg(test)]
mod tests;
