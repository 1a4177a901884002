//! PEM text (RFC 7468).

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};

/// Characters in a line of PEM (RFC 7468 §2).
const LINE_LEN: usize = 64;

/// `der` as PEM text under `label`, for example `CERTIFICATE`.
#[must_use]
pub fn encode(label: &str, der: &[u8]) -> String {
    let body = STANDARD.encode(der);
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in body.as_bytes().chunks(LINE_LEN) {
        text.extend(line.iter().map(|&byte| char::from(byte)));
        text.push('\n');
    }
    text + "-----END " + label + "-----\n"
}

/// Certificates as PEM text, one after the other.
pub fn encode_certificates<'a>(
    certificates: impl IntoIterator<Item = &'a CertificateDer<'a>>,
) -> String {
    let blocks = certificates.into_iter();
    blocks.map(|der| encode("CERTIFICATE", der)).collect()
}

/// Why a text holds no certificates.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadPem {
    /// There is no certificate in it.
    #[error("no PEM block `CERTIFICATE` in it")]
    Empty,
    /// It is broken.
    #[error("broken PEM: {0}")]
    Broken(String),
}

/// Reads every certificate in `text`; other blocks are passed over.
///
/// # Errors
///
/// [`BadPem`] if there is none, or if a block is broken.
pub fn decode_certificates(text: &str) -> Result<Vec<CertificateDer<'static>>, BadPem> {
    let blocks = CertificateDer::pem_slice_iter(text.as_bytes());
    let certificates: Vec<_> = blocks
        .collect::<Result<_, _>>()
        .map_err(|error| BadPem::Broken(error.to_string()))?;
    if certificates.is_empty() {
        return Err(BadPem::Empty);
    }
    Ok(certificates)
}
