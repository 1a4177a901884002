//! Built-in kinds: what they say by saying nothing, and what is refused beyond their schemas.

use std::{collections::BTreeSet, net::IpAddr};

use serde_json::{Value, json};

use super::{error::Cause, kinds::Kind, object, pods, selector, service};

pub(crate) const NAMESPACES: &str = "/namespaces";

/// Values that a field may have, by kind and path; `*` is every item of a list.
const ENUMS: &[(&str, &[&str], &[&str])] = &[
    (
        "Service",
        &["spec", "type"],
        &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"],
    ),
    (
        "Service",
        &["spec", "sessionAffinity"],
        &["ClientIP", "None"],
    ),
    (
        "Service",
        &["spec", "internalTrafficPolicy"],
        &["Cluster", "Local"],
    ),
    (
        "Service",
        &["spec", "externalTrafficPolicy"],
        &["Cluster", "Local"],
    ),
    (
        "Service",
        &["spec", "ipFamilyPolicy"],
        &["PreferDualStack", "RequireDualStack", "SingleStack"],
    ),
    (
        "Service",
        &["spec", "trafficDistribution"],
        &["PreferClose", "PreferSameNode", "PreferSameZone"],
    ),
    (
        "Service",
        &["spec", "ports", "*", "protocol"],
        &["SCTP", "TCP", "UDP"],
    ),
    ("EndpointSlice", &["addressType"], &["FQDN", "IPv4", "IPv6"]),
    (
        "EndpointSlice",
        &["ports", "*", "protocol"],
        &["SCTP", "TCP", "UDP"],
    ),
    (
        "DaemonSet",
        &["spec", "updateStrategy", "type"],
        &["OnDelete", "RollingUpdate"],
    ),
    (
        "Deployment",
        &["spec", "strategy", "type"],
        &["Recreate", "RollingUpdate"],
    ),
    (
        "NetworkPolicy",
        &["spec", "policyTypes", "*"],
        &["Egress", "Ingress"],
    ),
    ("Event", &["type"], &["Normal", "Warning"]),
    (
        "RoleBinding",
        &["roleRef", "kind"],
        &["ClusterRole", "Role"],
    ),
    ("ClusterRoleBinding", &["roleRef", "kind"], &["ClusterRole"]),
    (
        "RoleBinding",
        &["subjects", "*", "kind"],
        &["Group", "ServiceAccount", "User"],
    ),
    (
        "ClusterRoleBinding",
        &["subjects", "*", "kind"],
        &["Group", "ServiceAccount", "User"],
    ),
];

/// Fields that never change.
const IMMUTABLE: &[(&str, &[&str])] = &[
    ("EndpointSlice", &["addressType"]),
    ("DaemonSet", &["spec", "selector"]),
    ("Deployment", &["spec", "selector"]),
    ("RoleBinding", &["roleRef"]),
    ("ClusterRoleBinding", &["roleRef"]),
    ("Secret", &["type"]),
    ("CustomResourceDefinition", &["spec", "scope"]),
    ("CustomResourceDefinition", &["spec", "names", "kind"]),
];

/// Endpoints of one slice, and its ports.
const SLICE_ENDPOINTS_MAX: usize = 1_000;
const SLICE_PORTS_MAX: usize = 20_000;

/// Bytes of a `ConfigMap` or Secret.
const DATA_MAX: usize = 1 << 20;

