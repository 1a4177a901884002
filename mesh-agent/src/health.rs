//! Health checks of services with `externalTrafficPolicy: Local`: at their `healthCheckNodePort`, this
//! node says to load balancers whether it has an endpoint of them itself. As kube-proxy answers
//! (`pkg/proxy/healthcheck/service_health.go`).

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use hyper::{
    HeaderMap, Response, StatusCode,
    header::{CONTENT_TYPE, HeaderName, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use mesh_core::services::{self, HealthCheck, View};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::{AbortHandle, JoinSet},
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;

/// Most sockets: 256 ports at four addresses. Those beyond it, the last in order, are not listened on.
const LISTENERS_MAX: usize = 1_024;

/// Connections answered at once, over all ports: each load balancer asks every few seconds, and is
/// answered in milliseconds. One more for each socket waits, and others in the kernel's backlog.
const CONNECTIONS_MAX: usize = 64;

/// How long a connection lasts at most, with one request.
const CONNECTION_LIMIT: Duration = Duration::from_secs(5);

/// What a request's header may take: hyper's least.
const HEADER_BYTES_MAX: usize = 8_192;

/// Pause before an address that could not be listened on is tried again, and after a connection that
/// the kernel could not give (no file descriptor left).
const RETRY: Duration = Duration::from_secs(5);

/// How many endpoints this node has, for load balancers that share by it.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

type Checks = Arc<BTreeMap<u16, HealthCheck>>;

/// Answers at the health check ports of the services in view, on this node's own addresses, until `stop`.
///
/// # Errors
///
/// If the view is gone; what cannot be listened on is logged, and tried again.
pub async fn keep_health_checks(
    mut views: watch::Receiver<Option<Arc<View>>>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let (tell, told) = watch::channel(Checks::default());
    let mut tasks = JoinSet::new();
    let mut listening: BTreeMap<SocketAddr, AbortHandle> = BTreeMap::new();
    let mut problems = BTreeMap::new();
    loop {
        let view = views.borrow_and_update().clone();
        let checks = view.as_deref().map(services::health_checks);
        let checks = Checks::new(checks.unwrap_or_default());
        let wanted = view.map_or_else(BTreeSet::new, |view| addresses(&view, &checks));
        tell.send_replace(checks);
        listening.retain(|address, task| {
            let stays = wanted.contains(address);
            if !stays {
                task.abort();
            }
            stays
        });
        let before = std::mem::take(&mut problems);
        for address in wanted {
            if listening.contains_key(&address) {
                continue;
            }
            match TcpListener::bind(address).await {
                Ok(listener) => {
                    let connections = Arc::clone(&connections);
                    let answers = serve(listener, address.port(), told.clone(), connections);
                    listening.insert(address, tasks.spawn(answers));
                }
                Err(error) => {
                    let problem = error.to_string();
                    if before.get(&address) != Some(&problem) {
                        tracing::warn!(%address, %problem, "cannot answer health checks of a service");
                    }
                    problems.insert(address, problem);
                }
            }
        }
        let retry = Instant::now() + RETRY;
        tokio::select! {
            () = stop.cancelled() => return Ok(()), // The tasks end with their set.
            changed = views.changed() => changed.context("the view is gone")?,
            () = time::sleep_until(retry), if !problems.is_empty() => {}
        }
        // Those that were aborted.
        while tasks.try_join_next().is_some() {}
    }
}

/// Where to listen: at this node's own addresses, as for node ports.
fn addresses(view: &View, checks: &BTreeMap<u16, HealthCheck>) -> BTreeSet<SocketAddr> {
    let own = view.snapshot.nodes.get(&view.node);
    let own: Vec<_> = own
        .into_iter()
        .flat_map(|own| own.own_addresses())
        .collect();
    let ports = checks.keys();
    let all = ports.flat_map(|&port| own.iter().map(move |&ip| SocketAddr::new(ip, port)));
    all.take(LISTENERS_MAX).collect()
}

async fn serve(
    listener: TcpListener,
    port: u16,
    told: watch::Receiver<Checks>,
    connections: Arc<Semaphore>,
) {
    let mut clients = JoinSet::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(port, %error, "cannot take a health check");
                time::sleep(RETRY).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else {
            return; // Never closed.
        };
        while clients.try_join_next().is_some() {}
        let told = told.clone();
        clients.spawn(async move {
            let check = told.borrow().get(&port).cloned();
            let answered = time::timeout(CONNECTION_LIMIT, answer(stream, check)).await;
            if let Ok(Err(error)) = answered {
                tracing::debug!(port, %error, "a health check went wrong");
            }
            drop(permit);
        });
    }
}

/// One request, whatever it asks for. A service that is gone meanwhile has nothing here.
async fn answer(stream: TcpStream, check: Option<HealthCheck>) -> hyper::Result<()> {
    let response = service_fn(|_request| {
        let response = respond(check.as_ref());
        async move { Ok::<_, Infallible>(response) }
    });
    http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(HEADER_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), response)
        .await
}

fn respond(check: Option<&HealthCheck>) -> Response<String> {
    let count = check.map_or(0, |check| check.local_endpoints);
    let mut response = Response::new(check.map(body).unwrap_or_default());
    if count == 0 {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    let headers: &mut HeaderMap = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(WEIGHT, HeaderValue::from(count));
    response
}

/// Namespaces and names are DNS labels: nothing in them has to be escaped.
fn body(check: &HealthCheck) -> String {
    let HealthCheck {
        service,
        local_endpoints,
    } = check;
    format!(
        "{{\"service\":{{\"namespace\":\"{}\",\"name\":\"{}\"}},\"localEndpoints\":{local_endpoints},\
         \"serviceProxyHealthy\":true}}",
        service.namespace, service.name
    )
}
