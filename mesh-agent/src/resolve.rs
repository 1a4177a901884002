//! The names of controllers and HTTP proxies. The system resolves them, and asks by the kernel's routes, which may lead to a
//! line that is dead: where another way out is in use, its name servers are asked by that, too.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use mesh_api::connect::{ConnectError, connect_any};
use mesh_dns::client;
use tokio::{
    net::{TcpStream, lookup_host},
    time::timeout,
};

/// The system's own answer is waited for so long: most names are known in a tenth of that, and it knows what is in
/// `/etc/hosts`. It gives a silent name server up after 5 s.
const HEAD_START: Duration = Duration::from_millis(500);

/// Name servers that are asked: as many as the C library reads (`MAXNS`, resolv.conf(5)).
const SERVERS_MAX: usize = 3;

const RESOLV_CONF: &str = "/etc/resolv.conf";

const DNS_PORT: u16 = 53;

/// Connects to `address` (`host:port`) by the interface that `device` names for an address; `None`: as the kernel's routes say.
///
/// # Errors
///
/// [`ConnectError::Resolve`] or [`ConnectError::Tcp`].
pub(crate) async fn connect(
    address: &str,
    device: impl Fn(IpAddr) -> Option<String>,
) -> Result<TcpStream, ConnectError> {
    let found = addresses(address, &device).await;
    let found = found.map_err(|source| ConnectError::Resolve {
        address: address.to_owned(),
        source,
    })?;
    connect_any(address, found, device).await
}

/// The addresses of `address` (`host:port`).
///
/// # Errors
///
/// What the system says if nobody knows any.
pub(crate) async fn addresses(
    address: &str,
    device: impl Fn(IpAddr) -> Option<String>,
) -> io::Result<Vec<SocketAddr>> {
    if let Ok(known) = address.parse() {
        return Ok(vec![known]);
    }
    let system = async { Ok(lookup_host(address).await?.collect::<Vec<_>>()) };
    let by_uplink = ask(address, device);
    tokio::pin!(system);
    match timeout(HEAD_START, &mut system).await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(error)) => by_uplink.await.ok_or(error),
        Err(_) => tokio::select! {
            Some(found) = by_uplink => Ok(found),
            said = system => said,
        },
    }
}

/// What the system's name servers say that are reached by the uplink in use.
async fn ask(address: &str, device: impl Fn(IpAddr) -> Option<String>) -> Option<Vec<SocketAddr>> {
    let (host, port) = address.rsplit_once(':')?;
    let port = port.parse().ok()?;
    let written = fs::read_to_string(RESOLV_CONF).unwrap_or_default();
    for server in servers(&written) {
        // The system asked the others just so.
        let Some(device) = device(server) else {
            continue;
        };
        let server = SocketAddr::new(server, DNS_PORT);
        match client::addresses(server, host, Some(&device)).await {
            Ok(found) if !found.is_empty() => {
                let found = found.into_iter();
                return Some(found.map(|ip| SocketAddr::new(ip, port)).collect());
            }
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(%server, device, host, %error, "a name server does not answer")
            }
        }
    }
    None
}

/// The name servers of a `resolv.conf`. One on a link has a zone behind it, is no address, and nothing to us.
fn servers(written: &str) -> Vec<IpAddr> {
    let lines = written.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == "nameserver").then(|| words.next()?.parse().ok())?
    });
    lines.take(SERVERS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_read_as_the_c_library_reads_them() {
        let written = "# nameserver 192.0.2.9\nsearch example.org\nnameserver 192.0.2.1\n\
                       nameserver\t2001:db8::1 # home\nnameserver fe80::1%eth0\nnameserver 192.0.2.2\n\
                       nameserver 192.0.2.3\noptions ndots:5\n";
        let expected = ["192.0.2.1", "2001:db8::1", "192.0.2.2"];
        assert_eq!(
            servers(written),
            expected.map(|ip| ip.parse::<IpAddr>().unwrap())
        );
        assert!(servers("nameserver\n").is_empty());
    }

    #[tokio::test]
    async fn an_address_is_asked_of_nobody() {
        let nobody = |_| -> Option<String> { unreachable!("it is an address") };
        let found = addresses("[2001:db8::1]:7440", nobody).await.unwrap();
        assert_eq!(found, ["[2001:db8::1]:7440".parse().unwrap()]);
    }
}
