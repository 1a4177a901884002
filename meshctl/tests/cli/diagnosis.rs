//! The commands that say what is wrong, and those that gather it.

use std::{collections::BTreeSet, fs, os::unix::fs::PermissionsExt as _, time::Instant};

use mesh_api::admin::Health;
use serde_json::{Value, json};

use crate::{Lab, mode_of};

#[tokio::test]
async fn health_is_a_word_its_reasons_and_the_exit_code() {
    for (health, word, code) in [
        (Health::Ok, "ok", 0),
        (Health::Degraded, "degraded", 1),
        (Health::Down, "down", 2),
    ] {
        let lab = Lab::start(health).await;
        let want = json!({ "node": "edge-a1", "health": word, "problems": ["relay r2 is down"] });
        assert_eq!(lab.json("health").await, (code, want));
        let text = lab.run("health").await.out;
        assert_eq!(text, format!("{word}\nrelay r2 is down\n"));
    }
}

#[tokio::test]
async fn relays_are_listed_and_one_that_is_down_is_degraded() {
    let lab = Lab::start(Health::Ok).await;
    let want = json!({ "relays": [
        { "name": "r1", "transport": "quic", "home": true, "rtt_ms": 20.5, "problem": null },
        { "name": "r2", "transport": null, "home": false, "rtt_ms": null, "problem": "refused" },
    ]});
    assert_eq!(lab.json("relays").await, (1, want));
    let want = "\
RELAY  STATE  HOME  RTT      PROBLEM
r1     quic   home  20.5 ms
r2     down         -        refused
";
    assert_eq!(lab.run("relays").await.out, want);
}

#[tokio::test]
async fn drops_are_told_with_what_they_mean() {
    let lab = Lab::start(Health::Ok).await;
    let want = json!({ "uptime_ms": 90_061_000, "drops": [
        { "part": "tunnel", "reason": "no_route", "packets": 2, "packets_per_s": null, "explanation": "Out: nobody has it." },
        { "part": "policy", "reason": "denied", "packets": 40, "packets_per_s": null, "explanation": "Nobody allows it." },
    ]});
    assert_eq!(lab.json("drops").await, (0, want));
    let want = "\
PART    REASON    PACKETS  MEANS
tunnel  no_route  2        Out: nobody has it.
policy  denied    40       Nobody allows it.

since the agent started, 1d 1h ago: 40 by policy, 2 by tunnel
";
    assert_eq!(lab.run("drops").await.out, want);
    assert!(lab.run("drops --all").await.out.contains("replayed  0 "));
}

#[tokio::test]
async fn watching_shows_rates_from_the_second_look_on_and_ends_when_told() {
    let lab = Lab::start(Health::Ok).await;
    let ran = lab.run("drops --watch 0.1 --rounds 3 --json").await;
    assert_eq!(ran.code, 0, "{}", ran.err);
    let rates: Vec<_> = ran
        .out
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).unwrap()["drops"][0]["packets_per_s"].clone()
        })
        .collect();
    assert_eq!(rates, [Value::Null, json!(0.0), json!(0.0)]);
    let text = lab.run("drops -w 0.1 --rounds 2").await.out;
    assert!(
        text.contains("A SECOND") && !text.contains('\u{1b}'),
        "{text}"
    );
    for command in ["relays", "services", "services --endpoints", "health"] {
        let once = lab.run(command).await;
        let twice = lab.run(&format!("{command} --watch 0.1 --rounds 2")).await;
        assert_eq!(twice.code, once.code);
        assert_eq!(twice.out, format!("{0}\n{0}", once.out), "{command}");
    }
    // Nothing is new at the second look.
    let once = lab.run("events").await.out;
    assert!(once.contains("TIME (UTC)"), "{once}");
    assert_eq!(lab.run("events --watch 0.1 --rounds 2").await.out, once);
    for command in ["status", "peers"] {
        let text = lab
            .run(&format!("{command} --watch 0.1 --rounds 2"))
            .await
            .out;
        assert_eq!(
            text.matches("edge-b1").count() + text.matches("KEY=").count(),
            2,
            "{text}"
        );
    }
    for wrong in [
        "drops --rounds 2",
        "drops --watch 0",
        "drops --watch soon",
        "drops --watch 0.1 --rounds 0",
    ] {
        assert_eq!(lab.run(wrong).await.code, 64, "{wrong}");
    }
}

