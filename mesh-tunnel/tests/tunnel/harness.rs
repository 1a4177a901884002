//! Two tunnels in two network namespaces on a veth pair, and what is needed to use them.

#[path = "../common/pattern.rs"]
mod pattern;

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{Receiver, SyncSender, channel, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use mesh_linux::{netns, tun::Tun, udp::UdpPair};
use mesh_tunnel::{
    route::RouteTable,
    tunnel::{PrivateKey, RelaySender, Tunnel, TunnelConfig, TunnelEvent, Workers},
};
use mesh_wire::id::{NodeId, RelayId, Via};
use tempfile::NamedTempFile;

pub(crate) use self::pattern::pattern;

/// Longer than anything here takes, shorter than anybody's patience.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Packet threads of a tunnel: more than one, so that tests meet what comes of it.
const WORKERS: usize = 2;

/// Two namespaces joined by a veth pair; gone when dropped, also after a panic.
pub(crate) struct Lab {
    names: [String; 2],
}

/// Which side of the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    A,
    B,
}

impl Side {
    pub(crate) fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    fn number(self) -> u8 {
        self as u8 + 1
    }

    pub(crate) fn underlay_v4(self) -> IpAddr {
        Ipv4Addr::new(192, 0, 2, self.number()).into()
    }

    pub(crate) fn underlay_v6(self) -> IpAddr {
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, self.number().into()).into()
    }

    pub(crate) fn overlay_v4(self) -> IpAddr {
        Ipv4Addr::new(100, 96, 0, self.number()).into()
    }

    pub(crate) fn overlay_v6(self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd12, 0x3456, 0x789a, 0, 0, 0, 0, self.number().into())
    }
}

impl Lab {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let lab = Self {
            names: ["a", "b"].map(|side| format!("hft{}-{number}{side}", std::process::id())),
        };
        for name in &lab.names {
            run(&format!("ip netns add {name}"));
        }
        let [a, b] = &lab.names;
        run(&format!(
            "ip -n {a} link add eth0 mtu 1500 type veth peer name eth0 netns {b}"
        ));
        for side in [Side::A, Side::B] {
            let name = lab.name(side);
            run(&format!("ip -n {name} link set lo up"));
            run(&format!(
                "ip -n {name} addr add {}/24 dev eth0",
                side.underlay_v4()
            ));
            run(&format!(
                "ip -n {name} addr add {}/64 dev eth0 nodad",
                side.underlay_v6()
            ));
            run(&format!("ip -n {name} link set eth0 up"));
        }
        lab
    }

    pub(crate) fn name(&self, side: Side) -> &str {
        &self.names[side as usize]
    }

    pub(crate) fn path(&self, side: Side) -> PathBuf {
        netns::named(self.name(side))
    }

    /// Runs `work` in the namespace of `side`.
    pub(crate) fn on<T: Send>(&self, side: Side, work: impl FnOnce() -> T + Send) -> T {
        netns::run_in(&self.path(side), work).expect("enter the namespace")
    }

    /// Applies rules of `nft` on `side`.
    pub(crate) fn nft(&self, side: Side, rules: &str) {
        let arguments = ["netns", "exec", self.name(side), "nft", rules];
        let status = Command::new("ip").args(arguments).status().unwrap();
        assert!(status.success(), "nft {rules}");
    }

    /// Gives the interface `link` of `side` its overlay addresses and routes.
    pub(crate) fn configure(&self, side: Side, link: &str) {
        let name = self.name(side);
        run(&format!(
            "ip -n {name} addr add {}/12 dev {link}",
            side.overlay_v4()
        ));
        run(&format!(
            "ip -n {name} addr add {}/48 dev {link} nodad",
            side.overlay_v6()
        ));
        run(&format!("ip -n {name} link set {link} mtu 1280 up"));
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in &self.names {
            Command::new("ip")
                .args(["netns", "delete", name])
                .status()
                .ok();
        }
    }
}

/// Runs a command that must succeed.
pub(crate) fn run(command: &str) {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap())
        .args(words)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A node with its tunnel.
pub(crate) struct Node {
    pub(crate) side: Side,
    pub(crate) id: NodeId,
    pub(crate) tunnel: Tunnel,
    pub(crate) events: Receiver<TunnelEvent>,
    _workers: Workers,
}

