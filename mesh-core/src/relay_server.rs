//! What a relay decides: who may connect, which pairs of nodes have a session, where a frame
//! goes, and what is too much. The shell around it owns the sockets and the queues.
//!
//! A **link** is one connection of a node; a node may have one a transport (QUIC and TLS during a
//! race), and a new one replaces the old one of the same transport. A node's frames are delivered
//! to the link by which it last sent data; a new link counts as if it had. Control messages do not
//! count: a link that only stays warm pings too.
//!
//! A **session** is a pair of connected nodes, one number for both directions. It begins when one
//! of them looks for the other and ends when either has no link left.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::IpAddr,
    time::{Duration, Instant},
};

use mesh_wire::{
    id::{NodeId, canonical_ip},
    relay::{Control, PROTOCOL_VERSION, Session},
};

use crate::io::RelayTransport;

/// How much is too much. The defaults fit a relay with 1 GiB of memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Links at once. Each may hold 256 KiB of queue when its receiver is slow, and for a QUIC
    /// receiver that is gone 320 KiB of books about 2 MiB in flight: 1,024 such links need 590 MiB.
    pub links_max: usize,
    /// Links at once from one source prefix: a site of 500 nodes behind one NAT, twice.
    pub links_per_source_max: usize,
    /// Peers that one node may ask to be told about.
    pub interests_per_node_max: usize,
    /// Sessions at once: about 200 bytes each, 13 MiB.
    pub sessions_max: usize,
    /// Sessions of one node at once.
    pub sessions_per_node_max: usize,
    /// Payload that one node may send on, in bytes a second.
    pub bytes_per_s: u64,
    /// Payload that one node may send on at once, in bytes.
    pub burst_bytes: u64,
    /// Handshakes that one source prefix may begin, a second.
    pub handshakes_per_s: u64,
    /// Handshakes that one source prefix may begin at once: a site that comes back.
    pub handshakes_burst: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self::with_rate(125_000_000) // 1 Gb/s
    }
}

impl Limits {
    /// The defaults, but for the rate of one node.
    #[must_use]
    pub fn with_rate(bytes_per_s: u64) -> Self {
        Self {
            links_max: 1024,
            links_per_source_max: 1000,
            interests_per_node_max: 1024,
            sessions_max: 65_536,
            sessions_per_node_max: 1024,
            bytes_per_s,
            // A quarter of a second, and never less than 40 full-size packets.
            burst_bytes: (bytes_per_s / 4).max(65_536),
            handshakes_per_s: 64,
            handshakes_burst: 256,
        }
    }
}

/// One connection of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(u64);

/// Something must be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Send a control message by a link.
    Send {
        /// The link.
        link: LinkId,
        /// The message.
        message: Control,
    },
    /// Close a link, which the server has forgotten already.
    Close {
        /// The link.
        link: LinkId,
    },
}

/// Why a connection is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Refusal {
    /// Too many handshakes from that source prefix.
    #[error("too many handshakes from this network")]
    HandshakeRate,
    /// [`Limits::links_per_source_max`].
    #[error("too many connections from this network")]
    SourceFull,
    /// [`Limits::links_max`].
    #[error("the relay is full")]
    Full,
    /// The node speaks another version.
    #[error("the relay speaks version {PROTOCOL_VERSION} only")]
    Version,
    /// The relay is stopping.
    #[error("the relay is stopping")]
    Stopping,
}

/// What becomes of a data frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Send it on, unchanged, by this link.
    Forward(LinkId),
    /// Drop it. It is counted already.
    Drop(DropReason),
}

/// Why a data frame goes nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DropReason {
    /// No such session, or not one of the sender's. The sender is told.
    NoSession,
    /// The sender is over its rate.
    Rate,
}

/// What happened since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Data frames sent on.
    pub forwarded_frames: u64,
    /// Bytes of payload sent on.
    pub forwarded_bytes: u64,
    /// Data frames for a session that is not there.
    pub no_session_frames: u64,
    /// Data frames above a node's rate.
    pub rate_limited_frames: u64,
    /// Handshakes refused by rate.
    pub handshakes_limited: u64,
    /// Connections refused for want of room.
    pub links_refused: u64,
    /// Links replaced by a newer one of the same node and transport.
    pub links_replaced: u64,
    /// `FindPeer` refused for want of room.
    pub finds_refused: u64,
}

