//! Connections that go past TCP: the rows of "Sockmap acceleration" in `docs/services.md`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use ebpf_abi::{
    Connection, Counter, Exchange, Peer, SOCKMAP_PAIRS_MAX, SOCKMAP_SETTLE_MS,
    SOCKMAP_UNANSWERED_MAX,
};
use ebpf_loader::{BPFFS, Clients, Frontend, Pins, Protocol, Services};
use rustix::{
    io::{Errno, ioctl_fionread},
    net::{AddressFamily, RecvFlags, SendFlags, SocketType, bind, connect, recv, send, socket},
    pipe::{SpliceFlags, pipe, splice},
};

use crate::{
    bpffs::new_bpffs,
    lab::{FAMILIES, Family, Lab, PATIENCE, addresses, exchange, tcp_servers},
    netns::new_network_namespace,
};

fn frontend(family: &Family) -> Frontend {
    let asked = family.asked();
    Frontend {
        clients: Clients::All,
        address: asked.ip().to_canonical(),
        port: asked.port(),
        protocol: Protocol::Tcp,
    }
}

/// A service with one endpoint, which asks for it.
fn served(lab: &mut Lab, family: &Family) -> TcpListener {
    let server = TcpListener::bind(family.loopback).unwrap();
    let at = server.local_addr().unwrap();
    family.serve(lab, Protocol::Tcp, &[at]);
    let wanted = BTreeSet::from([(frontend(family), at)]);
    assert_eq!(lab.services().use_sockmap(&wanted).unwrap(), 0);
    server
}

/// Both ends of a new connection.
fn connected(family: &Family, server: &TcpListener) -> (TcpStream, TcpStream) {
    let client = TcpStream::connect(family.asked()).unwrap();
    let (server, _) = server.accept().unwrap();
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
    }
    (client, server)
}

/// Until what is opened may go past TCP again.
fn settle() {
    thread::sleep(Duration::from_millis(2 * u64::from(SOCKMAP_SETTLE_MS)));
}

/// Of the test's loopback: each byte that a connection has sent by packets.
fn bytes_on_loopback() -> u64 {
    let devices = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = devices
        .lines()
        .find_map(|line| line.trim().strip_prefix("lo:"));
    line.unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .parse()
        .unwrap()
}

/// What `exchange` puts on the loopback.
fn by_packets(exchange: impl FnOnce()) -> u64 {
    let before = bytes_on_loopback();
    exchange();
    bytes_on_loopback() - before
}

fn big_exchange(mut one: &TcpStream, mut other: &TcpStream) {
    let asked = [7; 10_000];
    one.write_all(&asked).unwrap();
    let mut came = [0; 10_000];
    other.read_exact(&mut came).unwrap();
    assert_eq!(came, asked);
    other.write_all(&came).unwrap();
    one.read_exact(&mut came).unwrap();
    assert_eq!(came, asked);
}

#[test]
fn what_is_asked_and_answered_goes_past_the_packets_and_of_other_services_not() {
    for family in &FAMILIES {
        let mut lab = Lab::new();
        let server = served(&mut lab, family);
        let (client, accepted) = connected(family, &server);
        let packets = by_packets(|| {
            for _ in 0..20 {
                big_exchange(&client, &accepted);
            }
        });
        assert_eq!(packets, 0, "{}", family.name);
        assert_eq!(client.peer_addr().unwrap(), family.asked());
        let counted = lab.counted();
        assert_eq!(counted(Counter::SockmapJoined), 1, "{}", family.name);
        assert_eq!(counted(Counter::SockmapLeft), 0, "{}", family.name);

        let directly = TcpStream::connect(server.local_addr().unwrap()).unwrap();
        let (accepted, _) = server.accept().unwrap();
        let packets = by_packets(|| big_exchange(&directly, &accepted));
        assert!(packets > 20_000, "{}: {packets}", family.name);
        lab.services().use_sockmap(&BTreeSet::new()).unwrap();
        let (client, accepted) = connected(family, &server);
        let packets = by_packets(|| big_exchange(&client, &accepted));
        assert!(packets > 20_000, "{}: {packets}", family.name);
        assert_eq!(lab.counted()(Counter::SockmapJoined), 1, "{}", family.name);
    }
}

