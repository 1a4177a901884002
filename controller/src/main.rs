//! `mesh-controller --config FILE`.
//!
//! **Invariant:** arguments, log and exit code; everything else is in the library.

#![forbid(unsafe_code)]

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Parser;
use mesh_controller::{config::Settings, run::run};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Desired state, node registry, certificate authority, delta distribution.
#[derive(Debug, Parser)]
#[command(version, name = "mesh-controller")]
struct Args {
    /// The configuration (TOML).
    #[arg(long)]
    config: PathBuf,
}

/// `EX_USAGE` of sysexits.h: the operator must change the configuration.
const EXIT_CONFIG: u8 = 64;

fn main() -> ExitCode {
    let args = Args::try_parse().unwrap_or_else(|error| {
        // Help and version go to stdout and are no error.
        let code = if error.use_stderr() { EXIT_CONFIG } else { 0 };
        error.print().ok();
        std::process::exit(code.into())
    });
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let settings = match Settings::read(&args.config) {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("Error: mesh-controller cannot start\n{error}");
            return ExitCode::from(EXIT_CONFIG);
        }
    };
    match serve(settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error:?}");
            ExitCode::FAILURE
        }
    }
}

fn serve(settings: Settings) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("no async runtime")?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        run(settings, stop).await
    })
}
