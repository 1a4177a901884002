//! A node with two ways out: a wired line, and a 4G modem whose packets cost. The real agent finds both by
//! itself, and leaves by the modem only while the wire leads nowhere.

use std::{
    net::Ipv4Addr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    link::Impairment,
    mesh::{CLOUD, Mesh, word},
    name_server::NameServer,
    nat::NatKind,
    node::Node,
    stream::Traffic,
    tool,
};
use serde_json::Value;

/// Until a path or a state is as it has to be.
const SOON: Duration = Duration::from_secs(30);

/// A datagram and a piece of the TCP connection each so often.
const EVERY: Duration = Duration::from_millis(5);

/// How long a change of the uplink may stop traffic where the kernel says that something happened: wanted
/// are 500 ms; a debug build on a busy machine gets twice that.
const TOLD_MAX: Duration = Duration::from_secs(1);

/// And where only silence says it: 0.45 s until somebody doubts, 1 s of questions, and the new way.
const SILENT_MAX: Duration = Duration::from_millis(3_500);

const METERED: &str = "[[uplink]]\ninterface = \"wwan*\"\nmetered = true\n";

/// A modem at this node, behind site `mobile`.
fn add_modem(mesh: &Mesh, edge: &Node) -> Result<()> {
    let modem = mesh.site("mobile")?.router();
    mesh.lab().veth(edge, "wwan0", modem, "modem")?;
    // The kernels' own questions would count as packets; a modem's line knows none.
    let ends = [(edge, "wwan0", 2, 1), (modem, "modem", 1, 2)];
    for (node, interface, own, other) in ends {
        node.sysctl(&format!("net/ipv6/conf/{interface}/disable_ipv6"), "1")?;
        let batch = format!(
            "link set {interface} address 02:00:00:00:08:0{own}\n\
             addr add 192.168.8.{own}/24 dev {interface}\n\
             neigh add 192.168.8.{other} lladdr 02:00:00:00:08:0{other} dev {interface} nud permanent\n"
        );
        tool::ip(node.netns(), &batch)?;
    }
    let route = "route add default via 192.168.8.1 dev wwan0 metric 700\n";
    tool::ip(edge.netns(), route)
}

/// Sites by name, the last byte of their outside address, and the nodes in them: 10 ms away, and behind NAT.
fn sites(all: &[(&str, u8, &[&str])]) -> Result<Mesh> {
    let mut mesh = Mesh::two_sites_of(&[], &[])?;
    let link = Impairment::delay_loss(Duration::from_millis(10), 0.0);
    for (name, last, hosts) in all {
        let wan = [203, 0, 113, *last].into();
        mesh.add_site(name, NatKind::PortRestricted, wan, link, hosts)?;
    }
    Ok(mesh)
}

/// `edge-a1` at a wired site and at a modem's, `edge-b1` somewhere else, directly connected.
struct Two {
    mesh: Mesh,
    edge: Node,
    other: Node,
    addresses: [Ipv4Addr; 2],
}

impl Two {
    fn start(config: &str) -> Result<Self> {
        let elsewhere = ("elsewhere", 13, &["edge-b1"][..]);
        let mesh = sites(&[("wired", 11, &["edge-a1"]), ("mobile", 12, &[]), elsewhere])?;
        let edge = mesh.node("edge-a1")?;
        add_modem(&mesh, &edge)?;
        mesh.start_agent_with("edge-a1", config)?;
        mesh.start_agent("edge-b1")?;
        for node in ["edge-a1", "edge-b1"] {
            mesh.agent_ready(node, 2)?;
        }
        let overlay = |name: &str| -> Result<Ipv4Addr> {
            let status = mesh.status(name)?;
            let first = status.pointer("/overlay_addresses/0");
            let text = first
                .and_then(Value::as_str)
                .context("no overlay address")?;
            Ok(text.parse()?)
        };
        let addresses = [overlay("edge-a1")?, overlay("edge-b1")?];
        let other = mesh.node("edge-b1")?;
        let two = Self {
            mesh,
            edge,
            other,
            addresses,
        };
        two.is_direct_from("203.0.113.11")?;
        two.uses("eth0")?;
        Ok(two)
    }

