//! Garbage, other people's protocols, and configurations with mistakes.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream, UdpSocket},
    os::unix::fs::PermissionsExt as _,
    process::Output,
    sync::Arc,
};

use mesh_identity::tls::client_config;
use mesh_wire::{
    id::Identity,
    relay::{ALPN_TLS, WEBSOCKET_PATH},
};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned, pki_types::PrivateKeyDer,
};

use crate::harness::{Mesh, Node, PATIENCE, Quic, Tls, command, counter};

/// A client that trusts `mesh` and shows a certificate of `other`.
pub(crate) fn forged_client(mesh: &Mesh, other: &Mesh) -> ClientConfig {
    let trusted = mesh.node_credentials(1);
    let shown = other.node_credentials(1);
    let mut roots = RootCertStore::empty();
    roots.add(trusted.authority().clone()).unwrap();
    let key = rustls::pki_types::pem::PemObject::from_pem_slice(shown.key_pem().as_bytes());
    let key: PrivateKeyDer<'static> = key.unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(shown.chain().to_vec(), key)
        .unwrap()
}

/// What the relay answers to `request` inside TLS, to a node of its mesh.
fn http(mesh: &Mesh, relay: SocketAddr, request: &str) -> String {
    let config = client_config(&mesh.node_credentials(1), &[ALPN_TLS]).unwrap();
    let name = "r1.relay.test".try_into().unwrap();
    let connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let stream = TcpStream::connect(relay).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut stream = StreamOwned::new(connection, stream);
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_plain_http_request_gets_a_polite_answer() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(10_000));
    for (request, status) in [
        ("GET / HTTP/1.1\r\nHost: r1\r\n\r\n", "404 Not Found"),
        (
            &format!("GET {WEBSOCKET_PATH} HTTP/1.1\r\nHost: r1\r\n\r\n"),
            "426 Upgrade Required",
        ),
        (
            "POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
            "404 Not Found",
        ),
        ("\0\0\0\0 garbage\r\n\r\n", "404 Not Found"),
        (&long, "404 Not Found"),
    ] {
        let answer = http(&mesh, relay.tls, request);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}\r\n")),
            "{answer:?}"
        );
    }
    assert_eq!(counter(&relay.stop(), "plain_http_requests"), 5);
}

/// Numbers without pattern, the same in every run (xorshift64).
fn noise(seed: u64) -> impl Iterator<Item = u8> {
    let mut state = seed;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_be_bytes()[0]
    })
}

#[tokio::test]
async fn garbage_to_every_port_does_no_harm_and_is_counted() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    for (n, length) in (0..400_u64).zip((0..1400).cycle().step_by(7)) {
        let garbage: Vec<u8> = noise(n + 1).take(length).collect();
        socket.send_to(&garbage, relay.quic).unwrap();
        socket.send_to(&garbage, relay.stun).unwrap();
    }
    for n in 0..20 {
        let mut stream = TcpStream::connect(relay.tls).unwrap();
        let garbage: Vec<u8> = noise(n + 1).take(500).collect();
        stream.write_all(&garbage).ok(); // The relay may have hung up already.
    }
    let a = Node::connect(&mesh, &relay, 1, Quic).await;
    let mut b = Node::connect(&mesh, &relay, 2, Tls).await;
    a.send(&b, b"fine");
    assert_eq!(b.data().await.1, b"fine");
    let log = relay.stop();
    assert!(counter(&log, "garbage_datagrams") >= 400, "{log}");
    assert!(counter(&log, "failed_handshakes") >= 20, "{log}");
}

#[tokio::test]
async fn bad_frames_of_a_node_are_counted_and_its_link_lives() {
    use futures_util::SinkExt as _;
    use tokio_tungstenite::tungstenite::Message;

    let mesh = Mesh::new();
    let relay = mesh.relay();
    let config = client_config(&mesh.node_credentials(1), &[ALPN_TLS]).unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let stream = tokio::net::TcpStream::connect(relay.tls).await.unwrap();
    let stream = connector
        .connect("r1.relay.test".try_into().unwrap(), stream)
        .await
        .unwrap();
    let url = format!("wss://r1.relay.test{WEBSOCKET_PATH}");
    let (mut socket, _) = tokio_tungstenite::client_async(url, stream).await.unwrap();
    let version = mesh_wire::relay::PROTOCOL_VERSION;
    let hello = mesh_wire::relay::Control::Hello { version };
    let hello = mesh_wire::relay::control_frame(&hello);
    socket.send(Message::binary(hello)).await.unwrap();
    for length in [0, 7, 8, 9, 1540] {
        let garbage: Vec<u8> = noise(7).take(length).collect();
        socket.send(Message::binary(garbage)).await.unwrap();
    }
    let session = mesh_wire::relay::Session {
        number: 77,
        epoch: 1,
    };
    let unknown = mesh_wire::relay::data_frame(session, b"to nobody");
    socket.send(Message::binary(unknown)).await.unwrap();
    let gone = mesh_wire::relay::control_frame(&mesh_wire::relay::Control::SessionGone { session });
    let told = async {
        use futures_util::StreamExt as _;
        while let Some(message) = socket.next().await {
            if message.unwrap() == Message::binary(gone.clone()) {
                return;
            }
        }
        panic!("the link ended");
    };
    tokio::time::timeout(PATIENCE, told)
        .await
        .expect("an answer");
    drop(socket);
    let log = relay.stop();
    assert_eq!(counter(&log, "bad_frames"), 5);
    assert_eq!(counter(&log, "no_session_frames"), 1);
}

