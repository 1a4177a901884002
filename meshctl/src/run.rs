//! Each command: ask, convert, show.

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::Path,
    time::{Duration, Instant},
};

use mesh_api::admin::{
    AcceptRollbackRequest, ControllerStatusRequest, CreateTokenRequest, DnsQueryRequest,
    DropsRequest, EventsRequest, FactsRequest, IssueRelayRequest, ListNodesRequest,
    ListTokensRequest, PathWhyRequest, PeersRequest, PingRequest, RemoveNodeRequest,
    RevokeTokenRequest, ServicesRequest, SnapshotsRequest, SnapshotsResponse, StatusRequest,
};

use crate::{
    Verdict, approve, bpf,
    bugreport::{Bundle, Redact},
    capture,
    cli::{self, Again, Cli, Command},
    connect::{self, Agent, ask},
    connectivity, dns,
    doctor::{self, Doctor},
    drops::Drops,
    events::Events,
    failure::{
        Daemon::{self, Controller},
        Failure,
    },
    files, generate,
    keys::{self, Keys},
    lab, mtu, perf, policy,
    preflight::{self, Wanted},
    relays::{Health, Netcheck, Relays},
    report::{
        AcceptedRollback, ControllerStatus, CreatedToken, DnsQuery, Nodes, PathWhy, Peers, Ping,
        PingReply, Preflight, RemovedNode, RevokedToken, Services, Status, Tokens,
    },
    routes,
    show::{Report, WithEndpoints},
    snapshot::{self, Age, Diff, Snapshots},
    table::duration,
    top,
    trace::{self, Trace},
    tunnel, uninstall,
};

/// Both slots of a mesh of 100,000 nodes: 20 s of signatures on one processor.
const VERIFY_TIMEOUT: Duration = Duration::from_secs(60);

/// Peers of whose paths a bug report has everything: at some 10 KB each.
const PATHS_MAX: usize = 50;

/// How to show things.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Screen {
    pub(crate) json: bool,
    pub(crate) colours: bool,
}

impl Screen {
    /// Prints `report`, and says how well things are.
    pub(crate) fn show(self, report: &impl Report) -> Result<Verdict, Failure> {
        if self.json {
            let json = serde_json::to_string(report);
            let json = json.map_err(|error| Failure::Failed(error.to_string()))?;
            print(&format!("{json}\n"));
        } else {
            print(&report.text(self.colours));
        }
        Ok(report.verdict())
    }

    /// Prints something beside the result, unless a machine reads.
    pub(crate) fn note(self, line: &str) {
        if !self.json {
            writeln!(io::stderr(), "{line}").ok();
        }
    }
}

/// A reader that has gone (`meshctl … | head`) is no error.
fn print(text: &str) {
    io::stdout().write_all(text.as_bytes()).ok();
}

