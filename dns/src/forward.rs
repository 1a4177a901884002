//! Questions about everybody else's names: the cache, then the upstreams, each a little after the one before it.

use std::{
    cmp::Reverse,
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use hickory_proto::{
    op::{Message, Query, ResponseCode},
    rr::{Name, RecordType},
};
use rustls::ClientConfig;
use tokio::{
    sync::OnceCell,
    time::{Instant, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    answer::{ExtendedError, explain, fail},
    cache::{Cache, Cached, Key},
    client::{self, ExchangeError},
    counters::Counters,
    inspect::{CachePage, CachedAnswer},
    server::DnsConfig,
    upstream::{DeviceFor, Upstream, UpstreamConfig, UpstreamReport},
};

/// All upstreams together get this long. glibc gives up after 5 s.
const DEADLINE: Duration = Duration::from_secs(3);

/// And this long when there is an answer beyond its time (RFC 8767 §5).
const DEADLINE_WITH_STALE: Duration = Duration::from_millis(1800);

/// Answers from upstreams.
#[derive(Debug)]
pub(crate) struct Forwarder {
    /// By the domain that they are asked about; of several that fit, the longest counts.
    upstreams: Vec<(Name, Vec<Arc<Upstream>>)>,
    cache: Mutex<Cache>,
    /// What upstreams are being asked. As many as there are questions that wait.
    asking: Mutex<HashMap<Key, Arc<OnceCell<Option<Message>>>>>,
    counters: Arc<Counters>,
    /// When an answer beyond its time was last given.
    gave_stale: Mutex<Option<Instant>>,
    /// Own what no client waits for.
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// What is known of a question.
pub(crate) enum Known {
    /// This.
    Answer(Message),
    /// This, and it is worth being asked for anew.
    Ending(Message),
    /// Nothing that holds.
    Nothing,
}

impl Forwarder {
    /// `tls`: there if an upstream is asked by TLS.
    pub(crate) fn new(
        config: &DnsConfig,
        tls: Option<Arc<ClientConfig>>,
        device: &DeviceFor,
        counters: Arc<Counters>,
        tasks: TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        let of = |domain: &Name, upstreams: &[UpstreamConfig]| {
            let upstreams = upstreams.iter().cloned();
            let upstreams =
                upstreams.map(|one| Upstream::new(one, tls.clone(), Arc::clone(device)));
            (domain.clone(), upstreams.map(Arc::new).collect())
        };
        let stubs = config.stubs.iter();
        let stubs = stubs.map(|stub| of(&stub.domain, &stub.upstreams));
        let mut upstreams: Vec<_> = stubs
            .chain([of(&Name::root(), &config.upstreams)])
            .collect();
        upstreams.sort_by_key(|(domain, _)| Reverse(domain.num_labels()));
        Self {
            upstreams,
            cache: Mutex::new(Cache::new(config.stale_max)),
            asking: Mutex::default(),
            counters,
            gave_stale: Mutex::default(),
            tasks,
            stop,
        }
    }

    /// How each upstream does, with the domain that it is asked about: those for everything first.
    pub(crate) fn upstreams(&self) -> Vec<(&Name, UpstreamReport)> {
        let now = Instant::now();
        let domains = self.upstreams.iter().rev();
        let each =
            domains.flat_map(|(domain, upstreams)| upstreams.iter().map(move |one| (domain, one)));
        each.map(|(domain, one)| (domain, one.report(now)))
            .collect()
    }

    /// How long ago an answer beyond its time was given.
    pub(crate) fn gave_stale(&self) -> Option<Duration> {
        lock(&self.gave_stale).map(|then| then.elapsed())
    }

    /// What the cache has of `below` and the names below it, at most `most` of them. The lock is held for some entries at a time.
    pub(crate) fn look(&self, below: &Name, most: usize) -> CachePage {
        let mut page = CachePage::default();
        let mut next = Some(u64::MAX);
        while let Some(before) = next {
            let now = Instant::now().into_std();
            let room = most.saturating_sub(page.answers.len());
            let cache = lock(&self.cache);
            let (look, stale_max) = (cache.look(before, below, room, now), cache.stale_max());
            drop(cache);
            let seen = look.seen.into_iter();
            let answers = seen.filter_map(|one| CachedAnswer::new(&one, stale_max, now));
            page.answers.extend(answers);
            page.matching += look.matching;
            next = look.next;
        }
        page
    }

    /// Forgets what the cache has of `below` and the names below it, and says how many answers that were.
    pub(crate) fn forget(&self, below: &Name) -> usize {
        let mut count = 0;
        let mut next = Some(u64::MAX);
        while let Some(before) = next {
            let mut cache = lock(&self.cache);
            let (forgotten, rest) = cache.forget(before, below);
            self.counters.cached.set(cache.len());
            drop(cache);
            count += forgotten.len();
            next = rest;
        }
        count
    }

    /// `reply`, completed from the cache if what it knows of `question` still holds.
    pub(crate) fn cached(&self, reply: &Message, question: &Query) -> Known {
        let cached = lock(&self.cache).get(&key(reply, question), Instant::now().into_std());
        let completed = |message| {
            self.counters.cache_hits.add();
            complete(reply.clone(), message)
        };
        match cached {
            Some(Cached::Fresh(message)) => Known::Answer(completed(message)),
            Some(Cached::Ending(message)) => Known::Ending(completed(message)),
            Some(Cached::Stale(_)) | None => Known::Nothing,
        }
    }

    /// Asks anew for what is about to end.
    pub(crate) async fn refresh(&self, reply: Message, question: Query) {
        self.counters.prefetched.add();
        let key = key(&reply, &question);
        // Without an answer it stays until its end, and is asked for then.
        self.ask_once(&key, question, false).await;
    }

    /// `reply`, completed by an upstream, or by what one once said, or with an error.
    pub(crate) async fn ask(&self, mut reply: Message, question: Query) -> Message {
        self.counters.forwarded.add();
        let key = key(&reply, &question);
        let is_stale = matches!(self.look_up(&key), Some(Cached::Stale(_)));
        let begun = Instant::now();
        let said = self.ask_once(&key, question, is_stale).await;
        self.counters.waits.add(begun.elapsed());
        if let Some(message) = said.as_ref().filter(|said| is_helpful(said)) {
            return complete(reply, message.clone());
        }
        match (self.look_up(&key), said) {
            // Another asked meanwhile.
            (Some(Cached::Fresh(message) | Cached::Ending(message)), _) => complete(reply, message),
            // Also when one says that it has none: a router without its uplink does (RFC 8767 §5).
            (Some(Cached::Stale(message)), _) => {
                self.counters.stale.add();
                *lock(&self.gave_stale) = Some(Instant::now());
                explain(&mut reply, ExtendedError::StaleAnswer);
                complete(reply, message)
            }
            (None, Some(unhelpful)) => complete(reply, unhelpful),
            (None, None) => {
                fail(&mut reply, ExtendedError::NoReachableAuthority);
                reply
            }
        }
    }

    fn look_up(&self, key: &Key) -> Option<Cached> {
        lock(&self.cache).get(key, Instant::now().into_std())
    }

    /// Asks, or waits with who asks already: many questions for one name at once would make an answer to one of them easier to
    /// forge (RFC 5452 §5), and a crowd's the upstream's.
    async fn ask_once(&self, key: &Key, question: Query, is_stale: bool) -> Option<Message> {
        let asking = Asking {
            said: Arc::clone(lock(&self.asking).entry(key.clone()).or_default()),
            all: &self.asking,
            key,
        };
        let ask = || self.ask_upstreams(key, question, is_stale);
        asking.said.get_or_init(ask).await.clone()
    }

    /// The first helpful answer, or else what one said that has none. The next upstream is asked when one has failed, and also
    /// when one takes longer than it usually does. With an answer beyond its time (`is_stale`) nobody waits for long, nor for
    /// upstreams that were silent just now: whether those are back is found out without the client.
    async fn ask_upstreams(&self, key: &Key, question: Query, is_stale: bool) -> Option<Message> {
        let begun = Instant::now();
        let (domain, upstreams) = self.responsible(question.name())?;
        let mut next = self.to_ask(upstreams, is_stale, begun);
        let deadline = begun
            + if is_stale {
                DEADLINE_WITH_STALE
            } else {
                DEADLINE
            };
        let mut unhelpful = None;
        let mut asked = FuturesUnordered::new();
        let mut order: Vec<&Upstream> = Vec::new();
        let mut hedge_at = begun;
        while !(next.is_empty() && asked.is_empty()) {
            tokio::select! {
                Some((upstream, answered)) = asked.next() => match self.judge(upstream, key, answered) {
                    Judged::Helpful(message) => {
                        let overtaken = order.into_iter().take_while(|&one| !std::ptr::eq(one, upstream));
                        overtaken.for_each(|one| one.note_overtaken(Instant::now()));
                        return Some(message);
                    }
                    Judged::Unhelpful(message) => {
                        unhelpful = message.or(unhelpful);
                        order.retain(|&one| !std::ptr::eq(one, upstream));
                        hedge_at = Instant::now();
                    }
                },
                () = sleep_until(hedge_at), if !next.is_empty() => {
                    let Some(upstream) = next.pop_front() else { continue };
                    if !order.is_empty() {
                        self.counters.hedged.add();
                    }
                    order.push(upstream);
                    hedge_at = Instant::now() + upstream.hedge_after();
                    asked.push(ask(upstream, key, question.clone()));
                }
                () = sleep_until(deadline) => {
                    // Their own time is not over, and nobody waits for the rest of it.
                    order.iter().for_each(|one| one.note(Some(&ExchangeError::Timeout), begun, deadline));
                    break;
                }
            }
        }
        self.probe(domain, upstreams);
        unhelpful
    }

    /// Those who know of `name`, and the domain that they are asked about.
    fn responsible(&self, name: &Name) -> Option<(&Name, &[Arc<Upstream>])> {
        let mut domains = self.upstreams.iter();
        let (domain, upstreams) = domains.find(|(domain, _)| domain.zone_of(name))?;
        Some((domain, upstreams))
    }

    /// `upstreams`, in order, without those that are passed over.
    fn to_ask<'a>(
        &self,
        upstreams: &'a [Arc<Upstream>],
        is_stale: bool,
        now: Instant,
    ) -> VecDeque<&'a Upstream> {
        let passed_over =
            |one: &&Upstream| one.is_passed_over(now) || is_stale && one.is_silent(now);
        let all = upstreams.iter().map(Arc::as_ref);
        let (passed_over, asked) = all.partition::<VecDeque<_>, _>(passed_over);
        passed_over
            .iter()
            .for_each(|_| self.counters.passed_over.add());
        asked
    }

    /// Asks those that were silent whether they are there, if that is due. What they know themselves is enough: a name whose own
    /// servers are gone, or all of them without an uplink, is not their silence.
    fn probe(&self, domain: &Name, upstreams: &[Arc<Upstream>]) {
        let now = Instant::now();
        for upstream in upstreams.iter().filter(|one| one.begin_probe(now)) {
            let (upstream, stop) = (Arc::clone(upstream), self.stop.clone());
            let record_type = if domain.is_root() {
                RecordType::NS
            } else {
                RecordType::SOA
            };
            let mut probe = client::question(Query::query(domain.clone(), record_type));
            probe.metadata.recursion_desired = false;
            self.tasks.spawn(async move {
                stop.run_until_cancelled(upstream.probe(probe)).await;
            });
        }
    }

    /// Keeps what is good of an answer.
    fn judge(&self, upstream: &Upstream, key: &Key, answered: Answered) -> Judged {
        match answered {
            Ok((message, bytes)) if is_helpful(&message) => {
                let now = Instant::now().into_std();
                let mut cache = lock(&self.cache);
                cache.insert(key.clone(), bytes, &message, now);
                self.counters.cached.set(cache.len());
                drop(cache);
                Judged::Helpful(message)
            }
            Ok((message, _)) => {
                upstream.note_unhelpful(message.response_code, Instant::now());
                Judged::Unhelpful(Some(message))
            }
            Err(error) => {
                self.counters.upstream_failures.add();
                tracing::trace!(upstream = %upstream.config.address, %error, "no answer");
                Judged::Unhelpful(None)
            }
        }
    }
}

/// Who waits for an answer; the last one takes it away.
struct Asking<'a> {
    said: Arc<OnceCell<Option<Message>>>,
    all: &'a Mutex<HashMap<Key, Arc<OnceCell<Option<Message>>>>>,
    key: &'a Key,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        let mut all = lock(self.all);
        // The map's and this one. Others are made with the lock held.
        if Arc::strong_count(&self.said) == 2 {
            all.remove(self.key);
        }
    }
}

