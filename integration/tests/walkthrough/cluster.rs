//! The cluster: an API server's stand-in and its nodes, `kubectl`, and what the cluster's own controllers would do.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use integration::apiserver::{Options, Standin};
use netns_tests::{node::Node, tool::binary};
use serde_json::{Value, json};
use tokio::{
    process::Command,
    time::{Instant, sleep, timeout},
};

/// No command takes longer, and nothing is waited for longer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Its nodes.
pub(crate) const NODES: [&str; 2] = ["edge-a1", "edge-b1"];

pub(crate) struct Cluster {
    pub(crate) standin: Standin,
    machine: Node,
}

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// Waits until it is so, or fails with what stands in the way.
pub(crate) async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match look().await {
            Ok(found) => return found,
            Err(problem) => assert!(Instant::now() < deadline, "{what}: {problem}"),
        }
        sleep(LOOK_EVERY).await;
    }
}

impl Cluster {
    /// On `machine`, which runs this, too.
    pub(crate) async fn new(machine: &Node) -> Self {
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
        machine.write("admin", &standin.kubeconfig()).unwrap();
        Self {
            standin,
            machine: machine.clone(),
        }
    }

    fn path(&self, name: &str) -> String {
        self.machine.dir().join(name).display().to_string()
    }

    pub(crate) async fn kubectl(&self, words: &str) -> Result<String, String> {
        self.shell(&format!("kubectl {words}")).await
    }

    /// An object, or null.
    pub(crate) async fn get(&self, what: &str) -> Value {
        let text = self.kubectl(&format!("get {what} -o json")).await;
        serde_json::from_str(&text.unwrap_or_default()).unwrap_or_default()
    }

    /// Waits for an object of which this is so.
    pub(crate) async fn wait(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        until(what, async || {
            let object = self.get(what).await;
            if wanted(&object) {
                Ok(object)
            } else {
                Err(object.to_string())
            }
        })
        .await
    }

    pub(crate) async fn apply(&self, name: &str, text: &str) {
        self.machine.write(name, text).unwrap();
        let said = self.kubectl(&format!("apply -f {}", self.path(name))).await;
        said.unwrap();
    }

    /// As an operator types it, in the project's folder.
    pub(crate) async fn shell(&self, command: &str) -> Result<String, String> {
        let bins = binary("meshctl").unwrap();
        let bins = bins.parent().unwrap().display().to_string();
        let path = std::env::var("PATH").unwrap();
        let mut shell = Command::new("bash");
        shell
            .args(["-euc", command])
            .current_dir(root())
            .env("KUBECONFIG", self.path("admin"))
            .env("HOME", self.machine.dir())
            .env("PATH", format!("{bins}:{path}"))
            .kill_on_drop(true);
        let output = timeout(PATIENCE, shell.output()).await;
        let output = output.map_err(|_| format!("no end in {PATIENCE:?}"))?;
        let output = output.unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match output.status.success() {
            true => Ok(text(&output.stdout)),
            false => Err(text(&output.stdout) + &text(&output.stderr)),
        }
    }

    /// The ConfigMap of a pod's volume `config`.
    pub(crate) async fn config_of(&self, workload: &Value, file: &str) -> String {
        let volumes = workload["spec"]["template"]["spec"]["volumes"].as_array();
        let mut volumes = volumes.unwrap().iter();
        let config = volumes.find(|volume| volume["name"] == "config").unwrap();
        let map = config["configMap"]["name"].as_str().unwrap();
        let map = self.get(&format!("configmap/{map} -n holdfast")).await;
        map["data"][file].as_str().unwrap().to_owned()
    }

    /// A pod of a DaemonSet on a node.
    pub(crate) fn make_pod(&self, set: &Value, node: &str) {
        let name = set["metadata"]["name"].as_str().unwrap();
        let template = &set["spec"]["template"];
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("{name}-{node}"), "namespace": "holdfast",
                         "labels": template["metadata"]["labels"]},
            "spec": {"nodeName": node, "containers": [{"name": "x", "image": "x"}],
                     "serviceAccountName": template["spec"]["serviceAccountName"]},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        });
        self.standin.insert(&pod).unwrap();
    }

    /// What the DaemonSet's controller says once all its pods are ready.
    pub(crate) async fn all_ready(&self, set: &Value) {
        let name = set["metadata"]["name"].as_str().unwrap();
        let status = json!({"status": {
            "observedGeneration": set["metadata"]["generation"], "desiredNumberScheduled": NODES.len(),
            "numberReady": NODES.len(), "currentNumberScheduled": NODES.len(), "numberMisscheduled": 0,
        }});
        let patch = format!(
            "patch daemonset {name} -n holdfast --subresource=status --type=merge -p '{status}'"
        );
        self.kubectl(&patch).await.unwrap();
    }
}

/// The capabilities that a container gets, as its manifest says.
pub(crate) fn capabilities(container: &Value) -> Vec<String> {
    let wanted = &container["securityContext"]["capabilities"];
    assert_eq!(wanted["drop"], json!(["ALL"]), "{container}");
    let added = wanted["add"].as_array().into_iter().flatten();
    let names = added.map(|name| name.as_str().unwrap().to_lowercase());
    names.collect()
}
