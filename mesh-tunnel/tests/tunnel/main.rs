//! Tunnels on real TUN devices and sockets, in namespaces that each test makes. Needs root.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::wildcard_enum_match_arm,
    reason = "tests fail loudly and pick one event of many"
)]

mod bursts;
mod edges;
mod harness;

use std::{
    io::ErrorKind,
    net::{SocketAddr, TcpStream, UdpSocket},
    sync::atomic::Ordering,
    thread,
    time::Duration,
};

use harness::*;
use mesh_tunnel::{
    stats::{DropReason, Held},
    tunnel::{External, TunnelEvent},
};
use mesh_wire::{
    id::{NodeId, Via},
    peer::PeerMessage,
};

const MIB: usize = 1 << 20;

#[test]
fn both_inner_families_pass_over_both_outer_families() {
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    for (to_b, to_a) in [
        (b.direct_v4(), a.direct_v4()),
        (b.direct_v6(), a.direct_v6()),
    ] {
        connect(&a, &b, to_b, to_a);
        transfer(&lab, Side::A, b.side.overlay_v4(), 8 * MIB, || {});
        transfer(&lab, Side::A, b.side.overlay_v6().into(), 8 * MIB, || {});
        transfer(&lab, Side::B, a.side.overlay_v6().into(), 2 * MIB, || {});
    }
    for node in [&a, &b] {
        for (reason, count) in node.tunnel.stats().drops {
            // The kernel's own: MLD, router solicitations.
            let expected = reason == DropReason::Multicast;
            assert!(
                count == 0 || expected,
                "{count} {} on {:?}",
                reason.as_str(),
                node.side
            );
        }
    }
}

#[test]
fn packets_pass_through_a_relay() {
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    FakeRelay::join(&a, &b);
    connect(&a, &b, Via::Relay(RELAY), Via::Relay(RELAY));
    transfer(&lab, Side::A, b.side.overlay_v4(), 4 * MIB, || {});
    transfer(&lab, Side::B, a.side.overlay_v6().into(), 4 * MIB, || {});
}

#[test]
fn packets_wait_for_a_full_relay_and_not_for_too_long() {
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    let relay = FakeRelay::join(&a, &b);
    connect(&a, &b, Via::Relay(RELAY), Via::Relay(RELAY));
    let from = udp(&lab, Side::A, a.side.overlay_v4());
    let to = udp(&lab, Side::B, b.side.overlay_v4());
    let send = |number: u8| from.send_to(&[number], to.local_addr().unwrap()).unwrap();
    let receive = || {
        let mut bytes = [0];
        to.recv_from(&mut bytes).map(|_| bytes[0])
    };
    relay.full.store(true, Ordering::Relaxed);
    send(1);
    to.set_nonblocking(true).unwrap();
    thread::sleep(Duration::from_millis(20));
    assert_eq!(receive().unwrap_err().kind(), ErrorKind::WouldBlock);
    to.set_nonblocking(false).unwrap();
    relay.full.store(false, Ordering::Relaxed);
    assert_eq!(receive().unwrap(), 1);

    relay.full.store(true, Ordering::Relaxed);
    send(2);
    thread::sleep(Duration::from_millis(200));
    relay.full.store(false, Ordering::Relaxed);
    send(3);
    assert_eq!(receive().unwrap(), 3);
    assert_eq!(a.tunnel.stats().dropped(DropReason::QueueLate), 1);
}

