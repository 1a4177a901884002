//! What packets begin with: Ethernet's header with a VLAN tag or without, or the IP header itself.

use std::collections::BTreeMap;

use ebpf_abi::PacketCounter;
use etherparse::TcpHeader;

use crate::{
    machine::{Machine, Ran, Verdict, next},
    wire::{Net, ODD, ip_nets, nets, reset, tcp, udp, without_ethernet},
};

/// Where the Ethernet header's type is.
const TYPE: usize = 12;

/// Two kinds of tags: 802.1Q's, and the outer one of 802.1ad.
const TAGS: [[u8; 4]; 2] = [[0x81, 0, 0, 5], [0x88, 0xa8, 0, 5]];

fn tagged(mut packet: Vec<u8>, tag: [u8; 4]) -> Vec<u8> {
    packet.splice(TYPE..TYPE, tag);
    packet
}

fn syn(header: &mut TcpHeader) {
    header.syn = true;
}

#[test]
fn one_vlan_tag_in_the_packet_stays_in_it() {
    for net in &nets() {
        let Net {
            client,
            service,
            endpoint,
            ..
        } = *net;
        let mut machine = Machine::new();
        machine.serve(service, &[endpoint]);
        for tag in TAGS {
            let tagged = |packet| tagged(packet, tag);
            let asked = machine.request(&tagged(udp(client, service, b"odd")));
            assert_eq!(asked, next(tagged(udp(client, endpoint, b"odd"))));
            let answered = machine.answer(&tagged(udp(endpoint, client, b"odd")));
            assert_eq!(answered, next(tagged(udp(service, client, b"odd"))));
            let twice = tagged(tagged(udp(client, service, b"odd")));
            assert_eq!(machine.request(&twice), next(twice));
        }
        // The kernel makes no room behind such a tag: no answer can be given.
        machine.serve(service, &[]);
        for packet in [tcp(client, service, syn, b""), udp(client, endpoint, b"?")] {
            machine.request(&tagged(packet, [0x81, 0, 0, 5]));
        }
        let expected = [
            (PacketCounter::RequestTranslated, 2),
            (PacketCounter::FlowOpened, 1),
            (PacketCounter::AnswerTranslated, 2),
            (PacketCounter::RefusedSilently, 1),
            (PacketCounter::RequestPassed, 1),
            (PacketCounter::Other, 2),
        ];
        assert_eq!(machine.counted(), BTreeMap::from(expected));
    }
}

#[test]
fn packets_without_ethernet_header_are_served() {
    for net in &ip_nets() {
        let Net {
            client,
            service,
            endpoint,
            ..
        } = *net;
        let mut machine = Machine::new();
        machine.serve(service, &[endpoint]);
        let request = |packet| machine.run("hf_requests_ip", &without_ethernet(packet));
        let answer = |packet| machine.run("hf_answers_ip", &without_ethernet(packet));
        let next = |packet| next(without_ethernet(packet));
        let (asked, translated) = (udp(client, service, ODD), udp(client, endpoint, ODD));
        assert_eq!(request(asked), next(translated));
        let (said, shown) = (udp(endpoint, client, ODD), udp(service, client, ODD));
        assert_eq!(answer(said), next(shown));
        let asked = tcp(client, service, syn, b"");
        assert_eq!(request(asked), next(tcp(client, endpoint, syn, b"")));
        let other = tcp(client, endpoint, syn, b"");
        assert_eq!(request(other.clone()), next(other));
    }
}

#[test]
fn a_refusal_without_ethernet_header_begins_with_the_ip_header() {
    for net in &ip_nets() {
        let mut machine = Machine::new();
        machine.serve(net.service, &[]);
        let asked = without_ethernet(tcp(net.client, net.service, syn, b""));
        let expected = reset(net.service, net.client, |header| {
            header.ack = true;
            header.acknowledgment_number = 1_001;
        });
        let refused = machine.run("hf_requests_ip", &asked);
        let expected = Ran {
            verdict: Verdict::Returned,
            packet: without_ethernet(expected),
        };
        assert_eq!(refused, expected);
    }
}
