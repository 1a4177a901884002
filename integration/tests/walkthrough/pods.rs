//! What runs in the cluster's pods, as real processes with what their manifests give them: users, capabilities, configuration.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::unix::fs::{PermissionsExt as _, chown},
    path::PathBuf,
    time::Duration,
};

use integration::apiserver::Standin;
use netns_tests::{
    node::{Node, Process},
    tool::binary,
};
use serde_json::Value;
use tokio::{
    net::{TcpListener, TcpStream as AsyncTcpStream},
    sync::watch,
};

use crate::cluster::{Cluster, capabilities, until};

/// An orderly end takes no longer.
const STOP: Duration = Duration::from_secs(15);

/// A command line of the mesh takes no longer.
const COMMAND: Duration = Duration::from_secs(20);

/// The words before a container's command, so that it may what its manifest says, and no more.
fn confined(words: &[String], container: &Value, user: Option<u32>) -> Vec<String> {
    let mut bounding = "-all".to_owned();
    for name in capabilities(container) {
        bounding += &format!(",+{name}");
    }
    let mut all = vec![
        "setpriv".to_owned(),
        format!("--bounding-set={bounding}"),
        "--inh-caps=-all".to_owned(),
        "--no-new-privs".to_owned(),
    ];
    if let Some(user) = user {
        all.extend([
            format!("--reuid={user}"),
            format!("--regid={user}"),
            "--clear-groups".to_owned(),
        ]);
    }
    all.extend(words.iter().cloned());
    all
}

/// A pod of the controller's Deployment.
pub(crate) struct Controller {
    machine: Node,
    folder: PathBuf,
    pub(crate) address: SocketAddr,
    process: Process,
    log: String,
}

impl Controller {
    /// Begins with nothing of its own, as a pod does, and is ready.
    pub(crate) async fn start(cluster: &Cluster, machine: &Node, number: u16) -> Self {
        let set = cluster.get("deployment/mesh-controller -n holdfast").await;
        let spec = &set["spec"]["template"]["spec"];
        let account = spec["serviceAccountName"].as_str().unwrap();
        let token = cluster.standin.token("holdfast", account, &[], None);
        let user = spec["securityContext"]["runAsUser"].as_u64().unwrap();
        let user = u32::try_from(user).unwrap();
        let folder = machine.dir().join(format!("controller-{number}"));
        for name in ["", "state", "run"] {
            fs::create_dir(folder.join(name)).unwrap();
            chown(folder.join(name), Some(user), Some(user)).unwrap();
        }
        let path = |name: &str| folder.join(name).display().to_string();
        let kubeconfig = cluster.standin.kubeconfig_with_token(&token.unwrap());
        fs::write(path("kubeconfig"), kubeconfig).unwrap();
        chown(path("kubeconfig"), Some(user), Some(user)).unwrap();
        let listen = format!("127.0.0.1:{}", 7440 + number);
        let config = cluster.config_of(&set, "controller.toml").await;
        let config = replaced(
            &config,
            &[
                ("[::]:7440", &listen),
                ("/var/lib/holdfast-controller", &path("state")),
                ("/run/holdfast/controller.sock", &path("run/admin.sock")),
            ],
        );
        // Nobody waits for minutes here.
        let config = format!(
            "{config}kubeconfig = {:?}\nremoval_grace_s = 2\n",
            path("kubeconfig")
        );
        fs::write(path("controller.toml"), config).unwrap();
        let program = binary("mesh-controller").unwrap().display().to_string();
        let words = [program, "--config".to_owned(), path("controller.toml")];
        let container = &spec["containers"][0];
        let log = format!("controller-{number}");
        let process = machine.spawn(&log, &confined(&words, container, Some(user)));
        let mut controller = Self {
            machine: machine.clone(),
            address: listen.parse().unwrap(),
            process: process.unwrap(),
            folder,
            log,
        };
        controller.ready(container).await;
        controller
    }

    /// Waits as the kubelet does: by the manifest's probe.
    async fn ready(&mut self, container: &Value) {
        let probe = container["readinessProbe"]["exec"]["command"].as_array();
        let probe = probe.unwrap().iter().map(|word| word.as_str().unwrap());
        let program = binary("mesh-controller").unwrap().display().to_string();
        let config = self.folder.join("controller.toml").display().to_string();
        let names = [
            ("/mesh-controller", program.as_str()),
            ("/etc/holdfast/controller.toml", config.as_str()),
        ];
        let words: Vec<String> = probe.map(|word| replaced(word, &names)).collect();
        until("the controller is ready", async || {
            self.process.running().unwrap();
            let asked = self.machine.run(&words, COMMAND).unwrap();
            asked.ok().map_err(|error| error.to_string())
        })
        .await;
    }

    pub(crate) fn socket(&self) -> String {
        self.folder.join("run/admin.sock").display().to_string()
    }

