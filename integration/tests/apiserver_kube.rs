//! The stand-in for an API server, driven by `kube`: what the controller relies on, on good days and
//! bad ones.

use std::{collections::BTreeMap, pin::pin, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use integration::apiserver::{Options, Refusal, Standin, StreamingLists};
use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenReview},
    coordination::v1::Lease,
    core::v1::{ConfigMap, Node, Service},
};
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams},
    core::{DynamicObject, PartialObjectMeta},
    discovery::ApiResource,
    runtime::{
        WatchStreamExt as _, reflector,
        watcher::{self, Event},
    },
};
use serde_json::{Value, json};

/// What has to happen soon has happened by then, or never will.
const SOON: Duration = Duration::from_secs(20);

async fn standin() -> Result<Standin> {
    let options = Options {
        bookmark_interval: Duration::from_millis(200),
        ..Options::default()
    };
    Standin::start(options).await
}

fn config_map(name: &str, value: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": "default", "labels": {"app": name}},
        "data": {"key": value},
    })
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> Result<T> {
    let done = tokio::time::timeout(SOON, future).await;
    done.with_context(|| format!("waited in vain for {what}"))
}

fn code(error: &kube::Error) -> u16 {
    if let kube::Error::Api(status) = error {
        status.code
    } else {
        0
    }
}

/// Reads a watcher until `done` is true of the names and values seen so far.
async fn follow<S>(
    stream: &mut S,
    seen: &mut BTreeMap<String, String>,
    done: impl Fn(&BTreeMap<String, String>) -> bool,
) -> Result<()>
where
    S: Stream<Item = Result<Event<ConfigMap>, watcher::Error>> + Unpin,
{
    let name = |map: &ConfigMap| map.metadata.name.clone().unwrap_or_default();
    let value = |map: &ConfigMap| {
        let data = map.data.as_ref().and_then(|data| data.get("key"));
        data.cloned().unwrap_or_default()
    };
    let mut fresh = BTreeMap::new();
    loop {
        if done(seen) {
            return Ok(());
        }
        let event = soon("an event", stream.next()).await?;
        match event.context("the watcher ended")? {
            Ok(Event::Init) => fresh.clear(),
            Ok(Event::InitApply(map)) => {
                fresh.insert(name(&map), value(&map));
            }
            Ok(Event::InitDone) => *seen = std::mem::take(&mut fresh),
            Ok(Event::Apply(map)) => {
                seen.insert(name(&map), value(&map));
            }
            Ok(Event::Delete(map)) => {
                seen.remove(&name(&map));
            }
            Err(_) => {} // It says what was wrong, and goes on by itself.
        }
    }
}

async fn a_watcher_follows(config: watcher::Config) -> Result<()> {
    let standin = standin().await?;
    let client = standin.client().await?;
    standin.insert(&config_map("one", "1"))?;
    let api: Api<ConfigMap> = Api::namespaced(client, "default");
    let config = config.labels("app");
    let mut stream = pin!(watcher::watcher(api, config).backoff(Patient));
    let mut seen = BTreeMap::new();
    follow(&mut stream, &mut seen, |seen| seen.contains_key("one")).await?;
    standin.insert(&config_map("two", "1"))?;
    follow(&mut stream, &mut seen, |seen| seen.contains_key("two")).await?;

    standin.faults().drop_watches();
    standin.insert(&config_map("three", "1"))?;
    follow(&mut stream, &mut seen, |seen| seen.contains_key("three")).await?;

    // What happened while nobody watched and is then forgotten: 410, and a new list.
    standin.faults().refuse(Refusal {
        code: 500,
        requests: 2,
        path: "/configmaps".to_owned(),
    });
    standin.faults().drop_watches();
    standin.delete("v1", "ConfigMap", "default", "two");
    standin.insert(&config_map("one", "2"))?;
    standin.compact();
    follow(&mut stream, &mut seen, |seen| {
        !seen.contains_key("two") && seen.get("one").map(String::as_str) == Some("2")
    })
    .await?;

    standin.faults().restart();
    standin.insert(&config_map("four", "1"))?;
    follow(&mut stream, &mut seen, |seen| seen.contains_key("four")).await?;
    ensure!(seen.len() == 3, "{seen:?}");
    Ok(())
}

