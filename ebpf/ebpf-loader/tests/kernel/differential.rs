//! Random services and random sockets that ask for them: where the programs lead against a plain model of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, ErrorKind},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use ebpf_loader::{Backends, Clients, Frontend, Protocol, Selection};
use proptest::{
    collection::{btree_map, btree_set, vec},
    prelude::*,
    sample::select,
    test_runner::{Config, TestRunner},
};

use crate::lab::{FAMILIES, Lab, accepted, add_to_loopback, datagram};

/// Few, so that they meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Asked {
    v4: bool,
    last: u8,
    port: u16,
    udp: bool,
}

impl Asked {
    fn frontend(self) -> Frontend {
        let address = match self.v4 {
            true => [10, 96, 0, self.last].into(),
            false => [0xfd00, 0x96, 0, 0, 0, 0, 0, self.last.into()].into(),
        };
        Frontend {
            clients: Clients::All,
            address,
            port: self.port,
            protocol: if self.udp {
                Protocol::Udp
            } else {
                Protocol::Tcp
            },
        }
    }
}

fn asked() -> impl Strategy<Value = Asked> {
    let parts = (any::<bool>(), 1..3_u8, select(&[53, 80][..]), any::<bool>());
    parts.prop_map(|(v4, last, port, udp)| Asked {
        v4,
        last,
        port,
        udp,
    })
}

/// Endpoints by their numbers; whether clients keep theirs; whether the client's hash says which is whose.
#[derive(Debug, Clone)]
struct Served {
    endpoints: BTreeSet<u8>,
    keeps: bool,
    by_hash: bool,
}

fn served() -> impl Strategy<Value = Served> {
    let parts = (
        btree_set(0..ENDPOINTS, 0..4),
        any::<bool>(),
        proptest::bool::weighted(0.25),
    );
    parts.prop_map(|(endpoints, keeps, by_hash)| Served {
        endpoints,
        keeps,
        by_hash,
    })
}

/// Of each family and protocol, two by two at one address.
const ENDPOINTS: u8 = 4;

fn endpoint(v4: bool, number: u8) -> SocketAddr {
    let last = 1 + number / 2;
    let address: IpAddr = match v4 {
        true => [127, 0, 0, last].into(),
        false => [0xfd00, 0x42, 0, 0, 0, 0, 0, last.into()].into(),
    };
    SocketAddr::new(address, 8_000 + u16::from(number % 2))
}

#[derive(Debug, Clone)]
enum Step {
    /// These are the services from now on.
    Serve(BTreeMap<Asked, Served>),
    /// A new socket is connected, or an old one sends; the number is that of a client's socket in [`FAMILIES`], or a
    /// later one of its kind.
    Ask(Asked, usize, bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let serve = || btree_map(asked(), served(), 1..9).prop_map(Step::Serve);
    let ask = (asked(), 0..4_usize, any::<bool>());
    let ask = ask.prop_map(|(asked, socket, connects)| Step::Ask(asked, socket, connects));
    let more = vec(prop_oneof![1 => serve(), 12 => ask], 32..128);
    (serve(), more).prop_map(|(first, more)| [vec![first], more].concat())
}

/// What becomes of a flow.
#[derive(Debug, PartialEq)]
enum Led {
    /// It is for no service.
    Past,
    Refused,
    To(SocketAddr),
}

/// The rows of `docs/services.md` about sockets. There is one client: the test's network namespace.
#[derive(Default)]
struct Model {
    services: BTreeMap<Frontend, (Vec<SocketAddr>, Served)>,
    /// With affinity, at a port of a service, and at any port of its address.
    kept: BTreeMap<Frontend, SocketAddr>,
    kept_at: BTreeMap<IpAddr, IpAddr>,
    /// In a list of so many, of those that go by its hash.
    place: BTreeMap<usize, usize>,
    /// Where datagrams of an unconnected socket go.
    flows: BTreeMap<(usize, Frontend), SocketAddr>,
    /// As whom an endpoint answers it: the service that it asked last.
    shown: BTreeMap<(usize, SocketAddr), Frontend>,
}

impl Model {
    fn serve(&mut self, services: &BTreeMap<Asked, Served>) {
        let services = services.iter().map(|(asked, served)| {
            let numbers = served.endpoints.iter();
            let list = numbers.map(|&number| endpoint(asked.v4, number));
            (asked.frontend(), (list.collect(), served.clone()))
        });
        self.services = services.collect();
    }

