//! A node without an agent: how it joins a mesh, and speaks with its controller.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use mesh_api::{
    connect::{ALPN, control_channel, control_client},
    control::JoinRequest,
};
use mesh_identity::{
    authority::new_key,
    credentials::Credentials,
    tls::{join_client_config, server_name},
};
use mesh_wire::id::{Identity, MeshId};
use tokio_rustls::rustls::ClientConfig;
use tonic::{Status, transport::Channel};

/// A connection to the controller at `address` (`host:port`) of the mesh with this name.
///
/// # Errors
///
/// If there is none to be had.
pub async fn connect(address: &str, mesh_name: &str, config: ClientConfig) -> Result<Channel> {
    let name = server_name(mesh_name, &Identity::Controller)?;
    Ok(control_channel(address, Arc::new(config), name).await?)
}

/// Joins the mesh as `request` says, with a new key for TLS.
///
/// # Errors
///
/// Inside, what the controller says; outside, if it could not be asked.
pub async fn join(
    address: &str,
    (mesh_name, mesh): (&str, MeshId),
    request: JoinRequest,
) -> Result<Result<Credentials, Status>> {
    let channel = connect(address, mesh_name, join_client_config(mesh, ALPN)?).await?;
    let key = new_key().context("make a key")?;
    let request = JoinRequest {
        csr_der: key.csr_der,
        ..request
    };
    let response = match control_client(channel).join(request).await {
        Ok(response) => response.into_inner(),
        Err(status) => return Ok(Err(status)),
    };
    let chain = response.certificate_chain_der.into_iter();
    let chain = chain.map(Into::into).collect();
    let authority = response.ca_certificate_der.into();
    let credentials = Credentials::from_parts(chain, &key.key_pem, authority);
    Ok(Ok(credentials.context("what the controller answered")?))
}
