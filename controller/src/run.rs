//! The life of the process: open, listen, serve, stop.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result};
use mesh_api::{
    admin::controller_admin_server::ControllerAdminServer,
    connect::{ALPN, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT},
    control::control_server::ControlServer,
    serve::{AdminSocket, tls_incoming},
};
use mesh_daemon::{NotifyState, metrics, notify, supervisor::Supervisor, warn_if_exposed};
use mesh_identity::{
    credentials::Credentials,
    tls::{ClientAuth, server_config},
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    net::TcpListener,
    time::{MissedTickBehavior, interval},
};
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::{
    admin::AdminService,
    config::Settings,
    control::{ControlService, REQUEST_BYTES_MAX},
    kubernetes::{self, Reviewer},
    manifests::watch::{FolderChange, RESCAN, Watch},
    shared,
    state::State,
};

/// Streams that one connection may have: an agent has one Sync and now and then a Renew.
const STREAMS_MAX: u32 = 8;

/// How often addresses are freed that have rested for a month.
const FORGET_ROUND: Duration = Duration::from_secs(600);

/// Serves until `stop`, SIGTERM or SIGINT.
///
/// # Errors
///
/// When something that it needs cannot be had, or a task ends before its time.
pub async fn run(settings: Settings, stop: CancellationToken) -> Result<()> {
    raise_file_limit();
    settings.secret_files().for_each(warn_if_exposed);
    let listener = TcpListener::bind(settings.listen).await;
    let listener = listener.with_context(|| format!("cannot listen on {}", settings.listen))?;
    let opened = tokio::task::spawn_blocking(move || State::open(settings)).await?;
    let state = Arc::new(opened.context("mesh-controller cannot start")?);
    let socket = AdminSocket::bind(&state.settings().admin_socket).await?;
    let certificate = OwnCertificate::new(&state)?;
    let address = listener
        .local_addr()
        .context("the listener has no address")?;
    tracing::info!(
        %address,
        mesh = state.authority().trust_domain(),
        id = %state.authority().mesh_id(),
        "mesh-controller serves"
    );

    let mut supervisor = Supervisor::new(stop.clone());
    supervisor.stop_on_signal()?;
    let mut reviewer = None;
    if let Some(settings) = &state.settings().kubernetes {
        let client = kubernetes::client(settings).await?;
        let (namespace, account) = (&settings.namespace, &settings.agent_service_account);
        reviewer = Some(Reviewer::new(client.clone(), namespace, account));
        if settings.store {
            let store = shared::kubernetes::run(
                state.clone(),
                client.clone(),
                namespace.clone(),
                stop.clone(),
            );
            supervisor.spawn("store", store);
        }
        let cluster = kubernetes::run(state.clone(), client, stop.clone());
        supervisor.spawn("kubernetes", cluster);
    }
    if let Some(settings) = state.settings().etcd.clone() {
        let store = shared::etcd::run(state.clone(), settings, stop.clone());
        supervisor.spawn("store", store);
    }
    let service = ControlService::new(state.clone(), reviewer, stop.clone());
    let shown = service.clone();
    let page = move || shown.clone().metrics();
    let metrics = metrics::serve(state.settings().metrics, page, stop.clone());
    supervisor.spawn("metrics", metrics);
    let traces = state.traces().clone();
    supervisor.spawn("traces", traces.send(stop.clone()));
    let agents = control(service, listener, certificate.clone(), stop.clone());
    supervisor.spawn("control", agents);
    supervisor.spawn("admin", admin(state.clone(), socket, stop.clone()));
    supervisor.spawn("registry", registry(state.clone(), stop.clone()));
    supervisor.spawn("manifests", manifests(state, certificate, stop));
    notify(NotifyState::Ready);
    supervisor.run().await
}

async fn control(
    service: ControlService,
    listener: TcpListener,
    certificate: OwnCertificate,
    stop: CancellationToken,
) -> Result<()> {
    let service = ControlServer::new(service).max_decoding_message_size(REQUEST_BYTES_MAX);
    let refused = |peer: SocketAddr, problem: &str| {
        tracing::debug!(%peer, problem, "connection refused");
    };
    let incoming = tls_incoming(listener, move || certificate.config(), refused);
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(STREAMS_MAX)
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
        .await
        .context("serving agents")
}

/// Forgets nodes that were taken out long ago.
async fn registry(state: Arc<State>, stop: CancellationToken) -> Result<()> {
    let mut rounds = interval(FORGET_ROUND);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = rounds.tick() => {}
            () = stop.cancelled() => return Ok(()),
        }
        let state = state.clone();
        tokio::task::spawn_blocking(move || state.forget_removed()).await?;
    }
}

async fn admin(state: Arc<State>, socket: AdminSocket, stop: CancellationToken) -> Result<()> {
    Server::builder()
        .add_service(ControllerAdminServer::new(AdminService::new(state)))
        .serve_with_incoming_shutdown(socket, stop.cancelled_owned())
        .await
        .context("serving the admin socket")
}

async fn manifests(
    state: Arc<State>,
    certificate: OwnCertificate,
    stop: CancellationToken,
) -> Result<()> {
    let folder = state.settings().manifests.clone();
    let mut watch = folder.map(Watch::new);
    // Something may have changed between the first reading and the watch.
    let mut changed = FolderChange::Any;
    loop {
        let scanning = state.clone();
        tokio::task::spawn_blocking(move || scanning.scan(&changed)).await?;
        certificate.renew(&state)?;
        changed = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            changed = next_change(watch.as_mut()) => changed,
        };
    }
}

async fn next_change(watch: Option<&mut Watch>) -> FolderChange {
    match watch {
        Some(watch) => watch.changed().await,
        None => {
            tokio::time::sleep(RESCAN).await;
            FolderChange::Any
        }
    }
}

/// The controller's own certificate: made at each start, and anew once it is half over.
#[derive(Debug, Clone)]
struct OwnCertificate {
    current: Arc<Mutex<(Credentials, Arc<ServerConfig>)>>,
}

impl OwnCertificate {
    fn new(state: &State) -> Result<Self> {
        let current = Arc::new(Mutex::new(make_certificate(state)?));
        Ok(Self { current })
    }

    fn config(&self) -> Arc<ServerConfig> {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.1.clone()
    }

    fn renew(&self, state: &State) -> Result<()> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if state.now() >= current.0.validity().renew_at() {
            *current = make_certificate(state)?;
        }
        Ok(())
    }
}

fn make_certificate(state: &State) -> Result<(Credentials, Arc<ServerConfig>)> {
    let credentials = state
        .own_credentials()
        .context("the controller's own certificate")?;
    let config = server_config(&credentials, ClientAuth::Optional, ALPN);
    let config = config.context("the controller's TLS settings")?;
    Ok((credentials, Arc::new(config)))
}

/// A connection needs a descriptor; the usual soft limit of 1024 would be fewer than we allow.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}
