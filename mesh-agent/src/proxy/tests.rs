use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr},
    os::unix::fs::MetadataExt as _,
};

use mesh_core::{
    pattern::NamePattern,
    proxy::Rule,
    snapshot::{Locality, MeshSettings},
};
use mesh_wire::id::MeshId;
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::mpsc,
    task::JoinHandle,
};

use super::*;

const SOON: Duration = Duration::from_secs(10);

/// A proxy at a Unix socket, in a mesh whose overlay is this machine's loopback: `here` is 127.0.0.1 and ::1,
/// `edge-a1` 127.0.0.2.
struct World {
    folder: TempDir,
    proxy: Proxy,
    stop: CancellationToken,
    serve: JoinHandle<anyhow::Result<()>>,
    _view: watch::Sender<Option<Arc<View>>>,
}

fn node(last: u8, name: &str) -> Node {
    Node {
        id: NodeId([last; 32]),
        name: name.parse().unwrap(),
        locality: Locality::default(),
        overlay_v4: Ipv4Addr::new(127, 0, 0, last),
        overlay_v6: Ipv6Addr::LOCALHOST,
        prefixes: Vec::new(),
        pod_prefixes: Vec::new(),
        underlay_addresses: Vec::new(),
        static_candidates: Vec::new(),
        mapped: Vec::new(),
    }
}

