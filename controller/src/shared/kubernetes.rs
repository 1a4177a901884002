//! Kubernetes: what several controllers share in the namespace of the controller, and which of them leads.
//!
//! | object | what it has |
//! |---|---|
//! | Secret `holdfast-authority` | the authority, with its private key |
//! | ConfigMap `holdfast-store` | the number of the last transaction, and its changes until they are made |
//! | ConfigMaps `holdfast-{nodes,claims,tokens}-HEX` | the rest, spread by its keys |
//! | Lease `holdfast-controller` | who leads |
//!
//! The API server changes one object at a time. So a transaction is first written, as a whole, into
//! `holdfast-store`, if nobody else wrote there since it was decided: then it will take place, whoever
//! ends it. Each of the other objects is marked with the last transaction that changed it, so that a
//! controller that comes late changes nothing twice.
//!
//! 100,000 nodes have 300,000 entries of 110 bytes. An object may have 1 MiB, and each change
//! writes it anew; in 4,096 objects each has 4 KB of nodes and 5 KB of claims, so that a node that joins costs
//! the API server's own store 15 KB.

use std::{
    collections::BTreeMap,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Result;
use futures_util::StreamExt as _;
use k8s_openapi::{
    ByteString,
    api::{
        coordination::v1::{Lease, LeaseSpec},
        core::v1::{ConfigMap, Secret},
    },
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{
    Api, Client, Error as ClientError,
    api::{ListParams, ObjectMeta, PostParams},
    runtime::watcher::{Config, Event, InitialListStrategy, watcher},
};
use mesh_identity::{authority::CertificateAuthority, token::MeshAnchor};
use mesh_wire::id::NodeName;
use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};
use tokio::{
    runtime::Handle,
    task::spawn_blocking,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use super::{Change, Found, Key, Seen, Shared, damaged, decode, decode_node, node_name};
use crate::{
    kubernetes::{ANCHOR_CONFIG_MAP, ANCHOR_KEY, client_error},
    state::{NodeChange, NodeFact, State},
    store::{Nodes, StoreError},
    token::TokenRecord,
};

const AUTHORITY: &str = "holdfast-authority";
const HEAD: &str = "holdfast-store";
const LEASE: &str = "holdfast-controller";

/// The label of what is spread, and the annotation with the last transaction.
const FAMILY: &str = "mesh.holdfast.dev/store";
const TURN: &str = "mesh.holdfast.dev/turn";

/// Keys of [`HEAD`].
const HEAD_TURN: &str = "turn";
const HEAD_CHANGES: &str = "changes";

/// Over how many objects nodes and claims are spread, each.
const SHARDS: u16 = 4096;

/// Over how many objects tokens are: 10,000 of 300 bytes are 47 KB in each, and the largest (10,000 uses)
/// has 650 KB of the 1 MiB.
const TOKEN_SHARDS: u16 = 64;

/// How long the API server may take for one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);

/// Most attempts at one object of a transaction: whoever else changes it does so for this very transaction.
const ATTEMPTS_MAX: u32 = 16;

/// Objects in one page of a list.
const PAGE: u32 = 500;

/// How long the lead is kept by a controller that is not heard of.
const LEASE_TIME: Duration = Duration::from_secs(10);

/// How often the lead is renewed, or sought.
const LEAD_ROUND: Duration = Duration::from_secs(2);

/// How long before the lease ends the lead is given up: what was begun then is over by its end.
const LEASE_MARGIN: Duration = Duration::from_secs(2);

/// Pauses before the objects are followed again.
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// How long the API server keeps a watch open: one that died in silence is noticed 5 s after that.
const WATCH_S: u32 = 60;

/// The store.
#[derive(Debug)]
pub struct ClusterStore {
    objects: Objects,
    runtime: Handle,
}

impl ClusterStore {
    /// In `namespace`. Its methods must be called where a thread may be blocked, and not on one that
    /// runs `runtime`.
    #[must_use]
    pub fn new(client: &Client, namespace: &str, runtime: Handle) -> Self {
        Self {
            objects: Objects::new(client, namespace),
            runtime,
        }
    }
}

impl Shared for ClusterStore {
    fn place(&self) -> String {
        self.objects.place.clone()
    }

    fn authority(
        &mut self,
        proposed: &CertificateAuthority,
    ) -> Result<CertificateAuthority, StoreError> {
        self.runtime.block_on(self.objects.authority(proposed))
    }

    fn nodes(&mut self) -> Result<(Nodes, u64), StoreError> {
        let (maps, turn) = self.runtime.block_on(self.objects.all("nodes"))?;
        let mut nodes = Nodes::new();
        for map in maps {
            for (name, raw) in map.data.unwrap_or_default() {
                let name = node_name(&self.objects.place, name.as_bytes())?;
                let node = decode_node(&self.objects.place, &name, raw.as_bytes())?;
                nodes.insert(name, node);
            }
        }
        Ok((nodes, turn))
    }

    fn tokens(&mut self) -> Result<Vec<(String, TokenRecord)>, StoreError> {
        let (maps, _) = self.runtime.block_on(self.objects.all("tokens"))?;
        let rows = maps
            .into_iter()
            .flat_map(|map| map.data.unwrap_or_default());
        rows.map(|(id, raw)| {
            let token = decode(&self.objects.place, "a token", raw.as_bytes())?;
            Ok((id, token))
        })
        .collect()
    }

    fn get(&mut self, keys: &[Key]) -> Result<Vec<Option<Found>>, StoreError> {
        self.runtime.block_on(async {
            // What was decided is done before anything is read.
            self.objects.head().await?;
            self.objects.get(keys).await
        })
    }

    fn commit(&mut self, seen: &[Seen], changes: &[Change]) -> Result<Option<u64>, StoreError> {
        self.runtime.block_on(self.objects.commit(seen, changes))
    }
}

/// Keeps the state's nodes as they are in the cluster, and seeks its lead, until `stop`.
///
/// # Errors
///
/// If taking in what was heard panicked. What the API server refuses is tried again.
pub async fn run(
    state: Arc<State>,
    client: Client,
    namespace: String,
    stop: CancellationToken,
) -> Result<()> {
    tokio::select! {
        followed = follow(&state, &client, &namespace) => followed,
        () = lead(&state, &client, &namespace, stop.clone()) => Ok(()),
    }
}

/// Follows the nodes, for ever.
async fn follow(state: &Arc<State>, client: &Client, namespace: &str) -> Result<()> {
    let objects = Objects::new(client, namespace);
    let mut pause = RETRY_MIN;
    loop {
        let config = Config {
            label_selector: Some(format!("{FAMILY}=nodes")),
            timeout: Some(WATCH_S),
            initial_list_strategy: InitialListStrategy::ListWatch,
            ..Config::default()
        };
        let mut stream = pin!(watcher(objects.maps.clone(), config));
        let mut shards = Shards::default();
        let problem = loop {
            let event = match stream.next().await {
                Some(Ok(event)) => event,
                Some(Err(error)) => break error.to_string(),
                None => break "the watch ended".to_owned(),
            };
            let taking = state.clone();
            match shards.hear(&objects.place, event) {
                Heard::Nothing => {}
                Heard::All(changes, turn) => {
                    pause = RETRY_MIN;
                    spawn_blocking(move || {
                        taking.take_nodes(changes, turn);
                        taking.hear_of_shared(None);
                    })
                    .await?;
                }
                Heard::Some(changes) => {
                    spawn_blocking(move || taking.change_nodes(changes)).await?;
                }
            }
        };
        let told = state.clone();
        tracing::info!(%problem, "the shared store cannot be followed; beginning anew");
        spawn_blocking(move || told.hear_of_shared(Some(problem))).await?;
        sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
        pause = (pause * 2).min(RETRY_MAX);
    }
}

/// The nodes' objects, as they were last heard of.
#[derive(Debug, Default)]
struct Shards {
    known: BTreeMap<String, Vec<NodeName>>,
    /// What a list brought so far.
    listed: Vec<NodeChange>,
    turn: u64,
}

/// What follows from an event.
#[derive(Debug, PartialEq, Eq)]
enum Heard {
    Nothing,
    /// Every node, as of this transaction.
    All(Vec<NodeChange>, u64),
    Some(Vec<NodeChange>),
}

impl Shards {
    fn hear(&mut self, place: &str, event: Event<ConfigMap>) -> Heard {
        match event {
            Event::Init => {
                *self = Self::default();
                Heard::Nothing
            }
            Event::InitApply(map) => {
                self.turn = self.turn.max(turn(&map));
                let changes = self.take(place, map);
                self.listed.extend(changes);
                Heard::Nothing
            }
            Event::InitDone => Heard::All(std::mem::take(&mut self.listed), self.turn),
            Event::Apply(map) => Heard::Some(self.take(place, map)),
            Event::Delete(map) => {
                let name = map.metadata.name.unwrap_or_default();
                tracing::warn!(%name, "somebody deleted a part of the shared store: its nodes stay until the controllers begin anew");
                Heard::Nothing
            }
        }
    }

    /// What `map` says of its nodes, and which are not in it any more.
    fn take(&mut self, place: &str, map: ConfigMap) -> Vec<NodeChange> {
        let revision = turn(&map);
        let shard = map.metadata.name.unwrap_or_default();
        let mut changes = Vec::new();
        let mut names = Vec::new();
        for (name, raw) in map.data.unwrap_or_default() {
            let Ok(name) = node_name(place, name.as_bytes()) else {
                tracing::warn!(%shard, key = %name, "this key is of no node");
                continue;
            };
            let fact = match decode_node(place, &name, raw.as_bytes()) {
                Ok(node) => NodeFact::Is(node),
                Err(error) => {
                    tracing::warn!(%error, "this node is left as it was");
                    NodeFact::Unreadable
                }
            };
            names.push(name.clone());
            changes.push(NodeChange {
                name,
                fact,
                revision,
            });
        }
        let before = self.known.insert(shard, names.clone()).unwrap_or_default();
        let gone = before.into_iter().filter(|name| !names.contains(name));
        changes.extend(gone.map(|name| NodeChange {
            name,
            fact: NodeFact::Gone,
            revision,
        }));
        changes
    }
}

/// Seeks the lead, and keeps it, until `stop`; then leaves it to the others.
async fn lead(state: &Arc<State>, client: &Client, namespace: &str, stop: CancellationToken) {
    let leases: Api<Lease> = Api::namespaced(client.clone(), namespace);
    let mut election = Election::new(state.instance());
    let mut rounds = interval(LEAD_ROUND);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = rounds.tick() => {}
            () = stop.cancelled() => break,
        }
        let asked = Instant::now();
        match timeout(ANSWER_TIMEOUT, round(&leases, &mut election, asked)).await {
            Ok(Ok(true)) => {
                let until = asked + LEASE_TIME.saturating_sub(LEASE_MARGIN);
                state.lead(Some(until));
            }
            Ok(Ok(false)) => state.lead(None),
            // It ends by itself, unless the next round renews it.
            Ok(Err(error)) => {
                let error = client_error(&error);
                tracing::debug!(%error, "the lead cannot be renewed now");
            }
            Err(_) => tracing::debug!("the API server does not answer about the lead"),
        }
    }
    if state.leads() {
        state.lead(None);
        // If that fails, the others wait until it is over.
        timeout(ANSWER_TIMEOUT, leave(&leases, &election))
            .await
            .ok();
    }
}