pub(crate) async fn run(cli: Cli, screen: Screen) -> Result<Verdict, Failure> {
    let own_node = matches!(cli.command, Command::Token(cli::Token::Create { .. }));
    if cli.at_node.is_some() && !own_node && !cli.command.asks_an_agent() {
        let text = "--node is for what an agent is asked; this is not for another node's";
        return Err(Failure::Refused(text.to_owned()));
    }
    let controller_socket = &cli.controller_socket;
    let socket = Agent {
        socket: &cli.socket,
        node: cli.at_node.as_deref(),
    };
    match cli.command {
        Command::Status { again } => {
            let look = async |_: Option<(&Status, Duration)>| status(socket).await;
            watch(screen, again, look).await
        }
        Command::Health { again } => {
            let look =
                async |_: Option<(&Health, Duration)>| Ok(Health::from(status(socket).await?));
            watch(screen, again, look).await
        }
        Command::Doctor => screen.show(&Doctor::new(&doctor::facts::gather(socket).await?)),
        Command::Peers { again } => {
            let look = async |_: Option<(&Peers, Duration)>| peers(socket).await;
            watch(screen, again, look).await
        }
        Command::Relays { again } => {
            let look = async |_: Option<(&Relays, Duration)>| {
                let relays = status(socket).await?.relays;
                Ok(Relays { relays })
            };
            watch(screen, again, look).await
        }
        Command::Netcheck => screen.show(&netcheck(socket).await?),
        Command::Trace(arguments) => {
            let request = trace::request(&arguments)?;
            let port = request.port;
            let mut agent = connect::agent(socket).await?;
            let said = ask(Daemon::Agent, agent.trace(request)).await?;
            screen.show(&Trace::new(said, port))
        }
        Command::Drops { all, again } => {
            let look = async |before: Option<(&Drops, Duration)>| {
                let mut agent = connect::agent(socket).await?;
                let said = ask(Daemon::Agent, agent.drops(DropsRequest {})).await?;
                Ok(Drops::new(said, all, before))
            };
            watch(screen, again, look).await
        }
        Command::Events { last, about, again } => {
            let last = usize::try_from(last).unwrap_or(usize::MAX);
            let about = about.as_deref();
            let look = async |before: Option<(&Events, Duration)>| match before {
                None => events(socket, last, about).await,
                Some((before, _)) => Ok(events(socket, EVENTS_ALL, about).await?.since(before)),
            };
            watch(screen, again, look).await
        }
        Command::Snapshot(command) => snapshot(socket, command, screen).await,
        Command::Bugreport(arguments) => screen.show(&bugreport(socket, &arguments).await?),
        Command::Completion { shell } => {
            // A reader that has gone is no error.
            io::stdout().write_all(&generate::completion(shell)).ok();
            Ok(Verdict::Ok)
        }
        Command::Man { out } => screen.show(&generate::man(&out)?),
        Command::Ping(arguments) => ping(socket, arguments, screen).await,
        Command::Path(cli::Path::Why { node }) => screen.show(&path_why(socket, node).await?),
        Command::Mtu(cli::Mtu::Probe { node }) => {
            screen.show(&mtu::probe(socket, &node, screen).await?)
        }
        Command::Top { every } => top::top(socket, every, screen).await,
        Command::Perf(arguments) => perf(socket, arguments, screen).await,
        Command::Capture(arguments) => {
            screen.show(&capture::capture(socket, &arguments, screen).await?)
        }
        Command::Test(cli::Test::Connectivity(arguments)) => {
            screen.show(&connectivity::test(socket, &arguments, screen).await?)
        }
        Command::Services { endpoints, again } if endpoints => {
            let look = async |_: Option<(&WithEndpoints, Duration)>| {
                Ok(WithEndpoints(services(socket).await?))
            };
            watch(screen, again, look).await
        }
        Command::Services { again, .. } => {
            let look = async |_: Option<(&Services, Duration)>| services(socket).await;
            watch(screen, again, look).await
        }
        Command::Dns(cli::Dns::Query { name, record_type }) => {
            let (name, record_type) = dns::question(name, record_type);
            dns_query(socket, name, record_type, screen).await
        }
        Command::Dns(cli::Dns::Status { again }) => {
            let look = async |_: Option<(&dns::DnsStatus, Duration)>| dns::status(socket).await;
            watch(screen, again, look).await
        }
        Command::Dns(cli::Dns::Cache { name, all, flush }) => {
            let name = name.unwrap_or_default();
            if flush {
                dns::flush(socket, name, screen).await
            } else {
                dns::cache(socket, name, all, screen).await
            }
        }
        Command::Bpf(command) => bpf::run(socket, command, screen).await,
        Command::Routes(command) => routes::run(socket, command, screen).await,
        Command::Policy(command) => policy::run(socket, command, screen).await,
        Command::Keys(Keys::Revoke { name }) => remove_node(controller_socket, name, screen).await,
        Command::Keys(command) => keys::run(socket, command, screen).await,
        Command::Tunnel { target, proxy } => tunnel::tunnel(&proxy, &target),
        Command::Token(command) => token(controller_socket, command, screen).await,
        Command::Approve(arguments) => approve::run(controller_socket, arguments, screen).await,
        Command::Nodes => {
            let mut controller = connect::controller(controller_socket).await?;
            let said = ask(Controller, controller.list_nodes(ListNodesRequest {})).await?;
            screen.show(&Nodes::from(said))
        }
        Command::Node(cli::Node::Remove { name }) => {
            remove_node(controller_socket, name, screen).await
        }
        Command::Relay(cli::Relay::Issue { name, out }) => {
            let mut controller = connect::controller(controller_socket).await?;
            files::prepare(&out)?;
            let issued = controller.issue_relay(IssueRelayRequest { name });
            let relay = ask(Controller, issued).await?;
            screen.show(&files::write(&out, &relay)?)
        }
        Command::Controller(cli::Controller::Status) => {
            let mut controller = connect::controller(controller_socket).await?;
            let said = ask(Controller, controller.status(ControllerStatusRequest {})).await?;
            screen.show(&ControllerStatus::from(said))
        }
        Command::Controller(cli::Controller::AcceptRollback) => {
            let mut controller = connect::controller(controller_socket).await?;
            let accepted = controller.accept_rollback(AcceptRollbackRequest {});
            let epoch = ask(Controller, accepted).await?.epoch;
            screen.show(&AcceptedRollback { epoch })
        }
        Command::Lab(command) => lab::run(command, screen).await,
        Command::Uninstall(cli::Uninstall { wait, force, .. }) => {
            screen.show(&uninstall::uninstall(wait, force).await?)
        }
        Command::Install(arguments) => screen.show(&preflight(arguments).await),
    }
}

