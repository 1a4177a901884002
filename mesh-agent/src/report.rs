//! What the agent tells people: the core's, the tunnel's and the kernel's state in the words of
//! `admin.proto`. Reads, and changes nothing.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use mesh_api::{
    admin::{
        self, EndpointReport, EventReport, Health, PathReport, PathWhyResponse, Peer, RelayStatus,
        ServiceReport, StatusResponse, TransitionReport, UplinkStatus,
    },
    control::{NodeReport, node_report::Nat},
};
use mesh_core::{
    io::{PeerState, Reason},
    node::{machine::PathEvent, path, report},
    offline::limit::Standing,
    services::{self, View},
    snapshot::{Protocol, Service, ServiceKind},
};
use mesh_dns::{inspect::Inspector, server::HELD_RETRY};
use mesh_identity::certificate::Validity;
use mesh_wire::{
    id::{NodeId, NodeName, Via},
    peer::{CandidateKind, NatKind},
};
use tokio::{
    task::{JoinError, spawn_blocking},
    time,
};

use crate::{
    admin::Facts,
    driver::Driver,
    metrics::{Measured, Path, Queue},
    portmap,
    proxy::Proxy,
    sync::Connection,
    trace::PeerSeen,
    uplinks::NamedUplink,
};

/// Nodes out of reach that the status tells one by one, a sentence of at most 250 bytes each: who lost its uplink may have
/// spoken with thousands, and nobody reads more than a screen.
const UNREACHABLE_TOLD_MAX: usize = 20;

/// Milliseconds, as people and JSON read them.
#[must_use]
pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The whole node on one page.
#[must_use]
pub fn status(driver: &Driver, facts: &Facts, connection: &Connection) -> StatusResponse {
    let snapshot = driver.snapshot();
    let own = driver.own();
    let validity = facts.credentials.load().validity();
    let relays: Vec<_> = driver
        .core
        .relays()
        .map(|relay| relay_status(driver, relay))
        .collect();
    let mut peers = BTreeMap::new();
    for peer in driver.core.peers() {
        *peers.entry(state_text(peer.state).to_owned()).or_default() += 1;
    }
    let mut problems = problems(driver, connection, &relays);
    let standing = *facts.standing.borrow();
    problems.extend(standing_problem(standing));
    problems.extend(clock_problem(facts, SystemTime::now()));
    let served = facts.served.borrow();
    problems.extend(served.iter().filter_map(|(name, one)| {
        let problem = one.problem.as_ref()?;
        Some(format!("interface {name}: {problem}"))
    }));
    problems.extend(facts.health_checks.borrow().iter().cloned());
    problems.extend(facts.proxy.iter().flat_map(Proxy::problems));
    problems.extend(held_problems(&facts.dns, &facts.interface));
    StatusResponse {
        node: driver.name().to_string(),
        public_key: driver.tunnel.node_id().to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        overlay_addresses: own
            .map(|own| vec![own.overlay_v4.to_string(), own.overlay_v6.to_string()])
            .unwrap_or_default(),
        site: own
            .and_then(|own| own.locality.site.as_ref())
            .map(ToString::to_string)
            .unwrap_or_default(),
        health: health(driver, &relays, &problems).into(),
        problems,
        uptime_ms: millis(facts.started.elapsed()),
        controller_connected: connection.connected,
        controller_asked_in_s: connection.next_visit.map_or(0, |at| {
            1 + at.saturating_duration_since(time::Instant::now()).as_secs()
        }),
        controller: connection.controller.clone().unwrap_or_default(),
        snapshot_generation: snapshot.generation.0,
        snapshot_age_s: snapshot_age(connection, validity).map_or(0, |age| age.as_secs()),
        standing: match standing {
            Standing::Counts => admin::Standing::Counts,
            Standing::Warned(_) => admin::Standing::Warned,
            Standing::Over => admin::Standing::Over,
        }
        .into(),
        standing_left_s: match standing {
            Standing::Warned(left) => left.as_secs(),
            Standing::Counts | Standing::Over => 0,
        },
        relays,
        nat: nat_text(driver.core.nat()).to_owned(),
        reflexive_addresses: driver
            .core
            .reflexive()
            .iter()
            .map(ToString::to_string)
            .collect(),
        peers,
        nodes: count(snapshot.nodes.len()),
        services: count(snapshot.services.len()),
        dns_listen: facts.dns.listen().iter().map(ToString::to_string).collect(),
        drops: drops(driver, facts),
        interface: facts.interface.clone(),
        local_addresses: driver
            .local_addresses()
            .iter()
            .map(ToString::to_string)
            .collect(),
        certificate_expires_unix_s: unix_s(validity.not_after),
        service_interfaces: served
            .iter()
            .map(|(name, one)| (name.clone(), one.attached))
            .collect(),
        services_unkept: facts.services_unkept.clone().unwrap_or_default(),
        proxy: facts.proxy.as_ref().map(Proxy::counts).unwrap_or_default(),
        uplinks: driver.uplinks().map(uplink_status).collect(),
        transitions: counted(driver.core.transitions()),
        port_mappings: facts
            .port_mappings
            .borrow()
            .iter()
            .map(mapping_text)
            .collect(),
        lan_announcements: {
            let mut counts = facts.lan_announcements.borrow().clone();
            counts.extend(facts.exchanges.borrow().clone());
            counts
        },
        // Added by who may wait for it.
        service_packets: BTreeMap::new(),
        policy_enforced: false,
        policy_packets: BTreeMap::new(),
        policy_events: Vec::new(),
    }
}