#[test]
fn connections_come_and_go_and_nothing_of_them_stays() {
    let mut lab = Lab::new();
    let family = &FAMILIES[0];
    let server = served(&mut lab, family);
    const CONNECTIONS: u64 = 2_000;
    for turn in 0..CONNECTIONS {
        let (client, accepted) = connected(family, &server);
        if turn % 2 == 0 {
            exchange(&client, &accepted);
        } else {
            exchange(&accepted, &client);
        }
        let (mut last, mut first) = match turn % 4 < 2 {
            true => (client, accepted),
            false => (accepted, client),
        };
        first.write_all(b"bye").unwrap();
        drop(first);
        let mut rest = Vec::new();
        last.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"bye", "{turn}");
    }
    assert_eq!(lab.counted()(Counter::SockmapJoined), CONNECTIONS);
    let began = Instant::now();
    while lab.map_entries::<Connection, Exchange>("hf_exchanges") > 0 {
        assert!(began.elapsed() < PATIENCE, "entries stay");
        thread::yield_now();
    }
}

/// Pseudo-random, so that each byte tells where it belongs.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn write_noise(mut to: &TcpStream, seed: u64, bytes: usize, message_max: u64) {
    let mut noise = Noise(seed);
    let mut sizes = Noise(seed + 1);
    let mut left = bytes;
    while left > 0 {
        let size = usize::try_from(sizes.next() % message_max + 1)
            .unwrap()
            .min(left);
        let message: Vec<u8> = (0..size).map(|_| noise.next().to_le_bytes()[3]).collect();
        to.write_all(&message).unwrap();
        left -= size;
    }
}

fn read_noise(mut from: &TcpStream, seed: u64, bytes: usize) {
    let mut noise = Noise(seed);
    let mut buffer = vec![0; 70_000];
    let mut read = 0;
    while read < bytes {
        let came = from.read(&mut buffer).unwrap();
        assert!(came > 0, "the stream ended after {read} bytes");
        for (place, byte) in buffer[..came].iter().enumerate() {
            assert_eq!(
                *byte,
                noise.next().to_le_bytes()[3],
                "byte {}",
                read + place
            );
        }
        read += came;
    }
}

#[test]
fn streams_both_ways_at_once_come_whole_and_in_order_whatever_way_they_go() {
    let mut lab = Lab::new();
    for family in &FAMILIES {
        let server = served(&mut lab, family);
        for message_max in [100, 3_000, 300_000] {
            const BYTES: usize = 4_000_000;
            let (client, accepted) = connected(family, &server);
            thread::scope(|scope| {
                scope.spawn(|| write_noise(&client, 1, BYTES, message_max));
                scope.spawn(|| write_noise(&accepted, 5, BYTES, message_max));
                scope.spawn(|| read_noise(&accepted, 1, BYTES));
                read_noise(&client, 5, BYTES);
            });
        }
    }
}

const MESSAGE: usize = 4_096;

