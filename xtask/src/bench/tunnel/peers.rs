//! How the other programs are set up: a device [`DEVICE`] at each end with [`ADDRESSES`], MTU
//! [`MTU_BYTES`], and otherwise as each comes.

use std::{fs, net::Ipv4Addr};

use anyhow::{Context as _, Result};
use netns_tests::{
    node::{Node, Process},
    tool,
};

use super::{install::Tool, world::Ends};
use crate::bench::UP_LIMIT;

/// Each end's device.
pub(super) const DEVICE: &str = "bench0";

/// Left and right inside the tunnel.
pub(super) const ADDRESSES: [Ipv4Addr; 2] =
    [Ipv4Addr::new(10, 77, 0, 1), Ipv4Addr::new(10, 77, 0, 2)];

/// WireGuard's own default on a path of 1500.
const MTU_BYTES: u16 = 1_420;

/// Where every program listens. Only one runs at a time.
const PORT: u16 = 52_000;

/// One end, as a set-up sees it.
struct End<'a> {
    node: &'a Node,
    /// Its address in the tunnel, and outside.
    inner: Ipv4Addr,
    outer: Ipv4Addr,
    /// The other end's.
    peer_inner: Ipv4Addr,
    peer_outer: Ipv4Addr,
}

fn two(ends: &Ends) -> [End<'_>; 2] {
    let [left, right] = ADDRESSES;
    let end = |node, inner, outer, peer_inner, peer_outer| End {
        node,
        inner,
        outer,
        peer_inner,
        peer_outer,
    };
    let [l, r] = Ends::OUTER;
    [
        end(&ends.left, left, l, right, r),
        end(&ends.right, right, r, left, l),
    ]
}

/// A WireGuard device at each end, configured by `wg`. The program is called with `words` and the
/// device's name, and stays in the foreground.
pub(super) fn wireguard(ends: &Ends, tool: &Tool, words: &[&str]) -> Result<Vec<Process>> {
    let mut private = [String::new(), String::new()];
    for key in &mut private {
        *key = tool::run("wg", &["genkey"], "")?;
    }
    let mut peers = private.clone();
    peers.reverse();
    let mut daemons = Vec::new();
    for ((end, own), peer) in two(ends).iter().zip(&private).zip(&peers) {
        daemons.push(wireguard_device(end.node, tool, words)?);
        let key = end.node.write("bench.key", own)?;
        let public = tool::run("wg", &["pubkey"], peer)?;
        let set = format!(
            "wg set {DEVICE} listen-port {PORT} private-key {} peer {} allowed-ips {}/32 endpoint {}:{PORT}",
            key.display(),
            public.trim(),
            end.peer_inner,
            end.peer_outer,
        );
        shell(end.node, &set)?;
        give_address(end)?;
    }
    Ok(daemons)
}

/// Starts a WireGuard program and waits for its control socket.
pub(super) fn wireguard_device(node: &Node, tool: &Tool, words: &[&str]) -> Result<Process> {
    let program = tool.path();
    let words = [&[program.as_str()], words, &[DEVICE]].concat();
    let socket = node.dir().join(format!("wireguard/{DEVICE}.sock"));
    if socket.exists() {
        fs::remove_file(&socket)?; // The last program's, which was killed.
    }
    let mut daemon = node.spawn("tunnel", &words)?;
    tool::eventually("the device is there", UP_LIMIT, || {
        daemon.running()?;
        fs::metadata(&socket)
            .map(drop)
            .with_context(|| format!("no control socket {}", socket.display()))
    })?;
    Ok(daemon)
}

/// `vpncloud`: its own handshake, and the cipher that it finds fastest.
pub(super) fn vpncloud(ends: &Ends, tool: &Tool) -> Result<Vec<Process>> {
    each_end(ends, |end| {
        let mut words = vec![
            tool.path(),
            format!("--device={DEVICE}"),
            "--type=tun".to_owned(),
            "--mode=router".to_owned(),
            "--no-auto-claim".to_owned(),
            format!("--claim={}/32", end.inner),
            format!("--listen={PORT}"),
            "--password=bench".to_owned(),
            "--no-port-forwarding".to_owned(),
        ];
        if end.inner < end.peer_inner {
            // If both called, their handshakes would meet and both be given up.
            words.push(format!("--peer={}:{PORT}", end.peer_outer));
        }
        let daemon = end.node.spawn("tunnel", &words)?;
        until_device(end.node)?;
        give_address(end)?; // Its own `--ip` sets another address (2.3.0).
        Ok(daemon)
    })
}

/// OpenVPN over UDP between two certificates that know each other's fingerprint. Without its kernel
/// module, which no other program here has either.
pub(super) fn openvpn(ends: &Ends, tool: &Tool) -> Result<Vec<Process>> {
    let certificates = two(ends).map(|end| certificate(end.node));
    let [left, right] = certificates;
    let mut others = [right?, left?].into_iter();
    each_end(ends, |end| {
        let role = if end.inner < end.peer_inner {
            "tls-server\ndh none"
        } else {
            "tls-client"
        };
        let config = format!(
            "dev {DEVICE}\ndev-type tun\nproto udp\nlocal {}\nport {PORT}\nremote {} {PORT}\n{role}\n\
             cert bench.pem\nkey bench.key\npeer-fingerprint {}\nifconfig {} {}\n\
             tun-mtu {MTU_BYTES}\ndisable-dco\n",
            end.outer,
            end.peer_outer,
            others.next().context("two ends")?,
            end.inner,
            end.peer_inner,
        );
        let config = end.node.write("openvpn.conf", &config)?;
        let folder = end.node.dir().display().to_string();
        let words = [
            tool.path(),
            "--cd".to_owned(),
            folder,
            "--config".to_owned(),
            config.display().to_string(),
        ];
        end.node.spawn("tunnel", &words)
    })
}

