//! What is inside a node: programs and maps, routes, policy, keys. What the agent says, and what is made of it.

use mesh_api::admin::{self, Health};
use serde_json::{Value, json};
use tonic::Status;

use crate::Lab;

/// 2100-01-01: what ends then is not over.
const FAR_UNIX_S: i64 = 4_102_444_800;

/// With `Degraded`, somebody took a program away; of `Down`, nothing is attached.
pub(crate) fn bpf(health: Health, asked: admin::BpfRequest) -> admin::BpfResponse {
    let place = |at: &str, attached, pinned| admin::BpfPlace {
        at: at.to_owned(),
        attached,
        pinned,
    };
    let program = |name: &str, hook: &str, id, places| admin::BpfProgram {
        part: "services".to_owned(),
        name: name.to_owned(),
        hook: hook.to_owned(),
        id,
        tag: "00ff00ff00ff00ff".to_owned(),
        verified_instructions: 900,
        machine_bytes: 2000,
        runs: 4,
        run_ns: 1000,
        places,
    };
    let map = |name: &str, kind: &str, entries, entries_max| admin::BpfMap {
        name: name.to_owned(),
        id: 7,
        kind: kind.to_owned(),
        entries_max,
        entries: if asked.entries { entries } else { None },
        bytes: Some(1536),
    };
    let connect = match health {
        Health::Down => Vec::new(),
        Health::Ok | Health::Degraded | Health::Unspecified => {
            vec![place("/sys/fs/cgroup", true, Some(true))]
        }
    };
    let lan = place("lan0", health != Health::Degraded, Some(true));
    admin::BpfResponse {
        programs: vec![
            program("hf_connect4", "cgroup connect4", 11, connect),
            program("hf_requests", "tcx ingress", 12, vec![lan]),
            program("hf_leaving", "tcx egress", 13, Vec::new()),
        ],
        maps: vec![
            map("hf_frontends", "hash", Some(5), 131_072),
            map("hf_counters", "percpu_array", None, 16),
        ],
        counts_runs: false,
        parts: vec!["services".to_owned()],
        ..admin::BpfResponse::default()
    }
}

pub(crate) fn route(address: &str) -> admin::RouteResponse {
    let kernel = |interface: &str, source: &str| admin::KernelRoute {
        prefix: "100.96.0.0/12".to_owned(),
        interface: interface.to_owned(),
        source: source.to_owned(),
        table: 254,
        kind: "unicast".to_owned(),
        ..admin::KernelRoute::default()
    };
    let kernel = match address {
        "100.96.0.9" => kernel("eth0", "10.0.0.1"),
        _ => kernel("holdfast0", "100.96.0.1"),
    };
    admin::RouteResponse {
        kind: "node".to_owned(),
        by: format!("{address}/32"),
        node: "edge-b1".to_owned(),
        peer_state: "direct".to_owned(),
        path: "203.0.113.5:51820".to_owned(),
        rtt_ms: 41.2,
        interface: "holdfast0".to_owned(),
        source: "100.96.0.1".to_owned(),
        kernel: Some(kernel),
    }
}

/// Who asks for port 22 is denied, for 23 audited.
pub(crate) fn explain(
    asked: &admin::ExplainPolicyRequest,
) -> Result<admin::ExplainPolicyResponse, Status> {
    if asked.source == "nobody" {
        return Err(Status::not_found("there is no node nobody"));
    }
    let said =
        |way: &str, node: &str, direction: &str, verdict: &str, by: &str| admin::PolicyVerdict {
            way: way.to_owned(),
            from: "100.96.0.1".to_owned(),
            to: "100.96.0.3".to_owned(),
            node: node.to_owned(),
            direction: direction.to_owned(),
            verdict: verdict.to_owned(),
            by: by.to_owned(),
        };
    let (verdict, by) = match asked.port {
        22 => ("deny", "MeshPolicy no-ssh"),
        23 => ("audit", "MeshPolicy trial"),
        _ => ("allow", "defaultAction"),
    };
    Ok(admin::ExplainPolicyResponse {
        verdicts: vec![
            said("there", "edge-a1", "out", "allow", "defaultAction"),
            said("there", "edge-b1", "in", verdict, by),
            said("back", "edge-b1", "out", "allow", "defaultAction"),
        ],
        enforces: true,
    })
}

fn certificate(serial: &str) -> admin::CertificateReport {
    admin::CertificateReport {
        serial: serial.to_owned(),
        holder: "spiffe://demo/node/edge-a1".to_owned(),
        not_before_unix_s: 1_795_364_094,
        not_after_unix_s: FAR_UNIX_S,
        key_sha256: "ab".repeat(32),
    }
}

pub(crate) fn keys() -> admin::KeysResponse {
    admin::KeysResponse {
        node: "edge-a1".to_owned(),
        public_key: "KEY=".to_owned(),
        certificate: Some(certificate("0a")),
        authority: Some(certificate("01")),
        renew_at_unix_s: FAR_UNIX_S - 10,
        offline_limit_s: Some(30 * 86_400),
        peers: vec![
            admin::PeerKey {
                node: "edge-b1".to_owned(),
                public_key: "B=".to_owned(),
                session_ms: Some(61_000),
                external: false,
            },
            admin::PeerKey {
                node: "phone".to_owned(),
                public_key: "P=".to_owned(),
                session_ms: None,
                external: true,
            },
        ],
    }
}

