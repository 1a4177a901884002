//! What upstreams said, for as long as they said it holds, and longer when they are gone.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{Name, RData, RecordType},
};

/// Answers kept. With [`ENTRY_MAX_BYTES`] at most 16 MiB, typically below 1 MiB.
pub(crate) const ENTRIES_MAX: usize = 4096;

/// Larger answers are not kept.
pub(crate) const ENTRY_MAX_BYTES: usize = 4096;

/// However long upstreams say: a wrong record should not outlive an operator's patience.
const POSITIVE_TTL_MAX_S: u32 = 3600;

/// "No" is kept at most this long (RFC 2308 §5 asks for one to three hours as the upper limit;
/// people who have just made a name should not wait that long).
const NEGATIVE_TTL_MAX_S: u32 = 300;

/// How long beyond its time an answer is kept for when no upstream answers, unless told otherwise (RFC 8767 §5
/// suggests one to three days).
pub(crate) const DEFAULT_STALE_MAX: Duration = Duration::from_secs(86_400);

/// An answer is asked for anew in this last part of its time …
const PREFETCH_PART: u32 = 10;

/// … if it was given this often in its time: what nobody wants should not be asked for for ever.
const PREFETCH_HITS_MIN: u32 = 2;

/// How long clients may keep an answer beyond its time, in seconds (RFC 8767 §4).
const STALE_TTL_S: u32 = 30;

/// What answers are told apart by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// In lower case.
    pub(crate) name: Name,
    pub(crate) query_type: RecordType,
    pub(crate) dnssec_ok: bool,
    pub(crate) checking_disabled: bool,
}

/// A cached answer, its times to live counted down.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Cached {
    /// Holds still.
    Fresh(Message),
    /// Holds still, is near its end, and was asked for often: ask for it anew. Said once.
    Ending(Message),
    /// Better than nothing.
    Stale(Message),
}

/// Evicts what was learnt longest ago.
#[derive(Debug)]
pub(crate) struct Cache {
    stale_max: Duration,
    entries: HashMap<Key, Entry>,
    by_age: BTreeMap<u64, Key>,
    inserted: u64,
}

#[derive(Debug)]
struct Entry {
    age: u64,
    /// As it came: parsing costs microseconds, and the size is known.
    bytes: Vec<u8>,
    learnt: Instant,
    expires: Instant,
    hits: u32,
    refreshing: bool,
}

impl Cache {
    /// `stale_max`: how long beyond its time an answer may still be given.
    pub(crate) fn new(stale_max: Duration) -> Self {
        Self {
            stale_max,
            entries: HashMap::new(),
            by_age: BTreeMap::new(),
            inserted: 0,
        }
    }

    pub(crate) fn get(&mut self, key: &Key, now: Instant) -> Option<Cached> {
        let entry = self.entries.get_mut(key)?;
        if now >= entry.expires + self.stale_max {
            return None; // It goes when its place is needed.
        }
        let mut message = Message::from_vec(&entry.bytes).ok()?;
        let fresh = now < entry.expires;
        let age_s = u32::try_from(now.saturating_duration_since(entry.learnt).as_secs());
        let sections = [
            &mut message.answers,
            &mut message.authorities,
            &mut message.additionals,
        ];
        for record in sections.into_iter().flatten() {
            record.ttl = if fresh {
                record.ttl.saturating_sub(age_s.unwrap_or(u32::MAX))
            } else {
                STALE_TTL_S
            };
        }
        if !fresh {
            return Some(Cached::Stale(message));
        }
        entry.hits = entry.hits.saturating_add(1);
        let ending = entry.expires - now <= (entry.expires - entry.learnt) / PREFETCH_PART;
        if ending && entry.hits > PREFETCH_HITS_MIN && !entry.refreshing {
            entry.refreshing = true;
            return Some(Cached::Ending(message));
        }
        Some(Cached::Fresh(message))
    }

    /// Keeps `message`, which came as `bytes`, if it may be kept.
    /// How many answers there are, also those beyond their time.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn insert(&mut self, key: Key, bytes: Vec<u8>, message: &Message, now: Instant) {
        let ttl_s = ttl_s(message);
        if ttl_s == 0 || bytes.len() > ENTRY_MAX_BYTES {
            return;
        }
        self.inserted += 1;
        let entry = Entry {
            age: self.inserted,
            bytes,
            learnt: now,
            expires: now + Duration::from_secs(ttl_s.into()),
            hits: 0,
            refreshing: false,
        };
        self.by_age.insert(self.inserted, key.clone());
        if let Some(replaced) = self.entries.insert(key, entry) {
            self.by_age.remove(&replaced.age);
        }
        while self.entries.len() > ENTRIES_MAX {
            let Some((_, oldest)) = self.by_age.pop_first() else {
                return;
            };
            self.entries.remove(&oldest);
        }
    }
}

/// How long `message` may be kept; 0: not at all.
fn ttl_s(message: &Message) -> u32 {
    let answered = matches!(
        message.response_code,
        ResponseCode::NoError | ResponseCode::NXDomain
    );
    if !answered || message.truncation {
        return 0;
    }
    let positive = message.answers.iter().map(|record| record.ttl).min();
    let says_no = message.response_code == ResponseCode::NXDomain || positive.is_none();
    let negative = message.authorities.iter().find_map(|record| {
        let RData::SOA(soa) = &record.data else {
            return None;
        };
        Some(record.ttl.min(soa.minimum).min(NEGATIVE_TTL_MAX_S))
    });
    match (positive, says_no) {
        (Some(ttl_s), false) => ttl_s.min(POSITIVE_TTL_MAX_S),
        // Without SOA a "no" must not be kept (RFC 2308 §5).
        (positive, _) => negative.map_or(0, |ttl_s| ttl_s.min(positive.unwrap_or(u32::MAX))),
    }
}

#[cfg(test)]
mod tests;
