use mesh_api::admin::{FactsResponse, ResourceReport, SlotReport, StatusResponse};

use super::*;
use crate::report::{Endpoint, Status};

fn service(addresses: &[&str], ports: &[&str], ready: bool) -> Service {
    let texts = |texts: &[&str]| texts.iter().map(|&one| one.to_owned()).collect();
    Service {
        namespace: "shop".to_owned(),
        name: "web".to_owned(),
        kind: "ClusterIP".to_owned(),
        cluster_ips: texts(addresses),
        ports: texts(ports),
        endpoints: vec![Endpoint {
            address: "10.2.3.1:80".to_owned(),
            node: None,
            tier: "anywhere".to_owned(),
            ready,
            alive: true,
            chosen: true,
            ejected: false,
            full: false,
        }],
    }
}

#[test]
fn a_service_is_tried_at_its_first_tcp_port_if_it_has_an_endpoint() {
    let both = ["dns 53/UDP", "web 8080/TCP", "9090/TCP"];
    let to = service_address(&service(&["10.43.0.7"], &both, true)).unwrap();
    assert_eq!(to.to_string(), "10.43.0.7:8080");
    let to = service_address(&service(&["fd00::7"], &["80/TCP"], true)).unwrap();
    assert_eq!(to.to_string(), "[fd00::7]:80");
    for (service, words) in [
        (service(&[], &both, true), "no address"),
        (service(&["None"], &both, true), "no address"),
        (
            service(&["10.43.0.7"], &["dns 53/UDP"], true),
            "no TCP port",
        ),
        (service(&["10.43.0.7"], &both, false), "no ready endpoint"),
    ] {
        let why = service_address(&service).unwrap_err();
        assert!(why.contains(words), "{why}");
    }
}

#[test]
fn an_address_is_asked_for_by_its_reverse() {
    assert_eq!(reverse([100, 96, 0, 3].into()), "3.0.96.100.in-addr.arpa.");
}

#[track_caller]
fn verdict(test: &'static str, outcomes: &[Outcome], want: Verdict) {
    let checks = outcomes.iter().map(|one| Check::new("peer", "x", *one, ""));
    let report = Connectivity {
        node: "edge-a1".to_owned(),
        test,
        checks: checks.collect(),
        untried: 0,
    };
    assert_eq!(report.verdict(), want, "{outcomes:?}");
}

#[test]
fn it_is_down_when_nothing_works_and_when_anything_leaves_in_plain_text() {
    use Outcome::{Failed, Ok, Untried, Warning};
    verdict("connectivity", &[], Verdict::Ok);
    verdict("connectivity", &[Ok, Untried], Verdict::Ok);
    verdict("connectivity", &[Ok, Warning], Verdict::Degraded);
    verdict("connectivity", &[Ok, Failed], Verdict::Degraded);
    verdict("connectivity", &[Failed, Untried], Verdict::Down);
    verdict("encryption", &[Ok, Failed], Verdict::Down);
}

/// The checks of a node of which nothing is wrong, after `change`.
fn offline(change: impl Fn(&mut StatusResponse, &mut Vec<SlotReport>)) -> Vec<Outcome> {
    let mut status = StatusResponse {
        node: "edge-a1".to_owned(),
        certificate_expires_unix_s: 60 * 86_400,
        ..StatusResponse::default()
    };
    let mut slots = vec![SlotReport::default(), SlotReport::default()];
    change(&mut status, &mut slots);
    let facts = FactsResponse {
        state_free_bytes: Some(1 << 30),
        ..FactsResponse::default()
    };
    let known = offline::Known {
        status: &Status::from(status),
        slots: &slots,
        age_s: 3_600,
        facts: &facts,
        peers: &[],
        now_unix_s: 0,
    };
    let name = Check::new("name", "edge-a1", Outcome::Ok, "");
    let checks = offline::judge(&known, name);
    checks.iter().map(|check| check.verdict).collect()
}

#[test]
fn what_the_time_without_a_controller_needs_is_judged_a_line_each() {
    use Outcome::{Failed, Ok, Warning};
    assert_eq!(offline(|_, _| ()), [Ok; 6]);
    let damaged = |slots: &mut Vec<SlotReport>, index: usize| {
        slots[index].damage = "checksum".to_owned();
    };
    assert_eq!(offline(|_, slots| damaged(slots, 0))[0], Warning);
    let young = offline(|_, slots| slots[1].damage = "not written yet".to_owned());
    assert_eq!(young[0], Ok);
    let both = |_: &mut StatusResponse, slots: &mut Vec<SlotReport>| {
        damaged(slots, 0);
        damaged(slots, 1);
    };
    assert_eq!(offline(both)[0], Failed);
    assert_eq!(offline(|_, slots| slots.clear())[0], Failed);
    let ends = |at| offline(move |status, _| status.certificate_expires_unix_s = at)[1];
    assert_eq!((ends(-1), ends(86_400)), (Failed, Warning));
    let unkept = offline(|status, _| status.services_unkept = "no bpffs".to_owned());
    assert_eq!(unkept[4], Warning);
}

#[test]
fn every_other_node_of_the_newest_good_slot_is_tried() {
    let resource = |kind: &str, name: &str| ResourceReport {
        kind: kind.to_owned(),
        name: name.to_owned(),
        digest: String::new(),
    };
    let good = SlotReport {
        resources: vec![
            resource("relay", "r1"),
            resource("node", "edge-a1"),
            resource("node", "edge-b1"),
            resource("external_peer", "router"),
        ],
        ..SlotReport::default()
    };
    let bad = SlotReport {
        damage: "checksum".to_owned(),
        ..SlotReport::default()
    };
    assert_eq!(nodes(&[bad.clone(), good], "edge-a1"), ["edge-b1"]);
    assert!(nodes(&[bad], "edge-a1").is_empty());
}
