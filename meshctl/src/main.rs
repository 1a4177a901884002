//! Command line over the agent's admin socket and the controller.
//!
//! **Invariant:** it shows what a daemon says and decides nothing itself; keys and tokens go
//! where the person asked for them, and nowhere else.

#![forbid(unsafe_code)]

mod approve;
mod bpf;
mod bugreport;
mod capture;
mod cli;
mod connect;
mod connectivity;
mod dns;
mod doctor;
mod drops;
mod events;
mod failure;
mod files;
mod generate;
mod keys;
mod kubectl;
mod lab;
mod mtu;
mod perf;
mod policy;
mod preflight;
mod process;
mod reach;
mod relays;
mod report;
mod routes;
mod run;
mod show;
mod snapshot;
mod sniff;
mod table;
mod top;
mod trace;
mod tunnel;
mod uninstall;

use std::{
    io::{self, IsTerminal as _, Write as _},
    process::ExitCode,
};

use clap::Parser as _;

use crate::{cli::Cli, failure::Failure, run::Screen};

/// How well things are, as an exit code. Scripts rely on these numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verdict {
    /// All is well.
    Ok = 0,
    /// It works, but somebody should look.
    Degraded = 1,
    /// It does not work, or nobody is there to say.
    Down = 2,
    /// The question was wrong (`EX_USAGE` of sysexits.h).
    Usage = 64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let usage = error.use_stderr();
            error.print().ok(); // A closed pipe: nobody reads it.
            let verdict = if usage { Verdict::Usage } else { Verdict::Ok };
            return ExitCode::from(verdict as u8);
        }
    };
    let json = cli.json;
    let screen = Screen {
        json,
        colours: io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
    };
    let verdict = match run::run(cli, screen).await {
        Ok(verdict) => verdict,
        Err(failure) => report(&failure, json),
    };
    ExitCode::from(verdict as u8)
}

fn report(failure: &Failure, json: bool) -> Verdict {
    if json {
        writeln!(io::stdout(), "{}", failure.to_json()).ok();
    }
    writeln!(io::stderr(), "meshctl: {failure}").ok();
    failure.verdict()
}
