//! The life of the process, from the state folder to the last task.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, bail, ensure};
use arc_swap::ArcSwap;
use ebpf_loader::{BPFFS, Pins, PinsError, Services};
use mesh_api::{
    cni::{NETWORK_FILE, POLICY_FILE},
    control::NodeReport,
};
use mesh_core::{
    io::Input,
    node::{Core, CoreConfig},
    snapshot::Snapshot,
};
use mesh_daemon::{NotifyState, metrics, supervisor::Supervisor};
use mesh_dns::{counters::Counters, server::DnsServer};
use mesh_identity::credentials::Credentials;
use mesh_linux::{
    IfIndex, memory,
    netlink::{Changes, Netlink},
    tun::Tun,
    udp::UdpPair,
};
use mesh_tunnel::{
    stats::DropReason,
    tunnel::{PrivateKey, Tunnel, TunnelConfig, Workers, super_packet_len_max},
};
use mesh_wire::id::NodeId;
use ring::rand::{SecureRandom as _, SystemRandom};
use tokio::{
    runtime,
    sync::{mpsc, watch},
    task, time,
};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::{
    admin::{Admin, Facts},
    callers, clamp,
    cni::{self, Attachments},
    config::Settings,
    desired,
    driver::{self, Driver, DriverHandle, Event},
    exchange::{self, Giver, OFFERS_QUEUED_MAX},
    health,
    interfaces::{self, AllServed, Programs, Wanted},
    links::Links,
    loads,
    mapping::{self, Mapper},
    neighbours::{self, NeighboursConfig},
    network::{self, Local},
    outliers, peer_relay,
    policy::{self, Enforcer},
    portmap::{self, PortMapConfig},
    proxy::Proxy,
    publish, report,
    state::StateFolder,
    store::remove_if_there,
    sync::{self, Sync, news::News},
    uplinks::Network,
};

/// How long the runtime waits for blocking work (a snapshot being written) at the end.
const RUNTIME_GRACE: Duration = Duration::from_secs(2);

/// How often is looked whether the node has something else to say of itself.
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// How often the clock is looked at: sooner than a call is given up.
const CLOCK_EVERY: Duration = Duration::from_secs(15);

/// A desired state that stays so long is no longer one of many changes: what taking it needed will not be needed
/// again at once. With 1,000 services that is a fifth of all memory.
const QUIET: Duration = Duration::from_secs(10);

/// Runs the agent until it is told to stop.
///
/// # Errors
///
/// What made it stop early, with what was attempted.
pub fn run(settings: Settings) -> anyhow::Result<()> {
    let state = Arc::new(StateFolder::open(&settings.state_dir)?);
    make_folder_of("admin_socket", &settings.admin_socket)?;
    let proxy = settings.proxy.as_ref();
    if let Some(socket) = proxy.and_then(|proxy| proxy.socket.as_deref()) {
        make_folder_of("[proxy] socket", socket)?;
    }
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let result = runtime.block_on(async {
        let stop = CancellationToken::new();
        let mut supervisor = Supervisor::new(stop.clone());
        supervisor.stop_on_signal()?;
        let ended = supervisor.task_ended();
        let started = tokio::select! {
            started = start(settings, state, &mut supervisor, stop.clone()) => started,
            () = stop.cancelled() => return Ok(()),
            // The first snapshot is waited for as long as it takes: who fetches it has to be there.
            () = ended => return supervisor.run().await,
        };
        let running = started?;
        // The programs and the snapshot were parsed; what that took is not needed again.
        memory::give_back();
        mesh_daemon::notify(NotifyState::Ready);
        let result = supervisor.run().await;
        running.end().await;
        result
    });
    runtime.shutdown_timeout(RUNTIME_GRACE);
    result
}

