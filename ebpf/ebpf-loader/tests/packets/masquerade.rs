//! Clients to which the mesh knows no way back, at the tunnel's interface.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket},
};

use aya::maps::{Array, LpmTrie, MapData, lpm_trie::Key};
use ebpf_abi::{
    MASQUERADE_PORT_FIRST, MASQUERADE_PORTS, Masquerade, PacketCounter, SocketAddress, TrackedFlow,
};
use etherparse::TcpHeader;

use crate::{
    machine::{Machine, Ran, UDP, Verdict, next},
    wire::{IcmpError, Net, ODD, error, fragments, ip_nets, tcp, udp, without_ethernet},
};

const OWN: [&str; 2] = ["8.0.96.1", "fd96:0:86dd::1"];

/// Packets sent through the program for one direction.
impl Machine {
    #[track_caller]
    fn leave(&self, packet: Vec<u8>) -> Ran {
        self.run("hf_leaving", &without_ethernet(packet))
    }

    #[track_caller]
    fn enter(&self, packet: Vec<u8>) -> Ran {
        self.run("hf_entering", &without_ethernet(packet))
    }
}

fn on(packet: Vec<u8>) -> Ran {
    next(without_ethernet(packet))
}

fn own(net: &Net) -> IpAddr {
    let [v4, v6] = OWN;
    if net.v4() { v4 } else { v6 }.parse().unwrap()
}

/// One service with one endpoint, and a node that speaks for its clients.
fn gateway(net: &Net) -> Machine {
    let mut machine = Machine::new();
    machine.serve(net.service, &[net.endpoint]);
    let [v4, v6] = OWN.map(|own| SocketAddress::new(own.parse().unwrap(), 0, 0).ip);
    let map = machine.ebpf.get_mut().map_mut("hf_masquerade").unwrap();
    let mut map: Array<&mut MapData, Masquerade> = map.try_into().unwrap();
    map.set(0, Masquerade { v4, v6 }, 0).unwrap();
    machine
}

fn keep(machine: &mut Machine, net: IpAddr, length: u32) {
    let map = machine.ebpf.get_mut().map_mut("hf_kept").unwrap();
    let mut map: LpmTrie<&mut MapData, [u32; 4], u32> = map.try_into().unwrap();
    let length = if net.is_ipv4() { 96 + length } else { length };
    let key = Key::new(length, SocketAddress::new(net, 0, 0).ip);
    map.insert(&key, 1, 0).unwrap();
}

/// The source port of a packet without Ethernet header.
fn source_port(net: &Net, packet: &[u8]) -> u16 {
    let at = if net.v4() { 20 } else { 40 };
    u16::from_be_bytes([packet[at], packet[at + 1]])
}

/// Opens a flow from `client` by UDP; as whom it goes.
#[track_caller]
fn opened(machine: &Machine, net: &Net, client: SocketAddr) -> SocketAddr {
    machine.request(&udp(client, net.service, ODD));
    let left = machine.leave(udp(client, net.endpoint, ODD));
    let seen = SocketAddr::new(own(net), source_port(net, &left.packet));
    assert!(u32::from(seen.port()) >= MASQUERADE_PORT_FIRST, "{seen}");
    assert_eq!(left, on(udp(seen, net.endpoint, ODD)));
    seen
}

fn counted(machine: &Machine, counter: PacketCounter) -> u64 {
    machine.counted().get(&counter).copied().unwrap_or_default()
}

fn ack(header: &mut TcpHeader) {
    header.ack = true;
}

