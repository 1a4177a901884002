//! The kernel's side of the overlay: addresses of the TUN device, routes into it, and news about
//! the uplinks.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    fs, future,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use ipnet::IpNet;
use mesh_core::{
    gateways::is_own,
    io::Input,
    services::View,
    snapshot::{Node, Snapshot},
};
use mesh_daemon::chain;
use mesh_linux::{
    IfIndex,
    netlink::{Changes, Netlink, Route},
};
use mesh_wire::id::NodeName;
use tokio::{
    sync::{mpsc, watch},
    time,
};
use tokio_util::sync::CancellationToken;

use crate::{
    config::Settings,
    driver::{Event, now, sleep_until},
    settle::Looks,
    uplinks::{Network, UplinkRule, Way},
};

/// How long the likeliest way out is tried for the first snapshot before the next one is. In each further round twice as long.
const FIRST_TURN: Duration = Duration::from_secs(5);

/// The longest turn: a first snapshot of 100 MB by 3 Mb/s, or another controller's whole pause.
const LONGEST_TURN: Duration = Duration::from_secs(300);

/// How often what the kernel refused is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Pause after a change of the network before the addresses are read: changes come in bursts.
const SETTLE: Duration = Duration::from_millis(20);

/// What the kernel should hold for the overlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    /// Addresses of the TUN device.
    pub addresses: BTreeSet<IpNet>,
    /// Destinations that lead into it, with the source that this node's own packets take.
    pub routes: BTreeSet<(IpNet, Option<IpAddr>)>,
    /// Packets that come out of the tunnel may go on to something behind this node.
    pub forwarding: bool,
}

/// What of the kernel's side this node's configuration says.
#[derive(Debug, Clone, Default)]
pub struct Local {
    /// Further addresses of the device, for DNS.
    pub dns: Vec<IpAddr>,
    /// Devices use services through this node: their answers come out of the tunnel.
    pub serves_devices: bool,
}

/// What the kernel of `own` should hold. `None`: the snapshot does not have this node.
#[must_use]
pub fn desired(snapshot: &Snapshot, own: &NodeName, local: &Local) -> Option<Desired> {
    let node = snapshot.nodes.get(own)?;
    let own_addresses = [IpAddr::from(node.overlay_v4), node.overlay_v6.into()];
    let addresses = own_addresses
        .iter()
        .chain(&local.dns)
        .map(|&ip| IpNet::from(ip))
        .collect();
    let mesh = [
        IpNet::from(snapshot.mesh.overlay_v4),
        snapshot.mesh.id.ula_prefix().into(),
    ];
    let others = snapshot.nodes.values().filter(|other| other.name != *own);
    let behind_others = others.flat_map(|other| other.prefixes.iter().copied());
    // A LAN of this node's own is not behind others, though they may be gateways of it too.
    let behind_others = behind_others.filter(|net| !is_own(node, net));
    // What only the mesh calls so: by another gateway, or by none, but never out into the world.
    let seen_as = node.mapped.iter().map(|mapping| mapping.seen_as);
    let mine = snapshot
        .external_peers
        .values()
        .filter(|peer| peer.gateway == *own);
    let external = mine.flat_map(|peer| peer.prefixes.iter().copied());
    let covered = |net: &IpNet| mesh.iter().any(|whole| whole.contains(net));
    let further = behind_others.chain(seen_as).chain(external);
    let further = further.filter(|net| !covered(net));
    let source = |net: &IpNet| match net {
        IpNet::V4(_) => node.overlay_v4.into(),
        IpNet::V6(_) => node.overlay_v6.into(),
    };
    let routes = mesh
        .into_iter()
        .chain(further)
        .map(|net| (net.trunc(), Some(source(&net))));
    Some(Desired {
        addresses,
        routes: routes.collect(),
        forwarding: forwards(node, local),
    })
}

/// Whether this node hands on packets of others.
pub(crate) fn forwards(node: &Node, local: &Local) -> bool {
    local.serves_devices || !node.prefixes.is_empty()
}

