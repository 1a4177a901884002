//! Who may speak with whom: built packets through the programs of policy.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
};

use aya::programs::{TestRun, TestRunOptions};
use ebpf_abi::PolicyCounter::{self, *};
use ebpf_loader::policy::{
    At,
    Direction::{self, In, Out},
    Pair, PairRules, Policy, PortPrefix, Tables, Verdict,
};
use etherparse::{Icmpv4Type, Icmpv6Type, IpNumber, PacketBuilder};

use crate::{
    machine::{TCP, UDP, uninterrupted},
    wire::{self, ETHERNET, IcmpError, Net, ip_nets, without_ethernet},
};

mod differential;
mod interfaces;
mod new_pods;

/// Nobody in particular, this node, and a friend of it.
const ANYBODY: u32 = 1;
const OWN: u32 = 2;
const FRIEND: u32 = 3;

const ALLOWER: u32 = 70_000;
const DENIER: u32 = 9;

/// A half more than the most that was seen (`ebpf/README.md`): compilers and verifiers differ.
const VERIFIED_AT_TUNNEL_MAX: u32 = 20_800;
const VERIFIED_AT_POD_MAX: u32 = 25_100;

/// `TC_ACT_SHOT`.
const DROPPED: u32 = 2;

const ALLOWED: Verdict = Verdict {
    allowed: true,
    audited: false,
    decider: ALLOWER,
};
const DENIED: Verdict = Verdict {
    allowed: false,
    audited: false,
    decider: DENIER,
};
const AUDITED: Verdict = Verdict {
    allowed: true,
    audited: true,
    decider: DENIER,
};

/// `endpoint` is this node, `client` its friend, `router` anybody.
struct Lab {
    policy: Policy,
    tables: Tables,
}

fn rules(strictest: Verdict, set: Option<u32>) -> PairRules {
    let rule_set = set.map(|set| NonZeroU32::new(set).unwrap());
    PairRules {
        strictest,
        rule_set,
    }
}

impl Lab {
    /// The friend may call 8080 by TCP and 53 by UDP. This node may call anybody, but not its friend.
    fn new() -> Self {
        let mut tables = Tables {
            enforced: true,
            ..Tables::default()
        };
        for net in ip_nets() {
            let (all, bits) = if net.v4() {
                ("0.0.0.0", 32)
            } else {
                ("::", 128)
            };
            tables.addresses.insert((all.parse().unwrap(), 0), ANYBODY);
            tables.addresses.insert((net.endpoint.ip(), bits), OWN);
            tables.addresses.insert((net.client.ip(), bits), FRIEND);
        }
        let mut lab = Self {
            policy: Policy::load(None).unwrap_or_else(|error| panic!("{error}\n{error:?}")),
            tables,
        };
        lab.ports(1, &[(TCP, 8080, ALLOWED), (UDP, 53, ALLOWED)]);
        lab.pair(FRIEND, In, DENIED, Some(1));
        lab.pair(FRIEND, Out, DENIED, None);
        lab.pair(ANYBODY, In, DENIED, None);
        lab.pair(ANYBODY, Out, ALLOWED, None);
        lab.apply();
        lab
    }

    fn pair(&mut self, remote: u32, direction: Direction, strictest: Verdict, set: Option<u32>) {
        let pair = Pair {
            local: OWN,
            remote,
            direction,
        };
        self.tables.pairs.insert(pair, rules(strictest, set));
    }

    /// Denied but for these.
    fn ports(&mut self, rule_set: u32, ports: &[(u8, u16, Verdict)]) {
        let prefix = |protocol, port, bits| PortPrefix {
            rule_set,
            protocol,
            port,
            bits,
        };
        self.tables.ports.insert(prefix(None, 0, 0), DENIED);
        for &(protocol, port, verdict) in ports {
            self.tables
                .ports
                .insert(prefix(Some(protocol), 0, 0), DENIED);
            self.tables
                .ports
                .insert(prefix(Some(protocol), port, 16), verdict);
        }
    }

    fn apply(&mut self) {
        self.policy.apply(&self.tables).unwrap();
    }

