//! Datagrams in super-packets: one call sends many (`UDP_SEGMENT`), which cross the gateway as one packet and are cut
//! where somebody needs them one by one.

use std::{
    fs::File,
    io::{self, ErrorKind, Write as _},
    net::{IpAddr, SocketAddr, UdpSocket},
    num::NonZeroU32,
    os::fd::OwnedFd,
    thread,
    time::{Duration, Instant},
};

use ebpf_abi::{MASQUERADE_PORT_FIRST, PacketCounter, RedirectCounter};
use ebpf_loader::Masquerade;
use etherparse::{IpHeaders, IpNumber, Ipv4Header, UdpHeader};
use rustix::{
    io::Errno,
    net::{
        AddressFamily, Protocol, RecvFlags, SocketType, recv,
        sockopt::{self, Ipv4PathMtuDiscovery, Timeout},
    },
};

use crate::{
    lan::{Family, Lan, families, index},
    netns::ip,
    offload::{cut, gather, gathered, without_checksums},
    pods::{B, C, Node, SERVICES, forwarded},
    redirect::{read_packet, tun_of_super_packets},
    sockets::{PATIENCE, client_socket, server_socket},
    wire,
};

/// What one call sends: datagrams of `each` bytes, and a shorter one.
#[derive(Debug, Clone, Copy)]
struct Burst {
    each: usize,
    bytes: usize,
}

/// The first one is at most 64 datagrams, what the kernel allowed at once until 6.8; the last one nearly 64 KiB, and
/// its datagrams an MTU of IPv6.
const BURSTS: [Burst; 4] = [
    burst(99, 63 * 99 + 1),
    burst(1_000, 12_345),
    burst(1_001, 2_001),
    burst(1_452, 65_001),
];

const fn burst(each: usize, bytes: usize) -> Burst {
    Burst { each, bytes }
}

impl Burst {
    /// No two datagrams are alike.
    fn payload(self) -> Vec<u8> {
        let byte = |n: usize| (n % 251).to_le_bytes()[0];
        (0..self.bytes).map(byte).collect()
    }
}

fn send(socket: &UdpSocket, to: SocketAddr, burst: Burst) -> io::Result<()> {
    cut(socket, burst.each);
    let sent = socket.send_to(&burst.payload(), to)?;
    assert_eq!(sent, burst.bytes);
    Ok(())
}

/// One datagram after the other.
#[track_caller]
fn receive(socket: &UdpSocket, from: SocketAddr, burst: Burst) {
    let mut bytes = vec![0; 2_000];
    for (number, expected) in burst.payload().chunks(burst.each).enumerate() {
        let (length, sender) = socket.recv_from(&mut bytes).unwrap();
        assert_eq!((length, sender), (expected.len(), from), "{number}");
        assert!(bytes[..length] == *expected, "{number}: other bytes");
    }
}

/// All of it at once.
#[track_caller]
fn receive_gathered(socket: &UdpSocket, from: SocketAddr, burst: Burst) {
    let (bytes, sender, each) = gathered(socket);
    assert_eq!((sender, each), (from, Some(burst.each)));
    assert!(bytes == burst.payload(), "other bytes, or not all of them");
}

/// How an end receives.
type Receive = fn(&UdpSocket, SocketAddr, Burst);

/// There and back, each by one call.
#[track_caller]
fn exchange(
    client: &UdpSocket,
    service: SocketAddr,
    server: &UdpSocket,
    burst: Burst,
    receive: Receive,
) {
    send(client, service, burst).unwrap();
    let asked_by = client.local_addr().unwrap();
    receive(server, asked_by, burst);
    send(server, asked_by, burst).unwrap();
    receive(client, service, burst);
}

/// Client and server of a service.
fn served(lan: &mut Lan, family: &Family) -> (UdpSocket, UdpSocket) {
    let (server, at) = server_socket(lan, family);
    lan.serve(family.service, &[at]);
    (client_socket(lan, family), server)
}