/// Makes the folder of the socket that `key` of the configuration names, in one that is there: so `/run/holdfast` is made in `/run`,
/// and nothing where a path is mistyped.
fn make_folder_of(key: &str, socket: &Path) -> anyhow::Result<()> {
    let Some(folder) = socket.parent().filter(|folder| *folder != Path::new("")) else {
        return Ok(());
    };
    let above = folder.parent().unwrap_or(folder).display();
    match fs::create_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => bail!(
            "`{key}` is {}, and there is no folder {above}: make it, or correct the path",
            socket.display()
        ),
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error)
            .with_context(|| format!("cannot make the folder {} of `{key}`", folder.display())),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Gives back memory when the desired state has stayed as it is for [`QUIET`]: first after the start, then after each change.
async fn settle(
    mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let settling = async {
        loop {
            while let Ok(Ok(())) = time::timeout(QUIET, snapshots.changed()).await {}
            task::spawn_blocking(memory::give_back).await?;
            if snapshots.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    };
    tokio::select! {
        () = stop.cancelled() => Ok(()),
        ended = settling => ended,
    }
}

/// Takes away what outlives an agent on purpose: the programs of services and of policy at pods, and their maps. The
/// device, with its addresses and routes, went with the process.
///
/// # Errors
///
/// If an agent runs, or with all that could not be taken away.
pub fn remove(settings: &Settings) -> anyhow::Result<()> {
    remove_pins(Pins::of_policy(Path::new(BPFFS))).context("cannot remove the policies")?;
    clamp::remove().context("cannot remove the table of TCP's segment sizes")?;
    if let Some(folder) = &settings.cni {
        // Before the next agent there is nothing that new pods would have to be guarded by.
        let path = folder.join(POLICY_FILE);
        remove_if_there(&path).with_context(|| format!("remove {}", path.display()))?;
    }
    remove_services(settings)
}

fn remove_services(settings: &Settings) -> anyhow::Result<()> {
    let pins = Pins::open(Path::new(BPFFS), &cgroup(settings)?);
    remove_pins(pins).context("cannot remove the services")
}

fn remove_pins(pins: Result<Pins, PinsError>) -> anyhow::Result<()> {
    let pins = match pins {
        Err(error @ PinsError::NotMounted(_)) => {
            tracing::info!(%error, "nothing outlived the agent");
            return Ok(());
        }
        other => other?,
    };
    let problems = pins.remove().into_iter();
    let problems: Vec<_> = problems
        .map(|problem| mesh_daemon::chain(&problem))
        .collect();
    ensure!(problems.is_empty(), "{}", problems.join("; "));
    Ok(())
}

/// Takes away everything that agents left on this node: what [`remove`] does, and what they keep in the state folder.
///
/// # Errors
///
/// If an agent runs, or with what could not be taken away.
pub fn purge(settings: &Settings) -> anyhow::Result<()> {
    let state = StateFolder::open(&settings.state_dir)?;
    remove(settings)?;
    let files = [settings.admin_socket.clone()];
    let network = settings.cni.iter().map(|folder| folder.join(NETWORK_FILE));
    for path in files.into_iter().chain(network) {
        remove_if_there(&path).with_context(|| format!("remove {}", path.display()))?;
    }
    Ok(state.purge()?)
}

/// Waits for SIGTERM or SIGINT.
///
/// # Errors
///
/// If signals cannot be waited for.
pub fn stay() -> anyhow::Result<()> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut supervisor = Supervisor::new(CancellationToken::new());
        supervisor.stop_on_signal()?;
        supervisor.run().await
    })
}

/// What must be ended in order once the tasks are gone.
struct Running {
    workers: Workers,
    dns: DnsServer,
    services: Option<Arc<Mutex<Services>>>,
}

impl Running {
    /// The programs, but for those that stay; then the names, then the device with its routes.
    async fn end(self) {
        drop(self.services);
        self.dns.stopped().await;
        self.workers.stop();
    }
}

