//! Resources by key: what the controller sends, what the agent keeps, and the snapshot in them.

use std::{collections::BTreeMap, fmt};

use mesh_core::snapshot::{Generation, Node, Snapshot};
use mesh_identity::{
    certificate::{BadCertificate, mesh_id},
    record::{BadRecord, verify_record},
};
use mesh_wire::id::{MeshId, RelayId};
use tokio_rustls::rustls::pki_types::CertificateDer;

use crate::{
    control::{Resource, ResourceKey, SyncResponse, resource_key::Kind},
    convert::{FieldError, Object, decode, key},
};

/// Resources by key.
pub type Resources = BTreeMap<ResourceKey, Resource>;

/// Longest `SyncResponse`, in bytes: 100,000 resources of some 300 bytes, twice over.
pub const SYNC_BYTES_MAX: usize = 64 << 20;

/// A resource that was left out, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{resource}: {problem}")]
pub struct Rejected {
    /// Its key.
    pub resource: ResourceKey,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a resource.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A field.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// The signature of a node record.
    #[error(transparent)]
    Record(#[from] BadRecord),
    /// A node's IPv6 address does not follow from its key.
    #[error("overlay_v6: it does not follow from the mesh id and the node's key")]
    OverlayV6,
}

/// Why resources make no snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// The mesh's own settings are missing.
    #[error("the mesh's settings are missing")]
    NoMesh,
    /// The mesh's own settings are broken.
    #[error("the mesh's settings: {0}")]
    Mesh(FieldError),
    /// They are of another mesh than the authority.
    #[error("the settings are of mesh {found}, the CA certificate of {expected}")]
    OtherMesh {
        /// The authority's.
        expected: MeshId,
        /// In the settings.
        found: MeshId,
    },
    /// The authority's certificate is broken.
    #[error("the CA certificate: {0}")]
    Authority(#[from] BadCertificate),
}

impl fmt::Display for ResourceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind() {
            Kind::Unspecified => "resource",
            Kind::Mesh => return f.write_str("mesh"),
            Kind::Node => "node",
            Kind::ExternalPeer => "external peer",
            Kind::Relay => "relay",
            Kind::Service => "service",
            Kind::Slice => "endpoint slice",
        };
        write!(f, "{kind} {}", self.name)
    }
}

/// Performs what `response` says on `resources`. Resources of a kind that this version does not
/// know come back as rejected; the rest is applied.
#[must_use]
pub fn apply(resources: &mut Resources, response: SyncResponse) -> Vec<Rejected> {
    if response.full {
        resources.clear();
    }
    for removed in &response.removed {
        resources.remove(removed);
    }
    let mut rejected = Vec::new();
    for resource in response.set {
        match key(&resource) {
            Ok(key) => {
                resources.insert(key, resource);
            }
            Err(error) => rejected.push(Rejected {
                resource: ResourceKey::default(),
                problem: error.into(),
            }),
        }
    }
    rejected
}

/// The snapshot in `resources`, and those left out of it because they are broken or, if they are
/// nodes, not signed by `authority`. One bad resource does not spoil the rest.
///
/// # Errors
///
/// [`SnapshotError`] when the mesh's own settings are missing, broken, or of another mesh.
pub fn snapshot_from_resources<'a>(
    resources: impl IntoIterator<Item = &'a Resource>,
    generation: Generation,
    authority: &CertificateDer<'_>,
) -> Result<(Snapshot, Vec<Rejected>), SnapshotError> {
    let mut rejected = Vec::new();
    let mut mesh = None;
    let mut objects = Vec::new();
    for resource in resources {
        let key = key(resource).unwrap_or_default();
        match decode(resource) {
            Ok(Object::Mesh(settings)) => mesh = Some(settings),
            Ok(object) => objects.push((key, object)),
            Err(error) if key.kind() == Kind::Mesh => return Err(SnapshotError::Mesh(error)),
            Err(error) => rejected.push(Rejected {
                resource: key,
                problem: error.into(),
            }),
        }
    }
    let mesh = mesh.ok_or(SnapshotError::NoMesh)?;
    let expected = mesh_id(authority)?;
    if mesh.id != expected {
        return Err(SnapshotError::OtherMesh {
            expected,
            found: mesh.id,
        });
    }
    let mut snapshot = Snapshot::empty(mesh);
    snapshot.generation = generation;
    for (key, object) in objects {
        if let Err(problem) = insert(&mut snapshot, object, authority) {
            rejected.push(Rejected {
                resource: key,
                problem,
            });
        }
    }
    Ok((snapshot, rejected))
}

fn insert(
    snapshot: &mut Snapshot,
    object: Object,
    authority: &CertificateDer<'_>,
) -> Result<(), Problem> {
    match object {
        // There is only one, and it was taken before.
        Object::Mesh(_) => {}
        Object::Node {
            node,
            record,
            signature,
        } => {
            verify_record(authority, &record, &signature)?;
            check_overlay(snapshot.mesh.id, &node)?;
            snapshot.nodes.insert(node.name.clone(), node);
        }
        Object::ExternalPeer(peer) => {
            snapshot.external_peers.insert(peer.name.clone(), peer);
        }
        Object::Relay(relay) => {
            snapshot.relays.insert(RelayId::from(&relay.name), relay);
        }
        Object::Service(service) => {
            snapshot.services.insert(service.name.clone(), service);
        }
        Object::Slice(service, slice) => {
            let slices = snapshot.slices.entry(service).or_default();
            slices.insert(slice.name.clone(), slice);
        }
    }
    Ok(())
}

fn check_overlay(mesh: MeshId, node: &Node) -> Result<(), Problem> {
    if node.overlay_v6 == mesh.overlay_v6(&node.id) {
        Ok(())
    } else {
        Err(Problem::OverlayV6)
    }
}

#[cfg(test)]
mod tests;
