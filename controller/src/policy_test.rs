//! `mesh-controller policy-test MANIFESTS CASES`: whether the policies in manifests, a folder or a file, say of
//! flows what a file of cases expects. For the folder's repository: nothing runs, nothing is changed.
//!
//! Judged is as the nodes do it, by the tables of the sender's node and of the receiver's.

use std::{
    collections::BTreeSet, ffi::OsString, fmt, path::Path, process::ExitCode, sync::Arc,
    time::SystemTime,
};

use anyhow::{Context as _, Result, ensure};
use mesh_api::{
    control::SyncResponse,
    convert::node_resource,
    resources::{State, Trust},
};
use mesh_core::{
    policy::{
        Flow, Limits,
        judges::{Judged, Judges},
        resources::IpProtocol,
    },
    snapshot::{Generation, Snapshot},
};
use mesh_identity::authority::CertificateAuthority;
use mesh_wire::id::{NodeId, NodeName};
use serde::Deserialize;

use crate::{
    desired::desired,
    history::Wanted,
    manifests::{Folder, Loaded, Object},
    store::{Nodes, Registered},
};

/// The word on the command line.
pub const COMMAND: &str = "policy-test";

/// Bad arguments, or files that cannot be read (`EX_USAGE`, sysexits.h).
const EXIT_USAGE: u8 = 64;

/// More than any folder needs: what is tested is not whether the kernel has room.
const LIMITS: Limits = Limits {
    addresses: usize::MAX,
    pairs: usize::MAX,
    ports: usize::MAX,
};

/// Most cases of a file.
const CASES_MAX: usize = 10_000;

/// What a file of cases holds.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cases {
    cases: Vec<Case>,
}

/// A flow, and what must become of it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    /// `node/NAME`, `pod/NAMESPACE/NAME` or an address.
    from: String,
    to: String,
    #[serde(default = "default_protocol")]
    protocol: String,
    #[serde(default)]
    port: u16,
    expect: Expected,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Expected {
    Allow,
    Audit,
    Deny,
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Audit => "audit",
            Self::Deny => "deny",
        })
    }
}

fn default_protocol() -> String {
    "TCP".to_owned()
}

/// The whole command: prints a line for each case. 0: all are as expected; 1: not all, or the
/// manifests have problems; 64: there is nothing to test.
#[must_use]
pub fn main(arguments: &[OsString]) -> ExitCode {
    let [manifests, cases] = arguments else {
        eprintln!("usage: mesh-controller {COMMAND} MANIFESTS CASES_FILE");
        return EXIT_USAGE.into();
    };
    match run(Path::new(manifests), Path::new(cases)) {
        Ok(report) => {
            print!("{}", report.text);
            u8::from(report.failed > 0).into()
        }
        Err(error) => {
            eprintln!("{error:#}");
            EXIT_USAGE.into()
        }
    }
}

/// What the cases came to.
#[derive(Debug, Default)]
struct Report {
    text: String,
    failed: usize,
}

fn run(manifests: &Path, cases: &Path) -> Result<Report> {
    let text = std::fs::read_to_string(cases);
    let text = text.with_context(|| format!("cannot read {}", cases.display()))?;
    let mut folder = Folder::default();
    folder.scan_at(manifests);
    let (objects, problems) = folder.objects();
    ensure!(
        manifests.is_dir() || manifests.is_file(),
        "{} is neither a folder nor a file",
        manifests.display()
    );
    test(&objects, problems, &text).with_context(|| cases.display().to_string())
}

