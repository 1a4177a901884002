//! What a device shall be, how a request changes it, and what has to be done to make it so.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry},
    fmt,
    net::SocketAddr,
};

use ipnet::IpNet;
use mesh_tunnel::{
    route::RouteTable,
    tunnel::{External, PresharedKey, PrivateKey},
};
use mesh_wire::id::NodeId;
use rustix::io::Errno;
use zeroize::Zeroizing;

/// Why a request was not carried out. Nothing of it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub(crate) struct Refused {
    /// What the client is told.
    pub(crate) errno: Errno,
    /// What the log is told; never holds a key.
    pub(crate) what: String,
}

impl Refused {
    pub(crate) fn new(errno: Errno, what: impl Into<String>) -> Self {
        let what = what.into();
        Self { errno, what }
    }
}

/// Most peers, as in wireguard-go (`device/constants.go`): 1 GiB at 16 KiB a peer.
pub(crate) const PEERS_MAX: usize = 1 << 16;

/// Most allowed IPs of all peers together: 16 a peer. About 100 MiB with the route table.
pub(crate) const ALLOWED_IPS_MAX: usize = PEERS_MAX * 16;

/// Public keys with which every private key has the same secret, and so has everybody. RFC 7748
/// §6.1 says to check for it; the list is of <https://cr.yp.to/ecdh.html#validate>, without
/// the numbers that are the same modulo 2²⁵⁵.
const LOW_ORDER: [&str; 7] = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
];

/// A private or preshared key. Wiped from memory when dropped, never shown.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Secret(Zeroizing<[u8; 32]>);

impl Secret {
    /// Takes the bytes; `None` if all are zero, by which the protocol means that there is no key.
    pub(crate) fn new(bytes: Zeroizing<[u8; 32]>) -> Option<Self> {
        (*bytes != [0; 32]).then_some(Self(bytes))
    }

    /// The bytes made a valid X25519 private key (RFC 7748 §5), as the kernel does.
    pub(crate) fn clamped(mut self) -> Self {
        let [first, .., last] = &mut *self.0;
        *first &= 0b1111_1000;
        *last = *last & 0b0111_1111 | 0b0100_0000;
        self
    }

    pub(crate) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// A request to change the device. What is `None` stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Change {
    /// The key, or that there shall be none.
    pub(crate) private_key: Option<Option<Secret>>,
    /// 0: any free port.
    pub(crate) listen_port: Option<u16>,
    /// 0: none.
    pub(crate) fwmark: Option<u32>,
    /// Begin without peers.
    pub(crate) replace_peers: bool,
    pub(crate) peers: Vec<PeerChange>,
}

/// A request to add, change or remove a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PeerChange {
    pub(crate) public_key: NodeId,
    pub(crate) remove: bool,
    /// Do nothing if the peer is not there.
    pub(crate) update_only: bool,
    pub(crate) preshared_key: Option<Option<Secret>>,
    pub(crate) endpoint: Option<SocketAddr>,
    /// 0: none.
    pub(crate) keepalive_s: Option<u16>,
    /// Begin without allowed IPs.
    pub(crate) replace_allowed_ips: bool,
    pub(crate) allowed_ips: Vec<AllowedIp>,
}

impl PeerChange {
    pub(crate) fn new(public_key: NodeId) -> Self {
        Self {
            public_key,
            remove: false,
            update_only: false,
            preshared_key: None,
            endpoint: None,
            keepalive_s: None,
            replace_allowed_ips: false,
            allowed_ips: Vec::new(),
        }
    }
}

/// A change of one allowed IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AllowedIp {
    /// It becomes this peer's, whosever it was.
    Add(IpNet),
    /// It is not this peer's any more.
    Remove(IpNet),
}

/// What the device shall be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Config {
    identity: Option<Identity>,
    pub(crate) listen_port: u16,
    pub(crate) fwmark: u32,
    peers: HashMap<NodeId, Peer>,
    /// Whose each allowed IP is: the other side of [`Peer::allowed_ips`].
    owners: BTreeMap<IpNet, NodeId>,
    /// How many peers were ever added.
    added: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Identity {
    private_key: Secret,
    public_key: NodeId,
}

