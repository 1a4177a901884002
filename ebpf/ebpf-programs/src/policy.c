// SPDX-License-Identifier: Apache-2.0
/*
 * Who may speak with whom: drops what policy denies, where packets leave this node for the mesh and
 * where they come from it. An object of its own: nodes without policies do not load it.
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

static __noinline __u32 class_of(const struct socket_address *address)
{
    struct kept_prefix key = {.prefix_len = 8 * sizeof(key.ip)};
    __u32 *class;

    __builtin_memcpy(key.ip, address->ip, sizeof(key.ip));
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
                                         const struct policy_state *state, __u64 now_ns)
{
    if (seen->generation != state->generation) {
        /* In this order: who reads between the two judges once more. */
        seen->verdict = judge(flow);
        seen->generation = state->generation;
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

static __always_inline enum opener tcp_opener(__u8 flags, const struct policy_flow *flow)
{
    if (flags & TCP_SYN)
        return flags & TCP_ACK ? OTHER : THIS;
    /* From the middle of a flow. Whoever has a port of those that are given out calls. Nobody comes in
     * by lying: without SYN there is no flow. */
    return bpf_ntohs(flow->from.port) < POLICY_GIVEN_PORT_FIRST &&
                   bpf_ntohs(flow->to.port) >= POLICY_GIVEN_PORT_FIRST
               ? OTHER
               : UNKNOWN;
}

static __noinline int on_flow(const struct policy_flow *flow, const struct policy_state *state,
                              enum opener opener)
{
    __u64 now_ns = bpf_ktime_get_ns();
    struct policy_seen fresh = {.seen_ns = now_ns, .generation = state->generation};
    __u8 protocol = flow->to.protocol;
    const struct policy_flow *opened = flow;
    struct policy_flow other;
    struct policy_seen *seen;

    turn(flow, &other);
    seen = bpf_map_lookup_elem(&hf_pol_flows, flow);
    if (seen && !is_over(seen, protocol, now_ns))
        return on_known(verdict_now(flow, seen, state, now_ns), POLICY_passed);
    if (opener != THIS) {
        seen = bpf_map_lookup_elem(&hf_pol_flows, &other);
        if (seen && !is_over(seen, protocol, now_ns))
            return on_known(verdict_now(&other, seen, state, now_ns), POLICY_answered);
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
                               const struct policy_state *state)
{
    struct fragmented key = {};
    struct policy_seen *seen;
    __u64 now_ns = bpf_ktime_get_ns();

    put_fragmented(&key, packet, flow->direction);
    seen = bpf_map_lookup_elem(&hf_pol_frags, &key);
    if (seen && seen->generation == state->generation &&
        (__s64)(now_ns - seen->seen_ns) <= (__s64)FRAGMENT_TIMEOUT_S * NS_PER_S)
        return seen->verdict ? pass(POLICY_fragment_passed) : drop(POLICY_fragment_denied);
    return is_free(flow) ? pass(POLICY_fragment_passed) : drop(POLICY_fragment_denied);
}

static __always_inline void remember_first(const struct packet *packet, __u32 direction,
                                           const struct policy_state *state, int action)
{
    struct policy_seen seen = {
        .seen_ns = bpf_ktime_get_ns(),
        .generation = state->generation,
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

static __always_inline int on_ip(struct __sk_buff *skb, struct packet *packet, __u32 l3,
                                 __u32 direction, const struct policy_state *state)
{
    __u32 parsed = parse(skb, packet, l3);
    struct policy_flow flow = {};
    enum opener opener = UNKNOWN;
    __u16 ports[2] = {};
    __u8 type = 0;
    int action;

    if (!(packet->destination.ip[0] | packet->destination.ip[1] | packet->destination.ip[2] |
          packet->destination.ip[3]))
        return drop(POLICY_malformed);
    packet->source.protocol = packet->protocol;
    packet->destination.protocol = packet->protocol;
    put_flow(&flow, packet, direction);
    if (same_ip(&flow.from, &flow.to))
        return pass(POLICY_passed);
    if (parsed == PACKET_truncated || parsed == PACKET_extensions)
        return on_unclear(&flow);
    if (packet->later)
        return on_later(packet, &flow, state);
    if (packet->protocol == PROTOCOL_TCP) {
        if (bpf_skb_load_bytes(skb, packet->l4 + TCP_FLAGS_OFFSET, &type, sizeof(type)))
            return on_unclear(&flow);
        opener = tcp_opener(type, &flow);
    } else if (packet->protocol == SCTP) {
        if (bpf_skb_load_bytes(skb, packet->l4, ports, sizeof(ports)))
            return on_unclear(&flow);
        flow.from.port = ports[0];
        flow.to.port = ports[1];
    } else if (packet->protocol == (packet->v6 ? ICMPV6 : ICMP)) {
        if (bpf_skb_load_bytes(skb, packet->l4, &type, sizeof(type)))
            return on_unclear(&flow);
        if (packet->v6 && is_link_control(type))
            return pass(POLICY_control);
        if (is_error(type, packet->v6))
            return on_error(skb, &flow, packet->l4 + ICMP_HEADER_LEN, packet->v6);
        if (type == (packet->v6 ? ICMPV6_ECHO : ICMP_ECHO))
            opener = THIS;
        if (opener == THIS || type == (packet->v6 ? ICMPV6_ECHO_REPLY : ICMP_ECHO_REPLY)) {
            if (bpf_skb_load_bytes(skb, packet->l4 + ICMP_ID_OFFSET, ports, sizeof(*ports)))
                return on_unclear(&flow);
            flow.from.port = ports[0];
            flow.to.port = ports[0];
        }
    }
    action = on_flow(&flow, state, opener);
    if (packet->fragment)
        remember_first(packet, direction, state, action);
    return action;
}

static __always_inline int on_packet(struct __sk_buff *skb, bool ethernet, __u32 direction)
{
    struct packet packet = {};
    __u16 protocol = skb->protocol;
    struct policy_state *state;
    __u32 l3 = 0, zero = 0;

    state = bpf_map_lookup_elem(&hf_pol_state, &zero);
    if (!state || !state->enforced)
        return TC_ACT_UNSPEC;
    if (ethernet) {
        l3 = skip_ethernet(skb, &protocol);
        if (!l3)
            return pass(POLICY_control);
    }
    packet.v6 = protocol == bpf_htons(ETH_P_IPV6);
    if (!packet.v6 && protocol != bpf_htons(ETH_P_IP))
        return ethernet ? pass(POLICY_control) : drop(POLICY_malformed);
    return on_ip(skb, &packet, l3, direction, state);
}

#define PROGRAM(name, ethernet, direction)          \
    SEC("classifier")                               \
    int name(struct __sk_buff *skb)                 \
    {                                               \
        return on_packet(skb, ethernet, direction); \
    }

/* For the tunnel's interface. */
PROGRAM(hf_policy_in, false, POLICY_IN)
PROGRAM(hf_policy_out, false, POLICY_OUT)
