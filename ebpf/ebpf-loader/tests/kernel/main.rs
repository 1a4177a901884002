//! The programs on the real kernel: sockets on loopback in a network namespace of their own, in a
//! cgroup of their own. Needs root.

#[cfg(test)]
mod affinity;
#[cfg(test)]
#[path = "../common/bpffs.rs"]
mod bpffs;
#[cfg(test)]
mod changes;
#[cfg(test)]
mod coexistence;
#[cfg(test)]
mod connected;
#[cfg(test)]
mod connects;
#[cfg(test)]
mod differential;
#[cfg(test)]
mod kept;
#[cfg(test)]
#[path = "../common/kube_proxy.rs"]
mod kube_proxy;
#[cfg(test)]
mod lab;
#[cfg(test)]
#[path = "../common/netns.rs"]
mod netns;
#[cfg(test)]
mod selection;
#[cfg(test)]
mod sockmap;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use aya::programs::loaded_programs;
use ebpf_abi::{Counter, FLOWS_MAX, SocketAddress};
use ebpf_loader::{Backends, Clients, Frontend, LoadError, Protocol, Services};
use rustix::{
    net::{AddressFamily, SocketType, connect, socket, sockopt::socket_cookie},
    thread::CapabilitySet,
};

use crate::lab::{
    FAMILIES, Lab, PATIENCE, accepted, addresses, ask, ask_connected, connect_times, datagram,
    own_bpf_objects, tcp_servers, udp_servers,
};

/// Chance of missing one of three endpoints in 60 tries: below 10⁻¹⁰.
const TRIES: usize = 60;

#[test]
fn tcp_reaches_every_endpoint_and_shows_the_service() {
    for family in &FAMILIES {
        let mut lab = Lab::new();
        let servers = tcp_servers(family.loopback, 3);
        family.serve(
            &mut lab,
            Protocol::Tcp,
            &addresses(&servers, TcpListener::local_addr),
        );
        let mut reached = [0; 3];
        for _ in 0..TRIES {
            let client = TcpStream::connect(family.asked()).unwrap();
            let (server, accepted) = accepted(&servers);
            assert_eq!(
                client.peer_addr().unwrap(),
                family.asked(),
                "{}",
                family.name
            );
            assert_eq!(
                accepted.peer_addr().unwrap().port(),
                client.local_addr().unwrap().port()
            );
            reached[server] += 1;
        }
        assert!(
            reached.iter().all(|&count| count > 0),
            "{}: {reached:?}",
            family.name
        );
        let counted = lab.counted();
        assert_eq!(counted(Counter::ConnectRewritten), TRIES as u64);
        assert_eq!(counted(Counter::PeerNameRewritten), TRIES as u64);
        assert_eq!(counted(Counter::NotRemembered), 0);
    }
}

/// Cookies are given out a few thousand at a time to each processor.
const COOKIES_TRIED: usize = 64 * ebpf_abi::PEER_PLACES_MAX as usize;

/// A socket whose number has the same place as that of `other`, if one is found.
fn socket_at_the_place_of(other: impl AsFd, kind: SocketType) -> io::Result<Option<OwnedFd>> {
    let place = |cookie: u64| cookie % u64::from(ebpf_abi::PEER_PLACES_MAX);
    let wanted = place(socket_cookie(other)?);
    for _ in 0..COOKIES_TRIED {
        let socket = socket(AddressFamily::INET, kind, None)?;
        if place(socket_cookie(&socket)?) == wanted {
            return Ok(Some(socket));
        }
    }
    Ok(None)
}

