//! When this node announces itself on its LANs, and which of others' announcements it believes. Pure: it gets the time with
//! each call, and never the time of day.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use ipnet::IpNet;
use mesh_core::offline::Version;
use mesh_wire::{
    announcement::{Announcement, BadAnnouncement, Signed},
    id::{Identity, MeshId, NodeId, NodeName},
};
use rand::{RngExt as _, SeedableRng as _, rngs::Xoshiro256PlusPlus};

/// After the start, and after each change of the network: three, as one may be lost, and as a switch may need a second
/// until it passes frames on.
const ROUND: [Duration; 3] = [
    Duration::ZERO,
    Duration::from_millis(300),
    Duration::from_millis(1_000),
];

/// Then so often, give or take a quarter: whoever comes says so, and is answered; this is for those who missed it. 50 nodes
/// with two families of 850 bytes each are 280 bytes/s that a node hears.
const EVERY: Duration = Duration::from_secs(300);

/// Who hears somebody for the first time, or somebody whose state of the mesh is older, answers within this, by chance: 50 do
/// not answer at once.
const ANSWER_WITHIN: Duration = Duration::from_millis(300);

/// Another state of the mesh is said so often: while it changes all the time, 30 bytes/s.
const NEWS_EVERY: Duration = Duration::from_secs(30);

/// The least time between two announcements.
const GAP: Duration = Duration::from_millis(200);

/// Announcements at once, and how long each takes to come back: four rounds of turmoil, and then one in 5 s, which is
/// 340 bytes/s.
const SENT_MAX: u32 = 12;
const SENT_EVERY: Duration = Duration::from_secs(5);

/// Announcements that are looked at closely, of one sender: an honest one needs three in a second and one for each
/// newcomer.
const SOURCE_MAX: u32 = 8;
const SOURCE_EVERY: Duration = Duration::from_millis(250);

/// The same of all together: 256 nodes that start at once, and then 64 a second, each of which costs two checks of a
/// signature: 0.3 ms, or 2 % of a core.
const ALL_MAX: u32 = 256;
const ALL_EVERY: Duration = Duration::from_micros(15_625);

/// Senders whose rate is known; more are not listened to until one of these was quiet for 2 s.
const SOURCES_MAX: usize = 512;

/// Neighbours that are remembered: more than a LAN has. Beyond it, the one that was heard longest ago makes room.
pub const NEIGHBOURS_MAX: usize = 512;

/// Why an announcement is not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Refusal {
    /// No announcement, or of a form that this version does not know.
    Malformed,
    /// Of another mesh.
    OtherMesh,
    /// This node's own.
    Own,
    /// It came from an address that is not on the LAN on which it came.
    OffLink,
    /// It came from an address that is not one of those in it.
    OtherSource,
    /// No newer than what was heard of its node since that started: a copy, or a replay.
    Repeated,
    /// Too many came, from there or from all.
    TooMany,
    /// The mesh has no such node, as far as is known here, and it has no newer state by which there might be one.
    Unknown,
    /// Certificate or signature are wrong, or somebody else's.
    Forged,
}

impl Refusal {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Malformed,
        Self::OtherMesh,
        Self::Own,
        Self::OffLink,
        Self::OtherSource,
        Self::Repeated,
        Self::TooMany,
        Self::Unknown,
        Self::Forged,
    ];

    /// As a counter's label.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::OtherMesh => "other_mesh",
            Self::Own => "own",
            Self::OffLink => "off_link",
            Self::OtherSource => "other_source",
            Self::Repeated => "repeated",
            Self::TooMany => "too_many",
            Self::Unknown => "unknown_node",
            Self::Forged => "forged",
        }
    }
}

impl From<BadAnnouncement> for Refusal {
    fn from(bad: BadAnnouncement) -> Self {
        match bad {
            BadAnnouncement::Malformed => Self::Malformed,
            BadAnnouncement::OtherMesh => Self::OtherMesh,
        }
    }
}

/// What this node knows of the mesh.
#[derive(Debug)]
pub struct Known<'a> {
    /// The mesh.
    pub mesh: MeshId,
    /// This node.
    pub own: NodeId,
    /// All nodes' names.
    pub names: &'a BTreeMap<NodeId, NodeName>,
    /// Which state of the mesh that is.
    pub version: Version,
}

/// A datagram that came.
#[derive(Debug, Clone, Copy)]
pub struct Heard<'a> {
    /// From where.
    pub from: IpAddr,
    /// The networks of the interface by which it came.
    pub nets: &'a [IpNet],
    /// The datagram.
    pub datagram: &'a [u8],
}

