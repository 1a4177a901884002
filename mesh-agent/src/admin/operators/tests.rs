use mesh_api::admin::agent_admin_server::SERVICE_NAME;
use mesh_core::snapshot::MeshSettings;
use mesh_wire::id::{MeshId, NodeId};
use tonic::Code;

use super::*;

fn node(name: &str, key: u8) -> Identity {
    Identity::Node {
        name: name.parse().unwrap(),
        id: NodeId([key; 32]),
    }
}

fn mesh() -> Snapshot {
    let id = MeshId([1; 32]);
    let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(id, "demo"));
    for (name, key) in [("cloud-1", 1), ("edge-b1", 2)] {
        let name: NodeName = name.parse().unwrap();
        let address = Ipv4Addr::new(100, 96, 0, key);
        let node = mesh_core::snapshot::Node::new(&id, name.clone(), NodeId([key; 32]), address);
        snapshot.nodes.insert(name, node);
    }
    snapshot
}

#[track_caller]
fn check(operators: &[&str], identity: &Identity, question: &str, want: Result<(), &str>) {
    let patterns = operators
        .iter()
        .map(|&one| NamePattern::new(one.to_owned()));
    let patterns: Vec<_> = patterns.collect();
    match (judge(&patterns, identity, &mesh(), question), want) {
        (Ok(asked), Ok(())) => assert_eq!(asked, question),
        (Err(status), Err(words)) => {
            assert_eq!(status.code(), Code::PermissionDenied);
            assert!(status.message().contains(words), "{}", status.message());
        }
        (judged, _) => panic!("{judged:?}"),
    }
}

#[test]
fn only_named_members_of_the_mesh_ask_and_only_what_changes_nothing() {
    check(&["cloud-*"], &node("cloud-1", 1), "Status", Ok(()));
    check(&["cloud-1"], &node("cloud-1", 1), "Ping", Ok(()));
    check(
        &[],
        &node("cloud-1", 1),
        "Status",
        Err("name it in `operators`"),
    );
    check(
        &["cloud-*"],
        &node("edge-b1", 2),
        "Status",
        Err("does not answer edge-b1"),
    );
    // A certificate of a node that was taken out, or whose name another has now.
    check(
        &["*"],
        &node("cloud-2", 3),
        "Status",
        Err("knows no such one"),
    );
    check(
        &["*"],
        &node("cloud-1", 9),
        "Status",
        Err("knows no such one"),
    );
    let relay = Identity::Relay("cloud-1".parse().unwrap());
    check(&["*"], &relay, "Status", Err("knows no such one"));
    check(
        &["*"],
        &node("cloud-1", 1),
        "Restart",
        Err("is not for other nodes"),
    );
    check(
        &["*"],
        &node("cloud-1", 1),
        "",
        Err("is not for other nodes"),
    );
}

#[test]
fn the_door_is_the_admin_service_s() {
    assert_eq!(Door::NAME, SERVICE_NAME);
}
