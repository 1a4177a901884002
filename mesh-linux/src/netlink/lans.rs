//! The networks that this machine is a part of: who is on them, and which gateway leads out of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use netlink_packet_route::{
    link::LinkFlags,
    route::{RouteAttribute, RouteHeader, RouteMessage, RouteType},
};
use rtnetlink::RouteMessageBuilder;

use super::{
    Netlink, NetlinkError, collect, ip_of, is_settled, is_uplink, link_name, local_address,
};
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
    /// Default gateways by this interface, in the main table; IPv6's are mostly link-local.
    pub gateways: BTreeSet<IpAddr>,
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
        let mut routes = Vec::new();
        for request in [
            RouteMessageBuilder::<Ipv4Addr>::new().build(),
            RouteMessageBuilder::<Ipv6Addr>::new().build(),
        ] {
            let request = self.handle.route().get(request);
            routes.extend(collect(|| "list the routes".to_owned(), request.execute()).await?);
        }

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
fn gateways(routes: &[RouteMessage]) -> BTreeMap<u32, BTreeSet<IpAddr>> {
    let mut found: BTreeMap<u32, BTreeSet<IpAddr>> = BTreeMap::new();
    let is_default = |route: &&RouteMessage| {
        route.header.table == RouteHeader::RT_TABLE_MAIN
            && route.header.kind == RouteType::Unicast
            && route.header.destination_prefix_length == 0
    };
    for route in routes.iter().filter(is_default) {
        let (mut link, mut gateway) = (None, None);
        for attribute in &route.attributes {
            if let RouteAttribute::Oif(index) = attribute {
                link = Some(*index);
            } else if let RouteAttribute::MultiPath(hops) = attribute {
                for hop in hops {
                    let gateways = hop.attributes.iter().filter_map(gateway_of);
                    found
                        .entry(hop.interface_index)
                        .or_default()
                        .extend(gateways);
                }
            }
            gateway = gateway.or(gateway_of(attribute));
        }
        if let (Some(link), Some(gateway)) = (link, gateway) {
            found.entry(link).or_default().insert(gateway);
        }
    }
    found
}

fn gateway_of(attribute: &RouteAttribute) -> Option<IpAddr> {
    if let RouteAttribute::Gateway(address) = attribute {
        ip_of(address)
    } else {
        None
    }
}
