//! What the mesh's own zones answer, form by form.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::wildcard_enum_match_arm,
    reason = "a test may fail loudly, and its helpers too"
)]

mod common;

use std::{net::IpAddr, sync::Arc};

use common::{query, view};
use hickory_proto::{
    op::{Edns, Message, OpCode, ResponseCode},
    rr::{DNSClass, Name, RData, RecordType},
};
use mesh_core::{services::View, snapshot::Snapshot};
use mesh_dns::{
    answer::{Answer, Told, answer},
    local::{LocalNames, PodNames},
};

#[test]
fn every_form_of_name_is_answered() {
    let view = view();
    let own_v6 = view.snapshot.nodes["edge-a1"].overlay_v6;
    let own_v6_arpa = Name::from(IpAddr::from(own_v6)).to_ascii();
    let unknown_v6_arpa = Name::from(common::address("fd09:909:909::77")).to_ascii();
    let own_v6 = own_v6.to_string();
    let ip6 = |address: &str| Name::from(common::address(address)).to_ascii();
    let (vip_v6, pod_v6) = (ip6("fd43::a"), ip6("fd02::3:1"));
    let svc = "shop.svc.cluster.local.";
    let srv_targets = format!(
        "0 25 8080 db-0.db.{svc} | 0 25 8080 10-2-2-1.db.{svc} | 0 25 8080 10-2-3-1.db.{svc} | 0 25 8080 fd02-0-0-0-0-0-3-1.db.{svc}"
    );
    for (name, record_type, want) in [
        // The version of the schema.
        ("dns-version.cluster.local.", "TXT", "1.1.0"),
        // ClusterIP.
        ("inventory.shop.svc.cluster.local.", "A", "10.43.0.10"),
        ("inventory.shop.svc.cluster.local.", "AAAA", "fd43::a"),
        ("InVentory.SHOP.svc.Cluster.LOCAL.", "A", "10.43.0.10"),
        (
            "inventory.shop.svc.cluster.local.",
            "MX",
            "NODATA cluster.local.",
        ),
        (
            "_http._tcp.inventory.shop.svc.cluster.local.",
            "SRV",
            "0 100 80 inventory.shop.svc.cluster.local.",
        ),
        (
            "_http._tcp.inventory.shop.svc.cluster.local.",
            "A",
            "NODATA cluster.local.",
        ),
        (
            "_dns._udp.inventory.shop.svc.cluster.local.",
            "SRV",
            "0 100 53 inventory.shop.svc.cluster.local.",
        ),
        (
            "_http._udp.inventory.shop.svc.cluster.local.",
            "SRV",
            "NXDOMAIN cluster.local.",
        ),
        (
            "_ftp._tcp.inventory.shop.svc.cluster.local.",
            "SRV",
            "NXDOMAIN cluster.local.",
        ),
        (
            "http._tcp.inventory.shop.svc.cluster.local.",
            "SRV",
            "NXDOMAIN cluster.local.",
        ),
        (
            "_._tcp.inventory.shop.svc.cluster.local.",
            "SRV",
            "NXDOMAIN cluster.local.",
        ),
        (
            "_tcp.inventory.shop.svc.cluster.local.",
            "SRV",
            "NODATA cluster.local.",
        ),
        (
            "x.inventory.shop.svc.cluster.local.",
            "A",
            "NXDOMAIN cluster.local.",
        ),
        (
            "10.0.43.10.in-addr.arpa.",
            "PTR",
            "inventory.shop.svc.cluster.local.",
        ),
        (&vip_v6, "PTR", "inventory.shop.svc.cluster.local."),
        (
            "10.0.43.10.in-addr.arpa.",
            "A",
            "NODATA 10.0.43.10.in-addr.arpa.",
        ),
        // Headless: near first, not ready left out.
        (
            "db.shop.svc.cluster.local.",
            "A",
            "10.2.1.1 | 10.2.2.1 | 10.2.3.1",
        ),
        ("db.shop.svc.cluster.local.", "AAAA", "fd02::1 | fd02::3:1"),
        ("_http._tcp.db.shop.svc.cluster.local.", "SRV", &srv_targets),
        (
            "_dns._udp.db.shop.svc.cluster.local.",
            "SRV",
            "NODATA cluster.local.",
        ),
        ("db-0.db.shop.svc.cluster.local.", "A", "10.2.1.1"),
        ("db-0.db.shop.svc.cluster.local.", "AAAA", "fd02::1"),
        ("10-2-3-1.db.shop.svc.cluster.local.", "A", "10.2.3.1"),
        (
            "10-2-3-1.db.shop.svc.cluster.local.",
            "AAAA",
            "NODATA cluster.local.",
        ),
        (
            "fd02-0-0-0-0-0-3-1.db.shop.svc.cluster.local.",
            "AAAA",
            "fd02::3:1",
        ),
        (
            "10-2-1-1.db.shop.svc.cluster.local.",
            "A",
            "NXDOMAIN cluster.local.",
        ),
        (
            "10-2-1-9.db.shop.svc.cluster.local.",
            "A",
            "NXDOMAIN cluster.local.",
        ),
        (
            "1.3.2.10.in-addr.arpa.",
            "PTR",
            "10-2-3-1.db.shop.svc.cluster.local.",
        ),
        (
            "1.1.2.10.in-addr.arpa.",
            "PTR",
            "db-0.db.shop.svc.cluster.local.",
        ),
        (
            &pod_v6,
            "PTR",
            "fd02-0-0-0-0-0-3-1.db.shop.svc.cluster.local.",
        ),
        (
            "empty.shop.svc.cluster.local.",
            "A",
            "NODATA cluster.local.",
        ),
        // ExternalName.
        (
            "search.shop.svc.cluster.local.",
            "CNAME",
            "search.example.org.",
        ),
        (
            "search.shop.svc.cluster.local.",
            "A",
            "search.example.org. then ask search.example.org. A",
        ),
        (
            "shelf.shop.svc.cluster.local.",
            "A",
            "inventory.shop.svc.cluster.local. | 10.43.0.10",
        ),
        (
            "nowhere.shop.svc.cluster.local.",
            "A",
            "missing.shop.svc.cluster.local. NXDOMAIN cluster.local.",
        ),
        (
            "x.search.shop.svc.cluster.local.",
            "A",
            "NXDOMAIN cluster.local.",
        ),
        // What is between, and what is not there.
        ("cluster.local.", "A", "NODATA cluster.local."),
        ("svc.cluster.local.", "A", "NODATA cluster.local."),
        ("shop.svc.cluster.local.", "A", "NODATA cluster.local."),
        ("nobody.svc.cluster.local.", "A", "NXDOMAIN cluster.local."),
        (
            "missing.shop.svc.cluster.local.",
            "A",
            "NXDOMAIN cluster.local.",
        ),
        ("*.shop.svc.cluster.local.", "A", "NXDOMAIN cluster.local."),
        (
            "10-2-1-1.shop.pod.cluster.local.",
            "A",
            "NXDOMAIN cluster.local.",
        ),
        (
            "a\\.b.shop.svc.cluster.local.",
            "A",
            "NXDOMAIN cluster.local.",
        ),
        // Nodes.
        ("edge-a1.mesh.", "A", "100.96.0.1"),
        ("EDGE-A1.Mesh.", "A", "100.96.0.1"),
        ("edge-a1.mesh.", "AAAA", &own_v6),
        ("edge-a1.mesh.", "TXT", "NODATA mesh."),
        ("gw.lab.mesh.", "A", "100.96.0.4"),
        ("lab.mesh.", "A", "NODATA mesh."),
        ("camera.mesh.", "A", "100.96.9.9"),
        ("nobody.mesh.", "A", "NXDOMAIN mesh."),
        ("1.0.96.100.in-addr.arpa.", "PTR", "edge-a1.mesh."),
        (&own_v6_arpa, "PTR", "edge-a1.mesh."),
        ("9.9.96.100.in-addr.arpa.", "PTR", "camera.mesh."),
        (
            "77.0.96.100.in-addr.arpa.",
            "PTR",
            "NXDOMAIN 96.100.in-addr.arpa.",
        ),
        (
            "01.0.96.100.in-addr.arpa.",
            "PTR",
            "NXDOMAIN 96.100.in-addr.arpa.",
        ),
        (
            "0.96.100.in-addr.arpa.",
            "PTR",
            "NODATA 96.100.in-addr.arpa.",
        ),
        (
            "77.0.111.100.in-addr.arpa.",
            "PTR",
            "NXDOMAIN 111.100.in-addr.arpa.",
        ),
        (
            &unknown_v6_arpa,
            "PTR",
            "NXDOMAIN 9.0.9.0.9.0.9.0.9.0.d.f.ip6.arpa.",
        ),
        (
            &own_v6_arpa[2..],
            "PTR",
            "NODATA 9.0.9.0.9.0.9.0.9.0.d.f.ip6.arpa.",
        ),
        // Everybody else's.
        ("example.org.", "A", "ask example.org. A"),
        ("notcluster.local.", "A", "ask notcluster.local. A"),
        ("local.", "A", "ask local. A"),
        (".", "NS", "ask . NS"),
        ("100.in-addr.arpa.", "PTR", "ask 100.in-addr.arpa. PTR"),
        (
            "1.0.112.100.in-addr.arpa.",
            "PTR",
            "ask 1.0.112.100.in-addr.arpa. PTR",
        ),
        (
            "1.7.168.192.in-addr.arpa.",
            "PTR",
            "ask 1.7.168.192.in-addr.arpa. PTR",
        ),
    ] {
        let asked = query(name, record_type.parse().unwrap());
        assert_eq!(
            show(&answer(&asked, Some(&view), &LocalNames::default(), None)),
            want,
            "{name} {record_type}"
        );
    }
}

