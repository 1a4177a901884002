//! How the TCP connects of clients that are no processes here end, as it is counted of their endpoints.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use ebpf_abi::{Failing, PacketCounter, SocketAddress};
use ebpf_loader::Failures;
use etherparse::TcpHeader;

use crate::{
    lan::{Lan, families},
    machine::{Machine, TCP, Verdict},
    netns::ip,
    sockets::{connect, connected, listener},
    verdicts::{ack, age_ms, fin, quote, rst, served, syn, syn_ack},
    wire::{IcmpError, Net, error, nets, tcp, udp},
};

/// How many failed, and how many of them in a row.
fn failing(machine: &mut Machine, net: &Net) -> Option<(u64, u32)> {
    let map = machine.map::<SocketAddress, Failing>("hf_failing");
    let key = SocketAddress::new(net.endpoint.ip(), net.endpoint.port(), TCP);
    let found = map.get(&key, 0).ok()?;
    Some((found.failed, found.in_a_row))
}

#[track_caller]
fn ask(machine: &Machine, net: &Net, set: fn(&mut TcpHeader)) {
    let ran = machine.request(&tcp(net.client, net.service, set, b""));
    assert_eq!(ran.verdict, Verdict::Next);
}

fn answer(machine: &Machine, net: &Net, set: fn(&mut TcpHeader)) {
    let ran = machine.answer(&tcp(net.endpoint, net.client, set, b""));
    assert_eq!(ran.verdict, Verdict::Next);
}

#[test]
fn resets_count_until_a_connect_goes_well() {
    for net in &nets() {
        let mut machine = served(net);
        for in_a_row in 1..4 {
            ask(&machine, net, syn);
            for _ in 0..2 {
                answer(&machine, net, rst);
                let expected = (in_a_row.into(), in_a_row);
                assert_eq!(failing(&mut machine, net), Some(expected));
            }
        }
        ask(&machine, net, syn);
        answer(&machine, net, syn_ack);
        assert_eq!(failing(&mut machine, net), Some((3, 0)));
        // It is no connect that is reset then.
        ask(&machine, net, ack);
        answer(&machine, net, rst);
        assert_eq!(failing(&mut machine, net), Some((3, 0)));
        let failed = machine.counted()[&PacketCounter::ConnectFailed];
        assert_eq!(failed, 3);
    }
}

#[test]
fn what_did_not_begin_with_a_syn_or_ends_by_the_client_is_no_connect_that_failed() {
    for net in &nets() {
        let mut machine = served(net);
        // The flow of another gateway, or from before.
        ask(&machine, net, ack);
        answer(&machine, net, rst);
        ask(&machine, net, syn);
        ask(&machine, net, rst);
        ask(&machine, net, syn);
        answer(&machine, net, syn_ack);
        ask(&machine, net, fin);
        answer(&machine, net, rst);
        let question = udp(net.client, net.service, b"?");
        machine.request(&question);
        let saw = quote(&udp(net.client, net.endpoint, b"?"), net, 8);
        let kind = IcmpError::PortUnreachable;
        machine.answer(&error(net.router, net.client.ip(), kind, &saw));
        assert_eq!(failing(&mut machine, net), None);
    }
}

#[test]
fn icmp_errors_about_a_syn_count_once_and_a_smaller_mtu_does_not() {
    for net in &nets() {
        let mut machine = served(net);
        let saw = quote(&tcp(net.client, net.endpoint, syn, b""), net, 8);
        let say = |machine: &Machine, kind| {
            let error = error(net.router, net.client.ip(), kind, &saw);
            assert_eq!(machine.answer(&error).verdict, Verdict::Next);
        };
        let kinds = [IcmpError::PortUnreachable, IcmpError::TimeExceeded];
        for (kind, failed) in kinds.into_iter().zip(1..) {
            ask(&machine, net, syn);
            say(&machine, IcmpError::TooBig);
            assert_eq!(
                failing(&mut machine, net).map_or(0, |(all, _)| all),
                failed - 1
            );
            for _ in 0..2 {
                say(&machine, kind);
            }
            assert_eq!(failing(&mut machine, net).map(|(all, _)| all), Some(failed));
            ask(&machine, net, rst); // So that the next SYN begins anew.
        }
    }
}

