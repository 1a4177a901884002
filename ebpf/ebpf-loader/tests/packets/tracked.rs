//! Where flows are remembered: what has no room any more, what is ended, and who asks for a flow at the same time.

use std::{net::SocketAddr, thread};

use aya::{
    maps::{Array, MapData},
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use ebpf_abi::{PacketCounter, TRACKED_PLACES, TRACKED_WAYS, TrackedSet};

use crate::{
    machine::{Machine, Verdict, next},
    verdicts::{ack, age_ms, fin, port, rst, syn},
    wire::{Net, nets, tcp, udp},
};

/// One client port's flows are of one set: so many services have as many flows there.
const WAYS: u16 = 15;

const _: () = assert!(WAYS as u32 == TRACKED_WAYS);

/// Another service each, with an endpoint of its own.
struct Crowd<'a> {
    net: &'a Net,
    machine: Machine,
}

impl<'a> Crowd<'a> {
    fn new(net: &'a Net) -> Self {
        let mut crowd = Self {
            net,
            machine: Machine::new(),
        };
        for n in 0..=WAYS {
            let (service, endpoint) = (crowd.service(n), crowd.endpoint(n));
            crowd.machine.serve(service, &[endpoint]);
        }
        crowd
    }

    fn service(&self, n: u16) -> SocketAddr {
        port(self.net.service, 1_000 + n)
    }

    fn endpoint(&self, n: u16) -> SocketAddr {
        port(self.net.endpoint, 2_000 + n)
    }

    fn asks(&self, n: u16, set: fn(&mut etherparse::TcpHeader)) {
        let asked = self
            .machine
            .request(&tcp(self.net.client, self.service(n), set, b""));
        let led = tcp(self.net.client, self.endpoint(n), set, b"");
        assert_eq!(asked, next(led), "{n}");
    }

    fn is_answered(&self, n: u16, set: fn(&mut etherparse::TcpHeader)) -> bool {
        let answer = tcp(self.endpoint(n), self.net.client, set, b"");
        let shown = tcp(self.service(n), self.net.client, set, b"");
        let ran = self.machine.answer(&answer);
        assert_eq!(ran.verdict, Verdict::Next);
        assert!(
            ran.packet == shown || ran.packet == answer,
            "{n}: neither way"
        );
        ran.packet == shown
    }

    fn opens(&self, n: u16) {
        self.asks(n, syn);
        assert!(self.is_answered(n, ack), "{n}");
    }

    /// As [`Crowd::opens`], long before whatever comes next.
    fn opened(&mut self, n: u16) {
        self.opens(n);
        age_ms(&mut self.machine, 2_000);
    }

    /// The one that is not there of the first so many.
    fn forgotten(&self, of: u16) -> Vec<u16> {
        (0..of).filter(|&n| !self.is_answered(n, ack)).collect()
    }
}

#[test]
fn where_there_is_no_room_the_flow_goes_that_was_used_least_recently() {
    for net in &nets() {
        let mut crowd = Crowd::new(net);
        for n in 0..WAYS {
            crowd.opened(n);
        }
        assert_eq!(crowd.forgotten(WAYS), []); // Which uses all, now.
        age_ms(&mut crowd.machine, 2_000);
        for n in (0..WAYS).filter(|n| *n != 7) {
            crowd.asks(n, ack);
        }
        crowd.opens(WAYS);
        assert_eq!(crowd.forgotten(WAYS + 1), [7]);
        // It is a flow like any other when it comes back, and somebody else's place is taken.
        crowd.opens(7);
        assert!(crowd.is_answered(7, ack));
        assert_eq!(crowd.forgotten(WAYS + 1).len(), 1);
    }
}

