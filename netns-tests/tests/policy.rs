//! Who may speak with whom, with the real binaries: from the manifest to the kernel of two nodes.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::atomic::{AtomicU8, Ordering},
    time::Duration,
};

use anyhow::{Result, bail, ensure};
use netns_tests::{
    mesh::{self, Mesh},
    node::{Node, Process},
    tool,
};
use serde_json::Value;

/// Until a manifest is in force on both nodes.
const SOON: Duration = Duration::from_secs(20);

/// What is not there after that is not coming: 20 round trips.
const ANSWER_LIMIT: Duration = Duration::from_millis(500);

const A: &str = "edge-a1";
const B: &str = "edge-b1";
const PORT: u16 = 9100;

/// Also of what may pass, so that only the port tells them apart.
const OTHER_PORT: u16 = 9101;

fn policy(mesh: &Mesh, audit: bool) -> Result<()> {
    let text = format!(
        "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshPolicy\nmetadata: {{name: no-{PORT}}}\nspec:\n  audit: {audit}\n  \
         rules:\n  - action: deny\n    from: [{{nodes: [{A}]}}]\n    to: [{{nodes: [{B}]}}]\n    ports: [{{port: {PORT}}}]\n"
    );
    Ok(fs::write(mesh.manifests().join("policy.yaml"), text)?)
}

fn connect(mesh: &Mesh, from: &str, to: &str, port: u16) -> Result<TcpStream> {
    let to = SocketAddr::new(mesh.resolve(from, &format!("{to}.mesh"))?, port);
    let connected = mesh
        .node(from)?
        .enter(|| TcpStream::connect_timeout(&to, ANSWER_LIMIT))?;
    Ok(connected?)
}

fn listen(mesh: &Mesh, on: &str, port: u16) -> Result<TcpListener> {
    let listening = mesh
        .node(on)?
        .enter(|| TcpListener::bind(("0.0.0.0", port)))?;
    Ok(listening?)
}

/// Whether what one end says comes to the other, behind all that was kept back before.
fn talk(from: &mut TcpStream, to: &mut TcpStream) -> Result<()> {
    static SAID: AtomicU8 = AtomicU8::new(0);
    let said = SAID.fetch_add(1, Ordering::Relaxed);
    to.set_read_timeout(Some(ANSWER_LIMIT))?;
    from.write_all(&[said])?;
    let mut heard = [!said];
    while heard != [said] {
        to.read_exact(&mut heard)?;
    }
    Ok(())
}

fn silent(from: &mut TcpStream, to: &mut TcpStream) -> Result<()> {
    match talk(from, to) {
        Ok(()) => bail!("they still talk"),
        Err(_) => Ok(()),
    }
}

/// What policy told last on a node, as JSON.
fn events(mesh: &Mesh, node: &str) -> Result<String> {
    let status = mesh.status(node)?;
    let events = status.pointer("/policy_events").map(Value::to_string);
    Ok(events.unwrap_or_default())
}

fn counted(mesh: &Mesh, node: &str, counter: &str) -> Result<u64> {
    number(mesh, node, &format!("/policy_packets/{counter}"))
}

fn number(mesh: &Mesh, node: &str, pointer: &str) -> Result<u64> {
    let status = mesh.status(node)?;
    let number = status.pointer(pointer).and_then(Value::as_u64);
    Ok(number.unwrap_or_default())
}

fn restart(mesh: &Mesh, node: &str, lines: &str) -> Result<()> {
    mesh.take(node, "mesh-agent")?.terminate(SOON)?;
    mesh.provokes(&["the maps left by another version or configuration are replaced"]);
    mesh.start_agent_with(node, lines)?;
    mesh.agent_ready(node, 2)
}

