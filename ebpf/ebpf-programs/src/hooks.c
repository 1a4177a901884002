// SPDX-License-Identifier: Apache-2.0
/*
 * The packet level's programs: what every packet is looked at for, and who then decides.
 */

enum hook { REQUESTS, ANSWERS, ENTERING, LEAVING };

/* Most are of a flow that was seen a moment ago, and there is nothing to note of them. */
static __always_inline int on_plain_request(struct __sk_buff *skb, struct packet *packet)
{
    struct socket_address to;
    struct tracked *flow;
    __u64 found;

    if (packet->tcp_flags & TCP_SYN)
        return on_request(skb, packet);
    found = find_flow(&packet->source, &packet->destination, false);
    flow = flow_at(found);
    if (!flow || !is_noted(flow, packet) || is_ended(flow, found))
        return on_request(skb, packet);
    to = flow->endpoint;
    if (!is_still(flow, found) || same_ip(&to, &packet->source))
        return on_request(skb, packet);
    if (change_plain(skb, packet, false, &to))
        return drop(PACKET_change_failed);
    return pass(PACKET_request_translated);
}

static __always_inline int on_packet(struct __sk_buff *skb, bool ethernet, enum hook hook)
{
    struct packet packet = {};
    __u16 protocol = skb->protocol;
    __u32 parsed, l3 = 0;

    if (ethernet && hook == REQUESTS && skb->pkt_type != PACKET_HOST)
        return pass(PACKET_other);
    if (hook == REQUESTS && read_plain(skb, ethernet, &packet))
        return on_plain_request(skb, &packet);
    if (hook == ANSWERS && read_plain(skb, ethernet, &packet))
        return on_answer(skb, &packet);
    if (ethernet) {
        l3 = skip_ethernet(skb, &protocol);
        if (!l3)
            return pass(PACKET_other);
    }
    packet.v6 = protocol == bpf_htons(ETH_P_IPV6);
    if (!packet.v6 && protocol != bpf_htons(ETH_P_IP))
        return pass(PACKET_other);
    parsed = parse(skb, &packet, l3);
    if (parsed != PARSED)
        return pass(parsed);
    if (!is_complete(skb, &packet))
        return pass(PACKET_truncated);
    if (hook == ENTERING)
        return on_entering(skb, &packet);
    if (hook == LEAVING)
        return on_leaving(skb, &packet);
    if (packet.later)
        return on_later_fragment(skb, &packet, hook == ANSWERS);
    if (packet.protocol == ICMP || packet.protocol == ICMPV6)
        return on_icmp(skb, &packet, hook == ANSWERS);
    return hook == ANSWERS ? on_answer(skb, &packet) : on_request(skb, &packet);
}

#define PROGRAM(name, ethernet, hook)          \
    SEC("classifier")                          \
    int name(struct __sk_buff *skb)            \
    {                                          \
        return on_packet(skb, ethernet, hook); \
    }

PROGRAM(hf_requests, true, REQUESTS)
PROGRAM(hf_answers_out, true, ANSWERS)
/* The same for interfaces whose packets begin with the IP header, as those of TUN devices. */
PROGRAM(hf_requests_ip, false, REQUESTS)
PROGRAM(hf_answers_ip, false, ANSWERS)
/* For the tunnel's interface. */
PROGRAM(hf_entering, false, ENTERING)
PROGRAM(hf_leaving, false, LEAVING)
