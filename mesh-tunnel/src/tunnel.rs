//! The tunnel as the rest of the node sees it.

use std::{
    collections::{HashMap, HashSet},
    fmt, io,
    net::{Ipv6Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use arc_swap::ArcSwap;
use mesh_linux::{
    tun::{Queue, Tun},
    udp::UdpPair,
};
use mesh_wire::id::{NodeId, RelayId, Via};
use zeroize::Zeroizing;

pub use crate::worker::Workers;
use crate::{
    engine::{Due, HANDSHAKE_LEN_MAX, Keys},
    inbound::{Inbox, Sender},
    outbound::Outbox,
    peer::{External, Peer, Peers},
    route::RouteTable,
    stats::{DropReason, Drops, PeerStats, PeerTraffic, TunnelStats},
};

/// This node's private WireGuard key. Wiped from memory when dropped, never shown.
#[derive(Clone)]
pub struct PrivateKey(Zeroizing<[u8; 32]>);

impl PrivateKey {
    /// Takes the 32 bytes of an X25519 private key.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The node that has this key.
    #[must_use]
    pub fn node_id(&self) -> NodeId {
        Keys::new(*self.0).id()
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(…)")
    }
}

/// Who this node is.
#[derive(Debug, Clone)]
pub struct TunnelConfig {
    /// Its key.
    pub private_key: PrivateKey,
    /// Its overlay IPv6 address, to which control messages come. Its first 48 bits are the mesh's.
    pub overlay_v6: Ipv6Addr,
}

/// Something that the rest of the node should know. Told on a packet thread, which waits: pass
/// it on without blocking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TunnelEvent {
    /// Packets wait for this peer. Said again every half second while more come.
    Wanted(NodeId),
    /// There is a session with this peer that both sides have proven; never said of a replay.
    Handshake {
        /// The peer.
        peer: NodeId,
        /// How its last message came.
        via: Via,
    },
    /// An inner packet for this node's core, from the core of a peer.
    Control {
        /// The peer.
        peer: NodeId,
        /// How it came.
        via: Via,
        /// The packet, for `PeerMessage::from_packet`.
        packet: Vec<u8>,
    },
    /// A datagram with STUN's magic cookie arrived at the node's port.
    Stun {
        /// From where.
        from: SocketAddr,
        /// The datagram.
        datagram: Vec<u8>,
    },
    /// A thread gave up: the TUN device or a socket is gone. No packets move by it any more.
    Broken(String),
}

/// The way to a relay, behind which a link of some kind moves datagrams.
pub trait RelaySender: Send + Sync {
    /// Queues datagrams for `peer` that stand one behind the other, each of `segment_len` bytes
    /// (the last may be shorter). Returns how many found no room and are dropped. Must not block:
    /// it is called by packet threads.
    fn send(&self, peer: &NodeId, datagrams: &[u8], segment_len: usize) -> usize;
}

/// Handle to the packet path. Cheap to clone; the threads belong to [`Workers`].
#[derive(Clone)]
pub struct Tunnel(Arc<Inner>);

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel")
            .field("node", &self.0.keys.id())
            .finish_non_exhaustive()
    }
}

impl Tunnel {
    /// Starts the packet path. It knows nobody yet.
    ///
    /// # Errors
    ///
    /// If the system gives no thread or descriptor.
    pub fn start(
        tun: Tun,
        sockets: UdpPair,
        config: TunnelConfig,
        events: impl Fn(TunnelEvent) + Send + Sync + 'static,
    ) -> io::Result<(Self, Workers)> {
        let inner = Arc::new(Inner {
            keys: Keys::new(*config.private_key.0),
            overlay_v6: config.overlay_v6,
            queues: tun.into_queues(),
            sockets,
            events: Box::new(events),
            routes: ArcSwap::default(),
            relays: ArcSwap::default(),
            drops: Drops::default(),
            held_bytes: AtomicUsize::new(0),
            errors_allowed: AtomicUsize::new(0),
            inboxes: Pool::default(),
            outboxes: Pool::default(),
            peers: RwLock::default(),
            to_report: Mutex::default(),
        });
        let workers = Workers::start(&inner)?;
        Ok((Self(inner), workers))
    }

