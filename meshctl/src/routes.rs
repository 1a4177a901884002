//! `routes get`: where packets to an address go, as the mesh wants it and as the kernel does it.

use std::net::IpAddr;

use clap::Subcommand;
use ipnet::IpNet;
use mesh_api::admin::{KernelRoute, RouteRequest, RouteResponse};
use serde::Serialize;

use crate::{
    Verdict,
    connect::{self, Agent, ask},
    failure::{Daemon, Failure},
    report::{measured, some},
    run::Screen,
    show::{Report, row},
    table::{Cell, Tone, columns, milliseconds},
};

#[derive(Debug, Subcommand)]
pub(crate) enum Routes {
    /// By which prefix, peer, path, interface and source packets to an address go, and what the kernel does with them.
    Get {
        /// An IPv4 or IPv6 address, of the mesh or not.
        address: IpAddr,
    },
}

pub(crate) async fn run(
    agent: Agent<'_>,
    Routes::Get { address }: Routes,
    screen: Screen,
) -> Result<Verdict, Failure> {
    let mut client = connect::agent(agent).await?;
    let request = RouteRequest {
        address: address.to_string(),
    };
    let said = ask(Daemon::Agent, client.route(request)).await?;
    screen.show(&Route::new(address, said))
}

/// `routes get`.
#[derive(Debug, Serialize)]
pub(crate) struct Route {
    pub(crate) address: IpAddr,
    /// `local`, `node`, `behind_node`, `behind_this_node`, `external`, `service`, `nobody` (the mesh's, and given to nobody) or
    /// `outside` (not the mesh's).
    pub(crate) kind: String,
    /// The prefix that counts, or the service.
    pub(crate) by: Option<String>,
    /// At which, or behind which, it is; of `external`, the device's name.
    pub(crate) node: Option<String>,
    /// As in `peers`; `null`: nothing was sent there yet, or it is no peer.
    pub(crate) peer_state: Option<String>,
    pub(crate) path: Option<String>,
    pub(crate) rtt_ms: Option<f64>,
    /// By what the mesh wants packets to leave, and from which address; `null`: that is not its business.
    pub(crate) interface: Option<String>,
    pub(crate) source: Option<String>,
    /// What the kernel does; `null`: it has no way.
    pub(crate) kernel: Option<Kernel>,
    /// Why it has none, in its words.
    pub(crate) kernel_problem: Option<String>,
    /// What the kernel does otherwise than the mesh wants; for people.
    pub(crate) differs: Option<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Kernel {
    /// Of the route that counts; `null`: it does not say.
    pub(crate) prefix: Option<String>,
    pub(crate) interface: Option<String>,
    /// Of packets whose socket chose none.
    pub(crate) source: Option<String>,
    /// `null`: the destination is on the link, or the interface is a tunnel.
    pub(crate) gateway: Option<String>,
    /// As `ip route show table` has it.
    pub(crate) table: u32,
    /// `unicast`, `local` and so on.
    pub(crate) kind: String,
}

impl Route {
    fn new(address: IpAddr, said: RouteResponse) -> Self {
        let kernel = said.kernel.unwrap_or_default();
        let kernel_problem = some(kernel.problem.clone());
        let kernel = kernel_problem.is_none().then(|| Kernel::from(kernel));
        let mut route = Self {
            address,
            kind: said.kind,
            by: some(said.by),
            node: some(said.node),
            peer_state: some(said.peer_state),
            path: some(said.path),
            rtt_ms: measured(said.rtt_ms),
            interface: some(said.interface),
            source: some(said.source),
            kernel,
            kernel_problem,
            differs: None,
        };
        route.differs = route.difference();
        route
    }