impl Node {
    pub(crate) fn start(lab: &Lab, side: Side) -> Self {
        let private_key = key(side);
        let (sender, events) = channel();
        let (tun, sockets) = lab.on(side, || {
            let sockets = UdpPair::bind_many(0, WORKERS).unwrap();
            (Tun::create("hf0", WORKERS).unwrap(), sockets)
        });
        lab.configure(side, "hf0");
        let config = TunnelConfig {
            overlay_v6: side.overlay_v6(),
            private_key,
            bursts: true,
        };
        let on_event = move |event| {
            // The receiver is gone when the test is over.
            sender.send(event).ok();
        };
        // Sockets of bursts are opened by a thread of the tunnel's.
        let start = || Tunnel::start(tun, sockets, config, on_event);
        let (tunnel, workers) = lab.on(side, start).unwrap();
        Self {
            side,
            id: tunnel.node_id(),
            tunnel,
            events,
            _workers: workers,
        }
    }

    /// Where the node is reached directly.
    pub(crate) fn direct_v4(&self) -> Via {
        Via::Direct(SocketAddr::new(self.side.underlay_v4(), self.tunnel.port()))
    }

    pub(crate) fn direct_v6(&self) -> Via {
        Via::Direct(SocketAddr::new(self.side.underlay_v6(), self.tunnel.port()))
    }

    /// Waits for the event that `pick` accepts; others are thrown away.
    #[track_caller]
    pub(crate) fn await_event<T>(&self, mut pick: impl FnMut(TunnelEvent) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let event = self
                .events
                .recv_timeout(left)
                .expect("the event did not come");
            if let Some(found) = pick(event) {
                return found;
            }
        }
    }

    /// Waits for a session with `peer`; by which way.
    #[track_caller]
    pub(crate) fn await_handshake(&self, peer: &Self) -> Via {
        self.await_event(|event| match event {
            TunnelEvent::Handshake { peer: id, via } if id == peer.id => Some(via),
            _ => None,
        })
    }
}

pub(crate) fn key(side: Side) -> PrivateKey {
    PrivateKey::new([side.number() + 0x40; 32])
}

/// Two nodes that know each other, without paths.
pub(crate) fn pair(lab: &Lab) -> (Node, Node) {
    let nodes = (Node::start(lab, Side::A), Node::start(lab, Side::B));
    introduce(&nodes.0, &nodes.1);
    introduce(&nodes.1, &nodes.0);
    nodes
}

pub(crate) fn introduce(node: &Node, peer: &Node) {
    node.tunnel.set_known([peer.id].into());
    node.tunnel.set_routes(routes_to(peer));
}

pub(crate) fn routes_to(peer: &Node) -> RouteTable {
    let addresses = [peer.side.overlay_v4(), peer.side.overlay_v6().into()];
    addresses
        .into_iter()
        .map(|ip| (ip.into(), peer.id))
        .collect()
}

/// Makes a session from `a` by `to_b`, and sets the paths.
pub(crate) fn connect(a: &Node, b: &Node, to_b: Via, to_a: Via) {
    // A peer answers one initiation in 20 ms, and the one before may have been just now.
    thread::sleep(Duration::from_millis(25));
    a.tunnel.handshake(&b.id, &[to_b]);
    assert_eq!(a.await_handshake(b), to_b);
    assert_eq!(b.await_handshake(a), to_a);
    a.tunnel.set_path(&b.id, Some(to_b), None, None);
    b.tunnel.set_path(&a.id, Some(to_a), None, None);
}

/// A relay inside this process: a bounded queue and a thread for each direction.
pub(crate) struct FakeRelay {
    queue: Mutex<SyncSender<Vec<u8>>>,
    /// What it says of itself.
    pub(crate) full: AtomicBool,
}

pub(crate) const RELAY: RelayId = RelayId(7);

impl FakeRelay {
    /// Connects both nodes to it. Returns `a`'s way into it.
    pub(crate) fn join(a: &Node, b: &Node) -> Arc<Self> {
        let from_a = Self::towards(b, a.id);
        a.tunnel.set_relay(RELAY, Some(from_a.clone()));
        b.tunnel.set_relay(RELAY, Some(Self::towards(a, b.id)));
        from_a
    }

    fn towards(node: &Node, sender: NodeId) -> Arc<Self> {
        let (queue, datagrams) = sync_channel::<Vec<u8>>(4096);
        let tunnel = node.tunnel.clone();
        // Ends when the sending tunnel lets go of its end.
        thread::spawn(move || {
            for datagram in datagrams {
                tunnel.receive_from_relay(RELAY, sender, &datagram);
            }
        });
        Arc::new(Self {
            queue: Mutex::new(queue),
            full: AtomicBool::new(false),
        })
    }
}

