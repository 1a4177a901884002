//! What both ends of a TLS link share: the queue in front of it, and its framing.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{FutureExt as _, Sink, SinkExt as _, Stream, StreamExt as _};
use mesh_wire::relay::{Control, FRAME_LEN_MAX, Frame, control_frame};
use socket2::SockRef;
use tokio::{net::TcpStream, sync::Notify, time};
use tokio_tungstenite::tungstenite::{
    Error as WebSocketError, Message,
    protocol::{CloseFrame, WebSocketConfig, frame::coding::CloseCode},
};
use tokio_util::sync::CancellationToken;

use crate::{
    outlet::CONTROL_QUEUE_MAX,
    quic::{BATCH_FRAMES, IDLE_TIMEOUT, Sent},
};

/// Frames that wait for a slow receiver, in bytes (`paths.md`).
const QUEUE_BYTES_MAX: usize = 256 * 1024;

/// Age at which a waiting frame is worth nothing any more (`paths.md`): the inner TCP has sent it
/// again.
const QUEUE_AGE_MAX: Duration = Duration::from_millis(250);

/// Taken from the queue at once: one full TLS record (RFC 8446 §5.1). What is taken does not age
/// any more: 43 ms at 3 Mb/s.
const BATCH_BYTES: usize = 16 * 1024;

/// What the kernel may hold unsent, beside what is in flight: otherwise its buffer of megabytes
/// would be the queue, and ours, which drops by age, would stay empty.
const NOTSENT_LOWAT_BYTES: u32 = 16 * 1024;

/// Silence after which the kernel gives a TCP connection up, while data waits for an answer.
const TCP_USER_TIMEOUT: Duration = IDLE_TIMEOUT;

/// Time for what is said last on a link that is closed.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);

/// WebSocket settings of both ends: no message is longer than a frame, buffers are small.
pub(crate) fn websocket_config() -> WebSocketConfig {
    WebSocketConfig::default()
        .max_message_size(Some(FRAME_LEN_MAX))
        .max_frame_size(Some(FRAME_LEN_MAX))
        .read_buffer_size(BATCH_BYTES)
        .write_buffer_size(BATCH_BYTES)
        .max_write_buffer_size(4 * BATCH_BYTES)
}

/// Settings of a TCP connection that carries packets.
pub(crate) fn tune_tcp(stream: &TcpStream) -> std::io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_notsent_lowat(NOTSENT_LOWAT_BYTES)?;
    socket.set_tcp_user_timeout(Some(TCP_USER_TIMEOUT))
}

/// Frames on their way into a TLS link. Never blocks; the oldest data goes first.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    state: Mutex<State>,
    changed: Notify,
    closed: CancellationToken,
}

#[derive(Debug, Default)]
struct State {
    /// Before the data: a session must be known before its first frame.
    control: VecDeque<Bytes>,
    data: VecDeque<(Instant, Bytes)>,
    data_bytes: usize,
    closed: Option<String>,
}

impl Queue {
    /// Appends data frames; drops the oldest if there is no room for them.
    pub(crate) fn push_data(&self, frames: impl Iterator<Item = Bytes>, now: Instant) -> Sent {
        let mut sent = Sent::default();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.closed.is_some() {
            sent.closed = true;
            sent.refused = frames.count();
            return sent;
        }
        for frame in frames {
            while state.data_bytes + frame.len() > QUEUE_BYTES_MAX || state.is_stale(now) {
                state.pop_data();
                sent.replaced += 1;
            }
            state.data_bytes += frame.len();
            state.data.push_back((now, frame));
        }
        self.changed.notify_one();
        sent
    }

    /// Appends a control message. Returns false if there is no room: the link is of no use then.
    pub(crate) fn push_control(&self, message: &Control) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.control.len() >= CONTROL_QUEUE_MAX {
            return false;
        }
        state.control.push_back(control_frame(message).into());
        self.changed.notify_one();
        true
    }

    /// Nothing more goes in; what control there is still goes out, and `reason` after it.
    pub(crate) fn close(&self, reason: &str) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.closed.get_or_insert_with(|| reason.to_owned());
        state.data.clear();
        state.data_bytes = 0;
        self.closed.cancel();
        self.changed.notify_one();
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }

    /// Ends [`GOODBYE_TIMEOUT`] after [`Self::close`]: a receiver that takes nothing does not keep
    /// its connection.
    pub(crate) async fn overdue(&self) {
        self.closed.cancelled().await;
        time::sleep(GOODBYE_TIMEOUT).await;
    }

    /// The next frames, a batch at most; `Err` with the reason once closed and empty.
    async fn pop(&self) -> Result<Vec<Bytes>, String> {
        loop {
            {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                let batch = state.take_batch(Instant::now());
                if !batch.is_empty() {
                    return Ok(batch);
                }
                if let Some(reason) = &state.closed {
                    return Err(reason.clone());
                }
            }
            self.changed.notified().await;
        }
    }
}

impl State {
    fn is_stale(&self, now: Instant) -> bool {
        let oldest = self
            .data
            .front()
            .map(|(at, _)| now.saturating_duration_since(*at));
        oldest.is_some_and(|age| age > QUEUE_AGE_MAX)
    }

    fn pop_data(&mut self) -> Option<Bytes> {
        let (_, frame) = self.data.pop_front()?;
        self.data_bytes -= frame.len();
        Some(frame)
    }

