//! etcd: what several controllers share where there is no Kubernetes, and which of them leads.
//!
//! Keys below the configured prefix: `authority`, `tokens/ID`, `nodes/NAME`, `addresses/IPV4`, `keys/HEX`,
//! `leader`. Connections are TLS only: the authority's private key passes over them.

use std::{
    fmt::Display,
    fs,
    path::Path,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Result;
use mesh_api::connect::{ALPN, control_channel};
use mesh_identity::authority::CertificateAuthority;
use mesh_wire::id::NodeName;
use serde::{Deserialize, Serialize};
use tokio::{
    runtime::Handle,
    sync::mpsc,
    task::spawn_blocking,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_rustls::rustls::{
    ClientConfig, RootCertStore,
    crypto::ring::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Status, Streaming, metadata::MetadataValue, transport::Channel};
use zeroize::Zeroizing;

use self::proto::{
    AuthenticateRequest, Compare, DeleteRangeRequest, KeyValue, LeaseGrantRequest,
    LeaseKeepAliveRequest, LeaseRevokeRequest, PutRequest, RangeRequest, RangeResponse, RequestOp,
    TxnRequest, TxnResponse, WatchCreateRequest, WatchProgressRequest, WatchRequest,
    auth_client::AuthClient,
    compare::{CompareResult, CompareTarget, TargetUnion},
    event::EventType,
    kv_client::KvClient,
    lease_client::LeaseClient,
    request_op::Request as Operation,
    watch_client::WatchClient,
    watch_request::RequestUnion,
};
use super::{Change, Found, Key, Seen, Shared, damaged, decode, decode_node, encode, node_name};
use crate::{
    config::EtcdSettings,
    state::{NodeChange, NodeFact, State},
    store::{Nodes, StoreError},
    token::TokenRecord,
};

#[expect(
    unreachable_pub,
    clippy::enum_variant_names,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]
mod proto {
    tonic::include_proto!("etcdserverpb");
}

/// How long one member may take for one answer. One that lost its leader finds another in 1 to 2 s
/// (`--election-timeout`), and if it cannot, the next member is asked.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);

/// How many nodes are a page: of 250 bytes each, 1.3 MB.
const NODES_PAGE: i64 = 5000;

/// How many tokens are: the largest, of 10,000 uses, have 700 KB.
const TOKENS_PAGE: i64 = 64;

/// Longest page: [`TOKENS_PAGE`] of the largest tokens.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// How long the lead is kept by a controller that is not heard of. Then another takes over.
const LEASE_S: i64 = 10;

/// How often the lead is renewed, or sought: three times until it would be lost, with an answer that
/// takes its time in between.
const LEAD_ROUND: Duration = Duration::from_secs(2);

/// How long before the lease ends the lead is given up: what was begun then is over by its end.
const LEASE_MARGIN: Duration = Duration::from_secs(2);

/// How often is asked whether the watch is alive; the answer may take as long. So a member that is gone
/// in silence is left within 10 s.
const WATCH_ALIVE: Duration = Duration::from_secs(5);

/// Pause before the next member is asked after one failed.
const RETRY: Duration = Duration::from_millis(500);

/// The store.
#[derive(Debug)]
pub struct Etcd {
    members: Members,
    runtime: Handle,
}

#[derive(Debug, Serialize, Deserialize)]
struct AuthorityRecord {
    certificate: String,
    key: String,
}

impl Etcd {
    /// The store that is configured so. Its methods must be called where a thread may be blocked, and not
    /// on one that runs `runtime`.
    #[must_use]
    pub fn new(settings: Arc<EtcdSettings>, runtime: Handle) -> Self {
        Self {
            members: Members::new(settings),
            runtime,
        }
    }

    fn ask<T>(
        &mut self,
        question: impl AsyncFn(&Member) -> Result<T, Status>,
    ) -> Result<T, StoreError> {
        let Self { members, runtime } = self;
        runtime.block_on(members.ask(question))
    }

    fn all(&mut self, prefix: &[u8], page: i64) -> Result<(Vec<KeyValue>, u64), StoreError> {
        let Self { members, runtime } = self;
        runtime.block_on(async {
            let mut listed = members.all(prefix, page).await;
            for _ in 1..members.settings.endpoints.len() {
                if listed.is_err() {
                    listed = members.all(prefix, page).await;
                }
            }
            listed
        })
    }

    /// What every member may be asked, one after the other.
    fn ask_any<T>(
        &mut self,
        question: impl AsyncFn(&Member) -> Result<T, Status>,
    ) -> Result<T, StoreError> {
        let Self { members, runtime } = self;
        runtime.block_on(members.ask_any(question))
    }
}

impl Shared for Etcd {
    fn place(&self) -> String {
        self.members.place()
    }

    fn authority(
        &mut self,
        proposed: &CertificateAuthority,
    ) -> Result<CertificateAuthority, StoreError> {
        let place = self.place();
        let key = self.members.key("authority");
        let value = encode(&AuthorityRecord {
            certificate: proposed.certificate_pem(),
            key: proposed.key_pem().to_string(),
        });
        let first = TxnRequest {
            compare: vec![unchanged(key.clone(), 0)],
            success: vec![put(key.clone(), value, 0)],
        };
        self.ask_any(async |member| member.transact(first.clone()).await)?;
        let range = RangeRequest {
            key,
            ..RangeRequest::default()
        };
        let found = self.ask_any(async |member| member.range(range.clone()).await)?;
        let found = found.kvs.into_iter().next();
        let found = found.ok_or_else(|| damaged(&place, "the authority"))?;
        let record: AuthorityRecord = decode(&place, "the authority", &found.value)?;
        let key = Zeroizing::new(record.key);
        let authority = CertificateAuthority::from_pem(&record.certificate, &key);
        authority.map_err(|source| StoreError::Authority { place, source })
    }

    fn nodes(&mut self) -> Result<(Nodes, u64), StoreError> {
        let place = self.place();
        let prefix = self.members.key("nodes/");
        let (found, revision) = self.all(&prefix, NODES_PAGE)?;
        let nodes = found.into_iter().map(|found| {
            let (_, name) = found.key.split_at(prefix.len().min(found.key.len()));
            let name = node_name(&place, name)?;
            let node = decode_node(&place, &name, &found.value)?;
            Ok((name, node))
        });
        Ok((nodes.collect::<Result<_, StoreError>>()?, revision))
    }

    fn tokens(&mut self) -> Result<Vec<(String, TokenRecord)>, StoreError> {
        let place = self.place();
        let prefix = self.members.key("tokens/");
        let (found, _) = self.all(&prefix, TOKENS_PAGE)?;
        let tokens = found.into_iter().map(|found| {
            let (_, id) = found.key.split_at(prefix.len().min(found.key.len()));
            let id = String::from_utf8_lossy(id).into_owned();
            Ok((id, decode(&place, "a token", &found.value)?))
        });
        tokens.collect()
    }

    fn get(&mut self, keys: &[Key]) -> Result<Vec<Option<Found>>, StoreError> {
        let ranges = keys.iter().map(|key| RequestOp {
            request: Some(Operation::RequestRange(RangeRequest {
                key: self.members.path(key),
                ..RangeRequest::default()
            })),
        });
        // One transaction, so that all are of one moment.
        let read = TxnRequest {
            compare: Vec::new(),
            success: ranges.collect(),
        };
        let answer = self.ask_any(async |member| member.transact(read.clone()).await)?;
        let found = answer.responses.into_iter().map(|response| {
            let proto::response_op::Response::ResponseRange(range) = response.response?;
            range.kvs.into_iter().next().map(Found::from)
        });
        let found: Vec<_> = found.collect();
        if found.len() != keys.len() {
            return Err(self
                .members
                .failed(&"it answered other questions than were asked"));
        }
        Ok(found)
    }

    fn commit(&mut self, seen: &[Seen], changes: &[Change]) -> Result<Option<u64>, StoreError> {
        let members = &self.members;
        let compare = seen.iter().map(|(key, found)| {
            let revision = found.as_ref().map_or(0, |found| found.revision);
            unchanged(members.path(key), revision)
        });
        let success = changes.iter().map(|(key, value)| match value {
            Some(value) => put(members.path(key), value.clone(), 0),
            None => RequestOp {
                request: Some(Operation::RequestDeleteRange(DeleteRangeRequest {
                    key: members.path(key),
                })),
            },
        });
        let transaction = TxnRequest {
            compare: compare.collect(),
            success: success.collect(),
        };
        let answer = self.ask(async |member| member.transact(transaction.clone()).await)?;
        Ok(answer.succeeded.then(|| revision(answer.header)))
    }
}

/// Keeps the state's nodes as they are in etcd, and seeks its lead, until `stop`.
///
/// # Errors
///
/// If taking in what was heard panicked. What etcd refuses is tried again.
pub async fn run(
    state: Arc<State>,
    settings: Arc<EtcdSettings>,
    stop: CancellationToken,
) -> Result<()> {
    tokio::select! {
        followed = follow(&state, settings.clone()) => followed,
        () = lead(&state, settings, stop.clone()) => Ok(()),
    }
}

/// Follows the nodes, for ever.
async fn follow(state: &Arc<State>, settings: Arc<EtcdSettings>) -> Result<()> {
    let mut members = Members::new(settings);
    loop {
        let Err(error) = follow_one(state, &mut members).await? else {
            continue;
        };
        let told = state.clone();
        tracing::info!(%error, "the shared store cannot be followed; asking its next member");
        spawn_blocking(move || told.hear_of_shared(Some(error.to_string()))).await?;
        sleep(RETRY.mul_f64(rand::random_range(0.5..1.0))).await;
    }
}

/// Follows one member as long as it answers.
async fn follow_one(state: &Arc<State>, members: &mut Members) -> Result<Result<(), StoreError>> {
    let (place, prefix) = (members.place(), members.key("nodes/"));
    let opened = open_watch(members, &prefix).await;
    let Opened {
        found,
        revision,
        say,
        mut stream,
    } = match opened {
        Ok(opened) => opened,
        Err(error) => return Ok(Err(error)),
    };
    let found = found.into_iter().map(|found| (found, true));
    let changes = node_changes(&place, &prefix, found);
    let taking = state.clone();
    spawn_blocking(move || {
        taking.take_nodes(changes, revision);
        taking.hear_of_shared(None);
    })
    .await?;
    let mut alive = true;
    let mut check = interval(WATCH_ALIVE);
    check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let message = tokio::select! {
            message = stream.message() => message,
            _ = check.tick() => {
                if !std::mem::replace(&mut alive, false) {
                    return Ok(Err(members.left(&"its watch says nothing any more")));
                }
                let progress = RequestUnion::ProgressRequest(WatchProgressRequest {});
                say.send(asks(progress)).await.ok(); // It is noticed above that nobody reads it.
                continue;
            }
        };
        alive = true;
        let message = match message {
            Ok(Some(message)) if !message.canceled => message,
            Ok(Some(message)) => {
                let why = format!("the watch was ended: {}", message.cancel_reason);
                return Ok(Err(members.left(&why)));
            }
            Ok(None) => return Ok(Err(members.left(&"the watch ended"))),
            Err(status) => return Ok(Err(members.left(&status.message()))),
        };
        let events = message.events.into_iter();
        let events = events.filter_map(|event| {
            let there = event.r#type() == EventType::Put;
            Some((event.kv?, there))
        });
        let changes = node_changes(&place, &prefix, events);
        if !changes.is_empty() {
            let taking = state.clone();
            spawn_blocking(move || taking.change_nodes(changes)).await?;
        }
    }
}

