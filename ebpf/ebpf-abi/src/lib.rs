//! What the programs in the kernel and their loader both believe: keys, values, limits, counters.
//!
//! The C side's header is this crate printed by [`CHeader`]; nobody writes a layout twice. It
//! carries the sizes and offsets that `rustc` chose as static assertions, so clang fails where it
//! would disagree.
//!
//! **Invariant:** no layout has a byte of padding (asserted below), nothing here allocates, and
//! nothing here knows what a service is for.

#![no_std]

mod layout;
mod mapping;
mod packets;
mod policy;
mod redirect;
mod sockmap;

use core::net::{IpAddr, Ipv6Addr, SocketAddr};

pub use layout::{CHeader, SpinLock};
use layout::{counters, layouts, limits};
pub use mapping::{MAPPINGS_MAX, MappedTo, MappingCounter};
pub use packets::{
    CONNECT_PATIENCE_MS, ENDPOINT_ATTEMPTS, EXTENSION_HEADERS_MAX, FRAGMENT_TIMEOUT_S,
    FRAGMENTED_MAX, Fragmented, FragmentedTo, KEPT_PREFIXES_MAX, KeptPrefix, MASKED_MAX,
    MASQUERADE_ATTEMPTS, MASQUERADE_PORT_FIRST, MASQUERADE_PORTS, Masquerade, NOTED_JIFFIES,
    PacketCounter, SEEN_ANSWER, SEEN_CLIENT_FIN, SEEN_CONNECTING, SEEN_ENDED, SEEN_ENDPOINT_FIN,
    SEEN_INTERVAL_MS, SEEN_RESET, SourceRange, TCP_OPEN_TIMEOUT_S, TCP_TRANSITORY_TIMEOUT_S,
    TRACKED_PLACES, TRACKED_SETS, TRACKED_WAY_BITS, TRACKED_WAYS, Tracked, TrackedFlow, TrackedSet,
    UDP_TIMEOUT_S,
};
pub use policy::{
    POLICY_ADDRESSES_MAX, POLICY_ALLOWED, POLICY_AUDITED, POLICY_DECIDER_BIT,
    POLICY_EVENT_INTERVAL_MS, POLICY_EVENTS_BYTES, POLICY_FLOWS_MAX, POLICY_GIVEN_PORT_FIRST,
    POLICY_IN, POLICY_OUT, POLICY_PAIRS_MAX, POLICY_PODS_MAX, POLICY_PORTS_MAX,
    POLICY_PROTOCOL_OTHER, PolicyCounter, PolicyEvent, PolicyFlow, PolicyPair, PolicyPairRules,
    PolicyPort, PolicySeen, PolicyState,
};
pub use redirect::{REDIRECTS_MAX, ROUTES_MAX, RedirectCounter, Route, RoutePrefix};
pub use sockmap::{
    Connection, ConnectionEnd, Exchange, SOCKMAP_CONNECTIONS_MAX, SOCKMAP_ENDS_MAX,
    SOCKMAP_PAIRS_MAX, SOCKMAP_SETTLE_MS, SOCKMAP_UNANSWERED_MAX,
};

