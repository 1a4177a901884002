//! The resolver of a node beside those that a user would take instead: answers from an own zone a second,
//! how long they take, and what a large zone needs.

mod servers;

use std::{
    fmt::Write as _,
    fs,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    mesh::Mesh,
    node::{Node, Process},
    tool,
};

use self::servers::SERVERS;
use super::{Options, RIGHT, Samples, UP_LIMIT, choose, percentile, two_nodes};
use crate::setup;

/// Other programs, best first in nobody's order: issue 6 wants the fastest of them reached.
pub(super) const PEERS: &[&str] = &["unbound", "dnsmasq", "knot", "nsd"];

/// Names that are asked.
const NAMES: usize = 1_000;

/// Of the large zone.
const SERVICES: usize = 10_000;
const ENDPOINTS: usize = 10;

/// How long one turn loads a server.
const TURN: Duration = Duration::from_secs(3);

/// Turns a round.
const TURNS: usize = 3;

/// How long one turn times a server's answers, one server right after the other: what disturbs the machine for some
/// seconds disturbs all of them. The 99th percentile is the 50th longest.
const TIMED_TURN: Duration = Duration::from_secs(1);

/// So many of these for each of the others.
const TIMED_TURNS: usize = 3;

/// Questions a second when answers are timed: what a busy node asks, and no queue before any of the servers.
const TIMED_PER_S: u32 = 5_000;

/// Where the agent answers.
const HOLDFAST: ([u8; 4], u16) = ([169, 254, 53, 53], 53);

/// A manifest of 10,000 services with ten endpoints each is read within this.
const LARGE_LIMIT: Duration = Duration::from_secs(120);

struct Case {
    name: &'static str,
}

const CASES: &[Case] = &[Case { name: "answers" }, Case { name: "large-zone" }];

/// Refuses what is not there.
///
/// # Errors
///
/// For an unknown case or program.
pub(super) fn check(options: &Options) -> Result<()> {
    choose(CASES, |case| case.name, &options.only)?;
    let strange = options
        .peers
        .iter()
        .find(|peer| !PEERS.contains(&peer.as_str()));
    ensure!(
        strange.is_none(),
        "no program {}; there are: {}",
        strange.map_or("", String::as_str),
        PEERS.join(", ")
    );
    Ok(())
}

/// Measures.
///
/// # Errors
///
/// If our own could not be.
pub(super) fn run(options: &Options, samples: &mut Samples) -> Result<bool> {
    setup::dns_servers()?;
    let cases = choose(CASES, |case| case.name, &options.only)?;
    for case in cases {
        match case.name {
            "answers" => answers(options, samples)?,
            _ => large_zone(options, samples)?,
        }
    }
    Ok(true)
}

/// `name.bench.svc.cluster.local`, and its address.
fn service(number: usize) -> (String, String) {
    let address = format!("10.43.{}.{}", 16 + number / 250, 1 + number % 250);
    (format!("s{number}"), address)
}

fn cluster_ips(names: usize) -> String {
    let mut text = String::new();
    for number in 0..names {
        let (name, address) = service(number);
        writeln!(
            text,
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: bench}}\nspec: {{clusterIP: {address}, \
             clusterIPs: [{address}], ports: [{{name: http, port: 80, targetPort: 8080, protocol: TCP}}]}}\n---"
        )
        .ok();
    }
    text
}

/// A server that answers at an address.
struct Server {
    name: String,
    address: SocketAddr,
    /// None: the agent's.
    process: Option<Process>,
}

