//! A node's pods, connected at once by the processes that a container runtime would start.

use std::{
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use netns_tests::{lab::Lab, node::Node};
use serde_json::{Value, json};

use super::{cases::Plugin, ms, tell};
use crate::bench::{Samples, percentile};

/// As the number that the project promises has it.
const AT_ONCE: usize = 50;

/// A round goes through all plug-ins so often: 500 ADDs of each, of which the 99th percentile is the fifth longest.
const TURNS: usize = 10;

/// Where Debian's `containernetworking-plugins` are.
const STOCK: &str = "/usr/lib/cni";

/// A node and pods that nobody connected yet.
struct World {
    // The lab goes last: it takes them away.
    node: Node,
    pods: Vec<Node>,
    _lab: Lab,
}

/// One of the plug-ins, and what it took.
struct Running {
    name: &'static str,
    program: String,
    config: Value,
    adds: Vec<Duration>,
    dels: Vec<Duration>,
    all: Vec<Duration>,
}

/// Measures them in turns.
///
/// # Errors
///
/// If the namespaces cannot be made. What a plug-in refuses is in the samples.
pub(super) fn measure(
    bins: &Path,
    plugins: &[(&'static str, Plugin)],
    rounds: u32,
    samples: &mut Samples,
) -> Result<()> {
    let world = World::new()?;
    let mut running = plugins
        .iter()
        .map(|(name, plugin)| world.plugin(bins, name, *plugin))
        .collect::<Result<Vec<_>>>()?;
    for round in 0..=rounds {
        // The first one counts for nothing: programs are read from the disk.
        let turns = if round == 0 { 1 } else { TURNS };
        for turn in 0..turns {
            let first = turn % running.len().max(1);
            running.rotate_left(first);
            running.retain_mut(|one| match world.turn(one) {
                Ok(()) => true,
                Err(error) => {
                    samples.error(one.name, &error);
                    false
                }
            });
        }
        for one in &mut running {
            if round > 0 {
                one.tell(samples);
            }
            one.forget();
        }
    }
    Ok(())
}

impl Running {
    fn tell(&mut self, samples: &mut Samples) {
        tell(
            samples,
            self.name,
            ["add_p50", "add_p99", "add_max"],
            &mut self.adds,
        );
        self.all.sort_unstable();
        if let Some(all) = percentile(&self.all, 0.5) {
            samples.add(self.name, "all", "ms", ms(all));
        }
        tell(
            samples,
            self.name,
            ["del_p50", "del_p99", "del_max"],
            &mut self.dels,
        );
    }

    fn forget(&mut self) {
        self.adds.clear();
        self.dels.clear();
        self.all.clear();
    }
}

impl World {
    fn new() -> Result<Self> {
        let lab = Lab::new()?;
        let node = lab.add_node("node")?;
        node.sysctl("net/ipv4/ip_forward", "1")?;
        node.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        let pods = (0..AT_ONCE).map(|number| lab.add_node(&format!("pod-{number}")));
        Ok(Self {
            pods: pods.collect::<Result<_>>()?,
            node,
            _lab: lab,
        })
    }

    fn plugin(&self, bins: &Path, name: &'static str, plugin: Plugin) -> Result<Running> {
        let folder = self.node.dir().join(name);
        fs::create_dir(&folder).with_context(|| format!("make {}", folder.display()))?;
        let (program, config) = match plugin {
            Plugin::Mesh | Plugin::MeshIpv4 => {
                let mut network = json!({"ipv4": "10.77.0.0/24", "mtuBytes": 1380});
                if let (Plugin::Mesh, Some(network)) = (plugin, network.as_object_mut()) {
                    network.insert("ipv6".to_owned(), json!("fd77::/64"));
                }
                fs::write(folder.join("network.json"), network.to_string())?;
                let config = json!({
                    "cniVersion": "1.0.0", "name": name, "type": "mesh-cni", "stateDir": folder,
                });
                (bins.join("mesh-cni"), config)
            }
            Plugin::Bridge => {
                let config = json!({
                    "cniVersion": "1.0.0", "name": name, "type": "bridge", "bridge": "cni0", "isGateway": true,
                    "ipam": {
                        "type": "host-local", "dataDir": folder,
                        "ranges": [[{"subnet": "10.78.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}],
                    },
                });
                (Path::new(STOCK).join("bridge"), config)
            }
        };
        ensure!(program.is_file(), "{} is not there", program.display());
        Ok(Running {
            name,
            program: program.display().to_string(),
            config,
            adds: Vec::new(),
            dels: Vec::new(),
            all: Vec::new(),
        })
    }

    /// Connects all pods at once, and disconnects them.
    fn turn(&self, one: &mut Running) -> Result<()> {
        let begun = Instant::now();
        one.adds.extend(self.at_once(one, "ADD")?);
        one.all.push(begun.elapsed());
        one.dels.extend(self.at_once(one, "DEL")?);
        Ok(())
    }

    fn at_once(&self, one: &Running, verb: &str) -> Result<Vec<Duration>> {
        let start = Barrier::new(self.pods.len());
        self.node.enter(|| {
            thread::scope(|scope| {
                let calls = self.pods.iter().map(|pod| {
                    let start = &start;
                    scope.spawn(move || {
                        start.wait();
                        call(one, verb, pod)
                    })
                });
                let calls: Vec<_> = calls.collect();
                let ended = calls.into_iter().map(|call| {
                    let ended = call.join();
                    ended.map_err(|_panic| anyhow!("a runtime's thread panicked"))?
                });
                ended.collect::<Result<Vec<_>>>()
            })
        })?
    }
}

/// Executes a plug-in as a container runtime does: how long until it has ended.
fn call(one: &Running, verb: &str, pod: &Node) -> Result<Duration> {
    let begun = Instant::now();
    let mut command = Command::new(&one.program);
    command
        .env_clear()
        .env("CNI_COMMAND", verb)
        .env("CNI_CONTAINERID", pod.name())
        .env("CNI_NETNS", Path::new("/run/netns").join(pod.netns()))
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", STOCK)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .with_context(|| format!("start {}", one.program))?;
    let mut stdin = child.stdin.take().context("no standard input")?;
    stdin.write_all(one.config.to_string().as_bytes())?;
    drop(stdin);
    let output = child.wait_with_output()?;
    let took = begun.elapsed();
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    ensure!(
        output.status.success(),
        "{verb} {}: {} {}",
        pod.name(),
        said(&output.stdout),
        said(&output.stderr)
    );
    Ok(took)
}
