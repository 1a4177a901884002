//! Traffic that goes on while something happens to its way: numbered datagrams, and a TCP connection whose bytes are
//! checked. How long nothing came, and what came twice.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use crate::{load::Way, node::Node};

/// Arrivals that are kept: an hour at 200 a second.
const ARRIVALS_MAX: usize = 720_000;

/// Bytes of a datagram: its number, and what a voice packet's size is made of.
const DATAGRAM_BYTES: usize = 64;

/// What the TCP connection writes at a time: the bytes of [`pattern`].
const WRITE_BYTES: usize = 512;

/// Until a TCP connection over a way that works is there.
const CONNECT_LIMIT: Duration = Duration::from_secs(20);

/// What arrived, and when.
#[derive(Debug, Default)]
struct Seen {
    arrivals: Vec<Instant>,
    /// Of each number, whether it came.
    came: Vec<bool>,
    twice: u64,
    problem: Option<String>,
}

impl Seen {
    fn note(&mut self, number: usize) {
        if number >= self.came.len() && number < ARRIVALS_MAX {
            self.came.resize(number + 1, false);
        }
        match self.came.get_mut(number) {
            Some(came) if *came => self.twice += 1,
            Some(came) => *came = true,
            None => self.problem = Some(format!("more than {ARRIVALS_MAX} were sent")),
        }
        self.arrive();
    }

    fn arrive(&mut self) {
        if self.arrivals.len() < ARRIVALS_MAX {
            self.arrivals.push(Instant::now());
        }
    }
}

/// The longest time without an arrival that ended, or lasts on, after `since`.
fn longest_gap(arrivals: &[Instant], since: Instant, now: Instant) -> Duration {
    // The last one before counts too: the silence may have begun with it.
    let first = arrivals.partition_point(|at| *at < since).saturating_sub(1);
    let after = arrivals.get(first..).unwrap_or_default();
    let ends = after.iter().skip(1).chain([&now]);
    let begins: Vec<_> = if after.is_empty() {
        vec![since]
    } else {
        after.to_vec()
    };
    let gaps = begins
        .iter()
        .zip(ends)
        .map(|(from, to)| to.saturating_duration_since(*from));
    gaps.max().unwrap_or_default()
}

/// Running traffic in one direction; ends when dropped.
#[derive(Debug)]
pub struct Stream {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Stream {
    /// Numbered datagrams, one each `interval`.
    ///
    /// # Errors
    ///
    /// If a socket cannot be made.
    pub fn datagrams(way: Way, interval: Duration) -> Result<Self> {
        let (sender, receiver) = way.sockets()?;
        let stream = Self::new();
        let send = move |stop: &AtomicBool| send_numbered(&sender, interval, stop);
        let receive =
            move |seen: &Mutex<Seen>, stop: &AtomicBool| receive_numbered(&receiver, seen, stop);
        Ok(stream.run(send, receive))
    }

    /// A TCP connection by which 512 bytes go each `interval`; each byte is checked where it arrives.
    ///
    /// # Errors
    ///
    /// If the connection does not come about within 20 s.
    pub fn tcp(way: Way, interval: Duration) -> Result<Self> {
        let listener = way.to.enter(|| TcpListener::bind((way.address, 0)))??;
        let to = listener.local_addr()?;
        let sender = way
            .from
            .enter(|| TcpStream::connect_timeout(&to, CONNECT_LIMIT))?;
        let sender = sender.with_context(|| format!("connect to {to} on {}", way.from.name()))?;
        let (receiver, _) = listener.accept()?;
        sender.set_nodelay(true)?;
        // A full send buffer is looked at again: this thread has to hear of `stop`.
        sender.set_write_timeout(Some(LOOK_EVERY))?;
        receiver.set_read_timeout(Some(LOOK_EVERY))?;
        let stream = Self::new();
        let failed = Arc::clone(&stream.seen);
        let send = move |stop: &AtomicBool| {
            if let Err(error) = write_pattern(sender, interval, stop) {
                lock(&failed).problem = Some(format!("{error:#}"));
            }
        };
        let receive = move |seen: &Mutex<Seen>, stop: &AtomicBool| {
            if let Err(error) = check_pattern(receiver, seen, stop) {
                lock(seen).problem = Some(format!("{error:#}"));
            }
        };
        Ok(stream.run(send, receive))
    }