#[tokio::test]
async fn events_come_with_their_time_and_age_the_oldest_first() {
    let lab = Lab::start(Health::Ok).await;
    let (code, events) = lab.json("events").await;
    assert_eq!((code, &events["forgotten"]), (0, &json!(1)));
    let want = json!({
        "at_unix_ms": 1_795_364_033_000_i64,
        "ago_ms": 61_000,
        "of": "path",
        "name": "edge-b1",
        "path": "203.0.113.5:51820",
        "from": "standby",
        "to": "primary",
        "reason": "taken",
    });
    assert_eq!(events["events"][1], want);
    let want = "\
TIME (UTC)           AGE        OF      NAME       CHANGE              REASON          PATH
2026-11-22 16:13:52  1m 2s ago  relay   r1 (quic)  - -> up
2026-11-22 16:13:53  1m 1s ago  path    edge-b1    standby -> primary  taken           203.0.113.5:51820
2026-11-22 16:13:54  1m ago     peer    edge-b1    relayed -> direct   probe_answered
2026-11-22 16:14:51  3s ago     health  -          ok -> degraded      no relay is up
";
    assert_eq!(lab.run("events").await.out, want);
    let last = lab.json("events -n 1").await.1;
    assert_eq!(last["events"].as_array().unwrap().len(), 1);
    assert_eq!(last["events"][0]["to"], "degraded");
    let about = lab.run("events --about edge-b1").await.out;
    assert_eq!(about.lines().count(), 3, "{about}");
    assert_eq!(lab.run("events --about r1").await.out.lines().count(), 2);
}

#[tokio::test]
async fn the_snapshots_on_disk_are_shown_compared_checked_and_exported() {
    let lab = Lab::start(Health::Ok).await;
    let (code, shown) = lab.json("snapshot show").await;
    let want = json!({
        "file": "snapshot.1",
        "damage": null,
        "sequence": 2,
        "bytes": 2048,
        "store_id": "abab",
        "generation": 42,
        "epoch": 1,
        "made_unix_ms": 7,
        "received_unix_s": 1,
        "signed": true,
        "problems": [],
        "resources": [
            { "kind": "node", "name": "edge-b1", "digest": "bb" },
            { "kind": "relay", "name": "r2", "digest": "cc" },
        ],
    });
    assert_eq!((code, &shown["slots"][0]), (0, &want));
    let text = lab.run("snapshot show").await.out;
    assert!(text.contains("generation  42 of epoch 1\n"), "{text}");
    assert!(
        text.contains("signed      yes, and the signature holds\nhas         1 node, 1 relay\n"),
        "{text}"
    );
    let each = lab.run("snapshot show --resources").await.out;
    assert!(each.contains("relay  r2       cc\n"), "{each}");

    assert_eq!(
        lab.json("snapshot age").await,
        (0, json!({ "generation": 42, "age_s": 3700 }))
    );
    let text = lab.run("snapshot age").await.out;
    assert_eq!(
        text,
        "generation 42: a controller vouched for it 1h 1m ago\n"
    );

    let want = json!({
        "from_generation": 41,
        "to_generation": 42,
        "added": [{ "kind": "relay", "name": "r2", "digest": "cc" }],
        "removed": [{ "kind": "relay", "name": "r1", "digest": "cc" }],
        "changed": [{ "kind": "node", "name": "edge-b1", "digest": "bb" }],
    });
    assert_eq!(lab.json("snapshot diff").await, (0, want));
    let text = lab.run("snapshot diff").await.out;
    assert_eq!(
        text,
        "generation 41 -> 42\n+  relay  r2\n-  relay  r1\n~  node   edge-b1\n"
    );

    let out = lab.folder.path().join("export");
    let export = format!("snapshot export --out {}", out.display());
    let want = json!({ "file": out.display().to_string(), "generation": 42, "bytes": 2048 });
    assert_eq!(lab.json(&export).await, (0, want));
    assert_eq!(fs::read(&out).unwrap(), b"encoded");
    let again = lab.run(&export).await;
    assert_eq!(again.code, 64, "nothing is overwritten");
    assert!(
        again.err.contains("is there already: remove it"),
        "{}",
        again.err
    );
}

#[tokio::test]
async fn a_snapshot_whose_signature_does_not_hold_is_1_and_none_at_all_is_2() {
    for (health, code, words) in [
        (Health::Ok, 0, "the signature holds"),
        (
            Health::Degraded,
            1,
            "not those that the head was signed for",
        ),
        (Health::Down, 2, "checksum does not match"),
    ] {
        let lab = Lab::start(health).await;
        let ran = lab.run("snapshot verify").await;
        assert_eq!(ran.code, code, "{}", ran.out);
        assert!(ran.out.contains(words), "{}", ran.out);
    }
    let lab = Lab::start(Health::Down).await;
    let diff = lab.run("snapshot diff").await;
    assert!(
        diff.code == 64 && diff.err.contains("not two snapshots"),
        "{}",
        diff.err
    );
}

