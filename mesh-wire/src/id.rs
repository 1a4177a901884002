//! Ids of nodes, sites and relays, and what is derived from them.

use std::{
    borrow::Borrow,
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    str::FromStr,
    sync::Arc,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use ipnet::Ipv6Net;
use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

/// A node: its WireGuard (X25519) public key. Shown and parsed as base64, as `wg` does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub [u8; 32]);

/// Why a text is not a [`NodeId`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a WireGuard public key (44 characters of base64 for 32 bytes)")]
pub struct BadNodeId(String);

impl NodeId {
    /// The first ten characters of the base64 form: enough for a person to tell keys apart.
    #[must_use]
    pub fn short(&self) -> String {
        self.to_string().chars().take(10).collect()
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeId({})", self.short())
    }
}

impl FromStr for NodeId {
    type Err = BadNodeId;

    fn from_str(text: &str) -> Result<Self, BadNodeId> {
        let bytes = STANDARD.decode(text).ok();
        let key = bytes.and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
        key.map(Self).ok_or_else(|| BadNodeId(text.to_owned()))
    }
}

impl TryFrom<&[u8]> for NodeId {
    type Error = BadNodeId;

    fn try_from(bytes: &[u8]) -> Result<Self, BadNodeId> {
        let key = <[u8; 32]>::try_from(bytes);
        key.map(Self)
            .map_err(|_| BadNodeId(format!("{} bytes", bytes.len())))
    }
}

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a name: 1 to 63 of a-z, 0-9, `-` and (nodes only) `.`, beginning and ending with a letter or digit (RFC 1123)"
)]
pub struct BadName(String);

/// Longest name of a node, site or relay, in bytes: one DNS label (RFC 1035 §2.3.4).
pub const NAME_LEN_MAX: usize = 63;

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = BadName;

            fn from_str(text: &str) -> Result<Self, BadName> {
                if is_name(text) {
                    Ok(Self(text.into()))
                } else {
                    Err(BadName(text.to_owned()))
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadName;

            fn try_from(text: String) -> Result<Self, BadName> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0.as_ref().to_owned()
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type! {
    /// A node's name: what its operator calls it, unique in the mesh.
    NodeName
}
name_type! {
    /// A place whose nodes share a LAN.
    SiteName
}
name_type! {
    /// A relay's name, unique in the mesh.
    RelayName
}

fn is_name(text: &str) -> bool {
    let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-' || c == b'.';
    let outer = |c: &u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    text.len() <= NAME_LEN_MAX
        && text.bytes().all(inner)
        && !text.contains("..")
        && text.as_bytes().first().is_some_and(outer)
        && text.as_bytes().last().is_some_and(outer)
}

/// A relay as paths refer to it: the first 8 bytes of SHA-256 of its name, so that nobody has to
/// hand out numbers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelayId(pub u64);

impl From<&RelayName> for RelayId {
    fn from(name: &RelayName) -> Self {
        Self(u64::from_be_bytes(hash_prefix(&[name.as_str().as_bytes()])))
    }
}

impl fmt::Debug for RelayId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RelayId({:016x})", self.0)
    }
}

/// The way by which one encrypted packet travels to a peer.
///
/// Which transport a relay link uses (QUIC, TLS) is the link's business, not the path's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Via {
    /// Plain UDP from the node's own socket.
    Direct(SocketAddr),
    /// Through the node's link to this relay.
    Relay(RelayId),
}

/// A mesh: the SHA-256 of its certificate authority's public key (DER SubjectPublicKeyInfo).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MeshId(pub [u8; 32]);

impl fmt::Display for MeshId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for MeshId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MeshId({self})")
    }
}

impl MeshId {
    /// The mesh's IPv6 ULA prefix: `fd` and 40 bits of the id (RFC 4193 §3.2).
    #[must_use]
    pub fn ula_prefix(&self) -> Ipv6Net {
        let [a, b, c, d, e, ..] = self.0;
        let mut octets = [0; 16];
        octets[..6].copy_from_slice(&[0xfd, a, b, c, d, e]);
        Ipv6Net::new_assert(Ipv6Addr::from(octets), ULA_PREFIX_LEN)
    }

    /// The overlay IPv6 address of `node`: the mesh's prefix and 80 bits of the hash of its key.
    /// Two of 100,000 nodes share one with a probability of 10⁻¹⁴.
    #[must_use]
    pub fn overlay_v6(&self, node: &NodeId) -> Ipv6Addr {
        let host: [u8; 10] = hash_prefix(&[&node.0]);
        let mut octets = self.ula_prefix().addr().octets();
        octets[6..].copy_from_slice(&host);
        Ipv6Addr::from(octets)
    }
}

