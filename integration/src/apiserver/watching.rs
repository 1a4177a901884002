//! Watches: each reads the log at its own pace, from where it is. There is no queue for a slow
//! client: who falls behind the log is told `410`.

use std::{collections::VecDeque, io, sync::Arc, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use serde_json::{Value, json};
use tokio::{sync::watch, time::Instant};

use super::{
    error::ApiError,
    kinds::Kind,
    object,
    registry::shown,
    selector::Selector,
    server::Shared,
    store::{Change, Stored},
    views::{self, View},
};

/// Changes read at once, so that the store is not held for long.
const CHANGES_MAX: usize = 500;

/// One watch.
#[derive(Debug)]
pub(crate) struct Watch {
    pub(crate) shared: Arc<Shared>,
    pub(crate) kind: Arc<Kind>,
    pub(crate) namespace: Option<String>,
    pub(crate) selector: Selector,
    pub(crate) view: View,
    /// Everything up to this version was seen.
    pub(crate) seen: u64,
    pub(crate) bookmarks: bool,
    pub(crate) until: Instant,
    pub(crate) pending: VecDeque<Bytes>,
    pub(crate) ended: bool,
    pub(crate) next_bookmark: Instant,
    pub(crate) changed: watch::Receiver<u64>,
    pub(crate) cut: watch::Receiver<u64>,
}

impl Watch {
    /// Sends a list first.
    pub(crate) fn begin_with(&mut self, objects: &[Arc<Stored>]) {
        for stored in objects
            .iter()
            .filter(|stored| self.selector.matches(stored))
        {
            let object = views::one(&self.kind, stored, self.view);
            self.pending.push_back(event("ADDED", &object));
        }
    }

    /// Tells that the list is complete.
    pub(crate) fn end_of_list(&mut self) {
        let bookmark = self.bookmark(json!({"k8s.io/initial-events-end": "true"}));
        self.pending.push_back(bookmark);
    }

    /// Ends with an error.
    pub(crate) fn fail(&mut self, error: &ApiError) {
        self.pending
            .push_back(event("ERROR", error.body().to_string().as_bytes()));
        self.ended = true;
    }

    /// The next bytes for the client; nothing at the end.
    ///
    /// # Errors
    ///
    /// If the watch was cut on purpose: the connection goes with it.
    pub(crate) async fn next(&mut self) -> Option<io::Result<Bytes>> {
        loop {
            if let Some(bytes) = self.pending.pop_front() {
                return Some(Ok(bytes));
            }
            if self.ended {
                return None;
            }
            if self.cut.has_changed().unwrap_or(true) {
                self.ended = true;
                return Some(Err(io::Error::other("cut by the test")));
            }
            self.changed.mark_unchanged();
            if self.read() {
                continue;
            }
            let bookmark = self.bookmarks.then_some(self.next_bookmark);
            let wake = bookmark.map_or(self.until, |next| next.min(self.until));
            tokio::select! {
                _ = self.changed.changed() => {}
                _ = self.cut.changed() => {
                    self.ended = true;
                    return Some(Err(io::Error::other("cut by the test")));
                }
                () = tokio::time::sleep_until(wake) => {
                    if Instant::now() >= self.until {
                        self.ended = true;
                    } else {
                        let bookmark = self.bookmark(json!({}));
                        self.pending.push_back(bookmark);
                        self.next_bookmark = Instant::now() + self.shared.options.bookmark_interval;
                    }
                }
            }
        }
    }

    /// Takes what the log has; whether there was something to look at.
    fn read(&mut self) -> bool {
        let (changes, newest) = {
            let state = self.shared.state();
            let changes = state
                .store
                .changes(&self.kind.resource, self.seen, CHANGES_MAX);
            (changes, state.store.version())
        };
        match changes {
            Err(old) => {
                let message = format!("too old resource version: {} ({})", self.seen, old.oldest);
                self.fail(&ApiError::expired(message));
                true
            }
            Ok(changes) => {
                let full = changes.len() == CHANGES_MAX;
                for change in &changes {
                    self.seen = change.after.version;
                    self.tell(change);
                }
                if !full {
                    // A watch from the future waits for it.
                    self.seen = self.seen.max(newest);
                }
                !changes.is_empty()
            }
        }
    }

    fn tell(&mut self, change: &Change) {
        let here = self
            .namespace
            .as_ref()
            .is_none_or(|namespace| change.after.key.namespace == *namespace);
        if !here {
            return;
        }
        let before = change
            .before
            .as_ref()
            .filter(|stored| self.selector.matches(stored));
        let after = !change.deleted && self.selector.matches(&change.after);
        let bytes = match (before, after) {
            (None, false) => return,
            (None, true) => event("ADDED", &views::one(&self.kind, &change.after, self.view)),
            (Some(_), true) => event(
                "MODIFIED",
                &views::one(&self.kind, &change.after, self.view),
            ),
            (Some(_), false) if change.deleted => {
                event("DELETED", &views::one(&self.kind, &change.after, self.view))
            }
            (Some(before), false) => {
                // It went out of sight: its last state in sight, with the version of the change.
                let mut last = shown(&self.kind, before);
                let version = change.after.version.to_string();
                object::set(&mut last, &["metadata", "resourceVersion"], version);
                let last = views::show(&self.kind, last, self.view);
                event("DELETED", last.to_string().as_bytes())
            }
        };
        self.pending.push_back(bytes);
    }

    fn bookmark(&self, annotations: Value) -> Bytes {
        let (kind, version) = match self.view {
            View::Metadata => ("PartialObjectMetadata", "meta.k8s.io/v1".to_owned()),
            View::Table => ("Table", "meta.k8s.io/v1".to_owned()),
            View::Whole => (self.kind.kind.as_str(), self.kind.api_version()),
        };
        let mut metadata = json!({
            "resourceVersion": self.seen.to_string(), "creationTimestamp": null,
        });
        if annotations.as_object().is_some_and(|map| !map.is_empty()) {
            object::set(&mut metadata, &["annotations"], annotations);
        }
        let object = json!({"kind": kind, "apiVersion": version, "metadata": metadata});
        event("BOOKMARK", object.to_string().as_bytes())
    }
}

/// How long a watch without `timeoutSeconds` goes on.
pub(crate) const WATCH_DEFAULT: Duration = Duration::from_secs(30 * 60);

fn event(kind: &str, object: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(object.len() + 40);
    bytes.put_slice(b"{\"type\":\"");
    bytes.put_slice(kind.as_bytes());
    bytes.put_slice(b"\",\"object\":");
    bytes.put_slice(object);
    bytes.put_slice(b"}\n");
    bytes.freeze()
}
