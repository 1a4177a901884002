//! What is remembered of each peer that is awake, and who is known.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use mesh_linux::udp::LocalEnd;
use mesh_wire::id::{NodeId, Via};
use mesh_wireguard::{
    keys::{LocalKey, PresharedKey},
    message::INITIATION_LEN,
    peer::{Handshakes, Peer as Protocol},
    session::Session,
    timers::Activity,
};

use crate::{
    stats::{DropReason, Held, PeerStats, RECEIVED_VIAS_MAX, Traffic},
    transmit::Way,
};

/// Packets or super-packets that wait for a peer's path (`paths.md`, wake).
const HELD_MAX: usize = 64;

/// Bytes of these: two super-packets, or [`HELD_MAX`] packets of an MTU of 1,280 with room left.
const HELD_BYTES_MAX: usize = 128 << 10;

/// Bytes that wait for all peers together, so that a scan of the whole mesh cannot take the
/// memory of a small node: the first second of 64 peers.
const HELD_TOTAL_BYTES_MAX: usize = 8 << 20;

/// How long a packet waits. By then its sender has sent another.
const HELD_AGE_MAX: Duration = Duration::from_secs(2);

/// How long it waits for a stock device, which may be called once in 5 s only: for the second call's
/// answer. (The kernel holds packets until it gives up calling, after 90 s.)
const HELD_AGE_MAX_EXTERNAL: Duration = Duration::from_secs(12);

/// How often a peer's need for a path is told.
const WANTED_INTERVAL: Duration = Duration::from_millis(500);

/// How long the same initiation is sent again instead of a new one. The responder answers only
/// the first copy that arrives; two initiations may be open at a time, so answers find
/// their question on paths of up to twice this round-trip time.
const INITIATION_REUSE: Duration = Duration::from_millis(250);

/// Bits of a session's number that count the sessions of one peer: five at most at a time.
const SESSION_BITS: u32 = 8;

/// Most peers with state: what is left of the 32-bit number.
const INDEX_MAX: u32 = (1 << (u32::BITS - SESSION_BITS)) - 1;

/// The number of the peer that a session belongs to.
pub(crate) fn peer_index(session: u32) -> u32 {
    session >> SESSION_BITS
}

/// A peer that is awake.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) id: NodeId,
    /// A stock WireGuard device: its path follows its packets, and it has no core to talk to.
    pub(crate) is_external: bool,
    index: u32,
    /// By what packets leave without a lock; nothing while something must be done first.
    pub(crate) sending: ArcSwapOption<Sending>,
    /// The sessions by which packets may come.
    sessions: ArcSwap<Vec<Arc<Session>>>,
    pub(crate) activity: Activity,
    pub(crate) counts: Counts,
    /// Packets that may still go a second way as well; see [`Self::take_copies`].
    copies: AtomicU32,
    /// Whether data was sent since the last report.
    sent: AtomicBool,
    reported: AtomicBool,
    state: Mutex<State>,
}

/// By what a peer's packets leave.
#[derive(Debug)]
pub(crate) struct Sending {
    pub(crate) session: Arc<Session>,
    pub(crate) primary: Way,
    pub(crate) duplicate: Option<Via>,
}

/// Packets and bytes of one peer.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    sent_packets: AtomicU64,
    sent_bytes: AtomicU64,
    received_packets: AtomicU64,
    received_bytes: AtomicU64,
    wire_sent: AtomicU64,
    wire_received: AtomicU64,
}

impl Counts {
    pub(crate) fn sent(&self, packets: usize, bytes: usize) {
        self.sent_packets.fetch_add(packets as u64, Relaxed);
        self.sent_bytes.fetch_add(bytes as u64, Relaxed);
    }

    pub(crate) fn received(&self, packets: usize, bytes: usize) {
        self.received_packets.fetch_add(packets as u64, Relaxed);
        self.received_bytes.fetch_add(bytes as u64, Relaxed);
    }

    pub(crate) fn wire_sent(&self, bytes: usize) {
        self.wire_sent.fetch_add(bytes as u64, Relaxed);
    }

    pub(crate) fn wire_received(&self, bytes: usize) {
        self.wire_received.fetch_add(bytes as u64, Relaxed);
    }

