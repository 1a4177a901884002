// SPDX-License-Identifier: Apache-2.0
/*
 * Who may speak with whom: drops what policy denies, where packets leave this node for the mesh and
 * where they come from it, and at pods' own interfaces. An object of its own: nodes without policies
 * do not load it.
 *
 * At a pod's interface packets count as whose address they have only if the node's routes say so; at a
 * bridge's port, if they say so of the bridge. A packet that redirect.c hands on does not pass the
 * hook of the pod that it goes to: so what one pod sends to another is judged for both where it comes
 * in. By the stack it comes to the other's hook as well, which finds the flow as it was decided:
 * nobody knows here what the stack will have made of the packet. By a bridge it is judged for each
 * where it passes.
 *
 * An address has a class, a pair of classes has rules by destination port. A flow that was let
 * pass is remembered, so that its answers pass as well, with the generation of the tables by which
 * it was judged: another one, and its next packet is judged again. A flow that may not go on stays
 * remembered as such: else the next packet of the end that was called would open it anew, the other
 * way round.
 *
 * Invariant: what the tables do not have does not pass. What cannot be read passes only between
 * classes that may say anything to each other. Every packet is counted, by what became of it.
 */
#include "parse.h"

#define AF_INET 2
#define AF_INET6 10

/* linux/bpf.h before 6.3 does not name it. */
#define FIB_SKIP_NEIGH (1u << 2)

#define SCTP 132
#define NS_PER_MS 1000000ll
#define NS_PER_S 1000000000ll

#define ICMP_ECHO_REPLY 0
#define ICMP_ECHO 8
#define ICMPV6_ECHO 128
#define ICMPV6_ECHO_REPLY 129
#define ICMP_HEADER_LEN 8
#define ICMP_ID_OFFSET 4

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __type(key, __u32);
    __type(value, struct policy_state);
    __uint(max_entries, 1);
} hf_pol_state SEC(".maps");

/* Prefix to class. As of the two below, there may be an old state beside the new one. */
struct {
    __uint(type, BPF_MAP_TYPE_LPM_TRIE);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct kept_prefix);
    __type(value, __u32);
    __uint(max_entries, 2 * POLICY_ADDRESSES_MAX);
} hf_pol_addrs SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct policy_pair);
    __type(value, struct policy_pair_rules);
    __uint(max_entries, 2 * POLICY_PAIRS_MAX);
} hf_pol_pairs SEC(".maps");

/* Rule set, protocol and port to verdict. */
struct {
    __uint(type, BPF_MAP_TYPE_LPM_TRIE);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct policy_port);
    __type(value, __u32);
    __uint(max_entries, 2 * POLICY_PORTS_MAX);
} hf_pol_ports SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __type(key, struct policy_flow);
    __type(value, struct policy_seen);
    __uint(max_entries, POLICY_FLOWS_MAX);
} hf_pol_flows SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __type(key, struct fragmented);
    __type(value, struct policy_seen);
    __uint(max_entries, FRAGMENTED_MAX);
} hf_pol_frags SEC(".maps");

/* Index to itself, of interfaces with hf_policy_to. The kernel itself takes one out before its index
 * can come to another interface. */
struct {
    __uint(type, BPF_MAP_TYPE_DEVMAP_HASH);
    __type(key, __u32);
    __type(value, struct bpf_devmap_val);
    __uint(max_entries, POLICY_PODS_MAX);
} hf_pol_pods SEC(".maps");

/* A pod's interface that is a bridge's port, to the bridge: who is behind its other ports nobody knows. */
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, __u32);
    __type(value, __u32);
    __uint(max_entries, POLICY_PODS_MAX);
} hf_pol_bridges SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_RINGBUF);
    __uint(max_entries, POLICY_EVENTS_BYTES);
} hf_pol_events SEC(".maps");

/* When the last event was told. */
struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __type(key, __u32);
    __type(value, __u64);
    __uint(max_entries, 1);
} hf_pol_told SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __type(key, __u32);
    __type(value, __u64);
    __uint(max_entries, POLICY_COUNTERS_MAX);
} hf_pol_counters SEC(".maps");

static __always_inline void count(__u32 counter)
{
    add_one(&hf_pol_counters, counter);
}

static __always_inline int pass(__u32 counter)
{
    count(counter);
    return TC_ACT_UNSPEC;
}