/// Tries again soon, and for ever.
struct Patient;

impl Iterator for Patient {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(Duration::from_millis(50))
    }
}

impl kube::runtime::utils::Backoff for Patient {
    fn reset(&mut self) {}
}

#[tokio::test]
async fn a_watcher_with_pages_recovers_from_cuts_410_and_restarts() -> Result<()> {
    a_watcher_follows(watcher::Config::default().page_size(1)).await
}

#[tokio::test]
async fn a_watcher_with_streaming_lists_recovers_from_cuts_410_and_restarts() -> Result<()> {
    a_watcher_follows(watcher::Config::default().streaming_lists()).await
}

#[tokio::test]
async fn without_streaming_lists_a_watcher_that_wants_them_gets_errors() -> Result<()> {
    for (mode, expected) in [
        (StreamingLists::Refused, 422),
        (StreamingLists::Broken, 500),
    ] {
        let standin = standin().await?;
        standin.faults().streaming_lists(mode);
        let api: Api<ConfigMap> = Api::namespaced(standin.client().await?, "default");
        let config = watcher::Config::default().streaming_lists();
        let mut stream = pin!(watcher::watcher(api, config));
        let mut found = None;
        for _ in 0..5 {
            match soon("an event", stream.next()).await?.context("end")? {
                Err(watcher::Error::WatchError(status)) => found = Some(status.code),
                Err(watcher::Error::WatchStartFailed(kube::Error::Api(status))) => {
                    found = Some(status.code);
                }
                _ => {}
            }
            if found.is_some() {
                break;
            }
        }
        ensure!(found == Some(expected), "{mode:?}: {found:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_reflector_holds_what_there_is() -> Result<()> {
    let standin = standin().await?;
    for index in 0..50 {
        standin.insert(&config_map(&format!("m{index}"), "1"))?;
    }
    let (store, writer) = reflector::store();
    let api: Api<ConfigMap> = Api::all(standin.client().await?);
    let config = watcher::Config::default().streaming_lists().labels("app");
    let stream = reflector::reflector(writer, watcher::watcher(api, config));
    let driven = tokio::spawn(stream.try_for_each(async |_| Ok(())));
    soon("the store", store.wait_until_ready()).await??;
    ensure!(store.len() == 50, "{}", store.len());
    driven.abort();
    Ok(())
}

#[tokio::test]
async fn metadata_watches_carry_no_bodies() -> Result<()> {
    let standin = standin().await?;
    let api: Api<PartialObjectMeta<ConfigMap>> =
        Api::namespaced(standin.client().await?, "default");
    let api_bodies: Api<ConfigMap> = Api::namespaced(standin.client().await?, "default");
    let version = standin.version().to_string();
    standin.insert(&config_map("one", "secret"))?;
    let list = api_bodies
        .list_metadata(&ListParams::default().labels("app=one"))
        .await?;
    ensure!(list.items.len() == 1);
    drop(api);
    let mut events = api_bodies
        .watch_metadata(&WatchParams::default(), &version)
        .await?
        .boxed();
    let event = soon("an event", events.try_next()).await??.context("end")?;
    let WatchEvent::Added(meta) = event else {
        bail!("{event:?}");
    };
    ensure!(meta.metadata.name.as_deref() == Some("one"));
    let text = serde_json::to_string(&meta)?;
    ensure!(!text.contains("secret"), "{text}");
    Ok(())
}

#[tokio::test]
async fn bookmarks_tell_how_far_a_quiet_watch_is() -> Result<()> {
    let standin = standin().await?;
    let api: Api<Node> = Api::all(standin.client().await?);
    let from = standin.version();
    let mut events = api
        .watch(&WatchParams::default(), &from.to_string())
        .await?
        .boxed();
    standin.insert(&config_map("elsewhere", "1"))?;
    loop {
        let event = soon("a bookmark", events.try_next())
            .await??
            .context("end")?;
        let WatchEvent::Bookmark(bookmark) = event else {
            bail!("{event:?}");
        };
        let version: u64 = bookmark.metadata.resource_version.parse()?;
        if version > from {
            return Ok(());
        }
    }
}

#[tokio::test]
async fn pages_are_of_one_moment_and_expire() -> Result<()> {
    let standin = standin().await?;
    for name in ["a", "b", "c"] {
        standin.insert(&config_map(name, "1"))?;
    }
    let api: Api<ConfigMap> = Api::namespaced(standin.client().await?, "default");
    let params = ListParams::default().labels("app").limit(2);
    let first = api.list(&params).await?;
    let token = first.metadata.continue_.context("a second page")?;
    standin.insert(&config_map("d", "1"))?;
    let next = params.clone().continue_token(&token);
    let second = api.list(&next).await?;
    ensure!(second.items.len() == 1 && second.metadata.continue_.is_none());
    ensure!(second.metadata.resource_version == first.metadata.resource_version);
    standin.compact();
    standin.insert(&config_map("e", "1"))?;
    standin.compact();
    let error = api.list(&next).await.err().context("410")?;
    ensure!(code(&error) == 410, "{error}");
    Ok(())
}

#[tokio::test]
async fn a_stale_version_conflicts_and_a_stale_list_is_older() -> Result<()> {
    let standin = standin().await?;
    let api: Api<ConfigMap> = Api::namespaced(standin.client().await?, "default");
    standin.insert(&config_map("one", "1"))?;
    let old = api.get("one").await?;
    standin.freeze_lists(true);
    standin.insert(&config_map("one", "2"))?;
    let error = api.replace("one", &PostParams::default(), &old).await;
    ensure!(code(&error.err().context("409")?) == 409);
    let list = api.list(&ListParams::default().labels("app=one")).await?;
    ensure!(list.items == [old], "{list:?}");
    standin.freeze_lists(false);
    let list = api.list(&ListParams::default().labels("app=one")).await?;
    let data = list
        .items
        .first()
        .and_then(|one| one.data.clone())
        .unwrap_or_default();
    ensure!(data.get("key").map(String::as_str) == Some("2"));
    Ok(())
}

#[tokio::test]
async fn appliers_own_fields_and_conflict() -> Result<()> {
    let standin = standin().await?;
    let api: Api<Service> = Api::namespaced(standin.client().await?, "default");
    let service = |port: i32, label: &str| {
        Patch::Apply(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "web", "labels": {label: "1"}},
            "spec": {"ports": [{"port": port, "name": "http"}], "selector": {"app": "web"}},
        }))
    };
    let one = PatchParams::apply("one");
    let made = api.patch("web", &one, &service(80, "l")).await?;
    let spec = made.spec.context("spec")?;
    ensure!(spec.cluster_ip.is_some() && spec.ip_families.is_some());
    let again = api.patch("web", &one, &service(80, "l")).await?;
    ensure!(
        again.metadata.resource_version == made.metadata.resource_version,
        "no change"
    );

    let rename = Patch::Apply(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"ports": [{"port": 80, "protocol": "TCP", "name": "www"}]},
    }));
    let error = api.patch("web", &PatchParams::apply("two"), &rename).await;
    let Some(kube::Error::Api(status)) = error.err() else {
        bail!("a conflict is refused");
    };
    ensure!(status.code == 409, "{status:?}");
    let causes = status
        .details
        .clone()
        .map(|details| details.causes)
        .unwrap_or_default();
    let cause = causes.first().context("a cause")?;
    ensure!(cause.reason == "FieldManagerConflict", "{cause:?}");
    ensure!(cause.message == "conflict with \"one\"", "{cause:?}");
    ensure!(
        cause.field == ".spec.ports[port=80,protocol=\"TCP\"].name",
        "{cause:?}"
    );
    let forced = api
        .patch("web", &PatchParams::apply("two").force(), &rename)
        .await?;
    let ports = forced.spec.and_then(|spec| spec.ports).unwrap_or_default();
    ensure!(ports.len() == 1 && ports.iter().all(|port| port.name.as_deref() == Some("www")));

    // Another port instead: the old one goes as far as nobody else owns it.
    let moved = api.patch("web", &one, &service(81, "m")).await?;
    ensure!(moved.metadata.labels == Some(BTreeMap::from([("m".to_owned(), "1".to_owned())])));
    let ports = moved.spec.and_then(|spec| spec.ports).unwrap_or_default();
    ensure!(ports.len() == 2, "{ports:?}");
    Ok(())
}

