//! Two devices that run nothing of Holdfast's, each behind a gateway and on an Ethernet of 1,500 bytes, speak TCP through the
//! mesh, whose packets have 1,280, while nobody tells them by ICMP.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Shutdown, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{mesh::Mesh, node::Node, tool};
use serde_json::Value;

/// What should happen soon has happened by then, or never will.
const SOON: Duration = Duration::from_secs(40);

/// 10 MB take a second; what is not through by then hangs.
const HANGS: Duration = Duration::from_secs(8);

/// IPv4 and IPv6 at the other side.
const FAR: [&str; 2] = ["192.168.8.2", "fd08::2"];

/// What nobody hears: that a packet is too big (RFC 1191; RFC 8201).
const NO_ICMP: &str = "table inet noicmp { chain output { type filter hook output priority 0; \
    icmp type destination-unreachable drop; icmpv6 type packet-too-big drop; }; }\n";

/// A device behind `gateway`, on a LAN of its own whose addresses have this number.
fn device(mesh: &Mesh, gateway: &str, number: u8) -> Result<Node> {
    let device = mesh.lab().add_node(&format!("device{number}"))?;
    let gateway = mesh.node(gateway)?;
    mesh.lab().veth(&device, "eth0", &gateway, "lan0")?;
    let lan = format!(
        "addr add 192.168.{number}.1/24 dev lan0\naddr add fd0{number}::1/64 dev lan0 nodad\n"
    );
    tool::ip(gateway.netns(), &lan)?;
    let here = format!(
        "addr add 192.168.{number}.2/24 dev eth0\naddr add fd0{number}::2/64 dev eth0 nodad\n\
         route add default via 192.168.{number}.1\nroute add default via fd0{number}::1\n"
    );
    tool::ip(device.netns(), &here)?;
    gateway.sysctl("net/ipv4/conf/lan0/forwarding", "1")?;
    gateway.sysctl("net/ipv6/conf/all/forwarding", "1")?;
    tool::nft(gateway.netns(), NO_ICMP)?;
    Ok(device)
}

/// The mesh knows what is behind both.
fn advertise(mesh: &Mesh) -> Result<()> {
    let path = mesh.manifests().join("mesh.yaml");
    let mut text = fs::read_to_string(&path)?;
    for (own, more) in [
        (
            "overlayIPv4: 100.96.1.1\n",
            "overlayIPv4: 100.96.1.1\n  prefixes: [\"192.168.7.0/24\", \"fd07::/64\"]\n",
        ),
        (
            "prefixes: [\"fd42:b1::/64\"]\n",
            "prefixes: [\"192.168.8.0/24\", \"fd08::/64\"]\n",
        ),
    ] {
        ensure!(text.contains(own), "{text}");
        text = text.replace(own, more);
    }
    Ok(fs::write(&path, text)?)
}

/// The largest segment that two devices agree on.
fn segment(from: &Node, to: &str) -> Result<u64> {
    let words = ["iperf3", "-J", "-c", to, "-n", "1K"];
    let said: Value = serde_json::from_str(&from.run(&words, SOON)?.ok()?)?;
    let mss = said.pointer("/start/tcp_mss_default");
    mss.and_then(Value::as_u64).context("no segment size")
}

/// Sends 10 MB from the one who connects, or to it, and reads them all at the other end.
fn ten_megabytes(
    near: &Node,
    far: &Node,
    to: &str,
    back: bool,
    limit: Duration,
) -> Result<Duration> {
    const LENGTH: usize = 10_000_000;
    let to: IpAddr = to.parse()?;
    let listener = far.enter(|| TcpListener::bind((to, 0)))??;
    let address = listener.local_addr()?;
    let begin = Instant::now();
    let near = near.enter(|| TcpStream::connect_timeout(&address, limit))??;
    let (far, _) = listener.accept()?;
    let (mut sender, mut receiver) = if back { (far, near) } else { (near, far) };
    sender.set_write_timeout(Some(limit))?;
    receiver.set_read_timeout(Some(limit))?;
    let received = thread::scope(|scope| {
        let sending = scope.spawn(move || {
            sender.write_all(&vec![0x5a; LENGTH])?;
            sender.shutdown(Shutdown::Write)
        });
        let mut received = Vec::new();
        let read = receiver.read_to_end(&mut received);
        drop(receiver); // Ends the sender, too, if nothing came.
        read.and(sending.join().unwrap_or(Ok(())))
            .map(|()| received)
    })?;
    ensure!(received == vec![0x5a; LENGTH], "{} bytes", received.len());
    Ok(begin.elapsed())
}

fn clamped(gateway: &Node) -> Result<String> {
    let list = [
        "netns",
        "exec",
        gateway.netns(),
        "nft",
        "list",
        "table",
        "inet",
        "holdfast_mss",
    ];
    tool::run("ip", &list, "")
}

#[test]
fn tcp_between_devices_on_ethernets_passes_the_tunnel_where_icmp_does_not() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let gateways = [mesh.node("edge-a1")?, mesh.node("edge-b1")?];
    let near = device(&mesh, "edge-a1", 7)?;
    let far = device(&mesh, "edge-b1", 8)?;
    // Nothing is handed on yet, but what `edge-b1` has behind it.
    assert!(
        clamped(&gateways[0]).is_err(),
        "{:?}",
        clamped(&gateways[0])
    );
    advertise(&mesh)?;
    let _server = far.spawn("iperf3", &["iperf3", "-s"])?;
    for (gateway, to) in gateways.iter().zip(FAR) {
        tool::eventually("the segments are clamped", SOON, || clamped(gateway))?;
        let words = ["ping", "-c", "1", "-W", "1", to];
        tool::eventually("the far device answers", SOON, || {
            near.run(&words, SOON)?.ok()
        })?;
    }
    for to in FAR {
        let mss = segment(&near, to)?;
        // 1,280 without the headers of IP and TCP, and TCP's timestamps.
        let expected = if to.contains(':') { 1_208 } else { 1_228 };
        assert_eq!(mss, expected);
        for back in [false, true] {
            let time = ten_megabytes(&near, &far, to, back, SOON)?;
            eprintln!("{to}, back: {back}: 10 MB in segments of {mss} bytes in {time:?}");
        }
    }
    let rules = clamped(&gateways[0])?;
    eprintln!("{rules}");
    let counted = rules.lines().filter(|line| line.contains("maxseg"));
    let counted = counted.filter(|line| !line.contains("counter packets 0 "));
    assert_eq!(counted.count(), 2, "{rules}");

    // Who flushes all tables loses it for half a minute; so it is seen what would be without it.
    let flush = |gateway: &Node| tool::nft(gateway.netns(), "delete table inet holdfast_mss\n");
    gateways.iter().try_for_each(flush)?;
    let hung = ten_megabytes(&near, &far, FAR[0], false, HANGS);
    assert!(hung.is_err(), "it passed without: {hung:?}");
    for gateway in &gateways {
        tool::eventually("they come back", SOON, || clamped(gateway))?;
    }

    let mut agent = mesh.take("edge-a1", "mesh-agent")?;
    assert!(agent.terminate(SOON)?.success(), "{}", agent.log());
    assert!(clamped(&gateways[0]).is_err(), "it goes with the agent");
    mesh.ends_well()
}
