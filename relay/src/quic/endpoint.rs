//! The UDP socket of QUIC links: sorts what comes in by connection.

use std::{
    array,
    collections::{HashMap, VecDeque},
    io::{self, IoSliceMut},
    net::{SocketAddr, UdpSocket as StdUdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::BytesMut;
use quinn_proto::{
    ClientConfig, ConnectError, ConnectionError, ConnectionEvent, ConnectionHandle, DatagramEvent,
    Endpoint as Protocol, EndpointConfig, EndpointEvent, Incoming, ServerConfig, Transmit,
};
use quinn_udp::{EcnCodepoint, RecvMeta, UdpSocketState};
use tokio::{
    io::Interest,
    net::UdpSocket,
    sync::{Notify, mpsc},
    time,
};

use super::{SEND_BYTES_MAX, driver::give_way, link::QuicLink};

/// Datagrams with their GRO followers that one system call brings.
const RECEIVE_BATCH: usize = 8;

/// Room for one of them with all its followers.
const RECEIVE_BYTES: usize = 65_536;

/// Received datagrams that wait for a link's task, which waits for nothing itself: all that the
/// other side may have in flight (`WINDOW_BYTES`) at 1,280 bytes each. More are dropped and counted.
const INBOX_MAX: usize = 1640;

/// Received bytes after which it is the links' turn although there may be more to receive. It costs
/// the wake-up of another thread, so not after a packet or two, behind which there is nothing.
const GIVE_WAY_BYTES: usize = 32 * 1024;

/// Connections that were asked for and not yet looked at: one batch brings no more.
const INCOMING_MAX: usize = 64;

/// Pause after a failed receive, which on UDP is nothing that lasts (memory, an interface that is
/// gone).
pub(crate) const ERROR_PAUSE: Duration = Duration::from_millis(10);

/// A UDP socket with segmentation and receive offload, if the kernel has them.
#[derive(Debug)]
pub(crate) struct Socket {
    io: UdpSocket,
    offload: UdpSocketState,
}

/// What one system call brings.
pub(crate) struct Buffers {
    storage: Vec<u8>,
    metas: [RecvMeta; RECEIVE_BATCH],
}

impl Default for Buffers {
    fn default() -> Self {
        Self {
            storage: vec![0; RECEIVE_BATCH * RECEIVE_BYTES], // The kernel gives pages when written.
            metas: [RecvMeta::default(); RECEIVE_BATCH],
        }
    }
}

impl Buffers {
    /// The first `received` buffers.
    pub(crate) fn iter_mut(
        &mut self,
        received: usize,
    ) -> impl Iterator<Item = (&mut [u8], &RecvMeta)> {
        let buffers = self.storage.chunks_exact_mut(RECEIVE_BYTES);
        buffers.zip(&self.metas).take(received)
    }
}

impl Socket {
    /// Must be called on a tokio runtime.
    pub(crate) fn new(socket: StdUdpSocket) -> io::Result<Self> {
        let offload = UdpSocketState::new((&socket).into())?;
        let io = UdpSocket::from_std(socket)?;
        Ok(Self { io, offload })
    }

    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.local_addr()
    }

    /// Datagrams in one send, at most.
    pub(crate) fn segments_max(&self) -> usize {
        self.offload.max_gso_segments()
    }

    /// Waits for datagrams. Returns how many buffers were filled.
    pub(crate) async fn receive(&self, buffers: &mut Buffers) -> io::Result<usize> {
        let receive = || {
            let mut chunks = buffers.storage.chunks_exact_mut(RECEIVE_BYTES);
            let mut slices: [_; RECEIVE_BATCH] =
                array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()));
            let socket = (&self.io).into();
            self.offload.recv(socket, &mut slices, &mut buffers.metas)
        };
        self.io.async_io(Interest::READABLE, receive).await
    }

    /// Sends now or not at all. `WouldBlock`: see [`Self::writable`].
    pub(crate) fn try_send(&self, transmit: &quinn_udp::Transmit<'_>) -> io::Result<()> {
        let send = || self.offload.try_send((&self.io).into(), transmit);
        match send() {
            // Once more, so that tokio knows that there is no room and `writable` waits.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.io.try_io(Interest::WRITABLE, send)
            }
            result => result,
        }
    }

    /// Waits until there is room again after [`Self::try_send`] found none.
    pub(crate) async fn writable(&self) {
        self.io.writable().await.ok(); // Whatever is wrong, sending says it.
    }

    fn send(&self, transmit: &Transmit, buffer: &[u8]) -> io::Result<()> {
        let contents = buffer.get(..transmit.size).unwrap_or(buffer);
        let segment_len = transmit.segment_size.unwrap_or(contents.len()).max(1);
        let at_once = (SEND_BYTES_MAX / segment_len).max(1) * segment_len;
        for (number, part) in contents.chunks(at_once).enumerate() {
            let sent = self.try_send(&quinn_udp::Transmit {
                destination: transmit.destination,
                ecn: transmit
                    .ecn
                    .and_then(|ecn| EcnCodepoint::from_bits(ecn as u8)),
                contents: part,
                segment_size: transmit.segment_size.filter(|len| *len < part.len()),
                src_ip: transmit.src_ip,
            });
            // If there is room for the first part only, the second is lost.
            if number == 0 {
                sent?;
            }
        }
        Ok(())
    }
}

