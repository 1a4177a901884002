//! Asks the gateways of this machine's networks to lead their outside port to the node's own, and to let through their IPv6
//! firewall who calls it there: by PCP, NAT-PMP or UPnP, so that a node behind a NAT that maps by destination, or a firewall
//! before a peer behind such a one, can be called directly all the same.
//!
//! [`machine`] decides; here are the sockets. What gateways say is not signed: the worst that a false answer does is one
//! more address at which the node is not.

pub mod machine;
pub mod notice;
mod upnp;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4},
    num::NonZeroU16,
    time::Duration,
};

use anyhow::Context as _;
use crab_nat::{
    GATEWAY_PORT, GatewayAddress, InternetProtocol, PortMapping, PortMappingOptions,
    PortMappingType, TimeoutConfig, natpmp, pcp,
};
use ipnet::{IpNet, Ipv6Net};
use mesh_core::io::Input;
use mesh_linux::netlink::{Changes, Lan, Netlink};
use rand::random;
use socket2::{Domain, Protocol as SocketProtocol, Socket, Type};
use tokio::{
    net::UdpSocket,
    sync::{mpsc, watch},
    task::JoinSet,
    time,
};
use tokio_util::sync::CancellationToken;

use self::{
    machine::{Answer, Ask, Gateway, Machine, Output, Protocol, Report},
    notice::Notice,
    upnp::Service,
};
use crate::{
    driver::{Event, now, sleep_until},
    settle::Looks,
    uplinks::{UplinkRule, is_metered},
};

/// PCP and NAT-PMP: 250, 500 and 1,000 ms. (RFC 6886, section 3.1, doubles 250 ms nine times: that is two minutes.)
const UDP_TIMES: TimeoutConfig = TimeoutConfig {
    initial_timeout: Duration::from_millis(250),
    max_retries: 2,
    max_retry_timeout: None,
};

/// How long giving back may take when the agent stops: half of what all tasks have for their end.
const RELEASE_LIMIT: Duration = Duration::from_millis(1_500);

/// What is mapped, and where this is told.
#[derive(Debug)]
pub struct PortMapConfig {
    /// The node's UDP port.
    pub port: u16,
    /// The mesh's own interface.
    pub interface: String,
    /// What the configuration says of some interfaces: gateways of metered ones are not asked. (A carrier's NAT grants
    /// nothing anyway, and nobody should be invited to call by a way that costs.)
    pub uplinks: Vec<UplinkRule>,
}

/// How it stands with each gateway: what it granted, or why it did not.
pub type Reports = Vec<Report>;

/// Keeps the node's port mapped at all default gateways until `stop`; gives the mappings back then.
///
/// # Errors
///
/// If the kernel does not answer.
pub async fn keep_mapped(
    netlink: Netlink,
    mut changes: Changes,
    config: PortMapConfig,
    events: mpsc::Sender<Event>,
    reports: watch::Sender<Reports>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let notices = listen().inspect_err(|error| {
        let port = notice::PORT;
        tracing::warn!(%error, port, "cannot hear when gateways start anew: lost mappings return later");
    });
    let mut shell = Shell {
        machine: Machine::new(config.port, random()),
        asks: JoinSet::new(),
        services: BTreeMap::new(),
        events,
        notices: notices.ok(),
    };
    let mut known = Vec::new();
    let mut looks = Looks::new(now());
    loop {
        shell.perform().await;
        reports.send_if_modified(|last| {
            let now: Reports = shell.machine.reports().collect();
            std::mem::replace(last, now) != *last
        });
        let deadline = shell.machine.poll_timeout();
        tokio::select! {
            () = stop.cancelled() => break,
            change = changes.next() => {
                let change = change.context("cannot hear of changes of the network")?;
                if change.links || change.addresses || change.routes {
                    looks.handle_change(now());
                }
            }
            () = sleep_until(looks.due()) => {
                looks.handle_look(now());
                let lans = netlink.lans(&config.interface).await?;
                let unmetered = lans.iter().filter(|lan| !is_metered(&config.uplinks, &lan.name));
                let found: Vec<_> = unmetered.flat_map(gateways).collect();
                if found != known {
                    tracing::debug!(gateways = ?found, "default gateways are asked to map the port");
                    shell.machine.handle_gateways(found.iter().copied(), now());
                    known = found;
                }
            }
            Some(done) = shell.asks.join_next() => shell.handle_done(done?),
            (from, notice) = heard(shell.notices.as_ref()) => {
                shell.machine.handle_notice(from, notice, now());
            }
            () = sleep_until(deadline) => shell.machine.handle_timeout(now()),
        }
    }
    shell.release().await;
    Ok(())
}

/// What comes out of a question.
struct Done {
    number: u64,
    gateway: Gateway,
    answer: Answer,
    /// The gateway's UPnP, if that was found.
    service: Option<Service>,
}

