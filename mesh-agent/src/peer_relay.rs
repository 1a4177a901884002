//! The relay that this node is for others, where a `MeshRelay` names it (`spec.node`): the same server
//! as `mesh-relay`, with the node's own certificate, on a thread of its own. What passes is WireGuard's
//! ciphertext, as at any relay.
//!
//! It is also how two nodes speak QUIC or TLS with each other: the one that can be reached at 443 acts
//! as a relay, of which it is a client itself, and the other one needs nobody between them.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    thread,
    time::Duration,
};

use arc_swap::ArcSwap;
use mesh_core::{
    relay_server::Limits,
    services::View,
    snapshot::{Relay as Wanted, Snapshot},
};
use mesh_identity::credentials::Credentials;
use mesh_linux::thread::raise_priority;
use mesh_relay::{
    config::Listen,
    server::{Relay, RelayHandle},
};
use mesh_tunnel::tunnel::PACKET_NICENESS;
use mesh_wire::id::{NodeId, NodeName};
use tokio::{
    runtime,
    sync::{oneshot, watch},
    time,
};
use tokio_util::sync::CancellationToken;

/// Links at once. Each that is slow may hold 576 KiB ([`Limits::links_max`]): 72 MiB of a box with 1 GiB,
/// for a site of 120 nodes. One more is refused and uses the mesh's other relays.
const LINKS_MAX: usize = 128;

/// How soon a relay that ended by itself is started again.
const RETRY: Duration = Duration::from_secs(10);

/// How long clients may take to leave when the agent stops: the relay gives them 2 s, the agent's tasks
/// have 3 s in all.
const END_MAX: Duration = Duration::from_millis(2500);

/// How often is looked whether the node has a new certificate, and a port that could not be had is tried again.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// The relay that `snapshot` wants this node to be; if several do, the first by name.
fn wanted<'a>(snapshot: &'a Snapshot, node: &NodeName) -> Option<&'a Wanted> {
    let mine = |relay: &&Wanted| relay.node.as_ref() == Some(node);
    let mine = snapshot.relays.values().filter(mine);
    mine.min_by(|a, b| a.name.cmp(&b.name))
}

/// Whom it serves.
fn served(relay: &Wanted, snapshot: &Snapshot) -> Option<BTreeSet<NodeId>> {
    if relay.sites.is_empty() {
        return None;
    }
    let nodes = snapshot.nodes.values();
    let nodes = nodes.filter(|node| relay.serves(node.locality.site.as_ref()));
    Some(nodes.map(|node| node.id).collect())
}

/// Where it listens.
fn listen(relay: &Wanted) -> Listen {
    // A machine without IPv6 has no address of that family to be known by.
    let any: IpAddr = match relay.addresses.iter().all(IpAddr::is_ipv4) {
        true => Ipv4Addr::UNSPECIFIED.into(),
        false => Ipv6Addr::UNSPECIFIED.into(),
    };
    let at = |port| SocketAddr::from((any, port));
    let stun = relay.stun_ports.iter().copied();
    Listen {
        quic: at(relay.quic_port),
        tls: at(relay.tls_port),
        // QUIC's port answers STUN too.
        stun: stun
            .filter(|port| *port != relay.quic_port)
            .map(at)
            .collect(),
    }
}

/// A relay that runs.
struct Running {
    listen: Listen,
    /// From which it is known whom it serves.
    snapshot: Option<Arc<Snapshot>>,
    shown: Arc<Credentials>,
    handle: RelayHandle,
    stop: CancellationToken,
    /// Says why it ended.
    ended: oneshot::Receiver<Result<(), String>>,
}

impl Running {
    async fn start(relay: &Wanted, shown: Arc<Credentials>) -> Result<Self, String> {
        let listen = listen(relay);
        let limits = Limits {
            links_max: LINKS_MAX,
            links_per_source_max: LINKS_MAX,
            ..Limits::default()
        };
        let stop = CancellationToken::new();
        let (to_bound, bound) = oneshot::channel();
        let (to_ended, ended) = oneshot::channel();
        let serve = {
            let (listen, shown, stop) = (listen.clone(), Arc::clone(&shown), stop.clone());
            async move {
                let relay = match Relay::bind(&listen, &shown, limits) {
                    Ok(relay) => relay,
                    Err(error) => {
                        to_bound.send(Err(error.to_string())).ok(); // The agent is stopping.
                        return;
                    }
                };
                to_bound.send(Ok(relay.handle())).ok();
                let result = relay.run(stop).await;
                to_ended
                    .send(result.map_err(|error| error.to_string()))
                    .ok();
            }
        };
        spawn(serve).map_err(|error| format!("cannot start its thread: {error}"))?;
        let handle = bound
            .await
            .map_err(|_| "its thread ended early".to_owned())??;
        Ok(Self {
            listen,
            snapshot: None,
            shown,
            handle,
            stop,
            ended,
        })
    }

    /// A view changes more often than its snapshot, and a mesh has 100,000 nodes.
    fn serve(&mut self, relay: &Wanted, snapshot: &Arc<Snapshot>) {
        let known = self.snapshot.as_ref();
        if !known.is_some_and(|known| Arc::ptr_eq(known, snapshot)) {
            self.handle.set_served(served(relay, snapshot));
            self.snapshot = Some(Arc::clone(snapshot));
        }
    }

    fn show(&mut self, credentials: &Arc<Credentials>) {
        if Arc::ptr_eq(&self.shown, credentials) {
            return;
        }
        if let Err(error) = self.handle.set_credentials(credentials) {
            tracing::warn!(%error, "the relay of this node keeps its former certificate");
        }
        self.shown = Arc::clone(credentials);
    }

