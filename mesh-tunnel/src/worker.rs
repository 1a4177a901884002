//! The threads: one for each TUN queue and its pair of sockets, which moves packets both ways, and one
//! for handshakes and timers.

use std::{
    fmt, io,
    os::fd::AsFd as _,
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use mesh_linux::{
    thread::raise_priority,
    tun::Queue,
    udp::{ReceiveBatch, UdpBatch, UdpPair},
    wake::StopSignal,
};

use crate::{
    burst, control,
    inbound::Inbox,
    outbound::{NoRoom, Outbox},
    queue::{AGE_MAX, FairQueue, Taken},
    stats::DropReason,
    transmit::Leave,
    tunnel::{Inner, TunnelEvent},
};

/// Packets read from a queue before the next look at the sockets: a batch of `UDP_SEGMENT`.
const READS_MAX: usize = 64;

/// Bytes sealed before the next look at the sockets: two super-packets, about 150 µs.
const SEAL_BYTES: usize = 128 << 10;

/// Reads that follow the last ones within this time, 20,000 and more of them a second, come too often to be woken for
/// each.
const DENSE_WITHIN: Duration = Duration::from_micros(50);

/// Reads of this many bytes, a quarter of a super-packet, are worth a wake-up.
const WORTH_BYTES: usize = 16 << 10;

/// Niceness of threads that move packets. They work in pieces of a fifth of a millisecond and then wait for the
/// next packets; beside programs that compute, a packet must not wait for a whole slice of theirs
/// (2.8 ms) at each of four hand-overs of a round trip.
pub const PACKET_NICENESS: i32 = -10;

/// Time until flows whose relay's link was full are tried again: what such a link holds when it is
/// full lasts longer, up to 1 Gb/s.
const PARKED_FOR: Duration = Duration::from_millis(1);

/// Errors in a row after which a descriptor is given up.
const ERRORS_MAX: usize = 16;

/// The tunnel's threads. Dropping it stops them too.
pub struct Workers {
    stop: StopSignal,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    pub(crate) fn start(tunnel: &Arc<Inner>) -> io::Result<Self> {
        let mut workers = Self {
            stop: StopSignal::new()?,
            threads: Vec::new(),
        };
        let sockets = tunnel.sockets.load_full();
        for number in 0..sockets.len() {
            let sockets = Arc::clone(&sockets);
            workers.spawn(format!("packets-{number}"), tunnel, move |tunnel, stop| {
                raise_priority(PACKET_NICENESS);
                let worker = Worker::new(tunnel, &sockets, number);
                worker.map_or(Ok(()), |mut worker| worker.run(stop))
            })?;
        }
        workers.spawn("handshakes".to_owned(), tunnel, |tunnel, stop| {
            control::run(tunnel, stop);
            Ok(())
        })?;
        if tunnel.takes_part_in_bursts {
            workers.spawn("bursts".to_owned(), tunnel, |tunnel, stop| {
                burst::run(tunnel, stop);
                Ok(())
            })?;
        }
        Ok(workers)
    }

    fn spawn(
        &mut self,
        name: String,
        tunnel: &Arc<Inner>,
        work: impl FnOnce(&Inner, &StopSignal) -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        let (tunnel, stop) = (Arc::clone(tunnel), self.stop.clone());
        let thread = thread::Builder::new().name(name.clone()).spawn(move || {
            if let Err(error) = work(&tunnel, &stop) {
                tunnel.emit(TunnelEvent::Broken(format!("{name}: {error}")));
            }
        })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Stops all threads and waits until they are gone: a fifth of a second at most.
    pub fn stop(mut self) {
        self.stop_all();
    }

    fn stop_all(&mut self) {
        self.stop.stop();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a packet worker panicked");
            }
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop_all();
    }
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workers")
            .field("threads", &self.threads.len())
            .finish()
    }
}

