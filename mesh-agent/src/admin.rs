//! The admin socket: what `meshctl` asks this agent.

mod diagnosis;
mod dns;
mod explain;
mod kernel;
mod keys;
pub(crate) mod operators;
mod ping;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64},
    time::Instant,
};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use ebpf_loader::{Services, fill::FlowCounts};
use futures_util::{Stream, stream};
use mesh_api::{
    admin::{
        BpfRequest, BpfResponse, DnsCacheRequest, DnsCacheResponse, DnsFlushRequest,
        DnsFlushResponse, DnsQueryRequest, DnsQueryResponse, DnsStatusRequest, DnsStatusResponse,
        DropsRequest, DropsResponse, EventsRequest, EventsResponse, ExplainPolicyRequest,
        ExplainPolicyResponse, FactsRequest, FactsResponse, Health, KeysRequest, KeysResponse,
        PathWhyRequest, PathWhyResponse, PeersRequest, PeersResponse, PingRequest, PingResponse,
        RotateKeyRequest, RotateKeyResponse, RouteRequest, RouteResponse, ServicesRequest,
        ServicesResponse, SnapshotsRequest, SnapshotsResponse, StatusRequest, StatusResponse,
        TraceRequest, TraceResponse, agent_admin_server::AgentAdmin,
    },
    serve::AdminSocket,
};
use mesh_core::{
    node::report::PathWish,
    offline::{Version, limit::Standing},
    pattern::NamePattern,
    snapshot::{Node, Snapshot},
};
use mesh_daemon::metrics::Page;
use mesh_dns::{client, inspect::Inspector};
use mesh_identity::credentials::Credentials;
use mesh_wire::id::NodeId;
use tokio::{
    sync::{Semaphore, mpsc, watch},
    task,
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, transport::Server};

use self::{operators::Door, ping::PingPlan};
use crate::{
    driver::{Driver, DriverHandle},
    interfaces::AllServed,
    mapping::{self, Mapper},
    metrics,
    policy::{self, Enforcer},
    portmap,
    proxy::Proxy,
    report,
    sync::{Connection, Rotation},
};

/// The admin service of this agent.
#[derive(Debug, Clone)]
pub struct Admin {
    driver: DriverHandle,
    facts: Facts,
    connection: watch::Receiver<Connection>,
    socket: PathBuf,
    /// Of maps that are counted for Prometheus.
    flow_counts: Arc<Mutex<FlowCounts>>,
    /// Turns of pings by a certain path.
    via_pings: Arc<Semaphore>,
}

/// What the driver does not know.
#[derive(Debug, Clone)]
pub struct Facts {
    /// When it started.
    pub started: Instant,
    /// Name of the TUN device.
    pub interface: String,
    /// What tells of the resolver.
    pub dns: Inspector,
    /// The credentials in force.
    pub credentials: Arc<ArcSwap<Credentials>>,
    /// Events of the packet path that found the driver's queue full.
    pub events_dropped: Arc<AtomicU64>,
    /// The service programs.
    pub services: Option<Arc<Mutex<Services>>>,
    /// Why they end with this process, if they do.
    pub services_unkept: Option<String>,
    /// What is enforced of the mesh's policies.
    pub enforcer: Arc<Mutex<Enforcer>>,
    /// What maps LAN subnets.
    pub mapper: Arc<Mutex<Mapper>>,
    /// Interfaces whose devices use services through this node.
    pub served: watch::Receiver<AllServed>,
    /// Where health checks of services are not answered that should be.
    pub health_checks: watch::Receiver<Vec<String>>,
    /// Default gateways that were asked to map the node's port.
    pub port_mappings: watch::Receiver<portmap::Reports>,
    /// What became of announcements on the LAN.
    pub lan_announcements: watch::Receiver<BTreeMap<String, u64>>,
    /// What became of asking neighbours for the state of the mesh.
    pub exchanges: watch::Receiver<BTreeMap<String, u64>>,
    /// How long that state counts.
    pub standing: watch::Receiver<Standing>,
    /// Which state that is.
    pub version: watch::Receiver<Version>,
    /// The CONNECT proxy, if this node has one.
    pub proxy: Option<Proxy>,
    /// Where the node keeps what it is and knows.
    pub state_dir: PathBuf,
    /// Whether policies are enforced here if there are any (`policy`).
    pub enforces: bool,
    /// Who wants another key for the certificate, at once.
    pub rotations: mpsc::Sender<Rotation>,
    /// Nodes whose operators may look at this one.
    pub operators: Vec<NamePattern>,
}