/// Shows what `look` gives, once or again and again; it gets what it gave before, and how long ago that was. The verdict is
/// the last look's.
pub(crate) async fn watch<R: Report>(
    screen: Screen,
    again: Again,
    look: impl AsyncFn(Option<(&R, Duration)>) -> Result<R, Failure>,
) -> Result<Verdict, Failure> {
    let Some(every) = again.watch else {
        return screen.show(&look(None).await?);
    };
    let mut rounds = tokio::time::interval(every);
    let mut last: Option<(R, Instant)> = None;
    let mut shown = 0;
    loop {
        rounds.tick().await;
        let before = last.as_ref();
        let report = look(before.map(|(report, at)| (report, at.elapsed()))).await?;
        if !screen.json {
            // A terminal shows one page that changes; a file gets them all.
            let between = match (io::stdout().is_terminal(), shown) {
                _ if R::FOLLOWS => "",
                (true, _) => "\u{1b}[H\u{1b}[2J",
                (false, 0) => "",
                (false, _) => "\n",
            };
            print(between);
        }
        let verdict = screen.show(&report)?;
        shown += 1;
        if again.rounds == Some(shown) {
            return Ok(verdict);
        }
        last = Some((report, Instant::now()));
    }
}

pub(crate) async fn status(socket: Agent<'_>) -> Result<Status, Failure> {
    let mut agent = connect::agent(socket).await?;
    let said = ask(Daemon::Agent, agent.status(StatusRequest {})).await?;
    Ok(Status::from(said))
}

pub(crate) async fn peers(socket: Agent<'_>) -> Result<Peers, Failure> {
    let mut agent = connect::agent(socket).await?;
    let said = ask(Daemon::Agent, agent.peers(PeersRequest {})).await?;
    Ok(Peers::from(said))
}

async fn netcheck(socket: Agent<'_>) -> Result<Netcheck, Failure> {
    let status = status(socket).await?;
    let mut agent = connect::agent(socket).await?;
    let facts = ask(Daemon::Agent, agent.facts(FactsRequest {})).await?;
    Ok(Netcheck::new(status, &facts))
}

async fn events(socket: Agent<'_>, last: usize, about: Option<&str>) -> Result<Events, Failure> {
    let mut agent = connect::agent(socket).await?;
    let said = ask(Daemon::Agent, agent.events(EventsRequest {})).await?;
    Ok(Events::new(said, last, about))
}

pub(crate) async fn snapshots(
    socket: Agent<'_>,
    contents: bool,
) -> Result<SnapshotsResponse, Failure> {
    let mut agent = connect::agent(socket).await?;
    let asked = agent.snapshots(SnapshotsRequest { contents });
    // Of the largest mesh, every signature is checked: 0.1 ms each.
    Ok(connect::answer(Daemon::Agent, VERIFY_TIMEOUT, asked)
        .await?
        .into_inner())
}

async fn snapshot(
    socket: Agent<'_>,
    command: cli::Snapshot,
    screen: Screen,
) -> Result<Verdict, Failure> {
    let exports = matches!(command, cli::Snapshot::Export { .. });
    let said = snapshots(socket, exports).await?;
    match command {
        cli::Snapshot::Show { resources } => screen.show(&Snapshots::new(said, resources)),
        cli::Snapshot::Verify => screen.show(&Snapshots::new(said, false)),
        cli::Snapshot::Age => screen.show(&Age {
            generation: said.generation,
            age_s: said.age_s,
        }),
        cli::Snapshot::Diff => screen.show(&Diff::new(said)?),
        cli::Snapshot::Export { out } => screen.show(&snapshot::export(said, &out)?),
    }
}

