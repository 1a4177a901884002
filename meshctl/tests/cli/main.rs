//! The real binary against daemons that say what the test wants.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may fail loudly, and its helpers too"
)]

mod daemons;
mod diagnosis;
mod far;
mod inside;
mod names;

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use mesh_api::{
    admin::{
        self, agent_admin_server::AgentAdminServer, controller_admin_server::ControllerAdminServer,
    },
    serve::AdminSocket,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{net::UnixListener, process::Command};
use tonic::transport::Server;

use crate::daemons::{Agent, Controller, texts};

/// Daemons on sockets of their own; they end with the test's runtime.
struct Lab {
    folder: TempDir,
}

struct Ran {
    code: i32,
    out: String,
    err: String,
}

impl Lab {
    fn empty() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { folder }
    }

    async fn start(health: admin::Health) -> Self {
        let lab = Self::empty();
        let agent = AdminSocket::bind(&lab.agent()).await.unwrap();
        let controller = AdminSocket::bind(&lab.controller()).await.unwrap();
        let agent_server = Server::builder().add_service(AgentAdminServer::new(Agent { health }));
        let problem = "shop.yaml, document 2: spec.prots: no such field";
        let mut problems = texts(&[problem]);
        problems.retain(|_| health != admin::Health::Ok);
        let controller_service = ControllerAdminServer::new(Controller { problems });
        let controller_server = Server::builder().add_service(controller_service);
        tokio::spawn(agent_server.serve_with_incoming(agent));
        tokio::spawn(controller_server.serve_with_incoming(controller));
        lab
    }

    fn agent(&self) -> PathBuf {
        self.folder.path().join("agent.sock")
    }

    fn controller(&self) -> PathBuf {
        self.folder.path().join("controller.sock")
    }

    async fn run(&self, arguments: &str) -> Ran {
        let output = Command::new(env!("CARGO_BIN_EXE_meshctl"))
            .args(arguments.split_whitespace())
            .arg("--socket")
            .arg(self.agent())
            .arg("--controller-socket")
            .arg(self.controller())
            .output();
        let output = output.await.unwrap();
        Ran {
            code: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    async fn json(&self, arguments: &str) -> (i32, Value) {
        let ran = self.run(&format!("{arguments} --json")).await;
        let document = serde_json::from_str(&ran.out);
        let document = document.unwrap_or_else(|error| panic!("{error}: {}{}", ran.out, ran.err));
        (ran.code, document)
    }
}

#[tokio::test]
async fn status_is_shown_and_is_the_exit_code() {
    for (health, name, code) in [
        (admin::Health::Ok, "ok", 0),
        (admin::Health::Degraded, "degraded", 1),
        (admin::Health::Unspecified, "degraded", 1),
        (admin::Health::Down, "down", 2),
    ] {
        let lab = Lab::start(health).await;
        let (json_code, status) = lab.json("status").await;
        assert_eq!((json_code, status["health"].as_str()), (code, Some(name)));
        assert_eq!(lab.run("status").await.code, code);
    }
}

#[tokio::test]
async fn status_has_a_stable_form_for_machines() {
    let lab = Lab::start(admin::Health::Ok).await;
    let want = json!({
        "node": "edge-a1",
        "public_key": "KEY=",
        "version": "0.1.0",
        "health": "ok",
        "problems": ["relay r2 is down"],
        "site": "a",
        "interface": "holdfast0",
        "overlay_addresses": ["100.96.0.1", "fd00::1"],
        "local_addresses": ["192.168.7.1:51820"],
        "reflexive_addresses": ["203.0.113.5:40000"],
        "nat": "port_restricted",
        "uptime_ms": 90_061_000,
        "controller": { "address": "cloud:7440", "connected": true, "asked_in_s": null },
        "snapshot": {
            "generation": 42, "age_s": 3, "standing": "warned", "left_s": 7200, "nodes": 5, "services": 7,
        },
        "relays": [
            { "name": "r1", "transport": "quic", "home": true, "rtt_ms": 20.5, "problem": null },
            { "name": "r2", "transport": null, "home": false, "rtt_ms": null, "problem": "refused" },
        ],
        "peers": { "direct": 3, "relayed": 1 },
        "dns_listen": ["169.254.53.53:53"],
        "drops": { "no_route": 2, "malformed": 0 },
        "service_interfaces": { "lan0": true, "lan1": false },
        "service_packets": { "flow_opened": 2, "hairpin": 0 },
        "policy_enforced": true,
        "policy_packets": { "passed": 3, "denied": 1 },
        "policy_events": ["denied by defaultAction: TCP 100.96.0.2:40000 to 100.96.0.1:22, in"],
        "services_unkept": "/sys/fs/bpf is no bpffs",
        "certificate_expires_unix_s": null,
        "proxy": { "open": 1, "refused": 4, "failed": 0 },
        "uplinks": [
            { "interface": "eth0", "used": true, "up": true, "metered": false, "weight": 65435 },
            { "interface": "wwan0", "used": false, "up": false, "metered": true, "weight": 7 },
        ],
        "transitions": { "peer relayed direct": 3, "path probing standby": 5 },
        "port_mappings": { "192.168.7.254": "203.0.113.5:51820 by PCP" },
        "lan_announcements": { "sent": 3, "forged": 0 },
    });
    assert_eq!(lab.json("status").await, (0, want));
}

#[tokio::test]
async fn status_reads_well() {
    let lab = Lab::start(admin::Health::Ok).await;
    let want = "\
node        edge-a1 (0.1.0)
health      ok
            relay r2 is down
public key  KEY=
up          1d 1h
site        a
overlay     100.96.0.1, fd00::1
interface   holdfast0
uplinks     eth0 (used), wwan0 (metered) (no carrier)
local       192.168.7.1:51820
seen as     203.0.113.5:40000
NAT         port_restricted
mapped      192.168.7.254: 203.0.113.5:51820 by PCP
LAN         announcements: 3 sent
controller  cloud:7440, connected
snapshot    generation 42, 3s old: 5 nodes, 7 services
peers       3 direct, 1 relayed
DNS         169.254.53.53:53
serves      lan0, lan1 (not attached)
served      2 flow_opened
not kept    services: /sys/fs/bpf is no bpffs
proxy       1 open, 4 refused
policy      enforced
judged      1 denied, 3 passed
            denied by defaultAction: TCP 100.96.0.2:40000 to 100.96.0.1:22, in
drops       2 no_route

RELAY  STATE  HOME  RTT      PROBLEM
r1     quic   home  20.5 ms
r2     down         -        refused
";
    assert_eq!(lab.run("status").await.out, want);
}

#[tokio::test]
async fn peers_are_listed_and_a_lost_one_is_degraded() {
    let lab = Lab::start(admin::Health::Ok).await;
    let (code, peers) = lab.json("peers").await;
    assert_eq!(code, 1, "edge-c1 is unreachable, edge-b1 is not");
    let want = json!({
        "name": "edge-b1",
        "public_key": "B=",
        "site": "b",
        "overlay_addresses": ["100.96.0.3"],
        "state": "direct",
        "reason": null,
        "path": "203.0.113.5:51820",
        "rtt_ms": 41.2,
        "sent_bytes": 1536,
        "received_bytes": 10,
        "last_received_ms": 1200,
        "last_handshake_ms": 60_000,
        "external": false,
    });
    assert_eq!(peers["peers"][0], want);
    assert_eq!(peers["peers"][1]["last_received_ms"], Value::Null);
    let want = "\
PEER     SITE  STATE        PATH               RTT      SENT     RECEIVED  LAST HEARD  REASON
edge-b1  b     direct       203.0.113.5:51820  41.2 ms  1.5 KiB  10 B      1s ago
edge-c1  -     unreachable  -                  -        0 B      0 B       never       peer_offline
";
    assert_eq!(lab.run("peers").await.out, want);
}

#[tokio::test]
async fn ping_counts_what_comes_back() {
    let lab = Lab::start(admin::Health::Ok).await;
    let (code, all) = lab.json("ping edge-b1 -c 2 -i 10").await;
    let want = json!({
        "target": "edge-b1",
        "via": null,
        "until_direct": null,
        "sent": 2,
        "received": 2,
        "min_ms": 10.0,
        "avg_ms": 15.0,
        "max_ms": 20.0,
        "replies": [
            { "sequence": 1, "rtt_ms": 10.0, "path": "relay r1 (quic)", "kind": "relay" },
            { "sequence": 2, "rtt_ms": 20.0, "path": "203.0.113.5:51820", "kind": "direct" },
        ],
    });
    assert_eq!((code, all), (0, want));
    let (code, some) = lab.json("ping lossy -c 2").await;
    assert_eq!((code, &some["received"]), (1, &json!(1)));
    let (code, none) = lab.json("ping gone -c 2").await;
    assert_eq!((code, &none["avg_ms"]), (2, &Value::Null));

    let want = "\
edge-b1 1: 10.0 ms by relay r1 (quic)
edge-b1 2: 20.0 ms by direct UDP 203.0.113.5:51820
2 of 2 answered, min 10.0 ms, avg 15.0 ms, max 20.0 ms
";
    assert_eq!(lab.run("ping edge-b1 -c 2").await.out, want);
}

#[tokio::test]
async fn ping_until_direct_ends_at_the_first_direct_echo_or_says_first_why_there_is_none() {
    let lab = Lab::start(admin::Health::Ok).await;
    let (code, mut found) = lab.json("ping edge-b1 --until-direct").await;
    assert!(found["until_direct"]["after_ms"].take().is_u64());
    let want = json!({ "direct": true, "after_ms": null, "reason": null, "explanation": null });
    assert_eq!((code, &found["until_direct"]), (0, &want));
    assert_eq!(found["sent"], 2, "the rest is not waited for");
    let ran = lab.run("ping edge-b1 --until-direct").await;
    let first = ran.out.lines().next().unwrap();
    assert!(first.starts_with("direct after "), "{first}");
    assert!(
        first.ends_with(" s by direct UDP 203.0.113.5:51820"),
        "{first}"
    );
    assert!(
        ran.err.contains("edge-b1 1: 10.0 ms by relay r1 (quic)\n"),
        "{}",
        ran.err
    );

    let (code, mut none) = lab.json("ping edge-c1 --until-direct -c 3").await;
    assert!(none["until_direct"]["after_ms"].take().is_u64());
    let want = json!({
        "direct": false,
        "after_ms": null,
        "reason": "hard_nat_one",
        "explanation": "its NAT maps by destination",
    });
    assert_eq!((code, &none["until_direct"]), (1, &want));
    assert_eq!(none["received"], 3);
    let out = lab.run("ping edge-c1 --until-direct -c 3").await.out;
    let first = out.lines().next().unwrap();
    assert!(first.starts_with("not direct after "), "{first}");
    assert!(
        first.ends_with(" s: its NAT maps by destination"),
        "{first}"
    );
    assert_eq!(lab.run("ping gone --until-direct -c 3").await.code, 2);
}

#[tokio::test]
async fn ping_by_a_certain_path_asks_for_it() {
    let lab = Lab::start(admin::Health::Ok).await;
    let (code, by_relay) = lab.json("ping edge-b1 --via relay -c 2").await;
    assert_eq!((code, &by_relay["via"]), (0, &json!("relay")));
    assert_eq!(by_relay["replies"][1]["kind"], "relay");
    let (code, error) = lab.json("ping edge-b1 --via relay:r9").await;
    assert_eq!(
        (code, &error["error"]["message"]),
        (64, &json!("no relay r9, but r1, r2"))
    );
    for wrong in ["--via relay --until-direct", "-c 0", "-c 1001"] {
        assert_eq!(
            lab.run(&format!("ping edge-b1 {wrong}")).await.code,
            64,
            "{wrong}"
        );
    }
}

#[tokio::test]
async fn path_why_gives_the_reason() {
    let lab = Lab::start(admin::Health::Ok).await;
    let want = json!({
        "node": "edge-c1",
        "state": "relayed",
        "reason": "hard_nat_one",
        "explanation": "its NAT maps by destination",
        "own_nat": "port_restricted",
        "peer_nat": "symmetric",
        "paths": [{
            "path": "relay r1 (quic)",
            "kind": "relay",
            "state": "primary",
            "rtt_ms": 44.0,
            "loss": 0.01,
            "probes_sent": 100,
            "probes_answered": 99,
            "full_size_ok": true,
        }],
        "transitions": [
            { "ago_ms": 62_000, "from": "candidate", "to": "primary", "reason": "taken", "path": "relay r1 (quic)" },
            { "ago_ms": 61_000, "from": "waking", "to": "relayed", "reason": "handshake_done", "path": null },
        ],
        "next_attempt_ms": 4200,
    });
    assert_eq!(lab.json("path why edge-c1").await, (0, want));
    let want = "\
node          edge-c1
state         relayed
reason        hard_nat_one
              its NAT maps by destination
own NAT       port_restricted
its NAT       symmetric
next attempt  in 5s

PATH             KIND   STATE    RTT      LOSS   PROBES  FULL SIZE
relay r1 (quic)  relay  primary  44.0 ms  1.0 %  99/100  yes

WHEN       CHANGE                REASON          PATH
1m 2s ago  candidate -> primary  taken           relay r1 (quic)
1m 1s ago  waking -> relayed     handshake_done  -
";
    assert_eq!(lab.run("path why edge-c1").await.out, want);
}

#[tokio::test]
async fn services_show_where_flows_go() {
    let lab = Lab::start(admin::Health::Ok).await;
    let (code, services) = lab.json("services").await;
    assert_eq!(
        code, 1,
        "shop/lost has a ready endpoint that nobody reaches"
    );
    let want = json!({
        "namespace": "shop",
        "name": "inventory",
        "kind": "ClusterIP",
        "cluster_ips": ["10.43.0.10"],
        "ports": ["http 80/TCP"],
        "endpoints": [
            endpoint_json("10.2.3.1:8080", json!("edge-b1"), "same-site", true, true),
            endpoint_json("10.9.9.9:8080", Value::Null, "anywhere", true, false),
        ],
    });
    assert_eq!(services["services"][0], want);
    assert_eq!(lab.json("services --endpoints").await, (1, services));
    let want = "\
SERVICE         KIND       ADDRESSES   PORTS        ENDPOINTS     GOES TO
shop/inventory  ClusterIP  10.43.0.10  http 80/TCP  2 ready of 2  1 same-site
shop/lost       Headless                            1 ready of 1  -
shop/new        ClusterIP  10.43.0.11               0 ready of 0  -
";
    assert_eq!(lab.run("services").await.out, want);
    let want = "\
SERVICE         ENDPOINT       NODE     TIER       READY  ALIVE  CHOSEN
shop/inventory  10.2.3.1:8080  edge-b1  same-site  yes    yes    yes
shop/inventory  10.9.9.9:8080  -        anywhere   yes    yes    ejected
shop/lost       10.2.4.1       edge-c1  anywhere   yes    no     full
shop/new        -
";
    assert_eq!(lab.run("services --endpoints").await.out, want);
}

fn endpoint_json(address: &str, node: Value, tier: &str, alive: bool, chosen: bool) -> Value {
    json!({
        "address": address,
        "node": node,
        "tier": tier,
        "ready": true,
        "alive": alive,
        "chosen": chosen,
        "ejected": address == "10.9.9.9:8080",
        "full": address == "10.2.4.1",
    })
}

#[tokio::test]
async fn dns_query_tells_answers_from_none_and_from_failure() {
    let lab = Lab::start(admin::Health::Ok).await;
    let want = json!({
        "name": "edge-a1.mesh",
        "type": "AAAA",
        "code": "NOERROR",
        "answers": ["edge-a1.mesh. 5 IN AAAA fd00::1"],
        "ms": 0.4,
        "server": "169.254.53.53:53",
    });
    assert_eq!(
        lab.json("dns query edge-a1.mesh --type aaaa").await,
        (0, want)
    );
    assert_eq!(lab.json("dns query nxdomain").await.0, 1);
    assert_eq!(lab.json("dns query servfail").await.0, 2);
    let want = "edge-a1.mesh. 5 IN A fd00::1\nNOERROR from 169.254.53.53:53 in 0.40 ms\n";
    assert_eq!(lab.run("dns query edge-a1.mesh").await.out, want);

    let (_, name) = lab.json("dns query 100.96.0.1").await;
    assert_eq!(
        (&name["name"], &name["type"]),
        (&json!("1.0.96.100.in-addr.arpa"), &json!("PTR"))
    );
    for (name, hints) in [
        ("nxdomain", &["nothing is put behind it"][..]),
        (
            "servfail",
            &["nothing is put behind it", "`meshctl dns status`"],
        ),
    ] {
        let out = lab.run(&format!("dns query {name}")).await.out;
        assert_eq!(out.lines().count(), 1 + hints.len(), "{out}");
        assert!(hints.iter().all(|hint| out.contains(hint)), "{out}");
    }
}

#[tokio::test]
async fn a_token_goes_to_standard_output_alone() {
    let lab = Lab::start(admin::Health::Ok).await;
    let created = lab
        .run("token create --ttl 2h --uses 3 --node edge-b1")
        .await;
    assert_eq!(
        (created.code, created.out.as_str()),
        (0, "secret-7200-3-edge-b1\n")
    );
    assert!(
        created.err.contains("token t1 holds for 2h"),
        "{}",
        created.err
    );
    let want = json!({ "token": "secret-3600-1-", "id": "t1", "expires_unix_s": 99 });
    assert_eq!(lab.json("token create").await, (0, want));

    let want = json!({ "tokens": [
        { "id": "t1", "description": "rack 4", "expires_unix_s": 99, "uses_left": 2, "node": null },
        { "id": "t2", "description": "rack 4", "expires_unix_s": 99, "uses_left": 0, "node": "edge-c" },
    ]});
    assert_eq!(lab.json("token list").await, (0, want));
    let want = "ID  HOLDS    USES LEFT  NODE    DESCRIPTION\n\
        t1  expired  2          any     rack 4\n\
        t2  expired  used up    edge-c  rack 4\n";
    assert_eq!(lab.run("token list").await.out, want);
    assert_eq!(
        lab.json("token revoke t1").await,
        (0, json!({ "revoked": "t1" }))
    );
    let whole = lab.json("token revoke hf1.demo.example.t1.SECRET.abcd");
    assert_eq!(whole.await, (0, json!({ "revoked": "t1" })));
    let wrong = lab.run("token revoke t9").await;
    assert_eq!(
        (wrong.code, wrong.err.as_str()),
        (64, "meshctl: no token t9\n")
    );
}

#[tokio::test]
async fn who_waits_is_shown_and_let_in_by_name() {
    let lab = Lab::start(admin::Health::Ok).await;
    let want = json!({ "manual": true, "nodes": [
        { "name": "edge-c", "since_unix_s": 99, "request": "key KEY= from 203.0.113.7",
          "public_key": "KEY=", "address": "203.0.113.7" },
    ]});
    assert_eq!(lab.json("approve").await, (0, want));
    let shown = lab.run("approve --watch 0.1 --rounds 2").await;
    assert_eq!(
        shown.out.matches("NODE    WAITS").count(),
        2,
        "{}",
        shown.out
    );
    let want = json!({ "approved": [{ "name": "edge-c", "file": "nodes.yaml" }] });
    assert_eq!(lab.json("approve edge-c").await, (0, want));
    let wrong = lab.run("approve edge-c edge-d").await;
    assert_eq!(
        (wrong.code, wrong.err.as_str()),
        (64, "meshctl: no node edge-d waits\n")
    );
    assert_eq!(lab.run("approve edge-c --watch").await.code, 64);
}

#[tokio::test]
async fn nodes_and_the_controller_are_shown() {
    let lab = Lab::start(admin::Health::Ok).await;
    let (code, mut nodes) = lab.json("nodes").await;
    let want = json!({
        "name": "edge-a1",
        "public_key": "KEY=",
        "overlay_addresses": ["100.96.0.1", "fd00::1"],
        "site": "a",
        "connected": true,
        "generation": 42,
        "last_seen_unix_s": 99,
    });
    assert_eq!((code, nodes["nodes"][0].take()), (0, want));
    assert_eq!(nodes["nodes"][2]["last_seen_unix_s"], Value::Null);
    let text = lab.run("nodes").await.out;
    for (node, shown) in [
        ("edge-a1", "yes        now "),
        ("edge-a2", "no         1h ago "),
        ("edge-a3", "no         - "),
    ] {
        let line = text.lines().find(|line| line.starts_with(node)).unwrap();
        assert!(line.contains(shown), "{line}");
    }
    let want = json!({ "removed": "edge-a1", "address_rests_until_unix_s": 99 });
    assert_eq!(lab.json("node remove edge-a1").await, (0, want));
    let wrong = lab.run("node remove edge-z9").await;
    assert_eq!(
        (wrong.code, wrong.err.as_str()),
        (64, "meshctl: no node edge-z9\n")
    );
    let want = json!({
        "trust_domain": "demo",
        "mesh_id": "abcd",
        "generation": 42,
        "nodes": 5,
        "agents_connected": 4,
        "serves": true,
        "leads": false,
        "problems": [],
    });
    assert_eq!(lab.json("controller status").await, (0, want));

    let troubled = Lab::start(admin::Health::Degraded).await;
    let shown = troubled.run("controller status").await;
    assert_eq!(shown.code, 1);
    assert!(
        shown
            .out
            .contains("problems    shop.yaml, document 2: spec.prots"),
        "{}",
        shown.out
    );
}

#[tokio::test]
async fn an_older_state_counts_again_by_an_operator_s_word_alone() {
    let lab = Lab::start(admin::Health::Ok).await;
    let accepted = lab.json("controller accept-rollback").await;
    assert_eq!(accepted, (0, json!({ "epoch": 2 })));
    let text = lab.run("controller accept-rollback").await.out;
    assert!(text.contains("epoch 2"), "{text}");
}

#[tokio::test]
async fn a_relay_gets_its_files_and_keeps_its_key_secret() {
    let lab = Lab::start(admin::Health::Ok).await;
    let folder = lab.folder.path().join("new").join("r1");
    let issue = format!("relay issue r1 --out {}", folder.display());
    let (code, files) = lab.json(&issue).await;
    assert_eq!(code, 0);
    for (field, name, text, mode) in [
        ("certificate", "relay.pem", "certificate of r1\n", 0o644),
        ("key", "relay.key", "key of r1\n", 0o600),
        ("ca", "ca.pem", "ca\n", 0o644),
    ] {
        let path = folder.join(name);
        assert_eq!(files[field], json!(path.display().to_string()));
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        assert_eq!(mode_of(&path) & !0o022, mode & !0o022, "{name}");
    }
    assert_eq!(mode_of(&folder.join("relay.key")), 0o600);
    assert!(!files.to_string().contains("key of r1"));

    // A second time would overwrite a key that may be in use.
    let again = lab.run(&issue).await;
    assert_eq!(again.code, 64);
    assert!(again.err.contains("is there already"), "{}", again.err);
    assert_eq!(
        fs::read_to_string(folder.join("relay.key")).unwrap(),
        "key of r1\n"
    );
}

fn mode_of(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn without_a_daemon_it_says_what_to_do() {
    let lab = Lab::empty();
    for (command, want) in [
        ("status", "no agent here"),
        ("ping edge-b1", "systemctl start mesh-agent"),
        ("nodes", "no controller here"),
        ("token create", "--controller-socket PATH"),
    ] {
        let ran = lab.run(command).await;
        assert_eq!(ran.code, 2, "{command}");
        assert!(
            ran.err.contains(want) && ran.out.is_empty(),
            "{command}: {}",
            ran.err
        );
    }
    let (code, document) = lab.json("status").await;
    assert_eq!(
        (code, &document["error"]["kind"]),
        (2, &json!("unreachable"))
    );

    // A daemon that was killed leaves its socket.
    drop(UnixListener::bind(lab.agent()).unwrap());
    let ran = lab.run("status").await;
    assert!(
        ran.code == 2 && ran.err.contains("the agent is not running"),
        "{}",
        ran.err
    );
}

#[tokio::test]
async fn the_other_daemon_s_socket_is_taken_for_what_it_is() {
    let lab = Lab::empty();
    let agent = AdminSocket::bind(&lab.controller()).await.unwrap();
    let health = admin::Health::Ok;
    let server = Server::builder().add_service(AgentAdminServer::new(Agent { health }));
    tokio::spawn(server.serve_with_incoming(agent));
    let ran = lab.run("nodes").await;
    assert_eq!(ran.code, 2);
    assert!(ran.err.contains("is that its admin socket"), "{}", ran.err);
}

#[tokio::test]
async fn a_daemon_that_hangs_is_given_up() {
    let lab = Lab::empty();
    let _silent = UnixListener::bind(lab.agent()).unwrap();
    let started = Instant::now();
    let ran = lab.run("status").await;
    assert_eq!(ran.code, 2);
    assert!(ran.err.contains("did not answer within 5s"), "{}", ran.err);
    assert!(started.elapsed() < Duration::from_secs(9));
}

#[tokio::test]
async fn a_machine_is_looked_at_and_what_is_in_the_way_is_named() {
    let lab = Lab::empty();
    let taken = std::net::UdpSocket::bind("[::]:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let look = format!("install --check --listen-port {port}");
    let (code, document) = lab.json(&look).await;
    assert_eq!((code, &document["level"]), (2, &json!("error")));
    let checks = document["checks"].as_array().unwrap();
    let at = |name: &str| checks.iter().find(|check| check["name"] == name).unwrap();
    assert_eq!(at("UDP port")["level"], "error");
    let text = at("UDP port")["text"].as_str().unwrap();
    assert!(text.contains(&format!("{port} cannot be bound")), "{text}");
    assert_eq!(at("kernel")["level"], "ok");
    let ran = lab.run(&look).await;
    assert!(ran.out.contains("error"), "{}", ran.out);
    // Whoever does not say that it is only to look gets no half of an installation.
    assert_eq!(lab.run("install").await.code, 64);
    assert_eq!(lab.run("uninstall").await.code, 64);
}

#[tokio::test]
async fn wrong_usage_is_64_and_help_is_0() {
    let lab = Lab::start(admin::Health::Ok).await;
    for (arguments, want) in [
        ("", 64),
        ("statsu", 64),
        ("ping", 64),
        ("ping edge-b1 -c 0", 64),
        ("path", 64),
        ("token create --ttl soon", 64),
        ("token create --uses 0", 64),
        ("relay issue r1", 64),
        ("status --nosuch", 64),
        ("path why nobody", 64),
        ("--help", 0),
        ("token --help", 0),
        ("--version", 0),
    ] {
        assert_eq!(lab.run(arguments).await.code, want, "{arguments:?}");
    }
}

#[tokio::test]
async fn an_answer_comes_well_within_a_second() {
    let lab = Lab::start(admin::Health::Ok).await;
    let started = Instant::now();
    lab.run("status").await;
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "{:?}",
        started.elapsed()
    );
}
