// SPDX-License-Identifier: Apache-2.0
/*
 * Flows of packets.c into the tunnel, of clients to which the mesh knows no way back: out by the
 * tunnel's interface the client becomes this node, with a port that no other such flow to the
 * endpoint and no socket of the node has; in by it, the node becomes the client again.
 *
 * Invariant: the kernel sees client and endpoint, here as at the client's interface; and what is no
 * flow of a service passes untouched.
 */

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __type(key, __u32);
    __type(value, struct masquerade);
    __uint(max_entries, 1);
} hf_masquerade SEC(".maps");

/* Clients that stay who they are: the mesh leads to them by this node. */
struct {
    __uint(type, BPF_MAP_TYPE_LPM_TRIE);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct kept_prefix);
    __type(value, __u32);
    __uint(max_entries, KEPT_PREFIXES_MAX);
} hf_kept SEC(".maps");

/* A client and its endpoint, to the address and port that the endpoint sees. */
struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __type(key, struct tracked_flow);
    __type(value, struct socket_address);
    __uint(max_entries, MASKED_MAX);
} hf_masked SEC(".maps");

/* That address and the endpoint, to the client. */
struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __type(key, struct tracked_flow);
    __type(value, struct socket_address);
    __uint(max_entries, MASKED_MAX);
} hf_unmasked SEC(".maps");

/* This node as the mesh knows it; false: nothing was said. */
static __always_inline bool own_address(const struct packet *packet, struct socket_address *own)
{
    __u32 zero = 0;
    struct masquerade *as = bpf_map_lookup_elem(&hf_masquerade, &zero);

    if (!as)
        return false;
    __builtin_memcpy(own->ip, packet->v6 ? as->v6 : as->v4, sizeof(own->ip));
    own->protocol = packet->protocol;
    return own->ip[0] | own->ip[2];
}

static __always_inline bool is_kept(const struct socket_address *client)
{
    struct kept_prefix key = {.prefix_len = 8 * sizeof(key.ip)};

    __builtin_memcpy(key.ip, client->ip, sizeof(key.ip));
    return bpf_map_lookup_elem(&hf_kept, &key) != NULL;
}

/* The client that the endpoint sees so, if its flow is not over. */
static __noinline bool unmask(const struct tracked_flow *seen, struct socket_address *client)
{
    struct socket_address *found = bpf_map_lookup_elem(&hf_unmasked, seen);
    struct tracked_flow flow = {.address = seen->address};
    struct socket_address *masked, service = {};

    if (!found)
        return false;
    flow.client = *found;
    masked = bpf_map_lookup_elem(&hf_masked, &flow);
    if (!masked || !same_address(masked, &seen->client) ||
        !read_service(find_flow(&flow.client, &flow.address, true), NULL, &service))
        return false;
    *client = flow.client;
    return true;
}

/* Whether a socket of the node would be given the endpoint's answers. */
static __noinline bool has_socket(struct __sk_buff *skb, const struct tracked_flow *seen, bool v6)
{
    struct bpf_sock_tuple tuple = {};
    struct bpf_sock *socket;
    __u32 size;

    if (v6) {
        __builtin_memcpy(tuple.ipv6.saddr, seen->address.ip, sizeof(tuple.ipv6.saddr));
        __builtin_memcpy(tuple.ipv6.daddr, seen->client.ip, sizeof(tuple.ipv6.daddr));
        tuple.ipv6.sport = seen->address.port;
        tuple.ipv6.dport = seen->client.port;
        size = sizeof(tuple.ipv6);
    } else {
        tuple.ipv4.saddr = seen->address.ip[3];
        tuple.ipv4.daddr = seen->client.ip[3];
        tuple.ipv4.sport = seen->address.port;
        tuple.ipv4.dport = seen->client.port;
        size = sizeof(tuple.ipv4);
    }
    socket = seen->client.protocol == PROTOCOL_TCP
                 ? bpf_skc_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0)
                 : bpf_sk_lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
    if (!socket)
        return false;
    bpf_sk_release(socket);
    return true;
}

struct port_search {
    struct __sk_buff *skb;
    struct tracked_flow seen; /* With the port that was found. */
    __u32 random;
    __u32 v6;
    __u64 found;
};

static long try_port(__u32 attempt, void *context)
{
    struct port_search *search = context;
    struct tracked_flow *seen = &search->seen;
    struct socket_address client;
    __u32 place = (search->random % MASQUERADE_PORTS + attempt) % MASQUERADE_PORTS;

    seen->client.port = bpf_htons(MASQUERADE_PORT_FIRST + place);
    if (unmask(seen, &client) || has_socket(search->skb, seen, search->v6))
        return 0;
    search->found = 1;
    return 1;
}

