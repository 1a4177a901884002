//! Which UDP flows the programs remember to have led somewhere: nobody closes them, and they keep their endpoint also when
//! it is gone.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use aya::maps::{HashMap, MapData, MapError};
use ebpf_abi::{Peer, TRACKED_MAX, Tracked, TrackedFlow};

use crate::{
    Frontend, Protocol, Services, absent_is_gone, leftover, missing, open::TRACKED, packets::map_of,
};

const CONNECTED: &str = "hf_connected";

/// A service, and the endpoint to which it led.
pub type Led = (Frontend, SocketAddr);

impl Services {
    /// The connected UDP sockets that were led to an endpoint, by the kernel's number for the socket
    /// (`SO_COOKIE`). Some are closed.
    ///
    /// # Errors
    ///
    /// [`MapError`] if the kernel does not say.
    pub fn connected(&self) -> Result<BTreeMap<u64, Led>, MapError> {
        let found = self.ebpf.map(CONNECTED).ok_or_else(|| missing(CONNECTED))?;
        let map: HashMap<&MapData, u64, Peer> = HashMap::try_from(found)?;
        let mut sockets = BTreeMap::new();
        for cookie in map.keys() {
            let cookie = cookie?;
            // The programs put others in its place meanwhile.
            let Ok(peer) = map.get(&cookie, 0) else {
                continue;
            };
            if let Some(service) = leftover::frontend(&peer.service) {
                sockets.insert(cookie, (service, peer.endpoint.socket_addr()));
            }
        }
        Ok(sockets)
    }

    /// Forgets a connected UDP socket, which was ended or is closed.
    ///
    /// # Errors
    ///
    /// [`MapError`] if the kernel refuses.
    pub fn forget_connected(&mut self, cookie: u64) -> Result<(), MapError> {
        let mut map: HashMap<&mut MapData, u64, Peer> = map_of(&mut self.ebpf, CONNECTED)?;
        absent_is_gone(map.remove(&cookie))
    }

    /// The services that devices ask by UDP, each with an endpoint to which some of their flows were led. Some are over.
    ///
    /// # Errors
    ///
    /// [`MapError`] if the kernel does not say.
    pub fn device_datagrams(&self) -> Result<BTreeSet<Led>, MapError> {
        let flows = self.device_flows()?.into_iter();
        Ok(flows.map(|(_, led)| led).collect())
    }

    /// Forgets the UDP flows of devices that were led so: the next datagram of each opens it anew. Returns how many
    /// there were.
    ///
    /// # Errors
    ///
    /// [`MapError`] if the kernel refuses.
    pub fn end_device_datagrams(&mut self, led: &BTreeSet<Led>) -> Result<usize, MapError> {
        let mut flows = self.device_flows()?;
        flows.retain(|(_, one)| led.contains(one));
        let mut map: HashMap<&mut MapData, TrackedFlow, Tracked> = map_of(&mut self.ebpf, TRACKED)?;
        for (flow, _) in &flows {
            absent_is_gone(map.remove(flow))?;
        }
        Ok(flows.len())
    }

    /// Of UDP. Costs two system calls each.
    fn device_flows(&self) -> Result<Vec<(TrackedFlow, Led)>, MapError> {
        let map = self.ebpf.map(TRACKED).ok_or_else(|| missing(TRACKED))?;
        let map: HashMap<&MapData, TrackedFlow, Tracked> = map.try_into()?;
        let mut flows = Vec::new();
        // Keys that go while they are looked through make the kernel begin again.
        let most = usize::try_from(TRACKED_MAX).unwrap_or(usize::MAX);
        for flow in map.keys().take(most) {
            let flow = flow?;
            let service = leftover::frontend(&flow.address);
            let Some(service) = service.filter(|service| service.protocol == Protocol::Udp) else {
                continue;
            };
            // The least recently used go meanwhile.
            if let Ok(tracked) = map.get(&flow, 0) {
                flows.push((flow, (service, tracked.endpoint.socket_addr())));
            }
        }
        Ok(flows)
    }
}
