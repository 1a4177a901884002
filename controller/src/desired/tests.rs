use mesh_api::{control::resource_key::Kind, convert::decode};
use mesh_core::snapshot::{Policy, Protocol, ServicePort};
use proptest::prelude::*;

use super::*;
use crate::{manifests::parse::parse_file, store::Registered};

mod policy;

#[test]
fn a_node_is_what_the_registry_its_labels_and_its_operator_say() {
    let built = build(
        "
apiVersion: v1
kind: Node
metadata:
  name: a
  labels: {mesh.holdfast.dev/site: lan, topology.kubernetes.io/zone: z1}
spec: {podCIDRs: [10.244.1.0/24]}
status: {addresses: [{type: InternalIP, address: 192.0.2.7}, {type: Hostname, address: a}]}
---
apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshNode
metadata: {name: a}
spec: {zone: z2, prefixes: [192.168.7.1/24], staticCandidates: ['192.0.2.7:51820']}
---
apiVersion: mesh.holdfast.dev/v1alpha1
kind: ExternalPeer
metadata: {name: phone}
spec: {publicKey: CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk=, addresses: [100.127.0.9/32], gateway: a}
",
        &["a"],
    );
    assert_eq!(built.problems, Vec::<String>::new());
    let node = &built.nodes["a"];
    let texts: Vec<_> = node.prefixes.iter().map(ToString::to_string).collect();
    assert_eq!(texts, ["10.244.1.0/24", "192.168.7.0/24", "100.127.0.9/32"]);
    let Locality { site, zone, region } = &node.locality;
    assert_eq!(site.as_ref().map(|site| site.as_str()), Some("lan"));
    assert_eq!((zone.as_deref(), region), (Some("z2"), &None));
    assert_eq!(
        node.underlay_addresses,
        ["192.0.2.7".parse::<IpAddr>().unwrap()]
    );
    assert_eq!(node.static_candidates.len(), 1);
}

#[test]
fn the_later_of_two_that_overlap_is_left_out_by_name() {
    let node = |name: &str, prefix: &str| {
        format!(
            "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshNode\nmetadata: {{name: {name}}}\nspec: {{prefixes: [{prefix}]}}\n---\n"
        )
    };
    let text = node("b", "10.1.0.0/16") + &node("a", "10.0.0.0/8") + &node("c", "100.96.0.0/24");
    let built = build(&text, &["a", "b"]);
    assert_eq!(built.nodes["a"].prefixes, []);
    assert_eq!(built.nodes["b"].prefixes.len(), 1);
    assert_eq!(
        built.problems,
        [
            "m.yaml:5: document 2: MeshNode a: spec.prefixes: 10.0.0.0/8 overlaps 10.1.0.0/16 of node b; left out",
            "m.yaml:10: document 3: MeshNode c: spec.prefixes: 100.96.0.0/24 overlaps 100.96.0.1/32 of node a; left out",
        ]
    );
}

#[test]
fn two_services_do_not_share_an_address() {
    let service = |name: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: 10.96.0.1}}\n---\n"
        )
    };
    let built = build(&(service("x") + &service("w")), &[]);
    let services = built.wanted.keys().filter(|key| key.name.contains('/'));
    assert_eq!(
        services.map(|key| key.name.as_str()).collect::<Vec<_>>(),
        ["default/x"]
    );
    assert!(built.problems[0].contains("10.96.0.1 is the address of default/x too"));
}

