//! What the packet path counts.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use mesh_wire::id::{NodeId, Via};
pub use mesh_wireguard::peer::Handshakes;

macro_rules! drop_reasons {
    ($($(#[$doc:meta])* $name:ident => $text:literal,)*) => {
        /// Why a packet was dropped. A closed set: fit for a metric's label.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum DropReason {
            $($(#[$doc])* $name,)*
        }

        impl DropReason {
            /// All reasons.
            pub const ALL: [Self; [$($text),*].len()] = [$(Self::$name),*];

            /// The reason as a metric's label.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

drop_reasons! {
    /// Out: no peer has the destination.
    NoRoute => "no_route",
    /// Out: for a group or for all, as the kernel itself asks for neighbours and routers by every interface. A mesh leads to
    /// one node at a time.
    Multicast => "multicast",
    /// Out: not an IP packet, or it contradicts its offload header.
    MalformedOut => "malformed_out",
    /// Out: a process tried to speak as the node's own core.
    ForgedControl => "forged_control",
    /// Out: too many packets wait for this peer, or for all peers together.
    HeldTooMany => "held_too_many",
    /// Out: the queue in front of the cipher had no room; the flow with most in it pays.
    QueueFull => "queue_full",
    /// Out: waited there too long.
    QueueLate => "queue_late",
    /// Out: no path came up in time.
    HeldTooLong => "held_too_long",
    /// Out: a control message to a peer without session.
    NoSession => "no_session",
    /// Out: the kernel took no more, or knows no way to the address.
    SendFailed => "send_failed",
    /// Out: the relay link's queue is full.
    RelayFull => "relay_full",
    /// Out: there is no link to that relay.
    RelayGone => "relay_gone",
    /// In: neither WireGuard nor STUN.
    NotWireGuard => "not_wireguard",
    /// In: a handshake by a key that is not known here.
    UnknownKey => "unknown_key",
    /// In: for a session that is not (or no longer) here.
    UnknownSession => "unknown_session",
    /// In: a handshake that does not prove what it must.
    BadHandshake => "bad_handshake",
    /// In: an answer to a handshake message that we did not send, or whose handshake is over.
    Unasked => "unasked",
    /// In: too many handshakes at once; the sender got a cookie if it can be answered.
    UnderLoad => "under_load",
    /// In: the authentication tag is wrong.
    Unauthentic => "unauthentic",
    /// In: seen before, or older than the replay window. Copies of duplicated packets end here.
    Replayed => "replayed",
    /// In: authentic, but not an IP packet.
    MalformedIn => "malformed_in",
    /// In: authentic, but its source address is not the sending peer's.
    WrongSource => "wrong_source",
    /// In: a router was congested and marked a packet whose sender would not understand (RFC 6040).
    CongestionMarked => "congestion_marked",
    /// In: the kernel took no more from the TUN device.
    TunFull => "tun_full",
}

/// One counter for each reason.
#[derive(Debug)]
pub(crate) struct Drops([AtomicU64; DropReason::ALL.len()]);

impl Default for Drops {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Drops {
    pub(crate) fn count(&self, reason: DropReason) {
        self.count_many(reason, 1);
    }

    pub(crate) fn count_many(&self, reason: DropReason, packets: usize) {
        if let Some(counter) = self.0.get(reason as usize) {
            counter.fetch_add(packets as u64, Ordering::Relaxed);
        }
    }

    pub(crate) fn snapshot(&self) -> Vec<(DropReason, u64)> {
        let counts = self.0.iter().map(|counter| counter.load(Ordering::Relaxed));
        DropReason::ALL.into_iter().zip(counts).collect()
    }
}

/// Counts of the whole tunnel since it started.
#[derive(Debug, Clone)]
pub struct TunnelStats {
    /// Dropped packets, for every reason (also those never met).
    pub drops: Vec<(DropReason, u64)>,
    /// Peers with some state: a session, a handshake, packets that wait.
    pub active_peers: usize,
    /// Sockets of bursts that are open, and how many of them are in use.
    pub spare_sockets: (usize, usize),
    /// Inner packets and bytes of all peers that are or were active.
    pub traffic: Traffic,
    /// Of the same peers.
    pub handshakes: Handshakes,
    /// Initiations that were not answered. Why, `drops` says.
    pub handshakes_refused: u64,
    /// Packets that wait for paths.
    pub held: Held,
}

/// Packets (or super-packets) that wait for paths, of all peers together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Held {
    /// How many.
    pub packets: usize,
    /// Since when the first of them waits; `None`: nothing does.
    pub oldest: Option<Duration>,
}

impl Held {
    pub(crate) fn add(&mut self, other: Self) {
        self.packets += other.packets;
        self.oldest = self.oldest.max(other.oldest);
    }
}

impl TunnelStats {
    /// How many packets were dropped for `reason`.
    #[must_use]
    pub fn dropped(&self, reason: DropReason) -> u64 {
        let found = self.drops.iter().find(|(this, _)| *this == reason);
        found.map_or(0, |(_, count)| *count)
    }
}

/// Inner packets (control messages included, keepalives not) and their bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Packets sealed.
    pub sent_packets: u64,
    /// Bytes of these.
    pub sent_bytes: u64,
    /// Packets opened and accepted.
    pub received_packets: u64,
    /// Bytes of these.
    pub received_bytes: u64,
}

impl Traffic {
    pub(crate) fn add(&mut self, other: Self) {
        self.sent_packets += other.sent_packets;
        self.sent_bytes += other.sent_bytes;
        self.received_packets += other.received_packets;
        self.received_bytes += other.received_bytes;
    }
}

/// What is known of one active peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerStats {
    /// Packets and bytes since the peer became active.
    pub traffic: Traffic,
    /// Bytes of UDP payload sent, as `wg show` counts them: handshakes, keepalives, headers, padding.
    pub wire_sent_bytes: u64,
    /// Bytes of authentic UDP payload received, likewise.
    pub wire_received_bytes: u64,
    /// Since the last completed handshake.
    pub last_handshake: Option<Duration>,
    /// Since the last authenticated packet of any kind.
    pub last_received: Option<Duration>,
    /// Whether packets can be sealed now.
    pub has_session: bool,
    /// Packets (or super-packets) that wait for a path.
    pub held: usize,
    /// Where packets go now.
    pub primary: Option<Via>,
    /// Where copies go.
    pub duplicate: Option<Via>,
}

/// What moved between two calls of [`crate::tunnel::Tunnel::take_traffic`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerTraffic {
    /// With whom.
    pub peer: NodeId,
    /// Whether data packets went out (neither keepalives nor control messages).
    pub sent: bool,
    /// By which ways authenticated packets of any kind came in, at most
    /// [`RECEIVED_VIAS_MAX`].
    pub received: Vec<Via>,
}

/// Most ways remembered between two calls: two families on LAN and on the Internet, two relays,
/// and as many again.
pub const RECEIVED_VIAS_MAX: usize = 12;
