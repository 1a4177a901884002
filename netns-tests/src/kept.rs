//! Meshes that stay: `lab up` makes one, `lab run` enters its nodes, `lab down` takes it away. `meshctl lab` is the door.

use std::{
    env, fmt::Write as _, fs, net::Ipv4Addr, os::unix::process::CommandExt as _, path::Path,
    process::Command, time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use serde_json::Value;

use crate::{
    lab,
    link::Impairment,
    mesh::Mesh,
    nat::{HOSTS_MAX, NatKind},
    node, tool,
};

/// Sites have letters and an address of 203.0.113.0/24 each.
pub const SITES_MAX: usize = 26;

/// At some 15 MiB for an agent, 1 GiB.
pub const NODES_MAX: usize = 64;

/// Of `lab up NAT`, as in RFC 4787's words.
const NATS: [(&str, NatKind); 7] = [
    ("none", NatKind::None),
    ("full-cone", NatKind::FullCone),
    ("restricted-cone", NatKind::RestrictedCone),
    ("port-restricted", NatKind::PortRestricted),
    ("symmetric", NatKind::Symmetric),
    ("symmetric-random", NatKind::SymmetricRandom),
    ("double", NatKind::Double),
];

/// What is made.
#[derive(Debug)]
pub struct Wanted {
    /// Machines at sites, one after the other to each.
    pub nodes: usize,
    /// Sites.
    pub sites: usize,
    /// Their NATs, in turn.
    pub nats: Vec<NatKind>,
    /// Each site's link to the internet.
    pub link: Impairment,
}

/// A mesh that stays.
#[derive(Debug, Serialize)]
pub struct Up {
    id: String,
    dir: String,
    /// Controller and relay run there.
    cloud: Place,
    nodes: Vec<UpNode>,
}

#[derive(Debug, Serialize)]
struct UpNode {
    site: String,
    nat: &'static str,
    overlay_addresses: Vec<String>,
    #[serde(flatten)]
    place: Place,
}

#[derive(Debug, Serialize)]
struct Place {
    name: String,
    netns: String,
    cgroup: String,
    /// Configuration, state, logs, and the admin socket.
    dir: String,
    admin_socket: String,
}

impl Place {
    fn of(node: &node::Node, socket: &str) -> Self {
        Self {
            name: node.name().to_owned(),
            netns: node.netns().to_owned(),
            cgroup: node.cgroup().display().to_string(),
            dir: node.dir().display().to_string(),
            admin_socket: node.dir().join(socket).display().to_string(),
        }
    }
}

/// Kinds of NAT, one after the other, by their names with commas between.
///
/// # Errors
///
/// If a name is none.
pub fn nats(text: &str) -> Result<Vec<NatKind>> {
    let kind = |name: &str| {
        let known = NATS.iter().find(|(known, _)| *known == name);
        let names = || NATS.map(|(known, _)| known).join(", ");
        let known = known.with_context(|| format!("{name:?} is no NAT: {}", names()))?;
        Ok(known.1)
    };
    text.split(',').map(kind).collect()
}

fn name_of(nat: NatKind) -> &'static str {
    let known = NATS.iter().find(|(_, kind)| *kind == nat);
    known.map_or("", |(name, _)| name)
}

/// The nodes of each site: `edge-a1` is the first of the first.
fn plan(nodes: usize, sites: usize) -> Result<Vec<(String, Vec<String>)>> {
    ensure!(
        (1..=SITES_MAX).contains(&sites),
        "{sites} sites: 1 to {SITES_MAX}"
    );
    let most = NODES_MAX.min(sites * HOSTS_MAX);
    ensure!(
        (1..=most).contains(&nodes),
        "{nodes} nodes at {sites} sites: 1 to {most}"
    );
    let letters = ('a'..='z').take(sites).enumerate();
    Ok(letters
        .map(|(site, letter)| {
            let own = (site..nodes).step_by(sites).zip(1..);
            let own = own.map(|(_, number)| format!("edge-{letter}{number}"));
            (format!("site-{letter}"), own.collect())
        })
        .collect())
}

fn manifest(sites: &[(String, Vec<String>)]) -> String {
    let mut text = format!(
        "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{name: default}}\n\
         spec: {{overlayIPv4CIDR: 100.96.0.0/12, clusterDomain: cluster.local, nodeDomain: mesh}}\n---\n\
         apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshRelay\nmetadata: {{name: cloud-relay}}\n\
         spec: {{addresses: [{}]}}\n",
        crate::mesh::CLOUD
    );
    for (site, nodes) in sites {
        for node in nodes {
            // Writing to a String cannot fail.
            write!(
                text,
                "---\napiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshNode\nmetadata: {{name: {node}}}\n\
                 spec: {{site: {site}}}\n"
            )
            .unwrap_or_default();
        }
    }
    text
}

