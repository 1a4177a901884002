//! Where it is measured: two nodes, one router hop of veth apart (MTU 1500), and a third with controller
//! and relay. The router drops what would take another path than the wanted one.

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
    _iperf: Process,
    relay: Process,
    pub(super) ends: Ends,
    mesh: Mesh,
}

/// A way that is up. Its daemons end when it is dropped.
#[derive(Debug)]
pub(super) struct Up {
    /// The right node's address on it.
    pub(super) address: Ipv4Addr,
    /// Both ends' daemons.
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
        // They have joined: from here on each start reads what is on the disk.
        for node in [LEFT, RIGHT] {
            mesh.take(node, "mesh-agent")?.terminate(UP_LIMIT)?;
        }
        Ok(Self {
            _iperf: ends.right.spawn("iperf3", &["iperf3", "--server"])?,
            relay: mesh.take("cloud", "mesh-relay")?,
            ends,
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

    /// Starts what a case needs, and waits until a packet has gone there and back.
    ///
    /// # Errors
    ///
    /// If it does not come up, or by another path than the wanted one.
    pub(super) fn start(&self, case: &Case, tool: Option<&Tool>) -> Result<Up> {
        let tool = || tool.context("no program");
        let [_, inner] = peers::ADDRESSES;
        let (address, daemons) = match case.kind {
            Kind::Raw => {
                self.allow(Route::Direct)?;
                let [_, outer] = Ends::OUTER;
                (outer, Vec::new())
            }
            Kind::Agents(route, lines) => self.agents(route, lines)?,
            Kind::WireGuard { words, .. } => {
                self.allow(Route::Direct)?;
                (inner, peers::wireguard(&self.ends, tool()?, words)?)
            }
            Kind::Other { start, .. } => {
                self.allow(Route::Direct)?;
                (inner, start(&self.ends, tool()?)?)
            }
        };
        let relayed = matches!(case.kind, Kind::Agents(route, _) if route != Route::Direct);
        let mut up = Up {
            address,
            daemons,
            relayed,
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

    fn allow(&self, route: Route) -> Result<()> {
        tool::nft(self.mesh.lab().internet().netns(), &route.rules())
    }

    fn agents(&self, route: Route, lines: &str) -> Result<(Ipv4Addr, Vec<Process>)> {
        self.allow(route)?;
        let nodes = [LEFT, RIGHT];
        nodes
            .iter()
            .try_for_each(|node| self.mesh.start_agent_with(node, lines))?;
        nodes
            .iter()
            .try_for_each(|node| self.mesh.agent_ready(node, 2))?;
        let daemons = nodes.iter().map(|node| self.mesh.take(node, "mesh-agent"));
        let daemons = daemons.collect::<Result<Vec<_>>>()?;
        let status = self.mesh.status(RIGHT)?;
        let address = status.pointer("/overlay_addresses/0");
        let address = address.and_then(Value::as_str).unwrap_or_default();
        let address = address.split('/').next().unwrap_or_default();
        let address = address
            .parse()
            .with_context(|| format!("no IPv4 overlay address in {status}"))?;
        tool::eventually("the wanted path", UP_LIMIT, || self.is_by(route, address))?;
        if route == Route::RelayQuic {
            let narrow = format!("ip link set holdfast0 mtu {QUIC_MTU_BYTES}");
            peers::shell(&self.ends.left, &narrow)?;
            peers::shell(&self.ends.right, &narrow)?;
        }
        Ok((address, daemons))
    }

    fn is_by(&self, route: Route, address: Ipv4Addr) -> Result<()> {
        // Without traffic nobody looks for a path.
        peers::shell(&self.ends.left, &format!("ping -q -c 1 -W 1 {address}"))?;
        let (state, transport) = route.expected();
        for (node, other) in [(LEFT, RIGHT), (RIGHT, LEFT)] {
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
