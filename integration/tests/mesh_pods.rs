//! Pods that the CNI plug-in wired, on nodes with real agents: through the mesh, past both stacks, under policy, and while
//! an agent is away.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may fail loudly")]

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    mesh::{COMMAND_LIMIT, Mesh},
    node::Node,
    tool,
};
use serde_json::{Value, json};

const A: &str = "edge-a1";
const B: &str = "edge-b1";
const PORT: u16 = 9300;
const SOON: Duration = Duration::from_secs(10);
const ANSWER_LIMIT: Duration = Duration::from_millis(500);

/// A network namespace that the plug-in connects.
struct Pod {
    on: &'static str,
    name: String,
    node: Node,
    addresses: Vec<IpAddr>,
}

fn state(mesh: &Mesh, node: &str) -> Result<PathBuf> {
    Ok(mesh.node(node)?.dir().join("cni"))
}

/// Has the plug-in do `verb` for `pod`, as a container runtime on its node would.
fn plug_in(mesh: &Mesh, pod: &Pod, verb: &str) -> Result<Value> {
    let host = mesh.node(pod.on)?;
    let config = json!({"cniVersion": "1.1.0", "name": "mesh", "type": "mesh-cni", "stateDir": state(mesh, pod.on)?});
    let path = host.write("network.conf", &config.to_string())?;
    let mut command = host.command(&[mesh.bin("mesh-cni")])?;
    command
        .env("CNI_COMMAND", verb)
        .env("CNI_CONTAINERID", &pod.name)
        .env("CNI_NETNS", Path::new("/run/netns").join(pod.node.netns()))
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", "/opt/cni/bin")
        .stdin(File::open(path)?);
    let output = host.run_with(command, COMMAND_LIMIT)?;
    let said = format!("{}{}", output.stdout, output.stderr);
    ensure!(output.status.success(), "{verb} {}: {said}", pod.name);
    if output.stdout.trim().is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_str(&output.stdout).context(said)
}

impl Pod {
    fn add(mesh: &Mesh, on: &'static str, name: &str) -> Result<Self> {
        let mut pod = Self {
            on,
            name: name.to_owned(),
            node: mesh.lab().add_node(name)?,
            addresses: Vec::new(),
        };
        let result = plug_in(mesh, &pod, "ADD")?;
        let ips = result.get("ips").and_then(Value::as_array);
        for ip in ips.into_iter().flatten() {
            let text = ip.get("address").and_then(Value::as_str);
            let text = text.unwrap_or_default();
            let (address, _) = text.split_once('/').context("no prefix length")?;
            pod.addresses.push(address.parse()?);
        }
        ensure!(pod.addresses.len() == 2, "{result}");
        Ok(pod)
    }

