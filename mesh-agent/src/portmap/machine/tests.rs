use std::net::Ipv6Addr;

use super::*;

const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);
const HOME: Gateway = Gateway {
    address: IpAddr::V4(ROUTER),
    link: 2,
    own: IpAddr::V4(Ipv4Addr::new(192, 168, 1, 11)),
};
const OUTSIDE: SocketAddr = v4([45, 0, 113, 5], 51_820);

/// The same router's other half.
const HOME_V6: Gateway = Gateway {
    address: IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 7, 0, 0, 0, 0)),
    link: 2,
    own: IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 7, 0, 0, 0, 0x11)),
};
const PINHOLE: SocketAddr = SocketAddr::new(HOME_V6.own, 51_820);

const fn v4([a, b, c, d]: [u8; 4], port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(a, b, c, d)), port)
}

/// A machine at virtual time.
struct World {
    machine: Machine,
    now: Instant,
    told: Vec<SocketAddr>,
    asked: VecDeque<Ask>,
    released: Vec<Ask>,
}

impl World {
    fn new(gateways: &[Gateway]) -> Self {
        let mut world = Self {
            machine: Machine::new(51_820, 1),
            now: Instant::now(),
            told: Vec::new(),
            asked: VecDeque::new(),
            released: Vec::new(),
        };
        world.gateways(gateways);
        world
    }

    fn gateways(&mut self, gateways: &[Gateway]) {
        self.machine.handle_gateways(gateways.to_vec(), self.now);
        self.drain();
    }

    fn drain(&mut self) {
        while let Some(output) = self.machine.poll_output() {
            match output {
                Output::Ask(ask) => self.asked.push_back(ask),
                Output::Release(ask) => self.released.push(ask),
                Output::Tell(told) => self.told = told,
            }
        }
    }

    /// Whatever is due before this much time is over happens.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(deadline) = self.machine.poll_timeout().filter(|due| *due <= end) {
            self.now = self.now.max(deadline);
            self.machine.handle_timeout(self.now);
            self.drain();
            if !self.asked.is_empty() {
                return;
            }
        }
        self.now = end;
    }

    #[track_caller]
    fn ask(&mut self, protocol: Protocol) -> Ask {
        let ask = self.asked.pop_front().unwrap();
        assert_eq!(ask.protocol, protocol);
        ask
    }

    #[track_caller]
    fn nobody_is_asked(&self) {
        assert!(self.asked.is_empty(), "{:?}", self.asked);
    }

    fn answer(&mut self, ask: Ask, answer: Answer) {
        self.machine.handle_answer(ask.number, answer, self.now);
        self.drain();
    }

    /// Asks by PCP, which is granted.
    fn mapped(&mut self) {
        let ask = self.ask(Protocol::Pcp);
        self.answer(ask, granted(OUTSIDE, 600, 100));
        assert_eq!(self.told, [OUTSIDE]);
    }

    fn problem(&self) -> String {
        self.machine.reports().next().unwrap().problem
    }
}

fn granted(outside: SocketAddr, lifetime_s: u64, epoch_s: u32) -> Answer {
    Answer::Granted {
        outside,
        lifetime: Duration::from_secs(lifetime_s),
        epoch_s: Some(epoch_s),
    }
}

fn notice(epoch_s: u32) -> Notice {
    Notice {
        epoch_s,
        outside: None,
    }
}

#[test]
fn the_protocols_are_asked_one_after_the_other_and_the_one_that_worked_first_next_time() {
    let mut world = World::new(&[HOME]);
    let ask = world.ask(Protocol::Pcp);
    world.answer(ask, Answer::Silent);
    let ask = world.ask(Protocol::NatPmp);
    world.answer(ask, Answer::Refused("no".to_owned()));
    let ask = world.ask(Protocol::Upnp);
    assert_eq!((ask.inner_port, ask.port), (51_820, 51_820));
    world.answer(ask, granted(OUTSIDE, 600, 0));
    assert_eq!(world.told, [OUTSIDE]);
    // It forgets us, and is asked anew.
    world.pass(Duration::from_secs(300));
    let ask = world.ask(Protocol::Upnp);
    world.answer(ask, Answer::Refused("who?".to_owned()));
    assert!(world.told.is_empty());
    world.ask(Protocol::Upnp);
    world.nobody_is_asked();
}

