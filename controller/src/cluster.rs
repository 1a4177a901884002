//! What a Kubernetes cluster says, kind by kind. Pure: events in, objects out.
//!
//! Nothing is taken away while a list is under way, and none of it counts before every kind's first
//! list is complete: half a cluster is not a cluster with half its services.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::{
    change::Change,
    manifests::{Kind, Loaded, ObjectId, Source, parse::FieldProblem},
};

/// What is read in any case.
pub const KINDS: [Kind; 12] = [
    Kind::Service,
    Kind::EndpointSlice,
    Kind::Node,
    Kind::NetworkPolicy,
    Kind::MeshNode,
    Kind::MeshRelay,
    Kind::ExternalPeer,
    Kind::MeshConfig,
    Kind::MeshService,
    Kind::MeshPolicy,
    Kind::SiteRoute,
    Kind::Community,
];

/// A node is one of these kinds: who deletes it means the node.
pub const KINDS_OF_NODES: [Kind; 2] = [Kind::MeshNode, Kind::Node];

/// What is read from the first policy on: nobody else asks for pods.
pub const KINDS_OF_POLICIES: [Kind; 2] = [Kind::Pod, Kind::Namespace];

/// An object as the cluster has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Which.
    pub id: ObjectId,
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.generation`; 0 for kinds without.
    pub generation: i64,
    /// What it says, if that is in order.
    pub loaded: Option<Loaded>,
    /// What is wrong with it.
    pub problem: Option<FieldProblem>,
    /// `status` as it is there, of Holdfast's own kinds.
    pub status: Value,
}

/// What is heard of a cluster.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A list begins: what was heard of an earlier one that did not end is forgotten.
    ListBegins(Kind),
    /// An object of the list.
    Listed(Box<Item>),
    /// The list is complete: what was not in it is gone.
    ListEnds(Kind),
    /// An object is new or another.
    Set(Box<Item>),
    /// An object is gone.
    Gone(ObjectId),
    /// The API server cannot be followed.
    Trouble(Kind, String),
    /// It can again.
    Well(Kind),
}

/// What a cluster said.
#[derive(Debug, Default)]
pub struct Cluster {
    kinds: BTreeMap<Kind, Reflected>,
    policies: usize,
}

#[derive(Debug, Default)]
struct Reflected {
    objects: BTreeMap<ObjectId, Item>,
    /// The list under way.
    listed: Option<BTreeMap<ObjectId, Item>>,
    /// Whether one list was complete.
    complete: bool,
    trouble: Option<String>,
    /// Of nodes: those that were there before.
    deleted: BTreeSet<ObjectId>,
}

/// What an event changed.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Changed {
    /// What the mesh is may be another.
    pub desired: Change,
    /// Statuses may be others.
    pub status: bool,
}

impl std::ops::BitOrAssign for Changed {
    fn bitor_assign(&mut self, other: Self) {
        self.desired |= other.desired;
        self.status |= other.status;
    }
}

impl Cluster {
    /// Takes `event` in.
    pub fn handle(&mut self, event: Event) -> Changed {
        let changed = match event {
            Event::ListBegins(kind) => {
                self.kind(kind).listed = Some(BTreeMap::new());
                Changed::default()
            }
            Event::Listed(item) => {
                let listed = &mut self.kind(item.id.kind).listed;
                let listed = listed.get_or_insert_default();
                listed.insert(item.id.clone(), *item);
                Changed::default()
            }
            Event::ListEnds(kind) => self.kind(kind).list_ends(),
            Event::Set(item) => self.kind(item.id.kind).set(*item),
            Event::Gone(id) => self.kind(id.kind).gone(&id),
            Event::Trouble(kind, text) => {
                // What was deleted before the API server went may be there again when it comes.
                self.kind(kind).deleted.clear();
                let before = self.kind(kind).trouble.replace(text.clone());
                Changed {
                    desired: Change::any_if(before != Some(text)),
                    status: false,
                }
            }
            Event::Well(kind) => Changed {
                desired: Change::any_if(self.kind(kind).trouble.take().is_some()),
                status: false,
            },
        };
        if changed.desired == Change::Any {
            self.policies = self.count(Kind::MeshPolicy) + self.count(Kind::NetworkPolicy);
        }
        changed
    }

    /// Whether pods and namespaces are needed.
    #[must_use]
    pub fn has_policies(&self) -> bool {
        self.policies > 0
    }

    /// The kinds of which no list was complete yet, though it should; none: the cluster counts.
    #[must_use]
    pub fn awaited(&self, policies_elsewhere: bool) -> BTreeSet<Kind> {
        let of_policies = KINDS_OF_POLICIES
            .into_iter()
            .filter(|_| policies_elsewhere || self.has_policies());
        KINDS
            .into_iter()
            .chain(of_policies)
            .filter(|kind| !self.kinds.get(kind).is_some_and(|kind| kind.complete))
            .collect()
    }

    /// Whether the API server cannot be asked for some kind just now.
    #[must_use]
    pub fn is_troubled(&self) -> bool {
        self.kinds.values().any(|kind| kind.trouble.is_some())
    }

    /// Objects of nodes that were there and are not any more.
    pub fn deleted(&self) -> impl Iterator<Item = &ObjectId> {
        let kinds = KINDS_OF_NODES
            .iter()
            .filter_map(|kind| self.kinds.get(kind));
        kinds.flat_map(|kind| &kind.deleted)
    }

    /// Whether this is one of them.
    #[must_use]
    pub fn is_deleted(&self, id: &ObjectId) -> bool {
        let kind = self.kinds.get(&id.kind);
        kind.is_some_and(|kind| kind.deleted.contains(id))
    }

    /// Forgets those that `keep` does not want.
    pub fn retain_deleted(&mut self, keep: impl Fn(&ObjectId) -> bool) {
        for kind in self.kinds.values_mut() {
            kind.deleted.retain(&keep);
        }
    }

    /// Every object that is in order, those that were made first first.
    #[must_use]
    pub fn objects(&self) -> Vec<&Loaded> {
        let mut objects: Vec<_> = self
            .items()
            .filter_map(|item| item.loaded.as_ref())
            .collect();
        objects.sort_by(|a, b| (&a.source, &a.id).cmp(&(&b.source, &b.id)));
        objects
    }

    /// How many those are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.items().filter(|item| item.loaded.is_some()).count()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Every object, kind by kind.
    pub fn items(&self) -> impl Iterator<Item = &Item> {
        self.kinds.values().flat_map(|kind| kind.objects.values())
    }

    /// The object `id`.
    #[must_use]
    pub fn get(&self, id: &ObjectId) -> Option<&Item> {
        self.kinds.get(&id.kind)?.objects.get(id)
    }

    /// What is wrong, a line each.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let troubles = self.kinds.iter().filter_map(|(kind, reflected)| {
            let trouble = reflected.trouble.as_ref()?;
            Some(format!(
                "the API server cannot be asked for {kind:?} objects: {trouble}"
            ))
        });
        let objects = self.items().filter_map(|item| {
            let problem = item.problem.as_ref()?;
            Some(format!("{}: {problem}", item.id))
        });
        troubles.chain(objects).collect()
    }

    fn kind(&mut self, kind: Kind) -> &mut Reflected {
        self.kinds.entry(kind).or_default()
    }

    fn count(&self, kind: Kind) -> usize {
        self.kinds.get(&kind).map_or(0, |kind| kind.objects.len())
    }
}

impl Reflected {
    fn list_ends(&mut self) -> Changed {
        let first = !std::mem::replace(&mut self.complete, true);
        let mut changed = Changed {
            desired: Change::any_if(first),
            status: first,
        };
        let listed = self.listed.take().unwrap_or_default();
        let gone = self.objects.keys().filter(|id| !listed.contains_key(*id));
        for id in gone.cloned().collect::<Vec<_>>() {
            changed |= self.gone(&id);
        }
        for item in listed.into_values() {
            changed |= self.set(item);
        }
        changed
    }

    fn set(&mut self, mut item: Item) -> Changed {
        self.deleted.remove(&item.id);
        let Some(before) = self.objects.get_mut(&item.id) else {
            self.objects.insert(item.id.clone(), item);
            return Changed {
                desired: Change::Any,
                status: true,
            };
        };
        // What is not in order now takes nothing away, unless it is another object by the same name.
        // What is the same stays the same, so that it is known by its place.
        let same_object = before.uid == item.uid;
        let keep = match (&before.loaded, &item.loaded) {
            (Some(_), None) => same_object,
            (Some(had), Some(has)) => had == has,
            (None, _) => false,
        };
        let desired = match (&before.loaded, &item.loaded) {
            _ if before.problem != item.problem => Change::Any,
            _ if keep => Change::Nothing,
            (Some(had), Some(has)) => Change::of(had, has),
            (had, has) => Change::any_if(had.is_some() || has.is_some()),
        };
        if keep {
            item.loaded = before.loaded.take();
        }
        let changed = Changed {
            desired,
            status: before.generation != item.generation
                || before.status != item.status
                || before.problem != item.problem
                || !same_object,
        };
        *before = item;
        changed
    }

    fn gone(&mut self, id: &ObjectId) -> Changed {
        let gone = self.objects.remove(id).is_some();
        if gone && KINDS_OF_NODES.contains(&id.kind) {
            self.deleted.insert(id.clone());
        }
        Changed {
            desired: Change::any_if(gone),
            status: gone,
        }
    }
}

impl Item {
    /// An object of a cluster, made at `created_unix_s`, of which this was read.
    #[must_use]
    pub fn new(
        id: ObjectId,
        created_unix_s: i64,
        object: Result<crate::manifests::Object, FieldProblem>,
    ) -> Self {
        let source = Source::Cluster { created_unix_s };
        let (loaded, problem) = match object {
            Ok(object) => (Some(Loaded::new(id.clone(), source, object)), None),
            Err(problem) => (None, Some(problem)),
        };
        Self {
            id,
            uid: String::new(),
            generation: 0,
            loaded,
            problem,
            status: Value::Null,
        }
    }
}

#[cfg(test)]
mod tests;
