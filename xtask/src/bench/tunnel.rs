//! Ways from one node to another: the wire, Holdfast's paths, and other programs' tunnels, in turns.
//! Only one is up at a time, so that nobody's timers and pages are in another's figures.

mod cases;
mod install;
mod load;
mod memory;
mod peers;
mod world;

use anyhow::{Context as _, Result};

#[cfg(test)]
pub(super) use self::cases::is_case;
pub(super) use self::cases::is_peer;
use self::{
    cases::{Case, Kind},
    install::Tool,
    world::{Route, World},
};
use super::{Figure, Options, Samples};
use crate::report;

/// Refuses names of cases that there are not.
///
/// # Errors
///
/// With the names that there are.
pub(super) fn check(options: &Options) -> Result<()> {
    cases::choose(options).map(drop)
}

/// Measures every case in each round, 5 × (16 × some 18 s + 2 hubs × 5 s), once 15 × 15 s until daemons are idle, 29 minutes
/// together, and at the end what further peers take, half a minute.
///
/// A case that cannot be measured is told by name. That another program cannot be had is no failure of the
/// bench; that one of our own cannot is.
///
/// # Errors
///
/// If the lab does not come up.
pub(super) fn run(options: &Options, samples: &mut Samples) -> Result<bool> {
    let chosen = cases::choose(options)?;
    let mut ready: Vec<(&Case, Option<Tool>)> = Vec::new();
    for case in chosen {
        match case.get(&options.bins) {
            Ok(tool) => {
                if let Some(tool) = &tool {
                    samples.version(case.name, &tool.version);
                }
                ready.push((case, tool));
            }
            Err(error) => samples.error(case.name, &error),
        }
    }
    let world = World::new(&options.bins)?;
    for round in 1..=options.rounds {
        for (case, tool) in &ready {
            eprintln!("round {round} of {}: {}", options.rounds, case.name);
            let measured = measure(&world, case, tool.as_ref(), samples);
            if let Err(error) = measured.with_context(|| format!("round {round}")) {
                samples.error(case.name, &error);
            }
        }
    }
    for (case, tool) in &ready {
        let measured = measure_peers(&world, case, tool.as_ref(), samples);
        if let Err(error) = measured.context("memory of peers") {
            samples.error(case.name, &error);
        }
    }
    Ok(samples.errors().all(|(case, _)| is_peer(case)))
}

/// Measures what further peers take, of ours.
fn measure_peers(
    world: &World,
    case: &Case,
    tool: Option<&Tool>,
    samples: &mut Samples,
) -> Result<()> {
    let mut add = |metric, kib| samples.add(case.name, metric, "KiB", kib);
    match (&case.kind, tool) {
        (Kind::Agents(Route::Direct, ""), _) => {
            eprintln!("memory of peers: {}", case.name);
            // First those with a session: agents of theirs have fewer peers then.
            add("resident_per_live_peer", memory::per_live_peer_kib(world)?);
            add("resident_per_peer", memory::per_idle_peer_kib(world)?);
        }
        (Kind::WireGuard { words, .. }, Some(tool)) if !is_peer(case.name) => {
            eprintln!("memory of peers: {}", case.name);
            let kib = memory::per_device_peer_kib(&world.ends, tool, words)?;
            add("resident_per_peer", kib);
        }
        (
            Kind::Raw
            | Kind::Agents(..)
            | Kind::Hub(_)
            | Kind::WireGuard { .. }
            | Kind::Other { .. },
            _,
        ) => {}
    }
    Ok(())
}

fn measure(world: &World, case: &Case, tool: Option<&Tool>, samples: &mut Samples) -> Result<()> {
    let up = world.start(case, tool)?;
    load::measure(world, case.name, &up, samples)?;
    up.stop()
}

/// The columns of [`overview`]: a heading, the metrics in it, and what their figures are divided by.
const COLUMNS: &[(&str, &[&str], f64)] = &[
    // A hub has no figures for one peer, and the others have none for two.
    (
        "TCP 1/4/16 (hub: out/in), Gb/s",
        &["tcp_1", "tcp_4", "tcp_16", "hub_out", "hub_in"],
        1e3,
    ),
    ("CPU s/GB", &["cpu_per_gb"], 1.0),
    ("UDP 64/1200 B, kpps", &["udp_64", "udp_1200"], 1.0),
    (
        "RTT p50/p99/p99.9, µs",
        &["rtt_p50", "rtt_p99", "rtt_p999"],
        1.0,
    ),
    (
        "the same beside bulk",
        &["loaded_rtt_p50", "loaded_rtt_p99", "loaded_rtt_p999"],
        1.0,
    ),
    ("MiB idle/peak", &["resident_idle", "resident_peak"], 1024.0),
];

/// Medians, a case a line.
pub(super) fn overview(figures: &[Figure]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for figure in figures {
        if !names.contains(&figure.case.as_str()) {
            names.push(&figure.case);
        }
    }
    let cell = |case: &str, metrics: &[&str], divisor: f64| {
        let medians = metrics.iter().filter_map(|metric| {
            let mut of = figures.iter().filter(|figure| figure.case == case);
            of.find(|figure| figure.metric == *metric)
        });
        let texts = medians.map(|figure| figure.median_text(divisor));
        texts.collect::<Vec<_>>().join("/")
    };
    let rows = names.iter().map(|name| {
        let cells = COLUMNS
            .iter()
            .map(|(_, metrics, divisor)| cell(name, metrics, *divisor));
        std::iter::once((*name).to_owned()).chain(cells).collect()
    });
    let header: Vec<_> = std::iter::once("case")
        .chain(COLUMNS.iter().map(|(heading, _, _)| *heading))
        .collect();
    report::table(&header, &rows.collect::<Vec<_>>())
}
