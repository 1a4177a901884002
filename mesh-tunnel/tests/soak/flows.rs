//! Traffic whose every byte is known to both ends.

use std::{
    fmt,
    hash::{DefaultHasher, Hasher as _},
    io::{self, Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, Scope},
    time::{Duration, Instant},
};

use mesh_linux::udp::{Ecn, IpFields, UdpPair};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use crate::harness::{Lab, PATIENCE, Side};

/// Of each long TCP flow. Four of them, and what the datagrams take, leave most of a core to others.
const BULK_BYTES_PER_SECOND: f64 = 5e6;

/// Most bytes in one write of a long flow, and of a short flow as a whole.
const CHUNK_MAX: usize = 128 << 10;
const SHORT_MAX: usize = 256 << 10;

/// Between two bursts of a UDP flow, and most datagrams of one.
const BURST_EVERY: Duration = Duration::from_millis(10);
const BURST_MAX: usize = 16;

/// Largest payload at the overlay's MTU of 1280 behind IPv6 and UDP headers, and of a datagram that
/// goes as fragments.
const UNFRAGMENTED: usize = 1232;
const FRAGMENTED: usize = 8000;

/// A datagram that comes so many behind the newest of its flow would not be recognised as a copy: a
/// minute's worth.
const WINDOW: usize = 1 << 16;

/// How long what is on its way takes at most.
const LINGER: Duration = Duration::from_secs(1);

/// What arrived, and how much of what was sent.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    tcp_bytes: AtomicU64,
    short_flows: AtomicU64,
    longest_silence_ms: AtomicU64,
    udp_sent: AtomicU64,
    udp_received: AtomicU64,
    udp_overtaken: AtomicU64,
}

impl Totals {
    pub(crate) fn udp_lost(&self) -> f64 {
        let [sent, received] = [&self.udp_sent, &self.udp_received].map(|it| it.load(Relaxed));
        #[expect(clippy::cast_precision_loss, reason = "far below 2⁵³")]
        let share = 1.0 - received as f64 / sent.max(1) as f64;
        share
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "TCP {} MB, longest silence {} ms; {} short flows; UDP {} of {} datagrams ({:.2} % lost), {} overtaken",
            self.tcp_bytes.load(Relaxed) / 1_000_000,
            self.longest_silence_ms.load(Relaxed),
            self.short_flows.load(Relaxed),
            self.udp_received.load(Relaxed),
            self.udp_sent.load(Relaxed),
            self.udp_lost() * 100.0,
            self.udp_overtaken.load(Relaxed),
        )
    }
}

/// Sets a flag at the end of a scope, also by a panic: when one thread fails, all end.
pub(crate) struct SetAtEnd<'a>(pub(crate) &'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Starts all flows: a long TCP flow, short ones one after the other, and a UDP flow, in each family
/// and direction.
pub(crate) fn start<'s>(
    scope: &'s Scope<'s, '_>,
    lab: &'s Lab,
    totals: &'s Totals,
    stop: &'s AtomicBool,
) {
    for (number, (from, v6)) in [Side::A, Side::B]
        .into_iter()
        .flat_map(|from| [(from, false), (from, true)])
        .enumerate()
    {
        let to = from.other();
        let ip: IpAddr = if v6 {
            to.overlay_v6().into()
        } else {
            to.overlay_v4()
        };
        let seed = number as u64 + 1;
        let inside = move |side, work: Box<dyn FnOnce() + Send + 's>| {
            scope.spawn(move || {
                let _stop = SetAtEnd(stop);
                lab.on(side, work);
            });
        };
        let [long, short] = [(); 2].map(|()| lab.on(to, || TcpListener::bind((ip, 0)).unwrap()));
        let [long_at, short_at] = [&long, &short].map(|it| it.local_addr().unwrap());
        inside(to, Box::new(move || receive_long(&long, seed, totals)));
        inside(from, Box::new(move || send_long(long_at, seed, stop)));
        let done = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&done);
        inside(to, Box::new(move || answer_short(&short, &asked)));
        inside(
            from,
            Box::new(move || {
                let _done = SetAtEnd(&done);
                send_short(short_at, seed, totals, stop);
            }),
        );
        let socket = lab.on(to, || UdpSocket::bind((ip, 0)).unwrap());
        let at = socket.local_addr().unwrap();
        inside(
            to,
            Box::new(move || receive_datagrams(&socket, seed, totals, stop)),
        );
        inside(
            from,
            Box::new(move || send_datagrams(at, seed, totals, stop)),
        );
    }
}

/// Bytes that a seed determines and that repeat nowhere.
struct Bytes {
    state: u64,
    word: [u8; 8],
    used: usize,
}

impl Bytes {
    fn new(seed: u64) -> Self {
        Self {
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            word: [0; 8],
            used: 8,
        }
    }

    fn fill(&mut self, to: &mut [u8]) {
        for byte in to {
            if self.used == self.word.len() {
                // xorshift64 (Marsaglia 2003).
                self.state ^= self.state << 13;
                self.state ^= self.state >> 7;
                self.state ^= self.state << 17;
                self.word = self.state.to_le_bytes();
                self.used = 0;
            }
            *byte = self.word[self.used];
            self.used += 1;
        }
    }
}

