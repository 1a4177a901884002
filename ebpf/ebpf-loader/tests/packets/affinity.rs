//! `sessionAffinity: ClientIP`, where a client is a source address.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use ebpf_abi::{EndpointList, PacketCounter, SocketAddress};

use crate::{
    machine::{Machine, TCP, UDP},
    wire::{ETHERNET, Net, nets, udp},
};

const HOUR: Duration = Duration::from_secs(3_600);

/// Flows opened: by chance, all of them go to one of eight endpoints once in 10^27 times.
const FLOWS: u16 = 31;

/// `port` of eight pods.
fn pods(net: &Net, port: u16) -> Vec<SocketAddr> {
    let nth = |n: u8| match net.endpoint.ip() {
        IpAddr::V4(ip) => IpAddr::from(Ipv4Addr::from_bits(ip.to_bits() + u32::from(n))),
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() + u128::from(n)).into(),
    };
    (0..8).map(|n| SocketAddr::new(nth(n), port)).collect()
}

/// A service that keeps its clients for so long.
fn serve(machine: &mut Machine, service: SocketAddr, endpoints: &[SocketAddr], timeout: Duration) {
    machine.serve_as(service, endpoints, EndpointList::with_affinity);
    let timeout_ns = u64::try_from(timeout.as_nanos()).unwrap();
    for protocol in [TCP, UDP] {
        let key = SocketAddress::new(service.ip(), service.port(), protocol);
        let mut timeouts = machine.map::<SocketAddress, u64>("hf_timeouts");
        timeouts.insert(key, timeout_ns, 0).unwrap();
    }
}

/// Where a flow of this client goes.
fn endpoint(machine: &Machine, client: SocketAddr, service: SocketAddr) -> SocketAddr {
    let packet = machine.request(&udp(client, service, b"?")).packet;
    let (at, l4) = match client.is_ipv4() {
        true => (ETHERNET + 16, ETHERNET + 20),
        false => (ETHERNET + 24, ETHERNET + 40),
    };
    let ip: IpAddr = match <[u8; 4]>::try_from(&packet[at..l4]) {
        Ok(v4) => v4.into(),
        Err(_) => <[u8; 16]>::try_from(&packet[at..l4]).unwrap().into(),
    };
    SocketAddr::new(ip, u16::from_be_bytes([packet[l4 + 2], packet[l4 + 3]]))
}

/// Where new flows of `from`, one from each port, go.
fn endpoints(machine: &Machine, from: IpAddr, service: SocketAddr) -> BTreeSet<SocketAddr> {
    let ports = 20_000..20_000 + FLOWS;
    let each = ports.map(|port| endpoint(machine, SocketAddr::new(from, port), service));
    each.collect()
}

fn counted(machine: &Machine, counter: PacketCounter) -> u64 {
    machine.counted().get(&counter).copied().unwrap_or_default()
}

#[test]
fn a_source_address_keeps_its_endpoint() {
    for net in &nets() {
        let mut machine = Machine::new();
        serve(&mut machine, net.service, &pods(net, 8_080), HOUR);
        let [own] = Vec::from_iter(endpoints(&machine, net.client.ip(), net.service))[..] else {
            panic!("the client did not keep its endpoint");
        };
        assert!(pods(net, 8_080).contains(&own));
        let kept = counted(&machine, PacketCounter::AffinityKept);
        assert_eq!(kept, u64::from(FLOWS) - 1);
        // Others have theirs, each its own.
        let others = pods(net, 1).into_iter().map(|other| other.ip());
        let others: Vec<_> = others
            .map(|from| endpoints(&machine, from, net.service))
            .collect();
        assert!(others.iter().all(|kept| kept.len() == 1), "{others:?}");
        let used: BTreeSet<_> = others.into_iter().flatten().collect();
        assert!(used.len() > 1, "{used:?}");
    }
}

#[test]
fn without_affinity_or_after_its_timeout_new_flows_go_anywhere() {
    for net in &nets() {
        let mut machine = Machine::new();
        machine.serve(net.service, &pods(net, 8_080));
        assert!(endpoints(&machine, net.client.ip(), net.service).len() > 1);
        let mut machine = Machine::new();
        let at_once = Duration::from_nanos(1);
        serve(&mut machine, net.service, &pods(net, 8_080), at_once);
        assert!(endpoints(&machine, net.client.ip(), net.service).len() > 1);
        assert_eq!(counted(&machine, PacketCounter::AffinityKept), 0);
    }
}

#[test]
fn a_client_moves_when_its_endpoint_is_gone_and_stays_there() {
    for net in &nets() {
        let mut machine = Machine::new();
        let mut there = pods(net, 8_080);
        serve(&mut machine, net.service, &there, HOUR);
        let client = |port| SocketAddr::new(net.client.ip(), port);
        let first = endpoint(&machine, client(1), net.service);
        there.rotate_left(3);
        serve(&mut machine, net.service, &there, HOUR);
        assert_eq!(endpoint(&machine, client(2), net.service), first);
        there.retain(|pod| *pod != first);
        serve(&mut machine, net.service, &there, HOUR);
        let second = endpoint(&machine, client(3), net.service);
        assert_ne!(second, first);
        there.push(first);
        serve(&mut machine, net.service, &there, HOUR);
        let kept = endpoints(&machine, net.client.ip(), net.service);
        assert_eq!(kept, [second].into());
    }
}

#[test]
fn all_ports_of_an_address_lead_a_client_to_one_pod() {
    for net in &nets() {
        let mut machine = Machine::new();
        let other = SocketAddr::new(net.service.ip(), 443);
        serve(&mut machine, net.service, &pods(net, 8_080), HOUR);
        serve(&mut machine, other, &pods(net, 8_443), HOUR);
        for client in pods(net, 30_000) {
            let first = endpoint(&machine, client, net.service);
            let expected = SocketAddr::new(first.ip(), 8_443);
            let beside = endpoints(&machine, client.ip(), other);
            assert_eq!(beside, [expected].into());
        }
    }
}
