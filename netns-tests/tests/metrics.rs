//! What Prometheus is shown by real daemons, and what its own tool says to the alerts.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{mesh::Mesh, node::Node, tool};
use serde_json::Value;

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
fn prometheus_is_shown_what_agents_relays_and_controllers_did() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    mesh.agent_ready("edge-a1", 2)?;
    mesh.ask("edge-a1", &["ping", "edge-b1", "-c", "2", "-i", "100"])?;
    mesh.resolve("edge-a1", "edge-b1.mesh")?;
    let least = |node: &Node, port, prefix: &str, all: &[(&str, f64)]| {
        tool::eventually("it is shown", LIMIT, || {
            let page = page(node, port)?;
            for (series, least) in all {
                let shown = value(&page, &format!("holdfast_{prefix}_{series}"))?;
                ensure!(shown >= *least, "{series}: {shown}: {page}");
            }
            Ok(page)
        })
    };
    let agent = [
        ("nodes ", 2.0),
        ("sent_packets_total ", 0.0),
        ("dns_own_total ", 1.0),
        ("paths_at_rtt_seconds{le=\"+Inf\"} ", 1.0),
    ];
    let agent = least(&mesh.node("edge-a1")?, 9640, "agent", &agent)?;
    ensure!(value(&agent, "holdfast_agent_health ")? < 2.0, "{agent}");
    least(mesh.cloud(), 9641, "relay", &[("links ", 2.0)])?;
    let controller = [
        ("serves ", 1.0),
        ("leads ", 1.0),
        ("nodes ", 2.0),
        ("agents_connected ", 2.0),
        ("resources{kind=\"node\"} ", 2.0),
        ("store_bytes ", 1.0),
        ("desired_state_bytes ", 1.0),
        ("requests_total{method=\"join\",code=\"Ok\"} ", 2.0),
        ("requests_total{method=\"sync\",code=\"Ok\"} ", 2.0),
        ("sync_answers_total{kind=\"everything\"} ", 2.0),
        ("sync_answer_bytes_total{kind=\"everything\"} ", 1.0),
        ("reconciles_total{outcome=\"saved\"} ", 1.0),
    ];
    let controller = least(mesh.cloud(), 9642, "controller", &controller)?;
    let failed = "holdfast_controller_reconciles_total{outcome=\"failed\"} ";
    ensure!(value(&controller, failed)? == 0.0, "{controller}");
    mesh.ends_well()
}

#[test]
fn handshakes_flows_and_maps_are_shown_as_they_are() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    mesh.serve("edge-b1", "inventory", &["http", "edge-b1", "[::]:8080"])?;
    let agent = || page(&mesh.node("edge-a1")?, 9640);
    let translated = "holdfast_agent_service_flows_total{level=\"socket\",outcome=\"translated\"} ";
    let handshakes = |page: &str| -> Result<[f64; 2]> {
        let of = |labels| {
            value(
                page,
                &format!("holdfast_agent_handshakes_total{{{labels}}} "),
            )
        };
        let completed = of("direction=\"out\",outcome=\"completed\"")?
            + of("direction=\"in\",outcome=\"completed\"")?;
        Ok([of("direction=\"out\",outcome=\"begun\"")?, completed])
    };
    let before = agent()?;
    let inventory = "http://inventory.shop.svc.cluster.local/";
    mesh.get("edge-a1", &["-4", inventory], LIMIT)?;
    let after = agent()?;
    let ([begun, completed], woken) = (handshakes(&before)?, handshakes(&after)?);
    ensure!(woken[0] > begun && woken[1] > completed, "{after}");
    let flows = value(&after, translated)? - value(&before, translated)?;
    ensure!(flows >= 1.0, "{flows} flows: {after}");
    ensure!(
        value(&after, "holdfast_agent_queue_age_seconds{queue=\"held\"} ")? == 0.0,
        "{after}"
    );
    let waited = value(
        &after,
        "holdfast_agent_queue_age_seconds{queue=\"events\"} ",
    )?;
    ensure!((0.0..5.0).contains(&waited), "{waited} s");
    ensure!(
        value(
            &page(mesh.cloud(), 9641)?,
            "holdfast_relay_queue_age_seconds "
        )? < 5.0
    );

    // As `meshctl bpf maps` counts them. Flows may begin and end between two looks.
    tool::eventually("both count the same", LIMIT, || {
        let (page, maps) = (agent()?, mesh.ask("edge-a1", &["bpf", "maps"])?);
        let maps = maps.get("maps").and_then(Value::as_array);
        let maps = maps.context("no maps")?;
        let mut compared = 0;
        for map in maps {
            let number = |key: &str| map.get(key).and_then(Value::as_u64);
            let name = map.get("name").and_then(Value::as_str).unwrap_or_default();
            let shown = |metric: &str| {
                let series = format!("holdfast_agent_map_{metric}{{map=\"{name}\",");
                let mut lines = page.lines();
                let line = lines.find(|line| line.starts_with(&series))?;
                line.rsplit(' ').next()?.parse::<u64>().ok()
            };
            let (Some(entries), Some(counted)) = (shown("entries"), number("entries")) else {
                continue;
            };
            ensure!(entries == counted, "{name}: {entries}, and {map}");
            ensure!(shown("capacity") <= number("entries_max"), "{map}: {page}");
            compared += 1;
        }
        // Frontends, endpoints, and five of flows: packets are not looked at here.
        ensure!(compared >= 7, "{compared} maps: {page}");
        let frontends = "holdfast_agent_map_entries{map=\"hf_frontends\",when_full=\"left_out\"} ";
        ensure!(value(&page, frontends)? >= 1.0, "{page}");
        let relayed = "holdfast_agent_paths{transport=\"relay_udp\",";
        ensure!(page.contains(relayed), "{page}");
        Ok(())
    })?;
    mesh.ends_well()
}

#[test]
fn a_mesh_in_which_nothing_goes_wrong_logs_nothing_above_info() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    mesh.serve("edge-b1", "inventory", &["http", "edge-b1", "[::]:8080"])?;
    let inventory = "http://inventory.shop.svc.cluster.local/";
    mesh.get("edge-a1", &["-4", inventory], LIMIT)?;
    mesh.resolve("edge-a1", "edge-b1.mesh")?;
    for node in ["edge-a1", "edge-b1"] {
        mesh.take(node, "mesh-agent")?.terminate(LIMIT)?;
        mesh.start_agent(node)?;
        mesh.agent_ready(node, 2)?;
    }
    mesh.get("edge-a1", &["-4", inventory], LIMIT)?;
    mesh.ends_well()?;
    // It is listened to at all: what is wrong is heard.
    fs::write(mesh.manifests().join("odd.yaml"), "kind: Odd\n")?;
    tool::eventually("somebody complains about the manifest", LIMIT, || {
        ensure!(mesh.ends_well().is_err(), "nobody does");
        Ok(())
    })?;
    mesh.provokes(&["problem in the desired state problem=odd.yaml:1:"]);
    mesh.ends_well()
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
