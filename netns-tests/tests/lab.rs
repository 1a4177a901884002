//! The lab's own proof: its NATs, links, firewalls and its cleaning up are what they claim.

use std::{
    fs,
    io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    lab::{Lab, cgroup_mount},
    link::{Impairment, Link},
    nat::{Ipv6Kind, NatKind},
    probe::{self, Behaviour, DependsOn},
    site::{Internet, Site},
    tool,
};
use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery};

/// A command that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(5);

const ONE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const TWO: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
const WAN: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const LEFT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const RIGHT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

const ONE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 1);
const TWO_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 2, 0, 0, 0, 1);
const PREFIX: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 1, 0, 0, 0, 0);

fn check_nat(kind: NatKind, mapping: DependsOn, filtering: DependsOn) -> Result<()> {
    let lab = Lab::new()?;
    let one = lab.public_node("one", ONE)?;
    let two = lab.public_node("two", TWO)?;
    let site = lab.site("s", kind, WAN, Impairment::NONE)?;
    // The second host's translation is not the identity.
    for name in ["first", "second"] {
        let host = site.host(&lab, name)?;
        let found = probe::behaviour(&host, (&one, ONE.into()), (&two, TWO.into()))?;
        ensure!(
            found == Behaviour { mapping, filtering },
            "{name} behind {kind:?}: {found:?}"
        );
    }
    Ok(())
}

/// Two public nodes with both families, and a site with these.
fn dual(internet: Internet) -> Result<(Lab, Site)> {
    let lab = Lab::new()?;
    for (name, v4, v6) in [("one", ONE, ONE_V6), ("two", TWO, TWO_V6)] {
        let node = lab.public_node(name, v4)?;
        lab.add_ipv6(&node, v6)?;
    }
    let site = lab.site_with("s", internet, Impairment::NONE)?;
    Ok((lab, site))
}

fn check_ipv6(kind: Ipv6Kind, filtering: DependsOn) -> Result<()> {
    let (lab, site) = dual(Internet::ipv6(kind, PREFIX))?;
    let (one, two) = (lab.node("one")?, lab.node("two")?);
    let host = site.host(&lab, "host")?;
    let found = probe::behaviour(&host, (&one, ONE_V6.into()), (&two, TWO_V6.into()))?;
    let mapping = DependsOn::Nothing;
    ensure!(found == Behaviour { mapping, filtering }, "{found:?}");
    // Nobody translates: the host's own address and port are what the world sees.
    let [server, socket] = [
        probe::bind(&one, ONE_V6)?,
        probe::bind(&host, Ipv6Addr::UNSPECIFIED)?,
    ];
    socket.send_to(b"x", server.local_addr()?)?;
    let (_, outer) = recv(&server)?;
    let own = SocketAddr::new("2001:db8:1:1::b".parse()?, socket.local_addr()?.port());
    ensure!(outer == own, "{outer} is not {own}");
    // And there is no other family.
    let v4 = host.enter(|| UdpSocket::bind("0.0.0.0:0")?.connect((ONE, 9)))?;
    ensure!(v4.is_err(), "the host reaches IPv4");
    Ok(())
}

#[test]
fn a_plain_router_passes_ipv6_and_filters_nothing() -> Result<()> {
    check_ipv6(Ipv6Kind::Open, DependsOn::Nothing)
}

#[test]
fn an_ipv6_firewall_admits_known_endpoints_and_translates_nothing() -> Result<()> {
    check_ipv6(Ipv6Kind::Firewall, DependsOn::AddressAndPort)
}

#[test]
fn a_site_may_have_both_families_and_keeps_ipv6_when_its_ipv4_address_changes() -> Result<()> {
    let (lab, site) = dual(Internet {
        ipv4: Some((NatKind::PortRestricted, WAN)),
        ipv6: Some((Ipv6Kind::Firewall, PREFIX)),
    })?;
    let (one, host) = (lab.node("one")?, site.host(&lab, "host")?);
    let moved = Ipv4Addr::new(203, 0, 113, 77);
    for wan in [WAN, moved] {
        for (server, any, outer) in [
            (
                IpAddr::from(ONE),
                IpAddr::from(Ipv4Addr::UNSPECIFIED),
                IpAddr::from(wan),
            ),
            (
                ONE_V6.into(),
                Ipv6Addr::UNSPECIFIED.into(),
                "2001:db8:1:1::b".parse()?,
            ),
        ] {
            let (server, socket) = (probe::bind(&one, server)?, probe::bind(&host, any)?);
            socket.send_to(b"x", server.local_addr()?)?;
            let (_, from) = recv(&server)?;
            ensure!(from.ip() == outer, "{from} is not {outer}");
        }
        site.renumber(&host, Ipv4Addr::new(192, 168, 1, 200))?;
        site.set_wan(lab.internet(), moved)?;
    }
    Ok(())
}