#[test]
fn a_mapping_is_renewed_at_half_of_its_lifetime_with_the_same_port_and_nonce() {
    let mut world = World::new(&[HOME]);
    let first = world.ask(Protocol::Pcp);
    let other = SocketAddr::new(OUTSIDE.ip(), 7_000);
    world.answer(first, granted(other, 600, 100));
    world.pass(Duration::from_secs(299));
    world.nobody_is_asked();
    world.pass(Duration::from_secs(1));
    let again = world.ask(Protocol::Pcp);
    assert_eq!((again.port, again.nonce), (7_000, first.nonce));
    world.answer(again, granted(other, 120, 400));
    world.pass(Duration::from_secs(60));
    world.ask(Protocol::Pcp);
}

#[test]
fn a_renewal_without_answer_is_tried_twice_more_and_then_the_mapping_is_forgotten() {
    let mut world = World::new(&[HOME]);
    world.mapped();
    world.pass(Duration::from_secs(300));
    for pause_s in [2, 8] {
        let ask = world.ask(Protocol::Pcp);
        world.answer(ask, Answer::Silent);
        assert_eq!(world.told.len(), 1);
        world.nobody_is_asked();
        world.pass(Duration::from_secs(pause_s));
    }
    let ask = world.ask(Protocol::Pcp);
    world.answer(ask, Answer::Silent);
    assert!(world.told.is_empty());
    world.ask(Protocol::Pcp);
}

#[test]
fn a_mapping_whose_renewal_never_comes_back_ends_with_its_lifetime() {
    let mut world = World::new(&[HOME]);
    world.mapped();
    world.pass(Duration::from_secs(300));
    let late = world.ask(Protocol::Pcp);
    world.pass(Duration::from_secs(299));
    assert_eq!(world.told.len(), 1);
    world.pass(Duration::from_secs(2));
    assert!(world.told.is_empty());
    // It is asked anew; what came so late means nothing.
    world.ask(Protocol::Pcp);
    world.answer(late, granted(OUTSIDE, 600, 0));
    assert!(world.told.is_empty());
}

#[test]
fn a_gateway_that_grants_nothing_is_asked_ever_more_rarely() {
    let mut world = World::new(&[HOME]);
    let mut rounds = 0;
    let start = world.now;
    while world.now < start + Duration::from_secs(86_400) {
        for protocol in ORDER {
            let ask = world.ask(protocol);
            world.answer(ask, Answer::Silent);
        }
        rounds += 1;
        world.pass(Duration::from_secs(86_400));
    }
    // 30 s + 60 s + … to half an hour takes 32 min; then one each half an hour.
    assert!((48..=60).contains(&rounds), "{rounds}");
    // A change of the network begins anew.
    world.asked.clear();
    for protocol in [Protocol::Pcp, Protocol::NatPmp, Protocol::Upnp] {
        let ask = world.machine.number;
        let _ = protocol;
        world.machine.handle_answer(ask, Answer::Silent, world.now);
        world.drain();
    }
    world.asked.clear();
    world.gateways(&[HOME]);
    world.ask(Protocol::Pcp);
}

#[test]
fn a_gateway_that_started_anew_is_asked_at_once_and_then_not_for_a_while() {
    let mut world = World::new(&[HOME]);
    world.mapped();
    world.pass(Duration::from_secs(50));
    // Its clock went on as ours did.
    world.machine.handle_notice(ROUTER, notice(150), world.now);
    world.drain();
    world.nobody_is_asked();
    world.machine.handle_notice(ROUTER, notice(0), world.now);
    world.drain();
    let ask = world.ask(Protocol::Pcp);
    world.answer(ask, granted(OUTSIDE, 600, 1));
    // Whoever forges more of these gets no more than one question in 10 s.
    for second in 1_u32..10 {
        world.pass(Duration::from_secs(1));
        world
            .machine
            .handle_notice(ROUTER, notice(second * 1_000), world.now);
        world.drain();
        world.nobody_is_asked();
    }
    world.pass(Duration::from_secs(1));
    let ask = world.ask(Protocol::Pcp);
    world.answer(ask, granted(OUTSIDE, 600, 11));
    world.nobody_is_asked();
    // Nobody listens to others.
    let stranger = Ipv4Addr::new(192, 168, 1, 66);
    world.machine.handle_notice(stranger, notice(0), world.now);
    world.drain();
    world.nobody_is_asked();
}