/// Fills in what the real server fills in.
pub(crate) fn fill_in(kind: &Kind, value: &mut Value) {
    match kind.kind.as_str() {
        "Namespace" => {
            let name = object::name(value).to_owned();
            object::set(
                value,
                &["metadata", "labels", "kubernetes.io/metadata.name"],
                name,
            );
            object::set_default(value, &["spec", "finalizers"], json!(["kubernetes"]));
            object::set_default(value, &["status", "phase"], "Active");
        }
        "Service" => service::fill_in(value),
        "Pod" => {
            pods::fill_in(value, &["spec"]);
            object::set_default(value, &["status", "phase"], "Pending");
        }
        "EndpointSlice" => {
            if let Some(Value::Array(ports)) = value.get_mut("ports") {
                for port in ports {
                    object::set_default(port, &["name"], "");
                    object::set_default(port, &["protocol"], "TCP");
                }
            }
        }
        "Secret" => {
            object::set_default(value, &["type"], "Opaque");
            let given: Vec<_> = object::members(value, &["stringData"])
                .filter_map(|(key, text)| Some((key.clone(), text.as_str()?.to_owned())))
                .collect();
            for (key, text) in given {
                use base64::Engine as _;
                let text = base64::engine::general_purpose::STANDARD.encode(text);
                object::set(value, &["data", &key], text);
            }
            object::remove(value, &["stringData"]);
        }
        "DaemonSet" => {
            pods::fill_in(value, &["spec", "template", "spec"]);
            object::set_default(value, &["spec", "revisionHistoryLimit"], 10);
            object::set_default(value, &["spec", "updateStrategy", "type"], "RollingUpdate");
            if object::text(value, &["spec", "updateStrategy", "type"]) == Some("RollingUpdate") {
                let place = ["spec", "updateStrategy", "rollingUpdate"];
                object::set_default(value, &place, json!({}));
                for (key, default) in [("maxUnavailable", 1), ("maxSurge", 0)] {
                    object::set_default(value, &[&place[..], &[key]].concat(), default);
                }
            }
        }
        "Deployment" => {
            pods::fill_in(value, &["spec", "template", "spec"]);
            object::set_default(value, &["spec", "replicas"], 1);
            object::set_default(value, &["spec", "revisionHistoryLimit"], 10);
            object::set_default(value, &["spec", "progressDeadlineSeconds"], 600);
            object::set_default(value, &["spec", "strategy", "type"], "RollingUpdate");
            if object::text(value, &["spec", "strategy", "type"]) == Some("RollingUpdate") {
                for key in ["maxUnavailable", "maxSurge"] {
                    let place = ["spec", "strategy", "rollingUpdate", key];
                    object::set_default(value, &place, "25%");
                }
            }
        }
        "StatefulSet" => {
            pods::fill_in(value, &["spec", "template", "spec"]);
            object::set_default(value, &["spec", "replicas"], 1);
            object::set_default(value, &["spec", "revisionHistoryLimit"], 10);
            object::set_default(value, &["spec", "podManagementPolicy"], "OrderedReady");
            let policy = json!({"whenDeleted": "Retain", "whenScaled": "Retain"});
            object::set_default(
                value,
                &["spec", "persistentVolumeClaimRetentionPolicy"],
                policy,
            );
            object::set_default(value, &["spec", "updateStrategy", "type"], "RollingUpdate");
            if object::text(value, &["spec", "updateStrategy", "type"]) == Some("RollingUpdate") {
                let place = ["spec", "updateStrategy", "rollingUpdate", "partition"];
                object::set_default(value, &place, 0);
            }
            let claims = value
                .get_mut("spec")
                .and_then(|spec| spec.get_mut("volumeClaimTemplates"));
            for claim in claims.and_then(Value::as_array_mut).into_iter().flatten() {
                object::set_default(claim, &["apiVersion"], "v1");
                object::set_default(claim, &["kind"], "PersistentVolumeClaim");
                object::set_default(claim, &["spec", "volumeMode"], "Filesystem");
                object::set_default(claim, &["status", "phase"], "Pending");
            }
        }
        "NetworkPolicy" => {
            let egress = object::at(value, &["spec", "egress"]).is_some();
            let types = if egress {
                json!(["Ingress", "Egress"])
            } else {
                json!(["Ingress"])
            };
            object::set_default(value, &["spec", "policyTypes"], types);
        }
        "RoleBinding" | "ClusterRoleBinding" => {
            let group = "rbac.authorization.k8s.io";
            object::set_default(value, &["roleRef", "apiGroup"], group);
            if let Some(Value::Array(subjects)) = value.get_mut("subjects") {
                for subject in subjects {
                    if object::text(subject, &["kind"]) != Some("ServiceAccount") {
                        object::set_default(subject, &["apiGroup"], group);
                    }
                }
            }
        }
        _ => {}
    }
}

/// What controllers of a real cluster put into every namespace.
pub(crate) fn furniture(namespace: &str, ca_pem: &str) -> [Value; 2] {
    let metadata = |name: &str| json!({"name": name, "namespace": namespace});
    [
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata("default")}),
        json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata("kube-root-ca.crt"),
            "data": {"ca.crt": ca_pem},
        }),
    ]
}

