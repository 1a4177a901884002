//! Nodes that are taken out of the mesh: by hand, and because somebody deleted their objects.

use std::time::Duration;

use integration::joining;
use mesh_api::{
    connect::{ALPN, control_client},
    control::{NodeReport, RenewRequest, SyncRequest, node_report::Nat},
};
use mesh_identity::{authority::new_key, credentials::Credentials, tls::client_config};
use serde_json::Value;
use tokio::time::{Instant, sleep};
use tonic::{Code, Status};

use crate::{
    lab::{Agent, Controller, condition, until},
    world::{NODES, REMOVAL_GRACE_S, World},
};

/// What a controller says to who comes with these.
async fn refusal(controller: &Controller, credentials: &Credentials) -> [Status; 2] {
    let connect = async || {
        let config = client_config(credentials, ALPN).unwrap();
        let channel = joining::connect(&controller.address.to_string(), "demo", config).await;
        control_client(channel.unwrap())
    };
    let once = tokio_stream::once(SyncRequest::default());
    let sync = connect().await.sync(once).await.unwrap_err();
    let csr_der = new_key().unwrap().csr_der;
    let renew = connect().await.renew(RenewRequest { csr_der }).await;
    [sync, renew.unwrap_err()]
}

/// Who joined at one is let in by the other once that heard of it.
async fn are_in(controllers: [&Controller; 2], count: usize) {
    for controller in controllers {
        until("they are in", async || {
            (World::nodes_of(controller).await.len() == count).then_some(())
        })
        .await;
    }
}

