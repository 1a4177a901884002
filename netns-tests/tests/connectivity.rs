//! What `meshctl` finds by trying: sizes of packets, peers, names and services, and whether anything leaves in plain text.

use std::{fs, os::unix::fs::PermissionsExt as _, time::Duration};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    mesh::{Mesh, word},
    tool,
};
use pcap_file::pcapng::{Block, PcapNgReader};
use serde_json::Value;

const SEEN: Duration = Duration::from_secs(60);

const A: &str = "edge-a1";
const B: &str = "edge-b1";

/// The exit code and what was said.
fn run(mesh: &Mesh, command: &[&str]) -> Result<(i32, Value)> {
    let output = mesh.meshctl(A, &[command, &["--json"]].concat())?;
    let said = serde_json::from_str(&output.stdout);
    let said = said.with_context(|| format!("{}{}", output.stdout, output.stderr))?;
    Ok((output.status.code().context("a signal")?, said))
}

/// The verdict on `what` of `name`.
fn verdict(said: &Value, what: &str, name: &str) -> String {
    let checks = said.pointer("/checks").and_then(Value::as_array);
    let mut checks = checks.into_iter().flatten();
    let found = checks.find(|one| word(one, "what") == what && word(one, "name") == name);
    found.map(|one| word(one, "verdict")).unwrap_or_default()
}

#[test]
fn the_largest_packet_that_passes_is_found_and_a_hole_is_named() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    tool::eventually("all of the MTU passes", SEEN, || {
        let (code, said) = run(&mesh, &["mtu", "probe", B])?;
        ensure!(code == 0, "{said}");
        let both = ["/largest_bytes", "/overlay_mtu_bytes"].map(|key| said.pointer(key).cloned());
        ensure!(both.iter().all(|one| *one == Some(1_280.into())), "{said}");
        let paths = said.pointer("/paths").and_then(Value::as_array);
        let proven = paths.into_iter().flatten().any(|path| {
            word(path, "path") == word(&said, "path")
                && path.pointer("/full_size_ok") == Some(&true.into())
        });
        ensure!(proven, "{said}");
        Ok(())
    })?;
    let hole = "table ip hole { chain in { type filter hook input priority 0; iifname holdfast0 meta length > 1000 drop; }; }\n";
    tool::nft(mesh.node(B)?.netns(), hole)?;
    let output = mesh.meshctl(A, &["mtu", "probe", B])?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    let first = output.stdout.lines().next().unwrap_or_default();
    ensure!(
        first.starts_with("MTU hole: 1000 bytes go to edge-b1 and back by "),
        "{first}"
    );
    ensure!(output.stderr.contains("trying "), "{}", output.stderr);
    let output = mesh.meshctl(A, &["mtu", "probe", "nobody"])?;
    ensure!(output.status.code() == Some(64), "{output:?}");
    mesh.ends_well()
}

#[test]
fn peers_names_and_services_are_tried() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    mesh.serve(B, "inventory", &["http", B, "[::]:8080"])?;
    tool::eventually("they work", SEEN, || {
        let (_, said) = run(&mesh, &["test", "connectivity"])?;
        for (what, name) in [("peer", B), ("name", B), ("service", "shop/inventory")] {
            ensure!(verdict(&said, what, name) == "ok", "{what} {name}: {said}");
        }
        Ok(())
    })?;
    mesh.kill(B, "inventory")?;
    tool::eventually("the service fails", SEEN, || {
        let (code, said) = run(&mesh, &["test", "connectivity"])?;
        ensure!(verdict(&said, "peer", B) == "ok", "{said}");
        ensure!(
            verdict(&said, "service", "shop/inventory") == "failed" && code == 1,
            "{said}"
        );
        Ok(())
    })?;
    mesh.ends_well()
}

#[test]
fn what_the_time_without_a_controller_needs_is_there_or_said_to_be_missing() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    mesh.kill("cloud", "mesh-controller")?;
    let (code, said) = run(&mesh, &["test", "connectivity", "--offline"])?;
    for (what, name) in [("snapshot", A), ("certificate", A), ("names", A)] {
        ensure!(verdict(&said, what, name) == "ok", "{what}: {said}");
    }
    ensure!(code <= 1, "{said}");
    for slot in ["snapshot.0", "snapshot.1"] {
        let path = mesh.node(A)?.dir().join("state").join(slot);
        if path.exists() {
            fs::write(path, "not a snapshot")?;
        }
    }
    let (code, said) = run(&mesh, &["test", "connectivity", "--offline"])?;
    ensure!(verdict(&said, "snapshot", A) == "failed", "{said}");
    ensure!(code == 1, "{said}");
    mesh.ends_well()
}

