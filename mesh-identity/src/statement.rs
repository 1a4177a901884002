//! What a holder of a certificate says of itself, signed with the certificate's key: for those who cannot ask it by TLS.

use mesh_wire::id::Identity;
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use rustls::{SignatureScheme, pki_types::CertificateDer};

use crate::{
    certificate::{BadCertificate, parse, peer_identity},
    credentials::Credentials,
};

/// Stands before a statement when it is signed, so that a signature over one kind of thing is never one over another. (In
/// TLS 1.3 the same key signs what begins with 64 spaces: RFC 8446, section 4.4.3.)
pub const STATEMENT_CONTEXT: &[u8] = b"holdfast node statement v1\0";

/// Why a statement is not to be believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadStatement {
    /// One of the certificates cannot be read, or names nobody of a mesh.
    #[error("the certificate: {0}")]
    Certificate(#[from] BadCertificate),
    /// The authority did not issue the certificate.
    #[error("its certificate was not issued by this mesh's authority")]
    OtherAuthority,
    /// The signature is not the certificate's holder's.
    #[error("its signature is not that of its certificate's holder")]
    Signature,
}

/// Why a statement could not be signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The key is of another kind.
    #[error("the key cannot sign with ECDSA P-256")]
    KeyKind,
    /// The library refused.
    #[error("signing: {0}")]
    Signing(#[from] rustls::Error),
}

impl Credentials {
    /// Signs a statement of the holder's: ECDSA P-256 SHA-256 (ASN.1) over [`STATEMENT_CONTEXT`] and the statement.
    ///
    /// # Errors
    ///
    /// [`SignError`]: the key is of another kind, or the system gives no random bytes.
    pub fn sign_statement(&self, statement: &[u8]) -> Result<Vec<u8>, SignError> {
        let scheme = [SignatureScheme::ECDSA_NISTP256_SHA256];
        let signer = self.certified().key.choose_scheme(&scheme);
        let signer = signer.ok_or(SignError::KeyKind)?;
        Ok(signer.sign(&signed_bytes(statement))?)
    }
}

/// Checks that `authority` issued `certificate`, and that its holder signed `statement`; says who that is.
///
/// From when until when the certificate is valid does not count: this is for nodes whose clocks nobody set. Whether the
/// holder still belongs to the mesh is for the caller to know.
///
/// # Errors
///
/// [`BadStatement`].
pub fn verify_statement(
    authority: &CertificateDer<'_>,
    certificate: &CertificateDer<'_>,
    statement: &[u8],
    signature: &[u8],
) -> Result<Identity, BadStatement> {
    let authority = parse(authority)?;
    let parsed = parse(certificate)?;
    parsed
        .verify_signature(Some(authority.public_key()))
        .map_err(|_| BadStatement::OtherAuthority)?;
    let point = &parsed.public_key().subject_public_key.data;
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point)
        .verify(&signed_bytes(statement), signature)
        .map_err(|_| BadStatement::Signature)?;
    let (_, identity) = peer_identity(std::slice::from_ref(certificate))?;
    Ok(identity)
}

fn signed_bytes(statement: &[u8]) -> Vec<u8> {
    [STATEMENT_CONTEXT, statement].concat()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime, UNIX_EPOCH};

    use mesh_wire::id::NodeId;

    use super::*;
    use crate::{
        authority::{CertificateAuthority, new_key},
        certificate::Validity,
    };

    const AT: SystemTime = UNIX_EPOCH;

    fn node(authority: &CertificateAuthority, name: &str) -> Credentials {
        let key = new_key().unwrap();
        let identity = Identity::Node {
            name: name.parse().unwrap(),
            id: NodeId([7; 32]),
        };
        // Long over.
        let validity = Validity::from_now(AT, Duration::from_secs(60));
        let certificate = authority.issue(&identity, &key.csr_der, validity).unwrap();
        let chain = vec![certificate];
        Credentials::from_parts(chain, &key.key_pem, authority.certificate_der().clone()).unwrap()
    }

    #[test]
    fn a_statement_is_believed_of_its_holder_whatever_the_time_is_and_of_nobody_else() {
        let authority = CertificateAuthority::generate("demo.holdfast", AT).unwrap();
        let (a, b) = (node(&authority, "edge-a1"), node(&authority, "edge-b1"));
        let signature = a.sign_statement(b"here I am").unwrap();
        let check = |credentials: &Credentials, statement: &[u8], signature: &[u8]| {
            let certificate = &credentials.chain()[0];
            verify_statement(
                authority.certificate_der(),
                certificate,
                statement,
                signature,
            )
        };
        assert_eq!(
            check(&a, b"here I am", &signature).as_ref(),
            Ok(a.identity())
        );
        let wrong = Err(BadStatement::Signature);
        assert_eq!(check(&b, b"here I am", &signature), wrong);
        assert_eq!(check(&a, b"here I was", &signature), wrong);
        assert_eq!(check(&a, b"here I am", &[]), wrong);

        let other = CertificateAuthority::generate("demo.holdfast", AT).unwrap();
        let stranger = node(&other, "edge-a1");
        let signature = stranger.sign_statement(b"here I am").unwrap();
        let found = check(&stranger, b"here I am", &signature);
        assert_eq!(found, Err(BadStatement::OtherAuthority));
        let garbage = CertificateDer::from(vec![1, 2, 3]);
        let found = verify_statement(authority.certificate_der(), &garbage, b"", &signature);
        assert!(
            matches!(found, Err(BadStatement::Certificate(_))),
            "{found:?}"
        );
    }

    #[test]
    fn a_signature_over_a_record_is_none_over_a_statement() {
        let authority = CertificateAuthority::generate("demo.holdfast", AT).unwrap();
        let signature = authority.sign_record(b"x").unwrap();
        let own = authority.certificate_der();
        let found = verify_statement(own, own, b"x", &signature);
        assert_eq!(found, Err(BadStatement::Signature));
    }

    #[test]
    fn a_certificate_is_short_enough_to_be_announced() {
        let authority = CertificateAuthority::generate("demo.holdfast", AT).unwrap();
        let usual = node(&authority, "edge-a1").chain()[0].len();
        assert!(usual < 700, "{usual}");
        eprintln!("a certificate has {usual} bytes");
    }
}