    /// Whether the packet, built with an Ethernet header, passes.
    #[track_caller]
    fn passes(&self, direction: Direction, packet: &[u8]) -> bool {
        self.run(direction, &without_ethernet(packet.to_vec()))
    }

    #[track_caller]
    fn run(&self, direction: Direction, packet: &[u8]) -> bool {
        let options = TestRunOptions {
            data_in: Some(packet),
            ..TestRunOptions::new()
        };
        let program = self.policy.program(At::Tunnel, direction).unwrap();
        let ran = program.test_run(options).unwrap();
        match ran.return_value {
            u32::MAX => true, // TC_ACT_UNSPEC: on to the next.
            DROPPED => false,
            other => panic!("neither passed nor dropped: {other}"),
        }
    }

    /// What was counted since the last time, and how often.
    #[track_caller]
    fn counted(
        &self,
        before: &mut BTreeMap<PolicyCounter, u64>,
        expected: &[(PolicyCounter, u64)],
    ) {
        let now = self.policy.counters().unwrap();
        let new = now.iter().filter_map(|(&counter, &count)| {
            let new = count - before.get(&counter).copied().unwrap_or_default();
            (new > 0).then_some((counter, new))
        });
        let mut expected = expected.to_vec();
        expected.sort();
        assert_eq!(new.collect::<Vec<_>>(), expected);
        *before = now;
    }
}

fn syn(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    wire::tcp(from, to, |tcp| tcp.syn = true, b"")
}

fn ack(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    wire::tcp(from, to, |tcp| tcp.ack = true, b"data")
}

fn at(address: SocketAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address.ip(), port)
}

fn echo(from: IpAddr, to: IpAddr, reply: bool, id: u16) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = PacketBuilder::ethernet2([0; 6], [0; 6]).ip(wire::ip(from, to));
    let [high, low] = id.to_be_bytes();
    let bytes5to8 = [high, low, 0, 1];
    let code_u8 = 0;
    let written = if from.is_ipv4() {
        let type_u8 = if reply { 0 } else { 8 };
        let kind = Icmpv4Type::Unknown {
            type_u8,
            code_u8,
            bytes5to8,
        };
        builder.icmpv4(kind).write(&mut packet, b"long enough")
    } else {
        let type_u8 = if reply { 129 } else { 128 };
        let kind = Icmpv6Type::Unknown {
            type_u8,
            code_u8,
            bytes5to8,
        };
        builder.icmpv6(kind).write(&mut packet, b"long enough")
    };
    written.unwrap();
    packet
}

#[test]
fn what_a_class_may_call_is_by_protocol_and_port_and_answers_pass() {
    for Net {
        client,
        endpoint,
        router,
        ..
    } in ip_nets()
    {
        let lab = Lab::new();
        let mut counted = BTreeMap::new();
        assert!(lab.passes(In, &syn(client, endpoint)));
        lab.counted(&mut counted, &[(FlowOpened, 1), (Passed, 1)]);
        let synack = wire::tcp(
            endpoint,
            client,
            |tcp| (tcp.syn, tcp.ack) = (true, true),
            b"",
        );
        assert!(lab.passes(Out, &synack));
        assert!(lab.passes(Out, &ack(endpoint, client)));
        lab.counted(&mut counted, &[(Answered, 2)]);
        assert!(lab.passes(In, &ack(client, endpoint)));
        lab.counted(&mut counted, &[(Passed, 1)]);
        // The same ports in the other direction are another flow.
        assert!(!lab.passes(Out, &syn(endpoint, client)));
        for (from, to) in [
            (client, at(endpoint, 8081)),
            (client, at(endpoint, 0)),
            (SocketAddr::new(router, 1), endpoint),
        ] {
            assert!(!lab.passes(In, &syn(from, to)), "{from} {to}");
            assert!(!lab.passes(In, &ack(from, to)), "{from} {to}");
        }
        lab.counted(&mut counted, &[(Denied, 7)]);
        assert!(!lab.passes(In, &wire::udp(client, endpoint, wire::ODD)));
        assert!(lab.passes(In, &wire::udp(client, at(endpoint, 53), b"a question")));
        assert!(lab.passes(Out, &wire::udp(at(endpoint, 53), client, b"answer")));
        assert!(!lab.passes(Out, &wire::udp(at(endpoint, 54), client, b"answer")));
        assert!(!lab.passes(In, &echo(client.ip(), endpoint.ip(), false, 53)));
    }
}

