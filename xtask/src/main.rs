//! What developers and CI call: `demo`, `test`, `bench`, `instructions`, `soak`, `wireguard-netns`,
//! `crdgen`, `package`, `reference`, `tidy`.
//!
//! **Invariant:** nothing here is needed to build or to run the product, and nothing is skipped in
//! silence: what cannot run is a failure that says what is missing.

#![forbid(unsafe_code)]

mod bench;
mod demo;
mod instructions;
mod links;
mod package;
mod reference;
mod report;
mod setup;
mod sid;
mod soak;
mod test;
mod tidy;
mod wireguard_netns;

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    about = "Holdfast's developer commands; run as root"
)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Shows the main job: NAT traversal, services, names, relays, life without the cloud.
    Demo {
        /// One JSON object a line instead of a table.
        #[arg(long)]
        json: bool,
        /// Leave the lab up at the end, and say how to look around.
        #[arg(long)]
        keep: bool,
    },
    /// Runs every check and every test, as CI does.
    Test {
        /// The same, longer: more cases, scenarios three times, WireGuard's own script.
        #[arg(long)]
        nightly: bool,
    },
    /// Measures. Without a name: says which benches there are.
    Bench {
        /// `tunnel`, `services`, `controlplane`, `paths`, `dns`, `offline` or `start`.
        name: Option<String>,
        /// One JSON object a line instead of a table.
        #[arg(long)]
        json: bool,
        /// Write the figures to `docs/bench/`.
        #[arg(long)]
        save: bool,
        /// Interleaved rounds.
        #[arg(long, default_value_t = 5)]
        rounds: u32,
        /// Other programs to measure beside ours, by name, with commas between; all if left out.
        #[arg(long, value_delimiter = ',')]
        peers: Vec<String>,
        /// Measure these cases and nothing else.
        #[arg(long, value_delimiter = ',', conflicts_with = "peers")]
        only: Vec<String>,
        /// Keep idle processors from sleeping: without what it takes to wake them, which is the machine's.
        #[arg(long)]
        awake: bool,
        /// Measure the binaries in this folder instead of building them.
        #[arg(long)]
        bins: Option<PathBuf>,
    },
    /// Counts the instructions of the packet path's inner loops, for each packet.
    Instructions {
        /// Write the counts to `docs/bench/`.
        #[arg(long)]
        save: bool,
    },
    /// Two tunnels under traffic while sessions, paths and addresses change: ten minutes.
    Soak {
        /// So long instead.
        #[arg(long)]
        seconds: Option<u64>,
        /// Two hours.
        #[arg(long)]
        nightly: bool,
    },
    /// WireGuard's own test script, with `mesh-tunnel` as the WireGuard.
    WireguardNetns {
        /// This script instead of the one that comes with the kernel's source.
        script: Option<PathBuf>,
        /// So many times.
        #[arg(long, default_value_t = 1)]
        runs: u32,
    },
    /// Writes the custom resources to `deploy/kubernetes/crds/`.
    Crdgen,
    /// Makes what is installed: static binaries, Debian packages or container images, in `target/package/`.
    Package {
        what: package::What,
        #[arg(long, default_value = "amd64")]
        machine: package::Machine,
        /// Use the binaries in this folder instead of building static ones.
        #[arg(long)]
        bins: Option<PathBuf>,
    },
    /// Writes `docs/reference/`: configuration, commands, metrics, custom resources, limits, from the code and what programs say.
    Reference {
        /// Only say what is not as it would be written.
        #[arg(long)]
        check: bool,
        /// Ask the binaries in this folder instead of building them.
        #[arg(long)]
        bins: Option<PathBuf>,
    },
    /// Checks the rules that no compiler knows.
    Tidy,
}

fn main() -> ExitCode {
    let held = match Arguments::parse().verb {
        Verb::Demo { json, keep } => demo::run(json, keep),
        Verb::Test { nightly } => test::run(nightly),
        Verb::Bench {
            name,
            json,
            save,
            rounds,
            peers,
            only,
            awake,
            bins,
        } => {
            let options = bench::Options {
                bins: bins.unwrap_or_default(),
                rounds,
                peers,
                only,
                awake,
            };
            bench::run(name.as_deref(), json, save, options)
        }
        Verb::Instructions { save } => instructions::run(save),
        Verb::Soak { seconds, nightly } => soak::run(seconds, nightly),
        Verb::WireguardNetns { script, runs } => wireguard_netns::run(script.as_deref(), runs),
        Verb::Crdgen => crdgen(),
        Verb::Package {
            what,
            machine,
            bins,
        } => package::run(what, machine, bins),
        Verb::Reference { check, bins } => reference::run(check, bins),
        Verb::Tidy => tidy::run(),
    };
    match held {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Knows of Kubernetes' types, and is built only when it is asked for.
fn crdgen() -> Result<bool> {
    let status = cargo(&["run", "--quiet", "-p", "integration", "--bin", "crdgen"]).status();
    Ok(status.context("start cargo")?.success())
}

/// The workspace's root folder.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or_else(|| Path::new("."))
}

/// `cargo`, the one that runs us, in the root folder.
fn cargo(words: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(words).current_dir(root());
    command
}

/// Builds every binary of the workspace and says where they are.
fn build(release: bool) -> Result<PathBuf> {
    let mut words = vec!["build", "--workspace", "--bins"];
    if release {
        words.push("--release");
    }
    eprintln!("building ({}) …", if release { "release" } else { "debug" });
    let status = cargo(&words).status().context("start cargo")?;
    ensure!(status.success(), "cargo {} failed", words.join(" "));
    let target =
        env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    Ok(target.join(if release { "release" } else { "debug" }))
}
