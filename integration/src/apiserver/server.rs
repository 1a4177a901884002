//! The sockets: TLS, HTTP/1.1, who asks and whether they may. What is asked is answered in
//! `routes`.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited, combinators::UnsyncBoxBody};
use hyper::{
    Request, Response,
    body::Incoming,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use jiff::Timestamp;
use serde_json::Value;
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Handle,
    sync::watch,
};
use tokio_rustls::TlsAcceptor;

use super::{
    Options,
    auth::{Authority, ISSUER},
    egress::Egress,
    error::{ApiError, ApiResult},
    faults::{Faults, UsedRight},
    kubelets, metadata,
    rbac::{self, Action, User},
    registry::State,
    request::{self, Query},
    routes,
};

/// Bytes of a request's body, as the real server takes them.
const BODY_MAX: usize = 3 << 20;

pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// What all connections share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) options: Options,
    pub(crate) authority: Authority,
    pub(crate) egress: Egress,
    pub(crate) faults: Faults,
    state: Mutex<State>,
    /// The newest version: watches wait for it to change.
    changed: watch::Sender<u64>,
    runtime: Handle,
}

impl Shared {
    pub(crate) fn new(
        options: Options,
        authority: Authority,
        egress: Egress,
        state: State,
    ) -> Self {
        Self {
            options,
            authority,
            egress,
            faults: Faults::default(),
            changed: watch::Sender::new(state.store.version()),
            state: Mutex::new(state),
            runtime: Handle::current(),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something to the state, and wakes the watches if it changed anything.
    pub(crate) fn change<T>(self: &Arc<Self>, change: impl FnOnce(&mut State) -> T) -> T {
        let (result, version, ending) = {
            let mut state = self.state();
            let result = change(&mut state);
            let ending = std::mem::take(&mut state.ending);
            (result, state.store.version(), ending)
        };
        for namespace in ending {
            self.end_later(namespace);
        }
        self.wake(version);
        result
    }

    /// A deleted namespace keeps its content for a while, as at the real server.
    fn end_later(self: &Arc<Self>, namespace: String) {
        let shared = Arc::clone(self);
        self.runtime.spawn(async move {
            tokio::time::sleep(shared.options.namespace_grace).await;
            let version = {
                let mut state = shared.state();
                state.end_namespace(&namespace, &metadata::now());
                state.store.version()
            };
            shared.wake(version);
        });
    }

    fn wake(&self, version: u64) {
        self.changed.send_if_modified(|seen| {
            let newer = version > *seen;
            *seen = version.max(*seen);
            newer
        });
    }

    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

/// Takes connections until the task is ended.
pub(crate) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let acceptor = TlsAcceptor::from(shared.authority.server_config());
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                // A client that is gone already is no reason to end.
                if let Ok((stream, _)) = accepted {
                    connections.spawn(connection(stream, acceptor.clone(), Arc::clone(&shared)));
                }
            }
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

async fn connection(stream: TcpStream, acceptor: TlsAcceptor, shared: Arc<Shared>) {
    let mut cut = shared.faults.connection_cuts();
    if stream.set_nodelay(true).is_err() {
        return;
    }
    let Ok(stream) = acceptor.accept(stream).await else {
        return;
    };
    let (_, session) = stream.get_ref();
    let certificate = session
        .peer_certificates()
        .and_then(|chain| Authority::user_of_certificate(chain.first()?));
    let service = service_fn(move |request| {
        let (shared, certificate) = (Arc::clone(&shared), certificate.clone());
        async move { Ok::<_, io::Error>(answer(shared, certificate, request).await) }
    });
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::select! {
        // Errors here are the client's: it went away, or a test cut it.
        served = serving => drop(served),
        _ = cut.changed() => {}
    }
}

async fn answer(
    shared: Arc<Shared>,
    certificate: Option<User>,
    mut request: Request<Incoming>,
) -> Response<Body> {
    let upgrade = hyper::upgrade::on(&mut request);
    let (parts, body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    let delay = shared.faults.delay();
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    if let Some(code) = shared.faults.refusal(&path) {
        return refused(&match code {
            429 => ApiError::too_many_requests(1),
            500 => ApiError::internal("an error that the test asked for"),
            code => ApiError::new(
                code,
                "ServiceUnavailable",
                "an error that the test asked for",
            ),
        });
    }
    let body = match Limited::new(body, BODY_MAX).collect().await {
        Ok(body) => body.to_bytes(),
        Err(_) => {
            let why = format!("Request entity too large: limit is {BODY_MAX}");
            return refused(&ApiError::new(413, "RequestEntityTooLarge", why));
        }
    };
    let query = Query::parse(parts.uri.query().unwrap_or_default());
    let target = request::target(&path);
    let call = routes::Call {
        method: parts.method.as_str().to_owned(),
        headers: parts.headers,
        user: User::default(),
        query,
        target,
        body,
        raw_query: parts.uri.query().unwrap_or_default().to_owned(),
        upgrade,
    };
    let checked = checked(&shared, certificate, call);
    let answered = match checked {
        Ok(call) => match kubelets::asked(&call.target) {
            Some(path) => kubelets::answer(&shared, call, &path).await,
            None => routes::answer(&shared, call),
        },
        Err(error) => Err(error),
    };
    answered.unwrap_or_else(|error| refused(&error))
}

/// The request of somebody who is known, and may make it.
fn checked(
    shared: &Arc<Shared>,
    certificate: Option<User>,
    mut call: routes::Call,
) -> ApiResult<routes::Call> {
    call.user = who(shared, certificate, &call.headers)?;
    impersonate(shared, &mut call)?;
    let action = request::action(&call.method, &call.target, &call.query);
    check_right(shared, &call.user, &action)?;
    Ok(call)
}

fn who(shared: &Shared, certificate: Option<User>, headers: &HeaderMap) -> ApiResult<User> {
    let header = headers.get(AUTHORIZATION);
    let header = header.and_then(|header| header.to_str().ok());
    if let Some(token) = header.and_then(|header| header.strip_prefix("Bearer ")) {
        let now_s = Timestamp::now().as_second();
        let state = shared.state();
        return shared
            .authority
            .user_of_token(&state.store, token.trim(), &[ISSUER], now_s)
            .map(|(user, _)| user)
            .map_err(|_| ApiError::unauthorized());
    }
    if header.is_some() {
        return Err(ApiError::unauthorized());
    }
    Ok(certificate.unwrap_or_else(|| User {
        name: "system:anonymous".to_owned(),
        groups: vec!["system:unauthenticated".to_owned()],
        ..User::default()
    }))
}

/// `--as` and `--as-group`: who may, acts for another.
fn impersonate(shared: &Shared, call: &mut routes::Call) -> ApiResult<()> {
    let texts = |name: &str| -> Vec<String> {
        let values = call.headers.get_all(name).iter();
        values
            .filter_map(|value| value.to_str().ok().map(str::to_owned))
            .collect()
    };
    let (names, groups) = (texts("impersonate-user"), texts("impersonate-group"));
    let Some(name) = names.first() else {
        return Ok(());
    };
    let wanted = std::iter::once(("users", name)).chain(groups.iter().map(|one| ("groups", one)));
    for (resource, name) in wanted {
        let action = Action {
            verb: "impersonate".to_owned(),
            resource: resource.to_owned(),
            name: name.clone(),
            ..Action::default()
        };
        check_right(shared, &call.user, &action)?;
    }
    let mut user = User {
        name: name.clone(),
        groups,
        ..User::default()
    };
    if let Some((namespace, _)) = name
        .strip_prefix("system:serviceaccount:")
        .and_then(|rest| rest.split_once(':'))
    {
        user.groups.push("system:serviceaccounts".to_owned());
        user.groups
            .push(format!("system:serviceaccounts:{namespace}"));
    }
    user.groups.push("system:authenticated".to_owned());
    call.user = user;
    Ok(())
}

/// # Errors
///
/// 403 if no rule allows it.
pub(crate) fn check_right(shared: &Shared, user: &User, action: &Action) -> ApiResult<()> {
    if !rbac::allowed(&shared.state().store, user, action) {
        let about = match (action.resource.is_empty(), action.name.is_empty()) {
            (true, _) => String::new(),
            (false, true) => format!("{} is forbidden: ", qualified(action)),
            (false, false) => format!("{} {:?} is forbidden: ", qualified(action), action.name),
        };
        return Err(ApiError::forbidden(format!(
            "{about}{}",
            action.refusal(user)
        )));
    }
    let resource = match (action.resource.is_empty(), action.subresource.is_empty()) {
        (true, _) => action.path.clone(),
        (false, true) => action.resource.clone(),
        (false, false) => format!("{}/{}", action.resource, action.subresource),
    };
    shared.faults.use_right(UsedRight {
        user: user.name.clone(),
        verb: action.verb.clone(),
        group: action.group.clone(),
        resource,
        namespace: action.namespace.clone(),
    });
    Ok(())
}

fn qualified(action: &Action) -> String {
    if action.group.is_empty() {
        action.resource.clone()
    } else {
        format!("{}.{}", action.resource, action.group)
    }
}

fn refused(error: &ApiError) -> Response<Body> {
    let mut response = json_response(error.code, &error.body());
    if let Some(seconds) = error.retry_after_s {
        response
            .headers_mut()
            .insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// An answer that is JSON.
pub(crate) fn json_response(code: u16, value: &Value) -> Response<Body> {
    bytes_response(code, Bytes::from(value.to_string()))
}

/// An answer whose JSON is ready.
pub(crate) fn bytes_response(code: u16, bytes: Bytes) -> Response<Body> {
    let full = Full::new(bytes)
        .map_err(|never| match never {})
        .boxed_unsync();
    response(code, full)
}

/// An answer with a body.
pub(crate) fn response(code: u16, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = hyper::StatusCode::from_u16(code).unwrap_or_default();
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
