//! Nodes of one LAN find each other without a controller, a relay, or the memory of an earlier life: each says where it is,
//! signed, to a multicast group of its own, by IPv4 and IPv6, on all LANs of this machine but those of pods, of other
//! programs' tunnels, and those that cost.
//!
//! [`machine`] decides when to speak and whom to believe; here are the sockets. What is believed is one more address at which
//! the core may call a node of the mesh: whoever answers there has to have that node's key.

pub mod machine;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use ipnet::IpNet;
use mesh_core::{
    io::Input,
    offline::{
        Version,
        exchange::{Ask, Offer},
    },
    pattern::NamePattern,
    services::View,
    snapshot::Snapshot,
};
use mesh_identity::{credentials::Credentials, statement::verify_statement};
use mesh_linux::{
    IfIndex,
    netlink::{Changes, Lan, Netlink},
};
use mesh_wire::{
    announcement::{Announcement, GROUP_V4, GROUP_V6, LEN_MAX, PORT, Signed},
    id::{NodeId, NodeName},
};
use rand::random;
use socket2::{Domain, InterfaceIndexOrAddress, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, UdpSocket},
    sync::{mpsc, watch},
    task::JoinSet,
    time,
};
use tokio_util::sync::CancellationToken;

use self::machine::{Believed, Counts, Heard, Known, Machine};
use crate::{
    driver::{Event, now, sleep_until},
    exchange::Giver,
    settle::Looks,
    uplinks::{UplinkRule, is_metered},
};

/// Most LANs on which a node announces itself; a machine with more has them for its guests.
const LANS_MAX: usize = 16;

/// Datagrams that wait to be looked at: two rounds of a hundred nodes. More are dropped, and said again by their senders.
const HEARD_MAX: usize = 256;

/// Neighbours that wait to be heard when they ask.
const BACKLOG: i32 = 16;

/// Pause after a socket failed.
const RETRY: Duration = Duration::from_secs(1);

/// Where and as whom a node announces itself.
#[derive(Debug)]
pub struct NeighboursConfig {
    /// The node.
    pub node: NodeName,
    /// Its key.
    pub id: NodeId,
    /// The UDP port of its tunnel.
    pub port: u16,
    /// The mesh's own interface.
    pub interface: String,
    /// What the configuration says of some interfaces: nothing is said on metered ones.
    pub uplinks: Vec<UplinkRule>,
    /// Interfaces of this node's pods.
    pub pods: BTreeSet<NamePattern>,
    /// Who the node is, and the proof.
    pub credentials: Arc<ArcSwap<Credentials>>,
    /// Which state of the mesh it has.
    pub version: watch::Receiver<Version>,
    /// Who gives it to neighbours that ask, and asks them.
    pub giver: Giver,
    /// Whom there is to ask.
    pub offers: mpsc::Sender<Offer>,
}

/// Announces the node and listens for others until `stop`.
///
/// # Errors
///
/// If the kernel does not answer.
pub async fn keep_neighbours(
    netlink: Netlink,
    mut changes: Changes,
    config: NeighboursConfig,
    mut views: watch::Receiver<Option<Arc<View>>>,
    events: mpsc::Sender<Event>,
    counts: watch::Sender<BTreeMap<String, u64>>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut shell = Shell {
        machine: Machine::new(random(), now()),
        config,
        events,
        mesh: None,
        lans: Vec::new(),
        ears: JoinSet::new(),
        heard: mpsc::channel(1).1,
        complaint: String::new(),
    };
    let mut looks = Looks::new(now());
    let mut version = shell.config.version.clone();
    loop {
        let deadline = shell.machine.poll_timeout();
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            changed = views.changed() => {
                changed?;
                let view = views.borrow_and_update().clone();
                if shell.take_view(view) {
                    looks.handle_change(now());
                }
            }
            changed = version.changed() => {
                changed?;
                shell.machine.handle_news(now());
            }
            change = changes.next() => {
                let change = change.context("cannot hear of changes of the network")?;
                if change.links || change.addresses {
                    looks.handle_change(now());
                }
            }
            () = sleep_until(looks.due()) => {
                looks.handle_look(now());
                if shell.mesh.is_none() {
                    let view = views.borrow_and_update().clone();
                    shell.take_view(view);
                }
                let lans = netlink.lans(&shell.config.interface).await?;
                shell.take_lans(lans).await;
            }
            Some(datagram) = shell.heard.recv() => shell.hear(datagram).await,
            () = sleep_until(deadline) => {
                if let Some((boot, count)) = shell.machine.handle_timeout(now()) {
                    shell.announce(boot, count).await;
                }
            }
        }
        counts.send_if_modified(|last| {
            let now = in_words(shell.machine.counts());
            std::mem::replace(last, now) != *last
        });
    }
}

