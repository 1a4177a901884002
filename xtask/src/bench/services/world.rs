//! Where it is measured: a node's namespace, and pods beside it, each joined to it by a veth pair with routes, as a
//! CNI plug-in does. Clients without rules in the node's netfilter share one node and one server; each set of rules
//! has a node and pods of its own, so that all of them stay loaded for all rounds.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use netns_tests::{
    lab::Lab,
    node::{Node, Process},
    tool,
};
use serde_json::Value;

use super::{
    cases::{Case, Kind},
    client::Client,
    cluster::{self, Cluster, ENDPOINT_PORT, ENDPOINTS, SERVICE_PORT},
};
use crate::bench::UP_LIMIT;

/// The node's own address towards its pods.
const NODE: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 1);

/// The client pod's address. The pods at whose packets Holdfast looks have 10.244.3.0/24.
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 1);

/// Where the proxy process listens: no service's address.
const PROXY: Ipv4Addr = Ipv4Addr::new(10, 97, 0, 1);

/// `nft` takes a minute for 10,000 services, and more on a busy machine.
const LOAD_LIMIT: Duration = Duration::from_secs(600);

/// Services, endpoints of each and changes of [`Kind::Change`]: 250,000 endpoints, and with 51 changes the median
/// is the 26th.
const CHANGE: [&str; 3] = ["10000", "25", "51"];

/// Some seconds for the tables, and up to 0.1 s for each change and the copy of the snapshot that it is made in.
const CHANGE_LIMIT: Duration = Duration::from_secs(120);

/// The lab, with the node that has no rules.
#[derive(Debug)]
pub(super) struct World {
    program: String,
    plain: Place,
    /// The pod of all clients between whom and the server nothing is done to packets.
    client: Node,
    lab: Lab,
}

/// A node with a server pod.
#[derive(Debug)]
struct Place {
    node: Node,
    _server: Process,
}

/// A way that is ready to be asked, until it is dropped.
#[derive(Debug)]
pub(super) struct Way {
    pub(super) client: Client,
    /// Whom the client asks, with commas between.
    pub(super) addresses: String,
    /// How long it took to fill the tables, where there are any.
    pub(super) load: Option<Duration>,
    _process: Option<Process>,
    _place: Option<Place>,
}

/// What [`World::change`] found.
#[derive(Debug)]
pub(super) struct Changes {
    /// From nothing until everything is in the maps.
    pub(super) load: Duration,
    /// Each from the changed snapshot to the maps, sorted.
    pub(super) changes: Vec<Duration>,
    /// Of all maps.
    pub(super) map_memory_bytes: u64,
}

impl World {
    /// The lab, with the programs in `bins`.
    ///
    /// # Errors
    ///
    /// If it does not come up.
    pub(super) fn new(bins: &Path) -> Result<Self> {
        let program = bins.join("services-bench").display().to_string();
        let lab = Lab::new()?;
        let plain = Place::new(&lab, "plain", &program)?;
        let client = plain.pod(&lab, "plain-client", "client", &[CLIENT])?;
        Ok(Self {
            program,
            plain,
            client,
            lab,
        })
    }

    /// Makes what a case needs, and a client for it that was answered once.
    ///
    /// # Errors
    ///
    /// If something cannot be had, or nobody answers.
    pub(super) fn way(&self, case: &Case) -> Result<Way> {
        let mut way = match case.kind {
            Kind::Direct | Kind::Change | Kind::DeadPath => self.direct(case),
            Kind::Sockets(cluster) => self.sockets(case, cluster),
            Kind::Packets(cluster) => self.packets(case, cluster),
            Kind::Sockmap(cluster) => self.sockmap(case, cluster),
            Kind::Redirect(cluster) => self.redirect(case, cluster, &["pod=client", "pod=server"]),
            Kind::PacketsRedirect(cluster) => {
                let places = ["pod=client", "pod=server", "serve=client"];
                self.redirect(case, cluster, &places)
            }
            Kind::DevicesRedirect(cluster) => {
                self.redirect(case, cluster, &["pod=server", "serve=client"])
            }
            Kind::Nftables(cluster) => {
                self.rules(case, cluster, &["nft", "--file"], &cluster.nftables())
            }
            Kind::Iptables(cluster) => {
                let words = ["iptables-restore", "--noflush"];
                self.rules(case, cluster, &words, &cluster.iptables())
            }
            Kind::Haproxy => self.proxy(case),
        }?;
        way.client.times("first_byte", &way.addresses, 1)?;
        Ok(way)
    }

    fn direct(&self, case: &Case) -> Result<Way> {
        self.in_cgroup(case, endpoints().join(","))
    }

    fn sockets(&self, case: &Case, cluster: Cluster) -> Result<Way> {
        let way = self.in_cgroup(case, at(cluster.asked()))?;
        self.held(case, cluster, &[], way)
    }