#[test]
fn a_gateway_with_another_outside_address_is_asked_at_once() {
    let mut world = World::new(&[HOME]);
    world.mapped();
    world.pass(Duration::from_secs(50));
    let said = |ip: [u8; 4]| Notice {
        epoch_s: 150,
        outside: Some(ip.into()),
    };
    let same = said([45, 0, 113, 5]);
    world.machine.handle_notice(ROUTER, same, world.now);
    world.drain();
    world.nobody_is_asked();
    world
        .machine
        .handle_notice(ROUTER, said([45, 0, 113, 6]), world.now);
    world.drain();
    let ask = world.ask(Protocol::Pcp);
    let moved = v4([45, 0, 113, 6], 51_820);
    world.answer(ask, granted(moved, 600, 150));
    assert_eq!(world.told, [moved]);
}

#[test]
fn a_resting_gateway_that_says_that_it_started_is_asked_at_once() {
    let mut world = World::new(&[HOME]);
    for protocol in ORDER {
        let ask = world.ask(protocol);
        world.answer(ask, Answer::Silent);
    }
    world.nobody_is_asked();
    world.machine.handle_notice(ROUTER, notice(0), world.now);
    world.drain();
    world.ask(Protocol::Pcp);
}

#[test]
fn a_gateway_that_starts_while_it_is_asked_is_asked_once_more() {
    let mut world = World::new(&[HOME]);
    let ask = world.ask(Protocol::Pcp);
    world.answer(ask, Answer::Refused("not there yet".to_owned()));
    world.machine.handle_notice(ROUTER, notice(0), world.now);
    for protocol in [Protocol::NatPmp, Protocol::Upnp] {
        let ask = world.ask(protocol);
        world.answer(ask, Answer::Silent);
    }
    for protocol in ORDER {
        let ask = world.ask(protocol);
        world.answer(ask, Answer::Silent);
    }
    world.nobody_is_asked();
}

#[test]
fn epochs_tell_a_restart_as_the_rfc_does() {
    for (before, after, elapsed_s, restarted) in [
        (100, 200, 100, false),
        (100, 99, 0, false), // One second is forgiven.
        (100, 98, 0, true),
        (100, 0, 300, true),
        (0, 1_000, 960, false), // Clocks may differ by a sixteenth.
        (0, 1_000, 900, true),
        (0, 900, 1_000, true),
        (u32::MAX, 0, 1, true),
        (0, u32::MAX, 1, true),
    ] {
        let elapsed = Duration::from_secs(elapsed_s);
        let found = has_restarted(before, after, elapsed);
        assert_eq!(found, restarted, "{before} {after} {elapsed_s}");
    }
}

#[test]
fn a_router_that_speaks_no_protocol_is_told_in_a_sentence_and_a_refusal_by_itself() {
    let mut world = World::new(&[HOME]);
    for (protocol, answer) in [
        (Protocol::Pcp, Answer::Absent),
        (Protocol::NatPmp, Answer::Absent),
        (Protocol::Upnp, Answer::Silent),
    ] {
        let ask = world.ask(protocol);
        assert_eq!(world.problem(), "", "nothing is known yet");
        world.answer(ask, answer);
    }
    assert_eq!(
        world.problem(),
        "the router speaks none of PCP, NAT-PMP and UPnP"
    );
    world.pass(REST_FIRST * 2);
    for (protocol, answer) in [
        (Protocol::Pcp, Answer::Absent),
        (Protocol::NatPmp, Answer::Silent),
        (Protocol::Upnp, Answer::Refused("not authorized".to_owned())),
    ] {
        let ask = world.ask(protocol);
        world.answer(ask, answer);
    }
    assert_eq!(world.problem(), "UPnP: not authorized");
}

#[test]
fn answers_that_make_no_sense_are_refusals() {
    for (outside, lifetime_s, said) in [
        ("0.0.0.0:51820", 600, "no address"),
        ("127.0.0.1:51820", 600, "no address"),
        ("169.254.1.1:51820", 600, "no address"),
        ("224.0.0.1:51820", 600, "no address"),
        ("255.255.255.255:51820", 600, "no address"),
        ("45.0.113.5:0", 600, "no address"),
        ("192.168.1.11:51820", 600, "there is no NAT"),
        ("[2001:db8:0:7::11]:51820", 600, "no address"), // To a question about IPv4.
        ("45.0.113.5:51820", 1, "the least"),
        ("45.0.113.5:51820", 0, "the least"),
    ] {
        let mut world = World::new(&[HOME]);
        let ask = world.ask(Protocol::Pcp);
        world.answer(ask, granted(outside.parse().unwrap(), lifetime_s, 0));
        assert!(world.problem().contains(said), "{}", world.problem());
        assert!(world.told.is_empty(), "{outside}");
        world.ask(Protocol::NatPmp);
    }
}