#[test]
fn a_router_behind_a_router_is_port_restricted_with_the_carriers_address() -> Result<()> {
    check_nat(
        NatKind::Double,
        DependsOn::Nothing,
        DependsOn::AddressAndPort,
    )?;
    let (lab, site) = dual(Internet::ipv4(NatKind::Double, WAN))?;
    let (one, host) = (lab.node("one")?, site.host(&lab, "host")?);
    let (server, socket) = (
        probe::bind(&one, ONE)?,
        probe::bind(&host, Ipv4Addr::UNSPECIFIED)?,
    );
    for wan in [WAN, Ipv4Addr::new(203, 0, 113, 77)] {
        site.set_wan(lab.internet(), wan)?;
        socket.send_to(b"x", server.local_addr()?)?;
        let (_, outer) = recv(&server)?;
        ensure!(outer.ip() == wan, "{outer}");
    }
    // The home's router has an address of its own that is not the world's.
    let home = site
        .router()
        .run(&["ip", "-4", "-br", "addr", "show", "wan"], LIMIT)?
        .ok()?;
    ensure!(home.contains("100.64.0.2/30"), "{home}");
    Ok(())
}

#[test]
fn a_symmetric_nat_gives_ports_in_order_and_a_random_one_does_not() -> Result<()> {
    for (kind, in_order) in [
        (NatKind::Symmetric, true),
        (NatKind::SymmetricRandom, false),
    ] {
        check_nat(kind, DependsOn::AddressAndPort, DependsOn::AddressAndPort)?;
        let (lab, site) = dual(Internet::ipv4(kind, WAN))?;
        let (one, host) = (lab.node("one")?, site.host(&lab, "host")?);
        let ports = probe::outer_ports(&host, (&one, ONE.into()), 8)?;
        let next = |pair: &[u16]| matches!(pair, [a, b] if a + 1 == *b);
        let found = ports.windows(2).all(next);
        // By chance, seven random ports follow each other once in 10³³ times.
        ensure!(found == in_order, "{kind:?}: {ports:?}");
    }
    Ok(())
}

#[test]
fn a_plain_router_maps_and_filters_nothing() -> Result<()> {
    check_nat(NatKind::None, DependsOn::Nothing, DependsOn::Nothing)
}

#[test]
fn a_full_cone_admits_everybody() -> Result<()> {
    check_nat(NatKind::FullCone, DependsOn::Nothing, DependsOn::Nothing)
}

#[test]
fn a_restricted_cone_admits_known_addresses() -> Result<()> {
    check_nat(
        NatKind::RestrictedCone,
        DependsOn::Nothing,
        DependsOn::Address,
    )
}

#[test]
fn a_port_restricted_cone_admits_known_endpoints() -> Result<()> {
    check_nat(
        NatKind::PortRestricted,
        DependsOn::Nothing,
        DependsOn::AddressAndPort,
    )
}

#[test]
fn two_hosts_with_the_same_port_keep_their_own_mapping() -> Result<()> {
    let lab = Lab::new()?;
    let one = lab.public_node("one", ONE)?;
    let two = lab.public_node("two", TWO)?;
    let site = lab.site("s", NatKind::PortRestricted, WAN, Impairment::NONE)?;
    let (to_one, to_two) = (probe::bind(&one, ONE)?, probe::bind(&two, TWO)?);
    let mut outer = Vec::new();
    for name in ["first", "second"] {
        let host = site.host(&lab, name)?;
        let socket = host.enter(|| UdpSocket::bind("0.0.0.0:51820"))??;
        for server in [&to_one, &to_two] {
            socket.send_to(b"x", server.local_addr()?)?;
            outer.push(server.recv_from(&mut [0; 8])?.1);
        }
    }
    let [first_one, first_two, second_one, second_two] = outer.as_slice() else {
        anyhow::bail!("{outer:?}");
    };
    assert_eq!(first_one, first_two);
    assert_eq!(second_one, second_two);
    assert_ne!(first_one, second_one);
    Ok(())
}