/// What the driver knows that is measured, for Prometheus, who `asked` then by its queue, in which so many `events` were.
#[must_use]
pub fn measured(driver: &Driver, asked: Instant, events: usize) -> Measured {
    let peers = driver.core.peers();
    let paths = peers.flat_map(|peer| peer.paths).map(|path| Path {
        transport: match path.via {
            Via::Direct(_) => "udp",
            Via::Relay(id) => match driver.links().status(id) {
                Some(("udp", _)) => "relay_udp",
                Some(("quic", _)) => "relay_quic",
                Some(_) => "relay_tls",
                None => "relay_down",
            },
        },
        state: path_state_text(path.state),
        rtt: path.srtt,
        loss: path.loss,
    });
    let tunnel = driver.tunnel.stats();
    let relay = driver.links().waiting();
    let queue = |entries, age: Option<Duration>| Queue {
        entries,
        age: age.unwrap_or_default(),
    };
    Measured {
        paths: paths.collect(),
        traffic: tunnel.traffic,
        handshakes: tunnel.handshakes,
        handshakes_refused: tunnel.handshakes_refused,
        queues: [
            // The question was the last in it.
            ("events", queue(events, Some(asked.elapsed()))),
            ("held", queue(tunnel.held.packets, tunnel.held.oldest)),
            ("relay", queue(relay.frames, relay.oldest)),
        ],
    }
}

/// A gateway, and what it said.
fn mapping_text(report: &portmap::machine::Report) -> (String, String) {
    let problem = &report.problem;
    let said = match report.mapped {
        Some((outside, protocol)) if problem.is_empty() => format!("{outside} by {protocol}"),
        Some((outside, protocol)) => format!("{outside} by {protocol} ({problem})"),
        None if problem.is_empty() => "asked".to_owned(),
        None => format!("not mapped: {problem}"),
    };
    (report.gateway.to_string(), said)
}

fn standing_problem(standing: Standing) -> Option<String> {
    match standing {
        Standing::Counts => None,
        Standing::Warned(left) => Some(format!(
            "no controller spoke for long: after {} h more the node serves only what is its own, and speaks with nobody (`offlineLimitDays` of the MeshConfig)",
            left.as_secs() / 3600
        )),
        Standing::Over => Some(
            "no controller spoke for longer than `offlineLimitDays` of the MeshConfig: the node serves what is its own, and speaks with nobody, until one does".to_owned(),
        ),
    }
}

