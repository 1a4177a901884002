//! A cgroup and a network namespace for one test, and servers in it.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData, MapInfo, loaded_maps},
    programs::{links::LinkInfo, loaded_links, loaded_programs},
};
use ebpf_abi::{Counter, PeerPlace};
use ebpf_loader::{
    ApplyReport, Backends, Clients, Frontend, LoadError, Protocol, Services, find_cgroup2,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    thread::{
        CapabilitySet, CapabilitySets, LinkNameSpaceType, capabilities, move_into_link_name_space,
        set_capabilities,
    },
};

use crate::netns::{ip, new_network_namespace};

/// What should happen at once on loopback has happened by then, or never will.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// A process is in one cgroup: one test at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

const PREFIX: &str = "hf-test-";

/// The test's thread is in a network namespace with loopback only, its process in a cgroup with
/// the programs attached, until this is dropped.
pub(crate) struct Lab {
    services: Option<Services>,
    cgroup: PathBuf,
    outside: PathBuf,
    home_cgroup: PathBuf,
    home_namespace: File,
    _turn: MutexGuard<'static, ()>,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let root = find_cgroup2().unwrap();
        remove_stale(&root);
        let cgroup = root.join(format!("{PREFIX}{}", process::id()));
        let outside = root.join(format!("{PREFIX}{}-outside", process::id()));
        for folder in [&cgroup, &outside] {
            fs::create_dir(folder).expect("making a cgroup needs root");
        }
        let home_cgroup = own_cgroup(&root);
        let home_namespace = File::open("/proc/thread-self/ns/net").unwrap();
        let services = None;
        let mut lab = Self {
            services,
            cgroup,
            outside,
            home_cgroup,
            home_namespace,
            _turn: turn,
        };
        enter(&lab.cgroup).unwrap();
        new_network_namespace();
        lab.load();
        lab
    }

    pub(crate) fn load(&mut self) {
        let loaded = Services::load(&self.cgroup);
        self.services = Some(loaded.unwrap_or_else(|error| panic!("{error}\n{error:?}")));
    }

    /// Capabilities belong to the thread.
    pub(crate) fn load_with(&self, effective: CapabilitySet) -> Result<Services, LoadError> {
        let all = capabilities(None).unwrap();
        set_capabilities(None, CapabilitySets { effective, ..all }).unwrap();
        let loaded = Services::load(&self.cgroup);
        set_capabilities(None, all).unwrap();
        loaded
    }

    pub(crate) fn services(&mut self) -> &mut Services {
        self.services.as_mut().unwrap()
    }

    pub(crate) fn take_services(&mut self) -> Services {
        self.services.take().unwrap()
    }

    pub(crate) fn apply(
        &mut self,
        services: &[(SocketAddr, Protocol, &[SocketAddr])],
    ) -> ApplyReport {
        self.apply_with(None, services)
    }

    pub(crate) fn apply_with(
        &mut self,
        affinity: Option<Duration>,
        services: &[(SocketAddr, Protocol, &[SocketAddr])],
    ) -> ApplyReport {
        let like = Backends {
            affinity,
            ..Backends::default()
        };
        self.apply_like(&like, services)
    }

    /// All of them as `like`, but for the endpoints.
    pub(crate) fn apply_like(
        &mut self,
        like: &Backends,
        services: &[(SocketAddr, Protocol, &[SocketAddr])],
    ) -> ApplyReport {
        let backends = |endpoints: &[SocketAddr]| Backends {
            endpoints: endpoints.to_vec(),
            ..like.clone()
        };
        let frontend = |addr: SocketAddr, protocol| Frontend {
            clients: Clients::All,
            address: addr.ip(),
            port: addr.port(),
            protocol,
        };
        let desired = services
            .iter()
            .map(|&(addr, protocol, endpoints)| (frontend(addr, protocol), backends(endpoints)))
            .collect();
        self.services().apply(&desired).unwrap()
    }

    /// What the programs counted until now.
    pub(crate) fn counted(&self) -> impl Fn(Counter) -> u64 + use<> {
        let counters = self.services.as_ref().unwrap().counters().unwrap();
        move |counter| counters[&counter]
    }

    /// How many connected sockets have a place in the map that is for most of them.
    pub(crate) fn places_taken(&self) -> usize {
        let map = Map::Array(map_named("hf_peer_places"));
        let places = Array::<_, PeerPlace>::try_from(map).unwrap();
        let places = places.iter().map(Result::unwrap);
        places.filter(|place| place.cookie != 0).count()
    }

    /// How many entries the kernel says that the loader's map has.
    pub(crate) fn map_entries<K: Pod, V: Pod>(&self, name: &str) -> usize {
        HashMap::<_, K, V>::try_from(Map::HashMap(map_named(name)))
            .unwrap()
            .keys()
            .map(Result::unwrap)
            .count()
    }

    pub(crate) fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// A cgroup in which the process is not.
    pub(crate) fn outside(&self) -> &Path {
        &self.outside
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.services = None;
        let back = LinkNameSpaceType::Network;
        let undone = [
            move_into_link_name_space(self.home_namespace.as_fd(), Some(back)).map_err(Into::into),
            enter(&self.home_cgroup),
            fs::remove_dir(&self.cgroup),
            fs::remove_dir(&self.outside),
        ];
        // A second panic would hide the first.
        if !thread::panicking() {
            undone.into_iter().for_each(Result::unwrap);
        }
    }
}

