//! How many TCP connections that services led to endpoints are open: nothing counts them, they are looked at where the
//! programs remember them anyway.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use aya::maps::{Array, MapData, MapError};
use ebpf_abi::{
    PROTOCOL_TCP, PeerPlace, SEEN_ANSWER, SEEN_CLIENT_FIN, SEEN_ENDPOINT_FIN, SEEN_RESET, Tracked,
};
use rustix::time::{ClockId, clock_gettime};

use crate::{
    Services, missing,
    tracked::{self, TRACKED},
};

const PEER_PLACES: &str = "hf_peer_places";

/// A device's flow of which nothing passed for so long is not counted: devices go without a word, and what
/// they had stands in the map for a day.
const SILENT: Duration = Duration::from_secs(600);

impl Services {
    /// How many TCP connections are open to each endpoint: those of sockets here until they are closed, connecting ones
    /// among them, and those of devices between an endpoint's first answer and their end. Not seen are sockets that
    /// found their place in the map taken: with n connected, by UDP too, on average n in 32,768.
    ///
    /// Costs a system call for each of 16,384 places (12 ms), and where packets are looked at for each of 8,192 sets of
    /// devices' flows.
    ///
    /// # Errors
    ///
    /// [`MapError`] if the kernel does not say.
    pub fn open_connections(&self) -> Result<BTreeMap<SocketAddr, u32>, MapError> {
        let mut open = BTreeMap::new();
        let mut add = |endpoint: SocketAddr| *open.entry(endpoint).or_default() += 1;
        let map = self.ebpf.map(PEER_PLACES);
        let map = map.ok_or_else(|| missing(PEER_PLACES))?;
        for place in Array::<&MapData, PeerPlace>::try_from(map)?.iter() {
            let PeerPlace { cookie, peer } = place?;
            if cookie != 0 && u32::from(peer.service.protocol) == PROTOCOL_TCP {
                add(peer.endpoint.socket_addr());
            }
        }
        let map = self.ebpf.map(TRACKED).ok_or_else(|| missing(TRACKED))?;
        let now = now();
        tracked::each(map, |_, flow| {
            if u32::from(flow.client.protocol) == PROTOCOL_TCP && is_open(flow, now) {
                add(flow.endpoint.socket_addr());
            }
            Ok(())
        })?;
        Ok(open)
    }
}

fn is_open(flow: &Tracked, now: Duration) -> bool {
    const CLOSED: u32 = SEEN_CLIENT_FIN | SEEN_ENDPOINT_FIN;
    flow.seen & SEEN_ANSWER != 0
        && flow.seen & SEEN_RESET == 0
        && flow.seen & CLOSED != CLOSED
        && now.saturating_sub(Duration::from_nanos(flow.seen_ns)) < SILENT
}

/// As the programs read it.
pub(crate) fn now() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Monotonic)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_s_connection_is_open_from_the_first_answer_to_both_ends_a_reset_or_a_long_silence()
    {
        let second = Duration::from_secs(1);
        let address = ebpf_abi::SocketAddress::new([10, 0, 0, 1].into(), 80, 6);
        let flow = |seen| Tracked {
            client: address,
            service: address,
            endpoint: address,
            seen,
            seen_ns: 1_000_000_000,
            generation: 2,
            noted: 0,
        };
        for (seen, expected) in [
            (0, false),
            (SEEN_ANSWER, true),
            (SEEN_ANSWER | SEEN_CLIENT_FIN, true),
            (SEEN_ANSWER | SEEN_ENDPOINT_FIN, true),
            (SEEN_ANSWER | SEEN_CLIENT_FIN | SEEN_ENDPOINT_FIN, false),
            (SEEN_ANSWER | SEEN_RESET, false),
        ] {
            assert_eq!(is_open(&flow(seen), second), expected, "{seen:#x}");
        }
        assert!(is_open(&flow(SEEN_ANSWER), SILENT));
        assert!(!is_open(&flow(SEEN_ANSWER), SILENT + second));
    }
}