/// What is wrong with an object beyond its schema.
pub(crate) fn check(kind: &Kind, old: Option<&Value>, new: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let name = kind.kind.as_str();
    for (_, path, known) in ENUMS.iter().filter(|(of, ..)| *of == name) {
        check_enum(new, path, String::new(), known, &mut causes);
    }
    for (_, path) in IMMUTABLE.iter().filter(|(of, _)| *of == name) {
        if let Some(old) = old
            && object::at(old, path) != object::at(new, path)
        {
            let got = object::at(new, path).unwrap_or(&Value::Null);
            causes.push(Cause::invalid(path.join("."), got, "field is immutable"));
        }
    }
    match name {
        "Service" => causes.extend(service::check(new)),
        "EndpointSlice" => check_slice(new, &mut causes),
        "ConfigMap" | "Secret" => check_data(old, new, &mut causes),
        "Lease" => check_lease(new, &mut causes),
        "Event" => check_event(kind, new, &mut causes),
        "Pod" => {
            pods::check(new, &["spec"], &mut causes);
            if let Some(old) = old {
                pods::check_update(old, new, &mut causes);
            }
        }
        "DaemonSet" | "Deployment" => check_workload(name, new, &mut causes),
        "StatefulSet" => {
            check_workload(name, new, &mut causes);
            if let Some(old) = old {
                check_set_update(old, new, &mut causes);
            }
        }
        "Role" | "ClusterRole" => check_rules(name, new, &mut causes),
        "RoleBinding" | "ClusterRoleBinding" => check_binding(new, &mut causes),
        "PodDisruptionBudget" => {
            let has = |key: &str| object::at(new, &["spec", key]).is_some();
            if has("minAvailable") && has("maxUnavailable") {
                let why = "minAvailable and maxUnavailable cannot be both set";
                causes.push(Cause::invalid("spec", &"object".into(), why));
            }
        }
        _ => {}
    }
    causes
}

fn check_enum(
    value: &Value,
    path: &[&str],
    place: String,
    known: &[&str],
    causes: &mut Vec<Cause>,
) {
    let Some((step, rest)) = path.split_first() else {
        if !value.as_str().is_some_and(|text| known.contains(&text)) {
            causes.push(Cause::not_supported(place, value, known));
        }
        return;
    };
    if *step == "*" {
        for (index, item) in value.as_array().into_iter().flatten().enumerate() {
            check_enum(item, rest, format!("{place}[{index}]"), known, causes);
        }
    } else if let Some(member) = value.get(*step) {
        check_enum(
            member,
            rest,
            super::schema::join(&place, step),
            known,
            causes,
        );
    }
}

fn check_slice(slice: &Value, causes: &mut Vec<Cause>) {
    let kind = object::text(slice, &["addressType"]).unwrap_or_default();
    if kind.is_empty() {
        causes.push(Cause::required("addressType", ""));
    }
    let endpoints = object::list(slice, &["endpoints"]);
    if endpoints.len() > SLICE_ENDPOINTS_MAX {
        causes.push(too_many("endpoints", endpoints.len(), SLICE_ENDPOINTS_MAX));
    }
    for (index, endpoint) in endpoints.iter().enumerate() {
        let path = format!("endpoints[{index}].addresses");
        let addresses = object::texts(endpoint, &["addresses"]);
        if addresses.is_empty() {
            causes.push(Cause::required(&path, "must contain at least 1 address"));
        }
        if addresses.len() > 100 {
            causes.push(too_many(&path, addresses.len(), 100));
        }
        for (index, address) in addresses.into_iter().enumerate() {
            let parsed = address.parse::<IpAddr>();
            let good = match kind {
                "IPv4" => parsed.as_ref().is_ok_and(IpAddr::is_ipv4),
                "IPv6" => parsed.as_ref().is_ok_and(IpAddr::is_ipv6),
                _ => super::names::is_subdomain(address),
            };
            let special = parsed.is_ok_and(|address| {
                address.is_loopback() || address.is_unspecified() || address.is_multicast()
            });
            if !good || special {
                let why =
                    format!("must be a valid {kind} address, and neither loopback nor multicast");
                causes.push(Cause::invalid(
                    format!("{path}[{index}]"),
                    &address.into(),
                    &why,
                ));
            }
        }
        if let Some(host) = object::text(endpoint, &["hostname"])
            && !super::names::is_label(host)
        {
            let field = format!("endpoints[{index}].hostname");
            causes.push(Cause::invalid(
                field,
                &host.into(),
                "must be an RFC 1123 label",
            ));
        }
    }
    let ports = object::list(slice, &["ports"]);
    if ports.len() > SLICE_PORTS_MAX {
        causes.push(too_many("ports", ports.len(), SLICE_PORTS_MAX));
    }
    let mut seen = BTreeSet::new();
    for (index, port) in ports.iter().enumerate() {
        let name = object::text(port, &["name"]).unwrap_or_default();
        if !seen.insert(name) {
            causes.push(Cause::duplicate(
                format!("ports[{index}].name"),
                &name.into(),
            ));
        }
    }
}

