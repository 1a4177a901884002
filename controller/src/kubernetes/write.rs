//! Writing to the API server: statuses, MeshNodes that nobody made, Events, and where the agents
//! find the mesh's identity. All by server-side apply as one field manager, a bounded number a second.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, future::ready, stream};
use kube::{
    Api, Client, Error as ClientError,
    api::{Patch, PatchParams, PostParams},
    core::DynamicObject,
};
use mesh_identity::token::MeshAnchor;
use mesh_wire::id::NodeName;
use ring::digest::{SHA256, digest};
use serde_json::{Value, json};
use tokio::{
    task::spawn_blocking,
    time::{Instant, MissedTickBehavior, interval},
};

use super::{client_error, read::api_resource};
use crate::{
    manifests::{Kind, ObjectId},
    state::State,
    status::{Due, Event, mesh_node_id},
};

/// Who owns the fields that the controller writes.
const FIELD_MANAGER: &str = "holdfast-controller";

/// The ConfigMap in the controller's namespace that tells agents which mesh this is, and its key.
pub(crate) const ANCHOR_CONFIG_MAP: &str = "holdfast-mesh";

/// The key in it.
pub(crate) const ANCHOR_KEY: &str = "mesh";

/// How often it is worked out what is to be written.
const ROUND: Duration = Duration::from_secs(1);

/// Most writes in a round. 100,000 nodes need 28 a second (`LAST_SEEN_S`); an API server bears
/// hundreds. What does not fit comes in a later round.
const WRITES_MAX: usize = 50;

/// Most Events in a round: they are for people.
const EVENTS_MAX: usize = 5;

/// Most Events that wait for their round, some 1 KiB each: as many as 200 s take. A change is told once, so that when there
/// are more, one is left out and counted; the object's status says it all the same.
const EVENTS_WAITING_MAX: usize = 1000;

/// Writes under way at once.
const AT_ONCE: usize = 8;

/// What was just written, and what was just refused, is not written again so soon: the watch takes its
/// time to tell, and a refusal rarely goes away by itself.
const AGAIN: Duration = Duration::from_secs(30);

/// Most Events that are remembered as told: at 40 bytes, 400 KB. Beyond, all are told anew, and the
/// API server knows most by their names.
const TOLD_MAX: usize = 10_000;

/// Writes until it is dropped.
pub(super) async fn run(state: Arc<State>, client: Client, namespace: String) {
    let mut writer = Writer {
        client,
        anchored: false,
        sent: BTreeMap::new(),
        told: BTreeSet::new(),
        waiting: VecDeque::new(),
        events_left_out: 0,
    };
    let mut rounds = interval(ROUND);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        rounds.tick().await;
        if !writer.anchored {
            let anchor = MeshAnchor {
                trust_domain: state.authority().trust_domain().to_owned(),
                mesh: state.authority().mesh_id(),
            };
            writer.anchored = writer.anchor(&namespace, &anchor).await;
        }
        let led = state.leads();
        let asking = state.clone();
        // A panic there is one of the next round too, and the process's own tasks tell it.
        if let Ok(Some(due)) = spawn_blocking(move || asking.due()).await {
            // A leader that is none any more leaves the rest to the next one.
            let refused = writer.write(due, || state.leads() || !led).await;
            state.counters().writes_refused(refused);
            let left_out = std::mem::take(&mut writer.events_left_out);
            state.counters().events_left_out(left_out);
        }
    }
}

struct Writer {
    client: Client,
    anchored: bool,
    /// What was written or refused lately, by object.
    sent: BTreeMap<ObjectId, (Value, Instant)>,
    /// Events that were told or wait, by their names.
    told: BTreeSet<String>,
    /// Those that wait.
    waiting: VecDeque<(String, Event)>,
    events_left_out: usize,
}

/// One write.
enum Job {
    Status(ObjectId, Value),
    Make(NodeName),
    Tell(String, Event),
}

impl Writer {
    /// Returns how many writes were not taken.
    async fn write(&mut self, due: Due, may: impl Fn() -> bool) -> usize {
        let now = Instant::now();
        self.sent.retain(|_, (_, at)| now < *at + AGAIN);
        let jobs = self.jobs(due, now);
        let allowed = stream::iter(jobs).take_while(|_| ready(may()));
        let done: Vec<_> = allowed
            .map(|job| perform(self.client.clone(), job))
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        let refused: Vec<_> = done.into_iter().flatten().collect();
        for (what, error) in &refused {
            tracing::warn!(%what, %error, "the API server took it not; trying again later");
        }
        refused.len()
    }

