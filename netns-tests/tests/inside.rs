//! What `meshctl` shows of the inside of a real node: programs and maps in the kernel, routes, policy, keys.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    mesh::{Mesh, word},
    tool,
};
use serde_json::Value;

/// Until a manifest is in force, or a daemon did what it was asked.
const SOON: Duration = Duration::from_secs(20);

const A: &str = "edge-a1";
const B: &str = "edge-b1";
const B_ADDRESS: &str = "100.96.2.1";

/// What a command says, and its exit code.
fn said(mesh: &Mesh, words: &[&str]) -> Result<(Option<i32>, Value)> {
    let code = mesh.meshctl(A, words)?.status.code();
    Ok((code, mesh.ask(A, words)?))
}

fn list<'a>(document: &'a Value, key: &str) -> Result<&'a Vec<Value>> {
    let found = document.get(key).and_then(Value::as_array);
    found.with_context(|| format!("no {key} in {document}"))
}

fn named<'a>(document: &'a Value, key: &str, name: &str) -> Result<&'a Value> {
    let mut all = list(document, key)?.iter();
    let found = all.find(|one| one.get("name") == Some(&name.into()));
    found.with_context(|| format!("no {name} in {document}"))
}

/// The level of a check of `bpf check`.
fn level(mesh: &Mesh, name: &str) -> Result<String> {
    let document = mesh.ask(A, &["bpf", "check"])?;
    Ok(word(named(&document, "checks", name)?, "level"))
}

#[test]
fn programs_and_maps_are_those_of_the_kernel_and_what_is_taken_away_is_named() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let (code, programs) = said(&mesh, &["bpf", "progs"])?;
    ensure!(code == Some(0), "{programs}");
    let connect = named(&programs, "programs", "hf_connect4")?;
    ensure!(word(connect, "hook") == "cgroup connect4", "{connect}");
    for (pointer, expected) in [("/places/0/attached", true), ("/places/0/pinned", true)] {
        ensure!(
            connect.pointer(pointer) == Some(&expected.into()),
            "{connect}"
        );
    }
    tool::eventually("the service is in the kernel's map", SOON, || {
        let maps = mesh.ask(A, &["bpf", "maps"])?;
        let frontends = named(&maps, "maps", "hf_frontends")?;
        let entries = frontends.get("entries").and_then(Value::as_u64);
        ensure!(entries >= Some(1), "{frontends}");
        Ok(())
    })?;
    ensure!(level(&mesh, "services")? == "ok");
    ensure!(level(&mesh, "kernel")? == "ok");

    let names = "rm /sys/fs/bpf/holdfast/*/links/cgroup_hf_connect4";
    mesh.node(A)?.run(&["sh", "-c", names], SOON)?.ok()?;
    ensure!(level(&mesh, "services")? == "warning");
    let (code, _) = said(&mesh, &["bpf", "progs"])?;
    ensure!(code == Some(1), "{code:?}");
    mesh.ends_well()
}

#[test]
fn a_route_of_the_mesh_is_the_kernel_s_and_one_in_its_way_is_named() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let command = ["routes", "get", B_ADDRESS];
    let (code, route) = said(&mesh, &command)?;
    ensure!(code == Some(0), "{route}");
    ensure!(
        word(&route, "kind") == "node" && word(&route, "node") == B,
        "{route}"
    );
    let kernel = route.get("kernel").context("no kernel")?;
    ensure!(
        word(kernel, "interface") == word(&route, "interface"),
        "{route}"
    );
    ensure!(word(kernel, "source") == "100.96.1.1", "{route}");

    let node = mesh.node(A)?;
    tool::ip(node.netns(), "route add 100.96.2.0/24 dev eth0\n")?;
    let (code, route) = said(&mesh, &command)?;
    let differs = word(&route, "differs");
    ensure!(
        code == Some(1) && differs.contains("packets leave by eth0"),
        "{route}"
    );
    ensure!(differs.contains("100.96.2.0/24 (table 254)"), "{differs}");

    let (code, nobody) = said(&mesh, &["routes", "get", "100.97.7.7"])?;
    ensure!(
        code == Some(2) && word(&nobody, "kind") == "nobody",
        "{nobody}"
    );
    mesh.ends_well()
}

