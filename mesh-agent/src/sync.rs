//! The controller's side of the agent: joining, renewing, and keeping the resources current.
//!
//! Everything here may fail for days; the agent serves from its disk meanwhile.

mod join;
pub mod news;
mod visits;

use std::{
    collections::BTreeMap,
    io, mem,
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail};
use arc_swap::ArcSwap;
use mesh_api::{
    connect::{ALPN, ConnectError, control_channel_over, control_client},
    control::{NodeReport, RenewRequest, SyncRequest, SyncResponse, control_client::ControlClient},
};
use mesh_core::{
    offline::retry::{Failure, PAUSE_MAX, Retry},
    snapshot::Snapshot,
};
use mesh_daemon::{chain, http_proxy::HttpProxy};
use mesh_identity::{authority::new_key, credentials::Credentials, tls};
use mesh_linux::netlink::Netlink;
use mesh_wire::id::{Identity, NodeId, NodeName};
use tokio::{
    net::TcpStream,
    sync::{mpsc, oneshot, watch},
    time::{self, Instant},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, transport::Channel};

pub use self::visits::EVERY as VISITS_EVERY;
use self::{
    join::{JoinError, credentials_from, files_of, join, read_pass, try_join},
    visits::{Visit, Visits},
};
use crate::{
    config::{Settings, TokenSource},
    desired::{self, Desired},
    resolve,
    state::{IdentityFiles, StateFolder},
    uplinks::Way,
};

/// How often it is checked whether the certificate is due for renewal.
const RENEW_CHECK: Duration = Duration::from_secs(3600);

/// Requests that wait for the stream: an acknowledgement for each response, and responses come singly; and a report.
const REQUESTS_MAX: usize = 4;

/// How often the controller is told how this node is, at most: of 100,000 nodes it hears 3,300 times a second.
const REPORT_PAUSE: Duration = Duration::from_secs(30);

/// How a connection ended with which nothing was wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// It was a visit.
    Visited,
    /// Another uplink is in use, or the network is another.
    Moved,
    /// The node was cut off for a while: nobody knows whether the connection still leads anywhere.
    Doubted,
}

/// A connection that was there before the node was cut off has to say something within this, a satellite's 0.6 s there and back.
/// Otherwise its other end sends again ever more rarely what was lost, up to two minutes later, and a new one costs less.
const DOUBT: Duration = Duration::from_secs(1);

/// Where a connection leads, and how it leaves.
#[derive(Debug, Clone)]
struct Line {
    to: IpAddr,
    /// `None`: as the kernel's routes say.
    device: Option<String>,
    costs: bool,
}

/// How it stands with the controller.
#[derive(Debug, Clone, Default)]
pub struct Connection {
    /// `host:port` of the one that is or was last asked.
    pub controller: Option<String>,
    /// Whether the stream is up.
    pub connected: bool,
    /// Why not, for people.
    pub problem: String,
    /// When the controller was last there, by the node's own clock.
    pub last_contact: Option<SystemTime>,
    /// For how long it certainly was not there (`mesh_core::offline::limit`), and at which moment; it goes on from then.
    pub silent: Option<(Duration, Instant)>,
    /// When the controller is visited next, at the latest, by a node whose way out is metered.
    pub next_visit: Option<Instant>,
}

impl Connection {
    /// The stream is up no more. Until now the controller was there, also if it had nothing to say for days.
    pub(crate) fn end(&mut self) {
        if mem::take(&mut self.connected) {
            self.last_contact = Some(SystemTime::now());
            self.silent = Some((Duration::ZERO, Instant::now()));
        }
    }
}

