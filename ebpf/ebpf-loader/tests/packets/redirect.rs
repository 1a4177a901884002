//! Real sockets in pods of one node, past its stack.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    num::NonZeroU32,
    os::unix::fs::OpenOptionsExt as _,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use ebpf_abi::{PacketCounter, ROUTES_MAX, RedirectCounter};
use ebpf_loader::{InterfaceError, LinkHeader, RedirectKind, RedirectLink, Services};
use etherparse::IpHeaders;
use rustix::{
    fs::OFlags,
    io::Errno,
    ioctl::{Opcode, Setter, ioctl},
    net::{
        AddressFamily, Protocol, RecvFlags, SocketType, connect, recv,
        sockopt::{Timeout, set_ip_ttl, set_socket_timeout},
    },
};

use crate::{
    lan::index,
    netns::ip,
    pods::{A, B, C, Node, Pod, SERVICES, exchange, forwarded, host, meet, patient},
    sockets::{PATIENCE, transfer},
    wire::{ETHERNET, TTL, udp, without_ethernet},
};

/// Each way.
const TRANSFER_BYTES: usize = 16 << 20;

/// The payload of one segment at an MTU of 1,500 bytes.
const SEGMENT_BYTES: usize = 1_448;

/// What is not coming is waited for so long.
const SHORT: Duration = Duration::from_millis(300);

#[test]
fn pods_talk_past_the_stack_in_super_packets() {
    let (node, a, b) = Node::with_pods();
    for (a_ip, b_ip) in A.addresses().into_iter().zip(B.addresses()) {
        let listener = b.listener(b_ip);
        let before = (forwarded(), node.counted(RedirectCounter::ToPod));
        let client = a.connect(listener.local_addr().unwrap());
        let (server, from) = listener.accept().unwrap();
        patient(&server);
        assert_eq!(from.ip(), a_ip);
        transfer(&client, &server, TRANSFER_BYTES);
        transfer(&server, &client, TRANSFER_BYTES);
        exchange(&a.socket(a_ip), &b.socket(b_ip));
        let packets = node.counted(RedirectCounter::ToPod) - before.1;
        let segments = 2 * TRANSFER_BYTES / SEGMENT_BYTES;
        assert!(packets < segments as u64 / 2, "{packets} for {segments}");
        assert_eq!(forwarded(), before.0, "the stack handed nothing on");
    }
    assert_eq!(node.counted(RedirectCounter::ChangeFailed), 0);
}

#[test]
fn packets_in_a_pod_look_as_if_the_stack_had_handed_them_on() {
    let (mut node, a, b) = Node::with_pods();
    for (a_ip, b_ip) in A.addresses().into_iter().zip(B.addresses()) {
        node.redirect(A);
        let before = forwarded();
        let redirected = frame(&a.socket(a_ip), &b, b_ip);
        assert_eq!(forwarded(), before);
        let addresses = [B.mac(), B.port_mac()].concat();
        assert_eq!(redirected.ethernet[..addresses.len()], addresses);
        assert_eq!(redirected.hop_limit, TTL - 1);
        node.leave_alone(A);
        let by_stack = frame(&a.socket(a_ip), &b, b_ip);
        assert!(forwarded() > before);
        assert_eq!(redirected, by_stack);
    }
}

/// What does not change from one datagram to the next.
#[derive(Debug, PartialEq, Eq)]
struct Frame {
    ethernet: Vec<u8>,
    hop_limit: u8,
    length: usize,
}

/// That of a datagram to the pod.
fn frame(from: &UdpSocket, pod: &Pod, address: IpAddr) -> Frame {
    let every = Protocol::from_raw(NonZeroU32::new(0x0003_u16.to_be().into()).unwrap());
    let (family, kind) = (AddressFamily::PACKET, SocketType::RAW);
    let sniffer = pod.run(|| rustix::net::socket(family, kind, Some(every)).unwrap());
    set_socket_timeout(&sniffer, Timeout::Recv, Some(PATIENCE)).unwrap();
    exchange(from, &pod.socket(address));
    loop {
        let mut bytes = vec![0; 2_000];
        let (length, _) = recv(&sniffer, &mut bytes[..], RecvFlags::empty()).unwrap();
        bytes.truncate(length);
        if bytes.ends_with(b"question") {
            let ip = bytes.split_off(ETHERNET);
            let hop_limit = ip[if address.is_ipv4() { 8 } else { 7 }];
            return Frame {
                ethernet: bytes,
                hop_limit,
                length,
            };
        }
    }
}

