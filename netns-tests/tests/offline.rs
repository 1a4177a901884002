//! A site that is cut off goes on with what its nodes have, and they give each other what is newer; nobody takes it back.

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{mesh::Mesh, tool};
use serde_json::Value;

/// What should happen soon has happened by then, or never will.
const SOON: Duration = Duration::from_secs(20);

/// A node whose mesh is well sends and receives less at rest: its links' keepalives, and acknowledgements.
const QUIET_BYTES_PER_S: u64 = 2048;

const NODES: [&str; 2] = ["edge-a1", "edge-a2"];

const KIOSK: &str = "kiosk.shop.svc.cluster.local";

/// A service of one endpoint, on `edge-a1`, at this port.
fn kiosk(mesh: &Mesh, address: &str) -> Result<()> {
    let text = format!(
        "apiVersion: v1
kind: Service
metadata: {{name: kiosk, namespace: shop}}
spec: {{clusterIP: {address}, ports: [{{port: 80, protocol: TCP}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: kiosk-1, namespace: shop, labels: {{kubernetes.io/service-name: kiosk}}}}
addressType: IPv4
ports: [{{port: 8080, protocol: TCP}}]
endpoints: [{{addresses: [100.96.1.1], nodeName: edge-a1, conditions: {{ready: true}}}}]
"
    );
    Ok(fs::write(mesh.manifests().join("kiosk.yaml"), text)?)
}

fn resolves(mesh: &Mesh, node: &str, address: &str) -> Result<()> {
    let found = mesh.resolve(node, KIOSK)?.to_string();
    ensure!(found == address, "{node} says {found}");
    Ok(())
}

fn number(mesh: &Mesh, node: &str, pointer: &str) -> Result<u64> {
    let status = mesh.status(node)?;
    let number = status.pointer(pointer).and_then(Value::as_u64);
    Ok(number.unwrap_or_default())
}

/// Sent and received by a node's line.
fn bytes(mesh: &Mesh, node: &str) -> Result<u64> {
    let words = ["ip", "-s", "-j", "link", "show", "eth0"];
    let said = mesh.node(node)?.run(&words, SOON)?.ok()?;
    let links: Value = serde_json::from_str(&said)?;
    let of = |way: &str| links.pointer(&format!("/0/stats64/{way}/bytes"))?.as_u64();
    let both = of("rx").zip(of("tx"));
    both.map(|(received, sent)| received + sent).context(said)
}

fn connected(mesh: &Mesh, node: &str) -> Result<()> {
    let status = mesh.status(node)?;
    let connected = status.pointer("/controller/connected") == Some(&true.into());
    ensure!(connected, "{status}");
    Ok(())
}

fn says(mesh: &Mesh, node: &str, word: &str) -> Result<()> {
    let status = mesh.status(node)?;
    let problems = status.get("problems").context("no problems")?.to_string();
    ensure!(problems.contains(word), "{problems}");
    Ok(())
}

fn generation(mesh: &Mesh, node: &str) -> Result<u64> {
    number(mesh, node, "/snapshot/generation")
}

#[test]
fn a_node_of_a_cut_off_site_gets_what_is_newer_from_its_neighbour_and_nothing_flaps_after()
-> Result<()> {
    let mesh = Mesh::one_site_of(&NODES)?;
    mesh.serve("edge-a1", "kiosk", &["http", "edge-a1", "0.0.0.0:8080"])?;
    mesh.kill("edge-a2", "mesh-agent")?;
    let before = generation(&mesh, "edge-a1")?;
    kiosk(&mesh, "10.43.0.99")?;
    tool::eventually("one node knows it", SOON, || {
        resolves(&mesh, "edge-a1", "10.43.0.99")
    })?;
    let newer = generation(&mesh, "edge-a1")?;
    assert!(newer > before, "{newer} after {before}");

    mesh.site("site-a")?.link().set_down(true)?;
    let begin = Instant::now();
    mesh.start_agent("edge-a2")?;
    tool::eventually("the other one has it from its neighbour", SOON, || {
        resolves(&mesh, "edge-a2", "10.43.0.99")
    })?;
    eprintln!(
        "newer state from a neighbour {:?} after the start",
        begin.elapsed()
    );
    assert_eq!(generation(&mesh, "edge-a2")?, newer);
    assert_eq!(
        number(&mesh, "edge-a2", "/lan_announcements/state_taken")?,
        1
    );
    connected(&mesh, "edge-a2").unwrap_err();
    let url = format!("http://{KIOSK}/");
    tool::eventually("the service answers", SOON, || {
        mesh.get("edge-a2", &["-4", &url], Duration::from_secs(2))
    })?;
    // It is kept: with everybody else gone, the next start has it at once.
    mesh.kill("edge-a2", "mesh-agent")?;
    mesh.kill("edge-a1", "mesh-agent")?;
    mesh.start_agent("edge-a2")?;
    tool::eventually("it is on the disk", SOON, || {
        resolves(&mesh, "edge-a2", "10.43.0.99")
    })?;
    mesh.start_agent("edge-a1")?;
    mesh.agent_ready("edge-a1", 2)?;

    kiosk(&mesh, "10.43.0.100")?;
    mesh.site("site-a")?.link().set_down(false)?;
    let begin = Instant::now();
    let mut last = [newer; 2];
    tool::eventually("both have what the controller says", SOON, || {
        for (node, last) in NODES.iter().zip(&mut last) {
            let now = generation(&mesh, node)?;
            assert!(now >= *last, "{node} went back from {last} to {now}");
            *last = now;
            resolves(&mesh, node, "10.43.0.100")?;
            connected(&mesh, node)?;
        }
        // A node that is back tells its controller where it is now: that is one more.
        ensure!(last[0] == last[1], "one is behind: {last:?}");
        Ok(())
    })?;
    eprintln!(
        "all as the controller says {:?} after the line came back",
        begin.elapsed()
    );
    // Another address is a reason to doubt the connection, once.
    let more = ["ip", "addr", "add", "192.168.250.1/32", "dev", "eth0"];
    mesh.node("edge-a1")?.run(&more, SOON)?.ok()?;
    thread::sleep(Duration::from_secs(3)); // What comes of that.
    tool::eventually("they are silent again", SOON, || {
        let (before, pause) = (bytes(&mesh, "edge-a1")?, Duration::from_secs(3));
        thread::sleep(pause);
        let more = bytes(&mesh, "edge-a1")? - before;
        ensure!(more < QUIET_BYTES_PER_S * pause.as_secs(), "{more} bytes");
        Ok(())
    })?;
    mesh.ends_well()
}

#[test]
fn a_controller_restored_from_a_backup_takes_nothing_away_until_its_operator_says_so() -> Result<()>
{
    let mesh = Mesh::one_site_of(&NODES)?;
    let store: PathBuf = mesh.cloud().dir().join("state-controller/controller.redb");
    ensure!(store.is_file(), "{} is not there", store.display());
    mesh.take("cloud", "mesh-controller")?.terminate(SOON)?;
    let backup = fs::read(&store)?;
    mesh.start_controller()?;
    kiosk(&mesh, "10.43.0.99")?;
    for node in NODES {
        tool::eventually("it is known", SOON, || resolves(&mesh, node, "10.43.0.99"))?;
    }
    mesh.take("cloud", "mesh-controller")?.terminate(SOON)?;
    fs::remove_file(mesh.manifests().join("kiosk.yaml"))?;
    fs::write(&store, backup)?;
    mesh.provokes(&["nodes have what this store lost: it was restored from an older copy"]);
    mesh.start_controller()?;
    for node in NODES {
        tool::eventually("it says what is wrong", SOON, || {
            says(&mesh, node, "accept-rollback")
        })?;
        resolves(&mesh, node, "10.43.0.99")?;
    }
    let socket = mesh.cloud().dir().join("controller.sock");
    let words = [
        &mesh.bin("meshctl"),
        "--controller-socket",
        &socket.display().to_string(),
        "controller",
        "accept-rollback",
    ];
    mesh.cloud().run(&words, SOON)?.ok()?;
    for node in NODES {
        tool::eventually("what was restored counts", Duration::from_secs(60), || {
            connected(&mesh, node)?;
            ensure!(mesh.resolve(node, KIOSK).is_err(), "it is still there");
            Ok(())
        })?;
    }
    mesh.ends_well()
}

#[test]
fn agents_killed_while_they_write_start_with_a_state_that_is_whole() -> Result<()> {
    let mesh = Mesh::one_site_of(&NODES)?;
    for run in 0..8_u64 {
        let address = format!("10.43.0.{}", 100 + run);
        let begin = generation(&mesh, "edge-a2")?; // Before the change, which may be there at once.
        kiosk(&mesh, &address)?;
        while generation(&mesh, "edge-a2")? == begin {
            ensure!(begin > 0, "no state");
        }
        std::thread::sleep(Duration::from_millis(run));
        mesh.kill("edge-a2", "mesh-agent")?;
        mesh.site("site-a")?.link().set_down(true)?;
        mesh.start_agent_with("edge-a2", "lan_discovery = false\n")?;
        mesh.agent_ready("edge-a2", 2)?;
        let now = generation(&mesh, "edge-a2")?;
        ensure!(now >= begin, "it went back from {begin} to {now}");
        let log = fs::read_to_string(mesh.node("edge-a2")?.dir().join("mesh-agent.log"));
        ensure!(
            !log.unwrap_or_default().contains("not usable"),
            "a slot is damaged"
        );
        mesh.site("site-a")?.link().set_down(false)?;
        tool::eventually("the controller is there", SOON, || {
            connected(&mesh, "edge-a2")
        })?;
    }
    mesh.ends_well()
}
