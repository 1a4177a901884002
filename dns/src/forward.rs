//! Questions about everybody else's names: the cache, then the upstreams, each a little after the one before it.

use std::{
    cmp::Reverse,
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use hickory_proto::{
    op::{Message, Query, ResponseCode},
    rr::Name,
};
use rustls::ClientConfig;
use tokio::time::{Instant, sleep_until, timeout};

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
    upstreams: Vec<(Name, Vec<Upstream>)>,
    cache: Mutex<Cache>,
    counters: Arc<Counters>,
    /// When an answer beyond its time was last given.
    gave_stale: Mutex<Option<Instant>>,
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
    ) -> Self {
        let of = |domain: &Name, upstreams: &[UpstreamConfig]| {
            let upstreams = upstreams.iter().cloned();
            let upstreams =
                upstreams.map(|one| Upstream::new(one, tls.clone(), Arc::clone(device)));
            (domain.clone(), upstreams.collect())
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
            counters,
            gave_stale: Mutex::default(),
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
        timeout(DEADLINE, self.ask_upstreams(&key, question))
            .await
            .ok();
    }

    /// `reply`, completed by an upstream, or by what one once said, or with an error.
    pub(crate) async fn ask(&self, mut reply: Message, question: Query) -> Message {
        self.counters.forwarded.add();
        let key = key(&reply, &question);
        let is_stale = matches!(self.look_up(&key), Some(Cached::Stale(_)));
        let deadline = if is_stale {
            DEADLINE_WITH_STALE
        } else {
            DEADLINE
        };
        let begun = Instant::now();
        let answered = timeout(deadline, self.ask_upstreams(&key, question)).await;
        self.counters.waits.add(begun.elapsed());
        if let Ok(Some(message)) = answered {
            return complete(reply, message);
        }
        match self.look_up(&key) {
            // Another asked meanwhile.
            Some(Cached::Fresh(message) | Cached::Ending(message)) => complete(reply, message),
            Some(Cached::Stale(message)) => {
                self.counters.stale.add();
                *lock(&self.gave_stale) = Some(Instant::now());
                explain(&mut reply, ExtendedError::StaleAnswer);
                complete(reply, message)
            }
            None => {
                fail(&mut reply, ExtendedError::NoReachableAuthority);
                reply
            }
        }
    }

    fn look_up(&self, key: &Key) -> Option<Cached> {
        lock(&self.cache).get(key, Instant::now().into_std())
    }

    /// The first helpful answer. The next upstream is asked when one has failed, and also when one takes longer than
    /// it usually does.
    async fn ask_upstreams(&self, key: &Key, question: Query) -> Option<Message> {
        let mut next = self.to_ask(question.name());
        let mut unhelpful = None;
        let mut asked = FuturesUnordered::new();
        let mut order: Vec<&Upstream> = Vec::new();
        let mut hedge_at = Instant::now();
        loop {
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
                else => return unhelpful,
            }
        }
    }

    /// The upstreams for `name`, in order, without those that are passed over.
    fn to_ask(&self, name: &Name) -> VecDeque<&Upstream> {
        let now = Instant::now();
        let mut domains = self.upstreams.iter();
        let responsible = domains.find(|(domain, _)| domain.zone_of(name));
        let all = responsible.into_iter().flat_map(|(_, upstreams)| upstreams);
        let (passed_over, asked) = all.partition::<VecDeque<_>, _>(|one| one.is_passed_over(now));
        passed_over
            .iter()
            .for_each(|_| self.counters.passed_over.add());
        asked
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
    let start = Instant::now();
    let answered = upstream.ask(query).await;
    upstream.note(answered.as_ref().err(), start, Instant::now());
    (upstream, answered)
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
        rr::{RData, Record, RecordType, rdata::A},
    };

    use super::*;

    #[tokio::test]
    async fn with_no_upstream_left_an_old_answer_is_better_than_none() {
        let device: DeviceFor = Arc::new(|_| None);
        let forwarder = Forwarder::new(&DnsConfig::default(), None, &device, Arc::default());
        let name = Name::from_str("example.org.").unwrap();
        let question = Query::query(name.clone(), RecordType::A);
        let reply = client::question(question.clone()).into_response();
        let mut said = Message::response(1, OpCode::Query);
        said.add_answer(Record::from_rdata(name, 60, RData::A(A::new(192, 0, 2, 1))));
        let learnt = Instant::now().into_std() - Duration::from_secs(120);
        let bytes = said.to_vec().unwrap();
        lock(&forwarder.cache).insert(key(&reply, &question), bytes, &said, learnt);

        assert!(matches!(
            forwarder.cached(&reply, &question),
            Known::Nothing
        ));
        let stale = forwarder.ask(reply.clone(), question.clone()).await;
        assert_eq!(stale.answers[0].data, said.answers[0].data);
        assert_eq!(
            (stale.response_code, stale.answers[0].ttl),
            (ResponseCode::NoError, 30)
        );
        assert_eq!(forwarder.counters.stale.get(), 1);
        assert_eq!(forwarder.counters.waits.counts().iter().sum::<u64>(), 1);

        let other = Query::query(Name::from_str("example.net.").unwrap(), RecordType::A);
        let failed = forwarder.ask(reply, other).await;
        assert_eq!(failed.response_code, ResponseCode::ServFail);
    }
}
