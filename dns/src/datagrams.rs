//! UDP: some threads, each with a socket of its own (the kernel spreads clients over them), that take and
//! give many datagrams in one system call. Own names are answered here and now; what has to wait for an
//! upstream is a task of the runtime.

use std::{
    fs,
    io::{self, IoSliceMut},
    net::{IpAddr, Shutdown, SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use mesh_core::services::View;
use mesh_wire::id::canonical_ip;
use nix::sys::socket::{
    MsgFlags, MultiHeaders, SockaddrIn, SockaddrIn6, SockaddrStorage, recvmmsg,
};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::{
    answer::Told,
    counters::DropReason,
    outbox::Outbox,
    packed::{Packed, Said},
    server::{PAUSE_AFTER_ERROR, Shared, Step, Written},
};

/// Threads at most at each address: more cores are the applications'.
const THREADS_MAX: usize = 4;

/// Datagrams in one system call: what came while the batch before was answered, a third of a millisecond.
pub(crate) const BATCH: usize = 64;

/// A query has one name of at most 255 bytes and a few options; what is longer is cut, and then malformed.
/// With [`BATCH`], 128 KiB for each socket.
const QUERY_MAX_BYTES: usize = 2048;

/// What waits to be read: a burst of 2,000 small queries, each with the kernel's 768 bytes of accounting.
const RECEIVE_BUFFER_BYTES: usize = 2 << 20;

/// A thread that gets more than this in a millisecond does not wake for each: that costs whoever asks as much as the
/// answer does. 20,000 a second and thread are beyond what applications of one node ask.
const BUSY_PER_MS: u32 = 20;

/// What it sleeps then before it looks again; the kernel adds up to 50 µs (`timer_slack_ns`). Answers come that much later,
/// and at this rate from 1 to some ten of them together. Half a batch at 300,000 a second.
const PAUSE_WHEN_BUSY: Duration = Duration::from_micros(50);

/// Over which the rate is looked at.
const RATE_WINDOW: Duration = Duration::from_millis(1);

/// How many threads serve an address.
fn threads() -> usize {
    thread::available_parallelism().map_or(1, |cores| cores.get().min(THREADS_MAX))
}

/// One socket for each thread at `address`; port 0 becomes the same real one for all. Beside who listens at all addresses and
/// shares them (`SO_REUSEADDR`, as dnsmasq does): the kernel gives a datagram to who listens at its very address.
pub(crate) fn bind(address: SocketAddr) -> io::Result<Vec<Arc<UdpSocket>>> {
    match bind_all(address, false) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && !is_held(address)? => {
            bind_all(address, true)
        }
        bound => bound,
    }
}

fn bind_all(mut address: SocketAddr, shares: bool) -> io::Result<Vec<Arc<UdpSocket>>> {
    let mut sockets = Vec::new();
    for _ in 0..threads() {
        let domain = Domain::for_address(address);
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
        // It stays: who shares with us must be able to start anew.
        socket.set_reuse_address(shares)?;
        if sockets.is_empty() {
            // Another process at this port would take a part of the queries.
            socket.bind(&address.into())?;
            socket.set_reuse_port(true)?;
        } else {
            socket.set_reuse_port(true)?;
            socket.bind(&address.into())?;
        }
        socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES).ok(); // Up to `net.core.rmem_max`.
        let socket = UdpSocket::from(socket);
        address = socket.local_addr()?;
        sockets.push(Arc::new(socket));
    }
    Ok(sockets)
}

/// Whether somebody listens at this very address: another agent, say. Of two that share it, the later has all datagrams.
fn is_held(address: SocketAddr) -> io::Result<bool> {
    let table = match address {
        SocketAddr::V4(_) => "/proc/thread-self/net/udp",
        SocketAddr::V6(_) => "/proc/thread-self/net/udp6",
    };
    Ok(has(&fs::read_to_string(table)?, address))
}

