//! The log of queries, where it is asked for: a line for each answer, written by a task of its own, so that nobody
//! who asks waits for a terminal or a disk.

use std::{net::IpAddr, sync::Arc};

use hickory_proto::op::Message;
use tokio::sync::mpsc;

use crate::counters::Counters;

/// Answers that wait to be logged, of some 200 bytes each: 0.2 MiB. Beyond, they are counted (`unlogged`) and not logged.
const WAITING_MAX: usize = 1024;

/// Where answers are put to be logged.
#[derive(Debug)]
pub(crate) struct QueryLog {
    to: mpsc::Sender<(IpAddr, Vec<u8>)>,
    counters: Arc<Counters>,
}

impl QueryLog {
    /// Also the task that writes it, until this is dropped.
    pub(crate) fn new(counters: Arc<Counters>) -> (Self, impl Future<Output = ()> + Send) {
        let (to, mut answers) = mpsc::channel::<(IpAddr, Vec<u8>)>(WAITING_MAX);
        let write = async move {
            while let Some((client, answer)) = answers.recv().await {
                write(client, &answer);
            }
        };
        (Self { to, counters }, write)
    }

    /// Logs what `client` was told; never waits.
    pub(crate) fn add(&self, client: IpAddr, answer: &[u8]) {
        if self.to.try_send((client, answer.to_vec())).is_err() {
            self.counters.unlogged.add();
        }
    }
}

/// Names are printed as in zone files (RFC 1035 §5.1): control characters are escaped.
fn write(client: IpAddr, answer: &[u8]) {
    let Ok(answer) = Message::from_vec(answer) else {
        return; // We wrote it.
    };
    for question in &answer.queries {
        tracing::info!(
            %client,
            name = %question.name(),
            kind = %question.query_type(),
            code = %answer.metadata.response_code,
            answers = answer.answers.len(),
            "DNS query"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[tokio::test]
    async fn what_the_log_cannot_take_is_counted_and_nobody_waits() {
        let counters = Arc::<Counters>::default();
        let (log, writes) = QueryLog::new(Arc::clone(&counters));
        for _ in 0..WAITING_MAX + 3 {
            log.add(Ipv4Addr::LOCALHOST.into(), b"no message");
        }
        assert_eq!(counters.unlogged.get(), 3);
        drop(log);
        writes.await;
    }
}
