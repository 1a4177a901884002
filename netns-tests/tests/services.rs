//! What stock tools have of a service while its endpoints come and go and the agent is replaced.

use std::{fs, time::Duration};

use anyhow::{Result, ensure};
use netns_tests::{
    mesh::{Mesh, word},
    node::{Node, Process},
    tool,
};
use serde_json::Value;

/// What should happen soon has happened by then, or never will.
const SOON: Duration = Duration::from_secs(20);

/// How long the streams go on: longer than what happens to them meanwhile.
const STREAM_S: u32 = 30;

/// The endpoints, each behind the node of its address.
const FAR: &str = "{addresses: [100.96.2.1], nodeName: edge-b1}";
const NEAR: &str = "{addresses: [100.96.1.1], nodeName: edge-a1}";

/// Lines of the stream that is compared, 20 a second.
const LINES: u32 = STREAM_S * 20;

fn kiosk(mesh: &Mesh, endpoints: &[&str]) -> Result<()> {
    let text = format!(
        "apiVersion: v1
kind: Service
metadata: {{name: kiosk, namespace: shop}}
spec: {{clusterIP: 10.43.0.99, ports: [{{name: echo, port: 80}}, {{name: bulk, port: 5201}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: kiosk, namespace: shop, labels: {{kubernetes.io/service-name: kiosk}}}}
addressType: IPv4
ports: [{{name: echo, port: 8080}}, {{name: bulk, port: 5201}}]
endpoints: [{}]
",
        endpoints.join(", ")
    );
    Ok(fs::write(mesh.manifests().join("kiosk.yaml"), text)?)
}

/// Waits until these are the endpoints, and new connections are led to `expected`: the far one says what it was told.
fn leads(mesh: &Mesh, client: &Node, endpoints: &[&str], expected: &str) -> Result<()> {
    kiosk(mesh, endpoints)?;
    let words = "echo far | socat -t 1 - TCP4:10.43.0.99:80,connect-timeout=1";
    tool::eventually("new connections are led there", SOON, || {
        let services = mesh.ask("edge-a1", &["services"])?;
        let all = services.pointer("/services").and_then(Value::as_array);
        let kiosk = all.and_then(|all| all.iter().find(|one| word(one, "name") == "kiosk"));
        let there = kiosk.and_then(|kiosk| kiosk.pointer("/endpoints")?.as_array().map(Vec::len));
        ensure!(there == Some(endpoints.len()), "{there:?} endpoints");
        let said = client.run(&["sh", "-c", words], SOON)?.ok()?;
        ensure!(said.trim() == expected, "{said} and not {expected}");
        Ok(())
    })
}

fn goes_on(stream: &mut Process) -> Result<()> {
    stream.says_more(6, SOON)
}

/// Both ends of the streams are processes of another node than the endpoint's: each packet goes by the tunnel that is the
/// agent's.
#[test]
fn streams_go_on_while_endpoints_come_and_go_and_the_agent_is_replaced() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let (client, far) = (mesh.node("edge-a1")?, mesh.node("edge-b1")?);
    let echo = ["socat", "TCP4-LISTEN:8080,fork,reuseaddr", "EXEC:cat"];
    let _echo = far.spawn("echo", &echo)?;
    let _bulk = far.spawn("iperf3", &["iperf3", "-s"])?;
    let near = [
        "socat",
        "TCP4-LISTEN:8080,fork,reuseaddr",
        "SYSTEM:echo near",
    ];
    let _near = client.spawn("near", &near)?;
    let leads = |endpoints: &[&str], expected| leads(&mesh, &client, endpoints, expected);
    leads(&[FAR], "far")?;

    let stream = format!(
        "for line in $(seq {LINES}); do echo $line; sleep 0.05; done | socat -t 10 - TCP4:10.43.0.99:80"
    );
    let mut stream = client.spawn("stream", &["sh", "-c", &stream])?;
    let seconds = STREAM_S.to_string();
    let bulk = ["iperf3", "-c", "10.43.0.99", "-b", "20M", "-t", &seconds];
    let mut bulk = client.spawn("bulk", &bulk)?;
    goes_on(&mut stream)?;
    // Their own endpoint is one of two, gone, back, and gone again.
    for killed in [false, true] {
        leads(&[FAR, NEAR], "near")?;
        goes_on(&mut stream)?;
        leads(&[NEAR], "near")?;
        goes_on(&mut stream)?;
        let mut agent = mesh.take("edge-a1", "mesh-agent")?;
        if killed {
            agent.kill()?;
        } else {
            agent.terminate(SOON)?;
        }
        mesh.start_agent("edge-a1")?;
        mesh.agent_ready("edge-a1", 2)?;
        goes_on(&mut stream)?;
        leads(&[FAR], "far")?;
    }
    let limit = Duration::from_secs(u64::from(STREAM_S) + 30);
    ensure!(bulk.wait(limit)?.success(), "{}", bulk.log());
    ensure!(stream.wait(limit)?.success(), "{}", stream.log());
    let expected: String = (1..=LINES).map(|line| format!("{line}\n")).collect();
    ensure!(stream.log() == expected, "{}", stream.log());
    mesh.ends_well()
}
