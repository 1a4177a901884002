//! What is remembered of each peer that is awake, and who is known.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use mesh_wire::id::{NodeId, Via};

use crate::{
    engine::{Engine, HANDSHAKE_LEN_MAX, INDEX_MAX, Keys, SessionIndex},
    stats::{DropReason, PeerStats, RECEIVED_VIAS_MAX, Traffic},
};

/// Packets or super-packets that wait for a peer's path (`paths.md`, wake).
const HELD_MAX: usize = 64;

/// Bytes of these: two super-packets, or [`HELD_MAX`] packets of an MTU of 1,280 with room left.
const HELD_BYTES_MAX: usize = 128 << 10;

/// Bytes that wait for all peers together, so that a scan of the whole mesh cannot take the
/// memory of a small node: the first second of 64 peers.
const HELD_TOTAL_BYTES_MAX: usize = 8 << 20;

/// How long a packet waits. By then its sender has sent another.
pub(crate) const HELD_AGE_MAX: Duration = Duration::from_secs(2);

/// How often a peer's need for a path is told.
const WANTED_INTERVAL: Duration = Duration::from_millis(500);

/// How long the same initiation is sent again instead of a new one. The responder answers only
/// the first copy that arrives; two initiations may be open at a time, so answers find
/// their question on paths of up to twice this round-trip time.
const INITIATION_REUSE: Duration = Duration::from_millis(250);

/// A peer that is awake.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) id: NodeId,
    /// Set for a stock WireGuard device: its path follows its packets, and it has no core to talk to.
    pub(crate) external: Option<External>,
    index: u32,
    reported: AtomicBool,
    state: Mutex<State>,
}

impl Peer {
    pub(crate) fn is_external(&self) -> bool {
        self.external.is_some()
    }

    /// Whether to call again when a call was not answered, though nothing waits to be sent.
    pub(crate) fn is_kept_alive(&self) -> bool {
        self.external
            .is_some_and(|external| external.keepalive_s.is_some())
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this is the first call since [`Self::take_report`].
    pub(crate) fn mark_for_report(&self) -> bool {
        !self.reported.load(Ordering::Relaxed) && !self.reported.swap(true, Ordering::Relaxed)
    }

    /// What was sent and received since the last call.
    pub(crate) fn take_report(&self) -> (bool, Vec<Via>) {
        self.reported.store(false, Ordering::Relaxed);
        let mut state = self.lock();
        (
            std::mem::take(&mut state.sent),
            std::mem::take(&mut state.received),
        )
    }
}

/// What changes with a peer's packets.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) engine: Engine,
    pub(crate) primary: Option<Via>,
    pub(crate) duplicate: Option<Via>,
    /// The session that our answer offered and that no packet has proven yet: until one does,
    /// the initiation may have been somebody's recording.
    pub(crate) unconfirmed: Option<SessionIndex>,
    pub(crate) traffic: Traffic,
    pub(crate) sent: bool,
    received: Vec<Via>,
    last_received: Option<Instant>,
    wanted_at: Option<Instant>,
    initiation: Option<(Instant, [u8; HANDSHAKE_LEN_MAX])>,
    held: VecDeque<Held>,
    held_bytes: usize,
}

/// A packet, with its offload header, that waits for a path.
#[derive(Debug)]
struct Held {
    since: Instant,
    raw: Box<[u8]>,
}

impl State {
    /// Whether packets can go out now.
    pub(crate) fn is_ready(&self) -> bool {
        self.primary.is_some() && self.engine.has_session()
    }

    /// Notes an authenticated packet.
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

    /// An initiation to send: a fresh one, or the last one again if it is young and unanswered.
    pub(crate) fn initiation(&mut self, now: Instant) -> Option<[u8; HANDSHAKE_LEN_MAX]> {
        if let Some((at, bytes)) = &self.initiation
            && now.duration_since(*at) < INITIATION_REUSE
        {
            return Some(*bytes);
        }
        let mut bytes = [0; HANDSHAKE_LEN_MAX];
        self.engine.initiate(true, &mut bytes).then(|| {
            self.initiation = Some((now, bytes));
            bytes
        })
    }

    /// A handshake is complete.
    pub(crate) fn note_session(&mut self) {
        self.initiation = None;
        self.unconfirmed = None;
        self.wanted_at = None;
    }

    /// Keeps a packet for later. At a limit of the peer's own its oldest packets go; at the
    /// common limit the new one does. How many were dropped.
    pub(crate) fn hold(&mut self, raw: &[u8], now: Instant, total: &AtomicUsize) -> usize {
        let mut dropped = 0;
        while self.held.len() >= HELD_MAX || self.held_bytes + raw.len() > HELD_BYTES_MAX {
            if self.take_held(total).is_none() {
                break;
            }
            dropped += 1;
        }
        if total.load(Ordering::Relaxed) + raw.len() > HELD_TOTAL_BYTES_MAX {
            return dropped + 1;
        }
        total.fetch_add(raw.len(), Ordering::Relaxed);
        self.held_bytes += raw.len();
        self.held.push_back(Held {
            since: now,
            raw: raw.into(),
        });
        dropped
    }

