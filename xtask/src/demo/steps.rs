//! The six steps.

use std::{
    net::IpAddr,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use netns_tests::{
    link::Impairment,
    mesh::{Mesh, word},
    node::Process,
    tool,
    traffic::{FlowReport, Hello},
};
use serde_json::{Value, json};

use super::{Facts, serve_site_a};

const INVENTORY: &str = "http://inventory.shop.svc.cluster.local/";
const CATALOG: &str = "http://catalog.shop.svc.cluster.local/";
const TELEMETRY: &str = "10.43.0.30:9000";
const EDGE_A1: &str = "100.96.1.1";

/// One request; a lost first packet costs TCP 1 s, two of them 3 s.
const REQUEST_LIMIT: Duration = Duration::from_secs(8);

/// A request that is about to be repeated: long enough for a live path of 80 ms a round trip.
const TRY_LIMIT: Duration = Duration::from_millis(400);

/// One of many requests: at [`REQUEST_EVERY`] at most ten are under way.
const REQUEST_TIME: Duration = Duration::from_secs(1);

/// Between two of many requests.
const REQUEST_EVERY: Duration = Duration::from_millis(100);

/// Until a copy that has to answer has.
const PATIENCE: Duration = Duration::from_secs(15);

/// From the first packet to the direct path. The ladder of probes takes 1 s; loss may cost one more
/// round of retries.
const DIRECT_LIMIT: Duration = Duration::from_secs(15);

/// By then a pair that cannot be direct knows why: it gives up after 20 s.
const WHY_LIMIT: Duration = Duration::from_secs(25);

/// The issue's own figure for failover and for the offline start.
const TWO_SECONDS: Duration = Duration::from_secs(2);

/// By name, over both families, with the client's own address at the server.
pub(crate) fn cross_nat(mesh: &Mesh) -> Result<Facts> {
    let start = Instant::now();
    let hello = mesh.get("edge-a1", &["-4", INVENTORY], REQUEST_LIMIT)?;
    let first = start.elapsed();
    ensure!(hello.node == "edge-b1", "answered by {}", hello.node);
    ensure!(
        hello.client.ip() == EDGE_A1.parse::<IpAddr>()?,
        "the server sees {}",
        hello.client
    );
    let over_v6 = mesh.get("edge-a1", &["-6", INVENTORY], REQUEST_LIMIT)?;
    let own = own_addresses(mesh, "edge-a1")?;
    ensure!(
        own.contains(&over_v6.client.ip()),
        "the server sees {}, not {own:?}",
        over_v6.client
    );
    Ok(facts([
        ("answered_by", json!(hello.node)),
        ("source_v4", json!(hello.client.ip())),
        ("source_v6", json!(over_v6.client.ip())),
        ("first_answer_ms", json!(first.as_millis())),
    ]))
}

/// The links' own loss is off while packets are counted: each one missing is a fault of ours.
pub(crate) fn upgrade(mesh: &Mesh) -> Result<Facts> {
    let sites = [mesh.site("site-a")?, mesh.site("site-b")?];
    let clean = Impairment::delay_loss(Duration::from_millis(20), 0.0);
    sites.iter().try_for_each(|site| site.link().set(clean))?;
    // To C: traffic, so that the pair tries.
    let mut towards_c = flow(mesh, "edge-a1", "100.96.3.1:9000", 400, 100)?;
    let start = Instant::now();
    // edge-a2 has not spoken to edge-b1 yet: the pair starts from nothing.
    let mut running = flow(mesh, "edge-a2", TELEMETRY, 500, 20)?;
    let mut was_relayed = false;
    let what = "the path edge-a2 – edge-b1 becomes direct";
    tool::eventually(what, DIRECT_LIMIT, || {
        let why = mesh.ask("edge-a2", &["path", "why", "edge-b1"])?;
        was_relayed |= word(&why, "state") == "relayed";
        ensure!(word(&why, "state") == "direct", "{why}");
        Ok(())
    })?;
    let direct_after = start.elapsed();
    let why = mesh.ask("edge-a2", &["path", "why", "edge-b1"])?;
    let transitions = why
        .get("transitions")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    was_relayed |= transitions
        .iter()
        .any(|step| word(step, "from") == "relayed" && word(step, "to") == "direct");
    ensure!(was_relayed, "it was never relayed: {transitions:?}");
    let counted = report(&mut running, Duration::from_secs(20))?;
    let still = word(&mesh.ask("edge-a2", &["path", "why", "edge-b1"])?, "state");
    ensure!(still == "direct", "it is {still} at the end");
    ensure!(
        counted.answered == counted.sent,
        "{} of {} came back; lost: {:?}",
        counted.answered,
        counted.sent,
        counted.lost
    );
    let (reason, explanation) = reason_for_relay(mesh, "edge-a1", "edge-c1")?;
    towards_c.kill().ok(); // It may be over.
    for (site, seed) in sites.iter().zip(1..) {
        site.link().set(Impairment {
            loss: 0.01,
            seed,
            ..clean
        })?;
    }
    Ok(facts([
        ("direct_after_ms", json!(direct_after.as_millis())),
        ("packets", json!(counted.sent)),
        ("lost", json!(counted.sent - counted.answered)),
        ("longest_gap_ms", json!(counted.longest_gap_ms)),
        (
            "link_loss",
            json!("off while packets are counted: each one missing would be ours"),
        ),
        ("a_to_c", json!("relayed")),
        ("reason", json!(reason)),
        ("explanation", json!(explanation)),
    ]))
}

fn reason_for_relay(mesh: &Mesh, from: &str, to: &str) -> Result<(String, String)> {
    tool::eventually("path why names a reason", WHY_LIMIT, || {
        let why = mesh.ask(from, &["path", "why", to])?;
        ensure!(
            word(&why, "state") == "relayed",
            "{from} – {to} is not relayed: {why}"
        );
        let decided = !["", "probing"].contains(&word(&why, "reason").as_str());
        ensure!(decided, "no reason yet: {why}");
        Ok((word(&why, "reason"), word(&why, "explanation")))
    })
}

/// 200 requests to the near copy; then the near node loses its power.
pub(crate) fn nearest(mesh: &Mesh) -> Result<Facts> {
    mesh.get("edge-a1", &[CATALOG], REQUEST_LIMIT)?; // Wakes the path.
    let counted = format!("{CATALOG}?[1-200]");
    let words = [
        "curl",
        "--silent",
        "--show-error",
        "--max-time",
        "30",
        &counted,
    ];
    let said = mesh
        .node("edge-a1")?
        .run(&words, Duration::from_secs(60))?
        .ok()?;
    let answers = said
        .lines()
        .map(serde_json::from_str::<Hello>)
        .collect::<Result<Vec<_>, _>>()?;
    let near = answers
        .iter()
        .filter(|hello| hello.node == "edge-a2")
        .count();
    ensure!(
        (near, answers.len()) == (200, 200),
        "{near} of {} answers came from the near copy",
        answers.len()
    );

    // Everything at once, as a power cut: nobody says goodbye.
    let (mut agent, mut server) = (
        mesh.take("edge-a2", "mesh-agent")?,
        mesh.take("edge-a2", "catalog")?,
    );
    let start = Instant::now();
    agent.kill()?;
    server.kill()?;
    let over = answered_by(mesh, "edge-b1").map(|at| at - start);
    mesh.start_agent("edge-a2")?;
    serve_site_a(mesh)?;
    let over = over?;
    ensure!(over <= TWO_SECONDS, "the far copy answered after {over:?}");
    answered_by(mesh, "edge-a2").context("the near copy is back")?;
    Ok(facts([
        ("near_answers", json!("200 of 200")),
        ("far_answer_after_ms", json!(over.as_millis())),
    ]))
}

/// Requests go on and on, each by itself, as of a shop full of people; says when the first that
/// `node` answers is done.
fn answered_by(mesh: &Mesh, node: &str) -> Result<Instant> {
    let (done, answers) = mpsc::channel();
    let end = Instant::now() + PATIENCE;
    thread::scope(|scope| {
        while Instant::now() < end {
            let done = done.clone();
            scope.spawn(move || {
                let answer = mesh.get("edge-a1", &[CATALOG], REQUEST_TIME);
                done.send((answer, Instant::now())).ok(); // An earlier one was enough.
            });
            let next = Instant::now() + REQUEST_EVERY;
            while let Ok((answer, at)) = answers.recv_timeout(next - Instant::now().min(next)) {
                if answer.is_ok_and(|hello| hello.node == node) {
                    return Ok(at);
                }
            }
        }
        bail!("{node} did not answer within {PATIENCE:?}")
    })
}

/// A flow from C goes on over TLS on TCP 443 when UDP dies, and new ones work.
pub(crate) fn udp_blocked(mesh: &Mesh) -> Result<Facts> {
    let mut running = flow(mesh, "edge-c1", TELEMETRY, 600, 20)?;
    mesh.get("edge-c1", &[INVENTORY], REQUEST_LIMIT)?;
    let site = mesh.site("site-c")?;
    site.block_udp(true)?;
    let start = Instant::now();
    let transport = tool::eventually(
        "edge-c1 has the relay by TCP",
        Duration::from_secs(10),
        || {
            let status = mesh.status("edge-c1")?;
            let relays = status
                .get("relays")
                .and_then(Value::as_array)
                .cloned()
                .unwrap_or_default();
            let tls = relays.iter().any(|relay| word(relay, "transport") == "tls");
            ensure!(tls, "{relays:?}");
            Ok("tls on tcp 443")
        },
    )?;
    let switched = start.elapsed();
    let renewed = tool::eventually("new flows work", Duration::from_secs(10), || {
        let hello = mesh.get("edge-c1", &[INVENTORY], REQUEST_TIME)?;
        ensure!(hello.node == "edge-b1", "answered by {}", hello.node);
        Ok(start.elapsed())
    })?;
    let counted = report(&mut running, Duration::from_secs(30))?;
    // 12 s of packets; the outage may cost the 3 s until UDP is given up, and 1 s to switch.
    ensure!(
        counted.answered * 100 >= counted.sent * 60,
        "only {} of {} came back",
        counted.answered,
        counted.sent
    );
    ensure!(
        counted.longest_gap_ms <= 5_000,
        "nothing came back for {} ms",
        counted.longest_gap_ms
    );
    site.block_udp(false)?;
    Ok(facts([
        ("transport", json!(transport)),
        ("switched_after_ms", json!(switched.as_millis())),
        ("new_flow_after_ms", json!(renewed.as_millis())),
        ("longest_gap_ms", json!(counted.longest_gap_ms)),
        (
            "answered",
            json!(format!("{} of {}", counted.answered, counted.sent)),
        ),
    ]))
}

/// Controller, relay and the cloud's agent die; nothing between A and B does.
pub(crate) fn cloud_gone(mesh: &Mesh) -> Result<Facts> {
    tool::eventually("edge-a1 – edge-b1 is direct", DIRECT_LIMIT, || {
        mesh.get("edge-a1", &[INVENTORY], REQUEST_TIME)?;
        let why = mesh.ask("edge-a1", &["path", "why", "edge-b1"])?;
        ensure!(word(&why, "state") == "direct", "{why}");
        Ok(())
    })?;
    let mut running = flow(mesh, "edge-a1", TELEMETRY, 300, 20)?;
    for program in ["mesh-controller", "mesh-relay", "mesh-agent"] {
        mesh.kill("cloud", program)?;
    }
    let between = mesh.get("edge-a1", &[INVENTORY], REQUEST_LIMIT)?;
    ensure!(
        between.node == "edge-b1",
        "inventory answered by {}",
        between.node
    );
    let inside = mesh.get("edge-a1", &[CATALOG], REQUEST_LIMIT)?;
    ensure!(
        inside.node == "edge-a2",
        "catalog answered by {}",
        inside.node
    );
    let back = mesh.get("edge-b1", &["http://edge-a2.mesh:8081/"], REQUEST_LIMIT)?;
    ensure!(
        back.node == "edge-a2",
        "edge-a2.mesh answered by {}",
        back.node
    );
    let name = mesh.resolve("edge-a1", "edge-b1.mesh")?;
    let counted = report(&mut running, Duration::from_secs(15))?;
    // Four passages with 1 % each lose 4 %; 300 packets lose 12 ± 3.4, and 30 is five deviations off.
    ensure!(
        counted.answered >= 270,
        "only {} of {} came back",
        counted.answered,
        counted.sent
    );
    ensure!(
        counted.longest_gap_ms < 1_000,
        "nothing came back for {} ms",
        counted.longest_gap_ms
    );
    Ok(facts([
        (
            "running_flow",
            json!(format!("{} of {}", counted.answered, counted.sent)),
        ),
        ("longest_gap_ms", json!(counted.longest_gap_ms)),
        ("new_flow_a_b", json!(between.node)),
        ("new_flow_inside_a", json!(inside.node)),
        ("edge-b1.mesh", json!(name)),
    ]))
}

/// Both uplinks are cut as well; then a node starts from its own disk.
pub(crate) fn offline_boot(mesh: &Mesh) -> Result<Facts> {
    for site in mesh.sites() {
        site.link().set_down(true)?;
    }
    mesh.kill("edge-a1", "mesh-agent")?;
    let start = Instant::now();
    mesh.start_agent("edge-a1")?;
    let names = tool::eventually("names are answered", TWO_SECONDS * 5, || {
        let address = mesh.resolve("edge-a1", "catalog.shop.svc.cluster.local")?;
        ensure!(address.to_string() == "10.43.0.20", "{address}");
        Ok(start.elapsed())
    })?;
    let service = tool::eventually("a local-site service answers", TWO_SECONDS * 5, || {
        let hello = mesh.get("edge-a1", &[CATALOG], TRY_LIMIT)?;
        ensure!(hello.node == "edge-a2", "{} answers", hello.node);
        Ok(start.elapsed())
    })?;
    ensure!(names <= TWO_SECONDS, "names after {names:?}");
    ensure!(service <= TWO_SECONDS, "the service after {service:?}");
    Ok(facts([
        ("first_name_ms", json!(names.as_millis())),
        ("first_service_answer_ms", json!(service.as_millis())),
    ]))
}

fn own_addresses(mesh: &Mesh, node: &str) -> Result<Vec<IpAddr>> {
    let status = mesh.status(node)?;
    let list = status
        .get("overlay_addresses")
        .and_then(Value::as_array)
        .cloned();
    let list = list.with_context(|| format!("no overlay_addresses in {status}"))?;
    let parsed = list.iter().filter_map(Value::as_str).map(|text| {
        text.split('/')
            .next()
            .unwrap_or_default()
            .parse()
            .with_context(|| text.to_owned())
    });
    parsed.collect()
}

fn flow(mesh: &Mesh, from: &str, to: &str, count: u32, interval_ms: u32) -> Result<Process> {
    let lab = tool::binary("lab")?.display().to_string();
    let words = [
        &lab,
        "flow",
        to,
        &count.to_string(),
        &interval_ms.to_string(),
        "200",
        "2000",
    ];
    let log = format!("flow-{}", to.replace([':', '.'], "-"));
    let node = mesh.node(from)?;
    std::fs::remove_file(node.dir().join(format!("{log}.log"))).ok(); // An earlier one's report.
    node.spawn(&log, &words)
}

fn report(flow: &mut Process, limit: Duration) -> Result<FlowReport> {
    let status = flow.wait(limit)?;
    let said = flow.log();
    ensure!(status.success(), "the flow ended with {status}: {said}");
    let line = said.lines().last().unwrap_or_default();
    serde_json::from_str(line).with_context(|| format!("the flow said {said}"))
}

fn facts<const N: usize>(list: [(&str, Value); N]) -> Facts {
    list.into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}
