//! What operators do, when everything works.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    thread,
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{node::Node, tool};

use crate::world::{EDGE, PATIENCE, Transport, World, kubelet_client};

/// A port of the pod's.
const PORT: u16 = 7_000;

#[test]
fn kubectl_works_by_the_proxys_socket() -> Result<()> {
    let world = World::new(Transport::Uds)?;
    logs_sessions_ports_and_metrics(&world)?;
    written_down(&world)?;
    let opened = world.audited("the API server is known", |line| line["event"] == "opened")?;
    ensure!(opened["client"] == serde_json::json!(["uid:0"]), "{opened}");
    ensure!(opened["rule"] == 1, "{opened}");
    ssh(&world)?;
    world.mesh.ends_well()
}

/// A shell on the node, from the proxy's machine.
fn ssh(world: &World) -> Result<()> {
    let (edge, gateway) = (world.mesh.node(EDGE)?, world.mesh.cloud());
    let path = |node: &Node, name: &str| node.dir().join(name).display().to_string();
    for (node, name) in [(&edge, "host"), (gateway, "operator")] {
        let key = path(node, name);
        let words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", &key];
        node.run(&words, PATIENCE)?.ok()?;
    }
    let key = |node: &Node, name: &str| fs::read_to_string(node.dir().join(name));
    edge.write("authorized", &key(gateway, "operator.pub")?)?;
    let known = format!("{EDGE} {}", key(&edge, "host.pub")?);
    gateway.write("known", &known)?;
    let config = format!(
        "Port 22\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin yes\n",
        path(&edge, "host"),
        path(&edge, "authorized")
    );
    let config = edge.write("sshd_config", &config)?.display().to_string();
    fs::create_dir_all("/run/sshd")?; // Its empty root.
    let mut sshd = edge.spawn("sshd", &["/usr/sbin/sshd", "-D", "-e", "-f", &config])?;
    tool::eventually("sshd listens", PATIENCE, || {
        sshd.running()?;
        ensure!(sshd.log().contains("Server listening"), "{}", sshd.log());
        Ok(())
    })?;
    let proxy = world.file("proxy.sock").display().to_string();
    let command = format!("{} tunnel %h:%p --proxy {proxy}", world.mesh.bin("meshctl"));
    let ssh = |target: &str, script: &str| {
        let words = [
            "ssh".to_owned(),
            "-F/dev/null".to_owned(),
            format!("-oProxyCommand={command}"),
            format!("-oUserKnownHostsFile={}", path(gateway, "known")),
            "-oStrictHostKeyChecking=yes".to_owned(),
            "-oBatchMode=yes".to_owned(),
            format!("-i{}", path(gateway, "operator")),
            format!("root@{target}"),
            script.to_owned(),
        ];
        gateway.run(&words, PATIENCE)
    };
    let there = ssh(EDGE, "readlink /proc/self/ns/net; exit 3")?;
    ensure!(there.status.code() == Some(3), "{there:?}");
    let expected = edge
        .run(&["readlink", "/proc/self/ns/net"], PATIENCE)?
        .ok()?;
    ensure!(there.stdout == expected, "{there:?} is not {expected}");
    let many = ssh(EDGE, "head -c 20000000 /dev/zero | tr '\\0' x")?.ok()?;
    ensure!(many.len() == 20_000_000, "{}", many.len());
    // Who may not is told by `ssh`, by way of `meshctl`.
    let refused = ssh("edge-b1", "true")?;
    let reason = "no rule lets the client reach port 22 of edge-b1";
    ensure!(refused.stderr.contains(reason), "{refused:?}");
    Ok(())
}

