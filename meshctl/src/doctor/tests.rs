use mesh_api::admin::{self, DuplicateReport};

use super::*;

const NOW: i64 = 1_800_000_000;

/// A node with which nothing is wrong.
fn well() -> Facts {
    let status = admin::StatusResponse {
        node: "edge-a1".into(),
        health: admin::Health::Ok.into(),
        interface: "holdfast0".into(),
        overlay_addresses: vec!["100.96.1.1".into()],
        nat: "easy".into(),
        dns_listen: vec!["169.254.53.53:53".into()],
        certificate_expires_unix_s: NOW + 30 * 86_400,
        relays: vec![admin::RelayStatus {
            name: "r1".into(),
            transport: "quic".into(),
            home: true,
            ..admin::RelayStatus::default()
        }],
        ..admin::StatusResponse::default()
    };
    let facts = FactsResponse {
        state_dir: "/var/lib/holdfast".into(),
        state_free_bytes: Some(1 << 30),
        overlay_v4: "100.96.0.0/12".into(),
        mtu_bytes: 1280,
        dns_upstreams: vec!["192.0.2.53:53".into()],
        ..FactsResponse::default()
    };
    Facts {
        agent: Ok(Agent {
            status: Status::from(status),
            services: Services {
                services: Vec::new(),
            },
            facts,
        }),
        machine: Vec::new(),
        kernel: Kernel {
            routes: vec![("100.96.0.0/12".parse().unwrap(), "holdfast0".into())],
            ..Kernel::default()
        },
        now_unix_s: NOW,
    }
}

fn judged(change: impl FnOnce(&mut Facts)) -> Doctor {
    let mut facts = well();
    change(&mut facts);
    Doctor::new(&facts)
}

/// With the agent there.
fn said(change: impl FnOnce(&mut Agent)) -> Doctor {
    judged(|facts| change(facts.agent.as_mut().unwrap()))
}

#[track_caller]
fn first(doctor: &Doctor, fault: &str, level: Level, words: &[&str]) {
    let found = doctor.findings.first().unwrap();
    assert_eq!((found.fault, found.level), (fault, level), "{doctor:?}");
    for word in words {
        assert!(found.cause.contains(word), "no {word:?} in {}", found.cause);
    }
    assert!(!found.fix.is_empty() && !found.fix.contains("  "));
    let text = doctor.text(false);
    let line = text.lines().next().unwrap();
    assert!(line.ends_with(found.cause.as_str()), "{line}");
}

fn trouble(state: &str, reason: &str, small: &[&str]) -> PeerTrouble {
    PeerTrouble {
        node: "edge-b1".into(),
        state: state.into(),
        reason: reason.into(),
        explanation: "Why.".into(),
        small_only: small.iter().map(|&one| one.to_owned()).collect(),
    }
}

fn service(endpoints: &[(bool, bool)]) -> Service {
    let endpoint = |&(alive, ejected): &(bool, bool)| Endpoint {
        address: "100.96.2.1".into(),
        node: Some("edge-b1".into()),
        tier: "anywhere".into(),
        ready: true,
        alive,
        chosen: true,
        ejected,
        full: false,
    };
    Service {
        namespace: "shop".into(),
        name: "inventory".into(),
        kind: "ClusterIP".into(),
        cluster_ips: Vec::new(),
        ports: Vec::new(),
        endpoints: endpoints.iter().map(endpoint).collect(),
    }
}

fn check(name: &str, level: Level, text: &str) -> Check {
    Check {
        name: name.into(),
        level,
        text: text.into(),
    }
}

#[test]
fn of_a_node_with_which_nothing_is_wrong_nothing_is_said() {
    let doctor = judged(|_| ());
    assert!(doctor.findings.is_empty(), "{doctor:?}");
    assert_eq!((doctor.level, doctor.verdict()), (Level::Ok, Verdict::Ok));
}

#[test]
fn udp_blocked() {
    let tls = said(|agent| {
        agent.status.nat = "udp_blocked".into();
        agent.status.relays[0].transport = Some("tls".into());
    });
    first(
        &tls,
        "udp_blocked",
        Level::Warning,
        &["UDP is blocked", "over TCP"],
    );
    let none = said(|agent| {
        agent.status.nat = "udp_blocked".into();
        agent.status.relays[0].transport = None;
    });
    first(
        &none,
        "udp_blocked",
        Level::Error,
        &["no relay is reached by TCP"],
    );
}

#[test]
fn mtu_hole() {
    let hole = said(|agent| {
        let peer = trouble("relayed", "mtu_fail", &["203.0.113.2:51820"]);
        agent.facts.troubles.push(peer);
    });
    first(
        &hole,
        "mtu_hole",
        Level::Warning,
        &["MTU hole", "edge-b1", "203.0.113.2:51820"],
    );
    assert!(hole.findings[0].fix.contains("1360 bytes"));
}

