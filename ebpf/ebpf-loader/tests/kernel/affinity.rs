//! `sessionAffinity: ClientIP` at the socket: a network namespace keeps its endpoint.

use std::{
    collections::BTreeSet,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use ebpf_abi::{Counter, SocketAddress};
use ebpf_loader::Protocol;

use crate::{
    TRIES,
    lab::{FAMILIES, Family, Lab, accepted, addresses, ask, datagram, tcp_servers, udp_servers},
    netns::new_network_namespace,
};

/// Longer than any test.
const HOUR: Option<Duration> = Some(Duration::from_secs(3_600));

/// Connects; which server has it.
#[track_caller]
pub(crate) fn reach(asked: SocketAddr, servers: &[TcpListener]) -> usize {
    let client = TcpStream::connect(asked).unwrap();
    let (server, _) = accepted(servers);
    assert_eq!(client.peer_addr().unwrap(), asked);
    server
}

#[test]
fn a_client_keeps_its_endpoint_for_all_its_sockets() {
    for family in &FAMILIES {
        let mut lab = Lab::new();
        let tcp = tcp_servers(family.loopback, 3);
        let udp = udp_servers(family.loopback, 3);
        let tcp_at = addresses(&tcp, TcpListener::local_addr);
        let udp_at = addresses(&udp, UdpSocket::local_addr);
        let asked = family.asked();
        let serve = |lab: &mut Lab, affinity| {
            let services: [(_, _, &[_]); 2] = [
                (asked, Protocol::Tcp, &tcp_at),
                (asked, Protocol::Udp, &udp_at),
            ];
            lab.apply_with(affinity, &services);
        };
        serve(&mut lab, HOUR);
        let first = reach(asked, &tcp);
        let first_udp = ask(&family.client(), family, &udp);
        for _ in 0..TRIES {
            assert_eq!(reach(asked, &tcp), first, "{}", family.name);
            let client = family.client();
            assert_eq!(ask(&client, family, &udp), first_udp, "{}", family.name);
            let client = family.client();
            client.connect(asked).unwrap();
            client.send(b"?").unwrap();
            assert_eq!(datagram(&udp).0, first_udp, "{}", family.name);
        }
        // The first by UDP already follows the one by TCP.
        assert_eq!(lab.counted()(Counter::AffinityKept), 1 + 3 * TRIES as u64);
        assert_eq!(lab.counted()(Counter::NotRemembered), 0);

        // The service does not ask for it any more.
        serve(&mut lab, None);
        let reached: BTreeSet<_> = (0..TRIES).map(|_| reach(asked, &tcp)).collect();
        assert_eq!(reached.len(), 3, "{}", family.name);
        assert_eq!(lab.map_entries::<SocketAddress, u64>("hf_timeouts"), 0);
    }
}

/// Asks from many network namespaces, in each six times and then `again`, and wants the same endpoint
/// within one and all three among them.
pub(crate) fn assert_namespaces_are_clients(
    asked: SocketAddr,
    at: [SocketAddr; 3],
    mut again: impl FnMut(usize, &[TcpListener]),
) {
    // Chance of missing one of three endpoints in 40 namespaces: below 10⁻⁶.
    const NAMESPACES: usize = 40;
    let mut reached = BTreeSet::new();
    for _ in 0..NAMESPACES {
        new_network_namespace();
        let servers = at.map(|at| TcpListener::bind(at).unwrap());
        let first = reach(asked, &servers);
        for _ in 0..5 {
            assert_eq!(reach(asked, &servers), first);
        }
        again(first, &servers);
        reached.insert(first);
    }
    assert_eq!(reached.len(), 3);
}

#[test]
fn each_network_namespace_is_a_client_of_its_own() {
    let mut lab = Lab::new();
    let family = &FAMILIES[0];
    let at: [SocketAddr; 3] = [7001, 7002, 7003].map(|port| ([127, 0, 0, 1], port).into());
    lab.apply_with(HOUR, &[(family.asked(), Protocol::Tcp, &at)]);
    assert_namespaces_are_clients(family.asked(), at, |_, _| {});
}

#[test]
fn the_endpoint_is_kept_until_the_timeout_after_the_last_new_flow() {
    let mut lab = Lab::new();
    let family = &FAMILIES[0];
    let servers = tcp_servers(family.loopback, 3);
    let at = addresses(&servers, TcpListener::local_addr);
    let serve = |lab: &mut Lab, timeout_ms| {
        let affinity = Some(Duration::from_millis(timeout_ms));
        lab.apply_with(affinity, &[(family.asked(), Protocol::Tcp, &at)]);
    };
    serve(&mut lab, 2_000);
    let first = reach(family.asked(), &servers);
    for _ in 0..8 {
        thread::sleep(Duration::from_millis(300)); // 2.4 s in all, and each use counts anew.
        assert_eq!(reach(family.asked(), &servers), first);
    }
    serve(&mut lab, 20);
    let mut reached = BTreeSet::new();
    for _ in 0..TRIES {
        thread::sleep(Duration::from_millis(21));
        reached.insert(reach(family.asked(), &servers));
    }
    assert_eq!(reached.len(), 3);
}

#[test]
fn a_client_moves_only_when_its_endpoint_is_gone() {
    let mut lab = Lab::new();
    let family = &FAMILIES[0];
    let servers = tcp_servers(family.loopback, 40);
    let all = addresses(&servers, TcpListener::local_addr);
    let without = |gone: usize| -> Vec<_> {
        let gone = all[gone];
        all.iter().copied().filter(|&at| at != gone).collect()
    };
    lab.apply_with(HOUR, &[(family.asked(), Protocol::Tcp, &all)]);
    let first = reach(family.asked(), &servers);
    for other in (0..40).filter(|&other| other != first) {
        lab.apply_with(HOUR, &[(family.asked(), Protocol::Tcp, &without(other))]);
        assert_eq!(reach(family.asked(), &servers), first);
    }
    lab.apply_with(HOUR, &[(family.asked(), Protocol::Tcp, &without(first))]);
    let second = reach(family.asked(), &servers);
    assert_ne!(second, first);
    lab.apply_with(HOUR, &[(family.asked(), Protocol::Tcp, &all)]);
    assert_eq!(reach(family.asked(), &servers), second);
}

/// Three pods, each with a TCP server at a port of its own for each of the service's two ports.
struct Pods {
    http: Vec<TcpListener>,
    admin: Vec<TcpListener>,
    dns: Vec<UdpSocket>,
}

impl Pods {
    fn new() -> Self {
        let addresses = [1, 2, 3].map(|pod| SocketAddr::from(([127, 0, 0, pod], 0)));
        let tcp = || addresses.map(|at| TcpListener::bind(at).unwrap()).into();
        Self {
            http: tcp(),
            admin: tcp(),
            dns: addresses.map(|at| UdpSocket::bind(at).unwrap()).into(),
        }
    }
}

#[test]
fn all_ports_of_a_service_lead_a_client_to_one_pod() {
    // Chance that 20 services agree by accident: 9⁻²⁰.
    const SERVICES: u8 = 20;
    let mut lab = Lab::new();
    let pods = Pods::new();
    let http = addresses(&pods.http, TcpListener::local_addr);
    let admin = addresses(&pods.admin, TcpListener::local_addr);
    let dns = addresses(&pods.dns, UdpSocket::local_addr);
    let service = |n: u8, port: u16| SocketAddr::from(([10, 96, 0, n], port));
    let of = |n| -> [(_, _, &[_]); 3] {
        [
            (service(n, 80), Protocol::Tcp, &http),
            (service(n, 8080), Protocol::Tcp, &admin),
            (service(n, 53), Protocol::Udp, &dns),
        ]
    };
    let services: Vec<_> = (0..SERVICES).flat_map(of).collect();
    lab.apply_with(HOUR, &services);
    let mut reached = BTreeSet::new();
    for n in 0..SERVICES {
        let pod = reach(service(n, 80), &pods.http);
        assert_eq!(reach(service(n, 8080), &pods.admin), pod);
        let client = FAMILIES[0].client();
        client.send_to(b"?", service(n, 53)).unwrap();
        assert_eq!(datagram(&pods.dns).0, pod);
        reached.insert(pod);
    }
    assert!(reached.len() > 1, "every service chose pod {reached:?}");
}

#[test]
fn a_port_that_the_pod_does_not_serve_spoils_no_other() {
    let mut lab = Lab::new();
    let pods = Pods::new();
    let http = addresses(&pods.http, TcpListener::local_addr);
    let admin = addresses(&pods.admin, TcpListener::local_addr);
    let family: &Family = &FAMILIES[0];
    let other_port = SocketAddr::new(family.asked().ip(), 8080);
    let serve = |lab: &mut Lab, admin: &[SocketAddr]| {
        let services: [(_, _, &[_]); 2] = [
            (family.asked(), Protocol::Tcp, &http),
            (other_port, Protocol::Tcp, admin),
        ];
        lab.apply_with(HOUR, &services);
    };
    serve(&mut lab, &[]);
    let pod = reach(family.asked(), &pods.http);
    let others: Vec<_> = (0..3).filter(|&other| other != pod).collect();
    serve(
        &mut lab,
        &others.iter().map(|&other| admin[other]).collect::<Vec<_>>(),
    );
    let other = reach(other_port, &pods.admin);
    assert_ne!(other, pod);
    for _ in 0..10 {
        assert_eq!(reach(family.asked(), &pods.http), pod);
        assert_eq!(reach(other_port, &pods.admin), other);
    }
}
