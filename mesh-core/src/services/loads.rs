//! How many connections this node has open to endpoints, told with restraint: each change may rewrite lists.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    net::SocketAddr,
    time::{Duration, Instant},
};

/// A number is told anew when it changed by one part in so many of what was told; for less only when it
/// reaches the limit.
const CHANGE_SHARE: u32 = 5;

/// What was told stands for so long at least before less is told: short connections come and go many times
/// in a second, and are looked at once.
const FALL_PAUSE: Duration = Duration::from_secs(5);

/// What is told of endpoints that a service with `maxConnections` has. As many as it has at most.
#[derive(Debug, Default)]
pub struct Loads {
    told: BTreeMap<SocketAddr, Told>,
}

#[derive(Debug)]
struct Told {
    open: u32,
    at: Instant,
}

impl Loads {
    /// Takes how many connections are open to each endpoint, and the least limit of each for which there is one
    /// ([`super::connection_limits`]): of others nothing is told. Returns all that is told if it is to be told anew.
    pub fn handle_counts(
        &mut self,
        counts: &BTreeMap<SocketAddr, u32>,
        limits: &BTreeMap<SocketAddr, u32>,
        now: Instant,
    ) -> Option<BTreeMap<SocketAddr, u32>> {
        let before = self.told.len();
        self.told
            .retain(|endpoint, _| limits.contains_key(endpoint));
        let mut changed = before != self.told.len();
        for (&endpoint, &limit) in limits {
            let open = counts.get(&endpoint).copied().unwrap_or_default();
            let told = match self.told.entry(endpoint) {
                Entry::Occupied(told) => told.into_mut(),
                Entry::Vacant(_) if open == 0 => continue,
                Entry::Vacant(place) => place.insert(Told { open: 0, at: now }),
            };
            if told.is_news(open, limit, now) {
                *told = Told { open, at: now };
                changed = true;
            }
        }
        self.told.retain(|_, told| told.open > 0);
        changed.then(|| {
            let told = self.told.iter();
            told.map(|(&endpoint, told)| (endpoint, told.open))
                .collect()
        })
    }
}

impl Told {
    fn is_news(&self, open: u32, limit: u32, now: Instant) -> bool {
        let by = open.abs_diff(self.open);
        let enough = by > 0 && by >= self.open / CHANGE_SHARE;
        if open > self.open {
            enough || (self.open < limit && limit <= open)
        } else {
            enough && now.saturating_duration_since(self.at) >= FALL_PAUSE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::start;

    const SECOND: Duration = Duration::from_secs(1);

    fn endpoint(number: u8) -> SocketAddr {
        ([10, 42, 0, number], 80).into()
    }

    /// What is told at `now` of the first endpoint with that limit, while `open` are open.
    fn told(loads: &mut Loads, open: u32, limit: u32, now: Instant) -> Option<u32> {
        let counts = [(endpoint(1), open)].into();
        let limits = [(endpoint(1), limit)].into();
        let told = loads.handle_counts(&counts, &limits, now)?;
        Some(told.get(&endpoint(1)).copied().unwrap_or_default())
    }

    #[test]
    fn more_is_told_by_fifths_and_at_the_limit() {
        let mut loads = Loads::default();
        let now = start();
        for (open, expected) in [
            (0, None),
            (1, Some(1)),
            (2, Some(2)),
            (100, Some(100)),
            (119, None),
            (120, Some(120)),
            (129, None),
            (130, Some(130)), // The limit.
            (131, None),
            (156, Some(156)),
        ] {
            assert_eq!(told(&mut loads, open, 130, now), expected, "{open}");
        }
    }

    #[test]
    fn less_is_told_by_fifths_and_not_before_the_pause() {
        let mut loads = Loads::default();
        let begin = start();
        assert_eq!(told(&mut loads, 10, 10, begin), Some(10));
        let mut now = begin + FALL_PAUSE;
        assert_eq!(told(&mut loads, 9, 10, now), None);
        assert_eq!(told(&mut loads, 8, 10, now - SECOND), None);
        assert_eq!(told(&mut loads, 8, 10, now), Some(8));
        // It rises at once, and begins to wait anew.
        now += SECOND;
        assert_eq!(told(&mut loads, 10, 10, now), Some(10));
        now += FALL_PAUSE - SECOND;
        assert_eq!(told(&mut loads, 0, 10, now), None);
        assert_eq!(told(&mut loads, 0, 10, now + SECOND), Some(0));
        assert!(loads.told.is_empty());
    }

    #[test]
    fn endpoints_without_a_limit_are_not_told_of() {
        let mut loads = Loads::default();
        let now = start();
        let counts = [1, 2, 3].map(|number| (endpoint(number), 7)).into();
        let limits = |of: &[u8]| of.iter().map(|&number| (endpoint(number), 5)).collect();
        let told = loads.handle_counts(&counts, &limits(&[1, 2, 9]), now);
        assert_eq!(told, Some([(endpoint(1), 7), (endpoint(2), 7)].into()));
        let told = loads.handle_counts(&counts, &limits(&[2]), now);
        assert_eq!(told, Some([(endpoint(2), 7)].into()));
        assert_eq!(loads.handle_counts(&counts, &limits(&[2]), now), None);
        let told = loads.handle_counts(&counts, &limits(&[]), now);
        assert_eq!(told, Some(BTreeMap::new()));
    }
}
