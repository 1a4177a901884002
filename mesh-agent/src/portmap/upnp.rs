//! Questions by UPnP: to a NAT for a port (WANIPConnection), to an IPv6 firewall for a pinhole (WANIPv6FirewallControl).

use std::{
    net::{IpAddr, SocketAddr, SocketAddrV6},
    time::Duration,
};

use igd_next::{
    AddPortError, GetExternalIpError, PinholeError, PortMappingProtocol, RequestError,
    SearchOptions,
    aio::{
        Gateway as Nat, Ipv6FirewallGateway as Firewall,
        tokio::{Tokio, search_gateway, search_ipv6_firewall_gateway},
    },
};
use tokio::time;

use super::machine::{Answer, Ask, Gateway, LIFETIME};

/// How long a UPnP gateway may take to say where it is, when it is asked itself, and when all are. (UPnP Device
/// Architecture 1.1, section 1.3.3: devices answer all within MX seconds, which is 3 here.)
const SEARCH_ONE: Duration = Duration::from_millis(1_500);
const SEARCH_ALL: Duration = Duration::from_millis(3_500);

/// How long one question may take, search and all.
const LIMIT: Duration = Duration::from_secs(10);

/// Where UPnP devices listen for searches.
const SSDP_PORT: u16 = 1900;

/// How gateways show the mapping to their owners.
const DESCRIPTION: &str = "Holdfast";

const UDP: PortMappingProtocol = PortMappingProtocol::UDP;

/// What was found of a gateway.
pub(super) enum Service {
    Nat(Nat<Tokio>),
    Firewall {
        firewall: Firewall<Tokio>,
        /// The number of the pinhole that it made, by which it is taken back.
        pinhole: Option<u16>,
    },
}

/// Asks the device that was found before, or else searches it.
pub(super) async fn map(ask: &Ask, known: Option<Service>) -> (Answer, Option<Service>) {
    let asked = async {
        if let Some(mut service) = known
            && let Some(answer) = service.map(ask).await
        {
            return (answer, Some(service));
        }
        let Some(mut service) = find(ask.gateway).await else {
            return (Answer::Silent, None);
        };
        match service.map(ask).await {
            Some(answer) => (answer, Some(service)),
            None => (Answer::Silent, None),
        }
    };
    let asked = time::timeout(LIMIT, asked).await;
    asked.unwrap_or((Answer::Silent, None))
}

/// Gives a mapping back; says why not.
pub(super) async fn release(ask: &Ask, known: Option<Service>) -> Result<(), String> {
    match known {
        Some(Service::Nat(nat)) => {
            let removed = nat.remove_port(UDP, ask.port).await;
            removed.map_err(|error| error.to_string())
        }
        Some(Service::Firewall {
            firewall,
            pinhole: Some(pinhole),
        }) => {
            let removed = firewall.remove_pinhole(pinhole).await;
            removed.map_err(|error| error.to_string())
        }
        Some(Service::Firewall { pinhole: None, .. }) | None => {
            Err("its UPnP was not found again".to_owned())
        }
    }
}

/// The gateway itself, or who answers for it.
async fn find(gateway: Gateway) -> Option<Service> {
    let all = match gateway.address {
        IpAddr::V4(_) => SearchOptions::default(),
        IpAddr::V6(_) => SearchOptions::ipv6(gateway.link),
    };
    let itself = SocketAddr::new(gateway.address, SSDP_PORT);
    for (to, limit) in [(itself, SEARCH_ONE), (all.broadcast_address, SEARCH_ALL)] {
        let mut options = SearchOptions::default();
        // Who is asked from a global address answers from one, as pinholes need: without a scope, and by the address'
        // owner, whom alone a firewall opens for.
        options.bind_addr = SocketAddr::new(gateway.own, 0);
        options.broadcast_address = to;
        options.timeout = Some(limit);
        let found = match gateway.address {
            IpAddr::V4(_) => {
                let found = search_gateway(options).await.ok();
                // Nobody else who says that he is one.
                let found = found.filter(|nat| nat.addr.ip() == gateway.address);
                found.map(Service::Nat)
            }
            // An IPv6 router has many addresses. Who lies gains nothing: the address that is told is this machine's own.
            IpAddr::V6(_) => {
                let found = search_ipv6_firewall_gateway(options).await.ok();
                found.map(|firewall| Service::Firewall {
                    firewall,
                    pinhole: None,
                })
            }
        };
        if found.is_some() {
            return found;
        }
    }
    None
}

impl Service {
    /// `None`: the device does not answer (any more), at least not there.
    async fn map(&mut self, ask: &Ask) -> Option<Answer> {
        match self {
            Self::Nat(nat) => map_port(nat, ask).await,
            Self::Firewall { firewall, pinhole } => {
                let IpAddr::V6(own) = ask.gateway.own else {
                    return None;
                };
                let own = SocketAddrV6::new(own, ask.inner_port, 0, 0);
                // One that is there already gets a new lease so (WANIPv6FirewallControl:1, section 2.5.3).
                match firewall.add_pinhole(UDP, own, lease_s(ask)).await {
                    Ok(number) => {
                        *pinhole = Some(number);
                        Some(granted(own.into()))
                    }
                    Err(PinholeError::RequestError(error)) => refused(error),
                    Err(error) => Some(Answer::Refused(error.to_string())),
                }
            }
        }
    }
}

async fn map_port(nat: &Nat<Tokio>, ask: &Ask) -> Option<Answer> {
    let outside = match nat.get_external_ip().await {
        Ok(outside) => outside,
        Err(GetExternalIpError::ActionNotAuthorized) => {
            return Some(Answer::Refused("not authorized".to_owned()));
        }
        Err(GetExternalIpError::RequestError(error)) => return refused(error),
    };
    let own = SocketAddr::new(ask.gateway.own, ask.inner_port);
    let added = nat.add_port(UDP, ask.port, own, lease_s(ask), DESCRIPTION);
    match added.await {
        Ok(()) => Some(granted(SocketAddr::new(outside, ask.port))),
        Err(AddPortError::PortInUse) => Some(Answer::PortTaken),
        Err(AddPortError::OnlyPermanentLeasesSupported) => Some(Answer::PermanentOnly),
        Err(AddPortError::RequestError(error)) => refused(error),
        Err(error) => Some(Answer::Refused(error.to_string())),
    }
}

fn lease_s(ask: &Ask) -> u32 {
    u32::try_from(ask.lifetime.as_secs()).unwrap_or_default()
}

fn granted(outside: SocketAddr) -> Answer {
    Answer::Granted {
        outside,
        lifetime: LIFETIME,
        epoch_s: None,
    }
}

/// `None` unless the device itself said so.
fn refused(error: RequestError) -> Option<Answer> {
    if let RequestError::ErrorCode(code, text) = error {
        Some(Answer::Refused(format!("error {code}: {text}")))
    } else {
        None
    }
}
