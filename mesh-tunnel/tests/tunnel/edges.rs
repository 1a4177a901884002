//! What only shows on a real kernel: congestion marks, slow links, rekeys under load, relay frames.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use mesh_linux::udp::{Ecn, IpFields, ReceiveBatch, UdpPair};
use mesh_tunnel::{
    stats::DropReason,
    tunnel::{RelayUdp, TunnelEvent},
};
use mesh_wire::{
    id::Via,
    relay::{self, Frame, Session},
};

use crate::harness::*;

fn marked(ecn: Ecn) -> IpFields {
    IpFields {
        ecn,
        ..IpFields::default()
    }
}

/// The next datagram's congestion bits; `None` if nothing comes for a while.
fn next_ecn(pair: &UdpPair, v6: bool) -> Option<Ecn> {
    let socket = pair.sockets().nth(usize::from(v6)).unwrap();
    let mut batch = ReceiveBatch::new();
    let deadline = Instant::now() + Duration::from_secs(2);
    while Instant::now() < deadline {
        if socket.receive(&mut batch).is_ok() {
            return batch.messages().next().map(|message| message.ecn);
        }
        thread::sleep(Duration::from_millis(5));
    }
    None
}

#[test]
fn congestion_marks_cross_the_tunnel_both_ways_of_marking() {
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    for (v6, to_b, to_a) in [
        (false, b.direct_v4(), a.direct_v4()),
        (true, b.direct_v6(), a.direct_v6()),
    ] {
        connect(&a, &b, to_b, to_a);
        let overlay: [IpAddr; 2] = [b.side.overlay_v4(), b.side.overlay_v6().into()];
        for (inner_v6, ip) in [false, true].into_iter().zip(overlay) {
            let from = lab.on(Side::A, || UdpPair::bind(0).unwrap());
            let to = lab.on(Side::B, || UdpPair::bind(0).unwrap());
            let target = SocketAddr::new(ip, to.port());
            for ecn in [
                Ecn::NotCapable,
                Ecn::Capable0,
                Ecn::Capable1,
                Ecn::Congested,
            ] {
                from.send(target, b"x", 1, marked(ecn)).unwrap();
                assert_eq!(
                    next_ecn(&to, inner_v6),
                    Some(ecn),
                    "{target} over IPv6: {v6}"
                );
            }
        }
    }
    // A router between that is congested: it marks what says that it understands.
    let (from, to) = (
        lab.on(Side::A, || UdpPair::bind(0).unwrap()),
        lab.on(Side::B, || UdpPair::bind(0).unwrap()),
    );
    let target = SocketAddr::new(b.side.overlay_v4(), to.port());
    connect(&a, &b, b.direct_v4(), a.direct_v4());
    lab.nft(
        Side::A,
        "add table ip ecn_test; add chain ip ecn_test out { type filter hook output priority 0; };
         add rule ip ecn_test out oifname eth0 udp dport != 0 ip ecn set ce",
    );
    from.send(target, b"x", 1, marked(Ecn::Capable0)).unwrap();
    assert_eq!(next_ecn(&to, false), Some(Ecn::Congested));
    // Here it marks what does not, which RFC 6040 wants dropped.
    from.send(target, b"x", 1, marked(Ecn::NotCapable)).unwrap();
    wait_until("it is counted", || {
        b.tunnel.stats().dropped(DropReason::CongestionMarked) > 0
    });
}

