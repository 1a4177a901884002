//! Bad input and bad days that belong to no single crate: a clear error or a counted drop, never a
//! crash, never a half-configured host.

use std::{
    fs,
    io::Write as _,
    net::{TcpStream, UdpSocket},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{mesh::Mesh, node::Process, tool};

/// Until a daemon that cannot go on has ended.
const END: Duration = Duration::from_secs(15);

/// Until something that has to happen has.
const SOON: Duration = Duration::from_secs(20);

#[test]
fn a_wrong_token_is_refused_and_the_host_stays_as_it_was() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let mut agent = joining(&mesh, "hf1.wrong.token")?;
    let status = agent.wait(END)?;
    assert!(!status.success());
    assert!(
        agent.log().to_lowercase().contains("token"),
        "{}",
        agent.log()
    );
    let links = mesh
        .node("newcomer")?
        .run(&["ip", "-br", "link"], END)?
        .ok()?;
    assert!(!links.contains("holdfast0"), "{links}");
    mesh.ends_well()
}

#[test]
fn a_token_joins_once() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let token = mesh.token()?;
    let first = mesh.site("site-b")?.host(mesh.lab(), "first")?;
    mesh.daemon(
        &first,
        "mesh-agent",
        "agent",
        &mesh.agent_config(&first, Some(&token)),
    )?;
    mesh.agent_ready("first", 3)?;
    mesh.provokes(&["join refused node=newcomer"]);
    let mut second = joining(&mesh, &token)?;
    assert!(!second.wait(END)?.success());
    assert!(
        second.log().to_lowercase().contains("token"),
        "{}",
        second.log()
    );
    mesh.ends_well()
}

#[test]
fn a_misspelt_key_is_named_with_file_line_and_accepted_keys() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let node = mesh.node("edge-a1")?;
    for (program, config) in [
        ("mesh-agent", "node_name = \"x\"\nlisten_prot = 1\n"),
        ("mesh-controller", "mesh_name = \"x\"\nlisten_prot = 1\n"),
        ("mesh-relay", "name = \"x\"\nlisten_prot = 1\n"),
    ] {
        let path = node.write("typo.toml", config)?.display().to_string();
        let output = node.run(&[&mesh.bin(program), "--config", &path], END)?;
        assert_eq!(
            output.status.code(),
            Some(64),
            "{program}: {}",
            output.stderr
        );
        for part in [&path, "listen_prot", "line 2", "expected"] {
            assert!(
                output.stderr.contains(part),
                "{program} does not say {part}: {}",
                output.stderr
            );
        }
    }
    mesh.ends_well()
}

#[test]
fn a_second_agent_on_the_same_state_folder_ends() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let node = mesh.node("edge-a1")?;
    let config = node.dir().join("agent.toml").display().to_string();
    let second = node.run(&[&mesh.bin("mesh-agent"), "--config", &config], END)?;
    assert_eq!(second.status.code(), Some(1), "{}", second.stderr);
    let state = node.dir().join("state").display().to_string();
    assert!(second.stderr.contains(&state), "{}", second.stderr);
    mesh.resolve("edge-a1", "edge-b1.mesh")?;
    mesh.ends_well()
}

#[test]
fn a_taken_port_is_named() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let node = mesh.site("site-a")?.host(mesh.lab(), "newcomer")?;
    let _taken = node.enter(|| UdpSocket::bind("0.0.0.0:51820"))??;
    let config = mesh.agent_config(&node, Some(&mesh.token()?));
    mesh.daemon(&node, "mesh-agent", "agent", &config)?;
    let mut agent = mesh.take("newcomer", "mesh-agent")?;
    assert!(!agent.wait(END)?.success());
    assert!(agent.log().contains("51820"), "{}", agent.log());
    let links = node.run(&["ip", "-br", "link"], END)?.ok()?;
    assert!(!links.contains("holdfast0"), "{links}");
    mesh.ends_well()
}

