//! Custom resource definitions: what is checked, and the kinds that they add.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{
    error::Cause,
    kinds::{Column, Kind},
    names, object,
    schema::Schema,
    structural,
};

/// Where definitions are kept.
pub(crate) const RESOURCE: &str = "apiextensions.k8s.io/customresourcedefinitions";

/// What is wrong with a definition, beyond its own schema.
pub(crate) fn check(crd: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let spec = |path: &[&str]| {
        let path: Vec<_> = ["spec"].iter().chain(path).copied().collect();
        object::text(crd, &path).unwrap_or_default().to_owned()
    };
    let (group, plural) = (spec(&["group"]), spec(&["names", "plural"]));
    if !names::is_subdomain(&group) || !group.contains('.') {
        let why = "should be a domain with at least one dot";
        causes.push(Cause::invalid("spec.group", &group.as_str().into(), why));
    }
    if object::name(crd) != format!("{plural}.{group}") {
        let name = object::name(crd).into();
        let why = "must be spec.names.plural+\".\"+spec.group";
        causes.push(Cause::invalid("metadata.name", &name, why));
    }
    for (field, label) in [
        ("plural", &plural),
        ("singular", &spec(&["names", "singular"])),
    ] {
        if !label.is_empty() && !names::is_rfc1035_label(label)
            || field == "plural" && label.is_empty()
        {
            let field = format!("spec.names.{field}");
            causes.push(Cause::invalid(
                field,
                &label.as_str().into(),
                "must be a DNS-1035 label",
            ));
        }
    }
    let kind = spec(&["names", "kind"]);
    if !names::is_rfc1035_label(&kind.to_lowercase()) {
        let why = "may have mixed case, but should otherwise match a DNS-1035 label";
        causes.push(Cause::invalid(
            "spec.names.kind",
            &kind.as_str().into(),
            why,
        ));
    }
    for list in ["shortNames", "categories"] {
        for word in object::texts(crd, &["spec", "names", list]) {
            if !names::is_rfc1035_label(word) {
                let field = format!("spec.names.{list}");
                causes.push(Cause::invalid(
                    field,
                    &word.into(),
                    "must be a DNS-1035 label",
                ));
            }
        }
    }
    let scope = spec(&["scope"]);
    if !matches!(scope.as_str(), "Namespaced" | "Cluster") {
        let known = ["Cluster", "Namespaced"];
        causes.push(Cause::not_supported("spec.scope", &scope.into(), &known));
    }
    if !matches!(spec(&["conversion", "strategy"]).as_str(), "" | "None") {
        let why = "this stand-in converts by apiVersion only";
        causes.push(Cause::forbidden("spec.conversion.strategy", why));
    }
    check_versions(crd, &mut causes);
    causes
}

fn check_versions(crd: &Value, causes: &mut Vec<Cause>) {
    let versions = object::list(crd, &["spec", "versions"]);
    let stored = versions.iter().filter(|version| flag(version, "storage"));
    if stored.count() != 1 {
        let why = "must have exactly one version marked as storage version";
        causes.push(Cause::invalid("spec.versions", &versions.into(), why));
    }
    for (index, version) in versions.iter().enumerate() {
        let path = format!("spec.versions[{index}]");
        let name = object::text(version, &["name"]).unwrap_or_default();
        if !names::is_rfc1035_label(name) {
            let why = "must be a DNS-1035 label";
            causes.push(Cause::invalid(format!("{path}.name"), &name.into(), why));
        }
        match object::at(version, &["schema", "openAPIV3Schema"]) {
            Some(schema) => {
                let place = format!("{path}.schema.openAPIV3Schema");
                causes.extend(structural::check(schema, &place));
            }
            None => {
                let why = "schemas are required";
                causes.push(Cause::required(
                    format!("{path}.schema.openAPIV3Schema"),
                    why,
                ));
            }
        }
        let columns = object::list(version, &["additionalPrinterColumns"]);
        for (index, column) in columns.iter().enumerate() {
            check_column(
                column,
                &format!("{path}.additionalPrinterColumns[{index}]"),
                causes,
            );
        }
    }
}

fn check_column(column: &Value, path: &str, causes: &mut Vec<Cause>) {
    let known = ["boolean", "date", "integer", "number", "string"];
    let kind = object::text(column, &["type"]).unwrap_or_default();
    if !known.contains(&kind) {
        causes.push(Cause::not_supported(
            format!("{path}.type"),
            &kind.into(),
            &known,
        ));
    }
    let json_path = object::text(column, &["jsonPath"]).unwrap_or_default();
    if !json_path.starts_with('.') {
        let why = "must be a simple json path starting with .";
        causes.push(Cause::invalid(
            format!("{path}.jsonPath"),
            &json_path.into(),
            why,
        ));
    }
    if object::text(column, &["name"]).is_none_or(str::is_empty) {
        causes.push(Cause::required(format!("{path}.name"), ""));
    }
}

