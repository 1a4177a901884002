//! The hashes around the handshake (the paper, §5.4.4): mac1, mac2, and the keys they use.

use blake2::{
    Blake2s256, Blake2sMac,
    digest::{Digest, FixedOutput, KeyInit as _, Update as _, consts::U16},
};

pub(crate) const LABEL_MAC1: &[u8] = b"mac1----";
pub(crate) const LABEL_COOKIE: &[u8] = b"cookie--";

/// Bytes of mac1, mac2 and a cookie.
pub(crate) const MAC_LEN: usize = 16;

/// `Hash(label ‖ key)`.
pub(crate) fn hash(label: &[u8], key: &[u8; 32]) -> [u8; 32] {
    let mut hasher = Blake2s256::new();
    Digest::update(&mut hasher, label);
    Digest::update(&mut hasher, key);
    hasher.finalize().into()
}

/// `Mac(key, parts…)`: keyed BLAKE2s of 16 bytes. `key` has 16 or 32 bytes.
pub(crate) fn mac(key: &[u8], parts: &[&[u8]]) -> [u8; MAC_LEN] {
    // BLAKE2s takes keys of up to 32 bytes; every key here is one of two arrays.
    let Ok(mut mac) = Blake2sMac::<U16>::new_from_slice(key) else {
        return [0; MAC_LEN];
    };
    for part in parts {
        mac.update(part);
    }
    mac.finalize_fixed().into()
}

/// Whether two MACs are the same, in a time that does not depend on where they differ.
pub(crate) fn equal(one: &[u8; MAC_LEN], other: &[u8; MAC_LEN]) -> bool {
    let difference = one.iter().zip(other).fold(0, |sum, (a, b)| sum | (a ^ b));
    std::hint::black_box(difference) == 0
}
