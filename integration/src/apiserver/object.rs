//! Reading and writing places in JSON objects.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// What is at `path`, if every step of it is an object with that key.
pub(crate) fn at<'a>(value: &'a Value, path: &[&str]) -> Option<&'a Value> {
    path.iter().try_fold(value, |value, step| value.get(*step))
}

/// The text at `path`.
pub(crate) fn text<'a>(value: &'a Value, path: &[&str]) -> Option<&'a str> {
    at(value, path)?.as_str()
}

/// The elements of the list at `path`; none if there is no list.
pub(crate) fn list<'a>(value: &'a Value, path: &[&str]) -> &'a [Value] {
    at(value, path)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

/// The texts of the list at `path`.
pub(crate) fn texts<'a>(value: &'a Value, path: &[&str]) -> Vec<&'a str> {
    list(value, path).iter().filter_map(Value::as_str).collect()
}

/// The members of the object at `path`.
pub(crate) fn members<'a>(
    value: &'a Value,
    path: &[&str],
) -> impl Iterator<Item = (&'a String, &'a Value)> {
    at(value, path)
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
}

/// Puts `new` at `path`; what is on the way and no object becomes one.
pub(crate) fn set(value: &mut Value, path: &[&str], new: impl Into<Value>) {
    let Some((first, rest)) = path.split_first() else {
        *value = new.into();
        return;
    };
    let child = object(value)
        .entry((*first).to_owned())
        .or_insert(Value::Null);
    set(child, rest, new);
}

/// Puts `new` at `path` if nothing (or null) is there.
pub(crate) fn set_default(value: &mut Value, path: &[&str], new: impl Into<Value>) {
    if at(value, path).is_none_or(Value::is_null) {
        set(value, path, new);
    }
}

/// Takes away what is at `path`, and gives it.
pub(crate) fn remove(value: &mut Value, path: &[&str]) -> Option<Value> {
    let (last, way) = path.split_last()?;
    let mut at = value;
    for step in way {
        at = at.get_mut(*step)?;
    }
    at.as_object_mut()?.remove(*last)
}

/// `value` as an object; it becomes one if it is none.
pub(crate) fn object(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(map) => map,
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            unreachable!("made an object above")
        }
    }
}

/// `metadata.name`, or nothing.
pub(crate) fn name(value: &Value) -> &str {
    text(value, &["metadata", "name"]).unwrap_or_default()
}

/// `metadata.namespace`, or nothing.
pub(crate) fn namespace(value: &Value) -> &str {
    text(value, &["metadata", "namespace"]).unwrap_or_default()
}

/// `metadata.uid`, or nothing.
pub(crate) fn uid(value: &Value) -> &str {
    text(value, &["metadata", "uid"]).unwrap_or_default()
}

/// `metadata.labels`.
pub(crate) fn labels(value: &Value) -> BTreeMap<String, String> {
    members(value, &["metadata", "labels"])
        .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
        .collect()
}

/// Takes away members that are null, at every depth: built-in kinds read them as absent.
pub(crate) fn strip_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, member| !member.is_null());
            map.values_mut().for_each(strip_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(strip_nulls),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn places_are_made_read_and_taken_away() {
        let mut value = json!({"a": 1});
        set(&mut value, &["b", "c"], "d");
        assert_eq!(text(&value, &["b", "c"]), Some("d"));
        set_default(&mut value, &["b", "c"], "e");
        assert_eq!(remove(&mut value, &["b", "c"]), Some(json!("d")));
        assert_eq!(value, json!({"a": 1, "b": {}}));
        assert_eq!(remove(&mut value, &["x", "y"]), None);
    }

    #[test]
    fn nulls_go_at_every_depth_but_not_from_lists() {
        let mut value = json!({"a": null, "b": [{"c": null}, null]});
        strip_nulls(&mut value);
        assert_eq!(value, json!({"b": [{}, null]}));
    }
}
