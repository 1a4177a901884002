//! What the admin socket tells of keys: public halves, fingerprints, dates; and another key for the certificate.

use std::{
    fmt::Write as _,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use mesh_api::admin::{
    CertificateReport, KeysResponse, Peer, PeerKey, RotateKeyRequest, RotateKeyResponse,
};
use mesh_identity::{
    certificate::{Holder, Validity, public_key_hash, serial},
    credentials::Credentials,
};
use tokio::{sync::oneshot, time};
use tokio_rustls::rustls::pki_types::CertificateDer;
use tonic::Status;

use super::Admin;
use crate::report;

/// How long a controller may take for a certificate. `meshctl` waits 5 s.
const ROTATE_LIMIT: Duration = Duration::from_secs(4);

impl Admin {
    pub(super) async fn keys_report(&self) -> Result<KeysResponse, Status> {
        let credentials = self.facts.credentials.load_full();
        let (node, public_key, limit, peers) = self
            .ask(|driver| {
                let limit = driver.snapshot().mesh.offline_limit;
                let key = driver.tunnel.node_id().to_string();
                (driver.name().to_string(), key, limit, report::peers(driver))
            })
            .await?;
        Ok(KeysResponse {
            node,
            public_key,
            certificate: Some(own(&credentials)?),
            authority: Some(certificate(credentials.authority())?),
            renew_at_unix_s: unix_s(credentials.validity().renew_at()),
            offline_limit_s: limit.map(|limit| limit.as_secs()),
            peers: peers.into_iter().map(peer_key).collect(),
        })
    }

    pub(super) async fn rotate(&self, _: RotateKeyRequest) -> Result<RotateKeyResponse, Status> {
        if !self.connection.borrow().connected {
            return Err(Status::unavailable(
                "no controller is connected, and nobody else makes certificates: `meshctl status` says why",
            ));
        }
        let before = own(&self.facts.credentials.load())?;
        let (done, answer) = oneshot::channel();
        if self.facts.rotations.try_send(done).is_err() {
            return Err(Status::unavailable("another rotation is under way"));
        }
        let rotated = time::timeout(ROTATE_LIMIT, answer).await;
        match rotated {
            Ok(Ok(Ok(()))) => Ok(RotateKeyResponse {
                before: Some(before),
                now: Some(own(&self.facts.credentials.load())?),
            }),
            Ok(Ok(Err(error))) => Err(Status::unavailable(format!("{error:#}"))),
            Ok(Err(_)) | Err(_) => Err(Status::unavailable(
                "the controller did not answer; the key is the one before, or will be another one soon: `meshctl keys list`",
            )),
        }
    }
}

fn own(credentials: &Credentials) -> Result<CertificateReport, Status> {
    let own = credentials.chain().first();
    certificate(own.ok_or_else(|| Status::internal("the credentials have no certificate"))?)
}

fn certificate(der: &CertificateDer<'_>) -> Result<CertificateReport, Status> {
    let bad =
        |error: mesh_identity::certificate::BadCertificate| Status::internal(error.to_string());
    let validity = Validity::of(der).map_err(bad)?;
    let Holder {
        common_names, uris, ..
    } = Holder::of(der).map_err(bad)?;
    let hash = public_key_hash(der).map_err(bad)?;
    Ok(CertificateReport {
        serial: serial(der).map_err(bad)?,
        holder: uris
            .into_iter()
            .chain(common_names)
            .next()
            .unwrap_or_default(),
        not_before_unix_s: unix_s(validity.not_before),
        not_after_unix_s: unix_s(validity.not_after),
        key_sha256: hash.iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").unwrap_or_default(); // A String takes it.
            text
        }),
    })
}

fn peer_key(peer: Peer) -> PeerKey {
    PeerKey {
        node: peer.name,
        public_key: peer.public_key,
        session_ms: peer.last_handshake_ms,
        external: peer.external,
    }
}

fn unix_s(at: SystemTime) -> i64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
