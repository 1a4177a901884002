//! `uninstall`: from a cluster, all that `kubectl apply -k deploy/kubernetes` and the agents brought, node by node.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde_json::Value;
use tokio::time::{self, Instant};

use crate::{failure::Failure, kubectl, report::Uninstalled};

const NAMESPACE: &str = "holdfast";

/// What cleans a node, with placeholders for what the agents had.
const CLEANER: &str = include_str!("../../deploy/kubernetes/uninstall/daemonset.yaml");

/// Group of the custom resources.
const GROUP: &str = ".mesh.holdfast.dev";

/// Label of what is in no namespace.
const PART_OF: &str = "app.kubernetes.io/part-of=holdfast";

/// How often the cleaning is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// A namespace or a custom resource goes when all in it is gone.
const DELETE_MAX: Duration = Duration::from_secs(120);

/// What the agents had, and cleaning needs.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Agents {
    image: String,
    /// The image of the CNI plug-in; `None`: the agents' pods did not install it.
    cni: Option<String>,
    /// The ConfigMap with their configuration.
    config: String,
}

/// Takes everything away. Where nodes are not reached within `patience`, what cleans them stays, and the rest too:
/// they are cleaned when they come back, and this is to be run again. With `force` they are given up.
pub(crate) async fn uninstall(patience: Duration, force: bool) -> Result<Uninstalled, Failure> {
    let cleaned = clean_nodes(patience).await.map_err(Failure::Cluster)?;
    if !cleaned.left.is_empty() && !force {
        return Ok(Uninstalled::new(cleaned.done, cleaned.left, Vec::new()));
    }
    let removed = delete_all().await.map_err(Failure::Cluster)?;
    Ok(Uninstalled::new(cleaned.done, cleaned.left, removed))
}

/// Nodes by whether they are clean.
#[derive(Debug, Default, PartialEq, Eq)]
struct Cleaned {
    done: BTreeSet<String>,
    left: BTreeSet<String>,
}

async fn clean_nodes(patience: Duration) -> Result<Cleaned, String> {
    let get = |name| {
        [
            "get",
            "daemonset",
            name,
            "-n",
            NAMESPACE,
            "-o",
            "json",
            "--ignore-not-found",
        ]
    };
    let agents = kubectl::object(&get("mesh-agent")).await?;
    let cleaner = kubectl::object(&get("mesh-uninstall")).await?;
    match (had(&agents), cleaner.is_null()) {
        (Some(had), _) => {
            let delete = [
                "delete",
                "daemonset",
                "mesh-agent",
                "-n",
                NAMESPACE,
                "--ignore-not-found",
                "--cascade=foreground",
                "--timeout=60s",
            ];
            // An agent on a node that is away never ends, and keeps nobody else waiting.
            let deleted = kubectl::run(&delete, "", Duration::from_secs(60)).await?;
            if !deleted.success {
                eprintln!("meshctl: agents still end: {}", deleted.complaint);
            }
            let manifest = manifest(&had);
            let apply = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
            kubectl::done(&apply, &manifest, Duration::ZERO).await?;
        }
        // An earlier run began it.
        (None, false) => {}
        (None, true) => return Ok(Cleaned::default()),
    }
    let deadline = Instant::now() + patience;
    loop {
        let status = kubectl::object(&get("mesh-uninstall")).await?;
        let pods = [
            "get",
            "pods",
            "-n",
            NAMESPACE,
            "-o",
            "json",
            "-l",
            "app.kubernetes.io/name=mesh-uninstall",
        ];
        let cleaned = cleaned(&kubectl::object(&pods).await?);
        if is_complete(&status) || Instant::now() >= deadline {
            return Ok(cleaned);
        }
        time::sleep(LOOK_EVERY).await;
    }
}

/// Read from the agents' DaemonSet.
fn had(agents: &Value) -> Option<Agents> {
    let named = |list: &str, name: &str, at: &str| {
        let list = agents.pointer(&format!("/spec/template/spec/{list}"))?;
        let mut list = list.as_array()?.iter();
        let one = list.find(|one| one["name"] == name)?;
        one.pointer(at)?.as_str().map(str::to_owned)
    };
    Some(Agents {
        image: named("containers", "mesh-agent", "/image")?,
        cni: named("initContainers", "install-cni", "/image"),
        config: named("volumes", "config", "/configMap/name")?,
    })
}

fn manifest(agents: &Agents) -> String {
    let mut text = String::new();
    let mut left_out = false;
    for line in CLEANER.lines() {
        let comment = line.trim_start();
        if comment.starts_with("# cni:") {
            left_out = agents.cni.is_none();
        } else if comment == "# cni ends." {
            left_out = false;
        }
        let filled = |placeholder: &str, with: Option<&String>| {
            let key = line.strip_suffix(placeholder)?;
            Some(format!("{key}{:?}", with?))
        };
        let changed = filled("holdfast-agent", Some(&agents.image))
            .or_else(|| filled("holdfast-cni", agents.cni.as_ref()))
            .or_else(|| filled("mesh-agent-config", Some(&agents.config)));
        if !left_out {
            text.push_str(changed.as_deref().unwrap_or(line));
            text.push('\n');
        }
    }
    text
}