#[test]
fn a_hole_punched_from_both_sides_opens() -> Result<()> {
    let lab = Lab::new()?;
    let one = lab.public_node("one", ONE)?;
    let server = probe::bind(&one, ONE)?;
    let mut ends = Vec::new();
    for (name, wan) in [("a", WAN), ("b", Ipv4Addr::new(203, 0, 113, 2))] {
        let site = lab.site(name, NatKind::PortRestricted, wan, Impairment::NONE)?;
        let socket = probe::bind(
            &site.host(&lab, &format!("edge-{name}"))?,
            Ipv4Addr::UNSPECIFIED,
        )?;
        socket.send_to(b"x", server.local_addr()?)?;
        let outer = server.recv_from(&mut [0; 8])?.1;
        ends.push((site, socket, outer));
    }
    let [(_, a, a_outer), (_, b, b_outer)] = ends.as_slice() else {
        anyhow::bail!("two sites")
    };
    a.send_to(b"dropped at b", *b_outer)?; // Comes unasked, and must not spoil b's port.
    a.send_to(b"passed", server.local_addr()?)?; // Behind it on a's wire,
    ensure!(recv(&server)?.0 == b"passed");
    server.send_to(b"settled", *b_outer)?; // and this on b's.
    ensure!(recv(b)?.0 == b"settled");
    b.send_to(b"through", *a_outer)?;
    ensure!(recv(a)? == (b"through".to_vec(), *b_outer));
    a.send_to(b"back", *b_outer)?;
    ensure!(recv(b)? == (b"back".to_vec(), *a_outer));
    Ok(())
}

#[test]
fn blocked_udp_stops_udp_and_leaves_tcp_of_both_families() -> Result<()> {
    let (lab, site) = dual(Internet {
        ipv4: Some((NatKind::PortRestricted, WAN)),
        ipv6: Some((Ipv6Kind::Firewall, PREFIX)),
    })?;
    let (one, host) = (lab.node("one")?, site.host(&lab, "edge")?);
    for (address, any) in [
        (IpAddr::from(ONE), IpAddr::from(Ipv4Addr::UNSPECIFIED)),
        (ONE_V6.into(), Ipv6Addr::UNSPECIFIED.into()),
    ] {
        let server = probe::bind(&one, address)?;
        let listener = one.enter(|| TcpListener::bind((address, 443)))??;
        let socket = probe::bind(&host, any)?;
        socket.send_to(b"before", server.local_addr()?)?;
        ensure!(recv(&server)?.0 == b"before");

        site.block_udp(true)?;
        // Where the kernel tells the sender at once, that is as good.
        socket.send_to(b"blocked", server.local_addr()?).ok();
        // The handshake's packets come after it on the same wires: what is not there now was dropped.
        host.enter(|| TcpStream::connect((address, 443)))??;
        drop(listener);
        server.set_nonblocking(true)?;
        let dropped = server.recv_from(&mut [0; 16]);
        ensure!(dropped.is_err_and(|error| error.kind() == ErrorKind::WouldBlock));

        site.block_udp(false)?;
        server.set_nonblocking(false)?;
        socket.send_to(b"after", server.local_addr()?)?;
        ensure!(recv(&server)?.0 == b"after");
    }
    Ok(())
}

