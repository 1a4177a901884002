//! Objects by resource, and what happened to them: one counter of versions for all, and for each
//! resource a bounded log from which watches read and older lists are put together.
//!
//! An object is kept as the JSON that goes over the wire, so that 250,000 endpoints cost what they
//! cost as text. Nothing here knows HTTP or time.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use serde_json::Value;

use super::{object, selector};

/// Changes remembered per resource; who is further behind is told `410`. An entry is two shared
/// pointers and a key, about 200 bytes beside the objects themselves: 4 MB for each resource.
pub(crate) const LOG_CHANGES_MAX: usize = 20_000;

/// Names an object within its resource.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Key {
    pub(crate) fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }
}

/// An object as it is kept.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) key: Key,
    pub(crate) json: Bytes,
    /// Its `metadata.resourceVersion`.
    pub(crate) version: u64,
    pub(crate) labels: BTreeMap<String, String>,
    /// What field selectors may ask for beside name and namespace.
    pub(crate) fields: Vec<(&'static str, String)>,
    /// The uids of those who own it.
    owners: Vec<String>,
}

impl Stored {
    fn new(resource: &str, object: &Value, version: u64) -> Self {
        Self {
            key: Key::new(object::namespace(object), object::name(object)),
            json: Bytes::from(object.to_string()),
            version,
            labels: object::labels(object),
            fields: selector::fields_of(resource, object),
            owners: object::list(object, &["metadata", "ownerReferences"])
                .iter()
                .filter_map(|owner| object::text(owner, &["uid"]).map(str::to_owned))
                .collect(),
        }
    }

    /// The object, to read or change.
    pub(crate) fn value(&self) -> Value {
        serde_json::from_slice(&self.json).unwrap_or_default()
    }
}

/// One thing that happened to one object.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    /// The object before; none if it was created.
    pub(crate) before: Option<Arc<Stored>>,
    /// The object after; after a deletion its last state, with the version of the deletion.
    pub(crate) after: Arc<Stored>,
    pub(crate) deleted: bool,
}

/// The version asked for is older than what is remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooOld {
    /// The oldest version that can be asked for.
    pub(crate) oldest: u64,
}

#[derive(Debug, Default)]
struct Table {
    objects: BTreeMap<Key, Arc<Stored>>,
    log: VecDeque<Change>,
    /// Changes up to this version are forgotten.
    forgotten: u64,
}

impl Table {
    fn record(&mut self, change: Change) {
        if self.log.len() == LOG_CHANGES_MAX
            && let Some(oldest) = self.log.pop_front()
        {
            self.forgotten = oldest.after.version;
        }
        self.log.push_back(change);
    }
}

/// Everything that the server knows.
#[derive(Debug)]
pub(crate) struct Store {
    version: u64,
    tables: BTreeMap<String, Table>,
    /// Who is owned, by the owner's uid.
    dependents: BTreeMap<String, BTreeSet<(String, Key)>>,
}

impl Default for Store {
    /// The first version is not 0 or 1, as in etcd: clients must not rely on either.
    fn default() -> Self {
        Self {
            version: 100,
            tables: BTreeMap::new(),
            dependents: BTreeMap::new(),
        }
    }
}