    fn flows(&self) -> Result<Flows> {
        let traffic = Traffic::start([&self.edge, &self.other], self.addresses, EVERY)?;
        thread::sleep(Duration::from_secs(1));
        Ok(Flows(traffic))
    }

    /// Waits until `edge-b1` sees `edge-a1` directly at an address of this router's.
    fn is_direct_from(&self, router: &str) -> Result<()> {
        tool::eventually("a direct path", SOON, || {
            let words = ["ping", "-c", "1", "-W", "1", &self.addresses[0].to_string()];
            self.other.run(&words, SOON)?;
            let why = self.mesh.ask("edge-b1", &["path", "why", "edge-a1"])?;
            let paths = why.get("paths").and_then(Value::as_array);
            let primary = |path: &&Value| word(path, "state") == "primary";
            let primary = paths.into_iter().flatten().find(primary);
            let at = primary.map(|path| word(path, "path")).unwrap_or_default();
            ensure!(at.starts_with(&format!("{router}:")), "{why}");
            Ok(())
        })
    }

    /// Waits until the agent says that it leaves by this interface.
    fn uses(&self, interface: &str) -> Result<()> {
        tool::eventually("the uplink in use", SOON, || {
            let status = self.mesh.status("edge-a1")?;
            let uplinks = status.get("uplinks").and_then(Value::as_array);
            let mut uplinks = uplinks.into_iter().flatten();
            let used = uplinks.find(|one| one.get("used") == Some(&Value::Bool(true)));
            let name = used.map(|one| word(one, "interface")).unwrap_or_default();
            ensure!(name == interface, "{status}");
            Ok(())
        })
    }

    fn by_modem(&self) -> Result<[u64; 2]> {
        by_modem(&self.edge)
    }

    /// Waits until the agent says so of the controller.
    fn controller(&self, what: &str, holds: impl Fn(&Value) -> bool) -> Result<()> {
        tool::eventually(what, SOON, || {
            let status = self.mesh.status("edge-a1")?;
            let controller = status.get("controller").context("no controller")?;
            ensure!(holds(controller), "{controller}");
            Ok(())
        })
    }

    /// Pulls the wired cable, or puts it back.
    fn pull_cable(&self, pulled: bool) -> Result<()> {
        let state = if pulled { "down" } else { "up" };
        let router = self.mesh.site("wired")?.router();
        tool::ip(router.netns(), &format!("link set host0 {state}\n"))
    }

    /// Waits until somebody knows a name of the world's.
    fn resolves(&self, name: &str) -> Result<()> {
        tool::eventually("a name of the world's", SOON, || {
            let found = self.mesh.resolve("edge-a1", name)?;
            ensure!(found == CLOUD, "{found}");
            Ok(())
        })
    }

    fn fails(&self, error: anyhow::Error) -> anyhow::Error {
        let path = self.edge.dir().join("mesh-agent.log");
        let log = std::fs::read_to_string(path).unwrap_or_default();
        error.context(format!(
            "the agent's log ends:\n{}",
            netns_tests::node::tail(&log)
        ))
    }
}

/// Packets of every kind that went out and came in by the modem so far.
fn by_modem(edge: &Node) -> Result<[u64; 2]> {
    let words = ["ip", "-j", "-s", "link", "show", "wwan0"];
    let said = edge.run(&words, SOON)?.ok()?;
    let said: Value = serde_json::from_str(&said)?;
    let count = |way: &str| {
        let count = said.pointer(&format!("/0/stats64/{way}/packets"));
        count.and_then(Value::as_u64).context("no count")
    };
    Ok([count("tx")?, count("rx")?])
}

