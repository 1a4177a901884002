use std::cell::Cell;

use super::*;

const MESH: MeshId = MeshId([9; 32]);
const OWN: NodeId = NodeId([1; 32]);
const PEER: NodeId = NodeId([2; 32]);

fn start() -> Instant {
    Instant::now()
}

fn name(id: &NodeId) -> Option<NodeName> {
    let number = id.0[0];
    number
        .is_multiple_of(2)
        .then(|| format!("node-{number}").parse().unwrap())
}

fn announcement(node: NodeId, boot: u64, count: u64) -> Announcement {
    Announcement {
        mesh: MESH,
        node,
        port: 51_820,
        addresses: vec![
            [192, 168, 1, 12].into(),
            "fe80::12".parse().unwrap(),
            "fd07::12".parse().unwrap(),
            [10, 7, 7, 7].into(), // Not of this LAN.
        ],
        epoch: 1,
        made_unix_ms: 42,
        boot,
        count,
    }
}

fn datagram(said: &Announcement) -> Vec<u8> {
    let signed = Signed {
        statement: said.encode(),
        certificate: Vec::new(),
        signature: Vec::new(),
    };
    signed.encode(&said.mesh).unwrap()
}

fn names(ids: impl IntoIterator<Item = NodeId>) -> BTreeMap<NodeId, NodeName> {
    let named = |id: NodeId| Some((id, name(&id)?));
    ids.into_iter().filter_map(named).collect()
}

struct World {
    machine: Machine,
    now: Instant,
    nets: Vec<IpNet>,
    verified: Cell<u32>,
    /// Whose certificate it is that comes.
    holder: Option<Identity>,
    names: BTreeMap<NodeId, NodeName>,
}

impl World {
    fn new() -> Self {
        let now = start();
        let nets = ["192.168.1.11/24", "fe80::11/64", "fd07::11/64"];
        let mut machine = Machine::new(1, now);
        machine.handle_lans(true, now);
        Self {
            machine,
            now,
            nets: nets.map(|net| net.parse().unwrap()).to_vec(),
            verified: Cell::new(0),
            holder: Some(Identity::Node {
                name: name(&PEER).unwrap(),
                id: PEER,
            }),
            names: names([PEER, NodeId([4; 32])]),
        }
    }

    fn hear(&mut self, from: &str, datagram: &[u8]) -> Result<Believed, Refusal> {
        let known = Known {
            mesh: MESH,
            own: OWN,
            names: &self.names,
            version: Version {
                epoch: 1,
                made_unix_ms: 42,
            },
        };
        let heard = Heard {
            from: from.parse().unwrap(),
            nets: &self.nets,
            datagram,
        };
        let verify = |_: &Signed| {
            self.verified.set(self.verified.get() + 1);
            self.holder.clone()
        };
        self.machine
            .handle_datagram(heard, &known, verify, self.now)
    }

    /// When it announces itself within this time, in milliseconds from now.
    fn announces(&mut self, time: Duration) -> Vec<u128> {
        let (begin, end) = (self.now, self.now + time);
        let mut at = Vec::new();
        while let Some(due) = self.machine.poll_timeout().filter(|due| *due <= end) {
            self.now = self.now.max(due);
            if self.machine.handle_timeout(self.now).is_some() {
                at.push((self.now - begin).as_millis());
            }
        }
        self.now = end;
        at
    }
}

#[test]
fn it_announces_itself_three_times_at_the_start_and_then_rarely() {
    let mut world = World::new();
    assert_eq!(world.announces(Duration::from_secs(2)), [0, 300, 1_000]);
    assert_eq!(world.announces(Duration::from_secs(220)), [0; 0]);
    let day = world.announces(Duration::from_secs(86_400)).len();
    assert!((250..330).contains(&day), "{day}");
}

