//! `lab`: a mesh in network namespaces of this machine, by the program `lab` beside this one. It alone knows how: nothing of it is in here.

use std::{
    env, os::unix::process::CommandExt as _, path::PathBuf, process::Command, time::Duration,
};

use clap::{Args, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::{
    Verdict,
    failure::Failure,
    process,
    run::Screen,
    show::Report,
    table::{Cell, printable, table},
};

/// 64 agents at 26 sites, on a slow machine.
const UP_LIMIT: Duration = Duration::from_secs(300);

/// Processes are killed within 5 s, and namespaces go one by one.
const DOWN_LIMIT: Duration = Duration::from_secs(60);

/// Sites, unless it is said how many: two networks that do not reach each other.
const SITES: u32 = 2;

#[derive(Debug, Subcommand)]
pub(crate) enum Lab {
    /// Makes a mesh of the installed programs that stays until `lab down`: a cloud with controller and relay, and sites behind NATs with
    /// nodes. As root.
    Up(Up),
    /// Labs that are up, and their nodes.
    List,
    /// Runs a command on a node of a lab, or on `cloud`: in its network, cgroup and mounts. Exit code: the command's.
    Run {
        /// Of this lab; not needed if only one is up.
        #[arg(long, value_name = "ID")]
        lab: Option<String>,
        /// As `lab up` names it.
        node: String,
        /// What is run. `meshctl` finds the node's agent.
        #[arg(trailing_var_arg = true, required = true, value_name = "COMMAND")]
        command: Vec<String>,
    },
    /// Takes a lab away, with all that runs in it and its files.
    Down {
        /// Not needed if only one is up.
        #[arg(value_name = "ID")]
        lab: Option<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    /// Nodes, one after the other to each site: edge-a1, edge-b1, edge-a2 …
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    nodes: u32,
    /// Sites, each with a node at least; 2 unless said.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=26))]
    sites: Option<u32>,
    /// How a site's router translates (RFC 4787); given again: of the sites in turn.
    #[arg(long, value_name = "KIND", value_enum, default_values = ["port-restricted"])]
    nat: Vec<Nat>,
    /// Of each site's link to the internet, each way.
    #[arg(long, value_name = "MS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    delay_ms: u32,
    /// Percent of packets that vanish there, each way.
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=99))]
    loss: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Nat {
    None,
    FullCone,
    RestrictedCone,
    PortRestricted,
    /// The next port for each destination.
    Symmetric,
    /// A random port for each destination.
    SymmetricRandom,
    /// A home's router behind a carrier's.
    Double,
}

/// `lab up`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Mesh {
    pub(crate) id: String,
    /// Everything that its machines write.
    pub(crate) dir: String,
    /// Controller and relay run there.
    pub(crate) cloud: Place,
    pub(crate) nodes: Vec<Node>,
}

/// Where a machine is.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Place {
    pub(crate) name: String,
    /// Its network namespace, below `/run/netns`.
    pub(crate) netns: String,
    pub(crate) cgroup: String,
    /// Its configuration, state and logs.
    pub(crate) dir: String,
    /// Of its agent; of the cloud: of the controller.
    pub(crate) admin_socket: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Node {
    pub(crate) site: String,
    pub(crate) nat: String,
    pub(crate) overlay_addresses: Vec<String>,
    #[serde(flatten)]
    pub(crate) place: Place,
}

