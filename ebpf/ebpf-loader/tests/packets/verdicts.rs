//! Every branch, with packets built for it: what comes out must be what etherparse builds.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use ebpf_abi::{Fragmented, FragmentedTo, NOTED_JIFFIES, PacketCounter, UDP_TIMEOUT_S};
use etherparse::{
    EtherType, IpHeaders, IpNumber, Ipv6RawExtHeader, Ipv6RoutingExtensions, TcpHeader,
};

use crate::{
    machine::{Machine, Ran, Verdict, next},
    wire::{self, ETHERNET, IcmpError, Net, error, fragments, nets, tcp, udp, udp_in},
};

/// The verifier's work for each program, with room for a tenth more than when this was written: it
/// gives up at a million.
const VERIFIED_INSTRUCTIONS_MAX: [(&str, u32); 8] = [
    ("hf_requests", 49_000),
    ("hf_answers_out", 15_900),
    ("hf_requests_ip", 48_200),
    ("hf_answers_ip", 14_700),
    ("hf_entering", 13_000),
    ("hf_leaving", 17_600),
    ("hf_redirect", 21_400),
    ("hf_redirect_ip", 1_012),
];

/// In a row.
const COST_PACKETS: u32 = 100_000;

pub(crate) fn syn(header: &mut TcpHeader) {
    header.syn = true;
}

pub(crate) fn ack(header: &mut TcpHeader) {
    header.ack = true;
    header.acknowledgment_number = 2_000;
}

pub(crate) fn syn_ack(header: &mut TcpHeader) {
    syn(header);
    ack(header);
}

pub(crate) fn fin(header: &mut TcpHeader) {
    header.fin = true;
    ack(header);
}

pub(crate) fn rst(header: &mut TcpHeader) {
    header.rst = true;
}

/// One service with one endpoint.
pub(crate) fn served(net: &Net) -> Machine {
    let mut machine = Machine::new();
    machine.serve(net.service, &[net.endpoint]);
    machine
}

#[track_caller]
fn assert_counted(machine: &Machine, expected: &[(PacketCounter, u64)]) {
    assert_eq!(
        machine.counted(),
        BTreeMap::from_iter(expected.iter().copied())
    );
}

pub(crate) fn port(addr: SocketAddr, port: u16) -> SocketAddr {
    SocketAddr::new(addr.ip(), port)
}

#[test]
fn requests_go_to_the_endpoint_and_answers_come_from_the_service() {
    for net in &nets() {
        let Net {
            client,
            service,
            endpoint,
            ..
        } = *net;
        let machine = served(net);
        for payload in [&b""[..], b"odd", &[0xab; 1_400]] {
            let asked = machine.request(&udp(client, service, payload));
            assert_eq!(asked, next(udp(client, endpoint, payload)));
            let answered = machine.answer(&udp(endpoint, client, payload));
            assert_eq!(answered, next(udp(service, client, payload)));
        }
        for (set, payload) in [(syn as fn(&mut _), &b""[..]), (ack, b"GET /"), (fin, b"")] {
            let asked = machine.request(&tcp(client, service, set, payload));
            assert_eq!(asked, next(tcp(client, endpoint, set, payload)));
            let answered = machine.answer(&tcp(endpoint, client, set, payload));
            assert_eq!(answered, next(tcp(service, client, set, payload)));
        }
        assert_counted(
            &machine,
            &[
                (PacketCounter::RequestTranslated, 6),
                (PacketCounter::FlowOpened, 2),
                (PacketCounter::AnswerTranslated, 6),
            ],
        );
    }
}

#[test]
fn what_is_no_service_passes_untouched() {
    for net in &nets() {
        let Net {
            client,
            service,
            endpoint,
            ..
        } = *net;
        let machine = served(net);
        for packet in [
            udp(client, port(service, 81), b"?"),
            tcp(client, endpoint, syn, b""),
        ] {
            assert_eq!(machine.request(&packet), next(packet));
        }
        for packet in [udp(endpoint, client, b"!"), tcp(service, client, ack, b"")] {
            assert_eq!(machine.answer(&packet), next(packet));
        }
        assert_counted(
            &machine,
            &[
                (PacketCounter::RequestPassed, 2),
                (PacketCounter::AnswerPassed, 2),
            ],
        );
    }
}

