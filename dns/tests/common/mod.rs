//! A small mesh: this node `edge-a1` and `edge-a2` at site a, `edge-b1` at site b.

#![allow(dead_code, reason = "each test file uses its own part")]

pub(crate) mod running;

use std::{net::IpAddr, sync::Arc};

use hickory_proto::{
    op::{Message, Query},
    rr::{Name, RecordType},
};
use mesh_core::{
    policy::{
        Compiler, Limits,
        callers::Callers,
        resources::{
            Action, LabelSelector, MeshPolicy, MeshRule, NetworkPeer, NetworkPolicy, NetworkRule,
            ObjectName, Party, Pod,
        },
    },
    services::View,
    snapshot::{
        Endpoint, EndpointPort, EndpointSlice, ExternalPeer, Generation, Locality, MeshSettings,
        Node, Protocol, Service, ServiceKind, ServiceName, ServicePort, Snapshot,
    },
};
use mesh_wire::id::{MeshId, NodeId};

pub(crate) fn view() -> View {
    View::new(Arc::new(snapshot()), "edge-a1".parse().unwrap())
}

pub(crate) fn snapshot() -> Snapshot {
    let mesh = MeshSettings::with_defaults(MeshId([9; 32]), "demo");
    let mut snapshot = Snapshot::empty(mesh);
    snapshot.generation = Generation(42);
    for (number, name, site) in [
        (1, "edge-a1", "a"),
        (2, "edge-a2", "a"),
        (3, "edge-b1", "b"),
        (4, "gw.lab", "c"),
    ] {
        add_node(&mut snapshot, number, name, site);
    }
    let camera = ExternalPeer {
        id: NodeId([200; 32]),
        name: "camera".parse().unwrap(),
        prefixes: vec!["100.96.9.9/32".parse().unwrap()],
        gateway: "edge-a1".parse().unwrap(),
        endpoint: None,
        keepalive: None,
    };
    snapshot.external_peers.insert(camera.name.clone(), camera);

    let vips = ["10.43.0.10", "fd43::a"].map(address).to_vec();
    add_service(&mut snapshot, "inventory", ServiceKind::ClusterIp(vips));
    add_service(&mut snapshot, "db", ServiceKind::Headless);
    add_slice(
        &mut snapshot,
        "db",
        "v4",
        vec![
            endpoint("10.2.3.1", "edge-b1", None),
            endpoint("10.2.1.1", "edge-a1", Some("db-0")),
            endpoint("10.2.2.1", "edge-a2", None),
            Endpoint {
                ready: false,
                ..endpoint("10.2.1.9", "edge-a1", None)
            },
        ],
    );
    add_slice(
        &mut snapshot,
        "db",
        "v6",
        vec![
            endpoint("fd02::1", "edge-a1", Some("db-0")),
            endpoint("fd02::3:1", "edge-b1", None),
        ],
    );
    add_service(&mut snapshot, "empty", ServiceKind::Headless);
    for (name, target) in [
        ("search", "search.example.org"),
        ("shelf", "inventory.shop.svc.cluster.local"),
        ("nowhere", "missing.shop.svc.cluster.local"),
        ("loop", "loop.shop.svc.cluster.local"),
    ] {
        add_service(
            &mut snapshot,
            name,
            ServiceKind::ExternalName(target.to_owned()),
        );
    }
    snapshot
}

pub(crate) fn add_node(snapshot: &mut Snapshot, number: u8, name: &str, site: &str) {
    let id = NodeId([number; 32]);
    let (name, overlay_v4) = (name.parse().unwrap(), [100, 96, 0, number].into());
    let node = Node {
        locality: Locality {
            site: Some(site.parse().unwrap()),
            ..Locality::default()
        },
        prefixes: vec![format!("10.2.{number}.0/24").parse().unwrap()],
        underlay_addresses: vec![IpAddr::from([192, 168, 7, number])],
        ..Node::new(&snapshot.mesh.id, name, id, overlay_v4)
    };
    snapshot.nodes.insert(node.name.clone(), node);
}

pub(crate) fn service_name(name: &str) -> ServiceName {
    ServiceName {
        namespace: "shop".to_owned(),
        name: name.to_owned(),
    }
}

