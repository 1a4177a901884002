//! The stand-in for a Kubernetes API server as a program, for walk-throughs with `kubectl`:
//! `kube-standin <kubeconfig> [<address:port>]` writes the kubeconfig file and serves until it is
//! ended. It keeps everything in memory.
//!
//! **Invariant:** it listens where it is told to, on 127.0.0.1 unless it is, and writes one file.

#![forbid(unsafe_code)]

use std::{env, fs, os::unix::fs::OpenOptionsExt as _, path::Path, process::ExitCode};

use anyhow::{Context as _, Result};
use integration::apiserver::{Options, Standin};

const USAGE: &str = "usage: kube-standin <kubeconfig> [<address:port>]";

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error:?}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<()> {
    let mut arguments = env::args().skip(1);
    let kubeconfig = arguments.next().context(USAGE)?;
    let mut options = Options::default();
    if let Some(address) = arguments.next() {
        options.listen = address
            .parse()
            .with_context(|| format!("{address:?} is no address:port; {USAGE}"))?;
    }
    let standin = Standin::start(options).await?;
    write(Path::new(&kubeconfig), &standin.kubeconfig())?;
    println!("{}", standin.url());
    tokio::signal::ctrl_c().await.context("wait for the end")?;
    Ok(())
}

/// The file holds the administrator's key: nobody else reads it.
fn write(path: &Path, kubeconfig: &str) -> Result<()> {
    use std::io::Write as _;
    let mut file = fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("write {}", path.display()))?;
    file.write_all(kubeconfig.as_bytes())?;
    Ok(())
}
