//! `approve`: who waits to be let in, and letting them in: by the controller's manifests, or in a cluster by what the operator may do there.

use std::{path::Path, time::Duration};

use jiff::Timestamp;
use mesh_api::admin::{ApproveNodesRequest, ListWaitingRequest, ListWaitingResponse};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    Verdict, cli,
    connect::{self, ask},
    failure::{Daemon::Controller, Failure},
    kubectl,
    run::{Screen, watch},
    show::Report,
    table::{Cell, duration, printable, table},
};

/// `approve` without names.
#[derive(Debug, Serialize)]
pub(crate) struct Waiting {
    /// Whether new nodes have to wait at all (`joinApproval: manual`).
    pub(crate) manual: bool,
    pub(crate) nodes: Vec<Applicant>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Applicant {
    pub(crate) name: String,
    /// When it first asked with this key.
    pub(crate) since_unix_s: Option<i64>,
    /// For people, its key and its address in it; its words may change.
    pub(crate) request: String,
    /// `null` with `--cluster`, as is the address: there they stand in `request` only.
    pub(crate) public_key: Option<String>,
    /// From where it asked last.
    pub(crate) address: Option<String>,
}

/// `approve` with names.
#[derive(Debug, Serialize)]
pub(crate) struct Approved {
    pub(crate) approved: Vec<ApprovedNode>,
}

#[derive(Debug, Serialize)]
pub(crate) struct ApprovedNode {
    pub(crate) name: String,
    /// The file in the controller's folder in which its MeshNode stands; `null`: in the cluster.
    pub(crate) file: Option<String>,
}

pub(crate) async fn run(
    socket: &Path,
    arguments: cli::Approve,
    screen: Screen,
) -> Result<Verdict, Failure> {
    let cli::Approve {
        nodes,
        cluster,
        again,
    } = arguments;
    match (nodes.is_empty(), cluster) {
        (true, true) => watch(screen, again, async |_| waiting_in_cluster().await).await,
        (true, false) => watch(screen, again, async |_| waiting(socket).await).await,
        (false, true) => screen.show(&approve_in_cluster(nodes).await?),
        (false, false) => screen.show(&approve(socket, nodes).await?),
    }
}

async fn waiting(socket: &Path) -> Result<Waiting, Failure> {
    let mut controller = connect::controller(socket).await?;
    let said = ask(Controller, controller.list_waiting(ListWaitingRequest {})).await?;
    Ok(Waiting::from(said))
}

async fn approve(socket: &Path, names: Vec<String>) -> Result<Approved, Failure> {
    let mut controller = connect::controller(socket).await?;
    let approved = controller.approve_nodes(ApproveNodesRequest { names });
    let said = ask(Controller, approved).await?;
    let node = |said: mesh_api::admin::ApprovedReport| ApprovedNode {
        name: said.name,
        file: Some(said.file),
    };
    Ok(Approved {
        approved: said.nodes.into_iter().map(node).collect(),
    })
}

async fn waiting_in_cluster() -> Result<Waiting, Failure> {
    let config = [
        "get",
        "meshconfig",
        "default",
        "--ignore-not-found",
        "-o",
        "json",
    ];
    let config = kubectl::object(&config).await.map_err(Failure::Cluster)?;
    let nodes = ["get", "meshnodes", "-o", "json"];
    let nodes = kubectl::object(&nodes).await.map_err(Failure::Cluster)?;
    Ok(Waiting::in_cluster(&config, &nodes))
}

async fn approve_in_cluster(names: Vec<String>) -> Result<Approved, Failure> {
    let waiting = waiting_in_cluster().await?;
    let waits = |name: &str| waiting.nodes.iter().any(|one| one.name == name);
    if let Some(name) = names.iter().find(|name| !waits(name)) {
        return Err(Failure::Refused(format!(
            "no node {name} waits for approval (`meshctl approve --cluster` lists those that do)"
        )));
    }
    let patch = json!({ "spec": { "approved": true } }).to_string();
    let mut approved = Vec::new();
    for name in names {
        let words = ["patch", "meshnode", &name, "--type=merge", "-p", &patch];
        let done = kubectl::done(&words, "", Duration::ZERO).await;
        done.map_err(Failure::Cluster)?;
        approved.push(ApprovedNode { name, file: None });
    }
    Ok(Approved { approved })
}

impl From<ListWaitingResponse> for Waiting {
    fn from(said: ListWaitingResponse) -> Self {
        let node = |said: mesh_api::admin::WaitingReport| {
            let address = Some(said.address).filter(|address| !address.is_empty());
            let from = address.as_ref().map(|address| format!(" from {address}"));
            Applicant {
                name: said.name,
                since_unix_s: Some(said.since_unix_s),
                request: format!("key {}{}", said.public_key, from.unwrap_or_default()),
                public_key: Some(said.public_key),
                address,
            }
        };
        Self {
            manual: said.manual,
            nodes: said.nodes.into_iter().map(node).collect(),
        }
    }
}

impl Waiting {
    /// By what MeshNodes' statuses say.
    fn in_cluster(config: &Value, nodes: &Value) -> Self {
        let word = |value: &Value, path: &str| {
            let word = value.pointer(path).and_then(Value::as_str);
            word.unwrap_or_default().to_owned()
        };
        let applicant = |node: &Value| {
            let conditions = node.pointer("/status/conditions")?.as_array()?;
            let mut waits = conditions.iter().filter(|one| {
                word(one, "/type") == "Joined" && word(one, "/reason") == "AwaitingApproval"
            });
            let waits = waits.next()?;
            let since = word(waits, "/lastTransitionTime").parse::<Timestamp>();
            Some(Applicant {
                name: word(node, "/metadata/name"),
                since_unix_s: since.ok().map(Timestamp::as_second),
                request: word(waits, "/message"),
                public_key: None,
                address: None,
            })
        };
        let approved = |node: &Value| node.pointer("/spec/approved") == Some(&true.into());
        let items = nodes.get("items").and_then(Value::as_array);
        let items = items.into_iter().flatten().filter(|node| !approved(node));
        Self {
            manual: word(config, "/spec/joinApproval") == "manual",
            nodes: items.filter_map(applicant).collect(),
        }
    }
}

impl Report for Waiting {
    fn text(&self, colours: bool) -> String {
        if self.nodes.is_empty() {
            return match self.manual {
                true => "nobody waits\n".to_owned(),
                false => "nobody waits: whoever has a good token is in at once (joinApproval: automatic)\n".to_owned(),
            };
        }
        let now_unix_s = Timestamp::now().as_second();
        let row = |node: &Applicant| -> Vec<Cell> {
            let waits = node.since_unix_s.map(|since_unix_s| {
                duration(u64::try_from(now_unix_s - since_unix_s).unwrap_or_default())
            });
            let waits = waits.unwrap_or_else(|| "-".to_owned());
            vec![(&node.name).into(), waits.into(), (&node.request).into()]
        };
        let rows = self.nodes.iter().map(row).collect();
        table(&["NODE", "WAITS", "ASKED WITH"], rows, colours)
    }
}

impl Report for Approved {
    fn text(&self, _colours: bool) -> String {
        let line = |node: &ApprovedNode| {
            let place = node.file.as_deref().unwrap_or("the cluster");
            format!(
                "node {} may join, as its MeshNode in {} says: it asks again within half a minute\n",
                printable(&node.name),
                printable(place)
            )
        };
        self.approved.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_in_a_cluster_is_read_from_the_statuses() {
        let node = |name: &str, approved: bool, reason: &str| {
            json!({
                "metadata": {"name": name},
                "spec": {"approved": approved},
                "status": {"conditions": [
                    {"type": "Accepted", "reason": "Accepted"},
                    {"type": "Joined", "reason": reason, "lastTransitionTime": "1970-01-01T00:01:40Z",
                     "message": "it asked to join with key K"},
                ]},
            })
        };
        let nodes = json!({"items": [
            node("a", false, "AwaitingApproval"),
            node("b", true, "AwaitingApproval"),
            node("c", true, "Joined"),
            {"metadata": {"name": "d"}, "spec": {}},
        ]});
        let config = json!({"spec": {"joinApproval": "manual"}});
        let waiting = Waiting::in_cluster(&config, &nodes);
        let names: Vec<_> = waiting.nodes.iter().map(|one| one.name.as_str()).collect();
        assert_eq!((waiting.manual, names), (true, vec!["a"]));
        assert_eq!(waiting.nodes[0].since_unix_s, Some(100));
        let nobody = Waiting::in_cluster(&Value::Null, &Value::Null);
        assert!(!nobody.manual && nobody.nodes.is_empty());
    }
}