/// One packet thread.
struct Worker<'a> {
    tunnel: &'a Inner,
    queue: &'a Queue,
    sockets: Vec<&'a UdpBatch>,
    received: ReceiveBatch,
    inbox: Inbox,
    waiting: FairQueue,
    out: Outbox,
    /// A packet that found no room in the socket, and since when there is none.
    stuck: Option<Taken>,
    blocked_since: Option<Instant>,
    /// When flows that are set aside have their turn again.
    unpark_at: Option<Instant>,
    reads: Reads,
}

impl<'a> Worker<'a> {
    fn new(tunnel: &'a Inner, sockets: &'a [UdpPair], number: usize) -> Option<Self> {
        Some(Self {
            tunnel,
            queue: tunnel.tun.queues().get(number)?,
            sockets: sockets.get(number)?.sockets().collect(),
            received: ReceiveBatch::new(),
            inbox: tunnel.new_inbox(number),
            waiting: FairQueue::new(sockets.len()),
            out: Outbox::new(Leave::worker(number)),
            stuck: None,
            blocked_since: None,
            unpark_at: None,
            reads: Reads::default(),
        })
    }

    /// Moves packets until the signal is given, or a descriptor is broken.
    fn run(&mut self, stop: &StopSignal) -> io::Result<()> {
        let (queue, sockets) = (self.queue, self.sockets.clone());
        let sockets = sockets.iter().map(|socket| socket.as_fd());
        let mut waiter = stop.waiter(std::iter::once(queue.as_fd()).chain(sockets));
        let (mut tun_errors, mut socket_errors) = (0, [0; 2]);
        loop {
            let blocked = self.blocked_since;
            let patience = match blocked {
                Some(since) => {
                    let rest = AGE_MAX.saturating_sub(since.elapsed());
                    // A socket of a burst is not among those that are waited for: it is tried again.
                    let waits = self.out.leave.full.is_some();
                    Some(if waits { rest } else { rest.min(PARKED_FOR) })
                }
                None if self.has_work() => Some(Duration::ZERO),
                None => self
                    .unpark_at
                    .map(|at| at.saturating_duration_since(Instant::now())),
            };
            // Descriptor 0 is the TUN queue; the sockets follow.
            let full = self.out.leave.full.map(|socket| socket + 1);
            if !waiter.wait(patience, blocked.and(full))? {
                return Ok(());
            }
            let now = Instant::now();
            for (number, errors) in (0..self.sockets.len()).zip(&mut socket_errors) {
                if waiter.is_readable(number + 1) {
                    tolerate(self.receive(number, now), errors)?;
                }
            }
            if waiter.is_readable(0) {
                tolerate(self.read(now), &mut tun_errors)?;
            }
            self.send(now);
            if self.reads.end_turn(now) && !self.has_work() {
                // Whoever sends from this processor sends more, and the next look finds it all.
                thread::yield_now();
            }
        }
    }

    /// Whether something waits to be sealed.
    fn has_work(&self) -> bool {
        self.stuck.is_some() || !self.waiting.is_empty()
    }

    fn receive(&mut self, number: usize, now: Instant) -> io::Result<()> {
        let Some(socket) = self.sockets.get(number) else {
            return Ok(());
        };
        socket.receive(&mut self.received)?;
        let mut batch = self.inbox.batch();
        for message in self.received.messages() {
            self.tunnel.receive(message, None, &mut batch, now);
        }
        self.tunnel.finish(&mut batch);
        Ok(())
    }

    /// Takes in what the kernel has for us.
    fn read(&mut self, now: Instant) -> io::Result<()> {
        for _ in 0..READS_MAX {
            let len = self.queue.read(self.waiting.staging())?;
            self.reads.bytes += len;
            let dropped = self.waiting.push(len, now);
            self.tunnel.drops.count_many(DropReason::QueueFull, dropped);
        }
        Ok(())
    }

    /// Seals and sends what waits, up to [`SEAL_BYTES`].
    fn send(&mut self, now: Instant) {
        if self.unpark_at.is_some_and(|at| at <= now) {
            self.waiting.unpark();
            self.unpark_at = None;
        }
        let blocked = !self.try_send(now);
        self.blocked_since = blocked.then(|| self.blocked_since.unwrap_or(now));
        let gave_up = self
            .blocked_since
            .is_some_and(|since| now.saturating_duration_since(since) >= AGE_MAX);
        if gave_up {
            let unsent = self.out.batch.abandon();
            self.tunnel.drops.count_many(DropReason::SendFailed, unsent);
            self.blocked_since = None;
        }
    }

