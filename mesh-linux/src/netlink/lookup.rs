//! What the kernel does with packets to an address.

use std::{io, net::IpAddr};

use ipnet::IpNet;
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage, RouteType};
use rtnetlink::RouteMessageBuilder;

use super::{Netlink, NetlinkError, collect, ip_of, is, link_name, whole_family};
use crate::IfIndex;

/// Where packets to an address go, by the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Towards {
    /// The prefix of the route that counts; `None`: the kernel does not say.
    pub prefix: Option<IpNet>,
    /// By which interface.
    pub link: Option<IfIndex>,
    /// Its name.
    pub interface: String,
    /// The source address of packets whose socket chose none.
    pub source: Option<IpAddr>,
    /// The next hop; `None`: the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// The routing table (`ip route show table N`). Where no `ip rule` was ever added, the kernel has those of its own
    /// addresses in the main table.
    pub table: u32,
    /// `unicast`, `local`, `broadcast`, `multicast`.
    pub kind: &'static str,
}

impl Netlink {
    /// By which interface packets from `source` with this mark leave for `destination`.
    ///
    /// # Errors
    ///
    /// If there is no way, or `source` is not this machine's.
    pub async fn link_towards(
        &self,
        destination: IpAddr,
        source: IpAddr,
        mark: u32,
    ) -> Result<Option<IfIndex>, NetlinkError> {
        let mut message = question(destination, Some(source))?;
        message.attributes.push(RouteAttribute::Mark(mark));
        let request = self.handle.route().get(message);
        let what = || format!("find a route from {source} to {destination}");
        let routes = collect(what, request.execute()).await?;
        Ok(routes.first().and_then(|route| Said::of(route).link))
    }

    /// What becomes of packets to `destination` that a process of this machine makes, and has not said from which address.
    /// `None`: there is no way.
    ///
    /// # Errors
    ///
    /// If a rule or a route forbids it, or the kernel does not answer.
    pub async fn towards(&self, destination: IpAddr) -> Result<Option<Towards>, NetlinkError> {
        let what = || format!("find a route to {destination}");
        let request = self.handle.route().get(question(destination, None)?);
        let routes = match collect(what, request.execute()).await {
            Err(NetlinkError::Refused { source, .. }) if is(&source, libc::ENETUNREACH) => vec![],
            routes => routes?,
        };
        let Some(route) = routes.first() else {
            return Ok(None);
        };
        let said = Said::of(route);
        // The route itself, with its prefix and its table, instead of what it comes to.
        let mut message = question(destination, None)?;
        message.header.flags = RouteFlags::FibMatch | RouteFlags::LookupTable;
        let request = self.handle.route().get(message);
        let entries = collect(what, request.execute()).await?;
        let entry = entries.first().unwrap_or(route);
        let found = Said::of(entry);
        let to = found.destination;
        let to = to.unwrap_or(whole_family(entry.header.address_family));
        Ok(Some(Towards {
            prefix: IpNet::new(to, entry.header.destination_prefix_length).ok(),
            link: said.link,
            interface: match said.link {
                Some(link) => self.link_name(link).await?,
                None => String::new(),
            },
            source: said.source,
            gateway: said.gateway,
            table: found.table.unwrap_or_else(|| entry.header.table.into()),
            kind: kind(route.header.kind),
        }))
    }

    /// Empty if it went away.
    async fn link_name(&self, link: IfIndex) -> Result<String, NetlinkError> {
        let request = self.handle.link().get().match_index(link.get());
        let what = || format!("look at interface {link}");
        let links = match collect(what, request.execute()).await {
            Err(NetlinkError::Refused { source, .. }) if is(&source, libc::ENODEV) => vec![],
            links => links?,
        };
        Ok(links.first().and_then(link_name).unwrap_or_default())
    }
}

fn question(destination: IpAddr, source: Option<IpAddr>) -> Result<RouteMessage, NetlinkError> {
    let whole = |address| (address, IpNet::from(address).prefix_len());
    let (to, length) = whole(destination);
    let asked = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(to, length)
        .and_then(|builder| match source.map(whole) {
            Some((from, length)) => builder.source_prefix(from, length),
            None => Ok(builder),
        });
    let asked = asked.map_err(|error| NetlinkError::Refused {
        what: format!("ask for a route to {destination}"),
        source: io::Error::new(io::ErrorKind::InvalidInput, format!("{error:?}")),
    });
    Ok(asked?.build())
}

/// What a message has of that.
#[derive(Default)]
struct Said {
    destination: Option<IpAddr>,
    link: Option<IfIndex>,
    source: Option<IpAddr>,
    gateway: Option<IpAddr>,
    table: Option<u32>,
}

impl Said {
    fn of(route: &RouteMessage) -> Self {
        let mut said = Self::default();
        for attribute in &route.attributes {
            if let RouteAttribute::Destination(address) = attribute {
                said.destination = ip_of(address);
            } else if let RouteAttribute::Oif(index) = attribute {
                said.link = IfIndex::new(*index);
            } else if let RouteAttribute::PrefSource(address) = attribute {
                said.source = ip_of(address);
            } else if let RouteAttribute::Gateway(address) = attribute {
                said.gateway = ip_of(address);
            } else if let RouteAttribute::Table(number) = attribute {
                said.table = Some(*number);
            }
        }
        said
    }
}

fn kind(kind: RouteType) -> &'static str {
    const KINDS: [(RouteType, &str); 5] = [
        (RouteType::Unicast, "unicast"),
        (RouteType::Local, "local"),
        (RouteType::Broadcast, "broadcast"),
        (RouteType::Anycast, "anycast"),
        (RouteType::Multicast, "multicast"),
    ];
    let known = KINDS.iter().find(|(one, _)| *one == kind);
    known.map_or("other", |(_, name)| name)
}
