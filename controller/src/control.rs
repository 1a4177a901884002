//! `Join`, `Renew` and `Sync`, over TLS.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::{Stream, stream};
use mesh_api::{
    control::{
        JoinRequest, JoinResponse, RenewRequest, SyncRequest, SyncResponse, control_server::Control,
    },
    resources::{SYNC_BYTES_MAX, digest::BUCKETS_MAX},
    serve::caller,
};
use mesh_daemon::{metrics::Page, traces::Span};
use mesh_identity::{authority::IssueError, certificate::Validity, token::JoinToken};
use mesh_wire::id::{Identity, NodeId, NodeName};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::spawn_blocking,
    time::{Instant, sleep_until},
};
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    history::{Differing, Index},
    kubernetes::{ReviewError, Reviewer},
    metrics::{self, Facts, Method},
    state::{PrepareError, SessionGuard, State},
    store::JoinError,
    token::Refusal,
};

/// Longest request: the digests of all buckets, and 4 KiB for the rest. A certificate request and a token
/// have 1.6 KiB.
pub const REQUEST_BYTES_MAX: usize = (BUCKETS_MAX as usize * size_of::<u64>()) + (4 << 10);

/// Longest answer that needs no turn and leaves the stream as it is. Both ends of a stream keep buffers as long as its
/// longest answer until it ends (tonic's, which belong to the stream): 64 MB for 1,000 nodes, but 10 GB if each was
/// told 100,000 endpoints. So a stream with a longer one ends as soon as the node has it, and the node opens the next
/// one on the same connection.
const SMALL_ANSWER_BYTES_MAX: usize = 64 << 10;

/// Most bytes of large answers under way. An answer is in memory until the node's connection has taken it: with
/// 100,000 endpoints 5 to 10 MB, so that 1,000 agents that come back at once would need 10 GB. They
/// get it six at a time, or one of the largest; small ones are given at once.
const FULL_ANSWERS_BYTES_MAX: usize = SYNC_BYTES_MAX;

/// [`FULL_ANSWERS_BYTES_MAX`] is counted in such units.
const FULL_ANSWERS_UNIT: usize = 1 << 10;

/// How long a node keeps its turn without saying that it has the answer: 10 MB at 3 Mb/s take 27 s. Then the next
/// one begins.
const TURN_MAX: Duration = Duration::from_secs(30);

/// Most joins under way at once: so many at most are published together. They wait for one store; while it does not answer,
/// each holds a thread, and others of the 512 are needed.
const JOINS_MAX: usize = 64;

/// How long is waited for a node's digests: those of all buckets take 0.2 s at 3 Mb/s, and to work them out takes
/// as long. A node that does not tell them gets everything.
const DIGESTS_TIMEOUT: Duration = Duration::from_secs(30);

type SyncStream = Pin<Box<dyn Stream<Item = Result<SyncResponse, Status>> + Send>>;

/// The service.
#[derive(Debug, Clone)]
pub struct ControlService {
    state: Arc<State>,
    /// Who is asked about ServiceAccount tokens; `None`: nobody, and none counts.
    reviewer: Option<Reviewer>,
    /// For full answers, one for each [`FULL_ANSWERS_UNIT`].
    turns: Arc<Semaphore>,
    joins: Arc<Semaphore>,
    stop: CancellationToken,
}

/// What lets a node in.
enum Pass {
    /// A token of ours.
    Token(Box<JoinToken>),
    /// The API server's word.
    Reviewed,
}

impl ControlService {
    /// Serves `state` until `stop`; `reviewer` judges ServiceAccount tokens.
    #[must_use]
    pub fn new(state: Arc<State>, reviewer: Option<Reviewer>, stop: CancellationToken) -> Self {
        Self {
            state,
            reviewer,
            turns: Arc::new(Semaphore::new(FULL_ANSWERS_BYTES_MAX / FULL_ANSWERS_UNIT)),
            joins: Arc::new(Semaphore::new(JOINS_MAX)),
            stop,
        }
    }

    /// What Prometheus is shown.
    pub async fn metrics(self) -> Page {
        let under_way = |all: usize, free: &Semaphore| all.saturating_sub(free.available_permits());
        let turns = under_way(FULL_ANSWERS_BYTES_MAX / FULL_ANSWERS_UNIT, &self.turns);
        let joins = under_way(JOINS_MAX, &self.joins);
        let state = self.state.clone();
        let facts = spawn_blocking(move || state.facts()).await;
        let facts = Facts {
            joins,
            large_answers_bytes: turns * FULL_ANSWERS_UNIT,
            ..facts.unwrap_or_default()
        };
        metrics::page(&facts, self.state.counters())
    }