#[test]
fn other_protocols_and_other_hosts_pass_untouched() {
    for net in &nets() {
        let machine = served(net);
        let question = udp(net.client, net.service, b"?");
        let mut elsewhere = question.clone();
        elsewhere[5] = 9;
        let arp = wire::of_ether_type(&question, EtherType(0x0806));
        let mut gre = question.clone();
        gre[if net.v4() { ETHERNET + 9 } else { ETHERNET + 6 }] = 47;
        let mut version = question;
        version[ETHERNET] ^= 0x30;
        for packet in [elsewhere, arp, gre, version] {
            assert_eq!(machine.request(&packet), next(packet));
        }
        assert_counted(&machine, &[(PacketCounter::Other, 4)]);
    }
}

#[test]
fn a_udp_checksum_of_zero_stays_zero() {
    for net in &nets() {
        let machine = served(net);
        let without = |mut packet: Vec<u8>| {
            packet[net.l4() + 6..net.l4() + 8].fill(0);
            packet
        };
        let asked = machine.request(&without(udp(net.client, net.service, b"?")));
        assert_eq!(asked, next(without(udp(net.client, net.endpoint, b"?"))));
    }
}

#[test]
fn a_checksum_that_becomes_zero_is_written_as_all_ones() {
    for net in &nets() {
        let machine = served(net);
        let check =
            |packet: &[u8]| u16::from_be_bytes([packet[net.l4() + 6], packet[net.l4() + 7]]);
        // Of all payloads of two bytes, one makes it so.
        let mut payloads = (0..=u16::MAX).map(u16::to_be_bytes);
        let ones = |bytes: &[u8; 2]| check(&udp(net.client, net.endpoint, bytes)) == 0xffff;
        let payload = payloads.find(ones).unwrap();
        let asked = machine.request(&udp(net.client, net.service, &payload));
        assert_eq!(asked, next(udp(net.client, net.endpoint, &payload)));
    }
}

#[test]
fn a_wrong_checksum_stays_wrong() {
    for net in &nets() {
        let machine = served(net);
        let wrong = |mut packet: Vec<u8>| {
            *packet.last_mut().unwrap() ^= 1;
            packet
        };
        let asked = machine.request(&wrong(udp(net.client, net.service, b"?")));
        assert_eq!(asked, next(wrong(udp(net.client, net.endpoint, b"?"))));
    }
}

#[test]
fn options_and_extension_headers_stay_as_they_are() {
    let raw = |next| Ipv6RawExtHeader::new_raw(next, &[1, 4, 0, 0, 0, 0]).unwrap();
    for net in &nets() {
        let machine = served(net);
        let build = |to: SocketAddr| {
            let mut ip = wire::ip(net.client.ip(), to.ip());
            match &mut ip {
                IpHeaders::Ipv4(header, _) => header.options = [1, 1, 1, 1].into(),
                IpHeaders::Ipv6(_, extensions) => {
                    extensions.hop_by_hop_options = Some(raw(IpNumber::UDP));
                    extensions.destination_options = Some(raw(IpNumber::UDP));
                    extensions.routing = Some(Ipv6RoutingExtensions {
                        routing: raw(IpNumber::UDP),
                        final_destination_options: None,
                    });
                }
            }
            udp_in(ip, net.client.port(), to.port(), b"?")
        };
        let asked = build(net.service);
        if net.v4() {
            assert_eq!(machine.request(&asked), next(build(net.endpoint)));
            continue;
        }
        // The routing header says that 4 segments are left.
        assert_eq!(machine.request(&asked), next(asked.clone()));
        assert_counted(&machine, &[(PacketCounter::Extensions, 1)]);
        let arrived = |mut packet: Vec<u8>| {
            packet[net.l4() + 16 + 3] = 0;
            packet
        };
        let translated = machine.request(&arrived(asked));
        assert_eq!(translated, next(arrived(build(net.endpoint))));
    }
}