/// Writes as long as somebody takes it. How much that was, and how much before the first packet.
fn fill(mut to: &TcpStream, mut next: impl FnMut() -> u8) -> (usize, usize) {
    to.set_nonblocking(true).unwrap();
    let mut written = 0;
    let mut past = 0;
    let mut message: Vec<u8> = (0..MESSAGE).map(|_| next()).collect();
    let before = bytes_on_loopback();
    loop {
        match to.write(&message) {
            Ok(took) => {
                written += took;
                message.drain(..took);
                message.extend((0..took).map(|_| next()));
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
        if bytes_on_loopback() == before {
            past = written;
        }
        assert!(
            written < 100_000_000,
            "nobody reads, and nobody has to wait"
        );
    }
    to.set_nonblocking(false).unwrap();
    (written, past)
}

#[test]
fn who_is_not_read_has_to_wait_and_all_of_it_comes_in_order() {
    let mut lab = Lab::new();
    let family = &FAMILIES[0];
    let server = served(&mut lab, family);
    for turned in [false, true] {
        let (client, accepted) = connected(family, &server);
        let (from, mut to) = if turned {
            (&accepted, &client)
        } else {
            (&client, &accepted)
        };
        let mut noise = Noise(9);
        let (written, past) = fill(from, || noise.next().to_le_bytes()[3]);
        assert_eq!(past, SOCKMAP_UNANSWERED_MAX as usize);
        assert!(written > past);
        read_noise(to, 9, written);
        let packets = by_packets(|| to.write_all(&[1; 1_000]).unwrap());
        assert_eq!(packets, 0, "the other direction is as it was");
    }
    assert_eq!(lab.counted()(Counter::SockmapLeft), 2);
}

#[test]
fn each_answer_renews_what_may_be_unread() {
    let mut lab = Lab::new();
    let family = &FAMILIES[0];
    let server = served(&mut lab, family);
    let (mut client, mut accepted) = connected(family, &server);
    let question = vec![3; SOCKMAP_UNANSWERED_MAX as usize];
    let mut came = question.clone();
    let packets = by_packets(|| {
        for _ in 0..50 {
            client.write_all(&question).unwrap();
            accepted.read_exact(&mut came).unwrap();
            accepted.write_all(b"!").unwrap();
            client.read_exact(&mut [0]).unwrap();
        }
    });
    assert_eq!(packets, 0);
    client.write_all(&question).unwrap();
    client.write_all(b"?").unwrap();
    assert_eq!(lab.counted()(Counter::SockmapLeft), 1);
    let packets = by_packets(|| client.write_all(&[1; 1_000]).unwrap());
    assert!(packets > 1_000, "{packets}");
}

#[test]
fn who_said_that_no_more_comes_writes_no_more_and_still_reads() {
    let mut lab = Lab::new();
    for family in &FAMILIES {
        let server = served(&mut lab, family);
        let (mut client, mut accepted) = connected(family, &server);
        client.write_all(b"all").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let error = client.write_all(b"more").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BrokenPipe, "{}", family.name);
        let mut came = Vec::new();
        accepted.read_to_end(&mut came).unwrap();
        assert_eq!(came, b"all", "{}", family.name);
        let packets = by_packets(|| accepted.write_all(&[2; 1_000]).unwrap());
        assert_eq!(packets, 0, "{}", family.name);
        drop(accepted);
        client.read_to_end(&mut came).unwrap();
        assert_eq!(came.len(), 1_003, "{}", family.name);
    }
}

#[test]
fn who_is_gone_is_told_as_by_tcp() {
    let mut lab = Lab::new();
    let family = &FAMILIES[0];
    let server = served(&mut lab, family);
    let (mut client, accepted) = connected(family, &server);
    exchange(&client, &accepted);
    drop(accepted);
    let began = Instant::now();
    let error = loop {
        assert!(
            began.elapsed() < PATIENCE,
            "nobody said that the server is gone"
        );
        if let Err(error) = client.write_all(b"?") {
            break error;
        }
    };
    let kinds = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];
    assert!(kinds.contains(&error.kind()), "{error}");
}

