//! TLS 1.3 settings: who is let in, what is shown, and what time it is.
//!
//! Clocks at the edge are wrong. Two things bound them from below: this process's own
//! certificate was issued after its `notBefore`, and so was any certificate that the mesh's
//! authority signed. So a node that woke up in 1970 still connects. A clock that is far in the
//! future cannot be told from a certificate that is over: the error names both.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use mesh_wire::id::{Identity, MeshId};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName,
    Error, OtherError, RootCertStore, ServerConfig, SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring::default_provider},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
    server::{
        NoServerSessionStorage, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::{CertifiedKey, SingleCertAndKey},
    time_provider::TimeProvider,
    version::TLS13,
};

use crate::{
    authority::dns_name,
    certificate::{Moment, Validity, mesh_id},
    credentials::Credentials,
    pem::{BadPem, decode_certificates},
};

/// Whether clients must show a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientAuth {
    /// No certificate, no connection.
    Required,
    /// They may; if they do, it must be of this mesh.
    Optional,
}

/// Settings of a server: it shows `credentials`, and checks clients against the mesh's authority.
///
/// There is no session resumption: a certificate that is over, or of a node that was removed, is
/// looked at every time.
///
/// # Errors
///
/// When rustls refuses the authority's certificate.
pub fn server_config(
    credentials: &Credentials,
    clients: ClientAuth,
    alpn: &[&[u8]],
) -> Result<ServerConfig, Error> {
    server_config_at(credentials, clients, alpn, system_time)
}

/// Why there are no settings for clients that are not the mesh's.
#[derive(Debug, thiserror::Error)]
pub enum OutsideTlsError {
    /// The server's own certificate.
    #[error("its certificate: {0}")]
    Certificate(BadPem),
    /// Its key.
    #[error("its key: no PEM block with a private key in it that can be read")]
    Key,
    /// The clients' authorities.
    #[error("the authorities of clients: {0}")]
    Authorities(BadPem),
    /// They do not go together, or are of a kind that is not supported.
    #[error(transparent)]
    Refused(#[from] Error),
}

/// Settings of a server whose trust is not the mesh's: it shows `certificates` (PEM, its own first), and lets in who
/// shows a certificate of `authorities` (PEM). The machine's clock counts as it is.
///
/// # Errors
///
/// [`OutsideTlsError`].
pub fn outside_server_config(
    certificates: &str,
    key: &str,
    authorities: &str,
) -> Result<ServerConfig, OutsideTlsError> {
    let chain = decode_certificates(certificates).map_err(OutsideTlsError::Certificate)?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes());
    let key = key.map_err(|_| OutsideTlsError::Key)?; // What is wrong with it might show a part of it.
    let mut roots = RootCertStore::empty();
    for authority in decode_certificates(authorities).map_err(OutsideTlsError::Authorities)? {
        roots.add(authority)?;
    }
    let provider = Arc::new(default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    let verifier = verifier
        .build()
        .map_err(|error| Error::General(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Settings of a client that has a certificate: it shows `credentials`, and checks the server
/// against the mesh's authority and the expected name.
///
/// # Errors
///
/// When rustls refuses the authority's certificate.
pub fn client_config(credentials: &Credentials, alpn: &[&[u8]]) -> Result<ClientConfig, Error> {
    client_config_at(credentials, alpn, system_time)
}

/// Settings of a client that has only a join token: the server's chain must hold an authority
/// whose public key hashes to `mesh`, its own certificate must be issued by that one, and carry
/// the expected name ([`server_name`] with the token's trust domain).
///
/// # Errors
///
/// When the ring provider lacks TLS 1.3, which it does not.
pub fn join_client_config(mesh: MeshId, alpn: &[&[u8]]) -> Result<ClientConfig, Error> {
    let provider = Arc::new(default_provider());
    let clock = Clock {
        floor: UNIX_EPOCH,
        system: system_time,
    };
    let verifier = PinnedVerifier {
        mesh,
        provider: provider.clone(),
        clock: clock.clone(),
    };
    let config = ClientConfig::builder_with_details(provider, Arc::new(clock))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    Ok(finish_client(config, alpn))
}

/// The name by which a client expects `identity`.
///
/// # Errors
///
/// When the trust domain cannot be part of a DNS name.
pub fn server_name(
    trust_domain: &str,
    identity: &Identity,
) -> Result<ServerName<'static>, rustls::pki_types::InvalidDnsNameError> {
    ServerName::try_from(dns_name(trust_domain, identity))
}

/// What a TLS error means, for the person who must do something about it.
#[must_use]
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "rustls explains the other errors itself, also those of later versions"
)]
pub fn explain(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        ) => "the other side's certificate is not from this mesh's authority".to_owned(),
        Error::InvalidCertificate(CertificateError::ExpiredContext { time, not_after }) => {
            expired_text(*not_after, *time)
        }
        Error::InvalidCertificate(CertificateError::Other(other)) => other.to_string(),
        Error::AlertReceived(AlertDescription::UnknownCA | AlertDescription::DecryptError) => {
            "the other side says that our certificate is not from its mesh".to_owned()
        }
        Error::AlertReceived(AlertDescription::CertificateExpired) => {
            "the other side says that our certificate has expired (or its clock is ahead)"
                .to_owned()
        }
        Error::AlertReceived(AlertDescription::CertificateRequired) => {
            "the other side wants a certificate and we showed none".to_owned()
        }
        other => other.to_string(),
    }
}

/// [`explain`] for what tokio-rustls wraps into an I/O error.
#[must_use]
pub fn explain_io(error: &std::io::Error) -> String {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    inner.map_or_else(|| error.to_string(), explain)
}