    pub(crate) fn traffic(&self) -> Traffic {
        Traffic {
            sent_packets: self.sent_packets.load(Relaxed),
            sent_bytes: self.sent_bytes.load(Relaxed),
            received_packets: self.received_packets.load(Relaxed),
            received_bytes: self.received_bytes.load(Relaxed),
        }
    }
}

impl Peer {
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session of that number.
    pub(crate) fn session(&self, number: u32) -> Option<Arc<Session>> {
        let sessions = self.sessions.load();
        let found = sessions.iter().find(|session| session.local() == number);
        found.cloned()
    }

    /// Says how many packets go a second way as well from now on.
    pub(crate) fn allow_copies(&self, most: Option<u32>) {
        self.copies.store(most.unwrap_or(u32::MAX), Relaxed);
    }

    /// Whether packets still go a second way as well.
    pub(crate) fn has_copies(&self) -> bool {
        self.copies.load(Relaxed) > 0
    }

    /// So many went. Those of a super-packet go together: the last may be more than were allowed.
    pub(crate) fn take_copies(&self, count: usize) {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        let left = |left: u32| (left < u32::MAX).then(|| left.saturating_sub(count));
        self.copies.try_update(Relaxed, Relaxed, left).ok(); // Without a limit nothing is counted.
    }

    /// Publishes what the state has come to. Packets leave without a lock as long as there are a
    /// session and a way, and nothing waits that must go first.
    pub(crate) fn publish(&self, state: &State) {
        let sessions: Vec<_> = state.protocol.sessions().cloned().collect();
        self.sessions.store(Arc::new(sessions));
        let sending = state.sending().filter(|_| !state.has_held());
        self.sending.store(sending.map(Arc::new));
    }

    /// From now on the kernel chooses by which address of this machine packets leave, instead of by
    /// `source` or, without it, whichever it was.
    pub(crate) fn forget_source(&self, source: Option<LocalEnd>) {
        let mut state = self.lock();
        if let Some(way) = &mut state.primary
            && (source.is_none() || way.source == source)
        {
            way.source = None;
            self.publish(&state);
        }
    }

    /// Where packets go, and by what they leave, if that was learnt.
    pub(crate) fn source(&self) -> Option<(SocketAddr, LocalEnd)> {
        match self.lock().primary? {
            Way {
                via: Via::Direct(to),
                source,
            } => Some((to, source?)),
            Way {
                via: Via::Relay(_), ..
            } => None,
        }
    }

    /// Notes that data went out.
    pub(crate) fn note_sent(&self, now: Instant) {
        self.activity.sent_data(now);
        if !self.sent.load(Relaxed) {
            self.sent.store(true, Relaxed);
        }
    }

    /// Whether this is the first call since [`Self::take_report`].
    pub(crate) fn mark_for_report(&self) -> bool {
        !self.reported.load(Relaxed) && !self.reported.swap(true, Relaxed)
    }

    /// What was sent and received since the last call.
    pub(crate) fn take_report(&self) -> (bool, Vec<Via>) {
        self.reported.store(false, Relaxed);
        let sent = self.sent.swap(false, Relaxed);
        (sent, std::mem::take(&mut self.lock().received))
    }

    pub(crate) fn stats(&self, now: Instant) -> PeerStats {
        let state = self.lock();
        let since = |at: Instant| now.saturating_duration_since(at);
        PeerStats {
            traffic: self.counts.traffic(),
            wire_sent_bytes: self.counts.wire_sent.load(Relaxed),
            wire_received_bytes: self.counts.wire_received.load(Relaxed),
            last_handshake: state.protocol.last_handshake().map(since),
            last_received: state.last_received.map(since),
            has_session: state.has_session(now),
            held: state.held.len(),
            primary: state.primary.map(|way| way.via),
            duplicate: state.duplicate,
        }
    }
}

/// What changes with a peer's handshakes and paths.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) protocol: Protocol,
    pub(crate) primary: Option<Way>,
    pub(crate) duplicate: Option<Via>,
    index: u32,
    sessions_made: u8,
    received: Vec<Via>,
    last_received: Option<Instant>,
    wanted_at: Option<Instant>,
    initiation: Option<(Instant, [u8; INITIATION_LEN])>,
    held: VecDeque<HeldPacket>,
    held_bytes: usize,
    /// Nobody looks after it any more, though a thread may still have it in hand.
    forgotten: bool,
}

