//! Sets of fields, and what two objects differ in: the ground of server-side apply.
//!
//! A set is a tree whose steps are written as `managedFields` writes them: `f:name` for a member,
//! `k:{"name":"a"}` for an item of a list with keys, `v:"a"` for an item of a list that is a set.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::schema::{Definitions, ListType, Schema};

/// A set of fields.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Fields {
    /// The field itself is in the set, not only some below it.
    member: bool,
    children: BTreeMap<String, Self>,
}

impl Fields {
    pub(crate) fn is_empty(&self) -> bool {
        !self.member && self.children.values().all(Self::is_empty)
    }

    /// Reads `fieldsV1`.
    pub(crate) fn decode(raw: &Value) -> Self {
        let mut fields = Self::default();
        for (key, value) in raw.as_object().into_iter().flatten() {
            if key == "." {
                fields.member = true;
            } else {
                let mut child = Self::decode(value);
                child.member |= child.children.is_empty();
                fields.children.insert(key.clone(), child);
            }
        }
        fields
    }

    /// Writes `fieldsV1`.
    pub(crate) fn encode(&self) -> Value {
        let mut map = Map::new();
        for (key, child) in self.children.iter().filter(|(_, child)| !child.is_empty()) {
            let mut value = child.encode();
            if child.member
                && let Some(map) = value.as_object_mut()
                && !map.is_empty()
            {
                map.insert(".".to_owned(), Value::Object(Map::new()));
            }
            map.insert(key.clone(), value);
        }
        Value::Object(map)
    }

    pub(crate) fn union(&self, other: &Self) -> Self {
        let mut all = self.clone();
        all.member |= other.member;
        for (key, child) in &other.children {
            let mine = all.children.entry(key.clone()).or_default();
            *mine = mine.union(child);
        }
        all
    }

    pub(crate) fn difference(&self, other: &Self) -> Self {
        let children = self.children.iter().map(|(key, child)| {
            let left = match other.children.get(key) {
                Some(other) => child.difference(other),
                None => child.clone(),
            };
            (key.clone(), left)
        });
        Self {
            member: self.member && !other.member,
            children: children.filter(|(_, child)| !child.is_empty()).collect(),
        }
    }

    pub(crate) fn intersection(&self, other: &Self) -> Self {
        let children = self.children.iter().filter_map(|(key, child)| {
            let both = child.intersection(other.children.get(key)?);
            (!both.is_empty()).then(|| (key.clone(), both))
        });
        Self {
            member: self.member && other.member,
            children: children.collect(),
        }
    }

    /// With every named field that has something below it.
    pub(crate) fn with_parents(&self) -> Self {
        let children = self.children.iter().map(|(key, child)| {
            let mut child = child.with_parents();
            child.member |= key.starts_with("f:") && !child.children.is_empty();
            (key.clone(), child)
        });
        Self {
            member: self.member,
            children: children.collect(),
        }
    }

    /// Takes a field and all below it out of the set; with `below` empty, only the field itself.
    pub(crate) fn drop_path(&mut self, path: &[&str], with_below: bool) {
        let Some((first, rest)) = path.split_first() else {
            self.member = false;
            return;
        };
        if rest.is_empty() && with_below {
            self.children.remove(*first);
        } else if let Some(child) = self.children.get_mut(*first) {
            child.drop_path(rest, with_below);
        }
    }

    /// Keeps only what is below one step.
    pub(crate) fn keep_only(&mut self, step: &str) {
        self.children.retain(|key, _| key == step);
    }

    /// Every field of the set as a path that people read: `.spec.ports[port=80].name`.
    pub(crate) fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        self.paths_at("", &mut paths);
        paths
    }

    fn paths_at(&self, path: &str, paths: &mut Vec<String>) {
        if self.member {
            paths.push(path.to_owned());
        }
        for (key, child) in &self.children {
            child.paths_at(&format!("{path}{}", shown(key)), paths);
        }
    }

    fn insert(&mut self, step: String) -> &mut Self {
        self.children.entry(step).or_default()
    }
}

