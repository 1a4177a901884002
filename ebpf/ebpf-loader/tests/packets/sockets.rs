//! Real sockets through a gateway.

use std::{
    collections::BTreeSet,
    fs, io,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    num::NonZeroU32,
    os::fd::OwnedFd,
    thread,
    time::{Duration, Instant},
};

use ebpf_abi::PacketCounter;
use ebpf_loader::{Clients, Frontend, InterfaceError, LinkHeader, Services};
use etherparse::{Icmpv4Header, Icmpv6Header, IpHeaders, TcpHeader};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketType, recv, sockopt};

use crate::{
    lan::{Family, Lan, families, index},
    netns::ip,
    wire::{source, sum},
};

/// What should happen at once has happened by then, or never will.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// Each way.
const TRANSFER_BYTES: usize = 16 << 20;

/// The payload of one segment at an MTU of 1,500 bytes.
const SEGMENT_BYTES: usize = 1_448;

pub(crate) fn listener(lan: &Lan, family: &Family) -> (TcpListener, SocketAddr) {
    let listener = lan.in_servers(|| TcpListener::bind((family.server, 0)).unwrap());
    let addr = listener.local_addr().unwrap();
    (listener, addr)
}

pub(crate) fn connect(lan: &Lan, family: &Family) -> io::Result<TcpStream> {
    let stream = lan.in_client(|| TcpStream::connect_timeout(&family.service, PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// The service's client and server, connected by the gateway.
pub(crate) fn connected(
    lan: &Lan,
    family: &Family,
    listener: &TcpListener,
) -> (TcpStream, TcpStream) {
    connected_to(lan, family, listener, family.client)
}

/// The same, where the server sees another address than the client's.
pub(crate) fn connected_to(
    lan: &Lan,
    family: &Family,
    listener: &TcpListener,
    seen: IpAddr,
) -> (TcpStream, TcpStream) {
    let client = connect(lan, family).unwrap();
    let (server, from) = listener.accept().unwrap();
    let own = client.local_addr().unwrap();
    assert_eq!(from, SocketAddr::new(seen, own.port()));
    assert_eq!(client.peer_addr().unwrap(), family.service);
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    server.set_write_timeout(Some(PATIENCE)).unwrap();
    (client, server)
}

#[track_caller]
pub(crate) fn transfer(mut from: &TcpStream, mut to: &TcpStream, bytes: usize) {
    let sent: Vec<u8> = (0..bytes).map(|n| (n % 251).to_le_bytes()[0]).collect();
    let mut received = vec![0; bytes];
    thread::scope(|scope| {
        scope.spawn(|| from.write_all(&sent).unwrap());
        to.read_exact(&mut received).unwrap();
    });
    assert!(sent == received, "other bytes arrived");
}

pub(crate) fn server_socket(lan: &Lan, family: &Family) -> (UdpSocket, SocketAddr) {
    let server = lan.in_servers(|| UdpSocket::bind((family.server, 0)).unwrap());
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let addr = server.local_addr().unwrap();
    (server, addr)
}

pub(crate) fn client_socket(lan: &Lan, family: &Family) -> UdpSocket {
    let client = lan.in_client(|| UdpSocket::bind((family.client, 0)).unwrap());
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client
}

/// A question to the service and an answer of as many bytes.
#[track_caller]
pub(crate) fn ask(client: &UdpSocket, server: &UdpSocket, family: &Family, bytes: usize) {
    ask_as(client, server, family, bytes, client.local_addr().unwrap());
}

/// The same, where the server sees another address than the client's.
#[track_caller]
pub(crate) fn ask_as(
    client: &UdpSocket,
    server: &UdpSocket,
    family: &Family,
    bytes: usize,
    seen: SocketAddr,
) {
    let sent: Vec<u8> = (0..bytes).map(|n| (n % 251).to_le_bytes()[0]).collect();
    let mut received = vec![0; bytes + 1];
    client.send_to(&sent, family.service).unwrap();
    let (length, from) = server.recv_from(&mut received).unwrap();
    assert_eq!((&received[..length], from), (&sent[..], seen));
    server.send_to(&sent, from).unwrap();
    let (length, from) = client.recv_from(&mut received).unwrap();
    assert_eq!((&received[..length], from), (&sent[..], family.service));
}

#[test]
fn tcp_crosses_in_super_packets() {
    let mut lan = Lan::new();
    for family in &families() {
        let (listener, at) = listener(&lan, family);
        lan.serve(family.service, &[at]);
        let (client, server) = connected(&lan, family, &listener);
        let packets = |lan: &Lan| {
            lan.counted(PacketCounter::RequestTranslated)
                + lan.counted(PacketCounter::AnswerTranslated)
        };
        let before = packets(&lan);
        transfer(&client, &server, TRANSFER_BYTES);
        transfer(&server, &client, TRANSFER_BYTES);
        let packets = packets(&lan) - before;
        let segments = 2 * TRANSFER_BYTES / SEGMENT_BYTES;
        println!(
            "{}: {packets} packets for {segments} segments and their ACKs",
            family.service
        );
        assert!(packets < segments as u64 / 2, "{packets}");
    }
    assert_eq!(lan.counted(PacketCounter::FlowOpened), 2);
    assert_eq!(lan.counted(PacketCounter::ChangeFailed), 0);
}

#[test]
fn udp_crosses_whole_and_in_fragments() {
    let mut lan = Lan::new();
    for family in &families() {
        let (server, at) = server_socket(&lan, family);
        lan.serve(family.service, &[at]);
        let client = client_socket(&lan, family);
        let fragments = lan.counted(PacketCounter::FragmentTranslated);
        for bytes in [0, 1, 1_400] {
            ask(&client, &server, family, bytes);
        }
        assert_eq!(lan.counted(PacketCounter::FragmentTranslated), fragments);
        // Checked by the server's kernel as a whole: no network card has done it before.
        for _ in 0..3 {
            ask(&client, &server, family, 4_000);
        }
        assert_eq!(
            lan.counted(PacketCounter::FragmentTranslated),
            fragments + 3 * 2 * 2
        );
        assert_eq!(lan.counted(PacketCounter::FragmentPassed), 0);
    }
}

#[test]
fn a_checksum_yet_to_be_completed_is_completed_behind_the_gateway() {
    let mut lan = Lan::new();
    let [family, _] = &families();
    let (server, at) = server_socket(&lan, family);
    lan.serve(family.service, &[at]);
    // The gateway completes what it has to cut, and may cut what says so.
    ip(&["link", "set", "net0", "mtu", "1280"]);
    let client = lan.in_client(|| {
        fs::write("/proc/sys/net/ipv4/ip_no_pmtu_disc", "1").unwrap();
        UdpSocket::bind((family.client, 0)).unwrap()
    });
    let mut received = vec![0; 2_000];
    for bytes in 1_300..1_400 {
        client.send_to(&vec![7; bytes], family.service).unwrap();
        let (length, from) = server.recv_from(&mut received).unwrap();
        assert_eq!((length, from), (bytes, client.local_addr().unwrap()));
    }
    assert_eq!(lan.counted(PacketCounter::FragmentTranslated), 0);
}

#[test]
fn path_mtu_discovery_works_through_the_service() {
    let mut lan = Lan::new();
    ip(&["link", "set", "net0", "mtu", "1280"]);
    for family in &families() {
        let (listener, at) = listener(&lan, family);
        lan.serve(family.service, &[at]);
        let (client, server) = connected(&lan, family, &listener);
        let before = lan.counted(PacketCounter::ErrorTranslated);
        transfer(&client, &server, 1 << 20);
        assert!(
            lan.counted(PacketCounter::ErrorTranslated) > before,
            "{}",
            family.service
        );
    }
}

#[test]
fn an_endpoint_without_a_listener_is_seen_as_the_service_s_refusal() {
    let mut lan = Lan::new();
    for family in &families() {
        let (server, at) = server_socket(&lan, family);
        lan.serve(family.service, &[at]);
        drop(server);
        let client = client_socket(&lan, family);
        client.connect(family.service).unwrap();
        client.send(b"?").unwrap();
        let error = client.recv(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        let error = connect(&lan, family).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
    assert_eq!(lan.counted(PacketCounter::ErrorTranslated), 2);
}

#[test]
fn a_service_without_endpoints_refuses_at_once() {
    let mut lan = Lan::new();
    for family in &families() {
        lan.serve(family.service, &[]);
        let began = Instant::now();
        let error = connect(&lan, family).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        let client = client_socket(&lan, family);
        client.connect(family.service).unwrap();
        client.send(b"?").unwrap();
        let error = client.recv(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert!(
            began.elapsed() < Duration::from_secs(1),
            "{:?}",
            began.elapsed()
        );
    }
    assert_eq!(lan.counted(PacketCounter::RefusedTcp), 2);
    assert_eq!(lan.counted(PacketCounter::RefusedUdp), 2);
}

/// Sees every packet of the client's interfaces, from the IP header on.
fn sniffer(lan: &Lan) -> OwnedFd {
    let every = Protocol::from_raw(NonZeroU32::new(0x0003_u16.to_be().into()).unwrap());
    let (family, kind) = (AddressFamily::PACKET, SocketType::DGRAM);
    let sniffer = lan.in_client(|| rustix::net::socket(family, kind, Some(every)).unwrap());
    sockopt::set_socket_timeout(&sniffer, sockopt::Timeout::Recv, Some(PATIENCE)).unwrap();
    sniffer
}

/// The next packet from the service.
#[track_caller]
fn from_service(sniffer: &OwnedFd, family: &Family) -> (IpHeaders, Vec<u8>) {
    for _ in 0..100 {
        let mut bytes = vec![0; 2_000];
        let (length, _) = recv(sniffer, &mut bytes[..], RecvFlags::empty()).unwrap();
        let Ok((ip, payload)) = IpHeaders::from_slice(&bytes[..length]) else {
            continue;
        };
        if source(&ip) == family.service.ip() {
            return (ip, payload.payload.to_vec());
        }
    }
    panic!("nothing from {}", family.service);
}

/// What a network card does with a checksum that holds the sum of the pseudo header.
fn completed(covered: &[u8]) -> u16 {
    !sum(covered)
}

#[test]
fn refusals_of_uncompleted_packets_are_right_once_completed() {
    let mut lan = Lan::new();
    for family in &families() {
        lan.serve(family.service, &[]);
        let sniffer = sniffer(&lan);
        connect(&lan, family).unwrap_err();
        let (ip, reset) = from_service(&sniffer, family);
        let (header, _) = TcpHeader::from_slice(&reset).unwrap();
        let right = match &ip {
            IpHeaders::Ipv4(ip, _) => header.calc_checksum_ipv4(ip, &[]).unwrap(),
            IpHeaders::Ipv6(ip, _) => header.calc_checksum_ipv6(ip, &[]).unwrap(),
        };
        assert_eq!(completed(&reset), right, "{}", family.service);
        assert_ne!(header.checksum, right, "a veth completes nothing");

        let client = client_socket(&lan, family);
        client.send_to(b"question", family.service).unwrap();
        let (ip, mut error) = from_service(&sniffer, family);
        let udp = error.len() - 8;
        let check = completed(&error[udp..]).to_be_bytes();
        assert_ne!(error[udp + 6..], check, "a veth completes nothing");
        error[udp + 6..].copy_from_slice(&check);
        let (header, quote) = error.split_at(8);
        let right = match &ip {
            IpHeaders::Ipv4(..) => {
                let (header, _) = Icmpv4Header::from_slice(header).unwrap();
                header.icmp_type.calc_checksum(quote)
            }
            IpHeaders::Ipv6(ip, _) => {
                let (header, _) = Icmpv6Header::from_slice(header).unwrap();
                let kind = header.icmp_type;
                kind.calc_checksum(ip.source, ip.destination, quote)
                    .unwrap()
            }
        };
        assert_eq!(header[2..4], right.to_be_bytes(), "{}", family.service);
    }
}

#[test]
fn new_endpoints_are_for_new_flows_only() {
    let mut lan = Lan::new();
    for family in &families() {
        let (old, old_at) = listener(&lan, family);
        let (new, new_at) = listener(&lan, family);
        let (udp_old, udp_old_at) = server_socket(&lan, family);
        let client_udp = client_socket(&lan, family);
        lan.serve(family.service, &[udp_old_at]);
        ask(&client_udp, &udp_old, family, 1);
        lan.serve(family.service, &[old_at]);
        let (client, server) = connected(&lan, family, &old);
        for endpoints in [&[new_at][..], &[]] {
            lan.serve(family.service, endpoints);
            transfer(&client, &server, 1_000);
            transfer(&server, &client, 1_000);
            ask(&client_udp, &udp_old, family, 1);
        }
        lan.serve(family.service, &[new_at]);
        connected(&lan, family, &new);
    }
}

#[test]
fn an_interface_is_left_as_it_was() {
    let mut lan = Lan::new();
    let [family, _] = &families();
    let (listener, at) = listener(&lan, family);
    lan.serve(family.service, &[at]);
    lan.services
        .attach_interface(index("lan0"), LinkHeader::Ethernet)
        .unwrap();
    connected(&lan, family, &listener);
    assert!(
        !lan.services
            .attach_interface(index("lan0"), LinkHeader::Ethernet)
            .unwrap()
    );
    assert!(lan.services.detach_interface(index("lan0")));
    assert!(!lan.services.detach_interface(index("lan0")));
    let before = lan.services.packet_counters().unwrap();
    // The gateway has no route to it, and says so.
    connect(&lan, family).unwrap_err();
    assert_eq!(lan.services.packet_counters().unwrap(), before);
    lan.services
        .attach_interface(index("lan0"), LinkHeader::Ethernet)
        .unwrap();
    connected(&lan, family, &listener);
}

#[test]
fn a_new_interface_with_the_number_of_an_old_one_is_served() {
    let mut lan = Lan::new();
    for _ in 0..2 {
        ip(&["link", "add", "br7", "index", "777", "type", "bridge"]);
        assert!(
            lan.services
                .attach_interface(index("br7"), LinkHeader::Ethernet)
                .unwrap()
        );
        assert!(
            !lan.services
                .attach_interface(index("br7"), LinkHeader::Ethernet)
                .unwrap()
        );
        ip(&["link", "del", "br7"]);
    }
}

#[test]
fn an_interface_that_is_not_there_is_said_so() {
    let mut lan = Lan::new();
    let nowhere = NonZeroU32::new(1 << 20).unwrap();
    let error = lan
        .services
        .attach_interface(nowhere, LinkHeader::Ethernet)
        .unwrap_err();
    assert!(matches!(error, InterfaceError::Unknown { .. }), "{error:?}");
    let mut sockets_alone = Services::load(lan.cgroup()).unwrap();
    let error = sockets_alone
        .attach_interface(index("lan0"), LinkHeader::Ethernet)
        .unwrap_err();
    assert!(matches!(error, InterfaceError::SocketsAlone), "{error:?}");
}

/// Also where it never falls silent, by which it would end.
#[test]
fn a_device_s_datagrams_go_elsewhere_once_their_flow_is_ended_and_no_other_flow_does() {
    let mut lan = Lan::new();
    for family in &families() {
        let (old, old_at) = server_socket(&lan, family);
        let listener = lan.in_servers(|| TcpListener::bind(old_at).unwrap());
        let (new, new_at) = server_socket(&lan, family);
        lan.serve(family.service, &[old_at]);
        let (client, server) = connected(&lan, family, &listener);
        let [asks, silent] = [(); 2].map(|()| client_socket(&lan, family));
        for socket in [&asks, &silent] {
            ask(socket, &old, family, 9);
        }
        lan.serve(family.service, &[new_at]);
        ask(&asks, &old, family, 9); // For the kernel alone it stays there.

        let led = |endpoint| (frontend(family), endpoint);
        let flows = lan.services.device_datagrams().unwrap();
        let known: BTreeSet<_> = flows.iter().map(|(_, led)| *led).collect();
        assert_eq!(known, BTreeSet::from([led(old_at)]));
        let end = |lan: &mut Lan, endpoint| {
            let mut flows = lan.services.device_datagrams().unwrap();
            flows.retain(|(_, one)| *one == led(endpoint));
            for (flow, _) in &flows {
                lan.services.forget_device_datagrams(*flow).unwrap();
            }
            flows.len()
        };
        assert_eq!(end(&mut lan, new_at), 0);
        assert_eq!(end(&mut lan, old_at), 2);
        ask(&asks, &new, family, 9);
        assert_eq!(end(&mut lan, old_at), 0);
        ask(&asks, &new, family, 9);
        transfer(&client, &server, 100);
        transfer(&server, &client, 100);
        assert_eq!(end(&mut lan, new_at), 1);
    }
}

fn frontend(family: &Family) -> Frontend {
    Frontend {
        clients: Clients::All,
        address: family.service.ip(),
        port: family.service.port(),
        protocol: ebpf_loader::Protocol::Udp,
    }
}
