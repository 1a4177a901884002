//! `meshctl ping`: until the path in use is a direct one, and by another path than the one in use.

use std::{fs, net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    link::Impairment,
    matrix::path_in_use,
    mesh::{Mesh, word},
    nat::NatKind,
    tool,
};
use serde_json::Value;

const A: &str = "edge-a1";
const B: &str = "edge-b1";

/// Until a path is as it has to be: two rounds of probes in vain, of 10 s each, and some more.
const SOON: Duration = Duration::from_secs(60);

/// Each way, of a site's line.
const NEAR: Duration = Duration::from_millis(10);

/// Each way, of the line of the relay that both have to go to and come from.
const FAR: Duration = Duration::from_millis(40);

/// The relay's, in a site of its own.
const RELAY: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);

/// Its router hands it all that comes: its site has no other host.
const FORWARDED: &str = "table ip forwarded { chain prerouting { type nat hook prerouting priority -110; \
                         iifname \"wan\" dnat to 192.168.1.11; }; }\n";

/// Two sites behind NATs of this kind, and one relay, behind a longer line. Nobody has spoken yet.
fn with_a_far_relay(kind: NatKind) -> Result<Mesh> {
    let manifests = tempfile::tempdir()?;
    let head = "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: ";
    let manifest = format!(
        "{head}MeshRelay\nmetadata: {{name: far-relay}}\nspec: {{addresses: [{RELAY}]}}\n---\n\
         {head}MeshNode\nmetadata: {{name: {A}}}\nspec: {{overlayIPv4: 100.96.1.1}}\n---\n\
         {head}MeshNode\nmetadata: {{name: {B}}}\nspec: {{overlayIPv4: 100.96.2.1}}\n"
    );
    fs::write(manifests.path().join("mesh.yaml"), manifest)?;
    let bins = tool::binary("lab")?;
    let mut mesh = Mesh::start(bins.parent().context("a folder")?, manifests.path())?;
    let line = |delay| Impairment::delay_loss(delay, 0.0);
    mesh.add_site("site-r", NatKind::FullCone, RELAY, line(FAR), &["far"])?;
    tool::nft(mesh.site("site-r")?.router().netns(), FORWARDED)?;
    mesh.start_relay_on(&mesh.node("far")?, "far-relay", "")?;
    for (site, last, host) in [("site-a", 1, A), ("site-b", 2, B)] {
        mesh.add_site(site, kind, [203, 0, 113, last].into(), line(NEAR), &[host])?;
        mesh.start_agent(host)?;
    }
    [A, B]
        .iter()
        .try_for_each(|host| mesh.agent_ready(host, 2))?;
    for host in [A, B] {
        tool::eventually("the relay is up", SOON, || {
            let status = mesh.status(host)?;
            let up = status.pointer("/relays/0/transport");
            ensure!(up.is_some_and(Value::is_string), "{status}");
            Ok(())
        })?;
    }
    Ok(mesh)
}

fn number(said: &Value, pointer: &str) -> Result<f64> {
    let found = said.pointer(pointer).and_then(Value::as_f64);
    found.with_context(|| format!("no number at {pointer} of {said}"))
}

#[test]
fn ping_until_direct_ends_when_it_is_and_another_path_is_measured_without_being_used() -> Result<()>
{
    let mesh = with_a_far_relay(NatKind::PortRestricted)?;
    let found = mesh
        .meshctl(A, &["ping", B, "--until-direct", "-c", "100", "-i", "50"])?
        .ok()?;
    let first = found.lines().next().unwrap_or_default();
    ensure!(
        first.starts_with("direct after ") && first.contains(" by direct UDP 203.0.113.2:"),
        "{found}"
    );
    let why = mesh.ask(A, &["path", "why", B])?;
    ensure!(word(&why, "state") == "direct", "{why}");
    let began_relayed = why
        .pointer("/transitions")
        .and_then(Value::as_array)
        .is_some_and(|all| all.iter().any(|one| word(one, "to") == "relayed"));
    ensure!(began_relayed, "{why}");

    // There and back: 4 x 10 ms, and 4 x 40 ms more by the relay. Here other tests may run beside it: only the least counts.
    let path = path_in_use(&why);
    let direct = mesh.ask(A, &["ping", B, "--via", "direct", "-c", "10", "-i", "20"])?;
    let relayed = mesh.ask(
        A,
        &[
            "ping",
            B,
            "--via",
            "relay:far-relay",
            "-c",
            "10",
            "-i",
            "20",
        ],
    )?;
    let (direct_ms, relayed_ms) = (number(&direct, "/min_ms")?, number(&relayed, "/min_ms")?);
    ensure!((40.0..100.0).contains(&direct_ms), "{direct}");
    ensure!(
        relayed_ms >= direct_ms + 100.0,
        "{relayed_ms} ms by the relay, {direct_ms} ms direct"
    );
    ensure!(number(&relayed, "/received")? > 0.0, "{relayed}");
    for reply in relayed
        .pointer("/replies")
        .and_then(Value::as_array)
        .context("no replies")?
    {
        ensure!(word(reply, "kind") == "relay", "{relayed}");
    }
    let of_address = mesh.ask(A, &["ping", B, "--via", &path, "-c", "2", "-i", "20"])?;
    ensure!(
        of_address.pointer("/received") == Some(&2.into()),
        "{of_address}"
    );

    let why = mesh.ask(A, &["path", "why", B])?;
    ensure!(path_in_use(&why) == path, "{why}");
    let moved = why
        .pointer("/transitions")
        .and_then(Value::as_array)
        .context("no transitions")?;
    let moved = moved
        .iter()
        .filter(|one| word(one, "from") == "direct" && word(one, "to") == "relayed")
        .count();
    ensure!(moved == 0, "the path was left: {why}");

    for (wrong, says) in [
        ("relay:nowhere", "far-relay"),
        ("203.0.113.77:1", path.as_str()),
        ("somehow", "relay:NAME"),
    ] {
        let output = mesh.meshctl(A, &["ping", B, "--via", wrong, "-W", "200"])?;
        ensure!(
            output.status.code() == Some(64) && output.stderr.contains(says),
            "{}",
            output.stderr
        );
    }
    mesh.ends_well()
}

#[test]
fn ping_until_direct_says_first_why_two_symmetric_nats_are_not() -> Result<()> {
    let mesh = with_a_far_relay(NatKind::SymmetricRandom)?;
    let words = ["ping", B, "--until-direct", "-c", "60", "-i", "100"];
    let node = mesh.node(A)?;
    let socket = node.dir().join("agent.sock").display().to_string();
    let meshctl = mesh.bin("meshctl");
    let command = [meshctl.as_str(), "--socket", &socket];
    let output = node.run(&[&command[..], &words].concat(), SOON)?;
    ensure!(
        output.status.code() == Some(1),
        "{:?}: {}",
        output.status,
        output.stdout
    );
    ensure!(
        output.stderr.contains(" by relay far-relay ("),
        "{}",
        output.stderr
    );
    let why = mesh.ask(A, &["path", "why", B])?;
    ensure!(word(&why, "reason") == "hard_nat_both", "{why}");
    let first = output.stdout.lines().next().unwrap_or_default();
    ensure!(first.starts_with("not direct after "), "{first}");
    ensure!(first.ends_with(&word(&why, "explanation")), "{first}");
    // What is measured by a direct path does not come back, if there is one to try at all.
    let direct = mesh.ask(A, &["ping", B, "--via", "direct", "-c", "2", "-W", "200"])?;
    let received = direct.pointer("/received");
    ensure!(received.is_none_or(|count| *count == 0), "{direct}");
    mesh.ends_well()
}
