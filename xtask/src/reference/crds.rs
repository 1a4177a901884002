//! `crds.md`: the fields of the custom resources, from the definitions that the API server gets.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_yaml_ng::Value;

use super::{head, header, row};
use crate::root;

pub(super) fn page() -> Result<String> {
    let about = "From `deploy/kubernetes/crds/`, which `cargo xtask crdgen` makes from `mesh-api/src/crd`. The same fields count in \
                 the manifests of a controller without Kubernetes. Every kind has, besides, a status with conditions.";
    let mut page = head("Custom resources (`mesh.holdfast.dev/v1alpha1`)", about);
    let folder = root().join("deploy/kubernetes/crds");
    let mut files: Vec<_> = fs::read_dir(folder)?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    files.sort();
    let mut kinds = 0;
    for file in files {
        let value: Value = serde_yaml_ng::from_str(&fs::read_to_string(&file)?)?;
        if value.get("kind").and_then(Value::as_str) == Some("CustomResourceDefinition") {
            let kind = kind(&value).with_context(|| file.display().to_string())?;
            page += &kind;
            kinds += 1;
        }
    }
    ensure!(kinds > 0, "no definition is found");
    Ok(page)
}

fn kind(definition: &Value) -> Result<String> {
    let spec = definition.get("spec").context("no spec")?;
    let names = spec.get("names").context("no names")?;
    let kind = text(names, "kind");
    let scope = text(spec, "scope").to_lowercase();
    let schema = spec
        .get("versions")
        .and_then(|versions| versions.get(0))
        .and_then(|version| version.get("schema"))
        .and_then(|schema| schema.get("openAPIV3Schema"))
        .context("no schema")?;
    let mut rows = String::new();
    let properties = schema.get("properties").context("no properties")?;
    if let Some(spec) = properties.get("spec") {
        fields(spec, "spec", &mut rows);
    }
    let about = text(schema, "description");
    let short = names.get("shortNames").and_then(Value::as_sequence);
    let short = short.into_iter().flatten().filter_map(Value::as_str);
    let short: Vec<_> = short.map(|name| format!("`{name}`")).collect();
    let short = match short.is_empty() {
        true => String::new(),
        false => format!(", short {}", short.join(", ")),
    };
    Ok(format!(
        "\n## {kind}\n\n{about} `kubectl get {}`{short}; {scope}.\n\n{}{rows}",
        text(names, "plural"),
        header(["field", "type", "what it says"]),
    ))
}

fn fields(schema: &Value, path: &str, rows: &mut String) {
    let required: Vec<_> = strings(schema, "required");
    let properties = schema.get("properties").and_then(Value::as_mapping);
    for (name, field) in properties.into_iter().flatten() {
        let name = name.as_str().unwrap_or_default();
        let (inner, list) = match field.get("items") {
            Some(items) => (items, "[]"),
            None => (field, ""),
        };
        let path = format!("{path}.{name}{list}");
        let must = if required.contains(&name) {
            "; required"
        } else {
            ""
        };
        let about = text(field, "description") + &bounds(field) + &bounds_of_items(field);
        *rows += &row([&format!("`{path}`"), &(type_of(field) + must), &about]);
        fields(inner, &path, rows);
    }
}

fn type_of(field: &Value) -> String {
    if let Some(items) = field.get("items") {
        return format!("list of {}", type_of(items));
    }
    if field.get("additionalProperties").is_some() {
        return "map".to_owned();
    }
    match text(field, "type").as_str() {
        "" => "number or text".to_owned(),
        "integer" => "number".to_owned(),
        "string" => "text".to_owned(),
        other => other.to_owned(),
    }
}

fn bounds_of_items(field: &Value) -> String {
    field.get("items").map(bounds).unwrap_or_default()
}

fn bounds(field: &Value) -> String {
    let number = |key| field.get(key).and_then(Value::as_f64);
    let mut said = Vec::new();
    let allowed = strings(field, "enum");
    if !allowed.is_empty() {
        said.push(format!("One of `{}`", allowed.join("`, `")));
    }
    for (least, most, unit) in [
        ("minimum", "maximum", ""),
        ("minLength", "maxLength", " characters"),
        ("minItems", "maxItems", " of them"),
        ("minProperties", "maxProperties", " of them"),
    ] {
        match (number(least), number(most)) {
            (Some(least), Some(most)) => said.push(format!("{least} to {most}{unit}")),
            (None, Some(most)) => said.push(format!("At most {most}{unit}")),
            (Some(least), None) if least > 0.0 => said.push(format!("At least {least}{unit}")),
            _ => {}
        }
    }
    said.iter().map(|one| format!(" {one}.")).collect()
}

fn text(value: &Value, key: &str) -> String {
    let text = value.get(key).and_then(Value::as_str);
    text.unwrap_or_default().to_owned()
}

fn strings<'a>(value: &'a Value, key: &str) -> Vec<&'a str> {
    let list = value.get(key).and_then(Value::as_sequence);
    list.into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_shown_with_their_place_type_and_bounds() {
        let schema = "required: [a]\nproperties:\n  a: {type: array, description: Some., maxItems: 2, items: {type: object, \
                      properties: {b: {type: string, enum: [x, y]}}}}";
        let mut rows = String::new();
        fields(&serde_yaml_ng::from_str(schema).unwrap(), "spec", &mut rows);
        let expected = "| `spec.a[]` | list of object; required | Some. At most 2 of them. |\n\
                        | `spec.a[].b` | text | One of `x`, `y`. |\n";
        assert_eq!(rows, expected);
    }
}
