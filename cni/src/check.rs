//! Whether a pod's veth is as it was made: a comparison, without looking.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use mesh_api::cni::{AttachmentId, HostInterface, VethRecord};
use mesh_linux::netlink::{ExactRoute, LinkDetail, LinkRoute};

use crate::{
    config::show_mac,
    result::{everywhere, gateway},
};

/// What was made.
#[derive(Debug, Clone, Copy)]
pub struct Made<'a> {
    /// What the attachment is known by.
    pub id: &'a AttachmentId,
    /// The node's end.
    pub host: &'a HostInterface,
    /// The pod's addresses.
    pub addresses: &'a [IpAddr],
    /// What was said of both ends.
    pub veth: &'a VethRecord,
}

/// What the kernel has.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// The interface with the name of the node's end.
    pub host: Option<LinkDetail>,
    /// The node's routes to the pod's addresses.
    pub host_routes: BTreeMap<IpAddr, ExactRoute>,
    /// The node's fixed neighbours on that interface.
    pub host_neighbours: BTreeMap<IpAddr, [u8; 6]>,
    /// The interface with the name of the pod's end, in the pod.
    pub pod: Option<LinkDetail>,
    /// Its addresses.
    pub pod_addresses: BTreeSet<IpNet>,
    /// The pod's routes by it.
    pub pod_routes: Vec<LinkRoute>,
    /// The pod's fixed neighbours on it.
    pub pod_neighbours: BTreeMap<IpAddr, [u8; 6]>,
}

/// What differs, a sentence each. Routes and addresses that came besides are others' business (chained plug-ins').
#[must_use]
pub fn problems(made: Made<'_>, seen: &Seen) -> Vec<String> {
    let mut found = Vec::new();
    let (Some(host), Some(pod)) = (&seen.host, &seen.pod) else {
        for (there, where_, name) in [
            (seen.host.is_some(), "the node", &made.host.name),
            (seen.pod.is_some(), "the pod", &made.id.interface),
        ] {
            if !there {
                found.push(format!("{where_} has no interface {name}"));
            }
        }
        return found;
    };
    if host.index.0.get() != made.host.index || host.veth_peer != Some(pod.index) {
        found.push(format!(
            "the node's {} is not the other end of the pod's {}",
            host.name, pod.name
        ));
    }
    for (where_, link, mac) in [
        ("node", host, made.veth.host_mac),
        ("pod", pod, made.veth.mac),
    ] {
        let name = &link.name;
        if !link.is_up {
            found.push(format!("the {where_}'s interface {name} is down"));
        }
        if link.mac != Some(mac) {
            let has = link.mac.map_or_else(|| "none".to_owned(), show_mac);
            let want = show_mac(mac);
            found.push(format!(
                "the {where_}'s interface {name} has the link-layer address {has}, not {want}"
            ));
        }
        let mtu = made.veth.mtu_bytes;
        if link.mtu_bytes != Some(mtu) {
            let has = link.mtu_bytes.unwrap_or_default();
            found.push(format!(
                "the {where_}'s interface {name} has the MTU {has}, not {mtu}"
            ));
        }
    }
    for &address in made.addresses {
        found.extend(address_problems(made, seen, host, address));
    }
    found
}

fn address_problems(
    made: Made<'_>,
    seen: &Seen,
    host: &LinkDetail,
    address: IpAddr,
) -> Vec<String> {
    let (pod, gateway) = (&made.id.interface, gateway(address));
    let default = LinkRoute {
        destination: everywhere(address),
        gateway: Some(gateway),
    };
    let route = seen.host_routes.get(&address);
    let checks = [
        (
            seen.pod_addresses.contains(&IpNet::from(address)),
            format!("the pod's interface {pod} lacks the address {address}"),
        ),
        (
            seen.pod_routes.contains(&default),
            format!(
                "the pod lacks the route to {} by {gateway}",
                default.destination
            ),
        ),
        (
            seen.pod_neighbours.get(&gateway) == Some(&made.veth.host_mac),
            format!("the pod does not know the link-layer address of its gateway {gateway}"),
        ),
        (
            route.is_some_and(|route| route.link == Some(host.index)),
            format!("the node lacks the route to {address} by {}", host.name),
        ),
        (
            seen.host_neighbours.get(&address) == Some(&made.veth.mac),
            format!("the node does not know the link-layer address of {address}"),
        ),
    ];
    let failed = checks.into_iter().filter(|(holds, _)| !holds);
    failed.map(|(_, problem)| problem).collect()
}

#[cfg(test)]
mod tests {
    use mesh_linux::IfIndex;

    use super::*;

    const MAC: [u8; 6] = [10, 0, 0, 0, 0, 1];
    const HOST_MAC: [u8; 6] = [14, 0, 0, 0, 0, 1];