#[test]
fn a_lifetime_of_a_hundred_years_is_a_day() {
    let mut world = World::new(&[HOME]);
    let ask = world.ask(Protocol::Pcp);
    world.answer(ask, granted(OUTSIDE, u32::MAX.into(), 0));
    world.pass(Duration::from_secs(43_200));
    world.ask(Protocol::Pcp);
}

#[test]
fn an_address_between_two_nats_is_told_and_said_to_be_one() {
    let mut world = World::new(&[HOME]);
    let ask = world.ask(Protocol::Pcp);
    let between = v4([100, 64, 7, 7], 51_820);
    world.answer(ask, granted(between, 600, 0));
    assert_eq!(world.told, [between]);
    assert!(
        world.problem().contains("another NAT"),
        "{}",
        world.problem()
    );
}

#[test]
fn a_port_that_is_taken_is_another_one_next_and_four_are_tried() {
    let mut world = World::new(&[HOME]);
    for protocol in [Protocol::Pcp, Protocol::NatPmp] {
        let ask = world.ask(protocol);
        world.answer(ask, Answer::Silent);
    }
    let mut ports = Vec::new();
    for _ in 0..PORT_TRIES {
        let ask = world.ask(Protocol::Upnp);
        ports.push(ask.port);
        world.answer(ask, Answer::PortTaken);
    }
    world.nobody_is_asked();
    assert_eq!(ports[0], 51_820);
    assert!(
        ports[1..].iter().all(|port| PORTS.contains(port)),
        "{ports:?}"
    );
}

#[test]
fn a_gateway_that_knows_no_lifetimes_is_asked_for_one_without_end_and_reminded_all_the_same() {
    let mut world = World::new(&[HOME]);
    for protocol in [Protocol::Pcp, Protocol::NatPmp] {
        let ask = world.ask(protocol);
        world.answer(ask, Answer::Silent);
    }
    let ask = world.ask(Protocol::Upnp);
    world.answer(ask, Answer::PermanentOnly);
    let ask = world.ask(Protocol::Upnp);
    assert!(ask.lifetime.is_zero());
    world.answer(ask, granted(OUTSIDE, 600, 0));
    world.pass(LIFETIME / 2);
    assert!(world.ask(Protocol::Upnp).lifetime.is_zero());
    world.machine.shut_down();
    world.drain();
    assert_eq!(world.released.len(), 1);
}

#[test]
fn what_was_granted_is_given_back_at_the_end_and_only_that() {
    let other = Gateway {
        address: [10, 0, 0, 1].into(),
        link: 3,
        own: [10, 0, 0, 7].into(),
    };
    let mut world = World::new(&[other, HOME]);
    let asks: Vec<_> = world.asked.drain(..).collect();
    let at_home = asks.iter().find(|ask| ask.gateway == HOME).unwrap();
    world.answer(*at_home, granted(OUTSIDE, 600, 0));
    world.machine.shut_down();
    world.drain();
    let released: Vec<_> = world.released.iter().map(|ask| ask.gateway).collect();
    assert_eq!(released, [HOME]);
}

#[test]
fn a_gateway_that_is_gone_has_granted_nothing_and_its_answer_means_nothing() {
    let mut world = World::new(&[HOME]);
    world.mapped();
    world.gateways(&[]);
    assert!(world.told.is_empty());
    assert_eq!(world.machine.poll_timeout(), None);
    world.gateways(&[HOME]);
    let ask = world.ask(Protocol::Pcp);
    world.gateways(&[]);
    world.answer(ask, granted(OUTSIDE, 600, 0));
    assert!(world.told.is_empty());
}

#[test]
fn a_public_machine_asks_nobody_and_no_machine_asks_more_than_four() {
    let own = |own: [u8; 4]| Gateway {
        own: own.into(),
        ..HOME
    };
    let world = World::new(&[own([198, 51, 100, 7])]);
    world.nobody_is_asked();
    let many: Vec<_> = (0..9).map(|last| own([10, 0, 0, last])).collect();
    let world = World::new(&many);
    assert_eq!(world.asked.len(), GATEWAYS_MAX);
    let world = World::new(&[&many[..], &[HOME_V6]].concat());
    assert_eq!(world.asked.len(), GATEWAYS_MAX + 1); // Of each family.
}

