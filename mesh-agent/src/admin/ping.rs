//! Echoes of operators, by the path in use or by a certain one.

use std::time::Duration;

use mesh_api::admin::{PingRequest, PingResponse};
use mesh_core::{node::report::PathWish, snapshot::Snapshot};
use mesh_wire::id::{NodeId, RelayName, Via, canonical};
use tokio::{sync::OwnedSemaphorePermit, time};
use tonic::Status;

use crate::{
    driver::{DriverHandle, NoPing},
    report,
};

/// Most echoes one `ping` sends: at one a second more than 16 minutes.
const COUNT_MAX: u32 = 1000;

/// What a ping without numbers means.
const INTERVAL: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_secs(2);

/// Echoes follow each other no faster: 100 a second, of 130 bytes each.
const INTERVAL_MIN: Duration = Duration::from_millis(10);

/// How often a ping looks whether a peer that was being woken has a path now.
const WAKE_POLL: Duration = Duration::from_millis(20);

/// Pings by a certain path at once; who wants another is told to wait. Each is measured without the other's packets.
pub(super) const VIA_MAX: usize = 1;

/// The path that is asked for.
pub(super) fn wish(snapshot: &Snapshot, text: &str) -> Result<PathWish, Status> {
    match text {
        "" => return Ok(PathWish::InUse),
        "direct" => return Ok(PathWish::Direct),
        "relay" => return Ok(PathWish::Relayed),
        _ => {}
    }
    if let Some(name) = text.strip_prefix("relay:") {
        let relays = &snapshot.relays;
        let name = name.parse::<RelayName>().ok();
        let found = relays
            .iter()
            .find(|(_, relay)| Some(&relay.name) == name.as_ref());
        return match found {
            Some((&id, _)) => Ok(PathWish::Only(Via::Relay(id))),
            None => {
                let names: Vec<_> = relays.values().map(|relay| relay.name.as_str()).collect();
                Err(Status::not_found(format!(
                    "{text:?}: the mesh has no such relay, but {}",
                    listed(&names)
                )))
            }
        };
    }
    let address = text.parse().map_err(|_| {
        Status::invalid_argument(format!(
            "{text:?} is no path: direct, relay, relay:NAME, or an address and port as `meshctl path why` shows it"
        ))
    })?;
    Ok(PathWish::Only(Via::Direct(canonical(address))))
}

fn listed(names: &[impl AsRef<str>]) -> String {
    let names: Vec<_> = names.iter().map(AsRef::as_ref).collect();
    match names.is_empty() {
        true => "none".to_owned(),
        false => names.join(", "),
    }
}

/// The echoes of one `ping` that are still to be sent.
pub(super) struct PingPlan {
    driver: DriverHandle,
    peer: NodeId,
    wish: PathWish,
    /// As it was asked for.
    via: String,
    seek: bool,
    next: u32,
    count: u32,
    interval: Duration,
    timeout: Duration,
    due: time::Instant,
    _turn: Option<OwnedSemaphorePermit>,
}

/// How far an echo has come.
#[derive(Default)]
struct Progress {
    path: String,
    kind: String,
    /// There are paths, and not this one.
    no_path: bool,
}

impl PingPlan {
    pub(super) fn new(
        driver: DriverHandle,
        (peer, wish): (NodeId, PathWish),
        request: PingRequest,
        turn: Option<OwnedSemaphorePermit>,
    ) -> Self {
        let or = |ms: u32, default| {
            if ms == 0 {
                default
            } else {
                Duration::from_millis(ms.into())
            }
        };
        Self {
            driver,
            peer,
            wish,
            via: request.via,
            seek: request.seek,
            next: 0,
            count: request.count.clamp(1, COUNT_MAX),
            interval: or(request.interval_ms, INTERVAL).max(INTERVAL_MIN),
            timeout: or(request.timeout_ms, TIMEOUT),
            due: time::Instant::now(),
            _turn: turn,
        }
    }

