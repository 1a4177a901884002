//! Pods that the CNI plug-in wired, on nodes with real agents: through the mesh, past both stacks, under policy, and while
//! an agent is away.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may fail loudly")]

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
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

/// Of Debian's `containernetworking-plugins`.
const STOCK_BRIDGE: &str = "/usr/lib/cni/bridge";

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
    let config = json!({"cniVersion": "1.1.0", "name": "mesh", "type": "mesh-cni", "masquerade": true, "stateDir": state(mesh, pod.on)?});
    call(mesh, pod, &mesh.bin("mesh-cni"), &config, verb)
}

/// The same for Debian's `bridge` and ours chained behind it.
fn behind_the_bridge(mesh: &Mesh, pod: &Pod, verb: &str) -> Result<Value> {
    let state = state(mesh, pod.on)?;
    let bridge = json!({
        "cniVersion": "1.0.0", "name": "mesh", "type": "bridge", "bridge": "cni0", "isGateway": true,
        "ipam": {
            "type": "host-local",
            "dataDir": state.join("host-local"),
            "ranges": [[{"subnet": "10.244.2.0/24"}], [{"subnet": "fd44:2::/64"}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        },
    });
    let ours = |previous: &Value| {
        json!({
            "cniVersion": "1.0.0", "name": "mesh", "type": "mesh-cni", "chained": true, "stateDir": state, "prevResult": previous,
        })
    };
    let ours = |previous: &Value| call(mesh, pod, &mesh.bin("mesh-cni"), &ours(previous), verb);
    let stock = || call(mesh, pod, STOCK_BRIDGE, &bridge, verb);
    if verb == "ADD" {
        return ours(&stock()?);
    }
    // Backwards, as runtimes do.
    ours(&Value::Null)?;
    stock()
}

fn call(mesh: &Mesh, pod: &Pod, program: &str, config: &Value, verb: &str) -> Result<Value> {
    let host = mesh.node(pod.on)?;
    let path = host.write(&format!("network-{}.conf", pod.name), &config.to_string())?;
    let mut command = host.command(&[program])?;
    command
        .env("CNI_COMMAND", verb)
        .env("CNI_CONTAINERID", pod.node.name())
        .env(
            "CNI_ARGS",
            format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={}",
                pod.name
            ),
        )
        .env("CNI_NETNS", Path::new("/run/netns").join(pod.node.netns()))
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", "/usr/lib/cni")
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
        Self::add_by(mesh, on, name, plug_in)
    }

    fn add_by(
        mesh: &Mesh,
        on: &'static str,
        name: &str,
        plug_in: fn(&Mesh, &Self, &str) -> Result<Value>,
    ) -> Result<Self> {
        Self::add_in(mesh, on, name, mesh.lab().add_node(name)?, plug_in)
    }

    fn add_in(
        mesh: &Mesh,
        on: &'static str,
        name: &str,
        node: Node,
        plug_in: fn(&Mesh, &Self, &str) -> Result<Value>,
    ) -> Result<Self> {
        let mut pod = Self {
            on,
            name: name.to_owned(),
            node,
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

    /// Takes the pod away and starts it again, as a kubelet does: with another network namespace, of this name.
    fn started_anew(self, mesh: &Mesh, sandbox: &str) -> Result<Self> {
        plug_in(mesh, &self, "DEL")?;
        let node = mesh.lab().add_node(sandbox)?;
        let again = Self::add_in(mesh, self.on, &self.name, node, plug_in)?;
        ensure!(
            again.addresses != self.addresses,
            "{:?} again",
            again.addresses
        );
        Ok(again)
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
        self.listen_at(address, PORT)
    }

    fn listen_at(&self, address: IpAddr, port: u16) -> Result<TcpListener> {
        Ok(self.node.enter(|| TcpListener::bind((address, port)))??)
    }

    fn connect(&self, to: IpAddr) -> Result<TcpStream> {
        self.connect_at(to, PORT)
    }

    fn connect_at(&self, to: IpAddr, port: u16) -> Result<TcpStream> {
        let to = SocketAddr::new(to, port);
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
    mesh.provokes(&["the maps left by another version or configuration are replaced"]);
    let lines = format!("[cni]\nstate_dir = {:?}\n", state(mesh, node)?);
    mesh.start_agent_with(node, &lines)?;
    mesh.agent_ready(node, 2)
}

/// Two nodes whose pods' ranges came with the mesh: nobody configured them on the nodes.
fn with_pod_ranges() -> Result<Mesh> {
    let mesh = Mesh::two_sites()?;
    let range = |name: &str, site: u8| {
        let ranges = format!("\"10.244.{site}.0/24\", \"fd44:{site}::/64\"");
        format!(
            "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDRs: [{ranges}]}}\n"
        )
    };
    let nodes = range(A, 1) + &range(B, 2);
    fs::write(mesh.manifests().join("nodes.yaml"), &nodes)?;
    for (node, range) in [(A, "10.244.1.0/24"), (B, "10.244.2.0/24")] {
        let host = mesh.node(node)?;
        host.sysctl("net/ipv4/ip_forward", "1")?;
        host.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        restart(&mesh, node)?;
        let path = state(&mesh, node)?.join("network.json");
        tool::eventually("the agent said the ranges", SOON, || {
            let said = fs::read_to_string(&path).context("network.json")?;
            ensure!(said.contains(range), "{said}");
            Ok(())
        })?;
    }
    Ok(mesh)
}

#[test]
fn pods_of_the_plug_in_are_in_the_mesh_under_policy_and_outlive_the_agent() -> Result<()> {
    let mesh = with_pod_ranges()?;
    let web = Pod::add(&mesh, A, "web")?;
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
    tool::eventually("a way on one node", SOON, || {
        near.connect(late.addresses[1])
    })?;
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
    mesh.ends_well()
}

#[test]
fn pods_of_the_stock_bridge_with_ours_behind_it_are_in_the_mesh_and_under_policy() -> Result<()> {
    let mesh = with_pod_ranges()?;
    let far = Pod::add(&mesh, A, "far")?;
    let [db, near] = ["db", "near"].map(|name| Pod::add_by(&mesh, B, name, behind_the_bridge));
    let (db, near) = (db?, near?);
    let others = [&far, &near];
    for (family, &address) in db.addresses.iter().enumerate() {
        let listener = db.listen(address)?;
        for pod in others {
            let mut client = tool::eventually("a path", SOON, || pod.connect(address))?;
            let (mut server, from) = listener.accept()?;
            ensure!(from.ip() == pod.addresses[family], "{from}");
            talk(&mut client, &mut server)?;
            talk(&mut server, &mut client)?;
        }
    }
    let rule = |ingress: &str| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: db, namespace: shop}}\n\
             spec: {{podSelector: {{matchLabels: {{app: db}}}}, ingress: [{ingress}]}}\n"
        )
    };
    let pods = far.manifest() + &db.manifest() + &near.manifest();
    fs::write(mesh.manifests().join("pods.yaml"), pods)?;
    let policy = mesh.manifests().join("policy.yaml");
    for (ingress, may) in [
        ("", [false, false]),
        (
            "{from: [{podSelector: {matchLabels: {app: near}}}]}",
            [false, true],
        ),
        (
            "{from: [{podSelector: {matchLabels: {app: far}}}]}",
            [true, false],
        ),
    ] {
        fs::write(&policy, rule(ingress))?;
        for &address in &db.addresses {
            let _listener = db.listen(address)?;
            tool::eventually(&format!("who may speak with {address}"), SOON, || {
                let does = others.map(|pod| pod.connect(address).is_ok());
                ensure!(does == may, "{ingress}: {does:?}");
                Ok(())
            })?;
        }
    }
    // What holds, holds for one that comes while no agent runs, by the bridge too.
    mesh.take(B, "mesh-agent")?.terminate(SOON)?;
    let late = Pod::add_by(&mesh, B, "late", behind_the_bridge)?;
    let listener = db.listen(db.addresses[0])?;
    let refused = late.connect(db.addresses[0]);
    ensure!(refused.is_err(), "{refused:?}");
    drop(listener);
    start(&mesh, B)?;
    for pod in [&late, &near, &db] {
        behind_the_bridge(&mesh, pod, "DEL")?;
        behind_the_bridge(&mesh, pod, "DEL")?;
    }
    plug_in(&mesh, &far, "DEL")?;
    mesh.ends_well()
}

