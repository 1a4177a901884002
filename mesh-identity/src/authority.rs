//! The mesh's certificate authority.

use std::{fmt, time::SystemTime};

use mesh_wire::id::{Identity, MeshId};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PublicKeyData as _, SanType, SerialNumber, SigningKey as _,
    string::Ia5String,
};
use ring::rand::{SecureRandom as _, SystemRandom};
use rustls::pki_types::CertificateDer;
use zeroize::{Zeroize as _, Zeroizing};

use crate::{
    certificate::{self, AUTHORITY_LIFETIME, BadCertificate, Validity},
    pem::{self, BadPem},
    record::{RECORD_CONTEXT, SNAPSHOT_CONTEXT},
};

/// Longest trust domain, in bytes: `<63 bytes>.relay.<trust domain>` must be a DNS name, which
/// has at most 253 (RFC 1035 §2.3.4).
pub const TRUST_DOMAIN_LEN_MAX: usize = 180;

/// Signs certificates and node records. Its key is wiped from memory when it is dropped.
pub struct CertificateAuthority {
    key: KeyPair,
    certificate: CertificateDer<'static>,
    mesh_id: MeshId,
    trust_domain: String,
}

/// Why there is no certificate authority.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The trust domain cannot be part of a DNS name.
    #[error(transparent)]
    TrustDomain(#[from] BadTrustDomain),
    /// The PEM text of the certificate is broken.
    #[error("the authority's certificate: {0}")]
    Pem(#[from] BadPem),
    /// The certificate cannot be read.
    #[error("the authority's certificate: {0}")]
    Certificate(#[from] BadCertificate),
    /// Its URI is not `spiffe://<trust domain>`.
    #[error("the authority's certificate names {0:?}, not spiffe://<mesh name>")]
    NotAuthority(String),
    /// Key and certificate are of two authorities.
    #[error("the authority's key does not belong to its certificate")]
    KeyMismatch,
    /// Making or reading the key, or the certificate, failed.
    #[error("the authority's key or certificate: {0}")]
    Crypto(#[from] rcgen::Error),
}

/// Why no certificate was issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The request is broken, or not signed by the key in it.
    #[error("the certificate request: {0}")]
    Request(rcgen::Error),
    /// The key is of another kind.
    #[error("the certificate request's key is not ECDSA P-256")]
    KeyKind,
    /// Writing or signing failed.
    #[error("signing: {0}")]
    Signing(#[from] rcgen::Error),
    /// The system gave no random bytes.
    #[error("the system gave no random bytes")]
    Random,
}

/// Why a text cannot be a trust domain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a mesh name: labels of a-z, 0-9 and `-` with `.` between, at most {TRUST_DOMAIN_LEN_MAX} bytes"
)]
pub struct BadTrustDomain(String);

/// Checks that `text` can be a trust domain, and so a part of DNS names.
///
/// # Errors
///
/// [`BadTrustDomain`] with the text.
pub fn check_trust_domain(text: &str) -> Result<(), BadTrustDomain> {
    let label = |label: &str| {
        let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        (1..=63).contains(&label.len())
            && label.bytes().all(inner)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if text.len() <= TRUST_DOMAIN_LEN_MAX && text.split('.').all(label) {
        Ok(())
    } else {
        Err(BadTrustDomain(text.to_owned()))
    }
}

impl CertificateAuthority {
    /// Makes a new authority, valid for [`AUTHORITY_LIFETIME`] from `now`.
    ///
    /// # Errors
    ///
    /// [`AuthorityError::TrustDomain`], or [`AuthorityError::Crypto`] without random bytes.
    pub fn generate(trust_domain: &str, now: SystemTime) -> Result<Self, AuthorityError> {
        check_trust_domain(trust_domain)?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let validity = Validity::from_now(now, AUTHORITY_LIFETIME);
        let mut params = empty_params(validity);
        params
            .distinguished_name
            .push(DnType::CommonName, format!("{trust_domain} mesh CA"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let uri = format!("spiffe://{trust_domain}");
        params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(uri)?)];
        let certificate = params.self_signed(&key)?.der().clone();
        Self::new(key, certificate)
    }

    /// Reads back what [`Self::certificate_pem`] and [`Self::key_pem`] gave.
    ///
    /// # Errors
    ///
    /// [`AuthorityError`] that says which of the two is wrong.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Self, AuthorityError> {
        let mut certificates = pem::decode_certificates(certificate)?;
        let key = KeyPair::from_pkcs8_pem_and_sign_algo(key, &PKCS_ECDSA_P256_SHA256)?;
        Self::new(key, certificates.swap_remove(0))
    }

    fn new(key: KeyPair, certificate: CertificateDer<'static>) -> Result<Self, AuthorityError> {
        let uri = certificate::uri(&certificate)?;
        let trust_domain = uri
            .strip_prefix("spiffe://")
            .filter(|rest| check_trust_domain(rest).is_ok());
        let trust_domain = trust_domain
            .ok_or_else(|| AuthorityError::NotAuthority(uri.clone()))?
            .to_owned();
        let public = certificate::parse(&certificate)?.public_key().raw.to_vec();
        if key.subject_public_key_info() != public {
            return Err(AuthorityError::KeyMismatch);
        }
        Ok(Self {
            mesh_id: certificate::mesh_id(&certificate)?,
            key,
            certificate,
            trust_domain,
        })
    }

    /// The authority's certificate.
    #[must_use]
    pub fn certificate_der(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The authority's certificate as PEM text.
    #[must_use]
    pub fn certificate_pem(&self) -> String {
        pem::encode("CERTIFICATE", &self.certificate)
    }

    /// The authority's private key as PEM text, wiped when it is dropped.
    #[must_use]
    pub fn key_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.key.serialize_pem())
    }

    /// The mesh that this authority makes.
    #[must_use]
    pub fn mesh_id(&self) -> MeshId {
        self.mesh_id
    }

    /// The mesh's name.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// Certifies that the key in `csr_der` (PKCS#10) is `identity`'s. Nothing else in the
    /// request counts; its own signature must be right.
    ///
    /// # Errors
    ///
    /// [`IssueError`].
    pub fn issue(
        &self,
        identity: &Identity,
        csr_der: &[u8],
        validity: Validity,
    ) -> Result<CertificateDer<'static>, IssueError> {
        let request = CertificateSigningRequestParams::from_der(&csr_der.into());
        let request = request.map_err(IssueError::Request)?;
        if request.public_key.algorithm() != &PKCS_ECDSA_P256_SHA256 {
            return Err(IssueError::KeyKind);
        }
        let mut params = empty_params(validity);
        params.serial_number = Some(random_serial()?);
        let dns_name = dns_name(&self.trust_domain, identity);
        let common_name = match identity {
            Identity::Node { name, .. } => name.as_str(),
            Identity::Relay(name) => name.as_str(),
            Identity::Controller => "controller",
        };
        params
            .distinguished_name
            .push(DnType::CommonName, common_name);
        params.subject_alt_names = vec![
            SanType::URI(Ia5String::try_from(identity.to_uri(&self.trust_domain))?),
            SanType::DnsName(Ia5String::try_from(dns_name)?),
        ];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let issuer = Issuer::from_ca_cert_der(&self.certificate, &self.key)?;
        let certificate = params.signed_by(&request.public_key, &issuer)?;
        Ok(certificate.der().clone())
    }

    /// Signs a record: ECDSA P-256 SHA-256 (ASN.1) over [`RECORD_CONTEXT`] and the record.
    ///
    /// # Errors
    ///
    /// When the system gives no random bytes.
    pub fn sign_record(&self, record: &[u8]) -> Result<Vec<u8>, IssueError> {
        Ok(self.key.sign(&[RECORD_CONTEXT, record].concat())?)
    }

    /// Signs the head of a snapshot, in the same way over
    /// [`SNAPSHOT_CONTEXT`] and the head.
    ///
    /// # Errors
    ///
    /// When the system gives no random bytes.
    pub fn sign_snapshot(&self, head: &[u8]) -> Result<Vec<u8>, IssueError> {
        Ok(self.key.sign(&[SNAPSHOT_CONTEXT, head].concat())?)
    }
}

