//! Plain UDP beside QUIC, as a node's packet path uses it: its own socket, batches by UDP_SEGMENT.

use std::{
    collections::HashMap,
    io::{ErrorKind, IoSliceMut},
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use mesh_relay::client::{Link, LinkEvent, UdpPort};
use mesh_wire::{
    id::NodeId,
    relay::{
        HEADER_LEN, Session, data_frame, data_header,
        udp::{BindKey, UdpFrame, data_session, ping_frame},
    },
};
use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use tokio::{sync::mpsc, time};

use crate::harness::{Mesh, Node, PATIENCE, Quic, Relay, Tls, counter, id};

/// Header, WireGuard's 32 and a full-size inner packet.
const FRAME_LEN: usize = 8 + 32 + 1280;

/// The node's port: what the packet path does with it, in small.
struct Port {
    socket: UdpSocket,
    state: UdpSocketState,
    relay: SocketAddr,
    /// Receives nothing any more, as behind a firewall.
    deaf: AtomicBool,
    /// Receives of many datagrams.
    batches: AtomicUsize,
}

impl Port {
    fn new(relay: SocketAddr) -> Arc<Self> {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let state = UdpSocketState::new((&socket).into()).unwrap();
        socket.set_nonblocking(false).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        Arc::new(Self {
            socket,
            state,
            relay,
            deaf: AtomicBool::new(false),
            batches: AtomicUsize::new(0),
        })
    }

    fn send(&self, datagrams: &[u8], segment_len: usize) {
        let transmit = Transmit {
            destination: self.relay,
            ecn: None,
            contents: datagrams,
            segment_size: (datagrams.len() > segment_len).then_some(segment_len),
            src_ip: None,
        };
        self.state.send((&self.socket).into(), &transmit).unwrap();
    }

    /// Hands every datagram on, until `stop`.
    fn receive(&self, stop: &AtomicBool, mut on_datagram: impl FnMut(&[u8])) {
        let mut buffer = vec![0; 1 << 17];
        while !stop.load(Relaxed) {
            let mut meta = [RecvMeta::default()];
            let mut slices = [IoSliceMut::new(&mut buffer)];
            match self
                .state
                .recv((&self.socket).into(), &mut slices, &mut meta)
            {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                Err(error) => panic!("{error}"),
            }
            let [RecvMeta { len, stride, .. }] = meta;
            if self.deaf.load(Relaxed) {
                continue;
            }
            self.batches.fetch_add(usize::from(len > stride), Relaxed);
            buffer[..len]
                .chunks(stride.max(1))
                .for_each(&mut on_datagram);
        }
    }
}

/// A node with a QUIC link and a port beside it.
struct UdpNode {
    node: Node,
    /// The one in use; a test may put another in its place, as a NAT would.
    port: Arc<Mutex<Arc<Port>>>,
    stop: Arc<AtomicBool>,
    readers: Vec<thread::JoinHandle<()>>,
    data: mpsc::UnboundedReceiver<(Session, Vec<u8>)>,
    to_data: mpsc::UnboundedSender<(Session, Vec<u8>)>,
    peers: HashMap<NodeId, Session>,
}

impl UdpNode {
    /// Connected, but not bound yet.
    async fn connect(mesh: &Mesh, relay: &Relay, n: u8) -> Self {
        let port = Arc::new(Mutex::new(Port::new(relay.quic)));
        let sender = port.clone();
        let udp = UdpPort {
            send: Arc::new(move |datagram| {
                let port = sender.lock().unwrap().clone();
                port.send(datagram, datagram.len());
            }),
            frame_len: FRAME_LEN,
        };
        let credentials = mesh.node_credentials(n);
        let node = Node::try_connect_with(credentials, relay.addresses(), Quic, Some(udp)).await;
        let (to_data, data) = mpsc::unbounded_channel();
        let mut node = node.unwrap();
        node.id = id(n);
        let mut this = Self {
            node,
            port,
            stop: Arc::default(),
            readers: Vec::new(),
            data,
            to_data,
            peers: HashMap::new(),
        };
        this.read_port();
        this
    }

    async fn bound(mesh: &Mesh, relay: &Relay, n: u8) -> Self {
        let mut this = Self::connect(mesh, relay, n).await;
        this.expect_bound(true).await;
        this
    }

    fn port(&self) -> Arc<Port> {
        self.port.lock().unwrap().clone()
    }

    fn read_port(&mut self) {
        let (port, stop) = (self.port(), self.stop.clone());
        let (data, link): (_, Arc<Link>) = (self.to_data.clone(), self.node.link.clone());
        self.readers.push(thread::spawn(move || {
            port.receive(&stop, |datagram| match data_session(datagram) {
                Some(session) => {
                    data.send((session, datagram.to_vec())).ok(); // The test is over.
                }
                None => link.handle_datagram(datagram.to_vec()),
            });
        }));
    }

    async fn expect_bound(&mut self, expected: bool) {
        loop {
            if let LinkEvent::Udp { bound } = self.node.event().await {
                assert_eq!(bound, expected);
                if expected {
                    // The other way round, it may be bound again by now.
                    assert!(self.node.link.udp_sessions().is_some());
                    let ping = ping_frame(0, 0); // Sooner than the link's own.
                    self.port().send(&ping, ping.len());
                }
                return;
            }
        }
    }

    /// The session with a peer, which is asked for.
    async fn meet(&mut self, peer: NodeId) -> Session {
        self.node.link.find_peer(peer);
        let found = async {
            loop {
                let sessions = self.node.link.udp_sessions().unwrap_or_default();
                if let Some(session) = sessions.get(&peer) {
                    return *session;
                }
                time::sleep(Duration::from_millis(2)).await;
            }
        };
        let session = time::timeout(PATIENCE, found).await.expect("a session");
        self.peers.insert(peer, session);
        session
    }

    fn send(&self, peer: NodeId, packet: &[u8]) {
        let frame = data_frame(self.peers[&peer], packet);
        self.port().send(&frame, frame.len());
    }

    /// The next packet by plain UDP.
    async fn data(&mut self) -> Vec<u8> {
        let data = time::timeout(PATIENCE, self.data.recv()).await;
        let (session, mut frame) = data.expect("a packet in time").unwrap();
        assert!(self.peers.values().any(|known| *known == session));
        frame.split_off(HEADER_LEN)
    }
}

impl Drop for UdpNode {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for reader in self.readers.drain(..) {
            reader.join().ok(); // A panic there has been printed.
        }
    }
}