#[test]
fn a_pinhole_is_asked_for_as_a_port_is_and_leads_to_the_machines_own_address() {
    let mut world = World::new(&[HOME_V6]);
    let first = world.ask(Protocol::Pcp);
    world.answer(first, granted(PINHOLE, 600, 100));
    assert_eq!(
        (&world.told[..], world.problem()),
        (&[PINHOLE][..], String::new())
    );
    world.pass(Duration::from_secs(300));
    let again = world.ask(Protocol::Pcp);
    assert_eq!((again.port, again.nonce), (51_820, first.nonce));
    world.answer(again, Answer::Refused("forgot you".to_owned()));
    assert!(world.told.is_empty());
    // NAT-PMP knows no IPv6.
    for protocol in ORDER_V6 {
        let ask = world.ask(protocol);
        world.answer(ask, Answer::Silent);
    }
    world.nobody_is_asked();
    assert_eq!(world.problem(), "the router speaks none of PCP and UPnP");
    world.pass(REST_FIRST * 2);
    let ask = world.ask(Protocol::Pcp);
    world.answer(ask, granted(PINHOLE, 600, 0));
    world.machine.shut_down();
    world.drain();
    assert_eq!(world.released.len(), 1);
}

#[test]
fn an_address_that_is_not_global_needs_no_pinhole_and_nonsense_opens_none() {
    for own in ["fd07::11", "fe80::11", "::1", "64:ff9b::1"] {
        let own = own.parse().unwrap();
        World::new(&[Gateway { own, ..HOME_V6 }]).nobody_is_asked();
    }
    for outside in [
        "[::]:51820",
        "[fe80::1]:51820",
        "[ff02::1]:1",
        "[2001:db8::1]:0",
        "1.2.3.4:5",
    ] {
        let mut world = World::new(&[HOME_V6]);
        let ask = world.ask(Protocol::Pcp);
        world.answer(ask, granted(outside.parse().unwrap(), 600, 0));
        assert!(world.told.is_empty(), "{outside}");
        world.ask(Protocol::Upnp);
    }
}

#[test]
fn a_router_that_started_anew_is_asked_for_its_pinholes_too() {
    let elsewhere = Gateway {
        link: 3,
        address: "2001:db8:0:8::".parse().unwrap(),
        ..HOME_V6
    };
    let mut world = World::new(&[HOME, HOME_V6, elsewhere]);
    world.mapped();
    for _ in [HOME_V6, elsewhere] {
        let ask = world.ask(Protocol::Pcp);
        world.answer(ask, granted(PINHOLE, 600, 100));
    }
    world.pass(Duration::from_secs(50));
    // Another outside address is another one of IPv4 only.
    let said = Notice {
        epoch_s: 150,
        outside: Some([45, 0, 113, 6].into()),
    };
    world.machine.handle_notice(ROUTER, said, world.now);
    world.drain();
    assert_eq!(world.ask(Protocol::Pcp).gateway, HOME);
    world.nobody_is_asked();
    world.pass(NOTICE_EVERY);
    world.machine.handle_notice(ROUTER, notice(0), world.now);
    world.drain();
    assert_eq!(world.ask(Protocol::Pcp).gateway, HOME_V6);
    world.nobody_is_asked();
}

/// Whatever a gateway answers, in whatever order: questions are rare, and what is told was granted.
#[test]
fn no_answers_make_it_ask_often() {
    use rand::SeedableRng as _;
    for seed in 0..200 {
        let mut dice = Xoshiro256PlusPlus::seed_from_u64(seed);
        let mut world = World::new(&[HOME]);
        let (start, mut questions) = (world.now, 0_u32);
        while world.now < start + Duration::from_secs(3_600) {
            if let Some(ask) = world.asked.pop_front() {
                questions += 1;
                world.now += Duration::from_millis(dice.random_range(0..2_000));
                let answer = match dice.random_range(0..8) {
                    0 => Answer::Silent,
                    1 => Answer::PortTaken,
                    2 => Answer::PermanentOnly,
                    3 => Answer::Refused("so".to_owned()),
                    _ => granted(
                        v4(dice.random::<u32>().to_be_bytes(), dice.random()),
                        dice.random_range(0..200),
                        dice.random(),
                    ),
                };
                world.answer(ask, answer);
            } else {
                let said = notice(dice.random());
                world.machine.handle_notice(ROUTER, said, world.now);
                world.drain();
                world.pass(Duration::from_millis(dice.random_range(0..5_000)));
            }
            assert!(world.asked.len() <= 1);
        }
        // A notice in 10 s, each with all protocols and ports at worst.
        assert!(questions < 3_600, "{questions} in an hour, seed {seed}");
    }
}
