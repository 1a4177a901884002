use std::{num::NonZeroU16, path::Path};

use mesh_core::snapshot::{External, Hints, Place, Policy, TrafficDistribution, Weight};

use super::*;

mod policy;

const SERVICE: &str = "apiVersion: v1
kind: Service
metadata: {name: inventory, namespace: shop}
spec:
  clusterIP: 10.96.0.10
  ports: [{name: http, port: 80}]
";

#[test]
fn each_problem_names_file_line_document_object_and_field() {
    let cases = [
        (
            "port: 80}]",
            "port: http}]",
            "shop.yaml:1: document 1: Service shop/inventory: spec.ports[0].port: invalid type: string \"http\", expected i32 (line 6, column 30)",
        ),
        (
            "port: 80}]",
            "port: 0}]",
            "spec.ports[0].port: 0 is not a port (1 to 65535)",
        ),
        (
            "ports:",
            "prots:",
            "shop.yaml:1: document 1: Service shop/inventory: spec.prots: unknown field",
        ),
        (
            "name: http",
            "nme: http",
            "spec.ports[0].nme: unknown field",
        ),
        (
            "10.96.0.10",
            "10.96.0.999",
            "spec.clusterIP: \"10.96.0.999\": invalid IP address syntax",
        ),
        (
            "  clusterIP: 10.96.0.10\n",
            "",
            "spec.clusterIP: missing: give an address, or None",
        ),
        (
            "kind: Service",
            "kind: Deployment",
            "kind: Deployment of v1 is not known here",
        ),
        ("kind: Service\n", "", "kind: missing"),
        (
            "name: inventory",
            "nam: inventory",
            "metadata.name: missing",
        ),
        ("metadata: {", "metadata: {{", "shop.yaml:1: document 1: "),
    ];
    for (good, bad, expected) in cases {
        let text = SERVICE.replace(good, bad);
        assert_ne!(text, SERVICE);
        let problems = parse_file("shop.yaml", &text).problems;
        assert_eq!(problems.len(), 1, "{bad}: {problems:?}");
        assert!(problems[0].contains(expected), "{bad}: {}", problems[0]);
    }
}

#[test]
fn documents_and_list_items_are_counted_and_one_broken_one_hides_no_other() {
    let item = SERVICE.replace('\n', "\n  ").replace("inventory", "listed");
    let text = format!(
        "# first a comment\n---\n{SERVICE}---\nbroken: [\n---\napiVersion: v1\nkind: List\nitems:\n- {item}\n- apiVersion: v1\n  kind: Gizmo\n"
    );
    let parsed = parse_file("all.yaml", &text);
    let names: Vec<_> = parsed
        .objects
        .iter()
        .map(|loaded| loaded.id.to_string())
        .collect();
    assert_eq!(names, ["Service shop/inventory", "Service shop/listed"]);
    assert!(
        parsed.problems[0].starts_with("all.yaml:9: document 2: "),
        "{:?}",
        parsed.problems
    );
    let expected = "all.yaml:11: document 3: items[1]: kind: Gizmo of v1 is not known here";
    assert!(
        parsed.problems[1].starts_with(expected),
        "{:?}",
        parsed.problems
    );
}

#[test]
fn our_own_kinds_name_their_unknown_fields_and_wrong_values() {
    let node = "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshNode\nmetadata: {name: edge-a1}\nspec: {site: a, prefixes: [192.168.1.0/24]}\n";
    assert_eq!(parse_file("n.yaml", node).problems, Vec::<String>::new());
    let cases = [
        (
            "site: a",
            "sight: a",
            "MeshNode edge-a1: spec.sight: unknown field `sight`",
        ),
        (
            "192.168.1.0/24",
            "192.168.1.0/64",
            "spec.prefixes[0]: \"192.168.1.0/64\"",
        ),
        (
            "site: a",
            "overlayIPv4: fd00::1",
            "spec.overlayIPv4: \"fd00::1\"",
        ),
    ];
    for (good, bad, expected) in cases {
        let problems = parse_file("n.yaml", &node.replace(good, bad)).problems;
        assert!(problems[0].contains(expected), "{bad}: {problems:?}");
    }
}