/// The gateway saw one packet each way for each burst, and one flow of each family.
fn crossed_whole(lan: &Lan) {
    let bursts = 2 * BURSTS.len() as u64;
    assert_eq!(lan.counted(PacketCounter::RequestTranslated), bursts);
    assert_eq!(lan.counted(PacketCounter::AnswerTranslated), bursts);
    assert_eq!(lan.counted(PacketCounter::FlowOpened), 2);
    assert_eq!(lan.counted(PacketCounter::ChangeFailed), 0);
}

#[test]
fn datagrams_cross_in_super_packets_and_each_arrives_as_it_was_sent() {
    let mut lan = Lan::new();
    for family in &families() {
        let (client, server) = served(&mut lan, family);
        for burst in BURSTS {
            exchange(&client, family.service, &server, burst, receive);
        }
    }
    crossed_whole(&lan);
}

#[test]
fn who_receives_datagrams_together_gets_the_super_packet_whole() {
    let mut lan = Lan::new();
    for family in &families() {
        let (client, server) = served(&mut lan, family);
        gather(&client);
        gather(&server);
        for burst in BURSTS {
            exchange(&client, family.service, &server, burst, receive_gathered);
        }
    }
    crossed_whole(&lan);
}

/// Sees every packet of the thread's namespace, from the IP header on.
fn sniffer() -> OwnedFd {
    let every = Protocol::from_raw(NonZeroU32::new(0x0003_u16.to_be().into()).unwrap());
    let (family, kind) = (AddressFamily::PACKET, SocketType::DGRAM);
    let sniffer = rustix::net::socket(family, kind, Some(every)).unwrap();
    sockopt::set_socket_timeout(&sniffer, Timeout::Recv, Some(PATIENCE)).unwrap();
    sockopt::set_socket_recv_buffer_size_force(&sniffer, 1 << 20).unwrap();
    sniffer
}

/// The next datagram from there, if the packet is one; every checksum is its own.
#[track_caller]
fn datagram(packet: &[u8], from: IpAddr) -> Option<(UdpHeader, Vec<u8>)> {
    let (ip, payload) = IpHeaders::from_slice(packet).ok()?;
    let (udp, bytes) = UdpHeader::from_slice(payload.payload).ok()?;
    if wire::source(&ip) != from || payload.ip_number != IpNumber::UDP {
        return None;
    }
    let right = match &ip {
        IpHeaders::Ipv4(header, _) => {
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            udp.calc_checksum_ipv4(header, bytes)
        }
        IpHeaders::Ipv6(header, _) => udp.calc_checksum_ipv6(header, bytes),
    };
    assert_eq!(usize::from(udp.length), 8 + bytes.len());
    assert_eq!(udp.checksum, right.unwrap());
    Some((udp, bytes.to_vec()))
}

/// All of the burst was seen from there, each datagram with the checksums that are its own.
#[track_caller]
fn saw(sniffer: &OwnedFd, from: IpAddr, burst: Burst) {
    let payload = burst.payload();
    let mut expected = payload.chunks(burst.each);
    let deadline = Instant::now() + PATIENCE;
    while expected.len() > 0 && Instant::now() < deadline {
        let mut packet = vec![0; 1 << 16];
        let (length, _) = recv(sniffer, &mut packet[..], RecvFlags::empty()).unwrap();
        if let Some((_, bytes)) = datagram(&packet[..length], from) {
            assert!(Some(&bytes[..]) == expected.next(), "other bytes");
        }
    }
    assert_eq!(expected.len(), 0, "of {burst:?} from {from}");
}

#[test]
fn datagrams_that_are_cut_behind_the_programs_have_checksums_of_their_own() {
    let mut lan = Lan::new();
    for interface in ["lan0", "net0"] {
        without_checksums(interface);
    }
    for family in &families() {
        let (client, server) = served(&mut lan, family);
        for burst in BURSTS {
            let (near_server, near_client) = (lan.in_servers(sniffer), lan.in_client(sniffer));
            exchange(&client, family.service, &server, burst, receive);
            saw(&near_server, family.client, burst);
            saw(&near_client, family.service.ip(), burst);
        }
    }
    crossed_whole(&lan);
}