#[test]
fn a_flow_survives_changes_of_its_path_without_losing_a_packet() {
    const PACKETS: u32 = 3000;
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    FakeRelay::join(&a, &b);
    let relay = Via::Relay(RELAY);
    connect(&a, &b, relay, relay);
    let from = udp(&lab, Side::A, a.side.overlay_v4());
    let to = udp(&lab, Side::B, b.side.overlay_v4());
    let target = to.local_addr().unwrap();
    let receiver = thread::spawn(move || {
        let mut seen = vec![0_u8; PACKETS as usize];
        let mut bytes = [0; 4];
        for _ in 0..PACKETS {
            let (_, sender) = to.recv_from(&mut bytes).unwrap();
            seen[u32::from_be_bytes(bytes) as usize] += 1;
            to.send_to(&bytes, sender).unwrap();
        }
        seen
    });
    let mut on_the_way = 0;
    for number in 0..PACKETS {
        match number {
            500 => a
                .tunnel
                .set_path(&b.id, Some(b.direct_v4()), Some(relay), None),
            1000 => a.tunnel.set_path(&b.id, Some(b.direct_v4()), None, None),
            1500 => a
                .tunnel
                .set_path(&b.id, Some(b.direct_v6()), Some(b.direct_v4()), None),
            2000 => a
                .tunnel
                .set_path(&b.id, Some(relay), Some(b.direct_v6()), None),
            2500 => a.tunnel.set_path(&b.id, Some(relay), None, None),
            _ => {}
        }
        if on_the_way == 64 {
            from.recv(&mut [0; 4]).unwrap();
            on_the_way -= 1;
        }
        from.send_to(&number.to_be_bytes(), target).unwrap();
        on_the_way += 1;
    }
    let seen = receiver.join().unwrap();
    assert!(
        seen.iter().all(|&count| count == 1),
        "lost or doubled: {seen:?}"
    );
    // The copies were dropped by the replay window, and nothing else was.
    let stats = b.tunnel.stats();
    wait_until("copies were counted", || {
        b.tunnel.stats().dropped(DropReason::Replayed) > 0
    });
    assert_eq!(stats.dropped(DropReason::WrongSource), 0);
}

#[test]
fn copies_end_after_as_many_packets_as_were_allowed() {
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    connect(&a, &b, b.direct_v4(), a.direct_v4());
    let from = udp(&lab, Side::A, a.side.overlay_v4());
    let to = udp(&lab, Side::B, b.side.overlay_v4());
    let target = to.local_addr().unwrap();
    let (direct, copy) = (Some(b.direct_v4()), Some(b.direct_v6()));
    // Each waits for its arrival, so that none are glued into super-packets.
    let send = |count: u32| {
        for _ in 0..count {
            from.send_to(b"x", target).unwrap();
            to.recv(&mut [0; 4]).unwrap();
        }
    };
    let copies = || b.tunnel.stats().dropped(DropReason::Replayed);
    for (most, sent, copied) in [(Some(32), 100, 32), (None, 100, 100), (Some(0), 10, 0)] {
        let before = copies();
        a.tunnel.set_path(&b.id, direct, copy, most);
        send(sent);
        wait_until("the copies were counted", || copies() >= before + copied);
        // Copies go the same wire at the same time: none comes later than the next packet's answer.
        a.tunnel.set_path(&b.id, direct, None, None);
        send(2);
        assert_eq!(copies() - before, copied, "{most:?}");
    }
}

#[test]
fn an_address_that_the_kernel_has_no_way_to_is_told() {
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    connect(&a, &b, b.direct_v4(), a.direct_v4());
    let nowhere: SocketAddr = "203.0.113.9:51820".parse().unwrap();
    a.tunnel.send_raw(nowhere, b"x");
    a.await_event(|event| (event == TunnelEvent::Unsendable(nowhere)).then_some(()));
}

#[test]
fn the_first_packet_waits_for_the_path_and_is_sent_on() {
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    let from = udp(&lab, Side::A, a.side.overlay_v6().into());
    let to = udp(&lab, Side::B, b.side.overlay_v6().into());
    from.send_to(b"first", to.local_addr().unwrap()).unwrap();
    a.await_event(|event| (event == TunnelEvent::Wanted(b.id)).then_some(()));
    assert_eq!(a.tunnel.peer_stats(&b.id).unwrap().held, 1);
    connect(&a, &b, b.direct_v4(), a.direct_v4());
    let mut bytes = [0; 16];
    let len = to.recv(&mut bytes).unwrap();
    assert_eq!(&bytes[..len], b"first");
    assert!(b.tunnel.peer_stats(&a.id).unwrap().has_session);
}

