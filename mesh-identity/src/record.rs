//! What the mesh's authority signed, and anybody in the mesh can check offline: records of nodes, and heads of snapshots.

use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use rustls::pki_types::CertificateDer;

use crate::certificate::{BadCertificate, parse};

/// Stands before a record when it is signed, so that a signature over one kind of thing is never
/// one over another.
pub const RECORD_CONTEXT: &[u8] = b"holdfast node record v1\0";

/// The same, before the head of a snapshot.
pub const SNAPSHOT_CONTEXT: &[u8] = b"holdfast snapshot v1\0";

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
    verify(authority, &[RECORD_CONTEXT, record].concat(), signature)
}

/// Checks that the authority signed `head`, of a snapshot.
///
/// # Errors
///
/// [`BadRecord`].
pub fn verify_snapshot(
    authority: &CertificateDer<'_>,
    head: &[u8],
    signature: &[u8],
) -> Result<(), BadRecord> {
    verify(authority, &[SNAPSHOT_CONTEXT, head].concat(), signature)
}

fn verify(
    authority: &CertificateDer<'_>,
    signed: &[u8],
    signature: &[u8],
) -> Result<(), BadRecord> {
    let parsed = parse(authority)?;
    let point = &parsed.public_key().subject_public_key.data;
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point)
        .verify(signed, signature)
        .map_err(|_| BadRecord::Signature)
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::authority::CertificateAuthority;

    #[test]
    fn a_head_is_believed_of_the_authority_alone_and_is_no_record() {
        let mesh = CertificateAuthority::generate("demo", UNIX_EPOCH).unwrap();
        let other = CertificateAuthority::generate("demo", UNIX_EPOCH).unwrap();
        let signature = mesh.sign_snapshot(b"head").unwrap();
        let (ours, theirs) = (mesh.certificate_der(), other.certificate_der());
        assert_eq!(verify_snapshot(ours, b"head", &signature), Ok(()));
        let wrong = Err(BadRecord::Signature);
        assert_eq!(verify_snapshot(ours, b"Head", &signature), wrong);
        assert_eq!(verify_snapshot(theirs, b"head", &signature), wrong);
        assert_eq!(verify_record(ours, b"head", &signature), wrong);
        let record = mesh.sign_record(b"head").unwrap();
        assert_eq!(verify_snapshot(ours, b"head", &record), wrong);
    }
}
