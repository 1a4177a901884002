//! `test connectivity`: what works from this node, tried: echoes through the tunnel, names, services; what goes on without a
//! controller (`--offline`); that nothing leaves in plain text (`--encryption`).

mod encryption;
mod offline;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use mesh_api::admin::{DnsQueryRequest, FactsRequest, SlotReport};
use serde::Serialize;
use tokio::{net::TcpStream, time::timeout};

use crate::{
    Verdict, cli,
    connect::{self, Agent, AgentClient, ask},
    failure::{Daemon, Failure},
    reach::{self, ECHOES, Echoed},
    report::{Peer, Service},
    run::{self, Screen},
    show::Report,
    table::{Cell, Tone, table},
};

/// Nodes and services that are tried unless all are asked for: each that is woken costs both sides a handshake.
const TRIED_MAX: usize = 50;

/// Tries at once: as many handshakes as an agent does in some ms.
const AT_ONCE: usize = 8;

/// How long a service may take to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);

/// `test connectivity`.
#[derive(Debug, Serialize)]
pub(crate) struct Connectivity {
    pub(crate) node: String,
    /// `connectivity`, `offline` or `encryption`.
    pub(crate) test: &'static str,
    pub(crate) checks: Vec<Check>,
    /// Nodes and services that were not tried, because there are more than are unless `--all` is said.
    pub(crate) untried: usize,
}

/// One thing that was tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Check {
    /// `peer`, `name`, `service`; `snapshot`, `certificate`, `disk`, `names`, `services`, `neighbours`; `encryption`.
    pub(crate) what: &'static str,
    /// Whose.
    pub(crate) name: String,
    /// `ok`, `warning`, `failed` or `untried`.
    pub(crate) verdict: Outcome,
    /// For people; its words may change.
    pub(crate) text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Outcome {
    Ok,
    Warning,
    Failed,
    /// There is nothing that could be tried.
    Untried,
}

impl Check {
    fn new(
        what: &'static str,
        name: impl Into<String>,
        verdict: Outcome,
        text: impl Into<String>,
    ) -> Self {
        Self {
            what,
            name: name.into(),
            verdict,
            text: text.into(),
        }
    }
}

pub(crate) async fn test(
    agent: Agent<'_>,
    arguments: &cli::Connectivity,
    screen: Screen,
) -> Result<Connectivity, Failure> {
    let status = run::status(agent).await?;
    let snapshots = run::snapshots(agent, false).await?;
    let mut client = connect::agent(agent).await?;
    let most = if arguments.all { usize::MAX } else { TRIED_MAX };
    // Peers of an agent are those that it spoke with; here everybody is spoken with.
    let mut nodes = nodes(&snapshots.slots, &status.node);
    let mut untried = nodes.len().saturating_sub(most);
    nodes.truncate(most);
    let (test, checks) = if arguments.offline {
        let facts = ask(Daemon::Agent, client.facts(FactsRequest {})).await?;
        let own = status.overlay_addresses.first().cloned();
        let name = resolve(client, status.node.clone(), own.unwrap_or_default()).await;
        let known = offline::Known {
            status: &status,
            slots: &snapshots.slots,
            age_s: snapshots.age_s,
            facts: &facts,
            peers: &run::peers(agent).await?.peers,
            now_unix_s: crate::doctor::facts::now_unix_s(),
        };
        untried = 0; // Nobody is spoken with.
        ("offline", offline::judge(&known, name))
    } else {
        screen.note(&format!("sending echoes to {} nodes", nodes.len()));
        let echoed = nodes.into_iter().map(|node| {
            let client = client.clone();
            async move { (node.clone(), reach::echoes(client, node).await) }
        });
        let echoed = stream::iter(echoed).buffered(AT_ONCE);
        let echoed: Vec<_> = echoed.collect().await;
        let peers = run::peers(agent).await?.peers;
        if arguments.encryption {
            let checks = encryption::test(&echoed, &status, &peers, screen)?;
            ("encryption", checks)
        } else {
            let mut services = run::services(agent).await?.services;
            untried += services.len().saturating_sub(most);
            services.truncate(most);
            let mut checks = judge_all(&client, echoed, &peers).await;
            let tried = services.into_iter().map(service_check);
            checks.extend(
                stream::iter(tried)
                    .buffered(AT_ONCE)
                    .collect::<Vec<_>>()
                    .await,
            );
            ("connectivity", checks)
        }
    };
    Ok(Connectivity {
        node: status.node,
        test,
        checks,
        untried,
    })
}