/// Somebody of this mesh is on this LAN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Believed {
    /// Who.
    pub node: NodeId,
    /// By its certificate.
    pub name: NodeName,
    /// Where it may be called.
    pub addresses: Vec<SocketAddr>,
    /// Which state of the mesh it can give.
    pub version: Version,
}

/// What is counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// Announcements sent; to all LANs counts once.
    pub sent: u64,
    /// Believed.
    pub believed: u64,
    /// Not believed, and why.
    pub refused: BTreeMap<Refusal, u64>,
}

/// One node on its LANs.
#[derive(Debug)]
pub struct Machine {
    boot: u64,
    count: u64,
    /// Announcements that are due, the next one first.
    due: Vec<Instant>,
    sent: Bucket,
    sent_at: Option<Instant>,
    /// When another state was, or will be, said last.
    news_at: Option<Instant>,
    all: Bucket,
    sources: BTreeMap<IpAddr, Bucket>,
    neighbours: BTreeMap<NodeId, Neighbour>,
    counts: Counts,
    dice: Xoshiro256PlusPlus,
}

#[derive(Debug, Clone, Copy)]
struct Neighbour {
    boot: u64,
    count: u64,
    heard_at: Instant,
}

impl Machine {
    /// On no LAN yet.
    #[must_use]
    pub fn new(seed: u64, now: Instant) -> Self {
        let mut dice = Xoshiro256PlusPlus::seed_from_u64(seed);
        Self {
            boot: dice.random(),
            count: 0,
            due: Vec::new(),
            sent: Bucket::full(SENT_MAX, SENT_EVERY, now),
            sent_at: None,
            news_at: None,
            all: Bucket::full(ALL_MAX, ALL_EVERY, now),
            sources: BTreeMap::new(),
            neighbours: BTreeMap::new(),
            counts: Counts::default(),
            dice,
        }
    }

    /// The LANs of this node, or its addresses there, are others now: it says so. `any`: there is one.
    pub fn handle_lans(&mut self, any: bool, now: Instant) {
        self.due = if any {
            ROUND.map(|after| now + after).to_vec()
        } else {
            Vec::new()
        };
    }

    /// This node has another state of the mesh: neighbours may want it.
    pub fn handle_news(&mut self, now: Instant) {
        if self.due.is_empty() {
            return; // On no LAN.
        }
        let within = u64::try_from(ANSWER_WITHIN.as_millis()).unwrap_or(u64::MAX);
        let after = Duration::from_millis(self.dice.random_range(0..=within));
        let due = self.news_at.map_or(now, |at| now.max(at + NEWS_EVERY)) + after;
        if self.news_at.is_some_and(|at| at > now) {
            return; // It will be said with what comes until then.
        }
        self.news_at = Some(due);
        self.due.push(due);
        self.due.sort();
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.due.first().map(|due| self.may_send_at(*due))
    }

    /// The deadline has come. Returns what makes the announcement new, if one is to be sent.
    pub fn handle_timeout(&mut self, now: Instant) -> Option<(u64, u64)> {
        if self.poll_timeout().is_none_or(|due| due > now) {
            return None;
        }
        // All that is due by now is said by this one.
        self.due.retain(|due| *due > now);
        if self.due.is_empty() {
            self.due
                .push(now + EVERY.mul_f64(self.dice.random_range(0.75..1.25)));
        }
        self.sent.take(now);
        self.sent_at = Some(now);
        self.count += 1;
        self.counts.sent += 1;
        Some((self.boot, self.count))
    }

    /// A datagram came. `verify` checks certificate and signature, and says whose they are: it is asked last, and rarely.
    ///
    /// # Errors
    ///
    /// [`Refusal`], which is counted.
    pub fn handle_datagram(
        &mut self,
        heard: Heard<'_>,
        known: &Known<'_>,
        verify: impl FnOnce(&Signed) -> Option<Identity>,
        now: Instant,
    ) -> Result<Believed, Refusal> {
        let judged = self.judge(heard, known, verify, now);
        match &judged {
            Ok(_) => self.counts.believed += 1,
            Err(refusal) => *self.counts.refused.entry(*refusal).or_default() += 1,
        }
        judged
    }