#[test]
fn a_policy_denies_a_port_cuts_the_open_flow_and_audits() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let (listener, other) = (listen(&mesh, B, PORT)?, listen(&mesh, B, OTHER_PORT)?);
    let back = listen(&mesh, A, PORT)?;
    tool::eventually("a path", SOON, || connect(&mesh, A, B, OTHER_PORT))?;
    let mut client = connect(&mesh, A, B, PORT)?;
    let (mut server, _) = listener.accept()?;
    talk(&mut client, &mut server)?;
    let status = mesh.status(A)?;
    ensure!(status.pointer("/policy_enforced") == Some(&Value::Bool(false)));

    policy(&mesh, false)?;
    tool::eventually("the open flow is cut", SOON, || {
        silent(&mut client, &mut server)
    })?;
    silent(&mut server, &mut client)?;
    let refused = connect(&mesh, A, B, PORT);
    ensure!(refused.is_err(), "{refused:?}");
    connect(&mesh, A, B, OTHER_PORT)?;
    other.accept()?;
    connect(&mesh, B, A, PORT)?;
    back.accept()?;
    // The sender drops it already, and says who decided.
    ensure!(counted(&mesh, A, "denied")? > 0);
    let events = events(&mesh, A)?;
    ensure!(
        events.contains("denied by MeshPolicy no-9100: TCP"),
        "{events}"
    );

    policy(&mesh, true)?;
    tool::eventually("the flow goes on", SOON, || talk(&mut client, &mut server))?;
    talk(&mut server, &mut client)?;
    for node in [A, B] {
        ensure!(counted(&mesh, node, "audited")? > 0, "{node}");
    }
    connect(&mesh, A, B, PORT)?;
    // Now it is remembered.
    policy(&mesh, false)?;
    tool::eventually("the open flow is cut again", SOON, || {
        silent(&mut client, &mut server)
    })?;
    silent(&mut server, &mut client)?;
    ensure!(counted(&mesh, A, "flow_ended")? > 0);

    fs::remove_file(mesh.manifests().join("policy.yaml"))?;
    tool::eventually("nothing is enforced", SOON, || {
        let status = mesh.status(B)?;
        ensure!(status.pointer("/policy_enforced") == Some(&Value::Bool(false)));
        Ok(())
    })?;
    tool::eventually("the flow goes on once more", SOON, || {
        talk(&mut client, &mut server)
    })?;
    mesh.ends_well()
}

#[test]
fn the_receiver_enforces_what_the_sender_does_not_also_without_the_controller() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let _listener = listen(&mesh, B, PORT)?;
    let _other = listen(&mesh, B, OTHER_PORT)?;
    restart(&mesh, A, "policy = false\n")?;
    tool::eventually("a connection", SOON, || connect(&mesh, A, B, PORT))?;
    policy(&mesh, false)?;
    let denied = || {
        tool::eventually("the receiver denies it", SOON, || {
            let refused = connect(&mesh, A, B, PORT);
            ensure!(refused.is_err());
            ensure!(counted(&mesh, B, "denied")? > 0);
            Ok(())
        })
    };
    denied()?;
    connect(&mesh, A, B, OTHER_PORT)?;
    let status = mesh.status(A)?.to_string();
    ensure!(
        status.contains("policies are not enforced here"),
        "{status}"
    );
    // What is on the disk is enough.
    mesh.kill("cloud", "mesh-controller")?;
    restart(&mesh, B, "")?;
    denied()?;
    tool::eventually("the other port answers", SOON, || {
        connect(&mesh, A, B, OTHER_PORT)
    })?;
    mesh.ends_well()
}

/// Packets past the host's stack at every interface of a pod.
const PODS: &str = "pod_interfaces = [\"pod-*\"]\n";

/// A pod and how it is linked to its node.
struct Pod {
    node: Node,
    /// By both families.
    addresses: [IpAddr; 2],
}

