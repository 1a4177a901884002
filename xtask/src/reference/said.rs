//! `cli.md` and `metrics.md`: what the programs themselves say, when they run.

use std::{collections::BTreeMap, fmt::Write as _, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use netns_tests::{mesh::Mesh, node::Node, tool};

use super::{head, header, row};
use crate::root;

/// What an operator types.
const PROGRAMS: [&str; 4] = ["meshctl", "mesh-agent", "mesh-relay", "mesh-controller"];

/// Daemons with a page, and the port of it (`metrics_listen`).
const METRICS: [(&str, u16); 3] = [
    ("mesh-agent", 9640),
    ("mesh-relay", 9641),
    ("mesh-controller", 9642),
];

const LIMIT: Duration = Duration::from_secs(10);

/// From the binaries in `bins`.
pub(super) fn cli(bins: &Path) -> Result<String> {
    let about = "What each program says to `--help`. `meshctl man --out DIR` writes the same as manual pages.";
    let mut page = head("Commands", about);
    for program in PROGRAMS {
        let mut left = vec![vec![program.to_owned()]];
        while let Some(words) = left.pop() {
            let help = help(bins, &words)?;
            let title = words.join(" ");
            write!(
                page,
                "\n## `{title}`\n\n```text\n{}\n```\n",
                help.trim_end()
            )?;
            let mut below = commands(&help);
            below.reverse(); // The last one is taken first.
            left.extend(
                below
                    .into_iter()
                    .map(|word| [words.clone(), vec![word]].concat()),
            );
        }
    }
    Ok(page)
}

fn help(bins: &Path, words: &[String]) -> Result<String> {
    let (program, rest) = words.split_first().context("no program")?;
    let mut command = Command::new(bins.join(program));
    let output = command.args(rest).arg("--help").output();
    let output = output.with_context(|| format!("start {program}"))?;
    ensure!(output.status.success(), "{}: {output:?}", words.join(" "));
    let text = String::from_utf8(output.stdout)?;
    let lines = text.lines().map(str::trim_end);
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// Names in the section of commands, without the help itself.
fn commands(help: &str) -> Vec<String> {
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let lines = lines.take_while(|line| !line.is_empty());
    let names = lines.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    let names = names.filter(|name| !name.is_empty() && *name != "help");
    names.map(str::to_owned).collect()
}

/// From the binaries in `bins`, in a lab.
pub(super) fn metrics(bins: &Path) -> Result<String> {
    let about = "What daemons showed at `/metrics`, in a lab with two nodes that had spoken with each other. OpenMetrics 1.0; a counter's series end with \
                 `_total`. What never occurred is left out by some; alerts and a dashboard: `deploy/monitoring/`.";
    let mut page = head("Metrics", about);
    let mut mesh = Mesh::start(bins, &root().join("examples/demo"))?;
    mesh.start_relay()?;
    let nodes = ["edge-a1", "edge-b1"];
    let link = netns_tests::link::Impairment::delay_loss(Duration::from_millis(10), 0.0);
    mesh.add_two_sites(link, &nodes[..1], &nodes[1..])?;
    nodes.iter().try_for_each(|node| mesh.start_agent(node))?;
    nodes
        .iter()
        .try_for_each(|node| mesh.agent_ready(node, 2))?;
    mesh.ask("edge-a1", &["ping", "edge-b1", "-c", "2", "-i", "100"])?;
    mesh.resolve("edge-a1", "edge-b1.mesh")?;
    let agent = mesh.node("edge-a1")?;
    for (daemon, port) in METRICS {
        let node = if daemon == "mesh-agent" {
            &agent
        } else {
            mesh.cloud()
        };
        let families = families(&scrape(node, port)?)?;
        write!(
            page,
            "\n## {daemon} (`127.0.0.1:{port}`)\n\n{}",
            header(["metric", "type", "labels", "what"])
        )?;
        for (name, family) in families {
            page += &row([
                &format!("`{name}`"),
                &family.kind,
                &family.labels.join(", "),
                &family.help,
            ]);
        }
    }
    Ok(page)
}

fn scrape(node: &Node, port: u16) -> Result<String> {
    let url = format!("http://127.0.0.1:{port}/metrics");
    tool::eventually("metrics are shown", LIMIT, || {
        node.run(&["curl", "-sSf", "-m", "5", &url], LIMIT)?.ok()
    })
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Family {
    kind: String,
    help: String,
    labels: Vec<String>,
}

/// By name, as a page has them.
fn families(page: &str) -> Result<BTreeMap<String, Family>> {
    let mut found: BTreeMap<String, Family> = BTreeMap::new();
    let mut last = String::new();
    for line in page.lines() {
        let words: Vec<_> = line.splitn(4, ' ').collect();
        match words.as_slice() {
            ["#", "HELP", name, help] => {
                (*name).clone_into(&mut last);
                found.entry(last.clone()).or_default().help = (*help).to_owned();
            }
            ["#", "TYPE", name, kind] => {
                found.entry((*name).to_owned()).or_default().kind = (*kind).to_owned()
            }
            ["#", ..] => {}
            _ => {
                let family = found.get_mut(&last);
                let family = family.with_context(|| format!("a series without HELP: {line}"))?;
                for label in labels(line) {
                    if !family.labels.contains(&label) {
                        family.labels.push(label);
                    }
                }
            }
        }
    }
    if found.is_empty() {
        bail!("no metrics are shown: {page}");
    }
    Ok(found)
}

fn labels(series: &str) -> Vec<String> {
    let Some((_, rest)) = series.split_once('{') else {
        return Vec::new();
    };
    let names = rest
        .split("=\"")
        .filter_map(|part| part.rsplit(['"', ',', '{']).next());
    let names = names.filter(|name| name.chars().all(|c| c.is_ascii_lowercase() || c == '_'));
    names
        .filter(|name| !name.is_empty())
        .map(|name| format!("`{name}`"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_read_from_the_help() {
        let help = "About.\n\nCommands:\n  status  How\n            it is\n  path    Why\n  help    Help\n\nOptions:\n  -h";
        assert_eq!(commands(help), ["status", "path"]);
    }

    #[test]
    fn metrics_are_read_with_their_labels() {
        let page = "# HELP a_b Things.\n# TYPE a_b counter\na_b_total{x=\"1\",le=\"+Inf\"} 1\na_b_total{x=\"2\"} 2\n# EOF";
        let family = Family {
            kind: "counter".to_owned(),
            help: "Things.".to_owned(),
            labels: vec!["`x`".to_owned(), "`le`".to_owned()],
        };
        assert_eq!(
            families(page).unwrap(),
            BTreeMap::from([("a_b".to_owned(), family)])
        );
        assert!(families("").is_err());
    }
}
