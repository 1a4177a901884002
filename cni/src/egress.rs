//! What pods send out of the mesh leaves as the node's, as far as the network configuration says so.
//!
//! One table of nftables for all pods of a node: it is made with the first one, made anew with the next one after the node's
//! ranges have changed, and goes with GC after the last one. It does not depend on the agent's running.

use ipnet::IpNet;
use mesh_api::cni::NodeNetwork;
use mesh_linux::masquerade::{self, EXCEPT_MAX, Masquerade};

use crate::{
    error::{CniError, Code},
    store::{LOCK_WAIT, Store},
};

/// The table's name, in both families.
pub const TABLE: &str = "holdfast-pods";

const _: () = assert!(mesh_api::cni::BEHIND_MAX <= EXCEPT_MAX);

/// What leaves as the node's: all that pods of each range send, but to the mesh.
#[must_use]
pub fn wanted(network: &NodeNetwork) -> Vec<Masquerade> {
    let ranges = network.ipv4.map(IpNet::from).into_iter();
    let ranges = ranges.chain(network.ipv6.map(IpNet::from));
    let masquerade = |from: IpNet| {
        let behind = network.behind.iter().copied();
        let except = behind.filter(|net| net.addr().is_ipv4() == from.addr().is_ipv4());
        Masquerade {
            from,
            except_by: network.mesh_interface.clone(),
            except: except.collect(),
        }
    };
    ranges.map(masquerade).collect()
}

/// Sees to it. There has to be a record of the pod by now: GC takes the table away only where there is none.
///
/// # Errors
///
/// [`Code::Kernel`], or as [`Store::lock`].
pub fn masquerade(store: &Store, network: &NodeNetwork) -> Result<(), CniError> {
    let wanted = wanted(network);
    let mut missing = false;
    for one in &wanted {
        missing |= !masquerade::stands(TABLE, one).map_err(refused)?;
    }
    if !missing {
        return Ok(());
    }
    // One after the other: of many pods at once, the first one makes it.
    let _turn = store.lock(LOCK_WAIT)?;
    for one in &wanted {
        masquerade::masquerade(TABLE, one).map_err(refused)?;
    }
    Ok(())
}

/// Takes the table away. Returns whether there was one.
///
/// # Errors
///
/// [`Code::Kernel`].
pub fn remove() -> Result<bool, CniError> {
    masquerade::remove(TABLE).map_err(refused)
}

fn refused(error: std::io::Error) -> CniError {
    let message = format!("cannot write or read the nftables table {TABLE}");
    CniError::new(Code::Kernel, message).with(error).with(
        "masquerading needs CONFIG_NFT_NAT and CONFIG_NFT_MASQ; without `masquerade` in the network configuration nobody \
         asks for it",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_family_has_its_own_exceptions() {
        let network = NodeNetwork {
            ipv4: Some("10.244.1.0/24".parse().unwrap()),
            ipv6: Some("fd44:1::/64".parse().unwrap()),
            mtu_bytes: 1_380,
            mesh_interface: Some("holdfast0".to_owned()),
            behind: ["10.244.1.0/24", "fd44:1::/64", "192.168.7.0/24"]
                .map(|net| net.parse().unwrap())
                .to_vec(),
        };
        let found = wanted(&network);
        let counts: Vec<_> = found.iter().map(|one| one.except.len()).collect();
        assert_eq!(counts, [2, 1]);
        assert!(
            found
                .iter()
                .all(|one| one.except_by.as_deref() == Some("holdfast0"))
        );
        let none = NodeNetwork {
            ipv4: None,
            ..network
        };
        assert_eq!(wanted(&none).len(), 1);
    }
}
