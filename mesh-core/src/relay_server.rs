//! What a relay decides: who may connect, which pairs of nodes have a session, where a frame
//! goes, and what is too much. The shell around it owns the sockets and the queues.
//!
//! A **link** is one connection of a node; a node may have one a transport (QUIC and TLS during a
//! race), and a new one replaces the old one of the same transport. A node's frames are delivered
//! to the link by which it last sent data; a new link counts as if it had. Control messages do not
//! count: a link that only stays warm pings too.
//!
//! A QUIC link may have an **address** beside it, from which the node sends frames as plain UDP
//! datagrams, and to which the relay sends the node's frames while the node does so, or pings from
//! there. It is bound by
//! a cookie and a key ([`mesh_wire::relay::udp`]), and lives no longer than its link. Nothing is
//! kept for who has not proven both: cookies and keys are computed from one secret.
//!
//! A **session** is a pair of connected nodes, one number for both directions. It begins when one
//! of them looks for the other and ends when either has no link left.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use mesh_wire::{
    id::NodeId,
    relay::{
        BadFrame, Control, PROTOCOL_VERSION, Session,
        udp::{Bind, Tag, UdpFrame, cookie_frame, pong_frame, unbound_frame},
    },
};

use self::{
    limits::{Bucket, BucketBySource, Source},
    udp::{Address, BindSecrets},
};
use crate::io::RelayTransport;

pub use self::limits::{Limits, Rate};

mod limits;
mod udp;

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

/// The two ends of plain UDP with a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct UdpPath {
    /// The node's address, as the relay sees it.
    pub remote: SocketAddr,
    /// The relay's address, where it has several.
    pub local: Option<IpAddr>,
}

/// How frames come or go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// By a link.
    Link(LinkId),
    /// As plain UDP datagrams.
    Udp(UdpPath),
}

/// Data frames of one session that came together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// Their session.
    pub session: Session,
    /// How many there are.
    pub frames: usize,
    /// Their payload together, in bytes.
    pub bytes: usize,
}

/// What becomes of data frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Send them on, unchanged.
    Forward {
        /// By this.
        way: Way,
        /// Only so many of them, the first ones; the rest are over the sender's rate, and counted.
        frames: usize,
    },
    /// Drop them. They are counted already.
    Drop(DropReason),
}

/// Why data frames go nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DropReason {
    /// No such session, or not one of the sender's. The sender is told.
    NoSession,
    /// The sender is over its rate.
    Rate,
    /// Nobody is bound to the address from which they came.
    Unbound {
        /// Tell it so ([`unbound_frame`]). Not always said: whose address it is, is not proven.
        tell: bool,
    },
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
    /// Data frames from addresses that are not bound.
    pub unbound_frames: u64,
    /// Addresses bound, again or for the first time.
    pub binds: u64,
    /// Requests to bind with a cookie, but without a live link's key, or older than the last.
    pub binds_refused: u64,
    /// Handshakes refused by rate.
    pub handshakes_limited: u64,
    /// Connections refused for want of room.
    pub links_refused: u64,
    /// Links replaced by a newer one of the same node and transport.
    pub links_replaced: u64,
    /// `FindPeer` refused for want of room.
    pub finds_refused: u64,
    /// Pairs refused because neither of them is served here.
    pub pairs_not_served: u64,
}

/// A link is told about lost sessions at most this often: enough to correct a node, too little
/// to be a flood back.
const SESSION_GONE_GAP: Duration = Duration::from_millis(100);

/// An address from which nothing came for so long is not sent to any more; its node pings every
/// 15 s, and would have lost two pings.
const ADDRESS_SILENCE_MAX: Duration = Duration::from_secs(35);

/// Answers a second, and at once, to frames of unbound addresses of one source prefix: as many as
/// it may begin handshakes.
const UNBOUND_ANSWERS_PER_S: u64 = 64;
const UNBOUND_ANSWERS_BURST: u64 = 256;

