//! What both ends of a TLS link share: its settings and its framing.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt as _, Sink, SinkExt as _, Stream, StreamExt as _};
use mesh_wire::relay::{Control, FRAME_LEN_MAX, Frame, control_frame};
use socket2::SockRef;
use tokio::{net::TcpStream, time};
use tokio_tungstenite::tungstenite::{
    Error as WebSocketError, Message,
    protocol::{CloseFrame, WebSocketConfig, frame::coding::CloseCode},
};

use crate::{
    BATCH_FRAMES, IDLE_TIMEOUT,
    queue::{Item, Queue},
};

/// Taken from the queue at once: one full TLS record (RFC 8446 §5.1). What is taken does not age
/// any more: 43 ms at 3 Mb/s.
const BATCH_BYTES: usize = 16 * 1024;

/// What the kernel may hold unsent, beside what is in flight: otherwise its buffer of megabytes
/// would be the queue, and ours, which drops by age, would stay empty.
const NOTSENT_LOWAT_BYTES: u32 = 16 * 1024;

/// Silence after which the kernel gives a TCP connection up, while data waits for an answer.
const TCP_USER_TIMEOUT: Duration = IDLE_TIMEOUT;

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

/// Writes what is in the queue, until it is closed or the connection breaks.
pub(crate) async fn write_frames(
    mut sink: impl Sink<Message, Error = WebSocketError> + Unpin,
    queue: &Queue,
) -> Result<(), WebSocketError> {
    let mut batch = Vec::new();
    loop {
        match queue.pop(BATCH_BYTES, &mut batch).await {
            Ok(()) => {
                for item in batch.drain(..) {
                    let frame = match item {
                        Item::Control(message) => control_frame(&message).into(),
                        Item::Data(frame) => frame,
                    };
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
