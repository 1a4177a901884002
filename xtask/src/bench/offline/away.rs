//! A node comes back after something changed: what that costs.

use std::{
    fmt::Write as _,
    fs,
    net::Ipv4Addr,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    mesh::{CLOUD, Mesh},
    node::Node,
};
use serde::Deserialize;
use serde_json::Value;

use super::{ENDPOINT, ENDPOINTS, NODES, SERVICE};
use crate::bench::{Samples, ask::Asked, wire_bytes};

/// Where the nodes are that come back, and the one that is always there, which says when a change was published.
const FLEET: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 200);
const WATCH: (&str, Ipv4Addr) = ("watch", Ipv4Addr::new(203, 0, 113, 201));

/// Nodes that join.
const JOINED: u64 = 1_000;

/// Nothing more comes of a change after so long: the controller reads a folder again when it was quiet for 1 s at most.
const QUIET: Duration = Duration::from_secs(2);

/// A connection has ended on the wire by then.
const ENDED: Duration = Duration::from_millis(100);

/// How often is looked whether something was published.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// 1,000 nodes are signed anew within this, also by a debug build.
const CHANGE_LIMIT: Duration = Duration::from_secs(60);

/// What the fleet says of a node that came back; `controlplane-bench` says what each is.
#[derive(Debug, Deserialize)]
struct Told {
    message: u64,
    head: u64,
    changed: u64,
    changed_least: u64,
    resources: usize,
    full: bool,
}

/// A case, how many resources change in it, and the manifest of each round.
type Size = (&'static str, usize, fn(u32) -> String);

struct World {
    fleet: Asked,
    fleet_node: Node,
    mesh: Mesh,
}

/// Changes and comes back, `rounds` times with each size.
///
/// # Errors
///
/// If a node is told otherwise than what changed.
pub(super) fn measure(bins: &Path, rounds: u32, samples: &mut Samples) -> Result<()> {
    let mut world = World::new(bins)?;
    let sizes: [Size; 4] = [
        (ENDPOINT, 1, |round| slice("one", 10, round, 1)),
        (SERVICE, 2, |round| {
            let name = format!("new{round}");
            format!(
                "{}---\n{}",
                service(&name, round),
                slice(&name, 10, round, 10)
            )
        }),
        (ENDPOINTS, 1, |round| slice("hundred", 100, round, 100)),
        (NODES, usize::try_from(JOINED)?, sites),
    ];
    // So that what changes is there.
    for (case, _, text) in sizes {
        world.write(case, 0, &text(0))?;
    }
    world.published(0)?;
    for round in 1..=rounds {
        for (case, resources, text) in sizes {
            eprintln!("{case}: round {round} of {rounds}");
            world.back()?;
            let (none, idle) = world.back()?;
            ensure!(none.resources == 0, "something changed by itself: {none:?}");
            let before = world.generation()?;
            world.write(case, round, &text(round))?;
            world.published(before)?;
            let (told, wire) = world.back()?;
            ensure!(
                told.resources == resources && !told.full,
                "{resources} resources changed, and it was told {told:?}"
            );
            let more = wire.saturating_sub(idle);
            let [message, changed, least] =
                [told.message, told.changed, told.changed_least].map(|bytes| bytes as f64);
            let bytes = [
                ("head", told.head as f64),
                ("changed", changed),
                ("changed_least", least),
                ("message", message),
                ("wire", wire as f64),
                ("wire_more", more as f64),
            ];
            for (metric, bytes) in bytes {
                samples.add(case, metric, "bytes", bytes);
            }
            samples.add(case, "message_ratio", "x changed", message / changed);
            samples.add(case, "wire_ratio", "x changed", more as f64 / changed);
            samples.add(case, "least_ratio", "x changed_least", message / least);
        }
    }
    world.mesh.all_run()
}

impl World {
    fn new(bins: &Path) -> Result<Self> {
        let manifests = tempfile::tempdir()?;
        let mesh = Mesh::start(bins, manifests.path())?;
        mesh.lab().public_node(WATCH.0, WATCH.1)?;
        // Names only: programs and their maps are another bench's.
        mesh.start_agent_with(WATCH.0, "services = false\npolicy = false\n")?;
        let fleet_node = mesh.lab().public_node("fleet", FLEET)?;
        let token = fleet_node.write("token", &mesh.token_for(u32::try_from(JOINED)?)?)?;
        let (controller, token) = (format!("{CLOUD}:7440"), token.display().to_string());
        let words = [
            &mesh.bin("controlplane-bench"),
            "fleet",
            &controller,
            &token,
        ];
        let mut fleet = Asked::start(fleet_node.command(&words)?)?;
        eprintln!("  {JOINED} nodes join");
        fleet.ask::<Value>(&format!("join {JOINED}"))?;
        mesh.agent_ready(WATCH.0, JOINED + 1)?;
        Ok(Self {
            fleet,
            fleet_node,
            mesh,
        })
    }

    fn write(&self, case: &str, round: u32, text: &str) -> Result<()> {
        let file = match case {
            SERVICE => format!("{case}-{round}.yaml"), // One more each time.
            _ => format!("{case}.yaml"),
        };
        Ok(fs::write(self.mesh.manifests().join(file), text)?)
    }

    /// One comes back, and leaves: what it was told, and how much went either way.
    fn back(&mut self) -> Result<(Told, u64)> {
        let before = wire_bytes(&self.fleet_node)?;
        let told = self.fleet.ask("back 0")?;
        thread::sleep(ENDED);
        Ok((told, wire_bytes(&self.fleet_node)? - before))
    }

    fn generation(&self) -> Result<u64> {
        let status = self.mesh.status(WATCH.0)?;
        let generation = status.pointer("/snapshot/generation");
        generation.and_then(Value::as_u64).context("no generation")
    }

    /// Waits until there is a later generation, and no other one.
    fn published(&self, before: u64) -> Result<()> {
        let begin = Instant::now();
        let (mut last, mut since) = (before, Instant::now());
        while last == before || since.elapsed() < QUIET {
            ensure!(begin.elapsed() < CHANGE_LIMIT, "nothing is published");
            let now = self.generation()?;
            if now != last {
                (last, since) = (now, Instant::now());
            }
            thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }
}

fn service(name: &str, round: u32) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: bench}}\n\
         spec: {{clusterIP: 10.43.2.{round}, ports: [{{name: http, port: 80, targetPort: 8080, protocol: TCP}}]}}\n"
    )
}

/// So many endpoints, of which the first `changing` have other addresses in each round.
fn slice(name: &str, count: u32, round: u32, changing: u32) -> String {
    let mut text = format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}-1, namespace: bench, \
         labels: {{kubernetes.io/service-name: {name}}}}}\naddressType: IPv4\n\
         ports: [{{name: http, port: 8080, protocol: TCP}}]\nendpoints:\n"
    );
    for number in 0..count {
        let round = if number < changing { round } else { 0 };
        writeln!(
            text,
            "- {{addresses: [10.64.{round}.{}], nodeName: node-{number}, zone: zone-{}, conditions: {{ready: true}}}}",
            number + 1,
            number % 3
        )
        .ok();
    }
    text
}

/// All nodes are at another site.
fn sites(round: u32) -> String {
    let node = |number| {
        format!(
            "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshNode\nmetadata: {{name: node-{number}}}\n\
             spec: {{site: site-{round}, zone: zone-{}}}\n---\n",
            number % 3
        )
    };
    (0..JOINED).map(node).collect()
}
