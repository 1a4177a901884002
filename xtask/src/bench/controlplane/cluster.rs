//! A controller, the cluster that it follows, and its agents.

use std::{
    net::Ipv4Addr,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    mesh::{CLOUD, Mesh},
    node::{Node, Process},
};
use serde::Deserialize;
use serde_json::Value;

use super::{cases::Size, ms, tell};
use crate::bench::{Samples, UP_LIMIT, ask::Asked, percentile, wire_bytes};

/// Where all simulated agents are.
const FLEET: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 200);

/// Nodes that join when all others are connected.
const LATE: u32 = 20;

/// For how long the controller is watched with nothing to do.
const IDLE: Duration = Duration::from_secs(5);

/// Between two changes: as much again is left to chance, so that none of the timers of 30 ms and of a second that stand
/// between the API server and a map is always met at the same moment.
const PAUSE: Duration = Duration::from_millis(60);

/// What the fleet says of agents' first answers on a connection.
#[derive(Debug, Deserialize)]
struct Firsts {
    times_ns: Vec<u64>,
    bytes: Vec<u64>,
    full: usize,
}

/// What it says of a change.
#[derive(Debug, Deserialize)]
struct Seen {
    agents_ns: Vec<u64>,
    bytes: Vec<u64>,
    maps_ns: Vec<u64>,
}

/// All of it.
struct World {
    // Fields drop in this order: who asks before whom.
    cluster: Asked,
    fleet: Asked,
    fleet_node: Node,
    mesh: Mesh,
    size: Size,
}

/// Measures everything that there is of a controller.
///
/// # Errors
///
/// If something does not come up, or a change does not reach everybody.
pub(super) fn measure(bins: &Path, case: &str, size: Size, samples: &mut Samples) -> Result<()> {
    let mut world = World::new(bins, size)?;
    let ready = world.restart()?;
    samples.add(case, "ready", "ms", ms(ready));
    eprintln!("  agents connect");
    let firsts: Firsts = world.fleet.ask("connect")?;
    ensure!(
        firsts.full == firsts.bytes.len(),
        "of {} first answers {} were full",
        firsts.bytes.len(),
        firsts.full
    );
    samples.add(case, "first_answers", "ms", last_ms(&firsts.times_ns));
    samples.add(case, "first_answer", "KiB", median(firsts.bytes) / 1024.0);
    world.settle()?;
    for number in 1..=size.real {
        let bpffs = world.mesh.node(&real(number))?.dir().join("bpf");
        let question = format!("maps {}", bpffs.display());
        world.fleet.ask::<Value>(&question)?;
    }
    let before = world.controller(Process::cpu_time)?;
    thread::sleep(IDLE);
    let idle = world.controller(Process::cpu_time)? - before;
    let idle = idle.as_secs_f64() / IDLE.as_secs_f64();
    samples.add(case, "idle_cpu", "%", idle * 100.0);
    eprintln!("  {} endpoints change", size.changes);
    world.changes(case, idle, samples)?;
    let resident = world.controller(Process::resident_kib)?;
    samples.add(case, "resident", "KiB", resident as f64);
    let peak = world.controller(Process::resident_peak_kib)?;
    samples.add(case, "resident_peak", "KiB", peak as f64);
    eprintln!("  the controller starts again");
    world.restarted(case, samples)?;
    let begun = Instant::now();
    world.fleet.ask::<Value>(&format!("join {LATE}"))?;
    samples.add(case, "join", "ms", ms(begun.elapsed()) / f64::from(LATE));
    let mut agents = Vec::new();
    for number in 1..=size.real {
        agents.push(world.process(&real(number), "mesh-agent", Process::resident_kib)?);
    }
    samples.add(case, "agent_resident", "KiB", median(agents));
    world.mesh.all_run()
}

/// The name of a real agent's node.
fn real(number: u8) -> String {
    format!("real-{number}")
}

impl World {
    /// Everybody is there and has joined a mesh in which there is nothing yet; the cluster is full, and nobody
    /// follows it.
    fn new(bins: &Path, size: Size) -> Result<Self> {
        let manifests = tempfile::tempdir()?;
        let mesh = Mesh::start(bins, manifests.path())?;
        let program = mesh.bin("controlplane-bench");
        for number in 1..=size.real {
            let address = Ipv4Addr::new(203, 0, 113, number);
            mesh.lab().public_node(&real(number), address)?;
            mesh.start_agent(&real(number))?;
        }
        for number in 1..=size.real {
            mesh.agent_ready(&real(number), u64::from(size.real))?;
        }
        // It sees the bpffs of all nodes that were made before it.
        let fleet_node = mesh.lab().public_node("fleet", FLEET)?;
        let token = fleet_node.write("token", &mesh.token_for(size.agents + LATE)?)?;
        let controller = format!("{CLOUD}:7440");
        let token = token.display().to_string();
        let words = [&program, "fleet", &controller, &token];
        let mut fleet = Asked::start(fleet_node.command(&words)?)?;
        eprintln!("  {} nodes join", size.agents);
        fleet.ask::<Value>(&format!("join {}", size.agents))?;
        let folder = mesh.cloud().dir().display().to_string();
        let [services, endpoints, nodes] =
            [size.services, size.endpoints, size.nodes].map(|number| number.to_string());
        let words = [&program, "cluster", &folder, &services, &endpoints, &nodes];
        let mut cluster = Asked::start(mesh.cloud().command(&words)?)?;
        let full: u32 = cluster.ask("full")?;
        ensure!(full >= size.services, "{full} of {services} services");
        Ok(Self {
            cluster,
            fleet,
            fleet_node,
            mesh,
            size,
        })
    }

