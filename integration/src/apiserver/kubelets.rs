//! What the server does not answer itself but hands on to a node's kubelet: logs, sessions in containers, forwarded
//! ports, and `nodes/proxy` (`pkg/registry/core/pod/strategy.go`, `pkg/registry/core/node/rest`). Bytes of upgraded
//! connections pass as they are; the real server translates WebSocket to SPDY for older kubelets.

use std::{io, sync::Arc};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    client::conn::http1,
    header::{CONNECTION, HeaderMap, UPGRADE},
};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::copy_bidirectional;
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};

use super::{
    egress::client_config,
    error::{ApiError, ApiResult},
    object,
    request::{ResourcePath, Target},
    routes::Call,
    server::{Body, Shared},
};

/// Where a kubelet listens unless its node says otherwise.
const KUBELET_PORT: u16 = 10_250;

/// The order of the real server's `--kubelet-preferred-address-types`.
const ADDRESS_TYPES: [&str; 5] = [
    "Hostname",
    "InternalDNS",
    "InternalIP",
    "ExternalDNS",
    "ExternalIP",
];

/// The resource, if its kubelet answers for it.
pub(crate) fn asked(target: &Target) -> Option<ResourcePath> {
    let Target::Resource(path) = target else {
        return None;
    };
    let core = path.group.is_empty() && path.version == "v1" && !path.name.is_empty();
    let kubelets = match path.plural.as_str() {
        "pods" => matches!(
            path.subresource.as_str(),
            "log" | "exec" | "attach" | "portforward"
        ),
        "nodes" => path.subresource == "proxy",
        _ => false,
    };
    (core && kubelets).then(|| path.clone())
}

/// # Errors
///
/// Whatever the API says.
pub(crate) async fn answer(
    shared: &Arc<Shared>,
    call: Call,
    path: &ResourcePath,
) -> ApiResult<Response<Body>> {
    if call.method != "GET" {
        return Err(ApiError::method_not_allowed());
    }
    let (node, location) = location(shared, &call, path)?;
    let dialling = format!(
        "error dialing backend: Get \"https://{}:{}{location}\"",
        node.0, node.1
    );
    let response = hand_on(shared, call, node, &location).await;
    response.map_err(|error| ApiError::internal(format!("{dialling}: {error:#}")))
}

type Place = (String, u16);

/// The kubelet's host and port, and what to ask it for.
fn location(shared: &Shared, call: &Call, path: &ResourcePath) -> ApiResult<(Place, String)> {
    let state = shared.state();
    let get = |resource: &str, namespace: &str, name: &str| {
        let found = state.store.get(resource, namespace, name);
        let missing = || ApiError::not_found("", resource.trim_start_matches('/'), name);
        found.map(|stored| stored.value()).ok_or_else(missing)
    };
    if path.plural == "nodes" {
        let node = get("/nodes", "", &path.name)?;
        return Ok((
            place(&node)?,
            format!("/{}{}", path.rest, query(&call.raw_query)),
        ));
    }
    let pod = get("/pods", &path.namespace, &path.name)?;
    let node = object::text(&pod, &["spec", "nodeName"]).unwrap_or_default();
    if node.is_empty() {
        let why = format!("pod {} does not have a host assigned", path.name);
        return Err(ApiError::bad_request(why));
    }
    let place = place(&get("/nodes", "", node)?)?;
    let (namespace, name) = (&path.namespace, &path.name);
    if path.subresource == "portforward" {
        return Ok((place, format!("/portForward/{namespace}/{name}")));
    }
    let container = container(&pod, call.query.text("container"))?;
    let what = match path.subresource.as_str() {
        "log" => "containerLogs",
        other => other,
    };
    let renamed = renamed(&call.raw_query);
    Ok((
        place,
        format!("/{what}/{namespace}/{name}/{container}{}", query(&renamed)),
    ))
}

fn query(text: &str) -> String {
    if text.is_empty() {
        String::new()
    } else {
        format!("?{text}")
    }
}

/// A kubelet's names for streams are others; the container is in the path.
fn renamed(query: &str) -> String {
    let pairs = query
        .split('&')
        .filter(|pair| !pair.starts_with("container="));
    let pairs = pairs.map(|pair| match pair.split_once('=') {
        Some(("stdin", value)) => format!("input={value}"),
        Some(("stdout", value)) => format!("output={value}"),
        Some(("stderr", value)) => format!("error={value}"),
        _ => pair.to_owned(),
    });
    pairs.collect::<Vec<_>>().join("&")
}