#[test]
fn a_mesh_service_replaces_what_its_service_s_annotations_say() {
    let service = "
apiVersion: v1
kind: Service
metadata:
  name: a
  annotations: {mesh.holdfast.dev/policy: round-robin, mesh.holdfast.dev/spill-over: '3', mesh.holdfast.dev/sockmap: 'true'}
spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}
";
    let balance = |name: &str| {
        format!(
            "
---
apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshService
metadata: {{name: {name}}}
spec: {{policy: consistent-hash}}
---"
        )
    };
    let name = ServiceName {
        namespace: "default".into(),
        name: "a".into(),
    };
    let expect = |text: &str, policy, spill_over, sockmap, problems: &[&str]| {
        let desired = build(text, &[]);
        let kind = ServiceKind::ClusterIp(vec![[10, 96, 0, 1].into()]);
        let port = ServicePort {
            name: String::new(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: None,
        };
        let expected = service_resource(&Service {
            ports: vec![port],
            balance: Balance {
                policy,
                spill_over,
                max_connections: None,
                sockmap,
                weights: Vec::new(),
            },
            ..Service::new(name.clone(), kind)
        });
        let found = desired.wanted.get(&key(&expected).unwrap());
        assert!(
            matches!(found, Some(Wanted::Resource(resource)) if **resource == expected),
            "{found:?}"
        );
        assert_eq!(desired.problems, problems);
    };
    expect(service, Policy::RoundRobin, 3, true, &[]);
    for text in [balance("a") + service, service.to_owned() + &balance("a")] {
        expect(&text, Policy::ConsistentHash, 0, false, &[]);
    }
    let problem = "m.yaml:8: document 2: MeshService default/b: metadata.name: there is no Service default/b; this has no effect";
    expect(
        &(service.to_owned() + &balance("b")),
        Policy::RoundRobin,
        3,
        true,
        &[problem],
    );
}

#[test]
fn an_operator_s_address_moves_the_node_but_never_onto_another() {
    let pin = |name: &str, address: &str| {
        format!(
            "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshNode\nmetadata: {{name: {name}}}\nspec: {{overlayIPv4: {address}}}\n---\n"
        )
    };
    let built = build(
        &(pin("a", "100.96.9.9") + &pin("b", "100.96.9.9")),
        &["a", "b"],
    );
    assert_eq!(built.nodes["a"].overlay_v4, Ipv4Addr::new(100, 96, 9, 9));
    assert_eq!(built.nodes["b"].overlay_v4, Ipv4Addr::new(100, 96, 0, 2));
    assert_eq!(built.problems.len(), 1);
    let outside = build(&pin("a", "10.0.0.1"), &["a"]);
    assert!(outside.problems[0].contains("10.0.0.1 is not in the mesh's 100.96.0.0/12"));
}

#[test]
fn a_peer_with_a_node_s_key_is_left_out() {
    let key = NodeId([1; 32]);
    let text = format!(
        "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: ExternalPeer\nmetadata: {{name: phone}}\nspec: {{publicKey: {key}, addresses: [100.127.0.9/32], gateway: a}}\n"
    );
    let built = build(&text, &["a"]);
    assert!(built.problems[0].contains("is the key of another node or peer"));
    assert_eq!(built.nodes["a"].prefixes, []);
}

#[test]
fn a_node_acts_as_one_relay_and_only_once_it_has_joined() {
    let relay = |name: &str, node: &str| {
        format!(
            "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshRelay\nmetadata: {{name: {name}}}\nspec: {{addresses: [192.0.2.1], node: {node}, sites: [mill]}}\n---\n"
        )
    };
    let text = relay("r1", "a") + &relay("r2", "a") + &relay("r3", "b") + &relay("r4", "c");
    let built = build(&text, &["a", "b"]);
    let said = [
        "spec.node: node a acts as relay r1 already; this one is left out",
        "spec.node: no node c has joined; nobody acts as this relay",
    ];
    for (problem, said) in built.problems.iter().zip(said) {
        assert!(problem.contains(said), "{problem}");
    }
    assert_eq!(built.problems.len(), said.len());
    let relays = built.wanted.keys().filter(|key| key.kind() == Kind::Relay);
    assert_eq!(relays.count(), 2);
}

fn route(name: &str, gateways: &str, subnets: &str) -> String {
    format!(
        "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: SiteRoute\nmetadata: {{name: {name}}}\nspec: {{gateways: [{gateways}], subnets: [{subnets}]}}\n---\n"
    )
}

fn texts<T: ToString>(all: &[T]) -> Vec<String> {
    all.iter().map(ToString::to_string).collect()
}

