//! `drops`: what this node dropped or refused, by reason.

use std::{collections::BTreeMap, time::Duration};

use mesh_api::admin::{DropReport, DropsResponse};
use serde::Serialize;

use crate::{
    show::Report,
    table::{Cell, Tone, duration, table},
};

/// `drops`.
#[derive(Debug, Serialize)]
pub(crate) struct Drops {
    /// Since the agent started: so long the packets were counted.
    pub(crate) uptime_ms: u64,
    pub(crate) drops: Vec<Drop>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Drop {
    /// `tunnel`, `sockets`, `services`, `mapping`, `policy` or `dns`.
    pub(crate) part: String,
    pub(crate) reason: String,
    pub(crate) packets: u64,
    /// Since the look before, with `--watch`; `null` at the first.
    pub(crate) packets_per_s: Option<f64>,
    /// For people; its words may change.
    pub(crate) explanation: String,
}

impl Drops {
    /// `before`: the counts of the look before, so long ago. A count that went back is a restarted agent's: no rate.
    pub(crate) fn new(said: DropsResponse, all: bool, before: Option<(&Self, Duration)>) -> Self {
        let before_of = |one: &DropReport| {
            let (before, ago) = before?;
            let mut counted = before.drops.iter();
            let count = counted
                .find(|two| two.part == one.part && two.reason == one.reason)
                .map_or(0, |two| two.packets);
            let more = u32::try_from(one.packets.checked_sub(count)?).ok()?;
            Some(f64::from(more) / ago.as_secs_f64().max(f64::EPSILON))
        };
        let drops = said.drops.into_iter().filter(|one| all || one.packets > 0);
        let drops = drops.map(|one| Drop {
            packets_per_s: before_of(&one),
            part: one.part,
            reason: one.reason,
            packets: one.packets,
            explanation: one.explanation,
        });
        Self {
            uptime_ms: said.uptime_ms,
            drops: drops.collect(),
        }
    }
}

impl Report for Drops {
    fn text(&self, colours: bool) -> String {
        let since = duration(self.uptime_ms / 1000);
        if self.drops.is_empty() {
            return format!("nothing was dropped since the agent started, {since} ago\n");
        }
        let mut parts: BTreeMap<&str, u64> = BTreeMap::new();
        for one in &self.drops {
            *parts.entry(one.part.as_str()).or_default() += one.packets;
        }
        let rates = self.drops.iter().any(|one| one.packets_per_s.is_some());
        let row = |one: &Drop| {
            let rate = one.packets_per_s.unwrap_or_default();
            let tone = match rate > 0.0 {
                true => Tone::Warning,
                false => Tone::Plain,
            };
            let mut row: Vec<Cell> = vec![
                (&one.part).into(),
                Cell::new(&one.reason, tone),
                one.packets.to_string().into(),
            ];
            if rates {
                row.push(Cell::new(format!("{rate:.1}"), tone));
            }
            row.push((&one.explanation).into());
            row
        };
        let mut head = vec!["PART", "REASON", "PACKETS"];
        if rates {
            head.push("A SECOND");
        }
        head.push("MEANS");
        let rows = self.drops.iter().map(row).collect();
        let sums = parts
            .iter()
            .map(|(part, count)| format!("{count} by {part}"));
        let sums: Vec<_> = sums.collect();
        format!(
            "{}\nsince the agent started, {since} ago: {}\n",
            table(&head, rows, colours),
            sums.join(", ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(packets: u64) -> DropsResponse {
        DropsResponse {
            uptime_ms: 1,
            drops: vec![DropReport {
                part: "tunnel".into(),
                reason: "no_route".into(),
                packets,
                explanation: "x".into(),
            }],
        }
    }

    #[test]
    fn a_rate_is_what_came_since_the_look_before_and_none_after_a_restart() {
        let first = Drops::new(said(10), false, None);
        assert_eq!(first.drops[0].packets_per_s, None);
        let ago = Duration::from_secs(2);
        let second = Drops::new(said(15), false, Some((&first, ago)));
        assert_eq!(second.drops[0].packets_per_s, Some(2.5));
        let restarted = Drops::new(said(3), false, Some((&second, ago)));
        assert_eq!(restarted.drops[0].packets_per_s, None);
        // What was nothing before is not among the rows before.
        let none = Drops::new(said(0), false, None);
        assert!(none.drops.is_empty());
        let some = Drops::new(said(4), false, Some((&none, ago)));
        assert_eq!(some.drops[0].packets_per_s, Some(2.0));
    }
}
