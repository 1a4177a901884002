//! Paths that never let go (issue 6): the real programs behind the lab's NATs, while something happens to their paths.
//!
//! | case | what happens, and what is counted |
//! |---|---|
//! | [`CUT`] | the direct path is cut while traffic flows and a relay is there: `gap`, the longest time in which nothing came, of both directions; `tcp_gap` of a TCP connection beside it; `duplicates` that were delivered; `tcp_broken` |
//! | [`RELAY`] | the relay in use is killed (SIGKILL), another is warm: the same |
//! | [`ADDRESS`] | the node's own address changes: `gap`, `tcp_gap` |
//! | [`UPLINK`] | the cable of its LAN is pulled, and it has a modem with another interface, address and NAT |
//! | [`WAN`] | its site's public address does, which the node cannot see |
//! | [`MATRIX`] | every kind of NAT meets every other for the first time: `answered`, from the first packet to the first answer; `direct`, until both ends are direct; `otherwise`, pairs that did not come to what they can, or gave the wrong reason |
//! | [`LOSSY`] | 10 % of all frames are lost in bursts, round trips take 200 ms, 1 Mb/s: `answered_seconds` in which an echo came back, `gap` of the datagrams, `path_changes`, requests to a service and for its name that had no answer |
//! | [`NARROW`], [`UNFRAGMENTED`] | 1280 bytes fit the underlay, and nobody says so; in the second case fragments do not pass either: bytes of a TCP transfer that did not arrive as they were sent, and its `rate` |
//! | [`IDLE`], [`IDLE_METERED`] | 50 peers with direct paths and nothing to say: bytes a second and packets a minute at the interface, both ways, with all headers; in the second case the only way out costs |
//! | [`SHARE_0`], [`SHARE_1`], [`SHARE_10`] | round trips by a relay while another client sends nothing, its share, ten times its share |
//!
//! Each figure scales with `--rounds`: of five, 50 runs, ten minutes of loss, 100 MB, five minutes of idling. The bad line
//! is waited for beside the pairs, whose gaps are timers, too, once its lab is up; those who idle do so together, beside nobody. How
//! busy the pairs kept the processors is noted.

mod line;
mod pairs;
mod share;

use std::{
    fs,
    path::Path,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Result, anyhow, ensure};
use netns_tests::matrix::{Matrix, Met, markdown};

use self::pairs::{Pairs, What};
use super::{Figure, Options, Samples, choose};

pub(super) const CUT: &str = "direct-cut";
pub(super) const RELAY: &str = "relay-killed";
pub(super) const ADDRESS: &str = "address-change";
pub(super) const WAN: &str = "public-address-change";
pub(super) const UPLINK: &str = "uplink-switch";
pub(super) const MATRIX: &str = "nat-matrix";
pub(super) const LOSSY: &str = "lossy";
pub(super) const NARROW: &str = "mtu-1280";
pub(super) const UNFRAGMENTED: &str = "mtu-1280-no-fragments";
pub(super) const IDLE: &str = "idle-50-peers";
pub(super) const IDLE_METERED: &str = "idle-50-peers-metered";
pub(super) const SHARE_0: &str = "relay-share-0";
pub(super) const SHARE_1: &str = "relay-share-1";
pub(super) const SHARE_10: &str = "relay-share-10";

/// What is measured together.
const CASES: &[&str] = &[
    CUT,
    RELAY,
    ADDRESS,
    WAN,
    UPLINK,
    MATRIX,
    LOSSY,
    NARROW,
    UNFRAGMENTED,
    IDLE,
    IDLE_METERED,
    SHARE,
];

/// These only wait, and are measured beside each other, each in a lab of its own.
const IDLING: [&str; 2] = [IDLE, IDLE_METERED];

/// The three that are measured in turns.
const SHARE: &str = "relay-share";

/// Refuses names of cases that there are not.
///
/// # Errors
///
/// With the names that there are.
pub(super) fn check(options: &Options) -> Result<()> {
    ensure!(
        options.peers.is_empty(),
        "bench paths has no --peers: choose cases by --only"
    );
    chosen(options).map(drop)
}

fn chosen(options: &Options) -> Result<Vec<&'static str>> {
    let cases = choose(CASES, |case| case, &options.only)?;
    Ok(cases.into_iter().copied().collect())
}