#[test]
fn two_sockets_at_one_place_both_show_the_service() {
    let mut lab = Lab::new();
    let family = &FAMILIES[0];
    let servers = tcp_servers(family.loopback, 1);
    let at = addresses(&servers, TcpListener::local_addr);
    family.serve(&mut lab, Protocol::Tcp, &at);
    let first = TcpStream::connect(family.asked()).unwrap();
    let second = socket_at_the_place_of(&first, SocketType::STREAM)
        .unwrap()
        .unwrap();
    connect(&second, &family.asked()).unwrap();
    let second = TcpStream::from(second);
    assert_eq!(second.peer_addr().unwrap(), family.asked());
    assert_eq!(first.peer_addr().unwrap(), family.asked());
    let open = || lab.places_taken();
    assert_eq!(open(), 1);
    drop(first);
    assert_eq!(open(), 0);
    let third = socket_at_the_place_of(&second, SocketType::STREAM)
        .unwrap()
        .unwrap();
    connect(&third, &family.asked()).unwrap();
    assert_eq!(open(), 1);
    assert_eq!(second.peer_addr().unwrap(), family.asked());
    assert_eq!(TcpStream::from(third).peer_addr().unwrap(), family.asked());
    assert_eq!(open(), 0);
    assert_eq!(lab.counted()(Counter::NotRemembered), 0);
}

#[test]
fn two_udp_sockets_at_one_place_both_show_the_service_until_they_are_connected_elsewhere() {
    let mut lab = Lab::new();
    let family = &FAMILIES[0];
    let servers = udp_servers(family.loopback, 1);
    let at = addresses(&servers, UdpSocket::local_addr);
    family.serve(&mut lab, Protocol::Udp, &at);
    let first = family.client();
    first.connect(family.asked()).unwrap();
    let second = socket_at_the_place_of(&first, SocketType::DGRAM);
    let second = UdpSocket::from(second.unwrap().unwrap());
    second.set_read_timeout(Some(PATIENCE)).unwrap();
    second.connect(family.asked()).unwrap();
    assert_eq!(lab.places_taken(), 1);
    for client in [&first, &second] {
        assert_eq!(ask_connected(client, &servers), (0, family.asked()));
        assert_eq!(client.peer_addr().unwrap(), family.asked());
    }
    assert_eq!(lab.services().connected().unwrap().len(), 2);
    drop(first);
    assert_eq!(lab.places_taken(), 0);
    // Where it was remembered first says nothing of where it is now.
    second.connect(family.asked()).unwrap();
    assert_eq!(lab.places_taken(), 1);
    assert_eq!(second.peer_addr().unwrap(), family.asked());
    second.connect(at[0]).unwrap();
    assert_eq!(second.peer_addr().unwrap(), at[0]);
    assert_eq!(ask_connected(&second, &servers), (0, at[0]));
    drop(second);
    assert_eq!(lab.places_taken(), 0);
    assert_eq!(lab.counted()(Counter::NotRemembered), 0);
}

#[test]
fn connected_udp_stays_with_one_endpoint_and_shows_the_service() {
    for family in &FAMILIES {
        let mut lab = Lab::new();
        let servers = udp_servers(family.loopback, 3);
        family.serve(
            &mut lab,
            Protocol::Udp,
            &addresses(&servers, UdpSocket::local_addr),
        );
        let mut reached = BTreeSet::new();
        for _ in 0..TRIES {
            let client = family.client();
            client.connect(family.asked()).unwrap();
            assert_eq!(
                client.peer_addr().unwrap(),
                family.asked(),
                "{}",
                family.name
            );
            let ask = || {
                let (server, shown) = ask_connected(&client, &servers);
                assert_eq!(shown, family.asked(), "{}", family.name);
                server
            };
            let first = ask();
            assert_eq!(ask(), first, "{}: a connected socket moved", family.name);
            reached.insert(first);
        }
        assert_eq!(reached.len(), 3, "{}", family.name);
    }
}