pub(crate) fn rotated() -> admin::RotateKeyResponse {
    admin::RotateKeyResponse {
        before: Some(certificate("0a")),
        now: Some(certificate("0b")),
    }
}

#[tokio::test]
async fn programs_are_listed_with_their_places_and_one_that_is_gone_is_degraded() {
    let lab = Lab::start(Health::Ok).await;
    let (code, programs) = lab.json("bpf progs").await;
    let want = json!({
        "part": "services",
        "name": "hf_requests",
        "hook": "tcx ingress",
        "id": 12,
        "tag": "00ff00ff00ff00ff",
        "verified_instructions": 900,
        "machine_bytes": 2000,
        "runs": 4,
        "run_ns": 1000,
        "places": [{ "at": "lan0", "attached": true, "pinned": true }],
    });
    assert_eq!((code, &programs["programs"][1]), (0, &want));
    assert_eq!(programs["counts_runs"], json!(false));
    let want = "\
PART      PROGRAM      HOOK             AT                       ID  TAG               VERIFIED  RUNS  EACH
services  hf_connect4  cgroup connect4  /sys/fs/cgroup (pinned)  11  00ff00ff00ff00ff  900       4     250 ns
services  hf_requests  tcx ingress      lan0 (pinned)            12  00ff00ff00ff00ff  900       4     250 ns
services  hf_leaving   tcx egress       -                        13  00ff00ff00ff00ff  900       4     250 ns

runs are not counted: `sysctl kernel.bpf_stats_enabled=1`, for a while
";
    assert_eq!(lab.run("bpf progs").await.out, want);
    let gone = Lab::start(Health::Degraded).await.run("bpf progs").await;
    assert_eq!(gone.code, 1);
    assert!(gone.out.contains("lan0 (not attached)"), "{}", gone.out);
}

#[tokio::test]
async fn maps_are_listed_with_how_full_they_are() {
    let lab = Lab::start(Health::Ok).await;
    let want = json!({ "maps": [
        { "name": "hf_frontends", "id": 7, "kind": "hash", "entries": 5, "entries_max": 131_072, "bytes": 1536 },
        { "name": "hf_counters", "id": 7, "kind": "percpu_array", "entries": null, "entries_max": 16, "bytes": 1536 },
    ]});
    assert_eq!(lab.json("bpf maps").await, (0, want));
    let want = "\
MAP           KIND          ENTRIES  MAX     FULL  MEMORY   ID
hf_frontends  hash          5        131072  0 %   1.5 KiB  7
hf_counters   percpu_array  -        16      -     1.5 KiB  7

3.0 KiB in all
";
    assert_eq!(lab.run("bpf maps").await.out, want);
}

#[tokio::test]
async fn the_kernel_and_the_places_of_programs_are_checked_together() {
    let of = |document: &Value, name: &str| -> Value {
        let checks = document["checks"].as_array().unwrap();
        let found = checks.iter().find(|check| check["name"] == name);
        found.unwrap()["level"].clone()
    };
    for (health, level) in [
        (Health::Ok, "ok"),
        (Health::Degraded, "error"),
        (Health::Down, "error"),
    ] {
        let (code, document) = Lab::start(health).await.json("bpf check").await;
        assert_eq!(of(&document, "services"), json!(level), "{document}");
        assert_eq!(of(&document, "policy"), json!("ok"));
        assert_eq!(of(&document, "BTF"), json!("ok"));
        if level == "error" {
            assert_eq!(code, 2);
        }
    }
}

#[tokio::test]
async fn a_route_is_told_with_the_kernel_s_own_and_another_one_is_degraded() {
    let lab = Lab::start(Health::Ok).await;
    let want = json!({
        "address": "100.96.0.3",
        "kind": "node",
        "by": "100.96.0.3/32",
        "node": "edge-b1",
        "peer_state": "direct",
        "path": "203.0.113.5:51820",
        "rtt_ms": 41.2,
        "interface": "holdfast0",
        "source": "100.96.0.1",
        "kernel": {
            "prefix": "100.96.0.0/12",
            "interface": "holdfast0",
            "source": "100.96.0.1",
            "gateway": null,
            "table": 254,
            "kind": "unicast",
        },
        "kernel_problem": null,
        "differs": null,
    });
    assert_eq!(lab.json("routes get 100.96.0.3").await, (0, want));
    let want = "\
address   100.96.0.3
is        node edge-b1
known by  100.96.0.3/32
path      direct, by 203.0.113.5:51820, 41.2 ms
mesh      by holdfast0, from 100.96.0.1
kernel    by holdfast0, from 100.96.0.1
          unicast 100.96.0.0/12, table 254
";
    assert_eq!(lab.run("routes get 100.96.0.3").await.out, want);
    let other = lab.run("routes get 100.96.0.9").await;
    assert_eq!(other.code, 1);
    assert!(
        other
            .out
            .contains("packets leave by eth0, not by holdfast0"),
        "{}",
        other.out
    );
    assert_eq!(lab.run("routes get edge-b1").await.code, 64);
}