limits! {
    /// Service addresses with a port and a protocol: 10,000 services of three ports in two
    /// families are 60,000; Kubernetes' 2,768 node ports at six addresses of the node each, for clients
    /// inside and outside, 33,216; the rest is for addresses of load balancers. A full table takes
    /// 131,072 × 96 bytes and 2 MiB of buckets: 14 MiB.
    FRONTENDS_MAX = 131_072;
    /// Prefixes of clients that may use a frontend from outside (`loadBalancerSourceRanges`), over all
    /// of them: 1,000 addresses of load balancers with 8 each, and as many again while lists are replaced.
    /// Those beyond it are left out, and their clients with them. Allocated as they are written:
    /// 16,384 × 2 × 96 bytes, 3 MiB at most.
    RANGES_MAX = 16_384;
    /// Endpoints over all frontends, with room to write one list beside the one it replaces.
    /// A full table takes 262,144 × 96 bytes and 4 MiB of buckets: 28 MiB. Entries are allocated
    /// as they are written, so that a node with three services pays for the buckets alone.
    ENDPOINTS_MAX = 262_144;
    /// Slots of one frontend: endpoints, some of them several times. A datagram of a flow whose
    /// list was replaced looks through the whole new list for its endpoint, once: 4,096 look-ups are about 100 µs.
    LIST_ENDPOINTS_MAX = 4_096;
    /// (Unconnected UDP socket, service) pairs whose endpoint is remembered, and as many
    /// (socket, endpoint) pairs whose service is. The least recently used goes first; its flow
    /// may then move to another endpoint. 16,384 × (112 + 104) bytes: 3.5 MiB, always.
    FLOWS_MAX = 16_384;
    /// Connected UDP sockets that are known to be led to an endpoint, to be ended when it is gone; those
    /// that closed are still in it. The one that was connected first goes first, and stays then with its
    /// endpoint. 16,384 × 112 bytes: 2 MiB, always.
    CONNECTED_MAX = 16_384;
    /// Sockets that are connected and were led to an endpoint: for what they are told of it, and for how connects end.
    /// Those beyond it carry that themselves, and connect a microsecond slower. 16,384 × 48 bytes: 768 KiB, always.
    PEER_PLACES_MAX = 16_384;
    /// (Client, service) pairs whose endpoint is kept for `sessionAffinity`: one for each port that
    /// the client uses, and one for all of them. The least recently used goes first; its client
    /// may then get another endpoint. 16,384 × 120 bytes: 2 MiB, always; as many again for the source
    /// addresses of packets, where they are looked at.
    AFFINITIES_MAX = 16_384;
    /// Endpoints to which a TCP connect failed, until one is used again. The least recently seen goes
    /// first and is taken for a good one. 4,096 × 112 bytes: 448 KiB, always.
    FAILING_MAX = 4_096;
    /// The bit of a frontend's value that says that clients keep their endpoint.
    LIST_AFFINITY_BIT = 63;
    /// The bit that says that the client's hash chooses, not chance.
    LIST_HASH_BIT = 62;
    /// The bit that says that endpoints are chosen in turn.
    LIST_TURNS_BIT = 61;
    /// The bit that says that only clients in the list's prefixes may use it.
    LIST_RANGES_BIT = 60;
    /// Counters of turns, by a list's number: two lists in 4,096 share one and skip turns of each
    /// other. 32 KiB (an array's values are 8 bytes apart), always.
    TURNS_MAX = 4_096;
    /// How often a program reads a service again whose list was replaced under its eyes. Each
    /// time needs a whole replacement (three system calls or more) within about 200 ns.
    READ_ATTEMPTS = 4;
    /// The bits of a list's number that hold its length, or in a slot the index.
    LIST_LENGTH_MASK = 0xffff;
    /// Raised when entries that another version left in pinned maps would be misunderstood though their
    /// sizes are the same: those maps are then not taken over.
    MAPS_VERSION = 1;
    /// `IPPROTO_TCP`.
    PROTOCOL_TCP = 6;
    /// `IPPROTO_UDP`.
    PROTOCOL_UDP = 17;
}

/// Endpoints that may be in use at once: the rest is for the list being written.
pub const ENDPOINTS_USABLE: u32 = ENDPOINTS_MAX - LIST_ENDPOINTS_MAX;

const _: () = assert!(ENDPOINTS_USABLE >= 250_000);
const _: () = assert!(LIST_ENDPOINTS_MAX <= LIST_LENGTH_MASK);

