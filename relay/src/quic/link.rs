//! One connection of a link: no I/O and no clock.
//!
//! Data frames travel as datagrams; where the path's datagrams are too small for a frame, it
//! travels as a stream of its own, so that a lost packet holds up one frame and not all behind it.
//! Control messages travel in the one bidirectional stream, which the node opens: two bytes of
//! length, and the message.

use std::{
    any::Any,
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use mesh_wire::relay::{CONTROL_LEN_MAX, Control, FRAME_LEN_MAX};
use quinn_proto::{
    Connection, ConnectionError, ConnectionEvent, Dir, EndpointEvent, Event, ReadError,
    StreamEvent, StreamId, Transmit,
};

use super::CLOSE_CODE;
use crate::{BATCH_FRAMES, queue::FRAME_OVERHEAD_BYTES};

/// A connection whose control stream, if it is there, is `control`.
pub(crate) struct QuicLink {
    connection: Connection,
    control: Option<StreamId>,
    /// The start of a control message, 2 + `CONTROL_LEN_MAX` bytes at most.
    control_unread: BytesMut,
    /// What the stream had no credit for. Nothing is added before it is empty.
    control_unsent: BytesMut,
    /// Frames of which a part has come, by their streams: `STREAM_FRAMES_MAX` at most.
    partial: HashMap<StreamId, BytesMut>,
    /// Whole frames that came as streams.
    whole: Vec<Bytes>,
    controls: VecDeque<Control>,
    lost: Option<ConnectionError>,
    broken: Option<&'static str>,
}

/// Why a frame was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotSent {
    /// No credit, or no room.
    Full,
    /// The other side takes no datagrams: it is none of ours.
    Never,
}

impl QuicLink {
    pub(crate) fn new(connection: Connection) -> Self {
        Self {
            connection,
            control: None,
            control_unread: BytesMut::new(),
            control_unsent: BytesMut::new(),
            partial: HashMap::new(),
            whole: Vec::new(),
            controls: VecDeque::new(),
            lost: None,
            broken: None,
        }
    }

    /// The other side's certificates; none before the handshake is done.
    pub(crate) fn peer_identity(&self) -> Option<Box<dyn Any>> {
        self.connection.crypto_session().peer_identity()
    }

    /// Bytes of one UDP datagram, at most.
    pub(crate) fn mtu(&self) -> u16 {
        self.connection.current_mtu()
    }

    /// The round trip, smoothed; `None` before the handshake is done.
    pub(crate) fn rtt(&self) -> Option<Duration> {
        self.control.map(|_| self.connection.rtt())
    }

    pub(crate) fn handle_event(&mut self, event: ConnectionEvent) {
        self.connection.handle_event(event);
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        if self.poll_timeout().is_some_and(|at| at <= now) {
            self.connection.handle_timeout(now);
        }
    }

    pub(crate) fn poll_timeout(&mut self) -> Option<Instant> {
        self.connection.poll_timeout()
    }

    pub(crate) fn poll_endpoint_event(&mut self) -> Option<EndpointEvent> {
        self.connection.poll_endpoint_events()
    }

    pub(crate) fn poll_transmit(
        &mut self,
        now: Instant,
        segments_max: usize,
        buffer: &mut Vec<u8>,
    ) -> Option<Transmit> {
        let segments_max = segments_max.max(1); // Less is a panic there.
        self.connection.poll_transmit(now, segments_max, buffer)
    }

    /// Ends the link: `reason` goes to the other side, and then nothing more.
    pub(crate) fn close(&mut self, reason: &str, now: Instant) {
        let reason = Bytes::copy_from_slice(reason.as_bytes());
        self.connection.close(now, CLOSE_CODE, reason);
    }

    /// Why the link is over, once it is. After [`Self::close`] that takes three round trips.
    pub(crate) fn ended(&mut self) -> Option<ConnectionError> {
        let drained = self.connection.is_drained();
        let lost = self.lost.take();
        lost.or(drained.then_some(ConnectionError::LocallyClosed))
    }

    /// Looks at what has come. Adds data frames to `frames`, [`BATCH_FRAMES`] at most at once and
    /// then more the next time, and control messages to `controls`.
    pub(crate) fn receive(
        &mut self,
        frames: &mut Vec<Bytes>,
        controls: &mut VecDeque<Control>,
        now: Instant,
    ) {
        while let Some(event) = self.connection.poll() {
            match event {
                Event::Connected if self.connection.side().is_client() => {
                    self.control = self.connection.streams().open(Dir::Bi);
                }
                Event::ConnectionLost { reason } => self.lost = Some(reason),
                Event::Stream(event) => self.handle_stream_event(&event),
                Event::Connected
                | Event::HandshakeDataReady
                | Event::DatagramReceived
                | Event::DatagramsUnblocked => {}
            }
        }
        if let Some(reason) = self.broken.take() {
            self.close(reason, now);
        }
        controls.append(&mut self.controls);
        frames.append(&mut self.whole);
        while frames.len() < BATCH_FRAMES
            && let Some(frame) = self.connection.datagrams().recv()
        {
            frames.push(frame);
        }
    }

