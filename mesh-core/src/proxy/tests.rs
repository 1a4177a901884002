use std::net::{Ipv4Addr, Ipv6Addr};

use mesh_wire::id::{MeshId, NodeId};

use super::*;
use crate::snapshot::{Locality, MeshSettings};

/// `edge-a1` at site a, `edge-b1` at site b, both 192.168.1.11 at home; `gw` has an address of its own.
fn snapshot() -> Snapshot {
    let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(MeshId([0; 32]), "m"));
    for (last, name, site, underlay) in [
        (1, "edge-a1", Some("a"), "192.168.1.11"),
        (2, "edge-b1", Some("b"), "192.168.1.11"),
        (3, "gw", None, "10.0.0.3"),
    ] {
        let node = Node {
            id: NodeId([last; 32]),
            name: name.parse().unwrap(),
            locality: Locality {
                site: site.map(|site| site.parse().unwrap()),
                ..Locality::default()
            },
            overlay_v4: Ipv4Addr::new(100, 96, 0, last),
            overlay_v6: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last.into()),
            prefixes: Vec::new(),
            pod_prefixes: vec!["10.244.1.0/24".parse().unwrap()],
            underlay_addresses: vec![underlay.parse().unwrap()],
            static_candidates: Vec::new(),
            mapped: Vec::new(),
        };
        snapshot.nodes.insert(node.name.clone(), node);
    }
    snapshot
}

fn rule(clients: &[&str], nodes: &[&str], sites: &[&str], port: u16) -> Rule {
    let nodes = nodes.iter().map(|&node| NamePattern::new(node.to_owned()));
    Rule {
        clients: names(clients),
        nodes: nodes.collect(),
        sites: sites.iter().map(|site| site.parse().unwrap()).collect(),
        ports: vec![port..=port],
    }
}

fn names(texts: &[&str]) -> Vec<ClientName> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// What the API server may reach: its addresses in order, or why not.
fn asked(target: &str) -> Result<Vec<String>, Refusal> {
    let rules = [rule(&["cn:kube-apiserver"], &["*"], &[], 10_250)];
    let snapshot = snapshot();
    let allowed = decide(&rules, &names(&["cn:kube-apiserver"]), target, &snapshot)?;
    Ok(allowed.to.iter().map(ToString::to_string).collect())
}

#[test]
fn a_node_is_found_by_every_name_that_it_has_and_reached_in_the_mesh_only() {
    let both = ["100.96.0.1:10250", "[fd00::1]:10250"];
    for target in [
        "edge-a1:10250",
        "Edge-A1:10250",
        "edge-a1.:10250",
        "edge-a1.mesh:10250",
    ] {
        assert_eq!(asked(target).unwrap(), both, "{target}");
    }
    assert_eq!(asked("100.96.0.1:10250").unwrap(), ["100.96.0.1:10250"]);
    assert_eq!(asked("[fd00::1]:10250").unwrap(), ["[fd00::1]:10250"]);
    assert_eq!(
        asked("10.0.0.3:10250").unwrap(),
        ["100.96.0.3:10250", "[fd00::3]:10250"]
    );
}

#[test]
fn an_address_of_two_homes_is_refused_and_both_nodes_named() {
    let refusal = asked("192.168.1.11:10250").unwrap_err();
    let said = refusal.to_string();
    for part in ["192.168.1.11", "edge-a1", "edge-b1", "by its name"] {
        assert!(said.contains(part), "{part} is not in: {said}");
    }
}

#[test]
fn nothing_outside_the_mesh_and_no_loopback_can_be_reached() {
    for host in [
        "127.0.0.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:100.96.0.1]",
        "0.0.0.0",
        "[::]",
        "localhost",
        "169.254.169.254",
        "10.244.1.7",
        "100.96.0.9",
        "example.org",
        "edge-a1.example.org",
        "edge-a1.mesh.mesh",
        "0x7f.1",
        "2130706433",
        "edge-a1@127.0.0.1",
        "edge-a1%00",
    ] {
        let target = format!("{host}:10250");
        let refused = asked(&target).unwrap_err();
        assert!(
            matches!(refused, Refusal::UnknownHost(_)),
            "{target}: {refused:?}"
        );
    }
}

