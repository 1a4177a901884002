//! What the mesh is, and what changed since when.
//!
//! Every resource carries the generation in which it last changed, and a removed one leaves a
//! tombstone with the generation of its removal. What changed since generation `g` is then what
//! has a later one: each key once, however often it changed.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_api::{
    control::{Comparison, Resource, ResourceKey, SyncResponse, resource, resource_key::Kind},
    convert::key,
    resources::digest::{Digests, ResourceDigest, Whole, buckets, resource_digest},
};
use prost::Message as _;

/// Most removed resources that are remembered: at 100 bytes, 1 MB. An agent that missed the
/// removal of an older one gets everything anew.
pub const REMOVED_MAX: usize = 10_000;

/// The published resources, and the generation of each one's last change.
#[derive(Debug, Clone, Default)]
pub struct History {
    generation: u64,
    /// An agent with an older generation may have missed a removal that is forgotten.
    floor: u64,
    /// When the generation was made: [`Step::made_unix_ms`].
    made_unix_ms: u64,
    entries: BTreeMap<ResourceKey, Held>,
    by_generation: BTreeSet<(u64, ResourceKey)>,
    removed: BTreeSet<(u64, ResourceKey)>,
    kinds: BTreeMap<Kind, u64>,
}

/// An entry, and the digest of its resource: worked out once.
#[derive(Debug, Clone)]
struct Held {
    entry: Entry,
    digest: Option<ResourceDigest>,
}

/// What is known of one key.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// When it last changed.
    pub generation: u64,
    /// `None`: it was removed then.
    pub resource: Option<Arc<Resource>>,
}

/// The resources of one generation by buckets, to be compared with those of a node.
#[derive(Debug)]
pub struct Index {
    generation: u64,
    digests: Vec<u64>,
    buckets: Vec<Vec<Arc<Resource>>>,
}

/// Where a node's resources differ from those of an [`Index`].
#[derive(Debug, Clone)]
pub struct Differing {
    index: Arc<Index>,
    buckets: Vec<u32>,
    bytes: usize,
}

/// What a resource should be.
#[derive(Debug, Clone, PartialEq)]
pub enum Wanted {
    /// This, shared with the object that it was made from: what did not change is known by its place.
    Resource(Arc<Resource>),
    /// A node with this record. It is signed only if the record is new: signatures are random,
    /// and another signature would be a change.
    Node(Vec<u8>),
}

/// A step from one generation to the next.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Step {
    /// The generation after it.
    pub generation: u64,
    /// When it was made, in milliseconds since 1970; later than the one before ([`History::made_after`]).
    pub made_unix_ms: u64,
    /// Older agents get everything anew.
    pub floor: u64,
    /// What each changed key is now.
    pub changed: BTreeMap<ResourceKey, Entry>,
    /// Tombstones to forget.
    pub forgotten: Vec<ResourceKey>,
}

impl History {
    /// Puts together what the store held.
    #[must_use]
    pub fn restore(
        generation: u64,
        floor: u64,
        made_unix_ms: u64,
        entries: BTreeMap<ResourceKey, Entry>,
    ) -> Self {
        let mut history = Self {
            generation,
            floor,
            made_unix_ms,
            ..Self::default()
        };
        for (key, entry) in entries {
            history.set(key, entry);
        }
        history
    }

    /// The generation now.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// When that was made.
    #[must_use]
    pub fn made_unix_ms(&self) -> u64 {
        self.made_unix_ms
    }

    /// When one is made that comes after it: now, or later if the clock was set back.
    #[must_use]
    pub fn made_after(&self, now_unix_ms: u64) -> u64 {
        now_unix_ms.max(self.made_unix_ms + 1)
    }

    /// How many resources of each kind there are.
    #[must_use]
    pub fn kinds(&self) -> &BTreeMap<Kind, u64> {
        &self.kinds
    }

    /// The digest of all resources: what nodes check that have them from others.
    #[must_use]
    pub fn digest(&self) -> Vec<u8> {
        let mut whole = Whole::default();
        let digests = self.entries.values();
        digests
            .filter_map(|held| held.digest.as_ref())
            .for_each(|digest| whole.add(digest));
        whole.finish().to_vec()
    }