    fn manifest(&self) -> String {
        let [v4, v6] = self.addresses.as_slice() else {
            panic!("{} has not two addresses", self.name);
        };
        let name = &self.name;
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}\nspec: \
             {{nodeName: {}, containers: []}}\nstatus: {{podIP: {v4}, podIPs: [{{ip: {v4}}}, {{ip: \"{v6}\"}}]}}\n",
            self.on
        )
    }

    fn listen(&self, address: IpAddr) -> Result<TcpListener> {
        Ok(self.node.enter(|| TcpListener::bind((address, PORT)))??)
    }

    fn connect(&self, to: IpAddr) -> Result<TcpStream> {
        let to = SocketAddr::new(to, PORT);
        let connect = || TcpStream::connect_timeout(&to, ANSWER_LIMIT);
        Ok(self.node.enter(connect)??)
    }
}

fn talk(from: &mut TcpStream, to: &mut TcpStream) -> Result<()> {
    to.set_read_timeout(Some(SOON))?;
    from.write_all(b"hello")?;
    let mut heard = [0; 5];
    to.read_exact(&mut heard)?;
    ensure!(&heard == b"hello", "{heard:?}");
    Ok(())
}

/// How often packets went past the stack into the tunnel, and into pods.
fn redirected(mesh: &Mesh, node: &str) -> Result<[u64; 2]> {
    let status = mesh.status(node)?;
    let count = |counter: &str| {
        let at = format!("/service_packets/redirect_{counter}");
        status.pointer(&at).and_then(Value::as_u64).unwrap_or(0)
    };
    Ok([count("to_tunnel"), count("to_pod")])
}

fn restart(mesh: &Mesh, node: &str) -> Result<()> {
    mesh.take(node, "mesh-agent")?.terminate(SOON)?;
    start(mesh, node)
}

fn start(mesh: &Mesh, node: &str) -> Result<()> {
    let lines = format!("[cni]\nstate_dir = {:?}\n", state(mesh, node)?);
    mesh.start_agent_with(node, &lines)?;
    mesh.agent_ready(node, 2)
}

#[test]
fn pods_of_the_plug_in_are_in_the_mesh_under_policy_and_outlive_the_agent() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let range = |name: &str, site: u8| {
        let ranges = format!("\"10.244.{site}.0/24\", \"fd44:{site}::/64\"");
        format!(
            "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDRs: [{ranges}]}}\n"
        )
    };
    let nodes = range(A, 1) + &range(B, 2);
    fs::write(mesh.manifests().join("nodes.yaml"), &nodes)?;
    for node in [A, B] {
        let host = mesh.node(node)?;
        host.sysctl("net/ipv4/ip_forward", "1")?;
        host.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        restart(&mesh, node)?;
    }
    // The ranges came with the mesh: nobody configured them on the nodes.
    let web = tool::eventually("the agent said the ranges", SOON, || {
        let there = state(&mesh, A)?.join("network.json");
        fs::read_to_string(&there).context("network.json")
    });
    ensure!(web?.contains("10.244.1.0/24"));
    let web = Pod::add(&mesh, A, "web")?;
    tool::eventually("the other agent too", SOON, || {
        fs::read_to_string(state(&mesh, B)?.join("network.json")).context("network.json")
    })?;
    let db = Pod::add(&mesh, B, "db")?;
    let near = Pod::add(&mesh, B, "near")?;
    for (own, other) in web.addresses.iter().zip(&db.addresses) {
        let listener = db.listen(*other)?;
        let mut client = tool::eventually("a path", SOON, || web.connect(*other))?;
        let (mut server, from) = listener.accept()?;
        ensure!(from.ip() == *own, "{from}");
        tool::eventually("both agents redirect", SOON, || {
            for (from, to) in [(A, B), (B, A)] {
                let before = (redirected(&mesh, from)?[0], redirected(&mesh, to)?[1]);
                for _ in 0..10 {
                    talk(&mut client, &mut server)?;
                    talk(&mut server, &mut client)?;
                }
                let now = (redirected(&mesh, from)?[0], redirected(&mesh, to)?[1]);
                let more = (
                    now.0.saturating_sub(before.0),
                    now.1.saturating_sub(before.1),
                );
                ensure!(more.0 >= 10 && more.1 >= 10, "{before:?} {now:?}");
            }
            Ok(())
        })?;
    }

    // Nobody may speak with db: nobody on its own node either, and no pod that comes while the agent is away.
    let rule = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: db, namespace: shop}\n\
                spec: {podSelector: {matchLabels: {app: db}}, ingress: []}\n";
    let pods = web.manifest() + &db.manifest() + &near.manifest();
    fs::write(mesh.manifests().join("pods.yaml"), pods)?;
    fs::write(mesh.manifests().join("policy.yaml"), rule)?;
    let (address, listener) = (db.addresses[0], db.listen(db.addresses[0])?);
    for pod in [&web, &near] {
        tool::eventually("db is alone", SOON, || {
            ensure!(pod.connect(address).is_err(), "{} comes in", pod.name);
            Ok(())
        })?;
    }
    mesh.take(B, "mesh-agent")?.terminate(SOON)?;
    let late = Pod::add(&mesh, B, "late")?;
    // Two pods of one node need no agent.
    let late_listens = late.listen(late.addresses[1])?;
    near.connect(late.addresses[1])?;
    late_listens.accept()?;
    start(&mesh, B)?;
    let refused = late.connect(address);
    ensure!(refused.is_err(), "{refused:?}");
    drop(listener);
    let problems = mesh.status(B)?;
    let problems = problems.pointer("/problems").map(Value::to_string);
    ensure!(problems.as_deref() == Some("[]"), "{problems:?}");

    // Gone is gone, and an address can be had again.
    for pod in [&web, &db, &near, &late] {
        plug_in(&mesh, pod, "DEL")?;
        plug_in(&mesh, pod, "DEL")?;
    }
    for node in [A, B] {
        let links = mesh
            .node(node)?
            .run(&["ip", "-br", "link"], COMMAND_LIMIT)?
            .ok()?;
        ensure!(!links.contains("hfp"), "{links}");
    }
    mesh.all_run()
}
