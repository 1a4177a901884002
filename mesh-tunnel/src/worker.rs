//! The threads: one for each TUN queue, one for each socket, one for timers.

use std::{
    fmt, io,
    os::fd::AsFd,
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use mesh_linux::{
    tun::{Queue, READ_LEN_MAX},
    udp::{ReceiveBatch, UdpBatch},
    wake::{StopSignal, Woken},
};
use mesh_wire::id::Via;

use crate::{
    inbound::Sender,
    outbound::Outbox,
    tunnel::{Inner, TunnelEvent},
};

/// How often timers are looked at: a fraction of the shortest of WireGuard's (5 s), and fine
/// enough for [`crate::peer::HELD_AGE_MAX`].
const TICK: Duration = Duration::from_millis(200);

/// Packets read from a queue before what they filled is sent, should they not fill a batch.
const READS_MAX: usize = 64;

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
        for number in 0..tunnel.queues.len() {
            workers.spawn(format!("tun-{number}"), tunnel, move |tunnel, stop| {
                let Some(queue) = tunnel.queues.get(number) else {
                    return Ok(());
                };
                read_tun(tunnel, queue, stop)
            })?;
        }
        for number in 0..tunnel.sockets.sockets().count() {
            workers.spawn(format!("udp-{number}"), tunnel, move |tunnel, stop| {
                let Some(socket) = tunnel.sockets.sockets().nth(number) else {
                    return Ok(());
                };
                receive_udp(tunnel, socket, stop)
            })?;
        }
        workers.spawn("timers".to_owned(), tunnel, |tunnel, stop| {
            while !stop.wait(TICK) {
                tunnel.tick(Instant::now());
            }
            Ok(())
        })?;
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

    /// Stops all threads and waits until they are gone.
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

fn read_tun(tunnel: &Inner, queue: &Queue, stop: &StopSignal) -> io::Result<()> {
    let mut buffer = vec![0; READ_LEN_MAX];
    let mut out = Outbox::new();
    until_stopped(queue, stop, || {
        let now = Instant::now();
        let mut result = Ok(());
        for _ in 0..READS_MAX {
            match queue.read(&mut buffer) {
                Ok(len) => {
                    let raw = buffer.get(..len).unwrap_or_default();
                    tunnel.outbound(raw, &mut out, now);
                }
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        out.flush(tunnel);
        result
    })
}

fn receive_udp(tunnel: &Inner, socket: &UdpBatch, stop: &StopSignal) -> io::Result<()> {
    let mut batch = ReceiveBatch::new();
    let mut inbox = tunnel.new_inbox();
    until_stopped(socket, stop, || {
        socket.receive(&mut batch)?;
        let now = Instant::now();
        for (from, bytes, segment_len) in batch.messages() {
            let sender = Sender::Address(from.ip());
            // An empty datagram is one too.
            let first_len = segment_len.min(bytes.len());
            let (first, rest) = bytes.split_at(first_len);
            for datagram in std::iter::once(first).chain(rest.chunks(segment_len)) {
                tunnel.inbound(datagram, Via::Direct(from), sender, &mut inbox, now);
            }
        }
        tunnel.finish(&mut inbox);
        Ok(())
    })
}

/// Calls `work` whenever `fd` can be read. Ends with the signal, or with the last of
/// [`ERRORS_MAX`] errors in a row.
fn until_stopped(
    fd: impl AsFd,
    stop: &StopSignal,
    mut work: impl FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let mut errors = 0;
    while stop.wait_readable(&fd)? == Woken::Readable {
        match work() {
            Ok(()) => errors = 0,
            Err(error) if is_empty(&error) => errors = 0,
            Err(error) if errors == ERRORS_MAX => return Err(error),
            Err(_) => errors += 1,
        }
    }
    Ok(())
}

fn is_empty(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