    /// This node.
    #[must_use]
    pub fn node_id(&self) -> NodeId {
        self.0.keys.id()
    }

    /// The UDP port of both sockets.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.0.sockets.port()
    }

    /// Replaces the table of prefixes as a whole. Packets in flight see the old or the new one.
    pub fn set_routes(&self, routes: RouteTable) {
        self.0.routes.store(Arc::new(routes));
    }

    /// Replaces the set of mesh peers whose handshakes are accepted. Whoever is not in it any more
    /// is cut off at once. External peers are another set ([`Self::add_external`]).
    pub fn set_known(&self, known: HashSet<NodeId>) {
        let inner = &self.0;
        let dropped = inner.peers_mut().set_known(known, &inner.held_bytes);
        inner.drops.count_many(DropReason::HeldTooLong, dropped);
    }

    /// From now on `peer`'s packets go by `primary`, and copies by `duplicate`. Without `primary`
    /// they wait: at most 64, at most 2 s. What waited goes out at once if there is a session.
    pub fn set_path(&self, peer: &NodeId, primary: Option<Via>, duplicate: Option<Via>) {
        let inner = &self.0;
        let found = if primary.is_none() {
            inner.peers().by_id(peer).cloned()
        } else {
            inner.wake(peer)
        };
        let Some(peer) = found.filter(|peer| !peer.is_external()) else {
            return;
        };
        let mut out = inner.outboxes.take(Outbox::new);
        let mut state = peer.lock();
        state.primary = primary;
        state.duplicate = duplicate.filter(|_| primary.is_some());
        inner.send_held(&peer, &mut state, &mut out);
        drop(state);
        inner.outboxes.give_back(out);
    }

    /// Sends one handshake initiation, the same bytes by each of `vias`. Called again within a
    /// quarter of a second it sends the same initiation again. Nothing if `peer` is not known.
    pub fn handshake(&self, peer: &NodeId, vias: &[Via]) {
        let inner = &self.0;
        let Some(peer) = inner.wake(peer) else {
            return;
        };
        let initiation = peer.lock().initiation(Instant::now());
        let Some(initiation) = initiation else {
            return;
        };
        for via in vias {
            inner.transmit(&peer.id, *via, &initiation, initiation.len());
        }
    }

    /// Seals this inner packet and sends it by exactly this way: for control messages. Dropped and
    /// counted without a session.
    pub fn send_inner(&self, peer: &NodeId, via: Via, packet: &[u8]) {
        let inner = &self.0;
        if inner.send_inner(peer, via, packet).is_none() {
            inner.drops.count(DropReason::NoSession);
        }
    }

    /// Says by what to send to a relay; `None` when there is no link to it any more.
    pub fn set_relay(&self, relay: RelayId, sender: Option<Arc<dyn RelaySender>>) {
        self.0.relays.rcu(|relays| {
            let mut relays = HashMap::clone(relays);
            match &sender {
                Some(sender) => relays.insert(relay, Arc::clone(sender)),
                None => relays.remove(&relay),
            };
            relays
        });
    }

    /// Takes a datagram that `relay` says is from `peer`: opens it, checks it, and hands the packet
    /// to the kernel. Does not wait; may be called by many threads. Keep the datagrams of one
    /// link in order.
    pub fn receive_from_relay(&self, relay: RelayId, peer: NodeId, datagram: &[u8]) {
        self.receive_batch_from_relay(relay, [(peer, datagram)]);
    }

    /// Like [`Self::receive_from_relay`], for all that has arrived: packets of one flow that follow
    /// one another cost the kernel as little as one.
    pub fn receive_batch_from_relay<D: AsRef<[u8]>>(
        &self,
        relay: RelayId,
        datagrams: impl IntoIterator<Item = (NodeId, D)>,
    ) {
        let (inner, via, now) = (&self.0, Via::Relay(relay), Instant::now());
        let mut inbox = inner.inboxes.take(|| inner.new_inbox());
        for (peer, datagram) in datagrams {
            let sender = Sender::Client(peer);
            inner.inbound(datagram.as_ref(), via, sender, &mut inbox, now);
        }
        inner.finish(&mut inbox);
        inner.inboxes.give_back(inbox);
    }

    /// Sends a datagram as it is from the node's own port: STUN requests.
    pub fn send_raw(&self, target: SocketAddr, datagram: &[u8]) {
        if self
            .0
            .sockets
            .send(target, datagram, datagram.len())
            .is_err()
        {
            self.0.drops.count(DropReason::SendFailed);
        }
    }

    /// What moved since the last call, by peer. External peers are not in it.
    #[must_use]
    pub fn take_traffic(&self) -> Vec<PeerTraffic> {
        let peers = std::mem::take(&mut *self.0.to_report());
        let reports = peers.iter().filter(|peer| !peer.is_external()).map(|peer| {
            let (sent, received) = peer.take_report();
            PeerTraffic {
                peer: peer.id,
                sent,
                received,
            }
        });
        reports.collect()
    }

    /// Counts of one peer; `None` while it is asleep or unknown.
    #[must_use]
    pub fn peer_stats(&self, peer: &NodeId) -> Option<PeerStats> {
        let peer = self.0.peers().by_id(peer).cloned()?;
        let stats = peer.lock().stats(Instant::now());
        Some(stats)
    }

    /// Counts of the whole tunnel.
    #[must_use]
    pub fn stats(&self) -> TunnelStats {
        let peers = self.0.peers();
        TunnelStats {
            drops: self.0.drops.snapshot(),
            active_peers: peers.awake_len(),
            traffic: peers.traffic(),
        }
    }

    /// Adds a stock WireGuard device as a peer, or describes it anew (its session starts again).
    /// Its path is `endpoint` until it is heard from, and then always where it was heard from last.
    pub fn add_external(
        &self,
        peer: NodeId,
        endpoint: Option<SocketAddr>,
        keepalive_s: Option<u16>,
    ) {
        let external = External {
            endpoint,
            keepalive_s,
        };
        let inner = &self.0;
        let mut peers = inner.peers_mut();
        peers.add_external(peer, external, &inner.held_bytes);
        // Awake from the start: its keepalives are ours to send.
        peers.wake(&peer, &inner.keys);
    }

    /// Cuts a stock WireGuard device off.
    pub fn remove_external(&self, peer: &NodeId) {
        self.0.peers_mut().remove_external(peer, &self.0.held_bytes);
    }
}

