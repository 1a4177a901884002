// SPDX-License-Identifier: Apache-2.0
/*
 * Packets from pod to pod on this node, and between pods and the tunnel, past the host's stack:
 * the last program where they come in. What goes into a pod appears at once at the pod's end of
 * its veth, and what goes into the tunnel at the tunnel's own interface. Of devices' packets those alone
 * that ask a pod for a service, and the answers: packets.c remembers their flows, so that nobody misses
 * the host's connection tracking.
 *
 * Invariant: what the stack would do more than to decrement the hop limit and hand on is left to
 * it. The routes are a copy of the kernel's, of all that it has, so that a prefix of ours never
 * hides a longer one of somebody else. Whether an interface is still there, the kernel says.
 *
 * Egress hooks of the pod's interface are not passed. What has to look at packets into a pod does
 * so in before_pod(), too; policy.c did where they came in.
 */

#define TCP_DATA_OFFSET 12 /* The byte with it. */

/* The node's routes to single addresses, most of them pods': one look-up, where a tree takes several. */
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, __u32[4]);
    __type(value, struct route);
    __uint(max_entries, ROUTES_MAX);
} hf_hosts SEC(".maps");

/* All other routes: prefix to where its packets go. */
struct {
    __uint(type, BPF_MAP_TYPE_LPM_TRIE);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct route_prefix);
    __type(value, struct route);
    __uint(max_entries, ROUTES_MAX);
} hf_routes SEC(".maps");

/* Interfaces to which packets go. The kernel itself takes an interface out of maps of this kind before
 * its index can come to another one. */
struct {
    __uint(type, BPF_MAP_TYPE_DEVMAP);
    __type(key, __u32);
    __type(value, struct bpf_devmap_val);
    __uint(max_entries, REDIRECTS_MAX);
} hf_redirects SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __type(key, __u32);
    __type(value, __u64);
    __uint(max_entries, REDIRECT_COUNTERS_MAX);
} hf_redir_counters SEC(".maps");

#define FOUND REDIRECT_COUNTERS_MAX /* Else the counter for why there is no way. */

static __always_inline void count_redirect(__u32 counter)
{
    add_one(&hf_redir_counters, counter);
}

/* As far as the stack would look at it. */
struct header {
    struct route_prefix source;
    struct route_prefix destination;
    __u32 length;
    __u8 protocol;
};

static __always_inline void put_prefix(struct route_prefix *prefix, const __u32 *ip)
{
    prefix->prefix_len = 8 * sizeof(prefix->ip);
    __builtin_memcpy(prefix->ip, ip, sizeof(prefix->ip));
}

static __always_inline __u32 read_v4(struct __sk_buff *skb, __u32 l3, struct header *header)
{
    struct socket_address address = {};
    struct iphdr ip;

    if (LOAD(skb, l3, &ip) || ip.version != 4 || ip.ihl != 5)
        return REDIRECT_other;
    if (ip.ttl <= 1)
        return REDIRECT_hop_limit;
    put_v4(&address, ip.saddr);
    put_prefix(&header->source, address.ip);
    put_v4(&address, ip.daddr);
    put_prefix(&header->destination, address.ip);
    header->length = sizeof(ip);
    header->protocol = ip.protocol;
    return FOUND;
}

/* Multicast and link-local addresses never leave their link. */
static __always_inline bool stays_on_link(const struct in6_addr *ip)
{
    __u32 first = bpf_ntohl(ip->in6_u.u6_addr32[0]);

    return first >> 24 == 0xff || (first & 0xffc00000) == 0xfe800000;
}

static __always_inline __u32 read_v6(struct __sk_buff *skb, __u32 l3, struct header *header)
{
    struct ipv6hdr ip;

    if (LOAD(skb, l3, &ip) || ip.version != 6 ||
        ip.nexthdr == HOP_BY_HOP || stays_on_link(&ip.saddr) || stays_on_link(&ip.daddr))
        return REDIRECT_other;
    if (ip.hop_limit <= 1)
        return REDIRECT_hop_limit;
    put_prefix(&header->source, ip.saddr.in6_u.u6_addr32);
    put_prefix(&header->destination, ip.daddr.in6_u.u6_addr32);
    header->length = sizeof(ip);
    header->protocol = ip.nexthdr;
    return FOUND;
}

