//! `metadata`: what the server writes into it, and what it demands of the rest.

use jiff::Timestamp;
use ring::rand::{SecureRandom as _, SystemRandom};
use serde_json::Value;

use super::{
    error::{ApiError, ApiResult, Cause},
    kinds::Kind,
    names, object, selector,
};

/// RFC 3339 with whole seconds, as `creationTimestamp` is.
pub(crate) fn now() -> String {
    rfc3339(Timestamp::now().as_second())
}

/// A time in seconds since 1970 as RFC 3339.
pub(crate) fn rfc3339(seconds: i64) -> String {
    let time = Timestamp::from_second(seconds).unwrap_or_default();
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // Without randomness a test's names collide, which the test then says.
    SystemRandom::new().fill(&mut bytes).unwrap_or_default();
    bytes
}

/// A version 4 UUID.
pub(crate) fn new_uid() -> String {
    let number = u128::from_be_bytes(random::<16>());
    let number = number & !(0xf000 << 64) & !(0xc000 << 48) | (0x4000 << 64) | (0x8000 << 48);
    let hex = format!("{number:032x}");
    let parts =
        [0..8, 8..12, 12..16, 16..20, 20..32].map(|range| hex.get(range).unwrap_or_default());
    parts.join("-")
}

/// Five characters for `generateName`, which never spell a word.
pub(crate) fn suffix() -> String {
    const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    random::<5>()
        .iter()
        .filter_map(|byte| ALPHABET.get(usize::from(*byte) % ALPHABET.len()))
        .map(|byte| char::from(*byte))
        .collect()
}

