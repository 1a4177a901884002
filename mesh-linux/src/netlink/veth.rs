//! A veth whose other end is in another network namespace, and what makes both ends reachable: addresses, routes and
//! neighbours that are said, so that no end ever has to ask for them.

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use ipnet::IpNet;
use netlink_packet_route::{
    address::AddressHeaderFlags,
    link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope},
};
use rtnetlink::{
    LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder, packet_core::DefaultNla,
};

use super::{
    Netlink, NetlinkError, collect, done_unless, forwarding::mac_of, ip_of, is, link_name, refused,
    whole_family,
};
use crate::IfIndex;

/// A veth to be made.
#[derive(Debug, Clone, Copy)]
pub struct NewVeth<'a> {
    /// The name of the end that is here.
    pub name: &'a str,
    /// Its link-layer address. One that is said is left alone by udev.
    pub mac: [u8; 6],
    /// The name of the other end.
    pub peer_name: &'a str,
    /// Its link-layer address.
    pub peer_mac: [u8; 6],
    /// Where the other end is made: it is never seen here.
    pub peer_namespace: BorrowedFd<'a>,
    /// The MTU of both.
    pub mtu_bytes: u32,
}

/// An interface, as far as it is of use to who makes veths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkDetail {
    /// Its index.
    pub index: IfIndex,
    /// Its name.
    pub name: String,
    /// Somebody has taken it up.
    pub is_up: bool,
    /// Its MTU, if it has one.
    pub mtu_bytes: Option<u32>,
    /// Its link-layer address, if that is one of Ethernet.
    pub mac: Option<[u8; 6]>,
    /// What somebody noted at it.
    pub alias: Option<String>,
    /// The index of its other end, in whichever namespace that is, if it is a veth.
    pub veth_peer: Option<IfIndex>,
    /// The bridge, bond or VRF of which it is a part.
    pub part_of: Option<IfIndex>,
    /// It is a bridge.
    pub is_bridge: bool,
}

/// Where packets for one address go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExactRoute {
    /// By this interface, if it is one.
    pub link: Option<IfIndex>,
}

/// A route by an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LinkRoute {
    /// Where to.
    pub destination: IpNet,
    /// By whom; `None`: the destination is on the link.
    pub gateway: Option<IpAddr>,
}

impl Netlink {
    /// Makes a veth whose ends are down. Take both up before their state is asked for: the kernel waits for all packets
    /// under way when it notices that one is up without the other. Each has one queue: a veth hands packets on at once,
    /// and what the kernel makes for each core's queue is most of the time that this takes.
    ///
    /// # Errors
    ///
    /// If a name is taken on its side ([`io::ErrorKind::AlreadyExists`]), or the kernel refuses.
    pub async fn add_veth(&self, new: NewVeth<'_>) -> Result<(), NetlinkError> {
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(new.peer_name)
            .address(new.peer_mac.to_vec())
            .mtu(new.mtu_bytes)
            .append_extra_attribute(LinkAttribute::NumTxQueues(1))
            .append_extra_attribute(LinkAttribute::NumRxQueues(1))
            .setns_by_fd(new.peer_namespace.as_raw_fd())
            .build();
        let message = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(new.name)
            .address(new.mac.to_vec())
            .mtu(new.mtu_bytes)
            .append_extra_attribute(LinkAttribute::NumTxQueues(1))
            .append_extra_attribute(LinkAttribute::NumRxQueues(1))
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .build();
        let result = self.handle.link().add(message).execute().await;
        result.map_err(refused(|| {
            let NewVeth {
                name, peer_name, ..
            } = new;
            format!("make the veth {name:?} with {peer_name:?} at its other end")
        }))
    }

