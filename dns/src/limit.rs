//! At most so many things at once, and so many for one source of them.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

/// Counts what goes on. Its map never holds more entries than `total_max`.
#[derive(Debug)]
pub(crate) struct Limit {
    total_max: usize,
    per_source_max: usize,
    now: Mutex<Now>,
}

#[derive(Debug, Default)]
struct Now {
    total: usize,
    by_source: HashMap<IpAddr, usize>,
}

/// One thing that goes on; ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Admission {
    limit: Arc<Limit>,
    source: IpAddr,
}

impl Limit {
    pub(crate) fn new(total_max: usize, per_source_max: usize) -> Arc<Self> {
        Arc::new(Self {
            total_max,
            per_source_max,
            now: Mutex::default(),
        })
    }

    /// Begins one thing for `source`, or says that there are too many.
    pub(crate) fn admit(self: &Arc<Self>, source: IpAddr) -> Option<Admission> {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let count = now.by_source.get(&source).copied().unwrap_or_default();
        if now.total >= self.total_max || count >= self.per_source_max {
            return None;
        }
        now.total += 1;
        now.by_source.insert(source, count + 1);
        drop(now);
        Some(Admission {
            limit: Arc::clone(self),
            source,
        })
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        let mut now = self
            .limit
            .now
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        now.total -= 1;
        if let Some(count) = now.by_source.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                now.by_source.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_cannot_take_what_is_left_for_the_others() {
        let limit = Limit::new(3, 2);
        let (greedy, modest) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let held = [limit.admit(greedy), limit.admit(greedy)];
        assert!(held.iter().all(Option::is_some));
        assert!(limit.admit(greedy).is_none());
        let last = limit.admit(modest);
        assert!(last.is_some() && limit.admit(modest).is_none());
        drop((held, last));
        assert!(limit.now.lock().unwrap().by_source.is_empty());
        assert!(limit.admit(greedy).is_some());
    }
}
