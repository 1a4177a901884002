//! Endpoints to which connects fail, and those that are full, are left alone for a while.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{mesh::Mesh, node::Process, tool};
use serde_json::Value;

/// What should happen soon has happened by then, or never will; trials come after 10 s, 20 s and 40 s.
const SOON: Duration = Duration::from_secs(90);

const REQUEST_LIMIT: Duration = Duration::from_secs(2);

const URL: &str = "http://10.43.0.77/";

/// Slices of one endpoint each, at the same address of `edge-b1`: behind the port of the second is no
/// server at first.
const GOOD: usize = 0;
const BAD: usize = 1;

/// Of all endpoints the first: nearest come first.
const NEAR: usize = 0;

/// Whether the agent says so of the endpoint of a slice: ejected, chosen.
fn said(mesh: &Mesh, slice: usize) -> Result<(bool, bool)> {
    flags(mesh, slice, ["/ejected", "/chosen"])
}

fn flags(mesh: &Mesh, endpoint: usize, keys: [&str; 2]) -> Result<(bool, bool)> {
    let services = mesh.ask("edge-a1", &["services"])?;
    let services = services.pointer("/services").and_then(Value::as_array);
    let mut services = services.into_iter().flatten();
    let kiosk = services.find(|one| one.pointer("/name").and_then(Value::as_str) == Some("kiosk"));
    let found = kiosk.and_then(|kiosk| kiosk.pointer(&format!("/endpoints/{endpoint}")));
    let found = found.context("no such endpoint")?;
    let flag = |key: &str| found.pointer(key).and_then(Value::as_bool);
    let [one, other] = keys.map(flag);
    let flags = one.zip(other);
    flags.with_context(|| format!("no flags: {found}"))
}

#[test]
fn an_endpoint_that_resets_connects_is_left_alone_and_tried_again() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    mesh.provokes(&["connects fail: no new flows for a while"]);
    mesh.serve("edge-b1", "good", &["http", "good", "[::]:8080"])?;
    let mut manifest = "apiVersion: v1\nkind: Service\nmetadata: {name: kiosk, namespace: shop}\nspec: {clusterIP: \
                        10.43.0.77, ports: [{name: http, port: 80, targetPort: http}]}\n"
        .to_owned();
    for port in [8080, 8081] {
        manifest += &format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: kiosk-{port}, namespace: shop, \
             labels: {{kubernetes.io/service-name: kiosk}}}}\naddressType: IPv4\nports: [{{name: http, port: {port}}}]\n\
             endpoints: [{{addresses: [100.96.2.1], nodeName: edge-b1}}]\n"
        );
    }
    fs::write(mesh.manifests().join("kiosk.yaml"), manifest)?;
    let ask = || mesh.get("edge-a1", &[URL], REQUEST_LIMIT);
    tool::eventually("the service is there, with both", SOON, || {
        ensure!(said(&mesh, BAD)? == (false, true));
        ask().map(drop)
    })?;

    // Whoever asks drives it out, by a few resets, and again when it is on trial.
    tool::eventually("the one without a server is left alone", SOON, || {
        for _ in 0..4 {
            ask().map(drop).ok(); // It may have been the one.
        }
        let flags = said(&mesh, BAD)?;
        ensure!(flags == (true, false), "{flags:?}");
        for _ in 0..4 {
            ask()?;
        }
        Ok(())
    })?;
    assert_eq!(said(&mesh, GOOD)?, (false, true));

    mesh.serve("edge-b1", "bad", &["http", "bad", "[::]:8081"])?;
    tool::eventually("it is tried again, and takes flows", SOON, || {
        let node = ask()?.node;
        ensure!(node == "bad", "{node}");
        Ok(())
    })?;
    tool::eventually("and is as good as the other", SOON, || {
        ask()?;
        let flags = said(&mesh, BAD)?;
        ensure!(flags == (false, true), "{flags:?}");
        Ok(())
    })?;
    mesh.ends_well()
}

/// Kept open until it is killed, by whoever asks at `node`.
fn connection(mesh: &Mesh, number: usize) -> Result<Process> {
    let node = mesh.node("edge-a1")?;
    let address = URL.trim_start_matches("http:/");
    let open = format!("exec 3<>/dev/tcp{address}80 && echo open && exec sleep 600");
    let log = format!("connection{number}");
    let process = node.spawn(&log, &["bash", "-c", &open])?;
    tool::eventually("it connects", REQUEST_LIMIT, || {
        let said = fs::read_to_string(node.dir().join(format!("{log}.log")))?;
        ensure!(said.contains("open"), "{said}");
        Ok(())
    })?;
    Ok(process)
}

#[test]
fn new_connections_go_on_where_the_near_endpoint_is_full_and_return_when_some_end() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    mesh.serve("edge-a1", "near", &["http", "near", "[::]:8080"])?;
    mesh.serve("edge-b1", "far", &["http", "far", "[::]:8080"])?;
    let manifest = "apiVersion: v1
kind: Service
metadata: {name: kiosk, namespace: shop, annotations: {mesh.holdfast.dev/max-connections: '3'}}
spec: {clusterIP: 10.43.0.77, ports: [{name: http, port: 80, targetPort: http}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: kiosk, namespace: shop, labels: {kubernetes.io/service-name: kiosk}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [100.96.1.1], nodeName: edge-a1}, {addresses: [100.96.2.1], nodeName: edge-b1}]
";
    fs::write(mesh.manifests().join("kiosk.yaml"), manifest)?;
    let all_go_to = |wanted: &str| {
        tool::eventually(&format!("all go to the {wanted} one"), SOON, || {
            for _ in 0..4 {
                let node = mesh.get("edge-a1", &[URL], REQUEST_LIMIT)?.node;
                ensure!(node == wanted, "{node}");
            }
            Ok(())
        })
    };
    all_go_to("near")?;
    let open = (0..3).map(|number| connection(&mesh, number));
    let mut open: Vec<_> = open.collect::<Result<_>>()?;
    all_go_to("far")?;
    assert_eq!(flags(&mesh, NEAR, ["/full", "/chosen"])?, (true, false));
    // It stays so while they are open.
    std::thread::sleep(Duration::from_secs(2));
    all_go_to("far")?;
    for mut connection in open.drain(..2) {
        connection.kill()?;
    }
    all_go_to("near")?;
    assert_eq!(flags(&mesh, NEAR, ["/full", "/chosen"])?, (false, true));
    mesh.ends_well()
}
