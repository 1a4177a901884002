//! What a NAT does, found out with real sockets, as RFC 4787 §4 and §5 name it.

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::node::Node;

/// An answer that is not there by then was lost on a lossless wire: the test fails.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);

/// What a mapping or a filter depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DependsOn {
    /// Endpoint-independent.
    Nothing,
    /// Address-dependent.
    Address,
    /// Address-and-port-dependent.
    AddressAndPort,
}

/// A NAT's behaviour for UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Behaviour {
    /// How an inner endpoint is mapped.
    pub mapping: DependsOn,
    /// Who may answer.
    pub filtering: DependsOn,
}

/// Probes from `inside`, with two public nodes as counterparts.
///
/// # Errors
///
/// If a packet that has to come does not.
pub fn behaviour(inside: &Node, one: (&Node, IpAddr), two: (&Node, IpAddr)) -> Result<Behaviour> {
    let socket = bind(inside, any(one.1))?;
    let primary = bind(one.0, one.1)?;
    let other_port = bind(one.0, one.1)?;
    let other_address = bind(two.0, two.1)?;

    // Filtering first, while the inside has spoken to `primary` alone.
    let outer = seen_by(&socket, &primary)?;
    other_address.send_to(b"address", outer)?;
    other_port.send_to(b"port", outer)?;
    primary.send_to(b"end", outer)?; // Wires keep their order: after this nothing more comes.
    let mut admitted = Vec::new();
    loop {
        let word = receive(&socket)?.0;
        if word == b"end" {
            break;
        }
        admitted.push(word);
    }
    let filtering = match (
        admitted.contains(&b"address".to_vec()),
        admitted.contains(&b"port".to_vec()),
    ) {
        (true, true) => DependsOn::Nothing,
        (false, true) => DependsOn::Address,
        (false, false) => DependsOn::AddressAndPort,
        (true, false) => bail!("a stranger is admitted, the same address is not"),
    };

    let mapping = if seen_by(&socket, &other_port)? != outer {
        DependsOn::AddressAndPort
    } else if seen_by(&socket, &other_address)? != outer {
        DependsOn::Address
    } else {
        DependsOn::Nothing
    };
    Ok(Behaviour { mapping, filtering })
}

/// The outer ports that a new inner endpoint gets, one after the other, for so many ports of one server.
///
/// # Errors
///
/// If a packet that has to come does not.
pub fn outer_ports(inside: &Node, server: (&Node, IpAddr), count: usize) -> Result<Vec<u16>> {
    let socket = bind(inside, any(server.1))?;
    let servers = (0..count).map(|_| bind(server.0, server.1));
    let servers = servers.collect::<Result<Vec<_>>>()?;
    let seen = servers.iter().map(|server| seen_by(&socket, server));
    seen.map(|seen| Ok(seen?.port())).collect()
}

fn any(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// A UDP socket on a node.
///
/// # Errors
///
/// If the address is not the node's.
pub fn bind(node: &Node, address: impl Into<IpAddr>) -> Result<UdpSocket> {
    let address = address.into();
    let socket = node.enter(|| UdpSocket::bind((address, 0)))??;
    socket.set_read_timeout(Some(ANSWER_LIMIT))?;
    Ok(socket)
}

fn seen_by(inside: &UdpSocket, outside: &UdpSocket) -> Result<SocketAddr> {
    inside.send_to(b"hello", outside.local_addr()?)?;
    Ok(receive(outside)?.1)
}

fn receive(socket: &UdpSocket) -> Result<(Vec<u8>, SocketAddr)> {
    let mut buffer = [0; 64];
    match socket.recv_from(&mut buffer) {
        Ok((length, from)) => Ok((buffer.iter().take(length).copied().collect(), from)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            bail!(
                "nothing came to {} in {ANSWER_LIMIT:?}",
                socket.local_addr()?
            )
        }
        Err(error) => Err(error).context("receive"),
    }
}
