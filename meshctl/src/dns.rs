//! `dns status` and `dns cache`: how a node's resolver does, and what it was told of others' names.

use std::{collections::BTreeMap, net::IpAddr};

use mesh_api::admin::{
    DnsCacheEntry, DnsCacheRequest, DnsCacheResponse, DnsFlushRequest, DnsStatusRequest,
    DnsStatusResponse, DnsUpstream,
};
use serde::Serialize;

use crate::{
    Verdict,
    connect::{self, Agent, ask},
    failure::{Daemon, Failure},
    relays::health_verdict,
    report::{health, some},
    run::Screen,
    show::{Report, counted, row},
    table::{Cell, Tone, columns, duration, milliseconds, table},
};

/// Answers of the cache that are shown at once, the newest: a screen. All, with `--all`, are 4,096 of at most 3 KiB: 13 MB of the
/// 64 MiB that an answer may have.
const ENTRIES_SHOWN: u32 = 50;

/// What is asked: for an address its name, unless something else is wanted.
pub(crate) fn question(name: String, record_type: Option<String>) -> (String, String) {
    let record_type = record_type.map(|one| one.to_ascii_uppercase());
    match (name.parse(), record_type.as_deref()) {
        (Ok(address), None | Some("PTR")) => (reverse(address), "PTR".to_owned()),
        _ => (name, record_type.unwrap_or_else(|| "A".to_owned())),
    }
}

/// The name under which an address has its name (RFC 1035, section 3.5; RFC 3596, section 2.5).
fn reverse(address: IpAddr) -> String {
    let (mut labels, zone): (Vec<_>, _) = match address {
        IpAddr::V4(v4) => {
            let octets = v4.octets();
            (octets.map(|octet| octet.to_string()).to_vec(), "in-addr")
        }
        IpAddr::V6(v6) => {
            let digits = format!("{:032x}", u128::from(v6));
            (digits.chars().map(String::from).collect(), "ip6")
        }
    };
    labels.reverse();
    format!("{}.{zone}.arpa", labels.join("."))
}

pub(crate) async fn status(agent: Agent<'_>) -> Result<DnsStatus, Failure> {
    let mut client = connect::agent(agent).await?;
    let said = ask(Daemon::Agent, client.dns_status(DnsStatusRequest {})).await?;
    Ok(DnsStatus::from(said))
}

/// `dns cache`; an empty name is every name.
pub(crate) async fn cache(
    agent: Agent<'_>,
    name: String,
    all: bool,
    screen: Screen,
) -> Result<Verdict, Failure> {
    let mut client = connect::agent(agent).await?;
    let entries_max = if all { 0 } else { ENTRIES_SHOWN };
    let request = DnsCacheRequest { name, entries_max };
    let said = ask(Daemon::Agent, client.dns_cache(request)).await?;
    screen.show(&DnsCache::from(said))
}

/// `dns cache --flush`.
pub(crate) async fn flush(
    agent: Agent<'_>,
    name: String,
    screen: Screen,
) -> Result<Verdict, Failure> {
    let mut client = connect::agent(agent).await?;
    let said = ask(Daemon::Agent, client.dns_flush(DnsFlushRequest { name })).await?;
    screen.show(&DnsFlushed {
        forgotten: said.forgotten,
    })
}

/// `dns status`. No name that somebody asked for is in it.
#[derive(Debug, Serialize)]
pub(crate) struct DnsStatus {
    /// `ok`, `degraded` (an upstream gives no answers, or answers beyond their time were given within 30 s) or `down` (nobody is
    /// answered, or no upstream answers).
    pub(crate) health: &'static str,
    /// Why it is not `ok`, a sentence each.
    pub(crate) problems: Vec<String>,
    pub(crate) listen: Vec<String>,
    /// The mesh's own, and the prefixes of whose addresses the names are its own.
    pub(crate) zones: Vec<String>,
    /// Of the snapshot from which these are answered; `null`: there is none yet.
    pub(crate) generation: Option<u64>,
    /// Since a controller last vouched for it; 0 while one is connected.
    pub(crate) age_s: u64,
    pub(crate) upstreams: Vec<Upstream>,
    /// Since the agent started, under the names that they have in its metrics, without `dns_`.
    pub(crate) counters: BTreeMap<String, u64>,
    /// Packets that got no answer, by reason; `drops` says what each means.
    pub(crate) drops: BTreeMap<String, u64>,
    pub(crate) cached: u64,
    pub(crate) cached_max: u64,
    /// How long beyond its time an answer is given while no upstream answers.
    pub(crate) stale_max_s: u64,
    /// Who may ask, beyond this node and what is behind it.
    pub(crate) allow_from: Vec<String>,
    pub(crate) leave_out_denied: bool,
    pub(crate) query_log: bool,
}

