//! `meshctl --node`: what an operator learns of another node across the mesh, and who learns nothing.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use netns_tests::{
    link::Impairment,
    mesh::{Mesh, word},
    tool,
};
use serde_json::Value;

/// Until a node that is gone is said to be: the agent gives up after 4 s.
const GIVEN_UP: Duration = Duration::from_secs(8);

/// `edge-b1` answers `edge-a1`, and nobody else.
fn mesh() -> Result<Mesh> {
    let mut mesh = Mesh::demo()?;
    mesh.add_two_sites(Impairment::NONE, &["edge-a1", "edge-a2"], &["edge-b1"])?;
    mesh.start_agent_with("edge-b1", "operators = [\"edge-a1\"]\n")?;
    ["edge-a1", "edge-a2"]
        .iter()
        .try_for_each(|node| mesh.start_agent(node))?;
    ["edge-a1", "edge-a2", "edge-b1"]
        .iter()
        .try_for_each(|node| mesh.agent_ready(node, 3))?;
    Ok(mesh)
}

/// The exit code, and the kind and words of the error.
fn failure(mesh: &Mesh, from: &str, command: &[&str]) -> Result<(Option<i32>, String, String)> {
    let output = mesh.meshctl(from, &[command, &["--json"]].concat())?;
    let said: Value = serde_json::from_str(&output.stdout)?;
    let error = said.pointer("/error").cloned().unwrap_or_default();
    Ok((
        output.status.code(),
        word(&error, "kind"),
        word(&error, "message"),
    ))
}

fn events_of_operators(mesh: &Mesh) -> Result<Vec<[String; 2]>> {
    let said = mesh.ask("edge-b1", &["events", "-n", "1000"])?;
    let events = said.pointer("/events").and_then(Value::as_array);
    let events = events.into_iter().flatten();
    let events = events.filter(|one| word(one, "of") == "operator");
    Ok(events
        .map(|one| [word(one, "name"), word(one, "to")])
        .collect())
}

#[test]
fn an_operator_sees_the_node_that_names_it_and_each_question_is_noted() -> Result<()> {
    let mesh = mesh()?;
    let at_b = |command: &[&str]| mesh.ask("edge-a1", &[&["--node", "edge-b1"], command].concat());
    let status = at_b(&["status"])?;
    ensure!(word(&status, "node") == "edge-b1", "{status}");
    // Seen from there.
    let why = at_b(&["path", "why", "edge-a1"])?;
    ensure!(word(&why, "node") == "edge-a1", "{why}");
    let ping = at_b(&["ping", "edge-a1", "-c", "3", "-i", "50"])?;
    ensure!(ping.pointer("/received") == Some(&3.into()), "{ping}");
    let peers = at_b(&["peers"])?;
    let names = peers.pointer("/peers").and_then(Value::as_array);
    let mut names = names.into_iter().flatten().map(|one| word(one, "name"));
    ensure!(names.any(|name| name == "edge-a1"), "{peers}");
    let trace = at_b(&["trace", "edge-a1:22"])?;
    ensure!(word(&trace, "source") == "edge-b1", "{trace}");
    for command in [
        "health",
        "doctor",
        "netcheck",
        "relays",
        "drops",
        "services",
        "snapshot show",
        "snapshot age",
        "dns query edge-a1.mesh",
    ] {
        let words: Vec<_> = command.split(' ').collect();
        let words = [&["--node", "edge-b1"], &words[..]].concat();
        let output = mesh.meshctl("edge-a1", &words)?;
        let code = output.status.code();
        ensure!(matches!(code, Some(0 | 1)), "{command}: {output:?}");
    }
    let noted = events_of_operators(&mesh)?;
    for question in ["Status", "PathWhy", "Ping", "Peers", "Trace", "DnsQuery"] {
        let want = ["edge-a1".to_owned(), format!("asked {question}")];
        ensure!(noted.contains(&want), "no {want:?} in {noted:?}");
    }
    mesh.ends_well()
}

#[test]
fn who_is_not_named_is_refused_in_words_and_that_is_noted() -> Result<()> {
    let mesh = mesh()?;
    let (code, kind, message) = failure(&mesh, "edge-a2", &["--node", "edge-b1", "status"])?;
    ensure!(
        (code, kind.as_str()) == (Some(2), "denied"),
        "{kind}: {message}"
    );
    ensure!(
        message.contains("does not answer edge-a2: name it in `operators`"),
        "{message}"
    );
    let noted = events_of_operators(&mesh)?;
    ensure!(noted == [["edge-a2", "was refused"]], "{noted:?}");
    // Without `operators` nobody even listens.
    let (code, kind, message) = failure(&mesh, "edge-b1", &["--node", "edge-a1", "peers"])?;
    ensure!(
        (code, kind.as_str()) == (Some(2), "denied"),
        "{kind}: {message}"
    );
    ensure!(
        message.contains("edge-a1 answers no other node"),
        "{message}"
    );
    let (code, kind, message) = failure(&mesh, "edge-a1", &["--node", "nobody", "peers"])?;
    ensure!(
        (code, kind.as_str()) == (Some(64), "refused"),
        "{kind}: {message}"
    );
    // Beside the tunnel there is no such port.
    let outside = mesh.node("edge-a1")?.enter(|| {
        let loopback = ([127, 0, 0, 1], 51_817).into();
        std::net::TcpStream::connect_timeout(&loopback, Duration::from_secs(1))
    })?;
    ensure!(outside.is_err(), "{outside:?}");
    mesh.ends_well()
}

#[test]
fn a_node_that_is_gone_is_said_to_be() -> Result<()> {
    let mesh = mesh()?;
    mesh.kill("edge-b1", "mesh-agent")?;
    let since = Instant::now();
    let (code, kind, message) = failure(&mesh, "edge-a1", &["--node", "edge-b1", "status"])?;
    ensure!(since.elapsed() < GIVEN_UP, "{:?}", since.elapsed());
    ensure!(
        (code, kind.as_str()) == (Some(2), "failed"),
        "{kind}: {message}"
    );
    ensure!(
        message.contains("no answer from the agent of edge-b1"),
        "{message}"
    );
    // What the core knows of it comes with the words, as soon as it knows.
    tool::eventually("edge-b1 is given up", Duration::from_secs(60), || {
        let (_, _, message) = failure(&mesh, "edge-a1", &["--node", "edge-b1", "status"])?;
        ensure!(message.contains("it is unreachable"), "{message}");
        Ok(())
    })?;
    mesh.ends_well()
}
