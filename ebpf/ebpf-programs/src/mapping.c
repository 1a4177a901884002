// SPDX-License-Identifier: Apache-2.0
/*
 * LAN subnets behind this node that the mesh sees under another range, address by address, because
 * other sites use the same one: at the tunnel's interface, out by it sources become what the mesh
 * knows them as, in by it destinations become the LAN's. An object of its own: nodes without such
 * subnets do not load it.
 *
 * Nothing is remembered: any gateway of the subnet may take any packet, and fragments need no first
 * one. What an ICMP error quotes is a packet of the other direction, and changes as such.
 *
 * Invariant: what is in none of the ranges passes untouched. What is, and cannot be changed with all
 * that covers it, is dropped. Every packet is counted, by what became of it.
 */
#include "change.h"

/* By the LAN's address. */
struct {
    __uint(type, BPF_MAP_TYPE_LPM_TRIE);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct kept_prefix);
    __type(value, struct mapped_to);
    __uint(max_entries, MAPPINGS_MAX);
} hf_map_out SEC(".maps");

/* By the mesh's. */
struct {
    __uint(type, BPF_MAP_TYPE_LPM_TRIE);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct kept_prefix);
    __type(value, struct mapped_to);
    __uint(max_entries, MAPPINGS_MAX);
} hf_map_in SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __type(key, __u32);
    __type(value, __u64);
    __uint(max_entries, MAPPING_COUNTERS_MAX);
} hf_map_counters SEC(".maps");

static __always_inline int pass(__u32 counter)
{
    add_one(&hf_map_counters, counter);
    return TC_ACT_UNSPEC;
}

static __always_inline int drop(__u32 counter)
{
    add_one(&hf_map_counters, counter);
    return TC_ACT_SHOT;
}

/* What an address becomes; the port stays. */
static __always_inline bool is_mapped(bool leaving, const struct socket_address *from,
                                      struct socket_address *to)
{
    struct kept_prefix key = {.prefix_len = 8 * sizeof(key.ip)};
    struct mapped_to *found;

    __builtin_memcpy(key.ip, from->ip, sizeof(key.ip));
    found = leaving ? bpf_map_lookup_elem(&hf_map_out, &key)
                    : bpf_map_lookup_elem(&hf_map_in, &key);
    if (!found)
        return false;
    *to = *from;
    for (int i = 0; i < 4; i++)
        to->ip[i] = found->ip[i] | (from->ip[i] & found->host[i]);
    return true;
}

/* In an ICMP error about a packet the other way, the end of that packet that is in the LAN. */
static __noinline long map_quote(struct __sk_buff *skb, const struct packet *packet, bool leaving)
{
    struct packet quoted = {.v6 = packet->v6};
    struct socket_address to;
    __u8 type;

    if (packet->protocol != (packet->v6 ? ICMPV6 : ICMP) || packet->fragment ||
        LOAD(skb, packet->l4, &type) || !is_error(packet, type))
        return 0;
    /* Cut off or not, what is there changes: the checksums in it as far as they are found. */
    parse(skb, &quoted, packet->l4 + sizeof(struct icmp));
    if (!is_mapped(leaving, leaving ? &quoted.destination : &quoted.source, &to))
        return 0;
    add_one(&hf_map_counters, MAPPING_quote_mapped);
    return change_quoted_end(skb, packet, &quoted, !leaving, &to);
}

static __always_inline int on_packet(struct __sk_buff *skb, bool leaving)
{
    struct packet packet = {.v6 = skb->protocol == bpf_htons(ETH_P_IPV6)};
    struct socket_address *from = leaving ? &packet.source : &packet.destination;
    struct socket_address to;
    __u32 parsed, difference, covers;

    if (!packet.v6 && skb->protocol != bpf_htons(ETH_P_IP))
        return pass(MAPPING_passed);
    parsed = parse(skb, &packet, 0);
    if (parsed == PARSED && map_quote(skb, &packet, leaving))
        return drop(MAPPING_change_failed);
    if (!is_mapped(leaving, from, &to))
        return pass(MAPPING_passed);
    if (parsed == PACKET_truncated || parsed == PACKET_extensions)
        return drop(MAPPING_unreadable);
    difference = address_difference(from, &to);
    covers = check_offset(&packet);
    if (covers && cover_address(skb, &packet, difference, packet.l4 + covers, CHECK_FLAGS(&packet)))
        return drop(MAPPING_change_failed);
    put_ip(from, to.ip);
    if (write_ends(skb, &packet, difference))
        return drop(MAPPING_change_failed);
    return pass(MAPPING_mapped);
}

SEC("classifier")
int hf_mapped_out(struct __sk_buff *skb)
{
    return on_packet(skb, true);
}

SEC("classifier")
int hf_mapped_in(struct __sk_buff *skb)
{
    return on_packet(skb, false);
}
