//! One upstream: where it is, how it is asked, and how it does.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    pin::Pin,
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hickory_net::{
    NetError,
    h2::HttpsClientStream,
    runtime::{RuntimeProvider, TokioHandle, TokioTime, iocompat::AsyncIoTokioAsStd},
    tls::tls_exchange,
    xfer::{DnsExchange, DnsHandle as _, FirstAnswer as _},
};
use hickory_proto::op::{DnsRequest, DnsRequestOptions, Message, ResponseCode};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use tokio::{
    net::{TcpStream, UdpSocket},
    time::{Instant, timeout},
};

use crate::client::{self, ExchangeError};

/// For connecting (two round trips), asking and answering over TLS, by way of a geostationary satellite
/// (600 ms each).
const SECURE_TIMEOUT: Duration = Duration::from_millis(2500);

/// An upstream that was silent this often in a row is passed over for a while. Not after the
/// first time: on a lossy link both packets of one exchange may be lost.
const SILENCES_MAX: u32 = 2;

/// For how long. With no upstream left, questions fail at once until then.
pub(crate) const PASSED_OVER: Duration = Duration::from_secs(2);

/// An upstream that was silent is not waited for this long where there is an answer beyond its time, unless a probe finds out
/// that it is back (the failure recheck timer of RFC 8767 §5).
const SILENT: Duration = Duration::from_secs(30);

/// From one probe to the next, while something is asked: longer than one takes.
const PROBE_EVERY: Duration = Duration::from_secs(3);

/// The next upstream is asked, too, when this one did not answer within its usual time, which is at least …
const HEDGE_MIN: Duration = Duration::from_millis(20);

/// … and at most this: that long, nobody waits for a page without noticing.
const HEDGE_MAX: Duration = Duration::from_millis(400);

/// Before anything is known of it (RFC 8305 §5).
const HEDGE_UNKNOWN: Duration = Duration::from_millis(250);

/// How an upstream is asked that is an address behind one of these, with the usual port (RFC 7766, RFC 7858 §3.1).
const SCHEMES: [(&str, u16); 2] = [("tcp://", 53), ("tls://", 853)];

/// Of why an upstream gave no answer: what TLS says of a certificate is half of it.
const WHY_MAX_CHARS: usize = 300;

/// Questions at once on one connection: as many as may wait at all.
const QUESTIONS_MAX: usize = 512;

/// Names the interface by which an address is to be reached; `None`: the kernel's routes choose.
pub(crate) type DeviceFor = Arc<dyn Fn(IpAddr) -> Option<String> + Send + Sync>;

/// How an upstream is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transport {
    /// UDP, and TCP where the answer does not fit.
    Plain,
    /// TCP alone, a connection for each question: for networks that lose or change what goes by UDP.
    Tcp,
    /// DNS over TLS (RFC 7858). The certificate has to be for this name.
    Tls(ServerName<'static>),
    /// DNS over HTTPS (RFC 8484), by HTTP/2. The certificate has to be for this name.
    Https {
        /// Of the URL.
        name: String,
        /// The URL's part behind it.
        path: String,
    },
}

/// An upstream as it is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamConfig {
    /// Where it is. An address: names cannot be resolved yet.
    pub address: SocketAddr,
    /// How it is asked.
    pub transport: Transport,
}

/// Why an upstream is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadUpstream {
    /// No name that a certificate could be for.
    #[error("{0:?} is no name that a certificate could be for")]
    Name(String),
    /// Not `https://name/path`.
    #[error("{0:?} is not of the form https://dns.example.org/dns-query")]
    Url(String),
    /// No address, nor `tcp://` or `tls://` and an address.
    #[error(
        "{0:?} is not of the form 192.0.2.1:53, [2001:db8::1]:53, tcp://192.0.2.1, tls://192.0.2.1 or tls://[2001:db8::1]:853"
    )]
    Address(String),
}

/// Whom upstreams' certificates may be from.
#[derive(Debug, thiserror::Error)]
pub enum AuthoritiesError {
    /// The file cannot be read, or is no PEM.
    #[error("cannot read certificates of authorities from {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// Nobody would be trusted.
    #[error(
        "there are no certificates of authorities {0}, so that no upstream by TLS could be trusted: install \
         ca-certificates, or name a file (dns.ca_file)"
    )]
    None(String),
    /// The system's cannot be used.
    #[error("the certificates of authorities cannot be used")]
    Unusable(#[from] rustls::Error),
}

