//! The commands of `docs/kubernetes.md`, run as an operator runs them. The test is the cluster's part: the controller's pod,
//! a node that joins, and the controller of DaemonSets.

#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test may fail loudly"
)]

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use integration::apiserver::{Options, Standin};
use netns_tests::tool::binary;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    process::{Child, Command},
    time::{sleep, timeout},
};

/// No command takes longer.
const PATIENCE: Duration = Duration::from_secs(90);
const LOOK_EVERY: Duration = Duration::from_millis(100);
const NODES: [&str; 2] = ["edge-a1", "edge-b1"];

struct Cluster {
    standin: Standin,
    folder: TempDir,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// What follows `$ ` in the blocks of shell.
fn commands(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        match line {
            "```sh" => inside = true,
            "```" => inside = false,
            line if inside => found.extend(line.strip_prefix("$ ").map(str::to_owned)),
            _ => {}
        }
    }
    found
}

impl Cluster {
    async fn new() -> Self {
        let standin = Standin::start(Options::default()).await.unwrap();
        for (number, name) in NODES.iter().enumerate() {
            let range = format!("10.244.{number}.0/24");
            let node = json!({
                "apiVersion": "v1", "kind": "Node",
                "metadata": {"name": name, "labels": {"kubernetes.io/os": "linux"}},
                "spec": {"podCIDR": range, "podCIDRs": [range]},
                "status": {"nodeInfo": {
                    "architecture": "arm64", "operatingSystem": "linux", "kernelVersion": "6.12.0",
                    "bootID": "", "containerRuntimeVersion": "", "kubeletVersion": "v1.36.0",
                    "kubeProxyVersion": "", "machineID": "", "osImage": "", "systemUUID": "",
                }},
            });
            standin.insert(&node).unwrap();
        }
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("admin"), standin.kubeconfig()).unwrap();
        Self { standin, folder }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    async fn kubectl(&self, words: &[&str]) -> Result<String, String> {
        self.shell(&format!("kubectl {}", words.join(" "))).await
    }

    async fn get(&self, what: &str) -> Value {
        let text = self.kubectl(&["get", what, "-o", "json"]).await;
        serde_json::from_str(&text.unwrap_or_default()).unwrap_or_default()
    }

    async fn shell(&self, command: &str) -> Result<String, String> {
        let bins = binary("meshctl").unwrap();
        let bins = bins.parent().unwrap().display().to_string();
        let path = std::env::var("PATH").unwrap();
        let mut shell = Command::new("bash");
        shell
            .args(["-euc", command])
            .current_dir(root())
            .env("KUBECONFIG", self.path("admin"))
            .env("HOME", self.folder.path())
            .env("PATH", format!("{bins}:{path}"))
            .kill_on_drop(true);
        let output = timeout(PATIENCE, shell.output()).await.unwrap().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match output.status.success() {
            true => Ok(text(&output.stdout)),
            false => Err(text(&output.stdout) + &text(&output.stderr)),
        }
    }

    /// What the controller's pod would be: the program, its configuration, and the token of its ServiceAccount.
    async fn start_controller(&self) -> Child {
        let set = self.get("statefulset/mesh-controller -n holdfast").await;
        let account = set["spec"]["template"]["spec"]["serviceAccountName"].as_str();
        let token = self.standin.token("holdfast", account.unwrap(), &[], None);
        let kubeconfig = self.standin.kubeconfig_with_token(&token.unwrap());
        fs::write(self.folder.path().join("pod"), kubeconfig).unwrap();
        let volumes = &set["spec"]["template"]["spec"]["volumes"];
        let map = volumes[0]["configMap"]["name"].as_str().unwrap();
        let map = self.get(&format!("configmap/{map} -n holdfast")).await;
        let config = map["data"]["controller.toml"].as_str().unwrap();
        let config = config
            .replace("[::]:7440", "127.0.0.1:0")
            .replace("/var/lib/holdfast-controller", &self.path("state"))
            .replace("/run/holdfast/controller.sock", &self.path("admin.sock"));
        let config = format!("{config}kubeconfig = {:?}\n", self.path("pod"));
        fs::write(self.folder.path().join("controller.toml"), config).unwrap();
        let log = fs::File::create(self.folder.path().join("log")).unwrap();
        Command::new(binary("mesh-controller").unwrap())
            .args(["--config", &self.path("controller.toml")])
            .env("NO_COLOR", "1")
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    }

