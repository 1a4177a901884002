//! How a link comes up, and its task.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures_util::StreamExt as _;
use mesh_identity::{
    credentials::Credentials,
    tls::{client_config, explain, explain_io, server_name},
};
use mesh_wire::{
    id::Identity,
    relay::{ALPN_QUIC, ALPN_TLS, Control, PROTOCOL_VERSION, WEBSOCKET_PATH},
};
use quinn::{
    ConnectionError, Endpoint, EndpointConfig, TokioRuntime, crypto::rustls::QuicClientConfig,
};
use rustls::pki_types::ServerName;
use tokio::{net::TcpStream, sync::mpsc, time};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::{WebSocketStream, client_async_with_config, tungstenite};

use super::{
    ConnectError, Link, LinkConfig, LinkEvent, OnData, Shared,
    udp::{self, Udp},
};
use crate::{
    outlet::{CLOSE_CODE, CONTROL_QUEUE_MAX, Outlet},
    quic::{self, KEEP_ALIVE},
    sockets,
    websocket::{self, Queue, Received},
};

/// Time for the goodbye of a link that is closed.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);

const HELLO: Control = Control::Hello {
    version: PROTOCOL_VERSION,
};

pub(super) async fn quic(
    config: LinkConfig,
    events: mpsc::Sender<LinkEvent>,
    on_data: OnData,
) -> Result<Link, ConnectError> {
    let name = relay_name(&config)?;
    let endpoint = quic_endpoint(config.address)?;
    let client = quic_client_config(&config.credentials)?;
    let connecting = endpoint
        .connect_with(client, config.address, &name.to_str())
        .map_err(|error| ConnectError::Refused(error.to_string()))?;
    let connection = connecting.await.map_err(refused)?;
    let (mut send, mut receive) = connection.open_bi().await.map_err(refused)?;
    quic::write_control(&mut send, &HELLO).await.ok(); // If it fails, reading says why.
    match quic::read_control(&mut receive).await {
        Ok(Control::Welcome) => {}
        Ok(_) => return Err(not_a_relay()),
        Err(error) => {
            let reason = connection.close_reason().map(refused);
            return Err(reason.unwrap_or(ConnectError::Io(error)));
        }
    }

    let (control, mut outgoing) = mpsc::channel(CONTROL_QUEUE_MAX);
    let outlet = Outlet::Quic {
        connection: connection.clone(),
        control,
    };
    let (udp, udp_inputs) = config.udp.map(Udp::new).unzip();
    let shared = Shared::new(config.relay, config.address, outlet, events, on_data, udp);
    let link = Link {
        shared: shared.clone(),
    };
    // Ends with the link: when it is lost, closed or dropped.
    tokio::spawn(async move {
        let frames = quic::receive_frames(&connection, |frames| shared.on_frames(frames));
        let binding = udp::bind(&shared, udp_inputs);
        let reading = async {
            while let Ok(message) = quic::read_control(&mut receive).await {
                shared.on_control(message).await;
            }
            end_of_stream(&connection).await
        };
        let writing = async {
            quic::write_controls(&mut send, &mut outgoing).await;
            end_of_stream(&connection).await
        };
        let reason = tokio::select! {
            reason = frames => Some(reason),
            reason = reading => Some(reason),
            reason = writing => Some(reason),
            () = binding => None, // It does not end.
            () = shared.stop.cancelled() => None,
        };
        match reason {
            Some(reason) => shared.lost(refused(reason).to_string()).await,
            None => shared.outlet.close("closed"),
        }
        time::timeout(GOODBYE_TIMEOUT, endpoint.wait_idle())
            .await
            .ok();
    });
    Ok(link)
}

/// The control stream ended; a connection without it is of no use. Mostly it ends because the
/// connection does, which has the better reason and may say it a moment later.
async fn end_of_stream(connection: &quinn::Connection) -> ConnectionError {
    let closed = time::timeout(GOODBYE_TIMEOUT, connection.closed()).await;
    match closed {
        Ok(reason) => reason,
        Err(_) => {
            connection.close(CLOSE_CODE, b"no control stream");
            connection.closed().await
        }
    }
}