#[test]
fn clock_skew() {
    let behind = said(|agent| {
        let text =
            "the clock is 3650 days and 0 h behind what the mesh's authority signed last: set it";
        agent.status.problems.push(text.into());
    });
    first(&behind, "clock_skew", Level::Error, &["3650 days"]);
    assert_eq!(
        behind.findings.len(),
        1,
        "and nothing is said twice: {behind:?}"
    );
    let refused = said(|agent| {
        agent
            .facts
            .troubles
            .push(trouble("unreachable", "clock_skew", &[]))
    });
    first(&refused, "clock_skew", Level::Error, &["edge-b1"]);
    let wrong = judged(|facts| {
        facts.machine.push(check(
            "clock",
            Level::Warning,
            "wrong: 9d before this program was written",
        ))
    });
    first(&wrong, "clock_skew", Level::Error, &["wrong: 9d"]);
}

#[test]
fn expired_certificate() {
    for (left, level, word) in [
        (-3 * 86_400, Level::Error, "ended 3d ago"),
        (3_600, Level::Warning, "ends in 1h"),
    ] {
        let doctor = said(|agent| agent.status.certificate_expires_unix_s = Some(NOW + left));
        first(&doctor, "expired_certificate", level, &[word]);
    }
    let unknown = said(|agent| agent.status.certificate_expires_unix_s = None);
    assert!(unknown.findings.is_empty());
}

#[test]
fn wrong_policy() {
    let doctor = said(|agent| {
        agent.status.policy_packets.insert("denied".into(), 7);
        for event in [
            "denied by MeshPolicy no-9100: TCP 100.96.1.1:4 to 100.96.2.1:9100, out",
            "audited by MeshPolicy trial: x",
        ] {
            agent.status.policy_events.push(event.into());
        }
    });
    first(
        &doctor,
        "policy_denies",
        Level::Warning,
        &["denied by MeshPolicy no-9100", "7 packets"],
    );
    let audited = said(|agent| agent.status.policy_events.push("audited by x".into()));
    assert!(audited.findings.is_empty());
}

#[test]
fn dead_endpoint() {
    let some = said(|agent| {
        agent
            .services
            .services
            .push(service(&[(true, true), (true, false)]))
    });
    first(
        &some,
        "dead_endpoint",
        Level::Warning,
        &[
            "shop/inventory",
            "100.96.2.1 on edge-b1 (TCP connects to it fail)",
        ],
    );
    let all = said(|agent| agent.services.services.push(service(&[(false, false)])));
    first(
        &all,
        "dead_endpoint",
        Level::Error,
        &["it has no other", "no path to its node"],
    );
    let many = said(|agent| {
        agent
            .services
            .services
            .extend((0..9).map(|_| service(&[(false, false)])))
    });
    assert_eq!(many.findings.len(), NAMED_MAX + 1);
}

#[test]
fn asymmetric_route() {
    let route = judged(|facts| {
        facts
            .kernel
            .routes
            .push(("100.96.2.0/24".parse().unwrap(), "eth0".into()));
        facts.kernel.reverse_path_drops = 12;
    });
    first(
        &route,
        "asymmetric_route",
        Level::Error,
        &["100.96.2.0/24", "eth0", "rp_filter dropped 12"],
    );
    let filter = judged(|facts| {
        facts.kernel.strict.push("eth1".into());
        facts.kernel.reverse_path_drops = 12;
    });
    first(
        &filter,
        "asymmetric_route",
        Level::Warning,
        &["12 packets", "eth1"],
    );
    let own = judged(|facts| {
        let routes = [
            ("0.0.0.0/0", "eth0"),
            ("100.96.2.0/24", "holdfast0"),
            ("192.168.1.0/24", "eth0"),
        ];
        let routes = routes.map(|(net, name)| (net.parse().unwrap(), name.to_owned()));
        facts.kernel.routes.extend(routes);
    });
    assert!(own.findings.is_empty(), "{own:?}");
}

#[test]
fn route_gone() {
    let only = |net: &str, interface: &str| {
        let route = (net.parse().unwrap(), interface.to_owned());
        judged(|facts| facts.kernel.routes = vec![route])
    };
    for (net, interface) in [
        ("0.0.0.0/0", "eth0"),
        ("100.96.2.0/24", "holdfast0"), // A part of it is not enough.
        ("100.64.0.0/10", "wg0"),
    ] {
        let gone = only(net, interface);
        let found = gone.findings.iter().find(|one| one.fault == "route_gone");
        assert_eq!(found.map(|one| one.level), Some(Level::Error), "{net}");
    }
    first(
        &only("0.0.0.0/0", "eth0"),
        "route_gone",
        Level::Error,
        &["100.96.0.0/12", "holdfast0"],
    );
    let unknown = judged(|facts| facts.kernel.routes.clear());
    assert!(unknown.findings.is_empty(), "{unknown:?}");
}