type Answered = Result<(Message, Vec<u8>), ExchangeError>;

enum Judged {
    Helpful(Message),
    /// What it said, if it said anything.
    Unhelpful(Option<Message>),
}

async fn ask<'a>(upstream: &'a Upstream, key: &Key, question: Query) -> (&'a Upstream, Answered) {
    let mut query = client::question(question);
    query.metadata.checking_disabled = key.checking_disabled;
    if let Some(edns) = &mut query.edns {
        edns.set_dnssec_ok(key.dnssec_ok);
    }
    (upstream, upstream.ask_and_note(query).await)
}

fn key(reply: &Message, question: &Query) -> Key {
    Key {
        name: question.name().to_lowercase(),
        query_type: question.query_type(),
        dnssec_ok: reply
            .edns
            .as_ref()
            .is_some_and(|edns| edns.flags().dnssec_ok),
        checking_disabled: reply.checking_disabled,
    }
}

fn is_helpful(message: &Message) -> bool {
    matches!(
        message.response_code,
        ResponseCode::NoError | ResponseCode::NXDomain
    )
}

/// Adds what an upstream said to `reply`.
fn complete(mut reply: Message, said: Message) -> Message {
    reply.metadata.response_code = said.response_code;
    // After an alias of our own the answer is not wholly theirs.
    reply.metadata.authentic_data = said.authentic_data && reply.answers.is_empty();
    reply.answers.extend(said.answers);
    reply.authorities.extend(said.authorities);
    reply.additionals.extend(said.additionals);
    reply
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use hickory_proto::{
        op::OpCode,
        rr::{RData, Record, rdata::A},
    };

    use super::*;

    fn forwarder(upstreams: Vec<UpstreamConfig>) -> Forwarder {
        let config = DnsConfig {
            upstreams,
            ..DnsConfig::default()
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        let device: DeviceFor = Arc::new(|_| None);
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        Forwarder::new(
            &config,
            Some(tls.into()),
            &device,
            Arc::default(),
            tasks,
            stop,
        )
    }

    fn asked(name: &str) -> (Message, Query) {
        let question = Query::query(Name::from_str(name).unwrap(), RecordType::A);
        (client::question(question.clone()).into_response(), question)
    }

    /// Puts an answer for `name` into the cache that is a minute beyond its time.
    fn knows(forwarder: &Forwarder, name: &str) -> RData {
        let (reply, question) = asked(name);
        let mut said = Message::response(1, OpCode::Query);
        let data = RData::A(A::new(192, 0, 2, 1));
        said.add_answer(Record::from_rdata(
            question.name().clone(),
            60,
            data.clone(),
        ));
        let learnt = Instant::now().into_std() - Duration::from_secs(120);
        let bytes = said.to_vec().unwrap();
        lock(&forwarder.cache).insert(key(&reply, &question), bytes, &said, learnt);
        data
    }

    /// What comes of asking for it, and after how long.
    async fn ask_for(forwarder: &Forwarder, name: &str) -> (ResponseCode, Duration) {
        let ((reply, question), begun) = (asked(name), Instant::now());
        let reply = forwarder.ask(reply, question).await;
        (reply.response_code, begun.elapsed())
    }

    #[tokio::test]
    async fn with_no_upstream_left_an_old_answer_is_better_than_none() {
        let forwarder = forwarder(Vec::new());
        let data = knows(&forwarder, "example.org.");
        let (reply, question) = asked("example.org.");
        assert!(matches!(
            forwarder.cached(&reply, &question),
            Known::Nothing
        ));
        let stale = forwarder.ask(reply, question).await;
        assert_eq!(stale.answers[0].data, data);
        assert_eq!(
            (stale.response_code, stale.answers[0].ttl),
            (ResponseCode::NoError, 30)
        );
        assert_eq!(forwarder.counters.stale.get(), 1);
        assert_eq!(forwarder.counters.waits.counts().iter().sum::<u64>(), 1);

        let (code, _) = ask_for(&forwarder, "example.net.").await;
        assert_eq!(code, ResponseCode::ServFail);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lone_upstream_by_tls_that_is_silent_is_waited_for_once_and_then_probed() {
        use ResponseCode::{NoError, ServFail};
        // The kernel takes connections, and nobody reads them.
        let silent = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        silent.set_nonblocking(true).unwrap();
        let upstream = UpstreamConfig::tls(silent.local_addr().unwrap(), "127.0.0.1").unwrap();
        let forwarder = forwarder(vec![upstream]);
        knows(&forwarder, "example.org.");
        let connections = || std::iter::from_fn(|| silent.accept().ok()).count();
        let mut waited = ask_for(&forwarder, "example.org.").await;
        assert_eq!(waited, (NoError, DEADLINE_WITH_STALE));
        assert_eq!(connections(), 1, "the question");
        // Asked for each second: at once, and a probe every three seconds.
        for _ in 0..24 {
            waited = ask_for(&forwarder, "example.org.").await;
            assert_eq!(waited, (NoError, Duration::ZERO));
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        assert!((7..=9).contains(&connections()));
        // The probe was not answered either, so who asks for another name does not wait in vain.
        waited = ask_for(&forwarder, "example.net.").await;
        assert_eq!(waited, (ServFail, Duration::ZERO));
        // Nobody asked for long: it may be back, and what is beyond its time is not the first choice.
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert_eq!(connections(), 1, "nothing is probed while nothing is asked");
        waited = ask_for(&forwarder, "example.org.").await;
        assert_eq!(waited, (NoError, DEADLINE_WITH_STALE));
    }

    /// An upstream by UDP: silent about names in `slow`, SERVFAIL for `broken`, no data for all others.
    async fn stub() -> UpstreamConfig {
        let socket = tokio::net::UdpSocket::bind(("127.0.0.1", 0)).await.unwrap();
        let upstream = UpstreamConfig::plain(socket.local_addr().unwrap());
        tokio::spawn(async move {
            let mut buffer = [0; 1500];
            loop {
                let (len, from) = socket.recv_from(&mut buffer).await.unwrap();
                let mut said = Message::from_vec(&buffer[..len]).unwrap().into_response();
                let name = said.queries[0].name().to_ascii();
                if name.starts_with("broken") {
                    said.metadata.response_code = ResponseCode::ServFail;
                }
                if !name.contains("slow") {
                    let bytes = said.to_vec().unwrap();
                    socket.send_to(&bytes, from).await.unwrap();
                }
            }
        });
        upstream
    }

    #[tokio::test(start_paused = true)]
    async fn names_whose_own_servers_are_gone_do_not_take_the_only_upstream_away() {
        let forwarder = forwarder(vec![stub().await]);
        // Nothing else is asked: that it was silent is all that is known of it.
        let both = ["one.slow.", "two.slow."].map(|name| ask_for(&forwarder, name));
        for (code, _) in futures_util::future::join_all(both).await {
            assert_eq!(code, ResponseCode::ServFail);
        }
        // The probe takes a moment.
        tokio::time::sleep(Duration::from_millis(100)).await;
        let (code, _) = ask_for(&forwarder, "example.org.").await;
        assert_eq!(code, ResponseCode::NoError);
        assert_eq!(forwarder.counters.passed_over.get(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_that_many_ask_for_at_once_is_asked_for_once() {
        let silent = std::net::UdpSocket::bind(("127.0.0.1", 0)).unwrap();
        silent.set_nonblocking(true).unwrap();
        let upstream = UpstreamConfig::plain(silent.local_addr().unwrap());
        let forwarder = forwarder(vec![upstream]);
        let crowd = (0..50).map(|_| ask_for(&forwarder, "example.org."));
        for (code, _) in futures_util::future::join_all(crowd).await {
            assert_eq!(code, ResponseCode::ServFail);
        }
        let mut buffer = [0; 512];
        let received = || {
            silent
                .recv(&mut buffer)
                .ok()
                .map(|len| buffer[..len].to_vec())
        };
        let received = std::iter::from_fn(received);
        let names = received.filter(|one| one.windows(7).any(|part| part == b"example"));
        assert_eq!(names.count(), 2, "the question, and once more after 0.4 s");
        assert!(lock(&forwarder.asking).is_empty());
        // Who hangs up leaves nothing behind, and the next is answered nevertheless.
        let given_up = tokio::time::timeout(Duration::from_millis(1), ask_for(&forwarder, "a."));
        let waits = async {
            tokio::task::yield_now().await;
            ask_for(&forwarder, "a.").await
        };
        let (given_up, (code, _)) = tokio::join!(given_up, waits);
        assert!(given_up.is_err());
        assert_eq!(code, ResponseCode::ServFail);
        assert!(lock(&forwarder.asking).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn an_old_answer_is_better_than_that_there_is_none_for_now() {
        let forwarder = forwarder(vec![stub().await]);
        let data = knows(&forwarder, "broken.example.org.");
        let (reply, question) = asked("broken.example.org.");
        let reply = forwarder.ask(reply, question).await;
        assert_eq!(reply.response_code, ResponseCode::NoError);
        assert_eq!(reply.answers[0].data, data);
        assert_eq!(forwarder.counters.stale.get(), 1);
        let (code, _) = ask_for(&forwarder, "broken.example.net.").await;
        assert_eq!(code, ResponseCode::ServFail);
    }
}
