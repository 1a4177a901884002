//! Moves packets between a link, the queue in front of it, and the socket.

use std::{
    collections::VecDeque,
    future::poll_fn,
    io,
    ops::ControlFlow,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::Poll,
    time::{Duration, Instant},
};

use bytes::Bytes;
use mesh_wire::relay::Control;
use quinn_proto::{ConnectionError, ConnectionEvent, Transmit};
use tokio::time;

use super::{SEND_BYTES_MAX, endpoint::Wire, link::QuicLink};
use crate::{
    BATCH_FRAMES,
    queue::{Item, Queue},
};

/// Received datagrams between two looks at what was in them: 94 KiB, far less than
/// `DATAGRAM_RECEIVE_BYTES`.
const EVENTS_AT_ONCE: usize = BATCH_FRAMES;

/// What came over a link.
pub(crate) enum Received<'a> {
    Frames(&'a [Bytes]),
    Control(Control),
}

/// A link and its end of the socket, and room to work in.
pub(crate) struct Driver {
    link: QuicLink,
    wire: Wire,
    events: Vec<ConnectionEvent>,
    frames: Vec<Bytes>,
    controls: VecDeque<Control>,
    items: Vec<Item>,
    buffer: Vec<u8>,
    /// What is in `buffer`, if it found no room in the socket.
    unsent: Option<Transmit>,
    /// Of the last send that had several. The next are as long, mostly: then one system call takes
    /// all that may leave at once.
    segment_len: usize,
    rtt_us: Arc<AtomicU64>,
}

impl Driver {
    pub(crate) fn new((link, wire): (QuicLink, Wire)) -> Self {
        Self {
            link,
            wire,
            events: Vec::new(),
            frames: Vec::with_capacity(BATCH_FRAMES),
            controls: VecDeque::new(),
            items: Vec::new(),
            buffer: Vec::new(),
            unsent: None,
            segment_len: usize::MAX,
            rtt_us: Arc::default(),
        }
    }

    pub(crate) fn link(&self) -> &QuicLink {
        &self.link
    }

    /// The round trip, smoothed, in microseconds, as it is from now on; 0 while it is not known.
    pub(crate) fn rtt_us(&self) -> Arc<AtomicU64> {
        self.rtt_us.clone()
    }

    /// Moves packets until the link is over, and says why (closing `queue` ends it too); or until
    /// `on_received` breaks: then this may be called again, and goes on behind what that was told
    /// last. `on_received` must not wait.
    pub(crate) async fn run(
        &mut self,
        queue: &Queue,
        mut on_received: impl FnMut(Received<'_>) -> ControlFlow<()>,
    ) -> ControlFlow<(), ConnectionError> {
        let mut sleep = pin!(time::sleep(Duration::ZERO));
        let mut closing = false;
        loop {
            let now = Instant::now();
            self.wire.take_events(&mut self.events);
            while !self.events.is_empty() {
                let some = self.events.len().min(EVENTS_AT_ONCE);
                let events = self.events.drain(..some);
                events.for_each(|event| self.link.handle_event(event));
                self.receive(now, &mut on_received)?;
            }
            self.link.handle_timeout(now);
            self.receive(now, &mut on_received)?;
            let filled = if closing {
                Ok(false)
            } else {
                self.fill(queue, now)
            };
            if let Err(reason) = &filled {
                self.link.close(reason, now);
                closing = true;
            }
            self.transmit(now);
            while let Some(event) = self.link.poll_endpoint_event() {
                self.wire.tell_endpoint(event);
            }
            if let Some(rtt) = self.link.rtt() {
                let micros = u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX);
                self.rtt_us.store(micros.max(1), Relaxed);
            }
            if let Some(reason) = self.link.ended() {
                return ControlFlow::Continue(reason);
            }
            if filled == Ok(true) && self.unsent.is_none() && self.link.room() > 0 {
                give_way().await; // There is more in the queue.
                continue;
            }
            let timeout = self.link.poll_timeout();
            if let Some(at) = timeout
                && sleep.deadline() != at.into()
            {
                sleep.as_mut().reset(at.into());
            }
            tokio::select! {
                () = self.wire.changed() => {}
                () = queue.changed() => {}
                () = &mut sleep, if timeout.is_some() => {}
                () = self.wire.writable(), if self.unsent.is_some() => {}
            }
        }
    }

    fn receive(
        &mut self,
        now: Instant,
        on_received: &mut impl FnMut(Received<'_>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        loop {
            self.link.receive(&mut self.frames, &mut self.controls, now);
            while let Some(message) = self.controls.pop_front() {
                on_received(Received::Control(message))?;
            }
            if self.frames.is_empty() {
                return ControlFlow::Continue(());
            }
            let result = on_received(Received::Frames(&self.frames));
            self.frames.clear();
            result?;
        }
    }

    /// Moves what there is room for from the queue to the link. Returns whether the queue may hold
    /// more; `Err` once it is closed and empty.
    fn fill(&mut self, queue: &Queue, now: Instant) -> Result<bool, String> {
        if !self.link.takes_control() {
            return if queue.is_closed() {
                Err("closed".to_owned())
            } else {
                Ok(false)
            };
        }
        let room = self.link.room();
        let more = queue.take(room, now, &mut self.items)?;
        let mut refused = 0;
        for item in self.items.drain(..) {
            match item {
                Item::Control(message) => self.link.send_control(&message),
                Item::Data(frame) => {
                    refused += usize::from(self.link.send_frame(frame).is_err());
                }
            }
        }
        queue.note_dropped(refused);
        Ok(more)
    }

    /// Sends what the link has, until the socket is full.
    fn transmit(&mut self, now: Instant) {
        loop {
            if self.unsent.is_none() {
                let at_most = self.segment_len.min(self.link.mtu().into()).max(1);
                let segments_max = self.wire.segments_max().min(SEND_BYTES_MAX / at_most);
                self.buffer.clear();
                self.unsent = self.link.poll_transmit(now, segments_max, &mut self.buffer);
                let segment_len = self.unsent.as_ref().and_then(|unsent| unsent.segment_size);
                self.segment_len = segment_len.unwrap_or(self.segment_len);
            }
            let Some(transmit) = &self.unsent else {
                return;
            };
            let sent = self.wire.send(transmit, &self.buffer);
            if sent.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
                return;
            }
            self.unsent = None; // Other errors are loss, as on any path.
        }
    }
}

/// Lets other tasks run. Unlike `yield_now` of tokio, it does not ask the kernel for events first.
pub(super) async fn give_way() {
    let mut given = false;
    poll_fn(|context| {
        if std::mem::replace(&mut given, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
