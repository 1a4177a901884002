//! The way between links: the core's decisions, and the queues that they name.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use mesh_core::{
    io::RelayTransport,
    relay_server::{
        Batch, DropReason, Limits, LinkId, Output, Refusal, RelayServer, UdpPath, Verdict, Way,
    },
};
use mesh_wire::{
    id::NodeId,
    relay::{
        Control, FRAME_LEN_MAX, Frame, HEADER_LEN, Session,
        udp::{Tag, data_session, unbound_frame},
    },
};
use quinn_udp::{EcnCodepoint, Transmit};

use crate::{
    BATCH_FRAMES,
    queue::{Queue, Waiting},
    quic::{SEND_BYTES_MAX, endpoint::Socket},
    server::totals::Totals,
};

/// One lock for all links: it is held for some map look-ups a batch of packets, a small part of
/// what one packet's way through the kernel takes, and never while something is sent.
#[derive(Debug)]
pub(super) struct Hub {
    state: Mutex<State>,
    /// Sends plain UDP: the port that QUIC has too.
    udp: OnceLock<Arc<Socket>>,
    shell: ShellCounters,
    pub(super) udp_counters: UdpCounters,
}

#[derive(Debug)]
struct State {
    server: RelayServer,
    links: HashMap<LinkId, Arc<Queue>>,
    reported: Totals,
}

/// What the core does not see.
#[derive(Debug, Default)]
struct ShellCounters {
    bad_frames: AtomicU64,
    queue_dropped_frames: AtomicU64,
    /// Received by QUIC, for a link whose task did not keep up.
    overrun_datagrams: Arc<AtomicU64>,
    failed_handshakes: AtomicU64,
    plain_http_requests: AtomicU64,
}

/// Where frames go, and how many of them.
enum Route {
    Link(Arc<Queue>, usize),
    Udp(UdpPath, usize),
    /// Counted by the core.
    Nowhere,
    /// Likewise; and the sender should hear it.
    TellUnbound,
}

/// What the UDP sockets count.
#[derive(Debug, Default)]
pub(super) struct UdpCounters {
    pub(super) stun_answers: AtomicU64,
    /// STUN that is not answered: not a binding request, shorter than its answer, or too many.
    pub(super) stun_ignored: AtomicU64,
    /// Neither STUN nor QUIC nor a frame.
    pub(super) garbage_datagrams: AtomicU64,
}

impl Hub {
    /// `secret` is random.
    pub(super) fn new(limits: Limits, secret: &Tag) -> Self {
        let state = State {
            server: RelayServer::new(limits, secret, Instant::now()),
            links: HashMap::new(),
            reported: Totals::default(),
        };
        Self {
            state: Mutex::new(state),
            udp: OnceLock::new(),
            shell: ShellCounters::default(),
            udp_counters: UdpCounters::default(),
        }
    }

    /// Says by what plain UDP goes out. Only the first counts: a relay has one such port.
    pub(super) fn set_udp(&self, socket: Arc<Socket>) {
        self.udp.get_or_init(|| socket);
    }

    /// Counts datagrams that came by QUIC for a link whose task did not keep up.
    pub(super) fn overrun_counter(&self) -> Arc<AtomicU64> {
        self.shell.overrun_datagrams.clone()
    }

    pub(super) fn set_served(&self, served: Option<BTreeSet<NodeId>>) {
        let mut state = self.lock();
        state.server.set_served(served);
        state.perform();
    }

    pub(super) fn handshake(&self, from: IpAddr) -> Result<(), Refusal> {
        self.lock().server.handle_handshake(from, Instant::now())
    }

    pub(super) fn handshake_failed(&self) {
        self.shell.failed_handshakes.fetch_add(1, Relaxed);
    }

    pub(super) fn plain_http_request(&self) {
        self.shell.plain_http_requests.fetch_add(1, Relaxed);
    }

    pub(super) fn bad_frame(&self) {
        self.shell.bad_frames.fetch_add(1, Relaxed);
    }

    pub(super) fn connected(
        &self,
        node: NodeId,
        transport: RelayTransport,
        from: IpAddr,
        version: u32,
        queue: Arc<Queue>,
    ) -> Result<LinkId, Refusal> {
        let mut state = self.lock();
        let now = Instant::now();
        let link = state
            .server
            .handle_connected(node, transport, from, version, now)?;
        state.links.insert(link, queue);
        state.perform();
        Ok(link)
    }

