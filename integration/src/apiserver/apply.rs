//! Who owns which field, and server-side apply.

use serde_json::{Value, json};

use super::{
    fields::{Fields, Typed},
    object,
};

/// Who writes, and by which door.
#[derive(Debug, Clone)]
pub(crate) struct Writer {
    pub(crate) manager: String,
    /// `apiVersion` of what was written.
    pub(crate) version: String,
    /// `status`, or nothing.
    pub(crate) subresource: String,
    /// RFC 3339.
    pub(crate) now: String,
}

/// `(manager, field)` for each field that another manager owns.
pub(crate) type Conflicts = Vec<(String, String)>;

/// One of `metadata.managedFields`.
#[derive(Debug, Clone)]
struct Entry {
    manager: String,
    applies: bool,
    version: String,
    subresource: String,
    time: String,
    fields: Fields,
}

impl Entry {
    fn decode(raw: &Value) -> Self {
        let text = |key: &str| object::text(raw, &[key]).unwrap_or_default().to_owned();
        Self {
            manager: text("manager"),
            applies: text("operation") == "Apply",
            version: text("apiVersion"),
            subresource: text("subresource"),
            time: text("time"),
            fields: Fields::decode(raw.get("fieldsV1").unwrap_or(&Value::Null)),
        }
    }

    fn encode(&self) -> Value {
        let operation = if self.applies { "Apply" } else { "Update" };
        let mut raw = json!({
            "manager": self.manager,
            "operation": operation,
            "apiVersion": self.version,
            "fieldsType": "FieldsV1",
            "fieldsV1": self.fields.encode(),
        });
        for (key, value) in [("time", &self.time), ("subresource", &self.subresource)] {
            if !value.is_empty() {
                object::set(&mut raw, &[key], value.as_str());
            }
        }
        raw
    }

    fn is(&self, writer: &Writer, applies: bool) -> bool {
        self.manager == writer.manager
            && self.applies == applies
            && self.subresource == writer.subresource
            && (applies || self.version == writer.version)
    }

    /// As conflicts name it.
    fn shown(&self) -> String {
        let mut shown = format!("{:?}", self.manager);
        if !self.subresource.is_empty() {
            shown = format!("{shown} with subresource {:?}", self.subresource);
        }
        if !self.applies {
            shown = format!("{shown} using {} at {}", self.version, self.time);
        }
        shown
    }
}

fn entries(value: &Value) -> Vec<Entry> {
    let raw = object::list(value, &["metadata", "managedFields"]);
    raw.iter().map(Entry::decode).collect()
}

fn put_entries(value: &mut Value, entries: &[Entry]) {
    let raw: Vec<_> = entries
        .iter()
        .filter(|entry| !entry.fields.is_empty())
        .map(Entry::encode)
        .collect();
    if raw.is_empty() {
        object::remove(value, &["metadata", "managedFields"]);
    } else {
        object::set(value, &["metadata", "managedFields"], raw);
    }
}

/// Nobody owns these.
const SERVERS_OWN: &[&str] = &[
    "f:name",
    "f:namespace",
    "f:creationTimestamp",
    "f:selfLink",
    "f:uid",
    "f:generation",
    "f:managedFields",
    "f:resourceVersion",
];

/// What a writer by this door can own: not the server's fields, and not the other door's.
fn strip(fields: &mut Fields, subresource: &str, has_status: bool) {
    if subresource == "status" {
        fields.keep_only("f:status");
    } else if has_status {
        fields.drop_path(&["f:status"], true);
    }
    fields.drop_path(&["f:apiVersion"], true);
    fields.drop_path(&["f:kind"], true);
    for name in SERVERS_OWN {
        fields.drop_path(&["f:metadata", name], true);
    }
    for root in ["f:metadata", "f:spec", "f:status"] {
        fields.drop_path(&[root], false);
    }
}

fn without_managers(value: &Value) -> Value {
    let mut value = value.clone();
    object::remove(&mut value, &["metadata", "managedFields"]);
    value
}