#[test]
fn full_disk() {
    for (free, level, word) in [
        (4_096, Level::Error, "is full"),
        (8 << 20, Level::Warning, "8 MiB are free"),
    ] {
        let doctor = said(|agent| agent.facts.state_free_bytes = Some(free));
        first(&doctor, "full_disk", level, &["/var/lib/holdfast", word]);
    }
    assert!(
        said(|agent| agent.facts.state_free_bytes = None)
            .findings
            .is_empty()
    );
}

#[test]
fn dns_loop() {
    for upstream in ["169.254.53.53:53", "100.96.1.1:53"] {
        let doctor = said(|agent| agent.facts.dns_upstreams = vec![upstream.into()]);
        first(&doctor, "dns_loop", Level::Error, &[upstream, "circle"]);
    }
    let other = said(|agent| agent.facts.dns_upstreams = vec!["100.96.1.1:5353".into()]);
    assert!(other.findings.is_empty(), "another server of this machine");
}

#[test]
fn relay_overloaded() {
    let one = said(|agent| {
        let full = admin::RelayStatus {
            name: "r2".into(),
            problem: "the relay is full".into(),
            ..admin::RelayStatus::default()
        };
        agent.status.relays.push(full.into());
        agent
            .status
            .problems
            .push("relay r2: the relay is full".into());
    });
    first(
        &one,
        "relay_overloaded",
        Level::Warning,
        &["relay r2 is overloaded"],
    );
    assert_eq!(one.findings.len(), 1, "{one:?}");
    let only = said(|agent| {
        agent.status.relays[0].transport = None;
        agent.status.relays[0].problem = Some("the relay is full".into());
    });
    first(&only, "relay_overloaded", Level::Error, &["r1"]);
    let down = said(|agent| agent.status.relays[0].problem = Some("no answer".into()));
    first(&down, "relay_down", Level::Warning, &["no answer"]);
}

#[test]
fn duplicate_overlay_address() {
    let doctor = said(|agent| {
        agent.facts.duplicates.push(DuplicateReport {
            address: "100.96.2.1".into(),
            node: "edge-b1".into(),
        });
    });
    first(
        &doctor,
        "duplicate_address",
        Level::Error,
        &["100.96.2.1", "edge-b1"],
    );
}

#[test]
fn kernel_feature_missing() {
    let doctor =
        said(|agent| agent.status.services_unkept = Some("/sys/fs/bpf is no bpffs".into()));
    first(
        &doctor,
        "kernel_feature",
        Level::Warning,
        &["/sys/fs/bpf is no bpffs"],
    );
    let down = judged(|facts| {
        facts.agent = Err("no agent here".into());
        facts
            .machine
            .push(check("TUN", Level::Error, "/dev/net/tun: no such device"));
        facts
            .machine
            .push(check("BPF file system", Level::Warning, "not mounted"));
    });
    first(&down, "kernel_feature", Level::Error, &["TUN"]);
    let faults: Vec<_> = down.findings.iter().map(|one| one.fault).collect();
    assert_eq!(faults, ["kernel_feature", "agent_down"]);
}

#[test]
fn an_agent_that_is_not_there_is_the_first_thing_to_say() {
    let doctor = judged(|facts| facts.agent = Err("the agent is not running".into()));
    first(&doctor, "agent_down", Level::Error, &["not running"]);
    assert_eq!(doctor.verdict(), Verdict::Down);
}

#[test]
fn the_worst_comes_first_and_of_equal_ones_the_cause_before_what_it_leads_to() {
    let doctor = said(|agent| {
        agent
            .facts
            .troubles
            .push(trouble("unreachable", "peer_offline", &[]));
        agent.services.services.push(service(&[(false, false)]));
        agent.status.nat = "udp_blocked".into();
        agent.status.relays[0].transport = Some("tls".into());
        agent.facts.state_free_bytes = Some(0);
        let text = "no connection to the controller cloud:7440: refused";
        agent.status.problems.push(text.into());
        agent
            .status
            .problems
            .push("interface lan0: no such device".into());
    });
    let faults: Vec<_> = doctor.findings.iter().map(|one| one.fault).collect();
    let expected = [
        "full_disk",
        "dead_endpoint",
        "unreachable",
        "udp_blocked",
        "controller_unreachable",
        "problem",
    ];
    assert_eq!(faults, expected);
    assert_eq!(counted(&doctor).len(), 6);
}

#[test]
fn what_it_says_of_names_cannot_command_the_terminal() {
    let doctor = said(|agent| agent.status.problems.push("interface \u{1b}[2J".into()));
    assert!(!doctor.text(false).contains('\u{1b}'));
}
