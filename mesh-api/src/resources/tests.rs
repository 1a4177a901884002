use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    time::{Duration, SystemTime},
};

use mesh_core::snapshot::{
    Balance, Endpoint, EndpointPort, EndpointSlice, External, ExternalPeer, Hints, Locality,
    MeshSettings, Place, Policy, Protocol, Relay, Service, ServiceKind, ServiceName, ServicePort,
    TrafficDistribution, Weight,
};
use mesh_identity::authority::CertificateAuthority;
use mesh_wire::id::NodeId;
use proptest::{collection::vec, option, prelude::*};
use prost::Message as _;

use super::*;
use crate::convert::{
    external_peer_resource, mesh_resource, node_record_bytes, node_resource, relay_resource,
    service_resource, slice_resource,
};

#[test]
fn a_node_that_another_authority_signed_is_left_out_and_the_rest_stays() {
    let (ours, theirs) = (authority(), authority());
    let good = signed(&ours, &node(&ours, "a", 1));
    let forged = signed(&theirs, &node(&ours, "b", 2));
    let resources = [settings(&ours), good, forged];
    let (snapshot, rejected) = read(&ours, &resources).unwrap();
    let names: Vec<_> = snapshot.nodes.keys().map(ToString::to_string).collect();
    assert_eq!(names, ["a"]);
    let problems: Vec<_> = rejected.iter().map(ToString::to_string).collect();
    let expected = "node b: its signature is not that of this mesh's authority";
    assert_eq!(problems, [expected]);
}

