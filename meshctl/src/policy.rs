//! `policy`: who decides of a flow, by this node's state; whether manifests are right, and say what is expected, by the
//! controller's program.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, Subcommand, ValueEnum};
use mesh_api::admin::{ExplainPolicyRequest, ExplainPolicyResponse, PolicyVerdict};
use serde::Serialize;

use crate::{
    Verdict,
    connect::{self, Agent, ask},
    failure::{Daemon, Failure},
    process,
    run::Screen,
    show::Report,
    table::{Cell, Tone, columns, printable, table},
};

#[derive(Debug, Subcommand)]
pub(crate) enum Policy {
    /// Whether manifests are right: each error with its file, line and field. No controller needs to run.
    Check {
        /// Their folder, or one file.
        manifests: PathBuf,
    },
    /// Whether the policies in manifests say of flows what a file of cases expects.
    Test {
        /// Their folder, or one file.
        manifests: PathBuf,
        /// As docs/policy.md has it: `cases: [{from: node/a, to: pod/shop/db, port: 5432, expect: allow}]`.
        cases: PathBuf,
    },
    /// Which rule decides of a flow, as the sender's side and as the receiver's, and of one the other way.
    Explain(Explain),
}

#[derive(Debug, Args)]
pub(crate) struct Explain {
    /// A node's name, NAMESPACE/NAME of a pod, or an address.
    #[arg(value_name = "SRC")]
    source: String,
    /// The same, and a port: edge-b1:22, shop/db:5432, [fd00::1]:80. Without a port: of a ping.
    #[arg(value_name = "DST[:PORT]")]
    destination: String,
    /// By what; TCP if there is a port, else ICMP.
    #[arg(long, value_enum, ignore_case = true)]
    protocol: Option<Protocol>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Protocol {
    Tcp,
    Udp,
    Sctp,
    Icmp,
}

impl Protocol {
    fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
            Self::Icmp => "ICMP",
        }
    }
}

pub(crate) async fn run(
    agent: Agent<'_>,
    command: Policy,
    screen: Screen,
) -> Result<Verdict, Failure> {
    let arguments = match command {
        Policy::Explain(arguments) => arguments,
        Policy::Check { manifests } => {
            return screen.show(&judged(&manifests, None).await?);
        }
        Policy::Test { manifests, cases } => {
            return screen.show(&judged(&manifests, Some(&cases)).await?);
        }
    };
    let request = request(&arguments)?;
    let mut client = connect::agent(agent).await?;
    let said = ask(Daemon::Agent, client.explain_policy(request.clone())).await?;
    screen.show(&Explained::new(request, said))
}

/// Of 10,000 files and as many cases; each takes some milliseconds.
const JUDGE_LIMIT: Duration = Duration::from_secs(120);

/// What is given instead of cases where there are none.
const NO_CASES: &str = "cases: []\n";

/// Asks the controller's program, which alone knows how manifests are read: the one beside this one, if there is one.
async fn judged(manifests: &Path, cases: Option<&Path>) -> Result<Judged, Failure> {
    let beside = std::env::current_exe().ok();
    let beside = beside.map(|own| own.with_file_name("mesh-controller"));
    let program = beside.filter(|path| path.is_file());
    let program = program.unwrap_or_else(|| PathBuf::from("mesh-controller"));
    let input = if cases.is_none() { NO_CASES } else { "" };
    let cases = cases
        .unwrap_or(Path::new("/dev/stdin"))
        .display()
        .to_string();
    let manifests = manifests.display().to_string();
    let words = ["policy-test", manifests.as_str(), cases.as_str()];
    let said = process::run(&program, &words, input, JUDGE_LIMIT).await;
    let said = said.map_err(Failure::Failed)?;
    match said.code {
        Some(0 | 1) => Ok(Judged::new(&said.text)),
        _ => Err(Failure::Refused(printable(said.complaint.trim()))),
    }
}

