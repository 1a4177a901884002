//! What `cargo xtask bench services` runs inside its namespaces: a client and a server that measure and
//! answer, and Holdfast's service tables without the agent around them.
//!
//! **Invariant:** nothing here knows which case it is part of, and nothing here judges a figure.

#![forbid(unsafe_code)]

mod client;
mod server;
mod tables;

use std::{env, net::SocketAddr, path::Path, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

const USAGE: &str = "usage: services-bench serve ADDR:PORT…  answers by TCP and UDP, for ever
       services-bench ask CGROUP        moves there; then a question a line on standard input:
           connect|first_byte|round_trip|datagram ADDR:PORT[,ADDR:PORT…] COUNT
           bulk|unanswered ADDR:PORT[,ADDR:PORT…] MILLISECONDS
       services-bench hold CGROUP TABLE [serve=INTERFACE] [pod=INTERFACE…] [sockmap=ADDR:PORT,…]
                                        fills the maps from a file, a line each frontend (tcp|udp ADDR:PORT
                                        ENDPOINT…), for the processes of the cgroup, and for what comes in by
                                        the interface; packets between pods go past the stack, connections to
                                        endpoints after `sockmap=` past TCP; for ever
       services-bench change CGROUP SERVICES ENDPOINTS CHANGES
                                        one endpoint of one service at a time, so many times";

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    match dispatch(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("services-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(words: &[String]) -> Result<()> {
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["serve", listen @ ..] => {
            let listen = listen.iter().map(|word| word.parse());
            server::run(&listen.collect::<Result<Vec<_>, _>>().context("ADDR:PORT")?)
        }
        ["ask", cgroup] => client::run(Path::new(cgroup)),
        ["hold", cgroup, table, interfaces @ ..] => {
            let mut places = tables::Places::default();
            for word in interfaces {
                match word.split_once('=') {
                    Some(("serve", name)) => places.served.push(name.to_owned()),
                    Some(("pod", name)) => places.pods.push(name.to_owned()),
                    Some(("sockmap", endpoints)) => {
                        let endpoints = endpoints.split(',').map(str::parse::<SocketAddr>);
                        let endpoints = endpoints.collect::<Result<Vec<_>, _>>();
                        places.sockmap.extend(endpoints.context("ADDR:PORT")?);
                    }
                    _ => bail!("{word}: {USAGE}"),
                }
            }
            tables::hold(Path::new(cgroup), Path::new(table), &places)
        }
        ["change", cgroup, services, endpoints, changes] => {
            let size = tables::Size {
                services: services.parse().context("SERVICES")?,
                endpoints: endpoints.parse().context("ENDPOINTS")?,
            };
            tables::change(Path::new(cgroup), size, changes.parse().context("CHANGES")?)
        }
        _ => bail!("{USAGE}"),
    }
}

/// Keeps this process to one of the processors that it may use, the one that so many come before. The client and the
/// server have one each, where there are two: where the scheduler puts them would otherwise decide what a wake-up
/// costs, and differ from case to case by more than what is measured.
///
/// # Errors
///
/// If the kernel does not say which there are.
fn keep_to(place: usize) -> Result<()> {
    let all = sched_getaffinity(None).context("ask for the processors")?;
    let usable = (0..CpuSet::MAX_CPU).filter(|&processor| all.is_set(processor));
    let usable: Vec<_> = usable.collect();
    if let Some(&processor) = usable.get(place) {
        let mut one = CpuSet::new();
        one.set(processor);
        sched_setaffinity(None, &one).context("keep to a processor")?;
    }
    Ok(())
}