/// A link is told about lost sessions at most this often: enough to correct a node, too little
/// to be a flood back.
const SESSION_GONE_GAP: Duration = Duration::from_millis(100);

/// Buckets of the handshake limiter. Prefixes share a bucket by a keyed hash, so that no number
/// of forged sources makes the table grow: 4,096 × 24 bytes.
const HANDSHAKE_BUCKETS: usize = 4096;

/// The decisions of one relay.
#[derive(Debug)]
pub struct RelayServer {
    limits: Limits,
    seed: u64,
    stopping: bool,
    next_link: u64,
    links: BTreeMap<LinkId, Link>,
    nodes: BTreeMap<NodeId, Node>,
    /// Who wants to know about a node, connected or not.
    watchers: BTreeMap<NodeId, BTreeSet<NodeId>>,
    places: Vec<Place>,
    free_places: VecDeque<u32>,
    sources: BTreeMap<Source, usize>,
    handshakes: Vec<Option<Bucket>>,
    outputs: VecDeque<Output>,
    counters: Counters,
}

#[derive(Debug)]
struct Link {
    node: NodeId,
    transport: RelayTransport,
    source: Source,
    told_session_gone: Option<Instant>,
}

#[derive(Debug)]
struct Node {
    /// At most one a transport.
    links: BTreeMap<RelayTransport, LinkId>,
    /// Where its frames go.
    current: LinkId,
    sessions: BTreeMap<NodeId, Session>,
    interests: BTreeSet<NodeId>,
    rate: Bucket,
}

/// A place in the session table; its index is the session's number.
#[derive(Debug)]
struct Place {
    epoch: u16,
    pair: Option<[NodeId; 2]>,
}

/// The prefix that stands for one network: /24, or /48.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Source([u8; 6]);

impl From<IpAddr> for Source {
    fn from(address: IpAddr) -> Self {
        match canonical_ip(address) {
            IpAddr::V4(v4) => {
                let [a, b, c, _] = v4.octets();
                Self([0xff, 0xff, a, b, c, 0]) // ffff::/16 is no unicast prefix (RFC 4291 §2.4).
            }
            IpAddr::V6(v6) => {
                let [a, b, c, d, e, f, ..] = v6.octets();
                Self([a, b, c, d, e, f])
            }
        }
    }
}

impl RelayServer {
    /// A relay without links. `seed` is random, and spreads the handshake limiter's buckets.
    #[must_use]
    pub fn new(limits: Limits, seed: u64) -> Self {
        Self {
            limits,
            seed,
            stopping: false,
            next_link: 0,
            links: BTreeMap::new(),
            nodes: BTreeMap::new(),
            watchers: BTreeMap::new(),
            places: Vec::new(),
            free_places: VecDeque::new(),
            sources: BTreeMap::new(),
            handshakes: vec![None; HANDSHAKE_BUCKETS],
            outputs: VecDeque::new(),
            counters: Counters::default(),
        }
    }

    /// A connection wants to begin its TLS handshake. Only its rate counts: whether there is room
    /// is decided when it is known who comes, for a node that comes back takes none.
    ///
    /// # Errors
    ///
    /// [`Refusal`]: close it without an answer.
    pub fn handle_handshake(&mut self, from: IpAddr, now: Instant) -> Result<(), Refusal> {
        let source = Source::from(from);
        let mut hasher = DefaultHasher::new();
        (self.seed, source).hash(&mut hasher);
        let buckets = u64::try_from(HANDSHAKE_BUCKETS).unwrap_or(1);
        let index = usize::try_from(hasher.finish() % buckets).unwrap_or(0);
        let (rate, burst) = (self.limits.handshakes_per_s, self.limits.handshakes_burst);
        let Some(bucket) = self.handshakes.get_mut(index) else {
            return Ok(());
        };
        let bucket = bucket.get_or_insert_with(|| Bucket::full(burst, now));
        if bucket.take(1, rate, burst, now) {
            return Ok(());
        }
        self.counters.handshakes_limited += 1;
        Err(Refusal::HandshakeRate)
    }

