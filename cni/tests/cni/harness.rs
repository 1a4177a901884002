//! A node in a network namespace, its pods, and a runtime that speaks to plug-ins.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that gets another form of answer ends there"
)]

use std::{
    fs::{self, File},
    io::Write as _,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    process::{self, Child, Command, Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use mesh_api::cni::{
    Attachment, AttachmentId, NETWORK_FILE, NodeNetwork, attachments_dir, read_attachments,
};
use mesh_linux::netns;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Where Debian's `containernetworking-plugins` are.
pub(crate) const STOCK: &str = "/usr/lib/cni";

/// On one machine, without loss: what takes longer does not come.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// The network's name.
pub(crate) const NETWORK: &str = "mesh";

/// A node: a network namespace, and the folder that agent and plug-in share.
pub(crate) struct Machine {
    pub(crate) namespace: File,
    pub(crate) dir: TempDir,
}

/// A pod without a process: a network namespace.
pub(crate) struct Pod {
    pub(crate) namespace: File,
    pub(crate) container: String,
    pub(crate) interface: String,
}

/// What a plug-in said.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) ok: bool,
    pub(crate) out: Value,
    pub(crate) log: String,
}

impl Answer {
    /// The result, or the error as one of the test.
    #[track_caller]
    pub(crate) fn done(self) -> Value {
        assert!(self.ok, "{} {}", self.out, self.log);
        self.out
    }

    /// The error's code, after a look at its form.
    #[track_caller]
    pub(crate) fn code(&self) -> u64 {
        assert!(!self.ok, "it worked: {}", self.out);
        let text = |key: &str| self.out[key].as_str().map(str::len).unwrap_or_default();
        assert!(text("cniVersion") > 0 && text("msg") > 0, "{}", self.out);
        self.out["code"].as_u64().unwrap()
    }

    fn of(output: &Output) -> Result<Self> {
        let text = String::from_utf8_lossy(&output.stdout);
        let out = if text.trim().is_empty() {
            Value::Null
        } else {
            serde_json::from_str(&text).with_context(|| format!("no JSON: {text}"))?
        };
        Ok(Self {
            ok: output.status.success(),
            out,
            log: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }
}

impl Pod {
    pub(crate) fn new(container: &str) -> Result<Self> {
        Ok(Self {
            namespace: netns::make().context("make a network namespace (are you root?)")?,
            container: container.to_owned(),
            interface: "eth0".to_owned(),
        })
    }

    /// A path by which any process finds the namespace while this pod lives.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", process::id(), self.namespace.as_raw_fd())
    }

    pub(crate) fn id(&self) -> AttachmentId {
        AttachmentId {
            network: NETWORK.to_owned(),
            container: self.container.clone(),
            interface: self.interface.clone(),
        }
    }

    /// The node's end of its interface.
    pub(crate) fn port(&self) -> String {
        self.id().key()
    }

    /// One line of `ip` inside.
    pub(crate) fn ip(&self, line: &str) -> Result<String> {
        ip(&self.namespace, line)
    }

    /// Opens a port that answers to connections until it is dropped.
    pub(crate) fn listen(&self, address: IpAddr) -> Result<TcpListener> {
        inside(&self.namespace, || Ok(TcpListener::bind((address, 0))?))
    }

    pub(crate) fn connect(&self, to: SocketAddr) -> Result<TcpStream> {
        connect(&self.namespace, to)
    }

    fn environment(&self, verb: &str) -> Vec<(String, String)> {
        [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", &self.container),
            ("CNI_NETNS", &self.path()),
            ("CNI_IFNAME", &self.interface),
            ("CNI_PATH", STOCK),
            (
                "CNI_ARGS",
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0",
            ),
            // Stock plug-ins call `iptables`.
            ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .to_vec()
    }
}

impl Machine {
    /// A node whose agent wrote that pods are in 10.77.0.0/24 and fd77::/64.
    pub(crate) fn new() -> Result<Self> {
        let machine = Self {
            namespace: netns::make().context("make a network namespace (are you root?)")?,
            dir: tempfile::tempdir()?,
        };
        machine.ip("link set lo up")?;
        // What it sends from.
        machine.ip("address add 192.0.2.10/32 dev lo")?;
        machine.ip("address add 2001:db8::10/128 dev lo")?;
        machine.set_ranges(Some("10.77.0.0/24"), Some("fd77::/64"))?;
        Ok(machine)
    }

    pub(crate) fn set_ranges(&self, ipv4: Option<&str>, ipv6: Option<&str>) -> Result<()> {
        let network = NodeNetwork {
            ipv4: ipv4.map(str::parse).transpose()?,
            ipv6: ipv6.map(str::parse).transpose()?,
            mtu_bytes: 1_380,
            mesh_interface: Some("holdfast0".to_owned()),
            behind: [ipv4, ipv6]
                .into_iter()
                .flatten()
                .map(str::parse)
                .collect::<Result<_, _>>()?,
        };
        self.set_network(&network)
    }

    /// What the agent wrote.
    pub(crate) fn set_network(&self, network: &NodeNetwork) -> Result<()> {
        fs::write(self.state_dir().join(NETWORK_FILE), network.to_json())?;
        Ok(())
    }

    pub(crate) fn state_dir(&self) -> &Path {
        self.dir.path()
    }

    /// The network configuration as a runtime gives it to ours.
    pub(crate) fn config(&self) -> Value {
        json!({
            "cniVersion": "1.1.0",
            "name": NETWORK,
            "type": "mesh-cni",
            "stateDir": self.state_dir(),
        })
    }

    /// The configuration with one more key.
    pub(crate) fn config_with(&self, key: &str, value: Value) -> Value {
        let mut config = self.config();
        config[key] = value;
        config
    }

    /// Executes `program` as a runtime does.
    pub(crate) fn execute(
        &self,
        program: &Path,
        environment: &[(String, String)],
        config: &Value,
    ) -> Result<Answer> {
        Answer::of(
            &self
                .start(program, environment, config)?
                .wait_with_output()?,
        )
    }

    /// Starts `program` as a runtime does.
    pub(crate) fn start(
        &self,
        program: &Path,
        environment: &[(String, String)],
        config: &Value,
    ) -> Result<Child> {
        let mut command = Command::new(program);
        command
            .env_clear()
            .envs(environment.iter().cloned())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = inside(&self.namespace, || Ok(command.spawn()?))?;
        let mut stdin = child.stdin.take().context("no stdin")?;
        // It may refuse before it reads everything.
        stdin.write_all(config.to_string().as_bytes()).ok();
        Ok(child)
    }

    /// Asks ours to do something for a pod.
    pub(crate) fn call(&self, verb: &str, pod: &Pod, config: &Value) -> Result<Answer> {
        self.execute(&plugin(), &pod.environment(verb), config)
    }

    /// Asks ours, and looks away before the answer.
    pub(crate) fn begin(&self, verb: &str, pod: &Pod, config: &Value) -> Result<Child> {
        self.start(&plugin(), &pod.environment(verb), config)
    }

    /// Asks ours with a changed environment.
    pub(crate) fn call_with(
        &self,
        verb: &str,
        pod: &Pod,
        changes: &[(&str, Option<&str>)],
        config: &Value,
    ) -> Result<Answer> {
        let mut environment = pod.environment(verb);
        for (key, value) in changes {
            environment.retain(|(known, _)| known != key);
            environment.extend(value.map(|value| ((*key).to_owned(), value.to_owned())));
        }
        self.execute(&plugin(), &environment, config)
    }

    /// Asks a stock plug-in.
    pub(crate) fn call_stock(
        &self,
        name: &str,
        verb: &str,
        pod: &Pod,
        config: &Value,
    ) -> Result<Answer> {
        let program = Path::new(STOCK).join(name);
        self.execute(&program, &pod.environment(verb), config)
    }

    /// GC, with only these pods left.
    pub(crate) fn gc(&self, valid: &[&Pod]) -> Result<Answer> {
        Answer::of(&self.begin_gc(valid)?.wait_with_output()?)
    }

    /// The same, and looks away before the answer.
    pub(crate) fn begin_gc(&self, valid: &[&Pod]) -> Result<Child> {
        let listed = valid
            .iter()
            .map(|pod| json!({"containerID": pod.container, "ifname": pod.interface}));
        let listed = listed.collect::<Vec<_>>();
        let config = self.config_with("cni.dev/valid-attachments", json!(listed));
        self.start(&plugin(), &verb_alone("GC"), &config)
    }

    pub(crate) fn status(&self) -> Result<Answer> {
        self.execute(&plugin(), &verb_alone("STATUS"), &self.config())
    }

    /// CHECK, with what ADD said.
    pub(crate) fn check(&self, pod: &Pod, result: &Value) -> Result<Answer> {
        self.call(
            "CHECK",
            pod,
            &self.config_with("prevResult", result.clone()),
        )
    }

    /// One line of `ip` on the node.
    pub(crate) fn ip(&self, line: &str) -> Result<String> {
        ip(&self.namespace, line)
    }

    pub(crate) fn connect(&self, to: SocketAddr) -> Result<TcpStream> {
        connect(&self.namespace, to)
    }

    /// The names of the node's ends of pods' interfaces, in order.
    pub(crate) fn ports(&self) -> Result<Vec<String>> {
        let text = self.ip("-j link show")?;
        let links: Vec<Value> = serde_json::from_str(&text)?;
        let names = links.iter().filter_map(|link| link["ifname"].as_str());
        let mut names: Vec<_> = names
            .filter(|name| name.starts_with(mesh_api::cni::INTERFACE_PREFIX))
            .map(str::to_owned)
            .collect();
        names.sort();
        Ok(names)
    }

    /// What the agent reads.
    pub(crate) fn attachments(&self) -> Result<Vec<Attachment>> {
        let found = read_attachments(&attachments_dir(self.state_dir())?)?;
        ensure!(found.unreadable.is_empty(), "{:?}", found.unreadable);
        Ok(found.attachments)
    }

    /// The file of a pod's attachment.
    pub(crate) fn record(&self, pod: &Pod) -> Result<PathBuf> {
        let folder = attachments_dir(self.state_dir())?;
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(&pod.port()) {
                return Ok(path);
            }
        }
        bail!("no record of {} in {}", pod.container, folder.display())
    }

    /// Every pod answers at each of its addresses, to the node.
    pub(crate) fn reaches(&self, pod: &Pod, result: &Value) -> Result<()> {
        for address in addresses(result) {
            let door = pod.listen(address)?;
            self.connect(door.local_addr()?)
                .with_context(|| format!("the node cannot reach {address}"))?;
        }
        Ok(())
    }
}

/// The environment of verbs that are for no pod.
pub(crate) fn verb_alone(verb: &str) -> Vec<(String, String)> {
    vec![("CNI_COMMAND".to_owned(), verb.to_owned())]
}

/// The addresses of a result, without their prefixes.
#[track_caller]
pub(crate) fn addresses(result: &Value) -> Vec<IpAddr> {
    let ips = result["ips"].as_array().unwrap();
    let addresses = ips.iter().map(|ip| {
        let text = ip["address"].as_str().unwrap();
        text.split('/').next().unwrap().parse().unwrap()
    });
    addresses.collect()
}

/// Ours.
pub(crate) fn plugin() -> PathBuf {
    env!("CARGO_BIN_EXE_mesh-cni").into()
}

/// Runs a program to its end, and returns what it said.
pub(crate) fn run(program: &str, words: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(words)
        .stdin(Stdio::null())
        .output();
    let output = output.with_context(|| format!("start {program} (is it installed?)"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    let line = words.join(" ");
    ensure!(
        output.status.success(),
        "{program} {line}: {}",
        errors.trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs something on a thread in a namespace.
pub(crate) fn inside<T: Send>(
    namespace: &File,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    netns::run_inside(namespace, work).map_err(|error| anyhow!(error))?
}

fn ip(namespace: &File, line: &str) -> Result<String> {
    let words: Vec<_> = line.split_whitespace().collect();
    inside(namespace, || run("ip", &words))
}

fn connect(namespace: &File, to: SocketAddr) -> Result<TcpStream> {
    inside(namespace, || {
        Ok(TcpStream::connect_timeout(&to, ANSWER_LIMIT)?)
    })
}