#[test]
fn what_a_service_says_of_its_traffic_is_read_and_checked() {
    let read = |extra: &str| parse_file("shop.yaml", &format!("{SERVICE}  {extra}\n"));
    let rows = [
        ("internalTrafficPolicy: Cluster", (false, None, None)),
        ("internalTrafficPolicy: Local", (true, None, None)),
        (
            "trafficDistribution: PreferSameZone",
            (false, Some(TrafficDistribution::SameZone), None),
        ),
        (
            "trafficDistribution: PreferClose",
            (false, Some(TrafficDistribution::SameZone), None),
        ),
        (
            "trafficDistribution: PreferSameNode",
            (false, Some(TrafficDistribution::SameNode), None),
        ),
        ("sessionAffinity: None", (false, None, None)),
        ("sessionAffinity: ClientIP", (false, None, Some(10_800))),
        (
            "sessionAffinity: ClientIP\n  sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}",
            (false, None, Some(60)),
        ),
    ];
    for (extra, expected) in rows {
        let parsed = read(extra);
        assert_eq!(parsed.problems, [""; 0], "{extra}");
        let Object::Service(Some(service)) = &parsed.objects[0].object else {
            panic!("{extra}: {:?}", parsed.objects);
        };
        let affinity_s = service.affinity.map(|timeout| timeout.as_secs());
        let found = (service.local_only, service.distribution, affinity_s);
        assert_eq!(found, expected, "{extra}");
    }
    let broken = [
        (
            "internalTrafficPolicy: Near",
            "spec.internalTrafficPolicy: \"Near\" is not one of Cluster and Local",
        ),
        (
            "trafficDistribution: Far",
            "spec.trafficDistribution: \"Far\" is not one of PreferSameZone, PreferSameNode and PreferClose",
        ),
        (
            "sessionAffinity: Cookie",
            "spec.sessionAffinity: \"Cookie\" is not one of None and ClientIP",
        ),
    ];
    for (extra, expected) in broken {
        let problems = read(extra).problems;
        assert!(problems[0].ends_with(expected), "{problems:?}");
    }
    for timeout_s in [0, 86_401] {
        let config =
            format!("sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {timeout_s}}}}}");
        let problems = read(&format!("sessionAffinity: ClientIP\n  {config}")).problems;
        let expected = format!(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: {timeout_s} is not in 1 to 86400"
        );
        assert!(problems[0].ends_with(&expected), "{problems:?}");
    }
}

