//! Devices that run nothing of Holdfast's use services through a gateway.

use std::{fs, net::IpAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    link::Impairment,
    mesh::Mesh,
    nat::NatKind,
    node::{Node, Process},
    tool,
    traffic::{FlowReport, Hello},
};
use serde_json::Value;

/// What should happen soon has happened by then, or never will.
const SOON: Duration = Duration::from_secs(20);

/// The service by both families.
const TCP: [&str; 2] = ["http://10.43.0.99/", "http://[fd42:43::99]/"];
const UDP: [&str; 2] = ["10.43.0.99:9000", "[fd42:43::99]:9000"];

const DEVICE: [&str; 2] = ["192.168.7.2", "fd07::2"];

/// What an agent says that is started with another configuration.
const MAPS_REPLACED: &str = "the maps left by another version or configuration are replaced";

/// The gateway's configuration.
const SERVES: &str = "service_interfaces = [\"lan0\"]\n";

/// `edge-a1` serves what comes to be behind `lan0`, the kiosk is at `edge-b1`, nobody is at `lan0`.
fn mesh() -> Result<Mesh> {
    let mesh = Mesh::two_sites()?;
    mesh.kill("edge-a1", "mesh-agent")?;
    let gateway = mesh.node("edge-a1")?;
    gateway.sysctl("net/ipv4/conf/default/forwarding", "0")?;
    mesh.provokes(&[MAPS_REPLACED, "devices are not served interface=lan0"]);
    mesh.start_agent_with("edge-a1", SERVES)?;
    mesh.agent_ready("edge-a1", 2)?;
    let b1 = mesh.node("edge-b1")?;
    tool::ip(b1.netns(), "addr add fd42:b1::1/128 dev lo\n")?;
    mesh.serve("edge-b1", "kiosk", &["http", "edge-b1", "[::]:8080"])?;
    mesh.serve("edge-b1", "echo", &["echo", "0.0.0.0:9000"])?;
    // On any address, it would answer from the one of the tunnel.
    mesh.serve("edge-b1", "echo-v6", &["echo", "[fd42:b1::1]:9000"])?;
    kiosk(
        &mesh,
        "",
        &[("100.96.2.1", "edge-b1")],
        &[("fd42:b1::1", "edge-b1")],
    )?;
    Ok(mesh)
}

/// The kiosk's manifest, with more of its `spec`.
fn kiosk(mesh: &Mesh, more: &str, v4: &[(&str, &str)], v6: &[(&str, &str)]) -> Result<()> {
    let ports = "{name: http, port: 80, targetPort: 8080, protocol: TCP}, {name: echo, port: 9000, \
                 targetPort: 9000, protocol: UDP}";
    let mut text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: kiosk, namespace: shop}}\nspec: {{{more}clusterIP: 10.43.0.99, \
         clusterIPs: [10.43.0.99, \"fd42:43::99\"], ipFamilies: [IPv4, IPv6], ipFamilyPolicy: RequireDualStack, \
         ports: [{ports}]}}\n"
    );
    for (family, endpoints) in [("IPv4", v4), ("IPv6", v6)] {
        let endpoints: Vec<_> = endpoints
            .iter()
            .map(|(address, node)| format!("{{addresses: [\"{address}\"], nodeName: {node}}}"))
            .collect();
        text += &format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: kiosk-{}, namespace: shop, \
             labels: {{kubernetes.io/service-name: kiosk}}}}\naddressType: {family}\nports: [{{name: http, port: 8080, \
             protocol: TCP}}, {{name: echo, port: 9000, protocol: UDP}}]\nendpoints: [{}]\n",
            family.to_lowercase(),
            endpoints.join(", ")
        );
    }
    Ok(fs::write(mesh.manifests().join("kiosk.yaml"), text)?)
}