/// Writes down in `new` that `writer` made it of `live` (an empty object for a creation) by an
/// update: it owns what it changed.
pub(crate) fn track_update(
    live: &Value,
    new: &mut Value,
    writer: &Writer,
    typed: Typed<'_>,
    has_status: bool,
) {
    // A client may write the list itself, above all to empty it.
    let given = object::at(new, &["metadata", "managedFields"]).is_some();
    let mut managers = entries(if given { new } else { live });
    let (mut changed, mut removed) = typed.compare(&without_managers(live), &without_managers(new));
    strip(&mut changed, &writer.subresource, has_status);
    strip(&mut removed, &writer.subresource, has_status);
    if !managers.iter().any(|entry| entry.is(writer, false)) && !changed.is_empty() {
        managers.push(Entry {
            manager: writer.manager.clone(),
            applies: false,
            version: writer.version.clone(),
            subresource: writer.subresource.clone(),
            time: writer.now.clone(),
            fields: Fields::default(),
        });
    }
    for entry in &mut managers {
        let own = entry.is(writer, false);
        entry.fields = if own {
            entry.fields.difference(&removed).union(&changed)
        } else {
            entry.fields.difference(&removed).difference(&changed)
        };
        if own && !(changed.is_empty() && removed.is_empty()) {
            entry.time.clone_from(&writer.now);
        }
    }
    put_entries(new, &managers);
}