    fn jobs(&mut self, due: Due, now: Instant) -> Vec<Job> {
        let mut jobs = Vec::new();
        for name in due.missing {
            let id = mesh_node_id(&name);
            if jobs.len() < WRITES_MAX && !self.sent.contains_key(&id) {
                self.sent.insert(id, (Value::Null, now));
                jobs.push(Job::Make(name));
            }
        }
        for (id, status) in due.statuses {
            let lately = self.sent.get(&id);
            if jobs.len() < WRITES_MAX && lately.is_none_or(|(sent, _)| *sent != status) {
                self.sent.insert(id.clone(), (status.clone(), now));
                jobs.push(Job::Status(id, status));
            }
        }
        if self.told.len() > TOLD_MAX {
            self.told.clear();
        }
        for event in due.events {
            let name = event_name(&event);
            if self.told.contains(&name) {
                continue;
            }
            // What still holds is due again in the next round.
            if self.waiting.len() < EVENTS_WAITING_MAX {
                self.told.insert(name.clone());
                self.waiting.push_back((name, event));
            } else if event.period.is_some() {
                self.events_left_out += 1;
            }
        }
        let room = EVENTS_MAX.min(self.waiting.len());
        let turn = self.waiting.drain(..room);
        jobs.extend(turn.map(|(name, event)| Job::Tell(name, event)));
        jobs
    }

    /// Says in a ConfigMap which mesh this is, so that agents with a ServiceAccount token know the
    /// controller when they see it.
    async fn anchor(&self, namespace: &str, anchor: &MeshAnchor) -> bool {
        use k8s_openapi::api::core::v1::ConfigMap;
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
        let map = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": ANCHOR_CONFIG_MAP, "namespace": namespace},
            "data": BTreeMap::from([(ANCHOR_KEY, anchor.to_string())]),
        });
        let applied = maps
            .patch(ANCHOR_CONFIG_MAP, &apply(), &Patch::Apply(map))
            .await;
        if let Err(error) = &applied {
            let error = client_error(error);
            tracing::warn!(map = ANCHOR_CONFIG_MAP, %namespace, %error, "agents cannot learn yet which mesh this is");
        }
        applied.is_ok()
    }
}

fn apply() -> PatchParams {
    // Whoever else wrote there is wrong: a status is the controller's.
    PatchParams::apply(FIELD_MANAGER).force()
}

/// What failed, and why.
async fn perform(client: Client, job: Job) -> Option<(String, String)> {
    let (what, result) = match job {
        Job::Status(id, status) => {
            let what = format!("status of {id}");
            (what, write_status(client, &id, status).await)
        }
        Job::Make(name) => (format!("MeshNode {name}"), make(client, &name).await),
        Job::Tell(name, event) => {
            let what = format!("Event about {}", event.id);
            (what, tell(client, &name, &event).await)
        }
    };
    match result {
        Ok(()) => None,
        // Gone in the meantime, or there already.
        Err(ClientError::Api(status)) if matches!(status.code, 404 | 409) => None,
        Err(error) => Some((what, client_error(&error))),
    }
}

async fn write_status(client: Client, id: &ObjectId, status: Value) -> Result<(), ClientError> {
    let resource = api_resource(id.kind);
    let mut metadata = BTreeMap::from([("name", &id.name)]);
    let objects: Api<DynamicObject> = if id.namespace.is_empty() {
        Api::all_with(client, &resource)
    } else {
        metadata.insert("namespace", &id.namespace);
        Api::namespaced_with(client, &id.namespace, &resource)
    };
    let patch = Patch::Apply(json!({
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "metadata": metadata,
        "status": status,
    }));
    objects.patch_status(&id.name, &apply(), &patch).await?;
    Ok(())
}

async fn make(client: Client, name: &NodeName) -> Result<(), ClientError> {
    let resource = api_resource(Kind::MeshNode);
    let object = DynamicObject::new(name.as_str(), &resource).data(json!({"spec": {}}));
    let objects: Api<DynamicObject> = Api::all_with(client, &resource);
    let parameters = PostParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PostParams::default()
    };
    objects.create(&parameters, &object).await?;
    Ok(())
}

/// Always the same for the same, so that neither a controller that begins anew nor another one tells anything twice.
fn event_name(event: &Event) -> String {
    let Event {
        uid,
        reason,
        note,
        period,
        ..
    } = event;
    let period = period.unwrap_or_default();
    let hash = digest(
        &SHA256,
        format!("{uid}\0{reason}\0{note}\0{period}").as_bytes(),
    );
    let hash = hash.as_ref().iter().take(8);
    let hash: String = hash.map(|byte| format!("{byte:02x}")).collect();
    format!("holdfast-{hash}")
}

