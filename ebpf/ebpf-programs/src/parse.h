// SPDX-License-Identifier: Apache-2.0
/*
 * Reading packets: where their headers are, and between whom and by what they go.
 */
#pragma once

#include <stdbool.h>

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "common.h"

#define ICMP 1
#define ICMPV6 58
#define HOP_BY_HOP 0
#define ROUTING 43
#define FRAGMENT 44
#define DESTINATION_OPTIONS 60

#define VLAN_TAG_LEN 4

struct packet {
    struct socket_address source;
    struct socket_address destination;
    __u32 l3;   /* Where the IP header begins, */
    __u32 l4;   /* what comes after it and its options or extension headers, */
    __u32 size; /* and how many bytes the IP header says that it and all after it are. */
    __u32 id;
    __u8 v6;
    __u8 protocol;
    __u8 fragment; /* Part of a packet, */
    __u8 later;    /* and not its beginning. */
    __u8 tcp_flags;
    __u8 plain;  /* Read by read_plain(), which reads the next one as well. */
    __u16 check; /* The transport's. */
};

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10
#define TCP_FLAGS_OFFSET 13

#define PARSED PACKET_COUNTERS_MAX /* Else the counter for what it is. */

#define OFFSET_MASK 0x7fff /* Of what is read in place: the verifier asks for a bound. */

/* `*to` becomes what is at `at` in the packet; else than 0: it ends before. Read in place where the
 * kernel has it in one piece, as it mostly has headers: a helper costs several times as much. */
#define LOAD(skb, at, to)                                                                      \
    ({                                                                                         \
        const __u32 at_ = (at);                                                                \
        void *from_ = (void *)(long)(skb)->data + (at_ & OFFSET_MASK);                         \
        long failed_ = 0;                                                                      \
                                                                                               \
        asm volatile("" : "+r"(from_)); /* What is compared is what is read. */                \
        if (at_ <= OFFSET_MASK && from_ + sizeof(*(to)) <= (void *)(long)(skb)->data_end)      \
            *(to) = *(typeof(to))from_;                                                        \
        else                                                                                   \
            failed_ = bpf_skb_load_bytes(skb, at_, to, sizeof(*(to)));                         \
        failed_;                                                                               \
    })

static __always_inline void put_v4(struct socket_address *address, __u32 ip)
{
    address->ip[0] = 0;
    address->ip[1] = 0;
    address->ip[2] = bpf_htonl(0xffff);
    address->ip[3] = ip;
}

static __always_inline void put_v6(struct socket_address *address, const struct in6_addr *ip)
{
    address->ip[0] = ip->in6_u.u6_addr32[0];
    address->ip[1] = ip->in6_u.u6_addr32[1];
    address->ip[2] = ip->in6_u.u6_addr32[2];
    address->ip[3] = ip->in6_u.u6_addr32[3];
}

static __always_inline __u32 parse_v4(struct __sk_buff *skb, struct packet *packet)
{
    struct iphdr ip;
    __u32 fragment;

    if (LOAD(skb, packet->l3, &ip))
        return PACKET_truncated;
    if (ip.version != 4 || ip.ihl < 5)
        return PACKET_other;
    put_v4(&packet->source, ip.saddr);
    put_v4(&packet->destination, ip.daddr);
    fragment = bpf_ntohs(ip.frag_off);
    packet->later = (fragment & 0x1fff) != 0;
    packet->fragment = (fragment & 0x3fff) != 0;
    packet->id = ip.id;
    packet->protocol = ip.protocol;
    packet->l4 = packet->l3 + ip.ihl * 4u;
    packet->size = bpf_ntohs(ip.tot_len);
    return PARSED;
}

/* The first eight bytes of every extension header looked through. */
struct extension {
    __u8 next;
    __u8 length; /* In 8 bytes, without the first 8. */
    __u8 type;
    __u8 segments_left;
    __u32 id;
};

static __always_inline bool is_extension(__u8 protocol)
{
    return protocol == HOP_BY_HOP || protocol == DESTINATION_OPTIONS || protocol == ROUTING ||
           protocol == FRAGMENT;
}

static __always_inline __u32 parse_v6(struct __sk_buff *skb, struct packet *packet)
{
    struct extension extension;
    struct ipv6hdr ip;
    __u32 at = packet->l3 + sizeof(ip);
    __u8 next;

    if (LOAD(skb, packet->l3, &ip))
        return PACKET_truncated;
    if (ip.version != 6)
        return PACKET_other;
    put_v6(&packet->source, &ip.saddr);
    put_v6(&packet->destination, &ip.daddr);
    packet->size = bpf_ntohs(ip.payload_len);
    if (packet->size)
        packet->size += sizeof(ip);
    next = ip.nexthdr;

    for (int i = 0; i < (int)EXTENSION_HEADERS_MAX && is_extension(next); i++) {
        if (bpf_skb_load_bytes(skb, at, &extension, sizeof(extension)))
            return PACKET_truncated;
        at += sizeof(extension);
        if (next == FRAGMENT) {
            __u32 fragment = (__u32)extension.type << 8 | extension.segments_left;

            packet->later = (fragment & 0xfff8) != 0;
            packet->fragment = (fragment & 0xfff9) != 0; /* Else one that is whole: RFC 6946. */
            packet->id = extension.id;
            if (packet->later) {
                packet->l4 = at;
                return PARSED;
            }
        } else {
            if (next == ROUTING && extension.segments_left)
                return PACKET_extensions; /* Its destination is not yet the last one. */
            at += extension.length * 8u;
        }
        next = extension.next;
    }
    if (is_extension(next))
        return PACKET_extensions;
    packet->protocol = next;
    packet->l4 = at;
    return PARSED;
}