impl UpstreamConfig {
    /// By UDP and TCP.
    #[must_use]
    pub fn plain(address: SocketAddr) -> Self {
        Self {
            address,
            transport: Transport::Plain,
        }
    }

    /// By TLS, for a certificate with `name`, which may be an address.
    ///
    /// # Errors
    ///
    /// [`BadUpstream::Name`].
    pub fn tls(address: SocketAddr, name: &str) -> Result<Self, BadUpstream> {
        let transport = Transport::Tls(server_name(name)?);
        Ok(Self { address, transport })
    }

    /// By HTTPS, at `https://name/path`.
    ///
    /// # Errors
    ///
    /// [`BadUpstream`].
    pub fn https(address: SocketAddr, url: &str) -> Result<Self, BadUpstream> {
        let bad = || BadUpstream::Url(url.to_owned());
        let rest = url.strip_prefix("https://").ok_or_else(bad)?;
        let (name, path) = rest.split_once('/').ok_or_else(bad)?;
        server_name(name)?;
        if path.is_empty() || path.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(bad());
        }
        let transport = Transport::Https {
            name: name.to_owned(),
            path: format!("/{path}"),
        };
        Ok(Self { address, transport })
    }

    pub(crate) fn is_secure(&self) -> bool {
        match self.transport {
            Transport::Plain | Transport::Tcp => false,
            Transport::Tls(_) | Transport::Https { .. } => true,
        }
    }
}

impl FromStr for UpstreamConfig {
    type Err = BadUpstream;

    /// An address: in the clear; with `tcp://` before it by TCP alone, and with `tls://` by TLS, with a certificate for that
    /// address.
    fn from_str(text: &str) -> Result<Self, BadUpstream> {
        let bad = || BadUpstream::Address(text.to_owned());
        let behind = |(scheme, port)| text.strip_prefix(scheme).map(|rest| (scheme, port, rest));
        let Some((scheme, port, rest)) = SCHEMES.into_iter().find_map(behind) else {
            return text.parse().map(Self::plain).map_err(|_| bad());
        };
        let bare = rest
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        let alone = match bare {
            Some(v6) => v6.parse().map(IpAddr::V6),
            None => rest.parse().map(IpAddr::V4),
        };
        let address = match alone {
            Ok(ip) => SocketAddr::new(ip, port),
            Err(_) => rest.parse().map_err(|_| bad())?,
        };
        let transport = match scheme {
            "tcp://" => Transport::Tcp,
            _ => Transport::Tls(ServerName::IpAddress(address.ip().into())),
        };
        Ok(Self { address, transport })
    }
}

fn server_name(name: &str) -> Result<ServerName<'static>, BadUpstream> {
    let bad = |_| BadUpstream::Name(name.to_owned());
    ServerName::try_from(name.to_owned()).map_err(bad)
}

/// TLS to upstreams, with a certificate from `authorities`, or else from whom the system trusts. Blocks on the disk.
///
/// # Errors
///
/// [`AuthoritiesError`].
pub(crate) fn tls(authorities: Option<&Path>) -> Result<ClientConfig, AuthoritiesError> {
    let mut roots = RootCertStore::empty();
    let found = match authorities {
        Some(path) => from_file(path)?,
        None => rustls_native_certs::load_native_certs().certs,
    };
    roots.add_parsable_certificates(found);
    if roots.is_empty() {
        let of_system = || "on this system".to_owned();
        let place = authorities.map_or_else(of_system, |path| format!("in {}", path.display()));
        return Err(AuthoritiesError::None(place));
    }
    let provider = Arc::new(ring::default_provider());
    let config =
        ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

fn from_file(path: &Path) -> Result<Vec<CertificateDer<'static>>, AuthoritiesError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    read.map_err(|source| AuthoritiesError::File {
        path: path.to_owned(),
        source,
    })
}

/// An upstream that is asked.
pub(crate) struct Upstream {
    pub(crate) config: UpstreamConfig,
    device: DeviceFor,
    tls: Option<Arc<ClientConfig>>,
    health: Mutex<Health>,
    connection: tokio::sync::Mutex<Connection>,
    /// Owns what moves the connection's bytes.
    tasks: TokioHandle,
}

/// Tokio's, with TCP by one interface.
#[derive(Clone, Default)]
struct Runtime {
    tasks: TokioHandle,
    device: Option<String>,
}

