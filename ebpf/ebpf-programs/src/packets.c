// SPDX-License-Identifier: Apache-2.0
/*
 * Services for packets that no local socket made: those of LAN devices, virtual machines and
 * nested namespaces, that come in by a client-side interface and are forwarded to an endpoint.
 * Included after services.c, whose maps of services it shares.
 *
 * In by the interface, a service's address becomes an endpoint's, chosen at the flow's first
 * packet; out by it, the endpoint's becomes the service's again. The kernel's own routing, filters
 * and connection tracking are between and see the endpoint alone. A client that is the endpoint gets
 * its packets back at once, each of its two ends with the service's address at the other.
 *
 * Invariant: what is not a service passes untouched, and so does what cannot be understood. Every
 * packet is counted, by what became of it.
 *
 * Checksums change by difference, so that one that was wrong stays wrong, and one that the network
 * card has yet to complete (CHECKSUM_PARTIAL, GSO) still can be. Entries of LRU maps are recycled
 * as well, but the one just looked up is the last of all to be.
 */
#include "change.h"

#define PACKET_HOST 0
#define NS_PER_S 1000000000ll
#define NS_PER_MS 1000000ll
#define TTL 64

#include "tracked.c"

/* A client's address, without port and protocol, and a service, to the endpoint that it keeps. */
struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __type(key, struct tracked_flow);
    __type(value, struct affinity);
    __uint(max_entries, AFFINITIES_MAX);
} hf_sources SEC(".maps");

/* A list and the prefixes of the clients that may use it. */
struct {
    __uint(type, BPF_MAP_TYPE_LPM_TRIE);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct source_range);
    __type(value, __u32);
    __uint(max_entries, RANGES_MAX);
} hf_ranges SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __type(key, struct fragmented);
    __type(value, struct fragmented_to);
    __uint(max_entries, FRAGMENTED_MAX);
} hf_fragmented SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __type(key, __u32);
    __type(value, __u64);
    __uint(max_entries, PACKET_COUNTERS_MAX);
} hf_pkt_counters SEC(".maps");

static __always_inline void count_packet(__u32 counter)
{
    add_one(&hf_pkt_counters, counter);
}

/* On to the next program, or the stack. */
static __always_inline int pass(__u32 counter)
{
    count_packet(counter);
    return TC_ACT_UNSPEC;
}

static __always_inline int drop(__u32 counter)
{
    count_packet(counter);
    return TC_ACT_SHOT;
}

/* ---- Reading ---- */

/* Whether all headers are there that will be changed; also reads the TCP flags. */
static __always_inline bool is_complete(struct __sk_buff *skb, struct packet *packet)
{
    __u32 header = packet->later                      ? 0
                   : packet->protocol == PROTOCOL_TCP ? sizeof(struct tcphdr)
                                                      : sizeof(struct udphdr);

    if (!packet->size && skb->gso_size) /* More than 64 KiB, together: BIG TCP. */
        packet->size = skb->len - packet->l3;
    if (packet->l3 + packet->size > skb->len || packet->l4 + header > packet->l3 + packet->size)
        return false;
    return packet->later || packet->protocol != PROTOCOL_TCP ||
           !LOAD(skb, packet->l4 + TCP_FLAGS_OFFSET, &packet->tcp_flags);
}

/* Of a packet to a service, which is its flow's: both its ends, one behind the other. */
static __always_inline struct tracked_flow *asked_flow(struct packet *packet)
{
    return (struct tracked_flow *)&packet->source;
}

_Static_assert(offsetof(struct packet, destination) - offsetof(struct packet, source) ==
                   offsetof(struct tracked_flow, address),
               "a packet's ends are not a flow");

/* ---- Changing: all of these say 0 when done, as the helpers do ---- */

