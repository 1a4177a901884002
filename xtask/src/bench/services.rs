//! Ways from a pod by a service's address to a pod on the same node: Holdfast's at the socket and by packets, each by the
//! node's stack and past it, what
//! kube-proxy programs, a proxy process; beside the direct way to the endpoint, all in turns within each round.
//!
//! What is measured, each by a client that asks one thing after the other (`services-bench`, `src/client.rs`):
//!
//! | metric | what it is |
//! |---|---|
//! | `connect_p50`, `connect_p99` | how long the system call `connect` takes, TCP; not of a proxy process, which accepts before it has an endpoint |
//! | `first_byte_p50`, `first_byte_p99` | from the beginning of `connect` until the answer to one byte, which is one byte |
//! | `rtt_p50`, `rtt_p99` | 64 bytes and as many back on an open connection |
//! | `udp_p50`, `udp_p99` | a new UDP socket's `connect`, 64 bytes and as many back: what a resolver does for each name |
//! | `tcp_1` | one stream of 128 KiB writes, until its receiver said how much came |
//! | `cpu_per_gb` | for how long the machine's processors worked during it (both ends, the kernel's packet work, and everybody else), for 10⁹ bytes |
//! | `load` | from nothing until the kernel has all services, once |
//! | `one_change`, `one_change_max` | from a snapshot in which one endpoint of 250,000 is not ready any more, or again, until the maps are as it says: the core's table and the loader's `apply`; median and highest of 51 |
//! | `last_flow`, `last_flow_max` | how long after the path to an endpoint died new flows still go there, with real agents: from the first connect without an answer until the last, 5 ms apart; median and highest of 5 |
//! | `map_memory` | what the kernel accounts all of Holdfast's maps at with those 250,000, those of the packet level too |

mod cases;
mod client;
mod cluster;
mod dead;
mod world;

