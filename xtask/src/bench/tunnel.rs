//! Holdfast's direct path beside the raw way and two other user-space WireGuards, in turns, over the
//! same two nodes: one router hop of veth, MTU 1500 outside and 1420 inside.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    mesh::Mesh,
    node::{Node, Process},
    tool,
};
use serde_json::Value;

use super::{PEER, Samples, UP_LIMIT, two_nodes};
use crate::{cargo, root};

/// Length of one iperf3 run.
const SECONDS: &str = "3";

/// One run and its connection set-up; beyond it hangs.
const RUN_LIMIT: Duration = Duration::from_secs(20);

/// A way from `cloud` to the peer.
struct Case {
    name: &'static str,
    /// The peer's address on this way.
    address: String,
    /// Both ends' daemons.
    daemons: Vec<Process>,
}

/// Measures every case in each round.
///
/// # Errors
///
/// If a tunnel does not come up.
pub(super) fn run(bins: &Path, rounds: u32, samples: &mut Samples) -> Result<()> {
    let boringtun = boringtun()?;
    let mesh = two_nodes(bins)?;
    let (left, right) = (mesh.node("cloud")?, mesh.node(PEER)?);
    let direct = "100.96.0.2".to_owned();
    let _server = right.spawn("iperf3", &["iperf3", "--server"])?;
    until_direct(&mesh, &left, &direct)?;
    let agents = vec![
        mesh.take("cloud", "mesh-agent")?,
        mesh.take(PEER, "mesh-agent")?,
    ];
    let go = ["wireguard-go", "-f"].map(str::to_owned);
    let boring = [
        boringtun.display().to_string(),
        "-f".to_owned(),
        "--disable-drop-privileges".to_owned(),
    ];
    let cases = [
        Case {
            name: "raw",
            address: "198.51.100.20".to_owned(),
            daemons: Vec::new(),
        },
        Case {
            name: "holdfast",
            address: direct,
            daemons: agents,
        },
        Case {
            name: "wireguard-go",
            address: "10.77.1.2".to_owned(),
            daemons: wireguard(&left, &right, "wgo", 1, &go)?,
        },
        Case {
            name: "boringtun",
            address: "10.77.2.2".to_owned(),
            daemons: wireguard(&left, &right, "bt", 2, &boring)?,
        },
    ];
    for round in 1..=rounds {
        for case in &cases {
            eprintln!("round {round} of {rounds}: {}", case.name);
            measure(&left, case, samples).with_context(|| case.name.to_owned())?;
        }
    }
    for case in &cases {
        let peaks = case
            .daemons
            .iter()
            .map(Process::resident_peak_kib)
            .collect::<Result<Vec<_>>>()?;
        if let Some(peak) = peaks.into_iter().max() {
            samples.add(case.name, "resident_peak", "KiB", peak as f64);
        }
    }
    Ok(())
}

fn measure(left: &Node, case: &Case, samples: &mut Samples) -> Result<()> {
    let before = cpu(case)?;
    let (bps, bytes) = iperf(left, &case.address, &["--parallel", "1"])?;
    let spent = cpu(case)? - before;
    samples.add(case.name, "tcp_1", "Mb/s", bps / 1e6);
    if !case.daemons.is_empty() {
        samples.add(case.name, "cpu_per_gb", "s", spent / (bytes / 1e9));
    }
    samples.add(
        case.name,
        "tcp_4",
        "Mb/s",
        iperf(left, &case.address, &["--parallel", "4"])?.0 / 1e6,
    );
    let udp = ["--udp", "--bitrate", "0", "--length", "1200"];
    samples.add(
        case.name,
        "udp_received",
        "Mb/s",
        iperf(left, &case.address, &udp)?.0 / 1e6,
    );
    samples.add(case.name, "rtt", "µs", ping(left, &case.address)?);
    Ok(())
}

fn cpu(case: &Case) -> Result<f64> {
    let times = case
        .daemons
        .iter()
        .map(Process::cpu_time)
        .collect::<Result<Vec<_>>>()?;
    Ok(times.iter().map(Duration::as_secs_f64).sum())
}

