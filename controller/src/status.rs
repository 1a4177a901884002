//! What is to be written about the objects of a cluster: statuses of Holdfast's own kinds, Events
//! about others. Pure: from what the mesh is to the differences from what stands there.

use std::{collections::BTreeMap, net::IpAddr};

use k8s_openapi::jiff::Timestamp;
use mesh_api::control::{NodeReport, node_report::Nat};
use mesh_core::snapshot::{Node, ServiceName};
use mesh_identity::certificate::node_lifetime;
use mesh_wire::id::{NodeId, NodeName};
use serde_json::{Map, Value, json};

use crate::{
    cluster::{Cluster, Item},
    desired::Desired,
    manifests::{Kind, Object, ObjectId},
};

pub use self::telling::Event;
use self::telling::told;

mod telling;

/// How often a connected node's `lastSeen` is written: for 100,000 nodes, 28 writes a second.
/// What else a status has is written when it changes.
pub const LAST_SEEN_S: i64 = 3600;

/// How often a connected node's paths are written, if they are others: they come and go with every conversation. What else
/// is written takes them along.
pub const PATHS_S: i64 = 600;

/// How long after its start the controller says of no node that it is not connected: they all come
/// back at their own pace, within half a minute (`RETRY_MAX` of the agent).
pub const START_GRACE_S: i64 = 90;

/// The reason of a node that somebody has to let in.
const AWAITING_APPROVAL: &str = "AwaitingApproval";

/// A node renews its certificate when half of it is over, so that one with less than a quarter left is late by as much.
const RENEWAL_OVERDUE_PART: u32 = 4;

/// Longest time within which a node may say that it comes again: who names more is late after that.
pub const RETURNS_WITHIN_S_MAX: u32 = 86_400;

/// When a node was last seen, and with which generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Whether it is connected.
    pub connected: bool,
    /// When its stream last began, said something or ended, as Unix seconds.
    pub at_unix_s: i64,
    /// The generation that it said it had.
    pub generation: u64,
    /// It ends its streams itself, and comes again within so long; 0: it stays, and its stream's end is its own.
    pub returns_within_s: u32,
    /// When the certificate ends that it showed or was given last, as Unix seconds.
    pub certificate_ends_unix_s: Option<i64>,
    /// What else it said of itself.
    pub report: Report,
}

impl Seen {
    /// Whether the node is connected, or away and not missed yet.
    #[must_use]
    pub fn is_here(&self, now_unix_s: i64) -> bool {
        self.connected || self.missed_at_unix_s().is_some_and(|at| now_unix_s < at)
    }

    /// Until when nobody misses a node that comes and goes: one visit may fail.
    fn missed_at_unix_s(&self) -> Option<i64> {
        let within_s = i64::from(self.returns_within_s.min(RETURNS_WITHIN_S_MAX));
        (within_s > 0).then(|| self.at_unix_s + 2 * within_s + START_GRACE_S)
    }
}

/// What a node says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Report {
    /// What is in front of its socket, in the words of the MeshNode's status; `None`: it does not know.
    pub nat: Option<&'static str>,
    /// How many peers it reaches without a relay, through one, and not at all; `None`: it did not say.
    pub paths: Option<[u32; 3]>,
}

impl From<NodeReport> for Report {
    fn from(said: NodeReport) -> Self {
        Self {
            nat: match said.nat() {
                Nat::Unknown => None,
                Nat::None => Some("None"),
                Nat::Easy => Some("Easy"),
                Nat::Hard => Some("Hard"),
                Nat::UdpBlocked => Some("UDPBlocked"),
            },
            paths: Some([
                said.direct_peers,
                said.relayed_peers,
                said.unreachable_peers,
            ]),
        }
    }
}

/// A node that waits for approval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pending {
    /// Its WireGuard key.
    pub id: NodeId,
    /// From where it asked last.
    pub address: Option<IpAddr>,
    /// When it first asked with this key, as Unix seconds.
    pub since_unix_s: i64,
}