    /// The packet that waits longest.
    pub(crate) fn take_held(&mut self, total: &AtomicUsize) -> Option<Box<[u8]>> {
        let held = self.held.pop_front()?;
        self.held_bytes -= held.raw.len();
        total.fetch_sub(held.raw.len(), Ordering::Relaxed);
        Some(held.raw)
    }

    /// Drops what has waited too long; how many that were.
    pub(crate) fn expire_held(&mut self, now: Instant, total: &AtomicUsize) -> usize {
        let mut dropped = 0;
        while let Some(first) = self.held.front()
            && now.duration_since(first.since) >= HELD_AGE_MAX
        {
            self.take_held(total);
            dropped += 1;
        }
        dropped
    }

    pub(crate) fn has_held(&self) -> bool {
        !self.held.is_empty()
    }

    pub(crate) fn stats(&self, now: Instant) -> PeerStats {
        PeerStats {
            traffic: self.traffic,
            last_handshake: self.engine.session_age(),
            last_received: self.last_received.map(|at| now.duration_since(at)),
            has_session: self.engine.has_session(),
            held: self.held.len(),
            primary: self.primary,
            duplicate: self.duplicate,
        }
    }
}

/// How a stock WireGuard peer was described.
#[derive(Debug, Clone, Copy)]
pub(crate) struct External {
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) keepalive_s: Option<u16>,
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
}

impl Peers {
    pub(crate) fn by_id(&self, id: &NodeId) -> Option<&Arc<Peer>> {
        self.by_id.get(id)
    }

    pub(crate) fn by_index(&self, index: u32) -> Option<&Arc<Peer>> {
        self.by_index.get(&index)
    }

    pub(crate) fn is_known(&self, id: &NodeId) -> bool {
        self.known.contains(id) || self.external.contains_key(id)
    }

    pub(crate) fn awake(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.by_id.values()
    }

    pub(crate) fn awake_len(&self) -> usize {
        self.by_id.len()
    }

    /// The peer, made now if it is known and was asleep.
    pub(crate) fn wake(&mut self, id: &NodeId, keys: &Keys) -> Option<Arc<Peer>> {
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
        let external = self.external.get(id).copied();
        let peer = Arc::new(Peer {
            id: *id,
            external,
            index,
            reported: AtomicBool::new(false),
            state: Mutex::new(State {
                engine: Engine::new(keys, *id, index, external.and_then(|e| e.keepalive_s)),
                primary: external.and_then(|e| e.endpoint).map(Via::Direct),
                duplicate: None,
                unconfirmed: None,
                traffic: Traffic::default(),
                sent: false,
                received: Vec::new(),
                last_received: None,
                wanted_at: None,
                initiation: None,
                held: VecDeque::new(),
                held_bytes: 0,
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

    /// Describes a stock WireGuard peer, from scratch if it is described already.
    pub(crate) fn add_external(&mut self, id: NodeId, external: External, total: &AtomicUsize) {
        self.forget(&id, total);
        self.external.insert(id, external);
    }

    pub(crate) fn remove_external(&mut self, id: &NodeId, total: &AtomicUsize) {
        if self.external.remove(id).is_some() {
            self.forget(id, total);
        }
    }

    /// Puts a peer to sleep: its sessions and what waited for it are gone. How many packets waited.
    pub(crate) fn forget(&mut self, id: &NodeId, total: &AtomicUsize) -> usize {
        let Some(peer) = self.by_id.remove(id) else {
            return 0;
        };
        self.by_index.remove(&peer.index);
        let mut state = peer.lock();
        self.past_traffic.add(state.traffic);
        std::iter::from_fn(|| state.take_held(total)).count()
    }

    pub(crate) fn traffic(&self) -> Traffic {
        let mut sum = self.past_traffic;
        for peer in self.awake() {
            sum.add(peer.lock().traffic);
        }
        sum
    }
}

/// Why a packet that [`State::hold`] gave up was dropped.
pub(crate) const HELD_DROP: DropReason = DropReason::HeldTooMany;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scan_of_the_mesh_cannot_take_the_memory() {
        let keys = Keys::new([1; 32]);
        let (total, now) = (AtomicUsize::new(0), Instant::now());
        let mut peers = Peers::default();
        let ids: Vec<_> = (0..100).map(|n| NodeId([n; 32])).collect();
        peers.set_known(ids.iter().copied().collect(), &total);
        let mut refused = 0;
        for id in &ids {
            let peer = peers.wake(id, &keys).unwrap();
            refused += (0..2)
                .map(|_| peer.lock().hold(&[0; 65_536], now, &total))
                .sum::<usize>();
        }
        assert_eq!(total.load(Ordering::Relaxed), HELD_TOTAL_BYTES_MAX);
        assert_eq!(refused, 200 - 128);
        // Of one peer the oldest go first, and the sum does not drift.
        let first = peers.wake(&ids[0], &keys).unwrap();
        assert_eq!(first.lock().hold(&[1; 65_536], now, &total), 1);
        assert_eq!(first.lock().take_held(&total).unwrap()[0], 0);
        assert_eq!(first.lock().take_held(&total).unwrap()[0], 1);
        assert_eq!(peers.set_known(HashSet::new(), &total), 126);
        assert_eq!(total.load(Ordering::Relaxed), 0);
        assert_eq!(peers.awake_len(), 0);
    }
}