#[test]
fn unconnected_udp_keeps_its_endpoint_and_shows_the_service() {
    for family in &FAMILIES {
        let mut lab = Lab::new();
        let servers = udp_servers(family.loopback, 3);
        family.serve(
            &mut lab,
            Protocol::Udp,
            &addresses(&servers, UdpSocket::local_addr),
        );
        let mut reached = BTreeSet::new();
        for _ in 0..TRIES {
            let client = family.client();
            let first = ask(&client, family, &servers);
            assert_eq!(
                ask(&client, family, &servers),
                first,
                "{}: a flow moved",
                family.name
            );
            reached.insert(first);
        }
        assert_eq!(reached.len(), 3, "{}", family.name);
        assert_eq!(lab.counted()(Counter::ReceiveRewritten), 2 * TRIES as u64);
    }
}

#[test]
fn an_unconnected_flow_moves_only_when_its_endpoint_is_gone() {
    for family in &FAMILIES {
        let mut lab = Lab::new();
        let servers = udp_servers(family.loopback, 40);
        let all = addresses(&servers, UdpSocket::local_addr);
        family.serve(&mut lab, Protocol::Udp, &all);
        let client = family.client();
        let mut at = ask(&client, family, &servers);
        for round in 0..30 {
            // The list changes around the endpoint: another order, others gone.
            let others = all.iter().copied().filter(|&other| other != all[at]);
            let kept: Vec<_> = others.take(round).chain([all[at]]).collect();
            family.serve(&mut lab, Protocol::Udp, &kept);
            assert_eq!(ask(&client, family, &servers), at, "{}", family.name);
        }
        assert_eq!(lab.counted()(Counter::FlowMoved), 0);
        let rest: Vec<_> = all
            .iter()
            .copied()
            .filter(|&other| other != all[at])
            .collect();
        family.serve(&mut lab, Protocol::Udp, &rest);
        let moved = ask(&client, family, &servers);
        assert_ne!(moved, at, "{}", family.name);
        at = moved;
        assert_eq!(ask(&client, family, &servers), at, "{}", family.name);
        assert_eq!(lab.counted()(Counter::FlowMoved), 1);
    }
}

#[test]
fn one_socket_speaks_with_many_services_and_with_none() {
    let mut lab = Lab::new();
    let servers = udp_servers("127.0.0.1:0", 3);
    let at = addresses(&servers, UdpSocket::local_addr);
    let [dns, ntp] = ["10.96.0.10:53", "10.96.0.11:123"].map(|text| text.parse().unwrap());
    lab.apply(&[
        (dns, Protocol::Udp, &at[..1]),
        (ntp, Protocol::Udp, &at[1..2]),
    ]);
    let client = FAMILIES[0].client();
    for _ in 0..3 {
        for (asked, expected) in [(dns, 0), (ntp, 1), (at[2], 2)] {
            client.send_to(b"?", asked).unwrap();
            let (server, from) = datagram(&servers);
            assert_eq!(server, expected);
            servers[server].send_to(b"!", from).unwrap();
            assert_eq!(client.recv_from(&mut [0; 8]).unwrap().1, asked);
        }
    }
}

#[test]
fn a_socket_connected_to_a_service_and_then_to_its_endpoint_shows_the_endpoint() {
    let mut lab = Lab::new();
    let family = &FAMILIES[0];
    let servers = udp_servers(family.loopback, 1);
    let at = addresses(&servers, UdpSocket::local_addr);
    family.serve(&mut lab, Protocol::Udp, &at);
    let client = family.client();
    client.connect(family.asked()).unwrap();
    assert_eq!(client.peer_addr().unwrap(), family.asked());
    client.connect(at[0]).unwrap();
    assert_eq!(client.peer_addr().unwrap(), at[0]);
}

