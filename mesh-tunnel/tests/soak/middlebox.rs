//! Something between two nodes that loses and delays packets, so that others overtake them, and
//! changes ports as a NAT does after a restart.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    fmt, io,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::Scope,
    time::{Duration, Instant},
};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use crate::harness::{Lab, Node, Side, run};

/// The share of packets that vanish.
const LOSS: f64 = 0.005;

/// The share of packets that others overtake, and how late those are at most: far less than the replay
/// window of 8,128 packets at any rate that is reached here.
const DELAYED: f64 = 0.05;
const DELAY_MAX: Duration = Duration::from_millis(30);

/// How often a thread looks up from a socket where nothing comes.
const PATIENCE: Duration = Duration::from_millis(4);

/// It has a socket in each namespace: what comes by one leaves by the other.
pub(crate) struct Middlebox {
    /// In B's namespace.
    facing_a: Arc<UdpSocket>,
    /// In A's namespace.
    facing_b: Mutex<Arc<UdpSocket>>,
    /// The nodes, by addresses that never change.
    a: SocketAddr,
    b: SocketAddr,
    passed: AtomicU64,
    delayed: AtomicU64,
    lost: AtomicU64,
}

impl Middlebox {
    pub(crate) fn new(lab: &Lab, a: &Node, b: &Node) -> Self {
        for (side, address) in [(Side::A, "198.51.100.1/24"), (Side::B, "198.51.100.2/24")] {
            run(&format!(
                "ip -n {} addr add {address} dev eth0",
                lab.name(side)
            ));
        }
        Self {
            facing_a: bind(lab, Side::B, "198.51.100.2:0"),
            facing_b: Mutex::new(bind(lab, Side::A, "198.51.100.1:0")),
            a: SocketAddr::from(([198, 51, 100, 1], a.tunnel.port())),
            b: SocketAddr::from(([198, 51, 100, 2], b.tunnel.port())),
            passed: AtomicU64::new(0),
            delayed: AtomicU64::new(0),
            lost: AtomicU64::new(0),
        }
    }

    /// Where `side` sends to reach the other one.
    pub(crate) fn address(&self, side: Side) -> SocketAddr {
        match side {
            Side::A => self.facing_a.local_addr().unwrap(),
            Side::B => self.facing_b().local_addr().unwrap(),
        }
    }

    pub(crate) fn rebind(&self, lab: &Lab) {
        *self.facing_b.lock().unwrap() = bind(lab, Side::A, "198.51.100.1:0");
    }

    fn facing_b(&self) -> Arc<UdpSocket> {
        Arc::clone(&self.facing_b.lock().unwrap())
    }

    pub(crate) fn start<'s>(&'s self, scope: &'s Scope<'s, '_>, stop: &'s AtomicBool, seed: u64) {
        scope.spawn(move || {
            let from = || Arc::clone(&self.facing_a);
            self.carry(stop, seed, from, |datagram| {
                self.facing_b().send_to(datagram, self.b)
            });
        });
        scope.spawn(move || {
            self.carry(
                stop,
                !seed,
                || self.facing_b(),
                |datagram| self.facing_a.send_to(datagram, self.a),
            );
        });
    }

    fn carry(
        &self,
        stop: &AtomicBool,
        seed: u64,
        from: impl Fn() -> Arc<UdpSocket>,
        to: impl Fn(&[u8]) -> io::Result<usize>,
    ) {
        let mut random = StdRng::seed_from_u64(seed);
        let mut late = BinaryHeap::new();
        let mut buffer = [0; 2048];
        let pass = |datagram: &[u8]| {
            let passed = to(datagram).is_ok();
            let count = if passed { &self.passed } else { &self.lost };
            count.fetch_add(1, Relaxed);
        };
        while !stop.load(Relaxed) {
            if let Ok(len) = from().recv(&mut buffer) {
                let datagram = &buffer[..len];
                let fate: f64 = random.random();
                if fate < LOSS {
                    self.lost.fetch_add(1, Relaxed);
                } else if fate < LOSS + DELAYED {
                    let due = Instant::now() + DELAY_MAX.mul_f64(random.random());
                    late.push(Reverse((due, datagram.to_vec())));
                    self.delayed.fetch_add(1, Relaxed);
                } else {
                    pass(datagram);
                }
            }
            let now = Instant::now();
            while late.peek().is_some_and(|Reverse((due, ..))| *due <= now) {
                if let Some(Reverse((_, datagram))) = late.pop() {
                    pass(&datagram);
                }
            }
        }
    }
}

fn bind(lab: &Lab, side: Side, address: &str) -> Arc<UdpSocket> {
    let socket = lab.on(side, || UdpSocket::bind(address).unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    Arc::new(socket)
}

impl fmt::Display for Middlebox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [passed, delayed, lost] =
            [&self.passed, &self.delayed, &self.lost].map(|count| count.load(Relaxed));
        write!(
            f,
            "middlebox: {passed} datagrams passed, {delayed} of them late; {lost} lost"
        )
    }
}