/// Whether figures of this name are made.
#[cfg(test)]
pub(super) fn is_case(name: &str) -> bool {
    CASES.contains(&name) || [SHARE_0, SHARE_1, SHARE_10].contains(&name)
}

/// Measures the cases one after the other.
///
/// A case that cannot be measured is told by name.
///
/// # Errors
///
/// Never: what failed is in the samples.
pub(super) fn run(options: &Options, samples: &mut Samples) -> Result<bool> {
    let cases = chosen(options)?;
    let of_pairs = [CUT, RELAY, ADDRESS, WAN];
    let (of_pairs, others): (Vec<_>, Vec<_>) =
        cases.into_iter().partition(|case| of_pairs.contains(case));
    let (waiting, others): (Vec<_>, Vec<_>) = others.into_iter().partition(|case| *case == LOSSY);
    let (idling, others): (Vec<_>, Vec<_>) =
        others.into_iter().partition(|case| IDLING.contains(case));
    beside_waiting(&waiting, options, samples, |samples| {
        if let Some(first) = of_pairs.first() {
            let busy = Busy::now();
            match Pairs::start(&options.bins, false) {
                Ok(pairs) => measure_pairs(&pairs, &of_pairs, options.rounds, samples),
                Err(error) => samples.error("pairs", &error),
            }
            let beside = if waiting.is_empty() {
                "alone".to_owned()
            } else {
                format!("beside {}", waiting.join(", "))
            };
            let note = format!("{}: {beside}; {}", of_pairs.join(", "), busy.told());
            samples.note(first, note);
        }
    });
    for case in others {
        eprintln!("{case}");
        let (bins, rounds) = (&options.bins, options.rounds);
        let measured = match case {
            MATRIX => matrix(options, samples),
            NARROW => line::narrow(bins, NARROW, rounds, samples),
            UNFRAGMENTED => line::narrow(bins, UNFRAGMENTED, rounds, samples),
            UPLINK => uplink(bins, rounds, samples),
            _ => share::measure(bins, rounds, samples),
        };
        if let Err(error) = measured {
            samples.error(case, &error);
        }
    }
    beside_waiting(&idling, options, samples, |_| ());
    Ok(samples.errors().next().is_none())
}

/// How many labs are coming up: what that takes of the processors must be in no figure.
#[derive(Default)]
struct Gate {
    starting: Mutex<usize>,
    changed: Condvar,
}

impl Gate {
    fn starting(&self) -> Starting<'_> {
        *self.lock() += 1;
        Starting(self)
    }

    /// Returns when all are up, or failed.
    fn wait(&self) {
        let mut starting = self.lock();
        while *starting > 0 {
            starting = self
                .changed
                .wait(starting)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.starting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One that is coming up, until this is dropped.
pub(super) struct Starting<'g>(&'g Gate);

impl Starting<'_> {
    /// This one is; returns when all the others are.
    pub(super) fn has_started(self) {
        let gate = self.0;
        drop(self);
        gate.wait();
    }
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        *self.0.lock() -= 1;
        self.0.changed.notify_all();
    }
}

