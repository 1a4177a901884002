//! NAT kinds and firewalls as nftables rules.
//!
//! Linux' own `masquerade` keeps the port where it can, which makes it endpoint-independent only
//! for one inner host a port. Here each inner host gets its own port translation (`port ^ key`),
//! a bijection: the mapping never depends on the destination, with several hosts too.
//!
//! Limits: NAT is for UDP over IPv4; TCP is masqueraded the ordinary way by every kind. Two hosts whose
//! ports differ by exactly their keys' difference would meet on one outer port; with ports that
//! are equal, as those of agents are, they never do. [`HOSTS_MAX`] hosts a site.

use std::{fmt::Write as _, net::Ipv4Addr};

/// Hosts behind one NAT.
pub const HOSTS_MAX: usize = 16;

/// Keys: 64 multiples of 2^10 fit 16 bits. A host has another one with each new address, as to its router it is
/// another host, while mappings of the old one last: so many leases later those are gone.
pub(crate) const KEYS: usize = 64;

/// The first port of a [`NatKind::Symmetric`], and how many it gives out in order before it begins anew: a host of
/// the lab speaks with fewer destinations in the two minutes for which Linux keeps a mapping.
const IN_ORDER: (u16, u16) = (40_000, 512);

/// How a NAT maps and filters UDP, in the words of RFC 4787 §4 and §5.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NatKind {
    /// A plain router; the LAN is reachable.
    None,
    /// Endpoint-independent mapping and filtering.
    FullCone,
    /// Endpoint-independent mapping, address-dependent filtering.
    RestrictedCone,
    /// Endpoint-independent mapping, address-and-port-dependent filtering.
    PortRestricted,
    /// Address-and-port-dependent mapping and filtering, with a pattern: each new mapping has the next port.
    Symmetric,
    /// The same without a pattern: a random port for each destination.
    SymmetricRandom,
    /// The router of a home behind that of a carrier (RFC 6598), both [`Self::PortRestricted`].
    Double,
}

/// How a router treats IPv6, which nobody translates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ipv6Kind {
    /// A plain router.
    Open,
    /// Lets in what hosts behind it asked for: address-and-port-dependent filtering (RFC 6092 §3.2).
    Firewall,
}

/// The whole rule set of a site's router, for hosts with a key each. Replaces an earlier one in one transaction.
#[must_use]
pub(crate) fn rules(kind: NatKind, hosts: &[(Ipv4Addr, usize)]) -> String {
    let mut script = "table ip nat\ndelete table ip nat\n".to_owned();
    if kind == NatKind::None {
        return script;
    }
    let mut learn = String::new();
    let mut translate = match kind {
        NatKind::Symmetric => in_order(),
        NatKind::SymmetricRandom => {
            "oifname \"wan\" meta l4proto udp masquerade fully-random\n".to_owned()
        }
        NatKind::None
        | NatKind::FullCone
        | NatKind::RestrictedCone
        | NatKind::PortRestricted
        | NatKind::Double => by_host(hosts, &mut learn),
    };
    translate.push_str("oifname \"wan\" masquerade");
    let admit = match kind {
        NatKind::FullCone => "iifname \"wan\" dnat to udp dport map @inner",
        NatKind::RestrictedCone => {
            "iifname \"wan\" udp dport . ip saddr @spoken dnat to udp dport map @inner"
        }
        NatKind::None
        | NatKind::PortRestricted
        | NatKind::Double
        | NatKind::Symmetric
        | NatKind::SymmetricRandom => "",
    };
    // Unasked-for packets end in `input` before conntrack confirms them. If they got a port
    // unreachable instead, or an entry, they would take the outer port from the inner host.
    write!(
        script,
        r#"table ip nat {{
    map inner {{ type inet_service : ipv4_addr . inet_service; flags dynamic,timeout; timeout 5m; size 4096; }}
    set spoken {{ type inet_service . ipv4_addr; flags dynamic,timeout; timeout 5m; size 4096; }}
    chain learn {{
        type filter hook postrouting priority 90; policy accept;
        {learn}
    }}
    chain postrouting {{
        type nat hook postrouting priority 100; policy accept;
        {translate}
    }}
    chain prerouting {{
        type nat hook prerouting priority -100; policy accept;
        {admit}
    }}
    chain input {{
        type filter hook input priority 0; policy accept;
        iifname "wan" meta l4proto {{ tcp, udp }} drop
    }}
    chain forward {{
        type filter hook forward priority 0; policy accept;
        iifname "wan" ct state new ct status & dnat == 0 drop
    }}
}}
"#
    )
    .ok();
    script
}

/// Endpoint-independent: each host's ports by a translation of its own.
fn by_host(hosts: &[(Ipv4Addr, usize)], learn: &mut String) -> String {
    let mut translate = String::new();
    for (host, key) in hosts {
        let key = (key % KEYS) << 10;
        let outer = format!("udp sport ^ {key:#x}");
        let select = format!("oifname \"wan\" ip saddr {host} meta l4proto udp");
        writeln!(
            learn,
            "{select} update @inner {{ {outer} : ip saddr . udp sport }}"
        )
        .ok();
        writeln!(learn, "{select} update @spoken {{ {outer} . ip daddr }}").ok();
        // `masquerade` and not `snat`: the kernel forgets its mappings when the address goes.
        writeln!(translate, "{select} masquerade to : {outer}").ok();
    }
    translate
}

/// Each new mapping, of whichever host, has the next port.
fn in_order() -> String {
    let (first, count) = IN_ORDER;
    let ports = (0..count).map(|index| format!("{index} : {}", first + index));
    let ports = ports.collect::<Vec<_>>().join(", ");
    format!(
        "oifname \"wan\" meta l4proto udp masquerade to : numgen inc mod {count} map {{ {ports} }}\n"
    )
}

/// What a site's router does with IPv6. Replaces an earlier one in one transaction.
#[must_use]
pub(crate) fn ipv6_rules(kind: Ipv6Kind) -> String {
    let mut script = "table ip6 guard\ndelete table ip6 guard\n".to_owned();
    if kind == Ipv6Kind::Firewall {
        script.push_str(
            "table ip6 guard {\n chain forward {\n type filter hook forward priority 0; policy accept;\n \
             iifname \"wan\" ct state { established, related } accept\n iifname \"wan\" drop\n }\n}\n",
        );
    }
    script
}
