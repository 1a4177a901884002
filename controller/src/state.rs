//! What the controller's tasks share: the store and the folder behind one lock, what is published
//! behind another, and a signal that says when it is new.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use mesh_api::{
    control::{JoinResponse, Resource, ResourceKey, SyncResponse},
    convert::node_resource,
    resources::SYNC_BYTES_MAX,
};
use mesh_core::snapshot::Node;
use mesh_daemon::traces::{Parent, Traces};
use mesh_identity::{
    authority::{AuthorityError, CertificateAuthority, IssueError, new_key},
    certificate::{BadCertificate, CONTROLLER_LIFETIME, RELAY_LIFETIME, Validity, node_lifetime},
    credentials::{Credentials, CredentialsError},
    token::JoinToken,
};
use mesh_wire::id::{Identity, NodeId, NodeName, RelayName};
use prost::Message as _;
use tokio::sync::watch;

use crate::{
    change::Change,
    cluster::{Changed, Cluster, Event},
    config::Settings,
    desired::{Desired, Rejected, desired},
    history::{Differing, History, Index, Step, Wanted},
    manifests::{Folder, Loaded, ObjectId, duplicate, watch::FolderChange},
    metrics::Counters,
    removal::Deletions,
    shared::{self, Candidate, Pass, Shared},
    status::{self, Due, Pending},
    store::{JoinError, Nodes, Registered, Store, StoreError},
    token::Refusal,
};

pub use self::{
    approval::ApprovalError,
    sessions::SessionGuard,
    sharing::{NodeChange, NodeFact},
    tokens::TokenError,
};
use self::{
    heads::Heads,
    measure::Recent,
    sessions::Sessions,
    sharing::Lead,
    spans::{Origin, Publication, wide},
};

mod approval;
mod heads;
mod measure;
mod removal;
mod sessions;
mod sharing;
mod spans;
mod step;
mod tokens;

/// The controller, without its sockets.
#[derive(Debug)]
pub struct State {
    settings: Settings,
    authority: CertificateAuthority,
    /// No clock is believed below this: the authority was made then.
    not_before: SystemTime,
    store_id: Vec<u8>,
    /// Held while the store that controllers share is asked, before `work`: only from blocking threads.
    shared: Mutex<Box<dyn Shared>>,
    lead: Mutex<Lead>,
    /// Whether `desired` was ever worked out from all that there is.
    ready: watch::Sender<bool>,
    /// Held while the disk is written: only from blocking threads.
    work: Mutex<Work>,
    /// Held for moments: from anywhere.
    published: RwLock<Published>,
    generation: watch::Sender<u64>,
    sessions: Mutex<Sessions>,
    heads: Heads,
    /// What nodes were last compared with, and when it was made.
    index: Mutex<Option<(Instant, Arc<Index>)>>,
    next_session: AtomicU64,
    /// Counts changes of the registry: [`Work::covers`] says up to which they are published.
    registrations: AtomicU64,
    /// Nodes whose objects somebody deleted in the cluster.
    deletions: Mutex<Deletions>,
    counters: Counters,
    traces: Traces,
    began_unix_s: i64,
}

#[derive(Debug)]
struct Work {
    store: Arc<Mutex<Store>>,
    folder: Folder,
    /// What the cluster says, if there is one.
    cluster: Option<Cluster>,
    /// Without [`Desired::wanted`]: that is published.
    desired: Arc<Desired>,
    /// How many changes of the registry it was made with.
    covers: u64,
    /// Whether it was made from every object, as none was at two places.
    of_all: bool,
    /// Nodes that wait for approval.
    pending: BTreeMap<NodeName, Pending>,
    /// What the store refused to take; tried again at the next scan.
    unsaved: Option<String>,
    /// Manifests to be remembered that the store did not take yet.
    remember: BTreeMap<String, Option<String>>,
    /// Why the shared store cannot be followed.
    trouble: Option<String>,
    /// The change that is being worked out, if it is traced.
    trace: Parent,
    logged: BTreeSet<String>,
}

#[derive(Debug)]
struct Published {
    history: History,
    registry: Nodes,
    /// Since which revision of the shared store each of them is so.
    revisions: BTreeMap<NodeName, u64>,
    nodes: BTreeMap<NodeName, Node>,
    /// What was last worked out, for nodes that want to join meanwhile.
    desired: Arc<Desired>,
    problems: Vec<String>,
    /// Size of everything, encoded.
    bytes: usize,
    recent: Recent,
    publication: Publication,
}