/// The mesh knows the way back to the device's network.
fn advertise(mesh: &Mesh) -> Result<()> {
    let path = mesh.manifests().join("mesh.yaml");
    let text = fs::read_to_string(&path)?;
    let own = "overlayIPv4: 100.96.1.1\n";
    ensure!(text.contains(own), "{text}");
    let more = format!("{own}  prefixes: [\"192.168.7.0/24\", \"fd07::/64\"]\n");
    Ok(fs::write(&path, text.replace(own, &more))?)
}

/// A device behind the gateway, which is its router.
fn device(mesh: &Mesh) -> Result<Node> {
    let device = mesh.lab().add_node("device")?;
    plug(mesh, &device)?;
    Ok(device)
}

fn plug(mesh: &Mesh, device: &Node) -> Result<()> {
    let gateway = mesh.node("edge-a1")?;
    mesh.lab().veth(device, "eth0", &gateway, "lan0")?;
    let lan = "addr add 192.168.7.1/24 dev lan0\naddr add fd07::1/64 dev lan0 nodad\n";
    tool::ip(gateway.netns(), lan)?;
    let here = "addr add 192.168.7.2/24 dev eth0\naddr add fd07::2/64 dev eth0 nodad\n\
                route add default via 192.168.7.1\nroute add default via fd07::1\n";
    tool::ip(device.netns(), here)
}

fn forward(mesh: &Mesh) -> Result<()> {
    let gateway = mesh.node("edge-a1")?;
    gateway.sysctl("net/ipv4/conf/lan0/forwarding", "1")?;
    gateway.sysctl("net/ipv6/conf/all/forwarding", "1")
}

/// What the gateway says of `lan0`: whether it is attached, and its problem.
fn said(mesh: &Mesh) -> Result<(bool, String)> {
    let status = mesh.status("edge-a1")?;
    let attached = status.pointer("/service_interfaces/lan0");
    let attached = attached.and_then(Value::as_bool);
    let attached = attached.with_context(|| format!("no lan0: {status}"))?;
    let problems = problems(mesh)?.into_iter();
    let of_lan: Vec<_> = problems.filter(|one| one.contains("lan0")).collect();
    Ok((attached, of_lan.join("; ")))
}

fn problems(mesh: &Mesh) -> Result<Vec<String>> {
    let status = mesh.status("edge-a1")?;
    let problems = status.pointer("/problems").and_then(Value::as_array);
    let problems = problems.into_iter().flatten().filter_map(Value::as_str);
    Ok(problems.map(str::to_owned).collect())
}

fn serves(mesh: &Mesh) -> Result<()> {
    tool::eventually("the gateway serves lan0", SOON, || {
        let said = said(mesh)?;
        ensure!(said == (true, String::new()), "{said:?}");
        Ok(())
    })
}

fn ask(mesh: &Mesh, url: &str) -> Result<Hello> {
    mesh.get("device", &[url], Duration::from_secs(1))
}

/// Datagrams to the echo server and back, as the service's.
fn echo(device: &Node, to: &str) -> Result<FlowReport> {
    let lab = tool::binary("lab")?.display().to_string();
    let words = [lab.as_str(), "flow", to, "20", "10", "1000", "1000"];
    Ok(serde_json::from_str(&device.run(&words, SOON)?.ok()?)?)
}

/// Both protocols by both families; the servers see `clients`.
fn uses_the_kiosk(mesh: &Mesh, device: &Node, clients: [&str; 2]) -> Result<()> {
    for ((tcp, udp), client) in TCP.into_iter().zip(UDP).zip(clients) {
        let hello = tool::eventually("the kiosk answers", SOON, || ask(mesh, tcp))?;
        assert_eq!(hello.node, "edge-b1");
        assert_eq!(hello.client.ip(), client.parse::<IpAddr>()?, "{tcp}");
        let report = echo(device, udp)?;
        assert_eq!(report.answered, report.sent, "{udp}: {report:?}");
    }
    Ok(())
}

