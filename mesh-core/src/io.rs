//! What goes into the core and what comes out: the whole contract between decisions and the
//! shell that performs them.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use mesh_wire::{
    id::{NodeId, RelayId, Via},
    peer::PeerMessage,
};

use crate::snapshot::Snapshot;

/// Something happened.
#[derive(Debug, Clone)]
pub enum Input {
    /// The deadline that `poll_timeout` gave has come.
    Timeout,
    /// The desired state is now this.
    Snapshot(Arc<Snapshot>),
    /// The addresses at which the node's UDP socket is bound on its own interfaces are now
    /// these. Also said when nothing but the network itself changed (a link came back).
    LocalAddresses(Vec<SocketAddr>),
    /// The NAT granted mappings on request (PCP, NAT-PMP, UPnP): at these outside addresses the node
    /// is reachable now. Empty: at none.
    PortMapped(Vec<SocketAddr>),
    /// A node of this LAN announced itself at this address, and its signature was checked: it may be
    /// called there without anybody's help.
    Neighbour {
        /// The node.
        peer: NodeId,
        /// Its address.
        address: SocketAddr,
    },
    /// The node's ways out are now these. A shell that says this does not say `LocalAddresses`: they
    /// are those of the uplink that [`Output::UseUplink`] names. Also said when nothing but the
    /// network itself changed.
    Uplinks(Vec<Uplink>),
    /// The answer to [`Output::ProbeUplink`].
    UplinkAnswered {
        /// The uplink.
        uplink: UplinkId,
    },
    /// A relay answered a STUN binding request.
    Reflexive {
        /// The relay.
        relay: RelayId,
        /// The address that was asked.
        asked: SocketAddr,
        /// Where the request came from, as the relay saw it.
        observed: SocketAddr,
        /// How long the answer took, from the request that it answers.
        rtt: Duration,
    },
    /// A link to a relay is up.
    RelayConnected {
        /// The relay.
        relay: RelayId,
        /// By what.
        transport: RelayTransport,
    },
    /// A link to a relay could not be made, or broke.
    RelayLost {
        /// The relay.
        relay: RelayId,
        /// By what.
        transport: RelayTransport,
        /// For people.
        reason: String,
    },
    /// A relay says it will stop soon.
    RelayGoAway {
        /// The relay.
        relay: RelayId,
    },
    /// A relay answered [`Output::FindPeer`], or changed its mind later.
    RelayPeer {
        /// The relay.
        relay: RelayId,
        /// The peer asked for.
        peer: NodeId,
        /// Whether it is connected to that relay.
        present: bool,
    },
    /// Packets are waiting for a peer that has no path.
    Wanted {
        /// The peer.
        peer: NodeId,
    },
    /// The kernel refused at once to send to this address: `ENETUNREACH`, `EHOSTUNREACH`, `ENETDOWN`,
    /// `EPERM` (a local firewall). Said as often as it happens, but one in a second of each address says
    /// enough: more are passed over.
    Unsendable {
        /// Where to.
        address: SocketAddr,
    },
    /// A peer's WireGuard initiation was authentic, and was refused.
    Refused {
        /// Whose.
        peer: NodeId,
        /// The way it came.
        via: Via,
        /// Why.
        why: Refusal,
    },
    /// What the node knows of the time, both since 1970. Said when it starts, and when the clock was set.
    Clock {
        /// What its wall clock says.
        wall: Duration,
        /// What must be over: when its certificate was made, when it last wrote its state.
        at_least: Duration,
    },
    /// A WireGuard session with a peer was proven by both ends, whoever began it (`via` is how its last
    /// message came). There is a session now.
    Handshake {
        /// The peer.
        peer: NodeId,
        /// The way.
        via: Via,
    },
    /// A message from a peer's core came out of the session.
    Message {
        /// The peer.
        peer: NodeId,
        /// The way it came.
        via: Via,
        /// What it says.
        message: PeerMessage,
    },
    /// What the packet path saw of a peer since it last said so; said every
    /// [`TRAFFIC_TICK_MS`] while there is something to say.
    Traffic {
        /// The peer.
        peer: NodeId,
        /// Data packets (no keepalives, no control) went out to it.
        sent: bool,
        /// Authenticated packets of any kind came in from it, by these ways.
        received: Vec<Via>,
    },
}

