//! The few bodies that `kubectl` sends as protobuf and not as JSON: what `kubectl create` makes,
//! and what it asks about rights and tokens. Answers are always JSON, which it takes as well.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use super::{
    error::{ApiError, ApiResult},
    object,
};

/// How bodies of this type begin.
const MAGIC: &[u8] = b"k8s\0";

type Fields = &'static [(u64, &'static str, Form)];

/// What a field holds.
#[derive(Debug, Clone, Copy)]
enum Form {
    Text,
    Texts,
    Number,
    Flag,
    Message(Fields),
    /// Texts by key.
    Map,
    /// Bytes by key, in base64 as JSON has them.
    ByteMap,
}

const METADATA: Fields = &[
    (1, "name", Form::Text),
    (2, "generateName", Form::Text),
    (3, "namespace", Form::Text),
    (5, "uid", Form::Text),
    (6, "resourceVersion", Form::Text),
    (11, "labels", Form::Map),
    (12, "annotations", Form::Map),
    (14, "finalizers", Form::Texts),
];

const RESOURCE: Fields = &[
    (1, "namespace", Form::Text),
    (2, "verb", Form::Text),
    (3, "group", Form::Text),
    (4, "version", Form::Text),
    (5, "resource", Form::Text),
    (6, "subresource", Form::Text),
    (7, "name", Form::Text),
];

const PATH: Fields = &[(1, "path", Form::Text), (2, "verb", Form::Text)];

const SELF_ACCESS: Fields = &[
    (1, "resourceAttributes", Form::Message(RESOURCE)),
    (2, "nonResourceAttributes", Form::Message(PATH)),
];

const BOUND: Fields = &[
    (1, "kind", Form::Text),
    (2, "apiVersion", Form::Text),
    (3, "name", Form::Text),
    (4, "uid", Form::Text),
];

const TOKEN: Fields = &[
    (1, "audiences", Form::Texts),
    (3, "boundObjectRef", Form::Message(BOUND)),
    (4, "expirationSeconds", Form::Number),
];

const RULES: Fields = &[(1, "namespace", Form::Text)];

const PRECONDITIONS: Fields = &[(1, "uid", Form::Text), (2, "resourceVersion", Form::Text)];

const META: (u64, &str, Form) = (1, "metadata", Form::Message(METADATA));

/// The kinds that are read. Numbers are those of the API's `generated.proto` files.
const KINDS: &[(&str, Fields)] = &[
    ("Namespace", &[META]),
    ("ServiceAccount", &[META]),
    (
        "ConfigMap",
        &[
            META,
            (2, "data", Form::Map),
            (3, "binaryData", Form::ByteMap),
            (4, "immutable", Form::Flag),
        ],
    ),
    (
        "Secret",
        &[
            META,
            (2, "data", Form::ByteMap),
            (3, "type", Form::Text),
            (4, "stringData", Form::Map),
            (5, "immutable", Form::Flag),
        ],
    ),
    ("SelfSubjectReview", &[META]),
    (
        "SelfSubjectAccessReview",
        &[META, (2, "spec", Form::Message(SELF_ACCESS))],
    ),
    (
        "SelfSubjectRulesReview",
        &[META, (2, "spec", Form::Message(RULES))],
    ),
    ("TokenRequest", &[META, (2, "spec", Form::Message(TOKEN))]),
    (
        "DeleteOptions",
        &[
            (1, "gracePeriodSeconds", Form::Number),
            (2, "preconditions", Form::Message(PRECONDITIONS)),
            (4, "propagationPolicy", Form::Text),
            (5, "dryRun", Form::Texts),
        ],
    ),
];