async fn start(
    settings: Settings,
    state: Arc<StateFolder>,
    supervisor: &mut Supervisor,
    stop: CancellationToken,
) -> anyhow::Result<Running> {
    let started = Instant::now();
    let key = wireguard_key(&state)?;
    let id = key.node_id();
    let (reports, report) = watch::channel(NodeReport::default());
    let (unknowns, unknown) = watch::channel(0);
    let netlink = Netlink::connect().context("cannot talk to the kernel by netlink")?;
    // The core will say what is used; until then what it will most likely say.
    let network = network::read(&netlink, &settings).await?;
    let likely = network.as_ref().map_or_else(Vec::new, Network::ways);
    let (ways, way) = watch::channel(likely.first().cloned().unwrap_or_default());
    let (news, heard) = News::new();
    let (sync, snapshots) = Sync::open(
        &settings,
        Arc::clone(&state),
        id,
        (report, unknown),
        way.clone(),
        heard,
        &netlink,
    )
    .await?;
    let credentials = sync.credentials();
    let connection = sync.connection();
    let desired = sync.desired();
    let rotations = sync.rotations();
    let (standing, version) = {
        let desired = desired.lock().await;
        (desired.standing(), desired.version())
    };
    supervisor.spawn(
        "limit",
        desired::keep_limit(Arc::clone(&desired), stop.clone()),
    );
    supervisor.spawn("sync", sync.run(stop.clone()));
    let snapshot = tokio::select! {
        found = sync::wait_for_node(snapshots.clone(), &settings.node_name) => found?,
        never = network::try_each(&likely, &ways) => match never {},
    };
    let own = snapshot
        .nodes
        .get(&settings.node_name)
        .context("the snapshot lost this node while it was read")?;

    let changes = Changes::listen().context("cannot listen for changes of the network")?;
    let tun = Tun::create(&settings.interface, settings.packet_threads)?;
    let interface = (tun.index(), settings.interface.clone());
    let local = Local {
        dns: link_local(&settings.dns.listen),
        serves_devices: !settings.service_interfaces.is_empty(),
    };
    let pins = Pins::of_policy(Path::new(BPFFS));
    if let Some(problem) = policy::unkept(settings.policy, &pins) {
        tracing::warn!(%problem, "policies will end with this process");
    }
    let node = settings.node_name.clone();
    let mut enforcer = Enforcer::new(node, interface.0, settings.policy, pins.ok())
        .telling(settings.cni.as_deref());
    // Before the device is up: nobody comes in unjudged.
    enforcer
        .take(&snapshot)
        .context("cannot enforce the mesh's policies (`policy = false`: this node never does)")?;
    let enforcer = Arc::new(Mutex::new(enforcer));
    // Before the device is up: nobody comes in by an address that means nothing here.
    let mut mapper = Mapper::new(settings.node_name.clone(), interface.0);
    mapper.take(&snapshot);
    let mapper = Arc::new(Mutex::new(mapper));
    if let Some(folder) = &settings.cni {
        let network = cni::network(&snapshot, &settings.node_name, &settings.interface);
        if let Err(error) = cni::publish(folder, network.as_ref()) {
            tracing::warn!(folder = %folder.display(), %error, "cannot tell the CNI plug-in the pods' ranges");
        }
    }
    let attachments = settings.cni.as_deref().map(Attachments::follow);
    let attachments = attachments.transpose()?;
    if let Some(attachments) = attachments.clone() {
        let keeper = desired::keep_pods(Arc::clone(&desired), attachments, stop.clone());
        supervisor.spawn("pods", keeper);
    }
    let wanted = Wanted {
        names: settings.service_interfaces.clone(),
        pods: settings.pod_interfaces.clone(),
        attachments,
    };
    if wanted.has_pods() {
        let (pods, _) = wanted.pods_now();
        interfaces::guard_pods(&enforcer, &netlink, &pods, interface.0).await?;
    }
    prepare_device(&netlink, &interface, &snapshot, &settings, &local).await?;
    let sockets = UdpPair::bind_many(settings.listen_port, settings.packet_threads);
    let sockets = sockets.with_context(|| {
        format!(
            "cannot bind UDP port {} (`listen_port`)",
            settings.listen_port
        )
    })?;
    let (events, event_queue) = mpsc::channel(driver::EVENTS_MAX);
    let config = TunnelConfig {
        private_key: key,
        overlay_v6: own.overlay_v6,
        bursts: settings.hard_nat_bursts,
    };
    let to_driver = events.clone();
    let events_dropped = Arc::new(AtomicU64::new(0));
    let dropped = Arc::clone(&events_dropped);
    let on_event = move |event| {
        // Whoever sent the packet behind a dropped event sends it again.
        if to_driver.try_send(Event::Tunnel(event)).is_err() {
            dropped.fetch_add(1, Ordering::Relaxed);
        }
    };
    let (tunnel, workers) = Tunnel::start(tun, sockets, config, on_event)?;
    tunnel.set_mtu(snapshot.mesh.mtu_bytes);

    let (views, view) = watch::channel(None);
    let (remembered, to_remember) = watch::channel(state.remembered());
    let links = Links::start(
        events.clone(),
        tunnel.clone(),
        Arc::clone(&credentials),
        settings.https_proxy.clone(),
        stop.clone(),
    )?;
    let core = Core::new(
        CoreConfig {
            node: settings.node_name.clone(),
            id,
            remembered: to_remember.borrow().clone(),
            bursts: settings.hard_nat_bursts,
        },
        rand::random(),
        driver::now(),
    );
    let Loaded {
        services,
        problem: services_unkept,
    } = load_services(&settings)?;
    if let Some(services) = &services {
        let mut enforcer = enforcer.lock().unwrap_or_else(PoisonError::into_inner);
        enforcer.judge_sockets(Arc::clone(services));
    }
    let driver = Driver::new(driver::Parts {
        core,
        tunnel,
        links,
        node: settings.node_name.clone(),
        static_candidates: settings.static_candidates.clone(),
        snapshot,
        views,
        remembered,
        ways,
        news,
        network: network::read(&netlink, &settings).await?,
    });
    let settling = settle(snapshots.clone(), stop.clone());
    supervisor.spawn("memory", settling);
    supervisor.spawn("driver", driver.run(event_queue, snapshots, stop.clone()));
    let clock = keep_clock(events.clone(), Arc::clone(&credentials), stop.clone());
    supervisor.spawn("clock", clock);
    let (published, filled) = watch::channel(false);
    if let Some(services) = &services {
        let services = Arc::clone(services);
        let publisher = publish::keep_services(services, view.clone(), published, stop.clone());
        supervisor.spawn("services", publisher);
    }
    let (unanswered, health_checks) = watch::channel(Vec::new());
    if services.is_some() {
        let checks = health::keep_health_checks(view.clone(), unanswered, stop.clone());
        supervisor.spawn("health checks", checks);
    }
    if let Some(services) = &services {
        let driver = DriverHandle(events.clone());
        let keeper = outliers::keep_outliers(Arc::clone(services), driver, stop.clone());
        supervisor.spawn("outliers", keeper);
        let driver = DriverHandle(events.clone());
        let services = Arc::clone(services);
        let keeper = loads::keep_loads(services, view.clone(), driver, stop.clone());
        supervisor.spawn("loads", keeper);
    }
    let keeper = policy::keep_policy(Arc::clone(&enforcer), view.clone(), stop.clone());
    supervisor.spawn("policy", keeper);
    let keeper = mapping::keep_mapping(Arc::clone(&mapper), view.clone(), stop.clone());
    supervisor.spawn("mapping", keeper);
    if let Some(folder) = settings.cni {
        let keeper = cni::keep_network(folder, interface.1.clone(), view.clone(), stop.clone());
        supervisor.spawn("cni", keeper);
    }
    let (told, served) = watch::channel(AllServed::default());
    if let Some(services) = services.as_ref().filter(|_| !wanted.is_empty()) {
        let changes = Changes::listen().context("cannot listen for changes of the network")?;
        let keeper = interfaces::keep_interfaces(
            Programs {
                services: Arc::clone(services),
                enforcer: Arc::clone(&enforcer),
            },
            interface.clone(),
            wanted,
            netlink.clone(),
            changes,
            told,
            stop.clone(),
        );
        let keeper = after(filled, keeper, stop.clone());
        supervisor.spawn("interfaces", keeper);
    }
    let keeper = peer_relay::keep_peer_relay(
        settings.node_name.clone(),
        Arc::clone(&credentials),
        view.clone(),
        stop.clone(),
    );
    supervisor.spawn("peer relay", keeper);
    let keeper = clamp::keep_clamped(
        interface.1.clone(),
        local.clone(),
        view.clone(),
        stop.clone(),
    );
    supervisor.spawn("segment size", keeper);
    let kernel = network::keep_kernel(
        netlink.clone(),
        Changes::listen().context("cannot listen for changes of the network")?,
        interface,
        local,
        view.clone(),
        stop.clone(),
    );
    supervisor.spawn("kernel", kernel);
    let (mapped, port_mappings) = watch::channel(portmap::Reports::new());
    if settings.port_mapping {
        let config = PortMapConfig {
            port: settings.listen_port,
            interface: settings.interface.clone(),
            uplinks: settings.uplinks.clone(),
        };
        let keeper = portmap::keep_mapped(
            netlink.clone(),
            Changes::listen().context("cannot listen for changes of the network")?,
            config,
            events.clone(),
            mapped,
            stop.clone(),
        );
        supervisor.spawn("port mapping", keeper);
    }
    let (counts, lan_announcements) = watch::channel(BTreeMap::new());
    let (exchanged, exchanges) = watch::channel(BTreeMap::new());
    if settings.lan_discovery {
        let giver = Giver::new(Arc::clone(&desired), Arc::clone(&credentials));
        let (offers, offered) = mpsc::channel(OFFERS_QUEUED_MAX);
        let keeper = exchange::keep_exchange(
            giver.clone(),
            offered,
            connection.clone(),
            exchanged,
            stop.clone(),
        );
        supervisor.spawn("exchange", keeper);
        let config = NeighboursConfig {
            version: version.clone(),
            giver,
            offers,
            node: settings.node_name.clone(),
            id,
            port: settings.listen_port,
            interface: settings.interface.clone(),
            uplinks: settings.uplinks.clone(),
            pods: settings.pod_interfaces.clone(),
            credentials: Arc::clone(&credentials),
        };
        let keeper = neighbours::keep_neighbours(
            netlink.clone(),
            Changes::listen().context("cannot listen for changes of the network")?,
            config,
            view.clone(),
            events.clone(),
            counts,
            stop.clone(),
        );
        supervisor.spawn("neighbours", keeper);
    }
    let uplinks = network::watch_uplinks(
        netlink,
        changes,
        settings.interface.clone(),
        settings.listen_port,
        settings.uplinks.clone(),
        events.clone(),
        stop.clone(),
    );
    supervisor.spawn("uplinks", uplinks);
    supervisor.spawn("remember", remember(state, to_remember, stop.clone()));

    let (callers, denied) = watch::channel(None);
    if settings.dns.leave_out_denied {
        let node = settings.node_name.clone();
        let keeper = callers::keep_callers(node, view.clone(), callers, stop.clone());
        supervisor.spawn("callers", keeper);
    }
    let (dns_view, upstream_view) = (view.clone(), view.clone());
    let dns = DnsServer::start(
        settings.dns,
        move || dns_view.borrow().clone(),
        move || denied.borrow().clone(),
        move |to| {
            let view = upstream_view.borrow();
            let snapshot = view.as_ref().map(|view| &*view.snapshot);
            way.borrow().device(to, snapshot)
        },
        stop.clone(),
    )
    .await?;
    let reporter = keep_report(
        DriverHandle(events.clone()),
        Arc::clone(dns.counters()),
        (reports, unknowns),
        stop.clone(),
    );
    supervisor.spawn("report", reporter);
    let proxy = settings.proxy.map(|settings| {
        let driver = DriverHandle(events.clone());
        let (proxy, serve) = Proxy::new(settings, view.clone(), driver, stop.clone());
        supervisor.spawn("proxy", serve);
        proxy
    });
    let facts = Facts {
        started,
        interface: settings.interface,
        dns: dns.inspector(),
        credentials,
        events_dropped,
        services: services.clone(),
        services_unkept,
        served,
        health_checks,
        enforcer,
        mapper,
        port_mappings,
        lan_announcements,
        exchanges,
        standing,
        version,
        proxy,
        state_dir: settings.state_dir,
        enforces: settings.policy,
        rotations,
        operators: settings.operators,
    };
    let admin = Admin::new(
        DriverHandle(events),
        settings.admin_socket,
        facts,
        connection,
    );
    let shown = admin.clone();
    let page = move || shown.clone().metrics();
    let metrics = metrics::serve(settings.metrics_listen, page, stop.clone());
    supervisor.spawn("metrics", metrics);
    let journal = admin.clone().keep_journal(stop.clone());
    supervisor.spawn("journal", journal);
    if admin.has_operators() {
        let operators = admin.clone().serve_operators(stop.clone());
        supervisor.spawn("operators", operators);
    }
    supervisor.spawn("admin", admin.serve(stop));
    Ok(Running {
        workers,
        dns,
        services,
    })
}

