//! What the controller's tasks share: the store and the folder behind one lock, what is published
//! behind another, and a signal that says when it is new.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use mesh_api::{
    control::{JoinResponse, Resource, SyncResponse},
    convert::node_resource,
    resources::SYNC_BYTES_MAX,
};
use mesh_core::snapshot::Node;
use mesh_identity::{
    authority::{AuthorityError, CertificateAuthority, IssueError, new_key},
    certificate::{BadCertificate, CONTROLLER_LIFETIME, NODE_LIFETIME, RELAY_LIFETIME, Validity},
    credentials::{Credentials, CredentialsError},
    token::{JoinToken, NoRandomness},
};
use mesh_wire::id::{Identity, NodeId, NodeName, RelayName};
use prost::Message as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    config::Settings,
    desired::{Desired, desired},
    history::{History, Wanted},
    manifests::Folder,
    store::{JoinError, Nodes, Registered, Store, StoreError},
    token::{Applicant, DEFAULT_TTL_S, Refusal, TTL_S_MAX, TokenRecord, USES_MAX},
};

/// The controller, without its sockets.
#[derive(Debug)]
pub struct State {
    settings: Settings,
    authority: CertificateAuthority,
    /// No clock is believed below this: the authority was made then.
    not_before: SystemTime,
    store_id: Vec<u8>,
    /// Held while the disk is written: only from blocking threads.
    work: Mutex<Work>,
    /// Held for moments: from anywhere.
    published: RwLock<Published>,
    generation: watch::Sender<u64>,
    sessions: Mutex<BTreeMap<NodeName, Session>>,
    next_session: AtomicU64,
}

#[derive(Debug)]
struct Work {
    store: Store,
    folder: Folder,
    desired: Desired,
    /// What the store refused to take; tried again at the next scan.
    unsaved: Option<String>,
    /// Manifests to be remembered that the store did not take yet.
    remember: BTreeMap<String, Option<String>>,
    logged: BTreeSet<String>,
}

#[derive(Debug, Default)]
struct Published {
    history: History,
    registry: Nodes,
    nodes: BTreeMap<NodeName, Node>,
    problems: Vec<String>,
}

#[derive(Debug)]
struct Session {
    number: u64,
    replaced: CancellationToken,
    generation: u64,
}

/// Why the controller cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The authority.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The authority's certificate.
    #[error(transparent)]
    Certificate(#[from] BadCertificate),
}

