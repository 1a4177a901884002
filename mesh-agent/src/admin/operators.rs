//! `meshctl --node`: an operator's agent passes a question on to another node's, with its own certificate; that one answers
//! nodes that its `operators` name, what changes nothing, and notes who asked for what. Without `operators` nobody listens.
//!
//! The node's own file says who may: nobody who may write the mesh's resources opens a node by that.

use std::{
    convert::Infallible,
    io,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use hyper::{Request, Response};
use mesh_api::{
    admin::agent_admin_server::AgentAdminServer,
    connect::{ConnectError, NODE_METADATA},
    serve::{Caller, tls_incoming_of},
};
use mesh_core::{pattern::NamePattern, snapshot::Snapshot};
use mesh_wire::id::{Identity, NodeName};
use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::Semaphore,
    time,
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body, server::NamedService, transport::Server};
use tower::{Service, ServiceExt as _};

use super::{Admin, node_of};
use crate::{mutual, proxy};

/// TCP port of agents on the overlay, below those of the mesh's UDP (`mesh_wire::announcement::PORT`).
pub(super) const PORT: u16 = 51_817;

/// What another node may ask: nothing of it changes anything. A new question is not among them until it is put here.
const READ_ONLY: &[&str] = &[
    "Status",
    "Peers",
    "Ping",
    "PathWhy",
    "Services",
    "DnsQuery",
    "DnsStatus",
    "DnsCache",
    "Drops",
    "Events",
    "Snapshots",
    "Trace",
    "Facts",
    "Bpf",
    "Route",
    "ExplainPolicy",
    "Keys",
];

/// Most `operators`: a node or two of each team, and some to spare.
pub(crate) const PATTERNS_MAX: usize = 64;

/// Connections at once: some operators with a few pages each; at 100 KiB a TLS connection 1.6 MiB.
const CONNECTIONS_MAX: u32 = 16;

/// Questions of one connection at once: `meshctl` asks one after the other.
const STREAMS_MAX: u32 = 4;

/// How long a connection may last: the longest `ping` that an agent sends (1,000 echoes) at one a second, and some more.
const LIFETIME: Duration = Duration::from_secs(1_800);

/// The same of who is not named: long enough to be told so.
const STRANGER_LIFETIME: Duration = Duration::from_secs(10);

/// How long another agent may take to be connected to: waking a path takes 2 s at worst (`../shared/paths.md`), and `meshctl`
/// waits 5 s in all.
const CONNECT_LIMIT: Duration = Duration::from_secs(4);

/// How soon a port that could not be listened at is tried again.
const RETRY: Duration = Duration::from_secs(30);

/// The admin service behind one of its doors.
#[derive(Clone)]
pub(super) struct Door {
    admin: Arc<Admin>,
    to: To,
}

#[derive(Debug, Clone, Copy)]
enum To {
    /// Who may open the admin socket: may ask everything, and by this node others.
    Machine,
    /// Other nodes.
    Mesh,
}

impl Door {
    pub(super) fn of_the_machine(admin: Admin) -> Self {
        Self {
            admin: Arc::new(admin),
            to: To::Machine,
        }
    }

    async fn answer(self, mut request: Request<Body>) -> Result<Response<Body>, Status> {
        match self.to {
            To::Machine => {
                if let Some(node) = request.headers_mut().remove(NODE_METADATA) {
                    let odd = |_| Status::invalid_argument("the name of the node is no text");
                    let node = node.to_str().map_err(odd)?;
                    return self.admin.pass_on(node, request).await;
                }
            }
            To::Mesh => {
                let caller = request.extensions().get::<Caller>().cloned();
                let question = request.uri().path().rsplit('/').next().unwrap_or_default();
                let question = question.to_owned();
                self.admin.admit(caller, question).await?;
            }
        }
        let own = AgentAdminServer::from_arc(self.admin);
        own.oneshot(request).await.map_err(|never| match never {})
    }
}

impl NamedService for Door {
    const NAME: &'static str = AgentAdminServer::<Admin>::NAME;
}

impl Service<Request<Body>> for Door {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(())) // The connections and their streams are limited.
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let answer = self.clone().answer(request);
        Box::pin(async { Ok(answer.await.unwrap_or_else(Status::into_http)) })
    }
}

impl Admin {
    /// Whether any other node may ask.
    #[must_use]
    pub fn has_operators(&self) -> bool {
        !self.facts.operators.is_empty()
    }

