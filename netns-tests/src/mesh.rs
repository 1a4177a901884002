//! Holdfast itself in a lab: controller, relay and agents as real processes.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{
    lab::Lab,
    link::Impairment,
    nat::NatKind,
    node::{Node, Output, Process},
    site::{Internet, Site},
    tool,
    traffic::Hello,
};

/// The cloud node's public address.
pub const CLOUD: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);

/// Its IPv6 address, in labs that have IPv6.
pub const CLOUD_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 10, 0, 0, 0, 1);

/// Where agents answer names.
pub const RESOLVER: &str = "nameserver 169.254.53.53\noptions timeout:1 attempts:3\n";

/// A daemon that is not ready by then is broken: on an idle machine it takes 0.2 s.
pub const READY_LIMIT: Duration = Duration::from_secs(20);

/// A command line that takes longer hangs.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(10);

/// Controller, relay and agents in one lab.
#[derive(Debug)]
pub struct Mesh {
    // Fields drop in this order: processes before the lab that they run in.
    processes: Mutex<BTreeMap<(String, String), Process>>,
    provoked: Mutex<Vec<String>>,
    sites: BTreeMap<String, Site>,
    cloud: Node,
    bins: PathBuf,
    /// The cloud has both families.
    dual: bool,
    lab: Lab,
}

impl Mesh {
    /// A cloud node with a running controller that reads a copy of `manifests`.
    ///
    /// # Errors
    ///
    /// If the binaries are not in `bins`, or the controller does not come up.
    pub fn start(bins: &Path, manifests: &Path) -> Result<Self> {
        Self::start_with(bins, manifests, false)
    }

    /// The same, with IPv6 beside IPv4 at the cloud.
    ///
    /// # Errors
    ///
    /// If the binaries are not in `bins`, or the controller does not come up.
    pub fn start_dual(bins: &Path, manifests: &Path) -> Result<Self> {
        Self::start_with(bins, manifests, true)
    }

    fn start_with(bins: &Path, manifests: &Path, dual: bool) -> Result<Self> {
        for name in ["mesh-controller", "mesh-relay", "mesh-agent", "meshctl"] {
            let path = bins.join(name);
            ensure!(
                path.is_file(),
                "{} is not there: `cargo build --workspace`",
                path.display()
            );
        }
        let lab = Lab::new()?;
        let cloud = lab.public_node("cloud", CLOUD)?;
        if dual {
            lab.add_ipv6(&cloud, CLOUD_V6)?;
        }
        let folder = cloud.dir().join("manifests");
        fs::create_dir_all(&folder)?;
        for entry in
            fs::read_dir(manifests).with_context(|| format!("read {}", manifests.display()))?
        {
            let entry = entry?;
            fs::copy(entry.path(), folder.join(entry.file_name()))?;
        }
        let mesh = Self {
            processes: Mutex::default(),
            provoked: Mutex::default(),
            sites: BTreeMap::new(),
            cloud,
            bins: bins.to_owned(),
            dual,
            lab,
        };
        mesh.start_controller()?;
        Ok(mesh)
    }

    /// The demo's manifests and `edge-a1`, `edge-b1` behind port-restricted NATs, 10 ms away each:
    /// enough for most scenarios. Agents run and know each other.
    ///
    /// # Errors
    ///
    /// If something does not come up.
    pub fn two_sites() -> Result<Self> {
        Self::two_sites_of(&["edge-a1"], &["edge-b1"])
    }

    /// Controller and relay with the demo's manifests, and no node yet.
    ///
    /// # Errors
    ///
    /// If they do not come up.
    pub fn demo() -> Result<Self> {
        let mesh = Self::demo_of(false)?;
        mesh.start_relay()?;
        Ok(mesh)
    }

    /// The same, with IPv6 beside IPv4 at the cloud and its relay.
    ///
    /// # Errors
    ///
    /// If they do not come up.
    pub fn dual_demo() -> Result<Self> {
        let mesh = Self::demo_of(true)?;
        let file = mesh.manifests().join("mesh.yaml");
        let both = format!("[{CLOUD}, \"{CLOUD_V6}\"]");
        let manifest = fs::read_to_string(&file)?.replace(&format!("[{CLOUD}]"), &both);
        ensure!(
            manifest.contains(&both),
            "the demo's relay is not at {CLOUD}"
        );
        fs::write(&file, manifest)?;
        mesh.start_relay()?;
        Ok(mesh)
    }