/// Says how this node is, for the controller, and how often somebody asked for what the snapshot does not have: a name
/// of the mesh, or a peer for this node by a key that is not known here.
async fn keep_report(
    driver: DriverHandle,
    dns: Arc<Counters>,
    (reports, unknowns): (watch::Sender<NodeReport>, watch::Sender<u64>),
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut rounds = time::interval(REPORT_EVERY);
    rounds.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            _ = rounds.tick() => {}
        }
        let asked = driver.ask(|driver| {
            let strangers = driver.tunnel.stats().dropped(DropReason::UnknownKey);
            (report::for_controller(driver), strangers)
        });
        if let Some((now, strangers)) = asked.await {
            reports.send_if_modified(|last| std::mem::replace(last, now) != now);
            let unknown = strangers + dns.unknown.get();
            unknowns.send_if_modified(|last| std::mem::replace(last, unknown) != unknown);
        }
    }
}

/// Tells the core what the time is, and what it must be at least: now and then, as clocks are set without a word.
async fn keep_clock(
    events: mpsc::Sender<Event>,
    credentials: Arc<ArcSwap<Credentials>>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut rounds = time::interval(CLOCK_EVERY);
    let since_1970 = |at: SystemTime| at.duration_since(UNIX_EPOCH).unwrap_or_default();
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            _ = rounds.tick() => {}
        }
        let clock = Input::Clock {
            wall: since_1970(SystemTime::now()),
            at_least: since_1970(credentials.load().validity().not_before),
        };
        events.send(Event::Core(clock)).await.ok(); // Fails only while the agent stops.
    }
}

