//! What works when everything else is gone, and how soon all is one mesh again (issue 6): the real programs in a lab.
//!
//! | case | what happens, and what is counted |
//! |---|---|
//! | [`BOOT`] | both nodes of a site boot with nothing left of the life before but their disks: no way out, no controller, no relay, and the clock of the measured one is ten years off. From the start of its process: `name`, a correct answer of its resolver; `service`, a connection to a service of its own; `peer`, one to a service of the other node |
//! | [`ENDPOINT`], [`SERVICE`], [`ENDPOINTS`], [`NODES`] | so much changed while a node was away, and it comes back. `message`: the answer; `changed`: the resources in it that are others, encoded as there, and the keys of those that are gone; `changed_least`: of slices of endpoints only the endpoints that are others. `wire`: all that it and the controller said to each other, both ways, with all headers, the TLS handshake, and the end of the connection; `wire_more`: that less what a node pays that comes back when nothing changed |
//! | [`CONTROLLER`] | the controller was gone for [`GONE`], and something changed; from its start until all nodes answer by the change |
//! | [`PARTITION`] | the same of a site whose line to everybody was cut |
//! | [`NEIGHBOUR`] | one node was cut off its LAN, the other one heard of the change, and then the line went for good: from the LAN's healing until the first node has it, from the other one |
//! | [`WEEK`] | seven days in virtual time: `mesh-controller`'s own test says what came of it |
//!
//! What changed is counted in resources, as Kubernetes counts: its watch tells an EndpointSlice whole whatever of it changed,
//! and so does Sync. The smallest change there is, one endpoint, has 40 bytes, the head alone 160 that says that all is signed:
//! there `message` is many times `changed_least`, whatever the controller does. `least_ratio` says how many, and judges nothing.

mod away;
mod boot;
mod healed;
mod week;

use std::{fs, path::Path, time::Duration};

use anyhow::{Result, ensure};
use netns_tests::{link::Impairment, mesh::Mesh, nat::NatKind};

use super::{Options, Samples, choose};

pub(super) const BOOT: &str = "cold-boot";
pub(super) const ENDPOINT: &str = "away-1-endpoint";
pub(super) const SERVICE: &str = "away-1-service";
pub(super) const ENDPOINTS: &str = "away-100-endpoints";
pub(super) const NODES: &str = "away-1000-nodes";
pub(super) const CONTROLLER: &str = "controller-back";
pub(super) const PARTITION: &str = "partition-healed";
pub(super) const NEIGHBOUR: &str = "neighbour-healed";
pub(super) const WEEK: &str = "7-days";

/// What is measured together.
const AWAY: &str = "away";
const CASES: &[&str] = &[BOOT, AWAY, CONTROLLER, PARTITION, NEIGHBOUR, WEEK];

/// For so long somebody is gone: by then every pause between attempts has grown as long as it does.
const GONE: Duration = Duration::from_secs(45);

/// The two nodes of a site.
const A1: &str = "edge-a1";
const A2: &str = "edge-a2";
const SITE: &str = "site-a";

/// Refuses names of cases that there are not.
///
/// # Errors
///
/// With the names that there are.
pub(super) fn check(options: &Options) -> Result<()> {
    ensure!(
        options.peers.is_empty(),
        "bench offline has no --peers: choose cases by --only"
    );
    choose(CASES, |case| case, &options.only).map(drop)
}

/// Whether figures of this name are made.
#[cfg(test)]
pub(super) fn is_case(name: &str) -> bool {
    CASES.contains(&name) || [ENDPOINT, SERVICE, ENDPOINTS, NODES].contains(&name)
}

/// Measures the cases one after the other. A case that cannot be measured is told by name.
///
/// # Errors
///
/// Never: what failed is in the samples.
pub(super) fn run(options: &Options, samples: &mut Samples) -> Result<bool> {
    let (bins, rounds) = (&options.bins, options.rounds);
    for &case in choose(CASES, |case| case, &options.only)? {
        eprintln!("{case}");
        let measured = match case {
            BOOT => boot::measure(bins, rounds, samples),
            AWAY => away::measure(bins, rounds, samples),
            WEEK => week::measure(samples),
            _ => healed::measure(bins, case, rounds, samples),
        };
        if let Err(error) = measured {
            samples.error(case, &error);
        }
    }
    Ok(samples.errors().next().is_none())
}

/// The two nodes, 10 ms away from controller and relay, and what they serve.
fn site(bins: &Path) -> Result<Mesh> {
    let manifests = tempfile::tempdir()?;
    fs::write(
        manifests.path().join("mesh.yaml"),
        include_str!("offline/mesh.yaml"),
    )?;
    let mut mesh = Mesh::start(bins, manifests.path())?;
    mesh.start_relay()?;
    let link = Impairment::delay_loss(Duration::from_millis(10), 0.0);
    let wan = [203, 0, 113, 1].into();
    mesh.add_site(SITE, NatKind::PortRestricted, wan, link, &[A1, A2])?;
    for node in [A1, A2] {
        mesh.start_agent(node)?;
    }
    for node in [A1, A2] {
        mesh.agent_ready(node, 2)?;
        mesh.serve(node, "http", &["http", node, "0.0.0.0:8080"])?;
    }
    Ok(mesh)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