fn too_many(field: &str, got: usize, max: usize) -> Cause {
    Cause {
        field: field.to_owned(),
        reason: "FieldValueTooMany",
        message: format!("Too many: {got}: must have at most {max} items"),
    }
}

fn check_data(old: Option<&Value>, new: &Value, causes: &mut Vec<Cause>) {
    let mut bytes = 0;
    for list in ["data", "binaryData"] {
        for (key, value) in object::members(new, &[list]) {
            bytes += key.len() + value.as_str().map_or(0, str::len);
            let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            if !key.chars().all(good) || key.starts_with("..") || key == "." || key.len() > 253 {
                let why =
                    "a valid config key must consist of alphanumeric characters, '-', '_' or '.'";
                causes.push(Cause::invalid(list, &key.as_str().into(), why));
            }
        }
    }
    if bytes > DATA_MAX {
        causes.push(Cause {
            field: "data".to_owned(),
            reason: "FieldValueTooLong",
            message: format!("Too long: may not be more than {DATA_MAX} bytes"),
        });
    }
    let Some(old) = old else { return };
    if old.get("immutable") == Some(&Value::Bool(true)) {
        for key in ["data", "binaryData", "immutable"] {
            if old.get(key) != new.get(key) {
                causes.push(Cause::forbidden(
                    key,
                    "field is immutable when `immutable` is set",
                ));
            }
        }
    }
}

fn check_lease(lease: &Value, causes: &mut Vec<Cause>) {
    let number = |key: &str| object::at(lease, &["spec", key]).and_then(Value::as_i64);
    if let Some(seconds) = number("leaseDurationSeconds")
        && seconds <= 0
    {
        let why = "must be greater than 0";
        causes.push(Cause::invalid(
            "spec.leaseDurationSeconds",
            &seconds.into(),
            why,
        ));
    }
    if let Some(count) = number("leaseTransitions")
        && count < 0
    {
        let why = "must be greater than or equal to 0";
        causes.push(Cause::invalid("spec.leaseTransitions", &count.into(), why));
    }
    if object::text(lease, &["spec", "holderIdentity"]) == Some("") {
        let why = "must not be empty";
        causes.push(Cause::invalid("spec.holderIdentity", &"".into(), why));
    }
}

fn check_event(kind: &Kind, event: &Value, causes: &mut Vec<Cause>) {
    if kind.group.is_empty() {
        return;
    }
    if object::text(event, &["eventTime"]).is_none() {
        causes.push(Cause::required("eventTime", ""));
        return;
    }
    for (key, max) in [
        ("reportingController", 253),
        ("reportingInstance", 128),
        ("action", 128),
        ("reason", 128),
        ("type", 8),
    ] {
        let text = object::text(event, &[key]).unwrap_or_default();
        if text.is_empty() {
            causes.push(Cause::required(key, ""));
        } else if text.len() > max {
            let why = format!("can have at most {max} characters");
            causes.push(Cause::invalid(key, &text.into(), &why));
        }
    }
    let controller = object::text(event, &["reportingController"]).unwrap_or_default();
    if !controller.is_empty() && !selector::is_label_key(&controller.to_lowercase()) {
        let why = "must be a qualified name";
        causes.push(Cause::invalid(
            "reportingController",
            &controller.into(),
            why,
        ));
    }
    if object::text(event, &["note"]).is_some_and(|note| note.len() > 1_024) {
        causes.push(Cause::invalid(
            "note",
            &"".into(),
            "can have at most 1024 characters",
        ));
    }
    let namespace = object::text(event, &["regarding", "namespace"]).unwrap_or_default();
    let expected = if namespace.is_empty() {
        "default"
    } else {
        namespace
    };
    if object::namespace(event) != expected {
        let why = "does not match event.namespace";
        causes.push(Cause::invalid(
            "regarding.namespace",
            &namespace.into(),
            why,
        ));
    }
}