    /// By a process of the shared node, for this case's cgroup.
    fn held(&self, case: &Case, cluster: Cluster, interfaces: &[&str], way: Way) -> Result<Way> {
        let (node, cgroup) = (&self.plain.node, self.cgroup(case)?);
        held(node, &self.program, case, cluster, &cgroup, interfaces, way)
    }

    /// Between pods of a node of their own: the shared server's packets stay as they are. The client's services are
    /// those of its socket, or if its interface is served, of its packets as in [`Self::packets`].
    fn redirect(&self, case: &Case, cluster: Cluster, interfaces: &[&str]) -> Result<Way> {
        let place = Place::new(&self.lab, case.name, &self.program)?;
        let name = format!("{}-client", case.name);
        let pod = place.pod(&self.lab, &name, "client", &[CLIENT])?;
        let served = pod.cgroup().join("served");
        fs::create_dir_all(&served).with_context(|| format!("make {}", served.display()))?;
        let own = match interfaces.contains(&"serve=client") {
            true => pod.cgroup(),
            false => served.as_path(),
        };
        let client = Client::start(&pod, &self.program, own)?;
        let mut way = Way::new(client, at(cluster.asked()));
        // Neighbours ask for each other by the stack.
        way.client
            .times("first_byte", &endpoints().join(","), ENDPOINTS.len())?;
        let way = held(
            &place.node,
            &self.program,
            case,
            cluster,
            &served,
            interfaces,
            way,
        )?;
        Ok(Way {
            _place: Some(place),
            ..way
        })
    }

    /// Between pods of a node of their own, whose processes are both in the cgroup that is served.
    fn sockmap(&self, case: &Case, cluster: Cluster) -> Result<Way> {
        let cgroup = self.cgroup(case)?;
        let place = Place::in_cgroup(&self.lab, case.name, &self.program, Some(&cgroup))?;
        let name = format!("{}-client", case.name);
        let pod = place.pod(&self.lab, &name, "client", &[CLIENT])?;
        let way = Way::new(
            Client::start(&pod, &self.program, &cgroup)?,
            at(cluster.asked()),
        );
        let local = format!("sockmap={}", endpoints().join(","));
        let (node, program) = (&place.node, &self.program);
        let way = held(node, program, case, cluster, &cgroup, &[&local], way)?;
        Ok(Way {
            _place: Some(place),
            ..way
        })
    }

    /// Of a client without cgroup programs, as one that is no process here.
    fn packets(&self, case: &Case, cluster: Cluster) -> Result<Way> {
        let number = u8::try_from(self.lab.nodes().len())?;
        let (port, address) = (format!("client{number}"), [10, 244, 3, number].into());
        let pod = self.plain.pod(&self.lab, case.name, &port, &[address])?;
        let client = Client::start(&pod, &self.program, pod.cgroup())?;
        let way = Way::new(client, at(cluster.asked()));
        self.held(case, cluster, &[&format!("serve={port}")], way)
    }

    /// A client of the shared pod, in a cgroup of its own.
    fn in_cgroup(&self, case: &Case, addresses: String) -> Result<Way> {
        let client = Client::start(&self.client, &self.program, &self.cgroup(case)?)?;
        Ok(Way::new(client, addresses))
    }

    /// A case's cgroup below the shared client pod's.
    fn cgroup(&self, case: &Case) -> Result<PathBuf> {
        let cgroup = self.client.cgroup().join(case.name);
        fs::create_dir_all(&cgroup).with_context(|| format!("make {}", cgroup.display()))?;
        Ok(cgroup)
    }

    /// Rules that `words` load, on a node of their own.
    fn rules(&self, case: &Case, cluster: Cluster, words: &[&str], rules: &str) -> Result<Way> {
        let place = Place::new(&self.lab, case.name, &self.program)?;
        let name = format!("{}-client", case.name);
        let pod = place.pod(&self.lab, &name, "client", &[CLIENT])?;
        let file = place.node.write("rules", rules)?.display().to_string();
        let began = Instant::now();
        let loaded = place.node.run(&[words, &[&file]].concat(), LOAD_LIMIT)?;
        let load = began.elapsed();
        loaded.ok().with_context(|| words.join(" "))?;
        let client = Client::start(&pod, &self.program, pod.cgroup())?;
        Ok(Way {
            load: Some(load),
            _place: Some(place),
            ..Way::new(client, at(cluster.asked()))
        })
    }

    fn proxy(&self, case: &Case) -> Result<Way> {
        let node = &self.plain.node;
        tool::ip(node.netns(), &format!("addr add {PROXY}/32 dev lo\n"))?;
        let file = node.write("haproxy.cfg", &cluster::haproxy(PROXY))?;
        let file = file.display().to_string();
        let mut proxy = node.spawn("haproxy", &["haproxy", "-db", "-f", &file])?;
        let mut way = self.in_cgroup(case, at(PROXY))?;
        tool::eventually("an answer through haproxy", UP_LIMIT, || {
            proxy.running()?;
            way.client.times("first_byte", &way.addresses, 1)
        })?;
        Ok(Way {
            _process: Some(proxy),
            ..way
        })
    }