/// Why there are no credentials for the controller itself, or for a relay.
#[derive(Debug, thiserror::Error)]
pub enum CertifyError {
    /// Signing.
    #[error(transparent)]
    Issue(#[from] IssueError),
    /// The result does not fit together.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
}

/// Why a node got no place: besides refusals.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// It is not allowed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The overlay is full.
    #[error("the overlay has no free IPv4 address: widen spec.overlayIPv4CIDR in the MeshConfig")]
    NoAddress,
    /// The request.
    #[error(transparent)]
    Issue(#[from] IssueError),
}

/// Why no token was made.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It would be valid too long.
    #[error("a token is valid for at most {TTL_S_MAX} seconds")]
    TooLong,
    /// It would have too many uses.
    #[error("a token has at most {USES_MAX} uses")]
    TooManyUses,
    /// No randomness.
    #[error(transparent)]
    Random(#[from] NoRandomness),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A node as `meshctl` shows it.
#[derive(Debug)]
pub struct NodeView {
    /// What is published of it.
    pub node: Node,
    /// The generation that it said it has, if its Sync stream is up.
    pub generation: Option<u64>,
}

impl State {
    /// Opens the store, reads the folder, publishes what is in them.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub fn open(settings: Settings) -> Result<Self, StartError> {
        let opened = Store::open(&settings.state_dir, &settings.mesh_name, SystemTime::now());
        let (store, contents) = opened?;
        let authority = contents.authority;
        let not_before = Validity::of(authority.certificate_der())?.not_before;
        let generation = contents.history.generation();
        let nothing = desired(&[], &Nodes::new(), authority.mesh_id(), &settings.mesh_name);
        let state = Self {
            not_before,
            store_id: contents.store_id,
            work: Mutex::new(Work {
                store,
                folder: Folder::restore(&contents.manifests),
                desired: nothing,
                unsaved: None,
                remember: BTreeMap::new(),
                logged: BTreeSet::new(),
            }),
            published: RwLock::new(Published {
                history: contents.history,
                registry: contents.nodes,
                ..Published::default()
            }),
            generation: watch::Sender::new(generation),
            sessions: Mutex::default(),
            next_session: AtomicU64::new(0),
            settings,
            authority,
        };
        let mut work = state.work();
        let scanned = work.folder.scan(&state.settings.manifests);
        work.remember = scanned.remember;
        state.refresh(&mut work);
        drop(work);
        Ok(state)
    }

    /// The settings.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The authority.
    #[must_use]
    pub fn authority(&self) -> &CertificateAuthority {
        &self.authority
    }

    /// Which store the generations belong to.
    #[must_use]
    pub fn store_id(&self) -> &[u8] {
        &self.store_id
    }

    /// The time, but never before the authority was made.
    #[must_use]
    pub fn now(&self) -> SystemTime {
        SystemTime::now().max(self.not_before)
    }

    /// [`Self::now`] as Unix seconds.
    #[must_use]
    pub fn now_unix_s(&self) -> i64 {
        let since = self.now().duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
    }

    /// Tells when there is a new generation.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// What an agent that has `generation` of this store must be told.
    #[must_use]
    pub fn since(&self, generation: Option<u64>) -> SyncResponse {
        self.published(|published| published.history.since(&self.store_id, generation))
    }

    /// Whether `name` is registered with the key `id`.
    #[must_use]
    pub fn is_registered(&self, name: &NodeName, id: NodeId) -> bool {
        self.published(|published| {
            let registered = published.registry.get(name);
            registered.is_some_and(|registered| registered.id == id)
        })
    }

    /// Every node.
    #[must_use]
    pub fn nodes(&self) -> Vec<NodeView> {
        let nodes: Vec<_> = self.published(|published| published.nodes.values().cloned().collect());
        let sessions = lock(&self.sessions);
        let view = |node: Node| NodeView {
            generation: sessions.get(&node.name).map(|session| session.generation),
            node,
        };
        nodes.into_iter().map(view).collect()
    }

    /// The generation, how many nodes and sessions there are, and what is wrong.
    #[must_use]
    pub fn summary(&self) -> (u64, usize, usize, Vec<String>) {
        let sessions = lock(&self.sessions).len();
        self.published(|published| {
            let generation = published.history.generation();
            (
                generation,
                published.nodes.len(),
                sessions,
                published.problems.clone(),
            )
        })
    }

    /// Credentials of the controller itself, with a new key.
    ///
    /// # Errors
    ///
    /// [`CertifyError`].
    pub fn own_credentials(&self) -> Result<Credentials, CertifyError> {
        self.certify(&Identity::Controller, CONTROLLER_LIFETIME)
    }

    /// Credentials of a relay, kept nowhere.
    ///
    /// # Errors
    ///
    /// [`CertifyError`].
    pub fn relay_credentials(&self, name: RelayName) -> Result<Credentials, CertifyError> {
        self.certify(&Identity::Relay(name), RELAY_LIFETIME)
    }

    /// A certificate for the key in `csr_der`.
    ///
    /// # Errors
    ///
    /// [`IssueError`].
    pub fn node_certificate(
        &self,
        name: &NodeName,
        id: NodeId,
        csr_der: &[u8],
    ) -> Result<JoinResponse, IssueError> {
        let name = name.clone();
        let identity = Identity::Node { name, id };
        let validity = Validity::from_now(self.now(), NODE_LIFETIME);
        let certificate = self.authority.issue(&identity, csr_der, validity)?;
        Ok(JoinResponse {
            certificate_chain_der: vec![certificate.to_vec()],
            ca_certificate_der: self.authority.certificate_der().to_vec(),
            trust_domain: self.authority.trust_domain().to_owned(),
        })
    }

    /// Reads the folder again, and publishes what changed. Blocks on the disk.
    pub fn scan(&self) {
        let mut work = self.work();
        let scanned = work.folder.scan(&self.settings.manifests);
        work.remember.extend(scanned.remember);
        if scanned.changed || work.unsaved.is_some() || !work.remember.is_empty() {
            self.refresh(&mut work);
        }
    }

    /// Lets a node in. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// [`JoinError`]; nothing changed then.
    pub fn join(
        &self,
        token: &JoinToken,
        name: &NodeName,
        id: NodeId,
        csr_der: &[u8],
    ) -> Result<JoinResponse, JoinError<PrepareError>> {
        if token.mesh != self.authority.mesh_id() {
            return Err(Refusal::Unknown.into());
        }
        let mut work = self.work();
        let applicant = Applicant {
            name: name.clone(),
            id,
            secret_hash: token.secret_hash(),
        };
        let Work { store, desired, .. } = &mut *work;
        let prepare = |had: Option<Ipv4Addr>| {
            self.check_key(name, id)?;
            let address = match had {
                Some(address) => address,
                None => free_address(desired, name).ok_or(PrepareError::NoAddress)?,
            };
            let response = self.node_certificate(name, id, csr_der)?;
            Ok((address, response))
        };
        let now = self.now_unix_s();
        let (registered, response) = store.join(&token.id, &applicant, now, prepare)?;
        self.register(name, registered);
        self.refresh(&mut work);
        Ok(response)
    }

    /// Makes a token. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// [`TokenError`].
    pub fn create_token(
        &self,
        ttl_s: u64,
        uses: u32,
        description: String,
        node: Option<NodeName>,
    ) -> Result<(JoinToken, i64), TokenError> {
        let ttl_s = if ttl_s == 0 { DEFAULT_TTL_S } else { ttl_s };
        let ttl = i64::try_from(ttl_s).ok().filter(|_| ttl_s <= TTL_S_MAX);
        let ttl = ttl.ok_or(TokenError::TooLong)?;
        if uses > USES_MAX {
            return Err(TokenError::TooManyUses);
        }
        let token = JoinToken::generate(&self.settings.mesh_name, self.authority.mesh_id())?;
        let now = self.now_unix_s();
        let record = TokenRecord {
            secret_hash: token.secret_hash(),
            description,
            expires_unix_s: now + ttl,
            uses_left: uses.max(1),
            node: node.map(String::from),
            used_by: Vec::new(),
        };
        self.work().store.create_token(&token.id, &record, now)?;
        Ok((token, record.expires_unix_s))
    }

    /// Every token. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// The store failed.
    pub fn tokens(&self) -> Result<Vec<(String, TokenRecord)>, StoreError> {
        self.work().store.tokens()
    }

    /// Removes a token; `false`: there was none. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// The store failed.
    pub fn revoke_token(&self, id: &str) -> Result<bool, StoreError> {
        self.work().store.revoke_token(id)
    }

    /// Begins a Sync session; one that the node had before ends.
    #[must_use]
    pub fn begin_session(self: &Arc<Self>, name: &NodeName) -> SessionGuard {
        let number = self.next_session.fetch_add(1, Ordering::Relaxed);
        let replaced = CancellationToken::new();
        let session = Session {
            number,
            replaced: replaced.clone(),
            generation: 0,
        };
        if let Some(before) = lock(&self.sessions).insert(name.clone(), session) {
            before.replaced.cancel();
        }
        SessionGuard {
            state: self.clone(),
            name: name.clone(),
            number,
            replaced,
        }
    }

    fn certify(
        &self,
        identity: &Identity,
        lifetime: Duration,
    ) -> Result<Credentials, CertifyError> {
        let key = new_key()?;
        let validity = Validity::from_now(self.now(), lifetime);
        let certificate = self.authority.issue(identity, &key.csr_der, validity)?;
        let authority = self.authority.certificate_der().clone();
        Ok(Credentials::from_parts(
            vec![certificate],
            &key.key_pem,
            authority,
        )?)
    }

    fn check_key(&self, name: &NodeName, id: NodeId) -> Result<(), Refusal> {
        self.published(|published| {
            let mut others = published.registry.iter();
            let taken = others.find(|(other, node)| node.id == id && *other != name);
            taken.map_or(Ok(()), |(other, _)| Err(Refusal::KeyTaken(other.clone())))
        })
    }

    fn register(&self, name: &NodeName, registered: Registered) {
        let mut published = self
            .published
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        published.registry.insert(name.clone(), registered);
    }

    /// Works out what the mesh is now, writes what changed, and only then tells the agents.
    fn refresh(&self, work: &mut Work) {
        let (objects, mut problems) = work.folder.objects();
        let registry = self.published(|published| published.registry.clone());
        let (mesh, name) = (self.authority.mesh_id(), &self.settings.mesh_name);
        work.desired = desired(&objects, &registry, mesh, name);
        problems.extend(work.desired.problems.iter().cloned());
        work.unsaved = self.publish(work).err();
        problems.extend(work.unsaved.clone());
        let now: BTreeSet<_> = problems.iter().cloned().collect();
        for problem in now.difference(&work.logged) {
            tracing::warn!(%problem, "problem in the desired state");
        }
        for problem in work.logged.difference(&now) {
            tracing::info!(%problem, "problem solved");
        }
        work.logged = now;
        let mut published = self
            .published
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        published.problems = problems;
        let generation = published.history.generation();
        drop(published);
        self.generation.send_replace(generation);
    }

    fn publish(&self, work: &mut Work) -> Result<(), String> {
        let wanted = work.desired.wanted.clone();
        let size: usize = wanted.values().map(size).sum();
        if size > SYNC_BYTES_MAX {
            return Err(format!(
                "the desired state has {size} bytes, more than {SYNC_BYTES_MAX}; the last one stays"
            ));
        }
        let sign = |record: Vec<u8>| -> Result<Resource, IssueError> {
            let signature = self.authority.sign_record(&record)?;
            Ok(node_resource(record, signature))
        };
        let step = self.published(|published| published.history.plan(wanted, sign));
        let step = step.map_err(|error| error.to_string())?;
        let unsaved = |error: StoreError| format!("cannot be saved, the last state stays: {error}");
        if !work.remember.is_empty() {
            work.store.save_manifests(&work.remember).map_err(unsaved)?;
            work.remember.clear();
        }
        if let Some(step) = &step {
            work.store.publish(step).map_err(unsaved)?;
        }
        let mut published = self
            .published
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        published.nodes.clone_from(&work.desired.nodes);
        if let Some(step) = step {
            tracing::info!(
                generation = step.generation,
                changed = step.changed.len(),
                "published"
            );
            published.history.apply(step);
        }
        Ok(())
    }

    fn work(&self) -> MutexGuard<'_, Work> {
        lock(&self.work)
    }

