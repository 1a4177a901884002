//! Links, addresses and routes by netlink: read, compare with what is wanted, and change only
//! what differs.
//!
//! Routes of ours carry [`ROUTE_PROTOCOL`]; no other route is ever touched. Ours that nobody
//! wants any more, such as those of a predecessor that was killed, go with the next
//! [`Netlink::apply_routes`].

mod changes;
mod forwarding;
mod lans;
mod lookup;
mod veth;
mod ways;

use std::{collections::BTreeSet, io, net::IpAddr, sync::Arc};

use futures_util::{Stream, TryStreamExt as _};
use ipnet::IpNet;
use netlink_packet_route::{
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage},
    link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
    route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
        RouteType,
    },
};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder, new_connection};
use tokio::sync::Mutex;

pub use self::{
    changes::{Change, Changes},
    forwarding::{Forwarding, ForwardingLink, Veth},
    lans::Lan,
    lookup::Towards,
    veth::{ExactRoute, LinkDetail, LinkRoute, NewVeth},
    ways::{Interface, Ways},
};
use crate::IfIndex;

/// The `proto` of our routes in `ip route`: a number that iproute2's `rt_protos` and the routing
/// daemons known to us leave free.
pub const ROUTE_PROTOCOL: u8 = 72;

/// A connection to the kernel's routing tables, in the network namespace of the thread that made
/// it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Netlink {
    handle: Handle,
    /// The kernel lists one table at a time on a socket, and refuses the second (`EBUSY`).
    turn: Arc<Mutex<()>>,
}

/// Why the kernel did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No interface has this name.
    #[error("there is no interface {0:?}")]
    NoLink(String),
    /// The kernel refused.
    #[error("cannot {what}")]
    Refused {
        /// What was attempted.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A route of ours: packets for `destination` leave by `link`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    /// Where to; without host bits (see [`Route::new`]).
    pub destination: IpNet,
    /// By what.
    pub link: IfIndex,
    /// The source address of packets that this machine makes, if not the kernel's choice.
    pub source: Option<IpAddr>,
}

impl Route {
    /// A route to all of `destination`'s prefix.
    #[must_use]
    pub fn new(destination: IpNet, link: IfIndex, source: Option<IpAddr>) -> Self {
        Self {
            destination: destination.trunc(),
            link,
            source,
        }
    }
}

/// The difference between what is wanted and what is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan<T> {
    /// There, and not wanted. Goes first, so that a changed entry can take its place.
    pub remove: Vec<T>,
    /// Wanted, and not there.
    pub add: Vec<T>,
}

/// Compares what is wanted with what is there. Pure: applying the plan makes the next one empty.
#[must_use]
pub fn plan<T: Ord + Clone>(desired: &BTreeSet<T>, actual: &BTreeSet<T>) -> Plan<T> {
    Plan {
        remove: actual.difference(desired).cloned().collect(),
        add: desired.difference(actual).cloned().collect(),
    }
}

/// What [`Netlink::apply_routes`] and [`Netlink::apply_addresses`] did.
#[derive(Debug, Default)]
pub struct Applied {
    /// Entries added.
    pub added: usize,
    /// Entries removed.
    pub removed: usize,
    /// What the kernel refused; all the rest was still done. Try again later.
    pub failed: Vec<NetlinkError>,
}

impl Applied {
    fn count(&mut self, add: bool, result: Result<(), NetlinkError>) {
        match (result, add) {
            (Ok(()), true) => self.added += 1,
            (Ok(()), false) => self.removed += 1,
            (Err(error), _) => self.failed.push(error),
        }
    }
}

/// How an interface is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkState {
    /// Somebody has taken it up.
    pub up: bool,
    /// Its MTU, if it has one.
    pub mtu_bytes: Option<u32>,
    /// What its packets begin with.
    pub header: LinkHeader,
}

/// What an interface's packets begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkHeader {
    /// Ethernet's header.
    Ethernet,
    /// The IP header: TUN devices and IP tunnels.
    Ip,
    /// Something else, by the kernel's number (`ARPHRD_…` in linux/if_arp.h).
    Other(u16),
}

impl LinkHeader {
    fn of(link: &LinkMessage) -> Self {
        use LinkLayerType as T;
        let layer = link.header.link_layer_type;
        // The loopback has one, too.
        if matches!(layer, T::Ether | T::Loopback) {
            Self::Ethernet
        } else if matches!(layer, T::None | T::Rawip | T::Tunnel | T::Tunnel6 | T::Sit) {
            Self::Ip
        } else {
            Self::Other(layer.into())
        }
    }
}

