//! Clients that are the endpoint of the service they ask for: each of their two ends sees the service's
//! address at the other.

use std::{
    io,
    net::{SocketAddr, TcpListener, UdpSocket},
};

use ebpf_abi::PacketCounter;
use etherparse::TcpHeader;

use crate::{
    lan::{Lan, families},
    machine::{Machine, Ran, Verdict, next},
    sockets::{PATIENCE, ask_as, client_socket, connected_to, transfer},
    verdicts::{ack, fin, syn},
    wire::{ETHERNET, IcmpError, Net, error, fragments, ip_nets, nets, tcp, udp, without_ethernet},
};

/// The client's own server, the service, and the service as its server sees it.
struct Own {
    client: SocketAddr,
    server: SocketAddr,
    service: SocketAddr,
    seen: SocketAddr,
}

fn own(net: &Net) -> Own {
    let Net {
        client, service, ..
    } = *net;
    Own {
        client,
        server: SocketAddr::new(client.ip(), 8_080),
        service,
        seen: SocketAddr::new(service.ip(), client.port()),
    }
}

fn served(net: &Net) -> (Machine, Own) {
    let mut machine = Machine::new();
    let own = own(net);
    machine.serve(own.service, &[own.server]);
    (machine, own)
}

/// Back out by the interface, to who sent it.
pub(crate) fn back(mut packet: Vec<u8>) -> Ran {
    let (gateway, rest) = packet.split_at_mut(6);
    gateway.swap_with_slice(&mut rest[..6]);
    let verdict = Verdict::Returned;
    Ran { verdict, packet }
}

fn counted(machine: &Machine, counter: PacketCounter) -> u64 {
    machine.counted().get(&counter).copied().unwrap_or_default()
}

#[test]
fn a_client_that_is_its_own_endpoint_gets_its_packets_back() {
    for net in &nets() {
        let (machine, own) = served(net);
        let Own {
            client,
            server,
            service,
            seen,
        } = own;
        for payload in [&b""[..], b"odd", &[0xab; 1_400]] {
            let asked = machine.request(&udp(client, service, payload));
            assert_eq!(asked, back(udp(seen, server, payload)));
            let answered = machine.request(&udp(server, seen, payload));
            assert_eq!(answered, back(udp(service, client, payload)));
        }
        for (set, payload) in [(syn as fn(&mut _), &b""[..]), (ack, b"GET /"), (fin, b"")] {
            let asked = machine.request(&tcp(client, service, set, payload));
            assert_eq!(asked, back(tcp(seen, server, set, payload)));
            let set = |header: &mut TcpHeader| {
                set(header);
                header.ack = true;
            };
            let answered = machine.request(&tcp(server, seen, set, payload));
            assert_eq!(answered, back(tcp(service, client, set, payload)));
        }
        assert_eq!(counted(&machine, PacketCounter::Hairpin), 12);
        assert_eq!(counted(&machine, PacketCounter::FlowOpened), 2);
        // What was sent back leaves as it is.
        let left = udp(seen, server, b"?");
        assert_eq!(machine.answer(&left), next(left));
    }
}

#[test]
fn where_packets_begin_with_the_ip_header_too() {
    for net in &ip_nets() {
        let (machine, own) = served(net);
        let returned = |packet| Ran {
            verdict: Verdict::Returned,
            packet: without_ethernet(packet),
        };
        let payload = b"odd too";
        let asked = without_ethernet(udp(own.client, own.service, payload));
        let asked = machine.run("hf_requests_ip", &asked);
        assert_eq!(asked, returned(udp(own.seen, own.server, payload)));
    }
}

#[test]
fn what_is_no_answer_of_its_own_passes() {
    for net in &nets() {
        let (machine, own) = served(net);
        let asked = machine.request(&udp(own.client, own.service, b"?"));
        assert_eq!(asked.verdict, Verdict::Returned);
        let elsewhere = SocketAddr::new(net.router, own.seen.port());
        let another = SocketAddr::new(own.seen.ip(), own.seen.port() + 1);
        for packet in [
            udp(own.server, elsewhere, b"!"),
            udp(own.server, another, b"!"),
            udp(SocketAddr::new(own.server.ip(), 1), own.seen, b"!"),
        ] {
            assert_eq!(machine.request(&packet), next(packet));
        }
    }
}

