//! What `--json` prints. Fields are only ever added; their meaning stays.
//!
//! Absent knowledge is `null`, never a made-up number. Times end in their unit.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use mesh_api::admin;
use serde::Serialize;

use crate::preflight::{Check, Level};

/// `status`.
#[derive(Debug, Serialize)]
pub(crate) struct Status {
    pub(crate) node: String,
    pub(crate) public_key: String,
    pub(crate) version: String,
    /// `ok`, `degraded` or `down`.
    pub(crate) health: &'static str,
    /// Why it is not `ok`, a sentence each.
    pub(crate) problems: Vec<String>,
    pub(crate) site: Option<String>,
    pub(crate) interface: String,
    pub(crate) overlay_addresses: Vec<String>,
    pub(crate) local_addresses: Vec<String>,
    pub(crate) reflexive_addresses: Vec<String>,
    pub(crate) nat: String,
    pub(crate) uptime_ms: u64,
    pub(crate) controller: StatusController,
    pub(crate) snapshot: StatusSnapshot,
    pub(crate) relays: Vec<StatusRelay>,
    /// Peers by state.
    pub(crate) peers: BTreeMap<String, u32>,
    pub(crate) dns_listen: Vec<String>,
    /// Dropped packets by reason.
    pub(crate) drops: BTreeMap<String, u64>,
    /// Interfaces whose devices use services through the node: whether their packets are looked at.
    pub(crate) service_interfaces: BTreeMap<String, bool>,
    /// What became of those packets.
    pub(crate) service_packets: BTreeMap<String, u64>,
    /// Whether policies are enforced here.
    pub(crate) policy_enforced: bool,
    pub(crate) policy_packets: BTreeMap<String, u64>,
    /// Denied or audited last, the newest at the end.
    pub(crate) policy_events: Vec<String>,
    /// Why services end with the agent; `null`: they go on without it, or are off.
    pub(crate) services_unkept: Option<String>,
    pub(crate) certificate_expires_unix_s: Option<i64>,
    /// What the CONNECT proxy does (`open`) and did; empty: there is none here.
    pub(crate) proxy: BTreeMap<String, u64>,
    /// The ways out, while the agent chooses among them; empty: the kernel's routes do.
    pub(crate) uplinks: Vec<StatusUplink>,
    /// How often peers and paths changed from one state to another.
    pub(crate) transitions: BTreeMap<String, u64>,
    /// Default gateways, and whether they lead their outside port here.
    pub(crate) port_mappings: BTreeMap<String, String>,
    /// What became of announcements on the LAN.
    pub(crate) lan_announcements: BTreeMap<String, u64>,
}

#[derive(Debug, Serialize)]
pub(crate) struct StatusUplink {
    pub(crate) interface: String,
    pub(crate) used: bool,
    /// It has a carrier.
    pub(crate) up: bool,
    pub(crate) metered: bool,
    pub(crate) weight: u32,
}

#[derive(Debug, Serialize)]
pub(crate) struct StatusController {
    /// `null`: none is configured.
    pub(crate) address: Option<String>,
    pub(crate) connected: bool,
    /// The way out is metered: it is asked again in so long; `null`: it is or should be connected.
    pub(crate) asked_in_s: Option<u64>,
}

#[derive(Debug, Serialize)]
pub(crate) struct StatusSnapshot {
    pub(crate) generation: u64,
    pub(crate) age_s: u64,
    /// `counts`, `warned` (half of `offlineLimitDays` is over) or `over`.
    pub(crate) standing: &'static str,
    /// Until it is over; `null`: it is not `warned`.
    pub(crate) left_s: Option<u64>,
    pub(crate) nodes: u32,
    pub(crate) services: u32,
}

#[derive(Debug, Serialize)]
pub(crate) struct StatusRelay {
    pub(crate) name: String,
    /// `quic`, `tls`, or `null` when it is down.
    pub(crate) transport: Option<String>,
    pub(crate) home: bool,
    pub(crate) rtt_ms: Option<f64>,
    pub(crate) problem: Option<String>,
}