fn shown(step: &str) -> String {
    if let Some(name) = step.strip_prefix("f:") {
        return format!(".{name}");
    }
    if let Some(keys) = step.strip_prefix("k:") {
        let keys: BTreeMap<String, Value> = serde_json::from_str(keys).unwrap_or_default();
        let keys: Vec<_> = keys
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        return format!("[{}]", keys.join(","));
    }
    format!("[={}]", step.strip_prefix("v:").unwrap_or(step))
}

/// How ownership sees a value.
enum Shape<'a> {
    /// Owned as a whole.
    Leaf,
    Map(&'a Map<String, Value>),
    List(&'a [Value], &'a ListType, Option<&'a Schema>),
}

/// A schema together with what it refers to; unknown parts have none.
#[derive(Clone, Copy)]
pub(crate) struct Typed<'a> {
    schema: Option<&'a Schema>,
    definitions: &'a Definitions,
}

impl<'a> Typed<'a> {
    pub(crate) fn new(schema: &'a Schema, definitions: &'a Definitions) -> Self {
        Self {
            schema: Some(schema.resolve(definitions)),
            definitions,
        }
    }

    fn with(self, schema: Option<&'a Schema>) -> Self {
        let definitions = self.definitions;
        Self {
            schema: schema.map(|schema| schema.resolve(definitions)),
            definitions,
        }
    }

    fn member(self, name: &str) -> Self {
        self.with(self.schema.and_then(|schema| schema.member(name)))
    }

    /// Whether `name` is declared, rather than a key of a map.
    fn declares(self, name: &str) -> bool {
        self.schema
            .is_some_and(|schema| schema.properties.contains_key(name))
    }