/// All nodes of the newest slot that can be used, but for this one.
fn nodes(slots: &[SlotReport], own: &str) -> Vec<String> {
    let slot = slots.iter().find(|slot| slot.damage.is_empty());
    let resources = slot.map(|slot| slot.resources.as_slice());
    let resources = resources.unwrap_or_default().iter();
    let others = resources.filter(|one| one.kind == "node" && one.name != own);
    others.map(|one| one.name.clone()).collect()
}

/// A line for the echoes of each node and one for its name.
async fn judge_all(
    client: &AgentClient,
    echoed: Vec<(String, Result<Echoed, Failure>)>,
    peers: &[Peer],
) -> Vec<Check> {
    let judged = echoed.into_iter().map(|(node, echoed)| {
        let peer = peers.iter().find(|peer| peer.name == node);
        let address = peer.and_then(|peer| peer.overlay_addresses.first().cloned());
        let client = client.clone();
        async move {
            let echoes = judge_echoes(&node, echoed);
            let name = resolve(client, node, address.unwrap_or_default()).await;
            [echoes, name]
        }
    });
    let judged = stream::iter(judged).buffered(AT_ONCE);
    let judged: Vec<_> = judged.collect().await;
    judged.into_iter().flatten().collect()
}

fn judge_echoes(node: &str, echoed: Result<Echoed, Failure>) -> Check {
    let check = |verdict, text| Check::new("peer", node, verdict, text);
    let Echoed {
        round_trips_ms,
        path,
    } = match echoed {
        Ok(echoed) => echoed,
        Err(failure) => return check(Outcome::Failed, failure.to_string()),
    };
    match round_trips_ms.len() {
        0 => check(
            Outcome::Failed,
            format!("no echo comes back: `meshctl path why {node}`"),
        ),
        count if count < ECHOES as usize => check(
            Outcome::Warning,
            format!("{count} of {ECHOES} echoes come back, by {path}"),
        ),
        _ => {
            let least = round_trips_ms.into_iter().fold(f64::INFINITY, f64::min);
            check(Outcome::Ok, format!("{least:.1} ms by {path}"))
        }
    }
}

/// Whether the node's address has its name, and the name the address, as this node's listener says.
async fn resolve(mut client: AgentClient, node: String, address: String) -> Check {
    let check = |verdict, text| Check::new("name", node.clone(), verdict, text);
    let Ok(IpAddr::V4(v4)) = address.parse() else {
        return check(Outcome::Untried, "it has no IPv4 address".to_owned());
    };
    let mut query = async |name: String, record_type: &str| {
        let request = DnsQueryRequest {
            name,
            r#type: record_type.to_owned(),
        };
        let said = ask(Daemon::Agent, client.dns_query(request)).await?;
        let words = said.answers.first().map(String::as_str);
        let last = words.and_then(|answer| answer.split_whitespace().last());
        Ok::<_, Failure>((last.map(ToOwned::to_owned), said.code))
    };
    let found = async {
        let (name, code) = query(reverse(v4), "PTR").await?;
        let Some(name) = name else {
            return Ok(Err(format!("{address} has no name ({code})")));
        };
        let (back, code) = query(name.clone(), "A").await?;
        Ok::<_, Failure>(match back {
            Some(back) if back == address => Ok(format!("{name} is {address}")),
            Some(back) => Err(format!("{name} is {back}, and {address} was asked for")),
            None => Err(format!("{name} has no address ({code})")),
        })
    };
    match found.await {
        Ok(Ok(text)) => check(Outcome::Ok, text),
        Ok(Err(text)) => check(Outcome::Failed, text),
        // A node may serve no names.
        Err(Failure::Refused(text)) => check(Outcome::Untried, text),
        Err(failure) => check(Outcome::Failed, failure.to_string()),
    }
}