#[test]
fn a_service_without_endpoints_refuses_at_once() {
    for family in &FAMILIES {
        let mut lab = Lab::new();
        lab.apply(&[
            (family.asked(), Protocol::Tcp, &[]),
            (family.asked(), Protocol::Udp, &[]),
        ]);
        let refused = |what: &str, result: io::Result<()>| {
            let kind = result.unwrap_err().kind();
            assert_eq!(
                kind,
                io::ErrorKind::ConnectionRefused,
                "{} {what}",
                family.name
            );
        };
        let began = Instant::now();
        refused("TCP connect", TcpStream::connect(family.asked()).map(drop));
        let client = family.client();
        refused("UDP connect", client.connect(family.asked()));
        refused("UDP send", client.send_to(b"?", family.asked()).map(drop));
        assert!(
            began.elapsed() < Duration::from_secs(1),
            "{:?}",
            began.elapsed()
        );
        let counted = lab.counted();
        assert_eq!(
            (
                counted(Counter::ConnectRefused),
                counted(Counter::SendRefused)
            ),
            (2, 1)
        );
    }
}

#[test]
fn other_addresses_ports_and_protocols_pass_untouched() {
    let mut lab = Lab::new();
    let server = tcp_servers("127.0.0.1:0", 1);
    let at = addresses(&server, TcpListener::local_addr);
    // A service at the server's own address: another port, the other protocol.
    let other_port = SocketAddr::new(at[0].ip(), at[0].port() ^ 1);
    lab.apply(&[
        (other_port, Protocol::Tcp, &[]),
        (at[0], Protocol::Udp, &[]),
    ]);
    let client = TcpStream::connect(at[0]).unwrap();
    assert_eq!(client.peer_addr().unwrap(), at[0]);
    accepted(&server);
    let counted = lab.counted();
    assert_eq!(
        (
            counted(Counter::ConnectPassed),
            counted(Counter::ConnectRewritten)
        ),
        (1, 0)
    );
}

#[test]
fn new_endpoints_are_for_new_flows_only() {
    for family in &FAMILIES {
        let mut lab = Lab::new();
        let tcp = tcp_servers(family.loopback, 2);
        let udp = udp_servers(family.loopback, 2);
        let tcp_at = addresses(&tcp, TcpListener::local_addr);
        let udp_at = addresses(&udp, UdpSocket::local_addr);
        let asked = family.asked();
        let mut serve = |n: usize| {
            lab.apply(&[
                (asked, Protocol::Tcp, &tcp_at[n..=n]),
                (asked, Protocol::Udp, &udp_at[n..=n]),
            ]);
        };
        serve(0);
        let open_tcp = TcpStream::connect(asked).unwrap();
        let (_, accepted_tcp) = accepted(&tcp);
        let open_udp = family.client();
        open_udp.connect(asked).unwrap();
        serve(1);
        lab::exchange(&open_tcp, &accepted_tcp);
        assert_eq!(open_tcp.peer_addr().unwrap(), asked, "{}", family.name);
        open_udp.send(b"?").unwrap();
        assert_eq!(datagram(&udp).0, 0, "{}: an open flow moved", family.name);
        let _new_tcp = TcpStream::connect(asked).unwrap();
        assert_eq!(accepted(&tcp).0, 1, "{}", family.name);
        let new_udp = family.client();
        new_udp.connect(asked).unwrap();
        new_udp.send(b"?").unwrap();
        assert_eq!(datagram(&udp).0, 1, "{}", family.name);
    }
}

/// No hook sees a `send` on a connected socket, so that it cannot be moved.
#[test]
fn a_connected_udp_socket_hears_that_its_endpoint_is_gone_and_connects_again() {
    for family in &FAMILIES {
        let mut lab = Lab::new();
        let mut servers = udp_servers(family.loopback, 2);
        let at = addresses(&servers, UdpSocket::local_addr);
        family.serve(&mut lab, Protocol::Udp, &at[..1]);
        let client = family.client();
        client.connect(family.asked()).unwrap();
        drop(servers.remove(0));
        family.serve(&mut lab, Protocol::Udp, &at[1..]);
        client.send(b"?").unwrap();
        let heard = client.recv(&mut [0; 8]).unwrap_err().kind();
        assert_eq!(heard, io::ErrorKind::ConnectionRefused, "{}", family.name);
        client.connect(family.asked()).unwrap();
        client.send(b"?").unwrap();
        assert_eq!(datagram(&servers).0, 0);
    }
}

