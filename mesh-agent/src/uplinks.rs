//! The ways out of this machine, as the core wants to know them and as the packet path uses them. Pure.
//!
//! An uplink is an interface with a default route in the main table; the lower that one's metric, the
//! larger its weight. How packets are made to leave by it is `mesh_tunnel::egress`' business.

use std::{
    cmp::Reverse,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh_core::{
    io::{Uplink, UplinkId},
    pattern::NamePattern,
    snapshot::{Service, ServiceKind, Snapshot},
};
use mesh_linux::{
    IfIndex,
    netlink::{Interface, Ways},
};
use mesh_tunnel::egress::Egress;

/// Most prefixes that are kept beside the way out, the shortest first: a site's router has a handful, and
/// one that knows the whole internet by its prefixes has no use for them here.
const NEARER_MAX: usize = 4096;

/// No uplink leads there: loopback (RFC 1122 §3.2.1.3, RFC 4291 §2.5.3) and addresses of a link (RFC 3927, RFC 4291 §2.5.6).
/// Resolvers and proxies are often at such.
const ON_THIS_MACHINE_OR_LINK: [IpNet; 4] = [
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8)),
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128)),
    IpNet::V6(Ipv6Net::new_assert(
        Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0),
        10,
    )),
];

/// The index of the loopback interface in every network namespace (`LOOPBACK_IFINDEX`, net/flow.h).
const LOOPBACK: u32 = 1;

/// What the configuration says of some interfaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UplinkRule {
    /// Which.
    pub interface: NamePattern,
    /// How much it is preferred; `None`: as its default route's metric says.
    pub weight: Option<u16>,
    /// What goes by it costs.
    pub metered: bool,
}

/// Whether what goes by the interface of this name costs: the first of `rules` that names it says so.
#[must_use]
pub fn is_metered(rules: &[UplinkRule], interface: &str) -> bool {
    let rule = rules.iter().find(|rule| rule.interface.matches(interface));
    rule.is_some_and(|rule| rule.metered)
}

/// An uplink and its interface's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedUplink {
    /// The name.
    pub name: String,
    /// What the core is told.
    pub told: Uplink,
    has_v4: bool,
    has_v6: bool,
}

/// All of them, and what is reached otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Network {
    /// The uplinks.
    pub uplinks: Vec<NamedUplink>,
    routes: Vec<(IpNet, IfIndex)>,
}

/// How the node's own connections get out: by the uplink in use, or, by default, as the kernel's routes say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Way {
    uplink: Option<Arc<(Egress, String)>>,
    metered: bool,
}

impl Way {
    /// The interface by which to reach `to`; `None`: as the kernel's routes say, because a LAN is nearer to it, or
    /// because it is in the mesh, or on this machine or link (a resolver on loopback or at 169.254.20.10, say).
    #[must_use]
    pub fn device(&self, to: IpAddr, snapshot: Option<&Snapshot>) -> Option<String> {
        let (egress, name) = &**self.uplink.as_ref()?;
        let outside = !snapshot.is_some_and(|all| is_inside(all, to));
        (outside && egress.towards(to).is_some()).then(|| name.clone())
    }

    /// Whether what goes to `to` costs. Into the mesh it costs what the packets around it do.
    #[must_use]
    pub fn costs(&self, to: IpAddr) -> bool {
        let leaves = |uplink: &Arc<(Egress, String)>| uplink.0.towards(to).is_some();
        self.metered && !to.is_loopback() && self.uplink.as_ref().is_some_and(leaves)
    }

    /// Whether what goes by the uplink in use costs.
    #[must_use]
    pub fn is_metered(&self) -> bool {
        self.metered
    }

    /// The interface in use; `None`: it is the kernel that chooses.
    #[must_use]
    pub fn interface(&self) -> Option<&str> {
        Some(&self.uplink.as_ref()?.1)
    }
}

