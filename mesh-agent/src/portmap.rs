//! Asks the gateways of this machine's networks to lead their outside port to the node's own: by PCP, NAT-PMP or UPnP, so
//! that a node behind a NAT that maps by destination can be called directly all the same.
//!
//! [`machine`] decides; here are the sockets. What gateways say is not signed: the worst that a false answer does is one
//! more address at which the node is not.

pub mod machine;
pub mod notice;

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4},
    num::NonZeroU16,
    time::Duration,
};

use anyhow::Context as _;
use crab_nat::{
    GatewayAddress, InternetProtocol, PortMapping, PortMappingOptions, PortMappingType,
    TimeoutConfig, natpmp, pcp,
};
use igd_next::{
    AddPortError, PortMappingProtocol, RequestError, SearchOptions,
    aio::{
        Gateway as Igd,
        tokio::{Tokio, search_gateway},
    },
};
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
    machine::{Answer, Ask, Gateway, LIFETIME, Machine, Output, Protocol, Report},
    notice::Notice,
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

/// How long a UPnP gateway may take to say where it is, when it is asked itself, and when all are. (UPnP Device
/// Architecture 1.1, section 1.3.3: devices answer all within MX seconds, which is 3 here.)
const SEARCH_ONE: Duration = Duration::from_millis(1_500);
const SEARCH_ALL: Duration = Duration::from_millis(3_500);

/// How long one question by UPnP may take, search and all.
const UPNP_LIMIT: Duration = Duration::from_secs(10);

/// How long giving back may take when the agent stops: half of what all tasks have for their end.
const RELEASE_LIMIT: Duration = Duration::from_millis(1_500);

/// Where UPnP devices listen for searches.
const SSDP_PORT: u16 = 1900;

/// How gateways show the mapping to their owners.
const DESCRIPTION: &str = "Holdfast";

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
        igds: BTreeMap::new(),
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
                let change = change.context("the kernel closed the netlink socket")?;
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
    gateway: Ipv4Addr,
    answer: Answer,
    /// Where the gateway's UPnP is, if that was found.
    igd: Option<Igd<Tokio>>,
}

struct Shell {
    machine: Machine,
    /// At most one for each gateway.
    asks: JoinSet<Done>,
    igds: BTreeMap<Ipv4Addr, Igd<Tokio>>,
    events: mpsc::Sender<Event>,
    notices: Option<UdpSocket>,
}

