//! How long what a node has counts while no controller speaks with it.
//!
//! No clock of the edge is believed for this. What is counted is time that certainly passed: that of the agent's own life, by a
//! clock that nobody sets, kept over restarts. It is never more than what really passed, so that nothing ends early, whatever
//! the time of day is said to be; time for which the node was switched off is not in it, as nobody vouches for it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_wire::id::NodeName;

use crate::snapshot::{Endpoint, Snapshot};

/// Limits are told in days.
pub const DAY: Duration = Duration::from_secs(86_400);

/// How long a state counts unless the mesh says otherwise.
pub const LIMIT_DEFAULT: Duration = DAY.saturating_mul(30);

/// The longest limit that a mesh may set other than none, in days: ten years, as long as its authority is valid.
pub const LIMIT_DAYS_MAX: u32 = 3_650;

/// What was counted is kept so often: so much of it a loss of power takes.
pub const KEEP_EVERY: Duration = Duration::from_secs(600);

/// How a node stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// What it has counts.
    Counts,
    /// It counts, but more than half of the limit is over: so much is left.
    Warned(Duration),
    /// It counts no more: the node serves what is its own, and speaks with nobody.
    Over,
}

/// What a node serves whose state counts no more: what is its own. It has no peers, relays and devices, and of each service only
/// the endpoints that are on it.
#[must_use]
pub fn alone(snapshot: &Snapshot, node: &NodeName) -> Snapshot {
    let mut alone = snapshot.clone();
    alone.nodes.retain(|name, _| name == node);
    alone.external_peers.clear();
    alone.relays.clear();
    for slice in alone
        .slices
        .values_mut()
        .flat_map(|slices| slices.values_mut())
    {
        let is_own = |endpoint: &Endpoint| endpoint.node.as_ref() == Some(node);
        if !slice.endpoints.iter().all(is_own) {
            Arc::make_mut(slice).endpoints.retain(is_own);
        }
    }
    alone
}

/// Counts for one node.
#[derive(Debug, Clone)]
pub struct Limit {
    limit: Option<Duration>,
    /// Up to `at`.
    counted: Duration,
    /// When what it has was confirmed by a controller, or made, since 1970 by the controller's clock.
    confirmed: Duration,
    speaks: bool,
    at: Instant,
}

impl Limit {
    /// Of a node that counted so much in earlier lives. `limit`: `None` is for ever.
    #[must_use]
    pub fn new(
        limit: Option<Duration>,
        counted: Duration,
        confirmed: Duration,
        now: Instant,
    ) -> Self {
        Self {
            limit,
            counted,
            confirmed,
            speaks: false,
            at: now,
        }
    }

    /// The mesh says another limit.
    pub fn handle_limit(&mut self, limit: Option<Duration>) {
        self.limit = limit;
    }

    /// A controller speaks with this node, and says what time it is; or does so no more.
    pub fn handle_controller(&mut self, speaks: Option<Duration>, now: Instant) {
        self.advance(now);
        self.speaks = speaks.is_some();
        if let Some(clock) = speaks {
            self.counted = Duration::ZERO;
            self.confirmed = clock;
        }
    }

    /// A neighbour gave a state that a controller made at this time. So much later it was confirmed than what was had before, and
    /// so much less is counted.
    pub fn handle_newer(&mut self, made: Duration, now: Instant) {
        self.advance(now);
        if let Some(later) = made.checked_sub(self.confirmed) {
            self.counted = self.counted.saturating_sub(later);
            self.confirmed = made;
        }
    }

    /// What has to be kept for the next life: how much is counted, and when the controller last confirmed.
    pub fn counted(&mut self, now: Instant) -> (Duration, Duration) {
        self.advance(now);
        (self.counted, self.confirmed)
    }

    /// How the node stands.
    pub fn standing(&mut self, now: Instant) -> Standing {
        self.advance(now);
        match self.limit {
            Some(limit) if self.counted >= limit => Standing::Over,
            Some(limit) if self.counted >= limit / 2 => Standing::Warned(limit - self.counted),
            Some(_) | None => Standing::Counts,
        }
    }