/// The agent's side of the control protocol.
#[derive(Debug)]
pub struct Sync {
    settings: Settings,
    id: NodeId,
    state: Arc<StateFolder>,
    credentials: Arc<ArcSwap<Credentials>>,
    desired: desired::Shared,
    snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    controllers: Retry,
    connection: watch::Sender<Connection>,
    /// How this node is, for people at the controller.
    report: watch::Receiver<NodeReport>,
    /// How often somebody asked for what the desired state does not have, or called and is not in it.
    unknown: watch::Receiver<u64>,
    /// By which uplink connections leave.
    way: watch::Receiver<Way>,
    /// What may be reached now that could not be before.
    news: watch::Receiver<u64>,
    visits: Visits,
    /// Who wants another key at once.
    rotations: (mpsc::Sender<Rotation>, mpsc::Receiver<Rotation>),
}

/// Told what became of it.
pub type Rotation = oneshot::Sender<anyhow::Result<()>>;

/// An operator's, who waits for it: nobody asks twice.
const ROTATIONS_MAX: usize = 1;

impl Sync {
    /// Reads what is on disk; joins the mesh first if this node never did.
    ///
    /// # Errors
    ///
    /// When the state is damaged, of another node, or the controller refuses the token.
    pub async fn open(
        settings: &Settings,
        state: Arc<StateFolder>,
        id: NodeId,
        (report, unknown): (watch::Receiver<NodeReport>, watch::Receiver<u64>),
        way: watch::Receiver<Way>,
        news: watch::Receiver<u64>,
        netlink: &Netlink,
    ) -> anyhow::Result<(Self, watch::Receiver<Option<Arc<Snapshot>>>)> {
        let credentials = match state.identity()? {
            Some(files) => read_credentials(&files, &state)?,
            None => join(settings, &state, id, netlink).await?,
        };
        check_identity(&credentials, settings, id)?;
        let node = settings.node_name.clone();
        let cni = settings.cni.as_deref();
        let opened = Desired::open(node, Arc::clone(&state), &credentials, cni);
        let (desired, received) = opened.await?;
        let snapshots = desired.snapshots();
        let last_contact = received;
        let (counted, _) = state.offline();
        let sync = Self {
            settings: settings.clone(),
            id,
            state,
            credentials: Arc::new(ArcSwap::from_pointee(credentials)),
            desired: Arc::new(tokio::sync::Mutex::new(desired)),
            snapshots: snapshots.clone(),
            controllers: Retry::new(settings.controllers.len(), rand::random()),
            connection: watch::Sender::new(Connection {
                last_contact,
                silent: Some((counted, Instant::now())),
                ..Connection::default()
            }),
            report,
            unknown,
            way,
            news,
            visits: Visits::new(settings.metered_sync),
            rotations: mpsc::channel(ROTATIONS_MAX),
        };
        Ok((sync, snapshots))
    }

    /// The credentials in force.
    #[must_use]
    pub fn credentials(&self) -> Arc<ArcSwap<Credentials>> {
        Arc::clone(&self.credentials)
    }

    /// The state that this node has.
    #[must_use]
    pub fn desired(&self) -> desired::Shared {
        Arc::clone(&self.desired)
    }

    /// Where another key for the certificate is asked for. It comes by the stream that is open, or the next one.
    #[must_use]
    pub fn rotations(&self) -> mpsc::Sender<Rotation> {
        self.rotations.0.clone()
    }

    /// How it stands with the controller.
    #[must_use]
    pub fn connection(&self) -> watch::Receiver<Connection> {
        self.connection.subscribe()
    }