/// A packet, with its offload header, that waits for a path.
#[derive(Debug)]
struct HeldPacket {
    since: Instant,
    raw: Box<[u8]>,
}

impl State {
    /// By what packets can go out now.
    pub(crate) fn sending(&self) -> Option<Sending> {
        Some(Sending {
            session: Arc::clone(self.protocol.current()?),
            primary: self.primary?,
            duplicate: self.duplicate,
        })
    }

    pub(crate) fn has_session(&self, now: Instant) -> bool {
        let current = self.protocol.current();
        current.is_some_and(|session| session.is_alive(now))
    }

    /// A number for a new session.
    pub(crate) fn next_session(&mut self) -> u32 {
        self.sessions_made = self.sessions_made.wrapping_add(1);
        self.index << SESSION_BITS | u32::from(self.sessions_made)
    }

    /// Notes that authentic packets came by `via`.
    pub(crate) fn note_received(&mut self, via: Via, now: Instant) {
        self.last_received = Some(now);
        // A ring of more ways than these: the rest is not worth knowing.
        if self.received.len() < RECEIVED_VIAS_MAX && !self.received.contains(&via) {
            self.received.push(via);
        }
    }

    /// Whether it is time to say that packets wait.
    pub(crate) fn is_wanted(&mut self, now: Instant) -> bool {
        let due = self
            .wanted_at
            .is_none_or(|at| now.duration_since(at) >= WANTED_INTERVAL);
        if due {
            self.wanted_at = Some(now);
        }
        due
    }

    /// A fresh initiation.
    pub(crate) fn initiate(
        &mut self,
        key: &LocalKey,
        now: Instant,
        since_1970: Duration,
    ) -> Option<[u8; INITIATION_LEN]> {
        let number = self.next_session();
        let bytes = self.protocol.initiate(key, number, now, since_1970)?;
        self.initiation = Some((now, bytes));
        Some(bytes)
    }

    /// An initiation to send: a fresh one, or the last one again if it is young and unanswered.
    pub(crate) fn initiation(
        &mut self,
        key: &LocalKey,
        now: Instant,
        since_1970: Duration,
    ) -> Option<[u8; INITIATION_LEN]> {
        match &self.initiation {
            Some((at, bytes)) if now.duration_since(*at) < INITIATION_REUSE => Some(*bytes),
            _ => self.initiate(key, now, since_1970),
        }
    }

    /// The next initiation must be a fresh one.
    pub(crate) fn forget_initiation(&mut self) {
        self.initiation = None;
    }

    /// A handshake is complete.
    pub(crate) fn note_session(&mut self) {
        self.initiation = None;
        self.wanted_at = None;
    }

    /// Keeps a packet for later. At a limit of the peer's own its oldest packets go; at the
    /// common limit the new one does. How many were dropped.
    pub(crate) fn hold(&mut self, raw: &[u8], now: Instant, total: &AtomicUsize) -> usize {
        if self.forgotten {
            return 1;
        }
        let mut dropped = 0;
        while self.held.len() >= HELD_MAX || self.held_bytes + raw.len() > HELD_BYTES_MAX {
            if self.take_held(total).is_none() {
                break;
            }
            dropped += 1;
        }
        if total.load(Relaxed) + raw.len() > HELD_TOTAL_BYTES_MAX {
            return dropped + 1;
        }
        total.fetch_add(raw.len(), Relaxed);
        self.held_bytes += raw.len();
        self.held.push_back(HeldPacket {
            since: now,
            raw: raw.into(),
        });
        dropped
    }

    /// The packet that waits longest.
    pub(crate) fn take_held(&mut self, total: &AtomicUsize) -> Option<Box<[u8]>> {
        let held = self.held.pop_front()?;
        self.held_bytes -= held.raw.len();
        total.fetch_sub(held.raw.len(), Relaxed);
        Some(held.raw)
    }