#[test]
fn answers_pass_only_after_the_flow() {
    for net in ip_nets() {
        let lab = Lab::new();
        let other = SocketAddr::new(net.router, 443);
        assert!(!lab.passes(In, &ack(other, net.endpoint)));
        assert!(lab.passes(Out, &syn(net.endpoint, other)));
        assert!(lab.passes(In, &ack(other, net.endpoint)));
        assert!(!lab.passes(In, &ack(other, at(net.endpoint, 9))));
        let (own, other) = (net.endpoint.ip(), net.router);
        assert!(!lab.passes(In, &echo(other, own, true, 7)));
        assert!(lab.passes(Out, &echo(own, other, false, 7)));
        assert!(lab.passes(In, &echo(other, own, true, 7)));
        assert!(!lab.passes(In, &echo(other, own, true, 8)));
        assert!(!lab.passes(In, &echo(other, own, false, 7)));
    }
}

#[test]
fn an_open_flow_is_cut_both_ways_by_a_change_and_goes_on_after_another() {
    for Net {
        client, endpoint, ..
    } in ip_nets()
    {
        let mut lab = Lab::new();
        let mut counted = BTreeMap::new();
        // What may call the other way must not open it anew, the other way round.
        lab.pair(FRIEND, Out, ALLOWED, None);
        lab.apply();
        assert!(lab.passes(In, &syn(client, endpoint)));
        assert!(lab.passes(Out, &ack(endpoint, client)));
        let udp = wire::udp(client, at(endpoint, 53), b"a question");
        assert!(lab.passes(In, &udp));
        lab.counted(&mut counted, &[(FlowOpened, 2), (Passed, 2), (Answered, 1)]);
        lab.ports(2, &[]);
        lab.pair(FRIEND, In, DENIED, Some(2));
        lab.apply();
        for _ in 0..2 {
            assert!(!lab.passes(Out, &ack(endpoint, client)));
            assert!(!lab.passes(In, &ack(client, endpoint)));
            assert!(!lab.passes(In, &udp));
        }
        lab.counted(&mut counted, &[(FlowEnded, 6)]);
        lab.pair(FRIEND, In, DENIED, Some(1));
        lab.apply();
        assert!(lab.passes(In, &ack(client, endpoint)));
        assert!(lab.passes(Out, &ack(endpoint, client)));
        lab.counted(&mut counted, &[(Passed, 1), (Answered, 1)]);
    }
}

/// As after a restart, and where there were no policies until now.
#[test]
fn a_flow_that_nobody_remembers_is_judged_by_who_has_a_port_that_is_given_out() {
    for Net {
        client, endpoint, ..
    } in ip_nets()
    {
        let lab = Lab::new();
        assert!(lab.passes(Out, &ack(endpoint, client)));
        assert!(lab.passes(In, &ack(client, endpoint)));
        // With SYN it is no answer.
        let mut lab = Lab::new();
        assert!(!lab.passes(Out, &syn(endpoint, client)));
        // Denied to the caller, though the called end may call.
        lab.ports(2, &[]);
        lab.pair(FRIEND, In, DENIED, Some(2));
        lab.pair(FRIEND, Out, ALLOWED, None);
        lab.apply();
        for _ in 0..2 {
            assert!(!lab.passes(Out, &ack(endpoint, client)));
            assert!(!lab.passes(In, &ack(client, endpoint)));
        }
        assert!(lab.passes(Out, &syn(endpoint, client)));
    }
}