pub(crate) fn add_service(snapshot: &mut Snapshot, name: &str, kind: ServiceKind) {
    let port = |name: &str, protocol, port| ServicePort {
        name: name.to_owned(),
        protocol,
        port,
        node_port: None,
    };
    let service = Service {
        ports: vec![
            port("http", Protocol::Tcp, 80),
            port("dns", Protocol::Udp, 53),
            port("", Protocol::Tcp, 81),
        ],
        ..Service::new(service_name(name), kind)
    };
    snapshot
        .services
        .insert(service.name.clone(), service.into());
}

pub(crate) fn add_slice(
    snapshot: &mut Snapshot,
    service: &str,
    name: &str,
    endpoints: Vec<Endpoint>,
) {
    let slice = EndpointSlice {
        name: name.to_owned(),
        ports: vec![EndpointPort {
            name: "http".to_owned(),
            protocol: Protocol::Tcp,
            port: 8080,
        }],
        endpoints,
    };
    let slices = snapshot.slices.entry(service_name(service)).or_default();
    slices.insert(name.to_owned(), slice.into());
}

pub(crate) fn endpoint(at: &str, node: &str, hostname: Option<&str>) -> Endpoint {
    Endpoint {
        hostname: hostname.map(ToOwned::to_owned),
        ..Endpoint::new(address(at), Some(node.parse().unwrap()))
    }
}

/// The pod `web` at `at` of this node: a policy of the mesh keeps it from edge-b1, and a policy of a pod at edge-a2 lets
/// nobody in but `admin`.
pub(crate) fn add_policies(snapshot: &mut Snapshot, at: &str) {
    let name = |name: &str| ObjectName {
        namespace: "shop".to_owned(),
        name: name.to_owned(),
    };
    let app = |app: &str| LabelSelector {
        labels: [("app".to_owned(), app.to_owned())].into(),
        expressions: Vec::new(),
    };
    for (app_label, node, at) in [("web", "edge-a1", at), ("db", "edge-a2", "10.2.2.1")] {
        let pod = Pod {
            name: name(app_label),
            labels: app(app_label).labels,
            service_account: "default".to_owned(),
            node: Some(node.parse().unwrap()),
            addresses: vec![address(at)],
            host_network: false,
            ports: Vec::new(),
        };
        snapshot.policy.pods.insert(pod.name.clone(), pod.into());
    }
    let keeps_out = MeshPolicy {
        name: "no-b".to_owned(),
        audit: false,
        rules: vec![MeshRule {
            action: Action::Deny,
            from: vec![Party {
                pod_selector: Some(app("web")),
                ..Party::default()
            }],
            to: vec![Party {
                nodes: vec!["edge-b1".parse().unwrap()],
                ..Party::default()
            }],
            ports: Vec::new(),
        }],
    };
    snapshot
        .policy
        .mesh
        .insert(keeps_out.name.clone(), keeps_out.into());
    let lets_in = NetworkPolicy {
        name: name("db"),
        pods: app("db"),
        ingress: Some(vec![NetworkRule {
            peers: vec![NetworkPeer::Pods {
                pods: app("admin"),
                namespaces: None,
            }],
            ports: Vec::new(),
        }]),
        egress: None,
    };
    snapshot
        .policy
        .network
        .insert(lets_in.name.clone(), lets_in.into());
}

/// What policy denies to pods of this node.
pub(crate) fn callers(snapshot: &Snapshot) -> Callers {
    let limits = Limits {
        addresses: 1_000,
        pairs: 1_000,
        ports: 1_000,
    };
    let mut compiler = Compiler::of_calls("edge-a1".parse().unwrap(), limits);
    compiler.update(&Arc::new(snapshot.clone()));
    Callers::new(&compiler, snapshot)
}

/// A headless service `big` with `count` endpoints on another node.
pub(crate) fn add_big_service(snapshot: &mut Snapshot, count: u16) {
    add_service(snapshot, "big", ServiceKind::Headless);
    let endpoints = (0..count).map(|index| {
        let [high, low] = index.to_be_bytes();
        endpoint(&format!("10.2.{}.{low}", 100 + high), "edge-b1", None)
    });
    add_slice(snapshot, "big", "one", endpoints.collect());
}

pub(crate) fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A recursive query with id 0, which rotates nothing.
pub(crate) fn query(name: &str, record_type: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.id = 0;
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), record_type));
    message
}
