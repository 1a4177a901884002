//! `events`: what changed last.

use jiff::{Timestamp, tz::TimeZone};
use mesh_api::admin::EventsResponse;
use serde::Serialize;

use crate::{
    report::some,
    show::{Report, state_tone},
    table::{Cell, Tone, columns, duration, table},
};

/// `events`.
#[derive(Debug, Serialize)]
pub(crate) struct Events {
    /// The oldest first.
    pub(crate) events: Vec<Event>,
    /// Of relays, the controller and health: older ones for which the agent had no room.
    pub(crate) forgotten: u64,
    /// All that the looks before and this one had; `None`: it is the first.
    #[serde(skip)]
    known: Option<Vec<Event>>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Event {
    /// By the node's clock of now, whatever it said then.
    pub(crate) at_unix_ms: i64,
    pub(crate) ago_ms: u64,
    /// `peer`, `path`, `relay`, `controller`, `health` or `operator`: another node's, that looked at this one.
    pub(crate) of: String,
    /// The node's or relay's name, or the controller's address; `null`: this node's health.
    pub(crate) name: Option<String>,
    /// Of a path: which.
    pub(crate) path: Option<String>,
    /// The state before; `null`: it is the first that is known.
    pub(crate) from: Option<String>,
    pub(crate) to: String,
    pub(crate) reason: Option<String>,
}

impl Events {
    /// The newest `last` that are about `about`.
    pub(crate) fn new(said: EventsResponse, last: usize, about: Option<&str>) -> Self {
        let is_about = |name: &str| about.is_none_or(|about| name.split(' ').next() == Some(about));
        let mut events: Vec<_> = said
            .events
            .into_iter()
            .filter(|one| is_about(&one.name))
            .map(|one| Event {
                at_unix_ms: one.at_unix_ms,
                ago_ms: one.ago_ms,
                of: one.of,
                name: some(one.name),
                path: some(one.path),
                from: some(one.from),
                to: one.to,
                reason: some(one.reason),
            })
            .collect();
        events.drain(..events.len().saturating_sub(last));
        Self {
            events,
            forgotten: said.forgotten,
            known: None,
        }
    }

    /// What is new of these, which are all, after the look before. If the clock was set in between, everything has another time
    /// and is new.
    pub(crate) fn since(self, before: &Self) -> Self {
        let (known, oldest) = match &before.known {
            Some(all) => (all, None),
            // Older ones were left out.
            None => (&before.events, before.events.first()),
        };
        let is_older = |one: &Event| oldest.is_some_and(|than| one.at_unix_ms < than.at_unix_ms);
        let is_new = |one: &&Event| !is_older(one) && !known.iter().any(|known| known.is(one));
        Self {
            events: self.events.iter().filter(is_new).cloned().collect(),
            known: Some(self.events),
            ..self
        }
    }
}

/// When something happened is told by how long ago it was: two answers differ by some rounding.
const SAME_MS: i64 = 20;

impl Event {
    /// Whether it is the same in another answer.
    fn is(&self, other: &Self) -> bool {
        let told = Self {
            at_unix_ms: other.at_unix_ms,
            ago_ms: other.ago_ms,
            ..self.clone()
        };
        self.at_unix_ms.abs_diff(other.at_unix_ms) <= SAME_MS.unsigned_abs() && told == *other
    }
}

impl Report for Events {
    const FOLLOWS: bool = true;

    fn text(&self, colours: bool) -> String {
        let follows = self.known.is_some();
        if self.events.is_empty() {
            if follows {
                return String::new();
            }
            return "nothing changed since the agent started\n".to_owned();
        }
        let row = |one: &Event| {
            let from = one.from.as_deref().unwrap_or("-");
            let tone = match one.to.as_str() {
                "down" | "not connected" => Tone::Bad,
                "degraded" => Tone::Warning,
                "up" | "connected" | "ok" => Tone::Good,
                other => state_tone(other),
            };
            vec![
                clock(one.at_unix_ms).into(),
                format!("{} ago", duration(one.ago_ms / 1000)).into(),
                (&one.of).into(),
                one.name.as_deref().unwrap_or("-").into(),
                Cell::new(format!("{from} -> {}", one.to), tone),
                one.reason.as_deref().unwrap_or_default().into(),
                one.path.as_deref().unwrap_or_default().into(),
            ]
        };
        let head = [
            "TIME (UTC)",
            "AGE",
            "OF",
            "NAME",
            "CHANGE",
            "REASON",
            "PATH",
        ];
        let rows: Vec<_> = self.events.iter().map(row).collect();
        match follows {
            true => columns(&rows, colours),
            false => table(&head, rows, colours),
        }
    }
}

/// `2026-11-22 16:14:54`.
pub(crate) fn clock(unix_ms: i64) -> String {
    let time = Timestamp::from_millisecond(unix_ms).ok();
    let time = time.map(|time| time.to_zoned(TimeZone::UTC));
    time.map_or_else(
        || "-".to_owned(),
        |time| time.strftime("%Y-%m-%d %H:%M:%S").to_string(),
    )
}

#[cfg(test)]
mod tests {
    use mesh_api::admin::EventReport;

    use super::*;

    /// What the agent says `now_ms` after the first event: each at its time, told with up to 3 ms of rounding.
    fn said(now_ms: u64, rounding: i64, at_ms: &[u64]) -> EventsResponse {
        let event = |&at: &u64| EventReport {
            at_unix_ms: i64::try_from(at).unwrap() + rounding,
            ago_ms: now_ms - at,
            of: "peer".into(),
            name: "edge-b1".into(),
            to: "direct".into(),
            ..EventReport::default()
        };
        EventsResponse {
            events: at_ms.iter().map(event).collect(),
            forgotten: 0,
        }
    }

    #[test]
    fn each_event_is_new_once_and_what_was_left_out_at_first_never_is() {
        let all = |now, rounding, at: &[u64]| Events::new(said(now, rounding, at), 100, None);
        let times = |events: &Events| {
            let events = events.events.iter();
            events.map(|one| one.at_unix_ms).collect::<Vec<_>>()
        };
        let first = Events::new(said(5_000, 0, &[0, 1_000, 2_000]), 2, None);
        assert_eq!(times(&first), [1_000, 2_000]);
        let second = all(7_000, 3, &[0, 1_000, 2_000, 6_000]).since(&first);
        assert_eq!(times(&second), [6_003]);
        assert!(!second.text(false).contains("TIME"), "the head was shown");
        let third = all(9_000, -2, &[0, 1_000, 2_000, 6_000]).since(&second);
        assert_eq!((times(&third), third.text(false)), (vec![], String::new()));
        let fourth = all(11_000, 0, &[2_000, 6_000, 10_000]).since(&third);
        assert_eq!(times(&fourth), [10_000]);
        let of_none = all(1, 0, &[]);
        assert_eq!(times(&all(9, 0, &[5]).since(&of_none)), [5]);
    }
}
