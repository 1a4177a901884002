//! From the text of a file to checked objects, and to sentences about the rest.

use std::fmt;

use k8s_openapi::api::{
    core::v1::{Namespace, Node, Pod, Service},
    discovery::v1::EndpointSlice,
    networking::v1::NetworkPolicy,
};
use mesh_api::crd::{
    self, Community, ExternalPeer, MeshConfig, MeshNode, MeshPolicy, MeshRelay, MeshService,
    SiteRoute,
};
use serde::{Deserialize, Deserializer};
use serde_yaml_ng::Value;

use super::{Kind, Loaded, Object, ObjectId, Source, kinds};

/// What a file holds.
#[derive(Debug, Default)]
pub struct Parsed {
    /// Good objects, in order.
    pub objects: Vec<Loaded>,
    /// What is wrong with the others, a line each.
    pub problems: Vec<String>,
}

/// A field that is not what it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldProblem {
    /// Its path; empty: the object as a whole.
    pub(crate) field: String,
    /// What is wrong.
    pub(crate) text: String,
}

impl fmt::Display for FieldProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { field, text } = self;
        if field.is_empty() {
            f.write_str(text)
        } else {
            write!(f, "{field}: {text}")
        }
    }
}

impl FieldProblem {
    pub(crate) fn new(field: impl Into<String>, text: impl ToString) -> Self {
        Self {
            field: field.into(),
            text: text.to_string(),
        }
    }
}

/// Reads every document in `text`. One that is broken does not keep the others out.
#[must_use]
pub fn parse_file(name: &str, text: &str) -> Parsed {
    let mut parsed = Parsed::default();
    for (index, (line, document)) in split(text).into_iter().enumerate() {
        let source = Source::File {
            file: name.to_owned(),
            document: index + 1,
            item: None,
            line: line + 1,
        };
        // Empty lines in front, so that the parser counts the lines of the file.
        let padded = "\n".repeat(line) + document;
        match serde_yaml_ng::from_str::<Value>(&padded) {
            Ok(Value::Null) => {}
            Ok(value) => parse_document(&source, &value, &padded, &mut parsed),
            Err(error) => parsed
                .problems
                .push(format!("{source}: {}", message(&error))),
        }
    }
    parsed
}

/// The documents of a YAML stream, each with the number of lines before it. A line that begins
/// with `---` is always a boundary (YAML 1.2.2 §9.1.2); splitting here keeps a syntax error in
/// one document from hiding those behind it.
pub(super) fn split(text: &str) -> Vec<(usize, &str)> {
    let mut documents = Vec::new();
    let (mut start, mut start_line, mut offset) = (0, 0, 0);
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let marker = line.strip_prefix("---");
        if marker.is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace)) {
            push_document(&mut documents, text, (start, offset), start_line);
            // What stands behind the dashes belongs to the document: YAML reads them itself.
            (start, start_line) = (offset, number);
        }
        offset += line.len();
    }
    push_document(&mut documents, text, (start, offset), start_line);
    documents
}

fn push_document<'a>(
    documents: &mut Vec<(usize, &'a str)>,
    text: &'a str,
    (start, end): (usize, usize),
    line: usize,
) {
    let document = text.get(start..end).unwrap_or_default();
    let said = |line: &str| {
        let line = line.trim();
        !line.is_empty() && !line.starts_with('#') && line != "---"
    };
    if document.lines().any(said) {
        documents.push((line, document));
    }
}

fn parse_document(source: &Source, value: &Value, text: &str, parsed: &mut Parsed) {
    let kind = value.get("kind").and_then(Value::as_str);
    if kind != Some("List") {
        let document = serde_yaml_ng::Deserializer::from_str(text);
        return take(parse_object(source, value, document), parsed);
    }
    let Some(items) = value.get("items").and_then(Value::as_sequence) else {
        let problem = format!("{source}: List: items: a list of objects is missing");
        return parsed.problems.push(problem);
    };
    for (index, value) in items.iter().enumerate() {
        let mut source = source.clone();
        if let Source::File { item, .. } = &mut source {
            *item = Some(index);
        }
        take(parse_object(&source, value, value), parsed);
    }
}

