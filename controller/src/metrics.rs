//! What Prometheus is shown of a controller. Pure: what is counted and known goes in, a page comes out.
//!
//! Names of nodes and objects are no labels: `meshctl` tells about single ones.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use mesh_api::{
    control::{SyncResponse, resource_key::Kind},
    resources::SYNC_BYTES_MAX,
};
use mesh_daemon::metrics::{Labels, Page};
use prost::Message as _;
use tonic::{Code, Response, Status};

/// gRPC's status codes are 0 to 16 (`Code`).
const CODES: usize = 17;

/// What agents ask.
#[derive(Debug, Clone, Copy)]
pub enum Method {
    /// To be let in.
    Join,
    /// For a new certificate.
    Renew,
    /// For a stream of changes.
    Sync,
}

impl Method {
    const ALL: [(Self, &str); 3] = [
        (Self::Join, "join"),
        (Self::Renew, "renew"),
        (Self::Sync, "sync"),
    ];
}

/// What agents are told in a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Changes,
    /// What differs from what the node has, found by digests.
    Differing,
    Everything,
    /// For digests.
    Question,
}

impl Answer {
    const ALL: [(Self, &str); 4] = [
        (Self::Changes, "changes"),
        (Self::Differing, "differing"),
        (Self::Everything, "everything"),
        (Self::Question, "question"),
    ];

    fn of(response: &SyncResponse) -> Self {
        match response {
            asked if asked.digests_wanted > 0 => Self::Question,
            told if told.full => Self::Everything,
            told if told.compared.is_some() => Self::Differing,
            _ => Self::Changes,
        }
    }
}

/// Counts since the controller began.
#[derive(Debug, Default)]
pub struct Counters {
    requests: [[AtomicU64; CODES]; Method::ALL.len()],
    answers: [AtomicU64; Answer::ALL.len()],
    answer_bytes: [AtomicU64; Answer::ALL.len()],
    /// Times that the desired state was worked out: and could not be saved, and was.
    worked_out: [AtomicU64; 2],
    worked_out_ns: AtomicU64,
    refused_writes: AtomicU64,
    left_out_events: AtomicU64,
}

impl Counters {
    /// A request of an agent was answered so.
    pub fn answered<T>(&self, method: Method, answer: &Result<Response<T>, Status>) {
        let code = answer.as_ref().map_or_else(Status::code, |_| Code::Ok);
        let of_method = self.requests.get(method as usize);
        add(of_method.and_then(|codes| codes.get(code as usize)), 1);
    }

    /// An agent is told this.
    pub fn told(&self, response: &SyncResponse) {
        let kind = Answer::of(response) as usize;
        add(self.answers.get(kind), 1);
        add(self.answer_bytes.get(kind), wide(response.encoded_len()));
    }

    /// The desired state was worked out, in so long.
    pub fn worked_out(&self, took: Duration, saved: bool) {
        add(self.worked_out.get(usize::from(saved)), 1);
        let took_ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        add(Some(&self.worked_out_ns), took_ns);
    }

    /// The API server took so many writes not.
    pub fn writes_refused(&self, count: usize) {
        add(Some(&self.refused_writes), wide(count));
    }

    /// So many changes were not told in Events.
    pub fn events_left_out(&self, count: usize) {
        add(Some(&self.left_out_events), wide(count));
    }
}

/// What a controller knows now.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Of the desired state.
    pub generation: u64,
    /// When that was made.
    pub made_unix_ms: u64,
    /// Nodes that are in the mesh.
    pub nodes: usize,
    /// Agents with a stream.
    pub agents_connected: usize,
    /// Those of them that did not say yet that they have the generation.
    pub agents_behind: usize,
    /// Since the change that waits longest for one of them.
    pub behind_longest: Duration,
    /// Sentences that `meshctl controller status` has.
    pub problems: usize,
    /// Resources in it.
    pub resources: BTreeMap<Kind, u64>,
    /// All of them, encoded.
    pub desired_bytes: usize,
    /// The file on this machine.
    pub store_bytes: u64,
    /// Whether this controller writes what only one may write.
    pub leads: bool,
    /// Whether it answers agents.
    pub serves: bool,
    /// Spans that the collector took, and that none did.
    pub trace_spans: [u64; 2],
    /// Joins under way.
    pub joins: usize,
    /// Bytes of large answers under way.
    pub large_answers_bytes: usize,
}