impl World {
    fn new(change: impl FnOnce(&mut ProxySettings)) -> Self {
        let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(MeshId([0; 32]), "m"));
        for node in [node(1, "here"), node(2, "edge-a1")] {
            snapshot.nodes.insert(node.name.clone(), node);
        }
        let folder = tempfile::tempdir().unwrap();
        let mut settings = ProxySettings {
            socket: Some(folder.path().join("proxy.sock")),
            tls: None,
            audit_log: folder.path().join("audit.jsonl"),
            connections_max: 10,
            connections_per_client_max: 10,
            connect_timeout: Duration::from_secs(1),
            idle_timeout: Duration::from_secs(60),
            unanswered_timeout: Duration::from_secs(5),
            rules: vec![Rule {
                clients: vec![ClientName::Uid(uid())],
                nodes: vec![NamePattern::new("edge-*".to_owned())],
                sites: Vec::new(),
                ports: vec![1_024..=u16::MAX],
            }],
        };
        change(&mut settings);
        let view = View::new(Arc::new(snapshot), "here".parse().unwrap());
        let (sender, view) = watch::channel(Some(Arc::new(view)));
        let (driver, _) = mpsc::channel(1);
        let stop = CancellationToken::new();
        let (proxy, serve) = Proxy::new(settings, view, DriverHandle(driver), stop.clone());
        Self {
            folder,
            proxy,
            stop,
            serve: tokio::spawn(serve),
            _view: sender,
        }
    }

    async fn connect(&self) -> UnixStream {
        let path = self.folder.path().join("proxy.sock");
        let deadline = Instant::now() + SOON;
        loop {
            match UnixStream::connect(&path).await {
                Ok(stream) => return stream,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Asks, as an API server does, and hears the first line of the answer.
    async fn ask(&self, target: &str) -> (String, UnixStream) {
        let mut stream = self.connect().await;
        let request = format!("CONNECT {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let head = head(&mut stream).await;
        (head.lines().next().unwrap().to_owned(), stream)
    }

    fn count(&self, name: &str) -> u64 {
        self.proxy.counts()[name]
    }

    async fn until_closed(&self) {
        let deadline = Instant::now() + SOON;
        while self.count("open") > 0 {
            assert!(Instant::now() < deadline, "{:?}", self.proxy.counts());
            time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Stops it, and reads what it wrote down.
    async fn audit(self) -> Vec<Value> {
        self.stop.cancel();
        time::timeout(SOON, self.serve)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        let text = fs::read_to_string(self.folder.path().join("audit.jsonl"));
        let text = text.unwrap_or_default();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

fn uid() -> u32 {
    fs::metadata("/proc/self").unwrap().uid()
}

async fn head(stream: &mut UnixStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

/// Somebody on `edge-a1`, and the port.
async fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.2:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// A listener whose full backlog swallows what asks for a connection, as a node that is gone does.
struct Silent {
    at: SocketAddr,
    _listener: TcpListener,
    _waiting: Vec<TcpStream>,
}

impl Silent {
    async fn new() -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        let listener = socket.listen(0).unwrap();
        let at = listener.local_addr().unwrap();
        let mut waiting = Vec::new();
        while let Ok(Ok(stream)) =
            time::timeout(Duration::from_millis(100), TcpStream::connect(at)).await
        {
            waiting.push(stream);
        }
        Self {
            at,
            _listener: listener,
            _waiting: waiting,
        }
    }
}

#[tokio::test]
async fn bytes_go_both_ways_with_half_close_and_are_written_down() {
    let world = World::new(|_| {});
    let (listener, port) = listener().await;
    let (said, mut client) = world.ask(&format!("edge-a1:{port}")).await;
    assert_eq!(said, "HTTP/1.1 200 OK");
    let (mut server, from) = listener.accept().await.unwrap();
    assert_eq!(
        from.ip().to_string(),
        "127.0.0.1",
        "the node's own overlay address"
    );
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut question = String::new();
    server.read_to_string(&mut question).await.unwrap();
    server.write_all(b"an answer").await.unwrap();
    drop(server);
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert_eq!(
        (question.as_str(), answer.as_str()),
        ("question", "an answer")
    );
    world.until_closed().await;
    assert_eq!(
        (world.count("allowed"), world.count("to_node_bytes")),
        (1, 8)
    );
    let lines = world.audit().await;
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert_eq!(
        (&lines[0]["event"], &lines[1]["event"]),
        (&"opened".into(), &"closed".into())
    );
    assert_eq!(lines[0]["id"], lines[1]["id"]);
    let closed = &lines[1];
    assert_eq!(
        closed["client"],
        serde_json::json!([format!("uid:{}", uid())])
    );
    assert_eq!(closed["from"], format!("pid {}", std::process::id()));
    assert_eq!(closed["asked"], format!("edge-a1:{port}"));
    assert_eq!(closed["to"], format!("127.0.0.2:{port}"));
    assert_eq!(
        (
            closed["to_node_bytes"].as_u64(),
            closed["from_node_bytes"].as_u64()
        ),
        (Some(8), Some(9))
    );
    assert_eq!(closed["why"], "both sides were done");
}

#[tokio::test]
async fn what_is_not_allowed_is_refused_with_a_reason_in_the_first_line_and_the_audit_log() {
    let world = World::new(|_| {});
    // The proxy's own loopback has a listener, and so has this node: neither is to be had.
    let loopback = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = loopback.local_addr().unwrap().port();
    for (target, code, reason) in [
        (format!("127.0.0.3:{port}"), "403", "is no node of the mesh"),
        (format!("localhost:{port}"), "403", "is no node of the mesh"),
        (
            format!("[::ffff:127.0.0.1]:{port}"),
            "403",
            "is no node of the mesh",
        ),
        (
            format!("here:{port}"),
            "403",
            "no rule lets the client reach port",
        ),
        ("edge-a1:22".to_owned(), "403", "reach port 22 of edge-a1"),
        (
            "example.org:443".to_owned(),
            "403",
            "is no node of the mesh",
        ),
    ] {
        let (said, _) = world.ask(&target).await;
        assert!(
            said.starts_with(&format!("HTTP/1.1 {code} ")),
            "{target}: {said}"
        );
        assert!(said.contains(reason), "{target}: {said}");
    }
    let nobody = time::timeout(Duration::from_millis(50), loopback.accept()).await;
    assert!(nobody.is_err(), "{nobody:?}");
    let mut stream = world.connect().await;
    let get = b"GET http://edge-a1:9100/metrics HTTP/1.1\r\nHost: edge-a1\r\n\r\n";
    stream.write_all(get).await.unwrap();
    let head = head(&mut stream).await;
    assert!(
        head.starts_with("HTTP/1.1 405 ") && head.contains("allow: CONNECT"),
        "{head}"
    );
    assert_eq!((world.count("refused"), world.count("allowed")), (7, 0));
    let lines = world.audit().await;
    assert_eq!(lines.len(), 7);
    assert!(
        lines.iter().all(|line| line["event"] == "refused"),
        "{lines:?}"
    );
    assert_eq!(
        lines[4]["why"],
        "no rule lets the client reach port 22 of edge-a1"
    );
}

#[tokio::test]
async fn who_no_rule_names_gets_nothing() {
    let world = World::new(|settings| {
        settings.rules[0].clients = vec![ClientName::Uid(uid() + 1)];
    });
    let (listener, port) = listener().await;
    let (said, _) = world.ask(&format!("edge-a1:{port}")).await;
    assert_eq!(said, "HTTP/1.1 403 no rule of this proxy names the client");
    let nobody = time::timeout(Duration::from_millis(50), listener.accept()).await;
    assert!(nobody.is_err(), "{nobody:?}");
}

#[tokio::test]
async fn strangers_who_say_nothing_do_not_take_all_places() {
    let world = World::new(|settings| {
        settings.rules[0].clients = vec![ClientName::Uid(uid() + 1)];
    });
    let mut waiting = Vec::new();
    for _ in 0..STRANGERS_MAX {
        waiting.push(world.connect().await);
    }
    let mut more = world.connect().await;
    let ended = time::timeout(SOON, more.read_u8()).await.unwrap();
    assert!(ended.is_err(), "{ended:?}");
    assert_eq!(world.count("refused"), 1);
    drop(waiting.pop());
    let deadline = Instant::now() + SOON;
    loop {
        let mut again = world.connect().await;
        let request = b"CONNECT edge-a1:10250 HTTP/1.1\r\nHost: x\r\n\r\n";
        if again.write_all(request).await.is_ok() && again.read_u8().await.is_ok() {
            break;
        }
        assert!(Instant::now() < deadline);
    }
}

#[tokio::test]
async fn a_node_that_refuses_and_one_that_is_silent_are_told_apart() {
    let world = World::new(|settings| {
        settings.connect_timeout = Duration::from_millis(300);
    });
    let (gone, port) = listener().await;
    drop(gone);
    let (said, _) = world.ask(&format!("edge-a1:{port}")).await;
    let expected =
        format!("HTTP/1.1 502 nobody listens at port {port} of edge-a1 (127.0.0.2:{port})");
    assert_eq!(said, expected);
    let silent = Silent::new().await;
    let at = silent.at;
    let (said, _) = world.ask(&format!("edge-a1:{}", at.port())).await;
    let expected = format!(
        "HTTP/1.1 504 no answer from port {} of edge-a1 in 300ms",
        at.port()
    );
    assert_eq!(said, expected);
    assert_eq!(world.count("failed"), 2);
}

#[tokio::test]
async fn connections_of_one_client_and_in_all_are_limited_and_a_place_comes_free_again() {
    for (per_client, in_all, code, reason) in [
        (2, 10, "429", "the client has 2 connections"),
        (10, 2, "503", "this proxy has 2 connections"),
    ] {
        let world = World::new(|settings| {
            settings.connections_per_client_max = per_client;
            settings.connections_max = in_all;
        });
        let (listener, port) = listener().await;
        let target = format!("edge-a1:{port}");
        let (_, one) = world.ask(&target).await;
        let (_, two) = world.ask(&target).await;
        let (said, _) = world.ask(&target).await;
        assert!(said.contains(code) && said.contains(reason), "{said}");
        drop(one);
        drop(listener.accept().await.unwrap()); // Both sides are done.
        let deadline = Instant::now() + SOON;
        while !world.ask(&target).await.0.contains(" 200 ") {
            assert!(Instant::now() < deadline);
        }
        drop(two);
    }
}

#[tokio::test]
async fn who_does_not_read_costs_no_memory_and_holds_up_nobody() {
    let world = World::new(|_| {});
    let (listener, port) = listener().await;
    let target = format!("edge-a1:{port}");
    let (_, slow) = world.ask(&target).await;
    let (mut flood, _) = listener.accept().await.unwrap();
    let chunk = [7; 65_536];
    let mut sent = 0;
    // Until the kernel's own buffers on the way are full.
    while let Ok(written) = time::timeout(Duration::from_millis(200), flood.write(&chunk)).await {
        sent += written.unwrap();
    }
    let handed_on = world.proxy.0.sessions().in_all();
    assert_eq!(handed_on, 1);
    // Of what the kernel does not hold itself, the proxy has 8 KiB: both sockets' buffers are 6 MB at most.
    assert!(sent < 32 << 20, "{sent}");
    let (_, mut quick) = world.ask(&target).await;
    let (mut answers, _) = listener.accept().await.unwrap();
    answers.write_all(b"hello").await.unwrap();
    let mut hello = [0; 5];
    time::timeout(SOON, quick.read_exact(&mut hello))
        .await
        .unwrap()
        .unwrap();
    drop(slow);
    let ended = time::timeout(SOON, async { while flood.write(&chunk).await.is_ok() {} }).await;
    assert!(
        ended.is_ok(),
        "the node does not hear that its client is gone"
    );
}

#[tokio::test]
async fn a_client_that_leaves_while_the_node_is_dialled_is_written_down() {
    let world = World::new(|settings| settings.connect_timeout = SOON);
    let silent = Silent::new().await;
    let at = silent.at;
    let mut client = world.connect().await;
    let request = format!("CONNECT edge-a1:{} HTTP/1.1\r\n\r\n", at.port());
    client.write_all(request.as_bytes()).await.unwrap();
    let deadline = Instant::now() + SOON / 2;
    while world.count("open") == 0 {
        assert!(Instant::now() < deadline);
        time::sleep(Duration::from_millis(5)).await;
    }
    drop(client);
    while world.count("failed") == 0 {
        assert!(Instant::now() < deadline, "{:?}", world.proxy.counts());
        time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(world.count("open"), 0);
    let lines = world.audit().await;
    assert_eq!(lines[0]["why"], CLIENT_GONE);
}

#[tokio::test]
async fn sessions_that_the_agents_end_breaks_off_are_written_down() {
    let world = World::new(|_| {});
    let (_listener, port) = listener().await;
    let (_, mut client) = world.ask(&format!("edge-a1:{port}")).await;
    let lines = world.audit().await;
    let events: Vec<_> = lines.iter().map(|line| &line["event"]).collect();
    assert_eq!(events, ["opened", "closed"]);
    assert_eq!(lines[1]["why"], "the agent stopped");
    let mut rest = Vec::new();
    assert_eq!(client.read_to_end(&mut rest).await.unwrap_or(0), 0);
}

#[tokio::test]
async fn a_full_disk_stops_the_audit_log_and_not_the_proxy() {
    let world = World::new(|settings| settings.audit_log = "/dev/full".into());
    let (_listener, port) = listener().await;
    let (said, _client) = world.ask(&format!("edge-a1:{port}")).await;
    assert_eq!(said, "HTTP/1.1 200 OK");
    let deadline = Instant::now() + SOON;
    while world.count("audit_lost") == 0 {
        assert!(Instant::now() < deadline);
        time::sleep(Duration::from_millis(5)).await;
    }
    let problems = world.proxy.problems().join("\n");
    assert!(
        problems.contains("audit log") && problems.contains("No space left"),
        "{problems}"
    );
}

#[tokio::test]
async fn a_place_that_is_taken_is_a_problem_and_not_the_agents_end() {
    let folder = tempfile::tempdir().unwrap();
    let taken = folder.path().join("taken");
    fs::write(&taken, "").unwrap();
    let world = World::new(|settings| settings.socket = Some(taken.clone()));
    let deadline = Instant::now() + SOON;
    while world.proxy.problems().is_empty() {
        assert!(Instant::now() < deadline);
        time::sleep(Duration::from_millis(5)).await;
    }
    let problems = BTreeSet::from_iter(world.proxy.problems());
    let said = format!(
        "proxy: {0}: {0}: is there already, and no socket",
        taken.display()
    );
    assert_eq!(problems, BTreeSet::from([said]));
    assert!(!world.serve.is_finished());
    assert!(world.audit().await.is_empty());
}

#[test]
fn what_others_wrote_is_shown_short_and_without_orders() {
    assert_eq!(show("a\r\nb\u{1b}[31m\u{202e}"), "a??b?[31m?");
    assert_eq!(show(&"x".repeat(1_000)).len(), SHOWN_CHARS_MAX);
}
