//! How objects are shown: whole, as metadata alone, or as a table for people.

use std::sync::Arc;

use bytes::{BufMut as _, Bytes, BytesMut};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{
    kinds::{Column, Kind},
    object,
    registry::shown,
    store::Stored,
};

/// What the client wants to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum View {
    Whole,
    Metadata,
    Table,
}

impl View {
    /// By the `Accept` header: the first of what it names that is known; nothing if none is.
    pub(crate) fn of_accept(accept: &str) -> Option<Self> {
        if accept.trim().is_empty() {
            return Some(Self::Whole);
        }
        accept.split(',').find_map(|range| {
            let mut parts = range.split(';').map(str::trim);
            let media = parts.next()?;
            if !matches!(media, "application/json" | "*/*" | "application/*") {
                return None;
            }
            let wanted = parts.find_map(|part| part.strip_prefix("as="));
            match wanted {
                None => Some(Self::Whole),
                Some("Table") => Some(Self::Table),
                Some("PartialObjectMetadata" | "PartialObjectMetadataList") => Some(Self::Metadata),
                Some(_) => None,
            }
        })
    }
}

/// One object as JSON.
pub(crate) fn one(kind: &Kind, stored: &Arc<Stored>, view: View) -> Bytes {
    if view == View::Whole && as_kept(kind) {
        return stored.json.clone();
    }
    Bytes::from(show(kind, shown(kind, stored), view).to_string())
}

/// Whether what is kept is what is shown: other versions and the older face of events are not.
fn as_kept(kind: &Kind) -> bool {
    !kind.custom && kind.kind != "Event"
}

/// An object by a view.
pub(crate) fn show(kind: &Kind, value: Value, view: View) -> Value {
    match view {
        View::Whole => value,
        View::Metadata => metadata_only(&value),
        View::Table => {
            let version = object::text(&value, &["metadata", "resourceVersion"]);
            let metadata = json!({"resourceVersion": version});
            table(kind, &[value], metadata)
        }
    }
}

fn metadata_only(value: &Value) -> Value {
    json!({
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": value.get("metadata"),
    })
}

/// A list as JSON.
pub(crate) fn list(kind: &Kind, objects: &[Arc<Stored>], metadata: &Value, view: View) -> Bytes {
    let (list_kind, version) = match view {
        View::Table => {
            let values: Vec<_> = objects.iter().map(|stored| shown(kind, stored)).collect();
            return Bytes::from(table(kind, &values, metadata.clone()).to_string());
        }
        View::Metadata => (
            "PartialObjectMetadataList".to_owned(),
            "meta.k8s.io/v1".to_owned(),
        ),
        View::Whole => (kind.list_kind(), kind.api_version()),
    };
    let mut body = BytesMut::new();
    let head = json!({"kind": list_kind, "apiVersion": version, "metadata": metadata}).to_string();
    body.put_slice(head.strip_suffix('}').unwrap_or(&head).as_bytes());
    body.put_slice(b",\"items\":[");
    for (index, stored) in objects.iter().enumerate() {
        if index > 0 {
            body.put_u8(b',');
        }
        body.put_slice(&one(kind, stored, view));
    }
    body.put_slice(b"]}");
    body.freeze()
}

fn table(kind: &Kind, values: &[Value], metadata: Value) -> Value {
    let built_in;
    let columns = if kind.custom {
        &kind.columns
    } else {
        built_in = columns(kind);
        &built_in
    };
    let name = Column {
        name: "Name".to_owned(),
        kind: "string".to_owned(),
        format: "name".to_owned(),
        description: "Name must be unique within a namespace.".to_owned(),
        priority: 0,
        path: ".metadata.name".to_owned(),
    };
    let columns: Vec<_> = std::iter::once(&name).chain(columns).collect();
    let definitions: Vec<_> = columns
        .iter()
        .map(|column| {
            json!({
                "name": column.name, "type": column.kind, "format": column.format,
                "description": column.description, "priority": column.priority,
            })
        })
        .collect();
    let rows: Vec<_> = values
        .iter()
        .map(|value| {
            let cells: Vec<_> = columns.iter().map(|column| cell(column, value)).collect();
            json!({"cells": cells, "object": metadata_only(value)})
        })
        .collect();
    json!({
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
        "columnDefinitions": definitions, "rows": rows,
    })
}

