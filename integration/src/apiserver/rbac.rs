//! Who may do what, by roles and bindings.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{object, store::Store};

pub(crate) const ROLES: &str = "rbac.authorization.k8s.io/roles";
pub(crate) const CLUSTER_ROLES: &str = "rbac.authorization.k8s.io/clusterroles";
pub(crate) const ROLE_BINDINGS: &str = "rbac.authorization.k8s.io/rolebindings";
pub(crate) const CLUSTER_ROLE_BINDINGS: &str = "rbac.authorization.k8s.io/clusterrolebindings";

/// Its members may do everything, whatever roles say.
pub(crate) const MASTERS: &str = "system:masters";

/// Who asks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) groups: Vec<String>,
    pub(crate) extra: BTreeMap<String, Vec<String>>,
}

/// What is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Action {
    pub(crate) verb: String,
    pub(crate) group: String,
    /// Empty for a path that is no resource.
    pub(crate) resource: String,
    pub(crate) subresource: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) path: String,
}

impl Action {
    /// As the refusal names it.
    pub(crate) fn refusal(&self, user: &User) -> String {
        let who = &user.name;
        if self.resource.is_empty() {
            return format!("User {who:?} cannot {} path {:?}", self.verb, self.path);
        }
        let resource = if self.subresource.is_empty() {
            self.resource.clone()
        } else {
            format!("{}/{}", self.resource, self.subresource)
        };
        let scope = if self.namespace.is_empty() {
            "at the cluster scope".to_owned()
        } else {
            format!("in the namespace {:?}", self.namespace)
        };
        let verb = &self.verb;
        let group = &self.group;
        format!("User {who:?} cannot {verb} resource {resource:?} in API group {group:?} {scope}")
    }
}

/// Whether some rule allows it.
pub(crate) fn allowed(store: &Store, user: &User, action: &Action) -> bool {
    user.groups.iter().any(|group| group == MASTERS)
        || rules(store, user, &action.namespace)
            .iter()
            .any(|rule| allows(rule, action))
}

/// The rules that hold for a user in a namespace (with none, at the cluster's scope).
pub(crate) fn rules(store: &Store, user: &User, namespace: &str) -> Vec<Value> {
    let mut rules = Vec::new();
    for binding in store.list(CLUSTER_ROLE_BINDINGS, None) {
        collect(store, user, &binding.value(), &mut rules);
    }
    if !namespace.is_empty() {
        for binding in store.list(ROLE_BINDINGS, Some(namespace)) {
            collect(store, user, &binding.value(), &mut rules);
        }
    }
    rules
}

fn collect(store: &Store, user: &User, binding: &Value, rules: &mut Vec<Value>) {
    let namespace = object::namespace(binding);
    let subjects = object::list(binding, &["subjects"]);
    if subjects.iter().any(|subject| is(subject, user, namespace)) {
        let role = object::at(binding, &["roleRef"]).unwrap_or(&Value::Null);
        rules.extend(role_rules(store, role, namespace));
    }
}

/// The rules of what a `roleRef` names.
pub(crate) fn role_rules(store: &Store, role: &Value, namespace: &str) -> Vec<Value> {
    let name = object::text(role, &["name"]).unwrap_or_default();
    let found = match object::text(role, &["kind"]) {
        Some("ClusterRole") => store.get(CLUSTER_ROLES, "", name),
        _ => store.get(ROLES, namespace, name),
    };
    found.map_or_else(Vec::new, |found| {
        object::list(&found.value(), &["rules"]).to_vec()
    })
}

fn is(subject: &Value, user: &User, namespace: &str) -> bool {
    let name = object::text(subject, &["name"]).unwrap_or_default();
    match object::text(subject, &["kind"]) {
        Some("User") => user.name == name,
        Some("Group") => user.groups.iter().any(|group| group == name),
        Some("ServiceAccount") => {
            let namespace = object::text(subject, &["namespace"]).unwrap_or(namespace);
            user.name == format!("system:serviceaccount:{namespace}:{name}")
        }
        _ => false,
    }
}