#[test]
fn services_of_both_ends_are_translated_where_egress_is_not_passed() {
    let (mut node, a, b) = Node::with_pods();
    node.services
        .attach_interface(index(A.port), LinkHeader::Ethernet)
        .unwrap();
    node.redirect(A); // Now it is served.
    let [v4, v6] = B.addresses();
    let listeners = [v4, v6].map(|address| b.listener(address));
    let addresses = [&listeners[0], &listeners[1]].map(|one| one.local_addr().unwrap());
    node.serve(addresses);
    let before = forwarded();
    for (listener, asked) in listeners.iter().zip(SERVICES) {
        let asked: SocketAddr = asked.parse().unwrap();
        let client = a.connect(asked);
        let (server, from) = listener.accept().unwrap();
        patient(&server);
        assert_eq!(from, client.local_addr().unwrap());
        transfer(&client, &server, TRANSFER_BYTES);
        transfer(&server, &client, TRANSFER_BYTES);
        let answers = b.socket(listener.local_addr().unwrap().ip());
        let at = answers.local_addr().unwrap();
        node.serve([at, at].map(|at| {
            if at.is_ipv4() == asked.is_ipv4() {
                at
            } else {
                asked
            }
        }));
        let client = a.socket(from.ip());
        client.connect(asked).unwrap();
        client.send(b"question").unwrap();
        let (_, asked_by) = answers.recv_from(&mut [0; 8]).unwrap();
        answers.send_to(&[7; 4_000], asked_by).unwrap(); // In fragments.
        let mut bytes = [0; 5_000];
        assert_eq!(client.recv(&mut bytes).unwrap(), 4_000);
        node.serve(addresses);
        drop(answers);
        client.send(b"question").unwrap();
        let error = client.recv(&mut bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    }
    assert_eq!(forwarded(), before, "the stack handed nothing on");
    let counted = node.services.packet_counters().unwrap();
    assert_eq!(counted[&PacketCounter::FragmentPassed], 0);
    assert_eq!(counted[&PacketCounter::ErrorTranslated], 2);
}

impl Node {
    /// With a device behind `C`, which is served and redirected, where both pods are neighbours of it already.
    pub(crate) fn with_a_device() -> (Self, [Pod; 3]) {
        let (mut node, a, b) = Self::with_pods();
        let device = Pod::new(C, &[]);
        let port = index(C.port);
        node.services
            .attach_interface(port, LinkHeader::Ethernet)
            .unwrap();
        node.redirect_by(C, RedirectKind::Devices, 1_500);
        for (c_ip, b_ip) in C.addresses().into_iter().zip(B.addresses()) {
            meet(&device.socket(c_ip), &b.socket(b_ip));
        }
        (node, [a, b, device])
    }
}

#[test]
fn devices_ask_pods_for_services_past_the_stack_and_nothing_else() {
    let (mut node, [_a, b, device]) = Node::with_a_device();
    // What connection tracking sees half of, and a firewall of the gateway then ends.
    let rules = "table inet gateway { chain forward { type filter hook forward priority 0; ct state invalid drop; }; }";
    nft(rules);
    for ((own, address), asked) in C.addresses().into_iter().zip(B.addresses()).zip(SERVICES) {
        let asked: SocketAddr = asked.parse().unwrap();
        let (listener, socket) = (b.listener(address), b.socket(address));
        for at in [listener.local_addr().unwrap(), socket.local_addr().unwrap()] {
            node.serve(SERVICES.map(|one| {
                let one: SocketAddr = one.parse().unwrap();
                if one == asked { at } else { one }
            }));
            let before = forwarded();
            let counters = [RedirectCounter::ToPod, RedirectCounter::ToDevice];
            let counted = counters.map(|counter| node.counted(counter));
            if at == socket.local_addr().unwrap() {
                let client = device.socket(own);
                client.connect(asked).unwrap();
                client.send(b"question").unwrap();
                let (_, asked_by) = socket.recv_from(&mut [0; 8]).unwrap();
                assert_eq!(asked_by, client.local_addr().unwrap());
                socket.send_to(b"answer", asked_by).unwrap();
                assert_eq!(client.recv(&mut [0; 8]).unwrap(), 6);
            } else {
                let client = device.connect(asked);
                let (server, from) = listener.accept().unwrap();
                patient(&server);
                assert_eq!(from, client.local_addr().unwrap());
                transfer(&client, &server, TRANSFER_BYTES);
                transfer(&server, &client, TRANSFER_BYTES);
            }
            assert_eq!(forwarded(), before, "the stack handed nothing on");
            for (counter, before) in counters.into_iter().zip(counted) {
                assert!(node.counted(counter) > before, "{counter:?}");
            }
        }
        // Whom a pod asks, and who asks a pod itself, the gateway's firewall and its NAT may want to see.
        for (from, to) in [(&device, &socket), (&b, &device.socket(own))] {
            let before = forwarded();
            let ip = if to.local_addr().unwrap().ip() == own {
                address
            } else {
                own
            };
            exchange(&from.socket(ip), to);
            assert_eq!(forwarded(), before + 2);
        }
    }
    assert_eq!(node.counted(RedirectCounter::ChangeFailed), 0);
}

fn nft(rules: &str) {
    let done = Command::new("nft").arg(rules).status().expect("nft");
    assert!(done.success(), "{rules}");
}

/// What a connection attempt with so many hops comes to.
fn attempt(pod: &Pod, to: SocketAddr, hops: u8) -> Result<(), Errno> {
    let family = AddressFamily::INET;
    let socket = pod.run(|| rustix::net::socket(family, SocketType::STREAM, None).unwrap());
    set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE)).unwrap();
    set_ip_ttl(&socket, hops.into()).unwrap();
    connect(&socket, &to)
}