/* For later fragments of a packet whose source or destination becomes `ip`. */
static __always_inline void remember_fragmented(const struct packet *packet, bool source,
                                                const __u32 *ip)
{
    struct fragmented_to value = {.seen_ns = bpf_ktime_get_coarse_ns()};
    struct fragmented key = {.id = packet->id, .answer = source};

    __builtin_memcpy(key.source, packet->source.ip, sizeof(key.source));
    __builtin_memcpy(key.destination, packet->destination.ip, sizeof(key.destination));
    key.protocol = packet->v6 ? 0 : packet->protocol;
    __builtin_memcpy(value.ip, ip, sizeof(value.ip));
    /* Not remembered: the rest passes untouched and is counted as such. */
    bpf_map_update_elem(&hf_fragmented, &key, &value, BPF_ANY);
}

static __always_inline long change_port(struct __sk_buff *skb, struct packet *packet, bool source,
                                        __u16 to, __u64 flags)
{
    struct socket_address *from = source ? &packet->source : &packet->destination;
    __u32 check = packet->l4 + CHECK_OFFSET(packet->protocol);
    __u16 before = from->port;

    from->port = to;
    return before == to ? 0
                        : bpf_l4_csum_replace(skb, check, before, to, flags | sizeof(__u16));
}

/* Whether the network card has yet to complete the checksum, as it does of what pods send: seen by what became of it
 * when the addresses changed. `difference`: of these; where it is zero, nobody can tell. */
static __always_inline bool is_seen_partial(struct __sk_buff *skb, const struct packet *packet,
                                            __u32 difference)
{
    void *at = (void *)(long)skb->data + (packet->l4 & OFFSET_MASK);
    __u16 *check = at + CHECK_OFFSET(packet->protocol);

    return (void *)(check + 1) <= (void *)(long)skb->data_end && fold(difference) % 0xffff &&
           *check == fold(fold(difference) + packet->check);
}

/* As change() does it of any packet, with fewer calls. The port is in no checksum that has yet to be completed. */
static __always_inline long change_plain(struct __sk_buff *skb, struct packet *packet, bool source,
                                         const struct socket_address *to)
{
    struct socket_address *from = source ? &packet->source : &packet->destination;
    __u32 check = packet->l4 + CHECK_OFFSET(packet->protocol);
    __u32 difference = address_difference(from, to);
    __u16 before = from->port, after = to->port;
    __u64 flags = CHECK_FLAGS(packet);

    put_ip(from, to->ip);
    from->port = after;
    if (cover_address(skb, packet, difference, check, flags) ||
        (before != after && !is_seen_partial(skb, packet, difference) &&
         bpf_l4_csum_replace(skb, check, before, after, flags | sizeof(__u16))))
        return -1;
    return write_plain(skb, packet, difference);
}

/* The source or the destination, address and port. */
static __noinline long change(struct __sk_buff *skb, struct packet *packet, bool source,
                              const struct socket_address *to)
{
    struct socket_address *from = source ? &packet->source : &packet->destination;
    __u32 difference = address_difference(from, to);
    __u64 flags = CHECK_FLAGS(packet);

    if (packet->plain)
        return change_plain(skb, packet, source, to);
    if (packet->fragment)
        remember_fragmented(packet, source, to->ip);
    if (change_port(skb, packet, source, to->port, flags) ||
        cover_address(skb, packet, difference, packet->l4 + CHECK_OFFSET(packet->protocol), flags))
        return -1;
    put_ip(from, to->ip);
    return write_ends(skb, packet, difference);
}

static __always_inline long swap_ethernet(struct __sk_buff *skb, const struct packet *packet)
{
    __u8 from[2 * ETH_ALEN];
    __u8 to[2 * ETH_ALEN];

    if (!packet->l3)
        return 0;
    if (bpf_skb_load_bytes(skb, 0, from, sizeof(from)))
        return -1;
    __builtin_memcpy(to, from + ETH_ALEN, ETH_ALEN);
    __builtin_memcpy(to + ETH_ALEN, from, ETH_ALEN);
    return bpf_skb_store_bytes(skb, 0, to, sizeof(to), 0);
}

/* Back to the client that is its own endpoint: who sent it and to whom change places, which no sum
 * of them notices. */