impl Admin {
    /// For the agent behind `driver`.
    #[must_use]
    pub fn new(
        driver: DriverHandle,
        socket: PathBuf,
        facts: Facts,
        connection: watch::Receiver<Connection>,
    ) -> Self {
        Self {
            driver,
            facts,
            connection,
            socket,
            flow_counts: Arc::default(),
            via_pings: Arc::new(Semaphore::new(ping::VIA_MAX)),
        }
    }

    /// Of the desired state; 0 also where nobody knows.
    fn snapshot_age_s(&self) -> u64 {
        let validity = self.facts.credentials.load().validity();
        let age = report::snapshot_age(&self.connection.borrow(), validity);
        age.map_or(0, |age| age.as_secs())
    }

    /// Serves until `stop`.
    ///
    /// # Errors
    ///
    /// If the socket cannot be bound, or breaks.
    pub async fn serve(self, stop: CancellationToken) -> anyhow::Result<()> {
        let socket = AdminSocket::bind(&self.socket)
            .await
            .context("admin socket (`admin_socket`)")?;
        let service = Door::of_the_machine(self);
        let server = Server::builder().add_service(service);
        server
            .serve_with_incoming_shutdown(socket, stop.cancelled_owned())
            .await?;
        Ok(())
    }

    /// What Prometheus is shown. Empty when the agent is stopping, or the kernel tells nothing.
    pub async fn metrics(self) -> Page {
        let shown = async {
            let status = self.whole_status().await?;
            let DriverHandle(queue) = &self.driver;
            let events = queue.max_capacity() - queue.capacity();
            let asked = Instant::now();
            let measured = self
                .ask(move |driver| report::measured(driver, asked, events))
                .await?;
            let kernel = self.kernel_measured().await?;
            let dns = self.facts.dns.counters();
            Ok(metrics::page(&status, &measured, &kernel, dns))
        };
        shown.await.unwrap_or_else(|error: Status| {
            tracing::debug!(%error, "no metrics");
            Page::new("")
        })
    }

    async fn whole_status(&self) -> Result<StatusResponse, Status> {
        let (facts, connection) = (self.facts.clone(), self.connection.borrow().clone());
        let mut status = self
            .ask(move |driver| report::status(driver, &facts, &connection))
            .await?;
        status.service_packets = self.service_packets().await?;
        self.add_mapping(&mut status).await?;
        self.add_policy(&mut status).await?;
        Ok(status)
    }

    /// What became of the devices' packets. Beside the driver: filling the maps may hold them longer
    /// than it may wait.
    async fn service_packets(&self) -> Result<BTreeMap<String, u64>, Status> {
        let Some(services) = self.facts.services.clone() else {
            return Ok(BTreeMap::new());
        };
        let counters = task::spawn_blocking(move || {
            let services = services.lock().unwrap_or_else(PoisonError::into_inner);
            let packets = services.packet_counters();
            packets.and_then(|packets| Ok((packets, services.redirect_counters()?)))
        });
        let counters = counters
            .await
            .map_err(|error| Status::internal(error.to_string()))?;
        let (packets, redirected) = counters.map_err(|error| {
            Status::internal(format!("the kernel does not tell the counters: {error}"))
        })?;
        let packets = packets.into_iter();
        let packets = packets.map(|(counter, count)| (counter.as_str().to_owned(), count));
        let redirected = redirected.into_iter();
        let redirected =
            redirected.map(|(counter, count)| (format!("redirect_{}", counter.as_str()), count));
        let counted = packets.chain(redirected).filter(|(_, count)| *count > 0);
        Ok(counted.collect())
    }

