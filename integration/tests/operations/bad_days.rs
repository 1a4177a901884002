//! Who may not, and what happens when a part is gone or slow.

use std::{fs, thread, time::Duration};

use anyhow::{Result, ensure};
use netns_tests::tool;

use crate::world::{EDGE, GATEWAY, PATIENCE, Transport, UNANSWERED, World, kubelet_client, rules};

#[test]
fn strangers_other_ports_and_what_is_not_the_meshs_are_refused_with_reasons() -> Result<()> {
    let world = World::new(Transport::Tls)?;
    let own = kubelet_client(&world)?;
    let own = own.each_ref().map(String::as_str);
    // On the gateway's own loopback somebody listens, whom nobody may reach.
    let loopback = world
        .mesh
        .cloud()
        .enter(|| std::net::TcpListener::bind("127.0.0.1:10250"))??;
    loopback.set_nonblocking(true)?;
    for (user, host, reason) in [
        (
            "mallory",
            "edge-a1:10250",
            "no rule of this proxy names the client",
        ),
        (
            "prometheus",
            "edge-a1:9999",
            "no rule lets the client reach port 9999 of edge-a1",
        ),
        (
            "prometheus",
            "edge-b1:10250",
            "no rule lets the client reach port 10250 of edge-b1",
        ),
        ("prometheus", "127.0.0.1:10250", "is no node of the mesh"),
        ("prometheus", "localhost:10250", "is no node of the mesh"),
        (
            "prometheus",
            "198.51.100.20:10250",
            "is no node of the mesh",
        ),
        ("prometheus", "192.168.1.11:10250", "is no node of the mesh"),
    ] {
        let url = format!("https://{host}/metrics");
        let said = world.curl(user, &[&own[..], &[&url]].concat())?;
        ensure!(!said.status.success(), "{user} {host}: {said:?}");
        ensure!(said.stderr.contains("403"), "{user} {host}: {said:?}");
        let line = world.audited("it is written down", |line| line["asked"] == host)?;
        ensure!(line["event"] == "refused", "{line}");
        let why = line["why"].as_str().unwrap_or_default();
        ensure!(why.contains(reason), "{line}");
    }
    ensure!(
        loopback.accept().is_err(),
        "somebody reached the gateway's loopback"
    );
    // A certificate of somebody else's authority is not listened to.
    let other = integration_authority(&world)?;
    let said = world.curl(&other, &["https://edge-a1:10250/metrics"])?;
    ensure!(!said.status.success(), "{said:?}");
    ensure!(world.count("allowed")? == 0, "{:?}", world.audit()?);

    // An API server that may not is told so, and tells `kubectl`.
    world
        .mesh
        .take(GATEWAY, "mesh-agent")?
        .terminate(PATIENCE)?;
    world.start_gateway(&rules("cn:another"))?;
    let said = tool::eventually("the proxy refuses", PATIENCE, || {
        let said = world.kubectl(&["logs", "web"])?;
        ensure!(said.stderr.contains("code 403"), "{said:?}");
        Ok(said)
    })?;
    ensure!(
        said.stderr
            .contains("no rule of this proxy names the client"),
        "{said:?}"
    );
    world.mesh.ends_well()
}

/// A client whose certificate is of the API server's authority, which is not the proxy's.
fn integration_authority(world: &World) -> Result<String> {
    let issued = world.standin.issue_client("prometheus", "monitoring")?;
    fs::write(world.file("other.crt"), &issued.certificate_pem)?;
    fs::write(world.file("other.key"), &issued.key_pem)?;
    Ok("other".to_owned())
}

