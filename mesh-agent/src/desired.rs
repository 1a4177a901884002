//! The state of the mesh that this node has: in memory, on disk, and signed, so that it can be passed on. A controller changes
//! it, and while none speaks a neighbour may; nobody takes it back to an older one.

mod local;

use std::{
    mem,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, bail};
use mesh_api::{
    control::{FetchResponse, Head, SignedHead, SnapshotFile, SyncRequest, SyncResponse},
    resources::{
        Resources, SnapshotError, State, Trust, apply,
        digest::{BUCKETS_MAX, difference, digests},
        encode_snapshot,
    },
};
use mesh_core::{
    offline::{
        Position, Version,
        limit::{Limit, Standing, alone},
        local::Pods,
    },
    snapshot::{Generation, Snapshot},
};
use mesh_identity::credentials::Credentials;
use mesh_linux::memory;
use mesh_wire::id::NodeName;
use prost::Message as _;
use tokio::{
    sync::watch,
    task,
    time::{self, Instant},
};
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_util::sync::CancellationToken;

use self::local::Local;
pub use self::local::keep_pods;
use crate::{driver::now, state::StateFolder, store::Store};

/// Of a state whose file is so large the memory is given back that the file took while it was written: the pause after it is
/// 16 s then, and giving back takes some milliseconds.
const GIVE_BACK_MIN: usize = 1 << 20;

/// Changes that come faster than this are written to disk together.
const WRITE_PAUSE_MIN: Duration = Duration::from_secs(1);

/// How much an unending stream of changes may write, in bytes a second, so that it does not wear out an SD card:
/// 5.7 GB a day. What a loss of power then takes, a controller tells again.
const WRITE_RATE: u64 = 64 << 10;

/// Longest pause between writes: an offline node that loses power knows all but the last minute.
const WRITE_PAUSE_MAX: Duration = Duration::from_secs(60);

/// Shared by who follows the controller and who asks neighbours: one at a time.
pub type Shared = Arc<tokio::sync::Mutex<Desired>>;

/// The state that this node has.
#[derive(Debug)]
pub struct Desired {
    node: NodeName,
    state: Arc<StateFolder>,
    authority: CertificateDer<'static>,
    store: Arc<Mutex<Store>>,
    resources: Arc<Mutex<State>>,
    position: Position,
    /// Of exactly this; `None`: an older controller signed none, and it cannot be passed on.
    head: Option<SignedHead>,
    /// Whether a controller's stream is open: what comes by it builds on what is here.
    followed: bool,
    limit: Limit,
    standing: watch::Sender<Standing>,
    version: watch::Sender<Version>,
    snapshots: watch::Sender<Option<Arc<Snapshot>>>,
    /// What is in force by what this node was told, and where its own pods are; `None`: nobody says.
    told: Option<Arc<Snapshot>>,
    local: Option<Local>,
    /// Whether a controller said by its open stream that this is how it is: then this node corrects nothing.
    confirmed: bool,
    /// When the resources may be written again, and whether they changed since.
    next_write: Option<Instant>,
    dirty: bool,
    /// Why the disk did not take them last, as it was said; empty: it did.
    refused: String,
}

/// What a neighbour gave is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotTaken {
    /// A controller speaks by now, or somebody else was faster: nothing is wrong with it.
    #[error("not needed any more")]
    NotNeeded,
    /// It is not what an honest neighbour gives.
    #[error("{0}")]
    Distrusted(String),
}