/// Events of a bug report: all that the agent has.
const EVENTS_ALL: usize = usize::MAX;

async fn bugreport(
    socket: Agent<'_>,
    arguments: &cli::Bugreport,
) -> Result<crate::bugreport::BugReport, Failure> {
    let facts = doctor::facts::gather(socket).await?;
    let overlay = facts
        .agent
        .as_ref()
        .ok()
        .and_then(|agent| agent.facts.overlay_v4.parse().ok());
    let redact = arguments
        .redact
        .then(|| Redact::new(overlay.unwrap_or(Wanted::default().overlay)));
    let mut bundle = Bundle::new(&arguments.out, redact)?;
    let doctor = Doctor::new(&facts);
    bundle.add("faults", Ok(doctor::counted(&doctor)))?;
    bundle.add("doctor", Ok(doctor))?;
    bundle.add("machine", Ok(Preflight::new(facts.machine)))?;
    bundle.add("status", status(socket).await)?;
    let peers = peers(socket).await;
    let names: Vec<_> = match &peers {
        Ok(peers) => {
            let troubled = peers
                .peers
                .iter()
                .filter(|one| !one.external && one.state != "direct");
            troubled
                .take(PATHS_MAX)
                .map(|one| one.name.clone())
                .collect()
        }
        Err(_) => Vec::new(),
    };
    bundle.add("peers", peers)?;
    for node in names {
        let name = format!("path-{node}");
        bundle.add(&name, path_why(socket, node).await)?;
    }
    bundle.add("dns-status", dns::status(socket).await)?;
    bundle.add("netcheck", netcheck(socket).await)?;
    bundle.add("services", services(socket).await)?;
    bundle.add("events", events(socket, EVENTS_ALL, None).await)?;
    let drops = async {
        let mut agent = connect::agent(socket).await?;
        let said = ask(Daemon::Agent, agent.drops(DropsRequest {})).await?;
        Ok(Drops::new(said, true, None))
    };
    bundle.add("drops", drops.await)?;
    let slots = snapshots(socket, false).await;
    bundle.add("snapshot", slots.map(|said| Snapshots::new(said, true)))?;
    for log in &arguments.log {
        bundle.add_log(log)?;
    }
    Ok(bundle.finish())
}

pub(crate) async fn path_why(socket: Agent<'_>, node: String) -> Result<PathWhy, Failure> {
    let mut agent = connect::agent(socket).await?;
    let said = ask(Daemon::Agent, agent.path_why(PathWhyRequest { node })).await?;
    Ok(PathWhy::from(said))
}

pub(crate) async fn services(socket: Agent<'_>) -> Result<Services, Failure> {
    let mut agent = connect::agent(socket).await?;
    let said = ask(Daemon::Agent, agent.services(ServicesRequest {})).await?;
    Ok(Services::from(said))
}

/// How long each way is measured, and how long is listened, unless it is said.
const PERF_TIME: Duration = Duration::from_secs(5);
const PERF_SERVE_TIME: Duration = Duration::from_secs(60);

async fn perf(agent: Agent<'_>, arguments: cli::Perf, screen: Screen) -> Result<Verdict, Failure> {
    let Some(node) = arguments.node else {
        let time = arguments.time.unwrap_or(PERF_SERVE_TIME);
        return screen.show(&perf::serve(agent, time, screen).await?);
    };
    let limit = perf::Limit {
        time: arguments.time.unwrap_or(PERF_TIME).min(perf::TIME_MAX),
        bytes: arguments.mebibytes << 20,
    };
    screen.show(&perf::measure(agent, &node, limit, screen).await?)
}

async fn preflight(arguments: cli::Install) -> Preflight {
    if arguments.cluster {
        return Preflight::new(preflight::cluster::judge(
            &preflight::cluster::gather().await,
        ));
    }
    let wanted = Wanted {
        listen_port: arguments.listen_port,
        overlay: arguments.overlay,
        interface: arguments.interface,
    };
    let facts = preflight::facts::gather(&wanted);
    Preflight::new(preflight::judge(&facts, &wanted))
}

/// Echoes unless it is said how many; until a direct path is in use: three rounds of probes, which take 10 s each
/// (`paths.md`).
const PING_COUNT: u32 = 4;
const PING_COUNT_UNTIL_DIRECT: u32 = 30;

