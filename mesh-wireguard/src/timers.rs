//! What was sent and received when, as far as WireGuard's timers ask (the paper, §6), noted by many
//! threads without a lock.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// Between two attempts at a handshake, and a little more at random (the paper, §6.1).
pub const REKEY_TIMEOUT: Duration = Duration::from_secs(5);

/// After that a handshake is given up (the paper, §6.1).
pub const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);

/// Who received data answers within that time, if only by a keepalive (the paper, §6.1).
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// The last moments of each kind of packet, in milliseconds since a common start, plus one; zero
/// means never.
#[derive(Debug)]
pub struct Activity {
    start: Instant,
    last: AtomicU64,
    /// Data went out and nothing authentic has come in since then.
    unanswered_since: AtomicU64,
    /// Data came in and nothing has gone out since then.
    owing_since: AtomicU64,
    data_sent: AtomicBool,
    data_received: AtomicBool,
}

impl Activity {
    /// Nothing has happened yet.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            start: now,
            last: AtomicU64::new(0),
            unanswered_since: AtomicU64::new(0),
            owing_since: AtomicU64::new(0),
            data_sent: AtomicBool::new(false),
            data_received: AtomicBool::new(false),
        }
    }

    /// Packets with data went out.
    pub fn sent_data(&self, now: Instant) {
        let now = self.mark(now);
        begin(&self.unanswered_since, now);
        set(&self.data_sent);
        self.sent_any(now);
    }

    /// A keepalive or a handshake message went out.
    pub fn sent_other(&self, now: Instant) {
        self.sent_any(self.mark(now));
    }

    /// Authentic packets with data came in.
    pub fn received_data(&self, now: Instant) {
        let now = self.mark(now);
        begin(&self.owing_since, now);
        set(&self.data_received);
        self.received_any(now);
    }

    /// An authentic keepalive or handshake message came in.
    pub fn received_other(&self, now: Instant) {
        self.received_any(self.mark(now));
    }

    /// When anything authentic last went out or came in.
    pub(crate) fn since_last(&self, now: Instant) -> Option<Duration> {
        self.since(&self.last, now)
    }

    /// How long data has gone unanswered.
    pub(crate) fn unanswered(&self, now: Instant) -> Option<Duration> {
        self.since(&self.unanswered_since, now)
    }

    pub(crate) fn forget_unanswered(&self) {
        self.unanswered_since.store(0, Relaxed);
    }

    /// How long this side has owed an answer.
    pub(crate) fn owing(&self, now: Instant) -> Option<Duration> {
        self.since(&self.owing_since, now)
    }

    /// Whether data was sent, and received, since the last call.
    pub(crate) fn take_data(&self) -> (bool, bool) {
        let take = |flag: &AtomicBool| flag.load(Relaxed) && flag.swap(false, Relaxed);
        (take(&self.data_sent), take(&self.data_received))
    }

    fn sent_any(&self, mark: u64) {
        self.last.store(mark, Relaxed);
        clear(&self.owing_since);
    }

    fn received_any(&self, mark: u64) {
        self.last.store(mark, Relaxed);
        clear(&self.unanswered_since);
    }

    fn mark(&self, now: Instant) -> u64 {
        let elapsed = now.saturating_duration_since(self.start).as_millis();
        u64::try_from(elapsed).unwrap_or(u64::MAX - 1) + 1
    }

    fn since(&self, mark: &AtomicU64, now: Instant) -> Option<Duration> {
        let then = mark.load(Relaxed);
        let elapsed = self.mark(now).saturating_sub(then);
        (then != 0).then(|| Duration::from_millis(elapsed))
    }
}

// A load first: the line stays shared among processors while there is nothing to change.

fn begin(mark: &AtomicU64, now: u64) {
    if mark.load(Relaxed) == 0 {
        mark.store(now, Relaxed);
    }
}

fn clear(mark: &AtomicU64) {
    if mark.load(Relaxed) != 0 {
        mark.store(0, Relaxed);
    }
}

fn set(flag: &AtomicBool) {
    if !flag.load(Relaxed) {
        flag.store(true, Relaxed);
    }
}