static __always_inline int send_back(struct __sk_buff *skb, struct packet *packet)
{
    struct socket_address source = packet->source;

    put_ip(&packet->source, packet->destination.ip);
    put_ip(&packet->destination, source.ip);
    if (write_ends(skb, packet, 0) || swap_ethernet(skb, packet))
        return drop(PACKET_change_failed);
    count_packet(PACKET_hairpin);
    return bpf_redirect(skb->ifindex, 0);
}

/* With the endpoint's port as its destination, or with the service's as its source. */
static __noinline int on_hairpin(struct __sk_buff *skb, struct packet *packet, bool source,
                                 __u16 port)
{
    if (packet->fragment)
        remember_fragmented(packet, false, packet->source.ip);
    if (change_port(skb, packet, source, port, CHECK_FLAGS(packet)))
        return drop(PACKET_change_failed);
    return send_back(skb, packet);
}

static __noinline int on_later_fragment(struct __sk_buff *skb, struct packet *packet, bool answer)
{
    struct socket_address *from = answer ? &packet->source : &packet->destination;
    struct fragmented key = {.id = packet->id, .answer = answer};
    struct socket_address to = {};
    struct fragmented_to *known;
    __u32 difference;

    __builtin_memcpy(key.source, packet->source.ip, sizeof(key.source));
    __builtin_memcpy(key.destination, packet->destination.ip, sizeof(key.destination));
    key.protocol = packet->v6 ? 0 : packet->protocol;
    known = bpf_map_lookup_elem(&hf_fragmented, &key);
    if (!known || (__s64)(bpf_ktime_get_coarse_ns() - known->seen_ns) >
                      (__s64)FRAGMENT_TIMEOUT_S * NS_PER_S)
        return pass(PACKET_fragment_passed);
    put_ip(&to, known->ip);
    if (!answer && same_ip(&to, &packet->source))
        return send_back(skb, packet);
    difference = address_difference(from, &to);
    put_ip(from, to.ip);
    if (write_ends(skb, packet, difference))
        return drop(PACKET_change_failed);
    return pass(PACKET_fragment_translated);
}

/* ---- Flows ---- */

static __always_inline __u32 seen_by(const struct packet *packet, __u32 fin)
{
    __u32 seen = fin == SEEN_ENDPOINT_FIN ? SEEN_ANSWER : 0;

    if (packet->tcp_flags & TCP_FIN)
        seen |= fin;
    if (packet->tcp_flags & TCP_RST)
        seen |= SEEN_RESET;
    return seen;
}

static __always_inline void see(struct tracked *tracked, const struct packet *packet, __u32 fin,
                                __u64 now_ns)
{
    __u32 seen = seen_by(packet, fin);

    if ((tracked->seen & seen) != seen)
        __sync_fetch_and_or(&tracked->seen, seen);
    tracked->seen_ns = now_ns;
    tracked->noted = bpf_jiffies64();
}

/* Whether it is now that a connect ends, well or not: of one flow, once. */
static __always_inline bool ends_connect(struct tracked *tracked)
{
    return (tracked->seen & SEEN_CONNECTING) &&
           (__sync_fetch_and_and(&tracked->seen, ~SEEN_CONNECTING) & SEEN_CONNECTING);
}

static __noinline void connect_failed(struct tracked *tracked,
                                      const struct socket_address *endpoint)
{
    if (!ends_connect(tracked))
        return;
    count_packet(PACKET_connect_failed);
    endpoint_failed(endpoint);
}

/* The list that leads the client, one for clients from outside before that for all; false: it asks
 * for no service. Not static, and neither is the next: so the verifier looks at them once, not at
 * each attempt. */
__noinline __u32 read_list(struct tracked_flow *flow, __u64 *list)
{
    __u64 *value;

    if (!flow || !list)
        return false;
    flow->address.outside = 0;
    value = bpf_map_lookup_elem(&hf_frontends, &flow->address);
    if (!value)
        return false;
    *list = *(volatile __u64 *)value;
    flow->address.outside = 1;
    value = bpf_map_lookup_elem(&hf_frontends, &flow->address);
    if (value)
        *list = *(volatile __u64 *)value;
    else
        flow->address.outside = 0;
    return true;
}

