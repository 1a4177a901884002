//! What can only be asked: tokens and rights.

use serde_json::{Value, json};

use super::{
    auth::{Authority, ISSUER},
    error::{ApiError, ApiResult, Cause},
    metadata, object,
    rbac::{self, Action, User},
    store::Store,
};

/// Seconds that a token is good for: unless said otherwise, at least, and at most.
const TOKEN_S: i64 = 3_600;
const TOKEN_MIN_S: i64 = 600;
const TOKEN_MAX_S: i64 = 1 << 32;

/// Answers a review by its kind.
pub(crate) fn answer(
    kind: &str,
    mut review: Value,
    user: &User,
    store: &Store,
    authority: &Authority,
    now_s: i64,
) -> Value {
    let status = match kind {
        "TokenReview" => token_review(&review, store, authority, now_s),
        "SelfSubjectReview" => json!({"userInfo": shown(user)}),
        "SelfSubjectRulesReview" => {
            let namespace = object::text(&review, &["spec", "namespace"]).unwrap_or_default();
            let (paths, resources): (Vec<_>, Vec<_>) = rbac::rules(store, user, namespace)
                .into_iter()
                .partition(|rule| rule.get("nonResourceURLs").is_some());
            json!({"incomplete": false, "resourceRules": resources, "nonResourceRules": paths})
        }
        "SelfSubjectAccessReview" => access(&review, user, store),
        _ => {
            let spec = object::at(&review, &["spec"]).unwrap_or(&Value::Null);
            let groups = object::texts(spec, &["groups"]).into_iter();
            let other = User {
                name: object::text(spec, &["user"]).unwrap_or_default().to_owned(),
                groups: groups.map(str::to_owned).collect(),
                ..User::default()
            };
            access(&review, &other, store)
        }
    };
    object::set(&mut review, &["status"], status);
    object::set_default(
        &mut review,
        &["metadata"],
        json!({"creationTimestamp": null}),
    );
    review
}

fn shown(user: &User) -> Value {
    json!({
        "username": user.name, "uid": user.uid, "groups": user.groups, "extra": user.extra,
    })
}

fn token_review(review: &Value, store: &Store, authority: &Authority, now_s: i64) -> Value {
    let token = object::text(review, &["spec", "token"]).unwrap_or_default();
    let mut audiences = object::texts(review, &["spec", "audiences"]);
    if audiences.is_empty() {
        audiences.push(ISSUER);
    }
    match authority.user_of_token(store, token, &audiences, now_s) {
        Ok((user, audiences)) => {
            json!({"authenticated": true, "user": shown(&user), "audiences": audiences})
        }
        Err(why) => json!({"user": {}, "error": format!("[invalid bearer token, {why}]")}),
    }
}

fn access(review: &Value, user: &User, store: &Store) -> Value {
    let of = |place: &str, key: &str| {
        let text = object::text(review, &["spec", place, key]);
        text.unwrap_or_default().to_owned()
    };
    let action = if object::at(review, &["spec", "resourceAttributes"]).is_some() {
        let of = |key: &str| of("resourceAttributes", key);
        Action {
            verb: of("verb"),
            group: of("group"),
            resource: of("resource"),
            subresource: of("subresource"),
            namespace: of("namespace"),
            name: of("name"),
            path: String::new(),
        }
    } else {
        Action {
            verb: of("nonResourceAttributes", "verb"),
            path: of("nonResourceAttributes", "path"),
            ..Action::default()
        }
    };
    json!({"allowed": rbac::allowed(store, user, &action)})
}