    /// The size of all resources, encoded.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let resources = self.entries.values();
        let resources = resources.filter_map(|held| held.entry.resource.as_deref());
        resources.map(Resource::encoded_len).sum()
    }

    /// The size of what changed since `generation`, encoded.
    #[must_use]
    pub fn bytes_since(&self, generation: u64) -> usize {
        let first = (generation + 1, ResourceKey::default());
        let changed = self.by_generation.range(first..);
        let sizes = changed.map(|(_, key)| {
            let resource = self.resource(key);
            resource.map_or_else(|| key.encoded_len(), |resource| resource.encoded_len())
        });
        sizes.sum()
    }

    /// The step to `wanted`, if anything is different. `sign` is asked only for new records.
    ///
    /// # Errors
    ///
    /// What `sign` says.
    pub fn plan<E>(
        &self,
        wanted: BTreeMap<ResourceKey, Wanted>,
        sign: impl Fn(Vec<u8>) -> Result<Resource, E>,
    ) -> Result<Option<Step>, E> {
        let gone = self
            .entries
            .iter()
            .filter(|(key, held)| held.entry.resource.is_some() && !wanted.contains_key(*key));
        let gone: Vec<_> = gone.map(|(key, _)| (key.clone(), None)).collect();
        let wanted = wanted.into_iter().map(|(key, wanted)| (key, Some(wanted)));
        self.plan_changes(gone.into_iter().chain(wanted), sign)
    }

    /// The step in which these become so, or are gone (`None`), and nothing else changes: at the cost of these alone.
    ///
    /// # Errors
    ///
    /// What `sign` says.
    pub fn plan_changes<E>(
        &self,
        changes: impl IntoIterator<Item = (ResourceKey, Option<Wanted>)>,
        sign: impl Fn(Vec<u8>) -> Result<Resource, E>,
    ) -> Result<Option<Step>, E> {
        let generation = self.generation + 1;
        let mut changed = BTreeMap::new();
        for (key, wanted) in changes {
            let now = self.resource(&key);
            let same = |resource: &Arc<Resource>| {
                now.is_some_and(|now| Arc::ptr_eq(now, resource) || now == resource)
            };
            let resource = match wanted {
                None if now.is_none() => continue,
                None => None,
                Some(Wanted::Resource(resource)) if same(&resource) => continue,
                Some(Wanted::Resource(resource)) => Some(resource),
                Some(Wanted::Node(record)) if signed_record(now) == Some(record.as_slice()) => {
                    continue;
                }
                Some(Wanted::Node(record)) => Some(Arc::new(sign(record)?)),
            };
            changed.insert(
                key,
                Entry {
                    generation,
                    resource,
                },
            );
        }
        if changed.is_empty() {
            return Ok(None);
        }
        let (floor, forgotten) = self.forget(&changed);
        Ok(Some(Step {
            generation,
            made_unix_ms: self.made_after(0),
            floor,
            changed,
            forgotten,
        }))
    }

    /// Takes `step`, once it is in the store.
    pub fn apply(&mut self, step: Step) {
        self.generation = step.generation;
        self.floor = step.floor;
        self.made_unix_ms = step.made_unix_ms;
        for key in step.forgotten {
            if let Some(Held { entry, .. }) = self.entries.remove(&key) {
                self.by_generation.remove(&(entry.generation, key.clone()));
                self.removed.remove(&(entry.generation, key));
            }
        }
        for (key, entry) in step.changed {
            self.set(key, entry);
        }
    }

    /// What an agent that has `generation` of this store can be told the changes since; `None`: it needs everything.
    #[must_use]
    pub fn known(&self, generation: Option<u64>) -> Option<u64> {
        generation.filter(|&had| had >= self.floor && had <= self.generation)
    }

    /// What an agent that has `generation` of this store must be told.
    #[must_use]
    pub fn since(&self, store_id: &[u8], generation: Option<u64>) -> SyncResponse {
        let known = self.known(generation);
        let mut response = SyncResponse {
            store_id: store_id.to_vec(),
            generation: self.generation,
            full: known.is_none(),
            ..SyncResponse::default()
        };
        let Some(known) = known else {
            let resources = self.entries.values();
            response.set = resources
                .filter_map(|held| held.entry.resource.as_deref().cloned())
                .collect();
            return response;
        };
        let first = (known + 1, ResourceKey::default());
        for (_, key) in self.by_generation.range(first..) {
            match self.resource(key) {
                Some(resource) => response.set.push(resource.as_ref().clone()),
                None => response.removed.push(key.clone()),
            }
        }
        response
    }

    /// The resources of this generation by buckets. Of 100,000 it takes some 0.2 s.
    #[must_use]
    pub fn index(&self) -> Index {
        let entries = self.entries.iter();
        let resources = || {
            let resources = entries.clone();
            resources.filter_map(|(key, held)| Some((key, held.entry.resource.as_ref()?)))
        };
        let count = buckets(resources().count());
        let mut digests = Digests::new(count);
        let mut buckets: Vec<_> = (0..count).map(|_| Vec::new()).collect();
        for (key, resource) in resources() {
            let place = digests.add(key, resource);
            if let Some(bucket) = buckets.get_mut(place as usize) {
                bucket.push(resource.clone());
            }
        }
        Index {
            generation: self.generation,
            digests: digests.finish(),
            buckets,
        }
    }

    /// The size of the answer to a node that differs so: without what changed since the index was
    /// made. Of everything, if removals since then are forgotten.
    #[must_use]
    pub fn differing_bytes(&self, differing: &Differing) -> usize {
        match self.known(Some(differing.index.generation)) {
            Some(_) => differing.bytes,
            None => self.bytes(),
        }
    }

    /// What a node must be told whose resources differ so: those buckets as they were, and what
    /// changed since then.
    #[must_use]
    pub fn since_differing(&self, store_id: &[u8], differing: &Differing) -> SyncResponse {
        let Differing { index, buckets, .. } = differing;
        let mut response = self.since(store_id, Some(index.generation));
        if response.full {
            return response;
        }
        let first = (index.generation + 1, ResourceKey::default());
        let changed = self.by_generation.range(first..).map(|(_, key)| key);
        let changed: BTreeSet<_> = changed.collect();
        let same = buckets.iter().flat_map(|&bucket| index.bucket(bucket));
        let same = same.filter(|resource| {
            // What is published has a key.
            key(resource).is_ok_and(|key| !changed.contains(&key))
        });
        response
            .set
            .extend(same.map(|resource| resource.as_ref().clone()));
        response.compared = Some(Comparison {
            buckets: index.buckets(),
            differing: buckets.clone(),
        });
        response
    }

    /// What is published at `key`.
    #[must_use]
    pub fn resource(&self, key: &ResourceKey) -> Option<&Arc<Resource>> {
        self.entries.get(key)?.entry.resource.as_ref()
    }

    fn set(&mut self, key: ResourceKey, entry: Entry) {
        let had = self.resource(&key).is_some();
        if let Some(before) = self.entries.get(&key) {
            let place = (before.entry.generation, key.clone());
            self.by_generation.remove(&place);
            self.removed.remove(&place);
        }
        let count = self.kinds.entry(key.kind()).or_default();
        *count += u64::from(entry.resource.is_some());
        *count -= u64::from(had);
        let place = (entry.generation, key.clone());
        if entry.resource.is_none() {
            self.removed.insert(place.clone());
        }
        self.by_generation.insert(place);
        let resource = entry.resource.as_deref();
        let digest = resource.map(|resource| resource_digest(&key, resource));
        self.entries.insert(key, Held { entry, digest });
    }

    /// The oldest tombstones that are too many after `changed`, and the floor without them.
    fn forget(&self, changed: &BTreeMap<ResourceKey, Entry>) -> (u64, Vec<ResourceKey>) {
        let added = changed.values().filter(|entry| entry.resource.is_none());
        if self.removed.len() + added.clone().count() <= REMOVED_MAX {
            return (self.floor, Vec::new());
        }
        let kept = self
            .removed
            .iter()
            .filter(|(_, key)| !changed.contains_key(key));
        let kept: Vec<_> = kept.collect();
        let excess = (kept.len() + added.count()).saturating_sub(REMOVED_MAX);
        let forgotten = kept.into_iter().take(excess);
        let mut floor = self.floor;
        let mut keys = Vec::new();
        for (generation, key) in forgotten {
            floor = floor.max(*generation);
            keys.push(key.clone());
        }
        (floor, keys)
    }
}

