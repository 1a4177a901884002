use mesh_core::policy::resources::{IpProtocol, Ports};

use super::*;

const MESH_POLICY: &str = "apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshPolicy
metadata: {name: shop}
spec:
  audit: true
  rules:
  - action: allow
    from: [{nodes: [a], sites: [s1]}, {serviceAccounts: [shop/front]}]
    to: [{podSelector: {matchExpressions: [{key: app, operator: In, values: [db]}]}}]
    ports: [{port: 5432, endPort: 5433}, {protocol: ICMP}]
";

const NETWORK_POLICY: &str = "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  podSelector: {matchLabels: {role: db}}
  policyTypes: [Ingress, Egress]
  ingress:
  - from:
    - ipBlock: {cidr: 172.17.0.0/16, except: [172.17.1.0/24]}
    - namespaceSelector: {matchLabels: {project: shop}}
    - podSelector: {matchLabels: {role: frontend}}
    ports: [{protocol: TCP, port: 6379}, {port: sql}, {protocol: UDP}]
  egress:
  - to: [{ipBlock: {cidr: 10.0.0.0/24}}]
    ports: [{port: 32000, endPort: 32768}]
";

fn one(text: &str) -> Object {
    let parsed = parse_file("p.yaml", text);
    assert_eq!(parsed.problems, Vec::<String>::new());
    parsed.objects[0].object.clone()
}

#[test]
fn a_mesh_policy_is_read_and_each_wrong_field_is_named() {
    let Object::MeshPolicy(policy) = one(MESH_POLICY) else {
        panic!("not a policy");
    };
    assert!(policy.audit);
    let ports: Vec<_> = policy.rules[0]
        .ports
        .iter()
        .map(|port| &port.ports)
        .collect();
    assert_eq!(ports, [&Ports::Range(5432, 5433), &Ports::All]);
    for (good, bad, expected) in [
        (
            "action: allow",
            "action: permit",
            "spec.rules[0].action: \"permit\" is not one of allow and deny",
        ),
        (
            "nodes: [a], sites: [s1]",
            "",
            "spec.rules[0].from[0]: says nothing: leave the list out for anybody",
        ),
        (
            "[shop/front]",
            "[front]",
            "spec.rules[0].from[1].serviceAccounts[0]: \"front\" is not namespace/name",
        ),
        (
            "operator: In",
            "operator: Gt",
            "spec.rules[0].to[0].podSelector.matchExpressions[0].operator: \"Gt\" is not one of",
        ),
        (
            "values: [db]",
            "values: []",
            "matchExpressions[0].values: In has values: false",
        ),
        (
            "endPort: 5433",
            "endPort: 5431",
            "spec.rules[0].ports[0].endPort: 5431 is less than port 5432",
        ),
        (
            "{protocol: ICMP}",
            "{protocol: ICMP, port: 8}",
            "spec.rules[0].ports[1].port: ICMP has no ports",
        ),
        ("audit:", "audits:", "spec.audits: unknown field"),
    ] {
        let text = MESH_POLICY.replace(good, bad);
        assert_ne!(text, MESH_POLICY);
        let problems = parse_file("p.yaml", &text).problems;
        assert!(
            problems.len() == 1 && problems[0].contains(expected),
            "{bad}: {problems:?}"
        );
    }
}

#[test]
fn a_network_policy_is_read_as_upstream_reads_it() {
    let sides = |text: &str| {
        let Object::NetworkPolicy(policy) = one(text) else {
            panic!("not a policy");
        };
        (policy.ingress, policy.egress)
    };
    let (ingress, egress) = sides(NETWORK_POLICY);
    let rule = &ingress.unwrap()[0];
    assert_eq!(rule.peers.len(), 3);
    let ports: Vec<_> = rule
        .ports
        .iter()
        .map(|port| (port.protocol, &port.ports))
        .collect();
    let expected = [
        (IpProtocol::Tcp, &Ports::Range(6379, 6379)),
        (IpProtocol::Tcp, &Ports::Named("sql".to_owned())),
        (IpProtocol::Udp, &Ports::All),
    ];
    assert_eq!(ports, expected);
    assert_eq!(
        egress.unwrap()[0].ports[0].ports,
        Ports::Range(32_000, 32_768)
    );
    // Without types: ingress always, egress where it has rules.
    let (ingress, egress) =
        sides(&NETWORK_POLICY.replace("  policyTypes: [Ingress, Egress]\n", ""));
    assert!(ingress.is_some() && egress.is_some());
    let (ingress, egress) = sides(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: deny}\nspec: {podSelector: {}}\n",
    );
    assert_eq!((ingress, egress), (Some(Vec::new()), None));
    let (ingress, egress) = sides(&NETWORK_POLICY.replace("[Ingress, Egress]", "[Egress]"));
    assert!(ingress.is_none() && egress.is_some());
    for (good, bad, expected) in [
        (
            "[Ingress, Egress]",
            "[Out]",
            "spec.policyTypes[0]: \"Out\" is not one of Ingress and Egress",
        ),
        (
            "172.17.1.0/24",
            "172.18.1.0/24",
            "from[0].ipBlock.except: 172.18.1.0/24 is not in 172.17.0.0/16",
        ),
        (
            "port: sql",
            "port: sql, endPort: 9",
            "spec.ingress[0].ports[1].endPort: goes with a number",
        ),
        (
            "protocol: UDP",
            "protocol: ICMP",
            "spec.ingress[0].ports[2].protocol: \"ICMP\" is not one of TCP, UDP, SCTP",
        ),
        (
            "- podSelector: {matchLabels: {role: frontend}}",
            "- {}",
            "spec.ingress[0].from[2]: says not either",
        ),
    ] {
        let text = NETWORK_POLICY.replace(good, bad);
        assert_ne!(text, NETWORK_POLICY);
        let problems = parse_file("p.yaml", &text).problems;
        assert!(
            problems.len() == 1 && problems[0].contains(expected),
            "{bad}: {problems:?}"
        );
    }
}

#[test]
fn a_pod_that_ended_or_has_no_address_is_nobody() {
    let pod = |status: &str| {
        let text = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\nspec:\n  nodeName: a\n  containers: [{{name: c, ports: [{{name: sql, containerPort: 5432}}, {{containerPort: 1}}]}}]\nstatus: {status}\n"
        );
        let Object::Pod(pod) = one(&text) else {
            panic!("not a pod");
        };
        pod
    };
    let running = pod("{phase: Running, podIPs: [{ip: 10.1.0.7}, {ip: 'fd01::7'}]}").unwrap();
    assert_eq!((running.addresses.len(), running.ports.len()), (2, 1));
    assert_eq!(running.service_account, "default");
    assert!(pod("{phase: Running, podIP: 10.1.0.7}").is_some());
    assert!(pod("{phase: Succeeded, podIP: 10.1.0.7}").is_none());
    assert!(pod("{phase: Pending}").is_none());
}