async fn tell(client: Client, name: &str, event: &Event) -> Result<(), ClientError> {
    use k8s_openapi::api::events::v1::Event as KubeEvent;
    let resource = api_resource(event.id.kind);
    // The API's rule for objects without a namespace.
    let namespace = match event.id.namespace.as_str() {
        "" => "default",
        namespace => namespace,
    };
    let mut regarding = BTreeMap::from([
        ("apiVersion", &resource.api_version),
        ("kind", &resource.kind),
        ("name", &event.id.name),
        ("uid", &event.uid),
    ]);
    if !event.id.namespace.is_empty() {
        regarding.insert("namespace", &event.id.namespace);
    }
    let object = json!({
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": namespace},
        "eventTime": k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime(k8s_openapi::jiff::Timestamp::now()),
        "reportingController": "holdfast.dev/mesh-controller",
        "reportingInstance": FIELD_MANAGER,
        "action": "Reconcile",
        "reason": event.reason,
        "type": if event.is_warning { "Warning" } else { "Normal" },
        "note": event.note,
        "regarding": regarding,
    });
    let object: KubeEvent = serde_json::from_value(object).map_err(ClientError::SerdeError)?;
    let events: Api<KubeEvent> = Api::namespaced(client, namespace);
    events.create(&PostParams::default(), &object).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_just_written_is_not_written_again_before_the_watch_told() {
        let mut writer = writer();
        let due = || Due {
            statuses: [(id("a"), json!({"x": 1}))].into(),
            missing: vec!["b".parse().unwrap()],
            events: Vec::new(),
        };
        let now = Instant::now();
        assert_eq!(writer.jobs(due(), now).len(), 2);
        assert_eq!(writer.jobs(due(), now).len(), 0);
        let other = Due {
            statuses: [(id("a"), json!({"x": 2}))].into(),
            ..Due::default()
        };
        assert_eq!(writer.jobs(other, now).len(), 1);
    }

    #[tokio::test]
    async fn rounds_are_bounded_and_nothing_is_told_twice() {
        let mut writer = writer();
        let due = || Due {
            statuses: (0..200)
                .map(|n| (id(&format!("n{n}")), json!({})))
                .collect(),
            missing: Vec::new(),
            events: (0..8).map(|number| event(number, None)).collect(),
        };
        let now = Instant::now();
        assert_eq!(writer.jobs(due(), now).len(), WRITES_MAX + EVENTS_MAX);
        assert_eq!(writer.jobs(due(), now).len(), WRITES_MAX + 3);
        assert_eq!(writer.jobs(due(), now).len(), WRITES_MAX);
        let name = |number, period| event_name(&event(number, period));
        assert_eq!(name(1, Some(1)), name(1, Some(1)));
        assert_ne!(name(1, Some(1)), name(2, Some(1)));
        assert_ne!(name(1, Some(1)), name(1, Some(2)));
    }

    #[tokio::test]
    async fn of_more_events_than_may_wait_those_of_changes_are_counted() {
        let mut writer = writer();
        let due = |period| Due {
            events: (0..EVENTS_WAITING_MAX + 9)
                .map(|number| event(number, period))
                .collect(),
            ..Due::default()
        };
        let now = Instant::now();
        assert_eq!(writer.jobs(due(Some(1)), now).len(), EVENTS_MAX);
        assert_eq!(writer.events_left_out, 9);
        // What still holds gets its turn when there is room.
        let mut writer = self::writer();
        let mut told = 0;
        for _ in 0..=EVENTS_WAITING_MAX / EVENTS_MAX + 1 {
            told += writer.jobs(due(None), now).len();
        }
        assert_eq!((told, writer.events_left_out), (EVENTS_WAITING_MAX + 9, 0));
    }

    fn writer() -> Writer {
        let uri = "https://127.0.0.1:1".parse().unwrap();
        Writer {
            client: Client::try_from(kube::Config::new(uri)).unwrap(),
            anchored: true,
            sent: BTreeMap::new(),
            told: BTreeSet::new(),
            waiting: VecDeque::new(),
            events_left_out: 0,
        }
    }

    fn id(name: &str) -> ObjectId {
        mesh_node_id(&name.parse().unwrap())
    }

    fn event(number: usize, period: Option<i64>) -> Event {
        Event {
            id: ObjectId {
                kind: Kind::Service,
                namespace: "d".to_owned(),
                name: "s".to_owned(),
            },
            uid: number.to_string(),
            is_warning: true,
            reason: "NotInMesh",
            note: "odd".to_owned(),
            period,
        }
    }
}