    /// Beside the driver, as above.
    async fn add_mapping(&self, status: &mut StatusResponse) -> Result<(), Status> {
        let mapper = Arc::clone(&self.facts.mapper);
        let report = task::spawn_blocking(move || {
            let mapper = mapper.lock().unwrap_or_else(PoisonError::into_inner);
            mapper.report()
        });
        let mapping::Report { packets, problems } = report
            .await
            .map_err(|error| Status::internal(error.to_string()))?;
        if !problems.is_empty() && status.health() == Health::Ok {
            status.set_health(Health::Degraded);
        }
        status.problems.extend(problems);
        let packets = packets.into_iter();
        let packets = packets.map(|(counter, count)| (format!("mapping_{counter}"), count));
        status.service_packets.extend(packets);
        Ok(())
    }

    /// Beside the driver, as above.
    async fn add_policy(&self, status: &mut StatusResponse) -> Result<(), Status> {
        let enforcer = Arc::clone(&self.facts.enforcer);
        let report = task::spawn_blocking(move || {
            let mut enforcer = enforcer.lock().unwrap_or_else(PoisonError::into_inner);
            enforcer.report()
        });
        let policy::Report {
            enforced,
            packets,
            events,
            problems,
        } = report
            .await
            .map_err(|error| Status::internal(error.to_string()))?;
        if !problems.is_empty() && status.health() == Health::Ok {
            status.set_health(Health::Degraded);
        }
        status.problems.extend(problems);
        status.policy_enforced = enforced;
        status.policy_packets = packets;
        status.policy_events = events;
        Ok(())
    }

    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Driver) -> T + Send + 'static,
    ) -> Result<T, Status> {
        let answer = self.driver.ask(question).await;
        answer.ok_or_else(|| Status::unavailable("the agent is stopping"))
    }
}

type PingStream = std::pin::Pin<Box<dyn Stream<Item = Result<PingResponse, Status>> + Send>>;

