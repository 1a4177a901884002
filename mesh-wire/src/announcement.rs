//! What a node says to all on its LAN: who it is and where, so that others of its mesh call it without a controller or a
//! relay. One datagram: a few bytes by which others' are passed over, the statement, the certificate of who makes it, and
//! its signature, which `mesh-identity` makes and checks.
//!
//! **A replayed announcement** says where a node was. Whoever repeats one, from anywhere, makes a node try a handshake at an
//! address that the announced one signed for, on this LAN; it fails unless that node answers. Nothing else follows from it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use prost::Message as _;

use crate::id::{MeshId, NodeId};

/// UDP port of announcements, beside WireGuard's usual one; and TCP port at which neighbours are asked for the state of the mesh.
pub const PORT: u16 = 51_818;

/// Where they go: a group for private use (RFC 2365, section 6.2), which no router passes on at a TTL of 1.
pub const GROUP_V4: Ipv4Addr = Ipv4Addr::new(239, 255, 72, 70);

/// The same for IPv6: transient, of link-local scope (RFC 4291, section 2.7).
pub const GROUP_V6: Ipv6Addr = Ipv6Addr::new(0xff12, 0, 0, 0, 0, 0, 0, 0x4846);

/// Longest announcement: with IPv6's and UDP's headers one packet on every link (RFC 8200, section 5). Usual ones, with a
/// certificate of 600 bytes, have 850.
pub const LEN_MAX: usize = 1_232;

/// Most addresses of one interface in an announcement.
pub const ADDRESSES_MAX: usize = 8;

/// What announcements begin with: letters, and the number of their form.
const MAGIC: [u8; 4] = *b"HFn1";

/// So much of the mesh's id stands in the clear.
const MESH_LEN: usize = 8;

/// What a node says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    /// The mesh.
    pub mesh: MeshId,
    /// The node.
    pub node: NodeId,
    /// The UDP port of its tunnel.
    pub port: u16,
    /// Its addresses on this LAN, link-local ones too; at most [`ADDRESSES_MAX`], more are cut off.
    pub addresses: Vec<IpAddr>,
    /// Which state of the mesh it can give, signed: its epoch, and when it was made (milliseconds since 1970). 0: none.
    pub epoch: u64,
    /// See `epoch`.
    pub made_unix_ms: u64,
    /// Chosen by chance at its start.
    pub boot: u64,
    /// Counts up with each announcement since.
    pub count: u64,
}

/// An announcement as it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    /// What [`Announcement::encode`] gave: what is signed.
    pub statement: Vec<u8>,
    /// Whose certificate (X.509, DER).
    pub certificate: Vec<u8>,
    /// The signature by the certificate's key.
    pub signature: Vec<u8>,
}

/// Why a datagram is no announcement, or none for this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadAnnouncement {
    /// Something else, or from a version that this one does not know.
    #[error("malformed announcement")]
    Malformed,
    /// Of another mesh.
    #[error("an announcement of another mesh")]
    OtherMesh,
}

/// An announcement is longer than [`LEN_MAX`]: the certificate's names are too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "an announcement of {0} bytes, and {LEN_MAX} is the most: the names of mesh and node are too long"
)]
pub struct TooLong(pub usize);

mod proto {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Statement {
        #[prost(bytes = "vec", tag = "1")]
        pub(super) mesh: Vec<u8>,
        #[prost(bytes = "vec", tag = "2")]
        pub(super) node: Vec<u8>,
        #[prost(uint32, tag = "3")]
        pub(super) port: u32,
        /// 4 or 16 bytes each.
        #[prost(bytes = "vec", repeated, tag = "4")]
        pub(super) addresses: Vec<Vec<u8>>,
        #[prost(fixed64, tag = "6")]
        pub(super) boot: u64,
        #[prost(uint64, tag = "7")]
        pub(super) count: u64,
        // 5 was the generation.
        #[prost(uint64, tag = "8")]
        pub(super) epoch: u64,
        #[prost(uint64, tag = "9")]
        pub(super) made_unix_ms: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Signed {
        #[prost(bytes = "vec", tag = "1")]
        pub(super) statement: Vec<u8>,
        #[prost(bytes = "vec", tag = "2")]
        pub(super) certificate: Vec<u8>,
        #[prost(bytes = "vec", tag = "3")]
        pub(super) signature: Vec<u8>,
    }
}

impl Announcement {
    /// The bytes to be signed.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let octets = |ip: &IpAddr| match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        let addresses = self.addresses.iter().take(ADDRESSES_MAX);
        let statement = proto::Statement {
            mesh: self.mesh.0.to_vec(),
            node: self.node.0.to_vec(),
            port: self.port.into(),
            addresses: addresses.map(octets).collect(),
            epoch: self.epoch,
            made_unix_ms: self.made_unix_ms,
            boot: self.boot,
            count: self.count,
        };
        statement.encode_to_vec()
    }