static __always_inline int drop(__u32 counter)
{
    count(counter);
    return TC_ACT_SHOT;
}

/* ---- Judging ---- */

static __always_inline bool is_v4(const struct socket_address *address)
{
    return !address->ip[0] && !address->ip[1] && address->ip[2] == bpf_htonl(0xffff);
}

/* Of nobody, if it only says whose it is. */
static __noinline __u32 class_of(const struct socket_address *address)
{
    struct kept_prefix key = {.prefix_len = 8 * sizeof(key.ip)};
    __u32 *class;

    if (!address->outside)
        __builtin_memcpy(key.ip, address->ip, sizeof(key.ip));
    else if (is_v4(address)) /* 0.0.0.0: anybody's. */
        key.ip[2] = bpf_htonl(0xffff);
    class = bpf_map_lookup_elem(&hf_pol_addrs, &key);
    return class ? *class : 0; /* 0: the strict one. */
}

static __always_inline struct policy_pair_rules *rules_of(const struct policy_flow *flow)
{
    struct policy_pair pair = {.direction = flow->direction};

    pair.local = class_of(flow->direction == POLICY_IN ? &flow->to : &flow->from);
    pair.remote = class_of(flow->direction == POLICY_IN ? &flow->from : &flow->to);
    return bpf_map_lookup_elem(&hf_pol_pairs, &pair);
}

/* Whether everything may pass between the two. */
static __noinline bool is_free(const struct policy_flow *flow)
{
    struct policy_pair_rules *rules = rules_of(flow);

    return rules && (rules->strictest & POLICY_ALLOWED);
}

static __noinline __u32 judge(const struct policy_flow *flow)
{
    struct policy_pair_rules *rules = rules_of(flow);
    __u8 protocol = flow->to.protocol;
    struct policy_port key = {
        .prefix_len = 8 * (sizeof(key) - sizeof(key.prefix_len)),
        .protocol = protocol == ICMPV6 ? ICMP : protocol,
    };
    __u32 *verdict;

    if (!rules)
        return 0;
    if (!rules->rule_set)
        return rules->strictest;
    key.rule_set = rules->rule_set;
    /* The identifier of an echo is no port. */
    if (key.protocol != ICMP)
        key.port = flow->to.port;
    verdict = bpf_map_lookup_elem(&hf_pol_ports, &key);
    return verdict ? *verdict : 0;
}

static __noinline void tell(const struct policy_flow *flow, __u32 verdict, __u64 now_ns)
{
    struct policy_event *event;
    __u32 zero = 0;
    __u64 *told = bpf_map_lookup_elem(&hf_pol_told, &zero);

    if (!told || (*told && now_ns - *told < (__u64)POLICY_EVENT_INTERVAL_MS * NS_PER_MS))
        return;
    event = bpf_ringbuf_reserve(&hf_pol_events, sizeof(*event), 0);
    if (!event)
        return;
    *told = now_ns;
    event->from = flow->from;
    event->to = flow->to;
    event->direction = flow->direction;
    event->verdict = verdict;
    bpf_ringbuf_submit(event, 0);
}

/* ---- Flows ---- */

static __always_inline bool is_over(const struct policy_seen *seen, __u8 protocol, __u64 now_ns)
{
    __s64 timeout_s = protocol == PROTOCOL_TCP ? TCP_OPEN_TIMEOUT_S : UDP_TIMEOUT_S;

    return (__s64)(now_ns - seen->seen_ns) > timeout_s * NS_PER_S;
}

/* What holds for a flow that is remembered. */
static __always_inline __u32 verdict_now(const struct policy_flow *flow, struct policy_seen *seen,
                                         __u32 generation, __u64 now_ns)
{
    if (seen->generation != generation) {
        /* In this order: who reads between the two judges once more. */
        seen->verdict = judge(flow);
        seen->generation = generation;
        if (!(seen->verdict & POLICY_ALLOWED) || (seen->verdict & POLICY_AUDITED))
            tell(flow, seen->verdict, now_ns);
    }
    seen->seen_ns = now_ns;
    return seen->verdict;
}

static __always_inline int on_known(__u32 verdict, __u32 counter)
{
    if (!(verdict & POLICY_ALLOWED))
        return drop(POLICY_flow_ended);
    return pass(verdict & POLICY_AUDITED ? POLICY_audited : counter);
}