/// What there is, and what hears of its changes.
struct Opened {
    found: Vec<KeyValue>,
    revision: u64,
    say: mpsc::Sender<WatchRequest>,
    stream: Streaming<proto::WatchResponse>,
}

async fn open_watch(members: &mut Members, prefix: &[u8]) -> Result<Opened, StoreError> {
    let (found, revision) = members.all(prefix, NODES_PAGE).await?;
    let (say, said) = mpsc::channel(2);
    let create = WatchCreateRequest {
        range_end: after(prefix),
        key: prefix.to_vec(),
        start_revision: i64::try_from(revision)
            .unwrap_or(i64::MAX)
            .saturating_add(1),
    };
    // There is room for it.
    say.send(asks(RequestUnion::CreateRequest(create)))
        .await
        .ok();
    let member = members.member().await?;
    let stream = members
        .heard(member.watch(ReceiverStream::new(said)))
        .await?;
    Ok(Opened {
        found,
        revision,
        say,
        stream,
    })
}

/// What is said of nodes. A record that cannot be read takes nothing away.
fn node_changes(
    place: &str,
    prefix: &[u8],
    found: impl Iterator<Item = (KeyValue, bool)>,
) -> Vec<NodeChange> {
    let change = |(found, there): (KeyValue, bool)| -> Result<NodeChange, StoreError> {
        let (_, name) = found.key.split_at(prefix.len().min(found.key.len()));
        let name: NodeName = node_name(place, name)?;
        let fact = match there.then(|| decode_node(place, &name, &found.value)) {
            None => NodeFact::Gone,
            Some(Ok(node)) => NodeFact::Is(node),
            Some(Err(error)) => {
                tracing::warn!(%error, "this node is left as it was");
                NodeFact::Unreadable
            }
        };
        Ok(NodeChange {
            fact,
            name,
            revision: Found::from(found).revision,
        })
    };
    let changes = found.map(change).filter_map(|change| match change {
        Ok(change) => Some(change),
        Err(error) => {
            tracing::warn!(%error, "this key is of no node");
            None
        }
    });
    changes.collect()
}