/// Less is not told: nothing of the mesh's minds it.
const CLOCK_BEHIND_MIN: Duration = Duration::from_secs(600);

/// What is certainly wrong with the machine's clock. One that is ahead cannot be told from a certificate that is over.
fn clock_problem(facts: &Facts, now: SystemTime) -> Option<String> {
    let signed = facts.credentials.load().validity().not_before;
    let made = Duration::from_millis(facts.version.borrow().made_unix_ms);
    let at_least = signed.max(UNIX_EPOCH.checked_add(made)?);
    let behind = at_least.duration_since(now).ok()?;
    (behind >= CLOCK_BEHIND_MIN).then(|| {
        let hours = behind.as_secs() / 3600;
        format!(
            "the clock is {} days and {} h behind what the mesh's authority signed last: set it",
            hours / 24,
            hours % 24
        )
    })
}

/// How old the desired state may be: nothing while the controller is there to correct it. `validity`: of the certificate in force.
pub(crate) fn snapshot_age(connection: &Connection, validity: Validity) -> Option<Duration> {
    if connection.connected {
        return Some(Duration::ZERO);
    }
    let counted = connection.silent.map_or(Duration::ZERO, |(counted, at)| {
        counted.saturating_add(at.elapsed())
    });
    let last = connection.last_contact?;
    Some(silence(last, SystemTime::now(), validity, counted))
}

/// How long ago the controller was there, which was when this node's clock said `last`: what the clock says, and never less than
/// was certainly `counted`. A controller made the certificate, so that it was there since that began; and a clock by which it is
/// over is more likely wrong than right, as it is renewed long before.
fn silence(last: SystemTime, now: SystemTime, validity: Validity, counted: Duration) -> Duration {
    let since = now.duration_since(last.max(validity.not_before)).ok();
    let by_clock = since.filter(|_| now <= validity.not_after);
    by_clock.unwrap_or_default().max(counted)
}

/// Down: nobody can be reached though there is somebody. Degraded: something does not work that
/// should.
fn health(driver: &Driver, relays: &[RelayStatus], problems: &[String]) -> Health {
    let mut peers = driver.core.peers().peekable();
    let cut_off = peers.peek().is_some() && peers.all(|peer| peer.state == PeerState::Unreachable);
    let no_relay = relays.iter().all(|relay| relay.transport.is_empty());
    if cut_off && no_relay {
        Health::Down
    } else if problems.is_empty() {
        Health::Ok
    } else {
        Health::Degraded
    }
}

/// A sentence for each, up to [`UNREACHABLE_TOLD_MAX`].
fn out_of_reach(mut peers: impl Iterator<Item = (NodeName, Reason)>) -> Vec<String> {
    let told = peers.by_ref().take(UNREACHABLE_TOLD_MAX);
    let told =
        told.map(|(name, reason)| format!("node {name} is unreachable: {}", explain(reason)));
    let mut told: Vec<_> = told.collect();
    let others = peers.count();
    if others > 0 {
        told.push(format!(
            "{others} more nodes are unreachable (`meshctl peers` has all)"
        ));
    }
    told
}

fn problems(driver: &Driver, connection: &Connection, relays: &[RelayStatus]) -> Vec<String> {
    let mut problems = Vec::new();
    if let Some(controller) = connection
        .controller
        .as_ref()
        .filter(|_| !connection.connected && connection.next_visit.is_none())
    {
        let why = &connection.problem;
        problems.push(format!(
            "no connection to the controller {controller}: {why}"
        ));
    }
    if driver.own().is_none() {
        problems.push("the mesh's state does not have this node any more".to_owned());
    }
    if driver.core.lacks_relays() {
        problems.push("no relay is up".to_owned());
    }
    for relay in relays.iter().filter(|relay| !relay.problem.is_empty()) {
        problems.push(format!("relay {}: {}", relay.name, relay.problem));
    }
    let peers = driver.core.peers();
    let unreachable = peers.filter(|peer| peer.state == PeerState::Unreachable);
    problems.extend(out_of_reach(
        unreachable.map(|peer| (peer.name, peer.reason)),
    ));
    problems
}

