//! What the cluster is that `kubectl` speaks with, and whether it can have Holdfast.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::kubectl;

use super::{Check, Found, Level, check, clock, kernel, machine, release};

/// CEL rules of custom resources count since Kubernetes 1.29; before that they may be ignored.
const VERSION_MIN: (u32, u32) = (1, 29);

/// At most so many nodes are named one by one when something is wrong with them.
const NAMED_MAX: usize = 10;

/// What `kubectl apply -k deploy/kubernetes` makes: verb and kind.
const RIGHTS: [(&str, &str); 7] = [
    ("create", "namespaces"),
    ("create", "customresourcedefinitions.apiextensions.k8s.io"),
    ("create", "clusterroles.rbac.authorization.k8s.io"),
    ("create", "clusterrolebindings.rbac.authorization.k8s.io"),
    ("create", "daemonsets.apps"),
    ("create", "deployments.apps"),
    ("create", "secrets"),
];

/// A node as the API server knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) kernel: String,
    pub(crate) machine: String,
    pub(crate) system: String,
}

/// The cluster.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub(crate) version: Found<String>,
    pub(crate) nodes: Found<Vec<Node>>,
    /// Of [`RIGHTS`], what this user may not do.
    pub(crate) denied: Found<Vec<String>>,
    /// By the API server's clock, and by this machine's at that moment.
    pub(crate) clocks_unix_s: Found<(u64, u64)>,
}

/// Everything that matters to the cluster as a whole.
pub(crate) fn judge(facts: &Facts) -> Vec<Check> {
    let version = match &facts.version {
        Err(problem) => {
            // Without an API server there is nothing else to be said.
            let text = format!("kubectl reaches no API server: {problem}");
            return vec![check("API server", Level::Error, text)];
        }
        Ok(text) => {
            let (major, minor) = VERSION_MIN;
            match release(text.trim_start_matches('v')) {
                Some(version) if version >= VERSION_MIN => check("API server", Level::Ok, text),
                _ => check(
                    "API server",
                    Level::Error,
                    format!("{text}: {major}.{minor} or later is needed"),
                ),
            }
        }
    };
    let mut checks = vec![version];
    checks.push(match &facts.denied {
        Err(problem) => check("rights", Level::Warning, problem),
        Ok(denied) if denied.is_empty() => check("rights", Level::Ok, "all that installing needs"),
        Ok(denied) => check(
            "rights",
            Level::Error,
            format!("this user may not {}", denied.join(", ")),
        ),
    });
    checks.push(match &facts.clocks_unix_s {
        Err(problem) => check("clock", Level::Warning, problem),
        Ok((server, here)) => clock(*here, Some(*server)),
    });
    match &facts.nodes {
        Err(problem) => checks.push(check("nodes", Level::Warning, problem)),
        Ok(nodes) => checks.extend(judge_nodes(nodes)),
    }
    checks
}

/// A line for each node that is not fit, and one for all that are.
fn judge_nodes(nodes: &[Node]) -> Vec<Check> {
    let unfit = |node: &Node| {
        let name = format!("node {}", node.name);
        let system = if node.system == "linux" {
            check(&name, Level::Ok, "linux")
        } else {
            let text = format!("{}: the agent runs on Linux only", node.system);
            check(&name, Level::Warning, text)
        };
        let checks = [
            system,
            kernel(&name, &Ok(node.kernel.clone())),
            machine(&name, &node.machine),
        ];
        checks.into_iter().find(|check| check.level != Level::Ok)
    };
    let mut checks: Vec<_> = nodes.iter().filter_map(unfit).collect();
    let (wrong, all) = (checks.len(), nodes.len());
    if wrong > NAMED_MAX {
        checks.truncate(NAMED_MAX);
        let more = wrong - NAMED_MAX;
        checks.push(check(
            "nodes",
            Level::Warning,
            format!("and {more} more like these"),
        ));
    }
    let fit = format!("{} of {all} are fit by kernel and machine", all - wrong);
    let level = if wrong == 0 {
        Level::Ok
    } else {
        Level::Warning
    };
    checks.push(check("nodes", level, fit));
    checks
}

/// Asks the cluster.
pub(crate) async fn gather() -> Facts {
    let version = kubectl::object(&["version", "-o", "json"]).await;
    let version = version.and_then(|said| {
        let found = said
            .pointer("/serverVersion/gitVersion")
            .and_then(Value::as_str);
        found
            .map(str::to_owned)
            .ok_or_else(|| "it says no version".to_owned())
    });
    if let Err(problem) = version {
        let unknown = || "not asked".to_owned();
        return Facts {
            version: Err(problem),
            nodes: Err(unknown()),
            denied: Err(unknown()),
            clocks_unix_s: Err(unknown()),
        };
    }
    let nodes = kubectl::object(&["get", "nodes", "-o", "json"]).await;
    Facts {
        version,
        nodes: nodes.and_then(|list| nodes_of(&list)),
        denied: denied().await,
        clocks_unix_s: clocks().await,
    }
}

async fn denied() -> Found<Vec<String>> {
    let mut denied = Vec::new();
    for (verb, kind) in RIGHTS {
        let ask = ["auth", "can-i", verb, kind, "-n", "holdfast"];
        let said = kubectl::run(&ask, "", Duration::ZERO).await?;
        match said.text.trim() {
            "yes" => {}
            "no" => denied.push(format!("{verb} {kind}")),
            _ => return Err(format!("kubectl {}: {}", ask.join(" "), said.complaint)),
        }
    }
    Ok(denied)
}

/// An object that is only tried has the server's time as that of its making.
async fn clocks() -> Found<(u64, u64)> {
    let tried = [
        "create",
        "configmap",
        "holdfast-check",
        "-n",
        "default",
        "--dry-run=server",
        "-o",
        "json",
    ];
    let object = kubectl::object(&tried).await?;
    let made = object
        .pointer("/metadata/creationTimestamp")
        .and_then(Value::as_str);
    let made: jiff::Timestamp = made
        .ok_or("the API server says no time")?
        .parse()
        .map_err(|error| format!("the API server's time: {error}"))?;
    let server = u64::try_from(made.as_second()).map_err(|error| error.to_string())?;
    let here = SystemTime::now().duration_since(UNIX_EPOCH);
    Ok((server, here.map_or(0, |here| here.as_secs())))
}

fn nodes_of(list: &Value) -> Found<Vec<Node>> {
    let items = list.get("items").and_then(Value::as_array);
    let node = |item: &Value| {
        let text = |at: &str| {
            item.pointer(at)
                .and_then(Value::as_str)
                .unwrap_or("unknown")
                .to_owned()
        };
        Node {
            name: text("/metadata/name"),
            kernel: text("/status/nodeInfo/kernelVersion"),
            machine: text("/status/nodeInfo/architecture"),
            system: text("/status/nodeInfo/operatingSystem"),
        }
    };
    let items = items.ok_or_else(|| "the API server gave no list of nodes".to_owned())?;
    Ok(items.iter().map(node).collect())
}
