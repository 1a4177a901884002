//! The shell around a Kubernetes API server: what is read from it, what is written to it, and
//! whose ServiceAccount tokens count. What follows from all that is decided elsewhere.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use k8s_openapi::api::{
    core::v1::{Namespace, Node, Pod, Service},
    discovery::v1::EndpointSlice,
    networking::v1::NetworkPolicy,
};
use kube::{
    Api, Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
    core::{DynamicObject, PartialObjectMeta},
};
use tokio::{
    sync::{mpsc, watch},
    task::{JoinSet, spawn_blocking},
    time::{Instant, MissedTickBehavior, interval, timeout_at},
};
use tokio_util::sync::CancellationToken;

use self::follow::{Source, follow};
use crate::{
    cluster::{Event, KINDS, KINDS_OF_POLICIES},
    config::KubernetesSettings,
    manifests::Kind,
    removal,
    state::State,
};

mod follow;
pub mod read;
mod review;
mod write;

pub use self::review::{AUDIENCE, ReviewError, Reviewer};
pub(crate) use self::{
    follow::client_error,
    write::{ANCHOR_CONFIG_MAP, ANCHOR_KEY},
};

/// Events that wait: some 2 KiB each, so 2 MiB. When there are more, the API server waits.
const EVENTS_MAX: usize = 1024;

/// Changes that come within this are one generation: a rollout touches a slice every few
/// milliseconds, and 30 ms are nothing of the second within which every agent should know.
const BATCH: Duration = Duration::from_millis(30);

/// Most events in one batch: 10,000 objects are worked out in some 50 ms.
const BATCH_EVENTS_MAX: usize = 10_000;

/// How long a connection to the API server may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A client of the configured API server. It connects when it is used.
///
/// # Errors
///
/// If the kubeconfig cannot be read, or this is not a pod.
pub async fn client(settings: &KubernetesSettings) -> Result<Client> {
    let mut config = match &settings.kubeconfig {
        Some(path) => from_file(path).await?,
        None => Config::incluster().context(
            "kubernetes: not in a pod: give `kubeconfig` in the table [kubernetes] of the configuration",
        )?,
    };
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    Client::try_from(config).context("kubernetes: no client")
}

async fn from_file(path: &Path) -> Result<Config> {
    let what = || format!("kubernetes: kubeconfig {}", path.display());
    let file = Kubeconfig::read_from(path).with_context(what)?;
    let options = KubeConfigOptions::default();
    let config = Config::from_custom_kubeconfig(file, &options);
    config.await.with_context(what)
}

/// Follows the cluster and writes to it until `stop`.
///
/// # Errors
///
/// If a part of it panicked. What the API server refuses is tried again.
pub async fn run(state: Arc<State>, client: Client, stop: CancellationToken) -> Result<()> {
    let (events, inbox) = mpsc::channel(EVENTS_MAX);
    let (needed, need) = watch::channel(false);
    let mut tasks = JoinSet::new();
    for kind in KINDS {
        tasks.spawn(follow_kind(client.clone(), kind, events.clone()));
    }
    for kind in KINDS_OF_POLICIES {
        let (client, events, mut need) = (client.clone(), events.clone(), need.clone());
        tasks.spawn(async move {
            // Nobody says any more that they are needed: the process ends.
            need.wait_for(|needed| *needed).await.ok();
            follow_kind(client, kind, events).await;
        });
    }
    drop(events);
    let namespace = state.settings().kubernetes.clone();
    let namespace = namespace.map(|settings| settings.namespace);
    let namespace = namespace.unwrap_or_default();
    tasks.spawn(write::run(state.clone(), client, namespace));
    tasks.spawn(remove_deleted(state.clone()));
    let ended = tokio::select! {
        () = stop.cancelled() => return Ok(()),
        ended = tasks.join_next() => ended,
        done = take(&state, inbox, &needed) => return done,
    };
    match ended {
        Some(Err(error)) => Err(error).context("following the cluster"),
        Some(Ok(())) | None => anyhow::bail!("following the cluster ended early"),
    }
}

async fn remove_deleted(state: Arc<State>) {
    let mut rounds = interval(removal::ROUND);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        rounds.tick().await;
        let state = state.clone();
        // A panic there is one of the next round too, and the process's own tasks tell it.
        spawn_blocking(move || state.remove_deleted()).await.ok();
    }
}

async fn follow_kind(client: Client, kind: Kind, events: mpsc::Sender<Event>) {
    let own = |kind| Api::<DynamicObject>::all_with(client.clone(), &read::api_resource(kind));
    let labelled = |labels| Source {
        kind,
        labels: Some(labels),
    };
    let all = Source { kind, labels: None };
    let client = client.clone();
    match kind {
        Kind::Service => follow(Api::<Service>::all(client), all, read::service, events).await,
        Kind::EndpointSlice => {
            // Others are of no service: mirrors by hand, or of other uses.
            let slices = Api::<EndpointSlice>::all(client);
            follow(slices, labelled(read::SLICES), read::slice, events).await;
        }
        Kind::Node => follow(Api::<Node>::all(client), all, read::node, events).await,
        Kind::NetworkPolicy => {
            let policies = Api::<NetworkPolicy>::all(client);
            follow(policies, all, read::network_policy, events).await;
        }
        Kind::Pod => follow(Api::<Pod>::all(client), all, read::pod, events).await,
        Kind::Namespace => {
            let namespaces = Api::<PartialObjectMeta<Namespace>>::all(client);
            follow(namespaces, all, read::namespace, events).await;
        }
        Kind::MeshNode
        | Kind::MeshRelay
        | Kind::ExternalPeer
        | Kind::MeshConfig
        | Kind::MeshService
        | Kind::MeshPolicy
        | Kind::SiteRoute
        | Kind::Community => {
            let objects = own(kind);
            let convert = move |object| read::own(kind, object);
            follow(objects, all, convert, events).await;
        }
    }
}

/// Hands batches of events to the state.
async fn take(
    state: &Arc<State>,
    mut inbox: mpsc::Receiver<Event>,
    needed: &watch::Sender<bool>,
) -> Result<()> {
    loop {
        let mut batch = Vec::new();
        let first = inbox.recv().await;
        batch.push(first.context("nobody follows the cluster")?);
        let end = Instant::now() + BATCH;
        while batch.len() < BATCH_EVENTS_MAX {
            let room = BATCH_EVENTS_MAX - batch.len();
            match timeout_at(end, inbox.recv_many(&mut batch, room)).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
        let working = state.clone();
        let policies = spawn_blocking(move || working.hear(batch)).await?;
        if policies {
            needed.send_replace(true);
        }
    }
}