#[test]
fn a_list_is_replaced_without_a_moment_of_refusal() {
    let mut lab = Lab::new();
    let family = &FAMILIES[0];
    let servers = udp_servers(family.loopback, 4);
    let at = addresses(&servers, UdpSocket::local_addr);
    family.serve(&mut lab, Protocol::Udp, &at[..2]);
    let done = AtomicBool::new(false);
    let connects = thread::scope(|scope| {
        let connecting = scope.spawn(|| {
            let client = family.client();
            let mut connects = 0_u64;
            while !done.load(Ordering::Relaxed) {
                client.connect(family.asked()).unwrap();
                connects += 1;
            }
            connects
        });
        for round in 0..5_000 {
            let from = round % 3;
            family.serve(&mut lab, Protocol::Udp, &at[from..from + 2]);
        }
        done.store(true, Ordering::Relaxed);
        connecting.join().unwrap()
    });
    let counted = lab.counted();
    assert_eq!(counted(Counter::ConnectRewritten), connects);
    let again = counted(Counter::ReadAgain);
    println!("{connects} connects during 5,000 replacements, {again} read the list again");
}

#[test]
fn ten_thousand_services_fill_quickly_and_change_by_difference() {
    let mut lab = Lab::new();
    let servers = tcp_servers("127.0.0.1:0", 1);
    let at = addresses(&servers, TcpListener::local_addr);
    let service = |n: u16| {
        let [high, low] = n.to_be_bytes();
        Frontend {
            clients: Clients::All,
            address: IpAddr::from([10, 96, high, low]),
            port: 80,
            protocol: Protocol::Tcp,
        }
    };
    let asked = SocketAddr::new(service(0).address, 80);
    drop(lab.take_services());
    let [without] = connect_times(&servers[0], [at[0]]);
    lab.load();
    let empty_kib = lab::map_memory_bytes() / 1_024;
    let mut desired = BTreeMap::from([(service(0), Backends::from(at.clone()))]);
    lab.services().apply(&desired).unwrap();
    let [direct_1, service_1] = connect_times(&servers[0], [at[0], asked]);

    let endpoint = |n: u16| SocketAddr::from(([127, 0, 0, 1], 1_000 + n));
    let endpoints: Vec<_> = (0..25).map(endpoint).collect();
    desired.extend((1..10_000).map(|n| (service(n), endpoints.clone().into())));
    let began = Instant::now();
    let report = lab.services().apply(&desired).unwrap();
    let filled = began.elapsed();
    assert_eq!(
        (report.written, report.unchanged, report.left_out),
        (9_999, 1, <_>::default())
    );
    let [direct_many, service_many] = connect_times(&servers[0], [at[0], asked]);
    let memory_kib = lab::map_memory_bytes() / 1_024;

    desired.insert(service(5_000), vec![endpoint(0)].into());
    let began = Instant::now();
    let report = lab.services().apply(&desired).unwrap();
    let changed = began.elapsed();
    assert_eq!(
        (report.written, report.removed, report.unchanged),
        (1, 0, 9_999)
    );
    println!(
        "10,000 services, 249,976 endpoints: filled in {filled:?}, one service changed in \
         {changed:?}, maps take {memory_kib} KiB ({empty_kib} KiB empty)\n\
         median connect: without programs {without:?}; not a service and a service, \
         1: {direct_1:?} {service_1:?}, 10,000: {direct_many:?} {service_many:?}"
    );
    assert!(memory_kib <= 128 * 1_024, "the maps take {memory_kib} KiB");
    // 1.1 here. Looking through services one by one would be far beyond.
    assert!(
        service_many < 2 * direct_many,
        "{service_many:?} against {direct_many:?}"
    );
    assert_eq!(
        lab.services().apply(&BTreeMap::new()).unwrap().removed,
        10_000
    );
    assert_eq!(lab.map_entries::<u64, SocketAddress>("hf_endpoints"), 0);
    assert_eq!(lab.map_entries::<SocketAddress, u64>("hf_frontends"), 0);
}

