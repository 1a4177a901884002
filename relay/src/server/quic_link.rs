//! Links by QUIC.

use std::sync::Arc;

use mesh_core::io::RelayTransport;
use mesh_wire::relay::Control;
use quinn::{Connection, Endpoint, Incoming, RecvStream, SendStream};
use rustls::pki_types::CertificateDer;
use tokio::{sync::mpsc, time};

use super::{HANDSHAKE_TIMEOUT, HANDSHAKES_MAX, STOPPING, Shared};
use crate::{
    outlet::{CLOSE_CODE, CONTROL_QUEUE_MAX, Outlet},
    quic,
};

/// Handshakes at once above which a source must show that it receives what is sent to it
/// (RFC 9000 §8.1.2), at the price of one round trip.
const HANDSHAKES_UNPROVEN_MAX: usize = HANDSHAKES_MAX / 8;

/// Accepts connections until the endpoint is closed.
pub(super) async fn accept(endpoint: &Endpoint, shared: &Arc<Shared>) {
    while let Some(incoming) = endpoint.accept().await {
        let under_way = HANDSHAKES_MAX - shared.handshakes.available_permits();
        if under_way > HANDSHAKES_UNPROVEN_MAX && !incoming.remote_address_validated() {
            incoming.retry().ok(); // An address that is not validated may be asked to retry.
            continue;
        }
        let permit = shared.handshakes.clone().try_acquire_owned();
        let admitted = shared.hub.handshake(incoming.remote_address().ip());
        let (Ok(permit), Ok(())) = (permit, admitted) else {
            shared.hub.handshake_failed();
            incoming.ignore(); // Not a byte for what may be a flood.
            continue;
        };
        let shared_with_link = shared.clone();
        shared.links.spawn(async move {
            let opened = time::timeout(HANDSHAKE_TIMEOUT, open(incoming)).await;
            drop(permit);
            match opened {
                Ok(Some(link)) => serve(link, &shared_with_link).await,
                Ok(None) | Err(_) => shared_with_link.hub.handshake_failed(),
            }
        });
    }
}

struct Opened {
    connection: Connection,
    send: SendStream,
    receive: RecvStream,
    version: u32,
}

async fn open(incoming: Incoming) -> Option<Opened> {
    let from = incoming.remote_address();
    let connection = match incoming.await {
        Ok(connection) => connection,
        Err(error) => {
            tracing::debug!(%from, %error, "QUIC handshake failed");
            return None;
        }
    };
    let (send, mut receive) = connection.accept_bi().await.ok()?;
    match quic::read_control(&mut receive).await {
        Ok(Control::Hello { version }) => Some(Opened {
            connection,
            send,
            receive,
            version,
        }),
        Ok(_) | Err(_) => None,
    }
}

async fn serve(link: Opened, shared: &Shared) {
    let Opened {
        connection,
        mut send,
        mut receive,
        version,
    } = link;
    let chain = connection.peer_identity();
    let chain = chain.and_then(|chain| chain.downcast::<Vec<CertificateDer<'static>>>().ok());
    let Some(node) = chain.and_then(|chain| shared.node(&chain)) else {
        connection.close(CLOSE_CODE, b"only nodes of this mesh may connect");
        return shared.hub.handshake_failed();
    };
    let (control, mut outgoing) = mpsc::channel(CONTROL_QUEUE_MAX);
    let outlet = Outlet::Quic {
        connection: connection.clone(),
        control,
    };
    let from = connection.remote_address().ip();
    let connected = shared
        .hub
        .connected(node, RelayTransport::Quic, from, version, outlet);
    let link = match connected {
        Ok(link) => link,
        Err(refusal) => {
            return connection.close(CLOSE_CODE, refusal.to_string().as_bytes());
        }
    };
    tracing::debug!(?node, %from, "QUIC link up");
    let reading = async {
        while let Ok(message) = quic::read_control(&mut receive).await {
            shared.hub.control(link, message);
        }
    };
    let reason: &[u8] = tokio::select! {
        _ = quic::receive_frames(&connection, |frames| shared.hub.frames(link, frames)) => b"closed",
        () = reading => b"closed",
        () = quic::write_controls(&mut send, &mut outgoing) => b"closed",
        () = shared.close.cancelled() => STOPPING.as_bytes(),
    };
    shared.hub.disconnected(link);
    connection.close(CLOSE_CODE, reason); // Unless it is closed already, with another reason.
    tracing::debug!(?node, %from, "QUIC link down");
}