#[test]
fn the_last_hop_is_the_node_s_to_tell() {
    let (node, a, b) = Node::with_pods();
    let [address, _] = B.addresses();
    let listener = b.listener(address);
    let at = listener.local_addr().unwrap();
    assert_eq!(attempt(&a, at, 1), Err(Errno::HOSTUNREACH));
    assert!(node.counted(RedirectCounter::HopLimit) > 0);
    let before = forwarded();
    assert_eq!(attempt(&a, at, 2), Ok(()));
    assert_eq!(forwarded(), before);
}

#[test]
fn what_is_too_big_for_the_way_into_the_pod_is_said_so_by_the_node() {
    let (mut node, a, b) = Node::with_pods();
    ip(&["link", "set", B.port, "mtu", "1400"]);
    node.redirects
        .links
        .get_mut(&index(B.port))
        .unwrap()
        .mtu_bytes = 1_400;
    assert_eq!(node.tell().attached, 0);
    for address in B.addresses() {
        let before = node.counted(RedirectCounter::TooBig);
        let listener = b.listener(address);
        let client = a.connect(listener.local_addr().unwrap());
        let (server, _) = listener.accept().unwrap();
        patient(&server);
        transfer(&client, &server, TRANSFER_BYTES);
        transfer(&server, &client, TRANSFER_BYTES);
        let too_big = node.counted(RedirectCounter::TooBig) - before;
        assert!((1..100).contains(&too_big), "{too_big}");
    }
}

#[test]
fn a_pod_that_is_gone_gets_nothing_and_who_has_its_index_nothing_of_it() {
    let (mut node, a, b) = Node::with_pods();
    let [own, _] = A.addresses();
    let [old, _] = B.addresses();
    let [new, _] = C.addresses();
    let number = index(B.port);
    // Each attempt is to be told so.
    fs::write("/proc/sys/net/ipv4/icmp_ratelimit", "0").unwrap();
    drop(b);
    ip(&["link", "del", B.port]);
    // The node has no route any more and says so, before anything was told here.
    let old = SocketAddr::new(old, 9);
    assert_eq!(attempt(&a, old, TTL), Err(Errno::NETUNREACH));
    let gone = node.counted(RedirectCounter::Gone);
    assert!(gone > 0);

    let c = Pod::new(C, &["index", &number.to_string()]);
    assert_eq!(index(C.port), number);
    let to_pod = node.counted(RedirectCounter::ToPod);
    assert_eq!(attempt(&a, old, TTL), Err(Errno::NETUNREACH));
    assert!(node.counted(RedirectCounter::Gone) > gone);
    exchange(&a.socket(own), &c.socket(new));
    assert_eq!(node.counted(RedirectCounter::ToPod), to_pod);

    node.forget(B);
    assert!(node.redirect(C), "another interface with the index");
    assert!(!node.redirect(C));
    let before = forwarded();
    exchange(&a.socket(own), &c.socket(new));
    assert_eq!(forwarded(), before);
    node.leave_alone(C);
    exchange(&a.socket(own), &c.socket(new));
    assert!(forwarded() > before);
}

