//! What `cargo xtask bench controlplane` has around the controller: a cluster for it to follow, and agents that follow it.
//!
//! **Invariant:** nothing here knows which case it is part of, and nothing here judges a figure.

#![forbid(unsafe_code)]

mod away;
mod cluster;
mod deploy;
mod fleet;
mod maps;
mod stream;

use std::{env, path::Path, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines, Stdin, stdin};

use crate::{
    cluster::{Cluster, Size},
    fleet::Fleet,
};

const USAGE: &str = "usage: controlplane-bench cluster FOLDER SERVICES ENDPOINTS NODES
                                  an API server with so many services, endpoints of each, and nodes; FOLDER/kubeconfig is
                                  the controller's
       controlplane-bench fleet ADDR:PORT TOKEN_FILE
                                  agents of the controller there
then questions on standard input, until it ends";

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    match dispatch(&words).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("controlplane-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn dispatch(words: &[String]) -> Result<()> {
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["cluster", folder, services, endpoints, nodes] => {
            let size = Size {
                services: services.parse().context("SERVICES")?,
                endpoints: endpoints.parse().context("ENDPOINTS")?,
                nodes: nodes.parse().context("NODES")?,
            };
            Cluster::start(Path::new(folder), size).await?.run().await
        }
        ["fleet", controller, token] => Fleet::new(controller, Path::new(token))?.run().await,
        _ => bail!("{USAGE}"),
    }
}

/// Questions, a line each.
fn questions() -> Lines<BufReader<Stdin>> {
    BufReader::new(stdin()).lines()
}

/// Answers one: `{"Ok":…}` or `{"Err":"…"}`.
fn say(question: &str, answer: Result<Value>) -> Result<()> {
    let answer = answer.map_err(|error| format!("{question}: {error:#}"));
    println!("{}", serde_json::to_string(&answer)?);
    Ok(())
}

/// The machine's clock for intervals, which all its processes share, in nanoseconds.
fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let (seconds, nanoseconds) = (now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs());
    seconds * 1_000_000_000 + nanoseconds
}
