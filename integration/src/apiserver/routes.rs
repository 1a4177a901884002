//! Which part answers a request, and what its query parameters mean.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::{
    Response,
    body::Frame,
    header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, USER_AGENT, WARNING},
    upgrade::OnUpgrade,
};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    decode, discovery,
    error::{ApiError, ApiResult, Cause},
    faults::StreamingLists,
    kinds::Kind,
    metadata, object, openapi, protobuf,
    rbac::{Action, User},
    registry::{Options, PatchKind, Place, State, Validation},
    request::{Query, ResourcePath, Target},
    reviews,
    selector::Selector,
    server::{Body, Shared, bytes_response, check_right, json_response, response},
    store::Stored,
    views::{self, View},
    watching::{WATCH_DEFAULT, Watch},
};

/// A request of somebody who may make it.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) method: String,
    pub(crate) headers: HeaderMap,
    pub(crate) user: User,
    pub(crate) query: Query,
    pub(crate) target: Target,
    pub(crate) body: Bytes,
    /// The query as it came, and the connection, for what is handed on to a kubelet.
    pub(crate) raw_query: String,
    pub(crate) upgrade: OnUpgrade,
}

impl Call {
    fn header(&self, name: HeaderName) -> &str {
        let value = self.headers.get(name);
        value
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    }

    fn view(&self) -> ApiResult<View> {
        View::of_accept(self.header(ACCEPT)).ok_or_else(|| {
            let why = "only the following media types are accepted: application/json";
            ApiError::new(406, "NotAcceptable", why)
        })
    }

    fn options(&self) -> ApiResult<Options> {
        let given = self.query.text("fieldManager");
        let client = self
            .header(USER_AGENT)
            .split('/')
            .next()
            .unwrap_or_default();
        let applies = self
            .header(CONTENT_TYPE)
            .starts_with("application/apply-patch");
        let manager = if given.is_empty() && !applies {
            client
        } else {
            given
        };
        let bad = |key: &str| {
            let why = format!("{key}: unsupported value {:?}", self.query.text(key));
            Err(ApiError::bad_request(why))
        };
        let dry_run = match self.query.text("dryRun") {
            "" => false,
            "All" => true,
            _ => return bad("dryRun"),
        };
        let validation = match self.query.text("fieldValidation") {
            "" | "Warn" => Validation::Warn,
            "Strict" => Validation::Strict,
            "Ignore" => Validation::Ignore,
            _ => return bad("fieldValidation"),
        };
        if manager.len() > 128 {
            return Err(ApiError::bad_request(
                "fieldManager: may not be more than 128 characters",
            ));
        }
        Ok(Options {
            user: self.user.clone(),
            manager: manager.to_owned(),
            dry_run,
            validation,
            force: self.query.flag("force"),
            now: metadata::now(),
            ..Options::default()
        })
    }
}

/// # Errors
///
/// Whatever the API says.
pub(crate) fn answer(shared: &Arc<Shared>, call: Call) -> ApiResult<Response<Body>> {
    let path = match &call.target {
        Target::Path(path) => return answer_path(shared, &call, path),
        Target::Resource(path) => path.clone(),
    };
    let kind = {
        let state = shared.state();
        let found = state.catalog.find(&path.group, &path.version, &path.plural);
        Arc::clone(found.ok_or_else(ApiError::no_such_path)?)
    };
    if kind.namespaced && path.namespace.is_empty() && !path.name.is_empty()
        || !kind.namespaced && !path.namespace.is_empty()
    {
        return Err(ApiError::no_such_path());
    }
    match path.subresource.as_str() {
        "" => {}
        "status" if kind.has_status && call.method != "POST" && call.method != "DELETE" => {}
        "token" if kind.kind == "ServiceAccount" && call.method == "POST" => {
            return token(shared, &call, &path);
        }
        _ => return Err(ApiError::no_such_path()),
    }
    if kind.ask_only {
        return review(shared, &call, &kind, &path);
    }
    let view = call.view()?;
    match (call.method.as_str(), path.name.is_empty()) {
        ("GET" | "HEAD", false) if !call.query.flag("watch") => {
            get(shared, &call, &kind, &path, view)
        }
        ("GET" | "HEAD", _) if call.query.flag("watch") => watch(shared, &call, kind, &path, view),
        ("GET" | "HEAD", true) => list(shared, &call, &kind, &path, view),
        ("POST", true) => {
            let body = body(&call)?;
            let write = |state: &mut State, options: &mut Options| {
                state.create(&kind, &path.namespace, body, options)
            };
            written(shared, &call, &kind, view, 201, write)
        }
        ("PUT", false) => {
            let body = body(&call)?;
            let write = |state: &mut State, options: &mut Options| {
                state.update(&kind, place(&path), body, options)
            };
            written(shared, &call, &kind, view, 200, write)
        }
        ("PATCH", false) => patch(shared, &call, &kind, &path, view),
        ("DELETE", false) => delete(shared, &call, &kind, &path),
        ("DELETE", true) => delete_collection(shared, &call, &kind, &path),
        _ => Err(ApiError::method_not_allowed()),
    }
}