/// What came for one connection and waits for its task.
#[derive(Default)]
struct Inbox {
    events: Mutex<Vec<ConnectionEvent>>,
    changed: Notify,
}

impl Inbox {
    /// Moves `events` in; returns how many found no room.
    fn push(&self, events: &mut Vec<ConnectionEvent>, max: usize) -> usize {
        let mut waiting = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let room = max.saturating_sub(waiting.len());
        let dropped = events.len().saturating_sub(room);
        waiting.extend(events.drain(..).take(room));
        drop(waiting);
        self.changed.notify_one();
        dropped
    }
}

/// A link's end of the socket. The endpoint forgets the connection when this is dropped.
pub(crate) struct Wire {
    socket: Arc<Socket>,
    inbox: Arc<Inbox>,
    handle: ConnectionHandle,
    /// Not bounded, but a link says little: an event or so for each event of its inbox, and the
    /// endpoint looks here before it receives more.
    endpoint: mpsc::UnboundedSender<(ConnectionHandle, EndpointEvent)>,
    drained: bool,
}

impl Wire {
    pub(super) fn segments_max(&self) -> usize {
        self.socket.segments_max()
    }

    pub(super) fn take_events(&self, events: &mut Vec<ConnectionEvent>) {
        let mut waiting = self
            .inbox
            .events
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if events.is_empty() {
            std::mem::swap(&mut *waiting, events); // Both keep their capacity.
        } else {
            events.append(&mut waiting);
        }
    }

    pub(super) async fn changed(&self) {
        self.inbox.changed.notified().await;
    }

    pub(super) fn tell_endpoint(&mut self, event: EndpointEvent) {
        self.drained |= event.is_drained();
        self.endpoint.send((self.handle, event)).ok(); // It ended, and all with it.
    }

    pub(super) fn send(&self, transmit: &Transmit, buffer: &[u8]) -> io::Result<()> {
        self.socket.send(transmit, buffer)
    }

    pub(super) async fn writable(&self) {
        self.socket.writable().await;
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if !self.drained {
            self.tell_endpoint(EndpointEvent::drained());
        }
    }
}

/// Gives each datagram to the connection for which it is.
pub(crate) struct Endpoint {
    buffers: Buffers,
    connections: Connections,
    events: mpsc::UnboundedReceiver<(ConnectionHandle, EndpointEvent)>,
    /// For the links to come.
    to_events: Option<mpsc::UnboundedSender<(ConnectionHandle, EndpointEvent)>>,
}

impl Endpoint {
    /// `dropped` counts datagrams for links that did not keep up.
    pub(crate) fn new(
        socket: Arc<Socket>,
        config: EndpointConfig,
        server: Option<ServerConfig>,
        dropped: Arc<AtomicU64>,
    ) -> Self {
        let (to_events, events) = mpsc::unbounded_channel();
        let allow_mtud = !socket.offload.may_fragment();
        let protocol = Protocol::new(Arc::new(config), server.map(Arc::new), allow_mtud, None);
        let connections = Connections {
            protocol,
            socket,
            inboxes: HashMap::new(),
            incoming: VecDeque::new(),
            for_link: Vec::new(),
            answer: Vec::new(),
            dropped,
        };
        Self {
            buffers: Buffers::default(),
            connections,
            events,
            to_events: Some(to_events),
        }
    }

    /// Makes the one connection of this endpoint, which lives as long as that.
    pub(crate) fn connect(
        mut self,
        config: ClientConfig,
        remote: SocketAddr,
        server_name: &str,
    ) -> Result<(QuicLink, Wire), ConnectError> {
        let protocol = &mut self.connections.protocol;
        let (handle, connection) = protocol.connect(Instant::now(), config, remote, server_name)?;
        let wire = self.wire(handle).ok_or(ConnectError::EndpointStopping)?;
        self.to_events = None;
        // Ends with the wire.
        tokio::spawn(async move { while self.next(|_, meta| meta.len).await.is_some() {} });
        Ok((QuicLink::new(connection), wire))
    }

    /// Serves all connections until somebody asks for a new one. `sort` takes out what is not QUIC
    /// and returns how many bytes it left. `None`: all links are gone, and there can be no more.
    pub(crate) async fn next(
        &mut self,
        mut sort: impl FnMut(&mut [u8], &RecvMeta) -> usize,
    ) -> Option<Incoming> {
        let connections = &mut self.connections;
        loop {
            if let Some(incoming) = connections.incoming.pop_front() {
                return Some(incoming);
            }
            let socket = connections.socket.clone();
            tokio::select! {
                biased;
                event = self.events.recv() => {
                    let (handle, event) = event?;
                    connections.handle_event(handle, event);
                }
                received = socket.receive(&mut self.buffers) => match received {
                    Ok(received) => {
                        let mut bytes = 0;
                        for (buffer, meta) in self.buffers.iter_mut(received) {
                            bytes += meta.len;
                            let len = sort(buffer, meta);
                            let datagrams = buffer.get(..len).unwrap_or_default();
                            connections.handle_datagrams(datagrams, meta);
                        }
                        if bytes >= GIVE_WAY_BYTES {
                            give_way().await;
                        }
                    }
                    Err(error) => {
                        tracing::debug!(%error, "cannot receive");
                        time::sleep(ERROR_PAUSE).await;
                    }
                }
            }
        }
    }