#[tokio::test]
async fn a_flow_is_traced_and_what_stops_it_is_in_the_first_line() {
    let lab = Lab::start(Health::Ok).await;
    let want = json!({
        "source": "edge-a1",
        "destination": "edge-b1:22",
        "verdict": "stopped",
        "cause": "policy at edge-a1: denied by MeshPolicy no-22",
        "hops": [
            { "way": "there", "stage": "route", "node": "edge-a1", "verdict": "ok", "text": "edge-b1 has it", "counter": null, "count": null },
            { "way": "there", "stage": "policy", "node": "edge-a1", "verdict": "failed", "text": "denied by MeshPolicy no-22", "counter": "denied", "count": 40 },
        ],
    });
    assert_eq!(lab.json("trace edge-b1:22").await, (2, want));
    let want = "\
stopped by policy at edge-a1: denied by MeshPolicy no-22

WAY    STAGE   NODE     VERDICT  WHY                         COUNTED HERE
there  route   edge-a1  ok       edge-b1 has it
there  policy  edge-a1  failed   denied by MeshPolicy no-22  denied 40
";
    assert_eq!(lab.run("trace edge-b1:22").await.out, want);
    for (words, code, first) in [
        (
            "trace edge-b1:80",
            0,
            "edge-a1 to edge-b1:80: arrives, as far as this node knows",
        ),
        (
            "trace edge-b1:23",
            1,
            "arrives, but mtu at edge-a1: only small packets pass",
        ),
        (
            "trace edge-c1 edge-b1:24 --udp",
            0,
            "edge-a1 to edge-b1:24: only another node knows, see below",
        ),
    ] {
        let ran = lab.run(words).await;
        assert_eq!(
            (ran.code, ran.out.lines().next()),
            (code, Some(first)),
            "{words}"
        );
    }
    for wrong in [
        "trace",
        "trace edge-b1",
        "trace nobody:80",
        "trace a b c:1",
        "trace edge-b1:0",
    ] {
        assert_eq!(lab.run(wrong).await.code, 64, "{wrong}");
    }
}

#[tokio::test]
async fn what_the_network_lets_through_is_on_one_page() {
    let lab = Lab::start(Health::Ok).await;
    let want = json!({
        "udp": "works",
        "nat": "port_restricted",
        "reflexive_addresses": ["203.0.113.5:40000"],
        "local_addresses": ["192.168.7.1:51820"],
        "port_mappings": { "192.168.7.254": "203.0.113.5:51820 by PCP" },
        "uplinks": [
            { "interface": "eth0", "used": true, "up": true, "metered": false, "weight": 65435 },
            { "interface": "wwan0", "used": false, "up": false, "metered": true, "weight": 7 },
        ],
        "relays": [
            { "name": "r1", "transport": "quic", "home": true, "rtt_ms": 20.5, "problem": null },
            { "name": "r2", "transport": null, "home": false, "rtt_ms": null, "problem": "refused" },
        ],
        "portal": null,
        "mtu_bytes": 1280,
        "mtu_holes": { "edge-c1": ["203.0.113.9:51820"] },
    });
    assert_eq!(lab.json("netcheck").await, (1, want));
    let text = lab.run("netcheck").await.out;
    assert!(text.starts_with("UDP      works\n"), "{text}");
    assert!(
        text.contains("MTU      to edge-c1 only small packets pass by 203.0.113.9:51820\n"),
        "{text}"
    );
}

#[tokio::test]
async fn the_doctor_names_the_cause_first_and_says_what_to_do() {
    let lab = Lab::start(Health::Ok).await;
    let (_, document) = lab.json("doctor").await;
    let findings = document["findings"].as_array().unwrap();
    let faults: BTreeSet<_> = findings
        .iter()
        .map(|one| one["fault"].as_str().unwrap())
        .collect();
    for fault in [
        "kernel_feature",
        "mtu_hole",
        "policy_denies",
        "dead_endpoint",
        "relay_down",
    ] {
        assert!(faults.contains(fault), "{fault} in {faults:?}");
    }
    for one in findings {
        assert!(
            one["fix"].as_str().is_some_and(|fix| !fix.is_empty()),
            "{one}"
        );
    }
    let full = Lab::start(Health::Down).await;
    let ran = full.run("doctor").await;
    assert_eq!(ran.code, 2);
    let first = ran.out.lines().next().unwrap();
    assert!(
        first.starts_with("error: the disk of /var/lib/holdfast is full"),
        "{first}"
    );
    let nobody = Lab::empty().run("doctor").await;
    assert_eq!(
        nobody.code, 2,
        "it says what it can without an agent: {}",
        nobody.out
    );
    assert!(nobody.out.contains("no agent here"), "{}", nobody.out);
}