    /// Takes the interface up.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub async fn set_up(&self, link: IfIndex) -> Result<(), NetlinkError> {
        let message = LinkMessageBuilder::<LinkUnspec>::new()
            .index(link.get())
            .up()
            .build();
        let result = self.handle.link().set(message).execute().await;
        result.map_err(refused(|| format!("take interface {link} up")))
    }

    /// Takes the interface up as one behind which somebody else is: notes `alias` at it (at most 255 bytes), forwards
    /// IPv4 packets that come in by it, and drops those whose source is not routed there. All at once, for the files
    /// of `/proc/sys` that do the same make their writers spin while the kernel is busy with other interfaces.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub async fn set_up_for_another(&self, link: IfIndex, alias: &str) -> Result<(), NetlinkError> {
        let settings = [(IPV4_FORWARDING, 1), (IPV4_RP_FILTER, 1)];
        let settings =
            settings.map(|(setting, value): (u16, u32)| attribute(setting, &value.to_ne_bytes()));
        let family = attribute(AF_INET, &attribute(IFLA_INET_CONF, &settings.concat()));
        let message = LinkMessageBuilder::<LinkUnspec>::new()
            .index(link.get())
            .alias(alias)
            .append_extra_attribute(LinkAttribute::Other(DefaultNla::new(IFLA_AF_SPEC, family)))
            .up()
            .build();
        let result = self.handle.link().set(message).execute().await;
        result.map_err(refused(|| format!("take interface {link} up as {alias:?}")))
    }

    /// Removes the interface; of a veth both ends go. One that is gone is fine.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub async fn remove_link(&self, link: IfIndex) -> Result<(), NetlinkError> {
        let result = self.handle.link().del(link.get()).execute().await;
        let result = done_unless(libc::ENODEV, result);
        result.map_err(refused(|| format!("remove interface {link}")))
    }

    /// The interface `name`, if there is one.
    ///
    /// # Errors
    ///
    /// If the kernel does not answer.
    pub async fn find_link(&self, name: &str) -> Result<Option<LinkDetail>, NetlinkError> {
        let request = self.handle.link().get().match_name(name.to_owned());
        let what = || format!("look up interface {name:?}");
        detail(collect(what, request.execute()).await)
    }

    /// The interface with this index, if there is one.
    ///
    /// # Errors
    ///
    /// If the kernel does not answer.
    pub async fn look_at_link(&self, link: IfIndex) -> Result<Option<LinkDetail>, NetlinkError> {
        let request = self.handle.link().get().match_index(link.get());
        let what = || format!("look at interface {link}");
        detail(collect(what, request.execute()).await)
    }

    /// All interfaces.
    ///
    /// # Errors
    ///
    /// If the kernel does not answer.
    pub async fn links(&self) -> Result<Vec<LinkDetail>, NetlinkError> {
        let _turn = self.turn.lock().await;
        let request = self.handle.link().get();
        let links = collect(|| "list the interfaces".to_owned(), request.execute()).await?;
        Ok(links.iter().filter_map(detail_of).collect())
    }

    /// Gives the interface an address that is usable at once.
    ///
    /// # Errors
    ///
    /// If it has the address already, or the kernel refuses (IPv6 may be off there).
    pub async fn add_address(&self, link: IfIndex, net: IpNet) -> Result<(), NetlinkError> {
        let addresses = self.handle.address();
        let mut request = addresses.add(link.get(), net.addr(), net.prefix_len());
        request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        let result = request.execute().await;
        result.map_err(refused(|| format!("add address {net} to interface {link}")))
    }

    /// Adds a route to the main table. A gateway counts as being on the link, whatever the addresses say.
    ///
    /// # Errors
    ///
    /// If there is one to this destination ([`io::ErrorKind::AlreadyExists`]), or the kernel refuses.
    pub async fn add_route(
        &self,
        link: IfIndex,
        route: LinkRoute,
        protocol: u8,
    ) -> Result<(), NetlinkError> {
        let LinkRoute {
            destination,
            gateway,
        } = route;
        let what = || format!("add a route to {destination} by interface {link}");
        let bad = |error| NetlinkError::Refused {
            what: what(),
            source: io::Error::new(io::ErrorKind::InvalidInput, format!("{error:?}")),
        };
        let mut builder = RouteMessageBuilder::<IpAddr>::new()
            .protocol(RouteProtocol::Other(protocol))
            .output_interface(link.get())
            .destination_prefix(destination.addr(), destination.prefix_len())
            .map_err(bad)?;
        builder = match gateway {
            Some(gateway) => builder.gateway(gateway).map_err(bad)?.onlink(),
            None => builder.scope(RouteScope::Link),
        };
        let result = self.handle.route().add(builder.build()).execute().await;
        result.map_err(refused(what))
    }

    /// The routes of the main table by this interface.
    ///
    /// # Errors
    ///
    /// If the kernel does not answer.
    pub async fn routes_by(&self, link: IfIndex) -> Result<Vec<LinkRoute>, NetlinkError> {
        let mut found = Vec::new();
        for family in [
            RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
            RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
        ] {
            let request = self.handle.route().get(family);
            let _turn = self.turn.lock().await;
            let messages = collect(|| "list the routes".to_owned(), request.execute()).await?;
            found.extend(messages.iter().filter_map(|message| by(message, link)));
        }
        Ok(found)
    }

    /// The route to this address and no other, of a pod or of this machine itself; `None` if there is only one to a
    /// larger prefix, or none.
    ///
    /// # Errors
    ///
    /// If the kernel does not answer.
    pub async fn exact_route(&self, address: IpAddr) -> Result<Option<ExactRoute>, NetlinkError> {
        let whole = IpNet::from(address).prefix_len();
        let what = || format!("find the route to {address}");
        let mut message = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(address, whole)
            .map_err(|error| NetlinkError::Refused {
                what: what(),
                source: io::Error::new(io::ErrorKind::InvalidInput, format!("{error:?}")),
            })?
            .build();
        message.header.flags |= RouteFlags::FibMatch;
        let routes = match collect(what, self.handle.route().get(message).execute()).await {
            Ok(routes) => routes,
            // No route, or one that refuses: `unreachable`, `prohibit`, `blackhole`, in this order.
            Err(NetlinkError::Refused { source, .. })
                if [
                    libc::ENETUNREACH,
                    libc::EHOSTUNREACH,
                    libc::EACCES,
                    libc::EINVAL,
                ]
                .iter()
                .any(|code| is(&source, *code)) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let exact = routes
            .iter()
            .find(|route| route.header.destination_prefix_length == whole);
        Ok(exact.map(|route| ExactRoute { link: oif(route) }))
    }

    /// Says for good which link-layer address `address` has on this link.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub async fn set_neighbour(
        &self,
        link: IfIndex,
        address: IpAddr,
        mac: [u8; 6],
    ) -> Result<(), NetlinkError> {
        let request = self.handle.neighbours().add(link.get(), address);
        let request = request.link_layer_address(&mac).replace();
        let result = request.execute().await;
        result.map_err(refused(|| {
            format!("set the neighbour {address} of interface {link}")
        }))
    }

    /// The neighbours on this link that were said for good.
    ///
    /// # Errors
    ///
    /// If the kernel does not answer.
    pub async fn permanent_neighbours(
        &self,
        link: IfIndex,
    ) -> Result<BTreeMap<IpAddr, [u8; 6]>, NetlinkError> {
        let _turn = self.turn.lock().await;
        let mut request = self.handle.neighbours().get();
        // Asks for this link alone; kernels that do not look at it list all.
        request.message_mut().header.ifindex = link.get();
        let messages = collect(|| "list the neighbours".to_owned(), request.execute()).await?;
        let own = messages.iter().filter(|message| {
            message.header.ifindex == link.get()
                && message.header.state == NeighbourState::Permanent
        });
        Ok(own.filter_map(neighbour).collect())
    }
}

