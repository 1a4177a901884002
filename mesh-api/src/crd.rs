//! Holdfast's own Kubernetes kinds, `mesh.holdfast.dev/v1alpha1`: `MeshService` is in its service's
//! namespace, the others are cluster-scoped.
//!
//! Values are text as the user wrote it. The API server checks their form by the schemas here; the
//! controller checks them again, and says in `status.conditions` what it thinks of them.

#![expect(
    clippy::duplicated_attributes,
    reason = "columns that kubectl prints have a type each, mostly the same"
)]

use kube::CustomResourceExt;
use serde_json::{Value, json};

pub use self::{
    external::{ExternalPeer, ExternalPeerSpec},
    mesh::{
        COMMUNITY_SITES_MAX, Community, CommunitySpec, MeshConfig, MeshConfigSpec, SiteRoute,
        SiteRouteSpec, Subnet,
    },
    node::{MeshNode, MeshNodeSpec, MeshNodeStatus, NodePaths},
    policy::{
        MeshPolicy, MeshPolicySpec, PolicyParty, PolicyPort, PolicyRequirement, PolicyRule,
        PolicySelector,
    },
    relay::{MeshRelay, MeshRelaySpec},
    service::{EndpointWeight, MeshService, MeshServiceSpec},
    status::{Condition, ObjectStatus},
};

mod external;
mod mesh;
mod node;
mod policy;
mod relay;
mod service;
mod status;

/// The group of every kind here.
pub const GROUP: &str = "mesh.holdfast.dev";

/// The version of every kind here.
pub const VERSION: &str = "v1alpha1";

/// `apiVersion` of every kind here.
pub const API_VERSION: &str = "mesh.holdfast.dev/v1alpha1";

/// Label of a `v1 Node` that says its site.
pub const SITE_LABEL: &str = "mesh.holdfast.dev/site";

/// What a site's name looks like.
const SITE_PATTERN: &str = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$";

/// Annotation of a `v1 Service` with the `policy` of a [`MeshService`].
pub const POLICY_ANNOTATION: &str = "mesh.holdfast.dev/policy";

/// Annotation of a `v1 Service` with the `spillOver` of a [`MeshService`].
pub const SPILL_OVER_ANNOTATION: &str = "mesh.holdfast.dev/spill-over";

/// Annotation of a `v1 Service` with the `maxConnections` of a [`MeshService`].
pub const MAX_CONNECTIONS_ANNOTATION: &str = "mesh.holdfast.dev/max-connections";

/// Annotation of a `v1 Service` with the `sockmap` of a [`MeshService`].
pub const SOCKMAP_ANNOTATION: &str = "mesh.holdfast.dev/sockmap";

/// The only name that a [`MeshConfig`] may have.
pub const CONFIG_NAME: &str = "default";

/// Every `CustomResourceDefinition`, as an API server takes it, in the order of their names.
#[must_use]
pub fn definitions() -> Vec<Value> {
    vec![
        definition::<Community>(None),
        definition::<ExternalPeer>(None),
        definition::<MeshConfig>(Some(json!([{
            "rule": format!("self.metadata.name == '{CONFIG_NAME}'"),
            "message": format!("the only MeshConfig is named {CONFIG_NAME}"),
        }]))),
        definition::<MeshNode>(None),
        definition::<MeshPolicy>(None),
        definition::<MeshRelay>(None),
        definition::<MeshService>(None),
        definition::<SiteRoute>(None),
    ]
}

fn definition<K: CustomResourceExt>(root_rules: Option<Value>) -> Value {
    // What `kube` made from types that are known now has nothing that JSON cannot hold.
    let mut definition = serde_json::to_value(K::crd()).unwrap_or_default();
    let schema = definition.pointer_mut("/spec/versions/0/schema/openAPIV3Schema");
    if let Some(schema) = schema {
        known_formats(schema);
        if let Some(rules) = root_rules {
            schema["x-kubernetes-validations"] = rules;
        }
    }
    definition
}

/// API servers know only signed integers, and warn of every other format.
fn known_formats(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            let signed = match fields.get("format").and_then(Value::as_str) {
                Some("uint8" | "uint16") => Some("int32"),
                Some("uint32" | "uint64" | "uint") => Some("int64"),
                _ => None,
            };
            if let Some(signed) = signed {
                fields.insert("format".to_owned(), json!(signed));
            }
            fields.values_mut().for_each(known_formats);
        }
        Value::Array(items) => items.iter_mut().for_each(known_formats),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
mod tests;
