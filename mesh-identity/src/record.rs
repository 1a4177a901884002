//! Records signed by the mesh's authority, which anybody in the mesh can check offline.

use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use rustls::pki_types::CertificateDer;

use crate::certificate::{BadCertificate, parse};

/// Stands before a record when it is signed, so that a signature over one kind of thing is never
/// one over another.
pub const RECORD_CONTEXT: &[u8] = b"holdfast node record v1\0";

/// Why a record is not to be believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadRecord {
    /// The authority's certificate cannot be read.
    #[error("the authority's certificate: {0}")]
    Authority(#[from] BadCertificate),
    /// The signature is not the authority's.
    #[error("its signature is not that of this mesh's authority")]
    Signature,
}

/// Checks that the authority signed `record`.
///
/// # Errors
///
/// [`BadRecord`].
pub fn verify_record(
    authority: &CertificateDer<'_>,
    record: &[u8],
    signature: &[u8],
) -> Result<(), BadRecord> {
    let parsed = parse(authority)?;
    let point = &parsed.public_key().subject_public_key.data;
    let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point);
    key.verify(&signed_bytes(record), signature)
        .map_err(|_| BadRecord::Signature)
}

pub(crate) fn signed_bytes(record: &[u8]) -> Vec<u8> {
    [RECORD_CONTEXT, record].concat()
}