/// RFC 1035 §3.5.
fn reverse(address: Ipv4Addr) -> String {
    let [a, b, c, d] = address.octets();
    format!("{d}.{c}.{b}.{a}.in-addr.arpa.")
}

/// Where a connection to the service is tried: its first address and TCP port. In words, why nowhere.
fn service_address(service: &Service) -> Result<SocketAddr, &'static str> {
    let address = service.cluster_ips.first();
    let address = address.and_then(|one| one.parse::<IpAddr>().ok());
    let address = address.ok_or("it has no address of its own")?;
    let tcp = |port: &String| {
        let number = port.split_whitespace().last()?.strip_suffix("/TCP")?;
        number.parse::<u16>().ok()
    };
    let port = service.ports.iter().find_map(tcp);
    let port = port.ok_or("it has no TCP port")?;
    if service.endpoints.iter().any(|one| one.ready) {
        Ok(SocketAddr::new(address, port))
    } else {
        Err("it has no ready endpoint")
    }
}

/// As any process of this node would.
async fn service_check(service: Service) -> Check {
    let name = format!("{}/{}", service.namespace, service.name);
    let check = |verdict, text| Check::new("service", name.clone(), verdict, text);
    let to = match service_address(&service) {
        Ok(to) => to,
        Err(why) => return check(Outcome::Untried, why.to_owned()),
    };
    let fix = format!("`meshctl trace {name}:{}`", to.port());
    match timeout(CONNECT_LIMIT, TcpStream::connect(to)).await {
        Ok(Ok(_)) => check(Outcome::Ok, format!("{to} accepts connections")),
        Ok(Err(error)) => check(Outcome::Failed, format!("{to}: {error}: {fix}")),
        Err(_) => check(
            Outcome::Failed,
            format!("{to}: no answer in {CONNECT_LIMIT:?}: {fix}"),
        ),
    }
}

impl Report for Connectivity {
    fn text(&self, colours: bool) -> String {
        let row = |check: &Check| -> Vec<Cell> {
            let (word, tone) = match check.verdict {
                Outcome::Ok => ("ok", Tone::Good),
                Outcome::Warning => ("warning", Tone::Warning),
                Outcome::Failed => ("FAILED", Tone::Bad),
                Outcome::Untried => ("untried", Tone::Faint),
            };
            vec![
                Cell::new(word, tone),
                check.what.into(),
                (&check.name).into(),
                (&check.text).into(),
            ]
        };
        let rows = self.checks.iter().map(row).collect();
        let mut text = table(&["VERDICT", "WHAT", "OF", "SAYS"], rows, colours);
        if self.untried > 0 {
            text += &format!("\n{} more were not tried: --all\n", self.untried);
        }
        text
    }

    /// Down if nothing of what was tried works.
    fn verdict(&self) -> Verdict {
        let count = |verdict| {
            let found = self.checks.iter().filter(|one| one.verdict == verdict);
            found.count()
        };
        let (well, warned) = (count(Outcome::Ok), count(Outcome::Warning));
        match count(Outcome::Failed) {
            0 if warned == 0 => Verdict::Ok,
            failed if failed > 0 && (well + warned == 0 || self.test == "encryption") => {
                Verdict::Down
            }
            _ => Verdict::Degraded,
        }
    }
}

#[cfg(test)]
mod tests;