fn wireguard_key(state: &StateFolder) -> anyhow::Result<PrivateKey> {
    if let Some(key) = state.wireguard_key()? {
        return Ok(key);
    }
    let mut bytes = Zeroizing::new([0; 32]);
    SystemRandom::new()
        .fill(bytes.as_mut_slice())
        .ok()
        .context("the system gave no random bytes")?;
    state.set_wireguard_key(&bytes)?;
    Ok(PrivateKey::new(*bytes))
}

/// Addresses and routes stand before the first listener and the first packet.
async fn prepare_device(
    netlink: &Netlink,
    interface: &(IfIndex, String),
    snapshot: &Snapshot,
    settings: &Settings,
    local: &Local,
) -> anyhow::Result<()> {
    let mtu = snapshot.mesh.mtu_bytes;
    let limit = super_packet_len_max(mtu);
    netlink
        .set_link_up(interface.0, mtu.into(), Some(limit))
        .await?;
    let desired = network::desired(snapshot, &settings.node_name, local)
        .context("the snapshot lost this node while it was read")?;
    let (_, problems) = network::apply(netlink, interface, &desired).await?;
    if !problems.is_empty() {
        tracing::warn!(%problems, "the kernel refused a part; trying again");
    }
    Ok(())
}

/// DNS addresses that are the agent's to configure: link-local ones, which no one else routes.
fn link_local(listen: &[SocketAddr]) -> Vec<IpAddr> {
    let is_link_local = |ip: &IpAddr| match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(_) => false, // The kernel needs a scope for those: not offered.
    };
    listen
        .iter()
        .map(SocketAddr::ip)
        .filter(is_link_local)
        .collect()
}