impl RuntimeProvider for Runtime {
    type Handle = TokioHandle;
    type Timer = TokioTime;
    type Udp = UdpSocket;
    type Tcp = AsyncIoTokioAsStd<TcpStream>;

    fn create_handle(&self) -> TokioHandle {
        self.tasks.clone()
    }

    fn connect_tcp(
        &self,
        to: SocketAddr,
        _: Option<SocketAddr>,
        _: Option<Duration>, // All of it has `SECURE_TIMEOUT`.
    ) -> Pin<Box<dyn Send + Future<Output = io::Result<Self::Tcp>>>> {
        let device = self.device.clone();
        Box::pin(async move {
            let stream = client::connect(to, device.as_deref()).await?;
            Ok(AsyncIoTokioAsStd(stream))
        })
    }

    /// TLS and HTTP/2 have no use for it.
    fn bind_udp(
        &self,
        _: SocketAddr,
        _: SocketAddr,
    ) -> Pin<Box<dyn Send + Future<Output = io::Result<UdpSocket>>>> {
        Box::pin(async { Err(io::ErrorKind::Unsupported.into()) })
    }
}

type Exchange = DnsExchange<Runtime>;

/// One, for all questions: each costs a handshake. With how many there were, and by which interface it goes.
#[derive(Default)]
struct Connection(u64, Option<(Option<String>, Exchange)>);

impl Connection {
    /// It, if it goes by this interface.
    fn by(&self, device: Option<&str>) -> Option<Exchange> {
        let (by, exchange) = self.1.as_ref()?;
        (by.as_deref() == device).then(|| exchange.clone())
    }
}

/// How it does.
#[derive(Debug, Default)]
struct Health {
    silences: u32,
    passed_over_until: Option<Instant>,
    /// When a client waited for it in vain; nothing came from it since.
    silent: Option<Instant>,
    probed: Option<Instant>,
    usual: Option<RoundTrip>,
    /// Since it last answered; for people, as the rest.
    failures: u32,
    answered: Option<Instant>,
    failed: Option<(Instant, String)>,
}

/// What became of the questions to an upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpstreamState {
    /// It was not asked yet, or one packet was lost.
    Unknown,
    /// It answers.
    Answers,
    /// It is not asked for the moment.
    PassedOver,
    /// It gave no answer twice or more since it last did.
    Fails,
}

impl UpstreamState {
    /// It as a word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Answers => "answers",
            Self::PassedOver => "passed_over",
            Self::Fails => "fails",
        }
    }
}

/// How an upstream does. No name that was asked for is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamReport {
    /// Where it is.
    pub address: SocketAddr,
    /// `udp` (and TCP where an answer does not fit), `tcp`, `tls` or `https`.
    pub transport: &'static str,
    /// What became of the questions.
    pub state: UpstreamState,
    /// How long it takes: smoothed, and how far off (RFC 6298 §2).
    pub usual: Option<(Duration, Duration)>,
    /// After this long the next is asked, too.
    pub hedge_after: Duration,
    /// For how long it is not asked yet.
    pub passed_over: Option<Duration>,
    /// Questions without an answer since it last answered.
    pub failures: u32,
    /// How long ago it answered.
    pub answered: Option<Duration>,
    /// How long ago it gave no answer that helped, and why.
    pub failed: Option<(Duration, String)>,
}

/// Smoothed, and how far off (RFC 6298 §2).
#[derive(Debug, Clone, Copy)]
struct RoundTrip {
    smoothed: Duration,
    variation: Duration,
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream")
            .field("config", &self.config)
            .field("health", &self.health)
            .finish_non_exhaustive()
    }
}

impl Upstream {
    /// `tls`: there if it is asked by TLS. `device` is asked before each question.
    pub(crate) fn new(
        config: UpstreamConfig,
        tls: Option<Arc<ClientConfig>>,
        device: DeviceFor,
    ) -> Self {
        Self {
            config,
            device,
            tls,
            health: Mutex::default(),
            connection: tokio::sync::Mutex::default(),
            tasks: TokioHandle::default(),
        }
    }

    /// Asks, and remembers how that went. Gives the answer, and the bytes that it came in.
    pub(crate) async fn ask_and_note(
        &self,
        query: Message,
    ) -> Result<(Message, Vec<u8>), ExchangeError> {
        let start = Instant::now();
        let answered = self.ask(query).await;
        self.note(answered.as_ref().err(), start, Instant::now());
        answered
    }