    fn new() -> Self {
        Self {
            seen: Arc::default(),
            stop: Arc::default(),
            threads: Vec::new(),
        }
    }

    fn run(
        mut self,
        send: impl FnOnce(&AtomicBool) + Send + 'static,
        receive: impl FnOnce(&Mutex<Seen>, &AtomicBool) + Send + 'static,
    ) -> Self {
        let (stop, seen, stopped) = (
            Arc::clone(&self.stop),
            Arc::clone(&self.seen),
            Arc::clone(&self.stop),
        );
        self.threads = vec![
            thread::spawn(move || send(&stop)),
            thread::spawn(move || receive(&seen, &stopped)),
        ];
        self
    }

    /// The longest time in which nothing arrived, that ended after `since` or has not ended yet.
    #[must_use]
    pub fn longest_gap(&self, since: Instant) -> Duration {
        longest_gap(&lock(&self.seen).arrivals, since, Instant::now())
    }

    /// Arrivals so far.
    #[must_use]
    pub fn arrived(&self) -> usize {
        lock(&self.seen).arrivals.len()
    }

    /// Datagrams that were delivered a second time, so far.
    #[must_use]
    pub fn duplicates(&self) -> u64 {
        lock(&self.seen).twice
    }

    /// Fails if the TCP connection broke or a byte was wrong.
    ///
    /// # Errors
    ///
    /// With what was.
    pub fn intact(&self) -> Result<()> {
        match &lock(&self.seen).problem {
            None => Ok(()),
            Some(problem) => bail!("{problem}"),
        }
    }

    /// Waits until something arrives that arrives after now.
    ///
    /// # Errors
    ///
    /// If nothing does within `limit`.
    pub fn flows(&self, limit: Duration) -> Result<()> {
        let before = self.arrived();
        crate::tool::eventually("something arrives", limit, || {
            ensure!(
                self.arrived() > before,
                "{before} arrived so far, and no more"
            );
            Ok(())
        })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().ok(); // It panicked, and said so.
        }
    }
}

/// Datagrams both ways between two nodes, and a TCP connection from the first; ends when dropped.
#[derive(Debug)]
pub struct Traffic {
    out: Stream,
    back: Stream,
    tcp: Stream,
}

/// For how long nothing came.
#[derive(Debug, Clone, Copy)]
pub struct Gaps {
    /// Datagrams from the first node.
    pub out: Duration,
    /// Datagrams from the second one.
    pub back: Duration,
    /// Bytes of the TCP connection.
    pub tcp: Duration,
}

impl Gaps {
    /// Datagrams of either direction.
    #[must_use]
    pub fn datagrams(&self) -> Duration {
        self.out.max(self.back)
    }
}

impl Traffic {
    /// Between two nodes by these addresses, something each `interval`.
    ///
    /// # Errors
    ///
    /// As [`Stream::datagrams`] and [`Stream::tcp`].
    pub fn start(nodes: [&Node; 2], addresses: [Ipv4Addr; 2], interval: Duration) -> Result<Self> {
        let ([a, b], [own, others]) = (nodes, addresses);
        let way = |from, to, address| Way { from, to, address };
        let (out, back) = (way(a, b, others), way(b, a, own));
        Ok(Self {
            tcp: Stream::tcp(out, interval)?,
            out: Stream::datagrams(out, interval)?,
            back: Stream::datagrams(back, interval)?,
        })
    }

    fn streams(&self) -> [&Stream; 3] {
        [&self.out, &self.back, &self.tcp]
    }

    /// Waits until all of it flows.
    ///
    /// # Errors
    ///
    /// If a part does not within `limit`.
    pub fn flows(&self, limit: Duration) -> Result<()> {
        let mut streams = self.streams().into_iter();
        streams.try_for_each(|stream| stream.flows(limit))
    }

    /// The longest times without anything since then.
    #[must_use]
    pub fn gaps(&self, since: Instant) -> Gaps {
        let [out, back, tcp] = self.streams().map(|stream| stream.longest_gap(since));
        Gaps { out, back, tcp }
    }

    /// How many datagrams came twice.
    #[must_use]
    pub fn duplicates(&self) -> u64 {
        self.out.duplicates() + self.back.duplicates()
    }

