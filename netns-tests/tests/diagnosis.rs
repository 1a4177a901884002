//! Faults that are really there, with the real binaries: what `meshctl` says first names the cause. The rows are those of
//! docs/troubleshooting.md, which is compared with them.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    link::Impairment,
    mesh::{Mesh, word},
    node::{Node, Process},
    tool,
};

/// Until a fault is seen: UDP that gives nothing is called blocked after 3 s, an endpoint is ejected after some connects, a node
/// is given up after 20 s.
const SEEN: Duration = Duration::from_secs(60);

/// Until a process has ended.
const END: Duration = Duration::from_secs(15);

const A: &str = "edge-a1";
const B: &str = "edge-b1";

/// What docs/troubleshooting.md has in a row for each fault: the command, and what its first line begins with after its level.
const TABLE: &str = include_str!("../../docs/troubleshooting.md");

/// Waits until the first line of what `meshctl` says on `A` has all of `words`; the table has the fault's row.
fn first_line(mesh: &Mesh, command: &[&str], fault: &str, words: &[&str]) -> Result<String> {
    let row = format!("| {fault} | `{}` |", command.join(" "));
    ensure!(
        TABLE.contains(&row),
        "docs/troubleshooting.md has no row {row}"
    );
    let said = tool::eventually(fault, SEEN, || {
        let output = mesh.meshctl(A, command)?;
        let first = output.stdout.lines().next().unwrap_or_default();
        for word in words {
            ensure!(
                first.contains(word),
                "no {word:?} in {}{}",
                output.stdout,
                output.stderr
            );
        }
        Ok(first.to_owned())
    })?;
    eprintln!("{fault}: {said}");
    Ok(said)
}

/// Starts `A`'s agent again, with `before` (shell) done in its own mount table, and more configuration.
fn restart_with(mesh: &Mesh, before: &str, lines: &str) -> Result<Process> {
    mesh.take(A, "mesh-agent")?.terminate(END)?;
    let node = mesh.node(A)?;
    let config = mesh.agent_config(&node, None);
    let path = node.write("agent.toml", &format!("{config}{lines}"))?;
    let script = format!(
        "{before}\nexec {} --config {}",
        mesh.bin("mesh-agent"),
        path.display()
    );
    let agent = node.spawn("seeded", &["sh", "-ec", &script])?;
    let ready = mesh.agent_ready(A, 2);
    ready.with_context(|| agent.log())?;
    Ok(agent)
}

fn doctor(mesh: &Mesh, fault: &str, words: &[&str]) -> Result<String> {
    first_line(mesh, &["doctor"], fault, words)
}

/// A fresh mesh of two sites, of which nothing is wrong.
fn well() -> Result<Mesh> {
    let mesh = Mesh::two_sites()?;
    tool::eventually("the doctor finds nothing", SEEN, || {
        let output = mesh.meshctl(A, &["doctor"])?;
        ensure!(output.status.success(), "{}", output.stdout);
        Ok(())
    })?;
    Ok(mesh)
}

fn connect(mesh: &Mesh, to: &str) -> Result<TcpStream> {
    let to: SocketAddr = to.parse()?;
    let limit = Duration::from_millis(500);
    let connected = mesh
        .node(A)?
        .enter(|| TcpStream::connect_timeout(&to, limit))?;
    Ok(connected?)
}

#[test]
fn udp_blocked_is_named() -> Result<()> {
    let mesh = well()?;
    mesh.site("site-a")?.block_udp(true)?;
    doctor(&mesh, "UDP blocked", &["UDP is blocked", "over TCP"])?;
    let output = mesh.meshctl(A, &["netcheck"])?;
    ensure!(
        output.stdout.starts_with("UDP") && output.stdout.contains("blocked"),
        "{}",
        output.stdout
    );
    ensure!(output.status.code() == Some(1), "{:?}", output.status);
    mesh.ends_well()
}