    /// A real agent of a node joins.
    async fn join(&self, node: &str) {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("mesh-agent-{node}"), "namespace": "holdfast"},
            "spec": {"nodeName": node, "serviceAccountName": "mesh-agent",
                     "containers": [{"name": "mesh-agent", "image": "x"}]},
        });
        self.standin.insert(&pod).unwrap();
        let name = format!("mesh-agent-{node}");
        let token = self
            .standin
            .token("holdfast", "mesh-agent", &["holdfast"], Some(&name));
        fs::write(self.folder.path().join("token"), token.unwrap()).unwrap();
        let mesh = loop {
            let map = self.get("configmap/holdfast-mesh -n holdfast").await;
            if let Some(mesh) = map["data"]["mesh"].as_str() {
                break mesh.to_owned();
            }
            sleep(LOOK_EVERY).await;
        };
        fs::write(self.folder.path().join("mesh"), mesh).unwrap();
        let address = loop {
            let log = fs::read_to_string(self.folder.path().join("log")).unwrap();
            let mut words = log.split_whitespace();
            if let Some(address) = words.find_map(|word| word.strip_prefix("address=")) {
                break address.to_owned();
            }
            sleep(LOOK_EVERY).await;
        };
        let config = format!(
            "node_name = {node:?}\ncontroller = {address:?}\nservice_account_token_file = {:?}\nmesh_file = {:?}\n\
             state_dir = {:?}\nadmin_socket = {:?}\nservices = false\npolicy = false\ninterface = \"lo\"\n\
             [dns]\nlisten = [\"127.0.0.1:0\"]\n",
            self.path("token"),
            self.path("mesh"),
            self.path(&format!("{node}-state")),
            self.path(&format!("{node}.sock")),
        );
        fs::write(self.folder.path().join("agent.toml"), config).unwrap();
        // The name of its device is taken: it joins, and goes no further. Nothing of this machine's network changes.
        let certificate = self
            .folder
            .path()
            .join(format!("{node}-state/identity.pem"));
        let mut agent = Command::new(binary("mesh-agent").unwrap())
            .args(["--config", &self.path("agent.toml")])
            .stderr(fs::File::create(self.folder.path().join("agent.log")).unwrap())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let joined = async {
            while !certificate.exists() {
                sleep(LOOK_EVERY).await;
            }
        };
        let log = || fs::read_to_string(self.folder.path().join("agent.log"));
        assert!(timeout(PATIENCE, joined).await.is_ok(), "{:?}", log());
        agent.kill().await.unwrap();
    }

    /// What the cluster's controllers and kubelets do with the DaemonSet that cleans nodes.
    async fn run_cleaner(&self) {
        let set = loop {
            let set = self.get("daemonset/mesh-uninstall -n holdfast").await;
            if set.is_object() {
                break set;
            }
            sleep(LOOK_EVERY).await;
        };
        let agents = self.get("daemonset/mesh-agent -n holdfast").await;
        assert!(agents.is_null(), "the agents end first");
        for node in NODES {
            let pod = json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": format!("mesh-uninstall-{node}"), "namespace": "holdfast",
                             "labels": set["spec"]["template"]["metadata"]["labels"]},
                "spec": {"nodeName": node, "containers": [{"name": "done", "image": "x"}]},
                "status": {"conditions": [{"type": "Ready", "status": "True"}]},
            });
            self.standin.insert(&pod).unwrap();
        }
        let status = json!({"status": {
            "observedGeneration": set["metadata"]["generation"], "desiredNumberScheduled": NODES.len(),
            "numberReady": NODES.len(), "currentNumberScheduled": NODES.len(), "numberMisscheduled": 0,
        }});
        let patch = format!("'{status}'");
        let words = [
            "patch",
            "daemonset",
            "mesh-uninstall",
            "-n",
            "holdfast",
            "--subresource=status",
            "--type=merge",
            "-p",
            &patch,
        ];
        self.kubectl(&words).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_walk_through_works_as_it_is_written() {
    let text = fs::read_to_string(root().join("docs/kubernetes.md")).unwrap();
    let commands = commands(&text);
    assert!(commands.len() >= 10, "{commands:?}");
    let cluster = Cluster::new().await;
    let mut controller = None;
    for command in &commands {
        if command.starts_with("meshctl uninstall") {
            drop(controller.take());
            let (said, ()) = tokio::join!(cluster.shell(command), cluster.run_cleaner());
            let said = said.unwrap();
            assert!(said.contains("2 nodes are clean"), "{said}");
            continue;
        }
        let log = || fs::read_to_string(cluster.folder.path().join("log")).unwrap_or_default();
        let said = cluster.shell(command).await;
        let said = said.unwrap_or_else(|said| panic!("{command}: {said}\n{}", log()));
        match command.as_str() {
            "kubectl apply -k deploy/kubernetes" => {
                controller = Some(cluster.start_controller().await);
                cluster.join(NODES[0]).await;
                until(&cluster, "meshnode/edge-a1").await;
            }
            "kubectl get meshnodes" => assert!(said.contains("edge-a1"), "{said}"),
            "kubectl explain meshconfig.spec" => {
                assert!(said.contains("overlayIPv4CIDR"), "{said}");
            }
            _ => {}
        }
    }
    // Applied again it changes nothing, and everything is gone in the end.
    let left = cluster
        .kubectl(&[
            "get",
            "namespaces,crds,clusterroles,clusterrolebindings",
            "-o",
            "name",
        ])
        .await;
    let left = left.unwrap();
    assert!(!left.contains("holdfast"), "{left}");
}

async fn until(cluster: &Cluster, what: &str) {
    let there = async {
        while cluster.get(what).await.is_null() {
            sleep(LOOK_EVERY).await;
        }
    };
    timeout(PATIENCE, there).await.unwrap();
}