struct Flows(Traffic);

impl Flows {
    /// Waits until all flow again, and says how long nothing came.
    fn gap(&self, what: &str, since: Instant, most: Duration) -> Result<Duration> {
        let Self(traffic) = self;
        traffic.flows(SOON)?;
        // What follows soon after belongs to it.
        thread::sleep(Duration::from_secs(2));
        let gaps = traffic.gaps(since);
        println!("{what}: nothing came for {gaps:?}");
        traffic.unharmed()?;
        let gap = gaps.datagrams();
        ensure!(gap <= most, "{what}: {gaps:?}, at most {most:?}");
        Ok(gap)
    }
}

#[test]
fn a_pulled_cable_moves_traffic_to_the_modem_which_is_not_used_before_or_after() -> Result<()> {
    let two = Two::start(METERED)?;
    let flows = two.flows()?;
    let run = || -> Result<()> {
        let before = two.by_modem()?;
        thread::sleep(Duration::from_secs(5));
        let unused = two.by_modem()?;
        ensure!(
            unused == before,
            "the modem carried packets: {before:?}, {unused:?}"
        );

        let since = Instant::now();
        two.pull_cable(true)?;
        flows.gap("cable pulled", since, TOLD_MAX)?;
        two.uses("wwan0")?;
        two.is_direct_from("203.0.113.12")?;
        ensure!(
            two.by_modem()?[0] > unused[0] + 100,
            "nothing went by the modem"
        );

        let since = Instant::now();
        two.pull_cable(false)?;
        flows.gap("cable put back", since, TOLD_MAX)?;
        two.uses("eth0")?;
        two.is_direct_from("203.0.113.11")?;
        // What the last ones to speak to it send, and what lasts of the change, may take a moment.
        thread::sleep(Duration::from_secs(3));
        let before = two.by_modem()?;
        thread::sleep(Duration::from_secs(5));
        let after = two.by_modem()?;
        ensure!(
            after[0] == before[0],
            "the modem still carries: {before:?}, {after:?}"
        );
        two.mesh.ends_well()
    };
    run().map_err(|error| two.fails(error))
}

#[test]
fn a_line_that_dies_behind_its_router_is_left_and_taken_again_without_a_gap() -> Result<()> {
    let two = Two::start(METERED)?;
    let flows = two.flows()?;
    let run = || -> Result<()> {
        let since = Instant::now();
        two.mesh.site("wired")?.link().set_down(true)?;
        flows.gap("the line is dead", since, SILENT_MAX)?;
        two.uses("wwan0")?;
        // The kernel's routes still lead to the dead line: by them nobody would hear of the controller.
        two.controller("it is asked by the modem", |said| {
            said["asked_in_s"].is_u64()
        })?;

        let since = Instant::now();
        two.mesh.site("wired")?.link().set_down(false)?;
        two.uses("eth0")?;
        println!("taken again after {:?}", since.elapsed());
        // The modem still works: nobody has to wait for anything.
        flows.gap("the line is back", since, Duration::from_millis(500))?;
        two.is_direct_from("203.0.113.11")?;
        let stays = |said: &Value| said["connected"] == true;
        two.controller("its stream stays, where that costs nothing", stays)?;
        two.mesh.ends_well()
    };
    run().map_err(|error| two.fails(error))
}

/// The kernel's routes lead to a line that is dead behind its router. Names of the world's are asked for by the modem.
#[test]
fn names_are_asked_for_by_the_uplink_in_use() -> Result<()> {
    let two = Two::start(&format!("{METERED}[dns]\nupstreams = [\"{CLOUD}:53\"]\n"))?;
    let _server = NameServer::start(two.mesh.cloud(), CLOUD, CLOUD)?;
    let run = || -> Result<()> {
        two.resolves("by-wire.example.org")?;
        let before = two.by_modem()?;
        two.mesh.site("wired")?.link().set_down(true)?;
        two.uses("wwan0")?;
        let since = Instant::now();
        two.resolves("by-modem.example.org")?;
        println!("a name by the modem after {:?}", since.elapsed());
        ensure!(two.by_modem()?[0] > before[0], "nothing went by the modem");

        two.mesh.site("wired")?.link().set_down(false)?;
        two.uses("eth0")?;
        two.resolves("by-wire-again.example.org")?;
        two.mesh.ends_well()
    };
    run().map_err(|error| two.fails(error))
}

