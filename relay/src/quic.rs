//! What both ends of a QUIC link share: transport settings, congestion control, framing.

use std::{any::Any, io, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _, stream::FuturesUnordered};
use mesh_wire::relay::{CONTROL_LEN_MAX, Control, FRAME_LEN_MAX};
use quinn::{
    AckFrequencyConfig, Connection, ConnectionError, EndpointConfig, IdleTimeout,
    MtuDiscoveryConfig, ReadExactError, RecvStream, SendDatagramError, SendStream, TransportConfig,
    VarInt, WriteError,
    congestion::{Controller, ControllerFactory},
};
use tokio::sync::mpsc;

/// How often an idle link says that it is there: under the 30 s after which the hastiest NATs
/// forget a UDP mapping (RFC 4787 §4.3 asks for 120 s), twice over.
pub(crate) const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Silence after which a link is dead: two keep-alives lost, and 5 s for the third.
pub(crate) const IDLE_TIMEOUT: Duration = Duration::from_secs(35);

/// Longest time between two nodes' packets in a queue in front of a QUIC connection, in bytes:
/// 196 full-size packets, or 0.7 s at 3 Mb/s. The oldest is dropped for the newest.
const DATAGRAM_QUEUE_BYTES: usize = 256 * 1024;

/// Received datagrams that wait for the link's task, which never waits for anything itself: a
/// burst of 780 packets.
const DATAGRAM_RECEIVE_BYTES: usize = 1024 * 1024;

/// Frames on their way as streams at once (where datagrams are too small): 394 KiB. At 50 ms of
/// round trip that is 54 Mb/s. One more is dropped.
const STREAM_FRAMES_MAX: u32 = 256;

/// Bytes of one stream in flight: a whole frame, or hundreds of control messages.
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;

/// Bytes of all streams in flight: the control stream's and every frame's.
const STREAMS_WINDOW_BYTES: u32 = STREAM_WINDOW_BYTES + STREAM_FRAMES_MAX * 1540;

/// Upper end of MTU discovery's binary search. Its first probe lies in the middle between this and
/// 1200: 1360, the smallest UDP payload whose datagrams (38 bytes less) hold a frame with a
/// full-size packet (8 + 32 + 1280 = 1320). So one round trip tells. It ends at 1452 or 1472 on
/// Ethernet.
const MTU_SEARCH_END: u16 = 1520;

/// Bytes in flight per connection: 1 Gb/s at 16 ms, 100 Mb/s at 160 ms. See [`FixedWindow`].
const WINDOW_BYTES: u64 = 2 * 1024 * 1024;

/// Frames handed on at once: what one UDP send takes.
pub(crate) const BATCH_FRAMES: usize = 64;

/// Packets that the other side may take without answering. By default it answers every second one,
/// and each answer is sealed, sent, received and opened as a packet is. 44 KiB of the 2 MiB that may
/// be in flight; an answer comes after 25 ms at the latest (RFC 9000 §18.2, `max_ack_delay`).
const UNACKNOWLEDGED_MAX: u32 = 31;

/// A congestion controller that does not control.
///
/// What travels in the datagrams is, in the main, TCP and QUIC of the nodes' users, which adapt to
/// loss and delay themselves. A second controller outside of them answers the same loss twice,
/// and its own queue hides from them the loss that they should see; on a lossy radio link Cubic
/// would halve for losses that the inner flows have already paid for. RFC 8085 §3.1.11 says that
/// a tunnel for congestion-controlled traffic need not add its own. So the link behaves as the
/// plain UDP path beside it does: packets go out paced, up to a fixed number of bytes in flight
/// (which bounds the memory for a receiver that is gone), and a full queue drops its oldest.
#[derive(Debug, Clone, Copy)]
struct FixedWindow;

impl Controller for FixedWindow {
    fn on_congestion_event(
        &mut self,
        _now: std::time::Instant,
        _sent: std::time::Instant,
        _is_persistent_congestion: bool,
        _lost_bytes: u64,
    ) {
    }

    fn on_mtu_update(&mut self, _new_mtu: u16) {}

    fn window(&self) -> u64 {
        WINDOW_BYTES
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(*self)
    }

    fn initial_window(&self) -> u64 {
        WINDOW_BYTES
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

impl ControllerFactory for FixedWindow {
    fn build(self: Arc<Self>, _now: std::time::Instant, _mtu: u16) -> Box<dyn Controller> {
        Box::new(*self)
    }
}

/// Transport settings of both ends. `streams` is how many control streams the other side may open.
pub(crate) fn transport_config(streams: u32, keep_alive: Option<Duration>) -> Arc<TransportConfig> {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(MTU_SEARCH_END);
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(UNACKNOWLEDGED_MAX.into());
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(streams.into())
        .max_concurrent_uni_streams(STREAM_FRAMES_MAX.into())
        .stream_receive_window(STREAM_WINDOW_BYTES.into())
        .receive_window(STREAMS_WINDOW_BYTES.into())
        .send_window(STREAMS_WINDOW_BYTES.into())
        .max_idle_timeout(IdleTimeout::try_from(IDLE_TIMEOUT).ok())
        .keep_alive_interval(keep_alive)
        .mtu_discovery_config(Some(mtu))
        .ack_frequency_config(Some(acks))
        .datagram_send_buffer_size(DATAGRAM_QUEUE_BYTES)
        .datagram_receive_buffer_size(Some(DATAGRAM_RECEIVE_BYTES))
        .congestion_controller_factory(Arc::new(FixedWindow));
    Arc::new(config)
}

/// Endpoint settings of both ends. The QUIC bit tells QUIC from STUN on a shared port, so it must
/// not be greased (RFC 9287).
pub(crate) fn without_grease(mut config: EndpointConfig) -> EndpointConfig {
    config.grease_quic_bit(false);
    config
}

/// What became of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Sent {
    /// Older frames that were dropped to make room for these.
    pub(crate) replaced: usize,
    /// Frames for which there was no room.
    pub(crate) refused: usize,
    /// The link is closed; what was not sent is refused.
    pub(crate) closed: bool,
}

impl Sent {
    pub(crate) fn dropped(self) -> usize {
        self.replaced + self.refused
    }
}

/// Sends data frames: as datagrams if the path takes them, otherwise each as a stream of its own.
/// Never waits; may be called from any thread.
pub(crate) fn send_frames(connection: &Connection, frames: impl Iterator<Item = Bytes>) -> Sent {
    let mut sent = Sent::default();
    let Some(max) = connection.max_datagram_size() else {
        sent.closed = true; // The other side takes no datagrams: not one of ours.
        sent.refused = frames.count();
        return sent;
    };
    let mut room = connection.datagram_send_buffer_space();
    for frame in frames {
        let outcome = if frame.len() > max {
            send_as_stream(connection, &frame)
        } else {
            sent.replaced += usize::from(room < frame.len());
            room = room.saturating_sub(frame.len());
            send_as_datagram(connection, frame)
        };
        sent.refused += usize::from(outcome.is_err());
        sent.closed |= outcome == Err(NotSent::Closed);
    }
    sent
}

/// Why a frame was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NotSent {
    Full,
    Closed,
}

