//! What Prometheus is shown by real daemons, and what its own tool says to the alerts.

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{mesh::Mesh, node::Node};

const LIMIT: Duration = Duration::from_secs(10);

fn page(node: &Node, port: u16) -> Result<String> {
    let url = format!("http://127.0.0.1:{port}/metrics");
    node.run(&["curl", "-sSf", "-m", "5", &url], LIMIT)?.ok()
}

fn value(page: &str, series: &str) -> Result<f64> {
    let line = page.lines().find_map(|line| line.strip_prefix(series));
    let line = line.with_context(|| format!("no {series} in {page}"))?;
    Ok(line.trim().parse()?)
}

#[test]
fn prometheus_is_shown_what_agents_and_relays_did() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    mesh.agent_ready("edge-a1", 2)?;
    mesh.ask("edge-a1", &["ping", "edge-b1", "-c", "2", "-i", "100"])?;
    mesh.resolve("edge-a1", "edge-b1.mesh")?;
    let agent = page(&mesh.node("edge-a1")?, 9640)?;
    let relay = page(mesh.cloud(), 9641)?;
    ensure!(value(&agent, "holdfast_agent_health ")? < 2.0, "{agent}");
    ensure!(value(&agent, "holdfast_agent_nodes ")? >= 2.0, "{agent}");
    ensure!(
        value(&agent, "holdfast_agent_sent_packets_total ")? >= 0.0,
        "{agent}"
    );
    ensure!(
        value(&agent, "holdfast_agent_dns_own_total ")? >= 1.0,
        "{agent}"
    );
    ensure!(
        value(&agent, "holdfast_agent_paths_at_rtt_seconds{le=\"+Inf\"} ")? >= 1.0,
        "{agent}"
    );
    ensure!(value(&relay, "holdfast_relay_links ")? >= 2.0, "{relay}");
    Ok(())
}

#[test]
fn alerts_fire_when_they_should() -> Result<()> {
    let monitoring = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/monitoring");
    for words in [
        ["check", "rules", "alerts.yaml"],
        ["test", "rules", "alerts_test.yaml"],
    ] {
        let mut promtool = Command::new("promtool");
        let output = promtool.args(words).current_dir(&monitoring).output();
        let output = output.context("start promtool")?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "promtool {words:?}: {said}");
    }
    Ok(())
}
