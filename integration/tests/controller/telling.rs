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

/// What was told of objects of a kind: reasons with their types, the oldest first.
async fn told_of(world: &World, namespace: &str, kind: &str) -> Vec<(String, String)> {
    let events = world.admin.objects("Event", namespace);
    let events = events.list(&kube::api::ListParams::default()).await;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut told: Vec<_> = events
        .unwrap()
        .items
        .iter()
        .filter(|event| event.data["regarding"]["kind"] == kind)
        .map(|event| {
            let time = text(&event.data["eventTime"]);
            (time, text(&event.data["reason"]), text(&event.data["type"]))
        })
        .collect();
    told.sort();
    told.into_iter()
        .map(|(_, reason, kind)| (reason, kind))
        .collect()
}

async fn is_told(world: &World, namespace: &str, kind: &str, expected: &[(&str, &str)]) {
    let expected: Vec<_> = expected
        .iter()
        .map(|(reason, kind)| ((*reason).to_owned(), (*kind).to_owned()))
        .collect();
    until(&format!("{expected:?} of {kind}"), async || {
        let told = told_of(world, namespace, kind).await;
        (told == expected).then_some(())
    })
    .await;
}

#[tokio::test]
async fn events_tell_what_becomes_of_a_node_and_a_controller_that_begins_anew_tells_nothing_twice()
{
    let world = World::new().await;
    let manual = "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default}\n\
                  spec: {joinApproval: manual}\n";
    world.admin.apply(manual).await;
    let accepted = |config: &Value| condition(config, "Accepted")["status"] == "True";
    world
        .admin
        .wait("MeshConfig", "", "default", accepted)
        .await;
    world.join("edge-a1", 1).await.unwrap_err();
    let waits = ("AwaitingApproval", "Warning");
    is_told(&world, "default", "MeshNode", &[waits]).await;
    world
        .admin
        .apply(&manual.replace("manual", "automatic"))
        .await;
    let credentials = until("approved", async || world.join("edge-a1", 1).await.ok()).await;
    let joined = ("Joined", "Normal");
    is_told(&world, "default", "MeshNode", &[waits, joined]).await;

    // Once it was connected, it is known when its certificate ends.
    let agent = Agent::new(world.address(), &credentials, None).await;
    let current = |node: &Value| condition(node, "CertificateCurrent")["status"] == "True";
    let node = world.admin.wait("MeshNode", "", "edge-a1", current).await;
    let ends = node["status"]["certificateExpires"].as_str().unwrap();
    let ends: k8s_openapi::jiff::Timestamp = ends.parse().unwrap();
    let shown = credentials.validity().not_after;
    let shown = shown.duration_since(std::time::UNIX_EPOCH).unwrap();
    assert_eq!(u64::try_from(ends.as_second()).unwrap(), shown.as_secs());
    drop(agent);

    world.join("edge-a1", 2).await.unwrap();
    let rejoined = ("Rejoined", "Normal");
    is_told(&world, "default", "MeshNode", &[waits, joined, rejoined]).await;
    World::remove(&world.controller, "edge-a1").await.unwrap();
    let removed = ("Removed", "Normal");
    let all = [waits, joined, rejoined, removed];
    is_told(&world, "default", "MeshNode", &all).await;

    let world = world.restart_controller();
    let out = |node: &Value| condition(node, "Joined")["reason"] == "Removed";
    until("joined", async || world.join("edge-b1", 3).await.ok()).await;
    let made = |node: &Value| condition(node, "Joined")["status"] == "True";
    world.admin.wait("MeshNode", "", "edge-b1", made).await;
    world.admin.wait("MeshNode", "", "edge-a1", out).await;
    is_told(
        &world,
        "default",
        "MeshNode",
        &[&all[..], &[joined]].concat(),
    )
    .await;
}

#[tokio::test]
async fn a_policy_that_cannot_be_honoured_is_warned_of_and_a_service_without_an_endpoint() {
    let world = World::new().await;
    world.admin.apply(SHOP).await;
    world.admin.apply(BALANCED).await;
    let ready = |status: &'static str, reason: &'static str| {
        move |service: &Value| {
            let condition = condition(service, "EndpointsReady");
            condition["status"] == status && condition["reason"] == reason
        }
    };
    let wait = async |status, reason| {
        let wanted = ready(status, reason);
        let service = world.admin.wait("MeshService", "shop", "inventory", wanted);
        service.await
    };
    let service = wait("True", "Ready").await;
    assert_eq!(
        condition(&service, "EndpointsReady")["observedGeneration"],
        1
    );
    let version = world.version("MeshService", "shop", "inventory").await;
    // One more endpoint is no news.
    let more = SHOP.replace(
        "[{addresses: [10.244.1.7]",
        "[{addresses: [10.244.1.8]}, {addresses: [10.244.1.7]",
    );
    world.admin.apply(&more).await;
    let unready = SHOP.replace(
        "nodeName: edge-a1",
        "nodeName: edge-a1, conditions: {ready: false}",
    );
    world.admin.apply(POLICY).await;
    // Of a later version than this controller knows: the API server let it in.
    let later = serde_json::json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "later", "namespace": "shop"},
        "spec": {"podSelector": {}, "ingress": [{"ports": [{"protocol": "QUIC"}]}]},
    });
    world.standin.insert(&later).unwrap();
    let rejected = |policy: &Value| condition(policy, "Accepted")["reason"] == "Invalid";
    let policy = world.admin.wait("MeshPolicy", "", "odd", rejected).await;
    let told = condition(&policy, "Accepted");
    assert_eq!(
        (&told["status"], &told["observedGeneration"]),
        (&"False".into(), &1.into())
    );
    assert_eq!(
        world.version("MeshService", "shop", "inventory").await,
        version
    );
    world.admin.apply(&unready).await;
    wait("False", "NoEndpoint").await;

    let warned = |reason: &'static str| [(reason, "Warning")];
    is_told(&world, "shop", "MeshService", &warned("NoEndpoint")).await;
    is_told(
        &world,
        "default",
        "MeshPolicy",
        &warned("PolicyNotEnforced"),
    )
    .await;
    is_told(
        &world,
        "shop",
        "NetworkPolicy",
        &warned("PolicyNotEnforced"),
    )
    .await;
    world.admin.apply(SHOP).await;
    wait("True", "Ready").await;
    assert!(!world.controller.log().contains("took it not"));
}

const BALANCED: &str = "apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshService
metadata: {name: inventory, namespace: shop}
spec: {policy: round-robin}
";

const POLICY: &str = "apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshPolicy
metadata: {name: odd}
spec: {rules: [{action: deny, from: [{cidrs: [nowhere]}]}]}
";

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