/// Else a crowd of short connections and of names that are asked for would end those that are silent.
#[test]
fn connections_that_go_on_are_the_last_to_go() {
    for net in &nets() {
        let others: [fn(&Crowd<'_>, u16); 3] = [
            |crowd, n| {
                crowd.opens(n);
                crowd.asks(n, fin);
                assert!(crowd.is_answered(n, fin));
            },
            |crowd, n| {
                crowd.opens(n);
                assert!(crowd.is_answered(n, rst));
            },
            |crowd, n| crowd.asks(n, syn),
        ];
        for other in others {
            let mut crowd = Crowd::new(net);
            for n in 0..WAYS - 1 {
                crowd.opened(n);
            }
            // Used last of all.
            other(&crowd, WAYS - 1);
            crowd.opens(WAYS);
            assert_eq!(crowd.forgotten(WAYS - 1), []);
            assert!(crowd.is_answered(WAYS, ack));
            assert!(!crowd.is_answered(WAYS - 1, ack));
        }
    }
}

#[test]
fn a_crowd_of_questions_by_udp_ends_no_connection() {
    for net in &nets() {
        let mut crowd = Crowd::new(net);
        for n in 0..WAYS {
            crowd.opened(n);
        }
        // Five of them find that set, on average.
        for n in 0..40_000 {
            let client = port(net.client, 20_000 + n);
            crowd
                .machine
                .request(&udp(client, crowd.service(n % WAYS), b"?"));
            crowd
                .machine
                .answer(&udp(crowd.endpoint(n % WAYS), client, b"!"));
        }
        let gone = crowd.forgotten(WAYS);
        assert!(gone.len() <= 1, "{gone:?}"); // For the first one there is nobody else to go.
    }
}

/// Whose set and place are whose depends on a number that is not known: here on none.
#[test]
fn clients_are_spread_over_all_sets_and_over_the_places_of_each() {
    for net in &nets() {
        let mut machine = Machine::new();
        machine.serve(net.service, &[net.endpoint]);
        let clients = u16::try_from(ebpf_abi::TRACKED_SETS).unwrap();
        for n in 0..clients {
            machine.request(&udp(port(net.client, 20_000 + n), net.service, b"?"));
        }
        assert_eq!(machine.change_flows(|_| ()), usize::from(clients));
        let map = machine.ebpf.get_mut().map_mut("hf_tracked").unwrap();
        let sets: Array<&mut MapData, TrackedSet> = map.try_into().unwrap();
        let mut places = [0; TRACKED_WAYS as usize];
        let taken = sets.iter().map(|set| {
            let tags = set.unwrap().tags;
            let taken = places.iter_mut().zip(tags).filter(|(_, tag)| *tag != 0);
            taken.map(|(place, _)| *place += 1).count()
        });
        let taken: Vec<_> = taken.collect();
        // One a set, on average: 37 % of the sets then have none, and 8 of 8,192 have six or more by chance.
        let empty = taken.iter().filter(|count| **count == 0).count();
        assert!((2_700..3_400).contains(&empty), "{empty}");
        assert!(taken.iter().all(|count| *count < 12));
        // A flow takes the place where it is looked for first: 546 on average, by chance 25 more or less. Where
        // somebody has that, the lowest one: those that one of them meets in its set, in 15 places.
        let (lowest, others) = places.split_first().unwrap();
        assert!((546..900).contains(lowest), "{places:?}");
        assert!(
            others.iter().all(|count| (400..700).contains(count)),
            "{places:?}"
        );
    }
}

/// Two whose set and tag are the same where the hash is of nothing else. Found by trying 20 million.
const ALIKE: [&str; 2] = ["10.84.129.52:15090", "10.181.151.45:7726"];

#[test]
fn clients_with_the_same_hash_are_not_confused() {
    let [net, _] = nets();
    let mut machine = Machine::new();
    let clients: [SocketAddr; 2] = ALIKE.map(|client| client.parse().unwrap());
    for (endpoint, client) in (1..).zip(clients) {
        machine.serve(net.service, &[port(net.endpoint, endpoint)]);
        machine.request(&udp(client, net.service, b"?"));
    }
    let mut places = Vec::new();
    machine.change_flows(|flow| places.push(flow.client.socket_addr()));
    assert_eq!(places, clients, "not in one set: is the hash another one?");
    let map = machine.ebpf.get_mut().map_mut("hf_tracked").unwrap();
    let sets: Array<&mut MapData, TrackedSet> = map.try_into().unwrap();
    let taken = sets.iter().map(|set| set.unwrap().tags);
    let taken: Vec<_> = taken.filter(|tags| tags[0] != 0).collect();
    let [tags] = taken[..] else {
        panic!("in {} sets", taken.len());
    };
    assert!(tags[0] == tags[1] && tags[2] == 0, "{tags:?}");
    for (endpoint, client) in (1..).zip(clients) {
        let endpoint = port(net.endpoint, endpoint);
        let asked = machine.request(&udp(client, net.service, b"?"));
        assert_eq!(asked, next(udp(client, endpoint, b"?")));
        let answered = machine.answer(&udp(endpoint, client, b"!"));
        assert_eq!(answered, next(udp(net.service, client, b"!")));
    }
}

#[test]
fn a_flow_that_is_ended_goes_elsewhere_and_whoever_has_its_place_then_does_not() {
    for net in &nets() {
        let mut machine = Machine::new();
        let [old, new] = [1, 2].map(|n| port(net.endpoint, n));
        machine.serve(net.service, &[old]);
        let question = udp(net.client, net.service, b"?");
        let to = |endpoint| next(udp(net.client, endpoint, b"?"));
        assert_eq!(machine.request(&question), to(old));
        machine.serve(net.service, &[new]);
        assert_eq!(machine.request(&question), to(old));
        let mut generation = 0;
        machine.change_flows(|flow| generation = flow.generation);
        let end = |machine: &mut Machine, generation: u32| {
            let map = machine.ebpf.get_mut().map_mut("hf_ended").unwrap();
            let mut ended: Array<&mut MapData, u32> = map.try_into().unwrap();
            for place in 0..TRACKED_PLACES {
                ended.set(place, generation, 0).unwrap();
            }
        };
        for other in [0, generation + 1, generation + 2] {
            end(&mut machine, other);
            assert_eq!(machine.request(&question), to(old));
        }
        end(&mut machine, generation);
        // At once, and not again: what takes the place is of the next generation.
        assert_eq!(machine.request(&question), to(new));
        machine.serve(net.service, &[old]);
        assert_eq!(machine.request(&question), to(new));
        assert_eq!(machine.counted()[&PacketCounter::FlowOpened], 2);
    }
}

/// New flows for which two processors ask, one after the other: whoever comes second is faster, and catches up.
const RACES: u16 = 40_000;

#[test]
fn two_processors_that_open_a_flow_at_the_same_time_lead_it_to_one_endpoint() {
    let [net, _] = nets();
    let mut machine = Machine::new();
    let endpoints: Vec<_> = (1..=64).map(|n| port(net.endpoint, n)).collect();
    machine.serve(net.service, &endpoints);
    let program = machine.program("hf_requests");
    let program: &SchedClassifier = &program;
    let at = net.l4() + 2;
    let went_to = |packet: &[u8]| {
        let mut out = vec![0; 256];
        let options = TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ..TestRunOptions::new()
        };
        program.test_run(options).unwrap();
        [out[at], out[at + 1]]
    };
    let asks = || {
        let mut chosen = Vec::new();
        for n in 0..RACES {
            let packet = udp(port(net.client, 10_000 + n), net.service, b"?");
            chosen.push(went_to(&packet));
        }
        chosen
    };
    let (one, other) = thread::scope(|scope| {
        let other = scope.spawn(asks);
        (asks(), other.join().unwrap())
    });
    assert_eq!(one, other);
}