/// Received bits a second, and bytes.
fn iperf(left: &Node, to: &str, words: &[&str]) -> Result<(f64, f64)> {
    let command = [
        &["iperf3", "--json", "--time", SECONDS, "--client", to],
        words,
    ]
    .concat();
    let said = left.run(&command, RUN_LIMIT)?;
    let value: Value =
        serde_json::from_str(&said.stdout).with_context(|| format!("iperf3: {}", said.stdout))?;
    let udp = words.contains(&"--udp");
    let number = |pointer: &str| value.pointer(pointer).and_then(Value::as_f64);
    let sum = if udp { "/end/sum" } else { "/end/sum_received" };
    let bps = number(&format!("{sum}/bits_per_second"))
        .with_context(|| format!("iperf3: {}", said.stdout))?;
    let bytes = number(&format!("{sum}/bytes")).unwrap_or_default();
    // iperf3's UDP sum is what was sent; what was lost of it is beside it.
    let lost = if udp {
        number("/end/sum/lost_percent").unwrap_or_default() / 100.0
    } else {
        0.0
    };
    Ok((bps * (1.0 - lost), bytes))
}

/// Mean round trip of 500 echoes, in microseconds.
fn ping(left: &Node, to: &str) -> Result<f64> {
    let words = ["ping", "-q", "-c", "500", "-i", "0.002", to];
    let said = left.run(&words, RUN_LIMIT)?.ok()?;
    let line = said
        .lines()
        .find(|line| line.starts_with("rtt"))
        .context("no rtt line")?;
    let mean = line.split('/').nth(4).with_context(|| line.to_owned())?;
    Ok(mean.parse::<f64>()? * 1_000.0)
}

fn until_direct(mesh: &Mesh, left: &Node, address: &str) -> Result<()> {
    tool::eventually("the path is direct", UP_LIMIT, || {
        left.run(&["ping", "-q", "-c", "1", "-W", "1", address], RUN_LIMIT)?
            .ok()?;
        let why = mesh.ask("cloud", &["path", "why", PEER])?;
        ensure!(
            why.get("state").and_then(Value::as_str) == Some("direct"),
            "{why}"
        );
        Ok(())
    })
}

/// A WireGuard device at each end, with `wg` for the configuration.
fn wireguard(
    left: &Node,
    right: &Node,
    name: &str,
    subnet: u8,
    program: &[String],
) -> Result<Vec<Process>> {
    let keys = [
        tool::run("wg", &["genkey"], "")?,
        tool::run("wg", &["genkey"], "")?,
    ];
    let port = 52_000 + u16::from(subnet);
    let ends = [
        (left, "l", "198.51.100.20", 1),
        (right, "r", "198.51.100.10", 2),
    ];
    let mut daemons = Vec::new();
    for ((node, side, peer, host), index) in ends.into_iter().zip(0..) {
        let device = format!("{name}{side}");
        let private = node.write(
            &format!("{device}.key"),
            keys.get(index).context("two keys")?,
        )?;
        let public = tool::run("wg", &["pubkey"], keys.get(1 - index).context("two keys")?)?;
        daemons.push(node.spawn(&device, &[program, std::slice::from_ref(&device)].concat())?);
        let socket = node.dir().join(format!("wireguard/{device}.sock"));
        tool::eventually("the device is there", UP_LIMIT, || {
            fs::metadata(&socket)
                .map(drop)
                .with_context(|| socket.display().to_string())
        })?;
        let script = format!(
            "wg set {device} listen-port {port} private-key {} peer {} allowed-ips 10.77.{subnet}.0/24 endpoint {peer}:{port} &&
             ip addr add 10.77.{subnet}.{host}/24 dev {device} && ip link set {device} mtu 1420 up",
            private.display(),
            public.trim(),
        );
        node.run(&["sh", "-c", &script], RUN_LIMIT)?.ok()?;
    }
    Ok(daemons)
}

/// Installs `boringtun-cli` once, into the target folder.
fn boringtun() -> Result<PathBuf> {
    let folder = root().join("target/bench-tools");
    let program = folder.join("bin/boringtun-cli");
    if !program.is_file() {
        eprintln!("installing boringtun-cli …");
        let folder = folder.display().to_string();
        let status = cargo(&[
            "install",
            "--quiet",
            "--locked",
            "--root",
            &folder,
            "boringtun-cli",
        ])
        .status()?;
        ensure!(status.success(), "cargo install boringtun-cli failed");
    }
    Ok(program)
}