    /// A node has shown its certificate and said [`Control::Hello`]. It is told `Welcome`, then
    /// the sessions that it has already by another link.
    ///
    /// # Errors
    ///
    /// [`Refusal`]: close the connection with that reason.
    pub fn handle_connected(
        &mut self,
        node: NodeId,
        transport: RelayTransport,
        from: IpAddr,
        version: u32,
        now: Instant,
    ) -> Result<LinkId, Refusal> {
        if self.stopping {
            return Err(Refusal::Stopping);
        }
        if version != PROTOCOL_VERSION {
            return Err(Refusal::Version);
        }
        let source = Source::from(from);
        let replaced = self.nodes.get(&node);
        let replaced = replaced.and_then(|node| node.links.get(&transport).copied());
        self.room_for(source, usize::from(replaced.is_some()))?;

        let link = LinkId(self.next_link);
        self.next_link += 1;
        let told_session_gone = None;
        let state = Link {
            node,
            transport,
            source,
            told_session_gone,
        };
        self.links.insert(link, state);
        *self.sources.entry(source).or_default() += 1;
        let burst_bytes = self.limits.burst_bytes;
        let is_new = !self.nodes.contains_key(&node);
        let entry = self.nodes.entry(node).or_insert_with(|| Node {
            links: BTreeMap::new(),
            current: link,
            sessions: BTreeMap::new(),
            interests: BTreeSet::new(),
            rate: Bucket::full(burst_bytes, now),
        });
        entry.links.insert(transport, link);
        entry.current = link;
        let known: Vec<_> = entry
            .sessions
            .iter()
            .map(|(&peer, &session)| (peer, session))
            .collect();

        if let Some(old) = replaced {
            self.forget_link(old);
            self.outputs.push_back(Output::Close { link: old });
            self.counters.links_replaced += 1;
        }
        self.send(link, Control::Welcome);
        for (peer, session) in known {
            self.send(
                link,
                Control::Peer {
                    node: peer,
                    session: Some(session),
                },
            );
        }
        if is_new {
            self.tell_watchers_that_came(node);
        }
        Ok(link)
    }

    /// A link is gone.
    pub fn handle_disconnected(&mut self, link: LinkId) {
        let Some(Link {
            node: id,
            transport,
            ..
        }) = self.forget_link(link)
        else {
            return; // Replaced: the node lives on with another.
        };
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        node.links.remove(&transport);
        match node.links.values().next() {
            Some(&other) if node.current == link => node.current = other,
            Some(_) => {}
            None => self.forget_node(id),
        }
    }

    /// A control message came by a link.
    pub fn handle_control(&mut self, link: LinkId, message: Control) {
        let Some(&Link { node, .. }) = self.links.get(&link) else {
            return;
        };
        match message {
            Control::FindPeer { node: peer } => self.find_peer(node, link, peer),
            Control::Ping { txid } => self.send(link, Control::Pong { txid }),
            // What only relays say, what is said once, and answers to what was not asked.
            Control::Hello { .. }
            | Control::Welcome
            | Control::Peer { .. }
            | Control::SessionGone { .. }
            | Control::GoAway { .. }
            | Control::Pong { .. } => {}
        }
    }

    /// A data frame with `len` bytes of payload came by a link.
    pub fn handle_data(
        &mut self,
        link: LinkId,
        session: Session,
        len: usize,
        now: Instant,
    ) -> Verdict {
        let Some(&Link { node: sender, .. }) = self.links.get(&link) else {
            return self.no_session(link, session, now); // Replaced a moment ago.
        };
        self.sent_data(sender, link);
        let Some(receiver) = self.other_node(session, sender) else {
            return self.no_session(link, session, now);
        };
        let Some(to) = self.nodes.get(&receiver).map(|node| node.current) else {
            return self.no_session(link, session, now);
        };
        let bytes = u64::try_from(len).unwrap_or(u64::MAX);
        let (rate, burst) = (self.limits.bytes_per_s, self.limits.burst_bytes);
        let bucket = self.nodes.get_mut(&sender).map(|node| &mut node.rate);
        if bucket.is_some_and(|bucket| !bucket.take(bytes, rate, burst, now)) {
            self.counters.rate_limited_frames += 1;
            return Verdict::Drop(DropReason::Rate);
        }
        self.counters.forwarded_frames += 1;
        self.counters.forwarded_bytes += bytes;
        Verdict::Forward(to)
    }