static __always_inline void turn(const struct policy_flow *flow, struct policy_flow *other)
{
    other->from = flow->to;
    other->to = flow->from;
    other->direction = flow->direction == POLICY_IN ? POLICY_OUT : POLICY_IN;
}

/* What a packet says of who opened its flow: it does, it is unknown, or the other end did. The last
 * counts only where the flow is not remembered. */
enum opener { THIS, UNKNOWN, OTHER };

static __always_inline enum opener tcp_opener(__u8 flags, const struct packet *packet)
{
    if (flags & TCP_SYN)
        return flags & TCP_ACK ? OTHER : THIS;
    /* From the middle of a flow. Whoever has a port of those that are given out calls. Nobody comes in
     * by lying: without SYN there is no flow. */
    return bpf_ntohs(packet->source.port) < POLICY_GIVEN_PORT_FIRST &&
                   bpf_ntohs(packet->destination.port) >= POLICY_GIVEN_PORT_FIRST
               ? OTHER
               : UNKNOWN;
}

static __noinline int on_flow(const struct policy_flow *flow, __u32 generation,
                              enum opener opener)
{
    __u64 now_ns = bpf_ktime_get_ns();
    struct policy_seen fresh = {.seen_ns = now_ns, .generation = generation};
    __u8 protocol = flow->to.protocol;
    const struct policy_flow *opened = flow;
    struct policy_flow other;
    struct policy_seen *seen;

    turn(flow, &other);
    seen = bpf_map_lookup_elem(&hf_pol_flows, flow);
    if (seen && !is_over(seen, protocol, now_ns))
        return on_known(verdict_now(flow, seen, generation, now_ns), POLICY_passed);
    if (opener != THIS) {
        seen = bpf_map_lookup_elem(&hf_pol_flows, &other);
        if (seen && !is_over(seen, protocol, now_ns))
            return on_known(verdict_now(&other, seen, generation, now_ns), POLICY_answered);
    }
    if (opener == OTHER)
        opened = &other;
    fresh.verdict = judge(opened);
    if (!(fresh.verdict & POLICY_ALLOWED)) {
        tell(flow, fresh.verdict, now_ns);
        return drop(fresh.verdict ? POLICY_denied : POLICY_no_room);
    }
    count(bpf_map_update_elem(&hf_pol_flows, opened, &fresh, BPF_ANY) ? POLICY_flow_lost
                                                                     : POLICY_flow_opened);
    if (fresh.verdict & POLICY_AUDITED)
        tell(flow, fresh.verdict, now_ns);
    if (fresh.verdict & POLICY_AUDITED)
        return pass(POLICY_audited);
    return pass(opener == OTHER ? POLICY_answered : POLICY_passed);
}

/* Whether the flow is remembered, and allowed. */
static __noinline bool is_allowed(const struct policy_flow *flow)
{
    struct policy_seen *seen = bpf_map_lookup_elem(&hf_pol_flows, flow);

    return seen && (seen->verdict & POLICY_ALLOWED) &&
           !is_over(seen, flow->to.protocol, bpf_ktime_get_ns());
}

/* ---- Packets ---- */

static __always_inline int on_unclear(const struct policy_flow *flow)
{
    return is_free(flow) ? pass(POLICY_unclear_passed) : drop(POLICY_unclear_denied);
}

static __always_inline void put_flow(struct policy_flow *flow, const struct packet *packet,
                                     __u32 direction)
{
    flow->from = packet->source;
    flow->to = packet->destination;
    flow->direction = direction;
}

/* An error is about a packet that its receiver sent: the other way round. */
static __noinline int on_error(struct __sk_buff *skb, const struct policy_flow *flow, __u32 at,
                               bool v6)
{
    __u32 away = flow->direction == POLICY_IN ? POLICY_OUT : POLICY_IN;
    struct packet quoted = {.v6 = v6};
    struct policy_flow about, answered;
    __u32 parsed = parse(skb, &quoted, at);
    __u16 id;

    if (parsed == PARSED && !quoted.later) {
        if ((quoted.protocol == ICMP || quoted.protocol == ICMPV6) &&
            !bpf_skb_load_bytes(skb, quoted.l4 + ICMP_ID_OFFSET, &id, sizeof(id))) {
            quoted.source.port = id;
            quoted.destination.port = id;
        }
        quoted.source.protocol = quoted.protocol;
        quoted.destination.protocol = quoted.protocol;
        put_flow(&about, &quoted, away);
        turn(&about, &answered);
        if (is_allowed(&about) || is_allowed(&answered))
            return pass(POLICY_error_passed);
    }
    return is_free(flow) ? pass(POLICY_error_passed) : drop(POLICY_error_denied);
}