/// The same from the beginning, and the controller has a name, which a name server knows that is reached by the modem only: the
/// node joins by that, and gets its first snapshot when the modem has its turn.
#[test]
fn a_node_whose_line_is_dead_joins_at_a_controller_with_a_name() -> Result<()> {
    let mesh = sites(&[("wired", 11, &["edge-a1"]), ("mobile", 12, &[])])?;
    let edge = mesh.node("edge-a1")?;
    add_modem(&mesh, &edge)?;
    let _server = NameServer::start(mesh.cloud(), CLOUD, CLOUD)?;
    mesh.site("wired")?.link().set_down(true)?;
    mesh.provokes(&["cannot join yet; trying again"]);
    let config = mesh.agent_config(&edge, Some(&mesh.token()?));
    let by_address = format!("\"{CLOUD}:7440\"");
    ensure!(config.contains(&by_address), "{config}");
    let config = config.replace(&by_address, "\"controller.example.org:7440\"");
    edge.set_resolver(&format!("nameserver {CLOUD}\n"))?;
    let since = Instant::now();
    mesh.daemon(&edge, "mesh-agent", "agent", &format!("{config}{METERED}"))?;
    tool::eventually("it has joined", SOON, || {
        let log = std::fs::read_to_string(edge.dir().join("mesh-agent.log"))?;
        ensure!(log.contains("joined mesh="), "{log}");
        Ok(())
    })?;
    println!("joined by name after {:?}", since.elapsed());
    mesh.agent_ready("edge-a1", 1)?;
    println!("ready after {:?}, the wire still dead", since.elapsed());
    mesh.ends_well()
}

#[test]
fn a_new_address_at_the_same_uplink_costs_half_a_second() -> Result<()> {
    let two = Two::start(METERED)?;
    let flows = two.flows()?;
    let run = || -> Result<()> {
        let since = Instant::now();
        let site = two.mesh.site("wired")?;
        site.renumber(&two.edge, [192, 168, 1, 200].into())?;
        // Not direct at once: the NATs keep the old address' mappings for a while, and with them its port.
        flows.gap("another address", since, TOLD_MAX)?;
        two.uses("eth0")?;
        two.mesh.ends_well()
    };
    run().map_err(|error| two.fails(error))
}

/// `edge-a1`, of which a modem is all it has.
fn with_only_a_modem(mesh: &Mesh, config: &str) -> Result<Node> {
    let edge = mesh.lab().add_node("edge-a1")?;
    add_modem(mesh, &edge)?;
    mesh.start_agent_with("edge-a1", &format!("{config}{METERED}"))?;
    Ok(edge)
}

/// Waits until `edge-a1` has visited its controller: it comes again after 7.5 s at least.
fn has_left(mesh: &Mesh) -> Result<()> {
    tool::eventually("the visit is over", SOON, || {
        let status = mesh.status("edge-a1")?;
        let asked_in = status.pointer("/controller/asked_in_s");
        ensure!(asked_in.and_then(Value::as_u64) >= Some(7), "{status}");
        Ok(())
    })
}

fn knows(mesh: &Mesh, nodes: u64) -> Result<()> {
    let status = mesh.status("edge-a1")?;
    let known = status.pointer("/snapshot/nodes").and_then(Value::as_u64);
    ensure!(known == Some(nodes), "not {nodes}: {status}");
    Ok(())
}