/// `config` applied over `live` (an empty object if there is none).
///
/// # Errors
///
/// What others own and `config` would change, unless `force`.
pub(crate) fn apply(
    live: &Value,
    config: &Value,
    writer: &Writer,
    force: bool,
    typed: Typed<'_>,
    has_status: bool,
) -> Result<Value, Conflicts> {
    let mut managers = entries(live);
    let live = without_managers(live);
    let mut applied = typed.fields(config);
    strip(&mut applied, &writer.subresource, has_status);
    let at = managers.iter().position(|entry| entry.is(writer, true));
    let before = at.map(|at| managers.remove(at));

    let mut merged = typed.merge(&live, config);
    let managed = managers
        .iter()
        .fold(applied.clone(), |all, entry| all.union(&entry.fields));
    if let Some(before) = &before {
        let unowned = before
            .fields
            .with_parents()
            .difference(&managed.with_parents());
        typed.remove(&mut merged, &unowned);
    }

    let (mut changed, mut removed) = typed.compare(&live, &merged);
    strip(&mut changed, &writer.subresource, has_status);
    strip(&mut removed, &writer.subresource, has_status);
    let mut conflicts = Conflicts::new();
    for entry in &mut managers {
        let contested = entry.fields.intersection(&changed);
        let paths = contested.paths().into_iter();
        conflicts.extend(paths.map(|path| (entry.shown(), path)));
        entry.fields = entry.fields.difference(&contested).difference(&removed);
    }
    if !force && !conflicts.is_empty() {
        return Err(conflicts);
    }

    let same = changed.is_empty() && removed.is_empty();
    let time = match before {
        Some(before) if same && before.fields == applied && before.version == writer.version => {
            before.time
        }
        _ => writer.now.clone(),
    };
    let entry = Entry {
        manager: writer.manager.clone(),
        applies: true,
        version: writer.version.clone(),
        subresource: writer.subresource.clone(),
        time,
        fields: applied,
    };
    managers.insert(at.unwrap_or(0).min(managers.len()), entry);
    put_entries(&mut merged, &managers);
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use super::{
        super::schema::{Definitions, Schema},
        *,
    };

    fn schema() -> Schema {
        Schema::parse(&json!({"type": "object", "properties": {
            "metadata": {"type": "object", "properties": {
                "name": {"type": "string"},
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                "managedFields": {"type": "array", "items": {"type": "object"}},
            }},
            "spec": {"type": "object", "properties": {
                "a": {"type": "integer"}, "b": {"type": "integer"},
                "deep": {"type": "object", "properties": {"c": {"type": "integer"}}},
            }},
            "status": {"type": "object", "properties": {"s": {"type": "integer"}}},
        }}))
        .unwrap()
    }

    fn writer(manager: &str) -> Writer {
        Writer {
            manager: manager.to_owned(),
            version: "x/v1".to_owned(),
            subresource: String::new(),
            now: "2026-01-01T00:00:00Z".to_owned(),
        }
    }

    fn applied(live: &Value, config: &Value, by: &str, force: bool) -> Result<Value, Conflicts> {
        let definitions = Definitions::new();
        let schema = schema();
        let typed = Typed::new(&schema, &definitions);
        apply(live, config, &writer(by), force, typed, true)
    }

    fn updated(live: &Value, mut new: Value, by: &str) -> Value {
        let definitions = Definitions::new();
        let schema = schema();
        let typed = Typed::new(&schema, &definitions);
        track_update(live, &mut new, &writer(by), typed, true);
        new
    }

    fn owners(value: &Value) -> Vec<(String, Vec<String>)> {
        entries(value)
            .into_iter()
            .map(|entry| (entry.manager, entry.fields.paths()))
            .collect()
    }

    #[test]
    fn two_appliers_share_an_object_by_fields() {
        let one = applied(&json!({}), &json!({"spec": {"a": 1}}), "one", false).unwrap();
        let two = applied(&one, &json!({"spec": {"b": 2}}), "two", false).unwrap();
        assert_eq!(two["spec"], json!({"a": 1, "b": 2}));
        assert_eq!(owners(&two).len(), 2);
        // What both say alike, both own.
        let same = applied(&two, &json!({"spec": {"a": 1, "b": 2}}), "two", false).unwrap();
        let gone = applied(&same, &json!({"spec": {}}), "one", false).unwrap();
        assert_eq!(gone["spec"], json!({"a": 1, "b": 2}));
    }

    #[test]
    fn a_field_of_another_conflicts_unless_forced() {
        let one = applied(&json!({}), &json!({"spec": {"a": 1}}), "one", false).unwrap();
        let said = applied(&one, &json!({"spec": {"a": 2}}), "two", false).unwrap_err();
        assert_eq!(said, [("\"one\"".to_owned(), ".spec.a".to_owned())]);
        let forced = applied(&one, &json!({"spec": {"a": 2}}), "two", true).unwrap();
        assert_eq!(
            owners(&forced),
            [("two".to_owned(), vec![".spec.a".to_owned()])]
        );
    }

    #[test]
    fn what_is_no_longer_applied_goes() {
        let one = applied(
            &json!({}),
            &json!({"spec": {"a": 1, "deep": {"c": 1}}}),
            "one",
            false,
        );
        let live = one.unwrap();
        let less = applied(&live, &json!({"spec": {"a": 1}}), "one", false).unwrap();
        assert_eq!(less["spec"], json!({"a": 1}));
    }

    #[test]
    fn an_update_owns_what_it_changes() {
        let live = applied(&json!({}), &json!({"spec": {"a": 1, "b": 1}}), "one", false).unwrap();
        let mut new = live.clone();
        object::remove(&mut new, &["metadata"]);
        object::set(&mut new, &["spec", "a"], 2);
        let new = updated(&live, new, "kubectl");
        assert_eq!(
            owners(&new),
            [
                ("one".to_owned(), vec![".spec.b".to_owned()]),
                ("kubectl".to_owned(), vec![".spec.a".to_owned()]),
            ]
        );
        let said = applied(&new, &json!({"spec": {"a": 1, "b": 1}}), "one", false).unwrap_err();
        assert!(
            said[0].0.starts_with("\"kubectl\" using x/v1 at "),
            "{said:?}"
        );
    }

    #[test]
    fn applying_the_same_again_changes_nothing() {
        let config = json!({"metadata": {"name": "n", "labels": {"l": "1"}}, "spec": {"a": 1}});
        let live = applied(&json!({}), &config, "one", false).unwrap();
        assert_eq!(applied(&live, &config, "one", false).unwrap(), live);
        assert_eq!(
            owners(&live),
            [(
                "one".to_owned(),
                vec![".metadata.labels.l".to_owned(), ".spec.a".to_owned()]
            )]
        );
    }

    #[test]
    fn status_has_its_own_door() {
        let definitions = Definitions::new();
        let schema = schema();
        let typed = Typed::new(&schema, &definitions);
        let config = json!({"spec": {"a": 1}, "status": {"s": 1}});
        let mut door = writer("one");
        door.subresource = "status".to_owned();
        let live = apply(&json!({}), &config, &door, false, typed, true).unwrap();
        assert_eq!(
            owners(&live),
            [("one".to_owned(), vec![".status.s".to_owned()])]
        );
    }
}
