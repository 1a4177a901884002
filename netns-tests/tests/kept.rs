//! `meshctl lab`: a mesh that stays until it is taken away.

use std::{
    collections::BTreeSet,
    fs,
    process::{Command, Output},
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    lab::{self, cgroup_mount},
    mesh::word,
    tool,
};
use serde_json::Value;

/// Taken away however the test ends.
struct Up {
    id: String,
    said: Value,
}

impl Up {
    fn new(words: &[&str]) -> Result<Self> {
        let said = meshctl(&[&["--json", "lab", "up"], words].concat())?;
        ensure!(said.status.code() == Some(0), "{said:?}");
        let said: Value = serde_json::from_slice(&said.stdout)?;
        let id = word(&said, "id");
        Ok(Self { id, said })
    }

    fn run(&self, node: &str, words: &[&str]) -> Result<Output> {
        meshctl(&[&["lab", "run", "--lab", &self.id, node, "--"], words].concat())
    }

    fn ok(&self, node: &str, words: &[&str]) -> Result<String> {
        let output = self.run(node, words)?;
        ensure!(output.status.success(), "{node}: {words:?}: {output:?}");
        Ok(String::from_utf8(output.stdout)?)
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        lab::teardown(&self.id).ok(); // It may be gone already.
    }
}

fn meshctl(words: &[&str]) -> Result<Output> {
    let output = Command::new(tool::binary("meshctl")?).args(words).output();
    output.context("run meshctl")
}

/// Whatever of the lab is there.
fn left(id: &str) -> Result<Vec<String>> {
    let mut left = Vec::new();
    let processes = fs::read_dir("/proc")?.flatten();
    for folder in [
        "/run/netns".into(),
        std::env::temp_dir().join("holdfast-lab"),
        cgroup_mount()?,
    ] {
        let entries = fs::read_dir(folder)?.flatten();
        left.extend(entries.map(|entry| entry.path().display().to_string()));
    }
    left.extend(processes.filter_map(|process| {
        let words = fs::read_to_string(process.path().join("cmdline"));
        words.ok().map(|words| words.replace('\0', " "))
    }));
    left.retain(|one| one.contains(id));
    Ok(left)
}

#[test]
fn a_mesh_stays_is_entered_and_goes_without_a_trace() -> Result<()> {
    let up = Up::new(&[
        "--nodes",
        "3",
        "--sites",
        "2",
        "--nat",
        "symmetric",
        "--nat",
        "full-cone",
    ])?;
    let nodes = up.said.pointer("/nodes").and_then(Value::as_array);
    let nodes = nodes.context("no nodes")?.iter();
    let nodes: Vec<_> = nodes
        .map(|node| ["name", "site", "nat"].map(|key| word(node, key)))
        .collect();
    let expected = [
        ["edge-a1", "site-a", "symmetric"],
        ["edge-b1", "site-b", "full-cone"],
        ["edge-a2", "site-a", "symmetric"],
    ];
    for one in &expected {
        ensure!(
            nodes.iter().any(|node| node == one),
            "no {one:?} in {nodes:?}"
        );
    }
    // The whole shape: scripts read it.
    let keys = |value: Option<&Value>| {
        let fields = value.and_then(Value::as_object).into_iter().flatten();
        let names = fields
            .map(|(name, _)| name.as_str())
            .collect::<BTreeSet<_>>();
        names.into_iter().collect::<Vec<_>>().join(" ")
    };
    for (path, expected) in [
        ("", "cloud dir id nodes"),
        ("/cloud", "admin_socket cgroup dir name netns"),
        (
            "/nodes/0",
            "admin_socket cgroup dir name nat netns overlay_addresses site",
        ),
    ] {
        let found = keys(up.said.pointer(path));
        ensure!(found == expected, "{path}: {found}");
    }
    let addresses = up.said.pointer("/nodes/0/overlay_addresses");
    let addresses = addresses.and_then(Value::as_array).map(Vec::len);
    ensure!(addresses == Some(2), "{}", up.said);
    // Across both NATs, by name, with what made it long gone.
    up.ok("edge-a1", &["ping", "-c", "3", "-i", "0.2", "edge-b1.mesh"])?;
    let status = up.ok("edge-b1", &["meshctl", "--json", "status"])?;
    let status: Value = serde_json::from_str(&status)?;
    ensure!(word(&status, "node") == "edge-b1", "{status}");
    let known = up.ok("cloud", &["meshctl", "nodes"])?;
    ensure!(known.contains("edge-a2"), "{known}");
    // The command's own end is the end.
    ensure!(up.run("edge-a1", &["sh", "-c", "exit 7"])?.status.code() == Some(7));

    let listed = meshctl(&["lab", "list"])?;
    let listed = String::from_utf8(listed.stdout)?;
    ensure!(
        listed.contains(&up.id) && listed.contains("edge-a1"),
        "{listed}"
    );
    let strange = up.run("edge-z9", &["true"])?;
    let words = String::from_utf8(strange.stderr)?;
    ensure!(
        words.contains("no node edge-z9") && words.contains("edge-a1"),
        "{words}"
    );

    ensure!(!left(&up.id)?.is_empty());
    let down = meshctl(&["lab", "down", &up.id])?;
    ensure!(down.status.code() == Some(0), "{down:?}");
    let left = left(&up.id)?;
    ensure!(left.is_empty(), "{left:?}");
    let again = meshctl(&["lab", "down", &up.id])?;
    ensure!(again.status.code() == Some(64), "{again:?}");
    Ok(())
}

#[test]
fn what_cannot_be_made_is_said_and_leaves_nothing() -> Result<()> {
    for words in [
        &["lab", "up", "--nodes", "17", "--sites", "1"][..],
        &["lab", "up", "--nodes", "65"],
        &["lab", "up", "--nat", "cone"],
    ] {
        let before = lab::kept().len();
        let said = meshctl(words)?;
        ensure!(
            matches!(said.status.code(), Some(2 | 64)),
            "{words:?}: {said:?}"
        );
        ensure!(lab::kept().len() == before);
    }
    Ok(())
}
