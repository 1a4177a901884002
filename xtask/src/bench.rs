//! `cargo xtask bench NAME`: the harness, and what a figure looks like.

mod ask;
mod controlplane;
mod dns;
mod offline;
mod paths;
mod plot;
mod services;
mod start;
mod tunnel;
mod verdict;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write as _},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail, ensure};
use netns_tests::{load::ROUND_TRIP_MAX, mesh::Mesh, node::Node};
use serde::Serialize;
use serde_json::json;

use self::verdict::Verdict;
use crate::{build, report, root, setup};

/// What to measure, and how.
#[derive(Debug, Clone, Default)]
pub(crate) struct Options {
    /// Where the binaries are; empty: build them.
    pub(crate) bins: PathBuf,
    /// Interleaved rounds.
    pub(crate) rounds: u32,
    /// Other programs; empty: all.
    pub(crate) peers: Vec<String>,
    /// Nothing but these cases, if there are any.
    pub(crate) only: Vec<String>,
    /// Keep the processors from sleeping.
    pub(crate) awake: bool,
}

/// A bench.
struct Bench {
    name: &'static str,
    what: &'static str,
    /// Rounds into samples. `false`: something of our own could not be measured.
    run: fn(&Options, &mut Samples) -> Result<bool>,
    /// Whether the options fit it, before anything is built.
    check: fn(&Options) -> Result<()>,
    table: fn(&[Figure]) -> String,
    /// Whether there is a picture of it.
    plot: bool,
}

const BENCHES: &[Bench] = &[
    Bench {
        name: "tunnel",
        what: "throughput, latency, processor time and memory of every path, beside the wire and other programs",
        run: tunnel::run,
        check: tunnel::check,
        table: tunnel::overview,
        plot: true,
    },
    Bench {
        name: "services",
        what: "services of a node's pods, beside kube-proxy's rules and a proxy process; one change among 250,000",
        run: services::run,
        check: services::check,
        table: services::overview,
        plot: true,
    },
    Bench {
        name: "controlplane",
        what: "the controller and 1,000 agents of a large cluster, an idle agent with 50 peers, 50 pods at once",
        run: controlplane::run,
        check: controlplane::check,
        table: figure_table,
        plot: false,
    },
    Bench {
        name: "paths",
        what: "how soon paths are there and are left: cuts, dead relays, new addresses, every NAT, bad and idle lines",
        run: paths::run,
        check: paths::check,
        table: paths::overview,
        plot: false,
    },
    Bench {
        name: "dns",
        what: "a node's resolver beside unbound, dnsmasq, knot and nsd: answers a second, their latency; 100,000 endpoints",
        run: dns::run,
        check: dns::check,
        table: figure_table,
        plot: false,
    },
    Bench {
        name: "offline",
        what: "a site that boots alone, what coming back costs, and how soon all is one mesh again",
        run: offline::run,
        check: offline::check,
        table: figure_table,
        plot: false,
    },
    Bench {
        name: "start",
        what: "agent start to the first name and the first service answer, and memory",
        run: start::run,
        check: start::check,
        table: figure_table,
        plot: false,
    },
];

/// Who holds it open says how long a processor may take to wake (PM QoS).
const NO_SLEEP: &str = "/dev/cpu_dma_latency";

/// Fewer runs than these have no 99th percentile (issue 6).
const P99_RUNS_MIN: usize = 50;

/// Every measured value by case and metric, in the order of their first appearance.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    order: Vec<(String, &'static str)>,
    values: BTreeMap<(String, &'static str), (&'static str, Vec<f64>)>,
    turns: BTreeMap<(String, &'static str), Vec<f64>>,
    versions: Vec<(String, String)>,
    notes: Vec<(String, String)>,
    markdown: Vec<(String, String)>,
    errors: Vec<(String, String)>,
}

impl Samples {
    /// Notes one value.
    pub(crate) fn add(&mut self, case: &str, metric: &'static str, unit: &'static str, value: f64) {
        let key = (case.to_owned(), metric);
        if !self.values.contains_key(&key) {
            self.order.push(key.clone());
        }
        self.values
            .entry(key)
            .or_insert_with(|| (unit, Vec::new()))
            .1
            .push(value);
    }

    /// Whether there is a value.
    fn has(&self, case: &str, metric: &'static str) -> bool {
        self.values.contains_key(&(case.to_owned(), metric))
    }