fn answers(options: &Options, samples: &mut Samples) -> Result<()> {
    let mesh = two_nodes(&options.bins, "")?;
    fs::write(mesh.manifests().join("names.yaml"), cluster_ips(NAMES))?;
    let node = mesh.node(RIGHT)?;
    let questions: String = (0..NAMES)
        .map(|number| format!("{}.bench.svc.cluster.local A\n", service(number).0))
        .collect();
    let questions = node.write("questions", &questions)?;
    let mut servers = vec![Server {
        name: "holdfast".to_owned(),
        address: HOLDFAST.into(),
        process: None,
    }];
    for server in SERVERS {
        if !options.peers.is_empty() && !options.peers.iter().any(|peer| peer == server.name) {
            continue;
        }
        samples.version(server.name, &(server.version)()?);
        servers.push(Server {
            name: server.name.to_owned(),
            address: server.address.into(),
            process: Some(server.start(&node, NAMES)?),
        });
    }
    for server in &servers {
        let (name, address) = service(NAMES - 1);
        until_answered(
            &node,
            server.address,
            &format!("{name}.bench.svc.cluster.local"),
            &address,
            UP_LIMIT,
        )?;
    }
    for round in 1..=options.rounds {
        for turn in 0..TURNS {
            eprintln!(
                "round {round} of {}, turn {} of {TURNS}",
                options.rounds,
                turn + 1
            );
            for server in &servers {
                let load = load(&node, server.address, &questions, &["-q", "256"])?;
                samples.add(&server.name, "answers", "1/s", load.per_second);
            }
            for server in servers.iter().cycle().take(servers.len() * TIMED_TURNS) {
                let timed = timed(&node, server.address, &questions)?;
                samples.add(&server.name, "latency_p50", "µs", timed.p50);
                samples.add(&server.name, "latency_p99", "µs", timed.p99);
            }
        }
    }
    for server in &mut servers {
        if let Some(process) = &mut server.process {
            process.running()?;
            samples.add(
                &server.name,
                "resident",
                "KiB",
                process.resident_kib()? as f64,
            );
        }
    }
    mesh.all_run()
}

fn until_answered(
    node: &Node,
    server: SocketAddr,
    name: &str,
    answer: &str,
    limit: Duration,
) -> Result<()> {
    let (at, port) = (format!("@{}", server.ip()), server.port().to_string());
    tool::eventually("an answer", limit, || {
        let words = [
            "dig", "+short", "+tries=1", "+time=1", &at, "-p", &port, name,
        ];
        let said = node.run(&words, UP_LIMIT)?.ok()?;
        ensure!(
            said.lines().any(|line| line == answer),
            "{server} says {said:?} of {name}"
        );
        Ok(())
    })
}

struct Load {
    per_second: f64,
}

fn dnsperf(
    node: &Node,
    server: SocketAddr,
    questions: &Path,
    turn: Duration,
    more: &[&str],
) -> Result<String> {
    let (ip, port) = (server.ip().to_string(), server.port().to_string());
    let (file, time) = (questions.display().to_string(), turn.as_secs().to_string());
    let mut words = vec![
        "dnsperf", "-s", &ip, "-p", &port, "-d", &file, "-l", &time, "-c", "8", "-T", "1", "-t",
        "1",
    ];
    words.extend(more);
    node.run(&words, turn * 5)?.ok()
}

/// The number behind `key:` in what dnsperf says at its end.
fn said(text: &str, key: &str) -> Result<f64> {
    let line = text.lines().find(|line| line.trim_start().starts_with(key));
    let line = line.with_context(|| format!("dnsperf says no {key:?}: {text}"))?;
    let rest = line.split_once(':').map_or("", |(_, rest)| rest);
    let number = rest.split_whitespace().next().unwrap_or("");
    number.parse().with_context(|| format!("{line:?}"))
}

fn load(node: &Node, server: SocketAddr, questions: &Path, more: &[&str]) -> Result<Load> {
    let text = dnsperf(node, server, questions, TURN, more)?;
    let (sent, completed) = (
        said(&text, "Queries sent")?,
        said(&text, "Queries completed")?,
    );
    ensure!(
        completed >= sent * 0.99,
        "{server} left more than 1 % unanswered: {text}"
    );
    ensure!(text.contains("NOERROR"), "{server} gave errors: {text}");
    Ok(Load {
        per_second: said(&text, "Queries per second")?,
    })
}

struct Timed {
    p50: f64,
    p99: f64,
}

/// How long answers take at a moderate rate.
fn timed(node: &Node, server: SocketAddr, questions: &Path) -> Result<Timed> {
    let rate = TIMED_PER_S.to_string();
    let text = dnsperf(node, server, questions, TIMED_TURN, &["-Q", &rate, "-v"])?;
    // `> NOERROR name A 0.000123`
    let times = text.lines().filter_map(|line| {
        let rest = line.strip_prefix("> NOERROR ")?;
        rest.split_whitespace().last()?.parse::<f64>().ok()
    });
    let mut times: Vec<_> = times.map(|seconds| seconds * 1e6).collect();
    let expected = f64::from(TIMED_PER_S) * TIMED_TURN.as_secs_f64();
    ensure!(
        times.len() as f64 > expected * 0.9,
        "{server} answered {} of {expected}",
        times.len()
    );
    times.sort_by(f64::total_cmp);
    let at = |share| percentile(&times, share).context("no times");
    Ok(Timed {
        p50: at(0.5)?,
        p99: at(0.99)?,
    })
}

