//! How nodes leave the mesh.

use std::time::{Duration, Instant};

use mesh_wire::id::NodeName;

use super::{NodeChange, NodeFact, State, lock};
use crate::{shared, store::StoreError};

impl State {
    /// Takes a node out: its key counts no more, its streams end, and every other node is told. Gives the moment until which
    /// its address rests, as Unix seconds; `None`: there is no such node. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// The store failed.
    pub fn remove_node(&self, name: &NodeName) -> Result<Option<i64>, StoreError> {
        let mut shared = lock(&self.shared);
        let now = self.now_unix_s();
        let removed = shared::remove_node(shared.as_mut(), name, now)?;
        drop(shared);
        let Some((node, revision)) = removed else {
            return Ok(None);
        };
        let since = node.removed_unix_s.unwrap_or(now);
        tracing::info!(node = %name, id = %node.id, "a node was taken out of the mesh");
        self.change_nodes(vec![NodeChange {
            name: name.clone(),
            fact: NodeFact::Is(node),
            revision,
        }]);
        Ok(Some(since.saturating_add(self.address_rest_s())))
    }

    /// [`State::node_lifetime`], of an address.
    fn address_rest_s(&self) -> i64 {
        i64::try_from(self.node_lifetime().as_secs()).unwrap_or(i64::MAX)
    }

    /// When `name` was taken out of the mesh, as Unix seconds, if it was.
    #[must_use]
    pub fn removed_unix_s(&self, name: &NodeName) -> Option<i64> {
        self.published(|published| published.registry.get(name)?.removed_unix_s)
    }

    /// Frees addresses that have rested. Blocks on the disk.
    pub fn forget_removed(&self) {
        if !self.leads() {
            return;
        }
        let rested = self.now_unix_s().saturating_sub(self.address_rest_s());
        let due = self.published(|published| {
            let nodes = published.registry.iter();
            let due = nodes.filter(|(_, node)| node.removed_unix_s.is_some_and(|at| at < rested));
            due.map(|(name, node)| (name.clone(), node.clone()))
                .collect::<Vec<_>>()
        });
        for (name, node) in due {
            let mut shared = lock(&self.shared);
            let forgotten = shared::forget_node(shared.as_mut(), &name, &node);
            drop(shared);
            match forgotten {
                Ok(Some(revision)) => self.change_nodes(vec![NodeChange {
                    name,
                    fact: NodeFact::Gone,
                    revision,
                }]),
                // Another controller was faster, or the node joined again.
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(node = %name, %error, "its address cannot be freed now; trying again later");
                    return;
                }
            }
        }
    }

    /// Takes out those whose MeshNode or Node somebody deleted. Blocks on the disk.
    pub fn remove_deleted(&self) {
        let Some(kubernetes) = &self.settings.kubernetes else {
            return;
        };
        let mut work = self.work();
        let Some(cluster) = work.cluster.as_mut().filter(|_| *self.ready.borrow()) else {
            return;
        };
        let due = self.published(|published| {
            let nodes = &published.registry;
            let mut deletions = lock(&self.deletions);
            let grace = Duration::from_secs(kubernetes.removal_grace_s);
            deletions.round(cluster, nodes, grace, Instant::now())
        });
        drop(work);
        if !self.leads() {
            return;
        }
        for name in due {
            tracing::info!(node = %name, "its MeshNode or its Node was deleted");
            if let Err(error) = self.remove_node(&name) {
                tracing::warn!(node = %name, %error, "it cannot be taken out now; trying again");
            }
        }
    }
}