/// Seeks the lead, and keeps it, until `stop`; then leaves it to the others.
async fn lead(state: &Arc<State>, settings: Arc<EtcdSettings>, stop: CancellationToken) {
    let mut members = Members::new(settings);
    let name = state.instance();
    let mut lease = None;
    let mut rounds = interval(LEAD_ROUND);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = rounds.tick() => {}
            () = stop.cancelled() => break,
        }
        // The lease cannot end earlier than so long after it was asked for.
        let asked = Instant::now();
        let key = members.key("leader");
        match round(&mut members, &key, &name, lease).await {
            Ok(Some((kept, ttl_s))) => {
                lease = Some(kept);
                let ttl = Duration::from_secs(u64::try_from(ttl_s).unwrap_or(0));
                state.lead(Some(asked + ttl.saturating_sub(LEASE_MARGIN)));
            }
            Ok(None) => {
                lease = None;
                state.lead(None);
            }
            // It ends by itself, unless the next member renews it.
            Err(error) => {
                tracing::debug!(%error, "the lead cannot be renewed now");
            }
        }
    }
    state.lead(None);
    if let Some(id) = lease {
        // If that fails, the others wait until it is over.
        if let Ok(member) = members.member().await {
            members.heard(member.revoke(id)).await.ok();
        }
    }
}

