//! Sockets beside the node's own port, for a while. Behind a NAT that gives each socket and destination a port that
//! nobody can tell, many sockets are many ports that lead here, and a peer that guesses finds one of them. When that is
//! worth it, and who guesses, is decided elsewhere.
//!
//! They have a thread of their own, in nodes that take part ([`crate::tunnel::TunnelConfig::bursts`]). What packet threads see of
//! it is one table of the addresses to which packets leave by such a socket: empty as a rule, and looked at
//! once for each call of up to 64 packets.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::SocketAddr,
    os::fd::AsFd as _,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use mesh_linux::{
    thread::raise_priority,
    udp::{IpFields, ReceiveBatch, UdpBatch},
    wake::StopSignal,
};
use mesh_wire::id::{NodeId, Via};

use crate::{
    inbound::{Arrival, Inbox},
    stats::DropReason,
    tunnel::Inner,
    worker::PACKET_NICENESS,
};

/// Most sockets at once, those in use and those of a burst: one burst as `mesh_core` asks for it. Each is a file
/// descriptor, of the 1,024 that systemd and Docker give a process unless told otherwise; the kernel's memory for it is
/// some 2.5 KB, and 16 KiB of datagrams while it waits: 4.7 MiB for all.
pub const SPARE_SOCKETS_MAX: usize = 256;

/// What the kernel may hold of datagrams for a socket in use: 100 Mb/s, more than most lines behind such NATs have, for
/// 80 ms. If all were in use, and nobody read them, it would be 256 MiB; a hundredth of that many is rare.
const USED_RECEIVE_BYTES: usize = 1 << 20;

/// Requests that wait for the thread: it comes round every [`TICK`], and a node asks for some in an hour.
const REQUESTS_MAX: usize = 16;

/// How often requests and clocks are looked at. A peer guesses for seconds.
const TICK: Duration = Duration::from_millis(200);

/// Many sockets towards one address.
#[derive(Debug, Clone)]
pub struct Burst {
    /// Whose session the message is sealed in, once for each socket.
    pub peer: NodeId,
    /// Where each socket sends it.
    pub target: SocketAddr,
    /// How many sockets; fewer if there is no room ([`SPARE_SOCKETS_MAX`]).
    pub count: usize,
    /// The message, an inner packet.
    pub packet: Vec<u8>,
    /// Those by which nothing authentic came are closed after this time.
    pub tried: Duration,
    /// The others after so long without anything authentic.
    pub kept: Duration,
}

#[derive(Debug)]
enum Request {
    Open(Burst),
    CloseAll,
}

/// A socket, and what came by it.
#[derive(Debug)]
pub(crate) struct Spare {
    pub(crate) socket: UdpBatch,
    /// When it is closed unless something authentic comes.
    until: Mutex<Instant>,
    kept: Duration,
}

/// All of a tunnel's.
#[derive(Debug)]
pub(crate) struct Bursts {
    /// Where packets to an address leave by another socket than the node's port. Each socket is there once at most.
    ways: ArcSwap<HashMap<SocketAddr, (u32, Arc<Spare>)>>,
    open: Mutex<BTreeMap<u32, Arc<Spare>>>,
    requests: SyncSender<Request>,
    waiting: Mutex<Receiver<Request>>,
}

impl Default for Bursts {
    fn default() -> Self {
        let (requests, waiting) = sync_channel(REQUESTS_MAX);
        Self {
            ways: ArcSwap::default(),
            open: Mutex::default(),
            requests,
            waiting: Mutex::new(waiting),
        }
    }
}

impl Bursts {
    /// Asks for sockets; they are opened soon.
    pub(crate) fn ask(&self, burst: Burst) {
        if let Err(full) = self.requests.try_send(Request::Open(burst)) {
            tracing::warn!(%full, "a burst of sockets is not opened");
        }
    }

    /// Closes all: packets leave by the node's port from now on.
    pub(crate) fn close_all(&self) {
        self.ways.store(Arc::default());
        // One that is not taken in is behind sixteen others; sockets end by their time, too.
        self.requests.try_send(Request::CloseAll).ok();
    }

    /// The socket by which packets to `to` leave; `None`: by the node's port.
    pub(crate) fn towards(&self, to: &SocketAddr) -> Option<Arc<Spare>> {
        let ways = self.ways.load();
        if ways.is_empty() {
            return None;
        }
        ways.get(to).map(|(_, spare)| Arc::clone(spare))
    }

    /// Something authentic came from an address by a socket: what goes there leaves by it from now on.
    pub(crate) fn adopt(&self, number: u32, from: SocketAddr, now: Instant) {
        // Held to the end, so that nothing is adopted that is being closed.
        let open = lock(&self.open);
        let Some(spare) = open.get(&number) else {
            return;
        };
        *lock(&spare.until) = now + spare.kept;
        let of = |ways: &HashMap<SocketAddr, (u32, Arc<Spare>)>| {
            ways.get(&from).map(|(number, _)| *number)
        };
        if of(&self.ways.load()) == Some(number) {
            return;
        }
        if let Err(error) = spare.socket.make_room(USED_RECEIVE_BYTES) {
            tracing::debug!(%error, "a socket of a burst keeps its small buffers");
        }
        self.ways.rcu(|ways| {
            let mut ways = HashMap::clone(ways);
            ways.retain(|_, (other, _)| *other != number);
            ways.insert(from, (number, Arc::clone(spare)));
            ways
        });
    }

