//! A lab's life: its id, its guardian, and what is taken away at the end.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use crate::{
    link::{Impairment, Link},
    nat::{self, NatKind},
    node::{Node, unmount_bpffs},
    site::{Internet, Site},
    tool,
};

/// The address by which every public node and every site reaches the lab's internet.
pub const INTERNET: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// A carrier's router and a home's, between themselves (RFC 6598).
const CARRIER: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 1);
const CUSTOMER: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 2);

/// The two ends of every wire of IPv6 between the internet and somebody: link-local, as everywhere.
const INTERNET_V6: &str = "fe80::1";
const OTHER_END_V6: &str = "fe80::2";

/// How TCP of nodes behind a router finds its speed: Linux's own default, as a namespace takes the machine's, and BBR
/// paces by timers, so that its streams are as fast as wake-ups happen to be. By route: a namespace may not make one its
/// default that is not in the machine's `tcp_allowed_congestion_control`.
const CONGESTION_CONTROL: &str = "congctl cubic";

/// Teardown waits this long for killed processes to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// A set of namespaces joined by one router, the internet.
#[derive(Debug)]
pub struct Lab {
    id: String,
    dir: PathBuf,
    cgroup: PathBuf,
    guardian: Option<Child>,
    internet: Node,
    names: Mutex<BTreeMap<String, Node>>,
    /// Of each node at the internet, the interface there.
    ports: Mutex<BTreeMap<String, String>>,
    links: AtomicU32,
}

impl Lab {
    /// Makes a lab with nothing in it but the internet. Labs of dead owners are swept first.
    ///
    /// # Errors
    ///
    /// If the process is not root, or `ip` or a kernel feature is missing.
    pub fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        ensure!(
            rustix::process::geteuid().is_root(),
            "labs need root: namespaces, TAP, nftables"
        );
        sweep()?;
        let id = format!(
            "hf{}x{}",
            process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let dir = dir_of(&id);
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        fs::write(dir.join("owner"), owner(process::id())?)?;
        let cgroup = cgroup_mount()?.join(&id);
        fs::create_dir_all(&cgroup).with_context(|| format!("make {}", cgroup.display()))?;
        let guardian = start_guardian(&id)?;
        let internet = Node::new(&id, "internet", &dir, &cgroup)?;
        internet.make_router()?;
        let names = Mutex::new(BTreeMap::from([("internet".to_owned(), internet.clone())]));
        let links = AtomicU32::new(0);
        let ports = Mutex::default();
        Ok(Self {
            id,
            dir,
            cgroup,
            guardian: Some(guardian),
            internet,
            names,
            ports,
            links,
        })
    }

    /// `hf<pid>x<n>`: the prefix of its namespaces, the name of its cgroup and of its folder.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The folder with everything that its nodes write.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The router between everything.
    #[must_use]
    pub fn internet(&self) -> &Node {
        &self.internet
    }

    /// A node that was made before.
    ///
    /// # Errors
    ///
    /// If there is none of this name.
    pub fn node(&self, name: &str) -> Result<Node> {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names
            .get(name)
            .cloned()
            .with_context(|| format!("no node {name} in lab {}", self.id))
    }

    /// Every node and router.
    #[must_use]
    pub fn nodes(&self) -> Vec<Node> {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.values().cloned().collect()
    }

    /// A node with a loopback and no link.
    ///
    /// # Errors
    ///
    /// If the name is taken.
    pub fn add_node(&self, name: &str) -> Result<Node> {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(
            !names.contains_key(name),
            "lab {} has a node {name} already",
            self.id
        );
        let node = Node::new(&self.id, name, &self.dir, &self.cgroup)?;
        names.insert(name.to_owned(), node.clone());
        Ok(node)
    }

    /// A node with a public address, one perfect wire from the internet.
    ///
    /// # Errors
    ///
    /// If the name is taken.
    pub fn public_node(&self, name: &str, address: Ipv4Addr) -> Result<Node> {
        let node = self.add_node(name)?;
        let port = self.next_port();
        self.veth(&node, "wan", &self.internet, &port)?;
        self.note_port(&node, &port);
        self.route_uplink(&node, address, &port)?;
        Ok(node)
    }

    /// Gives a public node an IPv6 address beside the other.
    ///
    /// # Errors
    ///
    /// If the node is not one of [`Self::public_node`], or has one already.
    pub fn add_ipv6(&self, node: &Node, address: Ipv6Addr) -> Result<()> {
        self.route_ipv6(node, &format!("{address}/128"))?;
        let own = format!("addr add {address}/128 dev wan nodad\n");
        tool::ip(node.netns(), &own)
    }

