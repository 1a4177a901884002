//! What upstreams said, for as long as they said it holds, and longer when they are gone.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{Name, RData, RecordType},
};

/// Answers kept. With [`ENTRY_MAX_BYTES`] at most 16 MiB, typically below 1 MiB.
pub(crate) const ENTRIES_MAX: usize = 4096;

/// Of these that a name does not exist: who asks for one such after the other takes away nothing that is wanted in an outage.
const NXDOMAINS_MAX: usize = ENTRIES_MAX / 4;

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
pub(crate) const STALE_TTL_S: u32 = 30;

/// Entries that one look goes through: the threads that answer wait for it meanwhile, for 16 copies of at most 4 KiB each.
const LOOK_ENTRIES_MAX: usize = 16;

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

/// An entry as [`Cache::look`] copies it.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) key: Key,
    /// As [`Cache::get`] has it; asking for it here does not count.
    pub(crate) bytes: Vec<u8>,
    pub(crate) learnt: Instant,
    pub(crate) expires: Instant,
    pub(crate) hits: u32,
}

/// Some entries, the newest first.
#[derive(Debug)]
pub(crate) struct Look {
    pub(crate) seen: Vec<Seen>,
    /// How many there were that were looked for, copied or not.
    pub(crate) matching: usize,
    /// Where the next look begins; `None`: that were all.
    pub(crate) next: Option<u64>,
}

/// Evicts what was learnt longest ago.
#[derive(Debug)]
pub(crate) struct Cache {
    stale_max: Duration,
    entries: HashMap<Key, Entry>,
    by_age: BTreeMap<u64, Key>,
    /// Those that say that a name does not exist.
    nxdomains: BTreeSet<u64>,
    inserted: u64,
}

/// An answer that is kept.
#[derive(Debug)]
pub(crate) struct Entry {
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
            nxdomains: BTreeSet::new(),
            inserted: 0,
        }
    }

    pub(crate) fn get(&mut self, key: &Key, now: Instant) -> Option<Cached> {
        let entry = self.entries.get_mut(key)?;
        if now >= entry.expires + self.stale_max {
            return None; // It goes when its place is needed.
        }
        let fresh = now < entry.expires;
        let message = counted_down(&entry.bytes, entry.learnt, fresh, now)?;
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

    /// How many answers there are, also those beyond their time.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// How long beyond its time an answer may still be given.
    pub(crate) fn stale_max(&self) -> Duration {
        self.stale_max
    }

    /// Looks through some of the entries from `before` on (`u64::MAX`: from the newest), for what may still be given of `below` and
    /// the names below it. At most `copies_max` are copied.
    pub(crate) fn look(&self, before: u64, below: &Name, copies_max: usize, now: Instant) -> Look {
        let (mut seen, mut matching) = (Vec::new(), 0);
        let (numbers, next) = self.some(before);
        for key in numbers.iter().filter_map(|number| self.by_age.get(number)) {
            let entry = self
                .entries
                .get(key)
                .filter(|entry| below.zone_of(&key.name) && now < entry.expires + self.stale_max);
            let Some(entry) = entry else { continue };
            matching += 1;
            if seen.len() < copies_max {
                seen.push(Seen {
                    key: key.clone(),
                    bytes: entry.bytes.clone(),
                    learnt: entry.learnt,
                    expires: entry.expires,
                    hits: entry.hits,
                });
            }
        }
        Look {
            seen,
            matching,
            next,
        }
    }

    /// Forgets those of some entries from `before` on that are of `below` or the names below it. Gives what is to be dropped
    /// without the cache's lock, and where to go on.
    pub(crate) fn forget(&mut self, before: u64, below: &Name) -> (Vec<Entry>, Option<u64>) {
        let (numbers, next) = self.some(before);
        let mut forgotten = Vec::new();
        for number in numbers {
            let key = self.by_age.get(&number);
            if key.is_some_and(|key| below.zone_of(&key.name)) {
                forgotten.extend(self.remove(number));
            }
        }
        (forgotten, next)
    }

    /// The next entries' numbers, and where those after them begin.
    fn some(&self, before: u64) -> (Vec<u64>, Option<u64>) {
        let numbers = self.by_age.range(..before).rev();
        let numbers: Vec<_> = numbers
            .map(|(number, _)| *number)
            .take(LOOK_ENTRIES_MAX)
            .collect();
        let full = numbers.len() == LOOK_ENTRIES_MAX;
        let next = numbers.last().copied().filter(|_| full);
        (numbers, next)
    }

    /// Keeps `message`, which came as `bytes`, if it may be kept.
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
        let replaced = self.entries.get(&key).map(|entry| entry.age);
        replaced.and_then(|age| self.remove(age));
        self.by_age.insert(self.inserted, key.clone());
        self.entries.insert(key, entry);
        if message.response_code == ResponseCode::NXDomain {
            self.nxdomains.insert(self.inserted);
        }
        // One came, so one goes at most.
        let goes = if self.nxdomains.len() > NXDOMAINS_MAX {
            self.nxdomains.first().copied()
        } else if self.entries.len() > ENTRIES_MAX {
            self.by_age.keys().next().copied()
        } else {
            None
        };
        goes.and_then(|age| self.remove(age));
    }

    fn remove(&mut self, age: u64) -> Option<Entry> {
        self.nxdomains.remove(&age);
        let key = self.by_age.remove(&age)?;
        self.entries.remove(&key)
    }
}

/// An answer that came as `bytes`, as it is given now.
pub(crate) fn counted_down(
    bytes: &[u8],
    learnt: Instant,
    fresh: bool,
    now: Instant,
) -> Option<Message> {
    let mut message = Message::from_vec(bytes).ok()?;
    let age_s = u32::try_from(now.saturating_duration_since(learnt).as_secs());
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
    Some(message)
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