/// Where another program has the place of the resolver; link-local addresses are on the mesh's `interface`.
pub(crate) fn held_problems(dns: &Inspector, interface: &str) -> Vec<String> {
    let held = dns.held().into_iter();
    held.map(|((address, transport), error)| {
        let on = match address.ip() {
            IpAddr::V4(v4) if v4.is_link_local() => interface,
            IpAddr::V4(_) | IpAddr::V6(_) => "that address's interface",
        };
        let (port, every) = (address.port(), HELD_RETRY.as_secs());
        format!(
            "names are not answered by {transport} at {address}: {error}; tried again every {every} s. \
             `ss -lntup 'sport = :{port}'` tells who listens there; dnsmasq leaves the address alone with `bind-dynamic` and \
             `except-interface={on}` in its configuration"
        )
    })
    .collect()
}

fn uplink_status((uplink, used): (&NamedUplink, bool)) -> UplinkStatus {
    UplinkStatus {
        interface: uplink.name.clone(),
        used,
        up: uplink.told.up,
        metered: uplink.told.metered,
        weight: uplink.told.weight.into(),
    }
}

fn counted(counts: &report::TransitionCounts) -> BTreeMap<String, u64> {
    let peers = counts.peers.iter().map(|((from, to), count)| {
        let text = format!("peer {} {}", state_text(*from), state_text(*to));
        (text, *count)
    });
    let paths = counts.paths.iter().map(|((from, to), count)| {
        let text = format!("path {} {}", path_state_text(*from), path_state_text(*to));
        (text, *count)
    });
    peers.chain(paths).collect()
}

fn relay_status(driver: &Driver, relay: report::RelayReport) -> RelayStatus {
    let link = driver.links().status(relay.id);
    RelayStatus {
        name: relay.name.to_string(),
        transport: relay
            .up
            .and(link)
            .map(|(transport, _)| transport)
            .unwrap_or_default()
            .to_owned(),
        home: relay.home,
        // By the link, or else as STUN measured it.
        rtt_ms: link.and_then(|(_, rtt)| rtt).or(relay.rtt).map_or(0.0, ms),
        problem: relay.problem.unwrap_or_default(),
    }
}

/// Every peer that was woken, and every external peer, by name.
#[must_use]
pub fn peers(driver: &Driver) -> Vec<Peer> {
    let mut peers: Vec<_> = driver
        .core
        .peers()
        .map(|peer| mesh_peer(driver, &peer))
        .collect();
    peers.extend(driver.externals().map(|peer| external_peer(driver, peer)));
    peers.sort_by(|a, b| a.name.cmp(&b.name));
    peers
}

fn mesh_peer(driver: &Driver, peer: &report::PeerReport) -> Peer {
    let node = driver.node_by_id(&peer.id);
    let addresses = node.map(|node| vec![node.overlay_v4.to_string(), node.overlay_v6.to_string()]);
    let site = node
        .and_then(|node| node.locality.site.as_ref())
        .map(ToString::to_string);
    Peer {
        name: peer.name.to_string(),
        site: site.unwrap_or_default(),
        overlay_addresses: addresses.unwrap_or_default(),
        state: state_text(peer.state).to_owned(),
        reason: reason_text(peer.reason).to_owned(),
        path: peer.via.map(|via| path(driver, via)).unwrap_or_default(),
        rtt_ms: peer.srtt.map_or(0.0, ms),
        external: false,
        ..with_stats(driver, peer.id)
    }
}

fn external_peer(driver: &Driver, peer: &mesh_core::snapshot::ExternalPeer) -> Peer {
    let stats = driver.tunnel.peer_stats(&peer.id);
    let has_session = stats.as_ref().is_some_and(|stats| stats.has_session);
    let via = stats.and_then(|stats| stats.primary);
    Peer {
        name: peer.name.to_string(),
        overlay_addresses: peer.prefixes.iter().map(ToString::to_string).collect(),
        state: if has_session { "direct" } else { "idle" }.to_owned(),
        path: via.map(|via| path(driver, via)).unwrap_or_default(),
        external: true,
        ..with_stats(driver, peer.id)
    }
}

