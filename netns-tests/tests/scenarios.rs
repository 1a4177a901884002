//! Holdfast's main promises, with the real binaries.

use std::{fs, os::unix::net::UnixDatagram, time::Duration};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    mesh::{Mesh, word},
    node::Node,
    tool,
};
use serde_json::Value;

const INVENTORY: &str = "http://inventory.shop.svc.cluster.local/";

/// One request over a path that may have to be found first.
const REQUEST_LIMIT: Duration = Duration::from_secs(8);

/// Until a path, a name or a peer is as it has to be.
const SOON: Duration = Duration::from_secs(20);

#[test]
fn a_service_behind_two_nats_answers_by_name_and_sees_its_client() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    mesh.serve("edge-b1", "inventory", &["http", "edge-b1", "[::]:8080"])?;
    let hello = mesh.get("edge-a1", &["-4", INVENTORY], REQUEST_LIMIT)?;
    assert_eq!(hello.node, "edge-b1");
    assert_eq!(hello.client.ip().to_string(), "100.96.1.1");
    becomes_direct(&mesh, "edge-a1", "edge-b1")?;
    mesh.ends_well()
}

#[test]
fn a_path_goes_back_to_the_relay_when_the_direct_one_dies() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    mesh.serve("edge-b1", "inventory", &["http", "edge-b1", "[::]:8080"])?;
    mesh.get("edge-a1", &["-4", INVENTORY], REQUEST_LIMIT)?;
    becomes_direct(&mesh, "edge-a1", "edge-b1")?;
    // Site A may speak with the cloud alone: the relay is what is left.
    let only_cloud = "table inet only\ntable inet only { chain forward { type filter hook forward priority -20; \
                      oifname \"wan\" ip daddr != 198.51.100.10 drop; \
                      iifname \"wan\" ip saddr != 198.51.100.10 drop; }; }\n";
    tool::nft(mesh.site("site-a")?.router().netns(), only_cloud)?;
    tool::eventually("the path is relayed again", SOON, || {
        mesh.get("edge-a1", &["-4", INVENTORY], Duration::from_secs(1))
            .ok();
        let why = mesh.ask("edge-a1", &["path", "why", "edge-b1"])?;
        ensure!(word(&why, "state") == "relayed", "{why}");
        Ok(())
    })?;
    assert_eq!(
        mesh.get("edge-a1", &["-4", INVENTORY], REQUEST_LIMIT)?.node,
        "edge-b1"
    );
    mesh.ends_well()
}

#[test]
fn a_flow_survives_a_new_public_address() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    mesh.serve("edge-b1", "inventory", &["http", "edge-b1", "[::]:8080"])?;
    mesh.get("edge-a1", &["-4", INVENTORY], REQUEST_LIMIT)?;
    let moved = [203, 0, 113, 77].into();
    mesh.site("site-a")?.set_wan(mesh.lab().internet(), moved)?;
    tool::eventually("the service answers again", SOON, || {
        mesh.get("edge-a1", &["-4", INVENTORY], Duration::from_secs(1))
    })?;
    mesh.ends_well()
}

#[test]
fn a_changed_manifest_reaches_the_nodes() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let before = mesh.resolve("edge-a1", "kiosk.shop.svc.cluster.local");
    assert!(before.is_err(), "{before:?}");
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: kiosk, namespace: shop}\nspec:\n  \
                   clusterIP: 10.43.0.99\n  ports: [{port: 80, protocol: TCP}]\n";
    fs::write(mesh.manifests().join("kiosk.yaml"), service)?;
    tool::eventually("the name is known", SOON, || {
        let address = mesh.resolve("edge-a1", "kiosk.shop.svc.cluster.local")?;
        ensure!(address.to_string() == "10.43.0.99", "{address}");
        Ok(())
    })?;
    fs::remove_file(mesh.manifests().join("kiosk.yaml"))?;
    tool::eventually("the name is gone", SOON, || {
        let still = mesh.resolve("edge-a1", "kiosk.shop.svc.cluster.local");
        ensure!(still.is_err(), "{still:?}");
        Ok(())
    })?;
    mesh.ends_well()
}