    /// Answers other nodes until `stop`.
    ///
    /// # Errors
    ///
    /// If the credentials make no TLS configuration, or the server breaks.
    pub async fn serve_operators(self, stop: CancellationToken) -> anyhow::Result<()> {
        let listener = loop {
            let problem = match listen(&self.facts.interface) {
                Ok(listener) => break listener,
                Err(problem) => problem,
            };
            tracing::warn!(port = PORT, %problem, "`operators` cannot ask this node");
            if time::timeout(RETRY, stop.cancelled()).await.is_ok() {
                return Ok(());
            }
        };
        let config = mutual::accept(Arc::clone(&self.facts.credentials))?;
        let refused = |peer, problem: &str| {
            tracing::info!(%peer, problem, "a connection to this node's agent was refused");
        };
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX as usize));
        let operators = self.facts.operators.clone();
        let incoming = tls_incoming_of(listener, places, config, refused);
        let incoming = incoming.map(move |connection| {
            let connection = connection?;
            let caller = tonic::transport::server::Connected::connect_info(&connection);
            let lifetime = match caller.identity() {
                Ok((_, Identity::Node { name, .. })) if names(&operators, &name) => LIFETIME,
                Ok(_) | Err(_) => STRANGER_LIFETIME,
            };
            Ok::<_, io::Error>(connection.ending_in(lifetime))
        });
        let door = Door {
            admin: Arc::new(self),
            to: To::Mesh,
        };
        Server::builder()
            .max_concurrent_streams(STREAMS_MAX)
            .add_service(door)
            .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
            .await?;
        Ok(())
    }

    /// Whether another node may have this answered; it is noted either way.
    async fn admit(&self, caller: Option<Caller>, question: String) -> Result<(), Status> {
        let by_another_door = || Status::internal("the request came by another door");
        let caller = caller.ok_or_else(by_another_door)?;
        let (_, identity) = caller.identity()?;
        let operators = self.facts.operators.clone();
        let judged = self.ask(move |driver| {
            let verdict = judge(&operators, &identity, driver.snapshot(), &question);
            let name = match &identity {
                Identity::Node { name, .. } => name.to_string(),
                Identity::Relay(name) => format!("relay {name}"),
                Identity::Controller => "controller".to_owned(),
            };
            let (what, why) = match &verdict {
                Ok(question) => (format!("asked {question}"), ""),
                Err(status) => ("was refused".to_owned(), status.message()),
            };
            tracing::info!(%name, what, why, "another node looks at this one");
            driver.journal.note_use(Instant::now(), &name, &what, why);
            verdict.map(drop)
        });
        judged.await?
    }

    /// What the agent of `node` answers.
    async fn pass_on(&self, node: &str, request: Request<Body>) -> Result<Response<Body>, Status> {
        let target = node.to_owned();
        let found = self.ask(move |driver| {
            let node = node_of(driver.snapshot(), &target)?;
            if driver.own().is_some_and(|own| own.id == node.id) {
                let text = format!("{target} is this node itself: leave out --node");
                return Err(Status::invalid_argument(text));
            }
            Ok((node.name.clone(), node.id, node.overlay_v4))
        });
        let (name, id, address) = found.await??;
        let identity = Identity::Node {
            name: name.clone(),
            id,
        };
        let credentials = self.facts.credentials.load_full();
        let connecting = mutual::connect(&credentials, identity, (address, PORT).into());
        let what = match time::timeout(CONNECT_LIMIT, connecting).await {
            Ok(Ok(channel)) => {
                let answer = channel.oneshot(request).await;
                return answer.map_err(|error| {
                    Status::unavailable(format!("{name}: {:#}", anyhow::Error::new(error)))
                });
            }
            Ok(Err(error)) if is_refused(&error) => {
                return Err(Status::permission_denied(format!(
                    "{name} answers no other node: name this one in `operators` of its agent.toml (nobody listens at its TCP port {PORT})"
                )));
            }
            Ok(Err(error)) => format!("{name}: {error:#}"),
            Err(_) => format!("no answer from the agent of {name} in {CONNECT_LIMIT:?}"),
        };
        let what = proxy::with_the_way(what, id, &self.driver).await;
        Err(Status::unavailable(what))
    }
}

/// Which nodes' operators may ask, as the configuration says it (`operators`).
///
/// # Errors
///
/// What is no name, or how many are too many.
pub(crate) fn patterns(patterns: Vec<String>) -> Result<Vec<NamePattern>, String> {
    if patterns.len() > PATTERNS_MAX {
        let count = patterns.len();
        return Err(format!("{count} patterns, at most {PATTERNS_MAX} can be"));
    }
    let odd = |pattern: &&String| {
        let name = pattern.strip_suffix('*').unwrap_or(pattern);
        pattern.is_empty() || name.contains('*')
    };
    match patterns.iter().find(odd) {
        Some(wrong) => Err(format!(
            "{wrong:?} is no node's name, nor the beginning of one and `*`"
        )),
        None => Ok(patterns.into_iter().map(NamePattern::new).collect()),
    }
}

/// Reached through the tunnel only, at whatever address the node has there.
fn listen(interface: &str) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    SockRef::from(&socket).bind_device(Some(interface.as_bytes()))?;
    socket.bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT)))?;
    socket.listen(CONNECTIONS_MAX)
}

fn names(operators: &[NamePattern], name: &NodeName) -> bool {
    operators.iter().any(|one| one.matches(name.as_str()))
}

/// Which question it is, if this caller may ask it.
fn judge(
    operators: &[NamePattern],
    identity: &Identity,
    snapshot: &Snapshot,
    question: &str,
) -> Result<&'static str, Status> {
    let node = mutual::member(identity, Some(snapshot))?;
    if !names(operators, &node.name) {
        return Err(Status::permission_denied(format!(
            "this node does not answer {}: name it in `operators` of this node's agent.toml",
            node.name
        )));
    }
    let found = READ_ONLY.iter().find(|one| **one == question);
    found.copied().ok_or_else(|| {
        Status::permission_denied(format!(
            "{question:?} is not for other nodes: ask on the node itself"
        ))
    })
}

fn is_refused(error: &anyhow::Error) -> bool {
    let refused = io::ErrorKind::ConnectionRefused;
    matches!(
        error.downcast_ref(),
        Some(ConnectError::Tcp { source, .. }) if source.kind() == refused
    )
}

#[cfg(test)]
mod tests;
