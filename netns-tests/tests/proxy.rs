//! A network that lets nothing out but TCP to an HTTP proxy (Debian's tinyproxy): the node is a member of
//! the mesh all the same, and says what the proxy has against it where it is not.

use std::{
    fs,
    net::{Ipv4Addr, TcpListener},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    mesh::{Mesh, RESOLVER, word},
    name_server::NameServer,
    node::{Node, Process},
    tool,
};
use serde_json::Value;

/// Until a link or an error is there: UDP's 3 s, and some attempts.
const SOON: Duration = Duration::from_secs(40);

/// Site A's.
const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);

const PROXY: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 20);

/// What must not stand in any log.
const PASSWORD: &str = "s3cr3tw0rd";

/// Where the proxy asks for a password.
const ASKS: u16 = 3128;

/// Where it lets nobody to 443.
const REFUSES: u16 = 3129;

/// Where nobody answers.
const HANGS: u16 = 3130;

fn tinyproxy(node: &Node, port: u16, lines: &str) -> Result<Process> {
    let config = format!(
        "Port {port}\nListen {PROXY}\nTimeout 600\nMaxClients 20\nLogLevel Connect\nAllow 0.0.0.0/0\n{lines}"
    );
    let path = node.write(&format!("tinyproxy-{port}.conf"), &config)?;
    let words = ["tinyproxy", "-d", "-c", &path.display().to_string()];
    let process = node.spawn(&format!("tinyproxy-{port}"), &words)?;
    tool::eventually("the proxy listens", SOON, || {
        let listening = node.run(&["ss", "-Hltn"], SOON)?.ok()?;
        ensure!(listening.contains(&format!(":{port} ")), "{listening}");
        Ok(())
    })?;
    Ok(process)
}

/// Site A lets out nothing but TCP to the proxy's machine.
fn only_the_proxy(mesh: &Mesh) -> Result<()> {
    let rules = format!(
        "table inet only\ndelete table inet only\ntable inet only {{ chain forward {{ type filter hook forward \
         priority -20; policy drop; ip daddr {PROXY} meta l4proto tcp accept; ip saddr {PROXY} accept; }}; }}\n"
    );
    tool::nft(mesh.site("site-a")?.router().netns(), &rules)
}

fn relay(mesh: &Mesh) -> Result<(Value, String)> {
    let status = mesh.status("edge-a1")?;
    let relay = status.pointer("/relays/0").context("no relay")?;
    let transport = word(relay, "transport");
    Ok((status.clone(), transport))
}

#[test]
fn a_node_that_only_a_proxy_lets_out_joins_and_is_reached() -> Result<()> {
    let mesh = Mesh::two_sites_of(&[], &["edge-b1"])?;
    mesh.site("site-a")?.host(mesh.lab(), "edge-a1")?;
    joins_and_is_reached(&mesh, &PROXY.to_string(), RESOLVER)?;
    mesh.ends_well()
}

/// As most companies say it. The site's own name server knows the name; no other is let through to.
#[test]
fn a_node_that_only_a_proxy_with_a_name_lets_out_joins_and_is_reached() -> Result<()> {
    let mesh = Mesh::two_sites_of(&[], &["edge-b1"])?;
    let site = mesh.site("site-a")?;
    site.host(mesh.lab(), "edge-a1")?;
    let _server = NameServer::start(site.router(), ROUTER, PROXY)?;
    joins_and_is_reached(
        &mesh,
        "proxy.example.org",
        &format!("nameserver {ROUTER}\n"),
    )?;
    mesh.ends_well()
}