/// The decisions of one relay.
#[derive(Debug)]
pub struct RelayServer {
    limits: Limits,
    secrets: BindSecrets,
    /// With which epoch a place begins: so that a session of the relay's life before is not
    /// mistaken for one of this.
    first_epoch: u16,
    /// One node of each pair is one of these. `None`: everybody.
    served: Option<BTreeSet<NodeId>>,
    stopping: bool,
    next_link: u64,
    links: BTreeMap<LinkId, Link>,
    nodes: BTreeMap<NodeId, Node>,
    /// Who wants to know about a node, connected or not.
    watchers: BTreeMap<NodeId, BTreeSet<NodeId>>,
    places: Vec<Place>,
    free_places: VecDeque<u32>,
    sources: BTreeMap<Source, usize>,
    /// Bound addresses: at most one a link.
    addresses: BTreeMap<SocketAddr, LinkId>,
    handshakes: BucketBySource,
    unbound_answers: BucketBySource,
    outputs: VecDeque<Output>,
    counters: Counters,
}

#[derive(Debug)]
struct Link {
    node: NodeId,
    transport: RelayTransport,
    source: Source,
    told_session_gone: Option<Instant>,
    address: Option<Address>,
    /// The last bind's: an older one is a replay.
    bind_sequence: u64,
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

impl RelayServer {
    /// A relay without links. `secret` is random and stays in the process.
    #[must_use]
    pub fn new(limits: Limits, secret: &Tag, now: Instant) -> Self {
        let secrets = BindSecrets::new(secret, now);
        let (seed, first_epoch) = secrets.numbers();
        Self {
            handshakes: BucketBySource::new(seed, limits.handshakes_per_s, limits.handshakes_burst),
            unbound_answers: BucketBySource::new(
                seed,
                UNBOUND_ANSWERS_PER_S,
                UNBOUND_ANSWERS_BURST,
            ),
            limits,
            secrets,
            first_epoch,
            served: None,
            stopping: false,
            next_link: 0,
            links: BTreeMap::new(),
            nodes: BTreeMap::new(),
            watchers: BTreeMap::new(),
            places: Vec::new(),
            free_places: VecDeque::new(),
            sources: BTreeMap::new(),
            addresses: BTreeMap::new(),
            outputs: VecDeque::new(),
            counters: Counters::default(),
        }
    }

    /// Whom the relay serves is now this: one node of each pair is one of `served`; `None`: everybody.
    /// Others may have a link, for they may want one of those. Sessions of pairs that are served no
    /// more end.
    pub fn set_served(&mut self, served: Option<BTreeSet<NodeId>>) {
        self.served = served;
        let pairs = self.places.iter().filter_map(|place| place.pair);
        let ended: Vec<_> = pairs.filter(|&[a, b]| !self.serves(a, b)).collect();
        for [a, b] in ended {
            self.end_session(a, b);
        }
    }