#[test]
fn after_a_change_of_policy_open_connections_go_by_packets_in_order_and_new_ones_past_them() {
    let mut lab = Lab::new();
    for family in &FAMILIES {
        let server = served(&mut lab, family);
        let (mut client, mut accepted) = connected(family, &server);
        client.write_all(b"first ").unwrap();
        accepted.write_all(b"one ").unwrap();
        lab.services().leave_sockmap().unwrap();
        let packets = by_packets(|| {
            client.write_all(b"second").unwrap();
            accepted.write_all(b"two").unwrap();
        });
        assert!(packets > 100, "{}: {packets}", family.name);
        let mut came = [0; 12];
        accepted.read_exact(&mut came).unwrap();
        assert_eq!(&came, b"first second", "{}", family.name);
        let mut came = [0; 7];
        client.read_exact(&mut came).unwrap();
        assert_eq!(&came, b"one two", "{}", family.name);
        let (client, accepted) = connected(family, &server);
        assert!(by_packets(|| big_exchange(&client, &accepted)) > 20_000);
        settle();
        let (client, accepted) = connected(family, &server);
        assert_eq!(by_packets(|| big_exchange(&client, &accepted)), 0);
    }
}

/// The same service, endpoint and ports of client and server in two namespaces: they differ in nothing but their
/// sequence numbers.
#[test]
fn connections_with_the_same_addresses_in_two_namespaces_are_not_mixed_up() {
    let mut lab = Lab::new();
    let family = &FAMILIES[0];
    let at: SocketAddr = "127.0.0.1:8080".parse().unwrap();
    let from: SocketAddr = "127.0.0.1:4444".parse().unwrap();
    family.serve(&mut lab, Protocol::Tcp, &[at]);
    let wanted = BTreeSet::from([(frontend(family), at)]);
    lab.services().use_sockmap(&wanted).unwrap();
    let one = move || {
        let server = TcpListener::bind(at).unwrap();
        let client = bound(from);
        connect(&client, &family.asked()).unwrap();
        let (accepted, peer) = server.accept().unwrap();
        assert_eq!(peer, from);
        (TcpStream::from(client), accepted)
    };
    let here = one();
    let there = thread::spawn(move || {
        new_network_namespace();
        one()
    });
    let there = there.join().unwrap();
    assert_eq!(lab.counted()(Counter::SockmapJoined), 2);
    for ((mut client, mut accepted), said) in [(here, b"here "), (there, b"there")] {
        client.write_all(said).unwrap();
        let mut came = [0; 5];
        accepted.set_read_timeout(Some(PATIENCE)).unwrap();
        accepted.read_exact(&mut came).unwrap();
        assert_eq!(&came, said);
    }
}

fn bound(at: SocketAddr) -> OwnedFd {
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&socket, &at).unwrap();
    socket
}

#[test]
fn what_has_no_room_in_the_map_stays_with_tcp() {
    let mut lab = Lab::new();
    let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
    let first = 1_000;
    let last = first + u16::try_from(SOCKMAP_PAIRS_MAX).unwrap() + 2;
    let wanted: BTreeSet<_> = (first..=last)
        .map(|port| (frontend(&FAMILIES[0]), at(port)))
        .collect();
    assert_eq!(lab.services().use_sockmap(&wanted).unwrap(), 3);
    assert_eq!(
        lab.map_entries::<Peer, u32>("hf_sockmap_for"),
        SOCKMAP_PAIRS_MAX as usize
    );
    let udp = Frontend {
        protocol: Protocol::Udp,
        ..frontend(&FAMILIES[0])
    };
    let wanted = BTreeSet::from([(udp, at(1))]);
    assert_eq!(lab.services().use_sockmap(&wanted).unwrap(), 1);
    assert_eq!(lab.map_entries::<Peer, u32>("hf_sockmap_for"), 0);
}