fn check_workload(kind: &str, new: &Value, causes: &mut Vec<Cause>) {
    let template = object::at(new, &["spec", "template"]).unwrap_or(&Value::Null);
    match object::at(new, &["spec", "selector"]) {
        None => causes.push(Cause::required("spec.selector", "")),
        Some(one) if one.as_object().is_none_or(serde_json::Map::is_empty) => {
            let why = format!("empty selector is invalid for {}", kind.to_lowercase());
            causes.push(Cause::invalid("spec.selector", one, &why));
        }
        Some(one) if !selector::selects(one, &object::labels(template)) => {
            let got = object::at(template, &["metadata", "labels"]).unwrap_or(&Value::Null);
            let why = "`selector` does not match template `labels`";
            causes.push(Cause::invalid("spec.template.metadata.labels", got, why));
        }
        Some(_) => {}
    }
    // Mounts of claims are mounts of volumes that the set makes.
    let mut made = new.clone();
    let mut volumes = object::list(template, &["spec", "volumes"]).to_vec();
    for claim in object::list(new, &["spec", "volumeClaimTemplates"]) {
        volumes.push(json!({"name": object::name(claim)}));
    }
    object::set(&mut made, &["spec", "template", "spec", "volumes"], volumes);
    pods::check(&made, &["spec", "template", "spec"], causes);
    let restart = object::text(template, &["spec", "restartPolicy"]).unwrap_or_default();
    if restart != "Always" {
        let field = "spec.template.spec.restartPolicy";
        causes.push(Cause::not_supported(field, &restart.into(), &["Always"]));
    }
    if kind == "DaemonSet" {
        let zero = |key: &str| {
            let place = ["spec", "updateStrategy", "rollingUpdate", key];
            let value = object::at(new, &place);
            value.is_none_or(|value| *value == json!(0) || *value == json!("0%"))
        };
        let rolling =
            object::text(new, &["spec", "updateStrategy", "type"]) == Some("RollingUpdate");
        if rolling && zero("maxUnavailable") == zero("maxSurge") {
            let why = "cannot be 0 when `maxSurge` is 0, and not both may be set";
            let field = "spec.updateStrategy.rollingUpdate.maxUnavailable";
            causes.push(Cause::invalid(field, &Value::Null, why));
        }
    }
}

/// Of a stateful set's specification, little may change.
fn check_set_update(old: &Value, new: &Value, causes: &mut Vec<Cause>) {
    let fixed = |value: &Value| {
        let mut spec = value.get("spec").cloned().unwrap_or_default();
        for key in [
            "replicas",
            "ordinals",
            "template",
            "updateStrategy",
            "revisionHistoryLimit",
            "persistentVolumeClaimRetentionPolicy",
            "minReadySeconds",
        ] {
            object::remove(&mut spec, &[key]);
        }
        spec
    };
    if fixed(old) != fixed(new) {
        let why = "updates to statefulset spec for fields other than 'replicas', 'ordinals', \
                   'template', 'updateStrategy', 'revisionHistoryLimit', \
                   'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden";
        causes.push(Cause::forbidden("spec", why));
    }
}

fn check_rules(kind: &str, role: &Value, causes: &mut Vec<Cause>) {
    for (index, rule) in object::list(role, &["rules"]).iter().enumerate() {
        let path = format!("rules[{index}]");
        let has = |key: &str| !object::list(rule, &[key]).is_empty();
        if !has("verbs") {
            causes.push(Cause::required(
                format!("{path}.verbs"),
                "verbs must contain at least one value",
            ));
        }
        if has("nonResourceURLs") {
            let field = format!("{path}.nonResourceURLs");
            let got = rule.get("nonResourceURLs").unwrap_or(&Value::Null);
            if kind == "Role" {
                let why = "namespaced rules cannot apply to non-resource URLs";
                causes.push(Cause::invalid(field, got, why));
            } else if has("resources") || has("apiGroups") || has("resourceNames") {
                let why = "rules cannot apply to both regular resources and non-resource URLs";
                causes.push(Cause::invalid(field, got, why));
            }
            continue;
        }
        if !has("apiGroups") {
            let why = "resource rules must supply at least one api group";
            causes.push(Cause::required(format!("{path}.apiGroups"), why));
        }
        if !has("resources") {
            let why = "resource rules must supply at least one resource";
            causes.push(Cause::required(format!("{path}.resources"), why));
        }
    }
}

