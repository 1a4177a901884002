//! Traces of what a daemon does at human rates, for an OpenTelemetry collector: OTLP over HTTP in protobuf (OTLP 1.x,
//! "OTLP/HTTP"). Off unless it is configured, and then a span costs the look at an `Option`.
//!
//! Own sending, as the SDK's batch processor has a thread that wakes up all the time, and keeps to itself how many spans it dropped.
//!
//! **Invariant:** whoever makes a span never waits for the collector: one that does not fit is dropped and counted.

use std::{
    fmt,
    str::FromStr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail};
use http_body_util::Full;
use hyper::{
    Request, Uri,
    body::Bytes,
    client::conn::http1,
    header::{CONTENT_TYPE, HOST},
};
use hyper_util::rt::TokioIo;
use opentelemetry::{
    Context, KeyValue, Value,
    trace::{
        Span as _, SpanBuilder, SpanContext, TraceContextExt as _, Tracer as _, TracerProvider as _,
    },
};
use opentelemetry_proto::{
    tonic::collector::trace::v1::ExportTraceServiceRequest,
    transform::{
        common::tonic::ResourceAttributesWithSchema,
        trace::tonic::group_spans_by_resource_and_scope,
    },
};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{Sampler, SdkTracer, SdkTracerProvider, SpanData, SpanProcessor},
};
use prost::Message as _;
use serde::Deserialize;
use tokio::{
    net::TcpStream,
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::supervisor::SHUTDOWN_GRACE;

/// Most spans that wait for the collector, some 0.5 KiB each: 1 MiB. A change that 1,000 nodes are told of has so many.
const WAITING_MAX: usize = 2_048;

/// Most spans in one request, some 100 KB.
const BATCH_MAX: usize = 512;

/// The spans of one change come within this, and go together.
const GATHER: Duration = Duration::from_secs(1);

/// How long a request may take: a collector is near, and while it is waited for others wait.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// What waits at the end is sent within this, before the process is over without it.
const STOP_LIMIT: Duration = SHUTDOWN_GRACE.saturating_sub(Duration::from_secs(1));

/// Where collectors take OTLP over HTTP, and by which path, if nobody says otherwise.
const PORT: u16 = 4318;
const PATH: &str = "/v1/traces";

/// The table `[tracing]` of a configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TracingSettings {
    /// The collector that spans are sent to, `http://host[:port][/path]`. It has to be on this machine or in a network that is
    /// trusted: there is no TLS.
    pub otlp: Collector,
}

/// Where a collector takes spans.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Collector(Uri);

/// Why a text names no collector.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not `http://host[:port][/path]` (https is not spoken: let a collector on this machine pass it on)"
)]
pub struct BadCollector(String);

impl FromStr for Collector {
    type Err = BadCollector;

    fn from_str(text: &str) -> Result<Self, BadCollector> {
        let bad = || BadCollector(text.to_owned());
        let uri: Uri = text.parse().map_err(|_| bad())?;
        let host = uri.host().filter(|host| !host.is_empty());
        let host = host.filter(|_| uri.scheme_str() == Some("http"));
        let has_login = uri
            .authority()
            .is_some_and(|all| all.as_str().contains('@'));
        let host = host.filter(|_| !has_login).ok_or_else(bad)?;
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let path = if path == "/" { PATH } else { path };
        let authority = format!("{host}:{}", uri.port_u16().unwrap_or(PORT));
        let whole = Uri::builder().scheme("http").authority(authority);
        let whole = whole.path_and_query(path).build();
        Ok(Self(whole.map_err(|_| bad())?))
    }
}

impl TryFrom<String> for Collector {
    type Error = BadCollector;

    fn try_from(text: String) -> Result<Self, BadCollector> {
        text.parse()
    }
}

impl fmt::Display for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where spans are made.
#[derive(Debug, Clone, Default)]
pub struct Traces(Option<Arc<On>>);

