//! The kinds that the server knows: built-in ones, with schemas from `k8s-openapi`, and those that
//! custom resource definitions add.

use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock},
};

use k8s_openapi::{
    Resource,
    api::{
        apps::v1 as apps, authentication::v1 as authentication, authorization::v1 as authorization,
        coordination::v1 as coordination, core::v1 as core, discovery::v1 as discovery,
        events::v1 as events, networking::v1 as networking, policy::v1 as policy, rbac::v1 as rbac,
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1 as apiextensions,
    apimachinery::pkg::apis::meta::v1 as meta,
    schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings},
};
use serde_json::{Value, json};

use super::{
    lists, object,
    schema::{Definitions, Schema},
};

/// A column that `kubectl get` prints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Column {
    pub(crate) name: String,
    /// `string`, `integer`, `date` …
    pub(crate) kind: String,
    pub(crate) format: String,
    pub(crate) description: String,
    /// 0, or 1 for `-o wide` only.
    pub(crate) priority: i64,
    /// A JSON path without braces, as `.spec.site`.
    pub(crate) path: String,
}

/// A kind in one version.
#[derive(Debug)]
pub(crate) struct Kind {
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) kind: String,
    pub(crate) plural: String,
    pub(crate) singular: String,
    pub(crate) short_names: Vec<String>,
    pub(crate) categories: Vec<String>,
    pub(crate) namespaced: bool,
    /// Its status has a door of its own.
    pub(crate) has_status: bool,
    /// It can only be asked (created), and is not kept.
    pub(crate) ask_only: bool,
    /// From a custom resource definition.
    pub(crate) custom: bool,
    pub(crate) schema: Schema,
    /// Name of its schema in `OpenAPI` documents.
    pub(crate) definition: String,
    /// Its schema as `OpenAPI` documents show it.
    pub(crate) raw: Value,
    pub(crate) columns: Vec<Column>,
    /// Where its objects are kept.
    pub(crate) resource: String,
}

impl Kind {
    /// As in `apiVersion`.
    pub(crate) fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.clone()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    pub(crate) fn list_kind(&self) -> String {
        format!("{}List", self.kind)
    }

    pub(crate) fn verbs(&self) -> &'static [&'static str] {
        if self.ask_only {
            &["create"]
        } else {
            &[
                "create",
                "delete",
                "deletecollection",
                "get",
                "list",
                "patch",
                "update",
                "watch",
            ]
        }
    }

    /// Its objects count how often more than metadata and status changed.
    pub(crate) fn counts_generation(&self) -> bool {
        let counts = [
            "CustomResourceDefinition",
            "DaemonSet",
            "Deployment",
            "EndpointSlice",
            "NetworkPolicy",
            "Pod",
            "PodDisruptionBudget",
            "StatefulSet",
        ];
        self.custom || counts.contains(&self.kind.as_str())
    }

    /// A PUT may leave out `resourceVersion`.
    pub(crate) fn updates_unconditionally(&self) -> bool {
        !self.custom && !matches!(self.kind.as_str(), "Lease" | "CustomResourceDefinition")
    }
}

/// All kinds, and the schemas that theirs refer to.
#[derive(Debug, Clone)]
pub(crate) struct Catalog {
    pub(crate) kinds: Vec<Arc<Kind>>,
}

impl Default for Catalog {
    fn default() -> Self {
        Self {
            kinds: BUILT_IN.kinds.clone(),
        }
    }
}

impl Catalog {
    pub(crate) fn find(&self, group: &str, version: &str, plural: &str) -> Option<&Arc<Kind>> {
        self.kinds
            .iter()
            .find(|kind| kind.plural == plural && kind.group == group && kind.version == version)
    }

    pub(crate) fn of_object(&self, object: &Value) -> Option<&Arc<Kind>> {
        let kind = object::text(object, &["kind"])?;
        let version = object::text(object, &["apiVersion"])?;
        self.kinds
            .iter()
            .find(|known| known.kind == kind && known.api_version() == version)
    }

    /// The kind of what is kept in `resource`.
    pub(crate) fn of_resource(&self, resource: &str) -> Option<&Arc<Kind>> {
        self.kinds.iter().find(|kind| kind.resource == resource)
    }

    /// Groups and their versions, in the order of discovery: the core group first.
    pub(crate) fn groups(&self) -> Vec<(&str, Vec<&str>)> {
        let mut groups: Vec<(&str, Vec<&str>)> = Vec::new();
        for kind in &self.kinds {
            match groups.iter_mut().find(|(group, _)| *group == kind.group) {
                Some((_, versions)) => {
                    if !versions.contains(&kind.version.as_str()) {
                        versions.push(&kind.version);
                    }
                }
                None => groups.push((&kind.group, vec![&kind.version])),
            }
        }
        groups
    }

