//! A site that is cut off goes on with what its nodes have, and they give each other what is newer; nobody takes it back.

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use netns_tests::{mesh::Mesh, tool};
use serde_json::Value;

/// What should happen soon has happened by then, or never will.
const SOON: Duration = Duration::from_secs(20);

/// A node that boots serves within this what it can serve alone, and finds those that are near.
const UP: Duration = Duration::from_secs(1);

/// Boots with each clock: the machine may have had something else to do during one of them.
const BOOTS: usize = 3;

/// A node whose mesh is well sends and receives less at rest: its links' keepalives, and acknowledgements.
const QUIET_BYTES_PER_S: u64 = 2048;

const NODES: [&str; 2] = ["edge-a1", "edge-a2"];

const KIOSK: &str = "kiosk.shop.svc.cluster.local";

/// A service of one endpoint, on `edge-a1`, at this port.
fn kiosk(mesh: &Mesh, address: &str) -> Result<()> {
    let text = format!(
        "apiVersion: v1
kind: Service
metadata: {{name: kiosk, namespace: shop}}
spec: {{clusterIP: {address}, ports: [{{port: 80, protocol: TCP}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: kiosk-1, namespace: shop, labels: {{kubernetes.io/service-name: kiosk}}}}
addressType: IPv4
ports: [{{port: 8080, protocol: TCP}}]
endpoints: [{{addresses: [100.96.1.1], nodeName: edge-a1, conditions: {{ready: true}}}}]
"
    );
    Ok(fs::write(mesh.manifests().join("kiosk.yaml"), text)?)
}

fn resolves(mesh: &Mesh, node: &str, address: &str) -> Result<()> {
    let found = mesh.resolve(node, KIOSK)?.to_string();
    ensure!(found == address, "{node} says {found}");
    Ok(())
}

fn number(mesh: &Mesh, node: &str, pointer: &str) -> Result<u64> {
    let status = mesh.status(node)?;
    let number = status.pointer(pointer).and_then(Value::as_u64);
    Ok(number.unwrap_or_default())
}

/// Sent and received by a node's line.
fn bytes(mesh: &Mesh, node: &str) -> Result<u64> {
    let words = ["ip", "-s", "-j", "link", "show", "eth0"];
    let said = mesh.node(node)?.run(&words, SOON)?.ok()?;
    let links: Value = serde_json::from_str(&said)?;
    let of = |way: &str| links.pointer(&format!("/0/stats64/{way}/bytes"))?.as_u64();
    let both = of("rx").zip(of("tx"));
    both.map(|(received, sent)| received + sent).context(said)
}

fn connected(mesh: &Mesh, node: &str) -> Result<()> {
    let status = mesh.status(node)?;
    let connected = status.pointer("/controller/connected") == Some(&true.into());
    ensure!(connected, "{status}");
    Ok(())
}

fn says(mesh: &Mesh, node: &str, word: &str) -> Result<()> {
    let status = mesh.status(node)?;
    let problems = status.get("problems").context("no problems")?.to_string();
    ensure!(problems.contains(word), "{problems}");
    Ok(())
}

/// What an operator types where the controller runs.
fn at_controller(mesh: &Mesh, words: &[&str]) -> Result<()> {
    let socket = mesh.cloud().dir().join("controller.sock");
    let socket = socket.display().to_string();
    let meshctl = [&mesh.bin("meshctl"), "--controller-socket", &socket];
    let words = [&meshctl, words].concat();
    mesh.cloud().run(&words, SOON)?.ok().map(drop)
}

fn generation(mesh: &Mesh, node: &str) -> Result<u64> {
    number(mesh, node, "/snapshot/generation")
}

#[test]
fn a_node_of_a_cut_off_site_gets_what_is_newer_from_its_neighbour_and_nothing_flaps_after()
-> Result<()> {
    let mesh = Mesh::one_site_of(&NODES)?;
    mesh.serve("edge-a1", "kiosk", &["http", "edge-a1", "0.0.0.0:8080"])?;
    mesh.kill("edge-a2", "mesh-agent")?;
    let before = generation(&mesh, "edge-a1")?;
    kiosk(&mesh, "10.43.0.99")?;
    tool::eventually("one node knows it", SOON, || {
        resolves(&mesh, "edge-a1", "10.43.0.99")
    })?;
    let newer = generation(&mesh, "edge-a1")?;
    assert!(newer > before, "{newer} after {before}");

    mesh.site("site-a")?.link().set_down(true)?;
    let begin = Instant::now();
    mesh.start_agent("edge-a2")?;
    tool::eventually("the other one has it from its neighbour", SOON, || {
        resolves(&mesh, "edge-a2", "10.43.0.99")
    })?;
    eprintln!(
        "newer state from a neighbour {:?} after the start",
        begin.elapsed()
    );
    assert_eq!(generation(&mesh, "edge-a2")?, newer);
    assert_eq!(
        number(&mesh, "edge-a2", "/lan_announcements/state_taken")?,
        1
    );
    connected(&mesh, "edge-a2").unwrap_err();
    let url = format!("http://{KIOSK}/");
    tool::eventually("the service answers", SOON, || {
        mesh.get("edge-a2", &["-4", &url], Duration::from_secs(2))
    })?;
    // It is kept: with everybody else gone, the next start has it at once.
    mesh.kill("edge-a2", "mesh-agent")?;
    mesh.kill("edge-a1", "mesh-agent")?;
    mesh.start_agent("edge-a2")?;
    tool::eventually("it is on the disk", SOON, || {
        resolves(&mesh, "edge-a2", "10.43.0.99")
    })?;
    mesh.start_agent("edge-a1")?;
    mesh.agent_ready("edge-a1", 2)?;

    kiosk(&mesh, "10.43.0.100")?;
    mesh.site("site-a")?.link().set_down(false)?;
    let begin = Instant::now();
    let mut last = [newer; 2];
    tool::eventually("both have what the controller says", SOON, || {
        for (node, last) in NODES.iter().zip(&mut last) {
            let now = generation(&mesh, node)?;
            assert!(now >= *last, "{node} went back from {last} to {now}");
            *last = now;
            resolves(&mesh, node, "10.43.0.100")?;
            connected(&mesh, node)?;
        }
        // A node that is back tells its controller where it is now: that is one more.
        ensure!(last[0] == last[1], "one is behind: {last:?}");
        Ok(())
    })?;
    eprintln!(
        "all as the controller says {:?} after the line came back",
        begin.elapsed()
    );
    // Another address is a reason to doubt the connection, once.
    let more = ["ip", "addr", "add", "192.168.250.1/32", "dev", "eth0"];
    mesh.node("edge-a1")?.run(&more, SOON)?.ok()?;
    thread::sleep(Duration::from_secs(3)); // What comes of that.
    tool::eventually("they are silent again", SOON, || {
        let (before, pause) = (bytes(&mesh, "edge-a1")?, Duration::from_secs(3));
        thread::sleep(pause);
        let more = bytes(&mesh, "edge-a1")? - before;
        ensure!(more < QUIET_BYTES_PER_S * pause.as_secs(), "{more} bytes");
        Ok(())
    })?;
    mesh.ends_well()
}

#[test]
fn a_controller_restored_from_a_backup_takes_nothing_away_until_its_operator_says_so() -> Result<()>
{
    let mesh = Mesh::one_site_of(&NODES)?;
    let store: PathBuf = mesh.cloud().dir().join("state-controller/controller.redb");
    ensure!(store.is_file(), "{} is not there", store.display());
    mesh.take("cloud", "mesh-controller")?.terminate(SOON)?;
    let backup = fs::read(&store)?;
    mesh.start_controller()?;
    kiosk(&mesh, "10.43.0.99")?;
    for node in NODES {
        tool::eventually("it is known", SOON, || resolves(&mesh, node, "10.43.0.99"))?;
    }
    mesh.take("cloud", "mesh-controller")?.terminate(SOON)?;
    fs::remove_file(mesh.manifests().join("kiosk.yaml"))?;
    fs::write(&store, backup)?;
    mesh.provokes(&["nodes have what this store lost: it was restored from an older copy"]);
    mesh.start_controller()?;
    for node in NODES {
        tool::eventually("it says what is wrong", SOON, || {
            says(&mesh, node, "accept-rollback")
        })?;
        resolves(&mesh, node, "10.43.0.99")?;
    }
    at_controller(&mesh, &["controller", "accept-rollback"])?;
    for node in NODES {
        tool::eventually("what was restored counts", Duration::from_secs(60), || {
            connected(&mesh, node)?;
            ensure!(mesh.resolve(node, KIOSK).is_err(), "it is still there");
            Ok(())
        })?;
    }
    mesh.ends_well()
}

/// Boots both nodes: nothing is left in their kernels, and none knows where the other one is. How long it takes from the start of
/// the first one's process, whose clock is wrong, until it answers a name, serves a service of its own, and reaches the other.
fn boot(mesh: &Mesh, clock: &str, own: &str) -> Result<[Duration; 3]> {
    let [measured, near] = NODES;
    for name in NODES {
        let node = mesh.node(name)?;
        let config = node.dir().join("agent.toml").display().to_string();
        let words = [&mesh.bin("mesh-agent"), "--config", &config, "remove"];
        node.run(&words, SOON)?.ok()?;
        fs::remove_file(node.dir().join("state/peers")).ok();
    }
    mesh.start_agent(near)?;
    let node = mesh.node(measured)?;
    let config = node.dir().join("agent.toml").display().to_string();
    let agent = [mesh.bin("mesh-agent"), "--config".to_owned(), config];
    let words = [tool::with_clock(clock)?, agent.to_vec()].concat();
    let lab = tool::binary("lab")?.display().to_string();
    let begin = Instant::now();
    mesh.put(measured, "mesh-agent", node.spawn("mesh-agent", &words)?);
    let awaited: [&[&str]; 3] = [
        &["await-name", KIOSK, own],
        &["await-tcp", &format!("{own}:80")],
        &["await-tcp", "100.96.1.2:8080"],
    ];
    thread::scope(|scope| {
        let took = awaited.map(|words| {
            let (node, lab) = (&node, lab.as_str());
            scope.spawn(move || -> Result<Duration> {
                let words = [&[lab], words].concat();
                node.run(&words, SOON)?.ok()?;
                Ok(begin.elapsed())
            })
        });
        let mut times = [Duration::ZERO; 3];
        for (time, took) in times.iter_mut().zip(took) {
            *time = took.join().map_err(|_| anyhow!("it panicked"))??;
        }
        Ok(times)
    })
}

#[test]
fn a_site_that_boots_with_a_wrong_clock_and_nobody_but_itself_is_up_within_a_second() -> Result<()>
{
    let mesh = Mesh::one_site_of(&NODES)?;
    for node in NODES {
        mesh.serve(node, "http", &["http", node, "0.0.0.0:8080"])?;
    }
    let (old, new) = ("10.43.0.99", "10.43.0.100");
    kiosk(&mesh, old)?;
    for node in NODES {
        tool::eventually("both know it", SOON, || resolves(&mesh, node, old))?;
    }
    // One hears of a change that the other one slept through.
    mesh.take("edge-a1", "mesh-agent")?.terminate(SOON)?;
    kiosk(&mesh, new)?;
    tool::eventually("one knows it", SOON, || resolves(&mesh, "edge-a2", new))?;
    mesh.take("edge-a2", "mesh-agent")?.terminate(SOON)?;
    let cloud = mesh.cloud().name().to_owned();
    mesh.kill(&cloud, "mesh-controller")?;
    mesh.kill(&cloud, "mesh-relay")?;
    mesh.site("site-a")?.link().set_down(true)?;
    for node in NODES {
        tool::ip(mesh.node(node)?.netns(), "route del default\n")?;
    }

    for (clock, takes) in [("+10y", false), ("-10y", true)] {
        let mut fastest = [SOON; 3];
        for round in 0..BOOTS {
            let own = if takes && round > 0 { new } else { old };
            let times = boot(&mesh, clock, own)?;
            eprintln!("{clock}: name, own service, neighbour after {times:?}");
            for (fastest, time) in fastest.iter_mut().zip(times) {
                *fastest = time.min(*fastest);
            }
            // Whose clock is ahead cannot tell from a certificate that is over, and takes nothing.
            if takes {
                tool::eventually("what is newer is taken", SOON, || {
                    resolves(&mesh, "edge-a1", new)
                })?;
            } else {
                resolves(&mesh, "edge-a1", old)?;
            }
            mesh.take("edge-a1", "mesh-agent")?.terminate(SOON)?;
            mesh.take("edge-a2", "mesh-agent")?.terminate(SOON)?;
        }
        ensure!(
            fastest.iter().all(|time| *time <= UP),
            "{clock}: {fastest:?}"
        );
    }
    mesh.ends_well()
}

#[test]
fn a_clock_that_jumps_by_years_and_back_takes_nothing_from_a_node_that_runs() -> Result<()> {
    let mesh = Mesh::one_site_of(&NODES)?;
    for node in NODES {
        mesh.serve(node, "http", &["http", node, "0.0.0.0:8080"])?;
    }
    kiosk(&mesh, "10.43.0.99")?;
    let node = mesh.node("edge-a1")?;
    let clock = node.write("clock", "+0")?;
    let file = format!("FAKETIME_TIMESTAMP_FILE={}", clock.display());
    mesh.take("edge-a1", "mesh-agent")?.terminate(SOON)?;
    let config = node.dir().join("agent.toml").display().to_string();
    let mut words = tool::with_clock("+0")?;
    let jumps = ["env", "-u", "FAKETIME", "FAKETIME_NO_CACHE=1", &file];
    words.extend(jumps.map(str::to_owned));
    words.extend([mesh.bin("mesh-agent"), "--config".to_owned(), config]);
    mesh.put("edge-a1", "mesh-agent", node.spawn("mesh-agent", &words)?);
    tool::eventually("it is there", SOON, || {
        connected(&mesh, "edge-a1")?;
        resolves(&mesh, "edge-a1", "10.43.0.99")
    })?;

    let own = format!("http://{KIOSK}/");
    let serves = || -> Result<()> {
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(3) {
            for (url, from) in [
                (own.as_str(), NODES[0]),
                ("http://edge-a2.mesh:8080/", NODES[1]),
            ] {
                let hello = mesh.get(NODES[0], &["-4", url], Duration::from_secs(2))?;
                ensure!(hello.node == from, "{hello:?}");
            }
        }
        let status = mesh.status(NODES[0])?;
        let says = status.pointer("/snapshot/standing").and_then(Value::as_str);
        ensure!(says == Some("counts"), "{status}");
        Ok(())
    };
    let begun = generation(&mesh, "edge-a1")?;
    for jump in ["+10y", "-10y", "+0"] {
        fs::write(&clock, jump)?;
        serves().context(jump)?;
        connected(&mesh, "edge-a1").context(jump)?;
        if jump == "-10y" {
            says(&mesh, "edge-a1", "the clock is")?;
        }
    }
    // And while nobody is there to ask.
    mesh.site("site-a")?.link().set_down(true)?;
    for jump in ["-10y", "+10y"] {
        fs::write(&clock, jump)?;
        serves().with_context(|| format!("cut off, {jump}"))?;
    }
    kiosk(&mesh, "10.43.0.100")?;
    mesh.site("site-a")?.link().set_down(false)?;
    fs::write(&clock, "+0")?;
    tool::eventually("it follows again", SOON, || {
        connected(&mesh, "edge-a1")?;
        resolves(&mesh, "edge-a1", "10.43.0.100")
    })?;
    ensure!(generation(&mesh, "edge-a1")? > begun, "it went back");
    mesh.ends_well()
}

#[test]
fn who_was_taken_out_of_the_mesh_gets_nothing_newer_from_those_who_know_it() -> Result<()> {
    let mesh = Mesh::one_site_of(&NODES)?;
    kiosk(&mesh, "10.43.0.99")?;
    for node in NODES {
        tool::eventually("both know it", SOON, || resolves(&mesh, node, "10.43.0.99"))?;
    }
    mesh.take("edge-a2", "mesh-agent")?.terminate(SOON)?;
    at_controller(&mesh, &["node", "remove", "edge-a2"])?;
    kiosk(&mesh, "10.43.0.100")?;
    tool::eventually("the other one knows both changes", SOON, || {
        ensure!(number(&mesh, "edge-a1", "/snapshot/nodes")? == 1, "two");
        resolves(&mesh, "edge-a1", "10.43.0.100")
    })?;
    mesh.site("site-a")?.link().set_down(true)?;
    mesh.start_agent("edge-a2")?;
    tool::eventually("it asks, and is refused", SOON, || {
        let refused = number(&mesh, "edge-a2", "/lan_announcements/state_not_given")?;
        ensure!(refused > 0, "it did not ask");
        Ok(())
    })?;
    resolves(&mesh, "edge-a2", "10.43.0.99")?;
    let taken = number(&mesh, "edge-a2", "/lan_announcements/state_taken")?;
    let strangers = number(&mesh, "edge-a1", "/lan_announcements/unknown_node")?;
    ensure!(
        taken == 0 && strangers > 0,
        "{taken} taken, {strangers} strangers"
    );
    mesh.ends_well()
}

#[test]
fn a_node_whose_disk_can_only_be_read_boots_and_follows_all_the_same() -> Result<()> {
    let mesh = Mesh::one_site_of(&NODES)?;
    kiosk(&mesh, "10.43.0.99")?;
    tool::eventually("it is known", SOON, || {
        resolves(&mesh, "edge-a2", "10.43.0.99")
    })?;
    mesh.take("edge-a2", "mesh-agent")?.terminate(SOON)?;
    mesh.site("site-a")?.link().set_down(true)?;
    let node = mesh.node("edge-a2")?;
    let state = node.dir().join("state").display().to_string();
    let config = node.dir().join("agent.toml").display().to_string();
    // The launcher's mount table is this command's own.
    let script = format!(
        "mount --bind {state} {state} && mount -o remount,bind,ro {state} && exec {} --config {config}",
        mesh.bin("mesh-agent")
    );
    mesh.provokes(&["cannot keep the snapshot; a restart would find an older one error=Read-only"]);
    let agent = node.spawn("mesh-agent", &["sh", "-c", &script])?;
    mesh.put("edge-a2", "mesh-agent", agent);
    tool::eventually("it serves what is on the disk", SOON, || {
        resolves(&mesh, "edge-a2", "10.43.0.99")
    })?;
    kiosk(&mesh, "10.43.0.100")?;
    mesh.site("site-a")?.link().set_down(false)?;
    tool::eventually("it follows the controller", SOON, || {
        connected(&mesh, "edge-a2")?;
        resolves(&mesh, "edge-a2", "10.43.0.100")
    })?;
    let log = fs::read_to_string(node.dir().join("mesh-agent.log"))?;
    ensure!(log.contains("cannot keep the snapshot"), "{log}");
    mesh.ends_well()
}

#[test]
fn agents_killed_while_they_write_start_with_a_state_that_is_whole() -> Result<()> {
    let mesh = Mesh::one_site_of(&NODES)?;
    for run in 0..8_u64 {
        let address = format!("10.43.0.{}", 100 + run);
        let begin = generation(&mesh, "edge-a2")?; // Before the change, which may be there at once.
        kiosk(&mesh, &address)?;
        while generation(&mesh, "edge-a2")? == begin {
            ensure!(begin > 0, "no state");
        }
        std::thread::sleep(Duration::from_millis(run));
        mesh.kill("edge-a2", "mesh-agent")?;
        mesh.site("site-a")?.link().set_down(true)?;
        mesh.start_agent_with("edge-a2", "lan_discovery = false\n")?;
        mesh.agent_ready("edge-a2", 2)?;
        let now = generation(&mesh, "edge-a2")?;
        ensure!(now >= begin, "it went back from {begin} to {now}");
        let log = fs::read_to_string(mesh.node("edge-a2")?.dir().join("mesh-agent.log"));
        ensure!(
            !log.unwrap_or_default().contains("not usable"),
            "a slot is damaged"
        );
        mesh.site("site-a")?.link().set_down(false)?;
        tool::eventually("the controller is there", SOON, || {
            connected(&mesh, "edge-a2")
        })?;
    }
    mesh.ends_well()
}