/// A machine beside `on`, of which the mesh knows nothing: it has these addresses, and its way to everybody is `on`.
const BESIDE: [&str; 2] = ["192.0.2.7", "2001:db8::7"];

/// `on`, towards it.
const NODE_BESIDE: [&str; 2] = ["192.0.2.1", "2001:db8::1"];

fn beside(mesh: &Mesh, on: &'static str) -> Result<Pod> {
    let node = mesh.lab().add_node("beside")?;
    let host = mesh.node(on)?;
    let netns = node.netns().to_owned();
    let lines = [
        format!("link add beside0 type veth peer name eth0 netns {netns}"),
        "address add 192.0.2.1/24 dev beside0".to_owned(),
        "address add 2001:db8::1/64 dev beside0 nodad".to_owned(),
        "link set beside0 up".to_owned(),
    ];
    for line in lines {
        let words: Vec<_> = ["ip"].into_iter().chain(line.split(' ')).collect();
        host.run(&words, COMMAND_LIMIT)?.ok()?;
    }
    let lines = [
        "link set lo up",
        "address add 192.0.2.7/24 dev eth0",
        "address add 2001:db8::7/64 dev eth0 nodad",
        "link set eth0 up",
        "route add default via 192.0.2.1",
        "-6 route add default via 2001:db8::1",
    ];
    for line in lines {
        let words: Vec<_> = ["ip"].into_iter().chain(line.split(' ')).collect();
        node.run(&words, COMMAND_LIMIT)?.ok()?;
    }
    let addresses = BESIDE.map(|address| address.parse());
    Ok(Pod {
        on,
        name: "beside".to_owned(),
        node,
        addresses: addresses.into_iter().collect::<Result<_, _>>()?,
    })
}

