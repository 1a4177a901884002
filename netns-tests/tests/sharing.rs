//! How endpoints share flows: by weight, by who the client is, and by how many carry the load.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    net::{IpAddr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    link::Impairment,
    mesh::Mesh,
    node::{Node, Process},
    tool,
    traffic::Hello,
};

/// What should happen soon has happened by then, or never will; also many connections, on a busy machine.
const SOON: Duration = Duration::from_secs(60);

const A: &str = "edge-a1";
const B: &str = "edge-b1";
const URL: &str = "http://10.43.0.79/";

/// Each request is a connection of its own: the lab's servers close them.
const CURL: &str = "curl --silent --show-error --fail-early --max-time 5";

/// Connections by which a share is told. Of n, each led there by a chance of p, np ± t are, but for a chance of
/// 2·exp(-2t²/n) at most (Hoeffding): 8.1·10⁻¹⁰ for these two. A quarter is then 107 to 293, and a half 307 to 493: one
/// passes for the other by less than that.
const FLOWS: usize = 800;
const SLACK: usize = 93;

/// Who answers the `curl`s of a script, in their order.
fn answers(node: &Node, script: &str) -> Result<Vec<Hello>> {
    let said = node.run(&["sh", "-euc", script], SOON)?.ok()?;
    let hellos = said.lines().map(serde_json::from_str);
    let hellos: Result<_, _> = hellos.collect();
    hellos.with_context(|| format!("{script} said {said}"))
}

/// How many of so many connections `endpoint` has.
fn count(client: &Node, flows: usize, endpoint: &str) -> Result<usize> {
    let hellos = answers(client, &format!("{CURL} '{URL}[1-{flows}]'"))?;
    ensure!(hellos.len() == flows, "{} of {flows}", hellos.len());
    Ok(hellos.iter().filter(|one| one.node == endpoint).count())
}

fn has_one_in(part: usize, client: &Node, endpoint: &str) -> Result<()> {
    let (got, expected) = (count(client, FLOWS, endpoint)?, FLOWS / part);
    ensure!(
        got.abs_diff(expected) <= SLACK,
        "{endpoint} has {got} of {FLOWS} from {}, not about {expected}",
        client.name()
    );
    Ok(())
}

fn answers_at_all(client: &Node) -> Result<()> {
    tool::eventually("the service answers", SOON, || {
        answers(client, &format!("{CURL} {URL}"))
    })
    .map(drop)
}

/// A part of a manifest: the endpoints at these addresses and these ports (name and number).
fn slice(number: usize, ports: &[(&str, u16)], node: &str, addresses: &[&str]) -> String {
    let ports = ports
        .iter()
        .map(|(name, port)| format!("{{name: {name}, port: {port}}}"));
    let endpoints = addresses
        .iter()
        .map(|address| format!("{{addresses: [{address}], nodeName: {node}}}"));
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: kiosk-{number}, namespace: shop, \
         labels: {{kubernetes.io/service-name: kiosk}}}}\naddressType: IPv4\nports: [{}]\nendpoints: [{}]\n",
        ports.collect::<Vec<_>>().join(", "),
        endpoints.collect::<Vec<_>>().join(", ")
    )
}

fn service(annotations: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: kiosk, namespace: shop, annotations: {{{annotations}}}}}\n\
         spec: {{clusterIP: 10.43.0.79, ports: [{{name: http, port: 80}}, {{name: echo, port: 81}}]}}\n"
    )
}

fn mesh_service(spec: &str) -> String {
    format!(
        "---\napiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshService\nmetadata: {{name: kiosk, namespace: shop}}\n\
         spec: {{{spec}}}\n"
    )
}

/// All on one node, so that they count alike. Each server has its address for a name.
const ENDPOINTS: [&str; 8] = [
    "10.244.2.11",
    "10.244.2.12",
    "10.244.2.13",
    "10.244.2.14",
    "10.244.2.15",
    "10.244.2.16",
    "10.244.2.17",
    "10.244.2.18",
];

/// Of the 251 places of a list for clients' hashes, each of eight endpoints has 32 at most: all these clients have one
/// by a chance of (32/251)¹¹ at most, 1.5·10⁻¹⁰.
const NAMESPACES: u8 = 12;