use std::{
    hash::{BuildHasher as _, RandomState},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

#[cfg(test)]
pub(super) use self::cases::is_case;
pub(super) use self::cases::is_other;
use self::{
    cases::{CASES, CHANGE, Case, DEAD_PATH, Kind},
    client::Flow,
    world::{Way, World},
};
use super::{Figure, Options, Samples, percentile, verdict};
use crate::{report, setup};

/// A round goes through all cases so often: what disturbs the machine for a second disturbs all of them, and ratios are
/// those of one turn.
const TURNS: usize = 40;

/// Samples of each kind in a turn: 2,000 a round, of which the 99th percentile is the 20th longest.
const SAMPLES: usize = 50;

/// A round goes through all cases so often again, with a stream each.
const STREAM_TURNS: usize = 24;

/// Length of a stream: 6 s a round. The kernel says idle times in units of 10 ms for each processor.
const STREAM: Duration = Duration::from_millis(250);

/// What a client does again and again, and the names of its median and of its 99th percentile.
const REPEATED: [(&str, [&str; 2]); 4] = [
    ("connect", ["connect_p50", "connect_p99"]),
    ("first_byte", ["first_byte_p50", "first_byte_p99"]),
    ("round_trip", ["rtt_p50", "rtt_p99"]),
    ("datagram", ["udp_p50", "udp_p99"]),
];

/// What all ratios are to.
pub(super) const BASELINE: &str = "direct";

/// Refuses names of cases that there are not.
///
/// # Errors
///
/// With the names that there are.
pub(super) fn check(options: &Options) -> Result<()> {
    ensure!(
        options.peers.is_empty(),
        "bench services has no --peers: choose cases by --only"
    );
    cases::choose(&options.only).map(drop)
}

/// A case that is up, and what it came to in this round.
struct Running {
    case: &'static Case,
    way: Way,
    /// As [`REPEATED`], in nanoseconds.
    times: [Vec<u64>; REPEATED.len()],
    flows: Vec<Flow>,
    broken: bool,
}

/// Fills all tables, which takes `nft` most of a minute, and measures every case in each round.
///
/// A case that cannot be measured is told by name, and left out from then on. That another program's cannot is no
/// failure of the bench; that one of our own cannot is.
///
/// # Errors
///
/// If the lab does not come up.
pub(super) fn run(options: &Options, samples: &mut Samples) -> Result<bool> {
    let chosen = cases::choose(&options.only)?;
    let world = World::new(&options.bins)?;
    let mut running = Vec::new();
    for &case in chosen.iter().filter(|case| case.kind.is_way()) {
        eprintln!("setting up {}", case.name);
        match get(case, samples).and_then(|()| world.way(case)) {
            Ok(way) => {
                if let Some(load) = way.load {
                    samples.add(case.name, "load", "ms", load.as_secs_f64() * 1e3);
                }
                running.push(Running::new(case, way));
            }
            Err(error) => samples.error(case.name, &error.context("set up")),
        }
    }
    let change = chosen.iter().find(|case| case.kind == Kind::Change);
    turns(&mut running, 1, Running::ask, samples);
    for one in &mut running {
        one.tell(&mut Samples::default()); // Nobody wants to know how it is before it is warm.
    }
    for round in 1..=options.rounds {
        eprintln!("round {round} of {}", options.rounds);
        turns(&mut running, TURNS, Running::ask, samples);
        turns(&mut running, STREAM_TURNS, Running::stream, samples);
        for one in &mut running {
            one.tell(samples);
        }
        if let Some(case) = change {
            match world.change(case) {
                Ok(changes) => tell_changes(case, &changes, samples)?,
                Err(error) => samples.error(case.name, &error),
            }
        }
    }
    drop((running, world)); // Agents that have to be quick are not kept waiting by others.
    if let Some(case) = chosen.iter().find(|case| case.kind == Kind::DeadPath) {
        eprintln!("cutting paths");
        match dead::measure(&options.bins) {
            Ok(times) => tell_deaths(case, times, samples)?,
            Err(error) => samples.error(case.name, &error),
        }
    }
    Ok(samples.errors().all(|(case, _)| is_other(case)))
}

/// Each turn has an order of its own: what a case finds of the one before in caches is in nobody's favour. Those that
/// cannot be measured any more are gone then.
fn turns(
    running: &mut Vec<Running>,
    count: usize,
    turn: fn(&mut Running) -> Result<()>,
    samples: &mut Samples,
) {
    for _ in 0..count {
        let chance = RandomState::new();
        let mut order: Vec<_> = running.iter_mut().collect();
        order.sort_by_cached_key(|one| chance.hash_one(one.case.name));
        for one in order {
            if let Err(error) = turn(one) {
                samples.error(one.case.name, &error);
                one.broken = true;
            }
        }
        running.retain(|one| !one.broken);
    }
}

impl Running {
    fn new(case: &'static Case, way: Way) -> Self {
        Self {
            case,
            way,
            times: Default::default(),
            flows: Vec::new(),
            broken: false,
        }
    }

    fn ask(&mut self) -> Result<()> {
        let Way {
            client, addresses, ..
        } = &mut self.way;
        for ((verb, _), times) in REPEATED.iter().zip(&mut self.times) {
            if self.case.kind.does(verb) {
                times.extend(client.times(verb, addresses, SAMPLES)?);
            }
        }
        Ok(())
    }

    fn stream(&mut self) -> Result<()> {
        let way = &mut self.way;
        self.flows.push(way.client.bulk(&way.addresses, STREAM)?);
        Ok(())
    }

    /// Notes the round's figures, and forgets them.
    fn tell(&mut self, samples: &mut Samples) {
        let case = self.case.name;
        for ((_, [median, high]), times) in REPEATED.iter().zip(&mut self.times) {
            let turns = times.chunks_mut(SAMPLES).filter_map(|turn| {
                turn.sort_unstable();
                percentile(turn, 0.5).map(microseconds)
            });
            let turns = turns.collect();
            times.sort_unstable();
            for (metric, share) in [(median, 0.5), (high, 0.99)] {
                if let Some(nanoseconds) = percentile(times, share) {
                    samples.add(case, metric, "µs", microseconds(nanoseconds));
                }
            }
            samples.add_turns(case, median, turns);
            times.clear();
        }
        let flows = std::mem::take(&mut self.flows);
        let all = flows.iter().copied().reduce(Flow::and);
        let mut note = |metric, unit, of: fn(&Flow) -> f64| {
            if let Some(all) = &all {
                samples.add(case, metric, unit, of(all));
            }
            samples.add_turns(case, metric, flows.iter().map(of).collect());
        };
        note("tcp_1", "Mb/s", Flow::mbit_per_s);
        note("cpu_per_gb", "s", Flow::busy_s_per_gb);
    }
}

fn microseconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e3
}

fn tell_changes(case: &Case, changes: &world::Changes, samples: &mut Samples) -> Result<()> {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let [median, max] = [0.5, 1.0].map(|share| percentile(&changes.changes, share));
    let median = median.context("no change was made")?;
    samples.add(case.name, "one_change", "ms", ms(median));
    samples.add(case.name, "one_change_max", "ms", ms(max.unwrap_or(median)));
    samples.add(case.name, "load", "ms", ms(changes.load));
    let kib = changes.map_memory_bytes as f64 / 1_024.0;
    samples.add(case.name, "map_memory", "KiB", kib);
    Ok(())
}