#[test]
fn a_client_goes_as_the_node_and_has_its_answers() {
    for net in &ip_nets() {
        let Net {
            client,
            service,
            endpoint,
            ..
        } = *net;
        let machine = gateway(net);
        let seen = opened(&machine, net, client);
        for payload in [ODD, &[7; 1_001]] {
            let left = machine.leave(udp(client, endpoint, payload));
            assert_eq!(left, on(udp(seen, endpoint, payload)), "the port stays");
            let entered = machine.enter(udp(endpoint, seen, payload));
            assert_eq!(entered, on(udp(endpoint, client, payload)));
            let answered = machine.answer(&udp(endpoint, client, payload));
            assert_eq!(answered, next(udp(service, client, payload)));
        }
        machine.request(&tcp(client, service, ack, b"GET /"));
        let left = machine.leave(tcp(client, endpoint, ack, b"GET /"));
        let seen = SocketAddr::new(own(net), source_port(net, &left.packet));
        assert_eq!(left, on(tcp(seen, endpoint, ack, b"GET /")));
        let entered = machine.enter(tcp(endpoint, seen, ack, b"200"));
        assert_eq!(entered, on(tcp(endpoint, client, ack, b"200")));
        let expected = [
            (PacketCounter::RequestTranslated, 2),
            (PacketCounter::FlowOpened, 2),
            (PacketCounter::AnswerTranslated, 2),
            (PacketCounter::Masqueraded, 4),
            (PacketCounter::MasqueradeOpened, 2),
            (PacketCounter::Unmasqueraded, 3),
        ];
        assert_eq!(machine.counted(), BTreeMap::from(expected));
    }
}

#[test]
fn two_clients_with_one_port_have_two_at_the_node() {
    for net in &ip_nets() {
        let machine = gateway(net);
        let beside = match net.client.ip() {
            IpAddr::V4(_) => "8.0.7.3".parse().unwrap(),
            IpAddr::V6(ip) => IpAddr::from(Ipv6Addr::from_bits(ip.to_bits() + 1)),
        };
        let clients = [net.client, SocketAddr::new(beside, net.client.port())];
        let seen = clients.map(|client| opened(&machine, net, client));
        assert_ne!(seen[0], seen[1]);
        for (client, seen) in clients.into_iter().zip(seen) {
            let entered = machine.enter(udp(net.endpoint, seen, ODD));
            assert_eq!(entered, on(udp(net.endpoint, client, ODD)));
        }
    }
}

#[test]
fn who_is_known_to_the_mesh_and_what_is_no_flow_pass_untouched() {
    for net in &ip_nets() {
        let Net {
            client, endpoint, ..
        } = *net;
        let mut machine = gateway(net);
        let here = SocketAddr::new(own(net), 40_001);
        for packet in [udp(client, endpoint, ODD), udp(here, endpoint, ODD)] {
            assert_eq!(machine.leave(packet.clone()), on(packet));
        }
        for to in [here, SocketAddr::new(own(net), 61_001), client] {
            let packet = udp(endpoint, to, ODD);
            assert_eq!(machine.enter(packet.clone()), on(packet));
        }
        machine.request(&udp(client, net.service, ODD));
        let length = if net.v4() { 24 } else { 64 };
        keep(&mut machine, client.ip(), length);
        let packet = udp(client, endpoint, ODD);
        assert_eq!(machine.leave(packet.clone()), on(packet));
        assert_eq!(counted(&machine, PacketCounter::TunnelPassed), 6);
        assert_eq!(counted(&machine, PacketCounter::Masqueraded), 0);

        let mut nobody = Machine::new();
        nobody.serve(net.service, &[endpoint]);
        nobody.request(&udp(client, net.service, ODD));
        let packet = udp(client, endpoint, ODD);
        assert_eq!(nobody.leave(packet.clone()), on(packet));
    }
}

#[test]
fn errors_reach_the_client_and_the_endpoint() {
    for net in &ip_nets() {
        let Net {
            client,
            endpoint,
            router,
            ..
        } = *net;
        let machine = gateway(net);
        let seen = opened(&machine, net, client);
        let sent = without_ethernet(udp(client, endpoint, ODD));
        let as_seen = without_ethernet(udp(seen, endpoint, ODD));
        for from in [endpoint.ip(), router] {
            for kind in IcmpError::ALL {
                let came = machine.enter(error(from, seen.ip(), kind, &as_seen));
                assert_eq!(came, on(error(from, client.ip(), kind, &sent)));
            }
        }
        let answer = without_ethernet(udp(endpoint, client, ODD));
        let as_sent = without_ethernet(udp(endpoint, seen, ODD));
        for from in [client.ip(), router] {
            let kind = IcmpError::PortUnreachable;
            let left = machine.leave(error(from, endpoint.ip(), kind, &answer));
            assert_eq!(left, on(error(own(net), endpoint.ip(), kind, &as_sent)));
        }
        assert_eq!(counted(&machine, PacketCounter::ErrorTranslated), 8);
    }
}

