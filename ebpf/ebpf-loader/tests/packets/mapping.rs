//! LAN subnets under another range: built packets through the programs, byte for byte.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use aya::programs::{TestRun, TestRunOptions};
use ebpf_abi::MappingCounter::{self, *};
use ebpf_loader::mapping::{Mapping, Mappings};
use etherparse::{Icmpv4Type, Icmpv6Type, PacketBuilder};

use crate::wire::{self, IcmpError, ODD, error, fragments, tcp, udp, without_ethernet};

/// The verifier's work for each program, with room for a tenth more than when this was written.
const VERIFIED_INSTRUCTIONS_MAX: u32 = 3_600;

/// `TC_ACT_SHOT`, and `TC_ACT_UNSPEC`: on to the next program.
const DROPPED: u32 = 2;
const NEXT: u32 = u32::MAX;

/// One family's addresses. The kernel's test run takes the bytes of each source where an Ethernet header has
/// its type for that: see `wire::ip_nets`.
struct Net {
    /// In the LAN, and as the mesh sees it.
    device: SocketAddr,
    seen: SocketAddr,
    /// In the mesh.
    remote: SocketAddr,
    /// In no range.
    router: IpAddr,
}

fn nets() -> [Net; 2] {
    let net = |device: &str, seen: &str, remote: &str, router: &str| Net {
        device: device.parse().unwrap(),
        seen: seen.parse().unwrap(),
        remote: remote.parse().unwrap(),
        router: router.parse().unwrap(),
    };
    [
        net(
            "8.0.77.5:40001",
            "10.201.13.5:40001",
            "8.0.209.9:8080",
            "8.0.201.1",
        ),
        net(
            "[fd07:0:86dd:1234::5]:40001",
            "[fd20:1::234:0:0:0:5]:40001",
            "[fd00:9:86dd::9]:8080",
            "fd00:1:86dd::1",
        ),
    ]
}

fn mapping(lan: &str, seen_as: &str, length: u8) -> Mapping {
    Mapping {
        lan: lan.parse().unwrap(),
        seen_as: seen_as.parse().unwrap(),
        length,
    }
}

/// `device` is in both of its family: the longer prefix counts. Neither ends where a byte does.
fn gateway() -> Mappings {
    let mut mappings = Mappings::load().unwrap_or_else(|error| panic!("{error}\n{error:?}"));
    let wanted = [
        mapping("8.0.64.0", "10.201.0.0", 20),
        mapping("8.0.0.0", "10.9.0.0", 17),
        mapping("fd07:0:86dd:1000::", "fd20:1::", 52),
    ];
    assert_eq!(mappings.apply(&BTreeSet::from(wanted)).unwrap(), 0);
    mappings
}

#[track_caller]
fn run(mappings: &Mappings, leaving: bool, packet: &[u8]) -> (u32, Vec<u8>) {
    let mut out = vec![0; 4_096];
    let options = TestRunOptions {
        data_in: Some(packet),
        data_out: Some(&mut out),
        ..TestRunOptions::new()
    };
    let ran = mappings
        .program(leaving)
        .unwrap()
        .test_run(options)
        .unwrap();
    out.truncate(usize::try_from(ran.data_size_out).unwrap());
    (ran.return_value, out)
}

/// Both packets with Ethernet headers, which the programs do not see.
#[track_caller]
fn becomes(mappings: &Mappings, leaving: bool, packet: Vec<u8>, expected: Vec<u8>) {
    let ran = run(mappings, leaving, &without_ethernet(packet));
    assert_eq!(ran, (NEXT, without_ethernet(expected)));
}

#[track_caller]
fn counts(mappings: &Mappings, expected: &[(MappingCounter, u64)]) {
    let mut counted = mappings.counters().unwrap();
    counted.retain(|_, count| *count > 0);
    assert_eq!(counted, BTreeMap::from_iter(expected.iter().copied()));
}

fn echo(from: IpAddr, to: IpAddr) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = PacketBuilder::ethernet2([0; 6], [0; 6]).ip(wire::ip(from, to));
    let (code_u8, bytes5to8) = (0, [1, 2, 3, 4]);
    let written = if from.is_ipv4() {
        let kind = Icmpv4Type::Unknown {
            type_u8: 8,
            code_u8,
            bytes5to8,
        };
        builder.icmpv4(kind).write(&mut packet, b"long enough")
    } else {
        let kind = Icmpv6Type::Unknown {
            type_u8: 128,
            code_u8,
            bytes5to8,
        };
        builder.icmpv6(kind).write(&mut packet, b"long enough")
    };
    written.unwrap();
    packet
}