#[tokio::test]
async fn policy_is_explained_side_by_side_and_a_denial_is_the_exit_code() {
    let lab = Lab::start(Health::Ok).await;
    let side = |way: &str, node: &str, direction: &str, verdict: &str, by: &str| {
        json!({
            "way": way, "from": "100.96.0.1", "to": "100.96.0.3", "node": node,
            "direction": direction, "verdict": verdict, "by": by,
        })
    };
    let want = json!({
        "source": "edge-a1",
        "destination": "edge-b1",
        "protocol": "TCP",
        "port": 22,
        "verdict": "deny",
        "by": "MeshPolicy no-ssh",
        "back": { "verdict": "allow", "by": "defaultAction" },
        "enforced_here": true,
        "sides": [
            side("there", "edge-a1", "out", "allow", "defaultAction"),
            side("there", "edge-b1", "in", "deny", "MeshPolicy no-ssh"),
            side("back", "edge-b1", "out", "allow", "defaultAction"),
        ],
    });
    assert_eq!(
        lab.json("policy explain edge-a1 edge-b1:22").await,
        (2, want)
    );
    let want = "\
edge-a1 to edge-b1, TCP 22: denied by MeshPolicy no-ssh
the other way: allowed by defaultAction

WAY    FROM        TO          AT NODE  AS   VERDICT  BY
there  100.96.0.1  100.96.0.3  edge-a1  out  allow    defaultAction
there  100.96.0.1  100.96.0.3  edge-b1  in   deny     MeshPolicy no-ssh
back   100.96.0.1  100.96.0.3  edge-b1  out  allow    defaultAction
";
    assert_eq!(lab.run("policy explain edge-a1 edge-b1:22").await.out, want);
    for (words, code) in [
        ("edge-a1 edge-b1:23", 1),
        ("edge-a1 edge-b1:24 --protocol udp", 0),
        ("edge-a1 edge-b1", 0),
        ("edge-a1 edge-b1 --protocol tcp", 64),
        ("nobody edge-b1:22", 64),
        ("edge-a1", 64),
    ] {
        let ran = lab.run(&format!("policy explain {words}")).await;
        assert_eq!(ran.code, code, "{words}: {}{}", ran.out, ran.err);
    }
}

#[tokio::test]
async fn keys_are_listed_by_their_public_halves_and_dates() {
    let lab = Lab::start(Health::Ok).await;
    let certificate = |serial: &str| {
        json!({
            "serial": serial,
            "holder": "spiffe://demo/node/edge-a1",
            "not_before_unix_s": 1_795_364_094,
            "not_after_unix_s": FAR_UNIX_S,
            "key_sha256": "ab".repeat(32),
        })
    };
    let want = json!({
        "node": "edge-a1",
        "public_key": "KEY=",
        "certificate": certificate("0a"),
        "authority": certificate("01"),
        "renew_at_unix_s": FAR_UNIX_S - 10,
        "peers": [
            { "node": "edge-b1", "public_key": "B=", "session_ms": 61_000, "external": false },
            { "node": "phone", "public_key": "P=", "session_ms": null, "external": true },
        ],
    });
    assert_eq!(lab.json("keys list").await, (0, want));
    let text = lab.run("keys list").await.out;
    let want = "\
node         edge-a1
WireGuard    KEY=
certificate  spiffe://demo/node/edge-a1
             serial 0a
             from 2026-11-22 16:14:54 UTC until 2100-01-01 00:00:00 UTC
             key SHA-256 abababababababababababababababababababababababababababababababab
             renewed at 2099-12-31 23:59:50 UTC
";
    assert!(text.starts_with(want), "{text}");
    let want = "\
PEER     KIND    PUBLIC KEY  SESSION'S AGE
edge-b1  node    B=          1m 1s
phone    device  P=          -
";
    assert!(text.ends_with(want), "{text}");

    let (code, expiry) = lab.json("keys expiry").await;
    let ends = expiry["ends"].as_array().unwrap();
    let whats: Vec<_> = ends.iter().filter_map(|end| end["what"].as_str()).collect();
    assert_eq!(
        (code, whats),
        (0, vec!["renewal", "certificate", "authority"])
    );
    assert!(ends[0]["left_s"].as_i64().unwrap() > 0);
    assert_eq!(ends[1]["at_unix_s"], json!(FAR_UNIX_S));
    assert_eq!(expiry["offline_limit_s"], json!(30 * 86_400));

    let want = json!({ "before": certificate("0a"), "now": certificate("0b") });
    assert_eq!(lab.json("keys rotate").await, (0, want));
    let refused = Lab::start(Health::Down).await.run("keys rotate").await;
    assert_eq!(refused.code, 2);
    let revoked = json!({ "removed": "edge-a1", "address_rests_until_unix_s": 99 });
    assert_eq!(lab.json("keys revoke edge-a1").await, (0, revoked));
    assert_eq!(lab.run("keys revoke edge-z9").await.code, 64);
}