/// Which controller this is, among those of the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role<'a> {
    /// The only one.
    Sole,
    /// The one of this name, which speaks of all objects, and of nodes that no other speaks of.
    Leader(&'a str),
    /// The one of this name, which speaks of the nodes that are connected to it or wait at it.
    Follower(&'a str),
}

/// What statuses are made from.
#[derive(Debug)]
pub struct Mesh<'a> {
    /// Whose statuses.
    pub role: Role<'a>,
    /// The objects.
    pub cluster: &'a Cluster,
    /// What became of them.
    pub desired: &'a Desired,
    /// Nodes that were seen since the controller began.
    pub seen: &'a BTreeMap<NodeName, Seen>,
    /// Nodes that wait.
    pub pending: &'a BTreeMap<NodeName, Pending>,
    /// What is published.
    pub generation: u64,
    /// When the controller began.
    pub began_unix_s: i64,
    /// Now.
    pub now_unix_s: i64,
}

/// What is to be written.
#[derive(Debug, Default, PartialEq)]
pub struct Due {
    /// Statuses that are others than those that stand there.
    pub statuses: BTreeMap<ObjectId, Value>,
    /// MeshNodes that nobody made yet.
    pub missing: Vec<NodeName>,
    /// What became of an object, and of which that is not Holdfast's something is left out.
    pub events: Vec<Event>,
}

/// A condition's status, reason and message.
type Verdict = (&'static str, &'static str, String);

/// What is to be written now.
#[must_use]
pub fn due(mesh: &Mesh) -> Due {
    let mut due = Due::default();
    let leads = !matches!(mesh.role, Role::Follower(_));
    let ready = mesh.ready_endpoints();
    for item in mesh.cluster.items() {
        if !leads && !mesh.has_node(item) {
            continue;
        }
        if is_own(item.id.kind) {
            if let Some(status) = mesh.changed(item, &ready) {
                due.events.extend(told(item, &status, mesh.now_unix_s));
                due.statuses.insert(item.id.clone(), status);
            }
        } else if let Some(text) = mesh.wrong(item) {
            due.events.push(Event::left_out(item, &text));
        }
    }
    let joined = mesh.desired.nodes.keys().filter(|_| leads);
    let missing = joined.chain(mesh.pending.keys()).filter(|name| {
        let id = mesh_node_id(name);
        mesh.cluster.get(&id).is_none()
    });
    due.missing = missing.cloned().collect();
    due.missing.dedup();
    due
}

/// The id of the MeshNode of the node `name`.
#[must_use]
pub fn mesh_node_id(name: &NodeName) -> ObjectId {
    ObjectId {
        kind: Kind::MeshNode,
        namespace: String::new(),
        name: name.to_string(),
    }
}

/// Whether `kind` is one of Holdfast's own.
#[must_use]
pub fn is_own(kind: Kind) -> bool {
    match kind {
        Kind::MeshNode
        | Kind::MeshRelay
        | Kind::ExternalPeer
        | Kind::MeshConfig
        | Kind::MeshService
        | Kind::MeshPolicy
        | Kind::SiteRoute
        | Kind::Community => true,
        Kind::Service
        | Kind::EndpointSlice
        | Kind::Node
        | Kind::NetworkPolicy
        | Kind::Pod
        | Kind::Namespace => false,
    }
}

