//! The replay window (RFC 6479): which counters were seen.

/// Bits of the window's ring. One word of it is always being cleared, so packets may come
/// [`WINDOW`] late.
const BITS: u64 = 8192;

const WORDS: usize = (BITS / 64) as usize;

/// How far behind the newest a packet may arrive (`paths.md`, switch: 8,192 less a word).
pub(crate) const WINDOW: u64 = BITS - 64;

/// The counters that were accepted.
#[derive(Debug)]
pub(crate) struct Window {
    /// One more than the greatest accepted counter.
    next: u64,
    seen: [u64; WORDS],
}

impl Window {
    pub(crate) fn new() -> Self {
        Self {
            next: 0,
            seen: [0; WORDS],
        }
    }

    /// Accepts a counter for the first time; later, and when it is too old, not.
    pub(crate) fn accept(&mut self, counter: u64) -> bool {
        if counter >= self.next {
            let (from, to) = (self.next.div_ceil(64), counter / 64);
            // Words between the old and the new newest one were never seen in this round.
            for word in from..=to.min(from.saturating_add(WORDS as u64 - 1)) {
                if let Some(word) = self.seen.get_mut(index(word)) {
                    *word = 0;
                }
            }
            self.next = counter.saturating_add(1);
        } else if self.next - counter > WINDOW {
            return false;
        }
        let bit = 1 << (counter % 64);
        match self.seen.get_mut(index(counter / 64)) {
            Some(word) if *word & bit == 0 => {
                *word |= bit;
                true
            }
            _ => false,
        }
    }
}

/// Where a word of 64 counters stands in the ring.
fn index(word: u64) -> usize {
    usize::try_from(word % WORDS as u64).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn late_packets_are_accepted_once_up_to_the_window() {
        let mut window = Window::new();
        assert!(window.accept(100_000));
        assert!(!window.accept(100_000));
        assert!(window.accept(100_001 - WINDOW));
        assert!(!window.accept(100_001 - WINDOW));
        assert!(!window.accept(100_000 - WINDOW));
        assert!(window.accept(0xffff_ffff_ffff_0000));
        assert!(!window.accept(100_002));
    }

    proptest! {
        #[test]
        fn agrees_with_a_set(steps in prop::collection::vec((0_u8..4, 0_u64..20_000), 1..400)) {
            let (mut window, mut seen, mut newest) = (Window::new(), HashSet::new(), None::<u64>);
            for (kind, by) in steps {
                let base = newest.unwrap_or(0);
                let counter = match kind {
                    0 => base + 1,
                    1 => base + by,
                    2 => base.saturating_sub(by),
                    _ => base.saturating_sub(by % 130),
                };
                let old = newest.is_some_and(|n| counter + WINDOW < n + 1);
                let expected = !old && seen.insert(counter);
                prop_assert_eq!(window.accept(counter), expected, "{} after {:?}", counter, newest);
                newest = newest.max(Some(counter));
            }
        }
    }
}
