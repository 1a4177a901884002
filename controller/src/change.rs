//! What changed since the mesh was last worked out. Pure.
//!
//! Pods come and go all day, and with them nothing changes but slices of endpoints. What agents are told of a slice follows from
//! it alone, so that such a change costs what changed; to work out a mesh of 10,000 services takes 0.1 s.

use std::{collections::BTreeMap, mem, ops::BitOrAssign, sync::Arc};

use mesh_api::control::{Resource, ResourceKey};

use crate::manifests::{Loaded, Object};

/// What changed.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Change {
    /// Nothing.
    #[default]
    Nothing,
    /// Slices that were there and are still, and nothing else: what agents are told of each now. `None`: it is another
    /// service's, and has another key.
    Slices(BTreeMap<ResourceKey, Option<Arc<Resource>>>),
    /// Anything: all is worked out again.
    Any,
}

impl Change {
    /// Anything, or nothing.
    #[must_use]
    pub fn any_if(changed: bool) -> Self {
        if changed { Self::Any } else { Self::Nothing }
    }

    /// What it changes that `now` is in the place of `before`.
    #[must_use]
    pub fn of(before: &Loaded, now: &Loaded) -> Self {
        let is_slice = |loaded: &Loaded| matches!(loaded.object, Object::Slice(..));
        if before.object == now.object {
            // Where a slice stands is in no message, and decides nothing.
            return Self::any_if(before.source != now.source && !is_slice(now));
        }
        match (&before.resource, &now.resource) {
            (Some((had, _)), Some((key, resource))) if is_slice(before) && is_slice(now) => {
                let mut slices = BTreeMap::from([(had.clone(), None)]);
                slices.insert(key.clone(), Some(Arc::clone(resource)));
                Self::Slices(slices)
            }
            _ => Self::Any,
        }
    }

    /// Whether nothing changed.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        *self == Self::Nothing
    }
}

impl BitOrAssign for Change {
    /// What `later` changes after it.
    fn bitor_assign(&mut self, later: Self) {
        *self = match (mem::take(self), later) {
            (Self::Any, _) | (_, Self::Any) => Self::Any,
            (Self::Nothing, one) | (one, Self::Nothing) => one,
            (Self::Slices(mut slices), Self::Slices(later)) => {
                slices.extend(later);
                Self::Slices(slices)
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::snapshot::{EndpointSlice, ServiceName};

    use super::*;
    use crate::manifests::{Kind, ObjectId, Source};

    fn loaded(object: Object) -> Loaded {
        let id = ObjectId {
            kind: Kind::EndpointSlice,
            namespace: "shop".to_owned(),
            name: "s".to_owned(),
        };
        Loaded::new(id, Source::Cluster { created_unix_s: 1 }, object)
    }

    fn slice(service: &str) -> Loaded {
        let service = ServiceName {
            namespace: "shop".to_owned(),
            name: service.to_owned(),
        };
        let slice = EndpointSlice {
            name: "s".to_owned(),
            ports: Vec::new(),
            endpoints: Vec::new(),
        };
        loaded(Object::Slice(service, slice))
    }

    #[test]
    fn a_slice_that_went_to_another_service_and_came_back_is_where_it_is() {
        let (here, there) = (slice("orders"), slice("carts"));
        let mut changed = Change::of(&here, &there);
        assert_ne!(changed, Change::of(&here, &here));
        changed |= Change::of(&there, &here);
        let Change::Slices(slices) = changed else {
            panic!("{changed:?}");
        };
        let (key, _) = here.resource.as_ref().unwrap();
        let is_there = slices
            .iter()
            .map(|(at, resource)| (at == key, resource.is_some()));
        assert_eq!(is_there.collect::<Vec<_>>(), [(false, false), (true, true)]);
    }

    #[test]
    fn with_anything_else_it_is_anything() {
        let slices = Change::of(&slice("orders"), &slice("carts"));
        let service = loaded(Object::Service(None));
        for other in [Change::Any, Change::of(&slice("orders"), &service)] {
            let mut changed = slices.clone();
            changed |= other.clone();
            assert_eq!(changed, Change::Any);
            changed = other;
            changed |= slices.clone();
            assert_eq!(changed, Change::Any);
        }
        let mut changed = Change::Nothing;
        changed |= slices.clone();
        changed |= Change::Nothing;
        assert_eq!(changed, slices);
    }
}