#[tokio::test]
async fn leases_are_taken_by_one() -> Result<()> {
    let standin = standin().await?;
    let api: Api<Lease> = Api::namespaced(standin.client().await?, "kube-system");
    let lease: Lease = serde_json::from_value(json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "leader"},
        "spec": {"holderIdentity": "a", "leaseDurationSeconds": 15,
            "renewTime": "2026-01-01T00:00:00.000000Z"},
    }))?;
    let made = api.create(&PostParams::default(), &lease).await?;
    let mut first = made.clone();
    let mut second = made;
    for (lease, holder) in [(&mut first, "b"), (&mut second, "c")] {
        let spec = lease.spec.as_mut().context("spec")?;
        spec.holder_identity = Some(holder.to_owned());
    }
    api.replace("leader", &PostParams::default(), &first)
        .await?;
    let lost = api.replace("leader", &PostParams::default(), &second).await;
    ensure!(code(&lost.err().context("409")?) == 409);
    let mut unlocked = first;
    unlocked.metadata.resource_version = None;
    let refused = api
        .replace("leader", &PostParams::default(), &unlocked)
        .await;
    ensure!(code(&refused.err().context("422")?) == 422);
    Ok(())
}

async fn service_account(client: &Client, rules: Value) -> Result<()> {
    let created = [
        json!({"apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": "agent", "namespace": "default"}}),
        json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
            "metadata": {"name": "agent", "namespace": "default"}, "rules": rules}),
        json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
            "metadata": {"name": "agent", "namespace": "default"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "agent"},
            "subjects": [{"kind": "ServiceAccount", "name": "agent", "namespace": "default"}]}),
    ];
    for object in created {
        let object: DynamicObject = serde_json::from_value(object)?;
        let types = object.types.clone().context("types")?;
        let (group, version) = types
            .api_version
            .split_once('/')
            .unwrap_or(("", &types.api_version));
        let gvk = kube::core::GroupVersionKind::gvk(group, version, &types.kind);
        let api: Api<DynamicObject> =
            Api::namespaced_with(client.clone(), "default", &ApiResource::from_gvk(&gvk));
        api.create(&PostParams::default(), &object).await?;
    }
    Ok(())
}