/// Two bound nodes with a session.
async fn pair(mesh: &Mesh, relay: &Relay) -> (UdpNode, UdpNode) {
    let mut a = UdpNode::bound(mesh, relay, 1).await;
    let mut b = UdpNode::bound(mesh, relay, 2).await;
    assert_eq!(a.meet(id(2)).await, b.meet(id(1)).await);
    (a, b)
}

fn batch(session: Session, frames: u8, frame_len: usize) -> Vec<u8> {
    let frame = |n| {
        [
            &data_header(session)[..],
            &vec![n; frame_len - HEADER_LEN][..],
        ]
        .concat()
    };
    (0..frames).flat_map(frame).collect()
}

#[tokio::test]
async fn batches_pass_both_ways_unchanged_and_stay_batches() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    let (mut a, mut b) = pair(&mesh, &relay).await;
    for _ in 0..2 {
        let session = a.peers[&b.node.id];
        let mut bytes = batch(session, 40, FRAME_LEN);
        bytes.truncate(bytes.len() - 100); // The last may be shorter.
        a.port().send(&bytes, FRAME_LEN);
        for n in 0..40 {
            let len = FRAME_LEN - HEADER_LEN - if n == 39 { 100 } else { 0 };
            assert_eq!(b.data().await, vec![n; len]);
        }
        (a, b) = (b, a);
    }
    for node in [&a, &b] {
        let batches = node.port().batches.load(Relaxed);
        assert!((1..=3).contains(&batches), "{batches} batches of 40 frames");
    }
    drop((a, b));
    let log = relay.stop();
    assert_eq!(counter(&log, "forwarded_frames"), 80);
    assert_eq!(counter(&log, "binds"), 2);
    assert_eq!(counter(&log, "queue_dropped_frames"), 0);
}