    /// Returns false when the socket is full.
    fn try_send(&mut self, now: Instant) -> bool {
        if self.blocked_since.is_some() {
            let before = self.out.batch.unsent();
            let all_left = self.out.flush(self.tunnel);
            if self.out.batch.unsent() < before {
                self.blocked_since = None; // A slow link is not a dead one.
            }
            if !all_left {
                return false;
            }
        }
        let mut sealed = 0;
        while sealed < SEAL_BYTES {
            let mut late = 0;
            let stuck = self.stuck.take();
            let next = stuck.or_else(|| self.waiting.pop(now, &mut late));
            self.tunnel.drops.count_many(DropReason::QueueLate, late);
            let Some(taken) = next else {
                break;
            };
            let raw = self.waiting.bytes(&taken);
            sealed += raw.len();
            match self.tunnel.outbound(raw, &mut self.out, now) {
                Ok(()) => self.waiting.free(taken),
                Err(NoRoom::Socket) => {
                    self.stuck = Some(taken);
                    return false;
                }
                Err(NoRoom::Relay) => {
                    self.waiting.park(taken);
                    self.unpark_at.get_or_insert(now + PARKED_FOR);
                }
            }
        }
        // What does not fill a call leaves with what comes next, if that is here already.
        !self.waiting.is_empty() || self.out.flush(self.tunnel)
    }
}

/// What turns read from the TUN device.
#[derive(Debug, Default)]
struct Reads {
    /// In this turn.
    bytes: usize,
    /// The last turn that read anything.
    last: Option<Instant>,
}

impl Reads {
    /// Ends a turn that began at `now`; whether its packets are small ones that come so fast that this thread is woken,
    /// before its sender, for each of them.
    fn end_turn(&mut self, now: Instant) -> bool {
        let bytes = std::mem::take(&mut self.bytes);
        if bytes == 0 {
            return false;
        }
        let last = self.last.replace(now);
        bytes < WORTH_BYTES
            && last.is_some_and(|last| now.saturating_duration_since(last) < DENSE_WITHIN)
    }
}

/// Passes on the last of [`ERRORS_MAX`] errors in a row.
fn tolerate(result: io::Result<()>, errors: &mut usize) -> io::Result<()> {
    match result {
        Err(error) if !is_empty(&error) => {
            *errors += 1;
            if *errors > ERRORS_MAX {
                return Err(error);
            }
        }
        _ => *errors = 0,
    }
    Ok(())
}

fn is_empty(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the ends of turns say that begin after so many microseconds each, and read so many bytes.
    fn said(turns: &[(u64, usize)]) -> Vec<bool> {
        let (mut now, mut reads) = (Instant::now(), Reads::default());
        let ends = turns.iter().map(|&(after, bytes)| {
            now += Duration::from_micros(after);
            reads.bytes += bytes;
            reads.end_turn(now)
        });
        ends.collect()
    }

    #[test]
    fn only_small_reads_in_quick_succession_are_dense() {
        let voice = [(0, 100), (1_000, 100), (1_000, 100)];
        assert_eq!(said(&voice), [false; 3]);
        let trickle = [(0, 100), (10, 100), (49, 200), (50, 100), (10, 100)];
        assert_eq!(said(&trickle), [false, true, true, false, true]);
        let bulk = [(0, 64 << 10), (10, WORTH_BYTES), (10, WORTH_BYTES - 1)];
        assert_eq!(said(&bulk), [false, false, true]);
    }

    #[test]
    fn turns_that_only_received_do_not_count() {
        let answered = [(0, 100), (30, 0), (30, 100), (10, 0), (10, 100)];
        assert_eq!(said(&answered), [false, false, false, false, true]);
    }
}