/// The last of the device's addresses `192.168.8.…`; the first ends with 1.
const ADDRESSES: u8 = 100;

/// The gateway leads packets of the LAN to services.
const SERVE_LAN: &str = "service_interfaces = [\"lan0\"]\n";

/// A device of the LAN. It runs nothing of Holdfast's.
fn device(mesh: &Mesh) -> Result<Node> {
    mesh.node(A)?.sysctl("net/ipv4/ip_forward", "1")?;
    behind(mesh, "lan0", "device", [192, 168, 7, 2])
}

/// Linked to the gateway, which is the first of its network.
fn behind(mesh: &Mesh, port: &str, name: &str, own: [u8; 4]) -> Result<Node> {
    let [a, b, c, _] = own;
    let addresses = [[a, b, c, 1], own].map(IpAddr::from);
    mesh.lab()
        .node_behind(&mesh.node(A)?, port, name, &[addresses])
}

/// Clients behind one gateway, by the address that the servers see.
struct Clients {
    gateway: Node,
    /// With the gateway's cgroup, as the processes of a pod.
    namespaces: Vec<Node>,
    device: Node,
}

impl Clients {
    fn new(mesh: &Mesh) -> Result<Self> {
        let gateway = mesh.node(A)?;
        let device = device(mesh)?;
        let there = "route add 192.168.8.0/24 via 192.168.7.2 dev lan0\n";
        tool::ip(gateway.netns(), there)?;
        tool::ip(device.netns(), "route add local 192.168.8.0/24 dev lo\n")?;
        let namespaces = (0..NAMESPACES).map(|number| {
            let (port, name) = (format!("pod{number}"), format!("client{number}"));
            behind(mesh, &port, &name, [10, 244, 1, 10 + number])
        });
        Ok(Self {
            namespaces: namespaces.collect::<Result<_>>()?,
            gateway,
            device,
        })
    }

    /// The endpoint that each client has for all its connections.
    fn endpoints(&self) -> Result<BTreeMap<IpAddr, String>> {
        let asks = format!("{CURL} '{URL}[1-2]'");
        let (mut inside, mut outside) = (String::new(), String::new());
        for client in &self.namespaces {
            let netns = client.netns();
            writeln!(inside, "nsenter --net=/run/netns/{netns} {asks}")?;
        }
        for last in 1..=ADDRESSES {
            writeln!(outside, "{asks} --interface 192.168.8.{last}")?;
        }
        let mut hellos = answers(&self.gateway, &inside)?;
        hellos.extend(answers(&self.device, &outside)?);
        let mut endpoints = BTreeMap::new();
        for hello in hellos {
            let client = hello.client.ip();
            let before = endpoints.insert(client, hello.node.clone());
            let one = before.is_none_or(|before| before == hello.node);
            ensure!(one, "{client} has another one: {}", hello.node);
        }
        let clients = usize::from(NAMESPACES + ADDRESSES);
        ensure!(endpoints.len() == clients, "{endpoints:?}");
        Ok(endpoints)
    }
}

/// Endpoints and clients know the way to each other.
fn advertise(mesh: &Mesh) -> Result<()> {
    let path = mesh.manifests().join("mesh.yaml");
    let mut text = fs::read_to_string(&path)?;
    let ways = [
        ("1.1", "192.168.7.0/24, 192.168.8.0/24, 10.244.1.0/24"),
        ("2.1", "10.244.2.0/24"),
    ];
    text = text.replace("  prefixes: [\"fd42:b1::/64\"]\n", "");
    for (node, prefixes) in ways {
        let own = format!("overlayIPv4: 100.96.{node}\n");
        ensure!(text.contains(&own), "{text}");
        text = text.replace(&own, &format!("{own}  prefixes: [{prefixes}]\n"));
    }
    Ok(fs::write(&path, text)?)
}

/// `edge-a1` is the gateway of clients of both kinds, all endpoints are at `edge-b1`.
fn mesh_with_clients() -> Result<(Mesh, Clients)> {
    let mut mesh = Mesh::demo()?;
    mesh.add_two_sites(Impairment::NONE, &[A], &[B])?;
    advertise(&mesh)?;
    let clients = Clients::new(&mesh)?;
    tool::ip(
        mesh.node(B)?.netns(),
        "route add local 10.244.2.0/24 dev lo\n",
    )?;
    for endpoint in ENDPOINTS {
        let listen = format!("{endpoint}:8080");
        mesh.serve(B, endpoint, &["http", endpoint, &listen])?;
    }
    mesh.start_agent(B)?;
    start_gateway(&mesh)?;
    Ok((mesh, clients))
}