    fn demo_of(dual: bool) -> Result<Self> {
        let lab = tool::binary("lab")?;
        let bins = lab.parent().context("the lab binary has no folder")?;
        let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/demo");
        Self::start_with(bins, &manifests, dual)
    }

    /// Like [`Self::demo`], with these hosts at one site: agents run on all of them and know each other.
    ///
    /// # Errors
    ///
    /// If something does not come up.
    pub fn one_site_of(hosts: &[&str]) -> Result<Self> {
        let mut mesh = Self::demo()?;
        let link = Impairment::delay_loss(Duration::from_millis(10), 0.0);
        let wan = [203, 0, 113, 1].into();
        mesh.add_site("site-a", NatKind::PortRestricted, wan, link, hosts)?;
        for host in hosts {
            mesh.start_agent(host)?;
        }
        for host in hosts {
            mesh.agent_ready(host, hosts.len() as u64)?;
        }
        Ok(mesh)
    }

    /// Like [`Self::two_sites`], with these hosts at the two: agents run on all of them.
    ///
    /// # Errors
    ///
    /// If something does not come up.
    pub fn two_sites_of(at_a: &[&str], at_b: &[&str]) -> Result<Self> {
        let mut mesh = Self::demo()?;
        let link = Impairment::delay_loss(Duration::from_millis(10), 0.0);
        mesh.add_two_sites(link, at_a, at_b)?;
        let nodes = || at_a.iter().chain(at_b);
        nodes().try_for_each(|node| mesh.start_agent(node))?;
        let all = u64::try_from(nodes().count())?;
        nodes().try_for_each(|node| mesh.agent_ready(node, all))?;
        Ok(mesh)
    }

    /// Adds `site-a` and `site-b`, behind port-restricted NATs; nothing runs there yet.
    ///
    /// # Errors
    ///
    /// If a name is taken.
    pub fn add_two_sites(&mut self, link: Impairment, at_a: &[&str], at_b: &[&str]) -> Result<()> {
        let wan = |last| [203, 0, 113, last].into();
        for (name, last, hosts) in [("site-a", 1, at_a), ("site-b", 2, at_b)] {
            self.add_site(name, NatKind::PortRestricted, wan(last), link, hosts)?;
        }
        Ok(())
    }

    /// The lab around it.
    #[must_use]
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The node of the controller and the relay.
    #[must_use]
    pub fn cloud(&self) -> &Node {
        &self.cloud
    }

    /// The manifests that the controller watches.
    #[must_use]
    pub fn manifests(&self) -> PathBuf {
        self.cloud.dir().join("manifests")
    }

    /// Adds a site with hosts; nothing runs on them yet.
    ///
    /// # Errors
    ///
    /// If a name is taken.
    pub fn add_site(
        &mut self,
        name: &str,
        kind: NatKind,
        wan: Ipv4Addr,
        impairment: Impairment,
        hosts: &[&str],
    ) -> Result<()> {
        self.add_site_with(name, Internet::ipv4(kind, wan), impairment, hosts)
    }

    /// The same, of either family or both.
    ///
    /// # Errors
    ///
    /// If a name is taken.
    pub fn add_site_with(
        &mut self,
        name: &str,
        internet: Internet,
        impairment: Impairment,
        hosts: &[&str],
    ) -> Result<()> {
        let site = self.lab.site_with(name, internet, impairment)?;
        for host in hosts {
            site.host(&self.lab, host)?;
        }
        self.sites.insert(name.to_owned(), site);
        Ok(())
    }

    /// A site.
    ///
    /// # Errors
    ///
    /// If there is none of this name.
    pub fn site(&self, name: &str) -> Result<&Site> {
        self.sites
            .get(name)
            .with_context(|| format!("no site {name}"))
    }

    /// Every site.
    pub fn sites(&self) -> impl Iterator<Item = &Site> {
        self.sites.values()
    }

    /// A node.
    ///
    /// # Errors
    ///
    /// If there is none of this name.
    pub fn node(&self, name: &str) -> Result<Node> {
        self.lab.node(name)
    }

    /// Starts the controller, again if it ran before, and waits until it answers.
    ///
    /// # Errors
    ///
    /// If it does not come up; the error ends with its log.
    pub fn start_controller(&self) -> Result<()> {
        self.start_controller_with("")
    }