async fn round(
    members: &mut Members,
    key: &[u8],
    name: &str,
    lease: Option<i64>,
) -> Result<Option<(i64, i64)>, StoreError> {
    let member = members.member().await?;
    members.heard(seek(&member, key, name, lease)).await
}

/// One round: the lease by which `name` leads, and how many seconds it lasts from now on at least.
async fn seek(
    member: &Member,
    key: &[u8],
    name: &str,
    lease: Option<i64>,
) -> Result<Option<(i64, i64)>, Status> {
    let range = RangeRequest {
        key: key.to_vec(),
        ..RangeRequest::default()
    };
    let leader = member.range(range).await?.kvs.into_iter().next();
    match (leader, lease) {
        (Some(leader), Some(id)) if leader.value == name.as_bytes() => {
            let ttl_s = member.keep_alive(id).await?;
            Ok((ttl_s > 0).then_some((id, ttl_s)))
        }
        (Some(_), _) => Ok(None),
        (None, _) => {
            let (id, ttl_s) = member.grant(LEASE_S).await?;
            let take = TxnRequest {
                compare: vec![unchanged(key.to_vec(), 0)],
                success: vec![put(key.to_vec(), name.as_bytes().to_vec(), id)],
            };
            if member.transact(take).await?.succeeded {
                return Ok(Some((id, ttl_s)));
            }
            member.revoke(id).await?;
            Ok(None)
        }
    }
}