fn send_as_datagram(connection: &Connection, frame: Bytes) -> Result<(), NotSent> {
    connection
        .send_datagram(frame)
        .map_err(|error| match error {
            SendDatagramError::TooLarge => NotSent::Full, // The MTU shrank just now.
            SendDatagramError::UnsupportedByPeer
            | SendDatagramError::Disabled
            | SendDatagramError::ConnectionLost(_) => NotSent::Closed,
        })
}

/// One stream a frame, so that a lost packet holds up one frame and not all behind it. Polled once
/// and no more: where there is no credit, the frame is dropped.
fn send_as_stream(connection: &Connection, frame: &[u8]) -> Result<(), NotSent> {
    let mut stream = match connection.open_uni().now_or_never() {
        Some(Ok(stream)) => stream,
        Some(Err(_)) => return Err(NotSent::Closed),
        None => return Err(NotSent::Full),
    };
    match stream.write_all(frame).now_or_never() {
        Some(Ok(())) => {
            stream.finish().ok(); // Fails only on a stream that is finished already.
            Ok(())
        }
        Some(Err(_)) => Err(NotSent::Closed),
        None => {
            stream.reset(VarInt::from_u32(0)).ok(); // Half a frame is none.
            Err(NotSent::Full)
        }
    }
}

/// Hands all data frames to `on_frames`, as many at once as are there, until the connection ends.
pub(crate) async fn receive_frames(
    connection: &Connection,
    mut on_frames: impl FnMut(&[Bytes]),
) -> ConnectionError {
    let mut batch = Vec::with_capacity(BATCH_FRAMES);
    let mut streams = FuturesUnordered::new(); // Bounded by STREAM_FRAMES_MAX of the transport.
    loop {
        tokio::select! {
            datagram = connection.read_datagram() => match datagram {
                Ok(frame) => {
                    batch.push(frame);
                    while batch.len() < BATCH_FRAMES
                        && let Some(Ok(frame)) = connection.read_datagram().now_or_never()
                    {
                        batch.push(frame);
                    }
                    on_frames(&batch);
                    batch.clear();
                }
                Err(error) => return error,
            },
            stream = connection.accept_uni() => match stream {
                Ok(stream) => streams.push(read_whole(stream)),
                Err(error) => return error,
            },
            Some(frame) = streams.next(), if !streams.is_empty() => {
                if let Some(frame) = frame {
                    on_frames(&[frame]);
                }
            }
        }
    }
}

/// `None`: longer than a frame, or abandoned.
async fn read_whole(mut stream: RecvStream) -> Option<Bytes> {
    stream
        .read_to_end(FRAME_LEN_MAX)
        .await
        .ok()
        .map(Bytes::from)
}

/// Reads one control message; messages that this version does not know are skipped.
pub(crate) async fn read_control(stream: &mut RecvStream) -> io::Result<Control> {
    let mut buffer = [0; CONTROL_LEN_MAX];
    loop {
        let mut length = [0; 2];
        read_exact(stream, &mut length).await?;
        let length = usize::from(u16::from_be_bytes(length));
        let Some(bytes) = buffer.get_mut(..length) else {
            let error = format!("a control message of {length} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        };
        read_exact(stream, bytes).await?;
        if let Ok(message) = Control::decode(bytes) {
            return Ok(message);
        }
    }
}

async fn read_exact(stream: &mut RecvStream, bytes: &mut [u8]) -> io::Result<()> {
    stream.read_exact(bytes).await.map_err(|error| match error {
        ReadExactError::FinishedEarly(_) => io::ErrorKind::UnexpectedEof.into(),
        ReadExactError::ReadError(error) => error.into(),
    })
}

/// Writes one control message.
pub(crate) async fn write_control(
    stream: &mut SendStream,
    message: &Control,
) -> Result<(), WriteError> {
    let body = message.encode();
    let length = u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes(); // CONTROL_LEN_MAX
    stream.write_all(&[&length[..], &body].concat()).await
}

/// Writes what comes out of `messages`, until either ends.
pub(crate) async fn write_controls(
    stream: &mut SendStream,
    messages: &mut mpsc::Receiver<Control>,
) {
    while let Some(message) = messages.recv().await {
        if write_control(stream, &message).await.is_err() {
            return;
        }
    }
}