/// Why an authentic initiation was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// A later one had been answered: the peer's clock went back since. Copies and initiations that
    /// were overtaken are older, too, but never by [`CLOCK_SKEW_MIN`].
    OldTimestamp {
        /// By how much it is older.
        behind: Duration,
    },
    /// The snapshot has no such key.
    UnknownKey,
}

/// Less is not called a wrong clock: no initiation is under way for so long, and certificates are made
/// as if it were so much earlier.
pub const CLOCK_SKEW_MIN: Duration = Duration::from_secs(60);

/// A way out of the node: its interface's index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UplinkId(pub u32);

/// A way out of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uplink {
    /// Which.
    pub id: UplinkId,
    /// The addresses at which the node's UDP socket is bound there.
    pub addresses: Vec<SocketAddr>,
    /// It has a carrier.
    pub up: bool,
    /// What goes out by it costs: it is used when no other works, and carries nothing but traffic.
    pub metered: bool,
    /// Of those that work, the one with the largest weight is used.
    pub weight: u16,
}

/// How often the shell reports [`Input::Traffic`], in milliseconds: a quarter of the shortest
/// time after which a path becomes suspect.
pub const TRAFFIC_TICK_MS: u64 = 100;

/// How long sockets of [`Output::OpenSockets`] wait: the peer guesses for 7 s, from when it hears of them,
/// and most NATs keep a mapping without an answer for 30 s.
pub const SOCKETS_TRIED: Duration = Duration::from_secs(20);

/// After so long without a packet a socket that was of use is closed, too: a session without traffic ends after
/// five minutes.
pub const SOCKETS_KEPT: Duration = Duration::from_secs(300);

/// What a link to a relay runs over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RelayTransport {
    /// QUIC datagrams on UDP.
    Quic,
    /// WebSocket over TLS on TCP.
    Tls,
}

/// Something must be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Send a WireGuard handshake initiation by each of these ways (the same bytes on all).
    Handshake {
        /// The peer.
        peer: NodeId,
        /// The ways.
        vias: Vec<Via>,
    },
    /// Seal this message in the session and send it by this way, and no other.
    Send {
        /// The peer.
        peer: NodeId,
        /// The way.
        via: Via,
        /// The message.
        message: PeerMessage,
    },
    /// From now on the peer's packets go this way. Receiving is always on for every way.
    SetPath {
        /// The peer.
        peer: NodeId,
        /// The way; `None`: hold its packets and say [`Input::Wanted`] again.
        primary: Option<Via>,
        /// Send each packet this way too.
        duplicate: Option<Via>,
        /// But no more than so many from now on; `None`: until the next `SetPath`.
        duplicates_max: Option<u32>,
    },
    /// Make a link to a relay. Answered by `RelayConnected` or `RelayLost`.
    ConnectRelay {
        /// The relay.
        relay: RelayId,
        /// By what.
        transport: RelayTransport,
    },
    /// Close a link to a relay. Not answered.
    DisconnectRelay {
        /// The relay.
        relay: RelayId,
        /// By what.
        transport: RelayTransport,
    },
    /// When a relay is up by two transports, send by this one.
    UseRelayTransport {
        /// The relay.
        relay: RelayId,
        /// By what.
        transport: RelayTransport,
    },
    /// Ask a relay whether it can reach a peer. Answered by `RelayPeer`.
    FindPeer {
        /// The relay.
        relay: RelayId,
        /// The peer.
        peer: NodeId,
    },
    /// Send a STUN binding request from the node's own UDP socket. Answered by `Reflexive`, or
    /// not at all.
    AskReflexive {
        /// The relay.
        relay: RelayId,
        /// Its address.
        target: SocketAddr,
    },
    /// Open so many more UDP sockets, and send this message, sealed in the session, from each of them to
    /// `target`. What comes in by them came by `Via::Direct` of its source, as by the node's own socket.
    /// By the one by which something authentic came from an address, everything to that address leaves
    /// from then on. Those by which nothing came are closed after [`SOCKETS_TRIED`], those by which nothing
    /// has come or gone for so long after [`SOCKETS_KEPT`], and all when the network is another one.
    OpenSockets {
        /// The peer.
        peer: NodeId,
        /// One of its addresses.
        target: SocketAddr,
        /// How many.
        count: u16,
        /// The message.
        message: PeerMessage,
    },
    /// From now on, the node's UDP socket and its relay links use this uplink. Links that used
    /// another are said to be lost.
    UseUplink {
        /// The uplink.
        uplink: UplinkId,
    },
    /// Send a STUN binding request by this uplink, whichever is in use. Answered by
    /// `UplinkAnswered`, or not at all.
    ProbeUplink {
        /// The uplink.
        uplink: UplinkId,
        /// A relay's address.
        target: SocketAddr,
    },
    /// Something that operators and subscribers should know.
    Event(Event),
}