fn flag(value: &Value, key: &str) -> bool {
    value.get(key).and_then(Value::as_bool) == Some(true)
}

/// Fills in what the real server fills in: names, list kind, conversion.
pub(crate) fn fill_in(crd: &mut Value) {
    let kind = object::text(crd, &["spec", "names", "kind"])
        .unwrap_or_default()
        .to_owned();
    object::set_default(crd, &["spec", "names", "singular"], kind.to_lowercase());
    object::set_default(crd, &["spec", "names", "listKind"], format!("{kind}List"));
    object::set_default(crd, &["spec", "conversion"], json!({"strategy": "None"}));
}

/// Says in the status that the definition is in use. `taken` names what another one has already.
pub(crate) fn establish(crd: &mut Value, taken: Option<&str>, now: &str) {
    let condition = |kind: &str, good: bool, reason: &str, message: &str| {
        json!({
            "type": kind,
            "status": if good { "True" } else { "False" },
            "reason": reason,
            "message": message,
            "lastTransitionTime": now,
        })
    };
    let conditions = match taken {
        None => json!([
            condition("NamesAccepted", true, "NoConflicts", "no conflicts found"),
            condition(
                "Established",
                true,
                "InitialNamesAccepted",
                "the initial names have been accepted"
            ),
        ]),
        Some(name) => json!([
            condition(
                "NamesAccepted",
                false,
                "KindConflict",
                &format!("{name:?} is already in use")
            ),
            condition(
                "Established",
                false,
                "NotAccepted",
                "not all names are accepted"
            ),
        ]),
    };
    let same = object::list(crd, &["status", "conditions"])
        .iter()
        .zip(conditions.as_array().into_iter().flatten())
        .filter(|(old, new)| {
            old.get("type") == new.get("type") && old.get("status") == new.get("status")
        })
        .count();
    if same != 2 {
        object::set(crd, &["status", "conditions"], conditions);
    }
    let names = object::at(crd, &["spec", "names"])
        .cloned()
        .unwrap_or_default();
    object::set(crd, &["status", "acceptedNames"], names);
    let mut stored = object::texts(crd, &["status", "storedVersions"])
        .into_iter()
        .map(str::to_owned)
        .collect::<Vec<_>>();
    let versions = object::list(crd, &["spec", "versions"]).iter();
    for version in versions.filter(|version| flag(version, "storage")) {
        let name = object::text(version, &["name"]).unwrap_or_default();
        if !stored.iter().any(|one| one == name) {
            stored.push(name.to_owned());
        }
    }
    object::set(crd, &["status", "storedVersions"], stored);
}

/// The kinds of a definition that is in use: one for each served version.
pub(crate) fn kinds(crd: &Value) -> Vec<Arc<Kind>> {
    let established = object::list(crd, &["status", "conditions"])
        .iter()
        .any(|condition| {
            object::text(condition, &["type"]) == Some("Established")
                && object::text(condition, &["status"]) == Some("True")
        });
    if !established {
        return Vec::new();
    }
    let versions = object::list(crd, &["spec", "versions"]).iter();
    versions
        .filter(|version| flag(version, "served"))
        .map(|version| Arc::new(kind(crd, version)))
        .collect()
}

fn kind(crd: &Value, version: &Value) -> Kind {
    let spec = |path: &[&str]| {
        let path: Vec<_> = ["spec"].iter().chain(path).copied().collect();
        object::text(crd, &path).unwrap_or_default().to_owned()
    };
    let words = |list: &str| {
        let words = object::texts(crd, &["spec", "names", list]).into_iter();
        words.map(str::to_owned).collect()
    };
    let (group, name) = (spec(&["group"]), spec(&["names", "kind"]));
    let version_name = object::text(version, &["name"]).unwrap_or_default();
    let raw = open_api(version, &group, version_name, &name);
    let reversed: Vec<_> = group.rsplit('.').collect();
    let plural = spec(&["names", "plural"]);
    Kind {
        definition: format!("{}.{version_name}.{name}", reversed.join(".")),
        resource: format!("{group}/{plural}"),
        version: version_name.to_owned(),
        kind: name,
        plural,
        singular: spec(&["names", "singular"]),
        short_names: words("shortNames"),
        categories: words("categories"),
        namespaced: spec(&["scope"]) == "Namespaced",
        has_status: object::at(version, &["subresources", "status"]).is_some(),
        ask_only: false,
        custom: true,
        schema: Schema::parse(&raw).unwrap_or_default(),
        raw,
        columns: columns(version),
        group,
    }
}