#[test]
fn an_address_that_is_not_the_pod_s_is_the_node_s_to_judge() {
    let (node, a, b) = Node::with_pods();
    for (strange, address) in ["10.9.9.9", "fd09::9"].into_iter().zip(B.addresses()) {
        let to = b.socket(address);
        to.set_read_timeout(Some(SHORT)).unwrap();
        let from = a.run(|| {
            let nodad = strange.contains(':').then_some("nodad");
            ip(&[&["addr", "add", strange, "dev", "eth0"], nodad.as_slice()].concat());
            let strange: IpAddr = strange.parse().unwrap();
            UdpSocket::bind((strange, 0)).unwrap()
        });
        for (all, arrives) in [("1", false), ("0", true)] {
            let judges = "/proc/sys/net/ipv4/conf/all/rp_filter";
            fs::write(judges, all).unwrap();
            fs::write(format!("/proc/sys/net/ipv4/conf/{}/rp_filter", A.port), all).unwrap();
            let before = node.counted(RedirectCounter::Source);
            from.send_to(b"question", to.local_addr().unwrap()).unwrap();
            // IPv6 has no such switch, only netfilter's rpfilter.
            let arrived = to.recv(&mut [0; 8]).is_ok();
            assert_eq!(arrived, arrives || address.is_ipv6(), "{strange}, {all}");
            assert_eq!(node.counted(RedirectCounter::Source), before + 1);
        }
    }
}

#[test]
fn a_longer_prefix_that_leads_elsewhere_is_not_hidden() {
    let (mut node, a, b) = Node::with_pods();
    for ((own, address), net) in A.addresses().into_iter().zip(B.addresses()).zip([24, 112]) {
        let port = node.redirects.routes.remove(&host(address)).unwrap();
        node.redirects.routes.insert((address, net), port); // The programs' prefixes have host bits.
        node.tell();
        let before = forwarded();
        exchange(&a.socket(own), &b.socket(address));
        assert_eq!(forwarded(), before);
        node.redirects.routes.insert(host(address), None);
        node.tell();
        let elsewhere = node.counted(RedirectCounter::Elsewhere);
        exchange(&a.socket(own), &b.socket(address));
        assert_eq!(forwarded(), before + 2);
        assert_eq!(node.counted(RedirectCounter::Elsewhere), elsewhere + 1);
    }
    // Where there are too many routes to know all, none is followed.
    let far = u32::from_be_bytes([11, 0, 0, 0]);
    let many = (0..ROUTES_MAX).map(|n| (host(Ipv4Addr::from(far + n).into()), None));
    node.redirects.routes.extend(many);
    assert_eq!(node.tell().left_out, 2);
    let [own, _] = A.addresses();
    let [address, _] = B.addresses();
    let redirected = node.counted(RedirectCounter::ToPod);
    exchange(&a.socket(own), &b.socket(address));
    assert_eq!(node.counted(RedirectCounter::ToPod), redirected);
}

#[test]
fn open_connections_go_on_by_the_stack_and_back() {
    let (mut node, a, b) = Node::with_pods();
    for address in B.addresses() {
        let listener = b.listener(address);
        let client = a.connect(listener.local_addr().unwrap());
        let (server, _) = listener.accept().unwrap();
        patient(&server);
        for redirected in [true, false, true] {
            for name in [A, B] {
                if redirected {
                    node.redirect(name);
                } else {
                    node.leave_alone(name);
                }
            }
            let before = forwarded();
            transfer(&client, &server, 1 << 20);
            transfer(&server, &client, 1 << 20);
            assert_eq!(forwarded() == before, redirected);
        }
    }
}

#[test]
fn an_interface_that_is_not_there_is_told_and_the_others_are_redirected() {
    let (mut node, a, b) = Node::with_pods();
    let nowhere = NonZeroU32::new(1 << 20).unwrap();
    let tunnel = RedirectLink {
        kind: RedirectKind::Tunnel,
        mtu_bytes: 1_280,
    };
    node.redirects.links.insert(nowhere, tunnel);
    let report = node.services.redirect(&node.redirects).unwrap();
    let error = &report.failed[&nowhere];
    assert!(matches!(error, InterfaceError::Unknown { .. }), "{error:?}");
    assert_eq!((report.failed.len(), report.attached), (1, 0));
    let before = forwarded();
    for (own, address) in A.addresses().into_iter().zip(B.addresses()) {
        exchange(&a.socket(own), &b.socket(address));
    }
    assert_eq!(forwarded(), before);
    let mut sockets_alone = Services::load(node.cgroup()).unwrap();
    let error = sockets_alone.redirect(&node.redirects).unwrap_err();
    assert!(matches!(error, InterfaceError::SocketsAlone), "{error:?}");
}