#[test]
fn a_device_uses_services_of_another_site_as_itself() -> Result<()> {
    let mesh = mesh()?;
    advertise(&mesh)?;
    let (attached, problem) = said(&mesh)?;
    assert!(
        !attached && problem.contains("there is no interface"),
        "{problem}"
    );
    let device = device(&mesh)?;
    tool::eventually("the gateway misses the forwarding", SOON, || {
        let (attached, problem) = said(&mesh)?;
        ensure!(
            attached && problem.contains("ipv4/conf/lan0/forwarding=1"),
            "{problem}"
        );
        Ok(())
    })?;
    forward(&mesh)?;
    serves(&mesh)?;
    uses_the_kiosk(&mesh, &device, DEVICE)?;
    let opened = mesh.status("edge-a1")?;
    let opened = opened.pointer("/service_packets/flow_opened");
    assert!(
        opened
            .and_then(Value::as_u64)
            .is_some_and(|count| count >= 4),
        "{opened:?}"
    );

    // The same name with another index.
    tool::ip(mesh.node("edge-a1")?.netns(), "link del lan0\n")?;
    tool::eventually("the gateway misses lan0", SOON, || {
        let (attached, problem) = said(&mesh)?;
        ensure!(
            !attached && problem.contains("there is no interface"),
            "{problem}"
        );
        Ok(())
    })?;
    plug(&mesh, &device)?;
    forward(&mesh)?;
    serves(&mesh)?;
    uses_the_kiosk(&mesh, &device, DEVICE)?;

    let gateway = mesh.node("edge-a1")?;
    assert_eq!(gateway.tcx_programs("lan0")?, 2);
    let mut agent = mesh.take("edge-a1", "mesh-agent")?;
    assert!(agent.terminate(SOON)?.success(), "{}", agent.log());
    assert_eq!(
        gateway.tcx_programs("lan0")?,
        2,
        "they stay for the next agent"
    );
    let config = gateway.dir().join("agent.toml").display().to_string();
    let remove = [&mesh.bin("mesh-agent"), "--config", &config, "remove"];
    gateway.run(&remove, SOON)?.ok()?;
    assert_eq!(gateway.tcx_programs("lan0")?, 0);
    mesh.ends_well()
}

#[test]
fn a_device_of_which_the_mesh_knows_nothing_goes_as_the_gateway() -> Result<()> {
    let mesh = mesh()?;
    let device = device(&mesh)?;
    forward(&mesh)?;
    serves(&mesh)?;
    let status = mesh.status("edge-a1")?;
    let own = |index: usize| {
        let address = status.pointer(&format!("/overlay_addresses/{index}"));
        address
            .and_then(Value::as_str)
            .context("no overlay address")
    };
    uses_the_kiosk(&mesh, &device, [own(0)?, own(1)?])?;
    let gateway = mesh.node("edge-a1")?;
    assert_eq!(gateway.tcx_programs("holdfast0")?, 2);
    // The node's own processes go as ever.
    let hello = mesh.get("edge-a1", &[TCP[0]], SOON)?;
    assert_eq!(hello.node, "edge-b1");
    mesh.ends_well()
}

/// What the device is told at an address, if anybody answers: asked by UDP or as `more` words say.
fn asks_dns(device: &Node, at: &str, name: &str, more: &[&str]) -> Result<String> {
    let at = format!("@{at}");
    let words = ["dig", "+short", "+tries=1", "+time=1", &at, name];
    let said = device.run(&[&words, more].concat(), SOON)?.ok()?;
    Ok(said.trim().to_owned())
}

/// How many questions of strangers the gateway dropped.
fn strangers(mesh: &Mesh) -> Result<f64> {
    let page = "http://127.0.0.1:9640/metrics";
    let page = mesh
        .node("edge-a1")?
        .run(&["curl", "-sSf", page], SOON)?
        .ok()?;
    let series = "holdfast_agent_dns_drops_total{reason=\"source\"} ";
    let mut lines = page.lines();
    let value = lines.find_map(|line| line.strip_prefix(series));
    Ok(value.context("not counted")?.parse()?)
}