/// Packets between two, of every kind that has ports or a checksum of its own.
fn kinds(from: SocketAddr, to: SocketAddr) -> [Vec<u8>; 5] {
    let set = |header: &mut etherparse::TcpHeader| {
        header.ack = true;
        header.acknowledgment_number = 7;
    };
    [
        udp(from, to, ODD),
        udp(from, to, &[0xab; 1_001]),
        tcp(from, to, |header| header.syn = true, b""),
        tcp(from, to, set, b"GET /"),
        echo(from.ip(), to.ip()),
    ]
}

#[test]
fn a_device_is_known_by_its_other_address_and_reached_by_it() {
    for net in &nets() {
        let gateway = gateway();
        let out = kinds(net.device, net.remote).into_iter();
        for (packet, expected) in out.zip(kinds(net.seen, net.remote)) {
            becomes(&gateway, true, packet, expected);
        }
        let back = kinds(net.remote, net.seen).into_iter();
        for (packet, expected) in back.zip(kinds(net.remote, net.device)) {
            becomes(&gateway, false, packet, expected);
        }
        counts(&gateway, &[(Mapped, 10)]);
    }
}

#[test]
fn the_shorter_prefix_has_what_the_longer_does_not() {
    let gateway = gateway();
    let [net, _] = nets();
    let beside: SocketAddr = "8.0.3.200:1".parse().unwrap();
    let seen: SocketAddr = "10.9.3.200:1".parse().unwrap();
    becomes(
        &gateway,
        true,
        udp(beside, net.remote, ODD),
        udp(seen, net.remote, ODD),
    );
    becomes(
        &gateway,
        false,
        udp(net.remote, seen, ODD),
        udp(net.remote, beside, ODD),
    );
}

#[test]
fn a_checksum_that_is_not_there_stays_away_and_a_wrong_one_stays_wrong() {
    let [net, v6] = nets();
    let gateway = gateway();
    let check = wire::ETHERNET + 20 + 6;
    for bytes in [[0, 0], [0x12, 0x34]] {
        let mut packet = udp(net.device, net.remote, ODD);
        let mut expected = udp(net.seen, net.remote, ODD);
        let right = u16::from_be_bytes([packet[check], packet[check + 1]]);
        let becomes_right = u16::from_be_bytes([expected[check], expected[check + 1]]);
        packet[check..check + 2].copy_from_slice(&bytes);
        let wrong = u16::from_be_bytes(bytes);
        let changed = match wrong {
            0 => 0,
            // As wrong as before: the same difference in one's complement.
            _ => add(add(becomes_right, !right), wrong),
        };
        expected[check..check + 2].copy_from_slice(&changed.to_be_bytes());
        becomes(&gateway, true, packet, expected);
    }
    // IPv6 has no datagrams without (RFC 8200, 8.1): such a one is not made valid.
    let at = wire::ETHERNET + 40 + 6;
    let mut packet = without_ethernet(udp(v6.device, v6.remote, ODD));
    packet[at - wire::ETHERNET..][..2].fill(0);
    let (verdict, out) = run(&gateway, true, &packet);
    assert_eq!((verdict, &out[46..48]), (NEXT, &[0, 0][..]));
}

/// In one's complement (RFC 1071).
fn add(a: u16, b: u16) -> u16 {
    let (sum, carry) = a.overflowing_add(b);
    sum + u16::from(carry)
}

#[test]
fn fragments_change_each_by_itself_in_any_order() {
    for net in &nets() {
        let gateway = gateway();
        let payload = [0x5a; 400];
        let cut = |from, to| fragments(&udp(from, to, &payload), 77, 104);
        let out = cut(net.device, net.remote).into_iter();
        for (packet, expected) in out.zip(cut(net.seen, net.remote)).rev() {
            becomes(&gateway, true, packet, expected);
        }
        let back = cut(net.remote, net.seen).into_iter();
        for (packet, expected) in back.zip(cut(net.remote, net.device)).rev() {
            becomes(&gateway, false, packet, expected);
        }
        counts(&gateway, &[(Mapped, 4)]);
    }
}

