use proptest::prelude::*;

use super::*;
use crate::device::uapi::tests::change;

fn id(n: u8) -> NodeId {
    NodeId([n; 32])
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn secret(n: u8) -> Secret {
    Secret::new(Zeroizing::new([n; 32])).unwrap().clamped()
}

fn with_peers(peers: &[PeerChange]) -> Change {
    Change {
        peers: peers.to_vec(),
        ..Change::default()
    }
}

fn peer(n: u8, nets: &[&str]) -> PeerChange {
    PeerChange {
        allowed_ips: nets.iter().map(|text| AllowedIp::Add(net(text))).collect(),
        ..PeerChange::new(id(n))
    }
}

#[track_caller]
fn changed(config: &Config, change: &Change) -> (Config, Plan) {
    let new = config.changed(change).unwrap();
    let plan = Plan::new(config, &new);
    (new, plan)
}

fn nets_of(config: &Config, n: u8) -> Vec<String> {
    let nets = &config.peers[&id(n)].allowed_ips;
    nets.iter().map(ToString::to_string).collect()
}

#[test]
fn an_allowed_ip_is_one_peers() {
    let (config, plan) = changed(
        &Config::default(),
        &with_peers(&[
            peer(1, &["10.0.0.0/8", "fd00::/64"]),
            peer(2, &["10.1.0.0/16"]),
        ]),
    );
    assert_eq!(plan.describe, [id(1), id(2)]);
    assert!(plan.routes && !plan.restart && plan.remove.is_empty());
    // It moves, and nobody is described anew for that.
    let (config, plan) = changed(&config, &with_peers(&[peer(2, &["10.0.0.0/8"])]));
    assert_eq!(nets_of(&config, 1), ["fd00::/64"]);
    assert_eq!(nets_of(&config, 2), ["10.0.0.0/8", "10.1.0.0/16"]);
    assert_eq!(
        plan,
        Plan {
            routes: true,
            ..Plan::default()
        }
    );
    assert_eq!(
        config.routes().get("10.9.9.9".parse().unwrap()),
        Some(&id(2))
    );
    // Only its owner gives it up.
    let give_up = |n| PeerChange {
        allowed_ips: vec![AllowedIp::Remove(net("10.0.0.0/8"))],
        ..PeerChange::new(id(n))
    };
    let (config, plan) = changed(&config, &with_peers(&[give_up(1)]));
    assert_eq!(plan, Plan::default());
    let (config, plan) = changed(&config, &with_peers(&[give_up(2)]));
    assert!(plan.routes);
    assert_eq!(nets_of(&config, 2), ["10.1.0.0/16"]);
    // All at once.
    let replace = PeerChange {
        replace_allowed_ips: true,
        ..peer(1, &["10.1.0.0/16"])
    };
    let (config, _) = changed(&config, &with_peers(&[replace]));
    assert_eq!(nets_of(&config, 1), ["10.1.0.0/16"]);
    assert!(nets_of(&config, 2).is_empty());
    assert_eq!(config.routes().len(), 1);
}

#[test]
fn peers_come_change_and_go() {
    let update_only = PeerChange {
        update_only: true,
        ..peer(1, &["10.0.0.0/8"])
    };
    let remove = PeerChange {
        remove: true,
        ..PeerChange::new(id(1))
    };
    let (config, plan) = changed(
        &Config::default(),
        &with_peers(&[update_only.clone(), remove.clone()]),
    );
    assert_eq!((plan, config.peers().len()), (Plan::default(), 0));
    let (config, _) = changed(
        &config,
        &with_peers(&[peer(3, &[]), peer(1, &[]), peer(2, &[])]),
    );
    let order: Vec<_> = config.peers().iter().map(|(id, _)| id.0[0]).collect();
    assert_eq!(order, [3, 1, 2]);
    let (config, plan) = changed(&config, &with_peers(&[update_only]));
    assert!(plan.routes && plan.describe.is_empty());
    // Where it was heard from is no change that anybody has to be told of.
    let mut config = config;
    let heard_from = "192.0.2.7:7".parse().unwrap();
    config.note_endpoint(&id(1), heard_from);
    let with_keepalive = PeerChange {
        keepalive_s: Some(25),
        ..PeerChange::new(id(1))
    };
    let (config, plan) = changed(&config, &with_peers(&[with_keepalive]));
    assert_eq!(plan.describe, [id(1)]);
    let external = config.peers[&id(1)].external();
    assert_eq!(external.endpoint, Some(heard_from));
    assert_eq!(external.keepalive_s, Some(25));
    // Gone, and back in the same request: another peer, that knows nothing of the first.
    let (config, plan) = changed(&config, &with_peers(&[remove, PeerChange::new(id(1))]));
    assert_eq!((plan.remove, plan.describe), (vec![id(1)], vec![id(1)]));
    assert_eq!(config.peers[&id(1)].endpoint, None);
    let replace = Change {
        replace_peers: true,
        ..with_peers(&[peer(2, &[])])
    };
    let (config, plan) = changed(&config, &replace);
    assert_eq!(plan.remove.len(), 3);
    assert_eq!((plan.describe, config.peers().len()), (vec![id(2)], 1));
}

#[test]
fn nobody_is_ones_own_peer() {
    let own = PrivateKey::new(*secret(7).bytes()).node_id();
    let own_peer = PeerChange {
        allowed_ips: vec![AllowedIp::Add(net("10.0.0.0/8"))],
        ..PeerChange::new(own)
    };
    let (config, _) = changed(
        &Config::default(),
        &with_peers(std::slice::from_ref(&own_peer)),
    );
    assert_eq!(config.peers().len(), 1);
    let become_it = Change {
        private_key: Some(Some(secret(7))),
        ..Change::default()
    };
    let (config, plan) = changed(&config, &become_it);
    assert!(plan.restart && plan.routes);
    assert_eq!((plan.remove, config.peers().len()), (vec![own], 0));
    let (config, plan) = changed(&config, &with_peers(&[own_peer]));
    assert_eq!((plan, config.peers().len()), (Plan::default(), 0));
    // The same key again changes nothing; no key is another one.
    assert_eq!(changed(&config, &become_it).1, Plan::default());
    let nobody = Change {
        private_key: Some(None),
        ..Change::default()
    };
    assert!(changed(&config, &nobody).1.restart);
}

#[test]
fn nobody_talks_without_a_key_or_to_a_key_of_low_order() {
    let order_8 = hex::decode(LOW_ORDER[2]).unwrap();
    let low: [u8; 32] = order_8.try_into().unwrap();
    let mut low_too = low;
    low_too[31] |= 0x80;
    let peers = [id(1).0, low, low_too].map(|key| PeerChange::new(NodeId(key)));
    let (config, _) = changed(&Config::default(), &with_peers(&peers));
    assert_eq!(config.partner(&id(1)), None);
    let with_key = Change {
        private_key: Some(Some(secret(7))),
        ..Change::default()
    };
    let (config, _) = changed(&config, &with_key);
    assert_eq!(config.peers().len(), 3);
    assert!(config.partner(&id(1)).is_some());
    assert_eq!(config.partner(&NodeId(low)), None);
    assert_eq!(config.partner(&NodeId(low_too)), None);
}

#[test]
fn another_port_or_mark_is_no_restart() {
    let to = |listen_port, fwmark| Change {
        listen_port,
        fwmark,
        ..Change::default()
    };
    let (config, plan) = changed(&Config::default(), &to(Some(51_820), None));
    let moved = Plan {
        port: true,
        ..Plan::default()
    };
    assert_eq!(plan, moved);
    assert_eq!(
        changed(&config, &to(Some(51_820), Some(0))).1,
        Plan::default()
    );
    let (_, plan) = changed(&config, &to(None, Some(1)));
    assert_eq!(
        plan,
        Plan {
            mark: true,
            ..Plan::default()
        }
    );
    assert_eq!(changed(&config, &to(Some(0), None)).1, moved);
}

#[test]
fn there_is_a_most_of_everything() {
    let key = |n: usize| {
        let mut key = [9; 32];
        key[..8].copy_from_slice(&n.to_le_bytes());
        NodeId(key)
    };
    let peers = |count| (0..count).map(key).map(PeerChange::new).collect::<Vec<_>>();
    let full = Config::default()
        .changed(&with_peers(&peers(PEERS_MAX)))
        .unwrap();
    let refused = full
        .changed(&with_peers(&peers(PEERS_MAX + 1)))
        .unwrap_err();
    assert_eq!(refused.errno, Errno::NOSPC);
    let nets = |count| PeerChange {
        allowed_ips: (0_u32..count)
            .map(|n| AllowedIp::Add(IpNet::from(std::net::IpAddr::from(n.to_be_bytes()))))
            .collect(),
        ..PeerChange::new(id(1))
    };
    let most = u32::try_from(ALLOWED_IPS_MAX).unwrap();
    let full = Config::default()
        .changed(&with_peers(&[nets(most)]))
        .unwrap();
    assert!(full.changed(&with_peers(&[nets(most)])).is_ok());
    let refused = full.changed(&with_peers(&[nets(most + 1)])).unwrap_err();
    assert_eq!(refused.errno, Errno::NOSPC);
}

proptest! {
    /// Both tables of allowed IPs say the same, and a plan that is carried out leaves nothing.
    #[test]
    fn tables_agree_after_any_requests(changes in prop::collection::vec(change(), 1..8)) {
        let mut config = Config::default();
        for change in &changes {
            let new = config.changed(change).unwrap();
            let plan = Plan::new(&config, &new);
            for (net, owner) in &new.owners {
                prop_assert!(new.peers[owner].allowed_ips.contains(net));
            }
            let count: usize = new.peers.values().map(|peer| peer.allowed_ips.len()).sum();
            prop_assert_eq!(count, new.owners.len());
            prop_assert!(new.public_key().is_none_or(|own| !new.peers.contains_key(&own)));
            let mut known: BTreeSet<_> = config.peers.keys().copied().collect();
            for gone in &plan.remove {
                prop_assert!(known.remove(gone));
            }
            known.extend(&plan.describe);
            prop_assert_eq!(known, new.peers.keys().copied().collect());
            prop_assert_eq!(Plan::new(&new, &new), Plan::default());
            config = new;
        }
    }
}