/// Waits for the way to the endpoints by who is no client of the service: a connect that fails would count.
fn start_gateway(mesh: &Mesh) -> Result<()> {
    mesh.start_agent_with(A, SERVE_LAN)?;
    for node in [A, B] {
        mesh.agent_ready(node, 2)?;
    }
    let endpoint: SocketAddr = "10.244.2.11:8080".parse()?;
    let connect = || TcpStream::connect_timeout(&endpoint, Duration::from_secs(1));
    tool::eventually("there is a way to the endpoints", SOON, || {
        Ok(mesh.node(A)?.enter(connect)??)
    })?;
    Ok(())
}

/// The kiosk's manifest with a `MeshService` of this `spec`.
fn kiosk(mesh: &Mesh, spec: &str, endpoints: &[&str]) -> Result<()> {
    let slice = slice(0, &[("http", 8080)], B, endpoints);
    let text = service("") + &slice + &mesh_service(spec);
    Ok(fs::write(mesh.manifests().join("kiosk.yaml"), text)?)
}

/// Of clients whose endpoint stays, how many had another one before, and of how many.
fn moved(
    before: &BTreeMap<IpAddr, String>,
    after: &BTreeMap<IpAddr, String>,
    gone: &str,
) -> (usize, usize) {
    let stay = before.iter().filter(|(_, endpoint)| *endpoint != gone);
    let stay: Vec<_> = stay.collect();
    let moved = stay
        .iter()
        .filter(|(client, endpoint)| after.get(client) != Some(endpoint));
    (moved.count(), stay.len())
}

#[test]
fn connections_go_by_weight_or_by_client_as_a_mesh_service_says_by_socket_and_by_packet()
-> Result<()> {
    let (mesh, clients) = mesh_with_clients()?;
    let [light, heavy, ..] = ENDPOINTS;
    // The first that matches counts.
    let weights = format!("weights: [{{address: {heavy}, weight: 3}}, {{node: {B}, weight: 1}}]");
    kiosk(&mesh, &weights, &[light, heavy])?;
    for client in [&clients.gateway, &clients.device] {
        answers_at_all(client)?;
        has_one_in(4, client, light)?;
    }

    kiosk(&mesh, "policy: consistent-hash", &ENDPOINTS)?;
    let before = tool::eventually("each client has one endpoint", SOON, || {
        // The manifest may have come into force while the first were asked.
        let [first, again] = [clients.endpoints()?, clients.endpoints()?];
        ensure!(first == again, "{first:?} {again:?}");
        Ok(again)
    })?;
    let (pods, addresses): (Vec<_>, Vec<_>) = before
        .iter()
        .partition(|(ip, _)| ip.to_string().starts_with("10."));
    for of_a_kind in [pods, addresses] {
        let endpoints: BTreeSet<_> = of_a_kind.iter().map(|(_, endpoint)| endpoint).collect();
        ensure!(endpoints.len() > 1, "all have one: {of_a_kind:?}");
    }

    mesh.kill(A, "mesh-agent")?;
    start_gateway(&mesh)?;
    ensure!(clients.endpoints()? == before, "not after a restart");

    // Were places shared in the endpoints' order, half of the others would move with the last.
    let [rest @ .., gone] = ENDPOINTS;
    kiosk(&mesh, "policy: consistent-hash", &rest)?;
    let after = tool::eventually("nobody has the one that left", SOON, || {
        let after = clients.endpoints()?;
        ensure!(after.values().all(|endpoint| endpoint != gone), "{after:?}");
        Ok(after)
    })?;
    // Of the 220 places of others 12 change hands: by their hashes six of the device's 84 addresses there, to which a
    // quarter leaves room for every namespace.
    let (moved, of) = moved(&before, &after, gone);
    ensure!(
        of < before.len() && moved * 4 < of,
        "{moved} of {of}: {before:?} {after:?}"
    );

    kiosk(&mesh, "policy: consistent-hash", &ENDPOINTS)?;
    tool::eventually("it is back, and each client where it was", SOON, || {
        let now = clients.endpoints()?;
        ensure!(now == before, "{now:?}");
        Ok(())
    })?;
    mesh.ends_well()
}