    fn shape<'b>(self, value: &'b Value) -> Shape<'b>
    where
        'a: 'b,
    {
        match value {
            Value::Object(map) if !self.schema.is_some_and(|schema| schema.atomic) => {
                Shape::Map(map)
            }
            Value::Array(items) => match self.schema {
                Some(schema) if schema.list != ListType::Atomic => {
                    Shape::List(items, &schema.list, schema.items.as_deref())
                }
                _ => Shape::Leaf,
            },
            Value::Object(_)
            | Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::String(_) => Shape::Leaf,
        }
    }

    /// An item's step.
    fn step(self, list: &ListType, items: Option<&Schema>, item: &Value) -> String {
        match list {
            ListType::Atomic | ListType::Set => format!("v:{item}"),
            ListType::Map(keys) => {
                let items = items.map(|schema| schema.resolve(self.definitions));
                let keys: BTreeMap<&str, &Value> = keys
                    .iter()
                    .filter_map(|key| {
                        let default = || items?.properties.get(key)?.default.as_ref();
                        Some((key.as_str(), item.get(key).or_else(default)?))
                    })
                    .collect();
                format!("k:{}", serde_json::to_string(&keys).unwrap_or_default())
            }
        }
    }

    /// Everything that `value` says.
    pub(crate) fn fields(self, value: &Value) -> Fields {
        let mut fields = Fields::default();
        self.collect(value, &mut fields);
        fields
    }

    fn collect(self, value: &Value, into: &mut Fields) {
        match self.shape(value) {
            Shape::Leaf => into.member = true,
            Shape::Map(map) => {
                for (name, value) in map {
                    let child = into.insert(format!("f:{name}"));
                    self.member(name).collect(value, child);
                    let empty = value.as_object().is_some_and(Map::is_empty);
                    child.member |= value.is_null() || empty || !self.declares(name);
                }
            }
            Shape::List(list, of, schema) => {
                for item in list {
                    let child = into.insert(self.step(of, schema, item));
                    self.with(schema).collect(item, child);
                    child.member = true;
                }
            }
        }
    }

    /// What `new` changes or adds, and what it takes away.
    pub(crate) fn compare(self, old: &Value, new: &Value) -> (Fields, Fields) {
        let (mut changed, mut removed) = <(Fields, Fields)>::default();
        self.compare_at(Some(old), Some(new), &mut changed, &mut removed);
        (changed, removed)
    }

    fn compare_at(
        self,
        old: Option<&Value>,
        new: Option<&Value>,
        changed: &mut Fields,
        removed: &mut Fields,
    ) {
        let shapes = (
            old.map(|value| self.shape(value)),
            new.map(|value| self.shape(value)),
        );
        let mut child = |step: String, typed: Self, old: Option<&Value>, new: Option<&Value>| {
            let (below, gone) = (changed.insert(step.clone()), removed.insert(step));
            typed.compare_at(old, new, below, gone);
        };
        match shapes {
            (None, None) => return,
            (None | Some(Shape::Map(_)), None | Some(Shape::Map(_))) => {
                let map = |value: Option<&'_ Value>| {
                    value
                        .and_then(Value::as_object)
                        .cloned()
                        .unwrap_or_default()
                };
                let (old, new) = (map(old), map(new));
                for name in old
                    .keys()
                    .chain(new.keys().filter(|key| !old.contains_key(*key)))
                {
                    let step = format!("f:{name}");
                    child(step, self.member(name), old.get(name), new.get(name));
                }
            }
            (None | Some(Shape::List(..)), None | Some(Shape::List(..))) => {
                let (before, after) = (self.by_step(old), self.by_step(new));
                let items = self.with(self.schema.and_then(|schema| schema.items.as_deref()));
                let steps = before.iter().chain(
                    after
                        .iter()
                        .filter(|(step, _)| find(&before, step).is_none()),
                );
                for (step, _) in steps {
                    child(step.clone(), items, find(&before, step), find(&after, step));
                }
            }
            _ => {
                if old.is_some() && new.is_some() && old != new {
                    changed.member = true;
                }
            }
        }
        changed.member |= old.is_none();
        removed.member |= new.is_none();
    }

    fn by_step(self, value: Option<&Value>) -> Vec<(String, &Value)> {
        let Some((Shape::List(items, list, schema), value)) =
            value.map(|value| (self.shape(value), value))
        else {
            return Vec::new();
        };
        debug_assert!(value.is_array());
        let steps: Vec<_> = items
            .iter()
            .map(|item| self.step(list, schema, item))
            .collect();
        let items = value.as_array().into_iter().flatten();
        steps.into_iter().zip(items).collect()
    }

    /// `applied` over `live`.
    pub(crate) fn merge(self, live: &Value, applied: &Value) -> Value {
        match (self.shape(live), self.shape(applied)) {
            (Shape::Map(live), Shape::Map(applied)) => {
                let mut merged = live.clone();
                for (name, value) in applied {
                    let value = match live.get(name) {
                        Some(live) => self.member(name).merge(live, value),
                        None => value.clone(),
                    };
                    merged.insert(name.clone(), value);
                }
                Value::Object(merged)
            }
            (Shape::List(_, _, schema), Shape::List(..)) => {
                let (before, after) = (self.by_step(Some(live)), self.by_step(Some(applied)));
                let kept = before.iter().map(|(step, live)| match find(&after, step) {
                    Some(applied) => self.with(schema).merge(live, applied),
                    None => (*live).clone(),
                });
                let new = after
                    .iter()
                    .filter(|(step, _)| find(&before, step).is_none());
                kept.chain(new.map(|(_, item)| (*item).clone())).collect()
            }
            _ => applied.clone(),
        }
    }

    /// Takes fields out of `value`.
    pub(crate) fn remove(self, value: &mut Value, fields: &Fields) {
        let kept: Option<Vec<Value>> = match self.shape(value) {
            Shape::Leaf => return,
            Shape::Map(_) => None,
            Shape::List(_, _, schema) => {
                let items = self.by_step(Some(value)).into_iter();
                let kept = items.filter_map(|(step, item)| {
                    let mut item = item.clone();
                    match fields.children.get(&step) {
                        Some(child) if child.member => return None,
                        Some(child) => self.with(schema).remove(&mut item, child),
                        None => {}
                    }
                    Some(item)
                });
                Some(kept.collect())
            }
        };
        if let Some(kept) = kept {
            *value = Value::Array(kept);
            return;
        }
        if let Some(map) = value.as_object_mut() {
            map.retain(
                |name, value| match fields.children.get(&format!("f:{name}")) {
                    Some(child) if child.member => false,
                    Some(child) => {
                        self.member(name).remove(value, child);
                        true
                    }
                    None => true,
                },
            );
        }
    }
}