#[test]
fn a_change_of_the_network_is_told_at_once_and_a_network_that_flaps_costs_little() {
    let mut world = World::new();
    world.announces(Duration::from_secs(100));
    world.machine.handle_lans(true, world.now);
    assert_eq!(world.announces(Duration::from_secs(2)), [0, 300, 1_000]);
    let mut sent = 0;
    for _ in 0..3_600 {
        world.machine.handle_lans(true, world.now);
        sent += world.announces(Duration::from_secs(1)).len();
    }
    assert!(sent <= 3_600 / 5 + 12, "{sent}");
    world.machine.handle_lans(false, world.now);
    assert_eq!(world.machine.poll_timeout(), None);
}

#[test]
fn a_neighbour_is_believed_where_it_can_be_called_on_this_lan_and_answered_once() {
    let mut world = World::new();
    world.announces(Duration::from_secs(2));
    let first = datagram(&announcement(PEER, 7, 1));
    let believed = world.hear("192.168.1.12", &first).unwrap();
    let addresses: Vec<_> = believed.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["192.168.1.12:51820", "[fd07::12]:51820"]);
    assert_eq!((believed.node, believed.version.made_unix_ms), (PEER, 42));
    let answered = world.announces(Duration::from_secs(1));
    assert!(answered.len() == 1 && answered[0] <= 300, "{answered:?}");
    // The same by IPv6, and the next one: nothing new.
    assert_eq!(world.hear("fe80::12", &first), Err(Refusal::Repeated));
    let second = datagram(&announcement(PEER, 7, 2));
    assert!(world.hear("192.168.1.12", &second).is_ok());
    assert_eq!(world.announces(Duration::from_secs(1)), [0; 0]);
    assert_eq!(world.hear("192.168.1.12", &first), Err(Refusal::Repeated));
    // It started anew, and knows nobody.
    let anew = datagram(&announcement(PEER, 8, 1));
    assert!(world.hear("192.168.1.12", &anew).is_ok());
    assert_eq!(world.announces(Duration::from_secs(1)).len(), 1);
}

#[test]
fn what_is_not_to_be_believed_is_refused_with_its_reason_and_costs_no_signature() {
    let mut world = World::new();
    let good = announcement(PEER, 7, 1);
    let other_mesh = Announcement {
        mesh: MeshId([8; 32]),
        ..good.clone()
    };
    // The clear part says this mesh.
    let disguised = Signed {
        statement: other_mesh.encode(),
        certificate: Vec::new(),
        signature: Vec::new(),
    };
    let disguised = disguised.encode(&MESH).unwrap();
    let here = "192.168.1.12";
    for (from, datagram, refusal) in [
        (here, b"M-SEARCH * HTTP/1.1".to_vec(), Refusal::Malformed),
        (here, datagram(&other_mesh), Refusal::OtherMesh),
        (here, disguised, Refusal::OtherMesh),
        (here, datagram(&announcement(OWN, 7, 1)), Refusal::Own),
        ("10.7.7.7", datagram(&good), Refusal::OffLink),
        ("192.168.1.66", datagram(&good), Refusal::OtherSource),
        (
            here,
            datagram(&announcement(NodeId([3; 32]), 7, 1)),
            Refusal::Unknown,
        ),
    ] {
        assert_eq!(world.hear(from, &datagram), Err(refusal));
        assert!(world.machine.counts().refused[&refusal] > 0);
    }
    assert_eq!(world.verified.get(), 0);
    assert_eq!(world.machine.counts().believed, 0);
}

#[test]
fn a_stranger_is_believed_only_with_a_newer_state_and_its_own_certificate() {
    let mut world = World::new();
    let stranger = NodeId([6; 32]);
    let newer = Announcement {
        made_unix_ms: 43,
        ..announcement(stranger, 7, 1)
    };
    let newer = datagram(&newer);
    let here = "192.168.1.12";
    assert_eq!(world.hear(here, &newer), Err(Refusal::Forged));
    world.holder = Some(Identity::Node {
        name: "node-6".parse().unwrap(),
        id: stranger,
    });
    let believed = world.hear(here, &newer).unwrap();
    assert_eq!(believed.name.as_str(), "node-6");
    let same = datagram(&announcement(stranger, 7, 2));
    assert_eq!(world.hear(here, &same), Err(Refusal::Unknown));
}