    pub(crate) fn accept(
        &mut self,
        incoming: Incoming,
        config: Arc<ServerConfig>,
    ) -> Result<(QuicLink, Wire), ConnectionError> {
        let Connections {
            protocol, answer, ..
        } = &mut self.connections;
        match protocol.accept(incoming, Instant::now(), answer, Some(config)) {
            Ok((handle, connection)) => {
                let wire = self.wire(handle).ok_or(ConnectionError::LocallyClosed)?;
                Ok((QuicLink::new(connection), wire))
            }
            Err(refused) => {
                self.connections.send_answer(refused.response.as_ref());
                Err(refused.cause)
            }
        }
    }

    /// Asks who wants a connection to show that he receives what is sent to him (RFC 9000 §8.1.2).
    pub(crate) fn retry(&mut self, incoming: Incoming) {
        let Connections {
            protocol, answer, ..
        } = &mut self.connections;
        // Fails for those that have shown it, which nobody asks.
        let transmit = protocol.retry(incoming, answer).ok();
        self.connections.send_answer(transmit.as_ref());
    }

    /// Not a byte for what may be a flood.
    pub(crate) fn ignore(&mut self, incoming: Incoming) {
        self.connections.protocol.ignore(incoming);
    }

    fn wire(&mut self, handle: ConnectionHandle) -> Option<Wire> {
        let endpoint = self.to_events.clone()?;
        let inbox = Arc::new(Inbox::default());
        self.connections.inboxes.insert(handle, inbox.clone());
        Some(Wire {
            socket: self.connections.socket.clone(),
            inbox,
            handle,
            endpoint,
            drained: false,
        })
    }
}

struct Connections {
    protocol: Protocol,
    socket: Arc<Socket>,
    inboxes: HashMap<ConnectionHandle, Arc<Inbox>>,
    /// Who wants a connection; `INCOMING_MAX` at most.
    incoming: VecDeque<Incoming>,
    /// On its way to one inbox.
    for_link: Vec<ConnectionEvent>,
    answer: Vec<u8>,
    dropped: Arc<AtomicU64>,
}

impl Connections {
    fn handle_event(&mut self, handle: ConnectionHandle, event: EndpointEvent) {
        if event.is_drained() {
            self.inboxes.remove(&handle);
        }
        let answer = self.protocol.handle_event(handle, event);
        if let (Some(answer), Some(inbox)) = (answer, self.inboxes.get(&handle)) {
            inbox.push(&mut vec![answer], usize::MAX); // New ids; as many as are retired.
        }
    }

    fn handle_datagrams(&mut self, datagrams: &[u8], meta: &RecvMeta) {
        let mut rest = BytesMut::from(datagrams); // One allocation for all of them.
        let (now, stride) = (Instant::now(), meta.stride.max(1));
        let ecn = meta
            .ecn
            .and_then(|ecn| quinn_proto::EcnCodepoint::from_bits(ecn as u8));
        let mut link = None;
        while !rest.is_empty() {
            let datagram = rest.split_to(stride.min(rest.len()));
            self.answer.clear();
            let event =
                self.protocol
                    .handle(now, meta.addr, meta.dst_ip, ecn, datagram, &mut self.answer);
            match event {
                Some(DatagramEvent::ConnectionEvent(handle, event)) => {
                    if let Some(other) = link.filter(|link| *link != handle) {
                        self.hand_over(other);
                    }
                    link = Some(handle);
                    self.for_link.push(event);
                }
                Some(DatagramEvent::NewConnection(incoming)) => {
                    if self.incoming.len() < INCOMING_MAX {
                        self.incoming.push_back(incoming);
                    } else {
                        self.protocol.ignore(incoming);
                    }
                }
                Some(DatagramEvent::Response(answer)) => self.send_answer(Some(&answer)),
                None => {}
            }
        }
        if let Some(link) = link {
            self.hand_over(link);
        }
    }

    fn hand_over(&mut self, link: ConnectionHandle) {
        match self.inboxes.get(&link) {
            Some(inbox) => {
                let dropped = inbox.push(&mut self.for_link, INBOX_MAX);
                self.dropped.fetch_add(dropped as u64, Relaxed);
            }
            None => self.for_link.clear(), // Just gone.
        }
    }

    fn send_answer(&mut self, answer: Option<&Transmit>) {
        if let Some(answer) = answer {
            // Lost, as on any path: whoever asked asks again.
            self.socket.send(answer, &self.answer).ok();
        }
        self.answer.clear();
    }
}