    fn take_batch(&mut self, now: Instant) -> Vec<Bytes> {
        while self.is_stale(now) {
            self.pop_data();
        }
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while bytes < BATCH_BYTES {
            let Some(frame) = self.control.pop_front().or_else(|| self.pop_data()) else {
                break;
            };
            bytes += frame.len();
            batch.push(frame);
        }
        batch
    }
}

/// Writes what is in the queue, until it is closed or the connection breaks.
pub(crate) async fn write_frames(
    mut sink: impl Sink<Message, Error = WebSocketError> + Unpin,
    queue: &Queue,
) -> Result<(), WebSocketError> {
    loop {
        match queue.pop().await {
            Ok(batch) => {
                for frame in batch {
                    sink.feed(Message::Binary(frame)).await?;
                }
                sink.flush().await?;
            }
            Err(reason) => {
                let frame = CloseFrame {
                    code: CloseCode::Away,
                    reason: reason.into(),
                };
                return sink.send(Message::Close(Some(frame))).await;
            }
        }
    }
}

/// What a WebSocket gave.
pub(crate) enum Received {
    /// A whole data frame.
    Data(Bytes),
    /// A control message.
    Control(Control),
    /// Garbage.
    Bad,
    /// The end, and why.
    Closed(String),
}

/// Waits for the next frame, [`IDLE_TIMEOUT`] at most.
pub(crate) async fn receive(
    stream: &mut (impl Stream<Item = Result<Message, WebSocketError>> + Unpin),
) -> Received {
    loop {
        let message = match time::timeout(IDLE_TIMEOUT, stream.next()).await {
            Ok(Some(Ok(message))) => message,
            Ok(Some(Err(error))) => return Received::Closed(error.to_string()),
            Ok(None) => return Received::Closed("connection closed".to_owned()),
            Err(_) => return Received::Closed("silent for too long".to_owned()),
        };
        match message {
            Message::Binary(bytes) => return read_frame(bytes),
            Message::Close(Some(frame)) => return Received::Closed(frame.reason.to_string()),
            Message::Close(None) => return Received::Closed("connection closed".to_owned()),
            Message::Text(_) => return Received::Bad,
            Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
        }
    }
}

/// Waits for a frame, and takes what else has arrived: data frames into `batch`, a whole one at
/// most. Returns what is no data and came behind them.
pub(crate) async fn receive_batch(
    stream: &mut (impl Stream<Item = Result<Message, WebSocketError>> + Unpin),
    batch: &mut Vec<Bytes>,
) -> Option<Received> {
    let mut received = Some(receive(stream).await);
    loop {
        match received {
            Some(Received::Data(frame)) => batch.push(frame),
            other => return other,
        }
        if batch.len() >= BATCH_FRAMES {
            return None;
        }
        received = receive(stream).now_or_never();
    }
}

fn read_frame(bytes: Bytes) -> Received {
    match Frame::decode(&bytes) {
        Ok(Frame::Data { .. }) => Received::Data(bytes),
        Ok(Frame::Control(body)) => Control::decode(body).map_or(Received::Bad, Received::Control),
        Err(_) => Received::Bad,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(n: u8) -> Bytes {
        vec![n; 1024].into()
    }

    fn start() -> Instant {
        Instant::now()
    }

    fn push(queue: &Queue, n: u8, now: Instant) -> Sent {
        queue.push_data(std::iter::once(frame(n)), now)
    }

    #[test]
    fn a_full_queue_drops_the_oldest() {
        let (queue, now) = (Queue::default(), start());
        let sent = queue.push_data((0..=255).map(frame), now);
        assert_eq!(sent, Sent::default());
        assert_eq!(push(&queue, 7, now).replaced, 1);
        let mut state = queue.state.lock().unwrap();
        assert_eq!(state.data_bytes, QUEUE_BYTES_MAX);
        assert_eq!(state.take_batch(now).first(), Some(&frame(1)));
    }

    #[test]
    fn an_old_frame_is_dropped_and_a_control_message_is_not() {
        let (queue, now) = (Queue::default(), start());
        push(&queue, 1, now);
        queue.push_control(&Control::Welcome);
        let later = now + QUEUE_AGE_MAX + Duration::from_millis(1);
        assert_eq!(push(&queue, 2, later).replaced, 1);
        let batch = queue.state.lock().unwrap().take_batch(later);
        assert_eq!(batch, [control_frame(&Control::Welcome).into(), frame(2)]);
    }

    #[test]
    fn control_messages_are_bounded_too() {
        let queue = Queue::default();
        let pushed = (0..=CONTROL_QUEUE_MAX).filter(|_| queue.push_control(&Control::Welcome));
        assert_eq!(pushed.count(), CONTROL_QUEUE_MAX);
    }

    #[tokio::test]
    async fn closing_lets_control_out_and_then_says_why() {
        let queue = Queue::default();
        push(&queue, 1, start());
        queue.push_control(&Control::GoAway { grace_ms: 1 });
        queue.close("stopping");
        assert_eq!(queue.pop().await.map(|batch| batch.len()), Ok(1));
        assert_eq!(queue.pop().await, Err("stopping".to_owned()));
        let sent = push(&queue, 1, start());
        assert!(sent.closed && sent.refused == 1);
    }
}