#[test]
fn who_has_an_older_state_is_answered_each_time_and_a_crowd_of_them_costs_little() {
    let mut world = World::new();
    world.announces(Duration::from_secs(60));
    let behind = |count| {
        let older = Announcement {
            made_unix_ms: 41,
            ..announcement(PEER, 7, count)
        };
        datagram(&older)
    };
    for count in 1..=3 {
        assert!(world.hear("192.168.1.12", &behind(count)).is_ok());
        let answered = world.announces(Duration::from_secs(1));
        assert!(answered.len() == 1 && answered[0] <= 300, "{answered:?}");
    }
    let mut answered = 0;
    for count in 4..604 {
        assert!(world.hear("192.168.1.12", &behind(count)).is_ok());
        answered += world.announces(Duration::from_secs(1)).len();
    }
    assert!(answered <= 600 / 5 + 12, "{answered}");
    // As old as this node's own.
    world.announces(Duration::from_secs(60));
    let same = datagram(&announcement(PEER, 7, 1_000));
    assert!(world.hear("192.168.1.12", &same).is_ok());
    assert_eq!(world.announces(Duration::from_secs(1)), [0; 0]);
}

#[test]
fn another_state_is_said_at_once_and_then_once_in_half_a_minute() {
    let mut world = World::new();
    world.announces(Duration::from_secs(60));
    world.machine.handle_news(world.now);
    let said = world.announces(Duration::from_secs(10));
    assert!(said.len() == 1 && said[0] <= 300, "{said:?}");
    // It changes all the time.
    let mut said = 0;
    for _ in 0..200 {
        world.machine.handle_news(world.now);
        said += world.announces(Duration::from_secs(1)).len();
    }
    assert!((6..=8).contains(&said), "{said}");
    world.machine.handle_lans(false, world.now);
    world.machine.handle_news(world.now);
    assert_eq!(world.machine.poll_timeout(), None);
}

#[test]
fn a_certificate_of_another_node_is_a_forgery_and_so_is_none() {
    let mut world = World::new();
    let said = datagram(&announcement(PEER, 7, 1));
    let wrong_name = Identity::Node {
        name: "node-4".parse().unwrap(),
        id: PEER,
    };
    let wrong_key = Identity::Node {
        name: name(&PEER).unwrap(),
        id: NodeId([4; 32]),
    };
    for holder in [
        None,
        Some(wrong_name),
        Some(wrong_key),
        Some(Identity::Controller),
    ] {
        world.holder = holder;
        assert_eq!(world.hear("192.168.1.12", &said), Err(Refusal::Forged));
    }
    assert_eq!(world.machine.counts().refused[&Refusal::Forged], 4);
    assert!(world.machine.neighbours.is_empty());
    // A forgery does not keep the true one out.
    world.holder = World::new().holder;
    assert!(world.hear("192.168.1.12", &said).is_ok());
}

#[test]
fn a_flood_costs_few_signatures_and_one_sender_cannot_take_all_of_them() {
    let mut world = World::new();
    world.holder = None;
    let begin = world.now;
    for round in 0..10_000_u64 {
        let said = datagram(&announcement(PEER, round, 1));
        let refusal = world.hear("192.168.1.12", &said).unwrap_err();
        assert!(matches!(refusal, Refusal::Forged | Refusal::TooMany));
        world.now += Duration::from_millis(1);
    }
    let seconds = u32::try_from((world.now - begin).as_secs()).unwrap();
    assert!(
        world.verified.get() <= SOURCE_MAX + 4 * seconds + 1,
        "{:?}",
        world.verified
    );
    // Another one is heard.
    world.holder = Some(Identity::Node {
        name: "node-4".parse().unwrap(),
        id: NodeId([4; 32]),
    });
    let mut said = announcement(NodeId([4; 32]), 1, 1);
    said.addresses = vec![[192, 168, 1, 44].into()];
    assert!(world.hear("192.168.1.44", &datagram(&said)).is_ok());
}