    /// The relay stops within `grace`: nobody is let in any more, and everybody is told.
    pub fn handle_stop(&mut self, grace: Duration) {
        self.stopping = true;
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        let links: Vec<_> = self.links.keys().copied().collect();
        for link in links {
            self.send(link, Control::GoAway { grace_ms });
        }
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// What happened since the start.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Links at the moment.
    #[must_use]
    pub fn links(&self) -> usize {
        self.links.len()
    }

    /// `leaving` links go when the new one comes.
    fn room_for(&mut self, source: Source, leaving: usize) -> Result<(), Refusal> {
        let here = self.sources.get(&source).copied().unwrap_or(0);
        let refusal = if self.links.len() >= self.limits.links_max + leaving {
            Refusal::Full
        } else if here >= self.limits.links_per_source_max + leaving {
            Refusal::SourceFull
        } else {
            return Ok(());
        };
        self.counters.links_refused += 1;
        Err(refusal)
    }

    fn find_peer(&mut self, asker: NodeId, link: LinkId, peer: NodeId) {
        if !self.watch(asker, peer) {
            self.counters.finds_refused += 1;
            return self.send(
                link,
                Control::Peer {
                    node: peer,
                    session: None,
                },
            );
        }
        let known = self
            .nodes
            .get(&asker)
            .and_then(|node| node.sessions.get(&peer).copied());
        if known.is_some() || !self.nodes.contains_key(&peer) {
            return self.send(
                link,
                Control::Peer {
                    node: peer,
                    session: known,
                },
            );
        }
        if self.open_session(asker, peer).is_none() {
            self.counters.finds_refused += 1;
            self.send(
                link,
                Control::Peer {
                    node: peer,
                    session: None,
                },
            );
        }
    }

    /// Returns whether `asker` may be told about `peer`, and is from now on.
    fn watch(&mut self, asker: NodeId, peer: NodeId) -> bool {
        let Some(node) = self.nodes.get_mut(&asker) else {
            return false;
        };
        let full = node.interests.len() >= self.limits.interests_per_node_max;
        if asker == peer || (full && !node.interests.contains(&peer)) {
            return false;
        }
        node.interests.insert(peer);
        self.watchers.entry(peer).or_default().insert(asker);
        true
    }

    /// Gives a pair that has none a session, and tells both. `None`: no room.
    fn open_session(&mut self, a: NodeId, b: NodeId) -> Option<()> {
        let per_node_max = self.limits.sessions_per_node_max;
        let has_room = |node: &Node| node.sessions.len() < per_node_max;
        if !self.nodes.get(&a).is_some_and(has_room) || !self.nodes.get(&b).is_some_and(has_room) {
            return None;
        }
        let number = self.free_place()?;
        let place = self.places.get_mut(usize::try_from(number).ok()?)?;
        place.pair = Some([a, b]);
        let session = Session {
            number,
            epoch: place.epoch,
        };
        for (node, peer) in [(a, b), (b, a)] {
            if let Some(node) = self.nodes.get_mut(&node) {
                node.sessions.insert(peer, session);
            }
            self.send_to_node(
                node,
                Control::Peer {
                    node: peer,
                    session: Some(session),
                },
            );
        }
        Some(())
    }

    fn free_place(&mut self) -> Option<u32> {
        // A new place while there is room: an old number rests as long as possible.
        if self.places.len() < self.limits.sessions_max {
            let number = u32::try_from(self.places.len()).ok()?;
            // So that a session of the relay's life before is not mistaken for one of this.
            let epoch = u16::try_from(self.seed & 0xffff).ok()?;
            self.places.push(Place { epoch, pair: None });
            return Some(number);
        }
        self.free_places.pop_front()
    }

    fn close_session(&mut self, session: Session) {
        let index = usize::try_from(session.number).unwrap_or(usize::MAX);
        if let Some(place) = self.places.get_mut(index) {
            place.epoch = place.epoch.wrapping_add(1);
            place.pair = None;
            self.free_places.push_back(session.number);
        }
    }

    fn other_node(&self, session: Session, sender: NodeId) -> Option<NodeId> {
        let place = self.places.get(usize::try_from(session.number).ok()?)?;
        if place.epoch != session.epoch {
            return None;
        }
        match place.pair? {
            [a, b] if a == sender => Some(b),
            [a, b] if b == sender => Some(a),
            [_, _] => None,
        }
    }

    fn no_session(&mut self, link: LinkId, session: Session, now: Instant) -> Verdict {
        self.counters.no_session_frames += 1;
        if let Some(state) = self.links.get_mut(&link) {
            let told = state.told_session_gone;
            if told.is_none_or(|at| now.saturating_duration_since(at) >= SESSION_GONE_GAP) {
                state.told_session_gone = Some(now);
                self.send(link, Control::SessionGone { session });
            }
        }
        Verdict::Drop(DropReason::NoSession)
    }

    fn tell_watchers_that_came(&mut self, node: NodeId) {
        let watchers = self.watchers.get(&node).cloned().unwrap_or_default();
        for watcher in watchers {
            if self.open_session(watcher, node).is_none() {
                self.counters.finds_refused += 1;
            }
        }
    }

    /// The last link of `id` is gone.
    fn forget_node(&mut self, id: NodeId) {
        let Some(node) = self.nodes.remove(&id) else {
            return;
        };
        for peer in node.interests {
            if let Some(watchers) = self.watchers.get_mut(&peer) {
                watchers.remove(&id);
                if watchers.is_empty() {
                    self.watchers.remove(&peer);
                }
            }
        }
        for (peer, session) in node.sessions {
            self.close_session(session);
            if let Some(peer) = self.nodes.get_mut(&peer) {
                peer.sessions.remove(&id);
            }
            self.send_to_node(
                peer,
                Control::Peer {
                    node: id,
                    session: None,
                },
            );
        }
    }

    fn forget_link(&mut self, link: LinkId) -> Option<Link> {
        let state = self.links.remove(&link)?;
        if let Some(count) = self.sources.get_mut(&state.source) {
            *count -= 1;
            if *count == 0 {
                self.sources.remove(&state.source);
            }
        }
        Some(state)
    }

    fn sent_data(&mut self, node: NodeId, link: LinkId) {
        if let Some(node) = self.nodes.get_mut(&node) {
            node.current = link;
        }
    }

    /// By every link of the node: each must know the sessions.
    fn send_to_node(&mut self, node: NodeId, message: Control) {
        let links = self.nodes.get(&node).map(|node| node.links.clone());
        for link in links.unwrap_or_default().into_values() {
            self.send(link, message);
        }
    }

    fn send(&mut self, link: LinkId, message: Control) {
        self.outputs.push_back(Output::Send { link, message });
    }
}

/// A token bucket. Tokens are kept in billionths, so that a slow rate loses nothing to rounding.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    billionths: u128,
    at: Instant,
}

const BILLION: u128 = 1_000_000_000;

impl Bucket {
    fn full(burst: u64, now: Instant) -> Self {
        Self {
            billionths: u128::from(burst) * BILLION,
            at: now,
        }
    }

    /// Takes `tokens`, if they are there.
    fn take(&mut self, tokens: u64, per_s: u64, burst: u64, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.at).as_nanos();
        let refilled = self
            .billionths
            .saturating_add(elapsed.saturating_mul(per_s.into()));
        self.billionths = refilled.min(u128::from(burst) * BILLION);
        self.at = self.at.max(now);
        match self.billionths.checked_sub(u128::from(tokens) * BILLION) {
            Some(left) => {
                self.billionths = left;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests;