    /// Whether a flow may be led so, which it was; `flow`: of which unconnected socket.
    fn check(
        &mut self,
        asked: Frontend,
        flow: Option<usize>,
        led: &Led,
    ) -> Result<(), TestCaseError> {
        let Some((list, served)) = self.services.get(&asked) else {
            prop_assert_eq!(led, &Led::Past);
            return Ok(());
        };
        if list.is_empty() {
            prop_assert_eq!(led, &Led::Refused);
            return Ok(());
        }
        let Led::To(endpoint) = *led else {
            return Err(TestCaseError::fail(format!("{led:?}, with {list:?}")));
        };
        let listed = |endpoint: &&SocketAddr| list.contains(endpoint);
        let of_flow = flow.and_then(|socket| self.flows.get(&(socket, asked)));
        let of_flow = of_flow.filter(listed).copied();
        let of_client = self.kept.get(&asked).filter(listed).or_else(|| {
            let at = self.kept_at.get(&asked.address)?;
            list.iter().find(|endpoint| endpoint.ip() == *at)
        });
        let of_client = of_client.filter(|_| served.keeps).copied();
        match of_flow.or(of_client) {
            Some(kept) => prop_assert_eq!(endpoint, kept, "it did not stay"),
            None => {
                let place = list.iter().position(|one| *one == endpoint);
                let place = place.ok_or_else(|| TestCaseError::fail("to none of the list"))?;
                if served.by_hash {
                    let first = *self.place.entry(list.len()).or_insert(place);
                    prop_assert_eq!(first, place, "not by its hash");
                }
            }
        }
        if served.keeps && of_flow.is_none() {
            self.kept.insert(asked, endpoint);
            self.kept_at.insert(asked.address, endpoint.ip());
        }
        if let Some(socket) = flow {
            self.flows.insert((socket, asked), endpoint);
            self.shown.insert((socket, endpoint), asked);
        }
        Ok(())
    }
}

/// Servers at all endpoints, and unconnected sockets.
struct World {
    lab: Lab,
    tcp: Vec<TcpListener>,
    udp: Vec<UdpSocket>,
    sockets: Vec<UdpSocket>,
    model: Model,
}

/// As a socket names it, whose kind is that of a family's client.
fn named(address: SocketAddr, socket: usize) -> SocketAddr {
    match (address.ip(), kind(socket)) {
        (IpAddr::V4(v4), 1) => SocketAddr::new(v4.to_ipv6_mapped().into(), address.port()),
        _ => address,
    }
}

/// 0: IPv4 alone, 1: IPv6 and IPv4.
fn kind(socket: usize) -> usize {
    socket % 2
}

impl World {
    fn new() -> Self {
        let lab = Lab::new();
        let all = [true, false]
            .iter()
            .flat_map(|&v4| (0..ENDPOINTS).map(move |number| endpoint(v4, number)));
        let all: Vec<_> = all.collect();
        let addresses: BTreeSet<_> = all
            .iter()
            .map(SocketAddr::ip)
            .filter(IpAddr::is_ipv6)
            .collect();
        addresses.into_iter().for_each(add_to_loopback);
        Self {
            lab,
            tcp: all
                .iter()
                .map(|at| TcpListener::bind(at).unwrap())
                .collect(),
            udp: all.iter().map(|at| UdpSocket::bind(at).unwrap()).collect(),
            sockets: (0..4)
                .map(|socket| FAMILIES[kind(socket)].client())
                .collect(),
            model: Model::default(),
        }
    }