impl fmt::Debug for CertificateAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateAuthority")
            .field("trust_domain", &self.trust_domain)
            .field("mesh_id", &self.mesh_id)
            .finish_non_exhaustive()
    }
}

impl Drop for CertificateAuthority {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

/// A new key, as PEM text, and the request that asks for a certificate for it.
///
/// # Errors
///
/// When the system gives no random bytes.
pub fn new_key() -> Result<NewKey, IssueError> {
    let mut key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let request = CertificateParams::default().serialize_request(&key);
    let key_pem = Zeroizing::new(key.serialize_pem());
    key.zeroize();
    Ok(NewKey {
        key_pem,
        csr_der: request?.der().to_vec(),
    })
}

/// What [`new_key`] makes.
pub struct NewKey {
    /// The private key (PKCS#8): for a file that nobody else may read.
    pub key_pem: Zeroizing<String>,
    /// The request (PKCS#10, DER): for [`CertificateAuthority::issue`].
    pub csr_der: Vec<u8>,
}

impl fmt::Debug for NewKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewKey").finish_non_exhaustive()
    }
}

/// The DNS name by which a TLS client expects `identity`.
#[must_use]
pub fn dns_name(trust_domain: &str, identity: &Identity) -> String {
    match identity {
        Identity::Node { name, .. } => format!("{name}.node.{trust_domain}"),
        Identity::Relay(name) => format!("{name}.relay.{trust_domain}"),
        Identity::Controller => format!("controller.{trust_domain}"),
    }
}

fn empty_params(validity: Validity) -> CertificateParams {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let at = |time: SystemTime| {
        epoch
            + time
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default()
    };
    let mut params = CertificateParams::default();
    params.not_before = at(validity.not_before);
    params.not_after = at(validity.not_after);
    params.distinguished_name = DistinguishedName::new();
    params
}

/// 127 random bits: positive, as RFC 5280 §4.1.2.2 wants it.
fn random_serial() -> Result<SerialNumber, IssueError> {
    let mut bytes = [0; 16];
    let filled = SystemRandom::new().fill(&mut bytes);
    filled.map_err(|_| IssueError::Random)?;
    let positive = u128::from_be_bytes(bytes) >> 1;
    Ok(SerialNumber::from(positive.to_be_bytes().to_vec()))
}