/// What the mesh is, as announcements need it.
struct Mesh {
    snapshot: Arc<Snapshot>,
    names: BTreeMap<NodeId, NodeName>,
    pods: Vec<IpNet>,
}

/// A LAN on which the node is announced.
struct Place {
    lan: Lan,
    nets: Vec<IpNet>,
    sockets: Sockets,
}

/// A datagram of a LAN.
struct Datagram {
    place: usize,
    from: IpAddr,
    bytes: Vec<u8>,
}

struct Shell {
    machine: Machine,
    config: NeighboursConfig,
    events: mpsc::Sender<Event>,
    mesh: Option<Mesh>,
    lans: Vec<Place>,
    ears: JoinSet<()>,
    heard: mpsc::Receiver<Datagram>,
    /// What was said last of what does not work.
    complaint: String,
}

impl Shell {
    /// Returns whether other interfaces may be pods' now.
    fn take_view(&mut self, view: Option<Arc<View>>) -> bool {
        let Some(view) = view else {
            return false;
        };
        let snapshot = &view.snapshot;
        if self
            .mesh
            .as_ref()
            .is_some_and(|mesh| Arc::ptr_eq(&mesh.snapshot, snapshot))
        {
            return false;
        }
        let own = snapshot.nodes.get(&self.config.node);
        let pods = own.map(|own| own.pod_prefixes.clone()).unwrap_or_default();
        let nodes = snapshot.nodes.values();
        let mesh = Mesh {
            snapshot: Arc::clone(snapshot),
            names: nodes.map(|node| (node.id, node.name.clone())).collect(),
            pods,
        };
        let before = self.mesh.replace(mesh);
        before.map(|before| before.pods) != self.mesh.as_ref().map(|mesh| mesh.pods.clone())
    }

    /// Opens sockets on all LANs if they are others than before.
    async fn take_lans(&mut self, lans: Vec<Lan>) {
        let Some(mesh) = &self.mesh else {
            return; // Nobody to announce to yet.
        };
        let lans = lans.into_iter();
        let config = &self.config;
        let lans = lans.filter(|lan| suits(lan, &config.uplinks, &config.pods, &mesh.pods));
        let lans: Vec<_> = lans.take(LANS_MAX).collect();
        if lans.iter().eq(self.lans.iter().map(|place| &place.lan)) {
            return;
        }
        self.complaint.clear();
        self.ears.shutdown().await; // Their ports are free again.
        self.lans.clear();
        let (sender, heard) = mpsc::channel(HEARD_MAX);
        self.heard = heard;
        for lan in lans {
            let place = self.lans.len();
            let (sockets, listeners, failed) = open(&lan);
            if let Err(error) = failed {
                // By the other family, or after the next change.
                self.complain(format!("{}: {error}", lan.name));
            }
            for listener in listeners {
                let serve = self.config.giver.clone().serve(listener);
                self.ears.spawn(serve);
            }
            for (socket, _) in &sockets {
                self.ears
                    .spawn(listen(Arc::clone(socket), place, sender.clone()));
            }
            self.lans.push(Place {
                nets: lan.addresses.iter().copied().collect(),
                lan,
                sockets,
            });
        }
        let names: Vec<_> = self.lans.iter().map(|place| &place.lan.name).collect();
        tracing::debug!(lans = ?names, "the node announces itself");
        self.machine.handle_lans(!self.lans.is_empty(), now());
    }

    async fn hear(&mut self, datagram: Datagram) {
        let (Some(mesh), Some(place)) = (&self.mesh, self.lans.get(datagram.place)) else {
            return;
        };
        let credentials = self.config.credentials.load();
        let verify = |signed: &Signed| {
            let authority = credentials.authority();
            let certificate = signed.certificate.as_slice().into();
            verify_statement(
                authority,
                &certificate,
                &signed.statement,
                &signed.signature,
            )
            .inspect_err(|error| tracing::debug!(%error, "a forged announcement"))
            .ok()
        };
        let known = Known {
            mesh: mesh.snapshot.mesh.id,
            own: self.config.id,
            names: &mesh.names,
            version: *self.config.version.borrow(),
        };
        let heard = Heard {
            from: datagram.from,
            nets: &place.nets,
            datagram: &datagram.bytes,
        };
        match self.machine.handle_datagram(heard, &known, verify, now()) {
            Ok(believed) => {
                tracing::debug!(?believed, "a neighbour announced itself");
                self.tell(believed).await;
            }
            Err(refusal) => {
                let (from, reason) = (datagram.from, refusal.as_str());
                tracing::trace!(%from, reason, "an announcement is not believed");
            }
        }
    }