#[test]
fn what_waits_too_long_is_dropped_and_counted() {
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    let from = udp(&lab, Side::A, a.side.overlay_v4());
    for _ in 0..70 {
        from.send_to(b"x", SocketAddr::new(b.side.overlay_v4(), 9))
            .unwrap();
    }
    wait_until("64 wait and 6 do not", || {
        a.tunnel.stats().dropped(DropReason::HeldTooMany) == 6
    });
    let held = a.tunnel.stats().held;
    assert!(
        held.packets == 64 && held.oldest < Some(Duration::from_secs(3)) && held.oldest.is_some()
    );
    wait_until("2 s are over", || {
        a.tunnel.stats().dropped(DropReason::HeldTooLong) == 64
    });
    assert_eq!(a.tunnel.stats().held, Held::default());
}

#[test]
fn a_packet_with_another_peers_source_is_dropped_and_counted() {
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    connect(&a, &b, b.direct_v4(), a.direct_v4());
    let stranger = NodeId([9; 32]);
    // The whole range is A's, but this one address is somebody else's: longest prefix decides.
    b.tunnel.set_routes(
        [
            ("100.96.0.0/12".parse().unwrap(), a.id),
            (a.side.overlay_v4().into(), stranger),
        ]
        .into_iter()
        .collect(),
    );
    let from = udp(&lab, Side::A, a.side.overlay_v4());
    from.send_to(b"forged", SocketAddr::new(b.side.overlay_v4(), 9))
        .unwrap();
    wait_until("it is counted", || {
        b.tunnel.stats().dropped(DropReason::WrongSource) == 1
    });
    assert_eq!(b.tunnel.stats().traffic.received_packets, 0);
}

#[test]
fn garbage_is_counted_and_stun_is_told() {
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    connect(&a, &b, b.direct_v4(), a.direct_v4());
    let outside = lab.on(Side::B, || UdpSocket::bind("192.0.2.2:0").unwrap());
    let target = SocketAddr::new(Side::A.underlay_v4(), a.tunnel.port());
    let mut data = vec![4, 0, 0, 0];
    data.extend([0xee; 60]);
    let mut initiation = vec![1, 0, 0, 0];
    initiation.resize(148, 0x55);
    let cases = [
        (b"hello".to_vec(), DropReason::NotWireGuard),
        (vec![0xff; 1400], DropReason::NotWireGuard),
        (vec![], DropReason::NotWireGuard),
        (data, DropReason::UnknownSession),
        (initiation, DropReason::BadHandshake),
    ];
    for (datagram, reason) in cases {
        let before = a.tunnel.stats().dropped(reason);
        outside.send_to(&datagram, target).unwrap();
        wait_until(reason.as_str(), || {
            a.tunnel.stats().dropped(reason) == before + 1
        });
    }
    let stun = [&[1, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42][..], &[7; 12]].concat();
    outside.send_to(&stun, target).unwrap();
    let (from, datagram) = a.await_event(|event| match event {
        TunnelEvent::Stun { from, datagram } => Some((from, datagram)),
        _ => None,
    });
    assert_eq!((from, datagram), (outside.local_addr().unwrap(), stun));
    transfer(&lab, Side::B, a.side.overlay_v4(), MIB, || {});
}

