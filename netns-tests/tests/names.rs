//! `meshctl dns`: what it says while the servers that the node asks for others' names end, one after the other.

use std::{
    net::{Ipv4Addr, UdpSocket},
    time::Duration,
};

use anyhow::{Result, ensure};
use netns_tests::{
    link::Impairment,
    mesh::{CLOUD, Mesh, word},
    name_server::NameServer,
    node::{Node, Process},
    tool,
};
use serde_json::Value;

const NODE: &str = "edge-a1";

/// Where the second server is: the node itself, beside the agent.
const BESIDE: Ipv4Addr = Ipv4Addr::LOCALHOST;

const KNOWN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);

/// Until a silent server is passed over, or answers are beyond their time, which is a second.
const SOON: Duration = Duration::from_secs(20);

/// The exit code, and the document.
fn ask(mesh: &Mesh, words: &[&str]) -> Result<(Option<i32>, Value)> {
    let output = mesh.meshctl(NODE, &[words, &["--json"]].concat())?;
    Ok((output.status.code(), serde_json::from_str(&output.stdout)?))
}

fn resolves(mesh: &Mesh, name: &str) -> Result<()> {
    let (code, said) = ask(mesh, &["dns", "query", name])?;
    ensure!(code == Some(0), "{said}");
    Ok(())
}

/// Waits until the status has this code, with each word in it; `before` each look something is asked for.
fn status(mesh: &Mesh, what: &str, want: (i32, &str), words: &[&str]) -> Result<Value> {
    let mut number = 0;
    tool::eventually(what, SOON, || {
        number += 1;
        // Nobody is found to be silent whom nobody asks.
        let name = format!("{number}.{}.example.net", want.1);
        mesh.meshctl(NODE, &["dns", "query", &name])?;
        let (code, said) = ask(mesh, &["dns", "status"])?;
        ensure!(
            (code, word(&said, "health").as_str()) == (Some(want.0), want.1),
            "{said}"
        );
        let problems = said
            .pointer("/problems")
            .map(ToString::to_string)
            .unwrap_or_default();
        let missing = words.iter().find(|one| !problems.contains(**one));
        ensure!(missing.is_none(), "no {missing:?} in {said}");
        Ok(said)
    })
}

#[test]
fn a_resolver_says_who_gives_no_answers_and_what_it_still_has() -> Result<()> {
    let mut mesh = Mesh::demo()?;
    mesh.add_two_sites(Impairment::NONE, &[NODE], &["edge-b1"])?;
    let node = mesh.node(NODE)?;
    let far = NameServer::start(mesh.cloud(), CLOUD, KNOWN)?;
    let near = NameServer::start(&node, BESIDE, KNOWN)?;
    let dns = format!("[dns]\nupstreams = [\"{CLOUD}:53\", \"{BESIDE}:53\"]\n");
    mesh.start_agent_with(NODE, &format!("operators = [\"edge-b1\"]\n{dns}"))?;
    mesh.start_agent("edge-b1")?;
    for node in [NODE, "edge-b1"] {
        mesh.agent_ready(node, 2)?;
    }
    resolves(&mesh, "clinic.example.org")?;
    let (code, said) = ask(&mesh, &["dns", "status"])?;
    ensure!(
        (code, word(&said, "health").as_str()) == (Some(0), "ok"),
        "{said}"
    );
    let first = &said["upstreams"][0];
    ensure!(
        word(first, "state") == "answers" && first["mean_ms"].is_f64(),
        "{said}"
    );
    ensure!(
        said["generation"].as_u64() > Some(0) && said["cached"].as_u64() > Some(0),
        "{said}"
    );
    let (_, said) = ask(&mesh, &["dns", "cache", "example.org"])?;
    let known = &said["entries"][0];
    ensure!(word(known, "name") == "clinic.example.org.", "{said}");
    ensure!(known["records"].to_string().contains("192.0.2.7"), "{said}");

    // One ends without a word: its port is there, and nobody answers. The other goes on.
    drop(far);
    let silent = tool::eventually("its port is free", SOON, || {
        Ok(mesh.cloud().enter(|| UdpSocket::bind((CLOUD, 53)))??)
    })?;
    let upstream = format!("the upstream {CLOUD}:53 gives no answers");
    let said = status(&mesh, "one is passed over", (1, "degraded"), &[&upstream])?;
    let second = &said["upstreams"][1];
    ensure!(word(second, "state") == "answers", "{said}");

    // So does the other; what was known is given beyond its time.
    drop(near);
    status(&mesh, "nobody answers", (2, "down"), &[&upstream])?;
    tool::eventually("its second is over", SOON, || {
        let (_, said) = ask(&mesh, &["dns", "cache", "example.org"])?;
        ensure!(said["entries"][0]["left_s"].is_null(), "{said}");
        Ok(())
    })?;
    resolves(&mesh, "clinic.example.org")?;
    let (code, said) = ask(&mesh, &["dns", "status"])?;
    let problems = said["problems"].to_string();
    ensure!(
        code == Some(2) && problems.contains("beyond their time"),
        "{said}"
    );
    ensure!(said["counters"]["stale"].as_u64() > Some(0), "{said}");
    ensure!(
        !said.to_string().contains("clinic"),
        "names are nobody else's: {said}"
    );
    let (_, said) = ask(&mesh, &["dns", "cache", "example.org"])?;
    let stale = &said["entries"][0];
    ensure!(stale["left_s"].is_null(), "{said}");
    ensure!(stale["stale_left_s"].as_u64() > Some(86_000), "{said}");

    // Another node may look, and not touch.
    let far = mesh.ask(
        "edge-b1",
        &["--node", NODE, "dns", "cache", "clinic.example.org"],
    )?;
    ensure!(far["matching"] == 1, "{far}");
    let far = mesh.ask("edge-b1", &["--node", NODE, "dns", "status"])?;
    ensure!(word(&far, "health") == "down", "{far}");
    let refused = mesh.meshctl("edge-b1", &["--node", NODE, "dns", "cache", "--flush"])?;
    ensure!(refused.status.code() == Some(64), "{refused:?}");

    // What one sends to somebody else has the resolver's state, and none of the names.
    let out = node.dir().join("report");
    let folder = out.display().to_string();
    mesh.meshctl(NODE, &["bugreport", "--out", &folder])?.ok()?;
    ensure!(out.join("dns-status.json").is_file(), "{folder}");
    for file in std::fs::read_dir(&out)? {
        let path = file?.path();
        let text = std::fs::read_to_string(&path)?;
        ensure!(!text.contains("clinic"), "{}", path.display());
    }

    let (_, said) = ask(&mesh, &["dns", "cache", "--flush", "example.org"])?;
    ensure!(said["forgotten"] == 1, "{said}");
    let (_, said) = ask(&mesh, &["dns", "cache", "example.org"])?;
    ensure!(said["matching"] == 0, "{said}");
    let (code, said) = ask(&mesh, &["dns", "query", "clinic.example.org"])?;
    ensure!(code == Some(2), "{said}");
    drop(silent);
    mesh.ends_well()
}