    /// When it will stand otherwise, if nothing happens before.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let limit = self.limit.filter(|_| !self.speaks)?;
        let left = |until: Duration| {
            until
                .checked_sub(self.counted)
                .filter(|left| !left.is_zero())
        };
        left(limit / 2)
            .or_else(|| left(limit))
            .map(|left| self.at + left)
    }

    fn advance(&mut self, now: Instant) {
        if !self.speaks {
            self.counted += now.saturating_duration_since(self.at);
        }
        self.at = self.at.max(now);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use mesh_wire::id::{MeshId, NodeId, RelayId};

    use super::*;
    use crate::{
        snapshot::{EndpointSlice, ExternalPeer, MeshSettings, Node, Relay, ServiceName},
        testing::start,
    };

    #[test]
    fn a_state_is_warned_of_at_half_of_its_time_and_then_over() {
        let t = start();
        let mut limit = Limit::new(Some(LIMIT_DEFAULT), Duration::ZERO, Duration::ZERO, t);
        assert_eq!(limit.poll_timeout(), Some(t + 15 * DAY));
        let just = Duration::from_secs(1);
        assert_eq!(limit.standing(t + 15 * DAY - just), Standing::Counts);
        assert_eq!(limit.standing(t + 15 * DAY), Standing::Warned(15 * DAY));
        assert_eq!(limit.poll_timeout(), Some(t + 30 * DAY));
        assert_eq!(limit.standing(t + 30 * DAY - just), Standing::Warned(just));
        assert_eq!(limit.standing(t + 30 * DAY), Standing::Over);
        assert_eq!(limit.poll_timeout(), None);
        limit.handle_controller(Some(DAY), t + 31 * DAY);
        assert_eq!(limit.standing(t + 99 * DAY), Standing::Counts);
        assert_eq!(limit.poll_timeout(), None, "while it speaks");
        limit.handle_controller(None, t + 99 * DAY);
        assert_eq!(limit.poll_timeout(), Some(t + 114 * DAY));
        // A neighbour's state from before the controller last spoke gives nothing.
        limit.handle_newer(DAY, t + 101 * DAY);
        assert_eq!(limit.counted(t + 101 * DAY), (2 * DAY, DAY));
    }

    #[test]
    fn what_an_earlier_life_counted_counts_and_time_without_power_does_not() {
        let t = start();
        let mut first = Limit::new(Some(LIMIT_DEFAULT), Duration::ZERO, DAY, t);
        let (counted, confirmed) = first.counted(t + 20 * DAY);
        assert_eq!((counted, confirmed), (20 * DAY, DAY));
        let later = t + 500 * DAY;
        let mut second = Limit::new(Some(LIMIT_DEFAULT), counted, confirmed, later);
        assert_eq!(second.standing(later), Standing::Warned(10 * DAY));
        assert_eq!(second.standing(later + 10 * DAY), Standing::Over);
    }

    #[test]
    fn alone_a_node_has_itself_and_its_own_endpoints() {
        let mesh = MeshId([7; 32]);
        let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(mesh, "demo"));
        let (own, other): (NodeName, NodeName) = ("a".parse().unwrap(), "b".parse().unwrap());
        for (name, id) in [(&own, 1), (&other, 2)] {
            let address = [100, 96, 0, id].into();
            let node = Node::new(&mesh, name.clone(), NodeId([id; 32]), address);
            snapshot.nodes.insert(name.clone(), node);
        }
        let phone = ExternalPeer {
            id: NodeId([9; 32]),
            name: "phone".parse().unwrap(),
            prefixes: Vec::new(),
            gateway: own.clone(),
            endpoint: None,
            keepalive: None,
        };
        snapshot.external_peers.insert(phone.name.clone(), phone);
        let relay = Relay {
            name: "r1".parse().unwrap(),
            addresses: Vec::new(),
            quic_port: 443,
            tls_port: 443,
            stun_ports: Vec::new(),
            node: None,
            sites: BTreeSet::new(),
        };
        snapshot.relays.insert(RelayId::from(&relay.name), relay);
        let service = ServiceName {
            namespace: "shop".to_owned(),
            name: "orders".to_owned(),
        };
        let endpoint =
            |node: Option<&NodeName>| Endpoint::new([100, 96, 0, 1].into(), node.cloned());
        let slice = Arc::new(EndpointSlice {
            name: "orders-1".to_owned(),
            ports: Vec::new(),
            endpoints: vec![endpoint(Some(&other)), endpoint(Some(&own)), endpoint(None)],
        });
        let slices = [("orders-1".to_owned(), slice.clone())].into();
        snapshot.slices.insert(service.clone(), slices);

        let alone = alone(&snapshot, &own);
        assert!(alone.nodes.keys().eq([&own]));
        assert!(alone.external_peers.is_empty() && alone.relays.is_empty());
        let left = &alone.slices[&service]["orders-1"].endpoints;
        assert_eq!(*left, [endpoint(Some(&own))]);
        assert_eq!(slice.endpoints.len(), 3, "the state itself is as it was");
    }

    #[test]
    fn without_a_limit_it_counts_for_ever() {
        let t = start();
        let mut limit = Limit::new(None, Duration::ZERO, Duration::ZERO, t);
        assert_eq!(limit.standing(t + 10_000 * DAY), Standing::Counts);
        assert_eq!(limit.poll_timeout(), None);
        limit.handle_limit(Some(DAY));
        assert_eq!(limit.standing(t + 10_000 * DAY), Standing::Over);
    }

    #[test]
    fn a_neighbour_s_newer_state_gives_the_time_by_which_it_is_newer_and_no_more() {
        let t = start();
        let mut limit = Limit::new(Some(LIMIT_DEFAULT), Duration::ZERO, 100 * DAY, t);
        assert_eq!(limit.standing(t + 30 * DAY), Standing::Over);
        limit.handle_newer(110 * DAY, t + 30 * DAY);
        assert_eq!(limit.standing(t + 30 * DAY), Standing::Warned(10 * DAY));
        // The same again gives nothing, nor does an older one.
        limit.handle_newer(110 * DAY, t + 30 * DAY);
        limit.handle_newer(90 * DAY, t + 30 * DAY);
        assert_eq!(limit.standing(t + 30 * DAY), Standing::Warned(10 * DAY));
        limit.handle_newer(500 * DAY, t + 31 * DAY);
        assert_eq!(limit.counted(t + 31 * DAY).0, Duration::ZERO);
    }
}
