//! Merge patches, JSON patches and strategic merge patches.

use serde_json::{Map, Value};

use super::{
    error::{ApiError, ApiResult},
    schema::{Definitions, ListType, Schema},
};

/// RFC 7396.
pub(crate) fn merge(target: &mut Value, patch: &Value) {
    json_patch::merge(target, patch);
}

/// RFC 6902.
///
/// # Errors
///
/// 400 for what is no JSON patch, 422 for one that does not apply.
pub(crate) fn json(target: &mut Value, patch: &Value) -> ApiResult<()> {
    let patch: json_patch::Patch = serde_json::from_value(patch.clone())
        .map_err(|error| ApiError::bad_request(format!("error decoding patch: {error}")))?;
    json_patch::patch(target, &patch).map_err(|error| {
        ApiError::new(422, "Invalid", format!("the patch does not apply: {error}"))
    })
}

/// Kubernetes' own: lists with keys merge by item, and `$patch` and its kin direct.
pub(crate) fn strategic(
    target: &mut Value,
    patch: &Value,
    schema: &Schema,
    definitions: &Definitions,
) {
    let schema = schema.resolve(definitions);
    let Some(patch) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    if patch.get("$patch").and_then(Value::as_str) == Some("replace") {
        *target = Value::Object(without_directives(patch));
        return;
    }
    let map = super::object::object(target);
    if let Some(kept) = patch.get("$retainKeys").and_then(Value::as_array) {
        map.retain(|key, _| kept.iter().any(|one| one.as_str() == Some(key)));
    }
    for (key, value) in patch {
        if let Some(list) = key.strip_prefix("$deleteFromPrimitiveList/") {
            let gone = value.as_array().map_or(&[][..], Vec::as_slice);
            if let Some(Value::Array(items)) = map.get_mut(list) {
                items.retain(|item| !gone.contains(item));
            }
        }
    }
    for (key, value) in patch.iter().filter(|(key, _)| !key.starts_with('$')) {
        if value.is_null() {
            map.remove(key);
            continue;
        }
        let member = schema.member(key).map(|schema| schema.resolve(definitions));
        match (member, value) {
            (Some(member), Value::Array(items)) if member.list != ListType::Atomic => {
                let mut list = match map.remove(key) {
                    Some(Value::Array(list)) => list,
                    _ => Vec::new(),
                };
                merge_list(&mut list, items, member, definitions);
                order(
                    &mut list,
                    patch.get(&format!("$setElementOrder/{key}")),
                    member,
                );
                map.insert(key.clone(), Value::Array(list));
            }
            (Some(member), Value::Object(inner)) => {
                if inner.get("$patch").and_then(Value::as_str) == Some("delete") {
                    map.remove(key);
                } else {
                    let target = map.entry(key.clone()).or_insert(Value::Null);
                    strategic(target, value, member, definitions);
                }
            }
            _ => {
                map.insert(key.clone(), value.clone());
            }
        }
    }
}

fn without_directives(patch: &Map<String, Value>) -> Map<String, Value> {
    let members = patch.iter().filter(|(key, _)| !key.starts_with('$'));
    members
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

/// The key by which strategic merges match items: the first of the list's keys.
fn merge_key(schema: &Schema) -> Option<&str> {
    match &schema.list {
        ListType::Map(keys) => keys.first().map(String::as_str),
        ListType::Set | ListType::Atomic => None,
    }
}

fn merge_list(list: &mut Vec<Value>, items: &[Value], schema: &Schema, definitions: &Definitions) {
    let directive =
        |item: &Value, word: &str| item.get("$patch").and_then(Value::as_str) == Some(word);
    if items.iter().any(|item| directive(item, "replace")) {
        list.clear();
    }
    let items = items.iter().filter(|item| !directive(item, "replace"));
    let Some(key) = merge_key(schema) else {
        for item in items {
            if !list.contains(item) {
                list.push(item.clone());
            }
        }
        return;
    };
    for item in items {
        let at = list.iter().position(|one| one.get(key) == item.get(key));
        match (at, &schema.items) {
            (Some(at), _) if directive(item, "delete") => {
                list.remove(at);
            }
            (None, _) if directive(item, "delete") => {}
            (Some(at), Some(of)) => {
                if let Some(target) = list.get_mut(at) {
                    strategic(target, item, of, definitions);
                }
            }
            _ => list.push(item.clone()),
        }
    }
}

/// Sorts what the patch names as it names it; the rest stays behind.
fn order(list: &mut [Value], wanted: Option<&Value>, schema: &Schema) {
    let Some(wanted) = wanted.and_then(Value::as_array) else {
        return;
    };
    let key = merge_key(schema);
    let place = |item: &Value| {
        let same = |one: &Value| match key {
            Some(key) => one.get(key) == item.get(key),
            None => one == item,
        };
        wanted.iter().position(same).unwrap_or(usize::MAX)
    };
    list.sort_by_key(place);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::kinds::{Catalog, definitions},
        *,
    };

    fn patched(target: &Value, patch: &Value) -> Value {
        let catalog = Catalog::default();
        let kind = catalog.find("", "v1", "services").unwrap();
        let mut target = target.clone();
        strategic(&mut target, patch, &kind.schema, definitions());
        target
    }

    fn service() -> Value {
        json!({
            "metadata": {"finalizers": ["a", "b"], "labels": {"l": "1"}},
            "spec": {"type": "NodePort", "ports": [{"port": 80, "name": "web"}, {"port": 81}]},
        })
    }

    #[test]
    fn lists_with_keys_merge_by_item() {
        let patch = json!({"spec": {"ports": [
            {"port": 81, "name": "more"}, {"port": 80, "$patch": "delete"}, {"port": 82},
        ]}});
        assert_eq!(
            patched(&service(), &patch)["spec"]["ports"],
            json!([{"port": 81, "name": "more"}, {"port": 82}])
        );
    }

    #[test]
    fn directives_are_followed() {
        let patch = json!({
            "metadata": {"$deleteFromPrimitiveList/finalizers": ["a"], "labels": {"l": null}},
            "spec": {
                "$setElementOrder/ports": [{"port": 81}, {"port": 80}],
                "$retainKeys": ["ports"], "ports": [{"port": 81}],
            },
        });
        assert_eq!(
            patched(&service(), &patch),
            json!({
                "metadata": {"finalizers": ["b"], "labels": {}},
                "spec": {"ports": [{"port": 81}, {"port": 80, "name": "web"}]},
            })
        );
        let patch = json!({"spec": {"$patch": "replace", "type": "ClusterIP"}});
        assert_eq!(
            patched(&service(), &patch)["spec"],
            json!({"type": "ClusterIP"})
        );
    }

    #[test]
    fn a_json_patch_that_does_not_apply_is_refused() {
        let mut value = json!({"a": 1});
        let patch = json!([{"op": "test", "path": "/a", "value": 2}]);
        assert!(
            json(&mut value, &patch)
                .unwrap_err()
                .to_string()
                .starts_with("422")
        );
        assert!(
            json(&mut value, &json!({}))
                .unwrap_err()
                .to_string()
                .starts_with("400")
        );
        json(
            &mut value,
            &json!([{"op": "add", "path": "/b", "value": 2}]),
        )
        .unwrap();
        assert_eq!(value, json!({"a": 1, "b": 2}));
    }
}
