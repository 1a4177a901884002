//! From an API server's objects to checked ones. Everything else of an object is dropped here.

use k8s_openapi::{
    api::{
        core::v1::{Namespace, Node, Pod, Service},
        discovery::v1::EndpointSlice,
        networking::v1::NetworkPolicy,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::core::{ApiResource, DynamicObject, PartialObjectMeta};
use mesh_api::crd::{
    Community, ExternalPeer, MeshConfig, MeshNode, MeshPolicy, MeshRelay, MeshService, SiteRoute,
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{
    cluster::Item,
    manifests::{
        Kind, Object, ObjectId, kinds,
        parse::{FieldProblem, check_name},
    },
};

/// Slices of services have this label.
pub(super) const SLICES: &str = "kubernetes.io/service-name";

/// A `v1` Service.
#[must_use]
pub fn service(object: Service) -> Item {
    let read = |id: &ObjectId| kinds::service(id, &object);
    item(Kind::Service, &object.metadata, read)
}

/// An EndpointSlice.
#[must_use]
pub fn slice(object: EndpointSlice) -> Item {
    let read = |id: &ObjectId| kinds::slice(id, &object);
    item(Kind::EndpointSlice, &object.metadata, read)
}

/// A `v1` Node.
#[must_use]
pub fn node(object: Node) -> Item {
    let read = |id: &ObjectId| kinds::node(id, &object);
    item(Kind::Node, &object.metadata, read)
}

/// A NetworkPolicy.
#[must_use]
pub fn network_policy(object: NetworkPolicy) -> Item {
    let read = |id: &ObjectId| kinds::network_policy(id, &object);
    item(Kind::NetworkPolicy, &object.metadata, read)
}

/// A `v1` Pod.
#[must_use]
pub fn pod(object: Pod) -> Item {
    let read = |id: &ObjectId| kinds::pod(id, &object);
    item(Kind::Pod, &object.metadata, read)
}

/// A Namespace's metadata.
#[must_use]
pub fn namespace(object: PartialObjectMeta<Namespace>) -> Item {
    let read = |id: &ObjectId| {
        let labels = object.metadata.labels.clone().unwrap_or_default();
        Ok(Object::Namespace(id.name.clone(), labels))
    };
    item(Kind::Namespace, &object.metadata, read)
}

/// An object of ours. It comes as it is there: one that this version cannot read must not keep the
/// others out.
#[must_use]
pub fn own(kind: Kind, mut object: DynamicObject) -> Item {
    let mut part = |name: &str| object.data.get_mut(name).map(Value::take);
    let (spec, status) = (part("spec").unwrap_or_default(), part("status"));
    let read = |id: &ObjectId| match kind {
        Kind::MeshNode => kinds::mesh_node(id, &typed(spec)?),
        Kind::MeshRelay => kinds::relay(id, &typed(spec)?),
        Kind::ExternalPeer => kinds::external_peer(id, &typed(spec)?),
        Kind::MeshConfig => kinds::config(id, &typed(spec)?),
        Kind::MeshService => kinds::mesh_service(id, &typed(spec)?),
        Kind::MeshPolicy => kinds::mesh_policy(id, &typed(spec)?),
        Kind::SiteRoute => kinds::site_route(id, &typed(spec)?),
        Kind::Community => kinds::community(id, &typed(spec)?),
        Kind::Service
        | Kind::EndpointSlice
        | Kind::Node
        | Kind::NetworkPolicy
        | Kind::Pod
        | Kind::Namespace => Err(FieldProblem::new("", "is not of a kind of the mesh")),
    };
    let mut item = item(kind, &object.metadata, read);
    item.status = status.unwrap_or_default();
    item
}

/// How the API names `kind`.
pub(super) fn api_resource(kind: Kind) -> ApiResource {
    match kind {
        Kind::MeshNode => ApiResource::erase::<MeshNode>(&()),
        Kind::MeshRelay => ApiResource::erase::<MeshRelay>(&()),
        Kind::ExternalPeer => ApiResource::erase::<ExternalPeer>(&()),
        Kind::MeshConfig => ApiResource::erase::<MeshConfig>(&()),
        Kind::MeshService => ApiResource::erase::<MeshService>(&()),
        Kind::MeshPolicy => ApiResource::erase::<MeshPolicy>(&()),
        Kind::SiteRoute => ApiResource::erase::<SiteRoute>(&()),
        Kind::Community => ApiResource::erase::<Community>(&()),
        Kind::Service => ApiResource::erase::<Service>(&()),
        Kind::EndpointSlice => ApiResource::erase::<EndpointSlice>(&()),
        Kind::Node => ApiResource::erase::<Node>(&()),
        Kind::NetworkPolicy => ApiResource::erase::<NetworkPolicy>(&()),
        Kind::Pod => ApiResource::erase::<Pod>(&()),
        Kind::Namespace => ApiResource::erase::<Namespace>(&()),
    }
}

fn item(
    kind: Kind,
    meta: &ObjectMeta,
    read: impl FnOnce(&ObjectId) -> Result<Object, FieldProblem>,
) -> Item {
    let id = ObjectId {
        kind,
        namespace: meta.namespace.clone().unwrap_or_default(),
        name: meta.name.clone().unwrap_or_default(),
    };
    let created = meta.creation_timestamp.as_ref();
    let created_unix_s = created.map_or(0, |created| created.0.as_second());
    let object = check_name(&id.name).and_then(|()| read(&id));
    let mut item = Item::new(id, created_unix_s, object);
    item.uid = meta.uid.clone().unwrap_or_default();
    item.generation = meta.generation.unwrap_or_default();
    item
}

fn typed<T: DeserializeOwned>(spec: Value) -> Result<T, FieldProblem> {
    serde_path_to_error::deserialize(spec).map_err(|error| {
        let path = error.path().to_string();
        let field = if path == "." {
            "spec".to_owned()
        } else {
            format!("spec.{path}")
        };
        FieldProblem::new(field, error.into_inner())
    })
}

#[cfg(test)]
mod tests {
    use mesh_api::crd;
    use serde_json::json;

    use super::*;

    #[test]
    fn an_object_of_ours_is_read_as_a_manifest_is() {
        let item = own(
            Kind::MeshNode,
            object(json!({"site": "lan", "approved": true})),
        );
        assert_eq!((item.generation, item.uid.as_str()), (3, "u"));
        assert_eq!(item.status, json!({"connected": true}));
        let Some(Object::MeshNode(facts)) = item.loaded.map(|loaded| loaded.object) else {
            panic!("{:?}", item.problem);
        };
        assert!(facts.approved);
        assert_eq!(facts.locality.site, Some("lan".parse().unwrap()));
    }

    #[test]
    fn what_cannot_be_read_is_a_problem_of_that_object_with_its_field() {
        let problem = |spec: Value| {
            let item = own(Kind::MeshNode, object(spec));
            assert_eq!(item.loaded, None);
            item.problem.unwrap().to_string()
        };
        let later = problem(json!({"fieldOfALaterVersion": 1}));
        assert!(
            later.starts_with("spec.fieldOfALaterVersion: unknown field"),
            "{later}"
        );
        let wrong = problem(json!({"prefixes": ["10.0.0.0/8", 7]}));
        assert!(
            wrong.starts_with("spec.prefixes[1]: invalid type"),
            "{wrong}"
        );
        let bad = problem(json!({"prefixes": ["10.0.0.0/99"]}));
        assert!(
            bad.starts_with("spec.prefixes[0]: \"10.0.0.0/99\""),
            "{bad}"
        );
    }

    #[test]
    fn the_plural_of_each_kind_is_that_of_its_definition() {
        let plurals: Vec<_> = crd::definitions()
            .iter()
            .map(|one| one["spec"]["names"]["plural"].as_str().unwrap().to_owned())
            .collect();
        for kind in crate::cluster::KINDS {
            let resource = api_resource(kind);
            let ours = resource.group == crd::GROUP;
            assert_eq!(plurals.contains(&resource.plural), ours, "{resource:?}");
        }
    }

    fn object(spec: Value) -> DynamicObject {
        serde_json::from_value(json!({
            "apiVersion": crd::API_VERSION,
            "kind": "MeshNode",
            "metadata": {"name": "a", "uid": "u", "generation": 3, "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": spec,
            "status": {"connected": true},
        }))
        .unwrap()
    }
}
