//! The packet level: what the tcx programs remember of flows that no local socket made.

use crate::{
    SocketAddress, SpinLock,
    layout::{counters, layouts, limits},
};

limits! {
    /// Where flows are remembered: sets, found by the client's address and port. A gateway has 250 devices with 250 flows
    /// each, 62,500, which is half of the 122,880 places, so that 1 in 800 finds its set full. 8,192 × 1,280 bytes: 10 MiB,
    /// always, where packets are looked at; elsewhere there is 1 set.
    TRACKED_SETS = 8_192;
    /// The places of a set. Where all are taken, the flow goes that was used least recently, of those last that are TCP, were
    /// answered and are not closed. So many flows one port of a client can have at once, each by another service.
    TRACKED_WAYS = 15;
    /// Bits of a place's number that say which one of its set it is.
    TRACKED_WAY_BITS = 4;
    /// Places by their number, some of which are none. 131,072 × 8 bytes for those that the agent ended: 1 MiB, always,
    /// where packets are looked at.
    TRACKED_PLACES = 131_072;
    /// Flows whose client is masqueraded. The least recently used goes first. Each takes 112 bytes in each of two maps, and
    /// 32 of buckets: 16 MiB, always, where packets are looked at; elsewhere the maps have 1 entry.
    MASKED_MAX = 65_536;
    /// Fragmented packets whose first fragment passed in the last [`FRAGMENT_TIMEOUT_S`]:
    /// 136 a second. 4,096 × (112 + 16) bytes: 512 KiB.
    FRAGMENTED_MAX = 4_096;
    /// The endpoints tried for a new flow before it is refused, one after the other from a random
    /// one on: the client may speak with it by another service already, or the list may have been
    /// replaced under the program's eyes.
    ENDPOINT_ATTEMPTS = 4;
    /// Extension headers looked through in an IPv6 packet: hop-by-hop, destination options,
    /// routing, fragment (RFC 8200, 4.1, recommends this order, each once).
    EXTENSION_HEADERS_MAX = 4;
    /// When a flow's last packet passed is noted so often at most, in ticks of the kernel, of which there are 100 to 1,000 a
    /// second; and as often it is looked at whether it goes on. Two CPUs that wrote it with each packet would wait for each
    /// other.
    NOTED_JIFFIES = 100;
    /// The longest time that this is. A flow lasts by so much longer than its timeout says.
    SEEN_INTERVAL_MS = 1_000;
    /// A SYN that is sent again so long after the first one, without any answer, has failed: systems
    /// send it again after a second (RFC 6298, 2), and the clock used here is late by a tick or two.
    CONNECT_PATIENCE_MS = 900;
    /// UDP flows without a packet for so long are over (RFC 4787, REQ-5: 2 minutes or more).
    UDP_TIMEOUT_S = 120;
    /// TCP flows that opened and did not close, as `kube-proxy` sets it
    /// (`--conntrack-tcp-timeout-established`: 24 hours).
    TCP_OPEN_TIMEOUT_S = 86_400;
    /// TCP flows without an answer yet, and closed ones (RFC 5382, REQ-5: 4 minutes or more).
    TCP_TRANSITORY_TIMEOUT_S = 240;
    /// How long the kernel waits for a packet's other fragments (`net.ipv4.ipfrag_time`).
    FRAGMENT_TIMEOUT_S = 30;
    /// The first port of flows whose client is masqueraded: behind those that Linux gives to sockets
    /// that ask for any (`net.ipv4.ip_local_port_range`: 32,768 to 60,999).
    MASQUERADE_PORT_FIRST = 61_000;
    /// To 65,535: so many flows to one endpoint's port at once, for each protocol and family.
    MASQUERADE_PORTS = 4_536;
    /// Ports tried for a new flow, one after the other from a random one on, before its packet is
    /// dropped. While nine tenths are taken, 1 in 30 finds none, and the client sends again.
    MASQUERADE_ATTEMPTS = 32;
    /// Prefixes whose clients keep their address: pods, LANs and external peers of this node.
    /// 256 × 128 bytes at most: 32 KiB.
    KEPT_PREFIXES_MAX = 256;
    /// In [`Tracked::seen`]: the client sent FIN.
    SEEN_CLIENT_FIN = 1;
    /// In [`Tracked::seen`]: the endpoint sent FIN.
    SEEN_ENDPOINT_FIN = 2;
    /// In [`Tracked::seen`]: either sent RST.
    SEEN_RESET = 4;
    /// In [`Tracked::seen`]: the endpoint sent anything.
    SEEN_ANSWER = 8;
    /// In [`Tracked::seen`]: it began with a SYN, and what becomes of that is not known yet.
    SEEN_CONNECTING = 16;
    /// In [`Tracked::seen`], of UDP: the agent ended it, as its endpoint is gone.
    SEEN_ENDED = 32;
}