/// Most ICMP errors in a tick of 200 ms: 100 a second, a tenth of what Linux allows itself
/// (`net.ipv4.icmp_msgs_per_sec`).
const ERRORS_PER_TICK: usize = 20;

/// What all threads share. A peer's lock is never held while the peers' lock is asked for, and
/// no lock while an event is told.
pub(crate) struct Inner {
    pub(crate) keys: Keys,
    pub(crate) overlay_v6: Ipv6Addr,
    pub(crate) queues: Vec<Queue>,
    pub(crate) sockets: UdpPair,
    pub(crate) routes: ArcSwap<RouteTable>,
    pub(crate) relays: ArcSwap<HashMap<RelayId, Arc<dyn RelaySender>>>,
    pub(crate) drops: Drops,
    /// Bytes that wait for paths, of all peers.
    pub(crate) held_bytes: AtomicUsize,
    /// ICMP errors that may still be made until the next tick.
    pub(crate) errors_allowed: AtomicUsize,
    pub(crate) inboxes: Pool<Inbox>,
    outboxes: Pool<Outbox>,
    events: Box<dyn Fn(TunnelEvent) + Send + Sync>,
    peers: RwLock<Peers>,
    /// Peers that moved something since the last report.
    to_report: Mutex<Vec<Arc<Peer>>>,
}