fn check_binding(binding: &Value, causes: &mut Vec<Cause>) {
    let group = "rbac.authorization.k8s.io";
    if object::text(binding, &["roleRef", "apiGroup"]) != Some(group) {
        let got = object::at(binding, &["roleRef", "apiGroup"]).unwrap_or(&Value::Null);
        causes.push(Cause::not_supported("roleRef.apiGroup", got, &[group]));
    }
    if object::text(binding, &["roleRef", "name"]).is_none_or(str::is_empty) {
        causes.push(Cause::required("roleRef.name", ""));
    }
    for (index, subject) in object::list(binding, &["subjects"]).iter().enumerate() {
        let path = format!("subjects[{index}]");
        if object::text(subject, &["name"]).is_none_or(str::is_empty) {
            causes.push(Cause::required(format!("{path}.name"), ""));
        }
        let account = object::text(subject, &["kind"]) == Some("ServiceAccount");
        if account && object::text(subject, &["namespace"]).is_none_or(str::is_empty) {
            causes.push(Cause::required(format!("{path}.namespace"), ""));
        }
        let wanted = if account { "" } else { group };
        let got = object::text(subject, &["apiGroup"]).unwrap_or_default();
        if got != wanted {
            let field = format!("{path}.apiGroup");
            causes.push(Cause::not_supported(field, &got.into(), &[wanted]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::kinds::{Catalog, definitions},
        *,
    };

    fn wrong(group: &str, plural: &str, mut value: Value) -> Vec<String> {
        let catalog = Catalog::default();
        let kind = catalog.find(group, "v1", plural).unwrap();
        kind.schema.fill_in(&mut value, definitions());
        fill_in(kind, &mut value);
        let causes = check(kind, None, &value);
        causes.into_iter().map(|cause| cause.field).collect()
    }

    #[test]
    fn slices_have_addresses_of_their_family() {
        let slice = |family: &str, address: &str| json!({"addressType": family, "endpoints": [{"addresses": [address]}]});
        let wrong = |value| wrong("discovery.k8s.io", "endpointslices", value);
        assert_eq!(wrong(slice("IPv4", "10.0.0.1")), Vec::<String>::new());
        assert_eq!(
            wrong(slice("IPv4", "fd00::1")),
            ["endpoints[0].addresses[0]"]
        );
        assert_eq!(
            wrong(slice("IPv4", "127.0.0.1")),
            ["endpoints[0].addresses[0]"]
        );
        assert_eq!(wrong(slice("v4", "a"))[0], "addressType");
        let many = vec![json!({"addresses": ["10.0.0.1"]}); SLICE_ENDPOINTS_MAX + 1];
        assert_eq!(
            wrong(json!({"addressType": "IPv4", "endpoints": many})),
            ["endpoints"]
        );
    }

    #[test]
    fn workloads_select_their_own_pods() {
        let set = |label: &str, extra: Value| {
            let mut set = json!({"metadata": {"name": "d"}, "spec": {
                "selector": {"matchLabels": {"app": "a"}},
                "template": {"metadata": {"labels": {"app": label}}, "spec": {
                    "containers": [{"name": "c", "image": "i"}],
                }},
            }});
            super::super::patch::merge(&mut set, &extra);
            wrong("apps", "daemonsets", set)
        };
        assert_eq!(set("a", json!({})), Vec::<String>::new());
        assert_eq!(set("b", json!({})), ["spec.template.metadata.labels"]);
        let never = json!({"spec": {"template": {"spec": {"restartPolicy": "Never"}}}});
        assert_eq!(set("a", never), ["spec.template.spec.restartPolicy"]);
    }

    #[test]
    fn roles_and_bindings_are_whole() {
        let group = "rbac.authorization.k8s.io";
        assert_eq!(
            wrong(
                group,
                "roles",
                json!({"rules": [{"resources": ["pods"], "apiGroups": [""]}]})
            ),
            ["rules[0].verbs"]
        );
        assert_eq!(
            wrong(
                group,
                "roles",
                json!({"rules": [{"verbs": ["get"], "nonResourceURLs": ["/"]}]})
            ),
            ["rules[0].nonResourceURLs"]
        );
        let binding = json!({"roleRef": {"kind": "Role", "name": "r"}, "subjects": [{"kind": "ServiceAccount", "name": "s"}]});
        assert_eq!(
            wrong(group, "rolebindings", binding),
            ["subjects[0].namespace"]
        );
    }

    #[test]
    fn leases_and_events_are_checked() {
        let lease = json!({"spec": {"leaseDurationSeconds": 0, "holderIdentity": ""}});
        assert_eq!(wrong("coordination.k8s.io", "leases", lease).len(), 2);
        let event = json!({"metadata": {"namespace": "default"}, "eventTime": "x", "type": "Bad"});
        let said = wrong("events.k8s.io", "events", event);
        assert!(
            said.contains(&"type".to_owned()) && said.contains(&"reason".to_owned()),
            "{said:?}"
        );
    }
}