/// Does `task` once the service maps are as they should be: a program that replaces an earlier agent's
/// must not look at maps that are empty.
async fn after(
    mut filled: watch::Receiver<bool>,
    task: impl Future<Output = anyhow::Result<()>>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    tokio::select! {
        biased; // Who fills the maps stops as well.
        () = stop.cancelled() => return Ok(()),
        filled = filled.wait_for(|filled| *filled) => drop(filled?),
    }
    task.await
}

/// The service programs, if they are wanted.
struct Loaded {
    services: Option<Arc<Mutex<Services>>>,
    /// Why they end with this process.
    problem: Option<String>,
}

fn cgroup(settings: &Settings) -> anyhow::Result<PathBuf> {
    match &settings.cgroup {
        Some(path) => Ok(path.clone()),
        None => Ok(ebpf_loader::find_cgroup2()?),
    }
}

fn load_services(settings: &Settings) -> anyhow::Result<Loaded> {
    if !settings.services {
        tracing::info!("service programs are off by configuration (`services = false`)");
        if let Err(error) = remove_services(settings) {
            tracing::warn!("services of an earlier agent go on: {error:#}");
        }
        return Ok(Loaded {
            services: None,
            problem: None,
        });
    }
    let cgroup = cgroup(settings)?;
    let pins = || Pins::open(Path::new(BPFFS), &cgroup);
    let problem = pins().err().map(|error| mesh_daemon::chain(&error));
    if let Some(problem) = &problem {
        tracing::warn!(%problem, "services will end with this process");
    }
    let with_packets = || {
        let loaded = Services::take_over(&cgroup, pins().ok(), true);
        // What sockets lack as well is said below.
        let said = |error| tracing::warn!(%error, "no packets are looked at (`service_interfaces`, `pod_interfaces`)");
        loaded.map_err(said).ok()
    };
    let pods = !settings.pod_interfaces.is_empty() || settings.cni.is_some();
    let wanted = !settings.service_interfaces.is_empty() || pods;
    let services = match wanted.then(with_packets).flatten() {
        Some(services) => services,
        None => Services::take_over(&cgroup, pins().ok(), false).with_context(|| {
            format!(
                "cannot load the service programs for cgroup {}",
                cgroup.display()
            )
        })?,
    };
    Ok(Loaded {
        services: Some(Arc::new(Mutex::new(services))),
        problem,
    })
}

