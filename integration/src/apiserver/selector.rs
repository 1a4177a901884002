//! Label and field selectors.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{
    error::{ApiError, ApiResult},
    object,
    store::Stored,
};

/// Which objects a list or a watch is about.
#[derive(Debug, Clone, Default)]
pub(crate) struct Selector {
    labels: Vec<Requirement>,
    fields: Vec<Requirement>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Requirement {
    key: String,
    test: Test,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Test {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    Absent,
    Above(i64),
    Below(i64),
}

impl Requirement {
    fn matches(&self, value: Option<&str>) -> bool {
        let number = || value.and_then(|value| value.parse::<i64>().ok());
        match &self.test {
            Test::In(values) => value.is_some_and(|value| values.iter().any(|one| one == value)),
            Test::NotIn(values) => value.is_none_or(|value| !values.iter().any(|one| one == value)),
            Test::Exists => value.is_some(),
            Test::Absent => value.is_none(),
            Test::Above(bound) => number().is_some_and(|number| number > *bound),
            Test::Below(bound) => number().is_some_and(|number| number < *bound),
        }
    }
}

impl Selector {
    /// Reads the two query parameters for a resource.
    ///
    /// # Errors
    ///
    /// 400 for what is no selector, and for a field that this resource cannot be selected by.
    pub(crate) fn parse(resource: &str, labels: &str, fields: &str) -> ApiResult<Self> {
        let labels = parse_labels(labels)
            .map_err(|why| ApiError::bad_request(format!("unable to parse requirement: {why}")))?;
        let fields = parse_fields(resource, fields).map_err(ApiError::bad_request)?;
        Ok(Self { labels, fields })
    }

    pub(crate) fn matches(&self, stored: &Stored) -> bool {
        let label = |requirement: &Requirement| {
            requirement.matches(stored.labels.get(&requirement.key).map(String::as_str))
        };
        let field = |requirement: &Requirement| {
            let value = match requirement.key.as_str() {
                "metadata.name" => stored.key.name.as_str(),
                "metadata.namespace" => stored.key.namespace.as_str(),
                other => stored
                    .fields
                    .iter()
                    .find(|(name, _)| *name == other)
                    .map_or("", |(_, value)| value),
            };
            requirement.matches(Some(value))
        };
        self.labels.iter().all(label) && self.fields.iter().all(field)
    }
}

/// What resources can be selected by, beside name and namespace.
const FIELDS: &[(&str, &[&str])] = &[
    (
        "/pods",
        &[
            "spec.nodeName",
            "spec.serviceAccountName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ],
    ),
    ("/nodes", &["spec.unschedulable"]),
    ("/namespaces", &["status.phase"]),
    ("/secrets", &["type"]),
    ("/services", &["spec.clusterIP", "spec.type"]),
    (
        "events.k8s.io/events",
        &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
            "type",
        ],
    ),
];

fn fields_known(resource: &str) -> &'static [&'static str] {
    FIELDS
        .iter()
        .find(|(one, _)| *one == resource)
        .map_or(&[], |(_, fields)| fields)
}

/// What of `object` field selectors of its resource may ask for.
pub(crate) fn fields_of(resource: &str, object: &Value) -> Vec<(&'static str, String)> {
    let known = fields_known(resource).iter();
    known
        .map(|field| {
            // Events are kept as events.k8s.io/v1 says them; selectors have the core names.
            let place = match *field {
                "reportingComponent" => "reportingController".to_owned(),
                "source" => "deprecatedSource.component".to_owned(),
                other => other.replacen("involvedObject", "regarding", 1),
            };
            let path: Vec<_> = place.split('.').collect();
            let value = match object::at(object, &path) {
                Some(Value::String(text)) => text.clone(),
                Some(Value::Bool(yes)) => yes.to_string(),
                // A flag that is not set is false.
                None if matches!(*field, "spec.unschedulable" | "spec.hostNetwork") => {
                    "false".to_owned()
                }
                _ => String::new(),
            };
            (*field, value)
        })
        .collect()
}

fn parse_fields(resource: &str, text: &str) -> Result<Vec<Requirement>, String> {
    let terms = text.split(',').filter(|term| !term.is_empty());
    terms
        .map(|term| {
            let (key, value, equal) = if let Some((key, value)) = term.split_once("!=") {
                (key, value, false)
            } else if let Some((key, value)) = term.split_once("==") {
                (key, value, true)
            } else if let Some((key, value)) = term.split_once('=') {
                (key, value, true)
            } else {
                return Err(format!(
                    "invalid selector: {text:?}; can't understand {term:?}"
                ));
            };
            let known = matches!(key, "metadata.name" | "metadata.namespace")
                || fields_known(resource).contains(&key);
            if !known {
                return Err(format!("field label not supported: {key}"));
            }
            let values = vec![value.to_owned()];
            let test = if equal {
                Test::In(values)
            } else {
                Test::NotIn(values)
            };
            Ok(Requirement {
                key: key.to_owned(),
                test,
            })
        })
        .collect()
}

fn parse_labels(text: &str) -> Result<Vec<Requirement>, String> {
    terms(text).into_iter().map(parse_label).collect()
}

/// Splits at commas that are not inside brackets.
fn terms(text: &str) -> Vec<&str> {
    let mut depth = 0_u32;
    let parts = text.split(|c: char| {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    });
    parts
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .collect()
}

fn parse_label(term: &str) -> Result<Requirement, String> {
    let requirement = |key: &str, test: Test| {
        let key = key.trim();
        if !is_label_key(key) {
            return Err(format!("key: Invalid value: {key:?}"));
        }
        Ok(Requirement {
            key: key.to_owned(),
            test,
        })
    };
    if let Some(key) = term.strip_prefix('!') {
        return requirement(key, Test::Absent);
    }
    for (word, of) in [
        ("!=", Test::NotIn as fn(Vec<String>) -> Test),
        ("==", Test::In),
        ("=", Test::In),
    ] {
        if let Some((key, value)) = term.split_once(word) {
            return requirement(key, of(vec![label_value(value)?]));
        }
    }
    for (word, of) in [
        (" notin ", Test::NotIn as fn(Vec<String>) -> Test),
        (" in ", Test::In),
    ] {
        let spaced = term.replacen('(', " (", 1);
        if let Some((key, values)) = spaced.split_once(word) {
            let values = values.trim();
            let inner = values
                .strip_prefix('(')
                .and_then(|rest| rest.strip_suffix(')'))
                .ok_or_else(|| format!("found {values:?}, expected: '('"))?;
            let values: Result<_, _> = inner.split(',').map(label_value).collect();
            return requirement(key, of(values?));
        }
    }
    for (word, of) in [('>', Test::Above as fn(i64) -> Test), ('<', Test::Below)] {
        if let Some((key, bound)) = term.split_once(word) {
            let bound = bound.trim().parse();
            return requirement(key, of(bound.map_err(|_| format!("{term:?}: no integer"))?));
        }
    }
    requirement(term, Test::Exists)
}

fn label_value(text: &str) -> Result<String, String> {
    let text = text.trim();
    if is_label_value(text) {
        Ok(text.to_owned())
    } else {
        Err(format!("values: Invalid value: {text:?}"))
    }
}

/// A name of 63 characters at most, with a DNS prefix or without.
pub(crate) fn is_label_key(key: &str) -> bool {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    prefix.is_none_or(super::names::is_subdomain) && !name.is_empty() && is_label_value(name)
}

/// Empty, or letters, digits, `-`, `_`, `.`, beginning and ending with a letter or digit.
pub(crate) fn is_label_value(value: &str) -> bool {
    let edge = |c: Option<char>| c.is_none_or(|c| c.is_ascii_alphanumeric());
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    value.len() <= 63
        && value.chars().all(inner)
        && edge(value.chars().next())
        && edge(value.chars().next_back())
}

/// Whether a `LabelSelector` object selects these labels; an empty one selects all.
pub(crate) fn selects(selector: &Value, labels: &BTreeMap<String, String>) -> bool {
    let equal = object::members(selector, &["matchLabels"])
        .all(|(key, value)| labels.get(key).map(String::as_str) == value.as_str());
    let expressions = object::list(selector, &["matchExpressions"]).iter();
    equal
        && expressions.into_iter().all(|expression| {
            let owned = |texts: Vec<&str>| texts.into_iter().map(str::to_owned).collect();
            let values = owned(object::texts(expression, &["values"]));
            let key = object::text(expression, &["key"]).unwrap_or_default();
            let test = match object::text(expression, &["operator"]) {
                Some("In") => Test::In(values),
                Some("NotIn") => Test::NotIn(values),
                Some("Exists") => Test::Exists,
                _ => Test::Absent,
            };
            let requirement = Requirement {
                key: key.to_owned(),
                test,
            };
            requirement.matches(labels.get(key).map(String::as_str))
        })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::store::Store, *};