impl Desired {
    /// Reads what is on disk, and publishes it. Says also when it came, by the clock of then. `cni` is where the CNI plug-in
    /// records this node's pods, if it wires them.
    ///
    /// # Errors
    ///
    /// When the authority's certificate cannot be read.
    pub async fn open(
        node: NodeName,
        state: Arc<StateFolder>,
        credentials: &Credentials,
        cni: Option<&Path>,
    ) -> anyhow::Result<(Self, Option<SystemTime>)> {
        let opened = Store::open(state.path());
        for (path, problem) in &opened.damaged {
            tracing::warn!(path = %path.display(), %problem, "a snapshot slot is not usable");
        }
        let authority = credentials.authority().clone();
        let (counted, confirmed) = state.offline();
        let mut desired = Self {
            node,
            state,
            store: Arc::new(Mutex::new(opened.store)),
            resources: Arc::new(Mutex::new(State::new(authority.clone())?)),
            authority,
            position: Position::default(),
            head: None,
            followed: false,
            // Until the mesh says another: nothing ends before that is known.
            limit: Limit::new(None, counted, confirmed, now()),
            standing: watch::Sender::new(Standing::Counts),
            version: watch::Sender::new(Version::default()),
            snapshots: watch::Sender::new(None),
            told: None,
            local: cni.map(Local::read),
            confirmed: false,
            next_write: None,
            dirty: false,
            refused: String::new(),
        };
        let received = match opened.payload {
            Some(payload) => desired.take_from_disk(&payload).await?,
            None => None,
        };
        Ok((desired, received))
    }

    /// The snapshot in force.
    #[must_use]
    pub fn snapshots(&self) -> watch::Receiver<Option<Arc<Snapshot>>> {
        self.snapshots.subscribe()
    }

    /// Which state that is, for others.
    #[must_use]
    pub fn version(&self) -> watch::Receiver<Version> {
        self.version.subscribe()
    }