/// Bits of the mesh's ULA prefix (RFC 4193 §3.1).
pub const ULA_PREFIX_LEN: u8 = 48;

fn hash_prefix<const N: usize>(parts: &[&[u8]]) -> [u8; N] {
    const { assert!(N <= 32) };
    let hash = digest(&SHA256, &parts.concat());
    let mut prefix = [0; N];
    prefix.copy_from_slice(hash.as_ref().first_chunk::<N>().unwrap_or(&[0; N]));
    prefix
}

/// Who a certificate says its holder is: the SPIFFE URI in its subject alternative name.
///
/// * `spiffe://<trust domain>/node/<name>/<64 hex digits of the WireGuard key>`
/// * `spiffe://<trust domain>/relay/<name>`
/// * `spiffe://<trust domain>/controller`
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Identity {
    /// A node, with the WireGuard key that the controller bound to it.
    Node {
        /// Its name.
        name: NodeName,
        /// Its WireGuard key.
        id: NodeId,
    },
    /// A relay.
    Relay(RelayName),
    /// The controller.
    Controller,
}

/// Why a URI is not an [`Identity`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a Holdfast identity (spiffe://<mesh>/node/<name>/<key>, …/relay/<name> or …/controller)"
)]
pub struct BadIdentity(String);

impl Identity {
    /// The SPIFFE URI of this identity in `trust_domain`.
    #[must_use]
    pub fn to_uri(&self, trust_domain: &str) -> String {
        match self {
            Self::Node { name, id } => {
                format!("spiffe://{trust_domain}/node/{name}/{}", MeshId(id.0))
            }
            Self::Relay(name) => format!("spiffe://{trust_domain}/relay/{name}"),
            Self::Controller => format!("spiffe://{trust_domain}/controller"),
        }
    }

    /// Reads a SPIFFE URI: the trust domain, and who it names.
    ///
    /// # Errors
    ///
    /// [`BadIdentity`] with the URI if it has another form.
    pub fn parse_uri(uri: &str) -> Result<(String, Self), BadIdentity> {
        let bad = || BadIdentity(uri.to_owned());
        let rest = uri.strip_prefix("spiffe://").ok_or_else(bad)?;
        let (trust_domain, path) = rest.split_once('/').ok_or_else(bad)?;
        let mut parts = path.split('/');
        let identity = match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some("node"), Some(name), Some(key), None) => Self::Node {
                name: name.parse().map_err(|_| bad())?,
                id: NodeId(parse_hex(key).ok_or_else(bad)?),
            },
            (Some("relay"), Some(name), None, None) => {
                Self::Relay(name.parse().map_err(|_| bad())?)
            }
            (Some("controller"), None, None, None) => Self::Controller,
            _ => return Err(bad()),
        };
        Ok((trust_domain.to_owned(), identity))
    }
}

fn parse_hex(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

/// `address` with an IPv4-mapped IPv6 address turned into the IPv4 address that it means.
#[must_use]
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(canonical_ip(address.ip()), address.port())
}

/// `address` with an IPv4-mapped IPv6 address turned into the IPv4 address that it means.
#[must_use]
pub fn canonical_ip(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_id_reads_back_from_what_wg_shows() {
        let id = NodeId([7; 32]);
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn names_that_are_not_dns_labels_are_refused() {
        for bad in ["", "-a", "a-", "A", "a_b", "a..b", &"x".repeat(64)] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad:?}");
        }
        assert_eq!("edge-a1".parse::<NodeName>().unwrap().as_str(), "edge-a1");
    }

    #[test]
    fn an_identity_reads_back_from_its_uri() {
        let node = Identity::Node {
            name: "edge-a1".parse().unwrap(),
            id: NodeId([0xa5; 32]),
        };
        let relay = Identity::Relay("r1".parse().unwrap());
        for identity in [node, relay, Identity::Controller] {
            let uri = identity.to_uri("demo");
            assert_eq!(Identity::parse_uri(&uri), Ok(("demo".to_owned(), identity)));
        }
    }

    #[test]
    fn overlay_addresses_lie_in_the_mesh_prefix_and_differ_by_key() {
        let mesh = MeshId([9; 32]);
        let (a, b) = (
            mesh.overlay_v6(&NodeId([1; 32])),
            mesh.overlay_v6(&NodeId([2; 32])),
        );
        assert!(mesh.ula_prefix().contains(&a) && a != b);
    }
}