async fn is_out(controllers: [&Controller; 2], name: &str) {
    for controller in controllers {
        until("it is out", async || {
            let nodes = World::nodes_of(controller).await;
            (!nodes.iter().any(|node| node.name == name)).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_removed_is_out_everywhere_and_its_address_rests() {
    let (world, second) = World::with_two().await;
    let gone = world.join("edge-a1", 1).await.unwrap();
    let stays = world.join_at(second.address, "edge-b1", 2).await.unwrap();
    are_in([&world.controller, &second], 2).await;
    // The one is at the other controller than the one that is asked.
    let mut leaver = Agent::new(second.address, &gone, None).await;
    let mut witness = Agent::new(world.address(), &stays, None).await;
    witness
        .until(|view| view.contains_key("node edge-a1"))
        .await;
    let nodes = World::nodes_of(&world.controller).await;
    let node = nodes.iter().find(|node| node.name == "edge-a1").unwrap();
    let address = &node.overlay_addresses[0].clone();

    world.admin.wait("MeshNode", "", "edge-a1", |_| true).await;
    let unknown = World::remove(&world.controller, "edge-z9").await;
    assert_eq!(unknown.unwrap_err().code(), Code::NotFound);
    let removed = World::remove(&world.controller, "edge-a1").await.unwrap();
    let again = World::remove(&second, "edge-a1").await.unwrap();
    assert_eq!(again, removed);
    let ended = leaver.ended().await;
    assert_eq!(ended.code(), Code::PermissionDenied, "{ended}");
    assert!(
        ended.message().contains("was taken out of the mesh"),
        "{ended}"
    );
    witness
        .until(|view| !view.contains_key("node edge-a1"))
        .await;
    for controller in [&world.controller, &second] {
        for refused in refusal(controller, &gone).await {
            assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
            assert!(
                refused.message().contains("`mesh-agent purge`"),
                "{refused}"
            );
        }
    }
    let status = |node: &Value| condition(node, "Joined")["reason"] == "Removed";
    world.admin.wait("MeshNode", "", "edge-a1", status).await;

    // Others that come get other addresses, also from controllers that begin anew.
    world
        .admin
        .apply("apiVersion: v1\nkind: Node\nmetadata: {name: n0}\n")
        .await;
    let world = world.restart_controller();
    until("joined", async || world.join("n0", 3).await.ok()).await;
    let nodes = World::nodes_of(&world.controller).await;
    let mut others = nodes.iter().map(|node| &node.overlay_addresses[0]);
    assert!(others.all(|other| other != address), "{nodes:?}");
    // Its own is kept for it.
    let back = until("joined", async || world.join("edge-a1", 1).await.ok()).await;
    Agent::new(world.address(), &back, None).await;
    let nodes = World::nodes_of(&world.controller).await;
    let node = nodes.iter().find(|node| node.name == "edge-a1").unwrap();
    assert_eq!(&node.overlay_addresses[0], address);
    let joined = |node: &Value| condition(node, "Joined")["status"] == "True";
    world.admin.wait("MeshNode", "", "edge-a1", joined).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whose_meshnode_or_node_is_deleted_leaves_unless_it_comes_back() {
    let (world, second) = World::with_two_that_remove().await;
    let both = [&world.controller, &second];
    let a = world.join("edge-a1", 1).await.unwrap();
    let b = world.join_at(second.address, "edge-b1", 2).await.unwrap();
    are_in(both, 2).await;
    let mut leaver = Agent::new(second.address, &a, None).await;
    let mut other = Agent::new(world.address(), &b, None).await;
    for name in ["edge-a1", "edge-b1"] {
        world.admin.wait("MeshNode", "", name, |_| true).await;
    }
    let grace = Duration::from_secs(REMOVAL_GRACE_S);

    // A kubelet that starts again has its Node again.
    world.admin.delete("Node", "", "edge-a1").await;
    sleep(grace / 3).await;
    world.admin.apply(NODES).await;
    // While the API server is away nothing is known.
    world.stop_api();
    sleep(grace * 2).await;
    world.start_api();
    sleep(grace * 2).await;
    for controller in both {
        assert_eq!(World::nodes_of(controller).await.len(), 2);
    }

    let deleted = Instant::now();
    world.admin.delete("MeshNode", "", "edge-a1").await;
    let ended = leaver.ended().await;
    assert_eq!(ended.code(), Code::PermissionDenied, "{ended}");
    assert!(deleted.elapsed() >= grace, "{:?}", deleted.elapsed());
    is_out(both, "edge-a1").await;
    // Nobody makes it anew.
    let nodes = world.admin.objects("MeshNode", "");
    assert!(nodes.get_opt("edge-a1").await.unwrap().is_none());

    world.admin.delete("Node", "", "edge-b1").await;
    let ended = other.ended().await;
    assert_eq!(ended.code(), Code::PermissionDenied, "{ended}");
    is_out(both, "edge-b1").await;
    let removed = |node: &Value| condition(node, "Joined")["reason"] == "Removed";
    world.admin.wait("MeshNode", "", "edge-b1", removed).await;
}

#[tokio::test]
async fn what_a_node_says_of_itself_stands_in_its_object_and_ends_no_stream() {
    let world = World::new().await;
    let credentials = world.join("edge-a1", 1).await.unwrap();
    let mut agent = Agent::new(world.address(), &credentials, None).await;
    let report = |nat: Nat, direct_peers| NodeReport {
        nat: nat.into(),
        direct_peers,
        relayed_peers: 2,
        unreachable_peers: 1,
    };
    agent.report(report(Nat::Hard, 4)).await;
    let hard = |node: &Value| node["status"]["nat"] == "Hard";
    let node = world.admin.wait("MeshNode", "", "edge-a1", hard).await;
    let status = &node["status"];
    assert_eq!(
        status["paths"],
        serde_json::json!({"direct": 4, "relayed": 2, "unreachable": 1})
    );
    assert_eq!(status["snapshotTime"], status["lastSeen"], "{status}");
    agent.report(report(Nat::UdpBlocked, 5)).await;
    let blocked = |node: &Value| node["status"]["nat"] == "UDPBlocked";
    world.admin.wait("MeshNode", "", "edge-a1", blocked).await;
    // It is told of changes as before.
    world.join("edge-b1", 2).await.unwrap();
    agent.until(|view| view.contains_key("node edge-b1")).await;
}