    fn difference(&self) -> Option<String> {
        let Some(kernel) = &self.kernel else {
            let problem = self.kernel_problem.as_deref().unwrap_or_default();
            // What is not the mesh's may have no way.
            let matters = self.kind != "outside" && self.kind != "service";
            return matters.then(|| format!("the kernel does not send packets there: {problem}"));
        };
        if self.kind == "local" && kernel.kind != "local" {
            return Some("the kernel does not know this address as its own".to_owned());
        }
        let wanted = self.interface.as_deref()?;
        let found = kernel.interface.as_deref().unwrap_or("nowhere");
        let by_default = kernel.prefix.as_deref().is_some_and(is_default);
        if wanted != found && by_default {
            return Some(format!(
                "packets leave by {found}, with all that has no route of its own: the mesh's route by {wanted} is gone. \
                 The agent puts it back within seconds; where it stays away, `ip monitor route` shows who takes it each time"
            ));
        }
        if wanted != found {
            let prefix = kernel.prefix.as_deref().unwrap_or("another route");
            return Some(format!(
                "packets leave by {found}, not by {wanted}: {prefix} (table {}) comes before the mesh's route. `ip route del` it, or give \
                 one of the two another range",
                kernel.table
            ));
        }
        let (wanted, found) = (self.source.as_deref()?, kernel.source.as_deref()?);
        (wanted != found).then(|| {
            format!("packets leave from {found}, not from {wanted}: the other side may not know the way back")
        })
    }

    /// What has the address, for people.
    fn what(&self) -> String {
        let node = self.node.as_deref().unwrap_or_default();
        match self.kind.as_str() {
            "local" => "an address of this node".to_owned(),
            "node" => format!("node {node}"),
            "behind_node" => format!("behind node {node}"),
            "behind_this_node" => "behind this node".to_owned(),
            "external" => format!("the WireGuard device {node}"),
            "service" => {
                "a service: an endpoint is chosen before there is a packet; `meshctl trace` says which"
                    .to_owned()
            }
            "nobody" => "in the mesh's range, and given to nobody: packets are dropped".to_owned(),
            "outside" => "not in the mesh".to_owned(),
            other => other.to_owned(),
        }
    }
}

/// Whether it is the default route, which is no other's fault, and which nobody must be told to take away.
fn is_default(prefix: &str) -> bool {
    prefix
        .parse::<IpNet>()
        .is_ok_and(|net| net.prefix_len() == 0)
}

impl From<KernelRoute> for Kernel {
    fn from(said: KernelRoute) -> Self {
        Self {
            prefix: some(said.prefix),
            interface: some(said.interface),
            source: some(said.source),
            gateway: some(said.gateway),
            table: said.table,
            kind: said.kind,
        }
    }
}

impl Report for Route {
    fn text(&self, colours: bool) -> String {
        let said = |text: &Option<String>| text.clone().unwrap_or_default();
        let by = |name: &str, interface: &Option<String>, source: &Option<String>| match (
            interface, source,
        ) {
            (Some(interface), Some(source)) => row(name, format!("by {interface}, from {source}")),
            (Some(interface), None) => row(name, format!("by {interface}")),
            (None, _) => row(name, ""),
        };
        let state = match (&self.peer_state, &self.path) {
            (Some(state), Some(path)) => {
                format!("{state}, by {path}, {}", milliseconds(self.rtt_ms))
            }
            (Some(state), None) => state.clone(),
            (None, _) => String::new(),
        };
        let tone = match self.kind.as_str() {
            "nobody" => Tone::Bad,
            _ => Tone::Plain,
        };
        let mut rows = vec![
            row("address", self.address.to_string()),
            vec!["is".into(), Cell::new(self.what(), tone)],
            row("known by", said(&self.by)),
            row("path", state),
            by("mesh", &self.interface, &self.source),
        ];
        match &self.kernel {
            Some(kernel) => {
                rows.push(by("kernel", &kernel.interface, &kernel.source));
                let prefix = kernel.prefix.as_deref().unwrap_or("?");
                let via = kernel.gateway.as_ref();
                let via = via.map_or_else(String::new, |gateway| format!(" via {gateway}"));
                rows.push(row(
                    "",
                    format!("{} {prefix}{via}, table {}", kernel.kind, kernel.table),
                ));
            }
            None => {
                let problem = said(&self.kernel_problem);
                rows.push(vec!["kernel".into(), Cell::new(problem, Tone::Bad)]);
            }
        }
        if let Some(differs) = &self.differs {
            rows.push(vec!["warning".into(), Cell::new(differs, Tone::Warning)]);
        }
        rows.retain(|row| row.get(1) != Some(&Cell::from("")));
        columns(&rows, colours)
    }

