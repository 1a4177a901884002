//! What waits in front of a link, whatever the link runs over. Nothing here blocks.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use mesh_wire::relay::Control;
use tokio::{sync::Notify, time};
use tokio_util::sync::CancellationToken;

/// Frames that wait for a slow receiver behind TLS, in bytes (`paths.md`): what TCP has in flight
/// comes on top.
pub(crate) const TLS_BYTES_MAX: usize = 256 * 1024;

/// Likewise behind QUIC: the window of TCP on a good path comes as a burst and must fit, for a flow
/// that loses packets here sends them again at the price of four ciphers. A relay with 1,024 slow
/// receivers holds no more than what it receives in `AGE_MAX`: 300 MiB at 10 Gb/s.
pub(crate) const QUIC_BYTES_MAX: usize = 2 * 1024 * 1024;

/// A queue of so many bytes, or that is so late, is full for those who can wait: 1 ms at 1 Gb/s,
/// more than a batch, and less than anyone notices.
const FULL_BYTES: usize = 128 * 1024;
const FULL_AGE: Duration = Duration::from_millis(5);

/// Age at which a waiting frame is worth nothing any more (`paths.md`): the inner TCP has sent it
/// again.
const AGE_MAX: Duration = Duration::from_millis(250);

/// Control messages that wait for a slow receiver: all sessions of a node (1,024) announced and
/// taken back twice. A link on which more wait is closed; the node comes back and starts afresh.
const CONTROL_MAX: usize = 4096;

/// What a frame counts beside its length when it is taken: links keep some words for each.
pub(crate) const FRAME_OVERHEAD_BYTES: usize = 64;

/// Time for what is said last on a link that is closed.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);

/// What became of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Sent {
    /// Older frames that were dropped: to make room for these, or because of their age.
    pub(crate) replaced: usize,
    /// Frames that were not taken because the link is closed.
    pub(crate) refused: usize,
}

impl Sent {
    pub(crate) fn dropped(self) -> usize {
        self.replaced + self.refused
    }
}

/// Data frames that wait in front of one link, or of several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Waiting {
    /// How many.
    pub frames: usize,
    /// Their bytes.
    pub bytes: usize,
    /// Since when the first of them waits; `None`: none does.
    pub oldest: Option<Duration>,
}

impl Waiting {
    /// Those of another link as well.
    pub fn add(&mut self, other: Self) {
        self.frames += other.frames;
        self.bytes += other.bytes;
        self.oldest = self.oldest.max(other.oldest);
    }
}

/// What goes over a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Item {
    Control(Control),
    /// A whole data frame.
    Data(Bytes),
}

/// What is on its way into a link. Any thread may fill it; one task empties it.
#[derive(Debug)]
pub(crate) struct Queue {
    bytes_max: usize,
    state: Mutex<State>,
    changed: Notify,
    closed: CancellationToken,
}

#[derive(Debug, Default)]
struct State {
    /// Before the data: a session must be known before its first frame.
    control: VecDeque<Control>,
    data: VecDeque<(Instant, Bytes)>,
    data_bytes: usize,
    /// Frames that were dropped after they had been taken in, of which nobody was told yet.
    untold: usize,
    closed: Option<String>,
}

