//! Nodes that wait until somebody lets them in.

use std::collections::{BTreeMap, BTreeSet};

use mesh_wire::id::NodeName;

use super::{State, Work};
use crate::{
    manifests::{
        ObjectId, Source,
        approve::{ApproveError, approve},
        watch::FolderChange,
    },
    status::{Pending, mesh_node_id},
};

/// Why nobody was let in.
#[derive(Debug, thiserror::Error)]
pub enum ApprovalError {
    /// No node of this name waits.
    #[error("no node {0} waits for approval (`meshctl approve` lists those that do)")]
    NotWaiting(NodeName),
    /// Its MeshNode is the cluster's.
    #[error(
        "this mesh is said in a Kubernetes cluster, where this controller writes no specs: `meshctl approve --cluster NODE` where kubectl works"
    )]
    Cluster,
    /// There are no manifests.
    #[error("this controller reads no folder of manifests")]
    NoFolder,
    /// The manifests.
    #[error(transparent)]
    Manifest(#[from] ApproveError),
}

impl Work {
    /// Those that asked, without those that were approved since and did not come again yet.
    pub(super) fn waiting(&self) -> impl Iterator<Item = (&NodeName, &Pending)> {
        let approved = self.desired.approved.as_ref();
        let in_vain = move |name: &NodeName| approved.is_none_or(|all| !all.contains(name));
        self.pending.iter().filter(move |(name, _)| in_vain(name))
    }
}

impl State {
    /// Whether new nodes wait for approval, and those that do: at most [`PENDING_MAX`](super::PENDING_MAX).
    #[must_use]
    pub fn waiting(&self) -> (bool, BTreeMap<NodeName, Pending>) {
        let work = self.work();
        let waiting = work.waiting().map(|(name, one)| (name.clone(), *one));
        (work.desired.approved.is_some(), waiting.collect())
    }

    /// Writes into the manifests that these nodes may join, and reads them. Gives the file of each. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// [`ApprovalError`]; nobody was let in then.
    pub fn approve(
        &self,
        names: &BTreeSet<NodeName>,
    ) -> Result<Vec<(NodeName, String)>, ApprovalError> {
        let work = self.work();
        let strange = names.iter().find(|name| !work.pending.contains_key(*name));
        if let Some(name) = strange {
            return Err(ApprovalError::NotWaiting(name.clone()));
        }
        if self.settings.kubernetes.is_some() {
            return Err(ApprovalError::Cluster);
        }
        let folder = self.settings.manifests.as_ref();
        let folder = folder.ok_or(ApprovalError::NoFolder)?;
        let (objects, _) = work.folder.objects();
        let sources: BTreeMap<&ObjectId, &Source> =
            objects.iter().map(|one| (&one.id, &one.source)).collect();
        let nodes = names.iter().map(|name| {
            let source = sources.get(&mesh_node_id(name)).copied().cloned();
            (name.clone(), source)
        });
        let nodes: Vec<_> = nodes.collect();
        drop(work);
        let files = approve(folder, &nodes)?;
        let written = files.iter().cloned().collect();
        self.scan(&FolderChange::Files(written));
        Ok(names.iter().cloned().zip(files).collect())
    }
}