#[derive(Debug, Serialize)]
pub(crate) struct Upstream {
    /// What it is asked about; `null`: everything that no stub domain has.
    pub(crate) domain: Option<String>,
    pub(crate) address: String,
    /// `udp` (and TCP where an answer does not fit), `tls` or `https`.
    pub(crate) transport: String,
    /// `unknown` (not asked yet), `answers`, `passed_over` (not asked for the moment) or `fails` (no answer twice or more since the
    /// last).
    pub(crate) state: String,
    /// Of the time that it takes, smoothed; `null`: it never answered.
    pub(crate) mean_ms: Option<f64>,
    pub(crate) deviation_ms: Option<f64>,
    /// After this the next is asked, too.
    pub(crate) next_after_ms: f64,
    /// For how long it is not asked yet.
    pub(crate) passed_over_ms: Option<u64>,
    /// Questions without an answer since it last answered.
    pub(crate) failures: u32,
    pub(crate) answered_ago_ms: Option<u64>,
    /// When it last gave no answer that helped, and why.
    pub(crate) failed_ago_ms: Option<u64>,
    pub(crate) failure: Option<String>,
}

impl From<DnsStatusResponse> for DnsStatus {
    fn from(said: DnsStatusResponse) -> Self {
        let upstream = |one: DnsUpstream| Upstream {
            domain: some(one.domain),
            address: one.address,
            transport: one.transport,
            state: one.state,
            mean_ms: one.mean_ms,
            deviation_ms: one.deviation_ms,
            next_after_ms: one.next_after_ms,
            passed_over_ms: one.passed_over_ms,
            failures: one.failures,
            answered_ago_ms: one.answered_ago_ms,
            failed_ago_ms: one.failed_ago_ms,
            failure: some(one.failure),
        };
        Self {
            health: health(said.health()),
            problems: said.problems,
            listen: said.listen,
            zones: said.zones,
            generation: said.generation,
            age_s: said.age_s,
            upstreams: said.upstreams.into_iter().map(upstream).collect(),
            counters: said.counters.into_iter().collect(),
            drops: said.drops.into_iter().collect(),
            cached: said.cached,
            cached_max: said.cached_max,
            stale_max_s: said.stale_max_s,
            allow_from: said.allow_from,
            leave_out_denied: said.leave_out_denied,
            query_log: said.query_log,
        }
    }
}

impl Upstream {
    fn row(&self) -> Vec<Cell> {
        let state = match (self.state.as_str(), self.passed_over_ms) {
            ("answers", _) => Cell::new("answers", Tone::Good),
            ("passed_over", Some(ms)) => Cell::new(format!("passed over, {ms} ms more"), Tone::Bad),
            ("unknown", _) => Cell::new("not known yet", Tone::Faint),
            (other, _) => Cell::new(other, Tone::Bad),
        };
        let usual = match (self.mean_ms, self.deviation_ms) {
            (Some(mean), Some(deviation)) => format!("{mean:.1} ± {deviation:.1} ms"),
            _ => "-".to_owned(),
        };
        let failed = match (&self.failure, self.failed_ago_ms) {
            (Some(why), Some(ms)) => format!("{} ago: {why}", duration(ms / 1000)),
            _ => String::new(),
        };
        vec![
            (&self.address).into(),
            (&self.transport).into(),
            self.domain.as_deref().unwrap_or("everything").into(),
            state,
            usual.into(),
            milliseconds(Some(self.next_after_ms)).into(),
            failed.into(),
        ]
    }
}

impl Report for DnsStatus {
    fn text(&self, colours: bool) -> String {
        let tone = match self.verdict() {
            Verdict::Ok => Tone::Good,
            Verdict::Degraded => Tone::Warning,
            Verdict::Down | Verdict::Usage => Tone::Bad,
        };
        let mut rows = vec![vec!["health".into(), Cell::new(self.health, tone)]];
        let problems = self.problems.iter();
        rows.extend(problems.map(|problem| vec!["".into(), Cell::new(problem, tone)]));
        let from = self.generation.map(|generation| {
            let age = duration(self.age_s);
            format!(
                "{} of generation {generation}, {age} old",
                self.zones.join(", ")
            )
        });
        let on_off = |on| if on { "on" } else { "off" };
        rows.extend([
            row("listens", self.listen.join(", ")),
            row("own names", from.unwrap_or_default()),
            row("asked by", who(&self.allow_from)),
            row("questions", counted(&self.counters)),
            row("dropped", counted(&self.drops)),
            row(
                "cache",
                format!(
                    "{} of {} answers, given for {} beyond their time",
                    self.cached,
                    self.cached_max,
                    duration(self.stale_max_s)
                ),
            ),
            row("leave out denied", on_off(self.leave_out_denied)),
            row("query log", on_off(self.query_log)),
        ]);
        rows.retain(|row| row.get(1) != Some(&Cell::from("")));
        let text = columns(&rows, colours);
        if self.upstreams.is_empty() {
            return format!("{text}\nno upstream: others' names are not asked for\n");
        }
        let head = [
            "UPSTREAM",
            "BY",
            "FOR",
            "STATE",
            "TAKES",
            "NEXT AFTER",
            "LAST FAILURE",
        ];
        let upstreams = self.upstreams.iter().map(Upstream::row).collect();
        format!("{text}\n{}", table(&head, upstreams, colours))
    }

