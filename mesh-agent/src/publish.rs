//! Publishes the view to the kernel's service maps. Filling them takes system calls, so it runs
//! beside the driver, and only the newest view counts.

use std::{
    collections::BTreeSet,
    iter,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use ebpf_loader::{ApplyError, ApplyReport, Clients, LeftOut, Masquerade, Services};
use mesh_core::{
    services::{self, View},
    snapshot::{Policy, Protocol},
};
use tokio::{
    sync::watch,
    task,
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;

use crate::sockets;

/// Pause between two looks for UDP flows whose endpoint is gone: a look reads up to 16,384 sockets
/// (`CONNECTED_MAX`), some 20 ms, and all sets of devices' flows (`TRACKED_SETS`), some 8 ms, and one call more for each that is UDP. Only a change asks for one.
const LOOK_PAUSE: Duration = Duration::from_secs(1);

/// Keeps the service maps as the view says, until `stop`; once they are, and that is `published`, the
/// programs are attached.
///
/// # Errors
///
/// If the kernel refuses an update that is not a matter of size.
pub async fn keep_services(
    services: Arc<Mutex<Services>>,
    mut views: watch::Receiver<Option<Arc<View>>>,
    published: watch::Sender<bool>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut followed = services::Table::default();
    let mut left_out = LeftOut::default();
    let mut prefixes_left_out = 0;
    let mut sockmap_left_out = 0;
    let mut next_look = Instant::now();
    loop {
        let view = views.borrow_and_update().clone();
        if let Some(view) = view {
            let services = Arc::clone(&services);
            let report = task::spawn_blocking(move || {
                let mut services = services.lock().unwrap_or_else(PoisonError::into_inner);
                let masquerade = masquerade(&view).map(|wanted| services.masquerade(&wanted));
                let prefixes = masquerade.transpose();
                let prefixes = prefixes.context("cannot tell the kernel this node's prefixes")?;
                let report = update(&mut followed, &view, &mut services)?;
                let sockmap = services.use_sockmap(&sockmap(&view))?;
                services.attach()?; // Those of an earlier agent were there until now.
                anyhow::Ok((followed, report, prefixes.unwrap_or_default(), sockmap))
            });
            let (back, report, prefixes, sockmap) = report.await??;
            followed = back;
            published.send_replace(true);
            if prefixes != prefixes_left_out {
                prefixes_left_out = prefixes;
                tracing::warn!(
                    prefixes,
                    "too many prefixes of this node: devices in some go as the node itself"
                );
            }
            if sockmap != sockmap_left_out {
                sockmap_left_out = sockmap;
                tracing::warn!(
                    endpoints = sockmap,
                    "too many endpoints of services with `sockmap` on this node: left to TCP"
                );
            }
            if report.left_out != left_out {
                left_out = report.left_out;
                tracing::warn!(
                    ?left_out,
                    "the service maps are full, or endpoints do not fit: left out"
                );
            }
        }
        let mut look = true;
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                changed = views.changed() => {
                    changed?;
                    break;
                }
                () = time::sleep_until(next_look), if look => {
                    look = false;
                    next_look = Instant::now() + LOOK_PAUSE;
                    let services = Arc::clone(&services);
                    let looked = task::spawn_blocking(move || {
                        let ended = sockets::end_stale(&followed, &services);
                        (followed, ended)
                    });
                    let ended;
                    (followed, ended) = looked.await?;
                    if let Err(error) = ended {
                        tracing::warn!("UDP flows may stay with endpoints that are gone: {error:#}");
                    }
                }
            }
        }
    }
}

/// Devices behind this node go by the tunnel as this node, but for those that the mesh leads to it.
fn masquerade(view: &View) -> Option<Masquerade> {
    let own = view.snapshot.nodes.get(&view.node)?;
    let kept = own.prefixes.iter();
    Some(Masquerade {
        v4: own.overlay_v4,
        v6: own.overlay_v6,
        kept: kept.map(|net| (net.network(), net.prefix_len())).collect(),
    })
}

/// Makes the maps hold what `view` says, at the cost of what is different from the view before
/// that `followed` and the maps have.
///
/// # Errors
///
/// If the kernel refuses it: of the maps nothing is certain then but that each list is whole.
pub fn update(
    followed: &mut services::Table,
    view: &Arc<View>,
    services: &mut Services,
) -> Result<ApplyReport, ApplyError> {
    // What was before is let go at the end.
    let services::Update {
        changed,
        before: _before,
        ..
    } = followed.update(view);
    let changed = changed.into_iter();
    let changed = changed.flat_map(|(frontend, now)| {
        let (all, outside) = now.map(convert_backends).unzip();
        let outside = outside.flatten();
        [(Clients::All, all), (Clients::Outside, outside)]
            .map(|(clients, now)| (convert(frontend, clients), now))
    });
    if let Some(report) = services.apply_changes(&changed.collect())? {
        return Ok(report);
    }
    let all = followed.iter();
    let all = all.flat_map(|(frontend, now)| {
        let (all, outside) = convert_backends(now.clone());
        let all = (convert(frontend, Clients::All), all);
        let outside = outside.map(|outside| (convert(frontend, Clients::Outside), outside));
        iter::once(all).chain(outside)
    });
    services.apply(&all.collect())
}

/// Which connections between sockets of this node go past TCP.
fn sockmap(view: &View) -> BTreeSet<(ebpf_loader::Frontend, SocketAddr)> {
    let pairs = services::sockmap(view).into_iter();
    pairs
        .map(|(frontend, endpoint)| (convert(frontend, Clients::All), endpoint))
        .collect()
}

fn convert(frontend: services::Frontend, clients: Clients) -> ebpf_loader::Frontend {
    let services::Frontend {
        address,
        port,
        protocol,
    } = frontend;
    ebpf_loader::Frontend {
        clients,
        address,
        port,
        protocol: match protocol {
            Protocol::Tcp => ebpf_loader::Protocol::Tcp,
            Protocol::Udp => ebpf_loader::Protocol::Udp,
        },
    }
}

/// For everybody, and what else holds for clients from outside.
fn convert_backends(
    backends: services::Backends,
) -> (ebpf_loader::Backends, Option<ebpf_loader::Backends>) {
    let all = ebpf_loader::Backends {
        endpoints: backends.endpoints,
        selection: match backends.policy {
            // Of the latter, the list has only those that are near enough.
            Policy::Random | Policy::LeastLatency => ebpf_loader::Selection::Random,
            Policy::ConsistentHash => ebpf_loader::Selection::ClientHash,
            Policy::RoundRobin => ebpf_loader::Selection::Turns,
        },
        affinity: backends.affinity,
        ranges: None,
    };
    let outside = backends.outside.map(|outside| {
        let ranges = outside.sources.iter();
        let ranges = ranges.map(|net| (net.network(), net.prefix_len()));
        ebpf_loader::Backends {
            endpoints: outside.endpoints,
            ranges: (!outside.sources.is_empty()).then(|| ranges.collect()),
            ..all.clone()
        }
    });
    (all, outside)
}