/* The packet whose IP header is at `l3`: the one on the wire, or one quoted in an ICMP error. Not
 * static: so the verifier looks at it once for both. */
__noinline __u32 parse(struct __sk_buff *skb, struct packet *packet, __u32 l3)
{
    struct {
        __u16 source;
        __u16 destination;
    } ports;
    __u32 parsed;

    if (!packet)
        return PACKET_other;
    packet->l3 = l3;
    parsed = packet->v6 ? parse_v6(skb, packet) : parse_v4(skb, packet);
    if (parsed != PARSED || packet->later)
        return parsed;
    if (packet->protocol != PROTOCOL_TCP && packet->protocol != PROTOCOL_UDP)
        return packet->protocol == (packet->v6 ? ICMPV6 : ICMP) ? PARSED : PACKET_other;
    if (LOAD(skb, packet->l4, &ports))
        return PACKET_truncated;
    packet->source.port = ports.source;
    packet->destination.port = ports.destination;
    packet->source.protocol = packet->protocol;
    packet->destination.protocol = packet->protocol;
    return PARSED;
}

/* Where the IP header begins, behind an Ethernet header and at most one VLAN tag in it; the kernel
 * mostly keeps a tag beside the packet. 0: it is not IP, or none that is told so. */
static __always_inline __u32 skip_ethernet(struct __sk_buff *skb, __u16 *protocol)
{
    struct {
        __u16 type;
        __u16 tag;
        __u16 tagged_type;
    } behind;

    if (LOAD(skb, offsetof(struct ethhdr, h_proto), &behind) || behind.type != *protocol)
        return 0;
    if (behind.type != bpf_htons(ETH_P_8021Q) && behind.type != bpf_htons(ETH_P_8021AD))
        return ETH_HLEN;
    if (skb->vlan_present)
        return 0;
    *protocol = behind.tagged_type;
    return ETH_HLEN + VLAN_TAG_LEN;
}

/* Reads what most packets are, all at once: TCP or UDP right behind an IP header without options, not in fragments, whole,
 * and with its headers in one piece of memory. Nothing is called: where the kernel guards returns (SRSO), each costs
 * some 20 cycles. False: something else, which parse() reads, or says what is wrong. */
static __always_inline bool read_plain(struct __sk_buff *skb, bool ethernet, struct packet *packet)
{
    void *at = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    const bool v6 = skb->protocol == bpf_htons(ETH_P_IPV6);
    __u32 size, header, transport = sizeof(struct udphdr);
    struct tcphdr *tcp;

    if (!v6 && skb->protocol != bpf_htons(ETH_P_IP))
        return false;
    if (ethernet) {
        struct ethhdr *frame = at;

        at += sizeof(*frame);
        if (at > end || frame->h_proto != skb->protocol)
            return false;
    }
    if (v6) {
        struct ipv6hdr *ip = at;

        tcp = at + sizeof(*ip);
        if ((void *)tcp + sizeof(struct udphdr) > end || ip->version != 6)
            return false;
        put_v6(&packet->source, &ip->saddr);
        put_v6(&packet->destination, &ip->daddr);
        packet->protocol = ip->nexthdr;
        header = sizeof(*ip);
        size = header + bpf_ntohs(ip->payload_len);
    } else {
        struct iphdr *ip = at;

        tcp = at + sizeof(*ip);
        if ((void *)tcp + sizeof(struct udphdr) > end || ip->version != 4 || ip->ihl != 5 ||
            ip->frag_off & bpf_htons(0x3fff))
            return false;
        put_v4(&packet->source, ip->saddr);
        put_v4(&packet->destination, ip->daddr);
        packet->protocol = ip->protocol;
        header = sizeof(*ip);
        size = bpf_ntohs(ip->tot_len);
    }
    if (packet->protocol == PROTOCOL_TCP) {
        transport = sizeof(*tcp);
        if ((void *)(tcp + 1) > end)
            return false;
        packet->tcp_flags = ((__u8 *)tcp)[TCP_FLAGS_OFFSET];
        packet->check = tcp->check;
    } else if (packet->protocol == PROTOCOL_UDP) {
        packet->check = ((struct udphdr *)tcp)->check;
    } else {
        return false;
    }
    packet->l3 = ethernet ? ETH_HLEN : 0;
    if (size < header + transport || packet->l3 + size > skb->len)
        return false;
    packet->l4 = packet->l3 + header;
    packet->size = size;
    packet->v6 = v6;
    packet->source.port = tcp->source;
    packet->destination.port = tcp->dest;
    packet->source.protocol = packet->protocol;
    packet->destination.protocol = packet->protocol;
    packet->plain = true;
    return true;
}