fn place(path: &ResourcePath) -> Place<'_> {
    Place {
        namespace: &path.namespace,
        name: &path.name,
        subresource: &path.subresource,
    }
}

fn answer_path(shared: &Shared, call: &Call, path: &str) -> ApiResult<Response<Body>> {
    if !matches!(call.method.as_str(), "GET" | "HEAD") {
        return Err(ApiError::method_not_allowed());
    }
    match path.trim_end_matches('/') {
        "/healthz" | "/livez" | "/readyz" => Ok(bytes_response(200, Bytes::from_static(b"ok"))),
        "/version" => Ok(json_response(200, &discovery::version())),
        "/openapi/v3" => Ok(json_response(200, &openapi::index(&shared.state().catalog))),
        path => {
            let catalog = shared.state().catalog.clone();
            if let Some(document) = path.strip_prefix("/openapi/v3") {
                let found = openapi::document(&catalog, document);
                return found
                    .map(|found| json_response(200, &found))
                    .ok_or_else(ApiError::no_such_path);
            }
            let aggregated = call.header(ACCEPT).split(',').any(|range| {
                let has = |word: &str| range.split(';').any(|part| part.trim() == word);
                has("v=v2") && has("as=APIGroupDiscoveryList")
            });
            let found = discovery::answer(&catalog, path, aggregated);
            let found = found.ok_or_else(ApiError::no_such_path)?;
            let mut answer = json_response(200, &found);
            if found.get("kind").and_then(Value::as_str) == Some("APIGroupDiscoveryList") {
                let kind = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
                answer
                    .headers_mut()
                    .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
            }
            Ok(answer)
        }
    }
}

/// The body of a write: JSON, YAML, or what `kubectl` sends as protobuf.
fn body(call: &Call) -> ApiResult<decode::Body> {
    let kind = call.header(CONTENT_TYPE);
    let media = kind.split(';').next().unwrap_or_default().trim();
    match media {
        "" | "application/json" | "application/yaml" | "text/plain" => decode::decode(&call.body),
        "application/vnd.kubernetes.protobuf" => Ok(protobuf::decode(&call.body)?.into()),
        _ => {
            let why = format!("the body of the request was in an unknown format: {kind}");
            Err(ApiError::new(415, "UnsupportedMediaType", why))
        }
    }
}

fn written(
    shared: &Arc<Shared>,
    call: &Call,
    kind: &Kind,
    view: View,
    code: u16,
    write: impl FnOnce(&mut State, &mut Options) -> ApiResult<Value>,
) -> ApiResult<Response<Body>> {
    let mut options = call.options()?;
    let value = shared.change(|state| write(state, &mut options))?;
    let mut answer = json_response(code, &views::show(kind, value, view));
    for warning in &options.warnings {
        let text = format!("299 - {warning:?}");
        if let Ok(text) = HeaderValue::from_str(&text) {
            answer.headers_mut().append(WARNING, text);
        }
    }
    Ok(answer)
}

fn patch(
    shared: &Arc<Shared>,
    call: &Call,
    kind: &Kind,
    path: &ResourcePath,
    view: View,
) -> ApiResult<Response<Body>> {
    let media = call
        .header(CONTENT_TYPE)
        .split(';')
        .next()
        .unwrap_or_default();
    let how = match media.trim() {
        "application/json-patch+json" => PatchKind::Json,
        "application/merge-patch+json" => PatchKind::Merge,
        "application/strategic-merge-patch+json" => PatchKind::Strategic,
        "application/apply-patch+yaml" => PatchKind::Apply,
        other => {
            let why = format!("the body of the request was in an unknown format: {other}");
            return Err(ApiError::new(415, "UnsupportedMediaType", why));
        }
    };
    let body = decode::decode(&call.body)?;
    let is_new = shared
        .state()
        .existing(kind, &path.namespace, &path.name)
        .is_err();
    if is_new && how == PatchKind::Apply {
        let action = Action {
            verb: "create".to_owned(),
            group: kind.group.clone(),
            resource: kind.plural.clone(),
            namespace: path.namespace.clone(),
            name: path.name.clone(),
            ..Action::default()
        };
        check_right(shared, &call.user, &action)?;
    }
    let code = if is_new { 201 } else { 200 };
    let write = |state: &mut State, options: &mut Options| {
        state.patch(kind, place(path), how, body, options)
    };
    written(shared, call, kind, view, code, write)
}

