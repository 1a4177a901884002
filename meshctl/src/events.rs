//! `events`: what changed last.

use jiff::{Timestamp, tz::TimeZone};
use mesh_api::admin::EventsResponse;
use serde::Serialize;

use crate::{
    report::some,
    show::{Report, state_tone},
    table::{Cell, Tone, duration, table},
};

/// `events`.
#[derive(Debug, Serialize)]
pub(crate) struct Events {
    /// The oldest first.
    pub(crate) events: Vec<Event>,
    /// Of relays, the controller and health: older ones for which the agent had no room.
    pub(crate) forgotten: u64,
}

#[derive(Debug, Serialize)]
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
        }
    }
}

impl Report for Events {
    fn text(&self, colours: bool) -> String {
        if self.events.is_empty() {
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
        let rows = self.events.iter().map(row).collect();
        table(&head, rows, colours)
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