/// `policy check` and `policy test`.
#[derive(Debug, Serialize)]
pub(crate) struct Judged {
    pub(crate) passed: bool,
    /// Problems of the manifests first, then each case.
    pub(crate) results: Vec<Outcome>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Outcome {
    pub(crate) passed: bool,
    /// For people; its words may change.
    pub(crate) text: String,
}

impl Judged {
    /// Lines that begin with `ok` or `FAIL`, and a sum.
    fn new(said: &str) -> Self {
        let outcome = |line: &str| {
            let (passed, text) = match line.strip_prefix("FAIL ") {
                Some(text) => (false, text),
                None => (true, line.strip_prefix("ok ")?),
            };
            let text = text.trim_start().to_owned();
            Some(Outcome { passed, text })
        };
        let results: Vec<_> = said.lines().filter_map(outcome).collect();
        Self {
            passed: results.iter().all(|one| one.passed),
            results,
        }
    }
}

impl Report for Judged {
    fn text(&self, colours: bool) -> String {
        let row = |one: &Outcome| {
            let (word, tone) = match one.passed {
                true => ("ok", Tone::Good),
                false => ("FAIL", Tone::Bad),
            };
            vec![Cell::new(word, tone), (&one.text).into()]
        };
        let rows: Vec<_> = self.results.iter().map(row).collect();
        let failed = self.results.iter().filter(|one| !one.passed).count();
        let sum = match failed {
            0 => "all is as it should be\n".to_owned(),
            failed => format!("{failed} of {} are not\n", rows.len()),
        };
        columns(&rows, colours) + &sum
    }