#[tokio::test]
async fn a_bug_report_has_every_report_and_no_canary_key() {
    const CANARIES: [&str; 3] = [
        "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=",
        "hf1.canary-token.c2VjcmV0",
        "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg",
    ];
    let lab = Lab::start(Health::Ok).await;
    let log = lab.folder.path().join("agent.log");
    let [key, token, pem] = CANARIES;
    let text = format!(
        "INFO direct path up to 203.0.113.7:51820\nWARN PrivateKey = {key}\njoined with token={token}\n\
         -----BEGIN PRIVATE KEY-----\n{pem}\n-----END PRIVATE KEY-----\nthe end\n"
    );
    fs::write(&log, text).unwrap();
    let out = lab.folder.path().join("report");
    let command = format!(
        "bugreport --redact --out {} --log {}",
        out.display(),
        log.display()
    );
    let (code, said) = lab.json(&command).await;
    assert_eq!((code, &said["missing"]), (0, &json!({})));
    let mut whole = String::new();
    for file in said["files"].as_array().unwrap() {
        let path = out.join(file.as_str().unwrap());
        assert_eq!(mode_of(&path), 0o600);
        whole += &fs::read_to_string(path).unwrap();
    }
    assert_eq!(
        fs::metadata(&out).unwrap().permissions().mode() & 0o777,
        0o700
    );
    for canary in CANARIES {
        assert!(!whole.contains(canary), "{canary}");
    }
    assert!(
        whole.contains("the end") && whole.contains("dead_endpoint"),
        "but what happened is there"
    );
    assert!(
        !whole.contains(crate::names::CACHED),
        "nobody's questions are"
    );
    assert!(
        !whole.contains("203.0.113.") && whole.contains("100.96.0.1"),
        "addresses outside are not"
    );
    for name in [
        "doctor",
        "status",
        "peers",
        "services",
        "drops",
        "events",
        "snapshot",
        "netcheck",
        "machine",
        "path-edge-c1",
        "dns-status",
    ] {
        assert!(out.join(format!("{name}.json")).is_file(), "{name}");
    }
    assert_eq!(lab.run(&command).await.code, 64, "nothing is written over");

    let without = Lab::empty();
    let out = without.folder.path().join("report");
    let (code, said) = without
        .json(&format!("bugreport --out {}", out.display()))
        .await;
    assert_eq!(code, 0, "without an agent there is the machine");
    assert!(
        said["missing"]["status"]
            .as_str()
            .unwrap()
            .contains("no agent here")
    );
    assert!(out.join("doctor.json").is_file() && out.join("machine.json").is_file());
}

#[tokio::test]
async fn shells_complete_and_manual_pages_are_there_for_every_command() {
    let lab = Lab::empty();
    for (shell, word) in [
        ("bash", "complete -F _meshctl"),
        ("zsh", "#compdef meshctl"),
        ("fish", "complete -c meshctl"),
    ] {
        let ran = lab.run(&format!("completion {shell}")).await;
        assert!(ran.code == 0 && ran.out.contains(word), "{shell}");
        assert!(ran.out.contains("netcheck"), "{shell}");
    }
    assert_eq!(lab.run("completion tcsh").await.code, 64);
    let out = lab.folder.path().join("man");
    let (code, said) = lab.json(&format!("man --out {}", out.display())).await;
    assert_eq!(code, 0);
    assert!(said["files"].as_array().unwrap().len() > 30, "{said}");
    let page = fs::read_to_string(out.join("meshctl-path-why.1")).unwrap();
    assert!(
        page.contains("meshctl\\-path\\-why") && page.contains("NODE"),
        "{page}"
    );
    assert!(out.join("meshctl.1").is_file());
}

/// A script that reads JSON must never find a line that is none, whatever the command.
#[tokio::test]
async fn every_command_that_asks_the_agent_answers_in_json_also_when_it_is_gone() {
    let lab = Lab::empty();
    let started = Instant::now();
    for command in [
        "health",
        "relays",
        "netcheck",
        "trace edge-b1:80",
        "drops",
        "events",
        "snapshot show",
        "snapshot age",
        "snapshot diff",
    ] {
        let (code, document) = lab.json(command).await;
        assert_eq!(
            (code, &document["error"]["kind"]),
            (2, &json!("unreachable")),
            "{command}"
        );
    }
    assert!(started.elapsed().as_secs() < 30);
}
