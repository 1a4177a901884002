// SPDX-License-Identifier: Apache-2.0
/*
 * Changing the ends of packets, and with them every checksum that covers them: in place, and by
 * difference, so that a checksum that was wrong stays wrong, and one that the network card has yet to
 * complete (CHECKSUM_PARTIAL, GSO) still can be.
 */
#pragma once

#include "parse.h"

/* Where the two families have the same thing. */
#define SOURCE_OFFSET(v6) ((v6) ? offsetof(struct ipv6hdr, saddr) : offsetof(struct iphdr, saddr))
#define DESTINATION_OFFSET(v6) \
    ((v6) ? offsetof(struct ipv6hdr, daddr) : offsetof(struct iphdr, daddr))
#define ADDRESS_OFFSET(v6, source) ((source) ? SOURCE_OFFSET(v6) : DESTINATION_OFFSET(v6))
#define CHECK_OFFSET(protocol) \
    ((protocol) == PROTOCOL_TCP ? offsetof(struct tcphdr, check) : offsetof(struct udphdr, check))

/* linux/bpf.h before 6.16 does not name it, and the kernel then does not know it. */
#define L4_IPV6 (1ull << 7)

struct icmp {
    __u8 type;
    __u8 code;
    __u16 check;
    __u32 unused;
};

#define CHECK_FLAGS(packet) ((packet)->protocol == PROTOCOL_UDP ? BPF_F_MARK_MANGLED_0 : 0)

/* Behind the beginning of the transport's header, its checksum that covers the addresses; 0: it is not
 * in this fragment, or the protocol has none that is known here. */
static __always_inline __u32 check_offset(const struct packet *packet)
{
    if (packet->later)
        return 0;
    if (packet->protocol == PROTOCOL_TCP || packet->protocol == PROTOCOL_UDP)
        return CHECK_OFFSET(packet->protocol);
    return packet->v6 && packet->protocol == ICMPV6 ? offsetof(struct icmp, check) : 0;
}

static __always_inline __u32 fold(__u32 sum)
{
    sum = (sum & 0xffff) + (sum >> 16);
    return (sum & 0xffff) + (sum >> 16);
}

/* RFC 1624. */
static __always_inline __u16 updated_check(__u16 check, __u32 difference)
{
    return ~fold(fold(difference) + (__u16)~check);
}

/* What the other address does to a sum, as bpf_csum_diff() says it. Of IPv4, the ::ffff before the
 * addresses does nothing. */
static __always_inline __u32 address_difference(const struct socket_address *from,
                                                const struct socket_address *to)
{
    __u64 sum = 0;

    for (int i = 0; i < 4; i++)
        sum += (__u64)to->ip[i] + (__u32)~from->ip[i];
    sum = (sum & 0xffffffff) + (sum >> 32);
    return (sum & 0xffffffff) + (sum >> 32);
}

/* The transport checksum at `check`, which covers an address that changed. */
static __always_inline long cover_address(struct __sk_buff *skb, const struct packet *packet,
                                          __u32 difference, __u32 check, __u64 flags)
{
    flags |= BPF_F_PSEUDO_HDR;
    if (packet->v6 && !bpf_l4_csum_replace(skb, check, 0, difference, flags | L4_IPV6))
        return 0;
    return bpf_l4_csum_replace(skb, check, 0, difference, flags);
}

/* Addresses, and ports where it has them, become what `packet` says: in one step where they are next
 * to each other, as each costs about as much. `difference` is what that does to the sum of the
 * addresses, which IPv4's header has to make up for. Not static: so the verifier looks at it once for
 * all that change something. */
__noinline int write_ends(struct __sk_buff *skb, const struct packet *packet, __u32 difference)
{
    bool has_ports, at_once;
    __u16 ports[2];
    __u32 plain;
    struct {
        __u16 check;
        __u16 source[2];
        __u16 destination[2];
        __u16 ports[2];
    } v4;
    struct {
        __u32 source[4];
        __u32 destination[4];
        __u16 ports[2];
    } v6;

    if (!packet)
        return -1;
    plain = packet->l3 + (packet->v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr));
    has_ports = packet->source.protocol;
    at_once = has_ports && packet->l4 == plain;
    ports[0] = packet->source.port;
    ports[1] = packet->destination.port;
    if (has_ports && !at_once && bpf_skb_store_bytes(skb, packet->l4, ports, sizeof(ports), 0))
        return -1;
    if (packet->v6) {
        __builtin_memcpy(v6.source, packet->source.ip, sizeof(v6.source));
        __builtin_memcpy(v6.destination, packet->destination.ip, sizeof(v6.destination));
        __builtin_memcpy(v6.ports, ports, sizeof(v6.ports));
        /* Of later fragments no other change makes up for it. */
        return bpf_skb_store_bytes(skb, packet->l3 + offsetof(struct ipv6hdr, saddr), &v6,
                                   at_once ? sizeof(v6) : offsetof(typeof(v6), ports),
                                   packet->later ? BPF_F_RECOMPUTE_CSUM : 0);
    }
    if (LOAD(skb, packet->l3 + offsetof(struct iphdr, check), &v4.check))
        return -1;
    v4.check = updated_check(v4.check, difference);
    __builtin_memcpy(v4.source, &packet->source.ip[3], sizeof(v4.source));
    __builtin_memcpy(v4.destination, &packet->destination.ip[3], sizeof(v4.destination));
    __builtin_memcpy(v4.ports, ports, sizeof(v4.ports));
    return bpf_skb_store_bytes(skb, packet->l3 + offsetof(struct iphdr, check), &v4,
                               at_once ? sizeof(v4) : offsetof(typeof(v4), ports), 0);
}

