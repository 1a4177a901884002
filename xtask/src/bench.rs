//! `cargo xtask bench NAME`: the harness, and what a figure looks like.

mod start;
mod tunnel;

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::Command,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail};
use netns_tests::{lab::Lab, mesh::Mesh};
use serde::Serialize;

use crate::{build, report, root, setup};

/// What a bench is called, what it measures, and the bench: rounds into samples.
type Bench = (
    &'static str,
    &'static str,
    fn(&Path, u32, &mut Samples) -> Result<()>,
);

const BENCHES: &[Bench] = &[
    (
        "tunnel",
        "throughput, latency, processor time and memory beside raw veth, wireguard-go, boringtun",
        tunnel::run,
    ),
    (
        "start",
        "agent start to the first name and the first service answer, and memory",
        start::run,
    ),
];

/// Every measured value by case and metric, in the order of their first appearance.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    order: Vec<(String, &'static str)>,
    values: BTreeMap<(String, &'static str), (&'static str, Vec<f64>)>,
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
                runs: sorted.len(),
                must: None,
                ratio: None,
                ok: None,
            })
        };
        let mut figures: Vec<_> = self.order.iter().filter_map(figure).collect();
        judge(&mut figures);
        figures
    }
}

/// One line of the output.
#[derive(Debug, Serialize)]
struct Figure {
    bench: &'static str,
    case: String,
    metric: &'static str,
    unit: &'static str,
    median: f64,
    min: f64,
    max: f64,
    runs: usize,
    /// What an issue asks for, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    must: Option<&'static str>,
    /// The median over what it is compared with.
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ok: Option<bool>,
}

/// The numbers that issues set. Issue 1 sets one: names and services within 2 s of a start.
fn judge(figures: &mut [Figure]) {
    for figure in figures.iter_mut() {
        if figure.bench == "start" && figure.metric.starts_with("first_") {
            figure.must = Some("<= 2000 ms");
            figure.ratio = Some(figure.median / 2_000.0);
            figure.ok = Some(figure.median <= 2_000.0);
        }
    }
}

/// Runs a bench with release builds. What it measures does not decide its success.
///
/// # Errors
///
/// If it could not measure.
pub(crate) fn run(name: Option<&str>, json: bool, save: bool, rounds: u32) -> Result<bool> {
    let found = BENCHES.iter().find(|(known, _, _)| Some(*known) == name);
    let Some((name, _, bench)) = found else {
        let list: Vec<_> = BENCHES
            .iter()
            .map(|(name, what, _)| format!("\n  {name}: {what}"))
            .collect();
        bail!(
            "cargo xtask bench NAME, where NAME is one of:{}",
            list.concat()
        );
    };
    setup::ready()?;
    let bins = build(true)?;
    let mut samples = Samples::default();
    bench(&bins, rounds, &mut samples)?;
    let figures = samples.figures(name);
    let mut lines = figures
        .iter()
        .map(serde_json::to_string)
        .collect::<Result<Vec<_>, _>>()?;
    let missed = figures.iter().filter(|figure| figure.ok == Some(false));
    let missed: Vec<_> = missed
        .map(|figure| format!("{}/{}/{}", figure.bench, figure.case, figure.metric))
        .collect();
    lines.push(serde_json::json!({"summary": true, "missed": missed}).to_string());
    if json {
        println!("{}", lines.join("\n"));
    } else {
        println!("{}", figure_table(&figures));
    }
    if save {
        save_figures(name, &figures, &lines)?;
    }
    Ok(true)
}

fn figure_table(figures: &[Figure]) -> String {
    let rows = figures.iter().map(|figure| {
        let range = format!("{:.2} – {:.2}", figure.min, figure.max);
        let must = match (figure.must, figure.ok) {
            (Some(must), Some(true)) => format!("{must}: held"),
            (Some(must), _) => format!("{must}: MISSED"),
            (None, _) => String::new(),
        };
        vec![
            figure.case.clone(),
            figure.metric.to_owned(),
            format!("{:.2}", figure.median),
            figure.unit.to_owned(),
            range,
            must,
        ]
    });
    report::table(
        &["case", "metric", "median", "unit", "range", "must"],
        &rows.collect::<Vec<_>>(),
    )
}

fn save_figures(name: &str, figures: &[Figure], lines: &[String]) -> Result<()> {
    let folder = root().join("docs/bench");
    fs::create_dir_all(&folder)?;
    let commit = said(
        "git",
        &[
            "-C",
            &root().display().to_string(),
            "describe",
            "--always",
            "--dirty",
        ],
    );
    let kernel = said("uname", &["-sr"]);
    let cpu = fs::read_to_string("/proc/cpuinfo")?;
    let cpu = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name\t: "))
        .unwrap_or("unknown processor");
    let cores = std::thread::available_parallelism()?;
    let day = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)?
        .as_secs()
        / 86_400;
    let text = format!(
        "# bench {name}\n\nCommit {commit}; {cores} cores of {cpu}; {kernel}; day {day} since 1970.\n\
         Made by `cargo xtask bench {name} --save`. Compare within one run only.\n\n```text\n{}\n```\n",
        figure_table(figures)
    );
    fs::write(folder.join(format!("{name}.md")), text)?;
    fs::write(
        folder.join(format!("{name}.jsonl")),
        lines.join("\n") + "\n",
    )
    .context("write docs/bench")?;
    Ok(())
}

fn said(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output();
    output
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .unwrap_or_default()
}

/// The second node of a bench's mesh.
pub(crate) const PEER: &str = "peer";

/// A mesh of two public nodes, `cloud` and [`PEER`], and a service with its endpoint on `PEER`.
///
/// # Errors
///
/// If something does not come up.
pub(crate) fn two_nodes(bins: &Path) -> Result<Mesh> {
    let manifests = tempfile::tempdir()?;
    fs::write(
        manifests.path().join("bench.yaml"),
        include_str!("bench/mesh.yaml"),
    )?;
    let mesh = Mesh::start(bins, manifests.path())?;
    let lab: &Lab = mesh.lab();
    lab.public_node(PEER, [198, 51, 100, 20].into())?;
    mesh.start_relay()?;
    for node in ["cloud", PEER] {
        mesh.start_agent(node)?;
    }
    for node in ["cloud", PEER] {
        mesh.agent_ready(node, 2)?;
    }
    Ok(mesh)
}

/// Until a daemon is up or a path is direct.
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
        let figures = samples.figures("start");
        let [name, memory] = figures.as_slice() else {
            panic!("{figures:?}")
        };
        assert_eq!(
            (name.median, name.min, name.max, name.runs),
            (2_000.0, 1_000.0, 3_000.0, 3)
        );
        assert_eq!((name.ok, memory.ok), (Some(true), None));
    }

    #[test]
    fn a_missed_number_is_told() {
        let mut samples = Samples::default();
        samples.add("agent", "first_name", "ms", 2_001.0);
        assert_eq!(samples.figures("start")[0].ok, Some(false));
    }
}