static __always_inline void put_fragmented(struct fragmented *key, const struct packet *packet,
                                           __u32 direction)
{
    key->id = packet->id;
    key->answer = direction;
    key->protocol = packet->v6 ? 0 : packet->protocol;
    __builtin_memcpy(key->source, packet->source.ip, sizeof(key->source));
    __builtin_memcpy(key->destination, packet->destination.ip, sizeof(key->destination));
}

static __noinline int on_later(const struct packet *packet, const struct policy_flow *flow,
                               __u32 generation)
{
    struct fragmented key = {};
    struct policy_seen *seen;
    __u64 now_ns = bpf_ktime_get_ns();

    put_fragmented(&key, packet, flow->direction);
    seen = bpf_map_lookup_elem(&hf_pol_frags, &key);
    if (seen && seen->generation == generation &&
        (__s64)(now_ns - seen->seen_ns) <= (__s64)FRAGMENT_TIMEOUT_S * NS_PER_S)
        return seen->verdict ? pass(POLICY_fragment_passed) : drop(POLICY_fragment_denied);
    return is_free(flow) ? pass(POLICY_fragment_passed) : drop(POLICY_fragment_denied);
}

static __always_inline void remember_first(const struct packet *packet, __u32 direction,
                                           __u32 generation, int action)
{
    struct policy_seen seen = {
        .seen_ns = bpf_ktime_get_ns(),
        .generation = generation,
        .verdict = action == TC_ACT_UNSPEC,
    };
    struct fragmented key = {};

    put_fragmented(&key, packet, direction);
    /* Not remembered: the rest passes between classes that may say anything. */
    bpf_map_update_elem(&hf_pol_frags, &key, &seen, BPF_ANY);
}

static __always_inline bool is_error(__u8 type, bool v6)
{
    /* Destination unreachable, source quench, redirect, time exceeded, parameter problem. */
    return v6 ? type < 128
              : type == 3 || type == 4 || type == 5 || type == 11 || type == 12;
}

/* Multicast listeners, routers and neighbours: RFC 2710, 3810, 4861. */
static __always_inline bool is_link_control(__u8 type)
{
    return (type >= 130 && type <= 137) || type == 143;
}

/* What a packet is to policy. */
enum what { FLOW, LATER, ERROR, UNCLEAR, CONTROL, MALFORMED };

struct subject {
    struct packet packet; /* SCTP has ports, too, and echoes their identifier as both. */
    enum what what;
    enum opener opener;
};

static __always_inline enum what read_icmp(struct __sk_buff *skb, struct packet *packet,
                                           enum opener *opener)
{
    __u8 type;
    __u16 id;

    if (bpf_skb_load_bytes(skb, packet->l4, &type, sizeof(type)))
        return UNCLEAR;
    if (packet->v6 && is_link_control(type))
        return CONTROL;
    if (is_error(type, packet->v6))
        return ERROR;
    if (type == (packet->v6 ? ICMPV6_ECHO : ICMP_ECHO))
        *opener = THIS;
    else if (type != (packet->v6 ? ICMPV6_ECHO_REPLY : ICMP_ECHO_REPLY))
        return FLOW;
    if (bpf_skb_load_bytes(skb, packet->l4 + ICMP_ID_OFFSET, &id, sizeof(id)))
        return UNCLEAR;
    packet->source.port = id;
    packet->destination.port = id;
    return FLOW;
}