/// One near endpoint, and three that come next: they would have three quarters if all shared alike.
fn near_and_far(mesh: &Mesh, annotations: &str) -> Result<()> {
    let near = slice(0, &[("http", 8080), ("echo", 8090)], A, &["100.96.1.1"]);
    let far = (1..).zip([8080, 8081, 8082]).map(|(number, port)| {
        let ports = [("http", port), ("echo", port + 10)];
        slice(number, &ports, B, &["100.96.2.1"])
    });
    let text = service(annotations) + &near + &far.collect::<String>();
    Ok(fs::write(mesh.manifests().join("kiosk.yaml"), text)?)
}

/// A stream that comes back, which it does from far endpoints alone.
fn far_stream(client: &Node) -> Result<Process> {
    let words = "while sleep 0.05; do echo far; done | socat -t 10 - TCP4:10.43.0.79:81";
    let mut number = 0;
    tool::eventually("a stream goes to a far one", SOON, || {
        number += 1;
        let stream = client.spawn(&format!("stream{number}"), &["sh", "-c", words])?;
        tool::eventually("it is answered", SOON, || {
            ensure!(!stream.log().is_empty());
            Ok(())
        })?;
        ensure!(stream.log().contains("far"), "{}", stream.log());
        Ok(stream)
    })
}

fn goes_on(stream: &mut Process) -> Result<()> {
    stream.says_more(6, SOON)?;
    let log = stream.log();
    ensure!(log.lines().all(|line| line == "far"), "{log}");
    Ok(())
}

#[test]
fn the_near_endpoint_has_its_part_of_the_load_and_who_comes_next_the_rest_while_the_manifest_says_so()
-> Result<()> {
    let mut mesh = Mesh::demo()?;
    mesh.add_two_sites(Impairment::NONE, &[A], &[B])?;
    advertise(&mesh)?;
    let device = device(&mesh)?;
    mesh.start_agent_with(A, SERVE_LAN)?;
    mesh.start_agent(B)?;
    for node in [A, B] {
        mesh.agent_ready(node, 2)?;
    }
    mesh.serve(A, "near", &["http", "near", "[::]:8080"])?;
    let far = ["[::]:8080", "[::]:8081", "[::]:8082"];
    mesh.serve(B, "far", &[&["http", "far"], &far[..]].concat())?;
    let client = mesh.node(A)?;
    let listen = |port| format!("TCP4-LISTEN:{port},fork,reuseaddr");
    let _near = client.spawn("says", &["socat", &listen(8090), "SYSTEM:echo near"])?;
    let far = mesh.node(B)?;
    let echoes = [8090, 8091, 8092].map(|port| {
        let log = format!("echo{port}");
        far.spawn(&log, &["socat", &listen(port), "EXEC:cat"])
    });
    let _echoes: Vec<_> = echoes.into_iter().collect::<Result<_>>()?;

    near_and_far(&mesh, "mesh.holdfast.dev/spill-over: '2'")?;
    for client in [&client, &device] {
        answers_at_all(client)?;
        has_one_in(2, client, "near")?;
    }
    let mut stream = far_stream(&client)?;

    near_and_far(&mesh, "")?;
    // By halves once in 2³².
    tool::eventually("all go to the near one", SOON, || {
        let near = count(&client, 32, "near")?;
        ensure!(near == 32, "{near} of 32");
        Ok(())
    })?;
    for client in [&client, &device] {
        ensure!(count(client, FLOWS, "near")? == FLOWS, "not all");
    }
    goes_on(&mut stream)?;

    let path = mesh.manifests().join("kiosk-balance.yaml");
    fs::write(&path, mesh_service("spillOver: 2"))?;
    tool::eventually("some go on to the far ones", SOON, || {
        ensure!(count(&client, 32, "far")? > 0);
        Ok(())
    })?;
    for client in [&client, &device] {
        has_one_in(2, client, "near")?;
    }
    goes_on(&mut stream)?;
    mesh.ends_well()
}