/// A modem is all there is: the agent comes to its controller, leaves, and comes again. In between there is no connection,
/// not a packet goes either way, and nobody misses it.
#[test]
fn a_node_with_only_a_modem_visits_its_controller_and_is_silent_in_between() -> Result<()> {
    let mesh = sites(&[("mobile", 12, &[])])?;
    let edge = with_only_a_modem(&mesh, "metered_sync_s = 10\n")?;
    mesh.agent_ready("edge-a1", 1)?;
    let generation = || -> Result<u64> {
        let status = mesh.status("edge-a1")?;
        let generation = status.pointer("/snapshot/generation");
        generation.and_then(Value::as_u64).context("no generation")
    };
    let before = generation()?;
    has_left(&mesh)?;
    let manifest = "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: Community\nmetadata: {name: late}\nspec: {sites: [x]}\n";
    std::fs::write(mesh.manifests().join("late.yaml"), manifest)?;
    thread::sleep(Duration::from_millis(500)); // For the last acknowledgement.
    let quiet = by_modem(&edge)?;
    thread::sleep(Duration::from_secs(5));
    ensure!(
        by_modem(&edge)? == quiet,
        "{quiet:?}, {:?}",
        by_modem(&edge)?
    );
    let connections = edge.run(&["ss", "-Htn", "state", "established"], SOON)?;
    ensure!(connections.ok()?.trim().is_empty(), "a connection stayed");
    ensure!(generation()? == before, "it heard of a change meanwhile");
    let nodes = mesh.known_nodes()?;
    ensure!(
        nodes.pointer("/nodes/0/connected") == Some(&Value::Bool(true)),
        "{nodes}"
    );
    let visited = tool::eventually("the next visit", SOON, || {
        let now = generation()?;
        ensure!(now > before, "{now}");
        by_modem(&edge)
    })?;
    has_left(&mesh)?;
    println!(
        "a visit: {} packets",
        visited[0] + visited[1] - quiet[0] - quiet[1]
    );
    mesh.ends_well()
}

/// Who was at its controller in the last minute does not go there because somebody asks.
const ASKED_PAUSE: Duration = Duration::from_secs(62);

/// Who joined since the last visit has a name that the node with the modem does not know: it visits, and knows.
#[test]
fn a_metered_node_that_is_asked_for_an_unknown_name_visits_its_controller() -> Result<()> {
    let mesh = sites(&[("mobile", 12, &[]), ("elsewhere", 13, &["edge-b1"])])?;
    with_only_a_modem(&mesh, "")?;
    mesh.agent_ready("edge-a1", 1)?;
    has_left(&mesh)?;
    mesh.start_agent("edge-b1")?;
    mesh.agent_ready("edge-b1", 2)?;
    thread::sleep(ASKED_PAUSE);
    knows(&mesh, 1)?;
    let since = Instant::now();
    tool::eventually("the name of who joined", SOON, || {
        mesh.resolve("edge-a1", "edge-b1.mesh")
    })?;
    println!("the name is known after {:?}", since.elapsed());
    knows(&mesh, 2)?;
    tool::eventually("an echo", SOON, || {
        mesh.meshctl("edge-a1", &["ping", "-c", "1", "edge-b1"])?
            .ok()
    })?;
    has_left(&mesh)?;
    mesh.ends_well()
}