    /// Follows the controller until `stop`.
    ///
    /// # Errors
    ///
    /// None: what fails is tried again.
    pub async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut told = BTreeMap::new();
        loop {
            let turn = self.settings.controllers.get(self.controllers.current());
            let Some(controller) = turn.cloned() else {
                stop.cancelled().await;
                return Ok(());
            };
            self.connection
                .send_modify(|connection| connection.controller = Some(controller.clone()));
            self.news.mark_unchanged();
            let begun = Instant::now();
            let ended = tokio::select! {
                ended = self.follow(&controller) => ended,
                () = stop.cancelled() => break,
            };
            let error = match ended {
                Ok(Ended::Moved | Ended::Doubted) => {
                    // The next connection may take long to come about.
                    self.desired.lock().await.write_if_dirty().await;
                    continue;
                }
                Ok(Ended::Visited) => {
                    self.desired.lock().await.write_if_dirty().await;
                    self.controllers.handle_success();
                    tokio::select! {
                        () = self.rest() => continue,
                        () = stop.cancelled() => break,
                    }
                }
                Err(error) => error,
            };
            let mut problem = chain(error.as_ref());
            if self.may_join_again(&error) {
                let joined = tokio::select! {
                    joined = self.join_again(&controller) => joined,
                    () = stop.cancelled() => break,
                };
                match joined {
                    Ok(()) => continue,
                    Err(error) => problem += &format!("; joining again: {}", chain(error.as_ref())),
                }
            }
            if told.insert(controller.clone(), problem.clone()) != Some(problem.clone()) {
                tracing::info!(%controller, %problem, "no connection to the controller; serving what is on disk");
            }
            self.connection.send_modify(|connection| {
                connection.end();
                connection.problem = problem;
            });
            self.desired.lock().await.write_if_dirty().await;
            let metered = self.way.borrow().is_metered();
            let longest = metered.then(|| self.visits.within().max(PAUSE_MAX));
            let failure = failure(&error, begun.elapsed());
            let nodes = self.nodes();
            let pause = self.controllers.handle_failure(failure, nodes, longest);
            let spread = self.controllers.spread(nodes);
            let news = heard(self.news.clone(), spread);
            tokio::select! {
                () = time::sleep(pause) => {}
                // At most one a second: the network is looked at no more often, and a relay is not dialled more often.
                () = news, if !metered => self.controllers.handle_success(),
                () = other_uplink(self.way.clone()) => self.controllers.handle_success(),
                () = stop.cancelled() => break,
            }
        }
        self.desired.lock().await.write_if_dirty().await;
        Ok(())
    }

    /// How many nodes there are, as far as this one knows.
    fn nodes(&self) -> usize {
        let snapshot = self.snapshots.borrow();
        snapshot.as_ref().map_or(0, |all| all.nodes.len())
    }

    /// Says nothing until the next visit is due, or another uplink is in use.
    async fn rest(&mut self) {
        let (left, share) = (Instant::now(), rand::random());
        let mut report = self.report.clone();
        let mut asked = None;
        let moved = other_uplink(self.way.clone());
        tokio::pin!(moved);
        loop {
            let report_now = *report.borrow_and_update();
            let next = self.visits.next(left, &report_now, asked, share);
            self.connection.send_modify(|connection| {
                connection.end();
                connection.next_visit = Some(next);
            });
            tokio::select! {
                () = time::sleep_until(next) => break,
                () = changed(&mut report) => {}
                () = changed(&mut self.unknown), if asked.is_none() => asked = Some(Instant::now()),
                () = &mut moved => break,
            }
        }
        self.visits.handle_rested(asked.is_some());
        self.connection
            .send_modify(|connection| connection.next_visit = None);
    }

    /// Whether the controller knows this node no more, and its pod's token may change that.
    fn may_join_again(&self, error: &anyhow::Error) -> bool {
        let said = error.downcast_ref::<Said>();
        let refused = said.is_some_and(|said| said.code == Code::PermissionDenied);
        refused && matches!(self.settings.token, TokenSource::ServiceAccount { .. })
    }

    /// A node of the cluster whose Node was deleted, and came back, needs nobody to go there: it joins with the key that it has.
    async fn join_again(&mut self, controller: &str) -> anyhow::Result<()> {
        let new = new_key()?;
        let pass = read_pass(&self.settings.token)?;
        let way = self.way.borrow().clone();
        let tried = try_join(controller, &way, pass, &self.settings, self.id, new.csr_der);
        let tried = tried.await;
        let response = tried.map_err(|error| match error {
            JoinError::Refused(status) => said(status),
            JoinError::Unreachable(error) => error,
        })?;
        let credentials = credentials_from(response, &new.key_pem)?;
        self.state.set_identity(&files_of(&credentials))?;
        tracing::info!(mesh = credentials.trust_domain(), "joined again");
        self.credentials.store(Arc::new(credentials));
        Ok(())
    }

    /// One connection's life.
    async fn follow(&mut self, controller: &str) -> anyhow::Result<Ended> {
        let spread = self.controllers.spread(self.nodes());
        let news = heard(self.news.clone(), spread);
        let (mut client, line) = tokio::select! {
            connected = self.connect(controller) => connected?,
            // What was begun in another network may never end.
            () = news => return Ok(Ended::Moved),
        };
        let mut renew = time::interval(RENEW_CHECK); // The first tick comes at once.
        let mut doubted = false;
        loop {
            let had = self.desired.lock().await.position().clone();
            self.desired.lock().await.follow(true);
            let stream = self.follow_stream(&mut client, &line, &mut renew, doubted);
            let followed = stream.await;
            self.desired.lock().await.follow(false);
            match followed? {
                Some(Ended::Doubted) => {
                    self.desired.lock().await.write_if_dirty().await;
                    self.news.mark_unchanged(); // Else the next stream would be doubted for the same.
                    doubted = true;
                    continue;
                }
                Some(ended) => return Ok(ended),
                None => doubted = false,
            }
            // After a large answer the controller ends the stream for the sake of both ends' buffers, and nothing is wrong.
            if had == *self.desired.lock().await.position() {
                bail!("the controller closed the stream");
            }
        }
    }

    /// One stream's life, until one of both ends it; `None`: the controller did. One of a `doubted` connection has to have its
    /// first answer, which always comes, soon.
    async fn follow_stream(
        &mut self,
        client: &mut ControlClient<Channel>,
        line: &Line,
        renew: &mut time::Interval,
        mut doubted: bool,
    ) -> anyhow::Result<Option<Ended>> {
        let (requests, outgoing) = mpsc::channel(REQUESTS_MAX);
        let request = self.request(line, Vec::new()).await;
        requests.send(request).await.ok(); // There is room for the first.
        let mut visit = line.costs.then(|| Visit::begin(Instant::now()));
        let mut report_at = Instant::now();
        let lost_at = Instant::now() + DOUBT;
        let spread = self.controllers.spread(self.nodes());
        let news = heard(self.news.clone(), spread);
        tokio::pin!(news);
        let begun = client.sync(ReceiverStream::new(outgoing));
        let begun = tokio::select! {
            begun = begun => begun,
            () = time::sleep_until(lost_at), if doubted => return Ok(Some(Ended::Moved)),
        };
        let mut responses = begun.map_err(said)?.into_inner();
        loop {
            let write_at = self.desired.lock().await.write_due();
            let (mut report, mut way) = (self.report.clone(), self.way.clone());
            let over = visit.map(Visit::ends);
            tokio::select! {
                response = responses.message() => {
                    let Some(response) = response.map_err(said)? else {
                        return Ok(None);
                    };
                    let digests = match response.digests_wanted {
                        0 => {
                            self.take(response).await?;
                            doubted = false;
                            if let Some(visit) = &mut visit {
                                visit.handle_answer(Instant::now());
                            }
                            Vec::new()
                        }
                        buckets => self.desired.lock().await.digests(buckets).await?,
                    };
                    let request = self.request(line, digests).await;
                    requests.send(request).await.context("the stream is closed")?;
                }
                () = async { time::sleep_until(write_at.unwrap_or_else(Instant::now)).await },
                    if write_at.is_some() => self.desired.lock().await.write_if_dirty().await,
                () = async { time::sleep_until(over.unwrap_or_else(Instant::now)).await }, if over.is_some() => {
                    if !visit.is_some_and(Visit::is_answered) {
                        bail!("the controller did not say whether there is something new");
                    }
                    return Ok(Some(Ended::Visited));
                }
                () = time::sleep_until(lost_at), if doubted => return Ok(Some(Ended::Moved)),
                () = &mut news, if !line.costs => return Ok(Some(Ended::Doubted)),
                () = changed(&mut way) => {
                    let now = self.way.borrow_and_update().clone();
                    if self.device(&now, line.to) != line.device || now.costs(line.to) != line.costs {
                        return Ok(Some(Ended::Moved));
                    }
                }
                () = async {
                    changed(&mut report).await;
                    time::sleep_until(report_at).await;
                } => {
                    report_at = Instant::now() + REPORT_PAUSE;
                    let request = self.request(line, Vec::new()).await;
                    requests.send(request).await.context("the stream is closed")?;
                }
                _ = renew.tick() => self.renew_if_due(client).await?,
                Some(wanted) = self.rotations.1.recv() => {
                    // Who asked may wait no more.
                    wanted.send(self.renew(client).await).ok();
                }
            }
        }
    }

    async fn connect(
        &mut self,
        controller: &str,
    ) -> anyhow::Result<(ControlClient<Channel>, Line)> {
        let credentials = self.credentials.load_full();
        let config = Arc::new(tls::client_config(&credentials, ALPN)?);
        let name = tls::server_name(credentials.trust_domain(), &Identity::Controller)?;
        let proxy = self.settings.https_proxy.as_deref();
        let way = self.way.borrow_and_update().clone();
        let tcp = connect_out(controller, proxy, |ip| self.device(&way, ip)).await?;
        let to = tcp.peer_addr().context("the connection is gone")?.ip();
        let line = Line {
            to: to.to_canonical(),
            device: self.device(&way, to),
            costs: way.costs(to),
        };
        let channel = control_channel_over(tcp, controller, config, name).await?;
        Ok((control_client(channel), line))
    }

    /// By which interface `to` is reached.
    fn device(&self, way: &Way, to: IpAddr) -> Option<String> {
        way.device(to, self.snapshots.borrow().as_deref())
    }

    async fn request(&mut self, line: &Line, digests: Vec<u64>) -> SyncRequest {
        let returns_within = match line.costs {
            true => self.visits.within(),
            false => Duration::ZERO,
        };
        let report = *self.report.borrow_and_update();
        SyncRequest {
            digests,
            report: Some(report),
            returns_within_s: u32::try_from(returns_within.as_secs()).unwrap_or(u32::MAX),
            ..self.desired.lock().await.says()
        }
    }

    async fn take(&mut self, response: SyncResponse) -> anyhow::Result<()> {
        self.desired.lock().await.take(response).await?;
        self.connection.send_modify(|connection| {
            connection.connected = true;
            connection.problem.clear();
            connection.last_contact = Some(SystemTime::now());
        });
        Ok(())
    }

    async fn renew_if_due(&mut self, client: &mut ControlClient<Channel>) -> anyhow::Result<()> {
        if SystemTime::now() < self.credentials.load().validity().renew_at() {
            return Ok(());
        }
        self.renew(client).await
    }

    /// A new key each time.
    async fn renew(&mut self, client: &mut ControlClient<Channel>) -> anyhow::Result<()> {
        let new = new_key()?;
        let request = RenewRequest {
            csr_der: new.csr_der,
        };
        let response = client
            .renew(request)
            .await
            .context("renewing the certificate")?;
        let renewed = credentials_from(response.into_inner(), &new.key_pem)?;
        self.state.set_identity(&files_of(&renewed))?;
        tracing::info!(node = %self.settings.node_name, "the certificate was renewed");
        self.credentials.store(Arc::new(renewed));
        Ok(())
    }
}