    /// Asks whether it is there at all, for nobody.
    pub(crate) async fn probe(&self, query: Message) {
        let start = Instant::now();
        let answered = self.ask(query).await;
        self.remember(answered.as_ref().err(), start, Instant::now());
    }

    async fn ask(&self, query: Message) -> Result<(Message, Vec<u8>), ExchangeError> {
        let device = (self.device)(self.config.address.ip());
        let device = device.as_deref();
        let asked = match self.config.transport {
            Transport::Plain => return client::exchange(self.config.address, query, device).await,
            Transport::Tcp => {
                return client::exchange_by_tcp(self.config.address, &query, device).await;
            }
            Transport::Tls(_) | Transport::Https { .. } => {
                timeout(SECURE_TIMEOUT, self.securely(&query, device)).await
            }
        };
        let (message, bytes) = asked.unwrap_or(Err(ExchangeError::Timeout))?;
        let answers = message.queries == query.queries; // The id is the connection's own.
        answers
            .then_some((message, bytes))
            .ok_or(ExchangeError::NotAnAnswer)
    }

    async fn securely(
        &self,
        query: &Message,
        device: Option<&str>,
    ) -> Result<(Message, Vec<u8>), ExchangeError> {
        let kept = self.connection.lock().await;
        let (number, known) = (kept.0, kept.by(device));
        drop(kept);
        if let Some(connection) = known
            && let Ok(said) = send(&connection, query).await
        {
            return Ok(said);
        }
        // The server closes what was idle (RFC 7858 §3.4).
        let connection = self.connect(number, device).await?;
        send(&connection, query).await
    }

    /// A connection after the one with that number: a new one, unless somebody else made it.
    async fn connect(&self, number: u64, device: Option<&str>) -> Result<Exchange, ExchangeError> {
        let address = self.config.address;
        let runtime = Runtime {
            tasks: self.tasks.clone(),
            device: device.map(str::to_owned),
        };
        let tls = self.tls.clone().ok_or(ExchangeError::NotAnAnswer)?;
        let mut kept = self.connection.lock().await; // Others wait for this one.
        if kept.0 > number
            && let Some(connection) = kept.by(device)
        {
            return Ok(connection);
        }
        let connection = match &self.config.transport {
            Transport::Https { name, path } => {
                let builder = HttpsClientStream::builder(tls, runtime);
                let (name, path) = (name.as_str().into(), path.as_str().into());
                builder.exchange(address, name, path).await?
            }
            Transport::Tls(name) => {
                let (name, tls) = (name.clone(), ClientConfig::clone(&tls));
                let most = Some(QUESTIONS_MAX);
                tls_exchange(address, name, tls, SECURE_TIMEOUT, most, runtime).await?
            }
            Transport::Plain | Transport::Tcp => return Err(ExchangeError::NotAnAnswer),
        };
        let by = device.map(str::to_owned);
        *kept = Connection(kept.0 + 1, Some((by, connection.clone())));
        Ok(connection)
    }

    pub(crate) fn is_passed_over(&self, now: Instant) -> bool {
        let until = self.health().passed_over_until;
        until.is_some_and(|until| now < until)
    }

    /// Whether a client waited for it in vain just now.
    pub(crate) fn is_silent(&self, now: Instant) -> bool {
        let silent = self.health().silent;
        silent.is_some_and(|silent| now < silent + SILENT)
    }

    /// Whether it is to be asked whether it is back; not again before that is known.
    pub(crate) fn begin_probe(&self, now: Instant) -> bool {
        let mut health = self.health();
        let due = health.silent.is_some()
            && health
                .probed
                .is_none_or(|probed| now >= probed + PROBE_EVERY);
        if due {
            health.probed = Some(now);
        }
        due
    }

    /// How long it may take before the next is asked, too.
    pub(crate) fn hedge_after(&self) -> Duration {
        self.health().hedge_after()
    }

    /// Remembers how a client's question went that was asked at `start`.
    pub(crate) fn note(&self, error: Option<&ExchangeError>, start: Instant, now: Instant) {
        if self.remember(error, start, now) {
            self.health().silent = Some(now);
        }
    }