/// The same, and who joined calls it, while it speaks with another: nobody answers a key that nobody knows, but it visits, and
/// does then.
#[test]
fn a_metered_node_that_a_stranger_calls_visits_its_controller_and_answers() -> Result<()> {
    let elsewhere = ("elsewhere", 13, &["edge-b1", "edge-c1"][..]);
    let mesh = sites(&[("mobile", 12, &[]), elsewhere])?;
    mesh.start_agent("edge-b1")?;
    mesh.agent_ready("edge-b1", 1)?;
    let edge = with_only_a_modem(&mesh, "")?;
    mesh.agent_ready("edge-a1", 2)?;
    has_left(&mesh)?;
    // Who speaks with nobody has no relay by which it could be called.
    let mut speaks = edge.spawn("ping", &["ping", "-i", "1", "100.96.2.1"])?;
    mesh.start_agent("edge-c1")?;
    mesh.agent_ready("edge-c1", 3)?;
    thread::sleep(ASKED_PAUSE);
    knows(&mesh, 2)?;
    let since = Instant::now();
    tool::eventually("an answer to who joined", SOON, || {
        mesh.meshctl("edge-c1", &["ping", "-c", "1", "edge-a1"])?
            .ok()
    })?;
    println!("it answers after {:?}", since.elapsed());
    knows(&mesh, 3)?;
    has_left(&mesh)?;
    speaks.running()?;
    mesh.ends_well()
}

/// A modem whose weight is larger is used though the kernel's routes prefer the wire, and peers on a LAN
/// that is no uplink are reached by the LAN meanwhile.
#[test]
fn weights_say_which_uplink_is_used_and_lans_stay_what_they_are() -> Result<()> {
    let mesh = sites(&[("wired", 11, &["edge-a1"]), ("mobile", 12, &[])])?;
    let edge = mesh.node("edge-a1")?;
    let modem = mesh.site("mobile")?.router();
    mesh.lab().veth(&edge, "wwan0", modem, "modem")?;
    tool::ip(modem.netns(), "addr add 192.168.8.1/24 dev modem\n")?;
    let batch = "addr add 192.168.8.2/24 dev wwan0\n\
                 route add default via 192.168.8.1 dev wwan0 metric 700\n";
    tool::ip(edge.netns(), batch)?;
    // A machine at a LAN of its own, whose router the edge node is: it has no other way out.
    let machine = mesh.lab().add_node("edge-a2")?;
    mesh.lab().veth(&edge, "lan0", &machine, "eth0")?;
    tool::ip(edge.netns(), "addr add 10.7.0.1/24 dev lan0\n")?;
    edge.sysctl("net/ipv4/ip_forward", "1")?;
    let nat = "table ip out\ntable ip out { chain post { type nat hook postrouting priority 100; \
               ip saddr 10.7.0.0/24 masquerade; }; }\n";
    tool::nft(edge.netns(), nat)?;
    let batch = "addr add 10.7.0.2/24 dev eth0\nroute add default via 10.7.0.1 dev eth0\n";
    tool::ip(machine.netns(), batch)?;

    let weights = "[[uplink]]\ninterface = \"wwan0\"\nweight = 2\n\
                   [[uplink]]\ninterface = \"eth*\"\nweight = 1\n";
    mesh.start_agent_with("edge-a1", weights)?;
    mesh.start_agent("edge-a2")?;
    for node in ["edge-a1", "edge-a2"] {
        mesh.agent_ready(node, 2)?;
    }
    tool::eventually("the modem is used", SOON, || {
        let status = mesh.status("edge-a1")?;
        let seen = status.get("reflexive_addresses").and_then(Value::as_array);
        let mut seen = seen.into_iter().flatten().filter_map(Value::as_str);
        ensure!(seen.any(|at| at.starts_with("203.0.113.12:")), "{status}");
        Ok(())
    })?;
    tool::eventually("the machine is reached by its LAN", SOON, || {
        mesh.resolve("edge-a1", "edge-a2.mesh")?;
        mesh.meshctl("edge-a1", &["ping", "-c", "1", "edge-a2"])?;
        let why = mesh.ask("edge-a1", &["path", "why", "edge-a2"])?;
        let paths = why.get("paths").and_then(Value::as_array);
        let by_lan = |path: &Value| {
            word(path, "state") == "primary" && word(path, "path").starts_with("10.7.0.2:")
        };
        ensure!(paths.into_iter().flatten().any(by_lan), "{why}");
        Ok(())
    })?;
    mesh.ends_well()
}