fn test(objects: &[&Loaded], mut problems: Vec<String>, cases: &str) -> Result<Report> {
    let Cases { cases } = serde_yaml_ng::from_str(cases)?;
    ensure!(
        cases.len() <= CASES_MAX,
        "{} cases are more than {CASES_MAX}",
        cases.len()
    );
    let (snapshot, more) = snapshot(objects)?;
    problems.extend(more);
    let mut report = Report {
        failed: problems.len(),
        ..Report::default()
    };
    for problem in &problems {
        report.text += &format!("FAIL {problem}\n");
    }
    let mut judges = Judges::new(Arc::new(snapshot), LIMITS);
    for (index, case) in cases.iter().enumerate() {
        let found = judge(&mut judges, case).with_context(|| format!("cases[{index}]"))?;
        let Case {
            from,
            to,
            protocol,
            port,
            expect,
        } = case;
        let flow = format!("{from} to {to}, {protocol} {port}");
        let (is, by) = found;
        if is == *expect {
            report.text += &format!("ok   {flow}: {is} by {by}\n");
        } else {
            report.failed += 1;
            report.text += &format!("FAIL {flow}: {is} by {by}, expected {expect}\n");
        }
    }
    let all = cases.len();
    report.text += &format!("{all} cases, {} failed\n", report.failed);
    Ok(report)
}

/// The mesh of these manifests, as if all their nodes had joined, and what is wrong with it.
///
/// # Errors
///
/// If there are more nodes than overlay addresses.
pub fn snapshot(objects: &[&Loaded]) -> Result<(Snapshot, Vec<String>)> {
    let authority = CertificateAuthority::generate("test", SystemTime::now())?;
    let mesh = authority.mesh_id();
    // Once without nodes, for the addresses that are given out by name.
    let empty = desired(objects, &Nodes::default(), mesh, "test");
    let names: BTreeSet<NodeName> = objects
        .iter()
        .filter_map(|loaded| {
            if let Object::Node(facts) | Object::MeshNode(facts) = &loaded.object {
                Some(facts.name.clone())
            } else {
                None
            }
        })
        .collect();
    let taken: BTreeSet<_> = empty.pins.values().copied().collect();
    let hosts = empty.mesh.overlay_v4.hosts();
    let mut free = hosts.filter(|host| !taken.contains(host));
    let mut nodes = Nodes::default();
    for (name, number) in names.into_iter().zip(1_u64..) {
        let mut id = [0; 32];
        if let Some(head) = id.first_chunk_mut() {
            *head = number.to_be_bytes();
        }
        let pinned = empty.pins.get(&name).copied();
        let overlay_v4 = pinned.or_else(|| free.next());
        let overlay_v4 = overlay_v4.context("spec.overlayIPv4CIDR has too few addresses")?;
        let id = NodeId(id);
        nodes.insert(name, Registered::new(id, overlay_v4));
    }
    let desired = desired(objects, &nodes, mesh, "test");
    let resources = desired.wanted.into_values().map(|wanted| match wanted {
        Wanted::Resource(resource) => Arc::unwrap_or_clone(resource),
        Wanted::Node(record) => node_resource(record, Vec::new()),
    });
    let response = SyncResponse {
        full: true,
        set: resources.collect(),
        ..SyncResponse::default()
    };
    let mut state = State::new(authority.certificate_der().clone())?;
    let rejected = state.apply(response, Trust::Checked).into_iter();
    let rejected = rejected.map(|rejected| rejected.to_string());
    let problems = desired.problems.into_iter().chain(rejected).collect();
    Ok((state.snapshot(Generation(1))?, problems))
}