#[test]
fn own_answers_are_authoritative_short_lived_and_echo_the_question_as_asked() {
    let asked = query("InVentory.shop.SVC.cluster.local.", RecordType::A);
    let reply = reply(&view(), &asked);
    assert!(reply.authoritative && reply.recursion_available && !reply.truncation);
    let name = reply.queries[0].name();
    assert!(name.eq_case(asked.queries[0].name()));
    assert!(reply.answers[0].name.eq_case(name));
    assert_eq!(reply.answers[0].ttl, 5);

    let missing = query("missing.shop.svc.cluster.local.", RecordType::A);
    let soa = self::reply(&view(), &missing).authorities.remove(0);
    let RData::SOA(data) = &soa.data else {
        panic!("{soa}");
    };
    assert_eq!((soa.ttl, data.minimum, data.serial), (5, 5, 42));
}

#[test]
fn srv_answers_bring_the_addresses_of_their_targets() {
    let asked = query("_http._tcp.db.shop.svc.cluster.local.", RecordType::SRV);
    let reply = reply(&view(), &asked);
    let additional: Vec<_> = reply
        .additionals
        .iter()
        .map(|one| one.data.to_string())
        .collect();
    assert_eq!(
        additional,
        ["10.2.1.1", "fd02::1", "10.2.2.1", "10.2.3.1", "fd02::3:1"]
    );
}

