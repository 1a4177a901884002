//! The machine's interfaces as ways out: who has an address, a carrier, a default route.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType,
};
use rtnetlink::RouteMessageBuilder;

use super::{
    Netlink, NetlinkError, collect, ip_of, is_link_local, is_ours, is_settled, is_up, leads_out,
    link_name, local_address, whole_family,
};
use crate::IfIndex;

/// An interface at which others may reach this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its index.
    pub index: IfIndex,
    /// Its name.
    pub name: String,
    /// It is up and has a carrier.
    pub up: bool,
    /// Its addresses, without link-local and not yet (or no longer) valid ones.
    pub addresses: BTreeSet<IpAddr>,
    /// The metric of its IPv4 default route in the main table, if it has one.
    pub metric_v4: Option<u32>,
    /// The same of IPv6.
    pub metric_v6: Option<u32>,
}

/// All of them, and where they lead.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ways {
    /// The interfaces, by index.
    pub interfaces: Vec<Interface>,
    /// What the main table knows better than by a default route, and by which interface. Routes of
    /// ours are not in it.
    pub routes: Vec<(IpNet, IfIndex)>,
}

impl Netlink {
    /// The machine's interfaces without loopbacks, other programs' tunnels and the interface named
    /// `except`, and its routes.
    ///
    /// # Errors
    ///
    /// If the kernel does not answer.
    pub async fn ways(&self, except: &str) -> Result<Ways, NetlinkError> {
        let _turn = self.turn.lock().await;
        let links = self.handle.link().get().execute();
        let links = collect(|| "list the interfaces".to_owned(), links).await?;
        let messages = self.handle.address().get().execute();
        let messages = collect(|| "list the addresses".to_owned(), messages).await?;
        let mut routes = Vec::new();
        for request in [
            RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
            RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
        ] {
            let request = self.handle.route().get(request);
            routes.extend(collect(|| "list the routes".to_owned(), request.execute()).await?);
        }

        let mut addresses: BTreeMap<u32, BTreeSet<IpAddr>> = BTreeMap::new();
        for message in messages.iter().filter(|message| is_settled(message)) {
            let usable = |ip: &IpAddr| !is_link_local(*ip) && !ip.is_loopback();
            let found = addresses.entry(message.header.index).or_default();
            found.extend(local_address(message).filter(usable));
        }
        let (metrics, routes) = sorted(&routes);
        let links = links.iter().filter(|link| leads_out(link));
        let interfaces = links.filter_map(|link| {
            let index = IfIndex::new(link.header.index)?;
            Some(Interface {
                index,
                name: link_name(link).filter(|name| name != except)?,
                up: is_up(link),
                addresses: addresses.remove(&link.header.index).unwrap_or_default(),
                metric_v4: metrics.get(&(index, true)).copied(),
                metric_v6: metrics.get(&(index, false)).copied(),
            })
        });
        Ok(Ways {
            interfaces: interfaces.collect(),
            routes,
        })
    }
}

/// By interface, and whether it is IPv4.
type Metrics = BTreeMap<(IfIndex, bool), u32>;

/// The metrics of default routes, and the other routes.
fn sorted(messages: &[RouteMessage]) -> (Metrics, Vec<(IpNet, IfIndex)>) {
    let mut metrics = BTreeMap::new();
    let mut routes = Vec::new();
    for message in messages {
        let header = &message.header;
        let in_place =
            header.table == RouteHeader::RT_TABLE_MAIN && header.kind == RouteType::Unicast;
        if !in_place || is_ours(message) {
            continue;
        }
        let (destination, links, metric) = parts(message);
        let destination = destination
            .and_then(ip_of)
            .unwrap_or(whole_family(header.address_family));
        let Ok(net) = IpNet::new(destination, header.destination_prefix_length) else {
            continue;
        };
        for link in links {
            if net.prefix_len() == 0 {
                let best = metrics
                    .entry((link, destination.is_ipv4()))
                    .or_insert(metric);
                *best = metric.min(*best);
            } else {
                routes.push((net, link));
            }
        }
    }
    (metrics, routes)
}

/// Where to, by which interfaces (several: the kernel spreads flows), and at what metric.
fn parts(message: &RouteMessage) -> (Option<&RouteAddress>, Vec<IfIndex>, u32) {
    let (mut destination, mut links, mut metric) = (None, Vec::new(), 0);
    for attribute in &message.attributes {
        if let RouteAttribute::Destination(address) = attribute {
            destination = Some(address);
        } else if let RouteAttribute::Oif(index) = attribute {
            links.extend(IfIndex::new(*index));
        } else if let RouteAttribute::MultiPath(hops) = attribute {
            links.extend(
                hops.iter()
                    .filter_map(|hop| IfIndex::new(hop.interface_index)),
            );
        } else if let RouteAttribute::Priority(priority) = attribute {
            metric = *priority;
        }
    }
    (destination, links, metric)
}