    /// Takes in what was measured beside this, of other cases.
    pub(crate) fn append(&mut self, mut other: Self) {
        self.order.append(&mut other.order);
        self.values.append(&mut other.values);
        self.turns.append(&mut other.turns);
        self.versions.append(&mut other.versions);
        self.notes.append(&mut other.notes);
        self.markdown.append(&mut other.markdown);
        self.errors.append(&mut other.errors);
    }

    /// Notes the same metric in each turn of a round, in which all cases have as many: what its ratios are made of.
    pub(crate) fn add_turns(&mut self, case: &str, metric: &'static str, values: Vec<f64>) {
        let turns = self.turns.entry((case.to_owned(), metric)).or_default();
        turns.extend(values);
    }

    /// Notes what a case's program says of itself.
    pub(crate) fn version(&mut self, case: &str, version: &str) {
        self.versions.push((case.to_owned(), version.to_owned()));
    }

    /// Notes what a reader of a case's figures has to know: seeds, how many took part.
    pub(crate) fn note(&mut self, case: &str, note: String) {
        self.notes.push((case.to_owned(), note));
    }

    /// Notes a table that is no list of figures.
    pub(crate) fn markdown(&mut self, case: &str, table: String) {
        self.markdown.push((case.to_owned(), table));
    }

    /// Notes why a case could not be measured.
    pub(crate) fn error(&mut self, case: &str, error: &anyhow::Error) {
        eprintln!("{case}: {error:#}");
        self.errors.push((case.to_owned(), format!("{error:#}")));
    }

    /// Cases that could not be measured, and why.
    pub(crate) fn errors(&self) -> impl Iterator<Item = (&str, &str)> {
        self.errors
            .iter()
            .map(|(case, error)| (case.as_str(), error.as_str()))
    }

    fn figures(&self, bench: &'static str) -> Vec<Figure> {
        let figure = |key: &(String, &'static str)| {
            let (unit, values) = self.values.get(key)?;
            let mut sorted = values.clone();
            sorted.sort_by(f64::total_cmp);
            Some(Figure {
                bench,
                case: key.0.clone(),
                metric: key.1,
                unit,
                median: *sorted.get(sorted.len() / 2)?,
                min: *sorted.first()?,
                max: *sorted.last()?,
                p99: percentile(&sorted, 0.99).filter(|_| sorted.len() >= P99_RUNS_MIN),
                runs: sorted.len(),
                turns: self.turns.get(key).unwrap_or(values).clone(),
                must: None,
                ratio: None,
                between: None,
                ok: None,
                open: false,
            })
        };
        self.order.iter().filter_map(figure).collect()
    }
}

/// One line of the output.
#[derive(Debug, Clone, Serialize)]
struct Figure {
    bench: &'static str,
    case: String,
    metric: &'static str,
    unit: &'static str,
    median: f64,
    min: f64,
    max: f64,
    /// Of at least [`P99_RUNS_MIN`] runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    p99: Option<f64>,
    runs: usize,
    /// What it was in each turn, or else in each round.
    #[serde(skip)]
    turns: Vec<f64>,
    /// What an issue asks for, or wants to see beside it, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    must: Option<String>,
    /// The median over what it is compared with.
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<f64>,
    /// Where that ratio is by 95 %, if it is of turns enough to say so.
    #[serde(skip_serializing_if = "Option::is_none")]
    between: Option<(f64, f64)>,
    /// Whether that holds; none of it to hold, or nobody can tell: `None`.
    #[serde(skip_serializing_if = "Option::is_none")]
    ok: Option<bool>,
    /// What is asked for lies in `between`, and the ratio is on the wrong side of it: these turns do not tell.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    open: bool,
}

/// The cases to measure: all, unless `only` names some.
///
/// # Errors
///
/// If a name is unknown: says which there are.
pub(crate) fn choose<C>(
    cases: &'static [C],
    name: fn(&C) -> &'static str,
    only: &[String],
) -> Result<Vec<&'static C>> {
    let known: Vec<_> = cases.iter().map(name).collect();
    let strange = only.iter().filter(|name| !known.contains(&name.as_str()));
    let strange: Vec<_> = strange.map(String::as_str).collect();
    ensure!(
        strange.is_empty(),
        "no case {}; there are: {}",
        strange.join(", "),
        known.join(", ")
    );
    let wanted = |case: &&C| only.is_empty() || only.iter().any(|only| only == name(case));
    Ok(cases.iter().filter(wanted).collect())
}