fn own_cgroup(root: &Path) -> PathBuf {
    let membership = fs::read_to_string("/proc/self/cgroup").unwrap();
    let path = membership
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .unwrap();
    root.join(path)
}

fn enter(cgroup: &Path) -> io::Result<()> {
    fs::write(cgroup.join("cgroup.procs"), process::id().to_string())
}

/// What test processes left that were killed.
fn remove_stale(root: &Path) {
    for entry in fs::read_dir(root).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap_or_default();
        let Some(rest) = name.strip_prefix(PREFIX) else {
            continue;
        };
        let pid = rest.trim_end_matches("-outside");
        if !Path::new("/proc").join(pid).exists() {
            // Another test process may have been faster.
            fs::remove_dir(entry.path()).ok();
        }
    }
}

/// A way to name a service and its endpoints: IPv4, IPv6, and IPv4 on an IPv6 socket.
pub(crate) struct Family {
    pub(crate) name: &'static str,
    /// What the client's socket is bound to.
    pub(crate) client: &'static str,
    /// What the client asks for.
    pub(crate) asked: &'static str,
    /// Where the endpoints are.
    pub(crate) loopback: &'static str,
}

pub(crate) const FAMILIES: [Family; 3] = [
    Family {
        name: "IPv4",
        client: "0.0.0.0:0",
        asked: "10.96.0.1:80",
        loopback: "127.0.0.1:0",
    },
    Family {
        name: "IPv6",
        client: "[::]:0",
        asked: "[fd00:96::1]:80",
        loopback: "[::1]:0",
    },
    Family {
        name: "IPv4-mapped",
        client: "[::]:0",
        asked: "[::ffff:10.96.0.1]:80",
        loopback: "127.0.0.1:0",
    },
];

/// The map of this process' loader.
fn map_named(name: &str) -> MapData {
    let named = |id: &u32| MapInfo::from_id(*id).unwrap().name_as_str() == Some(name);
    let id = own_bpf_objects().maps.into_iter().find(named).unwrap();
    MapData::from_id(id).unwrap()
}

impl Family {
    pub(crate) fn asked(&self) -> SocketAddr {
        self.asked.parse().unwrap()
    }

    pub(crate) fn client(&self) -> UdpSocket {
        let socket = UdpSocket::bind(self.client).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }

    /// Makes the lab's only service this one.
    pub(crate) fn serve(
        &self,
        lab: &mut Lab,
        protocol: Protocol,
        endpoints: &[SocketAddr],
    ) -> ApplyReport {
        lab.apply(&[(self.asked(), protocol, endpoints)])
    }
}

pub(crate) fn addresses<T>(
    servers: &[T],
    address: impl Fn(&T) -> io::Result<SocketAddr>,
) -> Vec<SocketAddr> {
    servers
        .iter()
        .map(|server| address(server).unwrap())
        .collect()
}

/// Gives loopback an address. To an IPv6 one there is a way only a moment later.
pub(crate) fn add_to_loopback(address: IpAddr) {
    ip(&["addr", "add", &address.to_string(), "dev", "lo"]);
    let reach = || UdpSocket::bind((address, 0))?.connect((address, 1));
    let began = Instant::now();
    while let Err(error) = reach() {
        assert!(began.elapsed() < PATIENCE, "{address}: {error}");
        thread::yield_now();
    }
}

pub(crate) fn tcp_servers(address: &str, count: usize) -> Vec<TcpListener> {
    let server = |_| TcpListener::bind(address).unwrap();
    (0..count).map(server).collect()
}

pub(crate) fn udp_servers(address: &str, count: usize) -> Vec<UdpSocket> {
    let server = |_| UdpSocket::bind(address).unwrap();
    (0..count).map(server).collect()
}

/// Waits for the next connection; which server has it.
#[track_caller]
pub(crate) fn accepted(servers: &[TcpListener]) -> (usize, TcpStream) {
    let ready = ready(servers);
    (ready, servers[ready].accept().unwrap().0)
}

/// Waits for the next datagram; which server has it, and from where.
#[track_caller]
pub(crate) fn datagram(servers: &[UdpSocket]) -> (usize, SocketAddr) {
    let ready = ready(servers);
    (ready, servers[ready].recv_from(&mut [0; 8]).unwrap().1)
}

/// One question to the service and its answer on an unconnected socket; who answered.
#[track_caller]
pub(crate) fn ask(client: &UdpSocket, family: &Family, servers: &[UdpSocket]) -> usize {
    client.send_to(b"?", family.asked()).unwrap();
    let (server, shown) = answered(client, servers);
    assert_eq!(shown, family.asked(), "{}", family.name);
    server
}