/// A TUN device of the thread's namespace, gone when it is closed.
pub(crate) fn tun(name: &str) -> File {
    const IFF_TUN: u16 = 1;
    without_prefix(name, IFF_TUN)
}

/// A TAP device alike.
pub(crate) fn tap(name: &str) -> File {
    const IFF_TAP: u16 = 2;
    without_prefix(name, IFF_TAP)
}

/// A TUN device that is given and gives a `struct virtio_net_hdr` before each packet, and takes super-packets.
pub(crate) fn tun_of_super_packets(name: &str) -> File {
    const IFF_TUN: u16 = 1;
    const IFF_VNET_HDR: u16 = 0x4000;
    without_prefix(name, IFF_TUN | IFF_VNET_HDR)
}

fn without_prefix(name: &str, kind: u16) -> File {
    #[repr(C)]
    struct Request {
        name: [u8; 16],
        flags: u16,
        rest: [u8; 22],
    }
    const TUNSETIFF: Opcode = 0x4004_54ca;
    const IFF_NO_PI: u16 = 0x1000;
    let mut request = Request {
        name: [0; 16],
        flags: kind | IFF_NO_PI,
        rest: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let mut options = File::options();
    options.read(true).write(true).custom_flags(nonblocking);
    let tun = options.open("/dev/net/tun").unwrap();
    #[expect(unsafe_code, reason = "rustix has no call for it")]
    // SAFETY: linux/if_tun.h: TUNSETIFF reads a `struct ifreq`, whose 40 bytes these are.
    unsafe { ioctl(&tun, Setter::<TUNSETIFF, Request>::new(request)) }.unwrap();
    ip(&["link", "set", name, "up"]);
    tun
}

/// The next packet that it gives.
#[track_caller]
pub(crate) fn read_packet(mut tun: &File) -> Vec<u8> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        let mut bytes = vec![0; 2_000];
        if let Ok(length) = tun.read(&mut bytes) {
            bytes.truncate(length);
            return bytes;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("no packet");
}

/// The next packet for this address.
pub(crate) fn read_for(tun: &File, address: IpAddr) -> (IpHeaders, Vec<u8>) {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        let bytes = read_packet(tun);
        let (ip, payload) = IpHeaders::from_slice(&bytes).unwrap();
        let to: IpAddr = match &ip {
            IpHeaders::Ipv4(header, _) => header.destination.into(),
            IpHeaders::Ipv6(header, _) => header.destination.into(),
        };
        if to == address {
            return (ip, payload.payload.to_vec());
        }
    }
    panic!("nothing for {address}");
}

#[test]
fn a_pod_speaks_with_the_tunnel_past_the_stack() {
    let (mut node, a, _b) = Node::with_pods();
    let tun = tun("tun0");
    let link = RedirectLink {
        kind: RedirectKind::Tunnel,
        mtu_bytes: 1_400,
    };
    node.redirects.links.insert(index("tun0"), link);
    let nets = [("10.245.0.0", 16), ("fd45::", 64)];
    for (net, length) in nets {
        ip(&["route", "add", &format!("{net}/{length}"), "dev", "tun0"]);
        let prefix = (net.parse().unwrap(), length);
        node.redirects.routes.insert(prefix, Some(index("tun0")));
    }
    assert_eq!(node.tell().attached, 1);
    let before = forwarded();
    for (own, far) in A
        .addresses()
        .into_iter()
        .zip(["10.245.0.9:9", "[fd45::9]:9"])
    {
        let far: SocketAddr = far.parse().unwrap();
        let socket = a.socket(own);
        socket.send_to(b"question", far).unwrap();
        let (ip, payload) = read_for(&tun, far.ip());
        let hops = match &ip {
            IpHeaders::Ipv4(header, _) => header.time_to_live,
            IpHeaders::Ipv6(header, _) => header.hop_limit,
        };
        assert_eq!((hops, &payload[8..]), (TTL - 1, &b"question"[..]));
        let answer = without_ethernet(udp(far, socket.local_addr().unwrap(), b"answer"));
        (&tun).write_all(&answer).unwrap();
        let mut bytes = [0; 8];
        let (length, from) = socket.recv_from(&mut bytes).unwrap();
        assert_eq!((&bytes[..length], from), (&b"answer"[..], far));
    }
    assert_eq!(forwarded(), before, "the stack handed nothing on");
    assert_eq!(node.counted(RedirectCounter::ToTunnel), 2);
}
