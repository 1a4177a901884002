//! What can be asked.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use ipnet::IpNet;

use crate::{bpf::Bpf, keys::Keys, lab::Lab, policy::Policy, routes::Routes};

/// Looks into a Holdfast mesh, and runs its controller.
///
/// Exit codes: 0 ok, 1 degraded, 2 down (also: the daemon cannot be reached), 64 usage.
#[derive(Debug, Parser)]
#[command(name = "meshctl", version, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// The agent's admin socket.
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        default_value = "/run/holdfast/agent.sock"
    )]
    pub(crate) socket: PathBuf,
    /// The controller's admin socket.
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        default_value = "/run/holdfast/controller.sock"
    )]
    pub(crate) controller_socket: PathBuf,
    /// Ask the agent of this node instead, across the mesh: of the commands that ask an agent, those that change nothing. Its
    /// `operators` have to name this machine's node.
    // Not `node`, which is what some commands are about.
    #[arg(long = "node", id = "at_node", global = true, value_name = "NAME")]
    pub(crate) at_node: Option<String>,
    /// Print one JSON document, whose fields are described in meshctl's README.
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// How this node is: health, relays, NAT, snapshot, peers by state.
    Status {
        #[command(flatten)]
        again: Again,
    },
    /// Whether this node is well, and if not, why: for probes and scripts.
    Health {
        #[command(flatten)]
        again: Again,
    },
    /// What is wrong with this node and its mesh, the worst first, with what to do about it.
    Doctor,
    /// Peers that this node has spoken with since its agent started: state, path, round trip and traffic.
    Peers {
        #[command(flatten)]
        again: Again,
    },
    /// Relays: by what this node is linked to each, how far it is, what is wrong.
    Relays {
        #[command(flatten)]
        again: Again,
    },
    /// What the network lets through: NAT, UDP, port mapping, relays, packet sizes, portals.
    Netcheck,
    /// Follows a flow's first packet: name, service, endpoint, route, policy, path, MTU, each with its verdict.
    Trace(Trace),
    /// Packets that this node dropped or refused, by reason.
    Drops {
        /// Also the reasons that never occurred.
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        again: Again,
    },
    /// What changed last: peers, paths, links to relays, the controller, health. With --watch, what changes from now on, too.
    Events {
        /// Show so many, the newest.
        #[arg(short = 'n', long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..))]
        last: u32,
        /// Only what is about this node or relay.
        #[arg(long, value_name = "NAME")]
        about: Option<String>,
        #[command(flatten)]
        again: Again,
    },
    /// What this node keeps on disk, for the time without a controller.
    #[command(subcommand)]
    Snapshot(Snapshot),
    /// Sends echoes to a node through the tunnel: by the path in use, or by another to measure it.
    Ping(Ping),
    /// How packets reach a node.
    #[command(subcommand)]
    Path(Path),
    /// How large packets may be.
    #[command(subcommand)]
    Mtu(Mtu),
    /// Round trips and throughput to a node by TCP through the mesh. `meshctl perf --serve` has to run there.
    Perf(Perf),
    /// Writes packets inside the tunnel, and the tunnel's own outside, to a pcapng file. As root.
    Capture(Capture),
    /// Peers, paths, rates and loss on a full screen, until `q`.
    Top {
        /// Look again every so many seconds.
        #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = parse_seconds)]
        every: Duration,
    },
    /// What works from here, tried.
    #[command(subcommand)]
    Test(Test),
    /// Services, and which of their endpoints new flows go to from here.
    Services {
        /// Show each endpoint.
        #[arg(long)]
        endpoints: bool,
        #[command(flatten)]
        again: Again,
    },
    /// This node's resolver.
    #[command(subcommand)]
    Dns(Dns),
    /// The agent's programs and maps in the kernel.
    #[command(subcommand)]
    Bpf(Bpf),
    /// Where packets go.
    #[command(subcommand)]
    Routes(Routes),
    /// Who may speak with whom.
    #[command(subcommand)]
    Policy(Policy),
    /// Keys and certificates, without their private halves.
    #[command(subcommand)]
    Keys(Keys),
    /// Leads standard input and output to a port of a node, by the proxy of this machine's agent:
    /// `ssh -o ProxyCommand='meshctl tunnel %h:%p' edge-a1`.
    Tunnel {
        /// The node's name, or one of its addresses, and a port that the proxy's rules allow: edge-a1:22.
        #[arg(value_name = "NODE:PORT")]
        target: String,
        /// The proxy's socket.
        #[arg(long, value_name = "PATH", default_value = "/run/holdfast/proxy.sock")]
        proxy: PathBuf,
    },
    /// Join tokens (controller).
    #[command(subcommand)]
    Token(Token),
    /// Shows the nodes that wait until somebody lets them in (`joinApproval: manual`); with names, lets these in
    /// (controller).
    Approve(Approve),
    /// Nodes that the controller knows.
    Nodes,
    /// One of them (controller).
    #[command(subcommand)]
    Node(Node),
    /// Relays (controller).
    #[command(subcommand)]
    Relay(Relay),
    /// The controller itself.
    #[command(subcommand)]
    Controller(Controller),
    /// A mesh on this machine alone, in network namespaces, to try things with.
    #[command(subcommand)]
    Lab(Lab),
    /// Gathers all reports of this node and the logs that are named into a folder, without keys.
    Bugreport(Bugreport),
    /// Prints what a shell needs to complete this command: `meshctl completion bash > /etc/bash_completion.d/meshctl`.
    Completion {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Writes a manual page for each command.
    Man {
        /// The folder for the files; made if it is not there.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Says whether this machine, or a cluster, can have Holdfast.
    Install(Install),
    /// Takes Holdfast from the cluster that kubectl speaks with, and from every node of it.
    Uninstall(Uninstall),
}

impl Command {
    /// Whether it asks an agent and nothing else, so that it may be another node's.
    pub(crate) fn asks_an_agent(&self) -> bool {
        match self {
            Self::Status { .. }
            | Self::Health { .. }
            | Self::Doctor
            | Self::Peers { .. }
            | Self::Relays { .. }
            | Self::Netcheck
            | Self::Trace(_)
            | Self::Drops { .. }
            | Self::Events { .. }
            | Self::Snapshot(_)
            | Self::Ping(_)
            | Self::Path(_)
            | Self::Services { .. }
            | Self::Dns(Dns::Query { .. } | Dns::Status { .. } | Dns::Cache { flush: false, .. })
            | Self::Top { .. }
            | Self::Bpf(_)
            | Self::Routes(_)
            | Self::Policy(Policy::Explain(_))
            | Self::Keys(Keys::List | Keys::Expiry) => true,
            // What is sent by this machine itself.
            Self::Mtu(_) | Self::Test(_) | Self::Perf(_) | Self::Capture(_) => false,
            Self::Dns(Dns::Cache { flush: true, .. })
            | Self::Tunnel { .. }
            | Self::Policy(Policy::Check { .. } | Policy::Test { .. })
            | Self::Keys(Keys::Rotate | Keys::Revoke { .. })
            | Self::Token(_)
            | Self::Approve(_)
            | Self::Nodes
            | Self::Node(_)
            | Self::Relay(_)
            | Self::Controller(_)
            | Self::Lab(_)
            | Self::Bugreport(_)
            | Self::Completion { .. }
            | Self::Man { .. }
            | Self::Install(_)
            | Self::Uninstall(_) => false,
        }
    }
}

/// Showing something again and again.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Again {
    /// Show it again every so many seconds, until interrupted.
    #[arg(short = 'w', long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", value_parser = parse_seconds)]
    pub(crate) watch: Option<Duration>,
    /// Stop after so many times.
    #[arg(long, value_name = "N", requires = "watch", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: Option<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct Trace {
    /// Where from, a node's name, if not from this one; and where to: edge-b1:22, 10.43.0.10:80, shop/inventory:80,
    /// inventory.shop.svc.cluster.local:80, [fd00::1]:80.
    #[arg(value_name = "[SOURCE] DESTINATION:PORT", num_args = 1..=2, required = true)]
    pub(crate) words: Vec<String>,
    /// The flow is UDP, not TCP.
    #[arg(long)]
    pub(crate) udp: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Snapshot {
    /// What is in it: how many resources of each kind, or each by its name.
    Show {
        /// Each resource.
        #[arg(long)]
        resources: bool,
    },
    /// How old the state is that this node serves.
    Age,
    /// What changed from the older slot to the newer one.
    Diff,
    /// Checks every signature again. Exit code 1 if one is wrong, 2 if no slot can be used.
    Verify,
    /// Writes the newest slot that can be used to a file: an encoded `holdfast.control.v1.SnapshotFile`.
    Export {
        /// The file, which must not be there yet.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Bugreport {
    /// The folder for the files, which must not be there yet.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Also take out addresses outside the overlay.
    #[arg(long)]
    pub(crate) redact: bool,
    /// A log file to put in, without what looks like a key; may be given again. From the journal:
    /// `journalctl -u mesh-agent -n 5000 > FILE`.
    #[arg(long, value_name = "FILE")]
    pub(crate) log: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Uninstall {
    /// Yes: all resources of the mesh and every node's keys are deleted.
    #[arg(long, required = true)]
    pub(crate) yes: bool,
    /// How long nodes are waited for: 90s, 30m.
    #[arg(long, default_value = "5m", value_parser = parse_ttl)]
    pub(crate) wait: Duration,
    /// Give up nodes that were not reached: what agents left there stays until `mesh-agent purge`.
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Install {
    /// Only look; nothing is changed. What installs is `kubectl apply -k deploy/kubernetes`, or the Debian package.
    #[arg(long, required = true)]
    pub(crate) check: bool,
    /// Look at the cluster that kubectl speaks with, not at this machine.
    #[arg(long, conflicts_with_all = ["listen_port", "overlay", "interface"])]
    pub(crate) cluster: bool,
    /// The agent's `listen_port`.
    #[arg(long, value_name = "PORT", default_value_t = 51_820, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) listen_port: u16,
    /// The MeshConfig's `overlayIPv4CIDR`.
    #[arg(long, value_name = "CIDR", default_value = "100.96.0.0/12")]
    pub(crate) overlay: IpNet,
    /// The agent's `interface`.
    #[arg(long, value_name = "NAME", default_value = "holdfast0")]
    pub(crate) interface: String,
}

#[derive(Debug, Args)]
pub(crate) struct Ping {
    /// A node's name, or one of its overlay addresses.
    pub(crate) node: String,
    /// How many echoes; with --until-direct at most so many. 4, and 30, unless said.
    #[arg(short = 'c', long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) count: Option<u32>,
    /// Milliseconds between them.
    #[arg(short = 'i', long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(10..=60_000))]
    pub(crate) interval_ms: u32,
    /// Milliseconds to wait for an answer.
    #[arg(short = 'W', long, value_name = "MS", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(10..=60_000))]
    pub(crate) timeout_ms: u32,
    /// Stop as soon as the path in use is a direct one; if none comes into use, say why. The echoes count as traffic, so that one
    /// is looked for.
    #[arg(long, conflicts_with = "via")]
    pub(crate) until_direct: bool,
    /// By this path, whichever is in use: direct or relay (the best such), relay:NAME, or an address and port as `path why`
    /// shows it. The path in use stays the same.
    #[arg(long, value_name = "PATH")]
    pub(crate) via: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Path {
    /// Which path is used to a node, which were tried, and why it is not a direct one.
    Why {
        /// The node's name.
        node: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Mtu {
    /// Sends echoes of different sizes through the tunnel: which is the largest that comes back. As root.
    Probe {
        /// The node's name.
        node: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Perf {
    /// The node's name.
    #[arg(required_unless_present = "serve", conflicts_with = "serve")]
    pub(crate) node: Option<String>,
    /// Listen for others, at this node's overlay address only.
    #[arg(long)]
    pub(crate) serve: bool,
    /// How long each way is measured, at most 60s; with --serve how long is listened, at most 1h. 5s, and 60s, unless said.
    #[arg(long, value_name = "TIME", value_parser = parse_hour)]
    pub(crate) time: Option<Duration>,
    /// Most MiB each way.
    #[arg(long, value_name = "MIB", default_value_t = 1024, conflicts_with = "serve", value_parser = clap::value_parser!(u64).range(1..=8192))]
    pub(crate) mebibytes: u64,
}

#[derive(Debug, Args)]
pub(crate) struct Capture {
    /// The file, which must not be there yet.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// Only what is inside the tunnel, in plain text.
    #[arg(long, conflicts_with = "outside")]
    pub(crate) inside: bool,
    /// Only the tunnel's own packets outside, which nobody can read.
    #[arg(long)]
    pub(crate) outside: bool,
    /// For how long: 90s, 5m, at most an hour.
    #[arg(long, default_value = "10s", value_parser = parse_hour)]
    pub(crate) time: Duration,
    /// Most packets.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) packets: u64,
    /// Largest file in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=4096))]
    pub(crate) mebibytes: u64,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Test {
    /// Peers echo, names resolve, services accept connections: a line each.
    Connectivity(Connectivity),
}

#[derive(Debug, Args)]
pub(crate) struct Connectivity {
    /// Whether everything is there that this node needs while no controller speaks, also after a restart.
    #[arg(long, conflicts_with = "encryption")]
    pub(crate) offline: bool,
    /// Whether packets to peers go into the tunnel, and leave the machine in no other form. As root.
    #[arg(long)]
    pub(crate) encryption: bool,
    /// Every peer and service, not the first 50 of each.
    #[arg(long)]
    pub(crate) all: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Dns {
    /// Asks this node's own listener, as an application would.
    Query {
        /// A full name, or an address whose name is wanted.
        name: String,
        /// A, AAAA, SRV, PTR, TXT, CNAME … A, and PTR for an address, unless said.
        #[arg(long = "type", short = 't', value_name = "TYPE")]
        record_type: Option<String>,
    },
    /// How it does: where it listens, whom it asks and how these do, what became of questions.
    Status {
        #[command(flatten)]
        again: Again,
    },
    /// What it was told of others' names, the newest 50.
    Cache {
        /// Only this name and those below it.
        name: Option<String>,
        /// All of them.
        #[arg(long)]
        all: bool,
        /// Forget them, also those that are kept for when no upstream answers. Of this node only.
        #[arg(long, conflicts_with = "all")]
        flush: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Token {
    /// Makes a token with which a node may join. It is shown once, on standard output.
    Create {
        /// How long it holds: 90s, 30m, 1h, 7d.
        #[arg(long, default_value = "1h", value_parser = parse_ttl)]
        ttl: Duration,
        /// How many nodes may join with it.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
        uses: u32,
        /// Only this node may use it: also to take the place of a node of this name that is in already.
        // In the place of the option of this name for all commands.
        #[arg(long = "node", id = "at_node", value_name = "NAME")]
        node: Option<String>,
        /// What it is for; shown by `token list`.
        #[arg(long, default_value = "")]
        description: String,
    },
    /// Tokens, with how long they hold and for which node. Not the secrets: nobody has them.
    List,
    /// Makes a token worthless. Nodes that joined with it stay.
    Revoke {
        /// As `token list` shows it, or the whole token.
        id: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Approve {
    /// Let these in, all or none; their agents ask again within half a minute.
    #[arg(value_name = "NODE", conflicts_with = "watch")]
    pub(crate) nodes: Vec<String>,
    /// In the cluster that kubectl speaks with, not at a controller of this machine.
    #[arg(long)]
    pub(crate) cluster: bool,
    #[command(flatten)]
    pub(crate) again: Again,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Node {
    /// Takes a node out of the mesh: its key and certificate count no more, and all others forget it. Nobody else gets its
    /// address for as long as certificates last. Revoke a token that it could join with again.
    Remove {
        /// As `nodes` shows it.
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Relay {
    /// Makes a relay's certificate and key and writes relay.pem, relay.key and ca.pem.
    Issue {
        /// The relay's name, as in its MeshRelay.
        name: String,
        /// The folder for the files; made if it is not there.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Controller {
    /// Generation, agents, and problems with the manifests.
    Status,
    /// Lets the controller's state count for all nodes after it was restored from a backup: what they have that it lost is
    /// given up.
    AcceptRollback,
}

/// Sooner would show the same, later is a job for Prometheus.
const WATCH_S: std::ops::RangeInclusive<f64> = 0.1..=3600.0;

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds = text
        .parse::<f64>()
        .ok()
        .filter(|seconds| WATCH_S.contains(seconds));
    let seconds = seconds.map(Duration::from_secs_f64);
    seconds.ok_or_else(|| format!("{text:?} is no number of seconds from 0.1 to 3600"))
}

/// Longer is a job for a daemon.
const HOUR: Duration = Duration::from_secs(3_600);

fn parse_hour(text: &str) -> Result<Duration, String> {
    let time = parse_ttl(text)?;
    let short = Some(time).filter(|time| *time <= HOUR);
    short.ok_or_else(|| format!("{text:?} is more than 1h"))
}

/// A token is for a machine that is being set up: a year is certainly a mistake.
const TTL_MAX: Duration = Duration::from_secs(365 * 86_400);

fn parse_ttl(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a time: a number and s, m, h or d, at most 365d");
    let (number, unit_s) = [("s", 1), ("m", 60), ("h", 3600), ("d", 86_400)]
        .iter()
        .find_map(|(unit, seconds)| Some((text.strip_suffix(unit)?, *seconds)))
        .ok_or_else(wrong)?;
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let ttl = number.checked_mul(unit_s).map(Duration::from_secs);
    ttl.filter(|ttl| !ttl.is_zero() && *ttl <= TTL_MAX)
        .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use clap::{CommandFactory as _, Parser as _, error::ErrorKind};

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// What pages name in passing; what they have typed is followed by `netns-tests/tests/documents.rs`.
    #[test]
    fn each_command_that_a_page_names_is_one() {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
        let folders = [docs.clone(), docs.join("howto")];
        let files = folders.iter().flat_map(|one| fs::read_dir(one).unwrap());
        let mut commands = BTreeSet::new();
        for path in files.map(|file| file.unwrap().path()) {
            if path.extension().is_some_and(|kind| kind == "md") {
                let text = fs::read_to_string(&path).unwrap();
                let quoted = text.split('`').map(ToOwned::to_owned);
                commands.extend(quoted.filter(|one| one.starts_with("meshctl ")));
            }
        }
        assert!(commands.len() > 30, "{commands:?}");
        for command in commands {
            let typed = command.split(" > ").next().unwrap_or_default();
            // `bpf progs|maps|check` are three.
            let words: Vec<Vec<_>> = typed
                .split_whitespace()
                .map(|word| word.split('|').collect())
                .collect();
            let most = words.iter().map(Vec::len).max().unwrap_or_default();
            for number in 0..most {
                let words = words.iter().map(|all| all.get(number).unwrap_or(&all[0]));
                // A page may leave out what a command needs, and says NAME for a value.
                let wrong = Cli::try_parse_from(words).err().filter(|error| {
                    matches!(
                        error.kind(),
                        ErrorKind::InvalidSubcommand
                            | ErrorKind::UnknownArgument
                            | ErrorKind::ArgumentConflict
                            | ErrorKind::TooManyValues
                    )
                });
                assert!(wrong.is_none(), "{command}: {wrong:?}");
            }
        }
    }

    #[test]
    fn times_to_live_are_read_with_their_unit() {
        for (text, seconds) in [
            ("90s", 90),
            ("30m", 1800),
            ("1h", 3600),
            ("365d", 31_536_000),
        ] {
            assert_eq!(parse_ttl(text), Ok(Duration::from_secs(seconds)));
        }
        for wrong in [
            "",
            "1",
            "h",
            "0s",
            "-1h",
            "1.5h",
            "366d",
            "1w",
            "99999999999999999999d",
        ] {
            assert!(parse_ttl(wrong).is_err(), "{wrong:?}");
        }
    }
}