#[test]
fn an_error_quotes_what_its_receiver_sent() {
    for net in &nets() {
        let gateway = gateway();
        let mut errors = 0;
        for kind in IcmpError::ALL {
            let sent = kinds(net.remote, net.seen).into_iter();
            for (sent, came) in sent.zip(kinds(net.remote, net.device)) {
                let (sent, came) = (without_ethernet(sent), without_ethernet(came));
                // By the device, which is mapped itself, and by a router or this gateway, which is not.
                for (from, as_seen) in [(net.device.ip(), net.seen.ip()), (net.router, net.router)]
                {
                    let packet = error(from, net.remote.ip(), kind, &came);
                    let expected = error(as_seen, net.remote.ip(), kind, &sent);
                    becomes(&gateway, true, packet, expected);
                    errors += 1;
                }
            }
            let sent = kinds(net.device, net.remote).into_iter();
            for (sent, came) in sent.zip(kinds(net.seen, net.remote)) {
                let (sent, came) = (without_ethernet(sent), without_ethernet(came));
                for from in [net.remote.ip(), net.router] {
                    let packet = error(from, net.seen.ip(), kind, &came);
                    let expected = error(from, net.device.ip(), kind, &sent);
                    becomes(&gateway, false, packet, expected);
                    errors += 1;
                }
            }
        }
        let outer = errors / 4 * 3;
        counts(
            &gateway,
            &[
                (Mapped, outer),
                (QuoteMapped, errors),
                (Passed, errors - outer),
            ],
        );
    }
}

#[test]
fn of_a_quote_that_is_cut_off_what_is_there_changes() {
    for net in &nets() {
        let gateway = gateway();
        let header = if net.device.is_ipv4() { 20 } else { 40 };
        let whole = |to| without_ethernet(tcp(net.remote, to, |header| header.syn = true, b""));
        // RFC 792: the header and 8 bytes, which do not have the checksum; and less than that.
        for length in [header + 8, header + 2, header, header - 5] {
            let (came, sent) = (&whole(net.device)[..length], &whole(net.seen)[..length]);
            let about = |quoted: &[u8]| {
                error(
                    net.router,
                    net.remote.ip(),
                    IcmpError::PortUnreachable,
                    quoted,
                )
            };
            let expected = if length < header { came } else { sent };
            becomes(&gateway, true, about(came), about(expected));
        }
    }
}

#[test]
fn what_is_in_no_range_passes_untouched() {
    for net in &nets() {
        let gateway = gateway();
        let other = SocketAddr::new(net.router, 53);
        let mut packets = kinds(other, net.remote).to_vec();
        packets.push(error(
            net.router,
            net.remote.ip(),
            IcmpError::TimeExceeded,
            &without_ethernet(udp(net.remote, other, ODD)),
        ));
        let all = u64::try_from(packets.len()).unwrap() * 2;
        for packet in packets {
            for leaving in [true, false] {
                becomes(&gateway, leaving, packet.clone(), packet.clone());
            }
        }
        counts(&gateway, &[(Passed, all)]);
        // Neither the device's own address where only the mesh's counts, nor the other way round.
        let packet = udp(net.remote, net.device, ODD);
        becomes(&gateway, false, packet.clone(), packet);
        let packet = udp(net.remote, net.seen, ODD);
        becomes(&gateway, true, packet.clone(), packet);
    }
}

#[test]
fn protocols_without_a_checksum_over_addresses_change_too() {
    for net in &nets() {
        let gateway = gateway();
        let at = if net.device.is_ipv4() { 9 } else { 6 };
        let gre = |from, to| {
            let mut packet = without_ethernet(udp(from, to, &[9; 64]));
            packet[at] = 47;
            if net.device.is_ipv4() {
                let check = header_check(&packet);
                packet[10..12].copy_from_slice(&check.to_be_bytes());
            }
            // What would be the checksum if it were UDP.
            let check = if net.device.is_ipv4() { 26 } else { 46 };
            packet[check..check + 2].fill(0x77);
            packet
        };
        let out = run(&gateway, true, &gre(net.device, net.remote));
        assert_eq!(out, (NEXT, gre(net.seen, net.remote)));
        let back = run(&gateway, false, &gre(net.remote, net.seen));
        assert_eq!(back, (NEXT, gre(net.remote, net.device)));
    }
}