#[test]
fn an_mtu_hole_is_named() -> Result<()> {
    let mut mesh = Mesh::demo()?;
    mesh.add_two_sites(Impairment::NONE, &[A], &[B])?;
    let internet = mesh.lab().internet();
    let site = mesh.site("site-a")?;
    site.narrow(internet, 1_280)?;
    let whole = "table ip whole { chain raw { type filter hook prerouting priority -450; ip frag-off & 0x3fff != 0 drop; }; }\n";
    tool::nft(internet.netns(), whole)?;
    tool::nft(site.router().netns(), whole)?;
    [A, B].iter().try_for_each(|node| mesh.start_agent(node))?;
    [A, B]
        .iter()
        .try_for_each(|node| mesh.agent_ready(node, 2))?;
    mesh.ask(A, &["ping", B, "-c", "2", "-i", "100"])?;
    tool::eventually("the core knows why", SEEN, || {
        // Better paths are looked for while there is traffic.
        mesh.ask(A, &["ping", B, "-c", "5", "-i", "200"])?;
        let why = mesh.ask(A, &["path", "why", B])?;
        ensure!(word(&why, "reason") == "mtu_fail", "{why}");
        Ok(())
    })?;
    doctor(&mesh, "MTU hole", &["MTU hole", B])?;
    mesh.ends_well()
}

/// Debian's library for wrong clocks, wherever this architecture has it.
fn fake_clock() -> Result<PathBuf> {
    let folders = fs::read_dir("/usr/lib")?.flatten();
    let mut paths = folders.map(|folder| folder.path().join("faketime/libfaketimeMT.so.1"));
    let found = paths.find(|path| path.is_file());
    found.context("no libfaketimeMT.so.1: apt-get install faketime")
}

fn with_clock(mesh: &Mesh, offset: &str) -> Result<Process> {
    let preload = fake_clock()?;
    // Monotonic time does not jump when a clock is wrong.
    let before = format!(
        "export LD_PRELOAD={} FAKETIME={offset} FAKETIME_DONT_FAKE_MONOTONIC=1",
        preload.display()
    );
    restart_with(mesh, &before, "")
}

#[test]
fn a_clock_that_is_behind_is_named() -> Result<()> {
    let mesh = well()?;
    let _agent = with_clock(&mesh, "-3d")?;
    doctor(&mesh, "clock skew", &["the clock is", "behind"])?;
    mesh.ends_well()
}

/// The agent's own clock is right: it is the certificate that is over, as after months in a drawer.
#[test]
fn an_expired_certificate_is_named() -> Result<()> {
    let mesh = well()?;
    mesh.kill("cloud", "mesh-controller")?;
    // So that the certificate is over, and the command that looks at it has the same clock as the agent.
    let _agent = with_clock(&mesh, "+10y")?;
    let command = ["doctor"];
    let row = "| expired certificate | `doctor` |";
    ensure!(
        TABLE.contains(row),
        "docs/troubleshooting.md has no row {row}"
    );
    let node = mesh.node(A)?;
    let socket = node.dir().join("agent.sock").display().to_string();
    tool::eventually("expired certificate", SEEN, || {
        let preload = format!("LD_PRELOAD={}", fake_clock()?.display());
        let meshctl = mesh.bin("meshctl");
        let words = [
            "env",
            &preload,
            "FAKETIME=+10y",
            "FAKETIME_DONT_FAKE_MONOTONIC=1",
            &meshctl,
            "--socket",
            &socket,
        ];
        let output = node.run(&[&words[..], &command].concat(), END)?;
        let first = output.stdout.lines().next().unwrap_or_default();
        ensure!(
            first.contains("this node's certificate ended"),
            "{}",
            output.stdout
        );
        eprintln!("expired certificate: {first}");
        Ok(())
    })?;
    mesh.ends_well()
}

#[test]
fn a_policy_that_denies_is_named() -> Result<()> {
    let mesh = well()?;
    let policy = "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshPolicy\nmetadata: {name: lock-down}\nspec:\n  rules:\n  \
                  - action: deny\n    from: [{nodes: [edge-a1]}]\n    to: [{nodes: [edge-b1]}]\n    ports: [{port: 8080}]\n";
    fs::write(mesh.manifests().join("policy.yaml"), policy)?;
    let command = ["trace", "inventory.shop.svc.cluster.local:80"];
    let words = [
        "stopped by policy at edge-a1",
        "denied by MeshPolicy lock-down",
    ];
    first_line(&mesh, &command, "wrong policy", &words)?;
    tool::eventually("the kernel denies it", SEEN, || {
        let refused = connect(&mesh, "100.96.2.1:8080");
        ensure!(refused.is_err(), "{refused:?}");
        let status = mesh.status(A)?;
        ensure!(
            status.pointer("/policy_packets/denied").is_some(),
            "{status}"
        );
        Ok(())
    })?;
    doctor(
        &mesh,
        "wrong policy, after it denied something",
        &["denied by MeshPolicy lock-down: TCP"],
    )?;
    let said = mesh.ask(A, &["drops"])?;
    let drops = said
        .pointer("/drops")
        .and_then(|drops| drops.as_array())
        .context("no drops")?;
    let denied = drops
        .iter()
        .any(|one| one.pointer("/reason") == Some(&"denied".into()));
    ensure!(denied, "{said}");
    mesh.ends_well()
}

