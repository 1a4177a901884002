//! What makes it worth trying a controller at once: the network is another, or relays are there again after none was.
//!
//! A node whose site is cut off somewhere behind its router sees no change of its own network when that is healed. Its links
//! to relays are tried again and again all the time, so that the first one to come about says it.

use std::collections::BTreeSet;

use mesh_core::io::{Input, RelayTransport};
use mesh_wire::id::RelayId;
use tokio::sync::watch;

/// Counts such news.
#[derive(Debug)]
pub struct News {
    links: BTreeSet<(RelayId, RelayTransport)>,
    /// Since none of the links that there were is left.
    cut: bool,
    count: watch::Sender<u64>,
}

impl News {
    /// Nothing happened yet.
    #[must_use]
    pub fn new() -> (Self, watch::Receiver<u64>) {
        let (count, news) = watch::channel(0);
        let news_of = Self {
            links: BTreeSet::new(),
            cut: false,
            count,
        };
        (news_of, news)
    }

    /// What the core is told too.
    pub fn handle_input(&mut self, input: &Input) {
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "of the core's many inputs only these say it"
        )]
        match input {
            Input::RelayConnected { relay, transport } => {
                self.links.insert((*relay, *transport));
                if std::mem::take(&mut self.cut) {
                    self.tell();
                }
            }
            Input::RelayLost {
                relay, transport, ..
            } => {
                let was_there = self.links.remove(&(*relay, *transport));
                self.cut |= was_there && self.links.is_empty();
            }
            _ => {}
        }
    }

    /// The network of this machine is another.
    pub fn handle_network(&mut self) {
        self.tell();
    }

    fn tell(&mut self) {
        self.count.send_modify(|count| *count += 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relays_that_are_there_again_after_none_was_are_news_and_others_are_not() {
        let (mut news, count) = News::new();
        let relay = |last: u8| RelayId::from(&format!("relay-{last}").parse().unwrap());
        let quic = RelayTransport::Quic;
        let mut step = |relay, connected| {
            news.handle_input(&match connected {
                true => Input::RelayConnected {
                    relay,
                    transport: quic,
                },
                false => Input::RelayLost {
                    relay,
                    transport: quic,
                    reason: String::new(),
                },
            });
            *count.borrow()
        };
        assert_eq!(step(relay(1), true), 0, "the first link of an agent's life");
        assert_eq!(step(relay(2), true), 0);
        assert_eq!(step(relay(1), false), 0, "another one is left");
        assert_eq!(step(relay(1), true), 0);
        assert_eq!((step(relay(1), false), step(relay(2), false)), (0, 0));
        // Attempts that fail are lost links as well.
        assert_eq!(step(relay(1), false), 0);
        assert_eq!(step(relay(2), true), 1);
        assert_eq!(step(relay(1), true), 1, "one of them says it");
        news.handle_network();
        assert_eq!(*count.borrow(), 2);
    }
}