static __always_inline enum what read_packet(struct __sk_buff *skb, struct packet *packet,
                                             __u32 l3, enum opener *opener)
{
    __u32 parsed = parse(skb, packet, l3);
    __u16 ports[2];
    __u8 flags;

    *opener = UNKNOWN;
    if (!(packet->destination.ip[0] | packet->destination.ip[1] | packet->destination.ip[2] |
          packet->destination.ip[3]))
        return MALFORMED;
    packet->source.protocol = packet->protocol;
    packet->destination.protocol = packet->protocol;
    if (parsed == PACKET_truncated || parsed == PACKET_extensions)
        return UNCLEAR;
    if (packet->later)
        return LATER;
    if (packet->protocol == PROTOCOL_TCP) {
        if (bpf_skb_load_bytes(skb, packet->l4 + TCP_FLAGS_OFFSET, &flags, sizeof(flags)))
            return UNCLEAR;
        *opener = tcp_opener(flags, packet);
    } else if (packet->protocol == SCTP) {
        if (bpf_skb_load_bytes(skb, packet->l4, ports, sizeof(ports)))
            return UNCLEAR;
        packet->source.port = ports[0];
        packet->destination.port = ports[1];
    } else if (packet->protocol == (packet->v6 ? ICMPV6 : ICMP)) {
        return read_icmp(skb, packet, opener);
    }
    return FLOW;
}

/* What becomes of a packet of an end on this node. Not static: so the verifier looks at it once for
 * both ends. */
__noinline int decide(struct __sk_buff *skb, const struct subject *subject, __u32 direction,
                      __u32 generation)
{
    const struct packet *packet;
    struct policy_flow flow;
    int action;

    if (!subject)
        return TC_ACT_SHOT;
    packet = &subject->packet;
    put_flow(&flow, packet, direction);
    if (same_ip(&flow.from, &flow.to))
        return pass(POLICY_passed);
    if (subject->what == LATER)
        return on_later(packet, &flow, generation);
    if (subject->what == ERROR)
        return on_error(skb, &flow, packet->l4 + ICMP_HEADER_LEN, packet->v6);
    if (subject->what == UNCLEAR)
        return on_unclear(&flow);
    action = on_flow(&flow, generation, subject->opener);
    if (packet->fragment)
        remember_first(packet, direction, generation, action);
    return action;
}

/* ---- At pods' interfaces ---- */

#define HERE 0       /* This node has the address, or nobody that it knows. */
#define NOWHERE (~0u) /* The node does not forward there. */

/* To whose routes an interface belongs: itself, or the bridge whose port it is. */
static __always_inline __u32 network_of(__u32 interface)
{
    __u32 *bridge = bpf_map_lookup_elem(&hf_pol_bridges, &interface);

    return bridge ? *bridge : interface;
}

/* By which interface the node sends to an address. */
static __noinline __u32 home_of(struct __sk_buff *skb, const struct socket_address *address)
{
    /* The length: else it would be compared with the interface's MTU. */
    struct bpf_fib_lookup way = {.ifindex = network_of(skb->ifindex), .tot_len = 1};
    long found;

    if (is_v4(address)) {
        way.family = AF_INET;
        way.ipv4_dst = address->ip[3];
    } else {
        way.family = AF_INET6;
        __builtin_memcpy(way.ipv6_dst, address->ip, sizeof(way.ipv6_dst));
    }
    found = bpf_fib_lookup(skb, &way, sizeof(way), FIB_SKIP_NEIGH);
    if (found == BPF_FIB_LKUP_RET_NOT_FWDED)
        return HERE;
    return found == BPF_FIB_LKUP_RET_SUCCESS ? way.ifindex : NOWHERE;
}

static __always_inline bool is_pod(__u32 interface)
{
    return bpf_map_lookup_elem(&hf_pol_pods, &interface) != NULL;
}