impl Pod {
    /// As a CNI plug-in makes it; its addresses end with `number`.
    fn new(mesh: &Mesh, on: &str, name: &str, number: u8) -> Result<Self> {
        let site = if on == A { 1 } else { 2 };
        let v4 = |last: u8| IpAddr::from([10, 244, site, last]);
        let v6 = |last: u8| IpAddr::from([0xfd44, site.into(), 0, 0, 0, 0, 0, last.into()]);
        let addresses = [v4(number), v6(number)];
        let families = [[v4(1), addresses[0]], [v6(1), addresses[1]]];
        let port = format!("pod-{name}");
        let node = mesh
            .lab()
            .node_behind(&mesh.node(on)?, &port, name, &families)?;
        Ok(Self { node, addresses })
    }

    /// As the manifest says.
    fn manifest(&self, on: &str, name: &str) -> String {
        let [v4, v6] = self.addresses;
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}\nspec: \
             {{nodeName: {on}, containers: []}}\nstatus: {{podIP: {v4}, podIPs: [{{ip: {v4}}}, {{ip: \"{v6}\"}}]}}\n"
        )
    }

    fn listen(&self, address: IpAddr) -> Result<TcpListener> {
        Ok(self.node.enter(|| TcpListener::bind((address, PORT)))??)
    }

    fn socket(&self, address: IpAddr) -> Result<UdpSocket> {
        let socket = self.node.enter(|| UdpSocket::bind((address, PORT)))??;
        socket.set_read_timeout(Some(ANSWER_LIMIT))?;
        Ok(socket)
    }

    fn connect(&self, to: IpAddr) -> Result<TcpStream> {
        let to = SocketAddr::new(to, PORT);
        Ok(self
            .node
            .enter(|| TcpStream::connect_timeout(&to, ANSWER_LIMIT))??)
    }
}

/// A datagram there and one back.
fn ask(from: &UdpSocket, to: &UdpSocket) -> Result<()> {
    let mut bytes = [0; 1];
    from.send_to(b"?", to.local_addr()?)?;
    let (_, asked_by) = to.recv_from(&mut bytes)?;
    ensure!(asked_by == from.local_addr()?, "as {asked_by}");
    to.send_to(b"!", asked_by)?;
    from.recv_from(&mut bytes)?;
    Ok(())
}

/// The mesh knows where pods are; with more manifests about them.
fn tell_of_pods(mesh: &Mesh, text: &str) -> Result<()> {
    let path = mesh.manifests().join("mesh.yaml");
    let nodes = fs::read_to_string(&path)?;
    let own = [
        "overlayIPv4: 100.96.1.1\n",
        "prefixes: [\"fd42:b1::/64\"]\n",
    ];
    ensure!(own.iter().all(|own| nodes.contains(own)), "{nodes}");
    let prefixes = |site| format!("prefixes: [\"10.244.{site}.0/24\", \"fd44:{site}::/64\"]\n");
    let nodes = nodes.replace(own[0], &format!("{}  {}", own[0], prefixes(1)));
    fs::write(&path, nodes.replace(own[1], &prefixes(2)))?;
    Ok(fs::write(mesh.manifests().join("pods.yaml"), text)?)
}

/// What `db` receives.
fn ingress(mesh: &Mesh, rules: &str) -> Result<()> {
    let text = format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: db, namespace: shop}}\nspec:\n  \
         podSelector: {{matchLabels: {{app: db}}}}\n  ingress: {rules}\n"
    );
    Ok(fs::write(mesh.manifests().join("policy.yaml"), text)?)
}

/// These hand packets on for their pods.
fn forward(mesh: &Mesh, nodes: &[&str]) -> Result<()> {
    for node in nodes {
        let node = mesh.node(node)?;
        node.sysctl("net/ipv4/ip_forward", "1")?;
        node.sysctl("net/ipv6/conf/all/forwarding", "1")?;
    }
    Ok(())
}

/// How often packets went past the stack into the tunnel, and into pods.
fn redirected(mesh: &Mesh, node: &str) -> Result<[u64; 2]> {
    let count = |counter| number(mesh, node, &format!("/service_packets/redirect_{counter}"));
    Ok([count("to_tunnel")?, count("to_pod")?])
}

