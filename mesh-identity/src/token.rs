//! Join tokens: what an operator carries to a new node.

use std::{fmt, str::FromStr};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use mesh_wire::id::MeshId;
use ring::{
    digest::{SHA256, digest},
    rand::{SecureRandom as _, SystemRandom},
};
use zeroize::Zeroizing;

use crate::authority::check_trust_domain;

/// Bytes of a token's secret: 192 bits, so that its plain hash can be kept without a slow one.
const SECRET_LEN: usize = 24;

/// Bytes of a token's id.
const ID_LEN: usize = 6;

const PREFIX: &str = "hf1.";

const ANCHOR_PREFIX: &str = "hfmesh1.";

/// A join token: `hf1.<trust domain>.<id>.<secret>.<mesh id>`.
///
/// It names the mesh (so that the node knows the right controller when it sees one) and proves
/// that its holder may join.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// The mesh's name.
    pub trust_domain: String,
    /// The token's id: no secret.
    pub id: String,
    secret: Zeroizing<String>,
    /// The mesh, and so the authority that the controller's certificate must come from.
    pub mesh: MeshId,
}

/// Why a text is not a token. It does not repeat the text, which may hold a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a join token: {0} (expected hf1.<mesh>.<id>.<secret>.<mesh id>, as `meshctl token create` prints it)"
)]
pub struct BadToken(&'static str);

/// The system gave no random bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the system gave no random bytes")]
pub struct NoRandomness;

impl JoinToken {
    /// Makes a token with a new id and a new secret.
    ///
    /// # Errors
    ///
    /// [`NoRandomness`].
    pub fn generate(trust_domain: &str, mesh: MeshId) -> Result<Self, NoRandomness> {
        let id = random::<ID_LEN>()?;
        let id = id.iter().map(|byte| format!("{byte:02x}")).collect();
        let secret = URL_SAFE_NO_PAD.encode(random::<SECRET_LEN>()?.as_slice());
        Ok(Self {
            trust_domain: trust_domain.to_owned(),
            id,
            secret: Zeroizing::new(secret),
            mesh,
        })
    }

    /// What the controller keeps instead of the secret.
    #[must_use]
    pub fn secret_hash(&self) -> [u8; 32] {
        let hash = digest(&SHA256, self.secret.as_bytes());
        hash.as_ref().first_chunk().copied().unwrap_or_default()
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            trust_domain,
            id,
            secret,
            mesh,
        } = self;
        write!(f, "{PREFIX}{trust_domain}.{id}.{}.{mesh}", secret.as_str())
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("trust_domain", &self.trust_domain)
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl FromStr for JoinToken {
    type Err = BadToken;

    fn from_str(text: &str) -> Result<Self, BadToken> {
        let rest = text.trim().strip_prefix(PREFIX);
        let rest = rest.ok_or(BadToken("it does not begin with `hf1.`"))?;
        // From the right: only the trust domain may hold dots.
        let mut parts = rest.rsplitn(4, '.');
        let mut next = || parts.next().ok_or(BadToken("a part is missing"));
        let (mesh, secret, id, trust_domain) = (next()?, next()?, next()?, next()?);
        check_trust_domain(trust_domain).map_err(|_| BadToken("its mesh name is none"))?;
        if id.len() != 2 * ID_LEN || !id.bytes().all(|c| c.is_ascii_hexdigit()) {
            return Err(BadToken("its id is not 12 hex digits"));
        }
        let decoded = URL_SAFE_NO_PAD.decode(secret).map(Zeroizing::new);
        if !decoded.is_ok_and(|bytes| bytes.len() == SECRET_LEN) {
            return Err(BadToken("its secret is damaged"));
        }
        Ok(Self {
            trust_domain: trust_domain.to_owned(),
            id: id.to_owned(),
            secret: Zeroizing::new(secret.to_owned()),
            mesh: parse_mesh_id(mesh).ok_or(BadToken("its mesh id is not 64 hex digits"))?,
        })
    }
}

/// Which mesh it is, for a node that proves in another way than by a [`JoinToken`] that it may join:
/// `hfmesh1.<trust domain>.<mesh id>`. It holds no secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshAnchor {
    /// The mesh's name.
    pub trust_domain: String,
    /// The mesh, and so the authority that the controller's certificate must come from.
    pub mesh: MeshId,
}

/// Why a text is not an anchor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a mesh's anchor: {0} (expected hfmesh1.<mesh>.<mesh id>, as the controller publishes it)"
)]
pub struct BadAnchor(&'static str);

impl fmt::Display for MeshAnchor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { trust_domain, mesh } = self;
        write!(f, "{ANCHOR_PREFIX}{trust_domain}.{mesh}")
    }
}

impl FromStr for MeshAnchor {
    type Err = BadAnchor;

    fn from_str(text: &str) -> Result<Self, BadAnchor> {
        let rest = text.trim().strip_prefix(ANCHOR_PREFIX);
        let rest = rest.ok_or(BadAnchor("it does not begin with `hfmesh1.`"))?;
        let parts = rest.rsplit_once('.');
        let (trust_domain, mesh) = parts.ok_or(BadAnchor("a part is missing"))?;
        check_trust_domain(trust_domain).map_err(|_| BadAnchor("its mesh name is none"))?;
        Ok(Self {
            trust_domain: trust_domain.to_owned(),
            mesh: parse_mesh_id(mesh).ok_or(BadAnchor("its mesh id is not 64 hex digits"))?,
        })
    }
}

fn random<const N: usize>() -> Result<Zeroizing<[u8; N]>, NoRandomness> {
    let mut bytes = Zeroizing::new([0; N]);
    let filled = SystemRandom::new().fill(bytes.as_mut_slice());
    filled.map_err(|_| NoRandomness)?;
    Ok(bytes)
}

fn parse_mesh_id(text: &str) -> Option<MeshId> {
    if text.len() != 64 || !text.bytes().all(|c| c.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(MeshId(bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_token_reads_back_also_when_the_mesh_name_has_dots() {
        for trust_domain in ["demo", "mesh.example.org"] {
            let token = JoinToken::generate(trust_domain, MeshId([7; 32])).unwrap();
            assert_eq!(token.to_string().parse(), Ok(token));
        }
    }

    #[test]
    fn an_anchor_reads_back_and_nothing_else_is_one() {
        for trust_domain in ["demo", "mesh.example.org"] {
            let anchor = MeshAnchor {
                trust_domain: trust_domain.to_owned(),
                mesh: MeshId([7; 32]),
            };
            let text = anchor.to_string();
            assert_eq!(format!("{text}\n").parse(), Ok(anchor));
            let short = text.get(..text.len() - 1).unwrap();
            for bad in [
                short,
                "",
                "hfmesh1.",
                "hf1.demo",
                text.replace(trust_domain, "").as_str(),
            ] {
                assert!(bad.parse::<MeshAnchor>().is_err(), "{bad}");
            }
        }
    }

    #[test]
    fn debug_and_errors_keep_the_secret() {
        let token = JoinToken::generate("demo", MeshId([7; 32])).unwrap();
        assert!(!format!("{token:?}").contains(token.secret.as_str()));
        let damaged = token.to_string().replace("hf1.", "hf2.");
        let error = damaged.parse::<JoinToken>().unwrap_err().to_string();
        assert!(!error.contains(token.secret.as_str()), "{error}");
    }

    proptest! {
        #[test]
        fn no_text_makes_parsing_panic(text: String) {
            text.parse::<JoinToken>().ok();
            format!("hf1.{text}").parse::<JoinToken>().ok();
        }
    }
}
