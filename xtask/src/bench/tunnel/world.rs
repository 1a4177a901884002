//! Where it is measured: two nodes, one router hop of veth apart (MTU 1500), a third for what one node has
//! with two, and another with controller and relay. The router drops what would take another path than the
//! wanted one.

use std::{net::Ipv4Addr, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    load::Way,
    mesh::{CLOUD, Mesh, word},
    node::{Node, Process, tail},
    tool,
};
use serde_json::Value;

use super::{
    cases::{Case, Kind},
    install::Tool,
    peers,
};
use crate::bench::{LEFT, NODES, RIGHT, UP_LIMIT, two_nodes};

/// The relay's limit for one node is for strangers; the highest it accepts, in Mb/s.
const RELAY_CONFIG: &str = "client_rate_mbit_per_s = 100000\n";

/// The left node's second peer, and its address.
const THIRD: (&str, Ipv4Addr) = ("third", Ipv4Addr::new(198, 51, 100, 21));

/// Nodes that join.
pub(super) const NODES_JOINED: u64 = 3;

/// A daemon that has not stopped by then is killed.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// The overlay's MTU by QUIC, so that full-size packets fit its datagrams and do not travel as streams:
/// discovery finds 1452 or 1472 bytes here, of which QUIC takes 38, the frame 8 and WireGuard 32.
const QUIC_MTU_BYTES: u16 = 1_360;

/// The path that Holdfast's packets take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    Direct,
    RelayUdp,
    RelayQuic,
    RelayTls,
}

impl Route {
    /// What `meshctl` calls the peer's state, and the link to the relay.
    fn expected(self) -> (&'static str, Option<&'static str>) {
        match self {
            Self::Direct => ("direct", None),
            Self::RelayUdp => ("relayed", Some("udp")),
            Self::RelayQuic => ("relayed", Some("quic")),
            Self::RelayTls => ("relayed", Some("tls")),
        }
    }

    /// The router's rules, which leave this path alone.
    fn rules(self) -> String {
        let [left, right] = Ends::OUTER;
        let no_direct =
            format!("ip saddr {{ {left}, {right} }} ip daddr {{ {left}, {right} }} drop");
        // Every QUIC packet has 0x40 set in its first byte (RFC 9000 §17), and no other framing on
        // the relay's port has.
        let only_quic =
            "udp dport 443 @th,64,8 & 0x40 == 0 drop\nudp sport 443 @th,64,8 & 0x40 == 0 drop";
        let no_udp = format!(
            "ip saddr {CLOUD} meta l4proto udp drop\nip daddr {CLOUD} meta l4proto udp drop"
        );
        let rules = match self {
            Self::Direct => String::new(),
            Self::RelayUdp => no_direct,
            Self::RelayQuic => format!("{no_direct}\n{only_quic}"),
            Self::RelayTls => format!("{no_direct}\n{no_udp}"),
        };
        format!(
            "table inet bench\ndelete table inet bench\ntable inet bench {{\n chain forward {{\n \
             type filter hook forward priority 0\n{rules}\n }}\n}}\n"
        )
    }
}

/// The two nodes.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) left: Node,
    pub(super) right: Node,
}

impl Ends {
    /// Their addresses outside.
    pub(super) const OUTER: [Ipv4Addr; 2] = {
        let [(_, left), (_, right)] = NODES;
        [left, right]
    };
}

/// The lab, with nothing between the two nodes yet.
#[derive(Debug)]
pub(super) struct World {
    _iperf: [Process; 2],
    relay: Process,
    pub(super) ends: Ends,
    third: Node,
    pub(super) mesh: Mesh,
}

/// A way that is up. Its daemons end when it is dropped.
#[derive(Debug)]
pub(super) struct Up {
    /// The right node's address on it.
    pub(super) address: Ipv4Addr,
    /// The third node's, if the left one has two peers.
    second: Option<Ipv4Addr>,
    /// All ends' daemons, the left one's first.
    pub(super) daemons: Vec<Process>,
    /// Whether the relay works for it.
    relayed: bool,
}

impl World {
    pub(super) fn new(bins: &Path) -> Result<Self> {
        let mesh = two_nodes(bins, RELAY_CONFIG)?;
        let ends = Ends {
            left: mesh.node(LEFT)?,
            right: mesh.node(RIGHT)?,
        };
        let (third, address) = THIRD;
        let node = mesh.lab().public_node(third, address)?;
        mesh.start_agent(third)?;
        // They join: from here on each start reads what is on the disk.
        for node in [LEFT, RIGHT, third] {
            mesh.agent_ready(node, NODES_JOINED)?;
            mesh.take(node, "mesh-agent")?.terminate(UP_LIMIT)?;
        }
        let serve = |node: &Node| node.spawn("iperf3", &["iperf3", "--server"]);
        Ok(Self {
            _iperf: [serve(&ends.right)?, serve(&node)?],
            relay: mesh.take("cloud", "mesh-relay")?,
            ends,
            third: node,
            mesh,
        })
    }

