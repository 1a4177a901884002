//! What the resolver tells of itself, for people. Nothing here is on a question's way.

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use hickory_proto::rr::Name;
use ipnet::IpNet;
use mesh_core::services::View;

use crate::{
    cache::{ENTRIES_MAX, STALE_TTL_S, Seen, counted_down},
    client::code_text,
    counters::Counters,
    forward::Forwarder,
    local::{BadRecords, domain_name},
    server::{Held, ViewNow},
    upstream::UpstreamReport,
};

/// Records of one answer that are told; with [`RECORD_MAX_CHARS`] and a name of 1 KiB (255 bytes, each escaped) an answer is 3 KiB,
/// and all of a full cache 13 MB.
const RECORDS_MAX: usize = 8;

/// Of a record's text: an address, or a name at the end of an alias, and the beginning of a long TXT.
const RECORD_MAX_CHARS: usize = 256;

/// Tells of a server; does not keep it from ending.
#[derive(Clone)]
pub struct Inspector {
    pub(crate) listen: Vec<SocketAddr>,
    pub(crate) held: Held,
    pub(crate) view: ViewNow,
    pub(crate) forwarder: Arc<Forwarder>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) stale_max: Duration,
    pub(crate) allow_from: Vec<IpNet>,
    pub(crate) query_log: bool,
    pub(crate) leave_out_denied: bool,
}

/// Some of what the cache has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CachePage {
    /// What was learnt last comes first.
    pub answers: Vec<CachedAnswer>,
    /// How many there are of what was looked for, also those that had no room.
    pub matching: usize,
}

/// An answer of an upstream, as it would be given now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedAnswer {
    /// What was asked for, in lower case, as in a zone file.
    pub name: String,
    /// `A`, `AAAA` …
    pub record_type: String,
    /// `NOERROR` or `NXDOMAIN`.
    pub code: String,
    /// The answer section, a record a line as in a zone file; the first eight, and of each 256 characters.
    pub records: Vec<String>,
    /// How many records there are.
    pub records_all: usize,
    /// How long it holds; `None`: its time is over.
    pub left: Option<Duration>,
    /// Until when it is given if no upstream answers.
    pub stale_left: Duration,
    /// How often it was given while it held.
    pub hits: u32,
    /// It is for those who ask for signatures (RFC 4035 §3.2.1).
    pub dnssec_ok: bool,
    /// It is for those who check themselves (RFC 4035 §3.2.2).
    pub checking_disabled: bool,
}

impl CachedAnswer {
    pub(crate) fn new(seen: &Seen, stale_max: Duration, now: Instant) -> Option<Self> {
        let left = seen.expires.checked_duration_since(now);
        let left = left.filter(|left| !left.is_zero());
        let message = counted_down(&seen.bytes, seen.learnt, left.is_some(), now)?;
        let records = message.answers.iter().take(RECORDS_MAX);
        let text = |record: &dyn fmt::Display| {
            let text = record.to_string();
            text.chars().take(RECORD_MAX_CHARS).collect()
        };
        Some(Self {
            name: seen.key.name.to_ascii(),
            record_type: seen.key.query_type.to_string(),
            code: code_text(message.response_code),
            records: records.map(|record| text(record)).collect(),
            records_all: message.answers.len(),
            left,
            stale_left: (seen.expires + stale_max).saturating_duration_since(now),
            hits: seen.hits,
            dnssec_ok: seen.key.dnssec_ok,
            checking_disabled: seen.key.checking_disabled,
        })
    }
}

impl Inspector {
    /// Answers that the cache holds at most.
    pub const CACHED_MAX: usize = ENTRIES_MAX;

    /// For so long clients keep an answer beyond its time: who was given one has it that long.
    pub const STALE_TTL: Duration = Duration::from_secs(STALE_TTL_S as u64);

    /// Where it listens.
    #[must_use]
    pub fn listen(&self) -> &[SocketAddr] {
        &self.listen
    }

    /// Of these, where somebody else listens, by `UDP` or `TCP`, and what the kernel says: tried again until it is free.
    #[must_use]
    pub fn held(&self) -> BTreeMap<(SocketAddr, &'static str), String> {
        self.held.all()
    }

    /// From what it answers own names; `None`: there is no snapshot yet.
    #[must_use]
    pub fn view(&self) -> Option<Arc<View>> {
        (self.view)()
    }

    /// What was counted since start.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// How long beyond its time an upstream's answer may be given.
    #[must_use]
    pub fn stale_max(&self) -> Duration {
        self.stale_max
    }

    /// Who may ask beyond this node and what is behind it.
    #[must_use]
    pub fn allow_from(&self) -> &[IpNet] {
        &self.allow_from
    }

    /// Whether each answer is logged.
    #[must_use]
    pub fn query_log(&self) -> bool {
        self.query_log
    }

    /// Whether pods are not told of endpoints that policy denies to them.
    #[must_use]
    pub fn leave_out_denied(&self) -> bool {
        self.leave_out_denied
    }

    /// How each upstream does, with the domain that it is asked about: those for everything (the root) first.
    #[must_use]
    pub fn upstreams(&self) -> Vec<(&Name, UpstreamReport)> {
        self.forwarder.upstreams()
    }

    /// How long ago an answer beyond its time was given.
    #[must_use]
    pub fn gave_stale(&self) -> Option<Duration> {
        self.forwarder.gave_stale()
    }

    /// What the cache has of `name` and all names below it (empty: of everything), at most `most` of them. Takes milliseconds: not for
    /// a thread that others wait for.
    ///
    /// # Errors
    ///
    /// If `name` is none.
    pub fn cache(&self, name: &str, most: usize) -> Result<CachePage, BadRecords> {
        Ok(self.forwarder.look(&below(name)?, most))
    }

    /// Forgets that, and says how many answers it were. What an upstream is being asked for comes back.
    ///
    /// # Errors
    ///
    /// If `name` is none.
    pub fn forget(&self, name: &str) -> Result<usize, BadRecords> {
        Ok(self.forwarder.forget(&below(name)?))
    }
}

fn below(name: &str) -> Result<Name, BadRecords> {
    match name {
        "" => Ok(Name::root()),
        name => domain_name(name),
    }
}

impl fmt::Debug for Inspector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inspector")
            .field("listen", &self.listen)
            .finish_non_exhaustive()
    }
}