fn tell_deaths(case: &Case, mut times: Vec<Duration>, samples: &mut Samples) -> Result<()> {
    times.sort_unstable();
    for (metric, share) in [("last_flow", 0.5), ("last_flow_max", 1.0)] {
        let time = percentile(&times, share).context("no path died")?;
        samples.add(case.name, metric, "ms", time.as_secs_f64() * 1e3);
    }
    Ok(())
}

/// Installs what a case needs of other programs, and notes what they say of themselves.
fn get(case: &Case, samples: &mut Samples) -> Result<()> {
    let (program, package, word) = match case.kind {
        Kind::Nftables(_) => ("nft", "nftables", "--version"),
        Kind::Iptables(_) => ("iptables-restore", "iptables", "--version"),
        Kind::Haproxy => ("haproxy", "haproxy", "-v"),
        Kind::Direct
        | Kind::Sockets(_)
        | Kind::Sockmap(_)
        | Kind::Redirect(_)
        | Kind::Packets(_)
        | Kind::PacketsRedirect(_)
        | Kind::DevicesRedirect(_)
        | Kind::Change
        | Kind::DeadPath => return Ok(()),
    };
    setup::install(&[(program, package)])?;
    let said = super::said(program, &[word]);
    samples.version(case.name, said.lines().next().unwrap_or_default());
    Ok(())
}

/// The columns of [`overview`]: a heading, the metrics in it, what their figures are divided by, and whether
/// there is a ratio to the direct way's first of them.
const COLUMNS: &[(&str, &[&str], f64, bool)] = &[
    ("connect, µs", &["connect_p50", "connect_p99"], 1.0, true),
    (
        "first byte, µs",
        &["first_byte_p50", "first_byte_p99"],
        1.0,
        true,
    ),
    ("RTT 64 B, µs", &["rtt_p50", "rtt_p99"], 1.0, true),
    ("UDP, µs", &["udp_p50", "udp_p99"], 1.0, true),
    ("TCP, Gb/s", &["tcp_1"], 1e3, true),
    ("CPU, s/GB", &["cpu_per_gb"], 1.0, true),
    ("load, ms", &["load"], 1.0, false),
];

/// Medians, a case a line, times as 50 %/99 %, above them the ratio to the direct way; and what a change takes.
pub(super) fn overview(figures: &[Figure]) -> String {
    let (ways, changes): (Vec<_>, Vec<_>) = figures
        .iter()
        .cloned()
        .partition(|figure| figure.case != CHANGE && figure.case != DEAD_PATH);
    // Not in the order of the figures: the tables' loading is the first that is known.
    let known = CASES.iter().map(|case| case.name);
    let names = known.filter(|name| ways.iter().any(|figure| figure.case == *name));
    let find = |case: &str, metric: &str| {
        let mut of = ways.iter().filter(|figure| figure.case == case);
        of.find(|figure| figure.metric == metric)
    };
    let cell = |case: &str, metrics: &[&str], divisor: f64, with_ratio: bool| {
        let own = metrics.iter().filter_map(|metric| find(case, metric));
        let texts: Vec<_> = own.map(|figure| figure.median_text(divisor)).collect();
        let ratio = metrics.first().and_then(|metric| {
            let (own, direct) = (find(case, metric)?, find(BASELINE, metric)?);
            verdict::in_turns(own, direct)
        });
        let ratio = ratio.map(|ratio| ratio.median);
        match ratio.filter(|_| with_ratio && case != BASELINE) {
            Some(ratio) => format!("× {ratio:.3}\n{}", texts.join("/")),
            None => texts.join("/"),
        }
    };
    let rows = names.map(|name| {
        let cells = COLUMNS
            .iter()
            .map(|(_, metrics, divisor, ratio)| cell(name, metrics, *divisor, *ratio));
        std::iter::once(name.to_owned()).chain(cells).collect()
    });
    let header: Vec<_> = std::iter::once("case")
        .chain(COLUMNS.iter().map(|(heading, ..)| *heading))
        .collect();
    let mut tables = vec![report::table(&header, &rows.collect::<Vec<_>>())];
    if !changes.is_empty() {
        tables.push(super::figure_table(&changes));
    }
    tables.join("\n")
}
