//! What one more peer costs in memory: an agent, and a WireGuard device.

use std::{fmt::Write as _, net::Ipv4Addr, path::PathBuf, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    mesh::{CLOUD, word},
    node::Process,
    tool,
};
use serde_json::Value;

use super::{
    install::Tool,
    peers,
    world::{Ends, NODES_JOINED, Route, World},
};
use crate::bench::{LEFT, RIGHT, UP_LIMIT};

/// Nodes that run and have a path to the one that is measured. Each takes some 12 MiB of this machine.
const LIVE: u8 = 32;

/// Nodes that have joined and do not run.
const IDLE: u32 = 500;

/// Nodes that join at once: so, 500 take 8.5 s on two cores.
const JOINING: usize = 8;

/// What the live nodes' agents go without: it is not they that are measured.
const LIVE_LINES: &str = "services = false\npacket_threads = 1\n";

/// By then an agent has looked for better paths and written its snapshot, which it does once a second.
const AGENT_SETTLE: Duration = Duration::from_secs(3);

/// Enough that pages and the allocator's own steps do not matter: 1,000 × 4 bytes are a page.
const DEVICE_PEERS: u32 = 1_000;

/// A runtime that starts takes a moment until its memory no longer changes.
const DEVICE_SETTLE: Duration = Duration::from_millis(500);

/// Resident memory of an agent for each further peer with a session, a direct path and one in reserve, in KiB:
/// from before that node joins.
///
/// # Errors
///
/// If a node does not come up.
pub(super) fn per_live_peer_kib(world: &World) -> Result<f64> {
    let (mut agents, before) = one_peer(world)?;
    let numbers = 1..=LIVE;
    let names: Vec<_> = numbers
        .clone()
        .map(|number| format!("live-{number}"))
        .collect();
    for (name, number) in names.iter().zip(numbers) {
        let address = Ipv4Addr::new(203, 0, 113, number);
        world.mesh.lab().public_node(name, address)?;
        world.mesh.start_agent_with(name, LIVE_LINES)?;
    }
    for name in &names {
        world.mesh.agent_ready(name, NODES_JOINED)?;
        world.path(Route::Direct, name)?;
        tool::eventually("a path in reserve", UP_LIMIT, || has_reserve(world, name))?;
    }
    let after = settled(&agents)?;
    let status = world.mesh.status(LEFT)?;
    let direct = status.pointer("/peers/direct").and_then(Value::as_u64);
    let all = u64::from(LIVE) + 1;
    ensure!(direct == Some(all), "not {all} direct paths: {status}");
    for name in &names {
        world.mesh.kill(name, "mesh-agent")?;
    }
    agents.iter_mut().try_for_each(stop)?;
    Ok((after - before) / f64::from(LIVE))
}

/// Whether the left node's agent keeps a path through the relay beside the direct one.
fn has_reserve(world: &World, peer: &str) -> Result<()> {
    let why = world.mesh.ask(LEFT, &["path", "why", peer])?;
    let paths = why.pointer("/paths").and_then(Value::as_array);
    let mut paths = paths.into_iter().flatten();
    let reserve =
        paths.any(|path| word(path, "kind") == "relay" && word(path, "state") == "standby");
    ensure!(reserve, "none: {why}");
    Ok(())
}

/// The same for each further peer that does not run: the agent learns of them while it runs, by and by.
///
/// # Errors
///
/// If a node cannot join.
pub(super) fn per_idle_peer_kib(world: &World) -> Result<f64> {
    let (mut agents, before) = one_peer(world)?;
    let status = world.mesh.status(LEFT)?;
    let known = status.pointer("/snapshot/nodes").and_then(Value::as_u64);
    join(world)?;
    let all = known.context("no number of nodes")? + u64::from(IDLE);
    world.mesh.agent_ready(LEFT, all)?;
    let after = settled(&agents)?;
    agents.iter_mut().try_for_each(stop)?;
    Ok((after - before) / f64::from(IDLE))
}

/// Agents on both ends with a path to each other, the measured one first, and what that one takes.
fn one_peer(world: &World) -> Result<(Vec<Process>, f64)> {
    world.allow(Route::Direct)?;
    let agents = world.agents(&[(LEFT, ""), (RIGHT, "")])?;
    world.path(Route::Direct, RIGHT)?;
    let resident = settled(&agents)?;
    Ok((agents, resident))
}

