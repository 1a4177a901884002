//! `mesh-relay`: carries encrypted packets between nodes that cannot reach each other.
//!
//! **Invariant:** arguments, log and exit code; everything else is in the library.

#![forbid(unsafe_code)]

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Parser;
use mesh_relay::{config::Settings, server::Relay};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Exit code for a bad configuration (`EX_USAGE`).
const EXIT_CONFIG: u8 = 64;

/// Carries encrypted packets between nodes that cannot reach each other.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file.
    #[arg(long, default_value = "/etc/holdfast/relay.toml")]
    config: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::try_parse().unwrap_or_else(|error| {
        error.print().ok(); // Nowhere to say that stderr is gone.
        std::process::exit(if error.use_stderr() {
            EXIT_CONFIG.into()
        } else {
            0
        });
    });
    let filter = EnvFilter::try_from_env("HOLDFAST_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let settings = match Settings::load(&arguments.config) {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("mesh-relay cannot start: {error}");
            return ExitCode::from(EXIT_CONFIG);
        }
    };
    match run(&settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-relay: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(settings: &Settings) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let relay = Relay::bind(settings)?;
    notify(&[NotifyState::Ready]);
    let stop = CancellationToken::new();
    let mut serving = Box::pin(relay.run(stop.clone()));
    tokio::select! {
        ended = &mut serving => return Ok(ended?),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    notify(&[NotifyState::Stopping]);
    stop.cancel();
    Ok(serving.await?)
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "systemd was not notified");
    }
}
