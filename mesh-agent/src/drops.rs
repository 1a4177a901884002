//! Every reason for which this node drops or refuses a packet, with a sentence for whoever sees its count. Pure.

use std::collections::BTreeMap;

use mesh_api::admin::DropReport;

/// Part, reason as its counter is called, and what it means to an operator.
const REASONS: &[(&str, &str, &str)] = &[
    (
        "tunnel",
        "no_route",
        "Out: no node of the mesh has the destination. Is its node, or the route to its subnet, in the mesh?",
    ),
    (
        "tunnel",
        "multicast",
        "Out: for a group or for all; a mesh leads to one node at a time. The kernel's own questions for routers are some.",
    ),
    (
        "tunnel",
        "malformed_out",
        "Out: the kernel handed over something that is no IP packet.",
    ),
    (
        "tunnel",
        "forged_control",
        "Out: a process tried to speak as the node's own core.",
    ),
    (
        "tunnel",
        "held_too_many",
        "Out: too many packets waited for a path. `meshctl path why NODE` says why there is none.",
    ),
    (
        "tunnel",
        "queue_full",
        "Out: more came than the processors could encrypt; the busiest flow paid.",
    ),
    (
        "tunnel",
        "queue_late",
        "Out: waited too long to be encrypted: the machine is overloaded.",
    ),
    (
        "tunnel",
        "held_too_long",
        "Out: no path came up in time. `meshctl path why NODE` says why.",
    ),
    (
        "tunnel",
        "no_session",
        "Out: a message of the node's core to a peer without a session; it is sent again.",
    ),
    (
        "tunnel",
        "send_failed",
        "Out: the kernel could not send: no route to the underlay, or a local firewall.",
    ),
    (
        "tunnel",
        "relay_full",
        "Out: the line to the relay took no more: it is thinner than what is sent.",
    ),
    (
        "tunnel",
        "relay_gone",
        "Out: the link to the relay was down.",
    ),
    (
        "tunnel",
        "not_wireguard",
        "In: neither WireGuard nor STUN came to the node's UDP port: a scanner, or a wrong port.",
    ),
    (
        "tunnel",
        "unknown_key",
        "In: a handshake by a key that is not in this node's state of the mesh: its own or the other's is old.",
    ),
    (
        "tunnel",
        "unknown_session",
        "In: for a session that is over: a peer that has not noticed a restart. It ends by itself.",
    ),
    (
        "tunnel",
        "bad_handshake",
        "In: a handshake that does not prove what it must.",
    ),
    (
        "tunnel",
        "unasked",
        "In: an answer to a handshake that was not begun, or is over.",
    ),
    (
        "tunnel",
        "under_load",
        "In: too many handshakes at once; their senders were asked to prove their address.",
    ),
    (
        "tunnel",
        "unauthentic",
        "In: changed on its way, or forged.",
    ),
    (
        "tunnel",
        "replayed",
        "In: seen before. Copies that were sent while a path was in doubt end here: normal.",
    ),
    ("tunnel", "malformed_in", "In: authentic, but no IP packet."),
    (
        "tunnel",
        "wrong_source",
        "In: authentic, but its source is not an address of that node: asymmetric routes, or a subnet that the mesh does not know.",
    ),
    (
        "tunnel",
        "congestion_marked",
        "In: a router was congested, and the packet's sender would not have understood its mark.",
    ),
    (
        "tunnel",
        "tun_full",
        "In: the kernel took no more from the device: receivers on this machine are too slow.",
    ),
    (
        "tunnel",
        "events_full",
        "Events of the packet path that found the agent's queue full; they are told again.",
    ),
    (
        "sockets",
        "connect_refused",
        "A process connected to a service that has no endpoint. `meshctl services` says which.",
    ),
    (
        "sockets",
        "send_refused",
        "A process sent to a service that has no endpoint.",
    ),
    (
        "services",
        "refused_tcp",
        "A device connected to a service that has no endpoint: answered by a reset.",
    ),
    (
        "services",
        "refused_udp",
        "A device sent to a service that has no endpoint: answered by ICMP.",
    ),
    (
        "services",
        "refused_silently",
        "The same, where no answer can be given.",
    ),
    (
        "services",
        "clash",
        "A device's port already speaks with that endpoint by another service.",
    ),
    (
        "services",
        "not_in_range",
        "The client is not in the service's `loadBalancerSourceRanges`.",
    ),
    (
        "services",
        "not_local",
        "`externalTrafficPolicy: Local`, and no endpoint is on this node.",
    ),
    (
        "services",
        "masquerade_full",
        "No port was free for another flow of devices through the tunnel.",
    ),
    (
        "services",
        "flow_lost",
        "There was no room to remember another flow.",
    ),
    (
        "services",
        "change_failed",
        "The kernel refused a change to the packet.",
    ),
    (
        "services",
        "redirect_change_failed",
        "The kernel refused a change to the packet, on the short way to a pod.",
    ),
    (
        "mapping",
        "unreadable",
        "To a mapped subnet, with headers that cannot be followed.",
    ),
    (
        "mapping",
        "change_failed",
        "To a mapped subnet: the kernel refused a change to the packet.",
    ),
    (
        "policy",
        "denied",
        "It opens a flow that no policy allows. `meshctl status` has the last ones with the policy's name.",
    ),
    (
        "policy",
        "flow_ended",
        "Of a flow that was open until a policy changed.",
    ),
    (
        "policy",
        "no_room",
        "The policy tables are full; what they do not have is denied.",
    ),
    (
        "policy",
        "fragment_denied",
        "A fragment of a packet that was denied, or not seen.",
    ),
    (
        "policy",
        "error_denied",
        "An ICMP error about a flow that is not allowed.",
    ),
    (
        "policy",
        "unclear_denied",
        "Its ports cannot be read, and not all are allowed.",
    ),
    ("policy", "malformed", "No whole IP header."),
    (
        "policy",
        "spoofed",
        "From a pod's interface with an address that is not the pod's.",
    ),
    ("dns", "short", "Shorter than a DNS header."),
    (
        "dns",
        "response",
        "It is a response itself: answering it could go on for ever.",
    ),
    (
        "dns",
        "source",
        "From an address that may not ask here (`dns.allow_from`).",
    ),
    (
        "dns",
        "unwritable",
        "The answer could not be written in any form.",
    ),
    ("dns", "unsent", "The answer could not be sent."),
    ("dns", "connections", "Too many TCP connections."),
    (
        "dns",
        "busy",
        "Too many questions waited for upstreams: they do not answer, or lead back here.",
    ),
];