#[test]
fn kubectl_curl_and_a_scraper_work_by_mutual_tls() -> Result<()> {
    let world = World::new(Transport::Tls)?;
    logs_sessions_ports_and_metrics(&world)?;
    written_down(&world)?;
    let opened = world.audited("the API server is known", |line| line["event"] == "opened")?;
    let names = serde_json::json!(["cn:kube-apiserver", "o:control-plane"]);
    ensure!(opened["client"] == names, "{opened}");
    let from = opened["from"].as_str().unwrap_or_default();
    ensure!(from.starts_with("198.51.100.20:"), "{opened}");

    // As Prometheus with `proxy_url` does, by the node's name.
    let own = kubelet_client(&world)?;
    let own = own.each_ref().map(String::as_str);
    let url = format!("https://{EDGE}:10250/metrics");
    let scraped = world
        .curl("prometheus", &[&own[..], &[&url]].concat())?
        .ok()?;
    ensure!(
        scraped.contains("kubelet_http_requests_total "),
        "{scraped}"
    );
    // And by the names that certificates do not have.
    for host in ["100.96.1.1", "edge-a1.mesh"] {
        let url = format!("https://{host}:10250/metrics");
        let insecure = [&own[2..], &["--insecure", &url]].concat();
        let scraped = world.curl("prometheus", &insecure)?.ok()?;
        ensure!(
            scraped.contains("kubelet_http_requests_total "),
            "{scraped}"
        );
    }
    let line = world.audited("the scraper is known", |line| {
        line["event"] == "closed" && line["client"][0] == "cn:prometheus"
    })?;
    ensure!(line["node"] == EDGE && line["rule"] == 2, "{line}");
    ensure!(line["from_node_bytes"].as_u64() > Some(500), "{line}");
    world.mesh.ends_well()
}

#[test]
fn an_api_server_in_the_mesh_needs_no_proxy_but_the_nodes_overlay_addresses() -> Result<()> {
    let world = World::new(Transport::Routed)?;
    logs_sessions_ports_and_metrics(&world)?;
    ensure!(world.audit()?.is_empty(), "{:?}", world.audit()?);
    world.mesh.ends_well()
}

fn logs_sessions_ports_and_metrics(world: &World) -> Result<()> {
    // Logs: all, the end, and as they come.
    let said = world.kubectl(&["logs", "web"])?.ok()?;
    ensure!(said == "first\nsecond\n", "{said:?}");
    let said = world.kubectl(&["logs", "web", "--tail=1"])?.ok()?;
    ensure!(said == "second\n", "{said:?}");
    let mut follows = world.spawn_kubectl("follows", &["logs", "web", "-f", "--tail=1"])?;
    for line in ["second\n", "third\n", "fourth\n"] {
        if line != "second\n" {
            world.log(line)?;
        }
        tool::eventually("the line comes", PATIENCE, || {
            let log = follows.log();
            ensure!(log.ends_with(line), "{log:?}");
            Ok(())
        })?;
    }
    ensure!(
        follows.log() == "second\nthird\nfourth\n",
        "{:?}",
        follows.log()
    );
    follows.running()?;
    follows.kill()?;

    // Sessions: both outputs, the exit code, what is typed; on the node, not here.
    let script = "echo out; echo err >&2; exit 7";
    let ended = world.kubectl(&["exec", "web", "--", "sh", "-c", script])?;
    ensure!(ended.status.code() == Some(7), "{ended:?}");
    ensure!(
        ended.stdout == "out\n" && ended.stderr.starts_with("err\n"),
        "{ended:?}"
    );
    let there = world
        .kubectl(&["exec", "web", "--", "readlink", "/proc/self/ns/net"])?
        .ok()?;
    let expected = world
        .mesh
        .node(EDGE)?
        .run(&["readlink", "/proc/self/ns/net"], PATIENCE)?
        .ok()?;
    ensure!(there == expected, "{there} is not {expected}");
    let typed = world
        .api
        .write("typed", &"all that is typed\n".repeat(10_000))?;
    let kubeconfig = world.api.dir().join("kubeconfig");
    let shell = format!(
        "kubectl --kubeconfig {} -n shop exec -i web -- sha256sum < {1}; sha256sum < {1}",
        kubeconfig.display(),
        typed.display()
    );
    let sums = world.api.run(&["bash", "-c", &shell], PATIENCE)?.ok()?;
    let sums: Vec<_> = sums.lines().collect();
    ensure!(sums.len() == 2 && sums[0] == sums[1], "{sums:?}");

    terminal(world)?;

    // Ports: several connections by one session, each with its end.
    let echo = world
        .mesh
        .node(EDGE)?
        .enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, PORT)))??;
    thread::spawn(move || {
        for stream in echo.incoming() {
            let mut stream = stream.unwrap();
            let mut heard = Vec::new();
            stream.read_to_end(&mut heard).unwrap();
            heard.reverse();
            stream.write_all(&heard).unwrap();
        }
    });
    let ports = format!("18000:{PORT}");
    let mut forwards = world.spawn_kubectl("forwards", &["port-forward", "pod/web", &ports])?;
    tool::eventually("the port is forwarded", PATIENCE, || {
        forwards.running()?;
        let log = forwards.log();
        ensure!(log.contains("Forwarding from 127.0.0.1:18000"), "{log}");
        Ok(())
    })?;
    for text in ["hello", &"longer ".repeat(100_000)] {
        let connect = || TcpStream::connect((Ipv4Addr::LOCALHOST, 18_000));
        let mut client = world.api.enter(connect)??;
        client.set_read_timeout(Some(PATIENCE))?;
        client.write_all(text.as_bytes())?;
        client.shutdown(Shutdown::Write)?;
        let mut answer = Vec::new();
        let read = client.read_to_end(&mut answer);
        read.with_context(|| forwards.log())?;
        answer.reverse();
        ensure!(
            answer == text.as_bytes(),
            "{} bytes came back",
            answer.len()
        );
    }
    forwards.kill()?;

    // Metrics, as by the API server.
    let path = format!("/api/v1/nodes/{EDGE}/proxy/metrics");
    let metrics = world.kubectl(&["get", "--raw", &path])?.ok()?;
    ensure!(
        metrics.contains("kubelet_http_requests_total "),
        "{metrics}"
    );

    Ok(())
}