impl Mesh<'_> {
    /// Whether `item` is a node that is connected to this controller, waits at it, or left it last.
    fn has_node(&self, item: &Item) -> bool {
        let name = item.id.name.as_str();
        item.id.kind == Kind::MeshNode
            && (self.pending.contains_key(name)
                || self.seen.contains_key(name) && self.speaks_of(item))
    }

    /// Whether this controller says how the node's connection is. Another one that is gone for so long
    /// that it would have said something speaks no more.
    fn speaks_of(&self, item: &Item) -> bool {
        let own = match self.role {
            Role::Sole => return true,
            Role::Leader(own) | Role::Follower(own) => own,
        };
        let seen = self.seen.get(item.id.name.as_str());
        let text = |name: &str| item.status.get(name).and_then(Value::as_str);
        let said = text("controller");
        let silent = || {
            let last = item.status.get("lastSeen").and_then(time_in);
            let age_s = last.map_or(i64::MAX, |last| {
                self.now_unix_s.saturating_sub(last.as_second())
            });
            age_s > 2 * LAST_SEEN_S
        };
        seen.is_some_and(|seen| seen.connected) || said.is_none_or(|said| said == own) || silent()
    }

    /// The status of `item`, if it is another than the one that stands there.
    fn changed(&self, item: &Item, ready: &BTreeMap<&ServiceName, usize>) -> Option<Value> {
        let accepted = self.condition(item, "Accepted", self.accepted(item));
        let status = if item.id.kind == Kind::MeshNode {
            self.mesh_node(item, accepted)
        } else {
            let mut status = Map::new();
            status.insert("observedGeneration".to_owned(), json!(item.generation));
            let mut conditions = vec![accepted];
            let ready = balanced(item).and_then(|service| ready.get(service));
            if let Some(&endpoints) = ready {
                let verdict = endpoints_ready(endpoints);
                conditions.push(self.condition(item, "EndpointsReady", verdict));
            }
            status.insert("conditions".to_owned(), json!(conditions));
            Value::Object(status)
        };
        (status != item.status).then_some(status)
    }

    /// How many endpoints in the cluster take traffic, of each service that a MeshService speaks of.
    fn ready_endpoints(&self) -> BTreeMap<&ServiceName, usize> {
        let services = self.cluster.items().filter_map(balanced);
        let mut ready: BTreeMap<_, _> = services.map(|service| (service, 0)).collect();
        if ready.is_empty() {
            return ready; // Most clusters have none, and some have 100,000 slices.
        }
        let objects = self.cluster.items().filter_map(|item| item.loaded.as_ref());
        for loaded in objects {
            if let Object::Slice(service, slice) = &loaded.object
                && let Some(count) = ready.get_mut(service)
            {
                *count += slice.endpoints.iter().filter(|one| one.ready).count();
            }
        }
        ready
    }

    fn accepted(&self, item: &Item) -> Verdict {
        if let Some(problem) = &item.problem {
            let before = if item.loaded.is_some() {
                " (what it said before stays in force)"
            } else {
                ""
            };
            return ("False", "Invalid", format!("{problem}{before}"));
        }
        match self.desired.rejected.get(&item.id) {
            None => {
                let text = "the mesh acts on it".to_owned();
                ("True", "Accepted", text)
            }
            Some(rejected) => ("False", "Conflict", rejected.text.clone()),
        }
    }

    /// What is wrong with an object that is not ours.
    fn wrong(&self, item: &Item) -> Option<String> {
        let own = item.problem.as_ref().map(ToString::to_string);
        let rejected = self.desired.rejected.get(&item.id);
        own.or_else(|| Some(rejected?.text.clone()))
    }

    fn mesh_node(&self, item: &Item, accepted: Value) -> Value {
        let name = item.id.name.as_str();
        let node = self.desired.nodes.get(name);
        let speaks = self.speaks_of(item);
        let seen = self.seen.get(name).copied().filter(|_| speaks);
        let old = &item.status;
        let controller = match self.role {
            Role::Leader(own) | Role::Follower(own) if seen.is_some() => json!(own),
            Role::Sole | Role::Leader(_) | Role::Follower(_) => old["controller"].clone(),
        };
        let connected = match seen {
            None if !speaks => old["connected"] == true,
            Some(seen) => seen.is_here(self.now_unix_s),
            // It may come back in a moment, or when it said.
            None if self.now_unix_s - self.began_unix_s < START_GRACE_S => old["connected"] == true,
            None => {
                let missed_at = time_in(&old["missedAt"]);
                missed_at.is_some_and(|at| self.now_unix_s < at.as_second())
            }
        };
        let missed_at = match seen {
            // Written once a visit, when it is over.
            Some(seen) if seen.connected && seen.returns_within_s > 0 => old["missedAt"].clone(),
            Some(seen) => seen
                .missed_at_unix_s()
                .map_or(Value::Null, |at| json!(moment(at))),
            None => old["missedAt"].clone(),
        };
        let visits = seen.map_or(!old["missedAt"].is_null(), |seen| seen.returns_within_s > 0);
        let mut status = Map::new();
        let mut set = |name: &str, value: Value| {
            if !value.is_null() {
                status.insert(name.to_owned(), value);
            }
        };
        set("observedGeneration", json!(item.generation));
        set("connected", json!(connected));
        set("controller", controller);
        let paths = seen.and_then(|seen| seen.report.paths);
        let paths = paths.map(|[direct, relayed, unreachable]| json!({"direct": direct, "relayed": relayed, "unreachable": unreachable}));
        let other_paths = paths.as_ref().is_some_and(|paths| *paths != old["paths"]);
        let every_s = if other_paths { PATHS_S } else { LAST_SEEN_S };
        let last_seen = self.last_seen(&old["lastSeen"], seen, every_s);
        set("lastSeen", last_seen.clone());
        set("missedAt", missed_at);
        let nat = seen.and_then(|seen| seen.report.nat);
        set(
            "nat",
            nat.map_or_else(|| old["nat"].clone(), |nat| json!(nat)),
        );
        if let Some(node) = node {
            set("wireguardPublicKey", json!(node.id.to_string()));
            set(
                "overlayAddresses",
                json!([node.overlay_v4, node.overlay_v6]),
            );
        }
        let joined = self.condition(item, "Joined", self.joined(item, node));
        let ready = readiness(node.is_some(), connected, visits);
        let ready = self.condition(item, "Ready", ready);
        let mut conditions = vec![accepted, joined, ready];
        let ends = seen.and_then(|seen| seen.certificate_ends_unix_s);
        let ends = ends.or_else(|| Some(time_in(&old["certificateExpires"])?.as_second()));
        if let Some(ends_unix_s) = ends.filter(|_| node.is_some()) {
            set("certificateExpires", json!(moment(ends_unix_s)));
            let verdict = self.certificate(ends_unix_s);
            conditions.push(self.condition(item, "CertificateCurrent", verdict));
        }
        set("conditions", json!(conditions));
        for name in ["snapshotGeneration", "snapshotTime", "paths"] {
            set(name, old[name].clone());
        }
        // These alone are no reason to write: they change with everything in the mesh.
        if let Some(seen) = seen
            && Value::Object(status.clone()) != *old
        {
            let mut set = |name: &str, value: Value| status.insert(name.to_owned(), value);
            set("snapshotGeneration", json!(seen.generation));
            if seen.generation >= self.generation {
                set("snapshotTime", last_seen);
            }
            if let Some(paths) = paths {
                set("paths", paths);
            }
        }
        Value::Object(status)
    }

    fn joined(&self, item: &Item, node: Option<&Node>) -> Verdict {
        let name = item.id.name.as_str();
        if let Some(pending) = self.pending.get(name) {
            let from = pending.address.map(|address| format!("from {address} "));
            let text = format!(
                "it asked to join {}with key {}: set spec.approved to true to let it in",
                from.unwrap_or_default(),
                pending.id
            );
            return ("False", AWAITING_APPROVAL, text);
        }
        match node {
            Some(_) => ("True", "Joined", "it is in the mesh".to_owned()),
            // It waits at another controller.
            None if self.role != Role::Sole
                && let Some(message) = waiting(item) =>
            {
                ("False", AWAITING_APPROVAL, message)
            }
            None => match self.desired.removed.get(name) {
                Some(&since_unix_s) => {
                    let since = moment(since_unix_s);
                    let text = format!("it was taken out of the mesh on {since}");
                    ("False", "Removed", text)
                }
                None => {
                    let text = "no node of this name has joined yet".to_owned();
                    ("False", "NeverJoined", text)
                }
            },
        }
    }

    /// Of a node whose certificate ends then.
    fn certificate(&self, ends_unix_s: i64) -> Verdict {
        let lifetime = node_lifetime(self.desired.mesh.offline_limit);
        let overdue_s = (lifetime / RENEWAL_OVERDUE_PART).as_secs();
        let left_s = ends_unix_s - self.now_unix_s;
        let ends = moment(ends_unix_s);
        if left_s <= 0 {
            let text = format!(
                "its certificate ended on {ends}: no controller and no relay lets the node in, until it joins again with a token"
            );
            ("False", "Expired", text)
        } else if u64::try_from(left_s).is_ok_and(|left_s| left_s < overdue_s) {
            let text = format!(
                "its certificate ends on {ends} and was not renewed: the node has to reach a controller before, which renews it"
            );
            ("False", "RenewalOverdue", text)
        } else {
            // Without the time: it would be written with each renewal.
            let text = "the node renews its certificate by itself".to_owned();
            ("True", "Current", text)
        }
    }

    fn last_seen(&self, old: &Value, seen: Option<Seen>, every_s: i64) -> Value {
        let Some(seen) = seen else {
            return old.clone();
        };
        if !seen.connected {
            return json!(moment(seen.at_unix_s));
        }
        match time_in(old) {
            Some(before) if (0..every_s).contains(&(self.now_unix_s - before.as_second())) => {
                old.clone()
            }
            Some(_) | None => json!(moment(self.now_unix_s)),
        }
    }

    /// A condition, with the time of the one that stands there if that says the same.
    fn condition(&self, item: &Item, name: &str, (status, reason, message): Verdict) -> Value {
        let old = item.status.get("conditions").and_then(Value::as_array);
        let old = old.and_then(|all| {
            all.iter()
                .find(|one| one["type"] == name && one["status"] == status)
        });
        let since = old.and_then(|old| old["lastTransitionTime"].as_str());
        let since = since.map_or_else(|| moment(self.now_unix_s), str::to_owned);
        json!({
            "type": name,
            "status": status,
            "observedGeneration": item.generation,
            "lastTransitionTime": since,
            "reason": reason,
            "message": message,
        })
    }
}