/// Of an IPv4 header without options (RFC 791).
fn header_check(packet: &[u8]) -> u16 {
    let words = packet[..20].chunks_exact(2).enumerate();
    let words = words.filter(|(index, _)| *index != 5);
    !words.fold(0, |sum, (_, word)| {
        add(sum, u16::from_be_bytes([word[0], word[1]]))
    })
}

/// Behind so many headers of destination options.
fn behind_options(packet: &[u8], headers: u8) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let payload = u16::from_be_bytes([packet[4], packet[5]]) + 8 * u16::from(headers);
    packet[4..6].copy_from_slice(&payload.to_be_bytes());
    let mut next = std::mem::replace(&mut packet[6], 60);
    for _ in 0..headers {
        packet.splice(40..40, [next, 0, 1, 4, 0, 0, 0, 0]);
        next = 60;
    }
    packet
}

#[test]
fn what_cannot_be_changed_as_a_whole_is_dropped() {
    let [v4, v6] = nets();
    let gateway = gateway();
    let plain = without_ethernet(udp(v6.device, v6.remote, ODD));
    let expected = without_ethernet(udp(v6.seen, v6.remote, ODD));
    let ran = run(&gateway, true, &behind_options(&plain, 4));
    assert_eq!(ran, (NEXT, behind_options(&expected, 4)));
    assert_eq!(run(&gateway, true, &behind_options(&plain, 5)).0, DROPPED);
    // A source route, whose next address is not the last one.
    let mut routed = behind_options(&plain, 1);
    (routed[6], routed[43]) = (43, 1);
    assert_eq!(run(&gateway, true, &routed).0, DROPPED);
    // No ports: 12 bytes of options, and two behind them.
    let mut cut = without_ethernet(udp(v4.device, v4.remote, ODD));
    cut[0] = 0x48;
    cut.splice(20..20, [1; 12]);
    assert_eq!(run(&gateway, true, &cut[..34]).0, DROPPED);
    // Ports, but no checksum.
    let cut = &without_ethernet(tcp(v4.device, v4.remote, |_| {}, ODD))[..34];
    assert_eq!(run(&gateway, true, cut).0, DROPPED);
    counts(&gateway, &[(Mapped, 1), (Unreadable, 3), (ChangeFailed, 1)]);
    // In no range, none of it matters.
    let other = SocketAddr::new(v6.router, 1);
    let plain = without_ethernet(udp(other, v6.remote, ODD));
    for headers in [4, 5] {
        let packet = behind_options(&plain, headers);
        assert_eq!(run(&gateway, true, &packet), (NEXT, packet));
    }
}

#[test]
fn what_is_said_anew_replaces_what_was_and_what_has_no_room_is_counted() {
    let [net, _] = nets();
    let mut gateway = gateway();
    let moved = BTreeSet::from([mapping("8.0.64.0", "10.202.0.0", 20)]);
    assert_eq!(gateway.apply(&moved).unwrap(), 0);
    let seen: SocketAddr = "10.202.13.5:40001".parse().unwrap();
    let out = udp(seen, net.remote, ODD);
    becomes(&gateway, true, udp(net.device, net.remote, ODD), out);
    let packet = udp(net.remote, net.seen, ODD);
    becomes(&gateway, false, packet.clone(), packet);
    let many = (0..=u8::MAX).map(|n| Mapping {
        lan: [8, 1, n, 0].into(),
        seen_as: [10, 1, n, 0].into(),
        length: 24,
    });
    let one_more = mapping("9.0.0.0", "10.200.0.0", 24);
    let many: BTreeSet<_> = many.chain([one_more]).collect();
    assert_eq!(gateway.apply(&many).unwrap(), 1);
    assert_eq!(gateway.apply(&BTreeSet::new()).unwrap(), 0);
    let packet = udp(net.device, net.remote, ODD);
    becomes(&gateway, true, packet.clone(), packet);
}

#[test]
fn the_verifier_s_work_for_mapping_does_not_grow() {
    let gateway = gateway();
    for leaving in [true, false] {
        let info = gateway.program(leaving).unwrap().info().unwrap();
        let verified = info.verified_instruction_count().unwrap();
        println!("leaving {leaving}: {verified} instructions verified");
        assert!(verified <= VERIFIED_INSTRUCTIONS_MAX, "{verified}");
    }
}