#[test]
fn a_client_that_is_its_own_endpoint_gets_its_super_packets_back() {
    let mut lan = Lan::new();
    for family in &families() {
        let [client, server] = [(); 2].map(|()| client_socket(&lan, family));
        lan.serve(family.service, &[server.local_addr().unwrap()]);
        for burst in BURSTS {
            let seen = SocketAddr::new(family.service.ip(), client.local_addr().unwrap().port());
            send(&client, family.service, burst).unwrap();
            receive(&server, seen, burst);
            send(&server, seen, burst).unwrap();
            receive(&client, family.service, burst);
        }
    }
    let bursts = 2 * 2 * BURSTS.len() as u64;
    assert_eq!(lan.counted(PacketCounter::Hairpin), bursts);
}

#[test]
fn a_service_without_endpoints_refuses_a_super_packet_once() {
    let mut lan = Lan::new();
    // The refusal's checksums are completed by the client's card, which a veth only seems to do, and by the gateway.
    for completes in ["veth", "gateway"] {
        if completes == "gateway" {
            without_checksums("lan0");
        }
        for family in &families() {
            lan.serve(family.service, &[]);
            for burst in BURSTS {
                let client = client_socket(&lan, family);
                client.connect(family.service).unwrap();
                let before = lan.counted(PacketCounter::RefusedUdp);
                send(&client, family.service, burst).unwrap();
                let error = client.recv(&mut [0; 8]).unwrap_err();
                let kind = error.kind();
                assert_eq!(kind, ErrorKind::ConnectionRefused, "{completes} {burst:?}");
                assert_eq!(lan.counted(PacketCounter::RefusedUdp), before + 1);
            }
        }
    }
}

/// Makes `server` the service of its family.
fn serve_pod(node: &mut Node, asked: SocketAddr, server: &UdpSocket) {
    let at = server.local_addr().unwrap();
    node.serve(SERVICES.map(|one| {
        let one = one.parse().unwrap();
        if one == asked { at } else { one }
    }));
}

#[test]
fn super_packets_of_devices_and_of_pods_that_answer_go_past_the_stack() {
    let (mut node, [_a, b, device]) = Node::with_a_device();
    for ((own, address), asked) in C.addresses().into_iter().zip(B.addresses()).zip(SERVICES) {
        let asked = asked.parse().unwrap();
        let (client, server) = (device.socket(own), b.socket(address));
        serve_pod(&mut node, asked, &server);
        let counters = [RedirectCounter::ToPod, RedirectCounter::ToDevice];
        let before = counters.map(|counter| node.counted(counter));
        let by_stack = forwarded();
        for burst in BURSTS {
            exchange(&client, asked, &server, burst, receive);
        }
        gather(&client);
        gather(&server);
        for burst in BURSTS {
            exchange(&client, asked, &server, burst, receive_gathered);
        }
        assert_eq!(forwarded(), by_stack, "the stack handed nothing on");
        let packets = before.map(|count| count + 2 * BURSTS.len() as u64);
        assert_eq!(counters.map(|counter| node.counted(counter)), packets);
    }
    assert_eq!(node.counted(RedirectCounter::ChangeFailed), 0);
}

