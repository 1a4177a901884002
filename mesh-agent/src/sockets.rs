//! Ends UDP flows whose endpoint is gone from its service. The kernel asks nobody about the
//! datagrams of a connected socket, so that they would go there for ever; an application whose socket
//! ends (`ECONNABORTED` on `recv`, `EDESTADDRREQ` on `send`) connects again. A device's flow is forgotten, and its next
//! datagram goes elsewhere.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, PoisonError},
};

use anyhow::Context as _;
use ebpf_loader::{Led, Services};
use mesh_core::{
    services::{Frontend, Table},
    snapshot::Protocol,
};
use mesh_linux::{netns, sock_diag};

/// Ends those that `services` remembers and whose service has the endpoint no more by `table`. A socket is
/// known by the kernel's number for it: one that merely speaks with the same address is not ours.
/// Those in namespaces that neither `/proc` nor `/run/netns` shows stay.
///
/// # Errors
///
/// If the kernel does not say which sockets there are. They are tried once.
pub fn end_stale(table: &Table, services: &Mutex<Services>) -> anyhow::Result<()> {
    let services = || services.lock().unwrap_or_else(PoisonError::into_inner);
    let connected = services().connected();
    let mut connected = connected.context("cannot read which UDP sockets are connected")?;
    let of_devices = services().device_datagrams();
    let mut of_devices = of_devices.context("cannot read UDP flows of devices")?;
    let by_devices = of_devices.iter().map(|(_, led)| led);
    let gone = gone(table, connected.values().chain(by_devices));
    connected.retain(|_, led| gone.contains(led));
    of_devices.retain(|(_, led)| gone.contains(led));
    if !of_devices.is_empty() {
        let ended = of_devices.len();
        let mut services = services();
        of_devices
            .into_iter()
            .try_for_each(|(flow, _)| services.forget_device_datagrams(flow))
            .context("cannot forget UDP flows of devices")?;
        tracing::info!(
            ended,
            "UDP flows of devices ended: their endpoints are gone"
        );
    }
    let stale: BTreeMap<_, _> = connected
        .into_iter()
        .map(|(cookie, (_, endpoint))| (cookie, endpoint))
        .collect();
    if stale.is_empty() {
        return Ok(());
    }
    let mut wanted = stale.clone();
    let mut ended = 0;
    for namespace in netns::all().context("cannot list the network namespaces")? {
        let sockets = netns::run_inside(&namespace, || sock_diag::end_udp(&mut wanted));
        match sockets.and_then(|ended| ended) {
            Ok(here) => ended += here,
            Err(error) => tracing::warn!(%error, "stale UDP sockets of a namespace stay"),
        }
        if wanted.is_empty() {
            break;
        }
    }
    tracing::info!(
        ended,
        gone = wanted.len(),
        "UDP sockets ended: their endpoints are gone"
    );
    let mut services = services();
    let mut forgotten = stale.into_keys();
    forgotten
        .try_for_each(|cookie| services.forget_connected(cookie))
        .context("cannot forget ended UDP sockets")
}

/// Those of which the service has the endpoint no more.
fn gone<'a>(table: &Table, led: impl Iterator<Item = &'a Led>) -> BTreeSet<Led> {
    let has = |(frontend, endpoint): &Led| {
        let frontend = Frontend {
            address: frontend.address,
            port: frontend.port,
            protocol: Protocol::Udp,
        };
        table.has(&frontend, *endpoint)
    };
    let led: BTreeSet<_> = led.copied().collect();
    led.into_iter().filter(|led| !has(led)).collect()
}
