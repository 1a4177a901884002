//! Bytes between a client and a node, until both sides are done or one is gone.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional},
    time,
};

/// How long no byte may go once one side has said that it sends no more: the answer to what was asked last comes
/// within that, or the other side is stuck.
const HALF_CLOSED_IDLE: Duration = Duration::from_secs(300);

/// What went one way.
#[derive(Debug, Default)]
pub(crate) struct Way {
    bytes: AtomicU64,
    /// Its sender sends no more.
    closed: AtomicBool,
}

/// What went both ways, to be read at any time.
#[derive(Debug, Default)]
pub(crate) struct Ways {
    to_node: Arc<Way>,
    from_node: Arc<Way>,
}

impl Ways {
    /// Bytes that the client sent and that were handed to the node's connection.
    pub(crate) fn bytes_to_node(&self) -> u64 {
        self.to_node.bytes.load(Ordering::Relaxed)
    }

    /// Bytes that the node sent and that were handed to the client's connection.
    pub(crate) fn bytes_from_node(&self) -> u64 {
        self.from_node.bytes.load(Ordering::Relaxed)
    }

    fn is_half_closed(&self) -> bool {
        let closed = |way: &Way| way.closed.load(Ordering::Relaxed);
        closed(&self.to_node) || closed(&self.from_node)
    }
}

/// How it ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ended {
    /// Both sides were done.
    #[error("both sides were done")]
    Done,
    /// Nobody sent anything.
    #[error("nothing was sent for {0:?} (`idle_timeout_s`)")]
    Idle(Duration),
    /// One side broke off, or is gone.
    #[error("broken off: {0}")]
    Broken(io::Error),
}

/// Hands bytes on, 8 KiB each way at most in hand: who does not read holds up its sender, and nobody else. The end of
/// one way is handed on while the other goes on (half-close).
pub(crate) async fn pipe(
    client: impl AsyncRead + AsyncWrite + Unpin,
    node: impl AsyncRead + AsyncWrite + Unpin,
    idle: Duration,
    ways: &Ways,
) -> Ended {
    let mut client = Counted {
        inner: client,
        written: Arc::clone(&ways.from_node),
        read: Arc::clone(&ways.to_node),
    };
    let mut node = Counted {
        inner: node,
        written: Arc::clone(&ways.to_node),
        read: Arc::clone(&ways.from_node),
    };
    let copy = copy_bidirectional(&mut client, &mut node);
    tokio::pin!(copy);
    let mut before = (0, 0, false);
    let mut since = time::Instant::now();
    loop {
        let limit = if before.2 {
            idle.min(HALF_CLOSED_IDLE)
        } else {
            idle
        };
        // Looked at a few times within either limit: each is kept within an eighth.
        let pause = idle.min(HALF_CLOSED_IDLE) / 8;
        let look = time::Instant::now() + pause.max(Duration::from_millis(1));
        tokio::select! {
            ended = &mut copy => return match ended {
                Ok(_) => Ended::Done,
                Err(error) => Ended::Broken(error),
            },
            () = time::sleep_until(look) => {}
        }
        let now = (
            ways.bytes_to_node(),
            ways.bytes_from_node(),
            ways.is_half_closed(),
        );
        if now != before {
            (before, since) = (now, time::Instant::now());
        } else if since.elapsed() >= limit {
            return Ended::Idle(limit);
        }
    }
}

/// Counts what is written to it, and notes when there is nothing more to read from it.
struct Counted<S> {
    inner: S,
    written: Arc<Way>,
    read: Arc<Way>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(context, buffer))?;
        if buffer.filled().len() == before && buffer.remaining() > 0 {
            self.read.closed.store(true, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(Pin::new(&mut self.inner).poll_write(context, bytes))?;
        let more = u64::try_from(count).unwrap_or(u64::MAX);
        self.written.bytes.fetch_add(more, Ordering::Relaxed);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    #[tokio::test]
    async fn the_end_of_one_way_is_handed_on_while_the_other_goes_on() {
        let ((mut client, near), (far, mut node)) = (duplex(64), duplex(64));
        let ways = Ways::default();
        let talk = async {
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let mut question = Vec::new();
            node.read_to_end(&mut question).await.unwrap();
            node.write_all(b"a longer answer").await.unwrap();
            drop(node);
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.unwrap();
            (question, answer)
        };
        let (ended, (question, answer)) = tokio::join!(pipe(near, far, HOUR, &ways), talk);
        assert!(matches!(ended, Ended::Done), "{ended}");
        assert_eq!(
            (question.as_slice(), answer.as_slice()),
            (&b"question"[..], &b"a longer answer"[..])
        );
        assert_eq!((ways.bytes_to_node(), ways.bytes_from_node()), (8, 15));
    }

    #[tokio::test(start_paused = true)]
    async fn idle_sessions_end_and_busy_ones_do_not() {
        let ((mut client, near), (far, node)) = (duplex(64), duplex(64));
        let ways = Ways::default();
        let start = time::Instant::now();
        let talk = async {
            for _ in 0..10 {
                time::sleep(HOUR / 2).await;
                client.write_all(b".").await.unwrap();
            }
            (client, node)
        };
        let (ended, _both) = tokio::join!(pipe(near, far, HOUR, &ways), talk);
        assert!(matches!(ended, Ended::Idle(HOUR)), "{ended}");
        let lasted = start.elapsed();
        assert!(
            lasted >= 6 * HOUR && lasted <= 6 * HOUR + HOUR / 4,
            "{lasted:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_said_its_last_and_is_not_answered_is_not_waited_for_as_long() {
        let ((mut client, near), (far, node)) = (duplex(64), duplex(64));
        let ways = Ways::default();
        client.shutdown().await.unwrap();
        let ended = pipe(near, far, HOUR, &ways).await;
        assert!(matches!(ended, Ended::Idle(HALF_CLOSED_IDLE)), "{ended}");
        drop((client, node));
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_read_holds_up_its_sender_and_costs_no_memory() {
        let ((client, near), (far, mut node)) = (duplex(64), duplex(64));
        let ways = Ways::default();
        let mut sent = 0;
        let flood = async {
            while node.write_all(&[7; 64]).await.is_ok() {
                sent += 64;
            }
        };
        let ended = tokio::select! {
            ended = pipe(near, far, HOUR, &ways) => ended,
            () = flood => unreachable!("the pipe holds the other end"),
        };
        assert!(matches!(ended, Ended::Idle(_)), "{ended}");
        // Its own buffer, and the two pipes'.
        assert!(sent <= 8_192 + 3 * 64, "{sent}");
        drop(client);
    }
}