#[derive(Debug)]
struct On {
    tracer: SdkTracer,
    resource: ResourceAttributesWithSchema,
    collector: Collector,
    /// Until somebody sends them.
    waiting: Mutex<Option<mpsc::Receiver<SpanData>>>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    sent: AtomicU64,
    dropped: AtomicU64,
}

/// Part of a change. It ends when it is dropped.
#[derive(Debug, Default)]
pub struct Span(Option<opentelemetry_sdk::trace::Span>);

/// Which span others belong to; `None`: traces are off.
pub type Parent = Option<SpanContext>;

impl Span {
    /// Says more of it. Nothing that is secret.
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        if let Some(span) = &mut self.0 {
            span.set_attribute(KeyValue::new(key, value));
        }
    }

    /// For the spans that belong to it, also on other threads and after it ended.
    #[must_use]
    pub fn parent(&self) -> Parent {
        Some(self.0.as_ref()?.span_context().clone())
    }
}

impl Traces {
    /// Spans of the daemon `name` for the collector that `settings` name.
    #[must_use]
    pub fn new(
        settings: Option<&TracingSettings>,
        name: &'static str,
        version: &'static str,
    ) -> Self {
        Self(settings.map(|settings| {
            let (queue, waiting) = mpsc::channel(WAITING_MAX);
            let counts = Arc::new(Counts::default());
            let queue = Queue {
                queue,
                counts: counts.clone(),
            };
            // Nothing is taken from the environment.
            let version = KeyValue::new("service.version", version);
            let resource = Resource::builder_empty().with_service_name(name);
            let resource = resource.with_attributes([version]).build();
            let provider = SdkTracerProvider::builder()
                .with_sampler(Sampler::AlwaysOn)
                .with_resource(resource.clone())
                .with_span_processor(queue)
                .build();
            Arc::new(On {
                tracer: provider.tracer("holdfast"),
                resource: (&resource).into(),
                collector: settings.otlp.clone(),
                waiting: Mutex::new(Some(waiting)),
                counts,
            })
        }))
    }

    /// The first span of a change, which began then.
    #[must_use]
    pub fn root(&self, name: &'static str, began: SystemTime) -> Span {
        self.build(name, Some(began), Context::new)
    }

    /// A span that belongs to `parent`, from now on.
    #[must_use]
    pub fn child(&self, name: &'static str, parent: &Parent) -> Span {
        self.below(name, parent, None)
    }

    /// The same, of something that began then.
    #[must_use]
    pub fn past_child(&self, name: &'static str, parent: &Parent, began: SystemTime) -> Span {
        self.below(name, parent, Some(began))
    }

    fn below(&self, name: &'static str, parent: &Parent, began: Option<SystemTime>) -> Span {
        match parent {
            None => Span::default(),
            Some(parent) => self.build(name, began, || {
                Context::new().with_remote_span_context(parent.clone())
            }),
        }
    }

    fn build(
        &self,
        name: &'static str,
        began: Option<SystemTime>,
        context: impl FnOnce() -> Context,
    ) -> Span {
        Span(self.0.as_ref().map(|on| {
            let mut builder = SpanBuilder::from_name(name);
            builder.start_time = began;
            on.tracer.build_with_context(builder, &context())
        }))
    }

    /// How many spans a collector took, and how many none did.
    #[must_use]
    pub fn counts(&self) -> [u64; 2] {
        self.0.as_ref().map_or([0; 2], |on| {
            [&on.counts.sent, &on.counts.dropped].map(|count| count.load(Relaxed))
        })
    }

