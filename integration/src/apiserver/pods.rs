//! Pods and templates of pods: defaults, and what is refused.

use std::collections::BTreeSet;

use regex::Regex;
use serde_json::{Value, json};

use super::{error::Cause, names, object, selector};

/// Lists of containers in a pod's specification.
const CONTAINERS: [&str; 2] = ["initContainers", "containers"];

/// Fills in a pod's specification at `path`.
pub(crate) fn fill_in(value: &mut Value, path: &[&str]) {
    let at = |key: &'static str| [path, &[key]].concat();
    for (key, default) in [
        ("restartPolicy", json!("Always")),
        ("dnsPolicy", json!("ClusterFirst")),
        ("schedulerName", json!("default-scheduler")),
        ("terminationGracePeriodSeconds", json!(30)),
        ("securityContext", json!({})),
    ] {
        object::set_default(value, &at(key), default);
    }
    if path == ["spec"] {
        // What admission adds to pods, and not to templates.
        object::set_default(value, &at("serviceAccountName"), "default");
    }
    if let Some(account) = object::text(value, &at("serviceAccountName")).map(str::to_owned) {
        object::set_default(value, &at("serviceAccount"), account);
    }
    for list in CONTAINERS {
        let Some(spec) = path
            .iter()
            .try_fold(&mut *value, |value, step| value.get_mut(*step))
        else {
            return;
        };
        let Some(Value::Array(containers)) = spec.get_mut(list) else {
            continue;
        };
        for container in containers {
            fill_in_container(container);
        }
    }
}

fn fill_in_container(container: &mut Value) {
    let image = object::text(container, &["image"]).unwrap_or_default();
    let name = image.rsplit('/').next().unwrap_or_default();
    let latest = !name.contains('@') && (!name.contains(':') || name.ends_with(":latest"));
    let pull = if latest { "Always" } else { "IfNotPresent" };
    object::set_default(container, &["imagePullPolicy"], pull);
    object::set_default(
        container,
        &["terminationMessagePath"],
        "/dev/termination-log",
    );
    object::set_default(container, &["terminationMessagePolicy"], "File");
    object::set_default(container, &["resources"], json!({}));
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if container.get(probe).is_none() {
            continue;
        }
        for (key, default) in [
            ("timeoutSeconds", 1),
            ("periodSeconds", 10),
            ("successThreshold", 1),
            ("failureThreshold", 3),
        ] {
            object::set_default(container, &[probe, key], default);
        }
        if object::at(container, &[probe, "httpGet"]).is_some() {
            object::set_default(container, &[probe, "httpGet", "scheme"], "HTTP");
            object::set_default(container, &[probe, "httpGet", "path"], "/");
        }
    }
}

/// What is wrong with a pod's specification at `path`.
pub(crate) fn check(value: &Value, path: &[&str], causes: &mut Vec<Cause>) {
    let spec = object::at(value, path).unwrap_or(&Value::Null);
    let place = path.join(".");
    for (key, known) in [
        ("restartPolicy", &["Always", "Never", "OnFailure"][..]),
        (
            "dnsPolicy",
            &["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"],
        ),
    ] {
        let got = object::text(spec, &[key]).unwrap_or_default();
        if !known.contains(&got) {
            causes.push(Cause::not_supported(
                format!("{place}.{key}"),
                &got.into(),
                known,
            ));
        }
    }
    if object::list(spec, &["containers"]).is_empty() {
        causes.push(Cause::required(format!("{place}.containers"), ""));
    }
    let mut volumes = BTreeSet::new();
    for (index, volume) in object::list(spec, &["volumes"]).iter().enumerate() {
        check_volume(
            volume,
            &format!("{place}.volumes[{index}]"),
            &mut volumes,
            causes,
        );
    }
    let host_network = spec.get("hostNetwork") == Some(&Value::Bool(true));
    let mut seen = BTreeSet::new();
    for list in CONTAINERS {
        for (index, container) in object::list(spec, &[list]).iter().enumerate() {
            let place = format!("{place}.{list}[{index}]");
            let name = object::text(container, &["name"]).unwrap_or_default();
            if !names::is_label(name) {
                let why = "must be an RFC 1123 label";
                causes.push(Cause::invalid(format!("{place}.name"), &name.into(), why));
            } else if !seen.insert(name) {
                causes.push(Cause::duplicate(format!("{place}.name"), &name.into()));
            }
            check_container(container, &place, &volumes, host_network, causes);
        }
    }
    for (index, toleration) in object::list(spec, &["tolerations"]).iter().enumerate() {
        let operator = object::text(toleration, &["operator"]).unwrap_or("Equal");
        let has = |key: &str| object::text(toleration, &[key]).is_some_and(|text| !text.is_empty());
        if operator == "Exists" && has("value") || operator == "Equal" && !has("key") {
            let field = format!("{place}.tolerations[{index}].operator");
            let why =
                "value must be empty when `operator` is 'Exists', and key is needed otherwise";
            causes.push(Cause::invalid(field, &operator.into(), why));
        }
        if !matches!(operator, "Exists" | "Equal") {
            let field = format!("{place}.tolerations[{index}].operator");
            causes.push(Cause::not_supported(
                field,
                &operator.into(),
                &["Equal", "Exists"],
            ));
        }
    }
}