layouts! {
    /// Who speaks with whom: a client and a service, an endpoint, or what it takes the two for.
    pub struct TrackedFlow as "tracked_flow" {
        /// Who opened it.
        client: SocketAddress,
        /// Whom the client asks, or who answers it.
        address: SocketAddress,
    }

    /// A flow that was led to an endpoint.
    pub struct Tracked as "tracked" {
        /// Who opened it.
        client: SocketAddress,
        /// As the client asks for it.
        service: SocketAddress,
        /// Chosen at its first packet.
        endpoint: SocketAddress,
        /// `SEEN_…`
        seen: u32,
        /// When its last packet passed, either way, by `CLOCK_MONOTONIC`; see [`NOTED_JIFFIES`].
        seen_ns: u64,
        /// How often the place was taken, twice; odd while it is being taken.
        generation: u32,
        /// When that was noted, in the kernel's ticks. One in 2³² of them, some 50 days later, is taken for it.
        noted: u32,
    }

    /// Flows of clients with the same hash.
    pub struct TrackedSet as "tracked_set" {
        /// Of whoever takes a place or gives it back. Others read without it.
        lock: SpinLock,
        /// Of each place, other bits of its client's hash; 0: it is free.
        tags: [u32; TRACKED_WAYS as usize],
        /// The places.
        flows: [Tracked; TRACKED_WAYS as usize],
        /// Always 0: a set begins where a line of the processor's cache does, as seen from the first one.
        zero: [u32; 4],
    }

    /// A packet in fragments, before translation. Only the first fragment has ports.
    pub struct Fragmented as "fragmented" {
        /// Network byte order in memory.
        source: [u32; 4],
        /// Network byte order in memory.
        destination: [u32; 4],
        /// As in the header.
        id: u32,
        /// As in the header of IPv4; 0 in IPv6, where it may differ between fragments.
        protocol: u8,
        /// 1: on the way to the client.
        answer: u8,
        /// Always 0.
        zero: u16,
    }

    /// Who this node is to the mesh. All zero: it does not speak for its clients.
    pub struct Masquerade as "masquerade" {
        /// IPv4 as `::ffff:a.b.c.d`. Network byte order in memory.
        v4: [u32; 4],
        /// Network byte order in memory.
        v6: [u32; 4],
    }

    /// The key of a longest-prefix match.
    pub struct KeptPrefix as "kept_prefix" {
        /// Of IPv4, 96 more than it is called by.
        prefix_len: u32,
        /// IPv4 as `::ffff:a.b.c.d`. Network byte order in memory.
        ip: [u32; 4],
    }

    /// The key of a longest-prefix match: clients that may use a list.
    pub struct SourceRange as "source_range" {
        /// 64 for the list, and the prefix; of IPv4, 96 more than it is called by.
        prefix_len: u32,
        /// The list's number as it stands in the map of frontends, length 0.
        list: [u32; 2],
        /// IPv4 as `::ffff:a.b.c.d`. Network byte order in memory.
        ip: [u32; 4],
    }

    /// What the fragments' service or endpoint becomes.
    pub struct FragmentedTo as "fragmented_to" {
        /// When the first fragment passed, by `CLOCK_MONOTONIC`.
        seen_ns: u64,
        /// Network byte order in memory.
        ip: [u32; 4],
    }
}