    /// A connection wants to begin its TLS handshake. Only its rate counts: whether there is room
    /// is decided when it is known who comes, for a node that comes back takes none.
    ///
    /// # Errors
    ///
    /// [`Refusal`]: close it without an answer.
    pub fn handle_handshake(&mut self, from: IpAddr, now: Instant) -> Result<(), Refusal> {
        if self.handshakes.take(from.into(), now) {
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
        let state = Link {
            node,
            transport,
            source,
            told_session_gone: None,
            address: None,
            bind_sequence: 0,
        };
        self.links.insert(link, state);
        *self.sources.entry(source).or_default() += 1;
        let burst_bytes = self.limits.rate.map_or(0, |rate| rate.burst_bytes);
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
        let Some(&Link {
            node, transport, ..
        }) = self.links.get(&link)
        else {
            return;
        };
        match message {
            Control::AskBindKey if transport == RelayTransport::Quic => {
                self.send(link, Control::BindKey(self.secrets.key(link)));
            }
            Control::Unbind { sequence } => {
                let bound = self.links.get(&link).map(|link| link.bind_sequence);
                if bound.is_some_and(|bound| bound <= sequence) {
                    self.unbind(link);
                }
            }
            Control::FindPeer { node: peer } => self.find_peer(node, link, peer),
            Control::Ping { txid } => self.send(link, Control::Pong { txid }),
            // What only relays say, what is said once, and answers to what was not asked.
            Control::Hello { .. }
            | Control::Welcome
            | Control::Peer { .. }
            | Control::SessionGone { .. }
            | Control::GoAway { .. }
            | Control::Pong { .. }
            // A network that carries TLS only would not carry this either.
            | Control::AskBindKey
            | Control::BindKey(_) => {}
        }
    }

    /// A datagram of the UDP framing came that is no data. Returns the answer, if it has one: never
    /// longer than the datagram.
    ///
    /// # Errors
    ///
    /// [`BadFrame`]: count it and drop it.
    pub fn handle_udp(
        &mut self,
        path: UdpPath,
        datagram: &[u8],
        now: Instant,
    ) -> Result<Option<Vec<u8>>, BadFrame> {
        Ok(match UdpFrame::decode(datagram)? {
            UdpFrame::Bind(bind) => self.bind(path, &bind, now),
            UdpFrame::Ping { txid } => match self.heard_from(path.remote, now) {
                Some(link) => {
                    self.use_address(link);
                    Some(pong_frame(txid, datagram.len()))
                }
                None => unbound_frame(datagram)
                    .filter(|_| self.may_tell_unbound(path.remote.ip(), now))
                    .map(Vec::from),
            },
            // What only relays say; and data, which comes in batches.
            UdpFrame::Data(_)
            | UdpFrame::Cookie { .. }
            | UdpFrame::Bound(_)
            | UdpFrame::Pong { .. }
            | UdpFrame::Unbound { .. } => None,
        })
    }

    /// Data frames came.
    pub fn handle_data(&mut self, from: Way, batch: Batch, now: Instant) -> Verdict {
        let link = match from {
            Way::Link(link) => link,
            Way::Udp(path) => match self.heard_from(path.remote, now) {
                Some(link) => link,
                None => return self.unbound(path.remote.ip(), batch, now),
            },
        };
        let Some(&Link { node: sender, .. }) = self.links.get(&link) else {
            return self.no_session(link, batch, now); // Replaced a moment ago.
        };
        self.sent_data(sender, link, matches!(from, Way::Udp(_)));
        let receiver = self.other_node(batch.session, sender);
        let Some(way) = receiver.and_then(|receiver| self.way_to(receiver, now)) else {
            return self.no_session(link, batch, now);
        };
        let frames = self.affordable(sender, batch, now);
        self.counters.rate_limited_frames += (batch.frames - frames) as u64;
        if frames == 0 {
            return Verdict::Drop(DropReason::Rate);
        }
        self.counters.forwarded_frames += frames as u64;
        let bytes = batch.bytes / batch.frames.max(1) * frames;
        let bytes = if frames == batch.frames {
            batch.bytes
        } else {
            bytes
        };
        self.counters.forwarded_bytes += bytes as u64;
        Verdict::Forward { way, frames }
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

    fn serves(&self, a: NodeId, b: NodeId) -> bool {
        let served = self.served.as_ref();
        served.is_none_or(|served| served.contains(&a) || served.contains(&b))
    }

    fn find_peer(&mut self, asker: NodeId, link: LinkId, peer: NodeId) {
        let is_served = self.serves(asker, peer);
        if !is_served || !self.watch(asker, peer) {
            if is_served {
                self.counters.finds_refused += 1;
            } else {
                self.counters.pairs_not_served += 1;
            }
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
            let epoch = self.first_epoch;
            self.places.push(Place { epoch, pair: None });
            return Some(number);
        }
        self.free_places.pop_front()
    }

    /// Ends the session of a pair, and tells both.
    fn end_session(&mut self, a: NodeId, b: NodeId) {
        for (node, peer) in [(a, b), (b, a)] {
            let session = self.nodes.get_mut(&node);
            let session = session.and_then(|node| node.sessions.remove(&peer));
            if let Some(session) = session.filter(|_| node == a) {
                self.close_session(session);
            }
            self.send_to_node(
                node,
                Control::Peer {
                    node: peer,
                    session: None,
                },
            );
        }
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

    fn no_session(&mut self, link: LinkId, batch: Batch, now: Instant) -> Verdict {
        self.counters.no_session_frames += batch.frames as u64;
        if let Some(state) = self.links.get_mut(&link) {
            let told = state.told_session_gone;
            if told.is_none_or(|at| now.saturating_duration_since(at) >= SESSION_GONE_GAP) {
                state.told_session_gone = Some(now);
                let session = batch.session;
                self.send(link, Control::SessionGone { session });
            }
        }
        Verdict::Drop(DropReason::NoSession)
    }

    fn unbound(&mut self, from: IpAddr, batch: Batch, now: Instant) -> Verdict {
        self.counters.unbound_frames += batch.frames as u64;
        let tell = self.may_tell_unbound(from, now);
        Verdict::Drop(DropReason::Unbound { tell })
    }

    fn may_tell_unbound(&mut self, from: IpAddr, now: Instant) -> bool {
        self.unbound_answers.take(from.into(), now)
    }

    /// The link of a bound address, from which something came just now.
    fn heard_from(&mut self, remote: SocketAddr, now: Instant) -> Option<LinkId> {
        let link = *self.addresses.get(&remote)?;
        let address = self.links.get_mut(&link)?.address.as_mut()?;
        address.heard = now;
        Some(link)
    }

    fn bind(&mut self, path: UdpPath, bind: &Bind, now: Instant) -> Option<Vec<u8>> {
        let remote = path.remote;
        if !self.secrets.is_cookie_good(remote, bind, now) {
            let cookie = self.secrets.cookie(remote, bind, now);
            return Some(cookie_frame(bind.sequence, &cookie));
        }
        let link = LinkId(bind.id);
        let key = self.secrets.key(link);
        let state = self.links.get(&link).filter(|_| key.proves(bind));
        let is_new = |state: &Link| {
            let again = state
                .address
                .as_ref()
                .is_some_and(|it| it.path.remote == remote);
            // The same once more: the answer was lost.
            bind.sequence > state.bind_sequence || (bind.sequence == state.bind_sequence && again)
        };
        if !state.is_some_and(is_new) {
            self.counters.binds_refused += 1;
            return None;
        }
        if self.addresses.get(&remote) != Some(&link) {
            self.unbind(link);
            if let Some(before) = self.addresses.get(&remote).copied() {
                self.unbind(before); // A NAT gave the address to another node.
            }
            self.addresses.insert(remote, link);
        }
        let state = self.links.get_mut(&link)?;
        state.bind_sequence = bind.sequence;
        state.address = Some(Address {
            path,
            heard: now,
            in_use: false,
        });
        self.counters.binds += 1;
        Some(key.bound(bind))
    }

    /// A node that pings from its address is ready to receive there, and wants to.
    fn use_address(&mut self, link: LinkId) {
        if let Some(&Link { node, .. }) = self.links.get(&link) {
            self.sent_data(node, link, true);
        }
    }

    fn unbind(&mut self, link: LinkId) {
        let state = self.links.get_mut(&link);
        if let Some(address) = state.and_then(|state| state.address.take()) {
            self.addresses.remove(&address.path.remote);
        }
    }

    /// How frames reach a node.
    fn way_to(&self, node: NodeId, now: Instant) -> Option<Way> {
        let link = self.nodes.get(&node)?.current;
        let address = self.links.get(&link)?.address.as_ref();
        let address = address.filter(|address| address.in_use && address.is_alive(now));
        Some(address.map_or(Way::Link(link), |address| Way::Udp(address.path)))
    }

    /// How many frames of the batch the sender's rate allows.
    fn affordable(&mut self, sender: NodeId, batch: Batch, now: Instant) -> usize {
        match (self.limits.rate, self.nodes.get_mut(&sender)) {
            (Some(rate), Some(node)) => node.rate.take_frames(rate, batch.frames, batch.bytes, now),
            (None, _) | (_, None) => batch.frames,
        }
    }

    fn tell_watchers_that_came(&mut self, node: NodeId) {
        let watchers = self.watchers.get(&node).cloned().unwrap_or_default();
        for watcher in watchers {
            if !self.serves(watcher, node) {
                self.counters.pairs_not_served += 1; // It was when `watcher` asked.
                continue;
            }
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
        self.unbind(link);
        let state = self.links.remove(&link)?;
        if let Some(count) = self.sources.get_mut(&state.source) {
            *count -= 1;
            if *count == 0 {
                self.sources.remove(&state.source);
            }
        }
        Some(state)
    }

    fn sent_data(&mut self, node: NodeId, link: LinkId, by_udp: bool) {
        if let Some(node) = self.nodes.get_mut(&node) {
            node.current = link;
        }
        let state = self.links.get_mut(&link);
        if let Some(address) = state.and_then(|state| state.address.as_mut()) {
            address.in_use = by_udp;
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

#[cfg(test)]
mod tests;