    /// A router with an IPv4 LAN behind it, joined to the internet by an impaired link.
    ///
    /// # Errors
    ///
    /// If the name is taken, or the impairment is out of range.
    pub fn site(
        &self,
        name: &str,
        kind: NatKind,
        wan: Ipv4Addr,
        impairment: Impairment,
    ) -> Result<Site> {
        self.site_with(name, Internet::ipv4(kind, wan), impairment)
    }

    /// The same, of either family or both.
    ///
    /// # Errors
    ///
    /// If the name is taken, there is neither family, or the impairment is out of range.
    pub fn site_with(
        &self,
        name: &str,
        internet: Internet,
        impairment: Impairment,
    ) -> Result<Site> {
        ensure!(
            internet.ipv4.is_some() || internet.ipv6.is_some(),
            "site {name} has neither IPv4 nor IPv6"
        );
        let router = self.add_node(&format!("{name}-router"))?;
        router.make_router()?;
        let double = matches!(internet.ipv4, Some((NatKind::Double, _)));
        let border = if double {
            ensure!(
                internet.ipv6.is_none(),
                "site {name}: the router of a carrier that translates passes no IPv6"
            );
            self.carrier(name, &router)?
        } else {
            router.clone()
        };
        let port = self.next_port();
        let link = self.impaired(&border, "wan", &self.internet, &port, impairment)?;
        self.note_port(&border, &port);
        let mut lan = [192, 168, 1];
        if let Some((kind, wan)) = internet.ipv4 {
            self.route_uplink(&border, wan, &port)?;
            if kind == NatKind::None {
                // Reachable from everywhere, so its own.
                lan = [10, u8::try_from(self.links.load(Ordering::Relaxed))?, 1];
                let [a, b, c] = lan;
                let route = format!("route add {a}.{b}.{c}.0/24 via {wan} dev {port} onlink\n");
                tool::ip(self.internet.netns(), &route)?;
            }
        }
        if let Some((_, prefix)) = internet.ipv6 {
            self.route_ipv6(&border, &format!("{prefix}/64"))?;
        }
        Site::new(name, internet, [router, border], port, lan, link)
    }

    /// A carrier's router, with a home's router behind it.
    fn carrier(&self, name: &str, home: &Node) -> Result<Node> {
        let carrier = self.add_node(&format!("{name}-carrier"))?;
        carrier.make_router()?;
        self.veth(home, "wan", &carrier, "lan")?;
        let [outer, inner] = [CARRIER, CUSTOMER];
        tool::ip(carrier.netns(), &format!("addr add {outer}/30 dev lan\n"))?;
        let uplink =
            format!("addr add {inner}/30 dev wan\nroute add default via {outer} dev wan\n");
        tool::ip(home.netns(), &uplink)?;
        tool::nft(
            carrier.netns(),
            &nat::rules(NatKind::PortRestricted, &[(inner, 0)]),
        )?;
        Ok(carrier)
    }

    /// Joins two nodes by a perfect wire; the interfaces get no address.
    ///
    /// # Errors
    ///
    /// If an interface name is taken.
    pub fn veth(&self, a: &Node, a_if: &str, b: &Node, b_if: &str) -> Result<()> {
        let add = format!(
            "link add {a_if} type veth peer name {b_if} netns {}",
            b.netns()
        );
        tool::ip(a.netns(), &format!("{add}\nlink set {a_if} up\n"))?;
        tool::ip(b.netns(), &format!("link set {b_if} up\n"))
    }

    /// A node behind `router` as a CNI plug-in makes a pod: its `eth0` is the router's `port`. Each of its own addresses
    /// with the router's of that family before it.
    ///
    /// # Errors
    ///
    /// If a name is taken.
    pub fn node_behind(
        &self,
        router: &Node,
        port: &str,
        name: &str,
        addresses: &[[IpAddr; 2]],
    ) -> Result<Node> {
        let node = self.add_node(name)?;
        self.veth(&node, "eth0", router, port)?;
        let (mut there, mut here) = (String::new(), String::new());
        for [gateway, own] in addresses {
            let nodad = if own.is_ipv6() { " nodad" } else { "" };
            there += &format!(
                "addr replace {gateway} dev {port}{nodad}\nroute add {own} dev {port} {CONGESTION_CONTROL}\n"
            );
            here += &format!(
                "addr add {own} dev eth0{nodad}\nroute replace default via {gateway} dev eth0 onlink {CONGESTION_CONTROL}\n"
            );
        }
        tool::ip(router.netns(), &there)?;
        tool::ip(node.netns(), &here)?;
        Ok(node)
    }