/// How many of policy's programs stand at the node's interfaces as filters, as the plug-in attaches them.
fn filters(mesh: &Mesh, node: &str) -> Result<usize> {
    let script = "for i in $(ip -o link | cut -d: -f2 | cut -d@ -f1); do \
                  tc filter show dev $i ingress; tc filter show dev $i egress; done";
    let said = mesh.node(node)?.run(&["sh", "-c", script], COMMAND_LIMIT)?;
    Ok(said.stdout.matches(" handle 0x1 hf_policy_").count())
}

/// What policy has in the bpffs of a node.
fn pinned(mesh: &Mesh, node: &str) -> Result<String> {
    let script = "find /sys/fs/bpf/holdfast/policy_* -type f";
    Ok(mesh
        .node(node)?
        .run(&["sh", "-c", script], COMMAND_LIMIT)?
        .stdout)
}

#[test]
fn a_pod_that_is_new_while_no_agent_runs_or_does_not_know_it_is_under_the_policies_that_hold()
-> Result<()> {
    let mesh = with_pod_ranges()?;
    let beside = beside(&mesh, B)?;
    let known = Pod::add(&mesh, B, "known")?;
    let ports = [PORT, PORT + 1].map(|port| {
        let listeners = beside
            .addresses
            .iter()
            .map(|&address| beside.listen_at(address, port));
        listeners.collect::<Result<Vec<_>>>()
    });
    let [denied, allowed] = ports;
    let (_denied, allowed) = (denied?, allowed?);
    // The mesh is told of no pod: whoever is in the node's range may not ask for the one port.
    let rule = format!(
        "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshPolicy\nmetadata: {{name: late}}\nspec:\n  rules:\n  - action: deny\n    \
         from: [{{cidrs: [10.244.2.0/24, \"fd44:2::/64\"]}}]\n    to: [{{cidrs: [{}/32, \"{}/128\"]}}]\n    ports: [{{port: {PORT}}}]\n",
        BESIDE[0], BESIDE[1]
    );
    let policy = mesh.manifests().join("policy.yaml");
    fs::write(&policy, rule)?;
    tool::eventually("the policy holds", SOON, || {
        ensure!(known.connect(beside.addresses[0]).is_err(), "it does not");
        Ok(())
    })?;
    let under_policy = |pod: &Pod| -> Result<Vec<TcpStream>> {
        let mut open = Vec::new();
        for (&address, listener) in beside.addresses.iter().zip(&allowed) {
            let refused = pod.connect(address);
            ensure!(refused.is_err(), "{} to {address}: {refused:?}", pod.name);
            open.push(
                pod.connect_at(address, PORT + 1)
                    .context(pod.name.clone())?,
            );
            let (server, from) = listener.accept()?;
            // Judged as the pod, seen as its node.
            ensure!(
                NODE_BESIDE.contains(&from.ip().to_string().as_str()),
                "{from}"
            );
            open.push(server);
        }
        Ok(open)
    };
    let talks = |open: &mut [TcpStream]| -> Result<()> {
        for pair in open.chunks_mut(2) {
            let [client, server] = pair else { continue };
            talk(client, server)?;
            talk(server, client)?;
        }
        Ok(())
    };
    let told = state(&mesh, B)?.join("policy");
    ensure!(told.exists(), "{}", told.display());

    // While the agent runs: before it comes to know of the pod, and after.
    let quick = Pod::add(&mesh, B, "quick")?;
    let mut open = under_policy(&quick)?;
    tool::eventually("the agent took it over", SOON, || {
        ensure!(filters(&mesh, B)? == 0, "{} filters", filters(&mesh, B)?);
        Ok(())
    })?;
    talks(&mut open)?;
    under_policy(&quick)?;

    mesh.kill(B, "mesh-agent")?;
    let late = Pod::add(&mesh, B, "late")?;
    ensure!(filters(&mesh, B)? > 0);
    open.extend(under_policy(&late)?);
    talks(&mut open)?;
    start(&mesh, B)?;
    talks(&mut open)?;
    under_policy(&late)?;
    tool::eventually("the next agent took it over", SOON, || {
        ensure!(filters(&mesh, B)? == 0, "{} filters", filters(&mesh, B)?);
        Ok(())
    })?;
    talks(&mut open)?;
    for pod in [&known, &quick, &late] {
        under_policy(pod)?;
    }

    // Nothing stays of those that are gone, with and without an agent.
    let links = |mesh: &Mesh| -> Result<usize> { Ok(pinned(mesh, B)?.matches("/links/").count()) };
    let before = links(&mesh)?;
    plug_in(&mesh, &quick, "DEL")?;
    tool::eventually("the agent noticed", SOON, || {
        ensure!(links(&mesh)? == before - 2, "{}", pinned(&mesh, B)?);
        Ok(())
    })?;
    mesh.kill(B, "mesh-agent")?;
    plug_in(&mesh, &late, "DEL")?;
    ensure!(links(&mesh)? == before - 4, "{}", pinned(&mesh, B)?);
    // As after the machine's start: who comes first is not let in unjudged.
    let script = "rm -r /sys/fs/bpf/holdfast/policy_*";
    mesh.node(B)?
        .run(&["sh", "-c", script], COMMAND_LIMIT)?
        .ok()?;
    let early = Pod::add(&mesh, B, "early");
    let refused = early
        .err()
        .map(|error| format!("{error:#}"))
        .unwrap_or_default();
    ensure!(refused.contains("\"code\":11"), "{refused}");

    // Without policies nobody waits for an agent.
    start(&mesh, B)?;
    fs::remove_file(&policy)?;
    tool::eventually("nothing is enforced", SOON, || {
        ensure!(!told.exists() && known.connect(beside.addresses[0]).is_ok());
        Ok(())
    })?;
    mesh.kill(B, "mesh-agent")?;
    let free = Pod::add(&mesh, B, "free")?;
    tool::eventually("a way out", SOON, || free.connect(beside.addresses[1]))?;
    ensure!(pinned(&mesh, B)?.is_empty(), "{}", pinned(&mesh, B)?);
    start(&mesh, B)?;
    mesh.ends_well()
}

