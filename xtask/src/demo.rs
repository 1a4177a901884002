//! `cargo xtask demo`: the main job, end to end, each step timed and checked.

mod steps;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use netns_tests::{link::Impairment, mesh::Mesh, nat::NatKind, tool};
use serde_json::{Map, Value, json};

use crate::{build, report, root, setup};

/// What a step found out, beside that it held.
pub(crate) type Facts = Map<String, Value>;

/// A step's name, what it shows, and the step.
type Step = (&'static str, &'static str, fn(&Mesh) -> Result<Facts>);

const STEPS: &[Step] = &[
    (
        "cross-nat",
        "edge-a1 gets an answer of edge-b1 across both NATs",
        steps::cross_nat,
    ),
    (
        "upgrade",
        "A–B goes from relayed to direct without a loss, A–C stays relayed",
        steps::upgrade,
    ),
    (
        "nearest",
        "the near copy answers, and the far one when it dies",
        steps::nearest,
    ),
    (
        "udp-blocked",
        "site C goes on over TCP 443",
        steps::udp_blocked,
    ),
    (
        "cloud-gone",
        "A and B live on without controller and relay",
        steps::cloud_gone,
    ),
    (
        "offline-boot",
        "edge-a1 starts with everything upstream gone",
        steps::offline_boot,
    ),
];

/// Nodes of the demo: the cloud's, two at site A, one at B, one at C.
pub(crate) const NODES: [&str; 5] = ["cloud", "edge-a1", "edge-a2", "edge-b1", "edge-c1"];

struct Done {
    name: &'static str,
    time: Duration,
    result: Result<Facts>,
}

/// Runs every step; says whether all of them held.
///
/// # Errors
///
/// If the machine is not fit for it, or the mesh does not come up.
pub(crate) fn run(json: bool, keep: bool) -> Result<bool> {
    setup::ready()?;
    let bins = build(false)?;
    let start = Instant::now();
    eprintln!("starting five nodes at three sites and in the cloud …");
    let mesh = bring_up(&bins)?;
    eprintln!("up after {}", report::took(start.elapsed()));
    let mut done = Vec::new();
    for (name, shows, step) in STEPS {
        eprintln!("{name}: {shows} …");
        let start = Instant::now();
        let result = step(&mesh).and_then(|facts| mesh.all_run().map(|()| facts));
        let step = Done {
            name,
            time: start.elapsed(),
            result,
        };
        if json {
            println!("{}", line(&step));
        } else if let Err(error) = &step.result {
            eprintln!("  FAILED: {error:#}");
        }
        done.push(step);
    }
    if !json {
        print_table(&done, start.elapsed());
        println!(
            "\n$ meshctl status   (on edge-a1)\n{}",
            mesh.meshctl("edge-a1", &["status"])?.stdout
        );
    }
    if keep {
        how_to_look_around(&mesh, json);
        mesh.keep()?;
    }
    Ok(done.iter().all(|step| step.result.is_ok()))
}

/// The demo's mesh, with its services running and every agent ready.
///
/// # Errors
///
/// If something does not come up.
pub(crate) fn bring_up(bins: &Path) -> Result<Mesh> {
    let mut mesh = Mesh::start(bins, &root().join("examples/demo"))?;
    mesh.start_relay()?;
    let thin = Impairment::delay_loss(Duration::from_millis(20), 0.01);
    let seeded = |seed| Impairment { seed, ..thin };
    let wan = |last| [203, 0, 113, last].into();
    mesh.add_site(
        "site-a",
        NatKind::PortRestricted,
        wan(1),
        seeded(1),
        &["edge-a1", "edge-a2"],
    )?;
    mesh.add_site(
        "site-b",
        NatKind::PortRestricted,
        wan(2),
        seeded(2),
        &["edge-b1"],
    )?;
    mesh.add_site(
        "site-c",
        NatKind::Symmetric,
        wan(3),
        seeded(3),
        &["edge-c1"],
    )?;
    for (node, address) in [("edge-a2", "fd42:a2::1"), ("edge-b1", "fd42:b1::1")] {
        tool::ip(
            mesh.node(node)?.netns(),
            &format!("addr add {address}/128 dev lo\n"),
        )?;
    }
    for node in NODES {
        mesh.start_agent(node)
            .with_context(|| format!("start the agent of {node}"))?;
    }
    for node in NODES {
        mesh.agent_ready(node, NODES.len() as u64)?;
    }
    serve_site_a(&mesh)?;
    mesh.serve("edge-b1", "inventory", &["http", "edge-b1", "[::]:8080"])?;
    mesh.serve("edge-b1", "catalog", &["http", "edge-b1", "0.0.0.0:8081"])?;
    mesh.serve("edge-b1", "telemetry", &["echo", "0.0.0.0:9000"])?;
    mesh.serve("edge-c1", "http", &["http", "edge-c1", "0.0.0.0:8080"])?;
    mesh.serve("edge-c1", "echo", &["echo", "0.0.0.0:9000"])?;
    Ok(mesh)
}

/// What runs on `edge-a2`, which dies and comes back in the course of the demo.
///
/// # Errors
///
/// If it does not come up.
pub(crate) fn serve_site_a(mesh: &Mesh) -> Result<()> {
    mesh.serve("edge-a2", "catalog", &["http", "edge-a2", "0.0.0.0:8081"])
}

fn line(step: &Done) -> Value {
    let ms = u64::try_from(step.time.as_millis()).unwrap_or(u64::MAX);
    let mut line = Map::new();
    line.insert("step".to_owned(), json!(step.name));
    line.insert("ok".to_owned(), json!(step.result.is_ok()));
    line.insert("ms".to_owned(), json!(ms));
    match &step.result {
        Ok(facts) => line.extend(facts.clone()),
        Err(error) => {
            line.insert("error".to_owned(), json!(format!("{error:#}")));
        }
    }
    Value::Object(line)
}

fn print_table(done: &[Done], all: Duration) {
    let rows = done.iter().map(|step| {
        let (held, what) = match &step.result {
            Ok(facts) => ("ok", facts.iter().map(fact).collect::<Vec<_>>().join("\n")),
            Err(error) => ("FAILED", format!("{error:#}")),
        };
        vec![
            step.name.to_owned(),
            held.to_owned(),
            report::took(step.time),
            what,
        ]
    });
    println!(
        "\n{}",
        report::table(&["step", "", "time", "facts"], &rows.collect::<Vec<_>>())
    );
    let held = done.iter().filter(|step| step.result.is_ok()).count();
    println!(
        "{held} of {} steps held, {} since the build",
        done.len(),
        report::took(all)
    );
}

fn fact((name, value): (&String, &Value)) -> String {
    let value = value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned);
    format!("{}: {value}", name.replace('_', " "))
}

fn how_to_look_around(mesh: &Mesh, json: bool) {
    let bins = mesh.bin("");
    let mut text = format!("The lab {} stays up.\n", mesh.lab().id());
    for node in mesh.lab().nodes() {
        let agent = node.dir().join("agent.sock");
        text += &format!("  nsenter --net=/run/netns/{} bash\n", node.netns());
        if agent.exists() {
            text += &format!("    {bins}meshctl --socket {} status\n", agent.display());
        }
    }
    text += &format!(
        "Logs, configuration and state: {}\n",
        mesh.lab().dir().display()
    );
    text += &format!("Take it down: {bins}lab down {}\n", mesh.lab().id());
    if json {
        eprint!("{text}"); // Standard output is for JSON.
    } else {
        print!("{text}");
    }
}