    /// Joins two nodes by the lab's own link process; the interfaces get no address.
    ///
    /// # Errors
    ///
    /// If an interface name is taken, or the impairment is out of range.
    pub fn impaired(
        &self,
        a: &Node,
        a_if: &str,
        b: &Node,
        b_if: &str,
        impairment: Impairment,
    ) -> Result<Link> {
        let cgroup = self.cgroup.join("links");
        fs::create_dir_all(&cgroup)?;
        let link = Link::start(a.netns(), a_if, b.netns(), b_if, &cgroup, impairment)?;
        tool::ip(a.netns(), &format!("link set {a_if} up\n"))?;
        tool::ip(b.netns(), &format!("link set {b_if} up\n"))?;
        Ok(link)
    }

    /// Leaves the lab in place when the owner ends. Processes and links have to be released by
    /// their own `keep`.
    ///
    /// # Errors
    ///
    /// If the guardian is gone.
    pub fn keep(mut self) -> Result<String> {
        fs::write(self.dir.join("kept"), "")?;
        let mut guardian = self.guardian.take().context("the guardian is gone")?;
        let stdin = guardian
            .stdin
            .as_mut()
            .context("the guardian has no pipe")?;
        stdin.write_all(b"keep\n")?;
        guardian.wait()?;
        Ok(self.id.clone())
    }

    fn next_port(&self) -> String {
        format!("port{}", self.links.fetch_add(1, Ordering::Relaxed))
    }

    fn note_port(&self, node: &Node, port: &str) {
        let mut ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        ports.insert(node.name().to_owned(), port.to_owned());
    }

    /// The destination down, and a default route up.
    fn route_ipv6(&self, node: &Node, destination: &str) -> Result<()> {
        let ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        let port = ports.get(node.name());
        let port = port.with_context(|| format!("{} is not at the internet", node.name()))?;
        // Nobody else is on the wire: no search for duplicates, which takes a second.
        let down = format!(
            "addr add {INTERNET_V6}/64 dev {port} nodad\n\
             route add {destination} via {OTHER_END_V6} dev {port}\n"
        );
        tool::ip(self.internet.netns(), &down)?;
        let up = format!(
            "addr add {OTHER_END_V6}/64 dev wan nodad\nroute add ::/0 via {INTERNET_V6} dev wan\n"
        );
        tool::ip(node.netns(), &up)
    }

    /// A host route down, and a default route up: no subnets to plan.
    fn route_uplink(&self, node: &Node, address: Ipv4Addr, port: &str) -> Result<()> {
        let down =
            format!("addr add {INTERNET}/32 dev {port}\nroute add {address}/32 dev {port}\n");
        tool::ip(self.internet.netns(), &down)?;
        let up = format!(
            "addr add {address}/32 dev wan\nroute add default via {INTERNET} dev wan onlink\n"
        );
        tool::ip(node.netns(), &up)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(mut guardian) = self.guardian.take() {
            drop(guardian.stdin.take());
            if let Err(error) = guardian.wait() {
                eprintln!("lab {}: guardian: {error}", self.id);
            }
        }
    }
}

fn start_guardian(id: &str) -> Result<Child> {
    use std::os::unix::process::CommandExt as _;
    Command::new(tool::binary("lab")?)
        .args(["guard", id])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .process_group(0) // Ctrl-C ends the owner, not the guardian.
        .spawn()
        .context("start the lab's guardian")
}

/// The guardian's whole life: waits for its owner's end, then takes the lab away.
///
/// # Errors
///
/// If something could not be taken away.
pub fn guard(id: &str) -> Result<()> {
    let mut line = String::new();
    if std::io::stdin().read_line(&mut line)? > 0 {
        ensure!(line == "keep\n", "unknown word from the owner: {line}");
        return Ok(());
    }
    teardown(id)
}

/// Takes away everything with this id. Says at the end what could not be.
///
/// # Errors
///
/// If something is left.
pub fn teardown(id: &str) -> Result<()> {
    ensure!(pid_in(id).is_some(), "{id} is not a lab's id");
    let mut problems = Vec::new();
    let mut note = |result: Result<()>| {
        if let Err(error) = result {
            problems.push(format!("{error:#}"));
        }
    };
    note(cgroup_mount().and_then(|mount| remove_cgroup(&mount.join(id))));
    for netns in entries(Path::new("/run/netns")) {
        if netns.starts_with(&format!("{id}-")) {
            note(tool::run("ip", &["netns", "del", &netns], "").map(drop));
        }
    }
    let dir = dir_of(id);
    for node in entries(&dir) {
        note(unmount_bpffs(&dir.join(node)));
    }
    if dir.exists() {
        note(fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display())));
    }
    if problems.is_empty() {
        Ok(())
    } else {
        bail!("{}", problems.join("; "))
    }
}

