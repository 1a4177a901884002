//! A service with `least-latency` goes by what the ways to its endpoints cost, as its client's node
//! measures it.

use std::{fs, time::Duration};

use anyhow::{Result, ensure};
use netns_tests::{link::Impairment, mesh::Mesh, nat::NatKind, tool};

/// Costs are told anew at most every 10 s, and have to be measured before.
const SOON: Duration = Duration::from_secs(120);

const REQUEST_LIMIT: Duration = Duration::from_secs(2);

const URL: &str = "http://10.43.0.78/";

/// To the internet and back, of the sites with endpoints. Both are in one region, which is not the client's:
/// one tier.
const NEAR: Duration = Duration::from_millis(5);
const FAR: Duration = Duration::from_millis(60);

/// Nobody measures the other while nobody goes there: what was near has to become worse than the other last was. (As
/// far, and chance decides who looks first: that took 17 s, 72 s, or more than 120.)
const FARTHER: Duration = Duration::from_millis(120);

const KIOSK: &str = "apiVersion: v1
kind: Service
metadata:
  name: kiosk
  namespace: shop
  annotations: {mesh.holdfast.dev/policy: least-latency}
spec: {clusterIP: 10.43.0.78, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: kiosk-1, namespace: shop, labels: {kubernetes.io/service-name: kiosk}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [100.96.2.1], nodeName: edge-b1}
- {addresses: [100.96.3.1], nodeName: edge-c1}
";

fn delay(mesh: &Mesh, site: &str, delay: Duration) -> Result<()> {
    let link = Impairment::delay_loss(delay, 0.0);
    mesh.site(site)?.link().set(link)
}

/// By chance, both would answer some of 16 flows: all from one of two is a chance below 10⁻⁴.
fn goes_to(mesh: &Mesh, wanted: &str) -> Result<()> {
    for _ in 0..16 {
        let node = mesh.get("edge-a1", &[URL], REQUEST_LIMIT)?.node;
        ensure!(node == wanted, "{node} answers, not {wanted}");
    }
    Ok(())
}

#[test]
fn flows_go_where_the_way_is_short_and_move_when_it_is_not_any_more() -> Result<()> {
    let mut mesh = Mesh::two_sites()?;
    let far = Impairment::delay_loss(FAR, 0.0);
    let wan = [203, 0, 113, 3].into();
    mesh.add_site("site-c", NatKind::PortRestricted, wan, far, &["edge-c1"])?;
    delay(&mesh, "site-b", NEAR)?;
    mesh.start_agent("edge-c1")?;
    mesh.agent_ready("edge-c1", 3)?;
    for node in ["edge-b1", "edge-c1"] {
        mesh.serve(node, "kiosk", &["http", node, "[::]:8080"])?;
    }
    fs::write(mesh.manifests().join("kiosk.yaml"), KIOSK)?;
    tool::eventually("flows go to the near one", SOON, || {
        goes_to(&mesh, "edge-b1")
    })?;
    delay(&mesh, "site-b", FARTHER)?;
    delay(&mesh, "site-c", NEAR)?;
    tool::eventually("flows go to the other, which is near now", SOON, || {
        goes_to(&mesh, "edge-c1")
    })?;
    mesh.ends_well()
}
