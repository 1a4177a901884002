//! The lab's two sites with a kubelet behind one of the NATs, an agent with a proxy on the cloud's node, and beside it a
//! machine with the API server, which knows nothing of the mesh.

use std::{
    fs,
    io::Write as _,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use integration::{
    apiserver::{Issued, Options, Standin},
    kubelet::{self, Kubelet},
};
use netns_tests::{
    mesh::{CLOUD, Mesh},
    node::{Node, Output, Process},
    tool,
};
use serde_json::{Value, json};
use tokio::{runtime, sync::oneshot};

/// No command, and nothing that is waited for, takes longer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The node with the kubelet.
pub(crate) const EDGE: &str = "edge-a1";

/// Its overlay address.
pub(crate) const OVERLAY: &str = "100.96.1.1";

/// The node with the proxy.
pub(crate) const GATEWAY: &str = "cloud";

/// Where the proxy takes TLS.
pub(crate) const PROXY_PORT: u16 = 8_131;

/// How long the proxy waits for what was sent to be answered: short, as a test has no minute.
pub(crate) const UNANSWERED: Duration = Duration::from_secs(4);

/// Something that serves inside a node's network, on a thread with a runtime of its own, until it is dropped.
struct Inside {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Inside {
    /// Starts what `start` makes, and gives what of it is for others.
    fn start<T: Send + 'static, K: 'static>(
        node: &Node,
        start: impl AsyncFnOnce() -> Result<(T, K)> + Send + 'static,
    ) -> Result<(Self, T)> {
        let (stop, stopped) = oneshot::channel::<()>();
        let (ready, started) = mpsc::channel();
        let node = node.clone();
        let serve = move || {
            let runtime = runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async {
                match start().await {
                    Ok((shared, _kept)) => {
                        ready.send(Ok(shared)).ok();
                        stopped.await.ok();
                    }
                    Err(error) => {
                        ready.send(Err(error)).ok();
                    }
                }
            });
            anyhow::Ok(())
        };
        let thread = thread::spawn(move || {
            node.enter(serve).unwrap().unwrap();
        });
        let shared = started.recv().context("it ended at once")??;
        let inside = Self {
            stop: Some(stop),
            thread: Some(thread),
        };
        Ok((inside, shared))
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// How the API server reaches the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    /// By the proxy's socket.
    Uds,
    /// By the proxy, with mutual TLS.
    Tls,
    /// Not by the proxy: it is a node of the mesh itself.
    Routed,
}

pub(crate) struct World {
    // In this order: who uses the lab before the lab.
    _kubelet: Inside,
    _apiserver: Inside,
    pub(crate) standin: Arc<Standin>,
    pub(crate) api: Node,
    pub(crate) mesh: Mesh,
}

impl World {
    pub(crate) fn new(transport: Transport) -> Result<Self> {
        let mesh = Mesh::two_sites()?;
        let api = match transport {
            Transport::Routed => mesh.cloud().clone(),
            Transport::Uds | Transport::Tls => {
                mesh.lab().public_node("api", [198, 51, 100, 20].into())?
            }
        };
        // The stand-in comes first: its authority is everybody's.
        let selector = selector(&mesh, transport);
        let (_apiserver, standin) = {
            let folder = mesh.cloud().dir().to_owned();
            Inside::start(&api, async move || {
                // The files that the selector names have to be there, and come from an authority that the server
                // makes: so, from one that came before it.
                let authority = Standin::start(Options::default()).await?;
                issue(&authority, &folder)?;
                let options = Options {
                    egress_selector: selector,
                    ..Options::default()
                };
                let standin = Arc::new(Standin::start(options).await?);
                Ok((Arc::clone(&standin), (standin, authority)))
            })?
        };
        let edge = mesh.node(EDGE)?;
        fs::create_dir_all(edge.dir().join("logs"))?;
        let options = kubelet::Options {
            listen: SocketAddr::from(([0, 0, 0, 0], 10_250)),
            certificate: standin.issue_serving("system:node:edge-a1", &[EDGE, OVERLAY])?,
            client_ca_pem: standin.ca_pem().to_owned(),
            logs: edge.dir().join("logs"),
        };
        let (_kubelet, ()) = Inside::start(&edge, async move || {
            let kubelet = Kubelet::start(options).await?;
            Ok(((), kubelet))
        })?;
        let world = Self {
            _kubelet,
            _apiserver,
            standin,
            api,
            mesh,
        };
        world.start_gateway(&rules("cn:kube-apiserver"))?;
        world.mesh.agent_ready(GATEWAY, 3)?;
        world.mesh.agent_ready(EDGE, 3)?;
        world.populate(transport)?;
        Ok(world)
    }

    /// Starts the agent of the gateway, with these rules.
    pub(crate) fn start_gateway(&self, rules: &str) -> Result<()> {
        let path = |name: &str| self.file(name).display().to_string();
        let lines = format!(
            "[proxy]\nsocket = {:?}\nlisten = [\"{CLOUD}:{PROXY_PORT}\"]\ncertificate = {:?}\nkey = {:?}\n\
             client_ca = {:?}\naudit_log = {:?}\nconnect_timeout_s = 3\nunanswered_timeout_s = {}\n{rules}",
            path("proxy.sock"),
            path("proxy.crt"),
            path("proxy.key"),
            path("clients.crt"),
            path("audit.jsonl"),
            UNANSWERED.as_secs(),
        );
        self.mesh.start_agent_with(GATEWAY, &lines)?;
        tool::eventually("the proxy serves", PATIENCE, || {
            ensure!(self.file("proxy.sock").exists());
            Ok(())
        })
    }

    /// A node and a pod, as the API server knows them: the node's address is its own at home, or, for who can use it, the
    /// mesh's (`kubelet --node-ip`).
    fn populate(&self, transport: Transport) -> Result<()> {
        let addresses = match transport {
            Transport::Routed => json!([{"type": "InternalIP", "address": OVERLAY}]),
            Transport::Uds | Transport::Tls => json!([
                {"type": "InternalIP", "address": "192.168.1.11"},
                {"type": "Hostname", "address": EDGE},
            ]),
        };
        self.standin.insert(&json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": EDGE},
            "status": {
                "addresses": addresses,
                "daemonEndpoints": {"kubeletEndpoint": {"Port": 10_250}},
            },
        }))?;
        self.standin.insert(&json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": "shop"},
            "spec": {
                "nodeName": EDGE,
                "containers": [{"name": "app", "image": "web", "ports": [{"containerPort": 7_000}]}],
            },
            "status": {"phase": "Running"},
        }))?;
        fs::write(self.api.dir().join("kubeconfig"), self.standin.kubeconfig())?;
        self.log("first\nsecond\n")
    }

    /// Appends to the pod's log.
    pub(crate) fn log(&self, text: &str) -> Result<()> {
        let path = self.mesh.node(EDGE)?.dir().join("logs/shop_web_app.log");
        let mut file = fs::File::options().create(true).append(true).open(path)?;
        Ok(file.write_all(text.as_bytes())?)
    }

    /// A file of the gateway's.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.mesh.cloud().dir().join(name)
    }

    fn words(&self, words: &[&str]) -> Vec<String> {
        let kubeconfig = self.api.dir().join("kubeconfig").display().to_string();
        let all = [
            "kubectl",
            "--kubeconfig",
            &kubeconfig,
            "--namespace",
            "shop",
        ];
        all.iter()
            .chain(words)
            .map(|&word| word.to_owned())
            .collect()
    }

    /// Runs `kubectl` to its end, on the API server's machine.
    pub(crate) fn kubectl(&self, words: &[&str]) -> Result<Output> {
        self.api.run(&self.words(words), PATIENCE)
    }

    /// Starts `kubectl`, with its output in a log of this name.
    pub(crate) fn spawn_kubectl(&self, log: &str, words: &[&str]) -> Result<Process> {
        self.api.spawn(log, &self.words(words))
    }

    /// Runs `curl` through the proxy, with a certificate of `proxy_user`.
    pub(crate) fn curl(&self, proxy_user: &str, words: &[&str]) -> Result<Output> {
        let path = |name: &str| self.file(name).display().to_string();
        let proxy = format!("https://{CLOUD}:{PROXY_PORT}");
        let (certificate, key) = (format!("{proxy_user}.crt"), format!("{proxy_user}.key"));
        let limit = (PATIENCE.as_secs() / 2).to_string();
        let own = [
            "curl",
            "--silent",
            "--show-error",
            "--fail",
            "--max-time",
            &limit,
            "--proxy",
            &proxy,
            "--proxy-cacert",
            &path("ca.crt"),
            "--proxy-cert",
            &path(&certificate),
            "--proxy-key",
            &path(&key),
        ];
        self.api.run(&[&own, words].concat(), PATIENCE)
    }

    /// The lines of the audit log.
    pub(crate) fn audit(&self) -> Result<Vec<Value>> {
        let text = fs::read_to_string(self.file("audit.jsonl")).unwrap_or_default();
        let lines = text
            .lines()
            .map(|line| serde_json::from_str(line).context(line.to_owned()));
        lines.collect()
    }

    /// Waits for a line of the audit log.
    pub(crate) fn audited(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        tool::eventually(what, PATIENCE, || {
            let lines = self.audit()?;
            match lines.iter().rev().find(|line| wanted(line)) {
                Some(line) => Ok(line.clone()),
                None => bail!("{lines:#?}"),
            }
        })
    }

    /// What the gateway's agent counts.
    pub(crate) fn count(&self, name: &str) -> Result<u64> {
        let status = self.mesh.status(GATEWAY)?;
        let count = status
            .pointer(&format!("/proxy/{name}"))
            .and_then(Value::as_u64);
        count.with_context(|| format!("no {name}: {status}"))
    }
}

