//! What agents are told, and how little.

use std::{collections::BTreeMap, time::Duration};

use mesh_api::{
    admin::ListNodesRequest,
    control::{Resource, SyncRequest, SyncResponse},
    convert::key,
    resources::{State, Trust},
};
use mesh_core::snapshot::Generation;
use prost::Message as _;
use tokio::time;
use tonic::Code;

use crate::lab::{Lab, PATIENCE};

const SHOP: &str = "apiVersion: v1
kind: Service
metadata: {name: inventory, namespace: shop}
spec: {clusterIP: 10.96.0.10, ports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: inventory-1, namespace: shop, labels: {kubernetes.io/service-name: inventory}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [100.96.0.1], nodeName: edge-a1}]
---
apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshNode
metadata: {name: edge-a1}
spec: {site: a, prefixes: [192.168.1.0/24]}
---
apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshRelay
metadata: {name: r1}
spec: {addresses: [192.0.2.1]}
";

#[tokio::test]
async fn a_new_agent_gets_everything_and_it_is_a_snapshot() {
    let lab = Lab::start(&[("shop.yaml", SHOP)]);
    let credentials = lab.node("edge-a1", 1).await;
    let (_agent, full) = lab.sync(&credentials, None).await.unwrap();
    assert!(full.full);
    let generation = Generation(full.generation);
    let mut state = State::new(credentials.authority().clone()).unwrap();
    assert_eq!(state.apply(full, Trust::Check), []);
    let snapshot = state.snapshot(generation).unwrap();
    let node = &snapshot.nodes["edge-a1"];
    assert_eq!(node.prefixes, ["192.168.1.0/24".parse().unwrap()]);
    assert_eq!((snapshot.services.len(), snapshot.slices.len()), (1, 1));
    let relay = snapshot.relays.values().next().unwrap();
    assert_eq!(
        (relay.quic_port, relay.stun_ports.as_slice()),
        (443, [443, 3478].as_slice())
    );
}

#[tokio::test]
async fn an_edited_manifest_sends_only_what_changed() {
    let lab = Lab::start(&[("shop.yaml", SHOP)]);
    let credentials = lab.node("edge-a1", 1).await;
    let (mut agent, full) = lab.sync(&credentials, None).await.unwrap();
    lab.write_manifest("shop.yaml", &SHOP.replace("port: 8080", "port: 9090"));
    let delta = agent.next().await.unwrap();
    assert!(!delta.full && delta.generation == full.generation + 1);
    assert_eq!(
        keys(&delta.set),
        ["endpoint slice shop/inventory/inventory-1"]
    );
    assert_eq!(delta.removed, []);
    // 160 of them are the signed head.
    assert!(delta.encoded_len() < 300, "{} bytes", delta.encoded_len());

    let (kept, _) = SHOP.rsplit_once("---").unwrap();
    lab.write_manifest("shop.yaml", &kept.replace("port: 8080", "port: 9090"));
    let delta = agent.next().await.unwrap();
    assert_eq!((keys(&delta.set), delta.removed.len()), (vec![], 1));
    assert_eq!(delta.removed[0].to_string(), "relay r1");

    let request = SyncRequest {
        store_id: delta.store_id,
        generation: delta.generation,
        ..SyncRequest::default()
    };
    agent.say.send(request).await.unwrap();
    lab.write_manifest(
        "more.yaml",
        &SHOP
            .replace("inventory", "orders")
            .replace("10.96.0.10", "10.96.0.11")
            .replace("MeshRelay", "MeshNode")
            .replace("{addresses: [192.0.2.1]}", "{}"),
    );
    agent.next().await.unwrap();
    let nodes = lab
        .admin()
        .await
        .list_nodes(ListNodesRequest {})
        .await
        .unwrap();
    let node = nodes.into_inner().nodes.remove(0);
    assert!(node.connected && node.generation == delta.generation);
    assert!(node.last_seen_unix_s > 0);
    // It goes, and it stays known since when it is away.
    drop(agent);
    let gone = time::timeout(PATIENCE, async {
        loop {
            let nodes = lab.admin().await.list_nodes(ListNodesRequest {}).await;
            let gone = nodes.unwrap().into_inner().nodes.remove(0);
            if !gone.connected {
                return gone;
            }
            time::sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(gone.await.unwrap().last_seen_unix_s >= node.last_seen_unix_s);
}

#[tokio::test]
async fn a_restart_costs_an_agent_that_has_everything_no_resource_at_all() {
    let lab = Lab::start(&[("shop.yaml", SHOP)]);
    let credentials = lab.node("edge-a1", 1).await;
    let (agent, full) = lab.sync(&credentials, None).await.unwrap();
    drop(agent);
    let lab = lab.restart();
    let (agent, nothing) = lab.sync(&credentials, Some(&full)).await.unwrap();
    let expected = SyncResponse {
        store_id: full.store_id.clone(),
        generation: full.generation,
        head: nothing.head.clone(),
        now_unix_s: nothing.now_unix_s,
        ..SyncResponse::default()
    };
    assert_eq!(nothing, expected);
    drop(agent);

    // Away while something changed, and the controller restarted again: only that comes.
    lab.write_manifest("shop.yaml", &SHOP.replace("port: 8080", "port: 9090"));
    let lab = lab.restart();
    let (_agent, delta) = lab.sync(&credentials, Some(&full)).await.unwrap();
    assert!(!delta.full);
    assert_eq!(
        keys(&delta.set),
        ["endpoint slice shop/inventory/inventory-1"]
    );

    let elsewhere = SyncResponse {
        store_id: vec![1; 16],
        ..full
    };
    let (_agent, all) = lab.sync(&credentials, Some(&elsewhere)).await.unwrap();
    assert!(all.full);
}

/// Three slices of 1,000 endpoints: 80 KB.
fn large(port: u16) -> String {
    let slice = |slice: u16| {
        let endpoints = (0..1_000).map(|number| {
            let address = format!("10.{slice}.{}.{}", number / 250, number % 250);
            format!("- {{addresses: [{address}], nodeName: edge-a1}}\n")
        });
        format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: large-{slice}, namespace: shop, \
             labels: {{kubernetes.io/service-name: inventory}}}}\naddressType: IPv4\nports: [{{name: http, port: {port}}}]\n\
             endpoints:\n{}",
            endpoints.collect::<String>()
        )
    };
    (1..=3).map(slice).collect()
}