layouts! {
    /// An address, IPv4 as `::ffff:a.b.c.d`, with port and protocol. One form for both families
    /// makes an IPv4 destination on an IPv6 socket, which the kernel shows to the IPv6 hook at
    /// `connect` and to the IPv4 hook at `sendmsg`, the same key.
    pub struct SocketAddress as "socket_address" {
        /// Network byte order in memory.
        ip: [u32; 4],
        /// Network byte order in memory.
        port: u16,
        /// [`PROTOCOL_TCP`] or [`PROTOCOL_UDP`].
        protocol: u8,
        /// 1 for a frontend as clients from outside are led there, where that is something else than
        /// for all; else 0.
        outside: u8,
    }

    /// A socket and an address it speaks with.
    pub struct SocketFlow as "socket_flow" {
        /// The kernel's number for the socket, never given out twice.
        cookie: u64,
        /// The service in the map of flows, the endpoint in the map of replies.
        address: SocketAddress,
        /// Always 0.
        zero: u32,
    }

    /// Where an unconnected socket's datagrams to a service go.
    pub struct Choice as "choice" {
        /// Which slot was chosen: says whether the list is still the same one.
        slot: u64,
        /// What was in it.
        endpoint: SocketAddress,
        /// Always 0.
        zero: u32,
    }

    /// A client and a service that it uses.
    pub struct Client as "client" {
        /// The kernel's number for the client's network namespace, never given out twice.
        netns_cookie: u64,
        /// The service. Port and protocol 0: all of its ports.
        service: SocketAddress,
        /// Always 0.
        zero: u32,
    }

    /// The endpoint that a client has at a service.
    pub struct Affinity as "affinity" {
        /// The endpoint; for all ports together its port is 0.
        choice: Choice,
        /// When a new flow last went there, since the machine was started, suspension included.
        used_ns: u64,
    }

    /// How TCP connects to an endpoint end.
    pub struct Failing as "failing" {
        /// How many failed, in all.
        failed: u64,
        /// How many since the last one that did not.
        in_a_row: u32,
        /// Always 0.
        zero: u32,
    }

    /// Kept of each socket that ever used a service.
    pub struct Peer as "peer" {
        /// What the socket asked for.
        service: SocketAddress,
        /// What it is connected to; port 0: it is not connected.
        endpoint: SocketAddress,
    }

    /// A place for what a socket is connected to.
    pub struct PeerPlace as "peer_place" {
        /// The socket's number; 0: the place is free.
        cookie: u64,
        /// To what.
        peer: Peer,
    }
}

const _: () = assert!(size_of::<SocketAddress>() == 20 && align_of::<SocketAddress>() == 4);
const _: () = assert!(size_of::<SocketFlow>() == 32 && align_of::<SocketFlow>() == 8);
const _: () = assert!(size_of::<Choice>() == 32 && align_of::<Choice>() == 8);
const _: () = assert!(size_of::<Client>() == 32 && align_of::<Client>() == 8);
const _: () = assert!(size_of::<Affinity>() == 40 && align_of::<Affinity>() == 8);
const _: () = assert!(size_of::<Failing>() == 16 && align_of::<Failing>() == 8);
const _: () = assert!(size_of::<Peer>() == 40 && align_of::<Peer>() == 4);

counters! {
    /// A `connect` to a service went to an endpoint.
    ConnectRewritten = "connect_rewritten",
    /// A TCP or UDP `connect` to something else.
    ConnectPassed = "connect_passed",
    /// A `connect` to a service without endpoints.
    ConnectRefused = "connect_refused",
    /// A TCP `connect` to a service's endpoint that was reset, unreachable, or not answered within a
    /// second, while connects are watched.
    ConnectFailed = "connect_failed",
    /// A datagram to a service went to an endpoint.
    SendRewritten = "send_rewritten",
    /// A datagram to something else.
    SendPassed = "send_passed",
    /// A datagram to a service without endpoints.
    SendRefused = "send_refused",
    /// A socket's datagrams to a service were given another endpoint: theirs is gone.
    FlowMoved = "flow_moved",
    /// A new flow went to the endpoint that its client had before (`sessionAffinity`).
    AffinityKept = "affinity_kept",
    /// A datagram's source was shown as the service's address.
    ReceiveRewritten = "receive_rewritten",
    /// `getpeername` was answered with the service's address.
    PeerNameRewritten = "peer_name_rewritten",
    /// A list was replaced while a program read it; it read again.
    ReadAgain = "read_again",
    /// What was chosen could not be remembered: the socket sees the endpoint's address, or the
    /// client's next flow goes elsewhere.
    NotRemembered = "not_remembered",
    /// A connection's two ends were joined in the sockmap: what is written to one goes past TCP.
    SockmapJoined = "sockmap_joined",
    /// One end of such a connection writes by TCP again, for good.
    SockmapLeft = "sockmap_left",
}