/// What the API server may do; `uid:0` is its user when it comes by the socket.
pub(crate) fn rules(apiserver: &str) -> String {
    format!(
        "[[proxy.allow]]\nclients = [\"uid:0\", \"{apiserver}\"]\nnodes = [\"edge-*\"]\nports = [10250]\n\
         [[proxy.allow]]\nclients = [\"o:monitoring\", \"o:operators\"]\nsites = [\"site-a\"]\nports = [\"7000-7009\", 10250]\n\
         [[proxy.allow]]\nclients = [\"uid:0\"]\nnodes = [\"{EDGE}\"]\nports = [22]\n"
    )
}

fn selector(mesh: &Mesh, transport: Transport) -> Option<String> {
    let path = |name: &str| mesh.cloud().dir().join(name).display().to_string();
    let transport = match transport {
        Transport::Routed => return None,
        Transport::Uds => json!({"uds": {"udsName": path("proxy.sock")}}),
        Transport::Tls => json!({"tcp": {
            "url": format!("https://{CLOUD}:{PROXY_PORT}"),
            "tlsConfig": {
                "caBundle": path("ca.crt"),
                "clientCert": path("kube-apiserver.crt"),
                "clientKey": path("kube-apiserver.key"),
            },
        }}),
    };
    let selector = json!({
        "apiVersion": "apiserver.k8s.io/v1beta1", "kind": "EgressSelectorConfiguration",
        "egressSelections": [{"name": "cluster", "connection": {
            "proxyProtocol": "HTTPConnect", "transport": transport,
        }}],
    });
    Some(selector.to_string())
}