impl Store {
    /// The newest version.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    pub(crate) fn get(&self, resource: &str, namespace: &str, name: &str) -> Option<&Arc<Stored>> {
        let table = self.tables.get(resource)?;
        table.objects.get(&Key::new(namespace, name))
    }

    /// Keeps `object` in place of what has its name, with a new version.
    pub(crate) fn put(&mut self, resource: &str, mut object: Value) -> Arc<Stored> {
        self.version += 1;
        object::set(
            &mut object,
            &["metadata", "resourceVersion"],
            self.version.to_string(),
        );
        let stored = Arc::new(Stored::new(resource, &object, self.version));
        let table = self.tables.entry(resource.to_owned()).or_default();
        let before = table
            .objects
            .insert(stored.key.clone(), Arc::clone(&stored));
        table.record(Change {
            before: before.clone(),
            after: Arc::clone(&stored),
            deleted: false,
        });
        if let Some(before) = before {
            self.disown(resource, &before);
        }
        for owner in &stored.owners {
            let owned = self.dependents.entry(owner.clone()).or_default();
            owned.insert((resource.to_owned(), stored.key.clone()));
        }
        stored
    }

    fn disown(&mut self, resource: &str, stored: &Stored) {
        for owner in &stored.owners {
            if let Some(owned) = self.dependents.get_mut(owner) {
                owned.remove(&(resource.to_owned(), stored.key.clone()));
                if owned.is_empty() {
                    self.dependents.remove(owner);
                }
            }
        }
    }

    /// The resources and keys of what `uid` owns.
    pub(crate) fn dependents(&self, uid: &str) -> Vec<(String, Key)> {
        let owned = self.dependents.get(uid).into_iter().flatten();
        owned.cloned().collect()
    }

    /// Takes an object away, and gives its last state.
    pub(crate) fn delete(
        &mut self,
        resource: &str,
        namespace: &str,
        name: &str,
    ) -> Option<Arc<Stored>> {
        let table = self.tables.get_mut(resource)?;
        let before = table.objects.remove(&Key::new(namespace, name))?;
        self.version += 1;
        let mut last = before.value();
        object::set(
            &mut last,
            &["metadata", "resourceVersion"],
            self.version.to_string(),
        );
        let after = Arc::new(Stored::new(resource, &last, self.version));
        table.record(Change {
            before: Some(Arc::clone(&before)),
            after: Arc::clone(&after),
            deleted: true,
        });
        self.disown(resource, &before);
        Some(after)
    }

    /// The objects of one resource, of one namespace or all, by namespace and name.
    pub(crate) fn list(&self, resource: &str, namespace: Option<&str>) -> Vec<Arc<Stored>> {
        let Some(table) = self.tables.get(resource) else {
            return Vec::new();
        };
        let from = Key::new(namespace.unwrap_or_default(), "");
        let objects = table.objects.range(from..);
        objects
            .take_while(|(key, _)| namespace.is_none_or(|namespace| key.namespace == namespace))
            .map(|(_, stored)| Arc::clone(stored))
            .collect()
    }

    /// The objects of one resource as they were at an older version.
    ///
    /// # Errors
    ///
    /// [`TooOld`] if changes since then are forgotten.
    pub(crate) fn list_at(
        &self,
        resource: &str,
        namespace: Option<&str>,
        version: u64,
    ) -> Result<Vec<Arc<Stored>>, TooOld> {
        let Some(table) = self.tables.get(resource) else {
            return Ok(Vec::new());
        };
        if version < table.forgotten {
            return Err(TooOld {
                oldest: table.forgotten,
            });
        }
        let now = self.list(resource, namespace).into_iter();
        let mut objects: BTreeMap<_, _> = now.map(|stored| (stored.key.clone(), stored)).collect();
        let undo = table.log.iter().rev();
        for change in undo.take_while(|change| change.after.version > version) {
            let key = &change.after.key;
            if namespace.is_some_and(|namespace| key.namespace != namespace) {
                continue;
            }
            match &change.before {
                Some(before) => objects.insert(key.clone(), Arc::clone(before)),
                None => objects.remove(key),
            };
        }
        Ok(objects.into_values().collect())
    }

    /// What happened to a resource after `version`, oldest first, `max` changes at most.
    ///
    /// # Errors
    ///
    /// [`TooOld`] if some of it is forgotten.
    pub(crate) fn changes(
        &self,
        resource: &str,
        version: u64,
        max: usize,
    ) -> Result<Vec<Change>, TooOld> {
        let Some(table) = self.tables.get(resource) else {
            return Ok(Vec::new());
        };
        if version < table.forgotten {
            return Err(TooOld {
                oldest: table.forgotten,
            });
        }
        let from = table
            .log
            .partition_point(|change| change.after.version <= version);
        Ok(table.log.range(from..).take(max).cloned().collect())
    }

    /// Forgets all history: who was not up to date is told `410`.
    pub(crate) fn compact(&mut self) {
        for table in self.tables.values_mut() {
            table.log.clear();
            table.forgotten = self.version;
        }
    }

    /// How many objects a resource has.
    pub(crate) fn count(&self, resource: &str) -> usize {
        self.tables
            .get(resource)
            .map_or(0, |table| table.objects.len())
    }

    /// The resources that have or had objects.
    pub(crate) fn resources(&self) -> Vec<String> {
        self.tables.keys().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const PODS: &str = "/pods";

    fn pod(name: &str, label: &str) -> Value {
        json!({"metadata": {"name": name, "namespace": "a", "labels": {"l": label}}})
    }

    fn names(objects: &[Arc<Stored>]) -> Vec<(&str, u64)> {
        objects
            .iter()
            .map(|stored| (stored.key.name.as_str(), stored.version))
            .collect()
    }

    #[test]
    fn one_counter_counts_for_all_resources() {
        let mut store = Store::default();
        let first = store.put(PODS, pod("x", "1")).version;
        assert_eq!(store.put("/nodes", pod("x", "1")).version, first + 1);
        let gone = store.delete(PODS, "a", "x").unwrap();
        assert_eq!(gone.version, first + 2);
        assert_eq!(
            gone.value()["metadata"]["resourceVersion"],
            (first + 2).to_string()
        );
        assert!(store.delete(PODS, "a", "x").is_none());
    }

    #[test]
    fn changes_are_told_after_a_version_and_refused_when_forgotten() {
        let mut store = Store::default();
        let first = store.put(PODS, pod("x", "1")).version;
        store.put(PODS, pod("x", "2"));
        let told = store.changes(PODS, first, 10).unwrap();
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].before.as_ref().unwrap().version, first);
        store.compact();
        assert_eq!(
            store.changes(PODS, first, 10).unwrap_err(),
            TooOld { oldest: first + 1 }
        );
        assert!(store.changes(PODS, first + 1, 10).unwrap().is_empty());
    }

    #[test]
    fn the_log_is_bounded_and_says_what_it_forgot() {
        let mut store = Store::default();
        let first = store.put(PODS, pod("x", "0")).version;
        for _ in 0..LOG_CHANGES_MAX {
            store.put(PODS, pod("x", "1"));
        }
        assert_eq!(
            store.changes(PODS, first - 1, 1).unwrap_err(),
            TooOld { oldest: first }
        );
        assert_eq!(
            store.changes(PODS, first, usize::MAX).unwrap().len(),
            LOG_CHANGES_MAX
        );
    }

    proptest! {
        /// An older list is what the list was then.
        #[test]
        fn an_older_list_is_what_it_was(steps: Vec<(u8, bool)>) {
            let mut store = Store::default();
            let mut then = vec![(store.version(), Vec::new())];
            for (name, delete) in steps {
                let name = format!("p{}", name % 5);
                if delete {
                    store.delete(PODS, "a", &name);
                } else {
                    store.put(PODS, pod(&name, "x"));
                }
                let now = store.list(PODS, Some("a"));
                let now: Vec<_> = names(&now).into_iter().map(|(n, v)| (n.to_owned(), v)).collect();
                then.push((store.version(), now));
            }
            for (version, list) in then {
                let again = store.list_at(PODS, None, version).unwrap();
                let again: Vec<_> =
                    names(&again).into_iter().map(|(n, v)| (n.to_owned(), v)).collect();
                prop_assert_eq!(again, list);
            }
        }
    }
}