/// The service that `item` speaks of, if it is a MeshService.
fn balanced(item: &Item) -> Option<&ServiceName> {
    let Object::Balance(service, _) = &item.loaded.as_ref()?.object else {
        return None;
    };
    Some(service)
}

fn endpoints_ready(count: usize) -> Verdict {
    // Without the number: it would be written each time that it changes.
    if count > 0 {
        let text = "endpoints of the Service of this name are ready".to_owned();
        ("True", "Ready", text)
    } else {
        let text = "no endpoint of a Service of this name is ready: whoever connects is refused";
        ("False", "NoEndpoint", text.to_owned())
    }
}

/// What stands in `item` of its waiting, if it waits.
fn waiting(item: &Item) -> Option<String> {
    let conditions = item.status.get("conditions")?.as_array()?;
    let waits = conditions
        .iter()
        .find(|one| one["type"] == "Joined" && one["reason"] == AWAITING_APPROVAL)?;
    Some(waits["message"].as_str()?.to_owned())
}

fn readiness(joined: bool, connected: bool, visits: bool) -> Verdict {
    match (joined, connected) {
        (false, _) => ("False", "NotJoined", "it is not in the mesh".to_owned()),
        (true, true) if visits => {
            let text = "its way out is metered: it comes now and then, and serves what it has on its disk in between";
            ("True", "Visits", text.to_owned())
        }
        (true, true) => {
            let text = "it has a stream to the controller".to_owned();
            ("True", "Connected", text)
        }
        (true, false) => {
            let text =
                "it has no stream to the controller; it serves what it has on its disk".to_owned();
            ("False", "Disconnected", text)
        }
    }
}

fn time_in(status: &Value) -> Option<Timestamp> {
    status.as_str()?.parse().ok()
}

fn moment(unix_s: i64) -> String {
    let moment = Timestamp::from_second(unix_s).unwrap_or(Timestamp::UNIX_EPOCH);
    moment.to_string()
}

#[cfg(test)]
mod tests;
