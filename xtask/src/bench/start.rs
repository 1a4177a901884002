//! How long a node is without names and services when its agent starts, and what the agent takes.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use netns_tests::tool;

use super::{Options, RIGHT, Samples, UP_LIMIT, two_nodes};

/// Starts a round: many, as each takes a fraction of a second.
const STARTS: u32 = 5;

/// Refuses a choice: there is one case.
///
/// # Errors
///
/// If there is one.
pub(super) fn check(options: &Options) -> Result<()> {
    ensure!(
        options.peers.is_empty() && options.only.is_empty(),
        "bench start has nothing to choose: leave --peers and --only out"
    );
    Ok(())
}

/// Starts an agent again and again, from the snapshot on its disk.
///
/// # Errors
///
/// If it does not come up.
pub(super) fn run(options: &Options, samples: &mut Samples) -> Result<bool> {
    let rounds = options.rounds;
    let mesh = two_nodes(&options.bins, "")?;
    mesh.serve(RIGHT, "local", &["http", RIGHT, "0.0.0.0:8080"])?;
    let node = mesh.node(RIGHT)?;
    let lab = tool::binary("lab")?.display().to_string();
    for round in 1..=rounds * STARTS {
        eprintln!("start {round} of {}", rounds * STARTS);
        let mut agent = mesh.take(RIGHT, "mesh-agent")?;
        let status = agent.terminate(UP_LIMIT)?;
        ensure!(status.success(), "the agent ended with {status}");
        let start = Instant::now();
        mesh.start_agent(RIGHT)?;
        let mut name = node.spawn(
            "await-name",
            &[&lab, "await-name", "local.bench.svc.cluster.local"],
        )?;
        let mut service = node.spawn("await-tcp", &[&lab, "await-tcp", "10.43.0.1:80"])?;
        ensure!(name.wait(UP_LIMIT)?.success(), "{}", name.log());
        samples.add("agent", "first_name", "ms", ms(start.elapsed()));
        ensure!(service.wait(UP_LIMIT)?.success(), "{}", service.log());
        samples.add("agent", "first_service_answer", "ms", ms(start.elapsed()));
        mesh.agent_ready(RIGHT, 2)?;
        let agent = mesh.take(RIGHT, "mesh-agent")?;
        samples.add(
            "agent",
            "resident_peak",
            "KiB",
            agent.resident_peak_kib()? as f64,
        );
        mesh.put(RIGHT, "mesh-agent", agent);
    }
    Ok(true)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1_000.0
}