/// A session at a terminal (`exec -it`): it has one there, as large as the one here, and what is typed comes line by line.
fn terminal(world: &World) -> Result<()> {
    let there = "echo ready; read line; echo \"got $line\"; \
                 until [ \"$(stty size)\" = '43 132' ]; do sleep 0.1; done; echo \"at $(tty)\"; exit 5";
    let script = world.api.write("there", there)?;
    let kubeconfig = world.api.dir().join("kubeconfig");
    let here = format!(
        "stty rows 43 cols 132; exec kubectl --kubeconfig {} -n shop exec -it web -- sh {}",
        kubeconfig.display(),
        script.display()
    );
    let (reader, mut typed) = std::io::pipe()?;
    let mut command = world
        .api
        .command(&["script", "-qefc", &here, "/dev/null"])?;
    command.stdin(reader);
    let mut session = world.api.spawn_with("terminal", command)?;
    tool::eventually("the session began", PATIENCE, || {
        session.running()?;
        let log = session.log();
        ensure!(log.contains("ready"), "{log}");
        Ok(())
    })?;
    typed.write_all(b"what is tyq\x7fped\r")?;
    let ended = session.wait(PATIENCE)?;
    let log = session.log();
    ensure!(ended.code() == Some(5), "{ended}: {log}");
    // The line was edited there.
    ensure!(log.contains("got what is typed\r\n"), "{log}");
    ensure!(log.contains("at /dev/pts/"), "{log}");
    Ok(())
}

/// All of that went by the proxy.
fn written_down(world: &World) -> Result<()> {
    let closed = world.audited("what was typed is counted", |line| {
        line["event"] == "closed" && line["to_node_bytes"].as_u64() > Some(180_000)
    })?;
    ensure!(closed["asked"] == format!("{EDGE}:10250"), "{closed}");
    ensure!(closed["to"] == "100.96.1.1:10250", "{closed}");
    ensure!(world.count("allowed")? >= 8);
    ensure!(world.count("refused")? == 0 && world.count("audit_lost")? == 0);
    Ok(())
}