#[tokio::test]
async fn tokens_are_made_reviewed_and_have_rights() -> Result<()> {
    let standin = standin().await?;
    let client = standin.client().await?;
    let rules = json!([{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]}]);
    service_account(&client, rules).await?;
    let accounts: Api<k8s_openapi::api::core::v1::ServiceAccount> =
        Api::namespaced(client.clone(), "default");
    let request: TokenRequest = serde_json::from_value(json!({
        "metadata": {}, "spec": {"audiences": ["mesh"], "expirationSeconds": 600},
    }))?;
    let made = accounts
        .create_token_request("agent", &PostParams::default(), &request)
        .await?;
    let token = made.status.context("status")?.token;
    let reviews: Api<TokenReview> = Api::all(client.clone());
    let review = |audience: &str| -> Result<TokenReview> {
        Ok(serde_json::from_value(json!({
            "metadata": {}, "spec": {"token": token, "audiences": [audience]},
        }))?)
    };
    let status = reviews
        .create(&PostParams::default(), &review("mesh")?)
        .await?
        .status;
    let status = status.context("status")?;
    ensure!(status.authenticated == Some(true), "{status:?}");
    let name = status.user.and_then(|user| user.username);
    ensure!(name.as_deref() == Some("system:serviceaccount:default:agent"));
    let status = reviews
        .create(&PostParams::default(), &review("other")?)
        .await?
        .status;
    ensure!(
        status.is_some_and(|status| status.authenticated != Some(true) && status.error.is_some())
    );

    // Its audience is not the server's: it opens nothing there.
    let stranger: Api<ConfigMap> =
        Api::namespaced(standin.client_with_token(&token).await?, "default");
    ensure!(code(&stranger.get("x").await.err().context("401")?) == 401);

    let token = standin.token("default", "agent", &[], None)?;
    let agent: Api<ConfigMap> =
        Api::namespaced(standin.client_with_token(&token).await?, "default");
    ensure!(agent.get("kube-root-ca.crt").await.is_ok());
    let list = agent.list(&ListParams::default()).await;
    ensure!(code(&list.err().context("403")?) == 403);
    let used = standin.faults().used_rights();
    ensure!(
        used.iter()
            .any(|right| right.user.ends_with(":agent") && right.verb == "get")
    );
    ensure!(
        !used
            .iter()
            .any(|right| right.user.ends_with(":agent") && right.verb == "list")
    );

    standin.faults().refuse_token_reviews(true);
    let refused = reviews
        .create(&PostParams::default(), &review("mesh")?)
        .await;
    ensure!(code(&refused.err().context("500")?) == 500);
    Ok(())
}

