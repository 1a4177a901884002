//! UDP: some threads, each with sockets of its own at every address (the kernel spreads clients over them),
//! that take and give many datagrams in one system call. Own names are answered here and now; what has to
//! wait for an upstream is a task of the runtime.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{SocketAddr, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::Arc,
    thread,
    time::Instant,
};

use mesh_core::services::View;
use nix::sys::socket::{
    MsgFlags, MultiHeaders, SockaddrIn, SockaddrIn6, SockaddrStorage, recvmmsg,
};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd, poll},
    net::{MMsgHdr, SendAncillaryBuffer, SendFlags, SocketAddrAny, sendmmsg},
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    counters::DropReason,
    packed::Packed,
    server::{PAUSE_AFTER_ERROR, Shared, Step, Written},
};

/// Threads at most: more cores are the applications'.
const THREADS_MAX: usize = 4;

/// Datagrams in one system call.
const BATCH: usize = 32;

/// A query has one name of at most 255 bytes and a few options; what is longer is cut, and then malformed.
const QUERY_MAX_BYTES: usize = 4096;

/// What waits to be read: a burst of 2,000 small queries, each with the kernel's 768 bytes of accounting.
const RECEIVE_BUFFER_BYTES: usize = 2 << 20;

/// The sockets of one address, one for each thread.
pub(crate) type Sockets = Vec<Arc<UdpSocket>>;

/// How many threads serve.
pub(crate) fn threads() -> usize {
    thread::available_parallelism().map_or(1, |cores| cores.get().min(THREADS_MAX))
}

/// One socket for each thread at `address`; port 0 becomes the same real one for all.
pub(crate) fn bind(mut address: SocketAddr) -> io::Result<Sockets> {
    let mut sockets = Vec::new();
    for _ in 0..threads() {
        let domain = Domain::for_address(address);
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
        if sockets.is_empty() {
            // Another process at this port would take a part of the queries.
            socket.bind(&address.into())?;
            socket.set_reuse_port(true)?;
        } else {
            socket.set_reuse_port(true)?;
            socket.bind(&address.into())?;
        }
        socket.set_nonblocking(true)?;
        socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES).ok(); // Up to `net.core.rmem_max`.
        let socket = UdpSocket::from(socket);
        address = socket.local_addr()?;
        sockets.push(Arc::new(socket));
    }
    Ok(sockets)
}

/// Threads that serve; they end when this is dropped.
#[derive(Debug)]
pub(crate) struct Threads {
    stop: Arc<OwnedFd>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Threads {
    pub(crate) fn start(addresses: &[Sockets], shared: &Arc<Shared>) -> io::Result<Self> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let mut started = Self {
            stop: Arc::clone(&stop),
            threads: Vec::new(),
        };
        for number in 0..threads() {
            let mine = addresses.iter().filter_map(|sockets| sockets.get(number));
            let (sockets, shared) = (mine.cloned().collect(), Arc::clone(shared));
            let stop = Arc::clone(&stop);
            let run = move || Worker::new(sockets, shared).run(&stop);
            let thread = thread::Builder::new().name(format!("dns-{number}"));
            started.threads.push(thread.spawn(run)?);
        }
        Ok(started)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        rustix::io::write(&self.stop, &1_u64.to_ne_bytes()).ok(); // Full: they were told.
        for thread in self.threads.drain(..) {
            thread.join().ok(); // It says itself why it panicked.
        }
    }
}

struct Worker {
    sockets: Vec<Arc<UdpSocket>>,
    buffers: Vec<[u8; QUERY_MAX_BYTES]>,
    headers: MultiHeaders<SockaddrStorage>,
    replies: Replies,
}

impl Worker {
    fn new(sockets: Vec<Arc<UdpSocket>>, shared: Arc<Shared>) -> Self {
        Self {
            sockets,
            buffers: vec![[0; QUERY_MAX_BYTES]; BATCH],
            headers: MultiHeaders::preallocate(BATCH, None),
            replies: Replies {
                shared,
                packed: Packed::new(threads()),
                bytes: Vec::new(),
                ends: Vec::with_capacity(BATCH),
            },
        }
    }