/// Two servers on one edge node, asked from another: all words of the manifest must get from
/// its file to the kernel of a node that is behind a NAT.
#[test]
fn a_service_keeps_its_clients_and_stays_on_the_node_as_its_manifest_says() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    mesh.serve("edge-b1", "one", &["http", "one", "[::]:8080"])?;
    mesh.serve("edge-b1", "two", &["http", "two", "[::]:8081"])?;
    let address = mesh.resolve("edge-a1", "edge-b1.mesh")?;
    let slice = |port: u16| {
        format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: kiosk-{port}, namespace: \
             shop, labels: {{kubernetes.io/service-name: kiosk}}}}\naddressType: IPv4\nports: [{{port: {port}, \
             protocol: TCP}}]\nendpoints: [{{addresses: [{address}], nodeName: edge-b1}}]\n"
        )
    };
    let says = |more: &str| -> Result<()> {
        let service = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: kiosk, namespace: shop}}\nspec:\n  clusterIP: \
             10.43.0.99\n  type: NodePort\n  externalTrafficPolicy: Local\n  externalIPs: [198.18.0.9]\n  \
             ports: [{{port: 80, nodePort: 30080, protocol: TCP}}]\n{more}"
        );
        let text = [service, slice(8080), slice(8081)].concat();
        Ok(fs::write(mesh.manifests().join("kiosk.yaml"), text)?)
    };
    let ask = || mesh.get("edge-a1", &["http://10.43.0.99/"], Duration::from_secs(1));

    says("  sessionAffinity: ClientIP\n")?;
    tool::eventually("somebody answers", SOON, ask)?;
    let first = ask()?.node;
    for _ in 0..16 {
        ensure!(ask()?.node == first, "the client did not keep {first}");
    }
    says("")?;
    tool::eventually("the other answers too", SOON, || {
        let node = ask()?.node;
        ensure!(node != first, "again {node}");
        Ok(())
    })?;
    let balance = "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshService\nmetadata: {name: kiosk, namespace: shop}\n\
                   spec: {policy: round-robin}\n";
    fs::write(mesh.manifests().join("kiosk-balance.yaml"), balance)?;
    tool::eventually("they take turns", SOON, || {
        // By chance once in 500,000 times.
        let nodes = (0..20)
            .map(|_| Ok(ask()?.node))
            .collect::<Result<Vec<_>>>()?;
        ensure!(
            nodes.windows(2).all(|two| two.first() != two.last()),
            "{nodes:?}"
        );
        Ok(())
    })?;
    says("  internalTrafficPolicy: Local\n")?;
    tool::eventually("the node without an endpoint refuses", SOON, || {
        let error = ask().map(|hello| hello.node).err().context("it answers")?;
        let text = format!("{error:#}");
        ensure!(text.contains("connect to server"), "{text}"); // Not a time-out.
        Ok(())
    })?;
    // Neither policy is for clients on the node that ask for addresses from outside.
    let own = mesh.resolve("edge-a1", "edge-a1.mesh")?;
    for at in ["198.18.0.9".to_owned(), format!("{own}:30080")] {
        mesh.get("edge-a1", &[&format!("http://{at}/")], REQUEST_LIMIT)?;
    }
    mesh.ends_well()
}

#[test]
fn a_stock_wireguard_peer_reaches_an_edge_node_through_its_gateway() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let printer = mesh.site("site-b")?.host(mesh.lab(), "printer")?;
    let private = tool::run("wg", &["genkey"], "")?;
    let public = tool::run("wg", &["pubkey"], &private)?;
    let manifest = fs::read_to_string(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../examples/external-peer/printer.yaml"
    ))?;
    let example = manifest
        .lines()
        .find_map(|line| line.trim().strip_prefix("publicKey: "));
    let manifest = manifest.replace(example.context("no publicKey")?, public.trim());
    fs::write(mesh.manifests().join("printer.yaml"), manifest)?;

    let gateway = word(&mesh.status("edge-b1")?, "public_key");
    let device = "wg0";
    let mut daemon = printer.spawn("wireguard-go", &["wireguard-go", "-f", device])?;
    let key = printer.write("key", &private)?;
    let script = format!(
        "until wg show {device} >/dev/null 2>&1; do sleep 0.05; done
         wg set {device} private-key {} peer {gateway} endpoint 192.168.1.11:51820 \
            allowed-ips 100.96.0.0/12 persistent-keepalive 5 &&
         ip addr add 100.96.9.9/32 dev {device} && ip link set {device} mtu 1280 up && ip route add 100.96.0.0/12 dev {device}",
        key.display()
    );
    printer.run(&["sh", "-c", &script], SOON)?.ok()?;
    tool::eventually("the printer pings edge-a1", SOON, || {
        daemon.running()?;
        printer
            .run(&["ping", "-c", "1", "-W", "1", "100.96.1.1"], SOON)?
            .ok()
    })?;
    // And the other way.
    mesh.node("edge-a1")?
        .run(&["ping", "-c", "3", "-W", "2", "100.96.9.9"], SOON)?
        .ok()?;
    daemon.terminate(SOON)?;
    mesh.ends_well()
}

