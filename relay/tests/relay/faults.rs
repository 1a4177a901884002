//! Relays that vanish.

use std::time::{Duration, Instant};

use mesh_relay::client::{ConnectError, QUIC_CONNECT_TIMEOUT};
use mesh_wire::id::Identity;
use tokio::time;

use crate::harness::{Mesh, Node, PATIENCE, Quic, Relay, Tls, command, id};

#[tokio::test]
async fn a_node_learns_at_once_that_its_relay_was_killed_and_started_again() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    let listen = relay.addresses();
    let mut by_quic = Node::connect(&mesh, &relay, 1, Quic).await;
    let mut by_tls = Node::connect(&mesh, &relay, 2, Tls).await;
    by_quic.send(&by_tls, b"one");
    by_tls.data().await;

    relay.kill();
    by_tls.lost().await; // The kernel said so.
    let config = mesh.configure(Some(listen), "");
    let relay = Relay::start(command(&config));
    let restarted = Instant::now();
    let reason = async {
        loop {
            by_quic.try_send(id(2)).ok(); // What provokes the reset.
            let lost = time::timeout(Duration::from_millis(50), by_quic.lost()).await;
            if let Ok(reason) = lost {
                return reason;
            }
        }
    };
    let reason = time::timeout(PATIENCE, reason)
        .await
        .expect("the end of the link");
    assert_eq!(reason, "the relay does not know this connection any more");
    println!("noticed {:?} after the restart", restarted.elapsed());

    let by_quic = Node::connect(&mesh, &relay, 1, Quic).await;
    let mut by_tls = Node::connect(&mesh, &relay, 2, Tls).await;
    by_quic.send(&by_tls, b"two");
    assert_eq!(by_tls.data().await.1, b"two");
}

#[tokio::test]
async fn a_relay_that_is_not_there_is_given_up_in_time() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    relay.terminate();
    let mut relay = relay;
    relay.wait();
    let asked = Instant::now();
    let by_quic = Node::try_connect(mesh.node_credentials(1), &relay, Quic).await;
    let error = by_quic.err().expect("no relay");
    assert!(matches!(error, ConnectError::Timeout { .. }), "{error}");
    assert!(asked.elapsed() < QUIC_CONNECT_TIMEOUT * 2);
    let by_tls = Node::try_connect(mesh.node_credentials(1), &relay, Tls).await;
    let error = by_tls.err().expect("no relay");
    assert!(matches!(error, ConnectError::Io(_)), "{error}");
}

#[tokio::test]
async fn a_link_that_the_node_closes_is_not_lost() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    for transport in [Quic, Tls] {
        let node = Node::connect(&mesh, &relay, 1, transport).await;
        assert_eq!(node.close().await, None);
    }
}

#[tokio::test]
async fn a_certificate_that_is_replaced_is_shown_without_a_restart() {
    let mesh = Mesh::new();
    let identity = Identity::Relay("r1".parse().unwrap());
    let show = |lifetime| {
        let credentials = mesh.credentials_for(&identity, Duration::from_secs(lifetime));
        mesh.write("relay.key", &credentials.key_pem());
        mesh.write("relay.pem", &credentials.chain_pem());
    };
    show(3);
    let relay = mesh.relay();
    let mut before = Node::connect(&mesh, &relay, 1, Quic).await;
    mesh.write("relay.pem", "half of a file");
    relay.logged("cannot be used").await;
    // By now the first one is over: who comes would not believe it.
    let refused = Node::try_connect(mesh.node_credentials(2), &relay, Tls).await;
    assert!(matches!(refused, Err(ConnectError::Refused(_))));
    show(3600);
    relay.logged("a new certificate is shown").await;
    for (n, transport) in [(2, Quic), (3, Tls)] {
        let mut late = Node::connect(&mesh, &relay, n, transport).await;
        late.send(&before, b"late");
        assert_eq!(before.data().await, (id(n), b"late".to_vec()));
        before.send(&late, b"before");
        assert_eq!(late.data().await, (id(1), b"before".to_vec()));
    }
}