#[tokio::test]
async fn one_batch_may_hold_frames_for_many_peers() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    let (mut a, mut b) = pair(&mesh, &relay).await;
    let mut c = UdpNode::bound(&mesh, &relay, 3).await;
    let (to_b, to_c) = (a.peers[&id(2)], a.meet(id(3)).await);
    c.meet(id(1)).await;
    let runs = [(to_b, 3), (to_c, 2), (to_b, 1), (to_c, 4)];
    let bytes: Vec<_> = runs
        .iter()
        .flat_map(|&(session, frames)| batch(session, frames, 200))
        .collect();
    a.port().send(&bytes, 200);
    for n in [0, 1, 2, 0] {
        assert_eq!(b.data().await, [n; 192]);
    }
    for n in [0, 1, 0, 1, 2, 3] {
        assert_eq!(c.data().await, [n; 192]);
    }
}

#[tokio::test]
async fn a_node_with_plain_udp_talks_with_one_that_has_quic_or_tls_only() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    for transport in [Quic, Tls] {
        let mut a = UdpNode::bound(&mesh, &relay, 1).await;
        let mut b = Node::connect(&mesh, &relay, 2, transport).await;
        let session = a.meet(id(2)).await;
        a.port().send(&batch(session, 40, FRAME_LEN), FRAME_LEN);
        for n in 0..40 {
            assert_eq!(b.data().await, (id(1), vec![n; FRAME_LEN - HEADER_LEN]));
        }
        let dropped = b.link.send_batch(&id(1), &[7; 30 * 1312 + 500], 1312);
        assert_eq!(dropped, 0);
        for n in 0..=30 {
            let len = if n == 30 { 500 } else { 1312 };
            assert_eq!(a.data().await, vec![7; len]);
        }
    }
    assert_eq!(counter(&relay.stop(), "queue_dropped_frames"), 0);
}

#[tokio::test]
async fn a_nat_that_maps_anew_costs_a_moment_by_quic() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    let (mut a, mut b) = pair(&mesh, &relay).await;
    b.send(id(1), b"one");
    assert_eq!(a.data().await, b"one");
    *b.port.lock().unwrap() = Port::new(relay.quic);
    b.read_port();
    b.send(id(1), b"from an address that nobody knows"); // The answer makes it bind again.
    b.expect_bound(false).await;
    b.expect_bound(true).await;
    b.send(id(1), b"two");
    assert_eq!(a.data().await, b"two");
    a.send(id(2), b"three");
    assert_eq!(b.data().await, b"three");
    drop((a, b));
    let log = relay.stop();
    assert_eq!(counter(&log, "unbound_frames"), 1);
    assert_eq!(counter(&log, "binds"), 3);
}

#[tokio::test]
async fn where_plain_udp_dies_the_quic_link_takes_over() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    let (mut a, mut b) = pair(&mesh, &relay).await;
    let died = Instant::now();
    b.port().deaf.store(true, Relaxed);
    b.expect_bound(false).await;
    let after = died.elapsed();
    // 1.7 s by the timers, on a machine that is busy with other builds.
    assert!(after < Duration::from_secs(4), "{after:?}");
    // Unreliable around the change, as any path.
    let arrived = async {
        loop {
            a.send(id(2), b"by quic?");
            let wait = Duration::from_millis(100);
            if let Ok((_, bytes)) = time::timeout(wait, b.node.data()).await {
                return assert_eq!(bytes, b"by quic?");
            }
        }
    };
    time::timeout(PATIENCE, arrived).await.expect("a packet");
    b.node.send(&a.node, b"hello");
    assert_eq!(a.data().await, b"hello");
}

#[tokio::test]
async fn an_address_is_worth_nothing_after_its_link() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    let (a, mut b) = pair(&mesh, &relay).await;
    let (port, session) = (a.port(), a.peers[&id(2)]);
    a.node.link.close();
    while b.node.link.udp_sessions().unwrap().contains_key(&id(1)) {
        b.node.event().await;
    }
    drop(a);
    port.send(&data_frame(session, b"still there?"), 20);
    let unbound = loop {
        // Behind what the reader of `a` left.
        let mut answer = [0; 100];
        let len = port.socket.recv(&mut answer).unwrap();
        match UdpFrame::decode(&answer[..len]) {
            Ok(UdpFrame::Unbound { session, .. }) => break session,
            other => println!("{other:?}"),
        }
    };
    assert_eq!(unbound, session);
    assert_eq!(counter(&relay.stop(), "unbound_frames"), 1);
}