impl From<admin::StatusResponse> for Status {
    fn from(said: admin::StatusResponse) -> Self {
        let (standing, left_s) = match said.standing() {
            admin::Standing::Counts => ("counts", None),
            admin::Standing::Warned => ("warned", Some(said.standing_left_s)),
            admin::Standing::Over => ("over", None),
        };
        Self {
            health: health(said.health()),
            node: said.node,
            public_key: said.public_key,
            version: said.version,
            problems: said.problems,
            site: some(said.site),
            interface: said.interface,
            overlay_addresses: said.overlay_addresses,
            local_addresses: said.local_addresses,
            reflexive_addresses: said.reflexive_addresses,
            nat: said.nat,
            uptime_ms: said.uptime_ms,
            controller: StatusController {
                address: some(said.controller),
                connected: said.controller_connected,
                asked_in_s: Some(said.controller_asked_in_s).filter(|in_s| *in_s > 0),
            },
            snapshot: StatusSnapshot {
                generation: said.snapshot_generation,
                age_s: said.snapshot_age_s,
                standing,
                left_s,
                nodes: said.nodes,
                services: said.services,
            },
            relays: said.relays.into_iter().map(StatusRelay::from).collect(),
            peers: said.peers,
            dns_listen: said.dns_listen,
            drops: said.drops,
            service_interfaces: said.service_interfaces,
            service_packets: said.service_packets,
            services_unkept: some(said.services_unkept),
            policy_enforced: said.policy_enforced,
            policy_packets: said.policy_packets,
            policy_events: said.policy_events,
            proxy: said.proxy,
            uplinks: said.uplinks.into_iter().map(StatusUplink::from).collect(),
            transitions: said.transitions,
            port_mappings: said.port_mappings,
            lan_announcements: said.lan_announcements,
            certificate_expires_unix_s: (said.certificate_expires_unix_s != 0)
                .then_some(said.certificate_expires_unix_s),
        }
    }
}

impl From<admin::UplinkStatus> for StatusUplink {
    fn from(said: admin::UplinkStatus) -> Self {
        Self {
            interface: said.interface,
            used: said.used,
            up: said.up,
            metered: said.metered,
            weight: said.weight,
        }
    }
}

impl From<admin::RelayStatus> for StatusRelay {
    fn from(said: admin::RelayStatus) -> Self {
        Self {
            name: said.name,
            transport: some(said.transport),
            home: said.home,
            rtt_ms: measured(said.rtt_ms),
            problem: some(said.problem),
        }
    }
}

pub(crate) fn health(health: admin::Health) -> &'static str {
    match health {
        admin::Health::Ok => "ok",
        // An agent that does not say how it is should be looked at.
        admin::Health::Degraded | admin::Health::Unspecified => "degraded",
        admin::Health::Down => "down",
    }
}