/// What is known of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Peer {
    /// The how-manieth that was added: a peer that was removed and added again is another one.
    added: u64,
    pub(crate) preshared_key: Option<Secret>,
    /// As it was set, or as the peer was heard from since.
    pub(crate) endpoint: Option<SocketAddr>,
    /// 0: none.
    pub(crate) keepalive_s: u16,
    pub(crate) allowed_ips: BTreeSet<IpNet>,
}

impl Peer {
    /// How the packet path is told of this peer.
    pub(crate) fn external(&self) -> External {
        External {
            endpoint: self.endpoint,
            keepalive_s: Some(self.keepalive_s).filter(|seconds| *seconds > 0),
            preshared_key: self
                .preshared_key
                .as_ref()
                .map(|key| PresharedKey::new(*key.bytes()))
                .unwrap_or_default(),
        }
    }
}

impl Config {
    pub(crate) fn private_key(&self) -> Option<&Secret> {
        self.identity.as_ref().map(|identity| &identity.private_key)
    }

    /// The peers, in the order in which they were added.
    pub(crate) fn peers(&self) -> Vec<(&NodeId, &Peer)> {
        let mut peers: Vec<_> = self.peers.iter().collect();
        peers.sort_unstable_by_key(|(_, peer)| peer.added);
        peers
    }

    /// The peer, if this device can talk to it; any other is only remembered, as the kernel does.
    pub(crate) fn partner(&self, id: &NodeId) -> Option<&Peer> {
        self.identity.as_ref()?;
        self.peers.get(id).filter(|_| !is_low_order(id))
    }

    pub(crate) fn routes(&self) -> RouteTable {
        let owners = self.owners.iter();
        owners.map(|(net, owner)| (*net, *owner)).collect()
    }

    /// Notes where a peer was heard from.
    pub(crate) fn note_endpoint(&mut self, id: &NodeId, endpoint: SocketAddr) {
        if let Some(peer) = self.peers.get_mut(id) {
            peer.endpoint = Some(endpoint);
        }
    }

    /// What this becomes by a request.
    ///
    /// # Errors
    ///
    /// At [`PEERS_MAX`] and [`ALLOWED_IPS_MAX`].
    pub(crate) fn changed(&self, change: &Change) -> Result<Self, Refused> {
        let mut new = self.clone();
        if let Some(private_key) = &change.private_key {
            new.identity = private_key.clone().map(Identity::new);
            if let Some(own) = new.public_key() {
                // Nobody is one's own peer (kernel: `wg_set_device`).
                new.remove(&own);
            }
        }
        new.listen_port = change.listen_port.unwrap_or(new.listen_port);
        new.fwmark = change.fwmark.unwrap_or(new.fwmark);
        if change.replace_peers {
            new.peers.clear();
            new.owners.clear();
        }
        for peer in &change.peers {
            new.change_peer(peer)?;
        }
        Ok(new)
    }

    fn public_key(&self) -> Option<NodeId> {
        self.identity.as_ref().map(|identity| identity.public_key)
    }

    fn remove(&mut self, id: &NodeId) {
        let Some(peer) = self.peers.remove(id) else {
            return;
        };
        for net in &peer.allowed_ips {
            self.owners.remove(net);
        }
    }