#[test]
fn pods_of_two_nodes_speak_past_both_stacks_and_policy_is_enforced_at_the_pods() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    forward(&mesh, &[A, B])?;
    let web = Pod::new(&mesh, A, "web", 5)?;
    let db = Pod::new(&mesh, B, "db", 5)?;
    let near = Pod::new(&mesh, B, "near", 6)?;
    let pods = [
        web.manifest(A, "web"),
        db.manifest(B, "db"),
        near.manifest(B, "near"),
    ];
    tell_of_pods(&mesh, &pods.concat())?;
    for node in [A, B] {
        restart(&mesh, node, PODS)?;
    }
    let mut flows = Vec::new();
    for (own, other) in web.addresses.into_iter().zip(db.addresses) {
        let listener = db.listen(other)?;
        let mut client = tool::eventually("a path", SOON, || web.connect(other))?;
        let (mut server, from) = listener.accept()?;
        ensure!(from.ip() == own, "{from}");
        let sockets = (web.socket(own)?, db.socket(other)?);
        // Once both ends redirect, nothing else hands packets on.
        tool::eventually("both ends redirect", SOON, || {
            for (from, to) in [(A, B), (B, A)] {
                let before = (redirected(&mesh, from)?[0], redirected(&mesh, to)?[1]);
                for _ in 0..10 {
                    talk(&mut client, &mut server)?;
                    talk(&mut server, &mut client)?;
                    ask(&sockets.0, &sockets.1)?;
                }
                let now = (redirected(&mesh, from)?[0], redirected(&mesh, to)?[1]);
                ensure!(
                    now.0 >= before.0 + 20 && now.1 >= before.1 + 20,
                    "{before:?} {now:?}"
                );
            }
            Ok(())
        })?;
        flows.push((listener, client, server, sockets, other));
    }

    ingress(&mesh, "[]")?;
    for (listener, client, server, (asking, asked), other) in &mut flows {
        tool::eventually("the open flow is cut", SOON, || silent(client, server))?;
        silent(server, client)?;
        ensure!(ask(asking, asked).is_err());
        // Pods of its own node as well, and not the node.
        for pod in [&web, &near] {
            let refused = pod.connect(*other);
            ensure!(refused.is_err(), "{refused:?}");
        }
        let at = SocketAddr::new(*other, PORT);
        let host = mesh.node(B)?;
        host.enter(|| TcpStream::connect_timeout(&at, ANSWER_LIMIT))??;
        listener.accept()?;
    }
    for counter in ["denied", "own_node"] {
        ensure!(counted(&mesh, B, counter)? > 0, "{counter}");
    }
    let events = events(&mesh, B)?;
    ensure!(
        events.contains("denied by NetworkPolicy shop/db"),
        "{events}"
    );

    let web_by_tcp = format!(
        "[{{from: [{{podSelector: {{matchLabels: {{app: web}}}}}}], ports: [{{port: {PORT}}}]}}]"
    );
    ingress(&mesh, &web_by_tcp)?;
    let before = redirected(&mesh, B)?[1];
    for (listener, client, server, (asking, asked), other) in &mut flows {
        tool::eventually("the open flow goes on", SOON, || talk(client, server))?;
        talk(server, client)?;
        ensure!(ask(asking, asked).is_err(), "UDP is not allowed");
        let refused = near.connect(*other);
        ensure!(refused.is_err(), "{refused:?}");
        web.connect(*other)?;
        listener.accept()?;
    }
    ensure!(
        redirected(&mesh, B)?[1] > before,
        "what may pass goes past the stack"
    );
    // Now it is remembered.
    ingress(&mesh, "[]")?;
    for (_, client, server, ..) in &mut flows {
        tool::eventually("the open flow is cut again", SOON, || {
            silent(client, server)
        })?;
        silent(server, client)?;
    }
    ensure!(counted(&mesh, B, "flow_ended")? > 0);
    ensure!(counted(&mesh, B, "spoofed")? == 0);
    for node in [A, B] {
        let problems = mesh.status(node)?;
        let problems = problems.pointer("/problems").map(Value::to_string);
        ensure!(!problems.unwrap_or_default().contains("pod-"), "{node}");
    }
    mesh.ends_well()
}