#[test]
fn audit_passes_counts_and_tells() {
    for Net {
        client, endpoint, ..
    } in ip_nets()
    {
        let mut lab = Lab::new();
        let mut counted = BTreeMap::new();
        lab.ports(2, &[(TCP, 8080, AUDITED)]);
        lab.pair(FRIEND, In, DENIED, Some(2));
        lab.apply();
        assert!(lab.passes(In, &syn(client, endpoint)));
        assert!(lab.passes(In, &ack(client, endpoint)));
        lab.counted(&mut counted, &[(FlowOpened, 1), (Audited, 2)]);
        let told: Vec<_> = lab.policy.events().copied().collect();
        assert_eq!(told.len(), 1);
        assert_eq!((told[0].from, told[0].to), (client, endpoint));
        assert_eq!((told[0].protocol, told[0].direction), (TCP, In));
        assert_eq!(told[0].verdict, AUDITED);
    }
}

#[test]
fn events_are_few_and_the_newest_stay() {
    let mut lab = Lab::new();
    let [
        Net {
            client, endpoint, ..
        },
        _,
    ] = ip_nets();
    for port in 1..=1_000 {
        assert!(!lab.passes(In, &syn(at(client, port), at(endpoint, 1))));
    }
    let told = lab.policy.events().count();
    assert!((1..=64).contains(&told), "{told}");
    let denied = lab.policy.events().all(|event| event.verdict == DENIED);
    assert!(denied);
}

#[test]
fn icmp_errors_pass_about_flows_that_do() {
    for net in ip_nets() {
        let lab = Lab::new();
        let mut counted = BTreeMap::new();
        let Net {
            client,
            endpoint,
            router,
            ..
        } = net;
        for kind in IcmpError::ALL {
            let quoted = ack(endpoint, client)[ETHERNET..].to_vec();
            let about_answer = wire::error(router, endpoint.ip(), kind, &quoted);
            assert!(!lab.passes(In, &about_answer), "{kind:?}");
            let quoted = ack(client, endpoint)[ETHERNET..].to_vec();
            let own = wire::error(endpoint.ip(), client.ip(), kind, &quoted);
            assert!(!lab.passes(Out, &own), "{kind:?}");
        }
        lab.counted(&mut counted, &[(ErrorDenied, 6)]);
        assert!(lab.passes(In, &syn(client, endpoint)));
        for kind in IcmpError::ALL {
            let quoted = ack(endpoint, client)[ETHERNET..].to_vec();
            let about_answer = wire::error(router, endpoint.ip(), kind, &quoted);
            assert!(lab.passes(In, &about_answer), "{kind:?}");
            let quoted = ack(client, endpoint)[ETHERNET..].to_vec();
            let own = wire::error(endpoint.ip(), client.ip(), kind, &quoted);
            assert!(lab.passes(Out, &own), "{kind:?}");
            // About another port, and by whom it was not sent.
            let quoted = ack(endpoint, at(client, 5))[ETHERNET..].to_vec();
            let about_other = wire::error(router, endpoint.ip(), kind, &quoted);
            assert!(!lab.passes(In, &about_other), "{kind:?}");
            let quoted = ack(client, endpoint)[ETHERNET..].to_vec();
            let reflected = wire::error(router, endpoint.ip(), kind, &quoted);
            assert!(!lab.passes(In, &reflected), "{kind:?}");
        }
        let mine = [
            (FlowOpened, 1),
            (Passed, 1),
            (ErrorPassed, 6),
            (ErrorDenied, 6),
        ];
        lab.counted(&mut counted, &mine);
    }
}

#[test]
fn later_fragments_go_with_the_first() {
    for net in ip_nets() {
        let lab = Lab::new();
        let mut counted = BTreeMap::new();
        let payload = [7; 600];
        for (port, passes) in [(53, true), (54, false)] {
            let whole = wire::udp(net.client, at(net.endpoint, port), &payload);
            let [first, rest] = wire::fragments(&whole, port, 80);
            assert!(!lab.passes(In, &rest), "{port}: before the first");
            assert_eq!(lab.passes(In, &first), passes, "{port}");
            assert_eq!(lab.passes(In, &rest), passes, "{port}");
            // Of another packet.
            let [_, other] = wire::fragments(&whole, port + 2, 80);
            assert!(!lab.passes(In, &other), "{port}");
        }
        let mine = [
            (FlowOpened, 1),
            (Passed, 1),
            (Denied, 1),
            (FragmentPassed, 1),
            (FragmentDenied, 5),
        ];
        lab.counted(&mut counted, &mine);
        // Between ends that may say anything, nothing has to be known.
        let whole = wire::udp(net.endpoint, SocketAddr::new(net.router, 9), &payload);
        let [_, rest] = wire::fragments(&whole, 9, 80);
        assert!(lab.passes(Out, &rest));
    }
}