    fn verdict(&self) -> Verdict {
        match self.passed {
            true => Verdict::Ok,
            false => Verdict::Degraded,
        }
    }
}

/// What the words on the command line ask for.
fn request(arguments: &Explain) -> Result<ExplainPolicyRequest, Failure> {
    let (destination, port) = end(&arguments.destination)?;
    let default = match port {
        Some(_) => Protocol::Tcp,
        None => Protocol::Icmp,
    };
    let protocol = arguments.protocol.unwrap_or(default);
    if port.is_some() == (protocol == Protocol::Icmp) {
        let text = match port {
            Some(_) => "ICMP has no ports",
            None => "which port? DST:PORT",
        };
        return Err(Failure::Refused(text.to_owned()));
    }
    Ok(ExplainPolicyRequest {
        source: arguments.source.clone(),
        destination,
        port: port.unwrap_or_default().into(),
        protocol: protocol.as_str().to_owned(),
    })
}

/// `HOST`, `HOST:PORT`, an IPv6 address, or one in brackets with a port.
fn end(text: &str) -> Result<(String, Option<u16>), Failure> {
    if text.parse::<std::net::IpAddr>().is_ok() {
        return Ok((text.to_owned(), None));
    }
    let Some((host, port)) = text.rsplit_once(':') else {
        return Ok((text.to_owned(), None));
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    match port.parse() {
        Ok(port) if port > 0 && !host.is_empty() => Ok((host.to_owned(), Some(port))),
        Ok(_) | Err(_) => Err(Failure::Refused(format!(
            "{text:?} is no DST[:PORT]: edge-b1:22, shop/db:5432, [fd00::1]:80"
        ))),
    }
}

/// `policy explain`.
#[derive(Debug, Serialize)]
pub(crate) struct Explained {
    pub(crate) source: String,
    pub(crate) destination: String,
    /// `TCP`, `UDP`, `SCTP` or `ICMP`.
    pub(crate) protocol: String,
    /// `null` of ICMP.
    pub(crate) port: Option<u32>,
    /// The strictest of what both sides say: `allow`, `audit`, `deny`, or `none`: nothing is enforced.
    pub(crate) verdict: String,
    /// Who says it.
    pub(crate) by: String,
    /// The same of a flow that the destination opens to that port of the source.
    pub(crate) back: Option<Back>,
    /// False: this node does not enforce policies (`policy = false`), whatever they say.
    pub(crate) enforced_here: bool,
    /// What each side says.
    pub(crate) sides: Vec<Side>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Back {
    pub(crate) verdict: String,
    pub(crate) by: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct Side {
    /// `there`, or `back`: the other way, as a flow of its own. Answers pass with the flow that they answer.
    pub(crate) way: String,
    pub(crate) from: String,
    pub(crate) to: String,
    /// Whose tables say it.
    pub(crate) node: String,
    /// `out`: as the sender's side; `in`: as the receiver's.
    pub(crate) direction: String,
    /// As above.
    pub(crate) verdict: String,
    /// `MeshPolicy NAME`, `NetworkPolicy NAMESPACE/NAME`, `defaultAction` and so on.
    pub(crate) by: String,
}

/// The strictest comes first.
const STRICTNESS: [&str; 4] = ["deny", "audit", "allow", "none"];

impl Explained {
    fn new(asked: ExplainPolicyRequest, said: ExplainPolicyResponse) -> Self {
        let side = |one: PolicyVerdict| Side {
            way: one.way,
            from: one.from,
            to: one.to,
            node: one.node,
            direction: one.direction,
            verdict: one.verdict,
            by: one.by,
        };
        let sides: Vec<_> = said.verdicts.into_iter().map(side).collect();
        let strictest = |way: &str| {
            let all = sides.iter().filter(|side| side.way == way);
            let strictness = |side: &&Side| STRICTNESS.iter().position(|it| *it == side.verdict);
            let first = all.min_by_key(strictness)?;
            Some((first.verdict.clone(), first.by.clone()))
        };
        let (verdict, by) = strictest("there").unwrap_or_default();
        let back = strictest("back").map(|(verdict, by)| Back { verdict, by });
        Self {
            source: asked.source,
            destination: asked.destination,
            port: (asked.port > 0).then_some(asked.port),
            protocol: asked.protocol,
            verdict,
            by,
            back,
            enforced_here: said.enforces,
            sides,
        }
    }
}

/// For people.
fn word(verdict: &str, by: &str) -> String {
    match verdict {
        "deny" => format!("denied by {by}"),
        "audit" => format!("passes, but {by} would deny it once it is no audit any more"),
        "allow" => format!("allowed by {by}"),
        _ => "passes: there is no policy".to_owned(),
    }
}

impl Report for Explained {
    fn text(&self, colours: bool) -> String {
        let port = self
            .port
            .map_or_else(String::new, |port| format!(" {port}"));
        let mut head = format!(
            "{} to {}, {}{port}: {}\n",
            self.source,
            self.destination,
            self.protocol,
            word(&self.verdict, &self.by)
        );
        if let Some(back) = &self.back {
            head += &format!("the other way: {}\n", word(&back.verdict, &back.by));
        }
        if !self.enforced_here {
            head += "this node does not enforce policies (`policy = false`)\n";
        }
        let lines: Vec<_> = head.lines().map(printable).collect();
        let row = |side: &Side| {
            let tone = match side.verdict.as_str() {
                "deny" => Tone::Bad,
                "audit" => Tone::Warning,
                "allow" => Tone::Good,
                _ => Tone::Faint,
            };
            vec![
                (&side.way).into(),
                (&side.from).into(),
                (&side.to).into(),
                (&side.node).into(),
                (&side.direction).into(),
                Cell::new(&side.verdict, tone),
                (&side.by).into(),
            ]
        };
        let titles = ["WAY", "FROM", "TO", "AT NODE", "AS", "VERDICT", "BY"];
        let rows = self.sides.iter().map(row).collect();
        format!("{}\n\n{}", lines.join("\n"), table(&titles, rows, colours))
    }

    fn verdict(&self) -> Verdict {
        match self.verdict.as_str() {
            "deny" => Verdict::Down,
            "audit" => Verdict::Degraded,
            _ => Verdict::Ok,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_controller_s_program_says_is_read_line_by_line() {
        let said = "FAIL m.yaml:3: document 1: spec.rules: x\nok   a to b, TCP 22: deny by p\n1 cases, 1 failed\n";
        let judged = Judged::new(said);
        let results = judged.results.iter();
        let results: Vec<_> = results.map(|one| (one.passed, one.text.as_str())).collect();
        let expected = [
            (false, "m.yaml:3: document 1: spec.rules: x"),
            (true, "a to b, TCP 22: deny by p"),
        ];
        assert_eq!(results, expected);
        assert!(!judged.passed && Judged::new("0 cases, 0 failed\n").passed);
    }

    #[test]
    fn ends_are_read_with_and_without_a_port() {
        for (text, host, port) in [
            ("edge-b1", "edge-b1", None),
            ("edge-b1:22", "edge-b1", Some(22)),
            ("shop/db:5432", "shop/db", Some(5432)),
            ("10.0.0.1:80", "10.0.0.1", Some(80)),
            ("fd00::1", "fd00::1", None),
            ("[fd00::1]:80", "fd00::1", Some(80)),
        ] {
            assert_eq!(end(text).unwrap(), (host.to_owned(), port), "{text}");
        }
        for wrong in ["edge-b1:", "edge-b1:0", ":80", "edge-b1:ssh", "x:70000"] {
            assert!(matches!(end(wrong), Err(Failure::Refused(_))), "{wrong}");
        }
    }

    #[test]
    fn a_protocol_with_ports_wants_one_and_icmp_none() {
        let ask = |destination: &str, protocol| {
            let asked = request(&Explain {
                source: "a".to_owned(),
                destination: destination.to_owned(),
                protocol,
            });
            asked.map(|asked| asked.protocol).ok()
        };
        for (destination, protocol, expected) in [
            ("b:22", None, Some("TCP")),
            ("b", None, Some("ICMP")),
            ("b:53", Some(Protocol::Udp), Some("UDP")),
            ("b", Some(Protocol::Udp), None),
            ("b:1", Some(Protocol::Icmp), None),
        ] {
            assert_eq!(
                ask(destination, protocol).as_deref(),
                expected,
                "{destination}"
            );
        }
    }
}