/// Certificates of the proxy and its clients.
fn issue(authority: &Standin, folder: &std::path::Path) -> Result<()> {
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    };
    let pair = |name: &str, issued: Issued| {
        write(&format!("{name}.crt"), &issued.certificate_pem)?;
        write(&format!("{name}.key"), &issued.key_pem)
    };
    write("ca.crt", authority.ca_pem())?;
    write("clients.crt", authority.ca_pem())?;
    pair(
        "proxy",
        authority.issue_serving("proxy", &[&CLOUD.to_string()])?,
    )?;
    for (user, group) in [
        ("kube-apiserver", "control-plane"),
        ("prometheus", "monitoring"),
        ("mallory", "interns"),
    ] {
        pair(user, authority.issue_client(user, group)?)?;
    }
    Ok(())
}

/// What `curl` needs to be a client of kubelets: a certificate of the API server's authority.
pub(crate) fn kubelet_client(world: &World) -> Result<[String; 6]> {
    let issued = world.standin.issue_client("prometheus", "monitoring")?;
    let write = |name: &str, text: &str| {
        let path = world.api.write(name, text)?;
        anyhow::Ok(path.display().to_string())
    };
    Ok([
        "--cacert".to_owned(),
        write("kubelet-ca.crt", world.standin.ca_pem())?,
        "--cert".to_owned(),
        write("kubelet-client.crt", &issued.certificate_pem)?,
        "--key".to_owned(),
        write("kubelet-client.key", &issued.key_pem)?,
    ])
}
