//! Nodes of the cluster join by their pods' ServiceAccount tokens.

use tonic::Code;

use crate::{
    lab::{Agent, Applicant, condition, join},
    world::World,
};

#[tokio::test]
async fn a_node_joins_with_its_own_token_and_with_no_other() {
    let world = World::new().await;
    let refused = async |node: &str, token: &str, code: Code, expected: &str| {
        let applicant = Applicant {
            node,
            seed: 9,
            service_account_token: token,
        };
        let refusal = join(world.address(), &world.anchor().await, applicant).await;
        let refusal = refusal.unwrap_err();
        assert_eq!(refusal.code(), code, "{refusal}");
        assert!(refusal.message().contains(expected), "{refusal}");
        assert!(!refusal.message().contains(token), "{refusal}");
    };
    let token = world.token("mesh-agent", &["holdfast"], Some("edge-a1"));
    refused(
        "edge-b1",
        &token,
        Code::PermissionDenied,
        "bound to node edge-a1, not to edge-b1",
    )
    .await;
    let other = world.token("default", &["holdfast"], Some("edge-a1"));
    refused(
        "edge-a1",
        &other,
        Code::PermissionDenied,
        "is of system:serviceaccount:holdfast:default",
    )
    .await;
    let unbound = world.token("mesh-agent", &["holdfast"], None);
    refused(
        "edge-a1",
        &unbound,
        Code::PermissionDenied,
        "bound to no node",
    )
    .await;
    let audience = world.token("mesh-agent", &["elsewhere"], Some("edge-a1"));
    refused("edge-a1", &audience, Code::Unauthenticated, "does not know").await;
    // The API server's own audience is everybody's, and lets nobody in.
    let server = world.token("mesh-agent", &[], Some("edge-a1"));
    refused("edge-a1", &server, Code::Unauthenticated, "").await;
    refused(
        "edge-a1",
        "nonsense",
        Code::Unauthenticated,
        "does not know",
    )
    .await;
    assert_eq!(world.joined().await, [""; 0]);

    let credentials = world.join("edge-a1", 1).await.unwrap();
    world.agent(&credentials).await;
    assert_eq!(world.joined().await, ["edge-a1"]);
    // Its key is lost: the cluster still says that it is this node. The old one counts no more.
    let again = world.join("edge-a1", 2).await.unwrap();
    world.agent(&again).await;
    let log = world.controller.log();
    assert!(!log.contains(&token), "a token is in the log");
}

#[tokio::test]
async fn a_review_that_is_not_answered_is_no_refusal() {
    let world = World::new().await;
    let token = world.token("mesh-agent", &["holdfast"], Some("edge-a1"));
    let anchor = world.anchor().await;
    world.stop_api();
    let applicant = Applicant {
        node: "edge-a1",
        seed: 1,
        service_account_token: &token,
    };
    let refusal = join(world.address(), &anchor, applicant).await.unwrap_err();
    assert_eq!(refusal.code(), Code::Unavailable, "{refusal}");
    assert!(refusal.message().contains("cannot be asked"), "{refusal}");
}

#[tokio::test]
async fn where_joining_needs_approval_a_node_waits_for_it_and_keeps_it() {
    let world = World::new().await;
    world.join("edge-b1", 2).await.unwrap();
    world.admin.apply(MANUAL).await;
    world
        .admin
        .wait("MeshConfig", "", "default", |config| {
            condition(config, "Accepted")["status"] == "True"
        })
        .await;
    let refusal = world.join("edge-a1", 1).await.unwrap_err();
    assert_eq!(refusal.code(), Code::Unavailable, "{refusal}");
    assert!(refusal.message().contains("spec.approved"), "{refusal}");
    let problems = world.problems().await;
    assert!(
        problems
            .iter()
            .any(|one| one.starts_with("node edge-a1: waits for approval")),
        "{problems:?}"
    );
    let waiting =
        |node: &serde_json::Value| condition(node, "Joined")["reason"] == "AwaitingApproval";
    world.admin.wait("MeshNode", "", "edge-a1", waiting).await;

    // As an operator who may change the cluster does, and nobody on the controller's machine.
    let approve = async |names: &[&str]| {
        let arguments = [&["--json", "approve", "--cluster"], names].concat();
        world.meshctl(&arguments).await
    };
    let said = approve(&[]).await.unwrap();
    let [node] = said["nodes"].as_array().unwrap().as_slice() else {
        panic!("{said}");
    };
    assert_eq!(
        (&said["manual"], &node["name"]),
        (&true.into(), &"edge-a1".into())
    );
    let [request, since] = [&node["request"], &node["since_unix_s"]];
    assert!(
        request.as_str().is_some_and(|key| key.contains("key")) && since.is_i64(),
        "{said}"
    );
    // One name that is wrong lets nobody in: neither the others, nor who is in.
    for wrong in [&["edge-a1", "edge-c1"], &["edge-a1", "edge-b1"]] {
        let refused = approve(wrong).await.unwrap_err();
        let words = format!("no node {} waits for approval", wrong[1]);
        assert!(refused.contains(&words), "{refused}");
    }
    let node = world.admin.objects("MeshNode", "").get("edge-a1").await;
    assert_ne!(node.unwrap().data["spec"]["approved"], true);
    let said = approve(&["edge-a1"]).await.unwrap();
    assert_eq!(said["approved"][0]["name"], "edge-a1", "{said}");
    let said = approve(&[]).await.unwrap();
    assert_eq!(said["nodes"].as_array().map(Vec::len), Some(0), "{said}");
    let credentials =
        crate::lab::until("approved", async || world.join("edge-a1", 1).await.ok()).await;
    let mut agent = Agent::new(world.address(), &credentials, None).await;
    agent.until(|view| view.contains_key("node edge-a1")).await;
    let joined = |node: &serde_json::Value| {
        condition(node, "Joined")["status"] == "True" && node["status"]["connected"] == true
    };
    world.admin.wait("MeshNode", "", "edge-a1", joined).await;
    // Who is in stays in.
    world.join("edge-b1", 2).await.unwrap();
    let problems = world.problems().await;
    assert!(
        !problems.iter().any(|one| one.contains("approval")),
        "{problems:?}"
    );
}

const MANUAL: &str = "apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshConfig
metadata: {name: default}
spec: {joinApproval: manual}
";
