//! Holdfast's tables, from the snapshot to the kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    num::NonZeroU32,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use ebpf_loader::{Backends, Clients, Frontend, LinkHeader, Services};
use mesh_agent::{interfaces::forwards, publish, redirect::redirects};
use mesh_core::{
    pattern::NamePattern,
    services::{Table, View},
    snapshot::{
        Endpoint, EndpointPort, EndpointSlice, MeshSettings, Protocol, Service, ServiceKind,
        ServiceName, ServicePort, Snapshot,
    },
};
use mesh_linux::{IfIndex, netlink::Netlink};
use mesh_wire::id::{MeshId, NodeName};
use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
use serde_json::json;
use tokio::runtime::Builder;

/// Nodes over which the endpoints of [`change`] are spread.
const NODES: usize = 1_000;

/// What the services of [`change`] lead to.
const PORT: u16 = 8080;

/// Interfaces of this network namespace, by name.
#[derive(Debug, Default)]
pub(crate) struct Places {
    /// What comes in by them is looked at.
    pub(crate) served: Vec<String>,
    /// Packets between them are redirected.
    pub(crate) pods: Vec<String>,
    /// Connections to these endpoints go past TCP.
    pub(crate) sockmap: BTreeSet<SocketAddr>,
}

/// Fills the maps from a file and serves the processes of `cgroup`, and the interfaces, until killed. Says on standard
/// output `load_ns`, from nothing until all of it is there, and `map_memory_bytes`.
///
/// # Errors
///
/// If the file does not say it, or the kernel does not take it.
pub(crate) fn hold(cgroup: &Path, table: &Path, places: &Places) -> Result<()> {
    let text = fs::read_to_string(table).with_context(|| format!("read {}", table.display()))?;
    let desired: BTreeMap<_, _> = text
        .lines()
        .map(|line| frontend(line).with_context(|| format!("{}: {line}", table.display())))
        .collect::<Result<_>>()?;
    let began = Instant::now();
    let packets = !places.served.is_empty() || !places.pods.is_empty();
    let services = match packets {
        true => Services::load_with_packets(cgroup)?,
        false => Services::load(cgroup)?,
    };
    let mut services = filled(services, &desired)?;
    for name in &places.served {
        services.attach_interface(index(name)?, LinkHeader::Ethernet)?;
    }
    if !places.pods.is_empty() {
        redirect(&mut services, places)?;
    }
    let pairs = desired.iter().flat_map(|(frontend, backends)| {
        let here = backends.endpoints.iter();
        let here = here.filter(|endpoint| places.sockmap.contains(endpoint));
        here.map(|&endpoint| (*frontend, endpoint))
    });
    let pairs = pairs.filter(|(frontend, _)| frontend.protocol == ebpf_loader::Protocol::Tcp);
    ensure!(
        services.use_sockmap(&pairs.collect())? == 0,
        "too many endpoints"
    );
    let load_ns = nanoseconds(began.elapsed())?;
    println!(
        "{}",
        json!({"load_ns": load_ns, "map_memory_bytes": map_memory_bytes()?})
    );
    loop {
        thread::park(); // It may also return by itself.
        ensure!(services.counters().is_ok(), "the maps are gone");
    }
}

/// As the agent does.
fn redirect(services: &mut Services, places: &Places) -> Result<()> {
    let runtime = Builder::new_current_thread().enable_io().build()?;
    let forwarding = runtime.block_on(async {
        let forwarding = Netlink::connect()?.forwarding().await?;
        anyhow::Ok(forwarding)
    })?;
    let pods = places.pods.iter().cloned().map(NamePattern::new);
    let devices = places.served.iter().map(|name| Ok(IfIndex(index(name)?)));
    let devices = devices.collect::<Result<_>>()?;
    let found = redirects(&forwarding, &pods.collect(), &devices, None, forwards);
    ensure!(found.problems.is_empty(), "{:?}", found.problems);
    let report = services.redirect(&found.redirects)?;
    ensure!(
        report.failed.is_empty() && report.left_out == 0,
        "{report:?}"
    );
    Ok(())
}