#[test]
fn what_is_no_address_is_told_so() {
    for target in [
        "",
        ":",
        "edge-a1",
        "edge-a1:",
        "edge-a1:0",
        "edge-a1:65536",
        "edge-a1:-1",
        ":10250",
        "edge-a1:ssh",
    ] {
        let refused = asked(target).unwrap_err();
        assert!(matches!(refused, Refusal::NotAnAddress(_)), "{target}");
    }
}

#[test]
fn without_a_rule_nobody_may_do_anything_and_hears_nothing_of_the_mesh() {
    let snapshot = snapshot();
    let rules = [rule(&["cn:kube-apiserver", "uid:0"], &["*"], &[], 10_250)];
    for client in [
        &[] as &[&str],
        &["cn:mallory"],
        // One kind of name is not another.
        &["o:kube-apiserver"],
        &["uri:kube-apiserver"],
        &["uid:1000"],
        &["cn:uid:0"],
    ] {
        for target in ["edge-a1:10250", "nobody:10250"] {
            let refused = decide(&rules, &names(client), target, &snapshot).unwrap_err();
            assert_eq!(refused, Refusal::UnknownClient, "{client:?} {target}");
        }
    }
    let refused = decide(&[], &names(&["uid:0"]), "edge-a1:10250", &snapshot);
    assert_eq!(refused.unwrap_err(), Refusal::UnknownClient);
}

#[test]
fn rules_are_about_nodes_sites_and_ports_and_the_first_that_allows_counts() {
    let snapshot = snapshot();
    let rules = [
        rule(&["o:ops"], &["edge-*"], &[], 22),
        rule(&["o:ops", "cn:prometheus"], &[], &["b"], 9_100),
        rule(&["cn:prometheus"], &["gw"], &["b"], 9_100),
    ];
    for (client, target, expected) in [
        ("o:ops", "edge-a1:22", Some(0)),
        ("o:ops", "gw:22", None),
        ("o:ops", "edge-a1:9100", None),
        ("o:ops", "edge-b1:9100", Some(1)),
        ("cn:prometheus", "edge-b1:9100", Some(1)),
        ("cn:prometheus", "gw:9100", Some(2)),
        ("cn:prometheus", "gw:22", None),
        // The site of a node without one is not the one that nobody named.
        ("o:ops", "gw:9100", None),
    ] {
        let decided = decide(&rules, &names(&[client]), target, &snapshot);
        let rule = decided.as_ref().ok().map(|allowed| allowed.rule);
        assert_eq!(rule, expected, "{client} {target}: {decided:?}");
        if expected.is_none() {
            assert!(matches!(decided, Err(Refusal::Denied { .. })));
        }
    }
}

#[test]
fn clients_are_written_as_they_are_shown() {
    for text in [
        "uid:0",
        "cn:kube-apiserver",
        "cn:system:node:edge-a1",
        "o:system:masters",
        "uri:spiffe://m/node/edge-a1",
    ] {
        assert_eq!(text.parse::<ClientName>().unwrap().to_string(), text);
    }
    for text in ["", "cn", "cn:", "uid:root", "uid:-1", "user:x"] {
        let error = text.parse::<ClientName>().unwrap_err().to_string();
        assert!(error.contains("cn:common name"), "{error}");
    }
}

proptest::proptest! {
    #[test]
    fn whatever_is_asked_for_only_overlay_addresses_of_nodes_come_out(target in ".{0,40}", port: u16) {
        for target in [target.clone(), format!("{target}:{port}")] {
            let snapshot = snapshot();
            let all = rule(&["uid:0"], &["*"], &[], 0);
            let rules = [Rule { ports: vec![0..=u16::MAX], ..all }];
            if let Ok(allowed) = decide(&rules, &[ClientName::Uid(0)], &target, &snapshot) {
                let own = [IpAddr::V4(allowed.node.overlay_v4), IpAddr::V6(allowed.node.overlay_v6)];
                for to in allowed.to {
                    assert!(own.contains(&to.ip()) && to.port() != 0, "{target:?} {to}");
                }
            }
        }
    }
}
