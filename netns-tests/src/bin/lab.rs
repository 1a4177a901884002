//! The lab's helper processes: guardian, launcher, link, and the servers of scenarios.
//!
//! **Invariant:** a subcommand that changes the machine changes only what carries a lab's id.

#![forbid(unsafe_code)]

use std::{env, net::SocketAddr, path::Path, process::ExitCode, time::Duration};

use anyhow::{Context, Result, bail};
use netns_tests::{
    kept, lab,
    link::{self, Impairment},
    nat::NatKind,
    node, traffic,
};

const USAGE: &str = "usage: lab up NODES SITES NAT,… DELAY_MS LOSS  makes a mesh that stays, and says in JSON what it is
       lab list                           those that stay, in JSON
       lab run ID NODE COMMAND…           on a node of one
       lab down ID                        takes a kept lab away
       lab sweep                          takes away what dead owners left
       lab exec NETNS CGROUP DIR COMMAND…
       lab link NETNS IF NETNS IF CGROUP  orders on standard input
       lab hold                           makes a lab, and keeps it until standard input ends
       lab guard ID                       ends with its standard input
       lab http NAME ADDR:PORT…
       lab echo ADDR:PORT
       lab await-name NAME [ADDRESS]      until 169.254.53.53 has an A record of it, of ADDRESS
       lab await-tcp ADDR:PORT            until it can be connected to
       lab flow ADDR:PORT COUNT INTERVAL_MS SIZE_BYTES LINGER_MS";

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    match dispatch(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(words: &[String]) -> Result<()> {
    let (verb, rest) = words.split_first().context(USAGE)?;
    match (verb.as_str(), rest) {
        ("up", [nodes, sites, nats, delay_ms, loss]) => {
            let up = kept::up(&kept::Wanted {
                nodes: nodes.parse().context("NODES")?,
                sites: sites.parse().context("SITES")?,
                nats: kept::nats(nats)?,
                link: kept::link(delay_ms, loss)?,
            })?;
            println!("{}", serde_json::to_string(&up)?);
            Ok(())
        }
        ("list", []) => {
            println!("{}", serde_json::to_string(&lab::kept())?);
            Ok(())
        }
        ("run", [id, node, command @ ..]) => kept::run(id, node, command),
        ("down", [id]) => lab::teardown(id),
        ("sweep", []) => lab::sweep(),
        ("hold", []) => hold(),
        ("guard", [id]) => lab::guard(id),
        ("exec", [netns, cgroup, dir, command @ ..]) => {
            node::exec(netns, Path::new(cgroup), Path::new(dir), command)
        }
        ("link", [a_netns, a_if, b_netns, b_if, cgroup]) => {
            link::process::run((a_netns, a_if), (b_netns, b_if), Path::new(cgroup))
        }
        ("http", [name, listen @ ..]) => traffic::serve_http(name, &addresses(listen)?),
        ("echo", [listen]) => traffic::serve_echo(address(listen)?),
        ("await-name", [name]) => traffic::await_name(name, None),
        ("await-name", [name, address]) => {
            let address = address.parse();
            let address = address.with_context(|| format!("{name}: no IPv4 address"))?;
            traffic::await_name(name, Some(address))
        }
        ("await-tcp", [to]) => traffic::await_tcp(address(to)?),
        ("flow", [to, count, interval_ms, size_bytes, linger_ms]) => {
            let report = traffic::flow(
                address(to)?,
                count.parse().context("COUNT")?,
                Duration::from_millis(interval_ms.parse().context("INTERVAL_MS")?),
                size_bytes.parse().context("SIZE_BYTES")?,
                Duration::from_millis(linger_ms.parse().context("LINGER_MS")?),
            )?;
            println!("{}", serde_json::to_string(&report)?);
            Ok(())
        }
        _ => bail!("{USAGE}"),
    }
}

/// An owner that a test can kill.
fn hold() -> Result<()> {
    let lab = lab::Lab::new()?;
    let node = lab.public_node("idle", [203, 0, 113, 9].into())?;
    let _sleeper = node.spawn("sleep", &["sleep", "600"])?;
    let _site = lab.site(
        "s",
        NatKind::PortRestricted,
        [203, 0, 113, 1].into(),
        Impairment::NONE,
    )?;
    println!("{}", lab.id());
    std::io::stdin().read_line(&mut String::new())?;
    Ok(())
}

fn addresses(words: &[String]) -> Result<Vec<SocketAddr>> {
    words.iter().map(|word| address(word)).collect()
}

fn address(word: &str) -> Result<SocketAddr> {
    word.parse()
        .with_context(|| format!("{word} is not ADDR:PORT"))
}