/// Ten thousand headless services of ten endpoints each; one changes.
fn large_zone(options: &Options, samples: &mut Samples) -> Result<()> {
    for round in 1..=options.rounds {
        eprintln!("large zone, round {round} of {}", options.rounds);
        let mesh = two_nodes(&options.bins, "")?;
        let node = mesh.node(RIGHT)?;
        // Names only: programs and their maps are another bench's.
        mesh.kill(RIGHT, "mesh-agent")?;
        mesh.start_agent_with(RIGHT, "services = false\npolicy = false\n")?;
        mesh.agent_ready(RIGHT, 2)?;
        let before = resident(&mesh)?;
        let manifest = |first: usize, count: usize, last: u8| {
            let mut text = String::new();
            for number in first..first + count {
                let endpoint = |index: usize| {
                    let last = if index == 0 { last } else { 10 };
                    format!(
                        "{{addresses: [10.{}.{}.{}], nodeName: left}}",
                        64 + number / 250,
                        number % 250,
                        usize::from(last) + index
                    )
                };
                let endpoints: Vec<_> = (0..ENDPOINTS).map(endpoint).collect();
                writeln!(
                    text,
                    "apiVersion: v1\nkind: Service\nmetadata: {{name: h{number}, namespace: bench}}\nspec: {{clusterIP: None, \
                     ports: [{{name: http, port: 80, protocol: TCP}}]}}\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
                     metadata: {{name: h{number}-1, namespace: bench, labels: {{kubernetes.io/service-name: h{number}}}}}\n\
                     addressType: IPv4\nports: [{{name: http, port: 80, protocol: TCP}}]\nendpoints: [{}]\n---",
                    endpoints.join(", ")
                )
                .ok();
            }
            text
        };
        // The one that changes has a file of its own.
        let one = mesh.manifests().join("one.yaml");
        fs::write(
            mesh.manifests().join("many.yaml"),
            manifest(1, SERVICES - 1, 10),
        )?;
        fs::write(&one, manifest(0, 1, 10))?;
        let last = SERVICES - 1;
        let server = HOLDFAST.into();
        let (name, address) = (
            format!("h{last}.bench.svc.cluster.local"),
            format!("10.{}.{}.10", 64 + last / 250, last % 250),
        );
        until_answered(&node, server, &name, &address, LARGE_LIMIT)?;
        until_answered(
            &node,
            server,
            "h0.bench.svc.cluster.local",
            "10.64.0.10",
            UP_LIMIT,
        )?;
        // Every name once, so that what is kept of answers is there too.
        let questions: String = (0..SERVICES)
            .map(|number| format!("h{number}.bench.svc.cluster.local A\n"))
            .collect();
        let questions = node.write("questions", &questions)?;
        let asked = load(&node, server, &questions, &["-q", "64"])?;
        samples.add("large-zone", "answers", "1/s", asked.per_second);
        std::thread::sleep(SETTLED);
        samples.add(
            "large-zone",
            "resident_more",
            "MiB",
            (resident(&mesh)? - before) / 1024.0,
        );
        for last in 100..100 + CHANGES {
            let start = Instant::now();
            let fresh = mesh.manifests().join(".one");
            fs::write(&fresh, manifest(0, 1, last))?;
            fs::rename(&fresh, &one)?;
            let lab = tool::binary("lab")?.display().to_string();
            let wanted = format!("10.64.0.{last}");
            let mut waiting = node.spawn(
                "await-address",
                &[&lab, "await-name", "h0.bench.svc.cluster.local", &wanted],
            )?;
            ensure!(waiting.wait(UP_LIMIT)?.success(), "{}", waiting.log());
            samples.add(
                "large-zone",
                "change",
                "ms",
                start.elapsed().as_secs_f64() * 1e3,
            );
        }
        mesh.all_run()?;
    }
    Ok(())
}

/// Changes of one endpoint a round.
const CHANGES: u8 = 20;

/// The agent gives back memory ten seconds after the last change.
const SETTLED: Duration = Duration::from_secs(12);

fn resident(mesh: &Mesh) -> Result<f64> {
    let agent = mesh.take(RIGHT, "mesh-agent")?;
    let resident = agent.resident_kib()?;
    mesh.put(RIGHT, "mesh-agent", agent);
    Ok(resident as f64)
}