/// The schema with what every object has.
fn open_api(version: &Value, group: &str, name: &str, kind: &str) -> Value {
    let mut raw = object::at(version, &["schema", "openAPIV3Schema"])
        .cloned()
        .unwrap_or_default();
    let text = |description: &str| json!({"type": "string", "description": description});
    let properties = [
        (
            "apiVersion",
            text("APIVersion defines the versioned schema of this representation of an object."),
        ),
        (
            "kind",
            text("Kind is a string value representing the REST resource this object represents."),
        ),
        (
            "metadata",
            json!({
                "description": "Standard object's metadata.",
                "allOf": [{"$ref": "#/components/schemas/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}],
            }),
        ),
    ];
    for (key, property) in properties {
        object::set(&mut raw, &["properties", key], property);
    }
    let gvk = json!([{"group": group, "version": name, "kind": kind}]);
    object::set(&mut raw, &["x-kubernetes-group-version-kind"], gvk);
    raw
}

fn columns(version: &Value) -> Vec<Column> {
    let raw = object::list(version, &["additionalPrinterColumns"]);
    let column = |raw: &Value| {
        let text = |key: &str| object::text(raw, &[key]).unwrap_or_default().to_owned();
        Column {
            name: text("name"),
            kind: text("type"),
            format: text("format"),
            description: text("description"),
            priority: raw.get("priority").and_then(Value::as_i64).unwrap_or(0),
            path: text("jsonPath"),
        }
    };
    if raw.is_empty() {
        return vec![Column {
            name: "Age".to_owned(),
            kind: "date".to_owned(),
            format: String::new(),
            description: "creation time".to_owned(),
            priority: 0,
            path: ".metadata.creationTimestamp".to_owned(),
        }];
    }
    raw.iter().map(column).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crd() -> Value {
        json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": "things.example.dev"},
            "spec": {
                "group": "example.dev", "scope": "Namespaced",
                "names": {"plural": "things", "kind": "Thing", "shortNames": ["th"]},
                "versions": [{
                    "name": "v1", "served": true, "storage": true, "subresources": {"status": {}},
                    "schema": {"openAPIV3Schema": {"type": "object", "properties": {
                        "spec": {"type": "object", "properties": {"a": {"type": "integer"}}},
                    }}},
                }],
            },
        })
    }

    #[test]
    fn a_definition_becomes_a_kind_once_established() {
        let mut crd = crd();
        fill_in(&mut crd);
        assert_eq!(check(&crd), []);
        assert!(kinds(&crd).is_empty());
        establish(&mut crd, None, "2026-01-01T00:00:00Z");
        let kinds = kinds(&crd);
        assert_eq!(kinds.len(), 1);
        let kind = &kinds[0];
        assert_eq!(
            (
                kind.singular.as_str(),
                kind.definition.as_str(),
                kind.has_status,
                kind.columns.len()
            ),
            ("thing", "dev.example.v1.Thing", true, 1)
        );
        assert!(kind.schema.properties.contains_key("metadata"));
        assert_eq!(crd["status"]["storedVersions"], json!(["v1"]));
    }

    #[test]
    fn wrong_definitions_are_refused_with_their_place() {
        for (path, value, place) in [
            (
                ["metadata", "name"].as_slice(),
                json!("thing.example.dev"),
                "metadata.name",
            ),
            (&["spec", "scope"], json!("Global"), "spec.scope"),
            (
                &["spec", "names", "shortNames"],
                json!(["T"]),
                "spec.names.shortNames",
            ),
            (
                &["spec", "names", "kind"],
                json!("A thing"),
                "spec.names.kind",
            ),
            (&["spec", "versions"], json!([]), "spec.versions"),
        ] {
            let mut crd = crd();
            object::set(&mut crd, path, value);
            let causes = check(&crd);
            assert!(
                causes.len() == 1 && causes[0].field == place,
                "{path:?}: {causes:?}"
            );
        }
    }

    #[test]
    fn a_name_that_is_taken_is_not_established() {
        let mut crd = crd();
        establish(&mut crd, Some("Thing"), "2026-01-01T00:00:00Z");
        assert!(kinds(&crd).is_empty());
        assert_eq!(crd["status"]["conditions"][1]["status"], "False");
    }
}
