// SPDX-License-Identifier: Apache-2.0
/*
 * The packet level's programs: what every packet is looked at for, and who then decides.
 */

enum hook { REQUESTS, ANSWERS, ENTERING, LEAVING };

static __always_inline int on_packet(struct __sk_buff *skb, bool ethernet, enum hook hook)
{
    struct packet packet = {};
    __u16 protocol = skb->protocol;
    __u32 parsed, l3 = 0;

    if (ethernet) {
        l3 = skip_ethernet(skb, &protocol);
        if (!l3 || (hook == REQUESTS && skb->pkt_type != PACKET_HOST))
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