#[test]
fn addresses_outside_and_node_ports_are_read_and_checked() {
    let read = |type_: &str, port: &str, spec: &str, status: &str| {
        let text = SERVICE
            .replace("spec:", &format!("{status}spec:\n  type: {type_}{spec}"))
            .replace("port: 80", &format!("port: 80{port}"));
        parse_file("shop.yaml", &text)
    };
    let ingress = |list: &str| format!("status: {{loadBalancer: {{ingress: [{list}]}}}}\n");
    let vip = "{ip: 203.0.113.2}, {ip: 203.0.113.3, ipMode: VIP}";
    let others = "{ip: 203.0.113.4, ipMode: Proxy}, {hostname: lb.example.com}";
    let policy = "\n  externalTrafficPolicy: Local";
    let ranges = "\n  loadBalancerSourceRanges: [198.51.100.0/24, \" 2001:db8::/32 \"]";
    let ips = "\n  externalIPs: [203.0.113.1, 2001:db8::1]";
    let health = "\n  healthCheckNodePort: 30090";
    let parsed = read(
        "LoadBalancer",
        ", nodePort: 30080",
        &format!("{policy}{ranges}{ips}{health}"),
        &ingress(&format!("{vip}, {others}")),
    );
    assert_eq!(parsed.problems, [""; 0]);
    let Object::Service(Some(service)) = &parsed.objects[0].object else {
        panic!("{:?}", parsed.objects);
    };
    assert_eq!(service.ports[0].node_port, Some(30_080));
    let addresses = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    let expected = External {
        addresses: addresses(&["203.0.113.1", "2001:db8::1"]),
        load_balancer: addresses(&["203.0.113.2", "203.0.113.3"]),
        sources: ["198.51.100.0/24", "2001:db8::/32"]
            .map(|net| net.parse().unwrap())
            .into(),
        local_only: true,
        health_check: Some(30_090),
    };
    assert_eq!(service.external, expected);

    let both = format!("{policy}{health}");
    let broken = [
        (
            ["ClusterIP", ", nodePort: 30080", ""],
            "",
            "spec.ports[0].nodePort: is only for the types NodePort and LoadBalancer",
        ),
        (
            ["NodePort", "", ""],
            "",
            "spec.ports[0].nodePort: missing: give a port (nobody here hands out ports)",
        ),
        (
            ["NodePort", ", nodePort: 70000", ""],
            "",
            "spec.ports[0].nodePort: 70000 is not a port (1 to 65535)",
        ),
        (
            [
                "NodePort",
                ", nodePort: 30080}, {name: b, port: 81, nodePort: 30080",
                "",
            ],
            "",
            "spec.ports[1].nodePort: is the node port of an earlier port too",
        ),
        (
            ["ClusterIP", "", policy],
            "",
            "spec.externalTrafficPolicy: there is no address outside: give type NodePort or LoadBalancer, or externalIPs",
        ),
        (
            ["LoadBalancer", "", "\n  externalTrafficPolicy: Near"],
            "",
            "spec.externalTrafficPolicy: \"Near\" is not one of Cluster and Local",
        ),
        (
            ["NodePort", ", nodePort: 30080", ranges],
            "",
            "spec.loadBalancerSourceRanges: is only for the type LoadBalancer",
        ),
        (
            [
                "LoadBalancer",
                "",
                "\n  loadBalancerSourceRanges: [198.51.100.0]",
            ],
            "",
            "spec.loadBalancerSourceRanges[0]: \"198.51.100.0\": invalid IP address syntax",
        ),
        (
            ["LoadBalancer", "", health],
            "",
            "spec.healthCheckNodePort: is only for the type LoadBalancer with externalTrafficPolicy Local",
        ),
        (
            ["LoadBalancer", ", nodePort: 30090", &both],
            "",
            "spec.healthCheckNodePort: is the node port of a port too",
        ),
        (
            ["ClusterIP", "", "\n  externalIPs: [127.0.0.1]"],
            "",
            "spec.externalIPs[0]: 127.0.0.1 is unspecified, loopback, link-local or multicast",
        ),
        (
            ["ClusterIP", "", "\n  externalIPs: [fe80::1]"],
            "",
            "spec.externalIPs[0]: fe80::1 is unspecified, loopback, link-local or multicast",
        ),
        (
            ["LoadBalancer", "", ""],
            "{ip: 203.0.113.2, ipMode: Vip}",
            "status.loadBalancer.ingress[0].ipMode: \"Vip\" is not one of VIP and Proxy",
        ),
        (
            ["LoadBalancer", "", ""],
            "{ip: 169.254.0.1}",
            "status.loadBalancer.ingress[0].ip: 169.254.0.1 is unspecified, loopback, link-local or multicast",
        ),
    ];
    for ([type_, port, spec], list, expected) in broken {
        let problems = read(type_, port, spec, &ingress(list)).problems;
        assert!(problems[0].ends_with(expected), "{problems:?}");
    }
}

const MESH_SERVICE: &str = "apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshService
metadata: {name: inventory, namespace: shop}
spec:
  policy: round-robin
  spillOver: 3
  maxConnections: 100
  sockmap: true
  weights: [{zone: z1, weight: 5}, {node: edge-a1, weight: 100}, {address: 10.0.0.9, weight: 1}]
";