#[test]
fn a_pod_is_not_told_of_endpoints_that_a_policy_of_another_node_s_pod_denies_to_it() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    forward(&mesh, &[A, B])?;
    let web = Pod::new(&mesh, A, "web", 5)?;
    let db = Pod::new(&mesh, B, "db", 5)?;
    let spare = Pod::new(&mesh, B, "spare", 6)?;
    let both = [&db, &spare].map(|pod| pod.addresses[0]);
    let service = format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: db, namespace: shop}}\nspec: {{clusterIP: None, \
         ports: [{{port: {PORT}, protocol: TCP}}]}}\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: db-1, namespace: shop, labels: {{kubernetes.io/service-name: db}}}}\naddressType: IPv4\n\
         ports: [{{port: {PORT}, protocol: TCP}}]\nendpoints: [{{addresses: [{}], nodeName: {B}}}, {{addresses: [{}], \
         nodeName: {B}}}]\n",
        both[0], both[1]
    );
    let pods = [
        web.manifest(A, "web"),
        db.manifest(B, "db"),
        spare.manifest(B, "spare"),
    ];
    tell_of_pods(&mesh, &(pods.concat() + &service))?;
    let _listeners = [db.listen(both[0])?, spare.listen(both[1])?];
    restart(&mesh, A, &format!("{PODS}[dns]\nleave_out_denied = true\n"))?;
    restart(&mesh, B, PODS)?;
    let is_told = |node: &Node, wanted: &[IpAddr]| {
        tool::eventually("it is told so", SOON, || {
            let mut told = mesh::resolve(node, "db.shop.svc.cluster.local")?;
            told.sort();
            ensure!(told == wanted, "{told:?}, not {wanted:?}");
            Ok(())
        })
    };
    is_told(&web.node, &both)?;
    for to in both {
        tool::eventually("a path", SOON, || web.connect(to))?;
    }

    ingress(&mesh, "[]")?;
    is_told(&web.node, &both[1..])?;
    // What the kernel does is the same.
    tool::eventually("the pod is closed", SOON, || {
        ensure!(web.connect(both[0]).is_err());
        Ok(())
    })?;
    web.connect(both[1])?;
    // The node may ask for others, and other nodes were not asked to leave anything out.
    for node in [A, B] {
        is_told(&mesh.node(node)?, &both)?;
    }
    is_told(&spare.node, &both)?;
    let page = ["curl", "-sSf", "http://127.0.0.1:9640/metrics"];
    let page = mesh.node(A)?.run(&page, SOON)?.ok()?;
    let series = "holdfast_agent_dns_denied_left_out_total ";
    let count = page.lines().find_map(|line| line.strip_prefix(series));
    ensure!(count.is_some_and(|count| count != "0"), "{count:?}");

    ingress(
        &mesh,
        "[{from: [{podSelector: {matchLabels: {app: web}}}]}]",
    )?;
    is_told(&web.node, &both)?;
    mesh.ends_well()
}