fn settled(agents: &[Process]) -> Result<f64> {
    thread::sleep(AGENT_SETTLE);
    let measured = agents.first().context("no agent")?;
    Ok(measured.resident_kib()? as f64)
}

fn stop(agent: &mut Process) -> Result<()> {
    agent.terminate(UP_LIMIT).map(drop)
}

/// Lets [`IDLE`] nodes join as every node does, by agents, which are killed once they have a certificate.
fn join(world: &World) -> Result<()> {
    let token = world.mesh.token_for(IDLE)?;
    let numbers: Vec<_> = (1..=IDLE).collect();
    for numbers in numbers.chunks(JOINING) {
        let joining = numbers.iter().map(|number| joiner(world, *number, &token));
        for (agent, state) in joining.collect::<Result<Vec<_>>>()? {
            tool::eventually("a node has joined", UP_LIMIT, || {
                let joined = state.join("identity.pem").exists();
                ensure!(joined, "it has not: {}", agent.log());
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// An agent that joins, beside the controller, and its state folder.
fn joiner(world: &World, number: u32, token: &str) -> Result<(Process, PathBuf)> {
    let cloud = world.mesh.cloud();
    let name = format!("idle-{number}");
    let state = cloud.dir().join(&name);
    // There is an interface `wan` that is no TUN device: an agent that is killed late gets no further than that.
    let config = format!(
        "node_name = \"{name}\"\ncontroller = \"{CLOUD}:7440\"\ntoken = \"{token}\"\n\
         state_dir = \"{0}\"\nadmin_socket = \"{0}/agent.sock\"\ninterface = \"wan\"\n",
        state.display()
    );
    let config = cloud.write(&format!("{name}.toml"), &config)?;
    let config = config.display().to_string();
    let agent = cloud.spawn(
        "idle",
        &[&world.mesh.bin("mesh-agent"), "--config", &config],
    )?;
    Ok((agent, state))
}

/// Resident memory of a WireGuard device for each further peer that is configured, without a session, in KiB.
///
/// # Errors
///
/// If the device does not come up or refuses the configuration.
pub(super) fn per_device_peer_kib(ends: &Ends, tool: &Tool, words: &[&str]) -> Result<f64> {
    let daemon = peers::wireguard_device(&ends.left, tool, words)?;
    let device = peers::DEVICE;
    let key = ends
        .left
        .write("bench.key", &tool::run("wg", &["genkey"], "")?)?;
    let set = format!("wg set {device} private-key {}", key.display());
    peers::shell(&ends.left, &format!("{set} && ip link set {device} up"))?;
    let mut resident = [0.0; 2];
    for (kib, numbers) in resident.iter_mut().zip([0..1, 1..DEVICE_PEERS + 1]) {
        let config = numbers.map(peer).collect::<String>();
        let config = ends.left.write("peers.conf", &config)?;
        peers::shell(
            &ends.left,
            &format!("wg addconf {device} {}", config.display()),
        )?;
        thread::sleep(DEVICE_SETTLE);
        *kib = daemon.resident_kib()? as f64;
    }
    let [one, all] = resident;
    Ok((all - one) / f64::from(DEVICE_PEERS))
}

/// A peer's section. Its key is no one's: 32 bytes, written as 43 characters and `=`.
fn peer(number: u32) -> String {
    let [_, _, high, low] = number.to_be_bytes();
    let mut section = "[Peer]\n".to_owned();
    writeln!(section, "PublicKey = {number:0>42}A=").ok();
    writeln!(section, "AllowedIPs = 10.78.{high}.{low}/32").ok();
    section
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_have_keys_and_addresses_of_their_own() {
        let section = peer(259);
        let key = section
            .lines()
            .find_map(|line| line.strip_prefix("PublicKey = "));
        assert_eq!(key.map(str::len), Some(44));
        assert!(
            section.ends_with("AllowedIPs = 10.78.1.3/32\n"),
            "{section}"
        );
        assert_ne!(peer(1), peer(2));
    }
}