    pub(crate) fn of_version<'a>(
        &'a self,
        group: &'a str,
        version: &'a str,
    ) -> impl Iterator<Item = &'a Arc<Kind>> {
        self.kinds
            .iter()
            .filter(move |kind| kind.group == group && kind.version == version)
    }
}

struct BuiltIn {
    kinds: Vec<Arc<Kind>>,
    definitions: Definitions,
    raw: BTreeMap<String, Value>,
}

/// Schemas that kinds refer to.
pub(crate) fn definitions() -> &'static Definitions {
    &BUILT_IN.definitions
}

/// The same as `OpenAPI` documents show them.
pub(crate) fn raw_definitions() -> &'static BTreeMap<String, Value> {
    &BUILT_IN.raw
}

/// What `k8s-openapi` does not say of a kind.
struct Extra {
    namespaced: bool,
    has_status: bool,
    ask_only: bool,
    short: &'static [&'static str],
    categories: &'static [&'static str],
}

const NAMESPACED: Extra = Extra {
    namespaced: true,
    has_status: false,
    ask_only: false,
    short: &[],
    categories: &[],
};

const CLUSTER: Extra = Extra {
    namespaced: false,
    ..NAMESPACED
};

const ASKED: Extra = Extra {
    ask_only: true,
    ..CLUSTER
};

const ALL: &[&str] = &["all"];

static BUILT_IN: LazyLock<BuiltIn> = LazyLock::new(|| {
    let mut builder = Builder {
        generator: SchemaSettings::openapi3().into_generator(),
        found: Vec::new(),
    };
    builder.core();
    builder.others();
    builder.finish()
});

struct Builder {
    generator: SchemaGenerator,
    found: Vec<(Found, Extra)>,
}

struct Found {
    group: &'static str,
    version: &'static str,
    kind: &'static str,
    plural: &'static str,
    definition: String,
}

impl Builder {
    fn add<T: Resource + JsonSchema>(&mut self, extra: Extra) {
        self.generator.subschema_for::<T>();
        let found = Found {
            group: T::GROUP,
            version: T::VERSION,
            kind: T::KIND,
            plural: T::URL_PATH_SEGMENT,
            definition: T::schema_name().into_owned(),
        };
        self.found.push((found, extra));
    }

    fn core(&mut self) {
        let status = |short| Extra {
            has_status: true,
            short,
            ..NAMESPACED
        };
        let cluster = |short| Extra {
            has_status: true,
            short,
            ..CLUSTER
        };
        let short = |short| Extra {
            short,
            ..NAMESPACED
        };
        self.add::<core::Namespace>(cluster(&["ns"]));
        self.add::<core::Node>(cluster(&["no"]));
        self.add::<core::Pod>(Extra {
            categories: ALL,
            ..status(&["po"])
        });
        self.add::<core::Service>(Extra {
            categories: ALL,
            ..status(&["svc"])
        });
        self.add::<core::Endpoints>(short(&["ep"]));
        self.add::<core::ConfigMap>(short(&["cm"]));
        self.add::<core::Secret>(NAMESPACED);
        self.add::<core::ServiceAccount>(short(&["sa"]));
        self.add::<core::Event>(short(&["ev"]));
    }

    fn others(&mut self) {
        let status = |short| Extra {
            has_status: true,
            short,
            ..NAMESPACED
        };
        let short = |short| Extra {
            short,
            ..NAMESPACED
        };
        self.add::<apps::DaemonSet>(Extra {
            categories: ALL,
            ..status(&["ds"])
        });
        self.add::<apps::Deployment>(Extra {
            categories: ALL,
            ..status(&["deploy"])
        });
        self.add::<apps::StatefulSet>(Extra {
            categories: ALL,
            ..status(&["sts"])
        });
        self.add::<discovery::EndpointSlice>(NAMESPACED);
        self.add::<events::Event>(short(&["ev"]));
        self.add::<coordination::Lease>(NAMESPACED);
        self.add::<networking::NetworkPolicy>(short(&["netpol"]));
        self.add::<policy::PodDisruptionBudget>(status(&["pdb"]));
        self.add::<rbac::ClusterRole>(CLUSTER);
        self.add::<rbac::ClusterRoleBinding>(CLUSTER);
        self.add::<rbac::Role>(NAMESPACED);
        self.add::<rbac::RoleBinding>(NAMESPACED);
        self.add::<apiextensions::CustomResourceDefinition>(Extra {
            has_status: true,
            short: &["crd", "crds"],
            categories: &["api-extensions"],
            ..CLUSTER
        });
        self.add::<authentication::TokenReview>(ASKED);
        self.add::<authentication::SelfSubjectReview>(ASKED);
        self.add::<authorization::SubjectAccessReview>(ASKED);
        self.add::<authorization::SelfSubjectAccessReview>(ASKED);
        self.add::<authorization::SelfSubjectRulesReview>(ASKED);
        self.add::<authorization::LocalSubjectAccessReview>(Extra {
            namespaced: true,
            ..ASKED
        });
        self.generator
            .subschema_for::<authentication::TokenRequest>();
        self.generator.subschema_for::<meta::DeleteOptions>();
        self.generator.subschema_for::<meta::Status>();
    }