#[test]
fn a_device_asks_the_gateway_for_names_where_its_configuration_says_so_and_nobody_else_does()
-> Result<()> {
    const LAN: [&str; 2] = ["192.168.7.1", "fd07::1"];
    let names = [
        ("kiosk.shop.svc.cluster.local", "10.43.0.99"),
        ("edge-b1.mesh", "100.96.2.1"),
    ];
    let mesh = mesh()?;
    let device = device(&mesh)?;
    forward(&mesh)?;
    advertise(&mesh)?;
    serves(&mesh)?;
    for at in LAN {
        let error = asks_dns(&device, at, names[0].0, &[]).err();
        let error = format!("{:#}", error.context("it answers unasked")?);
        ensure!(error.contains("refused"), "{error}");
    }

    // A stranger is one to whom an answer would find its way.
    let gateway = mesh.node("edge-a1")?;
    tool::ip(device.netns(), "addr add 198.51.100.77/32 dev eth0\n")?;
    tool::ip(gateway.netns(), "route add 198.51.100.77/32 dev lan0\n")?;
    let listen = "[dns]\nlisten = [\"169.254.53.53:53\", \"192.168.7.1:53\", \"[fd07::1]:53\"]\n";
    mesh.kill("edge-a1", "mesh-agent")?;
    mesh.start_agent_with("edge-a1", &format!("{SERVES}{listen}"))?;
    mesh.agent_ready("edge-a1", 2)?;
    for (name, address) in names {
        for at in LAN {
            for more in [&[][..], &["+tcp"]] {
                let said =
                    tool::eventually("an answer", SOON, || asks_dns(&device, at, name, more))?;
                assert_eq!(said, address, "{name} at {at}, {more:?}");
            }
        }
    }
    for more in [&[][..], &["+tcp"]] {
        let before = strangers(&mesh)?;
        let as_stranger = [&["-b", "198.51.100.77"], more].concat();
        let said = asks_dns(&device, LAN[0], names[0].0, &as_stranger);
        ensure!(said.is_err(), "{said:?}");
        ensure!(strangers(&mesh)? > before, "not counted: {more:?}");
    }
    // Whom the operator names is none.
    let named = format!("{SERVES}{listen}allow_from = [\"198.51.100.0/24\"]\n");
    mesh.kill("edge-a1", "mesh-agent")?;
    mesh.start_agent_with("edge-a1", &named)?;
    mesh.agent_ready("edge-a1", 2)?;
    let as_named = ["-b", "198.51.100.77"];
    let said = tool::eventually("an answer", SOON, || {
        asks_dns(&device, LAN[0], names[0].0, &as_named)
    })?;
    assert_eq!(said, names[0].1);
    mesh.ends_well()
}

/// The kiosk for clients outside: at a load balancer's address and by a node port, with more of its
/// `spec`.
fn for_outside(mesh: &Mesh, more: &str, endpoints: &[(&str, &str)]) -> Result<()> {
    let spec = format!(
        "type: LoadBalancer, externalTrafficPolicy: Local, healthCheckNodePort: 30090, {more}"
    );
    kiosk(mesh, &spec, endpoints, &[])?;
    let path = mesh.manifests().join("kiosk.yaml");
    let text = fs::read_to_string(&path)?;
    let text = text.replace("port: 80,", "port: 80, nodePort: 30080,");
    let status = "\nstatus: {loadBalancer: {ingress: [{ip: 203.0.113.77}]}}\n---";
    Ok(fs::write(&path, text.replacen("\n---", status, 1))?)
}

/// How often the gateway counted this of packets.
fn counted(mesh: &Mesh, counter: &str) -> Result<u64> {
    let status = mesh.status("edge-a1")?;
    let count = status.pointer(&format!("/service_packets/{counter}"));
    Ok(count.and_then(Value::as_u64).unwrap_or_default())
}