fn call(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&to, PATIENCE).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn send_long(to: SocketAddr, seed: u64, stop: &AtomicBool) {
    let (mut stream, mut bytes) = (call(to), Bytes::new(seed));
    let mut random = StdRng::seed_from_u64(seed);
    let mut chunk = vec![0; CHUNK_MAX];
    while !stop.load(Relaxed) {
        let len = random.random_range(1..=CHUNK_MAX);
        bytes.fill(&mut chunk[..len]);
        stream.write_all(&chunk[..len]).unwrap();
        #[expect(clippy::cast_precision_loss, reason = "far below 2⁵³")]
        let pause = len as f64 / BULK_BYTES_PER_SECOND;
        thread::sleep(Duration::from_secs_f64(pause));
    }
}

fn receive_long(listener: &TcpListener, seed: u64, totals: &Totals) {
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut expected = Bytes::new(seed);
    let mut chunks = [vec![0; CHUNK_MAX], vec![0; CHUNK_MAX]];
    let mut last = Instant::now();
    loop {
        let [came, right] = &mut chunks;
        let len = stream.read(came).expect("a long flow stands still");
        if len == 0 {
            return;
        }
        let silence = last.elapsed().as_millis().try_into().unwrap();
        totals.longest_silence_ms.fetch_max(silence, Relaxed);
        last = Instant::now();
        expected.fill(&mut right[..len]);
        assert!(came[..len] == right[..len], "flow {seed}: other bytes");
        totals.tcp_bytes.fetch_add(len as u64, Relaxed);
    }
}

fn hash(bytes: &[u8]) -> [u8; 8] {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish().to_be_bytes()
}

/// One connection after the other: some bytes there, their hash back.
fn send_short(to: SocketAddr, seed: u64, totals: &Totals, stop: &AtomicBool) {
    let (mut bytes, mut random) = (Bytes::new(!seed), StdRng::seed_from_u64(!seed));
    let mut message = vec![0; SHORT_MAX];
    while !stop.load(Relaxed) {
        let len = random.random_range(0..=SHORT_MAX) >> random.random_range(0..16);
        bytes.fill(&mut message[..len]);
        let mut stream = call(to);
        stream.write_all(&message[..len]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = [0; 8];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, hash(&message[..len]), "{len} bytes");
        totals.tcp_bytes.fetch_add(len as u64, Relaxed);
        totals.short_flows.fetch_add(1, Relaxed);
        thread::sleep(Duration::from_millis(random.random_range(0..100)));
    }
}

fn answer_short(listener: &TcpListener, done: &AtomicBool) {
    listener.set_nonblocking(true).unwrap();
    let mut message = Vec::with_capacity(SHORT_MAX);
    while !done.load(Relaxed) {
        let mut stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                thread::sleep(Duration::from_millis(2));
                continue;
            }
            Err(error) => panic!("accept: {error}"),
        };
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        message.clear();
        stream.read_to_end(&mut message).unwrap();
        stream.write_all(&hash(&message)).unwrap();
    }
}

/// Bursts of datagrams of one length, which the kernel hands over as one, and single ones that
/// have to be fragmented. Each begins with its number.
fn send_datagrams(to: SocketAddr, seed: u64, totals: &Totals, stop: &AtomicBool) {
    let (socket, mut random) = (UdpPair::bind(0).unwrap(), StdRng::seed_from_u64(seed));
    let mut burst = vec![0; BURST_MAX * FRAGMENTED];
    let mut next = 0_u64;
    while !stop.load(Relaxed) {
        let (count, len) = if random.random_bool(0.05) {
            (1, random.random_range(UNFRAGMENTED..=FRAGMENTED))
        } else {
            let count = random.random_range(1..=BURST_MAX);
            (count, random.random_range(8..=UNFRAGMENTED))
        };
        let burst = &mut burst[..count * len];
        for (number, datagram) in (next..).zip(burst.chunks_mut(len)) {
            write_datagram(seed, number, datagram);
        }
        next += count as u64;
        totals.udp_sent.fetch_add(count as u64, Relaxed);
        // What the kernel has no room for is lost like anything else.
        let fields = IpFields {
            ecn: Ecn::Capable0,
            ..IpFields::default()
        };
        socket.send(to, burst, len, fields).ok();
        thread::sleep(BURST_EVERY);
    }
}

fn write_datagram(seed: u64, number: u64, datagram: &mut [u8]) {
    let (head, rest) = datagram.split_first_chunk_mut::<8>().unwrap();
    *head = number.to_be_bytes();
    Bytes::new(seed << 48 ^ number).fill(rest);
}

fn receive_datagrams(socket: &UdpSocket, seed: u64, totals: &Totals, stop: &AtomicBool) {
    socket.set_read_timeout(Some(LINGER)).unwrap();
    let (mut came, mut right) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    let mut seen = vec![u64::MAX; WINDOW];
    let mut newest = 0;
    loop {
        let Ok(len) = socket.recv(&mut came) else {
            if stop.load(Relaxed) {
                return;
            }
            continue;
        };
        let number = u64::from_be_bytes(*came.first_chunk().unwrap());
        write_datagram(seed, number, &mut right[..len]);
        assert!(
            came[..len] == right[..len],
            "datagram {number}: other bytes"
        );
        let place = &mut seen[usize::try_from(number).unwrap() % WINDOW];
        assert_ne!(*place, number, "a datagram came twice");
        *place = number;
        totals.udp_received.fetch_add(1, Relaxed);
        if number < newest {
            totals.udp_overtaken.fetch_add(1, Relaxed);
        }
        newest = newest.max(number);
    }
}
