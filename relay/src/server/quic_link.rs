//! Links by QUIC.

use std::{net::IpAddr, ops::ControlFlow, sync::Arc};

use mesh_core::io::RelayTransport;
use mesh_wire::{id::canonical_ip, relay::Control};
use quinn_proto::{ConnectionError, Incoming};
use rustls::pki_types::CertificateDer;
use tokio::time;

use super::{HANDSHAKE_TIMEOUT, HANDSHAKES_MAX, STOPPING, Shared, udp::SharedSocket};
use crate::{
    queue::{QUIC_BYTES_MAX, Queue},
    quic::{
        driver::{Driver, Received},
        endpoint::Endpoint,
    },
};

/// Handshakes at once above which a source must show that it receives what is sent to it
/// (RFC 9000 §8.1.2), at the price of one round trip.
const HANDSHAKES_UNPROVEN_MAX: usize = HANDSHAKES_MAX / 8;

/// Serves all links, and takes in new ones as long as the relay is not stopping.
pub(super) async fn serve_all(
    mut endpoint: Endpoint,
    socket: Arc<SharedSocket>,
    shared: Arc<Shared>,
) {
    let mut sort = |buffer: &mut [u8], meta: &_| socket.take_out(buffer, meta);
    while let Some(incoming) = endpoint.next(&mut sort).await {
        admit(&mut endpoint, incoming, &shared);
    }
}

fn admit(endpoint: &mut Endpoint, incoming: Incoming, shared: &Arc<Shared>) {
    let under_way = HANDSHAKES_MAX - shared.handshakes.available_permits();
    if under_way > HANDSHAKES_UNPROVEN_MAX && !incoming.remote_address_validated() {
        return endpoint.retry(incoming);
    }
    let from = canonical_ip(incoming.remote_address().ip());
    let permit = shared.handshakes.clone().try_acquire_owned();
    let admitted = shared.hub.handshake(from);
    let (Ok(permit), Ok(()), false) = (permit, admitted, shared.links.is_closed()) else {
        shared.hub.handshake_failed();
        return endpoint.ignore(incoming);
    };
    let mut driver = match endpoint.accept(incoming, shared.tls.load().quic.clone()) {
        Ok(link) => Driver::new(link),
        Err(error) => {
            tracing::debug!(%from, %error, "bad QUIC packet");
            return shared.hub.handshake_failed();
        }
    };
    let shared_with_link = shared.clone();
    shared.links.spawn(async move {
        let queue = Arc::new(Queue::new(QUIC_BYTES_MAX));
        let opened = time::timeout(HANDSHAKE_TIMEOUT, open(&mut driver, &queue)).await;
        drop(permit);
        match opened {
            Ok(Ok(version)) => serve(driver, queue, from, version, &shared_with_link).await,
            Ok(Err(reason)) => {
                tracing::debug!(%from, reason, "no QUIC link");
                shared_with_link.hub.handshake_failed();
            }
            Err(_) => shared_with_link.hub.handshake_failed(),
        }
    });
}

/// Waits for the node's `Hello`, and returns its version; `Err` says what came instead.
async fn open(driver: &mut Driver, queue: &Queue) -> Result<u32, String> {
    let mut first = None;
    let opening = driver.run(queue, |received| match received {
        Received::Control(message) => {
            first = Some(message);
            ControlFlow::Break(())
        }
        Received::Frames(_) => ControlFlow::Continue(()), // Who says nothing has no sessions.
    });
    if let ControlFlow::Continue(error) = opening.await {
        return Err(error.to_string());
    }
    match first {
        Some(Control::Hello { version }) => Ok(version),
        other => Err(format!("the first message is {other:?}")),
    }
}

async fn serve(mut driver: Driver, queue: Arc<Queue>, from: IpAddr, version: u32, shared: &Shared) {
    let chain = driver.link().peer_identity();
    let chain = chain.and_then(|chain| chain.downcast::<Vec<CertificateDer<'static>>>().ok());
    let Some(node) = chain.and_then(|chain| shared.node(&chain)) else {
        shared.hub.handshake_failed();
        return say_goodbye(&mut driver, &queue, "only nodes of this mesh may connect").await;
    };
    let connected = shared
        .hub
        .connected(node, RelayTransport::Quic, from, version, queue.clone());
    let link = match connected {
        Ok(link) => link,
        Err(refusal) => {
            return say_goodbye(&mut driver, &queue, &refusal.to_string()).await;
        }
    };
    tracing::debug!(?node, %from, "QUIC link up");
    let serving = driver.run(&queue, |received| {
        match received {
            Received::Frames(frames) => shared.hub.frames(link, frames),
            Received::Control(message) => shared.hub.control(link, message),
        }
        ControlFlow::Continue(())
    });
    let stopped = tokio::select! {
        _ = serving => false,
        () = shared.close.cancelled() => true,
    };
    shared.hub.disconnected(link);
    if stopped {
        say_goodbye(&mut driver, &queue, STOPPING).await;
    }
    tracing::debug!(?node, %from, "QUIC link down");
}

async fn say_goodbye(driver: &mut Driver, queue: &Queue, reason: &str) {
    queue.close(reason);
    let ended: ControlFlow<(), ConnectionError> =
        driver.run(queue, |_| ControlFlow::Continue(())).await;
    drop(ended);
}
