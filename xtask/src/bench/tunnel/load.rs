//! One case in one round: what is put on the way, and what is read off it.

use std::{
    thread::{self, ScopedJoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use netns_tests::{
    load::{self, Offer, Trial, Way},
    node::Process,
};
use serde_json::Value;

use super::world::{Up, World};
use crate::bench::{Samples, percentile};

/// Length of one iperf3 run.
const TCP_S: u64 = 2;

/// Streams to each of two peers: enough that both packet threads have some, whichever way the kernel deals
/// them to the queues of the TUN device.
const HUB_STREAMS: &str = "4";

/// Length of the bulk flow beside probes: theirs, and time to get up to speed before.
const BULK_S: u64 = 3;

/// The bulk flow runs this long before the first probe.
const BULK_HEAD_START: Duration = Duration::from_millis(500);

/// TCP finds its speed as it does without any setting, whatever the machine's is.
const LINUX_DEFAULT: &[&str] = &["--congestion", "cubic"];

/// An iperf3 run and its connection set-up; beyond it hangs.
const TCP_LIMIT: Duration = Duration::from_secs(20);

/// Probes of round trips: with 2,000 the 99.9th percentile is the third longest.
const PROBES: u32 = 2_000;

/// Ten ordinary voice flows, and no load.
const PROBE_INTERVAL: Duration = Duration::from_millis(1);

/// After its start a daemon is idle by then: an agent gives back what starting took after 10 s without a change. Waited
/// for in the first round alone.
const SETTLED: Duration = Duration::from_secs(15);

/// Datagrams are offered this long for one answer.
const TRIAL_TIME: Duration = Duration::from_millis(200);

/// Lost datagrams that still count as none: one in a thousand.
const LOSS_MAX: f64 = 0.001;

/// The search halves this ratio between the highest rate it considers and the lowest …
const SEARCH_SPAN: f64 = 64.0;

/// … this often: the answer is exact to 64^(1/2⁷) = 3.3 %.
const SEARCH_STEPS: u32 = 7;

/// Measures everything once, in some 18 s: round trips 2 s, TCP 3 × 2.2 s, round trips beside bulk 3 s,
/// rates of 64 and 1,200 bytes some 12 trials of 0.22 s each; in the first round [`SETTLED`] before.
///
/// # Errors
///
/// If the way breaks.
pub(super) fn measure(world: &World, case: &str, up: &Up, samples: &mut Samples) -> Result<()> {
    let way = world.way(up);
    if let Some(second) = world.second_way(up) {
        return measure_hub(world, case, up, [way, second], samples);
    }
    if !up.daemons.is_empty() && !samples.has(case, "resident_idle") {
        thread::sleep(SETTLED);
        if let Some(idle) = most(up, Process::resident_kib)? {
            samples.add(case, "resident_idle", "KiB", idle);
        }
    }
    let idle = load::round_trips(way, PROBES, PROBE_INTERVAL)?;
    add_round_trips(samples, case, ["rtt_p50", "rtt_p99", "rtt_p999"], idle);
    let before = world.cpu_s(up)?;
    let mut bytes = 0.0;
    for (metric, streams) in [("tcp_1", "1"), ("tcp_4", "4"), ("tcp_16", "16")] {
        let flow = tcp(way, &["--parallel", streams], TCP_S)?;
        bytes += flow.bytes;
        samples.add(case, metric, "Mb/s", flow.mbit_per_s);
    }
    if !up.daemons.is_empty() {
        let spent = world.cpu_s(up)? - before;
        samples.add(case, "cpu_per_gb", "s", spent / (bytes / 1e9));
    }
    let loaded = beside_bulk(way)?;
    let metrics = ["loaded_rtt_p50", "loaded_rtt_p99", "loaded_rtt_p999"];
    add_round_trips(samples, case, metrics, loaded);
    for (metric, payload_bytes) in [("udp_64", 64), ("udp_1200", 1_200)] {
        let rate = without_loss(way, payload_bytes)?;
        samples.add(case, metric, "kpps", rate / 1_000.0);
    }
    if let Some(peak) = most(up, Process::resident_peak_kib)? {
        samples.add(case, "resident_peak", "KiB", peak);
    }
    Ok(())
}

/// Measures what one node has with two peers at once, in some 5 s: from it to both, then from both to it.
fn measure_hub(
    world: &World,
    case: &str,
    up: &Up,
    ways: [Way; 2],
    samples: &mut Samples,
) -> Result<()> {
    let before = world.cpu_s(up)?;
    let mut bytes = 0.0;
    for (metric, direction) in [("hub_out", None), ("hub_in", Some("--reverse"))] {
        let words = ["--parallel", HUB_STREAMS].into_iter().chain(direction);
        let flows = at_once(ways, &words.collect::<Vec<_>>())?;
        bytes += flows.iter().map(|flow| flow.bytes).sum::<f64>();
        let total = flows.iter().map(|flow| flow.mbit_per_s).sum();
        samples.add(case, metric, "Mb/s", total);
    }
    let spent = world.cpu_s(up)? - before;
    samples.add(case, "cpu_per_gb", "s", spent / (bytes / 1e9));
    Ok(())
}

/// One iperf3 run on each way, side by side.
fn at_once(ways: [Way; 2], words: &[&str]) -> Result<[Flow; 2]> {
    let [first, second] = ways;
    thread::scope(|scope| {
        let beside = scope.spawn(|| tcp(second, words, TCP_S));
        let first = tcp(first, words, TCP_S);
        Ok([first?, joined(beside)?])
    })
}

/// The larger of both ends' memories; `None` without daemons.
fn most(up: &Up, memory: fn(&Process) -> Result<u64>) -> Result<Option<f64>> {
    let each = up.daemons.iter().map(memory).collect::<Result<Vec<_>>>()?;
    Ok(each.into_iter().max().map(|kib| kib as f64))
}

fn add_round_trips(
    samples: &mut Samples,
    case: &str,
    metrics: [&'static str; 3],
    mut times: Vec<Duration>,
) {
    times.sort();
    for (metric, share) in metrics.into_iter().zip([0.5, 0.99, 0.999]) {
        if let Some(time) = percentile(&times, share) {
            samples.add(case, metric, "µs", time.as_secs_f64() * 1e6);
        }
    }
}

struct Flow {
    mbit_per_s: f64,
    bytes: f64,
}

/// One iperf3 run, with more `words` for it; what the receiver counted.
fn tcp(way: Way, words: &[&str], seconds: u64) -> Result<Flow> {
    let (time, to) = (seconds.to_string(), way.address.to_string());
    let call = ["iperf3", "--json", "--client", &to, "--time", &time];
    let words = [&call, LINUX_DEFAULT, words].concat();
    let said = way.from.run(&words, TCP_LIMIT)?;
    let value: Value =
        serde_json::from_str(&said.stdout).with_context(|| format!("iperf3: {}", said.stdout))?;
    let number = |pointer: &str| {
        let found = value.pointer(pointer).and_then(Value::as_f64);
        found.with_context(|| format!("iperf3 has no {pointer}: {value}"))
    };
    Ok(Flow {
        mbit_per_s: number("/end/sum_received/bits_per_second")? / 1e6,
        bytes: number("/end/sum_received/bytes")?,
    })
}

/// Round trips of a small flow beside one bulk flow.
fn beside_bulk(way: Way) -> Result<Vec<Duration>> {
    thread::scope(|scope| {
        let bulk = scope.spawn(|| tcp(way, &[], BULK_S));
        thread::sleep(BULK_HEAD_START);
        let times = load::round_trips(way, PROBES, PROBE_INTERVAL);
        joined(bulk).context("the bulk flow")?;
        times
    })
}

fn joined(flow: ScopedJoinHandle<'_, Result<Flow>>) -> Result<Flow> {
    let ended = flow.join();
    ended.map_err(|_| anyhow!("iperf3's thread panicked"))?
}

/// The highest rate without loss that [`Search`] finds, in datagrams a second.
fn without_loss(way: Way, payload_bytes: usize) -> Result<f64> {
    let mut search = Search::default();
    while let Some(rate) = search.next_rate() {
        let offer = Offer {
            payload_bytes,
            rate,
            time: TRIAL_TIME,
        };
        search.note(load::offer(way, offer)?);
    }
    Ok(search.best())
}

/// Looks for the highest rate of which at most [`LOSS_MAX`] is lost.
///
/// The first trial offers all that the kernel takes, which bounds the search; then it halves the ratio
/// between a rate that held and one that did not. A rate that loses is tried once more, as the machine
/// has other things to do. What counts is what arrived, over the time until the last one did: what
/// only filled queues is not speed.
#[derive(Debug, Default)]
struct Search {
    /// Highest that held (or the lowest to consider), and lowest that did not.
    bounds: Option<(f64, f64)>,
    steps: u32,
    lost_once: bool,
    best: f64,
}

impl Search {
    /// What to offer next; `Some(None)`: all that the kernel takes. `None`: it is found.
    fn next_rate(&self) -> Option<Option<f64>> {
        match self.bounds {
            None => Some(None),
            Some(_) if self.steps == SEARCH_STEPS => None,
            Some((low, high)) => Some(Some((low * high).sqrt())),
        }
    }

    fn note(&mut self, trial: Trial) {
        let offered = trial.sent as f64 / trial.sending.as_secs_f64();
        let lost = trial.sent.saturating_sub(trial.received) as f64;
        let held = lost <= trial.sent as f64 * LOSS_MAX;
        if held {
            let arrived = trial.received as f64 / trial.receiving.as_secs_f64();
            self.best = self.best.max(arrived);
        }
        let Some((low, high)) = self.bounds else {
            self.bounds = Some((offered / SEARCH_SPAN, offered));
            self.steps = if held { SEARCH_STEPS } else { 0 };
            return;
        };
        if !held && !self.lost_once {
            self.lost_once = true;
            return;
        }
        let middle = (low * high).sqrt();
        self.bounds = Some(if held { (middle, high) } else { (low, middle) });
        self.lost_once = false;
        self.steps += 1;
    }

    /// The best rate so far, in datagrams a second; 0 if none held.
    fn best(&self) -> f64 {
        self.best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A way that carries `capacity` datagrams a second, offered by a sender that manages `most`.
    fn found(capacity: f64, most: f64, mut hiccups: u32) -> f64 {
        let mut search = Search::default();
        for _ in 0..100 {
            let Some(rate) = search.next_rate() else {
                return search.best();
            };
            let rate = rate.unwrap_or(most).min(most);
            let lossless = rate <= capacity && hiccups == 0;
            hiccups = hiccups.saturating_sub(1);
            let sent = (1..).take_while(|n| f64::from(*n) <= rate / 5.0).count() as u64;
            search.note(Trial {
                sent,
                received: if lossless { sent } else { sent / 2 },
                sending: TRIAL_TIME,
                receiving: TRIAL_TIME,
            });
        }
        panic!("no end")
    }

    #[test]
    fn the_search_comes_close_to_what_is_carried() {
        for capacity in [20_000.0, 106_000.0, 399_000.0] {
            let rate = found(capacity, 600_000.0, 0);
            assert!(
                rate <= capacity && rate > 0.96 * capacity,
                "{capacity}: {rate}"
            );
        }
    }

    #[test]
    fn a_way_that_loses_nothing_is_found_at_once() {
        assert_eq!(found(1e6, 600_000.0, 0), 600_000.0);
    }

    #[test]
    fn one_bad_trial_does_not_decide() {
        // The first trial bounds the search and the second is the first that may be repeated.
        let rate = found(100_000.0, 600_000.0, 2);
        assert!(rate > 96_000.0, "{rate}");
    }

    #[test]
    fn nothing_held_is_zero() {
        assert_eq!(found(0.0, 600_000.0, 0), 0.0);
    }

    #[test]
    fn what_only_filled_queues_is_not_counted_as_speed() {
        let mut search = Search::default();
        search.note(Trial {
            sent: 1_000,
            received: 1_000,
            sending: Duration::from_millis(100),
            receiving: Duration::from_millis(200),
        });
        assert_eq!(search.best(), 5_000.0);
    }
}
