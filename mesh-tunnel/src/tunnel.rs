//! The tunnel as the rest of the node sees it.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    io::{self, IoSlice},
    net::{Ipv6Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{
            AtomicU64, AtomicUsize,
            Ordering::{AcqRel, Relaxed},
        },
        mpsc::{Receiver, SyncSender},
    },
    time::{Duration, Instant, SystemTime},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use mesh_linux::{
    IfIndex,
    tun::{Queue, Tun},
    udp::{Ecn, IpFields, LocalEnd, SEGMENTS_MAX, SEND_BYTES_MAX, UdpPair},
};
use mesh_wire::{
    id::{NodeId, RelayId, Via},
    relay::HEADER_LEN,
};
pub use mesh_wireguard::keys::PresharedKey;
use mesh_wireguard::{
    keys::LocalKey,
    message::{DATA_HEADER_LEN, OVERHEAD},
    session::padded_len,
};
use zeroize::Zeroizing;

use crate::{
    burst::Bursts,
    control::{self, Handshake},
    egress::Egress,
    inbound::{Arrival, Inbox, Sender},
    outbound::Outbox,
    peer::{Peer, Peers, Sums},
    route::RouteTable,
    stats::{DropReason, Drops, PeerStats, PeerTraffic, TunnelStats},
    transmit::{Leave, Refusals, RelayUdpTable},
};
pub use crate::{
    burst::{Burst, SPARE_SOCKETS_MAX},
    peer::External,
    transmit::RelayUdp,
    worker::{PACKET_NICENESS, Workers},
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
        NodeId(LocalKey::new(*self.0).public())
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
    /// Unspecified (`::`) for a plain WireGuard device, which has no mesh.
    pub overlay_v6: Ipv6Addr,
    /// Whether [`Tunnel::open_sockets`] will be called: a thread more.
    pub bursts: bool,
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
    /// A frame that carries no data came from a relay that is reached by plain UDP.
    RelayFrame {
        /// The relay's address and port.
        from: SocketAddr,
        /// The frame.
        datagram: Vec<u8>,
    },
    /// A datagram with STUN's magic cookie arrived at the node's port.
    Stun {
        /// From where.
        from: SocketAddr,
        /// The datagram.
        datagram: Vec<u8>,
    },
    /// A node's initiation was authentic, and was refused.
    Refused {
        /// Who calls.
        peer: NodeId,
        /// The way it came.
        via: Via,
        /// By how much it is older than one that was answered; `None`: nobody has such a key.
        behind: Option<Duration>,
    },
    /// The kernel refused at once to send to this address: no route, or a local firewall. Said once in a
    /// second of each address, mostly.
    Unsendable(SocketAddr),
    /// A thread gave up: the TUN device or a socket is gone. No packets move by it any more.
    Broken(String),
}

/// The way to a relay, behind which a link of some kind moves datagrams.
pub trait RelaySender: Send + Sync {
    /// Queues datagrams for `peer` that stand one behind the other, each of `segment_len` bytes
    /// (the last may be shorter). Returns how many found no room and are dropped. Must not block:
    /// it is called by packet threads.
    fn send(&self, peer: &NodeId, datagrams: &[u8], segment_len: usize) -> usize;

    /// Whether so much waits already that packets had better wait where flows are kept apart. Must
    /// not block.
    fn is_full(&self) -> bool;
}

/// Handle to the packet path. Cheap to clone; the threads belong to [`Workers`].
#[derive(Clone)]
pub struct Tunnel(Arc<Inner>);

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel")
            .field("node", &self.0.node_id())
            .finish_non_exhaustive()
    }
}

