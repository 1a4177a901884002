//! A node that acts as a relay: for its own site while the cloud is away, and for the world where networks let
//! nothing but port 443 pass.

use std::{fs, net::Ipv4Addr, time::Duration};

use anyhow::{Result, ensure};
use netns_tests::{
    mesh::{Mesh, word},
    tool,
};
use serde_json::Value;

/// Until a change of manifests, or of the network, has come about everywhere.
const SOON: Duration = Duration::from_secs(30);

const HELLO: &str = "http://edge-b3.mesh:8080/";

/// `node` acts as the relay `name` at `address`, for `sites`.
fn relay(mesh: &Mesh, name: &str, node: &str, address: &str, sites: &str) -> Result<()> {
    let text = format!(
        "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshRelay\nmetadata: {{name: {name}}}\n\
         spec: {{node: {node}, addresses: [{address}], sites: [{sites}]}}\n"
    );
    Ok(fs::write(
        mesh.manifests().join(format!("{name}.yaml")),
        text,
    )?)
}

/// Waits until `from` speaks with `to` by this relay, with this framing.
fn is_relayed(mesh: &Mesh, from: &str, to: &str, by: (&str, &[&str])) -> Result<()> {
    tool::eventually("the wanted relay", SOON, || {
        mesh.meshctl(from, &["ping", "-c", "1", to])?.ok()?;
        let why = mesh.ask(from, &["path", "why", to])?;
        let (relay, framings) = by;
        let paths = why.pointer("/paths").and_then(Value::as_array);
        let mut paths = paths.into_iter().flatten();
        let primary = paths.find(|path| word(path, "state") == "primary");
        let path = primary.map(|path| word(path, "path")).unwrap_or_default();
        ensure!(
            word(&why, "state") == "relayed" && path.contains(relay),
            "{why}"
        );
        let status = mesh.status(from)?;
        let relays = status.pointer("/relays").and_then(Value::as_array);
        let mut relays = relays.into_iter().flatten();
        let link = relays.find(|status| word(status, "name") == relay);
        let used = link.map(|link| word(link, "transport"));
        ensure!(
            used.as_deref().is_some_and(|used| framings.contains(&used)),
            "by {used:?}, not by {framings:?}"
        );
        Ok(())
    })
}

#[test]
fn a_site_that_is_cut_off_meets_at_its_own_relay() -> Result<()> {
    let hosts = ["edge-b1", "edge-b2", "edge-b3"];
    let mesh = Mesh::two_sites_of(&["edge-a1"], &hosts)?;
    mesh.serve("edge-b3", "hello", &["http", "edge-b3", "0.0.0.0:8080"])?;
    let lan = |name: &str| -> Result<String> {
        let node = mesh.node(name)?;
        let said = tool::run("ip", &["-n", node.netns(), "-j", "-4", "address"], "")?;
        let said: Value = serde_json::from_str(&said)?;
        let addresses = said.as_array().into_iter().flatten();
        let mut found = addresses
            .filter(|link| word(link, "ifname") == "eth0")
            .filter_map(|link| {
                link.pointer("/addr_info/0/local")?
                    .as_str()
                    .map(str::to_owned)
            });
        found
            .next()
            .ok_or_else(|| anyhow::anyhow!("{name} has no address: {said}"))
    };
    // A switch that keeps its ports apart: these two see the gateway only.
    let others = [("edge-b2", "edge-b3"), ("edge-b3", "edge-b2")];
    for (here, there) in others {
        let script = format!(
            "table inet apart {{ chain in {{ type filter hook input priority -20; iifname != \"hf*\" ip saddr {} drop; }}; }}\n",
            lan(there)?
        );
        tool::nft(mesh.node(here)?.netns(), &script)?;
    }
    let site = ["edge-b2", "edge-b3"].map(|name| {
        format!(
            "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshNode\nmetadata: {{name: {name}}}\nspec: {{site: site-b}}\n---\n"
        )
    });
    fs::write(mesh.manifests().join("site.yaml"), site.concat())?;
    relay(&mesh, "mill", "edge-b1", &lan("edge-b1")?, "site-b")?;
    is_relayed(&mesh, "edge-b2", "edge-b3", ("mill", &["udp", "quic"]))?;

    // The world is away, and two of them start anew.
    mesh.site("site-b")?.link().set_down(true)?;
    mesh.kill("edge-b2", "mesh-agent")?;
    mesh.kill("edge-b3", "mesh-agent")?;
    mesh.start_agent("edge-b2")?;
    mesh.start_agent("edge-b3")?;
    is_relayed(&mesh, "edge-b2", "edge-b3", ("mill", &["udp", "quic"]))?;
    mesh.get("edge-b2", &["-4", HELLO], Duration::from_secs(5))?;

    // The relay's node goes: nobody is left to meet at, until the world is back.
    mesh.site("site-b")?.link().set_down(false)?;
    mesh.kill("edge-b1", "mesh-agent")?;
    is_relayed(
        &mesh,
        "edge-b2",
        "edge-b3",
        ("cloud-relay", &["udp", "quic", "tls"]),
    )?;
    mesh.get("edge-b2", &["-4", HELLO], Duration::from_secs(5))?;
    mesh.ends_well()
}

/// Nothing leaves but towards port 443 of this address, by this protocol.
fn only(protocol: &str, address: &str) -> String {
    format!(
        "table inet only\ndelete table inet only\ntable inet only {{ chain forward {{ type filter hook forward priority -20; policy drop; \
         ip daddr {address} {protocol} dport 443 accept; ip saddr {address} {protocol} sport 443 accept; }}; }}\n"
    )
}

/// Lets QUIC alone pass at port 443: the fixed bit of RFC 9000 §17 without those of plain frames.
const ONLY_QUIC: &str = "table inet quic { chain forward { type filter hook forward priority -30; \
                         udp dport 443 @th,64,8 & 0xe0 == 0x20 drop; \
                         udp sport 443 @th,64,8 & 0xe0 == 0x20 drop; }; }\n";

#[test]
fn where_only_port_443_passes_two_nodes_speak_quic_or_tls_with_nobody_between() -> Result<()> {
    const FRONT: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 30);
    let mesh = Mesh::two_sites_of(&["edge-a1"], &[])?;
    mesh.lab().public_node("edge-b1", FRONT)?;
    mesh.start_agent("edge-b1")?;
    mesh.agent_ready("edge-b1", 2)?;
    mesh.agent_ready("edge-a1", 2)?;
    mesh.serve("edge-b1", "hello", &["http", "edge-b1", "0.0.0.0:8080"])?;
    let address = FRONT.to_string();
    relay(&mesh, "front", "edge-b1", &address, "")?;
    tool::eventually("the relay in edge-a1's snapshot", SOON, || {
        let relays = mesh.status("edge-a1")?;
        ensure!(relays.to_string().contains("front"), "{relays}");
        Ok(())
    })?;
    let router = mesh.site("site-a")?.router().netns();
    for (protocol, framing) in [("udp", "quic"), ("tcp", "tls")] {
        tool::nft(router, &only(protocol, &address))?;
        if protocol == "udp" {
            tool::nft(router, ONLY_QUIC)?;
        }
        is_relayed(&mesh, "edge-a1", "edge-b1", ("front", &[framing]))?;
        let url = "http://100.96.2.1:8080/";
        mesh.get("edge-a1", &["-4", url], Duration::from_secs(5))?;
    }
    mesh.ends_well()
}