/* The endpoint of one attempt, read as in services.c; `before`: replaced(), before the list was read.
 * `attempt`: its number, above 32 bits of chance. False: the list was replaced meanwhile. */
__noinline __u32 choose_near(const struct tracked_flow *flow, __u64 list, __u64 before,
                             __u64 attempt, struct socket_address *endpoint)
{
    struct socket_address *found;
    const __u32 *client;
    __u64 slot;
    __u32 hash;

    if (!flow || !endpoint)
        return false;
    client = flow->client.ip;
    hash = hash_client(((__u64)client[0] << 32 | client[1]) * 31 +
                       ((__u64)client[2] << 32 | client[3]));
    slot = pick_slot(list, attempt, hash, attempt >> 32);
    found = bpf_map_lookup_elem(&hf_endpoints, &slot);
    if (!found)
        return false;
    *endpoint = *found;
    return read_replaced() == before || is_true(&flow->address, list, before);
}

static __always_inline struct tracked_flow source_of(const struct tracked_flow *flow)
{
    struct tracked_flow source = {.address = flow->address};

    source.address.outside = 0;
    __builtin_memcpy(source.client.ip, flow->client.ip, sizeof(source.client.ip));
    return source;
}

/* The endpoint that the client has at this port of the service, or else at another; false: none.
 * Reads as choose_near(), and again where the list was replaced meanwhile. */
static __noinline bool recall_source(const struct tracked_flow *flow, struct choice *choice)
{
    for (int attempt = 0; attempt < (int)READ_ATTEMPTS; attempt++) {
        struct tracked_flow source = source_of(flow);
        __u64 list, before = replaced();
        volatile __u64 *value = bpf_map_lookup_elem(&hf_frontends, &flow->address);
        __u64 *timeout_ns = bpf_map_lookup_elem(&hf_timeouts, &flow->address);
        struct socket_address *endpoint;

        if (!value || !timeout_ns)
            return false;
        list = *value;
        if (!(list & LIST_AFFINITY))
            return false;
        if (!find_kept(bpf_map_lookup_elem(&hf_sources, &source), *timeout_ns, list,
                       &choice->slot)) {
            source.address.port = 0;
            source.address.protocol = 0;
            if (!find_kept(bpf_map_lookup_elem(&hf_sources, &source), *timeout_ns, list,
                           &choice->slot))
                return false;
        }
        endpoint = bpf_map_lookup_elem(&hf_endpoints, &choice->slot);
        if (!endpoint)
            continue;
        choice->endpoint = *endpoint;
        if (is_true(&flow->address, list, before))
            return true;
    }
    return false;
}

static __noinline void keep_source(const struct tracked_flow *flow, const struct choice *choice)
{
    struct affinity affinity = {.choice = *choice, .used_ns = bpf_ktime_get_boot_ns()};
    struct tracked_flow source = source_of(flow);
    long failed = bpf_map_update_elem(&hf_sources, &source, &affinity, BPF_ANY);

    source.address.port = 0;
    source.address.protocol = 0;
    affinity.choice.slot = NO_SLOT; /* Lists are of one port each. */
    affinity.choice.endpoint.port = 0;
    if (bpf_map_update_elem(&hf_sources, &source, &affinity, BPF_ANY) || failed)
        count_packet(PACKET_not_remembered);
}

/* Whether the client may use the service: it is in one of the list's prefixes, or the list has
 * none. Reads as choose_near(): with a list that is gone go its prefixes. */
__noinline __u32 is_in_range(const struct tracked_flow *flow)
{
    struct source_range key = {.prefix_len = 8 * (sizeof(key.list) + sizeof(key.ip))};

    if (!flow)
        return false;
    __builtin_memcpy(key.ip, flow->client.ip, sizeof(key.ip));
    for (int attempt = 0; attempt < (int)READ_ATTEMPTS; attempt++) {
        volatile __u64 *value = bpf_map_lookup_elem(&hf_frontends, &flow->address);
        __u64 list;

        if (!value)
            return true;
        list = *value;
        if (!(list & LIST_RANGES))
            return true;
        list &= ~(__u64)LIST_LENGTH_MASK;
        __builtin_memcpy(key.list, &list, sizeof(key.list));
        if (bpf_map_lookup_elem(&hf_ranges, &key))
            return true;
        value = bpf_map_lookup_elem(&hf_frontends, &flow->address);
        if (value && same_list(*value, list))
            return false;
    }
    return false;
}