/// Status and body at the gateway's health check port, asked by the device.
fn health(device: &Node) -> Result<(String, Value)> {
    let url = "http://192.168.7.1:30090/healthz";
    let words = ["curl", "-s", "--max-time", "2", "-w", "\n%{http_code}", url];
    let said = device.run(&words, SOON)?.ok()?;
    let (body, status) = said.trim().rsplit_once('\n').context("no body")?;
    Ok((status.to_owned(), serde_json::from_str(body)?))
}

/// At the gateway's LAN address and the load balancer's, the device is a client from outside.
#[test]
fn a_device_is_kept_to_the_gateway_s_own_endpoint_and_to_the_source_ranges() -> Result<()> {
    const NODE_PORT: &str = "http://192.168.7.1:30080/";
    const LOAD_BALANCER: &str = "http://203.0.113.77/";
    let mesh = mesh()?;
    let address = "apiVersion: v1\nkind: Node\nmetadata: {name: edge-a1}\nstatus: {addresses: [{type: InternalIP, \
                   address: 192.168.7.1}]}\n";
    fs::write(mesh.manifests().join("node.yaml"), address)?;
    let device = device(&mesh)?;
    forward(&mesh)?;
    serves(&mesh)?;
    let far = ("100.96.2.1", "edge-b1");
    mesh.provokes(&["cannot answer health checks of a service"]);
    let others = ["http", "edge-a1", "[::]:30090"];
    mesh.serve("edge-a1", "others", &others)?;
    for_outside(&mesh, "", &[far])?;
    let unanswered = || -> Result<Vec<String>> {
        let problems = problems(&mesh)?.into_iter();
        Ok(problems
            .filter(|one| one.contains("health checks"))
            .collect())
    };
    tool::eventually("the health check's port is somebody else's", SOON, || {
        let said = unanswered()?.join("; ");
        ensure!(
            said.contains("shop/kiosk")
                && said.contains("192.168.7.1:30090: Address already in use"),
            "{said}"
        );
        Ok(())
    })?;
    mesh.kill("edge-a1", "others")?;
    let said = |node: u64| {
        let service = serde_json::json!({"namespace": "shop", "name": "kiosk"});
        serde_json::json!({"service": service, "localEndpoints": node, "serviceProxyHealthy": true})
    };
    tool::eventually("the gateway has no endpoint", SOON, || {
        let health = health(&device)?;
        ensure!(health == ("503".to_owned(), said(0)), "{health:?}");
        Ok(())
    })?;
    tool::eventually("nothing is said of it any more", SOON, || {
        ensure!(unanswered()?.is_empty());
        Ok(())
    })?;
    for url in [NODE_PORT, LOAD_BALANCER] {
        let error = ask(&mesh, url).map(|hello| hello.node).err();
        let error = format!("{:#}", error.context("it answers")?);
        ensure!(error.contains("timed out"), "{error}");
        // Whoever is inside goes to the other node.
        assert_eq!(mesh.get("edge-a1", &[url], SOON)?.node, "edge-b1");
    }
    assert!(counted(&mesh, "not_local")? >= 2);

    mesh.serve("edge-a1", "kiosk", &["http", "edge-a1", "[::]:8080"])?;
    let both = [far, ("100.96.1.1", "edge-a1")];
    for_outside(&mesh, "", &both)?;
    tool::eventually("the gateway has an endpoint", SOON, || {
        let health = health(&device)?;
        ensure!(health == ("200".to_owned(), said(1)), "{health:?}");
        Ok(())
    })?;
    for url in [NODE_PORT, LOAD_BALANCER].repeat(4) {
        let hello = tool::eventually("the gateway's own answers", SOON, || ask(&mesh, url))?;
        assert_eq!(
            (hello.node.as_str(), hello.client.ip()),
            ("edge-a1", DEVICE[0].parse()?)
        );
    }

    for_outside(&mesh, "loadBalancerSourceRanges: [10.0.0.0/8], ", &both)?;
    tool::eventually("the load balancer's address is for others", SOON, || {
        let error = ask(&mesh, LOAD_BALANCER).err().context("it answers")?;
        let error = format!("{error:#}");
        ensure!(error.contains("timed out"), "{error}");
        // Not for want of time alone.
        ensure!(counted(&mesh, "not_in_range")? >= 1, "not by its range");
        Ok(())
    })?;
    assert_eq!(ask(&mesh, NODE_PORT)?.node, "edge-a1");
    for_outside(&mesh, "loadBalancerSourceRanges: [192.168.7.0/24], ", &both)?;
    tool::eventually("and for the device again", SOON, || {
        ask(&mesh, LOAD_BALANCER)
    })?;

    kiosk(&mesh, "", &both, &[])?;
    tool::eventually("nobody answers health checks", SOON, || {
        let error = health(&device).err().context("it answers")?;
        drop(error);
        Ok(())
    })?;
    mesh.ends_well()
}