/// As the number that the project promises has it.
const AT_ONCE: usize = 50;

/// Fifty changes at tcx, one after the other under the kernel's lock, took longer by themselves.
const SLOWEST: Duration = Duration::from_secs(1);

#[test]
fn fifty_pods_at_once_are_all_guarded_and_nobody_waits_for_the_others() -> Result<()> {
    let mesh = with_pod_ranges()?;
    let policy = mesh.manifests().join("policy.yaml");
    let rule = "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshPolicy\nmetadata: {name: none}\nspec:\n  rules:\n  - action: deny\n    \
                from: [{cidrs: [10.244.2.0/24]}]\n    to: [{cidrs: [192.0.2.0/24]}]\n";
    let pods = (0..AT_ONCE).map(|number| {
        let name = format!("p{number}");
        Ok(Pod {
            on: B,
            node: mesh.lab().add_node(&name)?,
            name,
            addresses: Vec::new(),
        })
    });
    let pods = pods.collect::<Result<Vec<_>>>()?;
    let all = |verb: &'static str| -> Result<Vec<Duration>> {
        let mesh = &mesh;
        thread::scope(|scope| {
            let calls = pods.iter().map(|pod| {
                scope.spawn(move || -> Result<Duration> {
                    let start = Instant::now();
                    plug_in(mesh, pod, verb)?;
                    Ok(start.elapsed())
                })
            });
            let calls: Vec<_> = calls.collect();
            let took = calls.into_iter().map(|call| call.join().unwrap());
            let mut took = took.collect::<Result<Vec<_>>>()?;
            took.sort();
            Ok(took)
        })
    };
    let without = all("ADD")?;
    all("DEL")?;
    fs::write(&policy, rule)?;
    let told = state(&mesh, B)?.join("policy");
    tool::eventually("the policy holds", SOON, || {
        ensure!(told.exists(), "{}", told.display());
        Ok(())
    })?;
    // Nobody else attaches anything.
    mesh.kill(B, "mesh-agent")?;
    let with = all("ADD")?;
    let figures = |took: &[Duration]| (took[AT_ONCE / 2], took[AT_ONCE - 1]);
    println!(
        "{AT_ONCE} ADDs at once, median and slowest: {:?} without policy, {:?} with",
        figures(&without),
        figures(&with)
    );
    ensure!(filters(&mesh, B)? == 2 * AT_ONCE, "{}", filters(&mesh, B)?);
    ensure!(with[AT_ONCE - 1] < SLOWEST, "{with:?}");
    all("DEL")?;
    ensure!(filters(&mesh, B)? == 0);
    start(&mesh, B)?;
    mesh.ends_well()
}

