//! What the admin socket tells of drops, events, the disk, flows, and what is judged by `meshctl doctor`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    sync::{Arc, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use mesh_api::admin::{
    DropsResponse, DuplicateReport, EventReport, EventsResponse, FactsResponse, PeerTrouble,
    SnapshotsResponse, TraceRequest, TraceResponse,
};
use mesh_core::{
    services::View,
    snapshot::{Protocol, Snapshot},
};
use mesh_dns::{client, counters::DropReason};
use mesh_wire::id::NodeName;
use rustix::fs::statvfs;
use tokio::{task, time};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{Admin, dns_status};
use crate::{
    drops, report, slots,
    trace::{self, Asked, Known, PeerSeen, Target},
};

/// How often health is compared with what it was: at most so late is a change noted.
const HEALTH_EVERY: Duration = Duration::from_secs(5);

impl Admin {
    /// Notes how it stands with the controller, and with the node's health, whenever that changes.
    ///
    /// # Errors
    ///
    /// None; it ends with `stop`.
    pub async fn keep_journal(self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut connection = self.connection.clone();
        let mut rounds = time::interval(HEALTH_EVERY);
        rounds.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        loop {
            let now = connection.borrow_and_update().clone();
            let facts = self.facts.clone();
            let noted = self.ask(move |driver| {
                let status = report::status(driver, &facts, &now);
                let at = Instant::now();
                if let Some(address) = &now.controller {
                    let (to, why) = match now.connected {
                        true => ("connected", ""),
                        false => ("not connected", now.problem.as_str()),
                    };
                    driver.journal.note(at, "controller", address, to, why);
                }
                let why = status.problems.join("; ");
                let health = report::health_text(status.health());
                driver.journal.note(at, "health", "", health, &why);
            });
            noted.await.ok(); // Fails only while the agent stops.
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                _ = rounds.tick() => {}
                Ok(()) = connection.changed() => {}
            }
        }
    }

    pub(super) async fn drops_report(&self) -> Result<DropsResponse, Status> {
        let status = self.whole_status().await?;
        let mut counted: BTreeMap<(&'static str, String), u64> = BTreeMap::new();
        let tunnel = status.drops.into_iter();
        counted.extend(tunnel.map(|(reason, count)| (("tunnel", reason), count)));
        let packets = status.service_packets.into_iter();
        counted.extend(packets.map(|(counter, count)| (drops::split(&counter), count)));
        let judged = status.policy_packets.into_iter();
        counted.extend(judged.map(|(counter, count)| (("policy", counter), count)));
        let sockets = self.socket_counters().await?.into_iter();
        counted.extend(sockets.map(|(counter, count)| (("sockets", counter), count)));
        let dns = self.facts.dns.counters();
        let unanswered = DropReason::ALL.into_iter();
        counted.extend(unanswered.map(|one| (("dns", one.as_str().to_owned()), dns.dropped(one))));
        counted.insert(("dns", "busy".to_owned()), dns.busy.get());
        Ok(DropsResponse {
            drops: drops::report(&counted),
            uptime_ms: status.uptime_ms,
        })
    }

    /// What became of processes' connects and datagrams. Beside the driver, as [`Admin::service_packets`].
    pub(super) async fn socket_counters(&self) -> Result<BTreeMap<String, u64>, Status> {
        let Some(services) = self.facts.services.clone() else {
            return Ok(BTreeMap::new());
        };
        let counters = task::spawn_blocking(move || {
            let services = services.lock().unwrap_or_else(PoisonError::into_inner);
            services.counters()
        });
        let counters = counters.await.map_err(internal)?.map_err(|error| {
            Status::internal(format!("the kernel does not tell the counters: {error}"))
        })?;
        let counters = counters.into_iter();
        Ok(counters
            .map(|(counter, count)| (counter.as_str().to_owned(), count))
            .collect())
    }

    pub(super) async fn events_report(&self) -> Result<EventsResponse, Status> {
        let (mut noted, forgotten) = self
            .ask(|driver| (report::events(driver), driver.journal.forgotten()))
            .await?;
        noted.sort_by_key(|(at, _)| *at);
        let (now, wall) = (Instant::now(), SystemTime::now());
        let events = noted.into_iter().map(|(at, event)| {
            let ago = now.saturating_duration_since(at);
            let at = wall.checked_sub(ago).unwrap_or(UNIX_EPOCH);
            let at = at.duration_since(UNIX_EPOCH).unwrap_or_default();
            EventReport {
                ago_ms: millis(ago),
                at_unix_ms: i64::try_from(at.as_millis()).unwrap_or(i64::MAX),
                ..event
            }
        });
        Ok(EventsResponse {
            events: events.collect(),
            forgotten,
        })
    }

    pub(super) async fn snapshots_report(
        &self,
        contents: bool,
    ) -> Result<SnapshotsResponse, Status> {
        let age_s = self.snapshot_age_s();
        let generation = self.ask(|driver| driver.snapshot().generation.0).await?;
        let folder = self.facts.state_dir.clone();
        let authority = self.facts.credentials.load().authority().clone();
        let slots = task::spawn_blocking(move || slots::report(&folder, &authority, contents));
        Ok(SnapshotsResponse {
            slots: slots.await.map_err(internal)?,
            generation,
            age_s,
        })
    }

    pub(super) async fn trace_report(
        &self,
        request: TraceRequest,
    ) -> Result<TraceResponse, Status> {
        let view = self.ask(|driver| driver.view()).await?;
        let view = view.ok_or_else(|| Status::unavailable("there is no state of the mesh yet"))?;
        let source = source(&view, &request.source)?;
        let asked = Asked {
            port: match u16::try_from(request.port) {
                Ok(port) if port > 0 => port,
                _ => return Err(Status::invalid_argument("a port is from 1 to 65535")),
            },
            protocol: match request.protocol.to_ascii_uppercase().as_str() {
                "" | "TCP" => Protocol::Tcp,
                "UDP" => Protocol::Udp,
                other => {
                    let text = format!("{other:?} is neither TCP nor UDP");
                    return Err(Status::invalid_argument(text));
                }
            },
        };
        let (target, mut hops) = match trace::target(&view.snapshot, &request.destination) {
            Target::Name(name) => self.by_name(&name).await?,
            found @ (Target::Address(_) | Target::Service(_)) => (found, Vec::new()),
        };
        let node = source.clone().unwrap_or_else(|| view.node.clone());
        for hop in &mut hops {
            hop.node = view.node.to_string();
        }
        if !matches!(target, Target::Name(_)) {
            let peers = self.ask(|driver| report::peers_seen(driver)).await?;
            let counts = self.hop_counts().await?;
            let enforces = self.facts.enforces;
            let work = move || {
                let known = Known {
                    view: &view,
                    peers: &peers,
                    enforces,
                    counts: &counts,
                };
                trace::trace(&known, source.as_ref(), &target, asked)
            };
            hops.extend(task::spawn_blocking(work).await.map_err(internal)?);
        }
        Ok(TraceResponse {
            source: node.to_string(),
            destination: request.destination,
            hops,
        })
    }

    /// Asks the node's own resolver, over the wire, as an application would.
    async fn by_name(
        &self,
        name: &str,
    ) -> Result<(Target, Vec<mesh_api::admin::HopReport>), Status> {
        let hop = |verdict: &str, text: String| mesh_api::admin::HopReport {
            way: "there".to_owned(),
            stage: "name".to_owned(),
            verdict: verdict.to_owned(),
            text,
            ..mesh_api::admin::HopReport::default()
        };
        let stays = Target::Name(name.to_owned());
        let Some(&server) = self.facts.dns.listen().first() else {
            let text = "this agent serves no names (`dns.listen` is empty): give an address";
            return Ok((stays, vec![hop("failed", text.to_owned())]));
        };
        let mut code = String::new();
        for record_type in ["A", "AAAA"] {
            let reply = match client::ask(server, name, record_type).await {
                Ok(reply) => reply,
                Err(error @ client::AskError::Exchange { .. }) => {
                    let text = format!("{name}: {:#}", anyhow::Error::new(error));
                    return Ok((stays, vec![hop("failed", text)]));
                }
                Err(error) => return Err(dns_status(error)),
            };
            let addresses = reply
                .answers
                .iter()
                .filter_map(|answer| answer.split_whitespace().last()?.parse::<IpAddr>().ok());
            if let Some(address) = addresses.into_iter().next() {
                let text = format!("{name} is {address}, says {server}");
                return Ok((Target::Address(address), vec![hop("ok", text)]));
            }
            code = reply.code;
        }
        let text = match code.as_str() {
            "NXDOMAIN" => format!("{name} does not exist, says {server}"),
            "NOERROR" => format!("{name} has no address, says {server}"),
            code if !name.trim_end_matches('.').contains('.') => format!(
                "no node is called {name}, and {server} says {code} of it: a service is NAMESPACE/NAME, a pod too, and other \
                 names have a dot"
            ),
            code => format!(
                "{name}: {server} says {code}: it has no `dns.upstreams`, or they do not answer, or lead back to it"
            ),
        };
        Ok((stays, vec![hop("failed", text)]))
    }

    async fn hop_counts(&self) -> Result<BTreeMap<&'static str, u64>, Status> {
        let status = self.whole_status().await?;
        let sockets = self.socket_counters().await?;
        let of = |counts: &BTreeMap<String, u64>, key: &'static str| {
            (key, counts.get(key).copied().unwrap_or_default())
        };
        Ok(BTreeMap::from([
            of(&status.drops, "no_route"),
            of(&status.drops, "held_too_long"),
            of(&status.drops, "send_failed"),
            of(&status.policy_packets, "denied"),
            of(&status.policy_packets, "audited"),
            of(&status.policy_packets, "passed"),
            of(&sockets, "connect_refused"),
            of(&sockets, "connect_failed"),
        ]))
    }

    pub(super) async fn facts_report(&self) -> Result<FactsResponse, Status> {
        let (snapshot, own, seen) = self
            .ask(|driver| {
                let snapshot = Arc::clone(driver.snapshot());
                (snapshot, driver.name().clone(), report::peers_seen(driver))
            })
            .await?;
        let folder = self.facts.state_dir.clone();
        let mesh = &snapshot.mesh;
        let mut facts = FactsResponse {
            state_dir: folder.display().to_string(),
            overlay_v4: mesh.overlay_v4.to_string(),
            mtu_bytes: mesh.mtu_bytes.into(),
            dns_upstreams: {
                let upstreams = self.facts.dns.upstreams().into_iter();
                let upstreams = upstreams.filter(|(domain, _)| domain.is_root());
                upstreams.map(|(_, one)| one.address.to_string()).collect()
            },
            troubles: troubles(&seen),
            ..FactsResponse::default()
        };
        let read = task::spawn_blocking(move || {
            let free = free_bytes(&folder);
            (free, duplicates(&snapshot, &own, &local_addresses()))
        });
        (facts.state_free_bytes, facts.duplicates) = read.await.map_err(internal)?;
        Ok(facts)
    }
}