    /// Tells the clients to go, and waits until they have, for some seconds at most.
    async fn end(self) {
        self.stop.cancel();
        time::timeout(END_MAX, self.ended).await.ok(); // Who stays finds the port closed.
    }
}

/// Packets do not wait for control work: a thread and a runtime of its own.
fn spawn(task: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let run = move || {
        raise_priority(PACKET_NICENESS);
        runtime.block_on(task);
    };
    thread::Builder::new()
        .name("peer-relay".to_owned())
        .spawn(run)?;
    Ok(())
}

/// Runs the relay for as long as the snapshot wants this node to be one.
///
/// # Errors
///
/// None; what is refused is said once, and tried again.
pub async fn keep_peer_relay(
    node: NodeName,
    credentials: Arc<ArcSwap<Credentials>>,
    mut views: watch::Receiver<Option<Arc<View>>>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut running: Option<Running> = None;
    let mut complaint = String::new();
    let mut looks = time::interval(LOOK_EVERY);
    loop {
        let view = views.borrow_and_update().clone();
        let snapshot = view.as_ref().map(|view| &view.snapshot);
        let relay = snapshot.and_then(|snapshot| wanted(snapshot, &node));
        let fits = |running: &Running| relay.is_some_and(|relay| listen(relay) == running.listen);
        if let Some(other) = running.take_if(|running| !fits(running)) {
            tracing::info!("this node acts as that relay no more");
            other.end().await;
        }
        if let (Some(relay), None) = (relay, &running) {
            match Running::start(relay, credentials.load_full()).await {
                Ok(started) => {
                    tracing::info!(relay = %relay.name, "this node acts as a relay");
                    running = Some(started);
                    complaint.clear();
                }
                Err(problem) if problem != complaint => {
                    tracing::warn!(relay = %relay.name, %problem, "this node cannot act as a relay; trying again");
                    complaint = problem;
                }
                Err(_) => {}
            }
        }
        if let (Some(relay), Some(snapshot), Some(running)) = (relay, snapshot, &mut running) {
            running.serve(relay, snapshot);
        }
        tokio::select! {
            () = stop.cancelled() => break,
            changed = views.changed() => {
                if changed.is_err() {
                    break; // The driver was told to stop as well, and was quicker.
                }
            }
            _ = looks.tick() => {
                if let Some(running) = &mut running {
                    running.show(&credentials.load_full());
                }
            }
            why = ended(&mut running) => {
                tracing::warn!(?why, "the relay of this node ended; starting it again");
                running = None;
                tokio::select! {
                    () = stop.cancelled() => break,
                    () = time::sleep(RETRY) => {}
                }
            }
        }
    }
    if let Some(running) = running {
        running.end().await;
    }
    Ok(())
}

async fn ended(running: &mut Option<Running>) -> Result<(), String> {
    match running {
        Some(running) => {
            let ended = (&mut running.ended).await;
            ended.unwrap_or_else(|_| Err("its thread died".to_owned()))
        }
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::snapshot::{MeshSettings, Node};
    use mesh_wire::id::{MeshId, RelayId};

    use super::*;

    fn snapshot() -> Snapshot {
        let mesh = MeshId([1; 32]);
        let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(mesh, "test"));
        for (index, name, site) in [
            (1, "gateway", "mill"),
            (2, "pump", "mill"),
            (3, "far", "port"),
        ] {
            let id = NodeId([index; 32]);
            let (name, overlay_v4) = (name.parse().unwrap(), [100, 96, 0, index].into());
            let mut node = Node::new(&mesh, name, id, overlay_v4);
            node.locality.site = Some(site.parse().unwrap());
            snapshot.nodes.insert(node.name.clone(), node);
        }
        snapshot
    }

    fn relay(name: &str, node: Option<&str>, sites: &[&str]) -> Wanted {
        Wanted {
            name: name.parse().unwrap(),
            addresses: vec!["192.0.2.1".parse().unwrap()],
            quic_port: 443,
            tls_port: 8443,
            stun_ports: vec![443, 3478],
            node: node.map(|node| node.parse().unwrap()),
            sites: sites.iter().map(|site| site.parse().unwrap()).collect(),
        }
    }

    fn add(snapshot: &mut Snapshot, relay: Wanted) {
        snapshot.relays.insert(RelayId::from(&relay.name), relay);
    }

    #[test]
    fn a_node_is_the_relay_that_names_it_and_no_other() {
        let mut snapshot = snapshot();
        add(&mut snapshot, relay("cloud", None, &[]));
        add(&mut snapshot, relay("mill-2", Some("gateway"), &["mill"]));
        add(&mut snapshot, relay("mill-1", Some("gateway"), &["mill"]));
        let of = |node: &str| {
            let relay = wanted(&snapshot, &node.parse().unwrap());
            relay.map(|relay| relay.name.to_string())
        };
        assert_eq!(of("gateway").as_deref(), Some("mill-1"));
        assert_eq!(of("pump"), None);
    }

    #[test]
    fn it_serves_the_nodes_of_its_sites_or_everybody() {
        let snapshot = snapshot();
        let served = |sites: &[&str]| served(&relay("r", Some("gateway"), sites), &snapshot);
        let mill = BTreeSet::from([NodeId([1; 32]), NodeId([2; 32])]);
        assert_eq!(served(&["mill"]), Some(mill));
        assert_eq!(served(&["elsewhere"]), Some(BTreeSet::new()));
        assert_eq!(served(&[]), None);
    }

    #[test]
    fn the_port_of_quic_is_opened_once() {
        let listen = listen(&relay("r", Some("gateway"), &[]));
        let ports: Vec<_> = listen.stun.iter().map(SocketAddr::port).collect();
        assert_eq!((listen.quic.port(), listen.tls.port()), (443, 8443));
        assert_eq!(ports, [3478]);
    }
}