/// Measures those who wait, each on a thread of its own, and does `meanwhile` when their labs are up.
fn beside_waiting(
    cases: &[&'static str],
    options: &Options,
    samples: &mut Samples,
    meanwhile: impl FnOnce(&mut Samples),
) {
    let (bins, rounds) = (&options.bins, options.rounds);
    let gate = Gate::default();
    let measure = |case: &'static str, starting: Starting<'_>| {
        eprintln!("{case}");
        let mut samples = Samples::default();
        let measured = match case {
            LOSSY => line::lossy(bins, rounds, starting, &mut samples),
            _ => line::idle(bins, case, rounds, starting, &mut samples),
        };
        if let Err(error) = measured {
            samples.error(case, &error);
        }
        samples
    };
    thread::scope(|scope| {
        // All, before the first could be the only one.
        let starting: Vec<_> = cases.iter().map(|&case| (case, gate.starting())).collect();
        let begin = |(case, starting)| (case, scope.spawn(move || measure(case, starting)));
        let running: Vec<_> = starting.into_iter().map(begin).collect();
        gate.wait();
        meanwhile(samples);
        for (case, measuring) in running {
            match measuring.join() {
                Ok(measured) => samples.append(measured),
                Err(_) => samples.error(case, &anyhow!("its thread panicked")),
            }
        }
    });
}

/// What the machine's processors did, in ticks, since it started.
struct Busy {
    all: u64,
    idle: u64,
}

impl Busy {
    fn now() -> Self {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let first = stat.lines().next().unwrap_or_default();
        let ticks: Vec<u64> = first
            .split_whitespace()
            .skip(1)
            .take(8) // Up to `steal`: guests are in `user`, too (proc_stat(5)).
            .filter_map(|word| word.parse().ok())
            .collect();
        Self {
            all: ticks.iter().sum(),
            idle: ticks.iter().skip(3).take(2).sum(),
        }
    }

    /// How busy they were since then.
    fn told(&self) -> String {
        let now = Self::now();
        let (all, idle) = (now.all - self.all, now.idle - self.idle);
        let busy = 100.0 * (all - idle) as f64 / all.max(1) as f64;
        format!("processors busy {busy:.0} % of the time")
    }
}

fn measure_pairs(pairs: &Pairs, cases: &[&'static str], rounds: u32, samples: &mut Samples) {
    // In turns, so that a slow minute of the machine is in all of them; but relays last, as direct paths that were cut
    // for so long are looked for once a minute only.
    let (relays, others): (Vec<_>, Vec<_>) = cases.iter().partition(|case| **case == RELAY);
    for cases in [others, relays] {
        for round in 1..=rounds {
            for &case in &cases {
                eprintln!("{case}: round {round} of {rounds}");
                let measured = match case {
                    CUT => pairs.each(What::Cut, case, round, samples),
                    ADDRESS => pairs.each(What::Address, case, round, samples),
                    WAN => pairs.each(What::Wan, case, round, samples),
                    _ => pairs.kill_relays(case, round, samples),
                };
                if let Err(error) = measured {
                    samples.error(case, &error.context(format!("round {round}")));
                }
            }
        }
    }
    for &case in cases {
        pairs.tell_totals(case, samples);
    }
}

fn uplink(bins: &Path, rounds: u32, samples: &mut Samples) -> Result<()> {
    let pairs = Pairs::start(bins, true)?;
    for round in 1..=rounds {
        eprintln!("{UPLINK}: round {round} of {rounds}");
        pairs.each(What::Cable, UPLINK, round, samples)?;
    }
    pairs.tell_totals(UPLINK, samples);
    Ok(())
}

fn matrix(options: &Options, samples: &mut Samples) -> Result<()> {
    let matrix = Matrix::start(&options.bins)?;
    let mut rounds: Vec<Vec<Met>> = Vec::new();
    for round in 1..=options.rounds {
        eprintln!("{MATRIX}: round {round} of {}", options.rounds);
        if round > 1 {
            matrix.forget()?;
        }
        rounds.push(matrix.meet()?);
    }
    let all = || rounds.iter().flatten();
    for met in all() {
        if let Some(answered) = met.answered {
            samples.add(MATRIX, "answered", "ms", ms(answered));
        }
        if let Some(direct) = met.direct {
            samples.add(MATRIX, "direct", "ms", ms(direct));
        }
        if !met.as_expected() {
            let (from, to) = (met.from.name, met.to.name);
            let note = format!("{from} to {to}: {:?} by {}", met.ends, met.path);
            samples.note(MATRIX, note);
        }
    }
    let otherwise = all().filter(|met| !met.as_expected()).count();
    samples.add(MATRIX, "otherwise", "pairs", otherwise as f64);
    let note = "ports of random NATs and the agents' own dice are the kernel's: there is no seed";
    samples.note(MATRIX, note.to_owned());
    let heading = format!(
        "Milliseconds to the first answer / until both ends are direct, the slowest of {} rounds, or why they stay on a \
         relay (`meshctl path why`, at both ends the same). Sites are 10 ms from the internet; one relay.\n\n",
        rounds.len()
    );
    samples.markdown(MATRIX, heading + &markdown(&rounds));
    Ok(())
}

/// What nothing is asked of.
pub(super) fn overview(figures: &[Figure]) -> String {
    let rest: Vec<_> = figures
        .iter()
        .filter(|figure| figure.must.is_none())
        .cloned()
        .collect();
    super::figure_table(&rest)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