/// The whole page.
#[must_use]
pub fn page(facts: &Facts, counters: &Counters) -> Page {
    let mut page = Page::new("holdfast_controller");
    let version = (label("version", env!("CARGO_PKG_VERSION")), 1);
    page.gauges("build_info", "Which version runs", [version]);
    add_facts(&mut page, facts);
    let requests = Method::ALL.iter().zip(&counters.requests);
    let requests = requests.flat_map(|((_, method), codes)| {
        let codes = (0..).map(Code::from_i32).zip(codes);
        codes.filter_map(move |(code, count)| {
            let count = count.load(Relaxed);
            let labels = vec![
                ("method", (*method).to_owned()),
                ("code", format!("{code:?}")),
            ];
            (count > 0 || code == Code::Ok).then_some((labels, count))
        })
    });
    page.counters("requests", "Requests of agents, by gRPC's code", requests);
    for (name, help, counts) in [
        (
            "sync_answers",
            "What agents with a stream were told",
            &counters.answers,
        ),
        ("sync_answer_bytes", "Bytes of that", &counters.answer_bytes),
    ] {
        let kinds = Answer::ALL.iter().zip(counts);
        let kinds = kinds.map(|((_, kind), count)| (label("kind", kind), count.load(Relaxed)));
        page.counters(name, help, kinds);
    }
    let outcomes = ["failed", "saved"].iter().zip(&counters.worked_out);
    let outcomes =
        outcomes.map(|(outcome, count)| (label("outcome", outcome), count.load(Relaxed)));
    let help = "Times that the desired state was worked out";
    page.counters("reconciles", help, outcomes);
    let took = Duration::from_nanos(counters.worked_out_ns.load(Relaxed));
    page.seconds_total("reconcile", "Time that this took", took.as_secs_f64());
    page.counter(
        "cluster_writes_refused",
        "Statuses, MeshNodes and Events that the API server took not",
        counters.refused_writes.load(Relaxed),
    );
    let spans = ["sent", "dropped"].into_iter().zip(facts.trace_spans);
    let spans = spans.map(|(outcome, count)| (label("outcome", outcome), count));
    let help = "Spans of traces, by whether the collector took them";
    page.counters("trace_spans", help, spans);
    page.counter(
        "cluster_events_left_out",
        "Changes that were told in no Event, for too many waited",
        counters.left_out_events.load(Relaxed),
    );
    page
}

fn add_facts(page: &mut Page, facts: &Facts) {
    for (name, help, value) in [
        (
            "serves",
            "Whether agents are answered",
            u64::from(facts.serves),
        ),
        (
            "leads",
            "Whether this controller writes what only one may write",
            u64::from(facts.leads),
        ),
        (
            "generation",
            "Generation of the desired state",
            facts.generation,
        ),
        ("nodes", "Nodes of the mesh", wide(facts.nodes)),
        (
            "agents_connected",
            "Agents with a stream",
            wide(facts.agents_connected),
        ),
        (
            "agents_behind",
            "Those of them that lack a generation",
            wide(facts.agents_behind),
        ),
        (
            "problems",
            "Sentences that `meshctl controller status` has about it",
            wide(facts.problems),
        ),
        (
            "desired_state_bytes",
            "Size of all resources, encoded",
            wide(facts.desired_bytes),
        ),
        (
            "desired_state_limit_bytes",
            "What is larger is not published",
            wide(SYNC_BYTES_MAX),
        ),
        ("store_bytes", "Size of the file", facts.store_bytes),
        ("joins_under_way", "Nodes being let in", wide(facts.joins)),
        (
            "large_answers_bytes",
            "Bytes of large answers that agents did not confirm yet",
            wide(facts.large_answers_bytes),
        ),
    ] {
        page.gauge(name, help, value);
    }
    let kinds = (1..).map_while(|number| Kind::try_from(number).ok());
    let resources = kinds.map(|kind| {
        let count = facts.resources.get(&kind).copied().unwrap_or_default();
        (label("kind", &kind.as_str_name().to_lowercase()), count)
    });
    page.gauges("resources", "Resources of the desired state", resources);
    let made = Duration::from_millis(facts.made_unix_ms).as_secs_f64();
    let help = "When the generation was made, since 1970";
    page.seconds("generation_timestamp", help, made);
    page.seconds(
        "agents_behind_longest",
        "Since the change that waits longest for an agent with a stream",
        facts.behind_longest.as_secs_f64(),
    );
}

