//! `OpenAPI` v3 documents, as far as `kubectl` reads them: schemas, and for each resource its
//! paths with kind and parameters.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::{
    kinds::{Catalog, Kind, raw_definitions},
    object,
};

/// Where the documents are.
pub(crate) fn index(catalog: &Catalog) -> Value {
    let mut paths = Map::new();
    for (group, versions) in catalog.groups() {
        for version in versions {
            let path = if group.is_empty() {
                format!("api/{version}")
            } else {
                format!("apis/{group}/{version}")
            };
            let place = format!("/openapi/v3/{path}?hash={}", catalog.kinds.len());
            paths.insert(path, json!({"serverRelativeURL": place}));
        }
    }
    json!({"paths": paths})
}

/// The document of a group's version; nothing if there is none.
pub(crate) fn document(catalog: &Catalog, path: &str) -> Option<Value> {
    let parts: Vec<_> = path.split('/').filter(|part| !part.is_empty()).collect();
    let (group, version) = match parts.as_slice() {
        ["api", version] => ("", *version),
        ["apis", group, version] => (*group, *version),
        _ => return None,
    };
    let kinds: Vec<_> = catalog.of_version(group, version).collect();
    if kinds.is_empty() {
        return None;
    }
    let mut schemas = BTreeMap::new();
    let mut wanted = BTreeSet::from([
        "io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions".to_owned(),
        "io.k8s.apimachinery.pkg.apis.meta.v1.Status".to_owned(),
    ]);
    let mut paths = Map::new();
    for kind in kinds {
        references(&kind.raw, &mut wanted);
        schemas.insert(kind.definition.clone(), kind.raw.clone());
        add_paths(kind, &mut paths);
    }
    while let Some(name) = wanted.pop_first() {
        if schemas.contains_key(&name) {
            continue;
        }
        if let Some(raw) = raw_definitions().get(&name) {
            references(raw, &mut wanted);
            schemas.insert(name, raw.clone());
        }
    }
    Some(json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1.34.0-standin"},
        "paths": paths,
        "components": {"schemas": schemas},
    }))
}

/// The names of all definitions that `raw` refers to.
pub(super) fn references(raw: &Value, found: &mut BTreeSet<String>) {
    match raw {
        Value::Object(map) => {
            if let Some(Value::String(place)) = map.get("$ref") {
                found.extend(place.rsplit('/').next().map(str::to_owned));
            }
            map.values().for_each(|value| references(value, found));
        }
        Value::Array(items) => items.iter().for_each(|item| references(item, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn add_paths(kind: &Kind, paths: &mut Map<String, Value>) {
    let root = if kind.group.is_empty() {
        format!("/api/{}", kind.version)
    } else {
        format!("/apis/{}/{}", kind.group, kind.version)
    };
    let scope = if kind.namespaced {
        "/namespaces/{namespace}"
    } else {
        ""
    };
    let collection = format!("{root}{scope}/{}", kind.plural);
    let operation = |action: &str, parameters: &[&str]| {
        let parameters: Vec<_> = parameters
            .iter()
            .map(|name| {
                json!({
                    "name": name, "in": "query",
                    "schema": {"type": "string", "uniqueItems": true},
                })
            })
            .collect();
        json!({
            "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": {
                "group": kind.group, "version": kind.version, "kind": kind.kind,
            },
            "parameters": parameters,
            "responses": {"200": {"description": "OK"}},
        })
    };
    let writes = ["dryRun", "fieldManager", "fieldValidation"];
    let patches = ["dryRun", "fieldManager", "fieldValidation", "force"];
    if !kind.ask_only {
        let one = json!({
            "get": operation("get", &[]),
            "put": operation("put", &writes),
            "patch": operation("patch", &patches),
            "delete": operation("delete", &["dryRun"]),
        });
        paths.insert(format!("{collection}/{{name}}"), one.clone());
        if kind.has_status {
            paths.insert(format!("{collection}/{{name}}/status"), one);
        }
    }
    let mut many = json!({"post": operation("post", &writes)});
    if !kind.ask_only {
        object::set(
            &mut many,
            &["get"],
            operation("list", &["labelSelector", "fieldSelector"]),
        );
    }
    paths.insert(collection, many);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_is_whole() {
        let catalog = Catalog::default();
        let index = index(&catalog);
        assert!(index["paths"]["apis/apps/v1"].is_object());
        let document = document(&catalog, "/apis/apps/v1").unwrap();
        let mut wanted = BTreeSet::new();
        references(&document, &mut wanted);
        let schemas = document["components"]["schemas"].as_object().unwrap();
        for name in wanted {
            assert!(schemas.contains_key(&name), "{name}");
        }
        let path = "/apis/apps/v1/namespaces/{namespace}/daemonsets/{name}";
        assert_eq!(
            document["paths"][path]["patch"]["x-kubernetes-group-version-kind"]["kind"],
            "DaemonSet"
        );
        assert!(super::document(&catalog, "/apis/none/v1").is_none());
    }
}