fn allows(rule: &Value, action: &Action) -> bool {
    let has = |list: &str, word: &str| {
        let words = object::texts(rule, &[list]);
        words.contains(&"*") || words.contains(&word)
    };
    if !has("verbs", &action.verb) {
        return false;
    }
    if action.resource.is_empty() {
        return object::texts(rule, &["nonResourceURLs"]).iter().any(|url| {
            match url.strip_suffix('*') {
                Some(prefix) => action.path.starts_with(prefix),
                None => *url == action.path,
            }
        });
    }
    let names = object::texts(rule, &["resourceNames"]);
    let resources = object::texts(rule, &["resources"]);
    has("apiGroups", &action.group)
        && resources.iter().any(|resource| matches(resource, action))
        && (names.is_empty() || names.contains(&action.name.as_str()))
}

fn matches(resource: &str, action: &Action) -> bool {
    if resource == "*" {
        return true;
    }
    match resource.split_once('/') {
        None => resource == action.resource && action.subresource.is_empty(),
        Some((of, subresource)) => {
            subresource == action.subresource && (of == "*" || of == action.resource)
        }
    }
}

/// The first of `wanted` that `held` does not cover: nobody may give away what they do not have.
pub(crate) fn beyond(held: &[Value], wanted: &[Value]) -> Option<Action> {
    let or_one = |mut words: Vec<String>| {
        if words.is_empty() {
            words.push(String::new());
        }
        words
    };
    let words = |rule: &Value, list: &str| -> Vec<String> {
        let words = object::texts(rule, &[list]).into_iter();
        words.map(str::to_owned).collect()
    };
    for rule in wanted {
        let mut actions = Vec::new();
        for verb in words(rule, "verbs") {
            for path in words(rule, "nonResourceURLs") {
                let verb = verb.clone();
                actions.push(Action {
                    verb,
                    path,
                    ..Action::default()
                });
            }
            for group in words(rule, "apiGroups") {
                for resource in words(rule, "resources") {
                    for name in or_one(words(rule, "resourceNames")) {
                        let (of, subresource) = resource.split_once('/').unwrap_or((&resource, ""));
                        actions.push(Action {
                            verb: verb.clone(),
                            group: group.clone(),
                            resource: of.to_owned(),
                            subresource: subresource.to_owned(),
                            name,
                            ..Action::default()
                        });
                    }
                }
            }
        }
        let lacking = actions
            .into_iter()
            .find(|action| !held.iter().any(|rule| allows(rule, action)));
        if lacking.is_some() {
            return lacking;
        }
    }
    None
}