/// Every node has been told, and has done it.
fn is_complete(daemon_set: &Value) -> bool {
    let number = |at: &str| daemon_set.pointer(at).and_then(Value::as_u64);
    let seen = number("/status/observedGeneration") >= number("/metadata/generation");
    let wanted = number("/status/desiredNumberScheduled");
    let ready = number("/status/numberReady").unwrap_or(0);
    seen && wanted.is_some_and(|wanted| ready >= wanted)
}

fn cleaned(pods: &Value) -> Cleaned {
    let mut nodes: BTreeMap<String, bool> = BTreeMap::new();
    for pod in pods["items"].as_array().into_iter().flatten() {
        let Some(node) = pod.pointer("/spec/nodeName").and_then(Value::as_str) else {
            continue;
        };
        let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
        let ready = |one: &&Value| one["type"] == "Ready" && one["status"] == "True";
        let done = conditions.is_some_and(|conditions| conditions.iter().any(|one| ready(&one)));
        *nodes.entry(node.to_owned()).or_default() |= done;
    }
    let mut cleaned = Cleaned::default();
    for (node, done) in nodes {
        let set = if done {
            &mut cleaned.done
        } else {
            &mut cleaned.left
        };
        set.insert(node);
    }
    cleaned
}

/// What is in no namespace goes before the namespace: with its objects everybody's rights go.
async fn delete_all() -> Result<Vec<String>, String> {
    let list = kubectl::done(&["get", "crds", "-o", "name"], "", Duration::ZERO).await?;
    let mut names: Vec<String> = list
        .lines()
        .filter(|name| name.ends_with(GROUP))
        .map(str::to_owned)
        .collect();
    let roles = [
        "get",
        "clusterroles,clusterrolebindings",
        "-l",
        PART_OF,
        "-o",
        "name",
    ];
    let roles = kubectl::done(&roles, "", Duration::ZERO).await?;
    names.extend(roles.lines().map(str::to_owned));
    let namespace = format!("namespace/{NAMESPACE}");
    let there = ["get", &namespace, "-o", "name", "--ignore-not-found"];
    let there = kubectl::done(&there, "", Duration::ZERO).await?;
    names.extend(there.lines().map(str::to_owned));
    for name in &names {
        let limit = format!("--timeout={}s", DELETE_MAX.as_secs());
        let delete = ["delete", name, "--ignore-not-found", &limit];
        kubectl::done(&delete, "", DELETE_MAX).await?;
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nodes_are_cleaned_by_the_images_that_the_agents_had() {
        let set = json!({"spec": {"template": {"spec": {
            "initContainers": [{"name": "install-cni", "image": "mirror:5000/holdfast-cni:1"}],
            "containers": [{"name": "mesh-agent", "image": "mirror:5000/holdfast-agent:1"}],
            "volumes": [{"name": "config", "configMap": {"name": "mesh-agent-2f9k"}}],
        }}}});
        let mut agents = had(&set).unwrap();
        let with = manifest(&agents);
        let count = |manifest: &str, text: &str| manifest.matches(text).count();
        let image = "image: \"mirror:5000/holdfast-agent:1\"\n";
        assert_eq!(count(&with, image), 2);
        assert_eq!(count(&with, "image: \"mirror:5000/holdfast-cni:1\"\n"), 1);
        assert_eq!(count(&with, "image: "), 3);
        assert_eq!(count(&with, "name: \"mesh-agent-2f9k\"\n"), 1);
        agents.cni = None;
        let without = manifest(&agents);
        assert_eq!(count(&without, "image: "), 2);
        assert_eq!(count(&without, "- name: cni\n"), 0);
        assert_eq!(count(&without, "- name: agent\n"), 1);
        assert_eq!(had(&Value::Null), None);
    }

    #[test]
    fn it_is_complete_when_every_node_of_this_manifest_is_ready() {
        let set = |generation, wanted, ready| {
            json!({"metadata": {"generation": 2}, "status": {
                "observedGeneration": generation, "desiredNumberScheduled": wanted, "numberReady": ready}})
        };
        assert!(is_complete(&set(2, 3, 3)));
        assert!(is_complete(&set(2, 0, 0)));
        assert!(!is_complete(&set(2, 3, 2)));
        assert!(!is_complete(&set(1, 3, 3)));
        assert!(!is_complete(&json!({"metadata": {"generation": 1}})));
        assert!(!is_complete(&Value::Null));
    }

    #[test]
    fn nodes_that_were_not_reached_are_named() {
        let pod = |node: &str, ready: &str| json!({"spec": {"nodeName": node}, "status": {"conditions": [{"type": "Ready", "status": ready}]}});
        let pods = json!({"items": [pod("a", "True"), pod("b", "False"), {"spec": {"nodeName": "c"}}, {}]});
        let Cleaned { done, left } = cleaned(&pods);
        assert_eq!(done, ["a".to_owned()].into());
        assert_eq!(left, ["b".to_owned(), "c".to_owned()].into());
    }
}