#[test]
fn a_flood_from_all_addresses_is_limited_too_and_so_is_what_is_remembered_of_it() {
    let mut world = World::new();
    world.nets = vec!["10.0.0.0/8".parse().unwrap()];
    world.holder = None;
    let begin = world.now;
    for source in 0..20_000_u32 {
        let [_, b, c, d] = source.to_be_bytes();
        let from = IpAddr::from([10, b, c, d]);
        let mut said = announcement(PEER, 1, 1);
        said.addresses = vec![from];
        world.hear(&from.to_string(), &datagram(&said)).unwrap_err();
        assert!(world.machine.sources.len() <= SOURCES_MAX);
        world.now += Duration::from_micros(100);
    }
    let seconds = u32::try_from((world.now - begin).as_secs()).unwrap();
    assert!(
        world.verified.get() <= ALL_MAX + 64 * (seconds + 1),
        "{:?}",
        world.verified
    );
}

#[test]
fn there_are_no_more_neighbours_than_a_lan_has() {
    let mut world = World::new();
    for number in 0..600_u16 {
        let mut id = [2; 32];
        id[1..3].copy_from_slice(&number.to_be_bytes());
        let id = NodeId(id);
        world.names.extend(names([id]));
        world.holder = Some(Identity::Node {
            name: name(&id).unwrap(),
            id,
        });
        let [high, low] = number.to_be_bytes();
        world.nets = vec!["10.0.0.0/8".parse().unwrap()];
        let mut said = announcement(id, 1, 1);
        said.addresses = vec![[10, 0, high, low].into()];
        let from = said.addresses[0].to_string();
        world.hear(&from, &datagram(&said)).unwrap();
        world.now += Duration::from_millis(20);
    }
    assert_eq!(world.machine.neighbours.len(), NEIGHBOURS_MAX);
    // 600 newcomers in 12 s are not answered 600 times.
    let sent = world.announces(Duration::from_secs(12));
    assert!(sent.len() <= 15, "{sent:?}");
}

#[test]
fn forty_nodes_that_start_together_all_find_each_other_and_do_not_answer_each_other_for_ever() {
    let now = start();
    let mut machines: Vec<_> = (0..40)
        .map(|seed| {
            let mut machine = Machine::new(seed, now);
            machine.handle_lans(true, now);
            machine
        })
        .collect();
    let nets: Vec<IpNet> = vec!["10.0.0.0/8".parse().unwrap()];
    let mut now = now;
    let mut sent = 0;
    let id = |number: usize| NodeId([u8::try_from(2 * number).unwrap(); 32]);
    let all = names((0..machines.len()).map(id));
    let end = now + Duration::from_secs(60);
    while now < end {
        for sender in 0..machines.len() {
            let Some((boot, count)) = machines[sender].handle_timeout(now) else {
                continue;
            };
            sent += 1;
            let mut said = announcement(id(sender), boot, count);
            let from = IpAddr::from([10, 0, 0, u8::try_from(sender).unwrap()]);
            said.addresses = vec![from];
            let datagram = datagram(&said);
            for (listener, machine) in machines.iter_mut().enumerate() {
                let known = Known {
                    mesh: MESH,
                    own: id(listener),
                    names: &all,
                    version: Version::default(),
                };
                let heard = Heard {
                    from,
                    nets: &nets,
                    datagram: &datagram,
                };
                let holder = name(&id(sender)).map(|name| Identity::Node {
                    name,
                    id: id(sender),
                });
                machine.handle_datagram(heard, &known, |_| holder, now).ok();
            }
        }
        now += Duration::from_millis(20);
    }
    for machine in &machines {
        assert_eq!(machine.neighbours.len(), machines.len() - 1);
    }
    assert!(sent <= machines.len() * 8, "{sent}");
}