/// `peers`.
#[derive(Debug, Serialize)]
pub(crate) struct Peers {
    pub(crate) peers: Vec<Peer>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Peer {
    pub(crate) name: String,
    pub(crate) public_key: String,
    pub(crate) site: Option<String>,
    pub(crate) overlay_addresses: Vec<String>,
    /// `idle`, `waking`, `relayed`, `direct`, `suspect` or `unreachable`.
    pub(crate) state: String,
    pub(crate) reason: Option<String>,
    pub(crate) path: Option<String>,
    pub(crate) rtt_ms: Option<f64>,
    pub(crate) sent_bytes: u64,
    pub(crate) received_bytes: u64,
    /// Since something authenticated came in.
    pub(crate) last_received_ms: Option<u64>,
    pub(crate) last_handshake_ms: Option<u64>,
    /// A plain WireGuard device.
    pub(crate) external: bool,
}

impl From<admin::PeersResponse> for Peers {
    fn from(said: admin::PeersResponse) -> Self {
        let peer = |said: admin::Peer| Peer {
            name: said.name,
            public_key: said.public_key,
            site: some(said.site),
            overlay_addresses: said.overlay_addresses,
            state: said.state,
            reason: some(said.reason),
            path: some(said.path),
            rtt_ms: measured(said.rtt_ms),
            sent_bytes: said.sent_bytes,
            received_bytes: said.received_bytes,
            last_received_ms: said.last_received_ms,
            last_handshake_ms: said.last_handshake_ms,
            external: said.external,
        };
        Self {
            peers: said.peers.into_iter().map(peer).collect(),
        }
    }
}

/// `ping`.
#[derive(Debug, Serialize)]
pub(crate) struct Ping {
    pub(crate) target: String,
    /// The path that was asked for; `null`: the one in use.
    pub(crate) via: Option<String>,
    /// What came of `--until-direct`; `null` without it.
    pub(crate) until_direct: Option<UntilDirect>,
    pub(crate) sent: usize,
    pub(crate) received: usize,
    pub(crate) min_ms: Option<f64>,
    pub(crate) avg_ms: Option<f64>,
    pub(crate) max_ms: Option<f64>,
    pub(crate) replies: Vec<PingReply>,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct PingReply {
    pub(crate) sequence: u32,
    /// `null`: no answer in time.
    pub(crate) rtt_ms: Option<f64>,
    /// By which it went; `null`: it could not be sent.
    pub(crate) path: Option<String>,
    /// Of the path: `lan`, `direct`, `peer_relay` or `relay`.
    pub(crate) kind: Option<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct UntilDirect {
    pub(crate) direct: bool,
    /// Until it was direct, or until nobody waited any longer.
    pub(crate) after_ms: u64,
    /// Why it is not direct, as `path why` has it; `null` when it is.
    pub(crate) reason: Option<String>,
    pub(crate) explanation: Option<String>,
}

impl PingReply {
    /// Whether it came back by a path without a relay.
    pub(crate) fn is_direct(&self) -> bool {
        self.rtt_ms.is_some() && matches!(self.kind.as_deref(), Some("lan" | "direct"))
    }
}

impl Ping {
    pub(crate) fn new(target: String, via: Option<String>, replies: Vec<PingReply>) -> Self {
        let times: Vec<f64> = replies.iter().filter_map(|reply| reply.rtt_ms).collect();
        #[expect(clippy::cast_precision_loss, reason = "at most 1,000 echoes")]
        let count = times.len() as f64;
        Self {
            target,
            via,
            until_direct: None,
            sent: replies.len(),
            received: times.len(),
            min_ms: times.iter().copied().reduce(f64::min),
            avg_ms: (!times.is_empty()).then(|| times.iter().sum::<f64>() / count),
            max_ms: times.iter().copied().reduce(f64::max),
            replies,
        }
    }

    /// Says what came of waiting for a direct path. `why`: what the agent says of the path, unless the last echo went by a
    /// direct one.
    pub(crate) fn judge(&mut self, after: Duration, why: Option<PathWhy>) {
        // It may have come into use since the last echo.
        let why = why.filter(|why| why.state != "direct");
        self.until_direct = Some(UntilDirect {
            direct: why.is_none(),
            after_ms: u64::try_from(after.as_millis()).unwrap_or(u64::MAX),
            reason: why.as_ref().and_then(|why| why.reason.clone()),
            explanation: why.and_then(|why| why.explanation),
        });
    }
}

impl From<admin::PingResponse> for PingReply {
    fn from(said: admin::PingResponse) -> Self {
        Self {
            sequence: said.sequence,
            rtt_ms: said.rtt_ms,
            path: some(said.path),
            kind: some(said.kind),
        }
    }
}

/// `path why`.
#[derive(Debug, Serialize)]
pub(crate) struct PathWhy {
    pub(crate) node: String,
    pub(crate) state: String,
    /// Why it is not direct, for machines; `null` when it is.
    pub(crate) reason: Option<String>,
    pub(crate) explanation: Option<String>,
    pub(crate) own_nat: Option<String>,
    pub(crate) peer_nat: Option<String>,
    pub(crate) paths: Vec<Path>,
    pub(crate) transitions: Vec<Transition>,
    pub(crate) next_attempt_ms: Option<u64>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Path {
    pub(crate) path: String,
    /// `host`, `reflexive`, `port_mapped`, `peer_reflexive`, `static`, `relay` or `cached`.
    pub(crate) kind: String,
    /// `candidate`, `probing`, `standby`, `primary`, `suspect` or `dead`.
    pub(crate) state: String,
    pub(crate) rtt_ms: Option<f64>,
    /// From 0 to 1.
    pub(crate) loss: f64,
    pub(crate) probes_sent: u32,
    pub(crate) probes_answered: u32,
    pub(crate) full_size_ok: bool,
}

#[derive(Debug, Serialize)]
pub(crate) struct Transition {
    pub(crate) ago_ms: u64,
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) reason: String,
    /// The path whose state it is; `null`: the node's own.
    pub(crate) path: Option<String>,
}

impl From<admin::PathWhyResponse> for PathWhy {
    fn from(said: admin::PathWhyResponse) -> Self {
        let path = |said: admin::PathReport| Path {
            path: said.path,
            kind: said.kind,
            state: said.state,
            rtt_ms: measured(said.rtt_ms),
            loss: said.loss,
            probes_sent: said.probes_sent,
            probes_answered: said.probes_answered,
            full_size_ok: said.full_size_ok,
        };
        let transition = |said: admin::TransitionReport| Transition {
            ago_ms: said.ago_ms,
            from: said.from,
            to: said.to,
            reason: said.reason,
            path: some(said.path),
        };
        Self {
            node: said.node,
            state: said.state,
            reason: some(said.reason),
            explanation: some(said.explanation),
            own_nat: some(said.own_nat),
            peer_nat: some(said.peer_nat),
            paths: said.paths.into_iter().map(path).collect(),
            transitions: said.transitions.into_iter().map(transition).collect(),
            next_attempt_ms: said.next_attempt_ms,
        }
    }
}

/// `services`, with or without `--endpoints`.
#[derive(Debug, Serialize)]
pub(crate) struct Services {
    pub(crate) services: Vec<Service>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Service {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) cluster_ips: Vec<String>,
    pub(crate) ports: Vec<String>,
    pub(crate) endpoints: Vec<Endpoint>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Endpoint {
    pub(crate) address: String,
    pub(crate) node: Option<String>,
    /// `same-node`, `same-site`, `same-zone`, `same-region` or `anywhere`.
    pub(crate) tier: String,
    pub(crate) ready: bool,
    pub(crate) alive: bool,
    /// New flows from this node go there.
    pub(crate) chosen: bool,
    /// TCP connects to it fail.
    pub(crate) ejected: bool,
    /// This node has as many connections open there as the service says.
    pub(crate) full: bool,
}

impl From<admin::ServicesResponse> for Services {
    fn from(said: admin::ServicesResponse) -> Self {
        let endpoint = |said: admin::EndpointReport| Endpoint {
            address: said.address,
            node: some(said.node),
            tier: said.tier,
            ready: said.ready,
            alive: said.alive,
            chosen: said.chosen,
            ejected: said.ejected,
            full: said.full,
        };
        let service = |said: admin::ServiceReport| Service {
            namespace: said.namespace,
            name: said.name,
            kind: said.kind,
            cluster_ips: said.cluster_ips,
            ports: said.ports,
            endpoints: said.endpoints.into_iter().map(endpoint).collect(),
        };
        Self {
            services: said.services.into_iter().map(service).collect(),
        }
    }
}

/// `dns query`.
#[derive(Debug, Serialize)]
pub(crate) struct DnsQuery {
    pub(crate) name: String,
    #[serde(rename = "type")]
    pub(crate) record_type: String,
    /// `NOERROR`, `NXDOMAIN`, `SERVFAIL` …
    pub(crate) code: String,
    /// A record a line, as in a zone file.
    pub(crate) answers: Vec<String>,
    pub(crate) ms: f64,
    pub(crate) server: String,
}

/// `token create`.
#[derive(Debug, Serialize)]
pub(crate) struct CreatedToken {
    /// The secret: shown here and never again.
    pub(crate) token: String,
    pub(crate) id: String,
    pub(crate) expires_unix_s: i64,
}

/// `token list`.
#[derive(Debug, Serialize)]
pub(crate) struct Tokens {
    pub(crate) tokens: Vec<Token>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Token {
    pub(crate) id: String,
    pub(crate) description: String,
    pub(crate) expires_unix_s: i64,
    pub(crate) uses_left: u32,
    /// Only this node may use it.
    pub(crate) node: Option<String>,
}

impl From<admin::ListTokensResponse> for Tokens {
    fn from(said: admin::ListTokensResponse) -> Self {
        let token = |said: admin::TokenReport| Token {
            id: said.id,
            description: said.description,
            expires_unix_s: said.expires_unix_s,
            uses_left: said.uses_left,
            node: some(said.node),
        };
        Self {
            tokens: said.tokens.into_iter().map(token).collect(),
        }
    }
}

/// `token revoke`.
#[derive(Debug, Serialize)]
pub(crate) struct RevokedToken {
    pub(crate) revoked: String,
}

/// `controller accept-rollback`.
#[derive(Debug, Serialize)]
pub(crate) struct AcceptedRollback {
    /// The one that counts now.
    pub(crate) epoch: u64,
}

/// `nodes`.
#[derive(Debug, Serialize)]
pub(crate) struct Nodes {
    pub(crate) nodes: Vec<Node>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) public_key: String,
    pub(crate) overlay_addresses: Vec<String>,
    pub(crate) site: Option<String>,
    pub(crate) connected: bool,
    /// What its agent has, as far as the controller knows.
    pub(crate) generation: u64,
    /// When it last said something, if that was since this controller started.
    pub(crate) last_seen_unix_s: Option<i64>,
}

impl From<admin::ListNodesResponse> for Nodes {
    fn from(said: admin::ListNodesResponse) -> Self {
        let node = |said: admin::NodeReport| Node {
            name: said.name,
            public_key: said.public_key,
            overlay_addresses: said.overlay_addresses,
            site: some(said.site),
            connected: said.connected,
            generation: said.generation,
            last_seen_unix_s: (said.last_seen_unix_s != 0).then_some(said.last_seen_unix_s),
        };
        Self {
            nodes: said.nodes.into_iter().map(node).collect(),
        }
    }
}

/// `node remove`.
#[derive(Debug, Serialize)]
pub(crate) struct RemovedNode {
    pub(crate) removed: String,
    /// From when on another node may get its address.
    pub(crate) address_rests_until_unix_s: i64,
}

/// `relay issue`: where the files are. The key itself is only in its file.
#[derive(Debug, Serialize)]
pub(crate) struct RelayFiles {
    pub(crate) certificate: String,
    pub(crate) key: String,
    pub(crate) ca: String,
}

/// `controller status`.
#[derive(Debug, Serialize)]
pub(crate) struct ControllerStatus {
    pub(crate) trust_domain: String,
    pub(crate) mesh_id: String,
    pub(crate) generation: u64,
    pub(crate) nodes: u32,
    pub(crate) agents_connected: u32,
    /// Whether it serves agents: what the mesh is made from was read.
    pub(crate) serves: bool,
    /// Whether it is the one of several that writes what only one may write.
    pub(crate) leads: bool,
    /// Manifest problems in force now, a line each.
    pub(crate) problems: Vec<String>,
}

impl From<admin::ControllerStatusResponse> for ControllerStatus {
    fn from(said: admin::ControllerStatusResponse) -> Self {
        Self {
            trust_domain: said.trust_domain,
            mesh_id: said.mesh_id,
            generation: said.generation,
            nodes: said.nodes,
            agents_connected: said.agents_connected,
            serves: said.serves,
            leads: said.leads,
            problems: said.problems,
        }
    }
}

/// Protobuf's empty text is "not said".
pub(crate) fn some(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

/// Protobuf's 0 is "not measured".
pub(crate) fn measured(rtt_ms: f64) -> Option<f64> {
    (rtt_ms > 0.0).then_some(rtt_ms)
}

/// `install --check`.
#[derive(Debug, Serialize)]
pub(crate) struct Preflight {
    /// `ok`, `warning` or `error`: the worst of the checks.
    pub(crate) level: Level,
    pub(crate) checks: Vec<Check>,
}

impl Preflight {
    pub(crate) fn new(checks: Vec<Check>) -> Self {
        let levels = checks.iter().map(|check| check.level);
        let level = levels.max().unwrap_or(Level::Ok);
        Self { level, checks }
    }
}

/// `uninstall`.
#[derive(Debug, Serialize)]
pub(crate) struct Uninstalled {
    /// Nodes from which everything is gone.
    pub(crate) nodes_cleaned: BTreeSet<String>,
    /// Nodes that were not reached.
    pub(crate) nodes_left: BTreeSet<String>,
    /// What was deleted from the cluster; empty while nodes are left.
    pub(crate) deleted: Vec<String>,
}

impl Uninstalled {
    pub(crate) fn new(
        nodes_cleaned: BTreeSet<String>,
        nodes_left: BTreeSet<String>,
        deleted: Vec<String>,
    ) -> Self {
        Self {
            nodes_cleaned,
            nodes_left,
            deleted,
        }
    }
}
