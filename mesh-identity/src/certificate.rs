//! What a certificate says: who its holder is, from when until when.

use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use mesh_wire::id::{BadIdentity, Identity, MeshId};
use ring::digest::{SHA256, digest};
use rustls::pki_types::CertificateDer;
use x509_parser::{extensions::GeneralName, prelude::X509Certificate, time::ASN1Time};

/// The shortest time for which a node's certificate is valid; it is renewed at half of its time ([`node_lifetime`]).
pub const NODE_LIFETIME_MIN: Duration = Duration::from_secs(30 * DAY_S);

/// The longest: a node that nobody sees for a year, and whose mesh sets no limit, is let in again. Whoever steals a key has a
/// relay's service for no longer.
pub const NODE_LIFETIME_MAX: Duration = Duration::from_secs(2 * 365 * DAY_S);

/// How long a relay's certificate is valid. The operator carries it there by hand.
pub const RELAY_LIFETIME: Duration = Duration::from_secs(365 * DAY_S);

/// How long the controller's own certificate is valid: it makes a new one at each start and
/// once it is half over.
pub const CONTROLLER_LIFETIME: Duration = Duration::from_secs(30 * DAY_S);

/// How long the certificate authority is valid.
pub const AUTHORITY_LIFETIME: Duration = Duration::from_secs(10 * 365 * DAY_S);

/// How far `notBefore` is set back: clocks that lag by less than this see no difference.
pub const BACK_DATE: Duration = Duration::from_secs(3600);

const DAY_S: u64 = 86_400;

/// How long a node's certificate is valid in a mesh whose nodes count on what they have for `offline_limit`; `None`: for ever.
///
/// Twice as long, within bounds: it is renewed at half, so that at least that half, the limit, is left whenever the node is
/// cut off. It is then let in by relays and controllers for as long as it counts on what it has, up to a limit of a year.
#[must_use]
pub fn node_lifetime(offline_limit: Option<Duration>) -> Duration {
    offline_limit.map_or(NODE_LIFETIME_MAX, |limit| {
        limit
            .saturating_mul(2)
            .clamp(NODE_LIFETIME_MIN, NODE_LIFETIME_MAX)
    })
}

/// Why bytes are not a certificate of this mesh's kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadCertificate {
    /// No X.509 certificate.
    #[error("not an X.509 certificate: {0}")]
    NotX509(String),
    /// No URI, or more than one, in its subject alternative name.
    #[error("has {0} URIs in its subject alternative name, not one")]
    Uris(usize),
    /// The URI is of another form.
    #[error(transparent)]
    Identity(#[from] BadIdentity),
    /// There is no certificate at all.
    #[error("no certificate was shown")]
    Missing,
}

/// From when until when a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// Not before this.
    pub not_before: SystemTime,
    /// Not after this.
    pub not_after: SystemTime,
}

impl Validity {
    /// Valid for `lifetime` from `now` on, and set back by [`BACK_DATE`].
    #[must_use]
    pub fn from_now(now: SystemTime, lifetime: Duration) -> Self {
        Self {
            not_before: now.checked_sub(BACK_DATE).unwrap_or(UNIX_EPOCH),
            not_after: now + lifetime,
        }
    }

    /// What `certificate` says.
    ///
    /// # Errors
    ///
    /// [`BadCertificate::NotX509`].
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, BadCertificate> {
        let parsed = parse(certificate)?;
        Ok(Self {
            not_before: system_time(parsed.validity().not_before),
            not_after: system_time(parsed.validity().not_after),
        })
    }

    /// When to ask for the next one: at half of the lifetime.
    #[must_use]
    pub fn renew_at(&self) -> SystemTime {
        let lifetime = self.not_after.duration_since(self.not_before);
        self.not_before + lifetime.unwrap_or_default() / 2
    }

    /// What is left of it; zero once it is over.
    #[must_use]
    pub fn remaining(&self, now: SystemTime) -> Duration {
        self.not_after.duration_since(now).unwrap_or_default()
    }
}