fn take(result: Result<Loaded, String>, parsed: &mut Parsed) {
    match result {
        Ok(loaded) => parsed.objects.push(loaded),
        Err(problem) => parsed.problems.push(problem),
    }
}

/// `value` says what it is; `document` is the same, for the typed reading.
fn parse_object<'de>(
    source: &Source,
    value: &'de Value,
    document: impl Deserializer<'de, Error = serde_yaml_ng::Error>,
) -> Result<Loaded, String> {
    let text = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default();
    let (version, kind_text) = (text("apiVersion"), text("kind"));
    let kind = kind(version, kind_text).ok_or_else(|| match (version, kind_text) {
        ("", _) => format!("{source}: apiVersion: missing"),
        (_, "") => format!("{source}: kind: missing"),
        _ => format!(
            "{source}: kind: {kind_text} of {version} is not known here (known: v1 Service, Node, \
             Pod and Namespace, discovery.k8s.io/v1 EndpointSlice, networking.k8s.io/v1 \
             NetworkPolicy, {} MeshNode, MeshRelay, ExternalPeer, MeshConfig, MeshService, \
             MeshPolicy, SiteRoute and Community)",
            crd::API_VERSION
        ),
    })?;
    let metadata = value.get("metadata");
    let meta = |name: &str| {
        metadata
            .and_then(|meta| meta.get(name))
            .and_then(Value::as_str)
    };
    let namespaced = matches!(
        kind,
        Kind::Service | Kind::EndpointSlice | Kind::MeshService | Kind::NetworkPolicy | Kind::Pod
    );
    let namespace = if namespaced {
        meta("namespace").unwrap_or("default")
    } else {
        ""
    };
    let id = ObjectId {
        kind,
        namespace: namespace.to_owned(),
        name: meta("name").unwrap_or_default().to_owned(),
    };
    let object = check_name(&id.name).and_then(|()| read_object(&id, document));
    match object {
        Ok(object) => Ok(Loaded::new(id, source.clone(), object)),
        Err(problem) => Err(format!("{}: {problem}", source.place(&id))),
    }
}

fn kind(version: &str, kind: &str) -> Option<Kind> {
    match (version, kind) {
        ("v1", "Service") => Some(Kind::Service),
        ("v1", "Node") => Some(Kind::Node),
        ("discovery.k8s.io/v1", "EndpointSlice") => Some(Kind::EndpointSlice),
        (crd::API_VERSION, "MeshNode") => Some(Kind::MeshNode),
        (crd::API_VERSION, "MeshRelay") => Some(Kind::MeshRelay),
        (crd::API_VERSION, "ExternalPeer") => Some(Kind::ExternalPeer),
        (crd::API_VERSION, "MeshConfig") => Some(Kind::MeshConfig),
        (crd::API_VERSION, "MeshService") => Some(Kind::MeshService),
        (crd::API_VERSION, "MeshPolicy") => Some(Kind::MeshPolicy),
        (crd::API_VERSION, "SiteRoute") => Some(Kind::SiteRoute),
        (crd::API_VERSION, "Community") => Some(Kind::Community),
        ("networking.k8s.io/v1", "NetworkPolicy") => Some(Kind::NetworkPolicy),
        ("v1", "Pod") => Some(Kind::Pod),
        ("v1", "Namespace") => Some(Kind::Namespace),
        _ => None,
    }
}

/// Kubernetes' rule for most names (RFC 1123 subdomain); above all, no `/`, which our keys use.
pub(crate) fn check_name(name: &str) -> Result<(), FieldProblem> {
    let good = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-' || c == b'.';
    if name.is_empty() {
        Err(FieldProblem::new("metadata.name", "missing"))
    } else if name.len() > 253 || !name.bytes().all(good) {
        let text = format!("{name:?} is not a name: at most 253 of a-z, 0-9, `-` and `.`");
        Err(FieldProblem::new("metadata.name", text))
    } else {
        Ok(())
    }
}

