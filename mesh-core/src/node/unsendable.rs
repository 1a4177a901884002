//! Addresses to which the kernel refuses to send: which reports of it are worth a look.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

/// One report of each address in this time is looked at: a path that came back and is refused again is so
/// no more often.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Addresses in that time; more are passed over. Each is looked for among all woken peers: 64 times 1,000
/// peers are some milliseconds of a second.
const ADDRESSES_MAX: usize = 64;

/// What was reported lately.
#[derive(Debug, Default)]
pub(crate) struct Unsendable {
    lately: BTreeMap<SocketAddr, Instant>,
}

impl Unsendable {
    /// Whether anything is to be done about this one.
    pub(crate) fn is_news(&mut self, address: SocketAddr, now: Instant) -> bool {
        let recent = |at: &Instant| now < *at + AGAIN_AFTER;
        if self.lately.get(&address).is_some_and(recent) {
            return false;
        }
        if self.lately.len() >= ADDRESSES_MAX {
            self.lately.retain(|_, at| recent(at));
        }
        let room = self.lately.len() < ADDRESSES_MAX;
        if room {
            self.lately.insert(address, now);
        }
        room
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::tests::at;

    #[test]
    fn a_flood_of_reports_is_64_addresses_a_second_each_once() {
        let mut unsendable = Unsendable::default();
        let address = |n: u16| SocketAddr::new([192, 0, 2, 1].into(), n);
        let mut looked_at = |ms| {
            let reports = (0..10_000).map(|n| address(n % 500 + 1));
            let mut news = 0;
            for report in reports {
                news += usize::from(unsendable.is_news(report, at(ms)));
            }
            news
        };
        assert_eq!(
            [0, 10, 999, 1_000, 1_500].map(&mut looked_at),
            [64, 0, 0, 64, 0]
        );
        assert!(unsendable.lately.len() <= ADDRESSES_MAX);
    }
}
