//! How TCP connects to endpoints end, as it is counted.

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use ebpf_abi::Counter;
use ebpf_loader::{Failures, Protocol};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, listen, socket_with};

use crate::lab::{FAMILIES, Family, Lab, PATIENCE, accepted, addresses, tcp_servers};

/// The kernel sends a SYN again after a second.
const SENT_AGAIN: Duration = Duration::from_secs(1);

/// What is counted of one endpoint.
fn failures(lab: &mut Lab, endpoint: SocketAddr) -> Option<(u64, u32)> {
    let failures = lab.services().failures().unwrap();
    let Failures { failed, in_a_row } = *failures.get(&endpoint)?;
    Some((failed, in_a_row))
}

/// An address at which nobody listens, for now.
fn closed(family: &Family) -> SocketAddr {
    let listener = TcpListener::bind(family.loopback).unwrap();
    listener.local_addr().unwrap()
}

fn connected(family: &Family) -> io::Result<()> {
    TcpStream::connect_timeout(&family.asked(), PATIENCE).map(drop)
}

/// Of a server that answers no SYN any more: its queue is full of clients that it never accepts.
fn deaf(family: &Family) -> (OwnedFd, Vec<TcpStream>) {
    let any: SocketAddr = family.loopback.parse().unwrap();
    let kind = if any.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let server = socket_with(kind, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    bind(&server, &any).unwrap();
    listen(&server, 0).unwrap();
    let at = local(&server);
    let waiting = |_| TcpStream::connect_timeout(&at, Duration::from_millis(300)).ok();
    let waiting = (0..4).map_while(waiting).collect();
    (server, waiting)
}

fn local(socket: &impl AsFd) -> SocketAddr {
    rustix::net::getsockname(socket)
        .unwrap()
        .try_into()
        .unwrap()
}

/// A connect under way.
fn begun(family: &Family) -> OwnedFd {
    let kind = if family.asked().is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let client = socket_with(kind, SocketType::STREAM, flags, None).unwrap();
    connect(&client, &family.asked()).unwrap_err();
    client
}

#[test]
fn a_reset_counts_until_a_connect_goes_well() {
    let mut lab = Lab::new();
    lab.services().watch_connects(true).unwrap();
    for family in &FAMILIES {
        let endpoint = closed(family);
        family.serve(&mut lab, Protocol::Tcp, &[endpoint]);
        for in_a_row in 1..4 {
            let error = connected(family).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
            let expected = (in_a_row.into(), in_a_row);
            assert_eq!(failures(&mut lab, endpoint), Some(expected));
        }
        // Who asks for the endpoint itself was not led there.
        TcpStream::connect(endpoint).unwrap_err();
        assert_eq!(failures(&mut lab, endpoint), Some((3, 3)));
        let server = TcpListener::bind(endpoint).unwrap();
        TcpStream::connect(endpoint).unwrap();
        assert_eq!(failures(&mut lab, endpoint), Some((3, 3)));
        connected(family).unwrap();
        assert_eq!(failures(&mut lab, endpoint), Some((3, 0)));
        drop(server);
        connected(family).unwrap_err();
        assert_eq!(failures(&mut lab, endpoint), Some((4, 1)));
        lab.services().forget_failures(endpoint).unwrap();
        lab.services().forget_failures(endpoint).unwrap();
        assert_eq!(failures(&mut lab, endpoint), None);
        lab.services().watch_connects(false).unwrap();
        connected(family).unwrap_err();
        assert_eq!(failures(&mut lab, endpoint), None);
        lab.services().watch_connects(true).unwrap();
        lab.services().watch_connects(true).unwrap();
    }
    let failed = lab.counted()(Counter::ConnectFailed);
    assert_eq!(failed, 4 * u64::try_from(FAMILIES.len()).unwrap());
}

#[test]
fn a_syn_without_an_answer_for_a_second_counts_once_and_one_given_up_before_does_not() {
    let mut lab = Lab::new();
    lab.services().watch_connects(true).unwrap();
    let family = &FAMILIES[0];
    let (server, _waiting) = deaf(family);
    let endpoint = local(&server);
    family.serve(&mut lab, Protocol::Tcp, &[endpoint]);
    drop(begun(family));
    assert_eq!(failures(&mut lab, endpoint), None);
    let client = begun(family);
    let began = Instant::now();
    while failures(&mut lab, endpoint).is_none() {
        assert!(began.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(20));
    }
    assert!(began.elapsed() >= SENT_AGAIN / 2);
    thread::sleep(3 * SENT_AGAIN); // It is sent again once more, at least.
    drop(client);
    assert_eq!(failures(&mut lab, endpoint), Some((1, 1)));
}

#[test]
fn connects_that_go_well_are_not_remembered() {
    let mut lab = Lab::new();
    lab.services().watch_connects(true).unwrap();
    for family in &FAMILIES {
        let servers = tcp_servers(family.loopback, 2);
        let at = addresses(&servers, TcpListener::local_addr);
        family.serve(&mut lab, Protocol::Tcp, &at);
        for _ in 0..8 {
            connected(family).unwrap();
            accepted(&servers);
        }
    }
    assert!(lab.services().failures().unwrap().is_empty());
}

/// How many connections are open to each of `at`.
fn open(lab: &mut Lab, at: &[SocketAddr]) -> Vec<u32> {
    let open = lab.services().open_connections().unwrap();
    assert!(
        open.keys().all(|endpoint| at.contains(endpoint)),
        "{open:?}"
    );
    let of = |endpoint| open.get(endpoint).copied().unwrap_or_default();
    at.iter().map(of).collect()
}

#[test]
fn connections_are_counted_by_endpoint_while_they_are_open() {
    let mut lab = Lab::new();
    for family in &FAMILIES {
        let servers = tcp_servers(family.loopback, 2);
        let at = addresses(&servers, TcpListener::local_addr);
        let connect = |lab: &mut Lab, to: &[SocketAddr], count| -> Vec<TcpStream> {
            family.serve(lab, Protocol::Tcp, to);
            let client = |_| TcpStream::connect(family.asked()).unwrap();
            (0..count).map(client).collect()
        };
        let mut first = connect(&mut lab, &at[..1], 5);
        let second = connect(&mut lab, &at[1..], 3);
        // Who asks for the endpoint itself was not led there.
        let direct = TcpStream::connect(at[0]).unwrap();
        family.serve(&mut lab, Protocol::Udp, &at[..1]);
        let datagrams = family.client(); // Remembered with the connections.
        datagrams.connect(family.asked()).unwrap();
        assert_eq!(open(&mut lab, &at), [5, 3], "{}", family.name);
        // A descriptor more is the same socket, and what the other end does is not its end.
        let again = first[0].try_clone().unwrap();
        first.truncate(1);
        assert_eq!(open(&mut lab, &at), [1, 3], "{}", family.name);
        drop((first, accepted(&servers)));
        assert_eq!(open(&mut lab, &at), [1, 3], "{}", family.name);
        drop((again, second, direct));
        assert_eq!(open(&mut lab, &at), [0, 0], "{}", family.name);
        // It ends with its last descriptor, whether it was answered or not.
        let deaf = closed(family);
        family.serve(&mut lab, Protocol::Tcp, &[deaf]);
        connected(family).unwrap_err();
        assert_eq!(open(&mut lab, &[deaf]), [0], "{}", family.name);
    }
}