    /// Sends spans until `stop`, and then what waits, for a moment. Once for each [`Traces::new`].
    ///
    /// # Errors
    ///
    /// Never; so that it can be one task among others.
    pub async fn send(self, stop: CancellationToken) -> anyhow::Result<()> {
        let waiting = self.0.as_ref().and_then(|on| {
            let mut waiting = on.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            Some((on, waiting.take()?))
        });
        let Some((on, mut waiting)) = waiting else {
            stop.cancelled().await;
            return Ok(());
        };
        tracing::info!(collector = %on.collector, "spans are sent");
        let too_late = async {
            stop.cancelled().await;
            sleep(STOP_LIMIT).await;
        };
        tokio::select! {
            () = on.deliver_all(&mut waiting, &stop) => {}
            () = too_late => {}
        }
        waiting.close(); // What is made from now on is counted as dropped.
        let left = u64::try_from(waiting.len()).unwrap_or(u64::MAX);
        on.counts.dropped.fetch_add(left, Relaxed);
        let [sent, dropped] = self.counts();
        tracing::info!(sent, dropped, "no more spans are sent");
        Ok(())
    }
}

impl On {
    /// Until `stop`, and then until nothing waits.
    async fn deliver_all(&self, waiting: &mut mpsc::Receiver<SpanData>, stop: &CancellationToken) {
        let mut troubled = false;
        let mut batch = Vec::new();
        loop {
            tokio::select! {
                _ = waiting.recv_many(&mut batch, 1) => {
                    stop.run_until_cancelled(sleep(GATHER)).await;
                }
                () = stop.cancelled() => {}
            }
            while batch.len() < BATCH_MAX
                && let Ok(span) = waiting.try_recv()
            {
                batch.push(span);
            }
            if !batch.is_empty() {
                self.deliver(std::mem::take(&mut batch), &mut troubled)
                    .await;
            } else if stop.is_cancelled() {
                return;
            }
        }
    }

    /// A batch that the collector did not take is not sent again: the next ones would wait for it.
    async fn deliver(&self, batch: Vec<SpanData>, troubled: &mut bool) {
        let unsent = Unsent {
            counts: &self.counts,
            spans: u64::try_from(batch.len()).unwrap_or(u64::MAX),
        };
        let request = ExportTraceServiceRequest {
            resource_spans: group_spans_by_resource_and_scope(batch, &self.resource),
        };
        let posted = timeout(REQUEST_TIMEOUT, post(&self.collector, request)).await;
        let posted = posted
            .context("no answer in time")
            .and_then(|posted| posted);
        match posted {
            Ok(()) => {
                unsent.taken();
                if std::mem::take(troubled) {
                    tracing::info!(collector = %self.collector, "the collector takes spans again");
                }
            }
            Err(error) if !std::mem::replace(troubled, true) => {
                let error = format!("{error:#}");
                tracing::warn!(collector = %self.collector, %error, "the collector takes no spans: they are dropped and counted until it does");
            }
            Err(_) => {}
        }
    }
}

/// A batch, which is dropped unless the collector takes it, also if nobody waits for that any more.
struct Unsent<'a> {
    counts: &'a Counts,
    spans: u64,
}

impl Unsent<'_> {
    fn taken(mut self) {
        let spans = std::mem::take(&mut self.spans);
        self.counts.sent.fetch_add(spans, Relaxed);
    }
}

impl Drop for Unsent<'_> {
    fn drop(&mut self) {
        self.counts.dropped.fetch_add(self.spans, Relaxed);
    }
}

async fn post(Collector(to): &Collector, request: ExportTraceServiceRequest) -> anyhow::Result<()> {
    let authority = to.authority().context("no host")?.as_str();
    let path = to.path_and_query().context("no path")?.as_str();
    let stream = TcpStream::connect(authority).await;
    let stream = stream.context("cannot connect")?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::post(path)
        .header(HOST, authority)
        .header(CONTENT_TYPE, "application/x-protobuf")
        .body(Full::new(Bytes::from(request.encode_to_vec())))?;
    // The connection ends when nobody can ask by it any more.
    let asked = async move {
        sender
            .send_request(request)
            .await
            .map(|answer| answer.status())
    };
    let (answered, _) = tokio::join!(asked, connection);
    let status = answered?;
    if !status.is_success() {
        bail!("it answered {status}");
    }
    Ok(())
}

/// Takes spans from the SDK.
#[derive(Debug)]
struct Queue {
    queue: mpsc::Sender<SpanData>,
    counts: Arc<Counts>,
}