#[tokio::test]
async fn a_stream_with_a_large_answer_ends_once_the_node_has_it_and_the_next_one_goes_on() {
    let lab = Lab::start(&[("shop.yaml", SHOP), ("large.yaml", &large(8080))]);
    let credentials = lab.node("edge-a1", 1).await;
    let (mut agent, full) = lab.sync(&credentials, None).await.unwrap();
    let acknowledge = |told: &SyncResponse| SyncRequest {
        store_id: told.store_id.clone(),
        generation: told.generation,
        ..SyncRequest::default()
    };
    assert!(full.full && full.encoded_len() > 64 << 10);
    agent.say.send(acknowledge(&full)).await.unwrap();
    agent.ended().await;

    let (mut agent, nothing) = lab.sync(&credentials, Some(&full)).await.unwrap();
    assert_eq!((nothing.full, nothing.set.len()), (false, 0));
    agent.say.send(acknowledge(&nothing)).await.unwrap();
    lab.write_manifest("large.yaml", &large(9090));
    let change = agent.next().await.unwrap();
    assert_eq!((change.full, change.set.len()), (false, 3));
    agent.say.send(acknowledge(&change)).await.unwrap();
    agent.ended().await;
}

#[tokio::test]
async fn a_node_that_joins_is_told_to_the_others_and_nothing_else_is() {
    let lab = Lab::start(&[("shop.yaml", SHOP)]);
    let first = lab.node("edge-a1", 1).await;
    let (mut agent, _) = lab.sync(&first, None).await.unwrap();
    lab.node("edge-b1", 2).await;
    let delta = agent.next().await.unwrap();
    assert_eq!(keys(&delta.set), ["node edge-b1"]);
}

#[tokio::test]
async fn a_node_has_one_stream_and_the_newest_counts() {
    let lab = Lab::start(&[]);
    let credentials = lab.node("edge-a1", 1).await;
    let (mut older, _) = lab.sync(&credentials, None).await.unwrap();
    let (_newer, _) = lab.sync(&credentials, None).await.unwrap();
    assert_eq!(older.next().await.unwrap_err().code(), Code::Aborted);
    assert_eq!(lab.status().await.agents_connected, 1);
}

#[tokio::test]
async fn a_broken_manifest_is_named_and_takes_nothing_away_not_even_by_a_restart() {
    let lab = Lab::start(&[("shop.yaml", SHOP)]);
    let credentials = lab.node("edge-a1", 1).await;
    let (mut agent, full) = lab.sync(&credentials, None).await.unwrap();
    let before = resources(&full);
    let broken = SHOP
        .replace("port: 80}", "port: http}")
        .replace("192.0.2.1", "192.0.2.2");
    lab.write_manifest("shop.yaml", &broken);
    let delta = agent.next().await.unwrap();
    assert_eq!(keys(&delta.set), ["relay r1"]);
    let problems = lab.status().await.problems;
    assert_eq!(problems.len(), 1, "{problems:?}");
    let expected = "shop.yaml:1: document 1: Service shop/inventory: spec.ports[0].port: invalid type: string \"http\", expected i32";
    assert!(problems[0].starts_with(expected), "{problems:?}");
    drop(agent);

    let lab = lab.restart();
    assert_eq!(lab.status().await.problems, problems);
    let (_agent, full) = lab.sync(&credentials, None).await.unwrap();
    let after = resources(&full);
    assert_eq!(
        after["service shop/inventory"],
        before["service shop/inventory"]
    );
    assert_eq!(after.len(), before.len());
    let said = lab.log().matches("problem in the desired state").count();
    assert_eq!(said, 1);
}

fn resources(response: &SyncResponse) -> BTreeMap<String, Resource> {
    let set = response.set.iter();
    set.map(|resource| (key(resource).unwrap().to_string(), resource.clone()))
        .collect()
}

fn keys(resources: &[Resource]) -> Vec<String> {
    let keys = resources.iter();
    keys.map(|resource| key(resource).unwrap().to_string())
        .collect()
}