#[test]
fn headless_answers_leave_dead_nodes_out_while_others_live() {
    let mut view = view();
    let asked = query("db.shop.svc.cluster.local.", RecordType::A);
    let mut kill = |name: &str| {
        view.dead.insert(name.parse().unwrap());
        show(&answer(&asked, Some(&view), &LocalNames::default(), None))
    };
    assert_eq!(kill("edge-a2"), "10.2.1.1 | 10.2.3.1");
    assert_eq!(kill("edge-a1"), "10.2.3.1");
    // Nobody is left: an address that may be dead is better than none.
    assert_eq!(kill("edge-b1"), "10.2.1.1 | 10.2.2.1 | 10.2.3.1");
}

#[test]
fn what_policy_denies_to_a_pod_is_left_out_of_what_it_is_told_of_headless_services() {
    const WEB: &str = "10.2.1.50";
    let mut snapshot = common::snapshot();
    common::add_policies(&mut snapshot, WEB);
    let callers = common::callers(&snapshot);
    let mut view = View {
        snapshot: Arc::new(snapshot),
        ..view()
    };
    let svc = "shop.svc.cluster.local.";
    let ask = |view: &View, from: &str, name: &str, record_type| {
        let asked = query(&format!("{name}{svc}"), record_type);
        let caller = callers.caller(common::address(from));
        let answer = answer(&asked, Some(view), &LocalNames::default(), caller);
        let told = match &answer {
            Answer::Reply(_, told) => *told,
            other => panic!("{other:?}"),
        };
        (show(&answer), told)
    };
    let is = |view: &View, from, name, record_type, want: &str, told| {
        let said = ask(view, from, name, record_type);
        assert_eq!(
            said,
            (want.to_owned(), told),
            "{name} {record_type}, {from}"
        );
    };
    use RecordType::{A, AAAA, MX, SRV};
    use Told::{All, Part, Whole};
    let all = "10.2.1.1 | 10.2.2.1 | 10.2.3.1";
    // One is denied by the pod's own side, the other where it is.
    is(&view, WEB, "db.", A, "10.2.1.1", Part);
    let srv = format!("0 50 8080 db-0.db.{svc} | 0 50 8080 fd02-0-0-0-0-0-3-1.db.{svc}");
    is(&view, WEB, "_http._tcp.db.", SRV, &srv, Part);
    // Other clients: another pod, the node, a forwarder.
    for other in ["10.2.1.51", "100.96.0.1", "169.254.53.53"] {
        is(&view, other, "db.", A, all, Whole);
    }
    // It has no IPv6, so nothing is said of that; there is nothing to leave out; nothing would be left.
    is(&view, WEB, "db.", AAAA, "fd02::1 | fd02::3:1", Whole);
    is(&view, WEB, "db.", MX, "NODATA cluster.local.", All);
    is(&view, WEB, "10-2-3-1.db.", A, "10.2.3.1", All);
    is(&view, WEB, "inventory.", A, "10.43.0.10", All);
    // What may be reached and is dead comes before what lives and is denied.
    view.dead.insert("edge-a1".parse().unwrap());
    is(&view, WEB, "db.", A, "10.2.1.1", Part);
    let mut snapshot = Snapshot::clone(&view.snapshot);
    let slices = snapshot
        .slices
        .get_mut(&common::service_name("db"))
        .unwrap();
    let slice = Arc::make_mut(slices.get_mut("v4").unwrap());
    slice.endpoints.retain(|one| one.hostname.is_none());
    let denied = View {
        snapshot: Arc::new(snapshot),
        ..view
    };
    is(&denied, WEB, "db.", A, "10.2.2.1 | 10.2.3.1", Whole);
}

