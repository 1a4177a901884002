//! How long new flows still go to endpoints behind a path that died: real agents, each at a site of its own, of which
//! one after the other is cut off, without a word.

use std::{fmt::Write as _, fs, path::Path, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{link::Impairment, mesh::Mesh, nat::NatKind, node::Process, tool};
use serde_json::Value;

use super::client::Client;
use crate::bench::UP_LIMIT;

/// Paths that die, one after the other: no one's return is waited for.
const DEATHS: u8 = 5;

/// The node of the client, and its site.
const CLIENT: u8 = 0;

/// The service, of which each node but the client's has an endpoint, all of them equally far.
const SERVICE: &str = "10.43.0.80:80";

const ENDPOINT_PORT: u16 = 8080;

/// To the internet and back, a site.
const DELAY: Duration = Duration::from_millis(10);

/// New flows begin so long before a path dies,
const BEFORE: Duration = Duration::from_millis(500);

/// and so long go on: what is asked for is a second.
const WATCHED: Duration = Duration::from_millis(3_000);

fn node(number: u8) -> String {
    format!("node-{number}")
}

/// Everything that the mesh is told, and the service.
fn manifests() -> Result<String> {
    let mut text = "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default}\nspec: \
                    {overlayIPv4CIDR: 100.96.0.0/12}\n---\napiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshRelay\n\
                    metadata: {name: cloud-relay}\nspec: {addresses: [198.51.100.10]}\n"
        .to_owned();
    for number in CLIENT..=DEATHS + 1 {
        let name = node(number);
        writeln!(
            text,
            "---\napiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshNode\nmetadata: {{name: {name}}}\nspec: \
             {{overlayIPv4: 100.96.9.{number}, site: site-{number}}}"
        )?;
    }
    text += "---\napiVersion: v1\nkind: Service\nmetadata: {name: asked, namespace: bench}\nspec: {clusterIP: 10.43.0.80, \
             ports: [{port: 80, targetPort: 8080}]}\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: \
             {name: asked-1, namespace: bench, labels: {kubernetes.io/service-name: asked}}\naddressType: IPv4\nports: \
             [{port: 8080}]\nendpoints:\n";
    for number in CLIENT + 1..=DEATHS + 1 {
        let name = node(number);
        writeln!(
            text,
            "- {{addresses: [100.96.9.{number}], nodeName: {name}}}"
        )?;
    }
    Ok(text)
}

/// A mesh with the client's node, one that stays, and those that die.
fn mesh(bins: &Path) -> Result<Mesh> {
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("bench.yaml"), manifests()?)?;
    let mut mesh = Mesh::start(bins, folder.path())?;
    mesh.start_relay()?;
    let link = Impairment::delay_loss(DELAY, 0.0);
    for number in CLIENT..=DEATHS + 1 {
        let wan = [203, 0, 113, 1 + number].into();
        let (site, host) = (format!("site-{number}"), node(number));
        mesh.add_site(&site, NatKind::PortRestricted, wan, link, &[&host])?;
        mesh.start_agent(&host)?;
    }
    for number in CLIENT..=DEATHS + 1 {
        mesh.agent_ready(&node(number), u64::from(DEATHS) + 2)?;
    }
    Ok(mesh)
}

/// For each path: from the first connect that had no answer until the last, 5 ms apart.
///
/// # Errors
///
/// If the mesh does not come up.
pub(super) fn measure(bins: &Path) -> Result<Vec<Duration>> {
    let program = bins.join("services-bench").display().to_string();
    let mesh = mesh(bins)?;
    let mut servers: Vec<Process> = Vec::new();
    for number in CLIENT + 1..=DEATHS + 1 {
        let listen = format!("0.0.0.0:{ENDPOINT_PORT}");
        let words = [program.as_str(), "serve", &listen];
        servers.push(mesh.node(&node(number))?.spawn("server", &words)?);
    }
    let own = mesh.node(&node(CLIENT))?;
    let mut client = Client::start(&own, &program, own.cgroup())?;
    tool::eventually("direct paths to all endpoints", UP_LIMIT, || {
        servers.iter_mut().try_for_each(Process::running)?;
        client.times("first_byte", SERVICE, 16)?;
        let direct = direct_peers(&mesh)?;
        ensure!(direct > usize::from(DEATHS), "{direct} direct paths");
        Ok(())
    })?;
    let deaths = CLIENT + 1..=DEATHS;
    deaths
        .map(|number| death(&mesh, number, &mut client))
        .collect()
}

fn direct_peers(mesh: &Mesh) -> Result<usize> {
    let peers = mesh.ask(&node(CLIENT), &["peers"])?;
    let peers = peers.pointer("/peers").and_then(Value::as_array);
    let peers = peers.context("no peers")?.iter();
    let state = |peer: &&Value| peer.pointer("/state").and_then(Value::as_str) == Some("direct");
    Ok(peers.filter(state).count())
}

fn death(mesh: &Mesh, number: u8, client: &mut Client) -> Result<Duration> {
    let site = format!("site-{number}");
    let link = mesh.site(&site)?.link();
    let (unanswered, cut) = thread::scope(|scope| {
        let cut = scope.spawn(|| {
            thread::sleep(BEFORE);
            link.set_down(true)
        });
        (client.unanswered(SERVICE, WATCHED), cut.join())
    });
    cut.ok().context("whoever cuts paths panicked")??;
    let (count, time) = unanswered?;
    ensure!(count > 0, "no flow went to {site} when it was cut off");
    ensure!(
        time + BEFORE < WATCHED,
        "flows went to {site} until nobody looked any more"
    );
    Ok(time)
}