    fn run(mut self, stop: &OwnedFd) {
        let sockets = self.sockets.clone();
        loop {
            let mut waiting: Vec<_> = sockets
                .iter()
                .map(|one| PollFd::new(one, PollFlags::IN))
                .collect();
            waiting.push(PollFd::new(stop, PollFlags::IN));
            if poll(&mut waiting, None).is_err() {
                continue; // A signal.
            }
            if waiting.pop().is_none_or(|stop| !stop.revents().is_empty()) {
                return;
            }
            for (socket, ready) in sockets.iter().zip(&waiting) {
                if ready.revents().is_empty() {
                    continue;
                }
                if let Err(error) = self.serve(socket) {
                    tracing::debug!(%error, "DNS listener paused");
                    thread::sleep(PAUSE_AFTER_ERROR);
                }
            }
        }
    }

    /// Answers what waits at a socket, at most [`BATCH`] datagrams.
    fn serve(&mut self, socket: &Arc<UdpSocket>) -> io::Result<()> {
        let view = self.replies.begin();
        let buffers = self.buffers.iter_mut();
        let mut buffers: Vec<_> = buffers.map(|one| [IoSliceMut::new(one)]).collect();
        let flags = MsgFlags::MSG_DONTWAIT;
        let received = match recvmmsg(
            socket.as_raw_fd(),
            &mut self.headers,
            &mut buffers,
            flags,
            None,
        ) {
            Ok(received) => received,
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Ok(()),
            // What an earlier answer met: its client is gone.
            Err(nix::Error::ECONNREFUSED) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        for message in received {
            let (Some(query), Some(source)) =
                (message.iovs().next(), message.address.and_then(address))
            else {
                continue;
            };
            self.replies.add(query, source, view.as_deref(), socket);
        }
        self.replies.send(socket);
        Ok(())
    }
}

/// The replies of one batch.
struct Replies {
    shared: Arc<Shared>,
    packed: Packed,
    /// One behind the other.
    bytes: Vec<u8>,
    /// Where each ends, and where it goes.
    ends: Vec<(usize, SocketAddrAny)>,
}

impl Replies {
    /// Forgets the batch before; the next one is answered from this view.
    fn begin(&mut self) -> Option<Arc<View>> {
        self.bytes.clear();
        self.ends.clear();
        let view = self.shared.view();
        self.packed.begin(view.as_ref(), now());
        view
    }

    /// Adds the reply to a query, if there is one now.
    fn add(
        &mut self,
        query: &[u8],
        source: SocketAddr,
        view: Option<&View>,
        socket: &Arc<UdpSocket>,
    ) {
        if !self.shared.is_client(source.ip(), view) {
            return;
        }
        if let Some(said) = self.packed.reply(query, &mut self.bytes) {
            self.shared.count_packed(said);
            return self.ends.push((self.bytes.len(), source.into()));
        }
        let (step, max) = self.shared.decide(query, view);
        let (reply, is_own) = match step {
            Step::Nothing => return,
            Step::Own(reply) => (reply, true),
            Step::Cached(reply) => (reply, false),
            Step::Ask(reply, question) => {
                let (socket, shared) = (Arc::clone(socket), Arc::clone(&self.shared));
                return shared.ask_for_datagram(socket, reply, question, max, source);
            }
        };
        // What is wrong with a query is not worth the room.
        let keeps = is_own && reply.metadata.authoritative;
        let several = reply.answers.len() > 1;
        let Some(Written { bytes, said }) = self.shared.write_datagram(reply, max) else {
            return;
        };
        if keeps {
            self.packed.keep(query, &bytes, said, several);
        }
        self.bytes.extend_from_slice(&bytes);
        self.ends.push((self.bytes.len(), source.into()));
    }

    fn send(&self, socket: &UdpSocket) {
        let mut start = 0;
        let slices = self.ends.iter().map(|(end, to)| {
            let bytes = self.bytes.get(start..*end).unwrap_or_default();
            start = *end;
            ([IoSlice::new(bytes)], to)
        });
        let slices: Vec<_> = slices.collect();
        let mut left = slices.as_slice();
        while !left.is_empty() {
            let mut control: Vec<_> = left
                .iter()
                .map(|_| SendAncillaryBuffer::default())
                .collect();
            let messages = left.iter().zip(&mut control);
            let mut messages: Vec<_> = messages
                .map(|((slice, to), control)| MMsgHdr::new_with_addr(to, slice, control))
                .collect();
            let sent = sendmmsg(socket, &mut messages, SendFlags::DONTWAIT).unwrap_or(0);
            if sent == 0 {
                self.shared.drop_one(DropReason::Unsent); // The first; the others may go.
            }
            left = left.get(sent.max(1)..).unwrap_or_default();
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
