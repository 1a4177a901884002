// SPDX-License-Identifier: Apache-2.0
/*
 * ICMP errors about packets of packets.c, which quote the packet they are about: both are changed as the packet was.
 */

/* The packet that an ICMP error is about, as far as it is of a flow. Else the counter for it. */
static __noinline __u32 read_quote(struct __sk_buff *skb, const struct packet *packet,
                                   struct packet *quoted)
{
    __u8 type;

    if (packet->fragment || LOAD(skb, packet->l4, &type) || !is_error(packet, type))
        return PACKET_other;
    quoted->v6 = packet->v6;
    if (parse(skb, quoted, packet->l4 + sizeof(struct icmp)) != PARSED || quoted->later ||
        (quoted->protocol != PROTOCOL_TCP && quoted->protocol != PROTOCOL_UDP) ||
        !same_ip(&quoted->source, &packet->destination))
        return PACKET_error_passed;
    return PARSED;
}

/* The error's own source or destination. */
static __noinline long change_error_end(struct __sk_buff *skb, struct packet *packet, bool source,
                                        const struct socket_address *to)
{
    struct socket_address *from = source ? &packet->source : &packet->destination;
    __u32 difference = address_difference(from, to);
    __u32 check_at = packet->l4 + offsetof(struct icmp, check);

    if (packet->v6 && cover_address(skb, packet, difference, check_at, 0))
        return -1;
    put_ip(from, to->ip);
    return write_ends(skb, packet, difference);
}

/* What becomes of an error's own address: where it is that of the quote, it changes with it, and a
 * router on the way stays who it is. */
enum error_change { DESTINATION, SOURCE, SOURCE_ALWAYS };

/* `to` is the error's new source and what it quotes as destination, or the other way round. */
static __noinline int change_error(struct __sk_buff *skb, struct packet *packet,
                                   const struct packet *quoted, enum error_change what,
                                   struct socket_address *to)
{
    bool source = what != DESTINATION;
    const struct socket_address *outer = source ? &packet->source : &packet->destination;
    const struct socket_address *inner = source ? &quoted->destination : &quoted->source;

    if (change_quoted_end(skb, packet, quoted, !source, to) ||
        ((what == SOURCE_ALWAYS || same_ip(outer, inner)) &&
         change_error_end(skb, packet, source, to)))
        return drop(PACKET_change_failed);
    return pass(PACKET_error_translated);
}

/* Of a client that is its own endpoint, about what it was sent as one of the two: to the other. */
static __noinline int on_hairpin_error(struct __sk_buff *skb, struct packet *packet,
                                       const struct packet *quoted, bool source, __u16 port)
{
    struct socket_address from = quoted->destination, to = quoted->source;
    bool is_its_own = same_ip(&packet->source, &quoted->destination);

    from.port = source ? port : quoted->source.port;
    to.port = source ? quoted->destination.port : port;
    if (change_quoted_end(skb, packet, quoted, true, &from) ||
        change_quoted_end(skb, packet, quoted, false, &to) ||
        change_error_end(skb, packet, false, &from) ||
        (is_its_own && change_error_end(skb, packet, true, &to)) || swap_ethernet(skb, packet))
        return drop(PACKET_change_failed);
    count_packet(PACKET_hairpin);
    return bpf_redirect(skb->ifindex, 0);
}

/* Whether whoever connects gives up by such an error: by all but what asks for smaller packets. */
static __always_inline bool ends_connects(struct __sk_buff *skb, const struct packet *packet)
{
    struct {
        __u8 type;
        __u8 code;
    } icmp;

    if (LOAD(skb, packet->l4, &icmp))
        return false;
    return packet->v6 ? icmp.type != 2 : icmp.type != 3 || icmp.code != 4;
}

static __noinline int on_answered_error(struct __sk_buff *skb, struct packet *packet,
                                        const struct packet *quoted)
{
    __u64 found = find_flow(&quoted->source, &quoted->destination, true);
    struct tracked *flow = flow_at(found);
    struct socket_address service = {};

    if (!flow || !read_service(found, NULL, &service))
        return pass(PACKET_error_passed);
    if (ends_connects(skb, packet))
        connect_failed(flow, &quoted->destination);
    return change_error(skb, packet, quoted, SOURCE, &service);
}

/* By the client, or a router near it, about what it was sent. */
static __noinline int on_client_s_error(struct __sk_buff *skb, struct packet *packet,
                                        const struct packet *quoted)
{
    struct tracked *flow = flow_at(find_flow(&quoted->destination, &quoted->source, false));
    struct socket_address to = {};

    if (flow) {
        to = flow->endpoint;
        if (same_ip(&to, &quoted->destination))
            return on_hairpin_error(skb, packet, quoted, true, to.port);
        return change_error(skb, packet, quoted, DESTINATION, &to);
    }
    if (find_hairpin(&quoted->destination, &quoted->source, NULL, &to))
        return on_hairpin_error(skb, packet, quoted, false, to.port);
    return pass(PACKET_error_passed);
}

static __noinline int on_icmp(struct __sk_buff *skb, struct packet *packet, bool answer)
{
    struct packet quoted = {};
    __u32 read = read_quote(skb, packet, &quoted);

    if (read != PARSED)
        return pass(read);
    return answer ? on_answered_error(skb, packet, &quoted)
                  : on_client_s_error(skb, packet, &quoted);
}
