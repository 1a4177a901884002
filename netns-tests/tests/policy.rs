//! Who may speak with whom, with the real binaries: from the manifest to the kernel of two nodes.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicU8, Ordering},
    time::Duration,
};

use anyhow::{Result, bail, ensure};
use netns_tests::{mesh::Mesh, tool};
use serde_json::Value;

/// Until a manifest is in force on both nodes.
const SOON: Duration = Duration::from_secs(20);

/// What is not there after that is not coming: 20 round trips.
const ANSWER_LIMIT: Duration = Duration::from_millis(500);

const A: &str = "edge-a1";
const B: &str = "edge-b1";
const PORT: u16 = 9100;

/// Also of what may pass, so that only the port tells them apart.
const OTHER_PORT: u16 = 9101;

fn policy(mesh: &Mesh, audit: bool) -> Result<()> {
    let text = format!(
        "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshPolicy\nmetadata: {{name: no-{PORT}}}\nspec:\n  audit: {audit}\n  \
         rules:\n  - action: deny\n    from: [{{nodes: [{A}]}}]\n    to: [{{nodes: [{B}]}}]\n    ports: [{{port: {PORT}}}]\n"
    );
    Ok(fs::write(mesh.manifests().join("policy.yaml"), text)?)
}

fn connect(mesh: &Mesh, from: &str, to: &str, port: u16) -> Result<TcpStream> {
    let to = SocketAddr::new(mesh.resolve(from, &format!("{to}.mesh"))?, port);
    let connected = mesh
        .node(from)?
        .enter(|| TcpStream::connect_timeout(&to, ANSWER_LIMIT))?;
    Ok(connected?)
}

fn listen(mesh: &Mesh, on: &str, port: u16) -> Result<TcpListener> {
    let listening = mesh
        .node(on)?
        .enter(|| TcpListener::bind(("0.0.0.0", port)))?;
    Ok(listening?)
}

/// Whether what one end says comes to the other, behind all that was kept back before.
fn talk(from: &mut TcpStream, to: &mut TcpStream) -> Result<()> {
    static SAID: AtomicU8 = AtomicU8::new(0);
    let said = SAID.fetch_add(1, Ordering::Relaxed);
    to.set_read_timeout(Some(ANSWER_LIMIT))?;
    from.write_all(&[said])?;
    let mut heard = [!said];
    while heard != [said] {
        to.read_exact(&mut heard)?;
    }
    Ok(())
}

fn silent(from: &mut TcpStream, to: &mut TcpStream) -> Result<()> {
    match talk(from, to) {
        Ok(()) => bail!("they still talk"),
        Err(_) => Ok(()),
    }
}

fn counted(mesh: &Mesh, node: &str, counter: &str) -> Result<u64> {
    let status = mesh.status(node)?;
    let count = status.pointer(&format!("/policy_packets/{counter}"));
    Ok(count.and_then(Value::as_u64).unwrap_or_default())
}

fn restart(mesh: &Mesh, node: &str, lines: &str) -> Result<()> {
    mesh.take(node, "mesh-agent")?.terminate(SOON)?;
    mesh.start_agent_with(node, lines)?;
    mesh.agent_ready(node, 2)
}

#[test]
fn a_policy_denies_a_port_cuts_the_open_flow_and_audits() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let (listener, other) = (listen(&mesh, B, PORT)?, listen(&mesh, B, OTHER_PORT)?);
    let back = listen(&mesh, A, PORT)?;
    tool::eventually("a path", SOON, || connect(&mesh, A, B, OTHER_PORT))?;
    let mut client = connect(&mesh, A, B, PORT)?;
    let (mut server, _) = listener.accept()?;
    talk(&mut client, &mut server)?;
    let status = mesh.status(A)?;
    ensure!(status.pointer("/policy_enforced") == Some(&Value::Bool(false)));

    policy(&mesh, false)?;
    tool::eventually("the open flow is cut", SOON, || {
        silent(&mut client, &mut server)
    })?;
    silent(&mut server, &mut client)?;
    let refused = connect(&mesh, A, B, PORT);
    ensure!(refused.is_err(), "{refused:?}");
    connect(&mesh, A, B, OTHER_PORT)?;
    other.accept()?;
    connect(&mesh, B, A, PORT)?;
    back.accept()?;
    // The sender drops it already, and says who decided.
    ensure!(counted(&mesh, A, "denied")? > 0);
    let status = mesh.status(A)?;
    let events = status.pointer("/policy_events").map(Value::to_string);
    let events = events.unwrap_or_default();
    ensure!(
        events.contains("denied by MeshPolicy no-9100: TCP"),
        "{events}"
    );

    policy(&mesh, true)?;
    tool::eventually("the flow goes on", SOON, || talk(&mut client, &mut server))?;
    talk(&mut server, &mut client)?;
    for node in [A, B] {
        ensure!(counted(&mesh, node, "audited")? > 0, "{node}");
    }
    connect(&mesh, A, B, PORT)?;
    // Now it is remembered.
    policy(&mesh, false)?;
    tool::eventually("the open flow is cut again", SOON, || {
        silent(&mut client, &mut server)
    })?;
    silent(&mut server, &mut client)?;
    ensure!(counted(&mesh, A, "flow_ended")? > 0);

    fs::remove_file(mesh.manifests().join("policy.yaml"))?;
    tool::eventually("nothing is enforced", SOON, || {
        let status = mesh.status(B)?;
        ensure!(status.pointer("/policy_enforced") == Some(&Value::Bool(false)));
        Ok(())
    })?;
    tool::eventually("the flow goes on once more", SOON, || {
        talk(&mut client, &mut server)
    })?;
    mesh.all_run()
}

#[test]
fn the_receiver_enforces_what_the_sender_does_not_also_without_the_controller() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let _listener = listen(&mesh, B, PORT)?;
    let _other = listen(&mesh, B, OTHER_PORT)?;
    restart(&mesh, A, "policy = false\n")?;
    tool::eventually("a connection", SOON, || connect(&mesh, A, B, PORT))?;
    policy(&mesh, false)?;
    let denied = || {
        tool::eventually("the receiver denies it", SOON, || {
            let refused = connect(&mesh, A, B, PORT);
            ensure!(refused.is_err());
            ensure!(counted(&mesh, B, "denied")? > 0);
            Ok(())
        })
    };
    denied()?;
    connect(&mesh, A, B, OTHER_PORT)?;
    let status = mesh.status(A)?.to_string();
    ensure!(
        status.contains("policies are not enforced here"),
        "{status}"
    );
    // What is on the disk is enough.
    mesh.kill("cloud", "mesh-controller")?;
    restart(&mesh, B, "")?;
    denied()?;
    tool::eventually("the other port answers", SOON, || {
        connect(&mesh, A, B, OTHER_PORT)
    })?;
    Ok(())
}