    /// Remembers how an exchange went, and says whether it was silent.
    fn remember(&self, error: Option<&ExchangeError>, start: Instant, now: Instant) -> bool {
        let mut health = self.health();
        if let Some(error) = error {
            health.fail(why(error), now);
        }
        let answers_others = health.answered.is_some_and(|then| then > start);
        match error {
            // What was asked for takes it long, as do names whose own servers are gone.
            Some(ExchangeError::Timeout) if answers_others => {}
            Some(ExchangeError::Timeout | ExchangeError::Secure(NetError::Timeout)) => {
                health.silence(now);
                drop(health);
                self.disconnect();
                return true;
            }
            Some(ExchangeError::Secure(_)) => health.silence(now),
            // Errors that come at once cost nobody time.
            Some(ExchangeError::Io(_) | ExchangeError::NotAnAnswer | ExchangeError::Unwritable) => {
            }
            None => health.answer(now.saturating_duration_since(start), now),
        }
        false
    }

    /// The next question makes a new connection: who is back after a power cut knows nothing of the old one, and it may be a
    /// minute until it hears of it and says so.
    fn disconnect(&self) {
        // Somebody is connecting: that is a new one.
        if let Ok(mut kept) = self.connection.try_lock() {
            kept.1 = None;
        }
    }

    /// Remembers that one that was asked later answered, and this one did not.
    pub(crate) fn note_overtaken(&self, now: Instant) {
        let mut health = self.health();
        health.fail("one that was asked later answered first".to_owned(), now);
        health.silence(now);
    }

    /// Remembers that it answered, with an error.
    pub(crate) fn note_unhelpful(&self, code: ResponseCode, now: Instant) {
        self.health().failed = Some((now, format!("it said {}", client::code_text(code))));
    }