#[test]
fn without_the_controller_and_after_a_restart_kubectl_works_and_a_lost_node_is_told() -> Result<()>
{
    let world = World::new(Transport::Uds)?;
    world.kubectl(&["logs", "web"])?.ok()?;
    world.mesh.kill(GATEWAY, "mesh-controller")?;
    world.kubectl(&["logs", "web"])?.ok()?;

    // The proxy's power goes in the middle of a session.
    let mut follows = world.spawn_kubectl("cut", &["logs", "web", "-f"])?;
    let opened = world.audited("it follows", |line| line["event"] == "opened")?;
    tool::eventually("it hears", PATIENCE, || {
        ensure!(follows.log().ends_with("second\n"), "{}", follows.log());
        Ok(())
    })?;
    world.mesh.kill(GATEWAY, "mesh-agent")?;
    follows.wait(PATIENCE)?;
    let said = world.kubectl(&["logs", "web"])?;
    ensure!(said.stderr.contains("dialing proxy"), "{said:?}");
    // What was opened is on the disk, though nobody could write how it ended; the log goes on.
    let before = world.audit()?;
    ensure!(before.contains(&opened), "{before:#?}");
    fs::remove_file(world.file("proxy.sock"))?;
    world.start_gateway(&rules("cn:kube-apiserver"))?;
    let all = |said: &str| said == "first\nsecond\n";
    tool::eventually("the new agent serves from its disk", PATIENCE, || {
        let said = world.kubectl(&["logs", "web"])?;
        ensure!(all(&said.stdout), "{said:?}");
        Ok(())
    })?;
    let after = world.audit()?;
    ensure!(after.starts_with(&before) && after.len() > before.len());

    // The node goes in the middle of a session.
    let mut follows = world.spawn_kubectl("lost", &["logs", "web", "-f"])?;
    tool::eventually("it hears", PATIENCE, || {
        ensure!(follows.log().ends_with("second\n"), "{}", follows.log());
        Ok(())
    })?;
    world.mesh.kill(EDGE, "mesh-agent")?;
    let gone = std::time::Instant::now();
    follows.wait(PATIENCE)?;
    ensure!(
        gone.elapsed() < 3 * UNANSWERED,
        "it took {:?}",
        gone.elapsed()
    );
    let closed = world.audited("it is written down", |line| {
        let why = line["why"].as_str().unwrap_or_default();
        line["event"] == "closed" && why.contains("timed out")
    })?;
    ensure!(closed["node"] == EDGE, "{closed}");
    let said = world.kubectl(&["logs", "web"])?;
    ensure!(
        !said.status.success() && said.stderr.contains("code 504"),
        "{said:?}"
    );
    ensure!(
        said.stderr.contains("no answer from port 10250 of edge-a1"),
        "{said:?}"
    );

    // And comes back.
    world.mesh.start_agent(EDGE)?;
    tool::eventually("the node is back", PATIENCE, || {
        let said = world.kubectl(&["logs", "web"])?;
        ensure!(all(&said.stdout), "{said:?}");
        Ok(())
    })?;
    world.mesh.ends_well()
}

#[test]
fn a_reader_that_stands_still_costs_the_agent_nothing_and_holds_up_nobody() -> Result<()> {
    let world = World::new(Transport::Uds)?;
    let line = "x".repeat(1_023) + "\n";
    world.log(&line.repeat(48 << 10))?; // 48 MiB
    let agent = world.mesh.take(GATEWAY, "mesh-agent")?;
    world.kubectl(&["logs", "web", "--tail=1"])?.ok()?;
    let before_kib = agent.resident_kib()?;
    let follows = world.spawn_kubectl("slow", &["logs", "web", "-f"])?;
    tool::eventually("it begins", PATIENCE, || {
        ensure!(follows.log().len() > 1 << 20);
        Ok(())
    })?;
    let stop = |signal: &str| tool::run("kill", &[signal, &follows.id().to_string()], "");
    stop("-STOP")?;
    // Until nothing moves any more.
    let passed = || {
        let lines = world.kubectl(&["logs", "web", "--tail=1"])?.ok()?;
        ensure!(lines == line, "the others are held up");
        thread::sleep(Duration::from_millis(300));
        anyhow::Ok(follows.log().len())
    };
    let mut last = passed()?;
    for _ in 0..20 {
        let now = passed()?;
        if now == last {
            break;
        }
        last = now;
    }
    ensure!(
        last < 40 << 20,
        "{last} bytes have passed: nothing was held back"
    );
    let grown_kib = agent.resident_kib()?.saturating_sub(before_kib);
    println!("a session that stands still: {grown_kib} KiB more resident");
    ensure!(grown_kib < 2_048, "{grown_kib} KiB");
    stop("-CONT")?;
    tool::eventually("it goes on to the end", PATIENCE, || {
        let length = follows.log().len();
        ensure!(length == (48 << 20) + "first\nsecond\n".len(), "{length}");
        Ok(())
    })?;
    world.mesh.put(GATEWAY, "mesh-agent", agent);
    world.mesh.ends_well()
}

#[test]
fn certificates_are_replaced_while_it_serves_and_bad_ones_are_a_problem() -> Result<()> {
    let world = World::new(Transport::Tls)?;
    world.kubectl(&["logs", "web"])?.ok()?;
    let good = fs::read(world.file("clients.crt"))?;
    world
        .mesh
        .provokes(&["the proxy goes on with the TLS files that it has"]);
    fs::write(world.file("clients.crt"), "no certificate")?;
    // Those from before go on, and the status says so.
    world.kubectl(&["logs", "web"])?.ok()?;
    let status = world.mesh.status(GATEWAY)?;
    let problems = status["problems"].to_string();
    ensure!(
        problems.contains("client_ca") && problems.contains("CERTIFICATE"),
        "{status}"
    );
    // Another authority's: the API server is a stranger now.
    fs::write(world.file("clients.crt"), world.standin.ca_pem())?;
    let said = world.kubectl(&["logs", "web"])?;
    ensure!(!said.status.success(), "{said:?}");
    fs::write(world.file("clients.crt"), good)?;
    world.kubectl(&["logs", "web"])?.ok()?;
    let status = world.mesh.status(GATEWAY)?;
    ensure!(
        !status["problems"].to_string().contains("client_ca"),
        "{status}"
    );
    world.mesh.ends_well()
}
