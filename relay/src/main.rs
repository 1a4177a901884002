//! `mesh-relay`: carries encrypted packets between nodes that cannot reach each other.
//!
//! **Invariant:** everything else is in the library.

#![forbid(unsafe_code)]

use std::{
    future::ready,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use mesh_daemon::{Daemon, NotifyState, metrics, notify, stop_signal};
use mesh_relay::{
    config::Settings,
    server::{Relay, RelayHandle},
};
use tokio::time;
use tokio_util::sync::CancellationToken;

/// How often the certificate's files are read: 4 KiB, and nobody waits for it.
const LOOK_EVERY: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let daemon = Daemon {
        name: "mesh-relay",
        about: "Carries encrypted packets between nodes that cannot reach each other",
        version: env!("CARGO_PKG_VERSION"),
        config: "/etc/holdfast/relay.toml",
    };
    daemon.main(Settings::load, |settings| run(&settings))
}

#[tokio::main]
async fn run(settings: &Settings) -> anyhow::Result<()> {
    let told = stop_signal().context("cannot listen for signals")?;
    let relay = Relay::bind(
        &settings.listen,
        &settings.credentials,
        settings.limits.clone(),
    )?;
    let handle = relay.handle();
    notify(NotifyState::Ready);
    let stop = CancellationToken::new();
    let shown = handle.clone();
    let page = move || ready(shown.metrics());
    tokio::spawn(metrics::serve(settings.metrics, page, stop.clone()));
    let mut serving = Box::pin(relay.run(stop.clone()));
    tokio::select! {
        ended = &mut serving => return Ok(ended?),
        () = follow_files(settings, &handle) => {}
        () = told => {}
    }
    notify(NotifyState::Stopping);
    stop.cancel();
    Ok(serving.await?)
}

/// Shows a new certificate within [`LOOK_EVERY`] of its files' change; what cannot be used is said once, and
/// the former one stays.
async fn follow_files(settings: &Settings, relay: &RelayHandle) {
    let mut shown = settings.credentials.chain_pem();
    let mut complaint = String::new();
    let mut looks = time::interval(LOOK_EVERY);
    loop {
        looks.tick().await;
        let read = settings.files.read().map_err(|error| error.to_string());
        let taken = read.and_then(|credentials| {
            if credentials.identity() != settings.credentials.identity() {
                return Err(format!("they belong to {:?}", credentials.identity()));
            }
            let chain = credentials.chain_pem();
            if chain != shown {
                relay
                    .set_credentials(&credentials)
                    .map_err(|error| error.to_string())?;
                let days = credentials
                    .validity()
                    .remaining(SystemTime::now())
                    .as_secs()
                    / 86_400;
                tracing::info!(valid_days = days, "a new certificate is shown from now on");
                shown = chain;
            }
            Ok(())
        });
        let problem = taken.err().unwrap_or_default();
        if !problem.is_empty() && problem != complaint {
            tracing::warn!(%problem, "the certificate's files cannot be used; the former certificate stays");
        }
        complaint = problem;
    }
}
