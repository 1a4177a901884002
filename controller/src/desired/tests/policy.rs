use std::sync::Arc;

use mesh_core::{
    policy::{
        Compiler, Direction, Flow, Limits,
        resources::{DefaultAction, IpProtocol},
    },
    snapshot::Snapshot,
};

use super::*;
use crate::policy_test;

const MANIFESTS: &str = "
apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshConfig
metadata: {name: default}
spec: {defaultAction: deny}
---
apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshNode
metadata: {name: a}
spec: {site: s1, prefixes: [10.1.0.0/24]}
---
apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshNode
metadata: {name: b}
spec: {site: s2, prefixes: [10.2.0.0/24]}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: sales}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: a, serviceAccountName: front, containers: []}
status: {podIP: 10.1.0.10}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}}
spec:
  nodeName: b
  containers: [{name: db, ports: [{name: sql, containerPort: 5432}]}]
status: {podIP: 10.2.0.10}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  podSelector: {matchLabels: {app: db}}
  ingress:
  - from:
    - {namespaceSelector: {matchLabels: {team: sales}}, podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [x]}]}}
    - ipBlock: {cidr: 10.1.0.0/24, except: [10.1.0.128/25]}
    ports: [{port: sql}, {port: 80, endPort: 90}]
  egress: []
---
apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshPolicy
metadata: {name: front}
spec:
  rules:
  - action: allow
    from: [{serviceAccounts: [shop/front], namespaces: [shop], namespaceSelector: {matchLabels: {team: sales}}}, {cidrs: [10.1.0.64/26]}]
    to: [{podSelector: {matchLabels: {app: db}}}, {nodes: [b], sites: [s2]}]
  - action: deny
    ports: [{port: 85, endPort: 90}, {protocol: UDP}, {protocol: SCTP, port: 1}, {protocol: ICMP}]
---
apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshPolicy
metadata: {name: trial}
spec: {audit: true, rules: [{action: deny, ports: [{port: 81}]}]}
";

fn snapshot(text: &str) -> (Snapshot, Vec<String>) {
    let parsed = parse_file("m.yaml", text.trim_start_matches('\n'));
    assert_eq!(parsed.problems, Vec::<String>::new());
    let objects: Vec<_> = parsed.objects.iter().collect();
    policy_test::snapshot(&objects).unwrap()
}

#[test]
fn manifests_become_what_a_node_enforces() {
    let (snapshot, problems) = snapshot(MANIFESTS);
    assert_eq!(problems, Vec::<String>::new());
    assert_eq!(snapshot.mesh.default_action, DefaultAction::Deny);
    let limits = Limits {
        addresses: 1_000,
        pairs: 1_000,
        ports: 1_000,
    };
    let mut compiler = Compiler::new("b".parse().unwrap(), limits);
    compiler.update(&Arc::new(snapshot));
    let check = |from: &str, to: &str, port, expected: &str| {
        let flow = Flow {
            from: from.parse().unwrap(),
            to: to.parse().unwrap(),
            protocol: Some(IpProtocol::Tcp),
            port,
        };
        let tables = compiler.tables();
        let verdict = tables.judge(&flow, Direction::In);
        let word = match (verdict.allowed, verdict.unaudited) {
            (true, true) => "allow",
            (true, false) => "audit",
            (false, _) => "deny",
        };
        let said = format!("{word} {}", tables.name(verdict.decider));
        assert_eq!(said, expected, "{flow:?}");
    };
    let (web, db) = ("10.1.0.10", "10.2.0.10");
    check(web, db, 5432, "allow NetworkPolicy shop/db");
    check(web, db, 5433, "deny NetworkPolicy shop/db");
    check(web, db, 81, "audit MeshPolicy trial");
    check(web, db, 85, "deny MeshPolicy front");
    check("10.1.0.70", db, 80, "allow NetworkPolicy shop/db");
    check("10.1.0.7", db, 80, "deny defaultAction");
    check("10.1.0.130", db, 80, "deny NetworkPolicy shop/db");
    check(web, "100.96.0.2", 22, "allow MeshPolicy front");
    check("100.96.0.1", "100.96.0.2", 22, "deny defaultAction");
}

#[test]
fn a_pod_with_somebody_elses_address_is_left_out() {
    for (address, by) in [
        ("100.96.0.2", "100.96.0.2/32 of node b"),
        ("10.2.0.20", "10.2.0.0/24 of node b"),
    ] {
        let (snapshot, problems) = snapshot(&MANIFESTS.replace("10.1.0.10", address));
        assert_eq!(snapshot.policy.pods.len(), 1);
        let expected = format!("status.podIPs: {address} is in {by}; this pod is left out");
        assert!(
            problems.len() == 1 && problems[0].contains(&expected),
            "{problems:?}"
        );
    }
    let twice = MANIFESTS
        .replace("10.1.0.10", "10.5.0.1")
        .replace("10.2.0.10", "10.5.0.1");
    assert_eq!(snapshot(&twice).0.policy.pods.len(), 1);
}

#[test]
fn pods_are_sent_only_where_there_are_policies() {
    let without = MANIFESTS.split("---\n");
    let without = without.filter(|document| !document.contains("Policy"));
    let (snapshot, _) = snapshot(&without.collect::<Vec<_>>().join("---\n"));
    assert!(snapshot.policy.pods.is_empty() && snapshot.policy.namespaces.is_empty());
}