    /// `meshctl` at this controller.
    pub(crate) fn ask(&self, words: &str) -> Value {
        let program = binary("meshctl").unwrap().display().to_string();
        let socket = self.socket();
        let own = [&program, "--json", "--controller-socket", &socket];
        let words: Vec<_> = own.into_iter().chain(words.split(' ')).collect();
        let said = self.machine.run(&words, COMMAND).unwrap();
        serde_json::from_str(&said.stdout).unwrap_or_else(|_| panic!("{said:?}"))
    }

    pub(crate) fn leads(&self) -> bool {
        self.ask("controller status")["leads"] == true
    }

    /// Whether the node has its stream here.
    pub(crate) fn has(&self, node: &str) -> bool {
        let nodes = self.ask("nodes");
        let mut nodes = nodes["nodes"].as_array().unwrap().iter();
        nodes.any(|one| one["name"] == node && one["connected"] == true)
    }

    pub(crate) fn kill(mut self) {
        self.process.kill().unwrap();
    }

    /// As a rolling update ends it.
    pub(crate) fn terminate(mut self) {
        let ended = self.process.terminate(STOP).unwrap();
        assert!(ended.success(), "{}: {}", self.log, self.process.log());
    }
}

/// What kube-proxy makes of the controller's Service: each new connection goes to one of the pods that are ready, whether
/// it still lives or not.
pub(crate) struct Service {
    pub(crate) ready: watch::Sender<Vec<SocketAddr>>,
}

impl Service {
    pub(crate) async fn new(address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let (ready, pods) = watch::channel(Vec::<SocketAddr>::new());
        tokio::spawn(async move {
            for turn in 0_usize.. {
                let (mut client, _) = listener.accept().await.unwrap();
                let pods = pods.borrow().clone();
                tokio::spawn(async move {
                    let Some(pod) = pods.get(turn % pods.len().max(1)) else {
                        return;
                    };
                    if let Ok(mut pod) = AsyncTcpStream::connect(pod).await {
                        tokio::io::copy_bidirectional(&mut client, &mut pod)
                            .await
                            .ok();
                    }
                });
            }
        });
        Self { ready }
    }
}

/// A pod of the agents' DaemonSet.
pub(crate) struct Agent {
    node: Node,
    process: Process,
    service: SocketAddr,
}

impl Agent {
    pub(crate) async fn start(cluster: &Cluster, node: &Node, service: SocketAddr) -> Self {
        let set = cluster.get("daemonset/mesh-agent -n holdfast").await;
        cluster.make_pod(&set, node.name());
        let token = token(&cluster.standin, node.name());
        node.write("token", &token).unwrap();
        let map = cluster
            .wait("configmap/holdfast-mesh -n holdfast", |map| {
                map["data"]["mesh"].is_string()
            })
            .await;
        node.write("mesh", map["data"]["mesh"].as_str().unwrap())
            .unwrap();
        for name in ["token", "mesh"] {
            let mode = fs::Permissions::from_mode(0o400);
            fs::set_permissions(node.dir().join(name), mode).unwrap();
        }
        let path = |name: &str| node.dir().join(name).display().to_string();
        let config = cluster.config_of(&set, "agent.toml").await;
        let config = replaced(
            &config,
            &[
                ("/run/secrets/holdfast/token", &path("token")),
                ("/run/secrets/holdfast/mesh", &path("mesh")),
            ],
        );
        // Before the tables. The folders and the cgroup are the lab's, as several nodes are one machine here.
        let own = format!(
            "state_dir = {:?}\nadmin_socket = {:?}\ncgroup = {:?}\n",
            path("state"),
            path("agent.sock"),
            node.cgroup().display().to_string()
        );
        node.write("agent.toml", &(own + &config)).unwrap();
        let process = spawn(node, "agent", &["--config"], &set, "containers", service);
        Self {
            node: node.clone(),
            process,
            service,
        }
    }

    /// Waits as the kubelet does.
    pub(crate) async fn ready(&mut self) {
        until("the agent is ready", async || {
            self.process.running().unwrap();
            let dns = (Ipv4Addr::new(169, 254, 53, 53), 53);
            let connected = self.node.enter(|| TcpStream::connect(dns)).unwrap();
            connected
                .map(drop)
                .map_err(|error| format!("{error}: {}", self.process.log()))
        })
        .await;
    }

    /// `meshctl` on this node.
    pub(crate) fn ask(&self, words: &str) -> Value {
        let program = binary("meshctl").unwrap().display().to_string();
        let socket = self.node.dir().join("agent.sock").display().to_string();
        let own = [program.as_str(), "--json", "--socket", &socket];
        let words: Vec<_> = own.into_iter().chain(words.split(' ')).collect();
        let said = self.node.run(&words, COMMAND).unwrap();
        serde_json::from_str(&said.stdout).unwrap_or_else(|_| panic!("{said:?}"))
    }

