//! Bad lines and idle ones.

use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow};
use netns_tests::{
    link::Impairment,
    load::{ROUND_TRIP_MAX, Way, round_trips},
    mesh::{Mesh, word},
    node::Node,
    stream::transfer,
    tool,
};
use serde_json::Value;

use super::{IDLE_METERED, LOSSY, Starting, UNFRAGMENTED, ms, pairs};
use crate::{
    bench::{
        Samples,
        controlplane::{cases::Idle, idle},
    },
    root,
};

/// 10 % lost in bursts of four frames on average, both ways, 200 ms there and back, 1 Mb/s.
const LOSSY_LINE: Impairment = Impairment {
    delay: Duration::from_millis(100),
    loss: 0.1,
    loss_burst_frames: 4.0,
    rate_bps: 1_000_000,
    seed: 20_260_611,
    ..Impairment::NONE
};

/// Of each round: five are ten minutes.
const LOSSY_TIME: Duration = Duration::from_secs(120);

/// Echoes in the tunnel: ten a second.
const ECHO_EVERY: Duration = Duration::from_millis(100);

/// TCP's first repetitions come after 1, 3 and 7 s, and at 19 % lost there and back one in a thousand needs the fourth.
const REQUEST_LIMIT: Duration = Duration::from_secs(20);

/// The cloud's services of `examples/demo` have an endpoint at `edge-b1`.
const URL: &str = "http://inventory.shop.svc.cluster.local/";
const NAME: &str = "inventory.shop.svc.cluster.local";

/// Holds a tunnel over a bad line, with names and a service by it.
///
/// # Errors
///
/// If a node does not come up, or the two never speak.
pub(super) fn lossy(
    bins: &Path,
    rounds: u32,
    starting: Starting<'_>,
    samples: &mut Samples,
) -> Result<()> {
    let mut mesh = Mesh::start(bins, &root().join("examples/demo"))?;
    mesh.start_relay()?;
    mesh.add_two_sites(Impairment::NONE, &["edge-a1"], &["edge-b1"])?;
    let nodes = ["edge-a1", "edge-b1"];
    nodes.iter().try_for_each(|node| mesh.start_agent(node))?;
    nodes
        .iter()
        .try_for_each(|node| mesh.agent_ready(node, 2))?;
    mesh.serve("edge-b1", "inventory", &["http", "edge-b1", "[::]:8080"])?;
    mesh.get("edge-a1", &["-4", URL], REQUEST_LIMIT)?;
    starting.has_started();
    mesh.site("site-a")?.link().set(LOSSY_LINE)?;
    let time = LOSSY_TIME * rounds;
    let [from, to] = [mesh.node("edge-a1")?, mesh.node("edge-b1")?];
    let way = Way {
        from: &from,
        to: &to,
        address: [100, 96, 2, 1].into(),
    };
    let count = u32::try_from(time.as_millis() / ECHO_EVERY.as_millis())?;
    let stop = AtomicBool::new(false);
    let (times, used) = thread::scope(|scope| {
        let using = scope.spawn(|| use_it(&mesh, &stop));
        let times = round_trips(way, count, ECHO_EVERY);
        stop.store(true, Ordering::Relaxed);
        let used = using.join().map_err(|_| anyhow!("the client panicked"));
        (times, used)
    });
    let (times, used) = (times?, used?);
    let answered = |time: &Duration| *time < ROUND_TRIP_MAX;
    let seconds: Vec<_> = times
        .chunks(10)
        .map(|second| second.iter().any(answered))
        .collect();
    let held = seconds.iter().filter(|held| **held).count();
    let share = held as f64 / seconds.len() as f64 * 100.0;
    samples.add(LOSSY, "answered_seconds", "%", share);
    let echoes = times.iter().filter(|time| answered(time)).count();
    samples.add(
        LOSSY,
        "answered_echoes",
        "%",
        echoes as f64 / f64::from(count) * 100.0,
    );
    let longest = times
        .split(|time| answered(time))
        .map(<[_]>::len)
        .max()
        .unwrap_or(0);
    samples.add(LOSSY, "gap", "ms", ms(ECHO_EVERY * u32::try_from(longest)?));
    samples.add(LOSSY, "path_changes", "changes", used.path_changes as f64);
    samples.add(LOSSY, "unreachable", "looks", used.unreachable as f64);
    samples.add(
        LOSSY,
        "unanswered_requests",
        "requests",
        used.requests[1] as f64,
    );
    samples.add(LOSSY, "unanswered_names", "names", used.names[1] as f64);
    for time in used.times {
        samples.add(LOSSY, "request", "ms", ms(time));
    }
    samples.note(
        LOSSY,
        format!(
            "{} s, seed {}, bursts of {} frames; {} requests and {} names were asked for",
            time.as_secs(),
            LOSSY_LINE.seed,
            LOSSY_LINE.loss_burst_frames,
            used.requests[0],
            used.names[0]
        ),
    );
    for problem in used.problems.into_iter().take(5) {
        samples.note(LOSSY, problem);
    }
    mesh.all_run()
}

/// What a client of a service saw: how many, and how many of them had no answer.
#[derive(Debug, Default)]
struct Used {
    requests: [u64; 2],
    names: [u64; 2],
    times: Vec<Duration>,
    path_changes: u64,
    unreachable: u64,
    problems: Vec<String>,
}

