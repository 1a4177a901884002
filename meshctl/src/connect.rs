//! From a socket's path to a client, with a limit on every wait.

use std::{path::Path, time::Duration};

use mesh_api::{
    admin::{agent_admin_client::AgentAdminClient, controller_admin_client::ControllerAdminClient},
    connect::{NODE_METADATA, admin_channel},
};
use tokio::time::timeout;
use tonic::{
    Request, Response, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

use crate::failure::{Daemon, Failure};

/// A daemon on the same machine answers in milliseconds; the slowest question, to a silent DNS
/// upstream, takes 3 s.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Thousand nodes of 1 KiB each, or ten thousand endpoints, with room to spare.
const MESSAGE_MAX_BYTES: usize = 64 << 20;

/// Which agent is asked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Agent<'a> {
    /// The admin socket of this machine's agent.
    pub(crate) socket: &'a Path,
    /// The node whose agent it asks in its turn; `None`: it answers itself.
    pub(crate) node: Option<&'a str>,
}

/// Names the node in each request.
#[derive(Debug, Clone)]
pub(crate) struct ToNode(Option<MetadataValue<Ascii>>);

impl Interceptor for ToNode {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(node) = &self.0 {
            request.metadata_mut().insert(NODE_METADATA, node.clone());
        }
        Ok(request)
    }
}

pub(crate) type AgentClient = AgentAdminClient<InterceptedService<Channel, ToNode>>;

pub(crate) async fn agent(agent: Agent<'_>) -> Result<AgentClient, Failure> {
    let node = agent.node.map(|name| {
        let odd = |_| Failure::Refused(format!("{name:?} is no node's name (--node)"));
        name.parse().map_err(odd)
    });
    let to_node = ToNode(node.transpose()?);
    let channel = channel(Daemon::Agent, agent.socket).await?;
    let client = AgentAdminClient::with_interceptor(channel, to_node);
    Ok(client.max_decoding_message_size(MESSAGE_MAX_BYTES))
}

pub(crate) async fn controller(path: &Path) -> Result<ControllerAdminClient<Channel>, Failure> {
    let channel = channel(Daemon::Controller, path).await?;
    Ok(ControllerAdminClient::new(channel).max_decoding_message_size(MESSAGE_MAX_BYTES))
}

async fn channel(daemon: Daemon, path: &Path) -> Result<Channel, Failure> {
    let connected = timeout(ANSWER_TIMEOUT, admin_channel(path)).await;
    let connected = connected.map_err(|_| Failure::Slow(daemon.name(), ANSWER_TIMEOUT))?;
    connected.map_err(|error| Failure::connecting(daemon, path, &error))
}

/// What the daemon answers, within `limit`.
pub(crate) async fn answer<T>(
    daemon: Daemon,
    limit: Duration,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, Failure> {
    let answered = timeout(limit, call).await;
    Ok(answered.map_err(|_| Failure::Slow(daemon.name(), limit))??)
}

/// The same for a call with one answer, and with the usual limit.
pub(crate) async fn ask<T>(
    daemon: Daemon,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Failure> {
    let answered = answer(daemon, ANSWER_TIMEOUT, call).await;
    answered.map(Response::into_inner)
}