#[test]
fn rekeys_under_load_lose_nothing() {
    const REKEYS: usize = 20;
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    connect(&a, &b, b.direct_v4(), a.direct_v4());
    let from = udp(&lab, Side::A, a.side.overlay_v4());
    let to = udp(&lab, Side::B, b.side.overlay_v4());
    let target = to.local_addr().unwrap();
    let (done, received) = (AtomicBool::new(false), AtomicUsize::new(0));
    let sent = thread::scope(|scope| {
        scope.spawn(|| {
            while to.recv(&mut [0; 1200]).is_ok_and(|len| len > 1) {
                received.fetch_add(1, Ordering::Relaxed);
            }
        });
        let sender = scope.spawn(|| {
            let mut sent = 0;
            while !done.load(Ordering::Relaxed) {
                // A window, so that no queue on the way is full: what is lost is lost by a rekey.
                if sent - received.load(Ordering::Relaxed) < 32 {
                    from.send_to(&[7; 1200], target).unwrap();
                    sent += 1;
                } else {
                    thread::yield_now();
                }
            }
            sent
        });
        for number in 0..REKEYS {
            thread::sleep(Duration::from_millis(60));
            // From both sides in turn, and at the same time.
            if number % 3 != 1 {
                a.tunnel.handshake(&b.id, &[b.direct_v4()]);
            }
            if number % 3 != 0 {
                b.tunnel.handshake(&a.id, &[a.direct_v4()]);
            }
        }
        done.store(true, Ordering::Relaxed);
        let sent = sender.join().unwrap();
        let began = Instant::now();
        while received.load(Ordering::Relaxed) != sent && began.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(5));
        }
        let dropped = [&a, &b].map(|node| {
            let mut drops = node.tunnel.stats().drops;
            drops.retain(|(_, count)| *count > 0);
            drops
        });
        let arrived = received.load(Ordering::Relaxed);
        assert_eq!(arrived, sent, "{dropped:?}");
        from.send_to(&[0], target).unwrap();
        sent
    });
    println!("{sent} packets");
    assert!(sent > 1000, "{sent}");
    for node in [&a, &b] {
        for reason in [
            DropReason::NoSession,
            DropReason::UnknownSession,
            DropReason::Unauthentic,
            DropReason::HeldTooMany,
            DropReason::HeldTooLong,
        ] {
            let count = node.tunnel.stats().dropped(reason);
            assert_eq!(count, 0, "{} on {:?}", reason.as_str(), node.side);
        }
    }
    let handshakes = a
        .events
        .try_iter()
        .filter(|event| matches!(event, TunnelEvent::Handshake { .. }));
    assert!(handshakes.count() >= REKEYS / 2, "sessions were made anew");
}

#[test]
fn a_link_slower_than_its_senders_delays_a_small_flow_little_and_nobody_gives_up() {
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    connect(&a, &b, b.direct_v4(), a.direct_v4());
    // 20 Mb/s with a queue that never drops: only the socket's own limit holds the sender back.
    let name = lab.name(Side::A);
    run(&format!(
        "ip netns exec {name} tc qdisc add dev eth0 root tbf rate 20mbit burst 20k limit 20000000"
    ));
    let bulk = udp(&lab, Side::A, a.side.overlay_v4());
    let small = udp(&lab, Side::A, a.side.overlay_v4());
    let sink = udp(&lab, Side::B, b.side.overlay_v4());
    let echo = udp(&lab, Side::B, b.side.overlay_v4());
    let (sink_at, echo_at) = (sink.local_addr().unwrap(), echo.local_addr().unwrap());
    let done = AtomicBool::new(false);
    let mut round_trips = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                // Ten times what the link carries.
                for _ in 0..25 {
                    bulk.send_to(&[7; 1200], sink_at).ok();
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
        scope.spawn(|| {
            let mut bytes = [0; 8];
            while let Ok((len, from)) = echo.recv_from(&mut bytes) {
                if len == 1 {
                    break;
                }
                echo.send_to(&bytes[..len], from).unwrap();
            }
        });
        thread::sleep(Duration::from_millis(500));
        for number in 0..20_u64 {
            let began = Instant::now();
            small.send_to(&number.to_be_bytes(), echo_at).unwrap();
            let mut bytes = [0; 8];
            small.recv(&mut bytes).expect("a small flow loses nothing");
            assert_eq!(u64::from_be_bytes(bytes), number);
            round_trips.push(began.elapsed());
            thread::sleep(Duration::from_millis(20));
        }
        done.store(true, Ordering::Relaxed);
        small.send_to(&[0], echo_at).unwrap();
    });
    round_trips.sort();
    println!(
        "median {:?}, longest {:?}",
        round_trips[10], round_trips[19]
    );
    // What the socket and a batch hold takes about 0.2 s at 20 Mb/s; the bulk flow's own queue, 4 MiB
    // or 0.1 s of age, would come on top.
    let stats = a.tunnel.stats();
    let paid = stats.dropped(DropReason::QueueFull) + stats.dropped(DropReason::QueueLate);
    assert!(paid > 100, "the bulk flow pays: {paid}");
    assert!(round_trips[10] < Duration::from_secs(1), "{round_trips:?}");
}

/// Passes data frames on between two addresses, as a relay does, and counts them.
fn forward(socket: &UdpSocket, between: [SocketAddr; 2], data: &AtomicUsize) {
    let mut bytes = [0; 2000];
    while let Ok((len, from)) = socket.recv_from(&mut bytes) {
        let frame = &bytes[..len];
        match Frame::decode(frame) {
            Ok(Frame::Data { .. }) => {
                let to = between.iter().find(|address| **address != from).unwrap();
                socket.send_to(frame, to).unwrap();
                data.fetch_add(1, Ordering::Relaxed);
            }
            _ if len == 0 => return,
            _ => panic!("not a frame of data: {frame:?}"),
        }
    }
}