/// What a DELETE says in its body or its query.
fn delete_options(call: &Call) -> ApiResult<Value> {
    let mut options = if call.body.is_empty() {
        json!({})
    } else {
        body(call)?.value
    };
    let policy = call.query.text("propagationPolicy");
    if !policy.is_empty() {
        object::set_default(&mut options, &["propagationPolicy"], policy);
    }
    Ok(options)
}

fn delete(
    shared: &Arc<Shared>,
    call: &Call,
    kind: &Kind,
    path: &ResourcePath,
) -> ApiResult<Response<Body>> {
    let (options, delete) = (call.options()?, delete_options(call)?);
    let last = shared
        .change(|state| state.delete(kind, &path.namespace, &path.name, &delete, &options))?;
    let marked = object::at(&last, &["metadata", "deletionTimestamp"]).is_some();
    if marked || kind.kind == "Pod" {
        return Ok(json_response(200, &last));
    }
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
        "details": {
            "name": path.name, "group": kind.group, "kind": kind.plural, "uid": object::uid(&last),
        },
    });
    Ok(json_response(200, &status))
}

fn delete_collection(
    shared: &Arc<Shared>,
    call: &Call,
    kind: &Kind,
    path: &ResourcePath,
) -> ApiResult<Response<Body>> {
    let (options, delete) = (call.options()?, delete_options(call)?);
    let selector = selector(call, kind)?;
    let items = shared.change(|state| {
        let found = state.store.list(&kind.resource, scope(kind, path));
        let found = found.iter().filter(|stored| selector.matches(stored));
        let deleted: ApiResult<Vec<_>> = found
            .map(|stored| {
                let key = &stored.key;
                state.delete(kind, &key.namespace, &key.name, &delete, &options)
            })
            .collect();
        deleted
    })?;
    let list = json!({
        "kind": kind.list_kind(), "apiVersion": kind.api_version(), "metadata": {}, "items": items,
    });
    Ok(json_response(200, &list))
}

fn selector(call: &Call, kind: &Kind) -> ApiResult<Selector> {
    let (labels, fields) = (
        call.query.text("labelSelector"),
        call.query.text("fieldSelector"),
    );
    Selector::parse(&kind.resource, labels, fields)
}

/// The namespace that a list is about; nothing for all.
fn scope<'a>(kind: &Kind, path: &'a ResourcePath) -> Option<&'a str> {
    (kind.namespaced && !path.namespace.is_empty()).then_some(path.namespace.as_str())
}

fn get(
    shared: &Shared,
    call: &Call,
    kind: &Kind,
    path: &ResourcePath,
    view: View,
) -> ApiResult<Response<Body>> {
    let state = shared.state();
    if let Some(version) = call.query.number("resourceVersion")?
        && version > state.store.version()
    {
        let newest = state.store.version();
        return Err(ApiError::too_large_resource_version(version, newest));
    }
    let stored = state
        .store
        .get(&kind.resource, &path.namespace, &path.name)
        .ok_or_else(|| ApiError::not_found(&kind.group, &kind.plural, &path.name))?;
    Ok(bytes_response(200, views::one(kind, stored, view)))
}

/// Where the next page of a list begins.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Continue {
    rv: u64,
    namespace: String,
    name: String,
}