#[test]
fn a_site_route_leads_to_all_its_gateways_and_overlaps_nobody_else_s() {
    let plain = "{subnet: 192.168.1.7/24}, {subnet: 'fd00:1::/64'}";
    let text = route("plain", "a", plain)
        + &route(
            "same",
            "a",
            "{subnet: 192.168.2.0/24, mappedTo: 192.168.2.7/24}",
        )
        + &route("two", "b, a, b", "{subnet: 192.168.4.0/24}")
        + &route("two-again", "a, b", "{subnet: 192.168.4.0/25}")
        + &route("again", "b", "{subnet: 192.168.1.0/25}")
        + &route("one-of-two", "b", "{subnet: 192.168.4.0/24}");
    let built = build(&text, &["a", "b"]);
    let of_a = [
        "192.168.1.0/24",
        "fd00:1::/64",
        "192.168.2.0/24",
        "192.168.4.0/24",
        "192.168.4.0/25",
    ];
    assert_eq!(texts(&built.nodes["a"].prefixes), of_a);
    assert_eq!(texts(&built.nodes["b"].prefixes), of_a[3..]);
    assert_eq!(built.nodes["a"].mapped, []);
    let rejected: Vec<_> = built.rejected.keys().map(|id| id.name.as_str()).collect();
    assert_eq!(rejected, ["again", "one-of-two"]);
    assert!(
        built.problems[1].contains("overlaps 192.168.4.0/24 of nodes a, b"),
        "{:?}",
        built.problems
    );
}

#[test]
fn overlapping_lans_are_told_apart_by_what_the_mesh_calls_them() {
    let lan = |seen_as: &str| format!("{{subnet: 192.168.1.0/24, mappedTo: {seen_as}}}");
    let text = route("at-a", "a, b", &lan("10.201.0.0/24"))
        + &route("at-c", "c", &lan("10.202.0.0/24"))
        // Taken by another; of one LAN by another name; as it is, though it is mapped, and the other way round.
        + &route("taken", "d", &lan("10.202.0.128/24"))
        + &route("renamed", "b", &lan("10.203.0.0/24"))
        + &route("plain", "c", "{subnet: 192.168.1.0/25}")
        + &route("first-plain", "d", "{subnet: 192.168.1.0/24}, {subnet: 192.168.0.0/16, mappedTo: 10.204.0.0/16}");
    let built = build(&text, &["a", "b", "c", "d"]);
    for (node, seen_as) in [
        ("a", "10.201.0.0/24"),
        ("b", "10.201.0.0/24"),
        ("c", "10.202.0.0/24"),
    ] {
        let node = &built.nodes[node];
        assert_eq!(texts(&node.prefixes), [seen_as]);
        let mapping = Mapping {
            lan: "192.168.1.0/24".parse().unwrap(),
            seen_as: seen_as.parse().unwrap(),
        };
        assert_eq!(node.mapped, [mapping]);
    }
    assert_eq!(texts(&built.nodes["d"].prefixes), ["192.168.1.0/24"]);
    assert_eq!(built.nodes["d"].mapped, []);
    let why = |name: &str| {
        let mut rejected = built.rejected.iter();
        let found = rejected.find(|(id, _)| id.name == name);
        found
            .map(|(_, rejected)| rejected.text.clone())
            .unwrap_or_default()
    };
    for (name, text) in [
        (
            "taken",
            "spec.subnets[0]: 10.202.0.0/24 overlaps 10.202.0.0/24 of node c",
        ),
        (
            "renamed",
            "node b has 192.168.1.0/24 as 10.201.0.0/24 already",
        ),
        (
            "plain",
            "node c has 192.168.1.0/24 as 10.202.0.0/24 already",
        ),
        (
            "first-plain",
            "spec.subnets[1]: the mesh knows 192.168.1.0/24 of node d as it is",
        ),
    ] {
        assert!(why(name).contains(text), "{name}: {}", why(name));
    }
    assert_eq!(built.rejected.len(), 4);
    let longer = text.replace("10.202.0.0/24", "10.202.0.0/16");
    let problems = parse_file("m.yaml", &longer).problems;
    let expected =
        "spec.subnets[0].mappedTo: 10.202.0.0/16 has not as many addresses as 192.168.1.0/24";
    assert!(problems[0].ends_with(expected), "{problems:?}");
}

