//! How this machine hands packets on: all its interfaces and routes, for those who do the same in its place.

use std::collections::BTreeMap;

use ipnet::IpNet;
use netlink_packet_route::{
    link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
    route::{RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use rtnetlink::{IpVersion, RouteMessageBuilder};

use super::{Netlink, NetlinkError, collect, ip_of, link_name, whole_family};
use crate::IfIndex;

/// `RT_TABLE_LOCAL` and the others that every machine has, in the order in which they are asked
/// (linux/rtnetlink.h).
const TABLES: [u32; 3] = [LOCAL, 254, 253];
const LOCAL: u32 = 255;

/// What decides where a packet goes that is not for this machine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Forwarding {
    /// All interfaces.
    pub links: BTreeMap<IfIndex, ForwardingLink>,
    /// All prefixes, and by which interface their packets leave. `None`: they are for this machine, or not handed on
    /// as they are.
    pub routes: BTreeMap<IpNet, Option<IfIndex>>,
    /// Whether the destination alone decides: there is no rule (`ip rule`) but those that every machine has.
    pub by_destination: bool,
}

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwardingLink {
    /// Its name.
    pub name: String,
    /// Somebody has taken it up.
    pub is_up: bool,
    /// The bridge, bond or VRF of which it is a part.
    pub part_of: Option<IfIndex>,
    /// It is a bridge.
    pub is_bridge: bool,
    /// It is a TAP device: a virtual machine's, mostly.
    pub is_tap: bool,
    /// Its MTU.
    pub mtu_bytes: u32,
    /// If it is a veth whose other end is in another network namespace.
    pub veth: Option<Veth>,
}

/// The link-layer addresses of a veth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Veth {
    /// Of the end that is here.
    pub mac: [u8; 6],
    /// Of the other end.
    pub peer_mac: [u8; 6],
}

impl Netlink {
    /// How packets are handed on now.
    ///
    /// # Errors
    ///
    /// If the kernel does not answer.
    pub async fn forwarding(&self) -> Result<Forwarding, NetlinkError> {
        let mut links = BTreeMap::new();
        for message in self.all_links().await? {
            let Some(index) = IfIndex::new(message.header.index) else {
                continue;
            };
            let veth = match Peer::of(&message) {
                Some(peer) => self.veth(&message, peer).await,
                None => None,
            };
            if let Some(link) = link_of(&message, veth) {
                links.insert(index, link);
            }
        }
        let _turn = self.turn.lock().await;
        let (mut routes, mut rules) = (Vec::new(), Vec::new());
        for request in [
            RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
            RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
        ] {
            let request = self.handle.route().get(request);
            routes.extend(collect(|| "list the routes".to_owned(), request.execute()).await?);
        }
        for version in [IpVersion::V4, IpVersion::V6] {
            let request = self.handle.rule().get(version);
            rules.extend(collect(|| "list the routing rules".to_owned(), request.execute()).await?);
        }
        Ok(Forwarding {
            links,
            routes: effective(&routes),
            by_destination: rules.iter().all(is_everywhere),
        })
    }

    async fn all_links(&self) -> Result<Vec<LinkMessage>, NetlinkError> {
        let _turn = self.turn.lock().await;
        let request = self.handle.link().get();
        collect(|| "list the interfaces".to_owned(), request.execute()).await
    }

    /// Asks the other namespace (`IFLA_TARGET_NETNSID`, Linux 4.16). It may be gone by now.
    async fn veth(&self, link: &LinkMessage, peer: Peer) -> Option<Veth> {
        let mut request = self.handle.link().get().match_index(peer.index);
        let namespace = LinkAttribute::IfNetnsId(peer.namespace);
        request.message_mut().attributes.push(namespace);
        let _turn = self.turn.lock().await;
        let what = || format!("look at interface {} of a pod", peer.index);
        let found = collect(what, request.execute()).await.ok()?;
        Some(Veth {
            mac: mac_of(link)?,
            peer_mac: mac_of(found.first()?)?,
        })
    }
}

/// The other end of a veth, in another namespace.
#[derive(Debug, Clone, Copy)]
struct Peer {
    namespace: i32,
    index: u32,
}

impl Peer {
    fn of(link: &LinkMessage) -> Option<Self> {
        let (mut is_veth, mut namespace, mut index) = (false, None, None);
        for attribute in &link.attributes {
            if let LinkAttribute::LinkInfo(infos) = attribute {
                is_veth = infos.contains(&LinkInfo::Kind(InfoKind::Veth));
            } else if let LinkAttribute::LinkNetNsId(id) = attribute {
                namespace = Some(*id).filter(|id| *id >= 0);
            } else if let LinkAttribute::Link(other) = attribute {
                index = Some(*other);
            }
        }
        Some(Self {
            namespace: namespace.filter(|_| is_veth)?,
            index: index?,
        })
    }
}

pub(super) fn mac_of(link: &LinkMessage) -> Option<[u8; 6]> {
    link.attributes.iter().find_map(|attribute| {
        if let LinkAttribute::Address(bytes) = attribute {
            return bytes.as_slice().try_into().ok();
        }
        None
    })
}