    /// Drops what has waited too long; how many that were.
    pub(crate) fn expire_held(
        &mut self,
        is_external: bool,
        now: Instant,
        total: &AtomicUsize,
    ) -> usize {
        let age_max = if is_external {
            HELD_AGE_MAX_EXTERNAL
        } else {
            HELD_AGE_MAX
        };
        let mut dropped = 0;
        while let Some(first) = self.held.front()
            && now.duration_since(first.since) >= age_max
        {
            self.take_held(total);
            dropped += 1;
        }
        dropped
    }

    fn held(&self, now: Instant) -> Held {
        let since = |first: &HeldPacket| now.saturating_duration_since(first.since);
        Held {
            packets: self.held.len(),
            oldest: self.held.front().map(since),
        }
    }

    pub(crate) fn has_held(&self) -> bool {
        !self.held.is_empty()
    }
}

/// How a stock WireGuard peer is described.
#[derive(Debug, Clone, Default)]
pub struct External {
    /// Where it is; `None`: it must call first.
    pub endpoint: Option<SocketAddr>,
    /// Seconds of silence after which a keepalive is sent; `None`: never.
    pub keepalive_s: Option<u16>,
    /// A key that both sides share besides their own; zeros for none.
    pub preshared_key: PresharedKey,
}

impl External {
    fn keepalive(&self) -> Option<Duration> {
        let seconds = self.keepalive_s.filter(|seconds| *seconds > 0)?;
        Some(Duration::from_secs(seconds.into()))
    }
}

/// Everyone who is known, and those who are awake.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    known: HashSet<NodeId>,
    external: HashMap<NodeId, External>,
    by_id: HashMap<NodeId, Arc<Peer>>,
    by_index: HashMap<u32, Arc<Peer>>,
    /// What the peers that are gone had moved.
    past_traffic: Traffic,
    past_handshakes: Handshakes,
}

impl Peers {
    pub(crate) fn by_id(&self, id: &NodeId) -> Option<&Arc<Peer>> {
        self.by_id.get(id)
    }

    pub(crate) fn by_index(&self, index: u32) -> Option<&Arc<Peer>> {
        self.by_index.get(&index)
    }

    fn is_known(&self, id: &NodeId) -> bool {
        self.known.contains(id) || self.external.contains_key(id)
    }

    pub(crate) fn awake(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.by_id.values()
    }

    pub(crate) fn awake_len(&self) -> usize {
        self.by_id.len()
    }

    /// The peer, made now if it is known and was asleep.
    pub(crate) fn wake(&mut self, id: &NodeId, now: Instant) -> Option<Arc<Peer>> {
        if let Some(peer) = self.by_id.get(id) {
            return Some(Arc::clone(peer));
        }
        if !self.is_known(id) || self.by_id.len() >= INDEX_MAX as usize / 2 {
            return None;
        }
        // Random, so that nobody can guess a session; at most half are taken, so this ends.
        let index = loop {
            let index = rand::random_range(0..=INDEX_MAX);
            if !self.by_index.contains_key(&index) {
                break index;
            }
        };
        let external = self.external.get(id);
        let described = external.cloned().unwrap_or_default();
        let keepalive = described.keepalive();
        let peer = Arc::new(Peer {
            id: *id,
            is_external: external.is_some(),
            index,
            sending: ArcSwapOption::empty(),
            sessions: ArcSwap::default(),
            activity: Activity::new(now),
            counts: Counts::default(),
            copies: AtomicU32::new(u32::MAX),
            sent: AtomicBool::new(false),
            reported: AtomicBool::new(false),
            state: Mutex::new(State {
                protocol: Protocol::new(id.0, described.preshared_key, keepalive),
                primary: described.endpoint.map(|to| Via::Direct(to).into()),
                duplicate: None,
                index,
                sessions_made: 0,
                received: Vec::new(),
                last_received: None,
                wanted_at: None,
                initiation: None,
                held: VecDeque::new(),
                held_bytes: 0,
                forgotten: false,
            }),
        });
        self.by_id.insert(*id, Arc::clone(&peer));
        self.by_index.insert(index, Arc::clone(&peer));
        Some(peer)
    }

    /// Replaces the set of mesh peers; those who left it are forgotten at once.
    pub(crate) fn set_known(&mut self, known: HashSet<NodeId>, total: &AtomicUsize) -> usize {
        self.known = known;
        let gone: Vec<_> = self
            .by_id
            .keys()
            .filter(|id| !self.is_known(id))
            .copied()
            .collect();
        gone.iter().map(|id| self.forget(id, total)).sum()
    }