/// Makes a self-signed certificate, and returns its fingerprint.
fn certificate(node: &Node) -> Result<String> {
    let folder = node.dir();
    let [key, pem] = ["bench.key", "bench.pem"].map(|name| folder.join(name).display().to_string());
    let curve = "ec_paramgen_curve:prime256v1";
    let words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", curve, "-nodes"];
    let more = ["-keyout", &key, "-out", &pem, "-subj", "/CN=bench"];
    tool::run("openssl", &[&words[..], &more].concat(), "")?;
    let words = ["x509", "-in", &pem, "-noout", "-fingerprint", "-sha256"];
    let said = tool::run("openssl", &words, "")?;
    let (_, print) = said.trim().split_once('=').context("a fingerprint")?;
    Ok(print.to_owned())
}

/// tinc 1.0 with its default ciphers.
pub(super) fn tinc(ends: &Ends, tool: &Tool) -> Result<Vec<Process>> {
    let mut hosts = Vec::new();
    for end in two(ends) {
        let folder = end.node.dir().join("tinc");
        fs::create_dir_all(folder.join("hosts"))?;
        let name = end.node.name();
        let other = if name == "left" { "right" } else { "left" };
        fs::write(
            folder.join("tinc.conf"),
            format!("Name = {name}\nConnectTo = {other}\nInterface = {DEVICE}\n"),
        )?;
        let host = folder.join("hosts").join(name);
        fs::write(
            &host,
            format!(
                "Address = {}\nPort = {PORT}\nSubnet = {}/32\n",
                end.outer, end.inner
            ),
        )?;
        let config = format!("--config={}", folder.display());
        tool::run(&tool.path(), &[&config, "--generate-keys=2048"], "")?;
        hosts.push((name.to_owned(), fs::read_to_string(&host)?));
    }
    each_end(ends, |end| {
        let folder = end.node.dir().join("tinc");
        for (name, host) in &hosts {
            fs::write(folder.join("hosts").join(name), host)?;
        }
        let config = format!("--config={}", folder.display());
        let pid = format!("--pidfile={}", folder.join("pid").display());
        let daemon = end
            .node
            .spawn("tunnel", &[&tool.path(), "--no-detach", &config, &pid])?;
        until_device(end.node)?;
        give_address(end)?;
        Ok(daemon)
    })
}

/// Nebula without a lighthouse: each end is told where the other one is.
pub(super) fn nebula(ends: &Ends, tool: &Tool) -> Result<Vec<Process>> {
    let cert = tool.program.with_file_name("nebula-cert");
    let cert = cert.display().to_string();
    let sign = ends.left.dir();
    let at = |name: &str| sign.join(name).display().to_string();
    let (ca, ca_key) = (at("nebula-ca.crt"), at("nebula-ca.key"));
    if !sign.join("nebula-ca.crt").exists() {
        let words = ["ca", "-name", "bench", "-out-crt", &ca, "-out-key", &ca_key];
        tool::run(&cert, &words, "")?;
    }
    each_end(ends, |end| {
        let name = end.node.name();
        let (own, own_key) = (
            at(&format!("nebula-{name}.crt")),
            at(&format!("nebula-{name}.key")),
        );
        if !sign.join(format!("nebula-{name}.crt")).exists() {
            let network = format!("{}/24", end.inner);
            let words = ["sign", "-ca-crt", &ca, "-ca-key", &ca_key, "-name", name];
            let more = [
                "-networks",
                &network,
                "-out-crt",
                &own,
                "-out-key",
                &own_key,
            ];
            tool::run(&cert, &[&words[..], &more].concat(), "")?;
        }
        let all = "[{port: any, proto: any, host: any}]";
        let config = format!(
            "pki: {{ca: {ca}, cert: {own}, key: {own_key}}}\n\
             static_host_map: {{\"{}\": [\"{}:{PORT}\"]}}\n\
             lighthouse: {{am_lighthouse: false, hosts: []}}\n\
             listen: {{host: 0.0.0.0, port: {PORT}}}\n\
             tun: {{dev: {DEVICE}, mtu: {MTU_BYTES}}}\n\
             firewall: {{outbound: {all}, inbound: {all}}}\n",
            end.peer_inner, end.peer_outer,
        );
        let config = end.node.write("nebula.yml", &config)?.display().to_string();
        end.node
            .spawn("tunnel", &[&tool.path(), "-config", &config])
    })
}

fn each_end(ends: &Ends, start: impl FnMut(&End) -> Result<Process>) -> Result<Vec<Process>> {
    two(ends).iter().map(start).collect()
}

fn give_address(end: &End) -> Result<()> {
    let script = format!(
        "ip link set {DEVICE} mtu {MTU_BYTES} up && ip addr add {}/24 dev {DEVICE}",
        end.inner
    );
    shell(end.node, &script)
}

fn until_device(node: &Node) -> Result<()> {
    tool::eventually("the device is there", UP_LIMIT, || {
        shell(node, &format!("ip link show {DEVICE}"))
    })
}

/// Runs a line of shell on a node.
pub(super) fn shell(node: &Node, line: &str) -> Result<()> {
    let output = node.run(&["sh", "-c", line], UP_LIMIT)?;
    output.ok().map(drop).with_context(|| line.to_owned())
}
