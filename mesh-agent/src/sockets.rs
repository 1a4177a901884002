//! Ends connected UDP sockets whose endpoint is gone from its service. The kernel asks nobody about the
//! datagrams of a connected socket, so that they would go there for ever; an application whose socket
//! ends (`ECONNABORTED` on `recv`, `EDESTADDRREQ` on `send`) connects again.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Mutex, PoisonError},
};

use anyhow::Context as _;
use ebpf_loader::Services;
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
    let connected = connected.context("cannot read which UDP sockets are connected")?;
    let stale = stale(table, connected);
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

/// Numbers of the sockets to be ended, each with what it is connected to.
fn stale(
    table: &Table,
    connected: BTreeMap<u64, (ebpf_loader::Frontend, SocketAddr)>,
) -> BTreeMap<u64, SocketAddr> {
    let pairs: BTreeSet<_> = connected.values().copied().collect();
    let gone = |(frontend, endpoint): &(ebpf_loader::Frontend, SocketAddr)| {
        let frontend = Frontend {
            address: frontend.address,
            port: frontend.port,
            protocol: Protocol::Udp,
        };
        !table.has(&frontend, *endpoint)
    };
    let gone: BTreeSet<_> = pairs.into_iter().filter(gone).collect();
    let stale = connected
        .into_iter()
        .filter(|(_, pair)| gone.contains(pair));
    stale
        .map(|(cookie, (_, endpoint))| (cookie, endpoint))
        .collect()
}