struct Shell {
    machine: Machine,
    /// At most one for each gateway.
    asks: JoinSet<Done>,
    services: BTreeMap<Gateway, Service>,
    events: mpsc::Sender<Event>,
    notices: Option<UdpSocket>,
}

impl Shell {
    async fn perform(&mut self) {
        while let Some(output) = self.machine.poll_output() {
            match output {
                Output::Ask(ask) => {
                    let service = self.services.remove(&ask.gateway);
                    self.asks.spawn(async move {
                        let (answer, service) = match ask.protocol {
                            Protocol::Pcp => (by_pcp(&ask).await, service),
                            Protocol::NatPmp => (by_nat_pmp(&ask).await, service),
                            Protocol::Upnp => upnp::map(&ask, service).await,
                        };
                        tracing::debug!(?ask, ?answer, "a gateway was asked to map the port");
                        Done {
                            number: ask.number,
                            gateway: ask.gateway,
                            answer,
                            service,
                        }
                    });
                }
                Output::Tell(outside) => {
                    tracing::info!(?outside, "the port is mapped at these addresses now");
                    let told = Event::Core(Input::PortMapped(outside));
                    self.events.send(told).await.ok(); // Fails only while the agent stops.
                }
                Output::Release(_) => {} // Only after `shut_down`.
            }
        }
    }

    fn handle_done(&mut self, done: Done) {
        if let Some(service) = done.service {
            self.services.insert(done.gateway, service);
        }
        self.machine.handle_answer(done.number, done.answer, now());
    }

    /// Gives back what was granted, if the gateways are quick.
    async fn release(mut self) {
        self.asks.abort_all();
        self.machine.shut_down();
        let mut releases = JoinSet::new();
        while let Some(output) = self.machine.poll_output() {
            if let Output::Release(ask) = output {
                releases.spawn(release(ask, self.services.remove(&ask.gateway)));
            }
        }
        let all = async { while releases.join_next().await.is_some() {} };
        if time::timeout(RELEASE_LIMIT, all).await.is_err() {
            tracing::debug!("a gateway did not take its mapping back: it ends by itself");
        }
    }
}

/// The gateways of a LAN, with the address that this machine has in the gateway's network, or else there at all.
fn gateways(lan: &Lan) -> impl Iterator<Item = Gateway> {
    let v4 = lan.gateways.iter().filter_map(|address| {
        let near = lan.addresses.iter().find(|net| net.contains(address));
        let any = || lan.addresses.iter().find(|net| net.addr().is_ipv4());
        let own = near.or_else(any).filter(|_| address.is_ipv4())?.addr();
        Some((*address, own))
    });
    let v6 = servers(lan).into_iter().filter_map(|address| {
        let own =
            source_to(address).filter(|own| lan.addresses.iter().any(|net| net.addr() == *own));
        Some((IpAddr::V6(address), own?))
    });
    v4.chain(v6).map(|(address, own)| Gateway {
        address,
        link: lan.index.get(),
        own,
    })
}

/// Where the IPv6 gateways of a LAN are asked. Routes mostly name them by link-local addresses, and what is sent there comes
/// from such a one, too: PCP refuses a question for another address than its own (RFC 6887, section 8.3), as UPnP's firewalls
/// do. Every router has the first address of each of its networks as well (RFC 4291, section 2.6.1).
fn servers(lan: &Lan) -> BTreeSet<Ipv6Addr> {
    let mut servers = BTreeSet::new();
    for gateway in &lan.gateways {
        match gateway {
            IpAddr::V4(_) => {}
            IpAddr::V6(gateway) if gateway.is_unicast_link_local() => {
                servers.extend(lan.addresses.iter().filter_map(router_of));
            }
            IpAddr::V6(gateway) => {
                servers.insert(*gateway);
            }
        }
    }
    servers
}

/// The subnet-router anycast address of the network of an address, unless that is link-local.
fn router_of(net: &IpNet) -> Option<Ipv6Addr> {
    let IpNet::V6(net) = net else {
        return None;
    };
    // DHCPv6 says nothing of the network; hosts' networks have 64 bits (RFC 4291, section 2.5.1).
    let length = if net.prefix_len() == 128 {
        64
    } else {
        net.prefix_len()
    };
    let network = Ipv6Net::new(net.addr(), length).ok()?.network();
    (!network.is_unicast_link_local()).then_some(network)
}

/// The address from which this machine's kernel sends there. Nothing is sent.
fn source_to(address: Ipv6Addr) -> Option<IpAddr> {
    let socket = std::net::UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((address, GATEWAY_PORT)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// A socket that hears what gateways say to all. The kernel is in their group on all interfaces.
fn listen() -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(SocketProtocol::UDP))?;
    socket.set_reuse_address(true)?; // So do other programs that map ports.
    socket.set_nonblocking(true)?;
    // By the group's address: what is sent to this machine alone is not heard.
    socket.bind(&SocketAddrV4::new(notice::GROUP, notice::PORT).into())?;
    UdpSocket::from_std(socket.into())
}