/// What was counted, by part and reason; reasons that never occurred among it with 0.
#[must_use]
pub fn report(counted: &BTreeMap<(&'static str, String), u64>) -> Vec<DropReport> {
    let one = |(part, reason, explanation): &(&'static str, &str, &str)| DropReport {
        part: (*part).to_owned(),
        reason: (*reason).to_owned(),
        packets: counted
            .get(&(*part, (*reason).to_owned()))
            .copied()
            .unwrap_or_default(),
        explanation: (*explanation).to_owned(),
    };
    REASONS.iter().map(one).collect()
}

/// Of what became of packets to services, whose counters those are: `mapping_unreadable` is the mapping's.
#[must_use]
pub fn split(counter: &str) -> (&'static str, String) {
    match counter.strip_prefix("mapping_") {
        Some(rest) => ("mapping", rest.to_owned()),
        None => ("services", counter.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names of counters in a `counters!` block whose comment says that the packet is dropped.
    fn dropping(source: &str) -> Vec<String> {
        let mut said = String::new();
        let mut found = Vec::new();
        for line in source.lines().map(str::trim) {
            if let Some(comment) = line.strip_prefix("///") {
                said += comment;
            } else if let Some((_, name)) = line.split_once(" = \"") {
                let name = name.trim_end_matches("\",").to_owned();
                if said.to_lowercase().contains("dropped") && !said.contains("would have been") {
                    found.push(name);
                }
                said.clear();
            } else {
                said.clear();
            }
        }
        found
    }

    fn known(part: &str, reason: &str) -> bool {
        REASONS.iter().any(|(a, b, _)| (*a, *b) == (part, reason))
    }

    #[test]
    fn every_reason_of_the_tunnel_and_of_dns_is_explained() {
        for reason in mesh_tunnel::stats::DropReason::ALL {
            assert!(known("tunnel", reason.as_str()), "{reason:?}");
        }
        for reason in mesh_dns::counters::DropReason::ALL {
            assert!(known("dns", reason.as_str()), "{reason:?}");
        }
    }

    #[test]
    fn every_drop_of_the_kernel_s_programs_is_explained() {
        let abi = |text: &'static str| dropping(text);
        let mut all = 0;
        for (part, prefix, source) in [
            (
                "services",
                "",
                include_str!("../../ebpf/ebpf-abi/src/packets.rs"),
            ),
            (
                "services",
                "redirect_",
                include_str!("../../ebpf/ebpf-abi/src/redirect.rs"),
            ),
            (
                "mapping",
                "",
                include_str!("../../ebpf/ebpf-abi/src/mapping.rs"),
            ),
            (
                "policy",
                "",
                include_str!("../../ebpf/ebpf-abi/src/policy.rs"),
            ),
        ] {
            for name in abi(source) {
                assert!(
                    known(part, &format!("{prefix}{name}")),
                    "{part} {prefix}{name}"
                );
                all += 1;
            }
        }
        assert!(all > 15, "{all}");
    }

    #[test]
    fn what_is_counted_is_shown_and_no_reason_is_explained_twice() {
        let counted = BTreeMap::from([
            (("tunnel", "no_route".to_owned()), 7),
            (split("mapping_unreadable"), 3),
        ]);
        let report = report(&counted);
        let of = |part: &str, reason: &str| {
            let mut found = report
                .iter()
                .filter(|one| one.part == part && one.reason == reason);
            let packets = found.next().map(|one| one.packets);
            assert!(found.next().is_none(), "{part} {reason} twice");
            packets
        };
        assert_eq!(of("tunnel", "no_route"), Some(7));
        assert_eq!(of("mapping", "unreadable"), Some(3));
        for (part, reason, explanation) in REASONS {
            assert!(of(part, reason).is_some() && explanation.ends_with(['.', '?', ')']));
        }
    }
}