#[test]
fn an_unknown_key_is_not_answered_and_a_forgotten_peer_is_cut_off() {
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    connect(&a, &b, b.direct_v4(), a.direct_v4());
    b.tunnel.set_known([].into());
    assert!(b.tunnel.peer_stats(&a.id).is_none());
    let from = udp(&lab, Side::A, a.side.overlay_v4());
    from.send_to(b"x", SocketAddr::new(b.side.overlay_v4(), 9))
        .unwrap();
    wait_until("its session is gone", || {
        b.tunnel.stats().dropped(DropReason::UnknownSession) == 1
    });
    a.tunnel.handshake(&b.id, &[b.direct_v4()]);
    wait_until("its key is not known", || {
        b.tunnel.stats().dropped(DropReason::UnknownKey) == 1
    });
    let refused = b.await_event(|event| match event {
        TunnelEvent::Refused { peer, behind, .. } => Some((peer, behind)),
        _ => None,
    });
    assert_eq!(refused, (a.id, None));
    let stats = b.tunnel.stats();
    assert_eq!((stats.active_peers, stats.handshakes_refused), (0, 1));
    // What was counted of a peer that is forgotten stays.
    assert!(stats.handshakes.proven > 0);
    let began = a.tunnel.stats().handshakes;
    assert!(began.completed > 0 && began.begun > began.completed);
}

#[test]
fn cores_talk_by_the_way_they_choose_and_no_process_can_pass_for_one() {
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    connect(&a, &b, b.direct_v4(), a.direct_v4());
    let message = PeerMessage::EchoRequest {
        txid: 7,
        size_bytes: 1280,
    };
    let packet = message.to_packet(Side::A.overlay_v6(), Side::B.overlay_v6());
    a.tunnel.send_inner(&b.id, b.direct_v6(), &packet);
    let (via, received) = b.await_event(|event| match event {
        TunnelEvent::Control { via, packet, .. } => Some((via, packet)),
        _ => None,
    });
    assert_eq!((via, received), (a.direct_v6(), packet));

    let process = udp(&lab, Side::A, a.side.overlay_v6().into());
    let control = SocketAddr::new(b.side.overlay_v6().into(), mesh_wire::peer::CONTROL_PORT);
    process.send_to(b"forged", control).unwrap();
    wait_until("it is counted", || {
        a.tunnel.stats().dropped(DropReason::ForgedControl) == 1
    });
}

#[test]
fn traffic_is_reported_once_by_peer_and_way() {
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    connect(&a, &b, b.direct_v4(), a.direct_v4());
    drop(b.tunnel.take_traffic());
    let from = udp(&lab, Side::A, a.side.overlay_v4());
    let to = udp(&lab, Side::B, b.side.overlay_v4());
    from.send_to(b"x", to.local_addr().unwrap()).unwrap();
    to.recv(&mut [0; 4]).unwrap();
    let report = b.tunnel.take_traffic();
    assert_eq!(report.len(), 1);
    assert_eq!((report[0].peer, report[0].sent), (a.id, false));
    assert_eq!(report[0].received, [a.direct_v4()]);
    assert_eq!(b.tunnel.take_traffic(), []);
    let sent = a.tunnel.take_traffic();
    assert!(sent.iter().any(|report| report.sent));
}

#[test]
fn a_stock_wireguard_device_is_a_peer_and_is_followed_when_it_moves() {
    let lab = Lab::new();
    let a = Node::start(&lab, Side::A);
    let device = StockDevice::start(&lab, Side::B, &a, a.direct_v4());
    a.tunnel.set_routes(
        [Side::B.overlay_v4(), Side::B.overlay_v6().into()]
            .into_iter()
            .map(|ip| (ip.into(), device.id))
            .collect(),
    );
    // Where the device is, nobody told: it must call first.
    a.tunnel.add_external(device.id, External::default());
    transfer(&lab, Side::B, a.side.overlay_v4(), MIB, || {});
    transfer(&lab, Side::A, Side::B.overlay_v6().into(), MIB, || {
        // Who moves must speak; the receiver of a flow may have nothing to say.
        device.wg(&["listen-port", "51821"]);
        device.wg(&["peer", &a.id.to_string(), "persistent-keepalive", "1"]);
    });
    let moved = Via::Direct(SocketAddr::new(Side::B.underlay_v4(), 51821));
    assert_eq!(
        a.tunnel.peer_stats(&device.id).unwrap().primary,
        Some(moved)
    );
    // And we call it, after it was described anew.
    a.tunnel.remove_external(&device.id);
    a.tunnel.add_external(
        device.id,
        External {
            endpoint: Some(SocketAddr::new(Side::B.underlay_v6(), 51821)),
            keepalive_s: Some(25),
            ..External::default()
        },
    );
    transfer(&lab, Side::A, Side::B.overlay_v4(), MIB, || {});
    assert!(
        a.events.try_recv().is_err(),
        "a stock device has no core to tell of"
    );
}