    fn published<T>(&self, read: impl FnOnce(&Published) -> T) -> T {
        read(
            &self
                .published
                .read()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }
}

/// A Sync session of a node, as long as this lives.
#[derive(Debug)]
pub struct SessionGuard {
    state: Arc<State>,
    name: NodeName,
    number: u64,
    /// Cancelled when the same node begins another.
    pub replaced: CancellationToken,
}

impl SessionGuard {
    /// Remembers the generation that the node says it has.
    pub fn acknowledge(&self, generation: u64) {
        let mut sessions = lock(&self.state.sessions);
        let session = sessions.get_mut(&self.name);
        if let Some(session) = session.filter(|session| session.number == self.number) {
            session.generation = generation;
        }
    }
}

impl Drop for SessionGuard {
    fn drop(&mut self) {
        let mut sessions = lock(&self.state.sessions);
        let current = sessions.get(&self.name);
        if current.is_some_and(|session| session.number == self.number) {
            sessions.remove(&self.name);
        }
    }
}

/// What the operator chose, or the lowest address of the overlay that nobody has.
fn free_address(desired: &Desired, name: &NodeName) -> Option<Ipv4Addr> {
    if let Some(&pinned) = desired.pins.get(name) {
        return Some(pinned);
    }
    let owner = format!("node {name}");
    let mut hosts = desired.mesh.overlay_v4.hosts();
    hosts.find(|&host| {
        let claims = &desired.claims;
        claims.conflict(IpAddr::V4(host).into(), &owner).is_none()
    })
}

fn size(wanted: &Wanted) -> usize {
    // A signature has at most 72 bytes, and the frame around it a few.
    match wanted {
        Wanted::Resource(resource) => resource.encoded_len() + 8,
        Wanted::Node(record) => record.len() + 88,
    }
}

/// A panic elsewhere leaves data that is whole: every change is made after it is decided.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
