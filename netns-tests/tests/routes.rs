//! By which way nodes and their LANs reach each other: which sites connect directly, and LANs that have one range in
//! common, with several gateways.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    mesh::{Mesh, word},
    node::Node,
    tool,
    traffic::FlowReport,
};
use serde_json::Value;

/// Until what a manifest says is in force.
const SOON: Duration = Duration::from_secs(20);

/// A flow's own time, and more.
const FLOW_LIMIT: Duration = Duration::from_secs(60);

/// Counts datagrams between the two sites, past the relay. The name is the table's.
const BETWEEN: &str = "table inet between { counter datagrams {}\nchain forward { type filter hook forward priority -40; \
                       ip daddr 203.0.113.2 meta l4proto udp counter name datagrams; }; }\n";

/// The community of the cloud and `others`; `None`: there is none.
fn community(mesh: &Mesh, others: Option<&str>) -> Result<()> {
    let path = mesh.manifests().join("community.yaml");
    let Some(others) = others else {
        return Ok(fs::remove_file(path)?);
    };
    let text = format!(
        "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: Community\nmetadata: {{name: north}}\nspec: {{sites: [cloud, {others}]}}\n"
    );
    Ok(fs::write(path, text)?)
}

/// Waits until both ends are in `state`, which traffic one way keeps up, and for this reason if it is said.
fn both_are(mesh: &Mesh, state: &str, reason: Option<&str>) -> Result<()> {
    tool::eventually(&format!("both are {state}"), SOON, || {
        for (of, peer) in [("edge-a1", "edge-b1"), ("edge-b1", "edge-a1")] {
            let why = mesh.ask(of, &["path", "why", peer])?;
            ensure!(word(&why, "state") == state, "{why}");
            ensure!(
                reason.is_none_or(|reason| word(&why, "reason") == reason),
                "{why}"
            );
        }
        Ok(())
    })
}

fn flow(node: &Node, to: &str, words: [&str; 4]) -> Result<FlowReport> {
    let lab = tool::binary("lab")?.display().to_string();
    let words = [&[lab.as_str(), "flow", to], &words[..]].concat();
    Ok(serde_json::from_str(&node.run(&words, FLOW_LIMIT)?.ok()?)?)
}

fn datagrams_between(mesh: &Mesh) -> Result<u64> {
    let router = mesh.site("site-a")?.router().netns();
    let list = ["list", "counter", "inet", "between", "datagrams"];
    let words = [&["netns", "exec", router, "nft", "-j"], &list[..]].concat();
    let said: Value = serde_json::from_str(&tool::run("ip", &words, "")?)?;
    let packets = said.pointer("/nftables/1/counter/packets");
    packets
        .and_then(Value::as_u64)
        .with_context(|| format!("no counter: {said}"))
}

#[test]
fn an_open_flow_follows_communities_from_path_to_path_without_a_loss_and_nothing_is_tried_past_them()
-> Result<()> {
    let mesh = Mesh::two_sites()?;
    mesh.serve("edge-b1", "echo", &["echo", "0.0.0.0:9000"])?;
    let (a1, echo) = (mesh.node("edge-a1")?, "100.96.2.1:9000");
    flow(&a1, echo, ["200", "10", "100", "1000"])?;
    both_are(&mesh, "direct", None)?;
    let report = thread::scope(|scope| -> Result<_> {
        // 20 s, and longer than what happens meanwhile.
        let flow = scope.spawn(|| flow(&a1, echo, ["2000", "10", "100", "2000"]));
        community(&mesh, Some("site-a"))?;
        both_are(&mesh, "relayed", Some("policy_relay_only"))?;
        community(&mesh, Some("site-a, site-b"))?;
        both_are(&mesh, "direct", None)?;
        ensure!(!flow.is_finished(), "it was to be open all the time");
        flow.join()
            .map_err(|_| anyhow::anyhow!("the flow panicked"))?
    })?;
    assert_eq!(report.lost, Vec::<u64>::new(), "{report:?}");

    // A node that starts without its controller keeps to it, though it remembers the way.
    community(&mesh, Some("site-a"))?;
    both_are(&mesh, "relayed", Some("policy_relay_only"))?;
    mesh.kill("cloud", "mesh-controller")?;
    let router = mesh.site("site-a")?.router().netns();
    tool::nft(router, BETWEEN)?;
    mesh.kill("edge-a1", "mesh-agent")?;
    mesh.start_agent("edge-a1")?;
    mesh.agent_ready("edge-a1", 2)?;
    let answered = || -> Result<()> {
        let report = flow(&a1, echo, ["100", "10", "100", "1000"])?;
        ensure!(report.answered > 0, "{report:?}");
        Ok(())
    };
    tool::eventually("it answers by the relay", SOON, answered)?;
    both_are(&mesh, "relayed", Some("policy_relay_only"))?;
    let report = flow(&a1, echo, ["500", "10", "100", "1000"])?;
    assert_eq!(report.answered, report.sent, "{report:?}");
    assert_eq!(datagrams_between(&mesh)?, 0, "sent past the relay");
    mesh.start_controller()?;
    community(&mesh, None)?;
    tool::eventually("direct again", SOON, || {
        answered()?;
        ensure!(datagrams_between(&mesh)? > 0, "nothing is tried");
        Ok(())
    })?;
    both_are(&mesh, "direct", None)?;
    mesh.ends_well()
}