/// An initiation of `a` to `b` that never reached it, and the socket that caught it.
fn record_initiation(lab: &Lab, a: &Node, b: &Node) -> (Vec<u8>, UdpSocket) {
    let recorder = lab.on(Side::B, || UdpSocket::bind("192.0.2.2:0").unwrap());
    recorder.set_read_timeout(Some(PATIENCE)).unwrap();
    a.tunnel
        .handshake(&b.id, &[Via::Direct(recorder.local_addr().unwrap())]);
    let mut bytes = [0; 200];
    let len = recorder.recv(&mut bytes).unwrap();
    (bytes[..len].to_vec(), recorder)
}

#[test]
fn a_recorded_initiation_opens_no_session_and_works_once() {
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    let (initiation, recorder) = record_initiation(&lab, &a, &b);
    let target = SocketAddr::new(Side::B.underlay_v4(), b.tunnel.port());
    recorder.send_to(&initiation, target).unwrap();
    assert_eq!(recorder.recv(&mut [0; 200]).unwrap(), 92, "a response");
    recorder.send_to(&initiation, target).unwrap();
    wait_until("the copy is counted", || {
        b.tunnel.stats().dropped(DropReason::Replayed) == 1
    });
    assert!(!b.tunnel.peer_stats(&a.id).unwrap().has_session);
    assert!(b.events.try_recv().is_err(), "nobody has proven anything");
    wait_until("a fresh initiation works", || {
        a.tunnel.handshake(&b.id, &[b.direct_v4()]);
        a.tunnel
            .peer_stats(&b.id)
            .is_some_and(|stats| stats.has_session)
    });
    assert_eq!(b.await_handshake(&a), a.direct_v4());
}

#[test]
fn a_flood_of_handshakes_is_asked_for_cookies_and_peers_still_get_through() {
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    let (initiation, recorder) = record_initiation(&lab, &a, &b);
    let target = SocketAddr::new(Side::B.underlay_v4(), b.tunnel.port());
    let mut bytes = [0; 200];
    let flood = || (0..400).for_each(|_| drop(recorder.send_to(&initiation, target)));
    flood();
    while recorder.recv(&mut bytes).unwrap() != 64 {}
    wait_until("it is counted", || {
        b.tunnel.stats().dropped(DropReason::UnderLoad) > 0
    });
    // The first attempt under load earns a cookie, a later one shows it.
    let connected = || {
        a.tunnel
            .peer_stats(&b.id)
            .is_some_and(|stats| stats.has_session)
    };
    wait_until("a session in spite of the flood", || {
        flood();
        a.tunnel.handshake(&b.id, &[b.direct_v4()]);
        connected()
    });
}

#[test]
fn who_wants_an_address_that_nobody_has_is_told() {
    let lab = Lab::new();
    let (a, _b) = pair(&lab);
    for nobody in ["100.96.7.7", "fd12:3456:789a::77"] {
        let address = SocketAddr::new(nobody.parse().unwrap(), 9);
        let error = lab.on(a.side, || {
            TcpStream::connect_timeout(&address, PATIENCE).unwrap_err()
        });
        assert_eq!(error.kind(), ErrorKind::HostUnreachable, "{error}");
    }
}