    pub(super) fn disconnected(&self, link: LinkId) {
        let mut state = self.lock();
        state.links.remove(&link);
        state.server.handle_disconnected(link);
        state.perform();
    }

    pub(super) fn control(&self, link: LinkId, message: Control) {
        let mut state = self.lock();
        state.server.handle_control(link, message);
        state.perform();
    }

    /// Sends data frames of a link on, as they are.
    pub(super) fn frames(&self, link: LinkId, mut frames: &[Bytes]) {
        while let Some(first) = frames.first() {
            let run = match Frame::decode(first) {
                Ok(Frame::Data { session, .. }) => {
                    let same = |frame: &&Bytes| {
                        frame.len() <= FRAME_LEN_MAX && data_session(frame) == Some(session)
                    };
                    let run = frames.iter().take_while(same).count();
                    let (run, _) = frames.split_at(run);
                    self.run_of_link(link, session, run);
                    run.len()
                }
                Ok(Frame::Control(_)) | Err(_) => {
                    self.bad_frame();
                    1
                }
            };
            frames = frames.get(run..).unwrap_or_default();
        }
    }

    fn run_of_link(&self, link: LinkId, session: Session, run: &[Bytes]) {
        let bytes: usize = run.iter().map(Bytes::len).sum();
        match self.route(Way::Link(link), session, run.len(), bytes) {
            Route::Link(queue, frames) => {
                let run = run.iter().take(frames).cloned();
                self.count_dropped(queue.push_data(run, Instant::now()).dropped());
            }
            Route::Udp(path, frames) => {
                self.gather_to_udp(path, run.get(..frames).unwrap_or_default());
            }
            Route::Nowhere | Route::TellUnbound => {}
        }
    }

    /// Sends data frames on that came as plain UDP: `run` is datagrams of `stride` bytes (the last
    /// may be shorter) of one session. Returns an answer.
    pub(super) fn datagrams(
        &self,
        from: UdpPath,
        session: Session,
        run: &[u8],
        stride: usize,
        ecn: Option<EcnCodepoint>,
    ) -> Option<Vec<u8>> {
        let each = run.chunks(stride.max(1));
        if stride > FRAME_LEN_MAX {
            self.shell.bad_frames.fetch_add(each.len() as u64, Relaxed);
            return None;
        }
        match self.route(Way::Udp(from), session, each.len(), run.len()) {
            Route::Udp(path, frames) => {
                let allowed = run.get(..frames * stride).unwrap_or(run);
                self.send_udp(path, allowed, stride, ecn);
                None
            }
            Route::Link(queue, frames) => {
                let all = Bytes::copy_from_slice(run); // One allocation for all of them.
                let starts = (0..all.len()).step_by(stride).take(frames);
                let each = starts.map(|at| all.slice(at..all.len().min(at + stride)));
                self.count_dropped(queue.push_data(each, Instant::now()).dropped());
                None
            }
            Route::TellUnbound => unbound_frame(run).map(Vec::from),
            Route::Nowhere => None,
        }
    }

    /// A datagram of the UDP framing that is no data. Returns an answer.
    pub(super) fn datagram(&self, from: UdpPath, datagram: &[u8]) -> Option<Vec<u8>> {
        let mut state = self.lock();
        let answer = state.server.handle_udp(from, datagram, Instant::now());
        drop(state);
        answer.unwrap_or_else(|_| {
            self.bad_frame();
            None
        })
    }

    /// Where frames go; `bytes` with their headers.
    fn route(&self, from: Way, session: Session, frames: usize, bytes: usize) -> Route {
        let batch = Batch {
            session,
            frames,
            bytes: bytes.saturating_sub(frames * HEADER_LEN),
        };
        let mut state = self.lock();
        match state.server.handle_data(from, batch, Instant::now()) {
            Verdict::Forward {
                way: Way::Udp(path),
                frames,
            } => Route::Udp(path, frames),
            Verdict::Forward {
                way: Way::Link(to),
                frames,
            } => match state.links.get(&to) {
                Some(queue) => Route::Link(queue.clone(), frames),
                None => Route::Nowhere,
            },
            Verdict::Drop(DropReason::Unbound { tell: true }) => Route::TellUnbound,
            Verdict::Drop(
                DropReason::NoSession | DropReason::Rate | DropReason::Unbound { tell: false },
            ) => {
                state.perform();
                Route::Nowhere
            }
        }
    }

