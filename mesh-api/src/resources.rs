//! Resources by key: what the controller sends, what the agent keeps, and the snapshot in them.

use std::{collections::BTreeMap, fmt};

use mesh_core::snapshot::{Generation, MeshSettings, Node, Snapshot};
use mesh_identity::{
    certificate::{BadCertificate, mesh_id},
    record::{BadRecord, verify_record},
};
use mesh_wire::id::{MeshId, RelayId};
use prost::{
    Message as _,
    encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len},
};
use tokio_rustls::rustls::pki_types::CertificateDer;

use self::digest::differing;
use crate::{
    control::{Resource, ResourceKey, SnapshotFile, SyncResponse, resource, resource_key::Kind},
    convert::{FieldError, Object, decode, key},
};

pub mod digest;

/// Resources by key.
pub type Resources = BTreeMap<ResourceKey, Encoded>;

/// A resource as it is on the wire: a slice of ten endpoints has 300 bytes, and ten times as many as a structure
/// of strings.
#[derive(Clone, PartialEq, Eq)]
pub struct Encoded(Box<[u8]>);

impl From<&Resource> for Encoded {
    fn from(resource: &Resource) -> Self {
        Self(resource.encode_to_vec().into())
    }
}

impl Encoded {
    /// The resource.
    #[must_use]
    pub fn decode(&self) -> Resource {
        // It was encoded by us.
        Resource::decode(&*self.0).unwrap_or_default()
    }
}

impl fmt::Debug for Encoded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.decode().fmt(f)
    }
}

/// Longest `SyncResponse`, in bytes: 100,000 resources of some 300 bytes, twice over.
pub const SYNC_BYTES_MAX: usize = 64 << 20;

/// The number of `SnapshotFile.resources`.
const SNAPSHOT_RESOURCES: u32 = 4;

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
    /// The mesh's own settings are missing or broken.
    #[error("the mesh's settings are missing, or broken")]
    NoMesh,
    /// They are of another mesh than the authority.
    #[error("the settings are of mesh {found}, the CA certificate of {expected}")]
    OtherMesh {
        /// The authority's.
        expected: MeshId,
        /// In the settings.
        found: MeshId,
    },
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
            Kind::Pod => "pod",
            Kind::Namespace => "namespace",
            Kind::NetworkPolicy => "network policy",
            Kind::MeshPolicy => "mesh policy",
            Kind::Community => "community",
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
    let compared = response.compared.as_ref();
    let differing = compared.map(|compared| differing(resources, compared));
    for removed in response.removed.iter().chain(differing.iter().flatten()) {
        resources.remove(removed);
    }
    let mut rejected = Vec::new();
    for resource in response.set {
        match key(&resource) {
            Ok(key) => {
                resources.insert(key, Encoded::from(&resource));
            }
            Err(error) => rejected.push(Rejected {
                resource: ResourceKey::default(),
                problem: error.into(),
            }),
        }
    }
    rejected
}

/// `file` with `resources` in it, encoded. To copy 100,000 endpoints into it first would take 30 MB for a moment.
#[must_use]
pub fn encode_snapshot(file: &SnapshotFile, resources: &Resources) -> Vec<u8> {
    let length = |Encoded(resource): &Encoded| resource.len() as u64;
    let sizes = resources.values().map(|resource| {
        let delimiter = encoded_len_varint(length(resource));
        key_len(SNAPSHOT_RESOURCES) + delimiter + resource.0.len()
    });
    let size: usize = sizes.sum();
    let mut encoded = Vec::with_capacity(file.encoded_len() + size);
    // A message is its fields, one after the other, in any order (protobuf's encoding, "Repeated elements").
    file.encode_raw(&mut encoded);
    for resource in resources.values() {
        encode_key(SNAPSHOT_RESOURCES, WireType::LengthDelimited, &mut encoded);
        encode_varint(length(resource), &mut encoded);
        encoded.extend_from_slice(&resource.0);
    }
    encoded
}

/// Resources and the objects in them. Each is decoded, and if it is a node its signature checked,
/// once, when it comes: a signature costs 0.1 ms, and 100,000 of them with every change 10 s.
#[derive(Debug, Clone)]
pub struct State {
    authority: CertificateDer<'static>,
    mesh: MeshId,
    resources: Resources,
    objects: BTreeMap<ResourceKey, Object>,
}

/// Whether node records still have to prove themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// They come from outside.
    Check,
    /// They were checked before they were written to where they come from.
    Checked,
}