impl Netlink {
    /// Connects. The connection is served by a task on the current tokio runtime and ends with
    /// the last clone.
    ///
    /// # Errors
    ///
    /// If the kernel gives no netlink socket.
    pub fn connect() -> io::Result<Self> {
        let (connection, handle, _no_notifications) = new_connection()?;
        tokio::spawn(connection);
        let turn = Arc::default();
        Ok(Self { handle, turn })
    }

    /// The index of the interface `name`.
    ///
    /// # Errors
    ///
    /// [`NetlinkError::NoLink`] if there is none.
    pub async fn link_index(&self, name: &str) -> Result<IfIndex, NetlinkError> {
        let request = self.handle.link().get().match_name(name.to_owned());
        let what = || format!("look up interface {name:?}");
        let links = collect(what, request.execute()).await;
        let links = links.map_err(|error| {
            let absent = matches!(
                &error,
                NetlinkError::Refused { source, .. } if is(source, libc::ENODEV)
            );
            if absent {
                NetlinkError::NoLink(name.to_owned())
            } else {
                error
            }
        })?;
        let index = links
            .first()
            .and_then(|link| IfIndex::new(link.header.index));
        index.ok_or_else(|| NetlinkError::NoLink(name.to_owned()))
    }

    /// Sets the interface's MTU, and the longest super-packet that it is given (`gso_max_size`), and
    /// takes it up.
    ///
    /// # Errors
    ///
    /// If the kernel refuses the MTU, or the caller lacks `CAP_NET_ADMIN`.
    pub async fn set_link_up(
        &self,
        link: IfIndex,
        mtu_bytes: u32,
        super_packet_bytes: Option<u32>,
    ) -> Result<(), NetlinkError> {
        let mut message = rtnetlink::LinkMessageBuilder::<LinkUnspec>::new()
            .index(link.get())
            .mtu(mtu_bytes)
            .up()
            .build();
        let limit = super_packet_bytes.map(LinkAttribute::GsoMaxSize);
        message.attributes.extend(limit);
        let result = self.handle.link().set(message).execute().await;
        result.map_err(refused(|| {
            format!("take interface {link} up with MTU {mtu_bytes}")
        }))
    }

    /// How the interface is; `None` if there is none with this index in this network namespace.
    ///
    /// # Errors
    ///
    /// If the kernel does not answer.
    pub async fn link_state(&self, link: IfIndex) -> Result<Option<LinkState>, NetlinkError> {
        let request = self.handle.link().get().match_index(link.get());
        let what = || format!("look at interface {link}");
        let links = match collect(what, request.execute()).await {
            Err(NetlinkError::Refused { source, .. }) if is(&source, libc::ENODEV) => vec![],
            links => links?,
        };
        Ok(links.first().map(|link| LinkState {
            up: link.header.flags.contains(LinkFlags::Up),
            mtu_bytes: link.attributes.iter().find_map(|attribute| {
                if let LinkAttribute::Mtu(bytes) = attribute {
                    return Some(*bytes);
                }
                None
            }),
            header: LinkHeader::of(link),
        }))
    }

    /// Sets the interface's MTU.
    ///
    /// # Errors
    ///
    /// If the kernel refuses the MTU, or the caller lacks `CAP_NET_ADMIN`.
    pub async fn set_link_mtu(&self, link: IfIndex, mtu_bytes: u32) -> Result<(), NetlinkError> {
        let message = rtnetlink::LinkMessageBuilder::<LinkUnspec>::new()
            .index(link.get())
            .mtu(mtu_bytes)
            .build();
        let result = self.handle.link().set(message).execute().await;
        result.map_err(refused(|| {
            format!("give interface {link} the MTU {mtu_bytes}")
        }))
    }

    /// Makes the interface's addresses exactly `desired`; calling it again does nothing. Link-local ones that are not in it are
    /// the kernel's own business and stay.
    ///
    /// # Errors
    ///
    /// If the present addresses cannot be read; single refusals are in [`Applied::failed`].
    pub async fn apply_addresses(
        &self,
        link: IfIndex,
        desired: &BTreeSet<IpNet>,
    ) -> Result<Applied, NetlinkError> {
        let mut applied = Applied::default();
        let mut actual = self.all_addresses(link).await?;
        actual.retain(|net| desired.contains(net) || !is_link_local(net.addr()));
        let plan = plan(desired, &actual);
        for net in plan.remove {
            applied.count(false, self.remove_address(link, net).await);
        }
        for net in plan.add {
            let mut request = self
                .handle
                .address()
                .add(link.get(), net.addr(), net.prefix_len());
            // Nobody else is on a point-to-point link, and an address that is still being
            // checked cannot be the source of a route yet (IPv6; IPv4 ignores the flag).
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
            let result = done_unless(libc::EEXIST, request.execute().await);
            let what = || format!("add address {net} to interface {link}");
            applied.count(true, result.map_err(refused(what)));
        }
        Ok(applied)
    }