    fn change_peer(&mut self, change: &PeerChange) -> Result<(), Refused> {
        let id = change.public_key;
        if self.public_key() == Some(id) {
            return Ok(());
        }
        if change.remove {
            self.remove(&id);
            return Ok(());
        }
        let count = self.peers.len();
        let peer = match self.peers.entry(id) {
            Entry::Occupied(peer) => peer.into_mut(),
            Entry::Vacant(_) if change.update_only => return Ok(()),
            Entry::Vacant(_) if count >= PEERS_MAX => {
                let what = format!("peer {id}: there are {PEERS_MAX} peers, the most there can be");
                return Err(Refused::new(Errno::NOSPC, what));
            }
            Entry::Vacant(place) => {
                self.added += 1;
                place.insert(Peer {
                    added: self.added,
                    preshared_key: None,
                    endpoint: None,
                    keepalive_s: 0,
                    allowed_ips: BTreeSet::new(),
                })
            }
        };
        if let Some(preshared_key) = &change.preshared_key {
            peer.preshared_key.clone_from(preshared_key);
        }
        peer.endpoint = change.endpoint.or(peer.endpoint);
        peer.keepalive_s = change.keepalive_s.unwrap_or(peer.keepalive_s);
        if change.replace_allowed_ips {
            for net in std::mem::take(&mut peer.allowed_ips) {
                self.owners.remove(&net);
            }
        }
        for allowed_ip in &change.allowed_ips {
            self.change_allowed_ip(id, *allowed_ip)?;
        }
        Ok(())
    }

    fn change_allowed_ip(&mut self, id: NodeId, change: AllowedIp) -> Result<(), Refused> {
        let net = match change {
            AllowedIp::Add(net) => net,
            AllowedIp::Remove(net) => {
                let peer = self.peers.get_mut(&id);
                if peer.is_some_and(|peer| peer.allowed_ips.remove(&net)) {
                    self.owners.remove(&net);
                }
                return Ok(());
            }
        };
        if self.owners.len() >= ALLOWED_IPS_MAX && !self.owners.contains_key(&net) {
            let what = format!(
                "allowed IP {net}: there are {ALLOWED_IPS_MAX} allowed IPs, the most there can be"
            );
            return Err(Refused::new(Errno::NOSPC, what));
        }
        let before = self.owners.insert(net, id);
        if let Some(before) = before.and_then(|before| self.peers.get_mut(&before)) {
            before.allowed_ips.remove(&net);
        }
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.allowed_ips.insert(net);
        }
        Ok(())
    }
}

fn is_low_order(id: &NodeId) -> bool {
    let mut bytes = id.0;
    let [.., last] = &mut bytes;
    *last &= 0b0111_1111; // X25519 does not look at this bit.
    LOW_ORDER.contains(&hex::encode(bytes).as_str())
}

impl Identity {
    fn new(private_key: Secret) -> Self {
        let public_key = PrivateKey::new(*private_key.bytes()).node_id();
        Self {
            private_key,
            public_key,
        }
    }
}

/// What has to be done to make a device that is `old` a device that is `new`, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Plan {
    /// The device is somebody else now: everything begins again, with all peers.
    pub(crate) restart: bool,
    /// It is elsewhere: the sockets change, and nothing else by that.
    pub(crate) port: bool,
    /// The packets' mark changes.
    pub(crate) mark: bool,
    /// Peers that are gone.
    pub(crate) remove: Vec<NodeId>,
    /// Peers that are new or described anew.
    pub(crate) describe: Vec<NodeId>,
    /// Whose which allowed IP is changes.
    pub(crate) routes: bool,
}

impl Plan {
    pub(crate) fn new(old: &Config, new: &Config) -> Self {
        let another = |id: &&NodeId| {
            let (old, new) = (old.peers.get(*id), new.peers.get(*id));
            old.map(|peer| peer.added) != new.map(|peer| peer.added)
        };
        let changed = |(id, peer): &(&NodeId, &Peer)| {
            old.peers.get(*id).is_none_or(|old| {
                old.added != peer.added
                    || old.preshared_key != peer.preshared_key
                    || old.endpoint != peer.endpoint
                    || old.keepalive_s != peer.keepalive_s
            })
        };
        Self {
            restart: old.identity != new.identity,
            // 0 asks for another port, whichever it is.
            port: old.listen_port != new.listen_port,
            mark: old.fwmark != new.fwmark,
            remove: old.peers.keys().filter(another).copied().collect(),
            describe: new
                .peers()
                .into_iter()
                .filter(changed)
                .map(|(id, _)| *id)
                .collect(),
            routes: old.owners != new.owners,
        }
    }
}

#[cfg(test)]
mod tests;