    /// Like [`Self::start_controller`], with more lines of configuration.
    ///
    /// # Errors
    ///
    /// If it does not come up; the error ends with its log.
    pub fn start_controller_with(&self, lines: &str) -> Result<()> {
        let dir = self.cloud.dir();
        let any = if self.dual { "[::]" } else { "0.0.0.0" };
        let config = format!(
            "mesh_name = \"demo.holdfast\"\nlisten = \"{any}:7440\"\nstate_dir = \"{0}/state-controller\"\n\
             manifests = \"{0}/manifests\"\nadmin_socket = \"{0}/controller.sock\"\n{lines}",
            dir.display()
        );
        self.daemon(&self.cloud, "mesh-controller", "controller", &config)?;
        self.until_up(&self.cloud, "mesh-controller", || {
            self.controller(&["token", "list"])
        })
    }

    /// Issues the relay's certificate and starts it beside the controller.
    ///
    /// # Errors
    ///
    /// If it does not come up.
    pub fn start_relay(&self) -> Result<()> {
        self.start_relay_with("")
    }

    /// Like [`Self::start_relay`], with more lines of configuration.
    ///
    /// # Errors
    ///
    /// If it does not come up.
    pub fn start_relay_with(&self, lines: &str) -> Result<()> {
        self.start_relay_on(&self.cloud, "cloud-relay", lines)
    }

    /// A relay of this name on any node, again if it ran before, with more lines of configuration.
    ///
    /// # Errors
    ///
    /// If it does not come up.
    pub fn start_relay_on(&self, node: &Node, name: &str, lines: &str) -> Result<()> {
        let out = node.dir().join("relay");
        if !out.exists() {
            let path = out.display().to_string();
            self.controller(&["relay", "issue", name, "--out", &path])?;
        }
        let config = format!(
            "name = \"{name}\"\ncertificate = \"relay/relay.pem\"\nkey = \"relay/relay.key\"\n\
             ca = \"relay/ca.pem\"\n{lines}"
        );
        self.daemon(node, "mesh-relay", "relay", &config)
    }

    /// A fresh join token.
    ///
    /// # Errors
    ///
    /// If the controller does not answer.
    pub fn token(&self) -> Result<String> {
        self.token_for(1)
    }

    /// A fresh token by which so many nodes may join.
    ///
    /// # Errors
    ///
    /// If the controller does not answer.
    pub fn token_for(&self, nodes: u32) -> Result<String> {
        let nodes = nodes.to_string();
        let said = self.controller(&["token", "create", "--uses", &nodes, "--json"])?;
        let value: Value = serde_json::from_str(&said).with_context(|| format!("JSON: {said}"))?;
        let token = value
            .get("token")
            .and_then(Value::as_str)
            .context("no token in the answer")?;
        Ok(token.to_owned())
    }

    /// What every agent of a lab is configured with.
    #[must_use]
    pub fn agent_config(&self, node: &Node, token: Option<&str>) -> String {
        let dir = node.dir().display();
        let token = token
            .map(|token| format!("token = \"{token}\"\n"))
            .unwrap_or_default();
        let controllers = if self.dual {
            format!("[\"{CLOUD}:7440\", \"[{CLOUD_V6}]:7440\"]")
        } else {
            format!("\"{CLOUD}:7440\"")
        };
        format!(
            "node_name = \"{}\"\ncontroller = {controllers}\n{token}state_dir = \"{dir}/state\"\n\
             admin_socket = \"{dir}/agent.sock\"\ncgroup = \"{}\"\n",
            node.name(),
            node.cgroup().display(),
        )
    }

    /// Starts an agent; on the first start it joins with a fresh token.
    ///
    /// # Errors
    ///
    /// If it ends at once.
    pub fn start_agent(&self, name: &str) -> Result<()> {
        self.start_agent_with(name, "")
    }

    /// Like [`Self::start_agent`], with more lines of configuration.
    ///
    /// # Errors
    ///
    /// If it ends at once.
    pub fn start_agent_with(&self, name: &str, lines: &str) -> Result<()> {
        let node = self.node(name)?;
        node.set_resolver(RESOLVER)?;
        let known = node.dir().join("agent.toml").exists();
        let token = if known { None } else { Some(self.token()?) };
        let config = self.agent_config(&node, token.as_deref());
        self.daemon(&node, "mesh-agent", "agent", &format!("{config}{lines}"))
    }