#[test]
fn what_cannot_be_read_passes_only_where_everything_may() {
    for net in ip_nets() {
        let lab = Lab::new();
        let mut counted = BTreeMap::new();
        let other = SocketAddr::new(net.router, 443);
        let rows = [
            (In, syn(net.client, net.endpoint), false),
            (Out, syn(net.endpoint, other), true),
        ];
        for (direction, packet, passes) in rows {
            // Ports, but no flags.
            let (short, l4) = with_options(packet.clone());
            assert_eq!(lab.passes(direction, &short[..l4 + 13]), passes, "{net:?}");
            let mut foreign = packet.clone();
            let at = if net.v4() { ETHERNET + 9 } else { ETHERNET + 6 };
            foreign[at] = IpNumber::GRE.0;
            assert_eq!(lab.passes(direction, &foreign), passes, "{net:?}");
            if !net.v4() {
                // More extension headers than are looked through.
                let mut long = packet[..net.l4()].to_vec();
                long[ETHERNET + 6] = 0;
                for _ in 0..5 {
                    long.extend([0; 8]);
                }
                assert_eq!(lab.passes(direction, &long), passes);
            }
        }
        let unclear = if net.v4() { 1 } else { 2 };
        let mine = [
            (UnclearDenied, unclear),
            (UnclearPassed, unclear),
            (Denied, 1),
            (FlowOpened, 1),
            (Passed, 1),
        ];
        lab.counted(&mut counted, &mine);
    }
}

#[test]
fn a_packet_without_a_whole_ip_header_is_dropped() {
    let lab = Lab::new();
    let mut counted = BTreeMap::new();
    let [v4, v6] = ip_nets();
    for net in [v4, v6] {
        let mut packet = without_ethernet(syn(net.client, net.endpoint));
        // Of a version that it is not.
        packet[0] = 0x95;
        assert!(!lab.run(In, &packet));
    }
    // What the device gives out as neither IPv4 nor IPv6.
    assert!(!lab.run(In, &[0x45; 64]));
    lab.counted(&mut counted, &[(Malformed, 3)]);
}

/// The TCP segment behind options or an extension header, and where it begins.
fn with_options(mut packet: Vec<u8>) -> (Vec<u8>, usize) {
    if packet[ETHERNET] == 0x45 {
        packet[ETHERNET] = 0x46;
        packet.splice(ETHERNET + 20..ETHERNET + 20, [1; 4]);
        (packet, ETHERNET + 24)
    } else {
        packet[ETHERNET + 6] = 60;
        packet.splice(ETHERNET + 40..ETHERNET + 40, [TCP, 0, 1, 4, 0, 0, 0, 0]);
        (packet, ETHERNET + 48)
    }
}

#[test]
fn options_and_extension_headers_hide_no_port() {
    let lab = Lab::new();
    for net in ip_nets() {
        for (port, passes) in [(8080, true), (8081, false)] {
            let (packet, _) = with_options(syn(net.client, at(net.endpoint, port)));
            assert_eq!(lab.passes(In, &packet), passes, "{port}");
        }
    }
}

