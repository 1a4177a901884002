//! A node with two pods, each joined to it by a veth with routes, as a CNI plug-in does.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process,
    sync::{
        Arc, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use ebpf_abi::RedirectCounter;
use ebpf_loader::{
    Clients, Frontend, Protocol, RedirectKind, RedirectLink, RedirectReport, Redirects, Services,
    find_cgroup2,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{
    lan::{index, inside, namespace, new_namespace, return_home, turn},
    netns::ip,
    redirect::tap,
    sockets::PATIENCE,
};

/// The node's own addresses towards its pods.
const NODE: [&str; 2] = ["10.244.0.1", "fd44::1"];

/// What new links may have lost is sent again after so long.
const AGAIN: Duration = Duration::from_millis(200);

/// How often a wire looks whether it is to end.
const WIRE_LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// Of the service of [`Node::serve`].
pub(crate) const SERVICES: [&str; 2] = ["10.96.0.1:80", "[fd96::1]:80"];

/// What a pod is called by; its addresses end with its number, as those of its links do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Name {
    /// The node's end of its veth.
    pub(crate) port: &'static str,
    number: u8,
}

pub(crate) const A: Name = Name {
    port: "pod-a",
    number: 0xa,
};
pub(crate) const B: Name = Name {
    port: "pod-b",
    number: 0xb,
};
pub(crate) const C: Name = Name {
    port: "pod-c",
    number: 0xc,
};

impl Name {
    /// IPv4's and IPv6's.
    pub(crate) fn addresses(self) -> [IpAddr; 2] {
        let Self { number, .. } = self;
        [
            format!("10.244.1.{number}").parse().unwrap(),
            format!("fd44::1:{number:x}").parse().unwrap(),
        ]
    }

    /// Of the end in the pod.
    pub(crate) fn mac(self) -> [u8; 6] {
        [2, 0, 0, 0, 2, self.number]
    }

    /// Of the node's end.
    pub(crate) fn port_mac(self) -> [u8; 6] {
        [2, 0, 0, 0, 1, self.number]
    }
}

/// The test's thread is the node, until this is dropped.
pub(crate) struct Node {
    pub(crate) services: Services,
    /// What it told, and will tell.
    pub(crate) redirects: Redirects,
    home: File,
    cgroup: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

/// Its namespace is there as long as this is.
pub(crate) struct Pod {
    namespace: File,
    _wire: Option<Wire>,
}

/// What a hypervisor does: frames go from one TAP device to the other until this is dropped.
struct Wire {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Node {
    pub(crate) fn new() -> Self {
        let turn = turn();
        // No process is in it: the programs at sockets see nothing of this test.
        let cgroup = find_cgroup2()
            .unwrap()
            .join(format!("hf-test-{}-pods", process::id()));
        fs::create_dir(&cgroup).expect("making a cgroup needs root");
        let home = namespace();
        drop(new_namespace());
        for forwarding in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            fs::write(format!("/proc/sys/net/{forwarding}"), "1").unwrap();
        }
        let loaded = Services::load_with_packets(&cgroup);
        let services = loaded.unwrap_or_else(|error| panic!("{error}\n{error:?}"));
        let own = NODE.map(|own| (host(own.parse().unwrap()), None));
        let redirects = Redirects {
            links: BTreeMap::new(),
            routes: own.into(),
        };
        Self {
            services,
            redirects,
            home,
            cgroup,
            _turn: turn,
        }
    }

    /// Two pods between which packets are redirected.
    pub(crate) fn with_pods() -> (Self, Pod, Pod) {
        let mut node = Self::new();
        let pods = [A, B].map(|name| {
            let pod = Pod::new(name, &[]);
            node.redirect(name);
            pod
        });
        let [a, b] = pods;
        for (a_ip, b_ip) in A.addresses().into_iter().zip(B.addresses()) {
            meet(&a.socket(a_ip), &b.socket(b_ip)); // Then they are neighbours of the node.
        }
        (node, a, b)
    }

    /// From and to the pod; whether its port was not looked at before.
    pub(crate) fn redirect(&mut self, pod: Name) -> bool {
        let kind = RedirectKind::Pod {
            mac: pod.port_mac(),
            pod_mac: pod.mac(),
        };
        self.redirect_by(pod, kind, 1_500)
    }

    pub(crate) fn redirect_by(&mut self, pod: Name, kind: RedirectKind, mtu_bytes: u32) -> bool {
        let port = index(pod.port);
        let link = RedirectLink { kind, mtu_bytes };
        self.redirects.links.insert(port, link);
        let routes = pod.addresses().map(|address| (host(address), Some(port)));
        self.redirects.routes.extend(routes);
        self.tell().attached > 0
    }

    /// From and to the pod no more.
    pub(crate) fn leave_alone(&mut self, pod: Name) {
        self.redirects.links.remove(&index(pod.port));
        self.tell();
    }

    /// As what the node's routes say who is gone.
    pub(crate) fn forget(&mut self, pod: Name) {
        for address in pod.addresses() {
            self.redirects.routes.remove(&host(address));
        }
    }

    #[track_caller]
    pub(crate) fn tell(&mut self) -> RedirectReport {
        let report = self.services.redirect(&self.redirects).unwrap();
        assert!(report.failed.is_empty(), "{report:?}");
        report
    }

    /// Makes `endpoints` all that there is of the service at each of [`SERVICES`], in their order.
    pub(crate) fn serve(&mut self, endpoints: [SocketAddr; 2]) {
        let desired = SERVICES
            .iter()
            .zip(endpoints)
            .flat_map(|(asked, endpoint)| {
                let asked: SocketAddr = asked.parse().unwrap();
                [Protocol::Tcp, Protocol::Udp].map(|protocol| {
                    let frontend = Frontend {
                        clients: Clients::All,
                        address: asked.ip(),
                        port: asked.port(),
                        protocol,
                    };
                    (frontend, vec![endpoint].into())
                })
            });
        self.services.apply(&desired.collect()).unwrap();
    }

    pub(crate) fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    pub(crate) fn counted(&self, counter: RedirectCounter) -> u64 {
        self.services.redirect_counters().unwrap()[&counter]
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        return_home(&self.home, &self.cgroup);
    }
}

impl Wire {
    fn new(one: File, other: File) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let carry = move || {
            let mut frame = [0; 2_000];
            while !stopped.load(Ordering::Relaxed) {
                let mut ends = [&one, &other].map(|end| PollFd::new(end, PollFlags::IN));
                poll(&mut ends, Some(&WIRE_LOOK)).unwrap();
                for (mut from, mut to) in [(&one, &other), (&other, &one)] {
                    while let Ok(length) = from.read(&mut frame) {
                        // Down, or its queue is full: a wire loses frames.
                        to.write_all(&frame[..length]).ok();
                    }
                }
            }
        };
        let thread = Some(thread::spawn(carry));
        Self { stop, thread }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        // A second panic would hide the first.
        if !thread::panicking() {
            ended.unwrap().unwrap();
        }
    }
}

impl Pod {
    /// `options` are those of the node's end, as `ip link add` takes them.
    pub(crate) fn new(name: Name, options: &[&str]) -> Self {
        let namespace = thread::spawn(new_namespace).join().unwrap();
        let Name { port, .. } = name;
        let peer = format!("/proc/{}/fd/{}", process::id(), namespace.as_raw_fd());
        let [mac, port_mac] = [name.mac(), name.port_mac()].map(text);
        let add = ["link", "add", port, "address", &port_mac];
        let veth = ["type", "veth", "peer", "name", "eth0", "address", &mac];
        ip(&[&add, options, &veth, &["netns", &peer]].concat());
        Self::addressed(namespace, name, None)
    }

    /// A virtual machine: the node's end is a TAP device.
    pub(crate) fn virtual_machine(name: Name) -> Self {
        let namespace = thread::spawn(new_namespace).join().unwrap();
        let end = |device: &str, mac| {
            let end = tap(device);
            ip(&["link", "set", device, "address", &text(mac)]);
            end
        };
        let node = end(name.port, name.port_mac());
        let machine = inside(&namespace, || end("eth0", name.mac()));
        let wire = Wire::new(node, machine);
        Self::addressed(namespace, name, Some(wire))
    }

    fn addressed(namespace: File, name: Name, wire: Option<Wire>) -> Self {
        let port = name.port;
        ip(&["link", "set", port, "up"]);
        for (node, pod) in NODE.iter().zip(name.addresses()) {
            let nodad = node.contains(':').then_some("nodad");
            let nodad = nodad.as_slice();
            ip(&[&["addr", "add", node, "dev", port], nodad].concat());
            let pod = pod.to_string();
            inside(&namespace, || {
                ip(&["link", "set", "eth0", "up"]);
                ip(&[&["addr", "add", &pod, "dev", "eth0"], nodad].concat());
                let via = ["via", node, "dev", "eth0", "onlink"];
                ip(&[&["route", "add", "default"], &via[..]].concat());
            });
            ip(&["route", "add", &pod, "dev", port]);
        }
        Self {
            namespace,
            _wire: wire,
        }
    }

    pub(crate) fn run<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        inside(&self.namespace, run)
    }

    pub(crate) fn socket(&self, address: IpAddr) -> UdpSocket {
        let socket = self.run(|| UdpSocket::bind((address, 0)).unwrap());
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }

    pub(crate) fn listener(&self, address: IpAddr) -> TcpListener {
        self.run(|| TcpListener::bind((address, 0)).unwrap())
    }

    pub(crate) fn connect(&self, to: SocketAddr) -> TcpStream {
        let stream = self.run(|| TcpStream::connect_timeout(&to, PATIENCE).unwrap());
        patient(&stream);
        stream
    }
}