    async fn tell(&self, believed: Believed) {
        if let Some(address) = believed.addresses.first() {
            let ask = Ask {
                node: believed.node,
                name: believed.name,
                address: SocketAddr::new(address.ip(), PORT),
            };
            let version = believed.version;
            // It is announced again.
            self.config.offers.try_send(Offer { ask, version }).ok();
        }
        for address in believed.addresses {
            let told = Event::Core(Input::Neighbour {
                peer: believed.node,
                address,
            });
            self.events.send(told).await.ok(); // Fails only while the agent stops.
        }
    }

    async fn announce(&mut self, boot: u64, count: u64) {
        let Some(mesh) = &self.mesh else {
            return;
        };
        let credentials = self.config.credentials.load_full();
        let mut problem = None;
        for place in &self.lans {
            let Version {
                epoch,
                made_unix_ms,
            } = *self.config.version.borrow();
            let said = Announcement {
                mesh: mesh.snapshot.mesh.id,
                node: self.config.id,
                port: self.config.port,
                addresses: place.nets.iter().map(IpNet::addr).collect(),
                epoch,
                made_unix_ms,
                boot,
                count,
            };
            let datagram = match sign(&credentials, &said) {
                Ok(datagram) => datagram,
                Err(error) => {
                    problem = Some(error);
                    continue;
                }
            };
            for (socket, group) in &place.sockets {
                if let Err(error) = socket.send_to(&datagram, group).await {
                    // The network changed a moment ago: that is told, and announced anew.
                    tracing::debug!(lan = place.lan.name, %error, "an announcement was not sent");
                }
            }
        }
        if let Some(problem) = problem {
            self.complain(problem);
        }
    }

    fn complain(&mut self, problem: String) {
        if problem != self.complaint {
            tracing::warn!(problem, "the node is not announced on the LAN");
            self.complaint = problem;
        }
    }
}

fn sign(credentials: &Credentials, said: &Announcement) -> Result<Vec<u8>, String> {
    let statement = said.encode();
    let signature = credentials.sign_statement(&statement);
    let signature = signature.map_err(|error| error.to_string())?;
    let certificate = credentials.chain().first();
    let signed = Signed {
        statement,
        certificate: certificate.map(|der| der.to_vec()).unwrap_or_default(),
        signature,
    };
    signed.encode(&said.mesh).map_err(|error| error.to_string())
}