/// Checks the object's namespace and name against the request's, and writes them if they are absent.
///
/// # Errors
///
/// 400 if they differ.
pub(crate) fn place(
    kind: &Kind,
    value: &mut Value,
    namespace: &str,
    name: Option<&str>,
) -> ApiResult<()> {
    let got = object::namespace(value).to_owned();
    if !kind.namespaced {
        object::remove(value, &["metadata", "namespace"]);
    } else if got.is_empty() {
        object::set(value, &["metadata", "namespace"], namespace);
    } else if got != namespace {
        return Err(ApiError::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    let Some(name) = name else {
        return Ok(());
    };
    let got = object::name(value);
    if got.is_empty() {
        object::set(value, &["metadata", "name"], name);
    } else if got != name {
        return Err(ApiError::bad_request(format!(
            "the name of the object ({got}) does not match the name on the URL ({name})"
        )));
    }
    Ok(())
}

/// What a new object gets.
pub(crate) fn begin(kind: &Kind, value: &mut Value, now: &str) {
    for key in [
        "resourceVersion",
        "selfLink",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
    ] {
        object::remove(value, &["metadata", key]);
    }
    object::set(value, &["metadata", "uid"], new_uid());
    object::set(value, &["metadata", "creationTimestamp"], now);
    if kind.counts_generation() {
        object::set(value, &["metadata", "generation"], 1);
    } else {
        object::remove(value, &["metadata", "generation"]);
    }
}

/// Empty maps and lists are as good as none, here as in the real server's own types.
pub(crate) fn tidy(value: &mut Value) {
    for key in ["labels", "annotations", "finalizers", "ownerReferences"] {
        let empty = match object::at(value, &["metadata", key]) {
            Some(Value::Object(map)) => map.is_empty(),
            Some(Value::Array(list)) => list.is_empty(),
            Some(Value::Null) => true,
            Some(Value::Bool(_) | Value::Number(_) | Value::String(_)) | None => false,
        };
        if empty {
            object::remove(value, &["metadata", key]);
        }
    }
}

/// What no update changes.
pub(crate) fn keep(old: &Value, new: &mut Value) {
    for key in [
        "uid",
        "creationTimestamp",
        "generation",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generateName",
        "resourceVersion",
    ] {
        match object::at(old, &["metadata", key]) {
            Some(value) => object::set(new, &["metadata", key], value.clone()),
            None => drop(object::remove(new, &["metadata", key])),
        }
    }
}

/// One more generation if anything but metadata and status changed.
pub(crate) fn count_generation(kind: &Kind, old: &Value, new: &mut Value) {
    let body = |value: &Value| {
        let mut value = value.clone();
        object::remove(&mut value, &["metadata"]);
        if kind.has_status {
            object::remove(&mut value, &["status"]);
        }
        value
    };
    if kind.counts_generation() && body(old) != body(new) {
        let generation = object::at(old, &["metadata", "generation"]).and_then(Value::as_i64);
        object::set(
            new,
            &["metadata", "generation"],
            generation.unwrap_or(0) + 1,
        );
    }
}

/// All annotations together, in bytes.
const ANNOTATIONS_MAX: usize = 256 << 10;

/// What is wrong with `metadata`.
pub(crate) fn check(kind: &Kind, value: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let name = object::name(value);
    let (good, why) = match kind.kind.as_str() {
        "Namespace" => (names::is_label(name), "must be an RFC 1123 label"),
        "Service" => (
            names::is_rfc1035_label(name),
            "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with \
             an alphabetic character, and end with an alphanumeric character",
        ),
        _ if kind.group == "rbac.authorization.k8s.io" => (
            names::is_path_segment(name),
            "must not contain '/' or '%', and not be '.' or '..'",
        ),
        _ => (
            names::is_subdomain(name),
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' \
             or '.', and must start and end with an alphanumeric character",
        ),
    };
    if name.is_empty() {
        causes.push(Cause::required(
            "metadata.name",
            "name or generateName is required",
        ));
    } else if !good {
        causes.push(Cause::invalid("metadata.name", &name.into(), why));
    }
    for (key, label) in object::members(value, &["metadata", "labels"]) {
        if !selector::is_label_key(key) {
            let why = "must be a qualified name";
            causes.push(Cause::invalid("metadata.labels", &key.as_str().into(), why));
        }
        if !label.as_str().is_some_and(selector::is_label_value) {
            causes.push(Cause::invalid(
                "metadata.labels",
                label,
                "must be a label value",
            ));
        }
    }
    let mut bytes = 0;
    for (key, annotation) in object::members(value, &["metadata", "annotations"]) {
        bytes += key.len() + annotation.as_str().map_or(0, str::len);
        if !selector::is_label_key(&key.to_lowercase()) {
            let why = "must be a qualified name";
            causes.push(Cause::invalid(
                "metadata.annotations",
                &key.as_str().into(),
                why,
            ));
        }
    }
    if bytes > ANNOTATIONS_MAX {
        causes.push(Cause {
            field: "metadata.annotations".to_owned(),
            reason: "FieldValueTooLong",
            message: format!("Too long: may not be more than {ANNOTATIONS_MAX} bytes"),
        });
    }
    for (index, finalizer) in object::texts(value, &["metadata", "finalizers"])
        .into_iter()
        .enumerate()
    {
        let known = matches!(finalizer, "foregroundDeletion" | "orphan" | "kubernetes");
        let qualified = finalizer.contains('/') && selector::is_label_key(finalizer);
        if !known && !qualified {
            let field = format!("metadata.finalizers[{index}]");
            let why = "name is neither a standard finalizer name nor is it fully qualified";
            causes.push(Cause::invalid(field, &finalizer.into(), why));
        }
    }
    let owners = object::list(value, &["metadata", "ownerReferences"]);
    for (index, owner) in owners.iter().enumerate() {
        for key in ["apiVersion", "kind", "name", "uid"] {
            if object::text(owner, &[key]).is_none_or(str::is_empty) {
                let field = format!("metadata.ownerReferences[{index}].{key}");
                causes.push(Cause::invalid(field, &"".into(), "must not be empty"));
            }
        }
    }
    let controllers = owners
        .iter()
        .filter(|owner| owner.get("controller").and_then(Value::as_bool) == Some(true));
    if controllers.count() > 1 {
        let why = "only one reference can have Controller set to true";
        causes.push(Cause::invalid(
            "metadata.ownerReferences",
            &Value::Null,
            why,
        ));
    }
    causes
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::kinds::Catalog, *};

    #[test]
    fn uids_are_version_4() {
        let uid = new_uid();
        assert_eq!(uid.len(), 36);
        assert_eq!(uid.as_bytes()[14], b'4');
        assert!(b"89ab".contains(&uid.as_bytes()[19]), "{uid}");
        assert_ne!(uid, new_uid());
        assert_eq!(suffix().len(), 5);
    }

    #[test]
    fn wrong_metadata_is_named() {
        let catalog = Catalog::default();
        let kind = catalog.find("", "v1", "configmaps").unwrap();
        for (metadata, field) in [
            (json!({}), "metadata.name"),
            (json!({"name": "A"}), "metadata.name"),
            (
                json!({"name": "a", "labels": {"x y": "z"}}),
                "metadata.labels",
            ),
            (
                json!({"name": "a", "labels": {"x": "y z"}}),
                "metadata.labels",
            ),
            (
                json!({"name": "a", "annotations": {"/x": "y"}}),
                "metadata.annotations",
            ),
            (
                json!({"name": "a", "finalizers": ["mine"]}),
                "metadata.finalizers[0]",
            ),
            (
                json!({"name": "a", "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "p"}]}),
                "metadata.ownerReferences[0].uid",
            ),
        ] {
            let causes = check(kind, &json!({"metadata": metadata}));
            assert!(
                causes.len() == 1 && causes[0].field == field,
                "{metadata}: {causes:?}"
            );
        }
    }

    #[test]
    fn times_are_whole_seconds() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
    }
}
