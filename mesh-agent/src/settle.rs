//! When to read the network again after it changed: changes come in bursts, and a machine with many containers changes all
//! the time.

use std::time::{Duration, Instant};

/// Pause after a change: its last part comes a moment after its first.
const SETTLE: Duration = Duration::from_millis(50);

/// The least time between two looks: each lists the machine's interfaces, addresses and routes.
const GAP: Duration = Duration::from_secs(1);

/// When to look.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Looks {
    due: Option<Instant>,
    last: Option<Instant>,
}

impl Looks {
    /// At once.
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            due: Some(now),
            last: None,
        }
    }

    /// Something changed.
    pub(crate) fn handle_change(&mut self, now: Instant) {
        let soon = now + SETTLE;
        let due = self.last.map_or(soon, |last| soon.max(last + GAP));
        self.due.get_or_insert(due);
    }

    /// When to look next.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// The look is taken now.
    pub(crate) fn handle_look(&mut self, now: Instant) {
        *self = Self {
            due: None,
            last: Some(now),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_looked_at_soon_and_a_storm_of_them_once_a_second() {
        let start = Instant::now();
        let mut looks = Looks::new(start);
        assert_eq!(looks.due(), Some(start));
        looks.handle_look(start);
        assert_eq!(looks.due(), None);
        let later = start + Duration::from_secs(60);
        looks.handle_change(later);
        looks.handle_change(later + Duration::from_millis(40));
        assert_eq!(looks.due(), Some(later + SETTLE));
        let (mut now, mut count) = (later, 0);
        while now < later + Duration::from_secs(10) {
            looks.handle_change(now);
            if looks.due().is_some_and(|due| due <= now) {
                looks.handle_look(now);
                count += 1;
            }
            now += Duration::from_millis(5);
        }
        assert!((9..=11).contains(&count), "{count}");
    }
}
