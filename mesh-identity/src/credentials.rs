//! A certificate, its key and the authority that issued it.

use std::{fmt, fs, io, path::Path, sync::Arc};

use mesh_wire::id::{Identity, MeshId};
use rustls::{
    crypto::ring::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    sign::CertifiedKey,
};
use zeroize::Zeroizing;

use crate::{
    certificate::{BadCertificate, Validity, mesh_id, parse, peer_identity},
    pem::{self, BadPem},
};

/// Who this process is in the mesh, and the proof. Cheap to clone.
#[derive(Clone)]
pub struct Credentials {
    chain: Vec<CertificateDer<'static>>,
    key_pem: Arc<Zeroizing<String>>,
    certified: Arc<CertifiedKey>,
    authority: CertificateDer<'static>,
    mesh_id: MeshId,
    trust_domain: String,
    identity: Identity,
    validity: Validity,
}

/// What is wrong with credentials.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The PEM text of the certificate is broken.
    #[error("the certificate: {0}")]
    CertificatePem(BadPem),
    /// The certificate names nobody of a mesh.
    #[error("the certificate: {0}")]
    Certificate(BadCertificate),
    /// The authority's certificate is broken.
    #[error("the CA certificate: {0}")]
    AuthorityPem(BadPem),
    /// The authority's certificate is broken.
    #[error("the CA certificate: {0}")]
    Authority(BadCertificate),
    /// The private key cannot be used.
    #[error("the private key: {0}")]
    Key(String),
    /// The private key is not the one in the certificate.
    #[error("the private key does not belong to the certificate")]
    KeyMismatch,
    /// The authority did not issue the certificate.
    #[error("the certificate was not issued by this CA")]
    OtherAuthority,
}

impl Credentials {
    /// Reads three PEM files.
    ///
    /// # Errors
    ///
    /// [`CredentialsError`] that says which of the three is wrong.
    pub fn from_files(
        certificate: &Path,
        key: &Path,
        authority: &Path,
    ) -> Result<Self, CredentialsError> {
        let key = Zeroizing::new(read(key)?);
        Self::from_pem(&read(certificate)?, &key, &read(authority)?)
    }

    /// Reads three PEM texts.
    ///
    /// # Errors
    ///
    /// [`CredentialsError`] that says which of the three is wrong.
    pub fn from_pem(
        certificate: &str,
        key: &str,
        authority: &str,
    ) -> Result<Self, CredentialsError> {
        let chain =
            pem::decode_certificates(certificate).map_err(CredentialsError::CertificatePem)?;
        let mut authority =
            pem::decode_certificates(authority).map_err(CredentialsError::AuthorityPem)?;
        Self::from_parts(chain, key, authority.swap_remove(0))
    }

    /// Puts together what a join gave (`chain` and `authority`, DER) and the node's own key.
    ///
    /// # Errors
    ///
    /// [`CredentialsError`] that says which of the three is wrong.
    pub fn from_parts(
        chain: Vec<CertificateDer<'static>>,
        key_pem: &str,
        authority: CertificateDer<'static>,
    ) -> Result<Self, CredentialsError> {
        let (trust_domain, identity) =
            peer_identity(&chain).map_err(CredentialsError::Certificate)?;
        let own = chain
            .first()
            .ok_or(CredentialsError::Certificate(BadCertificate::Missing))?;
        let validity = Validity::of(own).map_err(CredentialsError::Certificate)?;
        check_issuer(own, &authority)?;
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
            .map_err(|error| CredentialsError::Key(error.to_string()))?;
        let certified = CertifiedKey::from_der(chain.clone(), key, &default_provider());
        let certified = certified.map_err(|error| {
            if matches!(error, rustls::Error::InconsistentKeys(_)) {
                CredentialsError::KeyMismatch
            } else {
                CredentialsError::Key(error.to_string())
            }
        })?;
        Ok(Self {
            mesh_id: mesh_id(&authority).map_err(CredentialsError::Authority)?,
            chain,
            key_pem: Arc::new(Zeroizing::new(key_pem.to_owned())),
            certified: Arc::new(certified),
            authority,
            trust_domain,
            identity,
            validity,
        })
    }

    /// The holder's certificate first, then its issuers without the root.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// [`Self::chain`] as PEM text.
    #[must_use]
    pub fn chain_pem(&self) -> String {
        pem::encode_certificates(&self.chain)
    }

    /// The private key as PEM text, wiped when it is dropped.
    #[must_use]
    pub fn key_pem(&self) -> Zeroizing<String> {
        Zeroizing::clone(&self.key_pem)
    }

    /// The authority's certificate.
    #[must_use]
    pub fn authority(&self) -> &CertificateDer<'static> {
        &self.authority
    }

    /// The authority's certificate as PEM text.
    #[must_use]
    pub fn authority_pem(&self) -> String {
        pem::encode("CERTIFICATE", &self.authority)
    }

    /// The mesh.
    #[must_use]
    pub fn mesh_id(&self) -> MeshId {
        self.mesh_id
    }

    /// The mesh's name.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// The holder.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// From when until when the holder's certificate is valid.
    #[must_use]
    pub fn validity(&self) -> Validity {
        self.validity
    }

    /// What rustls signs with.
    pub(crate) fn certified(&self) -> &Arc<CertifiedKey> {
        &self.certified
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("trust_domain", &self.trust_domain)
            .field("identity", &self.identity)
            .field("mesh_id", &self.mesh_id)
            .finish_non_exhaustive()
    }
}

fn read(path: &Path) -> Result<String, CredentialsError> {
    fs::read_to_string(path).map_err(|source| CredentialsError::Read {
        path: path.display().to_string(),
        source,
    })
}

fn check_issuer(
    own: &CertificateDer<'_>,
    authority: &CertificateDer<'_>,
) -> Result<(), CredentialsError> {
    let authority = parse(authority).map_err(CredentialsError::Authority)?;
    let own = parse(own).map_err(CredentialsError::Certificate)?;
    own.verify_signature(Some(authority.public_key()))
        .map_err(|_| CredentialsError::OtherAuthority)
}