/// The smallest value that is not exceeded by `share` of all ("nearest rank").
pub(crate) fn percentile<T: Copy>(sorted: &[T], share: f64) -> Option<T> {
    let count = sorted.len() as f64;
    let index = (1..=sorted.len()).find(|rank| *rank as f64 >= share * count)?;
    sorted.get(index - 1).copied()
}

/// A round trip of this many µs stands for a lost packet.
const LOST_US: f64 = ROUND_TRIP_MAX.as_micros() as f64;

impl Figure {
    /// The median for people, in a larger unit.
    fn median_text(&self, divisor: f64) -> String {
        match self.unit {
            "µs" if self.median >= LOST_US => "lost".to_owned(),
            _ => report::three_digits(self.median / divisor),
        }
    }
}

/// Runs a bench with release builds. What it measures does not decide its success.
///
/// # Errors
///
/// If it could not measure.
pub(crate) fn run(
    name: Option<&str>,
    json: bool,
    save: bool,
    mut options: Options,
) -> Result<bool> {
    let Some(bench) = BENCHES.iter().find(|bench| Some(bench.name) == name) else {
        let list: Vec<_> = BENCHES
            .iter()
            .map(|bench| format!("\n  {}: {}", bench.name, bench.what))
            .collect();
        bail!(
            "cargo xtask bench NAME, where NAME is one of:{}",
            list.concat()
        );
    };
    (bench.check)(&options)?;
    setup::ready()?;
    if options.bins.as_os_str().is_empty() {
        options.bins = build(true)?;
    }
    let _awake = options.awake.then(keep_awake).transpose()?;
    let mut samples = Samples::default();
    let complete = (bench.run)(&options, &mut samples)?;
    let verdict = verdict::judge(bench.name, &samples.figures(bench.name));
    let lines = lines(bench.name, &samples, &verdict)?;
    let text = text(bench, &samples, &verdict);
    let tables: String = samples
        .markdown
        .iter()
        .map(|(case, table)| format!("\n## {case}\n\n{table}"))
        .collect();
    if json {
        println!("{lines}");
    } else {
        println!("{text}{tables}");
    }
    if save {
        save_run(bench, options.awake, &verdict, &lines, &text, &tables)?;
    }
    Ok(complete)
}

/// Has idle processors wait instead of sleep until the file is closed (the kernel's admin-guide/pm/cpuidle): what it takes
/// to wake one is the machine's, and in a virtual machine most of a round trip.
fn keep_awake() -> Result<File> {
    let open = || -> io::Result<File> {
        let mut file = File::options().write(true).open(NO_SLEEP)?;
        file.write_all(&0_u32.to_ne_bytes())?; // Longest acceptable wake-up, µs.
        Ok(file)
    };
    open().with_context(|| format!("--awake: keep processors from sleeping by {NO_SLEEP}"))
}

/// The JSON lines: figures, what the programs are, what could not be measured, the summary.
fn lines(bench: &str, samples: &Samples, verdict: &Verdict) -> Result<String> {
    let mut lines = verdict
        .figures
        .iter()
        .map(serde_json::to_string)
        .collect::<Result<Vec<_>, _>>()?;
    for (case, version) in &samples.versions {
        lines.push(json!({"bench": bench, "case": case, "version": version}).to_string());
    }
    for (case, note) in &samples.notes {
        lines.push(json!({"bench": bench, "case": case, "note": note}).to_string());
    }
    for (case, table) in &samples.markdown {
        lines.push(json!({"bench": bench, "case": case, "markdown": table}).to_string());
    }
    for (case, error) in samples.errors() {
        lines.push(json!({"bench": bench, "case": case, "error": error}).to_string());
    }
    let missed = verdict
        .figures
        .iter()
        .filter(|figure| figure.ok == Some(false));
    let missed: Vec<_> = missed
        .map(|figure| format!("{bench}/{}/{}", figure.case, figure.metric))
        .collect();
    let summary = json!({"summary": true, "missed": missed, "unjudged": verdict.unjudged});
    lines.push(summary.to_string());
    Ok(lines.join("\n"))
}

/// The tables for people, and the rest in sentences.
fn text(bench: &Bench, samples: &Samples, verdict: &Verdict) -> String {
    let mut parts = vec![(bench.table)(&verdict.figures)];
    let judged: Vec<_> = verdict.figures.iter().filter_map(judged_row).collect();
    if !judged.is_empty() {
        let header = [
            "case", "metric", "median", "p99", "runs", "must", "ratio", "",
        ];
        parts.push(report::table(&header, &judged));
    }
    let unjudged = verdict.unjudged.iter();
    parts.extend(unjudged.map(|rule| format!("not judged, for want of a figure: {rule}")));
    let errors = samples.errors();
    parts.extend(errors.map(|(case, error)| format!("NOT MEASURED: {case}: {error}")));
    let notes = samples.notes.iter();
    parts.extend(notes.map(|(case, note)| format!("{case}: {note}")));
    let versions = samples.versions.iter();
    parts.extend(versions.map(|(case, version)| format!("{case}: {version}")));
    parts.join("\n")
}