fn with_stats(driver: &Driver, id: NodeId) -> Peer {
    let stats = driver.tunnel.peer_stats(&id);
    let traffic = stats
        .as_ref()
        .map(|stats| stats.traffic)
        .unwrap_or_default();
    Peer {
        public_key: id.to_string(),
        sent_bytes: traffic.sent_bytes,
        received_bytes: traffic.received_bytes,
        last_received_ms: stats
            .as_ref()
            .and_then(|stats| stats.last_received)
            .map(millis),
        last_handshake_ms: stats
            .as_ref()
            .and_then(|stats| stats.last_handshake)
            .map(millis),
        ..Peer::default()
    }
}

/// All that the core knows about the ways to one node.
#[must_use]
pub fn path_why(driver: &Driver, id: &NodeId) -> PathWhyResponse {
    let name = driver
        .node_by_id(id)
        .map(|node| node.name.to_string())
        .unwrap_or_default();
    let own_nat = nat_text(driver.core.nat()).to_owned();
    let Some(peer) = driver.core.peer_report(id) else {
        return PathWhyResponse {
            node: name,
            state: state_text(PeerState::Idle).to_owned(),
            reason: reason_text(Reason::LazyIdle).to_owned(),
            explanation:
                "Nothing was sent to it since this agent started: the first packet wakes it."
                    .to_owned(),
            own_nat,
            ..PathWhyResponse::default()
        };
    };
    let now = Instant::now();
    PathWhyResponse {
        node: name,
        state: state_text(peer.state).to_owned(),
        reason: reason_text(peer.reason).to_owned(),
        explanation: explain(peer.reason).to_owned(),
        own_nat,
        peer_nat: nat_text(peer.nat).to_owned(),
        paths: peer
            .paths
            .iter()
            .map(|one| path_report(driver, one))
            .collect(),
        transitions: transitions(driver, &peer, now),
        next_attempt_ms: peer
            .next_attempt
            .map(|at| millis(at.saturating_duration_since(now))),
    }
}

fn path_report(driver: &Driver, one: &report::PathReport) -> PathReport {
    let kind = match (one.kind, one.source) {
        (path::PathKind::PeerRelay, _) => "peer_relay",
        (path::PathKind::Relay, _) => "relay",
        (_, Some(source)) => source_text(source),
        (path::PathKind::Lan | path::PathKind::Direct, None) => "cached",
    };
    PathReport {
        path: path(driver, one.via),
        kind: kind.to_owned(),
        state: path_state_text(one.state).to_owned(),
        rtt_ms: one.srtt.map_or(0.0, ms),
        loss: one.loss.unwrap_or_default(),
        probes_sent: u32::try_from(one.probes_sent).unwrap_or(u32::MAX),
        probes_answered: u32::try_from(one.probes_answered).unwrap_or(u32::MAX),
        full_size_ok: one.full_size_ok,
    }
}

/// The peer's and its paths', the oldest first.
fn transitions(driver: &Driver, peer: &report::PeerReport, now: Instant) -> Vec<TransitionReport> {
    let ago_ms = |at| millis(now.saturating_duration_since(at));
    let of_peer = peer.transitions.iter().map(|one| TransitionReport {
        ago_ms: ago_ms(one.at),
        from: state_text(one.from).to_owned(),
        to: state_text(one.to).to_owned(),
        reason: reason_text(one.reason).to_owned(),
        path: String::new(),
    });
    let of_paths = peer.path_transitions.iter().map(|one| TransitionReport {
        ago_ms: ago_ms(one.at),
        from: path_state_text(one.from).to_owned(),
        to: path_state_text(one.to).to_owned(),
        reason: path_event_text(one.event).to_owned(),
        path: path(driver, one.via),
    });
    let mut all: Vec<_> = of_peer.chain(of_paths).collect();
    all.sort_by_key(|one| Reverse(one.ago_ms));
    all
}