/// Keeps the kernel as the view says, until `stop`, also when somebody else takes away what is ours: a network manager that
/// starts anew flushes what it does not know, and with a device that is taken down the kernel forgets its routes.
///
/// # Errors
///
/// If the kernel does not answer at all, or tells no changes any more; what it refuses is tried again and logged once.
pub async fn keep_kernel(
    netlink: Netlink,
    mut changes: Changes,
    interface: (IfIndex, String),
    local: Local,
    mut views: watch::Receiver<Option<Arc<View>>>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut applied: Option<Desired> = None;
    let mut complaint = String::new();
    let mut looks = Looks::new(now());
    loop {
        let view = views.borrow_and_update().clone();
        let wanted = view.and_then(|view| desired(&view.snapshot, &view.node, &local));
        let is_due = looks.due().is_some_and(|due| due <= now());
        if is_due {
            looks.handle_look(now());
        }
        if let Some(wanted) = wanted
            && (is_due || applied.as_ref() != Some(&wanted))
        {
            let (changed, problems) = apply(&netlink, &interface, &wanted).await?;
            if changed > 0 && applied.as_ref() == Some(&wanted) {
                tracing::warn!(
                    interface = interface.1,
                    changed,
                    "somebody took away addresses or routes of the mesh: they are back"
                );
            }
            if problems.is_empty() {
                complaint.clear();
                applied = Some(wanted);
            } else if problems != complaint {
                tracing::warn!(%problems, "the kernel refused a part; trying again");
                complaint = problems;
                applied = None;
            }
        }
        let retry = time::Instant::now() + RETRY;
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                changed = views.changed() => changed?,
                change = changes.next() => {
                    let change = change.context("cannot hear of changes of the network")?;
                    if change.links || change.addresses || change.own_routes {
                        looks.handle_change(now());
                    }
                    continue;
                }
                () = sleep_until(looks.due()) => {}
                () = time::sleep_until(retry), if !complaint.is_empty() => {}
            }
            break;
        }
    }
}

/// Performs `wanted`; returns how much was otherwise, and what was refused, for people.
///
/// # Errors
///
/// If the present state cannot be read.
pub async fn apply(
    netlink: &Netlink,
    (link, name): &(IfIndex, String),
    wanted: &Desired,
) -> anyhow::Result<(usize, String)> {
    let routes = wanted
        .routes
        .iter()
        .map(|&(net, source)| Route::new(net, *link, source));
    let addresses = netlink.apply_addresses(*link, &wanted.addresses).await?;
    let routes = netlink.apply_routes(&routes.collect()).await?;
    let mut problems: Vec<_> = addresses
        .failed
        .iter()
        .chain(&routes.failed)
        .map(|error| chain(error))
        .collect();
    if wanted.forwarding
        && let Err(problem) = forward(name)
    {
        problems.push(problem);
    }
    let changed = [addresses, routes].map(|one| one.added + one.removed);
    Ok((changed.iter().sum(), problems.join("; ")))
}