fn read_object<'de>(
    id: &ObjectId,
    document: impl Deserializer<'de, Error = serde_yaml_ng::Error>,
) -> Result<Object, FieldProblem> {
    match id.kind {
        Kind::Service => kinds::service(id, &typed::<Service>(document)?),
        Kind::EndpointSlice => kinds::slice(id, &typed::<EndpointSlice>(document)?),
        Kind::Node => kinds::node(id, &typed::<Node>(document)?),
        Kind::MeshNode => kinds::mesh_node(id, &typed::<MeshNode>(document)?.spec),
        Kind::MeshRelay => kinds::relay(id, &typed::<MeshRelay>(document)?.spec),
        Kind::ExternalPeer => kinds::external_peer(id, &typed::<ExternalPeer>(document)?.spec),
        Kind::MeshConfig => kinds::config(id, &typed::<MeshConfig>(document)?.spec),
        Kind::MeshService => kinds::mesh_service(id, &typed::<MeshService>(document)?.spec),
        Kind::MeshPolicy => kinds::mesh_policy(id, &typed::<MeshPolicy>(document)?.spec),
        Kind::SiteRoute => kinds::site_route(id, &typed::<SiteRoute>(document)?.spec),
        Kind::Community => kinds::community(id, &typed::<Community>(document)?.spec),
        Kind::NetworkPolicy => kinds::network_policy(id, &typed::<NetworkPolicy>(document)?),
        Kind::Pod => kinds::pod(id, &typed::<Pod>(document)?),
        Kind::Namespace => Ok(kinds::namespace(id, typed::<Namespace>(document)?)),
    }
}

fn typed<'de, T: Deserialize<'de>>(
    document: impl Deserializer<'de, Error = serde_yaml_ng::Error>,
) -> Result<T, FieldProblem> {
    let mut unknown = None;
    let mut track = serde_path_to_error::Track::new();
    let document = serde_path_to_error::Deserializer::new(document, &mut track);
    let read = serde_ignored::deserialize(document, |path| {
        let path = path.to_string();
        // Our own kinds' types do not read these two, and `kind` above did.
        if path != "apiVersion" && path != "kind" {
            unknown.get_or_insert(path);
        }
    });
    match (read, unknown) {
        (Ok(value), None) => Ok(value),
        (Ok(_), Some(path)) => Err(FieldProblem::new(field_path(&path), "unknown field")),
        (Err(error), _) => {
            let path = track.path().to_string();
            let field = if path == "." { String::new() } else { path };
            Err(FieldProblem::new(
                &field,
                without_path(&message(&error), &field),
            ))
        }
    }
}

/// `spec.ports.0.?.nme` as `serde_ignored` writes it is `spec.ports[0].nme` to a person.
fn field_path(path: &str) -> String {
    let mut field = String::new();
    for part in path.split('.').filter(|&part| part != "?") {
        if part.bytes().all(|c| c.is_ascii_digit()) {
            field += &format!("[{part}]");
        } else {
            if !field.is_empty() {
                field.push('.');
            }
            field += part;
        }
    }
    field
}

/// The parser's sentence, with its place at the end as `(line L, column C)`.
fn message(error: &serde_yaml_ng::Error) -> String {
    let text = error.to_string();
    let Some(place) = error.location() else {
        return text;
    };
    let (line, column) = (place.line(), place.column());
    let text = text.trim_end_matches(&format!(" at line {line} column {column}"));
    format!("{text} (line {line}, column {column})")
}

/// The parser says the path too, or the path of what the field stands in; once is enough.
fn without_path(text: &str, field: &str) -> String {
    match text.split_once(": ") {
        Some((path, rest)) if !path.is_empty() && field.starts_with(path) => rest.to_owned(),
        _ => text.to_owned(),
    }
}
