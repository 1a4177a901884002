//! What the controller signs, and what becomes of nodes when its store is set back to an older copy.

use std::fs;

use mesh_api::{
    admin::AcceptRollbackRequest,
    resources::{Resources, apply},
};
use tonic::Code;

use crate::lab::{Lab, head};

const RELAY: &str = "apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshRelay
metadata: {name: r1}
spec: {addresses: [192.0.2.1]}
";

#[tokio::test]
async fn every_answer_is_signed_for_what_the_node_has_with_it() {
    let lab = Lab::start(&[("relay.yaml", RELAY)]);
    let credentials = lab.node("edge-a1", 1).await;
    let (mut agent, full) = lab.sync(&credentials, None).await.unwrap();
    let mut resources = Resources::new();
    let mut made = 0;
    let mut check = |answer: mesh_api::control::SyncResponse| {
        let signed = answer.head.clone().unwrap();
        let head = signed.verify(credentials.authority()).unwrap();
        assert_eq!(apply(&mut resources, answer.clone()), []);
        assert_eq!(head.check(&resources), Ok(()));
        assert_eq!(
            (&head.store_id, head.generation, head.epoch),
            (&answer.store_id, answer.generation, 1)
        );
        assert!(head.made_unix_ms > made);
        made = head.made_unix_ms;
    };
    check(full);
    lab.write_manifest("relay.yaml", &RELAY.replace("192.0.2.1", "192.0.2.2"));
    check(agent.next().await.unwrap());
    lab.write_manifest("relay.yaml", "");
    check(agent.next().await.unwrap());
}

#[tokio::test]
async fn a_store_restored_from_a_backup_takes_nothing_from_nodes_until_an_operator_says_so() {
    let mut lab = Lab::start(&[("relay.yaml", RELAY)]);
    let credentials = lab.node("edge-a1", 1).await;
    assert!(lab.stop().success());
    let store = lab.path("state/controller.redb");
    let backup = fs::read(&store).unwrap();

    let lab = lab.start_again();
    lab.write_manifest("relay.yaml", &RELAY.replace("192.0.2.1", "192.0.2.2"));
    let (agent, had) = lab.sync(&credentials, None).await.unwrap();
    drop(agent);
    let mut lab = lab;
    assert!(lab.stop().success());
    fs::write(&store, backup).unwrap();

    // It counts the same generations again, with something else in them.
    let lab = lab.start_again();
    lab.write_manifest("relay.yaml", &RELAY.replace("192.0.2.1", "192.0.2.3"));
    while lab.status().await.generation < had.generation {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let refused = lab.sync(&credentials, Some(&had)).await.err().unwrap();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("accept-rollback"), "{refused}");
    let problems = lab.status().await.problems.join("\n");
    assert!(
        problems.contains("edge-a1") && problems.contains("accept-rollback"),
        "{problems}"
    );
    // Who has nothing of what was lost is served.
    let (agent, fresh) = lab.sync(&credentials, None).await.unwrap();
    drop(agent);
    assert_eq!(head(&fresh).epoch, 1);

    let accepted = lab
        .admin()
        .await
        .accept_rollback(AcceptRollbackRequest {})
        .await;
    assert_eq!(accepted.unwrap().into_inner().epoch, 2);
    let (agent, all) = lab.sync(&credentials, Some(&had)).await.unwrap();
    drop(agent);
    assert!(all.full && head(&all).epoch == 2 && head(&all).version() > head(&had).version());
    assert!(lab.status().await.problems.is_empty());

    // The word is on the disk.
    let lab = lab.restart();
    let (_agent, nothing) = lab.sync(&credentials, Some(&all)).await.unwrap();
    assert!(!nothing.full && nothing.set.is_empty());
    assert_eq!(head(&nothing).epoch, 2);
}
