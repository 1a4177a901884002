//! What Prometheus is shown of the state.

use std::{collections::VecDeque, fs, time::Instant};

use super::{State, lock};
use crate::{
    metrics::{Counters, Facts},
    store::FILE,
};

/// Most generations whose age is known: at 24 bytes, 24 KB. An agent that lacks more waits longer than is shown.
const RECENT_MAX: usize = 1_000;

/// When the last generations were made here.
#[derive(Debug, Clone, Default)]
pub(super) struct Recent(VecDeque<(u64, Instant)>);

impl Recent {
    pub(super) fn made(&mut self, generation: u64, at: Instant) {
        if self.0.len() == RECENT_MAX {
            self.0.pop_front();
        }
        self.0.push_back((generation, at));
    }

    /// When the first one was made that one who has `generation` lacks; `None`: before this controller began.
    fn lacked_since(&self, generation: u64) -> Option<Instant> {
        let first = self.0.partition_point(|(made, _)| *made <= generation);
        self.0.get(first).map(|(_, at)| *at)
    }
}

impl State {
    /// What was counted since the controller began.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// What the controller knows now. Costs a look at each session and at the store's file, and nothing for each resource.
    #[must_use]
    pub fn facts(&self) -> Facts {
        let (generation, nodes, agents_connected, problems) = self.summary();
        let (mut facts, recent) = self.published(|published| {
            let facts = Facts {
                generation,
                made_unix_ms: published.history.made_unix_ms(),
                nodes,
                agents_connected,
                problems: problems.len(),
                desired_bytes: published.bytes,
                resources: published.history.kinds().clone(),
                ..Facts::default()
            };
            (facts, published.recent.clone())
        });
        let file = fs::metadata(self.settings.state_dir.join(FILE));
        facts.store_bytes = file.map_or(0, |file| file.len());
        facts.leads = self.leads();
        facts.serves = self.serves();
        facts.trace_spans = self.traces.counts();
        let now = Instant::now();
        for session in lock(&self.sessions).open.values() {
            if session.generation < generation {
                let since = recent.lacked_since(session.generation);
                let since = since.map_or(session.began, |since| since.max(session.began));
                facts.agents_behind += 1;
                facts.behind_longest = facts.behind_longest.max(now - since);
            }
        }
        facts
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn who_lacks_a_generation_lacks_it_since_it_was_made() {
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        let mut recent = Recent::default();
        assert_eq!(recent.lacked_since(0), None);
        recent.made(4, at(4));
        recent.made(5, at(50));
        assert_eq!(recent.lacked_since(2), Some(at(4)));
        assert_eq!(recent.lacked_since(4), Some(at(50)));
        assert_eq!(recent.lacked_since(5), None);
        (6..6 + RECENT_MAX as u64).for_each(|number| recent.made(number, at(number * 10)));
        assert_eq!(recent.0.len(), RECENT_MAX);
        assert_eq!(recent.lacked_since(0), Some(at(60)));
    }
}