#[test]
fn super_packets_of_datagrams_that_are_too_big_for_the_way_are_left_to_the_stack() {
    let (mut node, [_a, b, device]) = Node::with_a_device();
    ip(&["link", "set", B.port, "mtu", "1400"]);
    let link = node.redirects.links.get_mut(&index(B.port)).unwrap();
    link.mtu_bytes = 1_400;
    node.tell();
    for ((own, address), asked) in C.addresses().into_iter().zip(B.addresses()).zip(SERVICES) {
        let asked = asked.parse().unwrap();
        let server = b.socket(address);
        serve_pod(&mut node, asked, &server);
        let headers = if own.is_ipv4() { 28 } else { 48 };
        let fits = burst(1_400 - headers, 12_345);
        let too_big = burst(1_401 - headers, 12_345);
        let client = device.socket(own);
        if own.is_ipv4() {
            // The stack cuts each datagram: by default the kernel forbids that in no super-packet.
            let before = node.counted(RedirectCounter::TooBig);
            exchange(&client, asked, &server, too_big, receive);
            assert_eq!(node.counted(RedirectCounter::TooBig), before + 1);
            sockopt::set_ip_mtu_discover(&client, Ipv4PathMtuDiscovery::DO).unwrap();
        }
        let before = node.counted(RedirectCounter::TooBig);
        // Who sent it is told by the stack, and sends smaller ones.
        let error = told(|| send(&client, asked, too_big));
        assert_eq!(Errno::from_io_error(&error), Some(Errno::MSGSIZE));
        assert!(node.counted(RedirectCounter::TooBig) > before);
        let by_stack = forwarded();
        exchange(&client, asked, &server, fits, receive);
        assert_eq!(forwarded(), by_stack);
    }
}

