//! Two tunnels under traffic for as long as one likes, while sessions are renewed, paths change and
//! packets are lost, doubled and overtaken. Every byte is checked, and memory must stay flat.
//!
//! `cargo xtask soak` runs it for ten minutes or two hours; as an ordinary test it takes
//! [`SHORT`]. Needs root.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::wildcard_enum_match_arm,
    reason = "tests fail loudly and pick one event of many"
)]

mod flows;
#[allow(dead_code, reason = "the other tests use the rest of it")]
#[path = "../tunnel/harness.rs"]
mod harness;
mod middlebox;

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use flows::{SetAtEnd, Totals};
use harness::{FakeRelay, Lab, Node, RELAY, Side, connect, pair, run};
use mesh_tunnel::{stats::DropReason, tunnel::TunnelEvent};
use mesh_wire::id::Via;
use middlebox::Middlebox;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use rustix::mm::{MlockAllFlags, mlockall};

/// How long, in seconds, if somebody says.
const SECONDS: &str = "HOLDFAST_SOAK_SECONDS";

/// How long otherwise.
const SHORT: Duration = Duration::from_secs(20);

/// The resident memory's median in the last third may exceed that of the middle third by so much. At
/// ten minutes that is a byte for each packet, or 5 KiB for each session.
const GROWTH_MAX_KIB: u64 = 2 << 10;

/// In a shorter run the allocator's arenas still grow.
const MEMORY_JUDGED_FROM: Duration = Duration::from_secs(300);

/// Datagrams that may be missing: addresses vanish for moments, the middlebox loses some, and so does a
/// busy machine. Three times as many as were seen.
const UDP_LOST_MAX: f64 = 0.15;

/// What must never happen, whatever the network does.
const NEVER: [DropReason; 8] = [
    DropReason::MalformedOut,
    DropReason::MalformedIn,
    DropReason::NotWireGuard,
    DropReason::UnknownKey,
    DropReason::BadHandshake,
    DropReason::Unauthentic,
    DropReason::WrongSource,
    DropReason::NoSession,
];

#[test]
fn every_byte_arrives_while_everything_changes() {
    let seconds = std::env::var(SECONDS).ok();
    let time = seconds.map_or(SHORT, |text| Duration::from_secs(text.parse().unwrap()));
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    FakeRelay::join(&a, &b);
    for node in [&a, &b] {
        node.tunnel.set_mtu(1280);
    }
    connect(&a, &b, b.direct_v4(), a.direct_v4());
    // The pools' pages, which would come one burst at a time: what grows after this is no pool.
    mlockall(MlockAllFlags::CURRENT).unwrap();
    let seed = rand::random();
    let middlebox = Middlebox::new(&lab, &a, &b);
    let totals = Totals::default();
    let (stop, close) = (AtomicBool::new(false), AtomicBool::new(false));
    let mut driver = Driver {
        lab: &lab,
        nodes: [&a, &b],
        middlebox: &middlebox,
        random: StdRng::seed_from_u64(seed),
        deck: Vec::new(),
        ways: [(Way::V4, None); 2],
        a_v4: Side::A.underlay_v4(),
        counts: Counts::default(),
        memory_kib: Vec::with_capacity(8192),
    };
    println!("seed {seed}, {} s", time.as_secs());
    thread::scope(|outer| {
        // The last bytes of the flows still need their way.
        let _close = SetAtEnd(&close);
        middlebox.start(outer, &close, seed);
        thread::scope(|scope| {
            let _stop = SetAtEnd(&stop);
            flows::start(scope, &lab, &totals, &stop);
            driver.run(time, &totals, &stop);
        });
    });
    let problems = driver.judge(time, &totals);
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// How one side reaches the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    V4,
    V6,
    Relay,
    Middlebox,
}

/// Something that happens to the tunnels.
#[derive(Debug, Clone, Copy)]
enum Change {
    Handshake,
    BothHandshake,
    Path,
    Address,
    Port,
}

/// How often each happens, of ten times; one every 0.6 s.
const DECK: [Change; 10] = {
    use Change::{Address, BothHandshake, Handshake, Path, Port};
    [
        Handshake,
        Handshake,
        Handshake,
        BothHandshake,
        Path,
        Path,
        Path,
        Path,
        Address,
        Port,
    ]
};

/// What was done.
#[derive(Debug, Default)]
struct Counts {
    handshakes: u64,
    /// Sessions that both sides have proven, as each side told it.
    sessions: [u64; 2],
    path_changes: u64,
    address_changes: u64,
    rebindings: u64,
}

/// Changes everything, at random.
struct Driver<'a> {
    lab: &'a Lab,
    nodes: [&'a Node; 2],
    middlebox: &'a Middlebox,
    random: StdRng,
    deck: Vec<Change>,
    /// Primary and duplicate of each side.
    ways: [(Way, Option<Way>); 2],
    a_v4: IpAddr,
    counts: Counts,
    memory_kib: Vec<u64>,
}