    fn handle_stream_event(&mut self, event: &StreamEvent) {
        match event {
            StreamEvent::Opened { dir: Dir::Bi } if self.control.is_none() => {
                self.control = self.connection.streams().accept(Dir::Bi);
                self.read_control();
            }
            StreamEvent::Opened { dir: Dir::Uni } => {
                while let Some(id) = self.connection.streams().accept(Dir::Uni) {
                    self.partial.insert(id, BytesMut::new());
                    self.read_frame(id);
                }
            }
            StreamEvent::Readable { id } if Some(*id) == self.control => self.read_control(),
            StreamEvent::Readable { id } => self.read_frame(*id),
            StreamEvent::Writable { id } if Some(*id) == self.control => self.write_control(),
            StreamEvent::Opened { .. }
            | StreamEvent::Writable { .. }
            | StreamEvent::Finished { .. }
            | StreamEvent::Stopped { .. }
            | StreamEvent::Available { .. } => {}
        }
    }

    fn read_frame(&mut self, id: StreamId) {
        let Some(mut frame) = self.partial.remove(&id) else {
            return; // Abandoned, because it is too long.
        };
        match read_stream(&mut self.connection, id, &mut frame) {
            _ if frame.len() > FRAME_LEN_MAX => {
                self.connection.recv_stream(id).stop(CLOSE_CODE).ok(); // Unless it has ended.
            }
            Read::Blocked => drop(self.partial.insert(id, frame)),
            Read::Finished => self.whole.push(frame.freeze()),
            Read::Abandoned => {} // Half a frame is none.
        }
    }

    fn read_control(&mut self) {
        let Some(id) = self.control else { return };
        match read_stream(&mut self.connection, id, &mut self.control_unread) {
            Read::Blocked => {}
            Read::Finished | Read::Abandoned => self.broken = Some("no control stream"),
        }
        while let Some(length) = self.control_unread.first_chunk() {
            let length = usize::from(u16::from_be_bytes(*length));
            if length > CONTROL_LEN_MAX {
                self.broken = Some("a control message that is too long");
                return self.control_unread.clear();
            }
            let Some(body) = self.control_unread.get(2..2 + length) else {
                return;
            };
            // Messages that this version does not know are skipped.
            self.controls.extend(Control::decode(body));
            self.control_unread.advance(2 + length);
        }
    }

    /// Whether control messages can be sent: the handshake is done, and none waits for credit.
    pub(crate) fn takes_control(&self) -> bool {
        self.control.is_some() && self.control_unsent.is_empty()
    }

    pub(crate) fn send_control(&mut self, message: &Control) {
        let body = message.encode(); // CONTROL_LEN_MAX
        self.control_unsent
            .put_u16(u16::try_from(body.len()).unwrap_or(u16::MAX));
        self.control_unsent.put_slice(&body);
        self.write_control();
    }

    fn write_control(&mut self) {
        let Some(id) = self.control else { return };
        while !self.control_unsent.is_empty() {
            match self.connection.send_stream(id).write(&self.control_unsent) {
                Ok(written) => self.control_unsent.advance(written),
                Err(_) => return, // No credit yet; or the link is over, which is told otherwise.
            }
        }
    }

    /// How many bytes of frames it takes now, besides one more frame of any length.
    pub(crate) fn room(&mut self) -> usize {
        let space = self.connection.datagrams().send_buffer_space();
        space.saturating_sub(FRAME_LEN_MAX + FRAME_OVERHEAD_BYTES)
    }

    pub(crate) fn send_frame(&mut self, frame: Bytes) -> Result<(), NotSent> {
        let mut datagrams = self.connection.datagrams();
        let Some(max) = datagrams.max_size() else {
            return Err(NotSent::Never);
        };
        if frame.len() > max {
            return self.send_as_stream(&frame);
        }
        datagrams.send(frame, false).map_err(|_| NotSent::Full)
    }

    fn send_as_stream(&mut self, frame: &[u8]) -> Result<(), NotSent> {
        let id = self
            .connection
            .streams()
            .open(Dir::Uni)
            .ok_or(NotSent::Full)?;
        let mut stream = self.connection.send_stream(id);
        if stream.write(frame) == Ok(frame.len()) {
            stream.finish().ok(); // Fails only on a stream that is finished already.
            Ok(())
        } else {
            stream.reset(CLOSE_CODE).ok(); // Likewise.
            Err(NotSent::Full)
        }
    }
}

enum Read {
    /// The rest is still to come.
    Blocked,
    Finished,
    /// By the other side, or never there.
    Abandoned,
}

fn read_stream(connection: &mut Connection, id: StreamId, into: &mut BytesMut) -> Read {
    let mut stream = connection.recv_stream(id);
    let Ok(mut chunks) = stream.read(true) else {
        return Read::Abandoned;
    };
    // Gives credit back when it goes.
    loop {
        match chunks.next(usize::MAX) {
            Ok(Some(chunk)) => into.extend_from_slice(&chunk.bytes),
            Ok(None) => return Read::Finished,
            Err(ReadError::Blocked) => return Read::Blocked,
            Err(ReadError::Reset(_)) => return Read::Abandoned,
        }
    }
}

#[cfg(test)]
mod tests;