#[test]
fn a_mesh_service_and_annotations_say_how_flows_are_spread() {
    let parsed = parse_file("b.yaml", MESH_SERVICE);
    assert_eq!(parsed.problems, [""; 0]);
    let Object::Balance(name, balance) = &parsed.objects[0].object else {
        panic!("{:?}", parsed.objects);
    };
    assert_eq!(name.to_string(), "shop/inventory");
    let weight = |place, weight| Weight { place, weight };
    let weights = vec![
        weight(Place::Zone("z1".into()), 5),
        weight(Place::Node("edge-a1".parse().unwrap()), 100),
        weight(Place::Address([10, 0, 0, 9].into()), 1),
    ];
    let expected = Balance {
        policy: Policy::RoundRobin,
        spill_over: 3,
        max_connections: NonZeroU16::new(100),
        sockmap: true,
        weights,
    };
    assert_eq!(*balance, expected);

    let annotated = |said: &str| {
        let metadata = format!("annotations: {{{said}}}, name: inventory");
        parse_file("s.yaml", &SERVICE.replace("name: inventory", &metadata))
    };
    let said = "mesh.holdfast.dev/policy: consistent-hash, mesh.holdfast.dev/spill-over: \"2\", \
                mesh.holdfast.dev/max-connections: \"10000\", mesh.holdfast.dev/sockmap: \"true\"";
    let parsed = annotated(said);
    assert_eq!(parsed.problems, [""; 0]);
    let Object::Service(Some(service)) = &parsed.objects[0].object else {
        panic!("{:?}", parsed.objects);
    };
    let expected = Balance {
        policy: Policy::ConsistentHash,
        spill_over: 2,
        max_connections: NonZeroU16::new(10_000),
        sockmap: true,
        weights: Vec::new(),
    };
    assert_eq!(service.balance, expected);
    let parsed = annotated("mesh.holdfast.dev/sockmap: \"false\"");
    assert_eq!(parsed.problems, [""; 0]);
    let Object::Service(Some(service)) = &parsed.objects[0].object else {
        panic!("{:?}", parsed.objects);
    };
    assert_eq!(service.balance, Balance::default());

    let broken = [
        (
            "round-robin",
            "least",
            "spec.policy: \"least\" is not one of random, consistent-hash, round-robin and least-latency",
        ),
        (
            "spillOver: 3",
            "spillOver: 0",
            "spec.spillOver: 0 is not in 1 to 1000",
        ),
        (
            "maxConnections: 100",
            "maxConnections: 0",
            "spec.maxConnections: 0 is not in 1 to 10000",
        ),
        (
            "sockmap: true",
            "sockmap: 1",
            "spec.sockmap: invalid type: integer `1`, expected a boolean",
        ),
        (
            "sockmap: true",
            "sockmap: \"true\"",
            "spec.sockmap: invalid type: string \"true\", expected a boolean",
        ),
        (
            "spillOver: 3",
            "spillover: 3",
            "spec.spillover: unknown field `spillover`, expected one of",
        ),
        (
            "weight: 5",
            "weight: 0",
            "spec.weights[0].weight: 0 is not in 1 to 100",
        ),
        (
            "zone: z1",
            "zone: z1, site: a",
            "spec.weights[0]: says not exactly one of address, node, site, zone and region",
        ),
        (
            "10.0.0.9",
            "10.0.0",
            "spec.weights[2].address: \"10.0.0\": invalid IP address syntax",
        ),
    ];
    for (good, bad, expected) in broken {
        let problems = parse_file("b.yaml", &MESH_SERVICE.replace(good, bad)).problems;
        assert!(problems[0].contains(expected), "{problems:?}");
    }
    let broken = [
        ("policy: least", "policy]: \"least\" is not one of"),
        (
            "sockmap: \"yes\"",
            "sockmap]: \"yes\": provided string was not `true` or `false`",
        ),
        (
            "sockmap: \"\"",
            "sockmap]: \"\": provided string was not `true` or `false`",
        ),
    ];
    for (said, expected) in broken {
        let problems = annotated(&format!("mesh.holdfast.dev/{said}")).problems;
        let expected = format!("metadata.annotations[mesh.holdfast.dev/{expected}");
        assert!(problems[0].contains(&expected), "{problems:?}");
    }
}