fn judged_row(figure: &Figure) -> Option<Vec<String>> {
    let held = match figure.ok {
        Some(true) => "held",
        Some(false) => "MISSED",
        None if figure.open => "open",
        None => "stated",
    };
    let between = |(low, high)| format!(" ({low:.3}–{high:.3})");
    let between = figure.between.map(between).unwrap_or_default();
    Some(vec![
        figure.case.clone(),
        figure.metric.to_owned(),
        format!("{} {}", figure.median_text(1.0), figure.unit),
        figure.p99.map(report::three_digits).unwrap_or_default(),
        figure.runs.to_string(),
        figure.must.clone()?,
        report::three_digits(figure.ratio?) + &between,
        held.to_owned(),
    ])
}

fn figure_table(figures: &[Figure]) -> String {
    let rows = figures.iter().map(|figure| {
        vec![
            figure.case.clone(),
            figure.metric.to_owned(),
            figure.median_text(1.0),
            figure.unit.to_owned(),
            format!("{:.2} – {:.2}", figure.min, figure.max),
        ]
    });
    report::table(
        &["case", "metric", "median", "unit", "range"],
        &rows.collect::<Vec<_>>(),
    )
}

fn save_run(
    bench: &Bench,
    awake: bool,
    verdict: &Verdict,
    lines: &str,
    text: &str,
    tables: &str,
) -> Result<()> {
    let folder = root().join("docs/bench");
    fs::create_dir_all(&folder)?;
    let (suffix, option, how) = match awake {
        true => ("-awake", " --awake", ", none of which may sleep"),
        false => ("", "", ""),
    };
    let write = |extension: &str, content: &str| {
        let path = folder.join(format!("{}{suffix}.{extension}", bench.name));
        fs::write(&path, content).with_context(|| format!("write {}", path.display()))
    };
    let machine = machine(how)?;
    let name = bench.name;
    let text = format!(
        "# bench {name}\n\n{machine}\n\
         Made by `cargo xtask bench {name} --save{option}`. Compare within one run only.\n\n```text\n{text}\n```\n{tables}"
    );
    write("md", &text)?;
    write("jsonl", &format!("{lines}\n"))?;
    if bench.plot {
        let subtitle = format!(
            "cargo xtask bench {name}{option}: medians, ranges; lengths are logarithms. {machine}"
        );
        write("svg", &plot::svg(&verdict.figures, &subtitle))?;
    }
    Ok(())
}

/// What was measured, on what, when.
fn machine(how: &str) -> Result<String> {
    let folder = root().display().to_string();
    let commit = said("git", &["-C", &folder, "describe", "--always", "--dirty"]);
    let kernel = said("uname", &["-sr"]);
    let cpu = fs::read_to_string("/proc/cpuinfo")?;
    let cpu = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name\t: "))
        .unwrap_or("unknown processor");
    let cores = std::thread::available_parallelism()?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    let day = now.as_secs() / 86_400;
    Ok(format!(
        "Commit {commit}; {cores} cores of {cpu}{how}; {kernel}; day {day} since 1970."
    ))
}

fn said(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output();
    output
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .unwrap_or_default()
}

/// The two nodes of a bench's mesh.
pub(crate) const LEFT: &str = "left";
/// The one with the service's endpoint.
pub(crate) const RIGHT: &str = "right";

/// Their names and addresses.
pub(crate) const NODES: [(&str, Ipv4Addr); 2] = [
    (LEFT, Ipv4Addr::new(198, 51, 100, 11)),
    (RIGHT, Ipv4Addr::new(198, 51, 100, 20)),
];

/// A mesh of [`NODES`], with controller and relay on a third one, and more lines for the relay's
/// configuration.
///
/// # Errors
///
/// If something does not come up.
pub(crate) fn two_nodes(bins: &Path, relay: &str) -> Result<Mesh> {
    let manifests = tempfile::tempdir()?;
    fs::write(
        manifests.path().join("bench.yaml"),
        include_str!("bench/mesh.yaml"),
    )?;
    let mesh = Mesh::start(bins, manifests.path())?;
    mesh.start_relay_with(relay)?;
    for (node, address) in NODES {
        mesh.lab().public_node(node, address)?;
        mesh.start_agent(node)?;
    }
    for (node, _) in NODES {
        mesh.agent_ready(node, 2)?;
    }
    Ok(mesh)
}

