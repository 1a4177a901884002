//! The way between links: the core's decisions, and the outlets that they name.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use mesh_core::{
    io::RelayTransport,
    relay_server::{Counters, Limits, LinkId, Output, Refusal, RelayServer, Verdict},
};
use mesh_wire::{
    id::NodeId,
    relay::{Control, Frame},
};

use crate::{outlet::Outlet, quic::Sent};

/// One lock for all links: it is held for some map look-ups a packet, about a tenth of what the
/// packet's decryption takes, and never while something is sent.
#[derive(Debug)]
pub(super) struct Hub {
    state: Mutex<State>,
    shell: ShellCounters,
    udp: Arc<UdpCounters>,
}

#[derive(Debug)]
struct State {
    server: RelayServer,
    outlets: HashMap<LinkId, Outlet>,
    reported: Totals,
}

/// What the core does not see.
#[derive(Debug, Default)]
struct ShellCounters {
    bad_frames: AtomicU64,
    queue_dropped_frames: AtomicU64,
    failed_handshakes: AtomicU64,
    plain_http_requests: AtomicU64,
}

/// What the UDP sockets count.
#[derive(Debug, Default)]
pub(super) struct UdpCounters {
    pub(super) stun_answers: AtomicU64,
    /// STUN that is not answered: not a binding request, shorter than its answer, or too many.
    pub(super) stun_ignored: AtomicU64,
    /// Neither STUN nor QUIC.
    pub(super) garbage_datagrams: AtomicU64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Totals {
    core: Counters,
    links: usize,
    bad_frames: u64,
    queue_dropped_frames: u64,
    failed_handshakes: u64,
    plain_http_requests: u64,
    stun_answers: u64,
    stun_ignored: u64,
    garbage_datagrams: u64,
}

impl Totals {
    /// What an operator should look at when it grows.
    fn refused_or_dropped(&self) -> u64 {
        let core = &self.core;
        core.no_session_frames
            + core.rate_limited_frames
            + core.handshakes_limited
            + core.links_refused
            + core.finds_refused
            + self.bad_frames
            + self.queue_dropped_frames
            + self.failed_handshakes
            + self.plain_http_requests
            + self.stun_ignored
            + self.garbage_datagrams
    }

    fn log(&self, what: &'static str) {
        let core = &self.core;
        tracing::info!(
            links = self.links,
            forwarded_frames = core.forwarded_frames,
            forwarded_bytes = core.forwarded_bytes,
            no_session_frames = core.no_session_frames,
            rate_limited_frames = core.rate_limited_frames,
            handshakes_limited = core.handshakes_limited,
            links_refused = core.links_refused,
            links_replaced = core.links_replaced,
            finds_refused = core.finds_refused,
            bad_frames = self.bad_frames,
            queue_dropped_frames = self.queue_dropped_frames,
            failed_handshakes = self.failed_handshakes,
            plain_http_requests = self.plain_http_requests,
            stun_answers = self.stun_answers,
            stun_ignored = self.stun_ignored,
            garbage_datagrams = self.garbage_datagrams,
            "{what}"
        );
    }
}

impl Hub {
    pub(super) fn new(limits: Limits, seed: u64) -> Self {
        let state = State {
            server: RelayServer::new(limits, seed),
            outlets: HashMap::new(),
            reported: Totals::default(),
        };
        Self {
            state: Mutex::new(state),
            shell: ShellCounters::default(),
            udp: Arc::default(),
        }
    }

    pub(super) fn udp_counters(&self) -> Arc<UdpCounters> {
        self.udp.clone()
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
        outlet: Outlet,
    ) -> Result<LinkId, Refusal> {
        let mut state = self.lock();
        let now = Instant::now();
        let link = state
            .server
            .handle_connected(node, transport, from, version, now)?;
        state.outlets.insert(link, outlet);
        state.perform();
        Ok(link)
    }

    pub(super) fn disconnected(&self, link: LinkId) {
        let mut state = self.lock();
        state.outlets.remove(&link);
        state.server.handle_disconnected(link);
        state.perform();
    }

    pub(super) fn control(&self, link: LinkId, message: Control) {
        let mut state = self.lock();
        state.server.handle_control(link, message);
        state.perform();
    }

    /// Sends a data frame on, as it is.
    pub(super) fn data(&self, link: LinkId, frame: Bytes) {
        let Ok(Frame::Data { session, payload }) = Frame::decode(&frame) else {
            return self.bad_frame();
        };
        let outlet = {
            let mut state = self.lock();
            match state
                .server
                .handle_data(link, session, payload.len(), Instant::now())
            {
                Verdict::Forward(to) => state.outlets.get(&to).cloned(),
                Verdict::Drop(_) => {
                    state.perform();
                    None
                }
            }
        };
        let Some(outlet) = outlet else {
            return; // Counted by the core.
        };
        match outlet.send_data(frame) {
            Sent::Yes => {}
            Sent::InPlaceOfOlder | Sent::Full | Sent::Closed => {
                self.shell.queue_dropped_frames.fetch_add(1, Relaxed);
            }
        }
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
        if totals.refused_or_dropped() > state.reported.refused_or_dropped() {
            totals.log("something was refused or dropped");
        }
        state.reported = totals;
    }

    pub(super) fn log_totals(&self) {
        let totals = self.totals(&self.lock());
        totals.log("stopped");
    }

    fn totals(&self, state: &State) -> Totals {
        let (shell, udp) = (&self.shell, &self.udp);
        Totals {
            core: state.server.counters(),
            links: state.server.links(),
            bad_frames: shell.bad_frames.load(Relaxed),
            queue_dropped_frames: shell.queue_dropped_frames.load(Relaxed),
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
                    if let Some(outlet) = self.outlets.get(&link) {
                        outlet.send_control(message);
                    }
                }
                Output::Close { link } => {
                    if let Some(outlet) = self.outlets.remove(&link) {
                        outlet.close("replaced by a newer connection of this node");
                    }
                }
            }
        }
    }
}