/// What changed last, in no order: of peers and paths what the core keeps, of everything else what the journal has. The times
/// of each are with it, those in the reports are not set.
#[must_use]
pub fn events(driver: &Driver) -> Vec<(Instant, EventReport)> {
    let mut events = Vec::new();
    for peer in driver.core.peers() {
        let name = peer.name.to_string();
        let of_peer = peer.transitions.iter().map(|one| {
            let event = event("peer", &name, state_text(one.from), state_text(one.to));
            let reason = reason_text(one.reason).to_owned();
            (one.at, EventReport { reason, ..event })
        });
        let of_paths = peer.path_transitions.iter().map(|one| {
            let [from, to] = [one.from, one.to].map(path_state_text);
            let event = EventReport {
                path: path(driver, one.via),
                reason: path_event_text(one.event).to_owned(),
                ..event("path", &name, from, to)
            };
            (one.at, event)
        });
        events.extend(of_peer.chain(of_paths));
    }
    events.extend(driver.journal.notes().map(|note| {
        let reason = note.reason.clone();
        let event = event(note.of, &note.name, &note.from, &note.to);
        (note.at, EventReport { reason, ..event })
    }));
    events
}

fn event(of: &str, name: &str, from: &str, to: &str) -> EventReport {
    let [of, name, from, to] = [of, name, from, to].map(str::to_owned);
    EventReport {
        of,
        name,
        from,
        to,
        ..EventReport::default()
    }
}

/// Every peer that was woken, for who follows a flow there.
#[must_use]
pub fn peers_seen(driver: &Driver) -> BTreeMap<NodeName, PeerSeen> {
    let seen = driver.core.peers().map(|peer| {
        let used = peer.paths.iter().find(|one| Some(one.via) == peer.via);
        // Also of those that were given up since: they are what was tried.
        let small = peer.paths.iter().filter(|one| {
            let answered = one.probes_answered > 0 && matches!(one.via, Via::Direct(_));
            answered && !one.full_size_ok
        });
        let stats = driver.tunnel.peer_stats(&peer.id);
        let seen = PeerSeen {
            state: state_text(peer.state).to_owned(),
            reason: reason_text(peer.reason).to_owned(),
            explanation: explain(peer.reason).to_owned(),
            path: peer.via.map(|via| path(driver, via)).unwrap_or_default(),
            rtt_ms: peer.srtt.map_or(0.0, ms),
            full_size: used.is_some_and(|one| one.full_size_ok),
            small_only: if peer.reason == Reason::MtuFail {
                small.map(|one| path(driver, one.via)).collect()
            } else {
                Vec::new()
            },
            heard_ms: stats.and_then(|stats| stats.last_received).map(millis),
        };
        (peer.name.clone(), seen)
    });
    seen.collect()
}

/// As JSON and events have it.
#[must_use]
pub fn health_text(health: Health) -> &'static str {
    match health {
        Health::Ok => "ok",
        Health::Degraded | Health::Unspecified => "degraded",
        Health::Down => "down",
    }
}

/// [`services`], beside the thread that this is called on, which is the driver's: of 100,000 endpoints it takes a tenth of a second and
/// more, and probes are answered meanwhile.
///
/// # Errors
///
/// If it panicked.
pub async fn services_beside(view: Arc<View>) -> Result<Vec<ServiceReport>, JoinError> {
    spawn_blocking(move || services(&view)).await
}

/// Every service with every endpoint, as new flows of this node see them.
#[must_use]
pub fn services(view: &View) -> Vec<ServiceReport> {
    view.snapshot
        .services
        .values()
        .map(|service| service_report(view, service))
        .collect()
}