    /// The interface's addresses, without link-local ones.
    ///
    /// # Errors
    ///
    /// If the kernel does not answer.
    pub async fn addresses(&self, link: IfIndex) -> Result<BTreeSet<IpNet>, NetlinkError> {
        let mut all = self.all_addresses(link).await?;
        all.retain(|net| !is_link_local(net.addr()));
        Ok(all)
    }

    async fn all_addresses(&self, link: IfIndex) -> Result<BTreeSet<IpNet>, NetlinkError> {
        let messages = self.address_messages(link).await?;
        let nets = messages.iter().filter_map(|message| {
            IpNet::new(local_address(message)?, message.header.prefix_len).ok()
        });
        Ok(nets.collect())
    }

    async fn address_messages(&self, link: IfIndex) -> Result<Vec<AddressMessage>, NetlinkError> {
        let request = self
            .handle
            .address()
            .get()
            .set_link_index_filter(link.get());
        let _turn = self.turn.lock().await;
        collect(
            || format!("list the addresses of interface {link}"),
            request.execute(),
        )
        .await
    }

    async fn remove_address(&self, link: IfIndex, net: IpNet) -> Result<(), NetlinkError> {
        for message in self.address_messages(link).await? {
            let same = local_address(&message) == Some(net.addr())
                && message.header.prefix_len == net.prefix_len();
            if same {
                let result = self.handle.address().del(message).execute().await;
                let result = done_unless(libc::EADDRNOTAVAIL, result);
                let what = || format!("remove address {net} from interface {link}");
                return result.map_err(refused(what));
            }
        }
        Ok(())
    }

    /// Makes our routes in the main table exactly `desired`; calling it again does nothing.
    ///
    /// # Errors
    ///
    /// If the present routes cannot be read; single refusals (a foreign route to the same prefix)
    /// are in [`Applied::failed`], and all others are still applied.
    pub async fn apply_routes(&self, desired: &BTreeSet<Route>) -> Result<Applied, NetlinkError> {
        let mut applied = Applied::default();
        let plan = plan(desired, &self.routes().await?);
        for route in plan.remove {
            let mut message = message_of(&route)?;
            // Whatever its scope: a predecessor may have chosen another.
            message.header.scope = RouteScope::NoWhere;
            let request = self.handle.route().del(message);
            let result = done_unless(libc::ESRCH, request.execute().await);
            let what = || format!("remove the route to {}", route.destination);
            applied.count(false, result.map_err(refused(what)));
        }
        for route in plan.add {
            let request = self.handle.route().add(message_of(&route)?);
            let what = || format!("add a route to {}", route.destination);
            applied.count(true, request.execute().await.map_err(refused(what)));
        }
        Ok(applied)
    }

    /// Our routes in the main table, whoever of us made them.
    ///
    /// # Errors
    ///
    /// If the kernel does not answer.
    pub async fn routes(&self) -> Result<BTreeSet<Route>, NetlinkError> {
        let mut routes = BTreeSet::new();
        for family in [
            RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
            RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
        ] {
            let request = self.handle.route().get(family);
            let _turn = self.turn.lock().await;
            let messages = collect(|| "list the routes".to_owned(), request.execute()).await?;
            routes.extend(messages.iter().filter_map(own_route));
        }
        Ok(routes)
    }
}

async fn collect<T>(
    what: impl Fn() -> String,
    stream: impl Stream<Item = Result<T, rtnetlink::Error>>,
) -> Result<Vec<T>, NetlinkError> {
    stream.try_collect().await.map_err(refused(what))
}

fn refused(what: impl Fn() -> String) -> impl FnOnce(rtnetlink::Error) -> NetlinkError {
    move |error| NetlinkError::Refused {
        what: what(),
        source: if let rtnetlink::Error::NetlinkError(message) = error {
            message.to_io()
        } else {
            io::Error::other(error)
        },
    }
}

/// Turns one error of the kernel that means "it is so already" into success.
fn done_unless(done: i32, result: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    if let Err(rtnetlink::Error::NetlinkError(message)) = &result
        && is(&message.to_io(), done)
    {
        return Ok(());
    }
    result
}

fn is(error: &io::Error, code: i32) -> bool {
    error.raw_os_error() == Some(code)
}