impl Tunnel {
    /// Starts the packet path, with a thread for each of `sockets`, which share a port
    /// ([`UdpPair::bind_many`]); `tun` must have a queue for each. It knows nobody yet.
    ///
    /// # Errors
    ///
    /// If the system gives no thread or descriptor, or there are fewer queues than sockets.
    pub fn start(
        tun: Tun,
        sockets: Vec<UdpPair>,
        config: TunnelConfig,
        events: impl Fn(TunnelEvent) + Send + Sync + 'static,
    ) -> io::Result<(Self, Workers)> {
        check_pairs(&tun, &sockets)?;
        let (handshakes, waiting) = control::queue();
        let inner = Arc::new(Inner {
            key: LocalKey::new(*config.private_key.0),
            overlay_v6: config.overlay_v6,
            tun,
            sockets: ArcSwap::from_pointee(sockets),
            events: Box::new(events),
            routes: ArcSwap::default(),
            relays: ArcSwap::default(),
            relay_udp: ArcSwap::default(),
            egress: ArcSwapOption::empty(),
            takes_part_in_bursts: config.bursts,
            bursts: Bursts::default(),
            unsendable: Refusals::default(),
            generation: AtomicU64::new(0),
            mtu: AtomicUsize::new(0),
            drops: Drops::default(),
            held_bytes: AtomicUsize::new(0),
            errors_allowed: AtomicUsize::new(0),
            handshakes,
            handshakes_refused: AtomicU64::new(0),
            waiting: Mutex::new(waiting),
            inboxes: Pool::default(),
            outboxes: Pool::default(),
            peers: RwLock::default(),
            to_report: Mutex::default(),
        });
        let workers = Workers::start(&inner)?;
        Ok((Self(inner), workers))
    }

    /// Goes on at other sockets, with all peers and their sessions. They notice by the next packet
    /// that they get, whose source address the kernel chooses (as `wg_set_port` has it).
    ///
    /// # Errors
    ///
    /// As [`Self::start`]; then nothing moves any more.
    pub fn rebind(&self, workers: Workers, sockets: Vec<UdpPair>) -> io::Result<Workers> {
        let inner = &self.0;
        check_pairs(&inner.tun, &sockets)?;
        workers.stop();
        inner.sockets.store(Arc::new(sockets));
        for peer in inner.peers().awake() {
            peer.forget_source(None);
        }
        Workers::start(inner)
    }

    /// This node.
    #[must_use]
    pub fn node_id(&self) -> NodeId {
        self.0.node_id()
    }