#[tokio::test]
async fn who_is_told_to_wait_succeeds_later() -> Result<()> {
    let standin = standin().await?;
    let api: Api<Node> = Api::all(standin.client().await?);
    let refuse = |code| {
        standin.faults().refuse(Refusal {
            code,
            requests: 1,
            path: "/nodes".to_owned(),
        });
    };
    refuse(429); // `kube` waits as long as it is told, and tries again by itself.
    ensure!(api.list(&ListParams::default()).await?.items.is_empty());
    refuse(500);
    let error = api.list(&ListParams::default()).await;
    ensure!(code(&error.err().context("500")?) == 500);
    ensure!(api.list(&ListParams::default()).await?.items.is_empty());
    Ok(())
}

fn thing(status: bool) -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "things.example.dev"},
        "spec": {
            "group": "example.dev", "scope": "Cluster",
            "names": {"plural": "things", "singular": "thing", "kind": "Thing"},
            "versions": [{
                "name": "v1", "served": true, "storage": true,
                "subresources": if status { json!({"status": {}}) } else { json!({}) },
                "schema": {"openAPIV3Schema": {"type": "object", "required": ["spec"], "properties": {
                    "spec": {
                        "type": "object", "required": ["site"],
                        "properties": {
                            "site": {"type": "string", "maxLength": 20, "x-kubernetes-validations": [
                                {"rule": "self == oldSelf", "message": "a site is for ever"},
                            ]},
                            "ports": {"type": "array", "maxItems": 10, "items": {"type": "integer"}},
                            "mtu": {"type": "integer", "minimum": 576, "default": 1280},
                        },
                        "x-kubernetes-validations": [{
                            "rule": "!has(self.ports) || self.ports.all(p, p > 0)",
                            "message": "ports are positive",
                        }],
                    },
                    "status": {"type": "object", "properties": {"seen": {"type": "string"}}},
                }}},
            }],
        },
    })
}