/// Writes the addresses that worked, at most once in a while: they only save time.
async fn remember(
    state: Arc<StateFolder>,
    mut remembered: watch::Receiver<BTreeMap<NodeId, Vec<SocketAddr>>>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    const PAUSE: Duration = Duration::from_millis(500);
    let mut refused = String::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            changed = remembered.changed() => {
                if changed.is_err() {
                    return Ok(()); // The driver ended: so does the agent.
                }
            }
        }
        let peers = remembered.borrow_and_update().clone();
        let state = Arc::clone(&state);
        let written = tokio::task::spawn_blocking(move || state.remember(&peers)).await?;
        // A disk that is full stays so for a while.
        let error = written
            .err()
            .map_or_else(String::new, |error| error.to_string());
        if !error.is_empty() && error != refused {
            tracing::warn!(%error, "cannot keep the addresses that worked");
        }
        refused = error;
        time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_s_folder_is_made_in_one_that_is_there_and_nowhere_else() {
        let home = tempfile::tempdir().unwrap();
        let run = home.path().join("holdfast");
        // At the first start, and at the next.
        for _ in 0..2 {
            make_folder_of("admin_socket", &run.join("agent.sock")).unwrap();
        }
        assert!(run.is_dir());
        make_folder_of("admin_socket", Path::new("agent.sock")).unwrap();

        let nosuch = home.path().join("nosuch");
        let mistyped = nosuch.join("dir/agent.sock");
        let error = make_folder_of("admin_socket", &mistyped).unwrap_err();
        let expected = format!("there is no folder {}: make it", nosuch.display());
        assert!(error.to_string().contains(&expected), "{error}");
        assert!(!nosuch.exists());
    }
}