impl SpanProcessor for Queue {
    fn on_start(&self, _: &mut opentelemetry_sdk::trace::Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if self.queue.try_send(span).is_err() {
            self.counts.dropped.fetch_add(1, Relaxed);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use http_body_util::BodyExt as _;
    use hyper::{Response, body::Incoming};
    use tokio::{net::TcpListener, sync::Semaphore, time::Instant};

    use super::*;
    use crate::http;

    #[test]
    fn a_collector_is_named_by_a_url_without_secrets() {
        let to = |text: &str| text.parse::<Collector>().map(|to| to.to_string());
        let good = |text: &str, expected: &str| assert_eq!(to(text).as_deref(), Ok(expected));
        good("http://localhost", "http://localhost:4318/v1/traces");
        good("http://[::1]:4318/", "http://[::1]:4318/v1/traces");
        good("http://c:80/otlp/v1/traces", "http://c:80/otlp/v1/traces");
        for bad in ["https://c", "c:4318", "http://", "http://user:word@c", ""] {
            assert_eq!(to(bad), Err(BadCollector(bad.to_owned())));
        }
    }

    #[test]
    fn spans_that_nobody_takes_are_dropped_and_counted_and_nobody_waits() {
        let off = Traces::default();
        let span = off.root("change", SystemTime::now());
        assert_eq!((span.parent(), off.counts()), (None, [0; 2]));
        let settings = TracingSettings {
            otlp: "http://192.0.2.1".parse().unwrap(),
        };
        let traces = Traces::new(Some(&settings), "test", "1");
        let root = traces.root("change", SystemTime::now());
        for _ in 0..WAITING_MAX + 3 {
            traces.child("step", &root.parent()).set("n", 1);
        }
        drop(root);
        assert_eq!(traces.counts(), [0, 4]);
    }

    /// With as many spans waiting as there may be.
    fn full(collector: SocketAddr) -> Traces {
        let settings = TracingSettings {
            otlp: format!("http://{collector}").parse().unwrap(),
        };
        let traces = Traces::new(Some(&settings), "test", "1");
        for _ in 0..WAITING_MAX {
            drop(traces.root("change", SystemTime::now()));
        }
        traces
    }

    /// As somebody who stops at once.
    async fn stop(traces: &Traces) -> Duration {
        let stop = CancellationToken::new();
        stop.cancel();
        let begun = Instant::now();
        traces.clone().send(stop).await.unwrap();
        begun.elapsed()
    }

    #[tokio::test]
    async fn all_that_waits_at_the_end_is_sent() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let traces = full(listener.local_addr().unwrap());
        let taken = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&taken);
        let take = move |request: Request<Incoming>| {
            let counted = Arc::clone(&counted);
            async move {
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let all = ExportTraceServiceRequest::decode(body).unwrap();
                let scopes = all.resource_spans.iter().flat_map(|all| &all.scope_spans);
                let spans: usize = scopes.map(|scope| scope.spans.len()).sum();
                counted.fetch_add(spans as u64, Relaxed);
                Response::new(String::new())
            }
        };
        let collector = http::serve(listener, Arc::new(Semaphore::new(4)), take);
        let collector = tokio::spawn(collector);
        stop(&traces).await;
        assert_eq!(traces.counts(), [WAITING_MAX as u64, 0]);
        assert_eq!(taken.load(Relaxed), WAITING_MAX as u64);
        collector.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_taken_at_the_end_is_counted_and_the_process_is_not_held_up() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let traces = full(silent.local_addr().unwrap());
        let took = stop(&traces).await;
        assert!(took >= STOP_LIMIT && took < SHUTDOWN_GRACE, "{took:?}");
        assert_eq!(traces.counts(), [0, WAITING_MAX as u64]);
        drop(traces.root("too late", SystemTime::now()));
        assert_eq!(traces.counts(), [0, WAITING_MAX as u64 + 1]);
    }
}
