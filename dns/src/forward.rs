//! Questions about everybody else's names: the cache, then the upstreams in order.

use std::{
    cmp::Reverse,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hickory_proto::{
    op::{Message, Query, ResponseCode},
    rr::Name,
};
use tokio::time::{Instant, timeout};

use crate::{
    answer::{ExtendedError, explain, fail},
    cache::{Cache, Cached, Key},
    client::{self, ExchangeError},
    counters::Counters,
    server::Stub,
};

/// All upstreams together get this long. glibc gives up after 5 s.
const DEADLINE: Duration = Duration::from_secs(3);

/// An upstream that was silent this often in a row is passed over for a while. Not after the
/// first time: on a lossy link both packets of one exchange may be lost.
const SILENCES_MAX: u32 = 2;

/// For how long. With no upstream left, questions fail at once until then.
const PASSED_OVER: Duration = Duration::from_secs(2);

/// Answers from upstreams.
#[derive(Debug)]
pub(crate) struct Forwarder {
    /// By the domain that they are asked about; of several that fit, the longest counts.
    upstreams: Vec<(Name, Vec<Upstream>)>,
    cache: Mutex<Cache>,
    counters: Arc<Counters>,
}

#[derive(Debug)]
struct Upstream {
    address: SocketAddr,
    health: Mutex<Health>,
}

#[derive(Debug, Default)]
struct Health {
    silences: u32,
    passed_over_until: Option<Instant>,
}

impl Forwarder {
    pub(crate) fn new(upstreams: &[SocketAddr], stubs: &[Stub], counters: Arc<Counters>) -> Self {
        let of = |domain: &Name, upstreams: &[SocketAddr]| {
            let upstreams = upstreams.iter().map(|&address| Upstream {
                address,
                health: Mutex::default(),
            });
            (domain.clone(), upstreams.collect())
        };
        let stubs = stubs.iter().map(|stub| of(&stub.domain, &stub.upstreams));
        let mut upstreams: Vec<_> = stubs.chain([of(&Name::root(), upstreams)]).collect();
        upstreams.sort_by_key(|(domain, _)| Reverse(domain.num_labels()));
        Self {
            upstreams,
            cache: Mutex::default(),
            counters,
        }
    }

    /// `reply`, completed from the cache if what it knows of `question` still holds.
    pub(crate) fn cached(&self, reply: &Message, question: &Query) -> Option<Message> {
        let cached = lock(&self.cache).get(&key(reply, question), Instant::now().into_std());
        let Some(Cached::Fresh(message)) = cached else {
            return None;
        };
        self.counters.cache_hits.add();
        Some(complete(reply.clone(), message))
    }

    /// `reply`, completed by an upstream, or by what one once said, or with an error.
    pub(crate) async fn ask(&self, mut reply: Message, question: Query) -> Message {
        self.counters.forwarded.add();
        let key = key(&reply, &question);
        let answered = timeout(DEADLINE, self.ask_upstreams(&key, question)).await;
        if let Ok(Some(message)) = answered {
            return complete(reply, message);
        }
        match lock(&self.cache).get(&key, Instant::now().into_std()) {
            Some(Cached::Fresh(message)) => complete(reply, message), // Another asked meanwhile.
            Some(Cached::Stale(message)) => {
                self.counters.stale.add();
                explain(&mut reply, ExtendedError::StaleAnswer);
                complete(reply, message)
            }
            None => {
                fail(&mut reply, ExtendedError::NoReachableAuthority);
                reply
            }
        }
    }

    async fn ask_upstreams(&self, key: &Key, question: Query) -> Option<Message> {
        let mut unhelpful = None;
        let mut domains = self.upstreams.iter();
        let responsible = domains.find(|(domain, _)| domain.zone_of(question.name()));
        for upstream in responsible.into_iter().flat_map(|(_, upstreams)| upstreams) {
            if upstream.is_passed_over(Instant::now()) {
                continue;
            }
            let mut query = client::question(question.clone());
            query.metadata.checking_disabled = key.checking_disabled;
            if let Some(edns) = &mut query.edns {
                edns.set_dnssec_ok(key.dnssec_ok);
            }
            let answered = client::exchange(upstream.address, query).await;
            upstream.note(answered.as_ref().err(), Instant::now());
            match answered {
                Ok((message, bytes)) if is_helpful(&message) => {
                    let now = Instant::now().into_std();
                    lock(&self.cache).insert(key.clone(), bytes, &message, now);
                    return Some(message);
                }
                Ok((message, _)) => unhelpful = Some(message),
                Err(error) => tracing::trace!(upstream = %upstream.address, %error, "no answer"),
            }
        }
        unhelpful
    }
}

impl Upstream {
    fn is_passed_over(&self, now: Instant) -> bool {
        let until = lock(&self.health).passed_over_until;
        until.is_some_and(|until| now < until)
    }

    /// Remembers how an exchange went. Errors that come at once cost nobody time.
    fn note(&self, error: Option<&ExchangeError>, now: Instant) {
        let mut health = lock(&self.health);
        match error {
            Some(ExchangeError::Timeout) => {
                health.silences = health.silences.saturating_add(1);
                if health.silences >= SILENCES_MAX {
                    health.passed_over_until = Some(now + PASSED_OVER);
                }
            }
            Some(ExchangeError::Io(_) | ExchangeError::NotAnAnswer | ExchangeError::Unwritable) => {
            }
            None => *health = Health::default(),
        }
    }
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
        let forwarder = Forwarder::new(&[], &[], Arc::default());
        let name = Name::from_str("example.org.").unwrap();
        let question = Query::query(name.clone(), RecordType::A);
        let reply = client::question(question.clone()).into_response();
        let mut said = Message::response(1, OpCode::Query);
        said.add_answer(Record::from_rdata(name, 60, RData::A(A::new(192, 0, 2, 1))));
        let learnt = Instant::now().into_std() - Duration::from_secs(120);
        let bytes = said.to_vec().unwrap();
        lock(&forwarder.cache).insert(key(&reply, &question), bytes, &said, learnt);

        assert_eq!(forwarder.cached(&reply, &question), None);
        let stale = forwarder.ask(reply.clone(), question.clone()).await;
        assert_eq!(stale.answers[0].data, said.answers[0].data);
        assert_eq!(
            (stale.response_code, stale.answers[0].ttl),
            (ResponseCode::NoError, 30)
        );
        assert_eq!(forwarder.counters.stale.get(), 1);

        let other = Query::query(Name::from_str("example.net.").unwrap(), RecordType::A);
        let failed = forwarder.ask(reply, other).await;
        assert_eq!(failed.response_code, ResponseCode::ServFail);
    }

    #[test]
    fn an_upstream_is_passed_over_after_two_silences_and_tried_again_later() {
        let upstream = Upstream {
            address: ([192, 0, 2, 1], 53).into(),
            health: Mutex::default(),
        };
        let now = Instant::now();
        let silent = Some(&ExchangeError::Timeout);
        upstream.note(silent, now);
        assert!(!upstream.is_passed_over(now), "one loss is no outage");
        upstream.note(silent, now);
        assert!(upstream.is_passed_over(now));
        assert!(!upstream.is_passed_over(now + PASSED_OVER));
        upstream.note(None, now);
        assert!(!upstream.is_passed_over(now));
    }
}