#[test]
fn a_community_is_told_as_it_is_and_one_of_nobody_is_none() {
    let community = |sites: &str| {
        format!(
            "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: Community\nmetadata: {{name: north}}\nspec: {{sites: [{sites}]}}\n"
        )
    };
    let built = build(&community("hall-7, yard, hall-7"), &[]);
    assert!(built.rejected.is_empty());
    let told = built.wanted.values().find_map(|wanted| match wanted {
        Wanted::Resource(resource) => match decode(resource) {
            Ok(mesh_api::convert::Object::Community(name, sites)) => Some((name, sites)),
            _ => None,
        },
        Wanted::Node(_) => None,
    });
    let sites = ["hall-7", "yard"].map(|site| site.parse().unwrap());
    assert_eq!(told, Some(("north".to_owned(), BTreeSet::from(sites))));
    let many: Vec<_> = (0..257).map(|site| format!("s{site}")).collect();
    for (sites, problem) in [
        ("", "spec.sites: empty"),
        ("Hall", "spec.sites[0]: \"Hall\""),
        (
            many.join(", ").as_str(),
            "spec.sites: 257 sites; the limit is 256",
        ),
    ] {
        let problems = parse_file("m.yaml", &community(sites)).problems;
        assert!(problems[0].contains(problem), "{problems:?}");
    }
}

#[test]
fn only_those_whom_somebody_approved_may_join_where_joining_needs_that() {
    let config = |approval: &str| {
        format!(
            "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{name: default}}\nspec: {{joinApproval: {approval}}}\n---\n"
        )
    };
    let node = |name: &str, approved: bool| {
        format!(
            "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshNode\nmetadata: {{name: {name}}}\nspec: {{approved: {approved}}}\n---\n"
        )
    };
    // The config may come last.
    let nodes = node("a", true) + &node("b", false);
    assert_eq!(
        build(&(nodes.clone() + &config("automatic")), &[]).approved,
        None
    );
    let approved = build(&(nodes + &config("manual")), &[]).approved;
    assert_eq!(approved, Some(["a".parse().unwrap()].into()));
}

proptest! {
    /// Whatever is claimed, two owners never have an address in common.
    #[test]
    fn claims_of_two_owners_never_overlap(asked in proptest::collection::vec((any::<[u8; 2]>(), 8_u8..=20, 0_u8..3), 0..60)) {
        let mut claims = Claims::default();
        let mut given: Vec<(IpNet, u8)> = Vec::new();
        for ([b, c], length, who) in asked {
            let prefix = IpNet::new(IpAddr::from([10, b, c, 0]), length).unwrap().trunc();
            let overlaps = |(other, owner): &(IpNet, u8)| {
                *owner != who && (other.contains(&prefix) || prefix.contains(other))
            };
            let free = !given.iter().any(overlaps);
            prop_assert_eq!(claims.claim(prefix, &who.to_string()).is_ok(), free);
            if free {
                given.push((prefix, who));
            }
        }
    }
}

fn build(text: &str, names: &[&str]) -> Desired {
    let parsed = parse_file("m.yaml", text.trim_start_matches('\n'));
    assert_eq!(parsed.problems, Vec::<String>::new());
    let objects: Vec<_> = parsed.objects.iter().collect();
    let nodes = names.iter().zip(1..).map(|(name, seed)| {
        let address = Ipv4Addr::new(100, 96, 0, seed);
        let registered = Registered::new(NodeId([seed; 32]), address);
        (name.parse().unwrap(), registered)
    });
    desired(&objects, &nodes.collect(), MeshId([3; 32]), "demo")
}
