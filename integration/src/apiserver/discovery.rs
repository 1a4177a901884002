//! What the server says about itself: versions, groups, resources.

use serde_json::{Value, json};

use super::kinds::{Catalog, Kind};

/// What `/version` says: the oldest of the versions that this stand-in is as strict as.
pub(crate) fn version() -> Value {
    json!({
        "major": "1", "minor": "34", "gitVersion": "v1.34.0-standin", "gitCommit": "",
        "gitTreeState": "clean", "buildDate": "1970-01-01T00:00:00Z", "goVersion": "",
        "compiler": "", "platform": "linux/amd64",
    })
}

/// The answer to a discovery path; nothing if it is none. `aggregated`: all in one answer.
pub(crate) fn answer(catalog: &Catalog, path: &str, aggregated: bool) -> Option<Value> {
    let parts: Vec<_> = path.split('/').filter(|part| !part.is_empty()).collect();
    match parts.as_slice() {
        ["api"] if aggregated => Some(aggregate(catalog, true)),
        ["apis"] if aggregated => Some(aggregate(catalog, false)),
        ["api"] => Some(json!({
            "kind": "APIVersions", "versions": ["v1"],
            "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": ""}],
        })),
        ["apis"] => {
            let groups: Vec<_> = catalog
                .groups()
                .into_iter()
                .filter(|(group, _)| !group.is_empty())
                .map(|(group, versions)| api_group(group, &versions))
                .collect();
            Some(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}))
        }
        ["api", version] => resources(catalog, "", version),
        ["apis", group] => {
            let groups = catalog.groups();
            let (group, versions) = groups.iter().find(|(name, _)| name == group)?;
            let mut found = api_group(group, versions);
            super::object::set(&mut found, &["kind"], "APIGroup");
            super::object::set(&mut found, &["apiVersion"], "v1");
            Some(found)
        }
        ["apis", group, version] => resources(catalog, group, version),
        _ => None,
    }
}

fn api_group(group: &str, versions: &[&str]) -> Value {
    let version =
        |version: &str| json!({"groupVersion": format!("{group}/{version}"), "version": version});
    let all: Vec<_> = versions.iter().map(|one| version(one)).collect();
    json!({"name": group, "versions": all, "preferredVersion": all.first()})
}

fn resources(catalog: &Catalog, group: &str, version: &str) -> Option<Value> {
    let kinds: Vec<_> = catalog.of_version(group, version).collect();
    let first = kinds.first()?;
    let mut resources = Vec::new();
    for kind in &kinds {
        resources.push(json!({
            "name": kind.plural, "singularName": kind.singular, "namespaced": kind.namespaced,
            "kind": kind.kind, "verbs": kind.verbs(), "shortNames": kind.short_names,
            "categories": kind.categories,
        }));
        for (name, of, verbs) in subresources(kind) {
            resources.push(json!({
                "name": format!("{}/{name}", kind.plural), "singularName": "",
                "namespaced": kind.namespaced, "kind": of, "verbs": verbs,
            }));
        }
    }
    Some(json!({
        "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": first.api_version(),
        "resources": resources,
    }))
}

fn subresources(kind: &Kind) -> Vec<(&'static str, &str, &'static [&'static str])> {
    let mut found: Vec<(&str, &str, &[&str])> = Vec::new();
    if kind.has_status {
        found.push(("status", &kind.kind, &["get", "patch", "update"]));
    }
    if kind.kind == "ServiceAccount" {
        found.push(("token", "TokenRequest", &["create"]));
    }
    found
}

fn aggregate(catalog: &Catalog, core: bool) -> Value {
    let groups = catalog.groups();
    let groups = groups.iter().filter(|(group, _)| group.is_empty() == core);
    let items: Vec<_> = groups
        .map(|(group, versions)| {
            let versions: Vec<_> = versions
                .iter()
                .map(|version| {
                    let resources: Vec<_> = catalog
                        .of_version(group, version)
                        .map(|kind| aggregated(kind))
                        .collect();
                    json!({"version": version, "resources": resources, "freshness": "Current"})
                })
                .collect();
            json!({"metadata": {"name": group, "creationTimestamp": null}, "versions": versions})
        })
        .collect();
    json!({
        "kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2",
        "metadata": {}, "items": items,
    })
}

fn aggregated(kind: &Kind) -> Value {
    let named = |name: &str| {
        let (group, version) = match name {
            "TokenRequest" => ("authentication.k8s.io", "v1"),
            _ => (kind.group.as_str(), kind.version.as_str()),
        };
        json!({"group": group, "version": version, "kind": name})
    };
    let subresources: Vec<_> = subresources(kind)
        .into_iter()
        .map(|(name, of, verbs)| {
            json!({"subresource": name, "responseKind": named(of), "verbs": verbs})
        })
        .collect();
    json!({
        "resource": kind.plural, "responseKind": named(&kind.kind),
        "scope": if kind.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": kind.singular, "verbs": kind.verbs(),
        "shortNames": kind.short_names, "categories": kind.categories,
        "subresources": subresources,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_discovery_know_the_same_resources() {
        let catalog = Catalog::default();
        let list = answer(&catalog, "/apis/apps/v1", false).unwrap();
        let names: Vec<_> = list["resources"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|resource| resource["name"].as_str())
            .filter(|name| !name.contains('/'))
            .collect();
        assert_eq!(names, ["daemonsets", "deployments", "statefulsets"]);
        let all = answer(&catalog, "/apis", true).unwrap();
        let apps = all["items"]
            .as_array()
            .unwrap()
            .iter()
            .find(|item| item["metadata"]["name"] == "apps")
            .unwrap();
        let again: Vec<_> = apps["versions"][0]["resources"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|resource| resource["resource"].as_str())
            .collect();
        assert_eq!(again, names);
        assert!(answer(&catalog, "/apis/none/v1", false).is_none());
    }
}
