//! Traces of changes, as a collector receives them.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use http_body_util::BodyExt as _;
use hyper::{Request, Response, body::Incoming};
use mesh_api::control::{SyncRequest, SyncResponse};
use mesh_daemon::http;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest, common::v1::any_value::Value, trace::v1::Span,
};
use prost::Message as _;
use tokio::{
    net::TcpListener,
    sync::Semaphore,
    task::JoinHandle,
    time::{Instant, sleep},
};

use crate::lab::{Agent, Lab, PATIENCE, write_config};

/// Takes OTLP over HTTP, as long as it lives.
struct Collector {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<ExportTraceServiceRequest>>>,
    task: JoinHandle<()>,
}

impl Collector {
    async fn new(address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests: Arc<Mutex<Vec<_>>> = Arc::default();
        let taken = requests.clone();
        let take = move |request: Request<Incoming>| {
            let taken = taken.clone();
            async move {
                assert_eq!(request.uri().path(), "/v1/traces");
                assert_eq!(request.headers()["content-type"], "application/x-protobuf");
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let request = ExportTraceServiceRequest::decode(body).unwrap();
                taken.lock().unwrap().push(request);
                Response::new(String::new())
            }
        };
        let connections = Arc::new(Semaphore::new(4));
        Self {
            address,
            requests,
            task: tokio::spawn(http::serve(listener, connections, take)),
        }
    }

    fn spans(&self) -> Vec<Span> {
        let requests = self.requests.lock().unwrap();
        let scopes = requests
            .iter()
            .flat_map(|request| &request.resource_spans)
            .flat_map(|resource| &resource.scope_spans);
        scopes.flat_map(|scope| scope.spans.clone()).collect()
    }

    /// The spans of a change that was told to a node, from the root on.
    async fn told_change(&self, origin: &str) -> Vec<Span> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let spans = self.spans();
            let root = spans
                .iter()
                .find(|span| text(span, "origin").as_deref() == Some(origin));
            let trace = root.into_iter().flat_map(|root| {
                let same = spans.iter().filter(|span| span.trace_id == root.trace_id);
                same.cloned()
            });
            let trace: Vec<_> = trace.collect();
            if trace.iter().any(|span| span.name == "answer") {
                return trace;
            }
            assert!(Instant::now() < deadline, "{spans:#?}");
            sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn value<'a>(span: &'a Span, key: &str) -> Option<&'a Value> {
    let attribute = span.attributes.iter().find(|one| one.key == key)?;
    attribute.value.as_ref()?.value.as_ref()
}

fn text(span: &Span, key: &str) -> Option<String> {
    match value(span, key) {
        Some(Value::StringValue(text)) => Some(text.clone()),
        _ => None,
    }
}

/// A controller whose spans go there.
fn start(collector: SocketAddr) -> Lab {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("manifests")).unwrap();
    let tracing = format!("[tracing]\notlp = \"http://{collector}\"\n");
    write_config(
        folder.path(),
        SocketAddr::from(([127, 0, 0, 1], 0)),
        &tracing,
    );
    Lab::start_in(folder, &[])
}

fn service(port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: inventory, namespace: shop}}\n\
         spec: {{clusterIP: 10.96.0.10, ports: [{{name: http, port: {port}}}]}}\n"
    )
}

async fn acknowledge(agent: &Agent, told: &SyncResponse) {
    let has = SyncRequest {
        store_id: told.store_id.clone(),
        generation: told.generation,
        ..SyncRequest::default()
    };
    agent.say.send(has).await.unwrap();
}

#[tokio::test]
async fn a_change_is_one_trace_from_the_manifest_to_each_node_that_has_it() {
    let collector = Collector::new(SocketAddr::from(([127, 0, 0, 1], 0))).await;
    let lab = start(collector.address);
    let credentials = lab.node("edge-a", 1).await;
    let (mut agent, first) = lab.sync(&credentials, None).await.unwrap();
    acknowledge(&agent, &first).await;
    lab.write_manifest("shop.yaml", &service(80));
    let told = agent.next().await.unwrap();
    acknowledge(&agent, &told).await;

    let trace = collector.told_change("folder").await;
    let by_name: BTreeMap<_, _> = trace
        .iter()
        .map(|span| (span.name.as_str(), span))
        .collect();
    let names: Vec<_> = by_name.keys().copied().collect();
    assert_eq!(names, ["answer", "change", "compile", "publish", "read"]);
    assert_eq!(trace.len(), names.len());
    let parents = [
        ("read", "change"),
        ("compile", "change"),
        ("publish", "change"),
        ("answer", "publish"),
    ];
    for (child, parent) in parents {
        assert_eq!(
            by_name[child].parent_span_id, by_name[parent].span_id,
            "{child}"
        );
    }
    assert_eq!(by_name["change"].parent_span_id, [0; 0]);
    for span in &trace {
        assert!(
            span.start_time_unix_nano <= span.end_time_unix_nano,
            "{span:?}"
        );
        assert!(by_name["change"].start_time_unix_nano <= span.start_time_unix_nano);
    }
    let generation = i64::try_from(told.generation).unwrap();
    let publish = by_name["publish"];
    assert_eq!(
        value(publish, "generation"),
        Some(&Value::IntValue(generation))
    );
    let answer = by_name["answer"];
    assert_eq!(text(answer, "node").as_deref(), Some("edge-a"));
    assert_eq!(value(answer, "acknowledged"), Some(&Value::BoolValue(true)));

    let request = collector.requests.lock().unwrap()[0].clone();
    let resource = request.resource_spans[0].resource.clone().unwrap();
    let name = resource
        .attributes
        .iter()
        .find(|one| one.key == "service.name");
    let name = name.unwrap().value.as_ref().unwrap().value.as_ref();
    assert_eq!(
        name,
        Some(&Value::StringValue("mesh-controller".to_owned()))
    );
}

#[tokio::test]
async fn without_its_collector_a_controller_goes_on_and_says_so_once() {
    let collector = Collector::new(SocketAddr::from(([127, 0, 0, 1], 0))).await;
    let address = collector.address;
    drop(collector);
    let lab = start(address);
    let credentials = lab.node("edge-a", 1).await;
    let (mut agent, first) = lab.sync(&credentials, None).await.unwrap();
    acknowledge(&agent, &first).await;
    lab.logged("the collector takes no spans").await;
    for port in [80, 81, 82] {
        let began = Instant::now();
        lab.write_manifest("shop.yaml", &service(port));
        let told = agent.next().await.unwrap();
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "{:?}",
            began.elapsed()
        );
        acknowledge(&agent, &told).await;
        sleep(Duration::from_millis(1_100)).await;
    }
    assert_eq!(lab.log().matches("the collector takes no spans").count(), 1);
    let collector = Collector::new(address).await;
    lab.write_manifest("shop.yaml", &service(83));
    let told = agent.next().await.unwrap();
    acknowledge(&agent, &told).await;
    collector.told_change("folder").await;
    lab.logged("the collector takes spans again").await;
}