/// The roles and bindings that every cluster begins with, as far as clients of Holdfast meet them.
pub(crate) fn bootstrap() -> Vec<Value> {
    let role = |name: &str, rules: Value| {
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": name, "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"}},
            "rules": rules,
        })
    };
    let bind = |name: &str, groups: &[&str]| {
        let subjects: Vec<_> = groups
            .iter()
            .map(|group| {
                json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": group})
            })
            .collect();
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": name, "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"}},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name,
            },
            "subjects": subjects,
        })
    };
    let paths = [
        "/api",
        "/api/*",
        "/apis",
        "/apis/*",
        "/healthz",
        "/livez",
        "/openapi",
        "/openapi/*",
        "/readyz",
        "/version",
        "/version/",
    ];
    let public = ["/healthz", "/livez", "/readyz", "/version", "/version/"];
    vec![
        role(
            "cluster-admin",
            json!([
                {"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]},
                {"nonResourceURLs": ["*"], "verbs": ["*"]},
            ]),
        ),
        bind("cluster-admin", &[MASTERS]),
        role(
            "system:discovery",
            json!([{"nonResourceURLs": paths, "verbs": ["get"]}]),
        ),
        bind("system:discovery", &["system:authenticated"]),
        role(
            "system:public-info-viewer",
            json!([{"nonResourceURLs": public, "verbs": ["get"]}]),
        ),
        bind(
            "system:public-info-viewer",
            &["system:authenticated", "system:unauthenticated"],
        ),
        role(
            "system:basic-user",
            json!([
                {
                    "apiGroups": ["authorization.k8s.io"],
                    "resources": ["selfsubjectaccessreviews", "selfsubjectrulesreviews"],
                    "verbs": ["create"],
                },
                {
                    "apiGroups": ["authentication.k8s.io"],
                    "resources": ["selfsubjectreviews"],
                    "verbs": ["create"],
                },
            ]),
        ),
        bind("system:basic-user", &["system:authenticated"]),
        role(
            "system:auth-delegator",
            json!([
                {
                    "apiGroups": ["authentication.k8s.io"],
                    "resources": ["tokenreviews"],
                    "verbs": ["create"],
                },
                {
                    "apiGroups": ["authorization.k8s.io"],
                    "resources": ["subjectaccessreviews"],
                    "verbs": ["create"],
                },
            ]),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(rules: Value) -> Store {
        let mut store = Store::default();
        store.put(
            CLUSTER_ROLES,
            json!({"metadata": {"name": "r"}, "rules": rules}),
        );
        let binding = |namespace: Value| {
            json!({
                "metadata": {"name": "b", "namespace": namespace},
                "roleRef": {"kind": "ClusterRole", "name": "r"},
                "subjects": [{"kind": "ServiceAccount", "name": "sa", "namespace": "home"}],
            })
        };
        store.put(ROLE_BINDINGS, binding(json!("here")));
        store
    }

    fn sa() -> User {
        User {
            name: "system:serviceaccount:home:sa".to_owned(),
            ..User::default()
        }
    }

    fn get(resource: &str, namespace: &str, name: &str) -> Action {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        Action {
            verb: "get".to_owned(),
            resource: resource.to_owned(),
            subresource: subresource.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            ..Action::default()
        }
    }

    #[test]
    fn a_rule_allows_what_it_names_where_it_is_bound() {
        let rules = json!([
            {"verbs": ["get"], "apiGroups": [""], "resources": ["pods", "pods/status"]},
            {"verbs": ["get"], "apiGroups": [""], "resources": ["secrets"], "resourceNames": ["s"]},
        ]);
        let store = store(rules);
        for (action, expected) in [
            (get("pods", "here", "x"), true),
            (get("pods/status", "here", "x"), true),
            (get("pods/log", "here", "x"), false),
            (get("pods", "there", "x"), false),
            (get("pods", "", "x"), false),
            (get("secrets", "here", "s"), true),
            (get("secrets", "here", ""), false),
            (get("secrets", "here", "t"), false),
        ] {
            assert_eq!(allowed(&store, &sa(), &action), expected, "{action:?}");
        }
        let other = User {
            name: "system:serviceaccount:here:sa".to_owned(),
            ..User::default()
        };
        assert!(!allowed(&store, &other, &get("pods", "here", "x")));
    }

    #[test]
    fn masters_may_everything_and_paths_have_rules() {
        let mut store = Store::default();
        for object in bootstrap() {
            let resource = match object::text(&object, &["kind"]) {
                Some("ClusterRole") => CLUSTER_ROLES,
                _ => CLUSTER_ROLE_BINDINGS,
            };
            store.put(resource, object);
        }
        let user = |group: &str| User {
            groups: vec![group.to_owned()],
            ..User::default()
        };
        let path = |path: &str| Action {
            verb: "get".to_owned(),
            path: path.to_owned(),
            ..Action::default()
        };
        assert!(allowed(&store, &user(MASTERS), &get("secrets", "x", "y")));
        assert!(allowed(
            &store,
            &user("system:authenticated"),
            &path("/apis/apps/v1")
        ));
        assert!(!allowed(
            &store,
            &user("system:authenticated"),
            &path("/metrics")
        ));
        assert!(allowed(
            &store,
            &user("system:unauthenticated"),
            &path("/version")
        ));
        assert!(!allowed(
            &store,
            &user("system:unauthenticated"),
            &path("/apis")
        ));
    }

    #[test]
    fn nobody_gives_what_they_do_not_have() {
        let held = [json!({"verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods"]})];
        let fine = [json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]})];
        let more = [json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods", "secrets"]})];
        assert_eq!(beyond(&held, &fine), None);
        assert_eq!(beyond(&held, &more).unwrap().resource, "secrets");
    }
}
