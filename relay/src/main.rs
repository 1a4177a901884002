//! `mesh-relay`: carries encrypted packets between nodes that cannot reach each other.
//!
//! **Invariant:** everything else is in the library.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::Context as _;
use mesh_daemon::{Daemon, NotifyState, notify, stop_signal};
use mesh_relay::{config::Settings, server::Relay};
use tokio_util::sync::CancellationToken;

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
    let relay = Relay::bind(settings)?;
    notify(NotifyState::Ready);
    let stop = CancellationToken::new();
    let mut serving = Box::pin(relay.run(stop.clone()));
    tokio::select! {
        ended = &mut serving => return Ok(ended?),
        () = told => {}
    }
    notify(NotifyState::Stopping);
    stop.cancel();
    Ok(serving.await?)
}