fn find<'a>(items: &[(String, &'a Value)], step: &str) -> Option<&'a Value> {
    items
        .iter()
        .find(|(one, _)| one == step)
        .map(|(_, item)| *item)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn schema() -> Schema {
        Schema::parse(&json!({"type": "object", "properties": {"spec": {
            "type": "object",
            "properties": {
                "replicas": {"type": "integer"},
                "args": {"type": "array", "items": {"type": "string"}},
                "tags": {"type": "object", "additionalProperties": {"type": "string"}},
                "names": {
                    "type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"},
                },
                "ports": {
                    "type": "array", "x-kubernetes-list-type": "map",
                    "x-kubernetes-list-map-keys": ["port", "protocol"],
                    "items": {"type": "object", "properties": {
                        "port": {"type": "integer"},
                        "protocol": {"type": "string", "default": "TCP"},
                        "name": {"type": "string"},
                    }},
                },
            },
        }}}))
        .unwrap()
    }

    fn object() -> Value {
        json!({"spec": {
            "replicas": 1, "args": ["a"], "tags": {"x": "1"}, "names": ["n"],
            "ports": [{"port": 80, "name": "web"}],
        }})
    }

    #[test]
    fn an_objects_fields_are_written_as_managed_fields() {
        let (schema, definitions) = (schema(), Definitions::new());
        let typed = Typed::new(&schema, &definitions);
        let fields = typed.fields(&object());
        let expected = json!({"f:spec": {
            "f:replicas": {}, "f:args": {}, "f:tags": {"f:x": {}}, "f:names": {"v:\"n\"": {}},
            "f:ports": {"k:{\"port\":80,\"protocol\":\"TCP\"}": {
                ".": {}, "f:port": {}, "f:name": {},
            }},
        }});
        assert_eq!(fields.encode(), expected);
        assert_eq!(Fields::decode(&expected), fields);
        let paths = fields.paths();
        assert!(
            paths.contains(&".spec.ports[port=80,protocol=\"TCP\"].name".to_owned()),
            "{paths:?}"
        );
    }

    #[test]
    fn what_changed_and_what_went_is_found() {
        let (schema, definitions) = (schema(), Definitions::new());
        let typed = Typed::new(&schema, &definitions);
        let new = json!({"spec": {
            "replicas": 2, "args": ["a"], "tags": {"y": "1"}, "names": ["n", "m"],
            "ports": [{"port": 80, "protocol": "TCP", "name": "www"}],
        }});
        let (changed, removed) = typed.compare(&object(), &new);
        assert_eq!(
            changed.encode(),
            json!({"f:spec": {
                "f:replicas": {}, "f:tags": {"f:y": {}}, "f:names": {"v:\"m\"": {}},
                "f:ports": {"k:{\"port\":80,\"protocol\":\"TCP\"}": {
                    "f:name": {}, "f:protocol": {},
                }},
            }})
        );
        assert_eq!(removed.encode(), json!({"f:spec": {"f:tags": {"f:x": {}}}}));
    }

    #[test]
    fn lists_with_keys_merge_by_item() {
        let (schema, definitions) = (schema(), Definitions::new());
        let typed = Typed::new(&schema, &definitions);
        let applied = json!({"spec": {
            "args": ["b"], "names": ["m"],
            "ports": [{"port": 81}, {"port": 80, "protocol": "TCP", "name": "www"}],
        }});
        let merged = typed.merge(&object(), &applied);
        assert_eq!(
            merged,
            json!({"spec": {
                "replicas": 1, "args": ["b"], "tags": {"x": "1"}, "names": ["n", "m"],
                "ports": [{"port": 80, "protocol": "TCP", "name": "www"}, {"port": 81}],
            }})
        );
    }

    #[test]
    fn fields_are_taken_out() {
        let (schema, definitions) = (schema(), Definitions::new());
        let typed = Typed::new(&schema, &definitions);
        let mut value = object();
        let fields = Fields::decode(&json!({"f:spec": {
            "f:args": {}, "f:names": {"v:\"n\"": {}}, "f:tags": {"f:x": {}},
            "f:ports": {"k:{\"port\":80,\"protocol\":\"TCP\"}": {"f:name": {}}},
        }}));
        typed.remove(&mut value, &fields);
        assert_eq!(
            value,
            json!({"spec": {"replicas": 1, "tags": {}, "names": [], "ports": [{"port": 80}]}})
        );
    }
}
