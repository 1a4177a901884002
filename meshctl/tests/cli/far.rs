//! The commands that look across the mesh.

use mesh_api::admin::Health;
use serde_json::json;

use crate::Lab;

#[tokio::test]
async fn another_node_s_agent_is_asked_wherever_the_option_stands() {
    let lab = Lab::start(Health::Ok).await;
    for command in ["--node edge-b1 status", "status --node edge-b1"] {
        let (code, status) = lab.json(command).await;
        assert_eq!((code, &status["node"]), (0, &json!("edge-b1")), "{command}");
    }
    assert_eq!(lab.json("status").await.1["node"], "edge-a1");
}

#[tokio::test]
async fn who_is_refused_is_told_why() {
    let lab = Lab::start(Health::Ok).await;
    for command in ["status", "health", "doctor"] {
        let (code, said) = lab.json(&format!("--node closed {command}")).await;
        let want = json!({ "error": { "kind": "denied", "message": "closed to edge-a1" } });
        assert_eq!((code, said), (2, want), "{command}");
    }
}

#[tokio::test]
async fn what_is_not_asked_of_an_agent_cannot_be_asked_of_another_node() {
    let lab = Lab::start(Health::Ok).await;
    for command in [
        "nodes",
        "token list",
        "controller status",
        "bugreport --out /nowhere/at/all",
        "install --check",
    ] {
        let ran = lab.run(&format!("--node edge-b1 {command}")).await;
        assert_eq!(ran.code, 64, "{command}: {}{}", ran.out, ran.err);
    }
    assert_eq!(lab.run("--node \u{e9}\u{7f} status").await.code, 64);
    // The option of a token is another one.
    let token = lab.run("token create --node edge-b1").await;
    assert_eq!(token.out, "secret-3600-1-edge-b1\n", "{}", token.err);
}

#[tokio::test]
async fn what_goes_on_without_a_controller_is_a_line_each() {
    let lab = Lab::start(Health::Ok).await;
    let (code, said) = lab.json("test connectivity --offline").await;
    let checks = said["checks"].as_array().unwrap();
    let what: Vec<_> = checks
        .iter()
        .map(|one| one["what"].as_str().unwrap())
        .collect();
    let want = [
        "snapshot",
        "certificate",
        "disk",
        "names",
        "services",
        "neighbours",
    ];
    assert_eq!(what, want);
    let services = json!({
        "what": "services",
        "name": "edge-a1",
        "verdict": "warning",
        "text": "they end with the agent: /sys/fs/bpf is no bpffs",
    });
    assert_eq!((code, &checks[4]), (1, &services), "{said}");
    assert_eq!(
        (&said["node"], &said["test"], &said["untried"]),
        (&json!("edge-a1"), &json!("offline"), &json!(0))
    );
}

#[tokio::test]
async fn questions_that_cannot_be_meant_are_wrong_usage() {
    let lab = Lab::start(Health::Ok).await;
    for command in [
        "mtu probe nobody",
        "mtu probe",
        "test connectivity --offline --encryption",
        "perf",
        "perf nobody",
        "perf edge-b1 --serve",
        "perf edge-b1 --time 2h",
        "capture --out /tmp/x --inside --outside",
        "capture --out /tmp/x --time 2h",
        "capture",
        "--node edge-b1 mtu probe edge-c1",
        "--node edge-b1 perf edge-c1",
        // Without a terminal.
        "top",
        "top --json",
    ] {
        let ran = lab.run(command).await;
        assert_eq!(ran.code, 64, "{command}: {}{}", ran.out, ran.err);
    }
}
