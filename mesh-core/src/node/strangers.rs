//! Who calls without being in the snapshot: it may be behind.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use mesh_wire::id::{NodeId, Via};

use crate::io::{Event, STRANGER_EVERY};

/// Strangers that are remembered: nodes that joined while this one did not hear from the controller. Others
/// are found when they call again.
const STRANGERS_MAX: usize = 16;

/// How long a stranger is taken to want something still: it calls for 20 s, and again within 60 s.
const CALLS_FOR: Duration = Duration::from_secs(60);

/// Strangers that called lately.
#[derive(Debug, Default)]
pub(crate) struct Strangers {
    called: VecDeque<(NodeId, Via, Instant)>,
    said_at: Option<Instant>,
}

impl Strangers {
    /// One called. Returns what people should know.
    pub(crate) fn add(&mut self, id: NodeId, via: Via, now: Instant) -> Option<Event> {
        self.called.retain(|(other, ..)| *other != id);
        if self.called.len() == STRANGERS_MAX {
            self.called.pop_front(); // Who called last is the likeliest to be waiting.
        }
        self.called.push_back((id, via, now));
        let recent = |at: Instant| now < at + STRANGER_EVERY;
        if self.said_at.is_some_and(recent) {
            return None;
        }
        self.said_at = Some(now);
        Some(Event::Stranger { id })
    }

    /// Who called lately, and by what way.
    pub(crate) fn lately(&self, now: Instant) -> Vec<(NodeId, Via)> {
        let lately = self.called.iter().filter(|(.., at)| now < *at + CALLS_FOR);
        lately.map(|(id, via, _)| (*id, *via)).collect()
    }

    /// It is none any more.
    pub(crate) fn remove(&mut self, id: &NodeId) {
        self.called.retain(|(other, ..)| other != id);
    }
}
