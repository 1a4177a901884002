//! What the controller writes: statuses and Events.

use serde_json::Value;

use crate::{
    lab::{Agent, condition, until},
    world::{SHOP, World},
};

#[tokio::test]
async fn a_node_that_joined_has_an_object_that_says_how_it_is() {
    let world = World::new().await;
    let credentials = world.join("edge-a1", 1).await.unwrap();
    let agent = Agent::new(world.address(), &credentials, None).await;
    let connected = |node: &Value| node["status"]["connected"] == true;
    let node = world.admin.wait("MeshNode", "", "edge-a1", connected).await;
    let status = &node["status"];
    assert_eq!(
        status["wireguardPublicKey"],
        "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="
    );
    assert_eq!(status["overlayAddresses"][0], "100.96.0.1");
    assert_eq!(status["overlayAddresses"].as_array().unwrap().len(), 2);
    for name in ["Accepted", "Joined", "Ready"] {
        assert_eq!(condition(&node, name)["status"], "True", "{node}");
        assert_eq!(condition(&node, name)["observedGeneration"], 1);
    }
    drop(agent);
    let gone = |node: &Value| condition(node, "Ready")["reason"] == "Disconnected";
    world.admin.wait("MeshNode", "", "edge-a1", gone).await;
}

#[tokio::test]
async fn every_object_says_whether_the_mesh_acts_on_it_and_nothing_is_written_twice() {
    let world = World::new().await;
    world.admin.apply(OBJECTS).await;
    let reason = async |kind: &str, namespace: &str, name: &str, reason: &str| {
        let wanted = |object: &Value| condition(object, "Accepted")["reason"] == reason;
        world.admin.wait(kind, namespace, name, wanted).await
    };
    reason("MeshRelay", "", "r1", "Accepted").await;
    let invalid = reason("MeshRelay", "", "r2", "Invalid").await;
    let message = condition(&invalid, "Accepted")["message"].as_str().unwrap();
    assert!(
        message.starts_with("spec.addresses[0]: \"nowhere\""),
        "{message}"
    );
    let conflict = reason("MeshService", "shop", "nothing", "Conflict").await;
    let message = condition(&conflict, "Accepted")["message"]
        .as_str()
        .unwrap();
    assert!(
        message.contains("there is no Service shop/nothing"),
        "{message}"
    );
    reason("Community", "", "ab", "Accepted").await;
    reason("SiteRoute", "", "mapped", "Accepted").await;
    reason("SiteRoute", "", "plain", "Accepted").await;
    let twice = reason("SiteRoute", "", "twice", "Conflict").await;
    let message = condition(&twice, "Accepted")["message"].as_str().unwrap();
    assert!(message.contains("overlaps 10.1.0.0/24"), "{message}");
    let problems = world.problems().await;
    assert!(
        problems
            .iter()
            .any(|one| one.starts_with("MeshRelay r2: spec.addresses[0]")),
        "{problems:?}"
    );

    // Mended, it is told; and the others are as they were.
    let before = world.version("MeshRelay", "", "r1").await;
    world.admin.apply(MENDED).await;
    let mended = reason("MeshRelay", "", "r2", "Accepted").await;
    assert_eq!(condition(&mended, "Accepted")["observedGeneration"], 2);
    assert_eq!(world.version("MeshRelay", "", "r1").await, before);
}

#[tokio::test]
async fn an_event_tells_what_of_somebody_else_s_object_is_left_out_once() {
    let world = World::new().await;
    let namespaces = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n";
    world.admin.apply(namespaces).await;
    world
        .admin
        .apply(
            &SHOP
                .replace("IPv4", "FQDN")
                .replace("10.244.1.7", "a.example"),
        )
        .await;
    let events = world.admin.objects("Event", "shop");
    let told = async || {
        let events = events
            .list(&kube::api::ListParams::default())
            .await
            .unwrap();
        let events = events.items.into_iter();
        events
            .map(|event| serde_json::to_value(event).unwrap())
            .collect::<Vec<_>>()
    };
    let first = until("an event", async || {
        Some(told().await).filter(|all| !all.is_empty())
    })
    .await;
    assert_eq!(first.len(), 1, "{first:?}");
    assert_eq!(first[0]["regarding"]["kind"], "EndpointSlice");
    assert_eq!(first[0]["regarding"]["name"], "inventory-1");
    assert_eq!(
        first[0]["note"],
        "addressType: \"FQDN\" is not one of IPv4 and IPv6"
    );
    let world = world.restart_controller();
    world.controller.logged("addressType").await;
    let credentials = world.join("edge-a1", 1).await;
    credentials.unwrap();
    let made = |node: &Value| condition(node, "Joined")["status"] == "True";
    world.admin.wait("MeshNode", "", "edge-a1", made).await;
    assert_eq!(told().await.len(), 1);
}

const MENDED: &str = "apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshRelay
metadata: {name: r2}
spec: {addresses: [192.0.2.2]}
";

const OBJECTS: &str = "apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshRelay
metadata: {name: r1}
spec: {addresses: [192.0.2.1]}
---
apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshRelay
metadata: {name: r2}
spec: {addresses: [nowhere]}
---
apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshService
metadata: {name: nothing, namespace: shop}
spec: {policy: round-robin}
---
apiVersion: mesh.holdfast.dev/v1alpha1
kind: Community
metadata: {name: ab}
spec: {sites: [a, b]}
---
apiVersion: mesh.holdfast.dev/v1alpha1
kind: SiteRoute
metadata: {name: mapped}
spec: {gateways: [edge-a1], subnets: [{subnet: 192.168.1.0/24, mappedTo: 10.1.0.0/24}]}
---
apiVersion: mesh.holdfast.dev/v1alpha1
kind: SiteRoute
metadata: {name: plain}
spec: {gateways: [edge-a1], subnets: [{subnet: 192.168.2.0/24}]}
---
apiVersion: mesh.holdfast.dev/v1alpha1
kind: SiteRoute
metadata: {name: twice}
spec: {gateways: [edge-b1], subnets: [{subnet: 192.168.1.0/24, mappedTo: 10.1.0.0/24}]}
";