    /// Reads a statement.
    ///
    /// # Errors
    ///
    /// [`BadAnnouncement::Malformed`]: count it and drop it.
    pub fn decode(statement: &[u8]) -> Result<Self, BadAnnouncement> {
        let bad = BadAnnouncement::Malformed;
        let read = proto::Statement::decode(statement).map_err(|_| bad)?;
        let port = u16::try_from(read.port).ok().filter(|port| *port != 0);
        if read.addresses.len() > ADDRESSES_MAX {
            return Err(bad);
        }
        let address = |bytes: &Vec<u8>| {
            let v4 = <[u8; 4]>::try_from(bytes.as_slice()).map(IpAddr::from);
            v4.or_else(|_| <[u8; 16]>::try_from(bytes.as_slice()).map(IpAddr::from))
                .map_err(|_| bad)
        };
        Ok(Self {
            mesh: MeshId(read.mesh.try_into().map_err(|_| bad)?),
            node: NodeId(read.node.try_into().map_err(|_| bad)?),
            port: port.ok_or(bad)?,
            addresses: read
                .addresses
                .iter()
                .map(address)
                .collect::<Result<_, _>>()?,
            epoch: read.epoch,
            made_unix_ms: read.made_unix_ms,
            boot: read.boot,
            count: read.count,
        })
    }
}

impl Signed {
    /// The datagram.
    ///
    /// # Errors
    ///
    /// [`TooLong`]: it would not be one packet everywhere.
    pub fn encode(self, mesh: &MeshId) -> Result<Vec<u8>, TooLong> {
        let body = proto::Signed {
            statement: self.statement,
            certificate: self.certificate,
            signature: self.signature,
        };
        let datagram = [&MAGIC, &mesh.0[..MESH_LEN], &body.encode_to_vec()].concat();
        if datagram.len() > LEN_MAX {
            return Err(TooLong(datagram.len()));
        }
        Ok(datagram)
    }

    /// Reads a datagram.
    ///
    /// # Errors
    ///
    /// [`BadAnnouncement`]: count it and drop it.
    pub fn decode(datagram: &[u8], mesh: &MeshId) -> Result<Self, BadAnnouncement> {
        let bad = BadAnnouncement::Malformed;
        let rest = datagram.strip_prefix(&MAGIC).ok_or(bad)?;
        let (of, rest) = rest.split_first_chunk::<MESH_LEN>().ok_or(bad)?;
        if of[..] != mesh.0[..MESH_LEN] {
            return Err(BadAnnouncement::OtherMesh);
        }
        if datagram.len() > LEN_MAX {
            return Err(bad);
        }
        let read = proto::Signed::decode(rest).map_err(|_| bad)?;
        Ok(Self {
            statement: read.statement,
            certificate: read.certificate,
            signature: read.signature,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MESH: MeshId = MeshId([9; 32]);

    prop_compose! {
        fn announcement()(
            node: [u8; 32],
            port in 1_u16..,
            addresses in prop::collection::vec(any::<IpAddr>(), 0..=ADDRESSES_MAX),
            (epoch, made_unix_ms, boot, count) in any::<(u64, u64, u64, u64)>(),
        ) -> Announcement {
            Announcement { mesh: MESH, node: NodeId(node), port, addresses, epoch, made_unix_ms, boot, count }
        }
    }

    proptest! {
        #[test]
        fn an_announcement_survives_the_wire(
            said in announcement(),
            certificate in prop::collection::vec(any::<u8>(), 0..700),
            signature in prop::collection::vec(any::<u8>(), 0..73),
        ) {
            let signed = Signed { statement: said.encode(), certificate, signature };
            let datagram = signed.clone().encode(&MESH).unwrap();
            let read = Signed::decode(&datagram, &MESH).unwrap();
            prop_assert_eq!(&read, &signed);
            prop_assert_eq!(Announcement::decode(&read.statement), Ok(said));
            let other = Signed::decode(&datagram, &MeshId([8; 32]));
            prop_assert_eq!(other, Err(BadAnnouncement::OtherMesh));
        }

        #[test]
        fn no_bytes_make_decode_panic(bytes: Vec<u8>) {
            Signed::decode(&bytes, &MESH).ok();
            let behind = [&MAGIC, &MESH.0[..MESH_LEN], &bytes].concat();
            Signed::decode(&behind, &MESH).ok();
            Announcement::decode(&bytes).ok();
        }
    }

    fn longest() -> Announcement {
        Announcement {
            mesh: MESH,
            node: NodeId([7; 32]),
            port: u16::MAX,
            addresses: vec![IpAddr::V6(Ipv6Addr::from([0xff; 16])); ADDRESSES_MAX + 1],
            epoch: u64::MAX,
            made_unix_ms: u64::MAX,
            boot: u64::MAX,
            count: u64::MAX,
        }
    }

    #[test]
    fn the_longest_statement_leaves_room_for_a_certificate_of_840_bytes() {
        let signed = |certificate| Signed {
            statement: longest().encode(),
            certificate: vec![0; certificate],
            signature: vec![0; 72],
        };
        let datagram = signed(840).encode(&MESH).unwrap();
        assert!(datagram.len() <= LEN_MAX);
        assert_eq!(
            Announcement::decode(&longest().encode())
                .unwrap()
                .addresses
                .len(),
            ADDRESSES_MAX
        );
        assert!(signed(1_200).encode(&MESH).is_err());
    }

    #[test]
    fn statements_that_make_no_sense_are_refused() {
        let refused = |change: fn(&mut proto::Statement)| {
            let mut statement = proto::Statement::decode(longest().encode().as_slice()).unwrap();
            change(&mut statement);
            let read = Announcement::decode(&statement.encode_to_vec());
            assert_eq!(read, Err(BadAnnouncement::Malformed));
        };
        refused(|said| said.port = 0);
        refused(|said| said.port = 65_536);
        refused(|said| said.addresses.push(vec![1, 2, 3, 4]));
        refused(|said| said.addresses = vec![vec![1, 2, 3]]);
        refused(|said| said.mesh.truncate(31));
        refused(|said| said.node.clear());
    }
}