    /// Whether the TCP connection lives, and each of its bytes was right.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn intact(&self) -> Result<()> {
        self.tcp.intact()
    }

    /// Whether nothing is broken, and nothing came twice.
    ///
    /// # Errors
    ///
    /// What is wrong.
    pub fn unharmed(&self) -> Result<()> {
        self.intact()?;
        let twice = self.duplicates();
        ensure!(twice == 0, "{twice} datagrams were delivered twice");
        Ok(())
    }
}

/// A thread that waits looks this often whether it is to stop.
const LOOK_EVERY: Duration = Duration::from_millis(100);

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

fn send_numbered(socket: &UdpSocket, interval: Duration, stop: &AtomicBool) {
    let start = Instant::now();
    for number in 0_u32.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let mut datagram = u64::from(number).to_be_bytes().to_vec();
        datagram.resize(DATAGRAM_BYTES, 0);
        socket.send(&datagram).ok(); // No route or no buffer: lost, as on any way.
        let next = start + interval * (number + 1);
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

fn receive_numbered(socket: &UdpSocket, seen: &Mutex<Seen>, stop: &AtomicBool) {
    let mut buffer = [0; DATAGRAM_BYTES];
    while !stop.load(Ordering::Relaxed) {
        let Ok(length) = socket.recv(&mut buffer) else {
            continue; // The read time-out.
        };
        let number = buffer.get(..length).and_then(|bytes| bytes.first_chunk());
        let number = number.and_then(|bytes| usize::try_from(u64::from_be_bytes(*bytes)).ok());
        if let Some(number) = number {
            lock(seen).note(number);
        }
    }
}

/// The byte at this place of the stream: no two pieces of a segment's length are alike for 16 MB.
fn pattern(place: u64) -> u8 {
    let [.., high, _] = place.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
    high ^ place.to_be_bytes()[7]
}

fn write_pattern(mut stream: TcpStream, interval: Duration, stop: &AtomicBool) -> Result<()> {
    let mut place = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        let bytes: Vec<u8> = (place..place + WRITE_BYTES as u64).map(pattern).collect();
        let mut rest = bytes.as_slice();
        while !rest.is_empty() && !stop.load(Ordering::Relaxed) {
            match stream.write(rest) {
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(error) if is_pause(&error) => {}
                Err(error) => return Err(error).context("write to the TCP connection"),
            }
        }
        place += WRITE_BYTES as u64;
        thread::sleep(interval);
    }
    Ok(())
}

fn check_pattern(mut stream: TcpStream, seen: &Mutex<Seen>, stop: &AtomicBool) -> Result<()> {
    let mut place = 0_u64;
    let mut buffer = [0; 4096];
    while !stop.load(Ordering::Relaxed) {
        let length = match stream.read(&mut buffer) {
            Ok(0) if stop.load(Ordering::Relaxed) => return Ok(()),
            Ok(0) => bail!("the TCP connection ended after {place} bytes"),
            Ok(length) => length,
            Err(error) if is_pause(&error) => continue,
            Err(error) => return Err(error).context("read from the TCP connection"),
        };
        for byte in buffer.iter().take(length) {
            ensure!(
                *byte == pattern(place),
                "byte {place} of the TCP connection is another"
            );
            place += 1;
        }
        lock(seen).arrive();
    }
    Ok(())
}

fn is_pause(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}