fn cell(column: &Column, value: &Value) -> Value {
    let found = select(value, &column.path);
    match (column.kind.as_str(), found.as_slice()) {
        (_, []) => Value::Null,
        ("date", [first, ..]) => Value::from(age(first)),
        ("string", [Value::String(text)]) => Value::from(text.as_str()),
        ("string", many) => {
            let texts: Vec<_> = many.iter().map(|value| plain(value)).collect();
            Value::from(texts.join(","))
        }
        (_, [first, ..]) => (*first).clone(),
    }
}

fn plain(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

/// What a simple JSON path finds: members, `[0]`, `[*]`, and `[?(@.key=="value")]`.
pub(crate) fn select<'a>(value: &'a Value, path: &str) -> Vec<&'a Value> {
    let mut found = vec![value];
    let mut rest = path;
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix('.') {
            // A dot in a name is written with a backslash.
            let mut end = after.len();
            let mut escaped = false;
            for (at, c) in after.char_indices() {
                if !escaped && matches!(c, '.' | '[') {
                    end = at;
                    break;
                }
                escaped = c == '\\' && !escaped;
            }
            let (key, after) = after.split_at(end);
            let key = key.replace('\\', "");
            found = found
                .into_iter()
                .filter_map(|value| value.get(&key))
                .collect();
            rest = after;
        } else if let Some((inner, after)) =
            rest.strip_prefix('[').and_then(|rest| rest.split_once(']'))
        {
            let items = found.into_iter().filter_map(Value::as_array);
            found = items.flat_map(|items| index(items, inner)).collect();
            rest = after;
        } else {
            return Vec::new();
        }
    }
    found
}

fn index<'a>(items: &'a [Value], inner: &str) -> Vec<&'a Value> {
    if inner == "*" {
        return items.iter().collect();
    }
    if let Ok(at) = inner.parse::<usize>() {
        return items.get(at).into_iter().collect();
    }
    let condition = inner
        .strip_prefix("?(@.")
        .and_then(|inner| inner.strip_suffix(')'))
        .and_then(|inner| inner.split_once("=="));
    let Some((key, wanted)) = condition else {
        return Vec::new();
    };
    let wanted = wanted.trim().trim_matches(['"', '\'']);
    let matching = items
        .iter()
        .filter(|item| item.get(key.trim()).and_then(Value::as_str) == Some(wanted));
    matching.collect()
}

