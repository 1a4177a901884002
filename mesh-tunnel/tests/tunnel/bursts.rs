//! Sockets beside the node's port.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use mesh_tunnel::tunnel::{Burst, SPARE_SOCKETS_MAX, TunnelEvent};
use mesh_wire::{id::Via, peer::PeerMessage};

use crate::harness::*;

const MIB: usize = 1 << 20;

fn echo(from: &Node, to: &Node) -> Vec<u8> {
    let message = PeerMessage::EchoRequest {
        txid: 7,
        size_bytes: 0,
    };
    message.to_packet(from.side.overlay_v6(), to.side.overlay_v6())
}

fn burst(from: &Node, to: &Node, count: usize) -> Burst {
    Burst {
        peer: to.id,
        target: SocketAddr::new(to.side.underlay_v4(), to.tunnel.port()),
        count,
        packet: echo(from, to),
        tried: Duration::from_secs(5),
        kept: Duration::from_secs(3),
    }
}

/// How the next message of a peer's core came.
fn next_control(node: &Node) -> Via {
    node.await_event(|event| match event {
        TunnelEvent::Control { via, .. } => Some(via),
        _ => None,
    })
}

#[test]
fn a_peer_that_finds_one_of_many_sockets_is_answered_by_it_and_the_others_are_closed() {
    const SOCKETS: usize = 16;
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    connect(&a, &b, b.direct_v6(), a.direct_v6());
    a.tunnel.open_sockets(burst(&a, &b, SOCKETS));
    let ways: BTreeSet<_> = (0..SOCKETS).map(|_| next_control(&b)).collect();
    assert_eq!(ways.len(), SOCKETS, "each has a port of its own: {ways:?}");
    assert!(!ways.contains(&a.direct_v4()));
    assert_eq!(a.tunnel.stats().spare_sockets, (SOCKETS, 0));

    let found = *ways.iter().nth(5).unwrap();
    b.tunnel.send_inner(&a.id, found, &echo(&b, &a));
    assert_eq!(next_control(&a), b.direct_v4(), "as by the node's port");
    a.tunnel.set_path(&b.id, Some(b.direct_v4()), None, None);
    b.tunnel.set_path(&a.id, Some(found), None, None);
    transfer(&lab, Side::B, a.side.overlay_v4(), 4 * MIB, || {});
    drop(b.tunnel.take_traffic());
    transfer(&lab, Side::A, b.side.overlay_v4(), 8 * MIB, || {});
    let report = b.tunnel.take_traffic();
    assert_eq!(report[0].received, [found], "all leaves by that socket");

    wait_until("the others are closed", || {
        udp_ping(&lab, &a, &b);
        a.tunnel.stats().spare_sockets == (1, 1)
    });
    wait_until("what nothing comes by is closed, too", || {
        a.tunnel.stats().spare_sockets == (0, 0)
    });
    b.tunnel.set_path(&a.id, Some(a.direct_v4()), None, None);
    drop(b.tunnel.take_traffic());
    transfer(&lab, Side::A, b.side.overlay_v4(), MIB, || {});
    assert_eq!(b.tunnel.take_traffic()[0].received, [a.direct_v4()]);
}

/// A packet there and back.
fn udp_ping(lab: &Lab, a: &Node, b: &Node) {
    let from = udp(lab, Side::A, a.side.overlay_v4());
    let to = udp(lab, Side::B, b.side.overlay_v4());
    from.send_to(b"x", to.local_addr().unwrap()).unwrap();
    let (_, sender) = to.recv_from(&mut [0; 4]).unwrap();
    to.send_to(b"y", sender).unwrap();
    from.recv(&mut [0; 4]).unwrap();
}

#[test]
fn sockets_of_bursts_are_limited_and_end_with_the_network() {
    let lab = Lab::new();
    let (a, b) = pair(&lab);
    connect(&a, &b, b.direct_v6(), a.direct_v6());
    let open = || a.tunnel.stats().spare_sockets.0;
    a.tunnel.open_sockets(burst(&a, &b, SPARE_SOCKETS_MAX - 10));
    a.tunnel.open_sockets(burst(&a, &b, 20));
    for _ in 0..SPARE_SOCKETS_MAX {
        assert_ne!(next_control(&b), a.direct_v4());
    }
    assert_eq!(open(), SPARE_SOCKETS_MAX);
    let found = {
        a.tunnel.open_sockets(burst(&a, &b, 1));
        a.tunnel.close_sockets();
        wait_until("all are closed", || open() == 0);
        a.tunnel.open_sockets(burst(&a, &b, 1));
        next_control(&b)
    };
    assert_ne!(found, a.direct_v4());
    assert_eq!(open(), 1, "one that had no room was not opened later");
}