    /// Frames of a link as plain UDP: those of one length leave together.
    fn gather_to_udp(&self, path: UdpPath, mut frames: &[Bytes]) {
        let mut gathered = Vec::new();
        while let Some((first, others)) = frames.split_first() {
            let stride = first.len();
            let same = others.iter().take_while(|frame| frame.len() == stride);
            let count = 1 + same.take(BATCH_FRAMES - 1).count();
            let (run, rest) = frames.split_at(count);
            if count == 1 {
                self.send_udp(path, first, stride, None);
            } else {
                gathered.clear();
                run.iter()
                    .for_each(|frame| gathered.extend_from_slice(frame));
                self.send_udp(path, &gathered, stride, None);
            }
            frames = rest;
        }
    }

    /// Sends datagrams of `stride` bytes (the last may be shorter), by as few calls as may be.
    fn send_udp(&self, to: UdpPath, run: &[u8], stride: usize, ecn: Option<EcnCodepoint>) {
        let Some(socket) = self.udp.get() else {
            return;
        };
        let at_once = (SEND_BYTES_MAX / stride.max(1)).clamp(1, socket.segments_max());
        for part in run.chunks(at_once * stride.max(1)) {
            let transmit = Transmit {
                destination: to.remote,
                ecn,
                contents: part,
                segment_size: (part.len() > stride).then_some(stride),
                src_ip: to.local, // The address to which it was bound.
            };
            if socket.try_send(&transmit).is_err() {
                self.count_dropped(part.len().div_ceil(stride));
            }
        }
    }

    fn count_dropped(&self, frames: usize) {
        self.shell
            .queue_dropped_frames
            .fetch_add(frames as u64, Relaxed);
    }

    pub(super) fn stop(&self, grace: Duration) {
        let mut state = self.lock();
        state.server.handle_stop(grace);
        state.perform();
    }

    /// Writes the counters down if something was refused or dropped since the last time.
    pub(super) fn log_drops(&self) {
        let mut state = self.lock();
        let totals = self.totals(&state);
        if totals.refused_or_dropped_sum() > state.reported.refused_or_dropped_sum() {
            totals.log("something was refused or dropped");
        }
        state.reported = totals;
    }

    pub(super) fn log_totals(&self) {
        self.totals_now().log("stopped");
    }

    /// Data frames that wait in front of all links. The hub is held for a look at its table alone.
    pub(super) fn waiting(&self) -> Waiting {
        let queues: Vec<_> = self.lock().links.values().cloned().collect();
        let (now, mut sum) = (Instant::now(), Waiting::default());
        for queue in queues {
            sum.add(queue.waiting(now));
        }
        sum
    }

    pub(super) fn totals_now(&self) -> Totals {
        self.totals(&self.lock())
    }

    fn totals(&self, state: &State) -> Totals {
        let (shell, udp) = (&self.shell, &self.udp_counters);
        Totals {
            core: state.server.counters(),
            links: state.server.links(),
            bad_frames: shell.bad_frames.load(Relaxed),
            queue_dropped_frames: shell.queue_dropped_frames.load(Relaxed),
            overrun_datagrams: shell.overrun_datagrams.load(Relaxed),
            failed_handshakes: shell.failed_handshakes.load(Relaxed),
            plain_http_requests: shell.plain_http_requests.load(Relaxed),
            stun_answers: udp.stun_answers.load(Relaxed),
            stun_ignored: udp.stun_ignored.load(Relaxed),
            garbage_datagrams: udp.garbage_datagrams.load(Relaxed),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn perform(&mut self) {
        while let Some(output) = self.server.poll_output() {
            match output {
                Output::Send { link, message } => {
                    if let Some(queue) = self.links.get(&link) {
                        queue.push_control(message);
                    }
                }
                Output::Close { link } => {
                    if let Some(queue) = self.links.remove(&link) {
                        queue.close("replaced by a newer connection of this node");
                    }
                }
            }
        }
    }
}