fn add(counter: Option<&AtomicU64>, count: u64) {
    if let Some(counter) = counter {
        counter.fetch_add(count, Relaxed);
    }
}

fn label(name: &'static str, value: &str) -> Labels {
    vec![(name, value.to_owned())]
}

fn wide(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use mesh_api::control::Comparison;

    use super::*;

    #[test]
    fn a_controller_is_told_in_closed_sets_of_labels() {
        let counters = Counters::default();
        let joined: Result<Response<()>, Status> = Ok(Response::new(()));
        counters.answered(Method::Join, &joined);
        let refused: Result<Response<()>, Status> =
            Err(Status::permission_denied("node secret-customer"));
        counters.answered(Method::Join, &refused);
        counters.answered(Method::Sync, &refused);
        let everything = SyncResponse {
            full: true,
            store_id: vec![7; 8],
            ..SyncResponse::default()
        };
        counters.told(&everything);
        counters.told(&SyncResponse::default());
        counters.worked_out(Duration::from_millis(1_500), true);
        counters.worked_out(Duration::from_millis(500), false);
        counters.writes_refused(3);
        counters.events_left_out(4);
        let facts = Facts {
            generation: 9,
            made_unix_ms: 1_500,
            agents_connected: 2,
            agents_behind: 1,
            behind_longest: Duration::from_secs(4),
            resources: BTreeMap::from([(Kind::Node, 5)]),
            leads: true,
            trace_spans: [7, 1],
            ..Facts::default()
        };
        let page = page(&facts, &counters);
        let text = page.text().unwrap();
        for line in [
            "requests_total{method=\"join\",code=\"Ok\"} 1",
            "requests_total{method=\"join\",code=\"PermissionDenied\"} 1",
            "requests_total{method=\"sync\",code=\"PermissionDenied\"} 1",
            "requests_total{method=\"renew\",code=\"Ok\"} 0",
            "sync_answers_total{kind=\"everything\"} 1",
            "sync_answer_bytes_total{kind=\"everything\"} 12",
            "sync_answers_total{kind=\"changes\"} 1",
            "reconciles_total{outcome=\"saved\"} 1",
            "reconciles_total{outcome=\"failed\"} 1",
            "reconcile_seconds_total 2.0",
            "cluster_writes_refused_total 3",
            "cluster_events_left_out_total 4",
            "trace_spans_total{outcome=\"dropped\"} 1",
            "generation 9",
            "generation_timestamp_seconds 1.5",
            "agents_connected 2",
            "agents_behind 1",
            "agents_behind_longest_seconds 4.0",
            "resources{kind=\"node\"} 5",
            "resources{kind=\"mesh_policy\"} 0",
            "leads 1",
            "serves 0",
        ] {
            let line = format!("holdfast_controller_{line}");
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
        assert!(!text.contains("secret-customer"));
        for asks in [
            include_str!("../../deploy/monitoring/alerts.yaml"),
            include_str!("../../deploy/monitoring/dashboard.json"),
        ] {
            assert_eq!(page.lacks(asks), Ok(BTreeSet::new()));
        }
    }

    #[test]
    fn an_answer_is_of_the_kind_that_it_costs() {
        let of = |response| Answer::of(&response);
        let everything = SyncResponse {
            full: true,
            ..SyncResponse::default()
        };
        let differing = SyncResponse {
            compared: Some(Comparison::default()),
            ..SyncResponse::default()
        };
        let question = SyncResponse {
            digests_wanted: 64,
            ..SyncResponse::default()
        };
        assert_eq!(of(SyncResponse::default()), Answer::Changes);
        assert_eq!(of(everything), Answer::Everything);
        assert_eq!(of(differing), Answer::Differing);
        assert_eq!(of(question), Answer::Question);
    }
}