#[test]
fn a_device_is_served_by_a_pod_of_its_gateway_past_the_stack_and_policy_is_enforced() -> Result<()>
{
    let mesh = Mesh::two_sites()?;
    let gateway = mesh.node(A)?;
    forward(&mesh, &[A])?;
    let pod = Pod::new(&mesh, A, "db", 5)?;
    let service = format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: db, namespace: shop}}\nspec: {{clusterIP: 10.43.0.99, \
         ports: [{{port: 80, protocol: TCP}}]}}\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: db-1, namespace: shop, labels: {{kubernetes.io/service-name: db}}}}\naddressType: IPv4\n\
         ports: [{{port: {PORT}, protocol: TCP}}]\nendpoints: [{{addresses: [{}], nodeName: {A}}}]\n",
        pod.addresses[0]
    );
    tell_of_pods(&mesh, &(pod.manifest(A, "db") + &service))?;
    mesh.serve("db", "http", &["http", "db", &format!("[::]:{PORT}")])?;
    let device = mesh.lab().add_node("device")?;
    mesh.lab().veth(&device, "eth0", &gateway, "lan0")?;
    tool::ip(gateway.netns(), "addr add 192.168.7.1/24 dev lan0\n")?;
    let here = "addr add 192.168.7.2/24 dev eth0\nroute add default via 192.168.7.1\n";
    tool::ip(device.netns(), here)?;
    restart(
        &mesh,
        A,
        &format!("{PODS}service_interfaces = [\"lan0\"]\n"),
    )?;

    let asks = || mesh.get("device", &["http://10.43.0.99/"], ANSWER_LIMIT);
    let to_device = || number(&mesh, A, "/service_packets/redirect_to_device");
    let is_redirected = || {
        let before = (to_device()?, redirected(&mesh, A)?[1]);
        let hello = asks()?;
        let from: IpAddr = [192, 168, 7, 2].into();
        ensure!((hello.node.as_str(), hello.client.ip()) == ("db", from));
        let now = (to_device()?, redirected(&mesh, A)?[1]);
        ensure!(now.0 > before.0 && now.1 > before.1, "{before:?} {now:?}");
        Ok(())
    };
    tool::eventually("the pod answers past the stack", SOON, is_redirected)?;
    ingress(&mesh, "[]")?;
    let denied = || {
        let before = counted(&mesh, A, "denied")?;
        ensure!(asks().is_err(), "it is answered");
        ensure!(counted(&mesh, A, "denied")? > before, "by no policy");
        Ok(())
    };
    tool::eventually("the policy is in force", SOON, denied)?;
    ingress(&mesh, "[{from: [{ipBlock: {cidr: 192.168.7.0/24}}]}]")?;
    tool::eventually("the device may", SOON, is_redirected)?;
    mesh.ends_well()
}

/// Packets that the pod of this name sent: what is redirected into it is not counted at its interface.
fn carried(mesh: &Mesh, name: &str) -> Result<u64> {
    let node = mesh.node(A)?;
    let file = format!("/sys/class/net/pod-{name}/statistics/rx_packets");
    let words = ["ip", "netns", "exec", node.netns(), "cat", &file];
    Ok(node.run(&words, SOON)?.ok()?.trim().parse()?)
}

/// Lines that came back, and how many more packets that took, of two seconds' worth.
fn stream_goes_on(mesh: &Mesh, stream: &mut Process) -> Result<u64> {
    let packets = carried(mesh, "db")?;
    stream.says_more(40, SOON)?;
    Ok(carried(mesh, "db")? - packets)
}