/// For which every name has the address [`KNOWN`].
fn dnsmasq(node: &Node, options: &[&str]) -> Result<Process> {
    let all = format!("--address=/#/{KNOWN}");
    let words = [
        "dnsmasq",
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--no-resolv",
        "--no-hosts",
        "--user=root",
        "--pid-file=",
        "--log-facility=-",
        &all,
    ];
    let mut dnsmasq = node.spawn("dnsmasq", &[&words, options].concat())?;
    tool::eventually("dnsmasq answers", SOON, || {
        dnsmasq.running()?;
        let said = dig(node, "127.0.0.1", "+tcp")?;
        ensure!(said == KNOWN.to_string(), "{said}");
        Ok(())
    })?;
    Ok(dnsmasq)
}

fn dig(node: &Node, server: &str, by: &str) -> Result<String> {
    let server = format!("@{server}");
    let words = [
        "dig",
        &server,
        by,
        "+short",
        "+tries=1",
        "+time=1",
        "edge-b1.mesh",
    ];
    let said = node.run(&words, SOON)?.ok()?;
    Ok(said.trim().to_owned())
}

#[test]
fn beside_a_dnsmasq_an_agent_starts_and_says_what_it_does_not_have_until_it_has_it() -> Result<()> {
    const OWN: &str = "169.254.53.53";
    let mut mesh = Mesh::demo()?;
    mesh.add_two_sites(Impairment::NONE, &[NODE], &["edge-b1"])?;
    mesh.provokes(&["cannot listen for DNS; trying again"]);
    let node = mesh.node(NODE)?;
    let mut wildcard = dnsmasq(&node, &[])?;
    for name in [NODE, "edge-b1"] {
        mesh.start_agent(name)?;
    }
    for name in [NODE, "edge-b1"] {
        mesh.agent_ready(name, 2)?;
    }
    let words = ["ip", "-brief", "address", "show", "dev", "holdfast0"];
    let addresses = node.run(&words, SOON)?.ok()?;
    ensure!(addresses.contains(OWN), "{addresses}");
    let overlay = dig(&node, OWN, "+notcp")?;
    ensure!(overlay.starts_with("100."), "{overlay}");
    ensure!(dig(&node, OWN, "+tcp")? == KNOWN.to_string());
    let (code, said) = ask(&mesh, &["dns", "status"])?;
    let state = (code, word(&said, "health"));
    ensure!(state == (Some(1), "degraded".to_owned()), "{said}");
    for words in [&["dns", "status"][..], &["status"], &["doctor"]] {
        let text = ask(&mesh, words)?.1.to_string();
        for part in ["by TCP at 169.254.53.53:53", "except-interface=holdfast0"] {
            ensure!(text.contains(part), "no {part:?} in {words:?}: {text}");
        }
        ensure!(!text.contains("by UDP at"), "{text}");
    }

    // It starts anew as it was, and then as it was told.
    wildcard.terminate(SOON)?;
    let mut wildcard = dnsmasq(&node, &[])?;
    ensure!(dig(&node, OWN, "+notcp")? == overlay);
    wildcard.terminate(SOON)?;
    let _leaves_it = dnsmasq(&node, &["--bind-dynamic", "--except-interface=holdfast0"])?;
    // Free twice, 15 s apart.
    tool::eventually("TCP is the agent's", Duration::from_secs(60), || {
        let (code, said) = ask(&mesh, &["dns", "status"])?;
        ensure!(code == Some(0), "{said}");
        Ok(())
    })?;
    for by in ["+notcp", "+tcp"] {
        ensure!(dig(&node, OWN, by)? == overlay);
        ensure!(dig(&node, "127.0.0.1", by)? == KNOWN.to_string());
    }
    mesh.ends_well()
}