#[test]
fn a_broken_field_is_named_with_its_resource() {
    let mesh = authority();
    let mut service = service_resource(&Service {
        ports: vec![ServicePort {
            name: String::new(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: None,
        }],
        ..Service::new(name("shop", "inventory"), ServiceKind::Headless)
    });
    if let Some(crate::control::resource::Kind::Service(service)) = &mut service.kind {
        service.ports[0].port = 70_000;
    }
    let (_, rejected) = read(&mesh, &[settings(&mesh), service]).unwrap();
    let expected = "service shop/inventory: ports[0].port: 70000 is not a port (1 to 65535)";
    assert_eq!(rejected[0].to_string(), expected);
}

#[test]
fn what_is_written_to_disk_is_what_copying_everything_would_give() {
    let mesh = authority();
    let mut file = SnapshotFile {
        store_id: vec![7; 16],
        generation: 300,
        received_unix_s: -1,
        ..SnapshotFile::default()
    };
    for resources in [vec![], vec![settings(&mesh), relay("a"), relay("b")]] {
        let mut kept = Resources::new();
        assert_eq!(apply(&mut kept, respond(true, &resources, &[])), []);
        let encoded = encode_snapshot(&file, &kept);
        assert_eq!(encoded.capacity(), encoded.len());
        file.resources = kept.values().map(Encoded::decode).collect();
        assert_eq!(SnapshotFile::decode(encoded.as_slice()), Ok(file.clone()));
        file.resources.clear();
    }
}

#[test]
fn settings_of_another_mesh_make_no_snapshot() {
    let (ours, theirs) = (authority(), authority());
    let error = read(&ours, &[settings(&theirs)]).unwrap_err();
    assert!(matches!(error, SnapshotError::OtherMesh { .. }), "{error}");
    assert_eq!(read(&ours, &[]), Err(SnapshotError::NoMesh));
}

#[test]
fn a_delta_sets_and_removes_and_a_full_answer_replaces() {
    let mesh = authority();
    let (a, b) = (relay("a"), relay("b"));
    let mut state = State::new(mesh.certificate_der().clone()).unwrap();
    let mut check = |response, expected: &[&Resource], relays: usize| {
        assert_eq!(state.apply(response, Trust::Check), []);
        let kept = state.resources().values().map(Encoded::decode);
        assert_eq!(
            kept.collect::<Vec<_>>().iter().collect::<Vec<_>>(),
            expected
        );
        let snapshot = state.snapshot(Generation(1));
        assert_eq!(snapshot.map_or(0, |snapshot| snapshot.relays.len()), relays);
    };
    let all = settings(&mesh);
    check(
        respond(true, &[all.clone(), a.clone()], &[]),
        &[&all, &a],
        1,
    );
    check(
        respond(false, std::slice::from_ref(&b), &[key(&a).unwrap()]),
        &[&all, &b],
        1,
    );
    check(
        respond(false, std::slice::from_ref(&a), &[]),
        &[&all, &a, &b],
        2,
    );
    check(respond(true, std::slice::from_ref(&a), &[]), &[&a], 0);
}

#[test]
fn whether_a_service_asks_for_sockmap_is_a_change_by_itself() {
    let mesh = authority();
    let kind = ServiceKind::ClusterIp(vec![[10, 96, 0, 1].into()]);
    let mut service = Service::new(name("default", "a"), kind);
    let without = service_resource(&service);
    service.balance.sockmap = true;
    let with = service_resource(&service);
    let mut state = State::new(mesh.certificate_der().clone()).unwrap();
    let mut check = |response, expected: bool| {
        assert_eq!(state.apply(response, Trust::Check), []);
        let snapshot = state.snapshot(Generation(1)).unwrap();
        let found = &snapshot.services[&service.name];
        assert_eq!(found.balance.sockmap, expected);
    };
    let first = [settings(&mesh), without.clone()];
    check(respond(true, &first, &[]), false);
    check(respond(false, &[with], &[]), true);
    check(respond(false, &[without], &[]), false);
}

/// Who knows no such field says of the others what it said before.
#[test]
fn a_sender_that_knows_no_sockmap_asks_for_none() {
    let mesh = authority();
    let kind = ServiceKind::ClusterIp(vec![[10, 96, 0, 1].into()]);
    let mut service = Service::new(name("default", "a"), kind);
    service.balance.spill_over = 3;
    let resource = service_resource(&service);
    // Field 14 of the service, `balance`: field 2 of it, 3, and no field 5.
    let encoded = resource.encode_to_vec();
    assert!(
        encoded.ends_with(&[14 << 3 | 2, 2, 2 << 3, 3]),
        "{encoded:?}"
    );
    let received = Resource::decode(encoded.as_slice()).unwrap();
    let (snapshot, rejected) = read(&mesh, &[settings(&mesh), received]).unwrap();
    assert_eq!(rejected, []);
    assert_eq!(*snapshot.services[&service.name], service);
}

#[test]
fn a_resource_that_breaks_leaves_the_snapshot_and_comes_back_when_it_is_mended() {
    let (ours, theirs) = (authority(), authority());
    let mut state = State::new(ours.certificate_der().clone()).unwrap();
    let nodes = |state: &State| state.snapshot(Generation(0)).unwrap().nodes.len();
    let good = signed(&ours, &node(&ours, "a", 1));
    let forged = signed(&theirs, &node(&ours, "a", 1));
    let first = respond(true, &[settings(&ours), good.clone()], &[]);
    assert_eq!(
        (state.apply(first, Trust::Check).len(), nodes(&state)),
        (0, 1)
    );
    let broken = respond(false, &[forged], &[]);
    assert_eq!(
        (state.apply(broken, Trust::Check).len(), nodes(&state)),
        (1, 0)
    );
    let mended = respond(false, &[good], &[]);
    assert_eq!(
        (state.apply(mended, Trust::Check).len(), nodes(&state)),
        (0, 1)
    );
}

proptest! {
    #[test]
    fn a_snapshot_survives_the_wire(parts in parts()) {
        let mesh = authority();
        let expected = parts.snapshot(&mesh);
        let resources: Vec<_> = encode(&mesh, &expected)
            .iter()
            .map(|resource| Resource::decode(resource.encode_to_vec().as_slice()).unwrap())
            .collect();
        let (snapshot, rejected) = read(&mesh, &resources).unwrap();
        prop_assert_eq!(rejected, []);
        prop_assert_eq!(snapshot, expected);
    }

    #[test]
    fn no_bytes_make_reading_panic(bytes: Vec<u8>, record: Vec<u8>) {
        let mesh = authority();
        let mut resources = vec![settings(&mesh), node_resource(record, bytes.clone())];
        resources.extend(Resource::decode(bytes.as_slice()));
        read(&mesh, &resources).ok();
    }
}

#[derive(Debug, Clone)]
struct Parts {
    nodes: Vec<(NodeParts, u8)>,
    services: Vec<ServiceParts>,
    endpoints: Vec<EndpointParts>,
}

type ServiceParts = (
    String,
    ServiceKind,
    Vec<(String, bool, u16)>,
    [bool; 4],
    Option<TrafficDistribution>,
    Option<u32>,
    Vec<IpAddr>,
);

type EndpointParts = (IpAddr, Option<String>, Option<String>, [bool; 3]);

type NodeParts = (
    String,
    Option<String>,
    Option<String>,
    Vec<IpAddr>,
    Vec<SocketAddr>,
);

fn parts() -> impl Strategy<Value = Parts> {
    let label = "[a-z][a-z0-9]{0,8}";
    let node = (
        label,
        option::of(label),
        option::of(label),
        vec(any::<IpAddr>(), 0..3),
        vec(any::<(IpAddr, u16)>().prop_map(SocketAddr::from), 0..3),
    );
    let kind = prop_oneof![
        vec(any::<IpAddr>(), 1..3).prop_map(ServiceKind::ClusterIp),
        Just(ServiceKind::Headless),
        label.prop_map(ServiceKind::ExternalName),
    ];
    let port = (label, any::<bool>(), 1..=u16::MAX);
    let distribution = prop_oneof![
        Just(None),
        Just(Some(TrafficDistribution::SameZone)),
        Just(Some(TrafficDistribution::SameNode)),
    ];
    let flags = any::<[bool; 4]>();
    let outside = vec(any::<IpAddr>(), 0..3);
    let affinity_s = option::of(1..=u32::MAX);
    let ports = vec(port, 0..3);
    let service = (label, kind, ports, flags, distribution, affinity_s, outside);
    let endpoint = (
        any::<IpAddr>(),
        option::of(label.prop_map(String::from)),
        option::of(label.prop_map(String::from)),
        any::<[bool; 3]>(),
    );
    (
        vec((node, any::<u8>()), 0..4),
        vec(service, 0..4),
        vec(endpoint, 0..4),
    )
        .prop_map(|(nodes, services, endpoints)| Parts {
            nodes,
            services,
            endpoints,
        })
}

impl Parts {
    fn snapshot(&self, mesh: &CertificateAuthority) -> Snapshot {
        let mut snapshot = Snapshot::empty(mesh_settings(mesh));
        for ((name, site, zone, underlay, candidates), seed) in &self.nodes {
            let mut node = node(mesh, name, *seed);
            node.locality.site = site.as_ref().map(|site| site.parse().unwrap());
            node.locality.zone.clone_from(zone);
            node.underlay_addresses.clone_from(underlay);
            node.static_candidates.clone_from(candidates);
            node.prefixes = underlay.iter().copied().map(Into::into).collect();
            snapshot.nodes.insert(node.name.clone(), node);
        }
        for parts in &self.services {
            let service = service(parts);
            let text = &parts.0;
            let slices = BTreeMap::from([("s".to_owned(), self.slice(&service).into())]);
            snapshot.slices.insert(service.name.clone(), slices);
            snapshot
                .services
                .insert(service.name.clone(), service.into());
            let peer = external_peer(text);
            snapshot.external_peers.insert(peer.name.clone(), peer);
        }
        snapshot
    }

    fn slice(&self, service: &Service) -> EndpointSlice {
        let ports = service.ports.iter().map(|port| EndpointPort {
            name: port.name.clone(),
            protocol: port.protocol,
            port: port.port,
        });
        let endpoints = self.endpoints.iter();
        EndpointSlice {
            name: "s".to_owned(),
            ports: ports.collect(),
            endpoints: endpoints
                .map(
                    |(address, node, zone, [ready, serving, terminating])| Endpoint {
                        address: *address,
                        node: node.as_ref().map(|node| node.parse().unwrap()),
                        zone: zone.clone(),
                        hostname: zone.clone(),
                        hints: Hints {
                            zones: zone.iter().cloned().collect(),
                            nodes: node.iter().map(|node| node.parse().unwrap()).collect(),
                        },
                        ready: *ready,
                        serving: *serving,
                        terminating: *terminating,
                    },
                )
                .collect(),
        }
    }
}

fn service(parts: &ServiceParts) -> Service {
    let (text, kind, ports, flags, distribution, affinity_s, outside) = parts;
    let ports = ports.iter().map(|(name, tcp, port)| ServicePort {
        name: name.clone(),
        protocol: if *tcp { Protocol::Tcp } else { Protocol::Udp },
        port: *port,
        node_port: tcp.then_some(*port | 0x7000),
    });
    let [publish_not_ready, local_only, external_local_only, sockmap] = *flags;
    Service {
        name: name("default", text),
        kind: kind.clone(),
        ports: ports.collect(),
        publish_not_ready,
        local_only,
        distribution: *distribution,
        affinity: affinity_s.map(|seconds| Duration::from_secs(seconds.into())),
        external: External {
            addresses: outside.clone(),
            load_balancer: outside.iter().rev().copied().collect(),
            sources: outside.iter().copied().map(Into::into).collect(),
            local_only: external_local_only,
            health_check: external_local_only.then_some(30_090),
        },
        balance: Balance {
            sockmap,
            ..balance(text, *affinity_s, outside)
        },
    }
}

/// Every policy and every kind of place, by the length of the name.
fn balance(text: &str, number: Option<u32>, addresses: &[IpAddr]) -> Balance {
    let places = [
        Place::Node(text.parse().unwrap()),
        Place::Site(text.parse().unwrap()),
        Place::Zone(text.to_owned()),
        Place::Region(text.to_owned()),
    ];
    let addresses = addresses.iter().map(|&address| Place::Address(address));
    let policies = [
        Policy::Random,
        Policy::ConsistentHash,
        Policy::RoundRobin,
        Policy::LeastLatency,
    ];
    let weights = addresses.chain(places).skip(text.len() % 6).zip(1..);
    Balance {
        policy: policies[text.len() % 4],
        spill_over: number.map_or(0, |number| number.to_be_bytes()[0].into()),
        max_connections: NonZeroU16::new(u16::from(text.len().is_multiple_of(2)) * 7),
        sockmap: false,
        weights: weights
            .map(|(place, weight)| Weight { place, weight })
            .collect(),
    }
}

fn encode(mesh: &CertificateAuthority, snapshot: &Snapshot) -> Vec<Resource> {
    let mut resources = vec![mesh_resource(&snapshot.mesh)];
    resources.extend(snapshot.nodes.values().map(|node| signed(mesh, node)));
    resources.extend(snapshot.external_peers.values().map(external_peer_resource));
    resources.extend(snapshot.relays.values().map(relay_resource));
    resources.extend(
        snapshot
            .services
            .values()
            .map(|service| service_resource(service)),
    );
    for (service, slices) in &snapshot.slices {
        resources.extend(slices.values().map(|slice| slice_resource(service, slice)));
    }
    resources
}

fn read(
    mesh: &CertificateAuthority,
    resources: &[Resource],
) -> Result<(Snapshot, Vec<Rejected>), SnapshotError> {
    let mut state = State::new(mesh.certificate_der().clone()).unwrap();
    let rejected = state.apply(respond(true, resources, &[]), Trust::Check);
    state
        .snapshot(Generation(0))
        .map(|snapshot| (snapshot, rejected))
}

fn respond(full: bool, set: &[Resource], removed: &[ResourceKey]) -> SyncResponse {
    SyncResponse {
        store_id: vec![1],
        generation: 1,
        full,
        set: set.to_vec(),
        removed: removed.to_vec(),
        ..SyncResponse::default()
    }
}

fn authority() -> CertificateAuthority {
    CertificateAuthority::generate("demo", SystemTime::now()).unwrap()
}

fn mesh_settings(mesh: &CertificateAuthority) -> MeshSettings {
    MeshSettings::with_defaults(mesh.mesh_id(), mesh.trust_domain())
}

fn settings(mesh: &CertificateAuthority) -> Resource {
    mesh_resource(&mesh_settings(mesh))
}

fn signed(mesh: &CertificateAuthority, node: &Node) -> Resource {
    let record = node_record_bytes(node);
    let signature = mesh.sign_record(&record).unwrap();
    node_resource(record, signature)
}

fn node(mesh: &CertificateAuthority, name: &str, seed: u8) -> Node {
    let id = NodeId([seed; 32]);
    Node {
        id,
        name: name.parse().unwrap(),
        locality: Locality::default(),
        overlay_v4: [100, 96, 0, seed].into(),
        overlay_v6: mesh.mesh_id().overlay_v6(&id),
        prefixes: Vec::new(),
        pod_prefixes: Vec::new(),
        underlay_addresses: Vec::new(),
        static_candidates: Vec::new(),
        mapped: Vec::new(),
    }
}

fn external_peer(name: &str) -> ExternalPeer {
    ExternalPeer {
        id: NodeId([9; 32]),
        name: name.parse().unwrap(),
        prefixes: vec!["100.127.0.1/32".parse().unwrap()],
        gateway: "a".parse().unwrap(),
        endpoint: Some("[2001:db8::1]:51820".parse().unwrap()),
        keepalive: Some(Duration::from_secs(25)),
    }
}

fn relay(name: &str) -> Resource {
    relay_resource(&Relay {
        name: name.parse().unwrap(),
        addresses: vec!["192.0.2.1".parse().unwrap()],
        quic_port: 443,
        tls_port: 443,
        stun_ports: vec![443, 3478],
        node: None,
        sites: std::collections::BTreeSet::new(),
    })
}

fn name(namespace: &str, name: &str) -> ServiceName {
    ServiceName {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    }
}