#[tonic::async_trait]
impl AgentAdmin for Admin {
    type PingStream = PingStream;

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(self.whole_status().await?))
    }

    async fn peers(&self, _: Request<PeersRequest>) -> Result<Response<PeersResponse>, Status> {
        let peers = self.ask(|driver| report::peers(driver)).await?;
        Ok(Response::new(PeersResponse { peers }))
    }

    async fn ping(
        &self,
        request: Request<PingRequest>,
    ) -> Result<Response<Self::PingStream>, Status> {
        let request = request.into_inner();
        let (target, via) = (request.target.clone(), request.via.clone());
        let found = self.ask(move |driver| {
            let node = find_node(driver, &target)?;
            Ok::<_, Status>((node, ping::wish(driver.snapshot(), &via)?))
        });
        let found = found.await??;
        let turn = if found.1 == PathWish::InUse {
            None
        } else {
            let turn = Arc::clone(&self.via_pings).try_acquire_owned();
            Some(turn.map_err(|_| {
                Status::failed_precondition(
                    "a ping by a certain path is going on here: wait until it ends",
                )
            })?)
        };
        let plan = PingPlan::new(self.driver.clone(), found, request, turn);
        let answers = stream::unfold(plan, |mut plan| async move {
            let answer = plan.next().await?;
            Some((answer, plan))
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn path_why(
        &self,
        request: Request<PathWhyRequest>,
    ) -> Result<Response<PathWhyResponse>, Status> {
        let target = request.into_inner().node;
        let report = self
            .ask(move |driver| find_node(driver, &target).map(|id| report::path_why(driver, &id)));
        Ok(Response::new(report.await??))
    }

    async fn services(
        &self,
        _: Request<ServicesRequest>,
    ) -> Result<Response<ServicesResponse>, Status> {
        let view = self.ask(|driver| driver.view()).await?;
        let services = match view {
            Some(view) => report::services_beside(view).await,
            None => Ok(Vec::new()),
        };
        let services = services.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(ServicesResponse { services }))
    }

    async fn dns_query(
        &self,
        request: Request<DnsQueryRequest>,
    ) -> Result<Response<DnsQueryResponse>, Status> {
        let DnsQueryRequest { name, r#type } = request.into_inner();
        let Some(&server) = self.facts.dns.listen().first() else {
            return Err(Status::failed_precondition(
                "this agent serves no names (`dns.listen` is empty)",
            ));
        };
        let record_type = if r#type.is_empty() { "A" } else { &r#type };
        let reply = client::ask(server, &name, record_type)
            .await
            .map_err(dns_status)?;
        Ok(Response::new(DnsQueryResponse {
            code: reply.code,
            answers: reply.answers,
            ms: report::ms(reply.elapsed),
            server: server.to_string(),
        }))
    }

    async fn dns_status(
        &self,
        _: Request<DnsStatusRequest>,
    ) -> Result<Response<DnsStatusResponse>, Status> {
        Ok(Response::new(self.dns_status_report()))
    }

    async fn dns_cache(
        &self,
        request: Request<DnsCacheRequest>,
    ) -> Result<Response<DnsCacheResponse>, Status> {
        let report = self.dns_cache_report(request.into_inner()).await?;
        Ok(Response::new(report))
    }

    async fn dns_flush(
        &self,
        request: Request<DnsFlushRequest>,
    ) -> Result<Response<DnsFlushResponse>, Status> {
        let report = self.flush_dns(request.into_inner()).await?;
        Ok(Response::new(report))
    }

    async fn drops(&self, _: Request<DropsRequest>) -> Result<Response<DropsResponse>, Status> {
        Ok(Response::new(self.drops_report().await?))
    }

    async fn events(&self, _: Request<EventsRequest>) -> Result<Response<EventsResponse>, Status> {
        Ok(Response::new(self.events_report().await?))
    }

    async fn snapshots(
        &self,
        request: Request<SnapshotsRequest>,
    ) -> Result<Response<SnapshotsResponse>, Status> {
        let contents = request.into_inner().contents;
        Ok(Response::new(self.snapshots_report(contents).await?))
    }

    async fn trace(
        &self,
        request: Request<TraceRequest>,
    ) -> Result<Response<TraceResponse>, Status> {
        Ok(Response::new(
            self.trace_report(request.into_inner()).await?,
        ))
    }

    async fn facts(&self, _: Request<FactsRequest>) -> Result<Response<FactsResponse>, Status> {
        Ok(Response::new(self.facts_report().await?))
    }

    async fn bpf(&self, request: Request<BpfRequest>) -> Result<Response<BpfResponse>, Status> {
        let report = self.bpf_report(request.into_inner()).await?;
        Ok(Response::new(report))
    }

    async fn route(
        &self,
        request: Request<RouteRequest>,
    ) -> Result<Response<RouteResponse>, Status> {
        let report = self.route_report(request.into_inner()).await?;
        Ok(Response::new(report))
    }

    async fn explain_policy(
        &self,
        request: Request<ExplainPolicyRequest>,
    ) -> Result<Response<ExplainPolicyResponse>, Status> {
        let report = self.explain_policy_report(request.into_inner()).await?;
        Ok(Response::new(report))
    }

    async fn keys(&self, _: Request<KeysRequest>) -> Result<Response<KeysResponse>, Status> {
        Ok(Response::new(self.keys_report().await?))
    }

    async fn rotate_key(
        &self,
        request: Request<RotateKeyRequest>,
    ) -> Result<Response<RotateKeyResponse>, Status> {
        Ok(Response::new(self.rotate(request.into_inner()).await?))
    }
}

fn dns_status(error: client::AskError) -> Status {
    match error {
        client::AskError::Name(_) | client::AskError::Type(_) => {
            Status::invalid_argument(error.to_string())
        }
        client::AskError::Exchange { .. } => {
            Status::unavailable(format!("{:#}", anyhow::Error::new(error)))
        }
    }
}

/// The node with this name or overlay address.
fn node_of<'a>(snapshot: &'a Snapshot, target: &str) -> Result<&'a Node, Status> {
    let node = match target.parse() {
        Ok(address) => snapshot.node_at(address),
        Err(_) => snapshot.node_called(target),
    };
    node.ok_or_else(|| {
        Status::not_found(format!(
            "no node {target:?} in the mesh (a node's name, also as in DNS, or its overlay address)"
        ))
    })
}

/// The same, of another node.
fn find_node(driver: &Driver, target: &str) -> Result<NodeId, Status> {
    let node = node_of(driver.snapshot(), target)?;
    if driver.own().is_some_and(|own| own.id == node.id) {
        return Err(Status::invalid_argument(format!(
            "{target} is this node itself"
        )));
    }
    Ok(node.id)
}