    async fn pass(&self, request: &JoinRequest, name: &NodeName) -> Result<Pass, Status> {
        let account = request.service_account_token.as_str();
        match (request.token.as_str(), account, &self.reviewer) {
            (token, "", _) => Ok(Pass::Token(Box::new(parse("token", token)?))),
            ("", account, Some(reviewer)) => {
                let reviewed = reviewer.review(account, name).await;
                reviewed.map(|()| Pass::Reviewed).map_err(|error| {
                    tracing::warn!(node = %name, %error, "join refused");
                    review_status(&error)
                })
            }
            ("", _, None) => Err(Status::unimplemented(
                "this controller knows no Kubernetes cluster: join with a token of `meshctl token create`",
            )),
            (_, _, _) => {
                let text = "give `token` or `service_account_token`, not both";
                Err(Status::invalid_argument(text))
            }
        }
    }

    async fn let_in(
        &self,
        request: Request<JoinRequest>,
    ) -> Result<Response<JoinResponse>, Status> {
        let address = caller(&request)?.address;
        let request = request.into_inner();
        let name: NodeName = parse("node_name", &request.node_name)?;
        let id = NodeId::try_from(request.wireguard_public_key.as_slice());
        let id = id.map_err(|error| invalid("wireguard_public_key", &error))?;
        let pass = self.pass(&request, &name).await?;
        let turn = self.joins.acquire().await;
        let turn = turn.map_err(|error| Status::internal(error.to_string()))?;
        let state = self.state.clone();
        let (csr, applicant) = (request.csr_der, name.clone());
        let from = address.map(|address| address.ip().to_canonical());
        let joined = spawn_blocking(move || match pass {
            Pass::Token(token) => state.join(&token, &applicant, id, from, &csr),
            Pass::Reviewed => state.enroll(&applicant, id, from, &csr),
        });
        let joined = joined.await;
        drop(turn);
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

    fn certify_again(
        &self,
        request: &Request<RenewRequest>,
    ) -> Result<Response<JoinResponse>, Status> {
        let (name, id) = self.node(request)?;
        let csr = &request.get_ref().csr_der;
        let issued = self.state.node_certificate(&name, id, csr);
        let response = issued.map_err(|error| issue_status(&error))?;
        let chain = response.certificate_chain_der.iter();
        let chain: Vec<_> = chain.map(|der| der.as_slice().into()).collect();
        self.remember_certificate(&name, &chain);
        tracing::info!(node = %name, "certificate renewed");
        Ok(Response::new(response))
    }

    fn begin_stream(
        &self,
        request: Request<Streaming<SyncRequest>>,
    ) -> Result<Response<SyncStream>, Status> {
        let (name, id) = self.node(&request)?;
        if !self.state.serves() {
            let text = "this controller has not read everything yet that the mesh is made from: ask another, or again";
            return Err(Status::unavailable(text));
        }
        let guard = self.state.begin_session(&name);
        self.remember_certificate(&name, &caller(&request)?.certificates);
        let session = SyncSession {
            service: self.clone(),
            guard,
            name,
            id,
            requests: Some(request.into_inner()),
            has: Has::NotSaid,
            compares: false,
            changes: self.state.changes(),
            turn: None,
            was_large: false,
            is_over: false,
            answer: Span::default(),
        };
        tracing::debug!(node = %session.name, "sync begins");
        let responses = stream::unfold(Some(session), async |session| {
            let mut session = session?;
            match session.next().await? {
                Ok(response) => {
                    let state = &session.service.state;
                    state.counters().told(&response);
                    session.answer = state.trace_answer(&session.name, &response);
                    Some((Ok(response), Some(session)))
                }
                Err(status) => Some((Err(status), None)),
            }
        });
        Ok(Response::new(Box::pin(responses)))
    }

    /// Until when the node's own certificate, the first of `chain`, lasts.
    fn remember_certificate(&self, name: &NodeName, chain: &[CertificateDer<'_>]) {
        let validity = chain.first().map(Validity::of);
        if let Some(Ok(validity)) = validity {
            self.state.certified(name, validity.not_after);
        }
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
        let text = match self.state.removed_unix_s(name) {
            Some(_) => format!(
                "node {name} was taken out of the mesh: to let it in again, run `mesh-agent purge` there and give it a new token"
            ),
            None => {
                format!("node {name} with this key is not registered (any more): join again")
            }
        };
        Err(Status::permission_denied(text))
    }
}

#[tonic::async_trait]
impl Control for ControlService {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let answer = self.let_in(request).await;
        self.state.counters().answered(Method::Join, &answer);
        answer
    }

    async fn renew(
        &self,
        request: Request<RenewRequest>,
    ) -> Result<Response<JoinResponse>, Status> {
        let answer = self.certify_again(&request);
        self.state.counters().answered(Method::Renew, &answer);
        answer
    }

    type SyncStream = SyncStream;

    async fn sync(
        &self,
        request: Request<Streaming<SyncRequest>>,
    ) -> Result<Response<Self::SyncStream>, Status> {
        let answer = self.begin_stream(request);
        self.state.counters().answered(Method::Sync, &answer);
        answer
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
    /// Whether it can be asked for digests.
    compares: bool,
    changes: watch::Receiver<u64>,
    /// While a large answer is under way, and until when at most.
    turn: Option<(OwnedSemaphorePermit, Instant)>,
    /// Whether there was a large answer, and whether the node has it by now.
    was_large: bool,
    is_over: bool,
    /// The last answer, until the node has it.
    answer: Span,
}

/// What the node has.
#[derive(Debug, Clone)]
enum Has {
    /// It did not say yet.
    NotSaid,
    /// This generation, or nothing of this store; it waits for the first answer.
    Said(Option<u64>),
    /// It was asked for its digests, to be compared with these, until then.
    Asked(Arc<Index>, Instant),
    /// It told them.
    Told(Differing),
    /// It was sent this generation.
    Sent(u64),
}

impl SyncSession {
    /// The next answer; `None`: the node is gone, or has to open another stream ([`SMALL_ANSWER_BYTES_MAX`]).
    async fn next(&mut self) -> Option<Result<SyncResponse, Status>> {
        loop {
            if self.is_over {
                return None;
            }
            if self.should_ask() {
                let asked = self.ask().await;
                return Some(asked.and_then(|asked| {
                    let registered = self.service.check_registered(&self.name, self.id);
                    registered.map(|()| asked)
                }));
            }
            let large_bytes = self.large_bytes();
            let units = large_bytes.div_ceil(FULL_ANSWERS_UNIT);
            let units = units.min(FULL_ANSWERS_BYTES_MAX / FULL_ANSWERS_UNIT);
            let waits = units > 0 && self.turn.is_none();
            if !waits && let Some(response) = self.due() {
                return Some(
                    self.service
                        .check_registered(&self.name, self.id)
                        .map(|()| response),
                );
            }
            let turns = self.service.turns.clone();
            let units = u32::try_from(units).unwrap_or(u32::MAX);
            let turn_ends = self.turn.as_ref().map(|(_, ends)| *ends);
            let asked_until = match &self.has {
                Has::Asked(_, until) => Some(*until),
                Has::NotSaid | Has::Said(_) | Has::Told(_) | Has::Sent(_) => None,
            };
            tokio::select! {
                biased;
                () = self.service.stop.cancelled() => {
                    return Some(Err(Status::unavailable("the controller stops")));
                }
                () = self.guard.replaced.cancelled() => {
                    return Some(Err(Status::aborted("the node opened another stream")));
                }
                request = next_request(&mut self.requests) => {
                    if let Err(lost) = self.handle_request(&request?) {
                        return Some(Err(Status::failed_precondition(lost)));
                    }
                }
                turn = turns.acquire_many_owned(units), if waits => {
                    self.turn = Some((turn.ok()?, Instant::now() + TURN_MAX));
                }
                () = sleep_until(turn_ends.unwrap_or_else(Instant::now)), if turn_ends.is_some() => {
                    self.turn = None;
                }
                () = sleep_until(asked_until.unwrap_or_else(Instant::now)), if asked_until.is_some() => {
                    self.give_up_comparing();
                }
                changed = self.changes.changed(), if !waits => changed.ok()?,
            }
        }
    }

    /// Whether the node has something, and nothing is known of what that is.
    fn should_ask(&self) -> bool {
        let state = &self.service.state;
        self.compares
            && match self.has {
                Has::NotSaid | Has::Asked(..) | Has::Told(_) => false,
                Has::Said(known) => !state.knows(known),
                Has::Sent(generation) => !state.knows(Some(generation)),
            }
    }

    async fn ask(&mut self) -> Result<SyncResponse, Status> {
        let state = self.service.state.clone();
        let index = spawn_blocking(move || state.index()).await;
        let index = index.map_err(|error| Status::internal(error.to_string()))?;
        let digests_wanted = index.buckets();
        self.has = Has::Asked(index, Instant::now() + DIGESTS_TIMEOUT);
        Ok(SyncResponse {
            digests_wanted,
            ..SyncResponse::default()
        })
    }

    fn give_up_comparing(&mut self) {
        self.compares = false;
        self.has = Has::Said(None);
    }

    /// The size of the next answer, if it is large.
    fn large_bytes(&self) -> usize {
        let state = &self.service.state;
        let bytes = match &self.has {
            Has::NotSaid | Has::Asked(..) => 0,
            Has::Said(known) => state.answer_bytes(*known),
            Has::Told(differing) => state.differing_bytes(differing),
            Has::Sent(generation) => state.answer_bytes(Some(*generation)),
        };
        if bytes > SMALL_ANSWER_BYTES_MAX {
            bytes
        } else {
            0
        }
    }

    /// An answer, if the node must be told something. The first is always due, even when it says
    /// nothing new: it tells the node that it is up to date.
    fn due(&mut self) -> Option<SyncResponse> {
        let state = &self.service.state;
        let response = match &self.has {
            Has::NotSaid | Has::Asked(..) => return None,
            Has::Sent(generation) if *generation == *self.changes.borrow_and_update() => {
                return None;
            }
            Has::Said(known) => {
                self.changes.mark_unchanged();
                state.since(*known)
            }
            Has::Sent(generation) => {
                self.changes.mark_unchanged();
                state.since(Some(*generation))
            }
            Has::Told(differing) => {
                self.changes.mark_unchanged();
                state.since_differing(differing)
            }
        };
        self.has = Has::Sent(response.generation);
        self.was_large |= self.turn.is_some();
        Some(response)
    }

    /// The error is for people: what the node has was lost here.
    fn handle_request(&mut self, request: &SyncRequest) -> Result<(), String> {
        let ours = request.store_id == self.service.state.store_id();
        if ours {
            self.guard.acknowledge(request.generation);
        }
        if let Some(report) = request.report {
            self.guard.report(report.into());
        }
        self.guard.returns_within_s(request.returns_within_s);
        match &self.has {
            Has::NotSaid => {
                self.compares = request.compares;
                self.has = Has::Said(self.service.state.has(&self.name, request)?);
            }
            // A report, which crossed the question.
            Has::Asked(..) if request.digests.is_empty() => {}
            Has::Asked(index, _) => match index.clone().compare(&request.digests) {
                Some(differing) => self.has = Has::Told(differing),
                None => self.give_up_comparing(),
            },
            Has::Said(_) | Has::Told(_) => {}
            // Or, before that, the answer.
            Has::Sent(generation) if !ours || request.generation < *generation => {}
            Has::Sent(_) => {
                let mut answer = std::mem::take(&mut self.answer);
                answer.set("acknowledged", true);
                self.turn = None;
                self.is_over = self.was_large;
            }
        }
        Ok(())
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
        // Both pass: whoever asks should ask again.
        JoinError::Prepare(PrepareError::NotReady | PrepareError::NotApproved(_)) => {
            Status::unavailable(text)
        }
        JoinError::Prepare(PrepareError::NoAddress) => Status::resource_exhausted(text),
        JoinError::Prepare(PrepareError::Issue(error)) => issue_status(error),
        JoinError::Store(_) => Status::unavailable(text),
    }
}

fn review_status(error: &ReviewError) -> Status {
    let text = error.to_string();
    match error {
        ReviewError::Unavailable(_) => Status::unavailable(text),
        ReviewError::Unknown(_) | ReviewError::Audience => Status::unauthenticated(text),
        ReviewError::Account { .. } | ReviewError::Unbound | ReviewError::Node { .. } => {
            Status::permission_denied(text)
        }
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