/* Who has no other address never leaves the link: the stack forwards nothing of his. */
static __always_inline bool stays_on_link(const struct socket_address *source)
{
    if (is_v4(source))
        return !source->ip[3];
    return (source->ip[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000) ||
           !(source->ip[0] | source->ip[1] | source->ip[2] | source->ip[3]);
}

static __always_inline int from_pod(struct __sk_buff *skb, const struct subject *subject,
                                    const struct policy_state *state)
{
    const struct packet *packet = &subject->packet;
    __u32 generation = state->generation, to;
    int action;

    if (stays_on_link(&packet->source))
        return pass(POLICY_own_node);
    if (home_of(skb, &packet->source) != network_of(skb->ifindex))
        return drop(POLICY_spoofed);
    to = home_of(skb, &packet->destination);
    if (to == HERE)
        return pass(POLICY_own_node);
    action = decide(skb, subject, POLICY_OUT, generation);
    if (action != TC_ACT_UNSPEC || to == skb->ifindex || !is_pod(to))
        return action;
    return decide(skb, subject, POLICY_IN, generation);
}

/* What came in `by` another interface, for a pod. */
static __always_inline int into_pod(struct __sk_buff *skb, struct subject *subject, __u32 by,
                                    const struct policy_state *state)
{
    struct socket_address *source = &subject->packet.source;
    __u32 home = home_of(skb, source);

    if (home != network_of(by) && (home == state->tunnel || is_pod(home)))
        return drop(POLICY_spoofed);
    /* It came from elsewhere and has an address of this node, given to it by somebody's NAT at best. */
    source->outside = home == HERE;
    return decide(skb, subject, POLICY_IN, state->generation);
}

static __always_inline int to_pod(struct __sk_buff *skb, struct subject *subject,
                                  const struct policy_state *state)
{
    __u32 by = skb->ingress_ifindex;

    if (!by) /* Made by this node. */
        return pass(POLICY_own_node);
    if (by == skb->ifindex) /* The pod's own, or the answer that packets.c made of it. */
        return pass(POLICY_passed);
    return into_pod(skb, subject, by, state);
}

/* A device's, which may be redirected into a pod past to_pod(). All else is judged elsewhere, or is the node's. */
static __always_inline int from_device(struct __sk_buff *skb, struct subject *subject,
                                       const struct policy_state *state)
{
    if (subject->what != FLOW || !is_pod(home_of(skb, &subject->packet.destination)))
        return TC_ACT_UNSPEC;
    return into_pod(skb, subject, skb->ifindex, state);
}

/* ---- Programs ---- */

enum place { FROM_TUNNEL, TO_TUNNEL, FROM_POD, TO_POD, FROM_DEVICE };

/* What the stack takes for IP, maybe only behind more tags. */
static __always_inline bool may_be_ip(__u16 protocol)
{
    return protocol == bpf_htons(ETH_P_IP) || protocol == bpf_htons(ETH_P_IPV6) ||
           protocol == bpf_htons(ETH_P_8021Q) || protocol == bpf_htons(ETH_P_8021AD);
}

static __always_inline int on_packet(struct __sk_buff *skb, enum place place)
{
    bool ethernet = place != FROM_TUNNEL && place != TO_TUNNEL;
    struct subject subject = {};
    __u16 protocol = skb->protocol;
    struct policy_state *state;
    __u32 l3 = 0, zero = 0;

    state = bpf_map_lookup_elem(&hf_pol_state, &zero);
    if (!state || !state->enforced)
        return TC_ACT_UNSPEC;
    if (ethernet)
        l3 = skip_ethernet(skb, &protocol);
    subject.packet.v6 = protocol == bpf_htons(ETH_P_IPV6);
    if ((ethernet && !l3) || (!subject.packet.v6 && protocol != bpf_htons(ETH_P_IP))) {
        if (place == FROM_DEVICE)
            return TC_ACT_UNSPEC;
        return ethernet && !may_be_ip(protocol) ? pass(POLICY_control) : drop(POLICY_malformed);
    }
    subject.what = read_packet(skb, &subject.packet, l3, &subject.opener);
    if (place == FROM_DEVICE)
        return from_device(skb, &subject, state);
    if (subject.what == MALFORMED)
        return drop(POLICY_malformed);
    if (subject.what == CONTROL)
        return pass(POLICY_control);
    if (place == FROM_POD)
        return from_pod(skb, &subject, state);
    if (place == TO_POD)
        return to_pod(skb, &subject, state);
    return decide(skb, &subject, place == FROM_TUNNEL ? POLICY_IN : POLICY_OUT,
                  state->generation);
}

#define PROGRAM(name, place)         \
    SEC("classifier")                \
    int name(struct __sk_buff *skb)  \
    {                                \
        return on_packet(skb, place); \
    }

PROGRAM(hf_policy_in, FROM_TUNNEL)
PROGRAM(hf_policy_out, TO_TUNNEL)
PROGRAM(hf_policy_from, FROM_POD)
PROGRAM(hf_policy_to, TO_POD)
PROGRAM(hf_policy_device, FROM_DEVICE)