/* Whether a service without endpoints for clients from outside has some for others. */
static __always_inline bool has_others(const struct tracked_flow *flow)
{
    __u64 *list = bpf_map_lookup_elem(&hf_frontends, &flow->address);

    return list && (*list & LIST_LENGTH_MASK);
}

/* Gives a new flow its endpoint. `opens`: it begins with its first packet. */
static __always_inline __u32 open_flow(struct tracked_flow *flow, struct tracked *opened,
                                       bool opens)
{
    __u32 refused = PACKET_refused_silently;
    __u32 random = bpf_get_prandom_u32();
    struct choice choice = {.slot = NO_SLOT};
    __u32 kept = TAKEN;
    __u64 list = 0, before;

    opened->client = flow->client;
    opened->service = flow->address;
    for (__u32 attempt = 0; attempt < ENDPOINT_ATTEMPTS && kept == TAKEN; attempt++) {
        before = replaced();
        if (!read_list(flow, &list)) /* Meanwhile it asks as one from outside, if that matters. */
            return PACKET_request_passed;
        if ((list & LIST_RANGES) && !is_in_range(flow))
            return PACKET_not_in_range;
        if (!(list & LIST_LENGTH_MASK)) {
            if (!flow->address.outside)
                return PACKET_refused_silently;
            flow->address.outside = 0;
            return has_others(flow) ? PACKET_not_local : PACKET_refused_silently;
        }
        if (!attempt && (list & LIST_AFFINITY) && recall_source(flow, &choice)) {
            opened->endpoint = choice.endpoint;
        } else {
            choice.slot = NO_SLOT;
            if (!choose_near(flow, list, before, (__u64)attempt << 32 | random,
                             &opened->endpoint))
                continue;
        }
        flow->address.outside = 0;
        kept = keep_flow(opened, opens);
        if (kept == TAKEN)
            refused = PACKET_clash;
    }
    if (kept == TAKEN)
        return refused;
    if (kept == NOT_KEPT)
        return PACKET_flow_lost;
    if (choice.slot != NO_SLOT)
        count_packet(PACKET_affinity_kept);
    if (list & LIST_AFFINITY) {
        choice.endpoint = opened->endpoint;
        keep_source(flow, &choice);
    }
    return PACKET_flow_opened;
}

/* ---- No endpoint: an answer at once, back out by the interface ---- */

/* Of the answer to `packet`. In the sum, the ::ffff before an IPv4 address is a zero. */
static __always_inline __u32 pseudo_sum(const struct packet *packet, __u32 length, __u32 protocol)
{
    struct {
        __u32 addresses[8];
        __u32 length;
        __u32 protocol;
    } header = {.length = bpf_htonl(length), .protocol = bpf_htonl(protocol)};

    __builtin_memcpy(header.addresses, packet->source.ip, 16);
    __builtin_memcpy(header.addresses + 4, packet->destination.ip, 16);
    return bpf_csum_diff(NULL, 0, (__be32 *)&header, sizeof(header), 0);
}

/* Whether the checksum at `at` has yet to be completed by the network card: then it holds the sum
 * of the pseudo header, and the helper leaves it alone. The checksum is changed by the question. */
static __always_inline bool is_partial(struct __sk_buff *skb, __u32 at)
{
    const __u16 before = bpf_htons(0x1234);
    __u16 after = 0;

    bpf_skb_store_bytes(skb, at, &before, sizeof(before), 0);
    bpf_l4_csum_replace(skb, at, 0, 1, sizeof(__u16));
    bpf_skb_load_bytes(skb, at, &after, sizeof(after));
    return before == after;
}

