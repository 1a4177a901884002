//! `Join`, `Renew` and `Sync`, over TLS.

use std::{pin::Pin, sync::Arc};

use futures_util::{Stream, stream};
use mesh_api::{
    control::{
        JoinRequest, JoinResponse, RenewRequest, SyncRequest, SyncResponse, control_server::Control,
    },
    serve::caller,
};
use mesh_identity::{authority::IssueError, token::JoinToken};
use mesh_wire::id::{Identity, NodeId, NodeName};
use tokio::{sync::watch, task::spawn_blocking};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    state::{PrepareError, SessionGuard, State},
    store::JoinError,
    token::Refusal,
};

/// Longest request: a certificate request and a token, ten times over.
pub const REQUEST_BYTES_MAX: usize = 16 << 10;

/// The service.
#[derive(Debug, Clone)]
pub struct ControlService {
    state: Arc<State>,
    stop: CancellationToken,
}

impl ControlService {
    /// Serves `state` until `stop`.
    #[must_use]
    pub fn new(state: Arc<State>, stop: CancellationToken) -> Self {
        Self { state, stop }
    }

    /// The node that called, if its certificate is this mesh's and its key still registered.
    fn node<T>(&self, request: &Request<T>) -> Result<(NodeName, NodeId), Status> {
        let (_, identity) = caller(request)?.identity()?;
        let (name, id) = match identity {
            Identity::Node { name, id } => (name, id),
            Identity::Relay(_) | Identity::Controller => {
                return Err(Status::permission_denied("only nodes may ask this"));
            }
        };
        self.check_registered(&name, id)?;
        Ok((name, id))
    }

    fn check_registered(&self, name: &NodeName, id: NodeId) -> Result<(), Status> {
        if self.state.is_registered(name, id) {
            return Ok(());
        }
        let text = format!("node {name} with this key is not registered (any more): join again");
        Err(Status::permission_denied(text))
    }
}

#[tonic::async_trait]
impl Control for ControlService {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let address = caller(&request)?.address;
        let request = request.into_inner();
        let token: JoinToken = parse("token", request.token.as_str())?;
        let name: NodeName = parse("node_name", &request.node_name)?;
        let id = NodeId::try_from(request.wireguard_public_key.as_slice());
        let id = id.map_err(|error| invalid("wireguard_public_key", &error))?;
        let state = self.state.clone();
        let (csr, applicant) = (request.csr_der, name.clone());
        let joined = spawn_blocking(move || state.join(&token, &applicant, id, &csr)).await;
        let joined = joined.map_err(|error| Status::internal(error.to_string()))?;
        match joined {
            Ok(response) => {
                tracing::info!(node = %name, ?id, ?address, "joined");
                Ok(Response::new(response))
            }
            Err(error) => {
                tracing::warn!(node = %name, ?address, %error, "join refused");
                Err(join_status(&error))
            }
        }
    }

    async fn renew(
        &self,
        request: Request<RenewRequest>,
    ) -> Result<Response<JoinResponse>, Status> {
        let (name, id) = self.node(&request)?;
        let csr = request.into_inner().csr_der;
        let issued = self.state.node_certificate(&name, id, &csr);
        let response = issued.map_err(|error| issue_status(&error))?;
        tracing::info!(node = %name, "certificate renewed");
        Ok(Response::new(response))
    }

    type SyncStream = Pin<Box<dyn Stream<Item = Result<SyncResponse, Status>> + Send>>;

    async fn sync(
        &self,
        request: Request<Streaming<SyncRequest>>,
    ) -> Result<Response<Self::SyncStream>, Status> {
        let (name, id) = self.node(&request)?;
        let session = SyncSession {
            service: self.clone(),
            guard: self.state.begin_session(&name),
            name,
            id,
            requests: Some(request.into_inner()),
            has: Has::NotSaid,
            changes: self.state.changes(),
        };
        tracing::debug!(node = %session.name, "sync begins");
        let responses = stream::unfold(Some(session), async |session| {
            let mut session = session?;
            match session.next().await? {
                Ok(response) => Some((Ok(response), Some(session))),
                Err(status) => Some((Err(status), None)),
            }
        });
        Ok(Response::new(Box::pin(responses)))
    }
}