    fn selects_pod(labels: &str, fields: &str) -> bool {
        let mut store = Store::default();
        let pod = json!({
            "metadata": {"name": "p", "namespace": "n", "labels": {"app": "web", "tier": "3"}},
            "spec": {"nodeName": "edge"},
        });
        let stored = store.put("/pods", pod);
        Selector::parse("/pods", labels, fields)
            .unwrap()
            .matches(&stored)
    }

    #[test]
    fn labels_are_tested_as_written() {
        for (selector, expected) in [
            ("", true),
            ("app=web", true),
            ("app==web,tier=3", true),
            ("app!=web", false),
            ("other!=web", true),
            ("app in (a, web)", true),
            ("app in (a,b),tier", false),
            ("app notin (a,b)", true),
            ("app", true),
            ("!app", false),
            ("!other", true),
            ("tier>2", true),
            ("tier<3", false),
        ] {
            assert_eq!(selects_pod(selector, ""), expected, "{selector}");
        }
    }

    #[test]
    fn fields_are_tested_as_written() {
        for (selector, expected) in [
            ("metadata.name=p", true),
            ("metadata.namespace!=n", false),
            ("spec.nodeName=edge", true),
            ("spec.nodeName==other", false),
            ("status.phase!=Running,spec.nodeName=edge", true),
        ] {
            assert_eq!(selects_pod("", selector), expected, "{selector}");
        }
    }

    #[test]
    fn what_is_no_selector_is_refused() {
        for labels in ["a b", "-a=b", "a in b", "a=b c", "a>x"] {
            assert!(Selector::parse("/pods", labels, "").is_err(), "{labels}");
        }
        for fields in ["spec.nodeName", "spec.image=x"] {
            assert!(Selector::parse("/pods", "", fields).is_err(), "{fields}");
        }
        let said = Selector::parse("/services", "", "spec.nodeName=a").unwrap_err();
        assert!(
            said.to_string()
                .contains("field label not supported: spec.nodeName"),
            "{said}"
        );
    }

    #[test]
    fn label_selector_objects_select() {
        let labels = BTreeMap::from([("a".to_owned(), "1".to_owned())]);
        assert!(selects(&json!({}), &labels));
        assert!(selects(&json!({"matchLabels": {"a": "1"}}), &labels));
        let not = json!({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]});
        assert!(!selects(&not, &labels));
    }
}
