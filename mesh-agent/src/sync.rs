//! The controller's side of the agent: joining, renewing, and keeping the resources current.
//!
//! Everything here may fail for days; the agent serves from its disk meanwhile.

mod visits;

use std::{
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail};
use arc_swap::ArcSwap;
use mesh_api::{
    connect::{ALPN, control_channel_over, control_client},
    control::{
        JoinRequest, JoinResponse, NodeReport, RenewRequest, SyncRequest, SyncResponse,
        control_client::ControlClient,
    },
};
use mesh_core::snapshot::Snapshot;
use mesh_daemon::http_proxy::HttpProxy;
use mesh_identity::{
    authority::new_key,
    credentials::Credentials,
    tls,
    token::{JoinToken, MeshAnchor},
};
use mesh_linux::netlink::Netlink;
use mesh_wire::id::{Identity, NodeId, NodeName};
use tokio::{
    net::TcpStream,
    sync::{mpsc, watch},
    time::{self, Instant},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, transport::Channel};

pub use self::visits::EVERY as VISITS_EVERY;
use self::visits::{Visit, Visits};
use crate::{
    config::{Settings, TokenSource},
    desired::{self, Desired},
    network, resolve,
    state::{IdentityFiles, StateFolder},
    uplinks::Way,
};

/// First pause between attempts to reach the controller.
const RETRY_MIN: Duration = Duration::from_millis(500);

/// Longest pause: 100,000 nodes that come back at once are then 3,300 handshakes a second.
const RETRY_MAX: Duration = Duration::from_secs(30);

/// A connection that held this long was good: the next attempt starts with the first pause.
const GOOD_CONNECTION: Duration = Duration::from_secs(10);

/// How often it is checked whether the certificate is due for renewal.
const RENEW_CHECK: Duration = Duration::from_secs(3600);

/// Requests that wait for the stream: an acknowledgement for each response, and responses come singly; and a report.
const REQUESTS_MAX: usize = 4;

/// How often the controller is told how this node is, at most: of 100,000 nodes it hears 3,300 times a second.
const REPORT_PAUSE: Duration = Duration::from_secs(30);

/// The controllers, one after the other: any of them will do.
#[derive(Debug)]
struct Rotation {
    addresses: Vec<String>,
    current: usize,
    /// How many failed since one was good.
    failed: usize,
    pause: Duration,
}

impl Rotation {
    /// Begins with any, so that not all nodes begin with the same.
    fn new(addresses: &[String]) -> Self {
        Self {
            addresses: addresses.to_vec(),
            current: rand::random_range(0..addresses.len().max(1)),
            failed: 0,
            pause: RETRY_MIN,
        }
    }

    fn current(&self) -> Option<&str> {
        self.addresses.get(self.current).map(String::as_str)
    }

    /// Turns to the next one after the current one was of use for so long, and says how long to wait at
    /// most before it is tried. The pause grows only once all of them failed, to `longest`.
    fn failed(&mut self, lasted: Duration, longest: Duration) -> Duration {
        let count = self.addresses.len().max(1);
        if lasted > GOOD_CONNECTION {
            self.worked();
        }
        self.current = (self.current + 1) % count;
        self.failed += 1;
        if self.failed < count {
            return RETRY_MIN;
        }
        self.failed = 0;
        let pause = self.pause;
        self.pause = (pause * 2).min(longest);
        pause.min(longest)
    }

    /// The current one was good.
    fn worked(&mut self) {
        self.failed = 0;
        self.pause = RETRY_MIN;
    }
}

