//! gRPC between agents: mutual TLS with the certificates that the mesh's authority gave them.

use std::{net::SocketAddr, sync::Arc};

use arc_swap::ArcSwap;
use mesh_api::connect::{ALPN, connect_tcp, control_channel_over};
use mesh_core::snapshot::{Node, Snapshot};
use mesh_identity::{
    credentials::Credentials,
    tls::{ClientAuth, client_config, server_config, server_name},
};
use mesh_wire::id::Identity;
use tokio_rustls::rustls::{self, ServerConfig};
use tonic::{Status, transport::Channel};

/// What each connection is answered with: a renewed certificate from then on.
///
/// # Errors
///
/// None with credentials that a controller gave.
pub(crate) fn accept(
    credentials: Arc<ArcSwap<Credentials>>,
) -> Result<impl Fn() -> Arc<ServerConfig> + Send + 'static, rustls::Error> {
    let first = server_config(&credentials.load(), ClientAuth::Required, ALPN)?;
    let first = Arc::new(first);
    Ok(move || {
        let now = server_config(&credentials.load(), ClientAuth::Required, ALPN);
        now.map_or_else(|_| Arc::clone(&first), Arc::new)
    })
}

/// A connection to the agent of `node` at `address`, and to nobody else.
///
/// # Errors
///
/// `mesh_api::connect::ConnectError`, or what is wrong with the credentials.
pub(crate) async fn connect(
    credentials: &Credentials,
    node: Identity,
    address: SocketAddr,
) -> anyhow::Result<Channel> {
    let config = client_config(credentials, ALPN)?;
    let server = server_name(credentials.trust_domain(), &node)?;
    let address = address.to_string();
    let tcp = connect_tcp(&address, |_| None).await?;
    Ok(control_channel_over(tcp, &address, Arc::new(config), server).await?)
}

/// The node that calls, if it is one of the mesh as far as `snapshot` knows: a certificate outlives its node's place.
///
/// # Errors
///
/// `PERMISSION_DENIED`.
pub(crate) fn member<'a>(
    identity: &Identity,
    snapshot: Option<&'a Snapshot>,
) -> Result<&'a Node, Status> {
    let known = match (snapshot, identity) {
        (Some(snapshot), Identity::Node { name, id }) => {
            snapshot.nodes.get(name).filter(|node| node.id == *id)
        }
        _ => None,
    };
    known.ok_or_else(|| {
        Status::permission_denied("this is for nodes of the mesh, and this node knows no such one")
    })
}