const _: () = assert!(MASQUERADE_PORT_FIRST + MASQUERADE_PORTS == 1 << 16);
const _: () = assert!(size_of::<Masquerade>() == 32 && size_of::<KeptPrefix>() == 20);
const _: () = assert!(size_of::<SourceRange>() == 28);
const _: () = assert!(size_of::<TrackedFlow>() == 40 && align_of::<TrackedFlow>() == 4);
const _: () = assert!(size_of::<Tracked>() == 80 && align_of::<Tracked>() == 8);
const _: () = assert!(size_of::<TrackedSet>() == 1_280 && TRACKED_SETS.is_power_of_two());
const _: () = assert!(TRACKED_WAYS < 1 << TRACKED_WAY_BITS);
const _: () = assert!(TRACKED_PLACES == TRACKED_SETS << TRACKED_WAY_BITS);
const _: () = assert!(size_of::<Fragmented>() == 40 && align_of::<Fragmented>() == 4);
const _: () = assert!(size_of::<FragmentedTo>() == 24 && align_of::<FragmentedTo>() == 8);

counters! {
    PacketCounter {
        /// A packet to a service went to its flow's endpoint.
        RequestTranslated = "request_translated",
        /// A flow got its endpoint; its first packet is counted as translated as well.
        FlowOpened = "flow_opened",
        /// A new flow went to the endpoint that its client had before (`sessionAffinity`).
        AffinityKept = "affinity_kept",
        /// Which endpoint a client has could not be remembered: its next flow may go elsewhere.
        NotRemembered = "not_remembered",
        /// TCP or UDP to something that is no service.
        RequestPassed = "request_passed",
        /// A packet from an endpoint left as from the service.
        AnswerTranslated = "answer_translated",
        /// TCP or UDP to the client side that belongs to no flow, or to one that is over.
        AnswerPassed = "answer_passed",
        /// An ICMP error about a translated packet.
        ErrorTranslated = "error_translated",
        /// An ICMP error about anything else.
        ErrorPassed = "error_passed",
        /// A later fragment of a translated packet.
        FragmentTranslated = "fragment_translated",
        /// A later fragment whose first was not translated, or not seen.
        FragmentPassed = "fragment_passed",
        /// No endpoint: answered with a TCP RST.
        RefusedTcp = "refused_tcp",
        /// No endpoint: answered with ICMP port unreachable.
        RefusedUdp = "refused_udp",
        /// No endpoint, and no answer can be given to this packet: a RST, a fragment, UDP behind
        /// IPv6 extension headers. Dropped.
        RefusedSilently = "refused_silently",
        /// A packet of a client that is its own endpoint went back to it, or an ICMP error about one;
        /// a new flow's is counted as opened as well.
        Hairpin = "hairpin",
        /// A TCP connect was reset by its endpoint, unreachable, or had no answer for a second.
        ConnectFailed = "connect_failed",
        /// The client's port already speaks with the endpoints found by another service: refused.
        Clash = "clash",
        /// A new flow by a client outside the prefixes that the load balancer's address takes
        /// (`loadBalancerSourceRanges`): dropped.
        NotInRange = "not_in_range",
        /// A new flow from outside to a service whose endpoints are all on other nodes
        /// (`externalTrafficPolicy: Local`): dropped, for whoever spreads load tries another node.
        NotLocal = "not_local",
        /// A packet of a flow left by the tunnel as this node's own.
        Masqueraded = "masqueraded",
        /// A flow got a port for that; its first packet is counted as masqueraded as well.
        MasqueradeOpened = "masquerade_opened",
        /// No port was free for a flow: dropped.
        MasqueradeFull = "masquerade_full",
        /// A packet came by the tunnel to this node and went on to the client it was for.
        Unmasqueraded = "unmasqueraded",
        /// TCP, UDP or a fragment by the tunnel that belongs to no masqueraded flow.
        TunnelPassed = "tunnel_passed",
        /// The flow could not be remembered: dropped.
        FlowLost = "flow_lost",
        /// The kernel refused a change to the packet: dropped, it may be half changed.
        ChangeFailed = "change_failed",
        /// Shorter than its headers say: passed.
        Truncated = "truncated",
        /// Behind more extension headers than looked through, or a source route: passed.
        Extensions = "extensions",
        /// Not for this host, with two VLAN tags, not IP, or neither TCP, UDP nor an ICMP error:
        /// passed.
        Other = "other",
    }
}