#[test]
fn a_device_s_next_flow_goes_elsewhere_when_the_endpoint_s_node_dies() -> Result<()> {
    let mut mesh = mesh()?;
    let link = Impairment::delay_loss(Duration::from_millis(10), 0.0);
    let wan = [203, 0, 113, 3].into();
    mesh.add_site("site-c", NatKind::PortRestricted, wan, link, &["edge-c1"])?;
    mesh.start_agent("edge-c1")?;
    mesh.agent_ready("edge-c1", 3)?;
    mesh.serve("edge-c1", "kiosk", &["http", "edge-c1", "[::]:8080"])?;
    advertise(&mesh)?;
    kiosk(
        &mesh,
        "",
        &[("100.96.2.1", "edge-b1"), ("100.96.3.1", "edge-c1")],
        &[],
    )?;
    device(&mesh)?;
    forward(&mesh)?;
    serves(&mesh)?;
    let [url, _] = TCP;
    for node in ["edge-b1", "edge-c1"] {
        tool::eventually("both answer", SOON, || {
            let hello = ask(&mesh, url)?;
            ensure!(hello.node == node, "{} and not {node}", hello.node);
            Ok(())
        })?;
    }
    // From now on the device keeps the one that it has.
    let endpoints = [("100.96.2.1", "edge-b1"), ("100.96.3.1", "edge-c1")];
    kiosk(&mesh, "sessionAffinity: ClientIP, ", &endpoints, &[])?;
    let kept = tool::eventually("one alone answers", SOON, || {
        let first = ask(&mesh, url)?.node;
        for _ in 0..16 {
            let next = ask(&mesh, url)?.node;
            ensure!(next == first, "{first}, and then {next}");
        }
        Ok(first)
    })?;
    mesh.kill(&kept, "mesh-agent")?;
    tool::eventually("the other alone answers", SOON, || {
        for _ in 0..8 {
            let hello = ask(&mesh, url)?;
            ensure!(hello.node != kept, "{kept}");
        }
        Ok(())
    })?;
    mesh.ends_well()
}

/// Asks by datagrams from one port again and again, and is never silent for as long as a flow lasts.
fn asker(device: &Node, log: &str) -> Result<Process> {
    let words = "while sleep 0.05; do echo far; done | socat - UDP4:10.43.0.99:9000";
    device.spawn(log, &["sh", "-c", words])
}

fn was_told(asker: &mut Process, word: &str) -> Result<()> {
    tool::eventually("the device is told", SOON, || {
        asker.running()?;
        ensure!(asker.log().contains(word), "no {word}");
        Ok(())
    })
}