#[test]
fn beyond_the_limit_the_first_endpoints_are_kept() {
    let mut lab = Lab::new();
    let endpoint = |n: u16| SocketAddr::from(([127, 0, 0, 1], n));
    let list: Vec<SocketAddr> = (1..=5_000).map(endpoint).collect();
    let service = |n: u8| SocketAddr::from(([10, 96, 0, n], 80));
    let services: Vec<_> = (0..64)
        .map(|n| (service(n), Protocol::Tcp, &list[..]))
        .collect();
    let report = lab.apply(&services);
    // 63 lists of 4,096 are all that fits: the last frontend finds no room.
    assert_eq!((report.written, report.left_out.frontends), (63, 1));
    assert_eq!(report.left_out.endpoints, 63 * (5_000 - 4_096) + 5_000);
    assert_eq!(
        lab.map_entries::<u64, SocketAddress>("hf_endpoints"),
        63 * 4_096
    );
    // Full, and yet a whole list can be replaced.
    let shifted: Vec<SocketAddr> = (2..=5_001).map(endpoint).collect();
    let services: Vec<_> = (0..64)
        .map(|n| (service(n), Protocol::Tcp, &shifted[..]))
        .collect();
    assert_eq!(lab.apply(&services).written, 63);
    assert_eq!(
        lab.map_entries::<u64, SocketAddress>("hf_endpoints"),
        63 * 4_096
    );
}

#[test]
fn a_socket_with_more_flows_than_are_remembered_is_served_all_the_same() {
    let mut lab = Lab::new();
    let servers = udp_servers("0.0.0.0:0", 1);
    let port = servers[0].local_addr().unwrap().port();
    // Each service has an endpoint of its own; one server has them all.
    let flows = u16::try_from(FLOWS_MAX).unwrap() + 4_000;
    let address = |net: u8, n: u16| {
        let [high, low] = n.to_be_bytes();
        IpAddr::from([net, 0, high, low])
    };
    let service = |n| Frontend {
        clients: Clients::All,
        address: address(10, n),
        port: 53,
        protocol: Protocol::Udp,
    };
    let endpoint = |n| SocketAddr::new(address(127, n), port);
    let desired = (1..=flows)
        .map(|n| (service(n), vec![endpoint(n)].into()))
        .collect();
    lab.services().apply(&desired).unwrap();
    let client = FAMILIES[0].client();
    for n in (1..=flows).rev().chain([1, flows]) {
        let asked = SocketAddr::new(service(n).address, 53);
        client.send_to(b"?", asked).unwrap();
        let (_, from) = datagram(&servers);
        // A server on all addresses answers a loopback client from 127.0.0.1.
        if n == 1 {
            servers[0].send_to(b"!", from).unwrap();
            assert_eq!(client.recv_from(&mut [0; 8]).unwrap().1, asked);
        }
    }
    let counted = lab.counted();
    assert_eq!(counted(Counter::SendRewritten), u64::from(flows) + 2);
    assert_eq!(counted(Counter::NotRemembered), 0);
}

#[test]
fn dropping_it_leaves_nothing_in_the_kernel() {
    let mut lab = Lab::new();
    let family = &FAMILIES[0];
    let servers = tcp_servers(family.loopback, 1);
    family.serve(
        &mut lab,
        Protocol::Tcp,
        &addresses(&servers, TcpListener::local_addr),
    );
    drop(TcpStream::connect(family.asked()).unwrap());
    let ids = lab::own_bpf_objects();
    assert_eq!((ids.programs.len(), ids.links.len()), (12, 9), "{ids:?}");
    assert!(ids.maps.len() >= 6, "{ids:?}");
    drop(lab.take_services());
    ids.wait_until_gone();
}