/// etcd's members, of which one is asked at a time.
#[derive(Debug)]
struct Members {
    settings: Arc<EtcdSettings>,
    current: usize,
    connection: Option<Member>,
}

impl Members {
    fn new(settings: Arc<EtcdSettings>) -> Self {
        Self {
            current: rand::random_range(0..settings.endpoints.len().max(1)),
            settings,
            connection: None,
        }
    }

    fn place(&self) -> String {
        format!("etcd {}", self.settings.prefix)
    }

    fn endpoint(&self) -> String {
        let endpoint = self.settings.endpoints.get(self.current);
        endpoint.cloned().unwrap_or_default()
    }

    fn failed(&self, problem: &impl Display) -> StoreError {
        StoreError::Remote {
            place: format!("etcd {}", self.endpoint()),
            problem: problem.to_string(),
        }
    }

    /// A key below the prefix.
    fn key(&self, name: &str) -> Vec<u8> {
        format!("{}{name}", self.settings.prefix).into_bytes()
    }

    fn path(&self, key: &Key) -> Vec<u8> {
        match key {
            Key::Token(id) => self.key(&format!("tokens/{id}")),
            Key::Node(name) => self.key(&format!("nodes/{name}")),
            Key::Address(address) => self.key(&format!("addresses/{address}")),
            Key::PublicKey(id) => {
                let hex: String = id.0.iter().map(|byte| format!("{byte:02x}")).collect();
                self.key(&format!("keys/{hex}"))
            }
        }
    }

    /// The next question goes to the next member.
    fn forget(&mut self) {
        self.connection = None;
        self.current = (self.current + 1) % self.settings.endpoints.len().max(1);
    }

    /// The one that is asked now.
    async fn member(&mut self) -> Result<Member, StoreError> {
        if let Some(member) = &self.connection {
            return Ok(member.clone());
        }
        let endpoint = self.endpoint();
        let connecting = Member::connect(&self.settings, &endpoint);
        let connected = timeout(ANSWER_TIMEOUT, connecting).await;
        let connected = connected.unwrap_or_else(|_| Err(late()));
        match connected {
            Ok(member) => {
                self.connection = Some(member.clone());
                Ok(member)
            }
            Err(problem) => Err(self.left(&problem)),
        }
    }

