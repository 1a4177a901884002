//! Random services and flows: what the programs do against what the table says.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
};

use ebpf_abi::EndpointList;
use etherparse::TcpHeader;
use proptest::{
    collection::{btree_map, btree_set, vec},
    option,
    prelude::*,
    sample::select,
    test_runner::{Config, TestRunner},
};

use crate::{
    hairpin::back,
    machine::{Machine, Verdict, next},
    wire::{tcp, udp},
};

/// Few, so that they meet: each family's clients, services and endpoints by their last number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Place {
    v4: bool,
    last: u8,
    port: u16,
}

impl Place {
    fn at(self, net: u8) -> SocketAddr {
        let Self { v4, last, port } = self;
        let address: IpAddr = if v4 {
            [10, net, 0, last].into()
        } else {
            [0xfd00, net.into(), 0, 0, 0, 0, 0, last.into()].into()
        };
        SocketAddr::new(address, port)
    }
}

const CLIENTS: u8 = 1;
const SERVICES: u8 = 96;
const ENDPOINTS: u8 = 42;

fn place(ports: &'static [u16]) -> impl Strategy<Value = Place> {
    let parts = (any::<bool>(), 1..4_u8, select(ports));
    parts.prop_map(|(v4, last, port)| Place { v4, last, port })
}

/// How many endpoints a service has, the first of them a client, maybe; how many of them for clients from
/// outside, and the last numbers of those clients.
#[derive(Debug, Clone)]
struct Served {
    endpoints: u8,
    first_is_client: bool,
    outside: Option<(u8, Option<BTreeSet<u8>>)>,
}

fn served() -> impl Strategy<Value = Served> {
    let only = option::of(btree_set(1..4_u8, 0..3));
    let parts = (0..5_u8, any::<bool>(), option::of((0..5_u8, only)));
    parts.prop_map(|(endpoints, first_is_client, outside)| Served {
        endpoints,
        first_is_client,
        outside: outside.map(|(some, only)| (some.min(endpoints), only)),
    })
}

/// Where a service's clients are led.
struct Leads {
    all: Vec<SocketAddr>,
    outside: Option<(Vec<SocketAddr>, Option<Vec<IpAddr>>)>,
}

impl Leads {
    /// What becomes of a client from outside: to one of these, or what else.
    fn is(&self, client: IpAddr) -> Result<&[SocketAddr], Verdict> {
        let (list, only) = match &self.outside {
            None => (&self.all, &None),
            Some((list, only)) => (list, only),
        };
        if only.as_ref().is_some_and(|only| !only.contains(&client)) {
            return Err(Verdict::Dropped);
        }
        match (list.is_empty(), self.all.is_empty()) {
            (false, _) => Ok(list),
            (true, true) => Err(Verdict::Returned),
            (true, false) => Err(Verdict::Dropped),
        }
    }
}

/// Services; then who asks for which, by TCP or by UDP.
type Case = (BTreeMap<Place, Served>, Vec<(Place, Place, bool)>);

fn case() -> impl Strategy<Value = Case> {
    let services = btree_map(place(&[53, 80]), served(), 0..8);
    let flow = (place(&[40_001, 40_002]), place(&[53, 80]), any::<bool>());
    (services, vec(flow, 1..96))
}

fn serve(machine: &mut Machine, services: &BTreeMap<Place, Served>) -> BTreeMap<SocketAddr, Leads> {
    let mut table = BTreeMap::new();
    // No endpoint is of two services: which one a client asks for would not be told apart.
    for (index, (service, served)) in (1_u8..).zip(services) {
        let endpoints = (0..served.endpoints).map(|number| {
            let port = 8_000 + u16::from(number);
            if number == 0 && served.first_is_client {
                let port = port + u16::from(index);
                let (last, v4) = (1, service.v4);
                return Place { v4, last, port }.at(CLIENTS);
            }
            let place = Place {
                last: index,
                port,
                ..*service
            };
            place.at(ENDPOINTS)
        });
        let all: Vec<_> = endpoints.collect();
        machine.serve(service.at(SERVICES), &all);
        let outside = served.outside.as_ref().map(|(some, only)| {
            let list = all.iter().copied().take((*some).into()).collect();
            let only = only.as_ref().map(|only| {
                let client = |&last: &u8| Place { last, ..*service }.at(CLIENTS).ip();
                only.iter().map(client).collect::<Vec<_>>()
            });
            (list, only)
        });
        if let Some((list, only)) = &outside {
            let list: &Vec<SocketAddr> = list;
            machine.serve_outside(service.at(SERVICES), list, only.as_deref());
        }
        table.insert(service.at(SERVICES), Leads { all, outside });
    }
    table
}