/// Waits for the next value. Whoever says it may have ended: then so will who waits.
async fn changed<T>(watched: &mut watch::Receiver<T>) {
    if watched.changed().await.is_err() {
        std::future::pending().await
    }
}

/// Waits until something may be reached that could not be before, and then so long, as many nodes may hear of that at once.
async fn heard(mut news: watch::Receiver<u64>, spread: Duration) {
    changed(&mut news).await;
    time::sleep(spread).await;
}

/// How an attempt ended that lasted so long.
fn failure(error: &anyhow::Error, lasted: Duration) -> Failure {
    match error.downcast_ref() {
        Some(ConnectError::Resolve { .. } | ConnectError::Tcp { .. }) => Failure::Unreachable,
        Some(
            ConnectError::Tls { .. } | ConnectError::Socket { .. } | ConnectError::Http { .. },
        )
        | None => Failure::Ended(lasted),
    }
}

/// Waits until connections leave by another interface than now.
async fn other_uplink(mut way: watch::Receiver<Way>) {
    let before = way.borrow_and_update().clone();
    loop {
        changed(&mut way).await;
        if way.borrow_and_update().interface() != before.interface() {
            return;
        }
    }
}

/// What the controller said instead of an answer.
#[derive(Debug, thiserror::Error)]
#[error("{}: {text}", code.description())]
struct Said {
    code: Code,
    text: String,
}