#[test]
fn a_clock_ten_years_off_does_not_stop_names_and_local_services_and_is_told() -> Result<()> {
    for offset in ["+10y", "-10y"] {
        let mesh = Mesh::two_sites()?;
        let node = mesh.node("edge-a1")?;
        fs::write(mesh.manifests().join("kiosk.yaml"), KIOSK_ON_EDGE_A1)?;
        let kiosk = "kiosk.shop.svc.cluster.local";
        tool::eventually("the kiosk is known", SOON, || {
            mesh.resolve("edge-a1", kiosk)
        })?;
        mesh.serve("edge-a1", "kiosk", &["http", "edge-a1", "0.0.0.0:8080"])?;
        mesh.take("edge-a1", "mesh-agent")?.terminate(END)?;
        let config = node.dir().join("agent.toml").display().to_string();
        let agent = mesh.bin("mesh-agent");
        let own = [agent, "--config".to_owned(), config];
        let words = [tool::with_clock(offset)?, own.to_vec()].concat();
        let mut agent = node.spawn("wrong-clock", &words)?;
        let url = format!("http://{kiosk}/");
        tool::eventually("a service on the node answers by name", SOON, || {
            agent.running()?;
            mesh.get("edge-a1", &["-4", &url], Duration::from_secs(1))
        })?;
        tool::eventually("all is well, or status says what is wrong", SOON, || {
            let status = mesh.status("edge-a1")?;
            let connected = status.pointer("/controller/connected") == Some(&true.into());
            let problems = status.get("problems").context("no problems")?.to_string();
            let told = ["clock", "certificate"]
                .iter()
                .any(|word| problems.contains(word));
            ensure!(connected || told, "{offset}: {problems}");
            Ok(())
        })?;
        assert!(agent.terminate(END)?.success(), "{}", agent.log());
        mesh.ends_well()?;
    }
    Ok(())
}

const KIOSK_ON_EDGE_A1: &str = "apiVersion: v1
kind: Service
metadata: {name: kiosk, namespace: shop}
spec:
  clusterIP: 10.43.0.99
  ports: [{port: 80, protocol: TCP}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: kiosk-1, namespace: shop, labels: {kubernetes.io/service-name: kiosk}}
addressType: IPv4
ports: [{port: 8080, protocol: TCP}]
endpoints: [{addresses: [100.96.1.1], nodeName: edge-a1, conditions: {ready: true}}]
";

#[test]
fn a_cut_snapshot_is_fetched_again() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    mesh.provokes(&["a snapshot slot is not usable"]);
    for keep_bytes in [0, 1, 17, 300] {
        mesh.take("edge-a1", "mesh-agent")?.terminate(END)?;
        for file in snapshots(&mesh)? {
            fs::File::options()
                .write(true)
                .open(&file)?
                .set_len(keep_bytes)?;
        }
        mesh.start_agent("edge-a1")?;
        mesh.agent_ready("edge-a1", 2)?;
    }
    mesh.resolve("edge-a1", "edge-b1.mesh")?;
    mesh.ends_well()
}

#[test]
fn one_cut_snapshot_leaves_the_other_when_nobody_can_be_asked() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let second = "apiVersion: v1\nkind: Service\nmetadata: {name: kiosk, namespace: shop}\nspec:\n  \
                  clusterIP: 10.43.0.99\n  ports: [{port: 80, protocol: TCP}]\n";
    fs::write(mesh.manifests().join("kiosk.yaml"), second)?; // So that both slots are written.
    tool::eventually("both slots are written", SOON, || {
        mesh.resolve("edge-a1", "kiosk.shop.svc.cluster.local")?;
        ensure!(snapshots(&mesh)?.len() == 2, "{:?}", snapshots(&mesh)?);
        Ok(())
    })?;
    mesh.take("edge-a1", "mesh-agent")?.terminate(END)?;
    mesh.provokes(&["a snapshot slot is not usable"]);
    mesh.site("site-a")?.link().set_down(true)?;
    let files = snapshots(&mesh)?;
    let newest = files
        .iter()
        .max_by_key(|path| fs::metadata(path).and_then(|data| data.modified()).ok());
    let newest = newest.context("no snapshot on disk")?;
    let length = fs::metadata(newest)?.len();
    fs::File::options()
        .write(true)
        .open(newest)?
        .set_len(length / 2)?;
    mesh.start_agent("edge-a1")?;
    tool::eventually("names are answered from the older slot", SOON, || {
        mesh.resolve("edge-a1", "inventory.shop.svc.cluster.local")
    })?;
    mesh.ends_well()
}

#[test]
fn a_full_disk_stops_a_join_with_a_clear_error() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let node = mesh.site("site-a")?.host(mesh.lab(), "newcomer")?;
    let config = mesh.agent_config(&node, Some(&mesh.token()?));
    let config = node.write("agent.toml", &config)?.display().to_string();
    let state = node.dir().join("state").display().to_string();
    let agent = mesh.bin("mesh-agent");
    // The launcher's mount table is this command's own.
    let script = format!(
        "mount -t tmpfs -o size=4k none {state} && head -c 4096 /dev/zero > {state}/filler && exec {agent} --config {config}"
    );
    let output = node.run(&["sh", "-c", &script], END)?;
    assert_eq!(output.status.code(), Some(1), "{}", output.stderr);
    assert!(output.stderr.contains(&state), "{}", output.stderr);
    assert!(output.stderr.contains("No space left"), "{}", output.stderr);
    mesh.ends_well()
}