    /// What it answered; if it fails, the next one is asked next time.
    async fn heard<T>(
        &mut self,
        answer: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, StoreError> {
        match timeout(ANSWER_TIMEOUT, answer).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(status)) => Err(self.left(&status.message())),
            Err(_) => Err(self.left(&late())),
        }
    }

    fn left(&mut self, problem: &impl Display) -> StoreError {
        let error = self.failed(problem);
        // Also what passes by itself: a token of etcd's that ended is followed by another, as each connection logs in.
        tracing::debug!(%error, "the next question goes to the next member");
        self.forget();
        error
    }

    async fn ask<T>(
        &mut self,
        question: impl AsyncFn(&Member) -> Result<T, Status>,
    ) -> Result<T, StoreError> {
        let member = self.member().await?;
        self.heard(question(&member)).await
    }

    /// Everything below `prefix`, as of one revision.
    async fn all(&mut self, prefix: &[u8], page: i64) -> Result<(Vec<KeyValue>, u64), StoreError> {
        let member = self.member().await?;
        let mut found: Vec<KeyValue> = Vec::new();
        let mut at = 0;
        loop {
            let mut first = found
                .last()
                .map_or_else(|| prefix.to_vec(), |last| last.key.clone());
            if !found.is_empty() {
                first.push(0);
            }
            let range = member.range(RangeRequest {
                key: first,
                range_end: after(prefix),
                limit: page,
                revision: at,
            });
            let answer = self.heard(range).await?;
            if at == 0 {
                at = answer.header.map_or(0, |header| header.revision);
            }
            let empty = answer.kvs.is_empty();
            found.extend(answer.kvs);
            if !answer.more || empty {
                return Ok((found, u64::try_from(at).unwrap_or(0)));
            }
        }
    }

    /// Asks one member after the other until one answers.
    async fn ask_any<T>(
        &mut self,
        question: impl AsyncFn(&Member) -> Result<T, Status>,
    ) -> Result<T, StoreError> {
        let mut asked = self.ask(&question).await;
        for _ in 1..self.settings.endpoints.len() {
            if asked.is_ok() {
                break;
            }
            asked = self.ask(&question).await;
        }
        asked
    }
}

/// A connection to one member.
#[derive(Clone)]
struct Member {
    channel: Channel,
    token: Option<MetadataValue<tonic::metadata::Ascii>>,
}

impl std::fmt::Debug for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Member").finish_non_exhaustive()
    }
}