/// Makes it, with the binaries beside this one; every agent knows every other when it is done.
///
/// # Errors
///
/// If it cannot be as it is wanted, or does not come up: nothing is left then.
pub fn up(wanted: &Wanted) -> Result<Up> {
    let sites = plan(wanted.nodes, wanted.sites)?;
    let own = tool::binary("lab")?;
    let bins = own.parent().context("the lab binary has no folder")?;
    let manifests = tempfile::tempdir()?;
    fs::write(manifests.path().join("mesh.yaml"), manifest(&sites))?;
    let mut mesh = Mesh::start(bins, manifests.path())?;
    mesh.start_relay()?;
    let mut nats = wanted.nats.iter().copied().cycle();
    let mut at = Vec::new();
    for (last, (site, hosts)) in (1..).zip(&sites) {
        let nat = nats.next().context("no NAT")?;
        let wan = Ipv4Addr::new(203, 0, 113, last);
        let seed = u64::from(last);
        let link = Impairment {
            seed,
            ..wanted.link
        };
        let hosts: Vec<_> = hosts.iter().map(String::as_str).collect();
        mesh.add_site(site, nat, wan, link, &hosts)?;
        at.extend(hosts.into_iter().map(|host| (host, site, nat)));
    }
    let each = |act: &dyn Fn(&str) -> Result<()>| at.iter().try_for_each(|(host, ..)| act(host));
    each(&|host| mesh.start_agent(host))?;
    let all = u64::try_from(wanted.nodes)?;
    each(&|host| mesh.agent_ready(host, all))?;
    mesh.all_run()?;
    let known = mesh.known_nodes()?;
    let nodes = at.iter().map(|(host, site, nat)| {
        Ok(UpNode {
            site: (*site).clone(),
            nat: name_of(*nat),
            overlay_addresses: addresses(&known, host),
            place: Place::of(&mesh.node(host)?, "agent.sock"),
        })
    });
    let nodes = nodes.collect::<Result<_>>()?;
    let cloud = Place::of(mesh.cloud(), "controller.sock");
    let dir = mesh.lab().dir().display().to_string();
    let id = mesh.keep()?;
    Ok(Up {
        id,
        dir,
        cloud,
        nodes,
    })
}

fn addresses(known: &Value, name: &str) -> Vec<String> {
    let nodes = known.pointer("/nodes").and_then(Value::as_array);
    let mut nodes = nodes.into_iter().flatten();
    let node = nodes.find(|node| node.get("name").and_then(Value::as_str) == Some(name));
    let addresses = node.and_then(|node| node.get("overlay_addresses")?.as_array());
    let addresses = addresses.into_iter().flatten();
    addresses
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect()
}

/// Becomes a command on a node of a lab that stays. It finds the node's daemons at their usual sockets, and the binaries beside this one.
///
/// # Errors
///
/// Always when it returns: it could not become the command.
pub fn run(id: &str, name: &str, words: &[String]) -> Result<()> {
    let kept = lab::kept();
    let nodes = kept.iter().find(|lab| lab.id == id).map(|lab| &lab.nodes);
    let nodes = nodes.with_context(|| format!("no lab {id} is up"))?;
    ensure!(
        nodes.iter().any(|node| node == name),
        "no node {name} in lab {id}; there is {}",
        nodes.join(", ")
    );
    let dir = lab::dir_of(id).join(name);
    let cgroup = lab::cgroup_mount()?.join(id).join(name);
    node::enter(&format!("{id}-{name}"), &cgroup, &dir)?;
    fs::create_dir_all("/run/holdfast")?;
    rustix::mount::mount_bind(&dir, "/run/holdfast").context("bind /run/holdfast")?;
    let own = tool::binary("lab")?;
    let bins = own.parent().unwrap_or(Path::new("/")).display().to_string();
    let path = env::var("PATH").unwrap_or_default();
    let (program, arguments) = words.split_first().context("no command")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("PATH", format!("{bins}:{path}"));
    Err(command.exec()).with_context(|| format!("execute {program}"))
}

/// `DELAY_MS LOSS` of each site's link.
///
/// # Errors
///
/// If they are no numbers.
pub fn link(delay_ms: &str, loss: &str) -> Result<Impairment> {
    let delay = Duration::from_millis(delay_ms.parse().context("DELAY_MS")?);
    Ok(Impairment::delay_loss(delay, loss.parse().context("LOSS")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_come_to_the_sites_in_turn() {
        let own = |names: &[&str]| {
            names
                .iter()
                .map(|&name| name.to_owned())
                .collect::<Vec<_>>()
        };
        let expected = [
            ("site-a".to_owned(), own(&["edge-a1", "edge-a2"])),
            ("site-b".to_owned(), own(&["edge-b1"])),
        ];
        assert_eq!(plan(3, 2).unwrap(), expected);
        assert_eq!(plan(NODES_MAX, SITES_MAX).unwrap().len(), SITES_MAX);
        for (nodes, sites) in [(0, 1), (1, 0), (HOSTS_MAX + 1, 1), (65, 26), (1, 27)] {
            assert!(plan(nodes, sites).is_err(), "{nodes} {sites}");
        }
    }

    #[test]
    fn every_nat_has_a_name() {
        for (name, kind) in NATS {
            assert_eq!((nats(name).unwrap(), name_of(kind)), (vec![kind], name));
        }
        assert_eq!(nats("none,double").unwrap().len(), 2);
        assert!(nats("cone").unwrap_err().to_string().contains("full-cone"));
    }
}