#[test]
fn endpoints_that_are_equally_near_take_turns() {
    let mut snapshot = common::snapshot();
    common::add_big_service(&mut snapshot, 3);
    let view = View {
        snapshot: Arc::new(snapshot),
        ..view()
    };
    let mut asked = query("big.shop.svc.cluster.local.", RecordType::A);
    let mut turn = |id| {
        asked.metadata.id = id;
        show(&answer(&asked, Some(&view), &LocalNames::default(), None))
    };
    assert_eq!(turn(0), "10.2.100.0 | 10.2.100.1 | 10.2.100.2");
    assert_eq!(turn(1), "10.2.100.1 | 10.2.100.2 | 10.2.100.0");
    assert_eq!(turn(3), turn(0));
}

#[test]
fn endpoints_that_are_not_ready_are_told_when_the_service_says_so() {
    let mut snapshot = common::snapshot();
    let service = snapshot.services.get_mut(&common::service_name("db"));
    Arc::make_mut(service.unwrap()).publish_not_ready = true;
    let view = View {
        snapshot: Arc::new(snapshot),
        ..view()
    };
    let asked = query("db.shop.svc.cluster.local.", RecordType::A);
    let want = "10.2.1.1 | 10.2.1.9 | 10.2.2.1 | 10.2.3.1";
    assert_eq!(
        show(&answer(&asked, Some(&view), &LocalNames::default(), None)),
        want
    );
}