#[test]
fn sigterm_leaves_the_services_and_removal_leaves_nothing() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    kiosk(&mesh)?;
    let node = mesh.site("site-a")?.host(mesh.lab(), "edge-a2")?;
    // Something at every kind of interface.
    for (name, interface) in [("device", "lan0"), ("pod", "pod-0")] {
        let behind = mesh.lab().add_node(name)?;
        mesh.lab().veth(&behind, "eth0", &node, interface)?;
        node.sysctl(&format!("net/ipv4/conf/{interface}/forwarding"), "1")?;
    }
    node.sysctl("net/ipv6/conf/all/forwarding", "1")?;
    // What comes with them, the kernel adds when it has seen for a second that they are nobody else's.
    tool::eventually("the node has its addresses", SOON, || {
        let addresses = |which: &[&str]| {
            let words = ["ip", "-6", "-oneline", "addr", "show"];
            node.run(&[&words, which].concat(), SOON)?.ok()
        };
        ensure!(addresses(&["tentative"])?.is_empty());
        for interface in ["lan0", "pod-0"] {
            ensure!(
                addresses(&["dev", interface])?.contains("fe80:"),
                "{interface}"
            );
        }
        Ok(())
    })?;
    fs::write(mesh.manifests().join("policy.yaml"), POLICY_MANIFEST)?;
    let (network, programs) = (host_network(&node)?, host_programs(&node)?);
    let everywhere = "service_interfaces = [\"lan0\"]\npod_interfaces = [\"pod-*\"]\n";
    mesh.start_agent_with("edge-a2", everywhere)?;
    mesh.agent_ready("edge-a2", 3)?;
    for interface in ["lan0", "pod-0", "holdfast0"] {
        tool::eventually("its packets are looked at", SOON, || {
            ensure!(node.tcx_programs(interface)? > 0, "{interface}");
            Ok(())
        })?;
    }
    mesh.resolve("edge-a2", "edge-a1.mesh")?;
    mesh.serve("edge-a2", "kiosk", &["http", "edge-a2", "127.0.0.1:8080"])?;
    let ask = || mesh.get("edge-a2", &[KIOSK], Duration::from_secs(1));
    tool::eventually("the kiosk answers", SOON, ask)?;
    ensure!(host_network(&node)? != network && host_programs(&node)? != programs);
    let config = node.dir().join("agent.toml").display().to_string();
    let remove = || {
        let command = [&mesh.bin("mesh-agent"), "--config", &config, "remove"];
        node.run(&command, SOON)
    };
    let said = remove()?.stderr;
    ensure!(said.contains("does another agent run"), "{said}");
    let mut agent = mesh.take("edge-a2", "mesh-agent")?;
    let status = agent.terminate(Duration::from_secs(5))?;
    assert!(status.success(), "{status}: {}", agent.log());
    assert_eq!(host_network(&node)?, network);
    ask()?;
    for interface in ["lan0", "pod-0"] {
        ensure!(
            node.tcx_programs(interface)? > 0,
            "nothing stays at {interface}"
        );
    }
    remove()?.ok()?;
    let refused = ask().map(|hello| hello.node);
    ensure!(refused.is_err(), "{refused:?}");
    assert_eq!(host_programs(&node)?, programs);
    mesh.ends_well()
}

/// As an upgrade does it, and as a crash does.
#[test]
fn a_service_goes_on_while_its_agent_is_replaced() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    kiosk(&mesh)?;
    mesh.serve("edge-a1", "kiosk", &["http", "edge-a1", "127.0.0.1:8080"])?;
    let ask = || mesh.get("edge-a1", &[KIOSK], Duration::from_secs(1));
    tool::eventually("the kiosk answers", SOON, ask)?;
    let node = mesh.node("edge-a1")?;
    let (asked, stop) = (node.dir().join("asked"), node.dir().join("stop"));
    let script = format!(
        "until [ -e {stop} ]; do curl -sS --max-time 5 {KIOSK} && echo asked >> {asked}; done",
        stop = stop.display(),
        asked = asked.display()
    );
    let mut client = node.spawn("client", &["sh", "-c", &script])?;
    let go_on = || {
        let count = || fs::read_to_string(&asked).map_or(0, |text| text.lines().count());
        let before = count();
        tool::eventually("the client goes on", SOON, || {
            ensure!(count() > before + 5, "{} answers", count());
            Ok(())
        })
    };
    // Stopped in order it writes to its disk what came a moment ago.
    for kill in [false, true] {
        go_on()?;
        let mut agent = mesh.take("edge-a1", "mesh-agent")?;
        if kill {
            agent.kill()?;
        } else {
            agent.terminate(SOON)?;
        }
        go_on()?;
        mesh.start_agent("edge-a1")?;
        mesh.agent_ready("edge-a1", 2)?;
        go_on()?;
        let status = mesh.status("edge-a1")?;
        ensure!(
            status
                .pointer("/services_unkept")
                .is_some_and(Value::is_null),
            "{status}"
        );
    }
    fs::write(&stop, "")?;
    client.wait(SOON)?;
    let log = client.log();
    ensure!(!log.contains("curl:"), "a connect failed: {log}");
    mesh.ends_well()
}