fn message_of(route: &Route) -> Result<RouteMessage, NetlinkError> {
    let net = route.destination;
    let bad = |error| NetlinkError::Refused {
        what: format!("make a route to {net}"),
        source: io::Error::new(io::ErrorKind::InvalidInput, format!("{error:?}")),
    };
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .protocol(RouteProtocol::Other(ROUTE_PROTOCOL))
        .output_interface(route.link.get())
        .destination_prefix(net.addr(), net.prefix_len())
        .map_err(bad)?;
    if let Some(source) = route.source {
        builder = builder.pref_source(source).map_err(bad)?;
    }
    Ok(builder.build())
}

fn is_ours(message: &RouteMessage) -> bool {
    message.header.protocol == RouteProtocol::Other(ROUTE_PROTOCOL)
}

fn own_route(message: &RouteMessage) -> Option<Route> {
    let header = &message.header;
    let in_place = header.table == RouteHeader::RT_TABLE_MAIN && header.kind == RouteType::Unicast;
    if !is_ours(message) || !in_place {
        return None;
    }
    let (mut destination, mut link, mut source) = (None, None, None);
    for attribute in &message.attributes {
        if let RouteAttribute::Destination(address) = attribute {
            destination = ip_of(address);
        } else if let RouteAttribute::Oif(index) = attribute {
            link = IfIndex::new(*index);
        } else if let RouteAttribute::PrefSource(address) = attribute {
            source = ip_of(address);
        }
    }
    let destination = destination.unwrap_or(whole_family(header.address_family));
    let net = IpNet::new(destination, header.destination_prefix_length).ok()?;
    Some(Route::new(net, link?, source))
}

/// A route without destination is one to everywhere.
fn whole_family(family: netlink_packet_route::AddressFamily) -> IpAddr {
    if family == netlink_packet_route::AddressFamily::Inet {
        IpAddr::from([0; 4])
    } else {
        IpAddr::from([0; 16])
    }
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    if let RouteAddress::Inet(ip) = address {
        Some((*ip).into())
    } else if let RouteAddress::Inet6(ip) = address {
        Some((*ip).into())
    } else {
        None
    }
}

/// `IFA_LOCAL` if there, which differs from `IFA_ADDRESS` on point-to-point links.
fn local_address(message: &AddressMessage) -> Option<IpAddr> {
    let mut found = None;
    for attribute in &message.attributes {
        if let AddressAttribute::Local(ip) = attribute {
            return Some(*ip);
        }
        if let AddressAttribute::Address(ip) = attribute {
            found = Some(*ip);
        }
    }
    found
}

fn link_name(message: &LinkMessage) -> Option<String> {
    message.attributes.iter().find_map(|attribute| {
        if let LinkAttribute::IfName(name) = attribute {
            Some(name.clone())
        } else {
            None
        }
    })
}

/// It works, and leads to others.
fn is_uplink(link: &LinkMessage) -> bool {
    is_up(link) && leads_out(link)
}

/// Somebody has taken it up, and it has a carrier and is not dormant (`IFF_RUNNING` is the kernel's
/// operational state, RFC 2863).
fn is_up(link: &LinkMessage) -> bool {
    let flags = link.header.flags;
    flags.contains(LinkFlags::Up | LinkFlags::Running)
}

/// Neither a loopback nor another program's tunnel.
fn leads_out(link: &LinkMessage) -> bool {
    !link.header.flags.contains(LinkFlags::Loopback) && !is_layer_3_tunnel(link)
}

/// Another program's tunnel (a VPN of TUN or WireGuard kind, not a TAP device or a modem): packets
/// inside packets would go there, and its address says nothing about where this machine is.
fn is_layer_3_tunnel(link: &LinkMessage) -> bool {
    let tunnel = |info: &LinkInfo| {
        let LinkInfo::Kind(kind) = info else {
            return false;
        };
        matches!(kind, InfoKind::Tun | InfoKind::Wireguard)
    };
    let has_tunnel = |attribute: &LinkAttribute| {
        let LinkAttribute::LinkInfo(infos) = attribute else {
            return false;
        };
        infos.iter().any(tunnel)
    };
    let no_link_layer = link.header.link_layer_type == LinkLayerType::None;
    no_link_layer && link.attributes.iter().any(has_tunnel)
}

/// Neither waiting for duplicate address detection, nor failed, nor on its way out.
fn is_settled(message: &AddressMessage) -> bool {
    let unsettled = AddressHeaderFlags::Tentative
        | AddressHeaderFlags::Dadfailed
        | AddressHeaderFlags::Deprecated;
    !message.header.flags.intersects(unsettled)
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}