/// What ever went in and out by a public node's interface, in bytes with all headers.
///
/// # Errors
///
/// If the node is gone, or has no such interface.
pub(crate) fn wire_bytes(node: &Node) -> Result<u64> {
    // Of the thread that is in the namespace, not of the process.
    let read = || fs::read_to_string("/proc/thread-self/net/dev");
    let text = node.enter(read)??;
    interface_bytes(&text, "wan").context("no interface wan in /proc/net/dev")
}

/// Bytes received and sent by an interface, of `/proc/net/dev`.
fn interface_bytes(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().map(str::trim_start);
    let counts = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let mut counts = counts.split_whitespace().map(str::parse);
    let received: u64 = counts.next()?.ok()?;
    let sent: u64 = counts.nth(7)?.ok()?;
    Some(received + sent)
}

/// Until a daemon is up or a path is as wanted.
pub(crate) const UP_LIMIT: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_medians_in_order() {
        let mut samples = Samples::default();
        for value in [3.0, 1.0, 2.0] {
            samples.add("agent", "first_name", "ms", value * 1_000.0);
            samples.add("agent", "memory", "KiB", value);
        }
        let verdict = verdict::judge("start", &samples.figures("start"));
        let [name, memory] = verdict.figures.as_slice() else {
            panic!("{verdict:?}")
        };
        assert_eq!(
            (name.median, name.min, name.max, name.runs),
            (2_000.0, 1_000.0, 3_000.0, 3)
        );
        assert_eq!((name.ok, memory.ok), (Some(true), None));
    }

    #[test]
    fn an_interfaces_bytes_are_those_of_both_ways() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
                    face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets\n    \
                    lo:     100       2    0    0    0     0          0         0      100       2    0\n   \
                    wan: 5000      20    0    0    0     0          0         0      700       9    0    0\n";
        assert_eq!(interface_bytes(text, "wan"), Some(5_700));
        assert_eq!(interface_bytes(text, "wa"), None);
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let times: Vec<_> = (1..=2_000).collect();
        let at = |share| percentile(&times, share).unwrap();
        assert_eq!((at(0.5), at(0.99), at(0.999)), (1_000, 1_980, 1_998));
        assert_eq!(percentile::<u32>(&[], 0.5), None);
        assert_eq!(percentile(&times[..1], 0.999), Some(times[0]));
    }

    #[test]
    fn what_is_only_stated_is_in_the_table_and_missed_by_none() {
        let mut samples = Samples::default();
        samples.add("holdfast-hub-2-threads", "hub_in", "Mb/s", 3_000.0);
        samples.add("holdfast-hub-1-thread", "hub_in", "Mb/s", 4_000.0);
        let verdict = verdict::judge("tunnel", &samples.figures("tunnel"));
        let [tunnel, ..] = BENCHES else { panic!() };
        let said = text(tunnel, &samples, &verdict);
        let row = said.lines().find(|line| line.contains("stated")).unwrap();
        assert!(row.contains("beside holdfast-hub-1-thread") && row.contains("0.750"));
        let said = lines("tunnel", &samples, &verdict).unwrap();
        assert!(
            said.contains(r#""missed":[]"#) && !said.contains(r#""ok""#),
            "{said}"
        );
    }

    #[test]
    fn a_missed_number_and_a_case_that_was_not_measured_are_told() {
        let mut samples = Samples::default();
        samples.add("agent", "first_name", "ms", 2_001.0);
        samples.error("other", &anyhow::anyhow!("no such program"));
        let verdict = verdict::judge("start", &samples.figures("start"));
        let said = lines("start", &samples, &verdict).unwrap();
        assert!(
            said.contains(r#""missed":["start/agent/first_name"]"#),
            "{said}"
        );
        assert!(said.contains(r#""error":"no such program""#), "{said}");
        assert!(
            said.contains(r#""unjudged":["start/agent/first_service_answer <= 2 s"]"#),
            "{said}"
        );
        let [.., start] = BENCHES else { panic!() };
        let said = text(start, &samples, &verdict);
        assert!(said.contains("MISSED") && said.contains("NOT MEASURED: other: no such program"));
    }
}