#[test]
fn more_extension_headers_than_looked_through_pass_untouched() {
    let [_, net] = nets();
    let machine = served(&net);
    for (count, counter) in [
        (4, PacketCounter::RequestTranslated),
        (5, PacketCounter::Extensions),
    ] {
        let mut packet = udp(net.client, net.service, b"?");
        let header = [IpNumber::IPV6_DESTINATION_OPTIONS.0, 0, 1, 4, 0, 0, 0, 0];
        let mut headers = header.repeat(count);
        headers[8 * (count - 1)] = IpNumber::UDP.0;
        packet.splice(net.l4()..net.l4(), headers);
        packet[ETHERNET + 6] = IpNumber::IPV6_DESTINATION_OPTIONS.0;
        packet[ETHERNET + 5] += u8::try_from(8 * count).unwrap();
        let ran = machine.request(&packet);
        assert_eq!(ran.verdict, Verdict::Next);
        assert_eq!(ran.packet == packet, counter == PacketCounter::Extensions);
        assert_eq!(machine.counted()[&counter], 1);
    }
}

#[test]
fn cut_short_anywhere_it_passes_untouched() {
    for net in &nets() {
        let machine = served(net);
        for whole in [
            udp(net.client, net.service, b"eight by"),
            tcp(net.client, net.service, syn, b""),
            error(net.router, net.service.ip(), IcmpError::TooBig, &[]),
        ] {
            // The kernel's test run asks for a whole IP header.
            for length in net.l4()..whole.len() {
                let cut = &whole[..length];
                assert_eq!(machine.request(cut), next(cut.to_vec()), "{length}");
            }
        }
        let counted = machine.counted();
        assert_eq!(
            counted.keys().collect::<Vec<_>>(),
            [&PacketCounter::Truncated]
        );
    }
}

#[test]
fn fragments_follow_the_first_and_unknown_ones_pass() {
    for net in &nets() {
        let Net {
            client,
            service,
            endpoint,
            ..
        } = *net;
        let mut machine = served(net);
        let payload = [7; 100];
        let [first, later] = fragments(&udp(client, service, &payload), 500, 48);
        let [to_first, to_later] = fragments(&udp(client, endpoint, &payload), 500, 48);
        assert_eq!(machine.request(&later), next(later.clone()));
        assert_eq!(machine.request(&first), next(to_first));
        for _ in 0..2 {
            assert_eq!(machine.request(&later), next(to_later.clone()));
        }
        let [_, other] = fragments(&udp(client, service, &payload), 501, 48);
        assert_eq!(machine.request(&other), next(other));

        let [first, answer] = fragments(&udp(endpoint, client, &payload), 9, 48);
        let [from_first, from_later] = fragments(&udp(service, client, &payload), 9, 48);
        assert_eq!(machine.answer(&first), next(from_first));
        assert_eq!(machine.answer(&answer), next(from_later));
        assert_counted(
            &machine,
            &[
                (PacketCounter::RequestTranslated, 1),
                (PacketCounter::FlowOpened, 1),
                (PacketCounter::AnswerTranslated, 1),
                (PacketCounter::FragmentTranslated, 3),
                (PacketCounter::FragmentPassed, 2),
            ],
        );

        // 31 s later the number may be another packet's.
        let mut map = machine.map::<Fragmented, FragmentedTo>("hf_fragmented");
        let entries: Vec<_> = map.iter().map(Result::unwrap).collect();
        for (key, mut to) in entries {
            to.seen_ns = to.seen_ns.wrapping_sub(31_000_000_000);
            map.insert(key, to, 0).unwrap();
        }
        assert_eq!(machine.request(&later), next(later));
        assert_eq!(machine.answer(&answer), next(answer));
    }
}

#[test]
fn a_first_fragment_without_a_transport_header_passes() {
    let [net, _] = nets();
    let machine = served(&net);
    let [tiny, _] = fragments(&tcp(net.client, net.service, syn, b""), 500, 8);
    assert_eq!(machine.request(&tiny), next(tiny));
    assert_counted(&machine, &[(PacketCounter::Truncated, 1)]);
}