    fn link(index: u32, peer: u32, name: &str, mac: [u8; 6]) -> LinkDetail {
        LinkDetail {
            index: IfIndex::new(index).unwrap(),
            name: name.to_owned(),
            is_up: true,
            mtu_bytes: Some(1_400),
            mac: Some(mac),
            alias: None,
            veth_peer: IfIndex::new(peer),
            part_of: None,
            is_bridge: false,
        }
    }

    /// All as it was made.
    fn seen(addresses: &[IpAddr]) -> Seen {
        let host = link(7, 2, "hfp0", HOST_MAC);
        let route = ExactRoute {
            link: Some(host.index),
        };
        Seen {
            host_routes: addresses.iter().map(|address| (*address, route)).collect(),
            host_neighbours: addresses.iter().map(|address| (*address, MAC)).collect(),
            host: Some(host),
            pod: Some(link(2, 7, "eth0", MAC)),
            pod_addresses: addresses
                .iter()
                .map(|address| IpNet::from(*address))
                .collect(),
            pod_routes: addresses
                .iter()
                .map(|address| LinkRoute {
                    destination: everywhere(*address),
                    gateway: Some(gateway(*address)),
                })
                .collect(),
            pod_neighbours: addresses
                .iter()
                .map(|address| (gateway(*address), HOST_MAC))
                .collect(),
        }
    }

    #[track_caller]
    fn check(change: impl FnOnce(&mut Seen), said: &[&str]) {
        let id = AttachmentId {
            network: "mesh".to_owned(),
            container: "c".to_owned(),
            interface: "eth0".to_owned(),
        };
        let addresses: [IpAddr; 2] = ["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        let mut seen = seen(&addresses);
        change(&mut seen);
        let made = Made {
            id: &id,
            host: &HostInterface {
                name: "hfp0".to_owned(),
                index: 7,
            },
            addresses: &addresses,
            veth: &VethRecord {
                mac: MAC,
                host_mac: HOST_MAC,
                mtu_bytes: 1_400,
            },
        };
        let found = problems(made, &seen);
        assert_eq!(found.len(), said.len(), "{found:?}");
        for (problem, word) in found.iter().zip(said) {
            assert!(problem.contains(word), "{problem}");
        }
    }

    #[test]
    fn what_is_as_it_was_made_has_no_problems() {
        check(|_| {}, &[]);
    }

    #[test]
    fn what_others_added_is_no_problem() {
        check(
            |seen| {
                seen.pod_addresses.insert("10.9.0.1/24".parse().unwrap());
                seen.pod_routes.push(LinkRoute {
                    destination: "10.9.0.0/24".parse().unwrap(),
                    gateway: None,
                });
            },
            &[],
        );
    }

    #[test]
    fn missing_interfaces_are_told_and_nothing_that_follows_from_it() {
        check(|seen| seen.host = None, &["node has no interface hfp0"]);
        check(|seen| seen.pod = None, &["pod has no interface eth0"]);
    }

    #[test]
    fn each_change_of_an_interface_is_told() {
        let host = |change: fn(&mut LinkDetail)| {
            move |seen: &mut Seen| change(seen.host.as_mut().unwrap())
        };
        check(host(|link| link.is_up = false), &["hfp0 is down"]);
        check(host(|link| link.mac = None), &["link-layer address none"]);
        check(
            host(|link| link.mtu_bytes = Some(1_500)),
            &["MTU 1500, not 1400"],
        );
        check(host(|link| link.veth_peer = None), &["not the other end"]);
        check(
            |seen| seen.pod.as_mut().unwrap().is_up = false,
            &["eth0 is down"],
        );
    }

    #[test]
    fn an_interface_that_took_the_others_place_is_told() {
        check(
            |seen| {
                let host = link(9, 2, "hfp0", HOST_MAC);
                for route in seen.host_routes.values_mut() {
                    route.link = Some(host.index);
                }
                seen.host = Some(host);
            },
            &["not the other end"],
        );
    }

    #[test]
    fn each_thing_that_an_address_needs_is_told() {
        let v4: IpAddr = "10.0.0.2".parse().unwrap();
        check(
            |seen| seen.pod_addresses.retain(|net| net.addr() != v4),
            &["lacks the address 10.0.0.2"],
        );
        check(
            |seen| {
                seen.pod_routes
                    .retain(|route| route.destination.addr().is_ipv4())
            },
            &["route to ::/0"],
        );
        check(
            |seen| seen.pod_neighbours.clear(),
            &["169.254.1.1", "fe80::1"],
        );
        check(
            |seen| seen.host_routes.retain(|ip, _| *ip != v4),
            &["route to 10.0.0.2"],
        );
        check(
            |seen| seen.host_neighbours.retain(|ip, _| *ip != v4),
            &["link-layer address of 10.0.0.2"],
        );
    }
}
