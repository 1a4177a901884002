//! `mesh-controller`: desired state, node registry, certificate authority, delta distribution.
//!
//! **Invariant:** everything else is in the library.

#![forbid(unsafe_code)]

use std::{env, ffi::OsString, process::ExitCode};

use anyhow::Context as _;
use mesh_controller::{config::Settings, policy_test, ready::ready, run::run};
use mesh_daemon::{Daemon, Subcommand};
use tokio_util::sync::CancellationToken;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    if let Some((command, rest)) = arguments.split_first()
        && command == policy_test::COMMAND
    {
        return policy_test::main(rest);
    }
    let daemon = Daemon {
        name: "mesh-controller",
        about: "Desired state, node registry, certificate authority, delta distribution",
        version: env!("CARGO_PKG_VERSION"),
        config: "/etc/holdfast/controller.toml",
    };
    let ready = Subcommand {
        name: "ready",
        about: "Asks the controller that runs whether it serves agents: 0, or 1 with the reason",
        run: ready,
    };
    daemon.main_with(Settings::read, serve, &[ready])
}

fn serve(settings: Settings) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("no async runtime")?;
    runtime.block_on(run(settings, CancellationToken::new()))
}