/// Lets packets from the TUN device be forwarded. The settings vanish with the device, but for
/// IPv6's global switch, which Linux before 6.17 needs (`force_forwarding` came there).
fn forward(interface: &str) -> Result<(), String> {
    let v4 = PathBuf::from(format!("/proc/sys/net/ipv4/conf/{interface}/forwarding"));
    fs::write(&v4, "1").map_err(|error| format!("cannot write {}: {error}", v4.display()))?;
    let v6 = PathBuf::from(format!(
        "/proc/sys/net/ipv6/conf/{interface}/force_forwarding"
    ));
    match fs::write(&v6, "1") {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("cannot write {}: {error}", v6.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// The ways out of this machine, before anybody follows them; `None`: the kernel's routes choose.
///
/// # Errors
///
/// If the kernel does not answer.
pub async fn read(netlink: &Netlink, settings: &Settings) -> anyhow::Result<Option<Network>> {
    let ways = netlink.ways(&settings.interface).await?;
    let network = Network::new(&ways, &settings.uplinks, settings.listen_port);
    let chosen = network.has_choice(&settings.uplinks);
    Ok(chosen.then_some(network))
}

/// Names one way out of this machine after the other for as long as it runs: before there is a snapshot, nobody finds out
/// which of them lead anywhere.
pub async fn try_each(all: &[Way], ways: &watch::Sender<Way>) -> Infallible {
    if all.len() < 2 {
        return future::pending().await;
    }
    let mut turn = FIRST_TURN;
    loop {
        for way in all {
            ways.send_if_modified(|last| {
                let other = last != way;
                last.clone_from(way);
                other
            });
            time::sleep(turn).await;
        }
        turn = LONGEST_TURN.min(turn * 2);
    }
}

/// Tells the driver the ways out of this machine, now and whenever the network changes. While there is
/// one, and `rules` say nothing, those are only the addresses of the node's socket, and the kernel's
/// routes choose; from the second one on, the core does.
///
/// # Errors
///
/// If the kernel does not answer.
pub async fn watch_uplinks(
    netlink: Netlink,
    mut changes: Changes,
    interface: String,
    port: u16,
    rules: Vec<UplinkRule>,
    events: mpsc::Sender<Event>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut chosen = false;
    let mut strict = BTreeSet::new();
    loop {
        let ways = netlink.ways(&interface).await?;
        let network = Network::new(&ways, &rules, port);
        chosen |= network.has_choice(&rules);
        let event = if chosen {
            warn_if_strict(&network, &mut strict);
            Event::Network(network)
        } else {
            let up = ways.interfaces.iter().filter(|one| one.up);
            let addresses: BTreeSet<_> = up.flat_map(|one| &one.addresses).collect();
            let sockets = addresses.into_iter().map(|&ip| SocketAddr::new(ip, port));
            Event::Core(Input::LocalAddresses(sockets.collect()))
        };
        events.send(event).await.ok(); // Fails only while the agent stops.
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            change = changes.next() => {
                change.context("cannot hear of changes of the network")?;
                time::sleep(SETTLE).await;
            }
        }
    }
}

/// Says once of each uplink that the kernel will drop what comes in by it while its own routes prefer
/// another. It counts what the stricter setting says, the interface's or that of all (ip-sysctl).
fn warn_if_strict(network: &Network, told: &mut BTreeSet<String>) {
    const STRICT: &str = "1";
    for uplink in &network.uplinks {
        let setting = |of: &str| {
            let path = format!("/proc/sys/net/ipv4/conf/{of}/rp_filter");
            fs::read_to_string(path).unwrap_or_default()
        };
        let (all, own) = (setting("all"), setting(&uplink.name));
        // 0 is off, 2 is loose.
        let strict = all.trim().max(own.trim()) == STRICT;
        if strict && told.insert(uplink.name.clone()) {
            tracing::warn!(
                interface = uplink.name,
                "strict reverse path filtering: what comes in by this uplink is dropped while \
                the kernel's routes prefer another; set net.ipv4.conf.{}.rp_filter=2",
                uplink.name
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::snapshot::{ExternalPeer, MeshSettings};
    use mesh_linux::netlink::{Interface, Ways};
    use mesh_wire::id::{MeshId, NodeId};

    use super::*;

    fn snapshot() -> Snapshot {
        let mesh = MeshId([1; 32]);
        let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(mesh, "test"));
        for (index, name, prefix) in [(1, "own", "10.42.1.0/24"), (2, "other", "10.42.2.0/24")] {
            let id = NodeId([index; 32]);
            let (name, overlay_v4) = (name.parse().unwrap(), [100, 96, 0, index].into());
            let node = Node {
                prefixes: vec![prefix.parse().unwrap()],
                ..Node::new(&mesh, name, id, overlay_v4)
            };
            snapshot.nodes.insert(node.name.clone(), node);
        }
        snapshot
    }

    fn routes(snapshot: &Snapshot) -> Vec<String> {
        let desired = desired(snapshot, &"own".parse().unwrap(), &Local::default()).unwrap();
        let v4 = desired
            .routes
            .iter()
            .filter(|(net, _)| net.addr().is_ipv4());
        v4.map(|(net, _)| net.to_string()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn until_there_is_a_snapshot_each_way_out_has_its_turn() {
        let interface = |number, name: &str, metric| Interface {
            index: IfIndex::new(number).unwrap(),
            name: name.to_owned(),
            up: true,
            addresses: [IpAddr::from([10, 0, 0, 1])].into(),
            metric_v4: Some(metric),
            metric_v6: None,
        };
        let ways = Ways {
            interfaces: vec![interface(2, "eth0", 100), interface(3, "wwan0", 700)],
            routes: Vec::new(),
        };
        let all = Network::new(&ways, &[], 51_820).ways();
        let likeliest = all[0].clone();
        let (sender, mut way) = watch::channel(likeliest.clone());
        let trying = tokio::spawn(async move { try_each(&all, &sender).await });
        let (start, mut turns) = (time::Instant::now(), Vec::new());
        while turns.len() < 20 {
            way.changed().await.unwrap();
            let is_likeliest = *way.borrow() == likeliest;
            turns.push((start.elapsed().as_secs(), is_likeliest));
        }
        let first = [(5, false), (10, true), (20, false), (30, true), (50, false)];
        assert_eq!(turns[..5], first);
        assert_eq!(turns[19].0 - turns[18].0, LONGEST_TURN.as_secs());
        trying.abort();
    }

    /// In a network namespace of its own. Needs root.
    #[test]
    fn what_somebody_else_takes_away_comes_back() {
        let inside = mesh_linux::netns::make().unwrap();
        let work = || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(disturbed());
        };
        mesh_linux::netns::run_inside(&inside, work).unwrap();
    }

    async fn disturbed() {
        let tun = mesh_linux::tun::Tun::create("hf", 1).unwrap();
        let netlink = Netlink::connect().unwrap();
        netlink.set_link_up(tun.index(), 1_340, None).await.unwrap();
        let view = View::new(Arc::new(snapshot()), "own".parse().unwrap());
        let (_views, view) = watch::channel(Some(Arc::new(view)));
        let (changes, stop) = (Changes::listen().unwrap(), CancellationToken::new());
        let interface = (tun.index(), "hf".to_owned());
        let local = Local {
            dns: vec![[169, 254, 20, 10].into()],
            serves_devices: false,
        };
        let wanted = desired(&snapshot(), &"own".parse().unwrap(), &local).unwrap();
        let kept = keep_kernel(
            netlink.clone(),
            changes,
            interface.clone(),
            local,
            view,
            stop.clone(),
        );
        let kept = tokio::spawn(kept);
        let is_whole = async || {
            for _ in 0..1_000 {
                let routes = netlink.routes().await.unwrap();
                let addresses = netlink.addresses(tun.index()).await.unwrap();
                // The mesh's two ranges, and what is behind the other node; an address of each family.
                if (routes.len(), addresses.len()) == (3, 2) {
                    return;
                }
                time::sleep(Duration::from_millis(10)).await;
            }
            panic!("it does not come back");
        };
        is_whole().await;
        let again = apply(&netlink, &interface, &wanted).await.unwrap();
        assert_eq!(again, (0, String::new()), "it is as it should be");
        for words in [
            "-4 route flush dev hf",
            "-6 route flush dev hf proto 72",
            "-4 address flush dev hf",
            "-6 address flush dev hf scope global",
            "link set hf down",
        ] {
            // A program that is started here is in this namespace, too.
            let done = std::process::Command::new("ip")
                .args(words.split(' '))
                .status();
            assert!(done.unwrap().success(), "ip {words}");
            if words.ends_with("down") {
                netlink.set_link_up(tun.index(), 1_340, None).await.unwrap();
            } else {
                let routes = netlink.routes().await.unwrap().len();
                let addresses = netlink.addresses(tun.index()).await.unwrap().len();
                assert!(routes < 3 || addresses < 2, "ip {words} took nothing");
            }
            is_whole().await;
        }
        stop.cancel();
        kept.await.unwrap().unwrap();
    }

    #[test]
    fn the_mesh_and_what_is_behind_others_lead_into_the_tunnel_but_not_what_is_behind_this_node() {
        assert_eq!(routes(&snapshot()), ["10.42.2.0/24", "100.96.0.0/12"]);
    }

    #[test]
    fn external_peers_of_this_node_get_a_route_and_addresses_of_the_overlay_need_none() {
        let mut snapshot = snapshot();
        for (name, prefix) in [("phone", "100.96.9.9/32"), ("plc", "192.168.7.1/32")] {
            let peer = ExternalPeer {
                id: NodeId([9; 32]),
                name: name.parse().unwrap(),
                prefixes: vec![prefix.parse().unwrap()],
                gateway: "own".parse().unwrap(),
                endpoint: None,
                keepalive: None,
            };
            snapshot.external_peers.insert(peer.name.clone(), peer);
        }
        assert_eq!(
            routes(&snapshot),
            ["10.42.2.0/24", "100.96.0.0/12", "192.168.7.1/32"]
        );
    }

    #[test]
    fn a_node_that_the_snapshot_does_not_have_gets_nothing() {
        assert_eq!(
            desired(&snapshot(), &"stranger".parse().unwrap(), &Local::default()),
            None
        );
    }

    #[test]
    fn packets_out_of_the_tunnel_go_on_where_something_is_behind_this_node() {
        let mut snapshot = snapshot();
        let own: NodeName = "own".parse().unwrap();
        let forwards = |snapshot: &Snapshot, serves_devices| {
            let local = Local {
                serves_devices,
                ..Local::default()
            };
            desired(snapshot, &own, &local).unwrap().forwarding
        };
        assert!(forwards(&snapshot, false));
        snapshot.nodes.get_mut(&own).unwrap().prefixes.clear();
        assert!(!forwards(&snapshot, false));
        assert!(forwards(&snapshot, true));
    }
}