static __always_inline void answer_v4(const struct packet *packet, struct iphdr *ip,
                                      __u32 length, __u8 protocol)
{
    ip->version = 4;
    ip->ihl = 5;
    ip->tot_len = bpf_htons(length);
    ip->frag_off = bpf_htons(0x4000); /* Not to be fragmented; so it needs no number. */
    ip->ttl = TTL;
    ip->protocol = protocol;
    ip->saddr = packet->destination.ip[3];
    ip->daddr = packet->source.ip[3];
    ip->check = ~fold(bpf_csum_diff(NULL, 0, (__be32 *)ip, sizeof(*ip), 0));
}

static __always_inline void answer_v6(const struct packet *packet, struct ipv6hdr *ip,
                                      __u32 payload, __u8 protocol)
{
    ip->version = 6;
    ip->payload_len = bpf_htons(payload);
    ip->nexthdr = protocol;
    ip->hop_limit = TTL;
    __builtin_memcpy(&ip->saddr, packet->destination.ip, sizeof(ip->saddr));
    __builtin_memcpy(&ip->daddr, packet->source.ip, sizeof(ip->daddr));
}

/* The IP header becomes the answer's in place. Only where there are no options or extensions. */
static __always_inline long store_ip(struct __sk_buff *skb, const struct packet *packet,
                                     __u32 payload, __u8 protocol, __u8 protocol_v6)
{
    if (packet->v6) {
        struct ipv6hdr ip = {};

        answer_v6(packet, &ip, payload, protocol_v6);
        return bpf_skb_store_bytes(skb, packet->l3, &ip, sizeof(ip), 0);
    }
    struct iphdr ip = {};

    answer_v4(packet, &ip, sizeof(ip) + payload, protocol);
    return bpf_skb_store_bytes(skb, packet->l3, &ip, sizeof(ip), 0);
}

/* RFC 9293, 3.10.7.1: a segment to a closed port. */
static __noinline __u32 refuse_tcp(struct __sk_buff *skb, const struct packet *packet)
{
    struct tcphdr asked;
    struct tcphdr reset = {.doff = sizeof(reset) / 4, .rst = 1};
    __u32 behind = packet->l3 + packet->size;
    __u32 payload, sum;
    bool partial;

    if (bpf_skb_load_bytes(skb, packet->l4, &asked, sizeof(asked)))
        return PACKET_truncated;
    payload = packet->l4 + asked.doff * 4u;
    if (asked.rst || payload > behind)
        return PACKET_refused_silently;
    payload = behind - payload + asked.syn + asked.fin;
    reset.source = asked.dest;
    reset.dest = asked.source;
    if (asked.ack) {
        reset.seq = asked.ack_seq;
    } else {
        reset.ack = 1;
        reset.ack_seq = bpf_htonl(bpf_ntohl(asked.seq) + payload);
    }
    partial = is_partial(skb, packet->l4 + offsetof(struct tcphdr, check));
    sum = pseudo_sum(packet, sizeof(reset), PROTOCOL_TCP);
    if (partial)
        reset.check = fold(sum);
    else
        reset.check = ~fold(bpf_csum_diff(NULL, 0, (__be32 *)&reset, sizeof(reset), sum));
    if (bpf_skb_change_tail(skb, packet->l4 + sizeof(reset), 0) || swap_ethernet(skb, packet) ||
        store_ip(skb, packet, sizeof(reset), PROTOCOL_TCP, PROTOCOL_TCP) ||
        bpf_skb_store_bytes(skb, packet->l4, &reset, sizeof(reset), 0))
        return PACKET_change_failed;
    return PACKET_refused_tcp;
}

/*
 * RFC 792 and RFC 4443: port unreachable, with the IP header and 8 bytes behind it.
 *
 * The sum of an IPv4 header is zero. Where the UDP checksum has yet to be completed, it will be
 * over the 8 bytes left, so that their sum is the opposite of their pseudo header's.
 */
