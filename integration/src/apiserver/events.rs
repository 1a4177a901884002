//! Events have two faces, `v1` and `events.k8s.io/v1`; they are kept as the second.

use serde_json::Value;

use super::{kinds::Kind, object};

/// The name in `v1`, and in `events.k8s.io/v1`.
const NAMES: &[(&str, &str)] = &[
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("reportingComponent", "reportingController"),
];

/// An object as it is kept.
pub(crate) fn stored(kind: &Kind, mut value: Value) -> Value {
    if kind.kind == "Event" && kind.group.is_empty() {
        for (core, other) in NAMES {
            rename(&mut value, core, other);
        }
        object::set(&mut value, &["apiVersion"], "events.k8s.io/v1");
    }
    value
}

/// A kept object as `kind` shows it.
pub(crate) fn shown(kind: &Kind, mut value: Value) -> Value {
    if kind.kind == "Event" && kind.group.is_empty() {
        for (core, other) in NAMES {
            rename(&mut value, other, core);
        }
    }
    value
}

fn rename(value: &mut Value, from: &str, to: &str) {
    if let Some(member) = object::remove(value, &[from]) {
        object::set(value, &[to], member);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::kinds::Catalog, *};

    #[test]
    fn an_event_has_both_faces() {
        let catalog = Catalog::default();
        let core = catalog.find("", "v1", "events").unwrap();
        let event = json!({"apiVersion": "v1", "involvedObject": {"name": "n"}, "message": "m", "reason": "r"});
        let kept = stored(core, event.clone());
        assert_eq!(
            kept,
            json!({"apiVersion": "events.k8s.io/v1", "regarding": {"name": "n"}, "note": "m", "reason": "r"})
        );
        let mut back = shown(core, kept);
        object::set(&mut back, &["apiVersion"], "v1");
        assert_eq!(back, event);
    }
}
