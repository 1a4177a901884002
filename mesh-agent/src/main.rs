//! The Holdfast node daemon: arguments, log, exit code.
//!
//! **Invariant:** everything else is in the library.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use mesh_agent::{agent, config::Settings};
use tracing_subscriber::{EnvFilter, fmt};

/// The Holdfast node daemon: tunnels, services and names for this node.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file (TOML).
    #[arg(long, default_value = "/etc/holdfast/agent.toml")]
    config: PathBuf,
    /// What to log, as `tracing` filters: `info`, `mesh_core=debug`, …
    #[arg(long, default_value = "info")]
    log: EnvFilter,
}

/// Bad configuration (`EX_USAGE`, sysexits.h).
const EXIT_USAGE: u8 = 64;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            error.print().ok(); // Nowhere else to say it.
            return if error.use_stderr() {
                EXIT_USAGE.into()
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(arguments.log)
        .init();
    let settings = match Settings::read(&arguments.config) {
        Ok(settings) => settings,
        Err(error) => return fail(&error.into(), EXIT_USAGE),
    };
    match agent::run(settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, 1),
    }
}

fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    eprintln!("Error: mesh-agent cannot go on: {error:#}");
    code.into()
}