#[test]
fn a_service_of_another_proxy_is_left_alone() {
    let label = "labels: {service.kubernetes.io/service-proxy-name: other}, name: inventory";
    let parsed = parse_file("shop.yaml", &SERVICE.replace("name: inventory", label));
    assert_eq!(parsed.problems, [""; 0]);
    assert!(matches!(parsed.objects[0].object, Object::Service(None)));
}

#[test]
fn hints_of_a_slice_are_read() {
    let slice = "apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: s1, namespace: shop, labels: {kubernetes.io/service-name: inventory}}
addressType: IPv4
endpoints:
- addresses: [10.42.0.1]
  hints: {forZones: [{name: z1}, {name: z2}], forNodes: [{name: edge-a1}]}
- addresses: [10.42.0.2]
";
    let parsed = parse_file("slice.yaml", slice);
    assert_eq!(parsed.problems, [""; 0]);
    let Object::Slice(_, slice) = &parsed.objects[0].object else {
        panic!("{:?}", parsed.objects);
    };
    let hints: Vec<_> = slice.endpoints.iter().map(|one| &one.hints).collect();
    let first = Hints {
        zones: vec!["z1".into(), "z2".into()],
        nodes: vec!["edge-a1".parse().unwrap()],
    };
    assert_eq!(hints, [&first, &Hints::default()]);
}

#[test]
fn a_broken_file_takes_nothing_away_not_even_after_a_restart() {
    let place = tempfile::tempdir().unwrap();
    let other = SERVICE.replace("inventory", "orders");
    write(place.path(), &format!("{SERVICE}---\n{other}"));
    let mut folder = Folder::default();
    let remembered = folder.scan(place.path()).remember;
    let remembered: BTreeMap<_, _> = remembered
        .into_iter()
        .map(|(name, text)| (name, text.unwrap()))
        .collect();
    assert_eq!(
        ports(&folder),
        [("inventory".to_owned(), 80), ("orders".to_owned(), 80)]
    );

    // One is changed, the other broken.
    write(
        place.path(),
        &format!("{}---\n{other}  x: [", SERVICE.replace("80", "81")),
    );
    let expected = [("inventory".to_owned(), 81), ("orders".to_owned(), 80)];
    assert_eq!(folder.scan(place.path()).changed, Change::Any);
    assert_eq!(ports(&folder), expected);
    assert_eq!(folder.objects().1.len(), 1);

    let mut restarted = Folder::restore(&remembered);
    restarted.scan(place.path());
    assert_eq!(ports(&restarted), expected);

    write(place.path(), SERVICE);
    folder.scan(place.path());
    assert_eq!(ports(&folder), [("inventory".to_owned(), 80)]);
    assert_eq!(folder.objects().1, Vec::<String>::new());
}

#[test]
fn what_a_file_brings_counts_at_once_and_what_it_takes_away_later() {
    let place = tempfile::tempdir().unwrap();
    let other = SERVICE.replace("inventory", "orders");
    let of = |name: &str, port| (name.to_owned(), port);
    let both = [of("inventory", 80), of("orders", 80)];
    write(place.path(), &format!("{SERVICE}---\n{other}"));
    let mut folder = Folder::default();
    let names = ["shop.yaml".to_owned()].into();
    let scanned = folder.scan_files(place.path(), &names);
    assert!(!scanned.changed.is_nothing() && scanned.remember.contains_key("shop.yaml"));
    assert_eq!(ports(&folder), both);

    // One of them is about to be in another file; then the file is broken, and then gone.
    write(place.path(), &SERVICE.replace("80", "81"));
    assert_eq!(folder.scan_files(place.path(), &names), Scanned::default());
    write(place.path(), &format!("{SERVICE}---\n{other}---\nx: ["));
    assert_eq!(folder.scan_files(place.path(), &names), Scanned::default());
    fs::remove_file(place.path().join("shop.yaml")).unwrap();
    assert_eq!(folder.scan_files(place.path(), &names), Scanned::default());
    assert_eq!(ports(&folder), both);

    write(place.path(), &SERVICE.replace("80", "81"));
    assert_eq!(folder.scan(place.path()).changed, Change::Any);
    assert_eq!(ports(&folder), [of("inventory", 81)]);
}