/// What an ICMP error quotes: the IP header and so much behind it.
pub(crate) fn quote(packet: &[u8], net: &Net, bytes: usize) -> Vec<u8> {
    packet[ETHERNET..packet.len().min(net.l4() + bytes)].to_vec()
}

#[test]
fn icmp_errors_about_translated_packets_are_translated() {
    for net in &nets() {
        let Net {
            client,
            service,
            endpoint,
            router,
        } = *net;
        let machine = served(net);
        let sent_udp = udp(client, service, b"question");
        let sent_tcp = tcp(client, service, ack, b"question");
        for packet in [&sent_udp, &sent_tcp] {
            assert_eq!(machine.request(packet).verdict, Verdict::Next);
        }
        let mut errors = 0;
        for (sent, forwarded) in [
            (sent_udp, udp(client, endpoint, b"question")),
            (sent_tcp, tcp(client, endpoint, ack, b"question")),
        ] {
            for kind in IcmpError::ALL {
                // The least that RFC 792 asks for, the TCP header, and all.
                for bytes in [8, 20, 100] {
                    let saw = quote(&forwarded, net, bytes);
                    let knows = quote(&sent, net, bytes);
                    let by_router = machine.answer(&error(router, client.ip(), kind, &saw));
                    assert_eq!(by_router, next(error(router, client.ip(), kind, &knows)));
                    let by_endpoint =
                        machine.answer(&error(endpoint.ip(), client.ip(), kind, &saw));
                    assert_eq!(
                        by_endpoint,
                        next(error(service.ip(), client.ip(), kind, &knows))
                    );
                    errors += 2;
                }
            }
        }
        // The client's side complains about what the endpoint sent.
        for (came, sent) in [
            (
                udp(service, client, b"answer"),
                udp(endpoint, client, b"answer"),
            ),
            (
                tcp(service, client, ack, b"answer"),
                tcp(endpoint, client, ack, b"answer"),
            ),
        ] {
            for by in [client.ip(), router] {
                let saw = error(by, service.ip(), IcmpError::TooBig, &quote(&came, net, 100));
                let knows = error(
                    by,
                    endpoint.ip(),
                    IcmpError::TooBig,
                    &quote(&sent, net, 100),
                );
                assert_eq!(machine.request(&saw), next(knows));
                errors += 1;
            }
        }
        assert_eq!(machine.counted()[&PacketCounter::ErrorTranslated], errors);
    }
}

#[test]
fn icmp_about_anything_else_passes_untouched() {
    for net in &nets() {
        let Net {
            client,
            service,
            endpoint,
            router,
        } = *net;
        let machine = served(net);
        let about = quote(&udp(client, endpoint, b"?"), net, 8);
        let unknown = error(router, client.ip(), IcmpError::TooBig, &about);
        let short = error(
            router,
            client.ip(),
            IcmpError::TooBig,
            &about[..about.len() - 6],
        );
        for packet in [unknown, short] {
            assert_eq!(machine.answer(&packet), next(packet));
        }
        let mut echo = error(client.ip(), service.ip(), IcmpError::PortUnreachable, b"");
        echo[net.l4()] = if net.v4() { 8 } else { 128 };
        assert_eq!(machine.request(&echo), next(echo));
        assert_counted(
            &machine,
            &[(PacketCounter::ErrorPassed, 2), (PacketCounter::Other, 1)],
        );
    }
}

#[track_caller]
fn assert_returned(ran: Ran, packet: Vec<u8>) {
    let verdict = Verdict::Returned;
    assert_eq!(ran, Ran { verdict, packet });
}