/// A status in words; its own `Display` is for programmers.
#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
fn said(status: Status) -> anyhow::Error {
    let message = status.message();
    let first = message.split(": https://").next().unwrap_or(message);
    let (code, text) = (status.code(), first.to_owned());
    Said { code, text }.into()
}

/// Waits until the desired state has this node.
///
/// # Errors
///
/// If the task that fetches it ended.
pub async fn wait_for_node(
    mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    node: &NodeName,
) -> anyhow::Result<Arc<Snapshot>> {
    let has_node = |snapshot: &Option<Arc<Snapshot>>| {
        snapshot
            .as_ref()
            .is_some_and(|s| s.nodes.contains_key(node))
    };
    if !has_node(&snapshots.borrow()) {
        tracing::info!(%node, "waiting for the first snapshot with this node in it");
    }
    let found = snapshots
        .wait_for(has_node)
        .await
        .context("the sync task ended")?;
    found.clone().context("the snapshot went away")
}

fn read_credentials(files: &IdentityFiles, state: &StateFolder) -> anyhow::Result<Credentials> {
    Credentials::from_pem(&files.certificate, &files.key, &files.ca).with_context(|| {
        let folder = state.path().display();
        format!("the certificate in {folder} is not usable (restore it, or empty the folder and join again)")
    })
}