/* Gives a flow a port; `own` is where it goes. */
static __noinline bool mask(struct __sk_buff *skb, const struct tracked_flow *flow,
                            struct socket_address *own, bool v6)
{
    struct port_search search = {.skb = skb, .random = bpf_get_prandom_u32(), .v6 = v6};

    search.seen.client = *own;
    search.seen.address = flow->address;
    bpf_loop(MASQUERADE_ATTEMPTS, try_port, &search, 0);
    if (!search.found)
        return false;
    *own = search.seen.client;
    return !bpf_map_update_elem(&hf_unmasked, &search.seen, &flow->client, BPF_ANY) &&
           !bpf_map_update_elem(&hf_masked, flow, own, BPF_ANY);
}

static __noinline int on_leaving_error(struct __sk_buff *skb, struct packet *packet)
{
    struct tracked_flow flow = {};
    struct packet quoted = {};
    struct socket_address *masked, to;
    __u32 read = read_quote(skb, packet, &quoted);

    if (read != PARSED)
        return pass(read);
    flow.client = quoted.destination;
    flow.address = quoted.source;
    masked = bpf_map_lookup_elem(&hf_masked, &flow);
    if (!masked)
        return pass(PACKET_error_passed);
    to = *masked;
    /* To a router behind this node, the mesh knows no way back either. */
    return change_error(skb, packet, &quoted, SOURCE_ALWAYS, &to);
}

static __noinline int on_leaving(struct __sk_buff *skb, struct packet *packet)
{
    struct tracked_flow flow = {.client = packet->source, .address = packet->destination};
    struct tracked_flow seen = {.address = packet->destination};
    struct socket_address own = {}, *masked;

    if (!own_address(packet, &own) || same_ip(&own, &packet->source) || is_kept(&packet->source))
        return pass(PACKET_tunnel_passed);
    if (packet->later)
        return on_later_fragment(skb, packet, true);
    if (packet->protocol == ICMP || packet->protocol == ICMPV6)
        return on_leaving_error(skb, packet);
    masked = bpf_map_lookup_elem(&hf_masked, &flow);
    if (masked && same_ip(masked, &own)) {
        own = *masked;
        seen.client = own;
        /* Looking it up keeps it: both entries of a flow are used by its packets both ways. */
        if (!bpf_map_lookup_elem(&hf_unmasked, &seen) &&
            bpf_map_update_elem(&hf_unmasked, &seen, &flow.client, BPF_ANY))
            return drop(PACKET_flow_lost);
    } else {
        if (find_flow(&flow.client, &flow.address, true) == NO_FLOW)
            return pass(PACKET_tunnel_passed);
        if (!mask(skb, &flow, &own, packet->v6))
            return drop(PACKET_masquerade_full);
        count_packet(PACKET_masquerade_opened);
    }
    if (change(skb, packet, true, &own))
        return drop(PACKET_change_failed);
    return pass(PACKET_masqueraded);
}

static __noinline int on_entering_error(struct __sk_buff *skb, struct packet *packet)
{
    struct tracked_flow seen = {};
    struct packet quoted = {};
    struct socket_address client;
    __u32 read = read_quote(skb, packet, &quoted);

    if (read != PARSED)
        return pass(read);
    seen.client = quoted.source;
    seen.address = quoted.destination;
    if (!unmask(&seen, &client))
        return pass(PACKET_error_passed);
    return change_error(skb, packet, &quoted, DESTINATION, &client);
}

static __noinline int on_entering(struct __sk_buff *skb, struct packet *packet)
{
    struct tracked_flow seen = {.client = packet->destination, .address = packet->source};
    struct socket_address own = {}, client;

    if (!own_address(packet, &own) || !same_ip(&own, &packet->destination))
        return pass(PACKET_tunnel_passed);
    if (packet->later)
        return on_later_fragment(skb, packet, false);
    if (packet->protocol == ICMP || packet->protocol == ICMPV6)
        return on_entering_error(skb, packet);
    if (bpf_ntohs(packet->destination.port) < MASQUERADE_PORT_FIRST || !unmask(&seen, &client))
        return pass(PACKET_tunnel_passed);
    if (change(skb, packet, false, &client))
        return drop(PACKET_change_failed);
    return pass(PACKET_unmasqueraded);
}