pub(crate) fn patient(stream: &TcpStream) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
}

/// A datagram there and one back, by links that may be new: on a busy machine they were seen to lose what came first.
#[track_caller]
pub(crate) fn meet(from: &UdpSocket, to: &UdpSocket) {
    let mut bytes = [0; 8];
    let deadline = Instant::now() + PATIENCE;
    for end in [from, to] {
        end.set_read_timeout(Some(AGAIN)).unwrap();
    }
    while Instant::now() < deadline {
        from.send_to(b"question", to.local_addr().unwrap()).unwrap();
        let Ok((_, asked_by)) = to.recv_from(&mut bytes) else {
            continue;
        };
        to.send_to(b"answer", asked_by).unwrap();
        if from.recv(&mut bytes).is_ok() {
            return;
        }
    }
    panic!("{from:?} and {to:?} do not hear each other");
}

/// A datagram there and one back.
#[track_caller]
pub(crate) fn exchange(from: &UdpSocket, to: &UdpSocket) {
    let mut bytes = [0; 8];
    from.send_to(b"question", to.local_addr().unwrap()).unwrap();
    let (_, asked_by) = to.recv_from(&mut bytes).unwrap();
    assert_eq!(asked_by, from.local_addr().unwrap());
    to.send_to(b"answer", asked_by).unwrap();
    let (length, answered_by) = from.recv_from(&mut bytes).unwrap();
    assert_eq!((length, answered_by), (6, to.local_addr().unwrap()));
}

/// Packets that the stack of the thread's namespace handed on.
pub(crate) fn forwarded() -> u64 {
    let read = |file: &str| fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap();
    let (v4, v6) = (read("snmp"), read("snmp6"));
    let mut lines = v4.lines().filter(|line| line.starts_with("Ip: "));
    let [names, values] = [(); 2].map(|()| lines.next().unwrap().split(' '));
    let mut pairs = names.zip(values);
    let (_, v4) = pairs.find(|(name, _)| *name == "ForwDatagrams").unwrap();
    let mut lines = v6.lines().map(str::split_whitespace);
    let mut v6 =
        lines.find_map(|mut words| (words.next()? == "Ip6OutForwDatagrams").then_some(words));
    let v6 = v6.as_mut().unwrap().next().unwrap();
    [v4, v6]
        .map(|count| count.parse::<u64>().unwrap())
        .iter()
        .sum()
}

/// As a prefix.
pub(crate) fn host(address: IpAddr) -> (IpAddr, u8) {
    (address, if address.is_ipv4() { 32 } else { 128 })
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
