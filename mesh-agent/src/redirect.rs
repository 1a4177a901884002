//! Which interfaces are pods', and between which of them packets go past the host's stack: what the configuration names,
//! as far as the kernel hands packets on there in a way that the programs know.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ebpf_loader::{RedirectKind, RedirectLink, Redirects};
use ipnet::IpNet;
use mesh_core::pattern::NamePattern;
use mesh_linux::{
    IfIndex,
    netlink::{Forwarding, ForwardingLink, Veth},
};

/// Where policy is enforced, but at the tunnel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Guarded {
    /// Pods' own interfaces: also those of virtual machines, and those that are down yet.
    pub pods: BTreeSet<IfIndex>,
    /// Of those that are ports of a bridge, which one.
    pub bridges: BTreeMap<IfIndex, IfIndex>,
    /// Those by which devices' packets go into pods past the pods' own interfaces.
    pub devices: BTreeSet<IfIndex>,
}

/// What [`redirects`] found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// What policy has to see.
    pub guarded: Guarded,
    /// To be told to the programs.
    pub redirects: Redirects,
    /// Interfaces that are meant but cannot be redirected to, or are no pod's, by name.
    pub problems: BTreeMap<String, String>,
}

/// Decides for all interfaces that `pods` match, for the tunnel, and for those that have `devices` behind them, Ethernet
/// each; `forwards` says whether the kernel hands on IPv6 packets, or IPv4's, that come in by an interface.
#[must_use]
pub fn redirects(
    forwarding: &Forwarding,
    pods: &BTreeSet<NamePattern>,
    devices: &BTreeSet<IfIndex>,
    tunnel: Option<IfIndex>,
    forwards: impl Fn(&str, bool) -> bool,
) -> Found {
    let mut found = Found::default();
    for (&index, link) in &forwarding.links {
        let kind = if Some(index) == tunnel {
            Ok(RedirectKind::Tunnel)
        } else if pods.iter().any(|pattern| pattern.matches(&link.name)) {
            match guarded(forwarding, link) {
                Ok(bridge) => {
                    let Guarded { pods, bridges, .. } = &mut found.guarded;
                    pods.insert(index);
                    bridges.extend(bridge.map(|bridge| (index, bridge)));
                    let Some(veth) = link.veth.filter(|_| bridge.is_none()) else {
                        continue; // Policy is all that there is at bridges' ports and virtual machines' interfaces.
                    };
                    pod(link, veth)
                }
                Err(problem) => Err(format!("{problem}; policy does not see its packets")),
            }
        } else if devices.contains(&index) {
            // Else their services go by the stack, if at all: who serves them says what is wrong.
            let forwarded = unforwarded(forwarding, index, &link.name, &forwards).is_none();
            if link.is_up && forwarded && forwarding.by_destination {
                found.guarded.devices.insert(index);
                let (kind, mtu_bytes) = (RedirectKind::Devices, link.mtu_bytes);
                let link = RedirectLink { kind, mtu_bytes };
                found.redirects.links.insert(index.0, link);
            }
            continue;
        } else {
            continue;
        };
        let kind = kind.and_then(|kind| {
            let missing = unforwarded(forwarding, index, &link.name, &forwards);
            missing.map_or(Ok(kind), Err)
        });
        match kind {
            Ok(kind) if forwarding.by_destination => {
                let mtu_bytes = link.mtu_bytes;
                let link = RedirectLink { kind, mtu_bytes };
                found.redirects.links.insert(index.0, link);
            }
            Ok(_) => {
                let problem = "routing depends on more than the destination (ip rule): packets are not redirected";
                found.problems.insert(link.name.clone(), problem.to_owned());
            }
            Err(problem) => {
                found.problems.insert(link.name.clone(), problem);
            }
        }
    }
    let routes = forwarding.routes.iter();
    let routes =
        routes.map(|(net, link)| ((net.addr(), net.prefix_len()), link.map(|link| link.0)));
    found.redirects.routes = routes.collect();
    found
}