fn check_volume<'a>(
    volume: &'a Value,
    place: &str,
    seen: &mut BTreeSet<&'a str>,
    causes: &mut Vec<Cause>,
) {
    let name = object::text(volume, &["name"]).unwrap_or_default();
    if !names::is_label(name) {
        let why = "must be an RFC 1123 label";
        causes.push(Cause::invalid(format!("{place}.name"), &name.into(), why));
    } else if !seen.insert(name) {
        causes.push(Cause::duplicate(format!("{place}.name"), &name.into()));
    }
    let sources = object::members(volume, &[])
        .filter(|(key, _)| *key != "name")
        .count();
    if sources > 1 {
        causes.push(Cause::forbidden(
            place,
            "may not specify more than 1 volume type",
        ));
    }
    let host_kinds = [
        "",
        "BlockDevice",
        "CharDevice",
        "Directory",
        "DirectoryOrCreate",
        "File",
        "FileOrCreate",
        "Socket",
    ];
    if let Some(host) = volume.get("hostPath") {
        let kind = object::text(host, &["type"]).unwrap_or_default();
        if !host_kinds.contains(&kind) {
            let field = format!("{place}.hostPath.type");
            causes.push(Cause::not_supported(field, &kind.into(), &host_kinds));
        }
        if object::text(host, &["path"])
            .unwrap_or_default()
            .split('/')
            .any(|part| part == "..")
        {
            let field = format!("{place}.hostPath.path");
            causes.push(Cause::invalid(field, &Value::Null, "must not contain '..'"));
        }
    }
    for source in object::list(volume, &["projected", "sources"]) {
        let seconds = object::at(source, &["serviceAccountToken", "expirationSeconds"]);
        if let Some(seconds) = seconds.and_then(Value::as_i64)
            && seconds < 600
        {
            let field = format!("{place}.projected.sources.serviceAccountToken.expirationSeconds");
            let why = "may not specify a duration less than 10 minutes";
            causes.push(Cause::invalid(field, &seconds.into(), why));
        }
    }
}