fn service_report(view: &View, service: &Service) -> ServiceReport {
    let (kind, cluster_ips) = match &service.kind {
        ServiceKind::ClusterIp(addresses) => (
            "ClusterIP",
            addresses.iter().map(ToString::to_string).collect(),
        ),
        ServiceKind::Headless => ("Headless", Vec::new()),
        ServiceKind::ExternalName(_) => ("ExternalName", Vec::new()),
    };
    let port = |port: &mesh_core::snapshot::ServicePort| {
        let protocol = match port.protocol {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
        };
        format!("{}/{protocol}", port.port)
    };
    let endpoint = |one: &services::Ranked<'_>| EndpointReport {
        address: one.address.to_string(),
        node: one
            .endpoint
            .node
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        tier: one.tier.as_str().to_owned(),
        ready: one.usable,
        alive: one.alive,
        chosen: one.chosen,
        ejected: one.is_ejected(),
        full: one.is_full(),
    };
    ServiceReport {
        namespace: service.name.namespace.clone(),
        name: service.name.name.clone(),
        kind: kind.to_owned(),
        cluster_ips,
        ports: service.ports.iter().map(port).collect(),
        endpoints: services::rank(view, service).iter().map(endpoint).collect(),
    }
}

/// A way in words: the address, or the relay and what the link to it runs over.
#[must_use]
pub fn path(driver: &Driver, via: Via) -> String {
    match via {
        Via::Direct(address) => address.to_string(),
        Via::Relay(id) => {
            let relay = driver.snapshot().relays.get(&id);
            let name = relay.map_or("?", |relay| relay.name.as_str());
            let transport = driver.links().status(id).map(|(transport, _)| transport);
            format!("relay {name} ({})", transport.unwrap_or("down"))
        }
    }
}

/// Every known path to a peer, for who asked for another.
#[must_use]
pub fn paths(driver: &Driver, peer: &NodeId) -> Vec<String> {
    let report = driver.core.peer_report(peer);
    let paths = report.iter().flat_map(|report| &report.paths);
    paths.map(|one| path(driver, one.via)).collect()
}

/// What kind a path is of, as echoes tell it.
#[must_use]
pub fn kind_text(kind: path::PathKind) -> &'static str {
    match kind {
        path::PathKind::Lan => "lan",
        path::PathKind::Direct => "direct",
        path::PathKind::PeerRelay => "peer_relay",
        path::PathKind::Relay => "relay",
    }
}

fn drops(driver: &Driver, facts: &Facts) -> BTreeMap<String, u64> {
    let packets = driver.tunnel.stats().drops.into_iter();
    let packets = packets.map(|(reason, count)| (reason.as_str(), count));
    let events = ("events_full", facts.events_dropped.load(Ordering::Relaxed));
    let all = packets.chain([events]).filter(|(_, count)| *count > 0);
    all.map(|(reason, count)| (reason.to_owned(), count))
        .collect()
}

fn state_text(state: PeerState) -> &'static str {
    match state {
        PeerState::Idle => "idle",
        PeerState::Waking => "waking",
        PeerState::Relayed => "relayed",
        PeerState::Direct => "direct",
        PeerState::Suspect => "suspect",
        PeerState::Unreachable => "unreachable",
    }
}

fn path_state_text(state: path::PathState) -> &'static str {
    match state {
        path::PathState::Candidate => "candidate",
        path::PathState::Probing => "probing",
        path::PathState::Standby => "standby",
        path::PathState::Primary => "primary",
        path::PathState::Suspect => "suspect",
        path::PathState::Dead => "dead",
    }
}

fn path_event_text(event: PathEvent) -> &'static str {
    match event {
        PathEvent::ProbingBegan => "probing_began",
        PathEvent::Proven => "proven",
        PathEvent::Taken => "taken",
        PathEvent::Left => "left",
        PathEvent::Doubted => "doubted",
        PathEvent::Cleared => "cleared",
        PathEvent::Unanswered => "unanswered",
        PathEvent::Gone => "gone",
    }
}

fn source_text(source: CandidateKind) -> &'static str {
    match source {
        CandidateKind::Host => "host",
        CandidateKind::Reflexive => "reflexive",
        CandidateKind::PortMapped => "port_mapped",
        CandidateKind::PeerReflexive => "peer_reflexive",
        CandidateKind::Static => "static",
    }
}