/// Whether the mesh leads to `ip`: by a route into the tunnel, or as a service.
fn is_inside(snapshot: &Snapshot, ip: IpAddr) -> bool {
    let mesh = &snapshot.mesh;
    let overlay = match ip {
        IpAddr::V4(v4) => mesh.overlay_v4.contains(&v4),
        IpAddr::V6(v6) => mesh.id.ula_prefix().contains(&v6),
    };
    let mut nodes = snapshot.nodes.values();
    let mut services = snapshot.services.values();
    overlay
        || nodes.any(|node| node.prefixes.iter().any(|net| net.contains(&ip)))
        || services.any(|service| has(service, ip))
}

fn has(service: &Service, ip: IpAddr) -> bool {
    let virtual_ips = match &service.kind {
        ServiceKind::ClusterIp(ips) => ips.as_slice(),
        ServiceKind::Headless | ServiceKind::ExternalName(_) => &[],
    };
    let external = &service.external;
    [virtual_ips, &external.addresses, &external.load_balancer]
        .iter()
        .any(|ips| ips.contains(&ip))
}

impl Network {
    /// Sorts what the kernel says. The first of `rules` that names an interface counts. `port`: of the
    /// node's UDP sockets.
    #[must_use]
    pub fn new(ways: &Ways, rules: &[UplinkRule], port: u16) -> Self {
        let (uplinks, others): (Vec<_>, Vec<_>) = ways
            .interfaces
            .iter()
            .partition(|one| metric(one).is_some());
        let others = others.iter().filter(|one| one.up);
        let others: Vec<_> = others.flat_map(|one| &one.addresses).copied().collect();
        let uplinks = uplinks.into_iter().map(|one| {
            let rule = rules.iter().find(|rule| rule.interface.matches(&one.name));
            // An address of a family that leads nowhere from here proves nothing about the uplink.
            let (has_v4, has_v6) = (one.metric_v4.is_some(), one.metric_v6.is_some());
            let leads = |ip: &&IpAddr| if ip.is_ipv4() { has_v4 } else { has_v6 };
            let own: Vec<_> = one.addresses.iter().filter(leads).collect();
            // Peers on a LAN that is no uplink are reached whichever uplink is in use.
            let others = others.iter().filter(leads).filter(|_| !own.is_empty());
            let addresses = own.iter().copied().chain(others);
            let addresses = addresses.map(|&ip| SocketAddr::new(ip, port)).collect();
            let by_metric = metric(one).map_or(0, weight);
            NamedUplink {
                name: one.name.clone(),
                told: Uplink {
                    id: id(one.index),
                    addresses,
                    up: one.up,
                    metered: is_metered(rules, &one.name),
                    weight: rule.and_then(|rule| rule.weight).unwrap_or(by_metric),
                },
                has_v4,
                has_v6,
            }
        });
        // By loopback a machine reaches itself: an address of its own on a bridge, say, at which a resolver listens.
        let own = ways.interfaces.iter().flat_map(|one| &one.addresses);
        let own = own.filter_map(|&ip| Some((IpNet::from(ip), IfIndex::new(LOOPBACK)?)));
        let mut routes: Vec<_> = ways.routes.iter().copied().chain(own).collect();
        routes.sort_by_key(|(net, _)| net.prefix_len());
        routes.truncate(NEARER_MAX);
        Self {
            uplinks: uplinks.collect(),
            routes,
        }
    }

    /// The name of an uplink's interface.
    #[must_use]
    pub fn name(&self, id: UplinkId) -> Option<&str> {
        Some(&self.get(id)?.name)
    }

    /// Where the node's socket can be reached while this uplink is in use.
    #[must_use]
    pub fn addresses(&self, id: UplinkId) -> Vec<SocketAddr> {
        self.get(id)
            .map(|one| one.told.addresses.clone())
            .unwrap_or_default()
    }