/// The trust domain and the identity in the first (the holder's own) of `certificates`. That it
/// is genuine was the TLS handshake's business.
///
/// # Errors
///
/// [`BadCertificate`] if there is none, or if it names nobody of a mesh.
pub fn peer_identity(
    certificates: &[CertificateDer<'_>],
) -> Result<(String, Identity), BadCertificate> {
    let own = certificates.first().ok_or(BadCertificate::Missing)?;
    Ok(Identity::parse_uri(&uri(own)?)?)
}

/// The mesh whose authority's certificate this is: SHA-256 of its SubjectPublicKeyInfo.
///
/// # Errors
///
/// [`BadCertificate::NotX509`].
pub fn mesh_id(authority: &CertificateDer<'_>) -> Result<MeshId, BadCertificate> {
    let parsed = parse(authority)?;
    let hash = digest(&SHA256, parsed.public_key().raw);
    let hash = hash.as_ref().first_chunk().copied();
    Ok(MeshId(hash.unwrap_or_default()))
}

/// The SHA-256 of the public key in a certificate, whoever it belongs to.
///
/// # Errors
///
/// [`BadCertificate::NotX509`].
pub fn public_key_hash(certificate: &CertificateDer<'_>) -> Result<[u8; 32], BadCertificate> {
    mesh_id(certificate).map(|MeshId(hash)| hash)
}

/// The serial number of a certificate, in hexadecimal digits.
///
/// # Errors
///
/// [`BadCertificate::NotX509`].
pub fn serial(certificate: &CertificateDer<'_>) -> Result<String, BadCertificate> {
    let parsed = parse(certificate)?;
    Ok(parsed.raw_serial_as_string().replace(':', ""))
}

/// By which names a certificate's holder is known outside the mesh.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Holder {
    /// Common names.
    pub common_names: Vec<String>,
    /// Organizations.
    pub organizations: Vec<String>,
    /// URIs in the subject alternative name.
    pub uris: Vec<String>,
}

impl Holder {
    /// What `certificate`, of whatever authority, says. Names that are no text are left out.
    ///
    /// # Errors
    ///
    /// [`BadCertificate::NotX509`].
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, BadCertificate> {
        let parsed = parse(certificate)?;
        let subject = parsed.subject();
        let text = |name: &x509_parser::x509::AttributeTypeAndValue<'_>| {
            name.as_str().ok().map(str::to_owned)
        };
        Ok(Self {
            common_names: subject.iter_common_name().filter_map(text).collect(),
            organizations: subject.iter_organization().filter_map(text).collect(),
            uris: uris(&parsed).into_iter().map(str::to_owned).collect(),
        })
    }
}

/// The only URI in the subject alternative name.
pub(crate) fn uri(certificate: &CertificateDer<'_>) -> Result<String, BadCertificate> {
    match uris(&parse(certificate)?).as_slice() {
        [uri] => Ok((*uri).to_owned()),
        others => Err(BadCertificate::Uris(others.len())),
    }
}

fn uris<'a>(certificate: &X509Certificate<'a>) -> Vec<&'a str> {
    let names = certificate.subject_alternative_name().ok().flatten();
    let names = names.map(|names| &names.value.general_names);
    let uris = names.into_iter().flatten().filter_map(|name| {
        if let GeneralName::URI(uri) = name {
            Some(*uri)
        } else {
            None
        }
    });
    uris.collect()
}

pub(crate) fn parse<'a>(
    certificate: &'a CertificateDer<'_>,
) -> Result<X509Certificate<'a>, BadCertificate> {
    let parsed = x509_parser::parse_x509_certificate(certificate);
    let (_, parsed) = parsed.map_err(|error| BadCertificate::NotX509(error.to_string()))?;
    Ok(parsed)
}

fn system_time(time: ASN1Time) -> SystemTime {
    let seconds = u64::try_from(time.timestamp()).unwrap_or(0);
    UNIX_EPOCH + Duration::from_secs(seconds)
}

/// A moment, as a person reads it: in UTC, to the second.
#[derive(Debug, Clone, Copy)]
pub struct Moment(pub SystemTime);

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.duration_since(UNIX_EPOCH).unwrap_or_default();
        let shown = i64::try_from(seconds.as_secs()).ok();
        match shown.and_then(|seconds| ASN1Time::from_timestamp(seconds).ok()) {
            Some(time) => {
                let time = time.to_datetime();
                let (month, day) = (u8::from(time.month()), time.day());
                let (hour, minute, second) = time.to_hms();
                let year = time.year();
                write!(
                    f,
                    "{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC"
                )
            }
            None => write!(f, "{} s after 1970", seconds.as_secs()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    #[test]
    fn a_moment_is_written_as_everywhere() {
        let moment = Moment(UNIX_EPOCH + Duration::from_secs(1_795_401_253));
        assert_eq!(moment.to_string(), "2026-11-23 02:34:13 UTC");
    }

    #[test]
    fn a_holder_of_any_authority_has_all_its_names() {
        let mut params = CertificateParams::default();
        let subject = &mut params.distinguished_name;
        subject.push(DnType::CommonName, "kube-apiserver");
        subject.push(DnType::OrganizationName, "system:masters");
        for uri in ["spiffe://m/a", "urn:b"] {
            let uri = SanType::URI(uri.try_into().unwrap());
            params.subject_alt_names.push(uri);
        }
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let holder = Holder::of(certificate.der()).unwrap();
        let expected = Holder {
            common_names: vec!["kube-apiserver".to_owned()],
            organizations: vec!["system:masters".to_owned()],
            uris: vec!["spiffe://m/a".to_owned(), "urn:b".to_owned()],
        };
        assert_eq!(holder, expected);
    }
}