#[test]
fn what_is_too_big_for_a_narrow_wire_vanishes_and_nobody_is_told() -> Result<()> {
    let (lab, site) = dual(Internet {
        ipv4: Some((NatKind::PortRestricted, WAN)),
        ipv6: Some((Ipv6Kind::Firewall, PREFIX)),
    })?;
    let (one, host) = (lab.node("one")?, site.host(&lab, "host")?);
    site.narrow(lab.internet(), 1_280)?;
    for (server, any, headers) in [
        (IpAddr::from(ONE), IpAddr::from(Ipv4Addr::UNSPECIFIED), 28),
        (ONE_V6.into(), Ipv6Addr::UNSPECIFIED.into(), 48),
    ] {
        let (server, socket) = (probe::bind(&one, server)?, probe::bind(&host, any)?);
        // Not to be cut into fragments on the way, as WireGuard's are not.
        for socket in [&socket, &server] {
            if server.local_addr()?.is_ipv4() {
                sockopt::set_ip_mtu_discover(socket, Ipv4PathMtuDiscovery::DO)?;
            }
        }
        let [fits, too_big] = [1_280 - headers, 1_281 - headers].map(|size| vec![0; size]);
        socket.send_to(&fits, server.local_addr()?)?;
        let (_, outer) = recv(&server)?;
        for (from, to, target) in [
            (&socket, &server, server.local_addr()?),
            (&server, &socket, outer),
        ] {
            from.send_to(&too_big, target)?;
            from.send_to(b"end", target)?; // The wire keeps its order.
            ensure!(recv(to)?.0 == b"end");
            from.send_to(&too_big, target)?; // Else the error would be here.
            from.send_to(&fits, target)?;
            ensure!(recv(to)?.0 == fits);
        }
    }
    Ok(())
}

#[test]
fn a_new_public_address_is_used_at_once() -> Result<()> {
    let lab = Lab::new()?;
    let one = lab.public_node("one", ONE)?;
    let site = lab.site("s", NatKind::PortRestricted, WAN, Impairment::NONE)?;
    let host = site.host(&lab, "edge")?;
    let server = probe::bind(&one, ONE)?;
    let socket = probe::bind(&host, Ipv4Addr::UNSPECIFIED)?;
    socket.send_to(b"old", server.local_addr()?)?;
    ensure!(recv(&server)?.1.ip() == WAN);

    let moved = Ipv4Addr::new(203, 0, 113, 77);
    site.set_wan(lab.internet(), moved)?;
    socket.send_to(b"new", server.local_addr()?)?;
    let (_, outer) = recv(&server)?;
    ensure!(outer.ip() == moved, "{outer}");
    server.send_to(b"answer", outer)?;
    ensure!(recv(&socket)?.0 == b"answer");

    // As an agent does it: the same port from another address, to whom it spoke before.
    for last in [200, 201] {
        site.renumber(&host, Ipv4Addr::new(192, 168, 1, last))?;
        socket.send_to(b"lan", server.local_addr()?)?;
        server.send_to(b"answer", recv(&server)?.1)?;
        ensure!(recv(&socket)?.0 == b"answer");
    }
    Ok(())
}

#[test]
fn a_delay_is_what_was_asked_for() -> Result<()> {
    let (_lab, _link, left, right) = wire(Impairment::delay_loss(Duration::from_millis(20), 0.0))?;
    let echo = right.try_clone()?;
    let server = thread::spawn(move || -> Result<()> {
        for _ in 0..61 {
            let (bytes, from) = recv(&echo)?;
            echo.send_to(&bytes, from)?;
        }
        Ok(())
    });
    let mut round_trips = Vec::new();
    for _ in 0..61 {
        let start = Instant::now();
        left.send_to(b"ping", right.local_addr()?)?;
        recv(&left)?;
        round_trips.push(start.elapsed());
    }
    server.join().unwrap()?;
    round_trips.sort();
    let (least, median) = (round_trips[0], round_trips[30]);
    // Never early; late by no more than two wake-ups of a busy machine.
    assert!(least >= Duration::from_millis(40), "{least:?}");
    assert!(median < Duration::from_millis(44), "{median:?}");
    Ok(())
}

#[test]
fn a_loss_is_what_was_asked_for_and_repeats_with_its_seed() -> Result<()> {
    let (_lab, link, left, right) = wire(Impairment::NONE)?;
    left.send_to(b"ARP is done", right.local_addr()?)?;
    recv(&right)?;
    let impairment = Impairment::delay_loss(Duration::ZERO, 0.05);
    link.set(impairment)?;
    let first = arrivals(&link, &left, &right)?;
    // 4 000 trials at 5 %: 200 expected, deviation 13.8; five of those to each side.
    let lost = 4_000 - first.len();
    assert!((131..=269).contains(&lost), "{lost} of 4000 lost");
    link.set(Impairment::NONE)?;
    link.set(impairment)?;
    assert_eq!(first, arrivals(&link, &left, &right)?);
    Ok(())
}