/// The strictest of what the two sides say, over both families, and who says it where.
fn judge(judges: &mut Judges, case: &Case) -> Result<(Expected, String)> {
    let (from, to) = (judges.addresses(&case.from)?, judges.addresses(&case.to)?);
    let protocol = IpProtocol::ALL
        .into_iter()
        .find(|protocol| protocol.as_str() == case.protocol);
    let protocol = protocol.with_context(|| format!("protocol {:?}", case.protocol))?;
    let rank = |judged: &Judged| (judged.verdict.allowed, judged.verdict.unaudited);
    let mut strictest: Option<Judged> = None;
    for &from in &from {
        for &to in to.iter().filter(|to| to.is_ipv4() == from.is_ipv4()) {
            let flow = Flow {
                from,
                to,
                protocol: Some(protocol),
                port: case.port,
            };
            for judged in judges.sides(&flow) {
                let known = strictest.as_ref();
                if known.is_none_or(|known| rank(&judged) < rank(known)) {
                    strictest = Some(judged);
                }
            }
        }
    }
    let Judged {
        node,
        direction,
        verdict,
        by,
        ..
    } = strictest.context("neither end is on a node, or they have no family in common")?;
    let is = match (verdict.allowed, verdict.unaudited) {
        (false, _) => Expected::Deny,
        (true, false) => Expected::Audit,
        (true, true) => Expected::Allow,
    };
    Ok((is, format!("{by} ({} at {node})", direction.as_str())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifests::parse::parse_file;

    const MANIFESTS: &str = "
apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshNode
metadata: {name: a}
spec: {overlayIPv4: 100.96.0.1}
---
apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshNode
metadata: {name: b}
spec: {prefixes: [10.2.0.0/24]}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}}
spec: {nodeName: b, containers: []}
status: {podIP: 10.2.0.10}
---
apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshPolicy
metadata: {name: no-ssh}
spec: {rules: [{action: deny, from: [{nodes: [a]}], ports: [{port: 22}]}]}
---
apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshPolicy
metadata: {name: trial}
spec: {audit: true, rules: [{action: deny, to: [{namespaces: [shop]}]}]}
";

    fn report(cases: &str) -> Result<Report> {
        let parsed = parse_file("m.yaml", MANIFESTS.trim_start());
        let objects: Vec<_> = parsed.objects.iter().collect();
        test(&objects, parsed.problems, cases)
    }

    #[test]
    fn each_case_says_what_is_and_by_whose_word() {
        let report = report(
            "
cases:
- {from: node/a, to: node/b, port: 22, expect: deny}
- {from: node/a, to: node/b, port: 23, expect: allow}
- {from: node/b, to: node/a, port: 22, expect: deny}
- {from: 100.96.0.1, to: pod/shop/db, protocol: UDP, port: 53, expect: audit}
",
        )
        .unwrap();
        let expected = "\
ok   node/a to node/b, TCP 22: deny by MeshPolicy no-ssh (out at a)
ok   node/a to node/b, TCP 23: allow by defaultAction (out at a)
FAIL node/b to node/a, TCP 22: allow by defaultAction (out at b), expected deny
ok   100.96.0.1 to pod/shop/db, UDP 53: audit by MeshPolicy trial (out at a)
4 cases, 1 failed
";
        assert_eq!(report.text, expected);
        assert_eq!(report.failed, 1);
    }

    #[test]
    fn a_folder_and_a_file_are_read_alike() {
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| place.path().join(name);
        std::fs::create_dir(path("folder")).unwrap();
        let broken = MANIFESTS.replace("audit: true", "audit: perhaps");
        std::fs::write(path("folder/m.yaml"), broken).unwrap();
        std::fs::write(path("cases.yaml"), "cases: []").unwrap();
        let of_folder = run(&path("folder"), &path("cases.yaml")).unwrap();
        let of_file = run(&path("folder/m.yaml"), &path("cases.yaml")).unwrap();
        assert_eq!(
            (of_folder.failed, &of_folder.text),
            (of_file.failed, &of_file.text)
        );
        assert!(of_file.text.contains("m.yaml:"), "{}", of_file.text);
        let neither = run(&path("none"), &path("cases.yaml")).unwrap_err();
        assert!(neither.to_string().contains("neither a folder nor a file"));
    }

    #[test]
    fn a_case_that_means_nothing_is_named() {
        for (case, expected) in [
            ("from: node/x, to: node/a", "cases[0]: there is no node x"),
            ("from: pod/shop/x, to: node/a", "there is no pod shop/x"),
            ("from: x, to: node/a", "there is no node x"),
            (
                "from: node/a, to: node/b, protocol: tcp",
                "protocol \"tcp\"",
            ),
            ("from: 192.0.2.1, to: 192.0.2.2", "neither end is on a node"),
            ("from: node/a, tu: node/b", "unknown field `tu`"),
        ] {
            let error = report(&format!("cases: [{{{case}, expect: allow}}]")).unwrap_err();
            let text = format!("{error:#}");
            assert!(text.contains(expected), "{case}: {text}");
        }
    }
}