/// Of which bridge the interface is a port, if policy can be enforced there.
fn guarded(
    forwarding: &Forwarding,
    link: &ForwardingLink,
) -> Result<Option<IfIndex>, &'static str> {
    if link.veth.is_none() && !link.is_tap {
        return Err(
            "it is neither a veth whose other end is in another network namespace nor a TAP device: only those lead into \
             pods and virtual machines",
        );
    }
    let whole = link
        .part_of
        .map(|whole| (whole, forwarding.links.get(&whole)));
    match whole {
        Some((_, whole)) if !whole.is_some_and(|whole| whole.is_bridge) => {
            Err("it is part of a bond or VRF")
        }
        Some((bridge, _)) => Ok(Some(bridge)),
        None => Ok(None),
    }
}

fn pod(link: &ForwardingLink, veth: Veth) -> Result<RedirectKind, String> {
    if !link.is_up {
        return Err("it is down".to_owned());
    }
    Ok(RedirectKind::Pod {
        mac: veth.mac,
        pod_mac: veth.peer_mac,
    })
}

/// What keeps the kernel from handing on packets of an interface, as far as addresses are behind it.
fn unforwarded(
    forwarding: &Forwarding,
    index: IfIndex,
    name: &str,
    forwards: impl Fn(&str, bool) -> bool,
) -> Option<String> {
    let behind = |v6: bool| {
        let routed = |net: &IpNet| match net.addr() {
            IpAddr::V4(_) => !v6,
            IpAddr::V6(address) => v6 && !address.is_unicast_link_local(),
        };
        let mut routes = forwarding.routes.iter();
        routes.any(|(net, link)| *link == Some(index) && routed(net))
    };
    let missing = [false, true]
        .into_iter()
        .find(|&v6| behind(v6) && !forwards(name, v6))?;
    let family = if missing { "IPv6" } else { "IPv4" };
    Some(format!(
        "its {family} packets are not forwarded by the kernel"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAN: u32 = 2;
    const POD: u32 = 7;
    const TUNNEL: u32 = 9;

    fn index(number: u32) -> IfIndex {
        IfIndex::new(number).unwrap()
    }

    fn link(name: &str) -> ForwardingLink {
        ForwardingLink {
            name: name.to_owned(),
            is_up: true,
            part_of: None,
            is_bridge: false,
            is_tap: false,
            mtu_bytes: 1_450,
            veth: Some(Veth {
                mac: [2; 6],
                peer_mac: [4; 6],
            }),
        }
    }

    fn forwarding() -> Forwarding {
        let uplink = ForwardingLink {
            veth: None,
            ..link("eth0")
        };
        let tunnel = ForwardingLink {
            veth: None,
            ..link("holdfast0")
        };
        let routes = [
            ("10.244.1.5/32", Some(POD)),
            ("fd44::5/128", Some(POD)),
            ("fe80::/64", Some(POD)),
            ("10.245.0.0/16", Some(TUNNEL)),
            ("0.0.0.0/0", Some(LAN)),
            ("10.244.0.1/32", None),
        ];
        let routes = routes.map(|(net, to)| (net.parse().unwrap(), to.map(index)));
        Forwarding {
            links: BTreeMap::from([
                (index(LAN), uplink),
                (index(POD), link("veth1a2b")),
                (index(TUNNEL), tunnel),
            ]),
            routes: routes.into(),
            by_destination: true,
        }
    }

    fn decide(forwarding: &Forwarding, patterns: &[&str]) -> Found {
        let patterns = patterns
            .iter()
            .map(|&text| NamePattern::new(text.to_owned()));
        redirects(
            forwarding,
            &patterns.collect(),
            &BTreeSet::from([index(LAN), index(POD)]),
            Some(index(TUNNEL)),
            |_, _| true,
        )
    }

    #[track_caller]
    fn problem(forwarding: &Forwarding) -> String {
        let found = decide(forwarding, &["veth*"]);
        assert!(!found.redirects.links.contains_key(&index(POD).0));
        found.problems["veth1a2b"].clone()
    }

    #[test]
    fn pods_that_are_named_devices_and_the_tunnel_are_redirected_to_and_all_routes_are_told() {
        let found = decide(&forwarding(), &["cali*", "veth*"]);
        assert_eq!(found.problems, BTreeMap::new());
        let pod = RedirectKind::Pod {
            mac: [2; 6],
            pod_mac: [4; 6],
        };
        let kinds = found
            .redirects
            .links
            .iter()
            .map(|(index, link)| (index.get(), link.kind));
        // A pod that is also a client by packet is a pod.
        let others = [(LAN, RedirectKind::Devices), (POD, pod)];
        assert!(kinds.eq(others.into_iter().chain([(TUNNEL, RedirectKind::Tunnel)])));
        assert_eq!(found.guarded.devices, BTreeSet::from([index(LAN)]));
        let mtus = found.redirects.links.values().map(|link| link.mtu_bytes);
        assert!(mtus.eq([1_450; 3]));
        assert_eq!(found.redirects.routes.len(), forwarding().routes.len());
        let default = ("0.0.0.0".parse().unwrap(), 0);
        assert_eq!(found.redirects.routes[&default], Some(index(LAN).0));
    }

    #[test]
    fn a_pattern_is_a_whole_name_or_a_beginning() {
        for (pattern, names) in [
            ("veth1a2b", [true, false]),
            ("veth", [false, false]),
            ("veth*", [true, true]),
            ("*", [true, true]),
        ] {
            let pattern = NamePattern::new(pattern.to_owned());
            let matched = ["veth1a2b", "veth3"].map(|name| pattern.matches(name));
            assert_eq!(matched, names, "{pattern:?}");
        }
    }

    #[test]
    fn what_the_kernel_would_do_otherwise_is_left_to_it_and_said() {
        let change = |change: &dyn Fn(&mut ForwardingLink)| {
            let mut forwarding = forwarding();
            change(forwarding.links.get_mut(&index(POD)).unwrap());
            forwarding
        };
        assert!(problem(&change(&|link| link.veth = None)).contains("neither a veth"));
        assert!(problem(&change(&|link| link.is_up = false)).contains("down"));
        assert!(problem(&change(&|link| link.part_of = Some(index(LAN)))).contains("VRF"));
        let rules = Forwarding {
            by_destination: false,
            ..forwarding()
        };
        assert!(problem(&rules).contains("ip rule"));
        assert!(decide(&rules, &["veth*"]).redirects.links.is_empty());
    }

    #[test]
    fn at_a_bridge_s_ports_and_virtual_machines_policy_is_all_there_is() {
        let bridge = |forwarding: &mut Forwarding| {
            let mut bridge = link("br0");
            (bridge.veth, bridge.is_bridge) = (None, true);
            forwarding.links.insert(index(20), bridge);
        };
        for (is_veth, is_port) in [(true, true), (false, true), (false, false)] {
            let mut forwarding = forwarding();
            bridge(&mut forwarding);
            let port = forwarding.links.get_mut(&index(POD)).unwrap();
            port.is_tap = !is_veth;
            port.veth = port.veth.filter(|_| is_veth);
            port.part_of = is_port.then(|| index(20));
            let found = decide(&forwarding, &["veth*"]);
            assert_eq!(found.guarded.pods, BTreeSet::from([index(POD)]));
            let expected: Vec<_> = is_port
                .then(|| (index(POD), index(20)))
                .into_iter()
                .collect();
            assert!(found.guarded.bridges.into_iter().eq(expected));
            assert_eq!(found.problems, BTreeMap::new());
            assert!(!found.redirects.links.contains_key(&index(POD).0));
        }
    }

    #[test]
    fn an_interface_that_is_down_yet_is_guarded() {
        let mut forwarding = forwarding();
        forwarding.links.get_mut(&index(POD)).unwrap().is_up = false;
        assert_eq!(
            decide(&forwarding, &["veth*"]).guarded.pods,
            BTreeSet::from([index(POD)])
        );
    }

    #[test]
    fn forwarding_is_asked_for_the_families_behind_an_interface() {
        let mut forwarding = forwarding();
        let veths = BTreeSet::from([NamePattern::new("veth*".to_owned())]);
        let without = |forwarding: &Forwarding, missing: bool| {
            let forwards = |_: &str, v6: bool| v6 != missing;
            redirects(forwarding, &veths, &BTreeSet::new(), None, forwards).problems
        };
        assert!(without(&forwarding, true)["veth1a2b"].contains("IPv6"));
        assert!(without(&forwarding, false)["veth1a2b"].contains("IPv4"));
        forwarding.routes.remove(&"fd44::5/128".parse().unwrap());
        assert_eq!(without(&forwarding, true), BTreeMap::new());
    }
}