fn run(mesh: &Mesh, config: &str) -> Output {
    mesh.write("bad.toml", config);
    command(&mesh.path("bad.toml")).output().unwrap()
}

#[test]
fn mistakes_in_the_configuration_are_named() {
    let mesh = Mesh::new();
    let other = Mesh::new();
    let good = fs::read_to_string(mesh.configure(None, "")).unwrap();
    let foreign = other.credentials(&Identity::Relay("r1".parse().unwrap()));
    mesh.write("foreign.pem", &foreign.chain_pem());
    let node = mesh.node_credentials(1);
    mesh.write("node.pem", &node.chain_pem());
    mesh.write("node.key", &node.key_pem());
    for (what, config, expected) in [
        (
            "typo",
            good.replace("tls_listen", "tls_lisen"),
            "unknown field `tls_lisen`, expected one of",
        ),
        (
            "typo, line",
            good.replace("tls_listen", "tls_lisen"),
            "line 6",
        ),
        (
            "typo, file",
            good.replace("tls_listen", "tls_lisen"),
            "bad.toml",
        ),
        (
            "missing",
            good.replace("key =", "# key ="),
            "missing field `key`",
        ),
        (
            "not an address",
            good.replace("127.0.0.1:0", "localhost"),
            "\"localhost\" is not an address with a port, such as 0.0.0.0:",
        ),
        (
            "no such file",
            good.replace("relay.pem", "nothing.pem"),
            "nothing.pem: No such file",
        ),
        (
            "another mesh's",
            good.replace("relay.pem", "foreign.pem"),
            "certificate",
        ),
        (
            "a node's",
            good.replace("relay.pem", "node.pem")
                .replace("relay.key", "node.key"),
            "`name` is r1, but the certificate belongs to spiffe://test/node/node-1/",
        ),
        (
            "nobody may come",
            format!("{good}clients_max = 0"),
            "`clients_max` must lie between 1 and",
        ),
    ] {
        let output = run(&mesh, &config);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(64), "{what}: {text}");
        assert!(text.contains(expected), "{what}: {text}");
        assert!(text.matches("No such file").count() <= 1, "{what}: {text}");
    }
    let missing = command(&mesh.path("nothing.toml")).output().unwrap();
    assert_eq!(missing.status.code(), Some(64));
}

#[test]
fn a_key_that_others_may_read_is_said_with_what_to_do() {
    let mesh = Mesh::new();
    let config = fs::read_to_string(mesh.configure(None, "")).unwrap();
    let config = config.replace("name = \"r1\"", "name = \"r2\"");
    let advice = format!("chmod 600 {}", mesh.path("relay.key").display());
    for (mode, warned) in [(0o644, true), (0o600, false)] {
        fs::set_permissions(mesh.path("relay.key"), fs::Permissions::from_mode(mode)).unwrap();
        let text = String::from_utf8(run(&mesh, &config).stderr).unwrap();
        let line = text.lines().find(|line| line.contains(&advice));
        assert_eq!(line.is_some(), warned, "{mode:o}: {text}");
        assert!(line.is_none_or(|line| line.contains("WARN")), "{text}");
    }
}

#[test]
fn a_port_in_use_is_named_with_its_key() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    for (listen, expected) in [
        (
            [relay.quic, any, any],
            format!("cannot listen on UDP {} (`quic_listen`)", relay.quic),
        ),
        (
            [any, relay.tls, any],
            format!("cannot listen on TCP {} (`tls_listen`)", relay.tls),
        ),
        (
            [any, any, relay.stun],
            format!("cannot listen on UDP {} (`stun_listen`)", relay.stun),
        ),
    ] {
        let output = command(&mesh.configure(Some(listen), "")).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(
            text.contains(&expected) && text.contains("in use"),
            "{text}"
        );
    }
}