    /// Waits until an agent has a snapshot with all of `nodes` nodes and serves it.
    ///
    /// # Errors
    ///
    /// If it does not get there; the error ends with its log.
    pub fn agent_ready(&self, name: &str, nodes: u64) -> Result<()> {
        let node = self.node(name)?;
        self.until_up(&node, "mesh-agent", || {
            let status = self.status(name)?;
            let known = status
                .pointer("/snapshot/nodes")
                .and_then(Value::as_u64)
                .unwrap_or(0);
            ensure!(
                known >= nodes,
                "{name} knows {known} of {nodes} nodes: {status}"
            );
            Ok(String::new())
        })
    }

    /// What `meshctl status --json` says on a node.
    ///
    /// # Errors
    ///
    /// If the agent does not answer.
    pub fn status(&self, name: &str) -> Result<Value> {
        self.ask(name, &["status"])
    }

    /// What `meshctl … --json` says on a node.
    ///
    /// # Errors
    ///
    /// If the agent does not answer, or not in JSON.
    pub fn ask(&self, name: &str, words: &[&str]) -> Result<Value> {
        let output = self.meshctl(name, &[words, &["--json"]].concat())?;
        // Exit codes 1 and 2 are news about the mesh, and come with their JSON.
        let first = output.stdout.lines().next().unwrap_or_default();
        serde_json::from_str(&output.stdout)
            .or_else(|_| serde_json::from_str(first))
            .with_context(|| {
                format!(
                    "meshctl {} on {name}: {}{}",
                    words.join(" "),
                    output.stdout,
                    output.stderr
                )
            })
    }

    /// Runs `meshctl` against a node's agent.
    ///
    /// # Errors
    ///
    /// If it hangs.
    pub fn meshctl(&self, name: &str, words: &[&str]) -> Result<Output> {
        let node = self.node(name)?;
        let socket = node.dir().join("agent.sock");
        node.run_with(
            self.meshctl_command(&node, "--socket", &socket, words)?,
            COMMAND_LIMIT,
        )
    }

    /// What the controller says of the nodes.
    ///
    /// # Errors
    ///
    /// If it does not answer.
    pub fn known_nodes(&self) -> Result<Value> {
        Ok(serde_json::from_str(
            &self.controller(&["--json", "nodes"])?,
        )?)
    }

    fn controller(&self, words: &[&str]) -> Result<String> {
        let socket = self.cloud.dir().join("controller.sock");
        let command = self.meshctl_command(&self.cloud, "--controller-socket", &socket, words)?;
        self.cloud.run_with(command, COMMAND_LIMIT)?.ok()
    }

    fn meshctl_command(
        &self,
        node: &Node,
        which: &str,
        socket: &Path,
        words: &[&str],
    ) -> Result<Command> {
        let program = self.bins.join("meshctl").display().to_string();
        let socket = socket.display().to_string();
        node.command(&[&[program.as_str(), which, &socket], words].concat())
    }

    /// Starts a daemon with a configuration file of its own.
    ///
    /// # Errors
    ///
    /// If it cannot be started.
    pub fn daemon(&self, node: &Node, program: &str, name: &str, config: &str) -> Result<()> {
        let path = node.write(&format!("{name}.toml"), config)?;
        let words = [
            self.bin(program),
            "--config".to_owned(),
            path.display().to_string(),
        ];
        let process = node.spawn(program, &words)?;
        self.lock()
            .insert((node.name().to_owned(), program.to_owned()), process);
        Ok(())
    }

    /// The path of one of the binaries.
    #[must_use]
    pub fn bin(&self, program: &str) -> String {
        self.bins.join(program).display().to_string()
    }

    /// Starts one of the lab's servers, and waits until it listens.
    ///
    /// # Errors
    ///
    /// If it does not come up.
    pub fn serve(&self, name: &str, log: &str, words: &[&str]) -> Result<()> {
        let node = self.node(name)?;
        let lab = tool::binary("lab")?.display().to_string();
        let process = node.spawn(log, &[&[lab.as_str()], words].concat())?;
        self.lock()
            .insert((name.to_owned(), log.to_owned()), process);
        self.until_up(&node, log, || {
            let log = fs::read_to_string(node.dir().join(format!("{log}.log")))?;
            ensure!(log.contains("listening"), "{log}");
            Ok(String::new())
        })
    }