    /// How it does.
    pub(crate) fn report(&self, now: Instant) -> UpstreamReport {
        let health = self.health();
        let passed_over = health
            .passed_over_until
            .map(|until| until.saturating_duration_since(now))
            .filter(|left| !left.is_zero());
        let state = match (passed_over, health.answered) {
            (Some(_), _) => UpstreamState::PassedOver,
            (None, _) if health.failures >= SILENCES_MAX => UpstreamState::Fails,
            (None, Some(_)) => UpstreamState::Answers,
            (None, None) => UpstreamState::Unknown,
        };
        let ago = |then: Instant| now.saturating_duration_since(then);
        let failed = health.failed.as_ref();
        UpstreamReport {
            address: self.config.address,
            transport: match self.config.transport {
                Transport::Plain => "udp",
                Transport::Tcp => "tcp",
                Transport::Tls(_) => "tls",
                Transport::Https { .. } => "https",
            },
            state,
            usual: health.usual.map(|usual| (usual.smoothed, usual.variation)),
            hedge_after: health.hedge_after(),
            passed_over,
            failures: health.failures,
            answered: health.answered.map(ago),
            failed: failed.map(|(then, why)| (ago(*then), why.clone())),
        }
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn send(connection: &Exchange, query: &Message) -> Result<(Message, Vec<u8>), ExchangeError> {
    let request = DnsRequest::new(query.clone(), DnsRequestOptions::default());
    let response = connection.send(request).first_answer().await?;
    Ok(response.into_parts())
}

/// For people. Never the name that was asked for: errors about DNS have it, and so may the page of an HTTP server.
fn why(error: &ExchangeError) -> String {
    let text = match error {
        ExchangeError::Secure(NetError::Dns(_)) => ExchangeError::NotAnAnswer.to_string(),
        ExchangeError::Timeout
        | ExchangeError::Io(_)
        | ExchangeError::Secure(_)
        | ExchangeError::NotAnAnswer
        | ExchangeError::Unwritable => error.to_string(),
    };
    let own = text.split(", message: ").next().unwrap_or_default();
    own.chars().take(WHY_MAX_CHARS).collect()
}

impl Health {
    fn fail(&mut self, why: String, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        self.failed = Some((now, why));
    }

    fn silence(&mut self, now: Instant) {
        self.silences = self.silences.saturating_add(1);
        if self.silences >= SILENCES_MAX {
            self.passed_over_until = Some(now + PASSED_OVER);
        }
    }

    fn answer(&mut self, took: Duration, now: Instant) {
        let usual = self.usual.map_or(
            RoundTrip {
                smoothed: took,
                variation: took / 2,
            },
            |usual| RoundTrip {
                smoothed: (usual.smoothed * 7 + took) / 8,
                variation: (usual.variation * 3 + usual.smoothed.abs_diff(took)) / 4,
            },
        );
        *self = Self {
            usual: Some(usual),
            answered: Some(now),
            failed: self.failed.take(),
            ..Self::default()
        };
    }

    fn hedge_after(&self) -> Duration {
        let usual = self.usual.map(|usual| usual.smoothed + usual.variation * 4);
        usual.map_or(HEDGE_UNKNOWN, |usual| usual.clamp(HEDGE_MIN, HEDGE_MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upstream_is_passed_over_after_two_silences_and_tried_again_later() {
        let address = ([192, 0, 2, 1], 53).into();
        let upstream = Upstream::new(UpstreamConfig::plain(address), None, Arc::new(|_| None));
        let now = Instant::now();
        let silent = Some(&ExchangeError::Timeout);
        upstream.note(silent, now, now);
        assert!(!upstream.is_passed_over(now), "one loss is no outage");
        upstream.note_overtaken(now);
        assert!(upstream.is_passed_over(now));
        assert!(!upstream.is_passed_over(now + PASSED_OVER));
        upstream.note(None, now, now);
        assert!(!upstream.is_passed_over(now));
    }

    #[test]
    fn who_answers_others_is_not_silent_and_who_is_silent_is_probed_now_and_then() {
        let address = ([192, 0, 2, 1], 53).into();
        let upstream = Upstream::new(UpstreamConfig::plain(address), None, Arc::new(|_| None));
        let begin = Instant::now();
        let at = |s| begin + Duration::from_secs(s);
        let silent = Some(&ExchangeError::Timeout);
        upstream.note(None, at(1), at(2));
        for _ in 0..3 {
            upstream.note(silent, at(1), at(3)); // Asked before that answer came.
        }
        assert!(!upstream.is_passed_over(at(3)) && !upstream.is_silent(at(3)));
        assert!(!upstream.begin_probe(at(3)));

        upstream.note(silent, at(3), at(5));
        assert!(upstream.is_silent(at(5)) && !upstream.is_passed_over(at(5)));
        let probed: Vec<_> = (5..15).filter(|&s| upstream.begin_probe(at(s))).collect();
        assert_eq!(probed, [5, 8, 11, 14]);
        assert!(upstream.is_silent(at(34)) && !upstream.is_silent(at(35)));
        upstream.note(None, at(14), at(15));
        assert!(!upstream.is_silent(at(15)) && !upstream.begin_probe(at(20)));
    }

    #[test]
    fn what_became_of_questions_is_told_and_outlives_the_time_for_which_it_is_passed_over() {
        let address = ([192, 0, 2, 1], 53).into();
        let upstream = Upstream::new(UpstreamConfig::plain(address), None, Arc::new(|_| None));
        let begin = Instant::now();
        let at = |s| begin + Duration::from_secs(s);
        let state = |s| upstream.report(at(s)).state;
        assert_eq!(state(0), UpstreamState::Unknown);
        upstream.note(None, begin, begin + Duration::from_millis(40));
        assert_eq!(state(1), UpstreamState::Answers);
        upstream.note_unhelpful(ResponseCode::Refused, at(2));
        let refused = upstream.report(at(3));
        let why = Some((Duration::from_secs(1), "it said REFUSED".to_owned()));
        assert_eq!(
            (refused.state, refused.failed),
            (UpstreamState::Answers, why)
        );

        upstream.note(Some(&ExchangeError::Timeout), at(4), at(4));
        assert_eq!(state(4), UpstreamState::Answers, "one loss is no outage");
        upstream.note(Some(&ExchangeError::Timeout), at(5), at(5));
        let silent = upstream.report(at(6));
        assert_eq!(silent.state, UpstreamState::PassedOver);
        assert_eq!(
            silent.passed_over,
            Some(PASSED_OVER - Duration::from_secs(1))
        );
        let later = upstream.report(at(600));
        assert_eq!((later.state, later.failures), (UpstreamState::Fails, 2));
        let (ago, why) = later.failed.unwrap();
        assert_eq!(
            (ago.as_secs(), why.as_str()),
            (595, "nothing came back in time")
        );
        assert_eq!(later.usual.map(|(mean, _)| mean.as_millis()), Some(40));

        upstream.note(None, at(601), at(601));
        let back = upstream.report(at(602));
        assert_eq!((back.state, back.failures), (UpstreamState::Answers, 0));
        assert!(back.failed.is_some(), "what was is told all the same");
        // Refused connections cost nobody time, and are failures nevertheless.
        let refused = ExchangeError::Io(io::ErrorKind::ConnectionRefused.into());
        upstream.note(Some(&refused), at(603), at(603));
        upstream.note(Some(&refused), at(603), at(603));
        assert_eq!(state(603), UpstreamState::Fails);
    }

    #[test]
    fn what_is_told_of_a_failure_has_no_name_that_was_asked_for() {
        let page =
            "http unsuccessful code: 502 Bad Gateway, message: cannot resolve clinic.example";
        let said = why(&ExchangeError::Secure(NetError::Msg(page.to_owned())));
        assert_eq!(said, "http unsuccessful code: 502 Bad Gateway");
        let long = why(&ExchangeError::Secure(NetError::Msg("x".repeat(9_000))));
        assert_eq!(long.len(), WHY_MAX_CHARS);
    }

    #[test]
    fn the_next_is_asked_when_the_usual_time_is_over() {
        let (mut health, now) = (Health::default(), Instant::now());
        assert_eq!(health.hedge_after(), HEDGE_UNKNOWN);
        for _ in 0..64 {
            health.answer(Duration::from_millis(50), now);
        }
        let near = Duration::from_millis(50)..Duration::from_millis(55);
        assert!(near.contains(&health.hedge_after()), "{health:?}");
        health.answer(Duration::from_millis(2), now);
        assert!(
            health.hedge_after() > Duration::from_millis(80),
            "{health:?}"
        );
        for (took, wait) in [(0, HEDGE_MIN), (900, HEDGE_MAX)] {
            for _ in 0..64 {
                health.answer(Duration::from_millis(took), now);
            }
            assert_eq!(health.hedge_after(), wait, "{took} ms");
        }
    }

    #[test]
    fn what_is_no_upstream_by_tls_is_named() {
        let address = "192.0.2.1:853".parse().unwrap();
        let name = |name: &str| UpstreamConfig::tls(address, name).map(|one| one.transport);
        assert!(matches!(name("dns.example.org"), Ok(Transport::Tls(_))));
        assert!(matches!(name("192.0.2.1"), Ok(Transport::Tls(_))));
        assert_eq!(name("a b"), Err(BadUpstream::Name("a b".to_owned())));
        let url = |url: &str| UpstreamConfig::https(address, url).map(|one| one.transport);
        let https = Transport::Https {
            name: "dns.example.org".to_owned(),
            path: "/dns-query".to_owned(),
        };
        assert_eq!(url("https://dns.example.org/dns-query"), Ok(https));
        for bad in [
            "http://dns.example.org/q",
            "https://dns.example.org",
            "https://a/b c",
            "https://a/",
        ] {
            assert_eq!(url(bad), Err(BadUpstream::Url(bad.to_owned())));
        }
    }

    #[test]
    fn an_upstream_may_be_an_address_alone() {
        for (text, address) in [
            ("tls://192.0.2.1", "192.0.2.1:853"),
            ("tls://192.0.2.1:8853", "192.0.2.1:8853"),
            ("tls://[2001:db8::1]", "[2001:db8::1]:853"),
            ("tls://[2001:db8::1]:8853", "[2001:db8::1]:8853"),
        ] {
            let address: SocketAddr = address.parse().unwrap();
            let named = UpstreamConfig::tls(address, &address.ip().to_string());
            assert_eq!(text.parse(), named, "{text}");
        }
        let plain = "192.0.2.1:53";
        assert_eq!(
            plain.parse(),
            Ok(UpstreamConfig::plain(plain.parse().unwrap()))
        );
        for (text, address) in [
            ("tcp://192.0.2.1", plain),
            ("tcp://[2001:db8::1]:5353", "[2001:db8::1]:5353"),
        ] {
            let (address, transport) = (address.parse().unwrap(), Transport::Tcp);
            assert_eq!(
                text.parse(),
                Ok(UpstreamConfig { address, transport }),
                "{text}"
            );
        }
        for text in [
            "192.0.2.1",
            "tls://dns.example.org",
            "tls://2001:db8::1",
            "tls://",
            "udp://192.0.2.1",
            "",
        ] {
            assert_eq!(
                text.parse::<UpstreamConfig>(),
                Err(BadUpstream::Address(text.to_owned()))
            );
        }
    }
}