    /// How long it counts.
    #[must_use]
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.subscribe()
    }

    /// What a controller is told of it.
    #[must_use]
    pub fn says(&self) -> SyncRequest {
        let head = self.head.as_ref().and_then(SignedHead::read);
        SyncRequest {
            store_id: self.position.store.clone(),
            generation: self.position.generation.0,
            compares: !lock(&self.resources).resources().is_empty(),
            life: head.map_or(0, |head| head.life),
            epoch: self.position.epoch,
            ..SyncRequest::default()
        }
    }

    /// Where it stands in a controller's history.
    #[must_use]
    pub fn position(&self) -> &Position {
        &self.position
    }

    /// How many resources there are.
    #[must_use]
    pub fn resources_len(&self) -> usize {
        lock(&self.resources).resources().len()
    }

    /// Digests of what this node has, for who does not know how old that is.
    ///
    /// # Errors
    ///
    /// More buckets than anybody has.
    pub async fn digests(&self, buckets: u32) -> anyhow::Result<Vec<u64>> {
        if buckets > BUCKETS_MAX {
            bail!(
                "the controller asked for the digests of {buckets} buckets, at most {BUCKETS_MAX} are told"
            );
        }
        let state = Arc::clone(&self.resources);
        let work = move || digests(lock(&state).resources(), buckets);
        Ok(task::spawn_blocking(work).await?)
    }

    /// A controller's stream begins or is over: while it is open, nothing is taken from neighbours.
    pub fn follow(&mut self, open: bool) {
        self.followed = open;
        if !open {
            self.limit.handle_controller(None, now());
            self.confirmed = false;
            self.tell();
        }
    }

    /// The pods of this node are here now.
    fn handle_pods(&mut self, pods: Option<Pods>) {
        if let Some(local) = &mut self.local {
            local.set_pods(pods);
        }
        if self.confirmed
            && let (Some(local), Some(told)) = (&mut self.local, &self.told)
        {
            self.dirty |= local.handle_controller(told, &self.node);
        }
        self.tell();
    }

    /// A controller's answer.
    ///
    /// # Errors
    ///
    /// It does not go with what is here, or is older: that stays as it is.
    pub async fn take(&mut self, response: SyncResponse) -> anyhow::Result<()> {
        let any = response.full || response.compared.is_some();
        if !any && response.store_id != self.position.store {
            bail!("the controller sent a change of a state that this node does not have");
        }
        let head = response.head.as_ref().and_then(SignedHead::read);
        let offered = Position {
            store: response.store_id.clone(),
            epoch: head.as_ref().map_or(0, |head| head.epoch),
            generation: Generation(response.generation),
        };
        self.position.check(&offered)?;
        let clock = u64::try_from(response.now_unix_s).unwrap_or_default();
        self.limit
            .handle_controller(Some(Duration::from_secs(clock)), now());
        if !mem::replace(&mut self.confirmed, true) {
            self.keep_counted(); // A loss of power must not bring back what was counted before.
        }
        let changed = any || offered.generation != self.position.generation;
        // Another life's, or epoch's, is new as well.
        let resigned = head != self.head.as_ref().and_then(SignedHead::read);
        let head = response.head.clone();
        self.take_in(response, offered, head, Trust::Check, changed || resigned)
            .await
    }

    /// What a neighbour gave, whose state `asked_with` these digests was newer.
    ///
    /// # Errors
    ///
    /// [`NotTaken`], or the machine is out of threads.
    pub async fn adopt(
        &mut self,
        given: FetchResponse,
    ) -> anyhow::Result<Result<Version, NotTaken>> {
        if self.followed {
            return Ok(Err(NotTaken::NotNeeded));
        }
        let (Some(signed), Some(change)) = (given.head, given.change) else {
            return Ok(Err(distrusted("head or change are missing")));
        };
        let head = match signed.verify(&self.authority) {
            Ok(head) => head,
            Err(error) => return Ok(Err(distrusted(error))),
        };
        let own = *self.version.borrow();
        if head.version() <= own {
            return Ok(Err(distrusted("it is no newer than what this node has")));
        }
        let position = Position {
            store: head.store_id.clone(),
            epoch: head.epoch,
            generation: Generation(head.generation),
        };
        // What an older controller told has no version, and a generation all the same.
        if self.position.check(&position).is_err() {
            return Ok(Err(distrusted("it is older than what this node has")));
        }
        // Applied to a copy first: what is not what the authority signed changes nothing.
        let state = Arc::clone(&self.resources);
        let work = move || {
            let mut copy: Resources = lock(&state).resources().clone();
            drop(apply(&mut copy, change.clone())); // The check finds what it rejected missing.
            head.check(&copy).map(|()| (head, change))
        };
        let checked = task::spawn_blocking(work).await?;
        let (head, change): (Head, SyncResponse) = match checked {
            Ok(checked) => checked,
            Err(error) => return Ok(Err(distrusted(error))),
        };
        let version = head.version();
        self.limit
            .handle_newer(Duration::from_millis(version.made_unix_ms), now());
        self.take_in(change, position, Some(signed), Trust::Check, true)
            .await?;
        Ok(Ok(version))
    }

    /// What a neighbour gets that has these digests; `None`: what is here is not signed.
    ///
    /// # Errors
    ///
    /// The machine is out of threads.
    pub async fn give(&self, theirs: Vec<u64>) -> anyhow::Result<Option<FetchResponse>> {
        let Some(head) = self.head.clone() else {
            return Ok(None);
        };
        let state = Arc::clone(&self.resources);
        let work = move || difference(lock(&state).resources(), &theirs);
        let change = task::spawn_blocking(work).await?;
        Ok(Some(FetchResponse {
            head: Some(head),
            change: Some(change),
        }))
    }

    async fn take_in(
        &mut self,
        change: SyncResponse,
        position: Position,
        head: Option<SignedHead>,
        trust: Trust,
        changed: bool,
    ) -> anyhow::Result<()> {
        self.position = position;
        let snapshot = self.check(change, trust).await?;
        if self.confirmed
            && let (Some(local), Ok(snapshot)) = (&mut self.local, &snapshot)
        {
            self.dirty |= local.handle_controller(snapshot, &self.node);
        }
        if !changed {
            self.tell();
            return Ok(());
        }
        let version = head.as_ref().and_then(SignedHead::read);
        self.head = head;
        self.dirty = true;
        // The disk may come later, and so it does where it has been written a moment ago: nobody waits for it to hear the news.
        self.publish(snapshot);
        let version = version.map_or_else(Version::default, |head| head.version());
        self.version
            .send_if_modified(|last| mem::replace(last, version) != version);
        if self.write_due().is_none_or(|due| due <= Instant::now()) {
            self.write_if_dirty().await;
        }
        Ok(())
    }

    /// Takes a change in, on a thread where checking 100,000 signatures holds nobody up.
    async fn check(
        &self,
        change: SyncResponse,
        trust: Trust,
    ) -> anyhow::Result<Result<Snapshot, SnapshotError>> {
        let state = Arc::clone(&self.resources);
        let generation = self.position.generation;
        let work = move || {
            let mut state = lock(&state);
            let rejected = state.apply(change, trust);
            (rejected, state.snapshot(generation))
        };
        let (rejected, snapshot) = task::spawn_blocking(work).await?;
        for rejected in rejected {
            tracing::warn!(%rejected, "a resource was left out");
        }
        Ok(snapshot)
    }

    fn publish(&mut self, snapshot: Result<Snapshot, SnapshotError>) {
        match snapshot {
            Ok(snapshot) => {
                self.limit.handle_limit(snapshot.mesh.offline_limit);
                let standing = self.stand();
                let snapshot = match standing {
                    Standing::Over => alone(&snapshot, &self.node),
                    Standing::Counts | Standing::Warned(_) => snapshot,
                };
                self.told = Some(Arc::new(snapshot));
                self.tell();
            }
            Err(error) => tracing::warn!(%error, "the state is not usable; keeping the last one"),
        }
    }

    /// Puts in force what this node was told, corrected by what it sees itself, if that is something else than before.
    fn tell(&self) {
        let Some(told) = &self.told else {
            return;
        };
        let local = self.local.as_ref().filter(|_| !self.confirmed);
        let right = local.and_then(|local| local.correct(told, &self.node));
        let right = right.map_or_else(|| Arc::clone(told), Arc::new);
        self.snapshots.send_if_modified(|last| {
            let is_new = last.as_ref() != Some(&right);
            *last = Some(right);
            is_new
        });
    }

    /// Says how long the state counts, where it is otherwise than before.
    fn stand(&mut self) -> Standing {
        let standing = self.limit.standing(now());
        let before = self.standing.send_replace(standing);
        if mem::discriminant(&before) != mem::discriminant(&standing) {
            match standing {
                Standing::Counts => {
                    tracing::info!("the mesh's state counts again without a limit near")
                }
                Standing::Warned(left) => tracing::warn!(
                    left_s = left.as_secs(),
                    "no controller spoke for long: when this time is over, the node speaks with nobody"
                ),
                Standing::Over => tracing::warn!(
                    "no controller spoke for longer than the mesh allows: the node serves what is its own, and speaks with nobody"
                ),
            }
        }
        standing
    }

    /// Time passed: what counted may count no more. Returns when to look again at the latest.
    async fn pass_time(&mut self) -> anyhow::Result<Option<Instant>> {
        let before = *self.standing.borrow();
        let standing = self.stand();
        if (before == Standing::Over) != (standing == Standing::Over) {
            let snapshot = self.check(SyncResponse::default(), Trust::Checked).await?;
            self.publish(snapshot);
        }
        self.keep_counted();
        Ok(self.limit.poll_timeout().map(Instant::from_std))
    }

    fn keep_counted(&mut self) {
        let (counted, confirmed) = self.limit.counted(now());
        if let Err(error) = self.state.set_offline(counted, confirmed) {
            tracing::debug!(%error, "cannot keep for how long no controller spoke");
        }
    }

    async fn take_from_disk(&mut self, payload: &[u8]) -> anyhow::Result<Option<SystemTime>> {
        let file = match SnapshotFile::decode(payload) {
            Ok(file) => file,
            Err(error) => {
                tracing::warn!(%error, "the snapshot on disk is not of this version");
                return Ok(None);
            }
        };
        // The slot's checksum says that it is what was verified.
        let head = file.head.as_ref().and_then(SignedHead::read);
        self.position = Position {
            store: file.store_id,
            epoch: head.as_ref().map_or(0, |head| head.epoch),
            generation: Generation(file.generation),
        };
        let all = SyncResponse {
            full: true,
            set: file.resources,
            ..SyncResponse::default()
        };
        // They were checked when they came, and the slot's checksum says that they are the same.
        let snapshot = self.check(all, Trust::Checked).await?;
        if let Some(local) = &mut self.local {
            local.set_kept(file.pod_addresses);
        }
        self.head = file.head;
        self.publish(snapshot);
        if let Some(head) = head {
            self.version.send_replace(head.version());
        }
        let received = u64::try_from(file.received_unix_s).unwrap_or_default();
        Ok(UNIX_EPOCH.checked_add(Duration::from_secs(received)))
    }

    /// When the disk should next be written; `None`: it has everything.
    #[must_use]
    pub fn write_due(&self) -> Option<Instant> {
        self.dirty
            .then(|| self.next_write.unwrap_or_else(Instant::now))
    }

    /// Writes what the disk does not have. What fails is said, and tried again later.
    pub async fn write_if_dirty(&mut self) {
        if !self.dirty {
            return;
        }
        let received = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let file = SnapshotFile {
            store_id: self.position.store.clone(),
            generation: self.position.generation.0,
            received_unix_s: i64::try_from(received.as_secs()).unwrap_or(i64::MAX),
            resources: Vec::new(),
            head: self.head.clone(),
            pod_addresses: self.local.as_ref().map_or_else(Vec::new, Local::kept),
        };
        let (store, state) = (Arc::clone(&self.store), Arc::clone(&self.resources));
        let write = move || {
            let payload = encode_snapshot(&file, lock(&state).resources());
            let bytes = payload.len();
            let written = lock(&store).write(&payload);
            drop(payload);
            if bytes >= GIVE_BACK_MIN {
                memory::give_back();
            }
            written.map(|()| bytes)
        };
        let refused = match task::spawn_blocking(write).await {
            Ok(Ok(bytes)) => {
                self.next_write = Some(Instant::now() + write_pause(bytes));
                self.dirty = false;
                self.refused.clear();
                return;
            }
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        // A disk that is full stays so for a while.
        self.next_write = Some(Instant::now() + WRITE_PAUSE_MAX);
        if self.refused != refused {
            tracing::warn!(error = %refused, folder = %self.state.path().display(),
                "cannot keep the snapshot; a restart would find an older one");
            self.refused = refused;
        }
    }
}

/// Counts for how long no controller speaks, and ends what counts no more, until `stop`.
///
/// # Errors
///
/// If the machine is out of threads.
pub async fn keep_limit(desired: Shared, stop: CancellationToken) -> anyhow::Result<()> {
    loop {
        let due = desired.lock().await.pass_time().await;
        let due = due.context("counting how long no controller spoke")?;
        let regular = Instant::now() + mesh_core::offline::limit::KEEP_EVERY;
        let next = due.map_or(regular, |due| due.min(regular));
        tokio::select! {
            () = stop.cancelled() => break,
            () = time::sleep_until(next) => {}
        }
    }
    desired.lock().await.pass_time().await.map(drop)
}

fn distrusted(why: impl ToString) -> NotTaken {
    NotTaken::Distrusted(why.to_string())
}

/// How long nothing is written after a snapshot of so many bytes.
fn write_pause(bytes: usize) -> Duration {
    let seconds = bytes as u64 / WRITE_RATE;
    Duration::from_secs(seconds).clamp(WRITE_PAUSE_MIN, WRITE_PAUSE_MAX)
}

/// Locks, also what somebody panicked with.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(crate) mod tests;