impl SocketAddress {
    /// The key for an address; IPv4 and its IPv6-mapped form are the same.
    #[must_use]
    pub const fn new(address: IpAddr, port: u16, protocol: u8) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let ip = [
            u32::from_ne_bytes([a, b, c, d]),
            u32::from_ne_bytes([e, f, g, h]),
            u32::from_ne_bytes([i, j, k, l]),
            u32::from_ne_bytes([m, n, o, p]),
        ];
        Self {
            ip,
            port: port.to_be(),
            protocol,
            outside: 0,
        }
    }

    /// The same, for clients from outside alone.
    #[must_use]
    pub const fn for_outside(self) -> Self {
        Self { outside: 1, ..self }
    }

    /// The address and port, IPv4 where it is IPv4.
    #[must_use]
    pub const fn socket_addr(&self) -> SocketAddr {
        let [a, b, c, d] = self.ip;
        let words = [
            u32::from_be(a),
            u32::from_be(b),
            u32::from_be(c),
            u32::from_be(d),
        ];
        let bits = (words[0] as u128) << 96
            | (words[1] as u128) << 64
            | (words[2] as u128) << 32
            | words[3] as u128;
        SocketAddr::new(
            Ipv6Addr::from_bits(bits).to_canonical(),
            u16::from_be(self.port),
        )
    }
}

/// One endpoint list: a number that is never used again, and how many endpoints it has. It is a
/// frontend's value in the map, read by the programs as one word, so that a reader has the old
/// list or the new one and nothing between. 44 bits of number last half a year at a million lists a
/// second; the four above say how an endpoint is chosen, and for whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndpointList {
    number: u64,
    length: u16,
}

impl EndpointList {
    /// A list with its number. It has at most [`LIST_ENDPOINTS_MAX`] endpoints: the rest of a
    /// longer one has no slots.
    #[must_use]
    pub fn new(number: u64, length: usize) -> Self {
        let length = length.min(LIST_ENDPOINTS_MAX as usize);
        Self {
            number,
            length: u16::try_from(length).unwrap_or(u16::MAX),
        }
    }

    /// The same, for a service with `sessionAffinity`.
    #[must_use]
    pub const fn with_affinity(self) -> Self {
        Self {
            number: self.number | 1 << (LIST_AFFINITY_BIT - 16),
            ..self
        }
    }

    /// The same, with the client's hash as the place in the list.
    #[must_use]
    pub const fn with_hash(self) -> Self {
        Self {
            number: self.number | 1 << (LIST_HASH_BIT - 16),
            ..self
        }
    }

    /// The same, with each endpoint in its turn.
    #[must_use]
    pub const fn with_turns(self) -> Self {
        Self {
            number: self.number | 1 << (LIST_TURNS_BIT - 16),
            ..self
        }
    }

    /// The same, for clients in its prefixes alone.
    #[must_use]
    pub const fn with_ranges(self) -> Self {
        Self {
            number: self.number | 1 << (LIST_RANGES_BIT - 16),
            ..self
        }
    }

    /// The data of a [`SourceRange`]'s key for `ip`, or for a prefix that begins with it.
    #[must_use]
    pub const fn range(self, ip: [u32; 4]) -> [u32; 6] {
        let [a, b, c, d, e, f, g, h] = (self.number << 16).to_ne_bytes();
        let list = [
            u32::from_ne_bytes([a, b, c, d]),
            u32::from_ne_bytes([e, f, g, h]),
        ];
        [list[0], list[1], ip[0], ip[1], ip[2], ip[3]]
    }

    /// What stands in the map of frontends.
    #[must_use]
    pub const fn from_value(value: u64) -> Self {
        let [low, high, ..] = value.to_le_bytes();
        Self {
            number: value >> 16,
            length: u16::from_le_bytes([low, high]),
        }
    }

    /// Its number, without the bits that say how an endpoint is chosen.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.number & ((1 << (LIST_RANGES_BIT - 16)) - 1)
    }

    /// Whether it has that bit.
    #[must_use]
    pub const fn has(self, bit: u32) -> bool {
        self.value() >> bit & 1 == 1
    }

    /// As it stands in the map of frontends.
    #[must_use]
    pub const fn value(self) -> u64 {
        self.number << 16 | self.length as u64
    }

    /// The keys of its endpoints, in order.
    pub fn slots(self) -> impl Iterator<Item = u64> {
        (0..self.length).map(move |index| self.number << 16 | u64::from(index))
    }
}

#[cfg(test)]
mod tests;