#[test]
fn a_dead_endpoint_is_named() -> Result<()> {
    let mesh = well()?;
    mesh.provokes(&["connects fail: no new flows for a while"]);
    // Nothing listens at the port of shop/inventory.
    tool::eventually("a path", SEEN, || {
        let why = mesh.ask(A, &["ping", B, "-c", "1"])?;
        ensure!(why.pointer("/received") == Some(&1.into()), "{why}");
        Ok(())
    })?;
    let command = ["trace", "shop/inventory:80"];
    tool::eventually("its connects fail often enough", SEEN, || {
        for _ in 0..8 {
            let limit = Duration::from_secs(1);
            mesh.get(A, &["http://10.43.0.10/"], limit).err();
        }
        let output = mesh.meshctl(A, &command)?;
        ensure!(output.stdout.starts_with("stopped"), "{}", output.stdout);
        Ok(())
    })?;
    first_line(
        &mesh,
        &command,
        "dead endpoint",
        &[
            "stopped by endpoint",
            "100.96.2.1:8080",
            "Nothing listens there",
        ],
    )?;
    doctor(
        &mesh,
        "dead endpoint, in general",
        &["dead endpoint: service shop/inventory", "edge-b1"],
    )?;
    mesh.ends_well()
}

#[test]
fn an_asymmetric_route_is_named() -> Result<()> {
    let mesh = well()?;
    let node = mesh.node(A)?;
    tool::ip(node.netns(), "route add 100.96.2.0/24 dev eth0\n")?;
    node.sysctl("net/ipv4/conf/all/rp_filter", "1")?;
    doctor(
        &mesh,
        "asymmetric route",
        &["asymmetric route: 100.96.2.0/24", "eth0"],
    )?;
    mesh.ends_well()
}

#[test]
fn a_full_disk_is_named() -> Result<()> {
    let mesh = well()?;
    let node = mesh.node(A)?;
    let state = node.dir().join("state").display().to_string();
    // In the agent's own mount table: it ends with the process.
    let before = format!(
        "cp -a {state} {state}.kept\nmount -t tmpfs -o size=1m tmpfs {state}\ncp -a {state}.kept/. {state}/\n\
         dd if=/dev/zero of={state}/filler bs=4k 2>/dev/null || true"
    );
    let _agent = restart_with(&mesh, &before, "")?;
    doctor(&mesh, "full disk", &["the disk of", "is full"])?;
    mesh.ends_well()
}

#[test]
fn a_dns_loop_is_named() -> Result<()> {
    let mesh = well()?;
    // At its own listen addresses the agent refuses upstreams when it starts.
    let _agent = restart_with(&mesh, "", "[dns]\nupstreams = [\"100.96.1.1:53\"]\n")?;
    let words = ["DNS leads in a circle", "100.96.1.1:53"];
    doctor(&mesh, "DNS loop", &words)?;
    mesh.ends_well()
}

#[test]
fn an_overloaded_relay_is_named() -> Result<()> {
    let mesh = well()?;
    mesh.take("cloud", "mesh-relay")?.terminate(END)?;
    mesh.take(A, "mesh-agent")?.terminate(END)?;
    // The other node has the only place.
    mesh.start_relay_with("clients_max = 1\n")?;
    tool::eventually("the other node is linked", SEEN, || {
        let status = mesh.status(B)?;
        let linked = status
            .pointer("/relays/0/transport")
            .is_some_and(|said| said.is_string());
        ensure!(linked, "{status}");
        Ok(())
    })?;
    mesh.start_agent(A)?;
    mesh.agent_ready(A, 2)?;
    doctor(
        &mesh,
        "relay overloaded",
        &["relay cloud-relay is overloaded", "full"],
    )?;
    mesh.ends_well()
}

#[test]
fn a_duplicate_overlay_address_is_named() -> Result<()> {
    let mesh = well()?;
    tool::ip(mesh.node(A)?.netns(), "addr add 100.96.2.1/32 dev lo\n")?;
    doctor(
        &mesh,
        "duplicate overlay address",
        &["100.96.2.1", "edge-b1's overlay address"],
    )?;
    mesh.ends_well()
}