/// Whether a socket of the kernel's `table` (proc_net(5): words of the address in the machine's order) is at `address`.
fn has(table: &str, address: SocketAddr) -> bool {
    let octets = match address.ip() {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let (words, _) = octets.as_chunks();
    let words = words.iter().map(|word| u32::from_ne_bytes(*word));
    let ip: String = words.map(|word| format!("{word:08X}")).collect();
    let local = format!("{ip}:{:04X}", address.port());
    let mut sockets = table.lines();
    sockets.any(|line| line.split_whitespace().nth(1) == Some(&local))
}

/// Threads that serve, one for each socket; they end when this is dropped.
#[derive(Debug)]
pub(crate) struct Threads {
    stop: Arc<AtomicBool>,
    sockets: Vec<Arc<UdpSocket>>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Threads {
    /// One of so many `listeners`, among which memory is divided.
    pub(crate) fn start(
        sockets: Vec<Arc<UdpSocket>>,
        listeners: usize,
        shared: &Arc<Shared>,
    ) -> io::Result<Self> {
        let mut started = Self {
            stop: Arc::default(),
            sockets,
            threads: Vec::new(),
        };
        for (number, socket) in started.sockets.iter().enumerate() {
            let packed = Packed::new(started.sockets.len() * listeners, now());
            let (socket, shared) = (Arc::clone(socket), Arc::clone(shared));
            let stop = Arc::clone(&started.stop);
            let run = move || {
                let outbox = Outbox::new(socket); // Its buffers stay in this thread.
                let replies = Replies {
                    shared,
                    packed,
                    outbox,
                };
                serve(replies, &stop);
            };
            let thread = thread::Builder::new().name(format!("dns-{number}"));
            started.threads.push(thread.spawn(run)?);
        }
        Ok(started)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for socket in &self.sockets {
            // It has no peer, and says so (`ENOTCONN`); who waits in it is woken all the same (`inet_shutdown`).
            SockRef::from(&**socket).shutdown(Shutdown::Read).ok();
        }
        for thread in self.threads.drain(..) {
            thread.join().ok(); // It says itself why it panicked.
        }
    }
}

/// Whether datagrams come so fast that it pays to let some gather (pure).
#[derive(Debug)]
struct Rate {
    since: Instant,
    received: u32,
    is_busy: bool,
}

impl Rate {
    fn new(now: Instant) -> Self {
        Self {
            since: now,
            received: 0,
            is_busy: false,
        }
    }

    /// So many came at once. Returns whether to pause before more are taken.
    fn received(&mut self, datagrams: usize, now: Instant) -> bool {
        self.received = self
            .received
            .saturating_add(u32::try_from(datagrams).unwrap_or(u32::MAX));
        let window = now.saturating_duration_since(self.since);
        if window >= RATE_WINDOW {
            let wanted = window.as_micros() * u128::from(BUSY_PER_MS) / 1_000;
            self.is_busy = u128::from(self.received) > wanted;
            (self.since, self.received) = (now, 0);
        }
        self.is_busy
    }
}

/// Answers what comes, until it is told to stop.
fn serve(mut replies: Replies, stop: &AtomicBool) {
    let socket = Arc::clone(replies.outbox.socket());
    let mut buffers = Box::new([[0; QUERY_MAX_BYTES]; BATCH]);
    let mut headers = MultiHeaders::preallocate(BATCH, None);
    let mut rate = Rate::new(now());
    while !stop.load(Ordering::Acquire) {
        let mut slices = buffers.each_mut().map(|one| [IoSliceMut::new(one)]);
        // Waits for the first, and takes what else is there.
        let flags = MsgFlags::MSG_WAITFORONE;
        let received = recvmmsg(socket.as_raw_fd(), &mut headers, &mut slices, flags, None);
        let received = match received {
            Ok(_) if stop.load(Ordering::Acquire) => return, // That was no datagram.
            Ok(received) => received,
            // A signal; what an earlier answer met: its client is gone.
            Err(nix::Error::EINTR | nix::Error::ECONNREFUSED) => continue,
            Err(error) => {
                tracing::debug!(%error, "DNS listener paused");
                thread::sleep(PAUSE_AFTER_ERROR);
                continue;
            }
        };
        let view = replies.begin();
        let mut datagrams = 0;
        for message in received {
            datagrams += 1;
            if let (Some(query), Some(source)) = (message.iovs().next(), message.address) {
                replies.add(query, source, view.as_deref());
            }
        }
        replies.send();
        if rate.received(datagrams, now()) {
            thread::sleep(PAUSE_WHEN_BUSY);
        }
    }
}

/// The replies of one batch.
struct Replies {
    shared: Arc<Shared>,
    packed: Packed,
    outbox: Outbox,
}

impl Replies {
    /// The next batch is answered from this view.
    fn begin(&mut self) -> Option<Arc<View>> {
        let view = self.shared.view();
        self.packed.begin(view.as_ref(), now());
        view
    }

    /// Adds the reply to a query, if there is one now.
    fn add(&mut self, query: &[u8], from: SockaddrStorage, view: Option<&View>) {
        let Some(source) = address(from) else {
            return;
        };
        if !self.shared.is_client(source.ip(), view) {
            return;
        }
        let callers = self.shared.callers();
        let caller = callers
            .as_deref()
            .and_then(|callers| callers.caller(canonical_ip(source.ip())));
        let ready = self
            .packed
            .reply(query, &mut self.outbox.bytes, caller.is_some());
        if let Some(said) = ready {
            self.shared.count_packed(said);
            return self.end(source);
        }
        let (step, max) = self.shared.decide(query, view, caller);
        let (reply, own) = match step {
            Step::Nothing => return,
            Step::Own(reply, told) => (reply, Some(told)),
            Step::Cached(reply) => (reply, None),
            Step::Ask(reply, question) => {
                let (socket, shared) = (Arc::clone(self.outbox.socket()), Arc::clone(&self.shared));
                return shared.ask_for_datagram(socket, reply, question, max, source);
            }
        };
        // What is wrong with a query is not worth the room, and what one pod is told is for nobody else.
        let keeps = own.is_some_and(|told| told != Told::Part) && reply.metadata.authoritative;
        let several = reply.answers.len() > 1;
        let Some(Written { bytes, said }) = self.shared.write_datagram(reply, max) else {
            return;
        };
        if keeps {
            let may_be_denied = own == Some(Told::Whole);
            let said = Said {
                may_be_denied,
                ..said
            };
            self.packed.keep(query, &bytes, said, several);
        }
        self.outbox.bytes.extend_from_slice(&bytes);
        self.end(source);
    }

    fn end(&mut self, to: SocketAddr) {
        let reply = self.outbox.end(to);
        self.shared.log(to.ip(), reply);
    }

    fn send(&mut self) {
        for _ in 0..self.outbox.send() {
            self.shared.drop_one(DropReason::Unsent);
        }
    }
}

fn address(from: SockaddrStorage) -> Option<SocketAddr> {
    let v4 = from
        .as_sockaddr_in()
        .map(|v4: &SockaddrIn| SocketAddr::from((v4.ip(), v4.port())));
    v4.or_else(|| {
        let v6: &SockaddrIn6 = from.as_sockaddr_in6()?;
        Some(std::net::SocketAddrV6::from(*v6).into())
    })
}

/// The one place of this module that reads the clock.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_listens_at_the_very_address_is_found_in_the_kernel_s_table() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let held = socket.local_addr().unwrap();
        assert!(is_held(held).unwrap());
        for other in ["127.0.0.2", "0.0.0.0"] {
            let other = SocketAddr::new(other.parse().unwrap(), held.port());
            assert!(!is_held(other).unwrap(), "{other}");
        }
        let socket = UdpSocket::bind("[::1]:0").unwrap();
        let held = socket.local_addr().unwrap();
        assert!(is_held(held).unwrap());
        assert!(!is_held(SocketAddr::from(([0; 16], held.port()))).unwrap());
    }

    #[test]
    fn only_who_is_asked_more_than_a_node_s_applications_ask_lets_questions_gather() {
        let start = now();
        let mut rate = Rate::new(start);
        // One every 100 µs, for 5 ms.
        let mut at = start;
        for _ in 0..50 {
            at += Duration::from_micros(100);
            assert!(!rate.received(1, at), "{rate:?}");
        }
        // One every 10 µs: from the second window on at the latest.
        let mut first = None;
        for number in 0..300 {
            at += Duration::from_micros(10);
            if rate.received(1, at) {
                first.get_or_insert(number);
            }
        }
        assert!(first.is_some_and(|first| first <= 200), "{first:?}");
        // A burst after a second of silence is no rate, and the first one after it is answered at once.
        at += Duration::from_secs(1);
        assert!(!rate.received(BATCH, at), "{rate:?}");
    }
}