fn source(view: &View, text: &str) -> Result<Option<NodeName>, Status> {
    if text.is_empty() || text == view.node.as_str() {
        return Ok(None);
    }
    let found = view
        .snapshot
        .nodes
        .keys()
        .find(|name| name.as_str() == text);
    let found = found.ok_or_else(|| {
        Status::not_found(format!(
            "no node {text:?} in the mesh: a source is a node's name"
        ))
    });
    found.cloned().map(Some)
}

fn troubles(seen: &BTreeMap<NodeName, PeerSeen>) -> Vec<PeerTrouble> {
    let is_trouble = |(_, peer): &(&NodeName, &PeerSeen)| {
        !peer.small_only.is_empty() || !matches!(peer.state.as_str(), "direct" | "idle")
    };
    let troubles = seen.iter().filter(is_trouble);
    let troubles = troubles.map(|(name, peer)| PeerTrouble {
        node: name.to_string(),
        state: peer.state.clone(),
        reason: peer.reason.clone(),
        explanation: peer.explanation.clone(),
        small_only: peer.small_only.clone(),
    });
    troubles.collect()
}

fn free_bytes(folder: &Path) -> Option<u64> {
    let stat = statvfs(folder).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Addresses of this machine that the mesh gave to other nodes: their packets stay here.
fn duplicates(
    snapshot: &Snapshot,
    own: &NodeName,
    local: &BTreeSet<IpAddr>,
) -> Vec<DuplicateReport> {
    let others = snapshot.nodes.values().filter(|node| node.name != *own);
    let found = others.flat_map(|node| {
        let overlay = [IpAddr::V4(node.overlay_v4), IpAddr::V6(node.overlay_v6)];
        let taken = overlay
            .into_iter()
            .filter(|address| local.contains(address));
        taken.map(|address| DuplicateReport {
            address: address.to_string(),
            node: node.name.to_string(),
        })
    });
    found.collect()
}

/// Every address of this machine, by the kernel's tables.
fn local_addresses() -> BTreeSet<IpAddr> {
    let v4 = fs::read_to_string("/proc/net/fib_trie").unwrap_or_default();
    let v6 = fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
    local_v4(&v4)
        .chain(v6.lines().filter_map(local_v6))
        .collect()
}

/// Leaves of the trie that are `/32 host LOCAL`; the address stands on the line before.
fn local_v4(trie: &str) -> impl Iterator<Item = IpAddr> + '_ {
    let lines = trie.lines().zip(trie.lines().skip(1));
    lines.filter_map(|(leaf, kind)| {
        let local = kind.trim() == "/32 host LOCAL";
        let address = leaf.split_whitespace().last().filter(|_| local)?;
        address.parse::<Ipv4Addr>().ok().map(IpAddr::V4)
    })
}