/// How a connection ended with which nothing was wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// It was a visit.
    Visited,
    /// Another uplink is in use.
    Moved,
}

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
    /// When the controller last said something, by the node's own clock.
    pub last_contact: Option<SystemTime>,
    /// When the controller is visited next, at the latest, by a node whose way out is metered.
    pub next_visit: Option<Instant>,
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
    controllers: Rotation,
    connection: watch::Sender<Connection>,
    /// How this node is, for people at the controller.
    report: watch::Receiver<NodeReport>,
    /// How often somebody asked for what the desired state does not have, or called and is not in it.
    unknown: watch::Receiver<u64>,
    /// By which uplink connections leave.
    way: watch::Receiver<Way>,
    visits: Visits,
}

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
        netlink: &Netlink,
    ) -> anyhow::Result<(Self, watch::Receiver<Option<Arc<Snapshot>>>)> {
        let credentials = match state.identity()? {
            Some(files) => read_credentials(&files, &state)?,
            None => join(settings, &state, id, netlink).await?,
        };
        check_identity(&credentials, settings, id)?;
        let node = settings.node_name.clone();
        let (desired, received) = Desired::open(node, Arc::clone(&state), &credentials).await?;
        let snapshots = desired.snapshots();
        let last_contact = received;
        let sync = Self {
            settings: settings.clone(),
            id,
            state,
            credentials: Arc::new(ArcSwap::from_pointee(credentials)),
            desired: Arc::new(tokio::sync::Mutex::new(desired)),
            snapshots: snapshots.clone(),
            controllers: Rotation::new(&settings.controllers),
            connection: watch::Sender::new(Connection {
                last_contact,
                ..Connection::default()
            }),
            report,
            unknown,
            way,
            visits: Visits::new(settings.metered_sync),
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
            let Some(controller) = self.controllers.current().map(str::to_owned) else {
                stop.cancelled().await;
                return Ok(());
            };
            self.connection
                .send_modify(|connection| connection.controller = Some(controller.clone()));
            let begun = Instant::now();
            let ended = tokio::select! {
                ended = self.follow(&controller) => ended,
                () = stop.cancelled() => break,
            };
            let error = match ended {
                Ok(Ended::Moved) => continue,
                Ok(Ended::Visited) => {
                    self.desired.lock().await.write_if_dirty().await;
                    self.controllers.worked();
                    tokio::select! {
                        () = self.rest() => continue,
                        () = stop.cancelled() => break,
                    }
                }
                Err(error) => error,
            };
            let mut problem = format!("{error:#}");
            if self.may_join_again(&error) {
                let joined = tokio::select! {
                    joined = self.join_again(&controller) => joined,
                    () = stop.cancelled() => break,
                };
                match joined {
                    Ok(()) => continue,
                    Err(error) => problem += &format!("; joining again: {error:#}"),
                }
            }
            if told.insert(controller.clone(), problem.clone()) != Some(problem.clone()) {
                tracing::info!(%controller, %problem, "no connection to the controller; serving what is on disk");
            }
            self.connection.send_modify(|connection| {
                connection.connected = false;
                connection.problem = problem;
            });
            self.desired.lock().await.write_if_dirty().await;
            let longest = match self.way.borrow().is_metered() {
                true => self.visits.within().max(RETRY_MAX),
                false => RETRY_MAX,
            };
            let pause = self.controllers.failed(begun.elapsed(), longest);
            tokio::select! {
                () = time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))) => {}
                () = other_uplink(self.way.clone()) => self.controllers.worked(),
                () = stop.cancelled() => break,
            }
        }
        self.desired.lock().await.write_if_dirty().await;
        Ok(())
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
                connection.connected = false;
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
        let (mut client, line) = self.connect(controller).await?;
        let mut renew = time::interval(RENEW_CHECK); // The first tick comes at once.
        self.unknown.mark_unchanged(); // What comes now answers it.
        loop {
            let had = self.desired.lock().await.position().clone();
            self.desired.lock().await.follow(true);
            let followed = self.follow_stream(&mut client, &line, &mut renew).await;
            self.desired.lock().await.follow(false);
            if let Some(ended) = followed? {
                return Ok(ended);
            }
            // After a large answer the controller ends the stream for the sake of both ends' buffers, and nothing is wrong.
            if had == *self.desired.lock().await.position() {
                bail!("the controller closed the stream");
            }
        }
    }

    /// One stream's life, until one of both ends it; `None`: the controller did.
    async fn follow_stream(
        &mut self,
        client: &mut ControlClient<Channel>,
        line: &Line,
        renew: &mut time::Interval,
    ) -> anyhow::Result<Option<Ended>> {
        let (requests, outgoing) = mpsc::channel(REQUESTS_MAX);
        let request = self.request(line, Vec::new()).await;
        requests.send(request).await.ok(); // There is room for the first.
        let mut visit = line.costs.then(|| Visit::begin(Instant::now()));
        let mut report_at = Instant::now();
        let mut responses = client
            .sync(ReceiverStream::new(outgoing))
            .await
            .map_err(said)?
            .into_inner();
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

/// Joins the mesh; tries until the controller answers. What a join token does not open stays shut; a
/// ServiceAccount token is another in an hour, and what refuses it can be mended without this node.
/// By each way out, the best first; then, as nothing is known yet of where the controller is, as the kernel's routes say.
async fn join(
    settings: &Settings,
    state: &StateFolder,
    id: NodeId,
    netlink: &Netlink,
) -> anyhow::Result<Credentials> {
    let renewed = matches!(settings.token, TokenSource::ServiceAccount { .. });
    let mut controllers = Rotation::new(&settings.controllers);
    let new = new_key()?;
    let mut told = BTreeMap::new();
    let mut attempt = 0;
    loop {
        let Some(controller) = controllers.current() else {
            bail!("this node has not joined a mesh yet: set `controller` in the configuration");
        };
        let network = network::read(netlink, settings).await?;
        let mut ways = network.map_or_else(Vec::new, |network| network.ways());
        ways.push(Way::default());
        // Each controller by this one before the next one's turn.
        let turn = attempt / settings.controllers.len().max(1) % ways.len();
        let way = ways.swap_remove(turn);
        attempt += 1;
        let tried = match read_pass(&settings.token) {
            Ok(pass) => {
                let csr_der = new.csr_der.clone();
                try_join(controller, &way, pass, settings, id, csr_der).await
            }
            Err(error) if renewed => Err(JoinError::Unreachable(error)),
            Err(error) => return Err(error),
        };
        let problem = match tried {
            Ok(response) => {
                let credentials = credentials_from(response, &new.key_pem)?;
                state.set_identity(&files_of(&credentials))?;
                tracing::info!(mesh = credentials.trust_domain(), "joined");
                return Ok(credentials);
            }
            Err(JoinError::Refused(status)) if renewed => said(status),
            Err(JoinError::Refused(status)) => bail!(
                "the controller {controller} refused to let this node join: {}",
                status.message()
            ),
            Err(JoinError::Unreachable(error)) => error,
        };
        let problem = format!("{problem:#}");
        if told.insert(controller.to_owned(), problem.clone()) != Some(problem.clone()) {
            tracing::warn!(%controller, %problem, "cannot join yet; trying again");
        }
        let pause = controllers.failed(Duration::ZERO, RETRY_MAX);
        time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
    }
}

/// What lets this node in, and by what it knows the controller.
struct Pass {
    mesh: MeshAnchor,
    token: String,
    service_account_token: String,
}

/// Reads it anew: a kubelet writes another ServiceAccount token long before the last one is over.
fn read_pass(source: &TokenSource) -> anyhow::Result<Pass> {
    let read = |key: &str, path: &Path| {
        fs::read_to_string(path).with_context(|| format!("cannot read `{key}` {}", path.display()))
    };
    let token = match source {
        TokenSource::None => bail!(
            "this node has not joined a mesh yet: set `token` or `token_file` (made by `meshctl token create`), or `service_account_token_file`"
        ),
        TokenSource::Inline(text) => text.0.clone(),
        TokenSource::File(path) => read("token_file", path)?,
        TokenSource::ServiceAccount { token, mesh } => {
            let anchor = read("mesh_file", mesh)?.parse::<MeshAnchor>();
            return Ok(Pass {
                mesh: anchor.with_context(|| format!("`mesh_file` {}", mesh.display()))?,
                token: String::new(),
                service_account_token: read("service_account_token_file", token)?.trim().to_owned(),
            });
        }
    };
    let token = token.trim().parse::<JoinToken>()?;
    Ok(Pass {
        mesh: MeshAnchor {
            trust_domain: token.trust_domain.clone(),
            mesh: token.mesh,
        },
        token: token.to_string(),
        service_account_token: String::new(),
    })
}

enum JoinError {
    /// The controller said no: trying again does not help.
    Refused(Status),
    /// No answer.
    Unreachable(anyhow::Error),
}

async fn try_join(
    controller: &str,
    way: &Way,
    pass: Pass,
    settings: &Settings,
    id: NodeId,
    csr_der: Vec<u8>,
) -> Result<JoinResponse, JoinError> {
    let proxy = settings.https_proxy.as_deref();
    let mut client = connect_to_join(controller, way, &pass.mesh, proxy)
        .await
        .map_err(JoinError::Unreachable)?;
    let request = JoinRequest {
        token: pass.token,
        node_name: settings.node_name.to_string(),
        csr_der,
        wireguard_public_key: id.0.to_vec(),
        service_account_token: pass.service_account_token,
    };
    match client.join(request).await {
        Ok(response) => Ok(response.into_inner()),
        Err(status) if is_refusal(status.code()) => Err(JoinError::Refused(status)),
        Err(status) => Err(JoinError::Unreachable(said(status))),
    }
}

fn is_refusal(code: Code) -> bool {
    matches!(
        code,
        Code::InvalidArgument
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::NotFound
    )
}

async fn connect_to_join(
    controller: &str,
    way: &Way,
    anchor: &MeshAnchor,
    proxy: Option<&HttpProxy>,
) -> anyhow::Result<ControlClient<Channel>> {
    let config = Arc::new(tls::join_client_config(anchor.mesh, ALPN)?);
    let name = tls::server_name(&anchor.trust_domain, &Identity::Controller)?;
    let tcp = connect_out(controller, proxy, |ip| way.device(ip, None)).await?;
    let channel = control_channel_over(tcp, controller, config, name).await?;
    Ok(control_client(channel))
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

fn credentials_from(response: JoinResponse, key_pem: &str) -> anyhow::Result<Credentials> {
    let chain = response
        .certificate_chain_der
        .into_iter()
        .map(Into::into)
        .collect();
    let authority = response.ca_certificate_der.into();
    Credentials::from_parts(chain, key_pem, authority)
        .context("the controller's answer is not usable")
}

fn files_of(credentials: &Credentials) -> IdentityFiles {
    IdentityFiles {
        certificate: credentials.chain_pem(),
        key: credentials.key_pem().to_string(),
        ca: credentials.authority_pem(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_controller_is_tried_before_the_pause_grows() {
        let names: Vec<_> = ["a", "b", "c"].map(str::to_owned).into();
        let mut controllers = Rotation::new(&names);
        let mut tried = Vec::new();
        let mut pauses = Vec::new();
        for _ in 0..6 {
            tried.push(controllers.current().unwrap().to_owned());
            pauses.push(controllers.failed(Duration::ZERO, RETRY_MAX).as_millis());
        }
        assert_eq!(tried[..3], tried[3..]);
        tried.truncate(3);
        tried.sort();
        assert_eq!(tried, names);
        assert_eq!(pauses, [500, 500, 500, 500, 500, 1000]);
        // One that was good for long is left for the next at once.
        let pause = controllers.failed(GOOD_CONNECTION * 2, RETRY_MAX);
        assert_eq!(pause, RETRY_MIN);
        let longest = (0..100)
            .map(|_| controllers.failed(Duration::ZERO, RETRY_MAX))
            .max();
        assert_eq!(longest, Some(RETRY_MAX));
        assert_eq!(Rotation::new(&[]).current(), None);
    }

    #[test]
    fn a_service_account_s_token_is_read_anew_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let (token, mesh) = (folder.path().join("token"), folder.path().join("mesh"));
        let source = TokenSource::ServiceAccount {
            token: token.clone(),
            mesh: mesh.clone(),
        };
        let problem = || read_pass(&source).err().map(|error| format!("{error:#}"));
        assert!(problem().unwrap().contains("cannot read `mesh_file`"));
        fs::write(&mesh, "nothing of the kind").unwrap();
        assert!(problem().unwrap().contains("not a mesh's anchor"));
        fs::write(&mesh, format!("hfmesh1.demo.{}\n", "07".repeat(32))).unwrap();
        let missing = problem().unwrap();
        assert!(
            missing.contains("cannot read `service_account_token_file`"),
            "{missing}"
        );
        for text in ["first", "second"] {
            fs::write(&token, format!("{text}\n")).unwrap();
            let pass = read_pass(&source).unwrap();
            assert_eq!(pass.service_account_token, text);
            assert_eq!(
                (pass.token.as_str(), pass.mesh.trust_domain.as_str()),
                ("", "demo")
            );
        }
        assert!(!format!("{source:?}").contains("second"));
    }
}