#[test]
fn what_the_tables_do_not_have_does_not_pass() {
    for net in ip_nets() {
        let mut lab = Lab::new();
        let mut counted = BTreeMap::new();
        let packet = syn(SocketAddr::new(net.router, 1), net.endpoint);
        // No pair.
        lab.tables.pairs.retain(|pair, _| pair.remote != ANYBODY);
        lab.apply();
        assert!(!lab.passes(In, &packet));
        // No class, and what is said of those.
        lab.tables.addresses.retain(|_, class| *class != ANYBODY);
        lab.apply();
        assert!(!lab.passes(In, &packet));
        lab.counted(&mut counted, &[(NoRoom, 2)]);
        lab.pair(0, In, ALLOWED, None);
        lab.apply();
        assert!(lab.passes(In, &packet));
        // No port.
        lab.pair(0, In, DENIED, Some(77));
        lab.apply();
        assert!(!lab.passes(In, &syn(SocketAddr::new(net.router, 2), net.endpoint)));
    }
}

#[test]
fn an_address_reaches_itself_and_without_policy_everything_passes_uncounted() {
    for net in ip_nets() {
        let mut lab = Lab::new();
        assert!(lab.passes(In, &syn(net.endpoint, at(net.endpoint, 1))));
        let denied = syn(net.client, at(net.endpoint, 1));
        assert!(!lab.passes(In, &denied));
        let counted = lab.policy.counters().unwrap();
        lab.policy.apply(&Tables::default()).unwrap();
        assert!(lab.passes(In, &denied));
        assert_eq!(lab.policy.counters().unwrap(), counted);
        lab.apply();
        assert!(!lab.passes(In, &denied));
    }
}

#[test]
fn an_update_costs_what_it_changes() {
    let mut lab = Lab::new();
    let nothing = lab.policy.apply(&lab.tables).unwrap();
    assert_eq!((nothing.written, nothing.removed), (0, 0));
    for index in 0..2_000_u32 {
        let [_, _, high, low] = index.to_be_bytes();
        let address = IpAddr::from([100, 96, high, low]);
        lab.tables.addresses.insert((address, 32), FRIEND);
    }
    let many = lab.policy.apply(&lab.tables).unwrap();
    assert_eq!((many.written, many.removed), (2_000, 0));
    let one = (IpAddr::from([100, 96, 0, 7]), 32);
    lab.tables.addresses.insert(one, ANYBODY);
    let changed = lab.policy.apply(&lab.tables).unwrap();
    assert_eq!((changed.written, changed.removed), (1, 0));
    lab.tables.addresses.remove(&one);
    let removed = lab.policy.apply(&lab.tables).unwrap();
    assert_eq!((removed.written, removed.removed), (0, 1));
}

#[test]
fn the_verifier_s_work_is_bounded() {
    let lab = Lab::new();
    let bounds = [
        (At::Tunnel, In, VERIFIED_AT_TUNNEL_MAX),
        (At::Tunnel, Out, VERIFIED_AT_TUNNEL_MAX),
        (At::Pod, In, VERIFIED_AT_POD_MAX),
        (At::Pod, Out, VERIFIED_AT_POD_MAX),
    ];
    for (at, direction, most) in bounds {
        let info = lab.policy.program(at, direction).unwrap().info().unwrap();
        let instructions = info.verified_instruction_count().unwrap();
        println!("{at:?}, {direction:?}: {instructions}");
        assert!(
            instructions <= most,
            "{at:?}, {direction:?}: {instructions}"
        );
    }
}

/// What a packet costs, for the documentation: `--nocapture`.
#[test]
fn a_known_flow_and_a_new_one_are_judged_many_times_over() {
    const TIMES: u32 = 100_000;
    let lab = Lab::new();
    let [net, _] = ip_nets();
    let rows = [
        ("known flow", ack(net.client, net.endpoint)),
        ("denied", syn(net.client, at(net.endpoint, 1))),
    ];
    assert!(lab.passes(In, &syn(net.client, net.endpoint)));
    for (name, packet) in rows {
        let packet = without_ethernet(packet);
        let program = lab.policy.program(At::Tunnel, In).unwrap();
        let ran = uninterrupted(|| {
            program.test_run(TestRunOptions {
                data_in: Some(&packet),
                repeat: TIMES,
                ..TestRunOptions::new()
            })
        });
        println!("{name}: {:?} a packet", ran.duration);
    }
    let counted = lab.policy.counters().unwrap();
    let times = u64::from(TIMES);
    assert!(counted[&Passed] > times && counted[&Denied] >= times);
}