/// `edge-b1` has a network as most have, `edge-a1` the proxy, at this host.
fn joins_and_is_reached(mesh: &Mesh, host: &str, resolver: &str) -> Result<()> {
    let node = mesh.lab().public_node("proxy", PROXY)?;
    let login = format!("BasicAuth edge {PASSWORD}\n");
    let _proxy = tinyproxy(&node, ASKS, &login)?;
    only_the_proxy(mesh)?;

    let since = Instant::now();
    let edge = mesh.node("edge-a1")?;
    edge.set_resolver(resolver)?;
    let config = mesh.agent_config(&edge, Some(&mesh.token()?));
    let by = format!("https_proxy = \"http://edge:{PASSWORD}@{host}:{ASKS}\"\n");
    mesh.daemon(&edge, "mesh-agent", "agent", &format!("{config}{by}"))?;
    mesh.agent_ready("edge-a1", 2)?;
    println!("{host}: joined after {:?}", since.elapsed());
    tool::eventually("a link by TLS", SOON, || {
        let (status, transport) = relay(mesh)?;
        ensure!(transport == "tls", "{status}");
        Ok(())
    })?;
    println!("{host}: linked after {:?}", since.elapsed());
    for (from, to) in [("edge-b1", "edge-a1"), ("edge-a1", "edge-b1")] {
        let began = Instant::now();
        tool::eventually("an echo", SOON, || {
            mesh.meshctl(from, &["ping", "-c", "1", to])?.ok()
        })?;
        println!("{from} reached {to} after {:?}", began.elapsed());
    }
    let why = mesh.ask("edge-b1", &["path", "why", "edge-a1"])?;
    assert_eq!(word(&why, "state"), "relayed", "{why}");

    let said = fs::read_to_string(node.dir().join("tinyproxy-3128.log"))?;
    for target in ["198.51.100.10:443", "198.51.100.10:7440"] {
        assert!(said.contains(&format!("CONNECT {target}")), "{said}");
    }
    let log = fs::read_to_string(edge.dir().join("mesh-agent.log"))?;
    assert!(!log.contains(PASSWORD), "{log}");
    Ok(())
}

#[test]
fn what_a_proxy_has_against_a_node_stands_in_its_status() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let node = mesh.lab().public_node("proxy", PROXY)?;
    let login = format!("BasicAuth edge {PASSWORD}\n");
    let _asks = tinyproxy(&node, ASKS, &login)?;
    let _refuses = tinyproxy(&node, REFUSES, "ConnectPort 80\n")?;
    // It accepts, in the kernel's queue, and says nothing.
    let _hangs = node.enter(|| TcpListener::bind((PROXY, HANGS)))??;
    only_the_proxy(&mesh)?;
    for (url, said) in [
        (
            format!("http://{PROXY}:{ASKS}"),
            "asks for a name and a password",
        ),
        (
            format!("http://edge:not-{PASSWORD}@{PROXY}:{ASKS}"),
            "does not accept the name and password",
        ),
        (
            format!("http://{PROXY}:{REFUSES}"),
            "refused CONNECT 198.51.100.10:443: 403",
        ),
        (
            format!("http://{PROXY}:{HANGS}"),
            "did not answer CONNECT 198.51.100.10:443 in 2.5s",
        ),
        (
            format!("http://{PROXY}:3131"),
            "cannot reach the proxy 198.51.100.20:3131",
        ),
    ] {
        mesh.kill("edge-a1", "mesh-agent")?;
        mesh.start_agent_with("edge-a1", &format!("https_proxy = \"{url}\"\n"))?;
        tool::eventually(said, SOON, || {
            let (status, _) = relay(&mesh)?;
            let problems = status.get("problems").and_then(Value::as_array);
            let mut problems = problems.into_iter().flatten().filter_map(Value::as_str);
            let named = |one: &str| one.starts_with("relay cloud-relay: ") && one.contains(said);
            ensure!(problems.any(named), "{status}");
            ensure!(!status.to_string().contains(PASSWORD), "{status}");
            Ok(())
        })?;
    }
    let edge = mesh.node("edge-a1")?;
    let log = fs::read_to_string(edge.dir().join("mesh-agent.log"))?;
    assert!(!log.contains(PASSWORD), "{log}");

    // The environment counts where the configuration says nothing.
    mesh.kill("edge-a1", "mesh-agent")?;
    let config = edge.write("agent.toml", &mesh.agent_config(&edge, None))?;
    let words = [
        mesh.bin("mesh-agent"),
        "--config".to_owned(),
        config.display().to_string(),
    ];
    let mut command = edge.command(&words)?;
    command.env(
        "HTTPS_PROXY",
        format!("http://edge:{PASSWORD}@{PROXY}:{ASKS}"),
    );
    let agent = edge.spawn_with("mesh-agent", command)?;
    mesh.put("edge-a1", "mesh-agent", agent);
    tool::eventually("a link by TLS", SOON, || {
        let (status, transport) = relay(&mesh)?;
        ensure!(transport == "tls", "{status}");
        Ok(())
    })?;
    mesh.ends_well()
}