static __noinline __u32 refuse_udp(struct __sk_buff *skb, const struct packet *packet)
{
    __u32 quoted = packet->v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
    __u32 grown = quoted + sizeof(struct icmp);
    __u32 check_at = packet->l4 + offsetof(struct udphdr, check);
    struct icmp icmp = {.type = packet->v6 ? 1 : 3, .code = packet->v6 ? 4 : 3};
    struct udphdr udp;
    __u32 sum;
    bool partial;

    if (bpf_skb_load_bytes(skb, packet->l4, &udp, sizeof(udp)))
        return PACKET_truncated;
    partial = is_partial(skb, check_at);
    if (bpf_skb_store_bytes(skb, check_at, &udp.check, sizeof(udp.check), 0))
        return PACKET_change_failed;
    sum = partial ? (__u16)~udp.check : bpf_csum_diff(NULL, 0, (__be32 *)&udp, sizeof(udp), 0);
    if (packet->v6) {
        struct ipv6hdr ip;

        if (bpf_skb_load_bytes(skb, packet->l3, &ip, sizeof(ip)))
            return PACKET_truncated;
        sum = bpf_csum_diff(NULL, 0, (__be32 *)&ip, sizeof(ip), sum);
        sum = fold(sum) + fold(pseudo_sum(packet, grown + sizeof(udp), ICMPV6));
    }
    sum = bpf_csum_diff(NULL, 0, (__be32 *)&icmp, sizeof(icmp), sum);
    icmp.check = ~fold(sum);

    if (bpf_skb_change_tail(skb, packet->l4 + sizeof(udp), 0) ||
        bpf_skb_adjust_room(skb, grown, BPF_ADJ_ROOM_MAC, 0) || swap_ethernet(skb, packet) ||
        store_ip(skb, packet, grown + sizeof(udp), ICMP, ICMPV6) ||
        bpf_skb_store_bytes(skb, packet->l3 + quoted, &icmp, sizeof(icmp), 0))
        return PACKET_change_failed;
    return PACKET_refused_udp;
}

static __always_inline int refuse_packet(struct __sk_buff *skb, const struct packet *packet)
{
    __u32 plain = packet->l3 + (packet->v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr));
    __u32 counter = PACKET_refused_silently;

    /* With a tag in the packet itself, the kernel makes no room. */
    if (packet->l4 == plain && packet->l3 <= ETH_HLEN && !packet->fragment)
        counter = packet->protocol == PROTOCOL_TCP ? refuse_tcp(skb, packet)
                                                   : refuse_udp(skb, packet);
    if (counter != PACKET_refused_tcp && counter != PACKET_refused_udp)
        return drop(counter);
    count_packet(counter);
    return bpf_redirect(skb->ifindex, 0);
}

/* ---- From the client, to the client ---- */

/* Whether nothing is to be noted of a packet of a flow: one passed a moment ago, and it does not end it. Two CPUs that
 * wrote the time with each would wait for each other, and to ask for it takes a call. */
static __always_inline bool is_noted(const struct tracked *flow, const struct packet *packet)
{
    return (__u32)bpf_jiffies64() - flow->noted < NOTED_JIFFIES &&
           !(packet && packet->tcp_flags & (TCP_FIN | TCP_RST));
}

/* Whether an endpoint's flow, that was found, goes on; notes the packet, if there is one. Not static: so the
 * verifier looks at it once. */
__noinline __u32 goes_on(__u64 found, const struct packet *packet, __u64 now_ns)
{
    struct tracked *flow = flow_at(found);
    bool connected;

    if (!flow || is_over(flow, now_ns))
        return false;
    if (!packet)
        return true;
    connected = (packet->tcp_flags & TCP_SYN) && !(flow->seen & SEEN_ANSWER);
    see(flow, packet, SEEN_ENDPOINT_FIN, now_ns);
    if (packet->tcp_flags & TCP_RST) {
        connect_failed(flow, &packet->source);
    } else if (connected) { /* Late, maybe. */
        ends_connect(flow);
        endpoint_connected(&packet->source);
    }
    return true;
}

