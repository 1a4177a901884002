//! A node that this machine itself is about to send something to: woken, and with its address.

use std::net::Ipv4Addr;

use mesh_api::admin::PingRequest;

use crate::{
    connect::{self, Agent, AgentClient, ask},
    failure::{Daemon, Failure},
    run,
};

/// Echoes to a node, ms between them, and ms until one is lost: the first may have to wake a path.
pub(crate) const ECHOES: u32 = 3;
const ECHO_EVERY_MS: u32 = 100;
const ECHO_LIMIT_MS: u32 = 2_500;

/// What came back.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Echoed {
    /// Of those that were answered, in ms.
    pub(crate) round_trips_ms: Vec<f64>,
    /// By which the last one went.
    pub(crate) path: String,
}

/// Sends [`ECHOES`] through the tunnel.
pub(crate) async fn echoes(mut client: AgentClient, node: String) -> Result<Echoed, Failure> {
    let request = PingRequest {
        target: node,
        count: ECHOES,
        interval_ms: ECHO_EVERY_MS,
        timeout_ms: ECHO_LIMIT_MS,
        ..PingRequest::default()
    };
    let mut stream = ask(Daemon::Agent, client.ping(request)).await?;
    let mut echoed = Echoed::default();
    for _ in 0..ECHOES {
        let next = connect::answer(Daemon::Agent, connect::ANSWER_TIMEOUT, stream.message());
        let Some(said) = next.await? else {
            break;
        };
        echoed.round_trips_ms.extend(said.rtt_ms);
        echoed.path = said.path;
    }
    Ok(echoed)
}

/// The address of a node that was woken, whether it answered or not: who it is says the agent.
pub(crate) async fn address(agent: Agent<'_>, node: &str) -> Result<Ipv4Addr, Failure> {
    let client = connect::agent(agent).await?;
    echoes(client, node.to_owned()).await?;
    let peers = run::peers(agent).await?.peers;
    let peer = peers.iter().find(|peer| peer.name == node);
    let unknown = || Failure::Refused(format!("{node:?} is no node's name"));
    v4(&peer.ok_or_else(unknown)?.overlay_addresses)
}

/// The IPv4 address among a node's.
pub(crate) fn v4(addresses: &[String]) -> Result<Ipv4Addr, Failure> {
    let found = addresses.iter().find_map(|one| one.parse().ok());
    found.ok_or_else(|| Failure::Failed(format!("no IPv4 address among {addresses:?}")))
}