/// Its endpoint is there still and answers, but is no endpoint any more: nothing but the agent tells the client.
#[test]
fn a_connected_udp_socket_ends_when_its_endpoint_leaves_the_service_and_no_other_does() -> Result<()>
{
    let mesh = Mesh::two_sites()?;
    let says = |port: u16| -> Result<()> {
        let text = KIOSK_MANIFEST
            .replace("TCP", "UDP")
            .replace("8080", &port.to_string());
        Ok(fs::write(mesh.manifests().join("kiosk.yaml"), text)?)
    };
    says(9000)?;
    mesh.serve("edge-a1", "one", &["echo", "127.0.0.1:9000"])?;
    mesh.serve("edge-a1", "two", &["echo", "127.0.0.1:9001"])?;
    let node = mesh.node("edge-a1")?;
    // Asks again and again by one connected socket, and ends when it does.
    let client = |log: &str, at: &str| {
        let script = format!(
            "exec 3<>/dev/udp/{at} && while echo ? >&3 && read -N 1 -t 5 -u 3; do echo answered; sleep 0.05; done"
        );
        node.spawn(log, &["bash", "-c", &script])
    };
    tool::eventually("the service is led", SOON, || {
        let mut first = client("first", "10.43.0.99/80")?;
        tool::eventually("it answers", Duration::from_secs(1), || {
            first.running()?;
            ensure!(first.log().contains("answered"), "{}", first.log());
            Ok(())
        })
    })?;
    let mut by_service = client("by-service", "10.43.0.99/80")?;
    let mut direct = client("direct", "127.0.0.1/9000")?;
    for client in [&mut by_service, &mut direct] {
        tool::eventually("the client is answered", SOON, || {
            client.running()?;
            ensure!(client.log().contains("answered"), "{}", client.log());
            Ok(())
        })?;
    }
    says(9001)?;
    by_service.wait(SOON)?;
    let log = by_service.log();
    // What `send` says; to a reader it is "Software caused connection abort".
    ensure!(log.contains("Destination address required"), "{log}");
    direct.running()?;
    let answered = direct.log().len();
    tool::eventually("the other is still answered", SOON, || {
        direct.running()?;
        ensure!(direct.log().len() > answered);
        Ok(())
    })?;
    mesh.ends_well()
}

const KIOSK: &str = "http://10.43.0.99/";

/// A service on whatever node it is asked for.
const KIOSK_MANIFEST: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: kiosk, namespace: shop}\nspec:\n  clusterIP: 10.43.0.99\n  \
                ports: [{port: 80, targetPort: 8080, protocol: TCP}]\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
                metadata: {name: kiosk, namespace: shop, labels: {kubernetes.io/service-name: kiosk}}\naddressType: IPv4\n\
                ports: [{port: 8080, protocol: TCP}]\nendpoints: [{addresses: [127.0.0.1]}]\n";

/// By which something is to be enforced.
const POLICY_MANIFEST: &str = "apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshPolicy
metadata: {name: no-ssh}
spec: {rules: [{action: deny, from: [{nodes: [edge-b1]}], ports: [{port: 22}]}]}
";

fn kiosk(mesh: &Mesh) -> Result<()> {
    Ok(fs::write(
        mesh.manifests().join("kiosk.yaml"),
        KIOSK_MANIFEST,
    )?)
}

#[test]
fn systemd_is_told_when_the_agent_serves_and_when_it_stops() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    mesh.kill("edge-a1", "mesh-agent")?;
    let node = mesh.node("edge-a1")?;
    let path = node.dir().join("notify");
    let socket = UnixDatagram::bind(&path)?;
    socket.set_read_timeout(Some(SOON))?;
    let notify = format!("NOTIFY_SOCKET={}", path.display());
    let config = node.dir().join("agent.toml").display().to_string();
    let command = ["env", &notify, &mesh.bin("mesh-agent"), "--config", &config];
    let mut agent = node.spawn("notified", &command)?;
    assert_eq!(told(&socket)?, "READY=1");
    mesh.resolve("edge-a1", "edge-b1.mesh")?;
    assert!(agent.terminate(SOON)?.success());
    assert_eq!(told(&socket)?, "STOPPING=1");
    mesh.ends_well()
}