#[test]
fn fragments_go_the_way_of_the_first() {
    for net in &ip_nets() {
        let Net {
            client, endpoint, ..
        } = *net;
        let machine = gateway(net);
        let seen = opened(&machine, net, client);
        let payload = [7; 100];
        let left = fragments(&udp(client, endpoint, &payload), 500, 48);
        let expected = fragments(&udp(seen, endpoint, &payload), 500, 48);
        for (packet, expected) in left.into_iter().zip(expected) {
            assert_eq!(machine.leave(packet), on(expected));
        }
        let entered = fragments(&udp(endpoint, seen, &payload), 9, 48);
        let expected = fragments(&udp(endpoint, client, &payload), 9, 48);
        for (packet, expected) in entered.into_iter().zip(expected) {
            assert_eq!(machine.enter(packet), on(expected));
        }
    }
}

/// Gives every port but `free` to an open flow of another client.
fn take_all_but(machine: &mut Machine, net: &Net, free: Option<u16>) {
    let key = |addr: SocketAddr| SocketAddress::new(addr.ip(), addr.port(), UDP);
    let endpoint = key(net.endpoint);
    let ports = MASQUERADE_PORT_FIRST..MASQUERADE_PORT_FIRST + MASQUERADE_PORTS;
    for port in ports.map(|port| u16::try_from(port).unwrap()) {
        if Some(port) == free {
            continue;
        }
        let client = key(SocketAddr::new([192, 168, 99, 9].into(), port));
        let seen = key(SocketAddr::new(own(net), port));
        let flow = |client, address| TrackedFlow { client, address };
        let mut map = machine.map::<TrackedFlow, SocketAddress>("hf_unmasked");
        map.insert(flow(seen, endpoint), client, 0).unwrap();
        let mut map = machine.map::<TrackedFlow, SocketAddress>("hf_masked");
        map.insert(flow(client, endpoint), seen, 0).unwrap();
        machine.request(&udp(client.socket_addr(), net.service, ODD));
    }
    // Later than now.
    machine.change_flows(|flow| flow.seen_ns = u64::try_from(i64::MAX).unwrap());
}

#[test]
fn without_a_free_port_a_flow_s_packets_are_dropped_until_another_is_over() {
    let [net, _] = ip_nets();
    let mut machine = gateway(&net);
    take_all_but(&mut machine, &net, None);
    machine.request(&udp(net.client, net.service, ODD));
    let left = machine.leave(udp(net.client, net.endpoint, ODD));
    assert_eq!(left.verdict, Verdict::Dropped);
    assert_eq!(counted(&machine, PacketCounter::MasqueradeFull), 1);

    machine.change_flows(|flow| {
        flow.seen_ns = 0;
        flow.noted = 0;
    });
    opened(&machine, &net, net.client);
}

#[test]
fn a_port_of_a_socket_here_is_not_given_away() {
    let [net, _] = ip_nets();
    let mut machine = gateway(&net);
    let first = u16::try_from(MASQUERADE_PORT_FIRST).unwrap();
    let sockets = (first..=u16::MAX).filter_map(|port| UdpSocket::bind(("0.0.0.0", port)).ok());
    let socket = sockets.take(1).next().expect("no port is free here");
    let port = socket.local_addr().unwrap().port();
    take_all_but(&mut machine, &net, Some(port));
    machine.request(&udp(net.client, net.service, ODD));
    // Each tries 32 of 4,536 ports, from a random one on.
    let is_given = |times: usize| {
        (0..times).any(|_| {
            let left = machine.leave(udp(net.client, net.endpoint, ODD));
            left.verdict == Verdict::Next
        })
    };
    assert!(!is_given(1_000));
    drop(socket);
    assert!(is_given(10_000));
}