/// `tcp 10.96.0.1:80 10.244.2.1:8080 10.244.2.2:8080`.
fn frontend(line: &str) -> Result<(Frontend, Backends)> {
    let mut words = line.split(' ');
    let protocol = match words.next() {
        Some("tcp") => ebpf_loader::Protocol::Tcp,
        Some("udp") => ebpf_loader::Protocol::Udp,
        _ => bail!("neither tcp nor udp"),
    };
    let asked: SocketAddr = words.next().context("no address")?.parse()?;
    let endpoints = words.map(str::parse);
    let endpoints: Vec<SocketAddr> = endpoints.collect::<Result<_, _>>()?;
    let frontend = Frontend {
        clients: Clients::All,
        address: asked.ip(),
        port: asked.port(),
        protocol,
    };
    Ok((frontend, endpoints.into()))
}

/// All of it is written, or it is an error.
fn filled(mut services: Services, desired: &BTreeMap<Frontend, Backends>) -> Result<Services> {
    let report = services.apply(desired)?;
    ensure!(
        report.written == desired.len() && report.left_out == <_>::default(),
        "{} frontends, and {report:?}",
        desired.len()
    );
    Ok(services)
}

fn index(interface: &str) -> Result<NonZeroU32> {
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let index = netdevice::name_to_index(socket, interface);
    let index = index.with_context(|| format!("interface {interface}"))?;
    NonZeroU32::new(index).context("an interface with index 0")
}

/// What the maps of this process take, as the kernel accounts it.
fn map_memory_bytes() -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir("/proc/self/fdinfo")? {
        // The folder's own descriptor is gone by the time it is read.
        let info = fs::read_to_string(entry?.path()).unwrap_or_default();
        if info.lines().any(|line| line.starts_with("map_id:")) {
            let memory = info.lines().find_map(|line| line.strip_prefix("memlock:"));
            let memory = memory.context("a map that takes no memory")?;
            sum += memory.trim().parse::<u64>()?;
        }
    }
    Ok(sum)
}

/// How many services there are, and how many endpoints each has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub(crate) services: usize,
    pub(crate) endpoints: usize,
}

/// Changes one endpoint of one service at a time: it is ready, or it is not any more. Says on standard output
/// `load_ns`, from nothing until all of it is in the maps; `change_ns`, each from the changed snapshot until the
/// maps are as it says; and `map_memory_bytes`, of all maps, those of the packet level too.
///
/// # Errors
///
/// If the kernel does not take it, or a change is not exactly one.
pub(crate) fn change(cgroup: &Path, size: Size, changes: usize) -> Result<()> {
    ensure!(size.services > 0 && size.endpoints > 1, "no services");
    let mut snapshot = snapshot(size)?;
    let began = Instant::now();
    let mut services = Services::load_with_packets(cgroup)?;
    let mut followed = Table::default();
    let mut before = view(&snapshot)?;
    let report = publish::update(&mut followed, &before, &mut services)?;
    ensure!(
        report.written == size.services && report.left_out == <_>::default(),
        "{} services, and {report:?}",
        size.services
    );
    let load_ns = nanoseconds(began.elapsed())?;
    let mut change_ns = Vec::with_capacity(changes);
    for number in 0..changes {
        // Another service each time, and later back again.
        let service = number / 2 * size.services.div_ceil(changes) % size.services;
        let slices = snapshot.slices.get_mut(&name(service));
        let slice = slices.and_then(|slices| slices.values_mut().next());
        let endpoint = slice.and_then(|slice| Arc::make_mut(slice).endpoints.first_mut());
        let endpoint = endpoint.context("no endpoint to change")?;
        endpoint.ready = !endpoint.ready;
        let view = view(&snapshot)?;
        let began = Instant::now();
        let report = publish::update(&mut followed, &view, &mut services)?;
        change_ns.push(nanoseconds(began.elapsed())?);
        // The maps do not wait for the old snapshot to be freed.
        drop(std::mem::replace(&mut before, view));
        ensure!(
            (report.written, report.removed) == (1, 0),
            "one endpoint changed, and {report:?}"
        );
    }
    let said = json!({
        "load_ns": load_ns,
        "change_ns": change_ns,
        "map_memory_bytes": map_memory_bytes()?,
    });
    println!("{said}");
    Ok(())
}