/// Who leads, as one controller sees it. Pure. What a Lease says of times is only compared with what it
/// said before: how long it did not change is measured by the clock that nobody sets.
#[derive(Debug)]
struct Election {
    own: String,
    /// What the Lease last was, and since when.
    seen: Option<(LeaseSpec, Instant)>,
}

impl Election {
    fn new(own: String) -> Self {
        Self { own, seen: None }
    }

    /// What the Lease should be after it was found so; `None`: another leads.
    fn next(
        &mut self,
        found: Option<&LeaseSpec>,
        now: Instant,
        clock: Timestamp,
    ) -> Option<LeaseSpec> {
        let holder = found.and_then(|found| found.holder_identity.clone());
        let holder = holder.unwrap_or_default();
        let seconds = i32::try_from(LEASE_TIME.as_secs()).unwrap_or(i32::MAX);
        let mut next = LeaseSpec {
            holder_identity: Some(self.own.clone()),
            lease_duration_seconds: Some(seconds),
            renew_time: Some(MicroTime(clock)),
            ..found.cloned().unwrap_or_default()
        };
        if holder == self.own {
            return Some(next);
        }
        if let Some(found) = found.filter(|_| !holder.is_empty()) {
            let since = match &self.seen {
                Some((seen, since)) if seen == found => *since,
                Some(_) | None => {
                    self.seen = Some((found.clone(), now));
                    now
                }
            };
            let lasts_s = found.lease_duration_seconds.unwrap_or(seconds);
            let lasts = Duration::from_secs(u64::try_from(lasts_s).unwrap_or(0));
            if now.saturating_duration_since(since) < lasts.max(LEASE_TIME) {
                return None;
            }
        }
        next.acquire_time = Some(MicroTime(clock));
        let before = found.and_then(|found| found.lease_transitions);
        next.lease_transitions = Some(before.map_or(0, |before| before.saturating_add(1)));
        Some(next)
    }
}

