//! NAT kinds as nftables rules.
//!
//! Linux' own `masquerade` keeps the port where it can, which makes it endpoint-independent only
//! for one inner host a port. Here each inner host gets its own port translation (`port ^ key`),
//! a bijection: the mapping never depends on the destination, with several hosts too.
//!
//! Limits: UDP over IPv4 only; TCP is masqueraded the ordinary way by every kind. Two hosts whose
//! ports differ by exactly their keys' difference would meet on one outer port; with ports that
//! are equal, as those of agents are, they never do. [`HOSTS_MAX`] hosts a site.

use std::{fmt::Write as _, net::Ipv4Addr};

/// Hosts behind one NAT: the key is `index * 2^10`, and 64 of those fit 16 bits; 16 are enough.
pub const HOSTS_MAX: usize = 16;

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
    /// Address-and-port-dependent mapping and filtering: a random port for each destination.
    Symmetric,
}

/// The whole rule set of a site's router. Replaces an earlier one in one transaction.
#[must_use]
pub fn rules(kind: NatKind, hosts: &[Ipv4Addr]) -> String {
    let mut script = "table ip nat\ndelete table ip nat\n".to_owned();
    if kind == NatKind::None {
        return script;
    }
    let mut learn = String::new();
    let mut translate = String::new();
    for (index, host) in hosts.iter().enumerate() {
        let key = index << 10;
        let outer = format!("udp sport ^ {key:#x}");
        let select = format!("oifname \"wan\" ip saddr {host} meta l4proto udp");
        if kind == NatKind::Symmetric {
            writeln!(translate, "{select} masquerade fully-random").ok();
            continue;
        }
        writeln!(
            learn,
            "{select} update @inner {{ {outer} : ip saddr . udp sport }}"
        )
        .ok();
        writeln!(learn, "{select} update @spoken {{ {outer} . ip daddr }}").ok();
        // `masquerade` and not `snat`: the kernel forgets its mappings when the address goes.
        writeln!(translate, "{select} masquerade to : {outer}").ok();
    }
    let admit = match kind {
        NatKind::FullCone => "iifname \"wan\" dnat to udp dport map @inner",
        NatKind::RestrictedCone => {
            "iifname \"wan\" udp dport . ip saddr @spoken dnat to udp dport map @inner"
        }
        NatKind::None | NatKind::PortRestricted | NatKind::Symmetric => "",
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
        oifname "wan" masquerade
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