    fn verdict(&self) -> Verdict {
        health_verdict(self.health)
    }
}

fn who(allow_from: &[String]) -> String {
    let mut who = vec!["this node, and what is behind it"];
    who.extend(allow_from.iter().map(String::as_str));
    who.join(", ")
}

/// `dns cache`.
#[derive(Debug, Serialize)]
pub(crate) struct DnsCache {
    /// What was learnt last comes first.
    pub(crate) entries: Vec<Entry>,
    /// How many the cache has of what was asked for; `--all` shows them.
    pub(crate) matching: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct Entry {
    pub(crate) name: String,
    #[serde(rename = "type")]
    pub(crate) record_type: String,
    /// `NOERROR` or `NXDOMAIN`.
    pub(crate) code: String,
    /// A record a line, as in a zone file: the first eight, and of each 256 characters.
    pub(crate) records: Vec<String>,
    pub(crate) records_left_out: u32,
    /// How long it holds; `null`: its time is over, and it is given only if no upstream answers.
    pub(crate) left_s: Option<u64>,
    /// Until when it is given if no upstream answers.
    pub(crate) stale_left_s: u64,
    /// How often it was given while it held.
    pub(crate) hits: u32,
    /// It is for those who ask for signatures.
    pub(crate) dnssec_ok: bool,
    /// It is for those who check signatures themselves.
    pub(crate) checking_disabled: bool,
}

impl From<DnsCacheResponse> for DnsCache {
    fn from(said: DnsCacheResponse) -> Self {
        let entry = |one: DnsCacheEntry| Entry {
            name: one.name,
            record_type: one.r#type,
            code: one.code,
            records: one.records,
            records_left_out: one.records_left_out,
            left_s: one.left_s,
            stale_left_s: one.stale_left_s,
            hits: one.hits,
            dnssec_ok: one.dnssec_ok,
            checking_disabled: one.checking_disabled,
        };
        Self {
            entries: said.entries.into_iter().map(entry).collect(),
            matching: said.matching,
        }
    }
}

impl Entry {
    fn rows(&self) -> impl Iterator<Item = Vec<Cell>> {
        let mut kind = self.record_type.clone();
        if self.dnssec_ok {
            kind += " DO";
        }
        if self.checking_disabled {
            kind += " CD";
        }
        let holds = match self.left_s {
            Some(left) => Cell::new(duration(left), Tone::Good),
            None => Cell::new(
                format!("over; stale for {}", duration(self.stale_left_s)),
                Tone::Warning,
            ),
        };
        let mut records: Vec<_> = self.records.iter().map(Cell::from).collect();
        if records.is_empty() {
            records.push("".into());
        }
        if self.records_left_out > 0 {
            records.push(format!("and {} more", self.records_left_out).into());
        }
        let mut head = vec![
            Cell::from(&self.name),
            kind.into(),
            (&self.code).into(),
            holds,
            self.hits.to_string().into(),
        ];
        records.into_iter().map(move |record| {
            let empty = vec!["".into(); head.len()];
            let mut row = std::mem::replace(&mut head, empty);
            row.push(record);
            row
        })
    }
}

impl Report for DnsCache {
    fn text(&self, colours: bool) -> String {
        if self.entries.is_empty() {
            return "the cache has nothing of that\n".to_owned();
        }
        let head = ["NAME", "TYPE", "CODE", "HOLDS FOR", "GIVEN", "RECORDS"];
        let rows = self.entries.iter().flat_map(Entry::rows).collect();
        let shown = self.entries.len() as u64;
        let rest = match self.matching.saturating_sub(shown) {
            0 => String::new(),
            more => format!("\nand {more} that were learnt before: `--all`\n"),
        };
        format!("{}{rest}", table(&head, rows, colours))
    }
}

/// `dns cache --flush`.
#[derive(Debug, Serialize)]
pub(crate) struct DnsFlushed {
    /// Answers.
    pub(crate) forgotten: u64,
}

impl Report for DnsFlushed {
    fn text(&self, _colours: bool) -> String {
        format!("forgot {} answers\n", self.forgotten)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn for_an_address_its_name_is_asked() {
        let v6 = "8.b.d.0.1.0.0.2.ip6.arpa";
        for (name, wanted, want) in [
            ("edge-b1.mesh", None, ("edge-b1.mesh", "A")),
            ("edge-b1.mesh", Some("aaaa"), ("edge-b1.mesh", "AAAA")),
            ("100.96.0.3", None, ("3.0.96.100.in-addr.arpa", "PTR")),
            (
                "100.96.0.3",
                Some("ptr"),
                ("3.0.96.100.in-addr.arpa", "PTR"),
            ),
            ("100.96.0.3", Some("A"), ("100.96.0.3", "A")),
            (
                "2001:db8::1",
                None,
                (&format!("1.{}{v6}", "0.".repeat(23)), "PTR"),
            ),
        ] {
            let (asked, record_type) = question(name.to_owned(), wanted.map(str::to_owned));
            assert_eq!((asked.as_str(), record_type.as_str()), want);
        }
    }
}