    fn serve(&mut self, services: &BTreeMap<Asked, Served>) {
        self.model.serve(services);
        let backends = |(list, served): &(Vec<SocketAddr>, Served)| Backends {
            affinity: served.keeps.then_some(Duration::from_secs(3_600)),
            selection: if served.by_hash {
                Selection::ClientHash
            } else {
                Selection::Random
            },
            ..list.clone().into()
        };
        let services = self.model.services.iter();
        let desired = services.map(|(&frontend, to)| (frontend, backends(to)));
        self.lab.services().apply(&desired.collect()).unwrap();
    }

    fn ask(&mut self, asked: Asked, socket: usize, connects: bool) -> Result<(), TestCaseError> {
        let frontend = asked.frontend();
        let socket = if asked.v4 { socket } else { socket | 1 };
        let to = named(SocketAddr::new(frontend.address, frontend.port), socket);
        let (flow, led) = match (asked.udp, connects) {
            (false, _) => (None, self.by_tcp(to)),
            (true, true) => {
                let client = FAMILIES[kind(socket)].client();
                let connected = client.connect(to).and_then(|()| client.send(b"?"));
                (None, self.by_udp(&client, connected, to))
            }
            (true, false) => {
                let client = &self.sockets[socket];
                let sent = client.send_to(b"?", to);
                (Some(socket), self.by_udp(client, sent, to))
            }
        };
        self.model.check(frontend, flow, &led)?;
        self.late_words(socket)
    }

    fn by_tcp(&self, to: SocketAddr) -> Led {
        let client = match TcpStream::connect(to) {
            Ok(client) => client,
            Err(error) => return not_led(&error),
        };
        assert_eq!(client.peer_addr().unwrap(), to);
        let (_, server) = accepted(&self.tcp);
        Led::To(server.local_addr().map(canonical).unwrap())
    }

    /// Where the datagram came that was sent so, if it was, and that the answer is the service's.
    fn by_udp(&self, client: &UdpSocket, sent: io::Result<usize>, to: SocketAddr) -> Led {
        if let Err(error) = sent {
            return not_led(&error);
        }
        if let Ok(peer) = client.peer_addr() {
            assert_eq!(peer, to);
        }
        let (server, from) = datagram(&self.udp);
        self.udp[server].send_to(b"!", from).unwrap();
        let (_, shown) = client.recv_from(&mut [0]).unwrap();
        assert_eq!(shown, to);
        Led::To(self.udp[server].local_addr().unwrap())
    }

    /// All endpoints that the socket ever asked answer again.
    fn late_words(&self, socket: usize) -> Result<(), TestCaseError> {
        let client = &self.sockets[socket];
        let at = client.local_addr().unwrap().port();
        for ((_, endpoint), service) in self.model.shown.range((socket, FIRST)..(socket + 1, FIRST))
        {
            let server = self.udp.iter();
            let mut server = server.filter(|server| server.local_addr().unwrap() == *endpoint);
            let to = match endpoint.is_ipv4() {
                true => SocketAddr::from(([127, 0, 0, 1], at)),
                false => SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], at)),
            };
            server.next().unwrap().send_to(b"!", to).unwrap();
            let (_, shown) = client.recv_from(&mut [0]).unwrap();
            let service = SocketAddr::new(service.address, service.port);
            prop_assert_eq!(shown, named(service, socket));
        }
        Ok(())
    }
}

/// Before all others.
const FIRST: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0);

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// There is no way to a service's address but by the programs.
#[track_caller]
fn not_led(error: &io::Error) -> Led {
    if error.kind() == ErrorKind::ConnectionRefused {
        return Led::Refused;
    }
    assert_eq!(error.kind(), ErrorKind::NetworkUnreachable, "{error}");
    Led::Past
}

/// Each case loads the programs anew, some 0.5 s.
#[test]
fn sockets_are_led_as_the_model_says() {
    let mut runner = TestRunner::new(Config {
        failure_persistence: None,
        ..Config::with_cases(16)
    });
    let check = |steps: Vec<Step>| {
        let mut world = World::new();
        steps.iter().try_for_each(|step| match step {
            Step::Serve(services) => {
                world.serve(services);
                Ok(())
            }
            Step::Ask(asked, socket, connects) => world.ask(*asked, *socket, *connects),
        })
    };
    runner.run(&steps(), check).unwrap();
}
