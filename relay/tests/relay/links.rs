//! What links are for.

use std::{
    sync::mpsc as std_mpsc,
    thread,
    time::{Duration, Instant},
};

use mesh_relay::client::{ConnectError, LinkEvent, SendError};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::harness::{Mesh, Node, PATIENCE, Quic, Relay, Tls, Transport, counter, field, id};

/// WireGuard's data packet around a full-size inner packet.
const FULL_SIZE: usize = 1280 + 32;

#[tokio::test]
async fn nodes_exchange_packets_of_all_sizes_by_every_mix_of_transports() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    // Nodes of their own for each mix: who comes back is absent to the other until the relay has told it.
    for (number, a, b) in [
        (1, Quic, Quic),
        (3, Quic, Tls),
        (5, Tls, Quic),
        (7, Tls, Tls),
    ] {
        let mut a = Node::connect(&mesh, &relay, number, a).await;
        let mut b = Node::connect(&mesh, &relay, number + 1, b).await;
        // The first goes out before the relay was asked; the last is the longest that may.
        for size in [1, 148, FULL_SIZE, 1532] {
            let packet = vec![0xa5; size];
            a.send(&b, &packet);
            assert_eq!(b.data().await, (a.id, packet.clone()));
            b.send(&a, &packet);
            assert_eq!(a.data().await, (b.id, packet));
        }
        assert_eq!(a.link.send(&b.id, &[0; 1533]), Err(SendError::TooLarge));
        assert!(a.link.rtt().is_some_and(|rtt| rtt < PATIENCE));
    }
    assert_eq!(counter(&relay.stop(), "queue_dropped_frames"), 0);
}

#[tokio::test]
async fn prometheus_sees_what_the_relay_did() {
    let mesh = Mesh::new();
    let relay = mesh.relay_with("metrics_listen = \"127.0.0.1:0\"");
    let line = relay.logged("metrics are shown").await;
    let at = field(&line, "listen=");
    let a = Node::connect(&mesh, &relay, 1, Quic).await;
    let mut b = Node::connect(&mesh, &relay, 2, Tls).await;
    a.send(&b, b"one");
    b.data().await;
    let mut stream = TcpStream::connect(at).await.unwrap();
    let request = b"GET /metrics HTTP/1.1\r\nHost: relay\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).await.unwrap();
    for line in [
        "holdfast_relay_links 2",
        "holdfast_relay_forwarded_frames_total 1",
        "holdfast_relay_forwarded_bytes_total 3",
        "holdfast_relay_refused_or_dropped_total{reason=\"queue_dropped_frames\"} 0",
    ] {
        assert!(page.lines().any(|found| found == line), "{line} in {page}");
    }
    assert_eq!(counter(&relay.stop(), "forwarded_frames"), 1);
}

#[tokio::test]
async fn a_burst_of_full_size_packets_arrives() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    for transport in [Quic, Tls] {
        let a = Node::connect(&mesh, &relay, 1, transport).await;
        let mut b = Node::connect(&mesh, &relay, 2, transport).await;
        a.send(&b, b"first");
        b.data().await;
        // Less than any queue on the way holds.
        for n in 0..100 {
            a.send(&b, &[n; FULL_SIZE]);
        }
        for _ in 0..100 {
            assert_eq!(b.data().await.1.len(), FULL_SIZE);
        }
    }
}

#[tokio::test]
async fn a_peer_that_comes_later_or_goes_is_announced() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    for transport in [Quic, Tls] {
        let mut a = Node::connect(&mesh, &relay, 1, transport).await;
        a.link.find_peer(id(2));
        a.expect_peer(id(2), false).await;
        assert_eq!(a.try_send(id(2)), Err(SendError::Absent));
        let mut b = Node::connect(&mesh, &relay, 2, transport).await;
        a.expect_peer(id(2), true).await;
        b.expect_peer(id(1), true).await;
        b.send(&a, b"hello");
        assert_eq!(a.data().await, (id(2), b"hello".to_vec()));
        b.link.close();
        a.expect_peer(id(2), false).await;
        assert_eq!(a.try_send(id(2)), Err(SendError::Absent));
        assert_eq!(b.try_send(id(1)), Err(SendError::Closed));
    }
}

