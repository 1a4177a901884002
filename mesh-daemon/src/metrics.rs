//! `/metrics`, for Prometheus: a page that is made anew for each who asks, from what the daemon knows anyway.
//!
//! Labels are closed sets: reasons, states, transports. Names of nodes, services and clients are none, as a mesh has 100,000 of
//! them.

use std::{
    collections::BTreeSet,
    future,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{CONTENT_TYPE, HeaderValue},
};
use prometheus_client::{
    encoding::{EncodeMetric, MetricEncoder, NoLabelSet, text},
    metrics::{MetricType, counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};
use serde::Deserialize;
use tokio::{net::TcpListener, sync::Semaphore, time};
use tokio_util::sync::CancellationToken;

use crate::http;

/// Where the page is.
const PATH: &str = "/metrics";

/// Who asks at once: two Prometheus, an agent of a monitoring system, and somebody with `curl`.
const CONNECTIONS_MAX: usize = 4;

/// Pause before an address that could not be listened on is tried again.
const RETRY: Duration = Duration::from_secs(10);

/// `OpenMetrics` 1.0, which Prometheus reads since 2.5 (2018).
const OPEN_METRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

/// Where the page is shown: an address and port, or `"off"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Listen(pub Option<SocketAddr>);

impl Listen {
    /// At this machine alone: a page tells how many there are of everything.
    #[must_use]
    pub const fn local(port: u16) -> Self {
        Self(Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)))
    }
}

impl TryFrom<String> for Listen {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        if text == "off" {
            return Ok(Self(None));
        }
        let at = text.parse();
        at.map(|at| Self(Some(at))).map_err(|_| {
            format!("{text:?} is neither an address with a port (127.0.0.1:9640) nor \"off\"")
        })
    }
}

/// What goes up and down.
type Number = Gauge<u64, AtomicU64>;

/// A label's name and value.
pub type Labels = Vec<(&'static str, String)>;

/// What one who asks is shown.
#[derive(Debug)]
pub struct Page {
    registry: Registry,
    prefix: String,
}

impl Page {
    /// Empty; each name of it will begin with `prefix` and an underscore.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        Self {
            registry: Registry::with_prefix(prefix),
            prefix: format!("{prefix}_"),
        }
    }

    /// A number that goes up and down. `help` is a sentence; its full stop is added.
    pub fn gauge(&mut self, name: &str, help: &str, value: u64) {
        let gauge = Number::default();
        gauge.set(value);
        self.registry.register(name, help, gauge);
    }

    /// Seconds; `_seconds` is added to the name.
    pub fn seconds(&mut self, name: &str, help: &str, value: f64) {
        let seconds: Gauge<f64, AtomicU64> = Gauge::default();
        seconds.set(value);
        self.registry
            .register_with_unit(name, help, Unit::Seconds, seconds);
    }

    /// The same for each of `values`, which have the same labels.
    pub fn seconds_each(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels, f64)>,
    ) {
        let family: Family<Labels, Gauge<f64, AtomicU64>> = Family::default();
        for (labels, value) in values {
            family.get_or_create(&labels).set(value);
        }
        self.registry
            .register_with_unit(name, help, Unit::Seconds, family);
    }

    /// A number that goes up and down, for each of `values`, which have the same labels.
    pub fn gauges(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels, u64)>,
    ) {
        let family: Family<Labels, Number> = Family::default();
        for (labels, value) in values {
            family.get_or_create(&labels).set(value);
        }
        self.registry.register(name, help, family);
    }

    /// A number that only grows; `_total` is added to the name.
    pub fn counter(&mut self, name: &str, help: &str, value: u64) {
        let counter: Counter = Counter::default();
        counter.inc_by(value);
        self.registry.register(name, help, counter);
    }

    /// Seconds of something that only grows; `_seconds_total` is added to the name.
    pub fn seconds_total(&mut self, name: &str, help: &str, value: f64) {
        let seconds: Counter<f64, AtomicU64> = Counter::default();
        seconds.inc_by(value);
        self.registry
            .register_with_unit(name, help, Unit::Seconds, seconds);
    }

    /// The same for each of `values`, which have the same labels.
    pub fn counters(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels, u64)>,
    ) {
        let family: Family<Labels, Counter> = Family::default();
        for (labels, value) in values {
            family.get_or_create(&labels).inc_by(value);
        }
        self.registry.register(name, help, family);
    }

    /// How many values were at most so large: `classes` are their upper ends and what is in each and in none below it, the last
    /// one's end [`f64::INFINITY`]; `sum` is all values together.
    pub fn histogram(&mut self, name: &str, help: &str, sum: f64, classes: Vec<(f64, u64)>) {
        self.registry.register(name, help, Classes { sum, classes });
    }

    /// Which of the series that `text` (alerts, a dashboard) asks for begin as this page's do, and are not on it.
    ///
    /// # Errors
    ///
    /// As for [`Page::text`].
    pub fn lacks(&self, text: &str) -> Result<BTreeSet<String>, std::fmt::Error> {
        let shown = self.text()?;
        let shown: BTreeSet<_> = shown
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.split(['{', ' ']).next())
            .collect();
        let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let words = text.split(|c| !is_of_name(c));
        let ours = words.filter(|word| word.starts_with(&self.prefix));
        let missing = ours.filter(|name| !shown.contains(name));
        Ok(missing.map(str::to_owned).collect())
    }

    /// In Prometheus' text format.
    ///
    /// # Errors
    ///
    /// If a label cannot be written.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// A histogram that somebody else keeps.