/* write_ends() of what read_plain() read, without a call. */
static __always_inline int write_plain(struct __sk_buff *skb, const struct packet *packet,
                                       __u32 difference)
{
    void *at = (void *)(long)skb->data + (packet->l3 & ETH_HLEN), *end = (void *)(long)skb->data_end;
    __u16 *ports;

    if (packet->v6) {
        struct ipv6hdr *ip = at;

        ports = (__u16 *)(ip + 1);
        if ((void *)(ports + 2) > end)
            return -1;
        __builtin_memcpy(&ip->saddr, packet->source.ip, sizeof(ip->saddr));
        __builtin_memcpy(&ip->daddr, packet->destination.ip, sizeof(ip->daddr));
    } else {
        struct iphdr *ip = at;

        ports = (__u16 *)(ip + 1);
        if ((void *)(ports + 2) > end)
            return -1;
        ip->check = updated_check(ip->check, difference);
        ip->saddr = packet->source.ip[3];
        ip->daddr = packet->destination.ip[3];
    }
    ports[0] = packet->source.port;
    ports[1] = packet->destination.port;
    return 0;
}

static __always_inline void put_ip(struct socket_address *address, const __u32 *ip)
{
    __builtin_memcpy(address->ip, ip, sizeof(address->ip));
}

/* ---- ICMP errors, which quote the packet they are about ---- */

static __always_inline bool is_error(const struct packet *packet, __u8 type)
{
    if (packet->v6)
        return type >= 1 && type <= 4; /* RFC 4443: unreachable, too big, time, parameter. */
    return type == 3 || type == 11 || type == 12; /* RFC 792: unreachable, time, parameter. */
}

/* Two bytes of a quoted packet, and what that does to the sum of it all. */
static __always_inline long change_quoted(struct __sk_buff *skb, __u32 at, __u16 from, __u16 to,
                                          __u32 *difference)
{
    __u32 old_word = from, new_word = to;

    *difference = bpf_csum_diff(&old_word, 4, &new_word, 4, *difference);
    return bpf_skb_store_bytes(skb, at, &to, sizeof(to), 0);
}

/* The quoted source or destination, and the checksums in the quote as far as it has them.
 * `difference` is what that does to the sum of the quote. */
static __always_inline long change_quote(struct __sk_buff *skb, const struct packet *quoted, bool source,
                                    struct socket_address *to, __u32 *difference)
{
    struct socket_address from = source ? quoted->source : quoted->destination;
    __u32 covers = check_offset(quoted);
    __u32 check_at = quoted->l4 + covers;
    __u32 at = quoted->l3 + ADDRESS_OFFSET(quoted->v6, source);
    __u32 addresses = bpf_csum_diff(from.ip, sizeof(from.ip), to->ip, sizeof(to->ip), 0);
    __u32 old_port, new_port;
    __u16 check, changed;

    if (quoted->v6) {
        if (bpf_skb_store_bytes(skb, at, to->ip, sizeof(to->ip), 0))
            return -1;
        *difference = addresses;
    } else {
        /* The sum of the header stays what it was: zero. */
        __u32 header_check_at = quoted->l3 + offsetof(struct iphdr, check);

        if (bpf_skb_load_bytes(skb, header_check_at, &check, sizeof(check)))
            return -1;
        check = updated_check(check, addresses);
        if (bpf_skb_store_bytes(skb, header_check_at, &check, sizeof(check), 0) ||
            bpf_skb_store_bytes(skb, at, &to->ip[3], sizeof(to->ip[3]), 0))
            return -1;
        *difference = 0;
    }
    if (from.protocol && change_quoted(skb, quoted->l4 + (source ? 0 : sizeof(__u16)), from.port,
                                       to->port, difference))
        return -1;
    /* RFC 792 asks for 8 bytes of the transport's header: of TCP's, the checksum is not in them. */
    if (!covers || bpf_skb_load_bytes(skb, check_at, &check, sizeof(check)) ||
        (quoted->protocol == PROTOCOL_UDP && !check))
        return 0;
    old_port = from.port;
    new_port = to->port;
    changed = updated_check(check, bpf_csum_diff(&old_port, 4, &new_port, 4, addresses));
    if (quoted->protocol == PROTOCOL_UDP && !changed)
        changed = 0xffff;
    return change_quoted(skb, check_at, check, changed, difference);
}

/* The source or destination in the quote, and the error's own checksum. Not static: so the verifier looks
 * at it once for all that change a quote. */
__noinline int change_quoted_end(struct __sk_buff *skb, const struct packet *packet,
                                 const struct packet *quoted, bool source,
                                 struct socket_address *to)
{
    __u32 difference = 0;
    __u32 check_at;

    if (!packet || !quoted || !to)
        return -1;
    check_at = packet->l4 + offsetof(struct icmp, check);
    if (change_quote(skb, quoted, source, to, &difference))
        return -1;
    return bpf_l4_csum_replace(skb, check_at, 0, difference, 0);
}