#[test]
fn an_alias_that_leads_to_itself_ends() {
    let asked = query("loop.shop.svc.cluster.local.", RecordType::A);
    let reply = reply(&view(), &asked);
    assert_eq!(reply.response_code, ResponseCode::ServFail);
    assert_eq!(reply.answers.len(), 9);
}

type Change = fn(&mut Message);

#[test]
fn what_this_server_does_not_do_is_said_in_the_right_code() {
    let own = || query("inventory.shop.svc.cluster.local.", RecordType::A);
    let with = |change: Change| {
        let mut message = own();
        change(&mut message);
        show(&answer(
            &message,
            Some(&view()),
            &LocalNames::default(),
            None,
        ))
    };
    let cases: [(&str, Change, &str); 10] = [
        ("no question", |m| m.queries.clear(), "FormErr"),
        (
            "two questions",
            |m| m.queries.extend(m.queries.clone()),
            "FormErr",
        ),
        ("update", |m| m.metadata.op_code = OpCode::Update, "Refused"),
        ("notify", |m| m.metadata.op_code = OpCode::Notify, "NotImp"),
        ("status", |m| m.metadata.op_code = OpCode::Status, "NotImp"),
        (
            "opcode 9",
            |m| m.metadata.op_code = OpCode::Unknown(9),
            "NotImp",
        ),
        (
            "transfer",
            |m| m.queries[0].query_type = RecordType::AXFR,
            "Refused",
        ),
        (
            "class CH",
            |m| m.queries[0].query_class = DNSClass::CH,
            "Refused",
        ),
        (
            "EDNS version 1",
            |m| {
                let mut edns = Edns::new();
                edns.set_version(1);
                m.edns = Some(edns);
            },
            "BADVERS",
        ),
        (
            "a foreign name without recursion",
            |m| {
                m.queries[0].set_name(Name::from_ascii("example.org.").unwrap());
                m.metadata.recursion_desired = false;
            },
            "Refused",
        ),
    ];
    for (case, change, want) in cases {
        assert_eq!(with(change), want, "{case}");
    }
}

#[test]
fn a_response_is_never_answered() {
    let mut message = query("inventory.shop.svc.cluster.local.", RecordType::A);
    message.metadata.message_type = hickory_proto::op::MessageType::Response;
    assert_eq!(
        show(&answer(
            &message,
            Some(&view()),
            &LocalNames::default(),
            None
        )),
        "drop Response"
    );
}

#[test]
fn without_a_snapshot_own_names_wait_and_others_are_forwarded() {
    let ask = |name| {
        show(&answer(
            &query(name, RecordType::A),
            None,
            &LocalNames::default(),
            None,
        ))
    };
    assert_eq!(ask("inventory.shop.svc.cluster.local."), "ServFail");
    assert_eq!(ask("edge-a1.mesh."), "ServFail");
    assert_eq!(ask("example.org."), "ask example.org. A");
}

fn reply(view: &View, asked: &Message) -> Message {
    match answer(asked, Some(view), &LocalNames::default(), None) {
        Answer::Reply(reply, _) => reply,
        other => panic!("{other:?}"),
    }
}