impl State {
    /// With nothing in it, of the mesh whose authority has this certificate.
    ///
    /// # Errors
    ///
    /// [`BadCertificate`].
    pub fn new(authority: CertificateDer<'static>) -> Result<Self, BadCertificate> {
        Ok(Self {
            mesh: mesh_id(&authority)?,
            authority,
            resources: Resources::new(),
            objects: BTreeMap::new(),
        })
    }

    /// What was received, broken resources included: for the disk.
    #[must_use]
    pub fn resources(&self) -> &Resources {
        &self.resources
    }

    /// Performs what `response` says. Resources that are broken, of a kind that this version does
    /// not know, or nodes that the authority did not sign come back; they are in no snapshot, and
    /// one of them does not spoil the rest.
    #[must_use]
    pub fn apply(&mut self, response: SyncResponse, trust: Trust) -> Vec<Rejected> {
        let touched = response
            .set
            .iter()
            .filter_map(|resource| key(resource).ok());
        let mut touched: Vec<_> = touched.chain(response.removed.iter().cloned()).collect();
        if let Some(compared) = &response.compared {
            touched.extend(differing(&self.resources, compared));
        }
        if response.full {
            self.objects.clear();
        }
        let mut rejected = apply(&mut self.resources, response);
        for key in touched {
            let Some(resource) = self.resources.get(&key) else {
                self.objects.remove(&key);
                continue;
            };
            match self.check(&resource.decode(), trust) {
                Ok(object) => {
                    self.objects.insert(key, object);
                }
                Err(problem) => {
                    self.objects.remove(&key);
                    rejected.push(Rejected {
                        resource: key,
                        problem,
                    });
                }
            }
        }
        rejected
    }

    fn check(&self, resource: &Resource, trust: Trust) -> Result<Object, Problem> {
        let object = decode(resource)?;
        if let (Object::Node(node), Some(resource::Kind::Node(signed))) = (&object, &resource.kind)
        {
            if trust == Trust::Check {
                verify_record(&self.authority, &signed.record, &signed.signature)?;
            }
            check_overlay(self.mesh, node)?;
        }
        Ok(object)
    }

    /// The snapshot in the resources.
    ///
    /// # Errors
    ///
    /// [`SnapshotError`] when the mesh's own settings are missing, broken, or of another mesh.
    pub fn snapshot(&self, generation: Generation) -> Result<Snapshot, SnapshotError> {
        let settings = self.objects.values().find_map(|object| match object {
            Object::Mesh(settings) => Some(MeshSettings::clone(settings)),
            Object::Node(_)
            | Object::ExternalPeer(_)
            | Object::Relay(_)
            | Object::Service(_)
            | Object::Slice(..)
            | Object::Pod(_)
            | Object::Namespace(..)
            | Object::NetworkPolicy(_)
            | Object::MeshPolicy(_)
            | Object::Community(..) => None,
        });
        let settings = settings.ok_or(SnapshotError::NoMesh)?;
        if settings.id != self.mesh {
            let (expected, found) = (self.mesh, settings.id);
            return Err(SnapshotError::OtherMesh { expected, found });
        }
        let mut snapshot = Snapshot::empty(settings);
        snapshot.generation = generation;
        for object in self.objects.values().cloned() {
            insert(&mut snapshot, object);
        }
        Ok(snapshot)
    }
}

fn insert(snapshot: &mut Snapshot, object: Object) {
    match object {
        // There is only one, and it was taken before.
        Object::Mesh(_) => {}
        Object::Node(node) => {
            snapshot.nodes.insert(node.name.clone(), *node);
        }
        Object::ExternalPeer(peer) => {
            snapshot.external_peers.insert(peer.name.clone(), *peer);
        }
        Object::Relay(relay) => {
            snapshot.relays.insert(RelayId::from(&relay.name), *relay);
        }
        Object::Service(service) => {
            snapshot.services.insert(service.name.clone(), service);
        }
        Object::Slice(service, slice) => {
            let slices = snapshot.slices.entry(service).or_default();
            slices.insert(slice.name.clone(), slice);
        }
        Object::Pod(pod) => {
            snapshot.policy.pods.insert(pod.name.clone(), pod);
        }
        Object::Namespace(name, labels) => {
            snapshot.policy.namespaces.insert(name, labels);
        }
        Object::NetworkPolicy(policy) => {
            let policies = &mut snapshot.policy.network;
            policies.insert(policy.name.clone(), policy);
        }
        Object::MeshPolicy(policy) => {
            snapshot.policy.mesh.insert(policy.name.clone(), policy);
        }
        Object::Community(name, sites) => {
            snapshot.communities.insert(name, sites);
        }
    }
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