/// What a call fails with once its like was said to be wrong.
fn told(mut call: impl FnMut() -> io::Result<()>) -> io::Error {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Err(error) = call() {
            return error;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("nobody was told");
}

/// Behind the tunnel.
const FAR: [&str; 2] = ["10.245.0.9:9", "[fd45::9]:9"];

/// The gateway in the mesh.
const OWN: [&str; 2] = ["10.244.9.1", "fd44:9::1"];

/// A tunnel to [`FAR`], where the gateway speaks for the client.
fn tunnel(lan: &mut Lan) -> File {
    let tun = tun_of_super_packets("tun0");
    for net in ["10.245.0.0/16", "fd45::/64"] {
        ip(&["route", "add", net, "dev", "tun0"]);
    }
    lan.services.attach_tunnel(index("tun0")).unwrap();
    let [v4, v6] = OWN;
    let masquerade = Masquerade {
        v4: v4.parse().unwrap(),
        v6: v6.parse().unwrap(),
        kept: [].into(),
    };
    assert_eq!(lan.services.masquerade(&masquerade).unwrap(), 0);
    tun
}

/// Before each packet: a `struct virtio_net_hdr`.
const BEFORE: usize = 10;

/// The next packet out of the tunnel; if it is the first of two fragments, both of them in one.
#[track_caller]
fn read_whole(tun: &File) -> Vec<u8> {
    let packet = read_packet(tun).split_off(BEFORE);
    let Ok((first, payload)) = Ipv4Header::from_slice(&packet) else {
        return packet;
    };
    if !first.more_fragments {
        return packet;
    }
    let packet = read_packet(tun).split_off(BEFORE);
    let (later, rest) = Ipv4Header::from_slice(&packet).unwrap();
    let follows = first.payload_len().unwrap() / 8;
    assert_eq!(later.fragment_offset.value(), follows);
    assert_eq!(later.header_checksum, later.calc_header_checksum());
    let mut whole = Ipv4Header {
        more_fragments: false,
        ..first.clone()
    };
    let alike = Ipv4Header {
        total_len: whole.total_len,
        fragment_offset: whole.fragment_offset,
        header_checksum: whole.header_checksum,
        ..later
    };
    assert_eq!(alike, whole);
    assert_eq!(first.header_checksum, first.calc_header_checksum());
    whole.set_payload_len(payload.len() + rest.len()).unwrap();
    whole.header_checksum = whole.calc_header_checksum();
    let mut packet = whole.to_bytes().to_vec();
    packet.extend_from_slice(payload);
    packet.extend_from_slice(rest);
    packet
}

/// All of the burst comes out of the tunnel, one after the other and with checksums of its own; from which port.
#[track_caller]
fn leaves(tun: &File, from: IpAddr, burst: Burst) -> u16 {
    let mut port = None;
    let payload = burst.payload();
    let mut expected = payload.chunks(burst.each);
    while expected.len() > 0 {
        if let Some((udp, bytes)) = datagram(&read_whole(tun), from) {
            assert!(Some(&bytes[..]) == expected.next(), "other bytes");
            assert_eq!(*port.get_or_insert(udp.source_port), udp.source_port);
        }
    }
    port.unwrap()
}

/// As the tunnel hands on what it glued: a super-packet whose checksum is to be completed in each datagram.
fn super_packet(from: SocketAddr, to: SocketAddr, burst: Burst) -> Vec<u8> {
    const NEEDS_CSUM: u8 = 1;
    const GSO_UDP_L4: u8 = 5;
    let mut packet = wire::without_ethernet(wire::udp(from, to, &burst.payload()));
    let udp = packet.len() - burst.bytes - 8;
    // A checksum that is yet to be completed is the sum of the pseudo header.
    let length = u32::try_from(8 + burst.bytes).unwrap();
    let pseudo = [&ends(from, to)[..], &length.to_be_bytes(), &[0, 0, 0, 17]].concat();
    let check = wire::sum(&pseudo).to_be_bytes();
    packet[udp..][6..8].copy_from_slice(&check);
    let words = [udp + 8, burst.each, udp, 6].map(|word| u16::try_from(word).unwrap());
    let header = [
        &[NEEDS_CSUM, GSO_UDP_L4][..],
        &words.map(u16::to_ne_bytes).concat(),
    ];
    [header.concat(), packet].concat()
}

fn ends(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let end = |ip| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    [end(from.ip()), end(to.ip())].concat()
}

#[test]
fn super_packets_of_a_client_that_goes_as_the_node_are_cut_by_the_tunnel_and_come_glued_from_it() {
    let mut lan = Lan::new();
    let tun = tunnel(&mut lan);
    for ((family, far), own) in families().iter().zip(FAR).zip(OWN) {
        let (far, own): (SocketAddr, IpAddr) = (far.parse().unwrap(), own.parse().unwrap());
        lan.serve(family.service, &[far]);
        let client = client_socket(&lan, family);
        for burst in BURSTS {
            send(&client, family.service, burst).unwrap();
            let port = leaves(&tun, own, burst);
            assert!(u32::from(port) >= MASQUERADE_PORT_FIRST, "{port}");
            let answer = super_packet(far, SocketAddr::new(own, port), burst);
            (&tun).write_all(&answer).unwrap();
            receive(&client, family.service, burst);
        }
    }
    let bursts = 2 * BURSTS.len() as u64;
    assert_eq!(lan.counted(PacketCounter::Masqueraded), bursts);
    assert_eq!(lan.counted(PacketCounter::MasqueradeOpened), 2);
    assert_eq!(lan.counted(PacketCounter::Unmasqueraded), bursts);
    assert_eq!(lan.counted(PacketCounter::ChangeFailed), 0);
}

/// Of IPv6, the gateway says that it is too big, as of all that it does not hand on.
#[test]
fn super_packets_of_datagrams_that_are_too_big_for_the_tunnel_leave_it_in_fragments() {
    let mut lan = Lan::new();
    let tun = tunnel(&mut lan);
    ip(&["link", "set", "tun0", "mtu", "1280"]);
    let ([family, _], [far, _], [own, _]) = (families(), FAR, OWN);
    lan.serve(family.service, &[far.parse().unwrap()]);
    let client = client_socket(&lan, &family);
    for _ in 0..3 {
        let before = lan.counted(PacketCounter::FragmentTranslated);
        send(&client, family.service, burst(1_400, 14_001)).unwrap();
        leaves(&tun, own.parse().unwrap(), burst(1_400, 14_001));
        let later = lan.counted(PacketCounter::FragmentTranslated) - before;
        assert_eq!(later, 10);
    }
    assert_eq!(lan.counted(PacketCounter::RequestTranslated), 3);
}