/// `lab list`.
#[derive(Debug, Serialize)]
pub(crate) struct Labs {
    pub(crate) labs: Vec<Kept>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Kept {
    pub(crate) id: String,
    /// Nodes and routers.
    pub(crate) nodes: Vec<String>,
}

/// `lab down`.
#[derive(Debug, Serialize)]
pub(crate) struct Gone {
    pub(crate) down: String,
}

pub(crate) async fn run(command: Lab, screen: Screen) -> Result<Verdict, Failure> {
    let program = program()?;
    match command {
        Lab::Up(up) => {
            let sites = up.sites()?;
            screen.note(&format!(
                "bringing up {} nodes at {sites} sites …",
                up.nodes
            ));
            let nats: Vec<_> = up.nat.iter().map(|nat| nat.word()).collect();
            let words = [
                "up".to_owned(),
                up.nodes.to_string(),
                sites.to_string(),
                nats.join(","),
                up.delay_ms.to_string(),
                (f64::from(up.loss) / 100.0).to_string(),
            ];
            let words: Vec<_> = words.iter().map(String::as_str).collect();
            let mesh: Mesh = read(&said(&program, &words, UP_LIMIT).await?)?;
            screen.show(&mesh)
        }
        Lab::List => screen.show(&list(&program).await?),
        Lab::Down { lab } => {
            let down = chosen(list(&program).await?, lab)?;
            said(&program, &["down", &down], DOWN_LIMIT).await?;
            screen.show(&Gone { down })
        }
        Lab::Run { lab, node, command } => {
            let id = chosen(list(&program).await?, lab)?;
            let error = Command::new(&program)
                .args(["run", &id, &node])
                .args(command)
                .exec();
            Err(Failure::Failed(format!(
                "{} cannot be run: {error}",
                program.display()
            )))
        }
    }
}

impl Up {
    fn sites(&self) -> Result<u32, Failure> {
        match self.sites {
            None => Ok(SITES.min(self.nodes)),
            Some(sites) if sites <= self.nodes => Ok(sites),
            Some(sites) => Err(Failure::Refused(format!(
                "--sites {sites} needs as many nodes: --nodes {sites}"
            ))),
        }
    }
}

impl Nat {
    fn word(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// Of the package `holdfast-lab`: `lab`, seen from this program.
const INSTALLED: &str = "../lib/holdfast/lab";

/// The one beside this program, as a build leaves them, or the package's: what it starts is beside it.
fn program() -> Result<PathBuf, Failure> {
    let own = env::current_exe();
    let own = own.map_err(|error| Failure::Failed(format!("where this program is: {error}")))?;
    let places = ["lab", INSTALLED].map(|lab| own.with_file_name(lab));
    places.into_iter().find(|lab| lab.is_file()).ok_or_else(|| {
        Failure::Unreachable(
            "the program `lab` is not there: install the package holdfast-lab; in the source tree `cargo build --workspace` makes it, and \
             target/debug/meshctl finds it"
                .to_owned(),
        )
    })
}

/// What it says, if it succeeds.
async fn said(
    program: &std::path::Path,
    words: &[&str],
    limit: Duration,
) -> Result<String, Failure> {
    let said = process::run(program, words, "", limit).await;
    let said = said.map_err(Failure::Failed)?;
    match said.code {
        Some(0) => Ok(said.text),
        _ => Err(Failure::Failed(printable(
            said.complaint.trim().trim_start_matches("lab: "),
        ))),
    }
}

fn read<T: for<'a> Deserialize<'a>>(text: &str) -> Result<T, Failure> {
    serde_json::from_str(text).map_err(|error| Failure::Failed(format!("lab said: {error}")))
}

async fn list(program: &std::path::Path) -> Result<Labs, Failure> {
    let labs = read(&said(program, &["list"], DOWN_LIMIT).await?)?;
    Ok(Labs { labs })
}

/// The lab that is meant.
fn chosen(Labs { labs }: Labs, id: Option<String>) -> Result<String, Failure> {
    let mut ids: Vec<_> = labs.into_iter().map(|lab| lab.id).collect();
    let refused = |text: String| Err(Failure::Refused(text));
    match id {
        Some(id) if ids.contains(&id) => Ok(id),
        None if ids.len() == 1 => Ok(ids.remove(0)),
        _ if ids.is_empty() => refused("no lab is up (`meshctl lab up`)".to_owned()),
        Some(id) => refused(format!("no lab {id} is up; there is {}", ids.join(", "))),
        None => refused(format!("which lab? {}", ids.join(", "))),
    }
}

impl Report for Mesh {
    fn text(&self, colours: bool) -> String {
        let row = |node: &Node| -> Vec<Cell> {
            vec![
                (&node.place.name).into(),
                (&node.site).into(),
                (&node.nat).into(),
                node.overlay_addresses.join(", ").into(),
            ]
        };
        let rows = self.nodes.iter().map(row).collect();
        let nodes = table(&["NODE", "SITE", "NAT", "OVERLAY"], rows, colours);
        let first = self.nodes.first().map(|node| node.place.name.as_str());
        format!(
            "lab {0} is up, in {1}\n\n{nodes}\nmeshctl lab run {2} -- meshctl status\nmeshctl lab down {0}\n",
            self.id,
            self.dir,
            first.unwrap_or("cloud"),
        )
    }
}

impl Report for Labs {
    fn text(&self, colours: bool) -> String {
        if self.labs.is_empty() {
            return "no lab is up\n".to_owned();
        }
        let row = |lab: &Kept| -> Vec<Cell> { vec![(&lab.id).into(), lab.nodes.join(" ").into()] };
        table(
            &["LAB", "NODES"],
            self.labs.iter().map(row).collect(),
            colours,
        )
    }
}

impl Report for Gone {
    fn text(&self, _colours: bool) -> String {
        format!("lab {} is gone\n", self.down)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[test]
    fn what_is_run_has_its_own_options_with_and_without_two_dashes() {
        for words in ["-- meshctl status --json", "meshctl status --json"] {
            let typed = format!("meshctl lab run edge-a1 {words}");
            let cli = crate::cli::Cli::try_parse_from(typed.split(' ')).unwrap();
            assert!(!cli.json);
            let crate::cli::Command::Lab(Lab::Run { command, .. }) = cli.command else {
                panic!("{typed}");
            };
            assert_eq!(command, ["meshctl", "status", "--json"]);
        }
    }

    #[test]
    fn no_site_is_without_a_node() {
        let up = |nodes, sites| Up {
            nodes,
            sites,
            nat: Vec::new(),
            delay_ms: 0,
            loss: 0,
        };
        for (nodes, sites, want) in [
            (1, None, Some(1)),
            (4, None, Some(2)),
            (3, Some(3), Some(3)),
            (2, Some(3), None),
        ] {
            assert_eq!(up(nodes, sites).sites().ok(), want, "{nodes} {sites:?}");
        }
    }

    #[test]
    fn the_only_lab_needs_no_id() {
        let labs = |ids: &[&str]| Labs {
            labs: ids
                .iter()
                .map(|&id| Kept {
                    id: id.to_owned(),
                    nodes: Vec::new(),
                })
                .collect(),
        };
        let id = |id: &str| Some(id.to_owned());
        assert_eq!(chosen(labs(&["hf1x0"]), None).unwrap(), "hf1x0");
        assert_eq!(
            chosen(labs(&["hf1x0", "hf2x0"]), id("hf2x0")).unwrap(),
            "hf2x0"
        );
        for (ids, asked, words) in [
            (&[][..], None, "no lab is up"),
            (&[], id("hf1x0"), "no lab is up"),
            (&["hf1x0"], id("hf2x0"), "there is hf1x0"),
            (&["hf1x0", "hf2x0"], None, "which lab? hf1x0, hf2x0"),
        ] {
            let refused = chosen(labs(ids), asked).unwrap_err();
            assert!(matches!(refused, Failure::Refused(_)));
            assert!(refused.to_string().contains(words), "{refused}");
        }
    }
}