    /// Describes a stock WireGuard peer, which keeps its sessions if it had any.
    pub(crate) fn set_external(
        &mut self,
        id: NodeId,
        external: External,
        total: &AtomicUsize,
        now: Instant,
    ) {
        if self.by_id.get(&id).is_some_and(|peer| !peer.is_external) {
            self.forget(&id, total);
        }
        let before = self.external.insert(id, external.clone());
        let Some(peer) = self.wake(&id, now) else {
            return;
        };
        let mut state = peer.lock();
        state.protocol.set_keepalive(external.keepalive());
        state.protocol.set_preshared_key(external.preshared_key);
        // An endpoint that was learned stays until another one is given.
        let given = external.endpoint.map(Via::Direct);
        let given_before = before.and_then(|before| before.endpoint).map(Via::Direct);
        if given.is_some() && (given != given_before || state.primary.is_none()) {
            state.primary = given.map(Way::from);
        }
        peer.publish(&state);
    }

    pub(crate) fn remove_external(&mut self, id: &NodeId, total: &AtomicUsize) -> usize {
        let known = self.external.remove(id).is_some();
        if known { self.forget(id, total) } else { 0 }
    }

    /// Puts a peer to sleep: its sessions and what waited for it are gone. How many packets waited.
    pub(crate) fn forget(&mut self, id: &NodeId, total: &AtomicUsize) -> usize {
        let Some(peer) = self.by_id.remove(id) else {
            return 0;
        };
        self.by_index.remove(&peer.index);
        let mut state = peer.lock();
        // Threads that still hold the peer must not use it any more.
        peer.sending.store(None);
        peer.sessions.store(Arc::default());
        state.primary = None;
        state.forgotten = true;
        self.past_traffic.add(peer.counts.traffic());
        self.past_handshakes.add(state.protocol.handshakes());
        std::iter::from_fn(|| state.take_held(total)).count()
    }

    pub(crate) fn sums(&self, now: Instant) -> Sums {
        let mut sums = Sums {
            traffic: self.past_traffic,
            handshakes: self.past_handshakes,
            held: Held::default(),
        };
        for peer in self.awake() {
            let state = peer.lock();
            sums.traffic.add(peer.counts.traffic());
            sums.handshakes.add(state.protocol.handshakes());
            sums.held.add(state.held(now));
        }
        sums
    }
}

/// Of all peers together, also of those that are asleep again.
#[derive(Debug)]
pub(crate) struct Sums {
    pub(crate) traffic: Traffic,
    pub(crate) handshakes: Handshakes,
    pub(crate) held: Held,
}

/// Why a packet that [`State::hold`] gave up was dropped.
pub(crate) const HELD_DROP: DropReason = DropReason::HeldTooMany;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scan_of_the_mesh_cannot_take_the_memory() {
        let (total, now) = (AtomicUsize::new(0), Instant::now());
        let mut peers = Peers::default();
        let ids: Vec<_> = (0..100).map(|n| NodeId([n; 32])).collect();
        peers.set_known(ids.iter().copied().collect(), &total);
        let mut refused = 0;
        for id in &ids {
            let peer = peers.wake(id, now).unwrap();
            refused += (0..2)
                .map(|_| peer.lock().hold(&[0; 65_536], now, &total))
                .sum::<usize>();
        }
        assert_eq!(total.load(Relaxed), HELD_TOTAL_BYTES_MAX);
        assert_eq!(refused, 200 - 128);
        // Of one peer the oldest go first, and the sum does not drift.
        let first = peers.wake(&ids[0], now).unwrap();
        assert_eq!(first.lock().hold(&[1; 65_536], now, &total), 1);
        assert_eq!(first.lock().take_held(&total).unwrap()[0], 0);
        assert_eq!(first.lock().take_held(&total).unwrap()[0], 1);
        assert_eq!(peers.set_known(HashSet::new(), &total), 126);
        assert_eq!(total.load(Relaxed), 0);
        assert_eq!(peers.awake_len(), 0);
    }
}