fn container(pod: &Value, asked: &str) -> ApiResult<String> {
    let containers = object::list(pod, &["spec", "containers"]);
    let names: Vec<_> = containers
        .iter()
        .filter_map(|one| object::text(one, &["name"]))
        .collect();
    let pod = object::name(pod);
    match (asked, names.as_slice()) {
        ("", [only]) => Ok((*only).to_owned()),
        ("", several) => {
            let why = format!(
                "a container name must be specified for pod {pod}, choose one of: {several:?}"
            );
            Err(ApiError::bad_request(why))
        }
        (asked, names) if names.contains(&asked) => Ok(asked.to_owned()),
        (asked, _) => {
            let why = format!("container {asked} is not valid for pod {pod}");
            Err(ApiError::bad_request(why))
        }
    }
}

fn place(node: &Value) -> ApiResult<Place> {
    let addresses = object::list(node, &["status", "addresses"]);
    let of = |wanted: &str| {
        let typed = |one: &&Value| object::text(one, &["type"]) == Some(wanted);
        let found = addresses.iter().find(typed)?;
        object::text(found, &["address"]).map(str::to_owned)
    };
    let host = ADDRESS_TYPES.iter().find_map(|wanted| of(wanted));
    let no_address = || {
        let why = format!("no preferred addresses found; known addresses: {addresses:?}");
        ApiError::internal(why)
    };
    let port = ["status", "daemonEndpoints", "kubeletEndpoint", "Port"];
    let port = object::at(node, &port).and_then(Value::as_u64);
    let port = port.and_then(|port| u16::try_from(port).ok());
    Ok((host.ok_or_else(no_address)?, port.unwrap_or(KUBELET_PORT)))
}

async fn hand_on(
    shared: &Shared,
    call: Call,
    (host, port): Place,
    location: &str,
) -> Result<Response<Body>> {
    let stream = shared.egress.dial(&host, port).await?;
    let authority = &shared.authority;
    let own = &authority.kubelet_client;
    let config = client_config(&authority.ca_pem, &own.certificate_pem, &own.key_pem)?;
    let name = ServerName::try_from(host.clone())?;
    let stream = TlsConnector::from(config).connect(name, stream).await;
    let stream = stream.context("tls")?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // It ends with the response, or with what it was upgraded to.
    tokio::spawn(connection.with_upgrades());
    let mut request = Request::builder()
        .method(Method::GET)
        .uri(location)
        .header("host", format!("{host}:{port}"));
    let upgrades = call.headers.contains_key(UPGRADE);
    for (name, value) in &call.headers {
        let wanted =
            name == CONNECTION || name == UPGRADE || name.as_str().starts_with("sec-websocket");
        if upgrades && wanted {
            request = request.header(name, value);
        }
    }
    let mut response = sender
        .send_request(request.body(Full::new(Bytes::new()))?)
        .await?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let (parts, body) = response.into_parts();
        return Ok(with_headers(parts.status, parts.headers, streamed(body)));
    }
    let kubelet = hyper::upgrade::on(&mut response);
    let (client, headers) = (call.upgrade, response.headers().clone());
    tokio::spawn(async move {
        if let (Ok(client), Ok(kubelet)) = tokio::join!(client, kubelet) {
            let (mut client, mut kubelet) = (TokioIo::new(client), TokioIo::new(kubelet));
            // An error is one side's that is gone; the other hears of it.
            copy_bidirectional(&mut client, &mut kubelet).await.ok();
        }
    });
    let nothing = Full::new(Bytes::new()).map_err(|never| match never {});
    let switching = StatusCode::SWITCHING_PROTOCOLS;
    Ok(with_headers(switching, headers, nothing.boxed_unsync()))
}

fn streamed(body: Incoming) -> Body {
    body.map_err(io::Error::other).boxed_unsync()
}

fn with_headers(status: StatusCode, headers: HeaderMap, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_have_other_names_at_a_kubelet() {
        let query =
            "command=sh&command=-c&container=app&stdin=true&stdout=true&stderr=false&tty=true";
        let expected = "command=sh&command=-c&input=true&output=true&error=false&tty=true";
        assert_eq!(renamed(query), expected);
    }
}
