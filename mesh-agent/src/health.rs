//! Health checks of services with `externalTrafficPolicy: Local`: at their `healthCheckNodePort`, this
//! node says to load balancers whether it has an endpoint of them itself. As kube-proxy answers
//! (`pkg/proxy/healthcheck/service_health.go`).

use std::{
    collections::{BTreeMap, BTreeSet},
    future::ready,
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use hyper::{
    HeaderMap, Response, StatusCode,
    header::{CONTENT_TYPE, HeaderName, HeaderValue},
};
use mesh_core::{
    services::{self, HealthCheck, View},
    snapshot::ServiceName,
};
use mesh_daemon::http;
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    task::{AbortHandle, JoinSet},
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;

/// Most sockets: 256 ports at four addresses. Those beyond it, the last in order, are not listened on, which
/// is said.
const LISTENERS_MAX: usize = 1_024;

/// Addresses that are said one by one of those where nobody answers; of the others, how many they are.
const SAID_MAX: usize = 8;

/// Connections answered at once, over all ports: each load balancer asks every few seconds, and is
/// answered in milliseconds. One more for each socket waits, and others in the kernel's backlog.
const CONNECTIONS_MAX: usize = 64;

/// Pause before an address that could not be listened on is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// How many endpoints this node has, for load balancers that share by it.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

type Checks = Arc<BTreeMap<u16, HealthCheck>>;

/// Answers at the health check ports of the services in view, on this node's own addresses, until `stop`.
/// Where it cannot, `unanswered` is told, for `meshctl status`.
///
/// # Errors
///
/// If the view is gone; what cannot be listened on is logged, and tried again.
pub async fn keep_health_checks(
    mut views: watch::Receiver<Option<Arc<View>>>,
    unanswered: watch::Sender<Vec<String>>,
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
        let Wanted { at: wanted, beyond } =
            view.map_or_else(Wanted::default, |view| addresses(&view, &checks));
        tell.send_replace(Arc::clone(&checks));
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
        unanswered.send_replace(said(&problems, &beyond, &checks));
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

/// Where to listen, and where there is no room for it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Wanted {
    at: BTreeSet<SocketAddr>,
    beyond: Vec<SocketAddr>,
}

/// At this node's own addresses, as for node ports.
fn addresses(view: &View, checks: &BTreeMap<u16, HealthCheck>) -> Wanted {
    let own = view.snapshot.nodes.get(&view.node);
    let own: Vec<_> = own
        .into_iter()
        .flat_map(|own| own.own_addresses())
        .collect();
    let ports = checks.keys();
    let mut all = ports.flat_map(|&port| own.iter().map(move |&ip| SocketAddr::new(ip, port)));
    Wanted {
        at: all.by_ref().take(LISTENERS_MAX).collect(),
        beyond: all.collect(),
    }
}

/// Where nobody answers, in words: what the kernel refused, and what there is no room for.
fn said(
    refused: &BTreeMap<SocketAddr, String>,
    beyond: &[SocketAddr],
    checks: &BTreeMap<u16, HealthCheck>,
) -> Vec<String> {
    let refused = refused.iter().map(|(&at, why)| (at, why.clone()));
    let no_room =
        format!("{LISTENERS_MAX} others are listened on already, which is all that may be");
    let beyond = beyond.iter().map(|&at| (at, no_room.clone()));
    let mut all = refused.chain(beyond);
    let line = |(at, why): (SocketAddr, String)| {
        let check = checks.get(&at.port())?;
        let ServiceName { namespace, name } = &check.service;
        Some(format!(
            "health checks of service {namespace}/{name} are not answered at {at}: {why}"
        ))
    };
    let mut lines: Vec<_> = all.by_ref().take(SAID_MAX).filter_map(line).collect();
    let others = all.count();
    if others > 0 {
        lines.push(format!(
            "health checks of services are not answered at {others} more addresses either"
        ));
    }
    lines
}

/// Answers whatever is asked for. A service that is gone meanwhile has nothing here.
async fn serve(
    listener: TcpListener,
    port: u16,
    told: watch::Receiver<Checks>,
    connections: Arc<Semaphore>,
) {
    let answer = move |_request| ready(respond(told.borrow().get(&port)));
    http::serve(listener, connections, answer).await;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn checks(ports: std::ops::Range<u16>) -> BTreeMap<u16, HealthCheck> {
        let check = |port: u16| HealthCheck {
            service: ServiceName {
                namespace: "shop".to_owned(),
                name: format!("kiosk-{port}"),
            },
            local_endpoints: 1,
        };
        ports.map(|port| (port, check(port))).collect()
    }

    fn at(port: u16) -> SocketAddr {
        ([192, 168, 7, 1], port).into()
    }

    #[test]
    fn what_the_kernel_refused_is_said_with_its_service_and_the_reason() {
        let refused = BTreeMap::from([(at(30_090), "Address already in use".to_owned())]);
        let lines = said(&refused, &[], &checks(30_090..30_091));
        let expected = "health checks of service shop/kiosk-30090 are not answered at 192.168.7.1:30090: Address \
                        already in use";
        assert_eq!(lines, [expected]);
        assert!(said(&BTreeMap::new(), &[], &checks(1..2)).is_empty());
    }

    #[test]
    fn of_many_that_have_no_room_the_first_are_said_and_the_others_counted() {
        let beyond: Vec<_> = (100..200).map(at).collect();
        let lines = said(&BTreeMap::new(), &beyond, &checks(100..200));
        assert_eq!(lines.len(), SAID_MAX + 1);
        assert!(lines[0].contains("shop/kiosk-100 ") && lines[0].contains("1024 others"));
        assert!(lines[SAID_MAX].contains(" 92 more addresses"));
    }
}
