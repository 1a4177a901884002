//! What agents are told of a cluster, and what they are not told when it goes away for a while.

use integration::apiserver::StreamingLists;

use crate::{
    lab::{Agent, until},
    world::{SHOP, World},
};

const SERVICE: &str = "service shop/inventory";
const SLICE: &str = "endpoint slice shop/inventory/inventory-1";

#[tokio::test]
async fn objects_appear_change_and_go_at_an_agent() {
    let world = World::new().await;
    let credentials = world.join("edge-a1", 1).await.unwrap();
    let mut agent = world.agent(&credentials).await;
    assert!(!agent.view().contains_key(SERVICE));

    world.admin.apply(SHOP).await;
    agent
        .until(|view| view.contains_key(SERVICE) && view.contains_key(SLICE))
        .await;
    world
        .admin
        .apply(&SHOP.replace("10.244.1.7", "10.244.1.8"))
        .await;
    agent.until(|view| view[SLICE].contains("10.244.1.8")).await;
    let last = agent.told.last().unwrap();
    assert_eq!(
        (last.full, last.set.len(), last.removed.len()),
        (false, 1, 0)
    );
    assert_eq!(agent.removed(), [""; 0]);

    world
        .admin
        .delete("EndpointSlice", "shop", "inventory-1")
        .await;
    agent.until(|view| !view.contains_key(SLICE)).await;
    world.admin.delete("Service", "shop", "inventory").await;
    agent.until(|view| !view.contains_key(SERVICE)).await;

    // Another proxy's service, and a slice of nobody's, are left alone.
    let other = SHOP.replace(
        "name: inventory, namespace: shop}\nspec",
        "name: inventory, namespace: shop, labels: {service.kubernetes.io/service-proxy-name: other}}\nspec",
    );
    let nobody = other.replace(
        "labels: {kubernetes.io/service-name: inventory}",
        "labels: {}",
    );
    world.admin.apply(&nobody).await;
    world
        .admin
        .apply(&SHOP.replace("inventory", "orders").replace("0.10", "0.11"))
        .await;
    agent
        .until(|view| view.contains_key("service shop/orders"))
        .await;
    agent
        .until(|view| view.contains_key("endpoint slice shop/orders/orders-1"))
        .await;
    assert!(!agent.view().contains_key(SERVICE) && !agent.view().contains_key(SLICE));
}

#[tokio::test]
async fn dropped_watches_and_a_forgotten_past_take_nothing_away() {
    let world = World::new().await;
    world.admin.apply(SHOP).await;
    let credentials = world.join("edge-a1", 1).await.unwrap();
    let mut agent = world.agent(&credentials).await;
    agent.until(|view| view.contains_key(SLICE)).await;
    for (round, forget) in [(8, false), (9, true)] {
        world.drop_watches(forget);
        let changed = format!("10.244.1.{round}");
        world
            .admin
            .apply(&SHOP.replace("10.244.1.7", &changed))
            .await;
        agent.until(|view| view[SLICE].contains(&changed)).await;
    }
    assert_eq!(agent.removed(), [""; 0]);
    assert!(agent.told.iter().skip(1).all(|told| !told.full));
    // Watches of kinds of which nothing is heard are well again too.
    until("nothing is wrong", async || {
        world.problems().await.is_empty().then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_api_server_that_is_away_takes_nothing_away_not_even_across_a_restart() {
    let world = World::new().await;
    world.admin.apply(SHOP).await;
    let credentials = world.join("edge-a1", 1).await.unwrap();
    let mut agent = world.agent(&credentials).await;
    agent.until(|view| view.contains_key(SLICE)).await;

    world.stop_api();
    let world = world.restart_controller();
    // One that has nothing gets everything, and one that has it is told nothing.
    let fresh = Agent::new(world.address(), &credentials, None).await;
    assert_eq!(fresh.resources, agent.resources);
    let mut agent = Agent::new(world.address(), &credentials, Some(agent)).await;
    assert_eq!((agent.told[0].full, agent.told[0].set.len()), (false, 0));
    assert!(agent.view().contains_key(SLICE));
    let problems = world.problems().await;
    assert!(
        problems
            .iter()
            .any(|one| one.contains("not all of the cluster is read yet")),
        "{problems:?}"
    );

    world.start_api();
    world
        .admin
        .apply(&SHOP.replace("10.244.1.7", "10.244.1.8"))
        .await;
    agent.until(|view| view[SLICE].contains("10.244.1.8")).await;
    assert_eq!(agent.removed(), [""; 0]);
    let log = world.controller.log();
    assert!(log.contains("problem solved"), "{log}");
}

#[tokio::test]
async fn a_server_that_streams_no_lists_is_followed_too() {
    for what in [StreamingLists::Refused, StreamingLists::Broken] {
        let world = World::with(|standin| standin.faults().streaming_lists(what)).await;
        world.admin.apply(SHOP).await;
        let credentials = world.join("edge-a1", 1).await.unwrap();
        let mut agent = world.agent(&credentials).await;
        agent.until(|view| view.contains_key(SLICE)).await;
        world.controller.logged("asking for pages").await;
    }
}

#[tokio::test]
async fn pods_are_followed_from_the_first_policy_on_and_policies_wait_for_them() {
    let world = World::new().await;
    world.admin.apply(SHOP).await;
    let credentials = world.join("edge-a1", 1).await.unwrap();
    let mut agent = world.agent(&credentials).await;
    agent.until(|view| view.contains_key(SLICE)).await;
    world.admin.apply(POD).await;
    world.admin.apply_status(POD_STATUS).await;
    assert!(!agent.view().contains_key("pod shop/inventory-0"));
    world.admin.apply(POLICY).await;
    agent
        .until(|view| view.contains_key("network policy shop/web"))
        .await;
    // Never without its pods: they came in the same answer.
    let view = agent.view();
    assert!(view.contains_key("pod shop/inventory-0"), "{view:#?}");
    assert!(view.contains_key("namespace shop"), "{view:#?}");
    let deny = "apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshPolicy
metadata: {name: none}
spec: {rules: [{action: deny, from: [{sites: [a]}]}]}
";
    world.admin.apply(deny).await;
    agent
        .until(|view| view.contains_key("mesh policy none"))
        .await;
}

const POD: &str = "apiVersion: v1
kind: Pod
metadata: {name: inventory-0, namespace: shop, labels: {app: inventory}}
spec: {nodeName: edge-a1, containers: [{name: main, image: main}]}
";

const POD_STATUS: &str = "apiVersion: v1
kind: Pod
metadata: {name: inventory-0, namespace: shop}
status: {phase: Running, podIP: 10.244.1.7, podIPs: [{ip: 10.244.1.7}]}
";

const POLICY: &str = "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec: {podSelector: {matchLabels: {app: inventory}}, policyTypes: [Ingress]}
";