/// Of linux/if_link.h, linux/socket.h and linux/ip.h (`IPV4_DEVCONF_…`).
const IFLA_AF_SPEC: u16 = 26;
const AF_INET: u16 = 2;
const IFLA_INET_CONF: u16 = 1;
const IPV4_FORWARDING: u16 = 1;
const IPV4_RP_FILTER: u16 = 8;

/// `struct nlattr` of linux/netlink.h, with what it holds; all of ours are multiples of four bytes.
fn attribute(kind: u16, content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(content.len() + 4).unwrap_or(u16::MAX);
    [&length.to_ne_bytes(), &kind.to_ne_bytes(), content].concat()
}

/// The one interface that was asked for, if it is there.
fn detail(
    links: Result<Vec<LinkMessage>, NetlinkError>,
) -> Result<Option<LinkDetail>, NetlinkError> {
    match links {
        Err(NetlinkError::Refused { source, .. }) if is(&source, libc::ENODEV) => Ok(None),
        links => Ok(links?.first().and_then(detail_of)),
    }
}

fn detail_of(message: &LinkMessage) -> Option<LinkDetail> {
    let (mut mtu_bytes, mut alias, mut peer, mut is_veth) = (None, None, None, false);
    let (mut part_of, mut is_bridge) = (None, false);
    for attribute in &message.attributes {
        if let LinkAttribute::Mtu(bytes) = attribute {
            mtu_bytes = Some(*bytes);
        } else if let LinkAttribute::Controller(index) = attribute {
            part_of = IfIndex::new(*index);
        } else if let LinkAttribute::IfAlias(text) = attribute {
            alias = Some(text.clone());
        } else if let LinkAttribute::Link(other) = attribute {
            peer = IfIndex::new(*other);
        } else if let LinkAttribute::LinkInfo(infos) = attribute {
            is_veth = infos.contains(&LinkInfo::Kind(InfoKind::Veth));
            is_bridge = infos.contains(&LinkInfo::Kind(InfoKind::Bridge));
        }
    }
    Some(LinkDetail {
        index: IfIndex::new(message.header.index)?,
        name: link_name(message)?,
        is_up: message.header.flags.contains(LinkFlags::Up),
        mtu_bytes,
        mac: mac_of(message),
        alias,
        veth_peer: peer.filter(|_| is_veth),
        part_of,
        is_bridge,
    })
}

fn oif(message: &RouteMessage) -> Option<IfIndex> {
    message.attributes.iter().find_map(|attribute| {
        if let RouteAttribute::Oif(index) = attribute {
            return IfIndex::new(*index);
        }
        None
    })
}

fn by(message: &RouteMessage, link: IfIndex) -> Option<LinkRoute> {
    let header = &message.header;
    if oif(message) != Some(link) || header.table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let (mut destination, mut gateway) = (whole_family(header.address_family), None);
    for attribute in &message.attributes {
        if let RouteAttribute::Destination(address) = attribute {
            destination = ip_of(address)?;
        } else if let RouteAttribute::Gateway(address) = attribute {
            gateway = ip_of(address);
        }
    }
    let destination = IpNet::new(destination, header.destination_prefix_length).ok()?;
    Some(LinkRoute {
        destination,
        gateway,
    })
}

fn neighbour(message: &NeighbourMessage) -> Option<(IpAddr, [u8; 6])> {
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        if let NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) = attribute {
            address = Some(IpAddr::from(*ip));
        } else if let NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) = attribute {
            address = Some(IpAddr::from(*ip));
        } else if let NeighbourAttribute::LinkLayerAddress(bytes) = attribute {
            mac = bytes.as_slice().try_into().ok();
        }
    }
    Some((address?, mac?))
}