pub(super) async fn tls(
    config: LinkConfig,
    events: mpsc::Sender<LinkEvent>,
    on_data: OnData,
) -> Result<Link, ConnectError> {
    let (sink, mut stream) = websocket(&config).await?.split();
    let queue = Arc::new(Queue::default());
    queue.push_control(&HELLO);
    let outlet = Outlet::Tls(queue.clone());
    let for_writing = queue.clone();
    let mut writing = Box::pin(async move { websocket::write_frames(sink, &for_writing).await });
    let welcome = tokio::select! {
        received = websocket::receive(&mut stream) => received,
        result = &mut writing => Received::Closed(ended(result)),
    };
    match welcome {
        Received::Control(Control::Welcome) => {}
        Received::Closed(reason) => return Err(ConnectError::Refused(reason)),
        Received::Data(_) | Received::Control(_) | Received::Bad => return Err(not_a_relay()),
    }

    let shared = Shared::new(config.relay, config.address, outlet, events, on_data, None);
    let link = Link {
        shared: shared.clone(),
    };
    // Ends with the link: when it is lost, closed or dropped.
    tokio::spawn(async move {
        let reading = async {
            let mut batch = Vec::with_capacity(quic::BATCH_FRAMES);
            loop {
                let other = websocket::receive_batch(&mut stream, &mut batch).await;
                shared.on_frames(&batch);
                batch.clear();
                match other {
                    Some(Received::Control(message)) => shared.on_control(message).await,
                    Some(Received::Closed(reason)) => return reason,
                    None | Some(Received::Data(_) | Received::Bad) => {}
                }
            }
        };
        let pinging = async {
            let mut every = time::interval(KEEP_ALIVE);
            for txid in 1.. {
                every.tick().await;
                shared.ping(txid);
            }
        };
        let reason = tokio::select! {
            reason = reading => Some(reason),
            result = &mut writing => Some(ended(result)),
            () = shared.stop.cancelled() => None,
            () = pinging => None, // In 2⁶⁴ × 15 s.
        };
        match reason {
            Some(reason) => shared.lost(reason).await,
            None => {
                shared.outlet.close("closed");
                tokio::select! {
                    _ = writing => {}
                    () = queue.overdue() => {}
                }
            }
        }
    });
    Ok(link)
}

/// TCP, TLS and the WebSocket upgrade.
async fn websocket(
    config: &LinkConfig,
) -> Result<WebSocketStream<TlsStream<TcpStream>>, ConnectError> {
    let name = relay_name(config)?;
    let tls = client_config(&config.credentials, &[ALPN_TLS]);
    let tls = TlsConnector::from(Arc::new(tls.map_err(bad_credentials)?));
    let url = format!("wss://{}{WEBSOCKET_PATH}", name.to_str());
    let stream = TcpStream::connect(config.address).await?;
    websocket::tune_tcp(&stream)?;
    let stream = tls.connect(name, stream).await.map_err(tls_refused)?;
    let config = Some(websocket::websocket_config());
    let upgraded = client_async_with_config(url, stream, config).await;
    match upgraded {
        Ok((websocket, _)) => Ok(websocket),
        Err(tungstenite::Error::Io(error)) => Err(tls_refused(error)),
        Err(error) => Err(ConnectError::Refused(error.to_string())),
    }
}

fn ended(result: Result<(), tungstenite::Error>) -> String {
    match result {
        Ok(()) => "connection closed".to_owned(),
        Err(tungstenite::Error::Io(error)) => explain_io(&error),
        Err(error) => error.to_string(),
    }
}

fn relay_name(config: &LinkConfig) -> Result<ServerName<'static>, ConnectError> {
    let relay = Identity::Relay(config.relay.clone());
    let name = server_name(config.credentials.trust_domain(), &relay);
    name.map_err(|error| ConnectError::Credentials(error.to_string()))
}

/// One socket a link: its NAT mapping lives and dies with it.
fn quic_endpoint(address: SocketAddr) -> Result<Endpoint, ConnectError> {
    let any: SocketAddr = if address.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let config = quic::without_grease(EndpointConfig::default());
    let runtime = Arc::new(TokioRuntime);
    Ok(Endpoint::new(config, None, sockets::udp(any)?, runtime)?)
}

fn quic_client_config(credentials: &Credentials) -> Result<quinn::ClientConfig, ConnectError> {
    let tls = client_config(credentials, &[ALPN_QUIC]).map_err(bad_credentials)?;
    let tls = QuicClientConfig::try_from(tls)
        .map_err(|error| ConnectError::Credentials(error.to_string()))?;
    let mut config = quinn::ClientConfig::new(Arc::new(tls));
    config.transport_config(quic::transport_config(0, Some(KEEP_ALIVE)));
    Ok(config)
}

fn bad_credentials(error: rustls::Error) -> ConnectError {
    ConnectError::Credentials(explain(&error))
}

fn not_a_relay() -> ConnectError {
    ConnectError::Refused("the other side does not speak as a relay does".to_owned())
}

fn tls_refused(error: std::io::Error) -> ConnectError {
    let is_tls = error
        .get_ref()
        .is_some_and(|inner| inner.is::<rustls::Error>());
    if is_tls {
        ConnectError::Refused(explain_io(&error))
    } else {
        ConnectError::Io(error)
    }
}

/// The relay's own words, if it gave any.
fn refused(error: ConnectionError) -> ConnectError {
    let text = if let ConnectionError::ApplicationClosed(close) = &error {
        String::from_utf8_lossy(&close.reason).into_owned()
    } else if error == ConnectionError::Reset {
        "the relay does not know this connection any more".to_owned()
    } else {
        error.to_string()
    };
    ConnectError::Refused(text)
}