/* The longest packet that this is on the wire, from the IP header on. */
static __always_inline __u32 wire_len(struct __sk_buff *skb, __u32 l3, const struct header *header)
{
    __u8 words;

    if (!skb->gso_size)
        return skb->len - l3;
    if (header->protocol == PROTOCOL_UDP)
        return header->length + sizeof(struct udphdr) + skb->gso_size;
    if (header->protocol != PROTOCOL_TCP ||
        bpf_skb_load_bytes(skb, l3 + header->length + TCP_DATA_OFFSET, &words, sizeof(words)))
        return ~0u; /* Nobody here knows. */
    return header->length + (words >> 4) * 4u + skb->gso_size;
}

static __always_inline struct route *find_route(const struct route_prefix *to)
{
    struct route *host = bpf_map_lookup_elem(&hf_hosts, to->ip);

    return host ?: bpf_map_lookup_elem(&hf_routes, to);
}

/* Whether packets are handed on between the two. */
static __always_inline bool is_between(const struct route *from, const struct route *to)
{
    return from->has_devices ? to->is_pod : !to->has_devices || from->is_pod;
}

/* What the host's stack would do with the packet, as far as it is only to hand it on. `devices`: whether it comes
 * from some. */
static __noinline __u32 find_way(struct __sk_buff *skb, __u32 l3, struct route *way, bool *devices)
{
    struct bpf_devmap_val *there;
    __u32 read = REDIRECT_other;
    struct header header;
    struct route *route;
    __u32 slot;

    if (skb->protocol == bpf_htons(ETH_P_IP))
        read = read_v4(skb, l3, &header);
    else if (skb->protocol == bpf_htons(ETH_P_IPV6))
        read = read_v6(skb, l3, &header);
    if (read != FOUND)
        return read;
    route = find_route(&header.destination);
    if (!route || !route->interface || route->interface == skb->ifindex)
        return REDIRECT_elsewhere;
    *way = *route;
    /* RFC 3704, 2.2: strict reverse path forwarding. */
    route = find_route(&header.source);
    if (!route || route->interface != skb->ifindex)
        return REDIRECT_source;
    *devices = route->has_devices;
    if (!is_between(route, way))
        return REDIRECT_elsewhere;
    if (wire_len(skb, l3, &header) > way->mtu)
        return REDIRECT_too_big;
    slot = way->slot;
    there = bpf_map_lookup_elem(&hf_redirects, &slot);
    if (!there || there->ifindex != way->interface)
        return REDIRECT_gone;
    return FOUND;
}

/* Whether a device speaks with an endpoint of ours because it asked for a service: then it never was a flow of
 * the stack's. What is not plain, as fragments and ICMP, is the stack's. Not static: so the verifier looks at it once,
 * by itself. */
__noinline __u32 is_service(struct __sk_buff *skb, __u32 answers)
{
    struct socket_address service;
    struct packet packet = {};
    __u64 found;

    if (!read_plain(skb, true, &packet))
        return false;
    found = answers ? find_flow(&packet.destination, &packet.source, true)
                    : find_flow(&packet.source, &packet.destination, true);
    return read_service(found, NULL, &service);
}

/* All that looks at packets into a pod. Other than TC_ACT_UNSPEC, what becomes of the packet. */
static __always_inline int before_pod(struct __sk_buff *skb, const struct route *way)
{
    return way->is_served ? on_packet(skb, true, ANSWERS) : TC_ACT_UNSPEC;
}

/* One hop less of a header that is at hand; in IPv4 nothing but its own checksum covers it: RFC 1624. */
static __always_inline void hop_v4(struct iphdr *ip)
{
    __u32 check = ip->check + bpf_htons(0x0100);

    ip->ttl--;
    ip->check = check + (check >= 0xffff);
}