/// Sends until it arrives: around a change of links packets may get lost, as on any path.
async fn deliver(from: &Node, to: &mut Node, bytes: &[u8]) {
    let delivered = async {
        loop {
            from.send(to, bytes);
            let received = async { while to.data().await.1 != bytes {} };
            let received = tokio::time::timeout(Duration::from_millis(100), received).await;
            if received.is_ok() {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, delivered)
        .await
        .expect("a packet in time");
}

#[tokio::test]
async fn a_node_is_reached_by_the_transport_it_uses() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    let mut a = Node::connect(&mesh, &relay, 1, Quic).await;
    let mut by_quic = Node::connect(&mesh, &relay, 2, Quic).await;
    let mut by_tls = Node::connect(&mesh, &relay, 2, Tls).await;
    deliver(&a, &mut by_tls, b"newest").await;
    deliver(&by_quic, &mut a, b"I am here").await;
    deliver(&a, &mut by_quic, b"there you are").await;
    drop(by_quic);
    deliver(&by_tls, &mut a, b"moved").await;
    deliver(&a, &mut by_tls, b"fine").await;
}

#[tokio::test]
async fn a_reconnect_replaces_the_old_link() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    for transport in [Quic, Tls] {
        let a = Node::connect(&mesh, &relay, 1, transport).await;
        let mut old = Node::connect(&mesh, &relay, 2, transport).await;
        a.send(&old, b"one");
        old.data().await;
        let mut new = Node::connect(&mesh, &relay, 2, transport).await;
        assert_eq!(
            old.lost().await,
            "replaced by a newer connection of this node"
        );
        a.send(&new, b"two");
        assert_eq!(new.data().await.1, b"two");
    }
    assert_eq!(counter(&relay.stop(), "links_replaced"), 2);
}

#[tokio::test]
async fn a_certificate_of_another_mesh_is_refused() {
    let (mesh, other) = (Mesh::new(), Mesh::new());
    let relay = mesh.relay();
    for transport in [Quic, Tls] {
        let refused = Node::try_connect(other.node_credentials(1), &relay, transport).await;
        let error = refused.err().expect("a refusal");
        assert!(matches!(error, ConnectError::Refused(_)), "{error}");
    }
    let log = relay.stop();
    assert_eq!(counter(&log, "failed_handshakes"), 2);
}

#[tokio::test]
async fn a_node_that_trusts_the_relay_but_is_of_another_mesh_is_refused_by_the_relay() {
    // A client that skips its own check of the relay, as an attacker would: its authority is the
    // relay's, its certificate is not.
    let (mesh, other) = (Mesh::new(), Mesh::new());
    let relay = mesh.relay();
    let forged = crate::bad_input::forged_client(&mesh, &other);
    let stream = tokio::net::TcpStream::connect(relay.tls).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(forged));
    let name = "r1.relay.test".try_into().unwrap();
    let mut stream = connector.connect(name, stream).await.unwrap(); // TLS 1.3: not checked yet.
    let mut byte = [0];
    let read = tokio::io::AsyncReadExt::read(&mut stream, &mut byte).await;
    assert!(read.is_err(), "{read:?}");
    assert_eq!(counter(&relay.stop(), "failed_handshakes"), 1);
}

#[tokio::test]
async fn a_site_that_comes_back_at_once_gets_in() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    // More handshakes at once than QUIC sources may begin unproven.
    let all: Vec<_> = (1..=40).map(|n| (n, mesh.node_credentials(n))).collect();
    let connecting = all.into_iter().map(|(n, credentials)| {
        let transport = if n % 4 == 0 { Tls } else { Quic };
        Node::try_connect(credentials, &relay, transport)
    });
    let nodes = futures_util::future::join_all(connecting).await;
    let refused: Vec<_> = nodes
        .iter()
        .filter_map(|node| node.as_ref().err())
        .collect();
    assert!(refused.is_empty(), "{refused:?}");
}

#[tokio::test]
async fn a_full_relay_says_so_and_stays_useful() {
    let mesh = Mesh::new();
    let relay = mesh.relay_with("clients_max = 2");
    let _replaced_below = Node::connect(&mesh, &relay, 1, Quic).await;
    let mut b = Node::connect(&mesh, &relay, 2, Tls).await;
    for transport in [Quic, Tls] {
        let third = Node::try_connect(mesh.node_credentials(3), &relay, transport).await;
        let error = third.err().expect("a refusal");
        assert_eq!(error.to_string(), "the relay is full");
    }
    // It is one of the two, and takes no new place.
    let a = Node::connect(&mesh, &relay, 1, Quic).await;
    a.send(&b, b"still here");
    assert_eq!(b.data().await.1, b"still here");
    assert_eq!(counter(&relay.stop(), "links_refused"), 2);
}

/// A node whose runtime stands still: its kernel takes what fits its socket, and no more.
struct Frozen {
    thaw: std_mpsc::Sender<()>,
    thread: thread::JoinHandle<()>,
}

