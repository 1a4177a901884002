//! What an agent takes that has peers, services and nothing to do.

use std::{fmt::Write as _, fs, net::Ipv4Addr, path::Path, thread, time::Duration};

use anyhow::{Result, ensure};
use netns_tests::{
    mesh::{Mesh, READY_LIMIT},
    tool,
};
use serde_json::Value;

use super::cases::Idle;
use crate::bench::Samples;

/// The agent that is measured.
pub(in crate::bench) const NODE: &str = "idle";

/// What its peers go without: it is not they that are measured.
const PEER_LINES: &str = "services = false\npacket_threads = 1\n";

/// After the last packet a path is looked after for 45 s as if more came (`shared/paths.md`, "keepalive"): then it is
/// idle. Of a short measurement nobody asks that.
pub(in crate::bench) const CALM: Duration = Duration::from_secs(50);

/// Each peer is woken by echoes: 50 one after the other take a few seconds.
const WAKE_LIMIT: Duration = Duration::from_secs(60);

/// Measures it.
///
/// # Errors
///
/// If a node does not come up, or a path does not.
pub(super) fn measure(bins: &Path, case: &str, idle: Idle, samples: &mut Samples) -> Result<()> {
    let mesh = start(bins, idle, "")?;
    if idle.time >= Duration::from_secs(30) {
        thread::sleep(CALM);
    }
    let status = mesh.status(NODE)?;
    let services = status.pointer("/snapshot/services").and_then(Value::as_u64);
    ensure!(services == Some(idle.services.into()), "{status}");
    let agent = mesh.take(NODE, "mesh-agent")?;
    let before = agent.cpu_time()?;
    thread::sleep(idle.time);
    let took = agent.cpu_time()? - before;
    let share = took.as_secs_f64() / idle.time.as_secs_f64() * 100.0;
    samples.add(case, "cpu", "%", share);
    samples.add(case, "resident", "KiB", agent.resident_kib()? as f64);
    let peak = agent.resident_peak_kib()?;
    samples.add(case, "resident_peak", "KiB", peak as f64);
    mesh.put(NODE, "mesh-agent", agent);
    let direct = direct(&mesh)?;
    ensure!(direct == u64::from(idle.peers), "{direct} paths at the end");
    tool::eventually("all processes run on", READY_LIMIT, || mesh.all_run())
}

/// [`NODE`], with these lines of configuration, and its peers, with a direct path to each.
///
/// # Errors
///
/// If a node does not come up, or a path does not.
pub(in crate::bench) fn start(bins: &Path, idle: Idle, lines: &str) -> Result<Mesh> {
    let manifests = tempfile::tempdir()?;
    fs::write(manifests.path().join("bench.yaml"), manifest(idle)?)?;
    let mesh = Mesh::start(bins, manifests.path())?;
    mesh.start_relay()?;
    for number in 1..=idle.peers {
        let name = peer(number);
        mesh.lab()
            .public_node(&name, Ipv4Addr::new(203, 0, 113, number))?;
        mesh.start_agent_with(&name, PEER_LINES)?;
    }
    for number in 1..=idle.peers {
        mesh.agent_ready(&peer(number), idle.peers.into())?;
    }
    // The last: where its way out costs, it asks the controller once, and then not for an hour.
    let node = mesh
        .lab()
        .public_node(NODE, Ipv4Addr::new(203, 0, 113, 254))?;
    // The kernel asks for IPv6 routers now and then, with or without a mesh; here there are none.
    node.sysctl("net/ipv6/conf/wan/router_solicitations", "0")?;
    mesh.start_agent_with(NODE, lines)?;
    let nodes = u64::from(idle.peers) + 1;
    mesh.agent_ready(NODE, nodes)?;
    for number in 1..=idle.peers {
        mesh.agent_ready(&peer(number), nodes)?;
    }
    tool::eventually("direct paths to all peers", WAKE_LIMIT, || {
        wake(&mesh, idle)
    })?;
    Ok(mesh)
}

fn peer(number: u8) -> String {
    format!("peer-{number}")
}

/// An echo to each peer to which there is no direct path yet.
fn wake(mesh: &Mesh, idle: Idle) -> Result<()> {
    for number in 1..=idle.peers {
        let words = ["ping", "-c", "1", "-W", "200", &peer(number)];
        mesh.meshctl(NODE, &words)?; // Its first echo may come before the path.
    }
    let direct = direct(mesh)?;
    ensure!(direct == u64::from(idle.peers), "{direct}");
    Ok(())
}

fn direct(mesh: &Mesh) -> Result<u64> {
    let status = mesh.status(NODE)?;
    let direct = status.pointer("/peers/direct").and_then(Value::as_u64);
    Ok(direct.unwrap_or(0))
}

/// By it nodes find each other.
const RELAY: &str = "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshRelay\nmetadata: {name: cloud-relay}\nspec: \
                     {addresses: [198.51.100.10]}\n";

/// The relay, and services with an endpoint on two of the peers each.
fn manifest(idle: Idle) -> Result<String> {
    let mut text = RELAY.to_owned();
    for number in 0..idle.services {
        let [high, low] = number.to_be_bytes();
        let nodes = [number, number + 1].map(|number| 1 + number % u16::from(idle.peers));
        write!(
            text,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: service-{number}, namespace: bench}}\n\
             spec: {{clusterIP: 10.43.{high}.{low}, ports: [{{name: http, port: 80}}]}}\n\
             ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: service-{number}-1, \
             namespace: bench, labels: {{kubernetes.io/service-name: service-{number}}}}}\naddressType: IPv4\n\
             ports: [{{name: http, port: 8080}}]\nendpoints:\n"
        )?;
        for (place, node) in nodes.into_iter().enumerate() {
            writeln!(
                text,
                "- {{addresses: [10.{}.{high}.{low}], nodeName: peer-{node}}}",
                128 + place
            )?;
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_service_has_two_endpoints_on_nodes_that_there_are() {
        let idle = Idle {
            peers: 3,
            services: 7,
            time: Duration::ZERO,
        };
        let text = manifest(idle).unwrap();
        assert_eq!(text.matches("kind: Service\n").count(), 7);
        assert_eq!(text.matches("nodeName: peer-").count(), 14);
        assert!(!text.contains("peer-0") && !text.contains("peer-4"));
    }
}