#[test]
fn a_disk_that_fills_up_later_does_not_stop_the_node() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let node = mesh.node("edge-a1")?;
    mesh.take("edge-a1", "mesh-agent")?.terminate(END)?;
    let state = node.dir().join("state").display().to_string();
    let config = node.dir().join("agent.toml").display().to_string();
    let agent = mesh.bin("mesh-agent");
    // The node's state, on a small disk with nothing left.
    let script = format!(
        "mkdir /tmp/hf-state-$$ && cp -a {state}/. /tmp/hf-state-$$ && mount -t tmpfs -o size=1m none {state} && \
         cp -a /tmp/hf-state-$$/. {state} && rm -r /tmp/hf-state-$$ && \
         (cat /dev/zero > {state}/filler 2>/dev/null || true) && exec {agent} --config {config}"
    );
    mesh.provokes(&["cannot keep the snapshot; a restart would find an older one error=No space"]);
    let mut agent = node.spawn("full-disk", &["sh", "-c", &script])?;
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: kiosk, namespace: shop}\nspec:\n  \
                   clusterIP: 10.43.0.99\n  ports: [{port: 80, protocol: TCP}]\n";
    fs::write(mesh.manifests().join("kiosk.yaml"), service)?;
    tool::eventually("the change is served all the same", SOON, || {
        agent.running()?;
        mesh.resolve("edge-a1", "kiosk.shop.svc.cluster.local")
    })?;
    tool::eventually("the log says why nothing is kept", SOON, || {
        ensure!(agent.log().contains("No space left"), "{}", agent.log());
        Ok(())
    })?;
    assert!(agent.terminate(END)?.success(), "{}", agent.log());
    mesh.ends_well()
}

#[test]
fn garbage_to_every_port_stops_nobody() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let from = mesh
        .lab()
        .public_node("stranger", [198, 51, 100, 66].into())?;
    // Reproducible, and with WireGuard's, QUIC's and STUN's first bytes among the rest.
    let mut state = 0x9e37_79b9_u32;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[0]
    };
    let socket = from.enter(|| UdpSocket::bind("0.0.0.0:0"))??;
    for first in [0, 1, 2, 3, 4, 0x40, 0xc0, 0xff] {
        for length in [0, 1, 4, 19, 20, 32, 148, 1_200, 1_400] {
            let mut datagram: Vec<u8> = (0..length).map(|_| random()).collect();
            if let Some(byte) = datagram.first_mut() {
                *byte = first;
            }
            for port in [443, 3478, 51_820] {
                socket.send_to(&datagram, ("198.51.100.10", port)).ok(); // Refused is fine.
            }
        }
    }
    for port in [443, 7440] {
        let mut stream = from.enter(|| TcpStream::connect(("198.51.100.10", port)))??;
        let garbage: Vec<u8> = (0..70_000).map(|_| random()).collect();
        stream.write_all(&garbage).ok(); // Closed in the middle is fine.
    }
    // An agent's own ports, from its LAN.
    let neighbour = mesh.site("site-a")?.host(mesh.lab(), "neighbour")?;
    let socket = neighbour.enter(|| UdpSocket::bind("0.0.0.0:0"))??;
    for first in 0..=255 {
        let datagram: Vec<u8> = [first]
            .into_iter()
            .chain((0..147).map(|_| random()))
            .collect();
        socket.send_to(&datagram, "192.168.1.11:51820")?;
    }
    mesh.serve("edge-b1", "inventory", &["http", "edge-b1", "[::]:8080"])?;
    let inventory = "http://inventory.shop.svc.cluster.local/";
    mesh.get("edge-a1", &["-4", inventory], Duration::from_secs(8))?;
    mesh.ends_well()
}

/// An agent of a new node at site A that tries to join with `token`.
fn joining(mesh: &Mesh, token: &str) -> Result<Process> {
    let node = mesh.site("site-a")?.host(mesh.lab(), "newcomer")?;
    mesh.daemon(
        &node,
        "mesh-agent",
        "agent",
        &mesh.agent_config(&node, Some(token)),
    )?;
    mesh.take("newcomer", "mesh-agent")
}

fn snapshots(mesh: &Mesh) -> Result<Vec<PathBuf>> {
    let state = mesh.node("edge-a1")?.dir().join("state");
    let mut files = Vec::new();
    for entry in fs::read_dir(&state)? {
        let path = entry?.path();
        if path
            .file_name()
            .is_some_and(|name| name == "snapshot.0" || name == "snapshot.1")
        {
            files.push(path);
        }
    }
    ensure!(!files.is_empty(), "no snapshot in {}", state.display());
    Ok(files)
}