fn use_it(mesh: &Mesh, stop: &AtomicBool) -> Used {
    let mut used = Used::default();
    let mut path = String::new();
    while !stop.load(Ordering::Relaxed) {
        used.names[0] += 1;
        if let Err(error) = mesh.resolve("edge-a1", NAME) {
            used.names[1] += 1;
            used.problems.push(format!("{error:#}"));
        }
        used.requests[0] += 1;
        let began = Instant::now();
        match mesh.get("edge-a1", &["-4", URL], REQUEST_LIMIT) {
            Ok(_) => used.times.push(began.elapsed()),
            Err(error) => {
                used.requests[1] += 1;
                used.problems.push(format!("{error:#}"));
            }
        }
        match mesh.ask("edge-a1", &["path", "why", "edge-b1"]) {
            Ok(why) => {
                let now = netns_tests::matrix::path_in_use(&why);
                let known = !path.is_empty() && !now.is_empty();
                used.path_changes += u64::from(known && now != path);
                used.unreachable += u64::from(word(&why, "state") == "unreachable");
                path = now;
            }
            Err(error) => used.problems.push(format!("{error:#}")),
        }
        thread::sleep(Duration::from_millis(500));
    }
    used
}

/// Of each round; five are 100 MB, by one connection.
const TRANSFER_BYTES: u64 = 20_000_000;

/// 100 MB at 4 Mb/s.
const TRANSFER_LIMIT: Duration = Duration::from_secs(200);

/// Fragments of IPv4 end here, as in many a carrier's NAT.
const NO_FRAGMENTS: &str = "table ip whole { chain raw { type filter hook prerouting priority -450; ip frag-off & 0x3fff != 0 \
                            drop; }; }\n";

/// Sends by TCP where 1280 bytes fit and nobody says so.
///
/// # Errors
///
/// If a node does not come up.
pub(super) fn narrow(bins: &Path, case: &str, rounds: u32, samples: &mut Samples) -> Result<()> {
    let mesh = pairs::sites(bins, 1, "")?;
    let internet = mesh.lab().internet();
    mesh.site("site-a1")?.narrow(internet, 1_280)?;
    if case == UNFRAGMENTED {
        tool::nft(internet.netns(), NO_FRAGMENTS)?;
        tool::nft(mesh.site("site-a1")?.router().netns(), NO_FRAGMENTS)?;
    }
    pairs::start_agents(&mesh, 1, "")?;
    let [from, to] = [mesh.node("a1")?, mesh.node("b1")?];
    let way = Way {
        from: &from,
        to: &to,
        address: [100, 96, 2, 1].into(),
    };
    let bytes = TRANSFER_BYTES * u64::from(rounds);
    let sent = transfer(way, bytes, TRANSFER_LIMIT);
    let why = mesh.ask("a1", &["path", "why", "b1"])?;
    let path = netns_tests::matrix::path_in_use(&why);
    let (state, reason) = (word(&why, "state"), word(&why, "reason"));
    samples.note(
        case,
        format!("{bytes} bytes, at the end {state} ({reason}) by {path}"),
    );
    match sent {
        Ok(took) => {
            samples.add(case, "missing_bytes", "bytes", 0.0);
            let rate = bytes as f64 * 8e-6 / took.as_secs_f64();
            samples.add(case, "rate", "Mb/s", rate);
        }
        Err(error) => {
            samples.add(case, "missing_bytes", "bytes", bytes as f64);
            samples.note(case, format!("{error:#}; {why}"));
        }
    }
    mesh.all_run()
}

/// Of each round.
const IDLE_TIME: Duration = Duration::from_secs(60);

/// Where the way out costs, links to relays that nobody needs any more end a minute after their last use, as visits do:
/// then there is nothing left to say.
const LINKS_END: Duration = Duration::from_secs(70);

/// Counts what an agent with 50 peers sends and receives when nobody has anything to say.
///
/// # Errors
///
/// If a node does not come up, or a path does not.
pub(super) fn idle(
    bins: &Path,
    case: &str,
    rounds: u32,
    starting: Starting<'_>,
    samples: &mut Samples,
) -> Result<()> {
    let metered = case == IDLE_METERED;
    let lines = if metered {
        "[[uplink]]\ninterface = \"wan\"\nmetered = true\n"
    } else {
        ""
    };
    let mesh = idle::start(
        bins,
        Idle {
            peers: 50,
            services: 10,
            time: IDLE_TIME,
        },
        lines,
    )?;
    starting.has_started();
    thread::sleep(idle::CALM);
    if metered {
        thread::sleep(LINKS_END);
    }
    let node = mesh.node(idle::NODE)?;
    let mut before = counted(&node)?;
    for minute in 1..=rounds {
        eprintln!("{case}: minute {minute} of {rounds}");
        let began = Instant::now();
        thread::sleep(IDLE_TIME);
        let now = counted(&node)?;
        let seconds = began.elapsed().as_secs_f64();
        let rate = |before: u64, now: u64| (now - before) as f64 / seconds;
        let ([bytes_before, packets_before], [bytes_now, packets_now]) = (before, now);
        let bytes = rate(bytes_before, bytes_now);
        let packets = rate(packets_before, packets_now);
        samples.add(case, "bytes", "B/s", bytes);
        samples.add(case, "packets", "a minute", packets * 60.0);
        before = now;
    }
    mesh.all_run()
}

/// Bytes and packets at the interface so far, both ways.
fn counted(node: &Node) -> Result<[u64; 2]> {
    let said = tool::run(
        "ip",
        &["-n", node.netns(), "-j", "-s", "link", "show", "dev", "wan"],
        "",
    )?;
    let said: Value = serde_json::from_str(&said)?;
    let sum = |what: &str| {
        let of = |way: &str| {
            said.pointer(&format!("/0/stats64/{way}/{what}"))
                .and_then(Value::as_u64)
        };
        Some(of("rx")? + of("tx")?)
    };
    let both = sum("bytes").zip(sum("packets"));
    both.map(|(bytes, packets)| [bytes, packets])
        .with_context(|| format!("no counters: {said}"))
}
