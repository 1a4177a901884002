//! Who was cut off comes back, and how long it takes until all say the same.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use netns_tests::{mesh::Mesh, tool};
use serde_json::Value;

use super::{A1, A2, CONTROLLER, GONE, PARTITION, SITE, ms, site};
use crate::bench::Samples;

/// Nobody waits longer.
const LIMIT: Duration = Duration::from_secs(120);

/// The router's port of the second node.
const PORT_A2: &str = "host1";

/// Cuts, changes something, and heals, `rounds` times.
///
/// # Errors
///
/// If a change does not arrive.
pub(super) fn measure(
    bins: &Path,
    case: &'static str,
    rounds: u32,
    samples: &mut Samples,
) -> Result<()> {
    let mesh = site(bins)?;
    for round in 1..=rounds {
        eprintln!("{case}: round {round} of {rounds}");
        let address = format!("10.43.1.{round}");
        let change = || change(&mesh, &address);
        let healed = match case {
            CONTROLLER => {
                mesh.kill(mesh.cloud().name(), "mesh-controller")?;
                change()?;
                thread::sleep(GONE);
                let begin = Instant::now();
                mesh.start_controller()?;
                all_say(&mesh, &[A1, A2], &address)?;
                begin.elapsed()
            }
            PARTITION => {
                let link = mesh.site(SITE)?.link();
                link.set_down(true)?;
                change()?;
                thread::sleep(GONE);
                let begin = Instant::now();
                link.set_down(false)?;
                all_say(&mesh, &[A1, A2], &address)?;
                begin.elapsed()
            }
            _ => neighbour(&mesh, &address, change)?,
        };
        samples.add(case, "converged", "ms", ms(healed));
        for node in [A1, A2] {
            tool::eventually("the controller is there", LIMIT, || connected(&mesh, node))?;
        }
    }
    mesh.all_run()
}

fn neighbour(mesh: &Mesh, address: &str, change: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let site = mesh.site(SITE)?;
    let port = |state: &str| {
        let batch = format!("link set {PORT_A2} {state}\n");
        tool::ip(site.router().netns(), &batch)
    };
    port("down")?;
    change()?;
    all_say(mesh, &[A1], address)?;
    site.link().set_down(true)?;
    thread::sleep(GONE);
    let begin = Instant::now();
    port("up")?;
    all_say(mesh, &[A2], address)?;
    let healed = begin.elapsed();
    ensure!(connected(mesh, A2).is_err(), "it was the controller");
    site.link().set_down(false)?;
    Ok(healed)
}

/// A service has another address.
fn change(mesh: &Mesh, address: &str) -> Result<()> {
    let text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: moved, namespace: bench}}\n\
         spec: {{clusterIP: {address}, ports: [{{port: 80, protocol: TCP}}]}}\n"
    );
    Ok(fs::write(mesh.manifests().join("moved.yaml"), text)?)
}

fn all_say(mesh: &Mesh, nodes: &[&str], address: &str) -> Result<()> {
    for node in nodes {
        tool::eventually(node, LIMIT, || {
            let found = mesh.resolve(node, "moved.bench.svc.cluster.local")?;
            ensure!(found.to_string() == address, "it says {found}");
            Ok(())
        })?;
    }
    Ok(())
}

fn connected(mesh: &Mesh, node: &str) -> Result<()> {
    let status = mesh.status(node)?;
    let connected = status.pointer("/controller/connected") == Some(&Value::Bool(true));
    ensure!(connected, "{status}");
    Ok(())
}
