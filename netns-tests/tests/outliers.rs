//! Endpoints to which connects fail are left alone for a while.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{mesh::Mesh, tool};
use serde_json::Value;

/// What should happen soon has happened by then, or never will; trials come after 10 s, 20 s and 40 s.
const SOON: Duration = Duration::from_secs(90);

const REQUEST_LIMIT: Duration = Duration::from_secs(2);

const URL: &str = "http://10.43.0.77/";

/// Slices of one endpoint each, at the same address of `edge-b1`: behind the port of the second is no
/// server at first.
const GOOD: usize = 0;
const BAD: usize = 1;

/// Whether the agent says so of the endpoint of a slice: ejected, chosen.
fn said(mesh: &Mesh, slice: usize) -> Result<(bool, bool)> {
    let services = mesh.ask("edge-a1", &["services"])?;
    let services = services.pointer("/services").and_then(Value::as_array);
    let mut services = services.into_iter().flatten();
    let kiosk = services.find(|one| one.pointer("/name").and_then(Value::as_str) == Some("kiosk"));
    let found = kiosk.and_then(|kiosk| kiosk.pointer(&format!("/endpoints/{slice}")));
    let found = found.context("no such endpoint")?;
    let flag = |key: &str| found.pointer(key).and_then(Value::as_bool);
    let flags = flag("/ejected").zip(flag("/chosen"));
    flags.with_context(|| format!("no flags: {found}"))
}

#[test]
fn an_endpoint_that_resets_connects_is_left_alone_and_tried_again() -> Result<()> {
    let mesh = Mesh::two_sites()?;
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
    })
}
