//! How a link comes up, and its task.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::ControlFlow,
    sync::Arc,
    time::Duration,
};

use futures_util::StreamExt as _;
use mesh_identity::{
    credentials::Credentials,
    tls::{client_config, explain, explain_io, server_name},
};
use mesh_wire::relay::{ALPN_QUIC, ALPN_TLS, Control, PROTOCOL_VERSION, WEBSOCKET_PATH};
use quinn_proto::{
    ClientConfig, ConnectionError, EndpointConfig, crypto::rustls::QuicClientConfig,
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
    BATCH_FRAMES, KEEP_ALIVE,
    queue::{QUIC_BYTES_MAX, Queue, TLS_BYTES_MAX},
    quic::{
        self,
        driver::{Driver, Received},
        endpoint::{Endpoint, Socket, Wire},
        link::QuicLink,
    },
    sockets, websocket,
};

/// Time for the goodbye of a link that is closed.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);

/// Control messages that wait for whoever hears of them: all sessions of a node (1,024), twice.
const CONTROLS_MAX: usize = 2048;

const HELLO: Control = Control::Hello {
    version: PROTOCOL_VERSION,
};

pub(super) async fn quic(
    config: LinkConfig,
    events: mpsc::Sender<LinkEvent>,
    on_data: OnData,
) -> Result<Link, ConnectError> {
    let mut driver = Driver::new(dial(&config)?);
    let queue = Arc::new(Queue::new(QUIC_BYTES_MAX));
    queue.push_control(HELLO);
    let mut welcome = None;
    let opening = driver.run(&queue, |received| match received {
        Received::Control(message) => {
            welcome = Some(message);
            ControlFlow::Break(())
        }
        Received::Frames(_) => ControlFlow::Continue(()), // A relay does not send any yet.
    });
    if let ControlFlow::Continue(reason) = opening.await {
        return Err(refused(reason));
    }
    if welcome != Some(Control::Welcome) {
        return Err(not_a_relay());
    }

    let (udp, udp_inputs) = config.udp.map(Udp::new).unzip();
    let shared = Shared::new(
        config.relay,
        config.address,
        queue,
        events,
        on_data,
        udp,
        driver.rtt_us(),
    );
    let link = Link {
        shared: shared.clone(),
    };
    // Ends with the link: when it is lost, closed or dropped.
    tokio::spawn(async move {
        let (controls, mut received) = mpsc::channel(CONTROLS_MAX);
        let serving = driver.run(&shared.queue, |received| {
            match received {
                Received::Frames(frames) => shared.on_frames(frames),
                Received::Control(message) => {
                    if controls.try_send(message).is_err() {
                        shared.queue.close("too slow");
                    }
                }
            }
            ControlFlow::Continue(())
        });
        let reading = async {
            while let Some(message) = received.recv().await {
                shared.on_control(message).await;
            }
        };
        let reason = tokio::select! {
            ended = serving => ended.continue_value(),
            () = reading => None, // The other end lives as long as `serving`.
            () = udp::bind(&shared, udp_inputs) => None, // It does not end.
            () = shared.stop.cancelled() => None,
        };
        match reason {
            Some(reason) => shared.lost(refused(reason).to_string()).await,
            None => {
                shared.queue.close("closed");
                let goodbye = driver.run(&shared.queue, |_| ControlFlow::Continue(()));
                time::timeout(GOODBYE_TIMEOUT, goodbye).await.ok();
            }
        }
    });
    Ok(link)
}

/// One socket a link: its NAT mapping lives and dies with it.
fn dial(config: &LinkConfig) -> Result<(QuicLink, Wire), ConnectError> {
    let name = relay_name(config)?;
    let any: SocketAddr = if config.address.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let udp = sockets::udp(any)?;
    config.outbound.bind_device(&udp, config.address.ip())?;
    let socket = Arc::new(Socket::new(udp)?);
    let settings = quic::without_grease(EndpointConfig::default());
    let client = quic_client_config(&config.credentials)?;
    Endpoint::new(socket, settings, None, Arc::default())
        .connect(client, config.address, &name.to_str())
        .map_err(|error| ConnectError::Refused(error.to_string()))
}

pub(super) async fn tls(
    config: LinkConfig,
    events: mpsc::Sender<LinkEvent>,
    on_data: OnData,
) -> Result<Link, ConnectError> {
    let (sink, mut stream) = websocket(&config).await?.split();
    let queue = Arc::new(Queue::new(TLS_BYTES_MAX));
    queue.push_control(HELLO);
    let for_writing = queue.clone();
    let mut writing = Box::pin(async move { websocket::write_frames(sink, &for_writing).await });
    let welcome = tokio::select! {
        received = websocket::receive(&mut stream) => received,
        result = &mut writing => websocket::Received::Closed(ended(result)),
    };
    match welcome {
        websocket::Received::Control(Control::Welcome) => {}
        websocket::Received::Closed(reason) => return Err(ConnectError::Refused(reason)),
        websocket::Received::Data(_)
        | websocket::Received::Control(_)
        | websocket::Received::Bad => return Err(not_a_relay()),
    }

    let shared = Shared::new(
        config.relay,
        config.address,
        queue.clone(),
        events,
        on_data,
        None,
        Arc::default(),
    );
    let link = Link {
        shared: shared.clone(),
    };
    // Ends with the link: when it is lost, closed or dropped.
    tokio::spawn(async move {
        let reading = async {
            let mut batch = Vec::with_capacity(BATCH_FRAMES);
            loop {
                let other = websocket::receive_batch(&mut stream, &mut batch).await;
                shared.on_frames(&batch);
                batch.clear();
                match other {
                    Some(websocket::Received::Control(message)) => shared.on_control(message).await,
                    Some(websocket::Received::Closed(reason)) => return reason,
                    None | Some(websocket::Received::Data(_) | websocket::Received::Bad) => {}
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
                queue.close("closed");
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
    let stream = config.outbound.connect(config.address).await?;
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
    let name = server_name(config.credentials.trust_domain(), &config.identity);
    name.map_err(|error| ConnectError::Credentials(error.to_string()))
}

fn quic_client_config(credentials: &Credentials) -> Result<ClientConfig, ConnectError> {
    let tls = client_config(credentials, &[ALPN_QUIC]).map_err(bad_credentials)?;
    let tls = QuicClientConfig::try_from(tls)
        .map_err(|error| ConnectError::Credentials(error.to_string()))?;
    let mut config = ClientConfig::new(Arc::new(tls));
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