    fn finish(mut self) -> BuiltIn {
        let taken = self.generator.take_definitions(false);
        let mut raw: BTreeMap<String, Value> = taken.into_iter().collect();
        for (name, schema) in &mut raw {
            complete(name, schema);
        }
        for (found, _) in &self.found {
            if let Some(schema) = raw.get_mut(&found.definition) {
                let gvk =
                    json!([{"group": found.group, "version": found.version, "kind": found.kind}]);
                object::set(schema, &["x-kubernetes-group-version-kind"], gvk);
            }
        }
        let definitions = raw
            .iter()
            .map(|(name, schema)| (name.clone(), Schema::parse(schema).unwrap_or_default()))
            .collect();
        let kinds = self.found.into_iter().map(|(found, extra)| {
            let raw = raw.get(&found.definition).cloned().unwrap_or_default();
            let resource = match found.kind {
                // Both groups show the same events.
                "Event" => "events.k8s.io/events".to_owned(),
                _ => format!("{}/{}", found.group, found.plural),
            };
            let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
            Arc::new(Kind {
                group: found.group.to_owned(),
                version: found.version.to_owned(),
                kind: found.kind.to_owned(),
                plural: found.plural.to_owned(),
                singular: found.kind.to_lowercase(),
                short_names: owned(extra.short),
                categories: owned(extra.categories),
                namespaced: extra.namespaced,
                has_status: extra.has_status,
                ask_only: extra.ask_only,
                custom: false,
                schema: Schema::parse(&raw).unwrap_or_default(),
                definition: found.definition,
                raw,
                columns: Vec::new(),
                resource,
            })
        });
        let kinds = kinds.collect();
        BuiltIn {
            kinds,
            definitions,
            raw,
        }
    }
}

/// Definitions that hold any JSON.
const ANYTHING: &[&str] = &[
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSON",
    "io.k8s.apimachinery.pkg.apis.meta.v1.FieldsV1",
    "io.k8s.apimachinery.pkg.runtime.RawExtension",
];

/// Says in a definition what the real server's says beside: how lists merge, what is any JSON, and
/// references in the form that has room for a description.
fn complete(name: &str, schema: &mut Value) {
    if ANYTHING.contains(&name) {
        object::set(schema, &["x-kubernetes-preserve-unknown-fields"], true);
        if name.ends_with(".JSON") {
            object::remove(schema, &["type"]);
        }
    }
    if let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        for property in properties.values_mut() {
            wrap_reference(property);
        }
    }
    lists::annotate(name, schema);
}

fn wrap_reference(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else {
        return;
    };
    if let Some(reference) = map.remove("$ref") {
        map.insert("allOf".to_owned(), json!([{"$ref": reference}]));
    }
    for inner in ["items", "additionalProperties"] {
        let scalar = map.get(inner).and_then(Value::as_object);
        if scalar.is_some_and(|inner| inner.contains_key("$ref") && inner.len() > 1)
            && let Some(inner) = map.get_mut(inner)
        {
            wrap_reference(inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{super::openapi::references, *};

    #[test]
    fn every_kind_has_a_schema_with_metadata() {
        let catalog = Catalog::default();
        assert!(catalog.kinds.len() > 20);
        for kind in &catalog.kinds {
            assert!(
                kind.schema.properties.contains_key("metadata"),
                "{}",
                kind.kind
            );
        }
    }

    #[test]
    fn every_reference_leads_somewhere() {
        let mut found = BTreeSet::new();
        raw_definitions()
            .values()
            .for_each(|raw| references(raw, &mut found));
        assert!(found.len() > 100);
        for name in found {
            assert!(definitions().contains_key(&name), "{name}");
        }
    }

    #[test]
    fn a_kind_is_found_by_path_and_by_object() {
        let catalog = Catalog::default();
        assert_eq!(catalog.find("", "v1", "pods").unwrap().kind, "Pod");
        let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice"});
        assert_eq!(
            catalog.of_object(&slice).unwrap().resource,
            "discovery.k8s.io/endpointslices"
        );
        assert!(catalog.find("", "v2", "pods").is_none());
    }
}