    /// Ends the controller and starts one that follows the cluster: how long until that one is ready.
    fn restart(&mut self) -> Result<Duration> {
        let mut before = self
            .mesh
            .take(self.mesh.cloud().name(), "mesh-controller")?;
        before.terminate(UP_LIMIT)?;
        let folder = self.mesh.cloud().dir();
        let kubeconfig = folder.join("kubeconfig");
        let lines = format!("[kubernetes]\nkubeconfig = {kubeconfig:?}\n");
        let socket = folder.join("controller.sock").display().to_string();
        let begun = Instant::now();
        self.mesh.start_controller_with(&lines)?;
        self.cluster
            .ask::<Vec<String>>(&format!("ready {socket}"))?;
        Ok(begun.elapsed())
    }

    /// Until the controller has written into the cluster whatever it has to say of its nodes.
    fn settle(&mut self) -> Result<()> {
        let nodes = self.size.agents + u32::from(self.size.real);
        let made: u32 = self.cluster.ask(&format!("settled {nodes}"))?;
        ensure!(made == nodes, "{made} MeshNodes of {nodes} nodes");
        Ok(())
    }

    fn changes(&mut self, case: &str, idle: f64, samples: &mut Samples) -> Result<()> {
        let (mut agents, mut maps, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
        let (wire, cpu) = (self.wire_bytes()?, self.controller(Process::cpu_time)?);
        let begun = Instant::now();
        for number in 0..self.size.changes {
            // 97 is prime to all numbers of services: none comes again before all have come.
            let service = number * 97 % self.size.services;
            let endpoint = number % self.size.endpoints;
            let [_, _, high, low] = number.to_be_bytes();
            let address = Ipv4Addr::new(10, 64, high, low);
            let expect = format!("expect {service} {address}");
            self.fleet.ask::<Value>(&expect)?;
            let change = format!("change {service} {endpoint} {address}");
            let asked_ns: u64 = self.cluster.ask(&change)?;
            let seen: Seen = self.fleet.ask("seen").context(change)?;
            let since = |at: &u64| Duration::from_nanos(at.saturating_sub(asked_ns));
            agents.extend(seen.agents_ns.iter().map(since));
            maps.extend(seen.maps_ns.iter().map(since));
            bytes.extend(seen.bytes);
            thread::sleep(PAUSE + PAUSE * (number * 37 % 100) / 100);
        }
        let expected = self.size.changes as usize * self.size.agents as usize;
        ensure!(agents.len() == expected, "{} of {expected}", agents.len());
        let changes = f64::from(self.size.changes);
        let idle = begun.elapsed().mul_f64(idle);
        let cpu = (self.controller(Process::cpu_time)? - cpu).saturating_sub(idle);
        let wire = (self.wire_bytes()? - wire) as f64 / changes / f64::from(self.size.agents);
        let names = ["change_p50", "change_p99", "change_max"];
        tell(samples, case, names, &mut agents);
        tell(samples, case, ["map_p50", "map_p99", "map_max"], &mut maps);
        samples.add(case, "change_message", "bytes", median(bytes));
        samples.add(case, "change_wire", "bytes", wire);
        samples.add(case, "change_cpu", "ms", ms(cpu) / changes);
        Ok(())
    }

    fn restarted(&mut self, case: &str, samples: &mut Samples) -> Result<()> {
        let wire = self.wire_bytes()?;
        let begun_ns: u64 = self.fleet.ask("forget")?;
        self.restart()?;
        let returned: Firsts = self.fleet.ask(&format!("returned {begun_ns}"))?;
        let wire = (self.wire_bytes()? - wire) as f64 / f64::from(self.size.agents);
        ensure!(
            returned.full == 0,
            "{} agents got everything again",
            returned.full
        );
        samples.add(case, "restarted", "ms", last_ms(&returned.times_ns));
        samples.add(case, "restarted_wire", "bytes", wire);
        Ok(())
    }

    fn controller<T>(&self, ask: fn(&Process) -> Result<T>) -> Result<T> {
        self.process(self.mesh.cloud().name(), "mesh-controller", ask)
    }

    fn process<T>(&self, node: &str, program: &str, ask: fn(&Process) -> Result<T>) -> Result<T> {
        let process = self.mesh.take(node, program)?;
        let answer = ask(&process);
        self.mesh.put(node, program, process);
        answer
    }

    /// What ever went in and out by the fleet's interface.
    fn wire_bytes(&self) -> Result<u64> {
        wire_bytes(&self.fleet_node)
    }
}

fn last_ms(times_ns: &[u64]) -> f64 {
    let last = times_ns.iter().copied().max().unwrap_or_default();
    ms(Duration::from_nanos(last))
}

fn median(mut values: Vec<u64>) -> f64 {
    values.sort_unstable();
    percentile(&values, 0.5).unwrap_or_default() as f64
}