fn list(
    shared: &Shared,
    call: &Call,
    kind: &Kind,
    path: &ResourcePath,
    view: View,
) -> ApiResult<Response<Body>> {
    let selector = selector(call, kind)?;
    let limit = call.query.number("limit")?.unwrap_or(0);
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let token = call.query.text("continue");
    let (objects, version) = {
        let state = shared.state();
        let version = list_version(shared, &state, call, kind)?;
        let found = state
            .store
            .list_at(&kind.resource, scope(kind, path), version);
        let found = found.map_err(|old| {
            let why = if token.is_empty() {
                format!("too old resource version: {version} ({})", old.oldest)
            } else {
                "The provided continue parameter is too old to display a consistent list result. You \
                 must start a new list without the continue parameter."
                    .to_owned()
            };
            ApiError::expired(why)
        });
        (found?, version)
    };
    let mut objects: Vec<_> = objects
        .into_iter()
        .filter(|stored| selector.matches(stored))
        .collect();
    if !token.is_empty() {
        let from = parse_continue(token)?;
        objects.retain(|stored| {
            (stored.key.namespace.as_str(), stored.key.name.as_str())
                >= (from.namespace.as_str(), from.name.as_str())
        });
    }
    let mut metadata = json!({"resourceVersion": version.to_string()});
    if limit > 0
        && let Some(next) = objects.get(limit)
    {
        let next = Continue {
            rv: version,
            namespace: next.key.namespace.clone(),
            name: next.key.name.clone(),
        };
        let token = serde_json::to_vec(&next).unwrap_or_default();
        object::set(&mut metadata, &["continue"], URL_SAFE_NO_PAD.encode(token));
        let selects = !call.query.text("labelSelector").is_empty()
            || !call.query.text("fieldSelector").is_empty();
        if !selects {
            object::set(
                &mut metadata,
                &["remainingItemCount"],
                objects.len() - limit,
            );
        }
        objects.truncate(limit);
    }
    Ok(bytes_response(
        200,
        views::list(kind, &objects, &metadata, view),
    ))
}

fn parse_continue(token: &str) -> ApiResult<Continue> {
    let bytes = URL_SAFE_NO_PAD.decode(token).ok();
    bytes
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .ok_or_else(|| ApiError::bad_request("continue key is not valid"))
}

/// The version that a list shows.
fn list_version(shared: &Shared, state: &State, call: &Call, kind: &Kind) -> ApiResult<u64> {
    let newest = state.store.version();
    let (asked, matching) = (
        call.query.number("resourceVersion")?,
        call.query.text("resourceVersionMatch"),
    );
    let refuse = |field: &str, why: &str| {
        let cause = Cause::forbidden(field, why);
        let options = "ListOptions";
        Err(ApiError::invalid(
            "meta.k8s.io",
            options,
            &kind.kind,
            &[cause],
        ))
    };
    if !matching.is_empty() && asked.is_none() {
        let why = "resourceVersionMatch is forbidden unless resourceVersion is provided";
        return refuse("resourceVersionMatch", why);
    }
    if !matches!(matching, "" | "Exact" | "NotOlderThan") {
        return refuse("resourceVersionMatch", "unsupported value");
    }
    if call.query.flag("sendInitialEvents") {
        return refuse(
            "sendInitialEvents",
            "sendInitialEvents is forbidden for list",
        );
    }
    let token = call.query.text("continue");
    if !token.is_empty() {
        if asked.is_some_and(|asked| asked != 0) {
            let why = "specifying resource version is not allowed when using continue";
            return Err(ApiError::bad_request(why));
        }
        return Ok(parse_continue(token)?.rv);
    }
    let asked = asked.unwrap_or(0);
    if asked > newest {
        return Err(ApiError::too_large_resource_version(asked, newest));
    }
    if matching == "Exact" {
        if asked == 0 {
            let why = "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"";
            return refuse("resourceVersionMatch", why);
        }
        return Ok(asked);
    }
    // A server that lags may answer with what it has, unless the client knows of newer things.
    Ok(match shared.faults.stale() {
        Some(stale) if asked <= stale => stale,
        _ => newest,
    })
}

fn watch(
    shared: &Arc<Shared>,
    call: &Call,
    kind: Arc<Kind>,
    path: &ResourcePath,
    view: View,
) -> ApiResult<Response<Body>> {
    let mut selector = selector(call, &kind)?;
    if !path.name.is_empty() {
        let name = format!("metadata.name={}", path.name);
        selector = Selector::parse(&kind.resource, "", &name)?;
    }
    let asked = call.query.number("resourceVersion")?;
    let streams = call.query.flag("sendInitialEvents");
    let matching = call.query.text("resourceVersionMatch");
    let bookmarks = call.query.flag("allowWatchBookmarks");
    let mode = shared.faults.streaming();
    check_watch(&kind, call, streams, matching, bookmarks, mode)?;
    let seconds = call.query.number("timeoutSeconds")?;
    let length = seconds.filter(|seconds| *seconds > 0);
    let length = length.map_or(WATCH_DEFAULT, Duration::from_secs);
    let namespace = scope(&kind, path).map(str::to_owned);
    let changed = shared.changes();
    let (listed, seen) = initial(shared, &kind, namespace.as_deref(), asked, streams)?;
    let mut watch = Watch {
        shared: Arc::clone(shared),
        kind,
        namespace,
        selector,
        view,
        seen,
        bookmarks,
        until: Instant::now() + length,
        pending: VecDeque::new(),
        ended: false,
        next_bookmark: Instant::now() + shared.options.bookmark_interval,
        changed,
        cut: shared.faults.watch_cuts(),
    };
    if streams && mode == StreamingLists::Broken {
        watch.fail(&ApiError::internal(
            "streaming lists are broken, as the test asked for",
        ));
    } else if let Some(listed) = listed {
        watch.begin_with(&listed);
        if streams && bookmarks {
            watch.end_of_list();
        }
    }
    let frames = stream::unfold(watch, |mut watch| async move {
        let next = watch.next().await?;
        Some((next.map(Frame::data), watch))
    });
    Ok(response(200, StreamBody::new(frames).boxed_unsync()))
}