async fn round(
    leases: &Api<Lease>,
    election: &mut Election,
    now: Instant,
) -> Result<bool, ClientError> {
    let found = leases.get_opt(LEASE).await?;
    let spec = found.as_ref().and_then(|lease| lease.spec.as_ref());
    let Some(next) = election.next(spec, now, Timestamp::now()) else {
        return Ok(false);
    };
    let parameters = PostParams::default();
    let written = match found {
        Some(lease) => {
            let lease = Lease {
                spec: Some(next),
                ..lease
            };
            leases.replace(LEASE, &parameters, &lease).await
        }
        None => {
            let lease = Lease {
                metadata: named(LEASE),
                spec: Some(next),
            };
            leases.create(&parameters, &lease).await
        }
    };
    match written {
        Ok(_) => Ok(true),
        Err(error) if is_conflict(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

async fn leave(leases: &Api<Lease>, election: &Election) -> Result<(), ClientError> {
    let Some(mut lease) = leases.get_opt(LEASE).await? else {
        return Ok(());
    };
    if let Some(spec) = &mut lease.spec
        && spec.holder_identity.as_ref() == Some(&election.own)
    {
        spec.holder_identity = None;
        leases
            .replace(LEASE, &PostParams::default(), &lease)
            .await?;
    }
    Ok(())
}

/// The objects.
#[derive(Debug)]
struct Objects {
    maps: Api<ConfigMap>,
    secrets: Api<Secret>,
    place: String,
}

/// What [`HEAD`] says.
#[derive(Debug)]
struct Head {
    map: ConfigMap,
    turn: u64,
}

/// The changes of a transaction, object by object.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Changes(BTreeMap<String, ShardChanges>);

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct ShardChanges {
    family: String,
    entries: BTreeMap<String, Option<String>>,
}

impl Objects {
    fn new(client: &Client, namespace: &str) -> Self {
        Self {
            maps: Api::namespaced(client.clone(), namespace),
            secrets: Api::namespaced(client.clone(), namespace),
            place: format!("Kubernetes namespace {namespace}"),
        }
    }

    async fn authority(
        &self,
        proposed: &CertificateAuthority,
    ) -> Result<CertificateAuthority, StoreError> {
        let mut found = self.answer(self.secrets.get_opt(AUTHORITY)).await?;
        if found.is_none() {
            self.check_anchor(proposed).await?;
            let data = [
                ("certificate", proposed.certificate_pem()),
                ("key", proposed.key_pem().to_string()),
            ];
            let data = data.map(|(name, text)| (name.to_owned(), ByteString(text.into_bytes())));
            let secret = Secret {
                metadata: named(AUTHORITY),
                data: Some(data.into()),
                immutable: Some(true),
                ..Secret::default()
            };
            let parameters = PostParams::default();
            let created = self.secrets.create(&parameters, &secret);
            // Whether by this controller or another: it is there now.
            self.heard(created).await?.ok();
            found = self.answer(self.secrets.get_opt(AUTHORITY)).await?;
        }
        let found = found.unwrap_or_default();
        let data = found.data.unwrap_or_default();
        let text = |name: &str| {
            let bytes = data.get(name).map(|bytes| bytes.0.clone());
            let text = bytes.and_then(|bytes| String::from_utf8(bytes).ok());
            text.ok_or_else(|| damaged(&self.place, &format!("Secret {AUTHORITY}: {name}")))
        };
        let (certificate, key) = (text("certificate")?, Zeroizing::new(text("key")?));
        let authority = CertificateAuthority::from_pem(&certificate, &key);
        authority.map_err(|source| StoreError::Authority {
            place: self.place.clone(),
            source,
        })
    }

    /// That nodes do not know another authority yet, of an embedded store that is still to become shared.
    async fn check_anchor(&self, proposed: &CertificateAuthority) -> Result<(), StoreError> {
        let published = self.answer(self.maps.get_opt(ANCHOR_CONFIG_MAP)).await?;
        let data = published.and_then(|map| map.data).unwrap_or_default();
        let anchor = data.get(ANCHOR_KEY).map(|text| text.parse::<MeshAnchor>());
        match anchor {
            Some(Ok(anchor)) if anchor.mesh != proposed.mesh_id() => {
                Err(StoreError::OtherAuthority {
                    place: self.place.clone(),
                    other: format!("ConfigMap {ANCHOR_CONFIG_MAP} names"),
                })
            }
            _ => Ok(()),
        }
    }

    /// The last transaction, once it took place.
    async fn head(&self) -> Result<Head, StoreError> {
        for _ in 0..ATTEMPTS_MAX {
            let found = self.answer(self.maps.get_opt(HEAD)).await?;
            let Some(map) = found else {
                // Whoever deleted it did not undo what it was the number of.
                let made = self.list(FAMILY).await?;
                let first = head_map(made.iter().map(turn).max().unwrap_or(0), None);
                let parameters = PostParams::default();
                let created = self.maps.create(&parameters, &first);
                // Whether by this controller or another: it is there now.
                self.heard(created).await?.ok();
                continue;
            };
            let head = Head {
                turn: self.number(&map)?,
                map,
            };
            let Some(changes) = self.changes(&head)? else {
                return Ok(head);
            };
            self.finish(&head, changes).await?;
        }
        Err(StoreError::Contended(self.place.clone()))
    }

    fn number(&self, map: &ConfigMap) -> Result<u64, StoreError> {
        let data = map.data.as_ref();
        let text = data.and_then(|data| data.get(HEAD_TURN));
        let number = text.and_then(|text| text.parse().ok());
        number.ok_or_else(|| damaged(&self.place, &format!("ConfigMap {HEAD}: {HEAD_TURN}")))
    }

    /// Those that did not take place yet.
    fn changes(&self, head: &Head) -> Result<Option<Changes>, StoreError> {
        let data = head.map.data.as_ref();
        let text = data.and_then(|data| data.get(HEAD_CHANGES));
        let what = format!("ConfigMap {HEAD}: {HEAD_CHANGES}");
        text.map(|text| decode(&self.place, &what, text.as_bytes()))
            .transpose()
    }

    async fn get(&self, keys: &[Key]) -> Result<Vec<Option<Found>>, StoreError> {
        let mut found = Vec::new();
        for key in keys {
            let entry = Entry::of(key);
            let map = self.answer(self.maps.get_opt(&entry.shard)).await?;
            let data = map.and_then(|map| map.data);
            let value = data.and_then(|mut data| data.remove(&entry.key));
            found.push(value.map(|value| Found {
                value: value.into_bytes(),
                revision: 0,
            }));
        }
        Ok(found)
    }

    async fn commit(&self, seen: &[Seen], changes: &[Change]) -> Result<Option<u64>, StoreError> {
        let head = self.head().await?;
        let keys: Vec<_> = seen.iter().map(|(key, _)| key.clone()).collect();
        let now = self.get(&keys).await?;
        // Nothing changes between here and the next line unless `head` is another then.
        let mut pairs = seen.iter().zip(&now);
        if pairs.any(|((_, seen), now)| {
            seen.as_ref().map(|seen| &seen.value) != now.as_ref().map(|now| &now.value)
        }) {
            return Ok(None);
        }
        let changes = Changes::of(changes);
        let turn = head.turn + 1;
        let text = serde_json::to_string(&changes).unwrap_or_default();
        let next = ConfigMap {
            metadata: head.map.metadata,
            ..head_map(turn, Some(text))
        };
        let parameters = PostParams::default();
        let written = self.maps.replace(HEAD, &parameters, &next);
        let Ok(map) = self.heard(written).await? else {
            return Ok(None);
        };
        self.finish(&Head { map, turn }, changes).await?;
        Ok(Some(turn))
    }

    /// Makes the changes of a transaction that was decided, as far as nobody did.
    async fn finish(&self, head: &Head, changes: Changes) -> Result<(), StoreError> {
        for (shard, changes) in &changes.0 {
            self.change(shard, changes, head.turn).await?;
        }
        let done = ConfigMap {
            metadata: head.map.metadata.clone(),
            ..head_map(head.turn, None)
        };
        let parameters = PostParams::default();
        let written = self.maps.replace(HEAD, &parameters, &done);
        // Another one finished it, too.
        self.heard(written).await?.ok();
        Ok(())
    }

    async fn change(&self, shard: &str, changes: &ShardChanges, at: u64) -> Result<(), StoreError> {
        for _ in 0..ATTEMPTS_MAX {
            let found = self.answer(self.maps.get_opt(shard)).await?;
            let exists = found.is_some();
            let mut map = found.unwrap_or_else(|| ConfigMap {
                metadata: named(shard),
                ..ConfigMap::default()
            });
            if exists && turn(&map) >= at {
                return Ok(());
            }
            let data = map.data.get_or_insert_default();
            for (key, value) in &changes.entries {
                match value {
                    Some(value) => data.insert(key.clone(), value.clone()),
                    None => data.remove(key),
                };
            }
            let metadata = &mut map.metadata;
            let labels = metadata.labels.get_or_insert_default();
            labels.insert(FAMILY.to_owned(), changes.family.clone());
            let annotations = metadata.annotations.get_or_insert_default();
            annotations.insert(TURN.to_owned(), at.to_string());
            let parameters = PostParams::default();
            let written = if exists {
                self.heard(self.maps.replace(shard, &parameters, &map))
                    .await
            } else {
                self.heard(self.maps.create(&parameters, &map)).await
            };
            if written?.is_ok() {
                return Ok(());
            }
        }
        Err(StoreError::Contended(self.place.clone()))
    }

    /// Every object of a family, and the transaction of which that is true at least.
    async fn all(&self, family: &str) -> Result<(Vec<ConfigMap>, u64), StoreError> {
        let turn = self.head().await?.turn;
        let maps = self.list(&format!("{FAMILY}={family}")).await?;
        Ok((maps, turn))
    }

    async fn list(&self, labels: &str) -> Result<Vec<ConfigMap>, StoreError> {
        let mut parameters = ListParams::default().labels(labels).limit(PAGE);
        let mut maps = Vec::new();
        loop {
            let page = self.answer(self.maps.list(&parameters)).await?;
            maps.extend(page.items);
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => parameters = parameters.continue_token(&token),
                None => return Ok(maps),
            }
        }
    }

    async fn answer<T>(
        &self,
        answer: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<T, StoreError> {
        let answer = timeout(ANSWER_TIMEOUT, answer).await;
        let answer =
            answer.map_err(|_| self.failed(&format!("no answer in {ANSWER_TIMEOUT:?}")))?;
        answer.map_err(|error| self.failed(&client_error(&error)))
    }

    /// The answer to a write; the inner error: another one wrote in the meantime.
    async fn heard<T>(
        &self,
        answer: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<Result<T, Conflict>, StoreError> {
        let answer = async {
            match answer.await {
                Err(error) if is_conflict(&error) => Ok(Err(Conflict)),
                other => other.map(Ok),
            }
        };
        self.answer(answer).await
    }

    fn failed(&self, problem: &str) -> StoreError {
        StoreError::Remote {
            place: self.place.clone(),
            problem: problem.to_owned(),
        }
    }
}

/// Another controller was faster.
#[derive(Debug)]
struct Conflict;

impl Changes {
    fn of(changes: &[Change]) -> Self {
        let mut shards: BTreeMap<String, ShardChanges> = BTreeMap::new();
        for (key, value) in changes {
            let entry = Entry::of(key);
            let shard = shards.entry(entry.shard).or_default();
            shard.family = entry.family.to_owned();
            let value = value.as_ref();
            let value = value.map(|value| String::from_utf8_lossy(value).into_owned());
            shard.entries.insert(entry.key, value);
        }
        Self(shards)
    }
}

/// Where something stands.
struct Entry {
    family: &'static str,
    shard: String,
    key: String,
}

impl Entry {
    fn of(key: &Key) -> Self {
        let (family, shards, key) = match key {
            Key::Token(id) => ("tokens", TOKEN_SHARDS, id.clone()),
            Key::Node(name) => ("nodes", SHARDS, name.to_string()),
            Key::Address(address) => ("claims", SHARDS, format!("v4.{address}")),
            Key::PublicKey(id) => {
                let hex: String = id.0.iter().map(|byte| format!("{byte:02x}")).collect();
                ("claims", SHARDS, format!("key.{hex}"))
            }
        };
        let hash = digest(&SHA256, key.as_bytes());
        let hash = hash.as_ref().first_chunk().copied();
        let shard = u16::from_be_bytes(hash.unwrap_or_default()) % shards;
        Self {
            family,
            shard: format!("holdfast-{family}-{shard:03x}"),
            key,
        }
    }
}

fn head_map(turn: u64, changes: Option<String>) -> ConfigMap {
    let turn = (HEAD_TURN.to_owned(), turn.to_string());
    let changes = changes.map(|changes| (HEAD_CHANGES.to_owned(), changes));
    ConfigMap {
        metadata: named(HEAD),
        data: Some([turn].into_iter().chain(changes).collect()),
        ..ConfigMap::default()
    }
}

/// The last transaction that changed it.
fn turn(map: &ConfigMap) -> u64 {
    let annotations = map.metadata.annotations.as_ref();
    let text = annotations.and_then(|annotations| annotations.get(TURN));
    text.and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn named(name: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        ..ObjectMeta::default()
    }
}

fn is_conflict(error: &ClientError) -> bool {
    matches!(error, ClientError::Api(status) if status.code == 409)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_that_is_renewed_is_left_alone_whatever_its_clock_says() {
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        let clock = |s: i64| Timestamp::from_second(1_800_000_000 + s).unwrap();
        let mut first = Election::new("first".to_owned());
        let mut second = Election::new("second".to_owned());
        let mut lease = first.next(None, at(0), clock(0)).unwrap();
        // The first one's clock is years behind: the second sees only that the Lease changes.
        for s in (0..60).step_by(9) {
            assert_eq!(second.next(Some(&lease), at(s), clock(90_000_000)), None);
            lease = first
                .next(Some(&lease), at(s), clock(i64::try_from(s).unwrap()))
                .unwrap();
        }
        assert_eq!(second.next(Some(&lease), at(60), clock(0)), None);
        assert_eq!(second.next(Some(&lease), at(69), clock(90_000_000)), None);
        let taken = second.next(Some(&lease), at(70), clock(0)).unwrap();
        assert_eq!(taken.holder_identity.as_deref(), Some("second"));
        assert_eq!(taken.lease_transitions, Some(1));
        // The first one sees it, and waits in turn.
        assert_eq!(first.next(Some(&taken), at(71), clock(0)), None);
        // One that was left is taken at once.
        let left = LeaseSpec {
            holder_identity: None,
            ..taken
        };
        assert!(first.next(Some(&left), at(72), clock(0)).is_some());
    }

    #[test]
    fn a_part_of_the_store_says_who_is_in_it_and_who_is_not_any_more() {
        let registered = |seed: u8| {
            let id = mesh_wire::id::NodeId([seed; 32]);
            crate::store::Registered::new(id, [100, 96, 0, seed].into())
        };
        let map = |turn: u64, nodes: &[(&str, u8)]| {
            let data = nodes.iter().map(|(name, seed)| {
                let raw = super::super::encode_node(&registered(*seed));
                ((*name).to_owned(), String::from_utf8(raw).unwrap())
            });
            let mut map = ConfigMap {
                metadata: named("holdfast-nodes-000"),
                data: Some(data.collect()),
                ..ConfigMap::default()
            };
            let turn = [(TURN.to_owned(), turn.to_string())];
            map.metadata.annotations = Some(turn.into());
            map
        };
        let is = |name: &str, seed: u8, revision: u64| NodeChange {
            name: name.parse().unwrap(),
            fact: NodeFact::Is(registered(seed)),
            revision,
        };
        let mut shards = Shards::default();
        assert_eq!(shards.hear("here", Event::Init), Heard::Nothing);
        let listed = Event::InitApply(map(7, &[("a", 1), ("b", 2)]));
        assert_eq!(shards.hear("here", listed), Heard::Nothing);
        let all = Heard::All(vec![is("a", 1, 7), is("b", 2, 7)], 7);
        assert_eq!(shards.hear("here", Event::InitDone), all);
        let gone = NodeChange {
            name: "b".parse().unwrap(),
            fact: NodeFact::Gone,
            revision: 9,
        };
        let heard = shards.hear("here", Event::Apply(map(9, &[("a", 3)])));
        assert_eq!(heard, Heard::Some(vec![is("a", 3, 9), gone]));
    }

    #[test]
    fn what_is_spread_has_names_that_the_api_takes() {
        let fits = |text: &str| {
            text.bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
        };
        for key in [
            Key::Token("0123456789abcdef".to_owned()),
            Key::Node("edge-a1".parse().unwrap()),
            Key::Address([100, 96, 0, 1].into()),
            Key::PublicKey(mesh_wire::id::NodeId([255; 32])),
        ] {
            let entry = Entry::of(&key);
            assert!(fits(&entry.key) && entry.key.len() <= 253, "{}", entry.key);
            assert!(
                fits(&entry.shard) && entry.shard.len() <= 253,
                "{}",
                entry.shard
            );
        }
    }
}