#[test]
fn what_is_open_goes_on_while_nobody_runs_and_by_packets_once_all_is_removed() {
    let mut lab = Lab::new();
    drop(lab.take_services());
    new_bpffs();
    let pins = || Pins::open(Path::new(BPFFS), lab.cgroup()).unwrap();
    let take_over = || Services::take_over(lab.cgroup(), Some(pins()), false).unwrap();
    let family = &FAMILIES[0];
    let servers = tcp_servers(family.loopback, 1);
    let at = addresses(&servers, TcpListener::local_addr);
    let wanted = BTreeSet::from([(frontend(family), at[0])]);
    let desired = BTreeMap::from([(frontend(family), at.into())]);
    let start = || {
        let mut services = take_over();
        services.apply(&desired).unwrap();
        services.use_sockmap(&wanted).unwrap();
        services.attach().unwrap();
        services
    };
    let open = || connected(family, &servers[0]);
    let past = |(client, accepted): &(TcpStream, TcpStream)| {
        assert_eq!(by_packets(|| big_exchange(client, accepted)), 0);
    };
    let first = start();
    let one = open();
    past(&one);
    drop(first);
    past(&one);
    let two = open();
    past(&two);
    let mut second = start();
    let three = open();
    [&one, &two, &three].into_iter().for_each(past);
    second.leave_sockmap().unwrap();
    settle();
    let four = open();
    past(&four);
    for (client, accepted) in [&one, &two, &three] {
        assert!(by_packets(|| big_exchange(client, accepted)) > 20_000);
    }
    drop(second);
    (&four.0).write_all(b"unread").unwrap();
    let problems = pins().remove();
    assert!(problems.is_empty(), "{problems:?}");
    let mut came = [0; 6];
    (&four.1).read_exact(&mut came).unwrap();
    assert_eq!(&came, b"unread");
    assert!(by_packets(|| big_exchange(&four.0, &four.1)) > 20_000);
}

/// What applications give up: the table in `docs/services.md`. A kernel that mends one of these fails this test.
#[test]
fn what_does_not_work_past_tcp_is_what_the_documentation_says() {
    let mut lab = Lab::new();
    let family = &FAMILIES[0];
    let server = served(&mut lab, family);
    let (mut client, mut accepted) = connected(family, &server);
    client.write_all(&[1; 100]).unwrap();
    assert_eq!(
        ioctl_fionread(&accepted).unwrap(),
        100,
        "FIONREAD of what came past TCP"
    );
    let (_read, write) = pipe().unwrap();
    accepted.set_nonblocking(true).unwrap(); // Else it waits.
    let moved = splice(&accepted, None, &write, None, 100, SpliceFlags::NONBLOCK);
    assert_eq!(moved, Err(Errno::AGAIN), "splice of what came past TCP");
    accepted.set_nonblocking(false).unwrap();
    accepted.read_exact(&mut [0; 100]).unwrap();
    send(&client, b"!", SendFlags::OOB).unwrap();
    let (came, _) = recv(&accepted, &mut [0; 1][..], RecvFlags::empty()).unwrap();
    assert_eq!(came, 1, "urgent data are in the stream");
    client.write_all(&[1; 10]).unwrap();
    let (came, _) = recv(&accepted, &mut [0; 20][..], RecvFlags::WAITALL).unwrap();
    assert_eq!(came, 10, "MSG_WAITALL does not wait");

    let (mut client, mut accepted) = connected(family, &server);
    client.write_all(b"unread").unwrap();
    accepted.write_all(b"answer").unwrap();
    drop(accepted);
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"answer", "an end instead of a reset");

    let (client, _accepted) = connected(family, &server);
    let woken = thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let began = Instant::now();
            ((&client).read(&mut [0]), began.elapsed())
        });
        // Once the reader waits.
        thread::sleep(Duration::from_millis(200));
        client.shutdown(Shutdown::Write).unwrap();
        reader.join().unwrap()
    });
    let (Err(error), waited) = woken else {
        panic!("{woken:?}");
    };
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    assert!(waited < PATIENCE / 2, "it waited for {waited:?}");

    let (mut client, accepted) = connected(family, &server);
    lab.services().leave_sockmap().unwrap();
    client.write_all(&[1; 100]).unwrap();
    accepted.peek(&mut [0]).unwrap();
    assert_eq!(
        ioctl_fionread(&accepted).unwrap(),
        0,
        "FIONREAD of what came by TCP after all"
    );
}