/// An answer in a line: records, then an error or NODATA with the zone of the SOA record.
fn show(answer: &Answer) -> String {
    let (reply, then) = match answer {
        Answer::Drop(reason) => return format!("drop {reason:?}"),
        Answer::Reply(reply, _) => (reply, String::new()),
        Answer::Ask { reply, question } => {
            let then = format!("ask {} {}", question.name(), question.query_type());
            (reply, then)
        }
    };
    let records: Vec<_> = reply
        .answers
        .iter()
        .map(|one| one.data.to_string())
        .collect();
    let soa = reply
        .authorities
        .iter()
        .map(|one| one.name.to_ascii())
        .collect::<String>();
    let records = records.join(" | ");
    let code = match reply.response_code {
        ResponseCode::NoError if soa.is_empty() => String::new(),
        ResponseCode::NoError => format!("NODATA {soa}"),
        ResponseCode::NXDomain => format!("NXDOMAIN {soa}"),
        code => format!("{code:?}"),
    };
    let then = match (records.is_empty(), then.is_empty()) {
        (false, false) => format!("then {then}"),
        _ => then,
    };
    let parts = [records, code, then];
    let parts: Vec<_> = parts
        .iter()
        .filter(|part| !part.is_empty())
        .cloned()
        .collect();
    parts.join(" ")
}

#[test]
fn names_of_pods_are_off_for_everybody_or_for_those_that_are_there() {
    let view = view();
    let asked = |pods, name: &str, record_type| {
        let local = LocalNames::new(pods, []).unwrap();
        let name = format!("{name}pod.cluster.local.");
        show(&answer(
            &query(&name, record_type),
            Some(&view),
            &local,
            None,
        ))
    };
    let gone = "NXDOMAIN cluster.local.";
    let empty = "NODATA cluster.local.";
    use PodNames::{Insecure, Off, Verified};
    for (name, record_type, [off, insecure, verified]) in [
        (
            "10-2-1-1.shop.",
            RecordType::A,
            [gone, "10.2.1.1", "10.2.1.1"],
        ),
        ("10-2-1-1.shop.", RecordType::AAAA, [gone, empty, empty]),
        (
            "fd02--1.shop.",
            RecordType::AAAA,
            [gone, "fd02::1", "fd02::1"],
        ),
        ("10-9-9-9.shop.", RecordType::A, [gone, "10.9.9.9", gone]),
        ("10-2-1-1.attic.", RecordType::A, [gone, gone, gone]),
        ("10-2-1.shop.", RecordType::A, [gone, gone, gone]),
        ("10-2-1-1.x.shop.", RecordType::A, [gone, gone, gone]),
        ("shop.", RecordType::A, [gone, empty, empty]),
        ("", RecordType::A, [gone, empty, empty]),
    ] {
        for (pods, want) in [(Off, off), (Insecure, insecure), (Verified, verified)] {
            assert_eq!(asked(pods, name, record_type), want, "{pods:?} {name}");
        }
    }
}

#[test]
fn records_of_the_node_s_own_are_answered_also_before_there_is_a_snapshot() {
    let addresses = ["192.168.7.9", "fd07::9"].map(common::address);
    let records = [
        ("printer.lan", addresses.as_slice()),
        ("kiosk.shop.svc.cluster.local", addresses.as_slice()),
    ];
    let local = LocalNames::new(PodNames::Off, records).unwrap();
    let view = view();
    for view in [Some(&view), None] {
        let ask = |name, record_type| show(&answer(&query(name, record_type), view, &local, None));
        assert_eq!(ask("Printer.LAN.", RecordType::A), "192.168.7.9");
        assert_eq!(ask("printer.lan.", RecordType::AAAA), "fd07::9");
        assert_eq!(ask("printer.lan.", RecordType::MX), "NODATA printer.lan.");
        let reverse = "9.7.168.192.in-addr.arpa.";
        assert!(ask(reverse, RecordType::PTR).starts_with("printer.lan."));
        assert_eq!(ask("scanner.lan.", RecordType::A), "ask scanner.lan. A");
    }
    // The mesh's own zones are the mesh's.
    let kiosk = query("kiosk.shop.svc.cluster.local.", RecordType::A);
    let said = show(&answer(&kiosk, Some(&view), &local, None));
    assert_eq!(said, "NXDOMAIN cluster.local.");
}