#[test]
fn fragments_follow_the_first() {
    for net in &nets() {
        let (machine, own) = served(net);
        let payload = [7; 100];
        let ways = [
            ((own.client, own.service), (own.seen, own.server), 500),
            ((own.server, own.seen), (own.service, own.client), 9),
        ];
        for ((from, to), (from_back, to_back), id) in ways {
            let sent = fragments(&udp(from, to, &payload), id, 48);
            let expected = fragments(&udp(from_back, to_back, &payload), id, 48);
            for (sent, expected) in sent.into_iter().zip(expected) {
                assert_eq!(machine.request(&sent), back(expected));
            }
        }
        assert_eq!(counted(&machine, PacketCounter::Hairpin), 4);
    }
}

#[test]
fn icmp_errors_go_to_the_other_end() {
    for net in &nets() {
        let (machine, own) = served(net);
        let Own {
            client,
            server,
            service,
            seen,
        } = own;
        let router = net.router;
        let packets: [&dyn Fn(SocketAddr, SocketAddr) -> Vec<u8>; 2] =
            [&|from, to| udp(from, to, b"question"), &|from, to| {
                tcp(from, to, ack, b"question")
            }];
        for packet in packets {
            let asked = machine.request(&packet(client, service));
            assert_eq!(asked, back(packet(seen, server)));
            for (got, sent) in [
                ((seen, server), (client, service)),
                ((service, client), (server, seen)),
            ] {
                for kind in IcmpError::ALL {
                    for bytes in [8, 20, 100] {
                        let quote = |(from, to)| {
                            let packet = packet(from, to);
                            packet[ETHERNET..packet.len().min(net.l4() + bytes)].to_vec()
                        };
                        for (by, shown) in [(client.ip(), service.ip()), (router, router)] {
                            let said = error(by, service.ip(), kind, &quote(got));
                            let expected = error(shown, client.ip(), kind, &quote(sent));
                            assert_eq!(machine.request(&said), back(expected));
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn it_is_chosen_like_any_other() {
    for net in &nets() {
        let own = own(net);
        let mut machine = Machine::new();
        machine.serve(own.service, &[own.server, net.endpoint]);
        // One of two 60 times: below 10⁻¹⁷.
        let verdicts = (0..60).map(|n| {
            let client = SocketAddr::new(own.client.ip(), 5_000 + n);
            machine.request(&udp(client, own.service, b"?")).verdict
        });
        let back = verdicts.filter(|verdict| *verdict == Verdict::Returned);
        assert!((1..60).contains(&back.count()));
    }
}

#[test]
fn a_device_speaks_with_itself_in_super_packets_and_in_fragments() {
    const BYTES: usize = 4 << 20;
    let mut lan = Lan::new();
    for family in &families() {
        let server = lan.in_client(|| TcpListener::bind((family.client, 0)).unwrap());
        lan.serve(family.service, &[server.local_addr().unwrap()]);
        let before = lan.counted(PacketCounter::Hairpin);
        let (client, accepted) = connected_to(&lan, family, &server, family.service.ip());
        transfer(&client, &accepted, BYTES);
        transfer(&accepted, &client, BYTES);
        let packets = lan.counted(PacketCounter::Hairpin) - before;
        println!("{}: {packets} packets", family.service);
        assert!(packets < 2 * BYTES as u64 / 1_448 / 2, "{packets}");

        let server = lan.in_client(|| UdpSocket::bind((family.client, 0)).unwrap());
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        lan.serve(family.service, &[server.local_addr().unwrap()]);
        let client = client_socket(&lan, family);
        for bytes in [1, 1_400, 4_000] {
            let seen = SocketAddr::new(family.service.ip(), client.local_addr().unwrap().port());
            ask_as(&client, &server, family, bytes, seen);
        }
        drop(server);
        client.connect(family.service).unwrap();
        client.send(b"?").unwrap();
        let error = client.recv(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
    assert_eq!(lan.counted(PacketCounter::ChangeFailed), 0);
}