/// Each flow asks twice and is answered: it goes where the table says, stays there, and sees the
/// service.
fn check((services, flows): Case) -> Result<(), TestCaseError> {
    let mut machine = Machine::new();
    let table = serve(&mut machine, &services);
    let mut chosen: HashMap<(SocketAddr, SocketAddr, bool), SocketAddr> = HashMap::new();
    for (client, service, by_tcp) in flows {
        let client = Place {
            v4: service.v4,
            ..client
        }
        .at(CLIENTS);
        let service = service.at(SERVICES);
        let segment = |from, to, ack| {
            let set = |header: &mut TcpHeader| (header.syn, header.ack) = (true, ack);
            match by_tcp {
                true => tcp(from, to, set, b""),
                false => udp(from, to, b"hello"),
            }
        };
        let packet = |from, to| segment(from, to, false);
        let answer = |from, to| segment(from, to, true);
        for _ in 0..2 {
            let asked = packet(client, service);
            let ran = machine.request(&asked);
            let Some(leads) = table.get(&service) else {
                prop_assert_eq!((ran.verdict, ran.packet), (Verdict::Next, asked));
                continue;
            };
            let endpoints = match leads.is(client.ip()) {
                Ok(endpoints) => endpoints,
                Err(verdict) => {
                    prop_assert_eq!(ran.verdict, verdict);
                    continue;
                }
            };
            // A client that is the endpoint sees the service at both its ends.
            let seen = SocketAddr::new(service.ip(), client.port());
            let led = |endpoint: SocketAddr| match endpoint.ip() == client.ip() {
                true => back(packet(seen, endpoint)),
                false => next(packet(client, endpoint)),
            };
            let there = |&&endpoint: &&SocketAddr| led(endpoint) == ran;
            let endpoint = endpoints.iter().find(there);
            let endpoint = *endpoint.ok_or_else(|| TestCaseError::fail("to none of the list"))?;
            let first = *chosen.entry((client, service, by_tcp)).or_insert(endpoint);
            prop_assert_eq!(first, endpoint, "a flow moved");
            let shown = answer(service, client);
            if endpoint.ip() == client.ip() {
                prop_assert_eq!(machine.request(&answer(endpoint, seen)), back(shown));
            } else {
                prop_assert_eq!(machine.answer(&answer(endpoint, client)), next(shown));
            }
        }
    }
    Ok(())
}

/// Each case loads the programs anew, some 0.5 s.
#[test]
fn packets_go_where_the_table_says() {
    let mut runner = TestRunner::new(Config {
        failure_persistence: None,
        ..Config::with_cases(16)
    });
    runner.run(&case(), check).unwrap();
}

/// Where packets of 64 clients with two ports each go, by the number in their address.
fn reached(machine: &Machine, service: SocketAddr, list: &[SocketAddr]) -> Vec<[usize; 2]> {
    let to = |client: SocketAddr| {
        let ran = machine.request(&udp(client, service, b"?"));
        let there = |&endpoint: &SocketAddr| udp(client, endpoint, b"?") == ran.packet;
        list.iter()
            .copied()
            .position(|endpoint| there(&endpoint))
            .unwrap()
    };
    let clients = (1..=64).map(|last| {
        [40_001, 40_002].map(|port| {
            to(Place {
                v4: service.is_ipv4(),
                last,
                port,
            }
            .at(CLIENTS))
        })
    });
    clients.collect()
}

#[test]
fn flows_go_in_turns_or_by_their_clients_address_where_the_list_says_so() {
    for v4 in [true, false] {
        let place = |last, port| Place { v4, last, port };
        let service = place(1, 80).at(SERVICES);
        let list = [1, 2, 3].map(|last| place(last, 8_080).at(ENDPOINTS));
        let mut machine = Machine::new();
        machine.serve_as(service, &list, EndpointList::with_turns);
        let turns = reached(&machine, service, &list).concat();
        let next = |pair: &[usize]| (pair[0] + 1) % 3 == pair[1];
        assert!(turns.windows(2).all(next), "{turns:?}");

        let mut machine = Machine::new();
        machine.serve_as(service, &list, EndpointList::with_hash);
        let hashed = reached(&machine, service, &list);
        assert!(hashed.iter().all(|[one, other]| one == other), "{hashed:?}");
        let all: BTreeSet<_> = hashed.iter().map(|[one, _]| one).collect();
        assert_eq!(all.len(), 3, "{hashed:?}");
        let mut machine = Machine::new();
        machine.serve_as(service, &list, EndpointList::with_hash);
        assert_eq!(reached(&machine, service, &list), hashed, "after a restart");
    }
}
