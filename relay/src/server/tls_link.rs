//! Links by TLS: TCP, TLS 1.3, HTTP, WebSocket.

use std::{io, net::IpAddr, sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use mesh_core::io::RelayTransport;
use mesh_identity::tls::explain_io;
use mesh_wire::{
    id::{NodeId, canonical_ip},
    relay::{Control, WEBSOCKET_PATH},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        handshake::{
            machine::TryParse as _,
            server::{Request, create_response, write_response},
        },
        protocol::Role,
    },
};

use super::{HANDSHAKE_TIMEOUT, STOPPING, Shared};
use crate::{
    BATCH_FRAMES,
    queue::{Queue, TLS_BYTES_MAX},
    websocket::{self, Received},
};

/// Longest HTTP request head; ours has 300 bytes, a proxy adds some.
const REQUEST_HEAD_MAX: usize = 8192;

/// Pause after a failed `accept`: out of file descriptors, which does not go away faster.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const NOT_HERE: &[u8] = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
const UPGRADE: &[u8] = b"HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\n\
    Connection: Upgrade, close\r\nContent-Length: 0\r\n\r\n";

/// Accepts connections.
pub(super) async fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    loop {
        let (stream, from) = match listener.accept().await {
            Ok((stream, from)) => (stream, canonical_ip(from.ip())),
            Err(error) => {
                tracing::debug!(%error, "accept failed");
                time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let permit = shared.handshakes.clone().try_acquire_owned();
        let (Ok(permit), Ok(())) = (permit, shared.hub.handshake(from)) else {
            shared.hub.handshake_failed();
            continue; // Closed.
        };
        let (tls, shared_with_link) = (shared.tls.load().tcp.clone(), shared.clone());
        shared.links.spawn(async move {
            let opening = open(stream, from, &tls, &shared_with_link);
            let opened = time::timeout(HANDSHAKE_TIMEOUT, opening).await;
            drop(permit);
            match opened {
                Ok(Some(link)) => serve(link, from, &shared_with_link).await,
                Ok(None) | Err(_) => shared_with_link.hub.handshake_failed(),
            }
        });
    }
}

struct Opened {
    node: NodeId,
    socket: WebSocketStream<TlsStream<TcpStream>>,
    version: u32,
}

async fn open(
    stream: TcpStream,
    from: IpAddr,
    tls: &TlsAcceptor,
    shared: &Shared,
) -> Option<Opened> {
    websocket::tune_tcp(&stream).ok()?;
    let mut stream = match tls.accept(stream).await {
        Ok(stream) => stream,
        Err(error) => {
            tracing::debug!(%from, error = explain_io(&error), "TLS handshake failed");
            return None;
        }
    };
    let (_, session) = stream.get_ref();
    let node = shared.node(session.peer_certificates()?)?;
    let rest = match upgrade(&mut stream).await {
        Ok(rest) => rest,
        Err(error) => {
            tracing::debug!(%from, %error, "not a WebSocket upgrade");
            shared.hub.plain_http_request();
            return None;
        }
    };
    let config = Some(websocket::websocket_config());
    let mut socket = WebSocketStream::from_partially_read(stream, rest, Role::Server, config).await;
    match websocket::receive(&mut socket).await {
        Received::Control(Control::Hello { version }) => Some(Opened {
            node,
            socket,
            version,
        }),
        Received::Data(_) | Received::Control(_) | Received::Bad | Received::Closed(_) => None,
    }
}

/// Reads the HTTP request and answers it. Returns what came after it.
async fn upgrade(stream: &mut TlsStream<TcpStream>) -> io::Result<Vec<u8>> {
    let mut head = Vec::with_capacity(1024);
    let (length, request) = loop {
        match Request::try_parse(&head) {
            Ok(Some(parsed)) => break parsed,
            Ok(None) if head.len() < REQUEST_HEAD_MAX => {}
            Ok(None) | Err(_) => return refuse(stream, NOT_HERE).await,
        }
        if stream.read_buf(&mut head).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    };
    if request.uri().path() != WEBSOCKET_PATH {
        return refuse(stream, NOT_HERE).await;
    }
    let Ok(response) = create_response(&request) else {
        return refuse(stream, UPGRADE).await;
    };
    let mut text = Vec::new();
    write_response(&mut text, &response).map_err(io::Error::other)?;
    stream.write_all(&text).await?;
    stream.flush().await?;
    Ok(head.split_off(length))
}

async fn refuse(stream: &mut TlsStream<TcpStream>, answer: &[u8]) -> io::Result<Vec<u8>> {
    stream.write_all(answer).await?;
    stream.shutdown().await?;
    Err(io::Error::other("a plain HTTP request"))
}

async fn serve(link: Opened, from: IpAddr, shared: &Shared) {
    let Opened {
        node,
        socket,
        version,
    } = link;
    let (sink, mut stream) = socket.split();
    let queue = Arc::new(Queue::new(TLS_BYTES_MAX));
    let mut writing = Box::pin(websocket::write_frames(sink, &queue));
    let connected = shared
        .hub
        .connected(node, RelayTransport::Tls, from, version, queue.clone());
    let link = match connected {
        Ok(link) => link,
        Err(refusal) => {
            queue.close(&refusal.to_string());
            return say_goodbye(&queue, writing).await;
        }
    };
    tracing::debug!(?node, %from, "TLS link up");
    let reading = async {
        let mut batch = Vec::with_capacity(BATCH_FRAMES);
        loop {
            let other = websocket::receive_batch(&mut stream, &mut batch).await;
            shared.hub.frames(link, &batch);
            batch.clear();
            match other {
                None | Some(Received::Data(_)) => {}
                Some(Received::Control(message)) => shared.hub.control(link, message),
                Some(Received::Bad) => shared.hub.bad_frame(),
                Some(Received::Closed(reason)) => {
                    return tracing::debug!(?node, %from, reason, "closed");
                }
            }
        }
    };
    let writer_ended = tokio::select! {
        () = reading => false,
        _ = &mut writing => true,
        () = queue.overdue() => true,
        () = shared.close.cancelled() => false,
    };
    shared.hub.disconnected(link);
    if !writer_ended {
        queue.close(STOPPING);
        say_goodbye(&queue, writing).await;
    }
    tracing::debug!(?node, %from, "TLS link down");
}

async fn say_goodbye<T>(queue: &Queue, writing: impl Future<Output = T>) {
    tokio::select! {
        _ = writing => {}
        () = queue.overdue() => {}
    }
}