    /// How packets leave while this uplink is in use: by it, but for what an interface that works is
    /// nearer to. What a metered one is nearer to, which is its modem, is not worth a packet by it.
    #[must_use]
    pub fn egress(&self, active: UplinkId) -> Option<Egress> {
        let link = IfIndex::new(active.0)?;
        let counts = |link: &IfIndex| match self.get(id(*link)) {
            Some(other) if other.told.id != active => other.told.up && !other.told.metered,
            Some(_) | None => true,
        };
        let nearer = self.routes.iter().filter(|(_, link)| counts(link));
        let nearer = nearer.map(|(net, _)| *net);
        let mut nearer: Vec<_> = nearer.chain(ON_THIS_MACHINE_OR_LINK).collect();
        // A family that this uplink does not have goes by one that does, unless it costs.
        let costs = |has: fn(&NamedUplink) -> bool| {
            let mut all = self.uplinks.iter();
            all.any(|one| one.told.metered && has(one))
        };
        let uplink = self.get(active)?;
        if !uplink.has_v4 && !costs(|one| one.has_v4) {
            nearer.push(Ipv4Net::default().into());
        }
        if !uplink.has_v6 && !costs(|one| one.has_v6) {
            nearer.push(Ipv6Net::default().into());
        }
        Some(Egress::new(link, &nearer))
    }

    /// How connections leave while this uplink is in use.
    #[must_use]
    pub fn way(&self, active: UplinkId) -> Way {
        let name = self.name(active).map(str::to_owned);
        let uplink = self.egress(active).zip(name).map(Arc::new);
        let metered = self.get(active).is_some_and(|one| one.told.metered);
        Way { uplink, metered }
    }

    /// Whether there is a choice among uplinks, or a word about one: otherwise the kernel's routes choose.
    #[must_use]
    pub fn has_choice(&self, rules: &[UplinkRule]) -> bool {
        !rules.is_empty() || self.uplinks.len() > 1
    }

    /// The ways out that there are, in the order in which the core would take them that knows nothing of them yet.
    #[must_use]
    pub fn ways(&self) -> Vec<Way> {
        let works = |one: &&NamedUplink| one.told.up && !one.told.addresses.is_empty();
        let mut all: Vec<_> = self.uplinks.iter().filter(works).collect();
        all.sort_by_key(|one| (one.told.metered, Reverse(one.told.weight), one.told.id));
        all.into_iter().map(|one| self.way(one.told.id)).collect()
    }

    fn get(&self, id: UplinkId) -> Option<&NamedUplink> {
        self.uplinks.iter().find(|one| one.told.id == id)
    }
}

fn id(index: IfIndex) -> UplinkId {
    UplinkId(index.0.get())
}

/// The better one of both families.
fn metric(interface: &Interface) -> Option<u32> {
    let both = [interface.metric_v4, interface.metric_v6];
    both.into_iter().flatten().min()
}