/// Reads a body.
///
/// # Errors
///
/// 400 for what is no message, 415 for a kind that is read as JSON only.
pub(crate) fn decode(bytes: &[u8]) -> ApiResult<Value> {
    let broken = || ApiError::bad_request("the body is no protobuf of Kubernetes");
    let body = bytes.strip_prefix(MAGIC).ok_or_else(broken)?;
    let mut types = json!({});
    let mut raw: &[u8] = &[];
    for (number, field) in fields(body).ok_or_else(broken)? {
        match (number, field) {
            (1, Wire::Bytes(bytes)) => {
                let known: Fields = &[(1, "apiVersion", Form::Text), (2, "kind", Form::Text)];
                types = message(bytes, known).ok_or_else(broken)?;
            }
            (2, Wire::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    let kind = object::text(&types, &["kind"]).unwrap_or_default();
    let Some((_, known)) = KINDS.iter().find(|(name, _)| *name == kind) else {
        let why = format!("this stand-in reads {kind} as JSON only");
        return Err(ApiError::new(415, "UnsupportedMediaType", why));
    };
    let mut value = message(raw, known).ok_or_else(broken)?;
    for key in ["apiVersion", "kind"] {
        if let Some(text) = object::text(&types, &[key]) {
            object::set(&mut value, &[key], text);
        }
    }
    Ok(value)
}

enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn fields(mut bytes: &[u8]) -> Option<Vec<(u64, Wire<'_>)>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes)?;
        let wire = match key & 7 {
            0 => Wire::Number(varint(&mut bytes)?),
            2 => {
                let length = usize::try_from(varint(&mut bytes)?).ok()?;
                let (inner, rest) = bytes.split_at_checked(length)?;
                bytes = rest;
                Wire::Bytes(inner)
            }
            // Kubernetes' messages have no fixed-size fields where these are read.
            _ => return None,
        };
        found.push((key >> 3, wire));
    }
    Some(found)
}

fn message(bytes: &[u8], known: Fields) -> Option<Value> {
    let mut value = json!({});
    for (number, wire) in fields(bytes)? {
        let Some((_, name, form)) = known.iter().find(|(one, ..)| *one == number) else {
            continue;
        };
        match (form, wire) {
            (Form::Text, Wire::Bytes(bytes)) => {
                let text = std::str::from_utf8(bytes).ok()?;
                // An empty text is how a Go struct says nothing.
                if !text.is_empty() {
                    object::set(&mut value, &[name], text);
                }
            }
            (Form::Texts, Wire::Bytes(bytes)) => {
                let text = std::str::from_utf8(bytes).ok()?;
                let mut list = object::list(&value, &[name]).to_vec();
                list.push(text.into());
                object::set(&mut value, &[name], list);
            }
            (Form::Number, Wire::Number(number)) => object::set(&mut value, &[name], number),
            (Form::Flag, Wire::Number(number)) => object::set(&mut value, &[name], number != 0),
            (Form::Message(known), Wire::Bytes(bytes)) => {
                object::set(&mut value, &[name], message(bytes, known)?);
            }
            (Form::Map | Form::ByteMap, Wire::Bytes(bytes)) => {
                let (mut key, mut text) = (String::new(), String::new());
                for (number, wire) in fields(bytes)? {
                    match (number, wire, form) {
                        (1, Wire::Bytes(bytes), _) => {
                            key = String::from_utf8(bytes.to_vec()).ok()?
                        }
                        (2, Wire::Bytes(bytes), Form::ByteMap) => text = STANDARD.encode(bytes),
                        (2, Wire::Bytes(bytes), _) => {
                            text = String::from_utf8(bytes.to_vec()).ok()?
                        }
                        _ => return None,
                    }
                }
                object::set(&mut value, &[name, &key], text);
            }
            _ => return None,
        }
    }
    Some(value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        let length = u8::try_from(bytes.len()).unwrap();
        [&[number << 3 | 2, length], bytes].concat()
    }

    fn body(kind: &str, raw: &[u8]) -> Vec<u8> {
        let types = [field(1, b"v1"), field(2, kind.as_bytes())].concat();
        [MAGIC, &field(1, &types), &field(2, raw)].concat()
    }

    #[test]
    fn bodies_become_json() {
        let label = [field(1, b"k"), field(2, b"v")].concat();
        let metadata = [field(1, b"m"), field(2, b""), field(11, &label)].concat();
        let raw = [
            field(1, &metadata),
            field(2, &label),
            field(3, &label),
            vec![4 << 3, 1],
        ]
        .concat();
        assert_eq!(
            decode(&body("ConfigMap", &raw)).unwrap(),
            json!({
                "apiVersion": "v1", "kind": "ConfigMap", "immutable": true,
                "metadata": {"name": "m", "labels": {"k": "v"}},
                "data": {"k": "v"}, "binaryData": {"k": "dg=="},
            })
        );
        let other = decode(&body("Pod", &raw)).unwrap_err();
        assert_eq!(other.code, 415);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(raw: Vec<u8>) {
            decode(&raw).map(drop).unwrap_or_default();
            decode(&[MAGIC, &raw].concat()).map(drop).unwrap_or_default();
            for (_, known) in KINDS {
                message(&raw, known).unwrap_or_default();
            }
        }
    }
}