/// Sends so many bytes by one TCP connection, checks each where it arrives, and says how long that took.
///
/// # Errors
///
/// If not all arrive as they were sent within `limit`.
pub fn transfer(way: Way, bytes: u64, limit: Duration) -> Result<Duration> {
    let listener = way.to.enter(|| TcpListener::bind((way.address, 0)))??;
    let to = listener.local_addr()?;
    let mut sender = way
        .from
        .enter(|| TcpStream::connect_timeout(&to, limit.min(CONNECT_LIMIT)))?
        .with_context(|| format!("connect to {to} on {}", way.from.name()))?;
    let (mut receiver, _) = listener.accept()?;
    let start = Instant::now();
    sender.set_write_timeout(Some(limit))?;
    receiver.set_read_timeout(Some(LOOK_EVERY))?;
    thread::scope(|scope| {
        let writing = scope.spawn(move || -> Result<()> {
            let mut place = 0;
            while place < bytes {
                let end = bytes.min(place + (64 << 10));
                let piece: Vec<u8> = (place..end).map(pattern).collect();
                sender
                    .write_all(&piece)
                    .with_context(|| format!("write byte {place}"))?;
                place = end;
            }
            Ok(())
        });
        let (mut place, mut buffer) = (0, vec![0; 64 << 10]);
        let received = loop {
            if place == bytes {
                break Ok(start.elapsed());
            }
            if start.elapsed() > limit {
                break Err(anyhow!("{place} of {bytes} bytes came within {limit:?}"));
            }
            match receiver.read(&mut buffer) {
                Ok(0) => {
                    break Err(anyhow!(
                        "the connection ended after {place} of {bytes} bytes"
                    ));
                }
                Ok(length) => {
                    let odd = buffer
                        .iter()
                        .take(length)
                        .zip(place..)
                        .find(|(byte, at)| **byte != pattern(*at));
                    if let Some((_, at)) = odd {
                        break Err(anyhow!("byte {at} is another"));
                    }
                    place += length as u64;
                }
                Err(error) if is_pause(&error) => {}
                Err(error) => break Err(error).context("read"),
            }
        };
        drop(receiver); // Ends a writer that waits.
        let written = writing.join().map_err(|_| anyhow!("the writer panicked"))?;
        let took = received?;
        written.map(|()| took)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, times_ms: &[u64]) -> Vec<Instant> {
        times_ms
            .iter()
            .map(|ms| start + Duration::from_millis(*ms))
            .collect()
    }

    #[track_caller]
    fn check(arrivals_ms: &[u64], since_ms: u64, now_ms: u64, gap_ms: u64) {
        let start = Instant::now();
        let [since, now] = [since_ms, now_ms].map(|ms| start + Duration::from_millis(ms));
        let found = longest_gap(&at(start, arrivals_ms), since, now);
        assert_eq!(found, Duration::from_millis(gap_ms));
    }

    #[test]
    fn a_gap_counts_from_the_last_arrival_before_the_cut_to_the_first_after_it() {
        check(&[0, 900, 1_000, 1_010, 1_700, 1_710], 1_005, 1_720, 690);
    }

    #[test]
    fn a_gap_that_has_not_ended_counts_and_one_that_was_before_does_not() {
        check(&[0, 900, 1_000], 950, 3_000, 2_000);
        check(&[], 500, 700, 200);
    }

    #[test]
    fn what_comes_twice_is_counted() {
        let mut seen = Seen::default();
        for number in [0, 2, 1, 2, 0, 2] {
            seen.note(number);
        }
        assert_eq!((seen.twice, seen.arrivals.len()), (3, 6));
    }

    #[test]
    fn a_stream_crosses_a_wire_and_a_wrong_byte_is_told() {
        let lab = crate::lab::Lab::new().unwrap();
        let [from, to] = ["from", "to"].map(|name| lab.add_node(name).unwrap());
        lab.veth(&from, "eth0", &to, "eth0").unwrap();
        for (node, address) in [(&from, "10.0.0.1/24"), (&to, "10.0.0.2/24")] {
            crate::tool::ip(node.netns(), &format!("addr add {address} dev eth0\n")).unwrap();
        }
        let way = Way {
            from: &from,
            to: &to,
            address: [10, 0, 0, 2].into(),
        };
        let every = Duration::from_millis(5);
        let [udp, tcp] =
            [Stream::datagrams(way, every), Stream::tcp(way, every)].map(Result::unwrap);
        for stream in [&udp, &tcp] {
            let since = Instant::now();
            stream.flows(Duration::from_secs(5)).unwrap();
            stream.intact().unwrap();
            assert!(stream.longest_gap(since) < Duration::from_secs(5));
        }
        assert_eq!(udp.duplicates(), 0);
        transfer(way, 1_000_000, Duration::from_secs(10)).unwrap();
        // The way is gone: both notice.
        crate::tool::ip(to.netns(), "link set eth0 down\n").unwrap();
        let since = Instant::now();
        thread::sleep(Duration::from_millis(300));
        assert!(udp.longest_gap(since) >= Duration::from_millis(290));
        assert!(transfer(way, 10, Duration::from_millis(200)).is_err());
    }

    #[test]
    fn bytes_that_were_swapped_are_found() {
        let wrong = (0..100_000)
            .filter(|place| pattern(*place) == pattern(*place + 1_448))
            .count();
        assert!(wrong < 2_000, "{wrong}"); // One in 256 by chance.
    }
}
