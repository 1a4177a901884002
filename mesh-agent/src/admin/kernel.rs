//! What the admin socket tells of the kernel: programs, maps, routes.

use std::{
    collections::BTreeSet,
    fs,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use ebpf_loader::{
    fill::{Fill, FlowCounts},
    inspect::{self, LoadedMap, LoadedProgram},
};
use mesh_api::admin::{
    BpfMap, BpfPlace, BpfProgram, BpfRequest, BpfResponse, KernelRoute, RouteRequest, RouteResponse,
};
use mesh_daemon::chain;
use mesh_linux::netlink::{Netlink, Towards};
use tokio::task;
use tonic::Status;

use super::{Admin, Facts, diagnosis::internal};
use crate::{metrics::Kernel, report, routes};

/// Whether the kernel counts how often programs run (sysctl `kernel.bpf_stats_enabled`).
const COUNTS_RUNS: &str = "/proc/sys/kernel/bpf_stats_enabled";

impl Admin {
    pub(super) async fn bpf_report(&self, request: BpfRequest) -> Result<BpfResponse, Status> {
        let facts = self.facts.clone();
        // Beside the driver, as `service_packets`; and a system call for each entry.
        let read = task::spawn_blocking(move || bpf(&facts, request.entries));
        read.await.map_err(internal)
    }

    /// What the kernel tells Prometheus beside the status. Beside the driver, as `service_packets`.
    pub(super) async fn kernel_measured(&self) -> Result<Kernel, Status> {
        let (facts, counts) = (self.facts.clone(), Arc::clone(&self.flow_counts));
        let maps = task::spawn_blocking(move || fills(&facts, &counts));
        Ok(Kernel {
            maps: maps.await.map_err(internal)?,
            sockets: self.socket_counters().await?,
        })
    }

    pub(super) async fn route_report(
        &self,
        request: RouteRequest,
    ) -> Result<RouteResponse, Status> {
        let address: IpAddr = request.address.parse().map_err(|_| {
            let text = format!("{:?} is no IPv4 or IPv6 address", request.address);
            Status::invalid_argument(text)
        })?;
        let view = self.ask(|driver| driver.view()).await?;
        let view = view.ok_or_else(|| Status::unavailable("there is no state of the mesh yet"))?;
        let mut said = routes::route(&view, &self.facts.interface, address);
        let peers = self.ask(|driver| report::peers_seen(driver)).await?;
        let peer = peers.get(said.node.as_str());
        if let Some(peer) = peer {
            peer.state.clone_into(&mut said.peer_state);
            peer.path.clone_into(&mut said.path);
            said.rtt_ms = peer.rtt_ms;
        }
        said.kernel = Some(kernel_route(address).await);
        Ok(said)
    }
}

/// How full the maps are. Nothing is held while entries are counted.
fn fills(facts: &Facts, counts: &Mutex<FlowCounts>) -> Vec<Fill> {
    let (mut fills, mut flows) = match &facts.services {
        Some(services) => {
            let services = services.lock().unwrap_or_else(PoisonError::into_inner);
            (services.fills(), services.flow_maps())
        }
        None => (Vec::new(), Vec::new()),
    };
    let of_policy = {
        let enforcer = &facts.enforcer;
        let enforcer = enforcer.lock().unwrap_or_else(PoisonError::into_inner);
        enforcer.fills()
    };
    fills.extend(of_policy.0);
    flows.extend(of_policy.1);
    let of_mapping = {
        let mapper = &facts.mapper;
        let mapper = mapper.lock().unwrap_or_else(PoisonError::into_inner);
        mapper.fills()
    };
    fills.extend(of_mapping);
    let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
    fills.extend(counts.fills(&flows));
    fills
}

fn bpf(facts: &Facts, entries: bool) -> BpfResponse {
    let services = facts.services.as_ref().map(|services| {
        let services = services.lock().unwrap_or_else(PoisonError::into_inner);
        services.programs()
    });
    let policy = {
        let enforcer = Arc::clone(&facts.enforcer);
        let enforcer = enforcer.lock().unwrap_or_else(PoisonError::into_inner);
        enforcer.loaded()
    };
    let mapping = {
        let mapper = Arc::clone(&facts.mapper);
        let mapper = mapper.lock().unwrap_or_else(PoisonError::into_inner);
        mapper.loaded()
    };
    let parts = [
        ("services", services.unwrap_or_default()),
        ("policy", policy),
        ("mapping", mapping),
    ];
    let loaded = parts
        .into_iter()
        .filter(|(_, programs)| !programs.is_empty());
    let mut said = BpfResponse {
        counts_runs: fs::read_to_string(COUNTS_RUNS).is_ok_and(|text| text.trim() == "1"),
        services_unkept: facts.services_unkept.clone().unwrap_or_default(),
        interfaces: {
            let served = facts.served.borrow();
            let served = served.iter();
            served
                .map(|(name, one)| (name.clone(), one.problem.clone().unwrap_or_default()))
                .collect()
        },
        ..BpfResponse::default()
    };
    let mut ids = BTreeSet::new();
    for (part, programs) in loaded {
        said.parts.push(part.to_owned());
        for program in programs {
            ids.extend(program.map_ids.iter().copied());
            said.programs.push(program_report(part, program));
        }
    }
    said.maps = inspect::maps(&ids, entries)
        .into_iter()
        .map(map_report)
        .collect();
    said
}

fn program_report(part: &str, program: LoadedProgram) -> BpfProgram {
    let places = program.places.into_iter().map(|place| BpfPlace {
        at: place.at.to_string(),
        attached: place.attached,
        pinned: place.pinned,
    });
    BpfProgram {
        part: part.to_owned(),
        name: program.name,
        hook: program.hook,
        id: program.id,
        tag: format!("{:016x}", program.tag),
        verified_instructions: program.verified_instructions,
        machine_bytes: program.machine_bytes,
        runs: program.runs,
        run_ns: u64::try_from(program.run_time.as_nanos()).unwrap_or(u64::MAX),
        places: places.collect(),
    }
}

fn map_report(map: LoadedMap) -> BpfMap {
    BpfMap {
        name: map.name,
        id: map.id,
        kind: map.kind.to_owned(),
        entries_max: map.entries_max,
        entries: map.entries,
        bytes: map.bytes,
    }
}

async fn kernel_route(address: IpAddr) -> KernelRoute {
    let netlink = match Netlink::connect() {
        Ok(netlink) => netlink,
        Err(error) => return problem(chain(&error)),
    };
    match netlink.towards(address).await {
        Ok(Some(towards)) => towards_report(&towards),
        Ok(None) => problem("the kernel has no route there".to_owned()),
        Err(error) => problem(chain(&error)),
    }
}

fn problem(problem: String) -> KernelRoute {
    KernelRoute {
        problem,
        ..KernelRoute::default()
    }
}

fn towards_report(towards: &Towards) -> KernelRoute {
    let text = |ip: Option<IpAddr>| ip.map(|ip| ip.to_string()).unwrap_or_default();
    KernelRoute {
        problem: String::new(),
        prefix: towards
            .prefix
            .map(|net| net.to_string())
            .unwrap_or_default(),
        interface: towards.interface.clone(),
        source: text(towards.source),
        gateway: text(towards.gateway),
        table: towards.table,
        kind: towards.kind.to_owned(),
    }
}