impl Queue {
    /// A queue that holds data frames of `bytes_max` together.
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self {
            bytes_max,
            state: Mutex::default(),
            changed: Notify::new(),
            closed: CancellationToken::new(),
        }
    }

    /// Whether whoever can wait should.
    pub(crate) fn is_full(&self, now: Instant) -> bool {
        let state = self.lock();
        state.data_bytes >= FULL_BYTES || state.age(now).is_some_and(|age| age > FULL_AGE)
    }

    /// What waits. Frames that are worth nothing any more are among it until the next one comes or goes.
    pub(crate) fn waiting(&self, now: Instant) -> Waiting {
        let state = self.lock();
        Waiting {
            frames: state.data.len(),
            bytes: state.data_bytes,
            oldest: state.age(now),
        }
    }

    /// Appends data frames; drops the oldest if there is no room for them.
    pub(crate) fn push_data(&self, frames: impl Iterator<Item = Bytes>, now: Instant) -> Sent {
        let mut sent = Sent::default();
        let mut state = self.lock();
        if state.closed.is_some() {
            sent.refused = frames.count();
            return sent;
        }
        state.drop_stale(now);
        sent.replaced = std::mem::take(&mut state.untold);
        for frame in frames {
            while state.data_bytes + frame.len() > self.bytes_max {
                state.pop_data();
                sent.replaced += 1;
            }
            state.data_bytes += frame.len();
            state.data.push_back((now, frame));
        }
        drop(state);
        self.changed.notify_one();
        sent
    }

    /// Appends a control message. Closes the link if there is no room: it is of no use then.
    pub(crate) fn push_control(&self, message: Control) {
        let mut state = self.lock();
        if state.control.len() >= CONTROL_MAX {
            drop(state);
            return self.close("too slow");
        }
        state.control.push_back(message);
        drop(state);
        self.changed.notify_one();
    }

    /// Nothing more goes in; what control there is still goes out, and `reason` after it.
    pub(crate) fn close(&self, reason: &str) {
        let mut state = self.lock();
        state.closed.get_or_insert_with(|| reason.to_owned());
        state.data.clear();
        state.data_bytes = 0;
        drop(state);
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

    /// Waits until something was put in, or the link was closed, since the last time.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Takes all control messages, and then data until that counts `data_bytes` with
    /// [`FRAME_OVERHEAD_BYTES`] a frame: the last frame may go over that. Returns whether there is
    /// more; `Err` with the reason once closed and empty.
    pub(crate) fn take(
        &self,
        data_bytes: usize,
        now: Instant,
        batch: &mut Vec<Item>,
    ) -> Result<bool, String> {
        let mut state = self.lock();
        state.take(data_bytes, now, batch);
        match &state.closed {
            Some(reason) if batch.is_empty() => Err(reason.clone()),
            Some(_) | None => Ok(!state.data.is_empty()),
        }
    }

    /// Frames that were taken and then dropped: whoever sends next is told.
    pub(crate) fn note_dropped(&self, frames: usize) {
        if frames > 0 {
            self.lock().untold += frames;
        }
    }

    /// As [`Self::take`], but waits until there is something.
    pub(crate) async fn pop(&self, data_bytes: usize, batch: &mut Vec<Item>) -> Result<(), String> {
        loop {
            self.take(data_bytes, Instant::now(), batch)?;
            if !batch.is_empty() {
                return Ok(());
            }
            self.changed().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Of the oldest data.
    fn age(&self, now: Instant) -> Option<Duration> {
        let (since, _) = self.data.front()?;
        Some(now.saturating_duration_since(*since))
    }

    fn drop_stale(&mut self, now: Instant) {
        while self.age(now).is_some_and(|age| age > AGE_MAX) {
            self.pop_data();
            self.untold += 1;
        }
    }

    fn pop_data(&mut self) -> Option<Bytes> {
        let (_, frame) = self.data.pop_front()?;
        self.data_bytes -= frame.len();
        Some(frame)
    }

    fn take(&mut self, data_bytes: usize, now: Instant, batch: &mut Vec<Item>) {
        self.drop_stale(now);
        batch.extend(self.control.drain(..).map(Item::Control));
        let mut taken = 0;
        while taken < data_bytes
            && let Some(frame) = self.pop_data()
        {
            taken += frame.len() + FRAME_OVERHEAD_BYTES;
            batch.push(Item::Data(frame));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(n: u8) -> Bytes {
        vec![n; 1024].into()
    }

    fn push(queue: &Queue, n: u8, now: Instant) -> Sent {
        queue.push_data(std::iter::once(frame(n)), now)
    }

    fn take(queue: &Queue, data_bytes: usize, now: Instant) -> Result<Vec<Item>, String> {
        let mut batch = Vec::new();
        queue.take(data_bytes, now, &mut batch).map(|_| batch)
    }

    #[test]
    fn a_full_queue_drops_the_oldest() {
        let (queue, now) = (Queue::new(TLS_BYTES_MAX), Instant::now());
        let sent = queue.push_data((0..=255).map(frame), now);
        assert_eq!(sent, Sent::default());
        assert_eq!(push(&queue, 7, now).replaced, 1);
        assert_eq!(queue.lock().data_bytes, TLS_BYTES_MAX);
        assert_eq!(take(&queue, 1, now), Ok(vec![Item::Data(frame(1))]));
    }

    #[test]
    fn it_is_told_how_much_waits_and_how_long() {
        let (one, other, now) = (
            Queue::new(TLS_BYTES_MAX),
            Queue::new(TLS_BYTES_MAX),
            Instant::now(),
        );
        assert_eq!(one.waiting(now), Waiting::default());
        push(&one, 1, now);
        push(&one, 2, now + FULL_AGE);
        push(&other, 3, now + FULL_AGE);
        let mut sum = one.waiting(now + AGE_MAX);
        sum.add(other.waiting(now + AGE_MAX));
        let expected = Waiting {
            frames: 3,
            bytes: 3 * 1024,
            oldest: Some(AGE_MAX),
        };
        assert_eq!(sum, expected);
    }

    #[test]
    fn who_can_wait_is_told_when_much_waits_or_long() {
        let (queue, now) = (Queue::new(TLS_BYTES_MAX), Instant::now());
        assert!(!queue.is_full(now));
        push(&queue, 1, now);
        assert!(!queue.is_full(now + FULL_AGE));
        assert!(queue.is_full(now + FULL_AGE + Duration::from_millis(1)));
        queue.push_data((1..128).map(frame), now);
        assert!(queue.is_full(now));
    }

    #[test]
    fn an_old_frame_is_dropped_and_a_control_message_is_not() {
        let (queue, now) = (Queue::new(TLS_BYTES_MAX), Instant::now());
        push(&queue, 1, now);
        queue.push_control(Control::Welcome);
        let later = now + AGE_MAX + Duration::from_millis(1);
        assert_eq!(push(&queue, 2, later).replaced, 1);
        let expected = vec![Item::Control(Control::Welcome), Item::Data(frame(2))];
        assert_eq!(take(&queue, 1, later), Ok(expected));
        push(&queue, 3, later);
        let much_later = later + AGE_MAX + Duration::from_millis(1);
        assert_eq!(take(&queue, 1, much_later), Ok(Vec::new()));
        assert_eq!(push(&queue, 4, much_later).replaced, 1, "told once");
        assert_eq!(push(&queue, 5, much_later).replaced, 0);
    }

    #[test]
    fn without_room_only_control_messages_are_taken() {
        let (queue, now) = (Queue::new(TLS_BYTES_MAX), Instant::now());
        push(&queue, 1, now);
        queue.push_control(Control::Welcome);
        assert_eq!(
            take(&queue, 0, now),
            Ok(vec![Item::Control(Control::Welcome)])
        );
        assert_eq!(take(&queue, 1, now), Ok(vec![Item::Data(frame(1))]));
    }

    #[test]
    fn control_messages_are_bounded_and_a_link_on_which_more_wait_is_closed() {
        let queue = Queue::new(TLS_BYTES_MAX);
        (0..CONTROL_MAX).for_each(|_| queue.push_control(Control::Welcome));
        assert!(!queue.is_closed());
        queue.push_control(Control::Welcome);
        assert!(queue.is_closed());
        assert_eq!(queue.lock().control.len(), CONTROL_MAX);
    }

    #[tokio::test]
    async fn closing_lets_control_out_and_then_says_why() {
        let (queue, now) = (Queue::new(TLS_BYTES_MAX), Instant::now());
        push(&queue, 1, now);
        queue.push_control(Control::GoAway { grace_ms: 1 });
        queue.close("stopping");
        let mut batch = Vec::new();
        assert_eq!(queue.pop(1000, &mut batch).await, Ok(()));
        assert_eq!(batch, [Item::Control(Control::GoAway { grace_ms: 1 })]);
        batch.clear();
        assert_eq!(
            queue.pop(1000, &mut batch).await,
            Err("stopping".to_owned())
        );
        assert_eq!(push(&queue, 1, now).refused, 1);
    }
}
