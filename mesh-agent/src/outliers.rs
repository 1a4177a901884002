//! Watches how connects to endpoints end, as the kernel counts them, and tells the driver which
//! endpoints are to be left alone for a while. `mesh_core::services::Outliers` decides.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use ebpf_loader::Services;
use mesh_core::services::{Failures, Outliers};
use tokio::{
    task,
    time::{self, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

use crate::driver::{self, DriverHandle};

/// How often the counts are read: one system call where no connect failed of late.
const LOOK: Duration = Duration::from_secs(1);

/// Follows the counts until `stop`.
///
/// # Errors
///
/// If a look panicked; what the kernel refuses is logged, and tried again.
pub async fn keep_outliers(
    services: Arc<Mutex<Services>>,
    driver: DriverHandle,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut outliers = Outliers::default();
    let mut told = BTreeSet::new();
    let mut tick = time::interval(LOOK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            _ = tick.tick() => {}
        }
        let services = Arc::clone(&services);
        let now = driver::now();
        let look = task::spawn_blocking(move || {
            let mut services = services.lock().unwrap_or_else(PoisonError::into_inner);
            let looked = look(&mut services, &mut outliers, now);
            (outliers, looked)
        });
        let (back, looked) = look.await?;
        outliers = back;
        if let Err(error) = looked {
            tracing::debug!(%error, "cannot read how connects ended");
        }
        if *outliers.ejected() != told {
            tell(&told, outliers.ejected());
            told.clone_from(outliers.ejected());
            let ejected = told.clone();
            driver.ask(|driver| driver.set_ejected(ejected)).await; // `None`: the agent is stopping.
        }
    }
}

fn look(
    services: &mut Services,
    outliers: &mut Outliers,
    now: std::time::Instant,
) -> anyhow::Result<()> {
    let counts = services.failures()?.into_iter();
    let counts = counts.map(|(endpoint, counted)| {
        let ebpf_loader::Failures { failed, in_a_row } = counted;
        (endpoint, Failures { failed, in_a_row })
    });
    let counts: BTreeMap<SocketAddr, Failures> = counts.collect();
    for endpoint in outliers.handle_counts(&counts, now) {
        services.forget_failures(endpoint)?;
    }
    services.watch_connects(outliers.watches())?;
    Ok(())
}

fn tell(before: &BTreeSet<SocketAddr>, now: &BTreeSet<SocketAddr>) {
    for endpoint in now.difference(before) {
        tracing::warn!(%endpoint, "connects fail: no new flows for a while, where others can take them");
    }
    for endpoint in before.difference(now) {
        tracing::info!(%endpoint, "takes new flows again, on trial");
    }
}
