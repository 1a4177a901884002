//! Redirection, branch by branch: what goes on is what etherparse builds, what does not is untouched.

use std::collections::BTreeMap;

use aya::{
    maps::{HashMap, LpmTrie, MapData, PerCpuArray, lpm_trie::Key, xdp::DevMap},
    programs::{TestRun, TestRunOptions},
};
use ebpf_abi::{RedirectCounter, Route, SocketAddress};
use etherparse::{IpHeaders, IpNumber, Ipv6RawExtHeader, TcpHeader};

use crate::{
    lan::index,
    machine::{Machine, Ran, Verdict, next},
    netns::{ip, new_network_namespace},
    wire::{self, ETHERNET, Net, TTL, ip_nets, nets, tcp, udp, udp_in, without_ethernet},
};

/// The interface that a test run's packets come in by.
const LOOPBACK: u32 = 1;

/// Of the port, in the map of interfaces.
const SLOT: u32 = 3;

const MAC: [u8; 6] = [2, 0, 0, 0, 1, 0xb];
const POD_MAC: [u8; 6] = [2, 0, 0, 0, 2, 0xb];

/// The thread is in a namespace with an interface for packets to the endpoint.
struct Ways {
    machine: Machine,
    port: u32,
}

impl Ways {
    /// Clients are behind the loopback, endpoints behind the port.
    fn new(nets: &[Net], is_pod: bool) -> Self {
        new_network_namespace();
        ip(&["link", "add", "port", "type", "veth", "peer", "name", "end"]);
        let port = index("port").get();
        let mut ways = Self {
            machine: Machine::new(),
            port,
        };
        ways.links().set(SLOT, port, None, 0).unwrap();
        for net in nets {
            ways.route(net.client.ip(), LOOPBACK, false);
            ways.route(net.endpoint.ip(), port, is_pod);
        }
        ways
    }

    fn links(&mut self) -> DevMap<&mut MapData> {
        let map = self.machine.ebpf.get_mut().map_mut("hf_redirects").unwrap();
        map.try_into().unwrap()
    }

    fn hosts(&mut self) -> HashMap<&mut MapData, [u32; 4], Route> {
        self.machine.map("hf_hosts")
    }

    fn route(&mut self, to: std::net::IpAddr, interface: u32, is_pod: bool) {
        let route = Route {
            interface,
            slot: SLOT,
            mtu: 1_400,
            mac: MAC,
            pod_mac: POD_MAC,
            is_pod: is_pod.into(),
            is_served: 0,
            has_devices: 0,
            zero: 0,
        };
        let to = SocketAddress::new(to, 0, 0).ip;
        self.hosts().insert(to, route, 0).unwrap();
    }

    fn prefix(&mut self, length: u32, ip: [u32; 4], route: Route) {
        let map = self.machine.ebpf.get_mut().map_mut("hf_routes").unwrap();
        let mut routes: LpmTrie<_, [u32; 4], Route> = map.try_into().unwrap();
        routes.insert(&Key::new(length, ip), route, 0).unwrap();
    }

    #[track_caller]
    fn run(&self, packet: &[u8]) -> Ran {
        self.machine.run("hf_redirect", packet)
    }

    /// As a super-packet of such segments, or with a mark.
    #[track_caller]
    fn run_as(&self, packet: &[u8], mark: u32, gso_size: u32) -> Verdict {
        let mut context = [0; 192]; // struct __sk_buff of linux/bpf.h.
        context[8..12].copy_from_slice(&mark.to_ne_bytes());
        context[176..180].copy_from_slice(&gso_size.to_ne_bytes());
        let options = TestRunOptions {
            data_in: Some(packet),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        };
        let ran = self.machine.program("hf_redirect").test_run(options);
        match ran.unwrap().return_value.cast_signed() {
            -1 => Verdict::Next,
            7 => Verdict::Returned,
            other => panic!("{other}"),
        }
    }