async fn ping(socket: Agent<'_>, arguments: cli::Ping, screen: Screen) -> Result<Verdict, Failure> {
    let began = Instant::now();
    let until_direct = arguments.until_direct;
    let usual = match until_direct {
        true => PING_COUNT_UNTIL_DIRECT,
        false => PING_COUNT,
    };
    let mut agent = connect::agent(socket).await?;
    let target = arguments.node;
    let request = PingRequest {
        target: target.clone(),
        count: arguments.count.unwrap_or(usual),
        interval_ms: arguments.interval_ms,
        timeout_ms: arguments.timeout_ms,
        via: arguments.via.clone().unwrap_or_default(),
        seek: until_direct,
    };
    let count = request.count as usize;
    let mut stream = ask(Daemon::Agent, agent.ping(request)).await?;
    // An answer, or the news that there is none, is due after these two; the agent gets more.
    let due = u64::from(arguments.interval_ms) + u64::from(arguments.timeout_ms);
    let limit = Duration::from_millis(due) + connect::ANSWER_TIMEOUT;
    let mut replies: Vec<PingReply> = Vec::new();
    while let Some(said) = connect::answer(Daemon::Agent, limit, stream.message()).await? {
        let reply = PingReply::from(said);
        let line = reply.line(&target);
        match until_direct {
            true => screen.note(&line), // The result begins with what came of it.
            false if screen.json => {}
            false => print(&format!("{line}\n")),
        }
        let found = until_direct && reply.is_direct();
        replies.push(reply);
        if found || replies.len() == count {
            break; // No agent may make this endless.
        }
    }
    drop(stream);
    let mut report = Ping::new(target.clone(), arguments.via, replies);
    if until_direct {
        let after = began.elapsed();
        let why = match report.replies.last().is_some_and(PingReply::is_direct) {
            true => None,
            false => Some(path_why(socket, target).await?),
        };
        report.judge(after, why);
    }
    screen.show(&report)
}

async fn dns_query(
    socket: Agent<'_>,
    name: String,
    record_type: String,
    screen: Screen,
) -> Result<Verdict, Failure> {
    let mut agent = connect::agent(socket).await?;
    let request = DnsQueryRequest {
        name: name.clone(),
        r#type: record_type.clone(),
    };
    let said = ask(Daemon::Agent, agent.dns_query(request)).await?;
    screen.show(&DnsQuery {
        name,
        record_type,
        code: said.code,
        answers: said.answers,
        ms: said.ms,
        server: said.server,
    })
}

async fn remove_node(socket: &Path, name: String, screen: Screen) -> Result<Verdict, Failure> {
    let mut controller = connect::controller(socket).await?;
    let removed = controller.remove_node(RemoveNodeRequest { name: name.clone() });
    let said = ask(Controller, removed).await?;
    screen.show(&RemovedNode {
        removed: name,
        address_rests_until_unix_s: said.address_rests_until_unix_s,
    })
}

async fn token(socket: &Path, command: cli::Token, screen: Screen) -> Result<Verdict, Failure> {
    let mut controller = connect::controller(socket).await?;
    match command {
        cli::Token::Create {
            ttl,
            uses,
            node,
            description,
        } => {
            let request = CreateTokenRequest {
                ttl_s: ttl.as_secs(),
                uses,
                description,
                node: node.unwrap_or_default(),
            };
            let said = ask(Controller, controller.create_token(request)).await?;
            let times = if uses == 1 { "once" } else { "several times" };
            screen.note(&format!(
                "token {} holds for {}, and may be used {times}; it is not shown again:",
                crate::table::printable(&said.id),
                duration(ttl.as_secs())
            ));
            screen.show(&CreatedToken {
                token: said.token,
                id: said.id,
                expires_unix_s: said.expires_unix_s,
            })
        }
        cli::Token::List => {
            let said = ask(Controller, controller.list_tokens(ListTokensRequest {})).await?;
            screen.show(&Tokens::from(said))
        }
        cli::Token::Revoke { id } => {
            let id = token_id(&id).to_owned();
            let request = RevokeTokenRequest { id: id.clone() };
            ask(Controller, controller.revoke_token(request)).await?;
            screen.show(&RevokedToken { revoked: id })
        }
    }
}

/// The id of a token: `hf1.MESH.ID.SECRET.MESH-ID`, whose mesh may have dots, or the id alone.
fn token_id(text: &str) -> &str {
    let token = text.trim().strip_prefix("hf1.");
    let id = token.and_then(|token| token.rsplit('.').nth(2));
    id.unwrap_or(text)
}
