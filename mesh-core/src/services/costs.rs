//! What packets to other nodes cost, told with restraint: each change may rewrite lists.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use mesh_wire::id::NodeName;

/// A cost is told anew when it changed by one part in so many of what was told,
const CHANGE_SHARE: u32 = 5;

/// and by so much at least.
const CHANGE_MIN: Duration = Duration::from_millis(2);

/// Costs are told so often at most, all together.
const PAUSE: Duration = Duration::from_secs(10);

/// A path that was not measured for so long is unknown again: whoever goes by cost tries it.
const FORGET: Duration = Duration::from_secs(600);

/// Which costs are told.
#[derive(Debug, Default)]
pub struct Costs {
    told: BTreeMap<NodeName, Told>,
    changed: Option<Instant>,
}

#[derive(Debug)]
struct Told {
    cost: Duration,
    measured: Instant,
}

impl Costs {
    /// Takes what is measured now of nodes to which there is a path. Returns all costs if they are to be
    /// told anew.
    pub fn handle_measured(
        &mut self,
        measured: impl IntoIterator<Item = (NodeName, Duration)>,
        now: Instant,
    ) -> Option<BTreeMap<NodeName, Duration>> {
        let mut news = BTreeMap::new();
        for (node, cost) in measured {
            match self.told.get_mut(&node) {
                Some(told) => {
                    told.measured = now;
                    let enough = (told.cost / CHANGE_SHARE).max(CHANGE_MIN);
                    if told.cost.abs_diff(cost) > enough {
                        news.insert(node, cost);
                    }
                }
                None => {
                    news.insert(node, cost);
                }
            }
        }
        let is_old = |told: &Told| now.saturating_duration_since(told.measured) >= FORGET;
        let changes = !news.is_empty() || self.told.values().any(is_old);
        let paused = |at: Instant| now.saturating_duration_since(at) < PAUSE;
        if !changes || self.changed.is_some_and(paused) {
            return None;
        }
        self.changed = Some(now);
        self.told.retain(|_, told| !is_old(told));
        for (node, cost) in news {
            let measured = now;
            self.told.insert(node, Told { cost, measured });
        }
        let told = self.told.iter();
        Some(told.map(|(node, told)| (node.clone(), told.cost)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::start;

    const SECOND: Duration = Duration::from_secs(1);

    fn told(costs: &mut Costs, measured: &[(&str, u64)], now: Instant) -> Option<Vec<u128>> {
        let measured = measured
            .iter()
            .map(|&(node, ms)| (node.parse().unwrap(), Duration::from_millis(ms)));
        let told = costs.handle_measured(measured, now)?;
        Some(told.values().map(Duration::as_millis).collect())
    }

    #[test]
    fn what_changes_little_is_not_told_and_what_creeps_is() {
        let mut costs = Costs::default();
        let mut now = start();
        assert_eq!(
            told(&mut costs, &[("a", 100), ("b", 3)], now),
            Some(vec![100, 3])
        );
        for (a, b, expected) in [
            (120, 5, None),
            (80, 1, None),
            (121, 5, Some(vec![121, 3])),
            (121, 6, Some(vec![121, 6])),
            (100, 6, None),
            (96, 8, Some(vec![96, 6])),
        ] {
            now += PAUSE;
            assert_eq!(
                told(&mut costs, &[("a", a), ("b", b)], now),
                expected,
                "{a} {b}"
            );
        }
    }

    #[test]
    fn changes_wait_for_each_other() {
        let mut costs = Costs::default();
        let mut now = start();
        assert_eq!(told(&mut costs, &[("a", 10)], now), Some(vec![10]));
        for ms in [20, 40] {
            now += PAUSE / 2 - SECOND;
            assert_eq!(told(&mut costs, &[("a", ms), ("b", 7)], now), None);
        }
        now += 2 * SECOND;
        assert_eq!(
            told(&mut costs, &[("a", 40), ("b", 7)], now),
            Some(vec![40, 7])
        );
    }

    #[test]
    fn a_path_that_is_not_measured_any_more_is_forgotten() {
        let mut costs = Costs::default();
        let begin = start();
        assert_eq!(
            told(&mut costs, &[("a", 10), ("b", 10)], begin),
            Some(vec![10, 10])
        );
        assert_eq!(
            told(&mut costs, &[("a", 10)], begin + FORGET - SECOND),
            None
        );
        assert_eq!(
            told(&mut costs, &[("a", 10)], begin + FORGET),
            Some(vec![10])
        );
    }
}
