//! Answers about own names, as they were sent: the same question gets the same bytes until the view
//! changes. Decoding, deciding and encoding take microseconds, this takes a tenth of one.
//!
//! Two questions are the same if they differ in nothing but their id and the case of their name. The
//! reply repeats the question as asked; names in the rest of it point there.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use hickory_proto::op::ResponseCode;
use mesh_core::services::View;

use crate::zone::OWN_TTL_S;

/// What all threads keep at most, in bytes: on two of them 7,500 names each, with 400 bytes for a name, its answer
/// and the books. When a thread's part is full, it begins anew.
const BYTES_MAX: usize = 6 << 20;

/// What an entry takes beside its bytes: the map's slot, two vectors, and the allocator's rounding.
const ENTRY_OVERHEAD_BYTES: usize = 160;

/// Longer queries carry what we do not know; they are decided each time.
const QUERY_MAX_BYTES: usize = 300;

/// In how many orders an answer with several records is kept: equals take turns.
const TURNS: usize = 8;

/// An answer of several records is built anew after this even if nothing changed, so that other orders get their turn too.
const AGE_MAX: Duration = Duration::from_secs(OWN_TTL_S as u64);

const HEADER_LEN: usize = 12;
const TYPE_AND_CLASS_LEN: usize = 4;

/// An OPT record without options (RFC 6891 §6.1.2).
const EMPTY_OPT_LEN: usize = 11;

/// What is counted of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Said {
    pub(crate) code: ResponseCode,
    /// Answers are missing.
    pub(crate) cut: bool,
    /// Policy may deny some of it to a pod.
    pub(crate) may_be_denied: bool,
}

#[derive(Debug)]
struct Entry {
    said: Said,
    /// By the query's id, if there are several answers; else one.
    turns: Vec<Option<Vec<u8>>>,
    /// Of the first of them.
    since: Instant,
}

impl Entry {
    fn is_old(&self, now: Instant) -> bool {
        self.turns.len() > 1 && now.saturating_duration_since(self.since) >= AGE_MAX
    }
}

/// The answers of one thread.
#[derive(Debug)]
pub(crate) struct Packed {
    entries: HashMap<Vec<u8>, Entry>,
    bytes: usize,
    bytes_max: usize,
    /// They hold for this view.
    view: Option<Arc<View>>,
    /// Of the batch that is answered.
    now: Instant,
    key: Vec<u8>,
}

impl Packed {
    /// For one of so many threads.
    pub(crate) fn new(threads: usize, now: Instant) -> Self {
        Self {
            entries: HashMap::new(),
            bytes: 0,
            bytes_max: BYTES_MAX / threads.max(1),
            view: None,
            now,
            key: Vec::new(),
        }
    }

    /// A batch is answered now, from this view. Forgets what was built from another one.
    pub(crate) fn begin(&mut self, view: Option<&Arc<View>>, now: Instant) {
        let same = match (&self.view, view) {
            (Some(known), Some(view)) => Arc::ptr_eq(known, view),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        self.now = now;
        if !same {
            self.clear();
            self.view = view.cloned();
        }
    }

    /// The reply to `query`, at the end of `reply`, if it is known; with `for_caller` only if it is for everybody. Returns
    /// what it says.
    pub(crate) fn reply(
        &mut self,
        query: &[u8],
        reply: &mut Vec<u8>,
        for_caller: bool,
    ) -> Option<Said> {
        let name_end = normal(query, &mut self.key)?;
        let entry = self.entries.get(&self.key)?;
        if for_caller && entry.said.may_be_denied || entry.is_old(self.now) {
            return None;
        }
        let packed = entry.turns.get(turn(query, entry.turns.len()))?.as_ref()?;
        let start = reply.len();
        reply.extend_from_slice(packed);
        let own = reply.get_mut(start..)?;
        own.get_mut(..2)?.copy_from_slice(query.get(..2)?);
        let asked = HEADER_LEN..name_end;
        own.get_mut(asked.clone())?
            .copy_from_slice(query.get(asked)?);
        Some(entry.said)
    }

    /// Keeps the reply to `query`; `several`: its answers take turns.
    pub(crate) fn keep(&mut self, query: &[u8], reply: &[u8], said: Said, several: bool) {
        if normal(query, &mut self.key).is_none() {
            return;
        }
        let turns = if several { TURNS } else { 1 };
        let more = self.key.len() + turns * size_of::<Option<Vec<u8>>>() + ENTRY_OVERHEAD_BYTES;
        if self.bytes + more + reply.len() > self.bytes_max {
            self.clear();
        }
        let entry = match self.entries.get_mut(&self.key) {
            Some(entry) => entry,
            None => {
                self.bytes += more;
                let entry = Entry {
                    said,
                    turns: vec![None; turns],
                    since: self.now,
                };
                self.entries.entry(self.key.clone()).or_insert(entry)
            }
        };
        if entry.is_old(self.now) {
            self.bytes -= entry.turns.iter().flatten().map(Vec::len).sum::<usize>();
            entry.turns.fill(None);
            (entry.said, entry.since) = (said, self.now);
        }
        let turn = turn(query, entry.turns.len());
        if let Some(slot @ None) = entry.turns.get_mut(turn) {
            self.bytes += reply.len();
            *slot = Some(reply.to_vec());
        }
    }

    fn clear(&mut self) {
        self.entries.clear();
        self.bytes = 0;
    }
}

fn turn(query: &[u8], turns: usize) -> usize {
    let last = query.get(1).copied().unwrap_or_default();
    usize::from(last) % turns.max(1)
}

/// Writes into `key` what tells `query` apart: all but its id, the name in lower case. Returns where the name
/// ends. `None`: it is not one plain question, perhaps with an empty OPT record.
fn normal(query: &[u8], key: &mut Vec<u8>) -> Option<usize> {
    let (header, rest) = query.split_first_chunk::<HEADER_LEN>()?;
    let [_, _, flags, _, counts @ ..] = header;
    let is_query = flags & 0xf8 == 0; // A query, and of the standard kind (RFC 1035 §4.1.1).
    let [0, 1, 0, 0, 0, 0, 0, additional @ 0..=1] = *counts else {
        return None;
    };
    if !is_query || query.len() > QUERY_MAX_BYTES {
        return None;
    }
    let mut name_len = 0;
    loop {
        let label_len = usize::from(*rest.get(name_len)?);
        name_len += 1 + label_len;
        match label_len {
            0 => break,
            1..=63 => {}
            _ => return None, // A pointer, in a question.
        }
    }
    let name_end = HEADER_LEN + name_len;
    let opt_len = usize::from(additional) * EMPTY_OPT_LEN;
    if query.len() != name_end + TYPE_AND_CLASS_LEN + opt_len {
        return None;
    }
    key.clear();
    key.extend_from_slice(query.get(2..)?);
    // Lengths of labels are below every letter.
    key.get_mut(HEADER_LEN - 2..name_end - 2)?
        .make_ascii_lowercase();
    Some(name_end)
}

#[cfg(test)]
mod tests;
