//! Links by QUIC: datagrams for the nodes' packets, one stream for what relay and node say to each
//! other.
//!
//! `quinn-proto` is the protocol; the driver is ours instead of `quinn`'s, which is made for streams:
//! it sends ten packets at a time at most, three threads meet at the lock of each connection, and its
//! queue drops by size only. With it a relayed path by QUIC took 14 CPU seconds a gigabyte and ran at
//! 0.24 of the direct one (`docs/bench/tunnel.md` at commit 7a5c003); what it is now stands there too.
//!
//! [`link`] is one connection, without I/O and clock; [`endpoint`] is the socket and the task that
//! sorts what comes in; [`driver`] moves packets between a link, its queue and the socket.

use std::{
    any::Any,
    sync::Arc,
    time::{Duration, Instant},
};

use quinn_proto::{
    AckFrequencyConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt,
    congestion::{Controller, ControllerFactory},
};

use crate::IDLE_TIMEOUT;

pub(crate) mod driver;
pub(crate) mod endpoint;
pub(crate) mod link;

/// The code of a link that ends in order.
const CLOSE_CODE: VarInt = VarInt::from_u32(0);

/// Most bytes in one send: what fits the length field of an IPv4 packet besides its headers
/// (65,535 − 20 − 8).
pub(crate) const SEND_BYTES_MAX: usize = 65_507;

/// Frames that a connection has taken from its queue and not yet sent, in bytes: two full sends,
/// so that one can be filled while pacing holds the other back. They do not age any more: 340 ms
/// at 3 Mb/s.
const DATAGRAM_QUEUE_BYTES: usize = 128 * 1024;

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

/// Packets that the other side may take without answering. By default it answers every second one,
/// and each answer is sealed, sent, received and opened as a packet is. 180 KiB of the 2 MiB that may
/// be in flight; an answer comes after 25 ms at the latest (RFC 9000 §18.2, `max_ack_delay`).
const UNACKNOWLEDGED_MAX: u32 = 127;

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
        _now: Instant,
        _sent: Instant,
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
    fn build(self: Arc<Self>, _now: Instant, _mtu: u16) -> Box<dyn Controller> {
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