#[test]
fn a_syn_again_after_a_second_counts_once_and_a_late_answer_is_one() {
    for net in &nets() {
        let mut machine = served(net);
        ask(&machine, net, syn);
        age_ms(&mut machine, 800);
        ask(&machine, net, syn);
        assert_eq!(failing(&mut machine, net), None);
        for _ in 0..3 {
            age_ms(&mut machine, 1_000);
            ask(&machine, net, syn);
            assert_eq!(failing(&mut machine, net), Some((1, 1)));
        }
        answer(&machine, net, syn_ack);
        assert_eq!(failing(&mut machine, net), Some((1, 0)));
    }
}

fn failures(lan: &Lan, endpoint: SocketAddr) -> Option<(u64, u32)> {
    let failures = lan.services.failures().unwrap();
    let Failures { failed, in_a_row } = *failures.get(&endpoint)?;
    Some((failed, in_a_row))
}

#[test]
fn a_device_s_connects_are_counted_as_those_of_sockets() {
    let mut lan = Lan::new();
    for family in &families() {
        let closed = lan.in_servers(|| TcpListener::bind((family.server, 0)).unwrap());
        let at = closed.local_addr().unwrap();
        drop(closed);
        lan.serve(family.service, &[at]);
        let error = connect(&lan, family).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(failures(&lan, at), Some((1, 1)));
        let server = lan.in_servers(|| TcpListener::bind(at).unwrap());
        connected(&lan, family, &server);
        assert_eq!(failures(&lan, at), Some((1, 0)));
        lan.services.forget_failures(at).unwrap();
        connected(&lan, family, &server);
        assert_eq!(failures(&lan, at), None);

        // The gateway itself says that there is no way.
        let (nowhere, route) = match at {
            SocketAddr::V4(_) => ("10.0.77.1:80", "10.0.77.0/24"),
            SocketAddr::V6(_) => ("[fd00:77::1]:80", "fd00:77::/64"),
        };
        let nowhere = nowhere.parse().unwrap();
        ip(&["route", "add", "unreachable", route]);
        lan.serve(family.service, &[nowhere]);
        connect(&lan, family).unwrap_err();
        assert_eq!(failures(&lan, nowhere), Some((1, 1)));

        // Nobody says anything: what the servers' namespace does not forward.
        let silent = match at {
            SocketAddr::V4(_) => ("10.0.78.1:80", "10.0.78.0/24", "10.0.9.9"),
            SocketAddr::V6(_) => ("[fd00:78::1]:80", "fd00:78::/64", "fd00:9::9"),
        };
        let (silent, route, via) = silent;
        let silent = silent.parse().unwrap();
        ip(&["route", "add", route, "via", via]);
        lan.serve(family.service, &[silent]);
        let patience = Duration::from_millis(1_500);
        lan.in_client(|| TcpStream::connect_timeout(&family.service, patience))
            .unwrap_err();
        assert_eq!(failures(&lan, silent), Some((1, 1)));
    }
}

#[test]
fn a_device_s_open_connections_are_counted_by_endpoint() {
    let mut lan = Lan::new();
    for family in &families() {
        let (server, at) = listener(&lan, family);
        lan.serve(family.service, &[at]);
        let open = |lan: &Lan| {
            let open = lan.services.open_connections().unwrap();
            open.get(&at).copied().unwrap_or_default()
        };
        let three = [(); 3].map(|()| connected(&lan, family, &server));
        let [kept, (client, peer), (reset, resets)] = three;
        assert_eq!(open(&lan), 3);
        // One end is half of it.
        client.shutdown(Shutdown::Write).unwrap();
        (&peer).read_to_end(&mut Vec::new()).unwrap();
        assert_eq!(open(&lan), 3);
        drop(peer);
        (&client).read_to_end(&mut Vec::new()).unwrap();
        assert_eq!(open(&lan), 2);
        // What it did not read makes it a reset.
        (&reset).write_all(b"?").unwrap();
        resets.peek(&mut [0]).unwrap();
        drop(resets);
        (&reset).read(&mut [0]).unwrap_err();
        assert_eq!(open(&lan), 1);
        drop(kept);
    }
}