#[test]
fn who_decides_of_a_flow_is_named_from_either_end() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let flow = format!("{B}:8080");
    let command = ["policy", "explain", A, &flow];
    let (code, none) = said(&mesh, &command)?;
    ensure!(
        code == Some(0) && word(&none, "verdict") == "none",
        "{none}"
    );
    let policy = "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshPolicy\nmetadata: {name: lock-down}\nspec:\n  rules:\n  \
                  - action: deny\n    from: [{nodes: [edge-a1]}]\n    to: [{nodes: [edge-b1]}]\n    ports: [{port: 8080}]\n";
    fs::write(mesh.manifests().join("policy.yaml"), policy)?;
    let folder = mesh.manifests().display().to_string();
    let (code, checked) = said(&mesh, &["policy", "check", &folder])?;
    ensure!(
        code == Some(0) && list(&checked, "results")?.is_empty(),
        "{checked}"
    );
    let cases = "cases:\n- {from: node/edge-a1, to: node/edge-b1, port: 8080, expect: deny}\n\
                 - {from: node/edge-b1, to: node/edge-a1, port: 8080, expect: deny}\n";
    let cases = mesh
        .node(A)?
        .write("cases.yaml", cases)?
        .display()
        .to_string();
    let (code, tested) = said(&mesh, &["policy", "test", &folder, &cases])?;
    let passed = list(&tested, "results")?
        .iter()
        .map(|one| one.get("passed"));
    let passed: Vec<_> = passed.flatten().filter_map(Value::as_bool).collect();
    ensure!(code == Some(1) && passed == [true, false], "{tested}");
    tool::eventually("the policy is known", SOON, || {
        let (code, denied) = said(&mesh, &command)?;
        ensure!(
            code == Some(2) && word(&denied, "by") == "MeshPolicy lock-down",
            "{denied}"
        );
        // The same from the other end's state; the other way is another flow.
        let there = mesh.ask(B, &command)?;
        ensure!(there.get("sides") == denied.get("sides"), "{there}");
        let back = denied.get("back").context("no way back")?;
        ensure!(word(back, "verdict") == "allow", "{denied}");
        Ok(())
    })?;
    mesh.ends_well()
}

#[test]
fn a_key_is_rotated_while_the_mesh_goes_on_and_only_public_halves_are_shown() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let node = mesh.node(A)?;
    mesh.ask(A, &["ping", B, "-c", "1"])?;
    let (code, before) = said(&mesh, &["keys", "list"])?;
    ensure!(code == Some(0), "{before}");
    let status = mesh.status(A)?;
    ensure!(
        word(&before, "public_key") == word(&status, "public_key"),
        "{before}"
    );
    let mut peers = list(&before, "peers")?.iter();
    let peer = peers.find(|peer| peer.get("node") == Some(&B.into()));
    let session = peer.and_then(|peer| peer.get("session_ms")?.as_u64());
    ensure!(session.is_some(), "{before}");

    let file = node.dir().join("state/identity.pem");
    let was = fs::read_to_string(&file)?;
    let rotated = mesh.meshctl(A, &["keys", "rotate", "--json"])?;
    ensure!(
        rotated.status.success(),
        "{}{}",
        rotated.stdout,
        rotated.stderr
    );
    ensure!(fs::read_to_string(&file)? != was, "the file is the same");
    let after = mesh.ask(A, &["keys", "list"])?;
    for field in ["serial", "key_sha256"] {
        let of = |document: &Value| document.get("certificate").map(|one| word(one, field));
        ensure!(of(&before) != of(&after), "{field}: {after}");
    }
    ensure!(word(&before, "public_key") == word(&after, "public_key"));
    let (code, _) = said(&mesh, &["keys", "expiry"])?;
    ensure!(code == Some(0), "{code:?}");

    let whole = format!("{}{after}{before}", rotated.stdout);
    let identity = was + &fs::read_to_string(&file)?;
    let wireguard = fs::read_to_string(node.dir().join("state/wireguard.key"))?;
    let secrets = identity.lines().chain([wireguard.trim()]);
    for secret in secrets.filter(|line| line.len() > 30 && !line.contains("-----")) {
        ensure!(!whole.contains(secret), "a key is shown");
    }
    let pinged = mesh.ask(A, &["ping", B, "-c", "1"])?;
    ensure!(pinged.pointer("/received") == Some(&1.into()), "{pinged}");

    // With the new certificate the node is let in again.
    mesh.take("cloud", "mesh-controller")?.terminate(SOON)?;
    mesh.start_controller()?;
    tool::eventually("the controller is back", SOON, || {
        let status = mesh.status(A)?;
        let connected = status.pointer("/controller/connected");
        ensure!(connected == Some(&true.into()), "{status}");
        Ok(())
    })?;
    mesh.take("cloud", "mesh-controller")?.terminate(SOON)?;
    tool::eventually("without a controller there is no other key", SOON, || {
        let refused = mesh.meshctl(A, &["keys", "rotate"])?;
        ensure!(refused.status.code() == Some(2), "{}", refused.stdout);
        Ok(())
    })?;
    mesh.ends_well()
}
