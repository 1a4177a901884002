//! Bad days on demand: what a test can make the server do wrong.

use std::{
    collections::BTreeSet,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::watch;

/// What the server does with a watch that wants its initial list in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StreamingLists {
    /// It answers, as servers since 1.34 do.
    #[default]
    Served,
    /// It refuses the request with 422, as servers without the feature do.
    Refused,
    /// It begins the watch and sends an ERROR event with code 500.
    Broken,
}

/// Requests that are answered with an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// 429, 500, or what else; 429 comes with `Retry-After`.
    pub code: u16,
    /// How many requests, from now on.
    pub requests: usize,
    /// Only those whose path contains this; all if empty.
    pub path: String,
}

/// A right that somebody made use of.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct UsedRight {
    /// Who.
    pub user: String,
    /// `get`, `list`, …
    pub verb: String,
    /// API group; empty for the core group.
    pub group: String,
    /// Resource, with `/subresource` if there is one; or a path.
    pub resource: String,
    /// Namespace; empty at the cluster's scope.
    pub namespace: String,
}

#[derive(Debug, Default)]
struct Settings {
    delay: Duration,
    refusals: Vec<Refusal>,
    streaming: StreamingLists,
    stale: Option<u64>,
    token_reviews_refused: bool,
    used: BTreeSet<UsedRight>,
}

/// Distinct rights remembered: a test has a handful of users with some tens of rights each.
const USED_MAX: usize = 10_000;

/// The handle; every method holds from the next request on.
#[derive(Debug)]
pub struct Faults {
    settings: Mutex<Settings>,
    watches: watch::Sender<u64>,
    connections: watch::Sender<u64>,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            settings: Mutex::default(),
            watches: watch::Sender::new(0),
            connections: watch::Sender::new(0),
        }
    }
}

impl Faults {
    /// Cuts every open watch in the middle.
    pub fn drop_watches(&self) {
        self.watches.send_modify(|count| *count += 1);
    }

    /// Cuts every connection, as a restart of the server does. What it knows stays.
    pub fn restart(&self) {
        self.drop_watches();
        self.connections.send_modify(|count| *count += 1);
    }

    /// Each answer waits this long; zero ends it.
    pub fn slow(&self, delay: Duration) {
        self.settings().delay = delay;
    }

    /// Answers the next requests with an error.
    pub fn refuse(&self, refusal: Refusal) {
        self.settings().refusals.push(refusal);
    }

    /// What becomes of watches that want a list in the stream.
    pub fn streaming_lists(&self, what: StreamingLists) {
        self.settings().streaming = what;
    }

    /// Whether `TokenReview` is answered with 500.
    pub fn refuse_token_reviews(&self, yes: bool) {
        self.settings().token_reviews_refused = yes;
    }

    /// The rights that were made use of so far.
    #[must_use]
    pub fn used_rights(&self) -> BTreeSet<UsedRight> {
        self.settings().used.clone()
    }

    pub(crate) fn set_stale(&self, version: Option<u64>) {
        self.settings().stale = version;
    }

    pub(crate) fn stale(&self) -> Option<u64> {
        self.settings().stale
    }

    pub(crate) fn delay(&self) -> Duration {
        self.settings().delay
    }

    pub(crate) fn streaming(&self) -> StreamingLists {
        self.settings().streaming
    }

    pub(crate) fn token_reviews_refused(&self) -> bool {
        self.settings().token_reviews_refused
    }

    /// The code that a request to `path` is refused with, if it is.
    pub(crate) fn refusal(&self, path: &str) -> Option<u16> {
        let mut settings = self.settings();
        let at = settings
            .refusals
            .iter()
            .position(|refusal| path.contains(&refusal.path))?;
        let refusal = settings.refusals.get_mut(at)?;
        let code = refusal.code;
        refusal.requests = refusal.requests.saturating_sub(1);
        if refusal.requests == 0 {
            settings.refusals.remove(at);
        }
        Some(code)
    }

    pub(crate) fn use_right(&self, right: UsedRight) {
        let mut settings = self.settings();
        if settings.used.len() < USED_MAX {
            settings.used.insert(right);
        }
    }

    pub(crate) fn watch_cuts(&self) -> watch::Receiver<u64> {
        self.watches.subscribe()
    }

    pub(crate) fn connection_cuts(&self) -> watch::Receiver<u64> {
        self.connections.subscribe()
    }

    fn settings(&self) -> MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_counted_and_end() {
        let faults = Faults::default();
        faults.refuse(Refusal {
            code: 500,
            requests: 2,
            path: "/pods".to_owned(),
        });
        assert_eq!(faults.refusal("/api/v1/nodes"), None);
        assert_eq!(faults.refusal("/api/v1/pods"), Some(500));
        assert_eq!(faults.refusal("/api/v1/pods"), Some(500));
        assert_eq!(faults.refusal("/api/v1/pods"), None);
    }
}