    fn verdict(&self) -> Verdict {
        let lost = self.peer_state.as_deref() == Some("unreachable");
        let nowhere = self.kernel.is_none() && self.kind != "service";
        if self.kind == "nobody" || lost || nowhere {
            return Verdict::Down;
        }
        match self.differs {
            Some(_) => Verdict::Degraded,
            None => Verdict::Ok,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(kind: &str, wanted: &str, kernel: KernelRoute) -> Route {
        let said = RouteResponse {
            kind: kind.to_owned(),
            interface: wanted.to_owned(),
            source: if wanted.is_empty() { "" } else { "100.96.0.1" }.to_owned(),
            kernel: Some(kernel),
            ..RouteResponse::default()
        };
        Route::new([192, 168, 2, 7].into(), said)
    }

    fn by(interface: &str, source: &str, kind: &str) -> KernelRoute {
        KernelRoute {
            prefix: "192.168.2.0/24".to_owned(),
            interface: interface.to_owned(),
            source: source.to_owned(),
            table: 254,
            kind: kind.to_owned(),
            ..KernelRoute::default()
        }
    }

    #[test]
    fn what_the_kernel_does_otherwise_is_said_and_is_degraded() {
        let none = || KernelRoute {
            problem: "no route".to_owned(),
            ..KernelRoute::default()
        };
        for (kind, wanted, kernel, says, verdict) in [
            (
                "node",
                "hf0",
                by("hf0", "100.96.0.1", "unicast"),
                None,
                Verdict::Ok,
            ),
            (
                "node",
                "hf0",
                by("eth0", "10.0.0.1", "unicast"),
                Some("by eth0, not by hf0: 192.168.2.0/24"),
                Verdict::Degraded,
            ),
            (
                "node",
                "hf0",
                KernelRoute {
                    prefix: "0.0.0.0/0".to_owned(),
                    ..by("eth0", "10.0.0.1", "unicast")
                },
                Some("the mesh's route by hf0 is gone"),
                Verdict::Degraded,
            ),
            (
                "node",
                "hf0",
                by("hf0", "10.0.0.1", "unicast"),
                Some("from 10.0.0.1, not from 100.96.0.1"),
                Verdict::Degraded,
            ),
            ("node", "hf0", none(), Some("no route"), Verdict::Down),
            ("outside", "", none(), None, Verdict::Down),
            (
                "outside",
                "",
                by("eth0", "10.0.0.1", "unicast"),
                None,
                Verdict::Ok,
            ),
            (
                "local",
                "",
                by("lo", "10.0.0.1", "unicast"),
                Some("as its own"),
                Verdict::Degraded,
            ),
            (
                "local",
                "",
                by("lo", "10.0.0.1", "local"),
                None,
                Verdict::Ok,
            ),
            ("service", "", none(), None, Verdict::Ok),
            (
                "nobody",
                "hf0",
                by("hf0", "100.96.0.1", "unicast"),
                None,
                Verdict::Down,
            ),
        ] {
            let route = route(kind, wanted, kernel);
            let differs = route.differs.as_deref();
            match says {
                Some(says) => assert!(
                    differs.is_some_and(|text| text.contains(says)),
                    "{kind}: {differs:?}"
                ),
                None => assert_eq!(differs, None, "{kind}"),
            }
            assert_eq!(route.verdict(), verdict, "{kind} {differs:?}");
        }
    }
}