    /// Takes a running process out of the mesh's care.
    ///
    /// # Errors
    ///
    /// If none of this name runs on this node.
    pub fn take(&self, node: &str, program: &str) -> Result<Process> {
        let taken = self.lock().remove(&(node.to_owned(), program.to_owned()));
        taken.with_context(|| format!("{program} does not run on {node}"))
    }

    /// Gives a process back into the mesh's care.
    pub fn put(&self, node: &str, program: &str, process: Process) {
        self.lock()
            .insert((node.to_owned(), program.to_owned()), process);
    }

    /// Kills a process as a power cut would.
    ///
    /// # Errors
    ///
    /// If none of this name runs on this node.
    pub fn kill(&self, node: &str, program: &str) -> Result<()> {
        self.take(node, program)?.kill()
    }

    /// Fails if a process ended by itself.
    ///
    /// # Errors
    ///
    /// With the log of the first that did.
    pub fn all_run(&self) -> Result<()> {
        self.lock().values_mut().try_for_each(Process::running)
    }

    /// Leaves everything up when the owner ends.
    ///
    /// # Errors
    ///
    /// If the guardian or a link is gone.
    pub fn keep(self) -> Result<String> {
        for site in self.sites.values() {
            site.link().keep()?;
        }
        let processes = std::mem::take(&mut *self.lock());
        processes.into_values().for_each(Process::keep);
        self.lab.keep()
    }

    /// What an HTTP server of the lab answers, asked by `curl` on a node.
    ///
    /// # Errors
    ///
    /// If it does not answer within `limit`.
    pub fn get(&self, from: &str, words: &[&str], limit: Duration) -> Result<Hello> {
        let seconds = limit.as_secs_f64().to_string();
        let curl = ["curl", "--silent", "--show-error", "--max-time", &seconds];
        let said = self
            .node(from)?
            .run(&[&curl, words].concat(), limit + Duration::from_secs(2))?;
        let said = said
            .ok()
            .with_context(|| format!("curl {} on {from}", words.join(" ")))?;
        serde_json::from_str(&said).with_context(|| format!("{words:?} said {said}"))
    }

    /// The IPv4 address that a node's own resolver has for a name.
    ///
    /// # Errors
    ///
    /// If it has none, or several, or does not answer within 1 s.
    pub fn resolve(&self, from: &str, name: &str) -> Result<IpAddr> {
        let found = resolve(&self.node(from)?, name)?;
        match *found.as_slice() {
            [only] => Ok(only),
            _ => bail!("{name}: {found:?}"),
        }
    }

    fn until_up(
        &self,
        node: &Node,
        program: &str,
        mut look: impl FnMut() -> Result<String>,
    ) -> Result<()> {
        let key = (node.name().to_owned(), program.to_owned());
        let what = format!("{program} on {} is up", node.name());
        let up = tool::eventually(&what, READY_LIMIT, || {
            let ended = self
                .lock()
                .get_mut(&key)
                .and_then(|process| process.running().err());
            match ended {
                Some(error) => Ok(Err(error)), // It will not come up any more.
                None => look().map(Ok),
            }
        });
        let log = || self.lock().get(&key).map(Process::log).unwrap_or_default();
        up.with_context(|| format!("its log ends:\n{}", crate::node::tail(&log())))?
            .map(drop)
    }

    /// What daemons may complain of.
    pub(crate) fn provoked(&self) -> MutexGuard<'_, Vec<String>> {
        self.provoked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(String, String), Process>> {
        self.processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The IPv4 addresses that the agent of a node, or of a pod's node, has for a name.
///
/// # Errors
///
/// If it does not answer within 1 s.
pub fn resolve(asking: &Node, name: &str) -> Result<Vec<IpAddr>> {
    let words = [
        "dig",
        "+short",
        "+tries=1",
        "+time=1",
        "@169.254.53.53",
        name,
        "A",
    ];
    let said = asking.run(&words, COMMAND_LIMIT)?.ok()?;
    let found = said.lines().map(str::parse).collect::<Result<_, _>>();
    found.with_context(|| format!("{name}: {said}"))
}

/// The text at `key` of what a command said in JSON; empty if there is none.
#[must_use]
pub fn word(value: &Value, key: &str) -> String {
    value
        .get(key)
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned()
}
