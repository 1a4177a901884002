//! The signed head of a snapshot: what all resources of one generation are, and which of two generations is newer.

use mesh_core::offline::Version;
use mesh_identity::{
    authority::{CertificateAuthority, IssueError},
    record::{BadRecord, verify_snapshot},
};
use prost::Message as _;
use tokio_rustls::rustls::pki_types::CertificateDer;

use crate::{
    control::{Head, SignedHead},
    resources::{Resources, digest::whole},
};

/// Why resources are not what a head says, or the head is not to be believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadHead {
    /// It cannot be read.
    #[error("the head of the snapshot is no such message")]
    Malformed,
    /// The authority did not sign it.
    #[error("the head of the snapshot: {0}")]
    Record(#[from] BadRecord),
    /// The resources are others.
    #[error("the resources are not those that the head was signed for")]
    OtherResources,
}

impl Head {
    /// Which of two is newer.
    #[must_use]
    pub fn version(&self) -> Version {
        Version {
            epoch: self.epoch,
            made_unix_ms: self.made_unix_ms,
        }
    }

    /// Signs it.
    ///
    /// # Errors
    ///
    /// When the system gives no random bytes.
    pub fn sign(&self, authority: &CertificateAuthority) -> Result<SignedHead, IssueError> {
        let head = self.encode_to_vec();
        let signature = authority.sign_snapshot(&head)?;
        Ok(SignedHead { head, signature })
    }

    /// Checks that the resources are those that it was signed for. Of 100,000 it takes some 0.1 s.
    ///
    /// # Errors
    ///
    /// [`BadHead::OtherResources`].
    pub fn check(&self, resources: &Resources) -> Result<(), BadHead> {
        if self.digest == whole(resources) {
            Ok(())
        } else {
            Err(BadHead::OtherResources)
        }
    }
}

impl SignedHead {
    /// What it says, once it is known that the authority signed it.
    ///
    /// # Errors
    ///
    /// [`BadHead`].
    pub fn verify(&self, authority: &CertificateDer<'_>) -> Result<Head, BadHead> {
        verify_snapshot(authority, &self.head, &self.signature)?;
        self.read().ok_or(BadHead::Malformed)
    }

    /// What it says, of one that was verified before it was kept, or came by TLS from who signs it.
    #[must_use]
    pub fn read(&self) -> Option<Head> {
        Head::decode(self.head.as_slice()).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    fn head() -> Head {
        Head {
            generation: 7,
            digest: whole(&Resources::new()).to_vec(),
            ..Head::default()
        }
    }

    #[test]
    fn a_head_counts_in_its_mesh_for_its_resources_and_as_it_was_signed() {
        let mesh = CertificateAuthority::generate("demo", UNIX_EPOCH).unwrap();
        let authority = mesh.certificate_der();
        let head = head();
        let signed = head.sign(&mesh).unwrap();
        assert_eq!(signed.verify(authority), Ok(head.clone()));
        assert_eq!(head.check(&Resources::new()), Ok(()));

        let mut other = head.clone();
        other.digest[0] ^= 1;
        assert_eq!(other.check(&Resources::new()), Err(BadHead::OtherResources));
        let forged = SignedHead {
            head: other.encode_to_vec(),
            ..signed.clone()
        };
        assert!(matches!(forged.verify(authority), Err(BadHead::Record(_))));
        let other_mesh = CertificateAuthority::generate("demo", UNIX_EPOCH).unwrap();
        let strange = head.sign(&other_mesh).unwrap();
        assert!(matches!(strange.verify(authority), Err(BadHead::Record(_))));
        let no_message = SignedHead {
            signature: mesh.sign_snapshot(b"\xff").unwrap(),
            head: b"\xff".to_vec(),
        };
        assert_eq!(no_message.verify(authority), Err(BadHead::Malformed));
    }
}
