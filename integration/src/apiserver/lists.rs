//! How lists and maps of built-in kinds merge and who owns them: what the real server's `OpenAPI`
//! says and `k8s-openapi`'s schemas leave out.

use serde_json::{Value, json};

use super::object;

/// A definition's list, the keys of its items for ownership, and the key for strategic merge.
const MAPS: &[(&str, &str, &[&str], &str)] = &[
    ("core.v1.Container", "env", &["name"], "name"),
    (
        "core.v1.Container",
        "ports",
        &["containerPort", "protocol"],
        "containerPort",
    ),
    (
        "core.v1.Container",
        "volumeDevices",
        &["devicePath"],
        "devicePath",
    ),
    (
        "core.v1.Container",
        "volumeMounts",
        &["mountPath"],
        "mountPath",
    ),
    ("core.v1.EphemeralContainer", "env", &["name"], "name"),
    (
        "core.v1.EphemeralContainer",
        "ports",
        &["containerPort", "protocol"],
        "containerPort",
    ),
    (
        "core.v1.EphemeralContainer",
        "volumeMounts",
        &["mountPath"],
        "mountPath",
    ),
    ("core.v1.NamespaceStatus", "conditions", &["type"], "type"),
    ("core.v1.NodeStatus", "conditions", &["type"], "type"),
    ("core.v1.PodSpec", "containers", &["name"], "name"),
    ("core.v1.PodSpec", "ephemeralContainers", &["name"], "name"),
    ("core.v1.PodSpec", "hostAliases", &["ip"], "ip"),
    ("core.v1.PodSpec", "imagePullSecrets", &["name"], "name"),
    ("core.v1.PodSpec", "initContainers", &["name"], "name"),
    ("core.v1.PodSpec", "resourceClaims", &["name"], "name"),
    ("core.v1.PodSpec", "schedulingGates", &["name"], "name"),
    (
        "core.v1.PodSpec",
        "topologySpreadConstraints",
        &["topologyKey", "whenUnsatisfiable"],
        "topologyKey",
    ),
    ("core.v1.PodSpec", "volumes", &["name"], "name"),
    ("core.v1.PodStatus", "conditions", &["type"], "type"),
    ("core.v1.PodStatus", "hostIPs", &["ip"], "ip"),
    ("core.v1.PodStatus", "podIPs", &["ip"], "ip"),
    ("core.v1.ServiceAccount", "secrets", &["name"], "name"),
    (
        "core.v1.ServiceSpec",
        "ports",
        &["port", "protocol"],
        "port",
    ),
    ("core.v1.ServiceStatus", "conditions", &["type"], "type"),
    ("apps.v1.DaemonSetStatus", "conditions", &["type"], "type"),
    ("apps.v1.DeploymentStatus", "conditions", &["type"], "type"),
    ("apps.v1.StatefulSetStatus", "conditions", &["type"], "type"),
    (
        "policy.v1.PodDisruptionBudgetStatus",
        "conditions",
        &["type"],
        "type",
    ),
    (
        "apiextensions.v1.CustomResourceDefinitionStatus",
        "conditions",
        &["type"],
        "",
    ),
    ("meta.v1.ObjectMeta", "ownerReferences", &["uid"], "uid"),
];

/// Lists that are sets.
const SETS: &[(&str, &str)] = &[
    ("meta.v1.ObjectMeta", "finalizers"),
    ("core.v1.NodeSpec", "podCIDRs"),
    ("discovery.v1.Endpoint", "addresses"),
];

/// Objects with one owner.
const ATOMIC: &[&str] = &[
    "core.v1.ConfigMapKeySelector",
    "core.v1.LocalObjectReference",
    "core.v1.NodeSelector",
    "core.v1.NodeSelectorTerm",
    "core.v1.ObjectFieldSelector",
    "core.v1.ObjectReference",
    "core.v1.ResourceFieldSelector",
    "core.v1.SecretKeySelector",
    "core.v1.TypedLocalObjectReference",
    "meta.v1.LabelSelector",
    "meta.v1.OwnerReference",
    "rbac.v1.RoleRef",
    "rbac.v1.Subject",
];

/// Maps with one owner.
const ATOMIC_MEMBERS: &[(&str, &str)] = &[
    ("core.v1.PodSpec", "nodeSelector"),
    ("core.v1.ServiceSpec", "selector"),
];

/// Where `protocol` is TCP unless it is said.
const PROTOCOLS: &[&str] = &["core.v1.ServicePort", "core.v1.ContainerPort"];

/// Writes all that into a definition.
pub(crate) fn annotate(name: &str, schema: &mut Value) {
    let this = |one: &str| {
        name.strip_suffix(one)
            .is_some_and(|before| before.ends_with('.'))
    };
    for (_, list, keys, merge_key) in MAPS.iter().filter(|(of, ..)| this(of)) {
        let Some(list) = member(schema, list) else {
            continue;
        };
        object::set(list, &["x-kubernetes-list-type"], "map");
        object::set(list, &["x-kubernetes-list-map-keys"], json!(keys));
        if !merge_key.is_empty() {
            object::set(list, &["x-kubernetes-patch-merge-key"], *merge_key);
            object::set(list, &["x-kubernetes-patch-strategy"], "merge");
        }
    }
    for (_, list) in SETS.iter().filter(|(of, _)| this(of)) {
        if let Some(list) = member(schema, list) {
            object::set(list, &["x-kubernetes-list-type"], "set");
            object::set(list, &["x-kubernetes-patch-strategy"], "merge");
        }
    }
    for (_, map) in ATOMIC_MEMBERS.iter().filter(|(of, _)| this(of)) {
        if let Some(map) = member(schema, map) {
            object::set(map, &["x-kubernetes-map-type"], "atomic");
        }
    }
    if ATOMIC.iter().any(|one| this(one)) {
        object::set(schema, &["x-kubernetes-map-type"], "atomic");
    }
    if PROTOCOLS.iter().any(|one| this(one))
        && let Some(protocol) = member(schema, "protocol")
    {
        object::set(protocol, &["default"], "TCP");
    }
}

fn member<'a>(schema: &'a mut Value, name: &str) -> Option<&'a mut Value> {
    schema.get_mut("properties")?.get_mut(name)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            kinds,
            schema::{ListType, Schema},
        },
        *,
    };

    fn definition(of: &str) -> &'static Schema {
        let name = kinds::definitions()
            .keys()
            .find(|name| name.ends_with(&format!(".{of}")));
        let name = name.unwrap_or_else(|| panic!("no definition {of}"));
        &kinds::definitions()[name]
    }

    #[test]
    fn every_line_of_the_tables_found_its_place() {
        for (of, list, keys, _) in MAPS {
            let keys = keys.iter().map(|key| (*key).to_owned()).collect();
            assert_eq!(
                definition(of).properties[*list].list,
                ListType::Map(keys),
                "{of}.{list}"
            );
        }
        for (of, list) in SETS {
            assert_eq!(
                definition(of).properties[*list].list,
                ListType::Set,
                "{of}.{list}"
            );
        }
        for (of, map) in ATOMIC_MEMBERS {
            assert!(definition(of).properties[*map].atomic, "{of}.{map}");
        }
        for of in ATOMIC {
            assert!(definition(of).atomic, "{of}");
        }
    }
}
