//! Random packets through the programs by random tables that change under them, against a second
//! reading of `docs/policy.md`: plain, and with all flows in one list.

use std::num::NonZeroU32;

use proptest::{collection::vec, option, prelude::*, sample::select};

use super::*;

const IPS: [[u8; 4]; 4] = [[8, 0, 1, 1], [8, 0, 1, 2], [8, 0, 2, 1], [8, 0, 2, 2]];
const PREFIXES: [([u8; 4], u8); 6] = [
    ([0; 4], 0),
    ([8, 0, 0, 0], 16),
    ([8, 0, 1, 0], 24),
    ([8, 0, 2, 0], 23),
    ([8, 0, 1, 2], 32),
    ([8, 0, 2, 1], 32),
];
const PORTS: [u16; 4] = [80, 81, 0x5000, 40_000];

#[derive(Debug, Clone)]
enum Step {
    Apply(Tables),
    Packet(Sent),
}

#[derive(Debug, Clone, Copy)]
struct Sent {
    direction: Direction,
    from: SocketAddr,
    to: SocketAddr,
    udp: bool,
    /// Of TCP: the flow's first packet.
    opens: bool,
}

type FlowKey = (SocketAddr, SocketAddr, bool, Direction);

#[derive(Default)]
struct Model {
    tables: Tables,
    /// What was decided, and by which state of the tables.
    flows: BTreeMap<FlowKey, (usize, bool)>,
    state: usize,
}

impl Model {
    fn passes(&mut self, sent: &Sent) -> bool {
        let Sent {
            direction,
            from,
            to,
            udp,
            opens,
        } = *sent;
        if !self.tables.enforced || from.ip() == to.ip() {
            return true;
        }
        let other = if direction == In { Out } else { In };
        let answered = (to, from, udp, other);
        let own = (from, to, udp, direction);
        let known = if self.flows.contains_key(&own) {
            Some(own)
        } else {
            (!opens && self.flows.contains_key(&answered)).then_some(answered)
        };
        let Some(key) = known else {
            let middle = !udp && !opens;
            let answers = middle && from.port() < 32_768 && to.port() >= 32_768;
            let opened = if answers { answered } else { own };
            let allowed = self.judge(&opened);
            if allowed {
                self.flows.insert(opened, (self.state, true));
            }
            return allowed;
        };
        if self.flows[&key].0 != self.state {
            let allowed = self.judge(&key);
            self.flows.insert(key, (self.state, allowed));
        }
        self.flows[&key].1
    }

    fn judge(&self, (from, to, udp, direction): &FlowKey) -> bool {
        let (local, remote) = match direction {
            In => (to, from),
            Out => (from, to),
        };
        let pair = Pair {
            local: self.class(local.ip()),
            remote: self.class(remote.ip()),
            direction: *direction,
        };
        let Some(rules) = self.tables.pairs.get(&pair) else {
            return false;
        };
        let Some(set) = rules.rule_set else {
            return rules.strictest.allowed;
        };
        let protocol = if *udp { UDP } else { TCP };
        let ports = self.tables.ports.iter();
        let having = ports.filter(|(prefix, _)| {
            let same = u32::from(prefix.port ^ to.port()) >> (16 - u32::from(prefix.bits)) == 0;
            prefix.rule_set == set.get()
                && prefix.protocol.is_none_or(|one| one == protocol && same)
        });
        let longest = having.max_by_key(|(prefix, _)| (prefix.protocol, prefix.bits));
        longest.is_some_and(|(_, verdict)| verdict.allowed)
    }

    fn class(&self, ip: IpAddr) -> u32 {
        let IpAddr::V4(ip) = ip else { return 0 };
        let addresses = self.tables.addresses.iter();
        let having = addresses.filter(|((prefix, bits), _)| {
            let IpAddr::V4(prefix) = prefix else {
                return false;
            };
            let differ = u64::from(ip.to_bits() ^ prefix.to_bits());
            differ >> (32 - bits) == 0
        });
        let longest = having.max_by_key(|((_, bits), _)| *bits);
        longest.map_or(0, |(_, class)| *class)
    }
}

fn any_direction() -> impl Strategy<Value = Direction> {
    select(vec![In, Out])
}

fn any_verdict() -> impl Strategy<Value = Verdict> {
    select(vec![ALLOWED, DENIED, AUDITED])
}

fn any_tables() -> impl Strategy<Value = Tables> {
    let prefix = select(PREFIXES.to_vec()).prop_map(|(ip, bits)| (IpAddr::from(ip), bits));
    let addresses = proptest::collection::btree_map(prefix, 1..3_u32, 0..6);
    let pair = (0..3_u32, 0..3_u32, any_direction());
    let pair = pair.prop_map(|(local, remote, direction)| Pair {
        local,
        remote,
        direction,
    });
    let rules = (any_verdict(), option::of(1..3_u32));
    let rules = rules.prop_map(|(strictest, set)| PairRules {
        strictest,
        rule_set: set.and_then(NonZeroU32::new),
    });
    let pairs = proptest::collection::btree_map(pair, rules, 0..18);
    let protocol = option::of(select(vec![TCP, UDP]));
    let port = (
        1..3_u32,
        protocol,
        select(PORTS.to_vec()),
        select(vec![0, 4, 15, 16]),
    );
    let port = port.prop_map(|(rule_set, protocol, port, bits)| {
        let bits = if protocol.is_some() { bits } else { 0 };
        let mask = !u16::MAX.checked_shr(bits).unwrap_or(0);
        PortPrefix {
            rule_set,
            protocol,
            port: port & mask,
            bits: u8::try_from(bits).unwrap(),
        }
    });
    let ports = proptest::collection::btree_map(port, any_verdict(), 0..8);
    let enforced = select(vec![true, true, true, false]);
    (enforced, addresses, pairs, ports).prop_map(|(enforced, addresses, pairs, ports)| Tables {
        enforced,
        addresses,
        pairs,
        ports,
    })
}

fn any_step() -> impl Strategy<Value = Step> {
    let end = (select(IPS.to_vec()), select(PORTS.to_vec()));
    let end = end
        .prop_map(|(ip, port)| SocketAddr::from((ip, port)))
        .boxed();
    let sent = (
        any_direction(),
        end.clone(),
        end,
        any::<bool>(),
        any::<bool>(),
    );
    let sent = sent.prop_map(|(direction, from, to, udp, syn)| {
        Step::Packet(Sent {
            direction,
            from,
            to,
            udp,
            opens: syn && !udp,
        })
    });
    prop_oneof![1 => any_tables().prop_map(Step::Apply), 12 => sent]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn packets_are_judged_as_the_tables_say(first in any_tables(), steps in vec(any_step(), 1..250)) {
        let policy = Policy::load(None).unwrap();
        let mut lab = Lab { policy, tables: Tables::default() };
        let mut model = Model::default();
        for (index, step) in [Step::Apply(first)].into_iter().chain(steps).enumerate() {
            match step {
                Step::Apply(tables) => {
                    // The same once more is no other state.
                    model.state += usize::from(tables != model.tables);
                    model.tables = tables.clone();
                    lab.tables = tables;
                    lab.apply();
                }
                Step::Packet(sent) => {
                    let Sent { from, to, .. } = sent;
                    let packet = match (sent.udp, sent.opens) {
                        (true, _) => wire::udp(from, to, wire::ODD),
                        (false, true) => syn(from, to),
                        (false, false) => ack(from, to),
                    };
                    let passed = lab.passes(sent.direction, &packet);
                    prop_assert_eq!(passed, model.passes(&sent), "step {}: {:?}", index, sent);
                }
            }
        }
    }
}