#[derive(Debug)]
struct Classes {
    sum: f64,
    classes: Vec<(f64, u64)>,
}

impl EncodeMetric for Classes {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        let count = self.classes.iter().map(|(_, count)| count).sum();
        encoder.encode_histogram::<NoLabelSet>(self.sum, count, &self.classes, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

/// Shows what `page` makes at `listen` until `stop`. Where it cannot listen, that is logged once and tried again: a mesh does
/// not stop for its metrics.
///
/// # Errors
///
/// Never; so that it can be one task among others.
pub async fn serve<F>(
    Listen(listen): Listen,
    page: impl Fn() -> F + Clone + Send + 'static,
    stop: CancellationToken,
) -> anyhow::Result<()>
where
    F: Future<Output = Page> + Send + 'static,
{
    let serving = async {
        let Some(listen) = listen else {
            return future::pending().await;
        };
        let listener = bind(listen).await;
        let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let answer = move |request: Request<Incoming>| {
            let page = page.clone();
            async move {
                match refusal(&request) {
                    Some(refusal) => refusal,
                    None => respond(&page().await),
                }
            }
        };
        http::serve(listener, connections, answer).await;
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = serving => {}
    }
    Ok(())
}

async fn bind(listen: SocketAddr) -> TcpListener {
    let mut said = false;
    loop {
        match TcpListener::bind(listen).await {
            Ok(listener) => {
                let listen = listener.local_addr().unwrap_or(listen);
                tracing::info!(%listen, "metrics are shown");
                return listener;
            }
            Err(error) if !said => {
                tracing::warn!(%listen, %error, "no metrics are shown; trying again (`metrics_listen`)");
                said = true;
            }
            Err(_) => {}
        }
        time::sleep(RETRY).await;
    }
}

fn refusal<B>(request: &Request<B>) -> Option<Response<String>> {
    let code = if request.uri().path() != PATH {
        StatusCode::NOT_FOUND
    } else if ![Method::GET, Method::HEAD].contains(request.method()) {
        StatusCode::METHOD_NOT_ALLOWED
    } else {
        return None;
    };
    let mut response = Response::new(format!("GET {PATH}\n"));
    *response.status_mut() = code;
    Some(response)
}

fn respond(page: &Page) -> Response<String> {
    match page.text() {
        Ok(text) => {
            let mut response = Response::new(text);
            response.headers_mut().insert(CONTENT_TYPE, OPEN_METRICS);
            response
        }
        Err(error) => {
            let mut response = Response::new(format!("{error}\n"));
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            response
        }
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
    };

    use super::*;

    fn page() -> Page {
        let mut page = Page::new("holdfast_test");
        page.gauge("peers", "Peers", 2);
        page.seconds("snapshot_age", "How old the snapshot is", 7.0);
        let queue = vec![("queue", "held".to_owned())];
        page.seconds_each("queue_age", "How long what waits", [(queue, 0.25)]);
        let reasons =
            ["replay", "de\"nied\\\n"].map(|reason| (vec![("reason", reason.to_owned())], 3));
        page.counters("drops", "Dropped packets", reasons);
        let classes = vec![(0.5, 3), (2.0, 0), (f64::INFINITY, 1)];
        page.histogram("waits_seconds", "Waits", 9.5, classes);
        page
    }

    #[test]
    fn a_page_is_in_prometheus_text_format() {
        let text = page().text().unwrap();
        for line in [
            "# HELP holdfast_test_peers Peers.",
            "# TYPE holdfast_test_peers gauge",
            "holdfast_test_peers 2",
            "holdfast_test_snapshot_age_seconds 7.0",
            "holdfast_test_queue_age_seconds{queue=\"held\"} 0.25",
            "# TYPE holdfast_test_drops counter",
            "holdfast_test_drops_total{reason=\"replay\"} 3",
            "holdfast_test_drops_total{reason=\"de\\\"nied\\\\\\n\"} 3",
            "# TYPE holdfast_test_waits_seconds histogram",
            "holdfast_test_waits_seconds_bucket{le=\"0.5\"} 3",
            "holdfast_test_waits_seconds_bucket{le=\"2.0\"} 3",
            "holdfast_test_waits_seconds_bucket{le=\"+Inf\"} 4",
            "holdfast_test_waits_seconds_count 4",
            "holdfast_test_waits_seconds_sum 9.5",
            "# EOF",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
    }

    #[test]
    fn what_a_dashboard_asks_for_in_vain_is_said() {
        let asked = "rate(holdfast_test_drops_total{reason=\"x\"}[5m]) + holdfast_test_drop / holdfast_other_peers";
        let lacks = page().lacks(asked).unwrap();
        assert_eq!(lacks, BTreeSet::from(["holdfast_test_drop".to_owned()]));
    }

    #[test]
    fn where_to_listen_is_an_address_or_off() {
        let read = |text: &str| Listen::try_from(text.to_owned());
        assert_eq!(read("127.0.0.1:9640"), Ok(Listen::local(9640)));
        assert_eq!(read("off"), Ok(Listen(None)));
        for wrong in ["", "9640", "localhost:9640", "127.0.0.1"] {
            assert!(read(wrong).is_err_and(|error| error.contains(wrong)));
        }
    }

    async fn ask(at: SocketAddr, request: &str) -> Result<String, Box<dyn Error>> {
        let mut stream = TcpStream::connect(at).await?;
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }

    #[tokio::test]
    async fn it_is_shown_to_who_asks_for_it_also_once_the_port_is_free() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = taken.local_addr().unwrap();
        let stop = CancellationToken::new();
        let pages = || async { page() };
        drop(taken);
        let serving = tokio::spawn(serve(Listen(Some(at)), pages, stop.clone()));
        let get = "GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n";
        let mut answer = ask(at, get).await;
        while answer.is_err() {
            time::sleep(Duration::from_millis(5)).await;
            answer = ask(at, get).await;
        }
        let answer = answer.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains("content-type: application/openmetrics-text; version=1.0.0"));
        assert!(answer.ends_with("# EOF\n"));
        let other = ask(at, "GET / HTTP/1.1\r\nHost: h\r\n\r\n").await.unwrap();
        assert!(other.starts_with("HTTP/1.1 404 "), "{other}");
        let put = ask(at, "PUT /metrics HTTP/1.1\r\nHost: h\r\n\r\n")
            .await
            .unwrap();
        assert!(put.starts_with("HTTP/1.1 405 "), "{put}");
        let garbage = ask(at, "\x16\x03\x01 nonsense\r\n\r\n").await.unwrap();
        assert!(
            garbage.is_empty() || garbage.starts_with("HTTP/1.1 400 "),
            "{garbage}"
        );
        stop.cancel();
        serving.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_port_that_another_has_is_waited_for() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = taken.local_addr().unwrap();
        let stop = CancellationToken::new();
        let serving = tokio::spawn(serve(Listen(Some(at)), || async { page() }, stop.clone()));
        time::sleep(RETRY * 2).await;
        drop(taken);
        time::sleep(RETRY * 2).await;
        assert!(TcpListener::bind(at).await.is_err());
        stop.cancel();
        serving.await.unwrap().unwrap();
    }
}