    fn counted(&self) -> BTreeMap<RedirectCounter, u64> {
        let ebpf = self.machine.ebpf.borrow();
        let map = ebpf.map("hf_redir_counters").unwrap();
        let counters: PerCpuArray<&MapData, u64> = map.try_into().unwrap();
        let sum = |&counter: &RedirectCounter| {
            let per_cpu = counters.get(&(counter as u32), 0).unwrap();
            (counter, per_cpu.iter().sum())
        };
        let all = RedirectCounter::ALL.iter().map(sum);
        all.filter(|&(_, count)| count > 0).collect()
    }

    /// It is left to the stack as it came, for this reason.
    #[track_caller]
    fn leaves(&self, packet: Vec<u8>, reason: RedirectCounter) {
        let before = self.counted().get(&reason).copied().unwrap_or(0);
        assert_eq!(self.run(&packet), next(packet), "{reason:?}");
        assert_eq!(
            self.counted().get(&reason),
            Some(&(before + 1)),
            "{reason:?}"
        );
    }
}

fn with_ttl(net: &Net, ttl: u8) -> IpHeaders {
    let mut ip = wire::ip(net.client.ip(), net.endpoint.ip());
    match &mut ip {
        IpHeaders::Ipv4(header, _) => header.time_to_live = ttl,
        IpHeaders::Ipv6(header, _) => header.hop_limit = ttl,
    }
    ip
}

/// The datagram after `ttl` hops are left.
fn datagram(net: &Net, ttl: u8) -> Vec<u8> {
    let ip = with_ttl(net, ttl);
    udp_in(ip, net.client.port(), net.endpoint.port(), b"odd too")
}

/// With these addresses of the link.
fn addressed(mut packet: Vec<u8>) -> Vec<u8> {
    packet[..12].copy_from_slice(&[POD_MAC, MAC].concat());
    packet
}

fn redirected(packet: Vec<u8>) -> Ran {
    let verdict = Verdict::Returned;
    Ran { verdict, packet }
}

#[test]
fn a_pod_gets_packets_as_the_stack_would_hand_them_on() {
    let ways = Ways::new(&nets(), true);
    for net in &nets() {
        for ttl in [2, TTL, 255] {
            let expected = addressed(datagram(net, ttl - 1));
            assert_eq!(ways.run(&datagram(net, ttl)), redirected(expected));
        }
    }
    let expected = BTreeMap::from([(RedirectCounter::ToPod, 6)]);
    assert_eq!(ways.counted(), expected);
}

#[test]
fn packets_of_the_tunnel_get_an_ethernet_header_for_the_pod() {
    let ways = Ways::new(&ip_nets(), true);
    for net in &ip_nets() {
        let came = without_ethernet(datagram(net, TTL));
        let expected = addressed(datagram(net, TTL - 1));
        let ran = ways.machine.run("hf_redirect_ip", &came);
        assert_eq!(ran, redirected(expected));
    }
}

#[test]
fn the_tunnel_gets_packets_one_hop_older_and_the_kernel_takes_the_header() {
    let ways = Ways::new(&nets(), false);
    for net in &nets() {
        let ran = ways.run(&datagram(net, TTL));
        assert_eq!(ran, redirected(datagram(net, TTL - 1)));
    }
    let expected = BTreeMap::from([(RedirectCounter::ToTunnel, 2)]);
    assert_eq!(ways.counted(), expected);
}

