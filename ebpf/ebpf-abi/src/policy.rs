//! Policy: what the tcx programs know of who may speak with whom, and of flows that do.

use crate::{
    SocketAddress,
    layout::{counters, layouts, limits},
};

limits! {
    /// Prefixes with a class. Only those count that policies tell apart from what is around them: with
    /// 100,000 nodes of which each has a class of its own they are 200,000 overlay addresses, and
    /// 62,144 are left for pods and networks. Allocated as they are written: 262,144 × 2 × 64
    /// bytes, 32 MiB at most. What has no room is judged strictly. This map and the two below have
    /// room for twice as much: a new state is written beside the old one.
    POLICY_ADDRESSES_MAX = 262_144;
    /// Pairs of classes, each of both directions: 128 classes on this node and 256 in the mesh. 65,536 × 80
    /// bytes, 5 MiB at most. Nothing passes between those that have no room.
    POLICY_PAIRS_MAX = 65_536;
    /// Port prefixes of all rule sets: 2,000 sets of one range at its worst, 30 prefixes. Allocated
    /// as they are written: 65,536 × 2 × 64 bytes, 8 MiB at most.
    POLICY_PORTS_MAX = 65_536;
    /// Flows that were let pass, so that their answers are: 110 pods with 500 each are 55,000. One between
    /// two pods of this node is two: each end judges for itself.
    /// The least recently used goes first: what its opener sends next is judged as a new flow, and
    /// so is what the other end sends. 65,536 × 128 bytes: 8 MiB, always.
    POLICY_FLOWS_MAX = 65_536;
    /// Pods' interfaces: the kubelet starts 110 pods unless told otherwise, and large nodes are told
    /// 500. Policy does not see the packets of those beyond it, and the status says so. 4,096 × 64 bytes and
    /// 64 KiB of buckets: 320 KiB at most.
    POLICY_PODS_MAX = 4_096;
    /// What waits for user space: 64 KiB, 1,000 events. A full one loses events, never packets.
    POLICY_EVENTS_BYTES = 65_536;
    /// At most one event so often on each processor: 100 a second.
    POLICY_EVENT_INTERVAL_MS = 10;
    /// The first port that Linux gives to sockets that ask for any
    /// (`net.ipv4.ip_local_port_range`): by it is told who opened a TCP flow that nobody remembers.
    POLICY_GIVEN_PORT_FIRST = 32_768;
    /// The end on this node was called.
    POLICY_IN = 0;
    /// The end on this node calls.
    POLICY_OUT = 1;
    /// In a verdict: the packet passes.
    POLICY_ALLOWED = 1;
    /// In a verdict: by a policy in audit it would not.
    POLICY_AUDITED = 2;
    /// From this bit of a verdict on stands who decided.
    POLICY_DECIDER_BIT = 8;
    /// The protocol of [`PolicyPort`] for those that rules cannot name: none has this number
    /// (RFC 5237: reserved).
    POLICY_PROTOCOL_OTHER = 255;
}

layouts! {
    /// Whether anything is enforced, and by which state of the tables.
    pub struct PolicyState as "policy_state" {
        /// 0: everything passes.
        enforced: u32,
        /// Another one: open flows are judged again.
        generation: u32,
        /// The index of the tunnel's interface; 0: there is none.
        tunnel: u32,
    }

    /// The classes of a flow's ends.
    pub struct PolicyPair as "policy_pair" {
        /// Of the end on this node.
        local: u32,
        /// Of the other.
        remote: u32,
        /// `POLICY_IN` or `POLICY_OUT`.
        direction: u32,
    }

    /// What holds between them.
    pub struct PolicyPairRules as "policy_pair_rules" {
        /// The verdict for packets whose port cannot be known; without `rule_set`, for all.
        strictest: u32,
        /// Where it depends on the port; 0: nowhere.
        rule_set: u32,
    }

    /// The key of a longest-prefix match.
    pub struct PolicyPort as "policy_port" {
        /// 32: all of the rule set. 48: all of the protocol. Up to 64: leading bits of the port.
        prefix_len: u32,
        /// Whose.
        rule_set: u32,
        /// The IP protocol; ICMP stands for ICMPv6 too.
        protocol: u8,
        /// Always 0.
        zero: u8,
        /// The destination port. Network byte order in memory.
        port: u16,
    }

    /// A flow, as one of this node's interfaces sees it.
    pub struct PolicyFlow as "policy_flow" {
        /// Who opened it. ICMP echoes have their identifier as both ports.
        from: SocketAddress,
        /// To whom.
        to: SocketAddress,
        /// `POLICY_IN` or `POLICY_OUT`.
        direction: u32,
    }

    /// What was decided of a flow, or of a packet in fragments.
    pub struct PolicySeen as "policy_seen" {
        /// When its last packet came, either way, by `CLOCK_MONOTONIC`.
        seen_ns: u64,
        /// By which state of the tables.
        generation: u32,
        /// The verdict.
        verdict: u32,
    }

    /// A packet that was denied, or would be.
    pub struct PolicyEvent as "policy_event" {
        /// The packet's source.
        from: SocketAddress,
        /// Its destination.
        to: SocketAddress,
        /// `POLICY_IN` or `POLICY_OUT`.
        direction: u32,
        /// The verdict.
        verdict: u32,
    }
}

const _: () = assert!(size_of::<PolicyFlow>() == 44 && align_of::<PolicyFlow>() == 4);
const _: () = assert!(size_of::<PolicySeen>() == 16 && align_of::<PolicySeen>() == 8);
const _: () = assert!(size_of::<PolicyPort>() == 12 && size_of::<PolicyEvent>() == 48);

counters! {
    PolicyCounter {
        /// A packet of a flow that is allowed.
        Passed = "passed",
        /// The same, but by a policy in audit it would have been dropped.
        Audited = "audited",
        /// An answer of a flow that is allowed.
        Answered = "answered",
        /// A new flow was allowed; its first packet is counted as passed as well.
        FlowOpened = "flow_opened",
        /// It could not be remembered: its answers may be denied.
        FlowLost = "flow_lost",
        /// A packet that opens a flow that nobody allows: dropped.
        Denied = "denied",
        /// A packet of a flow that was open until policy changed: dropped.
        FlowEnded = "flow_ended",
        /// A packet between ends of which the tables have no room to say anything: dropped.
        NoRoom = "no_room",
        /// A later fragment of a packet that passed, or between ends that may say anything.
        FragmentPassed = "fragment_passed",
        /// A later fragment of a packet that was dropped or not seen: dropped.
        FragmentDenied = "fragment_denied",
        /// An ICMP error about a flow that is allowed, or between ends that may say anything.
        ErrorPassed = "error_passed",
        /// An ICMP error about anything else: dropped.
        ErrorDenied = "error_denied",
        /// A packet whose ports cannot be read, between ends that may say anything.
        UnclearPassed = "unclear_passed",
        /// The same between others: dropped.
        UnclearDenied = "unclear_denied",
        /// No whole IP header: dropped.
        Malformed = "malformed",
        /// What a link needs, as ARP and neighbour discovery: passed.
        Control = "control",
        /// Between a pod and its own node: passed.
        OwnNode = "own_node",
        /// From or to a pod's interface, by whom the node's routes do not lead to its source: dropped.
        Spoofed = "spoofed",
    }
}