/// Takes away the labs whose owner is dead and which nobody wanted to keep.
///
/// # Errors
///
/// If the list of processes cannot be read.
pub fn sweep() -> Result<()> {
    let namespaces = entries(Path::new("/run/netns")).into_iter();
    let mut found: BTreeSet<_> = namespaces
        .filter_map(|name| name.split_once('-').map(|(id, _)| id.to_owned()))
        .collect();
    found.extend(entries(&labs_dir()));
    found.extend(entries(&cgroup_mount()?));
    for id in found {
        let Some(pid) = pid_in(&id) else {
            continue; // Not a lab's.
        };
        let dir = dir_of(&id);
        let alive = match fs::read_to_string(dir.join("owner")) {
            Ok(written) => owner(pid).is_ok_and(|now| now == written),
            Err(_) => owner(pid).is_ok(), // Being made, or half taken away.
        };
        if !alive && !dir.join("kept").exists() {
            // Its guardian may be at it too: then one of the two finds less to do.
            teardown(&id).or_else(|error| if dir.exists() { Err(error) } else { Ok(()) })?;
        }
    }
    Ok(())
}

/// A lab that stays.
#[derive(Debug, Serialize)]
pub struct Kept {
    /// [`Lab::id`].
    pub id: String,
    /// Its nodes and routers, by their names.
    pub nodes: Vec<String>,
}

/// The labs that somebody wanted to keep, by their ids.
#[must_use]
pub fn kept() -> Vec<Kept> {
    let namespaces = entries(Path::new("/run/netns"));
    let mut ids = entries(&labs_dir());
    ids.retain(|id| pid_in(id).is_some() && dir_of(id).join("kept").exists());
    ids.sort();
    let nodes_of = |id: &str| {
        let own = namespaces.iter().filter_map(|name| name.split_once('-'));
        let own = own.filter(|(of, _)| *of == id);
        let mut nodes: Vec<_> = own.map(|(_, node)| node.to_owned()).collect();
        nodes.sort();
        nodes
    };
    ids.into_iter()
        .map(|id| Kept {
            nodes: nodes_of(&id),
            id,
        })
        .collect()
}

/// The folder of the lab with this id.
#[must_use]
pub fn dir_of(id: &str) -> PathBuf {
    labs_dir().join(id)
}

/// The owner's number in a lab's id, `hf<pid>x<n>`.
fn pid_in(id: &str) -> Option<u32> {
    let (pid, count) = id.strip_prefix("hf")?.split_once('x')?;
    count.parse::<u32>().ok()?;
    pid.parse().ok()
}

/// A process as nobody else can be: its number and its start time.
fn owner(pid: u32) -> Result<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit(") ").next().unwrap_or_default();
    // Field 22 of proc_pid_stat(5); the first after the name is the third.
    let start = after_name
        .split(' ')
        .nth(19)
        .context("/proc/PID/stat is too short")?;
    Ok(format!("{pid} {start}"))
}

fn labs_dir() -> PathBuf {
    std::env::temp_dir().join("holdfast-lab")
}

fn entries(dir: &Path) -> Vec<String> {
    let read = fs::read_dir(dir).into_iter().flatten().flatten();
    read.filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// Where cgroup2 is: `/sys/fs/cgroup` on most machines, a folder below it on some.
///
/// # Errors
///
/// If it is not mounted.
pub fn cgroup_mount() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts")?;
    let mut fields = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>());
    let mount = fields.find_map(|fields| match fields.as_slice() {
        [_, path, "cgroup2", ..] => Some(PathBuf::from(path)),
        _ => None,
    });
    mount.context("cgroup2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup")
}

/// Kills what is in a cgroup and below, and removes it. Again and again: a launcher that was
/// started a moment ago may enter it in between.
fn remove_cgroup(cgroup: &Path) -> Result<()> {
    tool::eventually("the lab's processes end", KILL_LIMIT, || {
        if !cgroup.exists() {
            return Ok(());
        }
        fs::write(cgroup.join("cgroup.kill"), "1").context("kill the lab's processes")?;
        remove_tree(cgroup)
    })
}

fn remove_tree(cgroup: &Path) -> Result<()> {
    for name in entries(cgroup) {
        let below = cgroup.join(name);
        if below.is_dir() {
            remove_tree(&below)?;
        }
    }
    fs::remove_dir(cgroup).with_context(|| format!("remove {}", cgroup.display()))
}
