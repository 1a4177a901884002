//! Sync sessions: who is connected, and what each node said that it has.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use mesh_wire::id::NodeName;
use tokio_util::sync::CancellationToken;

use super::{State, lock};
use crate::status::{Report, Seen};

#[derive(Debug, Default)]
pub(super) struct Sessions {
    pub(super) open: BTreeMap<NodeName, Session>,
    /// Of every node that had one since the controller began: no more than there are nodes.
    pub(super) seen: BTreeMap<NodeName, Seen>,
}

#[derive(Debug)]
pub(super) struct Session {
    number: u64,
    replaced: CancellationToken,
    pub(super) generation: u64,
    pub(super) began: Instant,
}

impl State {
    /// Begins a Sync session; one that the node had before ends.
    #[must_use]
    pub fn begin_session(self: &Arc<Self>, name: &NodeName) -> SessionGuard {
        let number = self.next_session.fetch_add(1, Ordering::Relaxed);
        let replaced = CancellationToken::new();
        let session = Session {
            number,
            replaced: replaced.clone(),
            generation: 0,
            began: Instant::now(),
        };
        let mut sessions = lock(&self.sessions);
        sessions.see(name, true, self.now_unix_s());
        if let Some(before) = sessions.open.insert(name.clone(), session) {
            before.replaced.cancel();
        }
        drop(sessions);
        SessionGuard {
            state: self.clone(),
            name: name.clone(),
            number,
            replaced,
        }
    }

    /// Remembers until when the certificate lasts that a node showed or was given. It may show an older one again, on
    /// a connection of before.
    pub fn certified(&self, name: &NodeName, ends: SystemTime) {
        let since = ends.duration_since(UNIX_EPOCH).unwrap_or_default();
        let ends_unix_s = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
        if let Some(seen) = lock(&self.sessions).seen.get_mut(name) {
            seen.certificate_ends_unix_s = seen.certificate_ends_unix_s.max(Some(ends_unix_s));
        }
    }
}

impl Sessions {
    fn see(&mut self, name: &NodeName, connected: bool, at_unix_s: i64) {
        let open = self.open.get(name).map(|session| session.generation);
        let before = self.seen.get(name);
        let seen = Seen {
            connected,
            at_unix_s,
            generation: open
                .or(before.map(|seen| seen.generation))
                .unwrap_or_default(),
            returns_within_s: before.map_or(0, |seen| seen.returns_within_s),
            certificate_ends_unix_s: before.and_then(|seen| seen.certificate_ends_unix_s),
            report: before.map(|seen| seen.report).unwrap_or_default(),
        };
        self.seen.insert(name.clone(), seen);
    }
}

/// A Sync session of a node, as long as this lives.
#[derive(Debug)]
pub struct SessionGuard {
    state: Arc<State>,
    name: NodeName,
    number: u64,
    /// Cancelled when the same node begins another.
    pub replaced: CancellationToken,
}

impl SessionGuard {
    /// Remembers the generation that the node says it has.
    pub fn acknowledge(&self, generation: u64) {
        let now_unix_s = self.state.now_unix_s();
        let mut sessions = lock(&self.state.sessions);
        let session = sessions.open.get_mut(&self.name);
        if let Some(session) = session.filter(|session| session.number == self.number) {
            session.generation = generation;
            sessions.see(&self.name, true, now_unix_s);
        }
    }

    /// Remembers what the node says of itself.
    pub fn report(&self, report: Report) {
        self.note(|seen| seen.report = report);
    }

    /// Remembers within which time the node comes again after it left; 0: it stays.
    pub fn returns_within_s(&self, returns_within_s: u32) {
        self.note(|seen| seen.returns_within_s = returns_within_s);
    }

    fn note(&self, note: impl FnOnce(&mut Seen)) {
        let mut sessions = lock(&self.state.sessions);
        let session = sessions.open.get(&self.name);
        if session.is_some_and(|session| session.number == self.number)
            && let Some(seen) = sessions.seen.get_mut(&self.name)
        {
            note(seen);
        }
    }
}

impl Drop for SessionGuard {
    fn drop(&mut self) {
        let now_unix_s = self.state.now_unix_s();
        let mut sessions = lock(&self.state.sessions);
        let current = sessions.open.get(&self.name);
        if current.is_some_and(|session| session.number == self.number) {
            sessions.see(&self.name, false, now_unix_s);
            sessions.open.remove(&self.name);
        }
    }
}