fn nanoseconds(time: Duration) -> Result<u64> {
    Ok(u64::try_from(time.as_nanos())?)
}

/// The node asks from nowhere in particular, so that every endpoint is in the maps.
fn view(snapshot: &Snapshot) -> Result<Arc<View>> {
    let view = View::new(Arc::new(snapshot.clone()), node(0)?);
    Ok(Arc::new(view))
}

fn node(number: usize) -> Result<NodeName> {
    Ok(format!("node-{number}").parse()?)
}

fn name(number: usize) -> ServiceName {
    ServiceName {
        namespace: format!("team-{}", number % 100),
        name: format!("service-{number}"),
    }
}

fn snapshot(size: Size) -> Result<Snapshot> {
    let mesh = MeshSettings::with_defaults(MeshId([1; 32]), "bench");
    let mut snapshot = Snapshot::empty(mesh);
    for number in 0..size.services {
        let address = u32::from_be_bytes([10, 96, 0, 0]) + u32::try_from(number)?;
        let kind = ServiceKind::ClusterIp(vec![std::net::Ipv4Addr::from(address).into()]);
        let mut service = Service::new(name(number), kind);
        service.ports.push(ServicePort {
            name: "http".to_owned(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: None,
        });
        let numbers = number * size.endpoints..(number + 1) * size.endpoints;
        let slice = EndpointSlice {
            name: format!("service-{number}-1"),
            ports: vec![EndpointPort {
                name: "http".to_owned(),
                protocol: Protocol::Tcp,
                port: PORT,
            }],
            endpoints: numbers.map(endpoint).collect::<Result<_>>()?,
        };
        let slices = BTreeMap::from([(slice.name.clone(), slice.into())]);
        snapshot.slices.insert(name(number), slices);
        snapshot.services.insert(name(number), service.into());
    }
    Ok(snapshot)
}

fn endpoint(number: usize) -> Result<Endpoint> {
    let address = u32::from_be_bytes([10, 128, 0, 0]) + u32::try_from(number)?;
    Ok(Endpoint::new(
        std::net::Ipv4Addr::from(address).into(),
        Some(node(1 + number % NODES)?),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_frontend_with_its_endpoints() {
        let (frontend, backends) =
            frontend("udp 10.96.0.1:53 10.244.2.1:8080 10.244.2.2:8080").unwrap();
        let said = (frontend.address, frontend.port, frontend.protocol);
        let address = [10, 96, 0, 1].into();
        assert_eq!(said, (address, 53, ebpf_loader::Protocol::Udp));
        assert_eq!(backends.endpoints.len(), 2);
        for wrong in ["", "tcp", "sctp 10.96.0.1:53", "tcp 10.96.0.1:53 nobody"] {
            assert!(super::frontend(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_endpoint_of_the_snapshot_is_in_the_table() {
        let size = Size {
            services: 3,
            endpoints: 4,
        };
        let mut snapshot = snapshot(size).unwrap();
        let endpoints = |snapshot: &Snapshot| -> usize {
            let table = mesh_core::services::table(&view(snapshot).unwrap());
            table
                .values()
                .map(|backends| backends.endpoints.len())
                .sum()
        };
        assert_eq!(endpoints(&snapshot), 12);
        let slices = snapshot.slices.get_mut(&name(1)).unwrap();
        let slice = slices.values_mut().next().unwrap();
        Arc::make_mut(slice).endpoints[0].ready = false;
        assert_eq!(endpoints(&snapshot), 11);
    }
}