    /// What was counted.
    #[must_use]
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    fn judge(
        &mut self,
        heard: Heard<'_>,
        known: &Known<'_>,
        verify: impl FnOnce(&Signed) -> Option<Identity>,
        now: Instant,
    ) -> Result<Believed, Refusal> {
        let signed = Signed::decode(heard.datagram, &known.mesh)?;
        let said = Announcement::decode(&signed.statement)?;
        if said.mesh != known.mesh {
            return Err(Refusal::OtherMesh);
        }
        if said.node == known.own {
            return Err(Refusal::Own);
        }
        let is_near = |ip: &IpAddr| heard.nets.iter().any(|net| net.contains(ip));
        if !is_near(&heard.from) {
            return Err(Refusal::OffLink);
        }
        if !said.addresses.contains(&heard.from) {
            return Err(Refusal::OtherSource);
        }
        let before = self.neighbours.get(&said.node);
        if before.is_some_and(|last| last.boot == said.boot && said.count <= last.count) {
            return Err(Refusal::Repeated);
        }
        let is_new = before.is_none_or(|last| last.boot != said.boot);
        let version = Version {
            epoch: said.epoch,
            made_unix_ms: said.made_unix_ms,
        };
        let name = known.names.get(&said.node);
        if name.is_none() && version <= known.version {
            return Err(Refusal::Unknown);
        }
        // Only what nothing speaks against costs a signature, and counts.
        if !self.may_listen(heard.from, now) {
            return Err(Refusal::TooMany);
        }
        let name = match verify(&signed) {
            Some(Identity::Node { name: own, id })
                if id == said.node && name.is_none_or(|name| *name == own) =>
            {
                own
            }
            _ => return Err(Refusal::Forged),
        };
        self.remember(&said, now);
        // Who is behind was away when this node's state was news. While it changes all the time `SENT_EVERY` holds.
        if is_new || version < known.version {
            let within = u64::try_from(ANSWER_WITHIN.as_millis()).unwrap_or(u64::MAX);
            let after = Duration::from_millis(self.dice.random_range(0..=within));
            self.due.push(now + after);
            self.due.sort();
        }
        let addresses = said
            .addresses
            .iter()
            .filter(|ip| is_near(ip) && is_callable(ip));
        let addresses = addresses
            .map(|ip| SocketAddr::new(*ip, said.port))
            .collect();
        Ok(Believed {
            node: said.node,
            name,
            addresses,
            version,
        })
    }

    fn remember(&mut self, said: &Announcement, now: Instant) {
        if self.neighbours.len() >= NEIGHBOURS_MAX && !self.neighbours.contains_key(&said.node) {
            let oldest = self.neighbours.iter().min_by_key(|(_, one)| one.heard_at);
            if let Some(oldest) = oldest.map(|(node, _)| *node) {
                self.neighbours.remove(&oldest);
            }
        }
        let neighbour = Neighbour {
            boot: said.boot,
            count: said.count,
            heard_at: now,
        };
        self.neighbours.insert(said.node, neighbour);
    }

    fn may_listen(&mut self, from: IpAddr, now: Instant) -> bool {
        if self.sources.len() >= SOURCES_MAX && !self.sources.contains_key(&from) {
            self.sources.retain(|_, bucket| !bucket.is_full(now));
            if self.sources.len() >= SOURCES_MAX {
                return false;
            }
        }
        let fresh = || Bucket::full(SOURCE_MAX, SOURCE_EVERY, now);
        let source = self.sources.entry(from).or_insert_with(fresh);
        source.take(now) && self.all.take(now)
    }

    /// When something that is due may be sent.
    fn may_send_at(&self, due: Instant) -> Instant {
        let gap = self.sent_at.map_or(due, |at| at + GAP);
        due.max(gap).max(self.sent.next_at())
    }
}

/// What a peer can be called at: a link-local IPv6 address means nothing without an interface.
fn is_callable(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast(),
        IpAddr::V6(ip) => {
            let odd = ip.is_unspecified() || ip.is_loopback() || ip.is_multicast();
            !odd && !ip.is_unicast_link_local() && ip.to_ipv4_mapped().is_none()
        }
    }
}

/// So many at once, and one more each time.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    /// When it is full again.
    full_at: Instant,
    max: u32,
    every: Duration,
}

impl Bucket {
    fn full(max: u32, every: Duration, now: Instant) -> Self {
        Self {
            full_at: now,
            max,
            every,
        }
    }

    fn is_full(&self, now: Instant) -> bool {
        self.full_at <= now
    }

    /// When there is one to be taken.
    fn next_at(&self) -> Instant {
        let spare = self.every * self.max.saturating_sub(1);
        self.full_at.checked_sub(spare).unwrap_or(self.full_at)
    }

    fn take(&mut self, now: Instant) -> bool {
        if self.next_at() > now {
            return false;
        }
        self.full_at = self.full_at.max(now) + self.every;
        true
    }
}

#[cfg(test)]
mod tests;