/// The next notice. Datagrams that are none cost a system call each.
async fn heard(socket: Option<&UdpSocket>) -> (Ipv4Addr, Notice) {
    let Some(socket) = socket else {
        return std::future::pending().await;
    };
    let mut buffer = [0; 64];
    loop {
        match socket.recv_from(&mut buffer).await {
            Ok((length, SocketAddr::V4(from))) if from.port() == notice::SERVER_PORT => {
                if let Some(notice) = buffer.get(..length).and_then(Notice::decode) {
                    return (*from.ip(), notice);
                }
            }
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(%error, "cannot hear gateways");
                time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

fn options(ask: &Ask) -> PortMappingOptions {
    PortMappingOptions {
        external_port: NonZeroU16::new(ask.port),
        lifetime_seconds: u32::try_from(ask.lifetime.as_secs()).ok(),
        timeout_config: Some(UDP_TIMES),
    }
}

fn inner_port(ask: &Ask) -> NonZeroU16 {
    NonZeroU16::new(ask.inner_port).unwrap_or(NonZeroU16::MIN)
}

fn granted(mapping: &PortMapping, outside: IpAddr) -> Answer {
    Answer::Granted {
        outside: SocketAddr::new(outside, mapping.external_port().get()),
        lifetime: Duration::from_secs(mapping.lifetime().into()),
        epoch_s: Some(mapping.gateway_epoch()),
    }
}

async fn by_pcp(ask: &Ask) -> Answer {
    let base = pcp::BaseMapRequest::new(
        ask.gateway.address.into(),
        ask.gateway.own,
        InternetProtocol::Udp,
        inner_port(ask),
    );
    let mapping = pcp::port_mapping(base, Some(ask.nonce), None, options(ask)).await;
    match mapping.map(|mapping| (mapping.mapping_type(), mapping)) {
        Ok((PortMappingType::Pcp { external_ip, .. }, mapping)) => granted(&mapping, external_ip),
        Ok((PortMappingType::NatPmp, _)) => Answer::Refused("another protocol".to_owned()),
        Err(pcp::Failure::Timeout) => Answer::Silent,
        Err(pcp::Failure::Socket(error)) if is_refused(&error) => Answer::Absent,
        Err(error) => Answer::Refused(error.to_string()),
    }
}

async fn by_nat_pmp(ask: &Ask) -> Answer {
    let gateway = GatewayAddress::from(ask.gateway.address);
    let mapping = natpmp::port_mapping(
        gateway,
        InternetProtocol::Udp,
        inner_port(ask),
        options(ask),
    );
    let asked = async {
        let mapping = mapping.await?;
        let outside = natpmp::external_address(gateway, Some(UDP_TIMES)).await?;
        Ok((mapping, outside))
    };
    match asked.await {
        Ok((mapping, outside)) => granted(&mapping, outside.into()),
        Err(natpmp::Failure::Timeout) => Answer::Silent,
        Err(natpmp::Failure::Socket(error)) if is_refused(&error) => Answer::Absent,
        Err(error) => Answer::Refused(error.to_string()),
    }
}

/// By ICMP: the gateway is there, and nobody at its port.
fn is_refused(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ConnectionRefused
}

async fn release(ask: Ask, service: Option<Service>) {
    let gateway = GatewayAddress::from(ask.gateway.address);
    let (udp, port) = (InternetProtocol::Udp, inner_port(&ask));
    let released = match ask.protocol {
        Protocol::Pcp => {
            let range = pcp::DropMappingRange::Single {
                protocol: udp,
                internal_port: port,
            };
            let own = ask.gateway.own;
            let dropped = pcp::try_drop_mapping(gateway, own, ask.nonce, range, Some(UDP_TIMES));
            dropped.await.map_err(|error| error.to_string())
        }
        Protocol::NatPmp => {
            let dropped = natpmp::try_drop_mapping(gateway, udp, Some(port), Some(UDP_TIMES));
            dropped.await.map_err(|error| error.to_string())
        }
        Protocol::Upnp => upnp::release(&ask, service).await,
    };
    if let Err(problem) = released {
        tracing::debug!(gateway = %ask.gateway.address, problem, "a mapping was not taken back");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_of_ipv6_has_its_router_at_its_first_address() {
        let router = |net: &str| router_of(&net.parse().unwrap()).map(|ip| ip.to_string());
        for (net, expected) in [
            ("2001:db8:0:7::11/64", Some("2001:db8:0:7::")),
            ("2001:db8:0:7:1::11/112", Some("2001:db8:0:7:1::")),
            ("2001:db8:0:7::1:11/128", Some("2001:db8:0:7::")), // By DHCPv6.
            ("fe80::11/64", None),
            ("192.168.1.11/24", None),
        ] {
            assert_eq!(router(net).as_deref(), expected, "{net}");
        }
    }
}
