//! Which UDP flows the programs remember to have led somewhere: nobody closes them, and they keep their endpoint also when
//! it is gone.

use std::{collections::BTreeMap, net::SocketAddr};

use aya::maps::{HashMap, MapData, MapError};
use ebpf_abi::Peer;

use crate::{
    Frontend, Protocol, Services, absent_is_gone, leftover, missing,
    packets::map_of,
    tracked::{self, Place, TRACKED},
};

const CONNECTED: &str = "hf_connected";

/// A service, and the endpoint to which it led.
pub type Led = (Frontend, SocketAddr);

/// A UDP flow of a device, as the programs know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceFlow(Place);

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

    /// The UDP flows of devices that were led to an endpoint. Some are over. Costs a system call for each, and one for each
    /// of 8,192 sets of flows.
    ///
    /// # Errors
    ///
    /// [`MapError`] if the kernel does not say.
    pub fn device_datagrams(&self) -> Result<Vec<(DeviceFlow, Led)>, MapError> {
        let map = self.ebpf.map(TRACKED).ok_or_else(|| missing(TRACKED))?;
        let mut flows = Vec::new();
        tracked::each(map, |place, flow| {
            let service = leftover::frontend(&flow.service);
            if let Some(service) = service.filter(|service| service.protocol == Protocol::Udp)
                && !tracked::is_ended(&self.ebpf, place)?
            {
                flows.push((DeviceFlow(place), (service, flow.endpoint.socket_addr())));
            }
            Ok(())
        })?;
        Ok(flows)
    }

    /// Ends a UDP flow of a device: its next datagram opens it anew.
    ///
    /// # Errors
    ///
    /// [`MapError`] if the kernel refuses.
    pub fn forget_device_datagrams(&mut self, flow: DeviceFlow) -> Result<(), MapError> {
        tracked::end(&mut self.ebpf, flow.0)
    }
}