/// The devices, and their LAN, as each other's sites know them. To themselves both are `LAN`.
const A: [&str; 2] = ["10.201.0.5", "fd99:a::5"];
const B: [&str; 2] = ["10.202.0.5", "fd99:b::5"];
const LAN: [&str; 2] = ["192.168.77.5", "fd99:1::5"];

const ROUTES: &str = "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: SiteRoute\nmetadata: {name: hall-a}\nspec:\n  \
                      gateways: [edge-a1, edge-a2]\n  subnets:\n  - {subnet: 192.168.77.0/24, mappedTo: 10.201.0.0/24}\n  \
                      - {subnet: \"fd99:1::/64\", mappedTo: \"fd99:a::/64\"}\n---\n\
                      apiVersion: mesh.holdfast.dev/v1alpha1\nkind: SiteRoute\nmetadata: {name: hall-b}\nspec:\n  \
                      gateways: [edge-b1]\n  subnets:\n  - {subnet: 192.168.77.0/24, mappedTo: 10.202.0.0/24}\n  \
                      - {subnet: \"fd99:1::/64\", mappedTo: \"fd99:b::/64\"}\n";

/// A device, 5 in its LAN, and that LAN's gateways, 1 and up. It sends by the last of them.
fn lan(mesh: &Mesh, name: &str, gateways: &[&str]) -> Result<Node> {
    let device = mesh.lab().add_node(name)?;
    tool::ip(
        device.netns(),
        "link add lan type bridge\nlink set lan up\naddr add 192.168.77.5/24 dev lan\n\
         addr add fd99:1::5/64 dev lan nodad\n",
    )?;
    for (number, gateway) in (1..).zip(gateways) {
        let (gateway, port) = (mesh.node(gateway)?, format!("port{number}"));
        mesh.lab().veth(&device, &port, &gateway, "lan0")?;
        tool::ip(device.netns(), &format!("link set {port} master lan\n"))?;
        let here = format!(
            "addr add 192.168.77.{number}/24 dev lan0\naddr add fd99:1::{number}/64 dev lan0 nodad\n"
        );
        tool::ip(gateway.netns(), &here)?;
        gateway.sysctl("net/ipv4/conf/lan0/forwarding", "1")?;
        gateway.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        let routers = format!(
            "route replace default via 192.168.77.{number}\nroute replace default via fd99:1::{number}\n"
        );
        tool::ip(device.netns(), &routers)?;
    }
    Ok(device)
}

/// Both LANs with their routes, the devices with servers.
fn two_lans() -> Result<(Mesh, Node, Node)> {
    let mesh = Mesh::two_sites_of(&["edge-a1", "edge-a2"], &["edge-b1"])?;
    let a = lan(&mesh, "device-a", &["edge-a1", "edge-a2"])?;
    let b = lan(&mesh, "device-b", &["edge-b1"])?;
    for device in ["device-a", "device-b"] {
        mesh.serve(device, "http", &["http", device, "[::]:8080"])?;
        mesh.serve(device, "echo", &["echo", "[::]:9000"])?;
    }
    fs::write(mesh.manifests().join("routes.yaml"), ROUTES)?;
    Ok((mesh, a, b))
}

fn at(ip: &str, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(ip.parse()?, port))
}

/// `device` gets an answer by each family, as who it is to the other site.
fn reaches(mesh: &Mesh, device: &str, other: &str, to: [&str; 2], from: [&str; 2]) -> Result<()> {
    for (to, from) in to.into_iter().zip(from) {
        let url = format!("http://{}/", at(to, 8080)?);
        let hello = tool::eventually(&url, SOON, || {
            mesh.get(device, &[&url], Duration::from_secs(2))
        })?;
        assert_eq!(
            (hello.node.as_str(), hello.client.ip()),
            (other, from.parse::<IpAddr>()?)
        );
    }
    Ok(())
}

/// Many segments at a time both ways, whose checksums are computed late.
fn bulk(from: &Node, to: &Node, address: SocketAddr) -> Result<()> {
    const BYTES: usize = 4 << 20;
    let sent: Vec<u8> = (0..BYTES).map(|at| (at % 251).to_le_bytes()[0]).collect();
    let listener = to.enter(|| TcpListener::bind(("::", address.port())))??;
    thread::scope(|scope| -> Result<()> {
        let echo = scope.spawn(move || -> Result<()> {
            let (mut stream, _) = listener.accept()?;
            let mut bytes = vec![0; BYTES];
            stream.read_exact(&mut bytes)?;
            Ok(stream.write_all(&bytes)?)
        });
        let mut stream = from.enter(|| TcpStream::connect_timeout(&address, SOON))??;
        stream.set_read_timeout(Some(SOON))?;
        stream.write_all(&sent)?;
        let mut came = vec![0; BYTES];
        stream.read_exact(&mut came)?;
        ensure!(came == sent, "other bytes came back from {address}");
        echo.join()
            .map_err(|_| anyhow::anyhow!("the server panicked"))?
    })
}

