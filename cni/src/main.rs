//! `mesh-cni`: what a container runtime executes, and what puts it into place.
//!
//! **Invariant:** everything else is in the library. The standard output is the runtime's alone.

#![forbid(unsafe_code)]

use std::{
    env,
    io::{self, Write as _},
    process::ExitCode,
};

use clap::Parser as _;
use mesh_cni::{
    install::{self, Cli},
    plugin,
};

/// `EX_USAGE` of sysexits.h.
const USAGE: u8 = 64;

fn main() -> ExitCode {
    if env::var_os("CNI_COMMAND").is_some() {
        return answer();
    }
    match Cli::try_parse() {
        Ok(cli) => match install::run(&cli) {
            Ok(lines) => {
                let lines: String = lines.into_iter().map(|line| line + "\n").collect();
                say(&lines)
            }
            Err(error) => {
                eprintln!("mesh-cni: {error}");
                ExitCode::FAILURE
            }
        },
        Err(error) => {
            let usage = error.use_stderr();
            error.print().ok(); // A closed pipe: nobody reads it.
            if usage {
                ExitCode::from(USAGE)
            } else {
                ExitCode::SUCCESS
            }
        }
    }
}

fn answer() -> ExitCode {
    // What is no text is as good as not there: it is no id, name or path that the rules allow.
    let lookup = |name: &str| env::var(name).ok();
    match plugin::run(lookup, io::stdin().lock()) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(result)) => say(&format!("{result}\n")),
        Err((version, error)) => {
            eprintln!("mesh-cni: {error}");
            say(&format!("{}\n", error.to_json(version)));
            ExitCode::FAILURE
        }
    }
}

fn say(text: &str) -> ExitCode {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-cni: cannot write to the standard output: {error}");
            ExitCode::FAILURE
        }
    }
}