#[test]
fn what_leaves_past_the_tunnel_is_found_in_plain_text() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let test = ["test", "connectivity", "--encryption"];
    let (code, said) = run(&mesh, &test)?;
    ensure!(
        verdict(&said, "encryption", B) == "ok" && code == 0,
        "{said}"
    );
    // A route that is more specific than the tunnel's.
    let address = mesh.ask(B, &["status"])?;
    let address = address.pointer("/overlay_addresses/0");
    let address = address.and_then(Value::as_str).context("no address")?;
    let gateway = mesh
        .node(A)?
        .run(&["ip", "route", "show", "default"], SEEN)?;
    let gateway = gateway.ok()?;
    let gateway = gateway
        .split_whitespace()
        .nth(2)
        .context("no gateway")?
        .to_owned();
    let rule = format!(
        "route add {address}/32 via {gateway} table 99\nrule add to {address} ipproto udp dport 9 lookup 99 priority 1\n"
    );
    tool::ip(mesh.node(A)?.netns(), &rule)?;
    let (code, said) = run(&mesh, &test)?;
    ensure!(
        verdict(&said, "encryption", B) == "failed" && code == 2,
        "{said}"
    );
    let text = said.pointer("/checks/0/text").and_then(Value::as_str);
    ensure!(
        text.is_some_and(|text| text.contains("leave in plain text")),
        "{said}"
    );
    mesh.ends_well()
}

#[test]
fn throughput_is_measured_while_the_other_side_lets_it() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let (code, said) = run(&mesh, &["perf", B])?;
    let error = said.pointer("/error/message").and_then(Value::as_str);
    ensure!(
        code == 2 && error.is_some_and(|error| error.contains("nobody listens at edge-b1")),
        "{said}"
    );
    let node = mesh.node(B)?;
    let socket = node.dir().join("agent.sock").display().to_string();
    let meshctl = mesh.bin("meshctl");
    let words = [
        meshctl.as_str(),
        "--socket",
        &socket,
        "perf",
        "--serve",
        "--time",
        "60s",
    ];
    let _server = node.spawn("perf", &words)?;
    let said = tool::eventually("it listens", SEEN, || {
        let limits = ["--time", "2s", "--mebibytes", "8"];
        let (code, said) = run(&mesh, &[&["perf", B], &limits[..]].concat())?;
        ensure!(code == 0, "{said}");
        Ok(said)
    })?;
    for way in ["/to_node/bytes", "/from_node/bytes"] {
        let bytes = said.pointer(way).and_then(Value::as_u64).unwrap_or(0);
        ensure!((1..=9 << 20).contains(&bytes), "{said}");
    }
    // Each site is 10 ms away.
    let median = said.pointer("/rtt_median_ms").and_then(Value::as_f64);
    ensure!(
        median.is_some_and(|ms| (20.0..500.0).contains(&ms)),
        "{said}"
    );
    // Only in the mesh.
    let outside = node.enter(|| {
        let loopback = ([127, 0, 0, 1], 51_816).into();
        std::net::TcpStream::connect_timeout(&loopback, Duration::from_secs(1))
    })?;
    ensure!(outside.is_err(), "{outside:?}");
    mesh.ends_well()
}

#[test]
fn a_capture_has_plain_text_inside_and_none_outside() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let node = mesh.node(A)?;
    let file = node.dir().join("both.pcapng");
    let path = file.display().to_string();
    let text = b"nobody else says this to anybody";
    let socket = node.dir().join("agent.sock").display().to_string();
    let meshctl = mesh.bin("meshctl");
    let words = [
        meshctl.as_str(),
        "--socket",
        &socket,
        "capture",
        "--out",
        &path,
        "--time",
        "1m",
        "--packets",
        "60",
    ];
    let _capture = node.spawn("capture", &words)?;
    let said = tool::eventually("60 packets are there", SEEN, || {
        node.enter(|| -> Result<()> {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
            for _ in 0..20 {
                socket.send_to(text, "100.96.2.1:9")?;
            }
            Ok(())
        })??;
        let log = fs::read_to_string(node.dir().join("capture.log"))?;
        ensure!(log.contains("ended by packets"), "{log}");
        Ok(log)
    })?;
    let (mut inside, mut outside) = (0, 0);
    let bytes = fs::read(&file)?;
    let mut reader = PcapNgReader::new(&bytes[..])?;
    while let Some(block) = reader.next_block() {
        if let Block::EnhancedPacket(packet) = block? {
            let plain = packet.data.windows(text.len()).any(|window| window == text);
            match packet.interface_id {
                0 => inside += usize::from(plain),
                _ => {
                    ensure!(!plain, "plain text outside: {packet:?}");
                    outside += 1;
                }
            }
        }
    }
    ensure!(inside > 0 && outside > 0, "{inside} {outside}: {said}");
    // Nobody else may read it, and it is not written over.
    let mode = fs::metadata(&file)?.permissions().mode();
    ensure!(mode & 0o777 == 0o600, "{mode:o}");
    let (code, said) = run(&mesh, &["capture", "--out", &path])?;
    let kind = said.pointer("/error/kind").and_then(Value::as_str);
    ensure!((code, kind) == (64, Some("refused")), "{said}");
    mesh.ends_well()
}
