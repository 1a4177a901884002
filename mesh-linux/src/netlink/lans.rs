//! The networks that this machine is a part of: who is on them, and which gateway leads out of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use ipnet::IpNet;
use netlink_packet_route::{
    link::LinkFlags,
    route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType},
};
use rtnetlink::RouteMessageBuilder;

use super::{Netlink, NetlinkError, collect, is_settled, is_uplink, link_name, local_address};
use crate::IfIndex;

/// A network that this machine is a part of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lan {
    /// The interface's index.
    pub index: IfIndex,
    /// The interface's name.
    pub name: String,
    /// The machine's addresses there, each with the length of its network's prefix; link-local ones, too.
    pub addresses: BTreeSet<IpNet>,
    /// Default gateways by this interface, in the main table.
    pub gateways: BTreeSet<Ipv4Addr>,
    /// The interface carries multicast.
    pub multicast: bool,
}

impl Netlink {
    /// The networks of this machine: its interfaces that are up and have a carrier and an address, without loopbacks,
    /// other programs' tunnels, and the interface named `except`.
    ///
    /// # Errors
    ///
    /// If the kernel does not answer.
    pub async fn lans(&self, except: &str) -> Result<Vec<Lan>, NetlinkError> {
        let _turn = self.turn.lock().await;
        let links = self.handle.link().get().execute();
        let links = collect(|| "list the interfaces".to_owned(), links).await?;
        let messages = self.handle.address().get().execute();
        let messages = collect(|| "list the addresses".to_owned(), messages).await?;
        let request = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let routes = self.handle.route().get(request).execute();
        let routes = collect(|| "list the routes".to_owned(), routes).await?;

        let mut addresses: BTreeMap<u32, BTreeSet<IpNet>> = BTreeMap::new();
        for message in messages.iter().filter(|message| is_settled(message)) {
            let net = local_address(message)
                .and_then(|ip| IpNet::new(ip, message.header.prefix_len).ok());
            addresses
                .entry(message.header.index)
                .or_default()
                .extend(net);
        }
        let mut gateways = gateways(&routes);
        let is_running = |flags: LinkFlags| flags.contains(LinkFlags::Up | LinkFlags::Running);
        let links = links
            .iter()
            .filter(|link| is_uplink(link) && is_running(link.header.flags));
        Ok(links
            .filter_map(|link| {
                Some(Lan {
                    index: IfIndex::new(link.header.index)?,
                    name: link_name(link).filter(|name| name != except)?,
                    addresses: addresses.remove(&link.header.index)?,
                    gateways: gateways.remove(&link.header.index).unwrap_or_default(),
                    multicast: link.header.flags.contains(LinkFlags::Multicast),
                })
            })
            .collect())
    }
}

/// Default gateways, by the index of the interface.
fn gateways(routes: &[RouteMessage]) -> BTreeMap<u32, BTreeSet<Ipv4Addr>> {
    let mut found: BTreeMap<u32, BTreeSet<Ipv4Addr>> = BTreeMap::new();
    for route in routes {
        let header = &route.header;
        let is_default = header.table == RouteHeader::RT_TABLE_MAIN
            && header.kind == RouteType::Unicast
            && header.destination_prefix_length == 0;
        let (mut link, mut gateway) = (None, None);
        for attribute in &route.attributes {
            if let RouteAttribute::Oif(index) = attribute {
                link = Some(*index);
            } else if let RouteAttribute::Gateway(RouteAddress::Inet(ip)) = attribute {
                gateway = Some(*ip);
            } else if let RouteAttribute::MultiPath(hops) = attribute
                && is_default
            {
                for hop in hops {
                    let gateways = hop.attributes.iter().filter_map(|attribute| {
                        if let RouteAttribute::Gateway(RouteAddress::Inet(ip)) = attribute {
                            Some(*ip)
                        } else {
                            None
                        }
                    });
                    found
                        .entry(hop.interface_index)
                        .or_default()
                        .extend(gateways);
                }
            }
        }
        if let (true, Some(link), Some(gateway)) = (is_default, link, gateway) {
            found.entry(link).or_default().insert(gateway);
        }
    }
    found
}