/// The one that it leaves goes on answering: nothing but the gateway's agent tells.
#[test]
fn a_device_s_datagrams_go_elsewhere_when_their_endpoint_leaves_the_service_and_not_before()
-> Result<()> {
    let mesh = mesh()?;
    let device = device(&mesh)?;
    forward(&mesh)?;
    serves(&mesh)?;
    let nearer = [
        "UDP4-RECVFROM:9000,bind=100.96.1.1,fork",
        "SYSTEM:echo near",
    ];
    let nearer = [&["socat"], &nearer[..]].concat();
    let _nearer = mesh.node("edge-a1")?.spawn("nearer", &nearer)?;
    tool::eventually("the far one answers", SOON, || {
        let report = echo(&device, UDP[0])?;
        ensure!(report.answered == report.sent, "{report:?}");
        Ok(())
    })?;
    let mut first = asker(&device, "first")?;
    was_told(&mut first, "far")?;
    let (far, near) = (("100.96.2.1", "edge-b1"), ("100.96.1.1", "edge-a1"));
    kiosk(&mesh, "", &[far, near], &[])?;
    tool::eventually("new flows go to the nearer one", SOON, || {
        let second = asker(&device, "second")?;
        tool::eventually("it answers", Duration::from_secs(1), || {
            ensure!(second.log().contains("near"), "{}", second.log());
            Ok(())
        })
    })?;
    let before = first.log();
    ensure!(!before.contains("near"), "it moved before: {before}");
    kiosk(&mesh, "", &[near], &[])?;
    was_told(&mut first, "near")?;
    mesh.ends_well()
}

/// Endpoints that the gateway leaves alone because connects to them failed.
fn ejected(mesh: &Mesh) -> Result<Vec<String>> {
    let services = mesh.ask("edge-a1", &["services"])?;
    let services = services.pointer("/services").and_then(Value::as_array);
    let services = services.context("no services")?.iter();
    let endpoints = services.filter_map(|one| one.pointer("/endpoints").and_then(Value::as_array));
    let endpoints = endpoints.flatten();
    let ejected = endpoints
        .filter(|one| one.pointer("/ejected").and_then(Value::as_bool) == Some(true))
        .filter_map(|one| one.pointer("/address").and_then(Value::as_str));
    Ok(ejected.map(str::to_owned).collect())
}

/// No socket of the gateway makes these connects: packets alone tell.
#[test]
fn a_device_is_led_past_an_endpoint_that_resets_its_connects_until_it_does_not() -> Result<()> {
    /// Trials come after 10 s, 20 s and 40 s.
    const TRIED: Duration = Duration::from_secs(90);
    let mesh = mesh()?;
    mesh.provokes(&["connects fail: no new flows for a while"]);
    device(&mesh)?;
    forward(&mesh)?;
    serves(&mesh)?;
    let [url, _] = TCP;
    // The gateway's own is the nearest, and nobody is there.
    let both = [("100.96.1.1", "edge-a1"), ("100.96.2.1", "edge-b1")];
    kiosk(&mesh, "", &both, &[])?;
    tool::eventually("the nearest has the flows", SOON, || {
        let refused = ask(&mesh, url).err().context("the other answers")?;
        drop(refused);
        Ok(())
    })?;
    tool::eventually("the other has them", SOON, || {
        let node = ask(&mesh, url)?.node;
        ensure!(node == "edge-b1", "{node}");
        Ok(())
    })?;
    assert!(counted(&mesh, "connect_failed")? >= 5);
    let ejected = ejected(&mesh)?;
    assert!(
        ejected.iter().all(|one| one.starts_with("100.96.1.1")),
        "{ejected:?}"
    );

    mesh.serve("edge-a1", "kiosk", &["http", "edge-a1", "[::]:8080"])?;
    tool::eventually("the nearest is tried again, and keeps them", TRIED, || {
        for _ in 0..4 {
            let node = ask(&mesh, url)?.node;
            ensure!(node == "edge-a1", "{node}");
        }
        Ok(())
    })?;
    mesh.ends_well()
}