/// What the controller is told of this node.
#[must_use]
pub fn for_controller(driver: &Driver) -> NodeReport {
    let nat = match driver.core.nat() {
        NatKind::Unknown => Nat::Unknown,
        NatKind::None => Nat::None,
        NatKind::Easy => Nat::Easy,
        NatKind::Hard => Nat::Hard,
        NatKind::UdpBlocked => Nat::UdpBlocked,
    };
    let mut report = NodeReport {
        nat: nat.into(),
        ..NodeReport::default()
    };
    for peer in driver.core.peers() {
        match peer.state {
            PeerState::Direct => report.direct_peers += 1,
            PeerState::Relayed => report.relayed_peers += 1,
            PeerState::Unreachable => report.unreachable_peers += 1,
            // On the way to one of these, or back.
            PeerState::Idle | PeerState::Waking | PeerState::Suspect => {}
        }
    }
    report
}

fn nat_text(nat: NatKind) -> &'static str {
    match nat {
        NatKind::Unknown => "unknown",
        NatKind::None => "none",
        NatKind::Easy => "easy",
        NatKind::Hard => "hard",
        NatKind::UdpBlocked => "udp_blocked",
    }
}

/// The machine-readable reason and its explanation, side by side so that neither is forgotten.
fn words(reason: Reason) -> (&'static str, &'static str) {
    match reason {
        Reason::Wanted => ("wanted", "Packets were waiting for it."),
        Reason::PeerCalled => ("peer_called", "It began the connection."),
        Reason::HandshakeDone => ("handshake_done", "The handshake completed."),
        Reason::ProbeAnswered => ("probe_answered", "An echo came back by this path."),
        Reason::LanFound => ("lan_found", "A path within the site was found."),
        Reason::Silent => ("silent", "Nothing authenticated came back in time."),
        Reason::LinkDown => ("link_down", "The link under the path went away."),
        Reason::Goodbye => ("goodbye", "The other agent said that it stops."),
        Reason::LazyIdle => (
            "lazy_idle",
            "There was no traffic for a while; the next packet wakes it.",
        ),
        Reason::UdpBlocked => (
            "udp_blocked",
            "UDP does not get out on one side: traffic goes through a relay, over TCP where it must.",
        ),
        Reason::HardNatBoth => (
            "hard_nat_both",
            "Both NATs give each destination another port (symmetric): no address can be guessed.",
        ),
        Reason::HardNatOne => (
            "hard_nat_one",
            "One NAT gives each destination another port (symmetric) and the other lets in only known ports: a relay stays in between.",
        ),
        Reason::PolicyRelayOnly => (
            "policy_relay_only",
            "No Community has the sites of both nodes: the mesh lets them speak through relays only.",
        ),
        Reason::NoCandidates => (
            "no_candidates",
            "The other node told no address, and none is known.",
        ),
        Reason::DirectLossy => (
            "direct_lossy",
            "The direct path works, but loses so much that the relay is better.",
        ),
        Reason::MtuFail => ("mtu_fail", "Only small packets pass by the direct path."),
        Reason::HandshakeTimeout => (
            "handshake_timeout",
            "The handshake got no answer by any path.",
        ),
        Reason::ClockSkew => (
            "clock_skew",
            "A clock is wrong: the handshake is refused as older than one before. Set this node's clock, or the other's.",
        ),
        Reason::MapStale => (
            "map_stale",
            "It is connected to a relay and never answered a handshake: it does not know this node's key. Its snapshot, or this node's, is old.",
        ),
        Reason::RelayUnreachable => (
            "relay_unreachable",
            "No relay is up, and no direct path works.",
        ),
        Reason::PeerOffline => (
            "peer_offline",
            "It is connected to no relay: the node is off, or cut off.",
        ),
        Reason::Probing => ("probing", "Direct paths are still being tried."),
    }
}

fn reason_text(reason: Reason) -> &'static str {
    words(reason).0
}

fn explain(reason: Reason) -> &'static str {
    words(reason).1
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn unix_s(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