impl Index {
    /// How many buckets there are.
    #[must_use]
    pub fn buckets(&self) -> u32 {
        u32::try_from(self.buckets.len()).unwrap_or(u32::MAX)
    }

    /// Where a node differs that told these digests; `None`: they are of another number of buckets.
    #[must_use]
    pub fn compare(self: Arc<Self>, theirs: &[u64]) -> Option<Differing> {
        if theirs.len() != self.digests.len() {
            return None;
        }
        let pairs = (0..).zip(self.digests.iter().zip(theirs));
        let buckets: Vec<u32> = pairs
            .filter(|(_, (ours, theirs))| ours != theirs)
            .map(|(bucket, _)| bucket)
            .collect();
        let resources = buckets.iter().flat_map(|&bucket| self.bucket(bucket));
        let bytes = resources.map(|resource| resource.encoded_len()).sum();
        Some(Differing {
            buckets,
            bytes,
            index: self,
        })
    }

    fn bucket(&self, bucket: u32) -> &[Arc<Resource>] {
        let bucket = self.buckets.get(bucket as usize);
        bucket.map(Vec::as_slice).unwrap_or_default()
    }
}

fn signed_record(resource: Option<&Arc<Resource>>) -> Option<&[u8]> {
    match resource?.kind.as_ref()? {
        resource::Kind::Node(signed) => Some(&signed.record),
        resource::Kind::Mesh(_)
        | resource::Kind::ExternalPeer(_)
        | resource::Kind::Relay(_)
        | resource::Kind::Service(_)
        | resource::Kind::Slice(_)
        | resource::Kind::Pod(_)
        | resource::Kind::Namespace(_)
        | resource::Kind::NetworkPolicy(_)
        | resource::Kind::MeshPolicy(_)
        | resource::Kind::Community(_) => None,
    }
}

#[cfg(test)]
mod tests;
