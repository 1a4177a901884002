//! Nodes that are to leave the mesh because somebody deleted their MeshNode or their Node. Pure.
//!
//! What was never there was never deleted: so a controller acts only on what it saw before it was gone, and what is
//! deleted while no controller runs comes back. So does what cannot be meant: a definition that is deleted with all its
//! objects, or more than half of the mesh at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use mesh_wire::id::NodeName;

use crate::{cluster::Cluster, manifests::ObjectId, store::Nodes};

/// How often is looked.
pub const ROUND: Duration = Duration::from_secs(5);

/// So many nodes may be deleted at once in any case; beyond, half of them.
const AT_ONCE_MIN: usize = 2;

/// Since when objects of nodes in the mesh are gone.
#[derive(Debug, Default)]
pub struct Deletions {
    since: BTreeMap<ObjectId, Instant>,
}

impl Deletions {
    /// Looks at what the cluster has now, and gives the nodes that are to leave: an object of theirs is gone for `grace`.
    pub fn round(
        &mut self,
        cluster: &mut Cluster,
        nodes: &Nodes,
        grace: Duration,
        now: Instant,
    ) -> Vec<NodeName> {
        let in_mesh = |id: &ObjectId| {
            let node = nodes.get(id.name.as_str());
            node.is_some_and(|node| node.is_in())
        };
        cluster.retain_deleted(in_mesh);
        let names: BTreeSet<_> = cluster.deleted().map(|id| &id.name).collect();
        if names.len() > AT_ONCE_MIN.max(nodes.len() / 2) {
            let count = names.len();
            tracing::warn!(
                count,
                "more than half of all nodes' objects are gone: nobody is taken out"
            );
            cluster.retain_deleted(|_| false);
        }
        self.since.retain(|id, _| cluster.is_deleted(id));
        if cluster.is_troubled() {
            return Vec::new();
        }
        let mut due = BTreeSet::new();
        for id in cluster.deleted() {
            let since = *self.since.entry(id.clone()).or_insert(now);
            if now.saturating_duration_since(since) >= grace {
                due.extend(
                    nodes
                        .get_key_value(id.name.as_str())
                        .map(|(name, _)| name.clone()),
                );
            }
        }
        due.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use mesh_wire::id::NodeId;

    use super::*;
    use crate::{
        cluster::{Event, Item, KINDS_OF_NODES},
        manifests::{Kind, parse::FieldProblem},
        store::Registered,
    };

    const GRACE: Duration = Duration::from_secs(300);

    struct World {
        deletions: Deletions,
        cluster: Cluster,
        nodes: Nodes,
        start: Instant,
    }

    impl World {
        fn new(names: &[&str]) -> Self {
            let nodes = names.iter().zip(1..).map(|(name, seed)| {
                let node = Registered::new(NodeId([seed; 32]), [100, 96, 0, seed].into());
                (name.parse().unwrap(), node)
            });
            Self {
                deletions: Deletions::default(),
                cluster: Cluster::default(),
                nodes: nodes.collect(),
                start: Instant::now(),
            }
        }

        fn put(&mut self, kind: Kind, name: &str) {
            let problem = FieldProblem::new("spec", "of no interest here");
            let item = Item::new(id(kind, name), 0, Err(problem));
            self.cluster.handle(Event::Set(item.into()));
        }

        fn delete(&mut self, kind: Kind, name: &str) {
            self.cluster.handle(Event::Gone(id(kind, name)));
        }

        fn at(&mut self, s: u64) -> Vec<String> {
            let now = self.start + Duration::from_secs(s);
            let due = self
                .deletions
                .round(&mut self.cluster, &self.nodes, GRACE, now);
            due.into_iter().map(String::from).collect()
        }
    }

    fn id(kind: Kind, name: &str) -> ObjectId {
        ObjectId {
            kind,
            namespace: String::new(),
            name: name.to_owned(),
        }
    }

    #[test]
    fn a_node_whose_object_was_deleted_leaves_after_a_while() {
        for kind in KINDS_OF_NODES {
            let mut world = World::new(&["a", "b"]);
            for name in ["a", "b"] {
                world.put(Kind::MeshNode, name);
                world.put(Kind::Node, name);
            }
            assert_eq!(world.at(0), [""; 0]);
            world.delete(kind, "a");
            assert_eq!(world.at(10), [""; 0]);
            assert_eq!(world.at(309), [""; 0]);
            assert_eq!(world.at(310), ["a"], "{kind:?}");
            // Until it is out.
            assert_eq!(world.at(315), ["a"]);
            let a = world.nodes.get_mut("a").unwrap();
            a.removed_unix_s = Some(1);
            assert_eq!(world.at(320), [""; 0]);
            // Back in the mesh, it begins with what is there.
            world.nodes.get_mut("a").unwrap().removed_unix_s = None;
            assert_eq!(world.at(1000), [""; 0]);
        }
    }

    #[test]
    fn one_that_comes_back_in_time_stays() {
        let mut world = World::new(&["a"]);
        world.put(Kind::Node, "a");
        world.at(0);
        world.delete(Kind::Node, "a");
        world.at(5);
        world.put(Kind::Node, "a");
        assert_eq!(world.at(310), [""; 0]);
        world.delete(Kind::Node, "a");
        assert_eq!(world.at(400), [""; 0]);
        assert_eq!(world.at(700), ["a"]);
    }

    #[test]
    fn what_was_never_seen_or_cannot_be_meant_takes_nobody_out() {
        let names = ["gateway", "a", "b", "c", "d"];
        let mut world = World::new(&names);
        for name in &names[1..] {
            world.put(Kind::MeshNode, name);
        }
        world.at(0);
        world.delete(Kind::MeshNode, "a");
        assert!(world.cluster.is_deleted(&id(Kind::MeshNode, "a")));
        assert!(!world.cluster.is_deleted(&id(Kind::MeshNode, "gateway")));
        world.at(5);
        // The API server does not answer, or has no such kind any more: it may be there.
        let trouble = Event::Trouble(Kind::MeshNode, "404".to_owned());
        world.cluster.handle(trouble);
        assert!(!world.cluster.is_deleted(&id(Kind::MeshNode, "a")));
        world.cluster.handle(Event::Well(Kind::MeshNode));
        assert_eq!(world.at(1000), [""; 0]);
        // That it is not in the next list is another deletion.
        world.put(Kind::MeshNode, "a");
        world.cluster.handle(Event::ListBegins(Kind::MeshNode));
        for name in &names[2..] {
            let problem = FieldProblem::new("spec", "of no interest here");
            let item = Item::new(id(Kind::MeshNode, name), 0, Err(problem));
            world.cluster.handle(Event::Listed(item.into()));
        }
        world.cluster.handle(Event::ListEnds(Kind::MeshNode));
        assert_eq!(world.at(2000), [""; 0]);
        assert_eq!(world.at(2300), ["a"]);
        // All at once are a mistake.
        for name in &names[2..] {
            world.delete(Kind::MeshNode, name);
        }
        assert_eq!(world.at(3000), [""; 0]);
        assert_eq!(world.at(4000), [""; 0]);
    }
}
