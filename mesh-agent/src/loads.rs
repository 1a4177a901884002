//! Looks how many connections this node has open to endpoints of services with `maxConnections`, where there are such,
//! and tells the driver. `mesh_core::services::Loads` decides what is news.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use ebpf_loader::Services;
use mesh_core::{
    services::{self, Loads, View},
    snapshot::Snapshot,
};
use tokio::{
    sync::watch,
    task,
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;

use crate::driver::DriverHandle;

/// The pause between two looks: 12 ms for the sockets of this node (dev profile, two busy cores), and two system calls for
/// each flow of a device.
const LOOK_PAUSE: Duration = Duration::from_secs(1);

/// A look that took longer is followed by a pause of so many times that: one part in so many of a processor at most.
const PAUSE_SHARE: u32 = 50;

#[derive(Default)]
struct Looks {
    loads: Loads,
    /// Of the snapshot beside it.
    limits: BTreeMap<SocketAddr, u32>,
    snapshot: Option<Arc<Snapshot>>,
}

/// Looks until `stop`.
///
/// # Errors
///
/// If a look panicked; what the kernel refuses is logged, and tried again.
pub async fn keep_loads(
    services: Arc<Mutex<Services>>,
    views: watch::Receiver<Option<Arc<View>>>,
    driver: DriverHandle,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut looks = Looks::default();
    let mut pause = LOOK_PAUSE;
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = time::sleep(pause) => {}
        }
        let Some(view) = views.borrow().clone() else {
            continue;
        };
        let services = Arc::clone(&services);
        let began = Instant::now();
        let looked = task::spawn_blocking(move || {
            let news = looks.look(&services, &view, began.into_std());
            (looks, news)
        });
        let news;
        (looks, news) = looked.await?;
        pause = LOOK_PAUSE.max(began.elapsed() * PAUSE_SHARE);
        match news {
            Ok(None) => {}
            Ok(Some(open)) => {
                driver.ask(|driver| driver.set_open(open)).await; // `None`: the agent is stopping.
            }
            Err(error) => {
                tracing::debug!(%error, "cannot read how many connections are open to endpoints");
            }
        }
    }
}

impl Looks {
    fn look(
        &mut self,
        services: &Mutex<Services>,
        view: &View,
        now: std::time::Instant,
    ) -> anyhow::Result<Option<BTreeMap<SocketAddr, u32>>> {
        let same = |known: &Arc<Snapshot>| Arc::ptr_eq(known, &view.snapshot);
        if !self.snapshot.as_ref().is_some_and(same) {
            self.limits = services::connection_limits(view);
            self.snapshot = Some(Arc::clone(&view.snapshot));
        }
        let counts = if self.limits.is_empty() {
            BTreeMap::new()
        } else {
            let services = services.lock().unwrap_or_else(PoisonError::into_inner);
            services.open_connections()?
        };
        Ok(self.loads.handle_counts(&counts, &self.limits, now))
    }
}