fn check_container(
    container: &Value,
    place: &str,
    volumes: &BTreeSet<&str>,
    host_network: bool,
    causes: &mut Vec<Cause>,
) {
    if object::text(container, &["image"]).is_none_or(str::is_empty) {
        causes.push(Cause::required(format!("{place}.image"), ""));
    }
    let pull = object::text(container, &["imagePullPolicy"]).unwrap_or_default();
    let known = ["Always", "IfNotPresent", "Never"];
    if !known.contains(&pull) {
        let field = format!("{place}.imagePullPolicy");
        causes.push(Cause::not_supported(field, &pull.into(), &known));
    }
    let mut paths = BTreeSet::new();
    for (index, mount) in object::list(container, &["volumeMounts"])
        .iter()
        .enumerate()
    {
        let place = format!("{place}.volumeMounts[{index}]");
        let name = object::text(mount, &["name"]).unwrap_or_default();
        if !volumes.contains(name) {
            causes.push(Cause {
                field: format!("{place}.name"),
                reason: "FieldValueNotFound",
                message: format!("Not found: {name:?}"),
            });
        }
        let path = object::text(mount, &["mountPath"]).unwrap_or_default();
        if !paths.insert(path) {
            let why = "must be unique";
            causes.push(Cause::invalid(
                format!("{place}.mountPath"),
                &path.into(),
                why,
            ));
        }
    }
    for (index, variable) in object::list(container, &["env"]).iter().enumerate() {
        let both = variable.get("valueFrom").is_some()
            && object::text(variable, &["value"]).is_some_and(|value| !value.is_empty());
        if both {
            let field = format!("{place}.env[{index}].valueFrom");
            let why = "may not be specified when `value` is not empty";
            causes.push(Cause::invalid(field, &Value::Null, why));
        }
    }
    check_ports(container, place, host_network, causes);
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let handlers = ["exec", "httpGet", "tcpSocket", "grpc"];
        if let Some(found) = container.get(probe) {
            let count = handlers
                .iter()
                .filter(|one| found.get(**one).is_some())
                .count();
            if count != 1 {
                let why = "must specify one handler type";
                causes.push(Cause::required(format!("{place}.{probe}"), why));
            }
        }
    }
    for list in ["limits", "requests"] {
        for (key, quantity) in object::members(container, &["resources", list]) {
            let field = format!("{place}.resources.{list}[{key}]");
            let text = quantity.as_str();
            let text = text.map_or_else(|| quantity.to_string(), str::to_owned);
            if !is_quantity(&text) {
                let why = "quantities must match the regular expression of resource.Quantity";
                causes.push(Cause::invalid(field, quantity, why));
            } else if !selector::is_label_key(key) {
                causes.push(Cause::invalid(
                    field,
                    &key.as_str().into(),
                    "must be a resource's name",
                ));
            }
        }
    }
}

fn check_ports(container: &Value, place: &str, host_network: bool, causes: &mut Vec<Cause>) {
    let mut seen = BTreeSet::new();
    for (index, port) in object::list(container, &["ports"]).iter().enumerate() {
        let place = format!("{place}.ports[{index}]");
        let number = |key: &str| port.get(key).and_then(Value::as_i64);
        let container_port = number("containerPort").unwrap_or(0);
        if !(1..=65_535).contains(&container_port) {
            let why = "must be between 1 and 65535, inclusive";
            causes.push(Cause::invalid(
                format!("{place}.containerPort"),
                &container_port.into(),
                why,
            ));
        }
        if host_network && number("hostPort").is_some_and(|port| port != container_port) {
            let why = "must match `containerPort` when `hostNetwork` is true";
            causes.push(Cause::invalid(format!("{place}.hostPort"), port, why));
        }
        let protocol = object::text(port, &["protocol"]).unwrap_or_default();
        if !["TCP", "UDP", "SCTP"].contains(&protocol) {
            let field = format!("{place}.protocol");
            causes.push(Cause::not_supported(
                field,
                &protocol.into(),
                &["SCTP", "TCP", "UDP"],
            ));
        }
        if let Some(name) = object::text(port, &["name"]) {
            let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            let letter = name.chars().any(|c| c.is_ascii_lowercase());
            if name.len() > 15 || !name.chars().all(good) || !letter || name.contains("--") {
                let why = "must be no more than 15 characters of a-z, 0-9 and -, with a letter";
                causes.push(Cause::invalid(format!("{place}.name"), &name.into(), why));
            } else if !seen.insert(name) {
                causes.push(Cause::duplicate(format!("{place}.name"), &name.into()));
            }
        }
    }
}

fn is_quantity(text: &str) -> bool {
    let form = r"^[+-]?([0-9]+|[0-9]+\.[0-9]*|\.[0-9]+)(m|u|n|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|[eE][+-]?[0-9]+)?$";
    Regex::new(form).is_ok_and(|form| form.is_match(text))
}