/// Most nodes that wait for approval: whoever has a good token can be one more. At 200 bytes each,
/// 200 KB; another has to wait until one of them is in.
pub const PENDING_MAX: usize = 1000;

/// How long nodes are compared with the same index: they are told what changed since then too. To make one
/// of 100,000 resources takes 0.2 s, so that at most 4 % of a core go there when all nodes come at once.
const INDEX_AGE_MAX: Duration = Duration::from_secs(5);

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
    /// The way to the API server.
    #[error(transparent)]
    Kubernetes(#[from] anyhow::Error),
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
    /// Not everything is read yet that the mesh is made from.
    #[error("the controller has not read the whole cluster yet: try again")]
    NotReady,
    /// Somebody has to approve it first.
    #[error("waits for approval: set spec.approved to true in MeshNode {0}")]
    NotApproved(NodeName),
    /// The overlay is full.
    #[error(
        "the overlay has no free IPv4 address (those of nodes that were taken out rest for as long as certificates last): widen spec.overlayIPv4CIDR in the MeshConfig"
    )]
    NoAddress,
    /// The request.
    #[error(transparent)]
    Issue(#[from] IssueError),
}

/// A node as `meshctl` shows it.
#[derive(Debug)]
pub struct NodeView {
    /// What is published of it.
    pub node: Node,
    /// The generation that it said it has, if its Sync stream is up, or it is away for no longer than it said.
    pub generation: Option<u64>,
    /// When its stream last began, said something or ended, if it was seen since this controller started.
    pub last_seen_unix_s: Option<i64>,
}