impl Driver<'_> {
    fn run(&mut self, time: Duration, totals: &Totals, stop: &AtomicBool) {
        let start = Instant::now();
        let mut reported = start;
        while start.elapsed() < time && !stop.load(Relaxed) {
            thread::sleep(Duration::from_millis(self.random.random_range(200..1000)));
            match self.draw() {
                Change::Handshake => {
                    let side = self.random_side();
                    self.handshake(&[side]);
                }
                Change::BothHandshake => self.handshake(&[Side::A, Side::B]),
                Change::Path => self.change_path(),
                Change::Address => self.change_address(),
                Change::Port => self.rebind(),
            }
            self.listen();
            self.memory_kib.push(resident_kib());
            if reported.elapsed() > Duration::from_secs(60) {
                reported = Instant::now();
                let (done, memory) = (start.elapsed().as_secs(), resident_kib());
                println!("{done} s: {totals}, {memory} KiB resident");
            }
        }
    }

    /// Cards from a deck, so that every kind of change comes in every run.
    fn draw(&mut self) -> Change {
        if self.deck.is_empty() {
            self.deck.extend(DECK);
        }
        let at = self.random.random_range(0..self.deck.len());
        self.deck.swap_remove(at)
    }

    fn random_side(&mut self) -> Side {
        [Side::A, Side::B][self.random.random_range(0..2)]
    }

    /// By which address `side` reaches the other one.
    fn via(&self, side: Side, way: Way) -> Via {
        let other = self.nodes[side.other() as usize];
        match (way, side) {
            (Way::V4, Side::A) => other.direct_v4(),
            (Way::V4, Side::B) => Via::Direct(SocketAddr::new(self.a_v4, other.tunnel.port())),
            (Way::V6, _) => other.direct_v6(),
            (Way::Relay, _) => Via::Relay(RELAY),
            (Way::Middlebox, side) => Via::Direct(self.middlebox.address(side)),
        }
    }

    /// Tells a side's tunnel by which ways it sends.
    fn set_path(&self, side: Side) {
        let (primary, duplicate) = self.ways[side as usize];
        let [node, other] = [side, side.other()].map(|side| self.nodes[side as usize]);
        let duplicate = duplicate.map(|way| self.via(side, way));
        node.tunnel
            .set_path(&other.id, Some(self.via(side, primary)), duplicate, None);
    }

    fn handshake(&mut self, sides: &[Side]) {
        for &side in sides {
            let (primary, _) = self.ways[side as usize];
            let other = self.nodes[side.other() as usize].id;
            let via = self.via(side, primary);
            self.nodes[side as usize].tunnel.handshake(&other, &[via]);
            self.counts.handshakes += 1;
        }
    }

    fn change_path(&mut self) {
        let mut way = || match self.random.random_range(0..4) {
            0 => Way::V4,
            1 => Way::V6,
            2 => Way::Relay,
            _ => Way::Middlebox,
        };
        let (primary, duplicate) = (way(), way());
        let side = self.random_side();
        let doubled = duplicate != primary && self.random.random_bool(0.3);
        self.ways[side as usize] = (primary, doubled.then_some(duplicate));
        self.set_path(side);
        self.counts.path_changes += 1;
    }

    /// A gets another address; B learns of it after a moment.
    fn change_address(&mut self) {
        let name = self.lab.name(Side::A);
        let next = Ipv4Addr::new(192, 0, 2, self.random.random_range(10..250));
        if self.a_v4 == next {
            return;
        }
        run(&format!("ip -n {name} addr del {}/24 dev eth0", self.a_v4));
        run(&format!("ip -n {name} addr add {next}/24 dev eth0"));
        self.a_v4 = next.into();
        self.pause();
        self.set_path(Side::B);
        self.counts.address_changes += 1;
    }

    /// The middlebox shows A's packets to B from another port, and forgets the old one.
    fn rebind(&mut self) {
        self.middlebox.rebind(self.lab);
        self.pause();
        self.set_path(Side::B);
        self.counts.rebindings += 1;
    }

    fn pause(&mut self) {
        thread::sleep(Duration::from_millis(self.random.random_range(0..300)));
    }

    /// Hears what the tunnels have to say.
    fn listen(&mut self) {
        for (node, sessions) in self.nodes.iter().zip(&mut self.counts.sessions) {
            for event in node.events.try_iter() {
                match event {
                    TunnelEvent::Handshake { .. } => *sessions += 1,
                    // Lines are cut and addresses taken away all the time.
                    TunnelEvent::Wanted(_) | TunnelEvent::Unsendable(_) => {}
                    other => panic!("{:?} says {other:?}", node.side),
                }
            }
        }
    }

    /// Prints what happened; what of it is wrong.
    fn judge(&self, time: Duration, totals: &Totals) -> Vec<String> {
        let mut problems = Vec::new();
        let mut require = |holds: bool, problem: String| {
            if !holds {
                problems.push(problem);
            }
        };
        println!("{totals}");
        println!("{:?}", self.counts);
        println!("{}", self.middlebox);
        for node in self.nodes {
            let drops = node.tunnel.stats().drops;
            for (reason, count) in drops.into_iter().filter(|(_, count)| *count > 0) {
                println!("{:?} dropped {count} {}", node.side, reason.as_str());
                let harmless = !NEVER.contains(&reason);
                require(harmless, format!("{count} {}", reason.as_str()));
            }
        }
        let lost = totals.udp_lost();
        require(lost <= UDP_LOST_MAX, format!("{lost:.3} of UDP is lost"));
        for sessions in self.counts.sessions {
            let few = sessions < self.counts.handshakes / 4;
            require(!few, format!("only {sessions} new sessions"));
        }
        let third = self.memory_kib.len() / 3;
        let part = |from: usize| {
            let mut part = self.memory_kib[from..from + third].to_vec();
            part.sort_unstable();
            part.get(third / 2).copied().unwrap_or_default()
        };
        let [first, middle, last] = [0, third, 2 * third].map(part);
        println!("resident, medians of thirds: {first}, {middle}, {last} KiB");
        let flat = last <= middle + GROWTH_MAX_KIB || time < MEMORY_JUDGED_FROM;
        require(flat, format!("memory grows: {middle} to {last} KiB"));
        problems
    }
}

fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.unwrap().split_whitespace().next();
    number.unwrap().parse().unwrap()
}
