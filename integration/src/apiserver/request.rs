//! What a request's method, path and query ask for.

use std::collections::BTreeMap;

use super::{
    error::{ApiError, ApiResult},
    rbac::Action,
};

/// Where a path leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// A path that is no resource, as `/version`.
    Path(String),
    Resource(ResourcePath),
}

/// A path of a resource.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ResourcePath {
    pub(crate) group: String,
    pub(crate) version: String,
    /// Empty at the cluster's scope, and for all namespaces.
    pub(crate) namespace: String,
    pub(crate) plural: String,
    pub(crate) name: String,
    pub(crate) subresource: String,
    /// What follows the subresource `proxy`.
    pub(crate) rest: String,
}

/// Query parameters, decoded.
#[derive(Debug, Clone, Default)]
pub(crate) struct Query(BTreeMap<String, Vec<String>>);

impl Query {
    pub(crate) fn parse(text: &str) -> Self {
        let pairs = text.split('&').filter(|pair| !pair.is_empty());
        let mut all: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for pair in pairs {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            all.entry(decode(key)).or_default().push(decode(value));
        }
        Self(all)
    }

    /// The last value, if there are several.
    pub(crate) fn text(&self, key: &str) -> &str {
        self.texts(key).last().map_or("", String::as_str)
    }

    /// Every value.
    pub(crate) fn texts(&self, key: &str) -> &[String] {
        self.0.get(key).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn flag(&self, key: &str) -> bool {
        matches!(self.text(key), "true" | "1" | "True")
    }

    /// # Errors
    ///
    /// 400 for what is no number.
    pub(crate) fn number(&self, key: &str) -> ApiResult<Option<u64>> {
        match self.text(key) {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(|_| {
                ApiError::bad_request(format!("{key}: invalid value {text:?}: no number"))
            }),
        }
    }
}

/// `%xx` and `+` as they are meant.
fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        if first == b'+' {
            bytes.push(b' ');
            continue;
        }
        let hex = after.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        let byte = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match byte {
            Some(byte) if first == b'%' => {
                bytes.push(byte);
                rest = after.get(2..).unwrap_or_default();
            }
            _ => bytes.push(first),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Reads a path.
pub(crate) fn target(path: &str) -> Target {
    let decoded: Vec<_> = path
        .split('/')
        .filter(|part| !part.is_empty())
        .map(|part| decode(&part.replace('+', "%2B")))
        .collect();
    let parts: Vec<_> = decoded.iter().map(String::as_str).collect();
    let (group, version, rest) = match parts.as_slice() {
        ["api", version, rest @ ..] if !rest.is_empty() => ("", *version, rest),
        ["apis", group, version, rest @ ..] if !rest.is_empty() => (*group, *version, rest),
        _ => return Target::Path(path.to_owned()),
    };
    let mut found = ResourcePath {
        group: group.to_owned(),
        version: version.to_owned(),
        ..ResourcePath::default()
    };
    let rest = match rest {
        ["namespaces", namespace, plural, rest @ ..]
            if !matches!(*plural, "status" | "finalize") =>
        {
            found.namespace = (*namespace).to_owned();
            found.plural = (*plural).to_owned();
            rest
        }
        [plural, rest @ ..] => {
            found.plural = (*plural).to_owned();
            rest
        }
        [] => return Target::Path(path.to_owned()),
    };
    match rest {
        [] => {}
        [name] => found.name = (*name).to_owned(),
        [name, subresource] => {
            found.name = (*name).to_owned();
            found.subresource = (*subresource).to_owned();
        }
        [name, "proxy", rest @ ..] => {
            found.name = (*name).to_owned();
            "proxy".clone_into(&mut found.subresource);
            found.rest = rest.join("/");
        }
        _ => return Target::Path(path.to_owned()),
    }
    Target::Resource(found)
}

/// What authorization is asked.
pub(crate) fn action(method: &str, target: &Target, query: &Query) -> Action {
    let path = match target {
        Target::Path(path) => {
            return Action {
                verb: method.to_lowercase(),
                path: path.clone(),
                ..Action::default()
            };
        }
        Target::Resource(path) => path,
    };
    let verb = match (method, path.name.is_empty()) {
        ("GET", _) if query.flag("watch") => "watch",
        ("GET" | "HEAD", true) => "list",
        ("GET" | "HEAD", false) => "get",
        ("POST", _) => "create",
        ("PUT", _) => "update",
        ("PATCH", _) => "patch",
        ("DELETE", true) => "deletecollection",
        ("DELETE", false) => "delete",
        (other, _) => other,
    };
    let mut name = path.name.clone();
    if name.is_empty()
        && let Some(selected) = query
            .text("fieldSelector")
            .split(',')
            .find_map(|term| term.strip_prefix("metadata.name="))
    {
        selected.trim_start_matches('=').clone_into(&mut name);
    }
    // A namespace is in itself, as far as rights are concerned.
    let namespace = if path.group.is_empty() && path.plural == "namespaces" {
        path.name.clone()
    } else {
        path.namespace.clone()
    };
    Action {
        verb: verb.to_owned(),
        group: path.group.clone(),
        resource: path.plural.clone(),
        subresource: path.subresource.clone(),
        namespace,
        name,
        path: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(path: &str) -> [String; 6] {
        match target(path) {
            Target::Resource(r) => [
                r.group,
                r.version,
                r.namespace,
                r.plural,
                r.name,
                r.subresource,
            ],
            Target::Path(path) => panic!("{path}"),
        }
    }

    #[test]
    fn paths_lead_to_resources() {
        for (path, expected) in [
            ("/api/v1/pods", ["", "v1", "", "pods", "", ""]),
            (
                "/api/v1/namespaces/a/pods/p/status",
                ["", "v1", "a", "pods", "p", "status"],
            ),
            ("/api/v1/namespaces", ["", "v1", "", "namespaces", "", ""]),
            (
                "/api/v1/namespaces/a",
                ["", "v1", "", "namespaces", "a", ""],
            ),
            (
                "/api/v1/namespaces/a/status",
                ["", "v1", "", "namespaces", "a", "status"],
            ),
            (
                "/api/v1/nodes/a/proxy/metrics/cadvisor",
                ["", "v1", "", "nodes", "a", "proxy"],
            ),
            (
                "/apis/apps/v1/namespaces/a/deployments",
                ["apps", "v1", "a", "deployments", "", ""],
            ),
            (
                "/apis/rbac.authorization.k8s.io/v1/clusterroles/system%3Anode",
                [
                    "rbac.authorization.k8s.io",
                    "v1",
                    "",
                    "clusterroles",
                    "system:node",
                    "",
                ],
            ),
        ] {
            assert_eq!(resource(path), expected, "{path}");
        }
        for path in [
            "/version",
            "/api",
            "/api/v1",
            "/apis/apps/v1",
            "/openapi/v3",
        ] {
            assert_eq!(target(path), Target::Path(path.to_owned()));
        }
    }

    #[test]
    fn queries_are_decoded() {
        let query = Query::parse("labelSelector=a%3Db%2Cc+in+%28d%29&watch=true&limit=x");
        assert_eq!(query.text("labelSelector"), "a=b,c in (d)");
        assert!(query.flag("watch"));
        assert!(query.number("limit").is_err());
    }

    #[test]
    fn verbs_are_what_roles_name() {
        let verb = |method: &str, path: &str, query: &str| {
            action(method, &target(path), &Query::parse(query)).verb
        };
        assert_eq!(verb("GET", "/api/v1/pods", ""), "list");
        assert_eq!(verb("GET", "/api/v1/pods", "watch=true"), "watch");
        assert_eq!(verb("GET", "/api/v1/nodes/a", ""), "get");
        assert_eq!(verb("DELETE", "/api/v1/nodes", ""), "deletecollection");
        let selected = action(
            "GET",
            &target("/api/v1/nodes"),
            &Query::parse("fieldSelector=metadata.name%3Da"),
        );
        assert_eq!(selected.name, "a");
    }
}