/// Whether there may be nodes of the mesh on this LAN, and words to them cost nothing.
fn suits(lan: &Lan, uplinks: &[UplinkRule], own: &BTreeSet<NamePattern>, pods: &[IpNet]) -> bool {
    let is_shared = |net: &&IpNet| net.prefix_len() < net.max_prefix_len();
    let is_pods = |net: &IpNet| pods.iter().any(|pods| pods.contains(&net.addr()));
    let mut shared = lan.addresses.iter().filter(is_shared);
    lan.multicast
        && shared.any(|net| !is_link_local(net.addr()) && !is_pods(net))
        && !own.iter().any(|pattern| pattern.matches(&lan.name))
        && !is_metered(uplinks, &lan.name)
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// Announcements' sockets, and the group that each speaks to.
type Sockets = Vec<(Arc<UdpSocket>, SocketAddr)>;

/// Sockets on a LAN, one for each family that it has, where neighbours ask, and what was wrong with one of them.
fn open(lan: &Lan) -> (Sockets, Vec<TcpListener>, io::Result<()>) {
    let has = |v4: bool| {
        let mut nets = lan.addresses.iter();
        nets.any(|net| net.addr().is_ipv4() == v4 && !is_link_local(net.addr()))
    };
    let (mut sockets, mut listeners, mut result) = (Vec::new(), Vec::new(), Ok(()));
    for v4 in [true, false].into_iter().filter(|v4| has(*v4)) {
        match bind(lan, v4) {
            Ok(socket) => sockets.push(socket),
            Err(error) => result = Err(error),
        }
        match listen_tcp(lan, v4) {
            Ok(listener) => listeners.push(listener),
            Err(error) => result = Err(error),
        }
    }
    (sockets, listeners, result)
}

/// Hears connections that come by this interface alone.
fn listen_tcp(lan: &Lan, v4: bool) -> io::Result<TcpListener> {
    let domain = if v4 { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind_device(Some(lan.name.as_bytes()))?;
    let any = if v4 {
        SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT))
    } else {
        socket.set_only_v6(true)?;
        SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT))
    };
    socket.bind(&any.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// A socket in the group, on this interface alone: what it hears came from there, and what it says goes there.
fn bind(Lan { index, name, .. }: &Lan, v4: bool) -> io::Result<(Arc<UdpSocket>, SocketAddr)> {
    let IfIndex(index) = index;
    let domain = if v4 { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_reuse_address(true)?; // Another interface has one, too.
    socket.set_nonblocking(true)?;
    socket.bind_device(Some(name.as_bytes()))?;
    let group = if v4 {
        SocketAddr::V4(SocketAddrV4::new(GROUP_V4, PORT))
    } else {
        socket.set_only_v6(true)?;
        SocketAddr::V6(SocketAddrV6::new(GROUP_V6, PORT, 0, index.get()))
    };
    socket.bind(&group.into())?;
    if v4 {
        let interface = InterfaceIndexOrAddress::Index(index.get());
        socket.join_multicast_v4_n(&GROUP_V4, &interface)?;
        socket.set_multicast_ttl_v4(1)?;
        socket.set_multicast_loop_v4(false)?;
    } else {
        socket.join_multicast_v6(&GROUP_V6, index.get())?;
        socket.set_multicast_if_v6(index.get())?;
        socket.set_multicast_hops_v6(1)?;
        socket.set_multicast_loop_v6(false)?;
    }
    let socket = UdpSocket::from_std(socket.into())?;
    Ok((Arc::new(socket), group))
}

/// Passes on what comes; what nobody has time for is dropped.
async fn listen(socket: Arc<UdpSocket>, place: usize, heard: mpsc::Sender<Datagram>) {
    let mut buffer = [0; LEN_MAX + 1];
    loop {
        let (length, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                tracing::debug!(%error, "cannot hear neighbours");
                time::sleep(RETRY).await;
                continue;
            }
        };
        let datagram = Datagram {
            place,
            from: from.ip(),
            bytes: buffer.get(..length).unwrap_or_default().to_vec(),
        };
        if let Err(mpsc::error::TrySendError::Closed(_)) = heard.try_send(datagram) {
            return;
        }
    }
}

fn in_words(counts: &Counts) -> BTreeMap<String, u64> {
    let refused = counts.refused.iter();
    let refused = refused.map(|(reason, count)| (reason.as_str(), *count));
    let all = [("sent", counts.sent), ("believed", counts.believed)];
    all.into_iter()
        .chain(refused)
        .map(|(name, count)| (name.to_owned(), count))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lan(name: &str, nets: &[&str]) -> Lan {
        Lan {
            index: IfIndex::new(7).unwrap(),
            name: name.to_owned(),
            addresses: nets.iter().map(|net| net.parse().unwrap()).collect(),
            gateways: [IpAddr::from([192, 168, 1, 1])].into(),
            multicast: true,
        }
    }

    #[test]
    fn a_lan_suits_unless_nobody_can_be_there_or_it_is_pods_or_it_costs() {
        let rule = |interface: &str, metered| UplinkRule {
            interface: NamePattern::new(interface.to_owned()),
            weight: None,
            metered,
        };
        let uplinks = [rule("wwan0", true), rule("eth*", false)];
        let own = [NamePattern::new("veth*".to_owned())].into();
        let pods: [IpNet; 1] = ["10.42.1.0/24".parse().unwrap()];
        let suits = |lan: &Lan| suits(lan, &uplinks, &own, &pods);
        assert!(suits(&lan("eth0", &["192.168.1.11/24"])));
        assert!(suits(&lan("eth0", &["fd07::11/64"])));
        for (name, nets) in [
            ("eth0", &["198.51.100.7/32"] as &[&str]),
            ("eth0", &["fe80::1/64"]),
            ("cni0", &["10.42.1.1/24", "fe80::1/64"]),
            ("veth7", &["192.168.1.11/24"]),
            ("wwan0", &["192.168.1.11/24"]),
        ] {
            assert!(!suits(&lan(name, nets)), "{name} {nets:?}");
        }
        let deaf = Lan {
            multicast: false,
            ..lan("eth0", &["192.168.1.11/24"])
        };
        assert!(!suits(&deaf));
    }
}