/// How long ago, as `kubectl get` says it.
fn age(time: &Value) -> String {
    let then = time
        .as_str()
        .and_then(|text| text.parse::<Timestamp>().ok());
    let Some(then) = then else {
        return "<unknown>".to_owned();
    };
    let seconds = Timestamp::now().as_second() - then.as_second();
    match seconds {
        ..=119 => format!("{}s", seconds.max(0)),
        120..=7_199 => format!("{}m", seconds / 60),
        7_200..=172_799 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

type Cells = &'static [(&'static str, &'static str, i64)];

/// Name, path and `-o wide` of what a built-in kind shows beside its name.
const COLUMNS: &[(&str, Cells)] = &[
    ("Namespace", &[("Status", ".status.phase", 0)]),
    (
        "Node",
        &[
            (
                "Status",
                ".status.conditions[?(@.type==\"Ready\")].reason",
                0,
            ),
            ("Version", ".status.nodeInfo.kubeletVersion", 0),
            (
                "Internal-IP",
                ".status.addresses[?(@.type==\"InternalIP\")].address",
                1,
            ),
        ],
    ),
    (
        "Pod",
        &[
            ("Status", ".status.phase", 0),
            ("IP", ".status.podIP", 1),
            ("Node", ".spec.nodeName", 1),
        ],
    ),
    (
        "Service",
        &[
            ("Type", ".spec.type", 0),
            ("Cluster-IP", ".spec.clusterIP", 0),
            ("External-IP", ".spec.externalIPs[*]", 0),
            ("Port(s)", ".spec.ports[*].port", 0),
        ],
    ),
    (
        "EndpointSlice",
        &[
            ("AddressType", ".addressType", 0),
            ("Ports", ".ports[*].port", 0),
            ("Endpoints", ".endpoints[*].addresses[0]", 0),
        ],
    ),
    (
        "DaemonSet",
        &[
            ("Desired", ".status.desiredNumberScheduled", 0),
            ("Ready", ".status.numberReady", 0),
        ],
    ),
    (
        "Deployment",
        &[
            ("Ready", ".status.readyReplicas", 0),
            ("Up-to-date", ".status.updatedReplicas", 0),
        ],
    ),
    ("StatefulSet", &[("Ready", ".status.readyReplicas", 0)]),
    ("Secret", &[("Type", ".type", 0)]),
    ("Lease", &[("Holder", ".spec.holderIdentity", 0)]),
    (
        "CustomResourceDefinition",
        &[("Created At", ".metadata.creationTimestamp", 0)],
    ),
    ("RoleBinding", &[("Role", ".roleRef.name", 0)]),
    ("ClusterRoleBinding", &[("Role", ".roleRef.name", 0)]),
    (
        "Event",
        &[
            ("Type", ".type", 0),
            ("Reason", ".reason", 0),
            ("Object", ".regarding.name", 0),
            ("Message", ".note", 0),
            ("Object", ".involvedObject.name", 0),
            ("Message", ".message", 0),
        ],
    ),
];

fn columns(kind: &Kind) -> Vec<Column> {
    let own = COLUMNS.iter().find(|(name, _)| *name == kind.kind);
    let core_event = |path: &str| matches!(path, ".involvedObject.name" | ".message");
    let new_event = |path: &str| matches!(path, ".regarding.name" | ".note");
    let columns = own.into_iter().flat_map(|(_, columns)| columns.iter());
    let columns = columns.filter(|(_, path, _)| {
        if kind.group.is_empty() {
            !new_event(path)
        } else {
            !core_event(path)
        }
    });
    let column = |name: &str, path: &str, priority: i64| Column {
        name: name.to_owned(),
        kind: if name == "Age" { "date" } else { "string" }.to_owned(),
        format: String::new(),
        description: String::new(),
        priority,
        path: path.to_owned(),
    };
    columns
        .map(|(name, path, priority)| column(name, path, *priority))
        .chain([column("Age", ".metadata.creationTimestamp", 0)])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_headers_choose_the_view() {
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(View::of_accept(kubectl), Some(View::Table));
        let metadata = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";
        assert_eq!(View::of_accept(metadata), Some(View::Metadata));
        assert_eq!(View::of_accept("application/json"), Some(View::Whole));
        assert_eq!(
            View::of_accept("application/vnd.kubernetes.protobuf, */*"),
            Some(View::Whole)
        );
        assert_eq!(View::of_accept("application/vnd.kubernetes.protobuf"), None);
    }

    #[test]
    fn paths_select() {
        let value = json!({
            "a": {"b.c": 1, "list": [{"type": "X", "v": 1}, {"type": "Y", "v": 2}]},
        });
        assert_eq!(select(&value, r".a.b\.c"), [&json!(1)]);
        assert_eq!(select(&value, ".a.list[1].v"), [&json!(2)]);
        assert_eq!(select(&value, ".a.list[*].v"), [&json!(1), &json!(2)]);
        assert_eq!(select(&value, ".a.list[?(@.type==\"Y\")].v"), [&json!(2)]);
        assert!(select(&value, ".x.y").is_empty());
    }
}
