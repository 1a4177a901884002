//! Endpoints to which connects fail are left alone for a while.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{mesh::Mesh, tool};
use serde_json::Value;

/// What should happen soon has happened by then, or never will; a trial comes after ten seconds.
const SOON: Duration = Duration::from_secs(30);

const REQUEST_LIMIT: Duration = Duration::from_secs(2);

const URL: &str = "http://10.43.0.77/";

/// On `edge-b1`: the first has a server, the second none at first.
const GOOD: &str = "100.96.2.1";
const BAD: &str = "10.77.0.1";

/// Whether the agent says so of the endpoint: ejected, chosen.
fn said(mesh: &Mesh, address: &str) -> Result<(bool, bool)> {
    let services = mesh.ask("edge-a1", &["services"])?;
    let services = services.pointer("/services").and_then(Value::as_array);
    let endpoints = services.into_iter().flatten().filter_map(|service| {
        let list = service.pointer("/endpoints")?;
        list.as_array()
    });
    let found = endpoints.flatten().find(|one| {
        let at = one.pointer("/address").and_then(Value::as_str);
        at == Some(address)
    });
    let found = found.with_context(|| format!("no {address}"))?;
    let flag = |key: &str| found.pointer(key).and_then(Value::as_bool);
    let flags = flag("/ejected").zip(flag("/chosen"));
    flags.with_context(|| format!("no flags: {found}"))
}

#[test]
fn an_endpoint_that_resets_connects_is_left_alone_and_tried_again() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let path = mesh.manifests().join("mesh.yaml");
    let text = fs::read_to_string(&path)?;
    let own = "overlayIPv4: 100.96.2.1\n";
    ensure!(text.contains(own), "{text}");
    let with_prefix = format!("{own}  prefixes: [\"10.77.0.0/24\"]\n");
    fs::write(&path, text.replace(own, &with_prefix))?;
    let b1 = mesh.node("edge-b1")?;
    tool::ip(b1.netns(), &format!("addr add {BAD}/32 dev lo\n"))?;
    mesh.serve("edge-b1", "good", &["http", "good", &format!("{GOOD}:8080")])?;
    let endpoints = [GOOD, BAD].map(|at| format!("{{addresses: [{at}], nodeName: edge-b1}}"));
    let manifest = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: kiosk, namespace: shop}}\nspec: {{clusterIP: 10.43.0.77, \
         ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n---\napiVersion: discovery.k8s.io/v1\n\
         kind: EndpointSlice\nmetadata: {{name: kiosk-1, namespace: shop, labels: {{kubernetes.io/service-name: kiosk}}}}\n\
         addressType: IPv4\nports: [{{name: http, port: 8080}}]\nendpoints: [{}]\n",
        endpoints.join(", ")
    );
    fs::write(mesh.manifests().join("kiosk.yaml"), manifest)?;
    let ask = || mesh.get("edge-a1", &[URL], REQUEST_LIMIT);
    tool::eventually("the service is there, with both", SOON, || {
        ensure!(said(&mesh, BAD)? == (false, true));
        ask().map(drop)
    })?;

    // Whoever asks drives it out, by a few resets.
    tool::eventually("the one without a server is left alone", SOON, || {
        for _ in 0..16 {
            ask()?;
        }
        Ok(())
    })?;
    tool::eventually("and the agent says why", SOON, || {
        let flags = said(&mesh, BAD)?;
        ensure!(flags == (true, false), "{flags:?}");
        Ok(())
    })?;
    assert_eq!(said(&mesh, GOOD)?, (false, true));

    mesh.serve("edge-b1", "bad", &["http", "bad", &format!("{BAD}:8080")])?;
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