fn server_config_at(
    credentials: &Credentials,
    clients: ClientAuth,
    alpn: &[&[u8]],
    system: fn() -> SystemTime,
) -> Result<ServerConfig, Error> {
    let provider = Arc::new(default_provider());
    let clock = Clock::of(credentials, system);
    let verifier = ClientVerifier {
        inner: client_verifier(credentials, clients, &provider)?,
    };
    let mut config = ServerConfig::builder_with_details(provider, Arc::new(clock))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(served(credentials))));
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn client_verifier(
    credentials: &Credentials,
    clients: ClientAuth,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, Error> {
    let roots = Arc::new(roots(credentials.authority())?);
    let mut builder = WebPkiClientVerifier::builder_with_provider(roots, provider.clone());
    if clients == ClientAuth::Optional {
        builder = builder.allow_unauthenticated();
    }
    builder
        .build()
        .map_err(|error| Error::General(error.to_string()))
}

/// The controller shows the authority too: a node with only a token has nothing but its hash.
fn served(credentials: &Credentials) -> Arc<CertifiedKey> {
    if credentials.identity() != &Identity::Controller {
        return credentials.certified().clone();
    }
    let mut certified = CertifiedKey::clone(credentials.certified());
    certified.cert.push(credentials.authority().clone());
    Arc::new(certified)
}

fn client_config_at(
    credentials: &Credentials,
    alpn: &[&[u8]],
    system: fn() -> SystemTime,
) -> Result<ClientConfig, Error> {
    let provider = Arc::new(default_provider());
    let clock = Clock::of(credentials, system);
    let verifier = ServerVerifier {
        inner: server_verifier(credentials.authority(), &provider)?,
        clock: clock.clone(),
    };
    let resolver = SingleCertAndKey::from(credentials.certified().clone());
    let config = ClientConfig::builder_with_details(provider, Arc::new(clock))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(resolver));
    Ok(finish_client(config, alpn))
}

fn finish_client(mut config: ClientConfig, alpn: &[&[u8]]) -> ClientConfig {
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.resumption = Resumption::disabled();
    config
}

fn server_verifier(
    authority: &CertificateDer<'_>,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, Error> {
    let roots = Arc::new(roots(authority)?);
    let builder = WebPkiServerVerifier::builder_with_provider(roots, provider.clone());
    builder
        .build()
        .map_err(|error| Error::General(error.to_string()))
}

fn roots(authority: &CertificateDer<'_>) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone().into_owned())?;
    Ok(roots)
}

/// The system's clock, but never before `floor`.
#[derive(Debug, Clone)]
struct Clock {
    floor: SystemTime,
    system: fn() -> SystemTime,
}

impl Clock {
    fn of(credentials: &Credentials, system: fn() -> SystemTime) -> Self {
        Self {
            floor: credentials.validity().not_before,
            system,
        }
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(unix_time((self.system)().max(self.floor)))
    }
}

fn system_time() -> SystemTime {
    SystemTime::now()
}

fn unix_time(time: SystemTime) -> UnixTime {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixTime::since_unix_epoch(since)
}

/// `now`, or the certificate's `notBefore` if that is later: if the authority signed it, that
/// moment has passed; if not, the signature fails.
fn at_least_issued(now: UnixTime, certificate: &CertificateDer<'_>) -> UnixTime {
    let issued = Validity::of(certificate).map(|validity| unix_time(validity.not_before));
    issued.map_or(now, |issued| now.max(issued))
}

fn expired_text(not_after: UnixTime, now: UnixTime) -> String {
    let moment = |time: UnixTime| Moment(UNIX_EPOCH + Duration::from_secs(time.as_secs()));
    format!(
        "certificate expired on {}; this machine's clock says {}: if the clock is wrong, set it",
        moment(not_after),
        moment(now)
    )
}

/// A certificate is over by this machine's clock.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct ClockError(String);

fn name_the_clock(error: Error, clock: &Clock) -> Error {
    let Error::InvalidCertificate(CertificateError::ExpiredContext { not_after, .. }) = error
    else {
        return error;
    };
    let text = expired_text(not_after, unix_time((clock.system)()));
    let other = OtherError(Arc::new(ClockError(text)));
    Error::InvalidCertificate(CertificateError::Other(other))
}

#[derive(Debug)]
struct ClientVerifier {
    inner: Arc<dyn ClientCertVerifier>,
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.inner.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let now = at_least_issued(now, end_entity);
        self.inner
            .verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[derive(Debug)]
struct ServerVerifier {
    inner: Arc<WebPkiServerVerifier>,
    clock: Clock,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let now = at_least_issued(now, end_entity);
        let inner = &self.inner;
        inner
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
            .map_err(|error| name_the_clock(error, &self.clock))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Trusts the authority in the server's chain whose hash the token names, and no other.
#[derive(Debug)]
struct PinnedVerifier {
    mesh: MeshId,
    provider: Arc<CryptoProvider>,
    clock: Clock,
}

/// The server is of another mesh than the token.
#[derive(Debug, thiserror::Error)]
#[error("the server does not belong to the mesh that the token names (mesh id {0})")]
struct OtherMesh(MeshId);

impl ServerCertVerifier for PinnedVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let mut chain = intermediates.iter();
        let authority = chain.find(|certificate| mesh_id(certificate) == Ok(self.mesh));
        let authority = authority.ok_or_else(|| {
            let other = OtherError(Arc::new(OtherMesh(self.mesh)));
            Error::InvalidCertificate(CertificateError::Other(other))
        })?;
        let verifier = ServerVerifier {
            inner: server_verifier(authority, &self.provider)?,
            clock: self.clock.clone(),
        };
        verifier.verify_server_cert(end_entity, &[], server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let algorithms = &self.provider.signature_verification_algorithms;
        algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests;