/// `fd00…01 05 40 00 80 holdfast0`.
fn local_v6(line: &str) -> Option<IpAddr> {
    let digits = line.split_whitespace().next()?;
    let number = u128::from_str_radix(digits, 16).ok()?;
    Some(IpAddr::V6(Ipv6Addr::from_bits(number)))
}

pub(super) fn internal(error: task::JoinError) -> Status {
    Status::internal(error.to_string())
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use mesh_core::snapshot::{MeshSettings, Node};
    use mesh_wire::id::{MeshId, NodeId};

    use super::*;

    #[test]
    fn addresses_of_the_machine_are_read_from_the_kernel_s_tables() {
        let trie = "Local:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     \
                    |-- 100.96.1.1\n        /32 host LOCAL\n     |-- 127.0.0.0\n        /8 host LOCAL\n     \
                    |-- 192.168.7.1\n        /32 host LOCAL\n";
        let found: Vec<_> = local_v4(trie).map(|address| address.to_string()).collect();
        assert_eq!(found, ["100.96.1.1", "192.168.7.1"]);
        let line = "fd00000000000000000000000000abcd 05 40 00 80 holdfast0";
        assert_eq!(local_v6(line), "fd00::abcd".parse().ok());
        assert_eq!(local_v6("zz"), None);
        assert!(local_addresses().contains(&IpAddr::V4(Ipv4Addr::LOCALHOST)));
    }

    #[test]
    fn an_address_of_another_node_on_this_machine_is_a_duplicate_and_the_own_is_none() {
        let mesh = MeshId([1; 32]);
        let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(mesh, "demo"));
        for (name, last) in [("edge-a1", 1), ("edge-b1", 2)] {
            let name: NodeName = name.parse().unwrap();
            let node = Node::new(
                &mesh,
                name.clone(),
                NodeId([last; 32]),
                [100, 96, 0, last].into(),
            );
            snapshot.nodes.insert(name, node);
        }
        let own = "edge-a1".parse().unwrap();
        let local = BTreeSet::from(["100.96.0.1".parse().unwrap()]);
        assert!(duplicates(&snapshot, &own, &local).is_empty());
        let local = BTreeSet::from(["100.96.0.2".parse().unwrap()]);
        let found = duplicates(&snapshot, &own, &local);
        assert_eq!((found.len(), found[0].node.as_str()), (1, "edge-b1"));
    }

    #[test]
    fn a_disk_says_how_much_is_free() {
        let folder = tempfile::tempdir().unwrap();
        assert!(free_bytes(folder.path()).is_some());
        assert_eq!(free_bytes(Path::new("/nowhere/at/all")), None);
    }

    #[test]
    fn direct_and_resting_peers_are_no_trouble_unless_only_small_packets_pass() {
        let seen = |state: &str, small: &[&str]| PeerSeen {
            state: state.to_owned(),
            small_only: small.iter().map(|&one| one.to_owned()).collect(),
            ..PeerSeen::default()
        };
        let peers = BTreeMap::from([
            ("a".parse().unwrap(), seen("direct", &[])),
            ("b".parse().unwrap(), seen("idle", &[])),
            ("c".parse().unwrap(), seen("relayed", &[])),
            ("d".parse().unwrap(), seen("direct", &["203.0.113.5:51820"])),
        ]);
        let found: Vec<_> = troubles(&peers).into_iter().map(|one| one.node).collect();
        assert_eq!(found, ["c", "d"]);
    }
}
