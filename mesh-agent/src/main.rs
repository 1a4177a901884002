//! `mesh-agent`: the Holdfast node daemon.
//!
//! **Invariant:** everything is in the library.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use mesh_agent::{agent, config::Settings};
use mesh_daemon::{Daemon, Subcommand};

fn main() -> ExitCode {
    let daemon = Daemon {
        name: "mesh-agent",
        about: "Tunnels, services and names for this node",
        version: env!("CARGO_PKG_VERSION"),
        config: "/etc/holdfast/agent.toml",
    };
    let remove = Subcommand {
        name: "remove",
        about: "Ends the services that a stopped agent left in the kernel",
        run: |settings| agent::remove(&settings),
    };
    let purge = Subcommand {
        name: "purge",
        about: "The same, and forgets who this node is: its keys, certificate and snapshot",
        run: |settings| agent::purge(&settings),
    };
    let stay = Subcommand {
        name: "stay",
        about: "Does nothing until it is stopped: what a DaemonSet needs after its init containers",
        run: |_| agent::stay(),
    };
    daemon.main_with(Settings::read, agent::run, &[remove, purge, stay])
}
