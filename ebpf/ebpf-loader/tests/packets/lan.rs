//! Three network namespaces: a client, a gateway with the programs on the client's side, servers.

use std::{
    fs::{self, File},
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
    process,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
};

use ebpf_abi::PacketCounter;
use ebpf_loader::{Clients, Frontend, LinkHeader, Protocol, Services, find_cgroup2};
use rustix::{
    net::{AddressFamily, SocketType, netdevice, socket},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::netns::{ip, new_network_namespace};

/// The forwarding and the cgroup's name are the process's: one test at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// One family's addresses in the lab.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Family {
    pub(crate) client: IpAddr,
    pub(crate) service: SocketAddr,
    pub(crate) server: IpAddr,
}

pub(crate) fn families() -> [Family; 2] {
    let family = |client: &str, service: &str, server: &str| Family {
        client: client.parse().unwrap(),
        service: service.parse().unwrap(),
        server: server.parse().unwrap(),
    };
    [
        family("192.168.7.2", "10.96.0.1:80", "10.0.9.9"),
        family("fd07::2", "[fd96::1]:80", "fd00:9::9"),
    ]
}

/// The test's thread is the gateway, until this is dropped.
pub(crate) struct Lan {
    pub(crate) services: Services,
    client: File,
    servers: File,
    home: File,
    cgroup: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

impl Lan {
    pub(crate) fn new() -> Self {
        let turn = turn();
        // No process is in it: the programs at sockets see nothing of this test.
        let cgroup = find_cgroup2()
            .unwrap()
            .join(format!("hf-test-{}-outside", process::id()));
        fs::create_dir(&cgroup).expect("making a cgroup needs root");
        let home = namespace();
        let [client, servers] = [(); 2].map(|()| thread::spawn(new_namespace).join().unwrap());
        drop(new_namespace());
        for (name, peer, addresses) in [
            ("lan0", &client, ["192.168.7.1/24", "fd07::1/64"]),
            ("net0", &servers, ["10.0.9.1/24", "fd00:9::1/64"]),
        ] {
            let peer = format!("/proc/{}/fd/{}", process::id(), peer.as_raw_fd());
            ip(&[
                "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", &peer,
            ]);
            up(name, addresses);
        }
        inside(&client, || {
            up("eth0", ["192.168.7.2/24", "fd07::2/64"]);
            via("192.168.7.1", "fd07::1");
        });
        inside(&servers, || {
            up("eth0", ["10.0.9.9/24", "fd00:9::9/64"]);
            via("10.0.9.1", "fd00:9::1");
        });
        for forwarding in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            fs::write(format!("/proc/sys/net/{forwarding}"), "1").unwrap();
        }
        let loaded = Services::load_with_packets(&cgroup);
        let mut services = loaded.unwrap_or_else(|error| panic!("{error}\n{error:?}"));
        services
            .attach_interface(index("lan0"), LinkHeader::Ethernet)
            .unwrap();
        Self {
            services,
            client,
            servers,
            home,
            cgroup,
            _turn: turn,
        }
    }

    /// Makes `asked` the lab's only service.
    pub(crate) fn serve(&mut self, asked: SocketAddr, endpoints: &[SocketAddr]) {
        let frontend = |protocol| Frontend {
            clients: Clients::All,
            address: asked.ip(),
            port: asked.port(),
            protocol,
        };
        let desired = [Protocol::Tcp, Protocol::Udp]
            .map(|protocol| (frontend(protocol), endpoints.to_vec().into()));
        self.services.apply(&desired.into()).unwrap();
    }

    pub(crate) fn in_client<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        inside(&self.client, run)
    }

    pub(crate) fn in_servers<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        inside(&self.servers, run)
    }

    pub(crate) fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    pub(crate) fn counted(&self, counter: PacketCounter) -> u64 {
        self.services.packet_counters().unwrap()[&counter]
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        return_home(&self.home, &self.cgroup);
    }
}

/// A test's, until it is dropped.
pub(crate) fn turn() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Back to the namespace where the thread was; the cgroup goes.
pub(crate) fn return_home(home: &File, cgroup: &Path) {
    let back = LinkNameSpaceType::Network;
    let home = move_into_link_name_space(home.as_fd(), Some(back));
    let removed = fs::remove_dir(cgroup);
    // A second panic would hide the first.
    if !thread::panicking() {
        home.unwrap();
        removed.unwrap();
    }
}

/// The index of a gateway's interface.
pub(crate) fn index(name: &str) -> NonZeroU32 {
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None).unwrap();
    let index = netdevice::name_to_index(any, name).unwrap();
    NonZeroU32::new(index).unwrap()
}

fn up(name: &str, addresses: [&str; 2]) {
    for address in addresses {
        let mut arguments = vec!["addr", "add", address, "dev", name];
        if address.contains(':') {
            arguments.push("nodad");
        }
        ip(&arguments);
    }
    ip(&["link", "set", name, "up"]);
}

fn via(gateway: &str, gateway_v6: &str) {
    ip(&["route", "add", "default", "via", gateway]);
    ip(&["-6", "route", "add", "default", "via", gateway_v6]);
}

pub(crate) fn namespace() -> File {
    File::open("/proc/thread-self/ns/net").unwrap()
}

/// The calling thread's from now on.
pub(crate) fn new_namespace() -> File {
    new_network_namespace();
    namespace()
}

pub(crate) fn inside<T: Send>(namespace: &File, run: impl FnOnce() -> T + Send) -> T {
    let enter = || {
        let network = LinkNameSpaceType::Network;
        move_into_link_name_space(namespace.as_fd(), Some(network)).unwrap();
        run()
    };
    thread::scope(|scope| scope.spawn(enter).join().unwrap())
}