/// One question and its answer on a connected socket; who answered, and from whom the client is told that it came.
#[track_caller]
pub(crate) fn ask_connected(client: &UdpSocket, servers: &[UdpSocket]) -> (usize, SocketAddr) {
    client.send(b"?").unwrap();
    answered(client, servers)
}

#[track_caller]
fn answered(client: &UdpSocket, servers: &[UdpSocket]) -> (usize, SocketAddr) {
    let (server, from) = datagram(servers);
    servers[server].send_to(b"!", from).unwrap();
    (server, client.recv_from(&mut [0; 8]).unwrap().1)
}

#[track_caller]
fn ready(sockets: &[impl AsFd]) -> usize {
    let mut fds: Vec<_> = sockets
        .iter()
        .map(|fd| PollFd::new(fd, PollFlags::IN))
        .collect();
    let patience = Timespec::try_from(PATIENCE).unwrap();
    poll(&mut fds, Some(&patience)).unwrap();
    let ready = fds
        .iter()
        .position(|fd| fd.revents().contains(PollFlags::IN));
    ready.expect("nothing came to any server")
}

/// A byte each way.
#[track_caller]
pub(crate) fn exchange(mut one: &TcpStream, mut other: &TcpStream) {
    for stream in [one, other] {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    one.write_all(b"?").unwrap();
    other.read_exact(&mut [0]).unwrap();
    other.write_all(b"!").unwrap();
    one.read_exact(&mut [0]).unwrap();
}

/// The median times of `connect` to each address, in turns. All end at `server`.
pub(crate) fn connect_times<const N: usize>(
    server: &TcpListener,
    addresses: [SocketAddr; N],
) -> [Duration; N] {
    const CONNECTS: usize = 2_001;
    let mut times = [const { Vec::new() }; N];
    for _ in 0..CONNECTS {
        for (times, address) in times.iter_mut().zip(addresses) {
            let began = Instant::now();
            let client = TcpStream::connect(address).unwrap();
            times.push(began.elapsed());
            drop((server.accept().unwrap(), client));
        }
    }
    times.map(|mut times| {
        times.sort_unstable();
        times[CONNECTS / 2]
    })
}

/// Numbers the kernel gave to what this process loaded.
#[derive(Debug, Default)]
pub(crate) struct BpfObjects {
    pub(crate) programs: BTreeSet<u32>,
    pub(crate) maps: BTreeSet<u32>,
    pub(crate) links: BTreeSet<u32>,
}

/// By the file descriptors of this process.
pub(crate) fn own_bpf_objects() -> BpfObjects {
    let mut objects = BpfObjects::default();
    for info in descriptor_infos() {
        // A link's says its program as well.
        if let Some(id) = info_number(&info, "link_id:") {
            objects.links.insert(id);
        } else if let Some(id) = info_number(&info, "map_id:") {
            objects.maps.insert(id);
        } else if let Some(id) = info_number(&info, "prog_id:") {
            objects.programs.insert(id);
        }
    }
    objects
}

/// What the maps of this process take, as the kernel accounts it.
pub(crate) fn map_memory_bytes() -> u32 {
    let infos = descriptor_infos();
    let maps = infos.filter(|info| info_number(info, "map_id:").is_some());
    maps.filter_map(|info| info_number(&info, "memlock:")).sum()
}

fn descriptor_infos() -> impl Iterator<Item = String> {
    let entries = fs::read_dir("/proc/self/fdinfo")
        .unwrap()
        .map(Result::unwrap);
    // The folder's own descriptor is gone by the time it is read.
    entries.filter_map(|entry| fs::read_to_string(entry.path()).ok())
}

fn info_number(info: &str, key: &str) -> Option<u32> {
    let value = info.lines().find_map(|line| line.strip_prefix(key));
    value.map(|text| text.trim().parse().unwrap())
}

impl BpfObjects {
    /// The kernel frees in the background and tells nobody: asks again until it has.
    pub(crate) fn wait_until_gone(&self) {
        let began = Instant::now();
        loop {
            let left = self.left();
            if left.is_empty() {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "still in the kernel: {left:?}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn left(&self) -> Vec<String> {
        // Others' objects may go while they are listed: errors are theirs.
        let programs = loaded_programs().flatten().map(|program| program.id());
        let maps = loaded_maps().flatten().map(|map| map.id());
        let links = loaded_links().flatten().map(|link: LinkInfo| link.id());
        let programs = programs.filter(|id| self.programs.contains(id));
        let maps = maps.filter(|id| self.maps.contains(id));
        let links = links.filter(|id| self.links.contains(id));
        let named = programs.map(|id| format!("program {id}"));
        let named = named.chain(maps.map(|id| format!("map {id}")));
        named.chain(links.map(|id| format!("link {id}"))).collect()
    }
}
