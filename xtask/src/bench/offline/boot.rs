//! A site boots with nobody there but itself.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use netns_tests::{mesh::Mesh, tool};

use super::{A1, A2, BOOT, SITE, ms, site};
use crate::bench::{Samples, UP_LIMIT};

/// How far the measured node's clock is off, in turns.
const CLOCKS: [&str; 2] = ["+10y", "-10y"];

/// Boots a round with each clock: many, as each takes a second.
const BOOTS: u32 = 5;

/// Boots the site again and again.
///
/// # Errors
///
/// If it does not come up, or the wrong one answers.
pub(super) fn measure(bins: &Path, rounds: u32, samples: &mut Samples) -> Result<()> {
    let mesh = site(bins)?;
    for node in [A1, A2] {
        // In an orderly way, so that all is on the disk that was told.
        mesh.take(node, "mesh-agent")?.terminate(UP_LIMIT)?;
    }
    let cloud = mesh.cloud().name().to_owned();
    mesh.kill(&cloud, "mesh-controller")?;
    mesh.kill(&cloud, "mesh-relay")?;
    mesh.site(SITE)?.link().set_down(true)?;
    for node in [A1, A2] {
        tool::ip(mesh.node(node)?.netns(), "route del default\n")?;
    }
    for round in 1..=rounds * BOOTS {
        eprintln!("boot {round} of {}", rounds * BOOTS);
        for clock in CLOCKS {
            boot(&mesh, clock, samples)?;
        }
    }
    Ok(())
}

/// From a state in which no agent runs to the next one.
fn boot(mesh: &Mesh, clock: &str, samples: &mut Samples) -> Result<()> {
    let node = mesh.node(A1)?;
    let lab = tool::binary("lab")?.display().to_string();
    for node in [A1, A2] {
        forget_kernel(mesh, node)?;
    }
    mesh.start_agent(A2)?;
    let config = node.dir().join("agent.toml").display().to_string();
    let agent = [mesh.bin("mesh-agent"), "--config".to_owned(), config];
    let begin = Instant::now();
    let words = [tool::with_clock(clock)?, agent.to_vec()].concat();
    mesh.put(A1, "mesh-agent", node.spawn("mesh-agent", &words)?);
    let awaited: [(&'static str, &[&str]); 3] = [
        (
            "name",
            &["await-name", "own.bench.svc.cluster.local", "10.43.0.1"],
        ),
        ("service", &["await-tcp", "10.43.0.1:80"]),
        ("peer", &["await-tcp", "10.43.0.2:80"]),
    ];
    let mut waiting = Vec::new();
    for (metric, words) in awaited {
        let process = node.spawn(metric, &[&[lab.as_str()], words].concat())?;
        waiting.push((metric, process));
    }
    while !waiting.is_empty() {
        let mut left = Vec::new();
        for (metric, mut process) in waiting {
            // Each gives up by itself.
            let Ok(status) = process.wait(Duration::from_millis(1)) else {
                left.push((metric, process));
                continue;
            };
            ensure!(status.success(), "{}", process.log());
            samples.add(BOOT, metric, "ms", ms(begin.elapsed()));
        }
        waiting = left;
    }
    let url = "http://near.bench.svc.cluster.local/";
    let hello = mesh.get(A1, &["-4", url], UP_LIMIT)?;
    ensure!(hello.node == A2, "{hello:?}");
    for node in [A1, A2] {
        mesh.kill(node, "mesh-agent")?;
    }
    Ok(())
}

/// Programs and maps of services outlive an agent, and no boot.
fn forget_kernel(mesh: &Mesh, node: &str) -> Result<()> {
    let node = mesh.node(node)?;
    let config = node.dir().join("agent.toml").display().to_string();
    let words = [&mesh.bin("mesh-agent"), "--config", &config, "remove"];
    node.run(&words, UP_LIMIT)?.ok().map(drop)
}