/// The processes are of the node's cgroup, as those of pods are, and in pods' namespaces.
#[test]
fn what_goes_from_socket_to_socket_is_judged_as_packets_once_policy_changes() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    forward(&mesh, &[A])?;
    let web = Pod::new(&mesh, A, "web", 5)?;
    let db = Pod::new(&mesh, A, "db", 6)?;
    let service = format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: db, namespace: shop, annotations: \
         {{mesh.holdfast.dev/sockmap: \"true\"}}}}\nspec: {{clusterIP: 10.43.0.99, ports: [{{port: 80, protocol: TCP}}]}}\n\
         ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: db-1, namespace: shop, labels: {{kubernetes.io/service-name: db}}}}\naddressType: IPv4\n\
         ports: [{{port: {PORT}, protocol: TCP}}]\nendpoints: [{{addresses: [{}], nodeName: {A}}}]\n",
        db.addresses[0]
    );
    tell_of_pods(
        &mesh,
        &(web.manifest(A, "web") + &db.manifest(A, "db") + &service),
    )?;
    restart(&mesh, A, PODS)?;
    let host = mesh.node(A)?;
    let inside = |pod: &Pod, words: &str| {
        let netns = format!("--net=/run/netns/{}", pod.node.netns());
        ["nsenter", &netns, "sh", "-c", words].map(str::to_owned)
    };
    let echo = format!("exec socat TCP4-LISTEN:{PORT},fork,reuseaddr EXEC:cat");
    let _echo = host.spawn("echo", &inside(&db, &echo))?;
    let asks = "echo there | socat -t 1 - TCP4:10.43.0.99:80,connect-timeout=1";
    tool::eventually("the service answers", SOON, || {
        let said = host.run(&inside(&web, asks), SOON)?.ok()?;
        ensure!(said.trim() == "there", "{said}");
        Ok(())
    })?;
    // The process that is spawned is the one with the socket: when it ends, so does who writes.
    let stream = |name: &str| {
        let pipe = host.dir().join(format!("{name}.pipe"));
        let pipe = pipe.display();
        let words = format!(
            "mkfifo {pipe}; for line in $(seq 4000); do echo $line; sleep 0.05; done > {pipe} & \
             exec socat -t 10 - TCP4:10.43.0.99:80 < {pipe}"
        );
        host.spawn(name, &inside(&web, &words))
    };
    let mut first = stream("first")?;
    tool::eventually("no packets are needed", SOON, || {
        let packets = stream_goes_on(&mesh, &mut first)?;
        ensure!(packets < 10, "{packets}");
        Ok(())
    })?;

    ingress(&mesh, "[]")?;
    tool::eventually("the open stream is cut", SOON, || {
        ensure!(counted(&mesh, A, "denied")? > 0, "nothing was denied");
        Ok(())
    })?;
    let allowed = "[{from: [{podSelector: {matchLabels: {app: web}}}]}]";
    ingress(&mesh, allowed)?;
    let packets = stream_goes_on(&mesh, &mut first)?;
    ensure!(packets >= 20, "{packets}: policy judges packets");
    let mut second = stream("second")?;
    first.kill()?;
    tool::eventually("a new one needs no packets", SOON, || {
        let packets = stream_goes_on(&mesh, &mut second)?;
        ensure!(packets < 10, "{packets}");
        Ok(())
    })?;
    for killed in [false, true] {
        let mut agent = mesh.take(A, "mesh-agent")?;
        if killed {
            agent.kill()?;
        } else {
            agent.terminate(SOON)?;
        }
        stream_goes_on(&mesh, &mut second)?;
        mesh.start_agent_with(A, PODS)?;
        mesh.agent_ready(A, 2)?;
        stream_goes_on(&mesh, &mut second)?;
    }
    mesh.ends_well()
}

/// What passes where nobody said otherwise.
fn by_default(mesh: &Mesh, action: &str) -> Result<()> {
    let path = mesh.manifests().join("mesh.yaml");
    let text = fs::read_to_string(&path)?;
    let lines = text.lines().filter(|line| !line.contains("defaultAction:"));
    let lines = lines.map(|line| match line.trim_start() {
        "nodeDomain: mesh" => format!("{line}\n  defaultAction: {action}\n"),
        _ => format!("{line}\n"),
    });
    let changed: String = lines.collect();
    ensure!(changed.contains("defaultAction:"), "{changed}");
    Ok(fs::write(&path, changed)?)
}