#[test]
fn a_stranger_gets_no_more_than_it_sends_and_reaches_nobody() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    stranger
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    let key = BindKey {
        id: 0,
        key: [1; 32],
    };
    let session = Session {
        number: 0,
        epoch: 0,
    };
    let mut all = vec![
        key.ask_for_cookie(1),
        key.bind(1, [2; 32], FRAME_LEN),
        data_frame(session, &[0; 1312]),
        data_frame(session, &[0; 8]),
        data_frame(session, &[]),
        ping_frame(1, 0),
        vec![0x20],
        vec![0x22; 8],
        vec![0x3f; 1500],
    ];
    all.extend((0x20..0x40).map(|kind| vec![kind; 100]));
    let mut answer = [0; 2000];
    let mut answered = 0;
    for datagram in &all {
        stranger.send_to(datagram, relay.quic).unwrap();
        let mut got = 0;
        while let Ok(len) = stranger.recv(&mut answer) {
            got += len;
            answered += 1;
            if got > 0 {
                break; // Nothing is answered twice; what comes late counts for the next.
            }
        }
        assert!(got <= datagram.len(), "{got} for {}", datagram.len());
    }
    stranger
        .set_read_timeout(Some(Duration::from_millis(1)))
        .unwrap();
    assert!(stranger.recv(&mut answer).is_err(), "two answers to one");
    assert!(answered > 4, "{answered}");
    let log = relay.stop();
    assert_eq!(counter(&log, "binds"), 0);
    assert_eq!(counter(&log, "forwarded_frames"), 0);
    assert!(counter(&log, "bad_frames") > 25);
}

#[tokio::test]
async fn a_flood_from_nowhere_is_counted_and_hardly_answered() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    let (mut a, mut b) = pair(&mesh, &relay).await;
    let flood = Port::new(relay.quic);
    let frames = batch(a.peers[&id(2)], 40, FRAME_LEN);
    for _ in 0..500 {
        flood.send(&frames, FRAME_LEN);
    }
    b.send(id(1), b"through");
    assert_eq!(a.data().await, b"through");
    let (stop, mut answers) = (AtomicBool::new(false), 0);
    thread::scope(|scope| {
        scope.spawn(|| flood.receive(&stop, |_| answers += 1));
        thread::sleep(Duration::from_millis(300));
        stop.store(true, Relaxed);
    });
    // 256 at once, and some more while the flood lasted.
    assert!((1..1000).contains(&answers), "{answers}");
    a.send(id(2), b"unharmed");
    assert_eq!(b.data().await, b"unharmed");
    drop((a, b));
    assert!(counter(&relay.stop(), "unbound_frames") > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_reads_nothing_delays_nobody() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    let (mut a, mut b) = pair(&mesh, &relay).await;
    let mut slow = UdpNode::bound(&mesh, &relay, 9).await;
    let to_slow = a.meet(id(9)).await;
    slow.meet(id(1)).await;
    // Its kernel takes what fits the socket's buffer and drops the rest.
    slow.stop.store(true, Relaxed);
    let frames = batch(to_slow, 40, FRAME_LEN);
    let mut slowest = Duration::ZERO;
    for round in 0..300_u32 {
        for _ in 0..3 {
            a.port().send(&frames, FRAME_LEN);
        }
        let asked = Instant::now();
        let answer = async {
            loop {
                a.send(id(2), &round.to_be_bytes());
                let wait = time::timeout(Duration::from_millis(300), b.data()).await;
                if wait.is_ok_and(|bytes| bytes == round.to_be_bytes()) {
                    return;
                }
            }
        };
        time::timeout(PATIENCE, answer).await.expect("an answer");
        slowest = slowest.max(asked.elapsed());
    }
    println!("slowest {slowest:?}");
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    b.send(id(1), b"fine");
    assert_eq!(a.data().await, b"fine");
}