impl Member {
    /// Certificates and passwords are read anew each time: they change.
    async fn connect(settings: &EtcdSettings, endpoint: &str) -> Result<Self, String> {
        let host = endpoint.rsplit_once(':').map_or(endpoint, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(host.to_owned()).map_err(|error| error.to_string())?;
        let config = Arc::new(tls(settings)?);
        let channel = control_channel(endpoint, config, name).await;
        let channel = channel.map_err(|error| error.to_string())?;
        let token = match &settings.login {
            None => None,
            Some(login) => {
                let request = AuthenticateRequest {
                    name: login.username.clone(),
                    password: read(&login.password_file)?.trim_end().to_owned(),
                };
                let answer = AuthClient::new(channel.clone()).authenticate(request).await;
                let answer = answer
                    .map_err(|status| format!("user {}: {}", login.username, status.message()))?;
                let token = answer.into_inner().token.parse();
                Some(token.map_err(|_| "it gave a token that cannot be sent".to_owned())?)
            }
        };
        Ok(Self { channel, token })
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let metadata = request.metadata_mut();
        // A member that is cut off from the others says so, instead of nothing.
        metadata.insert("hasleader", MetadataValue::from_static("true"));
        if let Some(token) = &self.token {
            metadata.insert("token", token.clone());
        }
        request
    }

    fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    async fn range(&self, range: RangeRequest) -> Result<RangeResponse, Status> {
        let answer = self.kv().range(self.request(range)).await?;
        Ok(answer.into_inner())
    }

    async fn transact(&self, transaction: TxnRequest) -> Result<TxnResponse, Status> {
        let answer = self.kv().txn(self.request(transaction)).await?;
        Ok(answer.into_inner())
    }

    async fn watch(
        &self,
        requests: ReceiverStream<WatchRequest>,
    ) -> Result<Streaming<proto::WatchResponse>, Status> {
        let client = WatchClient::new(self.channel.clone());
        let mut client = client.max_decoding_message_size(MESSAGE_BYTES_MAX);
        let answer = client.watch(self.request(requests)).await?;
        Ok(answer.into_inner())
    }

    async fn grant(&self, ttl_s: i64) -> Result<(i64, i64), Status> {
        let mut client = LeaseClient::new(self.channel.clone());
        let request = self.request(LeaseGrantRequest { ttl: ttl_s });
        let granted = client.lease_grant(request).await?.into_inner();
        Ok((granted.id, granted.ttl))
    }

    /// How many seconds it lasts from now on; 0: it is over.
    async fn keep_alive(&self, id: i64) -> Result<i64, Status> {
        let mut client = LeaseClient::new(self.channel.clone());
        let once = tokio_stream::once(LeaseKeepAliveRequest { id });
        let answers = client.lease_keep_alive(self.request(once)).await?;
        let mut answers = pin!(answers.into_inner());
        let answer = answers.message().await?;
        let answer = answer.ok_or_else(|| Status::new(Code::Unavailable, "no answer"))?;
        Ok(answer.ttl)
    }

    async fn revoke(&self, id: i64) -> Result<(), Status> {
        let mut client = LeaseClient::new(self.channel.clone());
        client
            .lease_revoke(self.request(LeaseRevokeRequest { id }))
            .await?;
        Ok(())
    }
}

impl From<KeyValue> for Found {
    fn from(found: KeyValue) -> Self {
        Self {
            value: found.value,
            revision: u64::try_from(found.mod_revision).unwrap_or(0),
        }
    }
}

fn late() -> String {
    format!("no answer in {ANSWER_TIMEOUT:?}")
}

fn tls(settings: &EtcdSettings) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    let bad = |path: &Path, error: &dyn Display| format!("{}: {error}", path.display());
    for certificate in CertificateDer::pem_slice_iter(read(&settings.ca_file)?.as_bytes()) {
        let certificate = certificate.map_err(|error| bad(&settings.ca_file, &error))?;
        let added = roots.add(certificate);
        added.map_err(|error| bad(&settings.ca_file, &error))?;
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()));
    let builder = builder.with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| error.to_string())?;
    let builder = builder.with_root_certificates(roots);
    let mut config = match &settings.client {
        None => builder.with_no_client_auth(),
        Some(client) => {
            let (certificate_file, key_file) = (&client.certificate_file, &client.key_file);
            let chain = CertificateDer::pem_slice_iter(read(certificate_file)?.as_bytes())
                .collect::<Result<Vec<_>, _>>();
            let chain = chain.map_err(|error| bad(certificate_file, &error))?;
            let key = PrivateKeyDer::from_pem_slice(read(key_file)?.as_bytes());
            let key = key.map_err(|error| bad(key_file, &error))?;
            let config = builder.with_client_auth_cert(chain, key);
            config.map_err(|error| bad(certificate_file, &error))?
        }
    };
    config.alpn_protocols = ALPN.iter().map(|name| name.to_vec()).collect();
    Ok(config)
}

fn read(path: &Path) -> Result<Zeroizing<String>, String> {
    let read = fs::read_to_string(path).map(Zeroizing::new);
    read.map_err(|error| format!("cannot read {}: {error}", path.display()))
}

fn asks(union: RequestUnion) -> WatchRequest {
    WatchRequest {
        request_union: Some(union),
    }
}

/// That `key` was last changed in `revision`; 0: that it is not there.
fn unchanged(key: Vec<u8>, revision: u64) -> Compare {
    let revision = i64::try_from(revision).unwrap_or(i64::MAX);
    Compare {
        result: CompareResult::Equal.into(),
        target: CompareTarget::Mod.into(),
        key,
        target_union: Some(TargetUnion::ModRevision(revision)),
    }
}

fn put(key: Vec<u8>, value: Vec<u8>, lease: i64) -> RequestOp {
    RequestOp {
        request: Some(Operation::RequestPut(PutRequest { key, value, lease })),
    }
}

fn revision(header: Option<proto::ResponseHeader>) -> u64 {
    header.map_or(0, |header| u64::try_from(header.revision).unwrap_or(0))
}

/// The first key that does not begin with `prefix`: all of them end with `/`.
fn after(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}