/// The same rules as the kernel of two nodes and `policy-test` have them: what they say of each flow is compared.
#[test]
fn under_default_deny_what_a_rule_allows_passes_alone_and_the_mesh_itself_goes_on() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let (listener, _other) = (listen(&mesh, B, PORT)?, listen(&mesh, B, OTHER_PORT)?);
    let _back = listen(&mesh, A, PORT)?;
    let service = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: kiosk, namespace: shop}}\nspec: {{clusterIP: 10.43.0.99, \
         ports: [{{name: a, port: 80}}, {{name: b, port: 81}}]}}\n---\napiVersion: discovery.k8s.io/v1\nkind: \
         EndpointSlice\nmetadata: {{name: kiosk, namespace: shop, labels: {{kubernetes.io/service-name: kiosk}}}}\n\
         addressType: IPv4\nports: [{{name: a, port: {PORT}}}, {{name: b, port: {OTHER_PORT}}}]\n\
         endpoints: [{{addresses: [100.96.2.1], nodeName: {B}}}]\n"
    );
    fs::write(mesh.manifests().join("kiosk.yaml"), service)?;
    let allow = format!(
        "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshPolicy\nmetadata: {{name: kiosk}}\nspec:\n  rules:\n  - \
         action: allow\n    from: [{{sites: [site-a]}}]\n    to: [{{nodes: [{B}]}}]\n    ports: [{{port: {PORT}}}]\n"
    );
    fs::write(mesh.manifests().join("policy.yaml"), allow)?;
    by_default(&mesh, "deny")?;
    let cases = format!(
        "cases:\n- {{from: node/{A}, to: node/{B}, port: {PORT}, expect: allow}}\n- {{from: node/{A}, to: node/{B}, port: \
         {OTHER_PORT}, expect: deny}}\n- {{from: node/{B}, to: node/{A}, port: {PORT}, expect: deny}}\n"
    );
    let cases = mesh.cloud().write("cases.yaml", &cases)?;
    let folder = mesh.manifests().display().to_string();
    let test = [
        &mesh.bin("mesh-controller"),
        "policy-test",
        &folder,
        &cases.display().to_string(),
    ];
    mesh.cloud().run(&test, SOON)?.ok()?;

    let by_service = |port: u16| {
        let open = format!("exec 3<>/dev/tcp/10.43.0.99/{port}");
        let said = mesh
            .node(A)?
            .run(&["timeout", "1", "bash", "-c", &open], SOON)?;
        said.ok().map(drop)
    };
    let ping = || {
        let said = mesh
            .node(A)?
            .run(&["ping", "-c", "1", "-W", "1", "100.96.2.1"], SOON)?;
        said.ok().map(drop)
    };
    let as_the_rules_say = || {
        connect(&mesh, A, B, PORT)?;
        by_service(80)?;
        ensure!(connect(&mesh, A, B, OTHER_PORT).is_err(), "another port");
        ensure!(by_service(81).is_err(), "another port, by its service");
        ensure!(connect(&mesh, B, A, PORT).is_err(), "the other way");
        ensure!(ping().is_err(), "another protocol");
        Ok(())
    };
    tool::eventually("the rules are in force", SOON, as_the_rules_say)?;
    let mut client = connect(&mesh, A, B, PORT)?;
    let mut server = loop {
        let (mut server, _) = listener.accept()?;
        if talk(&mut client, &mut server).is_ok() {
            break server;
        }
    };
    talk(&mut server, &mut client)?;
    let denials = events(&mesh, A)?;
    ensure!(
        denials.contains("denied by defaultAction: TCP"),
        "{denials}"
    );

    // Nothing of the mesh's own is a flow by its rules: paths, names, and a node that starts.
    tool::eventually("the path is direct", SOON, || {
        let why = mesh.ask(A, &["path", "why", B])?;
        ensure!(mesh::word(&why, "state") == "direct", "{why}");
        Ok(())
    })?;
    for node in [A, B] {
        mesh.kill(node, "mesh-agent")?;
        mesh.start_agent(node)?;
        mesh.agent_ready(node, 2)?;
    }
    tool::eventually("the rules are in force again", SOON, as_the_rules_say)?;

    by_default(&mesh, "audit")?;
    tool::eventually("what they would deny passes", SOON, || {
        connect(&mesh, A, B, OTHER_PORT)?;
        ping()
    })?;
    ensure!(counted(&mesh, A, "audited")? > 0);
    let audited = events(&mesh, A)?;
    ensure!(audited.contains("audited by defaultAction"), "{audited}");
    mesh.ends_well()
}
