//! Publishes the view to the kernel's service maps. Filling them takes system calls, so it runs
//! beside the driver, and only the newest view counts.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use ebpf_loader::{LeftOut, Services};
use mesh_core::{
    services::{self, View},
    snapshot::{Policy, Protocol},
};
use tokio::{sync::watch, task};
use tokio_util::sync::CancellationToken;

/// Keeps the service maps as the view says, until `stop`; the programs leave with the last
/// reference to `services`.
///
/// # Errors
///
/// If the kernel refuses an update that is not a matter of size.
pub async fn keep_services(
    services: Arc<Mutex<Services>>,
    mut views: watch::Receiver<Option<Arc<View>>>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut left_out = LeftOut::default();
    loop {
        let view = views.borrow_and_update().clone();
        if let Some(view) = view {
            let services = Arc::clone(&services);
            let report = task::spawn_blocking(move || {
                let table = table(&view);
                services
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .apply(&table)
            });
            let report = report.await??;
            if report.left_out != left_out {
                left_out = report.left_out;
                tracing::warn!(
                    ?left_out,
                    "the service maps are full, or endpoints do not fit: left out"
                );
            }
        }
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            changed = views.changed() => changed?,
        }
    }
}

/// What the maps have to hold for a view.
#[must_use]
pub fn table(view: &View) -> BTreeMap<ebpf_loader::Frontend, ebpf_loader::Backends> {
    let convert = |(frontend, backends): (services::Frontend, services::Backends)| {
        let protocol = match frontend.protocol {
            Protocol::Tcp => ebpf_loader::Protocol::Tcp,
            Protocol::Udp => ebpf_loader::Protocol::Udp,
        };
        let services::Frontend { address, port, .. } = frontend;
        (
            ebpf_loader::Frontend {
                address,
                port,
                protocol,
            },
            ebpf_loader::Backends {
                endpoints: backends.endpoints,
                selection: match backends.policy {
                    Policy::Random => ebpf_loader::Selection::Random,
                    Policy::ConsistentHash => ebpf_loader::Selection::ClientHash,
                    Policy::RoundRobin => ebpf_loader::Selection::Turns,
                },
                affinity: backends.affinity,
            },
        )
    };
    services::table(view).into_iter().map(convert).collect()
}
