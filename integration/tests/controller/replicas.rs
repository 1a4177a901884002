//! Two controllers that share a store in the cluster, and what befalls them and the API server, which has to
//! answer while a controller is waited for: hence the threads.

use std::{collections::BTreeSet, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use integration::apiserver::Refusal;
use netns_tests::tool::run;
use serde_json::Value;
use tokio::time::Instant;
use tonic::Code;

use crate::{
    lab::{Agent, Controller, condition, until},
    world::{SHOP, World},
};

/// Nodes of the cluster that are not there yet.
fn nodes(count: u8) -> Vec<String> {
    (0..count).map(|number| format!("n{number}")).collect()
}

async fn make_nodes(world: &World, names: &[String]) {
    for name in names {
        let node = format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\n");
        world.admin.apply(&node).await;
    }
}

async fn know(controller: &Controller, count: usize) -> BTreeSet<String> {
    let nodes = until("every node is known", async || {
        let nodes = World::nodes_of(controller).await;
        (nodes.len() == count).then_some(nodes)
    })
    .await;
    let addresses = nodes.iter().map(|node| node.overlay_addresses[0].clone());
    let addresses: BTreeSet<_> = addresses.collect();
    assert_eq!(
        addresses.len(),
        count,
        "an address is given twice: {nodes:?}"
    );
    addresses
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_join_at_two_controllers_at_once_get_no_address_twice() {
    let (world, second) = World::with_two().await;
    let names = nodes(12);
    make_nodes(&world, &names).await;
    // Now and then the API server is busy, broken, or another was faster.
    for (code, part) in [
        (429, "store"),
        (500, "nodes-"),
        (503, "claims-"),
        (500, "store"),
    ] {
        world.standin.faults().refuse(Refusal {
            code,
            requests: 4,
            path: format!("configmaps/holdfast-{part}"),
        });
    }
    let joins = names.iter().zip(1..).map(|(name, seed)| {
        let at = [world.address(), second.address][usize::from(seed % 2)];
        let world = &world;
        async move {
            // As an agent: what passes is asked again.
            until("joined", async || {
                match world.join_at(at, name, seed).await {
                    Ok(credentials) => Some(credentials),
                    Err(status) => {
                        assert_eq!(status.code(), Code::Unavailable, "{status}");
                        None
                    }
                }
            })
            .await
        }
    });
    futures_util::future::join_all(joins).await;
    let here = know(&world.controller, names.len()).await;
    assert_eq!(know(&second, names.len()).await, here);

    // Both begin anew, with nothing of their own but what they share.
    let world = world.restart_controller();
    assert_eq!(know(&world.controller, names.len()).await, here);
    let third = world.another_controller();
    assert_eq!(know(&third, names.len()).await, here);
    let anchor = world.anchor().await;
    assert!(second.log().contains(&anchor.mesh.to_string()));
    assert!(third.log().contains(&anchor.mesh.to_string()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_killed_in_the_middle_of_a_write_leaves_it_to_the_other() {
    let (mut world, second) = World::with_two().await;
    let names = nodes(12);
    make_nodes(&world, &names).await;
    // Each answer takes so long that a join is many of them.
    world.join_at(second.address, "edge-a1", 100).await.unwrap();
    world.standin.faults().slow(Duration::from_millis(40));
    let mut seeds = (1..=12).zip(&names);
    for moment in [60_u64, 150, 240] {
        let batch: Vec<_> = seeds.by_ref().take(4).collect();
        let joins = batch
            .iter()
            .map(|(seed, name)| world.join_at(world.address(), name, *seed));
        let joins = futures_util::future::join_all(joins);
        // TokenReview and the rest before the store take their time, too.
        tokio::time::timeout(Duration::from_millis(400 + moment), joins)
            .await
            .ok();
        world.controller.kill();
        for (seed, name) in batch {
            until("joined at the other", async || {
                world.join_at(second.address, name, seed).await.ok()
            })
            .await;
        }
        world = world.restart_controller();
    }
    world.standin.faults().slow(Duration::ZERO);
    let here = know(&world.controller, names.len() + 1).await;
    assert_eq!(know(&second, names.len() + 1).await, here);
    // Nothing is left to be done.
    let head = world
        .admin
        .wait("ConfigMap", "holdfast", "holdfast-store", |_| true)
        .await;
    assert_eq!(head["data"]["changes"], Value::Null, "{head}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_moves_between_controllers_while_the_api_server_is_away() {
    let (world, second) = World::with_two().await;
    world.admin.apply(SHOP).await;
    let credentials = world.join("edge-a1", 1).await.unwrap();
    let mut agent = world.agent(&credentials).await;
    agent
        .until(|view| view.contains_key("endpoint slice shop/inventory/inventory-1"))
        .await;
    // The other one has read the same.
    let other = world.join_at(second.address, "edge-b1", 2).await.unwrap();
    let mut witness = Agent::new(second.address, &other, None).await;
    witness
        .until(|view| view.contains_key("endpoint slice shop/inventory/inventory-1"))
        .await;
    agent.until(|view| view.contains_key("node edge-b1")).await;
    let everything: usize = agent.told.iter().map(prost::Message::encoded_len).sum();
    world.stop_api();
    for address in [second.address, world.address(), second.address] {
        let before = agent.view();
        agent = Agent::new(address, &credentials, Some(agent)).await;
        let told: usize = agent.told.iter().map(prost::Message::encoded_len).sum();
        assert!(agent.told.iter().all(|told| !told.full), "{:?}", agent.told);
        assert_eq!(agent.view(), before);
        assert!(told * 4 < everything, "{told} of {everything} bytes");
    }
    // One that begins without the API server cannot; the agent is served by the other.
    world.start_api();
    world
        .admin
        .apply(&SHOP.replace("10.244.1.7", "10.244.1.8"))
        .await;
    agent
        .until(|view| view["endpoint slice shop/inventory/inventory-1"].contains("10.244.1.8"))
        .await;
    // Watches that are cut, and a past that is forgotten, lose no node.
    make_nodes(&world, &nodes(1)).await;
    world.drop_watches(true);
    world.standin.faults().restart();
    until("joined", async || world.join("n0", 3).await.ok()).await;
    agent.until(|view| view.contains_key("node n0")).await;
    assert_eq!(agent.removed(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leader_writes_the_other_speaks_of_its_own_nodes_and_takes_over() {
    let (mut world, mut second) = World::with_two().await;
    let held = |lease: &Value| lease["spec"]["holderIdentity"].is_string();
    let lease = world
        .admin
        .wait("Lease", "holdfast", "holdfast-controller", held)
        .await;
    let leads = |controller: &Controller| {
        let log = controller.log();
        log.matches("this controller leads now").count()
            > log.matches("this controller leads no more").count()
    };
    until("one leads", async || {
        (leads(&world.controller) || leads(&second)).then_some(())
    })
    .await;
    assert!(leads(&world.controller) != leads(&second), "both lead");
    if leads(&second) {
        std::mem::swap(&mut world.controller, &mut second);
    }
    // A node at the one that does not lead: the leader makes its object, the other says how it is.
    let credentials = world.join_at(second.address, "edge-a1", 1).await.unwrap();
    let agent = Agent::new(second.address, &credentials, None).await;
    let connected = |node: &Value| {
        node["status"]["connected"] == true && condition(node, "Joined")["status"] == "True"
    };
    let node = world.admin.wait("MeshNode", "", "edge-a1", connected).await;
    let said_by = node["status"]["controller"].clone();
    assert_ne!(said_by, lease["spec"]["holderIdentity"]);
    // It moves to the leader, and nobody says in between that it is gone.
    let moved = Agent::new(world.address(), &credentials, Some(agent)).await;
    let by_leader = |node: &Value| node["status"]["controller"] != said_by && connected(node);
    world.admin.wait("MeshNode", "", "edge-a1", by_leader).await;

    // The leader stalls: the other leads within the lease's time, and writes.
    run("kill", &["-STOP", &world.controller.pid()], "").unwrap();
    let stalled = Instant::now();
    until("the other leads", async || leads(&second).then_some(())).await;
    assert!(
        stalled.elapsed() < Duration::from_secs(20),
        "{:?}",
        stalled.elapsed()
    );
    world.join_at(second.address, "edge-b1", 2).await.unwrap();
    let made = |node: &Value| condition(node, "Joined")["status"] == "True";
    world.admin.wait("MeshNode", "", "edge-b1", made).await;
    run("kill", &["-CONT", &world.controller.pid()], "").unwrap();
    until("it knows", async || {
        (!leads(&world.controller)).then_some(())
    })
    .await;
    let taken = world
        .admin
        .wait("Lease", "holdfast", "holdfast-controller", held)
        .await;
    assert_ne!(
        taken["spec"]["holderIdentity"],
        lease["spec"]["holderIdentity"]
    );
    assert_eq!(taken["spec"]["leaseTransitions"], 1);
    drop(moved);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_embedded_store_had_becomes_shared_and_nothing_else_may_be() {
    let world = World::new().await;
    let credentials = world.join("edge-a1", 1).await.unwrap();
    let agent = world.agent(&credentials).await;
    let before = know(&world.controller, 1).await;
    // One with nothing would make a second authority, which no node knows.
    let said = world.refused_controller();
    assert!(
        said.contains("has another authority than ConfigMap holdfast-mesh"),
        "{said}"
    );

    let world = world.share();
    assert_eq!(know(&world.controller, 1).await, before);
    let second = world.another_controller();
    assert_eq!(know(&second, 1).await, before);
    // Who joined before is let in by both, and told only what differs.
    let agent = Agent::new(world.address(), &credentials, Some(agent)).await;
    let mut agent = Agent::new(second.address, &credentials, Some(agent)).await;
    assert!(!agent.told[0].full);
    world.join("edge-b1", 2).await.unwrap();
    agent.until(|view| view.contains_key("node edge-b1")).await;
    assert_eq!(know(&second, 2).await.len(), 2);
    let world = world.restart_controller();
    assert_eq!(know(&world.controller, 2).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_authority_s_key_is_in_one_secret_and_nothing_else_shows_it() {
    let (world, second) = World::with_two().await;
    let secret = world
        .admin
        .wait("Secret", "holdfast", "holdfast-authority", |_| true)
        .await;
    let key = secret["data"]["key"].as_str().unwrap();
    let key = STANDARD.decode(key).unwrap();
    let key = String::from_utf8(key).unwrap();
    let line = key.lines().nth(1).unwrap();
    world.join("edge-a1", 1).await.unwrap();
    for controller in [&world.controller, &second] {
        assert!(!controller.log().contains(line));
    }
    let maps = world.admin.objects("ConfigMap", "holdfast");
    let maps = maps.list(&kube::api::ListParams::default()).await.unwrap();
    assert!(maps.items.len() > 3);
    assert!(!serde_json::to_string(&maps.items).unwrap().contains(line));
    // Neither may it read what is others'.
    let used = world.standin.faults().used_rights();
    let secrets = used.iter().filter(|right| right.resource == "secrets");
    let verbs: BTreeSet<_> = secrets
        .filter(|right| right.user.contains("mesh-controller"))
        .map(|right| right.verb.as_str())
        .collect();
    assert_eq!(verbs, ["create", "get"].into());
}