fn check_watch(
    kind: &Kind,
    call: &Call,
    streams: bool,
    matching: &str,
    bookmarks: bool,
    mode: StreamingLists,
) -> ApiResult<()> {
    let refuse = |field: &str, why: &str| {
        let cause = Cause::forbidden(field, why);
        Err(ApiError::invalid(
            "meta.k8s.io",
            "ListOptions",
            &kind.kind,
            &[cause],
        ))
    };
    let given = !call.query.text("sendInitialEvents").is_empty();
    if given && mode == StreamingLists::Refused {
        let why =
            "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled";
        return refuse("sendInitialEvents", why);
    }
    if given && matching != "NotOlderThan" {
        let why = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan";
        return refuse("resourceVersionMatch", why);
    }
    if !given && !matching.is_empty() {
        let why =
            "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided";
        return refuse("resourceVersionMatch", why);
    }
    if streams && !bookmarks {
        let why = "sendInitialEvents requires allowWatchBookmarks";
        return refuse("allowWatchBookmarks", why);
    }
    if !call.query.text("continue").is_empty() {
        return refuse("continue", "continue is forbidden for watch");
    }
    Ok(())
}

type Listed = Option<Vec<Arc<Stored>>>;

/// The list that a watch begins with, if it does, and the version that it goes on from.
fn initial(
    shared: &Shared,
    kind: &Kind,
    namespace: Option<&str>,
    asked: Option<u64>,
    streams: bool,
) -> ApiResult<(Listed, u64)> {
    let state = shared.state();
    let newest = state.store.version();
    let asked = asked.unwrap_or(0);
    if asked != 0 && !streams {
        return Ok((None, asked));
    }
    if asked > newest {
        return Err(ApiError::too_large_resource_version(asked, newest));
    }
    let version = shared
        .faults
        .stale()
        .filter(|stale| asked <= *stale)
        .unwrap_or(newest);
    let listed = state.store.list_at(&kind.resource, namespace, version);
    let listed = listed.map_err(|old| {
        ApiError::expired(format!(
            "too old resource version: {version} ({})",
            old.oldest
        ))
    });
    Ok((Some(listed?), version))
}

fn review(
    shared: &Shared,
    call: &Call,
    kind: &Kind,
    path: &ResourcePath,
) -> ApiResult<Response<Body>> {
    if call.method != "POST" || !path.name.is_empty() {
        return Err(ApiError::method_not_allowed());
    }
    if kind.kind == "TokenReview" && shared.faults.token_reviews_refused() {
        return Err(ApiError::internal("an error that the test asked for"));
    }
    let mut review = body(call)?.value;
    object::set(&mut review, &["kind"], kind.kind.as_str());
    object::set(&mut review, &["apiVersion"], kind.api_version());
    if kind.namespaced {
        let place = ["spec", "resourceAttributes", "namespace"];
        object::set_default(&mut review, &place, path.namespace.as_str());
    }
    let state = shared.state();
    let (store, now_s) = (&state.store, Timestamp::now().as_second());
    let answer = reviews::answer(
        &kind.kind,
        review,
        &call.user,
        store,
        &shared.authority,
        now_s,
    );
    Ok(json_response(201, &answer))
}

fn token(shared: &Shared, call: &Call, path: &ResourcePath) -> ApiResult<Response<Body>> {
    let request = body(call)?.value;
    let state = shared.state();
    let kind = state.catalog.find("", "v1", "serviceaccounts");
    let kind = kind.ok_or_else(ApiError::no_such_path)?;
    let account = state.existing(kind, &path.namespace, &path.name)?;
    let now_s = Timestamp::now().as_second();
    let mut answer =
        reviews::token_request(request, &account, &state.store, &shared.authority, now_s)?;
    object::set(&mut answer, &["kind"], "TokenRequest");
    object::set(&mut answer, &["apiVersion"], "authentication.k8s.io/v1");
    Ok(json_response(201, &answer))
}