#[test]
fn only_files_that_changed_are_read_and_only_other_content_is_parsed() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name);
    let long_ago = SystemTime::now() - SAME_TIME * 10;
    let age = |name: &str| {
        let file = fs::File::options().write(true).open(path(name)).unwrap();
        file.set_modified(long_ago).unwrap();
    };
    for number in 0..20 {
        let name = format!("{number}.yaml");
        fs::write(
            path(&name),
            SERVICE.replace("inventory", &format!("s{number}")),
        )
        .unwrap();
        age(&name);
    }
    let mut folder = Folder::default();
    let work = |folder: &mut Folder| {
        let before = (folder.reads, folder.parses);
        folder.scan(place.path());
        (folder.reads - before.0, folder.parses - before.1)
    };
    assert_eq!(work(&mut folder), (20, 20));
    // Their inodes changed a moment ago: they are not trusted yet.
    assert_eq!(work(&mut folder), (20, 0));
    let stamp_all = |folder: &mut Folder| {
        for (name, file) in &mut folder.files {
            file.stamp = stamp(&path(name));
        }
    };
    stamp_all(&mut folder);
    assert_eq!(work(&mut folder), (0, 0));
    // Of the same size and time, as by `cp --preserve`: the inode's own time tells.
    fs::write(
        path("7.yaml"),
        SERVICE.replace("inventory", "s7").replace("80", "81"),
    )
    .unwrap();
    age("7.yaml");
    assert_eq!(work(&mut folder), (1, 1));
    stamp_all(&mut folder);
    // Another file in its place.
    fs::write(
        path(".new"),
        SERVICE.replace("inventory", "s8").replace("80", "82"),
    )
    .unwrap();
    fs::rename(path(".new"), path("8.yaml")).unwrap();
    assert_eq!(work(&mut folder), (1, 1));
    stamp_all(&mut folder);
    // One that is told is read in any case.
    let (reads, parses) = (folder.reads, folder.parses);
    folder.scan_files(place.path(), &["9.yaml".to_owned()].into());
    assert_eq!((folder.reads - reads, folder.parses - parses), (1, 0));
    assert_eq!(ports(&folder).len(), 20);
    let changed: Vec<_> = ports(&folder)
        .into_iter()
        .filter(|(_, port)| *port != 80)
        .collect();
    assert_eq!(changed, [("s7".to_owned(), 81), ("s8".to_owned(), 82)]);
}

#[test]
fn the_first_of_two_equal_objects_counts_also_across_files() {
    let place = tempfile::tempdir().unwrap();
    write(place.path(), SERVICE);
    fs::write(place.path().join("z.yaml"), SERVICE.replace("80", "99")).unwrap();
    let mut folder = Folder::default();
    folder.scan(place.path());
    assert_eq!(ports(&folder), [("inventory".to_owned(), 80)]);
    let problems = folder.objects().1;
    let expected = "z.yaml:1: document 1: Service shop/inventory: is already at shop.yaml:1: document 1; this one is left out";
    assert_eq!(problems, [expected]);
}

#[test]
fn a_folder_that_vanished_takes_nothing_away() {
    let place = tempfile::tempdir().unwrap();
    write(place.path(), SERVICE);
    let mut folder = Folder::default();
    folder.scan(place.path());
    let gone = place.path().join("gone");
    assert_eq!(folder.scan(&gone).changed, Change::Any);
    assert!(folder.scan(&gone).changed.is_nothing());
    assert_eq!(folder.objects().0.len(), 1);
    assert!(folder.objects().1[0].contains("No such file"));
}

fn write(folder: &Path, text: &str) {
    fs::write(folder.join("shop.yaml"), text).unwrap();
}

fn ports(folder: &Folder) -> Vec<(String, u16)> {
    let objects = folder.objects().0.into_iter();
    let mut ports: Vec<_> = objects
        .filter_map(|loaded| {
            let Object::Service(Some(service)) = &loaded.object else {
                return None;
            };
            Some((service.name.name.clone(), service.ports[0].port))
        })
        .collect();
    ports.sort();
    ports
}