    /// Changes endpoints of Holdfast's tables, one at a time, in a process of its own: [`CHANGE`].
    ///
    /// # Errors
    ///
    /// If the kernel does not take it.
    pub(super) fn change(&self, case: &Case) -> Result<Changes> {
        let cgroup = self.cgroup(case)?.display().to_string();
        let words = [&[self.program.as_str(), "change", &cgroup], &CHANGE[..]].concat();
        let said = self.plain.node.run(&words, CHANGE_LIMIT)?.ok()?;
        let said: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
        let changes = said.get("change_ns").and_then(Value::as_array);
        let changes = changes.context("no change_ns")?.iter();
        let changes = changes.filter_map(Value::as_u64).map(Duration::from_nanos);
        let mut changes: Vec<_> = changes.collect();
        changes.sort_unstable();
        let memory = said.get("map_memory_bytes").and_then(Value::as_u64);
        Ok(Changes {
            load: nanoseconds(&said, "load_ns")?,
            changes,
            map_memory_bytes: memory.context("no map_memory_bytes")?,
        })
    }
}

impl Place {
    fn new(lab: &Lab, name: &str, program: &str) -> Result<Self> {
        Self::in_cgroup(lab, name, program, None)
    }

    /// With the server in a cgroup that is not its pod's own, if there is one.
    fn in_cgroup(lab: &Lab, name: &str, program: &str, cgroup: Option<&Path>) -> Result<Self> {
        let node = lab.add_node(name)?;
        node.sysctl("net/ipv4/ip_forward", "1")?;
        let server = pod(lab, &node, &format!("{name}-server"), "server", &ENDPOINTS)?;
        let listen = endpoints();
        let listen = listen.iter().map(String::as_str);
        let mut words: Vec<_> = [program, "serve"].into_iter().chain(listen).collect();
        let moves = cgroup
            .map(|cgroup| format!("echo $$ > {}/cgroup.procs && exec \"$@\"", cgroup.display()));
        if let Some(moves) = &moves {
            words = [&["sh", "-c", moves, "sh"], &words[..]].concat();
        }
        let mut process = server.spawn("server", &words)?;
        tool::eventually("a server that listens", UP_LIMIT, || {
            process.running()?;
            process
                .log()
                .contains("listening")
                .then_some(())
                .context("silence")
        })?;
        Ok(Self {
            node,
            _server: process,
        })
    }

    fn pod(&self, lab: &Lab, name: &str, port: &str, addresses: &[Ipv4Addr]) -> Result<Node> {
        pod(lab, &self.node, name, port, addresses)
    }
}

/// A pod with its addresses, joined to `node` by the node's interface `port`.
fn pod(lab: &Lab, node: &Node, name: &str, port: &str, addresses: &[Ipv4Addr]) -> Result<Node> {
    let addresses = addresses.iter().map(|&own| [NODE.into(), own.into()]);
    lab.node_behind(node, port, name, &addresses.collect::<Vec<_>>())
}

/// The way with Holdfast's programs and tables on it.
fn held(
    node: &Node,
    program: &str,
    case: &Case,
    cluster: Cluster,
    cgroup: &Path,
    interfaces: &[&str],
    way: Way,
) -> Result<Way> {
    let table = node.write(&format!("{}.table", case.name), &cluster.table())?;
    let [cgroup, table] = [cgroup, &table].map(|path| path.display().to_string());
    let words = [&[program, "hold", &cgroup, &table], interfaces].concat();
    let mut holder = node.spawn(case.name, &words)?;
    let load = tool::eventually("filled service maps", UP_LIMIT, || {
        holder.running()?;
        nanoseconds(&serde_json::from_str(&holder.log())?, "load_ns")
    })?;
    Ok(Way {
        load: Some(load),
        _process: Some(holder),
        ..way
    })
}

impl Way {
    fn new(client: Client, addresses: String) -> Self {
        Self {
            client,
            addresses,
            load: None,
            _process: None,
            _place: None,
        }
    }
}

fn endpoints() -> [String; ENDPOINTS.len()] {
    ENDPOINTS.map(|address| format!("{address}:{ENDPOINT_PORT}"))
}

fn at(service: Ipv4Addr) -> String {
    format!("{service}:{SERVICE_PORT}")
}

fn nanoseconds(said: &Value, key: &str) -> Result<Duration> {
    let value = said.get(key).and_then(Value::as_u64);
    value
        .map(Duration::from_nanos)
        .with_context(|| format!("no {key} in {said}"))
}