    /// The UDP port of all sockets.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.0.sockets.load().first().map_or(0, UdpPair::port)
    }

    /// Marks what leaves by the sockets (`SO_MARK`); 0 for no mark.
    ///
    /// # Errors
    ///
    /// What the kernel says; it needs CAP_NET_ADMIN.
    pub fn set_mark(&self, mark: u32) -> io::Result<()> {
        let sockets = self.0.sockets.load();
        sockets.iter().try_for_each(|pair| pair.set_mark(mark))
    }

    /// Says what the device's MTU is: packets are padded to multiples of 16 bytes, but never beyond
    /// it. Without it they are not padded.
    pub fn set_mtu(&self, mtu: u16) {
        self.0.mtu.store(mtu.into(), Relaxed);
    }

    /// Replaces the table of prefixes as a whole. Packets in flight see the old or the new one.
    pub fn set_routes(&self, routes: RouteTable) {
        self.0.routes.store(Arc::new(routes));
        self.0.forget_lookups();
    }

    /// Replaces the set of mesh peers whose handshakes are accepted. Whoever is not in it any more
    /// is cut off at once. External peers are another set ([`Self::add_external`]).
    pub fn set_known(&self, known: HashSet<NodeId>) {
        let inner = &self.0;
        let dropped = inner.peers_mut().set_known(known, &inner.held_bytes);
        inner.forget_lookups();
        inner.drops.count_many(DropReason::HeldTooLong, dropped);
    }

    /// From now on `peer`'s packets go by `primary`, and copies by `duplicate`, of `copies_max` packets at
    /// most if that is said (and of the rest of the super-packet in which the last one is). Without
    /// `primary` they wait: at most 64, at most 2 s. What waited goes out at once if there is a session.
    pub fn set_path(
        &self,
        peer: &NodeId,
        primary: Option<Via>,
        duplicate: Option<Via>,
        copies_max: Option<u32>,
    ) {
        let inner = &self.0;
        let found = if primary.is_none() {
            inner.peers().by_id(peer).cloned()
        } else {
            inner.wake(peer)
        };
        let Some(peer) = found.filter(|peer| !peer.is_external) else {
            return;
        };
        let mut out = inner.outboxes.take(|| Outbox::new(Leave::other()));
        let mut state = peer.lock();
        peer.allow_copies(copies_max);
        state.primary = primary.map(Into::into);
        state.duplicate = duplicate.filter(|_| primary.is_some());
        inner.send_held(&peer, &mut state, &mut out, Instant::now());
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
        let now = Instant::now();
        let initiation = peer.lock().initiation(&inner.key, now, since_1970());
        let Some(initiation) = initiation else {
            return;
        };
        let mut leave = Leave::other();
        for via in vias {
            inner.send_handshake(&peer, (*via).into(), &initiation, &mut leave, now);
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

    /// Says how a relay is reached by plain UDP; `None`: not any more. Peers that are not in its
    /// sessions are reached by its [`RelaySender`].
    pub fn set_relay_udp(&self, relay: RelayId, udp: Option<RelayUdp>) {
        let table = &self.0.relay_udp;
        table.rcu(|table| table.with(relay, udp.clone()));
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
        let inner = &self.0;
        let mut inbox = inner.inboxes.take(|| inner.new_inbox(0));
        let now = Instant::now();
        let arrival = |peer| Arrival {
            via: Via::Relay(relay),
            sender: Sender::Client(peer),
            to: None,
            by: None,
            ecn: Ecn::NotCapable,
            now,
        };
        inner.receive_copies(datagrams, arrival, &mut inbox);
        inner.inboxes.give_back(inbox);
    }

    /// Sends a datagram as it is from the node's own port: STUN requests.
    pub fn send_raw(&self, target: SocketAddr, datagram: &[u8]) {
        let (inner, way, len) = (&self.0, Via::Direct(target).into(), datagram.len());
        let mut leave = Leave::other();
        inner.transmit(
            &inner.node_id(),
            way,
            datagram,
            len,
            Ecn::NotCapable,
            &mut leave,
        );
    }

    /// The same by one interface, whichever is in use: to ask whether it leads anywhere. Lost if the
    /// socket has no room.
    pub fn send_raw_by(&self, link: IfIndex, target: SocketAddr, datagram: &[u8]) {
        let fields = IpFields {
            link: Some(link),
            ..IpFields::default()
        };
        let sockets = self.0.sockets.load();
        let sent = sockets
            .first()
            .map(|pair| pair.send(target, datagram, datagram.len(), fields));
        if sent.is_some_and(|sent| sent.is_err()) {
            self.0.drops.count(DropReason::SendFailed);
        }
    }

    /// Opens sockets beside the node's port, as [`Burst`] says. What comes by them came as by the node's port; by
    /// the one by which something authentic came from an address last, everything to that address leaves
    /// from then on. Of a tunnel without [`TunnelConfig::bursts`] nothing happens.
    pub fn open_sockets(&self, burst: Burst) {
        if self.0.takes_part_in_bursts {
            self.0.bursts.ask(burst);
        }
    }

    /// Closes all sockets but the node's port: the network is another one.
    pub fn close_sockets(&self) {
        self.0.bursts.close_all();
    }

    /// From now on datagrams leave by this way out; `None`: by the kernel's routes. Stock devices are
    /// answered by it as well, until they are heard from again.
    pub fn set_egress(&self, egress: Option<Egress>) {
        let inner = &self.0;
        let link = |egress: &Egress| egress.link();
        let now = egress.as_ref().map(link);
        let before = inner.egress.swap(egress.map(Arc::new));
        if before.as_deref().map(link) != now {
            for peer in inner.peers().awake() {
                peer.forget_source(None);
            }
        }
    }

    /// What moved since the last call, by peer. External peers are not in it.
    #[must_use]
    pub fn take_traffic(&self) -> Vec<PeerTraffic> {
        let peers = std::mem::take(&mut *self.0.to_report());
        let reports = peers.iter().filter(|peer| !peer.is_external).map(|peer| {
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
        Some(peer.stats(Instant::now()))
    }

    /// Counts of the whole tunnel.
    #[must_use]
    pub fn stats(&self) -> TunnelStats {
        let peers = self.0.peers();
        let Sums {
            traffic,
            handshakes,
            held,
        } = peers.sums(Instant::now());
        TunnelStats {
            drops: self.0.drops.snapshot(),
            active_peers: peers.awake_len(),
            spare_sockets: self.0.bursts.counts(),
            traffic,
            handshakes,
            handshakes_refused: self.0.handshakes_refused.load(Relaxed),
            held,
        }
    }

    /// Adds a stock WireGuard device as a peer, or describes it anew; its sessions stay. Its path is
    /// the endpoint until it is heard from, and then always where it was heard from last.
    pub fn add_external(&self, peer: NodeId, external: External) {
        let (inner, now) = (&self.0, Instant::now());
        let mut peers = inner.peers_mut();
        peers.set_external(peer, external, &inner.held_bytes, now);
        drop(peers);
        inner.forget_lookups();
    }

    /// Who is answered by the address that was asked: where each is, and this machine's end of the
    /// way. Stock devices expect it, mesh peers do not.
    #[must_use]
    pub fn sources(&self) -> Vec<(NodeId, SocketAddr, LocalEnd)> {
        let peers = self.0.peers();
        let sources = peers.awake().filter(|peer| peer.is_external);
        let sources = sources.filter_map(|peer| {
            let (to, source) = peer.source()?;
            Some((peer.id, to, source))
        });
        sources.collect()
    }

    /// Leaves it to the kernel by which address a peer is answered, if that was `source`: until it is
    /// heard from again.
    pub fn forget_source(&self, peer: &NodeId, source: LocalEnd) {
        if let Some(peer) = self.0.peers().by_id(peer) {
            peer.forget_source(Some(source));
        }
    }

    /// Cuts a stock WireGuard device off.
    pub fn remove_external(&self, peer: &NodeId) {
        let inner = &self.0;
        let dropped = inner.peers_mut().remove_external(peer, &inner.held_bytes);
        inner.forget_lookups();
        inner.drops.count_many(DropReason::HeldTooLong, dropped);
    }
}

fn check_pairs(tun: &Tun, sockets: &[UdpPair]) -> io::Result<()> {
    let (queues, pairs) = (tun.queues().len(), sockets.len());
    if (1..=queues).contains(&pairs) {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("{pairs} pairs of sockets need as many TUN queues, and there are {queues}"),
    ))
}

/// The longest super-packet that leaves in one piece: as many segments of the device's MTU as one
/// `UDP_SEGMENT` send takes, each with WireGuard's 32 bytes around it, and a relay's frame in a QUIC
/// datagram. Set it as the device's `gso_max_size`; a longer one leaves in two pieces, the second of
/// them small.
#[must_use]
pub fn super_packet_len_max(mtu: u16) -> u32 {
    let mtu = usize::from(mtu);
    let segments = (SEND_BYTES_MAX / (mtu + OVERHEAD + HEADER_LEN + QUIC_LEN)).min(SEGMENTS_MAX);
    // The kernel counts the headers once: a segment carries at most the MTU without an IPv4 and a TCP
    // header, and fewer with options.
    let payload = mtu.saturating_sub(IPV6_AND_TCP_LEN);
    u32::try_from(segments * payload + IPV6_AND_TCP_LEN).unwrap_or(u32::MAX)
}

/// What QUIC adds to a datagram: 13 bytes of header with an ID of 8 (RFC 9000 §17.3), 3 of the frame
/// (RFC 9221 §4), 16 of the tag.
const QUIC_LEN: usize = 13 + 3 + 16;

/// An IPv6 header, and one of TCP with timestamps.
const IPV6_AND_TCP_LEN: usize = 40 + 32;

/// Most ICMP errors in a tick of 200 ms: 100 a second, a tenth of what Linux allows itself
/// (`net.ipv4.icmp_msgs_per_sec`).
const ERRORS_PER_TICK: usize = 20;

/// What all threads share. A peer's lock is never held while the peers' lock is asked for, and
/// no lock while an event is told.
pub(crate) struct Inner {
    pub(crate) key: LocalKey,
    pub(crate) overlay_v6: Ipv6Addr,
    pub(crate) tun: Tun,
    /// Others only after [`Tunnel::rebind`].
    pub(crate) sockets: ArcSwap<Vec<UdpPair>>,
    pub(crate) routes: ArcSwap<RouteTable>,
    pub(crate) relays: ArcSwap<HashMap<RelayId, Arc<dyn RelaySender>>>,
    pub(crate) relay_udp: ArcSwap<RelayUdpTable>,
    /// Which interface is named to the kernel, if one is.
    pub(crate) egress: ArcSwapOption<Egress>,
    pub(crate) takes_part_in_bursts: bool,
    pub(crate) bursts: Bursts,
    pub(crate) unsendable: Refusals,
    /// Counts changes of routes and peers: what threads remember of them holds for one value.
    pub(crate) generation: AtomicU64,
    /// The device's MTU in bytes; 0 while it is not known.
    pub(crate) mtu: AtomicUsize,
    pub(crate) drops: Drops,
    /// Bytes that wait for paths, of all peers.
    pub(crate) held_bytes: AtomicUsize,
    /// ICMP errors that may still be made until the next tick.
    pub(crate) errors_allowed: AtomicUsize,
    pub(crate) handshakes: SyncSender<Handshake>,
    pub(crate) handshakes_refused: AtomicU64,
    /// Their other end, which the control thread has in hand as long as it lives.
    pub(crate) waiting: Mutex<Receiver<Handshake>>,
    inboxes: Pool<Inbox>,
    outboxes: Pool<Outbox>,
    events: Box<dyn Fn(TunnelEvent) + Send + Sync>,
    peers: RwLock<Peers>,
    /// Peers that moved something since the last report.
    to_report: Mutex<Vec<Arc<Peer>>>,
}

impl Inner {
    pub(crate) fn node_id(&self) -> NodeId {
        NodeId(self.key.public())
    }

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
        awake.or_else(|| self.peers_mut().wake(id, Instant::now()))
    }

    /// Puts a peer to sleep.
    pub(crate) fn forget(&self, id: &NodeId) {
        self.peers_mut().forget(id, &self.held_bytes);
        self.forget_lookups();
    }

    fn forget_lookups(&self) {
        self.generation.fetch_add(1, AcqRel);
    }

    pub(crate) fn allow_errors(&self) {
        self.errors_allowed.store(ERRORS_PER_TICK, Relaxed);
    }

    /// Hands the kernel an offload header and a packet, by a queue of the device.
    /// Hands the kernel a packet in pieces, offload header first.
    pub(crate) fn write_tun(&self, queue: usize, pieces: &[IoSlice<'_>]) {
        let queue = self.tun.queues().get(queue);
        if queue.is_none_or(|queue| queue.write(pieces).is_err()) {
            self.drops.count(DropReason::TunFull);
        }
    }

    pub(crate) fn new_inbox(&self, number: usize) -> Inbox {
        let udp_offload = self
            .tun
            .queues()
            .first()
            .is_some_and(Queue::has_udp_offload);
        Inbox::new(number, udp_offload, Outbox::new(Leave::other()))
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
        let sealed = self.seal_inner(peer, packet)?;
        let (len, mut leave) = (sealed.len(), Leave::other());
        self.transmit(peer, via.into(), &sealed, len, Ecn::NotCapable, &mut leave);
        Some(())
    }

    /// Seals an inner packet, and counts it as sent. `None` without a session.
    pub(crate) fn seal_inner(&self, peer: &NodeId, packet: &[u8]) -> Option<Vec<u8>> {
        let now = Instant::now();
        let peer = self.peers().by_id(peer).cloned()?;
        let session = peer.lock().protocol.current().cloned();
        let session = session.filter(|session| session.is_alive(now))?;
        let padded = padded_len(packet.len(), self.mtu.load(Relaxed));
        let mut sealed = vec![0; padded + OVERHEAD];
        sealed
            .get_mut(DATA_HEADER_LEN..DATA_HEADER_LEN + packet.len())?
            .copy_from_slice(packet);
        let counter = session.reserve(1)?;
        session.seal(counter, &mut sealed).then_some(())?;
        peer.activity.sent_data(now);
        peer.counts.sent(1, packet.len());
        peer.counts.wire_sent(sealed.len());
        Some(sealed)
    }
}

/// The wall clock, which may be wrong: only the order of a node's own readings matters.
pub(crate) fn since_1970() -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap_or_default()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_super_packet_fits_one_send() {
        for mtu in [1280, 1360, 1420, 8920, 1500] {
            let len = usize::try_from(super_packet_len_max(mtu)).unwrap();
            let mtu = usize::from(mtu);
            // Over IPv4 without options segments carry most.
            for headers in [40, 52, 60, 72] {
                let payload = mtu - headers;
                let segments = (len - headers).div_ceil(payload);
                let sealed = segments * (mtu + OVERHEAD + HEADER_LEN + QUIC_LEN);
                assert!(
                    sealed <= SEND_BYTES_MAX && segments <= SEGMENTS_MAX,
                    "{mtu} {headers}"
                );
            }
            assert!(len > 50_000, "{len} at {mtu}");
        }
    }
}