/// A port where nobody listens refuses: the far device's ICMP error names what was sent here.
fn is_refused(device: &Node, to: SocketAddr) -> Result<()> {
    let socket = device.enter(|| UdpSocket::bind(("::", 0)))??;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    let mapped = match to {
        SocketAddr::V4(v4) => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
        SocketAddr::V6(_) => to,
    };
    socket.connect(mapped)?;
    tool::eventually("the port refuses", SOON, || {
        socket.send(b"anybody?").ok(); // The error may come with the next call.
        let error = socket.recv(&mut [0; 16]).err();
        let refused =
            |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionRefused;
        ensure!(error.as_ref().is_some_and(refused), "{to}: {error:?}");
        Ok(())
    })
}

fn mapped_by(mesh: &Mesh, gateway: &str) -> Result<u64> {
    let status = mesh.status(gateway)?;
    let mapped = status.pointer("/service_packets/mapping_mapped");
    Ok(mapped.and_then(Value::as_u64).unwrap_or_default())
}

#[test]
fn devices_of_two_lans_with_one_range_reach_each_other_as_the_mesh_calls_them() -> Result<()> {
    let (mesh, a, b) = two_lans()?;
    reaches(&mesh, "device-b", "device-a", A, B)?;
    reaches(&mesh, "device-a", "device-b", B, A)?;
    // Nodes of the mesh do too; to a gateway its own LAN is what it is.
    for (node, ip) in [("edge-b1", A[0]), ("edge-a1", LAN[0]), ("edge-a2", LAN[0])] {
        let url = format!("http://{ip}:8080/");
        assert_eq!(mesh.get(node, &[&url], SOON)?.node, "device-a", "{node}");
    }
    for (from, to, name) in [(&b, &a, A), (&a, &b, B)] {
        for (ip, port) in name.into_iter().zip([8_100, 8_101]) {
            bulk(from, to, at(ip, port)?)?;
            is_refused(from, at(ip, 9)?)?;
            let echo = at(ip, 9000)?.to_string();
            // Larger than any packet on the way: in fragments, and those again.
            flow(from, &echo, ["3", "10", "1900", "200"])?;
            let report = flow(from, &echo, ["50", "10", "1900", "1000"])?;
            assert_eq!(report.answered, report.sent, "{echo}: {report:?}");
        }
    }
    // What neither site calls so is nobody.
    let own = format!("http://{}/", at(LAN[0], 8080)?);
    let hello = mesh.get("device-b", &[&own], SOON)?;
    assert_eq!(
        hello.node, "device-b",
        "the LAN's own address is the LAN's own"
    );
    mesh.ends_well()
}

#[test]
fn when_a_gateway_dies_the_other_one_takes_over_within_the_path_s_dead_time() -> Result<()> {
    let (mesh, _, b) = two_lans()?;
    reaches(&mesh, "device-b", "device-a", A, B)?;
    let echo = at(A[0], 9000)?.to_string();
    let before = mapped_by(&mesh, "edge-a1")?;
    let report = thread::scope(|scope| -> Result<_> {
        let flow = scope.spawn(|| flow(&b, &echo, ["1000", "10", "100", "2000"]));
        // The first by name is the one that is used.
        tool::eventually("edge-a1 carries it", SOON, || {
            let now = mapped_by(&mesh, "edge-a1")?;
            ensure!(now > before + 100, "{now}, {before} before");
            Ok(())
        })?;
        mesh.kill("edge-a1", "mesh-agent")?;
        ensure!(!flow.is_finished(), "it was to be open then");
        flow.join()
            .map_err(|_| anyhow::anyhow!("the flow panicked"))?
    })?;
    // 1.2 s until a path is dead, at most; and this machine's own pauses.
    assert!(report.longest_gap_ms < 1_700, "{report:?}");
    assert!(
        report.longest_gap_ms > 100,
        "edge-a1 was not used: {report:?}"
    );
    println!("{} ms without an answer", report.longest_gap_ms);

    // All of it from what is on the disks.
    mesh.kill("cloud", "mesh-controller")?;
    for node in ["edge-a2", "edge-b1"] {
        mesh.kill(node, "mesh-agent")?;
        mesh.start_agent(node)?;
        mesh.agent_ready(node, 3)?;
    }
    reaches(&mesh, "device-b", "device-a", A, B)?;
    mesh.start_agent("edge-a1")?;
    mesh.agent_ready("edge-a1", 3)?;
    reaches(&mesh, "device-b", "device-a", A, B)?;
    mesh.ends_well()
}