fn frozen(mesh: &Mesh, relay: &Relay, n: u8, transport: Transport) -> Frozen {
    let (thaw, thawed) = std_mpsc::channel();
    let (up, is_up) = std_mpsc::channel();
    let credentials = mesh.node_credentials(n);
    let address = relay.addresses();
    let thread = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let runtime = runtime.unwrap();
        let node = runtime.block_on(Node::try_connect_to(credentials, address, transport));
        up.send(()).unwrap();
        thawed.recv().ok(); // Or the test failed.
        drop(node);
    });
    is_up.recv().unwrap();
    Frozen { thaw, thread }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_stands_still_delays_nobody_and_costs_little() {
    for transport in [Quic, Tls] {
        let mesh = Mesh::new();
        let relay = mesh.relay();
        let slow = frozen(&mesh, &relay, 9, transport);
        let mut a = Node::connect(&mesh, &relay, 1, transport).await;
        let mut b = Node::connect(&mesh, &relay, 2, transport).await;
        a.link.find_peer(id(9));
        a.expect_peer(id(9), true).await;
        a.send(&b, b"first");
        b.data().await;
        let before_kib = relay.resident_kib();

        // 39 MB to the slow one; a round trip with the fast one every 100 packets.
        let mut slowest = Duration::ZERO;
        for round in 0..300_u32 {
            for _ in 0..100 {
                a.link.send(&id(9), &[0; FULL_SIZE]).ok(); // The point is that it goes nowhere.
            }
            let asked = Instant::now();
            // Unreliable, as any path: asked again until answered.
            let answer = async {
                loop {
                    a.send(&b, &round.to_be_bytes());
                    let wait = tokio::time::timeout(Duration::from_millis(300), b.data()).await;
                    if wait.is_ok_and(|(_, bytes)| bytes == round.to_be_bytes()) {
                        return;
                    }
                }
            };
            tokio::time::timeout(PATIENCE, answer)
                .await
                .expect("an answer in time");
            slowest = slowest.max(asked.elapsed());
        }
        let grown_kib = relay.resident_kib().saturating_sub(before_kib);
        println!("{transport:?}: slowest {slowest:?}, grown {grown_kib} KiB");
        assert!(
            slowest < Duration::from_secs(2),
            "{transport:?}: {slowest:?}"
        );
        // 256 KiB of queue, 2 MiB in flight at most, the fast links' buffers, the allocator.
        assert!(grown_kib < 24 * 1024, "{transport:?}: {grown_kib} KiB");
        slow.thaw.send(()).unwrap();
        slow.thread.join().unwrap();
        drop((a, b));
        assert!(counter(&relay.stop(), "queue_dropped_frames") > 0);
    }
}

#[tokio::test]
async fn packets_over_a_nodes_rate_are_dropped_and_counted() {
    let mesh = Mesh::new();
    let relay = mesh.relay_with("client_rate_mbit_per_s = 1");
    let a = Node::connect(&mesh, &relay, 1, Tls).await;
    let mut b = Node::connect(&mesh, &relay, 2, Tls).await;
    a.send(&b, b"first");
    b.data().await;
    for _ in 0..100 {
        a.send(&b, &[1; FULL_SIZE]); // 131 kB; 65 kB may go at once.
    }
    deliver(&a, &mut b, b"").await; // In order: the burst is over.
    drop((a, b));
    assert!(counter(&relay.stop(), "rate_limited_frames") > 10);
}

#[tokio::test]
async fn stopping_is_announced_and_then_ends_every_link() {
    let mesh = Mesh::new();
    let mut relay = mesh.relay();
    let mut nodes = [
        Node::connect(&mesh, &relay, 1, Quic).await,
        Node::connect(&mesh, &relay, 2, Tls).await,
    ];
    let asked = Instant::now();
    relay.terminate();
    for node in &mut nodes {
        assert_eq!(node.event().await, LinkEvent::GoAway);
    }
    let [quic, tls] = &mut nodes;
    // Still of use, so that traffic can move away without a gap.
    quic.send(tls, b"bye");
    assert_eq!(tls.data().await.1, b"bye");
    for node in &mut nodes {
        assert_eq!(node.lost().await, "the relay is stopping");
    }
    assert!(relay.wait().success());
    assert!(
        asked.elapsed() < Duration::from_secs(10),
        "{:?}",
        asked.elapsed()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_relay_that_nobody_uses_stops_at_once() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    let node = Node::connect(&mesh, &relay, 1, Quic).await;
    drop(node);
    let mut other = Node::connect(&mesh, &relay, 2, Tls).await;
    relay.terminate();
    assert_eq!(other.event().await, LinkEvent::GoAway);
    other.link.close();
    let asked = Instant::now();
    relay.stop();
    assert!(
        asked.elapsed() < Duration::from_secs(2),
        "{:?}",
        asked.elapsed()
    );
}