impl Inner {
    pub(crate) fn emit(&self, event: TunnelEvent) {
        (self.events)(event);
    }

    pub(crate) fn peers(&self) -> RwLockReadGuard<'_, Peers> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn peers_mut(&self) -> RwLockWriteGuard<'_, Peers> {
        self.peers.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn to_report(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Peer>>> {
        self.to_report
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The peer, if it is known.
    pub(crate) fn wake(&self, id: &NodeId) -> Option<Arc<Peer>> {
        let awake = self.peers().by_id(id).cloned();
        awake.or_else(|| self.peers_mut().wake(id, &self.keys))
    }

    /// Hands the kernel an offload header and a packet.
    pub(crate) fn write_tun(&self, framed: &[u8]) {
        let written = self
            .queues
            .first()
            .is_some_and(|queue| queue.write(framed).is_ok());
        if !written {
            self.drops.count(DropReason::TunFull);
        }
    }

    pub(crate) fn new_inbox(&self) -> Inbox {
        Inbox::new(self.queues.first().is_some_and(Queue::has_udp_offload))
    }

    /// Whether the first 48 bits of an address are the mesh's.
    pub(crate) fn is_overlay(&self, prefix: [u8; 6]) -> bool {
        self.overlay_v6.octets().starts_with(&prefix)
    }

    pub(crate) fn mark_for_report(&self, peer: &Arc<Peer>) {
        if peer.mark_for_report() {
            self.to_report().push(Arc::clone(peer));
        }
    }

    fn send_inner(&self, peer: &NodeId, via: Via, packet: &[u8]) -> Option<()> {
        let peer = self.peers().by_id(peer).cloned()?;
        let mut sealed = vec![0; packet.len() + HANDSHAKE_LEN_MAX];
        let mut state = peer.lock();
        let len = state.engine.seal(packet, &mut sealed)?;
        state.traffic.sent_packets += 1;
        state.traffic.sent_bytes += packet.len() as u64;
        drop(state);
        self.transmit(&peer.id, via, sealed.get(..len)?, len);
        Some(())
    }

    /// What time demands of all peers that are awake.
    pub(crate) fn tick(&self, now: Instant) {
        self.keys.tick();
        self.errors_allowed
            .store(ERRORS_PER_TICK, Ordering::Relaxed);
        let peers: Vec<_> = self.peers().awake().cloned().collect();
        for peer in peers {
            self.tick_peer(&peer, now);
        }
    }

    fn tick_peer(&self, peer: &Peer, now: Instant) {
        let mut message = [0; HANDSHAKE_LEN_MAX];
        let mut state = peer.lock();
        let late = state.expire_held(now, &self.held_bytes);
        self.drops.count_many(DropReason::HeldTooLong, late);
        let due = state.engine.tick(&mut message);
        let via = state.primary;
        let idle = via.is_none() && !state.has_held() && !peer.is_external();
        drop(state);
        match (due, via) {
            (Due::Send(len), Some(via)) => {
                let message = message.get(..len).unwrap_or_default();
                self.transmit(&peer.id, via, message, len);
            }
            (Due::Expired, _) if idle => {
                self.peers_mut().forget(&peer.id, &self.held_bytes);
            }
            (Due::Expired, Some(via)) if peer.is_kept_alive() => {
                if peer.lock().engine.initiate(false, &mut message) {
                    self.transmit(&peer.id, via, &message, message.len());
                }
            }
            (Due::Expired | Due::Nothing | Due::Send(_), _) => {}
        }
    }
}

/// Buffers for callers that are not packet threads, used again and again. It holds as many as
/// were ever in use at once: no more than there are threads that call.
pub(crate) struct Pool<T>(Mutex<Vec<T>>);

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Pool<T> {
    pub(crate) fn take(&self, make: impl FnOnce() -> T) -> T {
        let free = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        free.unwrap_or_else(make)
    }

    pub(crate) fn give_back(&self, item: T) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(item);
    }
}