/// Of a pod's specification, images and a little more may change.
pub(crate) fn check_update(old: &Value, new: &Value, causes: &mut Vec<Cause>) {
    let fixed = |value: &Value| {
        let mut spec = value.get("spec").cloned().unwrap_or_default();
        for key in [
            "activeDeadlineSeconds",
            "terminationGracePeriodSeconds",
            "tolerations",
            "nodeName",
        ] {
            object::remove(&mut spec, &[key]);
        }
        for list in CONTAINERS {
            let containers = spec.get_mut(list).and_then(Value::as_array_mut);
            for container in containers.into_iter().flatten() {
                object::remove(container, &["image"]);
            }
        }
        spec
    };
    let node = |value: &Value| {
        object::text(value, &["spec", "nodeName"])
            .unwrap_or_default()
            .to_owned()
    };
    let moved = !node(old).is_empty() && node(old) != node(new);
    if fixed(old) != fixed(new) || moved {
        let why = "pod updates may not change fields other than `spec.containers[*].image`, \
                   `spec.initContainers[*].image`, `spec.activeDeadlineSeconds`, `spec.tolerations`, \
                   `spec.terminationGracePeriodSeconds`";
        causes.push(Cause::forbidden("spec", why));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(extra: Value) -> Vec<String> {
        let mut pod = json!({"spec": {"containers": [{"name": "c", "image": "i:1"}]}});
        super::super::patch::merge(&mut pod, &json!({"spec": extra}));
        fill_in(&mut pod, &["spec"]);
        let mut causes = Vec::new();
        check(&pod, &["spec"], &mut causes);
        causes.into_iter().map(|cause| cause.field).collect()
    }

    #[test]
    fn good_pods_pass_and_wrong_ones_are_named() {
        let container = |extra: Value| {
            let mut container = json!({"name": "c", "image": "i:1"});
            super::super::patch::merge(&mut container, &extra);
            json!({"containers": [container]})
        };
        assert_eq!(wrong(json!({})), Vec::<String>::new());
        for (spec, field) in [
            (json!({"containers": []}), "spec.containers"),
            (json!({"restartPolicy": "Sometimes"}), "spec.restartPolicy"),
            (container(json!({"image": ""})), "spec.containers[0].image"),
            (container(json!({"name": "A"})), "spec.containers[0].name"),
            (
                container(json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]})),
                "spec.containers[0].volumeMounts[0].name",
            ),
            (
                container(json!({"resources": {"limits": {"memory": "1 GB"}}})),
                "spec.containers[0].resources.limits[memory]",
            ),
            (
                container(json!({"livenessProbe": {}})),
                "spec.containers[0].livenessProbe",
            ),
            (
                json!({"hostNetwork": true, "containers": [{
                    "name": "c", "image": "i",
                    "ports": [{"containerPort": 1, "hostPort": 2, "protocol": "TCP"}],
                }]}),
                "spec.containers[0].ports[0].hostPort",
            ),
            (
                json!({"volumes": [{"name": "v", "emptyDir": {}, "hostPath": {"path": "/"}}]}),
                "spec.volumes[0]",
            ),
            (
                json!({"tolerations": [{"operator": "Exists", "value": "v"}]}),
                "spec.tolerations[0].operator",
            ),
        ] {
            assert_eq!(wrong(spec.clone()), [field], "{spec}");
        }
    }

    #[test]
    fn a_pods_specification_stays() {
        let pod = |image: &str, host: bool| json!({"spec": {"hostNetwork": host, "containers": [{"image": image}]}});
        let mut causes = Vec::new();
        check_update(&pod("a", false), &pod("b", false), &mut causes);
        assert_eq!(causes, []);
        check_update(&pod("a", false), &pod("a", true), &mut causes);
        assert_eq!(causes.len(), 1);
    }

    #[test]
    fn quantities_are_told_from_others() {
        for good in ["1", "100m", "1.5Gi", "1e3", ".5"] {
            assert!(is_quantity(good), "{good}");
        }
        for bad in ["", "1 Gi", "1GB", "a", "1K"] {
            assert!(!is_quantity(bad), "{bad}");
        }
    }
}