    /// The load's way over what is up.
    pub(super) fn way(&self, up: &Up) -> Way<'_> {
        Way {
            from: &self.ends.left,
            to: &self.ends.right,
            address: up.address,
        }
    }

    /// The load's way to the second peer, if there is one.
    pub(super) fn second_way(&self, up: &Up) -> Option<Way<'_>> {
        let address = up.second?;
        Some(Way {
            from: &self.ends.left,
            to: &self.third,
            address,
        })
    }

    /// Starts what a case needs, and waits until a packet has gone there and back.
    ///
    /// # Errors
    ///
    /// If it does not come up, or by another path than the wanted one.
    pub(super) fn start(&self, case: &Case, tool: Option<&Tool>) -> Result<Up> {
        let tool = || tool.context("no program");
        let [_, inner] = peers::ADDRESSES;
        self.allow(case.route())?;
        let (third, _) = THIRD;
        let (address, second, daemons) = match case.kind {
            Kind::Raw => {
                let [_, outer] = Ends::OUTER;
                (outer, None, Vec::new())
            }
            Kind::Agents(route, lines) => {
                let daemons = self.agents(&[(LEFT, lines), (RIGHT, lines)])?;
                (self.path(route, RIGHT)?, None, daemons)
            }
            Kind::Hub(lines) => {
                let daemons = self.agents(&[(LEFT, lines), (RIGHT, ""), (third, "")])?;
                let [right, third] = [RIGHT, third].map(|peer| self.path(Route::Direct, peer));
                (right?, Some(third?), daemons)
            }
            Kind::WireGuard { words, .. } => {
                (inner, None, peers::wireguard(&self.ends, tool()?, words)?)
            }
            Kind::Other { start, .. } => (inner, None, start(&self.ends, tool()?)?),
        };
        let mut up = Up {
            address,
            second,
            daemons,
            relayed: case.route() != Route::Direct,
        };
        let ping = format!("ping -q -c 1 -W 1 {address}");
        let answered = tool::eventually("an answer through the tunnel", UP_LIMIT, || {
            up.daemons.iter_mut().try_for_each(Process::running)?;
            peers::shell(&self.ends.left, &ping)
        });
        let logs = up.daemons.iter().map(|daemon| tail(&daemon.log()));
        answered.with_context(|| format!("logs end:\n{}", logs.collect::<Vec<_>>().join("\n")))?;
        Ok(up)
    }

    /// Processor time of everything that carries packets of what is up, in seconds.
    pub(super) fn cpu_s(&self, up: &Up) -> Result<f64> {
        let relay = up.relayed.then_some(&self.relay);
        let times = up.daemons.iter().chain(relay).map(Process::cpu_time);
        let times = times.collect::<Result<Vec<_>>>()?;
        Ok(times.iter().map(Duration::as_secs_f64).sum())
    }

    /// Lets the router drop all paths but this one.
    pub(super) fn allow(&self, route: Route) -> Result<()> {
        tool::nft(self.mesh.lab().internet().netns(), &route.rules())
    }

    /// Starts agents, each with more lines of configuration, and waits until they serve.
    pub(super) fn agents(&self, nodes: &[(&str, &str)]) -> Result<Vec<Process>> {
        for (node, lines) in nodes {
            self.mesh.start_agent_with(node, lines)?;
        }
        for (node, _) in nodes {
            self.mesh.agent_ready(node, NODES_JOINED)?;
        }
        let daemons = nodes
            .iter()
            .map(|(node, _)| self.mesh.take(node, "mesh-agent"));
        daemons.collect()
    }

    /// Waits until the left node has this path to a peer, and returns the peer's address.
    pub(super) fn path(&self, route: Route, peer: &str) -> Result<Ipv4Addr> {
        let status = self.mesh.status(peer)?;
        let address = status.pointer("/overlay_addresses/0");
        let address = address.and_then(Value::as_str).unwrap_or_default();
        let address = address.split('/').next().unwrap_or_default();
        let address = address
            .parse()
            .with_context(|| format!("no IPv4 overlay address in {status}"))?;
        tool::eventually("the wanted path", UP_LIMIT, || {
            self.is_by(route, peer, address)
        })?;
        if route == Route::RelayQuic {
            let narrow = format!("ip link set holdfast0 mtu {QUIC_MTU_BYTES}");
            peers::shell(&self.ends.left, &narrow)?;
            peers::shell(&self.mesh.node(peer)?, &narrow)?;
        }
        Ok(address)
    }

    fn is_by(&self, route: Route, peer: &str, address: Ipv4Addr) -> Result<()> {
        // Without traffic nobody looks for a path.
        peers::shell(&self.ends.left, &format!("ping -q -c 1 -W 1 {address}"))?;
        let (state, transport) = route.expected();
        for (node, other) in [(LEFT, peer), (peer, LEFT)] {
            let why = self.mesh.ask(node, &["path", "why", other])?;
            ensure!(word(&why, "state") == state, "on {node}: {why}");
            if let Some(transport) = transport {
                let status = self.mesh.status(node)?;
                let used = status.pointer("/relays/0/transport");
                let used = used.and_then(Value::as_str).unwrap_or("nothing");
                ensure!(
                    used == transport,
                    "{node} has a link to the relay by {used}, and not by {transport}"
                );
            }
        }
        Ok(())
    }
}

impl Up {
    /// Stops the daemons in the order in which they started.
    ///
    /// # Errors
    ///
    /// If one does not stop.
    pub(super) fn stop(mut self) -> Result<()> {
        let stop = |daemon: &mut Process| daemon.terminate(STOP_LIMIT).map(drop);
        self.daemons.iter_mut().try_for_each(stop)
    }
}