#[test]
fn a_relay_is_reached_by_plain_udp_from_the_nodes_own_port() {
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    let socket = lab.on(Side::A, || UdpSocket::bind("192.0.2.1:0").unwrap());
    let address = socket.local_addr().unwrap();
    let session = Session {
        number: 77,
        epoch: 3,
    };
    for (node, peer) in [(&a, &b), (&b, &a)] {
        let sessions = HashMap::from([(peer.id, session)]);
        let udp = RelayUdp { address, sessions };
        node.tunnel.set_relay_udp(RELAY, Some(udp));
    }
    let at = |node: &Node| SocketAddr::new(node.side.underlay_v4(), node.tunnel.port());
    let between = [at(&a), at(&b)];
    let data = AtomicUsize::new(0);
    thread::scope(|scope| {
        scope.spawn(|| forward(&socket, between, &data));
        let relay = Via::Relay(RELAY);
        connect(&a, &b, relay, relay);
        transfer(&lab, Side::A, b.side.overlay_v4(), 4 << 20, || {});
        transfer(&lab, Side::B, a.side.overlay_v6().into(), 4 << 20, || {});
        socket.send_to(&[], address).unwrap();
    });
    assert!(
        data.load(Ordering::Relaxed) > (8 << 20) / 1280,
        "they went that way"
    );

    // What is not data is the agent's to answer; a session that nobody has is counted.
    let mut frame = relay::data_frame(session, b"");
    frame[0] = 0x2f;
    socket.send_to(&frame, at(&a)).unwrap();
    let (from, told) = a.await_event(|event| match event {
        TunnelEvent::RelayFrame { from, datagram } => Some((from, datagram)),
        _ => None,
    });
    assert_eq!((from, told), (address, frame));
    let stranger = Session {
        number: 78,
        epoch: 3,
    };
    let before = a.tunnel.stats().dropped(DropReason::UnknownSession);
    let frame = relay::data_frame(stranger, b"x");
    socket.send_to(&frame, at(&a)).unwrap();
    wait_until("it is counted", || {
        a.tunnel.stats().dropped(DropReason::UnknownSession) == before + 1
    });
    // And without the relay such a frame is nothing.
    a.tunnel.set_relay_udp(RELAY, None);
    let before = a.tunnel.stats().dropped(DropReason::NotWireGuard);
    socket.send_to(&frame, at(&a)).unwrap();
    wait_until("it is counted", || {
        a.tunnel.stats().dropped(DropReason::NotWireGuard) == before + 1
    });
}

#[test]
fn a_jumbo_overlay_and_one_of_1280_carry_the_same() {
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    connect(&a, &b, b.direct_v4(), a.direct_v4());
    for (underlay, overlay) in [(9000, 8920), (1500, 1280), (1400, 1420)] {
        for side in [Side::A, Side::B] {
            let name = lab.name(side);
            run(&format!("ip -n {name} link set eth0 mtu {underlay}"));
            run(&format!("ip -n {name} link set hf0 mtu {overlay}"));
        }
        for node in [&a, &b] {
            node.tunnel.set_mtu(overlay);
        }
        transfer(&lab, Side::A, b.side.overlay_v4(), 4 << 20, || {});
        transfer(&lab, Side::B, a.side.overlay_v6().into(), 4 << 20, || {});
        // As long as a packet can be.
        let (from, to) = (
            udp(&lab, Side::A, a.side.overlay_v4()),
            udp(&lab, Side::B, b.side.overlay_v4()),
        );
        for len in [0, 1, usize::from(overlay) - 28, 60_000] {
            let datagram = pattern(len);
            from.send_to(&datagram, to.local_addr().unwrap()).unwrap();
            let mut bytes = vec![0; 65_536];
            let got = to.recv(&mut bytes).unwrap();
            assert!(bytes[..got] == datagram, "{got} of {len} at MTU {overlay}");
        }
    }
    for node in [&a, &b] {
        let stats = node.tunnel.stats();
        assert_eq!(stats.dropped(DropReason::MalformedOut), 0);
        assert_eq!(stats.dropped(DropReason::MalformedIn), 0);
        assert_eq!(stats.dropped(DropReason::TunFull), 0);
    }
}