impl RelaySender for FakeRelay {
    fn send(&self, _peer: &NodeId, datagrams: &[u8], segment_len: usize) -> usize {
        let queue = self.queue.lock().unwrap();
        let each = datagrams.chunks(segment_len);
        each.filter(|datagram| queue.try_send(datagram.to_vec()).is_err())
            .count()
    }

    fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }
}

/// Sends `len` bytes of pattern by TCP from `from` to the other side's overlay address `to`, and
/// checks every one. `middle` runs when half is through.
#[track_caller]
pub(crate) fn transfer(lab: &Lab, from: Side, to: IpAddr, len: usize, middle: impl FnOnce()) {
    let listener = lab.on(from.other(), || TcpListener::bind((to, 0)).unwrap());
    let address = listener.local_addr().unwrap();
    let data = pattern(len);
    let (first, second) = data.split_at(len / 2);
    thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut received = Vec::new();
            stream.read_to_end(&mut received).unwrap();
            received
        });
        let mut stream = lab.on(from, || {
            TcpStream::connect_timeout(&address, PATIENCE).unwrap()
        });
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(first).unwrap();
        middle();
        stream.write_all(second).unwrap();
        drop(stream);
        let received = receiver.join().unwrap();
        assert!(
            received == data,
            "{} of {len} bytes arrived, or others",
            received.len()
        );
    });
}

/// A UDP socket of `side`, bound to its overlay address `ip`.
pub(crate) fn udp(lab: &Lab, side: Side, ip: IpAddr) -> UdpSocket {
    let socket = lab.on(side, || UdpSocket::bind((ip, 0)).unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// A WireGuard device by `wireguard-go`; its process ends when dropped.
pub(crate) struct StockDevice {
    pub(crate) id: NodeId,
    name: String,
    namespace: String,
    process: Child,
    _key: NamedTempFile,
}

impl StockDevice {
    /// Starts one on `side` that knows `peer` at `endpoint`.
    pub(crate) fn start(lab: &Lab, side: Side, peer: &Node, endpoint: Via) -> Self {
        let private_key = [side.number() + 0x40; 32];
        let mut key = NamedTempFile::new().unwrap();
        writeln!(key, "{}", NodeId(private_key)).unwrap();
        // The control socket's directory is common to all namespaces.
        let name = format!("wg{}", std::process::id());
        let namespace = lab.name(side).to_owned();
        let process = Command::new("ip")
            .args(["netns", "exec", &namespace, "wireguard-go", "-f", &name])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let device = Self {
            id: PrivateKey::new(private_key).node_id(),
            name,
            namespace,
            process,
            _key: key,
        };
        wait_until("wireguard-go answers", || device.try_wg("show", &[]));
        lab.configure(side, &device.name);
        let Via::Direct(endpoint) = endpoint else {
            panic!("a stock device knows no relays");
        };
        let (path, endpoint) = (device._key.path().to_owned(), endpoint.to_string());
        let (v4, v6) = (peer.side.overlay_v4(), peer.side.overlay_v6());
        let (peer, allowed) = (peer.id.to_string(), format!("{v4}/32,{v6}/128"));
        device.wg(&[
            "private-key",
            path.to_str().unwrap(),
            "listen-port",
            "51820",
        ]);
        device.wg(&[
            "peer",
            &peer,
            "endpoint",
            &endpoint,
            "allowed-ips",
            &allowed,
        ]);
        device
    }

    pub(crate) fn wg(&self, arguments: &[&str]) {
        assert!(self.try_wg("set", arguments), "wg set {arguments:?}");
    }

    fn try_wg(&self, verb: &str, arguments: &[&str]) -> bool {
        let fixed = ["netns", "exec", &self.namespace, "wg", verb, &self.name];
        let output = Command::new("ip")
            .args(fixed)
            .args(arguments)
            .output()
            .unwrap();
        output.status.success()
    }
}

impl Drop for StockDevice {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
        // Killed, it leaves its control socket.
        fs::remove_file(format!("/var/run/wireguard/{}.sock", self.name)).ok();
    }
}

/// Waits until `condition` holds. For counters, which nobody announces.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
