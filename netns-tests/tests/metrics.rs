//! What Prometheus is shown by real daemons, in its own tool's opinion; and that dashboards and alerts ask for nothing else.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{mesh::Mesh, node::Node};

const LIMIT: Duration = Duration::from_secs(10);

fn monitoring() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/monitoring")
}

fn page(node: &Node, port: u16) -> Result<String> {
    let url = format!("http://127.0.0.1:{port}/metrics");
    node.run(&["curl", "-sSf", "-m", "5", &url], LIMIT)?.ok()
}

fn value(page: &str, series: &str) -> Result<f64> {
    let line = page.lines().find_map(|line| line.strip_prefix(series));
    let line = line.with_context(|| format!("no {series} in {page}"))?;
    Ok(line.trim().parse()?)
}

/// Names of series that a page can have, whether or not there is a series now.
fn shown(page: &str) -> BTreeSet<String> {
    let kinds = page.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let names = kinds.filter_map(|line| line.split_once(' '));
    let names = names.map(|(name, kind)| match kind {
        "counter" => format!("{name}_total"),
        _ => name.to_owned(),
    });
    names.collect()
}

/// Every name that begins as ours do.
fn asked_for(text: &str) -> BTreeSet<String> {
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c| !is_of_name(c));
    let names = words.filter(|word| word.starts_with("holdfast_"));
    names.map(str::to_owned).collect()
}

#[test]
fn prometheus_is_shown_what_dashboards_and_alerts_ask_for() -> Result<()> {
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

    let shown: BTreeSet<_> = [&agent, &relay]
        .into_iter()
        .flat_map(|page| shown(page))
        .collect();
    for file in ["alerts.yaml", "dashboard.json"] {
        let text = fs::read_to_string(monitoring().join(file))?;
        let asked = asked_for(&text);
        let unknown: Vec<_> = asked.difference(&shown).collect();
        ensure!(
            !asked.is_empty() && unknown.is_empty(),
            "{file} asks for {unknown:?}, which nobody shows"
        );
    }
    Ok(())
}

#[test]
fn alerts_fire_when_they_should() -> Result<()> {
    for words in [
        ["check", "rules", "alerts.yaml"],
        ["test", "rules", "alerts_test.yaml"],
    ] {
        let mut promtool = Command::new("promtool");
        let output = promtool.args(words).current_dir(monitoring()).output();
        let output = output.context("start promtool")?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "promtool {words:?}: {said}");
    }
    Ok(())
}