#[tokio::test]
async fn custom_resources_have_schemas_rules_defaults_and_status() -> Result<()> {
    let standin = standin().await?;
    let client = standin.client().await?;
    let definitions: Api<DynamicObject> = Api::all_with(
        client.clone(),
        &ApiResource::from_gvk(&kube::core::GroupVersionKind::gvk(
            "apiextensions.k8s.io",
            "v1",
            "CustomResourceDefinition",
        )),
    );
    let mut wrong = thing(true);
    wrong["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["x"] = json!({});
    let refused = definitions
        .create(&PostParams::default(), &serde_json::from_value(wrong)?)
        .await;
    ensure!(code(&refused.err().context("422")?) == 422);
    definitions
        .create(
            &PostParams::default(),
            &serde_json::from_value(thing(true))?,
        )
        .await?;

    let gvk = kube::core::GroupVersionKind::gvk("example.dev", "v1", "Thing");
    let things: Api<DynamicObject> = Api::all_with(client, &ApiResource::from_gvk(&gvk));
    let object = |spec: Value| -> Result<DynamicObject> {
        Ok(serde_json::from_value(json!({
            "apiVersion": "example.dev/v1", "kind": "Thing",
            "metadata": {"name": "one"}, "spec": spec, "status": {"seen": "never"},
        }))?)
    };
    for (spec, said) in [
        (json!({}), "spec.site: Required value"),
        (json!({"site": 1}), "must be of type string"),
        (
            json!({"site": "a", "mtu": 1}),
            "greater than or equal to 576",
        ),
        (json!({"site": "a", "ports": [0]}), "ports are positive"),
    ] {
        let refused = things.create(&PostParams::default(), &object(spec)?).await;
        let error = refused.err().context("422")?;
        ensure!(
            code(&error) == 422 && error.to_string().contains(said),
            "{error}"
        );
    }
    let made = things
        .create(
            &PostParams::default(),
            &object(json!({"site": "a", "unknown": 1}))?,
        )
        .await?;
    ensure!(
        made.data["spec"] == json!({"site": "a", "mtu": 1280}),
        "{}",
        made.data
    );
    ensure!(made.data.get("status").is_none());
    ensure!(made.metadata.generation == Some(1));

    let patch = Patch::Merge(json!({"spec": {"site": "b"}}));
    let error = things.patch("one", &PatchParams::default(), &patch).await;
    let error = error.err().context("422")?;
    ensure!(error.to_string().contains("a site is for ever"), "{error}");
    let status = Patch::Merge(json!({"status": {"seen": "today"}, "spec": {"mtu": 9000}}));
    let seen = things
        .patch_status("one", &PatchParams::default(), &status)
        .await?;
    ensure!(seen.data["status"]["seen"] == "today" && seen.data["spec"]["mtu"] == 1280);
    ensure!(seen.metadata.generation == Some(1));
    let patch = Patch::Merge(json!({"spec": {"mtu": 9000}, "status": {"seen": "no"}}));
    let changed = things.patch("one", &PatchParams::default(), &patch).await?;
    ensure!(changed.metadata.generation == Some(2) && changed.data["status"]["seen"] == "today");
    Ok(())
}

#[tokio::test]
async fn finalizers_hold_and_owners_take_along() -> Result<()> {
    let standin = standin().await?;
    let api: Api<ConfigMap> = Api::namespaced(standin.client().await?, "default");
    let mut owner = config_map("owner", "1");
    owner["metadata"]["finalizers"] = json!(["example.dev/hold"]);
    let owner = standin.insert(&owner)?;
    let mut owned = config_map("owned", "1");
    owned["metadata"]["ownerReferences"] = json!([{
        "apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner["metadata"]["uid"],
    }]);
    standin.insert(&owned)?;
    let deleted = api.delete("owner", &DeleteParams::default()).await?;
    ensure!(deleted.left().is_some(), "it is held");
    ensure!(
        api.get("owner")
            .await?
            .metadata
            .deletion_timestamp
            .is_some()
    );
    ensure!(api.get_opt("owned").await?.is_some());
    let release = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    api.patch("owner", &PatchParams::default(), &release)
        .await?;
    ensure!(api.get_opt("owner").await?.is_none());
    ensure!(api.get_opt("owned").await?.is_none());
    Ok(())
}

#[tokio::test]
async fn five_thousand_nodes_and_250_000_endpoints_are_held() -> Result<()> {
    let standin = standin().await?;
    let client = standin.client().await?;
    for index in 0..5_000 {
        standin.insert(&json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("n{index}")},
        }))?;
    }
    let endpoints: Vec<_> = (0..100)
        .map(|index| {
            json!({
                "addresses": [format!("10.1.{index}.1")], "nodeName": format!("n{index}"),
                "conditions": {"ready": true},
            })
        })
        .collect();
    for index in 0..2_500 {
        let service = format!("s{index}");
        standin.insert(&json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": service, "namespace": "default",
                "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4", "endpoints": endpoints,
            "ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
        }))?;
    }
    for index in 0..10_000 {
        standin.insert(&json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": format!("s{index}"), "namespace": "default"},
            "spec": {"ports": [{"port": 80}]},
        }))?;
    }
    let nodes: Api<Node> = Api::all(client.clone());
    ensure!(
        nodes
            .list_metadata(&ListParams::default())
            .await?
            .items
            .len()
            == 5_000
    );
    let slices: Api<k8s_openapi::api::discovery::v1::EndpointSlice> = Api::all(client);
    let list = slices.list(&ListParams::default().limit(500)).await?;
    ensure!(list.items.len() == 500 && list.metadata.remaining_item_count == Some(2_000));
    ensure!(standin.count("/services") == 10_000);
    Ok(())
}
