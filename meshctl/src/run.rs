//! Each command: ask, convert, show.

use std::{
    io::{self, Write as _},
    time::Duration,
};

use mesh_api::admin::{
    AcceptRollbackRequest, ControllerStatusRequest, CreateTokenRequest, DnsQueryRequest,
    IssueRelayRequest, ListNodesRequest, ListTokensRequest, PathWhyRequest, PeersRequest,
    PingRequest, RemoveNodeRequest, RevokeTokenRequest, ServicesRequest, StatusRequest,
};

use crate::{
    Verdict,
    cli::{self, Cli, Command},
    connect::{self, ask},
    failure::{
        Daemon::{Agent, Controller},
        Failure,
    },
    files,
    preflight::{self, Wanted},
    report::{
        AcceptedRollback, ControllerStatus, CreatedToken, DnsQuery, Nodes, PathWhy, Peers, Ping,
        PingReply, Preflight, RemovedNode, RevokedToken, Services, Status, Tokens,
    },
    show::{Report, WithEndpoints},
    table::duration,
    tunnel, uninstall,
};

/// How to show things.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Screen {
    pub(crate) json: bool,
    pub(crate) colours: bool,
}

impl Screen {
    /// Prints `report`, and says how well things are.
    fn show(self, report: &impl Report) -> Result<Verdict, Failure> {
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
    fn note(self, line: &str) {
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
    let (socket, controller_socket) = (&cli.socket, &cli.controller_socket);
    match cli.command {
        Command::Status => {
            let mut agent = connect::agent(socket).await?;
            let said = ask(Agent, agent.status(StatusRequest {})).await?;
            screen.show(&Status::from(said))
        }
        Command::Peers => {
            let mut agent = connect::agent(socket).await?;
            let said = ask(Agent, agent.peers(PeersRequest {})).await?;
            screen.show(&Peers::from(said))
        }
        Command::Ping(arguments) => ping(&cli.socket, arguments, screen).await,
        Command::Path(cli::Path::Why { node }) => {
            let mut agent = connect::agent(socket).await?;
            let said = ask(Agent, agent.path_why(PathWhyRequest { node })).await?;
            screen.show(&PathWhy::from(said))
        }
        Command::Services { endpoints } => {
            let mut agent = connect::agent(socket).await?;
            let said = ask(Agent, agent.services(ServicesRequest {})).await?;
            let services = Services::from(said);
            if endpoints {
                screen.show(&WithEndpoints(services))
            } else {
                screen.show(&services)
            }
        }
        Command::Dns(cli::Dns::Query { name, record_type }) => {
            dns_query(socket, name, record_type.to_ascii_uppercase(), screen).await
        }
        Command::Tunnel { target, proxy } => tunnel::tunnel(&proxy, &target),
        Command::Token(command) => token(controller_socket, command, screen).await,
        Command::Nodes => {
            let mut controller = connect::controller(controller_socket).await?;
            let said = ask(Controller, controller.list_nodes(ListNodesRequest {})).await?;
            screen.show(&Nodes::from(said))
        }
        Command::Node(cli::Node::Remove { name }) => {
            let mut controller = connect::controller(controller_socket).await?;
            let removed = controller.remove_node(RemoveNodeRequest { name: name.clone() });
            let said = ask(Controller, removed).await?;
            screen.show(&RemovedNode {
                removed: name,
                address_rests_until_unix_s: said.address_rests_until_unix_s,
            })
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
        Command::Uninstall(cli::Uninstall { wait, force, .. }) => {
            screen.show(&uninstall::uninstall(wait, force).await?)
        }
        Command::Install(arguments) => screen.show(&preflight(arguments).await),
    }
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

async fn ping(
    socket: &std::path::Path,
    arguments: cli::Ping,
    screen: Screen,
) -> Result<Verdict, Failure> {
    let mut agent = connect::agent(socket).await?;
    let target = arguments.node;
    let request = PingRequest {
        target: target.clone(),
        count: arguments.count,
        interval_ms: arguments.interval_ms,
        timeout_ms: arguments.timeout_ms,
    };
    let mut stream = ask(Agent, agent.ping(request)).await?;
    // An answer, or the news that there is none, is due after these two; the agent gets more.
    let due = u64::from(arguments.interval_ms) + u64::from(arguments.timeout_ms);
    let limit = Duration::from_millis(due) + connect::ANSWER_TIMEOUT;
    let mut replies = Vec::new();
    while let Some(said) = connect::answer(Agent, limit, stream.message()).await? {
        let reply = PingReply::from(said);
        if !screen.json {
            print(&format!("{}\n", reply.line(&target)));
        }
        replies.push(reply);
        if replies.len() == arguments.count as usize {
            break; // No agent may make this endless.
        }
    }
    screen.show(&Ping::new(target, replies))
}

async fn dns_query(
    socket: &std::path::Path,
    name: String,
    record_type: String,
    screen: Screen,
) -> Result<Verdict, Failure> {
    let mut agent = connect::agent(socket).await?;
    let request = DnsQueryRequest {
        name: name.clone(),
        r#type: record_type.clone(),
    };
    let said = ask(Agent, agent.dns_query(request)).await?;
    screen.show(&DnsQuery {
        name,
        record_type,
        code: said.code,
        answers: said.answers,
        ms: said.ms,
        server: said.server,
    })
}

async fn token(
    socket: &std::path::Path,
    command: cli::Token,
    screen: Screen,
) -> Result<Verdict, Failure> {
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
            let request = RevokeTokenRequest { id: id.clone() };
            ask(Controller, controller.revoke_token(request)).await?;
            screen.show(&RevokedToken { revoked: id })
        }
    }
}