impl Shell {
    async fn perform(&mut self) {
        while let Some(output) = self.machine.poll_output() {
            match output {
                Output::Ask(ask) => {
                    let igd = self.igds.remove(&ask.gateway.address);
                    self.asks.spawn(async move {
                        let (answer, igd) = match ask.protocol {
                            Protocol::Pcp => (by_pcp(&ask).await, igd),
                            Protocol::NatPmp => (by_nat_pmp(&ask).await, igd),
                            Protocol::Upnp => by_upnp(&ask, igd).await,
                        };
                        tracing::debug!(?ask, ?answer, "a gateway was asked to map the port");
                        Done {
                            number: ask.number,
                            gateway: ask.gateway.address,
                            answer,
                            igd,
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
        if let Some(igd) = done.igd {
            self.igds.insert(done.gateway, igd);
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
                releases.spawn(release(ask, self.igds.remove(&ask.gateway.address)));
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
    let own = |address: Ipv4Addr| {
        let near = lan
            .addresses
            .iter()
            .find(|net| net.contains(&IpAddr::V4(address)));
        let any = || lan.addresses.iter().find(|net| net.addr().is_ipv4());
        match near.or_else(any).map(|net| net.addr()) {
            Some(IpAddr::V4(own)) => Some(Gateway { address, own }),
            Some(IpAddr::V6(_)) | None => None,
        }
    };
    lan.gateways.iter().filter_map(move |address| own(*address))
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

fn granted(mapping: &PortMapping, outside: Ipv4Addr) -> Answer {
    Answer::Granted {
        outside: SocketAddrV4::new(outside, mapping.external_port().get()),
        lifetime: Duration::from_secs(mapping.lifetime().into()),
        epoch_s: Some(mapping.gateway_epoch()),
    }
}

async fn by_pcp(ask: &Ask) -> Answer {
    let base = pcp::BaseMapRequest::new(
        GatewayAddress::IpV4(ask.gateway.address),
        ask.gateway.own.into(),
        InternetProtocol::Udp,
        inner_port(ask),
    );
    let mapping = pcp::port_mapping(base, Some(ask.nonce), None, options(ask)).await;
    match mapping.map(|mapping| (mapping.mapping_type(), mapping)) {
        Ok((PortMappingType::Pcp { external_ip, .. }, mapping)) => match external_ip {
            IpAddr::V4(outside) => granted(&mapping, outside),
            IpAddr::V6(outside) => Answer::Refused(format!("{outside} is no IPv4 address")),
        },
        Ok((PortMappingType::NatPmp, _)) => Answer::Refused("another protocol".to_owned()),
        Err(pcp::Failure::Timeout) => Answer::Silent,
        Err(error) => Answer::Refused(error.to_string()),
    }
}

async fn by_nat_pmp(ask: &Ask) -> Answer {
    let gateway = GatewayAddress::IpV4(ask.gateway.address);
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
        Ok((mapping, outside)) => granted(&mapping, outside),
        Err(natpmp::Failure::Timeout) => Answer::Silent,
        Err(error) => Answer::Refused(error.to_string()),
    }
}

/// Asks the UPnP device that was found before, or else searches it.
async fn by_upnp(ask: &Ask, known: Option<Igd<Tokio>>) -> (Answer, Option<Igd<Tokio>>) {
    let asked = async {
        if let Some(igd) = known
            && let Some(answer) = map_by(&igd, ask).await
        {
            return (answer, Some(igd));
        }
        let Some(igd) = find_igd(ask.gateway).await else {
            return (Answer::Silent, None);
        };
        match map_by(&igd, ask).await {
            Some(answer) => (answer, Some(igd)),
            None => (Answer::Silent, None),
        }
    };
    let asked = time::timeout(UPNP_LIMIT, asked).await;
    asked.unwrap_or((Answer::Silent, None))
}

/// The gateway itself, and nobody else who says that he is one.
async fn find_igd(gateway: Gateway) -> Option<Igd<Tokio>> {
    let options = |to: Option<Ipv4Addr>, timeout| {
        let mut options = SearchOptions::default();
        options.bind_addr = SocketAddr::from((gateway.own, 0));
        options.timeout = Some(timeout);
        if let Some(to) = to {
            options.broadcast_address = SocketAddr::from((to, SSDP_PORT));
        }
        options
    };
    let is_it = |igd: &Igd<Tokio>| igd.addr.ip() == IpAddr::V4(gateway.address);
    let asked = search_gateway(options(Some(gateway.address), SEARCH_ONE)).await;
    if let Some(found) = asked.ok().filter(is_it) {
        return Some(found);
    }
    let found = search_gateway(options(None, SEARCH_ALL)).await;
    found.ok().filter(is_it)
}

/// `None`: the device does not answer (any more), at least not there.
async fn map_by(igd: &Igd<Tokio>, ask: &Ask) -> Option<Answer> {
    let outside = match igd.get_external_ip().await {
        Ok(IpAddr::V4(outside)) => outside,
        Ok(IpAddr::V6(outside)) => {
            return Some(Answer::Refused(format!("{outside} is no IPv4 address")));
        }
        Err(igd_next::GetExternalIpError::RequestError(RequestError::ErrorCode(code, text))) => {
            return Some(Answer::Refused(format!("error {code}: {text}")));
        }
        Err(igd_next::GetExternalIpError::ActionNotAuthorized) => {
            return Some(Answer::Refused("not authorized".to_owned()));
        }
        Err(igd_next::GetExternalIpError::RequestError(_)) => return None,
    };
    let own = SocketAddr::from((ask.gateway.own, ask.inner_port));
    let lease_s = u32::try_from(ask.lifetime.as_secs()).unwrap_or_default();
    let udp = PortMappingProtocol::UDP;
    let added = igd.add_port(udp, ask.port, own, lease_s, DESCRIPTION).await;
    match added {
        Ok(()) => Some(Answer::Granted {
            outside: SocketAddrV4::new(outside, ask.port),
            lifetime: LIFETIME,
            epoch_s: None,
        }),
        Err(AddPortError::PortInUse) => Some(Answer::PortTaken),
        Err(AddPortError::OnlyPermanentLeasesSupported) => Some(Answer::PermanentOnly),
        Err(AddPortError::RequestError(RequestError::ErrorCode(code, text))) => {
            Some(Answer::Refused(format!("error {code}: {text}")))
        }
        Err(AddPortError::RequestError(_)) => None,
        Err(error) => Some(Answer::Refused(error.to_string())),
    }
}

async fn release(ask: Ask, igd: Option<Igd<Tokio>>) {
    let gateway = GatewayAddress::IpV4(ask.gateway.address);
    let (udp, port) = (InternetProtocol::Udp, inner_port(&ask));
    let problem = match ask.protocol {
        Protocol::Pcp => {
            let range = pcp::DropMappingRange::Single {
                protocol: udp,
                internal_port: port,
            };
            let own = ask.gateway.own.into();
            let dropped = pcp::try_drop_mapping(gateway, own, ask.nonce, range, Some(UDP_TIMES));
            dropped.await.err().map(|error| error.to_string())
        }
        Protocol::NatPmp => {
            let dropped = natpmp::try_drop_mapping(gateway, udp, Some(port), Some(UDP_TIMES));
            dropped.await.err().map(|error| error.to_string())
        }
        Protocol::Upnp => match igd {
            Some(igd) => {
                let removed = igd.remove_port(PortMappingProtocol::UDP, ask.port).await;
                removed.err().map(|error| error.to_string())
            }
            None => Some("its UPnP was not found again".to_owned()),
        },
    };
    if let Some(problem) = problem {
        tracing::debug!(gateway = %ask.gateway.address, problem, "a mapping was not taken back");
    }
}