    pub(super) async fn next(&mut self) -> Option<Result<PingResponse, Status>> {
        if self.next == self.count {
            return None;
        }
        time::sleep_until(self.due).await;
        self.due += self.interval;
        let sequence = self.next;
        self.next += 1;
        let mut progress = Progress::default();
        let echo = time::timeout(self.timeout, self.echo(&mut progress)).await;
        let rtt_ms = match echo {
            Ok(Some(rtt)) => Some(report::ms(rtt)),
            Ok(None) => return None, // The agent is stopping.
            // A path may have to be found first.
            Err(_) if progress.no_path => {
                self.next = self.count;
                return Some(Err(self.no_path().await));
            }
            Err(_) => None,
        };
        Some(Ok(PingResponse {
            sequence,
            rtt_ms,
            path: progress.path,
            kind: progress.kind,
        }))
    }

    /// One echo, sent again by another path if the first was lost with the peer's path.
    async fn echo(&mut self, progress: &mut Progress) -> Option<Duration> {
        let (peer, wish, seek) = (self.peer, self.wish, self.seek);
        loop {
            let sent = time::Instant::now();
            let ping = self.driver.ask(move |driver| {
                let ping = driver.ping(peer, wish);
                if seek && ping.is_ok() {
                    driver.seek(peer);
                }
                ping.map(|ping| (report::path(driver, ping.via), ping))
            });
            let (path, ping) = match ping.await? {
                Ok(sent) => sent,
                Err(why) => {
                    progress.no_path = why == NoPing::NoPath;
                    time::sleep(WAKE_POLL).await;
                    continue;
                }
            };
            if wish != PathWish::InUse {
                self.wish = PathWish::Only(ping.via); // The same to the end.
            }
            *progress = Progress {
                path,
                kind: report::kind_text(ping.kind).to_owned(),
                no_path: false,
            };
            return match ping.answer.await {
                Ok(()) => Some(sent.elapsed()),
                Err(_) => None,
            };
        }
    }

    async fn no_path(&self) -> Status {
        let peer = self.peer;
        let paths = self.driver.ask(move |driver| report::paths(driver, &peer));
        let paths = listed(&paths.await.unwrap_or_default());
        Status::not_found(format!(
            "{:?}: there is no such path to it now, but {paths}",
            self.via
        ))
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::snapshot::{MeshSettings, Relay};
    use mesh_wire::id::{MeshId, RelayId};

    use super::*;

    #[test]
    fn a_path_is_named_by_its_kind_its_relay_or_its_address() {
        let settings = MeshSettings::with_defaults(MeshId([1; 32]), "demo");
        let mut snapshot = Snapshot::empty(settings);
        let relay = Relay {
            name: "r1".parse().unwrap(),
            addresses: Vec::new(),
            quic_port: 443,
            tls_port: 443,
            stun_ports: Vec::new(),
            node: None,
            sites: std::collections::BTreeSet::new(),
        };
        let id = RelayId::from(&relay.name);
        snapshot.relays.insert(id, relay);
        let address = Via::Direct("203.0.113.5:51820".parse().unwrap());
        for (text, want) in [
            ("", PathWish::InUse),
            ("direct", PathWish::Direct),
            ("relay", PathWish::Relayed),
            ("relay:r1", PathWish::Only(Via::Relay(id))),
            ("203.0.113.5:51820", PathWish::Only(address)),
            ("[::ffff:203.0.113.5]:51820", PathWish::Only(address)),
        ] {
            assert_eq!(wish(&snapshot, text).unwrap(), want, "{text}");
        }
        for (wrong, says) in [
            ("relay:r2", "but r1"),
            ("203.0.113.5", "is no path"),
            ("Direct", "is no path"),
        ] {
            let error = wish(&snapshot, wrong).unwrap_err();
            assert!(error.message().contains(says), "{wrong}: {error}");
        }
    }
}