/// A service, and a headless one by whose names each pod is found.
fn of_pods(pods: &[&Pod]) -> String {
    let endpoint = |pod: &&Pod| {
        let [v4, _] = pod.addresses.as_slice() else {
            panic!("{} has not two addresses", pod.name);
        };
        format!(
            "- {{addresses: [{v4}], nodeName: {}, hostname: {}, conditions: {{ready: true}}}}\n",
            pod.on, pod.name
        )
    };
    let endpoints: String = pods.iter().map(endpoint).collect();
    let service = |name: &str, address: &str| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{clusterIP: {address}, ports: [{{port: 80, protocol: TCP}}]}}\n\
             ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}-1, namespace: shop, \
             labels: {{kubernetes.io/service-name: {name}}}}}\naddressType: IPv4\n\
             ports: [{{port: {PORT}, protocol: TCP}}]\nendpoints:\n{endpoints}"
        )
    };
    service("kiosk", "10.43.0.77") + &service("pods", "None")
}

#[test]
fn a_node_without_a_controller_serves_its_pods_where_they_are_and_not_where_they_were() -> Result<()>
{
    let mesh = with_pod_ranges()?;
    let web = Pod::add(&mesh, B, "web")?;
    let gone = Pod::add(&mesh, B, "gone")?;
    fs::write(mesh.manifests().join("kiosk.yaml"), of_pods(&[&web, &gone]))?;
    let found = |name: &str| mesh.resolve(B, &format!("{name}.pods.shop.svc.cluster.local"));
    let is_at = |pod: &Pod| {
        tool::eventually("its name leads to it", SOON, || {
            let at = found(&pod.name)?;
            ensure!(at == pod.addresses[0], "{} is at {at}", pod.name);
            Ok(())
        })
    };
    is_at(&web)?;
    is_at(&gone)?;
    let told = web.addresses[0];
    thread::sleep(Duration::from_secs(2)); // By then it is on the disk, with the pods' names.

    // While the node is down and cut off, one pod is started anew and one is not.
    mesh.kill(B, "mesh-agent")?;
    mesh.site("site-b")?.link().set_down(true)?;
    plug_in(&mesh, &gone, "DEL")?;
    let web = web.started_anew(&mesh, "web-2")?;
    let port = format!("0.0.0.0:{PORT}");
    mesh.serve("web-2", "http", &["http", "web-2", &port])?;
    start(&mesh, B)?;
    is_at(&web)?;
    ensure!(found("gone").is_err(), "it is nowhere");
    for _ in 0..10 {
        let words = ["-4", "http://kiosk.shop.svc.cluster.local/"];
        let hello = mesh.get(B, &words, SOON)?;
        ensure!(hello.node == "web-2", "{hello:?}");
    }

    // The same while the agent runs.
    let web = web.started_anew(&mesh, "web-3")?;
    is_at(&web)?;
    plug_in(&mesh, &web, "DEL")?;
    tool::eventually("it is nowhere", SOON, || {
        ensure!(found("web").is_err(), "it is found");
        Ok(())
    })?;

    // A controller's word counts.
    mesh.site("site-b")?.link().set_down(false)?;
    tool::eventually("as the controller says", SOON, || {
        let at = found("web")?;
        ensure!(at == told, "it is at {at}");
        Ok(())
    })?;
    mesh.ends_well()
}
