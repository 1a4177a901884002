//! The controller with a large cluster and many agents, an agent that has nothing to do, and pods that are connected at
//! once: the real programs, and around them `controlplane-bench`.
//!
//! **Of a controller** that follows the API server's stand-in over HTTPS, with simulated agents that joined and have a
//! connection and a `Sync` stream each, and a few real ones with maps in the kernel; all on the same processors:
//!
//! | metric | what it is |
//! |---|---|
//! | `ready` | from the start of a controller that never saw this cluster until it has read all of it and published it |
//! | `restarted` | from SIGTERM to a controller that has all agents until all are up to date by the next one; agents come back at their own pace |
//! | `restarted_wire` | what they and the controller then told each other, for each agent, with all headers |
//! | `first_answers` | from the first connect until the last of the simulated agents, all at once and with nothing, has everything |
//! | `first_answer` | how large that is |
//! | `change_p50`, `_p99`, `_max` | from the patch of one endpoint, before the API server is asked, until a simulated agent has it; of every agent and change |
//! | `map_p50`, `_p99`, `_max` | the same until it is in a real agent's eBPF map |
//! | `change_message` | the size of such a change's message |
//! | `change_wire` | what an agent and the controller told each other for each change, both ways, with all headers |
//! | `change_cpu` | processor time of the controller for each change, without what it takes idle |
//! | `idle_cpu` | share of a processor that it takes with all agents connected and nothing to do |
//! | `join` | how long a node that joins takes then, one of twenty, eight at a time |
//! | `resident`, `resident_peak` | memory after the changes; the most it ever had |
//! | `agent_resident` | memory of a real agent with so many endpoints |
//!
//! **Of an agent** that has woken paths to its peers and nothing to do: `resident`, and `cpu`, the share of a processor
//! over a minute.
//!
//! **Of a plug-in**, by 50 processes at once for 50 pods: `add_p50`, `_p99` and `_max`, how long ADD takes, from before the
//! process is started until it has ended; `all`, until the last has; `del_p50` and `_p99`.

pub(super) mod cases;
mod cluster;
pub(super) mod idle;
mod pods;

use std::time::Duration;

use anyhow::{Result, ensure};

use self::cases::{BRIDGE, CASES, Case, Kind};
use super::{Options, Samples, choose, percentile};

/// Refuses names of cases that there are not.
///
/// # Errors
///
/// With the names that there are.
pub(super) fn check(options: &Options) -> Result<()> {
    ensure!(
        options.peers.is_empty(),
        "bench controlplane has no --peers: choose cases by --only"
    );
    chosen(options).map(drop)
}

fn chosen(options: &Options) -> Result<Vec<&'static Case>> {
    choose(CASES, |case| case.name, &options.only)
}

/// Measures the controllers and the idle agents once, some ten minutes, and the plug-ins in turns, `rounds` times.
///
/// A case that cannot be measured is told by name.
///
/// # Errors
///
/// Never: what failed is in the samples.
pub(super) fn run(options: &Options, samples: &mut Samples) -> Result<bool> {
    let mut plugins = Vec::new();
    for case in chosen(options)? {
        let measured = match case.kind {
            Kind::Cluster(size) => {
                eprintln!("{}", case.name);
                cluster::measure(&options.bins, case.name, size, samples)
            }
            Kind::Idle(idle) => {
                eprintln!("{}", case.name);
                idle::measure(&options.bins, case.name, idle, samples)
            }
            Kind::Pods(plugin) => {
                plugins.push((case.name, plugin));
                Ok(())
            }
        };
        if let Err(error) = measured {
            samples.error(case.name, &error);
        }
    }
    if !plugins.is_empty() {
        eprintln!("pods");
        pods::measure(&options.bins, &plugins, options.rounds, samples)?;
    }
    Ok(samples.errors().all(|(case, _)| case == BRIDGE))
}

/// Whether there is a case of this name.
#[cfg(test)]
pub(super) fn is_case(name: &str) -> bool {
    CASES.iter().any(|case| case.name == name)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Notes median, 99th percentile and highest of some times, by these names.
fn tell(samples: &mut Samples, case: &str, names: [&'static str; 3], times: &mut [Duration]) {
    times.sort_unstable();
    for (name, share) in names.into_iter().zip([0.5, 0.99, 1.0]) {
        if let Some(time) = percentile(times, share) {
            samples.add(case, name, "ms", ms(time));
        }
    }
}