#[test]
fn without_endpoints_tcp_gets_a_reset_at_once() {
    for net in &nets() {
        let Net {
            client, service, ..
        } = *net;
        let mut machine = Machine::new();
        machine.serve(service, &[]);
        let refused = machine.request(&tcp(client, service, syn, b""));
        let answers_syn = |header: &mut TcpHeader| {
            header.ack = true;
            header.acknowledgment_number = 1_001;
        };
        assert_returned(refused, wire::reset(service, client, answers_syn));
        let refused = machine.request(&tcp(client, service, ack, b"12345"));
        let answers_ack = |header: &mut TcpHeader| header.sequence_number = 2_000;
        assert_returned(refused, wire::reset(service, client, answers_ack));
        // Options, padding of the frame, and data without ACK.
        let mut padded = tcp(
            client,
            service,
            |header| {
                syn(header);
                header.set_options_raw(&[2, 4, 5, 180]).unwrap();
            },
            b"12345",
        );
        padded.extend([0; 6]);
        let answers_data = |header: &mut TcpHeader| {
            header.ack = true;
            header.acknowledgment_number = 1_006;
        };
        assert_returned(
            machine.request(&padded),
            wire::reset(service, client, answers_data),
        );
        assert_counted(&machine, &[(PacketCounter::RefusedTcp, 3)]);
    }
}

#[test]
fn without_endpoints_udp_gets_port_unreachable_at_once() {
    for net in &nets() {
        let Net {
            client, service, ..
        } = *net;
        let mut machine = Machine::new();
        machine.serve(service, &[]);
        let mut zero = udp(client, service, b"?");
        zero[net.l4() + 6..net.l4() + 8].fill(0);
        for asked in [
            udp(client, service, b""),
            udp(client, service, &[3; 1_400]),
            zero,
        ] {
            let expected = wire::refusal(service.ip(), client.ip(), &quote(&asked, net, 8));
            assert_returned(machine.request(&asked), expected);
        }
        assert_counted(&machine, &[(PacketCounter::RefusedUdp, 3)]);
    }
}

#[test]
fn what_cannot_be_refused_is_dropped() {
    for net in &nets() {
        let Net {
            client, service, ..
        } = *net;
        let mut machine = Machine::new();
        machine.serve(service, &[]);
        let [first, _] = fragments(&udp(client, service, &[7; 100]), 500, 48);
        for packet in [tcp(client, service, rst, b""), first] {
            assert_eq!(machine.request(&packet).verdict, Verdict::Dropped);
        }
        assert_counted(&machine, &[(PacketCounter::RefusedSilently, 2)]);
    }
}

/// Three endpoints, and which of them each packet goes to.
fn three(net: &Net) -> (Machine, [SocketAddr; 3]) {
    let mut machine = Machine::new();
    let endpoints = [1, 2, 3].map(|n| port(net.endpoint, n));
    machine.serve(net.service, &endpoints);
    (machine, endpoints)
}

#[track_caller]
fn went_to(machine: &Machine, net: &Net, packet: &[u8]) -> u16 {
    let ran = machine.request(packet);
    assert_eq!(ran.verdict, Verdict::Next);
    u16::from_be_bytes([ran.packet[net.l4() + 2], ran.packet[net.l4() + 3]])
}

/// As if the last packet of every flow had passed so long ago.
fn age(machine: &mut Machine, seconds: u32) {
    age_ms(machine, 1_000 * seconds);
}

pub(crate) fn age_ms(machine: &mut Machine, milliseconds: u32) {
    let ns = u64::from(milliseconds) * 1_000_000;
    let aged = machine.change_flows(|flow| {
        flow.seen_ns = flow.seen_ns.wrapping_sub(ns);
        flow.noted = flow.noted.wrapping_sub(NOTED_JIFFIES);
    });
    assert_ne!(aged, 0);
}

/// Chance of missing one of three endpoints in 60 tries, or of meeting one of two 60 times:
/// below 10⁻⁹.
const TRIES: u16 = 60;

#[test]
fn flows_spread_over_all_endpoints() {
    for net in &nets() {
        let (machine, _) = three(net);
        let reached: BTreeSet<u16> = (0..TRIES)
            .map(|n| {
                went_to(
                    &machine,
                    net,
                    &udp(port(net.client, 5_000 + n), net.service, b"?"),
                )
            })
            .collect();
        assert_eq!(reached, BTreeSet::from([1, 2, 3]));
    }
}