    /// Whether it knows of this service.
    pub(crate) fn has_service(&self, name: &str) -> bool {
        let services = self.ask("services");
        let mut services = services["services"].as_array().unwrap().iter();
        services.any(|one| one["name"] == name)
    }

    /// Its pod is gone, and its token with it.
    pub(crate) async fn end(&mut self, cluster: &Cluster) {
        let ended = self.process.terminate(STOP).unwrap();
        assert!(ended.success(), "{}", self.process.log());
        let pod = format!("delete pod mesh-agent-{} -n holdfast", self.node.name());
        cluster.kubectl(&pod).await.unwrap();
    }

    /// Somebody starts it by hand, with what is on its disk.
    pub(crate) fn start_again(&mut self, set: &Value) {
        let words = &["--config"];
        self.process = spawn(&self.node, "agent", words, set, "containers", self.service);
    }

    /// Its node gets a pod again, which has another token.
    pub(crate) fn give_token(&self, cluster: &Cluster, set: &Value) {
        cluster.make_pod(set, self.node.name());
        let token = token(&cluster.standin, self.node.name());
        self.node.write("token", &token).unwrap();
    }

    pub(crate) fn log(&self) -> String {
        self.process.log()
    }

    pub(crate) fn running(&mut self) {
        self.process.running().unwrap();
    }

    /// The pod ends; then what cleans its node runs there, as its DaemonSet says.
    pub(crate) fn end_and_clean(mut self, cleaner: &Value) {
        let ended = self.process.terminate(STOP).unwrap();
        assert!(ended.success(), "{}", self.process.log());
        let words = ["purge", "--config"];
        let init = "initContainers";
        let mut purge = spawn(&self.node, "purge", &words, cleaner, init, self.service);
        assert!(purge.wait(COMMAND).unwrap().success(), "{}", purge.log());
        assert!(!self.node.dir().join("state/identity.pem").exists());
        assert!(!self.node.dir().join("state/wireguard.key").exists());
    }
}

/// The agent's program with what its container in `set` may, and is told of the controllers' Service.
fn spawn(
    node: &Node,
    log: &str,
    words: &[&str],
    set: &Value,
    containers: &str,
    service: SocketAddr,
) -> Process {
    let containers = set["spec"]["template"]["spec"][containers].as_array();
    let mut containers = containers.unwrap().iter();
    let image = |one: &&Value| one["image"].as_str().unwrap().contains("holdfast-agent");
    let container = containers.find(image).unwrap();
    let mut all = vec![binary("mesh-agent").unwrap().display().to_string()];
    all.extend(words.iter().map(|&word| word.to_owned()));
    all.push(node.dir().join("agent.toml").display().to_string());
    let command = node.command(&confined(&all, container, None));
    let mut command = command.unwrap();
    command.env("NO_COLOR", "1");
    for variable in container["env"].as_array().unwrap() {
        // Names cannot be resolved here: the Service is found as the kubelet says.
        let known = [
            ("$(MESH_CONTROLLER_SERVICE_HOST)", service.ip().to_string()),
            (
                "$(MESH_CONTROLLER_SERVICE_PORT)",
                service.port().to_string(),
            ),
        ];
        let known = known
            .each_ref()
            .map(|(name, value)| (*name, value.as_str()));
        let value = match variable["value"].as_str() {
            Some(value) => replaced(value, &known),
            None => {
                let field = &variable["valueFrom"]["fieldRef"]["fieldPath"];
                assert_eq!(field, "spec.nodeName");
                node.name().to_owned()
            }
        };
        command.env(variable["name"].as_str().unwrap(), value);
    }
    node.spawn_with(log, command).unwrap()
}

fn token(standin: &Standin, node: &str) -> String {
    let pod = format!("mesh-agent-{node}");
    let token = standin.token("holdfast", "mesh-agent", &["holdfast"], Some(&pod));
    token.unwrap()
}

/// `text` with each of these in another's place.
fn replaced(text: &str, pairs: &[(&str, &str)]) -> String {
    pairs
        .iter()
        .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// A relay on a machine of its own, with a certificate of this mesh.
pub(crate) fn start_relay(node: &Node, controller: &Controller, name: &str) -> Process {
    let folder = node.dir().join("relay").display().to_string();
    controller.ask(&format!("relay issue {name} --out {folder}"));
    let config = format!(
        "name = {name:?}\ncertificate = \"{folder}/relay.pem\"\nkey = \"{folder}/relay.key\"\nca = \"{folder}/ca.pem\"\n"
    );
    let config = node.write("relay.toml", &config).unwrap();
    let program = binary("mesh-relay").unwrap().display().to_string();
    let words = [program, "--config".to_owned(), config.display().to_string()];
    node.spawn("relay", &words).unwrap()
}
