//! Keys, wiped from memory when dropped and never shown.

use std::fmt;

use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use crate::mac::{self, LABEL_COOKIE, LABEL_MAC1};

/// This device's X25519 key pair, and what is derived from it once.
pub struct LocalKey {
    private: Zeroizing<[u8; 32]>,
    public: [u8; 32],
    mac1_key: [u8; 32],
    cookie_key: [u8; 32],
}

impl LocalKey {
    /// Takes the 32 bytes of a private key.
    #[must_use]
    pub fn new(private: [u8; 32]) -> Self {
        let secret = StaticSecret::from(private);
        let public = PublicKey::from(&secret).to_bytes();
        Self {
            private: Zeroizing::new(private),
            public,
            mac1_key: mac::hash(LABEL_MAC1, &public),
            cookie_key: mac::hash(LABEL_COOKIE, &public),
        }
    }

    /// The public half.
    #[must_use]
    pub fn public(&self) -> [u8; 32] {
        self.public
    }

    pub(crate) fn private(&self) -> &[u8; 32] {
        &self.private
    }

    pub(crate) fn mac1_key(&self) -> &[u8; 32] {
        &self.mac1_key
    }

    pub(crate) fn cookie_key(&self) -> &[u8; 32] {
        &self.cookie_key
    }
}

impl fmt::Debug for LocalKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LocalKey(…)")
    }
}

/// A symmetric key that two peers share besides their key pairs; zeros when they share none
/// (the paper, §5.2).
#[derive(Clone, Default, PartialEq, Eq)]
pub struct PresharedKey(Zeroizing<[u8; 32]>);

impl PresharedKey {
    /// Takes the 32 bytes.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The 32 bytes, for whoever has to pass the key on.
    #[must_use]
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedKey(…)")
    }
}