#[test]
fn an_open_flow_stays_whatever_becomes_of_the_list() {
    for net in &nets() {
        let (mut machine, endpoints) = three(net);
        let packets = [
            udp(net.client, net.service, b"?"),
            tcp(net.client, net.service, ack, b"?"),
        ];
        let at = packets
            .each_ref()
            .map(|packet| went_to(&machine, net, packet));
        for left in [&endpoints[..1], &endpoints[2..], &[]] {
            machine.serve(net.service, left);
            let now = packets
                .each_ref()
                .map(|packet| went_to(&machine, net, packet));
            assert_eq!(now, at);
        }
    }
}

#[test]
fn a_flow_ends_by_its_timeout() {
    for net in &nets() {
        let (mut machine, _) = three(net);
        let question = udp(net.client, net.service, b"?");
        let opened = |machine: &Machine| machine.counted()[&PacketCounter::FlowOpened];
        let from = port(net.endpoint, went_to(&machine, net, &question));
        let answer = udp(from, net.client, b"!");
        age(&mut machine, UDP_TIMEOUT_S - 10);
        went_to(&machine, net, &question);
        age(&mut machine, UDP_TIMEOUT_S - 10);
        let shown = next(udp(net.service, net.client, b"!"));
        assert_eq!(machine.answer(&answer), shown);
        // Its answers keep it as well.
        age(&mut machine, UDP_TIMEOUT_S - 10);
        went_to(&machine, net, &question);
        assert_eq!(opened(&machine), 1);
        age(&mut machine, UDP_TIMEOUT_S + 1);
        assert_eq!(machine.answer(&answer), next(answer));
        went_to(&machine, net, &question);
        assert_eq!(opened(&machine), 2);
    }
}

#[test]
fn tcp_stays_open_for_a_day_and_a_closed_flow_starts_anew() {
    for net in &nets() {
        let (mut machine, _) = three(net);
        let segment = |set: fn(&mut _)| tcp(net.client, net.service, set, b"");
        let opened = |machine: &Machine| machine.counted()[&PacketCounter::FlowOpened];
        let at = went_to(&machine, net, &segment(syn));
        let from = port(net.endpoint, at);
        let answer = |machine: &Machine, set: fn(&mut _)| {
            let ran = machine.answer(&tcp(from, net.client, set, b""));
            assert_eq!(ran, next(tcp(net.service, net.client, set, b"")));
        };
        // A repeated SYN is of the same flow.
        assert_eq!(went_to(&machine, net, &segment(syn)), at);
        answer(&machine, ack);
        age(&mut machine, 86_000);
        assert_eq!(went_to(&machine, net, &segment(ack)), at);
        answer(&machine, fin);
        age(&mut machine, 86_000); // Half closed is open.
        assert_eq!(went_to(&machine, net, &segment(fin)), at);
        answer(&machine, ack);
        assert_eq!(opened(&machine), 1);
        went_to(&machine, net, &segment(syn));
        assert_eq!(opened(&machine), 2);
        // Without an answer, and after a reset, it is soon over.
        age(&mut machine, 241);
        went_to(&machine, net, &segment(ack));
        assert_eq!(opened(&machine), 3);
        went_to(&machine, net, &segment(rst));
        went_to(&machine, net, &segment(syn));
        assert_eq!(opened(&machine), 4);
    }
}

#[test]
fn where_there_is_another_endpoint_nobody_is_refused() {
    for net in &nets() {
        let mut machine = Machine::new();
        let taken = port(net.endpoint, 1);
        let free = port(net.endpoint, 2);
        let other = port(net.service, 443);
        machine.serve(other, &[taken]);
        machine.serve(net.service, &[taken, free]);
        for n in 0..TRIES {
            let client = port(net.client, 5_000 + n);
            went_to(&machine, net, &udp(client, other, b"?"));
            let question = udp(client, net.service, b"?");
            assert_eq!(went_to(&machine, net, &question), free.port());
        }
    }
}