/// Metrics are preferred the lower they are; all from 65,535 on are alike.
fn weight(metric: u32) -> u16 {
    u16::MAX - u16::try_from(metric).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(number: u32) -> IfIndex {
        IfIndex::new(number).unwrap()
    }

    fn interface(number: u32, name: &str, metrics: [Option<u32>; 2], ips: &[&str]) -> Interface {
        Interface {
            index: index(number),
            name: name.to_owned(),
            up: true,
            addresses: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            metric_v4: metrics[0],
            metric_v6: metrics[1],
        }
    }

    /// A wired line, a modem, and a LAN of machines.
    fn ways() -> Ways {
        let net = |net: &str, link| (net.parse().unwrap(), index(link));
        Ways {
            interfaces: vec![
                interface(2, "eth0", [Some(100), None], &["192.168.1.11", "fd01::11"]),
                interface(
                    3,
                    "wwan0",
                    [Some(700), Some(1024)],
                    &["10.64.0.2", "2001:db8::2"],
                ),
                interface(4, "lan0", [None, None], &["10.7.0.1", "fd07::1"]),
            ],
            routes: vec![
                net("192.168.1.0/24", 2),
                net("10.64.0.0/24", 3),
                net("10.7.0.0/24", 4),
                net("fd07::/64", 4),
            ],
        }
    }

    fn rule(interface: &str, weight: Option<u16>, metered: bool) -> UplinkRule {
        UplinkRule {
            interface: NamePattern::new(interface.to_owned()),
            weight,
            metered,
        }
    }

    #[test]
    fn interfaces_with_a_default_route_are_uplinks_and_a_lower_metric_weighs_more() {
        let network = Network::new(&ways(), &[], 51_820);
        let shown = network.uplinks.iter().map(|one| {
            let addresses = one.told.addresses.iter().map(ToString::to_string);
            (
                one.name.as_str(),
                one.told.weight,
                addresses.collect::<Vec<_>>(),
            )
        });
        let wired = ["192.168.1.11:51820", "10.7.0.1:51820"].map(str::to_owned);
        let modem = [
            "10.64.0.2:51820",
            "[2001:db8::2]:51820",
            "10.7.0.1:51820",
            "[fd07::1]:51820",
        ];
        assert_eq!(
            shown.collect::<Vec<_>>(),
            [
                ("eth0", 65_435, wired.to_vec()),
                ("wwan0", 64_835, modem.map(str::to_owned).to_vec()),
            ]
        );
    }

    #[test]
    fn the_first_rule_that_names_an_interface_counts() {
        let rules = [
            rule("wwan*", Some(7), true),
            rule("*", None, false),
            rule("eth0", Some(1), true),
        ];
        let network = Network::new(&ways(), &rules, 1);
        let shown = network.uplinks.iter();
        let shown = shown.map(|one| (one.told.weight, one.told.metered));
        assert_eq!(shown.collect::<Vec<_>>(), [(65_435, false), (7, true)]);
    }

    #[test]
    fn an_uplink_without_an_address_of_its_own_has_none_by_others() {
        let mut ways = ways();
        ways.interfaces[0].addresses.clear();
        let network = Network::new(&ways, &[], 1);
        assert!(network.addresses(UplinkId(2)).is_empty());
    }

    #[track_caller]
    fn check(network: &Network, active: u32, expected: &[(&str, Option<u32>)]) {
        let egress = network.egress(UplinkId(active)).unwrap();
        for (ip, link) in expected {
            let found = egress.towards(ip.parse().unwrap());
            assert_eq!(found, link.map(index), "{ip}");
        }
    }

    #[test]
    fn packets_leave_by_the_uplink_in_use_but_for_what_a_lan_is_nearer_to() {
        let mut ways = ways();
        let network = Network::new(&ways, &[], 1);
        let far = ("198.51.100.1", Some(3));
        let lans = [
            ("192.168.1.7", None),
            ("10.7.0.7", None),
            ("10.64.0.1", None),
        ];
        check(
            &network,
            3,
            &[&[far, ("2001:db8:9::1", Some(3))], &lans[..]].concat(),
        );
        // A LAN whose cable is pulled is nowhere.
        ways.interfaces[0].up = false;
        let network = Network::new(&ways, &[], 1);
        check(
            &network,
            3,
            &[far, ("192.168.1.7", Some(3)), ("10.7.0.7", None)],
        );
    }

    #[test]
    fn what_is_on_this_machine_or_link_is_bound_to_no_uplink() {
        let network = Network::new(&ways(), &[rule("wwan0", None, true)], 1);
        // Its own addresses, of the modem that costs, too.
        let own = ["192.168.1.11", "10.64.0.2", "2001:db8::2", "10.7.0.1"];
        let near = [
            "127.0.0.53",
            "::1",
            "169.254.20.10",
            "fe80::1",
            "::ffff:127.0.0.1",
        ];
        for ip in own.into_iter().chain(near) {
            check(&network, 2, &[(ip, None)]);
            let device = network.way(UplinkId(2)).device(ip.parse().unwrap(), None);
            assert_eq!(device, None, "{ip}");
        }
        check(
            &network,
            2,
            &[("128.0.0.1", Some(2)), ("10.64.0.1", Some(2))],
        );
    }

    #[test]
    fn nothing_goes_by_a_metered_uplink_that_is_not_in_use() {
        let network = Network::new(&ways(), &[rule("wwan0", None, true)], 1);
        let own = [("198.51.100.1", Some(2)), ("192.168.1.7", None)];
        // Not to its modem's LAN, and not by the family that only it has.
        let modem = [("10.64.0.1", Some(2)), ("2001:db8:9::1", Some(2))];
        check(&network, 2, &[own, modem].concat());
        // Where it costs nothing, the family that only the other has goes by it.
        let network = Network::new(&ways(), &[], 1);
        check(&network, 2, &[("2001:db8:9::1", None), own[0]]);
    }
}