fn link_of(message: &LinkMessage, veth: Option<Veth>) -> Option<ForwardingLink> {
    let (mut mtu, mut part_of) = (None, None);
    let (mut is_bridge, mut is_tun) = (false, false);
    for attribute in &message.attributes {
        if let LinkAttribute::Mtu(bytes) = attribute {
            mtu = Some(*bytes);
        } else if let LinkAttribute::Controller(index) = attribute {
            part_of = IfIndex::new(*index);
        } else if let LinkAttribute::LinkInfo(infos) = attribute {
            is_bridge = infos.contains(&LinkInfo::Kind(InfoKind::Bridge));
            is_tun = infos.contains(&LinkInfo::Kind(InfoKind::Tun));
        }
    }
    Some(ForwardingLink {
        name: link_name(message)?,
        is_up: message.header.flags.contains(LinkFlags::Up),
        part_of,
        is_bridge,
        is_tap: is_tun && message.header.link_layer_type == LinkLayerType::Ether,
        mtu_bytes: mtu?,
        veth,
    })
}

/// Of several routes to a prefix, the one that is taken: of this machine's own addresses first, then the lowest metric.
fn effective(messages: &[RouteMessage]) -> BTreeMap<IpNet, Option<IfIndex>> {
    let known = messages.iter().filter_map(Known::of);
    let mut best: BTreeMap<IpNet, Known> = BTreeMap::new();
    for route in known {
        let place = best.entry(route.net).or_insert(route);
        if route.rank() < place.rank() {
            *place = route;
        } else if route.rank() == place.rank() && route.link != place.link {
            place.link = None; // By several at once.
        }
    }
    let local = best.values().filter(|route| route.is_local);
    let local: Vec<_> = local.map(|route| route.net).collect();
    let link = |route: &Known| {
        // That table is asked first, for whatever prefix it has.
        let hidden =
            |own: &IpNet| own.prefix_len() < route.net.prefix_len() && own.contains(&route.net);
        route.link.filter(|_| !local.iter().any(hidden))
    };
    best.values()
        .map(|route| (route.net, link(route)))
        .collect()
}

/// A route of the tables that every machine asks.
#[derive(Debug, Clone, Copy)]
struct Known {
    net: IpNet,
    is_local: bool,
    metric: u32,
    /// If it is all that the route says.
    link: Option<IfIndex>,
}

impl Known {
    fn of(message: &RouteMessage) -> Option<Self> {
        let header = &message.header;
        let mut table = u32::from(header.table);
        let (mut metric, mut destination, mut link) =
            (0, whole_family(header.address_family), None);
        let mut is_plain = header.kind == RouteType::Unicast
            && header.tos == 0
            && header.source_prefix_length == 0
            && !header
                .flags
                .intersects(RouteFlags::Dead | RouteFlags::Linkdown);
        for attribute in &message.attributes {
            use RouteAttribute as A;
            if let A::Table(number) = attribute {
                table = *number;
            } else if let A::Priority(number) = attribute {
                metric = *number;
            } else if let A::Destination(address) = attribute {
                destination = ip_of(address)?;
            } else if let A::Oif(index) = attribute {
                link = IfIndex::new(*index);
            } else if let A::Metrics(metrics) = attribute {
                is_plain &= !metrics.iter().any(is_for_forwarding);
            } else if let A::MultiPath(_) | A::Encap(_) | A::EncapType(_) | A::NhId(_) = attribute {
                is_plain = false; // Several ways, or a header to add.
            }
        }
        // IPv6 lists what it remembers of paths as well.
        if !TABLES.contains(&table) || header.flags.contains(RouteFlags::Cloned) {
            return None;
        }
        let net = IpNet::new(destination, header.destination_prefix_length).ok()?;
        Some(Self {
            net: net.trunc(),
            is_local: table == LOCAL,
            metric,
            link: link.filter(|_| is_plain && table == u32::from(RouteHeader::RT_TABLE_MAIN)),
        })
    }

    /// The last table is asked for what no other has.
    fn rank(&self) -> (bool, u32) {
        (!self.is_local, self.metric)
    }
}

/// Whether packets are handed on by it. All others of a route's metrics are for connections that end on this machine
/// (`RTAX_*` of linux/rtnetlink.h).
fn is_for_forwarding(metric: &RouteMetric) -> bool {
    matches!(metric, RouteMetric::Mtu(_) | RouteMetric::Other(_))
}

/// Whether it is one of the rules that every machine has.
fn is_everywhere(rule: &RuleMessage) -> bool {
    use RuleAttribute as A;
    let plain = |attribute: &A| {
        matches!(
            attribute,
            A::Table(_) | A::Priority(_) | A::Protocol(_) | A::SuppressPrefixLen(u32::MAX)
        )
    };
    let number = rule.attributes.iter().find_map(|attribute| {
        if let A::Table(number) = attribute {
            return Some(*number);
        }
        None
    });
    let header = &rule.header;
    let anybody = (header.dst_len, header.src_len, header.tos) == (0, 0, 0);
    let table = number.unwrap_or(header.table.into());
    anybody
        && header.action == RuleAction::ToTable
        && TABLES.contains(&table)
        && rule.attributes.iter().all(plain)
}