#[test]
fn two_loaders_share_a_cgroup() {
    let mut lab = Lab::new();
    let family = &FAMILIES[0];
    let servers = tcp_servers(family.loopback, 1);
    let at = addresses(&servers, TcpListener::local_addr);
    family.serve(&mut lab, Protocol::Tcp, &at);
    let second = Services::load(lab.cgroup()).unwrap();
    drop(TcpStream::connect(family.asked()).unwrap());
    assert_eq!(accepted(&servers).0, 0);
    drop(second);
    drop(TcpStream::connect(family.asked()).unwrap());
    assert_eq!(accepted(&servers).0, 0);
}

#[test]
fn outside_the_cgroup_nothing_changes() {
    let lab = Lab::new();
    let outside = lab.outside();
    let mut services = Services::load(outside).unwrap();
    let family = &FAMILIES[0];
    let servers = tcp_servers(family.loopback, 1);
    let at = addresses(&servers, TcpListener::local_addr);
    let frontend = Frontend {
        clients: Clients::All,
        address: at[0].ip(),
        port: at[0].port(),
        protocol: Protocol::Tcp,
    };
    services
        .apply(&BTreeMap::from([(frontend, Backends::default())]))
        .unwrap();
    // Refused if the programs saw it.
    drop(TcpStream::connect(at[0]).unwrap());
    accepted(&servers);
    drop(services);
}

#[test]
fn a_folder_that_is_no_cgroup_is_said_so() {
    let _lab = Lab::new();
    let error = Services::load("/proc".as_ref()).unwrap_err();
    assert!(matches!(error, LoadError::Cgroup(_)), "{error:?}");
    assert!(
        error
            .to_string()
            .starts_with("/proc is not a cgroup of version 2"),
        "{error}"
    );
}

#[test]
fn without_capabilities_the_error_says_so() {
    let lab = Lab::new();
    let error = lab.load_with(CapabilitySet::empty()).unwrap_err();
    assert!(matches!(error, LoadError::NotPermitted), "{error:?}");
}

#[test]
fn the_capabilities_that_the_error_names_are_enough() {
    let lab = Lab::new();
    lab.load_with(CapabilitySet::BPF | CapabilitySet::NET_ADMIN)
        .unwrap();
}

/// A tenth more than what the verifier looks at of each program at sockets, as clang 14 compiles it.
const VERIFIED_INSTRUCTIONS_MAX: [(&str, u32); 12] = [
    ("hf_connect4", 8_570),
    ("hf_connect6", 8_580),
    ("hf_sendmsg4", 11_100),
    ("hf_sendmsg6", 11_100),
    ("hf_recvmsg4", 179),
    ("hf_recvmsg6", 204),
    ("hf_getpeername4", 115),
    ("hf_getpeername6", 134),
    ("hf_sock_ops", 322),
    ("hf_sock_release", 38),
    ("hf_sockmap_join", 540),
    ("hf_sockmap_pass", 152),
];

#[test]
fn the_verifier_s_work_at_sockets_does_not_grow() {
    let lab = Lab::new();
    let own = own_bpf_objects().programs;
    let loaded = loaded_programs().flatten();
    let verified: BTreeMap<_, _> = loaded
        .filter(|program| own.contains(&program.id()))
        .map(|program| {
            let name = program.name_as_str().unwrap().to_owned();
            (name, program.verified_instruction_count().unwrap())
        })
        .collect();
    drop(lab);
    println!("{verified:?}");
    let names: Vec<_> = verified.keys().map(String::as_str).collect();
    let mut expected = VERIFIED_INSTRUCTIONS_MAX.map(|(name, _)| name);
    expected.sort_unstable();
    assert_eq!(names, expected);
    for (name, most) in VERIFIED_INSTRUCTIONS_MAX {
        assert!(verified[name] <= most, "{name}: {verified:?}");
    }
}