/// How often [`Event::Stranger`] is said at most.
pub const STRANGER_EVERY: Duration = Duration::from_secs(60);

/// What operators and subscribers should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A peer's state changed.
    Peer {
        /// The peer.
        peer: NodeId,
        /// Its state before.
        from: PeerState,
        /// Its state now.
        to: PeerState,
        /// Why.
        reason: Reason,
    },
    /// Whether new flows may go to this node's endpoints changed.
    Liveness {
        /// The peer.
        peer: NodeId,
        /// Whether it has a path that is not in doubt, or none is known to be dead.
        alive: bool,
    },
    /// Somebody calls whom the snapshot does not name: it may be behind. Said once in
    /// [`STRANGER_EVERY`].
    Stranger {
        /// Its key.
        id: NodeId,
    },
    /// Remember these addresses of a peer for the next boot.
    Remember {
        /// The peer.
        peer: NodeId,
        /// Addresses that worked, the last one first.
        addresses: Vec<SocketAddr>,
    },
}

/// The states of a peer (`paths.md`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PeerState {
    /// No session, no traffic, nothing asked of it.
    Idle,
    /// A handshake is on its way.
    Waking,
    /// Traffic flows through a relay.
    Relayed,
    /// Traffic flows directly.
    Direct,
    /// Nothing came back for a while; being probed, duplicated if there is a standby.
    Suspect,
    /// No way works.
    Unreachable,
}

/// Why a peer is in the state that it is in, or why it is not direct.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// Packets were waiting.
    Wanted,
    /// The peer began.
    PeerCalled,
    /// A handshake completed.
    HandshakeDone,
    /// An echo came back by a direct path.
    ProbeAnswered,
    /// A LAN candidate was better.
    LanFound,
    /// Nothing authenticated came back in time.
    Silent,
    /// The link under the path went away.
    LinkDown,
    /// The peer said goodbye.
    Goodbye,
    /// No traffic for a while.
    LazyIdle,
    /// Neither side's UDP gets out.
    UdpBlocked,
    /// Both NATs map by destination.
    HardNatBoth,
    /// One NAT maps by destination and the other filters by port: neither can guess the other.
    HardNatOne,
    /// No community has both sites: the mesh says that they speak through relays.
    PolicyRelayOnly,
    /// The peer told no address, and none is known.
    NoCandidates,
    /// Only small packets pass.
    MtuFail,
    /// The direct path works, and loses so much that the relay is better.
    DirectLossy,
    /// No answer to the handshake.
    HandshakeTimeout,
    /// No answer to the handshake though a relay says that the peer is there, and this node's clock is
    /// wrong; or the peer's handshake was refused, as its clock went back.
    ClockSkew,
    /// No answer to the handshake though a relay says that the peer is there, and never was one: it does
    /// not know this node's key, as its snapshot, or this node's, is old.
    MapStale,
    /// No relay is up, and no direct way works.
    RelayUnreachable,
    /// The peer is not connected to any relay.
    PeerOffline,
    /// Probing is still going on.
    Probing,
}