/// Gives a service account a token.
///
/// # Errors
///
/// 422 for a time or an object that it cannot be bound to.
pub(crate) fn token_request(
    mut request: Value,
    account: &Value,
    store: &Store,
    authority: &Authority,
    now_s: i64,
) -> ApiResult<Value> {
    let namespace = object::namespace(account);
    let refuse = |field: &str, value: Value, why: &str| {
        let cause = Cause::invalid(field, &value, why);
        Err(ApiError::invalid(
            "authentication.k8s.io",
            "TokenRequest",
            "",
            &[cause],
        ))
    };
    let seconds = object::at(&request, &["spec", "expirationSeconds"])
        .and_then(Value::as_i64)
        .unwrap_or(TOKEN_S);
    if !(TOKEN_MIN_S..=TOKEN_MAX_S).contains(&seconds) {
        let why = "may not specify a duration less than 10 minutes or larger than 2^32 seconds";
        return refuse("spec.expirationSeconds", seconds.into(), why);
    }
    object::set(&mut request, &["spec", "expirationSeconds"], seconds);
    if object::list(&request, &["spec", "audiences"]).is_empty() {
        object::set(&mut request, &["spec", "audiences"], json!([ISSUER]));
    }
    let mut holder = json!({
        "namespace": namespace,
        "serviceaccount": {"name": object::name(account), "uid": object::uid(account)},
    });
    if let Some(bound) = object::at(&request, &["spec", "boundObjectRef"]).cloned() {
        let text = |key: &str| object::text(&bound, &[key]).unwrap_or_default();
        let (resource, place) = match text("kind") {
            "Pod" => ("/pods", namespace),
            "Secret" => ("/secrets", namespace),
            "Node" => ("/nodes", ""),
            other => {
                let why = "supported values: Pod, Secret, Node";
                return refuse("spec.boundObjectRef.kind", other.into(), why);
            }
        };
        let found = store
            .get(resource, place, text("name"))
            .ok_or_else(|| ApiError::not_found("", resource.trim_matches('/'), text("name")))?
            .value();
        if !text("uid").is_empty() && text("uid") != object::uid(&found) {
            let why = "the UID in the bound object reference does not match the UID in record";
            return Err(ApiError::conflict(
                "",
                "serviceaccounts/token",
                object::name(account),
                why,
            ));
        }
        let of_account = object::text(&found, &["spec", "serviceAccountName"]);
        if resource == "/pods" && of_account.unwrap_or("default") != object::name(account) {
            let why = "cannot bind token to pod: pod uses another service account";
            return refuse("spec.boundObjectRef", text("name").into(), why);
        }
        let reference =
            |object: &Value| json!({"name": object::name(object), "uid": object::uid(object)});
        object::set(
            &mut holder,
            &[&text("kind").to_lowercase()],
            reference(&found),
        );
        let node = object::text(&found, &["spec", "nodeName"]).filter(|_| resource == "/pods");
        if let Some(node) = node.filter(|node| !node.is_empty()) {
            let known = store.get("/nodes", "", node).map(|node| node.value());
            let known = known.unwrap_or_else(|| json!({"metadata": {"name": node}}));
            object::set(&mut holder, &["node"], reference(&known));
        }
    }
    let claims = json!({
        "aud": object::at(&request, &["spec", "audiences"]),
        "exp": now_s + seconds, "iat": now_s, "nbf": now_s, "iss": ISSUER,
        "jti": metadata::new_uid(),
        "kubernetes.io": holder,
        "sub": format!("system:serviceaccount:{namespace}:{}", object::name(account)),
    });
    let token = authority
        .sign(&claims)
        .map_err(|error| ApiError::internal(error.to_string()))?;
    let status = json!({
        "token": token, "expirationTimestamp": metadata::rfc3339(now_s + seconds),
    });
    object::set(&mut request, &["status"], status);
    object::set(&mut request, &["metadata", "name"], object::name(account));
    object::set(&mut request, &["metadata", "namespace"], namespace);
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> Store {
        let mut store = Store::default();
        let object = |name: &str, spec: Value| json!({"metadata": {"name": name, "namespace": "n", "uid": format!("u-{name}")}, "spec": spec});
        store.put("/serviceaccounts", object("sa", json!({})));
        store.put(
            "/pods",
            object("p", json!({"serviceAccountName": "sa", "nodeName": "edge"})),
        );
        store.put(
            "/nodes",
            json!({"metadata": {"name": "edge", "uid": "u-edge"}}),
        );
        store
    }

    #[test]
    fn a_token_for_a_pod_names_its_node() {
        let (store, authority) = (store(), Authority::new().unwrap());
        let account = store.get("/serviceaccounts", "n", "sa").unwrap().value();
        let request = json!({"spec": {
            "audiences": ["mesh"], "boundObjectRef": {"kind": "Pod", "name": "p"},
        }});
        let answered = token_request(request, &account, &store, &authority, 0).unwrap();
        let token = answered["status"]["token"].as_str().unwrap();
        let review = json!({"spec": {"token": token, "audiences": ["mesh", "other"]}});
        let review = answer(
            "TokenReview",
            review,
            &User::default(),
            &store,
            &authority,
            1,
        );
        assert_eq!(review["status"]["authenticated"], true);
        assert_eq!(review["status"]["audiences"], json!(["mesh"]));
        let user = &review["status"]["user"];
        assert_eq!(user["username"], "system:serviceaccount:n:sa");
        assert_eq!(
            user["extra"]["authentication.kubernetes.io/node-name"],
            json!(["edge"])
        );
        let late = json!({"spec": {"token": token, "audiences": ["mesh"]}});
        let late = answer(
            "TokenReview",
            late,
            &User::default(),
            &store,
            &authority,
            3_600,
        );
        assert!(late["status"]["authenticated"].is_null());
        assert!(
            late["status"]["error"]
                .as_str()
                .unwrap()
                .contains("expired")
        );
    }

    #[test]
    fn short_tokens_are_refused() {
        let (store, authority) = (store(), Authority::new().unwrap());
        let account = store.get("/serviceaccounts", "n", "sa").unwrap().value();
        let request = json!({"spec": {"expirationSeconds": 60}});
        assert!(token_request(request, &account, &store, &authority, 0).is_err());
    }
}