impl State {
    /// Opens the store, reads the folder, publishes what is in them.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub fn open(settings: Settings) -> Result<Self, StartError> {
        let (store, contents) = Store::open(&settings.state_dir)?;
        let store = Arc::new(Mutex::new(store));
        let generation = contents.history.generation();
        let heads = Heads::begin(contents.lineage, generation, &mut lock(&store))?;
        let (mut shared, lead, authority) = sharing::open(&settings, &store)?;
        let (registered, revision) = sharing::patiently(|| shared.nodes())?;
        let not_before = Validity::of(authority.certificate_der())?.not_before;
        let (mesh, name) = (authority.mesh_id(), &settings.mesh_name);
        let nothing = Arc::new(desired(&[], &registered, mesh, name));
        let nodes = nothing.nodes.clone();
        let folder = settings.manifests.as_ref();
        let folder = folder.map(|_| Folder::restore(&contents.manifests));
        let mut state = Self {
            not_before,
            store_id: contents.store_id,
            shared: Mutex::new(shared),
            lead: Mutex::new(lead),
            ready: watch::Sender::new(false),
            work: Mutex::new(Work {
                store,
                folder: folder.unwrap_or_default(),
                cluster: settings.kubernetes.as_ref().map(|_| Cluster::default()),
                desired: nothing.clone(),
                covers: 0,
                of_all: false,
                pending: BTreeMap::new(),
                unsaved: None,
                remember: BTreeMap::new(),
                trouble: None,
                trace: None,
                logged: BTreeSet::new(),
            }),
            published: RwLock::new(Published {
                bytes: contents.history.bytes(),
                history: contents.history,
                nodes,
                revisions: registered
                    .keys()
                    .map(|name| (name.clone(), revision))
                    .collect(),
                registry: registered,
                desired: nothing.clone(),
                problems: Vec::new(),
                recent: Recent::default(),
                publication: Publication::default(),
            }),
            generation: watch::Sender::new(generation),
            sessions: Mutex::default(),
            heads,
            index: Mutex::default(),
            next_session: AtomicU64::new(0),
            registrations: AtomicU64::new(0),
            deletions: Mutex::default(),
            counters: Counters::default(),
            traces: Traces::new(
                settings.tracing.as_ref(),
                "mesh-controller",
                env!("CARGO_PKG_VERSION"),
            ),
            began_unix_s: 0,
            settings,
            authority,
        };
        state.began_unix_s = state.now_unix_s();
        let mut work = state.work();
        state.scan_folder(&mut work, &FolderChange::Any);
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
        self.published(|published| {
            let response = published.history.since(&self.store_id, generation);
            self.with_head(&published.history, response)
        })
    }

    /// How large the answer to an agent that has `generation` is, in bytes.
    #[must_use]
    pub fn answer_bytes(&self, generation: Option<u64>) -> usize {
        self.published(|published| match published.history.known(generation) {
            Some(known) => published.history.bytes_since(known),
            None => published.bytes,
        })
    }

    /// Whether an agent that has `generation` can be told what changed since.
    #[must_use]
    pub fn knows(&self, generation: Option<u64>) -> bool {
        self.published(|published| published.history.known(generation).is_some())
    }

    /// What a node's resources can be compared with. Takes its time.
    #[must_use]
    pub fn index(&self) -> Arc<Index> {
        let mut index = lock(&self.index);
        match &*index {
            Some((made, index)) if made.elapsed() < INDEX_AGE_MAX => index.clone(),
            Some(_) | None => {
                let made = Arc::new(self.published(|published| published.history.index()));
                *index = Some((Instant::now(), made.clone()));
                made
            }
        }
    }

    /// What an agent must be told whose resources differ so.
    #[must_use]
    pub fn since_differing(&self, differing: &Differing) -> SyncResponse {
        self.published(|published| {
            let history = &published.history;
            self.with_head(history, history.since_differing(&self.store_id, differing))
        })
    }

    /// How large that is, in bytes.
    #[must_use]
    pub fn differing_bytes(&self, differing: &Differing) -> usize {
        self.published(|published| published.history.differing_bytes(differing))
    }

    /// Whether `name` is registered with the key `id`.
    #[must_use]
    pub fn is_registered(&self, name: &NodeName, id: NodeId) -> bool {
        self.published(|published| {
            let registered = published.registry.get(name);
            registered.is_some_and(|registered| registered.id == id && registered.is_in())
        })
    }

    /// Every node.
    #[must_use]
    pub fn nodes(&self) -> Vec<NodeView> {
        let nodes: Vec<_> = self.published(|published| published.nodes.values().cloned().collect());
        let now_unix_s = self.now_unix_s();
        let sessions = lock(&self.sessions);
        let view = |node: Node| {
            let seen = sessions.seen.get(&node.name);
            let here = seen.filter(|seen| seen.is_here(now_unix_s));
            NodeView {
                generation: here.map(|seen| seen.generation),
                last_seen_unix_s: seen.map(|seen| seen.at_unix_s),
                node,
            }
        };
        nodes.into_iter().map(view).collect()
    }

    /// The generation, how many nodes and sessions there are, and what is wrong.
    #[must_use]
    pub fn summary(&self) -> (u64, usize, usize, Vec<String>) {
        let sessions = lock(&self.sessions).open.len();
        self.published(|published| {
            let generation = published.history.generation();
            (
                generation,
                published.nodes.len(),
                sessions,
                self.heads.problems(&published.problems),
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

    /// How long a certificate of a node lasts that is made now, and how long nobody gets the address of a node that was taken
    /// out, besides that node: its certificate may last so long, by which relays let it in, and a peer that was offline when it
    /// was taken out may take the address for it until it has spoken with a controller. Where an operator lowered the limit since,
    /// both may last longer; such a peer then counts by the limit that it knows.
    pub(super) fn node_lifetime(&self) -> Duration {
        self.published(|published| node_lifetime(published.desired.mesh.offline_limit))
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
        let validity = Validity::from_now(self.now(), self.node_lifetime());
        let certificate = self.authority.issue(&identity, csr_der, validity)?;
        Ok(JoinResponse {
            certificate_chain_der: vec![certificate.to_vec()],
            ca_certificate_der: self.authority.certificate_der().to_vec(),
            trust_domain: self.authority.trust_domain().to_owned(),
        })
    }

    /// Reads again what changed in the folder, and publishes it. Blocks on the disk.
    pub fn scan(&self, change: &FolderChange) {
        let mut work = self.work();
        let began = SystemTime::now();
        let changed = self.scan_folder(&mut work, change);
        if !changed.is_nothing() || work.unsaved.is_some() || !work.remember.is_empty() {
            let follow = |work: &mut Work| self.follow(work, changed);
            self.trace_change(&mut work, Origin::Folder, began, follow);
        }
    }

    /// Takes in what was heard of the cluster, and publishes what changed. Blocks on the disk. Says
    /// whether there are policies, so that pods are needed.
    pub fn hear(&self, events: Vec<Event>) -> bool {
        let mut work = self.work();
        let began = SystemTime::now();
        let mut changed = Changed::default();
        let Some(cluster) = &mut work.cluster else {
            return false;
        };
        for event in events {
            changed |= cluster.handle(event);
        }
        if !changed.desired.is_nothing() {
            let follow = |work: &mut Work| self.follow(work, changed.desired);
            self.trace_change(&mut work, Origin::Cluster, began, follow);
        }
        work.has_policies()
    }

    /// What is to be written to the cluster; `None`: there is none, or it was not read yet.
    #[must_use]
    pub fn due(&self) -> Option<Due> {
        let work = self.work();
        let cluster = work.cluster.as_ref().filter(|_| *self.ready.borrow())?;
        let sessions = lock(&self.sessions);
        let instance = self.instance();
        let mut due = status::due(&status::Mesh {
            role: self.role(&instance),
            cluster,
            desired: &work.desired,
            seen: &sessions.seen,
            pending: &work.pending,
            generation: *self.generation.borrow(),
            began_unix_s: self.began_unix_s,
            now_unix_s: self.now_unix_s(),
        });
        drop(sessions);
        // Whoever keeps a MeshNode in the folder gets no second one.
        let (kept, _) = work.folder.objects();
        let kept: BTreeSet<_> = kept.iter().map(|loaded| &loaded.id).collect();
        due.missing.retain(|name| {
            let id = status::mesh_node_id(name);
            // Nor does one whose MeshNode somebody deleted: it is about to leave.
            !kept.contains(&id) && !cluster.is_deleted(&id)
        });
        Some(due)
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
        from: Option<IpAddr>,
        csr_der: &[u8],
    ) -> Result<JoinResponse, JoinError<PrepareError>> {
        if token.mesh != self.authority.mesh_id() {
            return Err(Refusal::Unknown.into());
        }
        let pass = Pass::Token(&token.id, token.secret_hash());
        self.admit(Candidate { name, id, pass }, from, csr_der)
    }

    /// Lets a node in for which the API server vouches, with whatever key it has now. Blocks on
    /// the disk.
    ///
    /// # Errors
    ///
    /// [`JoinError`]; nothing changed then.
    pub fn enroll(
        &self,
        name: &NodeName,
        id: NodeId,
        from: Option<IpAddr>,
        csr_der: &[u8],
    ) -> Result<JoinResponse, JoinError<PrepareError>> {
        let pass = Pass::Vouched;
        self.admit(Candidate { name, id, pass }, from, csr_der)
    }

    fn admit(
        &self,
        candidate: Candidate<'_>,
        from: Option<IpAddr>,
        csr_der: &[u8],
    ) -> Result<JoinResponse, JoinError<PrepareError>> {
        // Held until it is known here who has which address: an embedded store does not know that.
        let mut shared = lock(&self.shared);
        let now = self.now_unix_s();
        let joined = shared::join(shared.as_mut(), candidate, now, |had, taken| {
            let desired = self.published(|published| published.desired.clone());
            self.prepare(&desired, candidate, had, taken, csr_der)
        });
        let joined = joined.map(|joined| {
            let fact = NodeFact::Is(joined.registered);
            let (name, revision) = (candidate.name.clone(), joined.revision);
            self.change_node(NodeChange {
                name,
                fact,
                revision,
            });
            joined.prepared
        });
        let registrations = self.registrations.load(Ordering::SeqCst);
        drop(shared);
        self.publish_joined(candidate, from, registrations, joined)
    }

    /// A place in the overlay and a certificate for a node that was let in, and had `had` before.
    fn prepare(
        &self,
        desired: &Desired,
        Candidate { name, id, .. }: Candidate<'_>,
        had: Option<&Registered>,
        taken: &BTreeSet<Ipv4Addr>,
        csr_der: &[u8],
    ) -> Result<(Ipv4Addr, JoinResponse), PrepareError> {
        self.check_key(name, id)?;
        let again = had.is_some_and(|had| had.id == id && had.is_in());
        let approved = desired.approved.as_ref();
        if !again && !*self.ready.borrow() {
            return Err(PrepareError::NotReady);
        }
        if !again && approved.is_some_and(|approved| !approved.contains(name)) {
            return Err(PrepareError::NotApproved(name.clone()));
        }
        let address = match had {
            Some(had) => had.overlay_v4,
            None => {
                let mut taken = taken.clone();
                self.published(|published| {
                    let registered = published.registry.values();
                    taken.extend(registered.map(|node| node.overlay_v4));
                });
                free_address(desired, name, &taken).ok_or(PrepareError::NoAddress)?
            }
        };
        let response = self.node_certificate(name, id, csr_der)?;
        Ok((address, response))
    }

    /// Many join at once, and to work out what the mesh is takes longer than to let a node in: who waited
    /// while that was done for others finds that it was done for it too.
    fn publish_joined(
        &self,
        Candidate { name, id, .. }: Candidate<'_>,
        from: Option<IpAddr>,
        registrations: u64,
        joined: Result<JoinResponse, JoinError<PrepareError>>,
    ) -> Result<JoinResponse, JoinError<PrepareError>> {
        let mut work = self.work();
        let waits = matches!(
            joined,
            Err(JoinError::Prepare(PrepareError::NotApproved(_)))
        );
        let pending_changed = if joined.is_ok() {
            work.pending.remove(name).is_some()
        } else if waits && (work.pending.len() < PENDING_MAX || work.pending.contains_key(name)) {
            let before = work.pending.get(name).filter(|before| before.id == id);
            let waiting = Pending {
                id,
                address: from,
                since_unix_s: before.map_or_else(|| self.now_unix_s(), |one| one.since_unix_s),
            };
            let changed = before.is_none();
            work.pending.insert(name.clone(), waiting);
            changed
        } else {
            false
        };
        if pending_changed || work.covers < registrations {
            let refresh = |work: &mut Work| self.refresh(work);
            self.trace_change(&mut work, Origin::Join, SystemTime::now(), refresh);
        }
        joined
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
            let taken =
                others.find(|(other, node)| node.id == id && node.is_in() && *other != name);
            taken.map_or(Ok(()), |(other, _)| Err(Refusal::KeyTaken(other.clone())))
        })
    }

    /// Whether that is another than what was known.
    fn change_node(&self, change: NodeChange) -> bool {
        let mut published = self
            .published
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let NodeChange {
            name,
            fact,
            revision,
        } = change;
        let known = published.revisions.get(&name).copied();
        if known.is_some_and(|known| known > revision) {
            return false;
        }
        let changed = match fact {
            NodeFact::Unreadable => false,
            NodeFact::Gone => {
                published.revisions.remove(&name);
                published.registry.remove(&name).is_some()
            }
            NodeFact::Is(node) => {
                published.revisions.insert(name.clone(), revision);
                let before = published.registry.insert(name, node.clone());
                before != Some(node)
            }
        };
        if changed {
            self.registrations.fetch_add(1, Ordering::SeqCst);
        }
        changed
    }

    fn scan_folder(&self, work: &mut Work, change: &FolderChange) -> Change {
        let Some(folder) = &self.settings.manifests else {
            return Change::Nothing;
        };
        let scanned = match change {
            FolderChange::Files(names) => work.folder.scan_files(folder, names),
            FolderChange::Any => work.folder.scan(folder),
        };
        work.remember.extend(scanned.remember);
        scanned.changed
    }

    /// Works out what the mesh is now, writes what changed, and only then tells the agents. While
    /// the cluster is not read as a whole, all stays as it is.
    fn refresh(&self, work: &mut Work) {
        let mut problems = Vec::new();
        let awaited = work.awaited();
        if awaited.is_none() {
            self.renew(work, &mut problems);
        } else {
            let cluster = work.cluster.as_ref();
            problems.extend(cluster.map(Cluster::problems).unwrap_or_default());
        }
        problems.extend(awaited);
        problems.extend(work.trouble.clone());
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
        published.desired = work.desired.clone();
        published.problems = problems;
        let generation = published.history.generation();
        drop(published);
        self.generation.send_replace(generation);
    }

    fn renew(&self, work: &mut Work, problems: &mut Vec<String>) {
        let began = Instant::now();
        let (objects, wrong, duplicates) = work.objects();
        let of_all = objects.len() == work.len();
        problems.extend(wrong);
        let covers = self.registrations.load(Ordering::SeqCst);
        let registry = self.published(|published| published.registry.clone());
        let (mesh, name) = (self.authority.mesh_id(), &self.settings.mesh_name);
        let mut compile = self.traces.child("compile", &work.trace);
        compile.set("objects", wide(objects.len()));
        let mut renewed = desired(&objects, &registry, mesh, name);
        drop(compile);
        renewed.rejected.extend(duplicates);
        let wanted = std::mem::take(&mut renewed.wanted);
        work.desired = Arc::new(renewed);
        (work.covers, work.of_all) = (covers, of_all);
        if work.desired.approved.is_none() {
            work.pending.clear();
        }
        problems.extend(work.desired.problems.iter().cloned());
        problems.extend(work.waiting().map(|(name, _)| {
            let error = PrepareError::NotApproved(name.clone());
            format!("node {name}: {error}")
        }));
        work.unsaved = self.publish(work, wanted).err();
        self.counters
            .worked_out(began.elapsed(), work.unsaved.is_none());
        self.ready.send_replace(true);
        problems.extend(work.unsaved.clone());
    }

    fn publish(
        &self,
        work: &mut Work,
        wanted: BTreeMap<ResourceKey, Wanted>,
    ) -> Result<(), String> {
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
        let nodes = work.desired.nodes.clone();
        self.keep(work, step, |published| {
            published.nodes = nodes;
            published.bytes = size;
        })
    }

    /// Writes what changed, and publishes it with `beside`.
    fn keep(
        &self,
        work: &mut Work,
        mut step: Option<Step>,
        beside: impl FnOnce(&mut Published),
    ) -> Result<(), String> {
        let span = self.trace_publication(work, step.as_ref());
        if let Some(step) = &mut step {
            step.made_unix_ms =
                self.published(|published| published.history.made_after(self.now_unix_ms()));
        }
        let mut store = lock(&work.store);
        let saved = store.publish(step.as_ref(), &work.remember);
        saved.map_err(|error| format!("cannot be saved, the last state stays: {error}"))?;
        work.remember.clear();
        drop(store);
        let mut published = self
            .published
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        beside(&mut published);
        if let Some(step) = step {
            published.recent.made(step.generation, Instant::now());
            tracing::info!(
                generation = step.generation,
                changed = step.changed.len(),
                "published"
            );
            published.publication = Publication {
                generation: step.generation,
                span: span.parent(),
            };
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

impl Work {
    /// Every object that is in force, in the order in which they count; what is wrong; and the
    /// cluster's objects that the folder has too.
    fn objects(&self) -> (Vec<&Loaded>, Vec<String>, Vec<(ObjectId, Rejected)>) {
        let (mut objects, mut problems) = self.folder.objects();
        let Some(cluster) = &self.cluster else {
            return (objects, problems, Vec::new());
        };
        problems.extend(cluster.problems());
        let first: BTreeMap<_, _> = objects
            .iter()
            .map(|loaded| (&loaded.id, &loaded.source))
            .collect();
        let (mut added, mut duplicates) = (Vec::new(), Vec::new());
        for loaded in cluster.objects() {
            match first.get(&loaded.id) {
                None => added.push(loaded),
                Some(first) => {
                    problems.push(duplicate(loaded, first));
                    let rejected = Rejected {
                        text: format!("is already at {first}; this one is left out"),
                    };
                    duplicates.push((loaded.id.clone(), rejected));
                }
            }
        }
        objects.extend(added);
        (objects, problems, duplicates)
    }

    /// How many objects there are, also those that are left out as there is another one.
    fn len(&self) -> usize {
        self.folder.len() + self.cluster.as_ref().map_or(0, Cluster::len)
    }

    fn has_policies(&self) -> bool {
        let in_folder = || self.folder.has_policies();
        let in_cluster = self.cluster.as_ref().is_some_and(Cluster::has_policies);
        in_cluster || in_folder()
    }

    /// What of the cluster is not read yet, for people; `None`: all is.
    fn awaited(&self) -> Option<String> {
        let cluster = self.cluster.as_ref()?;
        let awaited = cluster.awaited(self.has_policies());
        let kinds: Vec<_> = awaited.iter().map(|kind| format!("{kind:?}")).collect();
        (!kinds.is_empty()).then(|| {
            format!(
                "not all of the cluster is read yet ({} is missing): everything stays as it is",
                kinds.join(", ")
            )
        })
    }
}

/// What the operator chose, or the lowest address of the overlay that nobody has.
fn free_address(
    desired: &Desired,
    name: &NodeName,
    taken: &BTreeSet<Ipv4Addr>,
) -> Option<Ipv4Addr> {
    if let Some(&pinned) = desired.pins.get(name) {
        return Some(pinned);
    }
    let owner = format!("node {name}");
    let mut hosts = desired.mesh.overlay_v4.hosts();
    hosts.find(|&host| {
        let claims = &desired.claims;
        !taken.contains(&host) && claims.conflict(IpAddr::V4(host).into(), &owner).is_none()
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