#[test]
fn systemd_waits_for_a_node_that_nobody_lets_in_yet() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    mesh.provokes(&["cannot join yet; trying again"]);
    mesh.kill("edge-a1", "mesh-agent")?;
    let node = mesh.node("edge-a1")?;
    let path = node.dir().join("notify");
    let socket = UnixDatagram::bind(&path)?;
    socket.set_read_timeout(Some(SOON))?;
    // Another state folder, and where nobody listens.
    let config = fs::read_to_string(node.dir().join("agent.toml"))?;
    let lines = config.lines().map(|line| match line.split_once(" = ") {
        Some(("state_dir", _)) => format!("state_dir = \"{}/new\"\n", node.dir().display()),
        Some(("controller", _)) => "controller = \"127.0.0.1:1\"\n".to_owned(),
        _ => format!("{line}\n"),
    });
    let config = node.write("new.toml", &lines.collect::<String>())?;
    let (notify, config) = (
        format!("NOTIFY_SOCKET={}", path.display()),
        config.display().to_string(),
    );
    let command = ["env", &notify, &mesh.bin("mesh-agent"), "--config", &config];
    let mut agent = node.spawn("mesh-agent-new", &command)?;
    for _ in 0..2 {
        let more = told(&socket)?;
        let more = more.strip_prefix("EXTEND_TIMEOUT_USEC=");
        let more: u64 = more.context("not for how long")?.parse()?;
        ensure!(more >= 90_000_000, "{more} µs");
        let why = told(&socket)?;
        ensure!(why.starts_with("STATUS=cannot join yet: "), "{why}");
    }
    assert!(agent.terminate(SOON)?.success());
    mesh.ends_well()
}

#[test]
fn a_killed_agent_starts_over_what_it_left() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    for _ in 0..3 {
        mesh.kill("edge-a1", "mesh-agent")?;
        mesh.start_agent("edge-a1")?;
        mesh.agent_ready("edge-a1", 2)?;
    }
    mesh.serve("edge-b1", "inventory", &["http", "edge-b1", "[::]:8080"])?;
    assert_eq!(
        mesh.get("edge-a1", &["-4", INVENTORY], REQUEST_LIMIT)?.node,
        "edge-b1"
    );
    mesh.ends_well()
}

/// The next line that came over systemd's socket.
fn told(socket: &UnixDatagram) -> Result<String> {
    let mut buffer = [0; 256];
    let length = socket
        .recv(&mut buffer)
        .context("systemd was told nothing")?;
    let text = std::str::from_utf8(buffer.get(..length).unwrap_or_default())?;
    Ok(text.trim_end().to_owned())
}

/// Interfaces, addresses, routes, rules and packet filters.
fn host_network(node: &Node) -> Result<String> {
    sorted(
        node,
        "ip -br link | cut -d' ' -f1; ip -br addr; ip -4 route show table all; \
         ip -6 route show table all | grep -v '^multicast'; ip rule; ip -6 rule; nft list ruleset",
    )
}

/// BPF programs at the node's cgroup and interfaces, and what is pinned.
fn host_programs(node: &Node) -> Result<String> {
    let cgroup = node.cgroup().display();
    let script = format!("bpftool cgroup show {cgroup}; bpftool net show; find /sys/fs/bpf");
    sorted(node, &script)
}

/// What a script says, in any order.
fn sorted(node: &Node, script: &str) -> Result<String> {
    // Times left of learned addresses and the order of routes say nothing.
    let said = node.run(&["sh", "-c", script], SOON)?.ok()?;
    let mut lines: Vec<_> = said.lines().map(str::trim_end).collect();
    lines.sort_unstable();
    Ok(lines.join("\n"))
}

fn becomes_direct(mesh: &Mesh, from: &str, to: &str) -> Result<()> {
    tool::eventually("the path is direct", SOON, || {
        mesh.get(from, &["-4", INVENTORY], Duration::from_secs(2))
            .ok(); // A path is kept up for traffic.
        let why = mesh.ask(from, &["path", "why", to])?;
        ensure!(word(&why, "state") == "direct", "{why}");
        Ok(())
    })
}