static __always_inline long hop_v6(struct __sk_buff *skb, __u32 l3)
{
    struct {
        __u8 next;
        __u8 limit;
    } hop;
    __u32 at = l3 + offsetof(struct ipv6hdr, nexthdr);

    if (LOAD(skb, at, &hop))
        return -1;
    hop.limit--;
    return bpf_skb_store_bytes(skb, at, &hop, sizeof(hop), BPF_F_RECOMPUTE_CSUM);
}

static __always_inline void put_macs(struct ethhdr *header, const struct route *way)
{
    __builtin_memcpy(header->h_dest, way->pod_mac, ETH_ALEN);
    __builtin_memcpy(header->h_source, way->mac, ETH_ALEN);
}

/* One hop less, and the addresses of the link it goes to. Written in place: a helper for each costs
 * as much as all else here. */
static __always_inline long forward(struct __sk_buff *skb, bool ethernet, const struct route *way)
{
    const __u32 l3 = ethernet ? ETH_HLEN : 0;
    struct ethhdr header = {.h_proto = skb->protocol};
    void *data;

    if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
        if (hop_v6(skb, l3))
            return -1;
    } else {
        data = (void *)(long)skb->data;
        if (data + l3 + sizeof(struct iphdr) > (void *)(long)skb->data_end) {
            if (bpf_skb_pull_data(skb, l3 + sizeof(struct iphdr)))
                return -1;
            data = (void *)(long)skb->data;
            if (data + l3 + sizeof(struct iphdr) > (void *)(long)skb->data_end)
                return -1;
        }
        hop_v4(data + l3);
    }
    if (!way->is_pod)
        return 0;
    data = (void *)(long)skb->data;
    if (ethernet && data + sizeof(header) <= (void *)(long)skb->data_end) {
        put_macs(data, way);
        return 0;
    }
    /* Packets of the tunnel have no such header yet. */
    put_macs(&header, way);
    if (!ethernet && bpf_skb_change_head(skb, sizeof(header), 0))
        return -1;
    return bpf_skb_store_bytes(skb, 0, &header, sizeof(header), 0);
}

static __always_inline int redirect(struct __sk_buff *skb, bool ethernet)
{
    __u32 l3 = ethernet ? ETH_HLEN : 0;
    struct route way = {};
    bool devices = false;
    int verdict;
    __u32 found;

    if (skb->mark || skb->vlan_present || (ethernet && skb->pkt_type != PACKET_HOST)) {
        count_redirect(REDIRECT_other);
        return TC_ACT_UNSPEC;
    }
    found = find_way(skb, l3, &way, &devices);
    if (ethernet && found == FOUND && (devices || way.has_devices) &&
        !is_service(skb, way.has_devices))
        found = REDIRECT_elsewhere;
    if (found != FOUND) {
        count_redirect(found);
        return TC_ACT_UNSPEC;
    }
    if (way.is_pod && way.is_served && !ethernet) {
        /* It may have been for the node until masquerade.c gave it to the pod: policy has yet to judge
         * it as the pod's. */
        count_redirect(REDIRECT_other);
        return TC_ACT_UNSPEC;
    }
    if (way.is_pod) {
        verdict = before_pod(skb, &way);
        if (verdict != TC_ACT_UNSPEC)
            return verdict; /* And counted. */
    }
    if (forward(skb, ethernet, &way)) {
        count_redirect(REDIRECT_change_failed);
        return TC_ACT_SHOT;
    }
    if (way.has_devices) {
        /* Programs at the interface show the service. Who is next on the way, the kernel looks up. */
        count_redirect(REDIRECT_to_device);
        return bpf_redirect_neigh(way.interface, NULL, 0, 0);
    }
    count_redirect(way.is_pod ? REDIRECT_to_pod : REDIRECT_to_tunnel);
    /* The kernel itself takes away the header that the tunnel's packets do not have. */
    return way.is_pod ? bpf_redirect_peer(way.interface, 0) : bpf_redirect(way.interface, 0);
}

SEC("classifier")
int hf_redirect(struct __sk_buff *skb)
{
    return redirect(skb, true);
}

SEC("classifier")
int hf_redirect_ip(struct __sk_buff *skb)
{
    return redirect(skb, false);
}