/// What became of a checksum when the addresses changed says whether it has yet to be completed: not here, where they change
/// nothing of it.
#[test]
fn the_port_is_in_the_checksum_where_the_addresses_have_the_same_sum() {
    let [v4, v6] = nets();
    let ends = [
        (v4, "10.96.10.9:80", "10.9.10.96:8080"),
        (v6, "[fd96:9::1]:80", "[fd96:1::9]:8080"),
    ];
    for (net, service, endpoint) in ends {
        let (client, service, endpoint) = (
            net.client,
            service.parse().unwrap(),
            endpoint.parse().unwrap(),
        );
        let mut machine = Machine::new();
        machine.serve(service, &[endpoint]);
        for _ in 0..2 {
            let asked = machine.request(&udp(client, service, b"odd"));
            assert_eq!(asked, next(udp(client, endpoint, b"odd")));
            let answered = machine.answer(&udp(endpoint, client, b"odd"));
            assert_eq!(answered, next(udp(service, client, b"odd")));
            let asked = machine.request(&tcp(client, service, ack, b"odd"));
            assert_eq!(asked, next(tcp(client, endpoint, ack, b"odd")));
            let answered = machine.answer(&tcp(endpoint, client, ack, b"odd"));
            assert_eq!(answered, next(tcp(service, client, ack, b"odd")));
        }
    }
}

#[test]
fn two_services_of_one_endpoint_are_not_confused() {
    for net in &nets() {
        let other = port(net.service, 443);
        let mut machine = served(net);
        machine.serve(other, &[net.endpoint]);
        let question = udp(net.client, net.service, b"?");
        went_to(&machine, net, &question);
        // The same four addresses and ports at the endpoint: its answers could be either's.
        let refused = machine.request(&udp(net.client, other, b"?"));
        assert_eq!(refused.verdict, Verdict::Returned);
        let from_another_port = port(net.client, 40_002);
        went_to(&machine, net, &udp(from_another_port, other, b"?"));
        let answer = machine.answer(&udp(net.endpoint, from_another_port, b"!"));
        assert_eq!(answer, next(udp(other, from_another_port, b"!")));
        let answer = machine.answer(&udp(net.endpoint, net.client, b"!"));
        assert_eq!(answer, next(udp(net.service, net.client, b"!")));
        assert_eq!(machine.counted()[&PacketCounter::Clash], 1);
        // Once the first flow is over, the second may have its place.
        age(&mut machine, UDP_TIMEOUT_S + 1);
        went_to(&machine, net, &udp(net.client, other, b"?"));
    }
}

#[test]
fn a_direct_connect_takes_the_place_of_a_flow_that_ended_and_not_of_one_that_goes_on() {
    for net in &nets() {
        let machine = served(net);
        let asks = |to, set: fn(&mut _)| machine.request(&tcp(net.client, to, set, b""));
        let answers = || machine.answer(&tcp(net.endpoint, net.client, ack, b""));
        let of = |from| next(tcp(from, net.client, ack, b""));
        let direct = |machine: &Machine| {
            let packet = tcp(net.client, net.endpoint, syn, b"");
            assert_eq!(machine.request(&packet), next(packet.clone()));
        };
        asks(net.service, syn);
        assert_eq!(answers(), of(net.service));
        direct(&machine);
        assert_eq!(answers(), of(net.service), "its flow goes on");
        asks(net.service, rst);
        assert_eq!(
            answers(),
            of(net.service),
            "late words of a flow that ended"
        );
        direct(&machine);
        assert_eq!(answers(), of(net.endpoint));
        // And the service may have the place again.
        asks(net.service, syn);
        assert_eq!(answers(), of(net.service));
    }
}

/// A segment that opens a flow each time, the last one's end being in it.
fn syn_and_rst(header: &mut TcpHeader) {
    header.syn = true;
    header.rst = true;
}