#[test]
fn bursts_of_loss_are_as_long_and_as_frequent_as_was_asked_for() -> Result<()> {
    let (_lab, link, left, right) = wire(Impairment::NONE)?;
    left.send_to(b"ARP is done", right.local_addr()?)?;
    recv(&right)?;
    let impairment = Impairment {
        loss: 0.1,
        loss_burst_frames: 5.0,
        ..Impairment::NONE
    };
    link.set(impairment)?;
    let first = arrivals(&link, &left, &right)?;
    let mut lost = vec![true; 4_000];
    for number in &first {
        lost[usize::from(*number)] = false;
    }
    let count = lost.iter().filter(|lost| **lost).count();
    let bursts = lost.windows(2).filter(|two| **two == [false, true]).count();
    // 400 lost in 80 bursts are expected; of neighbours that hang together by 1 − 1/5 − 1/45 = 0.78, the
    // deviation of the share is √(0.1 · 0.9 · (1 + 0.78)/(1 − 0.78)/4000) = 0.0135: five of it to each side.
    assert!((130..=670).contains(&count), "{count} of 4000 lost");
    let mean = count as f64 / bursts as f64;
    assert!((3.0..=8.0).contains(&mean), "bursts of {mean} frames");
    link.set(Impairment::NONE)?;
    link.set(impairment)?;
    assert_eq!(first, arrivals(&link, &left, &right)?);
    let odd = Impairment {
        loss_burst_frames: 0.5,
        ..impairment
    };
    assert!(link.set(odd).is_err());
    Ok(())
}

#[test]
fn a_rate_is_what_was_asked_for() -> Result<()> {
    let limited = Impairment {
        rate_bps: 10_000_000,
        ..Impairment::NONE
    };
    let (_lab, _link, left, right) = wire(limited)?;
    let to = right.local_addr()?;
    // Twice the rate for 1.5 s: the queue is full after 0.2 s.
    let sender = thread::spawn(move || -> Result<()> {
        let start = Instant::now();
        for number in 1..=3_000_u32 {
            left.send_to(&[0; 1_208], to)?; // 1 250 bytes with the headers: 10 000 bits, 1 ms.
            let next = start + Duration::from_micros(500) * number;
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        left.send_to(b"end", to)?;
        Ok(())
    });
    let mut times = Vec::new();
    while times.len() < 1_200 {
        recv(&right)?;
        times.push(Instant::now());
    }
    sender.join().unwrap()?;
    let took = times[1_199].duration_since(times[199]);
    let bps = 1_000.0 * 10_000.0 / took.as_secs_f64();
    assert!((9_000_000.0..11_000_000.0).contains(&bps), "{bps}");
    Ok(())
}

#[test]
fn an_outage_stops_everything_until_it_ends() -> Result<()> {
    let (_lab, link, left, right) = wire(Impairment::NONE)?;
    left.send_to(b"before", right.local_addr()?)?;
    ensure!(recv(&right)?.0 == b"before");
    link.set_down(true)?;
    left.send_to(b"during", right.local_addr()?)?;
    // The link reads its frames before it reads an order: this one is behind the frame.
    link.set_down(true)?;
    link.set_down(false)?;
    left.send_to(b"after", right.local_addr()?)?;
    ensure!(recv(&right)?.0 == b"after");
    Ok(())
}

#[test]
fn tcp_passes_a_link_intact() -> Result<()> {
    let (lab, _link, _, _) = wire(Impairment::delay_loss(Duration::from_millis(1), 0.001))?;
    let (a, b) = (lab.node("left")?, lab.node("right")?);
    let listener = b.enter(|| TcpListener::bind((RIGHT, 80)))??;
    let content: Vec<u8> = (0..4_000_000_u32)
        .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0])
        .collect();
    let mut stream = a.enter(|| TcpStream::connect((RIGHT, 80)))??;
    stream.set_write_timeout(Some(Duration::from_secs(20)))?;
    let sent = content.clone();
    let writer = thread::spawn(move || stream.write_all(&sent));
    let mut received = Vec::new();
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.read_to_end(&mut received)?;
    writer.join().unwrap()?;
    assert!(received == content, "the bytes differ");
    Ok(())
}

#[test]
fn a_killed_owner_leaves_nothing() -> Result<()> {
    let mut owner = Command::new(tool::binary("lab")?)
        .arg("hold")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut id = String::new();
    BufReader::new(owner.stdout.take().context("no pipe")?).read_line(&mut id)?;
    let id = id.trim();
    assert_ne!(remains(id)?, Vec::<String>::new());
    owner.kill()?;
    owner.wait()?;
    tool::eventually("the lab is gone", Duration::from_secs(10), || {
        let remains = remains(id)?;
        ensure!(remains.is_empty(), "{remains:?} are left");
        Ok(())
    })
}