/* The service of an endpoint's flow, which goes on. Once in a while it is looked at closely. */
static __always_inline bool read_service(__u64 found, const struct packet *packet,
                                         struct socket_address *service)
{
    struct tracked *flow = flow_at(found);

    if (!flow || (!(is_noted(flow, packet) && (flow->seen & SEEN_ANSWER)) &&
                  !goes_on(found, packet, bpf_ktime_get_coarse_ns())))
        return false;
    *service = flow->service;
    return is_still(flow, found);
}

/* The service by whose address a client that is its own endpoint answers itself. */
static __noinline bool find_hairpin(const struct socket_address *endpoint,
                                    const struct socket_address *asked,
                                    const struct packet *packet, struct socket_address *service)
{
    struct socket_address client = *endpoint;

    client.port = asked->port;
    return read_service(find_flow(&client, endpoint, true), packet, service) &&
           same_ip(service, asked);
}

/* A connect that asks for no service, between a client and an endpoint whose flow by one has ended: what
 * answers it is not that flow's, which else would be remembered for a while. Not static: so the verifier
 * looks at it once. */
__noinline int forget_ended(const struct tracked_flow *direct, __u64 now_ns)
{
    struct tracked *flow;
    __u64 found;

    if (!direct)
        return 0;
    found = find_flow(&direct->client, &direct->address, true);
    flow = flow_at(found);
    if (flow && (is_closed(flow) || is_over(flow, now_ns)))
        forget_flow(found);
    return 0;
}

static __noinline int on_request(struct __sk_buff *skb, struct packet *packet)
{
    struct tracked_flow *asked = asked_flow(packet);
    bool opens = (packet->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
    struct tracked opened = {.seen_ns = bpf_ktime_get_coarse_ns(), .noted = bpf_jiffies64()};
    __u64 found = find_flow(&packet->source, &packet->destination, false);
    struct tracked *known = flow_at(found);
    struct socket_address to = {};
    __u32 counter;

    if (known && is_ended(known, found))
        __sync_fetch_and_or(&known->seen, SEEN_ENDED);
    if (known && !is_over(known, opened.seen_ns) && !(opens && is_closed(known))) {
        to = known->endpoint;
        /* Its first SYN alone has been seen until now. */
        if (opens &&
            (__s64)(opened.seen_ns - known->seen_ns) >= CONNECT_PATIENCE_MS * NS_PER_MS)
            connect_failed(known, &to);
        see(known, packet, SEEN_CLIENT_FIN, opened.seen_ns);
        if (!is_still(known, found))
            return drop(PACKET_flow_lost);
    } else if (!opens && find_hairpin(&asked->client, &asked->address, packet, &to)) {
        return on_hairpin(skb, packet, true, to.port);
    } else {
        opened.seen = seen_by(packet, SEEN_CLIENT_FIN) | (opens ? SEEN_CONNECTING : 0);
        counter = open_flow(asked, &opened, opens);
        if (counter == PACKET_request_passed) {
            if (opens)
                forget_ended(asked, opened.seen_ns);
            return pass(counter);
        }
        if (counter == PACKET_flow_lost || counter == PACKET_not_in_range ||
            counter == PACKET_not_local)
            return drop(counter);
        if (counter != PACKET_flow_opened) {
            if (counter != PACKET_refused_silently)
                count_packet(counter);
            return refuse_packet(skb, packet);
        }
        count_packet(counter);
        to = opened.endpoint;
    }
    if (same_ip(&to, &packet->source))
        return on_hairpin(skb, packet, false, to.port);
    if (change(skb, packet, false, &to))
        return drop(PACKET_change_failed);
    return pass(PACKET_request_translated);
}

/* No function of its own: most packets come here, and a call less counts. */
static __always_inline int on_answer(struct __sk_buff *skb, struct packet *packet)
{
    struct socket_address service;

    if (!read_service(find_flow(&packet->destination, &packet->source, true), packet, &service))
        return pass(PACKET_answer_passed);
    if (packet->plain ? change_plain(skb, packet, true, &service)
                      : change(skb, packet, true, &service))
        return drop(PACKET_change_failed);
    return pass(PACKET_answer_translated);
}