#[test]
fn what_a_packet_costs() {
    for net in &nets() {
        let mut machine = Machine::new();
        // Its own endpoint, so that the same packet can be translated again and again.
        machine.serve(net.service, &[net.service]);
        let costs = [
            (
                "other datagram",
                "hf_requests",
                udp(net.client, net.endpoint, b"?"),
            ),
            (
                "other segment",
                "hf_requests",
                tcp(net.client, net.endpoint, ack, b"?"),
            ),
            (
                "datagram",
                "hf_requests",
                udp(net.client, net.service, b"?"),
            ),
            (
                "its answer",
                "hf_answers_out",
                udp(net.service, net.client, b"!"),
            ),
            (
                "other answer",
                "hf_answers_out",
                udp(net.endpoint, net.client, b"!"),
            ),
            (
                "first segment",
                "hf_requests",
                tcp(net.client, net.service, syn_and_rst, b""),
            ),
            (
                "segment",
                "hf_requests",
                tcp(port(net.client, 7), net.service, ack, b"?"),
            ),
            (
                "its answer",
                "hf_answers_out",
                tcp(net.service, port(net.client, 7), ack, b"!"),
            ),
        ];
        let costs = costs
            .map(|(what, program, packet)| (what, machine.cost(program, &packet, COST_PACKETS)));
        println!("{}: {costs:?}", net.service);
        let counted = machine.counted();
        // What a signal interrupted was begun again.
        let times = u64::from(COST_PACKETS);
        for (counter, least) in [
            (PacketCounter::RequestTranslated, 3 * times),
            (PacketCounter::AnswerTranslated, 2 * times),
            (PacketCounter::FlowOpened, times + 2),
            (PacketCounter::RequestPassed, 2 * times),
            (PacketCounter::AnswerPassed, times),
        ] {
            assert!(counted[&counter] >= least, "{counter:?}: {counted:?}");
        }
        assert_eq!(counted.len(), 5, "{counted:?}");
        // Fifty times more than here: what is looked through one by one would show.
        let most = costs.iter().map(|(_, cost)| *cost).max().unwrap();
        assert!(most < Duration::from_micros(40), "{costs:?}");
    }
}

/// As many as Linux has ports for one service, of 32,768 to 60,999 every other one.
const CONNECTS: u16 = 14_116;

/// Medians of [`CONNECTS`] from ports that come one after the other: each flow has a place that the processor's caches have
/// not.
fn connects(machine: &Machine, net: &Net, first: u16) -> [Duration; 3] {
    let costs = (0..CONNECTS).map(|number| {
        let client = port(net.client, first + 2 * number);
        [
            ("hf_requests", tcp(client, net.service, syn, b"")),
            ("hf_answers_out", tcp(net.endpoint, client, syn_ack, b"")),
            ("hf_requests", tcp(client, net.service, ack, b"")),
        ]
        .map(|(program, packet)| machine.cost(program, &packet, 1))
    });
    let mut costs: Vec<_> = costs.collect();
    [0, 1, 2].map(|packet| {
        costs.sort_unstable_by_key(|costs| costs[packet]);
        costs[costs.len() / 2][packet]
    })
}

#[test]
fn what_a_connect_costs() {
    for net in &nets() {
        let mut machine = Machine::new();
        machine.serve(net.service, &[net.endpoint]);
        let empty = connects(&machine, net, 32_768);
        // 24 for each set, which has 15 places: hardly a place is nobody's.
        for number in 1..=u16::MAX {
            let from = |ip| SocketAddr::new(ip, number);
            let (client, other) = (from(net.client.ip()), from(net.router));
            machine.request(&udp(client, net.service, b"?"));
            machine.request(&udp(other, net.service, b"?"));
            machine.request(&tcp(other, net.service, syn, b""));
        }
        age_ms(&mut machine, 1_000_000);
        let full = connects(&machine, net, 32_769);
        let service = net.service;
        println!("{service}: {empty:?}, all places taken {full:?}, the clock's own included");
        let counted = machine.counted();
        assert!(
            counted[&PacketCounter::AnswerTranslated] >= 2 * u64::from(CONNECTS),
            "{counted:?}"
        );
        let most = empty.iter().chain(&full).max().unwrap();
        assert!(*most < Duration::from_micros(40), "{empty:?} {full:?}");
    }
}

#[test]
fn the_verifier_s_work_does_not_grow() {
    let machine = Machine::new();
    for (name, most) in VERIFIED_INSTRUCTIONS_MAX {
        let info = machine.program(name).info().unwrap();
        let verified = info.verified_instruction_count().unwrap();
        let size = info.size_translated().unwrap() / 8;
        println!("{name}: {verified} instructions verified, {size} long");
        assert!(verified <= most, "{name}: {verified}");
    }
}