    /// How many are open, and how many of these in use.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (lock(&self.open).len(), self.ways.load().len())
    }

    /// Closes those whose time is over; whether there were any.
    fn expire(&self, now: Instant) -> bool {
        let mut open = lock(&self.open);
        let before = open.len();
        open.retain(|_, spare| *lock(&spare.until) > now);
        if open.len() == before {
            return false;
        }
        let is_open = |number: &u32| open.contains_key(number);
        if self
            .ways
            .load()
            .values()
            .any(|(number, _)| !is_open(number))
        {
            self.ways.rcu(|ways| {
                let mut ways = HashMap::clone(ways);
                ways.retain(|_, (number, _)| is_open(number));
                ways
            });
        }
        true
    }
}

/// Works until the signal is given.
pub(crate) fn run(tunnel: &Inner, stop: &StopSignal) {
    raise_priority(PACKET_NICENESS);
    let requests = lock(&tunnel.bursts.waiting);
    let mut work = Work { tunnel, next: 0 };
    while !stop.wait(Duration::ZERO) {
        if tunnel.bursts.counts().0 > 0 {
            if let Err(error) = work.listen(&requests, stop) {
                tracing::warn!(%error, "the sockets of a burst cannot be waited for: they are closed");
                work.handle(Request::CloseAll);
            }
            continue;
        }
        match requests.recv_timeout(TICK) {
            Ok(request) => work.handle(request),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
    work.handle(Request::CloseAll);
}

struct Work<'a> {
    tunnel: &'a Inner,
    /// The next socket's number: they do not come again, so that nothing late is taken for another's.
    next: u32,
}

impl Work<'_> {
    /// Receives by the sockets that are open now, until they are others or the signal is given.
    fn listen(&mut self, requests: &Receiver<Request>, stop: &StopSignal) -> io::Result<()> {
        let bursts = &self.tunnel.bursts;
        let open: Vec<_> = lock(&bursts.open)
            .iter()
            .map(|(number, spare)| (*number, Arc::clone(spare)))
            .collect();
        let mut waiter = stop.waiter(open.iter().map(|(_, spare)| spare.socket.as_fd()));
        let (mut received, mut inbox) = (ReceiveBatch::new(), self.tunnel.new_inbox(0));
        let mut look = Instant::now() + TICK;
        loop {
            if !waiter.wait(Some(TICK), None)? {
                return Ok(());
            }
            let now = Instant::now();
            for (place, (number, spare)) in open.iter().enumerate() {
                if waiter.is_readable(place) {
                    self.receive(*number, spare, &mut received, &mut inbox, now);
                }
            }
            if now < look {
                continue;
            }
            look = now + TICK;
            let mut changed = bursts.expire(now);
            for request in requests.try_iter() {
                self.handle(request);
                changed = true;
            }
            if changed {
                return Ok(());
            }
        }
    }

    fn receive(
        &self,
        number: u32,
        spare: &Spare,
        received: &mut ReceiveBatch,
        inbox: &mut Inbox,
        now: Instant,
    ) {
        // An error of one datagram is none of the next; a socket that has only errors ends by its time.
        if spare.socket.receive(received).is_err() {
            return;
        }
        let mut batch = inbox.batch();
        for message in received.messages() {
            self.tunnel.receive(message, Some(number), &mut batch, now);
        }
        self.tunnel.finish(&mut batch);
    }

    fn handle(&mut self, request: Request) {
        match request {
            Request::Open(burst) => {
                let opened = self.open(&burst);
                let missing = burst.count.saturating_sub(opened);
                if missing > 0 {
                    tracing::warn!(
                        peer = %burst.peer,
                        opened,
                        missing,
                        "a burst has fewer sockets than it should: a direct path is found more rarely"
                    );
                }
            }
            Request::CloseAll => {
                lock(&self.tunnel.bursts.open).clear();
                self.tunnel.bursts.ways.store(Arc::default());
            }
        }
    }

    /// Opens sockets and sends by each; how many.
    fn open(&mut self, burst: &Burst) -> usize {
        let (tunnel, now) = (self.tunnel, Instant::now());
        let room = SPARE_SOCKETS_MAX.saturating_sub(tunnel.bursts.counts().0);
        let target = SocketAddr::new(burst.target.ip().to_canonical(), burst.target.port());
        let egress = tunnel.egress.load();
        let fields = IpFields {
            link: egress
                .as_ref()
                .and_then(|egress| egress.towards(target.ip())),
            ..IpFields::default()
        };
        for opened in 0..burst.count.min(room) {
            let socket = match UdpBatch::spare(target) {
                Ok(socket) => socket,
                Err(error) => {
                    tracing::warn!(%error, "cannot open a socket of a burst");
                    return opened;
                }
            };
            let Some(sealed) = tunnel.seal_inner(&burst.peer, &burst.packet) else {
                tunnel.drops.count(DropReason::NoSession);
                return opened;
            };
            let spare = Arc::new(Spare {
                socket,
                until: Mutex::new(now + burst.tried),
                kept: burst.kept,
            });
            lock(&tunnel.bursts.open).insert(self.next, Arc::clone(&spare));
            self.next = self.next.wrapping_add(1);
            let sent = spare.socket.send(target, &sealed, sealed.len(), fields);
            if sent.is_err() {
                // None of the others would get there either; what is open ends by its time.
                tunnel.drops.count(DropReason::SendFailed);
                return opened + 1;
            }
        }
        burst.count.min(room)
    }
}

impl Arrival {
    /// By which socket of a burst an authentic datagram came, and from where.
    pub(crate) fn spare(&self) -> Option<(u32, SocketAddr)> {
        match self.via {
            Via::Direct(from) => Some((self.by?, from)),
            Via::Relay(_) => None,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