#[test]
fn a_dropped_lab_leaves_nothing() -> Result<()> {
    let lab = Lab::new()?;
    let id = lab.id().to_owned();
    let node = lab.add_node("idle")?;
    let sleeper = node.spawn("sleep", &["sleep", "600"])?;
    assert_ne!(remains(&id)?, Vec::<String>::new());
    drop(lab);
    drop(sleeper);
    assert_eq!(remains(&id)?, Vec::<String>::new());
    Ok(())
}

#[test]
fn a_command_runs_on_its_node() -> Result<()> {
    let lab = Lab::new()?;
    let node = lab.public_node("n", ONE)?;
    node.set_resolver("nameserver 169.254.53.53\n")?;
    let script =
        "cat /etc/resolv.conf; cat /proc/self/cgroup | grep 0::; ip -4 -br addr show wan; exit 3";
    let output = node.run(&["sh", "-c", script], Duration::from_secs(5))?;
    assert_eq!(output.status.code(), Some(3));
    assert!(
        output.stdout.starts_with("nameserver 169.254.53.53\n"),
        "{}",
        output.stdout
    );
    assert!(
        output.stdout.contains(&format!("0::/{}/n\n", lab.id())),
        "{}",
        output.stdout
    );
    assert!(
        output.stdout.contains("198.51.100.1/32"),
        "{}",
        output.stdout
    );
    let slow = node.run(&["sleep", "60"], Duration::from_millis(50));
    assert!(
        slow.unwrap_err()
            .to_string()
            .contains("took more than 50ms")
    );
    Ok(())
}

/// What a lab has on this machine.
fn remains(id: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/run/netns")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with(&format!("{id}-")) {
            found.push(name);
        }
    }
    let folder = std::env::temp_dir().join("holdfast-lab").join(id);
    let places: [&Path; 2] = [&cgroup_mount()?.join(id), &folder];
    found.extend(
        places
            .iter()
            .filter(|path| path.exists())
            .map(|path| path.display().to_string()),
    );
    Ok(found)
}

/// Two nodes, the link between them, and a socket on each.
fn wire(impairment: Impairment) -> Result<(Lab, Link, UdpSocket, UdpSocket)> {
    let lab = Lab::new()?;
    let (a, b) = (lab.add_node("left")?, lab.add_node("right")?);
    for node in [&a, &b] {
        // Its router solicitations would take part in the losses.
        node.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
    }
    let link = lab.impaired(&a, "eth0", &b, "eth0", impairment)?;
    tool::ip(a.netns(), &format!("addr add {LEFT}/24 dev eth0\n"))?;
    tool::ip(b.netns(), &format!("addr add {RIGHT}/24 dev eth0\n"))?;
    let sockets = (probe::bind(&a, LEFT)?, probe::bind(&b, RIGHT)?);
    Ok((lab, link, sockets.0, sockets.1))
}

fn recv(socket: &UdpSocket) -> Result<(Vec<u8>, SocketAddr)> {
    let mut buffer = [0; 2048];
    let (length, from) = socket.recv_from(&mut buffer)?;
    Ok((buffer.get(..length).unwrap_or_default().to_vec(), from))
}

/// Which of 4 000 numbered datagrams arrive; a last one after the losses ends the count.
fn arrivals(link: &Link, left: &UdpSocket, right: &UdpSocket) -> Result<Vec<u16>> {
    let to = right.local_addr()?;
    let mut arrived = Vec::new();
    for batch in (0..4_000_u16).collect::<Vec<_>>().chunks(100) {
        for number in batch {
            left.send_to(&number.to_be_bytes(), to)?;
        }
        // Small batches, so that no socket's queue adds losses of its own.
        right.set_read_timeout(Some(Duration::from_millis(100)))?;
        while let Ok((bytes, _)) = recv(right) {
            let number = u16::from_be_bytes(*bytes.first_chunk().context("no number")?);
            arrived.push(number);
            if Some(&number) == batch.last() {
                break;
            }
        }
    }
    link.set(Impairment::NONE)?;
    Ok(arrived)
}