#[test]
fn a_missing_kernel_feature_is_named() -> Result<()> {
    let mesh = well()?;
    mesh.provokes(&[
        "policies will end with this process",
        "services will end with this process",
    ]);
    // The file system for BPF objects, in the agent's own mount table.
    let _agent = restart_with(&mesh, "mount -t tmpfs none /sys/fs/bpf", "")?;
    doctor(
        &mesh,
        "kernel feature missing",
        &["the kernel lacks what Holdfast needs", "/sys/fs/bpf"],
    )?;
    mesh.ends_well()
}

fn node_file(node: &Node, name: &str) -> PathBuf {
    Path::new(node.dir()).join(name)
}

/// Of a mesh with keys that are known: none of them is in the report, and what happened is.
#[test]
fn a_bug_report_of_a_real_node_has_none_of_its_keys() -> Result<()> {
    let mesh = well()?;
    let node = mesh.node(A)?;
    mesh.ask(A, &["ping", B, "-c", "2", "-i", "100"])?;
    let read =
        |path: PathBuf| fs::read_to_string(&path).with_context(|| path.display().to_string());
    let wireguard = read(node_file(&node, "state/wireguard.key"))?;
    let identity = read(node_file(&node, "state/identity.pem"))?;
    let token = mesh.token()?;
    // As a debug line might, one day.
    let canaries = format!("{wireguard}\n{identity}\ntoken = {token}\n");
    let log = node.write("canary.log", &canaries)?.display().to_string();
    let real = node_file(&node, "mesh-agent.log").display().to_string();
    let out = node_file(&node, "report");
    let words = [
        "bugreport",
        "--redact",
        "--out",
        &out.display().to_string(),
        "--log",
        &log,
        "--log",
        &real,
    ];
    mesh.meshctl(A, &words)?.ok()?;
    let mut whole = String::new();
    for file in fs::read_dir(&out)? {
        whole += &fs::read_to_string(file?.path())?;
    }
    let secrets = identity.lines().chain([wireguard.trim(), &token]);
    for secret in secrets.filter(|line| line.len() > 30 && !line.contains("-----")) {
        ensure!(!whole.contains(secret), "a key is in the report");
    }
    for word in ["100.96.1.1", "edge-b1", "\"state\"", "snapshot.0"] {
        ensure!(whole.contains(word), "no {word} in the report");
    }
    ensure!(
        !whole.contains("203.0.113."),
        "addresses outside the overlay are"
    );
    mesh.ends_well()
}

/// Two generations of a real node: what changed between them, signatures that hold, and an export.
#[test]
fn a_node_s_snapshots_are_compared_and_checked() -> Result<()> {
    let mesh = well()?;
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: kiosk, namespace: shop}\nspec:\n  clusterIP: \
                   10.43.0.99\n  ports: [{port: 80, protocol: TCP}]\n";
    fs::write(mesh.manifests().join("kiosk.yaml"), service)?;
    tool::eventually("the change is on disk", SEEN, || {
        let diff = mesh.ask(A, &["snapshot", "diff"])?;
        let added = diff
            .pointer("/added")
            .map(ToString::to_string)
            .unwrap_or_default();
        ensure!(added.contains("shop/kiosk"), "{diff}");
        Ok(())
    })?;
    let verified = mesh.meshctl(A, &["snapshot", "verify"])?;
    ensure!(
        verified.status.success() && verified.stdout.contains("the signature holds"),
        "{}",
        verified.stdout
    );
    let out = node_file(&mesh.node(A)?, "export").display().to_string();
    mesh.meshctl(A, &["snapshot", "export", "--out", &out])?
        .ok()?;
    ensure!(fs::metadata(&out)?.len() > 100);
    let events = mesh.ask(A, &["events"])?.to_string();
    ensure!(
        events.contains("\"controller\"") && events.contains("\"relay\""),
        "{events}"
    );

    // A byte of the newest slot turns around, as a worn SD card's does.
    let slots = mesh.ask(A, &["snapshot", "show"])?;
    let newest = slots
        .pointer("/slots/0/file")
        .and_then(|file| file.as_str())
        .context("no slot")?;
    let mut bytes = fs::read(newest)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(newest, bytes)?;
    let verified = mesh.meshctl(A, &["snapshot", "verify"])?;
    ensure!(
        verified.status.code() == Some(1) && verified.stdout.contains("checksum"),
        "{}",
        verified.stdout
    );
    mesh.ends_well()
}