fn check_identity(
    credentials: &Credentials,
    settings: &Settings,
    own: NodeId,
) -> anyhow::Result<()> {
    let Identity::Node { name, id } = credentials.identity() else {
        bail!(
            "the certificate in {} is not a node's",
            settings.state_dir.display()
        );
    };
    if *name != settings.node_name {
        bail!(
            "{} belongs to node {name}, but `node_name` is {}: correct it, or give this node its own `state_dir`",
            settings.state_dir.display(),
            settings.node_name
        );
    }
    if *id != own {
        bail!(
            "the certificate in {} is for another WireGuard key than wireguard.key there",
            settings.state_dir.display()
        );
    }
    Ok(())
}

/// A connection to the controller, through the HTTP proxy where there is one for it, by the interface that `device` names.
async fn connect_out(
    controller: &str,
    proxy: Option<&HttpProxy>,
    device: impl Fn(IpAddr) -> Option<String>,
) -> anyhow::Result<TcpStream> {
    let host = controller
        .rsplit_once(':')
        .map_or(controller, |(host, _)| host);
    let Some(proxy) = proxy.filter(|proxy| proxy.is_for(host)) else {
        return Ok(resolve::connect(controller, device).await?);
    };
    let connecting = async {
        let connected = resolve::connect(proxy.address(), device).await;
        connected.map_err(io::Error::other)
    };
    Ok(proxy.through(connecting, controller).await?)
}
