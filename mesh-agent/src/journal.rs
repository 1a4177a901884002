//! What happened to this node's links, its controller and its health, in order: for who asks what changed. The changes of
//! peers and paths the core keeps itself.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use mesh_core::io::{Input, RelayTransport};
use mesh_wire::id::RelayId;

/// Notes that are kept: at some 200 bytes 50 KB, and a relay that comes and goes every minute for two hours.
pub const NOTES_MAX: usize = 256;

/// A relay's or a controller's problem is cut here, so that one note is not the whole room.
const REASON_BYTES_MAX: usize = 200;

/// How long a question of another node is the same one: who watches a page would soon be all that is kept.
const USE_EVERY: Duration = Duration::from_secs(60);

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// When.
    pub at: Instant,
    /// `relay`, `controller`, `health` or `operator`.
    pub of: &'static str,
    /// Whose; empty: the node's own.
    pub name: String,
    /// Before.
    pub from: String,
    /// After.
    pub to: String,
    /// Why, in whatever words whoever knew it had.
    pub reason: String,
}

/// The last [`NOTES_MAX`] changes.
#[derive(Debug, Default)]
pub struct Journal {
    notes: VecDeque<Note>,
    forgotten: u64,
    /// What each thing was last.
    last: BTreeMap<(&'static str, String), String>,
}

impl Journal {
    /// `of name` is now `to`. Nothing is noted when it was so before, whatever the reason.
    pub fn note(&mut self, at: Instant, of: &'static str, name: &str, to: &str, reason: &str) {
        let key = (of, name.to_owned());
        if self.last.len() == NOTES_MAX && !self.last.contains_key(&key) {
            self.last.clear(); // Relays of years: the next note of each says nothing of before.
        }
        let before = self.last.insert(key, to.to_owned());
        if before.as_deref() == Some(to) {
            return;
        }
        self.keep(at, of, name, before.unwrap_or_default(), to, reason);
    }

    /// The node `name` asked for something here, or was refused; the same again is noted once in [`USE_EVERY`].
    pub fn note_use(&mut self, at: Instant, name: &str, what: &str, reason: &str) {
        let mut newest = self.notes.iter().rev();
        let again = newest.any(|note| {
            let recent = at.saturating_duration_since(note.at) < USE_EVERY;
            recent && note.of == "operator" && note.name == name && note.to == what
        });
        if !again {
            self.keep(at, "operator", name, String::new(), what, reason);
        }
    }

    fn keep(
        &mut self,
        at: Instant,
        of: &'static str,
        name: &str,
        from: String,
        to: &str,
        reason: &str,
    ) {
        if self.notes.len() == NOTES_MAX {
            self.notes.pop_front(); // The oldest says least of what is wrong now.
            self.forgotten += 1;
        }
        let end = reason.floor_char_boundary(REASON_BYTES_MAX);
        self.notes.push_back(Note {
            at,
            of,
            name: name.to_owned(),
            from,
            to: to.to_owned(),
            reason: reason.get(..end).unwrap_or_default().to_owned(),
        });
    }

    /// What the core is told of a link to a relay; `name` of it.
    pub fn note_input(&mut self, at: Instant, input: &Input, name: impl Fn(&RelayId) -> String) {
        let word = |transport: &RelayTransport| match transport {
            RelayTransport::Quic => "quic",
            RelayTransport::Tls => "tls",
        };
        let whose = |relay, transport| format!("{} ({})", name(relay), word(transport));
        if let Input::RelayConnected { relay, transport } = input {
            self.note(at, "relay", &whose(relay, transport), "up", "");
        } else if let Input::RelayLost {
            relay,
            transport,
            reason,
        } = input
        {
            self.note(at, "relay", &whose(relay, transport), "down", reason);
        }
    }

    /// The oldest first.
    pub fn notes(&self) -> impl Iterator<Item = &Note> {
        self.notes.iter()
    }

    /// How many older ones there was no room for.
    #[must_use]
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_changes_are_noted_and_what_was_before_is_known() {
        let mut journal = Journal::default();
        let at = Instant::now();
        for (to, reason) in [("ok", ""), ("ok", ""), ("down", "a"), ("down", "b")] {
            journal.note(at, "health", "", to, reason);
        }
        let notes: Vec<_> = journal.notes().collect();
        let words = notes
            .iter()
            .map(|note| [note.from.as_str(), &note.to, &note.reason]);
        let words: Vec<_> = words.collect();
        assert_eq!(words, [["", "ok", ""], ["ok", "down", "a"]]);
    }

    #[test]
    fn what_other_nodes_ask_is_noted_once_a_minute_for_each_of_them() {
        let mut journal = Journal::default();
        let start = Instant::now();
        for (s, name, what) in [
            (0, "a", "asked Status"),
            (59, "a", "asked Status"),
            (59, "a", "asked Peers"),
            (59, "b", "asked Status"),
            (60, "a", "asked Status"),
        ] {
            journal.note_use(start + Duration::from_secs(s), name, what, "");
        }
        let names = journal.notes().map(|note| [note.name.as_str(), &note.to]);
        let names: Vec<_> = names.collect();
        let want = [
            ["a", "asked Status"],
            ["a", "asked Peers"],
            ["b", "asked Status"],
            ["a", "asked Status"],
        ];
        assert_eq!(names, want);
    }

    #[test]
    fn links_are_noted_by_the_relay_s_name_and_what_they_run_over() {
        let mut journal = Journal::default();
        let (at, relay) = (Instant::now(), RelayId(7));
        let transport = RelayTransport::Quic;
        let name = |_: &RelayId| "r1".to_owned();
        journal.note_input(at, &Input::Timeout, name);
        journal.note_input(at, &Input::RelayConnected { relay, transport }, name);
        let reason = "the relay is full".to_owned();
        let lost = Input::RelayLost {
            relay,
            transport,
            reason,
        };
        journal.note_input(at, &lost, name);
        let notes: Vec<_> = journal.notes().map(|note| note.to.as_str()).collect();
        assert_eq!(notes, ["up", "down"]);
        let last = journal.notes().last().unwrap();
        assert_eq!(
            (last.name.as_str(), last.reason.as_str()),
            ("r1 (quic)", "the relay is full")
        );
    }

    #[test]
    fn the_oldest_goes_first_and_is_counted_and_long_reasons_are_cut() {
        let mut journal = Journal::default();
        let at = Instant::now();
        let long = "ü".repeat(REASON_BYTES_MAX);
        for number in 0..NOTES_MAX + 3 {
            journal.note(at, "relay", "r1", &number.to_string(), &long);
        }
        assert_eq!(journal.notes().count(), NOTES_MAX);
        assert_eq!(journal.forgotten(), 3);
        let first = journal.notes().next().unwrap();
        assert_eq!((first.from.as_str(), first.to.as_str()), ("2", "3"));
        assert!(first.reason.len() <= REASON_BYTES_MAX);
    }
}