#[test]
fn what_the_stack_would_do_more_with_is_left_to_it() {
    use RedirectCounter as R;
    let mut ways = Ways::new(&nets(), true);
    for net in &nets() {
        let Net {
            client, endpoint, ..
        } = *net;
        let payload = |bytes: usize| udp(client, endpoint, &vec![7; bytes]);
        let headers = net.l4() - ETHERNET + 8;
        ways.leaves(datagram(net, 1), R::HopLimit);
        ways.leaves(datagram(net, 0), R::HopLimit);
        ways.leaves(payload(1_401 - headers), R::TooBig);
        assert_eq!(
            ways.run(&payload(1_400 - headers)).verdict,
            Verdict::Returned
        );
        ways.leaves(udp(endpoint, endpoint, b"?"), R::Source);
        ways.leaves(udp(net.service, endpoint, b"?"), R::Source);
        ways.leaves(udp(client, net.service, b"?"), R::Elsewhere);
        ways.leaves(udp(client, client, b"?"), R::Elsewhere);
        let mut of_another = datagram(net, TTL);
        of_another[0] = 2; // Another station's, as a device that listens to all sees it.
        ways.leaves(of_another, R::Other);
        let mut short = datagram(net, TTL);
        short.truncate(net.l4());
        short[ETHERNET] = short[ETHERNET] & 0xf0 | 4; // Neither IPv6 nor a header of 20 bytes.
        if net.v4() {
            ways.leaves(short, R::Other);
        }
        assert_eq!(ways.run_as(&datagram(net, TTL), 1, 0), Verdict::Next);
        let segments = |bytes: usize| {
            let set = |header: &mut TcpHeader| header.ack = true;
            let packet = tcp(client, endpoint, set, &vec![7; 3_000]);
            let headers = net.l4() - ETHERNET + 20;
            ways.run_as(&packet, 0, u32::try_from(bytes - headers).unwrap())
        };
        assert_eq!(segments(1_400), Verdict::Returned);
        assert_eq!(segments(1_401), Verdict::Next);
    }
    ways.links().set(SLOT, LOOPBACK, None, 0).unwrap();
    for net in &nets() {
        ways.leaves(datagram(net, TTL), R::Gone);
    }
}

#[test]
fn options_and_hop_by_hop_headers_are_left_to_the_stack() {
    let ways = Ways::new(&nets(), true);
    for net in &nets() {
        let mut ip = wire::ip(net.client.ip(), net.endpoint.ip());
        match &mut ip {
            IpHeaders::Ipv4(header, _) => header.options = [1; 4].into(),
            IpHeaders::Ipv6(_, extensions) => {
                let none = [1, 4, 0, 0, 0, 0];
                let header = Ipv6RawExtHeader::new_raw(IpNumber::UDP, &none).unwrap();
                extensions.hop_by_hop_options = Some(header);
            }
        }
        let (from, to) = (net.client.port(), net.endpoint.port());
        ways.leaves(udp_in(ip, from, to, b"?"), RedirectCounter::Other);
    }
}

#[test]
fn link_local_and_multicast_addresses_stay_on_their_link() {
    let mut ways = Ways::new(&nets(), true);
    let [_, net] = nets();
    for to in ["[fe80::9]:1", "[febf::9]:1", "[ff02::fb]:1"] {
        let to: std::net::SocketAddr = to.parse().unwrap();
        let port = ways.port;
        ways.route(to.ip(), port, true);
        ways.leaves(udp(net.client, to, b"?"), RedirectCounter::Other);
        ways.route(to.ip(), LOOPBACK, false);
        ways.leaves(udp(to, net.endpoint, b"?"), RedirectCounter::Other);
    }
}

#[test]
fn the_longest_prefix_leads() {
    let mut ways = Ways::new(&nets(), true);
    let [net, _] = nets();
    let [a, b] = ["10.0.0.0", "10.0.9.0"].map(|text| {
        let ip: std::net::IpAddr = text.parse().unwrap();
        SocketAddress::new(ip, 0, 0).ip
    });
    let to = SocketAddress::new(net.endpoint.ip(), 0, 0).ip;
    let route = ways.hosts().get(&to, 0).unwrap();
    ways.hosts().remove(&to).unwrap();
    ways.leaves(datagram(&net, TTL), RedirectCounter::Elsewhere);
    ways.prefix(96 + 8, a, route);
    assert_eq!(ways.run(&datagram(&net, TTL)).verdict, Verdict::Returned);
    let stack = Route {
        interface: 0,
        ..route
    };
    ways.prefix(96 + 24, b, stack);
    ways.leaves(datagram(&net, TTL), RedirectCounter::Elsewhere);
}
