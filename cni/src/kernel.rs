//! What is done to the kernel, in the node's network namespace and in the pod's.
//!
//! A pod is joined by a veth whose other end stays on the node, without a bridge and without an address there: the pod
//! sends everything to a gateway that no interface has and whose link-layer address is said for good; the node has a
//! route and a neighbour for each of the pod's addresses. So nobody ever asks who has which address.

use std::{
    fs::{self, File},
    io,
    net::IpAddr,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use mesh_api::cni::{AttachmentId, HostInterface, ROUTE_PROTOCOL, VethRecord};
use mesh_linux::{
    IfIndex,
    netlink::{LinkDetail, LinkRoute, Netlink, NetlinkError, NewVeth},
    netns,
};

use crate::{
    check::{Made, Seen},
    error::{CniError, Code},
    result::{everywhere, gateway},
};

/// The loopback's index in each network namespace (`LOOPBACK_IFINDEX` of linux/net_namespace.h).
const LOOPBACK: u32 = 1;

/// The network namespace of the calling thread.
const OWN_NAMESPACE: &str = "/proc/thread-self/ns/net";

/// Connects to the kernel, in the namespace of the calling thread.
///
/// # Errors
///
/// [`Code::Kernel`].
pub fn connect() -> Result<Netlink, CniError> {
    Netlink::connect()
        .map_err(|error| CniError::new(Code::Kernel, "cannot open a netlink socket").with(error))
}

/// Opens a pod's network namespace.
///
/// # Errors
///
/// [`Code::UnknownContainer`] if there is none; [`Code::BadEnvironment`] if it is the node's own.
pub fn open_namespace(path: &Path) -> Result<File, CniError> {
    let what = format!("cannot open the network namespace {}", path.display());
    let file = File::open(path).map_err(|error| {
        let code = if error.kind() == io::ErrorKind::NotFound {
            Code::UnknownContainer
        } else {
            Code::Io
        };
        CniError::new(code, what.clone()).with(error)
    })?;
    let number = |metadata: io::Result<fs::Metadata>| {
        let metadata = metadata.map_err(|error| CniError::new(Code::Io, what.clone()).with(error));
        metadata.map(|metadata| (metadata.dev(), metadata.ino()))
    };
    if number(file.metadata())? == number(fs::metadata(OWN_NAMESPACE))? {
        let message = format!("CNI_NETNS is {}: that is the node's own", path.display());
        return Err(CniError::new(Code::BadEnvironment, message)
            .with("pods with the node's network need no plug-in"));
    }
    Ok(file)
}

/// The link-layer addresses of a veth's ends, first the pod's: made of the attachment's id, locally administered. They
/// meet nobody but each other.
#[must_use]
pub fn macs(id: &AttachmentId) -> ([u8; 6], [u8; 6]) {
    let [_, _, _, a, b, c, d, e] = id.hash().to_be_bytes();
    ([0x0a, a, b, c, d, e], [0x0e, a, b, c, d, e])
}

/// What is noted at the node's end, so that GC knows whose it is if the state is lost.
#[must_use]
pub fn note(id: &AttachmentId) -> String {
    let AttachmentId {
        network,
        container,
        interface,
    } = id;
    format!("holdfast {network} {container} {interface}")
}

/// Reads what [`note`] wrote.
#[must_use]
pub fn noted(text: &str) -> Option<AttachmentId> {
    let mut parts = text.strip_prefix("holdfast ")?.splitn(3, ' ');
    let mut next = || parts.next().map(str::to_owned);
    Some(AttachmentId {
        network: next()?,
        container: next()?,
        interface: next()?,
    })
}

/// Makes the veth and all that belongs to it; `guard` is told of the node's end before it carries anything. After an error
/// parts of it may be there: [`detach`].
///
/// # Errors
///
/// [`Code::Kernel`], [`Code::BadEnvironment`] if the pod has such an interface, or what `guard` says.
pub async fn attach(
    netlink: &Netlink,
    namespace: &File,
    id: &AttachmentId,
    addresses: &[IpAddr],
    veth: &VethRecord,
    guard: impl FnOnce(IfIndex) -> Result<(), CniError>,
) -> Result<HostInterface, CniError> {
    let name = id.key();
    let new = NewVeth {
        name: &name,
        mac: veth.host_mac,
        peer_name: &id.interface,
        peer_mac: veth.mac,
        peer_namespace: namespace.as_fd(),
        mtu_bytes: veth.mtu_bytes,
    };
    if let Err(error) = netlink.add_veth(new).await {
        let taken = already(&error) && netlink.find_link(&name).await.map_err(kernel)?.is_none();
        return Err(if taken {
            let message = format!("the pod has an interface {} already", id.interface);
            CniError::new(Code::BadEnvironment, message)
                .with("CNI_IFNAME has to be another name, or DEL comes first")
        } else {
            kernel(error)
        });
    }
    let host = netlink.find_link(&name).await.map_err(kernel)?;
    let (index, pod) = host
        .and_then(|host| Some((host.index, host.veth_peer?)))
        .ok_or_else(|| vanished(&name))?;
    guard(index)?;
    inside(namespace, async |netlink| {
        configure_pod(netlink, pod, id, addresses, veth).await
    })
    .await?;
    configure_host(netlink, index, id, addresses, veth).await?;
    Ok(HostInterface {
        name,
        index: index.0.get(),
    })
}

async fn configure_pod(
    netlink: &Netlink,
    link: IfIndex,
    id: &AttachmentId,
    addresses: &[IpAddr],
    veth: &VethRecord,
) -> Result<(), CniError> {
    if let Some(loopback) = IfIndex::new(LOOPBACK) {
        netlink.set_up(loopback).await.map_err(kernel)?;
    }
    if addresses.iter().any(IpAddr::is_ipv6) {
        // Nobody else is on the link: no address is anybody's twice, and nobody advertises anything.
        for name in ["accept_dad", "accept_ra"] {
            set(&format!("ipv6/conf/{}/{name}", id.interface), "0")?;
        }
        let off = format!("ipv6/conf/{}/disable_ipv6", id.interface);
        // Writing it waits for all that the kernel does with interfaces, and is seldom needed.
        if fs::read_to_string(setting(&off)).is_ok_and(|off| off.trim() != "0") {
            set(&off, "0")?;
        }
    }
    netlink.set_up(link).await.map_err(kernel)?;
    for &address in addresses {
        let (net, gateway) = (IpNet::from(address), gateway(address));
        netlink.add_address(link, net).await.map_err(kernel)?;
        let neighbour = netlink.set_neighbour(link, gateway, veth.host_mac);
        neighbour.await.map_err(kernel)?;
        let default = LinkRoute {
            destination: everywhere(address),
            gateway: Some(gateway),
        };
        let route = netlink.add_route(link, default, ROUTE_PROTOCOL).await;
        route.map_err(|error| {
            let hint = already(&error).then_some("the pod has a default route already");
            hint.into_iter().fold(kernel(error), CniError::with)
        })?;
    }
    Ok(())
}

async fn configure_host(
    netlink: &Netlink,
    link: IfIndex,
    id: &AttachmentId,
    addresses: &[IpAddr],
    veth: &VethRecord,
) -> Result<(), CniError> {
    let name = id.key();
    if addresses.iter().any(IpAddr::is_ipv6) {
        set(&format!("ipv6/conf/{name}/accept_ra"), "0")?;
        // Before Linux 6.17 the node's own `ipv6.conf.all.forwarding` decides, which is not ours to change.
        set_if_known(&format!("ipv6/conf/{name}/force_forwarding"), "1")?;
    }
    // Forwards; and what comes from the pod has the pod's address, or is dropped.
    let up = netlink.set_up_for_another(link, &note(id)).await;
    up.map_err(kernel)?;
    for &address in addresses {
        let neighbour = netlink.set_neighbour(link, address, veth.mac);
        neighbour.await.map_err(kernel)?;
        let route = LinkRoute {
            destination: address.into(),
            gateway: None,
        };
        let route = netlink.add_route(link, route, ROUTE_PROTOCOL).await;
        route.map_err(kernel)?;
    }
    Ok(())
}

/// Removes the veth of an attachment, and with it all that belongs to it. One that is gone is fine.
///
/// # Errors
///
/// [`Code::Kernel`].
pub async fn detach(netlink: &Netlink, id: &AttachmentId) -> Result<(), CniError> {
    let Some(link) = netlink.find_link(&id.key()).await.map_err(kernel)? else {
        return Ok(());
    };
    let other = link.alias.as_deref().and_then(noted);
    if other.is_some_and(|other| other != *id) {
        return Ok(()); // Two ids with one key.
    }
    netlink.remove_link(link.index).await.map_err(kernel)
}

/// Looks at all that [`attach`] made.
///
/// # Errors
///
/// [`Code::Kernel`] if the kernel does not answer.
pub async fn look(netlink: &Netlink, namespace: &File, made: Made<'_>) -> Result<Seen, CniError> {
    let mut seen = Seen {
        host: netlink.find_link(&made.host.name).await.map_err(kernel)?,
        ..Seen::default()
    };
    for &address in made.addresses {
        let route = netlink.exact_route(address).await.map_err(kernel)?;
        seen.host_routes.extend(route.map(|route| (address, route)));
    }
    if let Some(host) = &seen.host {
        let neighbours = netlink.permanent_neighbours(host.index).await;
        seen.host_neighbours = neighbours.map_err(kernel)?;
    }
    inside(namespace, async |netlink| {
        seen.pod = netlink
            .find_link(&made.id.interface)
            .await
            .map_err(kernel)?;
        let Some(pod) = &seen.pod else {
            return Ok(());
        };
        seen.pod_addresses = netlink.addresses(pod.index).await.map_err(kernel)?;
        seen.pod_routes = netlink.routes_by(pod.index).await.map_err(kernel)?;
        let neighbours = netlink.permanent_neighbours(pod.index).await;
        seen.pod_neighbours = neighbours.map_err(kernel)?;
        Ok(())
    })
    .await?;
    Ok(seen)
}

/// The node's end of the pod's interface `name`, whoever made it; `None` if that is no veth, or its other end is not
/// here.
///
/// # Errors
///
/// [`Code::Kernel`] if the kernel does not answer; [`Code::BadConfig`] if the pod has no such interface.
pub async fn host_end(
    netlink: &Netlink,
    namespace: &File,
    name: &str,
) -> Result<Option<LinkDetail>, CniError> {
    let pod = inside(namespace, async |netlink| {
        netlink.find_link(name).await.map_err(kernel)
    })
    .await?;
    let pod = pod.ok_or_else(|| {
        let message = format!("the pod has no interface {name}");
        CniError::new(Code::BadConfig, message).with("the plug-in before has to make it")
    })?;
    let Some(peer) = pod.veth_peer else {
        return Ok(None);
    };
    let host = netlink.look_at_link(peer).await.map_err(kernel)?;
    Ok(host.filter(|host| host.veth_peer == Some(pod.index)))
}

/// Runs `work` in a namespace, with a connection to the kernel there. The calling thread, which is the only one that
/// works, goes there and comes back: another one, with a runtime of its own, costs as much as half of the work.
async fn inside<T>(
    namespace: &File,
    work: impl AsyncFnOnce(&Netlink) -> Result<T, CniError>,
) -> Result<T, CniError> {
    let failed = |error| {
        CniError::new(Code::Kernel, "cannot work in the pod's network namespace").with(error)
    };
    let home = File::open(OWN_NAMESPACE).map_err(failed)?;
    netns::enter(namespace).map_err(failed)?;
    let done = match connect() {
        Ok(netlink) => work(&netlink).await,
        Err(error) => Err(error),
    };
    netns::enter(&home).map_err(failed)?;
    done
}

/// Sets one of `/proc/sys/net`. One that cannot be written, but is so already, is fine: it may be read-only.
fn set(name: &str, value: &str) -> Result<(), CniError> {
    let path = setting(name);
    let Err(error) = fs::write(&path, value) else {
        return Ok(());
    };
    let old = fs::read_to_string(&path);
    if old.is_ok_and(|old| old.trim() == value) {
        return Ok(());
    }
    let message = format!("cannot write {value} to {}", path.display());
    Err(CniError::new(Code::Kernel, message).with(error))
}

/// As [`set`], for one that older kernels do not have.
fn set_if_known(name: &str, value: &str) -> Result<(), CniError> {
    let done = set(name, value);
    if done.is_err() && !setting(name).exists() {
        return Ok(());
    }
    done
}

fn setting(name: &str) -> PathBuf {
    Path::new("/proc/sys/net").join(name)
}

fn already(error: &NetlinkError) -> bool {
    matches!(error, NetlinkError::Refused { source, .. } if source.kind() == io::ErrorKind::AlreadyExists)
}

pub(crate) fn kernel(error: NetlinkError) -> CniError {
    CniError::from_error(Code::Kernel, &error)
}

fn vanished(name: &str) -> CniError {
    let message = format!("the interface {name} vanished while it was set up");
    CniError::new(Code::Kernel, message).with("did the pod end?")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::NETWORK_LEN_MAX,
        environment::{CONTAINER_ID_LEN_MAX, INTERFACE_LEN_MAX},
    };

    fn id(network: &str, container: &str, interface: &str) -> AttachmentId {
        AttachmentId {
            network: network.to_owned(),
            container: container.to_owned(),
            interface: interface.to_owned(),
        }
    }

    #[test]
    fn a_note_says_whose_the_interface_is() {
        let id = id("mesh", "c-1", "eth0");
        assert_eq!(noted(&note(&id)), Some(id));
        for other in ["", "holdfast", "holdfast mesh c-1", "flannel mesh c-1 eth0"] {
            assert_eq!(noted(other), None, "{other}");
        }
    }

    #[test]
    fn the_longest_note_fits_into_the_kernels_256_bytes() {
        let id = id(
            &"n".repeat(NETWORK_LEN_MAX),
            &"c".repeat(CONTAINER_ID_LEN_MAX),
            &"i".repeat(INTERFACE_LEN_MAX),
        );
        assert!(note(&id).len() < 256);
    }

    #[test]
    fn link_layer_addresses_are_of_one_station_and_local() {
        let (pod, host) = macs(&id("mesh", "c-1", "eth0"));
        assert_ne!(pod, host);
        for [first, ..] in [pod, host] {
            assert_eq!(first & 3, 2, "no group, locally administered");
        }
        assert_ne!(pod, macs(&id("mesh", "c-2", "eth0")).0);
    }

    #[test]
    fn a_namespace_that_is_not_there_or_the_nodes_own_is_told() {
        let error = open_namespace(Path::new("/run/netns/no-such")).unwrap_err();
        assert_eq!(error.code, Code::UnknownContainer);
        let error = open_namespace(Path::new("/proc/self/ns/net")).unwrap_err();
        assert_eq!(error.code, Code::BadEnvironment);
    }
}