/// One node's stream. It holds no queue: an answer is made when the connection takes it, from
/// what the mesh is then, so a slow node gets fewer and never staler answers.
struct SyncSession {
    service: ControlService,
    name: NodeName,
    id: NodeId,
    guard: SessionGuard,
    /// `None`: the node says no more.
    requests: Option<Streaming<SyncRequest>>,
    has: Has,
    changes: watch::Receiver<u64>,
}

/// What the node has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Has {
    /// It did not say yet.
    NotSaid,
    /// This generation, or nothing of this store; it waits for the first answer.
    Said(Option<u64>),
    /// It was sent this generation.
    Sent(u64),
}

impl SyncSession {
    /// The next answer; `None`: the node is gone.
    async fn next(&mut self) -> Option<Result<SyncResponse, Status>> {
        loop {
            if let Some(response) = self.due() {
                return Some(
                    self.service
                        .check_registered(&self.name, self.id)
                        .map(|()| response),
                );
            }
            tokio::select! {
                biased;
                () = self.service.stop.cancelled() => {
                    return Some(Err(Status::unavailable("the controller stops")));
                }
                () = self.guard.replaced.cancelled() => {
                    return Some(Err(Status::aborted("the node opened another stream")));
                }
                request = next_request(&mut self.requests) => self.handle_request(request?),
                changed = self.changes.changed() => changed.ok()?,
            }
        }
    }

    /// An answer, if the node must be told something. The first is always due, even when it says
    /// nothing new: it tells the node that it is up to date.
    fn due(&mut self) -> Option<SyncResponse> {
        let known = match self.has {
            Has::NotSaid => return None,
            Has::Said(known) => known,
            Has::Sent(generation) if generation == *self.changes.borrow_and_update() => {
                return None;
            }
            Has::Sent(generation) => Some(generation),
        };
        self.changes.mark_unchanged();
        let response = self.service.state.since(known);
        self.has = Has::Sent(response.generation);
        Some(response)
    }

    fn handle_request(&mut self, request: SyncRequest) {
        let ours = request.store_id == self.service.state.store_id();
        if ours {
            self.guard.acknowledge(request.generation);
        }
        if self.has == Has::NotSaid {
            self.has = Has::Said(ours.then_some(request.generation));
        }
    }
}

/// `None`: the connection broke. A node that merely says no more is waited for no longer.
async fn next_request(requests: &mut Option<Streaming<SyncRequest>>) -> Option<SyncRequest> {
    if let Some(open) = requests {
        match open.message().await {
            Ok(Some(request)) => return Some(request),
            Ok(None) => *requests = None,
            Err(_) => return None,
        }
    }
    std::future::pending().await
}

fn parse<T: std::str::FromStr<Err: std::fmt::Display>>(
    field: &str,
    text: &str,
) -> Result<T, Status> {
    text.parse().map_err(|error| invalid(field, &error))
}

fn invalid(field: &str, error: &impl std::fmt::Display) -> Status {
    Status::invalid_argument(format!("{field}: {error}"))
}

fn join_status(error: &JoinError<PrepareError>) -> Status {
    let text = error.to_string();
    match error {
        JoinError::Refused(refusal) | JoinError::Prepare(PrepareError::Refused(refusal)) => {
            match refusal {
                Refusal::Unknown => Status::unauthenticated(text),
                Refusal::Expired(_) | Refusal::UsedUp | Refusal::OtherNode(_) => {
                    Status::permission_denied(text)
                }
                Refusal::NameTaken(_) | Refusal::KeyTaken(_) => Status::already_exists(text),
            }
        }
        JoinError::Prepare(PrepareError::NoAddress) => Status::resource_exhausted(text),
        JoinError::Prepare(PrepareError::Issue(error)) => issue_status(error),
        JoinError::Store(_) => Status::unavailable(text),
    }
}

fn issue_status(error: &IssueError) -> Status {
    match error {
        IssueError::Request(_) | IssueError::KeyKind => {
            Status::invalid_argument(format!("csr_der: {error}"))
        }
        IssueError::Signing(_) | IssueError::Random => Status::internal(error.to_string()),
    }
}
